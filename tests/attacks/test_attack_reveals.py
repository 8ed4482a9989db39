"""Members who reveal wrongly, devices who dealt wrongly, and too few of either."""

import pytest

from covey_shared import keys, wire
from covey_shared.errors import RefusedError
from covey_shared.messages import Reveal
from covey_shared.secagg.committee import reveal_info
from lab import Lab, Mail
from mallory import Mallory, dealt_wrongly, lie


def lying(play, member, about=None):
    """The member lies from the moment that it votes for the view."""

    def on_mail(mail: Mail):
        if mail.kind == "ViewVote" and mail.sender == member:
            lie(play.lab, member, about)
        return (mail,)

    play.intercept = on_mail
    return play


@pytest.mark.parametrize("dropped", [False, True])
def test_wrong_reveal_names_the_liar_and_the_sum_is_right(dropped):
    # The threshold's worth of reveals do not fit; one more, and the liar stands out.
    lab = Lab(7)
    liar = lab.names[0]
    play = lab.round()
    if dropped:
        play.on_train = lambda name: name != lab.names[6] or play.fail_training(name)
    lying(play, liar).run()
    assert [fault.device for fault in play.faults] == [liar]
    assert play.mismatches() == 0
    assert len(play.completed.survivors) == 7 - dropped


def test_wrong_reveal_about_one_device():
    lab = Lab(7)
    play = lying(lab.round(), lab.names[2], about=[lab.names[5]]).run()
    assert [fault.device for fault in play.faults] == [lab.names[2]]
    assert play.mismatches() == 0


def test_wrong_reveal_without_shares_to_spare():
    # A cohort of three needs all three: a liar can have the round abandoned, but nobody framed.
    lab = Lab(3)
    play = lying(lab.round(), lab.names[0], about=[lab.names[1]]).run()
    assert play.completed is None
    assert "do not fit its commitment, and there are none to spare" in play.abandoned.reason
    assert play.abandoned.blamed == ()
    assert play.faults == []


def test_inconsistent_shares_name_the_dealer_and_abandon_the_round():
    lab = Lab(7)
    dealer = lab.names[3]
    play = lab.round()

    def on_mail(mail: Mail):
        if mail.kind == "Shares" and mail.sender == dealer:
            return (Mail(dealt_wrongly(lab, dealer, lab.names[:4]), dealer, None),)
        return (mail,)

    play.intercept = on_mail
    play.run()
    assert play.completed is None
    assert "pi-003 shared wrongly, or too many members revealed wrongly" in play.abandoned.reason
    assert play.abandoned.blamed == (dealer,)
    assert play.abandoned.after_uploads


def test_a_commitment_to_another_seed_names_its_device():
    """H(b) of something else than what is shared: found out when the secret is put together."""
    lab = Lab(7)
    dealer = lab.names[3]
    play = lab.round()

    def on_mail(mail: Mail):
        if mail.kind == "CheckIn" and mail.sender == dealer:
            fields = {f: getattr(mail.message, f) for f in mail.message.__struct_fields__}
            fields["self_mask_commitment"] = keys.self_mask_commitment(bytes(16))
            forged = wire.sign(type(mail.message)(**fields), lab.identities[dealer])
            # The device must know it as its own, or it would refuse the manifest.
            lab.sessions[dealer]._round.participant.check_in = forged
            return (Mail(forged.envelope, dealer, None),)
        return (mail,)

    play.intercept = on_mail
    play.run()
    assert play.abandoned.blamed == (dealer,)


def test_committee_below_the_threshold():
    lab = Lab(7)
    play = lab.round()

    def on_mail(mail: Mail):
        if mail.kind == "Reveal" and mail.sender in lab.names[:3]:
            play.leave(mail.sender)
        return () if mail.sender in play.gone else (mail,)

    play.intercept = on_mail
    play.run()
    assert play.abandoned.reason == (
        "4 of the committee's 7 members revealed their shares; 5 are needed"
    )
    assert play.abandoned.after_uploads
    assert play.abandoned.blamed == ()


def test_a_reveal_that_does_not_open_is_not_counted():
    lab = Lab(4)
    play = lab.round()
    liar = lab.names[0]

    def on_mail(mail: Mail):
        if mail.kind == "Reveal" and mail.sender == liar:
            r = mail.message
            forged = Reveal(r.h, r.member, r.u3, r.present, bytes(len(r.box)))
            return (Mail(wire.sign(forged, lab.identities[liar]).envelope, liar, None),)
        return (mail,)

    play.intercept = on_mail
    play.run()
    assert "does not open" in str(play.refused[0][1])
    assert play.mismatches() == 0


def test_reveals_do_not_open_for_anybody_else():
    """An observer with every message, and with the reveal keys of other rounds."""
    lab = Lab(4)
    mallory = Mallory(lab).gather().share().deliver().collect().propose().reveal()
    others = [keys.AgreementKey(lab.rng(32)), keys.AgreementKey(lab.coordinator_key.seed)]
    others += [lab.sessions[name]._round.participant.seal_key for name in lab.names]
    for name, signed in mallory.reveals.items():
        sender = mallory.cohort.peers[mallory.cohort.index_of(name)].pk_seal
        info = reveal_info(mallory.cohort.h, name)
        for key in others:
            with pytest.raises(RefusedError, match="does not open"):
                key.open(signed.message.box, sender=sender, info=info)
        assert mallory.reveal_key.open(signed.message.box, sender=sender, info=info)
        for wrong in (reveal_info(bytes(32), name), reveal_info(mallory.cohort.h, "pi-900")):
            with pytest.raises(RefusedError, match="does not open"):
                mallory.reveal_key.open(signed.message.box, sender=sender, info=wrong)


def test_a_reveal_of_an_earlier_round():
    lab = Lab(4)
    first = lab.round().run()
    old = first.sent(Reveal)[0]
    play = lab.round(lab.spec(call=lab.call(2, revision=1)))

    def on_mail(mail: Mail):
        return (old, mail) if mail.kind == "Reveal" else (mail,)

    play.intercept = on_mail
    play.run()
    assert "another round or manifest" in str(play.refused[0][1])
    assert play.mismatches() == 0
