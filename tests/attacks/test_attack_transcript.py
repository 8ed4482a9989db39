"""Transcripts that lie: by a coordinator that made something up, and signs it, or by anyone on the way."""

import hashlib
import io
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from covey_shared import keys, sharing, wire
from covey_shared.fixedpoint import to_signed, unpack
from covey_shared.masking import add_masks, pair_mask_key, self_mask_key
from covey_shared.messages import (
    CheckIn,
    DeviceId,
    Manifest,
    MaskedUpdate,
    Message,
    Result,
    Reveal,
    Roster,
    RosterVote,
    RoundAbandoned,
    RoundCall,
    Shares,
    View,
    ViewProposal,
    ViewVote,
)
from covey_shared.secagg import rules
from covey_shared.secagg.cohort import Cohort, check_ins_digest
from covey_shared.secagg.committee import reveal_info
from covey_shared.transcript import Ending, Kind
from covey_shared.transcript_checks import Verdict
from lab import RUN, Lab, Mail, Parcel, Play
from mallory import lie
from transcripts import Story, checked, digest_of, failed, passed, sealed, told

LAB = Lab(7, seed="liar")


def a_round_with_losses(lab: Lab) -> Story:
    """The last device vanishes after its shares; one of the first uploads too late."""

    def before(play: Play) -> None:
        lost, late = lab.names[-1], lab.names[1]

        def mail(mail: Mail) -> Any:
            if mail.sender == lost and isinstance(mail.message, MaskedUpdate):
                play.leave(lost)
                return ()
            return (mail,)

        def parcel(parcel: Parcel) -> Any:
            return () if parcel.sender == late else (parcel,)

        play.intercept, play.intercept_parcel = mail, parcel
        LATE[lab.n] = play

    return told(lab, before)


LATE: dict[int, Play] = {}
STORY = a_round_with_losses(LAB)
DATA = STORY.data()
OTHER = told(Lab(7, seed="liar"), round_id=2)  # of the same fleet and run


def cohort_of(story: Story) -> Cohort:
    return rules.verified_cohort(story.manifest(), story.lab.trust)


def resigned(
    story: Story, kind: type[Message], device: DeviceId, key: keys.SigningKey, **changes: Any
) -> Story:
    """One device's message changed, and signed with some key."""

    def change(signed: Any) -> Any:
        message = signed.message
        if (getattr(message, "device", None) or getattr(message, "member", None)) != device:
            return signed
        return wire.sign(msgspec.structs.replace(message, **changes), key)

    return story.mapped(kind, change)


def test_the_story_is_true_to_begin_with():
    report = checked(STORY)
    assert report.complete, report.checks
    assert (report.devices, report.summed) == (7, 5)
    assert checked(OTHER).complete


# -- another average -------------------------------------------------------------------------------


def test_another_average_is_published():
    poisoned = STORY.average() + np.float32(1e-3)
    assert failed(checked(STORY.saying(Result, next_model=digest_of(poisoned)))) == {"model"}


def test_another_sum_is_published():
    story = STORY.saying(Result, ring_sum=hashlib.sha256(b"another").digest())
    assert failed(checked(story)) == {"sum"}


def test_the_average_is_weighted_otherwise_than_is_said():
    about = msgspec.structs.replace(STORY.about, server_lr=0.5)
    assert failed(checked(STORY.but(about=about))) == {"model"}
    for value in (float("inf"), float("nan"), 1e300):
        about = msgspec.structs.replace(STORY.about, server_lr=value)
        assert failed(checked(STORY.but(about=about))) == {"model"}


def test_the_round_began_with_another_model():
    report = checked(STORY, model=STORY.model + 1)
    assert report.verdict("model") is Verdict.NOT_CHECKED
    story = STORY.saying(RoundCall, model=digest_of(STORY.model + 1))
    assert "manifest" in failed(checked(story))


# -- who is in the sum -----------------------------------------------------------------------------


def test_an_update_is_dropped_after_the_fact():
    index = min(STORY.payloads)
    rest = {i: p for i, p in STORY.payloads.items() if i != index}
    assert "payloads" in failed(checked(STORY.but(payloads=rest)))
    # And nobody is said to be missing: but that takes the votes of a quorum.
    cohort = cohort_of(STORY)
    u3 = cohort.bitmap(set(rest))
    told_so = STORY.but(payloads=rest)
    for kind in (ViewProposal, View, Result):
        told_so = told_so.saying(kind, u3=u3)
    assert "view" in failed(checked(told_so))
    # With as many votes taken out as do not fit, there are too few.
    report = checked(told_so.saying(View, votes=()).mapped(ViewVote, lambda signed: None))
    assert "view" in failed(report)
    assert report.verdict("sum") is Verdict.NOT_CHECKED


def test_an_update_is_added_after_the_fact():
    """The late one, whose bytes the coordinator has."""
    play, late = LATE[7], LAB.names[1]
    payload = next(p.payload for p in play.parcels if p.sender == late)
    story = STORY.but(payloads=STORY.payloads | {1: payload})
    assert "payloads" in failed(checked(story))


def test_an_invented_device_is_in_the_cohort():
    mine = keys.SigningKey(bytes(range(32)))
    invented = LAB.certify("pi-zzz", mine, ca=mine)
    real = STORY.said(Manifest)
    template = wire.decode_as(CheckIn, real.check_ins[0]).message
    seed = keys.mask_key(b"0123456789abcdef")
    check_in = wire.sign(
        msgspec.structs.replace(
            template,
            device=DeviceId("pi-zzz"),
            certificate=invented,
            pk_mask=seed.public,
            pk_seal=keys.seal_key(b"0123456789abcdef").public,
            self_mask_commitment=bytes(32),
        ),
        mine,
    )
    envelopes = (*real.check_ins[:-1], check_in.envelope)
    head = msgspec.structs.replace(real.head, check_ins=check_ins_digest(envelopes))
    story = STORY.saying(Manifest, head=head, check_ins=envelopes)
    at = next(i for i, s in enumerate(story.messages) if isinstance(s.message, Manifest))
    story = story.but(messages=[*story.messages[:at], check_in, *story.messages[at:]])
    report = checked(story)
    assert "cohort" in failed(report)
    assert not {"view", "sum", "model"} & passed(report)


def test_a_whole_fleet_is_invented():
    """It proves itself; that it is nobody's fleet, only who knows the fleet's keys can tell."""
    invented = told(Lab(7, seed="invented"))
    assert checked(invented).complete
    report = checked(invented, fleet_ca=LAB.trust.ca, coordinator=LAB.trust.coordinator)
    assert failed(report) == {"ca", "coordinator"}
    unpinned = checked(invented.data(), model=invented.model)
    assert not unpinned.failed
    assert not unpinned.complete
    # The real authority's name over invented devices does not help.
    about = msgspec.structs.replace(invented.about, fleet_ca=LAB.trust.ca)
    assert "cohort" in failed(checked(invented.but(about=about)))


def test_one_device_is_counted_twice():
    real = STORY.said(Manifest)
    envelopes = (real.check_ins[0], *real.check_ins[:-1])
    head = msgspec.structs.replace(real.head, check_ins=check_ins_digest(envelopes))
    assert "cohort" in failed(checked(STORY.saying(Manifest, head=head, check_ins=envelopes)))


@pytest.mark.parametrize(
    "changes",
    [{"n_min": 2}, {"threshold": 2}, {"committee": 3}, {"degree": 2}, {"n": 6}, {"revision": 1}],
)
def test_the_head_is_another(changes: dict[str, int]):
    head = msgspec.structs.replace(STORY.said(Manifest).head, **changes)
    report = checked(STORY.saying(Manifest, head=head))
    assert {"cohort", "manifest"} & failed(report)
    assert "sum" not in passed(report)


def test_too_few_are_in_the_sum():
    """A call that wants more than were summed: the view is refused, by members and by verifiers."""
    assert "manifest" in failed(checked(STORY.saying(RoundCall, n_min=6)))


# -- payloads --------------------------------------------------------------------------------------


def test_payloads_are_swapped():
    a, b = sorted(STORY.payloads)[:2]
    swapped = STORY.payloads | {a: STORY.payloads[b], b: STORY.payloads[a]}
    assert "payloads" in failed(checked(STORY.but(payloads=swapped)))


def test_a_payload_is_replaced():
    a = min(STORY.payloads)
    other = bytearray(STORY.payloads[a])
    other[0] ^= 1
    for bad in (bytes(other), other[:-1], bytes(other) + b"\x00", b"\x00"):
        report = checked(STORY.but(payloads=STORY.payloads | {a: bytes(bad)}))
        assert "payloads" in failed(report)
        assert "sum" not in passed(report)
        # Only its hash is told, and that is not what was signed.
        thin = STORY.but(payloads=STORY.payloads | {a: bytes(bad)}, thinned=set(STORY.payloads))
        assert "payloads" in failed(checked(thin))


def test_a_payload_is_replaced_and_announced():
    cohort, a = cohort_of(STORY), min(STORY.payloads)
    other = bytes(len(STORY.payloads[a]))
    story = STORY.but(payloads=STORY.payloads | {a: other})
    device = cohort.peers[a].device
    story = resigned(
        story, MaskedUpdate, device, LAB.coordinator_key, payload=hashlib.sha256(other).digest()
    )
    report = checked(story)
    assert "updates" in failed(report)
    assert "sum" not in passed(report)


def test_a_payload_of_another_round():
    a = min(STORY.payloads)
    story = STORY.but(payloads=STORY.payloads | {a: OTHER.payloads[a]})
    assert "payloads" in failed(checked(story))


# -- votes and shares ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "vote", "check"), [(Roster, RosterVote, "roster"), (View, ViewVote, "view")]
)
def test_a_quorum_is_made_up(kind: type[Message], vote: type[Message], check: str):
    votes = STORY.said(kind).votes
    for wrong in (votes[:-1], (votes[0], *votes[:-1]), (*votes[:-1], OTHER.said(kind).votes[-1])):
        assert check in failed(checked(STORY.saying(kind, votes=wrong)))
    forged = wire.sign(wire.decode_as(vote, votes[0]).message, LAB.coordinator_key).envelope
    assert check in failed(checked(STORY.saying(kind, votes=(forged, *votes[1:]))))


def second_view(story: Story) -> tuple[bytes, list[Any], list[Any]]:
    """As if all members were accomplices: another view, its votes, and shares of the other kind."""
    cohort = cohort_of(story)
    roster, view = story.said(Roster).u2, cohort.subset(story.said(View).u3)
    u3 = cohort.bitmap(view - {min(view)})
    votes, reveals = [], []
    for peer in cohort.peers[: cohort.threshold]:
        key = story.lab.identities[peer.device]
        votes.append(wire.sign(ViewVote(cohort.h, peer.device, roster, u3), key))
        reveal = next(s.message for s in story.messages if isinstance(s.message, Reveal))
        reveals.append(wire.sign(msgspec.structs.replace(reveal, member=peer.device, u3=u3), key))
    return u3, votes, reveals


def with_after(story: Story, kind: type[Message], extra: list[Any]) -> Story:
    """More messages, after the last of a kind."""
    at = max(i for i, s in enumerate(story.messages) if isinstance(s.message, kind)) + 1
    return story.but(messages=[*story.messages[:at], *extra, *story.messages[at:]])


def test_two_views_are_shown():
    u3, votes, _ = second_view(STORY)
    view = msgspec.structs.replace(
        STORY.said(View), u3=u3, votes=tuple(vote.envelope for vote in votes)
    )
    second = wire.sign(view, LAB.coordinator_key)
    report = checked(with_after(STORY, View, [second]))
    assert "one view" in failed(report)
    assert "sum" not in passed(report)
    # The votes alone tell of it, and so does the proposal.
    assert "one view" in failed(checked(with_after(STORY, ViewVote, votes)))
    proposal = msgspec.structs.replace(STORY.said(ViewProposal), u3=u3)
    other = wire.sign(proposal, LAB.coordinator_key)
    assert "one view" in failed(checked(with_after(STORY, ViewProposal, [other])))
    # One vote for it, by a member that did not vote before, is enough.
    assert "one view" in failed(checked(STORY.saying(ViewProposal, u3=u3)))


def test_both_kinds_of_share_are_asked_for():
    _, _, reveals = second_view(STORY)
    report = checked(with_after(STORY, Reveal, reveals))
    assert {"one view", "reveals"} & failed(report)
    assert "sum" not in passed(report)
    fresh = [r for r in reveals if r.message.member == LAB.names[0]]
    instead = STORY.mapped(Reveal, lambda s: fresh[0] if s.message.member == LAB.names[0] else s)
    assert "reveals" in failed(checked(instead))


def test_shares_of_the_wrong_kind_do_not_pass_for_the_right_ones():
    """Shares of s in the place of those of b, by all members: they fit no commitment."""
    lab = Lab(4, seed="kinds")

    def before(play: Play) -> None:
        def mail(mail: Mail) -> Any:
            if isinstance(mail.message, ViewProposal):
                for name in lab.names:
                    holder = lab.sessions[name]._round.member
                    holder._shares = {i: s[16:] + s[:16] for i, s in holder._shares.items()}
            return (mail,)

        play.intercept = mail

    story = told(lab, before)
    assert story.ending.outcome == "abandoned"  # the coordinator finds out, too
    key = lab.round(lab.spec(1)).machine._reveal_secret
    claimed = story.but(ending=Ending("completed", ""), key=key)
    report = checked(claimed)
    assert "secrets" in failed(report)


def test_a_member_that_revealed_wrongly_is_told_and_costs_nothing():
    lab = Lab(7, seed="wrong share")

    def before(play: Play) -> None:
        def mail(mail: Mail) -> Any:
            if isinstance(mail.message, ViewProposal):
                lie(lab, lab.names[0])
            return (mail,)

        play.intercept = mail

    report = checked(told(lab, before))
    assert report.complete, report.checks
    (secrets,) = [check for check in report.checks if check.name == "secrets"]
    assert f"do not fit: {lab.names[0]}" in secrets.detail


def test_a_reveal_key_that_is_another():
    assert STORY.key is not None
    other = keys.hkdf(STORY.key, salt=b"", info=b"")
    report = checked(STORY.but(key=other))
    assert "secrets" in failed(report)
    assert "sum" not in passed(report)
    assert "secrets" in failed(checked(STORY.but(key=None)))


def test_a_round_that_gave_a_sum_is_called_abandoned():
    """Then it proves nothing; and what it kept of a sum it should not have."""
    story = STORY.but(ending=Ending("abandoned", "too few"))
    assert {"payloads", "ending"} <= failed(checked(story))
    bare = story.but(key=None, payloads={}).mapped(Result, lambda s: None)
    report = checked(bare)
    assert not report.failed
    assert not {"sum", "result", "model"} & passed(report)


# -- the file on its way ---------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(st.integers(0, len(DATA) - 1), st.integers(0, 7))
def test_any_bit_of_the_file_flipped(at: int, bit: int):
    """By anyone who is not the coordinator: the seal breaks, whatever it was."""
    changed = bytearray(DATA)
    changed[at] ^= 1 << bit
    report = checked(bytes(changed), model=STORY.model)
    assert report.failed
    assert "whole" in failed(report)


SIGNED = [i for i, (kind, _) in enumerate(STORY.records()) if kind in (Kind.MESSAGE, Kind.PAYLOAD)]


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_any_bit_of_a_message_flipped_by_the_coordinator(data: Any):
    """It can seal the file anew, and not sign for the devices. Nor for itself, without saying so."""
    records = STORY.records()
    chosen = data.draw(st.sampled_from(SIGNED))
    kind, body = records[chosen]
    changed = bytearray(body)
    changed[data.draw(st.integers(0, len(body) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    records[chosen] = (kind, bytes(changed))
    report = checked(sealed(records, LAB.coordinator_key), model=STORY.model)
    assert report.failed
    assert "model" not in passed(report)


@pytest.mark.parametrize("chosen", range(len(STORY.records())))
def test_any_record_left_out_or_repeated(chosen: int):
    records = STORY.records()
    signer = LAB.coordinator_key
    twice = checked(sealed([*records[: chosen + 1], *records[chosen:]], signer), model=STORY.model)
    message = records[chosen][0] is Kind.MESSAGE
    kind = type(wire.decode(records[chosen][1]).message) if message else None
    # A device may check in twice, if it declined in between; that does not make two of it.
    assert twice.failed or kind is CheckIn
    without = checked(
        sealed([*records[:chosen], *records[chosen + 1 :]], signer), model=STORY.model
    )
    spare = kind in (RosterVote, ViewVote, Reveal, Shares, MaskedUpdate)
    assert without.failed or spare
    assert not without.failed or "whole" not in passed(without) or not without.complete


def test_records_in_another_order():
    records = STORY.records()
    for first, second in ((1, 2), (5, 20), (len(records) - 2, len(records) - 9)):
        swapped = list(records)
        swapped[first], swapped[second] = swapped[second], swapped[first]
        changed = [DATA, sealed(swapped, keys.SigningKey(bytes(32)))]
        assert "whole" in failed(checked(changed[1], model=STORY.model))
    backwards = [records[0], *reversed(records[1:-1]), records[-1]]
    assert "whole" in failed(checked(sealed(backwards, LAB.coordinator_key), model=STORY.model))


KINDS = [RoundCall, CheckIn, Manifest, Shares, Roster, MaskedUpdate, ViewProposal, ViewVote, View,
         Reveal, Result]  # fmt: skip


@pytest.mark.parametrize("first", range(len(KINDS) - 1))
def test_a_message_before_its_time(first: int):
    """The coordinator seals its messages in another order than they can have come in."""
    kinds = [type(signed.message) for signed in STORY.messages]
    messages = list(STORY.messages)
    early = messages.pop(kinds.index(KINDS[first + 1]))
    messages.insert(kinds.index(KINDS[first]), early)
    report = checked(STORY.but(messages=messages))
    assert "out of order" in report.checks[0].detail
    assert "whole" in failed(report)


@pytest.mark.parametrize(
    "kind",
    [RoundCall, CheckIn, Manifest, Shares, RosterVote, Roster, MaskedUpdate, ViewProposal,
     ViewVote, View, Reveal, Result],
)  # fmt: skip
def test_two_rounds_spliced(kind: type[Message]):
    """All messages of one kind from another round of the same run and devices."""
    others = [s for s in OTHER.messages if isinstance(s.message, kind)]
    mine = [s for s in STORY.messages if isinstance(s.message, kind)]
    at = next(i for i, s in enumerate(STORY.messages) if isinstance(s.message, kind))
    rest = [s for s in STORY.messages if not isinstance(s.message, kind)]
    cut = sum(1 for s in STORY.messages[:at] if not isinstance(s.message, kind))
    spliced = STORY.but(messages=[*rest[:cut], *others, *rest[cut:]])
    assert len(others) >= 1
    assert len(mine) >= 1
    report = checked(spliced)
    assert report.failed
    assert "model" not in passed(report)


def test_two_files_spliced():
    """The first half of one and the second of another."""
    a, b = STORY.records(), OTHER.records()
    for at in range(2, min(len(a), len(b)) - 1, 5):
        report = checked(sealed(a[:at] + b[at:], LAB.coordinator_key), model=STORY.model)
        assert report.failed
        assert "model" not in passed(report)


def checked_in_too(story: Story, extra: Any) -> Story:
    """One more check-in, of a device that was not chosen."""
    at = next(i for i, s in enumerate(story.messages) if isinstance(s.message, Manifest))
    return story.but(messages=[*story.messages[:at], extra, *story.messages[at:]])


def test_who_was_not_chosen_is_certified_too():
    lab = STORY.lab
    key = keys.SigningKey(bytes(range(1, 33)))
    template = wire.decode_as(CheckIn, STORY.said(Manifest).check_ins[0]).message
    for ca, good in ((lab.ca, True), (key, False)):
        extra = wire.sign(
            msgspec.structs.replace(
                template,
                device=DeviceId("pi-900"),
                certificate=lab.certify("pi-900", key, ca=ca),
                pk_mask=keys.mask_key(b"0123456789abcdef").public,
                pk_seal=keys.seal_key(b"0123456789abcdef").public,
            ),
            key,
        )
        report = checked(checked_in_too(STORY, extra))
        assert ("cohort" in failed(report)) != good
        assert report.complete == good


def test_the_call_names_a_model_of_another_size():
    assert "manifest" in failed(checked(STORY.saying(RoundCall, model_bytes=4)))


@pytest.mark.parametrize(
    ("kind", "check"), [(Shares, "shares"), (MaskedUpdate, "updates"), (CheckIn, "cohort")]
)
def test_what_a_device_of_the_sum_signed_is_left_out(kind: type[Message], check: str):
    device = LAB.names[0]
    story = STORY.mapped(kind, lambda s: None if s.message.device == device else s)
    report = checked(story)
    assert check in failed(report)
    assert "sum" not in passed(report)


def test_too_few_shares_of_a_secret_are_left():
    story = STORY.mapped(Reveal, lambda s: None if s.message.member == LAB.names[0] else s)
    report = checked(story)
    revealed = sum(isinstance(s.message, Reveal) for s in STORY.messages)
    assert ("secrets" in failed(report)) == (revealed == cohort_of(STORY).threshold)
    bare = checked(STORY.mapped(Reveal, lambda s: None))
    assert "reveals" in failed(bare)


def test_a_device_signed_something_of_another_shape():
    device = LAB.names[0]
    key = LAB.identities[device]
    shares = next(
        s.message for s in STORY.messages
        if isinstance(s.message, Shares) and s.message.device == device
    )  # fmt: skip
    fewer = resigned(STORY, Shares, device, key, boxes=shares.boxes[:-1])
    assert "shares" in failed(checked(fewer))
    u2 = cohort_of(STORY).bitmap(set(range(6)))
    assert "updates" in failed(checked(resigned(STORY, MaskedUpdate, device, key, u2=u2)))
    longer = resigned(STORY, MaskedUpdate, device, key, payload_bytes=1)
    assert "updates" in failed(checked(longer))
    vote = resigned(STORY, RosterVote, device, key, u2=u2, readable=u2)
    assert "roster" in failed(checked(vote))


def test_a_hash_too_many_is_kept():
    story = STORY.but(payloads=STORY.payloads | {1: b"x"}, thinned={*STORY.payloads, 1})
    assert "payloads" in failed(checked(story))


@pytest.mark.parametrize(
    "changes", [{"round": 2}, {"fleet": "other"}, {"h": bytes(32)}, {"run": bytes(16)}]
)
def test_the_result_is_of_another_round(changes: dict[str, Any]):
    assert "result" in failed(checked(STORY.saying(Result, **changes)))


@pytest.mark.parametrize("kind", [Roster, View, ViewProposal, Result, RoundCall, Manifest])
def test_what_the_coordinator_says_is_signed_by_another(kind: type[Message]):
    """Only by the coordinator: not by a device, and not by nobody."""
    other = LAB.identities[LAB.names[0]]
    story = STORY.mapped(kind, lambda signed: wire.sign(signed.message, other))
    report = checked(story)
    assert failed(report)
    assert "sum" not in passed(report)


def test_a_completed_round_was_called_off_too():
    about = STORY.about
    notice = RoundAbandoned(about.fleet, about.run, about.round, "too few")
    signed = wire.sign(notice, LAB.coordinator_key)
    report = checked(STORY.but(messages=[*STORY.messages, signed]))
    assert failed(report) == {"ending"}


def test_the_notice_of_an_abandoned_round_is_anothers():
    lab = Lab(4, seed="notice")

    def before(play: Play) -> None:
        play.intercept = lambda mail: () if isinstance(mail.message, Shares) else (mail,)

    story = told(lab, before)
    assert not checked(story).failed
    assert "ending" in failed(checked(story.saying(RoundAbandoned, round=2)))
    device = lab.identities[lab.names[0]]
    forged = story.mapped(RoundAbandoned, lambda signed: wire.sign(signed.message, device))
    assert "ending" in failed(checked(forged))


# -- what a transcript gives away ------------------------------------------------------------------


def recovered(story: Story) -> dict[int, bytes]:
    """What anyone finds in a transcript: of each device of the roster, one secret."""
    cohort = cohort_of(story)
    assert story.key is not None
    shares: dict[int, dict[int, bytes]] = {}
    for reveal in [s.message for s in story.messages if isinstance(s.message, Reveal)]:
        holder = cohort.index_of(reveal.member)
        plain = keys.AgreementKey(story.key).open(
            reveal.box,
            sender=cohort.peers[holder].pk_seal,
            info=reveal_info(cohort.h, reveal.member),
        )
        for i, target in enumerate(sorted(cohort.subset(reveal.present))):
            shares.setdefault(target, {})[holder + 1] = plain[16 * i : 16 * (i + 1)]
    found = {}
    for target, held in shares.items():
        chosen = {x: [share] for x, share in sorted(held.items())[: cohort.threshold]}
        found[target] = sharing.combine(chosen)[0]
    return found


def distance_from_uniform(values: np.ndarray, bits: int) -> float:
    """In standard deviations of the chi-square statistic of the top eight bits."""
    counts = np.bincount(((values & ((1 << bits) - 1)) >> (bits - 8)) & 255, minlength=256)
    expected = values.size / 256
    return abs(float(((counts - expected) ** 2 / expected).sum()) - 255) / (2 * 255) ** 0.5


def residue(story: Story, index: int, payload: bytes) -> np.ndarray:
    """A masked update without every mask that the transcript tells."""
    cohort, secrets = cohort_of(story), recovered(story)
    view, roster = cohort.subset(story.said(View).u3), cohort.subset(story.said(Roster).u2)
    encoding, name = cohort.encoding, cohort.peers[index].device
    ring = unpack(payload, encoding.n_coordinates, encoding.bits, encoding.lane)
    plus: list[bytes] = []
    minus: list[bytes] = []
    if index in view:
        minus.append(self_mask_key(keys.Seed(secrets[index]), cohort.h, name))
    for other in sorted(roster - {index}):
        if index in view and other in view:
            continue  # both their mask keys are unknown
        lost, met = (index, other) if index not in view else (other, index)
        key = pair_mask_key(
            keys.mask_key(secrets[lost]), cohort.peers[met].pk_mask, cohort.h, name,
            cohort.peers[other].device,
        )  # fmt: skip
        (minus if index < other else plus).append(key)
    add_masks(ring, plus, minus)
    return to_signed(ring, encoding.bits)


def test_a_transcript_bares_no_update():
    """Not one in the sum, which keeps its pair masks with the others of the sum; and not the late one,
    whose pair masks come off, for its self mask is nobody's to take off. Its bytes are not there."""
    lab = Lab(6, seed="bare", n_params=20_000)
    story = a_round_with_losses(lab)
    assert checked(story).complete
    cohort = cohort_of(story)
    bits = cohort.head.bits
    data = story.data()
    late = next(p.payload for p in LATE[6].parcels if p.sender == lab.names[1])
    assert 1 not in story.payloads
    assert late[:32] not in data
    total = np.zeros(cohort.encoding.n_coordinates, np.int64)
    for index, payload in [*story.payloads.items(), (1, late)]:
        left = residue(story, index, payload)
        plain = to_signed(lab.plain[cohort.peers[index].device, 1], bits)
        assert distance_from_uniform(left, bits) < 5
        assert distance_from_uniform(plain, bits) > 1000
        assert (left == plain).mean() < 0.01
        total += 0 if index == 1 else left
    # All of the sum together are the sum, and no more: the pair masks were all that was left.
    expected = sum(to_signed(lab.plain[cohort.peers[i].device, 1], bits) for i in story.payloads)
    assert (((total - expected) & ((1 << bits) - 1)) == 0).all()


def test_an_abandoned_round_keeps_no_masked_update_and_no_key():
    """From the coordinator's own writer; a transcript that did so fails (above)."""
    lab = Lab(4, seed="abandoned")

    def before(play: Play) -> None:
        play.intercept = lambda mail: () if isinstance(mail.message, Reveal) else (mail,)

    story = told(lab, before)
    assert story.ending.outcome == "abandoned"
    assert story.key is None
    kinds = {kind for kind, _ in story.records()}
    assert kinds == {Kind.ABOUT, Kind.MESSAGE, Kind.ENDING}
    assert io.BytesIO(story.data()).read(19) == b"covey transcript 1\n"
    assert story.about.run == RUN


@pytest.mark.parametrize(("kind", "check"), [(Roster, "roster"), (View, "view")])
def test_a_quorum_under_the_name_of_another_round(kind: type[Message], check: str):
    assert check in failed(checked(STORY.saying(kind, h=bytes(32))))
