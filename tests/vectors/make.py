"""Write covey's own vectors: ``covey.json`` and ``messages.json``.

Run it on purpose only, from ``tests/``::

    python -m vectors.make

A difference it makes to either file is a change of the protocol: devices of one version would no
longer understand, or no longer cancel the masks of, those of the other. Then `keys.DOMAIN` and
`wire.VERSION` have to change too, and the difference belongs into the commit that makes it.
Everything is derived from fixed seeds, so a second run writes the same bytes.
"""

import math
from typing import Any

import msgspec
import numpy as np

from covey_shared import enrolment, fixedpoint, keys, masking, messages, sharing, wire
from covey_shared.messages import Message
from vectors import oracle, save, seeded

RUN = messages.RunId(bytes(range(16)))
PI_A, PI_B = messages.DeviceId("pi-a"), messages.DeviceId("pi-b")
H = messages.ManifestDigest(keys.digest("example", b"manifest"))


def signing_seed(name: str) -> bytes:
    """The Ed25519 seed of ca, coordinator, pi-a or pi-b in these vectors."""
    return keys.digest("example", b"signing", name.encode())


def _key(name: str) -> keys.SigningKey:
    return keys.SigningKey(signing_seed(name))


def _hash(what: str) -> bytes:
    return keys.digest("example", what.encode())


def _certificate(device: messages.DeviceId) -> messages.Certificate:
    return messages.Certificate("lab", device, _key(device).public, 1_800_000_000, 1_900_000_000)


def _check_in(device: messages.DeviceId) -> bytes:
    certificate = _certificate(device)
    rng = seeded(device)
    b, s, c = rng(16), rng(16), rng(16)
    check_in = messages.CheckIn(
        fleet="lab",
        run=RUN,
        round=7,
        device=device,
        certificate=wire.sign(certificate, _key("ca")).envelope,
        pk_mask=keys.mask_key(s).public,
        pk_seal=keys.seal_key(c).public,
        self_mask_commitment=keys.self_mask_commitment(b),
    )
    return wire.sign(check_in, _key(device)).envelope


def _plan_signature() -> bytes:
    signature = messages.PlanSignature(_key("owner").public, _hash("plan"))
    return wire.sign(signature, _key("owner")).envelope


def instances() -> list[tuple[str, Message]]:
    """One message of every type, and the name of its signer.

    The values need not make a round: they are chosen to differ, so that two fields which change
    places give other bytes.
    """
    check_ins = (_check_in(PI_A), _check_in(PI_B))
    head = messages.Head(
        fleet="lab",
        run=RUN,
        round=7,
        plan=_hash("plan"),
        model=_hash("model"),
        revision=9,
        check_ins=keys.digest("check-ins", *check_ins),
        n=5,
        n_params=1000,
        value_bits=16,
        bits=17,
        lane_bits=32,
        prg="chacha20",
        degree=4,
        min_side=1,
        committee=6,
        threshold=3,
        n_min=2,
        w_max=500,
        clip=0.25,
        metric_clips=(10.0, 1.0),
        work=messages.Work(batches=20, batch_size=32, seconds=60.0, hyper=(0.1, 0.9)),
        pk_reveal=keys.seal_key(bytes(16)).public,
        issued_unix=1_800_000_000,
        share_s=30.0,
        collect_s=120.5,
        unmask_s=45.0,
    )
    roster_vote = messages.RosterVote(H, PI_A, b"\x03", b"\x02")
    view_vote = messages.ViewVote(H, PI_A, b"\x03", b"\x01")
    box = seeded("box")(keys.BOX_OVERHEAD_BYTES + 2 * keys.SEED_BYTES)
    reveal_box = seeded("reveal")(keys.BOX_OVERHEAD_BYTES + 2 * keys.SEED_BYTES)
    signed_roster_vote = wire.sign(roster_vote, _key(PI_A)).envelope
    signed_view_vote = wire.sign(view_vote, _key(PI_A)).envelope
    return [
        ("ca", _certificate(PI_A)),
        (
            "coordinator",
            messages.RoundCall(
                fleet="lab",
                run=RUN,
                round=7,
                plan=_hash("plan"),
                plan_bytes=123_456,
                model=_hash("model"),
                model_bytes=4000,
                revision=1,
                n_min=2,
                plan_signatures=(_plan_signature(),),
                gather_s=20.0,
                chance=0.75,
                spread_s=2.5,
                reconnect_s=30.0,
            ),
        ),
        (PI_A, wire.decode_as(messages.CheckIn, check_ins[0]).message),
        ("coordinator", messages.Manifest(head, check_ins)),
        (PI_A, messages.Shares(H, PI_A, (box, box[::-1]))),
        ("coordinator", messages.Delivery(H, PI_A, b"\x03", (box, box[::-1]))),
        (PI_A, roster_vote),
        ("coordinator", messages.Roster(H, b"\x03", (signed_roster_vote,))),
        (PI_A, messages.MaskedUpdate(H, PI_A, b"\x03", _hash("payload"), 2132)),
        ("coordinator", messages.ViewProposal(H, b"\x03", b"\x01")),
        (PI_A, view_vote),
        ("coordinator", messages.View(H, b"\x01", (signed_view_vote,))),
        (PI_A, messages.Reveal(H, PI_A, b"\x01", b"\x03", reveal_box)),
        (
            "coordinator",
            messages.Result(
                H, "lab", RUN, 7, b"\x01", (signed_view_vote,), _hash("sum"), _hash("next model")
            ),
        ),
        ("coordinator", messages.RoundAbandoned("lab", RUN, 7, "1 of 2 members left, 2 needed")),
        (PI_A, messages.Decline("lab", RUN, 7, PI_A, "71 °C")),
        (PI_A, messages.WantBlob("lab", PI_A, _hash("model"), ((0, 1), (300, 70_000)))),
        ("coordinator", messages.WantUpload(H, PI_A, _hash("payload"), ((0, 3),))),
        ("owner", wire.decode_as(messages.PlanSignature, _plan_signature()).message),
        (PI_A, enrolment.WhoIsThere(_hash("trust"))),
        (
            "coordinator",
            enrolment.FleetTrust("lab", _key("ca").public, _key("coordinator").public, b"DER 1"),
        ),
        (
            PI_A,
            enrolment.EnrolRequest("lab", seeded("token")(16), _key(PI_A).public, b"DER 2"),
        ),
        (PI_A, enrolment.RenewRequest("lab", PI_A, _key(PI_A).public, b"DER 3")),
        (
            "coordinator",
            enrolment.Enrolled(
                "lab",
                PI_A,
                _key(PI_A).public,
                b"DER 4",
                wire.sign(_certificate(PI_A), _key("ca")).envelope,
                "mqtts://lab.local:8883",
            ),
        ),
        ("coordinator", enrolment.EnrolRefused("lab", "the token was used")),
        ("coordinator", enrolment.IdentityRequest("lab", PI_A, _key(PI_A).public, 90)),
        ("coordinator", enrolment.RenewalWanted("lab", PI_A, 1_800_000_000)),
    ]


def _refused() -> list[dict[str, str]]:
    """Envelopes that no decoder may accept, built byte by byte around one good message."""
    good = wire.sign(messages.Decline("lab", RUN, 7, PI_A, "hot"), _key(PI_A)).envelope
    prefix, body = good[:66], good[66:]
    run, rest = b"\xc4\x10" + RUN, b"\xa4pi-a\xa3hot"
    assert body == b"\x95\xa3lab" + run + b"\x07" + rest
    call = next(m for _, m in instances() if isinstance(m, messages.RoundCall))
    call_envelope = wire.sign(call, _key("coordinator")).envelope
    # Its last four fields are numbers of 9 bytes each, of which the first may not be zero.
    before, after, last = call_envelope[:-36], call_envelope[-27:], call_envelope[:-9]

    def double(value: float) -> bytes:
        return b"\xcb" + np.float64(value).tobytes()[::-1]

    assert call_envelope == before + double(20) + double(0.75) + double(2.5) + double(30)
    single = b"\xca" + np.float32(20).tobytes()[::-1]
    cases = {
        "empty": b"",
        "no body": prefix,
        "version 0": b"\x00" + good[1:],
        "version 2": b"\x02" + good[1:],
        "type 0": good[:1] + b"\x00" + good[2:],
        "type 20": good[:1] + b"\x14" + good[2:],
        "another type's fields": good[:1] + b"\x11" + good[2:],
        "a trailing byte": good + b"\x00",
        "a second body": good + body,
        "cut short": good[:-1],
        "a field too few": prefix + b"\x94\xa3lab" + run + b"\x07\xa4pi-a",
        "a field too many": prefix + b"\x96" + body[1:] + b"\xc0",
        "a map": prefix + b"\x80",
        "nil": prefix + b"\xc0",
        "array length in 16 bits": prefix + b"\xdc\x00\x05" + body[1:],
        "array length in 32 bits": prefix + b"\xdd\x00\x00\x00\x05" + body[1:],
        "array length of 2^32 - 1": prefix + b"\xdd\xff\xff\xff\xff" + body[1:],
        "integer in 8 bits": prefix + b"\x95\xa3lab" + run + b"\xcc\x07" + rest,
        "integer in 64 bits": prefix
        + b"\x95\xa3lab"
        + run
        + b"\xcf"
        + (7).to_bytes(8, "big")
        + rest,
        "integer as signed": prefix + b"\x95\xa3lab" + run + b"\xd0\x07" + rest,
        "integer as a float": (
            prefix + b"\x95\xa3lab" + run + b"\xcb" + np.float64(7).tobytes()[::-1] + rest
        ),
        "integer as a boolean": prefix + b"\x95\xa3lab" + run + b"\xc3" + rest,
        "round 0": prefix + b"\x95\xa3lab" + run + b"\x00" + rest,
        "string length in 8 bits": prefix + b"\x95\xd9\x03lab" + body[5:],
        "string as bytes": prefix + b"\x95\xc4\x03lab" + body[5:],
        "bytes length in 16 bits": prefix + b"\x95\xa3lab\xc5\x00\x10" + RUN + b"\x07" + rest,
        "bytes as a string": prefix + b"\x95\xa3lab\xb0" + RUN + b"\x07" + rest,
        "run of 15 bytes": prefix + b"\x95\xa3lab\xc4\x0f" + RUN[:15] + b"\x07" + rest,
        "string that is not UTF-8": prefix + b"\x95\xa3l\xffb" + body[5:],
        "string with a surrogate": good[:-4] + b"\xa3\xed\xa0\x80",
        "name in capitals": prefix + b"\x95\xa3LAB" + body[5:],
        "name with a newline at its end": prefix + b"\x95\xa4lab\n" + body[5:],
        "name with a slash": prefix + b"\x95\xa3l/b" + body[5:],
        "extension type": prefix + b"\x95\xd4\x01\x00" + body[5:],
        "float in 32 bits": before + single + after,
        "float as an integer": before + b"\x14" + after,
        "float that is not a number": before + b"\xcb\x7f\xf8" + bytes(6) + after,
        "float that is infinite": before + b"\xcb\x7f\xf0" + bytes(6) + after,
        "float that is zero": before + double(0) + after,
        "no chance": before + double(20) + double(0) + after[9:],
        "a chance above one": before + double(20) + double(1.01) + after[9:],
        "a pace that is not a number": last + double(math.nan),
        "a pace below zero": last + double(-1),
        "a pace of more than an hour": last + double(3600.1),
    }
    return [{"comment": comment, "envelope": data.hex()} for comment, data in cases.items()]


def message_vectors() -> dict[str, Any]:
    """Content of messages.json."""
    return {
        "comment": "fields: in order, bytes in base64. seeds: Ed25519. envelopes: hex.",
        "seeds": {name: signing_seed(name).hex() for name in ("ca", "coordinator", PI_A, "owner")},
        "messages": [
            {
                "label": message.LABEL,
                "code": message.CODE,
                "signer": signer,
                "fields": msgspec.json.decode(msgspec.json.encode(message)),
                "envelope": wire.sign(message, _key(signer)).envelope.hex(),
            }
            for signer, message in instances()
        ],
        "refused": _refused(),
    }


def _key_vectors() -> dict[str, Any]:
    parts = ((), (b"",), (b"", b""), (b"a", b"bc"), (b"ab", b"c"), (b"\x00" * 8,))
    seed, secret = bytes(range(16)), bytes(range(32))
    signer = keys.SigningKey(secret)
    receiver, sender = bytes(range(16, 32)), bytes(range(32, 48))
    box = oracle.hpke_seal(
        ephemeral=_hash("ephemeral"),
        receiver=keys.seal_key(receiver).public,
        sender=oracle.hkdf(sender, b"", b"covey/1 seal", 32),
        info=b"covey/1 " + b"example",
        plaintext=b"thirty-two bytes of two shares..",
    )
    return {
        "digest": [
            {
                "label": label,
                "parts": [p.hex() for p in p_],
                "digest": keys.digest(label, *p_).hex(),
            }
            for label in ("x", "xy")
            for p_ in parts
        ],
        "hkdf": {
            "secret": secret.hex(),
            "salt": "aa",
            "info": "bb",
            "size": 48,
            "key": keys.hkdf(secret, salt=b"\xaa", info=b"\xbb", size=48).hex(),
        },
        "signature": {
            "seed": secret.hex(),
            "public": signer.public.hex(),
            "label": "roster vote",
            "body": "c0ffee",
            "signature": signer.sign("roster vote", b"\xc0\xff\xee").hex(),
        },
        "round_keys": {
            "seed": seed.hex(),
            "mask_public": keys.mask_key(seed).public.hex(),
            "seal_public": keys.seal_key(seed).public.hex(),
            "self_mask_commitment": keys.self_mask_commitment(seed).hex(),
        },
        "box": {
            "receiver": receiver.hex(),
            "sender": sender.hex(),
            "info": b"example".hex(),
            "plaintext": b"thirty-two bytes of two shares..".hex(),
            "box": box.hex(),
        },
    }


def _mask_vectors() -> dict[str, Any]:
    a, b = bytes(range(16)), bytes(range(16, 32))
    pair = masking.pair_mask_key(keys.mask_key(a), keys.mask_key(b).public, H, PI_A, PI_B)
    alone = masking.self_mask_key(a, H, PI_A)
    masked = []
    for lane in ("<u2", "<u4"):
        vector = np.arange(20, dtype=lane)
        masking.add_masks(vector, [pair, alone], [_hash("other")])
        masked.append(
            {
                "lane_bits": vector.itemsize * 8,
                "vector": list(range(20)),
                "plus": [pair.hex(), alone.hex()],
                "minus": [_hash("other").hex()],
                "masked": vector.tolist(),
            }
        )
    return {
        "pair": {
            "seed_a": a.hex(),
            "seed_b": b.hex(),
            "h": H.hex(),
            "a": PI_A,
            "b": PI_B,
            "key": pair.hex(),
        },
        "self": {"seed": a.hex(), "h": H.hex(), "device": PI_A, "key": alone.hex()},
        "masked": masked,
    }


def _fixedpoint_vectors() -> dict[str, Any]:
    rng = seeded("elements")
    packed = []
    for n, bits in (
        (1, 1),
        (9, 1),
        (5, 7),
        (65, 13),
        (64, 16),
        (3, 17),
        (70, 23),
        (3, 31),
        (2, 32),
    ):
        lane = "<u2" if bits <= 16 else "<u4"
        elements = np.frombuffer(rng(n * np.dtype(lane).itemsize), lane)
        packed.append(
            {
                "bits": bits,
                "lane_bits": 8 * elements.itemsize,
                "elements": elements.tolist(),
                "packed": fixedpoint.pack(elements, bits).hex(),
            }
        )
    encoded = []
    for value_bits, n in ((8, 100), (16, 100), (24, 100)):
        encoding = fixedpoint.Encoding(value_bits, n, 8, 0.5, 1000, (10.0, 1.0))
        delta = np.array([0, 0.5, -0.5, 0.1, -0.1, 1e-7, 7, -7], np.float32)
        ring = encoding.encode(delta, 250, (2.5, -3.0), seeded("noise"))
        encoded.append(
            {
                "encoding": [value_bits, n, 8, 0.5, 1000, [10.0, 1.0]],
                "delta": delta.tolist(),
                "weight": 250,
                "metrics": [2.5, -3.0],
                "noise_key": seeded("noise")(32).hex(),
                "ring": ring.tolist(),
            }
        )
    return {
        "packed": packed,
        "refused": [
            {"comment": "a byte short", "n": 5, "bits": 7, "packed": "00000000"},
            {"comment": "a byte long", "n": 5, "bits": 7, "packed": "000000000000"},
            {"comment": "lowest padding bit set", "n": 5, "bits": 7, "packed": "0000000008"},
            {"comment": "highest padding bit set", "n": 5, "bits": 7, "packed": "0000000080"},
            {"comment": "nothing, for one element", "n": 1, "bits": 1, "packed": ""},
        ],
        "encoded": encoded,
    }


def _share_vectors() -> list[dict[str, Any]]:
    out = []
    for threshold, n in ((1, 1), (1, 3), (2, 2), (3, 5), (7, 10)):
        secret = seeded(f"secret {threshold} of {n}")(16)
        noise = seeded(f"coefficients {threshold} of {n}")(16 * (threshold - 1))
        shares = sharing.split(secret, threshold, n, seeded(f"coefficients {threshold} of {n}"))
        out.append(
            {
                "secret": secret.hex(),
                "threshold": threshold,
                "coefficients": noise.hex(),
                "shares": [share.hex() for share in shares],
            }
        )
    return out


def covey_vectors() -> dict[str, Any]:
    """Content of covey.json."""
    return {
        "keys": _key_vectors(),
        "masking": _mask_vectors(),
        "fixedpoint": _fixedpoint_vectors(),
        "sharing": _share_vectors(),
    }


if __name__ == "__main__":
    save("covey", covey_vectors())
    save("messages", message_vectors())
