"""The coordinator's loop: a run's rounds, one after the other, over a transport.

Everything that decides about a round is in `round`, how one is carried out in `round_play`, everything
between two rounds in `run`; here are the network and the threads. No torch: plans come compiled.
"""

import asyncio
import contextlib
import logging
import os
import re
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from concurrent.futures import Executor
from functools import partial
from typing import TypeVar

from covey_coordinator.blobs import PATIENCE_S, BlobServer, Ranges, UploadDesk, request_of
from covey_coordinator.phases import (
    Completed,
    Moved,
    Publish,
    RoundSpec,
    decode_spec,
    encode_spec,
)
from covey_coordinator.registry import Registry
from covey_coordinator.round_play import RoundPlay, Taken
from covey_coordinator.run import RoundOutcome, Run
from covey_coordinator.statements import abandonment
from covey_coordinator.store import OpenRound, Progress, RunState, Store
from covey_coordinator.transcript import RoundScribe, Scribe
from covey_shared import wire
from covey_shared.errors import ConfigError, RemoteProtocolError, StorageError, TransportError
from covey_shared.keys import Rng, SigningKey
from covey_shared.messages import DeviceId, Message, RoundCall, WantBlob
from covey_shared.secagg.cohort import Trust
from covey_shared.topics import OFFLINE, ONLINE, Topics
from covey_shared.transport import Incoming, Transport

log = logging.getLogger("covey.coordinator")

T = TypeVar("T")

GOODBYE_S = 2.0
KEEP_S = 20.0
RETRY_STORAGE_S = 5.0

CONFIRM_S = 15.0
"""How long after a lost connection to the broker devices count as present without having said so again,
beside the time over which they spread their return."""

CALL_ANYWAY_S = 300.0
"""For how long no round is called because too few devices are online. Presence is hearsay."""

WAITING = "waiting for devices"
_DEVICE_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,30}[a-z0-9])?")


Observer = Callable[[Moved | RoundOutcome | Progress], None]


class CoordinatorService:
    """One fleet's coordinator. transport: not started yet. store: the fleet's; what is in it of an open
    round is gone on with.

    clock: monotonic seconds. unix: seconds since 1970, for certificates. observer: told of every
    phase and outcome. pool: threads for arithmetic; None is the event loop's own.
    """

    def __init__(
        self,
        trust: Trust,
        key: SigningKey,
        transport: Transport,
        store: Store,
        *,
        registry: Registry | None = None,
        rng: Rng = os.urandom,
        clock: Callable[[], float] = time.monotonic,
        unix: Callable[[], float] = time.time,
        observer: Observer = lambda event: None,
        pool: Executor | None = None,
    ) -> None:
        self.trust = trust
        self.key = key
        self.transport = transport
        self.store = store
        self.registry = registry if registry is not None else Registry()
        self.rng = rng
        self.clock = clock
        self.unix = unix
        self.observer = observer
        self._pool = pool
        self._topics = Topics(trust.fleet)
        self._blobs = BlobServer(transport, self._topics)
        self._scribe: Scribe | None = None
        self._play: RoundPlay | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self.connected = asyncio.Event()
        self._came = asyncio.Event()  # a device came or went
        self._reconnect_s = 0.0
        self._confirming: asyncio.Task[None] | None = None
        self._calling: asyncio.Task[None] | None = None

    # -- life -------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Connect, and go on connecting; returns at once."""
        topics = self._topics
        await self.transport.start(self._on_message, self._on_connected, self._on_disconnected)
        await self.transport.subscribe(topics.outbox("+"), topics.upload("+"), topics.presence("+"))
        self._spawn(self._guarded(self._blobs.serve))

    async def close(self) -> None:
        """Stop. A round that is open stays so: the next process goes on with it. Until then no device
        is to begin with it, if the broker can be reached."""
        for task in list(self._tasks):
            task.cancel()
        await self._withdraw_call()
        await self.transport.stop()

    async def _withdraw_call(self) -> None:
        """Nobody leads a round: the broker shall show none to devices that connect from now on."""
        if not self.transport_up:
            return
        with contextlib.suppress(TransportError, TimeoutError):
            async with asyncio.timeout(GOODBYE_S):
                await self.transport.publish(self._topics.round, b"", retain=True)

    @property
    def _open_play(self) -> RoundPlay | None:
        """The round that is being played."""
        return self._play if self._play is not None and not self._play.machine.over else None

    def _spawn(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

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
        play = self._open_play
        if not incoming.payload:
            return
        try:
            if play is None:
                if incoming.topic == self._topics.outbox(device):
                    self._between_rounds(device, incoming.payload)
            elif incoming.topic == self._topics.upload(device):
                play.chunk(device, incoming.payload)
            elif incoming.topic == self._topics.outbox(device):
                play.heard(device, incoming.payload)
        except RemoteProtocolError as error:
            log.debug("dropped on %s: %s", incoming.topic, error)

    def _between_rounds(self, device: DeviceId, data: bytes) -> None:
        """Devices fetch the model that the last round led to at leisure, to use it themselves."""
        if data[1:2] == bytes((WantBlob.CODE,)):
            want = request_of(data, device, self.trust.fleet)
            self.want(want.blob, want.ranges)

    def _on_presence(self, device: DeviceId, online: bool) -> None:
        if self.registry.presence(device, online):
            self._came.set()
            if (play := self._open_play) is not None:
                play.presence(device, online)

    async def _on_connected(self) -> None:
        log.info("connected to the broker")
        self.connected.set()
        if self._confirming is not None:
            self._confirming.cancel()
        self._confirming = self._spawn(self._confirm())
        play = self._open_play
        if play is not None and play.call is not None:
            # The broker may have lost what it retained, and what was on its way. One at a time, however
            # often connections break before this gets through.
            if self._calling is not None:
                self._calling.cancel()
            self._calling = self._spawn(self._call_again(play.call))
            play.machine.repeat_soon(self.clock())

    async def _confirm(self) -> None:
        """Forget, in a while, whom the broker's new life has not heard of."""
        await asyncio.sleep(CONFIRM_S + self._reconnect_s)
        for device in self.registry.settle():
            log.info("%s did not come back to the broker", device)
            if (play := self._open_play) is not None:
                play.presence(device, False)

    async def _call_again(self, call: Publish) -> None:
        with contextlib.suppress(TransportError):
            await self.publish(call)

    def _on_disconnected(self, reason: str) -> None:
        self.connected.clear()
        # Not only when there is a connection again: by then some may have said that they are there.
        self.registry.doubt()
        log.warning("%s", reason)

    def show(self, event: Moved | RoundOutcome | Progress) -> None:
        """Tell the observer, whose trouble is its own."""
        try:
            self.observer(event)
        except Exception:
            log.exception("an observer failed; the round goes on")

    def offer(self, blobs: Iterable[bytes]) -> None:
        """What devices may ask for while no run is played."""
        self._blobs.offer(blobs)

    def want(self, blob: bytes, ranges: Ranges) -> None:
        """Publish chunks of a blob that is on offer."""
        self._blobs.want(blob, ranges)

    def traffic(self) -> tuple[int, int]:
        """Bytes (received, sent) since the start."""
        return getattr(self.transport, "bytes_in", 0), getattr(self.transport, "bytes_out", 0)

    async def in_thread(self, step: Callable[[], T]) -> T:
        """Off the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, step)

    async def tell(self, device: DeviceId, message: wire.Signed[Message]) -> None:
        """Put a message into a device's inbox, outside any round. Raises TransportError."""
        await self.transport.publish(self._topics.inbox(device), message.envelope)

    async def publish(self, action: Publish) -> None:
        """To the topic that is meant. Raises TransportError."""
        topics = self._topics
        if isinstance(action.message.message, RoundCall):
            topic = topics.round
        else:
            topic = topics.all if action.to is None else topics.inbox(action.to)
        await self.transport.publish(topic, action.message.envelope, retain=action.retain)

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
        await self.stored(run.begin)
        self._blobs.linger()
        scribe = self._scribe = Scribe(run.directory, run.config.transcripts, self.trust, self.key)
        left = await self.stored(self.store.opened)
        resumed = left.index if left is not None and left.run == run.directory.name else None
        await self.in_thread(lambda: scribe.recover(but=resumed))
        patience_s = min(PATIENCE_S, run.config.deadlines.resend_s)
        desk = UploadDesk(run.directory.spool, patience_s)
        while run.rounds_left and not (stop and stop.is_set()):
            self._blobs.offer(await self.in_thread(run.blobs))
            await self.connected.wait()  # or a round would be called in ignorance of who is there
            await self._enough_present(run, stop)
            if stop and stop.is_set():
                break
            opened, spec, taken = await self._opened(run)
            outcome = await self._written_down(run, scribe, desk, opened, spec, taken, on_sum)
            self.show(outcome)
        await self.stored(run.end)
        await self._withdraw_call()
        return run.state

    async def _enough_present(self, run: Run, stop: asyncio.Event | None) -> None:
        """Wait until as many devices are online as a round needs, or for CALL_ANYWAY_S. A round that is
        open already is not waited with."""
        least, began, said = run.config.cohort.minimum, self.clock(), False
        if await self.stored(self.store.opened) is not None:
            return
        while (n := len(self.registry.present)) < least and not (stop and stop.is_set()):
            left_s = began + CALL_ANYWAY_S - self.clock()
            if left_s <= 0:
                log.warning("%d of %d devices online; a round is called all the same", n, least)
                return
            self._came.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(1.0, left_s)):
                    await self._came.wait()
                    continue
            if not said:
                log.warning("%s: %d of %d online", WAITING, n, least)
            said = True
            self.show(
                Progress(
                    round=0, index=run.index, phase=WAITING, detail="",
                    answered=n, awaited=least, present=n,
                )
            )  # fmt: skip

    async def _opened(self, run: Run) -> tuple[OpenRound, RoundSpec, Taken | None]:
        """The round that another process left open, or a new one."""
        store = self.store
        opened = await self.stored(store.opened)
        if opened is not None:
            spec, problem = to_go_on_with(run, opened)
            if spec is not None and not problem:
                entries = await self.stored(store.entries)
                received = await self.stored(store.received_chunks)
                run.resume(spec)
                return opened, spec, Taken(tuple(entries), received)
            log.warning("round %d is not taken up again: %s", opened.round, problem)
            if spec is not None:
                notice = abandonment(spec.call, "the coordinator went on with another")
                await self.publish(Publish(wire.sign(notice, self.key)))
            await self.stored(store.forget_round)
        round_id = await self.stored(store.next_round)
        model = run.model_digest
        revision = await self.stored(lambda: store.revision(model))
        present, known = len(self.registry.present), self.registry.known
        spec = run.spec(self.trust.fleet, round_id, revision, present=present, known=known)
        opened = OpenRound(
            run=run.directory.name,
            index=run.index,
            round=round_id,
            spec=encode_spec(spec),
            reveal_secret=self.rng(32),
            opened_unix=self.unix(),
        )
        await self.stored(lambda: store.open_round(opened))
        return opened, spec, None

    async def _written_down(
        self,
        run: Run,
        scribe: Scribe,
        desk: UploadDesk,
        opened: OpenRound,
        spec: RoundSpec,
        taken: Taken | None,
        on_sum: Callable[[int, Completed], None],
    ) -> RoundOutcome:
        """One round, from its call to its transcript."""
        index, before = opened.index, run.model
        self._reconnect_s = spec.call.reconnect_s
        transcript = await self.in_thread(lambda: scribe.open(index, spec.call, *run.averaging))
        play = self._play = RoundPlay(self, spec, opened, desk, transcript, taken)
        try:
            outcome = await play.run()
            if outcome.completed is not None:
                on_sum(spec.call.round, outcome.completed)
            outcome = await self._kept(run, play, outcome, transcript, before)
            # Before devices hear of the next model, which they fetch once they do.
            self._blobs.offer(await self.in_thread(run.blobs))
            await play.say_result()
            await self.in_thread(desk.close)
            await self.in_thread(scribe.tidy)
        finally:
            # Being stopped leaves the round as it is, for the next process to go on with.
            desk.leave()
            transcript.leave()
        return outcome

    def give_up_round(self, reason: str) -> None:
        """Abandon the round that is open, if there is one."""
        if (play := self._open_play) is not None:
            play.give_up(reason)

    async def _kept(
        self,
        run: Run,
        play: RoundPlay,
        outcome: RoundOutcome,
        transcript: RoundScribe,
        before: bytes,
    ) -> RoundOutcome:
        """What a round came to, averaged and on disk. Being stopped meanwhile loses nothing, if the
        disk only lets us; being killed has the next process make the sum anew.

        The order is: the new model's files, the transcript, and then the one transaction by which the
        round is over, before anybody is told. before: the model that the round began with.
        """

        async def keep() -> RoundOutcome:
            absorbed = await self.in_thread(lambda: run.absorb(outcome))
            await self.stored(run.stage)
            completed, cohort = absorbed.completed, play.machine.cohort
            if completed is None or cohort is None:
                await self.in_thread(lambda: transcript.ended(absorbed.reason))
            else:
                secret = play.result(run.model_digest, completed)
                await self.in_thread(
                    lambda: transcript.completed(cohort, completed, secret, before)
                )
            if transcript.problem is not None:
                run.transcript_lost(transcript.problem)
            await self.stored(run.save)
            return absorbed

        keeping = asyncio.create_task(keep())
        try:
            return await asyncio.shield(keeping)
        except asyncio.CancelledError:
            await asyncio.wait({keeping}, timeout=KEEP_S)
            keeping.cancel()
            raise

    async def stored(self, write: Callable[[], T]) -> T:
        """Do it, and when the disk refuses, keep everything and try again until it works."""
        while True:
            try:
                return await self.in_thread(write)
            except StorageError as error:
                log.error("%s; trying again in %g s", error, RETRY_STORAGE_S)
                if self._scribe is not None:
                    await self.in_thread(partial(self._scribe.make_room, str(error)))
                await asyncio.sleep(RETRY_STORAGE_S)


def to_go_on_with(run: Run, opened: OpenRound) -> tuple[RoundSpec | None, str]:
    """What an open round is about, and why it cannot go on; empty if it can."""
    try:
        spec = decode_spec(opened.spec)
    except ConfigError as error:
        return None, str(error)
    if opened.run != run.directory.name:
        return spec, f"it is one of run {opened.run!r}"
    if (opened.index, spec.call.model) != (run.index, run.model_digest):
        return spec, "the run stands elsewhere now"
    if spec.call.plan != run.bundle.hash:
        return spec, "the run has another plan now"
    return spec, ""
