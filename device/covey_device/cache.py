"""Plans and models that were fetched before, by hash, so that a device fetches only what is new.

A directory of files named by the SHA-256 of what is in them. Nothing of it is trusted when it is read back:
hashes are checked, and what is damaged is removed and fetched anew. So nothing of it needs to be synced
either, which spares a memory card; a power cut costs what it tears.

A download that is not complete is kept too: ``HASH.part``, the blob as far as it is there, and
``HASH.have``, a record for each chunk that was written: its index and a hash of it. What a record names and
the data does not have, after a power cut, counts as missing.

The directory never grows beyond its limit, and leaves room on its disk for what matters more; what was
used least recently goes first. The order of use is in the files' modification times, which are turns that
are counted here: a device's clock may jump by years. A disk that is full or fails costs the cache for the
moment, and no round; nothing in here raises.
"""

import contextlib
import hashlib
import logging
import os
import re
import shutil
import struct
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from covey_shared import chunks

log = logging.getLogger("covey.device")

RESERVE_BYTES = 50_000_000
"""What is left free on the disk: for what a device remembers, its record, and the update it sends."""

MAX_PARTS = 3
"""Downloads that are kept unfinished: of rounds that were called off, or of a device that died."""

_OURS = re.compile(r"[0-9a-f]{64}(\.part|\.have)?")
_FIRST_TURN = 1_000_000_000  # file systems know no times before 1980
_CHECK_BYTES = 16
_RECORD = struct.Struct(f">I{_CHECK_BYTES}s")


@dataclass(frozen=True, slots=True)
class _File:
    """One blob's file. turn: when it was last used."""

    path: Path
    size: int
    turn: int

    @property
    def is_part(self) -> bool:
        return self.path.suffix == ".part"


class BlobCache:
    """One directory. limit_bytes: the most that all of it may take. reserve_bytes: what it leaves free.

    All functions block for as long as the disk does; any thread may call them.
    """

    def __init__(
        self, directory: Path, limit_bytes: int, *, reserve_bytes: int = RESERVE_BYTES
    ) -> None:
        self._directory = directory
        self._limit = limit_bytes
        self._reserve = reserve_bytes
        self._held: frozenset[str] = frozenset()
        self._open: set[str] = set()  # partial downloads that are written to
        self._failed = False
        self._turn = 0
        self._lock = threading.Lock()

    def hold(self, digests: Iterable[bytes]) -> None:
        """These are in use, from memory: they are to go last."""
        self._held = frozenset(digest.hex() for digest in digests)

    def tidy(self) -> None:
        """At the start: back within the limit, and without the rest of downloads long ago."""
        with self._lock, self._failing("tidied"):
            self._make_room(0)

    def clear(self) -> bool:
        """Remove everything; whether there was anything."""
        with self._lock:
            return sum(self._remove(file) for file in self._files()) > 0

    def read(self, digest: bytes, size: int) -> bytes | None:
        """The blob, its hash checked; None if it is not here."""
        path = self._directory / digest.hex()
        with self._lock:
            try:
                there = path.stat().st_size
                data = path.read_bytes() if there == size else b""
            except FileNotFoundError:
                return None
            except (OSError, MemoryError) as error:
                self._tell("read", error)
                return None
            if len(data) != size or hashlib.sha256(data).digest() != digest:
                log.warning("%s was damaged; it is fetched anew", path)
                self._unlink(path)
                return None
            with contextlib.suppress(OSError):
                self._use(path)
            return data

    def begin(self, digest: bytes, size: int) -> "Part | None":
        """Where to keep a blob that is fetched; None if it has no place here."""
        name, part = digest.hex(), None
        with self._lock, self._failing("written"):
            if 0 < size <= self._limit and name not in self._open:
                self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
                if self._make_room(size, but=name):
                    part = Part(self, self._directory / name, size)
                    self._open.add(name)
                else:
                    self._unlink(self._directory / f"{name}.part")
                    self._unlink(self._directory / f"{name}.have")
        return part

    # -- parts ------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _failing(self, what: str) -> Iterator[None]:
        """A disk's failure is told, once until it works again, and ends what was tried."""
        try:
            yield
        except OSError as error:
            self._tell(what, error)
        else:
            self._failed = False

    def _tell(self, what: str, error: BaseException) -> None:
        if not self._failed:
            reason = error.strerror if isinstance(error, OSError) else "out of memory"
            log.warning(
                "the cache %s cannot be %s: %s; this device goes on without it",
                self._directory, what, reason,
            )  # fmt: skip
        self._failed = True

    def _files(self) -> list[_File]:
        """All blobs' files, least recently used first."""
        found = []
        with contextlib.suppress(FileNotFoundError), os.scandir(self._directory) as entries:
            for entry in entries:
                if _OURS.fullmatch(entry.name) and not entry.name.endswith(".have"):
                    with contextlib.suppress(FileNotFoundError):
                        status = entry.stat(follow_symlinks=False)
                        path = self._directory / entry.name
                        found.append(_File(path, status.st_size, int(status.st_mtime)))
        return sorted(found, key=lambda file: (file.turn, file.path))

    def _make_room(self, size: int, *, but: str = "") -> bool:
        """Let go of what was used least recently, until there is room for a blob of this size, `but`,
        whose partial download stays. Whether there is."""
        for name in self._held:
            with contextlib.suppress(OSError):
                self._use(self._directory / name)
        files = [file for file in self._files() if file.path.stem != but]
        self._strays({file.path.stem for file in files if file.is_part} | {but})
        old = [f for f in files if f.is_part and f.path.stem not in self._open]
        parts = {file.path for file in old[: max(0, len(old) - MAX_PARTS + (size > 0))]}
        total = sum(file.size for file in files)
        for file in files:
            over = total + size > self._limit
            if file.path in parts or over or (size and not self._is_free(size)):
                if file.path.stem in self._open:
                    continue
                total -= file.size
                self._remove(file)
        return total + size <= self._limit and (not size or self._is_free(size))

    def _strays(self, parts: set[str]) -> None:
        """Records of downloads that are not there."""
        with contextlib.suppress(FileNotFoundError):
            for path in self._directory.glob("*.have"):
                if _OURS.fullmatch(path.name) and path.stem not in parts:
                    self._unlink(path)

    def _is_free(self, size: int) -> bool:
        return shutil.disk_usage(self._directory).free >= size + self._reserve

    def _remove(self, file: _File) -> bool:
        if file.is_part:
            self._unlink(file.path.with_suffix(".have"))
        return self._unlink(file.path)

    @staticmethod
    def _unlink(path: Path) -> bool:
        try:
            path.unlink()
        except OSError:
            return False
        return True

    def _use(self, path: Path) -> None:
        """From now on it is the one that was used last."""
        if not self._turn:
            self._turn = max([file.turn for file in self._files()], default=_FIRST_TURN)
        # Whatever was written meanwhile has the clock's time; two turns, for coarse file systems.
        self._turn = max(self._turn, _FIRST_TURN) + 2
        os.utime(path, (self._turn, self._turn))


class Part:
    """A download that is kept as it goes on. Its functions do not raise either: once the disk fails, it is
    kept no longer.

    path: of the whole blob, when it will be here.
    """

    def __init__(self, cache: BlobCache, path: Path, size: int) -> None:
        self._cache = cache
        self._path = path
        self._size = size
        self._lock = threading.Lock()
        self._written: set[int] = set()  # chunks
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        self._data: int | None = os.open(path.with_suffix(".part"), flags, 0o600)
        try:
            self._have = os.open(path.with_suffix(".have"), flags, 0o600)
        except OSError:
            os.close(self._data)
            raise

    def resume(self, into: bytearray) -> bytes | None:
        """Read the chunks that are here `into` the blob's memory -> their bitmap, as `Assembly` has it;
        None if there are none."""
        n = chunks.n_chunks(self._size)
        have = bytearray(n)
        with self._disk() as data, memoryview(into) as view:
            if data is None:
                return None
            os.lseek(self._have, 0, os.SEEK_SET)
            # One for each chunk, and few more: of chunks that a power cut took.
            records = _read(self._have, 4 * n * _RECORD.size)
            whole = len(records) - len(records) % _RECORD.size
            os.ftruncate(self._have, whole)
            for index, check in _RECORD.iter_unpack(records[:whole]):
                if index >= n or have[index]:
                    continue
                size = chunks.chunk_size(self._size, index)
                chunk = os.pread(data, size, index * chunks.CHUNK_BYTES)
                if len(chunk) == size and _check(chunk) == check:
                    view[index * chunks.CHUNK_BYTES :][:size] = chunk
                    have[index] = 1
        if self._data is None or not any(have):
            return None
        self._written = {index for index in range(n) if have[index]}
        bitmap = bytearray(-(-n // 8))
        for index in self._written:
            bitmap[index >> 3] |= 1 << (index & 7)
        return bytes(bitmap)

    def write(self, indices: Iterable[int], blob: bytearray) -> None:
        """Keep these chunks, which are in the blob's memory."""
        with self._disk() as data, memoryview(blob) as view:
            if data is None:
                return
            records = b""
            for index in indices:
                at = index * chunks.CHUNK_BYTES
                chunk = rest = view[at : at + chunks.chunk_size(self._size, index)]
                while rest:
                    done = os.pwrite(data, rest, at)
                    at, rest = at + done, rest[done:]
                records += _RECORD.pack(index, _check(chunk))
            os.lseek(self._have, 0, os.SEEK_END)
            while records:
                records = records[os.write(self._have, records) :]
            self._written.update(indices)

    def restart(self) -> None:
        """All that was written is wrong."""
        with self._disk() as data:
            if data is None:
                return
            os.ftruncate(self._have, 0)
            self._written.clear()

    def complete(self) -> None:
        """All of it was written, and the whole has the right hash."""
        with self._disk() as data:
            if data is None:
                return
            if len(self._written) < chunks.n_chunks(self._size):
                self._drop()
                return
            self._close()
            with self._cache._lock:
                self._path.with_suffix(".part").replace(self._path)
                self._cache._unlink(self._path.with_suffix(".have"))
                self._cache._use(self._path)

    def pause(self, indices: Iterable[int] = (), blob: bytearray | None = None) -> None:
        """It goes on another time. indices: chunks that are yet to be written."""
        if blob is not None:
            self.write(indices, blob)
        with self._disk() as data:
            if data is None:
                return
            self._close()
            with self._cache._lock:
                self._cache._use(self._path.with_suffix(".part"))

    # -- parts ------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _disk(self) -> Iterator[int | None]:
        """The data's descriptor, to this thread alone; None once it is kept no longer. A disk that fails
        is the end of that."""
        with self._lock:
            try:
                yield self._data
            except OSError as error:
                self._cache._tell("written", error)
                self._drop()

    def _drop(self) -> None:
        self._close()
        self._cache._unlink(self._path.with_suffix(".have"))
        self._cache._unlink(self._path.with_suffix(".part"))

    def _close(self) -> None:
        data, self._data = self._data, None
        if data is not None:
            for fd in (data, self._have):
                with contextlib.suppress(OSError):
                    os.close(fd)
            self._cache._open.discard(self._path.name)


def _check(chunk: bytes | memoryview) -> bytes:
    """Enough to tell a chunk that was written from one that was not; the blob's own hash decides."""
    return hashlib.blake2b(chunk, digest_size=_CHECK_BYTES).digest()


def _read(fd: int, most: int) -> bytes:
    parts = []
    while most > 0 and (part := os.read(fd, most)):
        parts.append(part)
        most -= len(part)
    return b"".join(parts)
