"""The cache of plans and models: trusted in nothing, bounded in everything, and no round's trouble."""

import errno
import hashlib
import logging
import os
import random
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from covey_device import cache as module
from covey_device.cache import MAX_PARTS, BlobCache
from covey_shared import chunks
from covey_shared.chunks import CHUNK_BYTES

MB = 1_000_000


def blob(seed: int, size: int) -> tuple[bytes, bytes]:
    data = random.Random(seed).randbytes(size)
    return hashlib.sha256(data).digest(), data


def store(cache: BlobCache, digest: bytes, data: bytes) -> None:
    part = cache.begin(digest, len(data))
    if part is not None:
        part.write(range(chunks.n_chunks(len(data))), bytearray(data))
        part.complete()


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()} if directory.exists() else set()


def cache_in(directory: Path, limit: int = 10 * MB, reserve: int = 0) -> BlobCache:
    return BlobCache(directory / "cache", limit, reserve_bytes=reserve)


# -- whole blobs -----------------------------------------------------------------------------------


def test_what_was_stored_is_read_back_by_any_process(tmp_path: Path):
    digest, data = blob(1, 3 * CHUNK_BYTES + 7)
    assert cache_in(tmp_path).read(digest, len(data)) is None
    store(cache_in(tmp_path), digest, data)
    assert cache_in(tmp_path).read(digest, len(data)) == data
    assert names(tmp_path / "cache") == {digest.hex()}
    assert stat.S_IMODE((tmp_path / "cache").stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "cache" / digest.hex()).stat().st_mode) == 0o600


@pytest.mark.parametrize("damage", ["a bit", "cut off", "longer", "empty"])
def test_what_is_damaged_is_removed(tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture):
    digest, data = blob(1, CHUNK_BYTES)
    cache = cache_in(tmp_path)
    store(cache, digest, data)
    path = tmp_path / "cache" / digest.hex()
    wrong = {
        "a bit": bytes([data[0] ^ 1]) + data[1:],
        "cut off": data[:-1],
        "longer": data + b"x",
        "empty": b"",
    }
    path.write_bytes(wrong[damage])
    assert cache.read(digest, len(data)) is None
    assert not path.exists()
    assert "damaged; it is fetched anew" in caplog.text
    store(cache, digest, data)
    assert cache.read(digest, len(data)) == data


def test_a_blob_is_not_taken_for_another_size(tmp_path: Path):
    digest, data = blob(1, 1000)
    cache = cache_in(tmp_path)
    store(cache, digest, data)
    assert cache.read(digest, 1001) is None


def test_the_least_recently_used_goes_first_and_never_what_is_in_use(tmp_path: Path):
    cache = cache_in(tmp_path, 5 * CHUNK_BYTES)
    blobs = [blob(seed, CHUNK_BYTES) for seed in range(8)]
    for digest, data in blobs[:5]:
        store(cache, digest, data)
    cache.hold([blobs[0][0]])
    assert cache.read(*sized(blobs[2])) is not None
    for digest, data in blobs[5:]:
        store(cache, digest, data)
    kept = {
        i for i, (digest, _) in enumerate(blobs) if (tmp_path / "cache" / digest.hex()).exists()
    }
    assert kept == {0, 2, 5, 6, 7}


def sized(one: tuple[bytes, bytes]) -> tuple[bytes, int]:
    return one[0], len(one[1])


def test_the_order_of_use_outlives_restarts_and_clocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    blobs = [blob(seed, CHUNK_BYTES) for seed in range(4)]
    for digest, data in blobs[:3]:
        store(cache_in(tmp_path, 3 * CHUNK_BYTES), digest, data)
    # The second was written when the clock was a year ahead; the first is used now.
    path = tmp_path / "cache" / blobs[1][0].hex()
    later = path.stat().st_mtime + 365 * 86400
    os.utime(path, (later, later))
    cache = cache_in(tmp_path, 3 * CHUNK_BYTES)
    assert cache.read(*sized(blobs[0])) is not None
    assert cache.read(*sized(blobs[2])) is not None
    cache = cache_in(tmp_path, 3 * CHUNK_BYTES)
    store(cache, *blobs[3])
    assert cache.read(*sized(blobs[1])) is None
    assert all(cache.read(*sized(blobs[i])) for i in (0, 2, 3))


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 5 * CHUNK_BYTES), min_size=1, max_size=15),
    limit=st.integers(1, 8 * CHUNK_BYTES),
    fates=st.lists(st.sampled_from(["complete", "pause", "restart"]), min_size=15, max_size=15),
)
def test_it_never_takes_more_than_its_limit(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], limit: int, fates: list[str]
):
    directory = tmp_path_factory.mktemp("bounded")
    cache = cache_in(directory, limit)
    for seed, (size, fate) in enumerate(zip(sizes, fates, strict=False)):
        digest, data = blob(seed, size)
        part = cache.begin(digest, size)
        assert (part is not None) == (size <= limit)
        if part is None:
            continue
        part.write(range(chunks.n_chunks(size)), bytearray(data))
        if fate == "complete":
            part.complete()
        elif fate == "pause":
            part.pause()
        else:
            cache = cache_in(directory, limit)
            cache.tidy()
        taken = sum(
            p.stat().st_size for p in (directory / "cache").iterdir() if p.suffix != ".have"
        )
        assert taken <= limit
        assert len([n for n in names(directory / "cache") if n.endswith(".part")]) <= MAX_PARTS


def test_a_smaller_limit_holds_from_the_start(tmp_path: Path):
    blobs = [blob(seed, CHUNK_BYTES) for seed in range(4)]
    for one in blobs:
        store(cache_in(tmp_path), *one)
    cache_in(tmp_path, 2 * CHUNK_BYTES).tidy()
    assert names(tmp_path / "cache") == {digest.hex() for digest, _ in blobs[2:]}


def test_files_of_others_are_left_alone(tmp_path: Path):
    cache = cache_in(tmp_path, CHUNK_BYTES)
    (tmp_path / "cache").mkdir()
    for name in ("photo.jpg", "x.have", "x.part", "ab" * 31):
        (tmp_path / "cache" / name).write_bytes(bytes(CHUNK_BYTES))
    for seed in range(3):
        store(cache, *blob(seed, CHUNK_BYTES))
    cache.clear()
    assert names(tmp_path / "cache") == {"photo.jpg", "x.have", "x.part", "ab" * 31}


def test_space_is_left_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    cache = cache_in(tmp_path, reserve=MB)
    store(cache, *blob(1, 1000))
    free = [MB + 999]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free[0]))
    assert cache.begin(blob(2, 1000)[0], 1000) is None
    assert names(tmp_path / "cache") == set()  # it had given way before
    free[0] += 1
    store(cache, *blob(2, 1000))
    assert names(tmp_path / "cache") == {blob(2, 1000)[0].hex()}


# -- downloads that go on --------------------------------------------------------------------------

N = 6
DIGEST, DATA = blob(7, (N - 1) * CHUNK_BYTES + 99)


def begun(directory: Path, indices: Any = (0, 2, 5)) -> BlobCache:
    """A process that wrote these chunks and died."""
    cache = cache_in(directory)
    part = cache.begin(DIGEST, len(DATA))
    assert part is not None
    memory = bytearray(len(DATA))
    for index in indices:
        at = slice(index * CHUNK_BYTES, (index + 1) * CHUNK_BYTES)
        memory[at] = DATA[at]
        part.write([index], memory)
    return cache


def resumed(directory: Path) -> tuple[set[int], bytearray]:
    part = cache_in(directory).begin(DIGEST, len(DATA))
    assert part is not None
    memory = bytearray(len(DATA))
    bitmap = part.resume(memory) or bytes(1)
    have = {i for i in range(8 * len(bitmap)) if bitmap[i >> 3] >> (i & 7) & 1}
    for index in range(N):
        at = slice(index * CHUNK_BYTES, (index + 1) * CHUNK_BYTES)
        assert memory[at] == (DATA[at] if index in have else bytes(len(DATA[at])))
    part.pause()
    return have, memory


def test_a_download_goes_on_where_a_killed_process_left_it(tmp_path: Path):
    begun(tmp_path)
    assert resumed(tmp_path)[0] == {0, 2, 5}
    assert resumed(tmp_path)[0] == {0, 2, 5}
    cache = cache_in(tmp_path)
    part = cache.begin(DIGEST, len(DATA))
    assert part is not None
    memory = bytearray(len(DATA))
    part.resume(memory)
    part.write([1, 3, 4], bytearray(DATA))
    part.complete()
    assert names(tmp_path / "cache") == {DIGEST.hex()}
    assert cache_in(tmp_path).read(DIGEST, len(DATA)) == DATA


def test_a_download_that_lacks_chunks_does_not_count_as_whole(tmp_path: Path):
    cache = begun(tmp_path)
    del cache
    part = cache_in(tmp_path).begin(DIGEST, len(DATA))
    assert part is not None
    part.resume(bytearray(len(DATA)))
    part.complete()
    assert names(tmp_path / "cache") == set()


@pytest.mark.parametrize("seed", range(40))
def test_whatever_a_power_cut_takes_counts_as_missing(tmp_path: Path, seed: int):
    """Any part of either file is as it was, or zeros, or cut off."""
    begun(tmp_path, range(N - 1))
    chance = random.Random(seed)
    for path in (tmp_path / "cache").iterdir():
        data = bytearray(path.read_bytes())
        if chance.random() < 0.4:
            del data[chance.randint(0, len(data)) :]
        if data and chance.random() < 0.6:
            first = chance.randrange(len(data))
            last = chance.randint(first, len(data))
            data[first:last] = bytes(last - first)
        path.write_bytes(data)
    have, _ = resumed(tmp_path)  # every chunk that it has is right
    # And what it lacks can be written again, after whatever was torn.
    cache = cache_in(tmp_path)
    part = cache.begin(DIGEST, len(DATA))
    assert part is not None
    part.resume(bytearray(len(DATA)))
    part.write(set(range(N - 1)) - have, bytearray(DATA))
    part.pause()
    assert resumed(tmp_path)[0] == set(range(N - 1))


def test_garbage_in_the_records_is_nothing(tmp_path: Path):
    begun(tmp_path)
    path = tmp_path / "cache" / f"{DIGEST.hex()}.have"
    path.write_bytes(random.Random(1).randbytes(10_007))
    assert resumed(tmp_path)[0] == set()
    path.write_bytes(b"\xff" * 200)
    assert resumed(tmp_path)[0] == set()


def test_what_was_wrong_is_not_kept(tmp_path: Path):
    cache = begun(tmp_path)
    del cache
    part = cache_in(tmp_path).begin(DIGEST, len(DATA))
    assert part is not None
    part.resume(bytearray(len(DATA)))
    part.restart()
    assert resumed(tmp_path)[0] == set()


def test_old_downloads_are_cleaned_away(tmp_path: Path):
    for seed in range(10):
        digest, data = blob(seed, CHUNK_BYTES)
        part = cache_in(tmp_path).begin(digest, len(data))
        assert part is not None
        part.write([0], bytearray(data))
        part.pause()
    kept = {digest.hex() for digest, _ in (blob(seed, CHUNK_BYTES) for seed in range(7, 10))}
    assert {name.split(".")[0] for name in names(tmp_path / "cache")} == kept
    (tmp_path / "cache" / f"{DIGEST.hex()}.have").write_bytes(b"x")
    cache_in(tmp_path).tidy()
    assert f"{DIGEST.hex()}.have" not in names(tmp_path / "cache")
    assert len(names(tmp_path / "cache")) == 2 * MAX_PARTS


def test_one_download_has_one_writer(tmp_path: Path):
    cache = cache_in(tmp_path)
    first = cache.begin(DIGEST, len(DATA))
    assert first is not None
    assert cache.begin(DIGEST, len(DATA)) is None
    first.pause()
    again = cache.begin(DIGEST, len(DATA))
    assert again is not None
    first.write([0], bytearray(DATA))  # too late: it does nothing, and to nobody's file
    first.restart()
    first.complete()
    again.write(range(N), bytearray(DATA))
    again.complete()
    assert cache.read(DIGEST, len(DATA)) == DATA


# -- disks that fail -------------------------------------------------------------------------------

CALLS = ("open", "pwrite", "write", "ftruncate", "lseek", "pread", "read", "utime", "mkdir")


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO, errno.EROFS])
@pytest.mark.parametrize("call", CALLS)
def test_a_disk_that_fails_at_any_call_raises_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, error: int
):
    begun(tmp_path / "there", (0, 1))
    for nth in range(1, 6):
        directory = tmp_path / "there" if nth % 2 else tmp_path / f"new {nth}"
        with monkeypatch.context() as patch:
            patch.setattr(module.os, call, failing(getattr(os, call), nth, error))
            cache = cache_in(directory)
            cache.tidy()
            part = cache.begin(DIGEST, len(DATA))
            if part is not None:
                memory = bytearray(len(DATA))
                part.resume(memory)
                part.write(range(N), bytearray(DATA))
                part.complete()
                part.pause()
            found = cache.read(DIGEST, len(DATA))
            assert found in (None, DATA)
        # And once it works again, so does the cache.
        cache = cache_in(directory)
        if cache.read(DIGEST, len(DATA)) is None:
            part = cache.begin(DIGEST, len(DATA))
            assert part is not None
            part.resume(bytearray(len(DATA)))
            part.write(range(N), bytearray(DATA))
            part.complete()
        assert cache.read(DIGEST, len(DATA)) == DATA
        shutil.rmtree(directory)
        begun(tmp_path / "there", (0, 1))


def failing(real: Callable[..., Any], nth: int, error: int) -> Callable[..., Any]:
    calls = [0]

    def call(*args: Any, **rest: Any) -> Any:
        calls[0] += 1
        if calls[0] >= nth:
            raise OSError(error, os.strerror(error))
        return real(*args, **rest)

    return call


def test_a_full_disk_is_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    cache = cache_in(tmp_path)
    part = cache.begin(DIGEST, len(DATA))
    assert part is not None
    monkeypatch.setattr(module.os, "pwrite", failing(os.pwrite, 1, errno.ENOSPC))
    with caplog.at_level(logging.WARNING):
        for index in range(N):
            part.write([index], bytearray(DATA))
        part.complete()
    assert caplog.text.count("cannot be written: No space left on device") == 1
    assert "goes on without it" in caplog.text
    assert names(tmp_path / "cache") == set()
