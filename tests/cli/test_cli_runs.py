"""What an operator sees of runs and rounds, and does to them, command by command."""

import json
import sqlite3
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from covey_coordinator.cli import main
from covey_coordinator.daemon import only_one
from covey_coordinator.status import write_status
from covey_coordinator.store import FILE, OpenRound, Progress, RunDirectory, Store

Covey = Callable[..., list[str]]

MODEL = np.arange(3, dtype=np.float32)


@pytest.fixture
def invoke(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TZ", "UTC")
    monkeypatch.delenv("COVEY_FLEET", raising=False)
    return lambda *arguments: CliRunner().invoke(main, [str(a) for a in arguments])


@pytest.fixture
def covey(invoke: Callable[..., Result], fleet: Path) -> Covey:
    """A command that succeeds -> the lines that it prints."""

    def run(*arguments: object) -> list[str]:
        result = invoke(*arguments)
        assert (result.exit_code, result.stderr) == (0, ""), result.output
        return [line.rstrip() for line in result.stdout.splitlines()]

    return run


@pytest.fixture
def refused(invoke: Callable[..., Result], fleet: Path) -> Callable[..., str]:
    """A command that fails -> the one line that says why."""

    def run(*arguments: object) -> str:
        result = invoke(*arguments)
        assert (result.exit_code, result.stdout) == (1, "")
        assert result.stderr.startswith("covey: ")
        assert result.stderr.count("\n") == 1
        return result.stderr.removeprefix("covey: ").rstrip()

    return run


@pytest.fixture
def fleet(invoke: Callable[..., Result], tmp_path: Path) -> Path:
    """Two runs: `first` has ended, `second` has done two rounds of three."""
    assert invoke("init", "--fleet", "farm").exit_code == 0
    with Store.open(tmp_path / FILE) as store:
        for at, name in enumerate(("first", "second")):
            toml = b'plan = "p"\nrounds = 3\n'
            path = tmp_path / "runs" / name
            run = RunDirectory.create(path, toml, bytes(16), store, created_unix=86400.0 * at)
            play(run, "completed", 0.5)
            play(run, "abandoned")
            if name == "first":
                play(run, "completed", 0.75)
            state = run.state()
            state.status = "completed" if name == "first" else "running"
            run.save_state(state)
    return tmp_path


def play(run: RunDirectory, outcome: str, accuracy: float = 0.0) -> None:
    state, number = run.state(), run.store.next_round()
    index = state.rounds_done = state.rounds_done + 1
    line: dict[str, Any] = {"round": number, "index": index, "outcome": outcome, "cohort": 4}
    if outcome == "completed":
        import hashlib

        run.stage_model(index, MODEL + index, b"onnx")
        state.model = hashlib.sha256((MODEL + index).tobytes()).hexdigest()
        state.model_index = index
        state.rounds_completed += 1
        line |= {
            "survivors": 3, "dropped": ["pi-4"], "examples": 96, "train_loss": 1.5,
            "test_accuracy": accuracy, "test_loss": 2.0, "update_norm": 0.125,
            "next_model": state.model,
        }  # fmt: skip
    else:
        state.rounds_abandoned += 1
        line |= {"survivors": 0, "reason": "2 devices checked in"}
    state.last = line | {
        "model": "ab" * 32, "revision": 1, "seconds": 2.5,
        "phase_seconds": {"gather": 0.5, "collect": 2.0},
        "bytes_received": 12345, "bytes_sent": 678,
    }  # fmt: skip
    run.finish_round(state)
    run.settle(state)
    if outcome == "completed":
        (run.round(index) / "transcript").write_bytes(b"t")


def open_a_round(fleet: Path, run: str = "second") -> int:
    with Store.open(fleet / FILE) as store:
        number = store.next_round()
        store.open_round(OpenRound(run, 3, number, b"spec", bytes(32), time.time()))
    return number


# -- looking ---------------------------------------------------------------------------------------


def test_runs(covey: Covey):
    assert [line.split(maxsplit=10) for line in covey("runs")] == [
        ["run", "queued", "status", "rounds", "completed", "abandoned", "last", "note"],
        ["first", "1970-01-01", "00:00", "UTC", "completed", "3/3", "2", "1", "accuracy", "0.7500"],
        ["second", "1970-01-02", "00:00", "UTC", "interrupted", "2/3", "1", "1"],
    ]


def test_runs_for_programs(covey: Covey, fleet: Path):
    first, second = json.loads("\n".join(covey("runs", "--json")))
    assert first["run"] == "first"
    assert (first["status"], second["status"]) == ("completed", "interrupted")
    assert (second["rounds"], second["rounds_done"]) == (3, 2)
    assert second["last"]["reason"] == "2 devices checked in"
    assert len(first["model"]) == 64
    (fleet / "runs" / "first" / "run.toml").unlink()
    assert json.loads("\n".join(covey("runs", "--json")))[0]["rounds"] is None


def test_rounds_of_a_run(covey: Covey):
    assert covey("rounds", "list", "first") == [
        "round   1     2.5 s  3/4 devices  96 examples  training loss 1.5000  test accuracy 0.5000",
        "round   2     2.5 s  abandoned: 2 devices checked in",
        "round   3     2.5 s  3/4 devices  96 examples  training loss 1.5000  test accuracy 0.7500",
    ]
    assert len(covey("rounds", "list")) == 2  # of the one that was queued last
    lines = json.loads("\n".join(covey("rounds", "list", "second", "--json")))
    assert [(line["run"], line["round"], line["rolled_back_unix"]) for line in lines] == [
        ("second", 4, None), ("second", 5, None),
    ]  # fmt: skip


def test_a_round(covey: Covey, fleet: Path):
    shown = covey("rounds", "show", 1, "--run", "first")
    head = {line[:15].strip(): line[15:] for line in shown}
    model = head.pop("next model")
    assert len(model) == 64
    assert head == {
        "round": "1 of run first (number 1)",
        "outcome": "completed",
        "cohort": "4",
        "in the sum": "3",
        "dropped": "1: pi-4",
        "examples": "96",
        "training loss": "1.5000",
        "test loss": "2.0000",
        "test accuracy": "0.5000",
        "update norm": "0.1250",
        "seconds": "2.5 (gather 0.5, collect 2.0)",
        "bytes received": "12,345",
        "bytes sent": "678",
        "model before": "ab" * 32 + ", revision 1",
        "transcript": "runs/first/rounds/00001/transcript",
        "model file": "runs/first/rounds/00001/model.onnx",
    }
    abandoned = covey("rounds", "show", 2)
    assert abandoned[:3] == [
        "round          2 of run second (number 5)",
        "outcome        abandoned: 2 devices checked in",
        "cohort         4",
    ]
    assert abandoned[-1] == "transcript     none"
    told = json.loads("\n".join(covey("rounds", "show", 1, "--json")))
    assert told["model_file"] == "runs/second/rounds/00001/model.onnx"
    assert told["dropped"] == ["pi-4"]


def test_a_round_that_is_not_there(refused: Callable[..., str]):
    assert refused("rounds", "show", 9) == "run second has no round 9; it has played 2"
    assert refused("rounds", "show", 1, "--run", "x") == (
        "there is no run 'x'; there are: first, second"
    )
    assert refused("rounds", "list", "x") == "there is no run 'x'; there are: first, second"


def test_the_open_round_and_what_it_waits_for(covey: Covey, fleet: Path):
    number = open_a_round(fleet)
    head = f"3 of run second (number {number})"
    assert f"open round: {head} waits for `covey up`" in covey("status")
    write_status(fleet, "mosquitto", False, [], {})
    assert f"open round: {head} waits for the broker" in covey("status")
    write_status(fleet, "mosquitto", True, ["pi-1"], {})
    assert f"open round: {head} has just been called" in covey("status")
    with Store.open(fleet / FILE) as store:
        RunDirectory(fleet / "runs" / "second", store).show(
            Progress(
                round=number, index=3, phase="collect", detail="", answered=2, awaited=4, present=4
            )
        )
    waits = f"open round: {head}, collect: devices train and send their updates; 2 of 4 answered"
    assert waits in covey("status")
    assert covey("rounds", "show", 3) == [waits]
    assert covey("rounds", "list")[-1] == waits
    assert covey("status")[-1].split()[:2] == ["second", "running"]


def test_a_fleet_without_runs(invoke: Callable[..., Result], tmp_path: Path):
    assert invoke("init").exit_code == 0
    for arguments in (("runs",), ("rounds", "list"), ("pause", "x"), ("backup", "copy")):
        result = invoke(*arguments)
        assert (result.exit_code, result.stderr) == (
            1,
            "covey: there is no run in .; name the fleet with --fleet-dir, or queue one with covey run\n",
        )
    assert not (tmp_path / FILE).exists()
    assert invoke("runs", "--fleet-dir", "elsewhere").stderr.startswith(
        "covey: elsewhere/covey.toml does not exist"
    )


# -- changing --------------------------------------------------------------------------------------


def test_pause_and_resume(covey: Covey, fleet: Path):
    assert covey("pause", "second") == ["run second is paused; covey resume second lets it go on"]
    assert covey("status")[-1].split()[:2] == ["second", "paused"]
    assert covey("resume", "second") == [
        "run second is queued again: `covey up` does not run for this fleet"
    ]
    assert covey("abort", "second") == ["run second is aborted"]


def test_what_a_running_coordinator_is_asked(covey: Covey, fleet: Path):
    write_status(fleet, "mosquitto", True, ["pi-1"], {})
    with only_one(fleet):
        assert covey("pause", "second") == [
            "run second pauses when its open round is over; --now abandons that"
        ]
        assert covey("status")[-1].split()[:2] == ["second", "pausing"]
        assert covey("resume", "second") == ["run second goes on"]
        assert covey("pause", "second", "--now") == [
            "run second pauses now: its open round is abandoned"
        ]
        assert covey("abort", "second") == [
            "run second is aborted now: its open round is abandoned"
        ]
        assert covey("runs")[-1].split()[4] == "aborting"


def test_rollback(covey: Covey, fleet: Path):
    assert covey("rollback", "first", "--to", 1) == [
        "run first is back at round 1 of the 3 that it had played; covey resume first lets it go on "
        "from there"
    ]
    assert covey("runs")[1].split()[4:6] == ["paused", "1/3"]
    rounds = covey("rounds", "list", "first")
    assert [line.endswith("(rolled back)") for line in rounds] == [False, True, True]
    shown = covey("rounds", "show", 3, "--run", "first")
    assert shown[2].startswith("rolled back    20")
    assert shown[-2] == "transcript     runs/first/rolled-back/00003-3/transcript"
    assert covey("resume", "first") == [
        "run first is queued again: `covey up` does not run for this fleet"
    ]
    with Store.open(fleet / FILE) as store:
        play(RunDirectory(fleet / "runs" / "first", store), "completed", 0.9)
    assert covey("rounds", "show", 2, "--run", "first")[-1].startswith(
        "before         number 2, rolled back 20"
    )


def test_what_is_not_to_be_done(refused: Callable[..., str]):
    assert refused("rollback", "first", "--to", 2) == (
        "round 2 of run first gave no model: it was abandoned (2 devices checked in); name one that "
        "was completed"
    )
    assert refused("pause", "first") == "run first is not to be paused: it is completed"
    assert refused("abort", "first") == "run first is over: it is completed"
    assert refused("abort", "third") == (
        "there is no run 'third' in this fleet; covey runs shows them"
    )


def test_a_backup(covey: Covey, refused: Callable[..., str], fleet: Path):
    open_a_round(fleet)
    assert covey("backup", "copy.db") == [
        "database copied to copy.db; runs/ and the keys are beside it: docs/state.md says how"
    ]
    assert stat.S_IMODE((fleet / "copy.db").stat().st_mode) == 0o600
    with sqlite3.connect(fleet / "copy.db") as copy:
        assert copy.execute("SELECT count(*) FROM rounds").fetchone() == (5,)
        assert copy.execute("SELECT count(*) FROM open_round").fetchone() == (0,)
    copy.close()
    assert refused("backup", "none/copy.db").startswith("cannot use none/copy.db: ")
