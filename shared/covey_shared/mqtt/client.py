"""What services use: a client that keeps its connection, its subscriptions and its promises."""

import asyncio
import logging
import random
import ssl
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import replace

from covey_shared.errors import LocalProtocolError, TransportError
from covey_shared.mqtt.connection import Connection, Settings
from covey_shared.mqtt.url import BrokerUrl, parse_broker_url
from covey_shared.transport import MAX_PAYLOAD_BYTES, Incoming, Transport, Will

_log = logging.getLogger(__name__)

WINDOW = 8
"""Publishes in flight: just under 1 MiB of chunks, enough for 5 MB/s at 200 ms round-trip time."""


async def publish_all(
    transport: Transport, messages: Iterable[tuple[str, bytes]], *, window: int = WINDOW // 2
) -> None:
    """Publish (topic, payload) pairs, taking each from the iterable only when its turn comes.

    At most `window` are under way, so that a blob's frames are made as they are needed; the default
    leaves half of the transport's own window to other messages. Raises what `publish` raises.
    """
    rest = iter(messages)

    async def work() -> None:
        for topic, payload in rest:
            await transport.publish(topic, payload)

    tasks = [asyncio.create_task(work()) for _ in range(window)]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


class MqttTransport:
    """One MQTT client. Implements `transport.Transport`; see there for what is promised.

    broker: a URL or its parts. username, password: instead of the URL's. tls: the context to use;
    without one, mqtts:// verifies the broker against the system's authorities.
    session_s: for how long away the broker's queue of what came for us is of use; 0 for no queue.
    What it kept for longer, or for another process of this client id, is discarded unread but for what
    the broker sends at once: old messages would hold up the new ones.
    rng: draws the back-off's jitter; a seeded one makes a test repeatable.
    backoff_base_s, backoff_cap_s: after n failures in a row it waits for a time drawn uniformly
    from 0 to min(cap, base * 2**n), or to what `reconnect_within` said if that is more: at whatever
    moment a broker comes back, its clients then do not all come at once. A connection that ends sooner
    than its back-off counts as a failure: two clients that evict each other slow down too.
    connect_timeout_s: for DNS, TCP, TLS and the broker's answer together.
    window: publishes in flight; further ones wait in `publish`, and nothing of them is held here.
    """

    def __init__(
        self,
        broker: BrokerUrl | str,
        client_id: str,
        *,
        username: str | None = None,
        password: str | None = None,
        tls: ssl.SSLContext | None = None,
        will: Will | None = None,
        keepalive_s: int = 60,
        session_s: float = 0.0,
        rng: random.Random | None = None,
        backoff_base_s: float = 1.0,
        backoff_cap_s: float = 60.0,
        connect_timeout_s: float = 15.0,
        window: int = WINDOW,
    ) -> None:
        url = parse_broker_url(broker) if isinstance(broker, str) else broker
        if not client_id or keepalive_s < 1 or window < 1:
            raise LocalProtocolError("an MQTT client needs a client id, a keep-alive and a window")
        if will is not None:
            _check_message(will.topic, will.payload)
        if tls is None and url.tls:
            tls = ssl.create_default_context()
        self._settings = Settings(
            url=url,
            client_id=client_id,
            username=username if username is not None else url.username,
            password=password if password is not None else url.password,
            tls=tls,
            will=will,
            keepalive_s=keepalive_s,
            clean_session=session_s <= 0,
            timeout_s=connect_timeout_s,
        )
        self._rng = rng if rng is not None else random.SystemRandom()
        self._backoff_base_s = backoff_base_s
        self._backoff_cap_s = backoff_cap_s
        self._pace_s = 0.0
        self._window = asyncio.Semaphore(window)
        # a dict for its order: subscriptions are renewed in the order they were made
        self._filters: dict[str, None] = {}
        self._session_s = session_s
        # Unsubscribed from while there was no connection: a session that was kept has them still.
        self._dropped: dict[str, None] = {}
        self._lost_at_s: float | None = None  # when a connection was lost; None before the first
        self._current: Connection | None = None  # being opened, or open
        self._standing: Connection | None = None  # open, with all subscriptions renewed
        self._changed = asyncio.Event()  # there is a standing connection, or we stopped
        self._news = asyncio.Event()  # a connection that on_connected was not told of
        self._tasks: list[asyncio.Task[None]] = []
        self._stopped = False
        self.bytes_out = 0
        """Topics and payloads handed to the broker, repeats included."""
        self.bytes_in = 0
        """Topics and payloads that came from the broker, dropped ones included."""

    @property
    def connected(self) -> bool:
        """There is a connection and all subscriptions stand."""
        return self._standing is not None

    async def start(
        self,
        on_message: Callable[[Incoming], None],
        on_connected: Callable[[], Awaitable[None]],
        on_disconnected: Callable[[str], None],
    ) -> None:
        """Begin connecting; see `Transport.start`.

        Exceptions from the callbacks are logged and change nothing. If the connection is lost while
        `on_connected` runs, it may finish, and is called again after the next connection.
        """
        if self._tasks or self._stopped:
            raise LocalProtocolError("a transport starts once; make another one")
        self._on_message = on_message
        self._on_connected = on_connected
        self._on_disconnected = on_disconnected
        self._tasks = [
            asyncio.create_task(self._keep_connected()),
            asyncio.create_task(self._tell_of_connections()),
        ]

    async def subscribe(self, *topic_filters: str) -> None:
        """Subscribe; see `Transport.subscribe`.

        With a connection, returns once the broker has granted it; raises TransportError naming the
        filters that it refuses. Without one, returns at once: the subscriptions then stand before
        `on_connected` is told, and before any waiting publish goes out.
        """
        self._check_running()
        _check_filters(topic_filters)
        self._filters |= dict.fromkeys(topic_filters)
        if topic_filters and self._standing is not None:
            refused = await self._standing.subscribe(topic_filters)
            if refused:
                for topic_filter in refused:
                    self._filters.pop(topic_filter, None)
                raise TransportError(self._refusal(refused))

    async def unsubscribe(self, *topic_filters: str) -> None:
        """Undo `subscribe`."""
        self._check_running()
        for topic_filter in topic_filters:
            self._filters.pop(topic_filter, None)
        if not topic_filters:
            return
        standing = self._standing
        if standing is not None:
            await standing.unsubscribe(topic_filters)
        if not self._settings.clean_session and (standing is None or standing.lost.done()):
            self._dropped |= dict.fromkeys(topic_filters)

    async def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        """Publish with QoS 1; see `Transport.publish`."""
        _check_message(topic, payload)
        async with self._window:
            acknowledged = False
            while not acknowledged:
                connection = await self._wait_for_connection()
                self.bytes_out += len(topic) + len(payload)
                acknowledged = await connection.publish(topic, payload, retain)

    def reconnect_within(self, seconds: float) -> None:
        """Spread what follows a lost connection; see `Transport.reconnect_within`."""
        self._pace_s = seconds

    async def stop(self, *, graceful: bool = True) -> None:
        """Disconnect for good; pending publishes raise TransportError. See `Transport.stop`."""
        self._stopped = True
        self._standing = None
        self._changed.set()
        if self._current is not None:
            await self._current.close(graceful=graceful)
        # stop() may be called from within on_connected
        tasks = [task for task in self._tasks if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _keep_connected(self) -> None:
        loop = asyncio.get_running_loop()
        failures = 0
        while True:
            self._current = Connection(self._settings, self._receive)
            stood_since_s: float | None = None
            try:
                reason = await self._establish(self._current)
                if reason is None:
                    stood_since_s = loop.time()
                    reason = await asyncio.shield(self._current.lost)
            finally:
                self._standing = None
                if stood_since_s is not None:
                    self._lost_at_s = loop.time()
                await self._current.close(graceful=False)
            if self._stopped:
                return
            self._changed.clear()
            if stood_since_s is not None and loop.time() - stood_since_s > self._ceiling_s(
                failures
            ):
                failures = 0
            delay_s = self._rng.uniform(0.0, max(self._pace_s, self._ceiling_s(failures)))
            failures += 1
            self._report(f"{reason}; next try in {delay_s:.{0 if delay_s >= 10 else 1}f} s")
            await asyncio.sleep(delay_s)

    async def _establish(self, connection: Connection) -> str | None:
        """Open a connection and renew the subscriptions -> why that failed, or None."""
        try:
            await connection.open()
            if connection.session_present and self._outdated():
                connection = await self._without_session(connection)
            async with asyncio.timeout(self._settings.timeout_s):
                await self._agree(connection)
        except TransportError as error:
            return str(error)
        except TimeoutError:
            return f"broker at {self._settings.url.address} does not answer subscriptions"
        if connection.lost.done():
            return connection.lost.result()
        self._standing = connection
        self._changed.set()
        self._news.set()
        return None

    def _outdated(self) -> bool:
        """Whether what the broker kept for us is of no use any more."""
        away_s = self._lost_at_s
        return away_s is None or asyncio.get_running_loop().time() - away_s > self._session_s

    async def _without_session(self, connection: Connection) -> Connection:
        """Have the broker forget what it kept -> another connection. Raises TransportError."""
        await connection.close(graceful=True)
        for clean in (True, False):
            connection = Connection(replace(self._settings, clean_session=clean), self._receive)
            self._current = connection
            await connection.open()
            if clean:
                await connection.close(graceful=True)
        return connection

    async def _agree(self, connection: Connection) -> None:
        """Have the broker send what is wanted, and nothing else. All is subscribed to again, whatever it
        kept: what it retains then comes again."""
        while not connection.lost.done():
            # more may be asked for, or less, while we wait for an answer
            if wanted := [f for f in self._filters if f not in connection.asked]:
                if refused := await connection.subscribe(wanted):
                    _log.error("%s", self._refusal(refused))
                continue
            kept = self._dropped if connection.session_present else {}
            unwanted = [f for f in (*kept, *connection.asked) if f not in self._filters]
            if unwanted:
                await connection.unsubscribe(unwanted)
            if connection.lost.done():
                return
            self._dropped = {f: None for f in self._dropped if f not in unwanted and unwanted}
            if not unwanted:
                return

    async def _tell_of_connections(self) -> None:
        """Call on_connected after each connection, never twice at a time."""
        while True:
            await self._news.wait()
            self._news.clear()
            try:
                await self._on_connected()
            except Exception:
                _log.exception("on_connected failed")

    async def _wait_for_connection(self) -> Connection:
        while True:
            self._check_running()
            standing = self._standing
            if standing is None:
                await self._changed.wait()
            elif standing.lost.done():
                # `_keep_connected` has yet to notice, and must get a chance to
                await asyncio.sleep(0)
            else:
                return standing

    def _ceiling_s(self, failures: int) -> float:
        # 2.0**1024 would overflow
        return min(self._backoff_cap_s, self._backoff_base_s * 2.0 ** min(failures, 64))

    def _receive(self, message: Incoming) -> None:
        self.bytes_in += len(message.topic) + len(message.payload)
        if len(message.payload) > MAX_PAYLOAD_BYTES:
            _log.warning(
                "dropped a message of %d bytes on %s: at most %d",
                len(message.payload),
                message.topic,
                MAX_PAYLOAD_BYTES,
            )
            return
        try:
            self._on_message(message)
        except Exception:
            _log.exception("on_message failed for a message on %s", message.topic)

    def _report(self, reason: str) -> None:
        try:
            self._on_disconnected(reason)
        except Exception:
            _log.exception("on_disconnected failed")

    def _refusal(self, refused: list[str]) -> str:
        return (
            f"broker at {self._settings.url.address} refuses the subscription to "
            f"{', '.join(refused)}: check its access rules for {self._settings.username!r}"
        )

    def _check_running(self) -> None:
        if self._stopped:
            raise TransportError("the transport was stopped")


def _check_message(topic: str, payload: bytes) -> None:
    if len(payload) > MAX_PAYLOAD_BYTES:
        raise LocalProtocolError(
            f"payload of {len(payload)} bytes for {topic}: at most {MAX_PAYLOAD_BYTES}, "
            "split it into chunks"
        )
    if not topic or len(topic.encode()) > 0xFFFF or any(c in topic for c in "+#\0"):
        raise LocalProtocolError(f"{topic[:80]!r} is not a topic that can be published to")


def _check_filters(topic_filters: Iterable[str]) -> None:
    for topic_filter in topic_filters:
        levels = topic_filter.split("/")
        wild = any(len(level) > 1 and ("+" in level or "#" in level) for level in levels)
        if not topic_filter or "\0" in topic_filter or wild or "#" in levels[:-1]:
            raise LocalProtocolError(f"{topic_filter!r} is not a topic filter")
