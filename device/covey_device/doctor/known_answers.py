"""Whether what is installed computes what it should on this processor: every primitive of a round, against
known answers.

A library that is wrong about one instruction set would make masks that cancel with nobody's, or signatures
that nobody accepts. Each function raises WrongError, or whatever the primitive raises, if it is. They stand
in an order in which the first that fails is what the later ones stumble over.
"""

import hashlib
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
from Crypto.Cipher import ChaCha20
from Crypto.Hash import SHA256
from Crypto.Protocol import HPKE
from Crypto.Protocol.DH import import_x25519_private_key, import_x25519_public_key, key_agreement
from Crypto.Protocol.KDF import HKDF
from Crypto.PublicKey import ECC
from Crypto.Signature import eddsa

from covey_device.doctor import vectors
from covey_device.doctor.findings import Finding
from covey_shared import fixedpoint, keys, masking, sharing, wire
from covey_shared.errors import CoveyError, RefusedError, SignatureError

_unhex = bytes.fromhex
_LANES: dict[int, np.dtype[np.unsignedinteger[Any]]] = {16: np.dtype("<u2"), 32: np.dtype("<u4")}


class WrongError(Exception):
    """A primitive gives another answer than the known one."""


def _is(found: object, known: object, what: str) -> None:
    if found != known:
        raise WrongError(f"{what} gives another answer than the known one")


def _sha256() -> None:
    for case in vectors.SHA256:
        message = _unhex(case["message"])
        _is(hashlib.sha256(message).hexdigest(), case["digest"], "Python's SHA-256 of FIPS 180-4")
        _is(SHA256.new(message).hexdigest(), case["digest"], "pycryptodome's SHA-256 of FIPS 180-4")
    for case in vectors.DIGEST:
        found = keys.digest(case["label"], *map(_unhex, case["parts"]))
        _is(found.hex(), case["digest"], "covey's hash")


def _hkdf() -> None:
    for case in vectors.HKDF_RFC_5869:
        okm = _unhex(case["okm"])
        found = HKDF(
            _unhex(case["ikm"]),
            len(okm),
            _unhex(case["salt"]),
            SHA256,
            context=_unhex(case["info"]),
        )
        _is(found, okm, "HKDF of RFC 5869")
    one = vectors.HKDF
    key = keys.hkdf(
        _unhex(one["secret"]), salt=_unhex(one["salt"]), info=_unhex(one["info"]), size=one["size"]
    )
    _is(key.hex(), one["key"], "covey's HKDF")


def _x25519() -> None:
    for case in vectors.X25519:
        private = import_x25519_private_key(_unhex(case["scalar"]))
        public = import_x25519_public_key(_unhex(case["u"]))
        shared = key_agreement(static_priv=private, static_pub=public, kdf=bytes)
        _is(shared.hex(), case["result"], "X25519 of RFC 7748")
    case = vectors.X25519_AGREEMENT
    alice, bob = keys.AgreementKey(_unhex(case["alice"])), keys.AgreementKey(_unhex(case["bob"]))
    _is(alice.public.hex(), case["alice_public"], "an X25519 key of RFC 7748")
    agreed = keys.hkdf(_unhex(case["shared"]), salt=b"h", info=b"i")
    _is(alice.agree(bob.public, salt=b"h", info=b"i"), agreed, "an agreement of RFC 7748")
    seed = _unhex(vectors.ROUND_KEYS["seed"])
    _is(keys.mask_key(seed).public.hex(), vectors.ROUND_KEYS["mask_public"], "a mask key")
    _is(keys.seal_key(seed).public.hex(), vectors.ROUND_KEYS["seal_public"], "a seal key")
    zero = bytes(32)
    _refused(
        lambda: keys.mask_key(seed).agree(zero, salt=b"", info=b""),
        RefusedError,
        "an X25519 key of low order",
    )


def _ed25519() -> None:
    for case in vectors.ED25519:
        key = ECC.construct(curve="Ed25519", seed=_unhex(case["seed"]))
        public = key.public_key().export_key(format="raw")
        message, signature = _unhex(case["message"]), _unhex(case["signature"])
        _is(public.hex(), case["public"], "an Ed25519 key of RFC 8032")
        _is(eddsa.new(key, "rfc8032").sign(message), signature, "Ed25519 of RFC 8032")
        imported = eddsa.import_public_key(public)
        eddsa.new(imported, "rfc8032").verify(message, signature)
    for case in vectors.ED25519_REFUSED:
        imported = eddsa.import_public_key(_unhex(case["public"]))
        message, signature = _unhex(case["message"]), _unhex(case["signature"])
        verifier = eddsa.new(imported, "rfc8032")
        _refused(lambda: verifier.verify(message, signature), ValueError, "a malleated signature")  # noqa: B023
    one = vectors.SIGNATURE
    body = _unhex(one["body"])
    made = keys.SigningKey(_unhex(one["seed"])).sign(one["label"], body)
    _is(made.hex(), one["signature"], "a signature")
    signed = one["label"], body, _unhex(one["signature"])
    keys.verify(_unhex(one["public"]), *signed, signer="the known answers")
    _refused(
        lambda: keys.verify(
            _unhex(one["public"]), one["label"], body + b"x", signed[2], signer="the known answers"
        ),
        SignatureError,
        "a signature of another text",
    )


def _hpke() -> None:
    rfc = vectors.HPKE_RFC_9180
    cipher = HPKE.new(
        receiver_key=import_x25519_private_key(_unhex(rfc["receiver"])),
        enc=_unhex(rfc["enc"]),
        sender_key=import_x25519_public_key(_unhex(rfc["sender_public"])),
        info=_unhex(rfc["info"]),
        aead_id=HPKE.AEAD.CHACHA20_POLY1305,
    )
    for case in rfc["sealed"]:
        found = cipher.unseal(_unhex(case["ciphertext"]), auth_data=_unhex(case["aad"]))
        _is(found.hex(), rfc["plaintext"], "HPKE in mode Auth of RFC 9180")
    case = vectors.BOX
    receiver, sender = (keys.seal_key(_unhex(case[who])) for who in ("receiver", "sender"))
    info, box = _unhex(case["info"]), _unhex(case["box"])
    opened = receiver.open(box, sender=sender.public, info=info)
    _is(opened.hex(), case["plaintext"], "a box of shares")
    made = sender.seal(receiver.public, info=info, plaintext=opened)
    _is(receiver.open(made, sender=sender.public, info=info), opened, "a box sealed here")
    forged = box[:-1] + bytes([box[-1] ^ 1])
    _refused(
        lambda: receiver.open(forged, sender=sender.public, info=info), RefusedError, "a forged box"
    )


def _chacha20() -> None:
    for case in vectors.CHACHA20:
        start = 64 * case["counter"]
        stream = masking.keystream(_unhex(case["key"]), start + 64)[start:]
        _is(stream.hex(), case["stream"], "ChaCha20 of RFC 8439")
        cipher = ChaCha20.new(key=_unhex(case["key"]), nonce=_unhex(case["nonce"]))
        cipher.seek(start)
        _is(cipher.encrypt(bytes(64)).hex(), case["stream"], "ChaCha20 of RFC 8439")


def _mask_keys() -> None:
    case = vectors.PAIR
    a, b = (keys.mask_key(_unhex(case[seed])) for seed in ("seed_a", "seed_b"))
    for mine, theirs in ((a, b), (b, a)):
        key = masking.pair_mask_key(mine, theirs.public, _unhex(case["h"]), case["a"], case["b"])
        _is(key.hex(), case["key"], "the key of a pair's mask")
    case = vectors.SELF
    key = masking.self_mask_key(_unhex(case["seed"]), _unhex(case["h"]), case["device"])
    _is(key.hex(), case["key"], "the key of a device's own mask")
    commitment = keys.self_mask_commitment(_unhex(vectors.ROUND_KEYS["seed"]))
    _is(commitment.hex(), vectors.ROUND_KEYS["self_mask_commitment"], "a commitment")


def _masks() -> None:
    for case in vectors.MASKED:
        vector = np.array(case["vector"], _LANES[case["lane_bits"]])
        plus, minus = ([_unhex(key) for key in case[sign]] for sign in ("plus", "minus"))
        masking.add_masks(vector, plus, minus)
        _is(vector.tolist(), case["masked"], f"a vector masked in {case['lane_bits']}-bit lanes")
    plus, minus = [bytes(range(32))], [bytes(range(32, 64))]
    for case in vectors.LONG:
        vector = np.arange(vectors.LONG_SIZE).astype(_LANES[case["lane_bits"]])
        plain = vector.copy()
        masking.add_masks(vector, plus, minus)
        found = hashlib.sha256(vector.tobytes()).hexdigest()
        _is(found, case["digest"], f"a long vector masked in {case['lane_bits']}-bit lanes")
        masking.add_masks(vector, minus, plus)
        _is(vector.tobytes(), plain.tobytes(), "a mask that was taken away")


def _fixed_point() -> None:
    for case in vectors.ENCODED:
        value_bits, n, n_params, clip, w_max, metric_clips = case["encoding"]
        encoding = fixedpoint.Encoding(value_bits, n, n_params, clip, w_max, tuple(metric_clips))
        noise = _unhex(case["noise_key"])
        ring = encoding.encode(
            np.array(case["delta"], np.float32),
            case["weight"],
            case["metrics"],
            lambda size, noise=noise: noise[:size],  # type: ignore[misc]
        )
        _is(ring.tolist(), case["ring"], f"an update in fixed point at {value_bits} bits")


def _packing() -> None:
    for case in vectors.PACKED:
        lane, bits = _LANES[case["lane_bits"]], case["bits"]
        elements = np.array(case["elements"], lane)
        packed = fixedpoint.pack(elements, bits)
        _is(packed.hex(), case["packed"], f"packing to {bits} bits")
        kept = elements & lane.type((1 << bits) - 1)
        unpacked = fixedpoint.unpack(packed, elements.size, bits, lane)
        _is(unpacked.tolist(), kept.tolist(), f"unpacking of {bits} bits")


def _shares() -> None:
    for case in vectors.SHARES:
        known = [_unhex(share) for share in case["shares"]]
        coefficients, threshold = _unhex(case["coefficients"]), case["threshold"]
        secret = _unhex(case["secret"])
        made = sharing.split(
            secret,
            threshold,
            len(known),
            lambda size, given=coefficients: given[:size],  # type: ignore[misc]
        )
        _is(made, known, f"sharing a secret {threshold} of {len(known)}")
        holders = range(len(known) - threshold + 1, len(known) + 1)
        combined = sharing.combine({x: [known[x - 1]] for x in holders})
        _is(combined, [secret], f"a secret from {threshold} shares of {len(known)}")


def _messages() -> None:
    for case in vectors.MESSAGES:
        label, envelope = case["label"], _unhex(case["envelope"])
        signed = wire.decode(envelope)
        fields = msgspec.json.decode(msgspec.json.encode(signed.message))
        _is(fields, case["fields"], f"a {label} that was read")
        key = keys.SigningKey(_unhex(vectors.SIGNING_SEEDS[case["signer"]]))
        _is(wire.sign(signed.message, key).envelope.hex(), case["envelope"], f"a signed {label}")
        signed.check(key.public, signer="the known answers")
    for case in vectors.MESSAGES_REFUSED:
        envelope = _unhex(case["envelope"])
        _refused(lambda: wire.decode(envelope), CoveyError, f"a message with {case['comment']}")  # noqa: B023


def _refused(step: Callable[[], Any], error: type[Exception], what: str) -> None:
    try:
        step()
    except error:
        return
    raise WrongError(f"{what} is accepted")


PRIMITIVES: dict[str, Callable[[], None]] = {
    "SHA-256": _sha256,
    "HKDF": _hkdf,
    "X25519": _x25519,
    "Ed25519": _ed25519,
    "HPKE": _hpke,
    "ChaCha20": _chacha20,
    "mask keys": _mask_keys,
    "masks": _masks,
    "fixed point": _fixed_point,
    "packing": _packing,
    "Shamir shares": _shares,
    "messages": _messages,
}

REINSTALL = (
    "install covey and what it needs anew; if that does not help, report it with `processor`"
)


def known_answers() -> list[Finding]:
    """One line if all are right, and otherwise one for each that is not."""
    check, wrong = "known-answers", []
    for name, answer in PRIMITIVES.items():
        try:
            answer()
        except WrongError as error:
            wrong.append(Finding(check, "problem", f"{name}: {error}", REINSTALL))
        except Exception as error:  # whatever a broken library raises
            says = f"{name}: {type(error).__name__}: {error}"
            wrong.append(Finding(check, "problem", says, REINSTALL))
    return wrong or [Finding(check, "ok", f"right: {', '.join(PRIMITIVES)}")]
