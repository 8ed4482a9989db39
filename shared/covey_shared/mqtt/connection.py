"""One connection to a broker: paho-mqtt's codec on the asyncio event loop.

A `Connection` is used once; `client.MqttTransport` makes the next one. So paho's own reconnecting,
queueing and threads stay out of play, and no state of a dead connection can leak into a new one.
"""

import asyncio
import contextlib
import logging
import socket
import ssl
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from paho.mqtt import client as paho
from paho.mqtt.enums import CallbackAPIVersion

from covey_shared.errors import TransportError
from covey_shared.mqtt.sockets import connect, explain
from covey_shared.mqtt.url import BrokerUrl
from covey_shared.transport import Incoming, Will

_log = logging.getLogger(__name__)

MAX_PACKET_BYTES = 1 << 20
"""A packet that is announced as larger is not even read: the connection ends instead. paho would
hold several copies of what may be 256 MiB."""

# What paho may read for one client before the others get their turn.
_READS_PER_TURN = 64
_GOODBYE_S = 5.0


@dataclass(frozen=True, slots=True)
class Settings:
    """What one client's connections have in common. timeout_s: until the broker lets us in."""

    url: BrokerUrl
    client_id: str
    username: str | None
    password: str | None = field(repr=False)
    tls: ssl.SSLContext | None
    will: Will | None
    keepalive_s: int
    clean_session: bool
    timeout_s: float


class Connection:
    """One attempt to connect, and the connection it becomes.

    receive: called with every message; must not raise.
    lost: resolves to the reason when the connection ends, in whatever way.
    asked: the filters that were subscribed to on this connection, granted or not.
    session_present: the broker kept what a connection before left behind.
    """

    def __init__(self, settings: Settings, receive: Callable[[Incoming], None]) -> None:
        self._settings = settings
        self._receive = receive
        self._loop = asyncio.get_running_loop()
        self._socket: socket.socket | None = None
        # None: the broker let us in; otherwise why it did not
        self._admission: asyncio.Future[str | None] = self._loop.create_future()
        self._answers: dict[int, asyncio.Future[Any]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self.lost: asyncio.Future[str] = self._loop.create_future()
        self.asked: set[str] = set()
        self.session_present = False
        self._client = self._make_client()

    async def open(self) -> None:
        """Connect and log in. Raises TransportError with a reason for the operator."""
        url = self._settings.url
        try:
            async with asyncio.timeout(self._settings.timeout_s):
                self._socket = await connect(url, self._settings.tls)
                self._client.reconnect()
                self._loop.add_reader(self._socket, self._readable)
                self._watch()
                refusal = await self._admission
        except TimeoutError as error:
            port = "address" if self._settings.tls is None else "address, and its TLS port,"
            raise TransportError(
                f"no answer from {url.address} within {self._settings.timeout_s:g} s; "
                f"is this the right {port} and no firewall in between?"
            ) from error
        except OSError as error:
            raise TransportError(explain(error, url)) from error
        if refusal is not None:
            raise TransportError(refusal)

    async def subscribe(self, topic_filters: Iterable[str]) -> list[str]:
        """Subscribe with QoS 1 -> the filters refused. Returns early if the connection is lost."""
        wanted = list(topic_filters)
        self.asked.update(wanted)
        granted: list[bool] | None = await self._answer(
            lambda: self._client.subscribe([(topic_filter, 1) for topic_filter in wanted])
        )
        return [f for f, ok in zip(wanted, granted or [], strict=False) if not ok]

    async def unsubscribe(self, topic_filters: Iterable[str]) -> None:
        """Unsubscribe. Returns early if the connection is lost."""
        wanted = list(topic_filters)
        self.asked.difference_update(wanted)
        await self._answer(lambda: self._client.unsubscribe(wanted))

    async def publish(self, topic: str, payload: bytes, retain: bool) -> bool:
        """Publish with QoS 1 -> whether the broker acknowledged it before the connection ended."""
        return bool(
            await self._answer(lambda: self._client.publish(topic, payload, qos=1, retain=retain))
        )

    async def close(self, *, graceful: bool) -> None:
        """End the connection. graceful: say goodbye first, so that the will is not published."""
        if graceful and self._admission.done() and not self.lost.done():
            self._client.disconnect()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(asyncio.shield(self.lost), _GOODBYE_S)
        self._drop("we closed the connection")

    def _make_client(self) -> Any:
        settings = self._settings
        client: Any = paho.Client(
            CallbackAPIVersion.VERSION2,
            client_id=settings.client_id,
            clean_session=settings.clean_session,
            protocol=paho.MQTTv311,
            # else it reconnects by itself, and blocks, when a broker speaks another version
            reconnect_on_failure=False,
        )
        if settings.username is not None:
            client.username_pw_set(settings.username, settings.password)
        if settings.will is not None:
            will = settings.will
            client.will_set(will.topic, will.payload, qos=1, retain=will.retain)
        # no limit: `MqttTransport` has its own
        client.max_inflight_messages_set(0)
        client.on_connect = self._on_connect
        client.on_disconnect = self._on_disconnect
        client.on_message = self._on_message
        client.on_publish = lambda c, u, mid, reason, properties: self._resolve(mid, True)
        client.on_unsubscribe = lambda c, u, mid, reasons, properties: self._resolve(mid, True)
        client.on_subscribe = lambda c, u, mid, reasons, properties: self._resolve(
            mid, [not reason.is_failure for reason in reasons]
        )
        client.on_socket_close = lambda c, u, sock: self._unwatch(sock)
        client.on_socket_register_write = self._on_want_write
        client.on_socket_unregister_write = self._on_wrote
        # paho would connect by blocking; it takes the socket that is already open instead
        client._create_socket = lambda: self._socket
        client.connect_async(settings.url.host, settings.url.port, settings.keepalive_s)
        return client

    async def _answer(self, send: Callable[[], tuple[int, int | None]]) -> Any:
        """Send a packet, wait for the broker's answer; None if the connection is lost first."""
        if self.lost.done():
            return None
        result, mid = send()
        if result != paho.MQTT_ERR_SUCCESS or mid is None:
            self._drop(f"MQTT client failed to send: {paho.error_string(result)}")
            return None
        answer: asyncio.Future[Any] = self._loop.create_future()
        self._answers[mid] = answer
        try:
            return await answer
        finally:
            del self._answers[mid]

    def _resolve(self, mid: int, value: Any) -> None:
        answer = self._answers.get(mid)
        if answer is not None and not answer.done():
            answer.set_result(value)

    def _on_connect(self, client: Any, userdata: Any, flags: Any, reason: Any, more: Any) -> None:
        if self._admission.done():
            return
        settings = self._settings
        where = f"broker at {settings.url.address}"
        name = str(reason)
        refusal: str | None = None
        if name in ("Bad user name or password", "Not authorized"):
            refusal = f"{where} refuses user {settings.username!r}; check user name and password"
        elif name == "Client identifier not valid":
            refusal = f"{where} refuses the client id {settings.client_id!r}; choose another"
        elif reason.is_failure:
            refusal = f"{where} refuses the connection: {name.lower()}"
        self.session_present = bool(flags.session_present)
        self._admission.set_result(refusal)

    def _on_disconnect(
        self, client: Any, userdata: Any, flags: Any, reason: Any, more: Any
    ) -> None:
        address = self._settings.url.address
        if str(reason) == "Keep alive timeout":
            self._drop(f"broker at {address} stopped answering")
        elif not self._admission.done():
            wanted = "a TLS client certificate" if self._settings.tls else "TLS (mqtts://)"
            self._drop(
                f"{address} closed the connection before letting us in; "
                f"is it an MQTT broker, and does it want {wanted}?"
            )
        else:
            self._drop(
                f"broker at {address} closed the connection; if this goes on, another client "
                f"may be using the client id {self._settings.client_id!r}"
            )

    def _on_message(self, client: Any, userdata: Any, message: Any) -> None:
        try:
            topic = message.topic
        except UnicodeDecodeError:
            _log.warning("dropped a message whose topic is not UTF-8")
            return
        self._receive(Incoming(topic, bytes(message.payload), bool(message.retain)))

    # The event loop's side. A closed socket has no descriptor to remove, and paho may still call
    # with one when the garbage collector gets it.

    def _on_want_write(self, client: Any, userdata: Any, sock: socket.socket) -> None:
        if sock.fileno() >= 0:
            self._loop.add_writer(sock, self._guarded, self._client.loop_write)

    def _on_wrote(self, client: Any, userdata: Any, sock: socket.socket) -> None:
        if sock.fileno() >= 0:
            self._loop.remove_writer(sock)

    def _unwatch(self, sock: socket.socket) -> None:
        if sock.fileno() >= 0:
            self._loop.remove_reader(sock)
            self._loop.remove_writer(sock)

    def _readable(self) -> None:
        self._guarded(self._read)

    def _watch(self) -> None:
        """Let paho see the time: it pings when it was quiet for long, and minds the answer."""
        if not self.lost.done():
            self._timer = self._loop.call_later(
                min(self._settings.keepalive_s / 4, 15.0), self._watch
            )
            self._guarded(self._client.loop_misc)

    def _read(self) -> None:
        for _ in range(_READS_PER_TURN):
            self._client.loop_read()
            if self.lost.done():
                return
            packet = self._client._in_packet
            if packet["have_remaining"] and packet["remaining_length"] > MAX_PACKET_BYTES:
                self._drop(
                    f"broker at {self._settings.url.address} sends a packet of "
                    f"{packet['remaining_length']} bytes, more than {MAX_PACKET_BYTES}; lower its "
                    "maximum packet size, and clear the retained message if it is one"
                )
                return
            # What TLS has decrypted already does not wake the event loop.
            if not (isinstance(self._socket, ssl.SSLSocket) and self._socket.pending()):
                return
        self._loop.call_soon(self._readable)

    def _guarded(self, step: Callable[[], object]) -> None:
        """Whatever a broker's bytes make paho raise ends this connection, not the event loop."""
        if self.lost.done():
            return
        try:
            step()
        except Exception as error:
            _log.exception("MQTT client failed")
            self._drop(f"broker at {self._settings.url.address}: protocol error ({error})")

    def _drop(self, reason: str) -> None:
        """Close the socket and tell everybody who waits. The first reason counts."""
        if self._timer is not None:
            self._timer.cancel()
        if self._socket is not None:
            self._unwatch(self._socket)
            self._socket.close()
        if self.lost.done():
            return
        self.lost.set_result(reason)
        if not self._admission.done():
            self._admission.set_result(reason)
        for answer in self._answers.values():
            if not answer.done():
                answer.set_result(None)
