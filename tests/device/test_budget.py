"""Budgets and meters, on a clock and a memory of the test's own."""

import math
import mmap

import pytest
from hypothesis import given
from hypothesis import strategies as st

from covey_device.budget import Budget, Meter, resident_bytes
from covey_shared.errors import LocalProtocolError
from device_support import FakeClock


def meter(max_batches=100, max_seconds=60.0, max_resident_bytes=1000, resident=lambda: 10):
    clock = FakeClock()
    budget = Budget(max_batches, max_seconds, max_resident_bytes)
    return Meter(budget, clock=clock, resident=resident), clock


def test_batches():
    watch, _ = meter(max_batches=2)
    assert watch.reached() is None
    watch.batch_done()
    assert watch.reached() is None
    watch.batch_done()
    assert watch.reached() == "batches"


def test_seconds_at_the_bound():
    watch, clock = meter(max_seconds=60.0)
    clock.now += 59.9
    assert watch.reached() is None  # no batch was timed yet
    clock.now += 0.1
    assert watch.reached() == "seconds"
    assert watch.seconds == pytest.approx(60.0)


def test_no_batch_begins_that_the_slowest_would_carry_past_the_bound():
    watch, clock = meter(max_seconds=10.0)
    clock.now += 4.0
    watch.batch_done()
    clock.now += 1.0
    watch.batch_done()
    assert watch.reached() is None  # 5 s used, 4 s more would end at 9 s
    clock.now += 1.5
    assert watch.reached() == "seconds"  # 6.5 s used, 4 s more would end at 10.5 s


def test_a_batch_that_ends_exactly_at_the_bound_begins():
    watch, clock = meter(max_seconds=8.0)
    clock.now += 4.0
    watch.batch_done()
    assert watch.reached() is None


def test_memory():
    used = [999]
    watch, _ = meter(resident=lambda: used[0])
    assert watch.reached() is None
    used[0] = 1000
    assert watch.reached() == "memory"


def test_work_that_is_done_counts_as_done():
    watch, clock = meter(max_batches=1, max_seconds=1.0, resident=lambda: 10**9)
    clock.now += 5.0
    watch.batch_done()
    assert watch.reached() == "batches"


@given(st.floats(0.1, 100), st.lists(st.floats(0, 20), min_size=1, max_size=30), st.integers(1, 40))
def test_seconds_hold_when_no_batch_is_slower_than_those_before(bound, laps, max_batches):
    watch, clock = meter(max_batches=max_batches, max_seconds=bound)
    start = clock.now
    slowest_first = sorted(laps, reverse=True)
    for number, lap in enumerate(slowest_first):
        if watch.reached() is not None:
            break
        clock.now += lap
        watch.batch_done()
        if number:  # the first one could not be predicted
            assert clock.now - start <= bound + 1e-6
    assert watch.batches <= max_batches


@pytest.mark.parametrize(
    "bounds", [(0, 1.0, 1), (1, -1.0, 1), (1, math.nan, 1), (1, 1.0, 0), (-3, 1.0, 1)]
)
def test_senseless_budgets_are_refused(bounds):
    with pytest.raises(LocalProtocolError, match="at least"):
        Budget(*bounds)


def test_no_bound_on_seconds():
    watch, clock = meter(max_seconds=math.inf)
    clock.now += 1e9
    watch.batch_done()
    assert watch.reached() is None


def test_resident_memory_of_this_process_grows_with_what_it_touches():
    # Fresh pages of our own: an array may be put where the heap was resident already.
    with mmap.mmap(-1, 32_000_000) as block:
        before = resident_bytes()
        block.write(b"\1" * 32_000_000)
        after = resident_bytes()
    assert after - before > 16_000_000
