"""Fixed point: known answers, exact sums, error bounds, the no-wrap bound and packing."""

import math
from typing import Any, cast

import numpy as np
import pytest
from Crypto.Cipher.ChaCha20 import ChaCha20Cipher
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from covey_shared import fixedpoint
from covey_shared.errors import LocalProtocolError, MalformedError
from covey_shared.fixedpoint import Encoding, pack, packed_bytes, to_signed, unpack
from covey_shared.masking import Ring
from vectors import load, seeded

unhex = bytes.fromhex
VECTORS = load("covey")["fixedpoint"]
LANES: dict[int, np.dtype[np.unsignedinteger[Any]]] = {16: np.dtype("<u2"), 32: np.dtype("<u4")}
brief = settings(max_examples=60, deadline=None)


# --- packing ------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", VECTORS["packed"], ids=lambda c: f"{c['bits']} bits")
def test_packing_stays_what_it_is(case: dict[str, Any]) -> None:
    lane, bits, packed = LANES[case["lane_bits"]], case["bits"], unhex(case["packed"])
    elements = np.array(case["elements"], lane)
    assert pack(elements, bits) == packed
    kept = elements & lane.type(2**bits - 1)
    np.testing.assert_array_equal(unpack(packed, elements.size, bits, lane), kept)


@pytest.mark.parametrize("case", VECTORS["refused"], ids=lambda c: str(c["comment"]))
def test_unpacking_refuses(case: dict[str, Any]) -> None:
    with pytest.raises(MalformedError):
        unpack(unhex(case["packed"]), case["n"], case["bits"], LANES[16])


@settings(max_examples=150, deadline=None)
@given(
    n=st.integers(0, 200),
    bits=st.integers(1, 32),
    wide=st.booleans(),
    seed=st.integers(0, 2**32),
)
@example(n=64, bits=32, wide=True, seed=0)
@example(n=65, bits=16, wide=False, seed=0)
def test_packing_round_trips_and_is_its_definition(
    n: int, bits: int, wide: bool, seed: int
) -> None:
    lane = LANES[32 if wide or bits > 16 else 16]
    elements = np.frombuffer(np.random.default_rng(seed).bytes(n * lane.itemsize), lane)
    kept = elements & lane.type(2**bits - 1)
    packed = pack(elements, bits)
    # By definition: one long little-endian integer, element j at bit j * bits.
    number = sum(int(e) << j * bits for j, e in enumerate(kept))
    assert packed == number.to_bytes(packed_bytes(n, bits), "little")
    assert len(packed) == math.ceil(n * bits / 8)
    for payload in (packed, memoryview(packed)):
        np.testing.assert_array_equal(unpack(payload, n, bits, lane), kept)
    assert unpack(packed, n, bits, lane).dtype == lane


@brief
@given(n=st.integers(1, 150), bits=st.integers(1, 32), data=st.data())
def test_unpack_accepts_one_length_and_zero_padding_only(
    n: int, bits: int, data: st.DataObject
) -> None:
    lane = LANES[32]
    payload = bytearray(np.random.default_rng([n, bits]).bytes(packed_bytes(n, bits)))
    unused = 8 * len(payload) - n * bits
    payload[-1] &= 0xFF >> unused
    # Whatever is accepted packs again to the same bytes.
    assert pack(unpack(bytes(payload), n, bits, lane), bits) == bytes(payload)
    for wrong in (bytes(payload[:-1]), bytes(payload) + b"\x00", b""):
        with pytest.raises(MalformedError, match="bytes"):
            unpack(wrong, n, bits, lane)
    if unused:
        payload[-1] |= 1 << 8 - 1 - data.draw(st.integers(0, unused - 1))
        with pytest.raises(MalformedError, match="padding"):
            unpack(bytes(payload), n, bits, lane)


@given(st.integers(1, 32), st.integers(0, 2**32 - 1))
def test_signed_representatives(bits: int, value: int) -> None:
    signed = int(to_signed(np.array([value], "<u4"), bits)[0])
    assert -(2 ** (bits - 1)) <= signed < 2 ** (bits - 1)
    assert (signed - value) % 2**bits == 0


# --- the encoding's numbers ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value_bits", "n", "bits", "lane_bits"),
    [(16, 1, 16, 16), (16, 2, 17, 32), (16, 100, 23, 32), (16, 128, 23, 32), (12, 16, 16, 16)],
)
def test_widths(value_bits: int, n: int, bits: int, lane_bits: int) -> None:
    encoding = Encoding(value_bits, n, 1000, 1.0, 10, (1.0,))
    assert (encoding.bits, encoding.lane_bits) == (bits, lane_bits)
    assert encoding.lane.itemsize * 8 == lane_bits
    assert encoding.n_coordinates == 1002
    assert encoding.payload_bytes == math.ceil(1002 * bits / 8)


def test_no_sum_wraps_at_any_cohort_size() -> None:
    """The extreme of every coordinate, summed over every n there is: the edge of Q * n < 2^(b-1)."""
    for value_bits in range(fixedpoint.MIN_VALUE_BITS, fixedpoint.MAX_VALUE_BITS + 1):
        for n in range(1, 129):
            encoding = Encoding(value_bits, n, 2, 0.25, 10)
            assert encoding.problem() is None
            assert encoding.bits == fixedpoint.bits_needed(value_bits, n)
            extreme = np.array([1, -1, 1], np.int64) * encoding.q_max
            total = (extreme.astype(np.uint64) * np.uint64(n)).astype(encoding.lane)
            np.testing.assert_array_equal(to_signed(total, encoding.bits), extreme * n)
            np.testing.assert_array_equal(encoding.decode_sum(total).average, [0.25, -0.25])


@pytest.mark.parametrize(("value_bits", "n"), [(4, 2), (8, 128), (16, 2), (16, 128), (24, 128)])
def test_devices_at_their_clip_sum_to_the_clip(value_bits: int, n: int) -> None:
    encoding = Encoding(value_bits, n, 4, 0.1, 7, (3.0,))
    total = np.zeros(encoding.n_coordinates, encoding.lane)
    delta = np.array([0.1, -0.1, 1e30, -1e30], np.float32)
    for i in range(n):
        total += encoding.encode(delta, 7, (99.0,), seeded(f"{i}"))
    signed = to_signed(total, encoding.bits)
    np.testing.assert_array_equal(signed, np.array([1, -1, 1, -1, 1, 1]) * encoding.q_max * n)
    decoded = encoding.decode_sum(total)
    np.testing.assert_allclose(decoded.average, [0.1, -0.1, 0.1, -0.1], rtol=1e-6)
    assert decoded.metrics == pytest.approx((3.0,))
    assert decoded.examples == 7 * n


@pytest.mark.parametrize(
    ("encoding", "word"),
    [
        (Encoding(3, 10, 10, 1.0, 1), "value_bits"),
        (Encoding(25, 10, 10, 1.0, 1), "value_bits"),
        (Encoding(24, 257, 10, 1.0, 1), "at most 32"),
        (Encoding(16, 0, 10, 1.0, 1), "at least 1"),
        (Encoding(16, 10, 0, 1.0, 1), "at least 1"),
        (Encoding(16, 10, 10, 1.0, 0), "at least 1"),
        *(
            (Encoding(16, 10, 10, clip, 1), "clip")
            for clip in (0.0, -1.0, math.inf, -math.inf, math.nan, 2e9, 1e-310)
        ),
        *(
            (Encoding(16, 10, 10, 1.0, 1, (1.0, clip)), "clip")
            for clip in (0.0, math.inf, math.nan)
        ),
    ],
)
def test_unusable_encodings_say_why(encoding: Encoding, word: str) -> None:
    assert word in (encoding.problem() or "")
    with pytest.raises(LocalProtocolError, match=word):
        encoding.encode(
            np.zeros(10, np.float32), 1, (0.0,) * len(encoding.metric_clips), seeded("")
        )


# --- encoding one update ------------------------------------------------------------------------


@pytest.mark.parametrize("case", VECTORS["encoded"], ids=lambda c: f"{c['encoding'][0]} bits")
def test_an_encoded_update_stays_what_it_is(case: dict[str, Any]) -> None:
    value_bits, n, n_params, clip, w_max, metric_clips = case["encoding"]
    encoding = Encoding(value_bits, n, n_params, clip, w_max, tuple(metric_clips))
    asked: list[int] = []

    def rng(n: int) -> bytes:
        asked.append(n)
        return unhex(case["noise_key"])

    delta = np.array(case["delta"], np.float32)
    ring = encoding.encode(delta, case["weight"], case["metrics"], rng)
    assert asked == [32]
    assert ring.dtype == encoding.lane
    assert ring.tolist() == case["ring"]


class Noise:
    """A stream of one byte's repetition in place of ChaCha20: the rounding noise at its extremes."""

    def __init__(self, byte: int) -> None:
        self.byte = byte

    def encrypt(self, data: bytes) -> bytes:
        return bytes([self.byte]) * len(data)


@settings(max_examples=300, deadline=None)
@given(
    value_bits=st.integers(fixedpoint.MIN_VALUE_BITS, fixedpoint.MAX_VALUE_BITS),
    clip=st.floats(1e-6, 1e6),
    w_max=st.integers(1, 10**6),
    part=st.floats(0, 1),
    byte=st.sampled_from([0, 255]),
)
@example(value_bits=24, clip=1.0, w_max=1, part=1.0, byte=255)
@example(value_bits=24, clip=0.1, w_max=1, part=1.0, byte=255)
@example(value_bits=16, clip=0.3, w_max=3, part=1.0, byte=0)
def test_no_coordinate_exceeds_q_whatever_the_noise(
    value_bits: int, clip: float, w_max: int, part: float, byte: int
) -> None:
    encoding = Encoding(value_bits, 128, 4, clip, w_max)
    share = max(1, round(part * w_max)) / w_max
    values = np.array([clip, -clip, 1e30, -1e30])
    ring = np.empty(4, encoding.lane)
    stream = cast(ChaCha20Cipher, Noise(byte))
    fixedpoint._round_into(ring, values, clip, encoding.q_max, share, stream)
    signed = to_signed(ring, encoding.lane_bits)
    assert np.abs(signed).max() <= encoding.q_max
    exact = np.array([1, -1, 1, -1]) * encoding.q_max * share
    assert np.abs(signed - exact).max() < 1 + 1e-6


def encode_as_signed(
    encoding: Encoding, delta: NDArray[np.float32], weight: int = 1, seed: str = ""
) -> NDArray[np.int64]:
    metrics = (0.0,) * len(encoding.metric_clips)
    return to_signed(encoding.encode(delta, weight, metrics, seeded(seed)), encoding.lane_bits)


@brief
@given(
    value_bits=st.integers(4, 24),
    weight=st.integers(1, 500),
    values=st.lists(st.floats(-3, 3, width=32), min_size=1, max_size=50),
)
def test_each_coordinate_is_one_of_the_two_neighbours(
    value_bits: int, weight: int, values: list[float]
) -> None:
    encoding = Encoding(value_bits, 16, len(values), 1.5, 400)
    signed = encode_as_signed(encoding, np.array(values, np.float32), weight)
    share = min(weight, 400) / 400
    exact = np.clip(np.array(values), -1.5, 1.5) / 1.5 * encoding.q_max * share
    assert np.abs(signed[:-1] - exact).max() < 1 + 1e-6
    assert np.abs(signed).max() <= encoding.q_max
    assert signed[-1] == round(encoding.q_max * share)


def test_integers_are_never_moved() -> None:
    encoding = Encoding(8, 4, 255, 127.0, 1)
    delta = np.arange(-127, 128, dtype=np.float32)
    np.testing.assert_array_equal(encode_as_signed(encoding, delta)[:-1], delta)


@pytest.mark.parametrize("fraction", [0.0, 0.01, 0.25, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("sign", [1, -1])
def test_rounding_is_unbiased(fraction: float, sign: int) -> None:
    """200,000 roundings of one value: the mean within five standard errors; the seed is fixed."""
    n = 200_000
    encoding = Encoding(16, 4, n, 32767.0, 1)  # Q / C = 1: the value is the coordinate
    value = np.float32(sign * (5 + fraction))
    signed = encode_as_signed(encoding, np.full(n, value), seed=f"{value}")[:-1]
    exact = float(value)
    up = exact - math.floor(exact)
    assert set(np.unique(signed)) <= {math.floor(exact), math.ceil(exact)}
    standard_error = math.sqrt(up * (1 - up) / n)
    assert abs(signed.mean() - exact) <= 5 * standard_error


def test_rounding_noise_is_fresh_in_each_coordinate_and_update() -> None:
    encoding = Encoding(16, 4, 100_000, 32767.0, 1)
    half = np.full(100_000, 0.5, np.float32)
    one, other = (encode_as_signed(encoding, half, seed=seed)[:-1] for seed in "ab")
    for left, right in ((one, other), (one[:-1], one[1:]), (one[:32768], one[32768:65536])):
        assert abs(np.mean(left == right) - 0.5) < 5 * 0.5 / math.sqrt(left.size)


def test_a_weight_counts_up_to_w_max() -> None:
    encoding = Encoding(16, 4, 3, 1.0, 100, (2.0,))
    delta = np.array([0.3, -0.2, 0.7], np.float32)
    at_most = encoding.encode(delta, 100, (1.0,), seeded("w"))
    for weight in (101, 10_000, 2**40):
        np.testing.assert_array_equal(encoding.encode(delta, weight, (1.0,), seeded("w")), at_most)
    assert at_most[3] == encoding.q_max
    assert encoding.encode(delta, 99, (1.0,), seeded("w"))[3] == round(encoding.q_max * 0.99)


@pytest.mark.parametrize("clip", [fixedpoint.MIN_CLIP, fixedpoint.MAX_CLIP])
def test_the_extreme_clips_encode_and_decode(clip: float) -> None:
    encoding = Encoding(24, 1, 3, clip, 2**31, (clip,))
    delta = np.array([0, 2, -2], np.float32) * np.float32(clip)
    ring = encoding.encode(delta, 2**31, (-clip,), seeded("extreme"))
    decoded = encoding.decode_sum(ring)
    np.testing.assert_allclose(decoded.average / clip, [0, 1, -1], rtol=1e-6)
    assert decoded.metrics == pytest.approx((-clip,), rel=1e-6)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("at", [0, 40_000])
def test_values_that_are_not_finite_are_refused(value: float, at: int) -> None:
    encoding = Encoding(16, 4, 40_001, 1.0, 10, (1.0,))
    delta = np.zeros(40_001, np.float32)
    delta[at] = value
    with pytest.raises(LocalProtocolError, match="update must be finite"):
        encoding.encode(delta, 5, (0.0,), seeded(""))
    delta[at] = 0
    with pytest.raises(LocalProtocolError, match="metric"):
        encoding.encode(delta, 5, (value,), seeded(""))


@pytest.mark.parametrize(
    ("shape", "weight", "metrics"),
    [
        ((3,), 1, (0.0,)),
        ((5,), 1, (0.0,)),
        ((4, 1), 1, (0.0,)),
        ((2, 2), 1, (0.0,)),
        ((4,), 0, (0.0,)),
        ((4,), -1, (0.0,)),
        ((4,), 1, ()),
        ((4,), 1, (0.0, 0.0)),
    ],
)
def test_updates_that_do_not_fit(
    shape: tuple[int, ...], weight: int, metrics: tuple[float, ...]
) -> None:
    encoding = Encoding(16, 4, 4, 1.0, 10, (1.0,))
    with pytest.raises(LocalProtocolError):
        encoding.encode(np.zeros(shape, np.float32), weight, metrics, seeded(""))


# --- sums ---------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    value_bits=st.integers(4, 24),
    n=st.integers(1, 128),
    n_params=st.integers(1, 40),
    clip=st.floats(1e-3, 1e3),
    w_max=st.integers(1, 1000),
    seed=st.integers(0, 2**32),
)
def test_a_decoded_sum_is_the_plain_sum_and_near_the_true_average(
    value_bits: int, n: int, n_params: int, clip: float, w_max: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    encoding = Encoding(value_bits, n, n_params, clip, w_max, (4.0, 0.5))
    deltas = rng.normal(0, clip / 2, (n, n_params)).astype(np.float32)
    weights = rng.integers(1, 2 * w_max + 1, n).tolist()
    metrics = rng.normal(0, 2, (n, 2))
    total = np.zeros(encoding.n_coordinates, encoding.lane)
    plain = np.zeros(encoding.n_coordinates, np.int64)
    for i in range(n):
        ring = encoding.encode(deltas[i], weights[i], metrics[i].tolist(), seeded(f"{seed} {i}"))
        total += ring
        plain += to_signed(ring, encoding.lane_bits)
    # On the wire only b bits are left of it, and they are enough.
    total = unpack(pack(total, encoding.bits), total.size, encoding.bits, encoding.lane)
    np.testing.assert_array_equal(to_signed(total, encoding.bits), plain)

    # |sum of n rounding errors| < n; the weight's own is at most n / 2.
    share = np.minimum(weights, w_max) / w_max
    if (weight := int(plain[n_params])) <= 0:
        with pytest.raises(MalformedError, match="weights"):
            encoding.decode_sum(total)
        return
    decoded = encoding.decode_sum(total)
    for got, values, bound in (
        (decoded.average, deltas.astype(np.float64), clip),
        (np.array(decoded.metrics), metrics, np.array([4.0, 0.5])),
    ):
        true = share @ np.clip(values, -bound, bound) / share.sum()
        assert np.all(np.abs(got - true) <= bound * (1.5 * n / weight + 1e-6))
    assert decoded.average.dtype == np.float32
    error = n / 2 * w_max / encoding.q_max
    assert decoded.examples == pytest.approx(np.minimum(weights, w_max).sum(), abs=error + 1e-6)


def test_the_average_is_weighted_by_examples() -> None:
    encoding = Encoding(16, 2, 1, 1.0, 1000, (10.0,))
    total = encoding.encode(np.array([0.5], np.float32), 750, (4.0,), seeded("a"))
    total = total + encoding.encode(np.array([-0.5], np.float32), 250, (8.0,), seeded("b"))
    decoded = encoding.decode_sum(total)
    assert decoded.average == pytest.approx([0.25], abs=1e-4)
    assert decoded.metrics == pytest.approx((5.0,), abs=1e-3)
    assert decoded.examples == pytest.approx(1000, abs=0.1)


@pytest.mark.parametrize("weight", [0, -1])
def test_no_average_without_weight(weight: int) -> None:
    encoding = Encoding(16, 2, 1, 1.0, 1000)
    ring: Ring = np.array([5, weight], np.int64).astype(encoding.lane)
    with pytest.raises(MalformedError, match="weights"):
        encoding.decode_sum(ring)


def test_a_sum_of_another_length_is_not_decoded() -> None:
    encoding = Encoding(16, 2, 3, 1.0, 1000)
    with pytest.raises(LocalProtocolError, match="shape"):
        encoding.decode_sum(np.ones(5, encoding.lane))


def test_high_bits_above_b_do_not_count() -> None:
    encoding = Encoding(16, 2, 1, 1.0, 1000)
    clean = np.array([7, 9], encoding.lane)
    dirty = clean | np.array([0xFFFE0000, 0xABCE0000], encoding.lane)
    one, other = encoding.decode_sum(np.asarray(dirty, encoding.lane)), encoding.decode_sum(clean)
    assert (one.average.tolist(), one.examples) == (other.average.tolist(), other.examples)
