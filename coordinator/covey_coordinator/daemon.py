"""`covey up`: the broker, the coordinator, and the runs that are queued in the fleet's directory.

`covey run` and this process talk through the database alone, so either may be restarted at any moment. A
run that was running goes on where it stood.
"""

import asyncio
import contextlib
import logging
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from covey_coordinator import status
from covey_coordinator.config import (
    EvaluationConfig,
    RunConfig,
    check_run,
    load,
    load_fleet,
)
from covey_coordinator.enrolment import enrolment_of
from covey_coordinator.fleet import FleetDirectory
from covey_coordinator.follow import describe, ending
from covey_coordinator.kept_broker import broker_of
from covey_coordinator.operating import locked
from covey_coordinator.phases import Moved, decode_spec
from covey_coordinator.plans.bundle import load_bundle
from covey_coordinator.plans.signing import read_signatures
from covey_coordinator.registry import Registry
from covey_coordinator.round import Publish
from covey_coordinator.run import HeldOut, RoundOutcome, Run, on_offer
from covey_coordinator.service import CoordinatorService, Observer
from covey_coordinator.sightings import Sightings
from covey_coordinator.statements import abandonment
from covey_coordinator.store import FILE, Progress, RunDirectory, RunRecord, RunState, Store, Wish
from covey_coordinator.store.takeover import catch_up
from covey_shared import wire
from covey_shared.errors import ConfigError, CoveyError, DataError, StorageError
from covey_shared.messages import DeviceId
from covey_shared.mqtt import MqttTransport
from covey_shared.notify import Notifier

log = logging.getLogger("covey.coordinator")

POLL_S = 0.5
SHOW_S = 0.3
LOCK_S = 1.0
RETRY_STORAGE_S = 5.0

BEATS = 4
"""In the watchdog's time: one that comes late on a busy machine is no reason for a restart."""

SAVE_SIGHTINGS_S = 10.0
"""How much of who came and went a crash may cost."""


ASKED: dict[Wish, str] = {
    "": "to go on after all",
    "pause": "to be paused when its open round is over",
    "pause now": "to be paused; its open round is abandoned",
    "abort": "to be aborted; its open round is abandoned",
}


@contextlib.contextmanager
def only_one(path: Path) -> Iterator[None]:
    """Hold the fleet's lock. Raises ConfigError if another `covey up` has it, StorageError."""
    deadline = time.monotonic() + LOCK_S  # commands such as `covey pause` hold it for a moment
    while True:
        with locked(path) as alone:
            if alone:
                yield
                return
        if time.monotonic() > deadline:
            raise ConfigError(f"another `covey up` runs in {path}; stop it first")
        time.sleep(0.05)


def known_devices(fleet: FleetDirectory) -> Registry:
    """A registry that pins the identity keys of the devices known here, and refuses revoked ones; in
    a networked fleet also whoever never joined, should somebody else have the fleet CA's key."""
    identities = {DeviceId(entry.name): entry.identity for entry in fleet.devices()}
    networked = load_fleet(fleet.path).networked
    return Registry(identities, fleet.revoked_identities(), closed=networked)


def load_run(directory: RunDirectory) -> tuple[RunConfig, Run]:
    """A queued run, ready to play. Raises CoveyError that names the file."""
    path = directory.path / "run.toml"
    config = load(path, RunConfig, hint="`covey run` makes one")
    check_run(config, file=str(path))
    bundle = load_bundle(directory.path / config.plan)
    # Those that were there when the run was queued, and were told to be in order.
    signatures = read_signatures(directory.signatures, bundle.hash)
    bundle = replace(bundle, signatures=signatures)
    held_out = (
        load_held_out(directory.path / config.evaluation.file, config.evaluation)
        if config.evaluation is not None
        else None
    )
    return config, Run(directory, config, bundle, held_out=held_out)


def last_model(fleet: FleetDirectory, store: Store) -> list[bytes]:
    """What devices fetch of the model that the fleet's last completed round led to; nothing if there is
    none. Raises CoveyError."""
    ended = [
        (int((state.last or {}).get("round", 0)), name, state)
        for name, state in store.runs()
        if state.model
    ]
    if not ended:
        return []
    _, name, state = max(ended, key=lambda entry: entry[:2])
    directory = RunDirectory(fleet.path / "runs" / name, store)
    path = directory.path / "run.toml"
    config = load(path, RunConfig, hint="`covey run` makes one")
    bundle = load_bundle(directory.path / config.plan)
    parameters = directory.parameters(state, bundle.header.n_params)
    return [] if parameters is None else on_offer(bundle, parameters)


def load_held_out(path: Path, evaluation: EvaluationConfig) -> HeldOut:
    """An evaluation set. Raises DataError that names the file and the array."""
    try:
        archive = np.load(path, allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise DataError(f"evaluation set {path} is no .npz archive; make one with numpy.savez")
        with archive:
            for name in (evaluation.features, evaluation.labels):
                if name not in archive:
                    raise DataError(
                        f"evaluation set {path} has no array {name!r}; it has {sorted(archive)}: "
                        "name its arrays in [evaluation]"
                    )
            return HeldOut(archive[evaluation.features], archive[evaluation.labels])
    except OSError as error:
        raise DataError(f"evaluation set {path} cannot be read: {error.strerror}") from error
    except (ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(
            f"evaluation set {path} is no .npz archive, or damaged; make one with numpy.savez"
        ) from error


class Daemon:
    """One `covey up`. say: prints a line for the operator. notifier: of whoever supervises it."""

    def __init__(
        self,
        fleet: FleetDirectory,
        say: Callable[[str], None],
        notifier: Notifier | None = None,
    ) -> None:
        self._fleet = fleet
        self._config = load_fleet(fleet.path)
        self._say = say
        self._notifier = notifier or Notifier(None)
        self._current: Run | None = None
        self._shown_at = 0.0
        self._given_up: set[str] = set()

    async def serve(self, stop: asyncio.Event) -> None:
        """Run until `stop`. Raises CoveyError if it cannot even start."""
        fleet, config = self._fleet, self._config
        with only_one(fleet.path), Store.open(fleet.path / FILE) as store:
            if number := catch_up(store, fleet.path):
                self._say(f"the database is older than the runs: numbers go on after {number}")
            registry = known_devices(fleet)
            if config.networked:
                for line in fleet.refresh_tls(config, int(time.time())):
                    self._say(line)
            async with broker_of(fleet, config) as login:
                transport = MqttTransport(
                    login.url,
                    f"covey-{config.fleet}",
                    username=login.username,
                    password=login.password,
                    tls=login.tls,
                )
                service = CoordinatorService(
                    fleet.trust,
                    fleet.coordinator_key(),
                    transport,
                    store,
                    registry=registry,
                    observer=self._observer(),
                )
                await self._offer_last(service)
                await service.start()
                self._say(f"fleet {config.fleet}: broker {login.description}")
                sightings = Sightings(await asyncio.to_thread(store.sightings))
                reporter = asyncio.create_task(self._report(service, login.description, sightings))
                feeder = asyncio.create_task(self._feed(store))
                try:
                    async with enrolment_of(fleet, config, service, self._say):
                        self._notifier.ready()
                        self._say("waiting for devices and runs; Ctrl-C stops")
                        await self._play_all(service, stop)
                finally:
                    self._notifier.stopping()
                    feeder.cancel()
                    reporter.cancel()
                    await service.close()
                    with contextlib.suppress(OSError):
                        (fleet.path / status.FILE).unlink()
                    await self._save(store, sightings)

    async def _play_all(self, service: CoordinatorService, stop: asyncio.Event) -> None:
        while not stop.is_set():
            wait_s = POLL_S
            try:
                await self._drop_round(service)
                directory = await asyncio.to_thread(self._next_run, service.store)
            except StorageError as error:
                log.error("%s; trying again in %g s", error, RETRY_STORAGE_S)
                directory, wait_s = None, RETRY_STORAGE_S
            if directory is None:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(wait_s):
                        await stop.wait()
                continue
            await self._play(service, directory, stop)

    async def _offer_last(self, service: CoordinatorService) -> None:
        """Devices may have yet to fetch the model that the last round led to, whose run may be over."""
        try:
            service.offer(await asyncio.to_thread(last_model, self._fleet, service.store))
        except CoveyError as error:
            log.warning("the model of the last round is not on offer to devices: %s", error)

    async def _drop_round(self, service: CoordinatorService) -> None:
        """Tell devices that a round is over whose run was stopped while no process played it. Raises
        StorageError."""
        opened = await asyncio.to_thread(service.store.opened)
        if opened is None or not service.connected.is_set():
            return
        state = await asyncio.to_thread(service.store.run, opened.run)
        if state.status in ("queued", "running"):
            return
        with contextlib.suppress(CoveyError):
            call, reason = decode_spec(opened.spec).call, f"its run is {state.status}"
            notice = wire.sign(abandonment(call, reason), service.key)
            await service.publish(Publish(notice))
        await asyncio.to_thread(service.store.forget_round)

    async def _play(
        self, service: CoordinatorService, directory: RunDirectory, stop: asyncio.Event
    ) -> None:
        """One run, until it ends or `stop`; whatever goes wrong with it ends it and nothing else."""
        try:
            service.registry.identities = known_devices(self._fleet).identities
        except CoveyError as error:
            self._say(f"devices added since the last run are not pinned: {error}")
        try:
            _, run = await asyncio.to_thread(load_run, directory)
        except CoveyError as error:
            self._fail(directory, str(error))
            return
        self._current = run
        self._say(f"run {directory.name}: {run.rounds_left} rounds to go")
        halting = asyncio.Event()
        playing = asyncio.create_task(service.play(run, stop=halting))
        stopping = asyncio.create_task(stop.wait())
        watching = asyncio.create_task(self._watch(service, directory, playing, halting))
        try:
            await asyncio.wait({playing, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if not playing.done():
                # The open round stays open: it goes on, and the run with it, at the next start.
                playing.cancel()
                await asyncio.wait({playing})
                self._say(f"run {directory.name}: stopped; the next `covey up` goes on with it")
                return
            if playing.cancelled():  # by `_watch`
                await service.stored(run.end)
            state = run.state if playing.cancelled() else playing.result()
            self._say(f"run {directory.name} {ending(state)}")
        except CoveyError as error:
            self._fail(directory, str(error))
        except Exception as error:
            log.exception("run %s cannot go on", directory.name)
            self._fail(directory, f"unexpected {type(error).__name__}: {error}")
        finally:
            stopping.cancel()
            watching.cancel()
            playing.cancel()
            self._current = None

    async def _watch(
        self,
        service: CoordinatorService,
        directory: RunDirectory,
        playing: asyncio.Task[RunState],
        halting: asyncio.Event,
    ) -> None:
        """Do what an operator wishes of the run that is being played."""
        store, said = service.store, ""
        while True:
            await asyncio.sleep(POLL_S)
            try:
                wish = (await asyncio.to_thread(store.record, directory.name)).wish
                opened = await asyncio.to_thread(store.opened) if wish else None
            except CoveyError as error:
                log.error("%s", error)
                continue
            if wish != said and (wish or said):
                self._say(f"run {directory.name}: {ASKED[wish]}")
            said = wish
            if not wish:
                halting.clear()
                continue
            halting.set()
            if wish != "pause":
                service.give_up_round(f"the run was {'aborted' if wish == 'abort' else 'paused'}")
            if opened is None and not service.connected.is_set():
                playing.cancel()  # it waits for the broker, to call a round

    def _next_run(self, store: Store) -> RunDirectory | None:
        """One that was interrupted, or else the oldest that is queued."""
        waiting = [
            (state.status == "queued", name)
            for name, state in store.runs()
            if state.status in ("queued", "running") and name not in self._given_up
        ]
        if not waiting:
            return None
        _, name = min(waiting, key=lambda entry: entry[0])
        return RunDirectory(self._fleet.path / "runs" / name, store)

    def _fail(self, directory: RunDirectory, reason: str) -> None:
        def change(record: RunRecord) -> Wish | None:
            if record.state.status not in ("queued", "running"):
                return None  # an operator was faster
            record.state.status, record.state.message = "failed", reason
            return ""

        try:
            status = directory.store.amend(directory.name, change).state.status
        except CoveyError:
            self._given_up.add(directory.name)  # until the next start, or it would fail for ever
            status = "failed"
        if status == "failed":
            self._say(f"run {directory.name} failed: {reason}")

    def _observer(self) -> Observer:
        def observe(event: object) -> None:
            run = self._current
            if isinstance(event, RoundOutcome) and run is not None and run.state.last is not None:
                self._say(f"run {run.directory.name}: {describe(run.state.last)}")
            if isinstance(event, Moved) and event.resumed and run is not None:
                self._say(f"run {run.directory.name}: its open round goes on ({event.phase.value})")
            if isinstance(event, Progress):
                now = asyncio.get_running_loop().time()
                if run is not None and now - self._shown_at >= SHOW_S:
                    self._shown_at = now
                    with contextlib.suppress(CoveyError):
                        run.directory.show(event)

        return observe

    async def _report(self, service: CoordinatorService, broker: str, sightings: Sightings) -> None:
        saved = time.monotonic()
        while True:
            registry = service.registry
            known = registry.identities.keys()
            sightings.look(registry.present & known, registry.gone & known, time.time())
            if time.monotonic() - saved >= SAVE_SIGHTINGS_S:
                saved = time.monotonic()
                await self._save(service.store, sightings)
            with contextlib.suppress(CoveyError):
                status.write_status(
                    self._fleet.path,
                    broker,
                    service.transport_up,
                    sorted(registry.present),
                    {str(name): n for name, n in registry.faults.items()},
                )
            self._notifier.status(self._standing(service))
            await asyncio.sleep(1)

    def _standing(self, service: CoordinatorService) -> str:
        there = f"{len(service.registry.present)} devices online"
        if not service.transport_up:
            there = "no connection to the broker"
        run = self._current
        if run is None:
            return f"fleet {self._config.fleet}: {there}; no run is played"
        of = run.state.rounds_done + run.rounds_left
        return f"fleet {self._config.fleet}: {there}; run {run.directory.name}, round {run.index} of {of}"

    async def _feed(self, store: Store) -> None:
        """Tell the watchdog, as long as the event loop turns, a thread runs, and the database answers:
        that the disk is full, too, is an answer."""
        if (period_s := self._notifier.watchdog_s) is None:
            return
        while True:
            with contextlib.suppress(StorageError):
                await asyncio.to_thread(store.last_round)
            self._notifier.alive()
            await asyncio.sleep(period_s / BEATS)

    @staticmethod
    async def _save(store: Store, sightings: Sightings) -> None:
        """Best effort: it is for people to read."""
        unsaved = sightings.take()
        if not unsaved:
            return
        try:
            await asyncio.to_thread(store.saw, unsaved)
        except StorageError as error:
            log.warning("%s", error)
            sightings.put_back(unsaved)
