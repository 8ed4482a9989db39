"""A whole fleet on one machine: identities, broker, coordinator and devices.

Everything it writes lies in one private directory, which its owner removes. The broker is started
here, or is one that somebody else runs; then the fleet's name is a fresh one, so that fleets do not
meet there, and what it left retained at the broker is cleared at the end.
"""

import asyncio
import logging
import os
import secrets
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np

from covey_coordinator.broker import RunningBroker, start_broker
from covey_coordinator.registry import Registry
from covey_coordinator.round import Completed, Moved
from covey_coordinator.run import RoundOutcome, Run
from covey_coordinator.service import CoordinatorService
from covey_coordinator.store import Progress, RunState, Store
from covey_device.data import DataConfig, NpzData
from covey_fleet.device import (
    BACKOFF_BASE_S,
    BACKOFF_CAP_S,
    DeviceSpec,
    Traffic,
    client_id,
    try_plan,
)
from covey_fleet.digits import Examples
from covey_fleet.eavesdropper import Eavesdropper
from covey_fleet.faults import FaultPlan, Vanished
from covey_fleet.seats import LocalSeat, ProcessSeat, Seat, start_fork_server
from covey_fleet.witness import Witness
from covey_shared import wire
from covey_shared.errors import LocalProtocolError, TransportError
from covey_shared.keys import SigningKey
from covey_shared.messages import Certificate, DeviceId
from covey_shared.mqtt import BrokerUrl, MqttTransport, parse_broker_url
from covey_shared.secagg.cohort import Trust
from covey_shared.topics import Topics
from covey_shared.transport import Incoming

log = logging.getLogger("covey.fleet")

COORDINATOR = "coordinator"
DEVICE = "device"
CERTIFICATE_S = 86_400
CONNECT_S = 20.0
PRESENT_S = 60.0
QUIET_S = 0.5
"""For what a broker still has to work off."""

BrokerChoice = Literal["auto", "embedded", "mosquitto"] | BrokerUrl
FleetEvent = Moved | RoundOutcome | Progress | Vanished


@dataclass(frozen=True, slots=True)
class FleetSettings:
    """What a fleet is made of. parts: what each device has; as many devices as there are parts.

    dropout: see `FaultPlan`. processes: each device in a process of its own. log_file: where those
    log. faults, data: another plan, and settings of a device's data by its number, for tests.
    """

    parts: Sequence[Examples]
    broker: BrokerChoice = "auto"
    seed: int = 7
    dropout: float = 0.0
    processes: bool = False
    log_file: Path | None = None
    faults: FaultPlan | None = None
    data: dict[int, DataConfig] = field(default_factory=dict)


class Fleet:
    """``async with Fleet(...) as fleet`` starts everything, and ends it. directory: empty, private.

    store: the coordinator's database. observer: told of every phase, outcome and vanished device, on the
    event loop.
    """

    def __init__(
        self,
        directory: Path,
        settings: FleetSettings,
        store: Store,
        observer: Callable[[FleetEvent], None] = lambda event: None,
    ) -> None:
        self.directory = directory
        self.store = store
        self.settings = settings
        self.observer = observer
        self.name = f"demo-{secrets.token_hex(4)}"
        self.topics = Topics(self.name)
        width = len(str(len(settings.parts)))
        self.devices = tuple(
            DeviceId(f"pi-{i:0{width}}") for i in range(1, len(settings.parts) + 1)
        )
        self.faults = settings.faults or FaultPlan(settings.seed, settings.dropout, self.devices)
        self.users = {name: secrets.token_urlsafe(18) for name in (COORDINATOR, DEVICE)}
        self.broker: RunningBroker | None = None
        self.vanished: list[Vanished] = []
        self.sum_mismatches = 0
        self.sums_checked = 0
        self.seats: list[Seat] = []
        self._failure: asyncio.Future[None] | None = None
        self._stack = AsyncExitStack()

    # -- life -------------------------------------------------------------------------------------

    async def __aenter__(self) -> "Fleet":
        try:
            await self._start()
        except BaseException:
            await self._stack.aclose()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._stack.aclose()

    async def _start(self) -> None:
        self._failure = asyncio.get_running_loop().create_future()
        if self.settings.processes:
            start_fork_server()
        await self._start_broker()
        self._make_devices()
        await self._start_coordinator()
        self.ear = Eavesdropper(self.transport("eavesdropper", DEVICE), self.topics)
        await self.ear.start()
        self._stack.push_async_callback(self.ear.stop)
        self._stack.push_async_callback(self._close_seats)
        for seat in self.seats:
            await seat.start()
        await self._until(lambda: self.n_present == len(self.devices), PRESENT_S, "all devices")

    async def _close_seats(self) -> None:
        # All at once: without a broker, each waits a while to say goodbye.
        await asyncio.gather(*(seat.close() for seat in self.seats), return_exceptions=True)

    async def _start_broker(self) -> None:
        choice = self.settings.broker
        if isinstance(choice, BrokerUrl):
            self.url = choice
            await self._check_broker()
            self._stack.push_async_callback(self._clear_presence)
        else:
            self.broker = await start_broker(choice, self.directory / "broker", users=self.users)
            await self._stack.enter_async_context(self.broker)
            self.url = parse_broker_url(self.broker.url)

    @property
    def broker_name(self) -> str:
        """Kind and version, or where it is."""
        return str(self.url) if self.broker is None else f"{self.broker.kind} {self.broker.version}"

    def transport(self, name: str, user: str) -> MqttTransport:
        """A client of the fleet's broker, not started. name: ends its client id."""
        own = self.broker is not None
        return MqttTransport(
            self.url,
            client_id(self.name, name),
            username=user if own else None,
            password=self.users[user] if own else None,
            backoff_base_s=BACKOFF_BASE_S,
            backoff_cap_s=BACKOFF_CAP_S,
        )

    async def _check_broker(self) -> None:
        """Fail at once if the broker is not there. Raises TransportError with its reason."""
        probe, connected = self.transport("probe", COORDINATOR), asyncio.Event()
        reasons: list[str] = []

        async def on_connected() -> None:
            connected.set()

        def on_disconnected(reason: str) -> None:
            reasons.append(reason.rpartition(";")[0] or reason)
            connected.set()

        await probe.start(lambda message: None, on_connected, on_disconnected)
        try:
            async with asyncio.timeout(CONNECT_S):
                await connected.wait()
        except TimeoutError:
            reasons.append(f"broker at {self.url.address} does not answer")
        await probe.stop()
        if reasons:
            raise TransportError(reasons[0])

    async def _clear_presence(self) -> None:
        """Leave nothing at somebody else's broker.

        A broker may acknowledge a device's last word and keep it only after it was cleared: whatever is
        still said of a device is cleared again, until nothing was said for a while.
        """
        transport = self.transport("cleaner", COORDINATOR)
        spoken = asyncio.Event()

        async def nothing() -> None:
            pass

        def heard(message: Incoming) -> None:
            if message.payload:
                spoken.set()

        await transport.start(heard, nothing, lambda reason: None)
        try:
            async with asyncio.timeout(CONNECT_S):
                await transport.subscribe(self.topics.presence("+"))
                while True:
                    spoken.clear()
                    for device in self.devices:
                        await transport.publish(self.topics.presence(device), b"", retain=True)
                    try:
                        async with asyncio.timeout(QUIET_S):
                            await spoken.wait()
                    except TimeoutError:
                        return
        except TimeoutError:
            log.warning("the presence of fleet %s stays at the broker", self.name)
        finally:
            await transport.stop()

    async def _start_coordinator(self) -> None:
        threads = ThreadPoolExecutor(2, thread_name_prefix="coordinator")
        self._stack.callback(threads.shutdown, wait=False, cancel_futures=True)
        self.registry = Registry()
        self.coordinator = CoordinatorService(
            self.trust,
            self._coordinator_key,
            self.transport(COORDINATOR, COORDINATOR),
            self.store,
            registry=self.registry,
            observer=self._observe,
            pool=threads,
        )
        await self.coordinator.start()
        self._stack.push_async_callback(self.coordinator.close)
        await self._until(self.coordinator.connected.is_set, CONNECT_S, "the coordinator")

    def _make_devices(self) -> None:
        """Identities under a fresh fleet CA, data and state, and a seat for each."""
        ca = SigningKey(os.urandom(32))
        self._coordinator_key = SigningKey(os.urandom(32))
        self.trust = Trust(self.name, ca.public, self._coordinator_key.public)
        (self.directory / "witness").mkdir()
        self.witness = Witness(self.directory / "witness")
        now_unix = int(time.time())
        settings, own = self.settings, self.broker is not None
        pool = ThreadPoolExecutor(2, thread_name_prefix="device")
        train_pool = ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="train")
        for threads in (pool, train_pool):
            self._stack.callback(threads.shutdown, wait=False, cancel_futures=True)
        for i, (device, part) in enumerate(zip(self.devices, settings.parts, strict=True)):
            directory = self.directory / device
            directory.mkdir()
            np.savez(directory / "data.npz", features=part.features, labels=part.labels)
            identity = SigningKey(os.urandom(32))
            certificate = Certificate(
                self.name, device, identity.public, now_unix, now_unix + CERTIFICATE_S
            )
            spec = DeviceSpec(
                trust=self.trust,
                device=device,
                identity_seed=identity.seed,
                certificate=wire.sign(certificate, ca).envelope,
                broker=self.url,
                username=DEVICE if own else None,
                password=self.users[DEVICE] if own else None,
                directory=directory,
                data=settings.data.get(i, NpzData(file="data.npz")),
                faults=self.faults,
                witness=self.directory / "witness",
            )
            if settings.processes:
                log_file = settings.log_file or self.directory / "devices.log"
                self.seats.append(ProcessSeat(spec, self._on_vanished, self._fail, log_file))
            else:
                self.seats.append(
                    LocalSeat(spec, self._on_vanished, pool=pool, train_pool=train_pool)
                )

    # -- rounds -----------------------------------------------------------------------------------

    @property
    def n_present(self) -> int:
        """Devices that the coordinator sees online."""
        return len(self.registry.present)

    @property
    def traffic(self) -> Traffic:
        """Bytes of all devices so far."""
        return sum((seat.traffic for seat in self.seats), Traffic())

    async def play(self, run: Run) -> RunState:
        """All rounds of a run; every sum is held against the devices' plaintext. Raises what made
        going on impossible."""
        if self._failure is None:
            raise LocalProtocolError("a fleet is started before it plays")
        # Here, not while the first round gathers: the devices share what is remembered of it.
        bundle = run.bundle
        await asyncio.to_thread(try_plan, self.directory, bundle.header, bundle.graphs["train"])
        playing = asyncio.create_task(self.coordinator.play(run, on_sum=self._on_sum))
        try:
            waited: set[asyncio.Future[Any]] = {playing, self._failure}
            await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
            if self._failure.done():
                self._failure.result()
            return await playing
        finally:
            playing.cancel()
            await asyncio.gather(playing, return_exceptions=True)

    def _on_sum(self, round_id: int, completed: Completed) -> None:
        self.sums_checked += 1
        self.sum_mismatches += self.witness.mismatches(round_id, completed)
        for device in completed.survivors:
            plain = self.witness.encoded(round_id, device)
            if plain is not None:
                self.ear.compare(round_id, device, completed.encoding, plain)

    def _observe(self, event: Moved | RoundOutcome | Progress) -> None:
        self.observer(event)
        if isinstance(event, RoundOutcome):
            self.witness.forget(event.round_id)
            self.ear.round_over()
            for seat in self.seats:
                seat.round_over(event.round_id)

    def _on_vanished(self, vanished: Vanished) -> None:
        self.vanished.append(vanished)
        self.observer(vanished)

    def _fail(self, error: Exception) -> None:
        if self._failure is not None and not self._failure.done():
            self._failure.set_exception(error)

    async def _until(self, true: Callable[[], bool], timeout_s: float, what: str) -> None:
        try:
            async with asyncio.timeout(timeout_s):
                while not true():
                    if self._failure is not None and self._failure.done():
                        self._failure.result()
                    await asyncio.sleep(0.02)
        except TimeoutError:
            raise TransportError(
                f"{what} did not connect to the broker at {self.url.address} within "
                f"{timeout_s:g} s; is this machine overloaded?"
            ) from None
