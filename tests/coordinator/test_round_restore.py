"""A round that goes on in another process: at any moment, as if nothing had happened."""

import random
from dataclasses import replace

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from covey_coordinator.journal import Added, Entered, Entry, JournalError, decode, encode
from covey_coordinator.round import Abandoned, Completed, Fault, Phase, Publish, Round, RoundSpec
from covey_shared import wire
from covey_shared.messages import (
    CheckIn,
    DeviceId,
    Manifest,
    Roster,
    RosterVote,
    RoundAbandoned,
    RoundCall,
    View,
    ViewProposal,
)
from covey_shared.wire import Signed
from lab import NOW_UNIX, Lab, Mail, Play, seeded

SAID_ONCE = (RoundCall, Manifest, Roster, ViewProposal, View, RoundAbandoned)


class Lives(Play):
    """A round whose coordinator dies now and then. Entries are on disk before actions happen."""

    def __init__(self, lab: Lab, spec: RoundSpec) -> None:
        self.journal: list[bytes] = []
        self.secret = b""
        self.lives = 0
        self.chance = random.Random(lab.seed)
        self.deaths = 0.0
        self.phases_of_death: list[Phase] = []
        self.written = 0
        self.said: dict[type, set[bytes]] = {}
        super().__init__(lab, self.made(lab, spec))

    def made(self, lab: Lab, spec: RoundSpec) -> Round:
        self.lives += 1
        machine = Round(
            spec,
            lab.trust,
            lab.coordinator_key,
            rng=seeded((lab.seed, "round", spec.call.round, self.lives)),
            present=frozenset(lab.names) if self.lives == 1 else frozenset(),
            record=lambda entry: self.journal.append(encode(entry)),
            reveal_secret=self.secret or None,
        )
        self.secret = machine._reveal_secret
        return machine

    def die(self) -> None:
        """And come back at once. Whoever is online is announced again."""
        self.phases_of_death.append(self.machine.phase)
        self.machine = self.made(self.lab, self.machine.spec)
        before = list(self.journal)
        actions = self.machine.restore(
            [decode(data) for data in self.journal], self.uploads.__getitem__, self.now
        )
        assert self.journal == before or not before
        self.expected.clear()
        self.coordinator_did(actions)
        for name in self.gone:
            self.coordinator_did(self.machine.presence(name, False, self.now, NOW_UNIX))

    def coordinator_did(self, actions: list[object]) -> None:  # type: ignore[override]
        for action in actions:
            # Before or after each thing that others see.
            if self.chance.random() < self.deaths and self.completed is None:
                return self.die()
            if isinstance(action, Publish):
                kind = type(action.message.message)
                self.said.setdefault(kind, set()).add(action.message.envelope)
            super().coordinator_did([action])  # type: ignore[list-item]
        return None

    def check(self) -> None:
        for kind in SAID_ONCE:
            assert len(self.said.get(kind, ())) <= 1, f"two different messages: {kind.LABEL}"
        assert (self.completed is None) != (self.abandoned is None)
        if self.completed is not None:
            assert self.mismatches() == 0


def lives(seed: int = 1, n: int = 4, **changes: object) -> Lives:
    lab = Lab(n, seed=seed)
    return Lives(lab, lab.spec(**changes))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(seed=st.integers(0, 2**32), often=st.sampled_from([0.02, 0.1, 0.3]))
def test_dying_at_any_moment_changes_nothing(seed: int, often: float):
    play = lives(seed)
    play.deaths = often
    play.pick = lambda: play.chance.randrange(len(play.queue))
    play.run(limit_s=2000.0)
    assert play.completed is not None, play.abandoned
    assert set(play.completed.survivors) <= set(play.lab.names)
    play.check()


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(seed=st.integers(0, 2**32), losses=st.sampled_from([0.05, 0.2]))
def test_dying_while_messages_are_lost_and_devices_leave(seed: int, losses: float):
    play = lives(seed, n=6)
    play.deaths = 0.05
    play.intercept = lambda mail: () if play.chance.random() < losses else (mail,)
    leaves = play.chance.choice(play.lab.names)

    def on_train(name: DeviceId) -> bool:
        if name == leaves:
            play.leave(name)
            return False
        return True

    play.on_train = on_train
    play.run(limit_s=2000.0)
    play.check()


@pytest.mark.parametrize("phase", [phase for phase in Phase if phase is not Phase.ABANDONED])
def test_a_death_at_the_entry_of_every_phase(phase: Phase):
    play = lives()
    inner, died = play.machine._enter, []

    def coordinator_did(actions: list[object]) -> None:
        if play.machine.phase is phase and not died:
            died.append(phase)
            return play.die()  # nothing of it went out
        return Lives.coordinator_did(play, actions)

    play.coordinator_did = coordinator_did  # type: ignore[method-assign,assignment]
    play.run()
    assert died == [phase]
    assert inner is not None
    assert play.completed is not None
    assert set(play.completed.survivors) == set(play.lab.names)
    play.check()


def journal_of(phase: Phase) -> tuple[Lives, list[Entry]]:
    """A journal that ends with the entry of a phase."""
    play = lives()
    play.run()
    entries = [decode(data) for data in play.journal]
    return play, entries[: entries.index(Entered(phase)) + 1]


def restored(play: Lives, entries: list[Entry]) -> list[object]:
    play.journal = []
    machine = play.made(play.lab, play.machine.spec)
    return list(machine.restore(entries, play.uploads.__getitem__, 0.0))


def test_every_entry_is_the_same_after_being_written():
    play = lives()
    play.run()
    for data in play.journal:
        assert encode(decode(data)) == data
    fault = Fault(DeviceId("pi-1"), "says é twice")
    assert decode(encode(fault)) == fault
    assert decode(encode(Added(DeviceId("pi-1")))) == Added(DeviceId("pi-1"))


@pytest.mark.parametrize("data", [b"", b"x", b"m", b"mrubbish", b"pnowhere", b"u\xff"])
def test_a_damaged_entry_is_named(data: bytes):
    with pytest.raises(JournalError, match="journal"):
        decode(data)


def test_an_empty_journal_is_a_round_that_was_never_called():
    play = lives()
    play.machine = play.made(play.lab, play.machine.spec)
    play.journal.clear()
    actions = play.machine.restore([], play.uploads.__getitem__, 0.0)
    assert isinstance(actions[0], Publish)
    assert isinstance(actions[0].message.message, RoundCall)
    assert len(play.journal) == 2


@pytest.mark.parametrize("phase", [Phase.SHARE, Phase.COLLECT, Phase.VIEW, Phase.UNMASK])
def test_a_journal_that_lacks_what_we_said_is_refused(phase: Phase):
    play, entries = journal_of(phase)
    ours = [
        position
        for position, entry in enumerate(entries[:-1])
        if isinstance(entry, Entered)
        or (isinstance(entry, Signed) and isinstance(entry.message, SAID_ONCE))
    ]
    assert len(ours) >= 3
    for missing in ours:
        with pytest.raises(JournalError):
            restored(play, entries[:missing] + entries[missing + 1 :])


def test_a_journal_that_lacks_a_vote_of_the_quorum_is_refused():
    play, entries = journal_of(Phase.COLLECT)
    votes = [
        position
        for position, entry in enumerate(entries)
        if isinstance(entry, Signed) and isinstance(entry.message, RosterVote)
    ]
    assert votes
    for missing in votes:
        with pytest.raises(JournalError, match="other messages"):
            restored(play, entries[:missing] + entries[missing + 1 :])


def test_another_reveal_key_is_refused():
    play, entries = journal_of(Phase.SHARE)
    play.secret = bytes(32)
    with pytest.raises(JournalError, match="reveal key"):
        restored(play, entries)


def test_an_upload_that_is_gone_cannot_be_made_up_for():
    play, entries = journal_of(Phase.VIEW)
    play.uploads.popitem()
    with pytest.raises(KeyError):
        restored(play, entries)


def test_phases_in_another_order_are_refused():
    play, entries = journal_of(Phase.COLLECT)
    swapped = [replace(e, phase=Phase.VIEW) if e == Entered(Phase.COLLECT) else e for e in entries]
    with pytest.raises(JournalError):
        restored(play, swapped)


def test_what_a_round_came_to_is_said_again():
    play, entries = journal_of(Phase.DONE)
    (done,) = [a for a in restored(play, entries) if isinstance(a, Completed)]
    assert play.completed is not None
    assert (done.ring_sum == play.completed.ring_sum).all()


def test_an_abandoned_round_stays_abandoned():
    play = lives()
    play.leave(play.lab.names[0])
    for name in play.lab.names:
        play.leave(name)
    play.run()
    assert play.abandoned is not None
    entries = [decode(data) for data in play.journal]
    (again,) = [a for a in restored(play, entries) if isinstance(a, Abandoned)]
    assert again.reason == play.abandoned.reason
    assert again.after_uploads == play.abandoned.after_uploads


def test_faults_are_told_again():
    play = lives()

    def twice(mail: Mail) -> tuple[Mail, ...]:
        if mail.sender != play.lab.names[0] or not isinstance(mail.message, CheckIn):
            return (mail,)
        other = msgspec.structs.replace(mail.message, self_mask_commitment=bytes(32))
        envelope = wire.sign(other, play.lab.identities[mail.sender]).envelope
        return mail, Mail(envelope, mail.sender, None)

    play.intercept = twice
    play.run()
    assert len(play.faults) == 1
    entries = [decode(data) for data in play.journal]
    entries = entries[: entries.index(Entered(Phase.DONE)) + 1]
    assert [a for a in restored(play, entries) if isinstance(a, Fault)] == play.faults
