"""Disks that fill up, and that forget at a power cut what was not synced.

Files are real ones, on a memory file system where there is one. While `installed`, the functions of `os`
that change files ask the `Process` they run in first: each is an effect before which it may die, and each
is noted with how to undo it until a sync makes it last. A killed process leaves its files as they are. A
power cut undoes what was not synced: of the names made, renamed and removed all from some moment on, of a
file's bytes everything, nothing, or what comes after some point.
"""

import contextlib
import errno
import io
import os
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

from covey_coordinator import transcript
from simulation.loop import RUNNING, Process

_REAL: dict[str, Any] = {
    name: getattr(os, name)
    for name in (
        "open", "close", "write", "pwrite", "fsync", "fdatasync", "ftruncate", "posix_fallocate", "fchmod",
        "replace", "rename", "unlink", "link", "mkdir", "rmdir",
    )
}  # fmt: skip
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


@dataclass
class _Name:
    """A change of a directory that was not synced. undo: what makes it unhappen."""

    directory: str
    undo: Callable[[], None]


@dataclass
class Disk:
    """One machine's files. directory: where they are. chance: what a power cut spares."""

    directory: Path
    chance: random.Random
    full: bool = False
    _names: list[_Name] = field(default_factory=list)
    _dirty: dict[str, bytes] = field(default_factory=dict)  # path -> its bytes when last synced

    def power_cut(self) -> None:
        """What was not synced may be gone."""
        spared = self.chance.randint(0, len(self._names))
        torn = {path: _read(path) for path in self._dirty}
        for path, synced in self._dirty.items():
            _tear(path, synced, torn[path], self.chance)
        for name in reversed(self._names[spared:]):
            with contextlib.suppress(OSError):
                name.undo()
        self.forget()

    def forget(self) -> None:
        """All there is lasts."""
        self._names.clear()
        self._dirty.clear()

    # -- what os does -----------------------------------------------------------------------------

    def made(self, path: str) -> None:
        self._names.append(_Name(_parent(path), lambda: _remove(path)))

    def moved(self, old: str, new: str, kept: bytes | None) -> None:
        was_dirty = self._dirty.pop(old, None)
        self._dirty.pop(new, None)
        if was_dirty is not None:
            self._dirty[new] = was_dirty

        def undo() -> None:
            _REAL["replace"](new, old)
            if kept is not None:
                _write(new, kept)

        self._names.append(_Name(_parent(new), undo))

    def removed(self, path: str, kept: bytes) -> None:
        self._dirty.pop(path, None)
        self._names.append(_Name(_parent(path), lambda: _write(path, kept)))

    def removed_directory(self, path: str) -> None:
        self._names.append(_Name(_parent(path), lambda: _REAL["mkdir"](path)))

    def changing(self, path: str) -> None:
        if path not in self._dirty:
            self._dirty[path] = _read(path) or b""

    def synced(self, path: str) -> None:
        if os.path.isdir(path):  # noqa: PTH112
            self._names = [name for name in self._names if name.directory != path]
        else:
            self._dirty.pop(path, None)


def _parent(path: str) -> str:
    return path.rpartition("/")[0]


def _read(path: str) -> bytes | None:
    try:
        fd = _REAL["open"](path, os.O_RDONLY)
    except OSError:
        return None
    try:
        return os.read(fd, 1 << 20)
    finally:
        _REAL["close"](fd)


def _write(path: str, data: bytes) -> None:
    fd = _REAL["open"](path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        _REAL["write"](fd, data)
    finally:
        _REAL["close"](fd)


def _remove(path: str) -> None:
    if os.path.isdir(path):  # noqa: PTH112
        _REAL["rmdir"](path)
    else:
        _REAL["unlink"](path)


def _tear(path: str, synced: bytes, written: bytes | None, chance: random.Random) -> None:
    if written is None:
        return
    match chance.randrange(3):
        case 0:
            _write(path, synced)
        case 1:
            # All that came before some point; what is longer than was synced is cut there.
            keep = chance.randint(0, len(written))
            _write(path, written[:keep] + synced[keep : len(written)])


class _Os:
    """The functions in the place of os's. A descriptor is looked up by its number."""

    def __init__(self, disk_of: Callable[[Any], Disk | None]) -> None:
        self._disk_of = disk_of
        self._paths: dict[int, str] = {}

    def _disk(
        self, what: str, *, room: bool = False, process: Process | None = None
    ) -> Disk | None:
        """The disk of a process, or of the one that runs, after its leave to go on; None for nobody's."""
        process = process or RUNNING.get()
        if process is None:
            return None
        process.effect(f"disk: {what}")
        disk = self._disk_of(process)
        if room and disk is not None and disk.full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return disk

    def open(self, path: Any, flags: int, mode: int = 0o777, **rest: Any) -> int:
        name = os.fspath(path)
        if RUNNING.get() is None or not isinstance(name, str) or rest.get("dir_fd") is not None:
            return int(_REAL["open"](path, flags, mode, **rest))
        disk = None
        if flags & _WRITING:
            disk = self._disk("open")
        new = bool(disk and flags & os.O_CREAT and not os.path.exists(name))  # noqa: PTH110
        fd = int(_REAL["open"](path, flags, mode, **rest))
        self._paths[fd] = name
        if new and disk is not None:
            disk.made(name)
        return fd

    def close(self, fd: int) -> None:
        self.forget(fd)
        _REAL["close"](fd)

    def forget(self, fd: int) -> None:
        """It is closed, and its number will be another file's."""
        self._paths.pop(fd, None)

    def write(self, fd: int, data: Any, process: Process | None = None) -> int:
        path = self._paths.get(fd)
        if path is not None and (disk := self._disk("write", process=process)) is not None:
            disk.changing(path)
            if disk.full:
                # As much as there was room for, and the next one says so.
                half = bytes(data)[: len(data) // 2]
                if not half or disk.chance.random() < 0.5:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                return int(_REAL["write"](fd, half))
        return int(_REAL["write"](fd, data))

    def pwrite(self, fd: int, data: Any, offset: int) -> int:
        path = self._paths.get(fd)
        if path is not None and (disk := self._disk("write", room=True)) is not None:
            disk.changing(path)
        return int(_REAL["pwrite"](fd, data, offset))

    def posix_fallocate(self, fd: int, offset: int, size: int) -> None:
        path = self._paths.get(fd)
        if path is not None and (disk := self._disk("reserve", room=True)) is not None:
            disk.changing(path)
        _REAL["posix_fallocate"](fd, offset, size)

    def ftruncate(self, fd: int, size: int) -> None:
        path = self._paths.get(fd)
        if path is not None and (disk := self._disk("truncate")) is not None:
            disk.changing(path)
        _REAL["ftruncate"](fd, size)

    def fsync(self, fd: int) -> None:
        if RUNNING.get() is None:
            _REAL["fsync"](fd)
        elif (disk := self._disk("sync")) is not None:
            # Of a file that was opened to be read, too.
            disk.synced(self._paths.get(fd) or os.readlink(f"/proc/self/fd/{fd}"))  # noqa: PTH115

    def replace(self, old: Any, new: Any, **rest: Any) -> None:
        if RUNNING.get() is None:
            return _REAL["replace"](old, new, **rest)
        disk, target = self._disk("rename"), os.fspath(new)
        kept = _read(target)
        _REAL["replace"](old, new, **rest)
        if disk is not None:
            disk.moved(os.fspath(old), target, kept)
        return None

    def rmdir(self, path: Any, **rest: Any) -> None:
        disk, name = self._disk("remove a directory"), os.fspath(path)
        _REAL["rmdir"](path, **rest)
        if disk is not None:
            disk.removed_directory(name)

    def unlink(self, path: Any, **rest: Any) -> None:
        if RUNNING.get() is None or rest.get("dir_fd") is not None:
            return _REAL["unlink"](path, **rest)
        disk, name = self._disk("remove"), os.fspath(path)
        kept = _read(name)
        _REAL["unlink"](path, **rest)
        if disk is not None and kept is not None:
            disk.removed(name, kept)
        return None

    def link(self, old: Any, new: Any, **rest: Any) -> None:
        disk = self._disk("link", room=True)
        _REAL["link"](old, new, **rest)
        if disk is not None:
            disk.made(os.fspath(new))

    def mkdir(self, path: Any, mode: int = 0o777, **rest: Any) -> None:
        there = os.path.exists(path)  # noqa: PTH110
        disk = self._disk("make a directory", room=not there)
        _REAL["mkdir"](path, mode, **rest)
        if disk is not None:
            disk.made(os.fspath(path))


class _File(io.FileIO):
    """A file that is written to by an object. It is its process's, whoever lets go of it at last."""

    def __init__(self, ours: _Os, file: Any, mode: str) -> None:
        self._ours, self._process = ours, RUNNING.get()
        if not isinstance(file, int):
            flags = {"r": os.O_RDONLY, "w": os.O_WRONLY | os.O_CREAT | os.O_TRUNC}.get(
                mode[0], os.O_WRONLY | os.O_CREAT | (os.O_EXCL if mode[0] == "x" else os.O_APPEND)
            )
            if "+" in mode:
                flags = flags & ~os.O_WRONLY | os.O_RDWR
            file = ours.open(file, flags | os.O_CLOEXEC, 0o666)
        super().__init__(file, mode)

    def write(self, data: Any) -> int:
        return self._ours.write(self.fileno(), data, self._process)

    def truncate(self, size: int | None = None) -> int:
        size = self.tell() if size is None else size
        self._ours.ftruncate(self.fileno(), size)
        return size

    def close(self) -> None:
        if not self.closed:
            self._ours.forget(self.fileno())
        super().close()


@contextlib.contextmanager
def installed(disk_of: Callable[[Any], Disk | None]) -> Iterator[None]:
    """Have `os` ask. disk_of: the disk of a process."""
    ours, real_open = _Os(disk_of), io.open

    def open_file(file: Any, mode: str = "r", *args: Any, **rest: Any) -> Any:
        if RUNNING.get() is None or isinstance(file, int) or not set(mode) & set("wxa+"):
            return real_open(file, mode, *args, **rest)
        assert "b" in mode, "only bytes are written"
        raw = _File(ours, file, mode.replace("b", ""))
        return io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)

    with contextlib.ExitStack() as stack:
        for name in (
            "open", "close", "write", "pwrite", "posix_fallocate", "ftruncate", "fsync", "replace",
            "unlink", "link", "mkdir", "rmdir",
        ):  # fmt: skip
            stack.enter_context(mock.patch.object(os, name, getattr(ours, name)))
        stack.enter_context(mock.patch.object(os, "fdatasync", ours.fsync))
        stack.enter_context(mock.patch.object(os, "rename", ours.replace))
        stack.enter_context(mock.patch.object(io, "open", open_file))
        stack.enter_context(mock.patch.object(transcript, "FileIO", partial(_File, ours)))
        # A tree is removed by the names of what is in it, not from within its directories.
        stack.enter_context(mock.patch.object(shutil, "_use_fd_functions", False))
        yield
