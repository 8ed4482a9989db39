"""`covey up`: the broker, the coordinator, and the runs that are queued in the fleet's directory.

`covey run` and this process talk through the directory alone: a run is queued by making its
directory and followed by reading it, so either may be restarted at any moment. A run that was
running goes on from its last completed round.
"""

import asyncio
import contextlib
import fcntl
import logging
import os
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import msgspec
import numpy as np

from covey_coordinator.broker import start_broker
from covey_coordinator.config import EvaluationConfig, FleetConfig, RunConfig, load, load_fleet
from covey_coordinator.files import write_atomic
from covey_coordinator.fleet import COORDINATOR_USER, DEVICE_USER, FleetDirectory, read_line
from covey_coordinator.follow import describe
from covey_coordinator.plans.bundle import load_bundle
from covey_coordinator.registry import Registry
from covey_coordinator.run import HeldOut, RoundOutcome, Run
from covey_coordinator.service import CoordinatorService, Observer
from covey_coordinator.store import Progress, RoundCounter, RunDirectory
from covey_shared.errors import ConfigError, CoveyError, DataError
from covey_shared.messages import DeviceId
from covey_shared.mqtt import MqttTransport

log = logging.getLogger("covey.coordinator")

POLL_S = 0.5
SHOW_S = 0.3


class Status(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """status.json: what `covey status` reads. pid: of the process that wrote it."""

    pid: int
    broker: str
    connected: bool
    present: list[str]
    faults: dict[str, int]


@contextlib.contextmanager
def only_one(path: Path) -> Iterator[None]:
    """Hold the fleet's lock. Raises ConfigError if another `covey up` has it."""
    with (path / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(f"another `covey up` runs in {path}; stop it first") from None
        yield


@contextlib.asynccontextmanager
async def broker_of(
    fleet: FleetDirectory, config: FleetConfig
) -> AsyncIterator[tuple[str, str, str]]:
    """(url, password, description) of the fleet's broker, started here unless it is external."""
    broker = config.broker
    if broker.kind == "external":
        password = (
            read_line(fleet.path / broker.password_file)
            if broker.password_file
            else fleet.password(COORDINATOR_USER)
        )
        yield fleet.broker_url(config), password, f"external, {broker.url}"
        return
    users = {user: fleet.password(user) for user in (COORDINATOR_USER, DEVICE_USER)}
    directory = fleet.path / "broker" / "run"
    async with await start_broker(broker.kind, directory, users=users, port=broker.port) as running:
        yield (
            running.url,
            users[COORDINATOR_USER],
            f"{running.kind} {running.version}, {running.url}",
        )


def known_devices(fleet: FleetDirectory) -> Registry:
    """A registry that pins the identity keys of the devices added here."""
    return Registry({DeviceId(entry.name): entry.identity for entry in fleet.devices()})


def load_run(directory: RunDirectory) -> tuple[RunConfig, Run]:
    """A queued run, ready to play. Raises CoveyError that names the file."""
    path = directory.path / "run.toml"
    config = load(path, RunConfig, hint="`covey run` makes one")
    bundle = load_bundle(directory.path / config.plan)
    held_out = (
        load_held_out(directory.path / config.evaluation.file, config.evaluation)
        if config.evaluation is not None
        else None
    )
    return config, Run(directory, config, bundle, held_out=held_out)


def load_held_out(path: Path, evaluation: EvaluationConfig) -> HeldOut:
    """An evaluation set. Raises DataError that names the file and the array."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            for name in (evaluation.features, evaluation.labels):
                if name not in archive:
                    raise DataError(f"{path} has no array {name!r}; it has {sorted(archive)}")
            return HeldOut(archive[evaluation.features], archive[evaluation.labels])
    except (OSError, ValueError) as error:
        raise DataError(f"evaluation set {path} cannot be read: {error}") from error


class Daemon:
    """One `covey up`. say: prints a line for the operator."""

    def __init__(self, fleet: FleetDirectory, say: Callable[[str], None]) -> None:
        self._fleet = fleet
        self._config = load_fleet(fleet.path)
        self._say = say
        self._current: RunDirectory | None = None
        self._shown_at = 0.0

    async def serve(self, stop: asyncio.Event) -> None:
        """Run until `stop`. Raises CoveyError if it cannot even start."""
        fleet, config = self._fleet, self._config
        with only_one(fleet.path):
            registry = known_devices(fleet)
            async with broker_of(fleet, config) as (url, password, description):
                transport = MqttTransport(
                    url, f"covey-{config.fleet}", username=config.broker.username, password=password
                )
                service = CoordinatorService(
                    fleet.trust,
                    fleet.coordinator_key(),
                    transport,
                    RoundCounter(fleet.path / "rounds"),
                    registry=registry,
                    observer=self._observer(),
                )
                await service.start()
                self._say(f"fleet {config.fleet}: broker {description}")
                self._say("waiting for devices and runs; Ctrl-C stops")
                reporter = asyncio.create_task(self._report(service, description))
                try:
                    await self._play_all(service, stop)
                finally:
                    reporter.cancel()
                    await service.close()
                    with contextlib.suppress(OSError):
                        (fleet.path / "status.json").unlink()

    async def _play_all(self, service: CoordinatorService, stop: asyncio.Event) -> None:
        while not stop.is_set():
            directory = self._next_run()
            if directory is None:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(POLL_S):
                        await stop.wait()
                continue
            service.registry.identities = known_devices(self._fleet).identities
            try:
                _, run = load_run(directory)
            except CoveyError as error:
                self._fail(directory, str(error))
                continue
            self._current = directory
            self._say(f"run {directory.name}: {run.rounds_left} rounds to go")
            playing = asyncio.create_task(service.play(run, stop=stop))
            stopping = asyncio.create_task(stop.wait())
            await asyncio.wait({playing, stopping}, return_when=asyncio.FIRST_COMPLETED)
            stopping.cancel()
            if not playing.done():
                playing.cancel()  # the open round is lost; the run goes on at the next start
                with contextlib.suppress(asyncio.CancelledError):
                    await playing
                return
            try:
                state = playing.result()
                self._say(
                    f"run {directory.name} {state.status}: {state.rounds_completed} rounds "
                    f"completed, {state.rounds_abandoned} abandoned"
                )
            except CoveyError as error:
                self._fail(directory, str(error))
            self._current = None

    def _next_run(self) -> RunDirectory | None:
        """The oldest run that is queued or was interrupted."""
        waiting = []
        for path in (self._fleet.path / "runs").glob("*/state.json"):
            directory = RunDirectory(path.parent)
            with contextlib.suppress(CoveyError):
                if directory.state().status in ("queued", "running"):
                    waiting.append(((path.parent / "run.toml").stat().st_mtime, directory))
        return min(waiting, key=lambda entry: entry[0])[1] if waiting else None

    def _fail(self, directory: RunDirectory, reason: str) -> None:
        self._say(f"run {directory.name} failed: {reason}")
        state = directory.state()
        state.status, state.message = "failed", reason
        directory.save_state(state)

    def _observer(self) -> Observer:
        def observe(event: object) -> None:
            if isinstance(event, RoundOutcome) and self._current is not None:
                lines = self._current.read_metrics()
                self._say(f"run {self._current.name}: {describe(lines[-1])}")
            if isinstance(event, Progress):
                now = asyncio.get_running_loop().time()
                if self._current is not None and now - self._shown_at >= SHOW_S:
                    self._shown_at = now
                    with contextlib.suppress(CoveyError):
                        self._current.show(event)

        return observe

    async def _report(self, service: CoordinatorService, broker: str) -> None:
        while True:
            status = Status(
                pid=os.getpid(),
                broker=broker,
                connected=service.transport_up,
                present=sorted(service.registry.present),
                faults={str(name): n for name, n in service.registry.faults.items()},
            )
            with contextlib.suppress(CoveyError):
                write_atomic(
                    self._fleet.path / "status.json", msgspec.json.encode(status), durable=False
                )
            await asyncio.sleep(1)
