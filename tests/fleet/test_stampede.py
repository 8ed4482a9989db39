"""Sixty devices that lose their broker in the middle of a round, all at once. `benchmarks/stampede.py` is
the same with five hundred."""

import asyncio
from pathlib import Path

import pytest

from covey_coordinator.broker import mosquitto
from crowd import Crowd, fastest
from prerequisites import missing

N, COHORT = 60, 10


def test_a_crowd_comes_back_and_its_round_goes_on(tmp_path: Path) -> None:
    if mosquitto.find() is None:
        missing("mosquitto is not installed: apt install mosquitto")

    async def scenario() -> None:
        async with Crowd(tmp_path / "crowd", N) as crowd:
            playing = asyncio.create_task(crowd.round(crowd.settings(COHORT, paced=True), "hit"))
            await crowd.phase("collect")
            started = await crowd.break_broker(away_s=0.5)
            outcome = await playing
            assert outcome.completed is not None, outcome.reason
            assert len(outcome.completed.survivors) == COHORT
            await crowd.all_back(60)
            assert len(crowd.back_after(started)) == N

    asyncio.run(asyncio.wait_for(scenario(), 150))


@pytest.mark.parametrize(
    ("moments", "most"),
    [([], 0), ([1.0], 1), ([0.0, 0.5, 0.99, 1.0, 3.0], 3), ([0.0, 0.5, 0.9, 1.4, 1.45], 4)],
)
def test_the_fastest_second(moments: list[float], most: int) -> None:
    assert fastest(moments) == most
