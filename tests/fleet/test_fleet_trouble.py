"""Trouble that is nobody's malice: a full disk, training that diverges, a broker that dies."""

import asyncio
import errno
import os
from pathlib import Path

import msgspec
import pytest

from brokers import Brokers
from covey_coordinator.broker import BrokerKind
from covey_coordinator.round import Moved, Phase
from covey_coordinator.run import RoundOutcome
from covey_device.data import NpzData
from covey_fleet.fleet import DEVICE
from covey_shared import wire
from covey_shared.messages import Decline
from covey_shared.transport import Incoming
from small_fleet import DEADLINES, device_names, go, small_fleet


def test_a_full_spool_costs_the_round_and_not_the_run(
    one_kind: BrokerKind,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    full = True
    reserve = os.posix_fallocate

    def fallocate(fd: int, offset: int, size: int) -> None:
        if full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        reserve(fd, offset, size)

    def on_event(event: object) -> None:
        nonlocal full
        if isinstance(event, RoundOutcome):
            full = False

    monkeypatch.setattr(os, "posix_fallocate", fallocate)

    async def scenario() -> None:
        deadlines = msgspec.structs.replace(DEADLINES, collect_s=2.0)
        async with small_fleet(
            tmp_path, one_kind, rounds=2, on_event=on_event, deadlines=deadlines
        ) as played:
            state = await played.play()
        reason = played.outcomes[0].reason
        assert reason.startswith("0 updates arrived; at least 3 are needed")
        assert "No space left on device; free some space, or move the spool" in reason
        assert "No space left on device" in caplog.text
        assert (state.rounds_completed, state.rounds_abandoned) == (1, 1)
        assert set(played.survivors[1]) == set(device_names(4))
        assert played.fleet.sum_mismatches == 0

    go(scenario())


def test_a_spool_that_is_full_for_a_while_costs_time(
    one_kind: BrokerKind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused: list[int] = []
    reserve = os.posix_fallocate

    def fallocate(fd: int, offset: int, size: int) -> None:
        if len(refused) < 6:
            refused.append(fd)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        reserve(fd, offset, size)

    monkeypatch.setattr(os, "posix_fallocate", fallocate)

    async def scenario() -> None:
        async with small_fleet(tmp_path, one_kind, rounds=1) as played:
            state = await played.play()
        assert len(refused) == 6
        assert state.rounds_completed == 1
        assert set(played.survivors[0]) == set(device_names(4))
        assert played.fleet.sum_mismatches == 0

    go(scenario())


def test_a_device_whose_training_diverges_says_so_and_serves_on(
    one_kind: BrokerKind, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    declined: list[Decline] = []

    async def scenario() -> None:
        # Pixels of 1e28 make the loss overflow in the first batch. Of four devices on the
        # committee three are needed: the one without an update is one of them.
        settings = {"data": {0: NpzData(file="data.npz", scale=1e28)}}
        async with small_fleet(tmp_path, one_kind, rounds=2, settings=settings) as played:
            fleet = played.fleet

            def hear(incoming: Incoming) -> None:
                message = wire.decode(incoming.payload).message
                if isinstance(message, Decline):
                    declined.append(message)

            async def nothing() -> None:
                pass

            ear = fleet.transport("ear", DEVICE)
            await ear.start(hear, nothing, lambda reason: None)
            await ear.subscribe(fleet.topics.outbox("+"))
            state = await played.play()
            await ear.stop()
        assert (state.rounds_completed, state.rounds_abandoned) == (2, 0)
        assert set(played.survivors[0]) == set(played.survivors[1]) == {"pi-2", "pi-3", "pi-4"}
        assert [line["dropped"] for line in played.metrics] == [["pi-1"], ["pi-1"]]
        assert {message.device for message in declined} == {"pi-1"}
        for message in declined:  # what is said in clear tells nothing of the data
            assert message.reason == "its loss or parameters are not finite after training"
        assert "declines the round; lower the learning rate, or check the scale" in caplog.text
        assert fleet.sum_mismatches == 0

    go(scenario())


@pytest.mark.parametrize("phase", [Phase.GATHER, Phase.COLLECT])
def test_a_broker_that_is_killed_and_comes_back(
    brokers: Brokers, tmp_path: Path, phase: Phase
) -> None:
    crashed = asyncio.Event()

    def on_event(event: object) -> None:
        if isinstance(event, Moved) and event.phase is phase:
            crashed.set()

    async def scenario() -> None:
        deadlines = msgspec.structs.replace(DEADLINES, gather_s=20.0)
        async with small_fleet(
            tmp_path, brokers.kind, rounds=2, on_event=on_event, deadlines=deadlines
        ) as played:
            fleet, broker = played.fleet, played.fleet.broker
            assert broker is not None
            playing = asyncio.create_task(played.play())
            await crashed.wait()
            await broker.kill()
            await asyncio.sleep(0.5)
            await brokers.start(broker.directory.name, port=broker.port, users=fleet.users)
            state = await playing
        assert (state.rounds_completed, state.rounds_abandoned) == (2, 0)
        assert fleet.sums_checked == 2
        assert fleet.sum_mismatches == 0
        assert set(played.survivors[1]) == set(device_names(4))

    go(scenario())
