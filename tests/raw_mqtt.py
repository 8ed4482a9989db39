"""An MQTT 3.1.1 client made of sockets and bytes, for saying what a well-behaved client would not.

Blocking, with time limits. The packets are those of the OASIS standard, section 3.
"""

import socket
import ssl
import struct
from dataclasses import dataclass, field
from types import TracebackType

TIMEOUT_S = 20.0

CONNECT, CONNACK, PUBLISH, PUBACK, SUBSCRIBE, SUBACK, PING, PONG = (
    *(0x10, 0x20, 0x30, 0x40, 0x82, 0x90, 0xC0, 0xD0),
)


class TurnedAwayError(Exception):
    """The broker ended the connection, or would not begin one."""


@dataclass
class RawClient:
    """One connection. tls: None speaks in clear. session: of an earlier connection, to resume.

    Raises TurnedAwayError when the broker does not let it in, now or later.
    """

    port: int
    tls: ssl.SSLContext | None
    client_id: str = "raw"
    username: str | None = None
    will: tuple[str, bytes] | None = None
    session: ssl.SSLSession | None = None
    clean: bool = True
    heard: list[tuple[str, bytes, bool]] = field(default_factory=list)
    """Messages that came: topic, payload, whether it was retained."""

    def __post_init__(self) -> None:
        self._buffer = b""
        self._ids = 0
        try:
            plain = socket.create_connection(("127.0.0.1", self.port), TIMEOUT_S)
            self.socket = plain
            if self.tls is not None:
                self.socket = self.tls.wrap_socket(
                    plain, server_hostname="127.0.0.1", session=self.session
                )
            self._send(CONNECT, self._connect_body())
            kind, body = self._packet()
        except OSError as error:
            raise TurnedAwayError(str(error)) from error
        if kind != CONNACK or body[1] != 0:
            raise TurnedAwayError(f"answer {kind:#x} {body.hex()}")

    def _connect_body(self) -> bytes:
        flags, body = 2 if self.clean else 0, _text(self.client_id)
        if self.will is not None:
            flags |= 0x04 | 0x08 | 0x20  # a will, QoS 1, retained
            body += _text(self.will[0]) + _text(self.will[1])
        if self.username is not None:
            flags |= 0x80 | 0x40
            body += _text(self.username) + _text("a password")
        return _text("MQTT") + bytes((4, flags)) + struct.pack(">H", 60) + body

    def subscribe(self, *topics: str) -> list[int]:
        """The broker's answers: the QoS it granted, or 128."""
        self._ids += 1
        self._send(
            SUBSCRIBE,
            struct.pack(">H", self._ids) + b"".join(_text(topic) + b"\x01" for topic in topics),
        )
        return list(self._until(SUBACK)[2:])

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        """With QoS 1; returns when it is acknowledged, which a broker does for what it denies too."""
        self._ids += 1
        body = _text(topic) + struct.pack(">H", self._ids) + payload
        self._send(PUBLISH | 0x02 | retain, body)
        self._until(PUBACK)

    def ping(self) -> None:
        """Returns when the broker has answered: what it had to say before has been heard."""
        self._send(PING, b"")
        self._until(PONG)

    def until(self, payload: bytes) -> None:
        """Listen until this payload came."""
        while payload not in [p for _, p, _ in self.heard]:
            kind, body = self._packet()
            self._note(kind, body)

    def drop(self) -> None:
        """Vanish without a goodbye, so that the broker publishes the will."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()

    def close(self) -> None:
        """Hang up."""
        self.socket.close()

    def __enter__(self) -> "RawClient":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _until(self, wanted: int) -> bytes:
        while True:
            kind, body = self._packet()
            if kind == wanted:
                return body
            self._note(kind, body)

    def _note(self, kind: int, body: bytes) -> None:
        if kind & 0xF0 != PUBLISH:
            raise AssertionError(f"packet {kind:#x} out of place")
        (size,) = struct.unpack(">H", body[:2])
        topic, rest = body[2 : 2 + size].decode(), body[2 + size :]
        if kind & 0x06:
            self._send(PUBACK, rest[:2])
            rest = rest[2:]
        self.heard.append((topic, rest, bool(kind & 1)))

    def _send(self, kind: int, body: bytes) -> None:
        size, n = b"", len(body)
        while True:
            n, digit = divmod(n, 128)
            size += bytes((digit | (0x80 if n else 0),))
            if not n:
                break
        try:
            self.socket.sendall(bytes((kind,)) + size + body)
        except OSError as error:
            raise TurnedAwayError(str(error)) from error

    def _packet(self) -> tuple[int, bytes]:
        kind = self._take(1)[0]
        size = shift = 0
        while True:
            (digit,) = self._take(1)
            size |= (digit & 127) << shift
            shift += 7
            if not digit & 128:
                return kind, self._take(size)

    def _take(self, n: int) -> bytes:
        while len(self._buffer) < n:
            try:
                more = self.socket.recv(65536)
            except TimeoutError:
                raise AssertionError("the broker says nothing") from None
            except OSError as error:
                raise TurnedAwayError(str(error)) from error
            if not more:
                raise TurnedAwayError("the broker hung up")
            self._buffer += more
        taken, self._buffer = self._buffer[:n], self._buffer[n:]
        return taken


def _text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack(">H", len(data)) + data
