"""Files that a power cut leaves as they were, or as they were meant to be."""

import contextlib
import os
from pathlib import Path

from covey_shared.errors import StorageError


def write_durably(path: Path, data: bytes) -> None:
    """A whole new file in place of `path`, mode 0600, on the disk when this returns.

    Raises StorageError, and keeps the old file.
    """
    fresh = path.with_suffix(".new")
    try:
        fresh.unlink(missing_ok=True)
        fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            rest = memoryview(data)
            while rest:
                rest = rest[os.write(fd, rest) :]
            os.fsync(fd)
        finally:
            os.close(fd)
        fresh.replace(path)
        _sync(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            fresh.unlink(missing_ok=True)
        raise StorageError(
            f"cannot write {path}: {error.strerror}; free some space, or check its owner"
        ) from error


def sync_names(directory: Path) -> None:
    """What was renamed in it stays so. Raises StorageError."""
    try:
        _sync(directory)
    except OSError as error:
        raise StorageError(
            f"cannot sync {directory}: {error.strerror}; check its disk and its owner"
        ) from error


def _sync(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
