"""Masks: known answers, cancellation over whole cohorts, and what one masked update looks like."""

from itertools import combinations
from typing import Any
from unittest import mock

import numpy as np
import pytest
from Crypto.Cipher import ChaCha20
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from covey_shared import fixedpoint, keys, masking
from covey_shared.errors import LocalProtocolError, RefusedError
from covey_shared.fixedpoint import Encoding
from vectors import load, oracle, seeded

unhex = bytes.fromhex
CHACHA20, COVEY, X25519 = load("chacha20"), load("covey")["masking"], load("x25519")
H = bytes(range(32))
LANES: dict[int, np.dtype[np.unsignedinteger[Any]]] = {16: np.dtype("<u2"), 32: np.dtype("<u4")}
brief = settings(max_examples=60, deadline=None)


# --- the keystream ------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CHACHA20["blocks"], ids=lambda case: str(case["comment"]))
def test_chacha20_blocks_of_rfc_8439(case: dict[str, Any]) -> None:
    key, nonce, stream = (unhex(case[k]) for k in ("key", "nonce", "stream"))
    cipher = ChaCha20.new(key=key, nonce=nonce)
    cipher.seek(64 * case["counter"])
    assert cipher.encrypt(bytes(64)) == stream
    if not any(nonce):  # covey's own use: nonce 0, from block 0 on
        start = 64 * case["counter"]
        assert masking.keystream(key, start + 64)[start:] == stream
        vector = np.zeros((start + 64) // 4, "<u4")
        masking.add_masks(vector, [key], [])
        assert vector.tobytes()[start:] == stream


def test_chacha20_cipher_of_rfc_8439() -> None:
    case = CHACHA20["cipher"]
    cipher = ChaCha20.new(key=unhex(case["key"]), nonce=unhex(case["nonce"]))
    cipher.seek(64 * case["counter"])
    assert cipher.encrypt(unhex(case["plaintext"])).hex() == case["ciphertext"]


# --- keys of masks ------------------------------------------------------------------------------


def test_mask_keys_stay_what_they_are() -> None:
    case = COVEY["pair"]
    a, b = keys.mask_key(unhex(case["seed_a"])), keys.mask_key(unhex(case["seed_b"]))
    args = (unhex(case["h"]), case["a"], case["b"])
    assert masking.pair_mask_key(a, b.public, *args).hex() == case["key"]
    assert masking.pair_mask_key(b, a.public, *args).hex() == case["key"]
    # And as the definition has it, by a second implementation.
    scalars = [oracle.hkdf(unhex(case[s]), b"", b"covey/1 mask", 32) for s in ("seed_a", "seed_b")]
    shared = oracle.x25519(scalars[0], oracle.x25519_public(scalars[1]))
    info = b"covey/1 pair\x00" + case["a"].encode() + b"\x00" + case["b"].encode()
    assert oracle.hkdf(shared, unhex(case["h"]), info, 32).hex() == case["key"]

    case = COVEY["self"]
    seed, h = unhex(case["seed"]), unhex(case["h"])
    assert masking.self_mask_key(seed, h, case["device"]).hex() == case["key"]
    info = b"covey/1 self\x00" + case["device"].encode()
    assert oracle.hkdf(seed, h, info, 32).hex() == case["key"]


def test_a_pair_key_is_the_pairs_and_the_rounds() -> None:
    a, b, c = (keys.mask_key(bytes([i]) * 16) for i in range(3))
    base = masking.pair_mask_key(a, b.public, H, "pi-a", "pi-b")
    assert base == masking.pair_mask_key(b, a.public, H, "pi-b", "pi-a")
    others = [
        masking.pair_mask_key(a, c.public, H, "pi-a", "pi-b"),
        masking.pair_mask_key(a, b.public, H, "pi-a", "pi-c"),
        masking.pair_mask_key(a, b.public, H, "pi", "a-pi-b"),
        masking.self_mask_key(bytes([0]) * 16, H, "pi-a"),
        masking.self_mask_key(bytes([0]) * 16, H, "pi-b"),
        masking.self_mask_key(bytes([1]) * 16, H, "pi-a"),
    ]
    for bit in range(256):  # a manifest that differs in any bit
        h = bytearray(H)
        h[bit // 8] ^= 1 << bit % 8
        others.append(masking.pair_mask_key(a, b.public, bytes(h), "pi-a", "pi-b"))
        others.append(masking.self_mask_key(bytes([0]) * 16, bytes(h), "pi-a"))
    assert len({base, *others}) == 1 + len(others)


@pytest.mark.parametrize("case", X25519["low_order"], ids=lambda case: str(case["comment"]))
def test_a_peer_of_low_order_gets_no_mask(case: dict[str, str]) -> None:
    with pytest.raises(RefusedError):
        masking.pair_mask_key(keys.mask_key(bytes(16)), unhex(case["u"]), H, "pi-a", "pi-b")


# --- adding masks -------------------------------------------------------------------------------


@pytest.mark.parametrize("case", COVEY["masked"], ids=lambda case: str(case["lane_bits"]))
def test_a_masked_vector_stays_what_it_is(case: dict[str, Any]) -> None:
    vector = np.array(case["vector"], LANES[case["lane_bits"]])
    masking.add_masks(vector, [unhex(k) for k in case["plus"]], [unhex(k) for k in case["minus"]])
    assert vector.tolist() == case["masked"]


def by_definition(
    vector: NDArray[Any], plus: list[bytes], minus: list[bytes]
) -> NDArray[np.unsignedinteger[Any]]:
    total = vector.copy()
    for key in plus:
        total += np.frombuffer(masking.keystream(key, total.nbytes), total.dtype)
    for key in minus:
        total -= np.frombuffer(masking.keystream(key, total.nbytes), total.dtype)
    return total


@pytest.mark.parametrize("lane_bits", LANES)
def test_blocks_join_without_a_seam(lane_bits: int) -> None:
    lane = LANES[lane_bits]
    per_block = masking.BLOCK_BYTES // lane.itemsize
    plus, minus = [seeded("p")(32), seeded("q")(32)], [seeded("m")(32)]
    for size in (0, 1, per_block - 1, per_block, per_block + 1, 2 * per_block + 7):
        vector = np.arange(size).astype(lane)
        masked = vector.copy()
        masking.add_masks(masked, plus, minus)
        np.testing.assert_array_equal(masked, by_definition(vector, plus, minus))
        masking.add_masks(masked, minus, plus)
        np.testing.assert_array_equal(masked, vector)


key_lists = st.lists(st.binary(min_size=32, max_size=32), max_size=4)


@brief
@given(st.sampled_from([16, 32]), st.integers(0, 200), key_lists, key_lists)
def test_add_masks_is_its_definition(
    lane_bits: int, size: int, plus: list[bytes], minus: list[bytes]
) -> None:
    vector = np.arange(size).astype(LANES[lane_bits]) * 40503
    masked = vector.copy()
    with mock.patch.object(masking, "BLOCK_BYTES", 96):  # several blocks of a ragged size
        masking.add_masks(masked, plus, minus)
    np.testing.assert_array_equal(masked, by_definition(vector, plus, minus))


def cohort_masks(n: int) -> list[tuple[list[bytes], list[bytes]]]:
    """plus and minus keys of devices 0..n-1, complete graph, no self-masks; real pair keys."""
    agreement = [keys.mask_key(bytes([7, i] * 8)) for i in range(n)]
    names = [f"pi-{i:03}" for i in range(n)]
    plus: list[list[bytes]] = [[] for _ in range(n)]
    minus: list[list[bytes]] = [[] for _ in range(n)]
    for i, j in combinations(range(n), 2):
        # Each side derives the key for itself.
        plus[i].append(
            masking.pair_mask_key(agreement[i], agreement[j].public, H, names[i], names[j])
        )
        minus[j].append(
            masking.pair_mask_key(agreement[j], agreement[i].public, H, names[j], names[i])
        )
    return list(zip(plus, minus, strict=True))


@settings(max_examples=40, deadline=None)
@given(n=st.integers(2, 7), bits=st.integers(1, 32), wide=st.booleans(), size=st.integers(1, 90))
def test_masks_cancel_in_any_cohort_in_both_lanes_at_any_width(
    n: int, bits: int, wide: bool, size: int
) -> None:
    lane = LANES[32 if wide or bits > 16 else 16]
    rng = np.random.default_rng([n, bits, size])
    plain = rng.integers(0, 2**bits, (n, size)).astype(lane)
    total = np.zeros(size, lane)
    for i, (plus, minus) in enumerate(cohort_masks(n)):
        own = masking.self_mask_key(bytes([i] * 16), H, f"pi-{i:03}")
        masked = plain[i].copy()
        masking.add_masks(masked, [own, *plus], minus)
        # Onto the wire at b bits and back: truncation is the reduction mod 2^b.
        received = fixedpoint.unpack(fixedpoint.pack(masked, bits), size, bits, lane)
        total += received
        masking.add_masks(total, [], [own])
    expected = plain.astype(np.uint64).sum(axis=0) % 2**bits
    np.testing.assert_array_equal(total & lane.type(2**bits - 1), expected)


@brief
@given(
    bits=st.integers(1, 32),
    wide=st.booleans(),
    values=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=80),
    plus=key_lists,
    minus=key_lists,
)
def test_truncating_commutes_with_masking(
    bits: int, wide: bool, values: list[int], plus: list[bytes], minus: list[bytes]
) -> None:
    lane = LANES[32 if wide or bits > 16 else 16]
    keep = lane.type(2**bits - 1)
    vector = np.array(values, np.uint64).astype(lane)
    whole, truncated = vector.copy(), vector & keep
    masking.add_masks(whole, plus, minus)
    masking.add_masks(truncated, plus, minus)
    assert fixedpoint.pack(whole, bits) == fixedpoint.pack(truncated, bits)


@pytest.mark.parametrize(
    "vector",
    [
        np.zeros(4, np.float32),
        np.zeros(4, "<i4"),
        np.zeros(4, "<u8"),
        np.zeros(4, "u1"),
        np.zeros(4, ">u4"),
        np.zeros(8, "<u4")[::2],
    ],
    ids=["float32", "int32", "uint64", "uint8", "big-endian", "strided"],
)
def test_other_vectors_are_refused_untouched(vector: NDArray[Any]) -> None:
    with pytest.raises(LocalProtocolError, match="lanes"):
        masking.add_masks(vector, [bytes(32)], [])
    assert not vector.any()


# --- what an eavesdropper sees ------------------------------------------------------------------

# Chi-square of 256 cells, 255 degrees of freedom: exceeded by chance once in 10^6. The seeds are
# fixed, so the tests below either always pass or always fail.
CHI_SQUARE_LIMIT = 377.0


def chi_square(cells: NDArray[np.uint8]) -> float:
    """Pearson's statistic of bytes against the uniform distribution."""
    counts = np.bincount(cells, minlength=256)
    expected = cells.size / 256
    return float(((counts - expected) ** 2).sum() / expected)


def views(payload: bytes, n: int, bits: int) -> dict[str, NDArray[np.uint8]]:
    """The same update as the wire's bytes, and as the low and the high bits of its elements."""
    elements = fixedpoint.unpack(payload, n, bits, LANES[16 if bits <= 16 else 32])
    return {
        "wire bytes": np.frombuffer(payload, np.uint8)[:-1],  # the last may have padding
        "low bits": (elements & 255).astype(np.uint8),
        "high bits": (elements >> (bits - 8)).astype(np.uint8),
        "steps": (np.diff(elements) >> (bits - 8) & 255).astype(np.uint8),
    }


def updates(n_params: int, value_bits: int, n: int) -> tuple[Encoding, Any]:
    encoding = Encoding(value_bits, n, n_params, 1.0, 100, (5.0,))
    delta = np.random.default_rng(5).normal(0, 0.05, n_params).astype(np.float32)
    return encoding, encoding.encode(delta, 60, (1.0,), seeded("rounding"))


@pytest.mark.parametrize(("value_bits", "n"), [(16, 100), (12, 16)], ids=["uint32", "uint16"])
@pytest.mark.parametrize("peers", [0, 1, 5])
def test_one_masked_update_is_uniform(value_bits: int, n: int, peers: int) -> None:
    encoding, ring = updates(60_000, value_bits, n)
    own = masking.self_mask_key(seeded("b")(16), H, "pi-a")
    pairs = [seeded(f"pair {i}")(32) for i in range(peers)]
    masking.add_masks(ring, [own, *pairs[::2]], pairs[1::2])
    payload = fixedpoint.pack(ring, encoding.bits)
    for name, cells in views(payload, ring.size, encoding.bits).items():
        assert chi_square(cells) < CHI_SQUARE_LIMIT, name


@pytest.mark.parametrize(("value_bits", "n"), [(16, 100), (12, 16)], ids=["uint32", "uint16"])
def test_the_same_update_unmasked_is_not(value_bits: int, n: int) -> None:
    encoding, ring = updates(60_000, value_bits, n)
    payload = fixedpoint.pack(ring, encoding.bits)
    seen = {k: chi_square(v) for k, v in views(payload, ring.size, encoding.bits).items()}
    assert seen["wire bytes"] > 10 * CHI_SQUARE_LIMIT
    assert seen["high bits"] > 1000 * CHI_SQUARE_LIMIT
    assert seen["steps"] > 1000 * CHI_SQUARE_LIMIT


def test_two_updates_under_one_mask_are_not_uniform_in_their_difference() -> None:
    """Why every round has fresh keys: the reused mask drops out of a subtraction."""
    encoding, first = updates(60_000, 16, 100)
    second = encoding.encode(
        np.random.default_rng(6).normal(0, 0.05, 60_000).astype(np.float32),
        60,
        (1.0,),
        seeded("other rounding"),
    )
    own = masking.self_mask_key(seeded("b")(16), H, "pi-a")
    for ring in (first, second):
        masking.add_masks(ring, [own], [])
    payload = fixedpoint.pack(first - second, encoding.bits)
    seen = views(payload, first.size, encoding.bits)
    assert chi_square(seen["high bits"]) > 1000 * CHI_SQUARE_LIMIT
