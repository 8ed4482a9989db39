"""Fetches published blobs: plans and models, by hash, chunk by chunk.

A device asks for what it misses and asks again when nothing comes; it relies on no queue and no
order. Sizes and hashes come from signed messages, so a hostile broker can only waste time.

What was fetched before comes from the cache, and what an earlier process had begun to fetch goes on where
that one ended.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable, Iterable
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import TypeVar

from covey_device.cache import BlobCache, Part
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

# How often all chunks are fetched in all, if what they make up is not what the hash names; with a wait in
# between that begins at PATIENCE_S and doubles.
MAX_WHOLE_ATTEMPTS = 5

T = TypeVar("T")


@dataclass(slots=True)
class _Download:
    """A blob on its way. fresh: chunks that came and are not on the disk yet."""

    assembly: Assembly
    sink: MemorySink
    part: Part | None
    progress: asyncio.Event = field(default_factory=asyncio.Event)
    fresh: list[int] = field(default_factory=list)
    news: asyncio.Event = field(default_factory=asyncio.Event)
    writing: asyncio.Lock = field(default_factory=asyncio.Lock)
    hurried: bool = False


class BlobFetcher:
    """Fetches for one device. ask: publishes a signed WantBlob. pool: threads for the cache's disk."""

    def __init__(
        self,
        transport: Transport,
        topics: Topics,
        ask: Callable[[bytes, Ranges], Awaitable[None]],
        jitter: Callable[[], float] = random.random,
        *,
        cache: BlobCache | None = None,
        pool: Executor | None = None,
    ) -> None:
        self._transport = transport
        self._topics = topics
        self._ask = ask
        self._jitter = jitter
        self._cache = cache
        self._pool = pool
        self._open: dict[bytes, _Download] = {}
        self._under_way: dict[bytes, asyncio.Future[bytes | None]] = {}

    def feed(self, payload: bytes) -> None:
        """One frame from a blob topic. Raises MalformedError for one that is not wanted or wrong."""
        chunk = chunks.decode_frame(payload)
        wanted = self._open.get(chunk.digest)
        if wanted is None:
            raise MalformedError("a chunk of a blob that nobody here asked for")
        before = wanted.assembly.n_received
        wanted.assembly.add(chunk)
        if wanted.assembly.n_received > before:
            wanted.progress.set()
            wanted.fresh.append(chunk.index)
            wanted.news.set()

    def hold(self, digests: Iterable[bytes]) -> None:
        """These are in use: the cache is to keep them before all others."""
        if self._cache is not None:
            self._cache.hold(digests)

    def hurry(self) -> None:
        """Somebody is there who serves blobs: what nothing has come of for a while is asked for now,
        however seldom it was asked for last."""
        for download in self._open.values():
            download.hurried = True
            download.progress.set()

    async def fetch(self, digest: bytes, size: int, *, limit: int) -> bytes:
        """The blob, its hash checked. limit: most bytes it may have. Who fetches what another fetches
        already waits for that one, and begins if it fails.

        Raises RefusedError if it is too large or does not come, MalformedError if what came is not
        what the hash names (after MAX_WHOLE_ATTEMPTS).
        """
        if size > limit:
            raise RefusedError(f"a blob of {size} bytes; this device takes at most {limit}")
        while (under_way := self._under_way.get(digest)) is not None:
            done = await asyncio.shield(under_way)
            if done is not None:
                return done
        mine = self._under_way[digest] = asyncio.get_running_loop().create_future()
        data = None
        try:
            data = await self._fetch(digest, size)
            return data
        finally:
            del self._under_way[digest]
            mine.set_result(data)

    async def _fetch(self, digest: bytes, size: int) -> bytes:
        cache = self._cache
        if cache is not None:
            cached = await self._in_thread(lambda: cache.read(digest, size))
            if cached is not None:
                return cached
        sink = MemorySink(size)
        part, received = await self._begin(digest, size, sink)
        assembly = Assembly(BlobDigest(digest), size, sink, received=received)
        download = _Download(assembly, sink, part)
        topic = self._topics.blob(digest)
        self._open[digest] = download
        keeping = asyncio.create_task(self._keep(download))
        try:
            await self._transport.subscribe(topic)
            await self._complete(download)
            await self._write(download)
            if (part := download.part) is not None:
                await self._in_thread(part.complete)
            return bytes(sink.data)
        finally:
            keeping.cancel()
            if (part := download.part) is not None:
                # Also when this is cancelled, which must not wait.
                left, part_left = download.fresh, part
                asyncio.get_running_loop().run_in_executor(
                    self._pool, lambda: part_left.pause(left, sink.data)
                )
            del self._open[digest]
            await self._transport.unsubscribe(topic)

    async def _begin(
        self, digest: bytes, size: int, sink: MemorySink
    ) -> tuple[Part | None, bytes | None]:
        """A place in the cache, and what an earlier process put there: in the sink, and as a bitmap."""
        cache = self._cache
        if cache is None:
            return None, None

        def begin() -> tuple[Part | None, bytes | None]:
            part = cache.begin(digest, size)
            return part, None if part is None else part.resume(sink.data)

        def abandoned(done: asyncio.Future[tuple[Part | None, bytes | None]]) -> None:
            if not done.cancelled() and done.exception() is None:
                part, _ = done.result()
                if part is not None:
                    part.pause()

        beginning = asyncio.get_running_loop().run_in_executor(self._pool, begin)
        try:
            return await asyncio.shield(beginning)
        except asyncio.CancelledError:
            beginning.add_done_callback(abandoned)
            raise

    async def _complete(self, download: _Download) -> None:
        """Until all chunks are there and make up what the hash names."""
        assembly, patience_s = download.assembly, PATIENCE_S
        for attempts_left in reversed(range(MAX_WHOLE_ATTEMPTS)):
            await self._gather(download)
            try:
                await self._in_thread(assembly.verify)
                return
            except MalformedError:
                if not attempts_left:
                    raise
            # Nobody knows which chunk was wrong. What is still on its way of this attempt is let pass.
            await asyncio.sleep(patience_s * (0.75 + 0.5 * self._jitter()))
            patience_s *= 2
            assembly.reset()
            download.fresh = []
            if (part := download.part) is not None:
                await self._in_thread(part.restart)

    async def _gather(self, download: _Download) -> None:
        assembly, progress = download.assembly, download.progress
        patience_s, attempts = PATIENCE_S, 0
        clock = asyncio.get_running_loop().time
        while not assembly.complete:
            if attempts > MAX_ATTEMPTS_WITHOUT_PROGRESS:
                raise RefusedError(
                    f"blob {assembly.digest.hex()[:16]} does not come: "
                    f"{assembly.n_received} of {assembly.n_chunks} chunks"
                )
            await self._ask(assembly.digest, assembly.missing(MAX_RANGES))
            last, attempts, download.hurried = clock(), attempts + 1, False
            while not assembly.complete:
                progress.clear()
                try:
                    async with asyncio.timeout(patience_s * (0.75 + 0.5 * self._jitter())):
                        await progress.wait()
                except TimeoutError:
                    break
                if not download.hurried:
                    last, patience_s, attempts = clock(), PATIENCE_S, 1
                elif clock() - last >= PATIENCE_S:
                    patience_s, attempts = PATIENCE_S / 2, 0
                    break
                download.hurried = False
            patience_s = min(patience_s * 2, MAX_PATIENCE_S)

    # -- what comes is kept -----------------------------------------------------------------------

    async def _keep(self, download: _Download) -> None:
        """Write chunks to the disk as they come, as many at a time as came meanwhile."""
        while True:
            await download.news.wait()
            download.news.clear()
            await self._write(download)

    async def _write(self, download: _Download) -> None:
        async with download.writing:
            part, indices = download.part, download.fresh
            download.fresh = []
            if part is not None and indices:
                await self._in_thread(lambda: part.write(indices, download.sink.data))

    async def _in_thread(self, step: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._pool, step)
