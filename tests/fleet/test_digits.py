"""How the demo's data is spread: disjoint, complete, and as one-sided as asked for."""

import numpy as np
import pytest

from covey_fleet import digits
from covey_fleet.digits import ByLabel, Dirichlet, Iid, Split
from covey_shared.errors import ConfigError

LABELS = np.repeat(np.arange(10), 144)[:1437]
SPLITS: list[Split] = [Iid(), ByLabel(), Dirichlet(0.5), Dirichlet(0.001), Dirichlet(1e6)]


@pytest.mark.parametrize("n_devices", [3, 10, 23, 128])
@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_every_example_goes_to_one_device_and_nobody_goes_without(
    split: Split, n_devices: int
) -> None:
    parts = digits.spread(LABELS, n_devices, split, np.random.default_rng(1))
    assert len(parts) == n_devices
    assert min(map(len, parts)) >= digits.MIN_EXAMPLES
    assert sorted(np.concatenate(parts)) == list(range(len(LABELS)))


def known(n_devices: int, split: Split) -> list[set[int]]:
    parts = digits.spread(LABELS, n_devices, split, np.random.default_rng(1))
    return [set(LABELS[part].tolist()) for part in parts]


def test_labels_are_contiguous_ranges_of_digits() -> None:
    assert known(3, ByLabel()) == [{0, 1, 2, 3}, {4, 5, 6}, {7, 8, 9}]
    assert known(10, ByLabel()) == [{digit} for digit in range(10)]
    assert max(map(len, known(20, ByLabel()))) <= 2


def test_alpha_says_how_one_sided_a_split_is() -> None:
    def largest_share(split: Split) -> float:
        parts = digits.spread(LABELS, 5, split, np.random.default_rng(2))
        return float(np.mean([np.bincount(LABELS[p]).max() / len(p) for p in parts]))

    assert largest_share(Dirichlet(0.05)) > 0.4 > largest_share(Dirichlet(100.0)) > 0.1
    assert largest_share(Iid()) < 0.2


def test_the_same_seed_gives_the_same_split() -> None:
    one, two = (
        digits.spread(LABELS, 7, Dirichlet(0.5), np.random.default_rng(3)) for _ in range(2)
    )
    assert all(np.array_equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_what_a_split_is_called_can_be_typed(split: Split) -> None:
    assert digits.parse_split(str(split)) == split


def test_dirichlet_alone_means_a_half() -> None:
    assert digits.parse_split("dirichlet") == Dirichlet(0.5)


@pytest.mark.parametrize(
    "text", ["", "even", "dirichlet:0", "dirichlet:-1", "dirichlet:nan", "dirichlet:x", "iid:2"]
)
def test_what_is_no_split_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="dirichlet:"):
        digits.parse_split(text)


def test_the_digits_are_what_the_plans_take() -> None:
    everything = digits.load()
    train, test = digits.hold_out(everything, np.random.default_rng(7))
    assert (everything.n, train.n, test.n) == (1797, 1438, 359)
    assert everything.features.dtype == np.float32
    assert everything.features.shape == (1797, 1, 8, 8)
    assert everything.labels.dtype == np.int64
    assert (everything.features.min(), everything.features.max()) == (0.0, 1.0)
    both = np.concatenate([train.features, test.features]).reshape(1797, -1)
    assert np.array_equal(
        np.sort(both.sum(1)), np.sort(everything.features.reshape(1797, -1).sum(1))
    )
