"""The model at home: after each round, what the fleet has learned, as a file for this device's own use.

Which model that is, the coordinator says in two messages that it signs, and nobody else can: a call names a
plan and the model that a round begins with; the round's result names the model that it led to. Both reach
every device that is connected, chosen for the round or not. The model itself and the plan's graph for
inference are fetched by their hashes, put together in a child process (`export`) and kept (`files`); then
the owner's hook is run. All of it is beside the rounds: they never wait for it, and it never fails one.

Rounds are counted upwards over the whole fleet, so an old call or result that a broker plays back is seen to
be old: nothing before the newest model that was kept here is taken.

Nothing leaves the device but requests for blobs, which tell that it wants the model, as everybody does.
"""

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import msgspec

from covey_device.blobs import BlobFetcher
from covey_device.home.export import UnfitError, exported
from covey_device.home.files import (
    CURRENT,
    PREVIOUS,
    ModelDirectory,
    Sidecar,
    Vouched,
    belong,
    check_model,
    sidecar_of,
    vouched,
)
from covey_device.home.hook import run_hook
from covey_device.policy import Policy
from covey_shared.errors import (
    CoveyError,
    MalformedError,
    RemoteProtocolError,
    StorageError,
    TransportError,
)
from covey_shared.keys import Rng, SigningKey, uniform
from covey_shared.messages import DeviceId, Message, Result, RoundAbandoned, RoundCall
from covey_shared.plan import (
    MAX_GRAPH_BYTES,
    MAX_HEADER_BYTES,
    PlanHeader,
    decode_header,
    plan_hash,
)
from covey_shared.secagg.cohort import Trust
from covey_shared.wire import Signed

log = logging.getLogger("covey.device")

SETTLE_S = 2.0
"""How long after a call it is clear whether this device takes part."""

MAX_SPREAD_S = 600.0
RETRY_S = 60.0
MAX_RETRY_S = 3600.0
LOOK_S = 30.0
"""How often is looked whether a round is over whose end nobody told."""

WANTED = "wanted"
HOOKED = "hooked"


_Stock = tuple[tuple[int, bool], tuple[bytes, bytes] | None, list[Vouched]]
"""The newest model that was kept; plan and model of the current one; models that may be wanted."""


class Room(Protocol):
    """What a child may take, of what the owner allows: asked each time."""

    def __call__(self) -> tuple[int, float]:
        """Resident bytes, seconds."""


class _WantedFile(msgspec.Struct, forbid_unknown_fields=True):
    """What was to be fetched when the power went."""

    round_call: bytes
    result: bytes | None


class Home:
    """One device's. policy: the owner's, as it is now. room: see there. hook: the owner's command, run for
    hook_seconds at most."""

    def __init__(
        self,
        directory: ModelDirectory,
        trust: Trust,
        device: DeviceId,
        identity: SigningKey,
        *,
        policy: Callable[[], Policy],
        room: Room,
        rng: Rng,
        hook: tuple[str, ...] = (),
        hook_seconds: float = 60.0,
        unix: Callable[[], float] = time.time,
    ) -> None:
        self._directory = directory
        self._trust, self._device, self._identity = trust, device, identity
        self._policy, self._room, self._rng, self._unix = policy, room, rng, unix
        self._hook, self._hook_seconds = hook, hook_seconds
        self._call: Signed[RoundCall] | None = None
        self._over = False  # the last call's round has ended, as far as this device knows
        self._wanted: Vouched | None = None
        self._later: Vouched | None = None  # of a call that came before a result's model was here
        self._due = 0.0
        self._retry_s = RETRY_S
        self._kept: tuple[int, bool] = (0, False)
        self._current: tuple[bytes, bytes] | None = None  # plan and model
        self._news = asyncio.Event()
        self._new = asyncio.Event()  # a model for the hook
        self._loop: asyncio.AbstractEventLoop | None = None
        self.on_kept: Callable[[], None] = lambda: None
        """Told when a model was kept."""

    # -- what is heard ----------------------------------------------------------------------------

    def heard(self, signed: Signed[Message]) -> None:
        """A message that the coordinator signed, in any thread."""
        if isinstance(signed.message, RoundCall | Result | RoundAbandoned) and self._loop:
            self._loop.call_soon_threadsafe(self._take, signed)

    def ended(self, round_id: int) -> None:
        """This device's part in a round is over, in whatever way."""
        if self._call is not None and self._call.message.round == round_id:
            self._over = True
            self._news.set()

    def _take(self, signed: Signed[Message]) -> None:
        message, call = signed.message, self._call
        if isinstance(message, RoundCall):
            if message.fleet != self._trust.fleet or (call and message.round <= call.message.round):
                return
            if (objection := self._policy().plan_objection(message)) is not None:
                log.debug("%s: its model is not kept: %s", self._device, objection)
                return
            self._call, self._over = Signed(message, signed.envelope), False
            source, wanted = Vouched(self._call), self._wanted
            if wanted is None or wanted.result is None:
                self._want(source, SETTLE_S)
            elif (message.plan, message.model) != (wanted.call.message.plan, wanted.model):
                self._later = source
        elif isinstance(message, RoundAbandoned):
            if call and (message.run, message.round) == (call.message.run, call.message.round):
                self._over = True
                self._news.set()
        elif isinstance(message, Result) and call and belong(call.message, message):
            self._over = True
            spread_s = min(call.message.spread_s, MAX_SPREAD_S)
            wait_s = spread_s * uniform(self._rng) if spread_s > 0 else 0.0
            self._want(Vouched(call, Signed(message, signed.envelope)), wait_s)

    def _want(self, source: Vouched, wait_s: float) -> None:
        if source.key <= max(self._kept, self._wanted_key) or self._loop is None:
            return
        self._wanted, self._later, self._retry_s = source, None, RETRY_S
        self._due = self._loop.time() + wait_s
        self._news.set()

    # -- what is done -----------------------------------------------------------------------------

    async def run(self, blobs: BlobFetcher, round_id: Callable[[], int | None]) -> None:
        """For as long as the service lives. round_id: the round that the session is in."""
        self._loop = loop = asyncio.get_running_loop()
        try:
            self._kept, self._current, candidates = await asyncio.to_thread(self._take_stock)
        except StorageError as error:
            log.warning("%s: %s", self._device, error)
            candidates = []
        if self._wanted is not None:  # heard meanwhile
            candidates.append(self._wanted)
        newest = max(candidates, key=lambda source: source.key, default=None)
        self._wanted = newest if newest is not None and newest.key > self._kept else None
        hooks = asyncio.create_task(self._run_hooks()) if self._hook else None
        written: Vouched | None = None
        try:
            while True:
                self._news.clear()
                if (wanted := self._wanted) is None:
                    await self._news.wait()
                    continue
                if wanted.result is not None and wanted is not written:
                    written = wanted
                    await asyncio.to_thread(self._remember, wanted)
                wait_s = self._due - loop.time()
                if wait_s <= 0 and wanted.result is None and self._under_way(wanted, round_id()):
                    # Its result, if there is one, names the model that is wanted then.
                    wait_s = LOOK_S
                if wait_s > 0:
                    await self._news_within(wait_s)
                    continue
                await self._try(wanted, blobs)
        finally:
            if hooks is not None:
                hooks.cancel()

    async def _news_within(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._news.wait()
        except TimeoutError:
            return

    def _under_way(self, wanted: Vouched, round_id: int | None) -> bool:
        return not self._over and round_id == wanted.call.message.round

    async def _try(self, wanted: Vouched, blobs: BlobFetcher) -> None:
        """Keep a model, or have another try later."""
        what = f"{self._device}: the model of round {wanted.call.message.round}"
        try:
            await self._keep(wanted, blobs)
        except TransportError:
            raise
        except UnfitError as error:
            log.warning("%s cannot be kept: %s; the one before stays", what, error)
        except (CoveyError, MemoryError, OSError) as error:
            log.warning(
                "%s is not here yet: %s; the one before stays, and it is tried again in %.0f s",
                what, str(error) or "out of memory", self._retry_s,
            )  # fmt: skip
            self._put_off(wanted)
            return
        except Exception:
            # A bug of ours; the next model may be another matter.
            log.exception("%s cannot be kept; the one before stays", what)
            self._put_off(wanted)
            return
        self._kept = max(self._kept, wanted.key)
        if self._wanted is wanted:
            self._wanted = None
            self._go_on()
            await asyncio.to_thread(self._remember, None)

    def _put_off(self, wanted: Vouched) -> None:
        if self._wanted is wanted:
            self._due = asyncio.get_running_loop().time() + self._retry_s
            self._retry_s = min(2 * self._retry_s, MAX_RETRY_S)
            self._go_on()

    def _go_on(self) -> None:
        if self._later is not None:
            self._want(self._later, SETTLE_S)

    async def _keep(self, wanted: Vouched, blobs: BlobFetcher) -> None:
        call = wanted.call.message
        if self._current == (call.plan, wanted.model):
            return  # as after a round that was abandoned
        started = time.monotonic()
        resident_bytes, seconds = self._room()
        plan = await blobs.fetch(call.plan, call.plan_bytes, limit=MAX_HEADER_BYTES)
        header = _header(plan, call)
        if call.model_bytes > resident_bytes:
            raise UnfitError(
                f"it has {call.model_bytes / 1e6:.1f} MB, and limits.max_memory_mb leaves "
                f"{max(resident_bytes, 0) / 1e6:.0f} MB"
            )
        graph = await blobs.fetch(
            bytes.fromhex(header.infer.sha256), header.infer.size, limit=MAX_GRAPH_BYTES
        )
        parameters = await blobs.fetch(wanted.model, call.model_bytes, limit=call.model_bytes)
        # The next round asks for these, and finds them in the cache.
        graphs = [bytes.fromhex(ref.sha256) for ref in (header.train, header.infer)]
        blobs.hold((call.plan, *graphs, wanted.model))
        child = exported(plan, graph, parameters, resident_bytes=resident_bytes, seconds=seconds)
        del graph, parameters
        async with child as model:
            fd, size, shape = os.dup(model.fd), model.size, model.shape  # the thread outlives us

            def describe(onnx: str, before: str | None) -> Sidecar:
                return sidecar_of(
                    wanted, header, shape, device=self._device, onnx=onnx, size=size,
                    written_unix=int(self._unix()), before=before,
                ).signed(self._identity)  # fmt: skip

            def put() -> None:
                try:
                    name = f"{call.round:08}-{wanted.model.hex()[:12]}"
                    self._directory.put(fd, size, plan, name, describe)
                finally:
                    os.close(fd)

            await asyncio.to_thread(put)
        self._current = (call.plan, wanted.model)
        log.info(
            "%s: round %d: its model of plan %r is kept: %s (%.1f MB, %.1f s)",
            self._device, call.round, header.name, self._directory.path / f"{CURRENT}.onnx", size / 1e6,
            time.monotonic() - started,
        )  # fmt: skip
        self._new.set()
        self.on_kept()

    # -- what outlives the process ----------------------------------------------------------------

    def _take_stock(self) -> _Stock:
        """What is here, and what was wanted when the process before this one ended."""
        self._directory.settle()
        kept, current = (0, False), None
        recalled = self._recalled()
        candidates = [] if recalled is None else [recalled]
        for link in (PREVIOUS, CURRENT):
            folder, sidecar = self._directory.folder(link), self._directory.sidecar(link)
            if folder is None or sidecar is None:
                continue
            try:
                source = vouched(sidecar.round_call, sidecar.result, self._trust)
            except RemoteProtocolError:
                continue  # of another fleet, which this device was part of
            try:
                check_model(folder, sidecar)
            except StorageError as error:
                if link == CURRENT:
                    log.warning("%s: %s; it is fetched anew", self._device, error)
                    candidates.append(source)
                continue
            kept = max(kept, source.key)
            if link == CURRENT:
                current = (source.call.message.plan, source.model)
        return kept, current, candidates

    @property
    def _wanted_key(self) -> tuple[int, bool]:
        return (0, False) if self._wanted is None else self._wanted.key

    def _recalled(self) -> Vouched | None:
        if (data := self._directory.noted(WANTED)) is None:
            return None
        try:
            noted = msgspec.json.decode(data, type=_WantedFile)
            return vouched(noted.round_call, noted.result, self._trust)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, RemoteProtocolError):
            return None

    def _remember(self, wanted: Vouched | None) -> None:
        """Best effort: what is forgotten comes with the next call."""
        data = None
        if wanted is not None:
            result = None if wanted.result is None else wanted.result.envelope
            data = msgspec.json.encode(_WantedFile(wanted.call.envelope, result))
        try:
            self._directory.note(WANTED, data)
        except StorageError as error:
            log.debug("%s: %s", self._device, error)

    # -- the owner's command ----------------------------------------------------------------------

    async def _run_hooks(self) -> None:
        """For each new model, one after the other; of several that came meanwhile, for the last one. Again
        for one whose hook the power cut short."""
        self._new.set()
        while True:
            await self._new.wait()
            self._new.clear()
            folder, sidecar = await asyncio.to_thread(self._unhooked)
            if folder is None or sidecar is None:
                continue
            await run_hook(self._hook, self._hook_seconds, folder, sidecar)
            with contextlib.suppress(StorageError):
                await asyncio.to_thread(
                    lambda name=folder.name: self._directory.note(HOOKED, name.encode())  # type: ignore[misc]
                )

    def _unhooked(self) -> tuple[Path | None, Sidecar | None]:
        folder = self._directory.folder()
        if folder is None or self._directory.noted(HOOKED) == folder.name.encode():
            return None, None
        return folder, self._directory.sidecar()


def _header(data: bytes, call: RoundCall) -> PlanHeader:
    """The called plan's. Raises UnfitError."""
    try:
        if plan_hash(data) != call.plan:
            raise MalformedError("the plan's header does not match its hash")
        header = decode_header(data)
    except MalformedError as error:
        raise UnfitError(str(error)) from error
    if call.model_bytes != 4 * header.n_params:
        raise UnfitError(
            f"the called model has {call.model_bytes} bytes; the plan's has {4 * header.n_params}"
        )
    return header
