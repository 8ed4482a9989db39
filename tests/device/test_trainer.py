"""The trainer: weights, bounds, early ends, and what is declined.

Most of it on a step in plain numpy; at the end on the plan that is shipped, in onnxruntime.
"""

import math
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from covey_device.data import NpzData, batches, open_source, source_of_arrays
from covey_device.trainer import Trainer, Work, load_trainer
from covey_shared.errors import DataError, LocalProtocolError, TrainingError
from covey_shared.plan import decode_header
from covey_shared.runtime import TrainStep
from device_support import FakeClock, LinearStep, make_header

HEADER = make_header()
N = 10


def examples(n=N):
    rng = np.random.default_rng(1)
    features = rng.standard_normal((n, 3)).astype(np.float32)
    labels = (features @ np.array([[1.0], [-2.0], [0.5]]) + 0.3).astype(np.float32)
    return features, labels


def source(n=N):
    return source_of_arrays(*examples(n), HEADER)


class Setup:
    """A trainer with everything that a test may turn."""

    def __init__(self, n=N):
        self.clock = FakeClock()
        self.resident = 50
        self.step = LinearStep(HEADER)
        self.trainer = Trainer(self.step, source(n), HEADER, resident=lambda: self.resident)
        self.stop = lambda: False
        self.start = np.array([0.1, 0.2, 0.3, 0.4], np.float32)

    def train(self, **changes):
        asked = {"batches": 6, "batch_size": 4, "max_seconds": 60.0, "max_resident_bytes": 100}
        work = Work(**(asked | changes))
        rng = np.random.default_rng(3)
        return self.trainer.train(self.start, work, clock=self.clock, rng=rng, stop=self.stop)


def by_hand(start, n_batches, batch_size=4, lr=0.1, n=N):
    """The same training with nothing of the trainer in it."""
    step, rng = LinearStep(HEADER), np.random.default_rng(3)
    step.load(start)
    losses, weights = [], []
    for (features, labels), _ in zip(
        batches(source(n), batch_size, rng), range(n_batches), strict=False
    ):
        losses.append(step.step(features, labels, {"lr": lr}))
        weights.append(len(labels))
    return step.parameters() - start, np.average(losses, weights=weights), sum(weights)


def test_all_batches():
    setup = Setup()
    before = setup.start.copy()
    result = setup.train(batches=6)
    delta, loss, n_examples = by_hand(setup.start, 6)
    np.testing.assert_array_equal(result.delta, delta)
    assert result.delta.dtype == np.float32
    assert setup.step.sizes == [4, 4, 2, 4, 4, 2]  # the short batch ends each epoch
    assert (result.examples, result.batches, result.stopped_by) == (20, 6, "batches")
    assert n_examples == 20
    assert result.loss == pytest.approx(loss)
    np.testing.assert_array_equal(setup.start, before)


def test_training_lowers_the_loss():
    assert Setup().train(batches=200).loss < 0.5 * Setup().train(batches=3).loss


@pytest.mark.parametrize("n_batches", [1, 2, 3, 5])
def test_stop_leaves_the_update_of_the_batches_before_it(n_batches):
    setup = Setup()
    setup.stop = lambda: len(setup.step.sizes) == n_batches
    result = setup.train()
    delta, loss, n_examples = by_hand(setup.start, n_batches)
    assert (result.stopped_by, result.batches) == ("stop", n_batches)
    assert result.examples == n_examples
    np.testing.assert_array_equal(result.delta, delta)
    assert result.loss == pytest.approx(loss)


def test_seconds_end_training_with_a_valid_update():
    setup = Setup()

    def pass_time():
        setup.clock.now += 3.0

    setup.step.after_step = pass_time
    result = setup.train(max_seconds=10.0)  # a fourth batch would end at 12 s
    assert (result.stopped_by, result.batches, result.examples) == ("seconds", 3, 10)
    assert result.seconds == pytest.approx(9.0)
    np.testing.assert_array_equal(result.delta, by_hand(setup.start, 3)[0])


def test_memory_ends_training_with_a_valid_update():
    setup = Setup()

    def grow():
        setup.resident += 20

    setup.step.after_step = grow
    result = setup.train(max_resident_bytes=90)
    assert (result.stopped_by, result.batches, result.examples) == ("memory", 2, 8)
    np.testing.assert_array_equal(result.delta, by_hand(setup.start, 2)[0])


def test_batches_are_done_is_not_called_a_stop():
    setup = Setup()
    setup.stop = lambda: len(setup.step.sizes) >= 6
    assert setup.train(batches=6).stopped_by == "batches"


@settings(max_examples=40)
@given(st.integers(1, 30), st.integers(1, 40), st.integers(1, 12))
def test_the_weight_counts_every_example_of_every_batch(n, batch_size, n_batches):
    setup = Setup(n)
    result = setup.train(batches=n_batches, batch_size=batch_size)
    assert result.examples == sum(setup.step.sizes)
    per_epoch = math.ceil(n / batch_size)
    epochs, rest = divmod(n_batches, per_epoch)
    assert result.examples == epochs * n + min(rest * batch_size, n)


def test_a_second_round_starts_afresh():
    setup = Setup()
    first = setup.train()
    np.testing.assert_array_equal(setup.train().delta, first.delta)


@pytest.mark.parametrize(
    ("turn", "changes", "reason"),
    [
        ("time", {"max_seconds": 0.0}, "max_seconds of 0 s was over"),
        ("memory", {"max_resident_bytes": 40}, "max_resident_bytes"),
        ("stop", {}, "asked to stop"),
    ],
)
def test_nothing_trained_is_no_update(turn, changes, reason):
    setup = Setup()
    setup.stop = lambda: turn == "stop"
    with pytest.raises(TrainingError, match=reason) as caught:
        setup.train(**changes)
    assert "declines the round" in str(caught.value)
    assert setup.step.sizes == []


def test_hyper_parameters_come_from_the_round_and_else_from_the_plan():
    setup = Setup()
    setup.train(batches=1)
    setup.train(batches=1, hyper={"lr": 0.5})
    assert setup.step.hypers == [{"lr": 0.1}, {"lr": 0.5}]


@pytest.mark.parametrize(
    ("hyper", "reason"),
    [({"rate": 0.1}, "'rate'.*small.*\\['lr'\\]"), ({"lr": math.nan}, "'lr' to nan")],
)
def test_a_wrong_hyper_parameter_declines_the_round(hyper, reason):
    with pytest.raises(TrainingError, match=reason):
        Setup().train(hyper=hyper)


def test_divergence_names_the_slot_and_the_batch():
    setup = Setup()

    def spoil():
        if len(setup.step.sizes) == 3:
            setup.step._flat[3] = np.nan

    setup.step.after_step = spoil
    # The loss of batch 3 was taken before the damage; batch 4 sees it.
    with pytest.raises(TrainingError, match=r"loss is nan in batch 4 of 6 .*slot 'weight'.*declin"):
        setup.train()


def test_a_parameter_spoilt_by_the_last_batch_is_found():
    setup = Setup()

    def spoil():
        if len(setup.step.sizes) == 6:
            setup.step._flat[3] = np.inf

    setup.step.after_step = spoil
    with pytest.raises(TrainingError, match=r"not finite in batch 6 of 6 .*slot 'bias'.*declines"):
        setup.train()


def test_a_difference_that_overflows_is_found():
    setup = Setup()
    setup.start[:] = -3e38

    class Jump(LinearStep):
        def step(self, features, labels, hyper):
            self._flat[1] = 3e38
            return 1.0

    setup.trainer = Trainer(Jump(HEADER), source(), HEADER, resident=lambda: 1)
    with pytest.raises(TrainingError, match=r"update is not finite in batch 1 of 1 .*'weight'"):
        setup.train(batches=1)


def test_an_infinite_loss_with_finite_parameters_says_so():
    setup = Setup()
    setup.step.step = lambda features, labels, hyper: math.inf
    with pytest.raises(TrainingError, match=r"loss is inf in batch 1 of 6 .all slots are finite"):
        setup.train()


def test_a_model_that_is_not_finite_is_declined_before_training():
    setup = Setup()
    setup.start[3] = np.inf
    with pytest.raises(TrainingError, match=r"model of this round is not finite.*'bias'"):
        setup.train()
    assert setup.step.sizes == []


@pytest.mark.parametrize(("place", "done"), [("load", 0), ("step", 0), ("parameters", 6)])
def test_out_of_memory_declines_the_round(place, done):
    setup = Setup()

    def fail(*_):
        raise MemoryError

    setattr(setup.step, place, fail)
    with pytest.raises(
        TrainingError, match=f"memory after {done} of 6 batches.*batch_size below 4"
    ):
        setup.train()


def test_an_error_of_the_source_keeps_its_kind():
    class Broken:
        n_examples = 3

        def batch(self, indices):
            raise DataError("the disk is gone")

    setup = Setup()
    setup.trainer = Trainer(setup.step, Broken(), HEADER, resident=lambda: 1)
    with pytest.raises(DataError, match="the disk is gone"):
        setup.train()


@pytest.mark.parametrize(
    "changes", [{"batches": 0}, {"batch_size": 0}, {"max_seconds": -1.0}, {"max_resident_bytes": 0}]
)
def test_senseless_work_is_refused(changes):
    with pytest.raises(LocalProtocolError, match="at least"):
        Setup().train(**changes)


def test_wrong_parameters_are_refused():
    setup = Setup()
    setup.start = np.zeros(5, np.float32)
    with pytest.raises(LocalProtocolError, match=r"expected float32.4."):
        setup.train()


# --- the shipped plan -----------------------------------------------------------------------------

MLP = Path(str(files("covey_fleet"))) / "plans" / "mlp"


@pytest.fixture
def mlp(tmp_path):
    """(header, train graph, initial parameters, data table, folder) of the shipped plan."""
    header = decode_header((MLP / "plan.json").read_bytes())
    rng = np.random.default_rng(5)
    classes = rng.integers(0, 10, 200)
    images = rng.random((200, *header.features.shape), np.float32)
    images.reshape(200, -1)[np.arange(200), classes * 6] = 4  # one bright pixel tells the class
    np.savez(tmp_path / "d.npz", features=images, labels=classes)
    initial = np.frombuffer((MLP / "initial.bin").read_bytes(), "<f4")
    return header, (MLP / "train.onnx").read_bytes(), initial, NpzData(file="d.npz"), tmp_path


def train_mlp(mlp, n_batches, **hyper):
    header, graph, initial, data, folder = mlp
    work = Work(n_batches, 32, max_seconds=math.inf, max_resident_bytes=10**12, hyper=hyper)
    trainer = load_trainer(header, graph, data, folder)
    assert trainer.n_examples == 200
    return trainer.train(
        initial, work, clock=lambda: 0.0, rng=np.random.default_rng(3), stop=lambda: False
    )


def test_the_shipped_plan_takes_exactly_the_runtimes_steps(mlp):
    header, graph, initial, data, folder = mlp
    result = train_mlp(mlp, 9, lr=0.05)
    step, source = TrainStep(header, graph), open_source(data, header, base=folder)
    step.load(initial)
    supply = batches(source, 32, np.random.default_rng(3))
    for _ in range(9):
        step.step(*next(supply), {"lr": 0.05})
    np.testing.assert_array_equal(result.delta, step.parameters() - initial)
    assert result.examples == 200 + 2 * 32
    assert (result.batches, result.stopped_by) == (9, "batches")


def test_the_shipped_plan_learns(mlp):
    assert train_mlp(mlp, 5).loss > 1.5
    assert train_mlp(mlp, 100).loss < 1.0


def test_the_shipped_plan_diverging_is_declined(mlp):
    with pytest.raises(TrainingError, match=r"batch \d of 50 \(first non-finite slot '1.weight'"):
        train_mlp(mlp, 50, lr=1e30)
