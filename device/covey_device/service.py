"""The device's loop: the session's actions carried out over a transport, training beside it.

Everything that decides is in `session`; here are only the queue, the threads and the network. One
worker hands messages to the session in their order; one sender publishes in order; training runs in
a thread of its own, so that a device in training still does its committee duties.
"""

import asyncio
import contextlib
import errno
import logging
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import Executor
from typing import Any, TypeVar

import msgspec

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
from covey_device.audit import Audit
from covey_device.blobs import BlobFetcher, Ranges
from covey_device.cache import BlobCache
from covey_device.config import PolicyConfig, PolicyFile
from covey_device.footprint import ENGINE
from covey_device.home.keeper import Home
from covey_device.host.care import Care
from covey_device.host.eligibility import State
from covey_device.host.port import LocalPort
from covey_device.keystore import MemoryFile
from covey_device.preparation import Preparation, TrainerFactory, tamed
from covey_device.present import Present
from covey_device.renewal import Renewal
from covey_device.session import Session
from covey_device.trainer import OPEN, Work
from covey_device.unfinished import Unfinished
from covey_device.uploads import Uploads
from covey_shared import wire
from covey_shared.errors import (
    ConfigError,
    CoveyError,
    DataError,
    LocalProtocolError,
    RemoteProtocolError,
    StorageError,
    TrainingError,
    TransportError,
)
from covey_shared.keys import Rng, SigningKey, uniform
from covey_shared.messages import (
    Decline,
    DeviceId,
    Head,
    Message,
    RoundCall,
    WantBlob,
    for_display,
)
from covey_shared.runtime import OUT_OF_MEMORY
from covey_shared.topics import OFFLINE, ONLINE, Topics
from covey_shared.transport import Incoming, Transport
from covey_shared.wire import Signed

log = logging.getLogger("covey.device")

T = TypeVar("T")

MAX_INBOX_BYTES = 8 << 20
"""Of messages waiting for the session. A flood beyond that is dropped; what mattered is repeated."""

_MESSAGE_OVERHEAD_BYTES = 200

MAX_OUTBOX = 256
"""Messages and uploads that wait to be sent; of a round there are a dozen. A broker that takes nothing and
plays old messages back, each of which is answered again, gets no further."""

GOODBYE_S = 2.0

REST_AFTER_S = 3.0
"""After a round's end. Rounds that follow each other sooner find everything as it was."""

METRICS = ("loss",)
"""What rides along with an update, masked like it: the mean training loss."""

_CALL = bytes((RoundCall.CODE,))


class DeviceService:
    """One device. transport: not started yet. pool: threads for the protocol's arithmetic.

    train_pool: threads for training; a simulated fleet shares one among its devices, so that no
    more train at once than there are cores. None: the event loop's own. policy: the owner's file, whose
    limits go before `limits`. audit: told of everything before it is done. Simulations have neither.
    cache: of plans and models, on the disk.
    """

    def __init__(
        self,
        session: Session,
        identity: SigningKey,
        fleet: str,
        transport: Transport,
        memory: MemoryFile | None,
        make_trainer: TrainerFactory,
        *,
        limits: Work,
        rng: Rng,
        pool: Executor | None = None,
        train_pool: Executor | None = None,
        policy: PolicyFile | None = None,
        audit: Audit | None = None,
        cache: BlobCache | None = None,
    ) -> None:
        self._session = session
        self._identity = identity
        self.device: DeviceId = session.device
        self._topics = Topics(fleet)
        self._fleet = fleet
        self.transport = transport
        self._memory = memory
        self._policy, self._audit = policy, audit
        self._rng = rng
        self._pool, self._train_pool = pool, train_pool
        self._lock = asyncio.Lock()
        self._inbox: asyncio.Queue[Incoming | asyncio.Future[None]] = asyncio.Queue()
        self._inbox_bytes = 0
        self._flooded = False
        self._late = False  # the last call was retained: it may have come long ago
        self._connected = False
        self._here = asyncio.Event()  # a connection that the others were not told of
        self._outbox: asyncio.Queue[Publish | Upload] = asyncio.Queue()
        self._tasks: set[asyncio.Task[None]] = set()
        self._round_tasks: set[asyncio.Task[None]] = set()
        self._stop_training = threading.Event()
        self._training = asyncio.Lock()
        self._lasting: list[asyncio.Task[None]] = []
        self._tired = asyncio.Event()  # something was done that leaves memory behind
        self._uploads = Uploads(self._send_frame)
        self._cache = cache
        self._blobs = BlobFetcher(transport, self._topics, self._ask, cache=cache, pool=pool)
        self.preparation = Preparation(
            self._blobs, make_trainer, limits=limits, rng=rng, pool=train_pool, policy=policy
        )
        self._blob_prefix = self._topics.blob(b"")
        self.on_ended: Callable[[Ended], None] = lambda ended: None
        self.on_policy: Callable[[PolicyConfig], object] = lambda policy: None
        """Told when the owner's policy has changed."""
        self.on_status: Callable[[str], None] = lambda line: None
        """Told in one line what this device is at, whenever that changes. Called in the event loop."""
        self._status = ""
        self.present = Present()
        """Told of each time that the coordinator signs in a manifest."""
        self.give_back: Callable[[str], None] | None = None
        """Returns memory to the system, for a process that is one device: called when it has nothing to do,
        with "" after the start and the computing library's name after rounds (see `footprint`)."""
        self.care: Care | None = None
        """For the machine it runs on. Without it a device takes part whatever becomes of its host."""
        self.port: LocalPort | None = None
        """The local socket, opened and closed with the service."""
        self._since_unix = time.time()
        self._counts = {"called": 0, "contributed": 0, "batches": 0}
        self._last: dict[str, Any] | None = None
        self.home: Home | None = None
        """Keeps the model for this device's own applications."""
        self.renewal: Renewal | None = None
        """Looks after the certificates of a device that was enrolled with a token."""

    # -- life -------------------------------------------------------------------------------------

    async def run(self, stop: asyncio.Event) -> None:
        """Serve until `stop`."""
        await self.start()
        try:
            await stop.wait()
        finally:
            await self.close()

    async def start(self) -> None:
        """Connect, and go on connecting; returns at once. Raises ConfigError if another service has the
        local socket."""
        if self.port is not None:
            try:
                await self.port.open()
            except StorageError as error:
                log.warning("%s: %s; the service goes on without it", self.device, error)
        if self.care is not None:
            loop = asyncio.get_running_loop()

            def changed() -> None:
                with contextlib.suppress(RuntimeError):  # of a loop that has ended meanwhile
                    loop.call_soon_threadsafe(self._tell_status)

            self.care.on_change = changed
        topics = self._topics
        if (policy := self._policy) is not None:
            await self._told(lambda audit: audit.policy(policy.current.facts()))
        if (unfinished := self._session.unfinished) is not None:
            log.info(
                "%s: round %d: its upload may not have arrived; it is sent again when asked for",
                self.device, unfinished.call.message.round,
            )  # fmt: skip
            await self._told(lambda audit: audit.resumed(unfinished))
        await self.transport.start(self._on_message, self._on_connected, self._on_disconnected)
        await self.transport.subscribe(topics.round, topics.all, topics.inbox(self.device))
        self._lasting = [self._spawn(self._tasks, work) for work in (self._work(), self._send())]
        self._spawn(self._tasks, self._say_online())
        if self.give_back is not None:
            self._spawn(self._tasks, self._rest(self.give_back))
        if (home := self.home) is not None:
            self._session.told, home.on_kept = home.heard, self._tired.set
            self._spawn(self._tasks, home.run(self._blobs, lambda: self._session.round_id))
        if self.renewal is not None:
            self._spawn(self._tasks, self.renewal.run())
        self._tell_status()

    async def close(self, *, graceful: bool = True) -> None:
        """Stop. graceful=False: as if the plug were pulled."""
        self._stop_training.set()
        ours = asyncio.current_task()
        tasks = [task for task in (*self._tasks, *self._round_tasks) if task is not ours]
        for task in tasks:
            task.cancel()
        if graceful and self._connected:
            with contextlib.suppress(TransportError, TimeoutError):
                async with asyncio.timeout(GOODBYE_S):
                    await self.transport.publish(
                        self._topics.presence(self.device), OFFLINE, retain=True
                    )
        if self.port is not None:
            await self.port.close()
        if self.care is not None:
            await self._in_thread(self._pool, self.care.decisions.flush)
        await self.transport.stop(graceful=graceful)
        if graceful and tasks:
            # One that renews has a process to end.
            await asyncio.wait(tasks, timeout=GOODBYE_S)

    async def beat(self) -> None:
        """Returns once all that a message goes through has worked: the inbox, the worker, the thread of
        the protocol. Raises LocalProtocolError if what serves has ended."""
        if any(task.done() for task in self._lasting):
            raise LocalProtocolError("a part of the service has ended")
        passed = asyncio.get_running_loop().create_future()
        self._inbox.put_nowait(passed)
        await passed

    def _spawn(self, group: set[asyncio.Task[None]], work: Awaitable[None]) -> asyncio.Task[None]:
        async def guarded() -> None:
            try:
                await work
            except (asyncio.CancelledError, TransportError):
                pass
            except Exception:
                log.exception("%s: a task failed; the service goes on", self.device)

        def done(task: asyncio.Task[None]) -> None:
            group.discard(task)
            if isinstance(work, Coroutine):
                work.close()  # it never ran, if the task was cancelled before its first step

        task = asyncio.ensure_future(guarded())
        group.add(task)
        task.add_done_callback(done)
        return task

    # -- the network ------------------------------------------------------------------------------

    def _on_message(self, incoming: Incoming) -> None:
        if not incoming.payload:
            return  # a retained message was cleared
        try:
            if incoming.topic.startswith(self._blob_prefix):
                self._blobs.feed(incoming.payload)
            else:
                self._hear(incoming)
        except RemoteProtocolError as error:
            log.debug("%s: dropped on %s: %s", self.device, incoming.topic, error)

    def _hear(self, incoming: Incoming) -> None:
        cost = len(incoming.payload) + _MESSAGE_OVERHEAD_BYTES
        if self._inbox_bytes + cost > MAX_INBOX_BYTES:
            if not self._flooded:
                log.warning("%s: flooded on %s; dropping messages", self.device, incoming.topic)
            self._flooded = True
            return
        self._inbox_bytes += cost
        self._inbox.put_nowait(incoming)

    async def _on_connected(self) -> None:
        self._connected = True
        log.info("%s: connected", self.device)
        self._here.set()
        self._tell_status()

    async def _say_online(self) -> None:
        """After each connection, but never more than once at a time, however often it breaks."""
        while True:
            await self._here.wait()
            self._here.clear()
            await self.transport.publish(self._topics.presence(self.device), ONLINE, retain=True)

    async def _rest(self, give_back: Callable[[str], None]) -> None:
        """Some time after the start and after each round, if there is no other by then."""
        library = ""
        while True:
            await asyncio.sleep(REST_AFTER_S)
            if self._session.round_id is None and not self._training.locked():
                self.preparation.rest(model=self._cache is not None)
                await self._in_thread(self._pool, lambda library=library: give_back(library))  # type: ignore[misc]
                library = ENGINE
            await self._tired.wait()
            self._tired.clear()

    def _on_disconnected(self, reason: str) -> None:
        self._connected = False
        log.warning("%s: %s", self.device, reason)
        self._tell_status()

    @property
    def status_line(self) -> str:
        """What this device is at, for its owner."""
        where = "" if self._connected else "not connected to the broker; "
        round_id = self._session.round_id
        if round_id is None:
            return f"{where}waiting for a round"
        if self.care is not None and (why := self.care.paused) and self._training.locked():
            return f"{where}round {round_id}: training paused: {why}"
        return f"{where}round {round_id}: {self._session.phase.value}"

    async def facts(self) -> dict[str, Any]:
        """All there is to know of this device now, as JSON can hold it: for its owner."""
        facts: dict[str, Any] = {
            "device": str(self.device),
            "fleet": self._fleet,
            "running": True,
            "since_unix": self._since_unix,
            "connected": self._connected,
            "line": self.status_line,
            "phase": self._session.phase.value,
            "round": self._session.round_id,
            "last": self._last,
            **self._counts,
        }
        if (care := self.care) is not None:
            training = self._training.locked()
            # Not among the protocol's threads: a sensor may take its time, and so may the protocol.
            facts["host"] = await asyncio.to_thread(lambda: care.facts(training=training))
        return facts

    async def decisions(self) -> list[dict[str, Any]]:
        """What was decided and why, the oldest first."""
        found = [] if self.care is None else self.care.decisions.all()
        return [dict(msgspec.to_builtins(decision)) for decision in found]

    async def _decided(self, ended: Ended) -> None:
        """Keep for the owner how a round ended for this device."""
        self._counts["contributed"] += ended.contributed
        self._last = {
            "round": ended.round_id,
            "outcome": for_display(ended.outcome),
            "contributed": ended.contributed,
            "at_unix": time.time(),
        }
        if (care := self.care) is None:
            return
        told = {d.what for d in care.decisions.all() if d.round == ended.round_id}
        what, why = "was not in the sum", ended.outcome
        if ended.contributed:
            what, why = "took part", "its update is in the sum"
        elif told - {"paused", "resumed", "ended early"}:
            return  # why, was said when it was decided
        elif why.startswith("declined: "):
            what, why = "declined", why.removeprefix("declined: ")
        await self._in_thread(self._pool, lambda: care.decisions.add(what, why, ended.round_id))

    async def _refused(self, round_id: int, what: str, problem: str) -> None:
        self._trouble(round_id, problem)
        if (care := self.care) is not None:
            await self._in_thread(self._pool, lambda: care.decisions.add(what, problem, round_id))

    def _tell_status(self) -> None:
        line = self.status_line
        if line != self._status:
            self._status = line
            self.on_status(line)

    async def _ask(self, digest: bytes, ranges: Ranges) -> None:
        want = WantBlob(fleet=self._fleet, device=self.device, blob=digest, ranges=ranges)
        signed = wire.sign(want, self._identity)
        if self._audit is not None:
            self._audit.requested(len(signed.envelope))
        await self.transport.publish(self._topics.outbox(self.device), signed.envelope)

    # -- the session ------------------------------------------------------------------------------

    async def _work(self) -> None:
        while True:
            incoming = await self._inbox.get()
            if isinstance(incoming, asyncio.Future):
                await self._do(list)
                if not incoming.done():  # nobody waits for it any more
                    incoming.set_result(None)
                continue
            data = incoming.payload
            self._inbox_bytes -= len(data) + _MESSAGE_OVERHEAD_BYTES
            self._flooded = self._flooded and bool(self._inbox_bytes)
            try:
                if data[1:2] == _CALL:
                    self._late = incoming.retained
                    await self.reload_policy()
                await self._do(lambda data=data: self._session.receive(data))  # type: ignore[misc]
            except RemoteProtocolError as error:
                log.debug("%s: refused a message: %s", self.device, error)
            except Exception:
                # A bug of ours must not end the service: the worker is what everything waits for.
                log.exception("%s: a message failed; the service goes on", self.device)

    async def _do(self, step: Callable[[], list[Action]]) -> None:
        """Run a step of the session in a thread, one at a time, and carry its actions out."""
        async with self._lock:
            actions = await self._in_thread(self._pool, step)
            self._tell_status()
            self._announce(actions)
            for position, action in enumerate(actions):
                try:
                    await self._record(action)
                    await self.perform(action)
                except StorageError as error:
                    # What could not be saved must not be acted on: the rest of the list is dropped.
                    log.error("%s: %s", self.device, error)
                    await self._give_up(actions[position + 1 :], error.public)
                    return

    async def _give_up(self, dropped: list[Action], reason: str) -> None:
        round_id = self._session.round_id
        if round_id is not None:
            for action in self._session.leave(round_id, reason):
                if not isinstance(action, Save):
                    await self._record(action)
                    await self.perform(action)
        log.debug("%s: dropped %d actions", self.device, len(dropped))

    async def reload_policy(self, *, anyway: bool = False) -> None:
        """Read the owner's policy again if it changed, or `anyway`; it holds from the next round on."""
        if self._policy is None:
            return
        policy = self._policy
        try:
            if not await self._in_thread(self._pool, lambda: policy.refresh(anyway=anyway)):
                return
        except ConfigError as error:
            log.error("%s: %s; the policy stays as it was", self.device, error)
            return
        log.info("%s: %s was read again", self.device, policy.path)
        self._session.policy = policy.current.policy
        self.on_policy(policy.current)
        await self._told(lambda audit: audit.policy(policy.current.facts()))

    async def recertify(self, certificate: bytes) -> None:
        """Take part with this identity certificate from the next round on."""

        def step() -> list[Action]:
            self._session.certificate = certificate
            return []

        await self._do(step)

    # -- the owner's record -----------------------------------------------------------------------

    def _announce(self, actions: list[Action]) -> None:
        """A refusal comes before the end of its round, which knows what was called."""
        if self._audit is not None:
            for action in actions:
                if isinstance(action, Ended) and action.call is not None:
                    self._audit.refusing(action.call)

    async def _record(self, action: Action) -> None:
        """Write down what is about to be done. Raises StorageError: then it must not be done."""
        audit = self._audit
        if audit is None:
            return
        match action:
            case Publish(message) if isinstance(message.message, Decline):
                # Leaving a round is what is left to do when nothing can be written any more.
                await self._told(lambda audit: audit.leaving(message))
            case Publish(message):
                await self._in_thread(self._pool, lambda: audit.leaving(message))
            case Fetch(call):
                audit.called(call)
            case Train(_, head):
                audit.cohort(head)
            case Ended(round_id, outcome, contributed):
                await self._told(
                    lambda audit: audit.ended(round_id, outcome, contributed=contributed)
                )

    async def _told(self, entry: Callable[[Audit], None]) -> None:
        """Write down what cannot be undone or must be done anyway."""
        audit = self._audit
        if audit is not None:
            try:
                await self._in_thread(self._pool, lambda: entry(audit))
            except StorageError as error:
                log.error("%s: %s", self.device, error)

    def _trouble(self, round_id: int, problem: str) -> None:
        if self._audit is not None:
            self._audit.trouble(round_id, problem)

    @staticmethod
    async def _in_thread(pool: Executor | None, step: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(pool, step)

    async def perform(self, action: Action) -> None:
        """Carry one action out. A simulation overrides this to make things go wrong."""
        match action:
            case Publish() | Upload():
                if self._outbox.qsize() < MAX_OUTBOX:
                    self._outbox.put_nowait(action)
                else:
                    log.debug("%s: too much waits to be sent; dropped an answer", self.device)
            case Save(memory):
                if self._memory is not None:
                    await self._stored(lambda: self._memory_file().save(memory))
            case Keep(unfinished):
                await self._keep(unfinished)
            case Forget():
                if (memory_file := self._memory) is not None:
                    await self._in_thread(self._pool, memory_file.forget)
            case Fetch(call):
                self._counts["called"] += 1
                # What an earlier round still fetched or uploaded is of no use any more.
                self._stop_training.set()
                for task in self._round_tasks:
                    task.cancel()
                self._uploads.clear()
                self._spawn(self._round_tasks, self._fetch(call, self._spread_s(call)))
            case Hurry():
                self._blobs.hurry()
            case Pace(seconds):
                self.transport.reconnect_within(seconds)
            case Train(round_id, head):
                self.present.told(head.issued_unix)
                if self.renewal is not None:
                    self.renewal.told(head.issued_unix)
                self._stop_training.set()
                stop = self._stop_training = threading.Event()
                log.info("%s: round %d: training", self.device, round_id)
                self._spawn(self._tasks, self._train(round_id, head, stop))
            case StopTraining():
                self._stop_training.set()
            case Renew(issued_unix):
                if self.renewal is not None:
                    self.renewal.seen(issued_unix)
                    self.renewal.wanted()
            case Ended():
                self._tired.set()
                if self.home is not None:
                    self.home.ended(action.round_id)
                log.info("%s: round %d: %s", self.device, action.round_id, action.outcome)
                await self._decided(action)
                self.on_ended(action)

    async def _keep(self, unfinished: Unfinished) -> None:
        memory = self._memory
        if memory is not None:
            try:
                await self._stored(lambda: memory.keep(unfinished))
            except StorageError as error:
                log.warning(
                    "%s: %s; the update is sent all the same, and would not survive a restart",
                    self.device, error,
                )  # fmt: skip

    async def _stored(self, write: Callable[[], None]) -> None:
        """Write something that matters; on a full disk the cache gives way to it. Raises StorageError."""
        try:
            await self._in_thread(self._pool, write)
        except StorageError as error:
            cause, cache = error.__cause__, self._cache
            full = isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT)
            if not full or cache is None or not await self._in_thread(self._pool, cache.clear):
                raise
            log.warning("%s: %s; the cache was emptied for it", self.device, error)
            await self._in_thread(self._pool, write)

    def _memory_file(self) -> MemoryFile:
        if self._memory is None:
            raise LocalProtocolError("this device has no state directory")
        return self._memory

    async def _send(self) -> None:
        while True:
            action = await self._outbox.get()
            try:
                if isinstance(action, Publish):
                    await self.send(action.message)
                else:
                    size = self._uploads.want(action.payload, action.ranges)
                    if self._audit is not None and action.ranges is not None:
                        self._audit.sent_again(size)
                    # Beside the sender: a long upload must not hold up votes and reveals.
                    self._spawn(self._round_tasks, self._uploads.send())
            except TransportError:
                raise
            except Exception:
                log.exception("%s: cannot send; the service goes on", self.device)

    async def _send_frame(self, frame: bytes) -> None:
        await self.transport.publish(self._topics.upload(self.device), frame)

    async def send(self, message: Signed[Message]) -> None:
        """Publish one signed message; returns when the broker has it."""
        await self.transport.publish(self._topics.outbox(self.device), message.envelope)

    # -- plan, model, training --------------------------------------------------------------------

    def _spread_s(self, call: RoundCall) -> float:
        """How long to wait, so that the fleet does not fetch and check in at one moment.

        Half of the gathering is left for that, whatever the call says. Who comes upon a call that was
        made before does not know how much of the gathering is left, and did not come with the others.
        """
        window_s = 0.0 if self._late else min(call.spread_s, call.gather_s / 2)
        return window_s * uniform(self._rng) if window_s > 0 else 0.0

    async def _fetch(self, call: RoundCall, wait_s: float) -> None:
        if wait_s > 0:
            await asyncio.sleep(wait_s)
        if (care := self.care) is not None:
            verdict = await self._in_thread(self._pool, lambda: care.called(call.round))
            if verdict.state is not State.GO:
                log.info("%s: round %d: not now: %s", self.device, call.round, verdict.line)
                self._trouble(call.round, verdict.line)
                await self._do(lambda: self._session.leave(call.round, verdict.public))
                return
        try:
            header = await self.preparation.fetch(call)
        except CoveyError as error:
            log.warning("%s: round %d: %s", self.device, call.round, error)
            await self._refused(call.round, "declined", str(error))
            reason = error.public
            await self._do(lambda: self._session.leave(call.round, reason))
            return
        except Exception as error:
            # A data source is the owner's own code: whatever it does costs this round and no more.
            await self._refused(call.round, "declined", f"{type(error).__name__}: {error}")
            log.exception("%s: round %d: cannot prepare", self.device, call.round)
            reason = CoveyError.public
            await self._do(lambda: self._session.leave(call.round, reason))
            return
        if self._audit is not None:
            self._audit.prepared(call.round, header.name)
        prepared = Prepared(header.n_params, len(header.hyperparameters), len(METRICS))
        await self._do(lambda: self._session.ready(call.round, prepared))

    async def _train(self, round_id: int, head: Head, stop: threading.Event) -> None:
        preparation, care = self.preparation, self.care
        gate = None if care is None else care.gate(round_id)
        try:
            async with self._training:  # one at a time: an earlier round's may be stopping still
                result = await self._in_thread(
                    self._train_pool,
                    tamed(lambda: preparation.train(head, stop.is_set, gate or OPEN)),
                )
            self._tell_status()
            self._counts["batches"] += result.batches
            if result.stopped_by == "host":
                preparation.plan = None  # what it holds of memory may be why
            if care is not None:
                costs = await self._in_thread(self._train_pool, care.may_upload)
                if costs.state is not State.GO:
                    raise TrainingError(f"the update stays here: {costs.line}", public=costs.public)
            log.info(
                "%s: round %d: trained %d batches in %.1f s (ended by %s)",
                self.device, round_id, result.batches, result.seconds, result.stopped_by,
            )  # fmt: skip
            metrics = (min(result.loss, head.metric_clips[0]),)
            await self._do(
                lambda: self._session.trained(round_id, result.delta, result.examples, metrics)
            )
            return
        except (CoveyError, MemoryError) as error:
            problem = str(error) or "out of memory"
            log.warning("%s: round %d: %s", self.device, round_id, problem)
            await self._refused(round_id, "gave no update", problem)
            reason = error.public if isinstance(error, CoveyError) else OUT_OF_MEMORY
            unfit = gate is not None and gate.ended is not None
            if isinstance(error, DataError) or reason == OUT_OF_MEMORY or unfit:
                # The source is opened anew, as its files may have changed; what a plan holds of memory
                # is given back.
                preparation.plan = None
        except Exception as error:
            await self._refused(round_id, "gave no update", f"{type(error).__name__}: {error}")
            log.exception("%s: round %d: cannot train", self.device, round_id)
            reason = CoveyError.public
        self._tell_status()
        await self._do(lambda: self._session.training_failed(round_id, reason))
