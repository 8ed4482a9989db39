"""A network in memory: a broker's behaviour without a broker, for services in one event loop.

Each client gets its messages one by one, in order and soon. `Network.tamper` sees every delivery and
says what becomes of it: drop, change, repeat, or hold back for others to overtake. Clients may be cut
off and come back; retained messages and wills work as brokers' do. Acknowledgement means that the
network has a message, not that anyone else does.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field, replace

from covey_shared.errors import LocalProtocolError, TransportError
from covey_shared.transport import MAX_PAYLOAD_BYTES, Incoming, Will

Tamper = Callable[["Delivery"], Iterable["Delivery"]]


@dataclass(frozen=True)
class Delivery:
    """One message on its way to one client. delay_s: for others to overtake it."""

    sender: str
    receiver: str
    incoming: Incoming
    delay_s: float = 0.0

    @property
    def topic(self) -> str:
        return self.incoming.topic

    def changed(self, payload: bytes) -> "Delivery":
        return replace(self, incoming=replace(self.incoming, payload=payload))


@dataclass
class Network:
    """The broker. log: every message that was published, as (sender, topic, payload)."""

    tamper: Tamper = lambda delivery: (delivery,)
    retained: dict[str, bytes] = field(default_factory=dict)
    clients: dict[str, "MemoryTransport"] = field(default_factory=dict)
    log: list[tuple[str, str, bytes]] = field(default_factory=list)
    down: bool = False

    def client(self, name: str, will: Will | None = None) -> "MemoryTransport":
        return MemoryTransport(self, name, will)

    def publish(self, sender: str, topic: str, payload: bytes, *, retain: bool = False) -> None:
        """From a client, or from nobody."""
        self.log.append((sender, topic, payload))
        if retain:
            self.retained.pop(topic, None)
            if payload:
                self.retained[topic] = payload
        for client in list(self.clients.values()):
            if client.wants(topic):
                self.deliver(Delivery(sender, client.name, Incoming(topic, payload)))

    def deliver(self, delivery: Delivery) -> None:
        for changed in self.tamper(delivery):
            client = self.clients.get(changed.receiver)
            if client is not None:
                client.take(changed)

    async def go_down(self) -> None:
        """The broker dies, and loses what it retained."""
        self.down = True
        self.retained.clear()
        for client in list(self.clients.values()):
            client.cut("the broker went away", will=False)

    async def come_back(self) -> None:
        self.down = False


class MemoryTransport:
    """One client. Implements `transport.Transport`. reconnect_s: after it was cut off."""

    def __init__(self, network: Network, name: str, will: Will | None) -> None:
        self.network, self.name, self._will = network, name, will
        self.filters: list[str] = []
        self.reconnect_s = 0.05
        self.pace_s = 0.0  # what it was told to wait; noted, not done
        self.held = False  # cut off until told otherwise
        self.bytes_in = self.bytes_out = 0
        self._up = asyncio.Event()
        self._lost = asyncio.Event()
        self._stopped = False
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(
        self,
        on_message: Callable[[Incoming], None],
        on_connected: Callable[[], Awaitable[None]],
        on_disconnected: Callable[[str], None],
    ) -> None:
        self._on_message, self._on_connected = on_message, on_connected
        self._on_disconnected = on_disconnected
        self._spawn(self._keep_connected())

    async def _keep_connected(self) -> None:
        while True:
            while self.held or self.network.down:
                await asyncio.sleep(0.01)
            self.network.clients[self.name] = self
            self._lost = asyncio.Event()
            self._up.set()
            for topic_filter in self.filters:
                self._retained(topic_filter)
            await self._on_connected()
            await self._lost.wait()
            await asyncio.sleep(self.reconnect_s)

    def cut(
        self, reason: str = "connection lost", *, will: bool = True, hold: bool = False
    ) -> None:
        """The connection dies; what was on its way is lost."""
        if self.network.clients.pop(self.name, None) is None:
            return
        self.held = hold
        self._up.clear()
        if will and self._will is not None:
            w = self._will
            self.network.publish(self.name, w.topic, w.payload, retain=w.retain)
        if not self._stopped:
            self._on_disconnected(reason)
        self._lost.set()

    def wants(self, topic: str) -> bool:
        return any(_matches(f, topic) for f in self.filters)

    def take(self, delivery: Delivery) -> None:
        connection = self._lost  # a message does not outlive its connection
        loop = asyncio.get_running_loop()
        if delivery.delay_s:
            loop.call_later(delivery.delay_s, self._arrive, connection, delivery.incoming)
        else:
            loop.call_soon(self._arrive, connection, delivery.incoming)

    def _arrive(self, connection: asyncio.Event, incoming: Incoming) -> None:
        if self._up.is_set() and not self._stopped and connection is self._lost:
            self.bytes_in += len(incoming.topic) + len(incoming.payload)
            self._on_message(incoming)

    async def subscribe(self, *topic_filters: str) -> None:
        self._check()
        for topic_filter in topic_filters:
            if topic_filter not in self.filters:
                self.filters.append(topic_filter)
            if self._up.is_set():
                self._retained(topic_filter)

    def _retained(self, topic_filter: str) -> None:
        for topic, payload in list(self.network.retained.items()):
            if _matches(topic_filter, topic):
                self.network.deliver(Delivery("", self.name, Incoming(topic, payload, True)))

    async def unsubscribe(self, *topic_filters: str) -> None:
        self._check()
        self.filters = [f for f in self.filters if f not in topic_filters]

    async def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        if len(payload) > MAX_PAYLOAD_BYTES:
            raise LocalProtocolError(f"{len(payload)} bytes for {topic}")
        self._check()
        while not self._up.is_set():
            await asyncio.sleep(0.005)
            self._check()
        await asyncio.sleep(0)
        self._check()
        self.bytes_out += len(topic) + len(payload)
        self.network.publish(self.name, topic, payload, retain=retain)

    def reconnect_within(self, seconds: float) -> None:
        self.pace_s = seconds

    async def stop(self, *, graceful: bool = True) -> None:
        self._stopped = True
        self.cut("stopped", will=not graceful)
        for task in list(self._tasks):
            task.cancel()

    def _check(self) -> None:
        if self._stopped:
            raise TransportError("the transport was stopped")

    def _spawn(self, work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _matches(topic_filter: str, topic: str) -> bool:
    ours, theirs = topic_filter.split("/"), topic.split("/")
    if ours[-1] == "#":
        return theirs[: len(ours) - 1] == ours[:-1]
    return len(ours) == len(theirs) and all(
        a in ("+", b) for a, b in zip(ours, theirs, strict=True)
    )
