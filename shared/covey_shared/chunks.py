"""Content-addressed blobs <-> frames small enough for any broker.

A blob (a graph, a model, a masked update) is named by its SHA-256. It travels as frames of at most
`MAX_PAYLOAD_BYTES`, each with a fixed header, so that a frame makes sense wherever it turns up:

======  =====  ====================================================
offset  bytes  field (big-endian)
======  =====  ====================================================
0       1      version
1       32     SHA-256 of the whole blob
33      8      size of the whole blob in bytes
41      4      index of this chunk
45      n      the chunk's data: `CHUNK_BYTES`, or the rest of the blob
======  =====  ====================================================

Frames get lost, doubled and reordered; `Assembly` does not mind and says what is still missing.
Frames are not signed. What is signed is the message that named digest and size beforehand: size
bounds what an assembly may hold, and the digest decides, at the end, whether it is what was meant.

No files here: bytes come from a `Read` and go to a `Sink`, which is memory on a device and a spool
file on the coordinator.
"""

import hashlib
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NewType, Protocol

from covey_shared.errors import LocalProtocolError, MalformedError, RefusedError

BlobDigest = NewType("BlobDigest", bytes)
"""SHA-256 of a whole blob, 32 bytes."""

VERSION = 1

CHUNK_BYTES = 29 * 4096
"""Data of every chunk but the last: whole pages, so that a spool file is written page by page, and
with header and topic still below 120 KiB, the smallest limit we want to fit in."""

MAX_BLOB_BYTES = 1 << 31
"""Twice the largest flat vector a plan may have; also keeps chunk indices far from 32 bits."""

_HEADER = struct.Struct(">B32sQI")
HEADER_BYTES = _HEADER.size

Read = Callable[[int, int], bytes | memoryview]
"""read(offset, n_bytes) -> exactly those bytes of a blob."""


class Sink(Protocol):
    """Where an assembly keeps what it has: random access to `size` bytes.

    read is only asked for what was written before. Either may raise StorageError.
    """

    def write(self, offset: int, data: bytes | memoryview) -> None:
        """Store data at offset."""

    def read(self, offset: int, n_bytes: int) -> bytes | memoryview:
        """Exactly the n_bytes at offset."""


class MemorySink:
    """A blob of known size in memory. data: the bytes, complete once the assembly says so."""

    __slots__ = ("data",)

    def __init__(self, size: int) -> None:
        self.data = bytearray(size)

    def write(self, offset: int, data: bytes | memoryview) -> None:
        """Store data at offset; never grows."""
        if not 0 <= offset <= len(self.data) - len(data):
            raise LocalProtocolError(f"write of {len(data)} bytes at {offset} is out of the blob")
        self.data[offset : offset + len(data)] = data

    def read(self, offset: int, n_bytes: int) -> memoryview:
        """A view, not a copy, of the n_bytes at offset."""
        return memoryview(self.data)[offset : offset + n_bytes]


@dataclass(frozen=True, slots=True)
class Blob:
    """A blob that can be sent. read need not hold it in memory: a spool file will do."""

    digest: BlobDigest
    size: int
    read: Read

    @property
    def n_chunks(self) -> int:
        """How many frames it takes."""
        return n_chunks(self.size)


@dataclass(frozen=True, slots=True)
class Chunk:
    """One decoded frame; its fields are consistent with each other, and that is all."""

    digest: BlobDigest
    size: int
    index: int
    data: bytes


def n_chunks(size: int) -> int:
    """Chunks of a blob of `size` bytes; none for an empty one."""
    return -(-size // CHUNK_BYTES)


def chunk_size(size: int, index: int) -> int:
    """Bytes of data in chunk `index` of a blob of `size` bytes."""
    return min(CHUNK_BYTES, size - index * CHUNK_BYTES)


def blob_of(data: bytes | memoryview) -> Blob:
    """A blob from bytes in memory, which must not change while it is being sent."""
    view = memoryview(data).cast("B")
    return Blob(
        digest=BlobDigest(hashlib.sha256(view).digest()),
        size=len(view),
        read=lambda offset, n_bytes: view[offset : offset + n_bytes],
    )


def digest_of(read: Read, size: int) -> BlobDigest:
    """SHA-256 of a blob, a chunk at a time."""
    digest = hashlib.sha256()
    for offset in range(0, size, CHUNK_BYTES):
        digest.update(read(offset, min(CHUNK_BYTES, size - offset)))
    return BlobDigest(digest.digest())


def frame(blob: Blob, index: int) -> bytes:
    """Frame number `index` of a blob. Raises LocalProtocolError if it has no such chunk."""
    if not 0 <= index < blob.n_chunks:
        raise LocalProtocolError(f"blob of {blob.n_chunks} chunks has no chunk {index}")
    if blob.size > MAX_BLOB_BYTES:
        raise LocalProtocolError(f"blob of {blob.size} bytes; at most {MAX_BLOB_BYTES}")
    wanted = chunk_size(blob.size, index)
    data = blob.read(index * CHUNK_BYTES, wanted)
    if len(data) != wanted:
        raise LocalProtocolError(
            f"blob {blob.digest.hex()[:16]} was read short: {len(data)} of {wanted} bytes"
        )
    return b"".join((_HEADER.pack(VERSION, blob.digest, blob.size, index), data))


def split(blob: Blob) -> Iterator[bytes]:
    """All frames of a blob in order, made one at a time as they are asked for."""
    return (frame(blob, index) for index in range(blob.n_chunks))


def decode_frame(data: bytes) -> Chunk:
    """Bytes from the network -> chunk. Raises MalformedError, whatever the bytes.

    Accepted bytes re-encode to the same bytes: every field is fixed by the others' meaning.
    """
    if len(data) <= HEADER_BYTES:
        raise MalformedError(f"chunk frame of {len(data)} bytes; more than {HEADER_BYTES} expected")
    version, digest, size, index = _HEADER.unpack_from(data)
    if version != VERSION:
        raise MalformedError(
            f"chunk frame has version {version}, this covey reads {VERSION}: upgrade the older side"
        )
    if size > MAX_BLOB_BYTES:
        raise MalformedError(f"chunk of a blob of {size} bytes; at most {MAX_BLOB_BYTES}")
    if index >= n_chunks(size):
        raise MalformedError(f"chunk {index} of a blob of {n_chunks(size)} chunks")
    if len(data) - HEADER_BYTES != chunk_size(size, index):
        raise MalformedError(
            f"chunk {index} carries {len(data) - HEADER_BYTES} bytes, "
            f"expected {chunk_size(size, index)}"
        )
    return Chunk(BlobDigest(digest), size, index, bytes(data[HEADER_BYTES:]))


class Assembly:
    """One blob on its way in.

    digest, size: from a signed message, not from the frames. sink: holds `size` bytes and no more.
    received: an earlier assembly's `received`, to resume over the same sink.

    Besides the sink it keeps one byte per chunk. Raises RefusedError if the blob is larger than
    MAX_BLOB_BYTES, LocalProtocolError if `received` is not of this size.
    """

    def __init__(
        self, digest: BlobDigest, size: int, sink: Sink, *, received: bytes | None = None
    ) -> None:
        if not 0 <= size <= MAX_BLOB_BYTES:
            raise RefusedError(f"blob of {size} bytes; at most {MAX_BLOB_BYTES}")
        self.digest = digest
        self.size = size
        self._sink = sink
        self._have = bytearray(n_chunks(size))
        if received is not None:
            self._resume(received)
        self._n_missing = self._have.count(0)

    @property
    def n_chunks(self) -> int:
        """Chunks of the whole blob."""
        return len(self._have)

    @property
    def n_received(self) -> int:
        """Different chunks so far."""
        return len(self._have) - self._n_missing

    @property
    def complete(self) -> bool:
        """Every chunk is there; `verify` tells whether they are the right ones."""
        return self._n_missing == 0

    def add(self, chunk: Chunk) -> bool:
        """Store a chunk; True if the blob is now complete.

        A repeated chunk changes nothing. Raises MalformedError, and changes nothing, if the chunk
        belongs to another blob, claims another size, or differs from the one already here.
        """
        if chunk.digest != self.digest or chunk.size != self.size:
            raise MalformedError(
                f"chunk of blob {chunk.digest.hex()[:16]} ({chunk.size} bytes), "
                f"expected {self.digest.hex()[:16]} ({self.size} bytes)"
            )
        if not 0 <= chunk.index < self.n_chunks:
            raise MalformedError(f"chunk {chunk.index} of a blob of {self.n_chunks} chunks")
        if len(chunk.data) != chunk_size(self.size, chunk.index):
            raise MalformedError(f"chunk {chunk.index} carries {len(chunk.data)} bytes")
        offset = chunk.index * CHUNK_BYTES
        if self._have[chunk.index]:
            if self._sink.read(offset, len(chunk.data)) != chunk.data:
                raise MalformedError(
                    f"chunk {chunk.index} of blob {self.digest.hex()[:16]} came twice, differing"
                )
        else:
            self._sink.write(offset, chunk.data)
            self._have[chunk.index] = 1
            self._n_missing -= 1
        return self.complete

    def missing(self, limit: int) -> tuple[tuple[int, int], ...]:
        """The first `limit` gaps, as (first index, count): what to ask for again."""
        gaps: list[tuple[int, int]] = []
        first = self._have.find(0)
        while first >= 0 and len(gaps) < limit:
            end = self._have.find(1, first)
            end = self.n_chunks if end < 0 else end
            gaps.append((first, end - first))
            first = self._have.find(0, end)
        return tuple(gaps)

    @property
    def received(self) -> bytes:
        """One bit per chunk, lowest bit first; to be kept beside the sink and resumed from."""
        bitmap = bytearray(-(-self.n_chunks // 8))
        for index, have in enumerate(self._have):
            bitmap[index >> 3] |= have << (index & 7)
        return bytes(bitmap)

    def verify(self) -> None:
        """Digest the whole blob. Raises MalformedError if it is not the one that was named.

        After a mismatch nobody can say which chunk was wrong: `reset`, and ask for all of them.
        """
        if not self.complete:
            raise LocalProtocolError(f"{self._n_missing} chunks are missing: nothing to verify yet")
        actual = digest_of(self._sink.read, self.size)
        if actual != self.digest:
            raise MalformedError(
                f"blob has digest {actual.hex()[:16]}, expected {self.digest.hex()[:16]}: "
                "fetch it again"
            )

    def reset(self) -> None:
        """Forget every chunk; the sink is written over."""
        self._have = bytearray(self.n_chunks)
        self._n_missing = self.n_chunks

    def _resume(self, received: bytes) -> None:
        n = self.n_chunks
        if len(received) != -(-n // 8) or int.from_bytes(received, "little") >> n:
            raise LocalProtocolError(f"bitmap of {len(received)} bytes is not one of {n} chunks")
        for index in range(n):
            self._have[index] = received[index >> 3] >> (index & 7) & 1
