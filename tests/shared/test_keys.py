"""Keys against the RFCs' known answers, a second implementation, and hostile keys."""

from typing import Any

import pytest
from Crypto.Protocol import HPKE
from Crypto.Protocol.DH import import_x25519_private_key, import_x25519_public_key, key_agreement
from Crypto.PublicKey import ECC
from Crypto.Signature import eddsa
from hypothesis import example, given, settings
from hypothesis import strategies as st

from covey_shared import keys
from covey_shared.errors import LocalProtocolError, RefusedError, SignatureError
from covey_shared.keys import AgreementKey, SigningKey
from vectors import load, oracle

unhex = bytes.fromhex
X25519, ED25519, HKDF, RFC9180 = load("x25519"), load("ed25519"), load("hkdf"), load("hpke")
COVEY = load("covey")["keys"]
seeds16 = st.binary(min_size=16, max_size=16)
secrets32 = st.binary(min_size=32, max_size=32)
slow_enough = settings(max_examples=40, deadline=None)


def comment(case: dict[str, Any]) -> str:
    return str(case.get("comment", ""))


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """The configured primitives alone: no domain, no labels, as the RFCs' vectors have it."""
    monkeypatch.setattr(keys, "DOMAIN", b"")
    monkeypatch.setattr(keys, "_signed_text", lambda label, body: body)


# --- X25519 -------------------------------------------------------------------------------------


def raw_x25519(scalar: bytes, u: bytes) -> bytes:
    """The agreement as `AgreementKey.agree` configures it, before its HKDF."""
    private, public = import_x25519_private_key(scalar), import_x25519_public_key(u)
    return bytes(key_agreement(static_priv=private, static_pub=public, kdf=bytes))


@pytest.mark.parametrize("case", X25519["multiply"])
def test_x25519_multiplies_as_rfc_7748(case: dict[str, str], bare: None) -> None:
    scalar, u, result = (unhex(case[k]) for k in ("scalar", "u", "result"))
    assert raw_x25519(scalar, u) == result
    assert oracle.x25519(scalar, u) == result
    agreed = AgreementKey(scalar).agree(u, salt=b"salt", info=b"info")
    assert agreed == oracle.hkdf(result, b"salt", b"info", 32)


def test_x25519_iterated() -> None:
    k = u = (9).to_bytes(32, "little")
    for i in range(1, 1001):
        k, u = raw_x25519(k, u), k
        if (known := X25519["iterated"].get(str(i))) is not None:
            assert k.hex() == known
    assert set(X25519["iterated"]) == {"1", "1000"}


def test_x25519_agreement_of_rfc_7748() -> None:
    case = {name: unhex(value) for name, value in X25519["agreement"].items()}
    alice, bob = AgreementKey(case["alice"]), AgreementKey(case["bob"])
    assert (alice.public, bob.public) == (case["alice_public"], case["bob_public"])
    expected = oracle.hkdf(case["shared"], b"h", b"covey/1 pair", 32)
    assert alice.agree(bob.public, salt=b"h", info=b"pair") == expected
    assert bob.agree(alice.public, salt=b"h", info=b"pair") == expected


@pytest.mark.parametrize("case", X25519["low_order"], ids=comment)
def test_low_order_points_are_refused_wherever_a_key_comes_from_a_peer(
    case: dict[str, str],
) -> None:
    u, mine = unhex(case["u"]), AgreementKey(b"\x07" * 32)
    with pytest.raises(RefusedError):
        mine.agree(u, salt=b"", info=b"")
    with pytest.raises(RefusedError):
        mine.seal(u, info=b"", plaintext=b"")
    box = AgreementKey(b"\x08" * 32).seal(mine.public, info=b"", plaintext=b"")
    with pytest.raises(RefusedError):
        mine.open(box, sender=u, info=b"")
    with pytest.raises(RefusedError):
        mine.open(u + box[32:], sender=AgreementKey(b"\x08" * 32).public, info=b"")


@pytest.mark.parametrize("size", [0, 31, 33, 64])
def test_keys_of_a_wrong_size(size: int) -> None:
    key = AgreementKey(b"\x07" * 32)
    with pytest.raises(RefusedError):
        key.agree(bytes(range(size)), salt=b"", info=b"")
    with pytest.raises(RefusedError):
        key.seal(bytes(range(size)), info=b"", plaintext=b"")
    with pytest.raises(LocalProtocolError):
        AgreementKey(bytes(size))
    with pytest.raises(LocalProtocolError):
        SigningKey(bytes(size))


@pytest.mark.parametrize("case", X25519["low_order"], ids=comment)
def test_a_key_of_low_order_is_none_to_agree_with(case: dict[str, str]) -> None:
    with pytest.raises(RefusedError, match=r"pi-a: .*low order"):
        keys.check_agreement_key(unhex(case["u"]), owner="pi-a")


def test_a_key_for_people_to_compare_is_128_bits_of_it_in_groups_of_four() -> None:
    assert keys.in_groups(bytes(range(32))) == "0001 0203 0405 0607 0809 0a0b 0c0d 0e0f"


def test_an_agreement_of_zeros_is_refused_whatever_the_import_lets_through(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """RFC 7748, section 6.1. The library refuses such keys itself today; we do not rely on it."""
    monkeypatch.setattr(keys, "key_agreement", lambda **_: bytes(32))
    key = AgreementKey(b"\x07" * 32)
    with pytest.raises(RefusedError, match="low order"):
        key.agree(AgreementKey(b"\x08" * 32).public, salt=b"", info=b"")


@pytest.mark.parametrize("size", [0, 31, 32, keys.BOX_OVERHEAD_BYTES - 1])
def test_a_box_too_short_for_a_key_and_a_tag_is_not_even_tried(size: int) -> None:
    with pytest.raises(RefusedError, match="too short"):
        AgreementKey(b"\x07" * 32).open(
            bytes(size), sender=AgreementKey(b"\x08" * 32).public, info=b""
        )


@slow_enough
@given(secrets32)
def test_only_the_canonical_spelling_of_a_key_passes(secret: bytes) -> None:
    public = AgreementKey(secret).public
    keys.check_agreement_key(public, owner="pi-a")
    # The same key with its ignored bit set: the same agreement under other bytes.
    twin = public[:31] + bytes([public[31] | 0x80])
    other = AgreementKey(b"\x07" * 32)
    agreed = other.agree(public, salt=b"", info=b"")
    assert other.agree(twin, salt=b"", info=b"") == agreed
    with pytest.raises(RefusedError, match=r"pi-a: .*canonical"):
        keys.check_agreement_key(twin, owner="pi-a")


@pytest.mark.parametrize("u", [2**255 - 19 + 2, 2**255 - 19 + 9, 2**255 - 1])
def test_a_key_above_the_fields_prime_is_not_canonical(u: int) -> None:
    with pytest.raises(RefusedError, match="canonical"):
        keys.check_agreement_key(u.to_bytes(32, "little"), owner="pi-a")


@slow_enough
@given(a=secrets32, b=secrets32, salt=st.binary(max_size=40), info=st.binary(max_size=40))
def test_agreement_is_symmetric_and_as_the_oracle_has_it(
    a: bytes, b: bytes, salt: bytes, info: bytes
) -> None:
    mine, theirs = AgreementKey(a), AgreementKey(b)
    agreed = mine.agree(theirs.public, salt=salt, info=info)
    assert agreed == theirs.agree(mine.public, salt=salt, info=info)
    shared = oracle.x25519(a, oracle.x25519_public(b))
    assert agreed == oracle.hkdf(shared, salt, b"covey/1 " + info, 32)
    assert agreed != mine.agree(theirs.public, salt=salt + b"\x01", info=info)
    assert agreed != mine.agree(theirs.public, salt=salt, info=info + b"\x01")


# --- Ed25519 ------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ED25519["valid"], ids=comment)
def test_ed25519_signs_and_verifies_as_rfc_8032(case: dict[str, str], bare: None) -> None:
    key, message = SigningKey(unhex(case["seed"])), unhex(case["message"])
    assert key.public.hex() == case["public"]
    assert key.sign("", message).hex() == case["signature"]
    keys.verify(key.public, "", message, unhex(case["signature"]), signer="the RFC")


@pytest.mark.parametrize("case", ED25519["refused"], ids=comment)
def test_ed25519_refuses(case: dict[str, str], bare: None) -> None:
    with pytest.raises(SignatureError):
        keys.verify(
            unhex(case["public"]),
            "",
            unhex(case["message"]),
            unhex(case["signature"]),
            signer="nobody",
        )


def test_the_list_of_small_order_keys_is_the_whole_torsion_group() -> None:
    points = [unhex(p) for p in ED25519["small_order"]]
    assert len(set(points)) == 8
    assert set(points) == keys._SMALL_ORDER
    # With the library's check alone, the forgery that the list exists for goes through.
    for point in points:
        key = eddsa.import_public_key(point)
        assert (key.pointQ * 8).is_point_at_infinity()
        eddsa.new(key, "rfc8032").verify(b"anything", b"\x01" + bytes(63))


def test_a_signature_binds_domain_label_and_body() -> None:
    case = COVEY["signature"]
    key, body, signature = (
        SigningKey(unhex(case["seed"])),
        unhex(case["body"]),
        unhex(case["signature"]),
    )
    assert key.public.hex() == case["public"]
    assert key.sign(case["label"], body) == signature
    keys.verify(key.public, case["label"], body, signature, signer="us")
    # The same text as plain RFC 8032 sees it.
    text = b"covey/1 " + case["label"].encode() + b"\x00" + body
    eddsa.new(eddsa.import_public_key(key.public), "rfc8032").verify(text, signature)
    for label, other in (("view vote", body), (case["label"], body + b"\x00"), ("", text)):
        with pytest.raises(SignatureError):
            keys.verify(key.public, label, other, signature, signer="us")


@slow_enough
@given(seed=secrets32, body=st.binary(max_size=200), bit=st.integers(0, 511))
def test_any_flipped_bit_of_a_signature_is_noticed(seed: bytes, body: bytes, bit: int) -> None:
    key = SigningKey(seed)
    signature = bytearray(key.sign("x", body))
    keys.verify(key.public, "x", body, bytes(signature), signer="us")
    signature[bit // 8] ^= 1 << bit % 8
    with pytest.raises(SignatureError):
        keys.verify(key.public, "x", body, bytes(signature), signer="us")


@slow_enough
@given(st.binary(max_size=80), st.binary(max_size=80))
@example(bytes(32), bytes(64))
@example(b"\xff" * 32, b"\xff" * 64)
def test_verify_raises_nothing_but_signature_errors(public: bytes, signature: bytes) -> None:
    with pytest.raises(SignatureError):
        keys.verify(public, "x", b"body", signature, signer="a stranger")


# --- HKDF and digests ---------------------------------------------------------------------------


@pytest.mark.parametrize("case", HKDF["cases"])
def test_hkdf_as_rfc_5869(case: dict[str, str], bare: None) -> None:
    ikm, salt, info, okm = (unhex(case[k]) for k in ("ikm", "salt", "info", "okm"))
    assert oracle.hkdf(ikm, salt, info, len(okm)) == okm
    assert keys.hkdf(ikm, salt=salt, info=info, size=len(okm)) == okm


@given(st.binary(max_size=64), st.binary(max_size=64), st.binary(max_size=64), st.integers(1, 100))
def test_hkdf_puts_the_domain_before_info(
    secret: bytes, salt: bytes, info: bytes, size: int
) -> None:
    expected = oracle.hkdf(secret, salt, b"covey/1 " + info, size)
    assert keys.hkdf(secret, salt=salt, info=info, size=size) == expected


def test_hkdf_and_round_keys_stay_what_they_are() -> None:
    case = COVEY["hkdf"]
    secret, salt, info, key = (unhex(case[k]) for k in ("secret", "salt", "info", "key"))
    assert keys.hkdf(secret, salt=salt, info=info, size=case["size"]) == key
    case = COVEY["round_keys"]
    seed = unhex(case["seed"])
    assert keys.mask_key(seed).public.hex() == case["mask_public"]
    assert keys.seal_key(seed).public.hex() == case["seal_public"]
    assert keys.self_mask_commitment(seed).hex() == case["self_mask_commitment"]


@given(seeds16)
def test_one_seed_gives_unrelated_keys(seed: bytes) -> None:
    derived = [
        keys.mask_key(seed).public,
        keys.seal_key(seed).public,
        keys.self_mask_commitment(seed),
        seed + seed,
    ]
    assert len(set(derived)) == len(derived)
    assert keys.mask_key(seed).public == oracle.x25519_public(
        oracle.hkdf(seed, b"", b"covey/1 mask", 32)
    )


@pytest.mark.parametrize("case", COVEY["digest"])
def test_digests_stay_what_they_are(case: dict[str, Any]) -> None:
    assert keys.digest(case["label"], *map(unhex, case["parts"])).hex() == case["digest"]


def test_no_two_digests_agree() -> None:
    digests = [case["digest"] for case in COVEY["digest"]]
    assert len(set(digests)) == len(digests)


@given(st.lists(st.binary(max_size=9), max_size=4), st.lists(st.binary(max_size=9), max_size=4))
@example([b"a", b"bc"], [b"ab", b"c"])
@example([], [b""])
@example([(1).to_bytes(8, "big") + b"a"], [b"a"])
def test_digest_is_injective_in_its_parts(left: list[bytes], right: list[bytes]) -> None:
    assert (keys.digest("x", *left) == keys.digest("x", *right)) == (left == right)


# --- HPKE ---------------------------------------------------------------------------------------


def test_hpke_oracle_gives_the_values_of_rfc_9180() -> None:
    case = {k: unhex(v) for k, v in RFC9180.items() if k not in ("source", "sealed")}
    assert oracle.x25519_public(case["ephemeral"]) == case["enc"]
    assert oracle.x25519_public(case["receiver"]) == case["receiver_public"]
    assert oracle.x25519_public(case["sender"]) == case["sender_public"]
    secret = oracle.hpke_shared_secret(case["ephemeral"], case["receiver_public"], case["sender"])
    assert secret == case["shared_secret"]
    assert oracle.hpke_key_and_nonce(secret, case["info"]) == (case["key"], case["base_nonce"])
    sealed = oracle.hpke_seal(
        case["ephemeral"],
        case["receiver_public"],
        case["sender"],
        case["info"],
        case["plaintext"],
        unhex(RFC9180["sealed"][0]["aad"]),
    )
    assert sealed.hex() == RFC9180["enc"] + RFC9180["sealed"][0]["ciphertext"]


def test_hpke_configuration_opens_the_ciphertexts_of_rfc_9180() -> None:
    """The library with the parameters of `AgreementKey.open`, which itself uses no AAD."""
    cipher = HPKE.new(
        receiver_key=import_x25519_private_key(unhex(RFC9180["receiver"])),
        enc=unhex(RFC9180["enc"]),
        sender_key=import_x25519_public_key(unhex(RFC9180["sender_public"])),
        info=unhex(RFC9180["info"]),
        aead_id=HPKE.AEAD.CHACHA20_POLY1305,
    )
    for case in RFC9180["sealed"]:
        opened = cipher.unseal(unhex(case["ciphertext"]), unhex(case["aad"]))
        assert opened.hex() == RFC9180["plaintext"]


def test_open_reads_a_box_sealed_under_the_keys_of_rfc_9180(bare: None) -> None:
    case = {k: unhex(v) for k, v in RFC9180.items() if k not in ("source", "sealed")}
    box = oracle.hpke_seal(
        case["ephemeral"], case["receiver_public"], case["sender"], case["info"], case["plaintext"]
    )
    opened = AgreementKey(case["receiver"]).open(
        box, sender=case["sender_public"], info=case["info"]
    )
    assert opened == case["plaintext"]


def test_a_box_stays_what_it_is() -> None:
    case = {k: unhex(v) for k, v in COVEY["box"].items()}
    receiver, sender = keys.seal_key(case["receiver"]), keys.seal_key(case["sender"])
    assert receiver.open(case["box"], sender=sender.public, info=case["info"]) == case["plaintext"]
    assert len(case["box"]) == len(case["plaintext"]) + keys.BOX_OVERHEAD_BYTES


@slow_enough
@given(secrets32, secrets32, secrets32, st.binary(max_size=50), st.binary(max_size=99))
def test_boxes_open_across_both_implementations(
    a: bytes, b: bytes, ephemeral: bytes, info: bytes, plaintext: bytes
) -> None:
    mine, theirs = AgreementKey(a), AgreementKey(b)
    box = mine.seal(theirs.public, info=info, plaintext=plaintext)
    assert len(box) == len(plaintext) + keys.BOX_OVERHEAD_BYTES
    assert theirs.open(box, sender=mine.public, info=info) == plaintext
    assert box != mine.seal(theirs.public, info=info, plaintext=plaintext)
    again = oracle.hpke_seal(ephemeral, theirs.public, a, b"covey/1 " + info, plaintext)
    assert theirs.open(again, sender=mine.public, info=info) == plaintext


def test_a_box_opens_for_its_receiver_from_its_sender_under_its_info_only() -> None:
    mine, theirs, other = (AgreementKey(bytes([i]) * 32) for i in (1, 2, 3))
    box = mine.seal(theirs.public, info=b"slot 1", plaintext=b"share")
    assert theirs.open(box, sender=mine.public, info=b"slot 1") == b"share"
    for opener, sender, info in (
        (theirs, mine, b"slot 2"),
        (theirs, other, b"slot 1"),  # what mode Base would have let through
        (theirs, theirs, b"slot 1"),
        (other, mine, b"slot 1"),
        (mine, theirs, b"slot 1"),
    ):
        with pytest.raises(RefusedError):
            opener.open(box, sender=sender.public, info=info)


def test_a_box_of_mode_base_is_refused() -> None:
    mine, theirs = AgreementKey(b"\x01" * 32), AgreementKey(b"\x02" * 32)
    cipher = HPKE.new(
        receiver_key=import_x25519_public_key(theirs.public),
        info=b"covey/1 slot 1",
        aead_id=HPKE.AEAD.CHACHA20_POLY1305,
    )
    with pytest.raises(RefusedError):
        theirs.open(cipher.enc + cipher.seal(b"share"), sender=mine.public, info=b"slot 1")


def test_every_flipped_bit_and_every_truncation_of_a_box_is_noticed() -> None:
    mine, theirs = AgreementKey(b"\x01" * 32), AgreementKey(b"\x02" * 32)
    box = mine.seal(theirs.public, info=b"", plaintext=b"0123456789abcdef")
    for bit in range(8 * len(box)):
        bad = bytearray(box)
        bad[bit // 8] ^= 1 << bit % 8
        with pytest.raises(RefusedError):
            theirs.open(bytes(bad), sender=mine.public, info=b"")
    for size in range(len(box)):
        with pytest.raises(RefusedError):
            theirs.open(box[:size], sender=mine.public, info=b"")
    with pytest.raises(RefusedError):
        theirs.open(box + b"\x00", sender=mine.public, info=b"")


# --- secrets stay in ----------------------------------------------------------------------------


def test_secrets_do_not_show() -> None:
    seed = unhex("00112233445566778899aabbccddeeff" * 2)
    for key in (SigningKey(seed), AgreementKey(seed)):
        shown = f"{key!r} {key!s} {key} {[key]} {key.public!r}"
        number = int.from_bytes(seed, "little")
        clamped = number & ~7 & ((1 << 254) - 1) | 1 << 254
        scalar = int(ECC.construct(curve="Ed25519", seed=seed).d)
        for secret in (seed, clamped.to_bytes(32, "little"), scalar.to_bytes(32, "little")):
            for form in (
                secret.hex(),
                secret[::-1].hex(),
                repr(secret)[2:-1],
                str(int.from_bytes(secret, "little")),
                str(int.from_bytes(secret, "big")),
            ):
                assert form not in shown
        assert key.public.hex()[:16] in repr(key)
        assert not hasattr(key, "__dict__")
