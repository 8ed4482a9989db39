"""A fleet under a hostile scheduler: hypothesis delivers, loses, repeats, kills and restarts.

Three things hold whatever happens: a completed round's sum is exactly that of its survivors, a round
never ends twice, and no device ever signs two rosters or views, or masks twice, in one round.
"""

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from covey_device import session as device
from covey_shared.messages import CheckIn, MaskedUpdate, RosterVote, ViewVote
from covey_shared.secagg.parameters import parameters_for
from lab import Lab

ONCE = {
    CheckIn: lambda m: m.pk_mask,
    RosterVote: lambda m: (m.u2, m.readable),
    MaskedUpdate: lambda m: m.payload,
    ViewVote: lambda m: (m.u2, m.u3),
}
MOST_ROUNDS = 3


class FleetMachine(RuleBasedStateMachine):
    """A few devices, one round after another.

    At most one device more than the threshold bears is taken away in a round, so that most rounds
    get far.
    """

    @initialize(seed=st.integers(0, 2**32 - 1), n=st.sampled_from([4, 5, 7]))
    def start(self, seed, n):
        self.lab = Lab(n, seed=seed, n_params=8)
        self.round_id = 0
        self.revision = 0
        self.said = {}  # (device, round, kind) -> everything different it ever said
        self.sums = 0
        self.open()

    def open(self):
        self.round_id += 1
        call = self.lab.call(self.round_id, revision=self.revision, model=bytes([1]) * 32)
        self.play = self.lab.round(self.lab.spec(call=call, value_bits=8))
        self.play.scatter = True
        self.harmed = set()
        self.play.open()

    def harm(self, at):
        """A device that may be taken away, or None."""
        name = self.lab.names[at % self.lab.n]
        most = self.lab.n - parameters_for(self.lab.n).threshold + 1
        if self.play.machine.over or len(self.harmed | {name}) > most:
            return None
        self.harmed.add(name)
        return name

    def note(self):
        """Remember what the devices said, before anything is lost."""
        for name, actions in self.play.actions.items():
            for action in actions:
                if isinstance(action, device.Publish):
                    message = action.message.message
                    if (kind := type(message)) in ONCE:
                        key = (name, self.round_id, kind)
                        self.said.setdefault(key, set()).add(ONCE[kind](message))

    # -- what may happen --------------------------------------------------------------------------

    @precondition(lambda self: self.play.queue)
    @rule(count=st.integers(1, 60), order=st.randoms(use_true_random=False))
    def deliver_in_any_order(self, count, order):
        self.play.pick = lambda: order.randrange(len(self.play.queue))
        for _ in range(count):
            if self.play.queue:
                self.play.step()

    @precondition(lambda self: self.play.queue)
    @rule(count=st.integers(1, 60))
    def deliver(self, count):
        self.play.pick = lambda: 0
        for _ in range(count):
            if self.play.queue:
                self.play.step()

    @precondition(lambda self: self.play.queue)
    @rule(at=st.integers(0, 1000))
    def lose(self, at):
        del self.play.queue[at % len(self.play.queue)]

    @precondition(lambda self: self.play.queue)
    @rule(at=st.integers(0, 1000))
    def repeat(self, at):
        self.play.queue.append(self.play.queue[at % len(self.play.queue)])

    @precondition(lambda self: self.play.seen)
    @rule(at=st.integers(0, 1000))
    def play_back(self, at):
        self.play.queue.append(self.play.seen[at % len(self.play.seen)])

    @rule(seconds=st.sampled_from([0.5, 3.0]))
    def wait(self, seconds):
        if not self.play.machine.over:
            self.play.pass_time(seconds)

    @rule(at=st.integers(0, 6))
    def vanish(self, at):
        if (name := self.harm(at)) is not None:
            self.play.leave(name)

    @rule(at=st.integers(0, 6))
    def restart(self, at):
        if (name := self.harm(at)) is not None:
            self.play.restart(name)

    @rule(at=st.integers(0, 6), actions=st.integers(0, 5))
    def crash_soon(self, at, actions):
        """The process ends in the middle of what it is about to do: between a save and a message, say."""
        if (name := self.harm(at)) is not None:
            self.play.crash_after[name] = actions

    @rule(at=st.integers(0, 6))
    def fail_training(self, at):
        name = self.lab.names[at % self.lab.n]
        if name not in self.play.gone:
            self.play.fail_training(name)

    @precondition(lambda self: self.play.machine.over and self.round_id < MOST_ROUNDS)
    @rule()
    def next_round(self):
        self.finish()
        self.revision += 1
        for name in self.play.gone:
            self.lab.restart(name)
        self.open()

    # -- what always holds ------------------------------------------------------------------------

    @invariant()
    def nobody_speaks_twice(self):
        self.note()
        for (name, round_id, kind), versions in self.said.items():
            assert len(versions) == 1, f"{name} has two {kind.LABEL}s in round {round_id}"

    @invariant()
    def a_round_ends_once(self):
        play = self.play
        assert play.completed is None or play.abandoned is None
        assert play.machine.over == (play.completed is not None or play.abandoned is not None)

    @invariant()
    def nobody_is_accused(self):
        assert self.play.faults == []

    @invariant()
    def sums_are_exact(self):
        if self.play.completed is not None:
            assert self.play.mismatches() == 0
            assert len(self.play.completed.survivors) >= 3
            for name in self.play.completed.survivors:
                assert (name, self.round_id, MaskedUpdate) in self.said

    def finish(self):
        """Let the round come to its end in good weather."""
        self.play.pick = lambda: 0
        for _ in range(200):
            self.play.drain()
            if self.play.machine.over:
                break
            self.play.pass_time(3.0)
        assert self.play.machine.over
        self.nobody_speaks_twice()
        self.sums_are_exact()

    def teardown(self):
        if hasattr(self, "play"):
            self.finish()


TestFleet = FleetMachine.TestCase
TestFleet.settings = settings(
    max_examples=40,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],  # a step is a whole phase of a fleet
)
