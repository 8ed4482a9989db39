"""The coordinator's service with real devices on a network that does what networks do.

Every sum of every run here is checked against the devices' own plaintext (`Fleet.play`).
"""

import asyncio
import os
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from covey_coordinator import blobs, inbox, registry
from covey_coordinator.averaging import FedAvg
from covey_coordinator.round import Moved, Round
from covey_coordinator.run import HeldOut
from covey_coordinator.service import CoordinatorService
from covey_shared.messages import MaskedUpdate
from covey_shared.topics import OFFLINE, ONLINE
from memory_fleet import SHORT, TOPICS, Fleet, config, go, hasten, short
from memory_transport import Delivery, Network


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    hasten(monkeypatch)


def is_kind(payload: bytes, kind: Any) -> bool:
    return payload[1:2] == bytes((kind.CODE,))


def test_a_whole_run(tmp_path: Path):
    held_out = HeldOut(np.zeros((8, 1, 8, 8), np.float32), np.zeros(8, np.int64))

    async def scenario() -> None:
        async with Fleet(tmp_path, held_out=held_out) as fleet:
            run = fleet.run(config(rounds=3))
            state = await fleet.play(run)
            assert (state.status, state.rounds_done, state.rounds_completed) == ("completed", 3, 3)
            lines = run.directory.read_metrics()
            assert [line["index"] for line in lines] == [1, 2, 3]
            assert [line["round"] for line in lines] == [1, 2, 3]
            assert all(line["survivors"] == 4 and line["dropped"] == [] for line in lines)
            assert all(line["train_loss"] == pytest.approx(0.5, abs=0.05) for line in lines)
            assert all(0 <= line["test_accuracy"] <= 1 for line in lines)
            assert lines[0]["model"] != lines[1]["model"]
            for index in (1, 2, 3):
                assert (run.directory.path / "rounds" / f"{index:05}" / "model.onnx").stat().st_size
            # The model is the initial one plus the averages, in their order.
            expected = fleet.bundle.initial
            for _, completed in sorted(fleet.sums.items()):
                total = completed.encoding.decode_sum(completed.ring_sum)
                expected = FedAvg().step(expected, total)
            assert (np.fromfile(run.directory.path / "parameters.bin", "<f4") == expected).all()
            # Devices learn how it ended, and the broker keeps no call of a round that is over.
            await fleet.until(lambda: all(len(seat.ended) == 3 for seat in fleet.seats))
            assert all(ended.contributed for seat in fleet.seats for ended in seat.ended)
            assert TOPICS.round not in fleet.network.retained

    go(scenario())


# -- what networks do ------------------------------------------------------------------------------


def test_a_round_is_called_only_once_it_can_be_heard_of(tmp_path: Path):
    """Its time to gather would be over when the call goes out at last."""

    async def scenario() -> None:
        async with Fleet(tmp_path) as fleet:
            fleet.transport.cut(hold=True)
            run = fleet.run(config(rounds=1, deadlines=short(gather_s=0.3)))
            playing = asyncio.create_task(fleet.play(run))
            await asyncio.sleep(0.6)
            assert not fleet.events
            fleet.transport.held = False
            state = await playing
            assert (state.rounds_completed, state.rounds_abandoned) == (1, 0)

    go(scenario())


@pytest.mark.parametrize(
    ("phase", "deadline"),
    [
        ("gather", "gather_s"),
        ("share", "share_s"),
        ("roster", "share_s"),
        ("collect", "collect_s"),
        ("view", "unmask_s"),
        ("unmask", "unmask_s"),
    ],
)
def test_a_phase_lasts_from_when_it_was_heard_of(tmp_path: Path, phase: str, deadline: str):
    """The connection is lost in the moment that a phase begins, for longer than the phase may last."""

    async def scenario() -> None:
        async with Fleet(tmp_path) as fleet:
            cut = asyncio.Event()

            def on_event(event: Any) -> None:
                if isinstance(event, Moved) and event.phase.value == phase and not cut.is_set():
                    fleet.transport.cut(hold=True)
                    cut.set()

            fleet.on_event = on_event
            brief = short(**{deadline: 2.0})
            playing = asyncio.create_task(fleet.play(fleet.run(config(rounds=1, deadlines=brief))))
            await cut.wait()
            await asyncio.sleep(2.2)
            fleet.transport.held = False
            state = await playing
            assert (state.rounds_completed, state.rounds_abandoned) == (1, 0)

    go(scenario())


def test_lost_chunks_are_asked_for_again_on_both_sides(tmp_path: Path):
    lost: Counter[tuple[str, str]] = Counter()

    def tamper(delivery: Delivery) -> Iterable[Delivery]:
        chunk = delivery.topic.startswith((TOPICS.blob(b""), TOPICS.upload("")))
        lost[delivery.topic, delivery.receiver] += chunk
        return () if chunk and lost[delivery.topic, delivery.receiver] == 1 else (delivery,)

    async def scenario() -> None:
        async with Fleet(tmp_path, network=Network(tamper)) as fleet:
            state = await fleet.play(fleet.run(config(rounds=1)))
            assert state.rounds_completed == 1
            assert fleet.outcomes[0].completed is not None
            assert len(fleet.outcomes[0].completed.survivors) == 4
            assert all(count >= 2 for count in lost.values() if count)
            assert len(lost) >= 4 + 3 * 4  # uploads; header, graph and model for each

    go(scenario())


def test_doubled_and_reordered_messages_change_nothing(tmp_path: Path):
    chance = random.Random(1)

    def tamper(delivery: Delivery) -> Iterable[Delivery]:
        for _ in range(3):
            yield Delivery(
                delivery.sender, delivery.receiver, delivery.incoming, chance.random() * 0.08
            )

    async def scenario() -> None:
        async with Fleet(tmp_path) as fleet:
            fleet.network.tamper = tamper
            state = await fleet.play(fleet.run(config(rounds=3)))
            assert state.rounds_completed == 3
            assert all(len(o.completed.survivors) == 4 for o in fleet.outcomes if o.completed)
            assert not fleet.coordinator.registry.faults

    go(scenario())


def test_a_network_that_loses_doubles_and_delays(tmp_path: Path):
    chance = random.Random(2)

    def tamper(delivery: Delivery) -> Iterable[Delivery]:
        for _ in range(chance.choice((0, 1, 1, 1, 1, 1, 1, 1, 2))):
            yield Delivery(
                delivery.sender, delivery.receiver, delivery.incoming, chance.random() * 0.1
            )

    async def scenario() -> None:
        async with Fleet(tmp_path) as fleet:
            fleet.network.tamper = tamper
            state = await fleet.play(fleet.run(config(rounds=2, deadlines=short(resend_s=0.2))))
            assert state.rounds_completed == 2, fleet.outcomes

    go(scenario())


def test_the_broker_goes_away_and_forgets_everything(tmp_path: Path):
    async def scenario() -> None:
        async with Fleet(tmp_path) as fleet:
            run = fleet.run(config(rounds=2))
            playing = asyncio.create_task(fleet.play(run))
            await fleet.phase("gather")
            await fleet.network.go_down()
            await asyncio.sleep(0.2)
            assert not fleet.coordinator.transport_up
            await fleet.network.come_back()
            state = await playing
            assert state.rounds_completed == 2
            calls = [
                1 for _, topic, payload in fleet.network.log if topic == TOPICS.round and payload
            ]
            assert len(calls) >= 3  # the interrupted call went out again

    go(scenario())


@pytest.mark.parametrize("always", [False, True], ids=["once", "always"])
def test_an_upload_that_is_not_what_was_announced(tmp_path: Path, always: bool):
    tampered: list[str] = []

    def tamper(delivery: Delivery) -> Iterable[Delivery]:
        if delivery.topic == TOPICS.upload("pi-2") and (always or not tampered):
            tampered.append(delivery.topic)
            payload = bytearray(delivery.incoming.payload)
            payload[-1] ^= 1
            return (delivery.changed(bytes(payload)),)
        return (delivery,)

    async def scenario() -> None:
        async with Fleet(tmp_path, network=Network(tamper)) as fleet:
            deadlines = short(collect_s=2.0, resend_s=0.2) if always else SHORT
            state = await fleet.play(fleet.run(config(rounds=1, deadlines=deadlines)))
            assert state.rounds_completed == 1
            completed = fleet.outcomes[0].completed
            assert completed is not None
            assert ("pi-2" in completed.dropped) == always
            assert len(tampered) == (1 + blobs.MAX_RESETS if always else 1)

    go(scenario())


def test_chunks_may_overtake_their_announcement(tmp_path: Path):
    def tamper(delivery: Delivery) -> Iterable[Delivery]:
        late = is_kind(delivery.incoming.payload, MaskedUpdate)
        yield Delivery(delivery.sender, delivery.receiver, delivery.incoming, 0.1 if late else 0.0)

    async def scenario() -> None:
        async with Fleet(tmp_path, network=Network(tamper)) as fleet:
            await fleet.play(fleet.run(config(rounds=1, deadlines=short(resend_s=30.0))))
            chunks = [t for _, t, _ in fleet.network.log if t.startswith(TOPICS.upload(""))]
            assert len(chunks) == 4  # none was asked for again

    go(scenario())


# -- what strangers do -----------------------------------------------------------------------------


def test_ten_thousand_messages_of_garbage(tmp_path: Path):
    chance = random.Random(3)
    names = ["pi-0", "pi-3", "ghost", "x" * 33, "A/B", "ghost-2"]

    def garbage(fleet: Fleet) -> tuple[str, bytes]:
        sender, topic, payload = chance.choice(fleet.network.log)
        if chance.random() < 0.5 and payload and sender != "stranger":
            changed = bytearray(payload)
            for _ in range(chance.randint(1, 3)):
                changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
            return topic, bytes(changed[: chance.choice((None, len(changed) // 2))])
        name = chance.choice(names)
        topic = chance.choice(
            [TOPICS.round, TOPICS.all, TOPICS.inbox(name), TOPICS.outbox(name), TOPICS.upload(name),
             TOPICS.presence(name), TOPICS.blob(os.urandom(32)), "covey/memory/else", "covey"]
        )  # fmt: skip
        return topic, chance.randbytes(chance.choice((0, 1, 66, 200, 3000)))

    async def scenario() -> None:
        async with Fleet(tmp_path) as fleet:
            playing = asyncio.create_task(fleet.play(fleet.run(config(rounds=3))))
            sent = 0
            while not playing.done():
                if sent < 10_000:
                    for _ in range(100):
                        fleet.network.publish("stranger", *garbage(fleet))
                    sent += 100
                    del fleet.network.log[2000:]
                await asyncio.sleep(0.002)
            state = await playing
            assert state.rounds_completed == 3, fleet.outcomes
            while sent < 10_000:  # the rounds were quicker than the stranger
                fleet.network.publish("stranger", *garbage(fleet))
                sent += 1
            await asyncio.sleep(0.1)
            assert (await fleet.play(fleet.run(config(rounds=1), "after"))).rounds_completed == 1

    go(scenario(), 120)


def test_thousands_of_devices_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(registry, "MAX_PRESENT", 3000)

    async def scenario() -> None:
        async with Fleet(tmp_path) as fleet:
            for i in range(5000):
                fleet.network.publish("stranger", TOPICS.presence(f"ghost-{i}"), ONLINE)
            await asyncio.sleep(0.1)
            assert len(fleet.coordinator.registry.present) == 3000
            playing = asyncio.create_task(
                fleet.play(fleet.run(config(rounds=1, deadlines=short(gather_s=1.0))))
            )
            await fleet.phase("gather")
            for i in range(2000):  # they come and go while a round is on
                fleet.network.publish("stranger", TOPICS.presence(f"ghost-{i}"), OFFLINE)
                fleet.network.publish("stranger", TOPICS.presence(f"ghost-{i}"), ONLINE)
            # All that they can do is to have the round wait for them.
            assert (await playing).rounds_completed == 1

    go(scenario())


def test_a_device_that_talks_too_much_loses_its_own_messages_only():
    async def scenario() -> None:
        box = inbox.Inbox()
        taken = [box.heard("loud", b"x") for _ in range(100)]  # type: ignore[arg-type]
        assert sum(taken) == inbox.MAX_PER_DEVICE
        assert box.heard("quiet", b"y")  # type: ignore[arg-type]
        for _ in range(inbox.MAX_PER_DEVICE):
            await box.get()
        event = await box.get()
        assert isinstance(event, inbox.Heard)
        assert event.data == b"y"
        assert box.heard("loud", b"x")  # type: ignore[arg-type]

    go(scenario())


def test_what_waits_is_bounded_in_bytes(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(inbox, "MAX_BYTES", 10 * (100 + inbox.OVERHEAD_BYTES))

    async def scenario() -> None:
        box = inbox.Inbox()
        taken = [box.heard(f"d{i}", bytes(100)) for i in range(20)]  # type: ignore[arg-type]
        assert sum(taken) == 10
        await box.get()
        assert box.heard("d30", bytes(100))  # type: ignore[arg-type]
        assert not box.heard("d31", bytes(100))  # type: ignore[arg-type]

    go(scenario())


def test_of_presence_only_the_last_word_is_kept():
    async def scenario() -> None:
        box = inbox.Inbox()
        for i in range(1000):
            box.presence("pi", bool(i % 2))  # type: ignore[arg-type]
        assert len(box) == 1
        assert await box.get() == inbox.Presence("pi", True)  # type: ignore[arg-type]
        assert len(box) == 0

    go(scenario())


# -- our own bugs ----------------------------------------------------------------------------------


def test_a_bug_costs_a_round_and_not_the_service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    real, broken = Round.tick, [True]

    def tick(machine: Round, now: float, now_unix: int) -> Any:
        if broken:
            raise ZeroDivisionError("a bug")
        return real(machine, now, now_unix)

    async def scenario() -> None:
        # Only a tick ends this round's gathering: the third device is present and silent.
        async with Fleet(tmp_path, n=2) as fleet:
            monkeypatch.setattr(Round, "tick", tick)
            fleet.on_event = lambda event: broken.clear() if fleet.outcomes else None
            await fleet.coordinator.play(
                fleet.run(config(rounds=2, n=3, deadlines=short(gather_s=0.5)))
            )
            assert fleet.outcomes[0].reason == "unexpected ZeroDivisionError: a bug"
            assert "checked in" in fleet.outcomes[1].reason

    go(scenario())


def test_a_message_that_hits_a_bug_is_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    real = Round.receive

    def receive(machine: Round, data: bytes, sender: Any, *rest: Any) -> Any:
        if sender == "pi-1":
            raise ZeroDivisionError("a bug")
        return real(machine, data, sender, *rest)

    monkeypatch.setattr(Round, "receive", receive)

    async def scenario() -> None:
        async with Fleet(tmp_path) as fleet:
            settings = config(rounds=1, deadlines=short(gather_s=0.5))
            assert (await fleet.play(fleet.run(settings))).rounds_completed == 1
            assert fleet.outcomes[0].cohort == 3

    go(scenario())


def test_an_observer_that_fails_is_no_reason_to_stop(tmp_path: Path):
    async def scenario() -> None:
        async with Fleet(tmp_path) as fleet:

            def fail(event: Any) -> None:
                raise RuntimeError("nobody looks")

            fleet.on_event = fail
            assert (await fleet.play(fleet.run(config(rounds=1)))).rounds_completed == 1

    go(scenario())


def test_closing_without_a_broker_is_quick(tmp_path: Path):
    async def scenario() -> None:
        fleet = Fleet(tmp_path)
        fleet.network.down = True
        assert isinstance(fleet.coordinator, CoordinatorService)
        await fleet.coordinator.start()
        async with asyncio.timeout(1):
            await fleet.coordinator.close()

    go(scenario())


PLAYS_A_ROUND = """
import sys, tempfile
from pathlib import Path
from memory_fleet import Fleet, config, go

async def scenario():
    async with Fleet(Path(tempfile.mkdtemp(dir=sys.argv[1])), n=3) as fleet:
        assert (await fleet.play(fleet.run(config(rounds=1, n=3)))).rounds_completed == 1

go(scenario())
heavy = {"torch", "onnx", "onnxscript", "sklearn", "matplotlib", "amqtt", "rich"}
print(sorted(heavy & set(sys.modules)))
"""


def test_a_coordinator_that_plays_rounds_loads_no_torch(tmp_path: Path):
    done = subprocess.run(
        [sys.executable, "-c", PLAYS_A_ROUND, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
