"""Arrays out of binary files: npz, npy and idx.

Nothing here unpickles: a pickle can run code when it is read, and a data file may come from
anywhere.
"""

import gzip
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path

import numpy as np

from covey_device.data.fit import Array
from covey_shared.errors import CoveyError, DataError

SMALL_BYTES = 4 << 20

_NPY_MAGIC = b"\x93NUMPY"
_ZIP_MAGIC = b"PK"
_GZIP_MAGIC = b"\x1f\x8b"
_PICKLE_REASON = (
    "it holds Python objects kept as pickle, which can run code when it is read, so covey never "
    "reads it: save plain numbers, for example array.astype('float32')"
)
# The type codes of the idx format; numbers of more than one byte are big-endian.
_IDX_TYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}


def read_npz(path: Path, shown: str, names: tuple[str, str]) -> tuple[Array, Array]:
    """The named arrays of an npz file, in memory. shown: the file's name in messages."""
    with _reading(path, shown):
        if _head(path, 2) != _ZIP_MAGIC:
            raise DataError(f"{shown} is not an npz file: write one with numpy.savez")
        with np.load(path, allow_pickle=False) as archive:
            for name in names:
                if name not in archive.files:
                    raise DataError(
                        f"{shown} has no array {name!r}, it has {sorted(archive.files)}: "
                        "name two of them as features and labels in [data]"
                    )
            features, labels = (_member(archive, path, shown, name) for name in names)
            return features, labels


def _member(archive: np.lib.npyio.NpzFile, path: Path, shown: str, name: str) -> Array:
    with _reading(path, f"{shown}, array {name!r}"):
        member: Array = archive[name]
        return member


def map_npy(path: Path, shown: str) -> Array:
    """The array of an npy file, memory-mapped for reading."""
    with _reading(path, shown):
        if _head(path, 6) != _NPY_MAGIC:
            raise DataError(f"{shown} is not an npy file: write one with numpy.save")
        return _in_memory_if_small(np.load(path, mmap_mode="r", allow_pickle=False))


def read_idx(path: Path, shown: str) -> Array:
    """The array of an idx file: memory-mapped, or in memory if the file is gzipped."""
    with _reading(path, shown):
        if _head(path, 2) == _GZIP_MAGIC:
            with gzip.open(path, "rb") as stream:
                dtype, shape, _ = _idx_header(stream.read(4), stream.read(4 * 255), shown)
                stream.seek(4 + 4 * len(shape))
                return _idx_body(stream.read(_nbytes(dtype, shape) + 1), dtype, shape, shown)
        with path.open("rb") as stream:
            dtype, shape, offset = _idx_header(stream.read(4), stream.read(4 * 255), shown)
        _idx_length(path.stat().st_size - offset, dtype, shape, shown)
        if prod(shape) == 0:  # nothing to map
            return np.empty(shape, dtype)
        return _in_memory_if_small(np.memmap(path, dtype, mode="r", offset=offset, shape=shape))


def _in_memory_if_small(mapped: Array) -> Array:
    """Labels and small data sets: quicker to read at once than to map row by row."""
    return np.array(mapped) if mapped.nbytes <= SMALL_BYTES else mapped


def _idx_header(
    magic: bytes, sides: bytes, shown: str
) -> tuple[np.dtype[np.generic], tuple[int, ...], int]:
    """Element type, shape and the offset of the first element."""
    if len(magic) < 4 or magic[:2] != b"\0\0" or magic[2] not in _IDX_TYPES or magic[3] == 0:
        raise DataError(
            f"{shown} is not an idx file (it starts with {magic.hex() or 'nothing'}): "
            "use the images or labels file of an MNIST-style data set"
        )
    n_sides = magic[3]
    if len(sides) < 4 * n_sides:
        raise DataError(f"{shown} ends within its header: copy the file again")
    shape = tuple(int(side) for side in np.frombuffer(sides, ">u4", n_sides))
    return np.dtype(_IDX_TYPES[magic[2]]), shape, 4 + 4 * n_sides


def _idx_body(
    body: bytes, dtype: np.dtype[np.generic], shape: tuple[int, ...], shown: str
) -> Array:
    _idx_length(len(body), dtype, shape, shown)
    return np.frombuffer(body, dtype).reshape(shape)


def _idx_length(
    found: int, dtype: np.dtype[np.generic], shape: tuple[int, ...], shown: str
) -> None:
    wanted = _nbytes(dtype, shape)
    if found != wanted:
        relation = "fewer" if found < wanted else "more"
        raise DataError(
            f"{shown} has {relation} bytes than the {wanted} its header {list(shape)} asks for: "
            "copy the file again"
        )


def _nbytes(dtype: np.dtype[np.generic], shape: tuple[int, ...]) -> int:
    return prod(shape) * dtype.itemsize


def _head(path: Path, n_bytes: int) -> bytes:
    with path.open("rb") as stream:
        return stream.read(n_bytes)


@contextmanager
def _reading(path: Path, shown: str) -> Iterator[None]:
    """Turn whatever a missing or broken file causes into a DataError."""
    try:
        yield
    except FileNotFoundError:
        raise missing(path, shown) from None
    except OSError as error:
        raise DataError(f"{shown} cannot be read: {error.strerror or error}") from error
    except (CoveyError, MemoryError):
        raise
    except Exception as error:  # a broken file makes numpy, zipfile and zlib raise many kinds
        if "allow_pickle" in str(error) or "Python objects" in str(error):
            raise DataError(f"{shown}: {_PICKLE_REASON}") from None
        raise DataError(f"{shown} is damaged: {error}; write or copy it again") from error


def missing(path: Path, shown: str) -> DataError:
    """The error for a file that is not there."""
    return DataError(
        f"{shown}: no such file (looked in {path.parent}): paths in [data] start from the folder "
        "of the configuration file"
    )
