"""Transcripts for tests: of rounds of a `Lab`, with whatever a lying coordinator changes of them.

`told(lab)` plays a round and returns its `Story`, the transcript before it is bytes. A test changes the
story, `Story.data` seals it with the coordinator's key, and `checked` is what a third party makes of it.
"""

import hashlib
import io
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np

from covey_coordinator.transcript_command import average
from covey_shared import keys, wire
from covey_shared.messages import Manifest, Message, Result, RoundAbandoned
from covey_shared.transcript import About, Encoder, Ending, Kind, Note
from covey_shared.transcript_checks import Report, Verdict, verify
from covey_shared.wire import Signed
from lab import RUN, Lab, Play


@dataclass
class Story:
    """A round as its coordinator tells it. payloads: by place in the cohort; thinned: those of which
    only the hash is told."""

    lab: Lab
    about: About
    messages: list[Signed[Any]]
    key: bytes | None
    payloads: dict[int, bytes]
    ending: Ending
    model: np.ndarray
    notes: list[Note] = field(default_factory=list)
    thinned: set[int] = field(default_factory=set)

    def but(self, **changes: Any) -> "Story":
        """A copy with some fields changed."""
        other = copy(self)
        for name, value in changes.items():
            setattr(other, name, value)
        return other

    def records(self) -> list[tuple[Kind, bytes]]:
        """Everything but the seal. A payload's body is its place and its bytes."""
        told = [(Kind.ABOUT, wire.body_of(self.about))]
        told += [(Kind.MESSAGE, signed.envelope) for signed in self.messages]
        told += [(Kind.NOTE, wire.body_of(note)) for note in self.notes]
        told += [(Kind.KEY, self.key)] if self.key is not None else []
        for index, payload in sorted(self.payloads.items()):
            if index in self.thinned:
                told.append((Kind.THINNED, bytes((index,)) + hashlib.sha256(payload).digest()))
            else:
                told.append((Kind.PAYLOAD, bytes((index,)) + payload))
        return [*told, (Kind.ENDING, wire.body_of(self.ending))]

    def data(self) -> bytes:
        """The file, sealed with the coordinator's key."""
        return sealed(self.records(), self.lab.coordinator_key)

    def said(self, kind: type[Message]) -> Any:
        """The one message of a kind."""
        (found,) = [s.message for s in self.messages if isinstance(s.message, kind)]
        return found

    def manifest(self) -> Signed[Manifest]:
        """The manifest with its signature."""
        (found,) = [s for s in self.messages if isinstance(s.message, Manifest)]
        return found

    def saying(self, kind: type[Message], **changes: Any) -> "Story":
        """The coordinator says something else there, and signs that."""
        return self.mapped(
            kind,
            lambda s: wire.sign(
                msgspec.structs.replace(s.message, **changes), self.lab.coordinator_key
            ),
        )

    def mapped(
        self, kind: type[Message], change: Callable[[Signed[Any]], Signed[Any] | None]
    ) -> "Story":
        """Messages of a kind changed, or left out for None."""
        changed = [change(s) if isinstance(s.message, kind) else s for s in self.messages]
        return self.but(messages=[s for s in changed if s is not None])

    def average(self) -> np.ndarray:
        """The model that the round truly led to, from the devices' plain updates."""
        head = self.said(Manifest).head
        total = self._completed.encoding.decode_sum(self._completed.ring_sum)
        assert head.n_params == len(self.model)
        following = average(self.about, self.model, total)
        assert following is not None
        return following

    _completed: Any = None


def sealed(records: list[tuple[Kind, bytes]], key: keys.SigningKey) -> bytes:
    """Any records at all, as a file with a good seal."""
    encoder = Encoder()
    data = bytearray(encoder.begin())
    for kind, body in records:
        if kind is Kind.PAYLOAD:
            digest = hashlib.sha256(body[1:]).digest()
            data += encoder.payload(body[0], len(body) - 1, digest) + body[1:]
        else:
            data += encoder.record(kind, body)
    return bytes(data + encoder.seal(key))


def told(lab: Lab, before: Callable[[Play], None] = lambda play: None, round_id: int = 1) -> Story:
    """Play a round, and tell it honestly. before: what happens to the round."""
    model = np.linspace(-1, 1, lab.n_params).astype(np.float32)
    lab.model = digest_of(model)
    play = lab.round(lab.spec(round_id))
    messages: list[Signed[Any]] = []
    play.machine._record = lambda e: messages.append(e) if isinstance(e, Signed) else None
    before(play)
    play.run()
    about = About(
        lab.trust.fleet, RUN, round_id, round_id, lab.trust.ca, lab.trust.coordinator, "fedavg", 1.0
    )
    notes = [Note(fault.device, fault.reason) for fault in play.faults]
    if play.completed is None:
        reason = next(
            (s.message.reason for s in messages if isinstance(s.message, RoundAbandoned)), ""
        )
        return Story(lab, about, messages, None, {}, Ending("abandoned", reason), model, notes)
    cohort = play.machine.cohort
    assert cohort is not None
    payloads = {i: play.uploads[cohort.peers[i].device] for i in play.machine.view}
    story = Story(
        lab,
        about,
        messages,
        play.machine.reveal_secret,
        payloads,
        Ending("completed", ""),
        model,
        notes,
    )
    story._completed = play.completed
    return story.saying(Result, next_model=digest_of(story.average()))


def digest_of(model: np.ndarray) -> bytes:
    return hashlib.sha256(model.astype("<f4").tobytes()).digest()


def checked(data: bytes | Story, *, model: np.ndarray | None = None, **pinned: Any) -> Report:
    """What a third party finds. It knows the fleet's keys and the model, if a story is given."""
    if isinstance(data, Story):
        story = data
        given = {"fleet_ca": story.lab.trust.ca, "coordinator": story.lab.trust.coordinator}
        return checked(
            story.data(), model=story.model if model is None else model, **given | pinned
        )

    def find(digest: bytes, size: int) -> np.ndarray | None:
        return model if model is not None and digest_of(model) == digest else None

    return verify(io.BytesIO(data).read, find_model=find, average=average, **pinned)


def failed(report: Report) -> set[str]:
    """The checks that failed, by name."""
    return {check.name for check in report.checks if check.verdict is Verdict.FAIL}


def passed(report: Report) -> set[str]:
    """The checks that passed, by name."""
    return {check.name for check in report.checks if check.verdict is Verdict.PASS}
