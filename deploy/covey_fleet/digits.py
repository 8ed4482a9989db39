"""The data of the demo: scikit-learn's handwritten digits, and how they are spread over devices.

1,797 real 8x8 images, bundled with scikit-learn, so nothing is downloaded. Images become float32
in 0..1 with shape (1, 8, 8), labels int64: what the demo's plans take.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from covey_shared.errors import ConfigError

CLASSES = 10
TEST_FRACTION = 0.2
MIN_EXAMPLES = 8
"""Fewest examples of one device: a split by chance may leave a device with none."""

Indices = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Examples:
    """features: float32[n, 1, 8, 8]. labels: int64[n]."""

    features: NDArray[np.float32]
    labels: NDArray[np.int64]

    def take(self, rows: Indices) -> "Examples":
        """These rows of both arrays."""
        return Examples(self.features[rows], self.labels[rows])

    @property
    def n(self) -> int:
        """How many there are."""
        return len(self.features)


@dataclass(frozen=True, slots=True)
class Iid:
    """Every device gets a random sample of the same size."""

    def __str__(self) -> str:
        return "iid"


@dataclass(frozen=True, slots=True)
class Dirichlet:
    """Each digit's examples are spread over the devices in shares drawn from a Dirichlet
    distribution: the smaller alpha, the more one-sided each device's data (Hsu et al. 2019)."""

    alpha: float

    def __str__(self) -> str:
        return f"dirichlet:{self.alpha:g}"


@dataclass(frozen=True, slots=True)
class ByLabel:
    """Each device knows only a few digits: three devices know 0-3, 4-6 and 7-9."""

    def __str__(self) -> str:
        return "labels"


Split = Iid | Dirichlet | ByLabel


def parse_split(text: str) -> Split:
    """iid, labels, dirichlet or dirichlet:ALPHA. Raises ConfigError."""
    if text == "iid":
        return Iid()
    if text == "labels":
        return ByLabel()
    kind, _, number = text.partition(":")
    if kind == "dirichlet":
        try:
            alpha = float(number or 0.5)
        except ValueError:
            alpha = math.nan
        if 0.001 <= alpha <= 1e6:
            return Dirichlet(alpha)
        raise ConfigError(f"{text!r}: alpha is a number from 0.001 to 1e6, as in dirichlet:0.5")
    raise ConfigError(f"{text!r} is no split; use iid, labels or dirichlet:ALPHA")


def load() -> Examples:
    """All digits. Imports scikit-learn, which takes a second or two."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    return Examples((pixels / 16).astype(np.float32).reshape(-1, 1, 8, 8), labels.astype(np.int64))


def hold_out(examples: Examples, rng: np.random.Generator) -> tuple[Examples, Examples]:
    """(to train on, to test on): a random part of `TEST_FRACTION` is kept from the devices."""
    order = rng.permutation(examples.n)
    n_test = round(examples.n * TEST_FRACTION)
    return examples.take(order[n_test:]), examples.take(order[:n_test])


def spread(
    labels: NDArray[np.int64], n_devices: int, split: Split, rng: np.random.Generator
) -> list[Indices]:
    """Which examples each device gets: disjoint, together all, nobody without any."""
    match split:
        case Iid():
            parts = np.array_split(rng.permutation(len(labels)), n_devices)
        case ByLabel():
            parts = _by_label(labels, n_devices, rng)
        case Dirichlet(alpha):
            parts = _dirichlet(labels, n_devices, alpha, rng)
    return _fill(parts, MIN_EXAMPLES)


def _by_label(labels: NDArray[np.int64], n_devices: int, rng: np.random.Generator) -> list[Indices]:
    if n_devices <= CLASSES:
        ranges = np.array_split(np.arange(CLASSES), n_devices)
        return [np.flatnonzero(np.isin(labels, digits)) for digits in ranges]
    # More devices than digits: some share one.
    shuffled = rng.permutation(len(labels))
    return np.array_split(shuffled[np.argsort(labels[shuffled], kind="stable")], n_devices)


def _dirichlet(
    labels: NDArray[np.int64], n_devices: int, alpha: float, rng: np.random.Generator
) -> list[Indices]:
    parts: list[list[Indices]] = [[] for _ in range(n_devices)]
    for digit in range(CLASSES):
        rows = rng.permutation(np.flatnonzero(labels == digit))
        shares = rng.dirichlet(np.full(n_devices, alpha))
        cuts = (np.cumsum(shares)[:-1] * len(rows)).astype(np.int64)
        for part, piece in zip(parts, np.split(rows, cuts), strict=True):
            part.append(piece)
    return [np.concatenate(part) for part in parts]


def _fill(parts: list[Indices], fewest: int) -> list[Indices]:
    """Move examples from the richest device to those with fewer than `fewest`."""
    fewest = min(fewest, sum(map(len, parts)) // len(parts))
    for i in range(len(parts)):
        while len(parts[i]) < fewest:
            richest = max(range(len(parts)), key=lambda j: len(parts[j]))
            moved = fewest - len(parts[i])
            parts[i] = np.concatenate([parts[i], parts[richest][:moved]])
            parts[richest] = parts[richest][moved:]
    return parts
