"""The simulation plays a fixed set of seeds, and would notice if something were broken.

More seeds: `make simulate SEEDS=10000`. What is simulated and checked stands in docs/simulation.md.
"""

import contextlib
import errno
import os
import random
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from covey_coordinator.store import OpenRound, Store
from covey_shared import keys
from covey_shared.errors import RefusedError, SignatureError, StorageError
from simulation import quick_crypto
from simulation.bugs import AMONG, BUGS, begins_anew, keeps_no_upload, never_repeats
from simulation.database import Database
from simulation.database import installed as database_installed
from simulation.disk import Disk, installed
from simulation.faults import KINDS, Fault, plan
from simulation.loop import Crash, Loop, Process
from simulation.play import command, play_many, report
from simulation.world import COORDINATOR, CutShort, Interrupted, play

TESTS = Path(__file__).parents[1]

RESUMED = (7, 12, 13, 14, 16, 23, 24, 25, 36)
"""In them the coordinator dies in every phase."""

CUT_SHORT = (0, 3, 5, 6, 7)
"""Without over-selection, where a sum does not wait for all."""


# 6663: a device that fetches while the coordinator is away asked so seldom in the end that the next
# round's gathering was over before it asked again, though it heard the call.
@pytest.mark.parametrize("seed", [*range(1, 15), 6663])
def test_whatever_fails_nothing_breaks(seed: int):
    verdict = play(seed)
    assert not verdict.broken, "\n" + report(verdict, shrink=False)
    assert verdict.completed


def test_in_fair_weather_every_round_completes():
    verdict = play(5, kinds=())
    assert not verdict.broken
    assert verdict.rounds == verdict.completed > 0


def test_a_round_outlives_its_coordinator_whatever_it_was_about_to_do():
    def interrupted() -> list[Interrupted]:
        deaths: list[Interrupted] = []
        for seed in RESUMED:
            verdict = play(seed, kinds=("coordinator-kill", "coordinator-stop"))
            assert not verdict.broken, "\n" + report(verdict, shrink=False)
            deaths += [death for death in verdict.interrupted if death.round_id]
        return deaths

    deaths = interrupted()
    phases = {death.phase for death in deaths}
    assert phases >= {"gather", "share", "roster", "collect", "view", "unmask", "done"}
    assert {"publish", "acknowledgement", "commit", "committed", "sync"} <= {
        d.point for d in deaths
    }
    assert sum(death.completed for death in deaths) >= 0.95 * len(deaths)
    with begins_anew():
        deaths = interrupted()
    assert sum(death.completed for death in deaths) < 0.5 * len(deaths)


def test_an_upload_that_a_death_cut_short_is_in_the_sum():
    def summed() -> tuple[int, int]:
        """(updates in a sum, of so many that were cut short in a round that has one)."""
        uploads: list[CutShort] = []
        for seed in CUT_SHORT:
            verdict = play(seed, kinds=("kill",), planned=partial(_cut_short, seed))
            assert not verdict.broken, "\n" + "\n".join(verdict.broken)
            uploads += verdict.cut_short
        ended = [upload.summed for upload in uploads if upload.summed is not None]
        return sum(ended), len(ended)

    arrived, of = summed()
    assert of >= 6
    assert arrived >= 0.9 * of
    with keeps_no_upload():
        arrived, of = summed()
        assert arrived < 0.5 * of


def _cut_short(seed: int, devices: list[str]) -> list[Fault]:
    """In each of the first rounds a device dies in the middle of its upload, and is soon back."""
    chance = random.Random(seed)

    def fault(nth: int) -> Fault:
        one, after = chance.choice(devices), chance.randint(2, 4)
        what = f"kill of {one} before its publish {after}"
        return Fault(
            kind="kill", at_s=0.0, phase="collect", nth=nth, for_s=0.0, end=None, what=what,
            begin=lambda world: world.kill(one, after, "publish", 0.1, power=False),
        )  # fmt: skip

    return [fault(nth) for nth in (1, 2, 3)]


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
    "a device masks again when asked again": (31, "masks twice in one round"),
    "a device does not know what it answered": (46, "equivocation"),
    "a device does not sync": (1, ""),
    "a device goes on with another upload": (1, "uploads what it never announced"),
    "a device goes on with an upload that never began": (1, "before that is saved"),
    "the coordinator does not sync": (2, ""),
    "the coordinator does not sync its database": (2, ""),
    "the coordinator does not sync its spool": (3, "has a sum and is abandoned"),
    "the coordinator does not sync names in its spool": (12, "has a sum and is abandoned"),
    "the coordinator does not sync the model beside a transcript": (3, "could be checked"),
    "the coordinator counts rounds in memory": (0, "two calls of one round"),
    "the coordinator does not note that uploads begin": (12, "uploads have begun before"),
    "the coordinator ends a round in two transactions": (13, "has a sum and is abandoned"),
    "the coordinator sends before it writes down": (4, "two manifests for one round"),
    "the coordinator takes what a full disk refused for written": (12, ""),
    "the coordinator forgets what it gathered": (1, "checked in itself"),
    "the coordinator forgets its manifest": (4, "two manifests for one round"),
    "the coordinator forgets votes": (14, "has a sum and is abandoned"),
    "the coordinator forgets its view": (14, "has a sum and is abandoned"),
    "the coordinator takes a round up with another manifest": (0, ""),
    "the coordinator takes a round up with another reveal key": (14, "sum and is abandoned"),
    "the coordinator adds an update again": (0, "has a wrong sum"),
    "the coordinator does not settle its files": (68, "file of metrics"),
    "the coordinator leaves masks of the dropped": (2, "has a wrong sum"),
    "the coordinator proposes a second view": (0, "two view proposals"),
    "the coordinator gives up on a full disk": (0, "the run fails"),
}
AT_MOST = 60
"""Seeds, should the simulation change and others find them."""


@pytest.mark.parametrize("bug", FOUND_BY)
def test_a_planted_bug_is_found(bug: str):
    first, said = FOUND_BY[bug]
    for seed in range(first, first + AT_MOST):
        with BUGS[bug]():
            verdict = play(seed, kinds=AMONG.get(bug))
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


# -- databases -------------------------------------------------------------------------------------


def _database(place: Path, chance: int, *, full: bool = False) -> Database:
    with Store.open(place / "covey.db") as store:
        store.add_run("it", bytes(16), 0.0)
        store.open_round(OpenRound("it", 1, 1, b"spec", bytes(32), 0.0))
    disk = Disk(place, random.Random(chance), full=full)
    return Database(place / "covey.db", disk, forgetful=True)


def _entries(database: Database, work: Callable[[Store], None], *, dies_after: int = 0) -> bytes:
    """What is in the journal after a process did this, and the power went."""
    with (
        Loop() as loop,
        installed(lambda process: database.disk),
        database_installed(lambda process: database),
    ):
        process = Process(loop, "it", "0")
        process.on_death = lambda where: process.die()
        stores = []

        def life() -> None:
            stores.append(Store.open(database.path))
            process.die_after(dies_after, "disk: commit")
            work(stores[0])

        with contextlib.suppress(Crash):
            process.context.run(life)
        process.die()
        stores[0].close()
    database.power_cut()
    database.recover()
    with Store.open(database.path) as store:
        return b"".join(store.entries())


def test_a_power_cut_takes_commits_back_that_were_not_durable_and_no_others(tmp_path: Path):
    def work(store: Store) -> None:
        store.journal([b"a"])
        store.journal([b"b"], durable=False)
        store.journal([b"c"])
        store.journal([b"d"], durable=False)
        store.journal([b"e"], durable=False)

    found = set()
    for chance in range(16):
        place = tmp_path / str(chance)
        place.mkdir()
        found.add(_entries(_database(place, chance), work))
    assert found == {b"abc", b"abcd", b"abcde"}


@pytest.mark.parametrize(("dies_after", "left"), [(1, b""), (2, b"ab"), (3, b"ab"), (4, b"abc")])
def test_a_death_loses_a_transaction_whole_or_not_at_all(
    tmp_path: Path, dies_after: int, left: bytes
):
    def work(store: Store) -> None:
        store.journal([b"a", b"b"])  # before its commit: 1; after it: 2
        store.journal([b"c"])

    assert _entries(_database(tmp_path, 0), work, dies_after=dies_after) == left


def test_a_database_on_a_full_disk_takes_nothing_and_can_be_written_later(tmp_path: Path):
    database = _database(tmp_path, 0, full=True)

    def work(store: Store) -> None:
        for _ in range(2):
            with pytest.raises(StorageError, match="the disk is full"):
                store.journal([b"a"])
        assert store.entries() == []
        database.disk.full = False
        store.journal([b"b"])

    assert _entries(database, work) == b"b"
