"""A coordinator, its devices, their disks, a broker and a clock; and one seed played on them.

The services are the real ones, with everything that they stand on: sessions, rounds, secure
aggregation, key store, spool, run directory. Made up are training, which takes a while and gives a known
update, and what lies outside of a process: see `loop`, `network`, `disk`. What `covey up` and
`covey-device run` do around the services is repeated here in a few lines.
"""

import asyncio
import contextlib
import contextvars
import hashlib
import logging
import random
import shutil
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np

from covey_coordinator import pace, store
from covey_coordinator.config import (
    CohortConfig,
    DeadlinesConfig,
    EncodingConfig,
    PaceConfig,
    RunConfig,
    TranscriptsConfig,
    WorkConfig,
)
from covey_coordinator.plans.bundle import PlanBundle
from covey_coordinator.registry import Registry
from covey_coordinator.round import Completed, Moved
from covey_coordinator.run import RoundOutcome, Run
from covey_coordinator.service import CoordinatorService
from covey_coordinator.store import Progress, RunDirectory, Store
from covey_device.audit import Audit, AuditLog
from covey_device.cache import BlobCache
from covey_device.keystore import MemoryFile
from covey_device.service import DeviceService
from covey_device.session import Action, Fetch, Policy, Save, Session, StopTraining, Train
from covey_device.trainer import TrainResult, Work
from covey_shared import chunks, keys, wire
from covey_shared.errors import RemoteProtocolError, StorageError, TrainingError
from covey_shared.layout import Flat, Layout, Slot
from covey_shared.messages import Certificate, DeviceId, RoundCall
from covey_shared.plan import GraphRef, Hyperparameter, PlanHeader, TensorSpec, encode_header
from covey_shared.secagg.cohort import Trust
from covey_shared.topics import OFFLINE, Topics
from covey_shared.transport import Will
from simulation import database, disk, faults
from simulation.database import Database
from simulation.disk import Disk
from simulation.invariants import Watch
from simulation.loop import RUNNING, Crash, Loop, Process
from simulation.network import Client, Network
from simulation.quick_crypto import quick_crypto

FLEET = "simulated"
COORDINATOR = "coordinator"
TOPICS = Topics(FLEET)
NOW_UNIX = 1_900_000_000
N_PARAMS = 60
CHUNK_BYTES = 48
"""Small, so that a model and an update are several chunks."""
CROWD = 3
"""More devices than so many spread over some time what all are called to do."""
ROUNDS = 1000
DEADLINES = DeadlinesConfig(
    gather_s=6.0, share_s=6.0, collect_s=10.0, unmask_s=6.0, absent_grace_s=0.5, resend_s=1.0
)
TRAINING_S = (0.2, 2.0)
SETTLE_S = 1.0
"""Once faults have stopped, for what is under way to come out."""
RUN = "run"
BETWEEN = "between"
CALM_S = 400.0
"""In so much time after the last fault, a round must be called with everybody there, and complete. A
coordinator that takes too few devices to be there calls all the same after five minutes."""
RESTART_S = 2.0
"""After this, whoever looks after a process starts it again."""

LIMITS = Work(batches=100, batch_size=1, max_seconds=3600.0, max_resident_bytes=10**12)

log = logging.getLogger("covey")


@dataclass(frozen=True)
class Verdict:
    """What came of a seed. broken: empty if everything held. trace: empty unless asked for."""

    seed: int
    kinds: tuple[str, ...]
    broken: tuple[str, ...]
    trace: tuple[str, ...]
    rounds: int
    completed: int
    seconds: float
    transcripts: int
    interrupted: tuple["Interrupted", ...]
    cut_short: tuple["CutShort", ...]


@dataclass
class CutShort:
    """A device's death while updates were collected, after its own had begun to leave. summed: it is in
    the sum; None: there is none."""

    device: str
    round_id: int
    summed: bool | None = None


@dataclass
class Interrupted:
    """A coordinator's death. phase: of the round that was open, or `between` two. point: before what.
    round_id: 0 for none. completed: that round, in the end."""

    phase: str
    point: str
    round_id: int
    completed: bool = False


@dataclass
class Machine:
    """What outlives a process. ahead_s: of its clock. serves: while a process runs on it."""

    name: str
    disk: Disk
    identity: keys.SigningKey
    certificate: bytes
    process: Process | None = None
    lives: int = 0
    slowness: float = 1.0
    spoiled: float = 0.0
    ahead_s: float = 0.0
    service: Any = None
    stopping: asyncio.Event | None = None
    power: bool = False
    back_s: float = RESTART_S
    store: Store | None = None
    database: Database | None = None


class _Trainer:
    """Takes its time elsewhere; gives an update that depends on nothing but chance."""

    def __init__(self, machine: Machine, process: Process) -> None:
        self._machine, self._process = machine, process

    def refresh(self) -> None:
        """No data ever come."""

    def train(
        self, parameters: Flat, work: Work, *, clock: Any, rng: Any, stop: Any, gate: Any
    ) -> TrainResult:
        chance = self._process.random
        if stop() or chance.random() < self._machine.spoiled:
            raise TrainingError("nothing was trained")
        delta = np.frombuffer(chance.randbytes(len(parameters)), np.int8).astype(np.float32) / 256
        return TrainResult(delta, chance.randint(1, 400), 1, chance.uniform(0, 5), "batches", 1.0)


class _Device(DeviceService):
    """May die before each of its actions."""

    def __init__(self, world: "World", process: Process, *args: Any, **rest: Any) -> None:
        super().__init__(*args, **rest)
        self._world, self._process = world, process
        self._blobs._jitter = process.random.random

    async def perform(self, action: Action) -> None:
        self._process.effect(f"{type(action).__name__}")
        if isinstance(action, Fetch | StopTraining):
            self._process.hurry("training", 0.05)
        await super().perform(action)
        if isinstance(action, Train):
            self._process.hurry("training", 0.05)
        if isinstance(action, Save):
            self._world.watch.save(self.device, action.memory)
            self._world.tell("saved", self.device, "")


class _Run(Run):
    """Without the model as a file that anything can load: ONNX is not what is simulated."""

    def _stage(self, index: int, parameters: Flat) -> None:
        self.directory.stage_model(index, parameters, b"model " + parameters.tobytes())


@cache
def bundle() -> PlanBundle:
    """A plan whose graphs are never run."""
    graphs = {name: f"the {name} graph".encode() for name in ("train", "eval", "infer")}
    refs = {
        name: GraphRef(sha256=hashlib.sha256(data).hexdigest(), size=len(data))
        for name, data in graphs.items()
    }
    slot = Slot(name="w", shape=(N_PARAMS,), offset=0, role="parameter")
    header = PlanHeader(
        format=1,
        name="p",
        loss="mse",
        optimizer="sgd",
        opset=1,
        features=TensorSpec(name="x", dtype="float32", shape=(1,)),
        labels=TensorSpec(name="y", dtype="float32", shape=(1,)),
        hyperparameters=(Hyperparameter(name="lr", default=0.1),),
        layout=Layout(slots=(slot,)),
        state=(),
        metrics=("loss_sum",),
        versions={},
        **refs,
    )
    initial = np.zeros(N_PARAMS, np.float32)
    return PlanBundle(header, encode_header(header), graphs, initial)  # type: ignore[arg-type]


@cache
def identity(name: str) -> tuple[bytes, bytes]:
    """Seed of a machine's key, the same in all simulations, and its certificate."""
    seed = hashlib.sha256(f"identity {name}".encode()).digest()
    ca = keys.SigningKey(hashlib.sha256(b"identity ca").digest())
    certificate = Certificate(
        FLEET, DeviceId(name), keys.SigningKey(seed).public, 0, NOW_UNIX + 100 * 365 * 86_400
    )
    return seed, wire.sign(certificate, ca).envelope


class World:
    """One seed. kinds: of faults; None: those of the seed. planned: what goes wrong instead of what
    chance has of these, given the devices. traced: keep a trace."""

    def __init__(
        self,
        seed: int,
        directory: Path,
        *,
        kinds: tuple[str, ...] | None = None,
        planned: Callable[[list[str]], list[faults.Fault]] | None = None,
        traced: bool = False,
    ) -> None:
        self.seed = str(seed)
        self.kinds = faults.enabled(self.seed) if kinds is None else kinds
        self._planned = planned
        self.trace: list[str] = []
        self._place = f"{directory}/"  # is another each time, and in errors of files
        self._traced = traced
        chance = random.Random(f"{self.seed}/world")
        self.loop = Loop()
        self._nobody = contextvars.copy_context()
        self.network = Network(
            self.loop, random.Random(f"{self.seed}/network"), self._said, self.tell
        )
        n = chance.choice((3, 3, 3, 4, 4, 4, 5, 5, 6, 8))
        self.devices = [f"pi-{i}" for i in range(1, n + 1)]
        self.coordinator = COORDINATOR
        over = chance.choice((0.0, 0.0, 0.5)) if n > 3 else 0.0
        goal = n if not over else max(3, int(n / (1 + over)))
        self.config = RunConfig(
            plan="p",
            rounds=ROUNDS,
            cohort=CohortConfig(goal=goal, minimum=3, over_selection=over),
            work=WorkConfig(batches=1, batch_size=1, seconds=3600.0),
            encoding=EncodingConfig(value_bits=chance.choice((8, 16)), clip=0.5),
            deadlines=DEADLINES,
            pace=PaceConfig(devices_per_s=float(chance.choice((1, 2, 50)))),
            transcripts=TranscriptsConfig(
                keep=chance.choice(("full", "full", "full", "signatures", "off")),
                full_rounds=chance.choice((1, 3, 10)),
            ),
        )
        # None, one that has room for a model or two and the plan, and one that never fills up.
        self.cache_bytes = chance.choice((0, 1500, 10**6))
        self.machines: dict[str, Machine] = {}
        for name in (*self.devices, COORDINATOR):
            place = directory / name
            place.mkdir(parents=True)
            files = Disk(place, random.Random(f"{self.seed}/{name}/disk"))
            key, certificate = identity(name)
            self.machines[name] = Machine(name, files, keys.SigningKey(key), certificate)
        self.trust = Trust(
            FLEET,
            keys.SigningKey(hashlib.sha256(b"identity ca").digest()).public,
            self.machines[COORDINATOR].identity.public,
        )
        path = directory / COORDINATOR / store.FILE
        with Store.open(path) as fleet:
            RunDirectory.create(directory / COORDINATOR / RUN, b"", chance.randbytes(16), fleet)
        self.machines[COORDINATOR].database = Database(
            path,
            self.machines[COORDINATOR].disk,
            forgetful="coordinator-power-cut" in self.kinds,
        )
        self.watch = Watch(
            self.trust,
            bundle().initial,
            directory / COORDINATOR / RUN,
            self.config.transcripts.keep,
        )
        self.watch.on_call = self._called
        self.watch.left = {DeviceId(name): {} for name in self.devices}
        self.calm_since: float | None = None
        self._awaited: int | None = None  # the round that must complete
        self.done = False
        self.completed: set[int] = set()  # rounds, at the end
        self._ghosts: list[Process] = []
        self._entered: Counter[str] = Counter()  # how often the coordinator entered a phase
        self._phase = BETWEEN
        self.interrupted: list[Interrupted] = []
        self.cut_short: list[CutShort] = []
        self._at_phase: dict[tuple[str, int], list[faults.Fault]] = {}

    # -- playing ----------------------------------------------------------------------------------

    def play(self) -> None:
        """Until a round has completed after all faults, or something is broken."""
        if self._planned is not None:
            plan = self._planned(self.devices)
        else:
            plan = faults.plan(self.seed, self.kinds, self.devices, COORDINATOR)
        for fault in plan:
            if fault.phase:
                self._at_phase.setdefault((fault.phase, fault.nth), []).append(fault)
            else:
                self._later(fault.at_s, partial(self._begin, fault))
        calm_at = faults.chaos_s(self.seed) if self.kinds else 0.0
        self.loop.call_at(calm_at, self._calm)
        with self.loop:
            for name in self.machines:
                self.boot(name)
            while not self.done and not self.watch.broken:
                if self.loop.now > calm_at + CALM_S:
                    self.watch.broken.append(
                        f"no round has completed {CALM_S:g} s after the last fault"
                    )
                elif not self.loop.step():
                    self.watch.broken.append("nothing happens any more")
                if self.loop.problems:
                    self.watch.broken.append(self.loop.problems[0])
            self._end_of_the_world()

    def _end_of_the_world(self) -> None:
        if not self.watch.broken:
            self.watch.settled()
            for line in self.watch.metrics():
                completed = line["outcome"] == "completed"
                self.watch.transcript(line["index"], line["round"], completed=completed)
            for name in self.devices:
                self.watch.audited(
                    DeviceId(name),
                    self.machines[name].disk.directory / "state",
                    powerless="power-cut" in self.kinds,
                )
        for machine in self.machines.values():
            if machine.process is not None:
                machine.process.die()
                self._ghosts.append(machine.process)
        for process in self._ghosts:
            process.bury()
        self.completed = self.watch.completed
        for death in self.interrupted:
            death.completed = death.round_id in self.completed
        for upload in self.cut_short:
            if (total := self.watch.sums.get(upload.round_id)) is not None:
                upload.summed = upload.device in total.survivors
        for machine in self.machines.values():
            if machine.store is not None:
                machine.store.close()

    def _calm(self) -> None:
        """From now on nothing goes wrong."""
        self.calm_since = self.loop.now
        self._note("all faults are over")
        for machine in self.machines.values():
            machine.slowness, machine.spoiled, machine.disk.full = 1.0, 0.0, False
            self.network.mend(machine.name)
            self.network.link(machine.name).slow_s = 0.0
            if machine.process is not None:
                machine.process.die_after(0)
                machine.process.hurry("training", 1.0)
        self.network.weather.loss = self.network.weather.doubling = 0.0
        self.network.weather.spread_s = 0.0
        self.network.running = True

    def _called(self, call: RoundCall) -> None:
        """A round that everybody could hear of, in fair weather, is one that must complete."""
        self.watch.called(full=self.machines[COORDINATOR].disk.full)
        calm = self.calm_since is not None and self.loop.now >= self.calm_since + SETTLE_S
        if calm and self._awaited is None and len(self.network.clients) == len(self.machines):
            self._note(f"round {call.round} must complete")
            self._awaited = call.round

    def _outcome(self, outcome: RoundOutcome) -> None:
        service = self.machines[COORDINATOR].service
        self.watch.outcome(outcome, dict(service.registry.faults))
        if outcome.round_id == self._awaited:
            self.watch.expect(
                outcome.completed is not None,
                f"round {outcome.round_id} fails in fair weather: {outcome.reason}",
            )
            self.done = True

    # -- the trace --------------------------------------------------------------------------------

    def tell(self, what: str, who: str, topic: str, payload: bytes = b"") -> None:
        """A line of the trace."""
        if self._traced:
            self._note(f"{who}: {what} {_about(topic, payload)}".rstrip())

    def _note(self, line: str) -> None:
        if self._traced:
            self.trace.append(f"{self.loop.now:9.3f}  {line}".replace(self._place, ""))

    def _said(self, sender: str, topic: str, payload: bytes) -> None:
        self.tell("sends", sender, topic, payload)
        self.watch.said(sender, topic, payload)

    def logged(self, record: logging.LogRecord) -> None:
        """A line of the services' own log."""
        if record.exc_info and not isinstance(record.exc_info[1], Crash):
            self.watch.broken.append(f"unexpected: {record.getMessage()}: {record.exc_info[1]!r}")
        if record.levelno == logging.WARNING and record.msg.startswith("refused from"):
            self.watch.broken.append(f"an honest device is refused: {record.getMessage()}")
        if self._traced:
            process = RUNNING.get()
            self._note(f"{process.name if process else '?'}: | {record.getMessage()}")

    # -- processes --------------------------------------------------------------------------------

    def boot(self, name: str) -> None:
        """Start a process on a machine that has none."""
        machine = self.machines[name]
        if machine.process is not None:
            return
        if machine.store is not None:
            machine.store.close()
            machine.store = None
        if machine.database is not None:
            machine.database.recover()
        machine.lives += 1
        process = Process(self.loop, name, f"{self.seed}/{name}/{machine.lives}")
        process.on_death = lambda where: self._dies(machine, where)
        chance = process.random

        def thread_s(pool: Any) -> float:
            if pool == "training":
                return chance.uniform(*TRAINING_S) * machine.slowness
            if machine.slowness > 1.0:
                return chance.uniform(0.0, 0.02) * machine.slowness
            return chance.choice((0.0, 0.0, 0.0, 0.002, 0.02))

        process.thread_s = thread_s
        process.key = machine.identity
        machine.process, machine.service = process, None
        machine.stopping = asyncio.Event()
        self._note(f"{name}: starts")
        work = self._coordinate if name == COORDINATOR else self._serve
        process.spawn(self._watched(machine, process, work))

    async def _watched(self, machine: Machine, process: Process, work: Any) -> None:
        try:
            await work(machine, process)
        except (Crash, asyncio.CancelledError):
            raise
        except StorageError as error:
            if not machine.disk.full:
                self.watch.broken.append(f"{machine.name} cannot start: {error}")
        except Exception as error:
            self.watch.broken.append(f"{machine.name} ends: {error!r}")
        if not process.dead:
            self._gone(machine, "ended")

    def _dies(self, machine: Machine, where: str) -> None:
        self._gone(machine, f"dies before: {where}")

    def _gone(self, machine: Machine, why: str) -> None:
        """No process runs on this machine any more; in a while another will."""
        process = machine.process
        if process is None:
            return
        self._note(f"{machine.name}: {why}")
        if machine.name == COORDINATOR:
            self.watch.disturb()
            round_id = 0 if self._phase == BETWEEN else max(self.watch.calls, default=0)
            point = {"dies": "nothing", "ended": "being stopped"}.get(
                why, why.removeprefix("dies before: disk: ").removeprefix("dies before: ")
            )
            self.interrupted.append(Interrupted(self._phase, point, round_id))
        elif self._phase == "collect":
            round_id = max(self.watch.calls, default=0)
            if (machine.name, round_id) in self.watch.announced:
                self.cut_short.append(CutShort(machine.name, round_id))
        machine.process = None
        process.die()
        self._ghosts.append(process)
        if machine.power:
            machine.disk.power_cut()
            if machine.database is not None:
                machine.database.power_cut()
        client = self.network.clients.get(machine.name)
        if client is not None:
            # The operating system ends a process's connections, once what it had sent is through;
            # a machine's end nobody tells of.
            wait_s = 1.5 if machine.power else process.random.choice((0.0, 0.05, 0.3))
            self._later(wait_s, lambda: client.cut("connection lost", will=True))
        machine.power = False
        self._later(machine.back_s, lambda: self.boot(machine.name))
        machine.back_s = RESTART_S

    def _later(self, delay_s: float, callback: Callable[[], None]) -> None:
        """By nobody, whoever runs at this moment."""
        self.loop.call_later(delay_s, callback, context=self._nobody)

    async def _serve(self, machine: Machine, process: Process) -> None:
        """As `covey-device run`."""
        name = DeviceId(machine.name)
        memory = MemoryFile(machine.disk.directory / "state")
        kept = memory.load()
        self.watch.load(name, kept)

        def witness(round_id: int, ring: np.ndarray) -> None:
            self.watch.encoded(name, round_id, ring)

        session = Session(
            self.trust,
            machine.identity,
            machine.certificate,
            name,
            Policy(max_revisions=10_000),
            kept,
            process.bytes,
            witness,
            clock=lambda: self._unix(machine),
            unfinished=memory.unfinished(self.trust, machine.identity.public, name),
        )
        cache = None
        if self.cache_bytes:
            cache = BlobCache(machine.disk.directory / "state" / "cache", self.cache_bytes)
            cache.tidy()
        machine.service = service = _Device(
            self,
            process,
            session,
            machine.identity,
            FLEET,
            Client(self.network, process, Will(TOPICS.presence(name), OFFLINE)),
            memory,
            lambda header, graph: _Trainer(machine, process),
            limits=LIMITS,
            rng=process.bytes,
            pool="protocol",
            train_pool="training",
            audit=Audit(
                AuditLog(machine.disk.directory / "state", clock=lambda: self._unix(machine)),
                steady=lambda: self.loop.now,
            ),
            cache=cache,
        )
        assert machine.stopping is not None
        await service.run(machine.stopping)

    async def _coordinate(self, machine: Machine, process: Process) -> None:
        """As `covey up`, with one run that does not end."""
        directory = machine.disk.directory
        registry = Registry(
            {DeviceId(name): self.machines[name].identity.public for name in self.devices}
        )
        born = self.loop.now
        machine.store = Store.open(directory / store.FILE)
        run_directory = RunDirectory(directory / RUN, machine.store)
        self.watch.run = run_directory
        machine.service = service = CoordinatorService(
            self.trust,
            machine.identity,
            Client(self.network, process, None),
            machine.store,
            registry=registry,
            rng=process.bytes,
            clock=lambda: self.loop.now - born,
            unix=lambda: self._unix(machine),
            observer=self._observe,
        )
        await service.start()
        assert machine.stopping is not None
        stopping = asyncio.create_task(machine.stopping.wait())
        try:
            run = await asyncio.to_thread(
                _Run, RunDirectory(directory / "run", machine.store), self.config, bundle()
            )
            playing = asyncio.create_task(service.play(run, on_sum=self._sum))
            await asyncio.wait({playing, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if not playing.done():
                playing.cancel()
                await asyncio.wait({playing})
            elif (error := playing.exception()) is not None:
                self.watch.broken.append(f"the run fails: {error!r}")
        finally:
            await service.close()

    def _unix(self, machine: Machine) -> float:
        return NOW_UNIX + self.loop.now + machine.ahead_s

    def _observe(self, event: Moved | RoundOutcome | Progress) -> None:
        process = RUNNING.get()
        if process is None or process.dead:
            return
        if isinstance(event, Moved):
            phase = event.phase.value
            self._note(f"{COORDINATOR}: phase {phase}: {event.detail}")
            self._phase = phase
            self._entered[phase] += 1
            for fault in self._at_phase.get((phase, self._entered[phase]), ()):
                self._later(fault.at_s, partial(self._begin, fault))
        elif isinstance(event, RoundOutcome):
            end = "completed" if event.completed else f"abandoned: {event.reason}"
            self._note(f"{COORDINATOR}: round {event.round_id} is over: {end}")
            self._phase = BETWEEN
            self._outcome(event)

    def _sum(self, round_id: int, completed: Completed) -> None:
        process = RUNNING.get()
        if process is not None and not process.dead:
            self._note(f"{COORDINATOR}: round {round_id} has a sum of {len(completed.survivors)}")
            self.watch.sum(round_id, completed)

    # -- faults -----------------------------------------------------------------------------------

    def _begin(self, fault: faults.Fault) -> None:
        if self.calm_since is None:
            self._note(f"FAULT {fault.what}")
            fault.begin(self)
            if fault.end is not None:
                self._later(fault.for_s, partial(self._end, fault))

    def _end(self, fault: faults.Fault) -> None:
        if fault.end is not None and self.calm_since is None:
            self._note(f"no more: {fault.what}")
            fault.end(self)

    def weather(self, **changes: float) -> None:
        for name, value in changes.items():
            setattr(self.network.weather, name, value)

    def cut(self, names: list[str], *, up: bool, down: bool) -> None:
        for name in names:
            self.network.cut_off(name, up=up, down=down)

    def mend(self, names: list[str]) -> None:
        for name in names:
            self.network.mend(name)

    def slow_link(self, name: str, seconds: float) -> None:
        self.network.link(name).slow_s = seconds

    def slow(self, name: str, factor: float) -> None:
        self.machines[name].slowness = factor

    def kill(self, name: str, after: int, kind: str, back_s: float, *, power: bool) -> None:
        machine = self.machines[name]
        machine.power, machine.back_s = power, back_s
        if machine.process is None:
            return
        if after == 0:
            self._gone(machine, "dies")
        else:
            machine.process.die_after(after, kind)

    def stop(self, name: str, back_s: float) -> None:
        machine = self.machines[name]
        machine.back_s = back_s
        if machine.process is not None and machine.stopping is not None:
            machine.stopping.set()

    def broker(self, *, running: bool, forget: bool = False) -> None:
        if running:
            self.network.running = True
        elif self.network.running:
            self.network.stop(forget=forget)

    def disk(self, name: str, *, full: bool) -> None:
        self.machines[name].disk.full = full
        if name == COORDINATOR:
            self.watch.disturb()

    def clock(self, name: str, seconds: float) -> None:
        self.machines[name].ahead_s += seconds

    def spoil_training(self, name: str, probability: float) -> None:
        self.machines[name].spoiled = probability


def _about(topic: str, payload: bytes) -> str:
    """A message for the trace."""
    if not topic.startswith("covey/"):
        return topic
    if not payload:
        return f"nothing on {topic}"
    kind = topic.split("/")[2]
    if kind == "presence":
        return payload.decode()
    if kind in ("blob", "up"):
        with contextlib.suppress(RemoteProtocolError):
            chunk = chunks.decode_frame(payload)
            return f"chunk {chunk.index} of {kind} {chunk.digest.hex()[:8]}"
    message = wire.decode(payload).message
    number = getattr(message, "round", None) or getattr(
        getattr(message, "head", None), "round", None
    )
    about = f" of round {number}" if number else ""
    return f"{message.LABEL}{about}" + (f" to {topic.split('/')[3]}" if kind == "to" else "")


class _Log(logging.Handler):
    def __init__(self, world: World) -> None:
        super().__init__()
        self._world = world

    def emit(self, record: logging.LogRecord) -> None:
        self._world.logged(record)


@contextlib.contextmanager
def _logging(world: World, *, traced: bool) -> Iterator[None]:
    handler, before = _Log(world), (log.level, log.propagate)
    log.addHandler(handler)
    log.setLevel(logging.INFO if traced else logging.WARNING)
    log.propagate = False
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.level, log.propagate = before
        log.setLevel(before[0])


def _ephemeral() -> bytes:
    process = RUNNING.get()
    assert process is not None
    return process.bytes(32)


def _disk_of(world: World, process: Process) -> Disk:
    return world.machines[process.name].disk


def quick_place() -> Path | None:
    """Where files cost least; None: where temporary ones go."""
    memory = Path("/dev/shm")
    return memory if memory.is_dir() else None


def play(
    seed: int,
    *,
    kinds: tuple[str, ...] | None = None,
    planned: Callable[[list[str]], list[faults.Fault]] | None = None,
    traced: bool = False,
    place: Path | None = None,
) -> Verdict:
    """Play one seed. The same seed and kinds give the same trace, whatever the machine. planned: see
    `World`. place: for its files, which are removed."""
    directory = Path(tempfile.mkdtemp(prefix="covey-simulation-", dir=place or quick_place()))
    try:
        with (
            quick_crypto(_ephemeral),
            mock.patch.object(chunks, "CHUNK_BYTES", CHUNK_BYTES),
            mock.patch.object(pace, "SMALL", CROWD),
            mock.patch.object(shutil, "disk_usage", return_value=SimpleNamespace(free=10**12)),
            warnings.catch_warnings(),
        ):
            # What a process that dies was about to do is never done.
            warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
            world = World(seed, directory, kinds=kinds, planned=planned, traced=traced)
            with (
                disk.installed(lambda process: _disk_of(world, process)),
                database.installed(lambda process: world.machines[process.name].database),
                _logging(world, traced=traced),
            ):
                world.play()
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    return Verdict(
        seed=seed,
        kinds=world.kinds,
        broken=tuple(line.replace(f"{directory}/", "") for line in world.watch.broken),
        trace=tuple(world.trace),
        rounds=len(world.watch.calls),
        completed=len(world.completed),
        seconds=world.loop.now,
        transcripts=len(world.watch.proven),
        interrupted=tuple(world.interrupted),
        cut_short=tuple(world.cut_short),
    )
