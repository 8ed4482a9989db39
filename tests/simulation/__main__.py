"""python -m simulation, from the folder `tests`."""

import argparse
import sys

from simulation.bugs import AMONG, BUGS
from simulation.faults import KINDS
from simulation.play import command, cores, play_many, report
from simulation.world import play


def main() -> int:
    """0: nothing is broken."""
    parser = argparse.ArgumentParser(prog="python -m simulation", description=__doc__)
    parser.add_argument("--seed", type=int, help="play this one")
    parser.add_argument("--trace", action="store_true", help="show all that happens in it")
    parser.add_argument(
        "--faults", help=f"only these kinds, or none; separated by commas, of: {', '.join(KINDS)}"
    )
    parser.add_argument(
        "--seeds", type=int, default=1000, help="play so many (default %(default)s)"
    )
    parser.add_argument("--first", type=int, default=0, help="from this one on")
    parser.add_argument("--jobs", type=int, default=cores(), help="processes (default: all cores)")
    parser.add_argument(
        "--bugs", action="store_true", help="plant bugs, and see which seed finds each"
    )
    given = parser.parse_args()
    if given.bugs:
        return plant(given.first, given.seeds)
    if given.seed is not None:
        kinds = None
        if given.faults is not None:
            kinds = tuple(k for k in given.faults.split(",") if k != "none")
            if unknown := set(kinds) - set(KINDS):
                parser.error(f"no such kind of fault: {', '.join(sorted(unknown))}")
        verdict = play(given.seed, kinds=kinds, traced=given.trace)
        for line in verdict.trace:
            print(line)
        for broken in verdict.broken:
            print(f"BROKEN: {broken}")
        print(
            f"seed {given.seed}, faults {', '.join(verdict.kinds) or 'none'}: {verdict.rounds} rounds, "
            f"{verdict.completed} completed, {verdict.seconds:.0f} s of simulated time"
        )
        return int(bool(verdict.broken))
    tally = play_many(range(given.first, given.first + given.seeds), given.jobs, print)
    for line in tally.coverage():
        print(line)
    for verdict in (tally.broken or [])[:1]:
        print(report(verdict))
    for verdict in (tally.broken or [])[1:]:
        print(f"again: {command(verdict.seed, verdict.kinds, verdict.kinds)}")
    return int(bool(tally.broken))


def plant(first: int, seeds: int) -> int:
    """Plant each bug and look for it. 0: all were found."""
    missed = 0
    for name, bug in BUGS.items():
        for seed in range(first, first + seeds):
            with bug():
                verdict = play(seed, kinds=AMONG.get(name))
            if verdict.broken:
                print(f"{name}: seed {seed}: {verdict.broken[0][:160]}")
                break
        else:
            missed += 1
            print(f"{name}: nothing was broken in {seeds} seeds")
    return int(bool(missed))


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    sys.exit(main())
