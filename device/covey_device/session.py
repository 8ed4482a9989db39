"""One device's rounds as a phase table, without I/O.

Bytes, the clock's ticks and the outcome of training come in, actions come out; the service carries
them out in order. The table in `phases` is all there is to the order of things:

* what the coordinator signed and this device refuses ends the round here, with a `Decline`;
* what is of another round, comes out of order, or is not signed by the coordinator at all, is
  dropped and changes nothing: a hostile or lossy network can do all of that;
* the very same bytes again get the very same answer again; other bytes in their place are
  equivocation.

After an upload the device may vanish for good. If it stays, it serves on the committee. If it comes back
in a new process, without the round's keys, it sends that upload again to whoever is entitled to it, and has
no other part in the round.
"""

import hashlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from covey_device.actions import (
    Action,
    Ended,
    Fetch,
    Forget,
    Hurry,
    Keep,
    Pace,
    Prepared,
    Publish,
    Renew,
    Save,
    StopTraining,
    Train,
    Upload,
)
from covey_device.memory import MAX_VOTES, Memory, Vote
from covey_device.phases import TRANSITIONS, Event, Phase
from covey_device.policy import Policy
from covey_device.unfinished import Unfinished
from covey_shared import wire
from covey_shared.enrolment import RenewalWanted
from covey_shared.errors import LocalProtocolError, RefusedError, RemoteProtocolError
from covey_shared.keys import Rng, SigningKey, uniform
from covey_shared.layout import Flat
from covey_shared.masking import Ring
from covey_shared.messages import (
    MAX_REASON_CHARS,
    Certificate,
    CheckIn,
    Decline,
    Delivery,
    DeviceId,
    Manifest,
    Message,
    Result,
    Roster,
    RosterVote,
    RoundAbandoned,
    RoundCall,
    View,
    ViewProposal,
    ViewVote,
    WantUpload,
    for_display,
)
from covey_shared.secagg.cohort import Trust
from covey_shared.secagg.committee import CommitteeMember
from covey_shared.secagg.participant import Participant
from covey_shared.secagg.rules import Expectation
from covey_shared.wire import Signed

__all__ = [
    "MAX_VOTES", "TRANSITIONS", "Action", "Ended", "Event", "Fetch", "Forget", "Keep", "Memory",
    "OutOfOrderError", "Phase", "Policy", "Prepared", "Publish", "Renew", "Save", "Session", "StopTraining",
    "Train", "Unfinished", "Upload", "Vote",
]  # fmt: skip


class OutOfOrderError(RefusedError):
    """A message that this device cannot use now: lost, late or reordered ones make such."""


class _Round:
    """All that a device knows of the round it is in. Thrown away at its end."""

    def __init__(self, call: Signed[RoundCall], policy: Policy) -> None:
        self.call = call
        self.policy = policy
        self.participant: Participant | None = None
        self.member: CommitteeMember | None = None
        self.prepared: Prepared | None = None
        self.ring: Ring | None = None
        self.payload: bytes | None = None
        self.upload_digest = b""
        # Kind of message -> its bytes and what we answered, to answer the same again.
        self.answered: dict[type[Message], tuple[bytes, tuple[Action, ...]]] = {}


class Session:
    """The device's side of all rounds, one at a time.

    certificate: the envelope the fleet CA signed for `identity`; empty while it has yet to, which keeps
    this device out of rounds. It and policy may be replaced at any time; a round that was begun goes on
    with those it was begun with. memory: what the key store kept. unfinished: the upload it kept, if any.
    clock: seconds since 1970, for the bound on rounds a day alone. witness: told each encoded update
    before it is masked; for simulations, never set in the field.
    """

    def __init__(
        self,
        trust: Trust,
        identity: SigningKey,
        certificate: bytes,
        device: DeviceId,
        policy: Policy,
        memory: Memory,
        rng: Rng,
        witness: Callable[[int, Ring], None] | None = None,
        *,
        clock: Callable[[], float] = lambda: 0.0,
        unfinished: Unfinished | None = None,
    ) -> None:
        self._trust = trust
        self._identity = identity
        self.certificate = certificate
        self.device = device
        self.policy = policy
        self._memory = memory
        self._saved_day = memory.day
        self._rng = rng
        self._clock = clock
        self._witness = witness
        # An earlier process of this device may have died in that round, with its keys.
        self._cut_off = memory.last_round
        self._sat_out = 0  # the last round that our own draw kept us out of
        self._reconnect_s = 0.0
        self.phase = Phase.IDLE
        self._round: _Round | None = None
        self._kept = unfinished is not None  # an upload lies on the disk
        self.told: Callable[[Signed[Message]], None] = lambda signed: None
        """Told of every message that the coordinator signed, of whatever round, before anything comes of
        it here: in the thread that calls `receive`."""
        self.unfinished: Unfinished | None = None
        """The upload that an earlier process began, as long as its round lasts."""
        if unfinished is not None and unfinished.stands(memory):
            self.unfinished, self.phase = unfinished, self._next(Event.RESTART)

    @property
    def round_id(self) -> int | None:
        """The round this device is in, if any."""
        if self.unfinished is not None:
            return self.unfinished.call.message.round
        return self._round.call.message.round if self._round else None

    # -- what comes from the network --------------------------------------------------------------

    def receive(self, data: bytes) -> list[Action]:
        """One message from the broker.

        Raises RemoteProtocolError, with nothing changed, for bytes that the coordinator did not
        sign or that belong to another round.
        """
        signed = wire.decode(data)
        signed.check(self._trust.coordinator, signer="the coordinator")
        self.told(signed)
        message = signed.message
        if isinstance(message, RoundCall):
            return self._call(Signed(message, signed.envelope))
        if isinstance(message, RenewalWanted):
            return self._renewal_wanted(message)
        if self.unfinished is not None:
            return self._finish(self.unfinished, message)
        current = self._current(message)
        if isinstance(message, WantUpload):
            return self._want_upload(current, message)
        before = current.answered.get(type(message))
        if before is not None and before[0] == signed.envelope:
            return list(before[1])
        try:
            actions = self._handle(current, signed)
        except OutOfOrderError:
            raise
        except RemoteProtocolError as error:
            return self.leave(current.call.message.round, str(error))
        again = tuple(a for a in actions if isinstance(a, Publish))
        current.answered[type(message)] = (signed.envelope, again)
        return actions

    def _renewal_wanted(self, message: RenewalWanted) -> list[Action]:
        if (message.fleet, message.device) != (self._trust.fleet, self.device):
            raise RefusedError(f"a renewal for {message.device} of fleet {message.fleet}")
        return [Renew(message.issued_unix)]

    def _finish(self, unfinished: Unfinished, message: Message) -> list[Action]:
        """What an earlier process of this device had begun to send is sent again, byte for byte, when the
        coordinator asks for it; there is nothing else that this device could say in that round."""
        call, update = unfinished.call.message, unfinished.update.message
        match message:
            case Roster() if (message.h, message.u2) == (update.h, update.u2):
                return [Publish(unfinished.update)]
            case WantUpload() if (message.h, message.payload) == (update.h, update.payload):
                return [Upload(unfinished.payload, message.ranges)]
            case Result() if message.h == update.h:
                u3, at = message.u3, unfinished.index
                in_sum = len(u3) > at >> 3 and bool(u3[at >> 3] >> (at & 7) & 1)
                return self._end("completed", contributed=in_sum)
            case RoundAbandoned() if (message.run, message.round) == (call.run, call.round):
                return self._end(_abandoned(message), contributed=False)
        raise RefusedError(
            f"a {message.LABEL} of a round this device is not in: it only has an upload to finish"
        )

    def _current(self, message: Message) -> _Round:
        """The round that a message belongs to. Raises RefusedError if we are not in it."""
        current = self._round
        if current is not None:
            call, cohort = current.call.message, None
            if current.participant is not None:
                cohort = current.participant.cohort
            if isinstance(message, Manifest):
                same = (message.head.run, message.head.round) == (call.run, call.round)
            elif isinstance(message, Result | RoundAbandoned):
                same = (message.run, message.round) == (call.run, call.round)
            else:
                same = cohort is not None and getattr(message, "h", None) == cohort.h
            if same:
                return current
        raise RefusedError(f"a {message.LABEL} of a round this device is not in")

    def _handle(self, current: _Round, signed: Signed[Message]) -> list[Action]:
        message = signed.message
        match message:
            case Manifest():
                return self._manifest(current, Signed(message, signed.envelope))
            case Delivery():
                return self._delivery(current, message)
            case Roster():
                return self._roster(current, message)
            case ViewProposal():
                return self._proposal(current, message)
            case View():
                return self._view(current, message)
            case Result():
                return self._result(current, message)
            case RoundAbandoned():
                return self._end(_abandoned(message), contributed=False)
            case _:
                raise RefusedError(f"a {message.LABEL} is not for devices")

    def _call(self, signed: Signed[RoundCall]) -> list[Action]:
        call = signed.message
        if call.fleet != self._trust.fleet:
            raise RefusedError(f"a call for fleet {call.fleet!r}")
        if call.round == self.round_id:
            return self._check_in_again()
        if call.round <= max(self._memory.last_round, self.round_id or 0):
            # Over: the call is retained and comes with every connection. Or an old one played back
            # while a newer round is being prepared: following it would undo `last_round`.
            if call.round != self._cut_off or self._round is not None:
                return []
            # Told once, so that nobody waits for what cannot come.
            self._cut_off = 0
            return [self._decline(call, "this device restarted; its keys of the round are gone")]
        if call.round <= self._sat_out:
            return []  # one draw a round: whoever drew again at every repeat would come in the end
        actions: list[Action] = []
        if call.reconnect_s != self._reconnect_s:
            self._reconnect_s = call.reconnect_s
            actions.append(Pace(call.reconnect_s))
        if self._round is not None or self.unfinished is not None:
            actions += self._end("another round was called", contributed=False)
        elif self._kept:
            self._kept = False
            actions.append(Forget())
        if call.chance < 1.0 and uniform(self._rng) >= call.chance:
            self._sat_out = call.round
            return actions
        self.phase = self._next(Event.CALL)
        self._round = _Round(signed, self.policy)
        now, memory = self._clock(), self._memory
        reason = self.policy.objection(call, memory.contributed, memory.day, now)
        self._memory = replace(memory, day=memory.day.at(now))
        if not self.certificate:
            reason = "the fleet CA has yet to sign this device's identity"
        if reason is None:
            return [*actions, Fetch(call)]
        if self._memory.day.worth_saving(self._saved_day):
            actions.append(self._save())
        return [*actions, *self.leave(call.round, reason)]

    def _save(self, **changes: Any) -> Save:
        """Change the memory, and have it kept."""
        self._memory = replace(self._memory, **changes)
        self._saved_day = self._memory.day
        return Save(self._memory)

    def _pledge(self, vote: RosterVote | ViewVote) -> None:
        """Note a vote before it is signed. Raises RefusedError if another was signed in its place."""
        mine = Vote(vote.h, vote.LABEL, hashlib.sha256(wire.body_of(vote)).digest())
        for before in self._memory.votes:
            if (before.h, before.kind) == (mine.h, mine.kind) and before.body != mine.body:
                raise RefusedError(f"a second, different {vote.LABEL} for one manifest")
        if mine not in self._memory.votes:
            votes = (*self._memory.votes, mine)[-MAX_VOTES:]
            self._memory = replace(self._memory, votes=votes)

    def ready(self, round_id: int, prepared: Prepared) -> list[Action]:
        """Plan and model are here and checked: make this round's keys and check in."""
        if self.round_id != round_id or self.phase is not Phase.FETCHING:
            return []  # the round moved on while we fetched
        current = self._in_round()
        self.phase = self._next(Event.READY)
        call = current.call.message
        participant = Participant(
            self._trust, self._identity, self.certificate, self.device, call, self._rng
        )
        current.prepared, current.participant = prepared, participant
        save = self._save(last_round=call.round, day=self._memory.day.join(self._clock()))
        return [save, Publish(participant.check_in)]

    def _check_in_again(self) -> list[Action]:
        """The call came again: the coordinator may have missed our check-in."""
        if self.phase is Phase.CHECKED_IN:
            participant = self._in_round().participant
            if participant is not None:
                return [Publish(participant.check_in)]
        return [Hurry()] if self.phase is Phase.FETCHING else []

    def _manifest(self, current: _Round, signed: Signed[Manifest]) -> list[Action]:
        self._refuse_out_of_order(Event.MANIFEST, "manifest")
        participant, prepared = current.participant, current.prepared
        if participant is None or prepared is None:
            raise LocalProtocolError("a manifest was let through before the check-in")
        head = signed.message.head
        listed = {wire.decode_as(CheckIn, e).message.device for e in signed.message.check_ins}
        if self.device not in listed:
            return self._end(self._left_out(head.issued_unix), contributed=False)
        expected = Expectation(
            call=current.call.message,
            n_params=prepared.n_params,
            n_hyperparameters=prepared.n_hyperparameters,
            n_metrics=prepared.n_metrics,
            min_cohort=current.policy.min_cohort,
            max_weight=current.policy.max_weight,
        )
        shares = participant.share(signed, expected)
        if participant.cohort is None:
            raise LocalProtocolError("shares were made without a cohort")
        current.member = CommitteeMember(
            participant.cohort, self.device, self._identity, participant.seal_key, self._pledge
        )
        self.phase = self._next(Event.MANIFEST)
        # Kept with the next vote: it is of use to a later process only.
        signed_unix = max(self._memory.signed_unix, head.issued_unix)
        self._memory = replace(self._memory, signed_unix=signed_unix)
        return [Publish(shares), Train(head.round, head)]

    def _left_out(self, issued_unix: int) -> str:
        """Why this device checked in and is not in the manifest, as far as it can tell."""
        ends = wire.decode_as(Certificate, self.certificate).message.not_after_unix
        if ends >= issued_unix:
            return "not chosen for the cohort"
        return (
            f"not in the cohort: this device's identity certificate ended {(issued_unix - ends) // 86400} "
            "days ago; `covey-device renew` asks for another, or ask your operator"
        )

    def _delivery(self, current: _Round, message: Delivery) -> list[Action]:
        self._refuse_out_of_order(Event.DELIVERY, "delivery")
        participant, member = self._in_cohort(current)
        if message.member != self.device:
            raise OutOfOrderError(f"a delivery for {message.member}: the network misdirected it")
        if participant.roster is not None and participant.cohort is not None:
            standing = participant.cohort.bitmap(participant.roster)
            if message.u2 != standing:
                raise RefusedError("a delivery for another roster than the one that stands")
        vote = member.vote_roster(message)
        self.phase = self._next(Event.DELIVERY)
        return [self._save(), Publish(vote)]

    def _roster(self, current: _Round, message: Roster) -> list[Action]:
        self._refuse_out_of_order(Event.ROSTER, "roster")
        participant, _ = self._in_cohort(current)
        participant.accept_roster(message)
        if not participant.on_roster:
            # Our shares came too late for this round's sum; we still hold boxes of the others, who
            # may need every member there is.
            training = self.phase is Phase.TRAINING
            participant.forget()
            current.ring = None
            self.phase = self._next(Event.LEFT_OUT)
            return [StopTraining(current.call.message.round)] if training else []
        self.phase = self._next(Event.ROSTER)
        if self.phase is Phase.SERVING and current.ring is not None:
            return self._send_update(current)
        return []

    def _proposal(self, current: _Round, message: ViewProposal) -> list[Action]:
        self._refuse_out_of_order(Event.PROPOSAL, "view proposal")
        participant, member = self._in_cohort(current)
        if not member.has_voted_roster:
            raise OutOfOrderError("a view proposal before this device's boxes")
        vote = member.vote_view(message, participant.roster, uploaded=current.payload is not None)
        actions: list[Action] = [self._save(), Publish(vote)]
        if self.phase is Phase.ROSTERED:  # too slow: the view was fixed without us
            participant.forget()
            actions.append(StopTraining(current.call.message.round))
        self.phase = self._next(Event.PROPOSAL)
        return actions

    def _view(self, current: _Round, message: View) -> list[Action]:
        self._refuse_out_of_order(Event.VIEW, "view")
        participant, member = self._in_cohort(current)
        reveal = member.reveal(message, participant.roster or frozenset())
        self.phase = self._next(Event.VIEW)
        return [Publish(reveal)]

    def _result(self, current: _Round, message: Result) -> list[Action]:
        participant = current.participant
        contributed = False
        if participant is not None and participant.cohort is not None:
            if message.h != participant.cohort.h:
                raise RefusedError("a result of another manifest")
            contributed = participant.index in participant.cohort.subset(message.u3)
        return self._end("completed", contributed=contributed)

    def _want_upload(self, current: _Round, message: WantUpload) -> list[Action]:
        if current.payload is None or message.payload != current.upload_digest:
            raise RefusedError("chunks were asked for of an update this device did not send")
        return [Upload(current.payload, message.ranges)]

    # -- what comes from this device --------------------------------------------------------------

    def trained(
        self, round_id: int, delta: Flat, examples: int, metrics: tuple[float, ...]
    ) -> list[Action]:
        """Training gave an update. delta: float32[n_params], finite. examples: its weight."""
        if self.round_id != round_id or Event.UPDATE not in TRANSITIONS[self.phase]:
            return []  # the round went on without us
        current = self._in_round()
        participant, _ = self._in_cohort(current)
        if participant.cohort is None:
            raise LocalProtocolError("trained without a cohort")
        ring = participant.cohort.encoding.encode(delta, examples, metrics, self._rng)
        if self._witness is not None:
            self._witness(round_id, ring.copy())
        current.ring = ring
        self.phase = self._next(Event.UPDATE)
        return self._send_update(current) if self.phase is Phase.SERVING else []

    def training_failed(self, round_id: int, reason: str) -> list[Action]:
        """There is no update to give; the committee's duties remain."""
        if self.round_id != round_id or Event.NO_UPDATE not in TRANSITIONS[self.phase]:
            return []
        current = self._in_round()
        self.phase = self._next(Event.NO_UPDATE)
        if current.participant is not None:
            current.participant.forget()
        return [self._decline(current.call.message, reason)]

    def _send_update(self, current: _Round) -> list[Action]:
        participant, _ = self._in_cohort(current)
        ring, current.ring = current.ring, None
        if ring is None:
            raise LocalProtocolError("there is no update to send")
        signed, payload = participant.mask(ring)
        current.payload, current.upload_digest = payload, signed.message.payload
        call = current.call.message
        contributed = self._memory.with_contribution(call.model, call.revision)
        cohort = participant.cohort
        if cohort is None:
            raise LocalProtocolError("masked without a cohort")
        self._kept = True
        unfinished = Unfinished(
            current.call, signed, payload, participant.index, cohort.n, cohort.head.n_min
        )
        # In this order: what is kept counts only once the contribution is remembered.
        save = self._save(contributed=contributed)
        actions: list[Action] = [Keep(unfinished), save, Publish(signed), Upload(payload)]
        # The roster coming again means that the coordinator may have missed the digest.
        envelope, _ = current.answered.get(Roster, (b"", ()))
        if envelope:
            current.answered[Roster] = (envelope, (Publish(signed),))
        return actions

    def leave(self, round_id: int, reason: str) -> list[Action]:
        """Refuse to go on with this round, and say why."""
        if self.round_id != round_id or self._round is None:
            return []  # an upload that cannot go on now may yet be asked for again
        decline = self._decline(self._in_round().call.message, reason)
        return [decline, *self._end(f"declined: {reason}", contributed=False)]

    # -- the table --------------------------------------------------------------------------------

    def _next(self, event: Event) -> Phase:
        try:
            return TRANSITIONS[self.phase][event]
        except KeyError:
            raise LocalProtocolError(f"{event.value} while {self.phase.value}") from None

    def _refuse_out_of_order(self, event: Event, what: str) -> None:
        if event not in TRANSITIONS[self.phase]:
            raise OutOfOrderError(f"a {what} while this device is {self.phase.value}")

    def _decline(self, call: RoundCall, reason: str) -> Publish:
        # A reason may quote a file name that is not Unicode, which the wire could not carry.
        reason = reason.encode("utf-8", "replace").decode()[:MAX_REASON_CHARS]
        decline = Decline(
            fleet=call.fleet,
            run=call.run,
            round=call.round,
            device=self.device,
            reason=reason,
        )
        return Publish(wire.sign(decline, self._identity))

    def _end(self, outcome: str, *, contributed: bool) -> list[Action]:
        training = self.phase in (Phase.TRAINING, Phase.ROSTERED)
        if self.unfinished is not None:
            call = self.unfinished.call.message
            self._cut_off = 0  # nobody waits for this device any more
        else:
            current = self._in_round()
            call = current.call.message
            if current.participant is not None:
                current.participant.forget()
            if current.member is not None:
                current.member.forget()
        self.phase = self._next(Event.END)
        self._round = self.unfinished = None
        if call.round > self._memory.last_round:
            self._memory = replace(self._memory, last_round=call.round)
        actions: list[Action] = [StopTraining(call.round)] if training else []
        if self._kept:
            self._kept = False
            actions.append(Forget())
        return [*actions, Ended(call.round, outcome, contributed, call)]

    def _in_round(self) -> _Round:
        if self._round is None:
            raise LocalProtocolError("this device is in no round")
        return self._round

    def _in_cohort(self, current: _Round) -> tuple[Participant, CommitteeMember]:
        if current.participant is None or current.member is None:
            raise RefusedError("a message of a cohort before its manifest")
        return current.participant, current.member


def _abandoned(message: RoundAbandoned) -> str:
    return f"abandoned: {for_display(message.reason)}"
