"""A coordinator that asks for more than a device's owner allows, signing whatever it likes with its real key.

Each is declined, and nothing leaves the device but the decline. A control beside each shows that the same
device takes part when it is asked for what its owner allows.
"""

import pytest

from covey_device import session as device
from covey_device.policy import DAY_S, Policy
from covey_device.session import Memory, Phase
from covey_shared import wire
from covey_shared.keys import SigningKey
from covey_shared.messages import CheckIn, Decline, PlanSignature, Shares
from lab import Lab
from mallory import Mallory, declined, published

OWNER, STRANGER = SigningKey(b"o" * 32), SigningKey(b"s" * 32)
OLD_PLAN = bytes(31) + b"\x01"


@pytest.fixture
def lab():
    return Lab(4)


def signed(owner, plan, key=None):
    """A model owner's signature; with another key, a forged one."""
    return wire.sign(PlanSignature(owner.public, plan), key or owner).envelope


def under(lab, **policy):
    """One device whose owner wants this. Returns its name."""
    name = lab.names[0]
    lab.sessions[name] = lab.session(name, policy=Policy(**policy))
    return name


def is_other_end(action):
    """The round before, which a new call ends."""
    return isinstance(action, device.Ended) and action.outcome == "another round was called"


def only_declines(lab, name, actions, because):
    """Nothing is fetched, nothing saved, nothing sent but the one decline."""
    decline, ended = [a for a in actions if not is_other_end(a)]
    assert isinstance(decline, device.Publish)
    assert isinstance(decline.message.message, Decline)
    assert isinstance(ended, device.Ended)
    assert because in declined(actions)
    assert lab.sessions[name].phase is Phase.IDLE


def joins(actions):
    return len(published(actions, CheckIn)) == 1


# -- sums ------------------------------------------------------------------------------------------


def test_a_call_for_a_smaller_sum(lab):
    name = under(lab, min_cohort=4)
    mallory = Mallory(lab, 1, n_min=3)
    only_declines(lab, name, mallory.tell(name, mallory.call), "takes part among at least 4")
    mallory = Mallory(lab, 2, n_min=4)
    assert joins(mallory.tell(name, mallory.call))


def test_a_manifest_for_a_smaller_sum_than_the_call(lab):
    name = under(lab, min_cohort=4)
    mallory = Mallory(lab, n_min=4).gather()
    actions = mallory.tell(name, mallory.manifest(n_min=3))
    only_declines(lab, name, actions, "takes part among at least 4")


def test_a_heavier_weight(lab):
    # At a larger w_max a device with many examples stands out among the others.
    name = under(lab, max_weight=1000)
    mallory = Mallory(lab).gather()
    actions = mallory.tell(name, mallory.manifest(w_max=1001))
    only_declines(lab, name, actions, "this device allows 1000")
    mallory = Mallory(lab, 2).gather()
    assert published(mallory.tell(name, mallory.manifest(w_max=1000)), Shares)


# -- how often -------------------------------------------------------------------------------------


class Clock:
    now = 1_800_000_000.0

    def __call__(self):
        return self.now


def with_clock(lab, clock, memory=None, **policy):
    name = lab.names[0]
    lab.sessions[name] = device.Session(
        lab.trust,
        lab.identities[name],
        lab.certificates[name],
        name,
        Policy(**policy),
        memory or Memory(),
        lab.rng,
        clock=clock,
    )
    return name


def asked(lab, name, round_id):
    """One more round, of another model each time."""
    mallory = Mallory(lab, round_id, model=bytes([round_id % 256]) * 32)
    return mallory.tell(name, mallory.call)


def saved(actions):
    return [action.memory for action in actions if isinstance(action, device.Save)]


def test_too_many_rounds_a_day(lab):
    clock = Clock()
    name = with_clock(lab, clock, rounds_per_day=3)
    for round_id in (1, 2, 3):
        assert joins(asked(lab, name, round_id))
        clock.now += 60
    for round_id in range(4, 10):
        only_declines(lab, name, asked(lab, name, round_id), "allows 3 rounds a day")
        clock.now += 60
    clock.now += DAY_S
    assert joins(asked(lab, name, 10))


def test_too_many_rounds_a_day_with_crashes_in_between(lab):
    """What was joined is saved before the check-in leaves, so that a new process knows."""
    clock, memory = Clock(), Memory()
    joined = 0
    for round_id in range(1, 10):
        name = with_clock(lab, clock, memory, rounds_per_day=3)
        actions = asked(lab, name, round_id)
        if joins(actions):
            joined += 1
            order = [type(a) for a in actions]
            assert order.index(device.Save) < order.index(device.Publish)
        memory = (saved(actions) or [memory])[-1]
    assert joined == 3


def test_a_round_that_was_abandoned_counts_as_well(lab):
    # Or a coordinator could gather check-ins, and what they tell of who is there, without end.
    name = with_clock(lab, Clock(), rounds_per_day=1)
    assert joins(asked(lab, name, 1))
    only_declines(lab, name, asked(lab, name, 2), "allows 1 round a day")


# -- which plans -----------------------------------------------------------------------------------


def test_a_plan_that_is_not_allowed(lab):
    allowed = lab.call().plan
    name = under(lab, plans=frozenset([allowed]))
    mallory = Mallory(lab, 1, plan=OLD_PLAN)
    only_declines(lab, name, mallory.tell(name, mallory.call), "is not one of those")
    # A signature does not make it one of those.
    mallory = Mallory(lab, 2, plan=OLD_PLAN, plan_signatures=(signed(OWNER, OLD_PLAN),))
    only_declines(lab, name, mallory.tell(name, mallory.call), "is not one of those")
    mallory = Mallory(lab, 3, plan=allowed)
    assert joins(mallory.tell(name, mallory.call))


def test_another_plan_after_an_allowed_call(lab):
    allowed = lab.call().plan
    name = under(lab, plans=frozenset([allowed]))
    mallory = Mallory(lab).gather()
    actions = mallory.tell(name, mallory.manifest(plan=OLD_PLAN))
    only_declines(lab, name, actions, "plan is not the one that was called")


PLAN = Lab(3).call().plan
NOT_THE_OWNERS = {
    "stripped": (),
    "by the coordinator": (signed(Lab(4).coordinator_key, PLAN),),
    "by a stranger": (signed(STRANGER, PLAN),),
    "forged": (signed(OWNER, PLAN, STRANGER),),
    "of an old plan": (signed(OWNER, OLD_PLAN),),
    "of another fleet's message": (b"\x01\x13" + bytes(64) + b"\x92",),
    "several": (signed(OWNER, OLD_PLAN), signed(OWNER, PLAN, STRANGER), signed(STRANGER, PLAN)),
}


@pytest.mark.parametrize("signatures", NOT_THE_OWNERS.values(), ids=NOT_THE_OWNERS)
def test_a_plan_without_its_owners_signature(lab, signatures):
    name = under(lab, owners=frozenset([OWNER.public]))
    mallory = Mallory(lab, 1, plan_signatures=signatures)
    only_declines(lab, name, mallory.tell(name, mallory.call), "is not signed by a model owner")
    mallory = Mallory(lab, 2, plan_signatures=(*signatures, signed(OWNER, PLAN)))
    assert joins(mallory.tell(name, mallory.call))


def test_an_owners_signature_of_an_old_plan(lab):
    """Seen in an earlier round, and put to another plan's use."""
    name = under(lab, owners=frozenset([OWNER.public]))
    first = Mallory(lab, 1, plan=OLD_PLAN, plan_signatures=(signed(OWNER, OLD_PLAN),))
    assert joins(first.tell(name, first.call))
    later = Mallory(lab, 2, plan_signatures=first.call.plan_signatures)
    actions = later.tell(name, later.call)
    only_declines(lab, name, actions, "is not signed by a model owner")


def test_a_signed_plans_call_with_another_plan_in_the_manifest(lab):
    name = under(lab, owners=frozenset([OWNER.public]))
    mallory = Mallory(lab, plan_signatures=(signed(OWNER, PLAN),)).gather()
    actions = mallory.tell(name, mallory.manifest(plan=OLD_PLAN))
    only_declines(lab, name, actions, "plan is not the one that was called")


def test_a_signature_is_bound_to_its_kind(lab):
    """Nothing else that an owner's key ever signed passes for a plan signature."""
    name = under(lab, owners=frozenset([OWNER.public]))
    body = wire.body_of(PlanSignature(OWNER.public, PLAN))
    for round_id, label in enumerate(("round call", "certificate", "check-in"), 1):
        envelope = bytes((1, PlanSignature.CODE)) + OWNER.sign(label, body) + body
        mallory = Mallory(lab, round_id, plan_signatures=(envelope,))
        actions = mallory.tell(name, mallory.call)
        only_declines(lab, name, actions, "is not signed by a model owner")


# -- changing the policy ---------------------------------------------------------------------------


def test_a_round_goes_on_under_the_policy_it_was_begun_with(lab):
    """A coordinator gains nothing by waiting: what was begun strictly is not finished laxly."""
    name = under(lab, max_weight=1000)
    mallory = Mallory(lab).gather()
    lab.sessions[name].policy = Policy()
    actions = mallory.tell(name, mallory.manifest(w_max=5000))
    only_declines(lab, name, actions, "this device allows 1000")
    mallory = Mallory(lab, 2).gather()
    assert published(mallory.tell(name, mallory.manifest(w_max=5000)), Shares)
