"""Holds one array against one tensor of the plan, and says what is wrong with it.

Every rule about shapes, element types and values stands here, once for all kinds of data source.
Nothing here opens a file; the readers only tell where an array comes from (`origin`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from covey_device.data.config import DataConfig
from covey_shared.errors import DataError
from covey_shared.plan import PlanHeader, TensorSpec

Array = NDArray[Any]
Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Range:
    """Which values are allowed besides being finite. None: no bound on that side."""

    low: float | None
    high: float | None
    wants: str


@dataclass(frozen=True, slots=True)
class Fit:
    """How one array becomes one tensor of the plan.

    origin: for messages, the file and the array or columns. plan: the plan's name, for messages.
    """

    tensor: TensorSpec
    plan: str
    origin: str
    allowed: Range
    reshape: bool
    scale: float = 1.0
    offset: float = 0.0

    @property
    def scaled(self) -> bool:
        """Whether scale or offset change anything."""
        return self.scale != 1.0 or self.offset != 0.0

    def check(self, array: Array) -> None:
        """Raise DataError unless the array's type and shape can become the plan's tensor."""
        self._check_type(array.dtype)
        if array.ndim == 0:
            raise self.error("is a single number", "give one row per example")
        self._check_shape(array.shape[1:])

    def _check_type(self, dtype: np.dtype[Any]) -> None:
        wanted = self.tensor.dtype
        if dtype.kind == "O":
            raise self.error(
                "holds Python objects",
                "they are kept as pickle, which can run code when it is read, so covey never "
                f"reads it: save plain numbers, array.astype({wanted!r})",
            )
        if not casts_safely(dtype, wanted):
            raise self.error(
                f"holds {dtype.name}, the plan {self.plan!r} wants {wanted} "
                f"and {dtype.name} does not become that safely",
                f"save it with .astype({wanted!r}) if its values allow it",
            )
        if self.scaled and wanted != "float32":
            raise self.error(
                f"would be scaled, but the plan {self.plan!r} wants {wanted}",
                "remove scale and offset from [data]",
            )

    def _check_shape(self, shape: Shape) -> None:
        wanted = self.tensor.shape
        if shape == wanted or reshapes(shape, wanted):
            return
        count, wanted_count = prod(shape), prod(wanted)
        problem = (
            f"has {_values(shape)} per example, the plan {self.plan!r} wants {_values(wanted)}"
        )
        if count != wanted_count:
            raise self.error(problem, "use data of the plan's shape, or the plan for this data")
        if not self.reshape:
            raise self.error(
                problem,
                "reorder the axes before saving (numpy.moveaxis), or set reshape = true in [data] "
                "if the values already lie in the plan's order",
            )

    def convert(self, rows: Array) -> Array:
        """Rows as stored -> a new C-contiguous array [rows, *shape] of the plan's type."""
        # What is too large for float32 becomes infinite here, and is refused by its value.
        with np.errstate(over="ignore", invalid="ignore"):
            out: Array = np.array(rows, self.tensor.dtype, order="C")
            if self.scaled:
                out *= np.float32(self.scale)
                out += np.float32(self.offset)
        return out.reshape(len(rows), *self.tensor.shape)

    def needs_search(self, dtype: np.dtype[Any]) -> bool:
        """Whether an array of this stored type can hold a value that is not allowed."""
        bounded = self.allowed.low is not None or self.allowed.high is not None
        return dtype.kind == "f" or bounded

    def first_bad(self, values: Array) -> tuple[int, str] | None:
        """Flat index and description of the first value that is not allowed.

        values: converted, any shape.
        """
        flat = values.reshape(-1)
        good = self._good(flat)
        if good.all():
            return None
        index = int(np.argmin(good))
        return index, f"{flat[index]} where {self.allowed.wants}"

    def good_rows(self, values: Array) -> NDArray[np.bool_]:
        """Which rows hold only values that are allowed. values: converted, one row per example."""
        good: NDArray[np.bool_] = np.asarray(
            self._good(values.reshape(len(values), -1)).all(axis=1)
        )
        return good

    def _good(self, values: Array) -> NDArray[np.bool_]:
        good: NDArray[np.bool_] = np.isfinite(values)
        if self.allowed.low is not None:
            good &= values >= self.allowed.low
        if self.allowed.high is not None:
            good &= values <= self.allowed.high
        return good

    def check_values(self, values: Array, numbers: Sequence[int] | NDArray[np.int64]) -> None:
        """Raise DataError at the first bad value. numbers: the rows' example numbers."""
        found = self.first_bad(values)
        if found is not None:
            index, what = found
            row, place = divmod(index, prod(self.tensor.shape))
            where = f"example {numbers[row]}" + (f", value {place}" if self.tensor.shape else "")
            raise self.error(
                f"holds {what} ({where}, counted from 0)", "correct it or leave that example out"
            )

    def error(self, problem: str, next_step: str) -> DataError:
        """The message's one form: who, what, what next."""
        return DataError(f"{self.origin} {problem}: {next_step}")


def fits(config: DataConfig, header: PlanHeader, features: str, labels: str) -> tuple[Fit, Fit]:
    """The two fits of a source. features, labels: the origins, for messages."""
    return (
        Fit(
            tensor=header.features,
            plan=header.name,
            origin=features,
            allowed=Range(None, None, "only finite numbers are allowed"),
            reshape=config.reshape,
            scale=config.factor,
            offset=config.offset,
        ),
        Fit(
            tensor=header.labels,
            plan=header.name,
            origin=labels,
            allowed=allowed_labels(header),
            reshape=config.reshape,
        ),
    )


def allowed_labels(header: PlanHeader) -> Range:
    """What the plan's loss says of its labels."""
    # A class that the model has no output for would train silently as "none of them".
    if header.classes is not None:
        return Range(0, header.classes - 1, f"the plan has classes 0 to {header.classes - 1}")
    if header.loss == "cross_entropy" and header.labels.dtype != "float32":
        return Range(0, None, "class numbers start at 0")
    if header.loss == "bce_with_logits":
        return Range(0, 1, "the loss wants 0, 1 or a probability between them")
    return Range(None, None, "only finite numbers are allowed")


def casts_safely(stored: np.dtype[Any], wanted: str) -> bool:
    """Whether every stored number survives, but for float64's extra digits."""
    if stored.kind not in "biuf":
        return False
    if wanted == "float32" and stored.kind == "f" and stored.itemsize == 8:
        return True
    return np.can_cast(stored, wanted, "safe")


def reshapes(stored: Shape, wanted: Shape) -> bool:
    """Whether the order of the values is beyond doubt although the shapes differ.

    So it is when they differ only in sides of length 1, or when one of them is flat; (28, 28, 3)
    for (3, 28, 28) has as many values, but in another order.
    """
    long_stored = [side for side in stored if side != 1]
    long_wanted = [side for side in wanted if side != 1]
    flat = len(long_stored) <= 1 or len(long_wanted) <= 1
    return long_stored == long_wanted or (flat and prod(stored) == prod(wanted))


def check_lengths(features: Fit, n_features: int, labels: Fit, n_labels: int) -> None:
    """Raise DataError unless there is one label per example and at least one example."""
    if n_features != n_labels:
        raise DataError(
            f"{features.origin} has {n_features} examples, {labels.origin} has {n_labels}: "
            "give exactly one label per example"
        )
    if n_features == 0:
        raise features.error("has no examples", "give at least one")


def _values(shape: Shape) -> str:
    count = prod(shape)
    return f"{count} value{'' if count == 1 else 's'} {list(shape)}"
