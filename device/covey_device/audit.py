"""What this device joined, refused and sent, kept on the device for its owner.

``audit.jsonl`` in the state directory has one JSON object a line, appended and never changed. Each line
holds the SHA-256 of the one before it, so that a line that was changed, taken out or put in shows. Whoever
may write the file can still write all of it anew; note the last hash elsewhere to notice even that.

Order and wear: a line is handed to the operating system *before* what it tells of leaves. What must not
get lost by a power cut either, that a round was joined and that an update left, is synced as well: two
syncs a round. When the file is full it becomes ``audit-NUMBER.jsonl``, after its last line; the oldest of
those is removed beyond a bound on all of them.
"""

import contextlib
import fcntl
import hashlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from covey_device.policy import signers_of
from covey_device.unfinished import Unfinished
from covey_shared.errors import LocalProtocolError, StorageError
from covey_shared.messages import CheckIn, Decline, Head, MaskedUpdate, Message, RoundCall
from covey_shared.wire import Signed

log = logging.getLogger("covey.device")

FILE = "audit.jsonl"
SEGMENT_BYTES = 2_000_000
SEGMENTS = 32
"""At 2.1 kB a round these 64 MB hold 30,000 rounds: three years of one round an hour."""

MAX_TEXT_CHARS = 1000
MAX_LINE_BYTES = 64 * 1024
REFUSALS_PER_HOUR = 600
"""Rounds that are refused cost a coordinator nothing; it must not be able to push the log out with them."""

ROUND_KINDS = ("joined", "refused", "sent", "ended")
_OURS = {"n", "at", "kind", "before"}


class AuditLog:
    """The file: a chain of lines in segments. directory: there already.

    Several processes may append to it, and any number read it meanwhile.
    """

    def __init__(
        self,
        directory: Path,
        *,
        clock: Callable[[], float] = time.time,
        segment_bytes: int = SEGMENT_BYTES,
        segments: int = SEGMENTS,
    ) -> None:
        self.directory = directory
        self._path = directory / FILE
        self._clock = clock
        self._segment_bytes, self._segments = segment_bytes, segments
        self._lock = threading.Lock()
        self._seen: tuple[int, int] | None = None  # inode and size after our last line
        self._n = 0
        self._last = ""  # the last line's hash
        self._dropped = 0  # bytes of a torn line
        self._unwritten = 0

    def append(self, kind: str, facts: dict[str, Any], *, durable: bool = False) -> None:
        """Add one line; on the disk when this returns if `durable`. facts: what JSON can hold.

        Raises StorageError, and then the log is as it was; the next line tells how many are missing.
        """
        if clash := _OURS & facts.keys():
            raise LocalProtocolError(f"an audit entry cannot have a fact named {clash.pop()}")
        with self._lock:
            try:
                with self._opened() as fd:
                    if self._dropped:
                        torn, self._dropped = self._dropped, 0
                        self._write(fd, "repaired", {"dropped_bytes": torn}, durable=False)
                    if self._unwritten:
                        facts = {**facts, "unwritten": self._unwritten}
                    self._write(fd, kind, facts, durable=durable)
            except OSError as error:
                self._seen = None
                self._unwritten += 1
                raise StorageError(
                    f"cannot write {self._path}: {error.strerror}; free some space, or check its owner"
                ) from error
            self._unwritten = 0

    def tells_of(self, digest: bytes) -> bool:
        """Whether the newest two segments have an entry about the message of this SHA-256."""
        fact = b'"sha256":"' + digest.hex().encode() + b'"'
        for path in [self._path, *put_away(self.directory)[-1:]]:
            with contextlib.suppress(OSError):
                if fact in path.read_bytes():
                    return True
        return False

    def last(self, kind: str) -> dict[str, Any]:
        """The last entry of a kind, if it is in the newest two segments; else empty."""
        for path in [self._path, *put_away(self.directory)[-1:]]:
            try:
                lines = path.read_bytes().split(b"\n")
            except OSError:
                continue
            for line in reversed(lines):
                if f'"kind":"{kind}"'.encode() in line:
                    with contextlib.suppress(msgspec.MsgspecError, UnicodeDecodeError):
                        return msgspec.json.decode(line, type=dict[str, Any])
        return {}

    @contextlib.contextmanager
    def _opened(self) -> Iterator[int]:
        """The open segment, locked, with room for a line, its end known."""
        while True:
            fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX)
                if not self._is_current(fd):
                    continue  # another process has just put it away
                status = os.fstat(fd)
                if (status.st_ino, status.st_size) != self._seen:
                    self._resume(fd, status.st_size)
                if os.fstat(fd).st_size >= self._segment_bytes:
                    self._put_away(fd)
                    continue
                yield fd
                return
            finally:
                os.close(fd)

    def _is_current(self, fd: int) -> bool:
        try:
            return self._path.stat().st_ino == os.fstat(fd).st_ino
        except FileNotFoundError:
            return False

    def _resume(self, fd: int, size: int) -> None:
        """Find the end of the chain; what a power cut left of a line goes."""
        start = max(0, size - 4 * MAX_LINE_BYTES)
        tail = os.pread(fd, size - start, start)
        whole = tail[: tail.rfind(b"\n") + 1]
        if len(whole) < len(tail):
            os.ftruncate(fd, start + len(whole))
            self._dropped = len(tail) - len(whole)
        if not whole and (before := put_away(self.directory)):
            data = before[-1].read_bytes()
            whole = data[: data.rfind(b"\n") + 1]
        lines = whole.split(b"\n")[:-1]
        self._last = _hash(lines[-1]) if lines else ""
        self._n = 0
        for back, line in enumerate(reversed(lines)):
            if (n := _number(line)) is not None:
                self._n = n + back
                break
        if size == 0:
            _sync(self.directory)

    def _put_away(self, fd: int) -> None:
        os.fsync(fd)
        self._path.rename(self.directory / f"audit-{self._n:012}.jsonl")
        for old in put_away(self.directory)[: -(self._segments - 1)]:
            old.unlink(missing_ok=True)
        _sync(self.directory)
        self._seen = None

    def _write(self, fd: int, kind: str, facts: dict[str, Any], *, durable: bool) -> None:
        at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self._clock()))
        entry = {"n": self._n + 1, "at": at, "kind": kind}
        line = msgspec.json.encode(entry | _plain(facts) | {"before": self._last})
        size = os.fstat(fd).st_size
        try:
            rest = memoryview(line + b"\n")
            while rest:
                rest = rest[os.write(fd, rest) :]
            if durable:
                os.fdatasync(fd)
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(fd, size)
            raise
        self._n, self._last = self._n + 1, _hash(line)
        status = os.fstat(fd)
        self._seen = status.st_ino, status.st_size


def note(directory: Path, kind: str, **facts: Any) -> None:
    """Tell the log in this directory, from whatever process, of something that has been done already.

    If the log cannot be written, that costs the entry and a line in the service's own log.
    """
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        Audit(AuditLog(directory)).note(kind, **facts)
    except (OSError, StorageError) as error:
        log.warning("not in the audit log: %s (%s)", kind, error)


def put_away(directory: Path) -> list[Path]:
    """The full segments, oldest first."""
    return sorted(directory.glob("audit-[0-9]*.jsonl"))


def lines_of(directory: Path) -> Iterator[tuple[Path, bytes]]:
    """All lines, oldest first, with their files; the last one may lack its end. Raises StorageError.

    A log that is written meanwhile is read as it was when this began, or a little later.
    """
    with contextlib.ExitStack() as stack:
        while True:
            names = [*put_away(directory), directory / FILE]
            files = []
            try:
                for name in names:
                    files.append((name, stack.enter_context(name.open("rb"))))
            except FileNotFoundError:
                if name != directory / FILE:
                    continue
            except OSError as error:
                raise StorageError(
                    f"cannot read {name}: {error.strerror}; the log is its owner's alone"
                ) from error
            if put_away(directory) == names[:-1]:
                break
        for name, file in files:
            for line in file:
                yield name, line


class BrokenChainError(StorageError):
    """The audit log is not what was written."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a chain that holds has: its first and its last entry's numbers, the last one's hash, and
    whether an unfinished line follows. first is above 1 if older ones were put out by newer ones."""

    first: int
    last: int
    last_hash: str
    unfinished: bool


def verify(directory: Path) -> Verdict | None:
    """Check every link; None for an empty log. Raises BrokenChainError naming the first that is wrong."""
    first, n, last, unfinished = 0, 0, "", False
    for path, raw in lines_of(directory):
        line = raw.rstrip(b"\n")
        if line == raw:
            unfinished = True
            continue
        where = f"{path}, after entry {n}" if n else f"{path}, at its beginning"
        try:
            entry = msgspec.json.decode(line, type=_Link)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            raise BrokenChainError(f"{where}: a line is damaged; it was not written so") from None
        if unfinished:
            raise BrokenChainError(f"{where}: a line lacks its end, and another follows")
        if not first:
            first, n = entry.n, entry.n - 1
            if entry.n == 1 and entry.before:
                raise BrokenChainError(f"{where}: the first entry follows another, which is gone")
        elif entry.before != last or entry.n != n + 1:
            raise BrokenChainError(
                f"{where}: entry {entry.n} does not follow from the one before it; a line was changed, "
                "taken out or put in"
            )
        n, last = entry.n, _hash(line)
    return Verdict(first, n, last, unfinished) if first else None


class _Link(msgspec.Struct):
    n: int
    before: str


def _number(line: bytes) -> int | None:
    try:
        return msgspec.json.decode(line, type=_Link).n
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None


def _hash(line: bytes) -> str:
    return hashlib.sha256(line).hexdigest()


def _plain(value: Any) -> Any:
    """Bytes in hexadecimal, and text that is Unicode and not too long."""
    match value:
        case bytes():
            return value.hex()
        case str():
            return value.encode("utf-8", "replace").decode()[:MAX_TEXT_CHARS]
        case dict():
            return {str(k): _plain(v) for k, v in value.items()}
        case list() | tuple():
            return [_plain(v) for v in value]
        case _:
            return value


def _sync(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class _Round:
    """What is told of the round this device is in."""

    def __init__(self, call: RoundCall) -> None:
        self.call = call
        self.plan_name = ""
        self.joined = False
        self.cohort: dict[str, int] = {}
        self.trouble = ""
        self.sent: set[bytes] = set()
        self.messages = self.bytes = 0  # that left, each counted once
        self.again = self.again_bytes = 0  # the same ones, sent again


class Audit:
    """Tells the log what the device's service does. Every function blocks for as long as the disk does.

    What raises StorageError must not be done. steady: seconds of a clock that nobody sets.
    """

    def __init__(self, log: AuditLog, *, steady: Callable[[], float] = time.monotonic) -> None:
        self.log = log
        self._steady = steady
        self._round: _Round | None = None
        self._refusing: RoundCall | None = None
        self._window = 0.0
        self._refusals = 0
        self._untold = 0
        self._requests = self._request_bytes = 0  # since they were told last

    def note(self, kind: str, **facts: Any) -> None:
        """Anything else that an owner should know: an enrolment, a renewal, another policy.

        Durable when this returns; raises StorageError.
        """
        if kind in ROUND_KINDS:
            raise LocalProtocolError(f"entries of kind {kind!r} are about rounds")
        self.log.append(kind, facts, durable=True)

    def policy(self, facts: dict[str, Any]) -> None:
        """What holds from now on; told only if the log's last word on it is another."""
        plain = msgspec.json.decode(msgspec.json.encode(_plain(facts)))
        if self.log.last("policy").get("policy") != plain:
            self.note("policy", policy=plain)

    # -- a round ----------------------------------------------------------------------------------

    def called(self, call: RoundCall) -> None:
        """A round is prepared. Nothing is written yet."""
        self._round = _Round(call)

    def resumed(self, unfinished: Unfinished) -> None:
        """An earlier process of this device joined this round, and was about to send its update."""
        self._round = current = _Round(unfinished.call.message)
        current.joined = True
        current.cohort = {"cohort": unfinished.n, "at_least": unfinished.n_min}
        digest = hashlib.sha256(unfinished.update.envelope).digest()
        if self.log.tells_of(digest):
            current.sent.add(digest)

    def prepared(self, round_id: int, plan_name: str) -> None:
        """Its plan is here."""
        if self._round is not None and self._round.call.round == round_id:
            self._round.plan_name = plan_name

    def refusing(self, call: RoundCall) -> None:
        """What the next refusal is about, if it is of a round that was not even prepared."""
        self._refusing = call

    def trouble(self, round_id: int, problem: str) -> None:
        """Why this device is about to leave, or gives no update, in words that stay here."""
        if self._round is not None and self._round.call.round == round_id:
            self._round.trouble = problem

    def cohort(self, head: Head) -> None:
        """The manifest that this device accepted."""
        if self._round is not None and self._round.call.round == head.round:
            self._round.cohort = {"cohort": head.n, "at_least": head.n_min}

    def requested(self, size: int) -> None:
        """A request for chunks of a plan or a model leaves: counted, told at the round's end. Those between
        rounds, for a model that is kept, are told with the next one's."""
        self._requests += 1
        self._request_bytes += size

    def leaving(self, signed: Signed[Message]) -> None:
        """A message is about to leave. Raises StorageError, and then it must not."""
        message, envelope = signed.message, signed.envelope
        current = self._round
        if isinstance(message, Decline) and not self._is_in(message):
            self._refused(message, envelope)
            return
        size, digest = len(envelope), hashlib.sha256(envelope).digest()
        if current is None:  # of no round that we were told of: recorded all the same
            self.log.append(
                "sent", {"message": message.LABEL, "bytes": size, "sha256": digest}, durable=True
            )
            return
        if digest in current.sent:
            current.again += 1
            current.again_bytes += size
            return
        facts: dict[str, Any] = {"round": current.call.round, "message": message.LABEL}
        facts |= {"bytes": size, "sha256": digest}
        match message:
            case CheckIn():
                facts |= self._facts(current.call, current.plan_name)
                self.log.append("joined", facts, durable=True)
                current.joined = True
            case MaskedUpdate():
                size += message.payload_bytes
                facts |= {
                    "update_bytes": message.payload_bytes,
                    "update_sha256": message.payload,
                    **current.cohort,
                }
                self.log.append("sent", facts, durable=True)
            case Decline():
                facts |= {"reason": message.reason} | self._detail(current)
                self.log.append("sent", facts)
            case _:
                self.log.append("sent", facts)
        current.sent.add(digest)
        current.messages += 1
        current.bytes += size

    def sent_again(self, size: int) -> None:
        """Chunks of the update that the coordinator asked for again."""
        if self._round is not None:
            self._round.again += 1
            self._round.again_bytes += size

    def ended(self, round_id: int, outcome: str, *, contributed: bool) -> None:
        """The round is over. Raises StorageError, with nothing to be done about it."""
        current, self._round = self._round, None
        if current is None or current.call.round != round_id or not current.joined:
            return  # what was not joined was told as refused
        facts: dict[str, Any] = {"round": round_id, "outcome": outcome, "in_sum": contributed}
        facts |= current.cohort | self._detail(current)
        facts |= {"messages": current.messages, "bytes": current.bytes}
        if current.again:
            facts |= {"again": current.again, "again_bytes": current.again_bytes}
        if self._requests:
            facts |= {"requests": self._requests, "request_bytes": self._request_bytes}
            self._requests = self._request_bytes = 0
        self.log.append("ended", facts)

    # -- parts ------------------------------------------------------------------------------------

    def _is_in(self, decline: Decline) -> bool:
        current = self._round
        if current is None or not current.joined:
            return False
        return (current.call.run, current.call.round) == (decline.run, decline.round)

    def _refused(self, decline: Decline, envelope: bytes) -> None:
        now = self._steady()
        if now - self._window >= 3600 or not self._refusals:
            self._window, self._refusals = now, 0
        if self._refusals >= REFUSALS_PER_HOUR:
            self._untold += 1
            return
        self._refusals += 1
        facts: dict[str, Any] = {"round": decline.round, "reason": decline.reason}
        current, call = self._round, self._refusing
        if current is not None and current.call.round == decline.round:
            facts |= self._detail(current) | self._facts(current.call, current.plan_name)
        elif call is not None and call.round == decline.round:
            facts |= self._facts(call, "")
        facts |= {"bytes": len(envelope), "sha256": hashlib.sha256(envelope).digest()}
        if self._untold:
            facts["more_refused"] = self._untold
        self.log.append("refused", facts)
        self._untold = 0

    @staticmethod
    def _facts(call: RoundCall, plan_name: str) -> dict[str, Any]:
        return {
            "run": call.run,
            "plan": call.plan,
            "plan_name": plan_name,
            "signed_by": signers_of(call),
            "model": call.model,
            "revision": call.revision,
            "at_least": call.n_min,
        }

    @staticmethod
    def _detail(current: _Round) -> dict[str, str]:
        return {"detail": current.trouble} if current.trouble else {}
