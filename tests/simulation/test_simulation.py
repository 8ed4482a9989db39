"""The simulation plays a fixed set of seeds, and would notice if something were broken.

More seeds: `make simulate SEEDS=10000`. What is simulated and checked stands in docs/simulation.md.
"""

import contextlib
import errno
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from covey_shared import keys
from covey_shared.errors import RefusedError, SignatureError
from simulation import quick_crypto
from simulation.bugs import BUGS, never_repeats
from simulation.disk import Disk, installed
from simulation.faults import KINDS, plan
from simulation.loop import Crash, Loop, Process
from simulation.play import command, play_many, report
from simulation.world import COORDINATOR, play

TESTS = Path(__file__).parents[1]

FOUND = {
    53: "a coordinator without a broker let a round's time to gather run out before it was called",
    13425: "the same, of a connection that was lost just before the call could go out",
}
"""Seeds that broke something once."""


@pytest.mark.parametrize("seed", [*range(1, 15), *FOUND])
def test_whatever_fails_nothing_breaks(seed: int):
    verdict = play(seed)
    assert not verdict.broken, "\n" + report(verdict, shrink=False)
    assert verdict.completed


def test_in_fair_weather_every_round_completes():
    verdict = play(5, kinds=())
    assert not verdict.broken
    assert verdict.rounds == verdict.completed > 0


def test_lost_messages_cost_time_and_hardly_a_round():
    def share() -> float:
        verdicts = [play(seed, kinds=("loss", "reordering")) for seed in range(5005, 5009)]
        assert not any(verdict.broken for verdict in verdicts)
        return sum(v.completed for v in verdicts) / sum(v.rounds for v in verdicts)

    with_repeats = share()
    assert with_repeats > 0.85
    with never_repeats():
        assert share() < with_repeats


def test_every_kind_of_fault_happens():
    trace: list[str] = []
    deadly = ("kill", "coordinator-power-cut", "loss", "disk")
    for seed, kinds in [*((seed, KINDS) for seed in range(20, 30)), (20, deadly), (21, deadly)]:
        verdict = play(seed, kinds=kinds, traced=True)
        assert not verdict.broken
        trace += verdict.trace
    text = "\n".join(trace)
    for mark in (": lost ", "dies before: disk", "No space left on device"):
        assert mark in text
    happened = {line.split("FAULT ")[1] for line in trace if "FAULT" in line}
    for kind in KINDS:
        planned = {
            fault.what
            for seed in range(20, 30)
            for n in range(3, 9)
            for fault in plan(str(seed), (kind,), [f"pi-{i}" for i in range(1, n + 1)], COORDINATOR)
        }
        assert planned & happened, kind


def test_a_seed_gives_the_same_trace_byte_for_byte():
    here = "\n".join(play(11, kinds=KINDS, traced=True).trace)
    assert len(here) > 10_000
    assert "\n".join(play(11, kinds=KINDS, traced=True).trace) == here
    elsewhere = subprocess.run(
        [sys.executable, "-m", "simulation", "--seed", "11", "--faults", ",".join(KINDS), "--trace"],
        cwd=TESTS, env={**os.environ, "PYTHONHASHSEED": "7"}, capture_output=True, text=True,
        check=True, timeout=60,
    ).stdout  # fmt: skip
    assert elsewhere.startswith(here + "\n")
    assert "\n".join(play(12, kinds=KINDS, traced=True).trace) != here


# -- the simulation would notice -------------------------------------------------------------------

FOUND_BY = {
    # bug: a seed that finds it, and what is then said
    "a device checks in before it saves": (0, "before that is saved"),
    "a device follows a round it was in": (1, "checks in twice to one round"),
    "a device masks again when asked again": (35, "masks twice in one round"),
    "a device does not know what it answered": (23, "equivocation"),
    "a device does not sync": (4, ""),
    "the coordinator does not sync": (0, ""),
    "the coordinator counts rounds in memory": (0, "two calls of one round"),
    "the coordinator does not note that uploads begin": (0, "uploads have begun before"),
    "the coordinator names a model before it is there": (60, ""),
    "the coordinator leaves masks of the dropped": (2, "has a wrong sum"),
    "the coordinator proposes a second view": (0, "two view proposals"),
    "the coordinator gives up on a full disk": (6, "the run fails"),
    "the coordinator waits while it cannot be heard": (53, "fails in fair weather"),
}
AT_MOST = 60
"""Seeds, should the simulation change and others find them."""


@pytest.mark.parametrize("bug", FOUND_BY)
def test_a_planted_bug_is_found(bug: str):
    first, said = FOUND_BY[bug]
    for seed in range(first, first + AT_MOST):
        with BUGS[bug]():
            verdict = play(seed)
        if verdict.broken:
            assert said in verdict.broken[0]
            return
    pytest.fail(f"{bug}: nothing was broken in {AT_MOST} seeds")


def test_a_failure_names_what_broke_and_the_command_that_does_it_again():
    with BUGS["the coordinator leaves masks of the dropped"]():
        verdict = next(v for v in map(play, range(1, AT_MOST)) if v.broken)
        text = report(verdict)
    assert "has a wrong sum" in text
    assert f"python -m simulation --seed {verdict.seed} --faults " in text
    assert command(3, ("loss",), ("loss",)).endswith("--seed 3 --trace")


def test_many_seeds_are_tallied_until_some_break():
    said: list[str] = []
    tally = play_many(range(3), 1, said.append)
    assert (tally.seeds, tally.broken) == (3, None)
    with BUGS["a device checks in before it saves"]():
        tally = play_many(range(100), 1, said.append, most=2)
    assert len(tally.broken or []) == 2
    assert tally.seeds < 10
    assert "2 broken" in said[-1]


# -- what it stands on -----------------------------------------------------------------------------


def test_quick_crypto_computes_what_the_real_one_does():
    rng = random.Random(1).randbytes
    seed, secrets = rng(32), [rng(32) for _ in range(2)]
    real, quick = keys.SigningKey(seed), quick_crypto.SigningKey(seed)
    assert real.public == quick.public
    signature = real.sign("label", b"text")
    assert signature == quick.sign("label", b"text")
    quick_crypto.verify(real.public, "label", b"text", signature, signer="it")
    for changed in ((b"texts", signature), (b"text", signature[:-1] + b"\x00")):
        with pytest.raises(SignatureError):
            quick_crypto.verify(real.public, "label", *changed, signer="it")
    for size in (16, 32, 80):
        given = {"salt": rng(32), "info": b"mask", "size": size}
        assert keys.hkdf(secrets[0], **given) == quick_crypto.hkdf(secrets[0], **given)
    theirs = [keys.AgreementKey(secret) for secret in secrets]
    with quick_crypto.quick_crypto(lambda: rng(32)):
        ours = [keys.AgreementKey(secret) for secret in secrets]
        assert [key.public for key in ours] == [key.public for key in theirs]
        keys.check_agreement_key(ours[0].public, owner="it")
        with pytest.raises(RefusedError):
            keys.check_agreement_key(bytes(32), owner="it")
    given = {"salt": b"salt", "info": b"pair"}
    assert ours[0].agree(ours[1].public, **given) == theirs[1].agree(theirs[0].public, **given)
    for sender, receiver in ((ours[0], theirs[1]), (theirs[0], ours[1]), (ours[0], ours[1])):
        box = sender.seal(receiver.public, info=b"slot", plaintext=b"shares")
        assert receiver.open(box, sender=sender.public, info=b"slot") == b"shares"
        with pytest.raises(RefusedError):
            receiver.open(box, sender=sender.public, info=b"another")


def _write(path: Path, data: bytes, *, sync: bool, place: bool = False) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT)
    os.write(fd, data)
    if sync:
        os.fsync(fd)
    os.close(fd)
    if place:
        fd = os.open(str(path.parent), os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)


def test_a_power_cut_may_undo_what_was_not_synced_and_nothing_else(tmp_path: Path):
    fates = set()
    for chance in range(40):
        place = tmp_path / str(chance)
        place.mkdir()
        disk = Disk(place, random.Random(chance))

        def work(place: Path = place) -> None:
            _write(place / "synced", b"synced", sync=True, place=True)
            _write(place / "unsynced", b"unsynced", sync=False)
            _write(place / "new", b"new", sync=True)
            (place / "new").replace(place / "synced-too")

        with Loop() as loop, installed(lambda process, disk=disk: disk):
            Process(loop, "it", "0").context.run(work)
        disk.power_cut()
        assert (place / "synced").read_bytes() == b"synced"
        files = {p.name: p.read_bytes() for p in place.iterdir()}
        assert files.get("synced-too", files.get("new", b"new")) == b"new"
        fates.add((files.get("unsynced"), "synced-too" in files, "new" in files))
    texts = {text for text, _, _ in fates}
    assert {None, b"", b"unsynced"} < texts  # no name, no bytes, all of it; and torn
    assert {moved for _, moved, _ in fates} == {True, False}


def test_a_process_dies_where_it_is_told_to_and_nothing_of_it_is_seen_after(tmp_path: Path):
    disk = Disk(tmp_path, random.Random(0))
    with Loop() as loop, installed(lambda process: disk):
        process = Process(loop, "it", "0")
        process.on_death = lambda where: process.die()
        process.die_after(3, "disk")  # open, write; then sync
        with contextlib.suppress(Crash):
            process.context.run(_write, tmp_path / "a", b"a", sync=True)
        assert process.dead
        assert (tmp_path / "a").read_bytes() == b"a"
        with pytest.raises(Crash):
            process.context.run(_write, tmp_path / "b", b"b", sync=True)
        assert not (tmp_path / "b").exists()


def test_a_full_disk_takes_nothing(tmp_path: Path):
    disk = Disk(tmp_path, random.Random(0), full=True)
    with Loop() as loop, installed(lambda process: disk), pytest.raises(OSError) as caught:
        Process(loop, "it", "0").context.run(_write, tmp_path / "a", b"1", sync=True)
    assert caught.value.errno == errno.ENOSPC
