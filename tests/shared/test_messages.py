"""Messages: the bytes of every one held fixed, every field limited, the largest still sendable."""

import re
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from msgspec import inspect

from covey_shared import enrolment, keys, messages, wire
from covey_shared.errors import LocalProtocolError, MalformedError
from covey_shared.messages import DeviceId, ManifestDigest, Message, RunId
from covey_shared.transport import MAX_PAYLOAD_BYTES
from vectors import load, make

VECTORS = load("messages")
ALL = (*messages.ALL, *enrolment.ALL)
KINDS = {kind.LABEL: kind for kind in ALL}
KEY = keys.SigningKey(bytes(32))
MOST = messages.MAX_COHORT


def label(case: dict[str, Any]) -> str:
    return str(case["label"])


def unsigned(kind: type[Message], fields: object) -> bytes:
    """An envelope with a signature of zeros, whose body need not be a message at all."""
    return bytes((wire.VERSION, kind.CODE)) + bytes(64) + msgspec.msgpack.encode(fields)


# --- the bytes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("case", VECTORS["messages"], ids=label)
def test_every_message_stays_what_it_is(case: dict[str, Any]) -> None:
    kind = KINDS[case["label"]]
    assert case["code"] == kind.CODE
    message = msgspec.convert(case["fields"], kind)
    signer = keys.SigningKey(bytes.fromhex(VECTORS["seeds"][case["signer"]]))
    envelope = bytes.fromhex(case["envelope"])
    assert wire.sign(message, signer).envelope == envelope
    opened = wire.opened(kind, envelope, signer.public, signer=case["signer"])
    assert opened.message == message
    assert (opened.envelope, opened.body) == (envelope, wire.body_of(message))


@pytest.mark.parametrize("case", VECTORS["messages"], ids=label)
def test_no_two_fields_of_a_vector_could_change_places_unseen(case: dict[str, Any]) -> None:
    structs: list[msgspec.Struct] = [wire.decode(bytes.fromhex(case["envelope"])).message]
    if isinstance(structs[0], messages.Manifest):
        head = structs[0].head
        structs += [head, head.work]
    for struct in structs:
        values = [getattr(struct, name) for name in struct.__struct_fields__]
        assert len(set(values)) == len(values)


def test_the_vectors_have_one_message_of_every_type() -> None:
    assert [case["label"] for case in VECTORS["messages"]] == [k.LABEL for k in ALL]


def test_the_generator_still_writes_these_vectors() -> None:
    assert make.message_vectors() == VECTORS
    assert make.covey_vectors() == load("covey")


def test_envelopes_within_messages_are_signed_ones() -> None:
    by_label = {case["label"]: bytes.fromhex(case["envelope"]) for case in VECTORS["messages"]}
    public = {
        name: keys.SigningKey(bytes.fromhex(seed)).public for name, seed in VECTORS["seeds"].items()
    }
    manifest = wire.decode_as(messages.Manifest, by_label["manifest"]).message
    assert manifest.check_ins[0] == by_label["check-in"]
    check_in = wire.opened(
        messages.CheckIn, manifest.check_ins[0], public["pi-a"], signer="pi-a"
    ).message
    certificate = wire.opened(
        messages.Certificate, check_in.certificate, public["ca"], signer="the CA"
    ).message
    assert certificate.identity == public["pi-a"]
    roster = wire.decode_as(messages.Roster, by_label["roster"]).message
    view = wire.decode_as(messages.View, by_label["view"]).message
    result = wire.decode_as(messages.Result, by_label["result"]).message
    assert roster.votes == (by_label["roster vote"],)
    assert view.votes == result.votes == (by_label["view vote"],)


# --- the catalogue ------------------------------------------------------------------------------


def test_every_message_class_is_in_the_catalogue_once() -> None:
    assert set(ALL) == set(Message.__subclasses__())
    assert len(set(ALL)) == len(ALL)
    for attribute in ("CODE", "LABEL"):
        assert len({getattr(kind, attribute) for kind in ALL}) == len(ALL)
    for kind in ALL:
        assert 0 < kind.CODE < 256
        assert re.fullmatch("[a-z -]+", kind.LABEL)  # no zero byte, which ends it when signed
        home = enrolment if kind in enrolment.ALL else messages
        assert kind is messages.Certificate or f"\n{kind.__name__} " in (home.__doc__ or "")


def leaves(kind: inspect.Type, path: str) -> Iterator[tuple[str, inspect.Type]]:
    """Every scalar and every list within a type."""
    match kind:
        case inspect.StructType():
            assert kind.array_like
            assert kind.forbid_unknown_fields
            for field in kind.fields:
                assert field.required, f"{path}.{field.name} has a default: its bytes may be absent"
                yield from leaves(field.type, f"{path}.{field.name}")
        case inspect.VarTupleType():
            yield path, kind
            yield from leaves(kind.item_type, f"{path}[]")
        case inspect.TupleType():
            for i, item in enumerate(kind.item_types):
                yield from leaves(item, f"{path}[{i}]")
        case _:
            yield path, kind


LEAVES = [leaf for kind in ALL for leaf in leaves(inspect.type_info(kind), kind.__name__)]


@pytest.mark.parametrize(("path", "kind"), LEAVES, ids=[path for path, _ in LEAVES])
def test_every_field_is_limited(path: str, kind: inspect.Type) -> None:
    match kind:
        case inspect.IntType():
            assert kind.ge is not None
            assert kind.le is not None
            assert kind.le <= 2**53  # exact in every language's numbers
        case inspect.BytesType() | inspect.VarTupleType():
            assert kind.max_length is not None
        case inspect.StrType():
            assert kind.max_length is not None or kind.pattern == messages._NAME
        case inspect.FloatType():
            assert path.endswith((".clip", ".metric_clips[]", ".hyper[]")) or kind.le is not None
        case _:
            pytest.fail(f"{path}: {kind} is not a kind of field that messages have")


def bad_values(kind: inspect.Type, good: Any) -> Iterator[Any]:
    """Values of the wrong type, and ones just outside each limit of a field."""
    yield from (None, {}, msgspec.msgpack.Ext(5, b"x"))
    match kind:
        case inspect.StructType():
            values = list(good)
            yield values[:-1]
            yield [*values, 0]
            for i, field in enumerate(kind.fields):
                for bad in bad_values(field.type, values[i]):
                    yield [*values[:i], bad, *values[i + 1 :]]
        case inspect.TupleType():
            yield list(good)[:-1]
            yield [*good, 0]
            for i, item in enumerate(kind.item_types):
                for bad in bad_values(item, good[i]):
                    yield [*good[:i], bad, *good[i + 1 :]]
        case inspect.VarTupleType():
            assert kind.max_length is not None
            yield [good[0]] * (kind.max_length + 1)
            if kind.min_length:
                yield [good[0]] * (kind.min_length - 1)
            for bad in bad_values(kind.item_type, good[0]):
                yield [bad, *good[1:]]
        case inspect.IntType():
            yield from (kind.ge - 1 if kind.ge is not None else None, (kind.le or 0) + 1)
            yield from (float(good), True, str(good), 2**64 - 1, -(2**63))
        case inspect.FloatType():
            yield from (1, True, "1.0", b"")
            if kind.gt is not None:
                yield from (float(kind.gt), -1.0, float("nan"), float("-inf"))
            if kind.le is not None:
                yield from (float(kind.le) * 1.0000001, float("inf"))
        case inspect.BytesType():
            assert kind.max_length is not None
            yield bytes(kind.max_length + 1)
            if kind.min_length:
                yield bytes(kind.min_length - 1)
            yield "a" * len(good)
        case inspect.StrType():
            yield from (good.encode(), 7)
            if kind.max_length is not None:
                yield "a" * (kind.max_length + 1)


@pytest.mark.parametrize("case", VECTORS["messages"], ids=label)
def test_fields_outside_their_type_or_limits_are_refused(case: dict[str, Any]) -> None:
    kind = KINDS[case["label"]]
    message = wire.decode(bytes.fromhex(case["envelope"])).message
    good = msgspec.to_builtins(message, builtin_types=(bytes,))
    wire.decode(unsigned(kind, good))
    for bad in bad_values(inspect.type_info(kind), good):
        with pytest.raises(MalformedError, match=f"^{kind.LABEL}"):
            wire.decode(unsigned(kind, bad))


# --- names --------------------------------------------------------------------------------------


def with_device(name: str) -> bytes:
    return unsigned(messages.WantUpload, [bytes(32), name, bytes(32), []])


@pytest.mark.parametrize("name", ["a", "7", "pi-7", "a--b", "a" * 32, "0-0"])
def test_names_that_are_taken(name: str) -> None:
    assert wire.decode_as(messages.WantUpload, with_device(name)).message.device == name


@pytest.mark.parametrize(
    "name",
    [
        "",
        "-",
        "-a",
        "a-",
        "A",
        "pi_7",
        "pi.7",
        "pi 7",
        "a/b",
        "a/",
        "/a",
        "+",
        "#",
        "$sys",
        "..",
        "a\n",
        "\na",
        "a\nb",
        "a\x00",
        "a\x00b",
        "pí",
        "а",  # Cyrillic
        "٣",  # a digit, though not one of ASCII
        "a" * 33,
        "a" * 10_000,
    ],
)
def test_names_that_are_not(name: str) -> None:
    """They become topic levels, file names and lines of a log."""
    with pytest.raises(MalformedError, match="want upload"):
        wire.decode(with_device(name))


# --- sizes --------------------------------------------------------------------------------------


def largest() -> dict[str, Message]:
    """The largest message of every type that a cohort of MAX_COHORT can need."""
    name, device = "f" * 32, DeviceId("d" * 32)
    run, hash_, h = RunId(b"\xff" * 16), b"\xff" * 32, ManifestDigest(b"\xff" * 32)
    bitmap, round_id, size, unix = b"\xff" * (MOST // 8), 2**53, 2**40, 2**40
    reason = "\N{FIRE}" * messages.MAX_REASON_CHARS  # four bytes each
    box = b"\xff" * (keys.BOX_OVERHEAD_BYTES + 2 * keys.SEED_BYTES)
    der = b"\xff" * enrolment.MAX_DER_BYTES
    ranges = ((2**32, 2**32),) * messages.MAX_RANGES

    def envelope(message: Message) -> bytes:
        return wire.sign(message, KEY).envelope

    certificate = messages.Certificate(name, device, hash_, unix, unix)
    check_in = messages.CheckIn(
        name, run, round_id, device, envelope(certificate), hash_, hash_, hash_
    )
    roster_vote = messages.RosterVote(h, device, bitmap, bitmap)
    view_vote = messages.ViewVote(h, device, bitmap, bitmap)
    head = messages.Head(
        fleet=name,
        run=run,
        round=round_id,
        plan=hash_,
        model=hash_,
        revision=65535,
        check_ins=hash_,
        n=MOST,
        n_params=2**28,
        value_bits=32,
        bits=32,
        lane_bits=32,
        prg="p" * 16,
        degree=MOST,
        min_side=MOST,
        committee=MOST,
        threshold=MOST,
        n_min=MOST,
        w_max=2**31,
        clip=0.1,
        metric_clips=(0.1,) * messages.MAX_METRICS,
        work=messages.Work(2**31, 2**20, 0.1, (0.1,) * messages.MAX_HYPERPARAMETERS),
        pk_reveal=hash_,
        issued_unix=unix,
        share_s=0.1,
        collect_s=0.1,
        unmask_s=0.1,
    )
    votes = (envelope(view_vote),) * MOST
    every: list[Message] = [
        certificate,
        messages.RoundCall(
            name,
            run,
            round_id,
            hash_,
            size,
            hash_,
            size,
            65535,
            MOST,
            (envelope(messages.PlanSignature(hash_, hash_)),) * messages.MAX_PLAN_SIGNATURES,
            0.1,
            0.1,
            0.1,
            0.1,
        ),
        check_in,
        messages.Manifest(head, (envelope(check_in),) * MOST),
        messages.Shares(h, device, (box,) * MOST),
        messages.Delivery(h, device, bitmap, (box,) * MOST),
        roster_vote,
        messages.Roster(h, bitmap, (envelope(roster_vote),) * MOST),
        messages.MaskedUpdate(h, device, bitmap, hash_, size),
        messages.ViewProposal(h, bitmap, bitmap),
        view_vote,
        messages.View(h, bitmap, votes),
        messages.Reveal(
            h, device, bitmap, bitmap, bytes(keys.BOX_OVERHEAD_BYTES + keys.SEED_BYTES * MOST)
        ),
        messages.Result(h, name, run, round_id, bitmap, votes, hash_, hash_),
        messages.RoundAbandoned(name, run, round_id, reason),
        messages.Decline(name, run, round_id, device, reason),
        messages.WantBlob(name, device, hash_, ranges),
        messages.WantUpload(h, device, hash_, ranges),
        messages.PlanSignature(hash_, hash_),
        enrolment.WhoIsThere(hash_),
        enrolment.FleetTrust(name, hash_, hash_, der),
        enrolment.EnrolRequest(name, bytes(16), hash_, der),
        enrolment.RenewRequest(name, device, hash_, der),
        enrolment.Enrolled(
            name, device, hash_, der, bytes(messages.MAX_ENVELOPE_BYTES), "\N{FIRE}" * 300
        ),
        enrolment.EnrolRefused(name, reason),
        enrolment.IdentityRequest(name, device, hash_, 3650),
        enrolment.RenewalWanted(name, device, unix),
    ]
    return {message.LABEL: message for message in every}


LARGEST = largest()


def test_the_largest_of_every_type_is_there() -> None:
    assert list(LARGEST) == list(KINDS)


@pytest.mark.parametrize("name", KINDS)
def test_the_largest_message_fits_into_one_of_mqtt(name: str) -> None:
    envelope = wire.sign(LARGEST[name], KEY).envelope
    assert len(envelope) <= wire.MAX_MESSAGE_BYTES < MAX_PAYLOAD_BYTES
    assert wire.opened(KINDS[name], envelope, KEY.public, signer="us").message == LARGEST[name]
    if name in ("certificate", "check-in", "roster vote", "view vote"):  # those that travel within
        assert len(envelope) <= messages.MAX_ENVELOPE_BYTES


def test_what_types_allow_but_one_mqtt_message_does_not_is_never_sent() -> None:
    manifest = LARGEST["manifest"]
    assert isinstance(manifest, messages.Manifest)
    stuffed = messages.Manifest(manifest.head, (bytes(messages.MAX_ENVELOPE_BYTES),) * MOST)
    with pytest.raises(LocalProtocolError, match="manifest"):
        wire.sign(stuffed, KEY)
