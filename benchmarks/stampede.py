"""Five hundred devices that lose their broker in the middle of a round, and come back all at once.

A real mosquitto, with passwords and with TLS and a certificate for each client; a real coordinator; real
devices, all but their disks, in a few processes. One round is left alone; in another the broker is killed
while updates are collected, loses everything it retained and every session, and is started again. Both with
the pace that the coordinator sets and without.

    python benchmarks/stampede.py [--devices 500] [--cohort 30] [--json FILE]

The broker, the coordinator and all devices share this machine's cores. Ends with status 1 if a bound is
broken.
"""

import asyncio
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import click
from _report import Row, report

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from covey_coordinator.config import PaceConfig
from crowd import Crowd, fastest

AWAY_S = 3.0
LONGEST_BACK_S = 60.0
LIMIT_S = 120.0


@dataclass(frozen=True, slots=True)
class Figures:
    """Of one fleet: an undisturbed round's seconds and one's that lost its broker; when all were back after
    the broker was started again, and from then on the most attempts to connect within a second, and how
    many failed."""

    quiet_s: float
    hit_s: float
    completed: bool
    survivors: int
    back_s: float
    rate: int
    failed: int


async def stampede(
    directory: Path, devices: int, cohort: int, *, tls: bool, paced: bool
) -> Figures:
    """Two rounds of one fleet."""
    async with Crowd(directory, devices, processes=3, tls=tls, train_s=1.0) as crowd:
        settings = crowd.settings(cohort, paced=paced)
        await crowd.round(settings, "first")  # in which all fetch the plan
        quiet = await crowd.round(settings, "quiet")
        playing = asyncio.create_task(crowd.round(settings, "hit"))
        await crowd.phase("collect")
        started = await crowd.break_broker(AWAY_S)
        hit = await playing
        await crowd.all_back(LIMIT_S)
        back = crowd.back_after(started)
        late = [1 for at, _, _ in crowd.downs if at > started]
        return Figures(
            quiet_s=quiet.seconds,
            hit_s=hit.seconds,
            completed=quiet.completed is not None and hit.completed is not None,
            survivors=len(hit.completed.survivors) if hit.completed else 0,
            back_s=back[-1] - started,
            rate=fastest(sorted(at for at in crowd.tries if at >= started)),
            failed=len(late),
        )


def rows_of(name: str, figures: Figures, *, paced: bool) -> list[Row]:
    """What is reported of one fleet."""
    # Uniform draws: within any one second hardly more than twice the average come.
    most = 2.5 * PaceConfig().devices_per_s
    return [
        Row(f"{name}: round, undisturbed", figures.quiet_s, "s", "", True),
        Row(f"{name}: round that lost its broker", figures.hit_s, "s", "", True),
        Row(f"{name}: beside the undisturbed", figures.hit_s / figures.quiet_s, "x", "", True),
        Row(
            f"{name}: both rounds completed",
            float(figures.completed),
            "",
            "= 1",
            figures.completed,
        ),
        Row(f"{name}: updates in the sum", figures.survivors, "devices", "", True),
        Row(
            f"{name}: all back after",
            figures.back_s,
            "s",
            f"<= {LONGEST_BACK_S:g}",
            figures.back_s <= LONGEST_BACK_S,
        ),
        Row(
            f"{name}: most attempts in a second",
            figures.rate,
            "1/s",
            f"<= {most:g}" if paced else "",
            figures.rate <= most or not paced,
        ),
        Row(f"{name}: attempts that failed", figures.failed, "", "", True),
    ]


@click.command(help=__doc__)
@click.option("--devices", default=500, show_default=True, help="How many devices there are.")
@click.option("--cohort", default=30, show_default=True, help="How many of them a round takes.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the rows too.")
def main(devices: int, cohort: int, json_path: Path | None) -> None:
    """Measure, print, and say whether the bounds hold."""
    rows: list[Row] = []
    began = time.monotonic()
    for tls in (False, True):
        rates = {}
        for paced in (True, False):
            name = f"{'TLS' if tls else 'plain'}, {'paced' if paced else 'unpaced'}"
            with tempfile.TemporaryDirectory(prefix="covey-bench-") as directory:
                figures = asyncio.run(
                    stampede(Path(directory), devices, cohort, tls=tls, paced=paced)
                )
            click.echo(f"{name}: {figures}", err=True)
            rows += rows_of(name, figures, paced=paced)
            rates[paced] = figures.rate
        ratio = rates[False] / rates[True]
        rows.append(
            Row(
                f"{'TLS' if tls else 'plain'}: rate unpaced / paced", ratio, "x", ">= 1", ratio >= 1
            )
        )
    rows.append(Row("all of it", time.monotonic() - began, "s", "", True))
    sys.exit(0 if report(rows, json_path) else 1)


if __name__ == "__main__":
    main()
