"""Many seeds at once, and what is said of one that breaks something."""

import gc
import multiprocessing
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from covey_coordinator.phases import Phase
from simulation.world import BETWEEN, Verdict, play, quick_place

TAIL = 60
"""Lines of the trace that a failure is shown with."""


@dataclass
class Tally:
    """Of many seeds. broken: the verdicts that are not all right."""

    seeds: int = 0
    rounds: int = 0
    completed: int = 0
    transcripts: int = 0
    virtual_s: float = 0.0
    deaths: Counter[tuple[str, str]] = field(default_factory=Counter)
    survived: Counter[str] = field(default_factory=Counter)
    broken: list[Verdict] | None = None

    def add(self, verdict: Verdict) -> None:
        self.seeds += 1
        self.rounds += verdict.rounds
        self.completed += verdict.completed
        self.transcripts += verdict.transcripts
        self.virtual_s += verdict.seconds
        for death in verdict.interrupted:
            self.deaths[death.phase, death.point] += 1
            self.survived[death.phase] += death.completed
        if verdict.broken:
            self.broken = [*(self.broken or []), verdict]

    def coverage(self) -> Iterator[str]:
        """Lines: in which phases the coordinator died, before what, and what became of those rounds."""
        points = sorted({point for _, point in self.deaths})
        if not points:
            return
        yield f"the coordinator's deaths, in {len(self.deaths)} pairs of a phase and what it was about to do:"
        for phase in (*(phase.value for phase in Phase if phase is not Phase.ABANDONED), BETWEEN):
            of_phase = {point: n for (p, point), n in self.deaths.items() if p == phase}
            if not of_phase:
                yield f"{phase:>8}: none"
                continue
            n, most = sum(of_phase.values()), sorted(of_phase, key=lambda p: -of_phase[p])
            rest = f"; {self.survived[phase]} of these rounds completed" if phase != BETWEEN else ""
            yield f"{phase:>8}: {n} before {len(of_phase)} of {len(points)} effects{rest}"
            yield f"{'':10}{', '.join(f'{point} {of_phase[point]}' for point in most)}"

    def __str__(self) -> str:
        return (
            f"{self.seeds} seeds, {self.rounds} rounds, {self.completed} completed, "
            f"{self.transcripts} transcripts proved, "
            f"{self.virtual_s / 3600:.1f} h of simulated time, {len(self.broken or [])} broken"
        )


def verdicts(seeds: Iterable[int], jobs: int) -> Iterator[Verdict]:
    """Of each seed, in some order, from as many processes."""
    if jobs == 1:
        yield from map(play, seeds)
        return
    context = multiprocessing.get_context("spawn")
    # What a process leaves that is ended early goes with the folder.
    with (
        tempfile.TemporaryDirectory(prefix="covey-simulations-", dir=quick_place()) as place,
        context.Pool(jobs, initializer=_alone) as pool,
    ):
        yield from pool.imap_unordered(partial(play, place=Path(place)), seeds, chunksize=4)


def _alone() -> None:
    """What was imported never becomes garbage, and need not be looked at; the rest seldom."""
    gc.freeze()
    gc.set_threshold(20_000, 10, 50)


def shrunk(seed: int, kinds: tuple[str, ...], broken: str) -> tuple[str, ...]:
    """Fewer kinds of faults that still break the same thing, as far as leaving out one at a time goes."""
    for kind in kinds:
        fewer = tuple(k for k in kinds if k != kind)
        found = play(seed, kinds=fewer).broken
        if found and _gist(found[0]) == _gist(broken):
            kinds = fewer
    return kinds


def _gist(broken: str) -> str:
    """What is broken, without rounds and names."""
    return "".join(c for c in broken.split(":")[0] if not c.isdigit())


def report(verdict: Verdict, *, shrink: bool = True) -> str:
    """What broke, its trace, and the command that does it again."""
    kinds = verdict.kinds
    if shrink:
        kinds = shrunk(verdict.seed, kinds, verdict.broken[0])
    again = play(verdict.seed, kinds=kinds, traced=True)
    lines = list(again.trace[-TAIL:])
    if len(again.trace) > TAIL:
        lines.insert(0, f"... {len(again.trace) - TAIL} lines before")
    return "\n".join(
        (
            *lines,
            "",
            f"seed {verdict.seed}: {'; '.join(again.broken[:3]) or 'all right this time'}",
            f"again: {command(verdict.seed, kinds, verdict.kinds)}",
        )
    )


def command(seed: int, kinds: tuple[str, ...], all_kinds: tuple[str, ...]) -> str:
    """Plays a seed again, from the repository's root."""
    only = f" --faults {','.join(kinds) or 'none'}" if kinds != all_kinds else ""
    return f"cd tests && ../.venv/bin/python -m simulation --seed {seed}{only} --trace"


def play_many(seeds: range, jobs: int, say: Callable[[str], None], most: int = 5) -> Tally:
    """Play them all, or until `most` of them broke something."""
    tally, began, said = Tally(), time.monotonic(), time.monotonic()
    for verdict in verdicts(seeds, jobs):
        tally.add(verdict)
        if verdict.broken:
            say(f"seed {verdict.seed}: {verdict.broken[0]}")
            if len(tally.broken or []) >= most:
                break
        if time.monotonic() - said > 30:
            said = time.monotonic()
            say(f"{tally} after {said - began:.0f} s")
    say(f"{tally} after {time.monotonic() - began:.0f} s")
    return tally


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0))
