"""Files that are whole or not there, whenever the power goes.

What is in them is `store`'s and `fleet`'s business. Every function blocks for as long as the disk
does; those that write raise StorageError naming the path, and can be called again after they did.
"""

import contextlib
import os
from pathlib import Path
from typing import TypeVar

import msgspec

from covey_shared.config import unreadable
from covey_shared.errors import ConfigError, StorageError

T = TypeVar("T")

_TAIL_BYTES = 64 * 1024


def write_atomic(path: Path, data: bytes, *, mode: int = 0o644, durable: bool = True) -> None:
    """Write a new file beside `path`, sync it and rename it over."""
    fresh = path.with_name(f".{path.name}.new")
    try:
        # Made anew, so that no one who may read an old one can read this.
        fresh.unlink(missing_ok=True)
        fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            _write(fd, data)
            os.fchmod(fd, mode)  # whatever the umask says
            if durable:
                os.fsync(fd)
        finally:
            os.close(fd)
        fresh.replace(path)
        if durable:
            sync_directory(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            fresh.unlink(missing_ok=True)
        raise storage_error("write", path, error) from error


def read_json(path: Path, kind: type[T], *, mend: str) -> T | None:
    """A small file of one value; None if there is none. mend: what to do with one that is damaged.

    Raises ConfigError: unlike a write, trying again would not help.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise unreadable(path, error) from error
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{path} is damaged ({error}); {mend}") from error


def append_line(path: Path, line: bytes) -> None:
    """Append one line durably, or leave the file as it was; half a line at its end goes first."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        try:
            size = _end_of_lines(fd)
            os.ftruncate(fd, size)
            try:
                _write(fd, line + b"\n")
                os.fsync(fd)
            except OSError:
                os.ftruncate(fd, size)  # what may not be on the disk would be written twice
                raise
        finally:
            os.close(fd)
        if size == 0:
            sync_directory(path.parent)
    except OSError as error:
        raise storage_error("append to", path, error) from error


def last_line(path: Path) -> bytes:
    """The last complete line, without its end; empty if there is none. At most 64 KiB."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise storage_error("read", path, error) from error
    try:
        end = _end_of_lines(fd)
        start = max(0, end - _TAIL_BYTES)
        return os.pread(fd, max(0, end - 1 - start), start).rpartition(b"\n")[2]
    finally:
        os.close(fd)


def _write(fd: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(fd, rest) :]


def _end_of_lines(fd: int) -> int:
    """Where the last complete line ends."""
    end = os.fstat(fd).st_size
    while end > 0:
        start = max(0, end - _TAIL_BYTES)
        cut = os.pread(fd, end - start, start).rfind(b"\n")
        if cut >= 0:
            return start + cut + 1
        end = start
    return 0


def sync_directory(path: Path) -> None:
    """Make names in a directory durable. Raises OSError."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def storage_error(verb: str, path: Path, error: OSError) -> StorageError:
    """The error for a file that the disk refuses."""
    return StorageError(
        f"cannot {verb} {path}: {error.strerror}; free some space, or check its owner"
    )
