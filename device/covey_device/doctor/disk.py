"""The disk of the state directory: room, and whether what is written and synced is taken."""

import contextlib
import errno
import os
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from covey_device.doctor.findings import Finding, combined

LEAST_FREE_MB = 50
"""What the cache leaves free for what matters more."""

SOME_FREE_MB = 300
SAMPLE_BYTES = 1_000_000
SLOW_S = 2.0
_MB = 1_000_000
_CHECK = "disk"

READ_ONLY = "look for errors of the card with sudo dmesg; then sudo mount -o remount,rw, or replace the card"


@dataclass(frozen=True, slots=True)
class Space:
    """Of a file system."""

    free_bytes: int
    free_files: int | None
    read_only: bool


def space_of(directory: Path) -> Space:
    """Raises OSError."""
    found = os.statvfs(directory)
    return Space(
        found.f_bavail * found.f_frsize,
        found.f_favail if found.f_files else None,  # some file systems do not count them
        bool(found.f_flag & os.ST_RDONLY),
    )


def nearest(directory: Path) -> Path:
    """The directory, or the one that it will be made in. Raises PermissionError if that is hidden."""
    for path in (directory, *directory.absolute().parents):
        try:
            path.stat()
        except (FileNotFoundError, NotADirectoryError):
            continue
        return path
    return Path("/")


def write_once(directory: Path) -> None:
    """Write a megabyte that is on the disk when this returns, name and all, and remove it. Raises OSError."""
    path = directory / f".covey-doctor-{secrets.token_hex(8)}"
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        try:
            rest = memoryview(os.urandom(SAMPLE_BYTES))  # what compresses would tell nothing
            while rest:
                rest = rest[os.write(fd, rest) :]
            os.fsync(fd)
        finally:
            os.close(fd)
        handle = os.open(directory, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    finally:
        with contextlib.suppress(FileNotFoundError):
            path.unlink()


def disk(
    directory: Path,
    *,
    space: Callable[[Path], Space] = space_of,
    write: Callable[[Path], None] = write_once,
    clock: Callable[[], float] = time.monotonic,
    serves: bool = False,
) -> Finding:
    """directory: the state's, there or not yet. serves: whether this is the service's own user."""
    try:
        where = nearest(directory)
        found = space(where)
    except OSError as error:
        return _failed(directory, error, serves)
    free = found.free_bytes // _MB
    if found.read_only:
        return Finding(_CHECK, "problem", f"the file system of {where} is read-only", READ_ONLY)
    began = clock()
    try:
        write(where)
    except OSError as error:
        return _failed(where, error, serves)
    seconds = clock() - began
    parts = [
        Finding(
            _CHECK, "ok", f"{free:,} MB free at {where}, 1 MB written and synced in {seconds:.2f} s"
        )
    ]
    if free < LEAST_FREE_MB:
        parts.append(
            Finding(
                _CHECK, "problem", f"less than {LEAST_FREE_MB} MB is free", f"free some space at {where}"
            )
        )  # fmt: skip
    elif free < SOME_FREE_MB:
        parts.append(
            Finding(
                _CHECK, "note", f"little is free: plans and models are kept only where {LEAST_FREE_MB} "
                "MB more are", f"free some space at {where}",
            )
        )  # fmt: skip
    if found.free_files is not None and found.free_files < 100:
        parts.append(
            Finding(
                _CHECK, "problem", f"only {found.free_files} files more can be made",
                f"remove files at {where}",
            )
        )  # fmt: skip
    if seconds > SLOW_S:
        parts.append(
            Finding(
                _CHECK, "note", "that is slow: a device waits for such a write several times a round",
                "use a better card (class A1), or a disk on USB",
            )
        )  # fmt: skip
    return combined(_CHECK, parts)


def _failed(where: Path, error: OSError, serves: bool) -> Finding:
    reason = error.strerror or str(error)
    if error.errno == errno.EROFS:
        return Finding(_CHECK, "problem", f"the file system of {where} is read-only", READ_ONLY)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return Finding(
            _CHECK,
            "problem",
            f"{where} is full: 1 MB could not be written",
            "free some space there",
        )
    if error.errno in (errno.EACCES, errno.EPERM) and serves:
        return Finding(
            _CHECK, "problem", f"the service's user may not write to {where}",
            "give it to that user (sudo chown), or set `state` to another directory",
        )  # fmt: skip
    if error.errno in (errno.EACCES, errno.EPERM):
        return Finding(
            _CHECK, "unknown", f"this user may not write to {where}",
            "run it as root (sudo covey-device doctor) or as the service's user",
        )  # fmt: skip
    return Finding(
        _CHECK, "problem", f"1 MB could not be written to {where} and synced: {reason}",
        "look for errors of the disk with sudo dmesg, and replace it if there are some",
    )  # fmt: skip
