"""Bugs to plant, to see that a simulation would find such: each takes one precaution out of the code.

`python -m simulation --bugs` says how many seeds each lived through.
"""

import asyncio
import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import msgspec

from covey_coordinator import files, journal, spool, transcript
from covey_coordinator import round as coordinator_round
from covey_coordinator.journal import Added, Entered
from covey_coordinator.round import Phase, Round
from covey_coordinator.round_play import RoundPlay
from covey_coordinator.run import Run
from covey_coordinator.service import CoordinatorService
from covey_coordinator.spool import FileSink
from covey_coordinator.store import Store, directory
from covey_device import keystore
from covey_device.audit import AuditLog
from covey_device.keystore import MemoryFile
from covey_device.service import DeviceService
from covey_device.session import Memory, Publish, Save, Session
from covey_device.unfinished import Unfinished
from covey_shared import wire
from covey_shared.errors import StorageError
from covey_shared.messages import CheckIn, Manifest, RosterVote, ViewProposal
from covey_shared.secagg.aggregator import Aggregator
from covey_shared.secagg.participant import Participant
from covey_shared.wire import Signed
from simulation.loop import RUNNING

Bug = Callable[[], contextlib.AbstractContextManager[Any]]


def _patched(owner: Any, name: str, ours: Any) -> Bug:
    return lambda: mock.patch.object(owner, name, ours)


# -- devices ---------------------------------------------------------------------------------------


def _never_saves() -> Any:
    return mock.patch.object(MemoryFile, "save", return_value=None)


def _sends_first() -> Any:
    real = Session.ready

    def ready(self: Session, *args: Any) -> Any:
        return sorted(real(self, *args), key=lambda action: isinstance(action, Save))

    return mock.patch.object(Session, "ready", ready)


def _goes_on_without_a_disk() -> Any:
    """As if what could not be saved were: the rest of the actions is carried out."""
    real = DeviceService.perform

    async def perform(self: DeviceService, action: Any) -> None:
        with contextlib.suppress(keystore.StorageError):
            await real(self, action)

    return mock.patch.object(DeviceService, "perform", perform)


def _forgets_the_last_round() -> Any:
    real = MemoryFile.load

    def load(self: MemoryFile) -> Memory:
        kept = real(self)
        return Memory(kept.last_round and kept.last_round - 1, kept.contributed)

    return mock.patch.object(MemoryFile, "load", load)


def _forgets_last_round_quietly() -> Any:
    """Kept, but not asked: a call of a round that an earlier process was in is followed."""
    real = Session.__init__

    def init(self: Session, *args: Any, **rest: Any) -> None:
        real(self, *args, **rest)
        self._memory = Memory(0, self._memory.contributed)
        self._cut_off = 0

    return mock.patch.object(Session, "__init__", init)


def _masks_anew() -> Any:
    """Asked for its update again, it trains and masks it again."""
    real = Participant.mask

    def mask(self: Participant, ring: Any) -> Any:
        kept = self._b, self._s, self._mask_key
        again = ring.copy()
        result = real(self, ring)
        self._b, self._s, self._mask_key = kept
        self._masked = False
        self.again = again  # type: ignore[attr-defined]
        return result

    def want(self: Session, current: Any, message: Any) -> Any:
        ring = current.participant.again.copy()
        ring += 1
        signed, _ = current.participant.mask(ring)
        return [Publish(signed)]

    @contextlib.contextmanager
    def planted() -> Iterator[None]:
        # A slotless class: what it kept beside is dropped with it.
        with (
            mock.patch.object(Participant, "mask", mask),
            mock.patch.object(Session, "_want_upload", want),
        ):
            yield

    return planted()


def _no_answer_twice() -> Any:
    """Answers are not kept: what comes again is handled again."""
    real = Session.receive

    def receive(self: Session, data: bytes) -> Any:
        if self._round is not None:
            self._round.answered.clear()
        return real(self, data)

    return mock.patch.object(Session, "receive", receive)


def _no_sync_on_devices() -> Any:
    real = keystore.write_durably

    def write_durably(path: Any, data: bytes) -> None:
        with mock.patch.object(os, "fsync", return_value=None):
            real(path, data)

    return mock.patch.object(keystore, "write_durably", write_durably)


def _record_unsynced() -> Any:
    real = AuditLog.append

    def append(self: AuditLog, kind: str, facts: Any, *, durable: bool = False) -> None:
        real(self, kind, facts, durable=False)

    return mock.patch.object(AuditLog, "append", append)


def _acts_on_the_unsynced() -> Any:
    """What an earlier process was killed in the middle of writing, a power cut may still take back."""
    return mock.patch.object(keystore, "sync_names", return_value=None)


def keeps_no_upload() -> Any:
    """A restart in the middle of an upload is the end of it: breaks nothing, and costs updates."""
    return mock.patch.object(MemoryFile, "keep", return_value=None)


def _uploads_another() -> Any:
    """After a restart the payload is not the one that was begun, though its message is."""
    real = MemoryFile.unfinished

    def load(self: MemoryFile, *args: Any) -> Any:
        found = real(self, *args)
        return found and dataclasses.replace(found, payload=found.payload[::-1])

    return mock.patch.object(MemoryFile, "unfinished", load)


def _finishes_what_never_began() -> Any:
    """An upload is gone on with though it is not remembered as a contribution."""
    return mock.patch.object(Unfinished, "stands", return_value=True)


# -- the coordinator -------------------------------------------------------------------------------


def _no_sync() -> Any:
    real = files.write_atomic

    def write_atomic(path: Any, data: bytes, **rest: Any) -> None:
        real(path, data, **{**rest, "durable": False})

    @contextlib.contextmanager
    def planted() -> Iterator[None]:
        with (
            mock.patch.object(files, "write_atomic", write_atomic),
            mock.patch.object(directory, "write_atomic", write_atomic),
        ):
            yield

    return planted()


def _commits_unsynced() -> Any:
    real = Store._writing

    def writing(self: Store, durable: bool = True) -> Any:
        return real(self, durable=False)

    return mock.patch.object(Store, "_writing", writing)


def _counts_in_memory() -> Any:
    """Round numbers begin anew with each process."""

    def next_round(self: Store) -> int:
        self.last = getattr(self, "last", 0) + 1  # type: ignore[attr-defined]
        return int(self.last)  # type: ignore[attr-defined]

    return mock.patch.object(Store, "next_round", next_round)


def _uploads_unnoted() -> Any:
    return mock.patch.object(Store, "uploads_begin", return_value=None)


def _ends_in_two_steps() -> Any:
    """A round's end is not one transaction."""
    real = Store.finish_round

    def finish_round(self: Store, name: str, state: Any, attendance: Any = None) -> None:
        self.save_run(name, state)
        real(self, name, state, attendance)

    return mock.patch.object(Store, "finish_round", finish_round)


def _publishes_first() -> Any:
    """What follows from a message is sent before the message is written down."""

    async def step(self: RoundPlay, step: Callable[[], Any]) -> None:
        actions = await self._hands.in_thread(step)
        await self._carry_out(actions)
        await self._write_down()

    return mock.patch.object(RoundPlay, "_step", step)


def _forgets(*kinds: Any) -> Bug:
    """Entries of these kinds are not in the journal."""
    real, messages = Store.journal, tuple(kind for kind in kinds if isinstance(kind, type))

    def write(self: Store, entries: Any, **rest: Any) -> None:
        kept = []
        for data in entries:
            entry = journal.decode(data)
            if not isinstance(getattr(entry, "message", entry), messages) and entry not in kinds:
                kept.append(data)
        real(self, kept, **rest)

    return lambda: mock.patch.object(Store, "journal", write)


def _another_manifest() -> Any:
    """Taken up again, a round has a manifest of that moment."""
    real = journal.decode

    def decode(data: bytes) -> Any:
        entry = real(data)
        if isinstance(entry, Signed) and isinstance(entry.message, Manifest):
            head = entry.message.head
            head = msgspec.structs.replace(head, issued_unix=head.issued_unix + 1)
            process = RUNNING.get()
            assert process is not None
            key = process.key
            return wire.sign(Manifest(head, entry.message.check_ins), key)
        return entry

    return mock.patch.object(journal, "decode", decode)


def _another_reveal_key() -> Any:
    real = Store.opened

    def opened(self: Store) -> Any:
        found = real(self)
        return found and dataclasses.replace(found, reveal_secret=bytes(range(32)))

    return mock.patch.object(Store, "opened", opened)


def _adds_twice() -> Any:
    """An update of before the restart is in the sum twice."""
    real = Round._again

    def again(self: Round, entry: Any, following: Any, uploaded: Any, now: float) -> Any:
        found = real(self, entry, following, uploaded, now)
        if isinstance(entry, Added):
            assert self.cohort is not None
            assert self._aggregator is not None
            index = self.cohort.index_of(entry.device)
            self._aggregator._added.discard(index)
            self._aggregator.add(index, uploaded(entry.device))
        return found

    return mock.patch.object(Round, "_again", again)


def _spool_unsynced() -> Any:
    return mock.patch.object(FileSink, "sync", return_value=None)


def _spool_unnamed() -> Any:
    """An upload is synced, and its name is not."""
    return mock.patch.object(spool, "sync_directory", return_value=None)


def _model_unsynced() -> Any:
    """The model beside a transcript, without which nobody can check the average."""
    real = transcript.write_atomic

    def write_atomic(path: Any, data: bytes, **rest: Any) -> None:
        real(path, data, **{**rest, "durable": False})

    return mock.patch.object(transcript, "write_atomic", write_atomic)


def begins_anew() -> Any:
    """An open round is not taken up again. Costs the rounds that a death interrupts."""
    real = CoordinatorService._opened

    async def opened(self: CoordinatorService, run: Run) -> Any:
        await self.stored(self.store.forget_round)
        return await real(self, run)

    return mock.patch.object(CoordinatorService, "_opened", opened)


def _seals_again() -> Any:
    """A transcript that only lacks its name is given another ending."""
    return mock.patch.object(transcript, "_is_sealed", return_value=False)


def _never_settles() -> Any:
    """What a crash left half done stays so."""

    def begin(self: Run) -> None:
        self.state.status, self.state.message = "running", ""
        self.directory.save_state(self.state)

    return mock.patch.object(Run, "begin", begin)


def _state_first() -> Any:
    """The state names a model before the model is there."""
    real = Run.absorb

    def absorb(self: Run, outcome: Any) -> Any:
        found = real(self, outcome)
        if len(self._to_save) == 3:
            self._to_save[0], self._to_save[1] = self._to_save[1], self._to_save[0]
        return found

    return mock.patch.object(Run, "absorb", absorb)


def _forgets_the_dropped() -> Any:
    """Masks between survivors and those who vanished stay in the sum."""
    real = Aggregator.finish

    def finish(self: Aggregator) -> Any:
        self._roster = frozenset(self._added)
        return real(self)

    return mock.patch.object(Aggregator, "finish", finish)


def _second_view() -> Any:
    """Without enough votes for its view, it asks for another one."""
    real = Round._repeats

    def repeats(self: Round) -> Any:
        cohort = self.cohort
        if self.phase is Phase.VIEW and cohort and len(self.view) > cohort.head.n_min:
            self.view -= {max(self.view)}
            u2, u3 = cohort.bitmap(self.roster), cohort.bitmap(self.view)
            return [coordinator_round.Publish(self._said(ViewProposal(h=cohort.h, u2=u2, u3=u3)))]
        return real(self)

    return mock.patch.object(Round, "_repeats", repeats)


def never_repeats() -> Any:
    """What got lost stays lost. Costs rounds while messages get lost, and breaks nothing."""
    return mock.patch.object(Round, "_repeats", return_value=[])


def _gives_up_on_a_full_disk() -> Any:
    """A round's end that the disk refuses is not tried again."""

    async def stored(self: CoordinatorService, write: Callable[[], Any]) -> Any:
        return await self.in_thread(write)

    return mock.patch.object(CoordinatorService, "stored", stored)


def _ignores_a_full_disk() -> Any:
    """What the disk refused is taken for written."""
    real = Store.journal

    def write(self: Store, entries: Any, **rest: Any) -> None:
        with contextlib.suppress(StorageError):
            real(self, entries, **rest)

    return mock.patch.object(Store, "journal", write)


def _waits_unheard() -> Any:
    """A phase's time runs while there is nobody to be heard by."""
    real = CoordinatorService.play

    async def play(self: CoordinatorService, *args: Any, **rest: Any) -> Any:
        connected, self.connected = self.connected, asyncio.Event()
        self.connected.set()
        try:
            return await real(self, *args, **rest)
        finally:
            self.connected = connected

    @contextlib.contextmanager
    def planted() -> Iterator[None]:
        with (
            mock.patch.object(CoordinatorService, "play", play),
            mock.patch.object(Round, "sent", return_value=None),
        ):
            yield

    return planted()


BUGS: dict[str, Bug] = {
    "a device never saves": _never_saves,
    "a device checks in before it saves": _sends_first,
    "a device acts on what it could not save": _goes_on_without_a_disk,
    "a device loads an older memory": _forgets_the_last_round,
    "a device follows a round it was in": _forgets_last_round_quietly,
    "a device masks again when asked again": _masks_anew,
    "a device does not know what it answered": _no_answer_twice,
    "a device does not sync": _no_sync_on_devices,
    "a device does not sync its record": _record_unsynced,
    "a device acts on what was not synced": _acts_on_the_unsynced,
    "a device goes on with another upload": _uploads_another,
    "a device goes on with an upload that never began": _finishes_what_never_began,
    "the coordinator does not sync": _no_sync,
    "the coordinator counts rounds in memory": _counts_in_memory,
    "the coordinator does not note that uploads begin": _uploads_unnoted,
    "the coordinator does not sync its database": _commits_unsynced,
    "the coordinator does not sync its spool": _spool_unsynced,
    "the coordinator does not sync names in its spool": _spool_unnamed,
    "the coordinator does not sync the model beside a transcript": _model_unsynced,
    "the coordinator ends a round in two transactions": _ends_in_two_steps,
    "the coordinator sends before it writes down": _publishes_first,
    "the coordinator takes what a full disk refused for written": _ignores_a_full_disk,
    "the coordinator forgets what it gathered": _forgets(CheckIn),
    "the coordinator forgets its manifest": _forgets(Manifest, Entered(Phase.SHARE)),
    "the coordinator forgets votes": _forgets(RosterVote),
    "the coordinator forgets its view": _forgets(ViewProposal, Entered(Phase.VIEW)),
    "the coordinator takes a round up with another manifest": _another_manifest,
    "the coordinator takes a round up with another reveal key": _another_reveal_key,
    "the coordinator adds an update again": _adds_twice,
    "the coordinator seals a transcript again": _seals_again,
    "the coordinator does not settle its files": _never_settles,
    "the coordinator names a model before it is there": _state_first,
    "the coordinator proposes a second view": _second_view,
    "the coordinator leaves masks of the dropped": _forgets_the_dropped,
    "the coordinator gives up on a full disk": _gives_up_on_a_full_disk,
    "the coordinator waits while it cannot be heard": _waits_unheard,
}

_K, _P = ("coordinator-kill",), ("coordinator-power-cut",)
AMONG: dict[str, tuple[str, ...]] = {
    "a device never saves": ("kill",),
    "a device acts on what it could not save": ("kill", "disk"),
    "a device loads an older memory": ("kill",),
    "a device follows a round it was in": ("kill",),
    "a device does not sync": ("power-cut",),
    "a device does not sync its record": ("power-cut",),
    "a device acts on what was not synced": ("kill", "power-cut"),
    "a device goes on with another upload": ("kill",),
    "a device goes on with an upload that never began": ("kill",),
    "the coordinator does not sync": _P,
    "the coordinator does not sync its database": _P,
    "the coordinator does not sync its spool": _P,
    "the coordinator does not sync names in its spool": _P,
    "the coordinator does not sync the model beside a transcript": _P,
    "the coordinator counts rounds in memory": _K,
    "the coordinator ends a round in two transactions": _K,
    "the coordinator sends before it writes down": _K,
    "the coordinator takes what a full disk refused for written": (*_K, "coordinator-disk"),
    "the coordinator forgets what it gathered": _K,
    "the coordinator forgets its manifest": _K,
    "the coordinator forgets votes": _K,
    "the coordinator forgets its view": _K,
    "the coordinator takes a round up with another manifest": _K,
    "the coordinator takes a round up with another reveal key": _K,
    "the coordinator adds an update again": _K,
    "the coordinator seals a transcript again": _K,
    "the coordinator does not settle its files": _K,
    "the coordinator names a model before it is there": _K,
    "the coordinator gives up on a full disk": ("coordinator-disk",),
}
"""The kinds of faults that bring a bug out; of others, those that a seed has."""
