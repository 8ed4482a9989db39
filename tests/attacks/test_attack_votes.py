"""Rosters and views that are not what they seem: false quorums, and different ones for different eyes.

Where the coordinator has accomplices among the devices, she holds their identity keys and all that
they hold. Fewer than a third of the cohort is what the threshold is made for; one more, and the last
test of each kind shows what then happens.
"""

import msgspec
import numpy as np
import pytest

from covey_device.policy import Policy
from covey_shared import keys, sharing, wire
from covey_shared.errors import LocalProtocolError, RefusedError
from covey_shared.messages import MaskedUpdate, Reveal, RosterVote, ViewVote
from covey_shared.secagg import rules
from covey_shared.secagg.parameters import parameters_for
from lab import Lab, seeded
from mallory import Mallory, declined, published


@pytest.fixture
def lab():
    return Lab(4)


@pytest.fixture
def delivered(lab):
    return Mallory(lab).gather().share().deliver()


@pytest.fixture
def proposed(lab):
    return Mallory(lab).gather().share().deliver().collect().propose()


def most_corrupt(n):
    """The largest number of accomplices below a third."""
    return -(-n // 3) - 1


def roster_vote(mallory, name, u2, key=None, **changes):
    vote = RosterVote(mallory.cohort.h, name, u2, u2)
    vote = msgspec.structs.replace(vote, **changes)
    return wire.sign(vote, key or mallory.lab.identities[name]).envelope


def view_vote(mallory, name, u3, key=None, **changes):
    vote = ViewVote(mallory.cohort.h, name, mallory.cohort.bitmap(mallory.u2), u3)
    vote = msgspec.structs.replace(vote, **changes)
    return wire.sign(vote, key or mallory.lab.identities[name]).envelope


def nothing_uploaded(mallory, name, roster, because):
    actions = mallory.tell(name, roster)
    assert because in (declined(actions) or ""), actions
    assert published(actions, MaskedUpdate) == []
    assert name not in mallory.payloads


def nothing_revealed(mallory, name, view, because):
    actions = mallory.tell(name, view)
    assert because in (declined(actions) or ""), actions
    assert published(actions, Reveal) == []
    assert mallory.lab.sessions[name]._round is None


# -- quorums that are none ------------------------------------------------------------------------


def test_roster_with_one_signer_repeated(delivered, lab):
    first, second, _, _ = delivered.roster_votes.values()
    roster = delivered.roster(votes=(first, second, second))
    nothing_uploaded(delivered, lab.names[0], roster, "repeats a signer")
    # Nor do two different votes of one member count for two.
    other = roster_vote(
        delivered, lab.names[1], delivered.cohort.bitmap(delivered.u2), readable=b"\x01"
    )
    nothing_uploaded(
        delivered, lab.names[1], delivered.roster(votes=(first, second, other)), "repeats a signer"
    )


def test_roster_with_too_small_a_quorum(delivered, lab):
    votes = tuple(delivered.roster_votes.values())
    nothing_uploaded(delivered, lab.names[0], delivered.roster(votes=votes[:2]), "2 votes; 3 are")
    nothing_uploaded(delivered, lab.names[1], delivered.roster(votes=()), "0 votes; 3 are")


def test_roster_with_votes_of_another_round(lab, delivered):
    old = tuple(delivered.roster_votes.values())[:3]
    later = Mallory(lab, 2, model=bytes(32)).gather().share().deliver()
    nothing_uploaded(later, lab.names[0], later.roster(votes=old), "of another round or manifest")
    # The whole roster of the earlier round finds nobody in it.
    with pytest.raises(RefusedError, match="not in"):
        later.tell(lab.names[1], delivered.roster())


def test_roster_with_votes_for_another_roster(lab, delivered):
    votes = tuple(delivered.roster_votes.values())[:3]
    roster = delivered.roster(u2=b"\x07", votes=votes)
    nothing_uploaded(delivered, lab.names[0], roster, "for another roster")


def test_roster_with_forged_votes(lab, delivered):
    u2 = delivered.cohort.bitmap(delivered.u2)
    votes = [roster_vote(delivered, name, u2, lab.coordinator_key) for name in lab.names]
    nothing_uploaded(delivered, lab.names[0], delivered.roster(votes=votes[:3]), "not signed by")
    stranger = keys.SigningKey(bytes(32))
    votes = (
        *list(delivered.roster_votes.values())[:2],
        roster_vote(delivered, "pi-900", u2, stranger),
    )
    nothing_uploaded(delivered, lab.names[1], delivered.roster(votes=votes), "not in the cohort")


def test_roster_with_something_else_for_votes(lab, delivered):
    u2 = delivered.cohort.bitmap(delivered.u2)
    votes = tuple(view_vote(delivered, name, u2) for name in lab.names[:3])
    nothing_uploaded(
        delivered, lab.names[0], delivered.roster(votes=votes), "expected a roster vote"
    )
    garbage = (bytes(100),) * 3
    nothing_uploaded(delivered, lab.names[1], delivered.roster(votes=garbage), "version")


def test_a_vote_that_claims_boxes_outside_its_roster(lab, delivered):
    votes = tuple(roster_vote(delivered, name, b"\x07", readable=b"\x0f") for name in lab.names[:3])
    nothing_uploaded(
        delivered, lab.names[0], delivered.roster(u2=b"\x07", votes=votes), "claims boxes"
    )


def test_view_with_one_signer_repeated(proposed, lab):
    first, second, *_ = proposed.view_votes.values()
    view = proposed.view(votes=(first, second, second))
    nothing_revealed(proposed, lab.names[0], view, "repeats a signer")


def test_view_with_too_small_a_quorum(proposed, lab):
    votes = tuple(proposed.view_votes.values())
    nothing_revealed(
        proposed, lab.names[0], proposed.view(votes=votes[:2]), "2 votes; 3 are needed"
    )
    nothing_revealed(proposed, lab.names[1], proposed.view(votes=()), "0 votes; 3 are needed")


def test_view_with_votes_of_another_round(lab, proposed):
    old = tuple(proposed.view_votes.values())[:3]
    later = Mallory(lab, 2, model=bytes(32)).gather().share().deliver().collect().propose()
    nothing_revealed(later, lab.names[0], later.view(votes=old), "of another round or manifest")
    with pytest.raises(RefusedError, match="not in"):
        later.tell(lab.names[1], proposed.view())


def test_view_with_votes_for_another_view_or_roster(lab, proposed):
    u3 = proposed.cohort.bitmap(proposed.u3)
    others = tuple(view_vote(proposed, name, b"\x07") for name in lab.names[:3])
    nothing_revealed(proposed, lab.names[0], proposed.view(votes=others), "for another view")
    others = tuple(view_vote(proposed, name, u3, u2=b"\x07") for name in lab.names[:3])
    nothing_revealed(proposed, lab.names[1], proposed.view(votes=others), "for another view")


def test_view_with_forged_votes(lab, proposed):
    u3 = proposed.cohort.bitmap(proposed.u3)
    votes = tuple(view_vote(proposed, name, u3, lab.coordinator_key) for name in lab.names[:3])
    nothing_revealed(proposed, lab.names[0], proposed.view(votes=votes), "not signed by")
    votes = (
        *tuple(proposed.view_votes.values())[:2],
        view_vote(proposed, "pi-900", u3, keys.SigningKey(bytes(32))),
    )
    nothing_revealed(proposed, lab.names[1], proposed.view(votes=votes), "not in the cohort")
    roster_votes = tuple(roster_vote(proposed, name, u3) for name in lab.names[:3])
    nothing_revealed(proposed, lab.names[2], proposed.view(votes=roster_votes), "expected a view")


# -- rosters and views of the wrong shape ---------------------------------------------------------


def test_roster_too_small_to_hide_in(lab):
    # Three votes she can have from accomplices; but two devices on a roster are too few anyway.
    mallory = Mallory(lab).gather().share()
    for name in lab.names:
        actions = mallory.tell(name, mallory.delivery(name, frozenset({0, 1})))
        assert "too small to vote for" in declined(actions)
        assert published(actions, RosterVote) == []
    again = Mallory(Lab(4)).gather().share().deliver()
    votes = tuple(roster_vote(again, name, b"\x03") for name in again.lab.names[1:])
    roster = again.roster(u2=b"\x03", votes=votes)
    nothing_uploaded(again, again.lab.names[0], roster, "a roster of 2 devices")


def test_roster_below_the_minimum_of_the_head():
    # Enough for the threshold of three, but this round promised sums of four.
    lab = Lab(4, policy=Policy(min_cohort=4))
    mallory = Mallory(lab, n_min=4).gather().share()
    actions = mallory.tell(lab.names[0], mallory.delivery(lab.names[0], frozenset({0, 1, 2})))
    assert "too small to vote for" in declined(actions)
    votes = tuple(roster_vote(mallory, name, b"\x07") for name in lab.names[1:])
    nothing_uploaded(mallory, lab.names[1], mallory.roster(u2=b"\x07", votes=votes), "3 devices")


def test_roster_without_the_device(lab):
    """Left out of the roster, a device uploads nothing: there is nobody to mask with."""
    mallory = Mallory(lab).gather().share()
    mallory.u2 -= {0}
    mallory.deliver()
    actions = mallory.tell(lab.names[0], mallory.roster())
    assert published(actions, MaskedUpdate) == []
    assert lab.names[0] not in mallory.payloads


def test_view_that_isolates_a_device(lab, proposed):
    for u3 in ({0}, {0, 1}, set()):
        fresh = Mallory(Lab(4)).gather().share().deliver().collect()
        name = fresh.lab.names[0]
        actions = fresh.tell(name, fresh.proposal(frozenset(u3)))
        assert f"the view has {len(u3)} devices; at least 3 are needed" in declined(actions)
        assert published(actions, ViewVote) == []


def test_isolating_view_with_a_quorum_of_accomplices(lab, proposed):
    # Even so a member that never voted for it does not open it up.
    for u3 in (b"\x01", b"\x03"):
        name = lab.names[0] if u3 == b"\x01" else lab.names[1]
        votes = tuple(view_vote(proposed, other, u3) for other in lab.names[:3])
        view = proposed.view(u3=proposed.cohort.subset(u3), votes=votes)
        nothing_revealed(proposed, name, view, "not the one this member signed")
    with pytest.raises(RefusedError, match="the view has 1 devices"):
        rules.check_view(proposed.cohort, proposed.u2, (), b"\x01")


def test_view_outside_the_roster():
    lab = Lab(5)
    mallory = Mallory(lab).gather().share()
    mallory.u2 -= {4}
    mallory.deliver().collect()
    actions = mallory.tell(lab.names[0], mallory.proposal(frozenset({0, 1, 2, 4})))
    assert "not on the roster" in declined(actions)
    assert published(actions, ViewVote) == []


def test_view_of_another_roster(lab):
    mallory = Mallory(lab).gather().share().deliver().collect()
    actions = mallory.tell(lab.names[0], mallory.proposal(frozenset({0, 1, 2}), u2=b"\x07"))
    assert "names another roster than the one that stands" in declined(actions)


def test_view_before_the_roster_stands(lab):
    mallory = Mallory(lab).gather().share().deliver()
    name = lab.names[0]
    with pytest.raises(RefusedError, match="view proposal while this device is trained"):
        mallory.tell(name, mallory.proposal(mallory.u2))
    member = lab.sessions[name]._round.member
    with pytest.raises(RefusedError, match="before the roster stood"):
        member.vote_view(mallory.proposal(mallory.u2), None, uploaded=True)


def test_view_of_another_manifest(lab):
    mallory = Mallory(lab).gather().share().deliver().collect()
    name = lab.names[0]
    with pytest.raises(RefusedError, match="not in"):
        mallory.tell(name, mallory.proposal(h=bytes(32)))
    member = lab.sessions[name]._round.member
    with pytest.raises(RefusedError, match="another round or manifest"):
        member.vote_view(mallory.proposal(h=bytes(32)), mallory.u2, uploaded=True)


def test_view_that_claims_an_update_never_sent(lab):
    # She has no update of the device, but would like the share of its self mask.
    mallory = Mallory(lab).gather()
    name = lab.names[0]
    lab.sessions[name].receive(wire.sign(mallory.manifest(), lab.coordinator_key).envelope)
    mallory.share().deliver().collect()  # the device is still training
    assert name not in mallory.payloads
    actions = mallory.tell(name, mallory.proposal(frozenset(range(4))))
    assert "claims an update of this device that it never sent" in declined(actions)
    assert published(actions, ViewVote) == []


def test_view_to_a_member_without_its_boxes(lab):
    # A member that voted for another roster, or for none, signs no view.
    mallory = Mallory(lab).gather().share()
    name = lab.names[0]
    mallory.tell(name, mallory.delivery(name, frozenset({0, 1, 2})))
    for other in lab.names[1:]:
        (vote,) = published(mallory.tell(other, mallory.delivery(other)), RosterVote)
        mallory.roster_votes[other] = vote.envelope
    mallory.collect()
    actions = mallory.tell(name, mallory.proposal())
    assert "without boxes of its roster" in declined(actions)
    assert published(actions, ViewVote) == []


def test_view_that_was_never_proposed_to_this_member(lab, proposed):
    other = Mallory(Lab(4)).gather().share().deliver().collect()
    member = other.lab.sessions[lab.names[0]]._round.member
    with pytest.raises(RefusedError, match="not the one this member signed"):
        member.reveal(proposed.view(), proposed.u2)


def test_view_of_another_h_to_a_member(lab, proposed):
    member = lab.sessions[lab.names[0]]._round.member
    with pytest.raises(RefusedError, match="a view of another round or manifest"):
        member.reveal(proposed.view(h=bytes(32)), proposed.u2)


# -- one roster, one view -------------------------------------------------------------------------


def test_member_signs_one_roster(lab):
    mallory = Mallory(lab).gather().share()
    name = lab.names[0]
    member = lab.sessions[name]._round.member
    assert member.vote_roster(mallory.delivery(name))
    for u2 in (None, frozenset({0, 1, 2})):
        with pytest.raises(RefusedError, match="second delivery for one round: equivocation"):
            member.vote_roster(mallory.delivery(name, u2))
    # And in the whole device: it leaves, and gives nothing more to this round.
    other = lab.names[1]
    mallory.tell(other, mallory.delivery(other))
    actions = mallory.tell(other, mallory.delivery(other, frozenset({0, 1, 2})))
    assert "equivocation" in declined(actions)


def test_member_signs_one_view(lab):
    mallory = Mallory(lab).gather().share().deliver().collect()
    name = lab.names[0]
    member = lab.sessions[name]._round.member
    assert member.vote_view(mallory.proposal(), mallory.u2, uploaded=True)
    for u3 in (None, frozenset({0, 1, 2})):
        with pytest.raises(RefusedError, match="second view proposal for one round: equivocation"):
            member.vote_view(mallory.proposal(u3), mallory.u2, uploaded=True)
    other = lab.names[1]
    assert published(mallory.tell(other, mallory.proposal()), ViewVote)
    with pytest.raises(RefusedError):
        mallory.tell(other, mallory.proposal(frozenset({1, 2, 3})))


def test_a_second_roster_is_not_accepted(lab):
    # With a real quorum behind it, as at least a third of accomplices could make one.
    mallory = Mallory(lab).gather().share().deliver()
    participant = lab.sessions[lab.names[0]]._round.participant
    participant.accept_roster(mallory.roster())
    votes = tuple(roster_vote(mallory, name, b"\x07") for name in lab.names[:3])
    with pytest.raises(RefusedError, match="second, different roster for one round"):
        participant.accept_roster(mallory.roster(u2=b"\x07", votes=votes))
    participant.accept_roster(mallory.roster())  # the same again is harmless
    with pytest.raises(RefusedError, match="another round or manifest"):
        participant.accept_roster(mallory.roster(h=bytes(32)))


def test_a_member_reveals_one_kind_of_share_per_device(lab):
    mallory = Mallory(lab).gather().share().deliver().collect()
    mallory.u3 -= {2}
    mallory.propose().reveal()
    for reveal in mallory.reveals.values():
        kinds = dict(iter(mallory.opened(reveal.message)))
        assert kinds == {name: "s" if name == lab.names[2] else "b" for name in lab.names}
        assert len(mallory.opened(reveal.message)) == 4


def test_a_member_reveals_once_and_forgets(lab):
    mallory = Mallory(lab).gather().share().deliver().collect().propose().reveal()
    for name in lab.names:
        member = lab.sessions[name]._round.member
        assert member._shares == {}
        other = tuple(view_vote(mallory, each, b"\x07") for each in lab.names[:3])
        with pytest.raises(RefusedError):
            mallory.tell(name, mallory.view(frozenset({0, 1, 2}), votes=other))
        with pytest.raises(LocalProtocolError, match="revealed already"):
            member.reveal(mallory.view(), mallory.u2)
        # The same view again brings the same reveal, byte for byte.
        (again,) = published(mallory.tell(name, mallory.view()), Reveal)
        assert again.envelope == mallory.reveals[name].envelope


# -- equivocation ---------------------------------------------------------------------------------


def shares_learned(mallory, accomplices, reveals):
    """How many shares of each (device, kind) she has: revealed ones and her accomplices' own."""
    learned = {}
    for reveal in reveals:
        slot = mallory.cohort.index_of(reveal.member) + 1
        for which, share in mallory.opened(reveal).items():
            learned.setdefault(which, {})[slot] = share
    for name in accomplices:
        member = mallory.lab.sessions[name]._round.member
        slot = mallory.cohort.index_of(name) + 1
        for index, pair in member._shares.items():
            device = mallory.cohort.peers[index].device
            learned.setdefault((device, "b"), {})[slot] = pair[:16]
            learned.setdefault((device, "s"), {})[slot] = pair[16:]
    return learned


def recovered(mallory, learned):
    """The seeds she can work out, each checked against what its device committed to."""
    found = {}
    t = mallory.cohort.threshold
    for (device, kind), shares in learned.items():
        if len(shares) < t:
            continue
        chosen = {slot: [shares[slot]] for slot in sorted(shares)[:t]}
        (secret,) = sharing.combine(chosen)
        peer = mallory.cohort.peers[mallory.cohort.index_of(device)]
        if kind == "b":
            assert keys.self_mask_commitment(secret) == peer.self_mask_commitment
        else:
            assert keys.mask_key(secret).public == peer.pk_mask
        found[device, kind] = secret
    return found


def equivocate_views(n, accomplices, told_first):
    """Two views, with and without the victim, each shown to one part of the honest members.

    Returns what she recovers. The accomplices sign both views and hand over all their shares.
    """
    lab = Lab(n)
    mallory = Mallory(lab).gather().share().deliver().collect()
    bad = lab.names[n - accomplices :]
    honest = [name for name in lab.names if name not in bad]
    views = {
        "with": (frozenset(range(n)), honest[:told_first]),
        "without": (frozenset(range(1, n)), honest[told_first:]),
    }
    votes = {which: [] for which in views}
    for which, (u3, members) in views.items():
        for name in members:
            (vote,) = published(mallory.tell(name, mallory.proposal(u3)), ViewVote)
            votes[which].append(vote.envelope)
        votes[which] += [view_vote(mallory, name, mallory.cohort.bitmap(u3)) for name in bad]
    learned = shares_learned(mallory, bad, [])
    reveals, quorums = [], 0
    for which, (u3, members) in views.items():
        quorums += len(votes[which]) >= mallory.cohort.threshold
        for name in members:
            told = mallory.tell(name, mallory.view(u3, votes=tuple(votes[which])))
            reveals += [signed.message for signed in published(told, Reveal)]
    learned = shares_learned(mallory, bad, reveals)
    return mallory, honest, quorums, recovered(mallory, learned)


SPLITS = [(n, first) for n in (4, 5, 7) for first in range(n - most_corrupt(n) + 1)]


@pytest.mark.parametrize(("n", "told_first"), SPLITS)
def test_view_equivocation(n, told_first):
    mallory, honest, quorums, found = equivocate_views(n, most_corrupt(n), told_first)
    assert quorums <= 1
    for name in honest:
        assert not {(name, "b"), (name, "s")} <= found.keys()
    # Of the victim she has one seed if she got a quorum at all, and then the one that belongs to it.
    victims = [kind for name, kind in found if name == mallory.lab.names[0]]
    assert len(victims) == quorums


@pytest.mark.parametrize("n", [4, 7])
def test_view_equivocation_with_a_third_of_the_cohort_is_not_resisted(n):
    """The bound is sharp, and the two tests above can fail: one accomplice more, and it works."""
    accomplices = most_corrupt(n) + 1
    honest_count = n - accomplices
    mallory, _, quorums, found = equivocate_views(n, accomplices, honest_count // 2)
    victim = mallory.lab.names[0]
    assert quorums == 2
    assert {(victim, "b"), (victim, "s")} <= found.keys()
    bare = mallory.stripped(victim, s=found[victim, "s"], b=found[victim, "b"])
    assert np.array_equal(bare, mallory.plain([victim]))


@pytest.mark.parametrize(("n", "told_first"), SPLITS)
def test_roster_equivocation(n, told_first):
    """Two rosters, each shown to one part of the members: at most one ever stands anywhere."""
    lab = Lab(n)
    bad = lab.names[n - most_corrupt(n) :]
    honest = [name for name in lab.names if name not in bad]
    mallory = Mallory(lab).gather().share()
    smaller = n - 1
    rosters = {
        frozenset(range(n)): honest[:told_first],
        frozenset(range(smaller)): honest[told_first:],
    }
    votes = {u2: [] for u2 in rosters}
    for u2, members in rosters.items():
        for name in members:
            for vote in published(mallory.tell(name, mallory.delivery(name, u2)), RosterVote):
                votes[u2].append(vote.envelope)
        votes[u2] += [roster_vote(mallory, name, mallory.cohort.bitmap(u2)) for name in bad]
    standing = {
        u2: mallory.roster(u2=mallory.cohort.bitmap(u2), votes=tuple(votes[u2]))
        for u2 in rosters
        if len(votes[u2]) >= parameters_for(n).threshold
    }
    assert len(standing) <= 1
    masked_for = set()
    for name in honest:
        for u2 in rosters:
            roster = standing.get(u2, mallory.roster(u2=mallory.cohort.bitmap(u2)))
            if u2 in standing or not standing:
                told = mallory.tell(name, roster)
                masked_for |= {update.message.u2 for update in published(told, MaskedUpdate)}
                break
    assert masked_for == {mallory.cohort.bitmap(u2) for u2 in standing}


def test_roster_equivocation_between_devices_that_did_not_vote(lab):
    """One roster has its quorum; a device is shown another one, with the votes of the first."""
    mallory = Mallory(lab).gather().share().deliver()
    votes = tuple(mallory.roster_votes.values())[:3]
    for u2 in (b"\x07", b"\x0d"):
        fresh = Mallory(Lab(4)).gather().share().deliver()
        nothing_uploaded(fresh, lab.names[0], fresh.roster(u2=u2, votes=votes), "another roster")


@pytest.mark.parametrize("kind", ["b", "s"])
def test_neither_kind_of_share_is_enough_below_the_threshold(kind):
    """t - 1 reveals of either kind give a secret that is not the device's."""
    lab = Lab(7)
    mallory = Mallory(lab).gather().share().deliver().collect()
    mallory.u3 -= {0} if kind == "s" else set()
    mallory.propose().reveal()
    learned = {}
    for name in lab.names[:4]:
        slot = mallory.cohort.index_of(name) + 1
        learned[slot] = [mallory.opened(mallory.reveals[name].message)[lab.names[0], kind]]
    (secret,) = sharing.combine(learned)
    peer = mallory.cohort.peers[0]
    assert keys.self_mask_commitment(secret) != peer.self_mask_commitment
    assert keys.mask_key(secret).public != peer.pk_mask


def test_the_update_of_a_device_declared_lost_stays_masked():
    """She has the update, says it never came, and gets the shares that take its pair masks off."""
    lab = Lab(4, n_params=400)
    mallory = Mallory(lab).gather().share().deliver().collect()
    victim = lab.names[0]
    mallory.u3 -= {0}
    mallory.propose().reveal()
    assert np.array_equal(mallory.aggregate(), mallory.plain(lab.names[1:]))
    reveals = [signed.message for signed in mallory.reveals.values()]
    found = recovered(mallory, shares_learned(mallory, [], reveals))
    assert (victim, "s") in found
    assert (victim, "b") not in found
    plain = mallory.plain([victim])
    left = mallory.stripped(victim, s=found[victim, "s"], b=None)
    assert (left == plain).mean() < 0.01
    assert abs(left).mean() > 2 ** (mallory.cohort.head.bits - 1) / 3  # spread over the whole ring
    # With the seed of the self mask it would be bare. (The lab knows it: it is the first that the
    # device drew.)
    seed = seeded((lab.seed, victim, 1))(keys.SEED_BYTES)
    assert np.array_equal(mallory.stripped(victim, s=found[victim, "s"], b=seed), plain)
