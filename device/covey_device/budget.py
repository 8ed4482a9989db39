"""How much one round may cost this device: batches, seconds and resident memory.

A `Meter` is asked before each batch whether a bound is reached. Whether the device may train at
all now (heat, power, a veto) is the question of `host.eligibility`. The clock and the memory reading are
arguments; nothing here looks at either by itself.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import psutil

from covey_shared.errors import LocalProtocolError

Bound = Literal["batches", "seconds", "memory"]
Clock = Callable[[], float]
ResidentBytes = Callable[[], int]


def resident_bytes() -> int:
    """Resident memory of this process now, in bytes."""
    resident: int = psutil.Process().memory_info().rss
    return resident


@dataclass(frozen=True, slots=True)
class Budget:
    """Three bounds; whichever comes first ends training.

    max_seconds: wall time; infinity for no bound. max_resident_bytes: of the whole process, so
    everything else it does counts too.
    """

    max_batches: int
    max_seconds: float
    max_resident_bytes: int

    def __post_init__(self) -> None:
        """A budget may be too small for a single batch, but must make sense."""
        # Negated so that a NaN is refused too.
        if self.max_batches < 1 or not self.max_seconds >= 0 or self.max_resident_bytes < 1:
            raise LocalProtocolError(
                f"{self}: max_batches and max_resident_bytes are at least 1, max_seconds at least 0"
            )


class Meter:
    """Counts what was used of a budget, from its construction on.

    A batch is not begun if, taking as long as the slowest so far, it would end after max_seconds:
    a round's deadline is hard, and an update that comes late is lost with all its batches. The
    first batch warms up caches and is often the slowest, so the choice errs on the early side.
    Memory is measured, not predicted: one batch can go past the bound before it is noticed.
    """

    def __init__(
        self, budget: Budget, *, clock: Clock, resident: ResidentBytes = resident_bytes
    ) -> None:
        """clock: seconds, from any origin, never backwards."""
        self.budget = budget
        self.batches = 0
        self._clock, self._resident = clock, resident
        self._start = self._last = clock()
        self._slowest_s = 0.0

    @property
    def seconds(self) -> float:
        """Since construction."""
        return self._clock() - self._start

    def reached(self) -> Bound | None:
        """The bound that forbids one more batch, if any does."""
        if self.batches >= self.budget.max_batches:
            return "batches"
        seconds = self.seconds
        # At the bound is over it, also before anything is known of a batch's time.
        if (
            seconds >= self.budget.max_seconds
            or seconds + self._slowest_s > self.budget.max_seconds
        ):
            return "seconds"
        if self._resident() >= self.budget.max_resident_bytes:
            return "memory"
        return None

    def begin_batch(self) -> None:
        """A batch begins now: what passed since the last one, in a pause, is not its time."""
        self._last = self._clock()

    def batch_done(self) -> None:
        """Count one batch, with the time since it began (or since the last one, or the start)."""
        now = self._clock()
        self._slowest_s = max(self._slowest_s, now - self._last)
        self._last = now
        self.batches += 1
