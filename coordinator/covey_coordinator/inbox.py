"""What waits for the coordinator's attention during a round, bounded per device and in all.

A device that talks too much loses its own messages and nobody else's; what mattered is repeated.
"""

import asyncio
import logging
from collections import Counter, deque
from dataclasses import dataclass

from covey_shared.messages import DeviceId

log = logging.getLogger("covey.coordinator")

MAX_PER_DEVICE = 32
"""Of an honest device at most a handful wait: one for each phase, and some requests for chunks."""

MAX_BYTES = 64 << 20
"""Of all devices together. A full cohort's shares are a quarter of it."""

OVERHEAD_BYTES = 300
"""What an event takes beside its bytes: anybody whom the broker lets in may send one byte in any name."""

MAX_PRESENCES = 100_000
"""Names of whom word waits, as many as the registry has room for. Of more it is dropped: it is a hint."""


@dataclass(frozen=True, slots=True)
class Heard:
    """A message from a device's outbox."""

    device: DeviceId
    data: bytes


@dataclass(frozen=True, slots=True)
class Uploaded:
    """All chunks of a device's update are here."""

    device: DeviceId


@dataclass(frozen=True, slots=True)
class Presence:
    """A device came or went."""

    device: DeviceId
    online: bool


Event = Heard | Uploaded | Presence


class Inbox:
    """First in, first out. All methods are called from one event loop."""

    def __init__(self) -> None:
        self._events: deque[Heard | Uploaded | DeviceId] = deque()
        self._per_device: Counter[DeviceId] = Counter()
        self._presence: dict[DeviceId, bool] = {}
        self._bytes = 0
        self._flooders: set[DeviceId] = set()
        self._news = asyncio.Event()

    def heard(self, device: DeviceId, data: bytes) -> bool:
        """A message; False if it was dropped, because too many wait."""
        cost = len(data) + OVERHEAD_BYTES
        if self._per_device[device] >= MAX_PER_DEVICE or self._bytes + cost > MAX_BYTES:
            if device not in self._flooders and len(self._flooders) < MAX_PER_DEVICE:
                self._flooders.add(device)
                log.warning("%s sends more than can be heard; dropped some of it", device)
            return False
        self._per_device[device] += 1
        self._bytes += cost
        self._put(Heard(device, data))
        return True

    def uploaded(self, device: DeviceId) -> None:
        """At most one of a device is of interest, so there is no bound."""
        self._put(Uploaded(device))

    def presence(self, device: DeviceId, online: bool) -> None:
        """Of one device only the last is kept, however often it comes and goes."""
        if device not in self._presence:
            if len(self._presence) >= MAX_PRESENCES:
                return
            self._put(device)
        self._presence[device] = online

    def _put(self, event: Heard | Uploaded | DeviceId) -> None:
        self._events.append(event)
        self._news.set()

    def __len__(self) -> int:
        return len(self._events)

    async def get(self) -> Event:
        """The next event; waits for one."""
        while not self._events:
            self._news.clear()
            await self._news.wait()
        event = self._events.popleft()
        if isinstance(event, Heard):
            self._bytes -= len(event.data) + OVERHEAD_BYTES
            self._per_device[event.device] -= 1
            if not self._per_device[event.device]:
                del self._per_device[event.device]
            return event
        if isinstance(event, Uploaded):
            return event
        return Presence(event, self._presence.pop(event))
