"""Who is there: no round is called for too few, and who did not come back to a broker is forgotten."""

import asyncio
import logging
from pathlib import Path

import pytest

from covey_coordinator import service
from covey_coordinator.registry import Registry
from covey_coordinator.store import Progress
from covey_shared.messages import DeviceId, RoundCall
from memory_fleet import Fleet, config, go, hasten, short

A, B, C = DeviceId("a"), DeviceId("b"), DeviceId("c")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    hasten(monkeypatch)
    monkeypatch.setattr(service, "CALL_ANYWAY_S", 300.0)


def calls(fleet: Fleet) -> int:
    """How many times a round was called, repeats included."""
    return sum(data[1:2] == bytes((RoundCall.CODE,)) for _, _, data in fleet.network.log)


# -- whom the registry believes in ----------------------------------------------------------------


def test_who_is_doubted_is_there_until_it_is_settled():
    registry = Registry()
    for device in (A, B, C):
        registry.presence(device, True)
    registry.doubt()
    assert registry.present == {A, B, C}
    registry.presence(A, True)  # no news, but a word of it
    registry.presence(B, False)
    assert registry.settle() == {C}
    assert registry.present == {A}


def test_without_doubt_nothing_is_settled():
    registry = Registry()
    registry.presence(A, True)
    assert registry.settle() == frozenset()
    registry.doubt()
    registry.presence(A, True)
    assert registry.settle() == frozenset()
    assert registry.settle() == frozenset()
    assert registry.present == {A}


def test_who_joined_is_told_from_who_did_not():
    registry = Registry({A: b"a" * 32, B: b"b" * 32, C: b"c" * 32}, frozenset((b"c" * 32,)))
    assert registry.known == 0
    for device in (A, C, DeviceId("stranger")):
        registry.presence(device, True)
    assert registry.known == 1
    assert len(registry.present) == 2


def test_who_came_since_is_not_doubted():
    registry = Registry()
    registry.doubt()
    registry.presence(A, True)
    assert registry.settle() == frozenset()
    assert registry.present == {A}


# -- rounds for enough ----------------------------------------------------------------------------


def test_no_round_is_called_for_fewer_than_the_least(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    async def scenario() -> None:
        async with Fleet(tmp_path, n=2) as fleet:
            playing = asyncio.create_task(fleet.play(fleet.run(config(rounds=2, n=3))))

            def waiting() -> list[Progress]:
                told = [e for e in fleet.events if isinstance(e, Progress)]
                return [e for e in told if e.phase == service.WAITING]

            await fleet.until(lambda: len(waiting()) >= 2)
            assert calls(fleet) == 0
            assert {(e.answered, e.awaited, e.present) for e in waiting()} == {(2, 3, 2)}
            await fleet.add("late")
            assert (await playing).rounds_completed == 2

    with caplog.at_level(logging.WARNING, logger="covey.coordinator"):
        go(scenario())
    said = [r.message for r in caplog.records if service.WAITING in r.message]
    assert said == ["waiting for devices: 2 of 3 online"]


def test_presence_may_lie_and_a_round_is_called_in_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(service, "CALL_ANYWAY_S", 0.5)

    async def scenario() -> None:
        async with Fleet(tmp_path, n=4) as fleet:
            fleet.coordinator.registry._present.clear()
            state = await fleet.play(fleet.run(config(rounds=1)))
            assert state.rounds_completed == 1

    go(scenario())


def test_whoever_stops_the_run_is_not_kept_waiting(tmp_path: Path):
    async def scenario() -> None:
        async with Fleet(tmp_path, n=1) as fleet:
            stop = asyncio.Event()
            playing = asyncio.create_task(
                fleet.coordinator.play(fleet.run(config(rounds=1)), stop=stop)
            )
            await asyncio.sleep(0.2)
            stop.set()
            async with asyncio.timeout(10):
                state = await playing
            assert (calls(fleet), state.rounds_completed, state.rounds_abandoned) == (0, 0, 0)

    go(scenario())


# -- a broker's new life --------------------------------------------------------------------------


def test_who_does_not_come_back_is_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(service, "CONFIRM_S", 0.5)

    async def scenario() -> None:
        async with Fleet(tmp_path) as fleet:
            names = {seat.name for seat in fleet.seats}
            lost = fleet.seats[0]
            lost.transport.held = True
            lost.transport.cut(will=False, hold=True)  # the broker has yet to notice
            assert fleet.coordinator.registry.present == names
            await fleet.network.go_down()
            await fleet.network.come_back()
            await fleet.until(lambda: fleet.coordinator.transport_up)
            assert fleet.coordinator.registry.present == names, "they are given time"
            await fleet.until(lambda: fleet.coordinator.registry.present == names - {lost.name})
            settings = config(rounds=1, n=3, deadlines=short(gather_s=60.0))
            assert (await fleet.play(fleet.run(settings))).rounds_completed == 1

    go(scenario())


def test_a_round_hears_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """One that waits for a device that is gone: it goes on as soon as that is known."""
    monkeypatch.setattr(service, "CONFIRM_S", 0.5)

    async def scenario() -> None:
        async with Fleet(tmp_path) as fleet:
            lost = fleet.seats[0]
            lost.transport.held = True
            lost.transport.cut(will=False, hold=True)
            patient = config(rounds=1, n=3, deadlines=short(gather_s=60.0))
            playing = asyncio.create_task(fleet.play(fleet.run(patient)))
            await fleet.phase("gather")
            await fleet.network.go_down()
            await fleet.network.come_back()
            assert (await playing).rounds_completed == 1
            (outcome,) = fleet.outcomes
            assert outcome.phase_seconds["gather"] < 30

    go(scenario())


def test_a_broker_that_remembers_keeps_all_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The coordinator alone was away: the broker tells it at once who is there."""
    monkeypatch.setattr(service, "CONFIRM_S", 0.2)

    async def scenario() -> None:
        async with Fleet(tmp_path) as fleet:
            before = fleet.coordinator.registry.present
            assert len(before) == 4
            fleet.transport.cut()
            await fleet.until(lambda: not fleet.coordinator.transport_up)
            await fleet.until(lambda: fleet.coordinator.transport_up)
            confirming = fleet.coordinator._confirming
            assert confirming is not None
            await asyncio.wait_for(asyncio.shield(confirming), 10)
            assert fleet.coordinator.registry.present == before

    go(scenario())


def test_who_speaks_before_the_connection_is_told_of_is_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Presence comes as soon as the subscription stands, and each device says it once."""
    monkeypatch.setattr(service, "CONFIRM_S", 0.2)

    async def scenario() -> None:
        async with Fleet(tmp_path) as fleet:
            before = fleet.coordinator.registry.present
            coordinator, connected = fleet.coordinator, fleet.transport._on_connected

            async def late() -> None:
                while coordinator.registry._doubted:
                    await asyncio.sleep(0.01)
                await connected()

            fleet.transport._on_connected = late
            fleet.transport.cut()
            assert coordinator.registry._doubted == before
            await fleet.until(lambda: not coordinator.transport_up)
            await fleet.until(lambda: coordinator.transport_up)
            assert coordinator._confirming is not None
            await asyncio.wait_for(asyncio.shield(coordinator._confirming), 10)
            assert coordinator.registry.present == before

    go(scenario())
