"""Writes a round's transcript while the round runs, and looks after those of earlier rounds.

Of a run's directory, these files are written here::

    rounds/00007/transcript        the round's transcript (see `covey_shared.transcript`)
    rounds/00007/model-before.bin  the model that round 7 began with, while its payloads are kept
    rounds/00007/.transcript.part  the transcript of a round that still runs
    spool/DEVICE                   a masked update on its way in, which may go into it

A transcript never costs a round: what cannot be written is given up, with a word in the log and in
the run's state, and the space it took is given back first of all when a disk is full.

Masked updates are kept only of devices in the sum, and put into the transcript only once there is a
result: of a round without one there is nothing to verify, and of a device that came too late the
members reveal the key of its pair masks.
"""

import contextlib
import logging
import os
import shutil
import threading
from collections.abc import Iterator
from io import FileIO
from pathlib import Path

from covey_coordinator.config import TranscriptsConfig
from covey_coordinator.files import storage_error, sync_directory, write_atomic
from covey_coordinator.round import Completed
from covey_coordinator.store import RunDirectory
from covey_shared import keys
from covey_shared.errors import CoveyError, MalformedError, RemoteProtocolError
from covey_shared.messages import (
    MAX_REASON_CHARS,
    CheckIn,
    Decline,
    DeviceId,
    MaskedUpdate,
    Message,
    RoundCall,
    for_display,
)
from covey_shared.secagg.cohort import Cohort, Trust
from covey_shared.transcript import (
    CHUNK_BYTES,
    MAGIC,
    About,
    Chain,
    Encoder,
    Ending,
    Kind,
    Note,
    Payload,
    Reader,
    check_seal,
    parsed,
    thinned,
)
from covey_shared.wire import Signed

log = logging.getLogger("covey.coordinator")

FILE = "transcript"
PART = ".transcript.part"
MODEL_BEFORE = "model-before.bin"
RESERVE_BYTES = 64 * 10**6
"""Space that is left to the rounds themselves: below it no masked updates are kept."""

MAX_REMARKS = 512
"""Check-ins, declines and notes of one round that are written down: anybody can decline, often."""


class RoundScribe:
    """One round's transcript, while the round runs. Its methods never raise.

    part: where it grows; None: no transcript is kept. spool: the directory of the masked updates that
    go into it; None: none will.
    """

    def __init__(self, part: Path | None, spool: Path | None, key: keys.SigningKey) -> None:
        self._part = part
        self._spool = spool
        self._key = key
        self._encoder = Encoder()
        self._file: FileIO | None = None
        self._remarks = 0
        self._announced: dict[DeviceId, bytes] = {}
        self._lock = threading.RLock()  # messages come from a worker thread, notes from the loop
        self.problem: str | None = None

    def open(self, about: About) -> None:
        """Begin the file."""
        if self._part is None:
            return
        with self._lock, self._trying():
            self._part.parent.mkdir(parents=True, exist_ok=True)
            self._part.unlink(missing_ok=True)
            fd = os.open(self._part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            self._file = FileIO(fd, "w")
            self._append(self._encoder.begin() + self._encoder.struct(Kind.ABOUT, about))

    def message(self, signed: Signed[Message]) -> None:
        """A message that counts."""
        with self._lock, self._trying():
            message = signed.message
            if isinstance(message, CheckIn | Decline) and not self._remark():
                return
            if isinstance(message, MaskedUpdate):
                self._announced[message.device] = message.payload
            self._append(self._encoder.record(Kind.MESSAGE, signed.envelope))

    def note(self, device: DeviceId, text: str) -> None:
        """What is held against a device."""
        with self._lock, self._trying():
            if self._remark():
                note = Note(device, for_display(text)[:MAX_REASON_CHARS])
                self._append(self._encoder.struct(Kind.NOTE, note))

    def _remark(self) -> bool:
        self._remarks += 1
        return self._remarks <= MAX_REMARKS

    def completed(
        self, cohort: Cohort, completed: Completed, reveal_secret: bytes, model: bytes
    ) -> None:
        """The round has its result, which is not said yet. model: the one that it began with."""
        with self._lock, self._trying():
            if self._file is None or self._part is None:
                return
            places = {cohort.index_of(device): device for device in completed.survivors}
            spool = self._with_payloads(completed)
            if spool is not None:
                write_atomic(self._part.with_name(MODEL_BEFORE), model, mode=0o600)
            self._append(self._encoder.record(Kind.KEY, reveal_secret))
            for index, device in sorted(places.items()):
                digest = self._announced[device]
                if spool is not None:
                    self._append_payload(index, spool / device, digest)
                else:
                    self._append(self._encoder.record(Kind.THINNED, bytes((index,)) + digest))
            self._end(Ending("completed", ""))

    def _with_payloads(self, completed: Completed) -> Path | None:
        """The spool, if all masked updates are there and there is room for them twice: should we die now,
        the next process makes the sum anew."""
        spool = self._spool
        if spool is None or not all((spool / d).exists() for d in completed.survivors):
            return None
        size = sum((spool / d).stat().st_size for d in completed.survivors)
        if shutil.disk_usage(spool).free <= RESERVE_BYTES + size:
            log.warning("the disk is nearly full: the transcript goes without masked updates")
            return None
        return spool

    def ended(self, reason: str) -> None:
        """The round ended without a result: none of its masked updates is kept."""
        with self._lock, self._trying():
            if self._file is not None:
                text = for_display(reason)[:MAX_REASON_CHARS]
                self._end(Ending("abandoned", text))

    def give_up(self, why: str) -> None:
        """The round needs the space, or the disk fails: no transcript of it."""
        with self._lock:
            if self._part is None or self._file is None:
                return
            self._close()
            self.problem = why
            log.error("no transcript of this round: %s", why)
            for path in (self._part, self._part.with_name(MODEL_BEFORE)):
                with contextlib.suppress(OSError):
                    path.unlink(missing_ok=True)

    def leave(self) -> None:
        """Close the file as it is, if it is open; who takes the round up again writes it anew, and
        `Scribe.recover` brings it to an end if nobody does."""
        with self._lock:
            self._close()

    @contextlib.contextmanager
    def _trying(self) -> Iterator[None]:
        """Whatever goes wrong costs the transcript, and nothing else."""
        try:
            yield
        except OSError as error:
            self.give_up(str(storage_error("write", self._part or Path(), error)))
        except CoveyError as error:
            self.give_up(str(error))

    def _append(self, data: bytes) -> None:
        if self._file is not None:
            write_all(self._file, data)

    def _append_payload(self, index: int, path: Path, digest: bytes) -> None:
        """From its file, which stays until the round is closed."""
        with path.open("rb") as payload:
            size = os.fstat(payload.fileno()).st_size
            self._append(self._encoder.payload(index, size, digest))
            while chunk := payload.read(CHUNK_BYTES):
                self._append(chunk)

    def _end(self, ending: Ending) -> None:
        if self._file is None or self._part is None:
            return
        self._append(self._encoder.struct(Kind.ENDING, ending) + self._encoder.seal(self._key))
        os.fsync(self._file.fileno())
        self._close()
        _put_in_place(self._part)

    def _close(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            with contextlib.suppress(OSError):
                file.close()


class Scribe:
    """The transcripts of one run. key: the coordinator's. Its methods never raise."""

    def __init__(
        self, run: RunDirectory, settings: TranscriptsConfig, trust: Trust, key: keys.SigningKey
    ) -> None:
        self._run = run
        self._settings = settings
        self._trust = trust
        self._key = key
        self._open = RoundScribe(None, None, key)

    def open(self, index: int, call: RoundCall, rule: str, server_lr: float) -> RoundScribe:
        """Begin the transcript of a round. index: its number within the run."""
        keep = self._settings.keep
        part = None if keep == "off" else self._run.path / "rounds" / f"{index:05}" / PART
        spool = self._run.spool if keep == "full" else None
        scribe = self._open = RoundScribe(part, spool, self._key)
        scribe.open(
            About(
                fleet=call.fleet,
                run=call.run,
                round=call.round,
                index=index,
                fleet_ca=self._trust.ca,
                coordinator=self._trust.coordinator,
                rule=rule,
                server_lr=server_lr,
            )
        )
        return scribe

    def recover(self, but: int | None = None) -> None:
        """Bring transcripts to an end whose rounds the coordinator did not see to theirs. but: the
        number within the run of one that is taken up again."""
        for part in sorted((self._run.path / "rounds").glob(f"*/{PART}")):
            if but is not None and part.parent.name == f"{but:05}":
                continue
            try:
                _recover(part, self._key)
            except (OSError, CoveyError) as error:
                log.error("%s cannot be completed: %s", part, error)

    def tidy(self) -> None:
        """Take the masked updates out of the oldest transcripts, as many as are more than wanted."""
        full = self._full()
        sizes = [_size(path.parent) for path in full]
        while full and (
            len(full) > self._settings.full_rounds or sum(sizes) > self._settings.max_mb * 10**6
        ):
            sizes.pop(0)
            self._thin(full.pop(0).parent)

    def make_room(self, why: str) -> None:
        """The disk is full: the open round's transcript is given up, older ones are thinned."""
        self._open.give_up(why)
        for path in self._full():
            self._thin(path.parent)

    def _full(self) -> list[Path]:
        """The models that stand beside transcripts with payloads, the oldest first."""
        return sorted((self._run.path / "rounds").glob(f"*/{MODEL_BEFORE}"))

    def _thin(self, directory: Path) -> None:
        try:
            thin(directory)
        except (OSError, CoveyError) as error:
            log.error("the transcript in %s keeps its masked updates: %s", directory, error)


def thin(directory: Path) -> None:
    """Take the payloads out of a round's transcript, and the model away from its side.

    Raises OSError, MalformedError.
    """
    path, fresh = directory / FILE, directory / f".{FILE}.new"
    if path.exists():
        fresh.unlink(missing_ok=True)
        fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            with path.open("rb") as source, FileIO(fd, "w") as target:
                thinned(source.read, lambda data: write_all(target, data))
                os.fsync(target.fileno())
            fresh.replace(path)
        except (OSError, CoveyError):
            with contextlib.suppress(OSError):
                fresh.unlink(missing_ok=True)
            raise
    (directory / MODEL_BEFORE).unlink(missing_ok=True)
    sync_directory(directory)


def write_all(file: FileIO, data: bytes) -> None:
    """All of it. Raises OSError."""
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) or 0 :]


def _recover(part: Path, key: keys.SigningKey) -> None:
    """End a transcript whose coordinator was killed, at its last whole record."""
    if _is_sealed(part, key):
        _put_in_place(part)  # that was all it lacked
        return
    chain, end, whose = Chain(), len(MAGIC), False
    with part.open("r+b") as file:
        with contextlib.suppress(MalformedError):  # where it was cut off
            reader = Reader(file.read)
            for record in reader:
                if isinstance(record, Payload) or record.kind in (Kind.KEY, Kind.ENDING):
                    break  # no result was announced with all that belongs to it: it stays closed
                chain.add(record.kind, record.body)
                end, whose = reader.offset, True
        if whose:
            file.seek(end)
            file.truncate()
            encoder = Encoder(chain)
            file.write(encoder.struct(Kind.ENDING, Ending("interrupted", "")) + encoder.seal(key))
            file.flush()
            os.fsync(file.fileno())
    (part.parent / MODEL_BEFORE).unlink(missing_ok=True)
    if whose:
        _put_in_place(part)
    else:
        part.unlink()


def _is_sealed(part: Path, key: keys.SigningKey) -> bool:
    """Whether it was brought to its end, and all of it is on the disk now."""
    try:
        with part.open("rb") as file:
            reader = Reader(file.read)
            for _ in reader:
                pass
            check_seal(reader, key.public)
            os.fsync(file.fileno())
    except RemoteProtocolError:
        return False
    return True


def _put_in_place(part: Path) -> None:
    """A number within a run is given again after a round was interrupted or rolled back: that round's
    transcript is kept beside the new one. One of the same round is the same, from before a death."""
    path, number = part.with_name(FILE), 1
    if path.exists() and _round_of(path) != _round_of(part):
        while (older := part.with_name(f"{FILE}-{number}")).exists():
            number += 1
        path.rename(older)
    part.replace(path)
    sync_directory(part.parent)


def _round_of(path: Path) -> int | None:
    """Which round a transcript is of; None if it does not say."""
    with contextlib.suppress(RemoteProtocolError), path.open("rb") as file:
        for record in Reader(file.read):
            if not isinstance(record, Payload) and record.kind is Kind.ABOUT:
                return parsed(About, record.body).round
            break
    return None


def _size(directory: Path) -> int:
    total = 0
    for name in (FILE, MODEL_BEFORE):
        with contextlib.suppress(OSError):
            total += (directory / name).stat().st_size
    return total
