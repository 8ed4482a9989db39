"""A coordinator and its devices on an in-memory network: the real services, made-up training.

``async with Fleet(tmp_path) as fleet: state = await fleet.play()`` is a whole run. Every device's update
is known, so the sum that the coordinator arrives at can be told beforehand: `Fleet.expected`.
"""

import asyncio
import hashlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec
import numpy as np
import pytest

import covey_coordinator.blobs
import covey_coordinator.round_play
import covey_coordinator.service
import covey_device.blobs
from covey_coordinator.config import CohortConfig, DeadlinesConfig, RunConfig, WorkConfig
from covey_coordinator.plans.bundle import PlanBundle, load_bundle
from covey_coordinator.round import Completed, Moved
from covey_coordinator.run import HeldOut, RoundOutcome, Run
from covey_coordinator.service import CoordinatorService
from covey_coordinator.store import FILE, Progress, RunDirectory, RunState, Store
from covey_device.audit import Audit, AuditLog
from covey_device.keystore import MemoryFile
from covey_device.policy import Policy
from covey_device.service import DeviceService
from covey_device.session import Ended, Memory, Session
from covey_device.trainer import TrainResult, Work
from covey_shared import keys, wire
from covey_shared.fixedpoint import to_signed
from covey_shared.messages import Certificate, DeviceId
from covey_shared.secagg.cohort import Trust
from covey_shared.topics import OFFLINE, Topics
from covey_shared.transport import Will
from memory_transport import MemoryTransport, Network

PLAN = Path(__file__).parents[1] / "deploy" / "covey_fleet" / "plans" / "mlp"
FLEET = "memory"
TOPICS = Topics(FLEET)
LIMITS = Work(batches=100, batch_size=1, max_seconds=60.0, max_resident_bytes=10**12)
SHORT = DeadlinesConfig(
    gather_s=5.0, share_s=5.0, collect_s=10.0, unmask_s=5.0, absent_grace_s=0.2, resend_s=0.3
)


def config(rounds: int = 2, n: int = 4, **changes: Any) -> RunConfig:
    """A run's configuration for n devices that does not wait long."""
    given = {
        "plan": str(PLAN),
        "rounds": rounds,
        "cohort": CohortConfig(goal=n, minimum=3),
        "work": WorkConfig(batches=1, batch_size=1, seconds=30.0),
        "deadlines": SHORT,
    }
    return RunConfig(**(given | changes))


def short(**changes: float) -> DeadlinesConfig:
    """SHORT with changes."""
    return msgspec.structs.replace(SHORT, **changes)


def hasten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is waited for longer than it takes in memory."""
    monkeypatch.setattr(covey_coordinator.round_play, "TICK_S", 0.05)
    monkeypatch.setattr(covey_coordinator.service, "RETRY_STORAGE_S", 0.05)
    monkeypatch.setattr(covey_coordinator.service, "CALL_ANYWAY_S", 0.1)
    monkeypatch.setattr(covey_coordinator.blobs, "GATHER_S", 0.02)
    monkeypatch.setattr(covey_device.blobs, "PATIENCE_S", 0.3)


class FakeTrainer:
    """Gives a made-up update, the same for the same device and model. on_train: runs in the thread."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.rounds = 0
        self.on_train: Callable[[Callable[[], bool]], None] = lambda stop: None
        self.change: Callable[[np.ndarray], np.ndarray] = lambda delta: delta

    def refresh(self) -> None:
        """Its data never grows."""

    def train(
        self, parameters: np.ndarray, work: Work, *, clock: Any, rng: Any, stop: Any, gate: Any
    ) -> TrainResult:
        self.rounds += 1
        self.on_train(stop)
        seed = hashlib.sha256(self.device.encode() + parameters.tobytes()).digest()
        stream = np.random.default_rng(int.from_bytes(seed[:8], "big"))
        delta = stream.normal(0, 0.1, len(parameters)).astype(np.float32)
        examples = int(stream.integers(1, 100))
        return TrainResult(self.change(delta), examples, 1, 0.5, "batches", 0.01)


@dataclass
class Seat:
    """One device: what outlives its process, and the process."""

    name: DeviceId
    identity: keys.SigningKey
    certificate: bytes
    directory: Path
    trainer: FakeTrainer
    service: DeviceService
    transport: MemoryTransport
    ended: list[Ended]
    made: int = 0


class Fleet:
    """Everything in one event loop. Files go below `directory`."""

    def __init__(
        self,
        directory: Path,
        n: int = 4,
        *,
        held_out: HeldOut | None = None,
        network: Network | None = None,
        name: str = FLEET,
    ) -> None:
        self.directory, self.n, self.held_out = directory, n, held_out
        self.topics = Topics(name)
        self.network = network or Network()
        ca, self.key = keys.SigningKey(os.urandom(32)), keys.SigningKey(os.urandom(32))
        self.trust = Trust(name, ca.public, self.key.public)
        self.bundle: PlanBundle = load_bundle(PLAN)
        self.plain: dict[tuple[int, DeviceId], np.ndarray] = {}
        self.sums: dict[int, Completed] = {}
        self.events: list[Moved | RoundOutcome | Progress] = []
        self.on_event: Callable[[Any], None] = lambda event: None
        self.seats: list[Seat] = []
        self._ca = ca
        self.coordinator = self.make_coordinator()

    async def __aenter__(self) -> "Fleet":
        await self.coordinator.start()
        for i in range(self.n):
            await self.add(f"pi-{i}")
        await self.until(lambda: len(self.coordinator.registry.present) == self.n)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for seat in self.seats:
            await seat.service.close()
        await self.coordinator.close()

    # -- parts ------------------------------------------------------------------------------------

    def make_coordinator(self) -> CoordinatorService:
        """A new process, as it were; not started."""
        self.directory.mkdir(parents=True, exist_ok=True)
        self.transport = self.network.client(f"coordinator-{len(self.network.log)}")
        return CoordinatorService(
            self.trust,
            self.key,
            self.transport,
            Store.open(self.directory / FILE),
            observer=self._observe,
        )

    def _observe(self, event: Moved | RoundOutcome | Progress) -> None:
        self.events.append(event)
        self.on_event(event)

    async def add(self, name: str) -> Seat:
        """A new device, started."""
        device, identity = DeviceId(name), keys.SigningKey(os.urandom(32))
        now = int(time.time())
        certificate = Certificate(self.trust.fleet, device, identity.public, now, now + 3600)
        envelope = wire.sign(certificate, self._ca).envelope
        seat = Seat(
            device, identity, envelope, self.directory / name, FakeTrainer(name),
            None, None, [],  # type: ignore[arg-type]
        )  # fmt: skip
        self.seats.append(seat)
        await self.boot(seat)
        return seat

    async def boot(self, seat: Seat, *, policy: Policy | None = None) -> None:
        """(Re)start a device's process: only its directory outlived the last one."""
        memory = MemoryFile(seat.directory)

        def witness(round_id: int, ring: np.ndarray) -> None:
            self.plain[round_id, seat.name] = ring

        def make_trainer(header: Any, graph: bytes) -> Any:
            seat.made += 1
            return seat.trainer

        session = Session(
            self.trust,
            seat.identity,
            seat.certificate,
            seat.name,
            policy or Policy(),
            memory.load(),
            os.urandom,
            witness,
            unfinished=memory.unfinished(self.trust, seat.identity.public, seat.name),
        )
        seat.transport = self.network.client(
            seat.name, Will(self.topics.presence(seat.name), OFFLINE)
        )
        seat.service = DeviceService(
            session,
            seat.identity,
            self.trust.fleet,
            seat.transport,
            memory,
            make_trainer,
            limits=LIMITS,
            rng=os.urandom,
            audit=Audit(AuditLog(seat.directory)),
        )
        seat.service.on_ended = seat.ended.append
        await seat.service.start()

    def memory(self, seat: Seat) -> Memory:
        return MemoryFile(seat.directory).load()

    # -- playing ----------------------------------------------------------------------------------

    def run(self, settings: RunConfig | None = None, name: str = "run") -> Run:
        """The run of that name, made if there is none yet."""
        path, store = self.directory / "runs" / name, self.coordinator.store
        directory = (
            RunDirectory(path, store)
            if store.has_run(name)
            else RunDirectory.create(path, b"", os.urandom(16), store)
        )
        return Run(directory, settings or config(n=self.n), self.bundle, held_out=self.held_out)

    async def play(self, run: Run | None = None, *, timeout_s: float = 60.0) -> RunState:
        """Play a run to its end, and check every sum."""
        async with asyncio.timeout(timeout_s):
            return await self.coordinator.play(run or self.run(), on_sum=self._on_sum)

    def _on_sum(self, round_id: int, completed: Completed) -> None:
        self.sums[round_id] = completed
        bits = completed.encoding.bits
        total = sum(to_signed(self.plain[round_id, name], bits) for name in completed.survivors)
        assert (total == to_signed(completed.ring_sum, bits)).all()

    async def until(self, true: Callable[[], bool], timeout_s: float = 20.0) -> None:
        """Wait for what nobody tells us of."""
        async with asyncio.timeout(timeout_s):
            while not true():
                await asyncio.sleep(0.005)

    async def phase(self, name: str, timeout_s: float = 20.0) -> None:
        """Wait until the open round enters a phase."""
        seen = len(self.events)

        def entered() -> bool:
            news = self.events[seen:]
            return any(isinstance(e, Moved) and e.phase.value == name for e in news)

        await self.until(entered, timeout_s)

    @property
    def outcomes(self) -> list[RoundOutcome]:
        return [event for event in self.events if isinstance(event, RoundOutcome)]


def go(scenario: Any, timeout_s: float = 60.0) -> None:
    """Run a scenario in an event loop of its own; a hang fails the test rather than the run."""
    asyncio.run(asyncio.wait_for(scenario, timeout_s))
