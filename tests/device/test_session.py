"""The device's phase table: what it answers, what it remembers, what it ignores, when it leaves.

What it refuses of a lying coordinator is in tests/attacks.
"""

import hashlib
from dataclasses import replace

import numpy as np
import pytest

from covey_device import session as device
from covey_device.policy import Policy
from covey_device.session import Event, Memory, Phase
from covey_shared import keys, wire
from covey_shared.errors import LocalProtocolError, RefusedError, SignatureError
from covey_shared.messages import (
    CheckIn,
    Decline,
    MaskedUpdate,
    Result,
    Reveal,
    RosterVote,
    RoundAbandoned,
    Shares,
    ViewVote,
    WantUpload,
)
from lab import RUN, Lab
from mallory import Mallory, declined, published

STEPS = ("gather", "share", "deliver", "collect", "propose", "reveal")


def played(lab, *, until, round_id=1, **call):
    """An honest round up to and with one step."""
    mallory = Mallory(lab, round_id, **call)
    for step in STEPS[: STEPS.index(until) + 1]:
        getattr(mallory, step)()
    return mallory


def kinds(actions):
    return [
        type(a.message.message) if isinstance(a, device.Publish) else type(a)
        for a in actions
        if not isinstance(a, device.Fetch)
    ]


def state(session):
    """All that a session knows, deep enough to notice a change."""
    inner = session._round
    parts = [session.phase, session._memory]
    if inner is not None:
        parts += [inner.call, inner.payload, inner.ring is None, dict(inner.answered)]
        for machine in (inner.participant, inner.member):
            if machine is not None:
                parts.append({k: repr(v) for k, v in vars(machine).items() if k != "_rng"})
    return parts


@pytest.fixture
def lab():
    return Lab(4)


# -- the table ------------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", Phase)
@pytest.mark.parametrize("event", Event)
def test_an_event_outside_the_table_raises_and_changes_nothing(lab, phase, event):
    session = lab.sessions[lab.names[0]]
    session.phase = phase
    if event in device.TRANSITIONS[phase]:
        assert session._next(event) in Phase
    else:
        before = state(session)
        with pytest.raises(LocalProtocolError, match=event.value):
            session._next(event)
        assert state(session) == before


def test_every_phase_but_idle_can_end_and_be_called_away():
    for phase, events in device.TRANSITIONS.items():
        assert events[Event.CALL] is Phase.FETCHING
        assert (Event.END in events) is (phase is not Phase.IDLE)


def test_a_device_speaks_in_this_order(lab):
    name = lab.names[0]
    mallory = Mallory(lab)
    said = kinds(mallory.tell(name, mallory.call))
    for other in lab.names[1:]:
        mallory.tell(other, mallory.call)
    mallory.gather()  # the call again: the check-in again
    said += kinds(mallory.tell(name, mallory.manifest()))
    mallory.share()
    said += kinds(mallory.tell(name, mallory.delivery(name)))
    mallory.deliver()
    said += kinds(mallory.tell(name, mallory.roster()))
    mallory.collect()
    said += kinds(mallory.tell(name, mallory.proposal()))
    mallory.propose()
    said += kinds(mallory.tell(name, mallory.view()))
    assert said == [
        device.Save,
        CheckIn,
        Shares,
        device.Train,
        device.Save,
        RosterVote,
        device.Keep,
        device.Save,
        MaskedUpdate,
        device.Upload,
        device.Save,
        ViewVote,
        Reveal,
    ]
    assert lab.sessions[name].phase is Phase.REVEALED


# -- memory ---------------------------------------------------------------------------------------


def test_what_a_device_must_not_do_twice_is_saved_before_it_is_done(lab):
    name = lab.names[0]
    play = lab.round().run()
    order = kinds(play.actions[name])
    for kind in (CheckIn, RosterVote, MaskedUpdate, ViewVote):
        assert order[order.index(kind) - 1] is device.Save
    joined, roster, update, view = lab.saved[name]
    assert (joined.last_round, joined.contributed, joined.votes) == (1, {}, ())
    assert joined.day.rounds == 1
    assert [vote.kind for vote in roster.votes] == [RosterVote.LABEL]
    assert update == replace(roster, contributed={lab.model.hex(): 0})
    assert [vote.kind for vote in view.votes] == [RosterVote.LABEL, ViewVote.LABEL]
    for kind, vote in zip((RosterVote, ViewVote), view.votes, strict=True):
        [sent] = published(play.actions[name], kind)
        assert (vote.h, vote.body) == (sent.message.h, hashlib.sha256(sent.body).digest())


@pytest.mark.parametrize("until", STEPS)
def test_a_restarted_device_never_rejoins_its_round(until):
    lab = Lab(3)
    mallory = played(lab, until=until)
    name = lab.names[0]
    lab.kept[name] = None  # nor is there an upload to finish; see test_unfinished
    session = lab.restart(name)
    [decline] = published(mallory.tell(name, mallory.call), Decline)
    assert "restarted" in decline.message.reason
    assert mallory.tell(name, mallory.call) == []  # told once
    said = [mallory.manifest()]
    if mallory.cohort is not None:
        said += [mallory.delivery(name)] if mallory.u2 else []
        said += [mallory.roster(), mallory.proposal(), mallory.view()]
    for message in said:
        with pytest.raises(RefusedError, match="not in"):
            mallory.tell(name, message)
    assert session.phase is Phase.IDLE
    later = Mallory(lab, 2, model=bytes(32))
    assert published(later.tell(name, later.call), CheckIn)


def test_keys_are_fresh_after_a_restart(lab):
    name = lab.names[0]
    first = Mallory(lab).gather().check_ins[name]
    lab.restart(name)
    second = Mallory(lab, 2).gather().check_ins[name]
    a, b = (wire.decode_as(CheckIn, envelope).message for envelope in (first, second))
    ours = {a.pk_mask, a.pk_seal, a.self_mask_commitment}
    assert not ours & {b.pk_mask, b.pk_seal, b.self_mask_commitment}


def test_a_crash_before_the_check_in_costs_nothing(lab):
    # Nothing was saved, and nothing was said: the round may still be joined.
    name = lab.names[0]
    call = wire.sign(lab.call(), lab.coordinator_key).envelope
    assert isinstance(lab.sessions[name].receive(call)[0], device.Fetch)
    lab.restart(name)
    mallory = Mallory(lab)
    assert published(mallory.tell(name, mallory.call), CheckIn)


def test_an_older_call_cannot_undo_a_newer_one(lab):
    # While it fetches for round 5, the network plays back the call of round 3, which this device
    # never saw: following it would make it forget that it was in round 5.
    name = lab.names[0]
    session = lab.sessions[name]
    old, new = (
        wire.sign(lab.call(r, model=bytes([r]) * 32), lab.coordinator_key).envelope for r in (3, 5)
    )
    assert isinstance(session.receive(new)[0], device.Fetch)
    assert session.receive(old) == []
    assert session.round_id == 5
    session.leave(5, "the plan cannot be read")
    assert session.receive(old) == []
    assert session.receive(new) == []


def test_rounds_only_go_forward(lab):
    name = lab.names[0]
    mallory = Mallory(lab, 7)
    mallory.gather()
    for round_id in (1, 6):
        assert mallory.tell(name, lab.call(round_id, model=bytes(32))) == []
    assert lab.sessions[name].round_id == 7
    # Another run's numbers are no way around it either.
    assert mallory.tell(name, lab.call(6, run=bytes(16), model=bytes(32))) == []


def test_a_newer_call_ends_the_round_before(lab):
    mallory = played(lab, until="share")
    name = lab.names[0]
    actions = mallory.tell(name, lab.call(2, model=bytes(32)))
    ended = next(a for a in actions if isinstance(a, device.Ended))
    assert ended == device.Ended(1, "another round was called", contributed=False)
    assert published(actions, CheckIn)[0].message.round == 2
    assert lab.sessions[name].phase is Phase.CHECKED_IN
    with pytest.raises(RefusedError):  # the old round's mail finds nobody
        mallory.tell(name, mallory.delivery(name))


def test_a_newer_call_stops_the_training(lab):
    name = lab.names[0]
    mallory = Mallory(lab).gather()
    session = lab.sessions[name]
    session.receive(wire.sign(mallory.manifest(), lab.coordinator_key).envelope)
    actions = session.receive(wire.sign(lab.call(2), lab.coordinator_key).envelope)
    assert kinds(actions) == [device.StopTraining, device.Ended]
    assert session.trained(1, *lab.update(name, 1)) == []


# -- contributing once ----------------------------------------------------------------------------


def test_a_model_is_contributed_to_once(lab):
    played(lab, until="collect")
    for name in lab.names:
        actions = Mallory(lab, 2).tell(name, lab.call(2))
        assert declined(actions) == "this device already contributed to this model"
        assert len(published(actions, Decline)) == 1
        assert not published(actions, CheckIn)


def test_a_model_may_be_asked_for_again_after_an_abandoned_round(lab):
    name = lab.names[0]
    played(lab, until="collect")
    again = played(lab, until="collect", round_id=2, revision=3)
    assert set(again.updates) == set(lab.names)
    assert lab.saved[name][-1].last_round == 2
    assert lab.saved[name][-1].contributed == {lab.model.hex(): 3}
    for revision in (0, 3):  # each revision once, and never back
        actions = again.tell(name, lab.call(4 + revision, revision=revision))
        assert "already contributed" in declined(actions)


def test_a_round_that_took_no_update_leaves_no_trace(lab):
    played(lab, until="deliver")
    again = played(lab, until="collect", round_id=2)
    assert set(again.updates) == set(lab.names)


def test_the_memory_of_contributions_survives_a_restart(lab):
    name = lab.names[0]
    played(lab, until="collect")
    lab.restart(name)
    actions = Mallory(lab, 2).tell(name, lab.call(2))
    assert "already contributed" in declined(actions)


# -- the owner's policy ---------------------------------------------------------------------------


def test_a_model_is_not_asked_for_without_end(lab):
    name = lab.names[0]
    mallory = Mallory(lab)
    bound = lab.policy.max_revisions
    assert f"allows {bound}" in declined(mallory.tell(name, lab.call(1, revision=bound + 1)))
    assert published(mallory.tell(name, lab.call(2, revision=bound)), CheckIn)


@pytest.mark.parametrize(
    ("policy", "head", "because"),
    [
        (Policy(min_cohort=4), {"n_min": 3}, "takes part among at least 4"),
        (Policy(max_weight=999), {}, "this device allows 999"),
    ],
)
def test_the_owners_bounds_hold_for_the_manifest(lab, policy, head, because):
    name = lab.names[0]
    lab.sessions[name] = lab.session(name, policy=policy)
    mallory = Mallory(lab, n_min=4).gather()
    assert because in declined(mallory.tell(name, mallory.manifest(**head)))


def test_bounds_that_are_just_met(lab):
    name = lab.names[0]
    lab.sessions[name] = lab.session(name, policy=Policy(min_cohort=3, max_weight=1000))
    mallory = Mallory(lab).gather()
    assert published(mallory.tell(name, mallory.manifest()), Shares)


# -- the same again -------------------------------------------------------------------------------


def test_the_same_bytes_get_the_same_answer(lab):
    name = lab.names[0]
    mallory = Mallory(lab)
    answers = []
    steps = [
        ("gather", lambda: mallory.call),
        ("share", lambda: mallory.manifest()),
        ("deliver", lambda: mallory.delivery(name)),
        ("collect", lambda: mallory.roster()),
        ("propose", lambda: mallory.proposal()),
        ("reveal", lambda: mallory.view()),
    ]
    for step, message in steps:
        getattr(mallory, step)()
        before = state(lab.sessions[name])
        again = mallory.tell(name, message())
        assert all(
            isinstance(a, device.Publish) for a in again
        )  # nothing is trained or saved twice
        assert mallory.tell(name, message()) == again
        assert state(lab.sessions[name]) == before
        answers += [a.message for a in again]
    assert [type(a.message) for a in answers] == [
        CheckIn, Shares, RosterVote, MaskedUpdate, ViewVote, Reveal,
    ]  # fmt: skip
    assert answers[0].envelope == mallory.check_ins[name]
    assert answers[3].envelope == mallory.updates[name].envelope
    assert answers[5].envelope == mallory.reveals[name].envelope


def test_the_roster_again_brings_the_digest_of_a_late_update(lab):
    # The roster came while the device was still training; its first answer was empty.
    name = lab.names[0]
    session = lab.sessions[name]
    mallory = Mallory(lab).gather()
    session.receive(wire.sign(mallory.manifest(), lab.coordinator_key).envelope)
    mallory.share().deliver()
    assert mallory.tell(name, mallory.roster()) == []
    assert session.phase is Phase.ROSTERED
    sent = session.trained(1, *lab.update(name, 1))
    digest = published(sent, MaskedUpdate)[0]
    again = mallory.tell(name, mallory.roster())
    assert [a.message.envelope for a in again] == [digest.envelope]


@pytest.mark.parametrize(
    ("until", "other"),
    [
        ("share", lambda m: m.manifest(clip=2.0)),
        ("collect", lambda m: m.roster(votes=tuple(m.roster_votes.values())[1:])),
        ("propose", lambda m: m.proposal(m.u3 - {0})),
        ("reveal", lambda m: m.view(votes=tuple(m.view_votes.values())[1:])),
    ],
)
def test_other_bytes_for_what_was_answered_are_dropped(lab, until, other):
    mallory = played(lab, until=until)
    for name in lab.names:
        before = state(lab.sessions[name])
        with pytest.raises(device.OutOfOrderError):
            mallory.tell(name, other(mallory))
        assert state(lab.sessions[name]) == before


def test_other_boxes_after_the_view_are_dropped(lab):
    mallory = played(lab, until="propose")
    name = lab.names[0]
    before = state(lab.sessions[name])
    with pytest.raises(device.OutOfOrderError):
        mallory.tell(name, mallory.delivery(name, mallory.u2 - {3}))
    assert state(lab.sessions[name]) == before


def test_a_second_delivery_ends_the_round(lab):
    mallory = played(lab, until="deliver")
    name = lab.names[0]
    actions = mallory.tell(name, mallory.delivery(name, mallory.u2 - {3}))
    assert declined(actions) == "a second delivery for one round: equivocation"
    assert published(actions, RosterVote) == []


# -- out of order ---------------------------------------------------------------------------------


def early(mallory, name):
    """What may overtake what, with the step after which it would have been in order."""
    return {
        "share": [mallory.delivery(name), mallory.roster(), mallory.proposal(), mallory.view()],
        "deliver": [mallory.proposal(), mallory.view()],
        "collect": [mallory.view()],
    }


@pytest.mark.parametrize("step", ["share", "deliver", "collect"])
def test_what_comes_too_early_is_dropped_and_may_come_again(step):
    lab = Lab(3)
    name, others = lab.names[0], lab.names[1:]
    # The others' round, with this device's part in it, goes ahead in a twin of the lab.
    twin = played(Lab(3), until="reveal")
    mallory = Mallory(lab)
    mallory.reveal_key = twin.reveal_key
    mallory.gather()
    assert mallory.check_ins == twin.check_ins
    order = [
        ("share", twin.manifest()),
        ("deliver", twin.delivery(name)),
        ("collect", twin.roster()),
        ("propose", twin.proposal()),
        ("reveal", twin.view()),
    ]
    for at, (now, message) in enumerate(order):
        if now == step:
            for _, too_early in order[at + 1 + (step == "deliver") :]:
                before = state(lab.sessions[name])
                with pytest.raises(RefusedError):
                    mallory.tell(name, too_early)
                assert state(lab.sessions[name]) == before
        mallory.tell(name, message)
    assert lab.sessions[name].phase is Phase.REVEALED
    assert others  # played by the twin


def test_the_roster_may_overtake_the_boxes(lab):
    name = lab.names[0]
    mallory = Mallory(lab).gather().share()
    for other in lab.names[1:]:
        vote = published(mallory.tell(other, mallory.delivery(other)), RosterVote)[0]
        mallory.roster_votes[other] = vote.envelope
    assert published(mallory.tell(name, mallory.roster()), MaskedUpdate)
    assert published(mallory.tell(name, mallory.delivery(name)), RosterVote)
    mallory.collect()
    assert published(mallory.tell(name, mallory.proposal(frozenset({1, 2, 3}))), ViewVote)


def test_boxes_of_another_roster_than_the_one_that_stands(lab):
    name = lab.names[0]
    mallory = Mallory(lab).gather().share()
    for other in lab.names[1:]:
        vote = published(mallory.tell(other, mallory.delivery(other)), RosterVote)[0]
        mallory.roster_votes[other] = vote.envelope
    mallory.tell(name, mallory.roster())
    actions = mallory.tell(name, mallory.delivery(name, frozenset({0, 1, 2})))
    assert "another roster than the one that stands" in declined(actions)


def test_a_proposal_before_the_boxes_is_dropped(lab):
    name = lab.names[0]
    mallory = Mallory(lab).gather().share()
    for other in lab.names[1:]:
        vote = published(mallory.tell(other, mallory.delivery(other)), RosterVote)[0]
        mallory.roster_votes[other] = vote.envelope
    mallory.collect()
    with pytest.raises(device.OutOfOrderError, match="before this device's boxes"):
        mallory.tell(name, mallory.proposal())
    assert published(mallory.tell(name, mallory.delivery(name)), RosterVote)
    assert published(mallory.tell(name, mallory.proposal()), ViewVote)


def test_a_misdirected_delivery_is_dropped(lab):
    mallory = played(lab, until="share")
    name, other = lab.names[:2]
    before = state(lab.sessions[name])
    with pytest.raises(device.OutOfOrderError, match="misdirected"):
        mallory.tell(name, mallory.delivery(other))
    assert state(lab.sessions[name]) == before
    assert published(mallory.tell(name, mallory.delivery(name)), RosterVote)


def test_messages_of_no_round_or_of_another(lab):
    name = lab.names[0]
    mallory = played(lab, until="share")
    other = played(Lab(4, seed=8), until="deliver", round_id=9)
    session = lab.sessions[name]
    for message in (
        other.manifest(),
        other.delivery(name),
        other.roster(),
        RoundAbandoned("lab", RUN, 9, "no"),
        RoundAbandoned("lab", bytes(16), 1, "no"),
    ):
        before = state(session)
        with pytest.raises(RefusedError, match="of a round this device is not in"):
            mallory.tell(name, message)
        assert state(session) == before
    fresh = lab.restart(name)
    fresh._memory = Memory()
    for message in (mallory.manifest(), mallory.delivery(name), RoundAbandoned("lab", RUN, 1, "")):
        with pytest.raises(RefusedError, match="of a round this device is not in"):
            mallory.tell(name, message)


def test_a_manifest_while_the_plan_is_still_being_fetched(lab):
    name = lab.names[0]
    session = lab.sessions[name]
    mallory = Mallory(lab).gather()
    lab.sessions[name] = session = lab.session(name)
    session.receive(wire.sign(mallory.call, lab.coordinator_key).envelope)
    with pytest.raises(device.OutOfOrderError):
        session.receive(wire.sign(mallory.manifest(), lab.coordinator_key).envelope)
    assert session.phase is Phase.FETCHING
    # The call again while fetching: there is no check-in yet to repeat, but who calls is there.
    again = session.receive(wire.sign(mallory.call, lab.coordinator_key).envelope)
    assert again == [device.Hurry()]
    assert published(session.ready(1, device.Prepared(lab.n_params, 1, 1)), CheckIn)


# -- calls ----------------------------------------------------------------------------------------


def test_a_call_for_another_fleet(lab):
    with pytest.raises(RefusedError, match="fleet 'barn'"):
        Mallory(lab).tell(lab.names[0], lab.call(fleet="barn"))


def test_another_call_of_the_same_round_changes_nothing(lab):
    name = lab.names[0]
    mallory = Mallory(lab).gather()
    answer = mallory.tell(name, lab.call(n_min=2, plan=bytes(32)))
    assert [a.message.envelope for a in answer] == [mallory.check_ins[name]]
    assert declined(mallory.tell(name, mallory.manifest(plan=bytes(32))))


def test_only_the_coordinator_is_listened_to(lab):
    name = lab.names[0]
    for key in (lab.ca, lab.identities[name], keys.SigningKey(bytes(32))):
        with pytest.raises(SignatureError):
            lab.sessions[name].receive(wire.sign(lab.call(), key).envelope)
    assert lab.sessions[name].phase is Phase.IDLE


def test_a_device_that_is_not_chosen_goes_home(lab):
    name = lab.names[0]
    mallory = Mallory(lab).gather()
    without = tuple(e for n, e in mallory.check_ins.items() if n != name)
    actions = mallory.tell(name, mallory.manifest(without))
    assert actions == [device.Ended(1, "not chosen for the cohort", contributed=False)]
    assert lab.sessions[name].phase is Phase.IDLE


# -- how it ends ----------------------------------------------------------------------------------


@pytest.mark.parametrize("until", STEPS)
def test_an_abandoned_round_ends_at_any_time(until):
    lab = Lab(3)
    mallory = played(lab, until=until)
    name = lab.names[0]
    actions = mallory.tell(name, RoundAbandoned("lab", RUN, 1, "too\x1b few"))
    uploaded = until in ("collect", "propose", "reveal")
    ended = device.Ended(1, "abandoned: too\ufffd few", contributed=False)
    assert actions == [*([device.Forget()] if uploaded else []), ended]
    assert lab.sessions[name].phase is Phase.IDLE
    assert mallory.tell(name, mallory.call) == []


def test_the_seeds_are_forgotten_at_the_end(lab):
    mallory = played(lab, until="deliver")
    name = lab.names[0]
    inner = lab.sessions[name]._round
    assert inner.participant._s
    assert inner.member._shares
    mallory.tell(name, RoundAbandoned("lab", RUN, 1, "too few"))
    assert (inner.participant._b, inner.participant._s, inner.participant._mask_key) == (
        b"", b"", None,
    )  # fmt: skip
    assert inner.member._shares == {}
    with pytest.raises(LocalProtocolError):
        inner.participant.mask(np.zeros(1, np.uint32))


def test_a_result_says_whether_the_update_counted(lab):
    mallory = played(lab, until="reveal")
    for name in lab.names:
        result = Result(
            h=mallory.cohort.h, fleet="lab", run=RUN, round=1,
            u3=mallory.cohort.bitmap({1, 2, 3}), votes=(), ring_sum=bytes(32), next_model=bytes(32),
        )  # fmt: skip
        forget, ended = mallory.tell(name, result)
        assert forget == device.Forget()
        assert ended.outcome == "completed"
        assert ended.contributed is (name != lab.names[0])
        assert lab.sessions[name].phase is Phase.IDLE


def test_a_result_of_another_manifest(lab):
    mallory = played(lab, until="share")
    result = Result(bytes(32), "lab", RUN, 1, b"\x0f", (), bytes(32), bytes(32))
    assert declined(mallory.tell(lab.names[0], result)) == "a result of another manifest"


def test_a_result_before_the_cohort_was_known(lab):
    mallory = played(lab, until="gather")
    result = Result(bytes(32), "lab", RUN, 1, b"\x0f", (), bytes(32), bytes(32))
    assert mallory.tell(lab.names[0], result) == [device.Ended(1, "completed", contributed=False)]


# -- training -------------------------------------------------------------------------------------


def training(lab, name):
    """A device in the middle of training; the others are further on."""
    mallory = Mallory(lab).gather()
    lab.sessions[name].receive(wire.sign(mallory.manifest(), lab.coordinator_key).envelope)
    return mallory.share()


def test_a_failed_training_is_declined_and_the_duties_remain(lab):
    name = lab.names[0]
    mallory = training(lab, name)
    session = lab.sessions[name]
    (said,) = session.training_failed(1, "the loss is not a number")
    assert said.message.message.reason == "the loss is not a number"
    assert session.phase is Phase.WITHDRAWN
    assert session.trained(1, *lab.update(name, 1)) == []
    mallory.deliver()
    assert name in mallory.roster_votes
    mallory.collect()
    assert set(mallory.updates) == set(lab.names[1:])
    mallory.propose().reveal()
    assert name in mallory.view_votes
    assert name in mallory.reveals


def test_a_training_that_fails_after_the_roster(lab):
    name = lab.names[0]
    mallory = training(lab, name).deliver().collect()
    session = lab.sessions[name]
    assert session.phase is Phase.ROSTERED
    assert published(session.training_failed(1, "out of memory"), Decline)
    assert session.phase is Phase.SERVING
    assert name in mallory.propose().view_votes


def test_a_device_too_slow_for_the_view_stops_training_and_votes(lab):
    name = lab.names[0]
    mallory = training(lab, name).deliver().collect()
    actions = mallory.tell(name, mallory.proposal())
    assert kinds(actions) == [device.Save, ViewVote, device.StopTraining]
    participant = lab.sessions[name]._round.participant
    assert participant._s == participant._b == b""
    assert lab.sessions[name].trained(1, *lab.update(name, 1)) == []
    assert lab.sessions[name].training_failed(1, "stopped") == []
    assert name not in mallory.payloads


def test_a_device_left_out_of_the_roster_stops_training_and_serves(lab):
    name = lab.names[0]
    mallory = training(lab, name)
    mallory.u2 -= {0}
    mallory.deliver()
    assert mallory.tell(name, mallory.roster()) == [device.StopTraining(1)]
    assert lab.sessions[name].phase is Phase.SERVING
    assert lab.sessions[name].trained(1, *lab.update(name, 1)) == []
    mallory.collect().propose().reveal()
    assert name in mallory.reveals
    assert name not in mallory.payloads


def test_a_device_left_out_after_training_throws_its_update_away(lab):
    name = lab.names[0]
    mallory = Mallory(lab).gather().share()
    inner = lab.sessions[name]._round
    assert inner.ring is not None
    mallory.u2 -= {0}
    mallory.deliver()
    assert mallory.tell(name, mallory.roster()) == []
    assert lab.sessions[name].phase is Phase.SERVING
    assert inner.ring is None
    assert inner.participant._s == b""


def test_an_update_that_cannot_be_encoded_changes_nothing(lab):
    name = lab.names[0]
    training(lab, name)
    session = lab.sessions[name]
    delta, examples, metrics = lab.update(name, 1)
    for wrong in (
        (delta[1:], examples, metrics),
        (delta, 0, metrics),
        (delta, examples, ()),
        (delta, examples, (float("nan"),)),
        (np.full_like(delta, np.inf), examples, metrics),
    ):
        before = state(session)
        with pytest.raises(LocalProtocolError):
            session.trained(1, *wrong)
        assert state(session) == before
    assert session.trained(1, delta, examples, metrics) == []
    assert session.phase is Phase.TRAINED


def test_news_of_a_round_that_is_over_is_ignored(lab):
    name = lab.names[0]
    training(lab, name)
    session = lab.sessions[name]
    before = state(session)
    assert session.trained(2, *lab.update(name, 1)) == []
    assert session.training_failed(2, "late") == []
    assert session.ready(2, device.Prepared(lab.n_params, 1, 1)) == []
    assert session.ready(1, device.Prepared(lab.n_params, 1, 1)) == []
    assert session.leave(2, "late") == []
    assert state(session) == before


# -- chunks of the update -------------------------------------------------------------------------


def test_missing_chunks_are_sent_again_and_nothing_else(lab):
    mallory = played(lab, until="deliver")
    name = lab.names[0]
    h = mallory.cohort.h
    with pytest.raises(RefusedError, match="did not send"):
        mallory.tell(name, WantUpload(h, name, bytes(32), ((0, 1),)))
    mallory.collect()
    digest = mallory.payload_digest(name)
    before = state(lab.sessions[name])
    assert mallory.tell(name, WantUpload(h, name, digest, ((0, 1), (4, 2)))) == [
        device.Upload(mallory.payloads[name], ((0, 1), (4, 2)))
    ]
    with pytest.raises(RefusedError, match="did not send"):
        mallory.tell(name, WantUpload(h, name, bytes(32), ((0, 1),)))
    assert state(lab.sessions[name]) == before


# -- declining ------------------------------------------------------------------------------------


def test_leaving_says_why(lab):
    mallory = played(lab, until="gather")
    name = lab.names[0]
    said, ended = lab.sessions[name].leave(1, "the battery is low")
    decline = said.message
    decline.check(lab.identities[name].public, signer=name)
    assert decline.message == Decline("lab", RUN, 1, name, "the battery is low")
    assert ended == device.Ended(1, "declined: the battery is low", contributed=False)
    assert mallory.tell(name, mallory.call) == []


def test_any_reason_fits_a_message(lab):
    played(lab, until="gather")
    said, _ = lab.sessions[lab.names[0]].leave(1, "x" * 1000)
    assert said.message.message.reason == "x" * 300
    said, _ = lab.sessions[lab.names[1]].leave(1, "cannot read r\udcffsum\u00e9.npz")
    assert said.message.message.reason == "cannot read r?sum\u00e9.npz"


def test_messages_that_are_not_for_devices_end_the_round(lab):
    mallory = played(lab, until="deliver")
    name = lab.names[0]
    vote = wire.decode(mallory.roster_votes[lab.names[1]]).message
    assert "not for devices" in declined(mallory.tell(name, vote))
