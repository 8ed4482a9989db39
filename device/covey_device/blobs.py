"""Fetches published blobs: plans and models, by hash, chunk by chunk.

A device asks for what it misses and asks again when nothing comes; it relies on no queue and no
order. Sizes and hashes come from signed messages, so a hostile broker can only waste time.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable

from covey_shared import chunks
from covey_shared.chunks import Assembly, BlobDigest, MemorySink
from covey_shared.errors import MalformedError, RefusedError
from covey_shared.messages import MAX_RANGES
from covey_shared.topics import Topics
from covey_shared.transport import Transport

Ranges = tuple[tuple[int, int], ...]

# How long nothing may come before a device asks again; doubles, so that a busy site gets quiet.
PATIENCE_S = 2.0
MAX_PATIENCE_S = 30.0
MAX_ATTEMPTS_WITHOUT_PROGRESS = 8


class BlobFetcher:
    """Fetches for one device. ask: publishes a signed WantBlob."""

    def __init__(
        self,
        transport: Transport,
        topics: Topics,
        ask: Callable[[bytes, Ranges], Awaitable[None]],
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self._transport = transport
        self._topics = topics
        self._ask = ask
        self._jitter = jitter
        self._open: dict[bytes, tuple[Assembly, asyncio.Event]] = {}

    def feed(self, payload: bytes) -> None:
        """One frame from a blob topic. Raises MalformedError for one that is not wanted or wrong."""
        chunk = chunks.decode_frame(payload)
        wanted = self._open.get(chunk.digest)
        if wanted is None:
            raise MalformedError("a chunk of a blob that nobody here asked for")
        assembly, progress = wanted
        before = assembly.n_received
        assembly.add(chunk)
        if assembly.n_received > before:
            progress.set()

    async def fetch(self, digest: bytes, size: int, *, limit: int) -> bytes:
        """The blob, its hash checked. limit: most bytes it may have.

        Raises RefusedError if it is too large or does not come, MalformedError if what came is not
        what the hash names (after a second try).
        """
        if size > limit:
            raise RefusedError(f"a blob of {size} bytes; this device takes at most {limit}")
        topic = self._topics.blob(digest)
        sink = MemorySink(size)
        assembly, progress = Assembly(BlobDigest(digest), size, sink), asyncio.Event()
        self._open[digest] = (assembly, progress)
        try:
            await self._transport.subscribe(topic)
            for last_try in (False, True):
                await self._complete(assembly, progress)
                try:
                    assembly.verify()
                    break
                except MalformedError:
                    if last_try:
                        raise
                    assembly.reset()
            return bytes(sink.data)
        finally:
            # A later fetch of the same blob may have begun while this one was being cancelled.
            if self._open.get(digest, (None,))[0] is assembly:
                del self._open[digest]
                await self._transport.unsubscribe(topic)

    async def _complete(self, assembly: Assembly, progress: asyncio.Event) -> None:
        patience_s, attempts = PATIENCE_S, 0
        while not assembly.complete:
            if attempts > MAX_ATTEMPTS_WITHOUT_PROGRESS:
                raise RefusedError(
                    f"blob {assembly.digest.hex()[:16]} does not come: "
                    f"{assembly.n_received} of {assembly.n_chunks} chunks"
                )
            await self._ask(assembly.digest, assembly.missing(MAX_RANGES))
            attempts += 1
            while not assembly.complete:
                progress.clear()
                try:
                    async with asyncio.timeout(patience_s * (0.75 + 0.5 * self._jitter())):
                        await progress.wait()
                except TimeoutError:
                    break
                patience_s, attempts = PATIENCE_S, 1
            patience_s = min(patience_s * 2, MAX_PATIENCE_S)
