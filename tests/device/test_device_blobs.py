"""Fetching by hash: asks for what is missing, backs off, gives up, and believes only the hash."""

import asyncio
import contextlib
import errno
import hashlib
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from covey_device import blobs
from covey_device.blobs import BlobFetcher
from covey_device.cache import BlobCache
from covey_shared import chunks
from covey_shared.chunks import CHUNK_BYTES
from covey_shared.errors import MalformedError, RefusedError
from covey_shared.topics import Topics
from memory_fleet import go

TOPICS = Topics("farm")
DATA = bytes(range(256)) * ((3 * CHUNK_BYTES) // 256 + 100)  # four chunks
DIGEST = hashlib.sha256(DATA).digest()
FRAMES = list(chunks.split(chunks.blob_of(DATA)))


class Subscriptions:
    """The part of a transport that a fetcher uses."""

    def __init__(self) -> None:
        self.now: list[str] = []
        self.ever: list[str] = []

    async def subscribe(self, *topic_filters: str) -> None:
        self.now.extend(topic_filters)
        self.ever.extend(topic_filters)

    async def unsubscribe(self, *topic_filters: str) -> None:
        for topic_filter in topic_filters:
            self.now.remove(topic_filter)


Answer = Callable[[BlobFetcher, int, tuple[tuple[int, int], ...]], None]


class Bench:
    """A fetcher, what it asked for and when, and a coordinator that answers as told."""

    def __init__(self, answer: Answer, cache: Path | None = None) -> None:
        self.transport = Subscriptions()
        self.asked: list[tuple[tuple[int, int], ...]] = []
        self.at: list[float] = []
        self._answer = answer
        self.pool = ThreadPoolExecutor(1)
        self.fetcher = BlobFetcher(
            self.transport,  # type: ignore[arg-type]
            TOPICS,
            self._ask,
            jitter=lambda: 0.5,
            cache=None if cache is None else BlobCache(cache, 10**9, reserve_bytes=0),
            pool=self.pool,
        )

    async def _ask(self, digest: bytes, ranges: tuple[tuple[int, int], ...]) -> None:
        assert digest == DIGEST
        self.asked.append(ranges)
        self.at.append(asyncio.get_running_loop().time())
        loop = asyncio.get_running_loop()
        loop.call_soon(self._answer, self.fetcher, len(self.asked), ranges)

    async def fetch(self, *, size: int = len(DATA), limit: int = len(DATA)) -> bytes:
        return await self.fetcher.fetch(DIGEST, size, limit=limit)


def everything(fetcher: BlobFetcher, time: int, ranges: Any) -> None:
    for first, count in ranges:
        for index in range(first, first + count):
            fetcher.feed(FRAMES[index])


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blobs, "PATIENCE_S", 0.02)
    monkeypatch.setattr(blobs, "MAX_PATIENCE_S", 0.1)


def test_a_blob_comes_whole_and_its_topic_is_left():
    async def scenario() -> None:
        bench = Bench(everything)
        assert await bench.fetch() == DATA
        assert bench.asked == [((0, 4),)]
        assert bench.transport.ever == [TOPICS.blob(DIGEST)]
        assert bench.transport.now == []

    go(scenario())


def test_only_what_is_missing_is_asked_for_again():
    def some(fetcher: BlobFetcher, time: int, ranges: Any) -> None:
        for index in ((3, 0), (2,), (1,))[time - 1]:
            fetcher.feed(FRAMES[index])
            fetcher.feed(FRAMES[index])

    async def scenario() -> None:
        bench = Bench(some)
        assert await bench.fetch() == DATA
        assert bench.asked == [((0, 4),), ((1, 2),), ((1, 1),)]

    go(scenario())


def test_silence_is_answered_with_patience_that_doubles():
    waited: list[float] = []
    real = asyncio.timeout

    def timeout(delay: float) -> Any:
        waited.append(delay)
        return real(delay)

    async def scenario() -> None:
        bench = Bench(lambda *_: None)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(blobs.asyncio, "timeout", timeout)
            with pytest.raises(RefusedError, match=r"does not come: 0 of 4 chunks"):
                await bench.fetch()
        assert len(bench.asked) == blobs.MAX_ATTEMPTS_WITHOUT_PROGRESS + 1
        assert waited[:4] == pytest.approx([0.02, 0.04, 0.08, 0.1])
        assert max(waited) == pytest.approx(0.1)
        assert bench.transport.now == []

    go(scenario())


def test_progress_restores_patience():
    def a_chunk_every_third_time(fetcher: BlobFetcher, time: int, ranges: Any) -> None:
        if time % 3 == 0:
            fetcher.feed(FRAMES[ranges[0][0]])

    async def scenario() -> None:
        bench = Bench(a_chunk_every_third_time)
        assert await bench.fetch() == DATA
        assert len(bench.asked) == 12 > blobs.MAX_ATTEMPTS_WITHOUT_PROGRESS + 1

    go(scenario())


def test_a_blob_beyond_the_limit_is_not_even_asked_for():
    async def scenario() -> None:
        bench = Bench(everything)
        with pytest.raises(
            RefusedError, match=f"{len(DATA)} bytes; this device takes at most 1000"
        ):
            await bench.fetch(limit=1000)
        assert bench.asked == []
        assert bench.transport.ever == []

    go(scenario())


def poisoned(index: int) -> bytes:
    return FRAMES[index][:-1] + bytes((FRAMES[index][-1] ^ 1,))


@pytest.mark.parametrize("times", [1, 4, 5])
def test_wrong_content_is_fetched_again_a_few_times_with_growing_patience(times: int):
    def wrong(fetcher: BlobFetcher, time: int, ranges: Any) -> None:
        if time <= times:
            fetcher.feed(poisoned(0))
            everything(fetcher, time, ((1, 3),))
        else:
            everything(fetcher, time, ranges)

    async def scenario() -> None:
        bench = Bench(wrong)
        if times < blobs.MAX_WHOLE_ATTEMPTS:
            assert await bench.fetch() == DATA
        else:
            with pytest.raises(MalformedError, match=r"blob has digest .*, expected"):
                await bench.fetch()
        attempts = min(times + 1, blobs.MAX_WHOLE_ATTEMPTS)
        assert bench.asked == [((0, 4),)] * attempts
        waits = [later - earlier for earlier, later in pairwise(bench.at)]
        assert all(wait >= 0.02 * 2**k for k, wait in enumerate(waits))
        assert bench.transport.now == []

    go(scenario())


def test_what_is_still_on_its_way_of_a_wrong_attempt_does_not_spoil_the_next():
    """A second copy of the wrong chunk arrives after the hash was found to be wrong."""

    def wrong(fetcher: BlobFetcher, time: int, ranges: Any) -> None:
        if time == 1:
            fetcher.feed(poisoned(0))
            everything(fetcher, time, ((1, 3),))
            asyncio.get_running_loop().call_later(0.005, late, fetcher)
        else:
            everything(fetcher, time, ranges)

    def late(fetcher: BlobFetcher) -> None:
        with contextlib.suppress(MalformedError):
            fetcher.feed(poisoned(0))

    async def scenario() -> None:
        bench = Bench(wrong)
        assert await bench.fetch() == DATA
        assert len(bench.asked) == 2

    go(scenario())


# -- with a cache ----------------------------------------------------------------------------------


def in_cache(directory: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in directory.iterdir()}


def test_what_is_in_the_cache_is_not_asked_for(tmp_path: Path):
    async def scenario() -> None:
        first = Bench(everything, tmp_path)
        assert await first.fetch() == DATA
        assert first.asked == [((0, 4),)]
        again = Bench(everything, tmp_path)
        assert await again.fetch() == DATA
        assert again.asked == []
        assert again.transport.ever == []
        with pytest.raises(RefusedError, match="at most 1000"):
            await again.fetch(limit=1000)
        (tmp_path / DIGEST.hex()).write_bytes(DATA[:-1] + b"x")
        assert await again.fetch() == DATA
        assert again.asked == [((0, 4),)]
        assert in_cache(tmp_path) == {DIGEST.hex(): len(DATA)}

    go(scenario())


@pytest.mark.parametrize("how", ["killed", "cancelled"])
def test_only_missing_chunks_are_asked_for_after_a_restart(tmp_path: Path, how: str):
    there, dead = tmp_path / "there", tmp_path / "dead"

    def some(fetcher: BlobFetcher, time: int, ranges: Any) -> None:
        if time == 1:
            fetcher.feed(FRAMES[0])
            fetcher.feed(FRAMES[2])

    async def scenario() -> None:
        first = Bench(some, there)
        fetching = asyncio.create_task(first.fetch())
        if how == "killed":
            # What lies on the disk at this moment is what a killed process leaves.
            have = there / f"{DIGEST.hex()}.have"
            while not have.exists() or have.stat().st_size < 2 * 20:
                await asyncio.sleep(0.005)
            shutil.copytree(there, dead)
        else:
            while not first.asked:
                await asyncio.sleep(0.005)
            await asyncio.sleep(0)
        fetching.cancel()
        await asyncio.wait({fetching})
        await asyncio.get_running_loop().run_in_executor(first.pool, lambda: None)
        again = Bench(everything, dead if how == "killed" else there)
        assert await again.fetch() == DATA
        assert again.asked == [((1, 1), (3, 1))]
        assert in_cache(dead if how == "killed" else there) == {DIGEST.hex(): len(DATA)}
        assert await Bench(everything, dead if how == "killed" else there).fetch() == DATA

    go(scenario())


def test_a_kept_download_that_was_wrong_is_fetched_anew(tmp_path: Path):
    def wrong(fetcher: BlobFetcher, time: int, ranges: Any) -> None:
        if time == 1:
            fetcher.feed(poisoned(0))

    async def scenario() -> None:
        first = Bench(wrong, tmp_path)
        fetching = asyncio.create_task(first.fetch())
        while not first.asked:
            await asyncio.sleep(0.005)
        await asyncio.sleep(0)
        fetching.cancel()
        await asyncio.wait({fetching})
        await asyncio.get_running_loop().run_in_executor(first.pool, lambda: None)
        again = Bench(everything, tmp_path)
        assert await again.fetch() == DATA
        assert again.asked == [((1, 3),), ((0, 4),)]
        assert in_cache(tmp_path) == {DIGEST.hex(): len(DATA)}

    go(scenario())


def test_what_was_wrong_is_not_kept_for_the_next_process(tmp_path: Path):
    def wrong(fetcher: BlobFetcher, time: int, ranges: Any) -> None:
        if time == 1:
            fetcher.feed(poisoned(0))
            everything(fetcher, time, ((1, 3),))

    async def scenario() -> None:
        first = Bench(wrong, tmp_path)
        fetching = asyncio.create_task(first.fetch())
        while len(first.asked) < 2:
            await asyncio.sleep(0.005)
        fetching.cancel()
        await asyncio.wait({fetching})
        await asyncio.get_running_loop().run_in_executor(first.pool, lambda: None)
        again = Bench(everything, tmp_path)
        assert await again.fetch() == DATA
        assert again.asked == [((0, 4),)]

    go(scenario())


def test_a_disk_that_is_full_costs_no_blob(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    async def scenario() -> None:
        bench = Bench(everything, tmp_path)
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", full)
            assert await bench.fetch() == DATA
        assert in_cache(tmp_path) == {}
        assert await bench.fetch() == DATA
        assert in_cache(tmp_path) == {DIGEST.hex(): len(DATA)}

    go(scenario())


def test_what_nobody_asked_for_is_refused():
    async def scenario() -> None:
        bench = Bench(everything)
        with pytest.raises(MalformedError, match="nobody here asked for"):
            bench.fetcher.feed(FRAMES[0])
        for frame in (b"", b"\x01" * 40, FRAMES[0][:-1]):
            with pytest.raises(MalformedError):
                bench.fetcher.feed(frame)

    go(scenario())


def test_a_claim_of_another_size_changes_nothing():
    def lying(fetcher: BlobFetcher, time: int, ranges: Any) -> None:
        frame = bytearray(FRAMES[3])
        frame[33:41] = (2 * len(DATA)).to_bytes(8, "big")
        with pytest.raises(MalformedError):
            fetcher.feed(bytes(frame))
        everything(fetcher, time, ranges)

    async def scenario() -> None:
        assert await Bench(lying).fetch() == DATA

    go(scenario())


def test_a_cancelled_fetch_leaves_a_later_one_alone():
    async def scenario() -> None:
        bench = Bench(lambda *_: None)
        first = asyncio.create_task(bench.fetch())
        await asyncio.sleep(0.01)
        second = asyncio.create_task(bench.fetch())
        await asyncio.sleep(0.01)
        first.cancel()
        await asyncio.wait({first})
        everything(bench.fetcher, 1, ((0, 4),))
        assert await second == DATA

    go(scenario())


def test_who_serves_is_back_and_is_asked_at_once(monkeypatch: pytest.MonkeyPatch):
    """However seldom it was asked for last; but not while chunks come, or again and again."""
    monkeypatch.setattr(blobs, "PATIENCE_S", 0.2)
    monkeypatch.setattr(blobs, "MAX_PATIENCE_S", 60.0)
    back = False

    def answer(fetcher: BlobFetcher, time: int, ranges: Any) -> None:
        if back:
            everything(fetcher, time, ranges)

    async def scenario() -> None:
        nonlocal back
        bench = Bench(answer)
        fetching = asyncio.create_task(bench.fetch())
        while len(bench.asked) < 4:
            await asyncio.sleep(0.01)
        # The next time would be in 1.6 s.
        bench.fetcher.hurry()
        await asyncio.sleep(0.02)
        assert len(bench.asked) == 4  # it was asked for just now
        await asyncio.sleep(0.3)
        back = True
        bench.fetcher.hurry()
        async with asyncio.timeout(0.5):
            assert await fetching == DATA
        assert len(bench.asked) == 5
        bench.fetcher.hurry()  # with nothing to fetch

    go(scenario())


# -- two who want the same -------------------------------------------------------------------------


@pytest.mark.parametrize("cached", [False, True])
def test_two_who_want_the_same_blob_share_one_download(tmp_path: Path, cached: bool):
    """A round, and the device for itself."""

    async def scenario() -> None:
        bench = Bench(everything, tmp_path / "cache" if cached else None)
        first, second = await asyncio.gather(bench.fetch(), bench.fetch())
        assert first == second == DATA
        assert bench.asked == [((0, 4),)]
        assert bench.transport.ever == [TOPICS.blob(DIGEST)]
        assert bench.transport.now == []

    go(scenario())


def test_whose_wait_is_cancelled_does_not_take_the_other_along(tmp_path: Path):
    """Either way round: the second goes on by itself when the first is gone."""

    async def scenario() -> None:
        answering = [False]

        def answer(fetcher: BlobFetcher, time: int, ranges: Any) -> None:
            if answering[0]:
                everything(fetcher, time, ranges)

        bench = Bench(answer)
        first, second = asyncio.create_task(bench.fetch()), asyncio.create_task(bench.fetch())
        third = asyncio.create_task(bench.fetch())
        await asyncio.sleep(0.05)
        third.cancel()
        first.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await first
        answering[0] = True
        assert await asyncio.wait_for(second, 10) == DATA
        assert third.cancelled()
        assert bench.transport.now == []

    go(scenario())


def test_who_waited_for_one_that_failed_tries_for_itself(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(blobs, "MAX_ATTEMPTS_WITHOUT_PROGRESS", 1)

    async def scenario() -> None:
        def answer(fetcher: BlobFetcher, time: int, ranges: Any) -> None:
            if time > 2:
                everything(fetcher, time, ranges)

        bench = Bench(answer)
        first, second = await asyncio.gather(bench.fetch(), bench.fetch(), return_exceptions=True)
        assert isinstance(first, RefusedError)
        assert second == DATA

    go(scenario())
