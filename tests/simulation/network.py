"""A broker and its clients' links, in made-up time.

What `covey_shared.transport` promises holds, and no more: a message arrives once, more than once, or not
at all, in any order. In fair weather each link is quick and keeps the order, as TCP does.
"""

import asyncio
import contextvars
import functools
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from covey_shared.errors import LocalProtocolError, TransportError
from covey_shared.transport import MAX_PAYLOAD_BYTES, Incoming, Will
from simulation.loop import Loop, Process

LATENCY_S = 0.01
KEEPALIVE_S = 4.0
"""After so long without a word the broker gives a client up, and the client the broker."""
BACKOFF_CAP_S = 60.0
WINDOW = 8


@dataclass
class Weather:
    """What happens to messages on their way. loss, doubling: probabilities. spread_s: the mean of what
    is added to the time that each takes, so that they overtake each other."""

    loss: float = 0.0
    doubling: float = 0.0
    spread_s: float = 0.0


@dataclass
class Link:
    """One client's way to the broker and back. slow_s: added to each message's time."""

    name: str
    up: bool = True
    down: bool = True
    slow_s: float = 0.0
    failures: int = 0

    @property
    def whole(self) -> bool:
        return self.up and self.down


Tell = Callable[[str, str, str, bytes], None]


@dataclass
class Network:
    """The broker. said: told (sender, topic, payload) of each message as it leaves its sender. tell: told
    (what, who, topic, payload) of what becomes of it, for the trace."""

    loop: Loop
    random: random.Random
    said: Callable[[str, str, bytes], None]
    tell: Tell
    weather: Weather = field(default_factory=Weather)
    running: bool = True
    retained: dict[str, bytes] = field(default_factory=dict)
    links: dict[str, Link] = field(default_factory=dict)
    clients: dict[str, "Client"] = field(default_factory=dict)
    nobody: contextvars.Context = field(default_factory=contextvars.copy_context)

    def link(self, name: str) -> Link:
        """The link of a client, whichever process uses it."""
        return self.links.setdefault(name, Link(name))

    def cut_off(self, name: str, *, up: bool = False, down: bool = False) -> None:
        """A link fails, or only one of its ways. Both ends notice when nothing came for long."""
        link = self.link(name)
        link.up, link.down = up, down
        link.failures += 1
        self.loop.call_later(KEEPALIVE_S, self._silent, link, link.failures, context=self.nobody)

    def mend(self, name: str) -> None:
        """A link works again."""
        link = self.link(name)
        link.up = link.down = True
        link.failures += 1

    def _silent(self, link: Link, failure: int) -> None:
        client = self.clients.get(link.name)
        if failure == link.failures and client is not None:
            client.cut("nothing came for long", will=True)

    def delay_s(self, link: Link) -> float:
        """How long the next message takes."""
        delay = LATENCY_S + link.slow_s
        if self.weather.spread_s:
            delay += self.random.expovariate(1 / self.weather.spread_s)
        return delay

    def take(self, sender: str, topic: str, payload: bytes, *, retain: bool) -> None:
        """A message has reached the broker."""
        if retain:
            self.retained.pop(topic, None)
            if payload:
                self.retained[topic] = payload
        for client in list(self.clients.values()):
            if client.wants(topic):
                self._send(client, Incoming(topic, payload))

    def _send(self, client: "Client", incoming: Incoming) -> None:
        link, weather, chance = client.link, self.weather, self.random
        copies = 1
        if weather.doubling and chance.random() < weather.doubling:
            copies = 2
        for _ in range(copies):
            if not link.down or (weather.loss and chance.random() < weather.loss):
                self.tell("lost", client.name, incoming.topic, incoming.payload)
                continue
            self.loop.call_later(
                self.delay_s(link),
                client.arrive,
                client.session,
                incoming,
                context=client.process.context,
            )

    def offer_retained(self, client: "Client", topic_filter: str) -> None:
        for topic, payload in list(self.retained.items()):
            if _matches(topic_filter, topic):
                self._send(client, Incoming(topic, payload, True))

    def stop(self, *, forget: bool) -> None:
        """The broker dies. forget: what it retained is gone too."""
        self.running = False
        if forget:
            self.retained.clear()
        for client in list(self.clients.values()):
            client.cut("the broker went away", will=False)


class Client:
    """One client's connection. Implements `transport.Transport`."""

    def __init__(self, network: Network, process: Process, will: Will | None) -> None:
        self.network, self.process, self.name, self._will = network, process, process.name, will
        self.link = network.link(process.name)
        self.session = 0
        self.filters: dict[str, None] = {}
        self._wanted: dict[str, bool] = {}
        self.bytes_in = self.bytes_out = 0
        self._stopped = False
        self._pace_s = 0.0
        self._lost = asyncio.Event()
        self._up = asyncio.Event()
        self._window = asyncio.Semaphore(WINDOW)

    @property
    def connected(self) -> bool:
        return self.network.clients.get(self.name) is self

    async def start(
        self,
        on_message: Callable[[Incoming], None],
        on_connected: Callable[[], Awaitable[None]],
        on_disconnected: Callable[[str], None],
    ) -> None:
        self._on_message, self._on_connected = on_message, on_connected
        self._on_disconnected = on_disconnected
        self.process.spawn(self._keep_connected())

    async def _keep_connected(self) -> None:
        network, failures = self.network, 0
        while True:
            await asyncio.sleep(network.delay_s(self.link))
            if network.running and self.link.whole:
                failures = 0
                old = network.clients.get(self.name)
                if old is not None:
                    old.cut("another client of this name", will=True)
                network.clients[self.name] = self
                self.session += 1
                self._lost = asyncio.Event()
                self._up.set()
                network.tell("connected", self.name, "", b"")
                for topic_filter in self.filters:
                    network.offer_retained(self, topic_filter)
                await self._on_connected()
                await self._lost.wait()
            ceiling = max(self._pace_s, min(BACKOFF_CAP_S, 2.0**failures))
            failures += 1
            await asyncio.sleep(network.random.uniform(0.0, ceiling))

    def cut(self, reason: str, *, will: bool) -> None:
        """The connection is gone, and what was on its way."""
        if not self.connected:
            return
        del self.network.clients[self.name]
        self._up.clear()
        self._lost.set()
        self.network.tell("disconnected", self.name, reason, b"")
        if will and self._will is not None:
            w = self._will
            self.network.take(self.name, w.topic, w.payload, retain=w.retain)
        if not self._stopped and not self.process.dead:
            self.process.call(self._on_disconnected, reason)

    def wants(self, topic: str) -> bool:
        wanted = self._wanted.get(topic)
        if wanted is None:
            wanted = self._wanted[topic] = any(_matches(f, topic) for f in self.filters)
        return wanted

    def arrive(self, session: int, incoming: Incoming) -> None:
        """A message comes out of the link."""
        if self.process.dead or self._stopped or session != self.session or not self.connected:
            return
        self.bytes_in += len(incoming.topic) + len(incoming.payload)
        self.network.tell("gets", self.name, incoming.topic, incoming.payload)
        self._on_message(incoming)

    async def subscribe(self, *topic_filters: str) -> None:
        self._check()
        for topic_filter in topic_filters:
            self.filters[topic_filter] = None
            self._wanted.clear()
            if self.connected:
                await asyncio.sleep(self.network.delay_s(self.link))
                if self.connected:
                    self.network.offer_retained(self, topic_filter)

    async def unsubscribe(self, *topic_filters: str) -> None:
        self._check()
        for topic_filter in topic_filters:
            self.filters.pop(topic_filter, None)
        self._wanted.clear()

    async def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        if len(payload) > MAX_PAYLOAD_BYTES:
            raise LocalProtocolError(f"{len(payload)} bytes for {topic}")
        async with self._window:
            while True:
                self._check()
                await self._up.wait()
                self._check()
                self.process.effect("publish")
                self.network.said(self.name, topic, payload)
                arrived = self.network.loop.create_future()
                self.network.loop.call_later(
                    self.network.delay_s(self.link),
                    self._reaches,
                    (self.session, topic, payload, retain),
                    arrived,
                    context=self.network.nobody,
                )
                if await arrived:
                    self.process.effect("acknowledgement")
                    if self.link.down:
                        return
                # Not acknowledged: it is sent again, and may so arrive twice.
                await asyncio.sleep(0.5)

    def _reaches(
        self, message: tuple[int, str, bytes, bool], arrived: asyncio.Future[bool]
    ) -> None:
        """A message comes to the broker, whether or not its sender lives still."""
        session, topic, payload, retain = message
        there = session == self.session and self.connected and self.link.up
        if there:
            self.bytes_out += len(topic) + len(payload)
            weather = self.network.weather
            if weather.loss and self.network.random.random() < weather.loss:
                self.network.tell("lost", self.name, topic, payload)
            else:
                self.network.take(self.name, topic, payload, retain=retain)
        if not arrived.done():
            arrived.set_result(there)

    def reconnect_within(self, seconds: float) -> None:
        self._pace_s = seconds

    async def stop(self, *, graceful: bool = True) -> None:
        self._stopped = True
        self._up.set()
        self.cut("stopped", will=not graceful)
        self.session += 1

    def _check(self) -> None:
        if self._stopped:
            raise TransportError("the transport was stopped")


@functools.lru_cache(maxsize=4096)
def _matches(topic_filter: str, topic: str) -> bool:
    ours, theirs = topic_filter.split("/"), topic.split("/")
    return len(ours) == len(theirs) and all(
        a in ("+", b) for a, b in zip(ours, theirs, strict=True)
    )
