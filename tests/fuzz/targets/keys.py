"""The primitives on bytes of strangers: signatures, key agreement, boxes, bitmaps and packed updates."""

import contextlib
import hashlib
import random
from collections.abc import Iterator

import numpy as np

from covey_shared import keys, sharing
from covey_shared.errors import RemoteProtocolError
from covey_shared.fixedpoint import pack, unpack
from covey_shared.secagg.bitmap import from_bitmap, to_bitmap
from fuzz.harness import Mutate, Run, Target, expect, refused
from fuzz.recorded import Stream, crypto

_ME = keys.seal_key(bytes(range(16)))
_SIGNER = keys.SigningKey(bytes(range(32)))


def _verify(data: bytes) -> None:
    keys.verify(data[:32], "check-in", data[96:], data[32:96], signer="a stranger")


def _agree(data: bytes) -> None:
    refused(RemoteProtocolError, lambda: keys.check_agreement_key(data, owner="a stranger"))
    expect(len(_ME.agree(data, salt=b"h", info=b"pair")) == 32, "32 bytes agreed")


def _open(data: bytes) -> None:
    _ME.open(data[32:], sender=data[:32], info=b"shares")


def _seal(data: bytes) -> None:
    _ME.seal(data, info=b"reveal", plaintext=bytes(16))


def _bitmap(data: bytes) -> None:
    n = data[0] % 129 if data else 0
    found = from_bitmap(data[1:], n)
    expect(all(0 <= i < n for i in found), "bits of the cohort only")
    expect(to_bitmap(found, n) == data[1:], "one bitmap for a set")


def _unpack(data: bytes) -> None:
    if len(data) < 3:
        return
    bits, n, packed = data[0] % 32 + 1, int.from_bytes(data[1:3], "big") % 2000 + 1, data[3:]
    lane = np.dtype(np.uint16 if bits <= 16 and data[0] & 64 else np.uint32)
    ring = unpack(packed, n, bits, lane)
    expect(len(ring) == n and pack(ring, bits) == packed, "one packed form for a vector")


def _combine(data: bytes) -> None:
    """Shares that a member revealed: 16 bytes each, of whatever value."""
    shares = {at + 1: [data[16 * at : 16 * at + 16]] for at in range(len(data) // 16)}
    if shares:
        (secret,) = sharing.combine(dict(list(shares.items())[:8]))
        expect(len(secret) == 16, "16 bytes combined")


_READERS = (_verify, _agree, _open, _seal, _bitmap, _unpack, _combine)


def _read(data: bytes) -> list[str]:
    if not data:
        return []
    reader = _READERS[data[0] % len(_READERS)]
    try:
        reader(data[1:])
    except RemoteProtocolError as error:
        return [f"{reader.__name__} {error}"]
    return [f"{reader.__name__} went well"]


@contextlib.contextmanager
def ready() -> Iterator[Run]:
    """pycryptodome itself, as in the field."""
    yield _read


def _mutate(data: bytes, longest: int, chance: random.Random, mutate: Mutate) -> bytes:
    made = bytearray(mutate(data, longest))
    if len(made) > 40 and chance.random() < 0.3:  # bytes that mean something on the curves
        at = chance.choice((1, 33))
        made[at : at + 32] = chance.choice(_POINTS)
    return bytes(made)


_POINTS = (
    *keys._SMALL_ORDER,
    (2**255 - 19).to_bytes(32, "little"),
    (2**255 - 20).to_bytes(32, "little"),
    (2**255 - 18).to_bytes(32, "little"),
    bytes(31) + b"\x80",
    b"\xff" * 32,
    _ME.public,
    _SIGNER.public,
)


def _seeds() -> Iterator[bytes]:
    rng = Stream("keys")
    text = b"a check-in"
    yield bytes((0,)) + _SIGNER.public + _SIGNER.sign("check-in", text) + text
    for point in sorted(_POINTS):
        yield bytes((0,)) + point + bytes(64) + text
        yield bytes((1,)) + point
        yield bytes((3,)) + point
    other = keys.seal_key(rng(16))
    yield bytes((2,)) + other.public + bytes(80)
    with crypto():  # whose boxes are the same in every process
        sender = keys.seal_key(bytes(16))
        box = sender.seal(_ME.public, info=b"shares", plaintext=bytes(32))
        yield bytes((2,)) + sender.public + box
    yield bytes((4, 9)) + to_bitmap({0, 3, 8}, 9)
    ring = np.arange(9, dtype=np.uint32)
    yield bytes((5, 19, 0, 8)) + pack(ring, 20)
    shares = sharing.split(hashlib.sha256(text).digest()[:16], 3, 5, rng)
    yield bytes((6,)) + b"".join(shares[:3])


TARGET = Target(
    "keys",
    ready,
    memory=lambda n: 256 * 1024 + 64 * n,
    seeds=_seeds,
    mutate=_mutate,
    words=tuple(_POINTS),
    longest=1024,
)
