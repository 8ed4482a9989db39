"""Masked updates: what is seen of them, and what happens to those that are not what they claim."""

import hashlib

import numpy as np
import pytest

from covey_shared import wire
from covey_shared.errors import RefusedError
from covey_shared.fixedpoint import to_signed, unpack
from covey_shared.messages import MaskedUpdate, WantUpload
from lab import NOW_UNIX, Lab, Mail, Parcel
from mallory import Mallory, published


def rings(play):
    """Every masked update as ring elements, by sender."""
    encoding = play.machine.cohort.encoding
    return {
        parcel.sender: unpack(parcel.payload, encoding.n_coordinates, encoding.bits, encoding.lane)
        for parcel in play.parcels
    }


def chi_square(values, bits):
    """How far ring elements are from uniform, in standard deviations of the statistic.

    Of the top and of the bottom eight bits; 256 bins have 255 degrees of freedom.
    """
    worst = 0.0
    for shift in (0, bits - 8):
        counts = np.bincount((values >> shift) & 255, minlength=256)
        expected = values.size / 256
        statistic = float(((counts - expected) ** 2 / expected).sum())
        worst = max(worst, abs(statistic - 255) / (2 * 255) ** 0.5)
    return worst


# -- what is seen of them -------------------------------------------------------------------------


@pytest.mark.parametrize("value_bits", [10, 20])
def test_masked_updates_are_uniform(value_bits):
    lab = Lab(3, n_params=20_000)
    play = lab.round(value_bits=value_bits, clip=1.0).run()
    bits = play.completed.encoding.bits
    seen = rings(play)
    assert len(seen) == 3
    for ring in seen.values():
        assert chi_square(ring.astype(np.int64), bits) < 5
    # Without its mask an update is nothing like it: the test can fail.
    for name in lab.names:
        plain = lab.plain[name, 1].astype(np.int64) & ((1 << bits) - 1)
        assert chi_square(plain, bits) > 1000
    # Nor do two of them, added or subtracted, give away a pair mask: the self masks remain.
    first, second = seen[lab.names[0]].astype(np.int64), seen[lab.names[1]].astype(np.int64)
    for both in (first + second, first - second):
        assert chi_square(both & ((1 << bits) - 1), bits) < 5


def test_masked_updates_of_different_updates_look_the_same():
    """The same fleet and keys, with all updates zero: the masked ones differ by the updates alone.

    So that a single masked update says nothing: for every other update there is a mask to match.
    """
    lab, zeros = Lab(3, n_params=2000), Lab(3, n_params=2000)
    zeros.update = lambda name, round_id: (np.zeros(2000, np.float32), 1, (0.0,))
    a, b = lab.round().run(), zeros.round().run()
    bits = a.completed.encoding.bits
    for name in lab.names:
        difference = (rings(a)[name].astype(np.int64) - rings(b)[name]) & ((1 << bits) - 1)
        plain = (lab.plain[name, 1].astype(np.int64) - zeros.plain[name, 1]) & ((1 << bits) - 1)
        assert np.array_equal(difference, plain)


def test_masks_are_not_reused():
    """The same update in two rounds: their masked versions are unrelated, and so is the difference."""
    lab = Lab(3, n_params=20_000)
    lab.update = lambda name, round_id: (np.full(20_000, 0.25, np.float32), 100, (1.0,))
    first = lab.round().run()
    second = lab.round(lab.spec(call=lab.call(2, revision=1))).run()
    bits = first.completed.encoding.bits
    for name in lab.names:
        difference = rings(first)[name].astype(np.int64) - rings(second)[name]
        assert chi_square(difference & ((1 << bits) - 1), bits) < 5
    assert first.mismatches() == second.mismatches() == 0


def test_what_is_sent_again_is_the_same_bytes():
    lab = Lab(4)
    mallory = Mallory(lab).gather().share().deliver().collect()
    for name in lab.names:
        (again,) = published(mallory.tell(name, mallory.roster()), MaskedUpdate)
        assert again.envelope == mallory.updates[name].envelope
        first = mallory.payloads[name]
        want = WantUpload(mallory.cohort.h, name, mallory.payload_digest(name), ((0, 1),))
        mallory.tell(name, want)
        assert mallory.payloads[name] == first


def test_no_second_mask_for_one_round():
    lab = Lab(4)
    mallory = Mallory(lab).gather().share().deliver().collect()
    for name in lab.names:
        session = lab.sessions[name]
        before = mallory.payloads[name]
        assert session.trained(1, *lab.update(name, 99)) == []
        with pytest.raises(RefusedError):
            mallory.tell(name, mallory.roster(votes=tuple(mallory.roster_votes.values())[1:]))
        assert session._round.payload == before


# -- on the way -----------------------------------------------------------------------------------


def test_tampered_upload_is_not_added():
    lab = Lab(4)
    play = lab.round()
    damaged = set()

    def on_parcel(parcel):
        if parcel.sender not in damaged:
            damaged.add(parcel.sender)
            payload = bytearray(parcel.payload)
            payload[10] ^= 4
            return (Parcel(bytes(payload), parcel.sender),)
        return (parcel,)

    play.intercept_parcel = on_parcel
    play.run()
    assert damaged == set(lab.names)
    assert play.completed.survivors == tuple(lab.names)  # asked for again, and sent again
    assert play.mismatches() == 0


def test_tampered_digest_is_not_accepted():
    lab = Lab(4)
    play = lab.round()
    victim = lab.names[0]

    def on_mail(mail: Mail):
        if mail.kind == "MaskedUpdate" and mail.sender == victim:
            at = mail.envelope.index(mail.message.payload)
            envelope = mail.envelope[:at] + bytes(32) + mail.envelope[at + 32 :]
            return (Mail(envelope, victim, None),)
        return (mail,)

    play.intercept = on_mail
    play.run()
    assert play.completed.survivors == tuple(lab.names[1:])
    assert play.mismatches() == 0
    assert play.faults == []  # the device did nothing wrong


def test_upload_under_another_devices_topic():
    lab = Lab(4)
    play = lab.round()
    first, second = lab.names[:2]

    def on_mail(mail: Mail):
        if mail.kind == "MaskedUpdate" and mail.sender == first:
            return (Mail(mail.envelope, second, None), mail)
        return (mail,)

    play.intercept = on_mail
    play.run()
    assert "a message that names pi-000 came from pi-001's topic" in str(play.refused[0][1])
    assert play.mismatches() == 0
    assert play.faults == []


@pytest.mark.parametrize(
    "kind", ["CheckIn", "Shares", "RosterVote", "ViewVote", "Reveal", "Decline"]
)
def test_message_under_another_devices_topic(kind):
    lab = Lab(4)
    play = lab.round()
    first, second = lab.names[:2]
    if kind == "Decline":
        play.on_train = lambda name: name != first or play.fail_training(name)

    def on_mail(mail: Mail):
        if mail.kind == kind and mail.sender == first:
            return (Mail(mail.envelope, second, None), mail)
        return (mail,)

    play.intercept = on_mail
    play.run()
    assert [str(error) for _, error in play.refused] == [
        "a message that names pi-000 came from pi-001's topic"
    ]
    assert play.mismatches() == 0
    assert play.faults == []


def test_reattributed_upload():
    """A device's masked update under another's name, the name changed but not the signature."""
    lab = Lab(4)
    play = lab.round()
    first, second = lab.names[:2]

    def on_mail(mail: Mail):
        if mail.kind == "MaskedUpdate" and mail.sender == first:
            forged = mail.envelope.replace(first.encode(), second.encode())
            assert forged != mail.envelope
            return (Mail(forged, second, None), mail)
        return (mail,)

    play.intercept = on_mail
    play.run()
    assert "not signed by pi-001" in str(play.refused[0][1])
    assert play.mismatches() == 0


def test_a_device_that_sends_anothers_upload_as_its_own():
    """It signs the digest of what it saw another one send. The sum is garbage: nothing leaks by it.

    That one device can spoil a sum is not resisted; see docs/attacks.md.
    """
    lab = Lab(4, n_params=2000)
    play = lab.round()
    thief, victim = lab.names[1], lab.names[0]

    def on_mail(mail: Mail):
        if mail.kind == "MaskedUpdate" and mail.sender == thief:
            update = mail.message
            stolen = play.sent(MaskedUpdate, victim)[0].message.payload
            forged = MaskedUpdate(update.h, thief, update.u2, stolen, update.payload_bytes)
            return (Mail(wire.sign(forged, lab.identities[thief]).envelope, thief, None),)
        return (mail,)

    def on_parcel(parcel: Parcel):
        if parcel.sender == thief:
            stolen = next(p.payload for p in play.parcels if p.sender == victim)
            return (Parcel(stolen, thief),)
        return (parcel,)

    play.intercept, play.intercept_parcel = on_mail, on_parcel
    play.run()
    encoding = play.completed.encoding
    seen = to_signed(play.completed.ring_sum, encoding.bits)
    assert play.mismatches() > 1900
    assert chi_square(seen & ((1 << encoding.bits) - 1), encoding.bits) < 6


# -- devices that equivocate ----------------------------------------------------------------------


def test_a_device_that_uploads_twice():
    # Two digests, both signed: the first counts, the second is reported.
    lab = Lab(4)
    play = lab.round()
    liar = lab.names[2]

    def on_mail(mail: Mail):
        if mail.kind == "MaskedUpdate" and mail.sender == liar:
            update = mail.message
            other = hashlib.sha256(b"another").digest()
            second = MaskedUpdate(update.h, liar, update.u2, other, update.payload_bytes)
            return (mail, Mail(wire.sign(second, lab.identities[liar]).envelope, liar, None))
        return (mail,)

    play.intercept = on_mail
    play.on_train = lambda name: name != lab.names[3]  # so that the phase lasts
    play.open()
    play.drain()
    play.train(lab.names[3])
    play.drain()
    assert [fault.device for fault in play.faults] == [liar]
    assert "equivocation" in play.faults[0].reason
    assert play.completed.survivors == tuple(lab.names)
    assert play.mismatches() == 0


def test_a_device_that_announces_and_never_uploads():
    lab = Lab(4)
    play = lab.round()
    play.intercept_parcel = lambda parcel: () if parcel.sender == lab.names[0] else (parcel,)
    play.run()
    assert play.completed.survivors == tuple(lab.names[1:])
    assert play.mismatches() == 0


def test_an_upload_after_the_view_is_dropped():
    # Were it added, the sum would hold a device whose self mask nobody will take off.
    lab = Lab(4)
    play = lab.round()
    late = []
    play.intercept_parcel = lambda parcel: (
        late.append(parcel) or () if parcel.sender == lab.names[0] else (parcel,)
    )

    def on_mail(mail: Mail):
        if mail.kind == "ViewVote" and late:
            parcel = late[0]
            late.clear()
            assert play.machine.uploaded(parcel.sender, parcel.payload, play.now, NOW_UNIX) == []
        return (mail,)

    play.intercept = on_mail
    play.run()
    assert not late
    assert play.completed.survivors == tuple(lab.names[1:])
    assert play.mismatches() == 0
