"""The protocol's primitives by OpenSSL in the place of pycryptodome: the same bytes, several times sooner.

Signatures, agreement, boxes and key derivation are what a simulated round spends its time on. Nothing is
left out: what is computed is the same, and a test holds the two to each other. A signature that was
verified once is not verified again, nor an agreement or a secret computed twice, which pure functions allow.
Boxes take the key that they are sealed under from `ephemeral`, so that a seed gives the same bytes again.
"""

import contextlib
import functools
import hmac
from collections.abc import Callable, Iterator, Mapping, Sequence
from unittest import mock

from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from covey_coordinator import round as coordinator_round
from covey_shared import keys, masking, sharing, transcript_checks
from covey_shared.errors import LocalProtocolError, RefusedError, SignatureError

_KEM = b"KEM" + (0x0020).to_bytes(2, "big")
_HPKE = b"HPKE" + b"".join(n.to_bytes(2, "big") for n in (0x0020, 0x0001, 0x0003))
_AUTH = b"\x02"
_NONCE_BYTES = 12


def _hmac(key: bytes, text: bytes) -> bytes:
    return hmac.digest(key, text, "sha256")


def hkdf(secret: bytes, *, salt: bytes, info: bytes, size: int = 32) -> bytes:
    """`keys.hkdf`."""
    prk, out, block = _hmac(salt or bytes(32), secret), b"", b""
    while len(out) < size:
        block = _hmac(prk, block + keys.DOMAIN + info + bytes((len(out) // 32 + 1,)))
        out += block
    return out[:size]


def _text(label: str, body: bytes) -> bytes:
    return keys.DOMAIN + label.encode() + b"\x00" + body


class SigningKey(keys.SigningKey):
    """`keys.SigningKey`."""

    __slots__ = ()

    def __init__(self, seed: bytes) -> None:
        if len(seed) != 32:
            raise LocalProtocolError(f"an Ed25519 seed has 32 bytes, not {len(seed)}")
        self._seed = seed
        self._key = Ed25519PrivateKey.from_private_bytes(seed)
        self.public = keys.PublicKey(self._key.public_key().public_bytes_raw())

    def sign(self, label: str, body: bytes) -> bytes:
        """64 bytes."""
        return bytes(self._key.sign(_text(label, body)))


@functools.lru_cache(maxsize=4096)
def _verified(public: bytes, text: bytes, signature: bytes) -> bool:
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, text)
    except (InvalidSignature, ValueError):
        return False
    return True


def verify(public: bytes, label: str, body: bytes, signature: bytes, *, signer: str) -> None:
    """`keys.verify`, for keys that were honestly made."""
    if not _verified(public, _text(label, body), signature):
        raise SignatureError(f"{label} is not signed by {signer}")


def _extract(suite: bytes, salt: bytes, label: bytes, secret: bytes) -> bytes:
    return _hmac(salt or bytes(32), b"HPKE-v1" + suite + label + secret)


def _expand(suite: bytes, key: bytes, label: bytes, info: bytes, size: int) -> bytes:
    prefix = size.to_bytes(2, "big") + b"HPKE-v1"
    return _hmac(key, prefix + suite + label + info + b"\x01")[:size]


_AGREED: dict[tuple[bytes, bytes], bytes] = {}
_MOST_AGREED = 10_000
_NO_PSK = _extract(_HPKE, b"", b"psk_id_hash", b"")


def _cipher(shared: bytes, context: bytes, info: bytes) -> tuple[ChaCha20Poly1305, bytes]:
    """RFC 9180, sections 4.1 and 5.1, mode Auth."""
    secret = _extract(_KEM, b"", b"eae_prk", shared)
    secret = _expand(_KEM, secret, b"shared_secret", context, 32)
    schedule = _AUTH + _NO_PSK + _extract(_HPKE, b"", b"info_hash", keys.DOMAIN + info)
    secret = _extract(_HPKE, secret, b"secret", b"")
    key = _expand(_HPKE, secret, b"key", schedule, 32)
    return ChaCha20Poly1305(key), _expand(_HPKE, secret, b"base_nonce", schedule, _NONCE_BYTES)


class AgreementKey(keys.AgreementKey):
    """`keys.AgreementKey`."""

    __slots__ = ()
    ephemeral: Callable[[], bytes]

    def __init__(self, secret: bytes) -> None:
        if len(secret) != 32:
            raise LocalProtocolError(f"an X25519 private key has 32 bytes, not {len(secret)}")
        self._key = X25519PrivateKey.from_private_bytes(secret)
        self.public = keys.PublicKey(self._key.public_key().public_bytes_raw())

    def _exchange(self, peer: bytes) -> bytes:
        # The two ends of an agreement compute the same, so that only the first of them needs to.
        ends = (self.public, peer) if self.public < peer else (peer, self.public)
        shared = _AGREED.get(ends)
        if shared is None:
            try:
                shared = bytes(self._key.exchange(X25519PublicKey.from_public_bytes(peer)))
            except ValueError as error:
                raise RefusedError("X25519 public key of low order") from error
            if len(_AGREED) >= _MOST_AGREED:
                _AGREED.clear()
            _AGREED[ends] = shared
        return shared

    def agree(self, peer: bytes, *, salt: bytes, info: bytes) -> bytes:
        """32 bytes."""
        return hkdf(self._exchange(peer), salt=salt, info=info)

    def seal(self, receiver: bytes, *, info: bytes, plaintext: bytes) -> bytes:
        """A box."""
        once = AgreementKey(type(self).ephemeral())
        shared = once._exchange(receiver) + self._exchange(receiver)
        cipher, nonce = _cipher(shared, once.public + receiver + self.public, info)
        return once.public + cipher.encrypt(nonce, plaintext, b"")

    def open(self, box: bytes, *, sender: bytes, info: bytes) -> bytes:
        """What is in a box."""
        if len(box) < keys.BOX_OVERHEAD_BYTES:
            raise RefusedError("a sealed box is too short")
        shared = self._exchange(box[:32]) + self._exchange(sender)
        cipher, nonce = _cipher(shared, box[:32] + self.public + sender, info)
        try:
            return bytes(cipher.decrypt(nonce, box[32:], b""))
        except InvalidTag as error:
            raise RefusedError(
                "a sealed box does not open: forged, damaged or misdirected"
            ) from error


@functools.lru_cache(maxsize=4096)
def check_agreement_key(public: bytes, *, owner: str) -> None:
    """`keys.check_agreement_key`, which is slow because it leaves nothing out; asked once for each."""
    _check_agreement_key(public, owner=owner)


_check_agreement_key = keys.check_agreement_key


@functools.lru_cache(maxsize=256)
def _combined(shares: tuple[tuple[int, tuple[bytes, ...]], ...], at: int) -> tuple[bytes, ...]:
    return tuple(_combine({holder: list(some) for holder, some in shares}, at=at))


_combine = sharing.combine


def combine(shares: Mapping[int, Sequence[bytes]], *, at: int = 0) -> list[bytes]:
    """`sharing.combine`, asked for the same again by whoever verifies a transcript."""
    key = tuple((holder, tuple(some)) for holder, some in sorted(shares.items()))
    return list(_combined(key, at))


@contextlib.contextmanager
def quick_crypto(ephemeral: Callable[[], bytes]) -> Iterator[None]:
    """Everything that makes keys in here makes quick ones. ephemeral: 32 bytes for each box."""
    with contextlib.ExitStack() as stack:
        for owner, name, ours in (
            (keys, "SigningKey", SigningKey),
            (keys, "AgreementKey", AgreementKey),
            (keys, "verify", verify),
            (keys, "hkdf", hkdf),
            (keys, "check_agreement_key", check_agreement_key),
            (masking, "hkdf", hkdf),
            (sharing, "combine", combine),
            (coordinator_round, "AgreementKey", AgreementKey),
            (transcript_checks, "AgreementKey", AgreementKey),
        ):
            stack.enter_context(mock.patch.object(owner, name, ours))
        AgreementKey.ephemeral = staticmethod(ephemeral)  # type: ignore[assignment]
        yield
