"""Blobs to frames and back: whatever the network does to them, and whatever it makes up."""

import hashlib
import itertools
import struct
import tracemalloc
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from covey_shared import chunks
from covey_shared.chunks import CHUNK_BYTES, HEADER_BYTES, Assembly, BlobDigest, MemorySink
from covey_shared.errors import LocalProtocolError, MalformedError, RefusedError
from covey_shared.transport import MAX_PAYLOAD_BYTES

# Real chunks are too large for many examples; what depends on the size is told by a handful.
SIZES = [1, 2, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 3 * CHUNK_BYTES, 5 * CHUNK_BYTES + 7]


def payload(size: int, seed: int = 0) -> bytes:
    """Incompressible bytes, the same every time."""
    return hashlib.shake_256(seed.to_bytes(8, "big")).digest(size)


def assembly_for(blob: chunks.Blob) -> tuple[Assembly, MemorySink]:
    sink = MemorySink(blob.size)
    return Assembly(blob.digest, blob.size, sink), sink


def test_frames_fit_the_transport() -> None:
    assert HEADER_BYTES + CHUNK_BYTES <= MAX_PAYLOAD_BYTES
    assert CHUNK_BYTES % 4096 == 0


def test_a_frame_is_these_bytes() -> None:
    data = b"hello"
    blob = chunks.blob_of(data)
    assert list(chunks.split(blob)) == [
        bytes.fromhex(
            "01"
            "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824"
            "0000000000000005"
            "00000000"
        )
        + data
    ]


@pytest.mark.parametrize("size", SIZES)
def test_split_and_reassemble(size: int) -> None:
    data = payload(size)
    blob = chunks.blob_of(data)
    frames = list(chunks.split(blob))
    assert len(frames) == blob.n_chunks
    assert max(map(len, frames)) <= MAX_PAYLOAD_BYTES
    assembly, sink = assembly_for(blob)
    answers = [assembly.add(chunks.decode_frame(frame)) for frame in frames]
    assert answers == [False] * (len(frames) - 1) + [True]
    assembly.verify()
    assert sink.data == data


def test_an_empty_blob_needs_no_frame() -> None:
    blob = chunks.blob_of(b"")
    assert list(chunks.split(blob)) == []
    assembly, _ = assembly_for(blob)
    assert assembly.complete
    assert assembly.missing(8) == ()
    assert assembly.received == b""
    assembly.verify()


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(SIZES), st.data())
def test_shuffled_and_doubled_chunks_reassemble(size: int, draw: st.DataObject) -> None:
    data = payload(size)
    blob = chunks.blob_of(data)
    indices = draw.draw(st.permutations(range(blob.n_chunks)))
    doubles = draw.draw(st.lists(st.sampled_from(indices), max_size=6))
    order = draw.draw(st.permutations(indices + doubles))
    assembly, sink = assembly_for(blob)
    seen: set[int] = set()
    for index in order:
        seen.add(index)
        complete = assembly.add(chunks.decode_frame(chunks.frame(blob, index)))
        assert complete == (len(seen) == blob.n_chunks)
        assert assembly.n_received == len(seen)
    assembly.verify()
    assert sink.data == data


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 200), st.data(), st.integers(0, 70))
def test_missing_names_exactly_the_gaps(n: int, draw: st.DataObject, limit: int) -> None:
    have = draw.draw(st.sets(st.integers(0, n - 1)))
    bitmap = sum(1 << index for index in have).to_bytes(-(-n // 8), "little")
    size = n * CHUNK_BYTES
    assembly = Assembly(BlobDigest(b"d" * 32), size, NoSink(), received=bitmap)
    assert assembly.received == bitmap
    assert assembly.n_received == len(have)
    gaps = assembly.missing(n)
    assert [i for first, count in gaps for i in range(first, first + count)] == [
        i for i in range(n) if i not in have
    ]
    assert all(a[0] + a[1] < b[0] for a, b in itertools.pairwise(gaps))
    assert assembly.missing(limit) == gaps[:limit]


class NoSink:
    """A sink that nothing may touch."""

    def write(self, offset: int, data: bytes | memoryview) -> None:
        raise AssertionError

    def read(self, offset: int, n_bytes: int) -> bytes:
        raise AssertionError


def test_resume_over_the_same_sink() -> None:
    data = payload(4 * CHUNK_BYTES + 1)
    blob = chunks.blob_of(data)
    assembly, sink = assembly_for(blob)
    for index in (0, 3):
        assembly.add(chunks.decode_frame(chunks.frame(blob, index)))
    again = Assembly(blob.digest, blob.size, sink, received=assembly.received)
    assert again.missing(8) == ((1, 2), (4, 1))
    for index in (1, 2, 4):
        again.add(chunks.decode_frame(chunks.frame(blob, index)))
    again.verify()
    assert sink.data == data


@pytest.mark.parametrize("bitmap", [b"", b"\0\0", b"\x20", b"\xff"])
def test_a_bitmap_of_another_size_is_refused(bitmap: bytes) -> None:
    with pytest.raises(LocalProtocolError, match="bitmap"):
        Assembly(BlobDigest(b"d" * 32), 5 * CHUNK_BYTES, NoSink(), received=bitmap)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200))
def test_arbitrary_bytes_raise_only_malformed(data: bytes) -> None:
    try:
        chunk = chunks.decode_frame(data)
    except MalformedError:
        return
    assert reencode(chunk) == data


@settings(max_examples=300, deadline=None)
@given(
    st.integers(0, 255),
    st.integers(0, 2**64 - 1) | st.integers(0, 300),
    st.integers(0, 2**32 - 1) | st.integers(0, 3),
    st.integers(0, 300),
)
def test_forged_headers_raise_only_malformed(
    version: int, size: int, index: int, n_data: int
) -> None:
    data = struct.pack(">B32sQI", version, b"d" * 32, size, index) + bytes(n_data)
    try:
        chunk = chunks.decode_frame(data)
    except MalformedError:
        return
    assert (version, index, size) == (1, 0, n_data)
    assert reencode(chunk) == data


def reencode(chunk: chunks.Chunk) -> bytes:
    blob = chunks.Blob(chunk.digest, chunk.size, lambda offset, n_bytes: chunk.data)
    return chunks.frame(blob, chunk.index)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "version 2"),
        ({"size": chunks.MAX_BLOB_BYTES + 1}, "at most"),
        ({"size": 0}, "of 0 chunks"),
        ({"index": 2}, "chunk 2 of a blob of 2"),
        ({"index": 1}, "expected 1"),
        ({"data": payload(CHUNK_BYTES - 1)}, f"carries {CHUNK_BYTES - 1}"),
        ({"data": payload(CHUNK_BYTES + 1)}, f"carries {CHUNK_BYTES + 1}"),
        ({"data": b""}, "more than 45"),
    ],
)
def test_what_is_wrong_with_a_frame_is_said(change: dict[str, object], message: str) -> None:
    fields = {"version": 1, "size": CHUNK_BYTES + 1, "index": 0, "data": payload(CHUNK_BYTES)}
    fields |= change
    header = struct.pack(">B32sQI", fields["version"], b"d" * 32, fields["size"], fields["index"])
    with pytest.raises(MalformedError, match=message):
        chunks.decode_frame(header + fields["data"])  # type: ignore[operator]


def test_a_differing_duplicate_is_refused_and_changes_nothing() -> None:
    data = payload(2 * CHUNK_BYTES)
    blob = chunks.blob_of(data)
    assembly, sink = assembly_for(blob)
    first = chunks.decode_frame(chunks.frame(blob, 0))
    assembly.add(first)
    forged = chunks.Chunk(blob.digest, blob.size, 0, payload(CHUNK_BYTES, seed=1))
    with pytest.raises(MalformedError, match="came twice, differing"):
        assembly.add(forged)
    assert sink.data[:CHUNK_BYTES] == data[:CHUNK_BYTES]
    assert not assembly.add(first)
    assert assembly.missing(8) == ((1, 1),)


@pytest.mark.parametrize(
    "chunk",
    [
        chunks.Chunk(BlobDigest(b"e" * 32), 10, 0, b"0123456789"),
        chunks.Chunk(BlobDigest(b"d" * 32), 11, 0, b"0123456789a"),
        chunks.Chunk(BlobDigest(b"d" * 32), 10, 0, b"012345678"),
        chunks.Chunk(BlobDigest(b"d" * 32), 10, 0, b"0123456789a"),
        chunks.Chunk(BlobDigest(b"d" * 32), 10, 1, b""),
        chunks.Chunk(BlobDigest(b"d" * 32), 10, -1, b""),
    ],
    ids=["digest", "size", "short", "long", "index", "negative index"],
)
def test_a_chunk_that_does_not_belong_is_refused(chunk: chunks.Chunk) -> None:
    assembly = Assembly(BlobDigest(b"d" * 32), 10, NoSink())
    with pytest.raises(MalformedError):
        assembly.add(chunk)
    assert assembly.n_received == 0


def test_a_wrong_digest_is_found_and_reset_starts_over() -> None:
    data = payload(2 * CHUNK_BYTES)
    blob = chunks.blob_of(data)
    assembly, sink = assembly_for(blob)
    with pytest.raises(LocalProtocolError, match="2 chunks are missing"):
        assembly.verify()
    assembly.add(chunks.Chunk(blob.digest, blob.size, 0, payload(CHUNK_BYTES, seed=1)))
    assembly.add(chunks.decode_frame(chunks.frame(blob, 1)))
    with pytest.raises(MalformedError, match="fetch it again"):
        assembly.verify()
    assembly.reset()
    assert assembly.missing(8) == ((0, 2),)
    for frame in chunks.split(blob):
        assembly.add(chunks.decode_frame(frame))
    assembly.verify()
    assert sink.data == data


def test_an_oversize_blob_is_refused_before_anything_is_held() -> None:
    with pytest.raises(RefusedError, match="at most"):
        Assembly(BlobDigest(b"d" * 32), chunks.MAX_BLOB_BYTES + 1, NoSink())
    blob = chunks.Blob(BlobDigest(b"d" * 32), chunks.MAX_BLOB_BYTES + 1, lambda offset, n: b"")
    with pytest.raises(LocalProtocolError, match="at most"):
        chunks.frame(blob, 0)


def test_memory_is_bounded_by_the_declared_size() -> None:
    size = 40 * CHUNK_BYTES
    digest = BlobDigest(b"d" * 32)
    forged = payload(CHUNK_BYTES)
    tracemalloc.start()
    try:
        assembly = Assembly(digest, size, MemorySink(size))
        # ten times as many frames as fit, most of them lies
        for index in range(400):
            header = struct.pack(">B32sQI", 1, digest, 400 * CHUNK_BYTES, index)
            claim = chunks.decode_frame(header + forged)
            with pytest.raises(MalformedError):
                assembly.add(claim)
            if index < 40:
                assembly.add(chunks.Chunk(digest, size, index, forged))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert assembly.complete
    assert peak < size + 8 * CHUNK_BYTES


def test_splitting_holds_one_frame_at_a_time() -> None:
    n = 60
    reads: list[int] = []

    def read(offset: int, n_bytes: int) -> bytes:
        reads.append(offset)
        return bytes(n_bytes)

    blob = chunks.Blob(BlobDigest(b"d" * 32), n * CHUNK_BYTES, read)
    frames: Iterator[bytes] = chunks.split(blob)
    next(frames)
    assert reads == [0]
    tracemalloc.start()
    try:
        assert sum(1 for _ in frames) == n - 1
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 8 * CHUNK_BYTES


def test_a_source_that_reads_short_is_our_fault() -> None:
    blob = chunks.Blob(BlobDigest(b"d" * 32), 10, lambda offset, n_bytes: b"12345")
    with pytest.raises(LocalProtocolError, match="read short: 5 of 10"):
        chunks.frame(blob, 0)
    with pytest.raises(LocalProtocolError, match="no chunk 1"):
        chunks.frame(blob, 1)


def test_a_memory_sink_never_grows() -> None:
    sink = MemorySink(4)
    sink.write(1, b"ab")
    assert bytes(sink.read(0, 4)) == b"\0ab\0"
    for offset, data in ((-1, b"a"), (4, b"a"), (2, b"abc"), (0, b"abcde")):
        with pytest.raises(LocalProtocolError):
            sink.write(offset, data)
    assert len(sink.data) == 4
