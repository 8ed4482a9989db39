"""What is not resisted, shown: each of these attacks works, and docs/attacks.md says so.

A change that makes one of them fail is good news, and then the document has to say that.
"""

import numpy as np

from covey_device.policy import Policy
from covey_shared import wire
from covey_shared.errors import MalformedError
from covey_shared.fixedpoint import to_signed
from covey_shared.messages import MaskedUpdate, Shares
from lab import Lab, Mail
from mallory import Mallory, declined


def with_fixed_updates(lab):
    """Devices whose training gives the same every time."""
    update = lab.update
    lab.update = lambda name, round_id: update(name, 1)
    return lab


def flipped(model):
    return bytes((model[0] ^ 1,)) + model[1:]


def test_the_difference_of_two_sums_is_one_devices_update():
    """The same model is asked for again with one device less; the difference of the sums is its update.

    A coordinator that claims an abandoned round it did not have can ask so a few times by itself;
    one that follows the rules still publishes sums of successive rounds that differ by few devices.
    """
    lab = with_fixed_updates(Lab(5, n_params=60))
    first = Mallory(lab).gather().share().deliver().collect().propose().reveal()
    both = [first.aggregate()]
    second = Mallory(lab, 2, revision=1).gather()
    del second.check_ins[lab.names[4]]
    second.share().deliver().collect().propose().reveal()
    assert len(second.updates) == 4
    both.append(second.aggregate())
    difference = (both[0] - both[1])[: lab.n_params]
    victim = first.plain([lab.names[4]])[: lab.n_params]
    # But for the rounding, at most one unit up or down for each of the five devices, it is bare.
    assert abs(difference - victim).max() <= 5
    assert abs(victim).max() > 500


def test_a_device_bounds_how_often_it_gives_the_same_model():
    # What there is against it: a number of revisions, which the owner sets.
    lab = Lab(3, policy=Policy(max_revisions=2))
    given = 0
    for revision in range(5):
        mallory = Mallory(lab, revision + 1, revision=revision)
        if declined(mallory.tell(lab.names[0], mallory.call)) is None:
            given += 1
    assert given == 3


def test_a_model_changed_by_one_bit_counts_as_another():
    # The bound above is per model; a coordinator may call any number of rounds on others.
    lab = with_fixed_updates(Lab(3, n_params=60))
    first = Mallory(lab).gather().share().deliver().collect().propose().reveal()
    lab.model = flipped(lab.model)
    second = Mallory(lab, 2).gather().share().deliver().collect().propose().reveal()
    assert abs(first.aggregate() - second.aggregate())[: lab.n_params].max() <= 3


def test_a_sum_of_one_update_and_zeros_is_that_update():
    """A crowd hides only those who have something to hide.

    A plan or model that is made so that the others' updates are nothing gives the sum away; so do
    n - 1 accomplices with certificates of the fleet.
    """
    lab = Lab(5, n_params=60)
    update = lab.update
    silent = (np.zeros(60, np.float32), 1, (0.0,))
    lab.update = lambda name, r: update(name, r) if name == lab.names[2] else silent
    play = lab.round().run()
    bits = play.completed.encoding.bits
    total = to_signed(play.completed.ring_sum, bits)[:60]
    assert np.array_equal(total, to_signed(lab.plain[lab.names[2], 1], bits)[:60])


def test_one_device_can_spoil_a_sum():
    """Clipping binds honest devices only: what a device adds under its mask, nobody sees."""
    lab = Lab(4)
    play = lab.round()
    poisoner = lab.names[1]

    def on_mail(mail: Mail):
        if mail.kind == "RosterVote" and mail.sender == poisoner:
            inner = lab.sessions[poisoner]._round
            inner.ring[: lab.n_params] += 2**14  # a vote that counts as much as any two others
            inner.ring[lab.n_params] = 2**16  # and a negative number of examples
        return (mail,)

    play.intercept = on_mail
    play.run()
    assert play.completed is not None
    assert play.mismatches() > lab.n_params - 1
    try:
        decoded = play.completed.encoding.decode_sum(play.completed.ring_sum)
    except MalformedError:  # which is all that is noticed, if the weights come out negative
        return
    assert np.isfinite(decoded.average).all()


def test_a_lying_coordinator_can_announce_any_result():
    # Devices learn which model the next round starts from, not whether it is the average.
    lab = Lab(3)
    play = lab.round()

    def on_mail(mail: Mail):
        return () if mail.kind == "Result" else (mail,)

    play.intercept = on_mail
    play.run()
    actions = play.machine.publish_result(bytes(32), play.completed.ring_sum * 0)
    for name in lab.names:
        *_, ended = lab.sessions[name].receive(actions[0].message.envelope)
        assert ended.contributed


def test_who_took_part_and_when_is_seen_by_everybody():
    lab = Lab(4)
    play = lab.round()
    play.on_train = lambda name: name != lab.names[3] or play.fail_training(name)
    play.run()
    assert {mail.sender for mail in play.sent(MaskedUpdate)} == set(lab.names[:3])


def test_one_device_can_have_a_round_abandoned():
    """By boxes that nobody can open, and by much else. It is named, and kept out for a while."""
    lab = Lab(4)
    play = lab.round()
    saboteur = lab.names[0]

    def on_mail(mail: Mail):
        if mail.kind == "Shares" and mail.sender == saboteur:
            boxes = tuple(bytes(len(box)) for box in mail.message.boxes)
            forged = wire.sign(Shares(mail.message.h, saboteur, boxes), lab.identities[saboteur])
            return (Mail(forged.envelope, saboteur, None),)
        return (mail,)

    play.intercept = on_mail
    play.run()
    assert play.abandoned.blamed == (saboteur,)
