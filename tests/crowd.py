"""Hundreds of devices in a few processes, over a real broker: the real services, made-up training.

`Crowd` starts the processes and watches them; each says when one of its devices has a connection. A device
here is everything but its disk: transport, session, keys, the fetching of plan and model.
"""

import asyncio
import contextlib
import hashlib
import json
import os
import resource
import ssl
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

import memory_fleet
from covey_coordinator.broker import (
    Access,
    RunningBroker,
    start_broker,
    start_networked_broker,
)
from covey_coordinator.config import (
    CohortConfig,
    DeadlinesConfig,
    PaceConfig,
    RunConfig,
    WorkConfig,
)
from covey_coordinator.round import Moved
from covey_coordinator.run import RoundOutcome
from covey_device.policy import Policy
from covey_device.service import DeviceService
from covey_device.session import Memory, Session
from covey_device.trainer import TrainResult
from covey_shared import keys, wire
from covey_shared.messages import Certificate, DeviceId
from covey_shared.mqtt import MqttTransport
from covey_shared.secagg.cohort import Trust
from covey_shared.topics import OFFLINE, Topics
from covey_shared.transport import Will
from networked import FLEET, Gate

COORDINATOR = "coordinator"
HASTE = 1e6
"""devices_per_s and mb_per_s of a coordinator that steers nothing."""


class Job(msgspec.Struct):
    """What one process is to do. tls: the folder of the certificates; none for passwords."""

    url: str
    password: str
    tls: str | None
    ca_secret: bytes
    coordinator: bytes
    names: list[str]
    train_s: float


# -- one of the processes -------------------------------------------------------------------------


class _Trainer:
    def __init__(self, device: str, seconds: float) -> None:
        self._device, self._seconds = device, seconds

    def refresh(self) -> None:
        """Its data do not grow."""

    def train(
        self, parameters: np.ndarray, work: Any, *, clock: Any, rng: Any, stop: Any, gate: Any
    ) -> Any:
        time.sleep(self._seconds)
        seed = hashlib.sha256(self._device.encode() + parameters.tobytes()).digest()
        stream = np.random.default_rng(int.from_bytes(seed[:8], "big"))
        delta = stream.normal(0, 0.1, len(parameters)).astype(np.float32)
        return TrainResult(delta, 10, 1, 0.5, "batches", self._seconds)


class _Reporting(MqttTransport):
    """Says when it has a connection and when it lost it."""

    def __init__(self, name: str, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.name = name

    async def _establish(self, connection: Any) -> Any:
        _say("try", self.name)
        return await super()._establish(connection)

    async def start(self, on_message: Any, on_connected: Any, on_disconnected: Any) -> None:
        async def connected() -> None:
            _say("up", self.name)
            await on_connected()

        def disconnected(reason: str) -> None:
            _say("down", self.name, reason)
            on_disconnected(reason)

        await super().start(on_message, connected, disconnected)


def _say(what: str, name: str, more: str = "") -> None:
    sys.stdout.write(json.dumps([time.monotonic(), what, name, more]) + "\n")
    sys.stdout.flush()


async def _serve(job: Job) -> None:
    ca = keys.SigningKey(job.ca_secret)
    trust = Trust(FLEET, ca.public, job.coordinator)
    topics = Topics(FLEET)
    pool, training = ThreadPoolExecutor(1), ThreadPoolExecutor(16)
    limits = memory_fleet.LIMITS
    services = []
    now = int(time.time())
    for name in job.names:
        device, identity = DeviceId(name), keys.SigningKey(os.urandom(32))
        certificate = Certificate(FLEET, device, identity.public, now, now + 86_400)
        envelope = wire.sign(certificate, ca).envelope
        session = Session(trust, identity, envelope, device, Policy(), Memory(), os.urandom)
        transport = _Reporting(
            name,
            job.url,
            name,
            username=None if job.tls else COORDINATOR,
            password=None if job.tls else job.password,
            tls=_context(Path(job.tls), name) if job.tls else None,
            will=Will(topics.presence(device), OFFLINE),
            session_s=300.0,
        )
        services.append(
            DeviceService(
                session,
                identity,
                FLEET,
                transport,
                None,
                lambda header, graph, name=name: _Trainer(name, job.train_s),  # type: ignore[misc]
                limits=limits,
                rng=os.urandom,
                pool=pool,
                train_pool=training,
            )
        )
    # A few at a time: it is not the start that is looked at.
    for service in services:
        await service.start()
        await asyncio.sleep(0.01)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    await asyncio.gather(*(service.close(graceful=False) for service in services))


def _context(directory: Path, name: str) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(directory / "authority.pem"))
    context.load_cert_chain(directory / f"{name}.crt", directory / f"{name}.key")
    return context


def main() -> None:
    """One process of a crowd: its job comes on the first line of standard input."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(most, 65_536), most))
    asyncio.run(_serve(msgspec.json.decode(sys.stdin.readline(), type=Job)))


# -- all of it ------------------------------------------------------------------------------------


@dataclass
class Crowd:
    """A broker, a coordinator, and n devices in `processes` processes. ``async with`` has them all there.

    ups, downs: when which device had a connection or lost it, in seconds of the monotonic clock. tries: when
    one began to connect.
    """

    directory: Path
    n: int
    processes: int = 2
    tls: bool = False
    train_s: float = 0.3
    ups: list[tuple[float, str]] = field(default_factory=list)
    downs: list[tuple[float, str, str]] = field(default_factory=list)
    tries: list[float] = field(default_factory=list)
    connected: set[str] = field(default_factory=set)

    async def __aenter__(self) -> "Crowd":
        self.directory.mkdir(exist_ok=True)
        self.password = os.urandom(12).hex()
        self.names = [f"pi-{i:03d}" for i in range(self.n)]
        if self.tls:
            self.gate = await asyncio.to_thread(self._gate)
        self.broker = await self._start_broker(0)
        self.fleet = memory_fleet.Fleet(
            self.directory / "fleet",
            0,
            network=self,  # type: ignore[arg-type]
            name=FLEET,
        )
        await self.fleet.coordinator.start()
        self._children = [await self._spawn(i) for i in range(self.processes)]
        await self.all_back(120)
        return self

    async def __aexit__(self, *_: object) -> None:
        for child, reader in self._children:
            child.stdin.close()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(20):
                    await child.wait()
            if child.returncode is None:
                child.kill()
            await reader
        await self.fleet.coordinator.close()
        self.fleet.coordinator.store.close()
        await self.broker.stop()

    def _gate(self) -> Gate:
        gate = Gate(self.directory)
        for name in (COORDINATOR, *self.names):
            pair = gate.pair(name)
            (self.directory / f"{name}.crt").write_bytes(pair.certificate)
            (self.directory / f"{name}.key").write_bytes(pair.key)
        return gate

    async def _start_broker(self, port: int) -> RunningBroker:
        place = self.directory / "broker"
        if self.tls:
            access: Access = self.gate.access()
            return await start_networked_broker(place, access, host="127.0.0.1", port=port)
        users = {COORDINATOR: self.password}
        return await start_broker("mosquitto", place, users=users, port=port)

    # what stands where a fleet has its network

    @property
    def log(self) -> list[str]:
        return []

    def client(self, name: str, will: Will | None = None) -> MqttTransport:
        """The coordinator's."""
        return MqttTransport(
            self.broker.url,
            COORDINATOR,
            username=None if self.tls else COORDINATOR,
            password=None if self.tls else self.password,
            tls=_context(self.directory, COORDINATOR) if self.tls else None,
            will=will,
        )

    async def _spawn(self, index: int) -> Any:
        job = Job(
            url=self.broker.url,
            password=self.password,
            tls=str(self.directory) if self.tls else None,
            ca_secret=self.fleet._ca.seed,
            coordinator=self.fleet.key.public,
            names=self.names[index :: self.processes],
            train_s=self.train_s,
        )
        child = await asyncio.create_subprocess_exec(
            sys.executable, __file__, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=(self.directory / f"crowd-{index}.log").open("wb"), limit=1 << 20,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        )  # fmt: skip
        assert child.stdin is not None
        child.stdin.write(msgspec.json.encode(job) + b"\n")
        await child.stdin.drain()
        return child, asyncio.create_task(self._listen(child))

    async def _listen(self, child: asyncio.subprocess.Process) -> None:
        assert child.stdout is not None
        while line := await child.stdout.readline():
            at, what, name, more = json.loads(line)
            if what == "up":
                self.ups.append((at, name))
                self.connected.add(name)
            elif what == "try":
                self.tries.append(at)
            else:
                self.downs.append((at, name, more))
                self.connected.discard(name)

    async def all_back(self, timeout_s: float) -> None:
        """Every device has a connection, and the coordinator knows."""
        registry, deadline = self.fleet.coordinator.registry, time.monotonic() + timeout_s
        while not (len(self.connected) == self.n == len(registry.present)):
            assert time.monotonic() < deadline, (
                f"{len(self.connected)} of {self.n} connected, {len(registry.present)} present; "
                f"lacking: {sorted(set(self.names) - registry.present)[:5]}"
            )
            await asyncio.sleep(0.02)

    async def break_broker(self, away_s: float) -> float:
        """Kill it, with all it has in memory and on the disk, and start it again -> when that was."""
        await self.broker.kill()
        for path in self.broker.directory.glob("mosquitto.db*"):
            path.unlink()
        port = self.broker.port
        await asyncio.sleep(away_s)
        started = time.monotonic()
        self.broker = await self._start_broker(port)
        return started

    def back_after(self, moment: float) -> list[float]:
        """When each device was back for the first time after a moment, in order."""
        first: dict[str, float] = {}
        for at, name in self.ups:
            if at >= moment:
                first.setdefault(name, at)
        return sorted(first.values())

    # rounds

    def settings(self, cohort: int, *, paced: bool, **deadlines: float) -> RunConfig:
        """One round."""
        times = {"gather_s": 40.0, "share_s": 40.0, "collect_s": 60.0, "unmask_s": 40.0}
        return RunConfig(
            plan=str(memory_fleet.PLAN),
            rounds=1,
            cohort=CohortConfig(goal=cohort, minimum=3),
            work=WorkConfig(batches=1, batch_size=1, seconds=30.0),
            deadlines=DeadlinesConfig(**(times | {"resend_s": 2.0} | deadlines)),
            pace=PaceConfig() if paced else PaceConfig(devices_per_s=HASTE, mb_per_s=HASTE),
        )

    async def round(self, settings: RunConfig, name: str) -> RoundOutcome:
        """Play it."""
        await self.fleet.coordinator.play(self.fleet.run(settings, name))
        return self.fleet.outcomes[-1]

    async def phase(self, name: str) -> None:
        """Wait until the round enters a phase."""
        seen = len(self.fleet.events)
        while not any(
            isinstance(e, Moved) and e.phase.value == name for e in self.fleet.events[seen:]
        ):
            await asyncio.sleep(0.01)


def fastest(moments: list[float], window_s: float = 1.0) -> int:
    """Most of them within any window."""
    most, first = 0, 0
    for last, moment in enumerate(moments):
        while moment - moments[first] >= window_s:
            first += 1
        most = max(most, last - first + 1)
    return most


if __name__ == "__main__":
    main()
