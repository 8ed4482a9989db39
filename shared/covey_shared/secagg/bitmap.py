"""Sets of cohort indices <-> bitmaps: one bit per check-in, lowest bit first, zero padding."""

from collections.abc import Iterable

from covey_shared.errors import LocalProtocolError, MalformedError


def to_bitmap(indices: Iterable[int], n: int) -> bytes:
    """Set of indices below n -> ceil(n / 8) bytes."""
    bits = 0
    for i in indices:
        if not 0 <= i < n:
            raise LocalProtocolError(f"index {i} in a cohort of {n}")
        bits |= 1 << i
    return bits.to_bytes((n + 7) // 8, "little")


def from_bitmap(data: bytes, n: int) -> frozenset[int]:
    """Undo `to_bitmap`. Raises MalformedError for a wrong length or bits beyond n."""
    bits = int.from_bytes(data, "little")
    if len(data) != (n + 7) // 8 or bits >> n:
        raise MalformedError(f"a bitmap of {len(data)} bytes does not fit a cohort of {n}")
    return frozenset(i for i in range(n) if bits >> i & 1)
