"""Sends the chunks of a masked update, each at most once at a time.

A coordinator asks for what it lacks when nothing came for a while. Over a slow link that is before the
chunks that are on their way arrive, and to send them again each time would never end. So what is asked for
joins the queue only if it is neither waiting there nor under way.
"""

import asyncio
from collections.abc import Awaitable, Callable

from covey_shared import chunks
from covey_shared.chunks import Blob
from covey_shared.mqtt.client import WINDOW

Ranges = tuple[tuple[int, int], ...]


class Uploads:
    """One device's; one update at a time. publish: returns when the broker has a frame."""

    def __init__(self, publish: Callable[[bytes], Awaitable[None]]) -> None:
        self._publish = publish
        self._payload = b""
        self._blob: Blob | None = None
        self._waiting: dict[int, None] = {}
        self._under_way: set[int] = set()
        self._sending = False

    def want(self, payload: bytes, ranges: Ranges | None) -> int:
        """All chunks of this update, or those of the (first, count) ranges, are to be sent, in order;
        what lies beyond its end is nothing. Returns how many bytes that adds to what is sent."""
        if self._blob is None or payload is not self._payload:
            self.clear()
            self._payload, self._blob = payload, chunks.blob_of(payload)
        blob = self._blob
        asked: set[int] = set()
        for first, count in ((0, blob.n_chunks),) if ranges is None else ranges:
            asked.update(range(first, min(first + count, blob.n_chunks)))
        fresh = sorted(asked - self._waiting.keys() - self._under_way)
        self._waiting.update(dict.fromkeys(fresh))
        return sum(chunks.HEADER_BYTES + chunks.chunk_size(blob.size, i) for i in fresh)

    async def send(self) -> None:
        """Until nothing waits; at once if another call of this does so. Raises what `publish` raises."""
        if self._sending:
            return
        self._sending = True
        tasks: list[asyncio.Task[None]] = []
        try:
            while self._waiting:
                # Half of the transport's window is left to votes and reveals.
                tasks = [asyncio.create_task(self._work()) for _ in range(WINDOW // 2)]
                await asyncio.gather(*tasks)
        finally:
            self._sending = False
            for task in tasks:
                task.cancel()

    async def _work(self) -> None:
        while self._waiting and self._blob is not None:
            index = next(iter(self._waiting))
            del self._waiting[index]
            under_way = self._under_way
            under_way.add(index)
            try:
                await self._publish(chunks.frame(self._blob, index))
            finally:
                under_way.discard(index)

    def clear(self) -> None:
        """Nothing more of this update; a frame that is under way goes on its way."""
        self._payload, self._blob = b"", None
        self._waiting, self._under_way = {}, set()
