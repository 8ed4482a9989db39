"""For local programs: examples as they come, into a directory that the device trains on.

    from covey_device.shards import ShardWriter

    with ShardWriter("/var/lib/covey-device/data") as writer:
        writer.append([21.5, 1013.2, 0.45], label=0.2)

The directory is what `[data] kind = "shards"` names; docs/data.md has the protocol, for programs that are
not written in Python. Nothing but numpy and the standard library is imported here.
"""

import contextlib
import fcntl
import io
import os
import re
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

MAX_WAITING = 8
"""Shards' worth of examples that wait while the disk takes none; older ones are dropped."""

_TOKEN_BYTES = 4
_NAME = re.compile(r"(\d{8}T\d{6}\.\d{6})Z-[0-9a-f]{8}\.npz")
_PART = re.compile(r"\.\d{8}T\d{6}\.\d{6}Z-[0-9a-f]{8}\.npz\.part")
_STAMP = "%Y%m%dT%H%M%S.%f"
_TICK = timedelta(microseconds=1)


class ShardWriter:
    """Gathers examples and writes them as shards, each of which appears complete or not at all.

    A shard's name is the time in UTC, to the microsecond, and eight random digits, so writers do not
    collide; and no name sorts before an earlier one of this directory, even if the clock was set back.
    Any thread may use it.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        rows_per_shard: int = 256,
        every_s: float = 600.0,
        sync: bool = True,
        compress: bool = False,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
        token: Callable[[int], bytes] = os.urandom,
    ) -> None:
        """directory: made if it is not there. A shard is written once there are `rows_per_shard`
        examples, or by the `append` that comes `every_s` seconds after the first of them, or by `flush`.

        sync: a shard is on the disk before it gets its name, so that a power cut costs no more than the
        examples that still wait; without it, also the shards of the last half minute or so. compress:
        smaller files, for more work. clock: seconds since 1970. token: random bytes.
        Raises ValueError or OSError.
        """
        if rows_per_shard < 1 or not every_s > 0:
            raise ValueError("rows_per_shard is at least 1, and every_s is above 0")
        self._directory = Path(directory)
        self._rows, self._every_s = rows_per_shard, every_s
        self._sync, self._compress = sync, compress
        self._clock, self._monotonic, self._token = clock, monotonic, token
        self._lock = threading.Lock()
        self._features: list[NDArray[Any]] = []
        self._labels: list[NDArray[Any]] = []
        self._since = 0.0
        self._last: datetime | None = None
        self._directory.mkdir(parents=True, exist_ok=True)
        self._tidy()

    def append(self, features: ArrayLike, label: ArrayLike) -> Path | None:
        """Add one example -> the shard that it completed, if it did.

        Python's numbers become float32, and whole ones as a label int64 (a class); arrays stay as they
        are, but for float64, which becomes float32. All examples of a writer have one type and shape.
        Raises ValueError for an example that does not go with the others or is not finite, which would
        cost the device the whole shard; OSError if the shard could not be written: the examples wait, and
        the next `append` tries again.
        """
        rows = (_features(features), _label(label))
        with self._lock:
            for row, others, what in zip(
                rows, (self._features, self._labels), ("features", "label"), strict=True
            ):
                _check(row, others, what)
            if not self._labels:
                self._since = self._monotonic()
            self._features.append(rows[0])
            self._labels.append(rows[1])
            late = self._monotonic() - self._since >= self._every_s
            return self._write() if late or len(self._labels) >= self._rows else None

    def flush(self) -> Path | None:
        """Write what waits -> the shard, None if nothing waited. Raises OSError."""
        with self._lock:
            return self._write() if self._labels else None

    def close(self) -> None:
        """Write what waits. Raises OSError."""
        self.flush()

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # -- parts ------------------------------------------------------------------------------------

    def _write(self) -> Path:
        packed = io.BytesIO()
        save = np.savez_compressed if self._compress else np.savez
        save(packed, features=np.stack(self._features), labels=np.stack(self._labels))
        try:
            try:
                path = self._place(packed.getbuffer())
            except FileNotFoundError:  # removed by a writer that started before it was locked
                path = self._place(packed.getbuffer())
        except OSError:
            most = MAX_WAITING * self._rows
            del self._features[:-most], self._labels[:-most]
            raise
        self._features, self._labels = [], []
        return path

    def _place(self, data: memoryview) -> Path:
        """A file with this content and a name that is the next in order."""
        path = self._directory / self._next_name()
        part = path.with_name(f".{path.name}.part")
        # As any file of this program's, so that the group which reads the directory can read it.
        fd = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            # Held by a writer that lives: another one that starts removes only what nobody holds.
            with contextlib.suppress(OSError):  # not every file system has locks
                fcntl.flock(fd, fcntl.LOCK_EX)
            rest = data
            while rest:
                rest = rest[os.write(fd, rest) :]
            if self._sync:
                os.fsync(fd)
            os.rename(part, path)  # noqa: PTH104  by one module, so that a test can end it anywhere
        except OSError:
            with contextlib.suppress(OSError):
                os.unlink(part)  # noqa: PTH108
            raise
        finally:
            with contextlib.suppress(OSError):
                os.close(fd)
        if self._sync:
            # The shard is there, whatever becomes of this: no reason to write it again.
            with contextlib.suppress(OSError):
                _sync_directory(self._directory)
        return path

    def _next_name(self) -> str:
        now = datetime.fromtimestamp(self._clock(), UTC).replace(tzinfo=None)
        if self._last is None:
            self._last = _newest(self._directory)
        if self._last is not None and now <= self._last:
            now = self._last + _TICK
        self._last = now
        return f"{now.strftime(_STAMP)}Z-{self._token(_TOKEN_BYTES).hex()}.npz"

    def _tidy(self) -> None:
        """Remove what writers left behind that were cut off."""
        with os.scandir(self._directory) as entries:
            parts = [entry.name for entry in entries if _PART.fullmatch(entry.name)]
        for name in parts:
            with contextlib.suppress(OSError):
                fd = os.open(self._directory / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    os.unlink(self._directory / name)  # noqa: PTH108
                finally:
                    os.close(fd)


def _newest(directory: Path) -> datetime | None:
    """The last time in the names of shards that are there."""
    with os.scandir(directory) as entries:
        stamps = [match[1] for entry in entries if (match := _NAME.fullmatch(entry.name))]
    for stamp in sorted(stamps, reverse=True):
        if stamp.startswith("9999"):
            continue  # after which no time can come
        with contextlib.suppress(ValueError):  # the 31st of February
            return datetime.strptime(stamp, _STAMP)
    return None


def _features(values: ArrayLike) -> NDArray[Any]:
    array = np.asarray(values)
    own = isinstance(values, np.ndarray | np.generic)
    return array.copy() if own and array.dtype != np.float64 else _as_float32(array, "features")


def _label(value: ArrayLike) -> NDArray[Any]:
    array = np.asarray(value)
    return array.copy() if array.dtype.kind in "biu" else _as_float32(array, "label")


def _as_float32(array: NDArray[Any], what: str) -> NDArray[Any]:
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{what} is {array.dtype}: give numbers")
    with np.errstate(over="ignore"):
        return (
            array.astype(np.float32)
            if array.dtype.itemsize > 4 or array.dtype.kind != "f"
            else array.copy()
        )


def _check(row: NDArray[Any], others: list[NDArray[Any]], what: str) -> None:
    if row.dtype.kind not in "biuf":
        raise ValueError(f"{what} is {row.dtype}: give numbers")
    if row.dtype.kind == "f" and not np.isfinite(row).all():
        raise ValueError(f"{what} is not finite as {row.dtype}: leave this example out")
    if others and (row.dtype, row.shape) != (others[0].dtype, others[0].shape):
        raise ValueError(
            f"{what} is {row.dtype}{list(row.shape)}, that of the examples before "
            f"{others[0].dtype}{list(others[0].shape)}: give all in one type and shape"
        )


def _sync_directory(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
