"""What the coordinator holds from round to round has a bound, whoever talks and however long it runs."""

import asyncio
import ipaddress
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from covey_coordinator import inbox, registry
from covey_coordinator.config import load_fleet
from covey_coordinator.enrolment import desk, keeper
from covey_coordinator.inbox import Inbox
from covey_coordinator.registry import Registry
from covey_shared.messages import DeviceId
from enrolling import make_fleet
from memory_fleet import Fleet, config, go, hasten

NAMES = [DeviceId(f"made-up-{i}") for i in range(10_000)]


def grown(step: Callable[[], Any]) -> int:
    """Bytes that a step leaves behind in this process's Python objects."""
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        kept = step()  # what it gives back is not yet gone
        after = tracemalloc.get_traced_memory()[0]
        del kept
        return after - before
    finally:
        tracemalloc.stop()


def test_made_up_names_leave_nothing_in_the_registry_when_they_are_gone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(registry, "MAX_PRESENT", 100)
    fleet = Registry()

    def noise() -> None:
        for name in NAMES:
            fleet.presence(name, True)
        for name in NAMES:
            fleet.presence(name, False)
            fleet.admit(name, bytes(32), 1)

    # A hundred names are remembered, of ten thousand: a set of that many, and nothing else.
    assert grown(noise) < 50_000
    assert not fleet.present
    assert not fleet.faults


def test_word_of_made_up_names_does_not_pile_up_unheard(monkeypatch: pytest.MonkeyPatch) -> None:
    """They come and go faster than a round looks: the registry forgets each, and so must what waits."""
    monkeypatch.setattr(inbox, "MAX_PRESENCES", 100)

    async def scenario() -> None:
        fleet, box = Registry(), Inbox()
        for name in NAMES:
            for online in (True, False):
                if fleet.presence(name, online):
                    box.presence(name, online)
        assert len(box) == 100
        box.presence(NAMES[0], True)  # of whom something waits, the last word still counts
        assert await box.get() == inbox.Presence(NAMES[0], True)
        box.presence(NAMES[-1], True)  # and there is room again
        assert len(box) == 100

    asyncio.run(scenario())


def test_single_bytes_in_made_up_names_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inbox, "MAX_BYTES", 1_000_000)
    held: list[Inbox] = []

    def noise() -> None:
        held.append(Inbox())
        for name in NAMES:
            held[0].heard(name, b"?")

    async def scenario() -> None:
        # Of each no more than what it says, or the bound would be one of bytes that nobody counts.
        assert grown(noise) <= 1_100_000

    asyncio.run(scenario())
    assert 0 < len(held[0]) < len(NAMES)


def test_a_connection_that_comes_and_goes_leaves_no_tasks_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is acknowledged before it breaks again: one call waits to be published again, not each."""
    hasten(monkeypatch)
    counts: list[int] = []

    async def scenario() -> None:
        async with Fleet(tmp_path, 3) as fleet:
            playing = asyncio.create_task(fleet.play(fleet.run(config(1, 3))))
            await fleet.phase("gather")
            service = fleet.coordinator
            real, free = service.transport.publish, asyncio.Event()

            async def held(*arguments: Any, **more: Any) -> None:
                await free.wait()
                await real(*arguments, **more)

            service.transport.publish = held  # type: ignore[method-assign]
            for _ in range(50):
                await service._on_connected()
                await asyncio.sleep(0.001)
                counts.append(len(asyncio.all_tasks()))
            free.set()
            assert (await playing).rounds_completed == 1

    go(scenario())
    assert max(counts[-5:]) <= max(counts[:5]) + 2


def test_requests_for_renewal_that_were_followed_are_forgotten(tmp_path: Path) -> None:
    fleet = make_fleet(tmp_path / "fleet", now=1_000_000)
    service: Any = SimpleNamespace(registry=Registry())
    looking = keeper._Keeper(fleet, load_fleet(fleet.path), service, lambda line: None)
    looking._asked = {(name, since): 0.0 for since, name in enumerate(NAMES)}
    looking._take_up()  # nobody's renewal is wanted any more
    assert not looking._asked


def test_wrong_tokens_of_many_addresses_are_remembered_up_to_a_bound() -> None:
    limit = desk.FailureLimit()
    for number in range(desk.MAX_ADDRESSES + 500):
        for second in range(2 * desk.FAILURES):
            limit.failed(str(ipaddress.IPv4Address(number)), second)
    assert len(limit._failures) == desk.MAX_ADDRESSES
    assert all(len(times) == desk.FAILURES for times in limit._failures.values())
    assert limit.exhausted(str(ipaddress.IPv4Address(desk.MAX_ADDRESSES)), 10)
