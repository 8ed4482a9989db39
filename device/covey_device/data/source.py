"""What a data source is, the source over arrays, and batches in random order.

Reading files lives in `files`, `table` and `provider`.
"""

import mmap
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from covey_device.data.fit import Array, Fit, check_lengths
from covey_shared.errors import DataError, LocalProtocolError

Indices = NDArray[np.int64]

# Arrays are searched in blocks of about this many elements, so that a search costs a few MB.
BLOCK_ELEMENTS = 1 << 18
ROWS_PER_RELEASE = 8


class DataSource(Protocol):
    """Examples by number, as the plan wants them."""

    @property
    def n_examples(self) -> int:
        """At least 1."""
        ...

    def batch(self, indices: Indices) -> tuple[Array, Array]:
        """Features [len(indices), *shape] and labels, C-contiguous, of the plan's types."""
        ...

    def refresh(self) -> None:
        """Take in what is new since it was opened, before a round; never while `batches` are drawn.

        Raises DataError if there is no example left.
        """
        ...


class ArraySource:
    """Two arrays, in memory or memory-mapped; converted batch by batch.

    The arrays stay as they are stored (a uint8 image keeps its one byte per pixel), so a batch is
    all that is ever held in the plan's types.
    """

    def __init__(self, features: Array, labels: Array, fits: tuple[Fit, Fit]) -> None:
        """Raises DataError unless the arrays fit the plan. Reads float data once from end to end.

        features, labels: one row per example.
        """
        for array, fit in zip((features, labels), fits, strict=True):
            fit.check(array)
        check_lengths(fits[0], len(features), fits[1], len(labels))
        self._fits = fits
        self._rows = tuple(
            Rows(array, fit.origin) for array, fit in zip((features, labels), fits, strict=True)
        )
        for rows, fit in zip(self._rows, fits, strict=True):
            if fit.needs_search(rows.array.dtype):
                for start, block in rows.blocks():
                    fit.check_values(fit.convert(block), range(start, start + len(block)))

    @property
    def n_examples(self) -> int:
        return len(self._rows[0].array)

    def batch(self, indices: Indices) -> tuple[Array, Array]:
        features, labels = (
            fit.convert(rows.take(indices))
            for rows, fit in zip(self._rows, self._fits, strict=True)
        )
        return features, labels

    def refresh(self) -> None:
        """Nothing: arrays do not grow."""


class Rows:
    """Reads rows of one array, without keeping a memory-mapped file's pages.

    Every page of a map that was touched counts as this process's resident memory, until training
    would end by its memory bound; so pages are given back as soon as their rows are copied (the
    kernel's cache still has them). Where the cache keeps the file in 2 MB pieces, one row maps a
    whole piece: 64 rows of 4 KB took 80 MB until this was done every few rows.
    """

    def __init__(self, array: Array, origin: str) -> None:
        """origin: for messages."""
        self.array = array
        self._origin = origin
        self._map: mmap.mmap | None = None
        self._file: Path | None = None
        base: object = array.base
        # Only maps opened for reading: dropping their pages cannot lose anything.
        if isinstance(array, np.memmap) and array.mode == "r" and isinstance(base, mmap.mmap):
            self._map = base
            if array.filename is not None:
                self._file = Path(array.filename)
                self._opened = self._file.stat()

    def take(self, indices: Indices) -> Array:
        """The rows of these numbers, copied."""
        if self._map is None:
            taken: Array = self.array[indices]
            return taken
        self._check_unchanged()
        taken = np.empty((len(indices), *self.array.shape[1:]), self.array.dtype)
        for start in range(0, len(indices), ROWS_PER_RELEASE):
            part = slice(start, start + ROWS_PER_RELEASE)
            taken[part] = self.array[indices[part]]
            self._map.madvise(mmap.MADV_DONTNEED)
        return taken

    def blocks(self) -> Iterator[tuple[int, Array]]:
        """All rows in order: (number of the first, a few MB of rows at most)."""
        step = max(1, BLOCK_ELEMENTS // max(1, prod(self.array.shape[1:])))
        for start in range(0, len(self.array), step):
            self._check_unchanged()
            yield start, self.array[start : start + step]
            if self._map is not None:
                self._map.madvise(mmap.MADV_DONTNEED)

    def _check_unchanged(self) -> None:
        """Raise DataError if the mapped file was written to.

        Touching a map whose file has become shorter kills the process (SIGBUS). A file that was
        deleted or renamed away keeps its content for us.
        """
        if self._file is None:
            return
        try:
            now = self._file.stat()
        except OSError:
            return
        opened = self._opened
        same_file = (now.st_dev, now.st_ino) == (opened.st_dev, opened.st_ino)
        if same_file and (now.st_size, now.st_mtime_ns) != (opened.st_size, opened.st_mtime_ns):
            raise DataError(
                f"{self._origin} was written to while in use: write new data to another file and "
                "rename it to this name; the device reads it when it next opens its data"
            )


def batches(
    source: DataSource, batch_size: int, rng: np.random.Generator
) -> Iterator[tuple[Array, Array]]:
    """Batches without end: epoch after epoch, each in a new random order.

    Every example comes once per epoch; the last batch of an epoch may be short.
    """
    if batch_size < 1:
        raise LocalProtocolError(f"batch_size must be at least 1, not {batch_size}")
    order: NDArray[Any] = np.arange(source.n_examples, dtype=np.uint32)  # 4 bytes an example
    while True:
        rng.shuffle(order)
        for start in range(0, len(order), batch_size):
            yield source.batch(order[start : start + batch_size].astype(np.int64))
