"""The wire: round trips, one spelling for every message, hostile bytes, and what is signed."""

import string
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from msgspec import inspect

from covey_shared import enrolment, keys, messages, wire
from covey_shared.errors import LocalProtocolError, MalformedError, SignatureError
from covey_shared.messages import DeviceId, ManifestDigest, Message
from vectors import load

VECTORS = load("messages")
ENVELOPES = {case["label"]: bytes.fromhex(case["envelope"]) for case in VECTORS["messages"]}
SEEDS = {name: bytes.fromhex(seed) for name, seed in VECTORS["seeds"].items()}
SIGNERS = {case["label"]: keys.SigningKey(SEEDS[case["signer"]]) for case in VECTORS["messages"]}
ALL = (*messages.ALL, *enrolment.ALL)
KINDS = {kind.LABEL: kind for kind in ALL}
KEY = keys.SigningKey(bytes(32))
PREFIX = 66


def decoded(data: bytes) -> wire.Signed[Message] | None:
    """The message, or None for a MalformedError. Any other error is the test's failure."""
    try:
        return wire.decode(data)
    except MalformedError:
        return None


# --- round trips --------------------------------------------------------------------------------

names = st.builds(
    lambda first, middle, last: first + middle + last,
    st.sampled_from(string.ascii_lowercase),
    st.text(string.ascii_lowercase + string.digits + "-", max_size=30),
    st.sampled_from(string.digits),
)


def values(kind: inspect.Type) -> st.SearchStrategy[Any]:
    """Values of a field's type within its limits (lists and long byte strings kept short)."""
    match kind:
        case inspect.StructType():
            return st.tuples(*(values(f.type) for f in kind.fields)).map(lambda v: kind.cls(*v))
        case inspect.TupleType():
            return st.tuples(*map(values, kind.item_types))
        case inspect.VarTupleType():
            low = kind.min_length or 0
            return st.lists(values(kind.item_type), min_size=low, max_size=low + 2).map(tuple)
        case inspect.IntType():
            assert kind.ge is not None
            assert kind.le is not None
            edges = st.sampled_from([kind.ge, kind.le])
            return edges | st.integers(kind.ge, kind.le)
        case inspect.FloatType():
            if kind.le is None:
                return st.floats()  # NaN too: it has to come back with its very bits
            return st.floats(float(kind.gt or 0), float(kind.le), exclude_min=True)
        case inspect.BytesType():
            low, high = kind.min_length or 0, kind.max_length or 0
            return st.binary(min_size=low, max_size=min(high, low + 40))
        case inspect.StrType() if kind.pattern == messages._NAME:
            return names
        case inspect.StrType():
            text = st.characters(codec="utf-8")
            return st.text(text, min_size=kind.min_length or 0, max_size=kind.max_length)
        case _:
            raise AssertionError(kind)


@pytest.mark.parametrize("label", KINDS)
def test_every_message_comes_back(label: str) -> None:
    kind = KINDS[label]

    @settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(values(inspect.type_info(kind)))
    def comes_back(message: Message) -> None:
        signed = wire.sign(message, KEY)
        opened = wire.opened(kind, signed.envelope, KEY.public, signer="us")
        assert repr(opened.message) == repr(message)  # unlike ==, also of NaN
        assert wire.sign(opened.message, KEY).envelope == signed.envelope
        assert signed.envelope == (
            bytes((1, kind.CODE)) + opened.signature + wire.body_of(opened.message)
        )

    comes_back()


def test_decoding_reads_any_bytes_like_object_and_keeps_its_own_copy() -> None:
    envelope = ENVELOPES["roster vote"]
    buffer = bytearray(envelope)
    for data in (buffer, memoryview(buffer)):
        signed = wire.decode(data)  # type: ignore[arg-type]
        buffer[:] = bytes(len(buffer))
        assert signed.envelope == envelope
        assert type(signed.body) is type(signed.signature) is bytes
        buffer[:] = envelope


# --- hostile bytes ------------------------------------------------------------------------------


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=400))
@example(b"")
def test_arbitrary_bytes(data: bytes) -> None:
    assert decoded(data) is None


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(ALL), st.binary(max_size=300))
@example(messages.WantBlob, b"\x91" * 100_000)
@example(messages.WantBlob, b"\x81" * 100_000)
@example(messages.WantBlob, b"\x94\xa1f\xa1d\xc4\x20" + bytes(32) + b"\x91" * 100_000)
@example(messages.WantBlob, b"\x94\xa1f\xa1d\xc4\x20" + bytes(32) + b"\xdd\xff\xff\xff\xff")
@example(messages.WantBlob, b"\x94\xa1f\xa1d\xc6\xff\xff\xff\xff")
@example(messages.WantBlob, b"\x94\xdb\xff\xff\xff\xff")
@example(messages.WantBlob, b"\xdd\xff\xff\xff\xff" + b"\xc0" * 100_000)
def test_arbitrary_bodies(kind: type[Message], body: bytes) -> None:
    data = bytes((wire.VERSION, kind.CODE)) + bytes(64) + body
    if (signed := decoded(data)) is not None:
        assert wire.body_of(signed.message) == body


atoms = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats()
scalars = atoms | st.text(max_size=20) | st.binary(max_size=40)
documents = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=8) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=30,
)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(ALL), documents)
def test_arbitrary_message_pack(kind: type[Message], document: object) -> None:
    body = msgspec.msgpack.encode(document)
    data = bytes((wire.VERSION, kind.CODE)) + bytes(64) + body
    if (signed := decoded(data)) is not None:
        assert wire.body_of(signed.message) == body


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """A good envelope after a few bit flips, cuts, insertions and splices with another."""
    envelopes = st.sampled_from(sorted(ENVELOPES.values()))
    data = bytearray(draw(envelopes))
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(data)))
        match draw(st.integers(0, 4)):
            case 0 if at < len(data):
                data[at] ^= 1 << draw(st.integers(0, 7))
            case 1 if at < len(data):
                data[at] = draw(st.integers(0, 255))
            case 2:
                del data[at : at + draw(st.integers(1, 8))]
            case 3:
                data[at:at] = draw(st.binary(min_size=1, max_size=8))
            case _:
                data[at:] = draw(envelopes)[at:]
    return bytes(data)


@settings(max_examples=1000, deadline=None)
@given(mutated())
def test_mutated_messages_are_refused_or_are_what_they_re_encode_to(data: bytes) -> None:
    if (signed := decoded(data)) is not None:
        assert signed.envelope == data
        assert signed.body == data[PREFIX:]
        assert wire.body_of(signed.message) == data[PREFIX:]
        assert data[:2] == bytes((wire.VERSION, signed.message.CODE))


@pytest.mark.parametrize("case", VECTORS["refused"], ids=lambda case: str(case["comment"]))
def test_refused_vectors(case: dict[str, str]) -> None:
    with pytest.raises(MalformedError):
        wire.decode(bytes.fromhex(case["envelope"]))


def test_every_truncation_and_every_trailing_byte_is_refused() -> None:
    for label, envelope in ENVELOPES.items():
        for size in range(len(envelope)):
            assert decoded(envelope[:size]) is None, (label, size)
        for byte in range(256):
            assert decoded(envelope + bytes([byte])) is None, (label, byte)


def test_an_oversize_message_is_refused_before_it_is_parsed() -> None:
    body = b"\x00" * (wire.MAX_MESSAGE_BYTES - PREFIX)
    with pytest.raises(MalformedError, match="want blob"):
        wire.decode(bytes((wire.VERSION, messages.WantBlob.CODE)) + bytes(64) + body)
    with pytest.raises(MalformedError, match="bytes, not"):
        wire.decode(bytes((wire.VERSION, messages.WantBlob.CODE)) + bytes(64) + body + b"\x00")


def test_versions_and_types_from_elsewhere_are_named() -> None:
    envelope = ENVELOPES["decline"]
    codes = {kind.CODE for kind in ALL}
    for byte in range(256):
        if byte != wire.VERSION:
            with pytest.raises(MalformedError, match=f"version {byte}"):
                wire.decode(bytes([byte]) + envelope[1:])
        if byte not in codes:
            with pytest.raises(MalformedError, match=f"type {byte}"):
                wire.decode(envelope[:1] + bytes([byte]) + envelope[2:])


def test_another_type_than_expected() -> None:
    with pytest.raises(MalformedError, match="expected a roster vote, got a decline"):
        wire.decode_as(messages.RosterVote, ENVELOPES["decline"])
    with pytest.raises(MalformedError, match="expected a roster vote"):
        wire.opened(messages.RosterVote, ENVELOPES["view vote"], KEY.public, signer="us")


# --- signatures ---------------------------------------------------------------------------------


def open_as_signed(label: str, data: bytes) -> None:
    wire.opened(KINDS[label], data, SIGNERS[label].public, signer="its signer")


@pytest.mark.parametrize("label", ENVELOPES)
def test_a_flipped_bit_anywhere_is_malformed_or_not_signed(label: str) -> None:
    """Every bit of the prefix, and of the body every one if it is short, else each 37th."""
    envelope = ENVELOPES[label]
    open_as_signed(label, envelope)
    n_bits = 8 * len(envelope)
    step = 1 if label == "roster vote" else 37
    for bit in (*range(0, 8 * PREFIX, 11), *range(0, n_bits, step)):
        bad = bytearray(envelope)
        bad[bit // 8] ^= 1 << bit % 8
        with pytest.raises((MalformedError, SignatureError)):
            open_as_signed(label, bytes(bad))


def test_a_signature_for_one_type_is_none_for_another() -> None:
    """A roster vote and a view vote have the very same fields: only the label tells them apart."""
    h, me = ManifestDigest(bytes(32)), DeviceId("pi-a")
    roster = wire.sign(messages.RosterVote(h, me, b"\x03", b"\x01"), KEY)
    view = wire.sign(messages.ViewVote(h, me, b"\x03", b"\x01"), KEY)
    assert roster.body == view.body
    relabelled = bytes((wire.VERSION, messages.ViewVote.CODE)) + roster.envelope[2:]
    assert wire.decode_as(messages.ViewVote, relabelled).message == view.message
    with pytest.raises(SignatureError, match="view vote is not signed by pi-a"):
        wire.opened(messages.ViewVote, relabelled, KEY.public, signer="pi-a")


def test_no_signature_serves_under_another_label() -> None:
    for label, envelope in ENVELOPES.items():
        signature, body = envelope[2:PREFIX], envelope[PREFIX:]
        public = SIGNERS[label].public
        keys.verify(public, label, body, signature, signer="its signer")
        for other in (*ENVELOPES, "", label + "\x00", label[:-1]):
            if other != label:
                with pytest.raises(SignatureError):
                    keys.verify(public, other, body, signature, signer="its signer")


def test_somebody_elses_signature_is_none() -> None:
    for label, envelope in ENVELOPES.items():
        with pytest.raises(SignatureError, match=f"{label} is not signed by pi-z"):
            wire.opened(KINDS[label], envelope, KEY.public, signer="pi-z")


def test_signing_is_deterministic_and_never_sends_what_a_peer_would_refuse() -> None:
    good = messages.Decline("lab", messages.RunId(bytes(16)), 1, DeviceId("pi-a"), "hot")
    assert wire.sign(good, KEY) == wire.sign(good, KEY)
    for changes in (
        {"fleet": "Lab"},
        {"run": bytes(15)},
        {"round": 0},
        {"round": 1.0},
        {"round": True},
        {"device": "a/b"},
        {"reason": "x" * 301},
        {"reason": None},
    ):
        fields = {name: getattr(good, name) for name in good.__struct_fields__} | changes
        with pytest.raises(LocalProtocolError, match="cannot send this decline"):
            wire.sign(messages.Decline(**fields), KEY)
