"""A broker that misbehaves on purpose: just enough of MQTT 3.1.1 to test a client against it."""

import asyncio
import ssl
import struct
from dataclasses import dataclass, field
from types import TracebackType

CONNECT, CONNACK, PUBLISH, PUBACK, SUBSCRIBE, SUBACK = 1, 2, 3, 4, 8, 9
UNSUBSCRIBE, UNSUBACK, PINGREQ, PINGRESP, DISCONNECT = 10, 11, 12, 13, 14


@dataclass
class Packet:
    """kind: the packet type. flags: the low four bits beside it. body: all after the length."""

    kind: int
    flags: int
    body: bytes

    @property
    def payload(self) -> bytes:
        """Of a PUBLISH with QoS 1."""
        return self.body[2 + int.from_bytes(self.body[:2], "big") + 2 :]

    @property
    def mid(self) -> int:
        """The packet identifier of a PUBLISH with QoS 1, or of a SUBSCRIBE."""
        at = 2 + int.from_bytes(self.body[:2], "big") if self.kind == PUBLISH else 0
        return int.from_bytes(self.body[at : at + 2], "big")


def encode(kind: int, body: bytes, flags: int = 0) -> bytes:
    """One packet's bytes."""
    length, header = len(body), bytearray([kind << 4 | flags])
    while True:
        length, digit = divmod(length, 128)
        header.append(digit | 0x80 if length else digit)
        if not length:
            return bytes(header) + body


def encode_publish(topic: bytes, payload: bytes, mid: int = 1) -> bytes:
    """A PUBLISH with QoS 1."""
    body = struct.pack(">H", len(topic)) + topic + struct.pack(">H", mid) + payload
    return encode(PUBLISH, body, flags=2)


@dataclass
class Client:
    """One connection that the broker accepted."""

    writer: asyncio.StreamWriter
    packets: list[Packet] = field(default_factory=list)

    def of(self, kind: int) -> list[Packet]:
        return [packet for packet in self.packets if packet.kind == kind]

    def send(self, data: bytes) -> None:
        self.writer.write(data)


class ScriptedBroker:
    """``async with`` listens on 127.0.0.1. What it answers is set by its attributes, at any time.

    connack: return code, None for silence. acking: whether it acknowledges publishes. suback:
    return code for every filter, None for silence. pinging: whether it answers pings. close_on: a
    packet type after which it closes the connection. greeting: sent right after the CONNACK.
    """

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        self.connack: int | None = 0
        self.acking = True
        self.suback: int | None = 1
        self.pinging = True
        self.close_on: int | None = None
        self.greeting = b""
        self.clients: list[Client] = []
        self._tls = tls
        self.port = 0

    async def __aenter__(self) -> "ScriptedBroker":
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=self._tls)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._server.close()
        for client in self.clients:
            client.writer.close()

    @property
    def url(self) -> str:
        return f"{'mqtts' if self._tls else 'mqtt'}://127.0.0.1:{self.port}"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        client = Client(writer)
        self.clients.append(client)
        try:
            while True:
                client.packets.append(packet := await read_packet(reader))
                if packet.kind == self.close_on:
                    break
                self._answer(client, packet)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    def _answer(self, client: Client, packet: Packet) -> None:
        mid = struct.pack(">H", packet.mid)
        if packet.kind == CONNECT and self.connack is not None:
            client.send(encode(CONNACK, bytes([0, self.connack])) + self.greeting)
        elif packet.kind == PUBLISH and self.acking:
            client.send(encode(PUBACK, mid))
        elif packet.kind == SUBSCRIBE and self.suback is not None:
            n_filters, at = 0, 2
            while at < len(packet.body):
                at += 2 + int.from_bytes(packet.body[at : at + 2], "big") + 1
                n_filters += 1
            client.send(encode(SUBACK, mid + bytes([self.suback] * n_filters)))
        elif packet.kind == UNSUBSCRIBE:
            client.send(encode(UNSUBACK, mid))
        elif packet.kind == PINGREQ and self.pinging:
            client.send(encode(PINGRESP, b""))


async def read_packet(reader: asyncio.StreamReader) -> Packet:
    first = (await reader.readexactly(1))[0]
    length, shift = 0, 0
    while True:
        digit = (await reader.readexactly(1))[0]
        length |= (digit & 0x7F) << shift
        shift += 7
        if not digit & 0x80:
            return Packet(first >> 4, first & 15, await reader.readexactly(length))
