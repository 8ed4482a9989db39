"""A real mosquitto that is killed in every phase of a round, with all it remembers lost, or kept on its disk.

Nobody is told; whoever waits for something asks again. Every update is in every sum.
"""

import asyncio
import signal
from pathlib import Path
from typing import Any

import pytest

from brokers import PASSWORD, USER, Brokers
from covey_coordinator.round import Moved, Phase
from covey_shared.mqtt import MqttTransport
from covey_shared.topics import OFFLINE
from covey_shared.transport import Will
from live_fleet import LiveFleet, patient
from memory_fleet import go, hasten

only_mosquitto = pytest.mark.parametrize(
    "broker_kind", ["mosquitto"], indirect=True, scope="session"
)
ROUNDS = 7
PHASES = ("gather", "share", "roster", "collect", "view", "unmask")


class Lasting:
    """Stands where a fleet has its network: devices have sessions that outlive their connections."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.log: list[str] = []

    def client(self, name: str, will: Will | None = None) -> MqttTransport:
        self.log.append(name)
        return MqttTransport(
            self.url,
            name,
            username=USER,
            password=PASSWORD,
            will=will,
            session_s=0.0 if name.startswith("coordinator") else 300.0,
            backoff_base_s=0.05,
            backoff_cap_s=0.2,
        )


def dying(brokers: Brokers, fleet: LiveFleet, broker: Any, *, forgets: bool) -> Any:
    """What makes the broker die once in each phase, of one round each. One that forgets dies before the
    phase's first message is out, another when it has saved all there is, the phase's messages included."""
    done: list[str] = []
    tasks: list[asyncio.Task[None]] = []
    state = {"broker": broker}

    async def revive() -> None:
        old = state["broker"]
        if not forgets:
            await asyncio.sleep(0.02)
            saved = old.directory / "mosquitto.db"
            before = saved.stat().st_mtime_ns if saved.exists() else 0
            old.process.send_signal(signal.SIGUSR1)  # have it save
            for _ in range(100):
                await asyncio.sleep(0.01)
                if saved.exists() and saved.stat().st_mtime_ns > before:
                    break
        await old.kill()
        if forgets:
            for path in old.directory.glob("mosquitto.db*"):
                path.unlink()
        state["broker"] = await brokers.start(port=old.port)

    def on_event(event: Any) -> None:
        turn = len(done)
        wanted = PHASES[turn] if turn < len(PHASES) else None
        reviving = any(not task.done() for task in tasks)
        if isinstance(event, Moved) and event.phase.value == wanted and not reviving:
            done.append(wanted)
            if forgets:
                state["broker"].process.kill()
            tasks.append(asyncio.create_task(revive()))

    fleet.on_event = on_event
    return done, tasks


@only_mosquitto
@pytest.mark.parametrize("forgets", [True, False], ids=["forgets", "remembers"])
def test_a_broker_that_dies_in_every_phase_costs_time_and_no_update(
    brokers: Brokers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forgets: bool
) -> None:
    hasten(monkeypatch)

    async def scenario() -> None:
        broker = await brokers.start()
        fleet = LiveFleet(tmp_path / "fleet", "deaths", broker.url)
        fleet.network = Lasting(broker.url)  # type: ignore[assignment]
        async with fleet:
            done, tasks = dying(brokers, fleet, broker, forgets=forgets)
            # one more than there are phases: it may be back too late for the next one
            state = await fleet.play(fleet.run(patient(rounds=ROUNDS)), timeout_s=100)
            await asyncio.gather(*tasks)
            assert done == list(PHASES)
            assert (state.rounds_completed, state.rounds_abandoned) == (ROUNDS, 0)
            everybody = tuple(fleet.names)
            assert [o.completed.survivors for o in fleet.outcomes if o.completed] == [
                everybody
            ] * ROUNDS
            registry = fleet.coordinator.registry
            await fleet.until(lambda: registry.present == frozenset(everybody))

    go(scenario(), 120)


@only_mosquitto
def test_who_is_gone_when_the_broker_is_back_is_not_there_for_ever(
    brokers: Brokers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its last will died with the broker."""
    from covey_coordinator import service

    hasten(monkeypatch)
    monkeypatch.setattr(service, "CONFIRM_S", 1.5)

    async def scenario() -> None:
        broker = await brokers.start()
        async with LiveFleet(tmp_path / "fleet", "gone", broker.url) as fleet:
            everybody = frozenset(fleet.names)
            await broker.kill()
            for path in broker.directory.glob("mosquitto.db*"):
                path.unlink()
            await fleet.seats[0].service.close(graceful=False)
            assert fleet.coordinator.registry.present == everybody
            await brokers.start(port=broker.port)
            rest = everybody - {fleet.seats[0].name}
            await fleet.until(lambda: fleet.coordinator.registry.present == rest)
            assert (await fleet.play(fleet.run(patient(n=3)))).rounds_completed == 1
            assert fleet.coordinator.registry.present == rest

    go(scenario())


@only_mosquitto
def test_messages_of_old_rounds_that_waited_do_no_harm(
    brokers: Brokers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device is away for two rounds, and hears all of them when it is back, in the middle of a third."""
    hasten(monkeypatch)

    async def scenario() -> None:
        broker = await brokers.start()
        fleet = LiveFleet(tmp_path / "fleet", "stale", broker.url)
        fleet.network = Lasting(broker.url)  # type: ignore[assignment]
        async with fleet:
            seat = fleet.seat("pi-0")
            back, heard = asyncio.Event(), []
            transport: Any = seat.transport
            establish, hear = transport._establish, seat.service._on_message

            async def held(connection: Any) -> Any:
                await back.wait()
                return await establish(connection)

            transport._establish = held
            transport._on_message = lambda incoming: (heard.append(incoming), hear(incoming))
            transport._current._drop("the test cut it")
            presence = fleet.topics.presence(seat.name)
            await fleet.coordinator.transport.publish(presence, OFFLINE, retain=True)
            await fleet.until(lambda: len(fleet.coordinator.registry.present) == 3)
            away = await fleet.play(fleet.run(patient(rounds=2, n=3), "away"))
            assert away.rounds_completed == 2

            def on_event(event: Any) -> None:
                if isinstance(event, Moved) and event.phase is Phase.GATHER:
                    back.set()

            fleet.on_event = on_event
            third = await fleet.play(fleet.run(patient(rounds=1, n=4), "third"))
            assert third.rounds_completed == 1
            completed = fleet.outcomes[-1].completed
            assert completed is not None
            assert seat.name in completed.survivors
            stale = [m for m in heard if m.topic == fleet.topics.all and not m.retained]
            assert len(stale) > 10, "two rounds' worth came first"
            assert not fleet.coordinator.registry.faults

    go(scenario())
