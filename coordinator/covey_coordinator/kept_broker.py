"""The fleet's broker as `covey up` needs it: started and looked after, or found; and our way in.

In a networked fleet we are a client like any other, with the certificate in `tls/`. What that directory
and `revoked.json` say may change at any moment, by a command or by a renewal: the broker and our own
connections are told within `WATCH_S`.
"""

import asyncio
import contextlib
import logging
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

from covey_coordinator.broker import Access, RunningBroker, start_broker, start_networked_broker
from covey_coordinator.config import FleetConfig
from covey_coordinator.fleet import COORDINATOR_USER, DEVICE_USER, FleetDirectory
from covey_coordinator.fleet_ca import read_line
from covey_shared.config import unreadable
from covey_shared.errors import ConfigError, CoveyError, TransportError

log = logging.getLogger("covey.coordinator")

WATCH_S = 0.5
RETRY_S = 5.0
_TLS_FILES = ("ca.crt", "crl.pem", "server.crt", "server.key", "coordinator.crt", "coordinator.key")


@dataclass(frozen=True, slots=True)
class Login:
    """Where the broker is, and who we are to it. tls: None without TLS, or if the system's authorities
    know the broker. description: for the operator."""

    url: str
    description: str
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    tls: ssl.SSLContext | None = None


@contextlib.asynccontextmanager
async def broker_of(fleet: FleetDirectory, config: FleetConfig) -> AsyncIterator[Login]:
    """The way to the fleet's broker, which is started here unless it is external."""
    tls = await asyncio.to_thread(tls_of, fleet, config)
    if config.broker.kind == "external":
        login = Login(
            fleet.broker_url(config),
            f"external, {config.broker.url}",
            *_external_user(fleet, config),
            tls,
        )
        kept = None
    else:
        kept = KeptBroker(await _start(fleet, config), lambda: _start(fleet, config))
        broker = kept.broker
        login = Login(
            broker.url,
            f"{broker.kind} {broker.version}, {broker.url}",
            None if config.networked else COORDINATOR_USER,
            None if config.networked else fleet.password(COORDINATOR_USER),
            tls,
        )
    tasks = [] if kept is None else [asyncio.create_task(kept.keep())]
    if config.networked:
        tasks.append(asyncio.create_task(_watch(fleet, config, tls, kept)))
    try:
        yield login
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if kept is not None:
            await kept.broker.stop()


def access_of(fleet: FleetDirectory, config: FleetConfig) -> Access:
    """Who gets into a networked fleet's broker, as of now. Raises ConfigError."""
    return Access(
        fleet=config.fleet,
        authority=fleet.tls.read("ca.crt"),
        revocations=fleet.tls.read("crl.pem"),
        certificate=fleet.tls.read("server.crt"),
        key=fleet.tls.read("server.key"),
        connections=config.broker.max_connections,
        revoked=fleet.revoked_names(),
    )


def tls_of(fleet: FleetDirectory, config: FleetConfig) -> ssl.SSLContext | None:
    """Trusts the configured authority and no other, and shows the configured certificate; in a
    networked fleet those in `tls/`, where nothing else is configured. None without TLS, or if nothing
    is configured. Raises ConfigError."""
    authority, certificate, key = _tls_files(fleet, config)
    if authority is None and certificate is None:
        return None
    try:
        context = ssl.create_default_context(cafile=authority)
    except ssl.SSLError as error:
        raise ConfigError(f"broker.ca_file {authority} is no certificate in PEM") from error
    except OSError as error:
        raise unreadable(f"broker.ca_file {authority}", error) from error
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if certificate is not None and key is not None:
        _show(context, certificate, key)
    return context


def _tls_files(
    fleet: FleetDirectory, config: FleetConfig
) -> tuple[Path | None, Path | None, Path | None]:
    """Authority, certificate and key of our connections."""
    broker = config.broker
    chosen = [
        None if name is None else fleet.path / name
        for name in (broker.ca_file, broker.cert_file, broker.key_file)
    ]
    if config.networked:
        ours = ("ca.crt", "coordinator.crt", "coordinator.key")
        chosen = [c or fleet.tls.path / name for c, name in zip(chosen, ours, strict=True)]
    authority, certificate, key = chosen
    return authority, certificate, key


def _show(context: ssl.SSLContext, certificate: Path, key: Path) -> None:
    """Have connections show this certificate from now on. Raises ConfigError."""
    for path in (certificate, key):
        try:
            path.open("rb").close()  # OpenSSL would not say which of them is missing
        except OSError as error:
            raise unreadable(path, error) from error
    if (mode := key.stat().st_mode & 0o777) & 0o077:
        raise ConfigError(f"{key} can be read by others (mode {mode:04o}); run: chmod 600 {key}")
    try:
        # an encrypted key would be asked about on the terminal
        context.load_cert_chain(certificate, key, password=lambda: "")
    except ssl.SSLError as error:
        raise ConfigError(
            f"{certificate} and {key} are no certificate in PEM and its key, without a password"
        ) from error


def _external_user(fleet: FleetDirectory, config: FleetConfig) -> tuple[str | None, str | None]:
    """Name and password at an external broker; where we show a certificate, that is who we are."""
    broker = config.broker
    if broker.password_file is not None:
        return broker.username, read_line(fleet.path / broker.password_file)
    if config.networked or broker.cert_file is not None:
        return None, None
    return broker.username, fleet.password(COORDINATOR_USER)


async def _start(fleet: FleetDirectory, config: FleetConfig) -> RunningBroker:
    directory = fleet.path / "broker" / "run"
    if config.networked:
        access = await asyncio.to_thread(access_of, fleet, config)
        return await start_networked_broker(directory, access, port=config.broker_port)
    users = {user: fleet.password(user) for user in (COORDINATOR_USER, DEVICE_USER)}
    kind = config.broker.kind
    assert kind != "external"  # noqa: S101
    return await start_broker(kind, directory, users=users, port=config.broker_port)


class KeptBroker:
    """A broker that is started again when it ends by itself; clients reconnect on their own."""

    def __init__(
        self, broker: RunningBroker, start: Callable[[], Awaitable[RunningBroker]]
    ) -> None:
        self.broker = broker
        self._start = start

    async def keep(self) -> None:
        """Look after it for ever."""
        while True:
            await asyncio.sleep(WATCH_S)
            if self.broker.running:
                self.broker.trim_log()
                continue
            log.error(
                "the broker ended (exit code %s); starting it again. Its log %s ends with: %s",
                self.broker.process.returncode,
                self.broker.log,
                " | ".join(self.broker.last_log_lines(3)) or "nothing",
            )
            try:
                self.broker = await self._start()
            except CoveyError as error:
                log.error("%s", error)
                await asyncio.sleep(RETRY_S)

    async def admit(self, access: Access) -> None:
        """Let in whom `access` says. Raises ConfigError if it is unusable, StorageError."""
        broker = self.broker
        if not broker.running:
            return  # the next one begins with what is in force then
        try:
            if await broker.admit(access):
                log.info("the broker has taken up who is let in and who is revoked")
        except TransportError as error:
            # It may let in anybody now. A new one begins with the rules, or not at all.
            log.error("%s; it is started anew", error)
            await broker.stop()


async def _watch(
    fleet: FleetDirectory,
    config: FleetConfig,
    tls: ssl.SSLContext | None,
    kept: KeptBroker | None,
) -> None:
    """Pass on what changes in `tls/` and among the revoked devices, for ever."""
    seen: object = None
    while True:
        now = await asyncio.to_thread(_signature, fleet)
        if now != seen:
            try:
                await _take_up(fleet, config, tls, kept)
                seen = now
            except CoveyError as error:
                log.error("what changed in %s is not in force yet: %s", fleet.tls.path, error)
                await asyncio.sleep(RETRY_S)
        await asyncio.sleep(WATCH_S)


async def _take_up(
    fleet: FleetDirectory,
    config: FleetConfig,
    tls: ssl.SSLContext | None,
    kept: KeptBroker | None,
) -> None:
    _, certificate, key = _tls_files(fleet, config)
    if tls is not None and certificate is not None and key is not None:
        await asyncio.to_thread(_show, tls, certificate, key)
    if kept is not None:
        await kept.admit(await asyncio.to_thread(access_of, fleet, config))


def _signature(fleet: FleetDirectory) -> object:
    """Differs from an earlier one if a file has been replaced since."""
    found: list[object] = [fleet.book.generation()]
    paths = [fleet.tls.path / name for name in _TLS_FILES]
    for path in (fleet.path / "revoked.json", *paths):
        try:
            status = path.stat()
        except OSError:
            found.append(None)
        else:
            found.append((status.st_ino, status.st_mtime_ns, status.st_size))
    return found
