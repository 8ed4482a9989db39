"""A blob on its way in, kept in a file: the coordinator's sink for `covey_shared.chunks`.

Uploads of a cohort together are larger than a Pi's memory, so they wait on disk. What was received
of a blob, and whether it is the right one, is `chunks.Assembly`'s business; who may upload how
much, the round's.
"""

import contextlib
import errno
import os
from pathlib import Path
from types import TracebackType

from covey_coordinator.files import sync_directory
from covey_shared.errors import LocalProtocolError, StorageError


class FileSink:
    """`size` bytes at `path`, mode 0600.

    The file is made at the first write, with all its space reserved then: a full disk shows before
    the upload rather than in its middle. An existing file is kept, so that an assembly can resume.
    All methods block for as long as the disk does. Raises StorageError naming the path.
    """

    def __init__(self, path: Path, size: int) -> None:
        self.path = path
        self.size = size
        self._fd: int | None = None
        self._named = False

    def write(self, offset: int, data: bytes | memoryview) -> None:
        """Store data at offset; never beyond `size`."""
        if not 0 <= offset <= self.size - len(data):
            raise LocalProtocolError(
                f"write of {len(data)} bytes at {offset} is out of {self.path} ({self.size} bytes)"
            )
        rest = memoryview(data)
        try:
            fd = self._open()
            while rest:
                written = os.pwrite(fd, rest, offset)
                rest = rest[written:]
                offset += written
        except OSError as error:
            raise self._storage_error("write", error) from error

    def read(self, offset: int, n_bytes: int) -> bytes:
        """Exactly the n_bytes at offset."""
        parts: list[bytes] = []
        try:
            fd = self._open()
            while n_bytes > 0:
                part = os.pread(fd, n_bytes, offset)
                if not part:
                    raise StorageError(f"{self.path} ends at {offset}: was it cut? upload it again")
                parts.append(part)
                offset += len(part)
                n_bytes -= len(part)
        except OSError as error:
            raise self._storage_error("read", error) from error
        return b"".join(parts)

    def sync(self) -> None:
        """Return once what was written would survive a power cut, and the file's name with it."""
        try:
            os.fsync(self._open())
            if not self._named:
                sync_directory(self.path.parent)
                self._named = True
        except OSError as error:
            raise self._storage_error("write", error) from error

    def close(self) -> None:
        """Give the file descriptor back; the next read or write opens the file again."""
        if self._fd is not None:
            fd, self._fd = self._fd, None
            os.close(fd)

    def remove(self) -> None:
        """Delete the file, if there is one."""
        self.close()
        try:
            self.path.unlink(missing_ok=True)
        except OSError as error:
            raise self._storage_error("remove", error) from error

    def __enter__(self) -> "FileSink":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        with contextlib.suppress(OSError):
            self.close()

    def _open(self) -> int:
        if self._fd is None:
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            fd = os.open(self.path, flags, 0o600)
            try:
                self._reserve(fd)
            except OSError:
                os.close(fd)
                raise
            self._fd = fd
        return self._fd

    def _reserve(self, fd: int) -> None:
        if self.size == 0:
            return
        try:
            os.posix_fallocate(fd, 0, self.size)
        except OSError as error:
            # Some filesystems cannot reserve; there a full disk shows at the write.
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENODEV, errno.ESPIPE):
                raise

    def _storage_error(self, verb: str, error: OSError) -> StorageError:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        hint = "free some space, or move the spool" if full else "check the directory and its owner"
        return StorageError(f"cannot {verb} {self.path}: {error.strerror}; {hint}")
