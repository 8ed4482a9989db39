"""Boxes of shares that the relay swaps, damages, moves or makes up.

A box that does not open costs its sender one share, which others hold as well. What must not happen
is that a member takes a wrong box for a right one: then somebody else's secret would be recovered, or
one of the coordinator's own making.
"""

import pytest

from covey_shared import keys, wire
from covey_shared.errors import MalformedError, RefusedError
from covey_shared.messages import Delivery, RosterVote
from covey_shared.secagg.participant import box_info
from lab import Lab
from mallory import Mallory, declined, published


@pytest.fixture
def lab():
    return Lab(4)


@pytest.fixture
def shared(lab):
    return Mallory(lab).gather().share()


def readable(mallory, name, boxes):
    """Whose boxes a member can open, of these."""
    told = mallory.tell(name, mallory.delivery(name, boxes=tuple(boxes)))
    (vote,) = published(told, RosterVote)
    assert vote.message.u2 == mallory.cohort.bitmap(mallory.u2)
    return mallory.cohort.subset(vote.message.readable)


def boxes_for(mallory, name):
    return list(mallory.delivery(name).boxes)


def sealed(mallory, sender, member, *, key, h=None, slot=None, plaintext=bytes(32)):
    """A box of Mallory's own making."""
    cohort = mallory.cohort
    at = cohort.index_of(member)
    info = box_info(cohort.h if h is None else h, sender, at + 1 if slot is None else slot)
    return key.seal(cohort.peers[at].pk_seal, info=info, plaintext=plaintext)


def test_boxes_as_they_were_sealed(shared, lab):
    for name in lab.names:
        assert readable(shared, name, boxes_for(shared, name)) == {0, 1, 2, 3}


def test_swapped_boxes(shared, lab):
    # Two senders' boxes for one member, exchanged.
    boxes = boxes_for(shared, lab.names[0])
    boxes[1], boxes[2] = boxes[2], boxes[1]
    assert readable(shared, lab.names[0], boxes) == {0, 3}


def test_boxes_of_another_member(shared, lab):
    boxes = boxes_for(shared, lab.names[1])
    assert readable(shared, lab.names[0], boxes) == set()


def test_cross_sender_box(shared, lab):
    # Device 1's box in the place of device 2's: member 0 would hold device 1's share twice, and
    # reveal it as the share of device 2.
    boxes = boxes_for(shared, lab.names[0])
    boxes[2] = boxes[1]
    assert readable(shared, lab.names[0], boxes) == {0, 1, 3}


@pytest.mark.parametrize("at", [0, 31, 32, 50, 63, 64, 79], ids="byte {}".format)
@pytest.mark.parametrize("bit", [0, 7])
def test_flipped_box(shared, lab, at, bit):
    boxes = boxes_for(shared, lab.names[0])
    damaged = bytearray(boxes[2])
    damaged[at] ^= 1 << bit
    if (at, bit) == (31, 7):
        # X25519 ignores this bit of a public key (RFC 7748, section 5), but HPKE binds the key's
        # bytes, so that even this one is noticed.
        assert damaged != boxes[2]
    boxes[2] = bytes(damaged)
    assert readable(shared, lab.names[0], boxes) == {0, 1, 3}


def test_cross_manifest_box(lab):
    # The boxes of a manifest that differs in one bit, from the same devices under the same keys.
    shared = Mallory(lab).gather().share()
    other = Mallory(Lab(4)).gather()
    manifest = other.manifest(clip=2.0)
    name = lab.names[0]
    other.cohort = other.cohort_of(manifest)
    for sender in lab.names:
        for signed in published(other.tell(sender, manifest), type(shared.shares[sender])):
            other.shares[sender] = signed.message
    boxes = boxes_for(shared, name)
    boxes[1] = other.shares[lab.names[1]].boxes[0]
    assert shared.cohort.peers == other.cohort.peers
    assert readable(shared, name, boxes) == {0, 2, 3}


def test_box_of_an_earlier_round(lab):
    earlier = Mallory(lab).gather().share()
    later = Mallory(lab, 2, model=bytes(32)).gather().share()
    boxes = boxes_for(later, lab.names[0])
    boxes[1] = boxes_for(earlier, lab.names[0])[1]
    assert readable(later, lab.names[0], boxes) == {0, 2, 3}


def test_box_sealed_by_the_coordinator_in_a_devices_name(shared, lab):
    # Shares of seeds that she knows, in the name of a device: recovering them would tell her nothing
    # new, but their failing the commitment would have the device blamed.
    victim, member = lab.names[2], lab.names[0]
    stranger = keys.seal_key(bytes(16))
    accomplice = lab.sessions[lab.names[3]]._round.participant.seal_key
    for key in (stranger, shared.reveal_key, accomplice):
        boxes = boxes_for(shared, member)
        boxes[2] = sealed(shared, victim, member, key=key)
        fresh = Mallory(Lab(4)).gather().share()
        assert readable(fresh, member, boxes) == {0, 1, 3}


def test_box_of_the_right_sender_for_another_slot_or_round(lab):
    for changes in ({"slot": 2}, {"h": bytes(32)}):
        shared = Mallory(Lab(4)).gather().share()
        member = lab.names[0]
        sender = lab.names[2]
        key = shared.lab.sessions[sender]._round.participant.seal_key
        boxes = boxes_for(shared, member)
        boxes[2] = sealed(shared, sender, member, key=key, **changes)
        assert readable(shared, member, boxes) == {0, 1, 3}
    # Sealed by the sender itself, for this slot and round, it would open: the tests above can fail.
    shared = Mallory(Lab(4)).gather().share()
    key = shared.lab.sessions[sender]._round.participant.seal_key
    boxes = boxes_for(shared, member)
    boxes[2] = sealed(shared, sender, member, key=key)
    assert readable(shared, member, boxes) == {0, 1, 2, 3}


def test_boxes_do_not_open_for_anybody_else(shared, lab):
    """Neither for the coordinator, nor for another member, nor for who knows every signing key."""
    for sender in lab.names:
        at = shared.cohort.index_of(sender)
        for slot, box in enumerate(shared.shares[sender].boxes):
            member = shared.cohort.peers[slot].device
            others = [shared.reveal_key, keys.seal_key(bytes(16))]
            others += [
                lab.sessions[name]._round.participant.seal_key
                for name in lab.names
                if name != member
            ]
            info = box_info(shared.cohort.h, sender, slot + 1)
            for key in others:
                with pytest.raises(RefusedError, match="does not open"):
                    key.open(box, sender=shared.cohort.peers[at].pk_seal, info=info)


@pytest.mark.parametrize("count", [1, 3, 5])
def test_more_or_fewer_boxes_than_devices(shared, lab, count):
    boxes = (boxes_for(shared, lab.names[0]) * 2)[:count]
    told = shared.tell(lab.names[0], shared.delivery(lab.names[0], boxes=tuple(boxes)))
    assert f"a delivery of {count} boxes from 4 devices" in declined(told)


def test_delivery_for_another_device_or_round(shared, lab):
    name, other = lab.names[:2]
    member = lab.sessions[name]._round.member
    for delivery in (shared.delivery(other), shared.delivery(name, h=bytes(32))):
        with pytest.raises(RefusedError, match="of another round, or for another device"):
            member.vote_roster(delivery)
        with pytest.raises(RefusedError):
            shared.tell(name, delivery)
    assert published(shared.tell(name, shared.delivery(name)), RosterVote)


def test_delivery_with_a_bitmap_of_another_cohort(shared, lab):
    right = shared.delivery(lab.names[0])
    wrong = Delivery(right.h, right.member, b"\xff", right.boxes)
    told = shared.tell(lab.names[0], wrong)
    assert "does not fit a cohort of 4" in declined(told)
    member = lab.sessions[lab.names[1]]._round.member
    with pytest.raises(MalformedError):
        member.vote_roster(Delivery(right.h, lab.names[1], b"\x0f\x00", right.boxes))


# -- and what becomes of the round ----------------------------------------------------------------


def test_unreadable_boxes_do_not_harm_the_sum():
    # The relay damages one sender's boxes for as many members as there are to spare.
    lab = Lab(7)
    play = lab.round()

    def intercept(mail):
        if mail.kind == "Delivery" and mail.to in lab.names[:2]:
            delivery = mail.message
            boxes = list(delivery.boxes)
            boxes[3] = boxes[3][:-1] + bytes((boxes[3][-1] ^ 1,))
            fields = (delivery.h, delivery.member, delivery.u2, tuple(boxes))
            envelope = wire.sign(type(delivery)(*fields), lab.coordinator_key).envelope
            return (type(mail)(envelope, None, mail.to),)
        return (mail,)

    play.intercept = intercept
    play.run()
    votes = {mail.sender: mail.message for mail in play.sent(RosterVote)}
    unread = {name for name, vote in votes.items() if vote.readable != vote.u2}
    assert unread == set(lab.names[:2])
    assert play.mismatches() == 0


def test_unreadable_boxes_from_their_sender_abandon_the_round_before_any_upload():
    lab = Lab(7)
    play = lab.round()
    liar = lab.names[3]

    def intercept(mail):
        if mail.kind == "Shares" and mail.sender == liar:
            shares = mail.message
            boxes = (*(bytes(80) for _ in range(3)), *shares.boxes[3:])
            envelope = wire.sign(type(shares)(shares.h, liar, boxes), lab.identities[liar]).envelope
            return (type(mail)(envelope, liar, None),)
        return (mail,)

    play.intercept = intercept
    play.run()
    assert play.abandoned.reason == "fewer than 5 members can open the shares of pi-003"
    assert play.abandoned.blamed == (liar,)
    assert not play.abandoned.after_uploads
    assert play.parcels == []
