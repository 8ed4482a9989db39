"""A round's transcript: the reader, `covey verify`, `covey transcript` and the copy without payloads.

The first byte of an input says whether the seal and all signatures are made anew, as a coordinator that
lies, with its devices, could make them; the rest is the file.
"""

import contextlib
import functools
import io
import random
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from covey_coordinator.transcript_command import average, read_summary, rows_of
from covey_shared import transcript
from covey_shared.errors import LocalProtocolError, RemoteProtocolError
from covey_shared.transcript import MAGIC, Kind, check_seal
from covey_shared.transcript_checks import Verdict, verify
from fuzz import msgpack, program
from fuzz.harness import Mutate, Run, Target, expect
from fuzz.recorded import N_PARAMS, N, Stream, crypto
from lab import Lab, Play
from transcripts import Story, digest_of, sealed, told

Records = list[tuple[int, bytes]]


@functools.cache
def _stories() -> tuple[Story, Story]:
    """A round with a result, of which one payload is thinned, and one without."""
    made = []
    for name in ("completed", "abandoned"):
        lab = Lab(N, seed=name, n_params=N_PARAMS)
        for device, session in lab.sessions.items():
            session._rng = Stream(f"{name} {device}")

        def before(play: Play, name: str = name) -> None:
            play.machine._rng = Stream(name)
            play.on_train = lambda device: name == "completed" and device != lab.names[-1]  # noqa: B023

        made.append(told(lab, before))
    return made[0], made[1]


def _records(data: bytes) -> Records | None:
    """Kinds and bodies, whatever they are; None for what has not the form of records."""
    if not data.startswith(MAGIC):
        return None
    records: Records = []
    at = len(MAGIC)
    while at + 5 <= len(data):
        size = int.from_bytes(data[at + 1 : at + 5], "big")
        if at + 5 + size > len(data):
            return None
        records.append((data[at], data[at + 5 : at + 5 + size]))
        at += 5 + size
    return records


def _written(records: Records) -> bytes:
    made = bytearray(MAGIC)
    for kind, body in records:
        made += bytes((kind,)) + len(body).to_bytes(4, "big") + body
    return bytes(made)


def _resealed(data: bytes, lab: Lab, key_of: msgpack.KeyOf | None) -> bytes:
    """With good signatures on all messages, if there are keys, and with a good seal."""
    records = _records(data)
    if records is None:
        return data
    told: list[tuple[Kind, bytes]] = []
    for kind, body in records:
        if kind == Kind.SEAL:
            continue
        if kind not in Kind._value2member_map_ or (kind == Kind.PAYLOAD and len(body) < 2):
            return data
        if kind == Kind.MESSAGE and key_of is not None:
            body = msgpack.resealed(body, key_of)
        if kind == Kind.THINNED and len(body) != 33:
            return data
        told.append((Kind(kind), body))
    try:
        return sealed(told, lab.coordinator_key)
    except LocalProtocolError:  # a record that is too long to be written
        return data


def _outcome(read: Callable[[], None]) -> str:
    try:
        read()
    except RemoteProtocolError as error:
        return str(error)
    return "well"


class _Judge:
    def __init__(self, folder: Path) -> None:
        self.path = folder / "round.transcript"
        self.stories = _stories()

    def __call__(self, data: bytes) -> list[str]:
        if not data:
            return []
        story = self.stories[data[0] >> 2 & 1]
        mode, file = data[0] & 3, data[1:]
        if mode:
            everybody = program.everybody(story.lab) if mode == 1 else None
            file = _resealed(file, story.lab, everybody)
        trail = [f"{mode} {_outcome(lambda: self.read(file, story))}"]
        trail += self.verify(file, story)
        trail.append(_outcome(lambda: self.show(file)))
        return trail

    def read(self, file: bytes, story: Story) -> None:
        """Record by record; payloads are taken in half, the rest is skipped."""
        whole = io.BytesIO(file)
        reader = transcript.Reader(whole.read)
        for record in reader:
            if isinstance(record, transcript.Payload):
                next(record.chunks, None)
        expect(reader.offset <= len(file), "read beyond the file")
        check_seal(reader, story.lab.trust.coordinator)

    def verify(self, file: bytes, story: Story) -> list[str]:
        """A third party, with the model and the fleet's keys at hand."""
        report = self.report(file, story)
        expect(bool(report.checks), "a report without checks")
        for check in report.checks:
            expect(
                check.detail.isprintable() and len(check.detail) < 4096, "a detail that is no line"
            )
        thin = bytearray()
        if _outcome(lambda: transcript.thinned(io.BytesIO(file).read, thin.extend)) == "well":
            expect(len(thin) <= len(file) + 33 * 256, "thinner is not longer")
            again = self.report(bytes(thin), story)
            # The seal stands without the payloads, or never stood.
            if report.verdict("whole") is Verdict.PASS:
                expect(again.verdict("whole") is Verdict.PASS, "thinning broke the seal")
        return [f"{check.name} {check.verdict.value} {check.detail}" for check in report.checks]

    def report(self, file: bytes, story: Story):  # type: ignore[no-untyped-def]
        model = story.model

        def find(digest: bytes, size: int) -> np.ndarray | None:
            return model if digest_of(model) == digest else None

        trust = story.lab.trust
        return verify(
            io.BytesIO(file).read,
            find_model=find,
            average=average,
            fleet_ca=trust.ca,
            coordinator=trust.coordinator,
        )

    def show(self, file: bytes) -> None:
        """`covey transcript`."""
        self.path.write_bytes(file)
        for what, text in rows_of(read_summary(self.path)):
            expect(bool(what) and text.isprintable(), "a row that is none")


@contextlib.contextmanager
def ready() -> Iterator[Run]:
    """Rounds were told."""
    memory = Path("/dev/shm")
    with (
        crypto(),
        tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder,
    ):
        yield _Judge(Path(folder))


def _mutate(data: bytes, longest: int, chance: random.Random, mutate: Mutate) -> bytes:
    """A record changed, left out, doubled or exchanged with another."""
    records = _records(data[1:])
    if not records or chance.random() < 0.05:
        return mutate(data, longest)
    head = data[:1] if chance.random() < 0.9 else bytes((chance.randrange(8),))
    at, other = chance.randrange(len(records)), chance.randrange(len(records))
    kind, body = records[at]
    match chance.randrange(10):
        case 0:
            del records[at]
        case 1:
            records.insert(other, records[at])
        case 2:
            records[at], records[other] = records[other], records[at]
        case 3:
            records[at] = (chance.randrange(1, 10), body)
        case _ if kind == Kind.MESSAGE:
            records[at] = (kind, msgpack.mutated_envelope(body, chance, mutate, 8000))
        case _ if kind in (Kind.ABOUT, Kind.NOTE, Kind.ENDING):
            records[at] = (kind, msgpack.mutated_body(body, chance, mutate, 2000))
        case _:
            records[at] = (kind, mutate(body, 200))
    made = head + _written(records)
    return made if len(made) <= longest else data


def _seeds() -> Iterator[bytes]:
    with crypto():
        completed, abandoned = _stories()
        thin = completed.but(thinned={min(completed.payloads)})
        for mode in range(4):
            yield bytes((mode,)) + completed.data()
            yield bytes((mode,)) + thin.data()
            yield bytes((4 | mode,)) + abandoned.data()
        records = completed.records()
        for n in range(1, len(records), 3):  # cut off, with a seal all the same
            yield b"\x02" + sealed(records[:n], completed.lab.coordinator_key)
        yield b"\x00" + MAGIC + b"\x05\xff\xff\xff\xff\x00"
        yield b"\x00" + MAGIC + b"\x02\xff\xff\xff\xff\x00"


def _memory(n: int) -> int:
    # One chunk as it is read, whatever its record claims; of `verify`, the messages as objects, and the
    # vectors of a sum: eight bytes for each of the elements that payloads hold, of one bit at least.
    return 2 * transcript.CHUNK_BYTES + 256 * 1024 + 200 * n


TARGET = Target(
    "transcript",
    ready,
    memory=_memory,
    seeds=_seeds,
    mutate=_mutate,
    longest=24 * 1024,
)
