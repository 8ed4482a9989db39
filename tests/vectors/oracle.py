"""A second implementation of what covey takes from a library: slow, plain, from the RFCs alone.

X25519 (RFC 7748, section 5), HKDF-SHA256 (RFC 5869) and HPKE in mode Auth (RFC 9180, sections 4 and
5) on integers and the standard library. For tests only: nothing here is constant-time.
"""

import hmac

from Crypto.Cipher import ChaCha20_Poly1305

_P = 2**255 - 19
_KEM = b"KEM" + bytes.fromhex("0020")  # DHKEM(X25519, HKDF-SHA256)
_SUITE = b"HPKE" + bytes.fromhex("002000010003")  # that KEM, HKDF-SHA256, ChaCha20-Poly1305
_MODE_AUTH = b"\x02"


def x25519(scalar: bytes, u: bytes) -> bytes:
    """The Montgomery ladder of RFC 7748, section 5."""
    k = int.from_bytes(scalar, "little") & ~7 & ((1 << 254) - 1) | (1 << 254)
    x1 = (int.from_bytes(u, "little") & ((1 << 255) - 1)) % _P
    x2, z2, x3, z3 = 1, 0, x1, 1
    for t in range(254, -1, -1):
        bit = k >> t & 1
        if bit:
            x2, z2, x3, z3 = x3, z3, x2, z2
        a, b, c, d = x2 + z2, x2 - z2, x3 + z3, x3 - z3
        da, cb = d * a % _P, c * b % _P
        x3, z3 = (da + cb) ** 2 % _P, x1 * (da - cb) ** 2 % _P
        aa, bb = a * a % _P, b * b % _P
        x2, z2 = aa * bb % _P, (aa - bb) * (aa + 121665 * (aa - bb)) % _P
        if bit:
            x2, z2, x3, z3 = x3, z3, x2, z2
    return (x2 * pow(z2, _P - 2, _P) % _P).to_bytes(32, "little")


def x25519_public(scalar: bytes) -> bytes:
    """The public key of a private one."""
    return x25519(scalar, (9).to_bytes(32, "little"))


def extract(salt: bytes, secret: bytes) -> bytes:
    """HKDF-Extract. An empty salt is a block of zeros, which HMAC makes of it anyway."""
    return hmac.digest(salt, secret, "sha256")


def expand(key: bytes, info: bytes, size: int) -> bytes:
    """HKDF-Expand."""
    out = block = b""
    counter = 1
    while len(out) < size:
        block = hmac.digest(key, block + info + bytes([counter]), "sha256")
        out += block
        counter += 1
    return out[:size]


def hkdf(secret: bytes, salt: bytes, info: bytes, size: int) -> bytes:
    """HKDF-SHA256, both steps."""
    return expand(extract(salt, secret), info, size)


def _labeled_extract(suite: bytes, salt: bytes, label: bytes, secret: bytes) -> bytes:
    return extract(salt, b"HPKE-v1" + suite + label + secret)


def _labeled_expand(suite: bytes, key: bytes, label: bytes, info: bytes, size: int) -> bytes:
    return expand(key, size.to_bytes(2, "big") + b"HPKE-v1" + suite + label + info, size)


def hpke_shared_secret(ephemeral: bytes, receiver: bytes, sender: bytes) -> bytes:
    """AuthEncap (section 4.1) with the ephemeral private key given. receiver: a public key."""
    dh = x25519(ephemeral, receiver) + x25519(sender, receiver)
    context = x25519_public(ephemeral) + receiver + x25519_public(sender)
    prk = _labeled_extract(_KEM, b"", b"eae_prk", dh)
    return _labeled_expand(_KEM, prk, b"shared_secret", context, 32)


def hpke_key_and_nonce(shared_secret: bytes, info: bytes) -> tuple[bytes, bytes]:
    """KeySchedule (section 5.1) of mode Auth: the cipher's key and base nonce."""
    context = (
        _MODE_AUTH
        + _labeled_extract(_SUITE, b"", b"psk_id_hash", b"")
        + _labeled_extract(_SUITE, b"", b"info_hash", info)
    )
    secret = _labeled_extract(_SUITE, shared_secret, b"secret", b"")
    return (
        _labeled_expand(_SUITE, secret, b"key", context, 32),
        _labeled_expand(_SUITE, secret, b"base_nonce", context, 12),
    )


def hpke_seal(
    ephemeral: bytes,
    receiver: bytes,
    sender: bytes,
    info: bytes,
    plaintext: bytes,
    aad: bytes = b"",
) -> bytes:
    """The first message of a context, behind the encapsulated key: what `AgreementKey.seal` sends."""
    key, nonce = hpke_key_and_nonce(hpke_shared_secret(ephemeral, receiver, sender), info)
    cipher = ChaCha20_Poly1305.new(key=key, nonce=nonce)
    cipher.update(aad)
    ciphertext, tag = cipher.encrypt_and_digest(plaintext)
    return x25519_public(ephemeral) + bytes(ciphertext + tag)
