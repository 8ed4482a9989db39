"""One round carried out: its machine's actions over a transport, its journal, its spool, its transcript.

What a step of the machine counts is journalled before anything of the step is sent, so that a process
that dies at any moment leaves a round that the next one can go on with. Cancelling `run` is such a death.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol, TypeVar

from covey_coordinator import journal
from covey_coordinator.blobs import UploadDesk, request_of
from covey_coordinator.inbox import Heard, Inbox, Presence, Uploaded
from covey_coordinator.journal import Added, Entered, Entry, JournalError
from covey_coordinator.phases import (
    Abandoned,
    Action,
    Completed,
    Expect,
    Fault,
    Moved,
    Phase,
    Publish,
    RoundSpec,
)
from covey_coordinator.registry import Registry
from covey_coordinator.round import Round
from covey_coordinator.run import RoundOutcome
from covey_coordinator.spool import FileSink
from covey_coordinator.statements import abandonment
from covey_coordinator.store import OpenRound, Progress, Store
from covey_coordinator.transcript import RoundScribe
from covey_coordinator.turnout import Fate, Turnout, counted, fates
from covey_shared import wire
from covey_shared.errors import (
    MalformedError,
    RemoteProtocolError,
    StorageError,
    TransportError,
)
from covey_shared.keys import Rng, SigningKey
from covey_shared.messages import (
    DeviceId,
    ManifestDigest,
    MaskedUpdate,
    WantBlob,
    WantUpload,
)
from covey_shared.secagg.cohort import Trust
from covey_shared.wire import Signed

log = logging.getLogger("covey.coordinator")

T = TypeVar("T")

TICK_S = 0.2

MAX_LEFT_OUT = 10_000
"""Devices whose check-in did not count, that are remembered to tell of: anybody may make up names."""


class Hands(Protocol):
    """What a round needs of the service around it."""

    trust: Trust
    key: SigningKey
    registry: Registry
    store: Store
    rng: Rng

    def clock(self) -> float:
        """Monotonic seconds."""

    def unix(self) -> float:
        """Seconds since 1970, for certificates."""

    def traffic(self) -> tuple[int, int]:
        """Bytes (received, sent) so far."""

    async def publish(self, action: Publish) -> None:
        """Send. Raises TransportError."""

    def want(self, blob: bytes, ranges: tuple[tuple[int, int], ...]) -> None:
        """Publish chunks of a blob."""

    def show(self, event: Moved | RoundOutcome | Progress) -> None:
        """For whoever watches."""

    async def in_thread(self, step: Callable[[], T]) -> T:
        """Off the event loop."""

    async def stored(self, write: Callable[[], T]) -> T:
        """Off the event loop, and again until the disk takes it."""


@dataclass(frozen=True, slots=True)
class Taken:
    """An open round that another process left: its journal, and what is in the spool of uploads."""

    entries: tuple[bytes, ...]
    received: dict[str, bytes]


class RoundPlay:
    """One round. opened: as it stands in the store; taken: what another process left of it, if one did."""

    def __init__(
        self,
        hands: Hands,
        spec: RoundSpec,
        opened: OpenRound,
        desk: UploadDesk,
        transcript: RoundScribe,
        taken: Taken | None = None,
    ) -> None:
        self._hands = hands
        self._desk = desk
        self._transcript = transcript
        self._taken = taken
        self._index = opened.index
        self._opened_unix = opened.opened_unix
        self._pending: list[Entry] = []
        self._present = hands.registry.present
        self.machine = Round(
            spec,
            hands.trust,
            hands.key,
            rng=hands.rng,
            present=self._present,
            admit=lambda device, identity: hands.registry.admit(device, identity, spec.call.round),
            record=self._pending.append,
            left_out=self._leave_out,
            reveal_secret=opened.reveal_secret,
        )
        self._inbox = Inbox()
        self._given_up: str | None = None
        self._result: list[Action] = []
        self._outcome: Completed | Abandoned | None = None
        self._lost = False
        self._left_out: dict[DeviceId, str | None] = {}
        self._phase: Phase | None = None
        self._phase_since = hands.clock()
        self._phase_seconds: dict[str, float] = {}
        self.call: Publish | None = None
        """What the broker shall retain while this round is open."""

    # -- what comes from the network, at any moment -----------------------------------------------

    def heard(self, device: DeviceId, data: bytes) -> None:
        """A message from a device's outbox."""
        self._inbox.heard(device, data)

    def chunk(self, device: DeviceId, frame: bytes) -> None:
        """A frame of a device's upload. Raises MalformedError."""
        complete = self._desk.feed(device, frame, self._hands.clock())
        if self._desk.problem is not None:
            self._transcript.give_up(self._desk.problem)  # the round needs the space more
        if complete:
            self._inbox.uploaded(device)

    def presence(self, device: DeviceId, online: bool) -> None:
        """A hint that a device came or went."""
        self._inbox.presence(device, online)

    def give_up(self, reason: str) -> None:
        """Abandon the round, if it is not over, and say why."""
        self._given_up = reason

    # -- one round --------------------------------------------------------------------------------

    async def run(self) -> RoundOutcome:
        """Play it to its end."""
        hands, spec = self._hands, self.machine.spec
        started, (bytes_in, bytes_out) = hands.clock(), hands.traffic()
        await self._begin()
        while (outcome := self._outcome) is None:
            await self._turn()
        reason, after_uploads = "", False
        if isinstance(outcome, Abandoned):
            reason, after_uploads = outcome.reason, outcome.after_uploads
            if self._desk.problem is not None:
                reason = f"{reason} ({self._desk.problem})"
            for device in outcome.blamed:
                hands.registry.blame(device, spec.call.round, outcome.reason)
        turnout, became = self._turnout(outcome)
        now_in, now_out = hands.traffic()
        return RoundOutcome(
            round_id=spec.call.round,
            index=self._index,
            completed=outcome if isinstance(outcome, Completed) else None,
            reason=reason,
            after_uploads=after_uploads,
            cohort=self.machine.cohort.n if self.machine.cohort else 0,
            seconds=hands.clock() - started,
            phase_seconds=dict(self._phase_seconds),
            bytes_in=now_in - bytes_in,
            bytes_out=now_out - bytes_out,
            turnout=turnout,
            fates=became,
        )

    def _leave_out(self, device: DeviceId, why: str | None) -> None:
        if device in self._left_out or len(self._left_out) < MAX_LEFT_OUT:
            self._left_out[device] = why

    def _turnout(
        self, outcome: Completed | Abandoned
    ) -> tuple[Turnout | None, dict[DeviceId, Fate]]:
        """What became of the round's devices. Of names that nobody vouches for there is no word."""
        if self._lost:
            return None, {}
        machine, hands = self.machine, self._hands
        course = machine.course(outcome, self._left_out)
        known = hands.registry.identities.keys() | course.checked_in | course.late
        chance = machine.spec.call.chance
        return counted(course, self._opened_unix, hands.unix(), chance), {
            device: fate for device, fate in fates(course).items() if device in known
        }

    async def _begin(self) -> None:
        taken, hands = self._taken, self._hands
        if taken is None:
            await hands.stored(self._desk.open)
            await self._step(lambda: self.machine.open(hands.clock()))
            return
        try:
            actions = await self._take_up(taken)
        except JournalError as error:
            log.error("round %d cannot be taken up again: %s", self.machine.spec.call.round, error)
            await self._lose(f"the coordinator could not take it up again: {error}")
            return
        log.info("round %d is taken up again", self.machine.spec.call.round)
        self.call = Publish(wire.sign(self.machine.spec.call, hands.key), retain=True)
        await hands.publish(self.call)
        if self.machine.over:  # all that was left to do is to save what it came to
            hands.show(Moved(self.machine.phase, "taken up again", resumed=True))
        await self._write_down()  # of a round that was never called
        await self._carry_out(actions)

    async def _take_up(self, taken: Taken) -> list[Action]:
        """Be where the journal leads. Raises JournalError."""
        entries = [journal.decode(data) for data in taken.entries]
        added = [entry.device for entry in entries if isinstance(entry, Added)]
        updates: dict[DeviceId, MaskedUpdate] = {}
        for entry in entries:
            if isinstance(entry, Signed):
                self._transcript.message(entry)
                if isinstance(entry.message, MaskedUpdate):
                    updates[entry.message.device] = entry.message
        await self._hands.stored(lambda: self._desk.reopen(taken.received, added))

        def uploaded(device: DeviceId) -> bytes:
            if (update := updates.get(device)) is None:
                raise JournalError(f"an update of {device} that it never announced")
            return self._desk.whole(device, update.payload, update.payload_bytes)

        restored = await self._hands.in_thread(
            lambda: self.machine.restore(entries, uploaded, self._hands.clock())
        )
        # Who is known to have gone did so while nobody listened here.
        for device in self._hands.registry.gone:
            self._inbox.presence(device, online=False)
        return restored

    async def _lose(self, reason: str) -> None:
        """End a round whose machine is of no use."""
        notice = abandonment(self.machine.spec.call, reason)
        await self._hands.publish(Publish(wire.sign(notice, self._hands.key)))
        self._hands.show(Moved(Phase.ABANDONED, reason))
        self._outcome, self._lost = Abandoned(reason, after_uploads=True), True

    async def _turn(self) -> None:
        """Wait for one message, or for a tick, and let the machine go on."""
        machine, hands = self.machine, self._hands
        if (reason := self._given_up) is not None:
            self._given_up = None
            await self._step(lambda: machine.abandon(reason))
            return
        try:
            async with asyncio.timeout(TICK_S):
                event = await self._inbox.get()
        except TimeoutError:
            await self._tick()
            return
        try:
            match event:
                case Heard(device, data):
                    await self._message(device, data)
                case Uploaded(device):
                    await self._upload_complete(device)
                case Presence(device, online):
                    await self._step(
                        lambda: machine.presence(device, online, hands.clock(), int(hands.unix()))
                    )
        except RemoteProtocolError as error:
            # With a sender the fault is a known device's; without one it is anybody's noise.
            level = logging.DEBUG if error.sender is None else logging.WARNING
            log.log(level, "refused from %s: %s", event.device, error)
        except (TransportError, StorageError):
            raise
        except Exception:
            # A bug of ours, which one device must not be able to use against the others.
            log.exception("an event of %s failed; it is dropped", event.device)
        if not self._inbox:
            self._tell_progress()

    async def _tick(self) -> None:
        machine, hands = self.machine, self._hands
        try:
            await self._step(lambda: machine.tick(hands.clock(), int(hands.unix())))
            await self._ask_for_missing()
            await self._checkpoint()
        except (TransportError, StorageError):
            raise
        except Exception as error:
            log.exception("the round cannot go on")
            reason = f"unexpected {type(error).__name__}: {error}"
            await self._step(lambda: machine.abandon(reason))
        self._tell_progress()

    async def _message(self, device: DeviceId, data: bytes) -> None:
        hands = self._hands
        if data[1:2] == bytes((WantBlob.CODE,)):
            want = request_of(data, device, hands.trust.fleet)
            hands.want(want.blob, want.ranges)
            return
        await self._step(
            lambda: self.machine.receive(data, device, hands.clock(), int(hands.unix()))
        )

    async def _upload_complete(self, device: DeviceId) -> None:
        if self.machine.phase is not Phase.COLLECT:
            return
        hands = self._hands
        try:
            payload = await hands.in_thread(lambda: self._desk.take(device))
            await self._step(
                lambda: self.machine.uploaded(device, payload, hands.clock(), int(hands.unix()))
            )
        except MalformedError as error:
            log.warning("upload of %s: %s", device, error)
        except StorageError as error:
            self._transcript.give_up(str(error))
            log.error("%s", error)

    async def _ask_for_missing(self) -> None:
        if self.machine.phase is not Phase.COLLECT:
            return
        for lack in self._desk.stalled(self._hands.clock()):
            want = WantUpload(ManifestDigest(lack.h), lack.device, lack.payload, lack.ranges)
            await self._hands.publish(Publish(wire.sign(want, self._hands.key), to=lack.device))

    async def _checkpoint(self) -> None:
        """Make safe what has come of long uploads, best effort: it can be sent again."""
        if self.machine.phase is not Phase.COLLECT:
            return
        for upload in self._desk.unsaved(self._hands.clock()):
            try:
                await self._hands.in_thread(partial(self._save, *upload))
            except StorageError as error:
                log.warning("%s", error)

    def _save(self, device: DeviceId, sink: FileSink, received: bytes) -> None:
        sink.sync()
        self._hands.store.received(device, received)

    # -- the machine's steps ----------------------------------------------------------------------

    async def _step(self, step: Callable[[], list[Action]]) -> None:
        """Run a step of the machine in a thread, write down what counts, and carry its actions out."""
        actions = await self._hands.in_thread(step)
        await self._write_down()
        await self._carry_out(actions)

    async def _write_down(self) -> None:
        """Until it is written, nothing follows from it."""
        if not self._pending:
            return
        entries, store = list(self._pending), self._hands.store
        self._pending.clear()
        # What we say next must survive the power, or we might say something else; what devices said
        # they say again.
        ours = any(isinstance(entry, Entered) for entry in entries)
        data = [journal.encode(entry) for entry in entries]

        def write() -> None:
            if Entered(Phase.COLLECT) in entries:
                # The roster is what devices wait for with their updates.
                call = self.machine.spec.call
                store.uploads_begin(call.model, call.revision)
            store.journal(data, durable=ours)

        await self._hands.stored(write)
        for entry in entries:
            if isinstance(entry, Signed):
                self._transcript.message(entry)

    async def _carry_out(self, actions: list[Action]) -> None:
        published: list[Awaitable[None]] = []
        for action in actions:
            match action:
                case Publish():
                    if action.retain:
                        self.call = action
                    published.append(self._hands.publish(action))
                case Expect(device, h, payload, size):
                    if self._desk.expect(device, h, payload, size, self._hands.clock()):
                        self._inbox.uploaded(device)
                case Fault(device, reason):
                    log.warning("%s: %s", device, reason)
                    self._hands.registry.fault(device)
                    self._transcript.note(device, reason)
                case Moved():
                    self._moved(action)
                case Completed() | Abandoned():
                    self._outcome = action
        await asyncio.gather(*published)
        if any(isinstance(action, Moved) for action in actions):
            # Without a connection that took as long as it took, and devices have only so long to answer.
            self.machine.sent(self._hands.clock())

    def _moved(self, moved: Moved) -> None:
        machine, now = self.machine, self._hands.clock()
        if moved.phase in (Phase.VIEW, Phase.UNMASK, Phase.DONE) and machine.cohort is not None:
            self._desk.shut(machine.cohort.names(machine.view))
        if self._phase is not None:
            self._phase_seconds[self._phase.value] = now - self._phase_since
        self._phase, self._phase_since = moved.phase, now
        log.info("phase %s: %s", moved.phase.value, moved.detail)
        self._hands.show(moved)

    def _tell_progress(self) -> None:
        machine = self.machine
        answered, awaited = machine.progress
        self._hands.show(
            Progress(
                round=machine.spec.call.round,
                index=self._index,
                phase=machine.phase.value,
                detail="",
                answered=answered,
                awaited=awaited,
                present=len(self._hands.registry.present),
            )
        )

    # -- its result -------------------------------------------------------------------------------

    def result(self, next_model: bytes, completed: Completed) -> bytes:
        """Put message 9 into the transcript, and have it ready. next_model: the hash of the model that
        the sum led to. Returns the secret that the members' shares were sealed to."""
        self._result = self.machine.publish_result(next_model, completed.ring_sum)
        for entry in self._pending:
            if isinstance(entry, Signed):
                self._transcript.message(entry)
        self._pending.clear()  # not for the journal: the round is over
        return self.machine.reveal_secret

    async def say_result(self) -> None:
        """Send what `result` made, if it did. Lost or late, it costs nothing: the next call says the
        same."""
        await self._carry_out(self._result)
