"""Transcripts of whole rounds, as the coordinator's service writes them, with all that goes wrong."""

import asyncio
import errno
import hashlib
import io
import logging
import os
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from click.testing import CliRunner

import covey_coordinator.transcript
from covey_coordinator.averaging import FedAvg
from covey_coordinator.blobs import UploadDesk
from covey_coordinator.cli import main
from covey_coordinator.config import TranscriptsConfig
from covey_coordinator.run import Run
from covey_coordinator.store import FILE, RunDirectory, Store
from covey_coordinator.transcript import MODEL_BEFORE, PART, RoundScribe, Scribe, thin
from covey_coordinator.transcript_command import Models, average
from covey_shared import chunks, keys, wire
from covey_shared.chunks import BlobDigest
from covey_shared.errors import CoveyError, TrainingError
from covey_shared.messages import (
    Decline,
    DeviceId,
    MaskedUpdate,
    Reveal,
    RosterVote,
    RoundCall,
    Shares,
    ViewVote,
)
from covey_shared.secagg.cohort import Trust
from covey_shared.transcript import MAGIC, Payload, Reader
from covey_shared.transcript_checks import Report, Verdict, verify
from lab import Lab
from memory_fleet import TOPICS, Fleet, config, go, hasten, short
from memory_transport import Delivery, Network
from transcripts import failed, passed, told

KEY = keys.SigningKey(bytes(range(32)))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    hasten(monkeypatch)


def report_of(path: Path, trust: Trust | None = None) -> Report:
    """Everything beside the transcript is taken into account, as `covey verify` does."""
    with path.open("rb") as file:
        return verify(
            file.read,
            fleet_ca=trust.ca if trust else None,
            coordinator=trust.coordinator if trust else None,
            find_model=Models(path, ()).find,
            average=average,
        )


def rounds(run: Run) -> Path:
    return run.directory.path / "rounds"


def files(directory: Path) -> list[str]:
    """All files below, by their relative names."""
    return sorted(str(p.relative_to(directory)) for p in directory.rglob("*") if p.is_file())


def payloads_in(path: Path) -> int:
    with path.open("rb") as file:
        return sum(isinstance(record, Payload) for record in Reader(file.read))


# -- whole rounds ----------------------------------------------------------------------------------


def test_every_round_of_a_run_is_proven(tmp_path: Path):
    async def scenario() -> None:
        async with Fleet(tmp_path) as fleet:
            run = fleet.run(config(rounds=3, server_lr=0.7))
            state = await fleet.play(run)
            assert (state.rounds_completed, state.transcripts_lost) == (3, 0)
            for index in (1, 2, 3):
                directory = rounds(run) / f"{index:05}"
                assert files(directory) == [
                    MODEL_BEFORE,
                    "model.onnx",
                    "parameters.bin",
                    "transcript",
                ]
                assert (directory / "transcript").stat().st_mode & 0o777 == 0o600
                report = report_of(directory / "transcript", fleet.trust)
                assert report.complete, report.checks
                assert report.about is not None
                assert (report.about.index, report.about.server_lr) == (index, 0.7)
                assert payloads_in(directory / "transcript") == 4
            final = (run.directory.path / "parameters.bin").read_bytes()
            assert hashlib.sha256(final).digest() == report.next_model
            assert files(run.directory.spool) == []
            assert all("transcripts_lost" not in line for line in run.directory.read_metrics())

    go(scenario())


@pytest.mark.parametrize("kind", [Shares, RosterVote, MaskedUpdate, ViewVote, Reveal])
def test_a_device_that_vanishes_at_any_message(tmp_path: Path, kind: Any):
    """Whatever it says from then on is lost."""
    gone: list[str] = []

    def tamper(delivery: Delivery) -> Iterable[Delivery]:
        mine = delivery.topic in (TOPICS.outbox("pi-1"), TOPICS.upload("pi-1"))
        if mine and delivery.incoming.payload[1:2] == bytes((kind.CODE,)):
            gone.append(delivery.topic)
        return () if mine and gone else (delivery,)

    async def scenario() -> None:
        network = Network()
        async with Fleet(tmp_path, n=5, network=network) as fleet:
            network.tamper = tamper
            settings = config(
                rounds=1, n=5, deadlines=short(share_s=3.0, collect_s=4.0, unmask_s=3.0)
            )
            run = fleet.run(settings)
            state = await fleet.play(run)
            assert state.rounds_completed == 1
            assert gone
            report = report_of(rounds(run) / "00001" / "transcript", fleet.trust)
            assert report.complete, report.checks
            assert report.devices == 5
            assert report.summed == (5 if kind in (ViewVote, Reveal) else 4)

    go(scenario())


def test_the_update_that_came_too_late_is_nowhere(tmp_path: Path):
    """It was announced and is on its way when the view is proposed: the rest of it is thrown away,
    and nothing of it is on the disk after that."""
    held: list[Delivery] = []
    seen: list[list[str]] = []

    def tamper(delivery: Delivery) -> Iterable[Delivery]:
        if delivery.topic == TOPICS.upload("pi-2"):
            held.append(delivery)
            return ()
        return (delivery,)

    async def scenario() -> None:
        network = Network()
        async with Fleet(tmp_path, n=5, network=network) as fleet:
            network.tamper = tamper
            run = fleet.run(config(rounds=1, n=5, deadlines=short(collect_s=1.0)))

            def on_event(event: Any) -> None:
                if getattr(event, "phase", None) is not None and str(event.phase).endswith(
                    "UNMASK"
                ):
                    play = fleet.coordinator._play
                    assert play is not None
                    desk = play._desk
                    for delivery in held:
                        assert not desk.feed(DeviceId("pi-2"), delivery.incoming.payload, 0.0)
                    seen.append(files(run.directory.spool))

            fleet.on_event = on_event
            state = await fleet.play(run)
            assert state.rounds_completed == 1
            assert held
            assert seen == [[f"pi-{i}" for i in (0, 1, 3, 4)]]
            path = rounds(run) / "00001" / "transcript"
            report = report_of(path, fleet.trust)
            assert report.complete
            assert report.summed == 4
            assert files(run.directory.spool) == []
            # The payload itself, whatever chunk it comes in, is in no file of the run.
            late = chunks.decode_frame(held[0].incoming.payload).data
            for name in files(run.directory.path):
                assert bytes(late[:64]) not in (run.directory.path / name).read_bytes(), name

    go(scenario())


def test_an_abandoned_round_says_how_far_it_came(tmp_path: Path):
    def tamper(delivery: Delivery) -> Iterable[Delivery]:
        return () if delivery.incoming.payload[1:2] == bytes((ViewVote.CODE,)) else (delivery,)

    async def scenario() -> None:
        network = Network()
        async with Fleet(tmp_path, network=network) as fleet:
            network.tamper = tamper
            run = fleet.run(config(rounds=1, deadlines=short(unmask_s=0.5)))
            state = await fleet.play(run)
            assert state.rounds_abandoned == 1
            assert files(rounds(run)) == ["00001/transcript"]
            report = report_of(rounds(run) / "00001" / "transcript", fleet.trust)
            assert not report.failed, report.checks
            assert report.ending is not None
            assert report.ending.outcome == "abandoned"
            assert "confirmed the view" in report.ending.reason
            assert {"whole", "call", "cohort", "shares", "roster", "updates"} <= passed(report)
            assert report.verdict("view") is Verdict.NOT_CHECKED
            assert payloads_in(rounds(run) / "00001" / "transcript") == 0
            assert files(run.directory.spool) == []

    go(scenario())


def test_a_sum_that_cannot_be_used_is_not_kept(tmp_path: Path):
    class Broken(FedAvg):
        def step(self, parameters: Any, total: Any) -> Any:
            raise TrainingError("the averaged model is not finite")

    async def scenario() -> None:
        async with Fleet(tmp_path) as fleet:
            run = fleet.run(config(rounds=1))
            run._strategy = Broken()
            state = await fleet.play(run)
            assert state.rounds_abandoned == 1
            path = rounds(run) / "00001" / "transcript"
            report = report_of(path, fleet.trust)
            assert not report.failed, report.checks
            assert report.ending is not None
            assert report.ending.reason == "the averaged model is not finite"
            assert payloads_in(path) == 0
            assert files(run.directory.spool) == []

    go(scenario())


# -- how much is kept ------------------------------------------------------------------------------


def test_signatures_only(tmp_path: Path):
    async def scenario() -> None:
        async with Fleet(tmp_path) as fleet:
            run = fleet.run(config(rounds=1, transcripts=TranscriptsConfig(keep="signatures")))
            await fleet.play(run)
            assert files(rounds(run) / "00001") == ["model.onnx", "parameters.bin", "transcript"]
            report = report_of(rounds(run) / "00001" / "transcript", fleet.trust)
            assert not report.failed, report.checks
            assert report.verdict("sum") is Verdict.NOT_CHECKED
            assert {"view", "secrets", "result"} <= passed(report)

    go(scenario())


def test_off(tmp_path: Path):
    async def scenario() -> None:
        async with Fleet(tmp_path) as fleet:
            run = fleet.run(config(rounds=1, transcripts=TranscriptsConfig(keep="off")))
            state = await fleet.play(run)
            assert files(rounds(run) / "00001") == ["model.onnx", "parameters.bin"]
            assert state.transcripts_lost == 0

    go(scenario())


def test_older_rounds_are_thinned(tmp_path: Path):
    async def scenario() -> None:
        async with Fleet(tmp_path) as fleet:
            run = fleet.run(config(rounds=4, transcripts=TranscriptsConfig(full_rounds=2)))
            await fleet.play(run)
            kept = {i: payloads_in(rounds(run) / f"{i:05}" / "transcript") for i in (1, 2, 3, 4)}
            assert kept == {1: 0, 2: 0, 3: 4, 4: 4}
            for index, full in kept.items():
                report = report_of(rounds(run) / f"{index:05}" / "transcript", fleet.trust)
                assert not report.failed, report.checks
                assert report.complete == (full > 0)
                assert (rounds(run) / f"{index:05}" / MODEL_BEFORE).exists() == (full > 0)

    go(scenario())


def a_run(tmp_path: Path, **settings: Any) -> tuple[RunDirectory, Scribe]:
    directory = RunDirectory.create(tmp_path / "run", b"", bytes(16), Store.in_memory())
    trust = Trust("lab", KEY.public, KEY.public)
    return directory, Scribe(directory, TranscriptsConfig(**settings), trust, KEY)


def full_round(directory: RunDirectory, index: int, size: int = 1000) -> Path:
    """A round with a whole transcript, and a model of some size beside it."""
    path = directory.path / "rounds" / f"{index:05}"
    path.mkdir(parents=True)
    story = told(Lab(3, seed="kept"))
    (path / "transcript").write_bytes(story.data())
    (path / MODEL_BEFORE).write_bytes(bytes(size))
    return path


def test_transcripts_take_no_more_than_is_allowed(tmp_path: Path):
    directory, scribe = a_run(tmp_path, max_mb=2)
    paths = [full_round(directory, index, 900_000) for index in (1, 2, 3)]
    scribe.tidy()
    assert [(path / MODEL_BEFORE).exists() for path in paths] == [False, True, True]
    assert [payloads_in(path / "transcript") for path in paths] == [0, 3, 3]


def test_a_transcript_that_cannot_be_thinned_is_left_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    directory, scribe = a_run(tmp_path, full_rounds=1)
    paths = [full_round(directory, index) for index in (1, 2)]
    (paths[0] / "transcript").write_bytes(b"damaged")
    with caplog.at_level(logging.ERROR):
        scribe.tidy()
    assert "keeps its masked updates" in caplog.text
    assert files(paths[0]) == [MODEL_BEFORE, "transcript"]
    with pytest.raises(CoveyError):
        thin(paths[0])


# -- what disks do ---------------------------------------------------------------------------------


def full_disk(*args: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("after", [0, 5, 22])
def test_a_transcript_that_cannot_be_written_costs_no_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, after: int
):
    real, written = covey_coordinator.transcript.write_all, [0]

    def write_all(file: Any, data: bytes) -> None:
        written[0] += 1
        if written[0] > after:
            full_disk()
        real(file, data)

    monkeypatch.setattr(covey_coordinator.transcript, "write_all", write_all)

    async def scenario() -> None:
        async with Fleet(tmp_path) as fleet:
            run = fleet.run(config(rounds=2))
            state = await fleet.play(run)
            assert state.rounds_completed == 2
            assert state.transcripts_lost == 2
            assert "No space left on device; free some space" in state.transcript_problem
            assert run.directory.state() == state
            assert files(rounds(run)) == [
                f"{index:05}/{name}"
                for index in (1, 2)
                for name in ("model.onnx", "parameters.bin")
            ]
            assert files(run.directory.spool) == []
            first, second = run.directory.read_metrics()
            assert "transcripts_lost" not in first
            assert second["transcripts_lost"] == 1

    with caplog.at_level(logging.ERROR):
        go(scenario())
    assert caplog.text.count("no transcript of this round: cannot write") == 2


def test_status_says_that_transcripts_are_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert CliRunner().invoke(main, ["init", str(tmp_path / "farm")]).exit_code == 0
    with Store.open(tmp_path / "farm" / FILE) as store:
        run = RunDirectory.create(tmp_path / "farm" / "runs" / "first", b"", bytes(16), store)
        state = run.state()
        state.transcripts_lost, state.transcript_problem = 3, "cannot write it: the disk is full"
        run.save_state(state)
    result = CliRunner().invoke(main, ["status", "--fleet-dir", str(tmp_path / "farm")])
    assert "3 rounds without a transcript: cannot write it: the disk is full" in result.output


def test_a_nearly_full_disk_keeps_the_signatures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(covey_coordinator.transcript, "RESERVE_BYTES", 2**60)

    async def scenario() -> None:
        async with Fleet(tmp_path) as fleet:
            run = fleet.run(config(rounds=1))
            state = await fleet.play(run)
            assert (state.rounds_completed, state.transcripts_lost) == (1, 0)
            path = rounds(run) / "00001" / "transcript"
            assert payloads_in(path) == 0
            report = report_of(path, fleet.trust)
            assert not report.failed
            assert "result" in passed(report)

    go(scenario())
    assert "goes without masked updates" in caplog.text


def test_a_state_that_cannot_be_saved_thins_what_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    real, refused = os.fsync, []

    def fsync(fd: int) -> None:
        if fleet_run and "parameters.bin" in str(Path(f"/proc/self/fd/{fd}").readlink()):
            kept = list(rounds(fleet_run[0]).glob(f"*/{MODEL_BEFORE}"))
            if kept:
                refused.append(len(kept))
                full_disk()
        real(fd)

    fleet_run: list[Run] = []

    async def scenario() -> None:
        async with Fleet(tmp_path) as fleet:
            run = fleet.run(config(rounds=2))
            fleet_run.append(run)
            monkeypatch.setattr(covey_coordinator.files.os, "fsync", fsync)
            state = await fleet.play(run)
            assert state.rounds_completed == 2
            assert refused == [1]
            assert state.transcripts_lost == 1
            # The second round's went to make room, and of the first the signatures are left.
            assert files(rounds(run)) == [
                "00001/model.onnx",
                "00001/parameters.bin",
                "00001/transcript",
                "00002/model.onnx",
                "00002/parameters.bin",
            ]
            assert not report_of(rounds(run) / "00001" / "transcript", fleet.trust).failed

    go(scenario())


# -- being stopped ---------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", ["gather", "share", "roster", "collect", "view", "unmask"])
def test_a_round_that_was_stopped_and_taken_up_has_one_transcript(tmp_path: Path, phase: str):
    async def scenario() -> None:
        async with Fleet(tmp_path) as fleet:
            playing = asyncio.create_task(fleet.play(fleet.run(config(rounds=1))))
            await fleet.phase(phase)
            playing.cancel()
            await asyncio.wait({playing})
            assert playing.cancelled()
            await fleet.coordinator.close()
            run = fleet.run(config(rounds=1))
            if run.state.rounds_done:
                # It was quicker than we, and the round was over: then its transcript is whole, or ends
                # where the coordinator was stopped.
                Scribe(run.directory, TranscriptsConfig(), fleet.trust, fleet.key).recover()
                assert not report_of(rounds(run) / "00001" / "transcript", fleet.trust).failed
                return
            fleet.coordinator = fleet.make_coordinator()
            await fleet.coordinator.start()
            state = await fleet.play(run)
            assert state.rounds_completed == 1
            directory = rounds(run) / "00001"
            assert "transcript" in files(directory)
            assert "transcript-1" not in files(directory)
            report = report_of(directory / "transcript", fleet.trust)
            assert report.complete, report.checks
            assert payloads_in(directory / "transcript") == 4
            assert files(run.directory.spool) == []

    go(scenario())


STORY = told(Lab(4, seed="killed"))


@pytest.mark.parametrize("share", [0.0, 0.001, 0.05, 0.3, 0.6, 0.8, 0.95, 0.9999])
def test_a_transcript_is_brought_to_an_end_wherever_it_was_cut_off(tmp_path: Path, share: float):
    lab = STORY.lab
    directory = RunDirectory.create(tmp_path / "run", b"", bytes(16), Store.in_memory())
    scribe = Scribe(directory, TranscriptsConfig(), lab.trust, lab.coordinator_key)
    part = directory.path / "rounds" / "00001" / PART
    part.parent.mkdir(parents=True)
    whole = STORY.data()
    part.write_bytes(whole[: int(share * len(whole))])
    (part.parent / MODEL_BEFORE).write_bytes(b"left over")
    scribe.recover()
    assert files(part.parent) == (["transcript"] if share >= 0.05 else [])
    if share < 0.05:
        return
    path = part.parent / "transcript"
    report = report_of(path, lab.trust)
    assert not report.failed, report.checks
    assert report.ending is not None
    assert report.ending.outcome == "interrupted"
    assert payloads_in(path) == 0
    assert STORY.key is not None
    assert STORY.key not in path.read_bytes()


@pytest.mark.parametrize("outcome", ["completed", "abandoned"])
def test_a_sealed_transcript_only_lacked_its_name(tmp_path: Path, outcome: str):
    directory, scribe = a_run(tmp_path)
    lab = STORY.lab
    part = directory.path / "rounds" / "00001" / PART
    path = part.with_name("transcript")
    if outcome == "completed":
        scribe = Scribe(directory, TranscriptsConfig(), lab.trust, lab.coordinator_key)
        part.parent.mkdir(parents=True)
        path.write_bytes(STORY.data())
    else:
        scribe.open(1, lab.call(), "fedavg", 1.0).ended("too few")
    data = path.read_bytes()
    path.replace(part)
    scribe.recover()
    assert files(part.parent) == ["transcript"]
    assert path.read_bytes() == data


def test_a_transcript_that_was_cut_off_in_its_seal_has_one_ending(tmp_path: Path):
    directory, scribe = a_run(tmp_path)
    scribe.open(1, Lab(3).call(), "fedavg", 1.0).ended("too few")
    path = directory.path / "rounds" / "00001" / "transcript"
    path.with_name(PART).write_bytes(path.read_bytes()[:-3])
    path.unlink()
    scribe.recover()
    report = report_of(path)
    assert not report.failed, report.checks
    assert report.ending is not None
    assert report.ending.outcome == "interrupted"


def test_a_part_that_is_no_transcript_is_removed(tmp_path: Path):
    directory, scribe = a_run(tmp_path)
    part = directory.path / "rounds" / "00003" / PART
    part.parent.mkdir(parents=True)
    for data in (b"", MAGIC, b"something else altogether", MAGIC + b"\xff" * 100):
        part.write_bytes(data)
        scribe.recover()
        assert files(part.parent) == []


# -- bounds ----------------------------------------------------------------------------------------


def test_who_declines_for_ever_does_not_fill_the_transcript(tmp_path: Path):
    directory, scribe = a_run(tmp_path)
    lab = Lab(3)
    writer = scribe.open(1, lab.call(), "fedavg", 1.0)
    for i in range(3000):
        writer.message(wire.sign(Decline("lab", lab.call().run, 1, lab.names[0], str(i)), KEY))
        writer.note(lab.names[0], "again")
    writer.ended("enough")
    path = directory.path / "rounds" / "00001" / "transcript"
    assert path.stat().st_size < 512 * 300
    assert not failed(report_of(path))


def test_what_a_device_says_does_not_break_the_transcript(tmp_path: Path):
    directory, scribe = a_run(tmp_path)
    writer = scribe.open(1, Lab(3).call(), "fedavg", 1.0)
    writer.note(DeviceId("pi-1"), "\x1b[31m" + "x" * 5000)
    writer.ended("\x1b]0;" + "y" * 5000)
    assert writer.problem is None
    data = (directory.path / "rounds" / "00001" / "transcript").read_bytes()
    assert b"\x1b" not in data
    assert not failed(report_of(directory.path / "rounds" / "00001" / "transcript"))


def test_without_a_transcript_nothing_is_done(tmp_path: Path):
    writer = RoundScribe(None, None, KEY)
    call = wire.sign(Lab(3).call(), KEY)
    assert isinstance(call.message, RoundCall)
    writer.message(call)
    writer.note(DeviceId("pi-1"), "x")
    writer.ended("x")
    writer.give_up("x")
    writer.leave()
    assert writer.problem is None
    assert files(tmp_path) == []


def test_what_comes_after_the_view_is_thrown_away(tmp_path: Path):
    data = os.urandom(300_000)
    frames = list(chunks.split(chunks.blob_of(data)))
    digest = BlobDigest(hashlib.sha256(data).digest())
    desk = UploadDesk(tmp_path / "spool")
    desk.open()
    desk.expect(DeviceId("pi-1"), b"h" * 32, digest, len(data), 0.0)
    desk.feed(DeviceId("pi-1"), frames[0], 0.0)
    assert files(tmp_path / "spool") == ["pi-1"]
    desk.shut(kept=())
    assert files(tmp_path / "spool") == []
    assert [desk.feed(DeviceId("pi-1"), frame, 0.0) for frame in frames] == [False] * len(frames)
    assert not desk.expect(DeviceId("pi-2"), b"h" * 32, digest, len(data), 0.0)
    assert not desk._early
    assert files(tmp_path / "spool") == []
    desk.open()
    desk.expect(DeviceId("pi-1"), b"h" * 32, digest, len(data), 0.0)
    assert [desk.feed(DeviceId("pi-1"), frame, 0.0) for frame in frames][-1]


def test_a_transcript_is_the_same_on_every_machine():
    """The averaging is made of single IEEE operations, in an order that is fixed: this one's bits are
    known. Were they others on some machine, transcripts would not verify there."""
    story = told(Lab(5, seed="bits", n_params=1000))
    chosen = story.average()
    total = story._completed.encoding.decode_sum(story._completed.ring_sum)
    by_hand = []
    clip, bits = story._completed.encoding.clip, story._completed.encoding.bits
    ring = [int(v) & ((1 << bits) - 1) for v in story._completed.ring_sum]
    signed = [v - (1 << bits) if v >> (bits - 1) else v for v in ring]
    factor = clip / signed[1000]
    for before, q in zip(story.model, signed[:1000], strict=True):
        mean = np.float32(float(q) * factor)
        by_hand.append(np.float32(before + np.float32(np.float32(1.0) * mean)))
    assert chosen.tobytes() == np.array(by_hand, np.float32).tobytes()
    assert total.average.dtype == np.float32


def test_the_reader_needs_no_seeking():
    """A transcript may come through a pipe."""
    data = STORY.data()
    stream = io.BytesIO(data)
    report = verify(partial(stream.read))
    assert not report.failed
    assert isinstance(msgspec.to_builtins(report.ending), list)
