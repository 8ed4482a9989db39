"""A short chaos on real processes; and that its parts do what they say, the checker above all."""

import asyncio
import json
import os
import shutil
import struct
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from chaos import schedule
from chaos.checker import Checker, Said, Verdict, alarms, gather, left_behind
from chaos.device import HEARD, SENT, Log, records
from chaos.observer import PHASES
from chaos.parts import Part
from chaos.proxy import Link
from covey_coordinator.broker import mosquitto
from covey_fleet.witness import Witness
from covey_shared import wire
from covey_shared.messages import (
    MaskedUpdate,
    Result,
    RoundAbandoned,
    ViewVote,
)
from memory_fleet import PLAN, Fleet, go, hasten
from prerequisites import missing

TESTS = Path(__file__).resolve().parents[1]


# -- the real thing, shortly -----------------------------------------------------------------------


def test_every_component_is_killed_once_and_the_run_goes_on(tmp_path: Path) -> None:
    """As `make chaos` has it, with fewer devices and kills alone."""
    if mosquitto.find() is None:
        missing("mosquitto is not installed: apt install mosquitto")
    figures = tmp_path / "figures.json"
    ended = subprocess.run(
        [
            sys.executable, "-m", "chaos", "--rounds", "5", "--devices", "4", "--seed", "4",
            "--only-kills", "--json", str(figures),
        ],
        cwd=TESTS,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )  # fmt: skip
    told = f"{ended.stdout[-6000:]}\n{ended.stderr[-2000:]}"
    assert ended.returncode == 0, told
    found = {row["name"]: row["value"] for row in json.loads(figures.read_bytes())["rows"]}
    assert found["rounds"] == 5, told
    assert found["fewest kills of a component"] == 1, told
    assert found["completed rounds with their sum made again"] >= 1, told


# -- the schedule ----------------------------------------------------------------------------------


def test_a_seed_draws_the_same_faults_again() -> None:
    names = [f"pi-{i}" for i in range(1, 9)]
    assert schedule.draw(5, 200, names) == schedule.draw(5, 200, names)
    assert schedule.draw(5, 200, names) != schedule.draw(6, 200, names)


@pytest.mark.parametrize("seed", range(5))
def test_a_full_run_kills_everything_ten_times_and_in_every_phase(seed: int) -> None:
    names = [f"pi-{i}" for i in range(1, 9)]
    faults = schedule.draw(seed, 200, names)
    kills = Counter(f.target for f in faults if f.kind.startswith("kill"))
    assert min(kills[name] for name in ["coordinator", "broker", *names]) >= 10
    for target in ("coordinator", "broker", *names):
        phases = {f.phase for f in faults if f.target == target and f.kind == "kill"}
        assert phases == set(PHASES), target
    assert {f.kind for f in faults} == {kind.name for kind in schedule.KINDS}
    assert max(f.round for f in faults) <= 200 - schedule.CALM_ROUNDS
    assert [f.round for f in faults] == sorted(f.round for f in faults)


# -- the proxy -------------------------------------------------------------------------------------


async def _echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(100):
        writer.write(data)
    writer.close()


async def _said(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
    writer.write(b"hello")
    async with asyncio.timeout(10):
        return await reader.readexactly(5)


def test_a_link_passes_stalls_delays_cuts_and_refuses() -> None:
    async def scenario() -> None:
        async with await asyncio.start_server(_echo, "127.0.0.1", 0) as server:
            upstream = server.sockets[0].getsockname()
            async with Link("127.0.0.1", upstream) as link:
                reader, writer = await asyncio.open_connection("127.0.0.1", link.port)
                assert await _said(reader, writer) == b"hello"
                link.stall(True)
                writer.write(b"later")
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(reader.read(5), 0.2)
                assert not link.sound
                link.stall(False)
                assert await reader.readexactly(5) == b"later"
                link.delay_s = 0.1
                before = asyncio.get_running_loop().time()
                assert await _said(reader, writer) == b"hello"
                assert asyncio.get_running_loop().time() - before >= 0.2
                link.delay_s = 0.0
                link.cut()
                with pytest.raises(OSError, match="reset"):
                    await reader.read(5)
                link.refusing = True
                reader, writer = await asyncio.open_connection("127.0.0.1", link.port)
                with pytest.raises((OSError, asyncio.IncompleteReadError)):
                    await _said(reader, writer)
                link.refusing = False
                reader, writer = await asyncio.open_connection("127.0.0.1", link.port)
                assert await _said(reader, writer) == b"hello"
                writer.close()
                assert link.sound

    asyncio.run(scenario())


# -- processes -------------------------------------------------------------------------------------


def test_a_part_that_ends_by_itself_is_noticed_and_one_that_is_killed_is_not(
    tmp_path: Path,
) -> None:
    async def scenario() -> None:
        words = [sys.executable, "-c", "print('my last words'); raise SystemExit(3)"]
        frail = Part("frail", words, tmp_path / "frail.log")
        await frail.start()
        async with asyncio.timeout(30):
            while not frail.exits:
                await asyncio.sleep(0.01)
        assert "status 3" in frail.exits[0]
        assert "my last words" in frail.exits[0]
        words = [sys.executable, "-c", "import time; print('up'); time.sleep(99)"]
        strong = Part("strong", words, tmp_path / "strong.log")
        await strong.start()
        strong.stop()
        assert strong.state == "stopped"
        strong.resume()
        await strong.kill()
        assert (strong.exits, strong.kills, strong.pid, strong.state) == ([], 1, None, "down")

    asyncio.run(scenario())


def test_what_a_device_wrote_before_its_death_is_read_without_the_torn_end(tmp_path: Path) -> None:
    path = tmp_path / "pi-1.log"
    log = Log(path)
    log.add(SENT, b"first")
    log.add(HEARD, b"second")
    with path.open("ab") as file:
        file.write(struct.pack("<cdI", SENT, 1.0, 100) + b"torn")
    assert [(r.kind, r.envelope) for r in records(path)] == [(SENT, b"first"), (HEARD, b"second")]


def test_alarms_and_what_was_left_behind(tmp_path: Path) -> None:
    log = tmp_path / "coordinator.log"
    log.write_text(
        "12.3 12:00 all is well\n13.0 Traceback (most recent call last):\n13.0   File x\n"
    )
    assert len(alarms(log)) == 1
    for name in (".state.json.new", ".transcript.part", "state.json"):
        (tmp_path / name).touch()
    assert len(left_behind(tmp_path)) == 2
    assert left_behind(tmp_path, but=tmp_path) == []


# -- the checker must be able to fail --------------------------------------------------------------


class Played:
    """Two rounds that were played in memory, and all that is known of them."""

    def __init__(self, directory: Path, fleet: Fleet) -> None:
        self.directory, self.evidence, self.fleet = directory, directory / "evidence", fleet
        self.run = directory / "runs" / "run"
        self.evidence.mkdir()
        witness = Witness(self.evidence)
        for (number, device), ring in fleet.plain.items():
            witness.of(device)(number, ring)
        self.lines: list[dict[str, Any]] = [
            json.loads(line) for line in (self.run / "metrics.jsonl").read_bytes().splitlines()
        ]
        self.said = gather(fleet.trust, [], self.evidence, self.run)
        for sender, topic, envelope in fleet.network.log:
            if "/presence/" not in topic and "/up/" not in topic and "/blob/" not in topic:
                name = "coordinator" if sender.startswith("coordinator") else sender
                self.said.add(name, envelope)

    def verdict(self) -> Verdict:
        """Of the checker, on all that."""
        return Checker(self.said, self.lines, self.run, self.evidence, PLAN).check()

    def breach(self, words: str) -> bool:
        """Whether the checker says that."""
        return any(words in line for line in self.verdict().broken)

    def message(self, sender: str, kind: type[Any]) -> Any:
        """One of the first round."""
        cohorts = self.said.cohorts
        return next(m for m in self.said.of(sender, kind) if cohorts[m.h].head.round == 1)

    def forge(self, sender: str, message: Any) -> None:
        """Let it have been said."""
        self.said.add(sender, wire.sign(message, self.fleet.key).envelope)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Fleet:
    """Two rounds in memory, once for all tests."""
    directory = tmp_path_factory.mktemp("played")

    async def scenario() -> Fleet:
        async with Fleet(directory) as fleet:
            await fleet.play()
            return fleet

    found: list[Fleet] = []

    async def keep() -> None:
        found.append(await scenario())

    with pytest.MonkeyPatch.context() as monkeypatch:
        hasten(monkeypatch)
        go(keep())
    return found[0]


@pytest.fixture
def played(original: Fleet, tmp_path: Path) -> Played:
    """To be spoilt."""
    directory = tmp_path / "copy"
    shutil.copytree(original.directory, directory)
    return Played(directory, original)


def test_a_sound_run_is_found_sound(played: Played) -> None:
    verdict = played.verdict()
    assert verdict.broken == []
    assert (verdict.completed, verdict.sums_exact, verdict.proved) == (2, 2, 2)
    assert (verdict.sums_wrong, verdict.lost, verdict.repeated) == (0, 0, 0)


def test_one_coordinate_of_one_update_makes_a_sum_wrong(played: Played) -> None:
    path = sorted(played.evidence.glob("2-*.npy"))[0]
    ring = np.load(path)
    ring[7] += 1
    np.save(path, ring)
    verdict = played.verdict()
    assert (verdict.sums_exact, verdict.sums_wrong) == (1, 1)
    assert played.breach("the sum of round 2 is not that of its survivors")


def test_the_sum_is_checked_by_the_model_alone_if_no_result_was_heard(played: Played) -> None:
    voices = played.said.by["coordinator"]
    for envelope, message in list(voices.items()):
        if isinstance(message, Result):
            del voices[envelope]
    assert played.verdict().sums_exact == 2
    path = sorted(played.evidence.glob("1-*.npy"))[0]
    # Far enough for the average of float32 to notice.
    ring = np.load(path)
    ring[7] ^= 0x4000
    np.save(path, ring)
    assert played.verdict().sums_wrong == 1


def test_a_lost_and_a_repeated_round_are_found(played: Played) -> None:
    whole = played.lines
    played.lines = whole[:1]
    assert played.verdict().lost == 1
    played.lines = [*whole, whole[1] | {"index": 3}]
    assert played.verdict().repeated >= 1
    played.lines = [whole[0], whole[1] | {"index": 5}]
    assert played.breach("line 2 of the history is of round 5")


def test_a_round_that_ended_twice_is_found(played: Played) -> None:
    result = played.message("coordinator", Result)
    played.forge(
        "coordinator", RoundAbandoned(result.fleet, result.run, result.round, "of a sudden")
    )
    assert played.breach("round 1 was both completed and abandoned")


def test_a_second_view_a_second_update_and_a_second_contribution_are_found(played: Played) -> None:
    assert played.verdict().broken == []
    vote = played.message("pi-0", ViewVote)
    played.forge("pi-0", msgspec.structs.replace(vote, u3=b"\x07"))
    assert played.breach("pi-0 said 2 different things as a view vote of round 1")
    update = played.message("pi-1", MaskedUpdate)
    played.forge("pi-1", msgspec.structs.replace(update, payload=bytes(32)))
    assert played.breach("pi-1 said 2 different things as a masked update of round 1")
    # The same model in another round, as if its revision had not been raised.
    first, second = (
        c for _, c in sorted(played.said.cohorts.items(), key=lambda e: e[1].head.round)
    )
    played.said.cohorts[second.h] = replace(
        second, head=msgspec.structs.replace(second.head, model=first.head.model)
    )
    assert played.breach("contributed to one model (revision 0) in [1, 2]")


def test_a_model_file_that_is_half_written_is_found(played: Played) -> None:
    path = played.run / "rounds" / "00002" / "model.onnx"
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data[:-100])
    assert played.breach("rounds/00002/model.onnx is not the model of that round")


def test_a_transcript_that_was_touched_is_found(played: Played) -> None:
    path = played.run / "rounds" / "00001" / "transcript"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert played.breach("the transcript of round 1 does not hold")


def test_evidence_of_all_kinds_is_gathered(played: Played) -> None:
    log = Log(played.evidence / "pi-0.log")
    said = played.said
    for envelope in said.by["pi-0"]:
        log.add(SENT, envelope)
    for envelope in said.by["coordinator"]:
        log.add(HEARD, envelope)
    found: Said = gather(played.fleet.trust, [], played.evidence, played.run)
    assert found.by["pi-0"].keys() == said.by["pi-0"].keys()
    assert said.by["coordinator"].keys() <= found.by["coordinator"].keys()
    assert found.cohorts.keys() == said.cohorts.keys()
