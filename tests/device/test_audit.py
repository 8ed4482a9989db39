"""The audit log: a chain that shows changes, survives power cuts and full disks, tells what left."""

import asyncio
import errno
import hashlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import covey_device.audit
from covey_device.audit import (
    FILE,
    MAX_TEXT_CHARS,
    REFUSALS_PER_HOUR,
    Audit,
    AuditLog,
    BrokenChainError,
    Verdict,
    lines_of,
    note,
    put_away,
    verify,
)
from covey_device.audit_words import stories, told
from covey_device.config import PolicyConfig, PolicyFile
from covey_device.policy import Policy
from covey_device.session import Publish
from covey_shared import wire
from covey_shared.errors import LocalProtocolError, StorageError, TrainingError
from covey_shared.messages import Decline, MaskedUpdate
from lab import RUN, Lab
from memory_fleet import TOPICS, Fleet, config, go, hasten, short


def entries(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for _, line in lines_of(directory)]


def kinds(directory: Path) -> list[str]:
    return [entry["kind"] for entry in entries(directory)]


def filled(directory: Path, count: int = 5, **options: Any) -> AuditLog:
    log = AuditLog(directory, clock=lambda: 1_800_000_000.0, **options)
    for number in range(count):
        log.append("note", {"number": number})
    return log


# -- the chain -------------------------------------------------------------------------------------


def test_lines_are_chained_and_their_owner_s_alone(tmp_path: Path):
    before = os.umask(0)
    try:
        filled(tmp_path)
    finally:
        os.umask(before)
    assert (tmp_path / FILE).stat().st_mode & 0o777 == 0o600
    assert [(e["n"], e["number"]) for e in entries(tmp_path)] == [(i + 1, i) for i in range(5)]
    assert entries(tmp_path)[0]["at"] == "2027-01-15T08:00:00Z"
    verdict = verify(tmp_path)
    assert verdict == Verdict(1, 5, verdict.last_hash, False)
    assert verify(tmp_path / "none") is None


LINES = 6


@settings(max_examples=40)
@given(data=st.data())
def test_any_change_shows(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject):
    """One byte changed, one line taken out, put in twice or swapped with another."""
    directory = tmp_path_factory.mktemp("audit")
    filled(directory, LINES)
    path = directory / FILE
    lines = path.read_bytes().splitlines(keepends=True)
    what = data.draw(st.sampled_from(["byte", "without", "twice", "swapped", "end"]))
    at = data.draw(st.integers(0, LINES - 2))
    match what:
        case "byte":
            place = data.draw(st.integers(0, len(lines[at]) - 1))
            changed = bytearray(lines[at])
            changed[place] = data.draw(st.integers(0, 255).filter(lambda b: b != changed[place]))
            lines[at] = bytes(changed)
        case "without":
            del lines[at]
            if at == 0:
                lines[0:0] = [b""]
        case "twice":
            lines.insert(at, lines[at])
        case "swapped":
            lines[at], lines[at + 1] = lines[at + 1], lines[at]
        case "end":
            lines[at] = lines[at].rstrip(b"\n")
    path.write_bytes(b"".join(lines))
    if what == "without" and at == 0:
        assert verify(directory).first == 2  # which is what it says
        return
    with pytest.raises(
        BrokenChainError, match=r"audit\.jsonl, (after entry \d+|at its beginning): "
    ):
        verify(directory)


def test_the_whole_rewritten_shows_by_its_last_hash_alone(tmp_path: Path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    filled(tmp_path / "a")
    filled(tmp_path / "b", 4).append("note", {"number": 99})
    one, other = verify(tmp_path / "a"), verify(tmp_path / "b")
    assert (one.first, one.last) == (other.first, other.last)
    assert one.last_hash != other.last_hash


def test_it_goes_on_where_it_ended(tmp_path: Path):
    filled(tmp_path, 3)
    filled(tmp_path, 2)
    assert [e["n"] for e in entries(tmp_path)] == [1, 2, 3, 4, 5]
    assert verify(tmp_path).last == 5


def test_facts_are_what_they_were(tmp_path: Path):
    log = AuditLog(tmp_path)
    facts = {"key": b"\xab\xcd", "file": "r\udcffsum", "many": (b"\x01", 2), "text": "x" * 5000}
    log.append("note", facts)
    [entry] = entries(tmp_path)
    assert entry["key"] == "abcd"
    assert entry["file"] == "r?sum"
    assert entry["many"] == ["01", 2]
    assert entry["text"] == "x" * MAX_TEXT_CHARS
    for name in ("n", "at", "kind", "before"):
        with pytest.raises(LocalProtocolError, match=f"cannot have a fact named {name}"):
            log.append("note", {name: 1})
    with pytest.raises(LocalProtocolError, match="are about rounds"):
        Audit(log).note("joined", round=7)


# -- power cuts ------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(data=st.data())
def test_a_torn_last_line_is_dropped_and_told(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
):
    """What a power cut leaves: any beginning of the last line, or as many zeros."""
    directory = tmp_path_factory.mktemp("audit")
    filled(directory, 3)
    path = directory / FILE
    whole = path.read_bytes()
    start = whole[:-1].rfind(b"\n") + 1
    cut = data.draw(st.integers(start + 1, len(whole) - 1))
    torn = whole[start:cut]
    if data.draw(st.booleans()):
        torn = bytes(len(torn))
    path.write_bytes(whole[:start] + torn)
    verdict = verify(directory)
    assert (verdict.last, verdict.unfinished) == (2, True)
    AuditLog(directory).append("note", {"number": "after"})
    assert kinds(directory) == ["note", "note", "repaired", "note"]
    assert entries(directory)[2]["dropped_bytes"] == len(torn)
    assert verify(directory).last == 4


def test_a_first_line_that_is_torn(tmp_path: Path):
    (tmp_path / FILE).write_bytes(b'{"n":1,"at')
    assert verify(tmp_path) is None
    filled(tmp_path, 1)
    assert kinds(tmp_path) == ["repaired", "note"]
    assert verify(tmp_path).first == 1


def test_a_damaged_line_is_kept_and_named(tmp_path: Path):
    filled(tmp_path, 3)
    path = tmp_path / FILE
    path.write_bytes(path.read_bytes()[:-10] + b"garbage!!\n")
    filled(tmp_path, 1)
    assert [line[-10:] for _, line in lines_of(tmp_path)][2] == b"garbage!!\n"
    assert json.loads([line for _, line in lines_of(tmp_path)][3])["n"] == 4
    with pytest.raises(BrokenChainError, match="after entry 2: a line is damaged"):
        verify(tmp_path)


# -- full disks ------------------------------------------------------------------------------------


def full(*_: object) -> int:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("name", ["write", "fdatasync", "open"])
def test_a_full_disk_leaves_the_log_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
):
    log = filled(tmp_path, 2)
    before = (tmp_path / FILE).read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(covey_device.audit.os, name, full)
        for _ in range(3):
            with pytest.raises(StorageError) as caught:
                log.append("note", {"number": 9}, durable=True)
    assert str(caught.value) == (
        f"cannot write {tmp_path / FILE}: No space left on device; free some space, or check its owner"
    )
    assert (tmp_path / FILE).read_bytes() == before
    log.append("note", {"number": 3})
    assert entries(tmp_path)[-1]["unwritten"] == 3
    log.append("note", {"number": 4})
    assert "unwritten" not in entries(tmp_path)[-1]
    assert verify(tmp_path).last == 4


def test_half_a_line_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    log = filled(tmp_path, 2)
    real, calls = os.write, []

    def half(fd: int, data: Any) -> int:
        calls.append(1)
        return real(fd, data[:7]) if len(calls) == 1 else full()

    with monkeypatch.context() as patch:
        patch.setattr(covey_device.audit.os, "write", half)
        with pytest.raises(StorageError):
            log.append("note", {"number": 9})
    assert verify(tmp_path) == Verdict(1, 2, verify(tmp_path).last_hash, False)


# -- rotation --------------------------------------------------------------------------------------


def test_all_of_it_is_bounded_and_the_chain_goes_through(tmp_path: Path):
    log = filled(tmp_path, 400, segment_bytes=2000, segments=4)
    sizes = [path.stat().st_size for path in [*put_away(tmp_path), tmp_path / FILE]]
    assert len(sizes) <= 4
    assert max(sizes) < 2000 + 200
    verdict = verify(tmp_path)
    assert verdict.last == 400
    assert verdict.first > 300
    assert [e["n"] for e in entries(tmp_path)] == list(range(verdict.first, 401))
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in put_away(tmp_path))
    put_away(tmp_path)[-2].unlink()
    with pytest.raises(BrokenChainError, match="does not follow"):
        verify(tmp_path)
    log.append("note", {})
    assert entries(tmp_path)[-1]["n"] == 401


def test_a_new_process_after_the_rotation(tmp_path: Path):
    filled(tmp_path, 30, segment_bytes=2000)
    while (tmp_path / FILE).stat().st_size < 2000:
        filled(tmp_path, 1)
    filled(tmp_path, 1, segment_bytes=2000)
    assert (tmp_path / FILE).stat().st_size < 300
    (tmp_path / FILE).unlink()  # the power went before it was written
    filled(tmp_path, 1, segment_bytes=2000)
    assert verify(tmp_path).last == entries(tmp_path)[-1]["n"]


APPEND_MANY = """
import os, sys
from pathlib import Path
from covey_device.audit import AuditLog

log = AuditLog(Path(sys.argv[1]), segment_bytes=3000, segments=1000)
for number in range(150):
    log.append("note", {"by": os.getpid(), "number": number})
"""


def test_several_processes_write_one_chain_while_others_read(tmp_path: Path):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", APPEND_MANY, str(tmp_path)]
    writers = [subprocess.Popen(command, env=environment) for _ in range(3)]
    seen = 0
    while any(writer.poll() is None for writer in writers):
        verdict = verify(tmp_path)
        if verdict is not None:
            assert verdict.first == 1
            assert verdict.last >= seen
            seen = verdict.last
    for writer in writers:
        assert writer.wait() == 0
    assert verify(tmp_path).last == 450
    assert len(put_away(tmp_path)) > 5


def test_what_was_done_already_is_told_if_it_can_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    state = tmp_path / "state" / "farm.pi-1"
    note(state, "enrolled", fleet="farm")
    assert kinds(state) == ["enrolled"]
    monkeypatch.setattr(covey_device.audit.os, "write", full)
    note(state, "renewed")
    assert kinds(state) == ["enrolled"]
    assert "not in the audit log: renewed (cannot write" in caplog.text


# -- what is told of rounds ------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    hasten(monkeypatch)
    with monkeypatch.context() as patch:
        patch.setenv("TZ", "UTC")
        time.tzset()
        yield
    time.tzset()


def sentences(directory: Path) -> list[str]:
    found = list(stories(directory))
    return [told(s, last=s is found[-1])[17:] for s in found]  # without the time


def test_a_round_that_was_joined(tmp_path: Path):
    async def scenario() -> None:
        async with Fleet(tmp_path) as fleet:
            seat = fleet.seats[1]
            await fleet.play(fleet.run(config(rounds=1)))
            await fleet.until(lambda: "ended" in kinds(seat.directory))
            out = [
                p for s, t, p in fleet.network.log if s == seat.name and t == TOPICS.outbox(s)
            ]  # fmt: skip
            told_of = [e for e in entries(seat.directory) if "sha256" in e]
            messages = [wire.decode(p) for p in out]
            # Everything that left is in the log, by its hash, but for requests of chunks.
            left = {hashlib.sha256(m.envelope).hexdigest(): m for m in messages}
            assert {e["sha256"] for e in told_of} == {
                digest for digest, m in left.items() if m.message.LABEL != "want blob"
            }
            for entry in told_of:
                assert entry["bytes"] == len(left[entry["sha256"]].envelope)
                assert entry["message"] == left[entry["sha256"]].message.LABEL
            [update] = [e for e in told_of if "update_sha256" in e]
            payload = next(m.message for m in messages if isinstance(m.message, MaskedUpdate))
            assert update["update_sha256"] == payload.payload.hex()
            assert update["update_bytes"] == payload.payload_bytes
            joined, ended = entries(seat.directory)[0], entries(seat.directory)[-1]
            assert joined["plan"] == fleet.bundle.hash.hex()
            assert (ended["cohort"], ended["at_least"], ended["in_sum"]) == (4, 3, True)
            [sentence] = sentences(seat.directory)
            assert re.fullmatch(
                r"round 1: joined, one of 4 devices \(at least 3 in a sum\)\. Left this device: "
                r"6 messages, 1\d\.\d kB, of which 10\.8 kB a masked update \(SHA-256 [0-9a-f]{12}\); "
                r"the sum is complete, and this device's update is in it\. "
                rf"Plan digits-mlp {fleet.bundle.hash.hex()[:12]}, model [0-9a-f]{{12}}\.",
                sentence,
            ), sentence
            assert verify(seat.directory).last == len(entries(seat.directory))

    go(scenario())


def test_everything_is_in_the_log_before_it_leaves(tmp_path: Path):
    late = []

    async def scenario() -> None:
        async with Fleet(tmp_path) as fleet:
            publish = fleet.network.publish
            seat = fleet.seats[1]

            def watched(sender: str, topic: str, payload: bytes, **options: Any) -> None:
                if topic == TOPICS.outbox(seat.name) and wire.decode(payload).message.LABEL != (
                    "want blob"
                ):
                    digest = hashlib.sha256(payload).hexdigest()
                    if digest not in (seat.directory / FILE).read_text():
                        late.append(wire.decode(payload).message.LABEL)
                if topic == TOPICS.upload(seat.name):
                    late.extend(
                        () if "update_sha256" in (seat.directory / FILE).read_text() else "u"
                    )
                publish(sender, topic, payload, **options)

            fleet.network.publish = watched  # type: ignore[method-assign]
            await fleet.play(fleet.run(config(rounds=2)))

    go(scenario())
    assert late == []


def test_a_round_that_was_refused_says_why_and_what(tmp_path: Path):
    async def scenario() -> None:
        async with Fleet(tmp_path) as fleet:
            seat = fleet.seats[1]
            await seat.service.close()
            await fleet.boot(seat, policy=Policy(plans=frozenset([bytes(32)])))
            await fleet.play(fleet.run(config(rounds=1, deadlines=short(gather_s=0.5))))
            [entry] = entries(seat.directory)
            assert entry["kind"] == "refused"
            assert entry["plan"] == fleet.bundle.hash.hex()
            assert sentences(seat.directory)[0].startswith(
                f"round 1: refused: plan {fleet.bundle.hash.hex()[:12]} is not one of those this "
                "device's policy allows. Left this device: 1 message, "
            )

    go(scenario())


def test_why_it_failed_stays_on_the_device(tmp_path: Path):
    """What is told to nobody else may name files, and is in the log in full."""

    async def scenario() -> None:
        async with Fleet(tmp_path) as fleet:
            one, other = fleet.seats[1], fleet.seats[2]

            def gone(*_: Any) -> Any:
                raise ZeroDivisionError("/home/ada/diary.csv has no rows")

            def nan(*_: Any) -> Any:
                raise TrainingError("batch 3 of /home/ada/diary.csv gives nan")

            one.service.preparation.make_trainer = gone
            other.trainer.on_train = nan
            settings = config(rounds=1, deadlines=short(gather_s=0.5, collect_s=2.0))
            await fleet.play(fleet.run(settings))
            await fleet.until(lambda: "ended" in kinds(other.directory))
            assert "diary" not in "".join(repr(p) for _, _, p in fleet.network.log)
            [refused] = entries(one.directory)
            assert refused["detail"] == "ZeroDivisionError: /home/ada/diary.csv has no rows"
            assert sentences(one.directory)[0].endswith(
                f"; what happened here: {refused['detail']}."
            )
            declined = next(e for e in entries(other.directory) if e.get("message") == "decline")
            assert declined["detail"] == "batch 3 of /home/ada/diary.csv gives nan"
            assert ", no update; " in sentences(other.directory)[0]

    go(scenario())


@pytest.mark.parametrize("at", ["check-in", "shares", "masked update"])
def test_a_round_is_declined_rather_than_run_unrecorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
):
    real = AuditLog._write

    def write(self: AuditLog, fd: int, kind: str, facts: dict[str, Any], *, durable: bool) -> None:
        if self.directory.name == "pi-1" and broken and (broken[0] or facts.get("message") == at):
            broken[0] = True
            full()
        real(self, fd, kind, facts, durable=durable)

    broken = [False]

    async def scenario() -> None:
        async with Fleet(tmp_path) as fleet:
            monkeypatch.setattr(AuditLog, "_write", write)
            seat = fleet.seats[1]
            settings = config(rounds=1, deadlines=short(gather_s=0.5, collect_s=2.0))
            await fleet.play(fleet.run(settings))
            sent = [
                wire.decode(p).message.LABEL
                for s, t, p in fleet.network.log
                if s == seat.name and t == TOPICS.outbox(seat.name)
            ]
            assert at not in sent
            assert sent[-1] == "decline"
            assert not [t for s, t, _ in fleet.network.log if s == seat.name and "/up/" in t]
            assert "declined: its disk cannot be written or read" in seat.ended[0].outcome
            broken.clear()
            await fleet.play(fleet.run(config(rounds=1), "again"))
            assert "pi-1" in fleet.outcomes[-1].completed.survivors
            assert any("unwritten" in entry for entry in entries(seat.directory))

    go(scenario())


def test_a_device_that_stopped_in_the_middle(tmp_path: Path):
    async def scenario() -> None:
        async with Fleet(tmp_path) as fleet:
            seat = fleet.seats[1]
            seat.trainer.on_train = lambda stop: time.sleep(0.3)
            task = asyncio.create_task(fleet.play(fleet.run(config(rounds=1))))
            await fleet.until(lambda: "sent" in kinds_or_none(seat.directory))
            await seat.service.close(graceful=False)
            await fleet.boot(seat)
            await task
            [sentence] = sentences(seat.directory)
            assert "then left: this device restarted; its keys of the round are gone" in sentence

    go(scenario())


def kinds_or_none(directory: Path) -> list[str]:
    return kinds(directory) if (directory / FILE).exists() else []


def test_bytes_per_round_are_few(tmp_path: Path):
    """2.1 kB: what `SEGMENTS` is reckoned with."""

    async def scenario() -> None:
        async with Fleet(tmp_path) as fleet:
            await fleet.play(fleet.run(config(rounds=3)))
            for seat in fleet.seats:
                await fleet.until(lambda seat=seat: kinds(seat.directory).count("ended") == 3)
                assert (seat.directory / FILE).stat().st_size < 3 * 2200

    go(scenario())


def test_two_syncs_a_round(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    real, synced = os.fdatasync, []

    def fdatasync(fd: int) -> None:
        synced.append(str(Path(f"/proc/self/fd/{fd}").readlink()))
        real(fd)

    monkeypatch.setattr(covey_device.audit.os, "fdatasync", fdatasync)

    async def scenario() -> None:
        async with Fleet(tmp_path) as fleet:
            await fleet.play(fleet.run(config(rounds=2)))
            assert len([path for path in synced if path.endswith(f"/pi-1/{FILE}")]) == 4

    go(scenario())


# -- without a service -----------------------------------------------------------------------------


def declined(round_id: int) -> wire.Signed[Any]:
    lab = Lab(3)
    name = lab.names[0]
    return wire.sign(Decline("lab", RUN, round_id, name, "no"), lab.identities[name])


def test_refusals_cannot_push_the_log_out(tmp_path: Path):
    now = [1000.0]
    audit, decline = Audit(AuditLog(tmp_path), steady=lambda: now[0]), declined(5)
    for _ in range(REFUSALS_PER_HOUR + 70):
        audit.leaving(decline)
    assert len(entries(tmp_path)) == REFUSALS_PER_HOUR
    now[0] += 3600
    audit.leaving(decline)
    assert entries(tmp_path)[-1]["more_refused"] == 70
    assert "Before it 70 more were refused" in sentences(tmp_path)[-1]


def test_what_belongs_to_no_round_is_told_as_well(tmp_path: Path):
    lab = Lab(3)
    play = lab.round().run()
    audit = Audit(AuditLog(tmp_path))
    for action in play.actions[lab.names[0]]:
        if isinstance(action, Publish):
            audit.leaving(action.message)
    assert [e["message"] for e in entries(tmp_path)] == [
        "check-in", "shares", "roster vote", "masked update", "view vote", "reveal",
    ]  # fmt: skip
    assert sentences(tmp_path)[1].startswith("sent: message shares, bytes ")


def test_the_policy_is_told_when_it_is_another(tmp_path: Path):
    path = tmp_path / "policy.toml"
    for text in ("min_cohort = 4\n", "min_cohort = 4\n", "min_cohort = 5\n", "min_cohort = 4\n"):
        path.write_text(text)
        Audit(AuditLog(tmp_path)).policy(PolicyFile(path).current.facts())
    assert [e["policy"]["min_cohort"] for e in entries(tmp_path)] == [4, 5, 4]
    assert sentences(tmp_path)[0].startswith(
        "policy: this device takes part in sums of at least 4 devices; counts"
    )


def test_a_policy_that_changes_while_it_runs(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """It holds for the next round, is told once, and a broken file changes nothing."""

    async def scenario() -> None:
        async with Fleet(tmp_path) as fleet:
            seat = fleet.seats[1]
            path = seat.directory / "policy.toml"
            seat.service._policy = PolicyFile(path)
            seat.service.preparation.policy = seat.service._policy
            settings = config(rounds=1, deadlines=short(gather_s=0.5))

            async def survivors(name: str) -> tuple[str, ...]:
                await fleet.play(fleet.run(settings, name))
                return tuple(fleet.outcomes[-1].completed.survivors)

            assert "pi-1" in await survivors("one")
            path.write_text(f'plans = ["{"ab" * 32}"]\n')
            assert "pi-1" not in await survivors("two")
            path.write_text("plans = [\n")
            with caplog.at_level("ERROR"):
                assert "pi-1" not in await survivors("three")
            assert (
                len([r for r in caplog.records if "the policy stays as it was" in r.message]) == 1
            )
            path.write_text("[limits]\nmax_batches = 3\n")
            await seat.service.reload_policy(anyway=True)
            assert "pi-1" in await survivors("four")
            assert seat.service.preparation.limits.batches == 3
            assert kinds(seat.directory).count("policy") == 2

    go(scenario())


def test_words_bear_whatever_the_log_holds(tmp_path: Path):
    path = tmp_path / FILE
    at = '"at":"2026-11-21T14:03:05Z"'
    lines = [
        b"garbage",
        b"[]",
        b'{"kind":"joined"}',
        f'{{{at},"kind":"joined","round":"x"}}'.encode(),
        f'{{{at},"kind":"joined","round":7}}'.encode(),
        f'{{{at},"kind":"refused","round":8,"reason":"\\u001b[2J","plan":3,"signed_by":4}}'.encode(),
        f'{{{at},"kind":"enrolled","fleet":"farm\\n","until":1}}'.encode(),
        f'{{{at},"kind":"policy","policy":7}}'.encode(),
        f'{{{at},"kind":"repaired"}}'.encode(),
        f'{{{at},"kind":"ended","round":9,"outcome":"completed","bytes":"many"}}'.encode(),
    ]
    path.write_bytes(b"\n".join(lines) + b"\n")
    words = sentences(tmp_path)
    assert words[-4] == "enrolled: fleet farm\N{REPLACEMENT CHARACTER}, until 1."
    assert not any(c in "".join(words) for c in "\x1b\n")
    with pytest.raises(BrokenChainError):
        verify(tmp_path)


def test_the_log_of_another_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    filled(tmp_path, 1)

    def denied(*_: Any, **__: Any) -> Any:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "open", denied)
    with pytest.raises(StorageError, match=r"cannot read .* the log is its owner's alone"):
        verify(tmp_path)


def test_facts_of_a_policy_are_json():
    assert (
        msgspec.json.decode(msgspec.json.encode(PolicyConfig().facts()))["limits"]["threads"] == 1
    )
