"""float32 <-> ring elements: clipping, stochastic rounding, the no-wrap bound, packing to b bits.

One update becomes ``n_params + 1 + n_metrics`` ring elements: the weighted difference, then the
weight itself, then the weighted metrics, so that neither example counts nor losses of one device are
ever seen in clear. With Q = 2^(value_bits - 1) - 1, clip C and weight w of at most w_max:

    q = stochastic_round(clip(x, -C, C) * Q / C * w / w_max)      |q| <= Q
    b = value_bits + ceil(log2 n), and Q * n < 2^(b - 1): a sum of n such values never wraps
    average = C * sum(q) / sum(round(Q * w / w_max))

Weighting *before* quantising is what makes so few bits enough. Stochastic rounding is unbiased: the
error of one device's coordinate has mean zero and at most C / Q * w_max / w of spread.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from Crypto.Cipher import ChaCha20
from numpy.typing import NDArray

from covey_shared.errors import LocalProtocolError, MalformedError
from covey_shared.keys import Rng
from covey_shared.layout import Flat
from covey_shared.masking import Ring

MIN_VALUE_BITS = 4
MAX_VALUE_BITS = 24
# Q / C must stay a number: of a clip near zero it overflows, and 0 times that is NaN.
MIN_CLIP, MAX_CLIP = 1e-9, 1e9
_BLOCK = 32 * 1024  # float64 work arrays of 256 KiB: they stay in cache


def bits_needed(value_bits: int, n: int) -> int:
    """Ring width b for n summands of value_bits each (sign included)."""
    return value_bits + max(0, (n - 1).bit_length())


@dataclass(frozen=True, slots=True)
class Encoding:
    """How one round turns floats into ring elements; the same on every device.

    n: most summands. clip: bound of one coordinate of the difference. metric_clips: bound of each
    metric. w_max: the weight (number of examples) at which a device's voice stops growing.
    """

    value_bits: int
    n: int
    n_params: int
    clip: float
    w_max: int
    metric_clips: tuple[float, ...] = ()

    @property
    def q_max(self) -> int:
        """Q: the largest magnitude one device contributes to a coordinate."""
        return (1 << (self.value_bits - 1)) - 1

    @property
    def bits(self) -> int:
        """b: ring elements are integers mod 2^b."""
        return bits_needed(self.value_bits, self.n)

    @property
    def lane_bits(self) -> int:
        """16 or 32: the machine words that masking works in."""
        return 16 if self.bits <= 16 else 32

    @property
    def lane(self) -> np.dtype[np.unsignedinteger]:
        """The lane as a numpy type, little-endian like the keystream's bytes."""
        return np.dtype("<u2") if self.lane_bits == 16 else np.dtype("<u4")

    @property
    def n_coordinates(self) -> int:
        """Length of the encoded vector: parameters, weight, metrics."""
        return self.n_params + 1 + len(self.metric_clips)

    @property
    def payload_bytes(self) -> int:
        """Size of one packed masked update."""
        return packed_bytes(self.n_coordinates, self.bits)

    def problem(self) -> str | None:
        """Why this encoding cannot be used, or None. The no-wrap check of both sides."""
        if not MIN_VALUE_BITS <= self.value_bits <= MAX_VALUE_BITS:
            return f"value_bits is {self.value_bits}; {MIN_VALUE_BITS} to {MAX_VALUE_BITS}"
        if self.n < 1 or self.n_params < 1 or self.w_max < 1:
            return "n, n_params and w_max must be at least 1"
        if self.bits > 32:
            return f"{self.value_bits} value bits and {self.n} devices need {self.bits} bits; at most 32"
        if self.q_max * self.n >= 1 << (self.bits - 1):
            return (
                f"a sum of {self.n} values of {self.value_bits} bits can wrap at {self.bits} bits"
            )
        for clip in (self.clip, *self.metric_clips):
            if not MIN_CLIP <= clip <= MAX_CLIP:  # false for NaN, too
                return f"clip is {clip}; it must be between {MIN_CLIP:g} and {MAX_CLIP:g}"
        return None

    def encode(self, delta: Flat, weight: int, metrics: Sequence[float], rng: Rng) -> Ring:
        """One device's update -> ring elements, lane[n_coordinates], each below 2^lane_bits.

        delta: float32[n_params], finite. weight: examples trained on, >= 1; counts as at most
        w_max. metrics: one finite value each. rng: the operating system's generator: predictable
        rounding would leak low bits. Raises LocalProtocolError for a vector that does not fit.
        """
        if (problem := self.problem()) is not None:
            raise LocalProtocolError(problem)
        if delta.shape != (self.n_params,) or len(metrics) != len(self.metric_clips):
            raise LocalProtocolError(
                f"update has shape {delta.shape} and {len(metrics)} metrics, "
                f"expected ({self.n_params},) and {len(self.metric_clips)}"
            )
        if weight < 1:
            raise LocalProtocolError(
                f"weight is {weight}; an update stands for at least one example"
            )
        if not all(math.isfinite(m) for m in metrics):
            raise LocalProtocolError("a metric is not finite")
        share = min(weight, self.w_max) / self.w_max
        ring = np.empty(self.n_coordinates, self.lane)
        stream = ChaCha20.new(key=rng(32), nonce=bytes(12))
        _round_into(ring[: self.n_params], delta, self.clip, self.q_max, share, stream)
        # Python's round is exact here; both sides know nothing of each other's weight but this.
        ring[self.n_params] = round(self.q_max * share)
        for i, (value, clip) in enumerate(zip(metrics, self.metric_clips, strict=True)):
            at = self.n_params + 1 + i
            one = np.array([value], np.float64)
            _round_into(ring[at : at + 1], one, clip, self.q_max, share, stream)
        return ring

    def decode_sum(self, ring: Ring) -> "DecodedSum":
        """The sum of updates -> weighted averages.

        ring: lane[n_coordinates], of which the low b bits count. Raises MalformedError when the
        weights sum to nothing: then there is no average.
        """
        if ring.shape != (self.n_coordinates,):
            raise LocalProtocolError(
                f"sum has shape {ring.shape}, expected ({self.n_coordinates},)"
            )
        signed = to_signed(ring, self.bits)
        weight = int(signed[self.n_params])
        if weight <= 0:
            raise MalformedError(f"the weights sum to {weight}: no average can be taken")
        average = signed[: self.n_params].astype(np.float64)
        average *= self.clip / weight
        return DecodedSum(
            average=average.astype(np.float32),
            examples=weight * self.w_max / self.q_max,
            metrics=tuple(
                clip * int(value) / weight
                for clip, value in zip(self.metric_clips, signed[self.n_params + 1 :], strict=True)
            ),
        )


@dataclass(frozen=True, slots=True)
class DecodedSum:
    """What a completed round reveals. examples: their total, each device's capped at w_max."""

    average: Flat
    examples: float
    metrics: tuple[float, ...]


def _round_into(
    out: Ring,
    values: NDArray[np.floating],
    clip: float,
    q_max: int,
    share: float,
    stream: ChaCha20.ChaCha20Cipher,
) -> None:
    """Stochastically round clip(values) * q_max / clip * share into ring elements, block by block.

    In float64: in float32 the fraction of a 16-bit value keeps too few bits to stay unbiased.
    """
    scale = q_max / clip * share
    if not np.isfinite(values).all():
        raise LocalProtocolError("an update must be finite")
    signed = out.view(np.dtype(f"<i{out.dtype.itemsize}"))
    for start in range(0, values.size, _BLOCK):
        block = values[start : start + _BLOCK].astype(np.float64)
        np.clip(block, -clip, clip, out=block)
        block *= scale
        noise = np.frombuffer(stream.encrypt(bytes(4 * block.size)), "<u4")
        block += noise * 2.0**-32
        np.floor(block, out=block)
        # At +-clip the product may be off by a last bit, which the extreme noise then rounds to
        # q_max + 1: once in 2^32 coordinates, but the no-wrap bound rests on q_max.
        np.clip(block, -q_max, q_max, out=block)
        signed[start : start + block.size] = block


def to_signed(ring: Ring, bits: int) -> NDArray[np.int64]:
    """Ring elements mod 2^bits -> their representatives in [-2^(bits-1), 2^(bits-1)), int64."""
    half = np.int64(1) << np.int64(bits - 1)
    mask = (np.int64(1) << np.int64(bits)) - 1
    return ((ring.astype(np.int64) + half) & mask) - half


def packed_bytes(n: int, bits: int) -> int:
    """Size of n packed elements in bytes; the last byte is padded with zero bits."""
    return (n * bits + 7) // 8


# Packing: 64 elements of b bits fill exactly b words of 64 bits. Element j of a group starts at bit
# j*b of the group, little-endian. All groups are handled at once, one column of the group at a time.


def pack(ring: Ring, bits: int) -> bytes:
    """Keep the low `bits` bits of each element, back to back, little-endian bit order."""
    n = ring.size
    groups = -(-n // 64)
    padded = np.zeros(groups * 64, ring.dtype)
    padded[:n] = ring
    padded &= ring.dtype.type((1 << bits) - 1)
    columns = np.ascontiguousarray(padded.reshape(groups, 64).T)
    words = np.zeros((bits, groups), np.uint64)
    for j in range(64):
        word, shift = divmod(j * bits, 64)
        column = columns[j].astype(np.uint64)
        words[word] |= column << np.uint64(shift)
        if shift + bits > 64:
            words[word + 1] |= column >> np.uint64(64 - shift)
    return (
        np.ascontiguousarray(words.T).astype("<u8", copy=False).tobytes()[: packed_bytes(n, bits)]
    )


def unpack(
    payload: bytes | memoryview, n: int, bits: int, lane: np.dtype[np.unsignedinteger]
) -> Ring:
    """Undo `pack`. Raises MalformedError unless the length and the padding bits are exactly right."""
    size = packed_bytes(n, bits)
    if len(payload) != size:
        raise MalformedError(
            f"payload of {len(payload)} bytes; {n} elements of {bits} bits take {size}"
        )
    if (unused := size * 8 - n * bits) and payload[-1] >> (8 - unused):
        raise MalformedError("payload's padding bits are not zero")
    groups = -(-n // 64)
    padded = np.zeros(groups * bits * 8, np.uint8)
    padded[:size] = np.frombuffer(payload, np.uint8)
    words = np.ascontiguousarray(padded.view("<u8").reshape(groups, bits).T)
    mask = np.uint64((1 << bits) - 1)
    columns = np.empty((64, groups), lane)
    for j in range(64):
        word, shift = divmod(j * bits, 64)
        value = words[word] >> np.uint64(shift)
        if shift + bits > 64:
            value |= words[word + 1] << np.uint64(64 - shift)
        columns[j] = value & mask
    return np.ascontiguousarray(columns.T).reshape(-1)[:n]
