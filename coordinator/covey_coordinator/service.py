"""The coordinator's loop: rounds' actions carried out over a transport.

Everything that decides about a round is in `round`, everything between two rounds in `run`; here are
the queue, the network and the threads. No torch: plans come compiled.
"""

import asyncio
import contextlib
import logging
import os
import re
import time
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import Executor
from functools import partial
from typing import TypeVar

from covey_coordinator.blobs import PATIENCE_S, BlobServer, UploadDesk
from covey_coordinator.inbox import Heard, Inbox, Presence, Uploaded
from covey_coordinator.registry import Registry
from covey_coordinator.round import (
    Abandoned,
    Action,
    Completed,
    Expect,
    Fault,
    Moved,
    Phase,
    Publish,
    Round,
    RoundSpec,
)
from covey_coordinator.run import RoundOutcome, Run
from covey_coordinator.store import Progress, RoundCounter, RunState
from covey_coordinator.transcript import RoundScribe, Scribe
from covey_shared import wire
from covey_shared.errors import (
    MalformedError,
    RefusedError,
    RemoteProtocolError,
    StorageError,
    TransportError,
)
from covey_shared.keys import Rng, SigningKey
from covey_shared.messages import (
    DeviceId,
    ManifestDigest,
    Message,
    RoundCall,
    WantBlob,
    WantUpload,
)
from covey_shared.secagg.cohort import Trust
from covey_shared.topics import OFFLINE, ONLINE, Topics
from covey_shared.transport import Incoming, Transport
from covey_shared.wire import Signed

log = logging.getLogger("covey.coordinator")

T = TypeVar("T")

TICK_S = 0.2
GOODBYE_S = 2.0
KEEP_S = 20.0
RETRY_STORAGE_S = 5.0
_DEVICE_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,30}[a-z0-9])?")


Observer = Callable[[Moved | RoundOutcome | Progress], None]


class CoordinatorService:
    """One fleet's coordinator. transport: not started yet. counter: gives round numbers.

    clock: monotonic seconds. unix: seconds since 1970, for certificates. observer: told of every
    phase and outcome. pool: threads for arithmetic; None is the event loop's own.
    """

    def __init__(
        self,
        trust: Trust,
        key: SigningKey,
        transport: Transport,
        counter: RoundCounter,
        *,
        registry: Registry | None = None,
        rng: Rng = os.urandom,
        clock: Callable[[], float] = time.monotonic,
        unix: Callable[[], float] = time.time,
        observer: Observer = lambda event: None,
        pool: Executor | None = None,
    ) -> None:
        self._trust = trust
        self._key = key
        self.transport = transport
        self._counter = counter
        self.registry = registry if registry is not None else Registry()
        self._rng = rng
        self._clock = clock
        self._unix = unix
        self.observer = observer
        self._pool = pool
        self._topics = Topics(trust.fleet)
        self._inbox = Inbox()
        self._blobs = BlobServer(transport, self._topics)
        self._desk: UploadDesk | None = None
        self._scribe: Scribe | None = None
        self._transcript = RoundScribe(None, None, key)
        self._round: Round | None = None
        self._last_round: Round | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._outcome: Completed | Abandoned | None = None
        self._phase: Phase | None = None
        self._phase_since = 0.0
        self._phase_seconds: dict[str, float] = {}
        self._call: Publish | None = None
        self._goodbyes: list[Publish] = []
        self.connected = asyncio.Event()

    # -- life -------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Connect, and go on connecting; returns at once."""
        topics = self._topics
        await self.transport.start(self._on_message, self._on_connected, self._on_disconnected)
        await self.transport.subscribe(topics.outbox("+"), topics.upload("+"), topics.presence("+"))
        self._spawn(self._guarded(self._blobs.serve))

    async def close(self) -> None:
        """Stop. Devices in a round that was interrupted are told, if the broker can be reached."""
        for task in list(self._tasks):
            task.cancel()
        await self._withdraw_call()
        await self.transport.stop()

    async def _withdraw_call(self) -> None:
        """No round is open: the broker shall show none to devices that connect from now on."""
        goodbyes, self._goodbyes = self._goodbyes, []
        if not self.transport_up:
            return
        with contextlib.suppress(TransportError, TimeoutError):
            async with asyncio.timeout(GOODBYE_S):
                await self.transport.publish(self._topics.round, b"", retain=True)
                for goodbye in goodbyes:
                    await self._publish(goodbye)

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    @property
    def transport_up(self) -> bool:
        """Whether there is a connection at this moment."""
        return self.connected.is_set()

    async def _guarded(self, work: Callable[[], Awaitable[None]]) -> None:
        while True:
            try:
                await work()
            except TransportError:
                return
            except Exception:
                log.exception("a task failed; the service goes on")
                await asyncio.sleep(1)

    # -- the network ------------------------------------------------------------------------------

    def _on_message(self, incoming: Incoming) -> None:
        device = self._topics.device_of(incoming.topic)
        if device is None or not _DEVICE_NAME.fullmatch(device):
            return
        if incoming.topic == self._topics.presence(device):
            if incoming.payload in (ONLINE, OFFLINE):
                self._on_presence(device, incoming.payload == ONLINE)
            return
        if self._round is None or not incoming.payload:
            return
        try:
            if incoming.topic == self._topics.upload(device):
                self._on_frame(device, incoming.payload)
            elif incoming.topic == self._topics.outbox(device):
                self._inbox.heard(device, incoming.payload)
        except RemoteProtocolError as error:
            log.debug("dropped on %s: %s", incoming.topic, error)

    def _on_presence(self, device: DeviceId, online: bool) -> None:
        if self.registry.presence(device, online) and self._round is not None:
            self._inbox.presence(device, online)

    def _on_frame(self, device: DeviceId, frame: bytes) -> None:
        desk = self._desk
        if desk is None:
            return
        complete = desk.feed(device, frame, self._clock())
        if desk.problem is not None:
            self._transcript.give_up(desk.problem)  # the round needs the space more
        if complete:
            self._inbox.uploaded(device)

    async def _on_connected(self) -> None:
        log.info("connected to the broker")
        self.connected.set()
        if self._call is not None and self._round is not None and not self._round.over:
            # The broker may have lost what it retained.
            self._spawn(self._guarded_once(self._publish(self._call)))

    async def _guarded_once(self, work: Awaitable[None]) -> None:
        with contextlib.suppress(TransportError):
            await work

    def _on_disconnected(self, reason: str) -> None:
        self.connected.clear()
        log.warning("%s", reason)

    async def tell(self, device: DeviceId, message: wire.Signed[Message]) -> None:
        """Put a message into a device's inbox, outside any round. Raises TransportError."""
        await self.transport.publish(self._topics.inbox(device), message.envelope)

    async def _publish(self, action: Publish) -> None:
        topics = self._topics
        if isinstance(action.message.message, RoundCall):
            topic = topics.round
        else:
            topic = topics.all if action.to is None else topics.inbox(action.to)
        await self.transport.publish(topic, action.message.envelope, retain=action.retain)

    # -- one round --------------------------------------------------------------------------------

    async def run_round(
        self, spec: RoundSpec, index: int, spool: UploadDesk, transcript: RoundScribe
    ) -> RoundOutcome:
        """Play one round to its end. Its blobs must be on offer already, its transcript open."""
        await self.connected.wait()  # or it would be called in ignorance of who is there
        started = self._clock()
        bytes_in, bytes_out = self._bytes()
        await self._stored(spool.open)
        self._desk, self._transcript = spool, transcript
        self._inbox = Inbox()
        self._outcome = None
        self._phase, self._phase_since, self._phase_seconds = None, started, {}
        machine = Round(
            spec,
            self._trust,
            self._key,
            rng=self._rng,
            present=self.registry.present,
            admit=lambda device, identity: self.registry.admit(device, identity, spec.call.round),
            record=lambda entry: transcript.message(entry) if isinstance(entry, Signed) else None,
        )
        self._round = self._last_round = machine
        try:
            await self._carry_out(machine.open(self._clock()))
            while (outcome := self._over()) is None:
                await self._turn(machine, spool, index)
        except asyncio.CancelledError:
            with contextlib.suppress(Exception):  # a step of it may be under way in a thread
                reason = "the coordinator was stopped; the run can go on later"
                actions = machine.abandon(reason)
                self._goodbyes = [action for action in actions if isinstance(action, Publish)]
                transcript.ended(reason, interrupted=True)
            raise
        finally:
            self._round, self._desk, self._call = None, None, None
            spool.close()
        completed = outcome if isinstance(outcome, Completed) else None
        reason, after_uploads = "", False
        if isinstance(outcome, Abandoned):
            reason, after_uploads = outcome.reason, outcome.after_uploads
            if spool.problem is not None:
                reason = f"{reason} ({spool.problem})"
            for device in outcome.blamed:
                self.registry.blame(device, spec.call.round, outcome.reason)
        now_in, now_out = self._bytes()
        return RoundOutcome(
            round_id=spec.call.round,
            index=index,
            completed=completed,
            reason=reason,
            after_uploads=after_uploads,
            cohort=machine.cohort.n if machine.cohort else 0,
            seconds=self._clock() - started,
            phase_seconds=dict(self._phase_seconds),
            bytes_in=now_in - bytes_in,
            bytes_out=now_out - bytes_out,
        )

    def _over(self) -> Completed | Abandoned | None:
        return self._outcome

    def _bytes(self) -> tuple[int, int]:
        return getattr(self.transport, "bytes_in", 0), getattr(self.transport, "bytes_out", 0)

    async def _turn(self, machine: Round, spool: UploadDesk, index: int) -> None:
        """Wait for one message, or for a tick, and let the machine go on."""
        try:
            async with asyncio.timeout(TICK_S):
                event = await self._inbox.get()
        except TimeoutError:
            await self._tick(machine, spool, index)
            return
        try:
            match event:
                case Heard(device, data):
                    await self._message(machine, device, data)
                case Uploaded(device):
                    await self._upload_complete(machine, spool, device)
                case Presence(device, online):
                    await self._step(
                        lambda: machine.presence(device, online, self._clock(), int(self._unix()))
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
            self._tell_progress(machine, index)

    async def _tick(self, machine: Round, spool: UploadDesk, index: int) -> None:
        try:
            await self._step(lambda: machine.tick(self._clock(), int(self._unix())))
            await self._ask_for_missing(spool)
        except (TransportError, StorageError):
            raise
        except Exception as error:
            log.exception("the round cannot go on")
            await self._carry_out(machine.abandon(f"unexpected {type(error).__name__}: {error}"))
        self._tell_progress(machine, index)

    async def _message(self, machine: Round, device: DeviceId, data: bytes) -> None:
        if data[1:2] == bytes((WantBlob.CODE,)):
            want = wire.decode_as(WantBlob, data).message
            if want.device != device or want.fleet != self._trust.fleet:
                raise RefusedError(f"a request in another's name came from {device}'s topic")
            # Not verified: anyone on the broker may read blobs; a hash is asked for, nothing else.
            self._blobs.want(want.blob, want.ranges)
            return
        await self._step(lambda: machine.receive(data, device, self._clock(), int(self._unix())))

    async def _upload_complete(self, machine: Round, spool: UploadDesk, device: DeviceId) -> None:
        if machine.phase is not Phase.COLLECT:
            return
        try:
            keep = self._transcript.place_for(device)
            payload = await self._in_thread(lambda: spool.take(device, keep))
            await self._step(
                lambda: machine.uploaded(device, payload, self._clock(), int(self._unix()))
            )
        except MalformedError as error:
            self._transcript.drop(device)
            log.warning("upload of %s: %s", device, error)
        except StorageError as error:
            self._transcript.give_up(str(error))
            log.error("%s", error)

    async def _ask_for_missing(self, spool: UploadDesk) -> None:
        if self._round is None or self._round.phase is not Phase.COLLECT:
            return
        for lack in spool.stalled(self._clock()):
            want = WantUpload(ManifestDigest(lack.h), lack.device, lack.payload, lack.ranges)
            await self._publish(Publish(wire.sign(want, self._key), to=lack.device))

    async def _step(self, step: Callable[[], list[Action]]) -> None:
        """Run a step of the machine in a thread, and carry its actions out."""
        await self._carry_out(await self._in_thread(step))

    async def _in_thread(self, step: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._pool, step)

    async def _carry_out(self, actions: list[Action]) -> None:
        published = []
        for action in actions:
            match action:
                case Publish():
                    if action.retain:
                        self._call = action
                    published.append(self._publish(action))
                case Expect(device, h, payload, size):
                    if self._desk is not None and self._desk.expect(
                        device, h, payload, size, self._clock()
                    ):
                        self._inbox.uploaded(device)
                case Fault(device, reason):
                    log.warning("%s: %s", device, reason)
                    self.registry.fault(device)
                    self._transcript.note(device, reason)
                case Moved():
                    await self._moved(action)
                case Completed() | Abandoned():
                    self._outcome = action
        await asyncio.gather(*published)
        if self._round is not None and any(isinstance(action, Moved) for action in actions):
            # Without a connection that took as long as it took, and devices have only so long to answer.
            self._round.sent(self._clock())

    async def _moved(self, moved: Moved) -> None:
        if moved.phase is Phase.COLLECT and self._round is not None:
            # Before the roster goes out, which is what devices wait for with their updates.
            call = self._round.spec.call
            await self._stored(lambda: self._counter.uploads_begin(call.model, call.revision))
        if moved.phase is Phase.VIEW and self._desk is not None:
            self._desk.shut()
        now = self._clock()
        if self._phase is not None:
            self._phase_seconds[self._phase.value] = now - self._phase_since
        self._phase, self._phase_since = moved.phase, now
        log.info("phase %s: %s", moved.phase.value, moved.detail)
        self._tell(moved)

    def _tell(self, event: Moved | RoundOutcome | Progress) -> None:
        try:
            self.observer(event)
        except Exception:
            log.exception("an observer failed; the round goes on")

    def _tell_progress(self, machine: Round, index: int) -> None:
        answered, awaited = machine.progress
        self._tell(
            Progress(
                round=machine.spec.call.round,
                index=index,
                phase=machine.phase.value,
                detail="",
                answered=answered,
                awaited=awaited,
                present=len(self.registry.present),
            )
        )

    # -- a run ------------------------------------------------------------------------------------

    async def play(
        self,
        run: Run,
        *,
        on_sum: Callable[[int, Completed], None] = lambda round_id, completed: None,
        stop: asyncio.Event | None = None,
    ) -> RunState:
        """All rounds of a run, from where its directory says it stands. Returns its last state.

        Every attempt counts as a round, completed or abandoned; an abandoned one leaves the model
        as it is. on_sum: told every decoded ring sum, for simulations that know the plaintext.
        """
        await self._stored(run.begin)
        scribe = self._scribe = Scribe(
            run.directory, run.config.transcripts, self._trust, self._key
        )
        await self._in_thread(scribe.recover)
        patience_s = min(PATIENCE_S, run.config.deadlines.resend_s)
        desk = UploadDesk(run.directory.spool, patience_s)
        while run.rounds_left and not (stop and stop.is_set()):
            self._blobs.offer(await self._in_thread(run.blobs))
            round_id = await self._stored(self._counter.next)
            model = run.model_digest
            revision = await self._stored(lambda model=model: self._counter.revision(model))  # type: ignore[misc]
            spec = run.spec(self._trust.fleet, round_id, revision)
            outcome = await self._written_down(run, scribe, spec, desk, on_sum)
            self._tell(outcome)
        await self._stored(run.end)
        await self._withdraw_call()
        return run.state

    async def _written_down(
        self,
        run: Run,
        scribe: Scribe,
        spec: RoundSpec,
        desk: UploadDesk,
        on_sum: Callable[[int, Completed], None],
    ) -> RoundOutcome:
        """One round, from its call to its transcript."""
        index, before = run.index, run.model
        transcript = await self._in_thread(lambda: scribe.open(index, spec.call, *run.averaging))
        try:
            outcome = await self.run_round(spec, index, desk, transcript)
            if outcome.completed is not None:
                on_sum(spec.call.round, outcome.completed)
            outcome = await self._kept(run, outcome)
            completed, machine = outcome.completed, self._last_round
            if completed is None or machine is None or machine.cohort is None:
                reason = outcome.reason
                await self._in_thread(lambda: transcript.ended(reason))
            else:
                # First the model is safe and the devices know; what is left of the disk is for this.
                await self._announce(run, completed)
                cohort, secret = machine.cohort, machine.reveal_secret
                await self._in_thread(
                    lambda: transcript.completed(cohort, completed, secret, before)
                )
            await self._in_thread(scribe.tidy)
        finally:
            transcript.leave()
        if transcript.problem is not None:
            run.transcript_lost(transcript.problem)
        return outcome

    async def _kept(self, run: Run, outcome: RoundOutcome) -> RoundOutcome:
        """What a round came to, averaged and on disk. Being stopped meanwhile loses nothing, if the
        disk only lets us."""

        async def keep() -> RoundOutcome:
            absorbed = await self._in_thread(lambda: run.absorb(outcome))
            await self._stored(run.save)
            return absorbed

        keeping = asyncio.create_task(keep())
        try:
            return await asyncio.shield(keeping)
        except asyncio.CancelledError:
            await asyncio.wait({keeping}, timeout=KEEP_S)
            keeping.cancel()
            raise

    async def _stored(self, write: Callable[[], T]) -> T:
        """Do it, and when the disk refuses, keep everything and try again until it works."""
        while True:
            try:
                return await self._in_thread(write)
            except StorageError as error:
                log.error("%s; trying again in %g s", error, RETRY_STORAGE_S)
                if self._scribe is not None:
                    await self._in_thread(partial(self._scribe.make_room, str(error)))
                await asyncio.sleep(RETRY_STORAGE_S)

    async def _announce(self, run: Run, completed: Completed) -> None:
        """Message 9. Lost or late, it costs nothing: the next call says the same."""
        if self._last_round is not None:
            actions = self._last_round.publish_result(run.model_digest, completed.ring_sum)
            await self._carry_out(actions)
