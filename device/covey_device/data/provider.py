"""Data from a function of the device owner's: "module:function".

The function is named in the device's own configuration, never by a round: it is the owner's code
on the owner's machine. It returns two arrays (features, labels), or an object with `__len__` and
`batch(indices) -> (features, labels)` for data that is made or fetched batch by batch.
"""

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np

from covey_device.data.config import PythonData
from covey_device.data.fit import Array, Fit
from covey_device.data.source import ArraySource, DataSource, Indices
from covey_shared.errors import CoveyError, DataError


@runtime_checkable
class Provider(Protocol):
    """What a function may return instead of two arrays."""

    def __len__(self) -> int: ...

    def batch(self, indices: Indices) -> object:
        """indices: int64. Returns (features, labels), one row for each index, in its order."""
        ...


class ProviderSource:
    """A provider, whose every batch is checked against the plan."""

    def __init__(self, provider: Provider, origin: str, fits: tuple[Fit, Fit]) -> None:
        """Raises DataError unless it has an example and its first one fits the plan."""
        self._provider, self._origin, self._fits = provider, origin, fits
        with _calling(f"{origin}.__len__"):
            self._n_examples = len(provider)
        if self._n_examples < 1:
            raise DataError(f"{origin} has no examples: give at least one")
        self.batch(np.zeros(1, np.int64))

    @property
    def n_examples(self) -> int:
        return self._n_examples

    def batch(self, indices: Indices) -> tuple[Array, Array]:
        with _calling(f"{self._origin}.batch"):
            result = self._provider.batch(indices)
        features, labels = _pair(result, f"{self._origin}.batch")
        converted = []
        for fit, array in zip(self._fits, (features, labels), strict=True):
            fit.check(array)
            if len(array) != len(indices):
                raise fit.error(
                    f"has {len(array)} rows for {len(indices)} indices",
                    "return one row for each index",
                )
            values = fit.convert(array)
            fit.check_values(values, indices)
            converted.append(values)
        return converted[0], converted[1]

    def refresh(self) -> None:
        """Nothing: how many examples there are was asked when it was opened."""


def open_provider(config: PythonData, fits: tuple[Fit, Fit], base: Path) -> DataSource:
    """Import the module, call the function, check what it returns. base: may hold the module."""
    module_name, _, function_name = config.function.partition(":")
    # Last in the search path, so that nothing in the folder hides an installed module; for good,
    # because the owner's code may import more at any time.
    if str(base) not in sys.path:
        sys.path.append(str(base))
    with _calling(f"importing {module_name!r}"):
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
                raise
            raise DataError(
                f"{config.function}: no module {error.name!r}: put its file into {base}, or "
                "install it"
            ) from None
    function = getattr(module, function_name, None)
    if not callable(function):
        raise DataError(
            f"{config.function}: module {module_name!r} has no function {function_name!r}: "
            "correct the name in [data]"
        )
    with _calling(config.function):
        result: object = function()
    if isinstance(result, tuple):
        features, labels = _pair(result, config.function)
        return ArraySource(features, labels, fits)
    if isinstance(result, Provider):
        return ProviderSource(result, config.function, fits)
    raise DataError(
        f"{config.function} returned {type(result).__name__}: return (features, labels) arrays, "
        "or an object with __len__ and batch(indices)"
    )


def _pair(result: object, origin: str) -> tuple[Array, Array]:
    """The two arrays that the owner's code returned."""
    if not isinstance(result, tuple) or len(result) != 2:
        raise DataError(
            f"{origin} returned {type(result).__name__}, not a pair: return (features, labels)"
        )
    for value in result:
        if not isinstance(value, np.ndarray):
            raise DataError(
                f"{origin} returned {type(value).__name__} where an array is wanted: "
                "return numpy arrays"
            )
    features, labels = result
    return features, labels


@contextmanager
def _calling(what: str) -> Iterator[None]:
    """Turn whatever the owner's code raises into a DataError that names it."""
    try:
        yield
    except (CoveyError, MemoryError):
        raise
    except Exception as error:
        raise DataError(f"{what} raised {type(error).__name__}: {error}; correct it") from error
