"""One round as a phase table, without I/O.

Bytes, completed uploads, presence hints and the clock come in, actions come out. A phase ends when
everyone it waits for has answered, when everyone *present* has and a short grace is over, or at its
deadline. What a phase then has decides: the next phase, or an abandoned round with a reason.

Duplicates are harmless: the same bytes again change nothing, other bytes in their place are
equivocation, reported and ignored. Unanswered messages are repeated every `resend_s`.

A round outlives its process: what counts is given to `record`, and `restore` plays it back. So deciding
that a phase ends (`_end_...`, which looks at clocks and at who is there) and entering the next one
(`_enter_...`, which follows from what counts alone) are two things.
"""

import hashlib
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import TypeVar, cast

from covey_coordinator.journal import Added, Entered, Entry, JournalError
from covey_coordinator.phases import (
    TRANSITIONS,
    Abandoned,
    Action,
    Completed,
    Event,
    Expect,
    Fault,
    Moved,
    Phase,
    Publish,
    RoundSpec,
)
from covey_coordinator.statements import abandonment, deliveries, head_of
from covey_coordinator.turnout import Course
from covey_shared import keys, wire
from covey_shared.errors import CoveyError, LocalProtocolError, RefusedError, RemoteProtocolError
from covey_shared.fixedpoint import pack
from covey_shared.keys import AgreementKey, Rng, SigningKey
from covey_shared.masking import Ring
from covey_shared.messages import (
    CheckIn,
    Decline,
    DeviceId,
    Manifest,
    MaskedUpdate,
    Message,
    Result,
    Reveal,
    Roster,
    RosterVote,
    RoundAbandoned,
    Shares,
    View,
    ViewProposal,
    ViewVote,
    for_display,
)
from covey_shared.secagg import rules
from covey_shared.secagg.aggregator import Aggregator, NotEnoughSharesError
from covey_shared.secagg.cohort import Cohort, Trust
from covey_shared.wire import Signed

__all__ = [
    "TRANSITIONS",
    "Abandoned",
    "Action",
    "Completed",
    "Event",
    "Expect",
    "Fault",
    "Moved",
    "Phase",
    "Publish",
    "Round",
    "RoundSpec",
    "new_run_id",
]

M = TypeVar("M", bound=Message)

_ORDER = list(Phase)


class Round:
    """The coordinator's side of one round.

    trust: the fleet's public keys. key: the coordinator's signing key. admit: (device, identity) ->
    why it may not take part, or None. present: devices online as far as is known. record: given what
    counts, once and in order, before any action that follows from it (see `journal`). left_out: told whose
    check-in was refused, and why, or (None) came too late. reveal_secret: of a round that is taken up
    again; None: a new one.
    """

    def __init__(
        self,
        spec: RoundSpec,
        trust: Trust,
        key: SigningKey,
        *,
        rng: Rng,
        present: frozenset[DeviceId],
        admit: Callable[[DeviceId, bytes], str | None] = lambda device, identity: None,
        record: Callable[[Entry], None] = lambda entry: None,
        left_out: Callable[[DeviceId, str | None], None] = lambda device, why: None,
        reveal_secret: bytes | None = None,
    ) -> None:
        self.spec = spec
        self._record = record
        self._trust = trust
        self._key = key
        self._rng = rng
        self._admit = admit
        self._present = set(present)
        self.phase = Phase.GATHER
        self._entered = self._last_sent = 0.0
        self._heard = 0.0  # when a device last came, went, or answered
        self._gone_at: dict[DeviceId, float] = {}  # of those that are awaited
        self._reveal_secret = rng(32) if reveal_secret is None else reveal_secret
        self._reveal_key = AgreementKey(self._reveal_secret)
        self._check_ins: dict[DeviceId, Signed[CheckIn]] = {}
        self._key_owners: dict[bytes, DeviceId] = {}
        self._declined: dict[DeviceId, str] = {}
        self._left_out = left_out
        self._called: frozenset[DeviceId] = frozenset()
        self._last = Phase.GATHER
        self._outside = False
        self.cohort: Cohort | None = None
        self._shares: dict[int, Signed[Shares]] = {}
        self.roster: frozenset[int] = frozenset()
        self._roster_votes: dict[int, Signed[RosterVote]] = {}
        self._updates: dict[int, Signed[MaskedUpdate]] = {}
        self._aggregator: Aggregator | None = None
        self.view: frozenset[int] = frozenset()
        self._view_votes: dict[int, Signed[ViewVote]] = {}
        self._reveals: dict[int, Signed[Reveal]] = {}
        self._standing: list[Publish] = []  # what the phase keeps repeating to who has not answered
        self._deliveries: list[Publish] = []  # repeated until their member votes
        self._tried_to_unmask = False
        # Of a journal that is played back: what was left to chance, and why it was given up.
        self._manifest: Signed[Manifest] | None = None
        self._reason = ""

    # -- what happens -----------------------------------------------------------------------------

    def open(self, now: float) -> list[Action]:
        """Call the round."""
        self._entered = self._last_sent = now
        self._standing = [Publish(self._said(self.spec.call), retain=True)]
        self._record(Entered(Phase.GATHER))
        return [*self._standing, Moved(Phase.GATHER, f"{len(self._present)} devices present")]

    def restore(
        self,
        entries: Iterable[Entry],
        uploaded: Callable[[DeviceId], bytes],
        now: float,
    ) -> list[Action]:
        """Instead of `open`: go on where another process left off, whose journal this is.

        uploaded: gives the whole of an update that was added. The phase's waiting begins anew, and all
        that it repeats is said at once. Everybody who is awaited counts as present until we hear
        otherwise. Nothing is recorded again.

        Raises JournalError (the machine is of no use then), and what `uploaded` raises.
        """
        kept, replayed, actions = list(entries), list[Entry](), list[Action]()
        if not kept:
            return self.open(now)
        live, self._record = self._record, replayed.append
        admit, self._admit = self._admit, lambda device, identity: None  # they were admitted
        try:
            for position, entry in enumerate(kept):
                actions += self._again(entry, kept[position + 1 :], uploaded, now)
        except CoveyError as error:
            raise JournalError(f"the journal cannot be followed: {error}") from error
        finally:
            self._record, self._admit = live, admit
        if replayed != kept:
            raise JournalError("the journal leads to other messages than it has")
        self._present |= self._awaited_names() | set(self._check_ins)
        self._heard = now
        if self.over:
            return actions
        return [*actions, Moved(self.phase, "taken up again", resumed=True), *self._repeats()]

    def _again(
        self,
        entry: Entry,
        following: list[Entry],
        uploaded: Callable[[DeviceId], bytes],
        now: float,
    ) -> list[Action]:
        """One entry of the journal. What we said follows from the others, but for the manifest."""
        match entry:
            case Entered(phase):
                actions = self._enter_again(phase, now)
                ends = [a for a in actions if isinstance(a, Completed | Abandoned)]
                return actions if ends and not following else []
            case Added(device):
                self._add(device, uploaded(device))
            case Fault():
                self._record(entry)
                return [entry]
            case Signed(
                CheckIn() | Decline() | Shares() | RosterVote() | MaskedUpdate() as message
            ):
                return self._take(
                    entry, message.member if isinstance(message, RosterVote) else message.device, 0
                )
            case Signed(ViewVote() | Reveal() as message):
                return self._take(entry, message.member, 0)
            case Signed(Manifest() as manifest):
                self._manifest = Signed(manifest, entry.envelope)
            case Signed(RoundAbandoned(reason=reason)):
                self._reason = reason
        return []

    def _enter_again(self, phase: Phase, now: float) -> list[Action]:
        """Enter the phase that was entered; whether to is not asked."""
        if phase is Phase.GATHER:
            return self.open(now)
        if phase is Phase.ABANDONED:
            self._outside = True  # as far as is known: nobody is said to have been silent
            return self._abandon(self._reason)
        if TRANSITIONS[self.phase].get(Event.ENOUGH) is not phase:
            raise JournalError(f"from phase {self.phase.value} to {phase.value}")
        if phase is Phase.SHARE:
            if self._manifest is None:
                raise JournalError("a cohort without a manifest")
            return self._enter_share(self._manifest, now)
        return {
            Phase.ROSTER: self._enter_roster,
            Phase.COLLECT: self._enter_collect,
            Phase.VIEW: self._enter_view,
            Phase.UNMASK: self._enter_unmask,
            Phase.DONE: self._enter_done,
        }[phase](now)

    def sent(self, now: float) -> None:
        """What opened the phase has gone out: only now can anybody answer, and the waiting begins."""
        self._entered = self._last_sent = now

    def repeat_soon(self, now: float) -> None:
        """The network lost what was on its way: repeat what stands in a second, for most to be back."""
        self._last_sent = min(self._last_sent, now + 1.0 - self.spec.resend_s)

    def receive(self, data: bytes, sender: DeviceId, now: float, now_unix: int) -> list[Action]:
        """One message from a device's outbox. sender: the topic's device, which must match.

        Raises RemoteProtocolError, with nothing changed, for what is not a sound message of this
        round by that device.
        """
        answered = self._answered_names()
        actions = self._take(wire.decode(data), sender, now_unix)
        if self._answered_names() != answered:
            self._heard = now
        return actions + self._advance(now, now_unix)

    def _take(self, signed: Signed[Message], sender: DeviceId, now_unix: int) -> list[Action]:
        message = signed.message
        match message:
            case CheckIn():
                try:
                    return self._check_in(Signed(message, signed.envelope), sender, now_unix)
                except RemoteProtocolError as error:
                    self._left_out(sender, for_display(str(error)))
                    raise
            case Decline():
                return self._decline(Signed(message, signed.envelope), sender)
            case Shares() | RosterVote() | MaskedUpdate() | ViewVote() | Reveal():
                return self._in_cohort(signed, sender)
            case _:
                raise RefusedError(f"a {message.LABEL} is not for the coordinator")

    def uploaded(self, device: DeviceId, payload: bytes, now: float, now_unix: int) -> list[Action]:
        """The whole of an expected upload, its digest checked. Late ones are dropped.

        Raises MalformedError, with nothing changed, for one that is not a packed update.
        """
        if self.phase is not Phase.COLLECT:
            return []
        self._add(device, payload)
        return self._advance(now, now_unix)

    def _add(self, device: DeviceId, payload: bytes) -> None:
        cohort, aggregator = self.cohort, self._aggregator
        if cohort is None or aggregator is None or self.phase is not Phase.COLLECT:
            raise LocalProtocolError(f"an upload of {device} while there is no sum")
        index = cohort.index_of(device)
        if index not in self._updates:
            raise LocalProtocolError(f"an upload of {device} that was not expected")
        if index not in aggregator.added:
            aggregator.add(index, payload)
            self._record(Added(device))

    def presence(self, device: DeviceId, online: bool, now: float, now_unix: int) -> list[Action]:
        """A hint that a device came or went. Nothing but waiting times hangs on it."""
        self._heard = now
        if not online and device in self._awaited_names():
            self._gone_at[device] = now
        (self._present.add if online else self._present.discard)(device)
        return self._advance(now, now_unix)

    def tick(self, now: float, now_unix: int) -> list[Action]:
        """Time passes: deadlines, grace periods, repeats. Call it a few times a second."""
        actions = self._advance(now, now_unix)
        if not self.over and now - self._last_sent >= self.spec.resend_s:
            self._last_sent = now
            actions += self._repeats()
        return actions

    def _repeats(self) -> list[Publish]:
        """What is sent again: what the phase waits for an answer to, and before it the boxes of
        members without a roster vote. A phase ends with a quorum; who missed it may be needed yet."""
        answered = self._answered_names()
        standing = [p for p in self._standing if p.to is None or p.to not in answered]
        if self.cohort is None or self.phase is Phase.ROSTER:
            return standing
        lacking = self._present - set(self.cohort.names(set(self._roster_votes)))
        return [p for p in self._deliveries if p.to in lacking] + standing

    def abandon(self, reason: str) -> list[Action]:
        """Give the round up, for a reason outside of it."""
        if self.over:
            return []
        self._outside = True
        return self._abandon(reason)

    def publish_result(self, next_model: bytes, ring_sum: Ring) -> list[Action]:
        """Tell everyone how the round ended. next_model: the hash of the model it led to."""
        cohort = self.cohort
        if self.phase is not Phase.DONE or cohort is None:
            raise LocalProtocolError("only a completed round has a result")
        call = self.spec.call
        result = Result(
            h=cohort.h,
            fleet=call.fleet,
            run=call.run,
            round=call.round,
            u3=cohort.bitmap(self.view),
            votes=self._quorum(self._view_votes),
            ring_sum=hashlib.sha256(pack(ring_sum, cohort.head.bits)).digest(),
            next_model=next_model,
        )
        return [Publish(self._said(result))]

    @property
    def reveal_secret(self) -> bytes:
        """The private half of the head's pk_reveal, which shows of a round with a result what we know
        of it, and is nobody's business in any other."""
        if self.phase is not Phase.DONE:
            raise LocalProtocolError("a round without a sum keeps what was revealed to it")
        return self._reveal_secret

    def _said(self, message: M) -> Signed[M]:
        """Sign what goes to all devices."""
        signed = wire.sign(message, self._key)
        self._record(signed)
        return signed

    @property
    def over(self) -> bool:
        """Done or abandoned."""
        return not TRANSITIONS[self.phase]

    @property
    def declined(self) -> dict[DeviceId, str]:
        """Who left, and why."""
        return dict(self._declined)

    @property
    def progress(self) -> tuple[int, int]:
        """(answers, awaited) of the current phase, for people."""
        return len(self._answered_names()), len(self._awaited_names())

    # -- messages ---------------------------------------------------------------------------------

    def _check_in(self, signed: Signed[CheckIn], sender: DeviceId, now_unix: int) -> list[Action]:
        check_in = signed.message
        call = self.spec.call
        self._refuse_other_sender(check_in.device, sender)
        if (check_in.run, check_in.round) != (call.run, call.round):
            raise RefusedError(f"{sender} checks in to another round")
        before = self._check_ins.get(sender)
        if before is not None and before.envelope == signed.envelope:
            return []
        _, identity = rules.verified_check_in(signed.envelope, self._trust, now_unix)
        if (reason := self._admit(sender, identity)) is not None:
            raise RefusedError(f"{sender} may not take part: {reason}", sender=sender)
        if before is not None:
            return self._fault(sender, "two different check-ins for one round: equivocation")
        if self.phase is not Phase.GATHER:
            self._left_out(sender, None)
        else:
            # One copied key would make every device refuse the manifest. Whoever comes second is
            # kept out; which of the two copied is not known.
            values = rules.keys_of(check_in, identity)
            if len(set(values)) < len(values) or self._key_owners.keys() & set(values):
                raise RefusedError(f"{sender} checks in with a key that appears twice")
            self._key_owners.update(dict.fromkeys(values, sender))
            self._declined.pop(sender, None)
            self._check_ins[sender] = signed
            self._present.add(sender)
            self._record(signed)
        return []

    def _decline(self, signed: Signed[Decline], sender: DeviceId) -> list[Action]:
        decline = signed.message
        call = self.spec.call
        self._refuse_other_sender(decline.device, sender)
        if (decline.run, decline.round) != (call.run, call.round):
            raise RefusedError(f"{sender} declines another round")
        known = self._check_ins.get(sender)
        if known is not None:
            _, identity = rules.verified_check_in(known.envelope, self._trust, 0)
            signed.check(identity, signer=sender)
            if self.phase is Phase.GATHER:
                del self._check_ins[sender]
                self._key_owners = {k: d for k, d in self._key_owners.items() if d != sender}
        # Before its check-in nothing vouches for a decline; all it can do is save us waiting.
        if self._declined.get(sender) != (reason := for_display(decline.reason)):
            self._record(signed)
        self._declined[sender] = reason
        return []

    def _in_cohort(self, signed: Signed[Message], sender: DeviceId) -> list[Action]:
        cohort, message = self.cohort, signed.message
        if cohort is None or getattr(message, "h", None) != cohort.h:
            raise RefusedError(f"a {message.LABEL} of another round or manifest", sender=None)
        index = cohort.index_of(sender)
        self._refuse_other_sender(
            getattr(message, "device", None) or getattr(message, "member", None), sender
        )
        store, phase = self._store_of(message)
        late = _ORDER.index(self.phase) > _ORDER.index(phase)
        if late and (self.over or not isinstance(message, RosterVote)):
            return []  # late, because a quorum was enough without it: harmless
        if self.phase is not phase and not late:
            raise RefusedError(f"a {message.LABEL} while the round is in phase {self.phase.value}")
        before = store.get(index)
        if before is not None and before.envelope == signed.envelope:
            return []
        signed.check(cohort.peers[index].identity, signer=sender)
        if before is not None:
            return self._fault(
                sender, f"two different messages ({message.LABEL}) in one round: equivocation"
            )
        actions = self._verified(cohort, index, signed)
        store[index] = signed
        self._record(signed)
        return actions

    def _store_of(self, message: Message) -> tuple[dict[int, Signed[Message]], Phase]:
        """Where messages of this kind are kept, and the phase that wants them."""
        stores: dict[type[Message], tuple[object, Phase]] = {
            Shares: (self._shares, Phase.SHARE),
            RosterVote: (self._roster_votes, Phase.ROSTER),
            MaskedUpdate: (self._updates, Phase.COLLECT),
            ViewVote: (self._view_votes, Phase.VIEW),
            Reveal: (self._reveals, Phase.UNMASK),
        }
        store, phase = stores[type(message)]
        return cast(dict[int, Signed[Message]], store), phase

    def _verified(self, cohort: Cohort, index: int, signed: Signed[Message]) -> list[Action]:
        """What is particular to each kind, after sender, round and signature are right."""
        match signed.message:
            case Shares() as shares:
                rules.check_shares(cohort, shares)
            case RosterVote() as vote:
                rules.verified_roster_vote(cohort, Signed(vote, signed.envelope))
                if vote.u2 != cohort.bitmap(self.roster):
                    raise RefusedError(
                        f"{vote.member} votes for another roster", sender=vote.member
                    )
            case MaskedUpdate() as update:
                rules.check_masked_update(cohort, self.roster, update)
                return [Expect(update.device, cohort.h, update.payload, update.payload_bytes)]
            case ViewVote() as vote:
                rules.verified_view_vote(cohort, Signed(vote, signed.envelope))
                if vote.u3 != cohort.bitmap(self.view) or vote.u2 != cohort.bitmap(self.roster):
                    raise RefusedError(f"{vote.member} votes for another view", sender=vote.member)
            case Reveal() as reveal:
                if self._aggregator is None:
                    raise LocalProtocolError("a reveal before there is a sum")
                self._aggregator.add_reveal(
                    Signed(reveal, signed.envelope), cohort.bitmap(self.view)
                )
        return []

    def _fault(self, device: DeviceId, reason: str) -> list[Action]:
        fault = Fault(device, reason)
        self._record(fault)
        return [fault]

    @staticmethod
    def _refuse_other_sender(named: object, sender: DeviceId) -> None:
        if named != sender:
            raise RefusedError(f"a message that names {named} came from {sender}'s topic")

    # -- phases -----------------------------------------------------------------------------------

    def _advance(self, now: float, now_unix: int) -> list[Action]:
        """Leave phases as long as they are complete."""
        actions: list[Action] = []
        while not self.over:
            step = {
                Phase.GATHER: self._end_gather,
                Phase.SHARE: self._end_share,
                Phase.ROSTER: self._end_roster,
                Phase.COLLECT: self._end_collect,
                Phase.VIEW: self._end_view,
                Phase.UNMASK: self._end_unmask,
            }[self.phase]
            phase, news = self.phase, step(now, now_unix)
            actions += news
            if self.phase is phase:
                break
        return actions

    def _enter(self, phase_event: Event, now: float, detail: str, *out: Publish) -> list[Action]:
        self._leave_phase()
        self.phase = TRANSITIONS[self.phase][phase_event]
        self._entered = self._last_sent = now
        self._standing = list(out)
        self._record(Entered(self.phase))
        return [Moved(self.phase, detail), *out]

    def _abandon(self, reason: str, blamed: tuple[DeviceId, ...] = ()) -> list[Action]:
        after_uploads = self.phase in (Phase.COLLECT, Phase.VIEW, Phase.UNMASK)
        self._leave_phase()
        self.phase = TRANSITIONS[self.phase][Event.TOO_FEW]
        self._standing = []
        said = Publish(self._said(abandonment(self.spec.call, reason)))
        self._record(Entered(Phase.ABANDONED))
        return [
            Moved(Phase.ABANDONED, reason),
            said,
            Abandoned(reason, after_uploads, blamed),
        ]

    def _leave_phase(self) -> None:
        if self.phase is Phase.GATHER and self.spec.call.chance >= 1.0:
            self._called = frozenset(self._present)
        self._last = self.phase

    def course(
        self, ended: Completed | Abandoned, left_out: Mapping[DeviceId, str | None]
    ) -> Course:
        """What is known of the devices of a round that is over. left_out: what was told of some."""
        given_up = ended if isinstance(ended, Abandoned) else None
        left_out = {device: left_out[device] for device in left_out.keys() - self._check_ins.keys()}
        cohort, aggregator = self.cohort, self._aggregator
        answered: dict[Phase, Collection[int]] = {
            Phase.SHARE: self.roster or self._shares.keys(),
            Phase.ROSTER: self._roster_votes.keys(),
            Phase.COLLECT: self.view or (aggregator.added if aggregator else ()),
            Phase.VIEW: self._view_votes.keys(),
            Phase.UNMASK: self._reveals.keys(),
        }

        def named(indices: Collection[int]) -> frozenset[DeviceId]:
            return frozenset(cohort.names(set(indices))) if cohort is not None else frozenset()

        return Course(
            last=self._last,
            completed=given_up is None,
            present=frozenset(self._present),
            called=self._called,
            checked_in=frozenset(self._check_ins),
            late=frozenset(device for device, why in left_out.items() if why is None),
            declined=self.declined,
            refused={device: why for device, why in left_out.items() if why is not None},
            cohort=tuple(peer.device for peer in cohort.peers) if cohort is not None else (),
            answered={phase: named(indices) for phase, indices in answered.items()},
            begun=named(self._updates.keys()),
            blamed=frozenset(given_up.blamed) if given_up is not None else frozenset(),
            outside=self._outside,
            spared=self.spec.over_selection > 0 and len(self.view) >= self.spec.goal,
            reason=given_up.reason if given_up is not None else "",
        )

    def _awaited_names(self) -> set[DeviceId]:
        """Whom the current phase would like to hear from."""
        if self.phase is Phase.GATHER or self.cohort is None:
            return set(self._present)
        if self.phase is Phase.COLLECT:
            return set(self.cohort.names(self.roster)) - set(self._declined)
        if self.phase is Phase.SHARE:
            return {peer.device for peer in self.cohort.peers} - set(self._declined)
        return {peer.device for peer in self.cohort.peers}

    def _answered_names(self) -> set[DeviceId]:
        """Who has done what the current phase waits for."""
        if self.phase is Phase.GATHER or self.cohort is None:
            return set(self._check_ins) | set(self._declined)
        done: frozenset[int] | set[int] = set()
        match self.phase:
            case Phase.SHARE:
                done = set(self._shares)
            case Phase.ROSTER:
                done = set(self._roster_votes)
            case Phase.COLLECT:
                done = self._aggregator.added if self._aggregator else set()
            case Phase.VIEW:
                done = set(self._view_votes)
            case Phase.UNMASK:
                done = set(self._reveals)
        return set(self.cohort.names(done))

    def _waited(self, now: float, limit_s: float) -> bool:
        """Whether the phase has waited for everyone it makes sense to wait for."""
        missing = self._awaited_names() - self._answered_names()
        if not missing or now - self._entered >= limit_s:
            return True
        # Who went in the middle of its upload may be back in a moment, and go on with it.
        since = max(self._entered, *(self._gone_at.get(device, 0.0) for device in missing))
        return not missing & self._present and now - since >= self.spec.absent_grace_s

    def _end_gather(self, now: float, now_unix: int) -> list[Action]:
        spec, count = self.spec, len(self._check_ins)
        limit = spec.cohort_limit
        out_of_time = now - self._entered >= spec.call.gather_s
        # Everyone present has answered, and there are enough of them; or twice as many as are
        # wanted, so that the choice below is still one of chance and not of who is fastest.
        if not (self._settled(now) or count >= 2 * limit or out_of_time):
            return []
        if count < spec.call.n_min:
            left = "".join(f"; {d}: {r}" for d, r in sorted(self._declined.items())[:3])
            return self._abandon(
                f"{count} devices checked in within {spec.call.gather_s:g} s; "
                f"at least {spec.call.n_min} are needed{left}"
            )
        chosen = sorted(self._choose(sorted(self._check_ins), limit))
        envelopes = tuple(self._check_ins[device].envelope for device in chosen)
        head = head_of(spec, envelopes, self._reveal_key.public, now_unix)
        manifest = wire.sign(Manifest(head, envelopes), self._key)
        try:
            return self._enter_share(manifest, now)
        except RemoteProtocolError as error:  # a certificate that ended while we gathered
            return self._abandon(f"the devices would refuse this manifest: {error}")

    def _settled(self, now: float) -> bool:
        """Whether waiting on would bring nobody who makes a difference, as far as can be told."""
        spec, count = self.spec, len(self._check_ins)
        enough = count >= min(spec.goal, spec.cohort_limit)
        quiet = now - max(self._entered, self._heard) >= spec.absent_grace_s
        if spec.call.chance < 1.0:
            # Nobody knows who drew not to come: those who come do so within the spread.
            return enough and quiet and now - self._entered >= spec.call.spread_s
        # The goal may be out of reach, when that many are not there or will not: it is not waited for.
        if not enough and not (quiet and count >= spec.call.n_min):
            return False
        return self._awaited_names() <= self._answered_names()

    def _enter_share(self, manifest: Signed[Manifest], now: float) -> list[Action]:
        """Raises RemoteProtocolError, with nothing changed, for a manifest that devices would refuse."""
        self.cohort = rules.verified_cohort(manifest, self._trust)
        if manifest.message.head.pk_reveal != self._reveal_key.public:
            raise JournalError("the manifest names another reveal key")
        self._record(manifest)
        return self._enter(Event.ENOUGH, now, f"cohort of {self.cohort.n}", Publish(manifest))

    def _choose(self, names: list[DeviceId], limit: int) -> list[DeviceId]:
        """A uniform sample, by sorting on random keys."""
        keyed = sorted((self._rng(16), name) for name in names)
        return [name for _, name in keyed[:limit]]

    def _end_share(self, now: float, now_unix: int) -> list[Action]:
        if not self._waited(now, self.spec.share_s):
            return []
        cohort, count = self._cohort(), len(self._shares)
        needed = max(cohort.threshold, cohort.head.n_min)
        if count < needed:
            return self._abandon(self._too_few(cohort, count, "sent their shares", needed))
        return self._enter_roster(now)

    def _enter_roster(self, now: float) -> list[Action]:
        cohort = self._cohort()
        self.roster = u2 = frozenset(self._shares)
        boxes = {index: signed.message.boxes for index, signed in self._shares.items()}
        self._deliveries = [
            Publish(wire.sign(delivery, self._key), to=delivery.member)
            for delivery in deliveries(cohort, boxes)
        ]
        return self._enter(Event.ENOUGH, now, f"{len(u2)} of {cohort.n} shared", *self._deliveries)

    def _end_roster(self, now: float, now_unix: int) -> list[Action]:
        cohort, t = self._cohort(), self._cohort().threshold
        votes = [vote.message for vote in self._roster_votes.values()]
        readable = [cohort.subset(vote.readable) for vote in votes]
        unread = [i for i in self.roster if sum(i in r for r in readable) < t]
        if len(votes) < t or unread:
            if not self._waited(now, self.spec.share_s):
                return []
            if len(votes) < t:
                return self._abandon(self._too_few(cohort, len(votes), "confirmed the roster"))
            # Up to n - t members may lie; that more of them deny a box, only its sender can cause.
            denied = {i for i in unread if sum(i not in r for r in readable) > cohort.n - t}
            return self._abandon(
                f"fewer than {t} members can open the shares of "
                f"{', '.join(cohort.names(set(unread)))}",
                tuple(cohort.names(denied)),
            )
        return self._enter_collect(now)

    def _enter_collect(self, now: float) -> list[Action]:
        cohort = self._cohort()
        self._aggregator = Aggregator(cohort, self.roster, self._reveal_key)
        self._shares.clear()
        roster = Roster(
            h=cohort.h, u2=cohort.bitmap(self.roster), votes=self._quorum(self._roster_votes)
        )
        return self._enter(
            Event.ENOUGH,
            now,
            f"roster of {len(self.roster)}",
            Publish(self._said(roster)),
        )

    def _end_collect(self, now: float, now_unix: int) -> list[Action]:
        cohort, u3 = self._cohort(), self._sum().added
        # With over-selection the goal is enough; without it, everyone on the roster is waited for.
        goal_met = self.spec.over_selection > 0 and len(u3) >= self.spec.goal
        if not goal_met and not self._waited(now, self.spec.collect_s):
            return []
        if len(u3) < cohort.head.n_min:
            return self._abandon(
                f"{len(u3)} updates arrived; at least {cohort.head.n_min} are needed"
            )
        return self._enter_view(now)

    def _enter_view(self, now: float) -> list[Action]:
        cohort = self._cohort()
        self.view = u3 = self._sum().added
        proposal = ViewProposal(
            h=cohort.h, u2=cohort.bitmap(self.roster), u3=cohort.bitmap(self.view)
        )
        # A device without the roster cannot vote for the view, so that stays among the repeats.
        roster = self._standing
        actions = self._enter(
            Event.ENOUGH,
            now,
            f"{len(u3)} of {len(self.roster)} updates",
            Publish(self._said(proposal)),
        )
        self._standing = [*roster, *self._standing]
        return actions

    def _end_view(self, now: float, now_unix: int) -> list[Action]:
        cohort = self._cohort()
        if len(self._view_votes) < cohort.threshold:
            if not self._waited(now, self.spec.unmask_s):
                return []
            return self._abandon(self._too_few(cohort, len(self._view_votes), "confirmed the view"))
        return self._enter_unmask(now)

    def _enter_unmask(self, now: float) -> list[Action]:
        cohort = self._cohort()
        view = View(h=cohort.h, u3=cohort.bitmap(self.view), votes=self._quorum(self._view_votes))
        # Only who voted may reveal: roster and proposal stay among the repeats.
        before = self._standing
        actions = self._enter(
            Event.ENOUGH, now, f"view of {len(self.view)}", Publish(self._said(view))
        )
        self._standing = [*before, *self._standing]
        return actions

    def _end_unmask(self, now: float, now_unix: int) -> list[Action]:
        cohort = self._cohort()
        waited = self._waited(now, self.spec.unmask_s)
        if len(self._reveals) < cohort.threshold:
            if not waited:
                return []
            return self._abandon(self._too_few(cohort, len(self._reveals), "revealed their shares"))
        if self._tried_to_unmask and not waited:
            return []
        try:
            return self._enter_done(now)
        except NotEnoughSharesError as error:
            # More reveals may mend it. Looking for the liar is slow, so that we look once now and
            # once more when everyone who is there has revealed.
            self._tried_to_unmask = True
            if not waited:
                return []
            blamed = tuple(d for d in error.blamed if d in cohort)
            return self._abandon(str(error), tuple(DeviceId(d) for d in blamed))

    def _enter_done(self, now: float) -> list[Action]:
        """Raises NotEnoughSharesError, with nothing changed, while a secret cannot be recovered."""
        cohort, aggregator = self._cohort(), self._sum()
        ring_sum = aggregator.finish()
        faults: list[Action] = [
            Fault(DeviceId(device), "revealed a share that fits no commitment, or was dealt one")
            for device in sorted(aggregator.liars)
        ]
        survivors = tuple(cohort.names(self.view))
        dropped = tuple(peer.device for peer in cohort.peers if peer.device not in survivors)
        done = Completed(ring_sum, cohort.encoding, survivors, dropped)
        return [*faults, *self._enter(Event.ENOUGH, now, f"sum of {len(survivors)}"), done]

    def _quorum(
        self, votes: dict[int, Signed[RosterVote]] | dict[int, Signed[ViewVote]]
    ) -> tuple[bytes, ...]:
        """Exactly t votes: a verifier checks each one, so no more are sent than it needs."""
        chosen = sorted(votes)[: self._cohort().threshold]
        return tuple(votes[i].envelope for i in chosen)

    def _too_few(self, cohort: Cohort, count: int, did: str, needed: int = 0) -> str:
        return (
            f"{count} of the committee's {cohort.n} members {did}; "
            f"{needed or cohort.threshold} are needed"
        )

    def _sum(self) -> Aggregator:
        if self._aggregator is None:
            raise LocalProtocolError("there is no sum yet")
        return self._aggregator

    def _cohort(self) -> Cohort:
        if self.cohort is None:
            raise LocalProtocolError("there is no cohort yet")
        return self.cohort


def new_run_id(rng: Rng) -> bytes:
    """16 random bytes that name a run."""
    return rng(keys.SEED_BYTES)
