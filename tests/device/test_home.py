"""The model at home, in whole fleets: it is the coordinator's, it arrives, and nothing else does."""

import asyncio
import hashlib
import json
import logging
import stat
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest

from covey_coordinator.run import Run
from covey_device.audit import lines_of
from covey_device.home.files import Port, Sidecar, read_sidecar
from covey_device.home.hook import run_hook
from covey_device.policy import Policy
from covey_shared import chunks, wire
from covey_shared.messages import RoundCall
from homes import Settled, hasten_home, model_hashes, stepwise, wants, without_children
from memory_fleet import TOPICS, Fleet, config, go
from memory_transport import Delivery


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    hasten_home(monkeypatch)


@pytest.fixture
def childless(monkeypatch: pytest.MonkeyPatch) -> None:
    without_children(monkeypatch)


def test_after_each_round_every_device_has_the_coordinators_model(tmp_path: Path):
    async def scenario() -> None:
        async with Fleet(tmp_path) as fleet:
            settled = Settled(fleet)
            settled.move_in()
            run = fleet.run(config(rounds=3))
            stepwise(fleet, settled)
            state = await fleet.play(run)
            assert state.rounds_completed == 3
            await settled.everybody_has(run.model_digest)
            await fleet.until(lambda: len(settled.kept) == 12)
            for seat in fleet.seats:
                sidecar = settled.check(seat, run.directory.path / "model.onnx")
                assert (sidecar.round, sidecar.run) == (3, state.run_id)
                assert (sidecar.plan_name, sidecar.classes) == (run.bundle.header.name, 10)
                assert (sidecar.input.shape, sidecar.output.shape) == ((1, 8, 8), (10,))
                home = seat.directory / "model"
                before = read_sidecar((home / "previous").resolve())
                assert (before.round, sidecar.before) == (2, (home / "previous").resolve().name)
                assert len(list((home / "kept").iterdir())) == 2
                assert stat.S_IMODE((home / "current.onnx").stat().st_mode) == 0o640
                assert stat.S_IMODE(home.stat().st_mode) == 0o750
                await fleet.until(lambda home=home: not (home / "wanted").exists())  # type: ignore[misc]
                # One file for the whole fleet.
                first = fleet.seats[0].directory / "model" / "current.onnx"
                assert (home / "current.onnx").read_bytes() == first.read_bytes()
            # The next round had each model from the cache: nobody asked for it once that was called.
            log = fleet.network.log
            for round_id, model in model_hashes(fleet).items():
                called = next(
                    at for at, (_, topic, data) in enumerate(log)
                    if topic == TOPICS.round and data and wire.decode(data).message.round == round_id
                )  # fmt: skip
                for seat in fleet.seats:
                    late = wants(fleet, seat.name, log[called:])
                    assert (model in late) == (round_id == 1)

    go(scenario())


@pytest.mark.usefixtures("childless")
def test_who_is_not_chosen_or_trains_nothing_has_the_model_too(tmp_path: Path):
    """Five devices for three places, one of which takes part in no round at all; and one that comes later."""

    async def scenario() -> None:
        async with Fleet(tmp_path, 5) as fleet:
            await fleet.seats[4].service.close()
            await fleet.boot(fleet.seats[4], policy=Policy(min_cohort=100))
            settled = Settled(fleet)
            settled.move_in()
            run = fleet.run(config(n=3, rounds=1))
            await fleet.play(run)
            (outcome,) = fleet.outcomes
            assert outcome.completed is not None
            assert len(outcome.completed.survivors) == 3
            await settled.everybody_has(run.model_digest)
            assert settled.check(fleet.seats[4], run.directory.path / "model.onnx").result
            assert fleet.seats[4].trainer.rounds == 0
            # Who comes later has what the next round begins with, though that round comes to nothing.
            late = await fleet.add("pi-late")
            settled.move_in(late)
            again = fleet.run(config(n=6, rounds=1), "again")

            def stop_it(event: Any) -> None:
                if getattr(event, "phase", None) == "share":
                    return
                fleet.coordinator.give_up_round("enough")

            fleet.on_event = stop_it
            state = await fleet.play(again)
            assert state.rounds_completed == 0
            await settled.everybody_has(again.model_digest, late)
            assert settled.check(late, _exported(tmp_path, again)).result is None
            # The others had a model of a later making than that, of another run; this one is newer.
            await settled.everybody_has(again.model_digest)

    go(scenario())


def _exported(directory: Path, run: Run) -> Path:
    from covey_shared.runtime import export_model

    path = directory / "began.onnx"
    header, graph = run.bundle.header, run.bundle.graphs["infer"]
    path.write_bytes(export_model(header, graph, run.parameters))
    return path


@pytest.mark.usefixtures("childless")
def test_a_plan_that_the_owner_does_not_allow_is_not_fetched(tmp_path: Path):
    async def scenario() -> None:
        async with Fleet(tmp_path, 4) as fleet:
            settled, seat = Settled(fleet), fleet.seats[3]
            settled.move_in(*fleet.seats[:3])
            other = Policy(plans=frozenset((bytes(32),)))
            await seat.service.close()
            await fleet.boot(seat, policy=other)
            settled.move_in(seat, policy=lambda: other)
            run = fleet.run(config(n=3, rounds=1))
            await fleet.play(run)
            await settled.everybody_has(run.model_digest, *fleet.seats[:3])
            assert wants(fleet, seat.name) == []
            assert not (seat.directory / "model").exists()

    go(scenario())


# -- lies ------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("childless")
def test_a_broker_that_serves_other_bytes_gets_nothing_kept(tmp_path: Path):
    """Every chunk of the next model has a bit flipped, until the broker gives up lying."""

    async def scenario() -> None:
        async with Fleet(tmp_path) as fleet:
            settled, lying = Settled(fleet), [True]
            settled.move_in()
            run = fleet.run(config(rounds=1))
            began = run.model_digest

            def tamper(delivery: Delivery) -> Iterable[Delivery]:
                payload = delivery.incoming.payload
                if lying[0] and delivery.topic.startswith(TOPICS.blob(b"")):
                    digest = chunks.decode_frame(payload).digest
                    known = {began, *map(_sha256, run.blobs()[:3])}
                    if digest not in known:
                        other = bytearray(payload)
                        other[-7] ^= 1
                        return (delivery.changed(bytes(other)),)
                return (delivery,)

            fleet.network.tamper = tamper
            await fleet.play(run)
            asked = [wants(fleet, seat.name).count(run.model_digest) for seat in fleet.seats]
            await fleet.until(
                lambda: all(
                    wants(fleet, seat.name).count(run.model_digest) > 1 for seat in fleet.seats
                )
            )
            assert max(asked) < 50
            assert not any(settled.directory(seat).folder() for seat in fleet.seats)
            lying[0] = False
            await settled.everybody_has(run.model_digest)

    go(scenario())


def _sha256(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


@pytest.mark.usefixtures("childless")
def test_old_rounds_played_back_and_words_of_others_change_nothing(tmp_path: Path):
    async def scenario() -> None:
        async with Fleet(tmp_path) as fleet:
            settled = Settled(fleet)
            settled.move_in()
            run = fleet.run(config(rounds=2))
            stepwise(fleet, settled)
            await fleet.play(run)
            await settled.everybody_has(run.model_digest)
            said = [
                (topic, payload)
                for sender, topic, payload in list(fleet.network.log)
                if sender.startswith("coordinator")
                and topic in (TOPICS.round, TOPICS.all)
                and payload
            ]
            await fleet.until(lambda: len(settled.kept) == 8)
            seat, kept = fleet.seats[0], 8
            was = settled.sidecar(seat)
            # A process that has seen none of it, and all of it again: at once, and when it knows what it has.
            for wait_s in (0.0, 0.3):
                await seat.service.close()
                await fleet.boot(seat)
                settled.move_in(seat)
                await asyncio.sleep(wait_s)
                before = len(wants(fleet, seat.name))
                for topic, payload in said:
                    fleet.network.publish("mallory", topic, payload)
                await asyncio.sleep(0.4)
                assert settled.sidecar(seat) == was
                assert len(settled.kept) == kept
                assert len(wants(fleet, seat.name)) == before
            # And a call of a round to come, signed by a device.
            call = wire.decode_as(RoundCall, next(p for t, p in said if t == TOPICS.round))
            forged = msgspec.structs.replace(call.message, round=99, model=bytes(32))
            forged_call = wire.sign(forged, fleet.seats[1].identity).envelope
            fleet.network.publish("mallory", TOPICS.round, forged_call)
            await asyncio.sleep(0.3)
            assert len(wants(fleet, seat.name)) == before

    go(scenario())


# -- what the process and the disk do ----------------------------------------------------------------


@pytest.mark.usefixtures("childless")
def test_a_device_that_dies_before_it_has_the_model_fetches_it_when_it_is_back(tmp_path: Path):
    """And goes on where it was, with a directory whose file was damaged meanwhile."""

    async def scenario() -> None:
        async with Fleet(tmp_path) as fleet:
            settled = Settled(fleet)
            settled.move_in()
            run = fleet.run(config(rounds=1))
            seat = fleet.seats[2]

            def tamper(delivery: Delivery) -> Iterable[Delivery]:
                last = run.state.model and delivery.topic == TOPICS.blob(run.model_digest)
                return () if last and delivery.receiver == seat.name else (delivery,)

            fleet.network.tamper = tamper
            await fleet.play(run)
            await fleet.until(lambda: (seat.directory / "model" / "wanted").exists())
            await seat.service.close(graceful=False)
            fleet.network.tamper = lambda delivery: (delivery,)
            assert settled.directory(seat).folder() is None
            await fleet.boot(seat)
            settled.move_in(seat)
            await settled.everybody_has(run.model_digest)  # no round, no call: as it was remembered
            settled.check(seat, run.directory.path / "model.onnx")

            await seat.service.close(graceful=False)
            file = seat.directory / "model" / "current.onnx"
            damaged = bytearray(file.read_bytes())
            damaged[len(damaged) // 2] ^= 1
            file.write_bytes(damaged)
            await fleet.boot(seat)
            settled.move_in(seat)
            good = hashlib.sha256((run.directory.path / "model.onnx").read_bytes()).digest()
            await fleet.until(lambda: hashlib.sha256(file.read_bytes()).digest() == good)
            settled.check(seat, run.directory.path / "model.onnx")

    go(scenario())


@pytest.mark.usefixtures("childless")
def test_a_full_disk_costs_the_new_model_and_nothing_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    async def scenario() -> None:
        async with Fleet(tmp_path) as fleet:
            settled = Settled(fleet)
            settled.move_in()
            run = fleet.run(config(rounds=2))
            seat, others = fleet.seats[1], [fleet.seats[0], *fleet.seats[2:]]
            home = seat.service.home
            assert home is not None
            await fleet.play(fleet.run(config(rounds=1), "first"))
            await settled.everybody_has(fleet.run(None, "first").model_digest)
            was = settled.sidecar(seat)
            home._directory._reserve = 10**18
            state = await fleet.play(run)
            assert state.rounds_completed == 2
            survivors = [o.completed.survivors for o in fleet.outcomes if o.completed]
            assert [len(names) for names in survivors] == [4, 4, 4]
            await settled.everybody_has(run.model_digest, *others)
            await fleet.until(lambda: "too little space" in caplog.text)
            assert settled.sidecar(seat) == was
            home._directory._reserve = 0
            await settled.everybody_has(run.model_digest)

    with caplog.at_level(logging.WARNING, logger="covey.device"):
        go(scenario())


@pytest.mark.usefixtures("childless")
def test_the_owners_record_counts_what_is_asked_for_between_rounds(tmp_path: Path):
    async def scenario() -> None:
        async with Fleet(tmp_path) as fleet:
            settled, seat = Settled(fleet), fleet.seats[0]
            settled.move_in()
            stepwise(fleet, settled)
            run = fleet.run(config(rounds=2))
            await fleet.play(run)
            await settled.everybody_has(run.model_digest)
            ended = [json.loads(line) for _, line in lines_of(seat.directory) if b'"ended"' in line]
            assert len(ended) == 2
            asked = wants(fleet, seat.name)
            last = asked.count(run.model_digest)  # told with the next round, if they came late
            told = sum(entry["requests"] for entry in ended)
            assert len(asked) - last <= told <= len(asked)
            assert (
                wants(fleet, seat.name).count(model_hashes(fleet)[2]) > 0
            )  # asked for after round 1

    go(scenario())


# -- the owner's command ---------------------------------------------------------------------------

PORT = Port(name="x", type="float32", shape=(1,))

SAY = """
import json, os, sys
print("environment", json.dumps(dict(os.environ)))
print("here", os.getcwd(), sys.argv[1:])
"""


@pytest.mark.usefixtures("childless")
def test_the_hook_is_run_on_each_new_model_and_told_which(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    """With nothing of the service's environment, in the model's folder."""
    monkeypatch.setenv("COVEY_SECRET", "swordfish")
    hook = (sys.executable, "-c", SAY, "one argument; not two")

    async def scenario() -> None:
        async with Fleet(tmp_path) as fleet:
            settled, seat = Settled(fleet), fleet.seats[0]
            settled.move_in(seat, hook=hook)
            settled.move_in(*fleet.seats[1:])
            stepwise(fleet, settled)
            run = fleet.run(config(rounds=2))
            playing = asyncio.create_task(fleet.play(run))
            await fleet.until(lambda: caplog.text.count("ended well") == 1)
            await playing
            await fleet.until(lambda: caplog.text.count("ended well") == 2)
            hooked = seat.directory / "model" / "hooked"
            await fleet.until(lambda: b"00000002" in hooked.read_bytes())
            said = [r.getMessage() for r in caplog.records if ": environment " in r.getMessage()]
            environments = [json.loads(line.split(": environment ")[1]) for line in said]
            assert [e["COVEY_ROUND"] for e in environments] == ["1", "2"]
            sidecar, folder = settled.sidecar(seat), settled.directory(seat).folder()
            environments[1].pop("LC_CTYPE", None)  # Python's own doing
            assert environments[1] == {
                "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
                "LANG": "C.UTF-8",
                "COVEY_MODEL": f"{folder}/model.onnx",
                "COVEY_MODEL_JSON": f"{folder}/model.json",
                "COVEY_MODEL_SHA256": sidecar.onnx,
                "COVEY_FLEET": "memory",
                "COVEY_DEVICE": seat.name,
                "COVEY_RUN": sidecar.run,
                "COVEY_ROUND": "2",
                "COVEY_PLAN": sidecar.plan_name,
            }
            here = [r.getMessage() for r in caplog.records if ": here " in r.getMessage()]
            assert here[-1].endswith(f": here {folder} ['one argument; not two']")

    with caplog.at_level(logging.INFO, logger="covey.device"):
        go(scenario())


@pytest.mark.parametrize(
    ("program", "told"),
    [
        ("import time; print('so far', flush=True); time.sleep(60)", "was ended after"),
        ("import sys; sys.exit(3)", "ended with status 3"),
        ("while True: print('x' * 100)", "was ended after"),
        ("print('x' * 300_000)", "ended well"),
        (
            "import os, time\nif os.fork() == 0: time.sleep(60)\nelse: os._exit(0)",
            "ended well",
        ),
    ],
)
def test_a_hook_that_misbehaves_is_bounded(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, program: str, told: str
):
    """Its output in the log is short, and it leaves nothing running."""
    mark = f"# {tmp_path}"
    sidecar = Sidecar(
        fleet="f", device="d", run="r", round=7, plan_name="p", plan="0" * 64, model="0" * 64,
        onnx="0" * 64, size=1, input=PORT, output=PORT, loss="mse", classes=None, written_unix=0,
        before=None, round_call=b"", result=None,
    )  # fmt: skip
    with caplog.at_level(logging.INFO, logger="covey.device"):
        go(run_hook((sys.executable, "-c", f"{mark}\n{program}"), 0.7, tmp_path, sidecar))
    assert told in caplog.text
    assert "of round 7" in caplog.text
    assert sum(len(record.getMessage()) for record in caplog.records) < 9000
    for _ in range(500):  # what was killed may take a moment to be gone
        lines = [" ".join(p.info["cmdline"] or []) for p in psutil.process_iter(["cmdline"])]
        if not any(mark in line for line in lines):
            return
        time.sleep(0.01)
    pytest.fail("something is left running")


@pytest.mark.usefixtures("childless")
def test_a_hook_that_cannot_be_run_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    async def scenario() -> None:
        async with Fleet(tmp_path) as fleet:
            settled, seat = Settled(fleet), fleet.seats[0]
            settled.move_in(seat, hook=("/nowhere/at/all",))
            await fleet.play(fleet.run(config(rounds=1)))
            await fleet.until(lambda: "cannot be run: No such file" in caplog.text)

    with caplog.at_level(logging.INFO, logger="covey.device"):
        go(scenario())


@pytest.mark.usefixtures("childless")
def test_a_hook_that_was_cut_short_is_run_again_and_once(tmp_path: Path):
    """The process dies while it runs; the next one runs it, and the one after that does not."""
    ran = tmp_path / "ran"
    program = f"open({str(ran)!r}, 'a').write('x'); import time, os\n"
    slow = (sys.executable, "-c", program + "time.sleep(60)")
    quick = (sys.executable, "-c", program)

    def times() -> int:
        return len(ran.read_text()) if ran.exists() else 0

    async def scenario() -> None:
        async with Fleet(tmp_path) as fleet:
            settled, seat = Settled(fleet), fleet.seats[0]
            settled.move_in(seat, hook=slow)
            await fleet.play(fleet.run(config(rounds=1)))
            await fleet.until(lambda: times() == 1)
            for _ in range(2):
                await seat.service.close()
                await fleet.boot(seat)
                settled.move_in(seat, hook=quick)
                await fleet.until(lambda: (seat.directory / "model" / "hooked").exists())
                await asyncio.sleep(0.3)
            assert times() == 2

    go(scenario())
