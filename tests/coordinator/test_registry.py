"""Who is there, who is kept out and until when."""

import pytest

from covey_coordinator import registry
from covey_coordinator.registry import KEPT_OUT_ROUNDS, Registry
from covey_shared.messages import DeviceId

A, B = DeviceId("a"), DeviceId("b")
KEY, OTHER = b"k" * 32, b"o" * 32


def test_presence_is_what_was_said_last():
    fleet = Registry()
    assert fleet.presence(A, True)
    assert fleet.presence(B, True)
    assert not fleet.presence(A, True)  # no news
    assert fleet.present == {A, B}
    assert fleet.presence(A, False)
    assert not fleet.presence(A, False)
    assert fleet.present == {B}


def test_there_is_a_limit_to_who_can_be_there(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(registry, "MAX_PRESENT", 3)
    fleet = Registry()
    told = [fleet.presence(DeviceId(f"d{i}"), True) for i in range(5)]
    assert told == [True] * 3 + [False] * 2
    assert fleet.presence(DeviceId("d0"), False)
    assert fleet.presence(DeviceId("d4"), True)


def test_who_is_not_pinned_may_take_part():
    assert Registry().admit(A, KEY, 1) is None
    assert Registry({B: KEY}).admit(A, OTHER, 1) is None


def test_a_pinned_device_must_have_its_key():
    fleet = Registry({A: KEY})
    assert fleet.admit(A, KEY, 1) is None
    assert fleet.admit(A, OTHER, 1) == "its identity key is not the one that was registered"


def test_in_a_closed_fleet_only_who_joined_may_take_part():
    """Whoever else has a certificate of the fleet CA: its key may be in other hands."""
    fleet = Registry({A: KEY}, closed=True)
    assert fleet.admit(A, KEY, 1) is None
    assert fleet.admit(B, OTHER, 1) == "no device of this name joined the fleet"


def test_no_round_waits_for_who_is_revoked():
    """The broker lets it not even say that it has gone: its last word stays, that it is online."""
    fleet = Registry({A: KEY, B: OTHER})
    assert fleet.presence(A, True)
    assert fleet.presence(B, True)
    fleet.revoked = frozenset({KEY})
    assert fleet.present == {B}
    fleet.presence(A, False)
    assert not fleet.presence(A, True)
    assert fleet.present == {B}
    assert fleet.admit(A, KEY, 1) == "its identity was revoked"
    fleet.identities[A] = b"new" + bytes(29)  # joined again
    assert fleet.present == {A, B}
    # who is not registered cannot be revoked by name
    fleet.identities.clear()
    assert fleet.present == {A, B}


def test_who_cost_a_round_is_kept_out_for_ten_and_not_for_ever():
    fleet = Registry()
    fleet.blame(A, 5, "it dealt shares that nobody can open")
    assert KEPT_OUT_ROUNDS == 10
    assert fleet.admit(A, KEY, 6) == (
        "kept out until round 15: it dealt shares that nobody can open"
    )
    assert fleet.admit(A, KEY, 15) is not None
    assert fleet.admit(A, KEY, 16) is None
    assert fleet.admit(B, KEY, 6) is None


def test_faults_are_counted():
    fleet = Registry()
    fleet.fault(A)
    fleet.fault(A)
    fleet.blame(B, 1, "")
    assert fleet.faults == {A: 2, B: 1}
    assert fleet.admit(A, KEY, 1) is None  # a fault without cost keeps nobody out
