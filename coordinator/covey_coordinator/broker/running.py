"""Starting a broker, waiting until it listens, and ending it."""

import asyncio
import contextlib
import logging
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Literal

import psutil

from covey_coordinator.broker import embedded, mosquitto
from covey_coordinator.broker.access import Access
from covey_coordinator.broker.files import private_directory
from covey_coordinator.files import write_atomic
from covey_shared.errors import ConfigError, StorageError, TransportError

log = logging.getLogger("covey.coordinator")

HOST = "127.0.0.1"

BrokerKind = Literal["embedded", "mosquitto"]

# Between choosing a free port and the child's bind another process may take it; thrice in a row
# is not chance any more.
_PORT_ATTEMPTS = 3
_POLL_S = 0.02
_LOG_LINES = 8
_LOCAL_CONNECTIONS = 1024  # on loopback, from this machine alone
_LOG_TAIL_BYTES = 16 * 1024
_RELOAD_S = 10.0

MAX_LOG_BYTES = 4_000_000
"""Of the log that is written, and again of the one before: 20,000 connections that came and went. Who
knocks at the port decides how much there is to say."""

# Of the broker itself; OpenSSL's own, about a client, have more words in front.
_ERROR = re.compile(rb"^\S+: (Error.*)$", re.MULTILINE)

# (the broker's directory, port) -> its command and version
_Prepare = Callable[[Path, int], tuple[list[str], str]]


class RunningBroker:
    """A broker that accepts connections on 127.0.0.1. ``async with`` stops it at the end.

    Not bound to an event loop: it may be started in one and stopped in another.
    process: the child. log: the file with the broker's own log lines. access: who gets in, of a
    networked fleet's; None where users have passwords.
    """

    def __init__(
        self,
        kind: BrokerKind,
        version: str,
        port: int,
        directory: Path,
        process: subprocess.Popen[bytes],
        log: Path,
        access: Access | None = None,
    ) -> None:
        self.kind = kind
        self.version = version
        self.host = HOST
        self.port = port
        self.directory = directory
        self.process = process
        self.log = log
        self.access = access
        self._reading_log = False

    def __repr__(self) -> str:
        state = "running" if self.running else "ended"
        return f"<{self.kind} {self.version} at {self.url}, {state}>"

    @property
    def url(self) -> str:
        """mqtt://127.0.0.1:port, without a user; mqtts:// in a networked fleet."""
        return f"mqtt{'' if self.access is None else 's'}://{self.host}:{self.port}"

    @property
    def running(self) -> bool:
        """The child has not ended yet."""
        return self.process.poll() is None

    def last_log_lines(self, n_lines: int = _LOG_LINES) -> list[str]:
        """The end of the broker's log."""
        try:
            with self.log.open("rb") as file:
                file.seek(max(0, self.log.stat().st_size - _LOG_TAIL_BYTES))
                return file.read().decode(errors="replace").splitlines()[-n_lines:]
        except OSError:
            return []

    def trim_log(self) -> None:
        """Begin the log anew if it has become too long; the one so far is kept beside it. To be called
        now and then, as the child itself writes for ever. A full disk costs what was in it."""
        try:
            if self._reading_log or self.log.stat().st_size <= MAX_LOG_BYTES:
                return
            before = self.log.with_name("broker.log.1")
            with contextlib.suppress(StorageError):
                write_atomic(before, self.log.read_bytes(), mode=0o600, durable=False)
            # The child goes on at what is then the end, as it opened the file for appending.
            os.truncate(self.log, 0)
        except OSError as error:
            log.warning("cannot begin %s anew: %s", self.log, error.strerror)

    async def admit(self, access: Access) -> bool:
        """Let in whom `access` says from now on -> whether that is news.

        Devices that it revokes are silenced when this returns, although their connections stand;
        other clients notice nothing. Raises ConfigError if it is unusable, and then nothing changes;
        StorageError; TransportError if mosquitto does not take it, which may then let in anybody: it
        is to be stopped. mosquitto 2.0 reads its certificate, the list of revoked ones and its rules
        again on SIGHUP; where it cannot read one of them it goes on without.
        """
        if access == self.access:
            return False
        await asyncio.to_thread(access.check)
        new, old = access.files(), {} if self.access is None else self.access.files()
        for name, content in new.items():
            if old.get(name) != content:
                write_atomic(self.directory / name, content, mode=0o600, durable=False)
        self._reading_log = True
        try:
            await self._reload()
        finally:
            self._reading_log = False
        self.access = access
        return True

    async def _reload(self) -> None:
        """Have mosquitto read its files again, and return when it has. Raises TransportError."""
        before = self.log.stat().st_size
        self.process.send_signal(signal.SIGHUP)
        for _ in range(int(_RELOAD_S / _POLL_S)):
            if not self.running:
                break
            with self.log.open("rb") as file:
                file.seek(before)
                _, reloading, said = file.read().partition(b"Reloading config.\n")
            if error := _ERROR.search(said):
                raise TransportError(
                    f"mosquitto cannot use its new rules: {error[1].decode(errors='replace')}"
                )
            # what it says while it reloads, it says at once
            if reloading and await self._answers():
                return
            await asyncio.sleep(_POLL_S)
        raise TransportError("mosquitto does not take its new rules: it does not answer")

    async def stop(self, timeout_s: float = 5.0) -> None:
        """Ask it to end, and kill it if it has not after timeout_s. Harmless when it has ended."""
        await self._end(signal.SIGTERM, timeout_s)
        await self.kill()

    async def kill(self) -> None:
        """End it at once: nothing is saved, nobody is told."""
        await self._end(signal.SIGKILL, 60.0)

    async def _answers(self) -> bool:
        """Whether its loop has come round: a connection that speaks no TLS is ended."""
        try:
            async with asyncio.timeout(_RELOAD_S):
                reader, writer = await asyncio.open_connection(self.host, self.port)
                try:
                    writer.write(b"\r\n" * 8)
                    await reader.read()
                finally:
                    writer.close()
        except ConnectionResetError:
            return True
        except OSError:
            return False
        return True

    async def _end(self, signal_number: int, timeout_s: float) -> None:
        if self.running:
            self.process.send_signal(signal_number)
        # sleeping rather than wait(), which would hold up the event loop
        for _ in range(int(timeout_s / _POLL_S)):
            if not self.running:
                return
            await asyncio.sleep(_POLL_S)

    async def __aenter__(self) -> "RunningBroker":
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.stop()


async def start_broker(
    kind: Literal["auto", "embedded", "mosquitto"],
    directory: Path,
    *,
    users: Mapping[str, str],
    port: int = 0,
    timeout_s: float = 30.0,
) -> RunningBroker:
    """Start a broker in `directory`, and return once it accepts connections.

    kind: "auto" is mosquitto if it is found, otherwise the embedded one.
    directory: made if need be; it and all in it is for this user only (0700, 0600). Used again, it
    brings mosquitto's retained messages back; the embedded broker forgets them.
    users: name -> password; nobody else may connect. The passwords should be generated ones: the
    embedded broker hashes them cheaply, so that a whole fleet can connect at once.
    port: 0 is a free one. The calling thread must outlive the broker: the kernel ties it to that.

    Raises ConfigError if there is no such broker here or a user's name is unusable, StorageError
    if the directory cannot be written, TransportError with the broker's last words if it ends.
    """
    chosen = _choose(kind)
    for name, password in users.items():
        # mosquitto_passwd ends a password at a colon, without a word
        if not name or not password or any(c in name + password for c in ":\n\r\0"):
            raise ConfigError(
                f"broker user {name!r}: name and password are not empty, and have neither ':' "
                "nor line breaks"
            )

    def prepare(directory: Path, port: int) -> tuple[list[str], str]:
        if chosen == "mosquitto":
            return mosquitto.prepare(directory, HOST, port, dict(users))
        return embedded.prepare(directory, HOST, port, dict(users))

    return await _start(chosen, directory, prepare, port, timeout_s)


async def start_networked_broker(
    directory: Path,
    access: Access,
    *,
    port: int = 0,
    host: str | None = None,
    timeout_s: float = 30.0,
) -> RunningBroker:
    """Start mosquitto for clients with certificates, and return once it accepts connections.

    host: the address to listen on; None for all of this machine's, IPv4 and IPv6. Otherwise as
    `start_broker`; `RunningBroker.admit` changes who gets in. Raises ConfigError also if `access` is
    unusable.
    """
    await asyncio.to_thread(access.check)

    def prepare(directory: Path, port: int) -> tuple[list[str], str]:
        return mosquitto.prepare_networked(directory, host, port, access)

    return await _start("mosquitto", directory, prepare, port, timeout_s, access)


async def _start(
    kind: BrokerKind,
    directory: Path,
    prepare: _Prepare,
    port: int,
    timeout_s: float,
    access: Access | None = None,
) -> RunningBroker:
    attempts = _PORT_ATTEMPTS if port == 0 else 1
    while True:
        broker = await _launch(kind, directory, prepare, port or _free_port(), access)
        try:
            await _until_listening(broker, timeout_s)
        except _PortTakenError:
            attempts -= 1
            if attempts == 0:
                raise TransportError(
                    f"port {broker.port} on {HOST} is taken: stop what listens there "
                    "(`ss -tlnp` names it), or choose another port"
                ) from None
        except BaseException:
            await broker.kill()
            raise
        else:
            return broker


def _choose(kind: Literal["auto", "embedded", "mosquitto"]) -> BrokerKind:
    if kind == "auto":
        if mosquitto.find() is not None:
            return "mosquitto"
        if embedded.available():
            return "embedded"
        raise ConfigError(
            "no MQTT broker here: install one (`apt install mosquitto`, or "
            "`pip install 'covey[demo]'` for the embedded one), or name yours with mqtt://HOST"
        )
    if kind == "mosquitto" and mosquitto.find() is None:
        raise ConfigError(
            "mosquitto is not installed: `apt install mosquitto`, or use the embedded broker"
        )
    if kind == "embedded" and not embedded.available():
        raise ConfigError(
            "the embedded broker needs amqtt: `pip install 'covey[demo]'`, or install mosquitto"
        )
    return kind


async def _launch(
    kind: BrokerKind, directory: Path, prepare: _Prepare, port: int, access: Access | None
) -> RunningBroker:
    """Write the configuration and start the child; it need not be up yet."""
    # absolute: the child's paths must not depend on where it runs
    directory = directory.absolute()
    try:
        private_directory(directory)
        # hashing passwords takes a while; the fork below stays in this thread, see `__main__`
        command, version = await asyncio.to_thread(prepare, directory, port)
        log = directory / "broker.log"
        if log.exists():
            # what the last one said before it ended is worth a look, and one is enough
            log.replace(directory / "broker.log.1")
        fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o600)
    except OSError as error:
        raise StorageError(
            f"cannot prepare the broker's directory {directory}: {error.strerror}; "
            "check its owner and the space left"
        ) from error
    connections = _LOCAL_CONNECTIONS if access is None else access.connections
    child = [sys.executable, "-P", "-m", "covey_coordinator.broker"]
    try:
        process = subprocess.Popen(
            [*child, str(os.getpid()), str(connections), *command],
            stdin=subprocess.DEVNULL,
            stdout=fd,
            stderr=fd,
            cwd=directory,
            umask=0o077,
            # Its own session: Ctrl-C is for us, and the broker must outlive our goodbyes.
            start_new_session=True,
        )
    finally:
        os.close(fd)
    return RunningBroker(kind, version, port, directory, process, log, access)


class _PortTakenError(Exception):
    pass


async def _until_listening(broker: RunningBroker, timeout_s: float) -> None:
    """Return when the child itself listens: another process may hold the port instead."""
    for _ in range(int(timeout_s / _POLL_S)):
        if not broker.running:
            last_words = broker.last_log_lines()
            # mosquitto, then amqtt (which has it from asyncio)
            if any("address already in use" in line.lower() for line in last_words):
                raise _PortTakenError
            raise TransportError(
                f"{broker.kind} ended at its start (exit code {broker.process.returncode}); "
                f"its log {broker.log} ends with:\n  " + "\n  ".join(last_words)
            )
        if _listens(broker.process.pid, broker.port):
            return
        await asyncio.sleep(_POLL_S)
    raise TransportError(
        f"{broker.kind} does not listen on {HOST}:{broker.port} after {timeout_s:g} s; "
        f"its log {broker.log} ends with:\n  " + "\n  ".join(broker.last_log_lines())
    )


def _listens(pid: int, port: int) -> bool:
    try:
        connections = psutil.Process(pid).net_connections("tcp")
    except (psutil.Error, OSError):
        return False
    return any(
        connection.status == psutil.CONN_LISTEN and connection.laddr.port == port
        for connection in connections
    )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
    return port
