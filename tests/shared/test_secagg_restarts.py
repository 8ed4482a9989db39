"""Devices whose process dies and is back in mid-round: present, but without the round's keys."""

import pytest

from covey_shared.messages import Decline
from lab import Lab


@pytest.mark.parametrize("kind", ["CheckIn", "Shares", "RosterVote"])
def test_nobody_waits_for_a_device_that_restarted_in_mid_round(kind):
    # Deadlines are 10 s and 20 s; a device that is back online looks as if it could still answer.
    lab = Lab(5)
    name = lab.names[1]
    play = lab.round()
    play.on_train = lambda device: device != name
    restarted = []

    def restart_after(mail):
        if mail.sender == name and mail.kind == kind and not restarted:
            restarted.append(name)
            play.leave(name)
            play.restart(name)
        return (mail,)

    play.intercept = restart_after
    play.run()
    assert restarted == [name]
    assert len(play.sent(Decline, name)) == 1
    assert play.mismatches() == 0
    assert set(play.completed.survivors) == set(lab.names) - {name}
    assert play.now < 5.0


def test_a_device_that_restarts_between_rounds_joins_the_next_one():
    lab = Lab(4)
    assert lab.round().run().mismatches() == 0
    lab.model = bytes(32)
    lab.restart(lab.names[0])
    play = lab.round(lab.spec(2)).run()
    assert play.mismatches() == 0
    assert set(play.completed.survivors) == set(lab.names)
    assert play.sent(Decline) == []
