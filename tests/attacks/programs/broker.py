"""A broker that meddles: a TCP proxy in front of a real one, that takes MQTT apart.

`HostileBroker` ends QoS 1 on both sides: every PUBLISH is acknowledged at once to whoever sent it, and
what goes on to the other side, if anything, are packets of its own. A `Tamper` sees each message in
either direction, and says what becomes of it. With `private` set, a device that subscribes to what all
get is given topics of its own instead, so that each can be told something else.

By hand, from the tests' folder: `python -m attacks.programs.broker --listen 1884 --upstream
127.0.0.1:1883 --seed 7`, and let devices connect to port 1884.
"""

import argparse
import asyncio
import contextlib
import random
import struct
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

from covey_shared.topics import OFFLINE, ONLINE
from scripted_broker import CONNECT, PUBACK, PUBLISH, SUBSCRIBE, Packet, encode, read_packet

MAX_DELAY_S = 0.3


@dataclass(frozen=True)
class Passing:
    """One message on its way. client: whose connection. inbound: towards the broker."""

    client: str
    inbound: bool
    topic: str
    payload: bytes
    retain: bool = False
    delay_s: float = 0.0

    def changed(self, payload: bytes) -> "Passing":
        return replace(self, payload=payload)


Tamper = Callable[[Passing], Iterable[Passing]]


def publish_of(packet: Packet) -> tuple[str, bytes, int | None, bool]:
    """A PUBLISH taken apart: topic, payload, packet identifier (of QoS 1), retain."""
    size = int.from_bytes(packet.body[:2], "big")
    topic, rest = packet.body[2 : 2 + size].decode(), packet.body[2 + size :]
    if packet.flags >> 1 & 3:
        return topic, rest[2:], int.from_bytes(rest[:2], "big"), bool(packet.flags & 1)
    return topic, rest, None, bool(packet.flags & 1)


def client_id_of(connect: Packet) -> str:
    """Of a CONNECT of MQTT 3.1.1: after the protocol's name, level, flags and keep-alive."""
    at = 2 + int.from_bytes(connect.body[:2], "big") + 4
    size = int.from_bytes(connect.body[at : at + 2], "big")
    return connect.body[at + 2 : at + 2 + size].decode()


def filters_of(subscribe: Packet) -> list[tuple[str, int]]:
    """Of a SUBSCRIBE: topic filters and their QoS."""
    body, at, found = subscribe.body, 2, []
    while at < len(body):
        size = int.from_bytes(body[at : at + 2], "big")
        found.append((body[at + 2 : at + 2 + size].decode(), body[at + 2 + size]))
        at += 3 + size
    return found


def private_topic(topic: str, device: str) -> str:
    """Where a device finds what should go to all: covey/F/all -> covey/F/only/DEVICE/all."""
    root, fleet, name = topic.split("/")
    return f"{root}/{fleet}/only/{device}/{name}"


@dataclass
class _Link:
    """One client's connection, and ours to the broker for it."""

    client: str
    to_client: asyncio.StreamWriter
    to_broker: asyncio.StreamWriter
    mid: int = 0

    def send(self, message: Passing) -> None:
        """As a packet of our own, with an identifier of our own."""
        self.mid = self.mid % 65535 + 1
        topic = message.topic.encode()
        body = struct.pack(">H", len(topic)) + topic + struct.pack(">H", self.mid) + message.payload
        writer = self.to_broker if message.inbound else self.to_client
        if not writer.is_closing():
            writer.write(encode(PUBLISH, body, 2 | message.retain))


class HostileBroker:
    """``async with`` listens on 127.0.0.1. upstream: the real broker. messages: all that passed."""

    def __init__(self, upstream: tuple[str, int], *, private: bool = False, port: int = 0) -> None:
        self.upstream, self.private, self.port = upstream, private, port
        self.tamper: Tamper = lambda message: (message,)
        self.messages: list[Passing] = []
        self.links: dict[str, _Link] = {}
        self.n_changed = 0
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def url(self) -> str:
        return f"mqtt://127.0.0.1:{self.port}"

    async def __aenter__(self) -> "HostileBroker":
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *error: object) -> None:
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def inject(self, message: Passing) -> None:
        """Words of our own, to whom we like; nobody asked for them."""
        if message.client in self.links:
            self.links[message.client].send(message)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        ours: asyncio.StreamWriter | None = None
        try:
            connect = await read_packet(reader)
            back, ours = await asyncio.open_connection(*self.upstream)
            link = _Link(client_id_of(connect), writer, ours)
            ours.write(encode(CONNECT, connect.body, connect.flags))
            self.links[link.client] = link
            async with asyncio.TaskGroup() as both:
                both.create_task(self._pump(reader, link, inbound=True))
                both.create_task(self._pump(back, link, inbound=False))
        except* (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass  # either side left, or all is over
        finally:
            for one in (writer, ours):
                if one is not None:
                    one.close()

    async def _pump(self, reader: asyncio.StreamReader, link: _Link, *, inbound: bool) -> None:
        onward, back = link.to_broker, link.to_client
        if not inbound:
            onward, back = back, onward
        while True:
            packet = await read_packet(reader)
            if packet.kind == PUBLISH:
                topic, payload, mid, retain = publish_of(packet)
                if mid is not None:
                    back.write(encode(PUBACK, struct.pack(">H", mid)))
                self._pass(
                    link, Passing(link.client, inbound, self._public(topic), payload, retain)
                )
            elif packet.kind == SUBSCRIBE and inbound and self.private:
                onward.write(self._redirected(packet, link.client))
            elif packet.kind != PUBACK:  # those are for packets of ours
                onward.write(encode(packet.kind, packet.body, packet.flags))
            await onward.drain()

    def _pass(self, link: _Link, message: Passing) -> None:
        self.messages.append(message)
        out = list(self.tamper(message))
        self.n_changed += out != [message]
        for one in out:
            target = self.links.get(one.client, link)
            if one.delay_s:
                asyncio.get_running_loop().call_later(one.delay_s, target.send, one)
            else:
                target.send(one)

    def _redirected(self, packet: Packet, device: str) -> bytes:
        body = packet.body[:2]
        for topic, qos in filters_of(packet):
            mine = private_topic(topic, device) if topic.endswith(("/round", "/all")) else topic
            body += struct.pack(">H", len(mine)) + mine.encode() + bytes([qos])
        return encode(SUBSCRIBE, body, packet.flags)

    def _public(self, topic: str) -> str:
        levels = topic.split("/")
        if self.private and len(levels) == 5 and levels[2] == "only":
            return "/".join((*levels[:2], levels[4]))
        return topic


# -- what it does ---------------------------------------------------------------------------------


def flipped(payload: bytes, chance: random.Random) -> bytes:
    """One bit, anywhere."""
    changed = bytearray(payload or b"\0")
    changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
    return bytes(changed)


def truncated(payload: bytes, chance: random.Random) -> bytes:
    """Without its end, but for at least a byte."""
    return payload[: chance.randrange(1, max(2, len(payload)))]


@dataclass
class Meddler:
    """Does something to a share of all messages, by a seed. does: which of `ALL` it may do."""

    ALL = ("drop", "twice", "later", "flip", "truncate", "swap", "replay", "inject", "presence")

    seed: int
    rate: float = 0.1
    does: tuple[str, ...] = ALL
    past: deque[Passing] = field(default_factory=lambda: deque(maxlen=400))
    done: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.chance = random.Random(self.seed)

    def __call__(self, message: Passing) -> list[Passing]:
        chance = self.chance
        self.past.append(message)
        if chance.random() >= self.rate:
            return [message]
        what = chance.choice(self.does)
        self.done[what] = self.done.get(what, 0) + 1
        return self.treated(what, message)

    def treated(self, what: str, message: Passing) -> list[Passing]:
        """What goes on in the place of a message."""
        chance = self.chance
        match what:
            case "drop":
                return []
            case "twice":
                return [message, message]
            case "later":
                return [replace(message, delay_s=chance.uniform(0.01, MAX_DELAY_S))]
            case "flip":
                return [message.changed(flipped(message.payload, chance))]
            case "truncate":
                return [message.changed(truncated(message.payload, chance))]
            case "swap":  # somebody else's words under this topic, and these under that
                other = chance.choice(self.past)
                return [message.changed(other.payload), other.changed(message.payload)]
            case "replay":
                return [message, chance.choice(self.past)]
            case "inject":
                return [message, message.changed(chance.randbytes(chance.randrange(1, 300)))]
            case _:
                return [message, *self._lie_about_presence(message)]

    def _lie_about_presence(self, message: Passing) -> list[Passing]:
        told = [p for p in self.past if "/presence/" in p.topic and not p.inbound]
        if not told:
            return []
        lie = self.chance.choice(told)
        return [lie.changed(self.chance.choice((ONLINE, OFFLINE)))]


@dataclass
class FirstOfEach:
    """Does one thing to the first copy of every message there is, in either direction; a second copy,
    which only comes if somebody asks or repeats itself, may pass. spared: what topics that contain it
    are."""

    what: str
    seed: int = 0
    spared: str | None = None

    def __post_init__(self) -> None:
        self.meddler = Meddler(self.seed)
        self._seen: set[tuple[str, bool, str, bytes]] = set()

    def __call__(self, message: Passing) -> list[Passing]:
        self.meddler.past.append(message)
        at = (message.client, message.inbound, message.topic, message.payload)
        spared = "/presence/" in message.topic or (self.spared and self.spared in message.topic)
        if at in self._seen or spared:
            return [message]
        self._seen.add(at)
        return self.meddler.treated(self.what, message)


@dataclass
class CrossedInboxes:
    """What is for one device goes to another as well, and first."""

    devices: list[str]

    def __call__(self, message: Passing) -> list[Passing]:
        if message.inbound or not message.topic.endswith(f"/to/{message.client}"):
            return [message]
        at = self.devices.index(message.client)
        other = self.devices[(at + 1) % len(self.devices)]
        topic = message.topic.removesuffix(message.client) + other
        return [replace(message, client=other, topic=topic), message]


async def _main(arguments: argparse.Namespace) -> None:
    host, port = arguments.upstream.split(":")
    broker = HostileBroker((host, int(port)), port=arguments.listen)
    broker.tamper = meddler = Meddler(arguments.seed, arguments.rate, tuple(arguments.do))
    async with broker:
        print(f"meddling at {broker.url}, in front of {arguments.upstream}")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(arguments.seconds):
                while True:
                    await asyncio.sleep(5)
                    print(f"{len(broker.messages)} messages passed; {meddler.done}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="A hostile broker in front of a real one.")
    parser.add_argument("--listen", type=int, default=1884, help="port, on 127.0.0.1")
    parser.add_argument("--upstream", default="127.0.0.1:1883", help="HOST:PORT of the real one")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rate", type=float, default=0.1, help="share of messages to meddle with")
    parser.add_argument("--do", nargs="+", choices=Meddler.ALL, default=list(Meddler.ALL))
    parser.add_argument("--seconds", type=float, default=3600.0)
    asyncio.run(_main(parser.parse_args()))
