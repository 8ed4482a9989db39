"""Trains a plan on this device's data: parameters in, one weighted update out.

Work ends at the first of its bounds (see `budget`), when asked to stop, or when the machine cannot bear
it (see `host`); an early end still gives a valid update, weighted by the examples that were really trained
on. What is not fit to be sent (nothing trained, NaN, out of memory) raises TrainingError, and the device
declines the round.
Masking, signing and sending live in `covey_shared`; here nothing leaves the device.
"""

import contextlib
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from covey_device.budget import Budget, Clock, Meter, ResidentBytes, resident_bytes
from covey_device.confine import bounded_data
from covey_device.data import DataConfig, DataSource, batches, open_source
from covey_device.trials import PlanTrial, Trials
from covey_shared.errors import LocalProtocolError, TrainingError
from covey_shared.layout import Flat
from covey_shared.plan import PlanHeader
from covey_shared.runtime import OUT_OF_MEMORY, TrainStep

if TYPE_CHECKING:
    from covey_device.data.growing import Growth

Array = NDArray[Any]
StoppedBy = Literal["batches", "seconds", "memory", "stop", "host"]

WATCH_S = 0.5
"""How often a step that takes long is asked after."""

_WATCH_STACK = 256 << 10


class Step(Protocol):
    """One training step; `covey_shared.runtime.TrainStep` runs a plan's."""

    def load(self, parameters: Flat) -> None:
        """Start from these parameters, optimiser state zero."""
        ...

    def step(self, features: Array, labels: Array, hyper: Mapping[str, float]) -> float:
        """Train on one batch; return its mean loss, taken before the update."""
        ...

    def parameters(self) -> Flat:
        """A copy of the current parameters: float32[n_params]."""
        ...

    def interrupt(self) -> None:
        """From another thread: have the step that runs fail soon, and all others until `load`."""
        ...


class Gate(Protocol):
    """Whether the machine lets training go on; `covey_device.host.care.HostGate` looks at it."""

    def passes(
        self, left_s: float, need_bytes: int | None = None, stop: Callable[[], bool] = lambda: False
    ) -> bool:
        """Before each batch: may it begin? Waits while training is to pause, for at most left_s. need_bytes:
        memory that training has yet to take; before the first batch alone."""
        ...

    def stopping(self) -> bool:
        """From another thread, now and then: is a batch that runs for long to be given up?"""
        ...

    @property
    def line(self) -> str:
        """Why training is to end, for the device's owner."""
        ...

    @property
    def public(self) -> str:
        """The same for others."""
        ...


class _Open:
    """Of a machine that minds nothing."""

    line = public = ""

    def passes(
        self, left_s: float, need_bytes: int | None = None, stop: Callable[[], bool] = lambda: False
    ) -> bool:
        return True

    def stopping(self) -> bool:
        return False


OPEN: Gate = _Open()


@dataclass(frozen=True, slots=True)
class Work:
    """What a round asks for, within what the device allows.

    hyper: sets hyper-parameters of the plan; those it leaves out keep the plan's defaults.
    max_resident_bytes: of the whole process.
    """

    batches: int
    batch_size: int
    max_seconds: float
    max_resident_bytes: int
    hyper: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse sizes that make no sense; the same for the bounds."""
        if self.batch_size < 1:
            raise LocalProtocolError(f"batch_size must be at least 1, not {self.batch_size}")
        _ = self.budget

    @property
    def budget(self) -> Budget:
        """The three bounds."""
        return Budget(self.batches, self.max_seconds, self.max_resident_bytes)


@dataclass(frozen=True, slots=True, eq=False)
class TrainResult:
    """One update.

    delta: float32[n_params], parameters after minus before. examples: trained on, counted once per
    batch they were in; the update's weight. loss: mean over those examples, each taken before its
    batch's update.
    """

    delta: Flat
    examples: int
    batches: int
    loss: float
    stopped_by: StoppedBy
    seconds: float


class Trainer:
    """A plan's step and this device's data, for any number of rounds."""

    def __init__(
        self,
        step: Step,
        source: DataSource,
        header: PlanHeader,
        *,
        resident: ResidentBytes = resident_bytes,
        trial: PlanTrial | None = None,
    ) -> None:
        """header: of the plan that `step` runs and `source` was opened for. trial: asked before
        batches of sizes that were not tried yet; None for a plan that is trusted."""
        self._step, self._source, self._header = step, source, header
        self._resident = resident
        self._trial = trial

    @property
    def n_examples(self) -> int:
        """Examples that this device has."""
        return self._source.n_examples

    def refresh(self) -> None:
        """Take in data that came since the last round; not while it trains. Raises DataError."""
        self._source.refresh()

    def train(
        self,
        parameters: Flat,
        work: Work,
        *,
        clock: Clock,
        rng: np.random.Generator,
        stop: Callable[[], bool] = lambda: False,
        gate: Gate = OPEN,
    ) -> TrainResult:
        """Train from `parameters` (float32[n_params], left as they are) within the work's bounds.

        clock: seconds, from any origin. rng: orders the examples. stop: asked before each batch;
        True ends training as a bound does. gate: asked as well; it may have training pause, while the time
        of the work goes on.
        Raises TrainingError if there is no usable update, DataError if the source fails.
        """
        hyper = self._hyper(work)
        slot = self._non_finite(parameters)
        if slot is not None:
            raise TrainingError(
                f"the model of this round is not finite, first in slot {slot!r}: the device "
                "declines the round; the coordinator has to go back to an earlier model",
                public="the model of this round is not finite",
            )
        budget = work.budget
        if self._trial is not None:
            began = clock()
            self._trial.batches(work.batch_size, self.n_examples, stop)
            budget = replace(budget, max_seconds=max(0.0, budget.max_seconds - clock() + began))
        meter = Meter(budget, clock=clock, resident=self._resident)
        free = budget.max_resident_bytes - self._resident()
        try:
            watched = self._interrupter(budget.max_seconds, stop, gate)
            with bounded_data(free), watched as interrupted:
                return self._train(parameters, work, hyper, meter, rng, stop, gate, interrupted)
        except MemoryError as error:
            raise TrainingError(
                f"out of memory after {meter.batches} of {work.batches} batches: the device declines "
                f"the round; use a batch_size below {work.batch_size}, or free memory",
                public=OUT_OF_MEMORY,
            ) from error

    def _train(
        self,
        parameters: Flat,
        work: Work,
        hyper: Mapping[str, float],
        meter: Meter,
        rng: np.random.Generator,
        stop: Callable[[], bool],
        gate: Gate,
        interrupted: list[StoppedBy],
    ) -> TrainResult:
        self._step.load(parameters)
        supply = batches(self._source, work.batch_size, rng)
        examples, loss_sum = 0, 0.0
        stopped_by: StoppedBy | None
        need = (
            None
            if self._trial is None
            else self._trial.need_bytes(min(work.batch_size, self.n_examples))
        )
        while (stopped_by := self._over(meter, stop, gate, need)) is None:
            need = None
            features, labels = next(supply)
            try:
                loss = self._step.step(features, labels, hyper)
            except TrainingError:
                if not interrupted:
                    raise
                stopped_by = interrupted[0]  # the batches before are a valid update
                break
            if not math.isfinite(loss):
                after = self._step.parameters()
                raise self._diverged(f"the loss is {loss}", after, meter.batches + 1, work)
            examples += len(labels)
            loss_sum += loss * len(labels)
            meter.batch_done()
        if examples == 0 and stopped_by == "host":
            raise TrainingError(
                f"no batch was trained: {gate.line}; the device declines the round",
                public=gate.public,
            )
        if examples == 0:
            raise TrainingError(
                f"no batch was trained: {self._why_none(stopped_by, work)}; the device declines "
                "the round",
                public="no batch fits its budget",
            )
        delta = self._step.parameters()
        # In place: `parameters()` is a copy already. A non-finite parameter leaves a non-finite
        # difference, so one search covers both.
        with np.errstate(over="ignore", invalid="ignore"):
            np.subtract(delta, parameters, out=delta)
        if self._non_finite(delta) is not None:
            raise self._diverged("the update is not finite", delta, meter.batches, work)
        return TrainResult(
            delta=delta,
            examples=examples,
            batches=meter.batches,
            loss=loss_sum / examples,
            stopped_by=stopped_by,
            seconds=meter.seconds,
        )

    @staticmethod
    def _over(
        meter: Meter, stop: Callable[[], bool], gate: Gate, need_bytes: int | None
    ) -> StoppedBy | None:
        """What forbids one more batch, if anything does; returns after a pause, if there is to be one."""
        over: StoppedBy | None = meter.reached() or ("stop" if stop() else None)
        if over is not None:
            return over
        left = meter.budget.max_seconds - meter.seconds
        if not gate.passes(left, need_bytes, stop):
            return "host"
        meter.begin_batch()
        # What was true before a pause need not be so after it.
        return meter.reached() or ("stop" if stop() else None)

    @contextlib.contextmanager
    def _interrupter(
        self, seconds: float, stop: Callable[[], bool], gate: Gate
    ) -> Iterator[list[StoppedBy]]:
        """Within, a step that is still at it when time is over, or training is not wanted any more, or the
        machine cannot bear it, is interrupted. Gives a list, to which the reason is added then."""
        reasons: list[StoppedBy] = []
        over = threading.Event()
        ends = time.monotonic() + seconds

        def watch() -> None:
            while not over.wait(min(WATCH_S, max(0.0, ends - time.monotonic()))):
                host = gate.stopping()
                if time.monotonic() >= ends or stop() or host:
                    reasons.append("stop" if stop() else "host" if host else "seconds")
                    self._step.interrupt()
                    return

        watcher = threading.Thread(target=watch, name="covey-watch", daemon=True)
        before = threading.stack_size(_WATCH_STACK)  # not the usual 8 MB, which count as allocated
        try:
            watcher.start()
        finally:
            threading.stack_size(before)
        try:
            yield reasons
        finally:
            over.set()
            watcher.join()

    def _hyper(self, work: Work) -> dict[str, float]:
        """All hyper-parameters of the plan, those of the round first."""
        hyper = {spec.name: spec.default for spec in self._header.hyperparameters}
        for name, value in work.hyper.items():
            if name not in hyper:
                raise TrainingError(
                    f"the round sets hyper-parameter {name!r}, which plan {self._header.name!r} "
                    f"does not have (it has {sorted(hyper)}): the device declines the round",
                    public="the round's hyper-parameters do not fit the plan",
                )
            if not math.isfinite(value):
                raise TrainingError(
                    f"the round sets hyper-parameter {name!r} to {value}: the device declines it",
                    public="the round's hyper-parameters are not finite",
                )
            hyper[name] = value
        return hyper

    def _non_finite(self, flat: Flat) -> str | None:
        """Name of the first slot with a NaN or an infinity. Slot by slot: no large temporary."""
        for name, view in self._header.layout.views(flat).items():
            if not np.isfinite(view).all():
                return name
        return None

    def _diverged(self, what: str, flat: Flat, batch: int, work: Work) -> TrainingError:
        slot = self._non_finite(flat)
        where = "all slots are finite" if slot is None else f"first non-finite slot {slot!r}"
        return TrainingError(
            f"{what} in batch {batch} of {work.batches} ({where}): the device declines the round; "
            "lower the learning rate, or check the scale of the data",
            public="its loss or parameters are not finite after training",
        )

    def _why_none(self, stopped_by: StoppedBy, work: Work) -> str:
        if stopped_by == "seconds":
            return f"max_seconds of {work.max_seconds:g} s was over before the first batch"
        if stopped_by == "memory":
            return (
                f"the process already holds {self._resident() / 1e6:.0f} MB, max_resident_bytes "
                f"allows {work.max_resident_bytes / 1e6:.0f} MB; raise it, or free memory"
            )
        return "it was asked to stop before the first batch"


def load_trainer(
    header: PlanHeader,
    train_graph: bytes,
    config: DataConfig,
    base: Path,
    threads: int = 1,
    trials: Trials | None = None,
    max_resident_bytes: int = 1 << 62,
    growth: "Growth | None" = None,
) -> Trainer:
    """A trainer on onnxruntime and the configured data.

    train_graph: the bytes that the header names. base: the configuration file's folder. trials: where
    the plan is tried first; None for one that is trusted. growth: what sources of a directory of shards
    share. The data come first: their mistakes are the likelier ones, and cost less to find.
    """
    source = open_source(config, header, base=base, growth=growth)
    trial = None
    if trials is not None:
        trial = trials.of(header, train_graph)
        trial.load(source.n_examples)
    with bounded_data(max_resident_bytes - resident_bytes()):
        try:
            step = TrainStep(header, train_graph, threads=threads)
        except MemoryError as error:
            raise TrainingError(
                f"plan {header.name!r} does not fit into memory: the device declines the round",
                public=OUT_OF_MEMORY,
            ) from error
    return Trainer(step, source, header, trial=trial)
