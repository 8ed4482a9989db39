"""Shamir shares: known answers, the library as oracle, and what too few shares do not tell."""

from itertools import combinations
from typing import Any

import numpy as np
import pytest
from Crypto.Protocol.SecretSharing import Shamir, _Element
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from covey_shared import sharing
from covey_shared.errors import LocalProtocolError
from vectors import load, seeded

unhex = bytes.fromhex
VECTORS = load("covey")["sharing"]
elements = st.binary(min_size=16, max_size=16)
field = st.integers(0, 2**128 - 1)
brief = settings(max_examples=50, deadline=None)


@st.composite
def sizes(draw: st.DrawFn, most: int = 20) -> tuple[int, int]:
    """(threshold, n)"""
    n = draw(st.integers(1, most))
    return draw(st.integers(1, n)), n


def picked(shares: list[bytes], holders: tuple[int, ...] | list[int]) -> dict[int, list[bytes]]:
    return {x: [shares[x - 1]] for x in holders}


# --- known answers ------------------------------------------------------------------------------


@pytest.mark.parametrize("case", VECTORS, ids=lambda c: f"{c['threshold']} of {len(c['shares'])}")
def test_shares_stay_what_they_are(case: dict[str, Any]) -> None:
    secret, noise = unhex(case["secret"]), unhex(case["coefficients"])
    shares = [unhex(share) for share in case["shares"]]
    asked: list[int] = []

    def rng(n: int) -> bytes:
        asked.append(n)
        return noise

    assert sharing.split(secret, case["threshold"], len(shares), rng) == shares
    assert sum(asked) == len(noise) == 16 * (case["threshold"] - 1)
    for holders in combinations(range(1, len(shares) + 1), case["threshold"]):
        assert sharing.combine(picked(shares, holders)) == [secret]


def test_the_smallest_cases_by_hand() -> None:
    secret, a = bytes(15) + b"\x05", bytes(15) + b"\x01"
    # y = a x + s with a = 1: s + 1, s + 2, s + 3, addition being exclusive or.
    shares = sharing.split(secret, 2, 3, lambda n: a)
    assert [share[-1] for share in shares] == [5 ^ 1, 5 ^ 2, 5 ^ 3]
    # a = x^127: 2 a = x^128 = x^7 + x^2 + x + 1, 3 a = 2 a + a.
    shares = sharing.split(bytes(16), 2, 3, lambda n: b"\x80" + bytes(15))
    assert shares[0] == b"\x80" + bytes(15)
    assert shares[1] == bytes(15) + b"\x87"
    assert shares[2] == b"\x80" + bytes(14) + b"\x87"


# --- any t of n ---------------------------------------------------------------------------------


@brief
@given(elements, sizes(), st.data())
def test_any_t_of_n_recover(secret: bytes, size: tuple[int, int], data: st.DataObject) -> None:
    threshold, n = size
    shares = sharing.split(secret, threshold, n, seeded(f"{size}"))
    holders = data.draw(st.permutations(range(1, n + 1)))[:threshold]
    assert sharing.combine(picked(shares, holders)) == [secret]
    # The same holders also know everybody else's share.
    for x in range(1, n + 1):
        assert sharing.combine(picked(shares, holders), at=x) == [shares[x - 1]]


@brief
@given(elements, elements, sizes(), st.data())
def test_fewer_than_t_shares_fit_every_secret(
    secret: bytes, other: bytes, size: tuple[int, int], data: st.DataObject
) -> None:
    """For t - 1 shares and any secret at all there is a polynomial through both."""
    threshold, n = size
    assume(threshold > 1)
    shares = sharing.split(secret, threshold, n, seeded(f"{size}"))
    order = data.draw(st.permutations(range(1, n + 1)))
    held, further = order[: threshold - 1], order[threshold - 1]
    # Lagrange through (0, other) and the held shares, to what the next holder would then have.
    points = [0, *held]
    values = [other, *(shares[x - 1] for x in held)]
    invented = 0
    for coefficient, value in zip(sharing._coefficients(points, further), values, strict=True):
        invented ^= sharing._multiply(coefficient, int.from_bytes(value, "big"))
    known = picked(shares, held) | {further: [invented.to_bytes(16, "big")]}
    assert sharing.combine(known) == [other]
    assert (invented.to_bytes(16, "big") == shares[further - 1]) == (other == secret)


@brief
@given(elements, sizes(8), st.data())
def test_one_share_too_few_gives_another_secret(
    secret: bytes, size: tuple[int, int], data: st.DataObject
) -> None:
    threshold, n = size
    assume(threshold > 1)
    shares = sharing.split(secret, threshold, n, seeded(f"{size}"))
    holders = data.draw(st.permutations(range(1, n + 1)))[: threshold - 1]
    assert sharing.combine(picked(shares, holders)) != [secret]


def test_two_splits_of_one_secret_share_nothing() -> None:
    rng = seeded("two splits")
    first, second = (sharing.split(bytes(16), 3, 10, rng) for _ in range(2))
    assert not set(first) & set(second)


@pytest.mark.parametrize("size", [(1, 1), (1, 255), (255, 255), (86, 128), (128, 128), (2, 255)])
def test_the_largest_cohorts(size: tuple[int, int]) -> None:
    threshold, n = size
    secret = seeded("secret")(16)
    shares = sharing.split(secret, threshold, n, seeded("coefficients"))
    assert len(shares) == n
    first, last = range(1, threshold + 1), range(n - threshold + 1, n + 1)
    assert sharing.combine(picked(shares, list(first))) == [secret]
    assert sharing.combine(picked(shares, list(last))) == [secret]
    assert sharing.combine(picked(shares, list(last)), at=1) == shares[:1]


# --- many secrets at once -----------------------------------------------------------------------


@brief
@given(st.lists(elements, max_size=12), sizes(), st.data())
def test_a_batch_is_its_parts(
    secrets: list[bytes], size: tuple[int, int], data: st.DataObject
) -> None:
    threshold, n = size
    rng = seeded(f"{size}")
    split = [sharing.split(secret, threshold, n, rng) for secret in secrets]
    holders = data.draw(st.permutations(range(1, n + 1)))[:threshold]
    batch = {x: [shares[x - 1] for shares in split] for x in holders}
    assert sharing.combine(batch) == secrets
    at = data.draw(st.integers(0, 255))
    one_by_one = [sharing.combine(picked(shares, holders), at=at)[0] for shares in split]
    assert sharing.combine(batch, at=at) == one_by_one


@brief
@given(elements, sizes(10), st.data())
def test_a_wrong_share_spoils_its_own_secret_alone(
    secret: bytes, size: tuple[int, int], data: st.DataObject
) -> None:
    threshold, n = size
    shares = sharing.split(secret, threshold, n, seeded(f"{size}"))
    holders = list(range(1, threshold + 1))
    liar, bit = data.draw(st.sampled_from(holders)), data.draw(st.integers(0, 127))
    batch = {x: [shares[x - 1], shares[x - 1]] for x in holders}
    wrong = int.from_bytes(batch[liar][0], "big") ^ 1 << bit
    batch[liar][0] = wrong.to_bytes(16, "big")
    bad, good = sharing.combine(batch)
    assert good == secret
    assert bad != secret


# --- against pycryptodome -----------------------------------------------------------------------


@brief
@given(elements, sizes(7), st.data())
def test_bit_compatible_with_pycryptodome_both_ways(
    secret: bytes, size: tuple[int, int], data: st.DataObject
) -> None:
    threshold, n = size
    holders = data.draw(st.permutations(range(1, n + 1)))[:threshold]
    theirs = dict(Shamir.split(threshold, n, secret, ssss=False))
    assert sharing.combine({x: [theirs[x]] for x in holders}) == [secret]
    ours = sharing.split(secret, threshold, n, seeded(f"{size}"))
    assert Shamir.combine([(x, ours[x - 1]) for x in holders], ssss=False) == secret


def test_bit_compatible_with_pycryptodome_at_full_size() -> None:
    secret = seeded("secret")(16)
    ours = sharing.split(secret, 86, 128, seeded("coefficients"))
    assert Shamir.combine([(x, ours[x - 1]) for x in range(43, 129)], ssss=False) == secret


@brief
@given(field, field)
@example(0, 2**128 - 1)
@example(1, 2**127)
@example(2**128 - 1, 2**128 - 1)
def test_the_field_is_pycryptodomes(a: int, b: int) -> None:
    assert sharing._multiply(a, b) == int(_Element(a) * _Element(b))
    assert sharing._multiply(a, b) == sharing._multiply(b, a)
    if a:
        assert sharing._inverse(a) == int(_Element(a).inverse())
        assert sharing._multiply(a, sharing._inverse(a)) == 1


@brief
@given(st.lists(elements, min_size=1, max_size=5), field)
def test_the_vectorised_product_is_the_scalar_one(values: list[bytes], factor: int) -> None:
    high, low = sharing._load(b"".join(values), len(values))
    bits = [
        np.full(len(values), np.uint64(2**64 - 1 if factor >> i & 1 else 0)) for i in range(128)
    ]
    product = sharing._store(*sharing._times_bits(high, low, bits))
    expected = [sharing._multiply(int.from_bytes(v, "big"), factor) for v in values]
    assert product == b"".join(e.to_bytes(16, "big") for e in expected)


def test_every_small_inverse() -> None:
    """Denominators are products of differences of holders' numbers: 1..255."""
    for a in range(1, 256):
        assert sharing._multiply(a, sharing._inverse(a)) == 1


# --- misuse -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("secret", "threshold", "n"),
    [
        (bytes(15), 1, 1),
        (bytes(17), 1, 1),
        (b"", 1, 1),
        (bytes(16), 0, 3),
        (bytes(16), -1, 3),
        (bytes(16), 4, 3),
        (bytes(16), 1, 0),
        (bytes(16), 1, 256),
    ],
)
def test_impossible_splits(secret: bytes, threshold: int, n: int) -> None:
    with pytest.raises(LocalProtocolError, match="cannot split"):
        sharing.split(secret, threshold, n, seeded("x"))


@pytest.mark.parametrize(
    "shares",
    [
        {},
        {0: [bytes(16)]},
        {-1: [bytes(16)], 1: [bytes(16)]},
        {256: [bytes(16)]},
        {1: [bytes(16)], 2: []},
        {1: [bytes(15)]},
        {1: [bytes(15)], 2: [bytes(17)]},  # together as long as two shares
        {1: [bytes(15), bytes(17)]},
    ],
)
def test_impossible_shares(shares: dict[int, list[bytes]]) -> None:
    for at in (0, 1):
        with pytest.raises(LocalProtocolError):
            sharing.combine(shares, at=at)


@pytest.mark.parametrize("at", [-1, 256, 2**128])
def test_impossible_points(at: int) -> None:
    with pytest.raises(LocalProtocolError, match="evaluate"):
        sharing.combine({1: [bytes(16)], 2: [bytes(16)]}, at=at)


def test_no_secrets_at_all() -> None:
    assert sharing.combine({1: [], 2: []}) == []
    assert sharing.combine({1: [], 2: []}, at=2) == []
