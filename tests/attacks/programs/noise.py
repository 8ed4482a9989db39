"""Is it noise? Tests of whether ring elements are uniform mod 2^b.

An update under its masks must look uniform to whoever lacks one of them, alone and against any other
update. The probability of a false alarm is chosen: `ALARM` per test. A run makes some 2 000 tests on
fresh randomness from the operating system, so that it fails by chance less than once in a million
runs; what is really not uniform fails with p far below that, as the controls show.
"""

from collections.abc import Iterator, Mapping
from itertools import combinations

import numpy as np
from numpy.typing import NDArray
from scipy import stats

ALARM = 1e-10
BINS = 256


def ks(ring: NDArray[np.int64], bits: int, chance: np.random.Generator) -> float:
    """p of Kolmogorov-Smirnov against the uniform distribution on [0, 1). Each integer is spread over
    its own width, since the test is for continuous values."""
    return float(stats.kstest((ring + chance.random(ring.size)) / (1 << bits), "uniform").pvalue)


def chi_square(values: NDArray[np.int64]) -> float:
    """p of chi-square: values in [0, BINS) fall into each bin alike."""
    return float(stats.chisquare(np.bincount(values, minlength=BINS)).pvalue)


def p_values(ring: NDArray[np.int64], bits: int, chance: np.random.Generator) -> dict[str, float]:
    """Of one vector of ring elements: its distribution, its highest 8 bits, its lowest, and how each
    element's lie beside the next one's."""
    low = ring & (BINS - 1)
    return {
        "KS": ks(ring, bits, chance),
        "chi-square, high bits": chi_square(ring >> (bits - 8)),
        "chi-square, low bits": chi_square(low),
        "chi-square, neighbours": chi_square((ring[:-1] - ring[1:]) >> (bits - 8) & (BINS - 1)),
    }


def alone_and_in_pairs(
    rings: Mapping[str, NDArray[np.int64]], bits: int
) -> Iterator[tuple[str, NDArray[np.int64]]]:
    """Every vector, every difference and every sum of two, mod 2^b."""
    mask = (1 << bits) - 1
    for name, ring in rings.items():
        yield name, ring & mask
    for (a, first), (b, second) in combinations(rings.items(), 2):
        yield f"{a} - {b}", (first - second) & mask
        yield f"{a} + {b}", (first + second) & mask
