"""What a data source is, the source over arrays, and batches in random order.

Reading files lives in `files`, `table` and `provider`.
"""

import mmap
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from covey_device.data.fit import Array, Fit, check_lengths
from covey_shared.errors import LocalProtocolError

Indices = NDArray[np.int64]


class DataSource(Protocol):
    """Examples by number, as the plan wants them."""

    @property
    def n_examples(self) -> int:
        """At least 1."""
        ...

    def batch(self, indices: Indices) -> tuple[Array, Array]:
        """Features [len(indices), *shape] and labels, C-contiguous, of the plan's types."""
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
        self._features, self._labels = features, labels
        self._fits = fits
        for array, fit in zip((features, labels), fits, strict=True):
            fit.check(array)
        check_lengths(fits[0], len(features), fits[1], len(labels))
        for array, fit in zip((features, labels), fits, strict=True):
            fit.search(array, self._release)

    @property
    def n_examples(self) -> int:
        return len(self._labels)

    def batch(self, indices: Indices) -> tuple[Array, Array]:
        features = self._fits[0].convert(self._features[indices])
        labels = self._fits[1].convert(self._labels[indices])
        self._release()
        return features, labels

    def _release(self) -> None:
        """Give touched pages of memory-mapped files back; the kernel's cache still has them.

        Otherwise every page ever read would count as this process's resident memory, and a pass
        over a large file would end training by its memory bound.
        """
        for array in (self._features, self._labels):
            base: object = array.base
            # Only maps opened for reading: dropping their pages cannot lose anything.
            if isinstance(array, np.memmap) and array.mode == "r" and isinstance(base, mmap.mmap):
                base.madvise(mmap.MADV_DONTNEED)


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
