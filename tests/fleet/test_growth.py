"""Round after round, coordinator and devices hold no more than before. `make soak` does it for real.

Python's own allocations are counted, of a whole fleet in this process, between the end of one run and
the end of the next.
"""

import gc
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from covey_coordinator.service import CoordinatorService
from covey_device.session import Session
from memory_fleet import Fleet, config, go, hasten

DEVICES = 3

MOST_A_ROUND = 10_000
"""Bytes of all together; 4,000 are usual over so few rounds, while caches still fill. What a round leaves
for good are 150 in the memory of each device: the name of a model it contributed to, of up to a thousand.
All its messages are 45 kB, and each masked update another 10 kB."""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    hasten(monkeypatch)


def held(fleet: Fleet) -> int:
    """Bytes, without what the fleet itself writes down for other tests."""
    for record in (fleet.plain, fleet.sums, fleet.events, fleet.network.log):
        record.clear()  # type: ignore[attr-defined]
    for seat in fleet.seats:
        seat.ended.clear()
    gc.collect()
    return tracemalloc.get_traced_memory()[0]


def growth(tmp_path: Path, settling: int, rounds: int) -> float:
    """Bytes a round, of the rounds after the first few."""
    found: list[int] = []

    async def scenario() -> None:
        async with Fleet(tmp_path, DEVICES) as fleet:
            for name, number in (("first", settling), ("second", rounds)):
                run = fleet.run(config(number, DEVICES), name)
                state = await fleet.play(run, timeout_s=240.0)
                assert state.rounds_completed == number
                found.append(held(fleet))

    tracemalloc.start()
    try:
        go(scenario(), 240.0)
    finally:
        tracemalloc.stop()
    return (found[1] - found[0]) / rounds


def test_rounds_leave_nothing_in_memory(tmp_path: Path) -> None:
    assert growth(tmp_path, settling=5, rounds=15) < MOST_A_ROUND


@pytest.mark.parametrize(
    ("where", "name"), [(CoordinatorService, "_on_message"), (Session, "receive")]
)
def test_a_leak_of_messages_on_either_side_would_show(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: type, name: str
) -> None:
    kept: list[Any] = []
    real: Callable[..., Any] = getattr(where, name)

    def leaking(self: Any, message: Any) -> Any:
        # A copy: the original's bytes may be somebody else's.
        kept.append(bytearray(getattr(message, "payload", message)))
        return real(self, message)

    monkeypatch.setattr(where, name, leaking)
    assert growth(tmp_path, settling=2, rounds=4) > 1.5 * MOST_A_ROUND
