"""Decides what became of a run: from what devices wrote down, what was overheard, and what is on disk.

Three witnesses that do not know of each other. Devices leave the plaintext of each update and all their
words; the ear at the broker has what was said while it was connected; the coordinator has its files. The
whole run is computed again from the plaintexts: every sum, every average, every model, bit for bit.
"""

import hashlib
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from chaos.device import HEARD, SENT, records
from chaos.observer import Overheard
from covey_coordinator.averaging import FedAvg
from covey_coordinator.plans.bundle import load_bundle
from covey_coordinator.transcript_command import Models, average
from covey_fleet.witness import Witness
from covey_shared import wire
from covey_shared.errors import MalformedError
from covey_shared.fixedpoint import pack
from covey_shared.masking import Ring
from covey_shared.messages import (
    CheckIn,
    Decline,
    Manifest,
    MaskedUpdate,
    Message,
    Result,
    Reveal,
    RosterVote,
    RoundAbandoned,
    Shares,
    View,
    ViewVote,
)
from covey_shared.runtime import export_model
from covey_shared.secagg.cohort import Cohort, Trust
from covey_shared.secagg.rules import verified_cohort
from covey_shared.transcript import Kind, Payload, Reader, Record
from covey_shared.transcript_checks import verify

LEFT_BEHIND = re.compile(r"^\..*\.(new|part)$|\.new$")
ALARMS = re.compile(
    r"Traceback|This is a bug|unexpected \w+(Error|Exception)|never awaited|Task exception"
)
ONCE = (CheckIn, Shares, RosterVote, MaskedUpdate, ViewVote, Reveal)
"""Of each of these a device says one thing in a round, however often."""


@dataclass
class Said:
    """Everything that was said, by whom: from all sources together, each envelope once."""

    trust: Trust
    by: dict[str, dict[bytes, Message]] = field(default_factory=lambda: defaultdict(dict))
    cohorts: dict[bytes, Cohort] = field(default_factory=dict)

    def add(self, sender: str, envelope: bytes, message: Message | None = None) -> None:
        """One message. sender: "coordinator" or a device."""
        if envelope in self.by[sender]:
            return
        try:
            signed = wire.decode(envelope)
        except MalformedError:
            return
        self.by[sender][envelope] = signed.message
        if isinstance(signed.message, Manifest):
            cohort = verified_cohort(wire.Signed(signed.message, envelope), self.trust)
            self.cohorts[cohort.h] = cohort

    def of(self, sender: str, kind: type[Any]) -> Iterator[Any]:
        """Of one kind."""
        return (m for m in self.by[sender].values() if isinstance(m, kind))


def gather(trust: Trust, heard: Iterable[Overheard], evidence: Path, run: Path) -> Said:
    """All sources: the ear, the devices' own logs, the transcripts."""
    said = Said(trust)
    for one in heard:
        said.add(one.sender, one.envelope)
    for log in sorted(evidence.glob("*.log")):
        for record in records(log):
            if record.kind == SENT:
                said.add(log.stem, record.envelope)
            elif record.kind == HEARD:
                said.add("coordinator", record.envelope)
    for path in sorted((run / "rounds").glob("*/transcript*")):
        for envelope, message in messages_of(path):
            said.add(sender_of(message), envelope)
    return said


def messages_of(path: Path) -> Iterator[tuple[bytes, Message]]:
    """Of a transcript."""
    with path.open("rb") as file:
        try:
            for record in Reader(file.read):
                if isinstance(record, Payload) or not isinstance(record, Record):
                    continue
                if record.kind is Kind.MESSAGE:
                    yield record.body, wire.decode(record.body).message
        except MalformedError:
            return


def sender_of(message: Message) -> str:
    """Who says such a thing."""
    if isinstance(message, (*ONCE, Decline)):
        return str(getattr(message, "device", None) or getattr(message, "member", ""))
    return "coordinator"


@dataclass
class Verdict:
    """What was found. broken: each breach in words; nothing else makes a run fail but the bounds.

    sums_exact: completed rounds whose sum was made again from the plaintexts. proved: those whose
    transcript holds, payloads and average included.
    """

    rounds: int = 0
    completed: int = 0
    abandoned: Counter[str] = field(default_factory=Counter)
    sums_exact: int = 0
    sums_wrong: int = 0
    proved: int = 0
    transcripts: int = 0
    lost: int = 0
    repeated: int = 0
    broken: list[str] = field(default_factory=list)

    def breach(self, words: str) -> None:
        """One more."""
        self.broken.append(words)


class Checker:
    """said: see `gather`. lines: the coordinator's history of rounds, oldest first. copies: of
    transcripts, by round, from before their payloads were taken out."""

    def __init__(
        self,
        said: Said,
        lines: list[dict[str, Any]],
        run: Path,
        evidence: Path,
        plan: Path,
        *,
        copies: Path | None = None,
    ) -> None:
        self.copies = copies
        self.said, self.lines, self.run = said, lines, run
        self.witness = Witness(evidence)
        self.bundle = load_bundle(plan)
        self.verdict = Verdict()
        self.models: set[bytes] = set()
        """Of every model.onnx that there ever was to be: SHA-256."""

    def check(self) -> Verdict:
        """Everything that can be told without the processes' logs."""
        self._history()
        self._results()
        self._replay()
        self._transcripts()
        for device in sorted(self.said.by.keys() - {"coordinator"}):
            self._device(device)
        return self.verdict

    def _history(self) -> None:
        verdict, before = self.verdict, 0
        verdict.rounds = len(self.lines)
        for number, line in enumerate(self.lines, start=1):
            if line["index"] != number:
                verdict.breach(f"line {number} of the history is of round {line['index']}")
            if line["round"] <= before:
                verdict.breach(f"round number {line['round']} comes after {before}")
            before = line["round"]
            if line["outcome"] == "completed":
                verdict.completed += 1
            else:
                verdict.abandoned[re.sub(r"\bpi-\d+\b|\d+(\.\d+)?", "N", line["reason"])] += 1

    def _results(self) -> None:
        """What was announced, against what is in the history."""
        verdict, said = self.verdict, self.said
        completed = Counter(x["round"] for x in self.lines if x["outcome"] == "completed")
        announced: dict[int, set[tuple[bytes, bytes, bytes]]] = defaultdict(set)
        for result in said.of("coordinator", Result):
            announced[result.round].add((result.u3, result.ring_sum, result.next_model))
        abandoned = {m.round for m in said.of("coordinator", RoundAbandoned)}
        for number, told in sorted(announced.items()):
            if completed[number] == 0:
                verdict.lost += 1
                verdict.breach(
                    f"round {number} was announced as completed, and is not in the history"
                )
            if len(told) > 1:
                verdict.breach(f"round {number} has {len(told)} different results")
        for number, times in completed.items():
            if times > 1:
                verdict.repeated += 1
                verdict.breach(f"round {number} is in the history {times} times")
        for number in sorted(abandoned & (completed.keys() | announced.keys())):
            verdict.breach(f"round {number} was both completed and abandoned")
        # A model is averaged into the next one once.
        models = Counter(x["model"] for x in self.lines if x["outcome"] == "completed")
        for model, times in models.items():
            if times > 1:
                verdict.repeated += 1
                verdict.breach(f"{times} completed rounds began with the model {model[:12]}")

    def _survivors(self, number: int) -> Iterator[tuple[Cohort, frozenset[int], bytes | None]]:
        """Of a completed round: its cohort, who is in the sum, the digest of the sum if it was told."""
        for result in self.said.of("coordinator", Result):
            if result.round == number and (cohort := self.said.cohorts.get(result.h)):
                yield cohort, cohort.subset(result.u3), result.ring_sum
                return
        for view in self.said.of("coordinator", View):
            cohort = self.said.cohorts.get(view.h)
            if cohort is not None and cohort.head.round == number:
                yield cohort, cohort.subset(view.u3), None
                return

    def _replay(self) -> None:
        """The whole run again, from the plaintexts: the model after each round must be the next's."""
        verdict, parameters = self.verdict, self.bundle.initial
        for line, after in zip(self.lines, [*self.lines[1:], None], strict=True):
            number, index = line["round"], line["index"]
            if line["model"] != hashlib.sha256(parameters.astype("<f4").tobytes()).hexdigest():
                verdict.breach(
                    f"round {number} began with another model than the one before led to"
                )
                return  # what follows hangs on it
            if line["outcome"] != "completed":
                continue
            found = next(self._survivors(number), None)
            if found is None:
                verdict.sums_wrong += 1
                verdict.breach(f"nobody knows who is in the sum of round {number}")
                return
            cohort, u3, told = found
            total = self._sum(number, cohort, u3)
            if total is None:
                verdict.sums_wrong += 1
                verdict.breach(f"round {number} sums a device that encoded nothing")
                return
            wrong = (
                told is not None and told != hashlib.sha256(pack(total, cohort.head.bits)).digest()
            )
            parameters = FedAvg(1.0).step(parameters, cohort.encoding.decode_sum(total))
            model = hashlib.sha256(parameters.astype("<f4").tobytes()).hexdigest()
            expected = after["model"] if after is not None else self._last_model()
            if wrong or (expected is not None and model != expected):
                verdict.sums_wrong += 1
                verdict.breach(f"the sum of round {number} is not that of its survivors")
                return
            verdict.sums_exact += 1
            self._model_file(index, parameters)

    def _sum(self, number: int, cohort: Cohort, u3: frozenset[int]) -> Ring | None:
        encoding = cohort.encoding
        total = np.zeros(encoding.n_coordinates, encoding.lane)
        for device in cohort.names(u3):
            ring = self.witness.encoded(number, device)
            if ring is None or ring.shape != total.shape:
                return None
            total += ring
        return total & encoding.lane.type((1 << encoding.bits) - 1)

    def _last_model(self) -> str | None:
        try:
            return hashlib.sha256((self.run / "parameters.bin").read_bytes()).hexdigest()
        except FileNotFoundError:
            return None

    def _model_file(self, index: int, parameters: Any) -> None:
        """rounds/N/model.onnx is whole, and holds the model of round N."""
        bundle = self.bundle
        data = export_model(bundle.header, bundle.graphs["infer"], parameters)
        self.models.add(hashlib.sha256(data).digest())
        path = self.run / "rounds" / f"{index:05}" / "model.onnx"
        if not path.exists() or path.read_bytes() != data:
            self.verdict.breach(f"{path.relative_to(self.run)} is not the model of that round")

    def _transcripts(self) -> None:
        """`covey verify` of each."""
        for line in self.lines:
            name = f"{line['index']:05}"
            paths = [self.run / "rounds" / name / "transcript"]
            if self.copies is not None:
                paths.append(self.copies / name / "transcript")
            there = [path for path in paths if path.exists()]
            proved = [self._transcript(path, line) for path in there]
            self.verdict.transcripts += bool(there)
            self.verdict.proved += any(proved)

    def _transcript(self, path: Path, line: dict[str, Any]) -> bool:
        """Whether it proves that its round completed with that sum and that model."""
        with path.open("rb") as source:
            report = verify(
                source.read,
                fleet_ca=self.said.trust.ca,
                coordinator=self.said.trust.coordinator,
                find_model=Models(path, ()).find,
                average=average,
            )
        if report.failed:
            self.verdict.breach(f"the transcript of round {line['round']} does not hold")
        told = report.ending.outcome if report.ending else "none"
        if {told, line["outcome"]} == {"completed", "abandoned"}:
            self.verdict.breach(f"round {line['round']}: {line['outcome']}; its transcript: {told}")
        return told == "completed" and report.complete

    def _device(self, device: str) -> None:
        """What it said, of each thing once."""
        said, verdict = self.said, self.verdict
        for kind in ONCE:
            words: dict[object, set[bytes]] = defaultdict(set)
            for message in said.of(device, kind):
                at = message.h if hasattr(message, "h") else (message.run, message.round)
                body = message if not isinstance(message, Reveal) else message.u3
                words[at].add(wire.body_of(body) if not isinstance(body, bytes) else body)
            for at, different in words.items():
                if len(different) > 1:
                    verdict.breach(f"{device} said {len(different)} different things as a {kind.LABEL}"
                                   f" of round {self._number(at)}")  # fmt: skip
        contributed: dict[tuple[bytes, int], set[bytes]] = defaultdict(set)
        for update in said.of(device, MaskedUpdate):
            cohort = said.cohorts.get(update.h)
            if cohort is None:
                verdict.breach(f"{device} sent an update under a manifest that nobody else saw")
                continue
            contributed[cohort.head.model, cohort.head.revision].add(update.h)
        for (_, revision), rounds in contributed.items():
            if len(rounds) > 1:
                numbers = sorted(said.cohorts[h].head.round for h in rounds)
                verdict.breach(
                    f"{device} contributed to one model (revision {revision}) in {numbers}"
                )

    def _number(self, at: object) -> object:
        if isinstance(at, bytes) and (cohort := self.said.cohorts.get(at)) is not None:
            return cohort.head.round
        return at[1] if isinstance(at, tuple) else at


# -- what processes leave --------------------------------------------------------------------------


def alarms(log: Path) -> list[str]:
    """Lines of a log that no healthy process writes, each with what follows it."""
    lines = log.read_text(errors="replace").splitlines()
    return [
        f"{log.name}: {' | '.join(lines[i : i + 12])}"
        for i, line in enumerate(lines)
        if ALARMS.search(line)
    ]


def left_behind(directory: Path, *, but: Path | None = None) -> list[str]:
    """Half-written files that nobody came back to. but: where an open round has its own."""
    return [
        f"{path.relative_to(directory)} was left behind"
        for path in sorted(directory.rglob("*"))
        if path.is_file() and LEFT_BEHIND.search(path.name) and path.parent != but
    ]


def history(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl as anybody may read it: at any moment every line is whole but perhaps the last."""
    try:
        lines = (run / "metrics.jsonl").read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in lines[:-1]]
