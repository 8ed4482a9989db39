"""A fleet's real enrolment port over real sockets, and servers that are not it.

`Lab` runs the coordinator's listener on a thread of its own; `Impostor` answers as it likes, behind
whatever certificate it has, and keeps what it was told.
"""

import asyncio
import contextlib
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from covey_coordinator import pki
from covey_coordinator.config import BrokerConfig, EnrolConfig
from covey_coordinator.enrolment.desk import EnrolmentDesk
from covey_coordinator.enrolment.listener import EnrolmentListener
from covey_coordinator.fleet import FleetDirectory
from covey_device import enrol
from covey_device.enrol import Joined
from covey_shared.enrolment import Token, frame, frame_size

HOST = "127.0.0.1"


class Lab:
    """A networked fleet with its enrolment port open. ahead_s: how far its clock is before ours.
    ca: the public key of a fleet CA elsewhere.

    change: what a coordinator that lies makes of its own answers.
    """

    def __init__(
        self,
        path: Path,
        name: str = "farm",
        *,
        ahead_s: int = 0,
        days: int = 90,
        ca: Path | None = None,
    ) -> None:
        self.ahead_s = ahead_s
        self.fleet = FleetDirectory.create(
            path,
            name,
            BrokerConfig(),
            addresses=(HOST,),
            enrol=EnrolConfig(days=days),
            ca=ca,
            now_unix=self.now(),
        )
        self.said: list[str] = []
        self.change: Callable[[bytes], bytes] = lambda answer: answer
        self.port = 0
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def now(self) -> int:
        return int(time.time()) + self.ahead_s

    def __enter__(self) -> "Lab":
        self._thread.start()
        assert self._ready.wait(20)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(20)

    def _run(self) -> None:
        self._loop.run_until_complete(self._serve())
        self._loop.close()

    async def _serve(self) -> None:
        desk = EnrolmentDesk(self.fleet, self.said.append)
        handle = desk.handle
        desk.handle = lambda *a: self.change(handle(*a))  # type: ignore[method-assign]
        listener = EnrolmentListener(
            desk, self.fleet.tls.server_context, port=0, host=HOST, unix=self.now
        )
        async with listener:
            self.port = listener.port
            self._ready.set()
            await self._stop.wait()

    def token(self, name: str, *, hours: float | None = None, again: bool = False) -> Token:
        """A token for this port."""
        token, _ = self.fleet.make_token(name, hours=hours, again=again, now_unix=self.now())
        return replace(token, port=self.port)

    def joined(self, folder: Path, name: str) -> Joined:
        """A device that has joined."""
        return enrol.join(self.token(name), folder / "device.toml")


@dataclass
class Impostor:
    """Listens and answers each frame with `answer(frame)`. heard: every byte that came, decrypted."""

    context: ssl.SSLContext
    answer: Callable[[bytes], bytes]
    heard: list[bytes] = field(default_factory=list)
    port: int = 0

    @contextlib.contextmanager
    def running(self) -> Iterator["Impostor"]:
        """Until the end of the block."""
        with socket.create_server((HOST, 0)) as server:
            server.settimeout(0.1)
            self.port = server.getsockname()[1]
            stop = threading.Event()
            thread = threading.Thread(target=self._accept, args=(server, stop), daemon=True)
            thread.start()
            try:
                yield self
            finally:
                stop.set()
                thread.join(10)

    def _accept(self, server: socket.socket, stop: threading.Event) -> None:
        while not stop.is_set():
            with contextlib.suppress(TimeoutError, OSError):
                plain, _ = server.accept()
                plain.settimeout(10)
                with plain, self.context.wrap_socket(plain, server_side=True) as secure:
                    request = read_frame(secure)
                    self.heard.append(request)
                    secure.sendall(frame(self.answer(request)))


def read_frame(secure: socket.socket) -> bytes:
    """One message."""
    return _exactly(secure, frame_size(_exactly(secure, 4)))


def _exactly(secure: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = secure.recv(size - len(data))
        if not part:
            raise ConnectionResetError
        data += part
    return data


def relayed(port: int, request: bytes, context: ssl.SSLContext | None = None) -> bytes:
    """What the true port answers to a request."""
    if context is None:
        context = anybody()
    with (
        socket.create_connection((HOST, port), timeout=10) as plain,
        context.wrap_socket(plain, server_hostname=HOST) as secure,
    ):
        secure.sendall(frame(request))
        return read_frame(secure)


def anybody() -> ssl.SSLContext:
    """A client that believes everyone."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


def server_context(authority: pki.Authority, folder: Path, host: str = HOST) -> ssl.SSLContext:
    """A server with a certificate of this authority, in force."""
    return context_of(
        pki.server_certificate(authority, [host], days=30, now_unix=int(time.time())), folder
    )


def context_of(pair: pki.Pair, folder: Path) -> ssl.SSLContext:
    """A server with this certificate."""
    folder.mkdir(exist_ok=True)
    file = folder / "server.pem"
    file.write_bytes(pair.key + pair.certificate)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(file)
    return context
