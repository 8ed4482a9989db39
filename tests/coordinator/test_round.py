"""The coordinator's phase table: whom it waits for, what it drops, refuses and reports, how it ends.

Whole rounds are in tests/shared/test_secagg_rounds.py, devices that lie in tests/attacks.
"""

import numpy as np
import pytest

from covey_coordinator import round as coordinator
from covey_coordinator.round import TRANSITIONS, Event, Phase
from covey_device.policy import Policy
from covey_shared import messages, wire
from covey_shared.errors import (
    LocalProtocolError,
    MalformedError,
    RefusedError,
    SignatureError,
)
from covey_shared.messages import CheckIn, Decline, DeviceId
from covey_shared.secagg.aggregator import Aggregator
from lab import NOW_UNIX, RUN, Lab
from mallory import lie

WANTED = {
    "CheckIn": Phase.GATHER,
    "Shares": Phase.SHARE,
    "RosterVote": Phase.ROSTER,
    "MaskedUpdate": Phase.COLLECT,
    "ViewVote": Phase.VIEW,
    "Reveal": Phase.UNMASK,
}


def test_a_phase_lasts_from_when_its_messages_went_out():
    play = Lab(4).round()
    machine, gather_s = play.machine, play.machine.spec.call.gather_s
    machine.open(0.0)
    machine.sent(3 * gather_s)
    machine.tick(3.9 * gather_s, NOW_UNIX)
    assert machine.phase is Phase.GATHER
    machine.tick(4 * gather_s, NOW_UNIX)
    assert machine.phase is Phase.ABANDONED


def gathering(lab, *, n, **changes):
    """A round of which n devices' check-ins are handed over, at 0 s; the others say nothing."""
    play = lab.round(**changes)
    play.intercept = lambda mail: (mail,) if mail.sender in (None, *lab.names[:n]) else ()
    play.open()
    play.drain()
    return play.machine


def test_a_goal_that_nobody_is_there_for_is_not_waited_for(lab):
    """All that are present have checked in: a grace for newcomers, and the round goes on."""
    machine = gathering(lab, n=4, goal=10, absent_grace_s=2.0)
    machine.tick(1.9, NOW_UNIX)
    assert machine.phase is Phase.GATHER
    machine.presence(DeviceId("newcomer"), True, 1.9, NOW_UNIX)
    machine.tick(5.0, NOW_UNIX)
    assert machine.phase is Phase.GATHER, "the newcomer may yet answer"
    machine.presence(DeviceId("newcomer"), False, 5.0, NOW_UNIX)
    machine.tick(6.9, NOW_UNIX)
    assert machine.phase is Phase.GATHER
    machine.tick(7.0, NOW_UNIX)
    assert machine.phase is Phase.SHARE
    assert machine.cohort.n == 4


def test_a_goal_that_a_refusal_puts_out_of_reach_is_not_waited_for(lab):
    machine = gathering(lab, n=3, goal=4, absent_grace_s=2.0)
    machine.tick(5.0, NOW_UNIX)
    assert machine.phase is Phase.GATHER, "the fourth is there, and may yet answer"
    name = lab.names[3]
    decline = Decline("lab", RUN, 1, name, "too warm")
    machine.receive(wire.sign(decline, lab.identities[name]).envelope, name, 5.0, NOW_UNIX)
    machine.tick(6.9, NOW_UNIX)
    assert machine.phase is Phase.GATHER
    machine.tick(7.0, NOW_UNIX)
    assert machine.phase is Phase.SHARE


def test_fewer_than_the_least_are_waited_for_until_the_end(lab):
    """The round would be abandoned at once, and so would be the next one."""
    machine = gathering(lab, n=2, goal=4, absent_grace_s=2.0)
    for name in lab.names[2:]:
        machine.presence(name, False, 1.0, NOW_UNIX)
    machine.tick(9.9, NOW_UNIX)
    assert machine.phase is Phase.GATHER
    machine.tick(10.0, NOW_UNIX)
    assert machine.phase is Phase.ABANDONED


@pytest.mark.parametrize("spread_s", [0.0, 5.0])
def test_of_a_fleet_that_drew_nobody_knows_who_will_answer(spread_s):
    """So nobody in particular is waited for, but all of the spread is, and for some quiet after."""
    lab = Lab(6)
    call = lab.call(chance=0.999999, spread_s=spread_s)
    machine = gathering(lab, n=4, call=call, goal=3, absent_grace_s=2.0)
    over = max(spread_s, 2.0)
    machine.tick(over - 0.1, NOW_UNIX)
    assert machine.phase is Phase.GATHER
    machine.tick(over, NOW_UNIX)
    assert machine.phase is Phase.SHARE
    assert machine.cohort.n == 3


def test_a_fleet_that_drew_too_few_is_waited_for_until_the_end():
    lab = Lab(6)
    machine = gathering(lab, n=4, call=lab.call(chance=0.999999), goal=5, absent_grace_s=2.0)
    machine.tick(9.9, NOW_UNIX)
    assert machine.phase is Phase.GATHER
    machine.tick(10.0, NOW_UNIX)
    assert machine.phase is Phase.SHARE


def held(play, kind):
    """Play until the coordinator waits for one kind of message; these are handed back instead."""
    kept = {}

    def intercept(mail):
        if mail.sender is not None and mail.kind == kind:
            kept[mail.sender] = mail.envelope
            return ()
        return (mail,)

    play.intercept = intercept
    play.open()
    play.drain()
    assert play.machine.phase is WANTED[kind]
    play.intercept = lambda mail: (mail,)
    return kept


def hand(play, name, envelope):
    """Give the coordinator one message, and carry out what it does."""
    actions = play.machine.receive(envelope, name, play.now, NOW_UNIX)
    play.coordinator_did(actions)
    return actions


def altered(lab, name, envelope, **changes):
    """A device's message with some fields changed, signed by that device."""
    message = wire.decode(envelope).message
    fields = {field: getattr(message, field) for field in message.__struct_fields__}
    return wire.sign(type(message)(**(fields | changes)), lab.identities[name]).envelope


def state(machine):
    """All that a round knows, deep enough to notice a change."""
    parts = {k: repr(v) for k, v in vars(machine).items() if k != "_rng"}
    if machine._aggregator is not None:
        inner = vars(machine._aggregator)
        parts |= {"sum." + k: repr(v) for k, v in inner.items()}
    return parts


def refused(play, name, envelope, match, error=RefusedError):
    """The message is refused, and changes nothing."""
    before = state(play.machine)
    with pytest.raises(error, match=match) as caught:
        hand(play, name, envelope)
    assert state(play.machine) == before
    return caught.value


@pytest.fixture
def lab():
    return Lab(4)


# -- the table ------------------------------------------------------------------------------------


def test_every_phase_ends_in_the_next_one_or_is_abandoned():
    for phase, following in zip(list(Phase)[:6], list(Phase)[1:7], strict=True):
        assert TRANSITIONS[phase] == {Event.ENOUGH: following, Event.TOO_FEW: Phase.ABANDONED}
    assert TRANSITIONS[Phase.DONE] == TRANSITIONS[Phase.ABANDONED] == {}


def test_a_round_goes_through_all_phases(lab):
    assert lab.round().run().moves == list(Phase)[:7]


def test_a_result_before_there_is_one(lab):
    play = lab.round()
    with pytest.raises(LocalProtocolError, match="only a completed round"):
        play.machine.publish_result(bytes(32), np.zeros(1, np.uint32))
    held(play, "ViewVote")
    with pytest.raises(LocalProtocolError, match="only a completed round"):
        play.machine.publish_result(bytes(32), np.zeros(1, np.uint32))


def test_a_round_can_be_given_up_from_outside_once(lab):
    play = lab.round()
    held(play, "Shares")
    play.coordinator_did(play.machine.abandon("the operator said stop"))
    assert play.abandoned == coordinator.Abandoned("the operator said stop", False)
    assert play.machine.over
    assert play.machine.abandon("again") == []
    play.drain()
    assert {end.outcome for end in play.ended.values()} == {"abandoned: the operator said stop"}


def test_a_long_reason_is_cut_for_the_wire(lab):
    play = lab.round()
    play.open()
    actions = play.machine.abandon("x" * 1000)
    notice = next(a for a in actions if isinstance(a, coordinator.Publish)).message.message
    assert notice.reason == "x" * 300


@pytest.mark.parametrize("kind", WANTED)
def test_whether_updates_may_have_left_when_a_round_is_given_up(lab, kind):
    play = lab.round()
    held(play, kind)
    play.coordinator_did(play.machine.abandon("stop"))
    assert play.abandoned.after_uploads is (kind in ("MaskedUpdate", "ViewVote", "Reveal"))


def test_the_head_says_what_was_settled(lab):
    spec = lab.spec(value_bits=11, clip=2.5, metric_clips=(3.0, 4.0), w_max=77)
    play = lab.round(spec)
    for name in lab.names:
        lab.sessions[name] = lab.session(name, policy=Policy())
    held_back = {}
    play.intercept = lambda mail: (
        held_back.update({mail.kind: mail.message}) or () if mail.kind == "Manifest" else (mail,)
    )
    play.open()
    play.drain()
    head, call = held_back["Manifest"].head, spec.call
    assert (head.fleet, head.run, head.round) == (call.fleet, call.run, call.round)
    assert (head.plan, head.model, head.revision) == (call.plan, call.model, call.revision)
    assert (head.n, head.n_params, head.n_min) == (4, lab.n_params, call.n_min)
    assert (head.value_bits, head.bits, head.lane_bits) == (11, 13, 16)
    assert (head.degree, head.min_side, head.committee, head.threshold) == (3, 0, 4, 3)
    assert (head.clip, head.metric_clips, head.w_max) == (2.5, (3.0, 4.0), 77)
    assert (head.work, head.prg, head.issued_unix) == (spec.work, "chacha20", NOW_UNIX)
    assert (head.share_s, head.collect_s, head.unmask_s) == (10.0, 20.0, 10.0)


def test_a_round_that_cannot_be_encoded_is_a_bug_of_ours(lab):
    play = lab.round(value_bits=25)
    with pytest.raises(LocalProtocolError, match="cannot be encoded: value_bits is 25"):
        play.run()


def test_progress_counts_answers(lab):
    play = lab.round()
    kept = held(play, "Shares")
    assert play.machine.progress == (0, 4)
    hand(play, lab.names[0], kept[lab.names[0]])
    assert play.machine.progress == (1, 4)


# -- gathering ------------------------------------------------------------------------------------


def test_gathering_ends_when_everyone_present_has_answered(lab):
    play = lab.round()
    kept = held(play, "CheckIn")
    for name in lab.names[:3]:
        hand(play, name, kept[name])
    assert play.machine.phase is Phase.GATHER
    hand(play, lab.names[3], kept[lab.names[3]])
    assert play.machine.phase is Phase.SHARE


def test_gathering_ends_with_twice_as_many_as_wanted():
    # Enough to choose from by chance, though others are still awaited.
    lab = Lab(8)
    play = lab.round(goal=3)
    kept = held(play, "CheckIn")
    for name in lab.names[:6]:
        assert play.machine.phase is Phase.GATHER
        hand(play, name, kept[name])
    assert play.machine.phase is Phase.SHARE
    assert play.machine.cohort.n == 3


def test_the_absent_are_waited_for_only_a_moment(lab):
    play = lab.round(goal=3)
    kept = held(play, "CheckIn")
    play.leave(lab.names[3])
    for name in lab.names[:3]:
        hand(play, name, kept[name])
    # The three who are present have answered, the fourth is gone: the grace period decides.
    assert play.machine.phase is Phase.SHARE or play.now < 1
    play.pass_time(1.0)
    assert play.machine.phase is Phase.SHARE


def test_who_leaves_late_in_a_phase_is_waited_for_a_moment_too(lab):
    play = lab.round()
    kept = held(play, "Shares")
    play.pass_time(5.0)  # far longer than the grace period
    for name in lab.names[:3]:
        hand(play, name, kept[name])
    play.leave(lab.names[3])
    assert play.machine.phase is Phase.SHARE
    play.pass_time(0.9)
    assert play.machine.phase is Phase.SHARE
    play.pass_time(0.2)
    assert play.machine.phase is not Phase.SHARE


def test_gathering_takes_what_there_is_at_its_deadline(lab):
    play = lab.round()
    kept = held(play, "CheckIn")
    for name in lab.names[:3]:
        hand(play, name, kept[name])
    play.pass_time(9.9)
    assert play.machine.phase is Phase.GATHER
    play.pass_time(0.2)
    assert play.machine.phase is Phase.SHARE
    assert play.machine.cohort.n == 3


def test_too_few_check_in_and_the_reason_quotes_the_declines(lab):
    play = lab.round()
    kept = held(play, "CheckIn")
    hand(play, lab.names[0], kept[lab.names[0]])
    for name in lab.names[1:]:
        decline = Decline("lab", RUN, 1, name, f"busy {name}")
        hand(play, name, wire.sign(decline, lab.identities[name]).envelope)
    play.pass_time(10.0)
    assert play.abandoned.reason == (
        "1 devices checked in within 10 s; at least 3 are needed; pi-001: busy pi-001; "
        "pi-002: busy pi-002; pi-003: busy pi-003"
    )
    assert not play.abandoned.after_uploads
    assert play.machine.declined == {name: f"busy {name}" for name in lab.names[1:]}


def test_a_reason_cannot_write_on_the_operators_terminal(lab):
    play = lab.round()
    kept = held(play, "CheckIn")
    hand(play, lab.names[0], kept[lab.names[0]])
    decline = Decline("lab", RUN, 1, lab.names[1], "busy\x1b[2J\rround completed\n")
    hand(play, lab.names[1], wire.sign(decline, lab.identities[lab.names[1]]).envelope)
    play.pass_time(10.0)
    assert play.machine.declined[lab.names[1]] == "busy\ufffd[2J\ufffdround completed\ufffd"
    assert play.abandoned.reason.isprintable()


def test_a_device_that_leaves_while_we_gather_is_not_chosen(lab):
    play = lab.round(goal=3)
    kept = held(play, "CheckIn")
    for name in lab.names[:3]:
        hand(play, name, kept[name])
    said, _ = lab.sessions[lab.names[0]].leave(1, "too hot")
    hand(play, lab.names[0], said.message.envelope)
    play.pass_time(0.5)
    assert play.machine.phase is Phase.GATHER
    hand(play, lab.names[3], kept[lab.names[3]])
    assert play.machine.cohort.names({0, 1, 2}) == lab.names[1:]


def test_a_decline_for_somebody_else(lab):
    play = lab.round()
    kept = held(play, "CheckIn")
    victim, liar = lab.names[:2]
    hand(play, victim, kept[victim])
    forged = wire.sign(Decline("lab", RUN, 1, victim, "bye"), lab.identities[liar]).envelope
    refused(play, victim, forged, "not signed by", SignatureError)
    refused(play, liar, forged, "came from pi-001's topic")
    other = wire.sign(Decline("lab", RUN, 2, victim, "bye"), lab.identities[victim]).envelope
    refused(play, victim, other, "declines another round")
    other = wire.sign(Decline("lab", bytes(16), 1, victim, "bye"), lab.identities[victim]).envelope
    refused(play, victim, other, "declines another round")


def test_an_unsigned_decline_before_the_check_in_is_taken_back_by_it(lab):
    play = lab.round()
    kept = held(play, "CheckIn")
    victim, liar = lab.names[:2]
    hand(
        play, victim, wire.sign(Decline("lab", RUN, 1, victim, "?"), lab.identities[liar]).envelope
    )
    assert victim in play.machine.declined
    for name in lab.names:
        hand(play, name, kept[name])
    assert play.machine.declined == {}
    assert play.machine.cohort.n == 4


def test_check_ins_that_are_refused(lab):
    play = lab.round()
    kept = held(play, "CheckIn")
    name = lab.names[0]
    refused(play, lab.names[1], kept[name], "came from pi-001's topic")
    for changes in ({"round": 2}, {"run": bytes(16)}):
        refused(play, name, altered(lab, name, kept[name], **changes), "another round")
    refused(play, name, altered(lab, name, kept[name], fleet="barn"), "for fleet")


def test_a_device_that_is_not_admitted(lab):
    play = lab.round()
    kept = held(play, "CheckIn")
    name = lab.names[0]
    asked = []
    play.machine._admit = lambda *who: asked.append(who) or "it was retired"
    error = refused(play, name, kept[name], "may not take part: it was retired")
    assert error.sender == name
    assert asked == [(name, lab.identities[name].public)]


def test_two_different_check_ins_are_reported_and_the_first_counts(lab):
    play = lab.round()
    kept = held(play, "CheckIn")
    name = lab.names[0]
    hand(play, name, kept[name])
    assert hand(play, name, kept[name]) == []
    hand(play, name, altered(lab, name, kept[name], self_mask_commitment=bytes(32)))
    assert play.faults == [
        coordinator.Fault(name, "two different check-ins for one round: equivocation")
    ]
    for other in lab.names[1:]:
        hand(play, other, kept[other])
    assert play.machine.cohort.envelopes[0] == kept[name]


@pytest.mark.parametrize("field", ["pk_mask", "pk_seal", "self_mask_commitment"])
def test_a_copied_key_keeps_its_second_bearer_out(lab, field):
    # One copied key in the manifest would make every device refuse it.
    play = lab.round(goal=3)
    kept = held(play, "CheckIn")
    victim, thief = lab.names[:2]
    hand(play, victim, kept[victim])
    theirs = getattr(wire.decode_as(CheckIn, kept[victim]).message, field)
    # In its own place, or, if it is a key to agree with, in another's.
    places = {field} if field == "self_mask_commitment" else {"pk_mask", "pk_seal"}
    for changes in ({place: theirs} for place in sorted(places)):
        copy = altered(lab, thief, kept[thief], **changes)
        error = refused(play, thief, copy, "a key that appears twice")
        assert error.sender is None  # which of the two copied is not known
    for name in lab.names[2:]:
        hand(play, name, kept[name])
    play.pass_time(10.0)
    play.drain()
    assert set(play.completed.survivors) == set(lab.names) - {thief}


def test_one_key_in_two_places_of_one_check_in(lab):
    play = lab.round()
    kept = held(play, "CheckIn")
    name = lab.names[0]
    same = wire.decode_as(CheckIn, kept[name]).message.pk_mask
    refused(play, name, altered(lab, name, kept[name], pk_seal=same), "a key that appears twice")


def test_a_key_is_free_again_after_a_decline(lab):
    play = lab.round()
    kept = held(play, "CheckIn")
    name = lab.names[0]
    hand(play, name, kept[name])
    decline = wire.sign(Decline("lab", RUN, 1, name, "?"), lab.identities[name]).envelope
    hand(play, name, decline)
    for name in lab.names:
        hand(play, name, kept[name])
    assert play.machine.cohort.n == 4


@pytest.mark.parametrize(
    "bad",
    [bytes(32), b"\x01" + bytes(31), (2**255 - 19 + 9).to_bytes(32, "little")],
    ids=["zero", "low order", "not canonical"],
)
@pytest.mark.parametrize("field", ["pk_mask", "pk_seal"])
def test_a_key_that_nobody_can_agree_with_is_kept_out(lab, field, bad):
    # In the manifest it would make every other device fail to seal or to mask.
    play = lab.round()
    kept = held(play, "CheckIn")
    name = lab.names[0]
    refused(play, name, altered(lab, name, kept[name], **{field: bad}), "pi-000: .*X25519")


def test_a_certificate_that_ends_while_we_gather(lab):
    name = lab.names[0]
    lab.certificates[name] = lab.certify(name, lab.identities[name], not_after=NOW_UNIX + 5)
    lab.sessions[name] = lab.session(name)
    play = lab.round()
    kept = held(play, "CheckIn")
    for other in lab.names[:3]:
        hand(play, other, kept[other])
    actions = play.machine.tick(10.0, NOW_UNIX + 10)
    assert actions[-1] == coordinator.Abandoned(
        "the devices would refuse this manifest: the certificate of pi-000 has ended", False
    )
    assert play.machine.over


def test_check_ins_after_the_cohort_is_chosen_change_nothing():
    lab = Lab(4)
    play = lab.round(goal=3)
    kept = held(play, "CheckIn")
    for name in lab.names[:3]:
        hand(play, name, kept[name])
    play.pass_time(10.0)
    assert play.machine.phase is Phase.SHARE
    before = state(play.machine)
    assert hand(play, lab.names[3], kept[lab.names[3]]) == []
    assert hand(play, lab.names[0], kept[lab.names[0]]) == []
    assert state(play.machine) == before


# -- what every message must be -------------------------------------------------------------------

IN_COHORT = [kind for kind in WANTED if kind != "CheckIn"]


@pytest.mark.parametrize("kind", IN_COHORT)
def test_messages_of_another_round_sender_or_signer(lab, kind):
    play = lab.round()
    kept = held(play, kind)
    name, other = lab.names[:2]
    refused(play, name, altered(lab, name, kept[name], h=bytes(32)), "another round or manifest")
    error = refused(play, other, kept[name], "a message that names pi-000 came from pi-001's topic")
    assert error.sender is None
    refused(play, "stranger", kept[name], "not in the cohort")
    message = wire.decode(kept[name]).message
    forged = wire.sign(message, lab.identities[other]).envelope
    error = refused(play, name, forged, "not signed by pi-000", SignatureError)
    assert error.sender is None


@pytest.mark.parametrize("kind", IN_COHORT)
def test_duplicates_and_second_versions(lab, kind):
    play = lab.round()
    kept = held(play, kind)
    name = lab.names[0]
    hand(play, name, kept[name])
    before = state(play.machine)
    assert hand(play, name, kept[name]) == []
    field, value = {
        "Shares": ("boxes", wire.decode(kept[name]).message.boxes[::-1] if kind == "Shares" else 0),
        "RosterVote": ("readable", b"\x01"),
        "MaskedUpdate": ("payload", bytes(32)),
        "ViewVote": ("u3", b"\x07"),
        "Reveal": ("present", b"\x01"),
    }[kind]
    second = altered(lab, name, kept[name], **{field: value})
    (fault,) = hand(play, name, second)
    assert fault.device == name
    assert fault.reason.endswith("in one round: equivocation")
    assert state(play.machine) == before
    # A second version in somebody's name that somebody else signed is no equivocation of theirs.
    forged = wire.sign(wire.decode(second).message, lab.identities[lab.names[1]]).envelope
    refused(play, name, forged, "not signed", SignatureError)


@pytest.mark.parametrize("kind", IN_COHORT)
def test_messages_before_their_phase(lab, kind):
    play = lab.round()
    kept = held(play, kind)
    earlier = Lab(4).round()
    held(earlier, IN_COHORT[IN_COHORT.index(kind) - 1] if kind != "Shares" else "CheckIn")
    name = lab.names[0]
    error = refused(
        earlier, name, kept[name], "another round" if kind == "Shares" else "while the round is in"
    )
    assert error.sender is None  # nobody has checked the signature yet


@pytest.mark.parametrize("kind", IN_COHORT)
def test_messages_after_their_phase_change_nothing(lab, kind):
    play = lab.round()
    kept = held(play, kind)
    for name in lab.names[1:]:
        hand(play, name, kept[name])
    if play.machine.phase is WANTED[kind]:
        play.leave(lab.names[0])
        play.pass_time(1.0)
    play.drain()
    assert play.machine.phase is not WANTED[kind]
    before = state(play.machine)
    late = hand(play, lab.names[0], kept[lab.names[0]])
    assert late == []
    if kind != "RosterVote" or play.machine.over:  # which tells who need not be sent boxes again
        assert state(play.machine) == before


def test_messages_that_are_not_for_the_coordinator(lab):
    play = lab.round()
    held(play, "Shares")
    for message in (lab.call(), messages.RoundAbandoned("lab", RUN, 1, "")):
        envelope = wire.sign(message, lab.identities[lab.names[0]]).envelope
        error = refused(play, lab.names[0], envelope, "not for the coordinator")
        assert error.sender is None


def test_messages_of_the_round_before_there_is_a_cohort(lab):
    play = lab.round()
    kept = held(play, "Shares")
    fresh = Lab(4).round()
    fresh.open()
    refused(fresh, lab.names[0], kept[lab.names[0]], "of another round or manifest")


# -- what is particular to each kind --------------------------------------------------------------


def test_shares_for_a_committee_of_another_size(lab):
    play = lab.round()
    kept = held(play, "Shares")
    name = lab.names[0]
    boxes = wire.decode(kept[name]).message.boxes
    for wrong in (boxes[:3], (*boxes, boxes[0])):
        error = refused(play, name, altered(lab, name, kept[name], boxes=wrong), "has 4 members")
        assert error.sender == name


@pytest.mark.parametrize(
    ("kind", "changes", "match"),
    [
        ("RosterVote", {"u2": b"\x07", "readable": b"\x07"}, "votes for another roster"),
        ("RosterVote", {"readable": b"\x1f"}, "does not fit a cohort of 4"),
        ("RosterVote", {"u2": b"\x0f\x00"}, "does not fit a cohort of 4"),
        ("MaskedUpdate", {"u2": b"\x07"}, "masked for another roster"),
        ("MaskedUpdate", {"payload_bytes": 1}, "an update of this round has 95"),
        ("ViewVote", {"u3": b"\x07"}, "votes for another view"),
        ("ViewVote", {"u2": b"\x07"}, "votes for another view"),
        ("Reveal", {"u3": b"\x07"}, "reveals for another view"),
        ("Reveal", {"present": b"\x07"}, "wrong number of shares"),
        ("Reveal", {"box": bytes(48)}, "sealed box does not open"),
    ],
)
def test_votes_updates_and_reveals_of_something_else(lab, kind, changes, match):
    play = lab.round()
    kept = held(play, kind)
    name = lab.names[0]
    error = MalformedError if "fit" in match or "wrong number" in match else RefusedError
    refused(play, name, altered(lab, name, kept[name], **changes), match, error)
    # The true one is welcome still.
    hand(play, name, kept[name])


def test_a_vote_that_claims_more_boxes_than_its_roster_has():
    lab = Lab(5)
    play = lab.round()
    play.on_train = lambda name: False
    kept = held(play, "Shares")
    for name in lab.names[:4]:
        hand(play, name, kept[name])
    votes = {}
    play.intercept = lambda mail: (
        votes.update({mail.sender: mail.envelope}) or () if mail.kind == "RosterVote" else (mail,)
    )
    play.leave(lab.names[4])
    play.pass_time(1.0)
    play.drain()
    name = lab.names[0]
    vote = altered(lab, name, votes[name], readable=b"\x1f")
    refused(play, name, vote, "claims boxes that its roster does not have")


def test_an_update_of_a_device_that_is_not_on_the_roster():
    lab = Lab(4)
    play = lab.round()
    shares = held(play, "Shares")
    for name in lab.names[:3]:
        hand(play, name, shares[name])
    play.machine._present.discard(lab.names[3])
    play.intercept = lambda mail: () if mail.kind == "MaskedUpdate" else (mail,)
    play.pass_time(1.0)
    play.drain()
    assert play.machine.phase is Phase.COLLECT
    name = lab.names[3]
    update = messages.MaskedUpdate(play.machine.cohort.h, name, b"\x07", bytes(32), 95)
    envelope = wire.sign(update, lab.identities[name]).envelope
    refused(play, name, envelope, "masked for another roster")
    with pytest.raises(LocalProtocolError, match="not expected"):
        play.machine.uploaded(name, bytes(95), play.now, NOW_UNIX)


# -- uploads --------------------------------------------------------------------------------------


def test_an_upload_that_nobody_announced_is_a_bug_of_ours(lab):
    play = lab.round()
    held(play, "MaskedUpdate")
    before = state(play.machine)
    with pytest.raises(LocalProtocolError, match="not expected"):
        play.machine.uploaded(lab.names[0], play.uploads[lab.names[0]], play.now, NOW_UNIX)
    with pytest.raises(RefusedError, match="not in the cohort"):
        play.machine.uploaded("stranger", b"", play.now, NOW_UNIX)
    assert state(play.machine) == before


def test_an_upload_twice_counts_once(lab):
    play = lab.round()
    kept = held(play, "MaskedUpdate")
    name = lab.names[0]
    hand(play, name, kept[name])
    before = state(play.machine)
    assert play.machine.uploaded(name, play.uploads[name], play.now, NOW_UNIX) == []
    assert state(play.machine) == before
    for other in lab.names[1:]:
        hand(play, other, kept[other])
    assert play.machine.phase is Phase.VIEW
    assert play.machine.uploaded(name, play.uploads[name], play.now, NOW_UNIX) == []
    play.drain()
    assert play.mismatches() == 0


@pytest.mark.parametrize("damage", [lambda p: p[:-1], lambda p: p + b"\0", lambda p: b"\xff" * 95])
def test_an_upload_that_is_no_packed_update(damage):
    # The digest fits, so that the device itself sent this: it is left out, and the round goes on.
    lab = Lab(4, n_params=40)
    play = lab.round()
    kept = held(play, "MaskedUpdate")
    name = lab.names[0]
    hand(play, name, altered(lab, name, kept[name], payload=bytes(32)))
    before = state(play.machine)
    with pytest.raises(MalformedError) as caught:
        play.machine.uploaded(name, damage(play.uploads[name]), play.now, NOW_UNIX)
    assert caught.value.sender == name
    assert state(play.machine) == before
    for other in lab.names[1:]:
        hand(play, other, kept[other])
    play.pass_time(20.0)
    play.drain()
    assert play.completed.survivors == tuple(lab.names[1:])
    assert play.mismatches() == 0


# -- waiting --------------------------------------------------------------------------------------

LIMITS = {"Shares": 10, "RosterVote": 10, "MaskedUpdate": 20, "ViewVote": 10, "Reveal": 10}


@pytest.mark.parametrize("kind", IN_COHORT)
def test_a_silent_device_that_is_present_is_waited_for_until_the_deadline(kind):
    lab = Lab(4)
    play = lab.round()
    kept = held(play, kind)
    hand(play, lab.names[0], kept[lab.names[0]])
    hand(play, lab.names[1], kept[lab.names[1]])
    play.pass_time(LIMITS[kind] - 0.1)
    assert play.machine.phase is WANTED[kind]
    play.pass_time(0.2)
    assert play.abandoned.reason.startswith("2 ")
    assert play.machine.over


@pytest.mark.parametrize("kind", IN_COHORT)
def test_a_device_that_is_gone_is_waited_for_only_a_moment(kind):
    lab = Lab(4)
    play = lab.round()
    kept = held(play, kind)
    hand(play, lab.names[0], kept[lab.names[0]])
    hand(play, lab.names[1], kept[lab.names[1]])
    play.leave(lab.names[2])
    play.leave(lab.names[3])
    play.pass_time(0.9)
    assert play.machine.phase is WANTED[kind]
    play.pass_time(0.2)
    assert play.machine.over


def test_who_declined_is_not_waited_for_but_may_still_vote(lab):
    play = lab.round()
    play.on_train = lambda name: name != lab.names[0] or play.fail_training(name)
    play.run()
    assert play.now < 1
    assert play.completed.dropped == (lab.names[0],)
    assert play.sent(messages.ViewVote, lab.names[0])


def test_what_nobody_answers_is_repeated(lab):
    play = lab.round()
    held(play, "Shares")
    again = play.machine.tick(2.9, NOW_UNIX)
    assert again == []
    (again,) = play.machine.tick(3.0, NOW_UNIX)
    assert isinstance(again.message.message, messages.Manifest)
    assert again.to is None
    assert play.machine.tick(5.9, NOW_UNIX) == []
    assert len(play.machine.tick(6.0, NOW_UNIX)) == 1


def test_boxes_are_repeated_to_who_has_not_voted(lab):
    play = lab.round()
    kept = held(play, "RosterVote")
    hand(play, lab.names[0], kept[lab.names[0]])
    again = play.machine.tick(3.0, NOW_UNIX)
    assert [p.to for p in again] == lab.names[1:]
    for name in lab.names[1:3]:  # a quorum: the roster goes out
        hand(play, name, kept[name])
    # The fourth may be needed as a member, and gets its boxes until it votes or goes.
    again = play.machine.tick(6.0, NOW_UNIX)
    assert [p.message.message.LABEL for p in again] == ["delivery", "roster"]
    assert again[0].to == lab.names[3]
    assert hand(play, lab.names[3], kept[lab.names[3]]) == []
    again = play.machine.tick(9.0, NOW_UNIX)
    assert [p.message.message.LABEL for p in again] == ["roster"]


def test_a_late_roster_vote_must_be_a_sound_one(lab):
    play = lab.round()
    kept = held(play, "RosterVote")
    for name in lab.names[:3]:
        hand(play, name, kept[name])
    name = lab.names[3]
    refused(play, name, altered(lab, name, kept[name], u2=b"\x07", readable=b"\x07"), "another")
    forged = wire.sign(wire.decode(kept[name]).message, lab.identities[lab.names[0]]).envelope
    refused(play, name, forged, "not signed", SignatureError)


def test_roster_and_proposal_are_repeated_for_who_missed_them(lab):
    play = lab.round()
    held(play, "ViewVote")
    labels = [p.message.message.LABEL for p in play.machine.tick(3.0, NOW_UNIX)]
    assert labels == ["roster", "view proposal"]
    play = Lab(4).round()
    held(play, "Reveal")
    labels = [p.message.message.LABEL for p in play.machine.tick(3.0, NOW_UNIX)]
    assert labels == ["roster", "view proposal", "view"]


def test_a_round_that_is_over_says_nothing_more(lab):
    play = lab.round().run()
    assert play.machine.tick(play.now + 100, NOW_UNIX) == []
    assert play.machine.presence(lab.names[0], False, play.now, NOW_UNIX) == []
    before = state(play.machine)
    for mail in play.seen:
        if mail.sender is not None and mail.kind != "Decline":
            assert hand(play, mail.sender, mail.envelope) == []
    assert state(play.machine) == before


# -- boxes that do not open -----------------------------------------------------------------------


@pytest.mark.parametrize(("deniers", "blamed"), [(2, True), (1, False)])
def test_boxes_that_too_few_can_open(deniers, blamed):
    # One member of four may lie about a box (n - t = 1). What two say, only its sender can cause.
    lab = Lab(4)
    play = lab.round()
    kept = held(play, "RosterVote")
    sender = lab.names[3]
    for name in lab.names[:deniers]:
        hand(play, name, altered(lab, name, kept[name], readable=b"\x07"))
    voters = lab.names[deniers : 4 if blamed else 3]
    for name in voters:
        hand(play, name, kept[name])
    play.pass_time(10.0)
    assert play.abandoned.reason == "fewer than 3 members can open the shares of pi-003"
    assert play.abandoned.blamed == ((sender,) if blamed else ())
    assert not play.abandoned.after_uploads


def test_a_box_that_enough_others_can_open(lab):
    play = lab.round()
    kept = held(play, "RosterVote")
    hand(play, lab.names[0], altered(lab, lab.names[0], kept[lab.names[0]], readable=b"\x07"))
    for name in lab.names[1:3]:
        hand(play, name, kept[name])
    assert play.machine.phase is Phase.ROSTER  # two can open it; three are needed
    hand(play, lab.names[3], kept[lab.names[3]])
    play.drain()
    assert play.mismatches() == 0


# -- spec -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("goal", "over", "n_min", "limit"),
    [(10, 0.0, 3, 10), (10, 0.25, 3, 13), (2, 0.0, 5, 5), (120, 0.5, 3, 128), (3, 0.1, 3, 4)],
)
def test_how_many_are_chosen_at_most(lab, goal, over, n_min, limit):
    spec = lab.spec(call=lab.call(n_min=n_min), goal=goal, over_selection=over)
    assert spec.cohort_limit == limit


def test_the_reason_names_the_larger_of_threshold_and_minimum(lab):
    play = lab.round(lab.spec(call=lab.call(n_min=4)))
    kept = held(play, "Shares")
    for name in lab.names[:3]:
        hand(play, name, kept[name])
    play.pass_time(10.0)
    assert play.abandoned.reason == (
        "3 of the committee's 4 members sent their shares; 4 are needed"
    )


def test_the_call_is_retained(lab):
    (publish, moved) = lab.round().machine.open(0.0)
    assert publish.retain
    assert publish.message.message == lab.call()
    assert moved == coordinator.Moved(Phase.GATHER, "4 devices present")


def test_a_goal_below_the_minimum_is_no_reason_to_stop_early(lab):
    # Without over-selection everyone is waited for, whatever the goal says.
    play = lab.round(lab.spec(call=lab.call(n_min=4), goal=2))
    kept = held(play, "MaskedUpdate")
    for name in lab.names[:3]:
        hand(play, name, kept[name])
    assert play.machine.phase is Phase.COLLECT
    hand(play, lab.names[3], kept[lab.names[3]])
    play.drain()
    assert play.completed.survivors == tuple(lab.names)


def test_a_liar_is_looked_for_twice_and_not_at_every_message(monkeypatch):
    # At the first quorum of reveals, and when everyone who is there has revealed.
    lab = Lab(7)
    play = lab.round()
    votes = held(play, "ViewVote")
    lie(lab, lab.names[0])
    reveals = {}
    play.intercept = lambda mail: (
        reveals.update({mail.sender: mail.envelope}) or () if mail.kind == "Reveal" else (mail,)
    )
    for name in lab.names:
        hand(play, name, votes[name])
    play.drain()
    tried = []
    finish = Aggregator.finish
    monkeypatch.setattr(
        Aggregator, "finish", lambda self: tried.append(self.n_reveals) or finish(self)
    )
    for name in lab.names:
        play.pass_time(0.1)
        hand(play, name, reveals[name])
    assert tried == [5, 7]
    assert [fault.device for fault in play.faults] == [lab.names[0]]
    assert play.mismatches() == 0
