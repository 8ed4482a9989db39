"""The device's service in whole rounds: what disks, networks, data and training do to it."""

import asyncio
import errno
import itertools
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest

import covey_device.keystore
from covey_coordinator.config import CohortConfig
from covey_device import service as device_service
from covey_device.audit import AuditLog
from covey_device.policy import Policy
from covey_device.session import Session
from covey_device.trainer import Work
from covey_shared import wire
from covey_shared.errors import DataError, TrainingError
from covey_shared.keys import SigningKey
from covey_shared.messages import (
    CheckIn,
    Decline,
    MaskedUpdate,
    PlanSignature,
    RosterVote,
    ViewVote,
)
from covey_shared.transport import Incoming
from memory_fleet import TOPICS, Fleet, Seat, config, go, hasten, short
from memory_transport import Delivery, Network


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    hasten(monkeypatch)


def raising(error: BaseException) -> Callable[..., NoReturn]:
    def fail(*_: Any, **__: Any) -> NoReturn:
        raise error

    return fail


def survivors(fleet: Fleet) -> list[tuple[str, ...]]:
    return [o.completed.survivors if o.completed else () for o in fleet.outcomes]


# -- networks --------------------------------------------------------------------------------------


def test_a_connection_that_breaks_in_mid_upload(tmp_path: Path):
    broken: list[str] = []

    async def scenario() -> None:
        async with Fleet(tmp_path) as fleet:
            seat = fleet.seats[1]

            def tamper(delivery: Delivery) -> Iterable[Delivery]:
                if delivery.topic == TOPICS.upload(seat.name) and not broken:
                    broken.append(delivery.topic)
                    asyncio.get_running_loop().call_soon(seat.transport.cut)
                    return ()
                return (delivery,)

            fleet.network.tamper = tamper
            await fleet.play(fleet.run(config(rounds=1)))
            assert broken
            assert survivors(fleet) == [("pi-0", "pi-1", "pi-2", "pi-3")]

    go(scenario())


def test_a_device_that_leaves_after_its_upload_is_in_the_sum(tmp_path: Path):
    async def scenario() -> None:
        async with Fleet(tmp_path) as fleet:
            seat = fleet.seats[1]

            def tamper(delivery: Delivery) -> Iterable[Delivery]:
                if delivery.topic == TOPICS.upload(seat.name):
                    asyncio.get_running_loop().call_soon(lambda: seat.transport.cut(hold=True))
                return (delivery,)

            fleet.network.tamper = tamper
            await fleet.play(fleet.run(config(rounds=1)))
            assert survivors(fleet) == [("pi-0", "pi-1", "pi-2", "pi-3")]

    go(scenario())


def test_a_device_that_restarts_before_its_update_joins_the_next_round(tmp_path: Path):
    async def scenario() -> None:
        async with Fleet(tmp_path) as fleet:
            seat = fleet.seats[1]
            training, let = threading.Event(), threading.Event()

            def on_train(stop: Callable[[], bool]) -> None:
                training.set()
                let.wait(10)

            seat.trainer.on_train = on_train
            playing = asyncio.create_task(fleet.play(fleet.run(config(rounds=2))))
            await fleet.until(training.is_set)
            await seat.service.close(graceful=False)
            seat.trainer.on_train = lambda stop: None
            let.set()
            await fleet.boot(seat)
            await playing
            assert seat.trainer.rounds == 2
            assert survivors(fleet) == [
                ("pi-0", "pi-2", "pi-3"),
                ("pi-0", "pi-1", "pi-2", "pi-3"),
            ]

    go(scenario())


def test_calls_in_quick_succession_do_not_undo_each_other_s_fetching(tmp_path: Path):
    """The first round's fetch of the plan is cancelled while the second one's has begun."""
    held = True

    def tamper(delivery: Delivery) -> Iterable[Delivery]:
        return () if held and delivery.topic.startswith(TOPICS.blob(b"")) else (delivery,)

    async def scenario() -> None:
        nonlocal held
        async with Fleet(tmp_path, network=Network(tamper)) as fleet:
            settings = config(rounds=1, deadlines=short(gather_s=0.1))
            await fleet.play(fleet.run(settings, "first"))
            held = False
            assert (await fleet.play(fleet.run(config(rounds=1), "second"))).rounds_completed == 1
            assert len(survivors(fleet)[1]) == 4
            assert not any("/blob/" in f for seat in fleet.seats for f in seat.transport.filters)

    go(scenario())


def test_closing_without_a_broker_is_quick(tmp_path: Path):
    async def scenario() -> None:
        fleet = Fleet(tmp_path)
        fleet.network.down = True
        seat = await fleet.add("pi-0")
        await asyncio.sleep(0.05)
        async with asyncio.timeout(1):
            await seat.service.close()

    go(scenario())


def test_presence_says_when_a_device_is_there(tmp_path: Path):
    async def scenario() -> None:
        async with Fleet(tmp_path) as fleet:
            retained, topics = (
                fleet.network.retained,
                [TOPICS.presence(s.name) for s in fleet.seats],
            )
            assert [retained[topic] for topic in topics] == [b"online"] * 4
            await fleet.seats[0].service.close()
            await fleet.seats[1].service.close(graceful=False)
            assert [retained[topic] for topic in topics] == [b"offline"] * 2 + [b"online"] * 2

    go(scenario())


# -- floods ----------------------------------------------------------------------------------------


def test_a_flood_is_bounded_and_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    async def scenario() -> None:
        async with Fleet(tmp_path) as fleet:
            victim = fleet.seats[0].service
            for _ in range(500):
                victim._on_message(Incoming(TOPICS.all, bytes(100_000)))
            waiting = victim._inbox.qsize() * 100_000
            assert 0 < waiting <= device_service.MAX_INBOX_BYTES
            assert len([r for r in caplog.records if "flooded" in r.message]) == 1
            assert (await fleet.play(fleet.run(config(rounds=1)))).rounds_completed == 1
            assert len(survivors(fleet)[0]) == 4
            assert victim._inbox_bytes == 0

    go(scenario())


# -- disks -----------------------------------------------------------------------------------------


# Check-in, roster vote, update and view vote each follow a save. That of the roster vote is of two files,
# as the manifest also told the time.
@pytest.mark.parametrize(("write", "save"), [(1, 1), (2, 2), (3, 2), (4, 3), (5, 4)])
def test_what_cannot_be_saved_is_not_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: int, save: int
):
    real, full, saves = os.fsync, [True], []

    def fsync(fd: int) -> None:
        path = str(Path(f"/proc/self/fd/{fd}").readlink())
        if "/pi-1/" in path and "unfinished" not in path:
            saves.append(path)
            if full and len(saves) == write:
                full.clear()
                raise OSError(errno.ENOSPC, "No space left on device")
        real(fd)

    async def scenario() -> None:
        async with Fleet(tmp_path) as fleet:
            monkeypatch.setattr(covey_device.keystore.os, "fsync", fsync)
            seat = fleet.seats[1]
            deadlines = short(gather_s=0.5, collect_s=2.0)
            await fleet.play(fleet.run(config(rounds=2, deadlines=deadlines)))
            assert not full
            everyone = ("pi-0", "pi-1", "pi-2", "pi-3")
            without = ("pi-0", "pi-2", "pi-3")
            assert survivors(fleet) == [everyone if save == 4 else without, everyone]
            assert "No space left" not in seat.ended[0].outcome  # it is nobody else's business
            assert "declined" in seat.ended[0].outcome
            sent = [(t, p[1]) for s, t, p in fleet.network.log if s == seat.name]
            assert len([t for t, _ in sent if "/up/" in t]) == (2 if save == 4 else 1)
            kinds = [kind for t, kind in sent if t == TOPICS.outbox(seat.name)]
            saved = (CheckIn, RosterVote, MaskedUpdate, ViewVote)
            before = kinds[: kinds.index(Decline.CODE)]
            assert {kind.CODE for kind in saved} & set(before) == {
                kind.CODE for kind in saved[: save - 1]
            }

    go(scenario())


# -- data and training -----------------------------------------------------------------------------

TROUBLE = [
    DataError("data.npz is gone"),
    TrainingError("the loss is nan"),
    ZeroDivisionError("a bug in the owner's code"),
    MemoryError(),
    SystemExit("the owner's code gives up"),
    StopIteration(),
]


def test_data_that_cannot_be_opened_costs_a_round(tmp_path: Path):
    """Each in its way, on six devices of nine."""

    async def scenario() -> None:
        async with Fleet(tmp_path, n=9) as fleet:
            seats = fleet.seats[: len(TROUBLE)]
            make = [seat.service.preparation.make_trainer for seat in seats]
            for seat, error in zip(seats, TROUBLE, strict=True):
                seat.service.preparation.make_trainer = raising(error)
            settings = config(rounds=1, n=9, deadlines=short(gather_s=1.0))
            await fleet.play(fleet.run(settings, "one"))
            assert survivors(fleet) == [("pi-6", "pi-7", "pi-8")]
            assert all("declined" in seat.ended[0].outcome for seat in seats)
            for seat, working in zip(seats, make, strict=True):  # nobody restarts anything
                seat.service.preparation.make_trainer = working
            await fleet.play(fleet.run(settings, "two"))
            assert len(survivors(fleet)[1]) == 9

    go(scenario())


async def cohort_of_three(fleet: Fleet) -> Seat:
    """With three members all three are needed for every quorum, also the one without an update."""
    for seat in fleet.seats:
        await seat.service.close()
        await fleet.boot(seat, policy=Policy(min_cohort=2))
    await fleet.until(lambda: len(fleet.coordinator.registry.present) == 3)
    return fleet.seats[1]


def test_training_that_fails_costs_the_update_and_no_duty(tmp_path: Path):
    """Seven members of nine are needed for every quorum, so those without an update must serve."""

    async def scenario() -> None:
        async with Fleet(tmp_path, n=9) as fleet:
            seats = fleet.seats[: len(TROUBLE)]
            for seat, error in zip(seats, TROUBLE, strict=True):
                seat.trainer.on_train = raising(error)
            state = await fleet.play(fleet.run(config(rounds=1, n=9), "one"))
            assert state.rounds_completed == 1, fleet.outcomes
            assert survivors(fleet) == [("pi-6", "pi-7", "pi-8")]
            for seat in seats:
                seat.trainer.on_train = lambda stop: None
            await fleet.play(fleet.run(config(rounds=1, n=9), "two"))
            assert len(survivors(fleet)[1]) == 9

    go(scenario())


def test_an_update_with_nan_is_never_sent(tmp_path: Path):
    """The trainer refuses such a one; should it not, the session must."""

    async def scenario() -> None:
        async with Fleet(tmp_path, n=3) as fleet:
            seat = await cohort_of_three(fleet)
            seat.trainer.change = lambda delta: delta * np.float32("nan")
            settings = config(rounds=1, cohort=CohortConfig(goal=3, minimum=2))
            await fleet.play(fleet.run(settings))
            assert survivors(fleet) == [("pi-0", "pi-2")]
            assert not [t for s, t, _ in fleet.network.log if s == seat.name and "/up/" in t]

    go(scenario())


def test_a_device_in_training_still_does_its_duties(tmp_path: Path):
    """One that trains too long is left out of the sum, and votes and reveals all the same."""

    async def scenario() -> None:
        async with Fleet(tmp_path, n=3) as fleet:
            seat = await cohort_of_three(fleet)

            def train(stop: Callable[[], bool]) -> None:
                for _ in range(2000):
                    if stop():
                        return
                    time.sleep(0.01)

            seat.trainer.on_train = train
            settings = config(
                rounds=1, cohort=CohortConfig(goal=3, minimum=2), deadlines=short(collect_s=1.0)
            )
            state = await fleet.play(fleet.run(settings))
            assert state.rounds_completed == 1, fleet.outcomes
            assert survivors(fleet) == [("pi-0", "pi-2")]
            assert any(
                s == seat.name and p[1:2] == bytes((RosterVote.CODE,))
                for s, _, p in fleet.network.log
            )

    go(scenario())


def test_a_model_beyond_the_memory_limit_is_declined(tmp_path: Path):
    async def scenario() -> None:
        async with Fleet(tmp_path) as fleet:
            seat = fleet.seats[1]
            seat.service.preparation.limits = Work(100, 1, 60.0, max_resident_bytes=10_000)
            await fleet.play(fleet.run(config(rounds=1, deadlines=short(gather_s=0.5))))
            assert survivors(fleet) == [("pi-0", "pi-2", "pi-3")]
            assert "19240 bytes; this device takes at most 10000" in seat.ended[0].outcome

    go(scenario())


# -- model owners ----------------------------------------------------------------------------------


def test_devices_with_owners_run_what_these_signed_and_fetch_nothing_else(tmp_path: Path):
    owner = SigningKey(b"o" * 32)

    async def scenario() -> None:
        async with Fleet(tmp_path) as fleet:
            for seat in fleet.seats:
                await seat.service.close()
                await fleet.boot(seat, policy=Policy(owners=frozenset([owner.public])))
            await fleet.until(lambda: len(fleet.coordinator.registry.present) == 4)
            settings = config(rounds=1, deadlines=short(gather_s=0.3))
            state = await fleet.play(fleet.run(settings, "unsigned"))
            assert state.rounds_completed == 0
            said = [
                wire.decode(payload).message.LABEL
                for sender, topic, payload in fleet.network.log
                if topic.startswith(TOPICS.outbox(""))
            ]
            assert said == ["decline"] * 4
            signature = wire.sign(PlanSignature(owner.public, fleet.bundle.hash), owner)
            fleet.bundle = replace(fleet.bundle, signatures=(signature.envelope,))
            state = await fleet.play(fleet.run(config(rounds=1), "signed"))
            assert state.rounds_completed == 1
            assert len(survivors(fleet)[-1]) == 4
            entry = AuditLog(fleet.seats[0].directory).last("joined")
            assert entry["signed_by"] == [owner.public.hex()]

    go(scenario())


# -- our own bugs ----------------------------------------------------------------------------------


def test_a_message_that_hits_a_bug_is_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    real = Session.receive
    broken = [1, 2, 3]

    def receive(session: Session, data: bytes) -> Any:
        if session.device == "pi-1" and broken:
            broken.pop()
            raise ZeroDivisionError("a bug")
        return real(session, data)

    monkeypatch.setattr(Session, "receive", receive)

    async def scenario() -> None:
        async with Fleet(tmp_path) as fleet:
            state = await fleet.play(fleet.run(config(rounds=2)))
            assert state.rounds_completed == 2
            assert survivors(fleet)[1] == ("pi-0", "pi-1", "pi-2", "pi-3")

    with caplog.at_level(logging.CRITICAL):
        go(scenario())
    assert not broken


# -- the line for its owner ------------------------------------------------------------------------


def test_what_a_device_is_at_is_told_in_one_line_each_time_that_changes(tmp_path: Path):
    lines: list[str] = []

    async def scenario() -> None:
        async with Fleet(tmp_path) as fleet:
            seat = fleet.seats[1]
            seat.service.on_status = lines.append
            await fleet.play(fleet.run(config(rounds=1)))
            await fleet.until(lambda: bool(seat.ended))
            assert lines[0].startswith("round 1: ")
            assert "round 1: training" in lines
            assert lines[-1] == seat.service.status_line == "waiting for a round"
            assert all(one != other for one, other in itertools.pairwise(lines))
            seat.transport.cut(hold=True)
            assert lines[-1] == "not connected to the broker; waiting for a round"

    go(scenario())
