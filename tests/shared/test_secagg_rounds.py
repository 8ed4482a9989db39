"""Whole rounds of the real machines in memory: the sum is exact whoever vanishes, and whenever.

The network here is honest but bad: it loses, repeats and reorders. What a hostile one or a lying
coordinator does is in tests/attacks.
"""

import random

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from covey_coordinator.round import Phase
from covey_device.policy import Policy
from covey_shared import messages
from covey_shared.secagg.parameters import parameters_for
from lab import Lab, Mail, Parcel, Play, Weather

# A device's messages in the order in which it sends them.
SPOKEN = ("CheckIn", "Shares", "RosterVote", "MaskedUpdate", "ViewVote", "Reveal")
MOMENTS = [(kind, after) for kind in SPOKEN for after in (False, True)]
# Small cohorts at every moment, ten devices at half of them.
CASES = [(n, kind, after) for n in (4, 5, 10) for kind, after in MOMENTS if n < 10 or not after]


def vanishing(play: Play, victims: set, kind: str, *, after: bool) -> Play:
    """Let devices vanish for good just before, or just after, they send one kind of message."""

    def on_mail(mail: Mail):
        if mail.sender in victims and mail.sender not in play.gone and mail.kind == kind:
            play.leave(mail.sender)
            return (mail,) if after else ()
        return () if mail.sender in play.gone else (mail,)

    def on_parcel(parcel: Parcel):
        return () if parcel.sender in play.gone else (parcel,)

    play.intercept, play.intercept_parcel = on_mail, on_parcel
    return play


def victims_of(lab: Lab, count: int) -> set:
    """Devices spread over the cohort: the first one is always among them."""
    return set(random.Random(count).sample(lab.names[1:], count - 1)) | {lab.names[0]}


# -- the sum is exact -----------------------------------------------------------------------------


@pytest.mark.parametrize("n", [3, 4, 5, 10])
@pytest.mark.parametrize(("value_bits", "lane"), [(8, np.uint16), (20, np.uint32)])
def test_everyone_in_the_sum(n, value_bits, lane):
    play = Lab(n).round(value_bits=value_bits).run()
    assert play.completed.ring_sum.dtype == lane
    assert play.completed.survivors == tuple(play.lab.names)
    assert play.completed.dropped == ()
    assert play.mismatches() == 0
    assert {end.outcome for end in play.ended.values()} == {"completed"}
    assert all(end.contributed for end in play.ended.values())


@pytest.mark.parametrize("value_bits", range(4, 25))
def test_any_width(value_bits):
    lab = Lab(4, seed=value_bits, n_params=70)
    play = vanishing(lab.round(value_bits=value_bits), {lab.names[2]}, "MaskedUpdate", after=False)
    assert play.run().completed.encoding.bits == value_bits + 2
    assert play.mismatches() == 0


def test_the_decoded_average_is_the_weighted_one():
    lab = Lab(5, n_params=30)
    play = lab.round(value_bits=24, clip=4.0, w_max=500).run()
    updates = [lab.update(name, 1) for name in lab.names]
    weights = np.array([examples for _, examples, _ in updates], float)
    decoded = play.completed.encoding.decode_sum(play.completed.ring_sum)
    average = sum(w * d.astype(float) for (d, _, _), w in zip(updates, weights, strict=True))
    assert np.allclose(decoded.average, average / weights.sum(), atol=1e-5)
    assert decoded.examples == pytest.approx(weights.sum(), rel=1e-4)
    loss = sum(w * m[0] for (_, _, m), w in zip(updates, weights, strict=True)) / weights.sum()
    assert decoded.metrics[0] == pytest.approx(loss, rel=1e-4)


# -- devices vanish -------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "kind", "after"), CASES)
def test_as_many_vanish_as_the_threshold_bears(n, kind, after):
    lab = Lab(n)
    spare = n - parameters_for(n).threshold
    victims = victims_of(lab, spare)
    play = vanishing(lab.round(value_bits=12), victims, kind, after=after).run()
    assert play.mismatches() == 0
    # A device counts if its update had arrived; what becomes of it later does not matter.
    counted = kind in ("ViewVote", "Reveal")
    assert set(play.completed.survivors) == set(lab.names) - (set() if counted else victims)
    assert play.completed.encoding.n == (n - spare if (kind, after) == ("CheckIn", False) else n)


@pytest.mark.parametrize(("n", "kind", "after"), [*CASES, *((3, *m) for m in MOMENTS)])
def test_one_more_vanishes_than_the_threshold_bears(n, kind, after):
    lab = Lab(n, policy=Policy(min_cohort=2))
    threshold = parameters_for(n).threshold
    victims = victims_of(lab, n - threshold + 1)
    spec = lab.spec(call=lab.call(n_min=2), value_bits=12)
    play = vanishing(lab.round(spec), victims, kind, after=after).run()
    if (kind, after) in (("CheckIn", False), ("Reveal", True)):
        # Before, there is a smaller cohort with a threshold of its own; afterwards nothing is left
        # to do.
        assert play.mismatches() == 0
        return
    assert play.completed is None
    step = {
        ("CheckIn", True): "sent their shares",
        ("Shares", False): "sent their shares",
        ("Shares", True): "confirmed the roster",
        ("RosterVote", False): "confirmed the roster",
        ("ViewVote", True): "revealed their shares",
        ("Reveal", False): "revealed their shares",
    }.get((kind, after), "confirmed the view")
    assert play.abandoned.reason == (
        f"{threshold - 1} of the committee's {n} members {step}; {threshold} are needed"
    )
    assert play.abandoned.blamed == ()
    uploaded = "shares" not in step and "roster" not in step
    assert play.abandoned.after_uploads is (uploaded or "revealed" in step)


def test_thirty_devices_lose_nine():
    lab = Lab(30, n_params=100)
    victims = victims_of(lab, 9)
    play = vanishing(lab.round(), victims, "MaskedUpdate", after=False).run()
    assert set(play.completed.survivors) == set(lab.names) - victims
    assert play.mismatches() == 0


def test_devices_vanish_one_by_one_through_the_round():
    lab = Lab(10)
    moments = dict(zip(lab.names[3:6], ("Shares", "MaskedUpdate", "Reveal"), strict=True))
    play = lab.round()

    def on_mail(mail: Mail):
        if moments.get(mail.sender) == mail.kind:
            play.leave(mail.sender)
        return () if mail.sender in play.gone else (mail,)

    play.intercept = on_mail
    play.run()
    assert play.mismatches() == 0
    assert set(play.completed.dropped) == set(lab.names[3:5])


def test_too_few_updates_for_a_sum():
    # The committee is all there, but only two could train: two are too few to hide among.
    lab = Lab(5)
    play = lab.round()
    play.on_train = lambda name: name in lab.names[:2] or play.fail_training(name)
    play.run()
    assert play.abandoned.reason == "2 updates arrived; at least 3 are needed"
    assert play.abandoned.after_uploads


def test_exactly_enough_updates_for_a_sum():
    lab = Lab(5)
    play = lab.round()
    play.on_train = lambda name: name in lab.names[:3] or play.fail_training(name)
    play.run()
    assert play.completed.survivors == tuple(lab.names[:3])
    assert play.mismatches() == 0
    # Those who had nothing to give served as members all the same.
    assert {mail.sender for mail in play.sent(messages.Reveal)} == set(lab.names)
    assert {name for name, end in play.ended.items() if end.contributed} == set(lab.names[:3])


# -- a bad network --------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(12))
def test_everything_twice_and_in_any_order(seed):
    lab = Lab(4 + seed % 2, seed=seed)
    play = Weather(seed, repeat=1.0).over(lab.round()).run()
    assert play.completed.survivors == tuple(lab.names)
    assert play.mismatches() == 0
    assert play.faults == []


@pytest.mark.parametrize("seed", range(12))
def test_what_is_lost_is_sent_again(seed):
    # Every phase may last long enough for any message to come through in the end.
    lab = Lab(4, seed=seed)
    patient = {"share_s": 300.0, "collect_s": 300.0, "unmask_s": 300.0}
    spec = lab.spec(call=lab.call(gather_s=300.0), **patient)
    play = Weather(seed, loss=0.35, repeat=0.2).over(lab.round(spec)).run(limit_s=2000)
    assert play.completed.survivors == tuple(lab.names)
    assert play.mismatches() == 0
    assert play.faults == []


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_a_round_is_abandoned_only_when_too_few_remain(data):
    seed = data.draw(st.integers(0, 2**32 - 1))
    n = data.draw(st.sampled_from([3, 4, 5, 7]))
    lab = Lab(n, seed=seed)
    play = Weather(seed, repeat=0.3).over(lab.round())
    last_word = {
        name: data.draw(st.sampled_from([None, None, None, *SPOKEN]), label=name)
        for name in lab.names
    }
    weather = play.intercept

    def on_mail(mail: Mail):
        if mail.sender is not None and last_word[mail.sender] == mail.kind:
            play.gone.add(mail.sender)
            play.coordinator_did(play.machine.presence(mail.sender, False, play.now, 0))
        return () if mail.sender in play.gone else weather(mail)

    play.intercept = on_mail
    play.run()
    assert (play.completed is None) != (play.abandoned is None)
    cohort = play.machine.cohort
    remaining = n - len(play.gone)
    if play.completed is not None:
        assert play.mismatches() == 0
        assert len(play.completed.survivors) >= 3
    elif cohort is None:
        assert remaining < 3
        assert "checked in within 10 s; at least 3 are needed" in play.abandoned.reason
    else:
        assert remaining < max(cohort.threshold, 3)
        # Too few updates for a sum are found out before too few votes for the view are.
        fewest = (f"{cohort.threshold} are needed", "updates arrived; at least 3 are needed")
        assert play.abandoned.reason.endswith(fewest)
    assert play.faults == []


# -- stragglers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["Delivery", "Roster", "ViewProposal"])
def test_a_quorum_does_not_leave_the_others_behind(kind):
    # Three of ten miss a message that the other seven answer, so that the round goes on without
    # them. Then three of the seven vanish, and everyone who is left is needed.
    lab = Lab(10)
    late, leaving = lab.names[:3], lab.names[3:6]
    play = lab.round()
    play.scatter = True
    answer = {"Delivery": "MaskedUpdate", "Roster": "ViewVote", "ViewProposal": "Reveal"}[kind]
    # Who misses the roster has nothing to upload, and is not waited for.
    play.on_train = lambda name: name not in late or play.fail_training(name)

    def on_mail(mail: Mail):
        if mail.kind == kind and mail.to in late and play.now < 1:
            return ()
        if mail.kind == answer and mail.sender in leaving:
            play.leave(mail.sender)
        return () if mail.sender in play.gone else (mail,)

    play.intercept = on_mail
    play.run()
    assert play.mismatches() == 0
    assert {mail.sender for mail in play.sent(messages.Reveal)} >= set(late)


def test_a_device_left_out_of_the_roster_serves_on():
    # Its shares came too late. The others may need it as a member: here they do.
    lab = Lab(4)
    late, leaving = lab.names[0], lab.names[3]
    play = lab.round()

    def on_mail(mail: Mail):
        if mail.sender == late and mail.kind == "Shares":
            play.machine._present.discard(late)  # believed offline, and not waited for
            return ()
        if mail.sender == leaving and mail.kind == "Reveal":
            play.leave(leaving)
        return () if mail.sender in play.gone else (mail,)

    play.intercept = on_mail
    play.run()
    assert play.completed.survivors == tuple(lab.names[1:])
    assert play.mismatches() == 0
    assert play.sent(messages.MaskedUpdate, late) == []
    assert len(play.sent(messages.Reveal, late)) == 1
    assert not play.ended[late].contributed


# -- goal and over-selection ----------------------------------------------------------------------


def test_over_selection_goes_on_when_the_goal_is_met():
    lab = Lab(12)
    play = lab.round(goal=6, over_selection=0.4)
    slow = set()

    def on_train(name):
        if len(slow) < 3 and name != lab.names[0]:
            slow.add(name)
        return name not in slow

    play.on_train = on_train
    play.run()
    assert play.machine.cohort.n == 9
    assert len(play.completed.survivors) == 6
    assert not slow & set(play.completed.survivors)
    assert play.mismatches() == 0
    assert play.now < 20  # nobody waited for the slow
    outcomes = [end.outcome for end in play.ended.values()]
    assert outcomes.count("not chosen for the cohort") == 3
    assert outcomes.count("completed") == 9


def test_the_cohort_is_a_choice_of_chance():
    chosen = set()
    for seed in range(6):
        play = Lab(6, seed=seed).round(goal=3).run()
        assert play.machine.cohort.n == 3
        chosen.add(play.completed.survivors)
    assert len(chosen) > 1


def test_without_over_selection_the_slow_are_waited_for():
    lab = Lab(4)
    play = lab.round(goal=3)  # three are chosen
    play.on_train = lambda name: name in lab.names[:1]
    play.open()
    play.drain()
    assert play.machine.phase is Phase.COLLECT
    for name in lab.names[1:]:
        play.train(name)
    play.drain()
    assert len(play.completed.survivors) == 3


# -- one round after another ----------------------------------------------------------------------


def test_a_run_of_rounds_some_of_them_abandoned():
    lab = Lab(4)
    revision, outcomes = 0, []
    for round_id in range(1, 9):
        spec = lab.spec(call=lab.call(round_id, revision=revision), value_bits=10)
        play = lab.round(spec)
        match round_id % 4:
            case 2:  # abandoned before anyone uploads
                vanishing(play, set(lab.names[:2]), "Shares", after=False)
            case 3:  # abandoned after the uploads: asking again takes a new revision
                vanishing(play, set(lab.names[:2]), "ViewVote", after=False)
        play.run()
        if play.completed is not None:
            assert play.mismatches() == 0
            assert set(play.completed.survivors) == set(lab.names)
            lab.model, revision = play.sent(messages.Result)[0].message.next_model, 0
        elif play.abandoned.after_uploads:
            revision += 1
        outcomes.append(play.completed is not None)
        for name in play.gone:
            lab.restart(name)
    assert outcomes == [True, False, False, True] * 2


def test_asking_for_the_same_model_again_without_saying_so_is_declined():
    lab = Lab(3)
    assert lab.round().run().completed is not None
    again = lab.round(lab.spec(2)).run()
    assert again.completed is None
    assert again.abandoned.reason.startswith("0 devices checked in within 10 s; at least 3")
    assert "already contributed to this model" in again.abandoned.reason
    assert lab.round(lab.spec(call=lab.call(3, revision=1))).run().mismatches() == 0
