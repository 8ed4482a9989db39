"""What a transcript proves: every check a third party can make of a round, with no secret. Without I/O.

The rules are those that devices and the coordinator go by (`secagg.rules`, `secagg.aggregator`), so
that a transcript is judged by the code that ran the round. A check passes, fails, or is not made, and
then says why; a check that rests on one that did not pass is not made.

Memory is O(d), whatever the file claims: a payload is read to its end, and found to be the one that
its device signed, before anything of the vector's size is made.
"""

import dataclasses
import enum
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import msgspec

from covey_shared import wire
from covey_shared.errors import CoveyError, MalformedError, RefusedError
from covey_shared.fixedpoint import DecodedSum, pack
from covey_shared.keys import AgreementKey, PublicKey
from covey_shared.layout import Flat
from covey_shared.messages import (
    CheckIn,
    Decline,
    Manifest,
    MaskedUpdate,
    Message,
    Result,
    Reveal,
    Roster,
    RosterVote,
    RoundAbandoned,
    RoundCall,
    Shares,
    View,
    ViewProposal,
    ViewVote,
    for_display,
)
from covey_shared.secagg import rules
from covey_shared.secagg.aggregator import Aggregator
from covey_shared.secagg.cohort import Cohort, Trust
from covey_shared.transcript import (
    About,
    Ending,
    Kind,
    Note,
    Payload,
    Read,
    Reader,
    Record,
    check_seal,
    parsed,
)
from covey_shared.wire import Signed

MAX_MESSAGES = 8192
MAX_MESSAGES_BYTES = 16 * 2**20
"""All messages of a round of 128 devices take less than 3 MB."""

# Where in a round each message belongs. A vote for the roster may come later than all others, and a
# device may decline at any moment.
_ORDER: tuple[type[Message], ...] = (
    RoundCall,
    CheckIn,
    Manifest,
    Shares,
    Roster,
    MaskedUpdate,
    ViewProposal,
    ViewVote,
    View,
    Reveal,
    Result,
    RoundAbandoned,
)
_ANY_TIME: tuple[type[Message], ...] = (RosterVote, Decline)
_SEVERAL: tuple[type[Message], ...] = (CheckIn, Decline)
"""A device that declined may check in anew."""

M = TypeVar("M", bound=Message)


class Verdict(enum.Enum):
    """What came of a check."""

    PASS = "PASS"  # noqa: S105
    FAIL = "FAIL"
    NOT_CHECKED = "NOT CHECKED"


@dataclass(frozen=True, slots=True)
class Check:
    """One check. what: the sentence that it is about. detail: how, or why not."""

    name: str
    what: str
    verdict: Verdict
    detail: str


@dataclass(frozen=True, slots=True)
class Report:
    """What a transcript proves. about, ending: None if it could not even be read so far.

    devices, summed: sizes of cohort and sum, 0 if unknown. model, next_model: the hashes that call and
    result name, empty if there is none.
    """

    about: About | None
    ending: Ending | None
    checks: tuple[Check, ...]
    devices: int
    summed: int
    minimum: int
    model: bytes
    next_model: bytes

    @property
    def failed(self) -> bool:
        """Something in it is wrong."""
        return any(check.verdict is Verdict.FAIL for check in self.checks)

    @property
    def complete(self) -> bool:
        """Nothing is wrong, and nothing was left unchecked."""
        return all(check.verdict is Verdict.PASS for check in self.checks)

    def verdict(self, name: str) -> Verdict:
        """Of one check by its name."""
        return next(check.verdict for check in self.checks if check.name == name)


class _NotCheckedError(Exception):
    """There is nothing to make a check of; says why."""


FindModel = Callable[[bytes, int], Flat | None]
"""(SHA-256, size in bytes) -> the model, if it is at hand."""

Average = Callable[[About, Flat, DecodedSum], Flat | None]
"""The next model from the last one, by the rule that the transcript names; None for an unknown rule."""


@dataclass
class _Verification:
    fleet_ca: bytes | None
    coordinator: bytes | None
    find_model: FindModel
    average: Average

    about: About | None = None
    ending: Ending | None = None
    key: bytes | None = None
    messages: dict[type[Message], list[Signed[Any]]] = field(default_factory=dict)
    checks: dict[str, Check] = field(default_factory=dict)
    cohort: Cohort | None = None
    roster: frozenset[int] = frozenset()
    view: frozenset[int] = frozenset()
    aggregator: Aggregator | None = None
    _twice: list[str] = field(default_factory=list)
    _said: set[tuple[type[Message], str]] = field(default_factory=set)
    _count: int = 0
    _bytes: int = 0
    _rank: int = 0
    _prepared: bool = False
    _here: set[int] = field(default_factory=set)
    _gone: dict[int, bytes] = field(default_factory=dict)
    _payload_problem: str = ""

    # -- reading ----------------------------------------------------------------------------------

    def read(self, read: Read) -> None:
        """The whole file. What is wrong with it ends up in the checks."""

        def whole() -> str:
            reader = Reader(read)
            for record in reader:
                self._take(record)
            if self.about is None or self.ending is None:
                raise MalformedError("the transcript has no ending: it was cut off")
            check_seal(reader, self.about.coordinator)
            return f"{self._count} messages, {reader.offset:,} bytes"

        self._check("whole", "The file is whole, and sealed with the coordinator's key", whole)

    def _take(self, record: Record | Payload) -> None:
        if isinstance(record, Record) and record.kind is Kind.ABOUT:
            if self.about is not None:
                raise MalformedError("a second record ABOUT")
            self.about = parsed(About, record.body)
            return
        if self.about is None:
            raise MalformedError("the transcript does not say whose it is")
        if self.ending is not None and not (
            isinstance(record, Record) and record.kind is Kind.SEAL
        ):
            raise MalformedError("something follows the transcript's ending")
        if isinstance(record, Payload):
            self._payload(record)
            return
        match record.kind:
            case Kind.MESSAGE:
                self._message(record.body)
            case Kind.NOTE:
                parsed(Note, record.body)
                self._counted(len(record.body))
            case Kind.KEY:
                if self.key is not None or len(record.body) != 32:
                    raise MalformedError("a second record KEY, or one that is no key")
                self.key = record.body
            case Kind.THINNED:
                self._once(record.body[0])
                self._gone[record.body[0]] = record.body[1:]
            case Kind.ENDING:
                self.ending = parsed(Ending, record.body)
            case _:
                pass

    def _counted(self, size: int) -> None:
        self._count += 1
        self._bytes += size
        if self._count > MAX_MESSAGES or self._bytes > MAX_MESSAGES_BYTES:
            raise MalformedError("the transcript has more messages than a round can have")

    def _message(self, envelope: bytes) -> None:
        self._counted(len(envelope))
        signed = wire.decode(envelope)
        message = signed.message
        kind = type(message)
        if self.key is not None or self._here or self._gone:
            raise MalformedError(f"a {kind.LABEL} after the round's end")
        if kind in _ORDER:
            rank = _ORDER.index(kind)
            if rank < self._rank:
                raise MalformedError(f"a {kind.LABEL} is out of order")
            self._rank = rank
        elif kind not in _ANY_TIME:
            raise MalformedError(f"a {kind.LABEL} does not belong into a transcript")
        sender = getattr(message, "device", None) or getattr(message, "member", None) or ""
        if kind not in _SEVERAL:
            if (kind, sender) in self._said:
                self._twice.append(f"{sender or 'the coordinator'} ({kind.LABEL})")
            self._said.add((kind, sender))
        self.messages.setdefault(kind, []).append(signed)

    def _once(self, index: int) -> None:
        if index in self._here or index in self._gone:
            raise MalformedError(f"two payloads of device number {index}")

    def _payload(self, record: Payload) -> None:
        """Add it to the sum, if it is the one that its device signed."""
        self._once(record.index)
        self._here.add(record.index)
        self.prepare()
        if self._payload_problem or not self._passed("updates", "secrets", "one view"):
            return
        cohort = self._cohort()
        updates = {u.message.device: u.message for u in self._all(MaskedUpdate)}
        if record.index not in self.view:
            self._payload_problem = "it holds a masked update of a device that is not in the sum"
            return
        device = cohort.peers[record.index].device
        update = updates[device]
        if record.size != update.payload_bytes:
            self._payload_problem = f"the masked update of {device} has {record.size} bytes"
            return
        data = bytearray()
        for chunk in record.chunks:
            data += chunk
        if hashlib.sha256(data).digest() != update.payload:
            self._payload_problem = f"the masked update of {device} is not the one it signed"
            return
        if self.aggregator is None:
            self.aggregator = self._new_aggregator(cohort)
        try:
            self.aggregator.add(record.index, memoryview(data))
        except CoveyError as error:
            self._payload_problem = f"the masked update of {device}: {error}"

    # -- the checks -------------------------------------------------------------------------------

    def _check(self, name: str, what: str, make: Callable[[], str]) -> None:
        try:
            verdict, detail = Verdict.PASS, make()
        except _NotCheckedError as reason:
            verdict, detail = Verdict.NOT_CHECKED, str(reason)
        except CoveyError as error:
            verdict, detail = Verdict.FAIL, str(error)
        self.checks[name] = Check(name, what, verdict, for_display(detail))

    def _passed(self, *names: str) -> bool:
        return all(
            name in self.checks and self.checks[name].verdict is Verdict.PASS for name in names
        )

    def _needs(self, *names: str) -> None:
        for name in names:
            if not self._passed(name):
                what = self.checks[name].what if name in self.checks else name
                raise _NotCheckedError(f"it rests on a check that did not pass: {what}")

    def _about(self) -> About:
        if self.about is None:
            raise _NotCheckedError("the file does not say whose transcript it is")
        return self.about

    def _cohort(self) -> Cohort:
        if self.cohort is None:
            raise _NotCheckedError("there is no sound manifest")
        return self.cohort

    @property
    def _claims_a_result(self) -> bool:
        if self.ending is None:
            return Result in self.messages
        return self.ending.outcome == "completed"

    def _all(self, kind: type[M]) -> list[Signed[M]]:
        return self.messages.get(kind, [])

    def _one(self, kind: type[M]) -> Signed[M]:
        found = self._all(kind)
        if not found:
            if self._claims_a_result:
                raise RefusedError(f"there is no {kind.LABEL} in it")
            raise _NotCheckedError("the round ended before it came so far")
        if len(found) > 1:
            raise RefusedError(f"the coordinator signed more than one {kind.LABEL}")
        return found[0]

    def _signed_by_coordinator(self, kind: type[M]) -> Signed[M]:
        signed = self._one(kind)
        signed.check(self._about().coordinator, signer="the coordinator")
        return signed

    def prepare(self) -> None:
        """All checks that are of messages alone."""
        if self._prepared:
            return
        self._prepared = True
        self._check("ca", "The fleet CA's key is the one that you named", self._ca)
        self._check("coordinator", "The coordinator's key is the one that you named", self._named)
        self._check("call", "The coordinator called this round", self._call)
        self._check(
            "cohort",
            "Every device is certified by the fleet CA, and checked in itself, once",
            self._manifest,
        )
        self._check(
            "manifest", "The manifest is of the round that was called", self._manifest_of_call
        )
        self._check("shares", "Who is on the roster sent its shares", self._shares)
        self._check("roster", "A quorum of the committee signed the roster", self._roster)
        self._check("updates", "Who is in the sum signed its masked update", self._updates)
        self._check("view", "A quorum of the committee signed who is in the sum", self._view)
        self._check(
            "one view",
            "No other view was proposed or signed: of no device both kinds of share were asked",
            self._one_view,
        )
        self._check("reveals", "Members gave shares for this view alone", self._reveals)
        self._check(
            "secrets",
            "Of each device exactly one secret came out, of the kind that the view allows",
            self._secrets,
        )

    def _ca(self) -> str:
        return self._pinned(self.fleet_ca, self._about().fleet_ca, "--fleet-ca")

    def _named(self) -> str:
        return self._pinned(self.coordinator, self._about().coordinator, "--coordinator")

    @staticmethod
    def _pinned(named: bytes | None, found: bytes, option: str) -> str:
        if named is None:
            raise _NotCheckedError(
                f"the file's own word is taken for {found.hex()}; name the right one with {option}"
            )
        if named != found:
            raise RefusedError(f"the file names {found.hex()}, you named {named.hex()}")
        return found.hex()

    def _call(self) -> str:
        about, call = self._about(), self._signed_by_coordinator(RoundCall).message
        if (call.fleet, call.run, call.round) != (about.fleet, about.run, about.round):
            raise RefusedError("the call is of another round than the file says it is of")
        return f"round {call.round} of fleet {call.fleet}, revision {call.revision}"

    def _manifest(self) -> str:
        about, manifest = self._about(), self._one(Manifest)
        trust = Trust(about.fleet, PublicKey(about.fleet_ca), PublicKey(about.coordinator))
        cohort = rules.verified_cohort(manifest, trust)
        came = {signed.envelope for signed in self._all(CheckIn)}
        if missing := [p.device for p in cohort.peers if cohort.envelopes[p.index] not in came]:
            raise RefusedError(f"there is no check-in of {', '.join(missing[:3])} in it")
        for envelope in came.difference(cohort.envelopes):  # more checked in than were chosen
            rules.verified_check_in(envelope, trust, 0)
        self.cohort = cohort
        return (
            f"{cohort.n} devices, of which at least {cohort.head.n_min} make a sum and "
            f"{cohort.threshold} a quorum"
        )

    def _manifest_of_call(self) -> str:
        self._needs("call", "cohort")
        cohort, call = self._cohort(), self._one(RoundCall).message
        head = cohort.head
        # What only a device knows is taken from the head itself; all else is what a device checks.
        expected = rules.Expectation(
            call=call,
            n_params=head.n_params,
            n_hyperparameters=len(head.work.hyper),
            n_metrics=len(head.metric_clips),
            min_cohort=0,
            max_weight=head.w_max,
        )
        rules.check_expectation(cohort, expected, cohort.envelopes[0], 0)
        if call.model_bytes != 4 * head.n_params:
            raise RefusedError(
                f"a model of {head.n_params} parameters has {4 * head.n_params} bytes"
            )
        return f"plan {head.plan.hex()[:16]}, model {head.model.hex()[:16]}"

    def _from_devices(self, kind: type[M]) -> Iterator[tuple[int, M]]:
        """(index, message) of each, its round and signature checked."""
        cohort = self._cohort()
        for signed in self._all(kind):
            message: Any = signed.message
            device = getattr(message, "device", None) or message.member
            if message.h != cohort.h:
                raise RefusedError(f"a {kind.LABEL} of {device} is of another round or manifest")
            index = cohort.index_of(device)
            signed.check(cohort.peers[index].identity, signer=device)
            yield index, signed.message

    def _shares(self) -> str:
        self._needs("cohort")
        cohort = self._cohort()
        shared = set()
        for index, shares in self._from_devices(Shares):
            rules.check_shares(cohort, shares)
            shared.add(index)
        roster = cohort.subset(self._one(Roster).message.u2)
        if missing := cohort.names(roster - shared):
            raise RefusedError(f"{', '.join(missing[:3])} is on the roster and sent no shares")
        return f"{len(shared)} of {cohort.n} devices"

    def _roster(self) -> str:
        self._needs("cohort")
        cohort, roster = self._cohort(), self._signed_by_coordinator(Roster).message
        if roster.h != cohort.h:
            raise RefusedError("the roster is of another round or manifest")
        u2 = rules.check_roster(cohort, roster.votes, roster.u2)
        votes = 0
        for _, vote in self._from_devices(RosterVote):
            votes += 1
            if vote.u2 != roster.u2:
                raise RefusedError(f"{vote.member} signed another roster")
        self.roster = u2
        return (
            f"{len(u2)} devices; {max(votes, len(roster.votes))} votes, {cohort.threshold} needed"
        )

    def _updates(self) -> str:
        self._needs("roster")
        cohort = self._cohort()
        announced = set()
        for index, update in self._from_devices(MaskedUpdate):
            rules.check_masked_update(cohort, self.roster, update)
            announced.add(index)
        view = cohort.subset(self._one(ViewProposal).message.u3)
        if missing := cohort.names(view - announced):
            raise RefusedError(f"{', '.join(missing[:3])} is in the sum and signed no update")
        late = len(announced - view)
        return f"{len(view)} updates" + (f"; {late} announced more came too late" if late else "")

    def _view(self) -> str:
        self._needs("roster")
        cohort, view = self._cohort(), self._signed_by_coordinator(View).message
        if view.h != cohort.h:
            raise RefusedError("the view is of another round or manifest")
        self.view = rules.check_view(cohort, self.roster, view.votes, view.u3)
        return (
            f"{len(self.view)} devices, at least {cohort.head.n_min} wanted; {len(view.votes)} "
            f"votes, {cohort.threshold} needed"
        )

    def _one_view(self) -> str:
        if self._twice:
            raise RefusedError(f"said two things in one round: {', '.join(self._twice[:3])}")
        self._needs("view")
        cohort, u3 = self._cohort(), self._one(View).message.u3
        proposal = self._signed_by_coordinator(ViewProposal).message
        u2 = cohort.bitmap(self.roster)
        if (proposal.h, proposal.u2, proposal.u3) != (cohort.h, u2, u3):
            raise RefusedError("the view that was proposed is not the one that stood")
        votes = 0
        for _, vote in self._from_devices(ViewVote):
            votes += 1
            if (vote.u2, vote.u3) != (u2, u3):
                raise RefusedError(f"{vote.member} signed another view")
        return f"all {votes} votes are for the same view"

    def _reveals(self) -> str:
        self._needs("view")
        u3 = self._one(View).message.u3
        if not self._all(Reveal):
            self._one(Reveal)
        revealed = set()
        for _, reveal in self._from_devices(Reveal):
            if reveal.u3 != u3:
                raise RefusedError(f"{reveal.member} gave shares for another view")
            revealed.add(reveal.member)
        return f"{len(revealed)} members"

    def _new_aggregator(self, cohort: Cohort) -> Aggregator:
        if self.key is None:
            raise _NotCheckedError("the round's reveal key is not in it")
        return Aggregator(cohort, self.roster, AgreementKey(self.key))

    def _opened(self, aggregator: Aggregator) -> None:
        for reveal in self._all(Reveal):
            aggregator.add_reveal(reveal, self._one(View).message.u3)

    def _secrets(self) -> str:
        self._needs("reveals", "one view")
        cohort = self._cohort()
        if self.key is None:
            if self._claims_a_result:
                raise RefusedError("the round's reveal key is not in it")
            raise _NotCheckedError("a round without a result keeps what was revealed to it")
        if AgreementKey(self.key).public != cohort.head.pk_reveal:
            raise RefusedError("the reveal key is not the one that the manifest names")
        # The aggregator itself, over vectors of one parameter: it accepts a secret only if that is
        # what its device committed to, b of who is in the sum and s of who is not.
        small = dataclasses.replace(cohort, head=msgspec.structs.replace(cohort.head, n_params=1))
        aggregator = self._new_aggregator(small)
        for index in self.view:
            aggregator.add(index, bytes(small.encoding.payload_bytes))
        self._opened(aggregator)
        aggregator.finish()
        said = f"{len(self.view)} self masks, {len(self.roster - self.view)} mask keys of the lost"
        if aggregator.liars:
            said += f"; shares that do not fit: {', '.join(sorted(aggregator.liars)[:3])}"
        return said

    def finish(self) -> None:
        """The checks that need all of the file."""
        self.prepare()
        self._check("payloads", "The masked updates are those that were signed", self._payloads)
        self._check("result", "The coordinator signed the result, for this view", self._result)
        total: list[DecodedSum] = []
        self._check(
            "sum",
            "Their sum without the masks is the one that the result names",
            lambda: self._sum(total),
        )
        self._check(
            "model",
            "The average, added to the model before, gives exactly the next model",
            lambda: self._model(total),
        )
        self._check("ending", "The round ended as the file says", self._ended)

    def _payloads(self) -> str:
        if self._payload_problem:
            raise RefusedError(self._payload_problem)
        if not self._claims_a_result:
            if self._here or self._gone:
                raise RefusedError("masked updates were kept of a round that has no sum")
            raise _NotCheckedError("the round has no sum, and no masked updates were kept")
        self._needs("updates", "view")
        cohort = self._cohort()
        updates = {u.message.device: u.message.payload for u in self._all(MaskedUpdate)}
        kept = self._here | self._gone.keys()
        if missing := cohort.names(self.view - kept):
            raise RefusedError(f"the masked update of {', '.join(missing[:3])} is not in it")
        if kept != self.view:
            raise RefusedError("it holds a masked update of a device that is not in the sum")
        for index, digest in self._gone.items():
            device = cohort.peers[index].device
            if updates[device] != digest:
                raise RefusedError(f"the hash kept for {device} is not what it signed")
        if self._gone:
            raise _NotCheckedError(
                f"{len(self._gone)} of {len(self.view)} were taken out; their signed hashes remain"
            )
        self._needs("secrets", "one view")
        return f"{len(self._here)} updates"

    def _result(self) -> str:
        if not self._claims_a_result:
            raise _NotCheckedError("the round has no result")
        self._needs("view", "one view")
        about, cohort = self._about(), self._cohort()
        result = self._signed_by_coordinator(Result).message
        named = (result.h, result.fleet, result.run, result.round)
        if named != (cohort.h, about.fleet, about.run, about.round):
            raise RefusedError("the result is of another round or manifest")
        if rules.check_view(cohort, self.roster, result.votes, result.u3) != self.view:
            raise RefusedError("the result is of another view")
        return f"next model {result.next_model.hex()}"

    def _sum(self, total: list[DecodedSum]) -> str:
        # All that says whose sum it is: a sum that is right in itself may be of somebody else.
        self._needs(
            "whole", "call", "manifest", "shares", "updates", "secrets", "payloads", "result"
        )
        if self.aggregator is None or self.aggregator.added != self.view:
            raise RefusedError("not all masked updates could be added")
        cohort, aggregator = self._cohort(), self.aggregator
        self._opened(aggregator)
        ring = aggregator.finish()
        digest = hashlib.sha256(pack(ring, cohort.head.bits)).digest()
        if digest != self._one(Result).message.ring_sum:
            raise RefusedError(f"the sum's hash is {digest.hex()}, the result names another")
        total.append(cohort.encoding.decode_sum(ring))
        return f"{len(self.view)} devices, {round(total[0].examples):,} examples"

    def _model(self, total: list[DecodedSum]) -> str:
        self._needs("sum")
        about, call = self._about(), self._one(RoundCall).message
        before = self.find_model(call.model, call.model_bytes)
        if before is None:
            raise _NotCheckedError(
                f"the model before is not at hand (SHA-256 {call.model.hex()}); give it with --model"
            )
        following = self.average(about, before, total[0])
        if following is None:
            raise _NotCheckedError(f"this covey does not know the averaging rule {about.rule!r}")
        digest = hashlib.sha256(following.astype("<f4").tobytes()).digest()
        if digest != self._one(Result).message.next_model:
            raise RefusedError(
                f"it gives a model with SHA-256 {digest.hex()}, the result names another"
            )
        return f"rule {about.rule}, server_lr {about.server_lr:g}"

    def _ended(self) -> str:
        ending = self.ending
        if ending is None:
            raise _NotCheckedError("the file does not say how")
        notices = self._all(RoundAbandoned)
        if ending.outcome == "completed":
            self._one(Result)
            if notices:
                raise RefusedError("the coordinator also said that the round was abandoned")
            return "completed"
        if self.key is not None or (ending.outcome == "abandoned" and self._all(Result)):
            raise RefusedError(f"it says {ending.outcome}, and holds the end of a completed round")
        about = self._about()
        for notice in notices:
            notice.check(about.coordinator, signer="the coordinator")
            said = notice.message
            if (said.fleet, said.run, said.round) != (about.fleet, about.run, about.round):
                raise RefusedError("the notice that it was abandoned is of another round")
        return ending.outcome + (f": {ending.reason}" if ending.reason else "")


def verify(
    read: Read,
    *,
    fleet_ca: bytes | None = None,
    coordinator: bytes | None = None,
    find_model: FindModel = lambda digest, size: None,
    average: Average = lambda about, model, total: None,
) -> Report:
    """Make every check of a transcript. fleet_ca, coordinator: public keys known from elsewhere.

    Whatever the bytes, what is wrong with them is in the report.
    """
    work = _Verification(fleet_ca, coordinator, find_model, average)
    work.read(read)
    work.finish()
    call, result = work.messages.get(RoundCall), work.messages.get(Result)
    cohort = work.cohort
    return Report(
        about=work.about,
        ending=work.ending,
        checks=tuple(sorted(work.checks.values(), key=lambda check: check.name != "whole")),
        devices=cohort.n if cohort else 0,
        summed=len(work.view),
        minimum=cohort.head.n_min if cohort else 0,
        model=call[0].message.model if call else b"",
        next_model=result[0].message.next_model if result else b"",
    )
