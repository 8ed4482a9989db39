"""The owner's word, which no coordinator can override: which rounds this device joins.

No files and no clock in here: what was decided lies in `policy.toml` (see `config`), what was joined in
the session's memory, and the time is an argument.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from covey_shared import wire
from covey_shared.errors import RemoteProtocolError
from covey_shared.messages import PlanSignature, RoundCall

DAY_S = 24 * 3600
MAX_ROUNDS_PER_DAY = 1000
"""The most that can be told apart from no limit at all: so many check-ins are remembered."""

SAVE_CLOCK_S = 3600
"""How much of a device's time may be forgotten when its process dies while it waits."""


@dataclass(frozen=True, slots=True)
class Policy:
    """Rounds that this device refuses, whatever the coordinator says.

    min_cohort: smallest sum to be part of. max_weight: largest w_max. max_revisions: how often one
    and the same model may be asked for again after abandoned rounds. rounds_per_day: most check-ins
    within 24 hours; 0: no limit. plans: hashes of the only plans to run; empty: any. owners: public
    keys of which one must have signed a plan; empty: nobody needs to. Each holds by itself.
    """

    min_cohort: int = 3
    max_weight: int = 1_000_000
    max_revisions: int = 50
    rounds_per_day: int = 0
    plans: frozenset[bytes] = frozenset()
    owners: frozenset[bytes] = frozenset()

    def objection(
        self, call: RoundCall, contributed: Mapping[str, int], day: "Day", now_unix: float
    ) -> str | None:
        """Why a round that is called is not joined; None if nothing speaks against it.

        contributed: model hash (hex) -> highest revision an update was sent for. The reason goes to
        the coordinator: it tells of this policy, and of nothing else.
        """
        sent = contributed.get(call.model.hex())
        if sent is not None and call.revision <= sent:
            return "this device already contributed to this model"
        if call.revision > self.max_revisions:
            return (
                f"this model was asked for {call.revision} times before; this device's policy "
                f"allows {self.max_revisions}"
            )
        if call.n_min < self.min_cohort:
            return (
                f"the call would sum {call.n_min} devices; this device takes part among at least "
                f"{self.min_cohort}"
            )
        if (objection := self.plan_objection(call)) is not None:
            return objection
        if self.rounds_per_day and day.at(now_unix).rounds >= self.rounds_per_day:
            rounds = "1 round" if self.rounds_per_day == 1 else f"{self.rounds_per_day} rounds"
            return f"this device's policy allows {rounds} a day; no more is left"
        return None

    def plan_objection(self, call: RoundCall) -> str | None:
        """Why nothing of the called plan is run here, be it for a round or for the device itself."""
        if self.plans and call.plan not in self.plans:
            return f"plan {call.plan.hex()[:12]} is not one of those this device's policy allows"
        if self.owners and not self.owners & set(signers_of(call)):
            return (
                f"plan {call.plan.hex()[:12]} is not signed by a model owner whom this device's "
                "policy names"
            )
        return None


def signers_of(call: RoundCall) -> tuple[bytes, ...]:
    """The keys that signed the called plan, each once. Anything else among the signatures, of other
    plans, forged or no signature at all, is as if it were not there."""
    found: dict[bytes, None] = {}
    for envelope in call.plan_signatures:
        try:
            signed = wire.decode_as(PlanSignature, envelope)
            owner = signed.message.owner
            signed.check(owner, signer="the model owner")
        except RemoteProtocolError:
            continue
        if signed.message.plan == call.plan:
            found[owner] = None
    return tuple(found)


@dataclass(frozen=True, slots=True)
class Day:
    """Check-ins of the last 24 hours, by a time of the device's own that never goes back.

    A Pi has no clock that runs without power: it may start in 1970 and jump forward by years, or back
    to where it was switched off. So the device's own time only ever advances, by what the clock
    advanced since it was last looked at, and never by more than a day at once. A clock that jumps back
    stops it for that one look; one that jumps forward empties the day once, no more.

    own_s: the device's own time, in seconds. seen_unix: the clock when it was last looked at; None
    before that. joined: own times of check-ins, rising.
    """

    own_s: int = 0
    seen_unix: int | None = None
    joined: tuple[int, ...] = ()

    def at(self, now_unix: float) -> "Day":
        """The same day, later. What is over is forgotten."""
        now = int(now_unix)
        passed = 0 if self.seen_unix is None else min(max(0, now - self.seen_unix), DAY_S)
        own = self.own_s + passed
        recent = tuple(t for t in self.joined if own - t < DAY_S)
        return Day(own, now, recent)

    def join(self, now_unix: float) -> "Day":
        """With one check-in more."""
        day = self.at(now_unix)
        return replace(day, joined=(*day.joined, day.own_s)[-MAX_ROUNDS_PER_DAY:])

    @property
    def rounds(self) -> int:
        """Check-ins of the last 24 hours, when the clock was last looked at."""
        return len(self.joined)

    def worth_saving(self, saved: "Day") -> bool:
        """Whether a device that waits must keep this, lest it wait again after a restart."""
        seen = 0 if self.seen_unix is None else self.seen_unix
        back = saved.seen_unix is not None and seen < saved.seen_unix
        return back or self.own_s - saved.own_s >= SAVE_CLOCK_S
