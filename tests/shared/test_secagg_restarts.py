"""Devices whose process dies and is back in mid-round: present, but without the round's keys."""

import pytest

from covey_device import session as device
from covey_shared.messages import (
    CheckIn,
    Decline,
    MaskedUpdate,
    Reveal,
    RosterVote,
    Shares,
    ViewVote,
)
from lab import Lab, Mail
from mallory import Mallory, declined, published


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


# -- crashes between any two actions ---------------------------------------------------------------

ONCE = (CheckIn, Shares, RosterVote, MaskedUpdate, ViewVote, Reveal)


class Doomed:
    """One device of a lab whose process ends right before or right after its n-th action of a round.

    Every word that leaves it is kept. After the crash a new process starts with what was saved, and
    gets everything the coordinator ever said, over and over.
    """

    def __init__(self, at, *, n=4, revision=0, lab=None, round_id=1):
        self.lab = lab or Lab(n, n_params=8)
        self.name = self.lab.names[1]
        self.left = at
        self.said = {}  # kind -> all different envelopes
        self.payloads = set()
        self.crashed = False
        self.play = self.lab.round(
            self.lab.spec(call=self.lab.call(round_id, revision=revision), value_bits=8)
        )
        self._did = self.play.device_did
        self.play.device_did = self.did

    def did(self, name, actions):
        if name != self.name:
            self._did(name, actions)
            return
        for action in actions:
            if self.step():
                return
            self.note(action)
            self._did(name, [action])
            if self.crashed:
                return  # fetching or training was part of it
            if self.step():
                return

    def step(self):
        """Whether the power goes now."""
        self.left -= 1
        if self.left != -1:
            return False
        self.crashed = True
        self.play.restart(self.name)
        self.replay()
        return True

    def note(self, action):
        if isinstance(action, device.Publish):
            self.said.setdefault(type(action.message.message), set()).add(action.message.envelope)
        elif isinstance(action, device.Upload):
            self.payloads.add(action.payload)

    def replay(self):
        for mail in [mail for mail in self.play.seen if mail.sender is None]:
            if mail.to in (None, self.name):
                self.play.queue.append(Mail(mail.envelope, None, self.name))

    def run(self):
        self.play.run()
        for _ in range(2):
            self.replay()
            self.play.drain()
        return self


def steps_of_a_round():
    """How many places there are, counted on a device that never crashes."""
    whole = Doomed(10**9).run()
    assert {kind: len(said) for kind, said in whole.said.items()} == dict.fromkeys(ONCE, 1)
    return 10**9 - whole.left


STEPS = steps_of_a_round()


def test_there_are_places_to_crash_at():
    assert 2 * (len(ONCE) + 4) <= STEPS  # with four saves, each before and after


@pytest.mark.parametrize("at", range(STEPS))
def test_a_crash_at_any_step_lets_nothing_leave_twice(at):
    doomed = Doomed(at).run()
    assert doomed.crashed
    assert len(doomed.payloads) <= 1
    for kind in ONCE:
        assert len(doomed.said.get(kind, ())) <= 1, kind.LABEL
    # The others' round is what it would be if the device had vanished; or it finished its upload.
    assert doomed.play.completed is not None
    assert doomed.play.mismatches() == 0
    remembered = bool(doomed.lab.saved[doomed.name]) and bool(
        doomed.lab.saved[doomed.name][-1].contributed
    )
    assert (MaskedUpdate in doomed.said) == remembered
    assert (doomed.name in doomed.play.completed.survivors) == remembered
    # And in the next round, of the same model, it gives an update only if none left in this one.
    lab, gave = doomed.lab, MaskedUpdate in doomed.said
    again = Doomed(10**9, lab=lab, round_id=2).run()
    assert (MaskedUpdate in again.said) <= (not gave)
    third = Doomed(10**9, lab=lab, round_id=3, revision=1).run()
    assert len(third.said[MaskedUpdate]) == 1


def test_without_saves_a_crash_would_let_it_speak_twice():
    """The control: a disk that keeps nothing lets the device check in a second time."""
    doomed = Doomed(STEPS - 1)
    doomed.lab.saved[doomed.name] = type("Nothing", (list,), {"append": lambda *_: None})()
    doomed.run()
    assert len(doomed.said[CheckIn]) == 2


# -- votes, whatever else is remembered ------------------------------------------------------------


def up_to(kind, memory=None):
    """A round up to the step before a vote, with the same randomness each time."""
    lab = Lab(4, n_params=8)
    name = lab.names[1]
    if memory is not None:
        # As if the number of the last round had been lost, and the very keys come again.
        lab.started[name] = 0
        lab.sessions[name] = lab.session(name, memory)
    mallory = Mallory(lab).gather().share()
    if kind is ViewVote:
        mallory.deliver().collect()
    return mallory, name


@pytest.mark.parametrize("kind", [RosterVote, ViewVote])
def test_a_vote_that_was_saved_is_the_only_one_that_is_signed(kind):
    first, name = up_to(kind)
    others = first.u2 - {0}
    actions = first.tell(name, first.delivery(name) if kind is RosterVote else first.proposal())
    [signed] = published(actions, kind)
    [save] = [a for a in actions if isinstance(a, device.Save)]
    assert actions.index(save) < [isinstance(a, device.Publish) for a in actions].index(True)
    votes = tuple(vote for vote in save.memory.votes if vote.kind == kind.LABEL)
    assert [vote.kind for vote in votes] == [kind.LABEL]

    # The same vote may be signed again: it is the same bytes.
    again, _ = up_to(kind, device.Memory(votes=votes))
    assert again.cohort.h == first.cohort.h
    message = again.delivery(name) if kind is RosterVote else again.proposal()
    [same] = published(again.tell(name, message), kind)
    assert same.envelope == signed.envelope

    # Another one may not: not even the signature is made.
    twice, _ = up_to(kind, device.Memory(votes=votes))
    keys_used = []
    identity = twice.lab.sessions[name]._identity
    holder = twice.lab.sessions[name]._round.member
    holder._identity = type(
        "Watched",
        (),
        {"sign": lambda _, label, body: keys_used.append(label) or identity.sign(label, body)},
    )()
    message = twice.delivery(name, others) if kind is RosterVote else twice.proposal(twice.u3 - {0})
    actions = twice.tell(name, message)
    assert declined(actions) == f"a second, different {kind.LABEL} for one manifest"
    assert published(actions, kind) == []
    assert keys_used == []

    # The control: without what was saved, it would be signed.
    free, _ = up_to(kind, device.Memory())
    message = free.delivery(name, others) if kind is RosterVote else free.proposal(free.u3 - {0})
    assert published(free.tell(name, message), kind)


def test_remembered_votes_are_bounded():
    lab = Lab(3, n_params=8)
    for round_id in range(1, 12):
        lab.model = bytes([round_id]) * 32
        lab.round(lab.spec(round_id)).run()
    for name in lab.names:
        votes = lab.saved[name][-1].votes
        assert len(votes) == device.MAX_VOTES
        assert len({(vote.h, vote.kind) for vote in votes}) == device.MAX_VOTES
