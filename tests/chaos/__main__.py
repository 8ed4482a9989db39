"""python -m chaos, with the folder `tests` on PYTHONPATH: faults on real processes. `make chaos` runs it.

A real mosquitto, `covey up` and real devices on this machine play a run over TLS; meanwhile they are
killed, stopped, cut off and given full disks, at moments that a seed draws. In the end every round's sum
is made again from what the devices encoded.
"""

import asyncio
import shutil
import signal
import statistics
import sys
import tempfile
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

TESTS = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(TESTS.parent / "benchmarks"))

from _report import Row, report  # noqa: E402

from chaos import machine  # noqa: E402
from chaos.play import Outcome, Wanted, keep, play  # noqa: E402
from chaos.view import View  # noqa: E402

KILLS = 10
COMPLETING = 0.9
BACK_S = 2.0
ENOUGH_ROUNDS = 200


@click.command(help=__doc__)
@click.option("--rounds", type=click.IntRange(1), help="Rounds to play.  [default: 200]")
@click.option("--seconds", type=float, help="Go on with faults for so long instead.")
@click.option("--seed", type=int, default=1, show_default=True, help="Draws the faults.")
@click.option("--devices", type=click.IntRange(4, 64), default=8, show_default=True)
@click.option(
    "--network",
    type=click.Choice(["auto", "proxy"]),
    default="auto",
    show_default=True,
    help="proxy: no network namespaces, only proxies before the broker.",
)
@click.option("--only-kills", is_flag=True, help="Kill each component once, and do nothing else.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the figures too.")
@click.option("--keep", "kept", type=click.Path(path_type=Path), help="Keep all files here.")
def main(
    rounds: int | None,
    seconds: float | None,
    seed: int,
    devices: int,
    network: str,
    only_kills: bool,
    json_path: Path | None,
    kept: Path | None,
) -> None:
    """Play, check, and say whether everything held."""
    machine.enter(sys.argv[1:])
    if rounds is None and seconds is None:
        rounds = ENOUGH_ROUNDS
    proofs = 1 if only_kills else 3
    wanted = Wanted(rounds, seconds, seed, devices, network, only_kills, proofs)
    console = Console(width=None if sys.stdout.isatty() else 160)
    base = Path(tempfile.mkdtemp(prefix="covey-chaos-"))
    ground = machine.Machine(base)
    try:
        with View(console, f"chaos, seed {seed}") as view:
            outcome = asyncio.run(_until_stopped(play(ground, wanted, view)))
        tell(console, outcome)
        good = report(rows(outcome, wanted), json_path) and not outcome.broken
        for line in outcome.broken:
            console.print(f"BROKEN: {line}", style="red", markup=False, soft_wrap=True)
        if not good:
            bound = f"ROUNDS={rounds}" if rounds else f"SECONDS={seconds:g}"
            more = f"--devices {devices} --network {network}"
            more += " --only-kills" if only_kills else ""
            console.print(
                f"again, as far as real processes allow, with all files kept: make chaos {bound} "
                f'SEED={seed} ARGS="{more} --keep chaos-files"',
                soft_wrap=True,
                markup=False,
            )
    finally:
        if kept is not None:
            keep(base, kept)
        ground.close()
        shutil.rmtree(base, ignore_errors=True)
    sys.exit(not good)


async def _until_stopped(playing: Coroutine[Any, Any, Outcome]) -> Outcome:
    """SIGTERM ends it as Ctrl-C does: all processes end with us."""
    task = asyncio.ensure_future(playing)
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    return await task


def tell(console: Console, outcome: Outcome) -> None:
    """The table at the end."""
    verdict = outcome.verdict
    table = Table(
        "what", "how much", title=f"{outcome.seconds:.0f} s of chaos", title_justify="left"
    )
    table.add_row("rounds", f"{verdict.completed} completed of {verdict.rounds}")
    for reason, n in verdict.abandoned.most_common(8):
        table.add_row("  abandoned", f"{n}: {reason}")
    table.add_row("sums made again, and exact", f"{verdict.sums_exact}")
    table.add_row("wrong sums", f"{verdict.sums_wrong}")
    table.add_row(
        "transcripts",
        f"{verdict.proved} prove their round, payloads included, of {verdict.transcripts}",
    )
    table.add_row("kills", ", ".join(f"{name} {n}" for name, n in outcome.kills.items()))
    table.add_row("  in phase", ", ".join(f"{name} {n}" for name, n in outcome.phases.items()))
    table.add_row("faults", ", ".join(f"{name} {n}" for name, n in outcome.faults.items()))
    table.add_row("coordinator back at work", spread(outcome.coordinator_back))
    table.add_row(
        "  while the broker or the way there was ill", spread(outcome.coordinator_back_busy)
    )
    table.add_row("  processor time of its own until then", spread(outcome.coordinator_processor))
    table.add_row("broker restarted -> a round moves on", spread(outcome.broker_back))
    for line in outcome.lacks:
        table.add_row("note", line)
    console.print(table)


def spread(seconds: list[float]) -> str:
    """Median and longest."""
    if not seconds:
        return "-"
    return f"median {statistics.median(seconds):.2f} s, longest {max(seconds):.2f} s ({len(seconds)} times)"


def rows(outcome: Outcome, wanted: Wanted) -> list[Row]:
    """The figures, with their bounds. A run that is not a full one has fewer bounds."""
    verdict = outcome.verdict
    full = (wanted.rounds or 0) >= ENOUGH_ROUNDS
    share = verdict.completed / max(1, verdict.rounds)
    fewest = min(outcome.kills.values())
    enough = KILLS if full else 1 if wanted.only_kills else 0
    found = [
        Row("rounds", verdict.rounds, "", f">= {wanted.rounds}" if wanted.rounds else "",
            verdict.rounds >= (wanted.rounds or 0)),
        Row("rounds completing", 100 * share, "%", f">= {100 * COMPLETING:g}" if full else "",
            share >= COMPLETING or not full),
        Row("wrong sums", verdict.sums_wrong, "", "<= 0", not verdict.sums_wrong),
        Row("completed rounds with their sum made again", verdict.sums_exact, "",
            f">= {verdict.completed}", verdict.sums_exact >= verdict.completed),
        Row("completed rounds lost", verdict.lost, "", "<= 0", not verdict.lost),
        Row("completed rounds repeated", verdict.repeated, "", "<= 0", not verdict.repeated),
        Row("other invariants broken", len(outcome.broken), "", "<= 0", not outcome.broken),
        Row("fewest kills of a component", fewest, "", f">= {enough}" if enough else "",
            fewest >= enough),
        Row("kills in all", sum(outcome.kills.values()), "", "", True),
        Row("faults in all", sum(outcome.faults.values()), "", "", True),
    ]  # fmt: skip
    if outcome.coordinator_back:
        longest = max(outcome.coordinator_back)
        typical = statistics.median(outcome.coordinator_back)
        found += [
            Row("coordinator back at work, processor time", statistics.median(
                outcome.coordinator_processor), "s", "", True),
            Row("coordinator back at work, median", typical, "s", "", True),
            Row("coordinator back at work, longest", longest, "s",
                f"<= {BACK_S:g}" if full else "", longest <= BACK_S or not full),
        ]  # fmt: skip
    if outcome.broker_back:
        found.append(
            Row("broker restarted to progress, median", statistics.median(outcome.broker_back), "s",
                "", True)
        )  # fmt: skip
    return found


if __name__ == "__main__":
    main()
