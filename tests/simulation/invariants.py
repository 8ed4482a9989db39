"""What must hold at every moment, whatever fails; checked as things happen.

A `Watch` is told of each message as it leaves its sender, of everything that devices save and load, of
every sum, and of every round's outcome. It never raises, since the services would catch that: it notes
what is broken, and the simulation looks after each step.
"""

import hashlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from covey_coordinator.averaging import FedAvg
from covey_coordinator.round import Completed
from covey_coordinator.run import RoundOutcome
from covey_coordinator.store import RunDirectory
from covey_coordinator.transcript import MODEL_BEFORE
from covey_coordinator.transcript_command import Models, average
from covey_device import audit
from covey_device.session import Memory
from covey_shared import chunks, wire
from covey_shared.errors import CoveyError, StorageError, TrainingError
from covey_shared.fixedpoint import pack, to_signed
from covey_shared.messages import (
    CheckIn,
    Decline,
    DeviceId,
    Head,
    Manifest,
    MaskedUpdate,
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
    WantBlob,
)
from covey_shared.secagg.bitmap import from_bitmap
from covey_shared.secagg.cohort import Trust, manifest_digest
from covey_shared.topics import Topics
from covey_shared.transcript import Kind, Reader, Record
from covey_shared.transcript_checks import Verdict, verify

EXCUSES = (
    "this device restarted; its keys of the round are gone",
    StorageError.public,
    TrainingError("").public,
    "blob ",  # does not come
)
"""Why an honest device may leave a round that an honest coordinator called."""


class Watch:
    """Everything that was ever said, as far as it is needed to know what may not be said any more.

    broken: what does not hold; empty as long as all does.
    """

    def __init__(self, trust: Trust, initial: np.ndarray, directory: Path, keep: str) -> None:
        self.broken: list[str] = []
        self.keep, self.fleet_ca, self.coordinator = keep, trust.ca, trust.coordinator
        self._topics = Topics(trust.fleet)
        self._directory = directory
        self.run: RunDirectory | None = None  # through the store of the coordinator's last process
        self._once: dict[tuple[Any, ...], Any] = {}
        self._heads: dict[bytes, Head] = {}
        self.calls: dict[int, RoundCall] = {}
        self._uploads: set[tuple[bytes, int]] = (
            set()
        )  # (model, revision) that a roster went out for
        self._announced: dict[DeviceId, set[bytes]] = {}
        self.announced: set[tuple[str, int]] = set()  # (device, round) of updates that were begun
        self._frames: dict[tuple[DeviceId, bytes, int], bytes] = {}
        self._kinds: dict[tuple[bytes, int], bool] = {}
        self.saved: dict[DeviceId, Memory] = {}
        self.left: dict[DeviceId, dict[str, str]] = {}  # hashes of messages, and what they were
        self.plain: dict[tuple[DeviceId, int], np.ndarray] = {}
        self.sums: dict[int, Completed] = {}
        self.results: set[int] = set()
        self.abandoned: set[int] = set()
        self._outcomes: dict[int, tuple[int, bool]] = {}  # index -> round, completed
        self._digests: set[bytes] = set()  # of all that was ever said, but for chunks
        self._results: dict[int, bytes] = {}  # what was said of a round's sum
        self.disturbed: set[int] = set()  # rounds in which the coordinator or its disk failed
        self._read: dict[tuple[Path, bytes, bytes, bool], str] = {}  # transcripts that were judged
        self._members: dict[bytes, list[DeviceId]] = {}  # of a manifest
        self._unquiet = False  # since the last call
        self.proven: set[int] = set()  # rounds whose transcript was found good, with all payloads
        self._parameters = initial
        self._lines = 0
        self.on_call: Callable[[RoundCall], None] = lambda call: None

    def expect(self, true: bool, otherwise: str) -> None:
        """Note `otherwise` unless it is true."""
        if not true:
            self.broken.append(otherwise)

    def _only(self, value: Any, otherwise: str, *key: Any) -> bool:
        """There is one value to a key. True if it is the first time."""
        first = (otherwise, *key) not in self._once
        before = self._once.setdefault((otherwise, *key), value)
        self.expect(before == value, f"{otherwise}: {', '.join(map(_plain, key))}")
        return first

    # -- messages ---------------------------------------------------------------------------------

    def said(self, sender: str, topic: str, payload: bytes) -> None:
        """A message leaves its sender."""
        if not payload or "/presence/" in topic or "/blob/" in topic:
            return
        device = DeviceId(sender)
        if topic == self._topics.upload(sender):
            self._frame(device, payload)
            return
        message = wire.decode(payload).message
        digest = hashlib.sha256(payload)
        self._digests.add(digest.digest())
        if sender in self.left:
            self.left[device][digest.hexdigest()] = message.LABEL
        head = self._heads.get(getattr(message, "h", b""))
        match message:
            case RoundCall():
                self._call(message, payload)
            case CheckIn():
                self._only(payload, "checks in twice to one round", device, message.round)
                saved = self.saved.get(device)
                self.expect(
                    saved is not None and saved.last_round >= message.round,
                    f"{device} checks in to round {message.round} before that is saved",
                )
            case Manifest(head):
                self._only(payload, "two manifests for one round", head.round)
                self._heads[manifest_digest(head)] = head
                self._members[manifest_digest(head)] = [
                    wire.decode_as(CheckIn, envelope).message.device
                    for envelope in message.check_ins
                ]
            case Shares() if head:
                self._only(payload, "shares twice in one round", device, head.round)
            case RosterVote() if head:
                vote = (message.h, message.u2, message.readable)
                self._only(vote, "signs two rosters in one round", device, head.round)
            case Roster() if head:
                self._only(message.u2, "two rosters for one round", head.round)
                self._uploads.add((head.model, head.revision))
            case MaskedUpdate() if head:
                self._update(device, head, message, payload)
            case ViewProposal() if head:
                self._only(message.u3, "two view proposals for one round", head.round)
            case ViewVote() if head:
                vote = (message.h, message.u2, message.u3)
                self._only(vote, "signs two views in one round", device, head.round)
            case View() if head:
                self._only(message.u3, "two views for one round", head.round)
            case Reveal() if head:
                self._reveal(device, head, message, payload)
            case Result():
                self._result(message, payload)
            case RoundAbandoned():
                self.abandoned.add(message.round)
                self.expect(
                    message.round not in self.sums,
                    f"round {message.round} has a sum and is abandoned",
                )
            case Decline():
                # Everybody here is honest: nobody is asked again for what it gave, nobody is shown two
                # of anything, and no other refusal of the protocol has a cause.
                self.expect(
                    message.reason.startswith(EXCUSES),
                    f"{device} leaves round {message.round}: {message.reason}",
                )

    def _call(self, call: RoundCall, payload: bytes) -> None:
        if not self._only(payload, "two calls of one round", call.round):
            return
        self.expect(
            call.round > max(self.calls, default=0),
            f"round {call.round} is called after round {max(self.calls, default=0)}",
        )
        self.calls[call.round] = call
        self.expect(
            (call.model, call.revision) not in self._uploads,
            f"round {call.round} calls a revision whose uploads have begun before",
        )
        self.settled()
        ours = hashlib.sha256(self._parameters.astype("<f4").tobytes()).digest()
        self.expect(
            call.model == ours,
            f"round {call.round} calls a model that the completed rounds do not lead to",
        )
        self.on_call(call)

    def _update(self, device: DeviceId, head: Head, update: MaskedUpdate, payload: bytes) -> None:
        self._only(payload, "masks twice in one round", device, head.round)
        contribution = (device, head.model, head.revision)
        self._only(payload, "contributes twice to one revision of a model", *contribution)
        self._announced.setdefault(device, set()).add(update.payload)
        self.announced.add((device, head.round))
        saved = self.saved.get(device)
        self.expect(
            saved is not None and saved.contributed.get(head.model.hex(), -1) >= head.revision,
            f"{device} contributes to round {head.round} before that is saved",
        )

    def _frame(self, device: DeviceId, frame: bytes) -> None:
        chunk = chunks.decode_frame(frame)
        self.expect(
            chunk.digest in self._announced.get(device, ()) or not self._announced.get(device),
            f"{device} uploads what it never announced",
        )
        before = self._frames.setdefault((device, chunk.digest, chunk.index), chunk.data)
        self.expect(before == chunk.data, f"{device} sends other bytes of one update")

    def _reveal(self, device: DeviceId, head: Head, reveal: Reveal, payload: bytes) -> None:
        self._only(payload, "reveals twice in one round", device, head.round)
        survivors = from_bitmap(reveal.u3, head.n)
        for target in from_bitmap(reveal.present, head.n):
            of_b = target in survivors
            self.expect(
                self._kinds.setdefault((reveal.h, target), of_b) == of_b,
                f"both kinds of shares of one device are revealed in round {head.round}",
            )

    def _result(self, result: Result, payload: bytes) -> None:
        self._only(payload, "two results of one round", result.round)
        self.results.add(result.round)
        self._results[result.round] = payload
        self.expect(
            result.round not in self.abandoned, f"round {result.round} is abandoned and completes"
        )
        completed = self.sums.get(result.round)
        if completed is None:
            self.broken.append(f"round {result.round} has a result without a sum")
            return
        packed = pack(completed.ring_sum, completed.encoding.bits)
        self.expect(
            result.ring_sum == hashlib.sha256(packed).digest()
            and _names(result.u3, self._members[result.h]) == completed.survivors,
            f"round {result.round} has the result of another sum",
        )

    # -- devices ----------------------------------------------------------------------------------

    def save(self, device: DeviceId, memory: Memory) -> None:
        """A device was told that this is durable."""
        self._covers(device, memory, "saves less than it saved before")
        self.saved[device] = memory

    def load(self, device: DeviceId, memory: Memory) -> None:
        """A new process of a device begins with this, and acts on it from now on."""
        self._covers(device, memory, "lost what it saved")
        self.saved[device] = memory

    def _covers(self, device: DeviceId, memory: Memory, otherwise: str) -> None:
        before = self.saved.get(device, Memory())
        later = memory.last_round >= before.last_round and all(
            memory.contributed.get(model, -1) >= revision
            for model, revision in before.contributed.items()
        )
        if not later:
            self.broken.append(f"{device} {otherwise}: {before} before, {memory} now")

    def audited(self, device: DeviceId, directory: Path, *, powerless: bool) -> None:
        """The owner's record is whole and has what left the device. powerless: power was cut, which may
        have taken all but check-ins and updates."""
        try:
            audit.verify(directory)
            lines = [
                msgspec.json.decode(line)
                for _, line in audit.lines_of(directory)
                if line[-1:] == b"\n"
            ]
        except CoveyError as error:
            self.broken.append(f"the record of {device}: {error}")
            return
        told = {line.get("sha256") for line in lines}
        for digest, label in self.left[device].items():
            optional = powerless and label not in (CheckIn.LABEL, MaskedUpdate.LABEL)
            if digest not in told and not optional and label not in (Decline.LABEL, WantBlob.LABEL):
                self.broken.append(f"{device} sent a {label} that its record does not have")

    def encoded(self, device: DeviceId, round_id: int, ring: np.ndarray) -> None:
        """A device's update as it is before it is masked."""
        self._only(ring.tobytes(), "encodes two updates in one round", device, round_id)
        self.plain[device, round_id] = ring

    # -- the coordinator --------------------------------------------------------------------------

    def sum(self, round_id: int, completed: Completed) -> None:
        """The coordinator has arrived at a sum."""
        before = self.sums.get(round_id)
        if before is not None:  # by an earlier process
            same = before.survivors == completed.survivors
            same = same and bool((before.ring_sum == completed.ring_sum).all())
            self.expect(same, f"round {round_id} has two sums")
        self.expect(round_id not in self.abandoned, f"round {round_id} is abandoned and has a sum")
        self.sums[round_id] = completed
        bits, survivors = completed.encoding.bits, completed.survivors
        n_min = self.calls[round_id].n_min
        self.expect(len(survivors) >= n_min, f"round {round_id} sums {len(survivors)} devices")
        plain = [self.plain.get((name, round_id)) for name in survivors]
        if any(ring is None for ring in plain):
            self.broken.append(f"round {round_id} sums a device that made no update")
            return
        total = np.zeros_like(completed.ring_sum)
        for ring in plain:
            total += ring
        exact = to_signed(total, bits) == to_signed(completed.ring_sum, bits)
        self.expect(bool(exact.all()), f"round {round_id} has a wrong sum")

    def outcome(self, outcome: RoundOutcome, faults: dict[DeviceId, int]) -> None:
        """A round is over, and what it came to on the disk. faults: what honest devices are said to
        have done."""
        before = self._outcomes.setdefault(
            outcome.index, (outcome.round_id, outcome.completed is not None)
        )
        self.expect(
            before == (outcome.round_id, outcome.completed is not None),
            f"round {outcome.round_id} is the second of index {outcome.index}",
        )
        self.expect(not faults, f"honest devices are blamed: {sorted(faults)}")
        self.transcript(outcome.index, outcome.round_id, completed=outcome.completed is not None)

    def disturb(self) -> None:
        """The coordinator dies, is stopped, or finds its disk full: the round of this moment, if there
        is one, may go without a transcript."""
        self.disturbed.add(max(self.calls, default=0))
        self._unquiet = True

    def called(self, *, full: bool) -> None:
        """A round was called, whose transcript began before that. full: the coordinator's disk still is."""
        if self._unquiet:
            self.disturb()
        self._unquiet = full

    def transcript(self, index: int, round_id: int, *, completed: bool) -> None:
        """Of a round that is over there is a transcript which proves what was seen here, unless the
        coordinator or its disk failed meanwhile. None is ever wrong."""
        directory = self._directory / "rounds" / f"{index:05}"
        for older in directory.glob("transcript-*"):
            self._sound(older, 0, completed=False)
        path = directory / "transcript"
        excused = self.keep == "off" or round_id in self.disturbed
        if not path.exists():
            self.expect(excused, f"round {round_id} has no transcript")
            return
        outcome = self._sound(path, round_id, completed=completed)
        if outcome == "completed":
            self.expect(completed, f"the transcript of round {round_id} tells of a sum")
        elif completed:
            self.expect(excused, f"the transcript of round {round_id} has no sum: {outcome}")
        elif outcome != "abandoned":
            # An earlier attempt's, if this one's could not be written.
            self.expect(excused, f"the transcript of round {round_id} is {outcome}")

    def _sound(self, path: Path, round_id: int, *, completed: bool) -> str:
        """Everything that can be checked of a transcript holds. completed: so is its round, of which
        more is known. Returns how it says that its round ended, or that it is another's."""
        data, models, model = path.read_bytes(), Models(path, ()), path.with_name(MODEL_BEFORE)
        beside = model.read_bytes() if model.exists() else b""
        key = (path, hashlib.sha256(data).digest(), hashlib.sha256(beside).digest(), completed)
        if key not in self._read:
            self._read[key] = self._judged(path, data, models, round_id, completed=completed)
        return self._read[key]

    def _judged(
        self, path: Path, data: bytes, models: Models, round_id: int, *, completed: bool
    ) -> str:
        report = verify(
            io.BytesIO(data).read,
            fleet_ca=self.fleet_ca,
            coordinator=self.coordinator,
            find_model=models.find,
            average=average,
        )
        name = f"{path.parent.name}/{path.name}"
        for check in report.checks:
            if check.verdict is Verdict.FAIL:
                self.broken.append(f"transcript {name}: {check.what}: {check.detail}")
        ending = report.ending.outcome if report.ending else "cut off"
        if report.about is None or report.about.round != round_id:
            return f"of round {report.about.round if report.about else 'nobody knows which'}"
        if ending != "completed" or not completed:
            return ending
        self.expect(
            report.complete or report.verdict("payloads") is Verdict.NOT_CHECKED,
            f"transcript {name} has its masked updates, and not all of it could be checked",
        )
        if report.complete:
            self.proven.add(round_id)
        for record in Reader(io.BytesIO(data).read):
            if isinstance(record, Record) and record.kind is Kind.MESSAGE:
                self._told(name, round_id, record.body)
        return ending

    def _told(self, name: str, round_id: int, envelope: bytes) -> None:
        """A message in the transcript of a completed round is one that was said."""
        message = wire.decode(envelope).message
        if isinstance(message, Result):
            said, total = self._results.get(round_id), self.sums.get(round_id)
            self.expect(said in (None, envelope), f"transcript {name} has another result")
            if total is not None:
                packed = hashlib.sha256(pack(total.ring_sum, total.encoding.bits)).digest()
                survivors = _names(message.u3, self._members[message.h])
                same = message.ring_sum == packed and survivors == total.survivors
                self.expect(same, f"transcript {name} has the result of another sum")
        elif hashlib.sha256(envelope).digest() not in self._digests:
            self.broken.append(f"transcript {name} has a {message.LABEL} that nobody sent")

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of the file. It may be behind the database while a round ends; not when one begins."""
        path = self._directory / "metrics.jsonl"
        lines = path.read_bytes().splitlines() if path.exists() else []
        return [msgspec.json.decode(line, type=dict[str, Any]) for line in lines]

    @property
    def completed(self) -> set[int]:
        """Rounds that completed, as the database has it."""
        assert self.run is not None
        lines = self.run.store.rounds(self.run.name)
        return {line["round"] for line in lines if line["outcome"] == "completed"}

    def settled(self) -> None:
        """The database tells of every round once, in order, and of the model it led to; so does the file
        of metrics."""
        assert self.run is not None
        try:
            state, lines = self.run.state(), self.run.store.rounds(self.run.name)
            self.expect(self.metrics() == lines, "the file of metrics is not what the database has")
        except CoveyError as error:
            self.broken.append(f"the run cannot be read: {error}")
            return
        indices = [line["index"] for line in lines]
        self.expect(
            indices == list(range(1, state.rounds_done + 1)),
            f"the metrics have rounds {indices}, the state {state.rounds_done}",
        )
        for index, (round_id, completed) in self._outcomes.items():
            line = lines[index - 1] if index <= len(lines) else {}
            self.expect(
                (line.get("round"), line.get("outcome") == "completed") == (round_id, completed),
                f"round {round_id} is lost from the metrics",
            )
        for line in lines[self._lines :]:
            completed = self.sums.get(line["round"])
            if line["outcome"] != "completed":
                self.expect(completed is None, f"round {line['round']} lost its sum")
            elif completed is None:
                self.broken.append(f"round {line['round']} completed without a sum")
            else:
                total = completed.encoding.decode_sum(completed.ring_sum)
                self._parameters = FedAvg().step(self._parameters, total)
        self._lines = len(lines)
        known = {line["round"] for line in lines if line["outcome"] == "completed"}
        self.expect(self.results <= known, f"completed rounds are lost: {self.results - known}")


def _names(bitmap: bytes, members: list[DeviceId]) -> tuple[DeviceId, ...]:
    return tuple(members[i] for i in sorted(from_bitmap(bitmap, len(members))))


def _plain(value: Any) -> str:
    return value.hex()[:8] if isinstance(value, bytes) else str(value)
