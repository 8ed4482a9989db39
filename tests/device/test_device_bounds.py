"""What a device holds from round to round has a bound, however long it runs and whatever it is told."""

import asyncio
from pathlib import Path
from typing import Any, NoReturn

import pytest

from covey_device import service as device_service
from covey_device.actions import Publish
from covey_device.keystore import MemoryFile
from covey_device.memory import MAX_CONTRIBUTIONS, Memory
from covey_shared import wire
from covey_shared.keys import SigningKey
from covey_shared.messages import Decline, DeviceId, RunId
from memory_fleet import FLEET, Fleet, go, hasten


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    hasten(monkeypatch)


def test_contributions_are_remembered_up_to_a_bound_and_the_latest_the_longest(
    tmp_path: Path,
) -> None:
    memory, first = Memory(), bytes(32)
    for number in range(MAX_CONTRIBUTIONS + 100):
        memory = Memory(number, memory.with_contribution(number.to_bytes(32, "big"), 0))
        # Asked for again and again, it is never the one that was contributed to longest ago.
        memory = Memory(number, memory.with_contribution(first, number))
    assert len(memory.contributed) == MAX_CONTRIBUTIONS
    assert memory.contributed[first.hex()] == MAX_CONTRIBUTIONS + 99
    assert next(iter(memory.contributed)) == (101).to_bytes(32, "big").hex()
    file = MemoryFile(tmp_path)
    file.save(memory)
    assert file.load() == memory  # nothing is kept here that a restart would lose


async def never(*_: Any, **__: Any) -> NoReturn:
    await asyncio.Event().wait()
    raise AssertionError


def test_answers_do_not_pile_up_for_a_broker_that_takes_none(tmp_path: Path) -> None:
    """A hostile one plays the coordinator's old messages back, and each is answered again."""
    decline = Decline(FLEET, RunId(bytes(16)), 1, DeviceId("pi-0"), "")
    answer = Publish(wire.sign(decline, SigningKey(bytes(32))))

    async def scenario() -> None:
        async with Fleet(tmp_path, 3) as fleet:
            service = fleet.seats[0].service
            service.transport.publish = never  # type: ignore[method-assign]
            for _ in range(10 * device_service.MAX_OUTBOX):
                await service.perform(answer)
            assert service._outbox.qsize() == device_service.MAX_OUTBOX

    go(scenario())


def test_a_connection_that_comes_and_goes_leaves_no_tasks_behind(tmp_path: Path) -> None:
    """Nothing is acknowledged before it breaks again: who waits to say hello, waits once."""

    async def scenario() -> None:
        async with Fleet(tmp_path, 3) as fleet:
            service = fleet.seats[0].service
            service.transport.publish = never  # type: ignore[method-assign]
            tasks = len(asyncio.all_tasks())
            for _ in range(100):
                await service._on_connected()
                await asyncio.sleep(0)
                service._on_disconnected("it broke")
            assert len(asyncio.all_tasks()) <= tasks

    go(scenario())
