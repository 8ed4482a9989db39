"""Transcripts as bytes, and what an honest one proves."""

import io
import tracemalloc
from itertools import pairwise
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from covey_shared import transcript_checks, wire
from covey_shared.errors import LocalProtocolError, MalformedError, SignatureError
from covey_shared.messages import (
    CheckIn,
    Decline,
    DeviceId,
    Manifest,
    MaskedUpdate,
    Message,
    Result,
    Reveal,
    RosterVote,
    Shares,
    ViewVote,
)
from covey_shared.transcript import (
    MAGIC,
    About,
    Encoder,
    Kind,
    Note,
    Payload,
    Reader,
    check_seal,
    parsed,
    thinned,
)
from covey_shared.transcript_checks import Verdict, verify
from lab import Lab, Mail, Parcel, Play
from transcripts import Story, checked, failed, passed, sealed, told

LAB = Lab(5, seed="transcript")
STORY = told(LAB)
DATA = STORY.data()


def gone_when(kind: type[Message], name: DeviceId) -> Any:
    """The device vanishes with its first message of a kind, which is lost."""

    def before(play: Play) -> None:
        def intercept(mail: Mail) -> Any:
            if mail.sender == name and isinstance(mail.message, kind):
                play.gone.add(name)
                play.leave(name)
                return ()
            return (mail,)

        play.intercept = intercept

    return before


def everything(data: bytes) -> list[tuple[Kind, bytes]]:
    """All records but the seal."""
    found = []
    for record in Reader(io.BytesIO(data).read):
        if isinstance(record, Payload):
            found.append((Kind.PAYLOAD, bytes((record.index,)) + b"".join(record.chunks)))
        elif record.kind is not Kind.SEAL:
            found.append((record.kind, record.body))
    return found


# -- bytes -----------------------------------------------------------------------------------------


def test_what_is_written_is_read():
    assert everything(DATA) == STORY.records()
    reader = Reader(io.BytesIO(DATA).read)
    for _ in reader:
        pass
    assert reader.offset == len(DATA)
    check_seal(reader, LAB.trust.coordinator)
    with pytest.raises(SignatureError):
        check_seal(reader, LAB.trust.ca)


def test_the_seal_stands_when_payloads_are_taken_out():
    parts: list[bytes] = []
    thinned(io.BytesIO(DATA).read, parts.append)
    thin = b"".join(parts)
    assert len(thin) < len(DATA) - sum(map(len, STORY.payloads.values())) // 2
    assert thin == STORY.but(thinned=set(STORY.payloads)).data()
    again: list[bytes] = []
    thinned(io.BytesIO(thin).read, again.append)
    assert b"".join(again) == thin


@settings(max_examples=150, deadline=None)
@given(st.integers(0, len(DATA) - 1))
def test_a_transcript_that_was_cut_off_is_never_good(at: int):
    report = checked(DATA[:at], model=STORY.model)
    assert "whole" in failed(report)
    assert not report.complete


def test_a_torn_tail_is_read_up_to_its_last_whole_record():
    ends = [len(MAGIC)]
    for kind, body in STORY.records():
        ends.append(ends[-1] + 5 + len(body))
        assert kind in Kind
    for start, end in pairwise(ends):
        reader = Reader(io.BytesIO(DATA[: end - 1]).read)
        with pytest.raises(MalformedError, match="cut off"):
            for _ in reader:
                pass
        assert reader.offset == start


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"covey transcript 2\n" + DATA[len(MAGIC) :],
        MAGIC,
        MAGIC + bytes((0, 0, 0, 0, 1)),
        MAGIC + bytes((99, 0, 0, 0, 0)),
        MAGIC + bytes((Kind.ABOUT,)) + (2000).to_bytes(4, "big") + bytes(2000),
        MAGIC + bytes((Kind.MESSAGE,)) + (2**32 - 1).to_bytes(4, "big"),
        MAGIC + bytes((Kind.PAYLOAD,)) + (1).to_bytes(4, "big") + b"\x00",
        MAGIC + bytes((Kind.THINNED,)) + (32).to_bytes(4, "big") + bytes(32),
        DATA + b"\x00",
        DATA + DATA[len(MAGIC) :],
    ],
)  # fmt: skip
def test_what_is_no_transcript_is_refused(data: bytes):
    with pytest.raises(MalformedError):
        check_seal(read_all(data), LAB.trust.coordinator)
    report = checked(data, model=STORY.model)
    assert "whole" in failed(report)
    assert not passed(report) or data.startswith(DATA)


def read_all(data: bytes) -> Reader:
    reader = Reader(io.BytesIO(data).read)
    for _ in reader:
        pass
    return reader


def test_records_have_one_spelling_each():
    with pytest.raises(MalformedError, match="canonical"):
        parsed(Note, msgspec.msgpack.encode(["pi-1", "x"])[:-2] + b"\xd9\x01x")
    with pytest.raises(MalformedError):
        parsed(Note, msgspec.msgpack.encode(["PI", "x"]))
    with pytest.raises(MalformedError):
        parsed(Note, b"\xc1")


def test_what_a_reader_would_refuse_is_not_written():
    with pytest.raises(LocalProtocolError):
        Encoder().record(Kind.MESSAGE, bytes(wire.MAX_MESSAGE_BYTES + 1))
    with pytest.raises(LocalProtocolError):
        Encoder().record(Kind.PAYLOAD, b"\x00\x00")


# -- honest rounds ---------------------------------------------------------------------------------


def test_an_honest_round_is_proven():
    report = checked(STORY)
    assert report.complete, report.checks
    assert (report.devices, report.summed, report.minimum) == (5, 5, 3)


def test_without_keys_and_model_the_rest_is_proven():
    report = checked(DATA)
    assert not report.failed
    assert {c.name for c in report.checks if c.verdict is Verdict.NOT_CHECKED} == {
        "ca", "coordinator", "model",
    }  # fmt: skip


def test_a_thinned_transcript_proves_all_but_the_sum():
    report = checked(STORY.but(thinned=set(STORY.payloads)))
    assert not report.failed
    assert {c.name for c in report.checks if c.verdict is Verdict.NOT_CHECKED} == {
        "payloads", "sum", "model",
    }  # fmt: skip
    assert {"view", "one view", "secrets", "result"} <= passed(report)


def test_taking_out_one_payload_takes_out_the_proof():
    report = checked(STORY.but(thinned={0}))
    assert not report.failed
    assert report.verdict("sum") is Verdict.NOT_CHECKED


@pytest.mark.parametrize(
    ("kind", "in_cohort", "in_sum"),
    [
        (CheckIn, 6, 6),
        (Shares, 7, 6),
        (RosterVote, 7, 6),
        (MaskedUpdate, 7, 6),
        (ViewVote, 7, 7),
        (Reveal, 7, 7),
    ],
)
def test_rounds_that_devices_leave(kind: type[Message], in_cohort: int, in_sum: int):
    lab = Lab(7, seed=kind.__name__)
    report = checked(told(lab, gone_when(kind, lab.names[2])))
    assert report.complete, report.checks
    assert (report.devices, report.summed) == (in_cohort, in_sum)


def test_a_device_whose_upload_never_came_whole_is_told_as_late():
    lab = Lab(7, seed="late")

    def before(play: Play) -> None:
        def intercept(parcel: Parcel) -> Any:
            return () if parcel.sender == lab.names[3] else (parcel,)

        play.intercept_parcel = intercept

    story = told(lab, before)
    report = checked(story)
    assert report.complete
    assert report.summed == 6
    details = {check.name: check.detail for check in report.checks}
    assert "1 announced more came too late" in details["updates"]
    assert 3 not in story.payloads


@pytest.mark.parametrize("kind", [RosterVote, MaskedUpdate, ViewVote])
def test_abandoned_rounds_show_how_far_they_came(kind: type[Message]):
    lab = Lab(4, seed=kind.__name__)

    def before(play: Play) -> None:
        play.intercept = lambda mail: () if isinstance(mail.message, kind) else (mail,)

    story = told(lab, before)
    assert story.ending.outcome == "abandoned"
    report = checked(story)
    assert not report.failed, report.checks
    assert not report.complete
    assert report.verdict("cohort") is Verdict.PASS
    assert report.verdict("sum") is Verdict.NOT_CHECKED
    assert {"shares", "ending"} <= passed(report) or kind is RosterVote
    assert ("view" in passed(report)) is False


def test_a_decline_that_nobody_vouches_for_fails_nobody():
    declined = Decline(LAB.trust.fleet, STORY.about.run, 1, LAB.names[0], "no time")
    forged = wire.sign(declined, LAB.ca)
    at = 1  # after the call
    report = checked(STORY.but(messages=[*STORY.messages[:at], forged, *STORY.messages[at:]]))
    assert report.complete


def test_a_rule_that_this_covey_does_not_know_is_not_judged():
    about = msgspec.structs.replace(STORY.about, rule="fedadam")
    report = checked(STORY.but(about=about))
    assert not report.failed
    assert report.verdict("model") is Verdict.NOT_CHECKED


# -- hostile files ---------------------------------------------------------------------------------


def peak_of(data: bytes) -> int:
    """Bytes that verifying takes beside the file."""
    tracemalloc.start()
    try:
        verify(io.BytesIO(data).read)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def big_round(n_params: int) -> Story:
    """A round whose head is signed, and says that a model is larger than anything here."""
    head = STORY.said(Manifest).head
    huge = msgspec.structs.replace(head, n_params=n_params)
    return STORY.saying(Manifest, head=huge)


def test_memory_is_bounded_by_what_is_there():
    honest = peak_of(DATA)
    assert honest < 10_000_000
    # A round of 2^28 parameters, thinned: what the file claims is never made.
    huge = big_round(2**28).but(thinned=set(STORY.payloads)).data()
    assert peak_of(huge) < 10_000_000
    # A payload of 4 GB that is not there.
    cut = DATA[
        : DATA.index(bytes((Kind.PAYLOAD,)) + (1 + len(STORY.payloads[0])).to_bytes(4, "big"))
    ]
    assert peak_of(cut + bytes((Kind.PAYLOAD,)) + b"\xff\xff\xff\xff" + bytes(1000)) < 10_000_000
    # A payload that is there and is not wanted passes by in pieces.
    report = verify(
        io.BytesIO(STORY.but(payloads=STORY.payloads | {0: bytes(30_000_000)}).data()).read
    )
    assert "payloads" in failed(report)
    assert peak_of(STORY.but(payloads=STORY.payloads | {0: bytes(30_000_000)}).data()) < 10_000_000


def test_more_messages_than_a_round_can_have_are_refused():
    note = (Kind.NOTE, wire.body_of(Note(DeviceId("pi-1"), "x")))
    about = (Kind.ABOUT, wire.body_of(STORY.about))
    report = checked(sealed([about, *[note] * 9000], LAB.coordinator_key))
    assert "whole" in failed(report)
    assert "more messages" in report.checks[0].detail


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_whatever_records_there_are_nothing_but_a_report_comes_out(data: Any):
    """Records repeated, left out, reordered or made up, under a good seal."""
    records = STORY.records()
    chosen = data.draw(st.lists(st.sampled_from(range(len(records))), max_size=60))
    made_up = data.draw(
        st.lists(
            st.tuples(
                st.sampled_from([Kind.ABOUT, Kind.MESSAGE, Kind.NOTE, Kind.ENDING, Kind.KEY]),
                st.binary(max_size=32),
            ),
            max_size=2,
        )
    )
    report = checked(sealed([records[i] for i in chosen] + made_up, LAB.coordinator_key))
    assert "model" not in passed(report)


def test_the_report_says_what_it_is_about():
    report = checked(STORY)
    assert isinstance(report.about, About)
    assert report.about.round == 1
    assert report.next_model == STORY.said(Result).next_model


def test_what_follows_the_ending_is_refused():
    records = STORY.records()
    payload = next(record for record in records if record[0] is Kind.PAYLOAD)
    rest = [record for record in records if record != payload]
    for wrong in ([*rest, payload], [*records, records[1]], [*records, records[-1]]):
        report = checked(sealed(wrong, LAB.coordinator_key), model=STORY.model)
        assert "something follows" in report.checks[0].detail
        assert "sum" not in passed(report)


def test_a_key_of_another_size_is_refused():
    assert STORY.key is not None
    for key in (b"", STORY.key[:31]):
        report = checked(STORY.but(key=key))
        assert "whole" in failed(report)
        assert "secrets" not in passed(report)


def test_a_transcript_must_say_whose_it_is_and_only_once():
    records = STORY.records()
    for wrong in (records[1:], [records[0], *records]):
        assert "whole" in failed(checked(sealed(wrong, LAB.coordinator_key), model=STORY.model))


def test_messages_are_bounded_in_number_and_in_bytes(monkeypatch: pytest.MonkeyPatch):
    sizes = [len(body) for kind, body in STORY.records() if kind in (Kind.MESSAGE, Kind.NOTE)]
    for name, exact in (("MAX_MESSAGES", len(sizes)), ("MAX_MESSAGES_BYTES", sum(sizes))):
        with monkeypatch.context() as bounded:
            bounded.setattr(transcript_checks, name, exact)
            assert checked(STORY).complete
            bounded.setattr(transcript_checks, name, exact - 1)
            assert "more messages than a round can have" in checked(STORY).checks[0].detail


@pytest.mark.parametrize("kind", [Kind.KEY, Kind.PAYLOAD, Kind.THINNED])
def test_no_message_follows_what_belongs_to_the_end(kind: Kind):
    """A late vote, which may come at any time before: after each kind of record alone."""
    story = STORY.but(thinned=set(STORY.payloads)) if kind is Kind.THINNED else STORY
    end = next(body for k, body in story.records() if k is kind)
    messages = [record for record in story.records() if record[0] in (Kind.ABOUT, Kind.MESSAGE)]
    late = next(s for s in STORY.messages if isinstance(s.message, RosterVote))
    messages.remove((Kind.MESSAGE, late.envelope))
    ending = story.records()[-1]
    for order, good in (
        ([*messages, (Kind.MESSAGE, late.envelope), (kind, end), ending], True),
        ([*messages, (kind, end), (Kind.MESSAGE, late.envelope), ending], False),
    ):
        report = checked(sealed(order, LAB.coordinator_key), model=STORY.model)
        assert (report.verdict("whole") is Verdict.PASS) == good
