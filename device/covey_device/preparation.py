"""What a round's training stands on: the plan's trainer and the model, fetched, checked and kept.

A plan is tried and loaded once, however many rounds run it; a model serves the rounds that ask for it
again. Both are named by their hashes in a call that the coordinator signed.
"""

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import Executor
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from covey_device.blobs import BlobFetcher
from covey_device.config import DeviceConfig, LimitsConfig, PolicyFile
from covey_device.data import DataConfig, ShardsData
from covey_device.trainer import OPEN, Gate, Trainer, TrainResult, Work, load_trainer
from covey_device.trials import Allowed, Trials
from covey_shared.errors import DataError, LocalProtocolError, MalformedError, RefusedError
from covey_shared.keys import Rng
from covey_shared.layout import Flat
from covey_shared.messages import Head, RoundCall
from covey_shared.plan import (
    MAX_GRAPH_BYTES,
    MAX_HEADER_BYTES,
    PlanHeader,
    check_graph,
    decode_header,
    plan_hash,
)

if TYPE_CHECKING:
    from covey_device.data.growing import Growth

T = TypeVar("T")

TrainerFactory = Callable[[PlanHeader, bytes], Trainer]


class Preparation:
    """One device's. pool: threads for trials and for reading data. policy: the owner's file, whose
    limits go before `limits`.

    plan: hash, header and trainer of the plan that is loaded; model: hash and parameters.
    """

    def __init__(
        self,
        blobs: BlobFetcher,
        make_trainer: TrainerFactory,
        *,
        limits: Work,
        rng: Rng,
        pool: Executor | None = None,
        policy: PolicyFile | None = None,
    ) -> None:
        self._blobs = blobs
        self.make_trainer = make_trainer
        self.limits = limits
        self._rng = rng
        self._pool = pool
        self.policy = policy
        self._limits_in_force = policy.current.limits if policy else None
        self.plan: tuple[bytes, PlanHeader, Trainer] | None = None
        self._graph: tuple[bytes, PlanHeader, bytes] | None = None  # what its trainer is made of
        self.model: tuple[bytes, Flat] | None = None
        self._in_use = threading.Lock()  # by a training, which an earlier round may still be ending

    async def fetch(self, call: RoundCall) -> PlanHeader:
        """Get what a call names, within the owner's limits as they are now.

        Raises CoveyError if it does not come or is not fit, and whatever the owner's data source raises.
        """
        self._take_limits()
        header = await self._fetch_plan(call)
        if call.model_bytes != 4 * header.n_params:
            raise RefusedError(
                f"the called model has {call.model_bytes} bytes; the plan's has "
                f"{4 * header.n_params}"
            )
        graph = bytes.fromhex(header.train.sha256)
        infer = bytes.fromhex(header.infer.sha256)  # what is kept of the model is made with it
        self._blobs.hold((call.plan, graph, infer, call.model))
        if self.model is None or self.model[0] != call.model:
            limit = min(4 * header.n_params, self.limits.max_resident_bytes)
            data = await self._blobs.fetch(call.model, call.model_bytes, limit=limit)
            self.model = (call.model, np.frombuffer(data, dtype="<f4").astype(np.float32))
        return header

    def _take_limits(self) -> None:
        if self.policy is not None and self.policy.current.limits != self._limits_in_force:
            self._limits_in_force = self.policy.current.limits
            self.limits = limits_of(self._limits_in_force)
            self.plan = None  # what was prepared within the old limits

    async def _fetch_plan(self, call: RoundCall) -> PlanHeader:
        if self.plan is not None and self.plan[0] == call.plan:
            await self._refresh(self.plan[2])
            return self.plan[1]
        header, graph = await self._fetch_graph(call)
        self.plan = None  # two plans at once may be more than the device has room for
        # Among the training threads: reading data may take long, and duties must not wait for it.
        try:
            trainer = await asyncio.get_running_loop().run_in_executor(
                self._pool, tamed(lambda: self.make_trainer(header, graph))
            )
        except asyncio.CancelledError:
            # The next round must not wait for a trial of this one's plan.
            if isinstance(self.make_trainer, TriedTrainers):
                self.make_trainer.trials.cancel()
            raise
        self.plan = (call.plan, header, trainer)
        return header

    async def _refresh(self, trainer: Trainer) -> None:
        """Data that came since the last round are this one's. Before it is joined: a device whose data are
        gone declines, and no cohort has to do without it."""

        def refresh() -> None:
            with self._in_use:
                trainer.refresh()

        try:
            await asyncio.get_running_loop().run_in_executor(self._pool, tamed(refresh))
        except DataError:
            self.plan = None  # it is opened anew
            raise

    async def _fetch_graph(self, call: RoundCall) -> tuple[PlanHeader, bytes]:
        if self._graph is not None and self._graph[0] == call.plan:
            return self._graph[1:]
        data = await self._blobs.fetch(call.plan, call.plan_bytes, limit=MAX_HEADER_BYTES)
        if plan_hash(data) != call.plan:
            raise MalformedError("the plan's header does not match its hash")
        header = decode_header(data)
        graph = await self._blobs.fetch(
            bytes.fromhex(header.train.sha256), header.train.size, limit=MAX_GRAPH_BYTES
        )
        check_graph(header.train, graph, "train.onnx")
        self._graph = (call.plan, header, graph)
        return header, graph

    def rest(self, *, model: bool) -> None:
        """Give back what can be made again without the network: the trainer, with its session and its data
        source, and the `model` if it is on the disk as well."""
        self.plan = None
        if model:
            self.model = None

    def train(self, head: Head, stop: Callable[[], bool], gate: Gate = OPEN) -> TrainResult:
        """Train as the head says, the owner allows and the machine bears; blocks until then. Raises
        CoveyError."""
        if self.plan is None or self.plan[0] != head.plan:
            raise LocalProtocolError("training without the round's plan")
        if self.model is None or self.model[0] != head.model:
            raise LocalProtocolError("training without the round's model")
        _, header, trainer = self.plan
        names = [hyper.name for hyper in header.hyperparameters]
        work = Work(
            batches=min(head.work.batches, self.limits.batches),
            batch_size=head.work.batch_size,
            max_seconds=min(head.work.seconds, self.limits.max_seconds),
            max_resident_bytes=self.limits.max_resident_bytes,
            hyper=dict(zip(names, head.work.hyper, strict=True)),
        )
        seed = int.from_bytes(self._rng(8), "big")
        with self._in_use:
            return trainer.train(
                self.model[1],
                work,
                clock=time.monotonic,
                rng=np.random.default_rng(seed),
                stop=stop,
                gate=gate,
            )


def tamed(step: Callable[[], T]) -> Callable[[], T]:
    """A step that may run the owner's code, which must not end the process or its thread.

    SystemExit would pass through the event loop, StopIteration never arrive at it.
    """

    def guarded() -> T:
        try:
            return step()
        except (SystemExit, StopIteration, GeneratorExit) as error:
            raise DataError(f"the data source raised {error!r}; correct it") from error

    return guarded


class TriedTrainers:
    """Makes trainers on this device's configured data, within its owner's limits of the moment, of
    plans that were tried before.

    base: the configuration file's folder. state: the device's directory, where trials are remembered.
    """

    def __init__(
        self, data: DataConfig, base: Path, state: Path, limits: Callable[[], LimitsConfig]
    ) -> None:
        self._data, self._base, self._limits = data, base, limits
        self._growth = _growth_of(data, state)
        self.trials = Trials(state, self._allowed)

    def _allowed(self) -> Allowed:
        limits = self._limits()
        seconds = min(limits.trial_seconds, limits.max_seconds)
        return Allowed(limits.max_memory_mb * 1_000_000, seconds, limits.threads)

    def __call__(self, header: PlanHeader, train_graph: bytes) -> Trainer:
        """A trainer, once a trial of the plan went well."""
        allowed = self._allowed()
        return load_trainer(
            header,
            train_graph,
            self._data,
            self._base,
            allowed.threads,
            self.trials,
            allowed.max_resident_bytes,
            self._growth,
        )


def _growth_of(data: DataConfig, state: Path) -> "Growth | None":
    """What the sources of a directory of shards share for as long as this process runs."""
    if not isinstance(data, ShardsData):
        return None
    from covey_device.data.growing import Growth

    return Growth(state)


def trainer_factory(config: DeviceConfig, base: Path, policy: PolicyFile) -> TriedTrainers:
    """Trainers as device.toml and policy.toml have them. base: device.toml's folder."""
    return TriedTrainers(config.data, base, base / config.state, lambda: policy.current.limits)


def limits_of(limits: LimitsConfig) -> Work:
    """The owner's limits as the most work of one round."""
    return Work(
        batches=limits.max_batches,
        batch_size=1,
        max_seconds=limits.max_seconds,
        max_resident_bytes=limits.max_memory_mb * 1_000_000,
    )
