"""A directory of shards: which files are shards, and what is in one.

A shard is a regular file whose name ends in `.npz` or `.csv` and does not begin with a dot. It appears
complete, by a rename from a name that is no shard's, and never changes. That is its writer's part; this
is the reader's: whatever stands in a directory all the same, be it half-written, damaged or made to
harm, costs that one file and no more. Nothing is memory-mapped, so a file that is cut or deleted while
it is read is an error as any other; sizes are bounded before anything is unpacked; nothing is unpickled.
"""

import contextlib
import io
import os
import stat
import struct
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from covey_device.data.config import CsvData, ShardsData
from covey_device.data.fit import Array, Fit, fits
from covey_device.data.source import ArraySource
from covey_device.data.table import read_table
from covey_shared.errors import CoveyError, DataError
from covey_shared.plan import PlanHeader

MAX_SHARD_BYTES = 64 << 20
"""Of a shard's two arrays, unpacked: all that is ever held of a shard besides the chosen examples."""

MAX_CSV_BYTES = 16 << 20
"""A number takes two characters at least, and 8 bytes at most once it is read."""

MAX_LINE = 1 << 20

_ENDINGS = (".npz", ".csv")
_DIRECTORY_BYTES = 64 << 10  # of a zip's list of members: an npz shard has two or a few
_PIECE = 256 << 10
# The last record of a zip without a comment (APPNOTE 4.3.16), and what stands before it in a zip64.
_END = struct.Struct("<4s4H2LH")
_END_MAGIC, _ZIP64_MAGIC, _ZIP64_BYTES = b"PK\5\6", b"PK\6\7", 20
_OPEN = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC

Stamp = tuple[int, int, int, int]
"""Tells a file from the one that stood there before: inode, size, times of the last changes."""


@dataclass(frozen=True, slots=True, eq=False)
class Shard:
    """What a shard holds, checked against the plan: a row of the plan's shape for each example, in the
    element types that it was stored in."""

    features: Array
    labels: Array
    stamp: Stamp

    def __len__(self) -> int:
        return len(self.labels)


@contextlib.contextmanager
def opened_folder(path: Path, shown: str) -> Iterator[int]:
    """A descriptor of the directory, by which all its files are reached: what stands at the path
    meanwhile, a mount or a link, makes no difference. Raises DataError."""
    try:
        folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise DataError(
            f"{shown}: no such directory (looked in {path.parent}): make it, or correct "
            "data.directory; paths in [data] start from the folder of the configuration file"
        ) from None
    except OSError as error:
        raise DataError(
            f"{shown} cannot be opened: {error.strerror}; data.directory is to name a directory that "
            "this device's user may read"
        ) from error
    try:
        yield folder
    finally:
        os.close(folder)


def is_shard_name(name: str) -> bool:
    """Whether a file of this name is taken for a shard, if it is a regular file."""
    return name.endswith(_ENDINGS) and not name.startswith(".")


def shard_names(folder: int, shown: str) -> list[str]:
    """Names of all shards in their order, which is that of their names' bytes. Raises DataError."""
    try:
        with os.scandir(folder) as entries:
            # Links are left alone: what they lead to is somebody else's.
            names = [
                entry.name
                for entry in entries
                if is_shard_name(entry.name) and entry.is_file(follow_symlinks=False)
            ]
    except OSError as error:
        raise DataError(f"{shown} cannot be read: {error.strerror}; check its disk") from error
    return sorted(names, key=os.fsencode)


def in_words(name: str) -> str:
    """A file's name for a log: one line of it, whatever it is made of."""
    return name if name.isprintable() else ascii(name)


def stamp_of(folder: int, name: str) -> Stamp | None:
    """None if it is not there, or not a regular file."""
    try:
        return _stamp(os.stat(name, dir_fd=folder, follow_symlinks=False))
    except OSError:
        return None


def _stamp(status: os.stat_result) -> Stamp | None:
    if not stat.S_ISREG(status.st_mode):
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def read_shard(folder: int, name: str, config: ShardsData, header: PlanHeader) -> Shard:
    """All of one shard. Raises DataError, which names it, or FileNotFoundError if it is gone."""
    shown = f"{config.directory}/{in_words(name)}"
    with _reading(shown), os.fdopen(os.open(name, _OPEN, dir_fd=folder), "rb") as file:
        before = _stamp(os.fstat(file.fileno()))
        if before is None:
            raise DataError(f"{shown} is not a regular file: write shards as plain files")
        if name.endswith(".npz"):
            features, labels = _read_npz(file, before[1], config, shown)
            origins = [f"{shown}, array {array!r}" for array in (config.features, config.labels)]
            both = fits(config, header, origins[0], origins[1])
        else:
            both = fits(config, header, f"{shown}, features", f"{shown}, labels")
            features, labels = _read_csv(file, before[1], config, both, shown)
        # A writer that does not keep to the protocol may have been at it while we were.
        after = _stamp(os.fstat(file.fileno()))
        if after is None or after[:3] != before[:3]:
            raise DataError(
                f"{shown} was written to while it was read: write to a name that ends in .part, and "
                "rename it when it is complete"
            )
    ArraySource(features, labels, both)  # holds them against the plan
    features, labels = (
        array.reshape(len(array), *fit.tensor.shape).astype(
            array.dtype.newbyteorder("="), copy=False
        )
        for array, fit in zip((features, labels), both, strict=True)
    )
    return Shard(features, labels, before)


def recognised(folder: int, name: str, config: ShardsData) -> bool:
    """Whether a file is surely a shard of this configuration, by what it says of itself at its ends.
    Its examples are not read."""
    try:
        with _reading(name), os.fdopen(os.open(name, _OPEN, dir_fd=folder), "rb") as file:
            status = _stamp(os.fstat(file.fileno()))
            if status is None:
                return False
            if name.endswith(".npz"):
                with _archive(file, status[1], name) as archive:
                    return all(f"{n}.npy" in archive.namelist() for n in _arrays(config))
            first = file.read(_DIRECTORY_BYTES).split(b"\n", 1)
            names = first[0].decode("utf-8-sig").strip().split(config.delimiter)
            wanted = {*_label_columns(config), *config.columns}
            return len(first) == 2 and wanted <= {cell.strip(' "') for cell in names}
    except (OSError, CoveyError):
        return False


def _arrays(config: ShardsData) -> tuple[str, str]:
    return config.features, config.labels


def _label_columns(config: ShardsData) -> tuple[str, ...]:
    labels = config.label_columns
    return (labels,) if isinstance(labels, str) else labels


# -- npz -------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _archive(file: BinaryIO, size: int, shown: str) -> Iterator[zipfile.ZipFile]:
    """A zip whose list of members is small enough to be read. Of a file that is still being written
    the end is missing, which has that list."""
    file.seek(max(0, size - _END.size - _ZIP64_BYTES))
    tail = file.read(_END.size + _ZIP64_BYTES)
    end = tail[-_END.size :]
    if len(end) < _END.size or end[:4] != _END_MAGIC or end[-2:] != b"\0\0":
        raise DataError(
            f"{shown} does not end as an npz file does: it is incomplete, or none; write to a name that "
            "ends in .part, and rename it when it is complete"
        )
    list_bytes = _END.unpack(end)[5]
    if list_bytes > _DIRECTORY_BYTES or tail[: -_END.size].startswith(_ZIP64_MAGIC):
        raise DataError(f"{shown} has more members than an npz file needs: save two arrays")
    with zipfile.ZipFile(file) as archive:
        yield archive


def _read_npz(file: BinaryIO, size: int, config: ShardsData, shown: str) -> tuple[Array, Array]:
    if size > MAX_SHARD_BYTES + _DIRECTORY_BYTES:
        raise _too_large(shown, size)
    with _archive(file, size, shown) as archive:
        there = archive.namelist()
        for name in _arrays(config):
            if f"{name}.npy" not in there:
                found = sorted(n.removesuffix(".npy") for n in there)
                raise DataError(
                    f"{shown} has no array {name!r}, it has {found}: "
                    "name two of them as features and labels in [data]"
                )
        if len(set(there)) < len(there):
            raise DataError(f"{shown} has two arrays of one name: write it again")
        members = [archive.getinfo(f"{name}.npy") for name in _arrays(config)]
        unpacked = sum(member.file_size for member in members)
        if unpacked > MAX_SHARD_BYTES:
            raise _too_large(shown, unpacked)
        features, labels = (
            _read_member(archive, member, f"{shown}, array {name!r}")
            for member, name in zip(members, _arrays(config), strict=True)
        )
        return features, labels


def _read_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo, shown: str) -> Array:
    """One npy file in a zip, whose checksum is compared at its end."""
    with archive.open(member) as stream:
        version = np.lib.format.read_magic(stream)
        if version not in ((1, 0), (2, 0)):
            raise DataError(f"{shown} has npy version {version}: save plain numbers")
        read = getattr(np.lib.format, f"read_array_header_{version[0]}_0")
        shape: tuple[int, ...]
        dtype: np.dtype[Any]
        shape, fortran, dtype = read(stream)
        if dtype.hasobject:
            raise DataError(
                f"{shown}: it holds Python objects kept as pickle, which can run code when it is "
                "read, so covey never reads it: save plain numbers, for example "
                "array.astype('float32')"
            )
        if dtype.kind not in "biuf":
            raise DataError(f"{shown} holds {dtype.name}: save plain numbers")
        n_bytes = prod(shape) * dtype.itemsize
        if min(shape, default=0) < 0 or n_bytes != member.file_size - stream.tell():
            raise DataError(
                f"{shown} is not as long as its shape {list(shape)} says: write it again"
            )
        body = bytearray(n_bytes)
        view, done = memoryview(body), 0
        while piece := stream.read(min(_PIECE, n_bytes - done + 1)):
            view[done : done + len(piece)] = piece
            done += len(piece)
        if done < n_bytes:
            raise DataError(f"{shown} ends within its numbers: write it again")
    flat = np.frombuffer(body, dtype)
    return flat.reshape(shape[::-1]).T if fortran else flat.reshape(shape)


def _too_large(shown: str, size: int) -> DataError:
    return DataError(
        f"{shown} takes {size / 1e6:,.0f} MB, and a shard may take {MAX_SHARD_BYTES / 1e6:.0f} MB: "
        "write smaller shards"
    )


# -- csv -------------------------------------------------------------------------------------------


def _read_csv(
    file: BinaryIO, size: int, config: ShardsData, both: tuple[Fit, Fit], shown: str
) -> tuple[Array, Array]:
    if size > MAX_CSV_BYTES:
        raise DataError(
            f"{shown} takes {size / 1e6:,.0f} MB, and a csv shard may take "
            f"{MAX_CSV_BYTES / 1e6:.0f} MB: write smaller shards"
        )
    data = b""
    while piece := file.read(size + 1 - len(data)):
        data += piece
    if not data.endswith(b"\n"):
        raise DataError(
            f"{shown} does not end with the end of a line: it is incomplete, or its last line lacks "
            "one; write to a name that ends in .part, and rename it when it is complete"
        )
    table = CsvData(
        file=shown, labels=config.label_columns, features=config.columns, delimiter=config.delimiter
    )
    return read_table(_lines(data, shown), table, both)


def _lines(data: bytes, shown: str) -> Iterator[str]:
    """Lines that are rows each: a cell that goes on in the next line could go on to the file's end, and
    a row of a million cells takes more memory than the file."""
    text = io.TextIOWrapper(io.BytesIO(data), encoding="utf-8-sig", newline="")
    for number in range(1, len(data) + 1):
        line = text.readline(MAX_LINE + 1)
        if not line:
            return
        if len(line) > MAX_LINE or line.count('"') % 2:
            raise DataError(f"{shown}, row {number} does not end with its line: write a row a line")
        yield line


@contextlib.contextmanager
def _reading(shown: str) -> Iterator[None]:
    """Turn whatever a broken file causes into a DataError; but for one that is gone."""
    try:
        yield
    except (FileNotFoundError, CoveyError):
        raise
    except MemoryError:
        raise DataError(f"{shown} does not fit into memory: write smaller shards") from None
    except OSError as error:
        raise DataError(f"{shown} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # numpy, zipfile and zlib raise many kinds
        raise DataError(f"{shown} is damaged: {error}; write it again") from error
