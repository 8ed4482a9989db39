"""The windows that a call names: none for a small fleet, wide enough for a large one, and never too wide."""

import itertools
import math
import random

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from covey_coordinator.pace import LEAST_CALLED, SMALL, Capacity, Pace, Pacer
from covey_shared import wire
from covey_shared.messages import MAX_COHORT, MAX_PACE_S
from lab import Lab

KB = 1000
FLEETS = st.integers(0, 2_000_000)
LIMITS = st.integers(2, MAX_COHORT)
SIZES = st.integers(1, 2**40)
GATHERS = st.floats(0.1, 2_592_000)


def steer(
    present: int, limit: int = 10, fetch_bytes: int = 100 * KB, gather_s: float = 30.0
) -> Pace:
    return Pacer().steer(present, limit, fetch_bytes, gather_s)


@pytest.mark.parametrize("present", [0, 1, 3, SMALL])
def test_a_small_fleet_is_not_slowed_down(present: int):
    assert steer(present, fetch_bytes=50_000 * KB) == Pace(1.0, 0.0, 0.0)


def test_a_fleet_a_little_larger_is_hardly():
    pace = steer(SMALL + 10)
    assert (pace.chance, pace.spread_s, pace.reconnect_s) == (1.0, 0.2, 0.2)


def test_five_hundred_devices():
    pace = steer(500, limit=128)
    assert pace.chance == 1.0  # of 500, 128 that do answer are not so few
    assert pace.spread_s == pytest.approx(9.4)
    assert pace.reconnect_s == pytest.approx(9.4)


def test_ten_thousand_devices_for_128_places():
    pace = steer(10_000, limit=128)
    assert 256 < 10_000 * pace.chance < 400
    assert 4 < pace.spread_s < 10  # of those who answer
    assert pace.reconnect_s == pytest.approx(199.4)  # of all


def test_a_large_model_takes_longer_and_leaves_time_to_fetch_it():
    small = steer(200, limit=128, fetch_bytes=100 * KB)
    large = steer(200, limit=128, fetch_bytes=1000 * KB, gather_s=600.0)
    huge = steer(200, limit=128, fetch_bytes=100_000 * KB, gather_s=600.0)
    assert small.spread_s == pytest.approx(3.4)
    assert large.spread_s == pytest.approx(17.0)  # 170 MB at 10 MB/s
    assert huge.spread_s == 200.0


def test_a_stronger_machine_takes_less():
    pacer = Pacer(Capacity(devices_per_s=500.0, mb_per_s=100.0))
    pace = pacer.steer(530, 128, 100 * KB, 30.0)
    assert pace == Pace(1.0, 1.0, 1.0)


@given(FLEETS, LIMITS, SIZES, GATHERS)
@example(10**6, 2, 1, 1.0)
def test_whatever_the_fleet_the_call_can_be_made(
    present: int, limit: int, fetch_bytes: int, gather_s: float
):
    pace = steer(present, limit, fetch_bytes, gather_s)
    assert 0 < pace.chance <= 1
    assert 0 <= pace.spread_s <= min(gather_s / 3, MAX_PACE_S)
    assert 0 <= pace.reconnect_s <= MAX_PACE_S
    lab = Lab(3)
    call = lab.call(
        gather_s=gather_s,
        chance=pace.chance,
        spread_s=pace.spread_s,
        reconnect_s=pace.reconnect_s,
    )
    assert wire.sign(call, lab.coordinator_key).message == call


@given(FLEETS, LIMITS, st.integers(1, 1_000_000))
def test_more_devices_are_never_given_less_time(present: int, limit: int, more: int):
    assert steer(present + more, limit).reconnect_s >= steer(present, limit).reconnect_s


@given(st.integers(0, 100_000), st.integers(1, 1000))
def test_no_second_has_more_than_the_machine_takes(present: int, rate: int):
    """On average, beyond those who are no crowd."""
    pace = Pacer(Capacity(devices_per_s=rate)).steer(present, 128, 1, 1e6)
    assert present * pace.chance <= SMALL + rate * pace.spread_s + 1e-6
    assert present <= SMALL + rate * pace.reconnect_s + 1e-6 or pace.reconnect_s == MAX_PACE_S


@pytest.mark.parametrize("limit", [2, 10, 50, 128])
@pytest.mark.parametrize("present", [130, 650, 3000, 100_000])
def test_the_places_are_filled_although_few_are_called(present: int, limit: int):
    """Two thousand rounds, each device with a draw of its own: none lacks as much as one device."""
    chance = steer(present, limit).chance
    rng = random.Random(present * limit)
    deviation = math.sqrt(present * chance * (1 - chance))
    fewest = min(rng.gauss(present * chance, deviation) for _ in range(2000))
    assert fewest >= min(limit, present)


# -- presence that lies ---------------------------------------------------------------------------


def test_devices_that_are_not_there_do_not_keep_the_others_out():
    """Three thousand names that somebody made up, and four devices: the first call reaches hardly any of
    the four, the second reaches all."""
    pacer = Pacer()
    assert pacer.steer(3004, 4, KB, 30.0).chance == pytest.approx(LEAST_CALLED / 3004)
    pacer.learn(0, 4)
    assert pacer.steer(3004, 4, KB, 30.0).chance == 1.0
    pacer.learn(4, 4)
    assert pacer.steer(3004, 4, KB, 30.0).chance > 0.5


def test_names_that_never_joined_are_no_reason_to_call_fewer():
    pace = Pacer().steer(10_000, 4, KB, 30.0, known=100)
    assert pace.chance == 1.0
    assert pace.spread_s == 10.0  # who knows
    assert Pacer().steer(10_000, 4, KB, 30.0, known=200).chance == LEAST_CALLED / 200


def test_of_a_fleet_of_which_half_declines_twice_as_many_are_called():
    pacer = Pacer()
    first = pacer.steer(10_000, 128, KB, 30.0)
    came = round(10_000 * first.chance / 4)
    pacer.learn(came, 128)
    second = pacer.steer(10_000, 128, KB, 30.0)
    assert 3.5 < second.chance / first.chance < 4.5


def test_what_was_learnt_is_given_up_step_by_step():
    pacer = Pacer()
    chances = []
    for cohort in (0, 128, 128, 128, 128, 128, 128, 128, 128, 128, 128):
        chances.append(pacer.steer(10_000, 128, KB, 30.0).chance)
        pacer.learn(cohort, 128)
    assert chances[1] == 1.0
    assert chances[-1] == chances[0]
    assert all(a >= b for a, b in itertools.pairwise(chances[1:]))


def test_a_small_fleet_in_which_nobody_answers_teaches_nothing():
    pacer = Pacer()
    for _ in range(10):
        assert pacer.steer(20, 10, KB, 30.0) == Pace()
        pacer.learn(0, 10)
    assert pacer.steer(10_000, 10, KB, 30.0).chance < 0.2


@given(st.lists(st.tuples(FLEETS, st.integers(0, 128)), max_size=50))
def test_whatever_came_before_the_chance_is_one(rounds: list[tuple[int, int]]):
    pacer = Pacer()
    for present, cohort in rounds:
        pace = pacer.steer(present, 128, KB, 30.0)
        assert 0 < pace.chance <= 1
        pacer.learn(cohort, 128)
