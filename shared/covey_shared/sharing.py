"""t-of-n Shamir shares over GF(2^128), one secret at a time and in batches.

Bit-compatible with pycryptodome's `Crypto.Protocol.SecretSharing.Shamir` (ssss=False), which the
tests use as their oracle. It is not used here for two reasons: its randomness cannot be handed in,
and combining the thousands of secrets of one round takes it minutes; here the Lagrange
coefficients are worked out once per set of share holders and all secrets are combined in one
vectorised pass.

A field element is 16 bytes, big-endian; bit i is the coefficient of x^i; the polynomial is
x^128 + x^7 + x^2 + x + 1. In arrays it is a pair of uint64 (high, low). The arithmetic on secrets
has no secret-dependent branches or table look-ups; the points and their coefficients are public.

Source: Shamir 1979, "How to share a secret".
"""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from covey_shared.errors import LocalProtocolError
from covey_shared.keys import SEED_BYTES, Rng

MAX_SHARES = 255
_REDUCTION = 0x87  # x^7 + x^2 + x + 1: what x^128 becomes
_MODULUS = (1 << 128) | _REDUCTION
_ONE = np.uint64(1)
_TOP = np.uint64(63)
_R = np.uint64(_REDUCTION)

Words = NDArray[np.uint64]


def _times_x(high: Words, low: Words) -> tuple[Words, Words]:
    """Multiply every element by x."""
    carry = high >> _TOP
    return (high << _ONE) | (low >> _TOP), (low << _ONE) ^ (carry * _R)


def _times_bits(high: Words, low: Words, bits: Sequence[Words]) -> tuple[Words, Words]:
    """Multiply elementwise by public factors; bits[i] is all ones where bit i of the factor is set."""
    sum_high, sum_low = np.zeros_like(high), np.zeros_like(low)
    for mask in bits:
        sum_high ^= high & mask
        sum_low ^= low & mask
        high, low = _times_x(high, low)
    return sum_high, sum_low


def _load(elements: bytes, count: int) -> tuple[Words, Words]:
    words = np.frombuffer(elements, dtype=">u8").astype(np.uint64).reshape(count, 2)
    return words[:, 0].copy(), words[:, 1].copy()


def _store(high: Words, low: Words) -> bytes:
    return np.stack([high, low], axis=-1).astype(">u8").tobytes()


def split(secret: bytes, threshold: int, n: int, rng: Rng) -> list[bytes]:
    """Share `secret` (16 bytes) among holders 1..n; any `threshold` of them recover it.

    Returns n shares of 16 bytes, holder x at index x - 1.
    Raises LocalProtocolError for impossible numbers.
    """
    if len(secret) != SEED_BYTES or not 1 <= threshold <= n <= MAX_SHARES:
        raise LocalProtocolError(f"cannot split {len(secret)} bytes {threshold} of {n}")
    points = np.arange(1, n + 1, dtype=np.uint64)
    bits = [-((points >> np.uint64(i)) & _ONE) for i in range(n.bit_length())]
    coefficients = rng(SEED_BYTES * (threshold - 1)) + secret
    coefficient_high, coefficient_low = _load(coefficients, threshold)
    high, low = np.zeros(n, np.uint64), np.zeros(n, np.uint64)
    for c_high, c_low in zip(coefficient_high, coefficient_low, strict=True):
        high, low = _times_bits(high, low, bits)  # Horner, at all points at once
        high ^= c_high
        low ^= c_low
    stored = _store(high, low)
    return [stored[i : i + SEED_BYTES] for i in range(0, len(stored), SEED_BYTES)]


def _multiply(a: int, b: int) -> int:
    """a * b in the field, for public values; quick when b is small."""
    result = 0
    while b:
        if b & 1:
            result ^= a
        b >>= 1
        a <<= 1
        if a >> 128:
            a ^= _MODULUS
    return result


def _inverse(a: int) -> int:
    """1 / a in the field, for public values: extended Euclid over GF(2)[x]."""
    r0, r1, s0, s1 = _MODULUS, a, 0, 1
    while r1 > 1:
        shift = r0.bit_length() - r1.bit_length()
        if shift < 0:
            r0, r1, s0, s1 = r1, r0, s1, s0
            continue
        r0 ^= r1 << shift
        s0 ^= s1 << shift
    return s1


def _coefficients(holders: Sequence[int], at: int) -> list[int]:
    """Lagrange coefficients: the polynomial's value at `at` from its values at `holders`."""
    result = []
    for x in holders:
        numerator = denominator = 1
        for other in holders:
            if other != x:
                numerator = _multiply(numerator, at ^ other)
                denominator = _multiply(denominator, x ^ other)
        result.append(_multiply(numerator, _inverse(denominator)))
    return result


def combine(shares: Mapping[int, Sequence[bytes]], *, at: int = 0) -> list[bytes]:
    """Recover many secrets that the same holders shared.

    shares: holder (1..255) -> one 16-byte share per secret, all of the same length; exactly
    `threshold` holders. at: the point to evaluate at: 0 gives the secrets, a holder's number the
    share that this holder ought to have. Wrong shares give wrong secrets, not an error: check the
    result against its commitment.
    """
    holders = sorted(shares)
    if not holders or holders[0] < 1 or holders[-1] > MAX_SHARES:
        raise LocalProtocolError(f"share holders must be numbered 1..{MAX_SHARES}")
    n_secrets = len(shares[holders[0]])
    if any(len(shares[x]) != n_secrets for x in holders):
        raise LocalProtocolError("every holder must bring one share for each secret")
    if any(len(share) != SEED_BYTES for x in holders for share in shares[x]):
        raise LocalProtocolError(f"a share has {SEED_BYTES} bytes")
    if not 0 <= at <= MAX_SHARES:
        raise LocalProtocolError(f"cannot evaluate at {at}; 0 to {MAX_SHARES}")
    flat = b"".join(share for x in holders for share in shares[x])
    high, low = _load(flat, len(holders) * n_secrets)
    factors = _coefficients(holders, at)
    bits = [
        np.repeat(np.array([-(f >> i & 1) for f in factors], np.int64).astype(np.uint64), n_secrets)
        for i in range(128)
    ]
    high, low = _times_bits(high, low, bits)
    shape = (len(holders), n_secrets)
    stored = _store(
        np.bitwise_xor.reduce(high.reshape(shape), axis=0),
        np.bitwise_xor.reduce(low.reshape(shape), axis=0),
    )
    return [stored[i : i + SEED_BYTES] for i in range(0, len(stored), SEED_BYTES)]
