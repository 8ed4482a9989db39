"""Masks: seeds -> keystream, added to or subtracted from a vector of ring elements.

Masking happens in whole lanes (uint16 or uint32) with free wrap-around. Reduction mod 2^b is a ring
homomorphism from Z_2^16 and Z_2^32, so truncating to b bits afterwards (`fixedpoint.pack`) gives the
same as masking mod 2^b, and no reduction is needed on the way.

The stream is ChaCha20 (RFC 8439) under a key that is used for this one stream only, so its nonce is
fixed at zero: what would break is the same key for two streams, and keys bind the round's digest.
"""

from collections.abc import Sequence
from typing import Any, NewType

import numpy as np
from Crypto.Cipher import ChaCha20
from numpy.typing import NDArray

from covey_shared.errors import LocalProtocolError
from covey_shared.keys import AgreementKey, hkdf

Ring = NDArray[np.unsignedinteger[Any]]
"""Ring elements: little-endian uint16 or uint32 lanes, of which the low b bits count."""

MaskKey = NewType("MaskKey", bytes)

# 256 KiB: the block of the vector and the block of keystream stay in the second-level cache of both
# a Pi and a desktop while all peers' streams pass over them.
BLOCK_BYTES = 256 * 1024
_ZEROS = bytes(BLOCK_BYTES)
_NONCE = bytes(12)


def keystream(key: bytes, n_bytes: int) -> bytes:
    """The first n_bytes of the ChaCha20 stream under `key`. Slow path: for tests and small needs."""
    return bytes(ChaCha20.new(key=key, nonce=_NONCE).encrypt(bytes(n_bytes)))


def add_masks(vector: Ring, plus: Sequence[bytes], minus: Sequence[bytes]) -> None:
    """Add the keystreams of `plus` to `vector` and subtract those of `minus`, in place.

    vector: uint16[m] or uint32[m], C-contiguous. plus, minus: 32-byte keys.
    Block by block, so that no temporary of the vector's size exists.
    """
    if vector.dtype not in (np.dtype("<u2"), np.dtype("<u4")) or not vector.flags.c_contiguous:
        raise LocalProtocolError(
            f"masks need contiguous uint16 or uint32 lanes, not {vector.dtype}"
        )
    added = [ChaCha20.new(key=key, nonce=_NONCE) for key in plus]
    subtracted = [ChaCha20.new(key=key, nonce=_NONCE) for key in minus]
    lanes_per_block = BLOCK_BYTES // vector.dtype.itemsize
    stream = np.empty(lanes_per_block, vector.dtype)
    for start in range(0, vector.size, lanes_per_block):
        block = vector[start : start + lanes_per_block]
        part = stream[: block.size]
        zeros = memoryview(_ZEROS)[: part.nbytes]
        out = part.data.cast("B")
        for cipher in added:
            cipher.encrypt(zeros, output=out)
            np.add(block, part, out=block)
        for cipher in subtracted:
            cipher.encrypt(zeros, output=out)
            np.subtract(block, part, out=block)


def pair_mask_key(mine: AgreementKey, theirs: bytes, h: bytes, a: str, b: str) -> MaskKey:
    """The key that devices a and b share in the round whose manifest digest is h.

    Symmetric in a and b. Raises RefusedError for a public key of low order.
    Source: Bonawitz et al. 2017, section 4 (pairwise masking), with h as the salt, so that a
    manifest that differs in any bit gives masks that cancel with nobody's.
    """
    low, high = sorted((a, b))
    return MaskKey(
        mine.agree(theirs, salt=h, info=b"pair\x00" + low.encode() + b"\x00" + high.encode())
    )


def self_mask_key(seed: bytes, h: bytes, device: str) -> MaskKey:
    """The key of a device's own mask, from its seed b (Bonawitz et al. 2017, double masking)."""
    return MaskKey(hkdf(seed, salt=h, info=b"self\x00" + device.encode()))
