"""What lies between two rounds: the next model, the line about it, and taking a run up again."""

import errno
import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest

from covey_coordinator import files
from covey_coordinator.config import EncodingConfig, ModelsConfig, RunConfig, WorkConfig
from covey_coordinator.plans.bundle import load_bundle
from covey_coordinator.round import Completed
from covey_coordinator.run import HeldOut, RoundOutcome, Run, hyper_values, worth
from covey_coordinator.store import FILE, RunDirectory, Store
from covey_shared.errors import ConfigError, StorageError
from covey_shared.fixedpoint import Encoding
from covey_shared.layout import Flat
from covey_shared.messages import DeviceId
from memory_fleet import PLAN, config

BUNDLE = load_bundle(PLAN)
N = BUNDLE.header.n_params
NAMES = (DeviceId("a"), DeviceId("b"), DeviceId("c"))
ENCODING = Encoding(value_bits=24, n=3, n_params=N, clip=4.0, w_max=1000, metric_clips=(20.0,))


def make(tmp_path: Path, settings: RunConfig | None = None, held_out: HeldOut | None = None) -> Run:
    """The run in tmp_path, as another process would take it up."""
    path = tmp_path / "run"
    store = Store.open(tmp_path / FILE)
    directory = (
        RunDirectory(path, store)
        if store.has_run("run")
        else RunDirectory.create(path, b"", bytes(16), store)
    )
    return Run(directory, settings or config(rounds=5), BUNDLE, held_out=held_out)


def completed(
    *deltas: float, weights: tuple[int, ...] = (100, 100, 100), loss: float = 0.5
) -> Completed:
    """Three devices whose updates are the same number everywhere, each with the same loss."""
    ring = sum(
        ENCODING.encode(np.full(N, delta, np.float32), weight, (loss,), os.urandom)
        for delta, weight in zip(deltas, weights, strict=True)
    )
    return Completed(np.asarray(ring), ENCODING, NAMES, (DeviceId("d"),))  # type: ignore[arg-type]


def outcome(run: Run, done: Completed | None, **changes: object) -> RoundOutcome:
    fields: dict[str, object] = {
        "round_id": 40 + run.index,
        "index": run.index,
        "completed": done,
        "reason": "" if done else "too few",
        "after_uploads": False,
        "cohort": 4,
        "seconds": 1.23456,
        "phase_seconds": {"gather": 0.5},
        "bytes_in": 10,
        "bytes_out": 20,
    }
    return RoundOutcome(**(fields | changes))  # type: ignore[arg-type]


def play(run: Run, done: Completed | None, **changes: object) -> RoundOutcome:
    """One round's end, saved."""
    run.spec("farm", 40 + run.index)
    result = run.absorb(outcome(run, done, **changes))
    run.save()
    return result


# -- what a round is -------------------------------------------------------------------------------


def test_a_round_is_settled_from_the_configuration(tmp_path: Path):
    settings = config(rounds=5, work=WorkConfig(batches=3, batch_size=7, seconds=9.0))
    run = make(tmp_path, settings)
    spec = run.spec("farm", 17, 2)
    call = spec.call
    assert (call.fleet, call.round, call.revision, call.n_min) == ("farm", 17, 2, 3)
    assert (call.plan, call.plan_bytes) == (BUNDLE.hash, len(BUNDLE.header_bytes))
    assert (call.model, call.model_bytes) == (run.model_digest, 4 * N)
    assert call.run == bytes(16)
    assert (spec.n_params, spec.goal, spec.w_max) == (N, 4, 1000)
    assert (spec.work.batches, spec.work.batch_size, spec.work.seconds) == (3, 7, 9.0)
    assert spec.work.hyper == (0.1,)
    assert spec.metric_clips == (20.0,)
    hashes = [hashlib.sha256(blob).digest() for blob in run.blobs()]
    graphs = [bytes.fromhex(ref.sha256) for ref in (BUNDLE.header.train, BUNDLE.header.infer)]
    assert hashes == [call.plan, *graphs, call.model]


def test_hyper_parameters_are_the_plan_s_or_the_run_s(tmp_path: Path):
    assert hyper_values(BUNDLE, RunConfig(plan="p")) == (0.1,)
    assert hyper_values(BUNDLE, RunConfig(plan="p", work=WorkConfig(hyper={"lr": 3}))) == (3.0,)


def test_a_hyper_parameter_that_the_plan_does_not_have(tmp_path: Path):
    settings = RunConfig(plan="p", work=WorkConfig(hyper={"momentum": 0.9}))
    with pytest.raises(ConfigError) as caught:
        make(tmp_path, settings)
    assert "key `work.hyper.momentum`: the plan" in str(caught.value)
    assert "has no such hyper-parameter; it has lr" in str(caught.value)


# -- what a round comes to -------------------------------------------------------------------------


def test_a_completed_round_moves_the_model(tmp_path: Path):
    run = make(tmp_path)
    run.begin()
    play(run, completed(0.5, 1.0, 1.5, weights=(100, 100, 200)))
    assert run.parameters == pytest.approx(BUNDLE.initial + 1.125, abs=1e-3)
    assert (run.index, run.rounds_left) == (2, 4)
    (line,) = run.directory.read_metrics()
    assert line == {
        "round": 41,
        "index": 1,
        "outcome": "completed",
        "cohort": 4,
        "survivors": 3,
        "dropped": ["d"],
        "next_model": run.model_digest.hex(),
        "examples": 400,
        "train_loss": pytest.approx(0.5, abs=1e-3),
        "update_norm": pytest.approx(1.125 * N**0.5, rel=1e-3),
        "model": hashlib.sha256(BUNDLE.initial.tobytes()).hexdigest(),
        "revision": 0,
        "seconds": 1.235,
        "phase_seconds": {"gather": 0.5},
        "bytes_received": 10,
        "bytes_sent": 20,
    }


def test_an_abandoned_round_leaves_the_model_and_says_why(tmp_path: Path):
    run = make(tmp_path)
    run.begin()
    play(run, None, reason="2 updates arrived; at least 3 are needed")
    assert (run.parameters == BUNDLE.initial).all()
    assert (run.state.rounds_done, run.state.rounds_abandoned) == (1, 1)
    assert run.state.model == ""
    (line,) = run.directory.read_metrics()
    assert (line["outcome"], line["reason"]) == (
        "abandoned", "2 updates arrived; at least 3 are needed",
    )  # fmt: skip
    assert not (run.directory.path / "parameters.bin").exists()


class Unusable:
    """A server optimiser that diverges."""

    def step(self, parameters: Flat, total: object) -> Flat:
        from covey_coordinator.averaging import FedAvg
        from covey_shared.fixedpoint import DecodedSum

        nan = np.full(N, np.nan, np.float32)
        return FedAvg().step(parameters, DecodedSum(nan, 1.0, ()))


def test_an_average_that_cannot_be_used_is_an_abandoned_round(tmp_path: Path):
    run = make(tmp_path)
    run._strategy = Unusable()
    run.begin()
    result = play(run, completed(1, 1, 1))
    assert result.completed is None
    assert result.reason.startswith("the averaged model is not finite: lower the learning rate")
    assert (run.parameters == BUNDLE.initial).all()
    assert (run.state.rounds_completed, run.state.rounds_abandoned) == (0, 1)
    assert run.directory.read_metrics()[0]["outcome"] == "abandoned"


def test_a_sum_without_weight_is_an_abandoned_round(tmp_path: Path):
    run = make(tmp_path)
    run.begin()
    nothing = Completed(np.zeros(ENCODING.n_coordinates, np.uint32), ENCODING, NAMES, ())
    assert "no average can be taken" in play(run, nothing).reason
    assert run.state.rounds_abandoned == 1


def test_a_model_is_evaluated_on_the_held_out_set(tmp_path: Path):
    images = np.zeros((300, 1, 8, 8), np.float32)
    run = make(tmp_path, held_out=HeldOut(images, np.zeros(300, np.int64)))
    run.begin()
    play(run, completed(0.0, 0.0, 0.0))
    (line,) = run.directory.read_metrics()
    assert line["test_accuracy"] in (0.0, 1.0)
    assert line["test_loss"] > 0


def test_a_held_out_set_that_fails_costs_its_numbers_and_not_the_round(tmp_path: Path):
    wrong = HeldOut(np.zeros((3, 1, 9, 9), np.float32), np.zeros(3, np.int64))
    run = make(tmp_path, held_out=wrong)
    run.begin()
    assert play(run, completed(1, 1, 1)).completed is not None
    (line,) = run.directory.read_metrics()
    assert line["outcome"] == "completed"
    assert "the plan wants float32[batch, 1, 8, 8]" in line["test_problem"]
    assert "test_accuracy" not in line


# -- keeping it ------------------------------------------------------------------------------------


def test_another_process_takes_it_up(tmp_path: Path):
    run = make(tmp_path)
    run.begin()
    play(run, completed(1, 1, 1))
    play(run, None)
    play(run, completed(2, 2, 2))
    again = make(tmp_path)
    assert again.index == 4
    assert (again.parameters == run.parameters).all()
    assert again.model_digest == run.model_digest
    again.begin()
    assert again.state.status == "running"
    assert (again.state.rounds_completed, again.state.rounds_abandoned) == (2, 1)
    assert again.spec("farm", 99).call.model == run.model_digest


def test_what_a_crash_left_undone_is_done_when_it_is_taken_up(tmp_path: Path):
    """The state was saved, and the power went before anything else was."""
    run = make(tmp_path)
    run.begin()
    run.spec("farm", 1)
    run.absorb(outcome(run, completed(1, 1, 1)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run.directory, "settle", lambda state: None)
        run.save()
    assert run.directory.read_metrics() == []
    again = make(tmp_path)
    assert (again.parameters == run.parameters).all()
    again.begin()
    play(again, completed(1, 1, 1))
    assert [line["index"] for line in again.directory.read_metrics()] == [1, 2]


def test_how_it_ends(tmp_path: Path):
    run = make(tmp_path, config(rounds=2))
    run.begin()
    play(run, None)
    run.end()
    assert run.state.status == "stopped"
    again = make(tmp_path, config(rounds=2))
    again.begin()
    play(again, None)
    again.end()
    assert make(tmp_path).state.status == "completed"


@pytest.mark.parametrize("name", ["write", "fsync", "replace", "open"])
def test_a_disk_that_refuses_now_and_then_loses_nothing_and_doubles_nothing(
    tmp_path: Path, name: str
):
    """`save` is called until it works; every first, second, third ... call of the disk fails once."""
    run = make(tmp_path, config(rounds=12))
    run.begin()
    real: Callable[..., object] = getattr(os, name)
    for index in range(1, 11):
        run.spec("farm", index)
        run.absorb(outcome(run, completed(0.1, 0.1, 0.1) if index % 2 else None))
        left = [index - 1]

        def refuse(*args: object, left: list[int] = left, **kwargs: object) -> object:
            left[0] -= 1
            if left[0] == -1:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(*args, **kwargs)

        refused = 0
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(files.os, name, refuse)
            while True:
                try:
                    run.save()
                except StorageError:
                    refused += 1
                    assert refused < 3
                else:
                    break
    lines = run.directory.read_metrics()
    assert [line["index"] for line in lines] == list(range(1, 11))
    assert run.directory.metrics.read_bytes().count(b"\n") == 10
    again = make(tmp_path, config(rounds=12))
    assert (again.index, again.state.rounds_completed) == (11, 5)
    assert (again.parameters == run.parameters).all()


@pytest.mark.parametrize("where", ["memory", "directory"])
def test_no_room_for_an_export_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
):
    """The exported model passes through memory, or where there is no such thing through a temporary
    directory; the round's sum must not be lost to that."""

    def refuse(name: str) -> int:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    run = make(tmp_path)
    run.begin()
    run.spec("farm", 1)
    result = run.absorb(outcome(run, completed(1, 1, 1)))
    assert result.completed is not None
    with monkeypatch.context() as patch:
        if where == "memory":
            patch.setattr(os, "memfd_create", refuse)
        else:
            patch.delattr(os, "memfd_create")
            patch.setattr("tempfile.tempdir", str(tmp_path / "none"))
        with pytest.raises(StorageError, match="cannot write a model in"):
            run.save()
        if where == "directory":
            patch.setattr("tempfile.tempdir", str(tmp_path))
            run.save()
    run.save()
    assert make(tmp_path).state.rounds_completed == 1
    assert (run.directory.path / "model.onnx").stat().st_size > 4 * N


@pytest.mark.parametrize("what", ["state", "parameters"])
def test_a_damaged_run_is_refused_at_once(tmp_path: Path, what: str):
    """Trying again and again, as with a full disk, would not mend it."""
    run = make(tmp_path)
    run.begin()
    play(run, completed(1, 1, 1))
    if what == "state":
        run.state.model = "damaged"
        run.directory.save_state(run.state)
    else:
        for path in run.directory.path.rglob("parameters.bin"):
            path.write_bytes(b"damaged")
    with pytest.raises(StorageError, match=r"covey\.db" if what == "state" else r"parameters\.bin"):
        make(tmp_path)


def models(run: Run) -> list[int]:
    return sorted(run.directory.staged())


def test_models_are_kept_for_a_while_and_the_best_for_good(tmp_path: Path):
    run = make(tmp_path, config(rounds=12, models=ModelsConfig(keep_rounds=2)))
    run.begin()
    seen = []
    for loss in (0.9, 0.5, None, 0.3, 0.4, 0.8, None, 0.7):
        play(run, None if loss is None else completed(1, 1, 1, loss=loss))
        seen.append(models(run))
    assert seen == [[1], [1, 2], [1, 2], [2, 4], [4, 5], [4, 5, 6], [4, 5, 6], [4, 6, 8]]
    assert not run.directory.round(1).exists()
    again = make(tmp_path, config(rounds=12, models=ModelsConfig(keep_rounds=1)))
    run.directory.stage_model(9, again.parameters, b"of a round that never ended")
    again.begin()
    assert models(again) == [4, 8]


@pytest.mark.parametrize(
    ("better", "worse"),
    [
        ({"test_accuracy": 0.9, "test_loss": 5.0}, {"test_accuracy": 0.8, "test_loss": 1.0}),
        ({"test_loss": 1.0, "train_loss": 9.0}, {"test_loss": 2.0, "train_loss": 1.0}),
        ({"train_loss": 1.0}, {"train_loss": 2.0}),
        ({"test_loss": 9.0}, {"test_problem": "it does not fit", "train_loss": 0.1}),
    ],
)
def test_which_model_is_better(better: dict[str, float], worse: dict[str, object]):
    assert worth(better) > worth(worse)


def test_metrics_are_numbers_that_any_program_reads(tmp_path: Path):
    """No NaN or infinity, which JSON has no word for, and one object a line."""
    run = make(tmp_path)
    run.begin()
    play(run, completed(1, 1, 1))
    play(run, None, reason='quotes " and\nline breaks')
    lines = run.directory.metrics.read_bytes().splitlines()
    assert len(lines) == 2
    assert [msgspec.json.decode(line)["index"] for line in lines] == [1, 2]


def test_an_encoding_from_the_configuration_reaches_the_round(tmp_path: Path):
    settings = config(
        encoding=EncodingConfig(value_bits=10, clip=0.25, loss_clip=3.0, max_weight=50)
    )
    spec = make(tmp_path, settings).spec("farm", 1)
    assert (spec.value_bits, spec.clip, spec.metric_clips, spec.w_max) == (10, 0.25, (3.0,), 50)
