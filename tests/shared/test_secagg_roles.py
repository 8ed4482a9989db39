"""Participant and member used wrongly by our own code; bitmaps and parameters.

What they refuse of others is in tests/attacks.
"""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from covey_shared import wire
from covey_shared.errors import LocalProtocolError, MalformedError, RefusedError
from covey_shared.messages import MAX_COHORT
from covey_shared.secagg.bitmap import from_bitmap, to_bitmap
from covey_shared.secagg.parameters import Parameters, parameters_for
from covey_shared.secagg.participant import Participant
from covey_shared.secagg.rules import Expectation
from lab import Lab, seeded
from mallory import Mallory


def participant_of(mallory):
    """The first device's part in the round, one step further than the lab's own."""
    lab = mallory.lab
    return lab.sessions[lab.names[0]]._round.participant


def expectation(lab, call):
    return Expectation(call, lab.n_params, 1, 1, 3, 10**6)


# -- the participant ------------------------------------------------------------------------------


def test_before_there_is_a_manifest():
    lab = Lab(3)
    name = lab.names[0]
    participant = Participant(
        lab.trust, lab.identities[name], lab.certificates[name], name, lab.call(), seeded(1)
    )
    twin = Mallory(Lab(3)).gather().share().deliver()
    with pytest.raises(LocalProtocolError, match="no manifest yet"):
        participant.accept_roster(twin.roster())
    with pytest.raises(LocalProtocolError, match="no manifest yet"):
        participant.mask(np.zeros(42, np.uint32))
    assert not participant.on_roster


def test_sharing_twice():
    lab = Lab(3)
    mallory = Mallory(lab).gather().share()
    participant = participant_of(mallory)
    manifest = wire.sign(mallory.manifest(), lab.coordinator_key)
    assert participant.is_manifest(manifest)
    with pytest.raises(LocalProtocolError, match="shares were made already"):
        participant.share(manifest, expectation(lab, mallory.call))
    other = wire.sign(mallory.manifest(clip=2.0), lab.coordinator_key)
    assert not participant.is_manifest(other)
    with pytest.raises(RefusedError, match="second, different manifest"):
        participant.share(other, expectation(lab, mallory.call))


def test_masking_without_a_roster():
    mallory = Mallory(Lab(3)).gather().share()
    participant = participant_of(mallory)
    ring = np.arange(42, dtype=np.uint32)
    with pytest.raises(LocalProtocolError, match="without a roster that names us"):
        participant.mask(ring)
    assert np.array_equal(ring, np.arange(42))  # and it is not half masked


def test_masking_when_left_out_of_the_roster():
    mallory = Mallory(Lab(4)).gather().share()
    participant = participant_of(mallory)
    mallory.u2 -= {0}
    mallory.deliver()
    participant.accept_roster(mallory.roster())
    assert participant.roster == mallory.u2
    assert not participant.on_roster
    with pytest.raises(LocalProtocolError, match="without a roster that names us"):
        participant.mask(np.zeros(42, np.uint32))


def test_masking_twice():
    mallory = Mallory(Lab(3)).gather().share().deliver()
    participant = participant_of(mallory)
    participant.accept_roster(mallory.roster())
    ring = np.arange(42, dtype=np.uint32)
    participant.mask(ring)
    assert not ring.any()  # the update itself is gone
    assert participant._s == participant._b == b""
    with pytest.raises(LocalProtocolError, match="masked already"):
        participant.mask(ring)


def test_masking_after_forgetting():
    mallory = Mallory(Lab(3)).gather().share().deliver()
    participant = participant_of(mallory)
    participant.accept_roster(mallory.roster())
    participant.forget()
    with pytest.raises(LocalProtocolError, match="masked already"):
        participant.mask(np.zeros(42, np.uint32))


def test_a_refused_manifest_does_not_count_as_the_first():
    lab = Lab(3)
    mallory = Mallory(lab).gather()
    participant = participant_of(mallory)
    for wrong in (mallory.manifest(w_max=2_000_000), mallory.manifest(model=bytes(32))):
        with pytest.raises(RefusedError):
            participant.share(wire.sign(wrong, lab.coordinator_key), expectation(lab, mallory.call))
        assert participant.cohort is None
    right = wire.sign(mallory.manifest(), lab.coordinator_key)
    assert participant.share(right, expectation(lab, mallory.call)).message.h


# -- the member -----------------------------------------------------------------------------------


def test_revealing_twice():
    lab = Lab(3)
    mallory = Mallory(lab).gather().share().deliver().collect().propose()
    member = lab.sessions[lab.names[0]]._round.member
    assert member._shares
    member.reveal(mallory.view(), mallory.u2)
    assert member._shares == {}
    with pytest.raises(LocalProtocolError, match="revealed already"):
        member.reveal(mallory.view(), mallory.u2)


def test_revealing_after_forgetting():
    lab = Lab(3)
    mallory = Mallory(lab).gather().share().deliver().collect().propose()
    member = lab.sessions[lab.names[0]]._round.member
    member.forget()
    with pytest.raises(LocalProtocolError, match="revealed already"):
        member.reveal(mallory.view(), mallory.u2)


# -- bitmaps --------------------------------------------------------------------------------------


@given(st.integers(1, MAX_COHORT), st.data())
def test_bitmaps_round_trip(n, data):
    chosen = data.draw(st.frozensets(st.integers(0, n - 1)))
    bitmap = to_bitmap(chosen, n)
    assert len(bitmap) == -(-n // 8)
    assert from_bitmap(bitmap, n) == chosen


@given(st.integers(1, MAX_COHORT), st.binary(max_size=18))
def test_a_bitmap_has_one_spelling(n, data):
    try:
        chosen = from_bitmap(data, n)
    except MalformedError:
        assert len(data) != -(-n // 8) or int.from_bytes(data, "little") >> n
    else:
        assert to_bitmap(chosen, n) == data


@pytest.mark.parametrize("index", [-1, 4])
def test_an_index_outside_the_cohort(index):
    with pytest.raises(LocalProtocolError, match=f"index {index} in a cohort of 4"):
        to_bitmap([index], 4)


# -- parameters -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "threshold"), [(2, 2), (3, 3), (4, 3), (5, 4), (6, 5), (10, 7), (30, 21), (128, 86)]
)
def test_thresholds(n, threshold):
    assert parameters_for(n) == Parameters(n - 1, 0, n, threshold)


@pytest.mark.parametrize("n", range(2, MAX_COHORT + 1))
def test_two_quorums_share_an_honest_member(n):
    # With fewer than n/3 corrupt members, who may vote twice.
    t = parameters_for(n).threshold
    most_corrupt = -(-n // 3) - 1
    assert 2 * t - n > most_corrupt
    # And the honest ones alone make a quorum.
    assert n - most_corrupt >= t


@pytest.mark.parametrize("n", [0, 1, MAX_COHORT + 1])
def test_cohorts_that_cannot_be(n):
    with pytest.raises(LocalProtocolError, match="2 to 128"):
        parameters_for(n)
