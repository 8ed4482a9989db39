"""What lies between two rounds: averaging, evaluation, the next model, and what is kept of it all.

A run is a plan, a number of rounds and a directory. It blocks (disk, onnxruntime), so the service
calls it in threads. Writing is retried until it works: `save` goes on where it failed.
"""

import hashlib
import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from covey_coordinator.averaging import FEDAVG, FedAvg, Strategy
from covey_coordinator.config import RunConfig
from covey_coordinator.pace import Capacity, Pacer
from covey_coordinator.plans.bundle import PlanBundle
from covey_coordinator.round import Completed, RoundSpec
from covey_coordinator.store import Attendance, RunDirectory, RunState
from covey_coordinator.turnout import Fate, Turnout
from covey_shared.errors import ConfigError, CoveyError, DataError
from covey_shared.layout import Flat
from covey_shared.messages import MAX_HYPERPARAMETERS, DeviceId, RoundCall, RunId, Work
from covey_shared.runtime import Evaluator, TrainStep, check_batch, export_model


class HeldOut(NamedTuple):
    """The coordinator's evaluation set. features: [n, *shape], labels: [n, ...]."""

    features: NDArray[Any]
    labels: NDArray[Any]


@dataclass(frozen=True, slots=True)
class RoundOutcome:
    """What a round came to. completed is None for an abandoned one, and reason says why.

    bytes_in, bytes_out: at the coordinator. metrics: only sums and means over the cohort. turnout, fates:
    what became of its devices, as far as is known.
    """

    round_id: int
    index: int
    completed: Completed | None
    reason: str
    after_uploads: bool
    cohort: int
    seconds: float
    phase_seconds: dict[str, float]
    bytes_in: int
    bytes_out: int
    metrics: dict[str, Any] = field(default_factory=dict)
    turnout: Turnout | None = None
    fates: dict[DeviceId, Fate] = field(default_factory=dict)


class Run:
    """One run's model and its progress. held_out: data to evaluate each model on, if there is any.

    Raises ConfigError for hyper-parameters that the plan does not have, StorageError for a directory
    that is damaged.
    """

    def __init__(
        self,
        directory: RunDirectory,
        config: RunConfig,
        bundle: PlanBundle,
        *,
        held_out: HeldOut | None = None,
        strategy: Strategy | None = None,
    ) -> None:
        self.directory = directory
        self.config = config
        self.bundle = bundle
        self._held_out = held_out
        self._strategy = strategy or FedAvg(config.server_lr)
        self._hyper = hyper_values(bundle, config)
        self._pacer = Pacer(Capacity(config.pace.devices_per_s, config.pace.mb_per_s))
        self._evaluator = (
            Evaluator(bundle.header, bundle.graphs["eval"]) if held_out is not None else None
        )
        self.state: RunState = directory.state()
        self.parameters: Flat = self._model_of(self.state)
        self._spec: RoundSpec | None = None
        self._to_stage: Callable[[], None] | None = None
        self._to_save: deque[Callable[[], None]] = deque()
        self._worths: dict[int, tuple[float, float, float]] = {}

    def begin(self) -> None:
        """Take up the run where the database says it stands. Raises StorageError, ConfigError if an
        operator stopped it."""
        state = self.directory.take_up()
        if state.model != self.state.model:  # rolled back meanwhile
            self.parameters = self._model_of(state)
        self.state = state
        self.directory.settle(state, whole=True)
        self._take_stock()

    def end(self) -> None:
        """Note how it ended. Raises StorageError."""
        self.state = self.directory.end(rounds_left=self.rounds_left > 0)

    def _model_of(self, state: RunState) -> Flat:
        kept = self.directory.parameters(state, self.bundle.header.n_params)
        return self.bundle.initial if kept is None else kept

    @property
    def index(self) -> int:
        """The number of the next round within the run, from 1."""
        return self.state.rounds_done + 1

    @property
    def rounds_left(self) -> int:
        """Rounds still to be called."""
        return max(0, self.config.rounds - self.state.rounds_done)

    @property
    def model(self) -> bytes:
        """The current model as it is published: one little-endian float32 vector."""
        return self.parameters.astype("<f4").tobytes()

    @property
    def model_digest(self) -> bytes:
        """SHA-256 of `model`."""
        return hashlib.sha256(self.model).digest()

    def blobs(self) -> list[bytes]:
        """What a device may ask for: for the next round, and to use the model that there is now."""
        return on_offer(self.bundle, self.parameters)

    def spec(
        self, fleet: str, round_id: int, revision: int = 0, *, present: int = 0, known: int = 0
    ) -> RoundSpec:
        """The next round, entirely settled. revision: see `store.Store`. present: devices online,
        known: those of them that joined the fleet."""
        config, model = self.config, self.model
        call = RoundCall(
            fleet=fleet,
            run=RunId(bytes.fromhex(self.state.run_id)),
            round=round_id,
            plan=self.bundle.hash,
            plan_bytes=len(self.bundle.header_bytes),
            model=hashlib.sha256(model).digest(),
            model_bytes=len(model),
            revision=revision,
            n_min=config.cohort.minimum,
            plan_signatures=self.bundle.signatures,
            gather_s=config.deadlines.gather_s,
            chance=1.0,
            spread_s=0.0,
            reconnect_s=0.0,
        )
        spec = RoundSpec(
            call=call,
            n_params=self.bundle.header.n_params,
            work=Work(
                batches=config.work.batches,
                batch_size=config.work.batch_size,
                seconds=config.work.seconds,
                hyper=self._hyper,
            ),
            goal=config.cohort.goal,
            over_selection=config.cohort.over_selection,
            value_bits=config.encoding.value_bits,
            clip=config.encoding.clip,
            metric_clips=(config.encoding.loss_clip,),
            w_max=config.encoding.max_weight,
            share_s=config.deadlines.share_s,
            collect_s=config.deadlines.collect_s,
            unmask_s=config.deadlines.unmask_s,
            resend_s=config.deadlines.resend_s,
            absent_grace_s=config.deadlines.absent_grace_s,
        )
        fetched = len(self.bundle.header_bytes) + len(self.bundle.graphs["train"]) + len(model)
        pace = self._pacer.steer(present, spec.cohort_limit, fetched, call.gather_s, known=known)
        call = msgspec.structs.replace(
            call, chance=pace.chance, spread_s=pace.spread_s, reconnect_s=pace.reconnect_s
        )
        self._spec = replace(spec, call=call)
        return self._spec

    def resume(self, spec: RoundSpec) -> None:
        """The next round is one that another process opened."""
        self._spec = spec

    def absorb(self, outcome: RoundOutcome) -> RoundOutcome:
        """Average, evaluate, and queue what must be saved. Returns the outcome with its metrics; one
        whose sum cannot be used comes back as abandoned, and the model stays as it was."""
        state, index = self.state, outcome.index
        if self._spec is not None:
            self._pacer.learn(outcome.cohort, self._spec.cohort_limit)
        if outcome.completed is not None:
            try:
                following, metrics = self._average(outcome.completed)
            except CoveyError as error:
                outcome = replace(outcome, completed=None, reason=str(error))
            else:
                outcome = replace(outcome, metrics=metrics | self._evaluate(following))
                self.parameters = following
                self._to_stage = lambda: self._stage(index, following)
        state.rounds_done = index
        if outcome.completed is not None:
            state.rounds_completed += 1
            state.model, state.model_index = self.model_digest.hex(), index
        else:
            state.rounds_abandoned += 1
        state.last = self._metrics_line(outcome)
        kept = Attendance(outcome.turnout, outcome.fates, self.config.models.keep_rounds)
        self._to_save.append(lambda: self.directory.finish_round(state, kept))
        self._to_save.append(lambda: self._settle(state))
        return outcome

    @property
    def averaging(self) -> tuple[str, float]:
        """How the next model comes about, in a transcript's words: rule, learning rate."""
        if isinstance(self._strategy, FedAvg):
            return FEDAVG, self._strategy.server_lr
        return type(self._strategy).__name__.lower()[:32], 1.0

    def transcript_lost(self, problem: str) -> None:
        """A round has no transcript; said with the state, when that is saved next."""
        self.state.transcripts_lost += 1
        self.state.transcript_problem = problem

    def stage(self) -> None:
        """Write the files of a new model, which nothing names yet. Raises StorageError, and can be
        called again."""
        if self._to_stage is not None:
            self._to_stage()
            self._to_stage = None

    def save(self) -> None:
        """Write what is queued. Raises StorageError; call it again and it goes on from there."""
        self.stage()
        while self._to_save:
            self._to_save[0]()
            self._to_save.popleft()

    def _settle(self, state: RunState) -> None:
        self.directory.settle(state)
        if state.last is not None and completed(state.last):
            self._worths[state.model_index] = worth(state.last)
            self._tidy()

    def _take_stock(self) -> None:
        """Which models there are, and how good they were."""
        lines = self.directory.store.rounds(self.directory.name)
        staged = self.directory.staged().keys()
        known = {line["index"]: worth(line) for line in lines if completed(line)}
        self._worths = {index: known[index] for index in known if index in staged}
        self.directory.drop_models(staged - known.keys())  # of rounds that never ended
        self._tidy()

    def _tidy(self) -> None:
        """Remove the models of rounds that are too long ago, but for the best one."""
        worths = self._worths
        kept = set(sorted(worths)[-self.config.models.keep_rounds :])
        # The earliest of several that are as good.
        kept |= set(sorted(worths, key=lambda index: (worths[index], -index))[-1:])
        dropped = worths.keys() - kept - {self.state.model_index}
        self.directory.drop_models(dropped)
        for index in dropped:
            del worths[index]

    def _stage(self, index: int, parameters: Flat) -> None:
        model = export_model(self.bundle.header, self.bundle.graphs["infer"], parameters)
        self.directory.stage_model(index, parameters, model)

    def _average(self, completed: Completed) -> tuple[Flat, dict[str, Any]]:
        total = completed.encoding.decode_sum(completed.ring_sum)
        following = self._strategy.step(self.parameters, total)
        return following, {
            "examples": round(total.examples),
            "train_loss": total.metrics[0],
            "update_norm": float(np.linalg.norm(total.average)),
        }

    def _evaluate(self, parameters: Flat) -> dict[str, Any]:
        """On the held-out set, if there is one. A set that fails costs its numbers, not the round."""
        if self._evaluator is None or self._held_out is None:
            return {}
        try:
            sums = self._evaluator.evaluate(parameters, *self._held_out)
        except (CoveyError, MemoryError) as error:
            return {"test_problem": str(error) or "out of memory"}
        n = sums.get("examples", len(self._held_out.features))
        metrics = {"test_loss": sums["loss_sum"] / n}
        if "correct" in sums:
            metrics["test_accuracy"] = sums["correct"] / n
        return metrics

    def _metrics_line(self, outcome: RoundOutcome) -> dict[str, Any]:
        """One round for metrics.jsonl: nothing of a single device but whether it took part."""
        completed = outcome.completed
        line: dict[str, Any] = {
            "round": outcome.round_id,
            "index": outcome.index,
            "outcome": "completed" if completed is not None else "abandoned",
            "cohort": outcome.cohort,
            "survivors": len(completed.survivors) if completed is not None else 0,
        }
        if completed is None:
            line["reason"] = outcome.reason
        else:
            line["dropped"] = list(completed.dropped)
            line["next_model"] = self.state.model
        line |= outcome.metrics
        if self.state.transcripts_lost:
            line["transcripts_lost"] = self.state.transcripts_lost
        if self._spec is not None:
            line |= {
                "model": self._spec.call.model.hex(),
                "revision": self._spec.call.revision,
            }
        return line | {
            "seconds": round(outcome.seconds, 3),
            "phase_seconds": {name: round(s, 3) for name, s in outcome.phase_seconds.items()},
            "bytes_received": outcome.bytes_in,
            "bytes_sent": outcome.bytes_out,
        }


def on_offer(bundle: PlanBundle, parameters: Flat) -> list[bytes]:
    """What devices fetch of a plan and a model: to train, and to keep the model for themselves."""
    graphs = bundle.graphs
    model = parameters.astype("<f4").tobytes()
    return [bundle.header_bytes, graphs["train"], graphs["infer"], model]


def completed(line: dict[str, Any]) -> bool:
    """Whether a line of metrics is of a round that gave a model."""
    return line.get("outcome") == "completed"


def worth(line: dict[str, Any]) -> tuple[float, float, float]:
    """To compare models by, greater is better: the held-out set's accuracy, its loss, or the devices'
    training loss, by the first that there is. line: of a completed round."""
    return (
        line.get("test_accuracy", -math.inf),
        -line.get("test_loss", math.inf),
        -line.get("train_loss", math.inf),
    )


def hyper_values(bundle: PlanBundle, config: RunConfig) -> tuple[float, ...]:
    """The run's hyper-parameters in the plan's order. Raises ConfigError for one it does not have."""
    known = {hyper.name: hyper.default for hyper in bundle.header.hyperparameters}
    for name in config.work.hyper:
        if name not in known:
            raise ConfigError(
                f"key `work.hyper.{name}`: the plan {bundle.header.name!r} has no such "
                f"hyper-parameter; it has {', '.join(known) or 'none'}"
            )
    if len(known) > MAX_HYPERPARAMETERS:
        raise ConfigError(
            f"the plan {bundle.header.name!r} has {len(known)} hyper-parameters; a round can set "
            f"{MAX_HYPERPARAMETERS}"
        )
    return tuple(float(config.work.hyper.get(name, value)) for name, value in known.items())


def rehearse(bundle: PlanBundle, held_out: HeldOut | None) -> None:
    """Try everything a run will do with a plan and an evaluation set, before devices are asked.

    Raises MalformedError for graphs that do not run, DataError for a set that does not fit.
    """
    header = bundle.header
    TrainStep(header, bundle.graphs["train"])
    evaluator = Evaluator(header, bundle.graphs["eval"])
    export_model(header, bundle.graphs["infer"], bundle.initial)
    if held_out is None:
        return
    features, labels = held_out
    check_batch(header, features, labels)
    if not np.isfinite(features).all():
        raise DataError("not all features are finite")
    evaluator.evaluate(bundle.initial, features[:256], labels[:256])
