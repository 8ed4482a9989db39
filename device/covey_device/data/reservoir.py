"""A uniform sample of all examples that there ever were, kept in one file.

Each set of `capacity` examples of those seen so far is as likely as any other to be the one that is held
(sampling without replacement), however many were seen, whatever became of their shards, and across
restarts. Source: Li 1994, "Reservoir-sampling algorithms of time complexity O(n(1 + log(N/n)))", ACM
Transactions on Mathematical Software 20(4), algorithm L.

The file is a log. What was taken of a shard is one record, appended whole: the shard's name, how many
examples were seen, and the chosen examples with the slots that they go into. Replaying the records gives
the sample; a record that a power cut tore is not there, and its shard is read again. So each chosen
example is written once, and a shard of which nothing is chosen costs a few dozen bytes. Examples that
were replaced are left behind; when they are more than half of the file, it is written anew.

Whatever was written at an offset stays there until the file is replaced as a whole. So a reader needs no
lock: a descriptor and offsets that were right once stay right.
"""

import contextlib
import fcntl
import logging
import math
import os
import struct
import sys
import weakref
import zlib
from array import array as Buffer
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from covey_device.data.fit import Array
from covey_device.data.window import Kind, Places
from covey_shared.errors import StorageError

log = logging.getLogger("covey.device")

SLACK_BYTES = 1 << 20
"""A file this small is not written anew."""

MAX_NAMES = 1 << 20
"""Shards that are remembered as taken, 8 bytes each; beyond that the first ones are forgotten."""

NOWHERE = -1
"""The offset of an example that is lost: a damaged file may lack some."""

_FRAME = struct.Struct("<4sIQI")  # magic, bytes of the head, bytes of examples, crc32 of both
_MAGIC = b"CVR1"
_PIECE = 1 << 20
_NAME_BYTES = 8
_MAX_HEAD = 64 << 20

Rows = NDArray[np.int64]
Slots = NDArray[np.uint32]


class _Head(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    """capacity, seen: as they are after this record. names: hashes of shards taken with it. slots:
    uint32, where its examples go; a later record's go before an earlier one's."""

    capacity: int
    seen: int
    names: bytes
    slots: bytes
    features: tuple[str, tuple[int, ...]]
    labels: tuple[str, tuple[int, ...]]


class LogFile:
    """A descriptor that is closed when nobody reads from it any more."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.inode = os.fstat(fd).st_ino
        weakref.finalize(self, os.close, fd)


def choose(n: int, seen: int, capacity: int, rng: np.random.Generator) -> tuple[Rows, Slots]:
    """Which of n further examples go into the sample -> their numbers, and the slot of each.

    seen: examples so far. No slot comes twice: what a later example replaces is left out.
    """
    first = min(n, max(0, capacity - seen))
    rows, slots = Buffer("q"), Buffer("q")
    if first < n:
        # Algorithm L gives every example a uniform number and keeps the `capacity` smallest, w being the
        # largest of them. Which examples are kept says nothing about w, so it need not be remembered: of
        # `seen` uniform numbers the capacity-th smallest is distributed as
        # Beta(capacity, seen - capacity + 1).
        log_w = math.log(max(rng.beta(capacity, seen + first - capacity + 1), sys.float_info.min))
        row = first - 1
        while True:
            row += 1 + _skip(math.exp(log_w), rng, n)
            if row >= n:
                break
            rows.append(row)
            slots.append(int(rng.integers(capacity)))
            log_w += math.log(1.0 - rng.random()) / capacity
    all_rows = np.concatenate([np.arange(first), np.array(rows, np.int64)])
    all_slots = np.concatenate([np.arange(seen, seen + first), np.array(slots, np.int64)])
    _, last = np.unique(all_slots[::-1], return_index=True)
    keep = np.sort(len(all_slots) - 1 - last)
    return all_rows[keep], all_slots[keep].astype(np.uint32)


def _skip(w: float, rng: np.random.Generator, most: int) -> int:
    """How many examples' numbers come before the next that is below w, or `most` if there are more: a
    geometric distribution."""
    u = 1.0 - rng.random()
    if w >= 1.0:
        return 0
    skip = math.log(u) / math.log1p(-w) if w > 0 else math.inf
    return int(skip) if skip < most else most


class Reservoir:
    """One device's. path: of the log. capacity: how many examples it holds at most.

    Not for several threads, but for `take`, with what `index` told before.
    """

    def __init__(self, path: Path, capacity: int, rng: np.random.Generator) -> None:
        """Raises StorageError if the file is there and cannot be read."""
        self.path = path
        self._wanted, self._rng = capacity, rng
        self._told_small = False
        self._clear()
        self.catch_up()

    def _clear(self) -> None:
        self.capacity, self.seen = self._wanted, 0
        self.kinds: list[Kind] = []
        self._file: LogFile | None = None
        self._end = 0
        self._kind: NDArray[np.uint8] = np.empty(0, np.uint8)
        self._place: Places = np.empty(0, np.int64)
        self._names: NDArray[np.uint64] = np.empty(0, np.uint64)
        self._fresh: list[bytes] = []  # taken since `_names` was made

    def __len__(self) -> int:
        return len(self._place)

    # -- reading ----------------------------------------------------------------------------------

    def index(self) -> tuple[NDArray[np.uint8], Places, LogFile | None]:
        """Kind and offset of the example in every slot, and the file that they lead into."""
        return self._kind.copy(), self._place.copy(), self._file

    def take(self, file: LogFile | None, kind: int, places: Places) -> tuple[Array, Array]:
        """Features and labels of these examples, as they are stored. Raises StorageError."""
        features, labels = self.kinds[kind].empty(len(places))
        if not len(places):
            return features, labels
        n_features, n_labels = self.kinds[kind].sizes
        size = n_features + n_labels
        raw = np.empty((len(places), size), np.uint8)
        assert file is not None  # noqa: S101  offsets lead into a file
        for row, place in enumerate(places.tolist()):
            try:
                got = os.preadv(file.fd, [raw[row]], place)
            except OSError as error:
                raise self._trouble("read", error) from error
            if got != size:
                raise StorageError(f"{self.path} was cut: it is read again from its start")
        for array, part in ((features, raw[:, :n_features]), (labels, raw[:, n_features:])):
            array.reshape(len(places), -1).view(np.uint8)[:] = part
        return features, labels

    def taken(self, names: list[str]) -> NDArray[np.bool_]:
        """Which of these shards were taken."""
        self._gather()
        hashes = np.frombuffer(b"".join(map(_hash, names)), np.uint64)
        return np.isin(hashes, self._names)

    def _gather(self) -> None:
        if self._fresh:
            fresh = np.frombuffer(b"".join(self._fresh), np.uint64)
            self._names = np.concatenate([self._names, fresh])[-MAX_NAMES:]
            self._fresh = []

    def catch_up(self) -> bool:
        """Read what another process added, or everything of a file that is new. Whether slots that were
        there before may hold other examples now. Raises StorageError."""
        try:
            fd = os.open(self.path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            again = self._file is not None
            self._clear()
            return again
        except OSError as error:
            raise self._trouble("opened", error) from error
        file = LogFile(fd)
        try:
            again = self._file is None or self._file.inode != file.inode
            if os.fstat(fd).st_size < self._end:
                again = True  # cut; what was read of it is not there any more
            if again:
                self._clear()
                self._file = file
            assert self._file is not None  # noqa: S101
            return self._replay(self._file.fd) or again
        except OSError as error:
            raise self._trouble("read", error) from error

    def _replay(self, fd: int) -> bool:
        """Records from `_end` on. Whether there were any."""
        size, begun = os.fstat(fd).st_size, self._end
        while self._end + _FRAME.size <= size:
            magic, n_head, n_rows, crc = _FRAME.unpack(os.pread(fd, _FRAME.size, self._end))
            start = self._end + _FRAME.size
            if magic != _MAGIC or n_head > _MAX_HEAD or start + n_head + n_rows > size:
                break
            raw = os.pread(fd, n_head, start)
            found = zlib.crc32(raw)
            for at in range(start + n_head, start + n_head + n_rows, _PIECE):
                found = zlib.crc32(
                    os.pread(fd, min(_PIECE, start + n_head + n_rows - at), at), found
                )
            end = start + n_head + n_rows
            if found != crc or not self._apply(raw, start + n_head, n_rows):
                if os.pread(fd, len(_MAGIC), end) != _MAGIC:
                    break  # the last record, or no way to the next one
                log.warning("%s is damaged: the examples of one shard are lost", self.path)
            self._end = end
        return self._end > begun

    def _apply(self, raw: bytes, place: int, n_bytes: int) -> bool:
        """Whether a record made sense, and holds now. place: where its examples begin."""
        try:
            head = msgspec.msgpack.decode(raw, type=_Head)
            kind = Kind(head.features, head.labels)
            size = sum(kind.sizes)
        except (msgspec.MsgspecError, ValueError, TypeError, MemoryError):
            return False
        if len(head.slots) % 4 or len(head.names) % _NAME_BYTES:
            return False
        slots = np.frombuffer(head.slots, np.uint32).astype(np.int64)
        filled = len(self._place)
        if len(slots):
            filled = max(filled, int(slots.max()) + 1)
        if len(slots) * size != n_bytes or filled > head.capacity or head.capacity < 1:
            return False
        self._set(kind, slots, place + size * np.arange(len(slots)), filled)
        self.capacity, self.seen = head.capacity, head.seen
        self._fresh.append(head.names)
        return True

    def _set(self, kind: Kind, slots: Rows, places: Places, filled: int) -> None:
        if kind not in self.kinds:
            self.kinds.append(kind)
        if filled > len(self._place):
            more = filled - len(self._place)
            self._kind = np.concatenate([self._kind, np.zeros(more, np.uint8)])
            self._place = np.concatenate([self._place, np.full(more, NOWHERE, np.int64)])
        self._kind[slots] = self.kinds.index(kind)
        self._place[slots] = places

    # -- writing ----------------------------------------------------------------------------------

    @contextlib.contextmanager
    def held(self) -> Iterator[bool]:
        """Within, nobody else writes to it; False if somebody else does. Raises StorageError."""
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
            fd = os.open(self.path.with_suffix(".lock"), flags, 0o600)
        except OSError as error:
            raise self._trouble("locked", error) from error
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            yield True
        finally:
            os.close(fd)

    def settle(self) -> bool:
        """Once held: cut off what a power cut left, and come to the wanted capacity. Whether slots hold
        other examples than before. Raises StorageError."""
        again = self.catch_up()
        try:
            if self._file is not None and (size := os.fstat(self._file.fd).st_size) > self._end:
                log.warning(
                    "%s: the last %d bytes are not whole, after a power cut or a failing disk; the "
                    "shards that they were of are read again if they are there",
                    self.path, size - self._end,
                )  # fmt: skip
                os.ftruncate(self._file.fd, self._end)
        except OSError as error:
            raise self._trouble("written", error) from error
        if self._wanted < self.capacity:
            # A uniform sample of a uniform sample is one.
            kept = min(self._wanted, len(self))
            slots = self._rng.choice(len(self), kept, replace=False)
            self._kind, self._place = self._kind[slots], self._place[slots]
            self.capacity = self._wanted
            if self._file is not None:
                self._rewrite()
            return True
        if self._wanted > self.capacity:
            if self.seen <= self.capacity:
                self.capacity = self._wanted  # all that was seen is here
            elif not self._told_small:
                self._told_small = True
                log.warning(
                    "%s is a sample of %d examples and cannot grow to max_examples = %d: those that were "
                    "not chosen are gone; it stays as it is. Delete it to begin anew with the shards "
                    "that are there",
                    self.path, self.capacity, self._wanted,
                )  # fmt: skip
        return again

    def add(self, name: str, features: Array, labels: Array) -> Slots:
        """Take a shard, once held and settled -> the slots that hold an example of it. It is on the disk
        after `sync`. Raises StorageError, and is as it was before."""
        rows, slots = choose(len(labels), self.seen, self.capacity, self._rng)
        kind = Kind.of(features, labels)
        sizes = kind.sizes
        packed = _packed(features[rows], labels[rows])
        head = _Head(
            self.capacity,
            self.seen + len(labels),
            _hash(name),
            slots.tobytes(),
            kind.features,
            kind.labels,
        )
        try:
            if self._file is None:
                self._create()
            assert self._file is not None  # noqa: S101
            place = _write(self._file.fd, self._end, head, packed)
        except OSError as error:
            with contextlib.suppress(OSError):
                if self._file is not None:
                    os.ftruncate(self._file.fd, self._end)
            raise self._trouble("written", error) from error
        filled = max([len(self), int(slots.max(initial=0)) + 1]) if len(slots) else len(self)
        self._set(kind, slots.astype(np.int64), place + sum(sizes) * np.arange(len(slots)), filled)
        self.seen = head.seen
        self._fresh.append(head.names)
        self._end = place + packed.nbytes
        return slots

    def sync(self) -> None:
        """All that was added is on the disk when this returns; the file is written anew if too much of it
        is of no use. Raises StorageError."""
        if self._file is None:
            return
        try:
            os.fdatasync(self._file.fd)
        except OSError as error:
            raise self._trouble("written", error) from error
        sizes = np.array([sum(kind.sizes) for kind in self.kinds], np.int64)
        live = int(sizes[self._kind].sum())
        if self._end > 2 * live + SLACK_BYTES + 2 * _NAME_BYTES * len(self._names):
            self._rewrite()

    def _create(self) -> None:
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        self._file, self._end = LogFile(os.open(self.path, flags, 0o600)), 0
        _sync_directory(self.path.parent)

    def _rewrite(self) -> None:
        """A new file with what is held, in place of the old one."""
        self._gather()
        fresh, old = self.path.with_suffix(".new"), self._file
        places = np.full_like(self._place, NOWHERE)
        try:
            fresh.unlink(missing_ok=True)
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            file, end = LogFile(os.open(fresh, flags, 0o600)), 0
            names = self._names.tobytes()
            for number, kind in enumerate(self.kinds):
                size = sum(kind.sizes)
                step = max(1, _PIECE // max(1, size))
                slots = np.flatnonzero((self._kind == number) & (self._place != NOWHERE))
                for at in range(0, len(slots), step):
                    part = slots[at : at + step]
                    features, labels = self.take(old, number, self._place[part])
                    packed = _packed(features, labels)
                    head = _Head(
                        self.capacity, self.seen, names, part.astype(np.uint32).tobytes(),
                        kind.features, kind.labels,
                    )  # fmt: skip
                    place = _write(file.fd, end, head, packed)
                    places[part] = place + size * np.arange(len(part))
                    end, names = place + packed.nbytes, b""
            os.fsync(file.fd)
            fresh.replace(self.path)
            _sync_directory(self.path.parent)
        except OSError as error:
            with contextlib.suppress(OSError):
                fresh.unlink(missing_ok=True)
            raise self._trouble("written", error) from error
        self._file, self._place, self._end = file, places, end

    def _trouble(self, what: str, error: OSError) -> StorageError:
        return StorageError(
            f"the sample {self.path} cannot be {what}: {error.strerror or error}; free some space, or "
            "check its owner"
        )


def _hash(name: str) -> bytes:
    return blake2b(os.fsencode(name), digest_size=_NAME_BYTES).digest()


def _packed(features: Array, labels: Array) -> NDArray[np.uint8]:
    """A row of bytes for each example."""
    if not len(labels):
        return np.empty((0, 1), np.uint8)
    parts = [np.ascontiguousarray(a).reshape(len(a), -1).view(np.uint8) for a in (features, labels)]
    return np.concatenate(parts, axis=1)


def _write(fd: int, end: int, head: _Head, packed: NDArray[np.uint8]) -> int:
    """Append a record at the file's end -> where its examples begin."""
    raw = msgspec.msgpack.encode(head)
    body = memoryview(packed.reshape(-1).data)
    frame = _FRAME.pack(_MAGIC, len(raw), len(body), zlib.crc32(body, zlib.crc32(raw)))
    at = end
    for part in (memoryview(frame + raw), body):
        while part:
            done = os.pwrite(fd, part, at)
            at, part = at + done, part[done:]
    return at - len(body)


def _sync_directory(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
