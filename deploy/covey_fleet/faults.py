"""Devices that vanish: which, in which round, at which moment, all from one seed.

A `FaultyTransport` stands between a device and its connection, so the device itself is the code of
the field, and what the coordinator sees is what it would see of a device that lost its power: no
goodbye, half an upload, a vote that never comes.
"""

import asyncio
import enum
import math
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import lru_cache

from covey_shared import chunks, wire
from covey_shared.messages import (
    CheckIn,
    DeviceId,
    MaskedUpdate,
    Message,
    Reveal,
    RosterVote,
    Shares,
    ViewVote,
)
from covey_shared.mqtt import MqttTransport
from covey_shared.topics import Topics
from covey_shared.transport import Incoming


class Moment(enum.Enum):
    """When a device vanishes."""

    BEFORE_CHECK_IN = "before its check-in"
    AFTER_CHECK_IN = "after its check-in"
    BEFORE_SHARES = "before its shares"
    AFTER_SHARES = "after its shares"
    BEFORE_ROSTER_VOTE = "before its roster vote"
    AFTER_ROSTER_VOTE = "after its roster vote"
    BEFORE_UPDATE = "before its update"
    IN_UPLOAD = "in mid-upload"
    AFTER_UPLOAD = "after its upload"
    BEFORE_VIEW_VOTE = "before its view vote"
    BEFORE_REVEAL = "before its reveal"
    AFTER_REVEAL = "after its reveal"


MOMENTS = tuple(Moment)

_BEFORE: dict[type[Message], Moment] = {
    CheckIn: Moment.BEFORE_CHECK_IN,
    Shares: Moment.BEFORE_SHARES,
    RosterVote: Moment.BEFORE_ROSTER_VOTE,
    MaskedUpdate: Moment.BEFORE_UPDATE,
    ViewVote: Moment.BEFORE_VIEW_VOTE,
    Reveal: Moment.BEFORE_REVEAL,
}
_AFTER: dict[type[Message], Moment] = {
    CheckIn: Moment.AFTER_CHECK_IN,
    Shares: Moment.AFTER_SHARES,
    RosterVote: Moment.AFTER_ROSTER_VOTE,
    Reveal: Moment.AFTER_REVEAL,
}


@dataclass(frozen=True, slots=True)
class Vanished:
    """What happened, for the report."""

    device: DeviceId
    round: int
    moment: Moment


@dataclass(frozen=True)
class FaultPlan:
    """Who vanishes when. dropout: the share of the devices that vanish in each round.

    Of n devices, n * dropout vanish, rounded up or down by chance so that each device's probability
    is exactly `dropout`. The same seed gives the same choices, in whatever process they are made.
    moments: those that chance chooses from.
    """

    seed: int
    dropout: float
    devices: tuple[DeviceId, ...]
    moments: tuple[Moment, ...] = MOMENTS

    def fate(self, device: DeviceId, round_id: int) -> Moment | None:
        """The moment at which this device vanishes in this round; None: it stays."""
        return _fates(self, round_id).get(device)


@lru_cache(maxsize=16)
def _fates(plan: FaultPlan, round_id: int) -> dict[DeviceId, Moment]:
    chance = random.Random(f"{plan.seed}/{round_id}")  # noqa: S311 - a simulation's dice
    expected = len(plan.devices) * plan.dropout
    count = math.floor(expected + chance.random())
    return {
        device: chance.choice(plan.moments)
        for device in chance.sample(plan.devices, min(count, len(plan.devices)))
    }


class FaultyTransport:
    """A device's transport, until it is time to vanish. Implements `covey_shared`'s Transport.

    vanish: told once, at the moment. From then on nothing more gets out: whoever is about to
    publish waits for ever, until the device's tasks are cancelled or its process ends.
    """

    def __init__(
        self,
        inner: MqttTransport,
        topics: Topics,
        device: DeviceId,
        plan: FaultPlan,
        vanish: Callable[[Vanished], None],
    ) -> None:
        self._inner = inner
        self._device = device
        self._outbox, self._upload = topics.outbox(device), topics.upload(device)
        self._plan = plan
        self._vanish = vanish
        self._round = 0
        self._fate: Moment | None = None
        self._chunks = self._chunks_begun = self._chunks_sent = 0
        self._gone = False

    @property
    def bytes_in(self) -> int:
        """Bytes received, as the inner transport counts them."""
        return self._inner.bytes_in

    @property
    def bytes_out(self) -> int:
        """Bytes sent, as the inner transport counts them."""
        return self._inner.bytes_out

    async def start(
        self,
        on_message: Callable[[Incoming], None],
        on_connected: Callable[[], Awaitable[None]],
        on_disconnected: Callable[[str], None],
    ) -> None:
        """See `Transport.start`."""
        await self._inner.start(on_message, on_connected, on_disconnected)

    async def subscribe(self, *topic_filters: str) -> None:
        """See `Transport.subscribe`."""
        await self._inner.subscribe(*topic_filters)

    async def unsubscribe(self, *topic_filters: str) -> None:
        """See `Transport.unsubscribe`."""
        await self._inner.unsubscribe(*topic_filters)

    def reconnect_within(self, seconds: float) -> None:
        """See `Transport.reconnect_within`."""
        self._inner.reconnect_within(seconds)

    async def stop(self, *, graceful: bool = True) -> None:
        """See `Transport.stop`."""
        await self._inner.stop(graceful=graceful)

    async def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        """Publish, unless the device is gone, or goes now."""
        if topic == self._upload:
            await self._publish_chunk(topic, payload)
            return
        message = wire.decode(payload).message if topic == self._outbox else None
        if isinstance(message, CheckIn):
            self._round = message.round
            self._fate = self._plan.fate(self._device, message.round)
        if isinstance(message, MaskedUpdate):
            self._chunks = chunks.n_chunks(message.payload_bytes)
            self._chunks_begun = self._chunks_sent = 0
        await self._reach(_BEFORE.get(type(message)) if message else None)
        await self._inner.publish(topic, payload, retain=retain)
        await self._reach(_AFTER.get(type(message)) if message else None)

    async def _publish_chunk(self, topic: str, payload: bytes) -> None:
        # Of a single chunk nothing comes, of many the first half.
        half_way = self._chunks_begun >= self._chunks // 2
        await self._reach(Moment.IN_UPLOAD if half_way else None)
        self._chunks_begun += 1
        await self._inner.publish(topic, payload)
        self._chunks_sent += 1
        await self._reach(Moment.AFTER_UPLOAD if self._chunks_sent >= self._chunks else None)

    async def _reach(self, moment: Moment | None) -> None:
        """Vanish if this is the moment; if the device is gone already, nobody gets further."""
        if not self._gone and moment is not None and moment is self._fate:
            self._gone = True
            self._vanish(Vanished(self._device, self._round, moment))
        if self._gone:
            await asyncio.get_running_loop().create_future()
