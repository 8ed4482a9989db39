"""The seam between the services and MQTT.

Services see only this Protocol; `covey_shared.mqtt` implements it with paho-mqtt, tests with an
in-memory network. What a transport promises is little, because the protocol asks for little: a
message arrives once, more than once, or not at all, in any order.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol

# AWS IoT refuses packets above 128 KiB and mosquitto may be configured tighter; paho would re-send
# an oversize publish for ever, so the limit is ours to keep, on both sides.
MAX_PAYLOAD_BYTES = 120 * 1024


@dataclass(frozen=True, slots=True)
class Incoming:
    """One message from the broker. retained: it was kept by the broker from before."""

    topic: str
    payload: bytes
    retained: bool = False


@dataclass(frozen=True, slots=True)
class Will:
    """What the broker publishes for us when our connection dies."""

    topic: str
    payload: bytes
    retain: bool = True


class Transport(Protocol):
    """One client's connection. All methods are called from one asyncio event loop."""

    async def start(
        self,
        on_message: Callable[[Incoming], None],
        on_connected: Callable[[], Awaitable[None]],
        on_disconnected: Callable[[str], None],
    ) -> None:
        """Begin connecting, and keep at it with exponential back-off and full jitter until `stop`.

        Returns at once. `on_message` runs on the event loop and must be quick; `on_connected` is
        awaited after every (re)connection, once all earlier subscriptions stand again;
        `on_disconnected` is told a plain reason, also of every attempt that failed.
        """

    async def subscribe(self, *topic_filters: str) -> None:
        """Subscribe with QoS 1, and again after every reconnection.

        Without a connection it returns at once. In either case a publish that begins after it
        returned reaches the broker after the subscription stands.
        """

    async def unsubscribe(self, *topic_filters: str) -> None:
        """Undo `subscribe`."""

    async def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        """Hand one message to the broker with QoS 1; returns when it was acknowledged.

        Waits (bounded by nothing but `stop`) while there is no connection; raises
        LocalProtocolError if the payload exceeds MAX_PAYLOAD_BYTES, TransportError once stopped.
        """

    def reconnect_within(self, seconds: float) -> None:
        """From now on, spread what follows a lost connection over at least this long.

        So that a fleet that lost its broker does not come back at one moment. 0, as at the beginning,
        leaves it at the usual back-off.
        """

    async def stop(self, *, graceful: bool = True) -> None:
        """Disconnect. graceful=False drops the socket, so that the broker publishes the will."""
