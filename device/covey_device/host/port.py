"""The local socket: what this device is at, for whoever may connect, and a say for programs of this machine.

A Unix stream socket; each request is a line with a JSON object, and so is each answer (docs/host.md). Whoever
connects is untrusted: clients, lines, requests, wishes and time are bounded, and what cannot be understood is
answered with an error. The socket is made for this user and group alone.
"""

import asyncio
import contextlib
import errno
import logging
import os
import socket
import stat
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from covey_device.host.waits import MAX_WAIT_S, MAX_WHY_CHARS, Waits
from covey_shared.errors import ConfigError, LocalProtocolError, StorageError

log = logging.getLogger("covey.device")

FILE = "covey.sock"
DIRECTORY = Path("/run/covey-device")
"""Where a systemd unit has it; elsewhere it is in the state directory."""

MAX_CLIENTS = 16
MAX_LINE_BYTES = 4096
MAX_REQUESTS = 10_000
"""Of one connection."""

IDLE_S = 10.0
"""A connection that says nothing, unless it asked to wait for as long as it lives."""

ANSWER_S = 5.0
"""For a client to take its answer."""

PAUSE_S = 0.02
"""Before each answer of a connection but the first, so that none can keep the device busy."""

_MAX_SOCKET_PATH = 100  # sun_path holds 108 bytes


class Request(msgspec.Struct, forbid_unknown_fields=True):
    """What a program may ask. seconds: of a wait; without them it lasts as long as the connection."""

    ask: Literal["status", "explain", "wait", "go on"]
    seconds: Annotated[float, Meta(gt=0, le=MAX_WAIT_S)] | None = None
    why: Annotated[str, Meta(max_length=MAX_WHY_CHARS)] = ""


Facts = Callable[[], Awaitable[Any]]


class LocalPort:
    """Serves until it is closed. path: of the socket. status, explain: make their answers. heeds: whether
    waits count. clock: that of the waits."""

    def __init__(
        self,
        path: Path,
        waits: Waits,
        *,
        status: Facts,
        explain: Facts,
        heeds: Callable[[], bool],
        clock: Callable[[], float],
    ) -> None:
        self.path = path
        self._waits, self._heeds, self._clock = waits, heeds, clock
        self._answers = {"status": status, "explain": explain}
        self._server: asyncio.Server | None = None
        self._clients: set[asyncio.Task[None]] = set()
        self._made: tuple[int, int] | None = None

    async def open(self) -> None:
        """Raises ConfigError if another service has it, StorageError if it cannot be made."""
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            with _reachable(self.path) as name:
                _make_room(self.path, name)
                listener.bind(name)
            self.path.chmod(0o660)  # until here it is the umask's, which keeps others out
            made = self.path.stat()
            self._made = made.st_dev, made.st_ino
            listener.setblocking(False)
            self._server = await asyncio.start_unix_server(
                self._accept, sock=listener, limit=MAX_LINE_BYTES, backlog=MAX_CLIENTS
            )
        except OSError as error:
            listener.close()
            raise StorageError(
                f"cannot make the local socket {self.path}: {error.strerror or error}; check its "
                "directory's owner"
            ) from error
        except BaseException:
            listener.close()
            raise

    async def close(self) -> None:
        """End it, and every connection; the socket's file is removed if it is still this one."""
        if self._server is not None:
            self._server.close()
            self._server = None
        clients = tuple(self._clients)
        for task in clients:
            task.cancel()
        if clients:
            await asyncio.wait(clients, timeout=ANSWER_S)
        with contextlib.suppress(OSError):
            there = self.path.lstat()
            if (there.st_dev, there.st_ino) == self._made:
                self.path.unlink()

    # -- clients ----------------------------------------------------------------------------------

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # A callback and no coroutine: asyncio would start a task of its own for each of any number.
        if len(self._clients) >= MAX_CLIENTS:
            writer.write(
                _line({"ok": False, "error": f"{MAX_CLIENTS} programs are connected already"})
            )
            writer.close()
            return
        task = asyncio.ensure_future(self._serve(reader, writer))
        self._clients.add(task)
        task.add_done_callback(self._clients.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        held: set[int] = set()  # waits that end with this connection
        try:
            for number in range(MAX_REQUESTS):
                try:
                    async with asyncio.timeout(None if held else IDLE_S):
                        line = await reader.readuntil(b"\n")
                except asyncio.LimitOverrunError:
                    await _say(writer, _error(f"a request has at most {MAX_LINE_BYTES} bytes"))
                    return
                if number:
                    await asyncio.sleep(PAUSE_S)
                await _say(writer, await self._answer(line, held))
        except (OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        except Exception:
            log.exception("a local program's request failed; the service goes on")
        finally:
            for wait in held:
                self._waits.remove(wait)
            writer.transport.abort()

    async def _answer(self, line: bytes, held: set[int]) -> dict[str, Any]:
        try:
            request = msgspec.json.decode(line, type=Request)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            return _error(f"not a request: {error}"[:200])
        if request.ask in self._answers:
            return {"ok": True, request.ask: await self._answers[request.ask]()}
        if request.ask == "go on":
            for number in held:
                self._waits.remove(number)
            held.clear()
            return {"ok": True}
        now = self._clock()
        until = None if request.seconds is None else now + request.seconds
        added = self._waits.add(request.why, until, now)
        if added is None:
            return _error("too many programs ask to wait already")
        if until is None:
            held.add(added)
        # A wait that its owner will not have is taken, and changes nothing: the answer says so.
        return {"ok": True, "heeded": self._heeds()}


def _error(what: str) -> dict[str, Any]:
    return {"ok": False, "error": what}


def _line(answer: dict[str, Any]) -> bytes:
    return msgspec.json.encode(answer) + b"\n"


async def _say(writer: asyncio.StreamWriter, answer: dict[str, Any]) -> None:
    writer.write(_line(answer))
    async with asyncio.timeout(ANSWER_S):
        await writer.drain()


@contextlib.contextmanager
def _reachable(path: Path) -> Iterator[str]:
    """A name for a socket that the kernel's 108 bytes hold, however long its directory's is."""
    if len(os.fsencode(path)) <= _MAX_SOCKET_PATH:
        yield os.fspath(path)
        return
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{directory}/{path.name}"
    finally:
        os.close(directory)


def _make_room(path: Path, name: str) -> None:
    """Remove a socket that nobody serves. Raises ConfigError for one that somebody does, or for what is no
    socket."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise ConfigError(
            f"{path} is no socket, and covey-device's local socket belongs there: move it"
        )
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(name)
        except OSError as error:
            if error.errno == errno.ECONNREFUSED:
                path.unlink(missing_ok=True)
                return
            if error.errno == errno.ENOENT:
                return
            if not isinstance(error, TimeoutError) and error.errno != errno.EAGAIN:
                raise
    raise ConfigError(f"another covey-device serves {path}: stop it first")


def directory_of(state: Path) -> Path:
    """Where the socket and the veto file are: systemd's runtime directory, or else the state directory."""
    given = os.environ.get("RUNTIME_DIRECTORY", "").split(":")[0]
    return Path(given) if os.path.isabs(given) else state  # noqa: PTH117  an empty one is no path


MAX_ANSWER_BYTES = 1 << 20


def ask(path: Path, request: dict[str, Any], timeout_s: float = 10.0) -> Any:
    """The other end, for commands: one request -> its answer's content; None if nobody serves there.

    Raises StorageError if this user may not connect, LocalProtocolError for an error.
    """
    answer = bytearray()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.settimeout(timeout_s)
        try:
            with _reachable(path) as name:
                client.connect(name)
            client.sendall(msgspec.json.encode(request) + b"\n")
            while not answer.endswith(b"\n") and len(answer) < MAX_ANSWER_BYTES:
                part = client.recv(1 << 16)
                if not part:
                    break
                answer += part
        except (FileNotFoundError, NotADirectoryError, ConnectionRefusedError):
            return None
        except OSError as error:
            raise StorageError(
                f"cannot ask the service at {path}: {error.strerror or error}; its user, its group and "
                "root may"
            ) from error
    try:
        told = msgspec.json.decode(bytes(answer), type=dict[str, Any])
    except msgspec.MsgspecError as error:
        raise LocalProtocolError(
            f"{path} answers with what is no answer: is it covey-device?"
        ) from error
    if told.get("ok") is not True:
        raise LocalProtocolError(f"the service at {path} answers: {told.get('error')}")
    return told.get(str(request["ask"]))
