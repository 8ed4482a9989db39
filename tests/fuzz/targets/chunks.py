"""Chunk frames and their reassembly: a program of losses, doubles, damage and resumption, held to a model.

An input is a blob's size and steps; each step is an operation, the index of a chunk and a parameter. What an
assembly says must be what a plain dictionary of the chunks that arrived says. Chunks and the largest
blob are small here: else most of the time would go into copying.
"""

import contextlib
import functools
import hashlib
import random
from collections.abc import Iterator
from unittest import mock

from covey_shared import chunks
from covey_shared.chunks import (
    HEADER_BYTES,
    Assembly,
    Blob,
    BlobDigest,
    chunk_size,
    decode_frame,
    frame,
    n_chunks,
)
from covey_shared.errors import LocalProtocolError, MalformedError, RefusedError
from fuzz.harness import Mutate, Run, Target, expect

CHUNK_BYTES = 64
MAX_BLOB_BYTES = 500 * CHUNK_BYTES

_STEP = 6
"""Bytes of a step: operation, index of a chunk (2), parameter (3)."""

_RAW = 11
"""The operation whose parameter is how many bytes follow, as they are, as a frame."""


@functools.lru_cache(maxsize=64)
def _blob(size: int) -> Blob:
    """A blob of this size, made up as it is read."""

    def read(offset: int, n: int) -> bytes:
        return _pattern(offset // CHUNK_BYTES)[:n]

    state = hashlib.sha256()
    for index in range(n_chunks(size)):
        state.update(_pattern(index)[: chunk_size(size, index)])
    return Blob(BlobDigest(state.digest()), size, read)


@functools.lru_cache(maxsize=512)
def _pattern(index: int) -> bytes:
    return hashlib.sha512(str(index).encode()).digest()


class _Sink:
    """Keeps what is written, chunk by chunk, and minds its bounds."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.chunks: dict[int, bytes] = {}

    def write(self, offset: int, data: bytes | memoryview) -> None:
        expect(
            offset % CHUNK_BYTES == 0 and offset + len(data) <= self.size, "written out of the blob"
        )
        self.chunks[offset] = bytes(data)

    def read(self, offset: int, n_bytes: int) -> bytes:
        expect(0 <= offset <= offset + n_bytes <= self.size, "read out of the blob")
        expect(offset in self.chunks, "read what was never written")
        return self.chunks[offset][:n_bytes]


class _Play:
    def __init__(self, size: int) -> None:
        self.blob = _blob(size)
        self.sink = _Sink(size)
        self.have: dict[int, bytes] = {}
        self.assembly = Assembly(self.blob.digest, size, self.sink)

    def step(self, op: int, index: int, parameter: int) -> str:
        n = self.assembly.n_chunks
        at = index % n if n else 0
        match op:
            case 0 | 1 | 2 | 3 | 4 if n:
                return self.deliver(self._frame(op, at, parameter))
            case 5:
                return self.resume(self.assembly.received)
            case 6:
                return self.resume(parameter.to_bytes(3, "little")[: -(-n // 8)])
            case 7:
                limit = parameter % 70
                gaps = self.assembly.missing(limit)
                expect(gaps == self._gaps()[:limit], "gaps that are none")
                return "missing"
            case 8:
                self.assembly.reset()
                self.have.clear()
                return "reset"
            case 9:
                return self.verify()
            case 10 if n and n <= 64:  # the rest, in any order
                for i in sorted(range(n), key=lambda i: (i * (2 * parameter + 1)) % (n | 1)):
                    self.deliver(frame(self.blob, i))
                return "all"
        return ""

    def _frame(self, op: int, at: int, parameter: int) -> bytes:
        made = bytearray(frame(self.blob, at))
        if op == 1:  # a damaged byte anywhere
            made[parameter % len(made)] ^= 1 + parameter // len(made) % 255
        elif op == 2:  # another size is claimed
            made[33:41] = (self.blob.size ^ 1 << parameter % 64).to_bytes(8, "big")
        elif op == 3:  # longer or shorter
            made = made[: parameter % len(made)] if parameter % 2 else made + bytes(parameter % 100)
        elif op == 4:  # another place
            made[41:45] = (at ^ parameter).to_bytes(4, "big")
        return bytes(made)

    def deliver(self, data: bytes) -> str:
        try:
            chunk = decode_frame(data)
        except MalformedError as error:
            expect(self.same(), "a refused frame changed something")
            return f"frame {error}"
        expect(
            frame(Blob(chunk.digest, chunk.size, lambda o, k: chunk.data), chunk.index) == data,
            "frame",
        )
        mine = (chunk.digest, chunk.size) == (self.blob.digest, self.blob.size)
        fits = mine and self.have.get(chunk.index, chunk.data) == chunk.data
        try:
            complete = self.assembly.add(chunk)
        except MalformedError as error:
            expect(not fits, "a good chunk was refused")
            expect(self.same(), "a refused chunk changed something")
            return f"chunk {error}"
        expect(fits, "a bad chunk was taken")
        self.have[chunk.index] = chunk.data
        expect(complete == (len(self.have) == self.assembly.n_chunks), "complete")
        return "chunk taken"

    def resume(self, received: bytes) -> str:
        """A new process goes on over what the last one wrote. Bits of chunks that never came are not claimed:
        the bitmap is kept by us, after the chunk."""
        n = self.assembly.n_chunks
        bits = int.from_bytes(received, "little")
        if not bits >> n and any(
            bits >> i & 1 and i * CHUNK_BYTES not in self.sink.chunks for i in range(n)
        ):
            return ""
        try:
            again = Assembly(self.blob.digest, self.blob.size, self.sink, received=received)
        except LocalProtocolError as error:
            expect(len(received) != -(-n // 8) or bool(bits >> n), "a good bitmap was refused")
            return f"resume {error}"
        expect(again.received == received, "a bitmap does not come back")
        self.assembly = again
        self.have = {
            i: self.sink.chunks[i * CHUNK_BYTES]
            for i in range(n)
            if received[i >> 3] >> (i & 7) & 1
        }
        return "resumed"

    def verify(self) -> str:
        if not self.assembly.complete:
            return ""
        good = all(self.have[i] == _pattern(i)[: len(self.have[i])] for i in self.have)
        try:
            self.assembly.verify()
        except MalformedError as error:
            expect(not good, "a good blob was refused")
            return f"verify {error}"
        expect(good, "a damaged blob was taken")
        return "verified"

    def same(self) -> bool:
        n = self.assembly.n_chunks
        if n > 64:
            return self.assembly.n_received == len(self.have)
        bits = int.from_bytes(self.assembly.received, "little")
        return self.assembly.n_received == len(self.have) and all(
            bool(bits >> i & 1) == (i in self.have) for i in range(n)
        )

    def _gaps(self) -> tuple[tuple[int, int], ...]:
        gaps: list[list[int]] = []
        for i in range(self.assembly.n_chunks):
            if i in self.have:
                continue
            if gaps and sum(gaps[-1]) == i:
                gaps[-1][1] += 1
            else:
                gaps.append([i, 1])
        return tuple((first, count) for first, count in gaps)


def _size(data: bytes) -> int:
    """Of the blob: a few chunks and a rest; now and then about the largest there may be."""
    kind, rest = data[0], int.from_bytes(data[1:4], "big")
    if kind & 0x80:
        return MAX_BLOB_BYTES + rest % 5 - 2 if kind & 1 else rest % MAX_BLOB_BYTES
    return (kind % 6) * CHUNK_BYTES + (rest % (2 * CHUNK_BYTES) if kind & 0x40 else rest % 3)


def _read(data: bytes) -> list[str]:
    if len(data) < 4:
        return []
    try:
        play = _Play(_size(data))
    except RefusedError as error:
        return [str(error)]
    trail, at = [], 4
    while at + _STEP <= len(data) and len(trail) < 40:
        op, index = data[at] % 12, int.from_bytes(data[at + 1 : at + 3], "big")
        parameter = int.from_bytes(data[at + 3 : at + 6], "big")
        at += _STEP
        if op == _RAW:
            size = parameter % 400
            trail.append("raw " + play.deliver(data[at : at + size]))
            at += size
        else:
            trail.append(f"{op} " + play.step(op, index, parameter))
    return trail


@contextlib.contextmanager
def ready() -> Iterator[Run]:
    """Small chunks."""
    with (
        mock.patch.object(chunks, "CHUNK_BYTES", CHUNK_BYTES),
        mock.patch.object(chunks, "MAX_BLOB_BYTES", MAX_BLOB_BYTES),
    ):
        _blob.cache_clear()
        yield _read


def _memory(n: int) -> int:
    # One byte a chunk of the largest blob, twice at a resumption, and its bitmap; the chunks that were
    # delivered, and what the model here holds.
    return 3 * (MAX_BLOB_BYTES // CHUNK_BYTES) + 256 * 1024 + 64 * n


def _mutate(data: bytes, longest: int, chance: random.Random, mutate: Mutate) -> bytes:
    """Steps put in, left out, doubled and exchanged."""
    head, steps = data[:4], [data[i : i + _STEP] for i in range(4, len(data), _STEP)]
    for _ in range(chance.choice((1, 2, 4))):
        at = chance.randrange(len(steps) + 1)
        match chance.randrange(4):
            case 0 | 1:
                op, index = chance.randrange(11), chance.choice((0, 0, 1, 2, 3, 4, 5, 65535))
                parameter = chance.choice(
                    (0, 1, 2, HEADER_BYTES, CHUNK_BYTES, chance.randrange(2**24))
                )
                steps.insert(
                    at, bytes((op,)) + index.to_bytes(2, "big") + parameter.to_bytes(3, "big")
                )
            case 2 if steps:
                steps.insert(at, chance.choice(steps))
            case 3 if steps:
                del steps[at - 1]
    return (mutate(head, 4) if chance.random() < 0.2 else head) + b"".join(steps)


def _seeds() -> Iterator[bytes]:
    with ready():
        yield from _programs()


def _programs() -> Iterator[bytes]:
    def program(kind: int, rest: int, *steps: tuple[int, int, int]) -> bytes:
        made = bytes((kind,)) + rest.to_bytes(3, "big")
        for op, index, parameter in steps:
            made += bytes((op,)) + index.to_bytes(2, "big") + parameter.to_bytes(3, "big")
        return made

    yield program(0x42, 100, (10, 0, 5), (9, 0, 0))
    yield program(0x43, 7, (0, 2, 0), (0, 0, 0), (7, 0, 9), (5, 0, 0), (10, 0, 1), (9, 0, 0))
    yield program(
        0x42, 9, (1, 0, 50), (0, 0, 0), (10, 0, 0), (9, 0, 0), (8, 0, 0), (10, 0, 0), (9, 0, 0)
    )
    for op in range(5):
        yield program(0x45, 3, (op, 1, 77), (op, 1, 41), (7, 0, 64))
    yield program(0x80, 0xFFFFFF, (0, 7, 0), (7, 0, 2), (5, 0, 0))
    yield program(0x81, 2, (0, 65535, 0))
    yield program(0x81, 3)
    yield program(0x41, 0, (6, 0, 1), (0, 0, 0), (6, 0, 1), (6, 0, 255))
    small = frame(_blob(5), 0)
    yield program(0x40, 5, (_RAW, 0, len(small))) + small


TARGET = Target("chunks", ready, memory=_memory, seeds=_seeds, mutate=_mutate, longest=1024)
