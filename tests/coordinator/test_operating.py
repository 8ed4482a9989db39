"""What operators do to runs that nobody plays: pause, resume, abort, rollback, and looking on."""

import fcntl
import hashlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from covey_coordinator.config import BrokerConfig
from covey_coordinator.daemon import only_one
from covey_coordinator.fleet import FleetDirectory
from covey_coordinator.operating import Operator, find_round, shown
from covey_coordinator.store import FILE, OpenRound, RunDirectory, RunStatus, Store
from covey_coordinator.store.takeover import catch_up
from covey_shared.errors import ConfigError

MODELS = [np.array([i, i + 0.5], np.float32) for i in range(20)]


@pytest.fixture
def fleet(tmp_path: Path) -> Path:
    FleetDirectory.create(tmp_path, "farm", BrokerConfig())
    return tmp_path


@pytest.fixture
def run(fleet: Path) -> Iterator[RunDirectory]:
    with Store.open(fleet / FILE) as store:
        yield RunDirectory.create(fleet / "runs" / "one", b"", bytes(16), store)


def digest(model: int) -> str:
    return hashlib.sha256(MODELS[model].tobytes()).hexdigest()


def play(run: RunDirectory, *outcomes: bool, model: int = 0) -> None:
    """Rounds as `Run` ends them. model: the first of those that they give."""
    for completed in outcomes:
        state, number = run.state(), run.store.next_round()
        index = state.rounds_done + 1
        state.rounds_done = index
        state.last = {"round": number, "index": index, "outcome": "abandoned", "reason": "r"}
        if completed:
            given = model + index
            run.stage_model(index, MODELS[given], b"onnx %d" % given)
            state.rounds_completed += 1
            state.model, state.model_index = digest(given), index
            state.last |= {"outcome": "completed", "next_model": digest(given)}
            del state.last["reason"]
        else:
            state.rounds_abandoned += 1
        run.finish_round(state)
        run.settle(state)
        (run.round(index)).mkdir(exist_ok=True)
        (run.round(index) / "transcript").write_bytes(b"transcript of %d" % number)


def stand(run: RunDirectory, status: RunStatus) -> None:
    state = run.state()
    state.status = status
    run.save_state(state)


def open_a_round(run: RunDirectory) -> None:
    index, number = run.state().rounds_done + 1, run.store.next_round()
    run.store.open_round(OpenRound(run.name, index, number, b"spec", bytes(32), 0.0))


@contextmanager
def played(fleet: Path) -> Iterator[None]:
    """As if a `covey up` ran."""
    with only_one(fleet):
        yield


# -- pause, resume, abort --------------------------------------------------------------------------

# (status, what is done) -> (status afterwards, wish, what is said); None: it is refused.
ALONE: dict[tuple[RunStatus, str], tuple[str, str, str]] = {
    ("queued", "pause"): ("paused", "", "run one is paused; covey resume one lets it go on"),
    ("running", "pause"): ("paused", "", "run one is paused; covey resume one lets it go on"),
    ("paused", "pause"): ("paused", "", "run one is paused already"),
    ("queued", "resume"): ("queued", "", "run one is queued already"),
    ("running", "resume"): ("running", "", "run one is running already"),
    ("paused", "resume"): ("queued", "", "run one is queued again: `covey up` does not run"),
    ("failed", "resume"): ("queued", "", "run one is queued again"),
    ("stopped", "resume"): ("queued", "", "run one is queued again"),
    ("queued", "abort"): ("aborted", "", "run one is aborted"),
    ("running", "abort"): ("aborted", "", "run one is aborted"),
    ("paused", "abort"): ("aborted", "", "run one is aborted"),
    ("failed", "abort"): ("aborted", "", "run one is aborted"),
    ("aborted", "abort"): ("aborted", "", "run one is aborted already"),
}
PLAYED = ALONE | {
    ("running", "pause"): ("running", "pause", "run one pauses when its open round is over; --now"),
    ("running", "pause --now"): ("running", "pause now", "run one pauses now: its open round is"),
    ("running", "abort"): (
        "running",
        "abort",
        "run one is aborted now: its open round is abandoned",
    ),
    ("paused", "resume"): ("queued", "", "run one is queued again"),
}
REFUSED: dict[tuple[RunStatus, str], str] = {
    ("completed", "pause"): "run one is not to be paused: it is completed",
    ("aborted", "pause"): "run one is not to be paused: it is aborted",
    ("failed", "pause"): "run one is not to be paused: it is failed",
    (
        "completed",
        "resume",
    ): "cannot go on: it is completed; queue a new one, or take it back with covey",
    ("aborted", "resume"): "run one cannot go on: it is aborted; queue a new one",
    ("completed", "abort"): "run one is over: it is completed",
}


def do(fleet: Path, what: str) -> str:
    with Operator(fleet) as operator:
        if what.startswith("pause"):
            return operator.pause("one", now="now" in what)
        return operator.resume("one") if what == "resume" else operator.abort("one")


@pytest.mark.parametrize("up", [False, True])
def test_what_comes_of_each_command(fleet: Path, run: RunDirectory, up: bool):
    for (status, what), (after, wish, said) in (PLAYED if up else ALONE).items():
        stand(run, status)
        run.store.amend("one", lambda record: "")
        if up:
            with played(fleet):
                told = do(fleet, what)
        else:
            told = do(fleet, what)
        record = run.store.record("one")
        assert (record.state.status, record.wish) == (after, wish), (status, what)
        assert told.startswith(said), (status, what)


@pytest.mark.parametrize(("status", "what"), REFUSED)
def test_what_is_refused(fleet: Path, run: RunDirectory, status: RunStatus, what: str):
    stand(run, status)
    with pytest.raises(ConfigError, match=REFUSED[status, what]):
        do(fleet, what)
    assert run.store.record("one").state.status == status


def test_an_interrupted_round_is_finished_before_its_run_pauses(fleet: Path, run: RunDirectory):
    stand(run, "running")
    open_a_round(run)
    assert do(fleet, "pause").startswith("run one has an open round, which the next `covey up`")
    record = run.store.record("one")
    assert (record.state.status, record.wish) == ("running", "pause")
    assert do(fleet, "resume") == "run one goes on"
    assert run.store.record("one").wish == ""
    assert do(fleet, "pause --now").startswith("run one is paused")
    assert run.store.record("one").state.status == "paused"


def test_a_round_that_was_to_be_abandoned_does_not_come_back(fleet: Path, run: RunDirectory):
    stand(run, "running")
    open_a_round(run)
    do(fleet, "pause --now")
    assert run.store.opened() is not None  # for `covey up` to tell the devices
    do(fleet, "resume")
    assert run.store.opened() is None


def test_an_abortion_is_not_called_off(fleet: Path, run: RunDirectory):
    stand(run, "running")
    with played(fleet):
        do(fleet, "abort")
        with pytest.raises(ConfigError, match="run one is being aborted"):
            do(fleet, "resume")


def test_a_run_there_is_not(fleet: Path, run: RunDirectory):
    with Operator(fleet) as operator, pytest.raises(ConfigError, match="there is no run 'two'"):
        operator.pause("two", now=False)


def test_looking_makes_no_database(fleet: Path):
    with pytest.raises(ConfigError, match="there is no run in"), Operator(fleet):
        pass
    assert not (fleet / FILE).exists()


def test_nobody_is_kept_from_starting_by_a_command_for_long(fleet: Path, run: RunDirectory):
    with Operator(fleet) as operator:
        assert operator.alone
        with (fleet / ".lock").open("w") as lock, pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with only_one(fleet), Operator(fleet) as operator:
        assert not operator.alone


# -- rollback --------------------------------------------------------------------------------------


def back(fleet: Path, to: int) -> str:
    with Operator(fleet) as operator:
        return operator.roll_back("one", to, 1000.0)


def files(run: RunDirectory) -> dict[str, bytes]:
    names = ("model.onnx", "parameters.bin", "metrics.jsonl")
    return {n: (run.path / n).read_bytes() for n in names if (run.path / n).exists()}


def test_a_run_goes_back_and_on_from_there(fleet: Path, run: RunDirectory):
    play(run, True, True, False, True, True)
    stand(run, "paused")
    at_two = b"".join((run.metrics.read_bytes()).splitlines(keepends=True)[:2])
    assert back(fleet, 2) == (
        "run one is back at round 2 of the 5 that it had played; covey resume one lets it go on from "
        "there"
    )
    state = run.state()
    assert (state.rounds_done, state.rounds_completed, state.rounds_abandoned) == (2, 2, 0)
    assert (state.model, state.model_index) == (digest(2), 2)
    assert state.last == run.store.rounds("one")[-1]
    assert [line["index"] for line in run.store.rounds("one")] == [1, 2]
    assert files(run) == {
        "model.onnx": b"onnx 2",
        "parameters.bin": MODELS[2].tobytes(),
        "metrics.jsonl": at_two,
    }
    assert run.parameters(state, 2) is not None
    history = run.store.history("one")
    assert [(r.index, r.rolled_back_unix) for r in history] == [
        (1, None), (2, None), (3, 1000.0), (4, 1000.0), (5, 1000.0),
    ]  # fmt: skip
    aside = sorted(path.name for path in (run.path / "rolled-back").iterdir())
    assert aside == ["00003-3", "00004-4", "00005-5"]
    assert sorted(path.name for path in (run.path / "rounds").iterdir()) == ["00001", "00002"]

    # Other rounds take the numbers, and nothing of the old ones is lost.
    do(fleet, "resume")
    play(run, True, True, model=10)
    run.settle(run.state(), whole=True)
    assert [line["round"] for line in run.store.rounds("one")] == [1, 2, 6, 7]
    assert files(run)["model.onnx"] == b"onnx 14"
    record, others = find_round(run.store, "one", 3)
    assert (record.line["round"], [other.line["round"] for other in others]) == (6, [3])
    old, new = shown(run, others[0]), shown(run, record)
    assert old.transcript is not None
    assert old.transcript.read_bytes() == b"transcript of 3"
    assert new.transcript is not None
    assert new.transcript.read_bytes() == b"transcript of 6"
    assert old.model is None  # it was abandoned
    assert (run.round(3) / "model.onnx").read_bytes() == b"onnx 13"

    # And back again, over what was rolled back once.
    stand(run, "paused")
    back(fleet, 1)
    assert [line["round"] for line in run.store.rounds("one")] == [1]
    record, others = find_round(run.store, "one", 3)
    assert (record.line["round"], record.rolled_back_unix) == (6, 1000.0)


def test_to_the_plan_s_own_model(fleet: Path, run: RunDirectory):
    play(run, True, True)
    back(fleet, 0)
    state = run.state()
    assert (state.rounds_done, state.model, state.last) == (0, "", None)
    assert run.parameters(state, 2) is None
    assert files(run) == {"metrics.jsonl": b""}


@pytest.mark.parametrize(
    ("status", "after"),
    [
        ("queued", "queued"), ("running", "running"), ("paused", "paused"), ("completed", "paused"),
        ("failed", "paused"), ("stopped", "paused"), ("aborted", "paused"),
    ],
)  # fmt: skip
def test_what_is_over_does_not_begin_again_by_itself(
    fleet: Path, run: RunDirectory, status: RunStatus, after: str
):
    play(run, True, True)
    stand(run, status)
    said = back(fleet, 1)
    assert run.state().status == after
    assert ("covey resume one" in said) == (after == "paused")


def test_a_run_that_is_played_is_not_taken_back(fleet: Path, run: RunDirectory):
    play(run, True, True)
    stand(run, "running")
    with (
        played(fleet),
        pytest.raises(ConfigError, match="is being played: covey pause one, and wait"),
    ):
        back(fleet, 1)
    assert run.state().rounds_done == 2
    stand(run, "paused")
    with played(fleet):
        back(fleet, 1)
    assert run.state().rounds_done == 1


@pytest.mark.parametrize(
    ("to", "said"),
    [
        (3, r"round 3 of run one gave no model: it was abandoned \(r\); name one that was completed"),
        (2, "the model after round 2 of run one is not kept any more .*; there are those after rounds: 1, 4"),
        (1, "is damaged: it is not the model after round 1; restore it"),
        (5, "run one stands at round 5: there is nothing to take back"),
        (6, "run one has played 5 rounds, not 6"),
    ],
)  # fmt: skip
def test_rounds_there_is_no_going_back_to(fleet: Path, run: RunDirectory, to: int, said: str):
    play(run, True, True, False, True, False)
    run.drop_models([2])
    (run.round(1) / "parameters.bin").write_bytes(MODELS[9].tobytes())
    before = (run.state(), run.store.history("one"), files(run))
    with pytest.raises(ConfigError, match=said):
        back(fleet, to)
    assert (run.state(), run.store.history("one"), files(run)) == before


def test_a_rollback_that_died_half_way_is_finished_by_whoever_comes_next(
    fleet: Path, run: RunDirectory, monkeypatch: pytest.MonkeyPatch
):
    play(run, True, True, True)
    with monkeypatch.context() as patch:

        def die(*_: Any, **__: Any) -> None:
            raise KeyboardInterrupt

        patch.setattr(RunDirectory, "settle", die)
        with pytest.raises(KeyboardInterrupt):
            back(fleet, 1)
    assert run.state().rounds_done == 1
    assert files(run)["model.onnx"] == b"onnx 3"
    run.settle(run.take_up(), whole=True)
    assert files(run)["model.onnx"] == b"onnx 1"
    play(run, True, model=5)
    run.settle(run.state(), whole=True)  # as the next process does, in the middle of a round
    assert (run.round(2) / "model.onnx").read_bytes() == b"onnx 7"
    assert (run.path / "rolled-back" / "00002-2" / "model.onnx").read_bytes() == b"onnx 2"


def test_a_round_without_files_leaves_those_of_its_successor_alone(fleet: Path, run: RunDirectory):
    play(run, True, True)
    shutil.rmtree(run.round(2))
    (run.path / "parameters.bin").write_bytes(MODELS[1].tobytes())
    back(fleet, 1)
    run.stage_model(2, MODELS[5], b"of the round that is open now")
    run.settle(run.state(), whole=True)
    assert (run.round(2) / "model.onnx").read_bytes() == b"of the round that is open now"


# -- a database that is older than the runs --------------------------------------------------------


def test_a_restored_database_gives_no_number_twice(fleet: Path, run: RunDirectory):
    play(run, True)
    run.store.back_up(fleet / "copy")
    play(run, True, True)
    model = bytes.fromhex("ab" * 32)
    state = run.state()
    state.rounds_done, state.last = 4, {"round": 9, "index": 4, "model": model.hex(), "revision": 2}
    run.finish_round(state)
    run.settle(state)
    run.store.close()
    for path in fleet.glob("covey.db*"):
        path.unlink()
    (fleet / "copy").rename(fleet / FILE)
    with Store.open(fleet / FILE) as store:
        assert store.last_round() == 1
        assert catch_up(store, fleet) == 10  # 10 may have been open
        assert catch_up(store, fleet) == 0
        assert store.next_round() == 11
        assert store.revision(model) == 3
        again = RunDirectory(run.path, store)
        again.settle(again.take_up(), whole=True)
        assert [line["index"] for line in again.read_metrics()] == [1]
        assert files(again)["model.onnx"] == b"onnx 1"
