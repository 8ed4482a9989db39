"""Keys: Ed25519 signatures, X25519 agreement, HKDF, HPKE boxes, and the domain-separation labels.

The only user of pycryptodome's asymmetric half. Every label stands in this file, so that no two
uses of a key or a hash can collide. Secrets are 16 bytes where they are shared among the committee
(the field of `sharing` is GF(2^128)) and are stretched with HKDF before use.

Sources: RFC 8032 (Ed25519), RFC 7748 (X25519), RFC 5869 (HKDF), RFC 9180 (HPKE).
"""

import hashlib
from collections.abc import Callable
from typing import NewType

from Crypto.Hash import SHA256
from Crypto.Protocol import HPKE
from Crypto.Protocol.DH import import_x25519_private_key, import_x25519_public_key, key_agreement
from Crypto.Protocol.KDF import HKDF
from Crypto.PublicKey import ECC
from Crypto.Signature import eddsa

from covey_shared.errors import LocalProtocolError, RefusedError, SignatureError

# Version 1 of the protocol. It opens every signed text, every hash and every box's info, so that
# bytes of one version mean nothing to another.
DOMAIN = b"covey/1 "

SEED_BYTES = 16
PUBLIC_KEY_BYTES = 32
SIGNATURE_BYTES = 64
FINGERPRINT_DIGITS = 32
"""128 bits of a public key, in hexadecimal: another key that reads the same is out of reach."""

BOX_OVERHEAD_BYTES = 32 + 16  # encapsulated X25519 key, Poly1305 tag

Rng = Callable[[int], bytes]
"""n -> n random bytes. `os.urandom` in the field, a seeded stream in tests."""

PublicKey = NewType("PublicKey", bytes)
Seed = NewType("Seed", bytes)


def uniform(rng: Rng) -> float:
    """A draw from [0, 1), uniform over the multiples of 2**-53: random() for a source of bytes."""
    return (int.from_bytes(rng(8), "big") >> 11) * 2.0**-53


def digest(label: str, *parts: bytes) -> bytes:
    """SHA-256 over the label and the length-prefixed parts: 32 bytes.

    The prefixes make the encoding injective: ("a", "bc") and ("ab", "c") differ.
    """
    state = hashlib.sha256(DOMAIN + label.encode() + b"\x00")
    for part in parts:
        state.update(len(part).to_bytes(8, "big"))
        state.update(part)
    return state.digest()


def hkdf(secret: bytes, *, salt: bytes, info: bytes, size: int = 32) -> bytes:
    """HKDF-SHA256 (RFC 5869) with the protocol's domain before `info`."""
    key = HKDF(secret, size, salt, SHA256, context=DOMAIN + info)
    assert isinstance(key, bytes)  # noqa: S101  (one key asked for, one given)
    return key


def in_groups(public: bytes) -> str:
    """A public key for people to compare: its first digits in groups of four."""
    digits = public.hex()[:FINGERPRINT_DIGITS]
    return " ".join(digits[i : i + 4] for i in range(0, len(digits), 4))


class SigningKey:
    """An Ed25519 private key: a device's identity, the coordinator's key or the fleet CA."""

    __slots__ = ("_key", "_seed", "public")

    def __init__(self, seed: bytes) -> None:
        """seed: 32 bytes from the operating system's generator (RFC 8032, section 5.1.5)."""
        if len(seed) != 32:
            raise LocalProtocolError(f"an Ed25519 seed has 32 bytes, not {len(seed)}")
        self._seed = seed
        self._key = ECC.construct(curve="Ed25519", seed=seed)
        self.public = PublicKey(self._key.public_key().export_key(format="raw"))

    @property
    def seed(self) -> bytes:
        """The secret itself, for the key store alone."""
        return self._seed

    def sign(self, label: str, body: bytes) -> bytes:
        """64 bytes: Ed25519 over domain, label, a zero byte and the body."""
        return bytes(eddsa.new(self._key, "rfc8032").sign(_signed_text(label, body)))

    def __repr__(self) -> str:
        return f"SigningKey(public={self.public.hex()[:16]})"


def _signed_text(label: str, body: bytes) -> bytes:
    return DOMAIN + label.encode() + b"\x00" + body


# All points of order 1, 2, 4 and 8, in their only accepted encodings (the library refuses the
# non-canonical ones). Under such a key S = 0 with R = the identity verifies for *every* text,
# because RFC 8032 verification multiplies by the cofactor 8.
_SMALL_ORDER = frozenset(
    bytes.fromhex(point)
    for point in (
        "01" + "00" * 31,
        "ec" + "ff" * 30 + "7f",
        "00" * 32,
        "00" * 31 + "80",
        "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a",
        "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac03fa",
        "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05",
        "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc85",
    )
)


def verify(public: bytes, label: str, body: bytes, signature: bytes, *, signer: str) -> None:
    """Raise SignatureError unless `signature` is `public`'s over label and body.

    signer: who is claimed to have signed, for the message.
    """
    if public in _SMALL_ORDER:
        raise SignatureError(f"the key of {signer} has small order: its signatures prove nothing")
    try:
        key = eddsa.import_public_key(public)
        eddsa.new(key, "rfc8032").verify(_signed_text(label, body), signature)
    except ValueError as error:
        raise SignatureError(f"{label} is not signed by {signer}") from error


class AgreementKey:
    """An X25519 private key, made anew for each round."""

    __slots__ = ("_key", "public")

    def __init__(self, secret: bytes) -> None:
        """secret: 32 uniform bytes; clamped as RFC 7748 section 5 says."""
        if len(secret) != 32:
            raise LocalProtocolError(f"an X25519 private key has 32 bytes, not {len(secret)}")
        self._key = import_x25519_private_key(secret)
        self.public = PublicKey(self._key.public_key().export_key(format="raw"))

    def agree(self, peer: bytes, *, salt: bytes, info: bytes) -> bytes:
        """32 bytes shared with the holder of `peer`: HKDF(X25519(self, peer), salt, info).

        Raises RefusedError for a key of low order, whose result everybody knows (RFC 7748,
        section 6.1).
        """
        shared: bytes = key_agreement(
            static_priv=self._key, static_pub=_import_x25519(peer), kdf=bytes
        )
        if not any(shared):
            raise RefusedError("X25519 public key of low order")
        return hkdf(shared, salt=salt, info=info)

    def seal(self, receiver: bytes, *, info: bytes, plaintext: bytes) -> bytes:
        """An HPKE box to `receiver` that also proves it came from this key.

        Mode Auth (RFC 9180, section 5.1.3), X25519 / HKDF-SHA256 / ChaCha20-Poly1305. Auth rather
        than Base, because the relay is hostile: without it anybody could put shares of their own
        into a box in a device's name.
        """
        cipher = HPKE.new(
            receiver_key=_import_x25519(receiver),
            sender_key=self._key,
            info=DOMAIN + info,
            aead_id=HPKE.AEAD.CHACHA20_POLY1305,
        )
        return bytes(cipher.enc + cipher.seal(plaintext))

    def open(self, box: bytes, *, sender: bytes, info: bytes) -> bytes:
        """Undo `seal`. Raises RefusedError if the box is not `sender`'s to us under `info`."""
        if len(box) < BOX_OVERHEAD_BYTES:
            raise RefusedError("a sealed box is too short")
        try:
            cipher = HPKE.new(
                receiver_key=self._key,
                enc=box[:32],
                sender_key=_import_x25519(sender),
                info=DOMAIN + info,
                aead_id=HPKE.AEAD.CHACHA20_POLY1305,
            )
            return bytes(cipher.unseal(box[32:]))
        except ValueError as error:
            raise RefusedError(
                "a sealed box does not open: forged, damaged or misdirected"
            ) from error

    def __repr__(self) -> str:
        return f"AgreementKey(public={self.public.hex()[:16]})"


def _import_x25519(public: bytes) -> ECC.EccKey:
    try:
        return import_x25519_public_key(public)
    except ValueError as error:
        raise RefusedError("not an X25519 public key, or one of low order") from error


def check_agreement_key(public: bytes, *, owner: str) -> None:
    """Raise RefusedError unless `public` is an X25519 key that is safe to agree with.

    Not of low order, and in its one canonical form: RFC 7748 accepts several spellings of a key, and
    a second one would pass for another key wherever keys are compared. owner: for the message.
    """
    try:
        canonical = _import_x25519(public).export_key(format="raw") == public
    except RefusedError as error:
        raise RefusedError(f"{owner}: {error}") from error
    if not canonical:
        raise RefusedError(f"{owner}: an X25519 public key that is not in canonical form")


def mask_key(seed: bytes) -> AgreementKey:
    """The key that pair masks come from. seed: the 16 bytes `s` that the committee shares."""
    return AgreementKey(hkdf(seed, salt=b"", info=b"mask"))


def seal_key(seed: bytes) -> AgreementKey:
    """The key that boxes are sealed to and from. seed: the 16 bytes `c`, never shared."""
    return AgreementKey(hkdf(seed, salt=b"", info=b"seal"))


def self_mask_commitment(seed: bytes) -> bytes:
    """H(b): binds a device to its self-mask seed before anybody holds a share of it.

    Hiding, because the seed has 128 bits of entropy.
    """
    return digest("self-mask commitment", seed)
