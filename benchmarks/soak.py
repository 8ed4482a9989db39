"""What a fleet's processes hold after each of many rounds: memory, files, threads, tasks, space on disk.

Everything is real: `covey up` with mosquitto, and a process of `covey-device run` for each device, on
loopback and on scikit-learn's digits. Nothing is ever restarted. After every round the resident memory of
each process is read, and every few rounds its private and proportional share of it, and its directories.

    python benchmarks/soak.py [--rounds 500] [--devices 20] [--json FILE]

The bounds compare the end with `--baseline`, by when a process has loaded and allocated what it needs:
medians of five rounds for memory, the fewest of ten rounds for what is counted. `--trace coordinator` or
`--trace pi-01` (any number of them) has Python note where the memory of that process was allocated, and
prints what grew; a traced process is slower, takes more, and is left out of the bounds.

Ends with status 1 if a bound is broken.
"""

import contextlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np
import psutil
import tomli_w
from _report import Row, report
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from covey_coordinator.queueing import queue_run
from covey_fleet import digits
from covey_fleet.demo import PLANS
from processes import free_port

MOST_GROWTH = 0.10
"""Of resident memory, from the baseline to the end."""

MOST_A_ROUND = {"coordinator": 16_000, "broker": 2_000, "devices": 8_000}
"""Bytes by which resident memory may rise with each round of the second half, of runs long enough to tell:
ten percent of 90 MB would hide a masked update of this plan (10 kB) or a model (19 kB) that is kept of
every round."""

LONG_ENOUGH = 300

CACHE, CACHE_MB = "state/cache", 1
"""Where a device keeps plans and models, and what they may take here: full after some fifty rounds."""

MOST_MORE = 2
"""Open files, threads and tasks at the end, beyond those at the baseline: a pool may have had room left."""

MOST_DEVICE_BYTES = 4000
"""On a device's disk, for each round: its owner's log of what it joined and sent, until that is full."""

MOST_FLEET_BYTES = 4000
"""In the fleet's directory, for each round, without what is kept of the run for its own sake."""

WINDOW, COUNTS = 5, 10
MOST_SHOWN = 5
FULL_EVERY = 10
START_S = 120.0
ROUND_S = 300.0

# What a process tells of itself when asked: asyncio's tasks, Python's blocks of memory, threads.
PROBE = """
import asyncio, os, signal, sys
def tell(number, frame, path=sys.argv.pop(1)):
    if number == signal.SIGUSR2:
        import gc, tracemalloc
        gc.collect()
        if tracemalloc.is_tracing():
            tracemalloc.take_snapshot().dump(path + ".trace.new")
            os.replace(path + ".trace.new", path + ".trace")
        return
    try:
        tasks = len(asyncio.all_tasks())
    except RuntimeError:
        tasks = 0
    with open(path + ".new", "w") as file:
        file.write(f"{tasks} {sys.getallocatedblocks()}")
    os.replace(path + ".new", path)
signal.signal(signal.SIGUSR1, tell)
signal.signal(signal.SIGUSR2, tell)
"""
COVEY = PROBE + "from covey_coordinator.cli import main\nmain()"
COVEY_DEVICE = PROBE + "from covey_device.cli import main\nmain()"


# -- what is measured ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Sample:
    """A process after a round. Memory in bytes; uss and pss, and disk, are not read every time.

    tasks, blocks: as the process itself says; 0 for one that is not Python's. disk: of its directory,
    without what a device caches, which is `cache`.
    """

    round: int
    rss: int
    fds: int
    threads: int
    tasks: int = 0
    blocks: int = 0
    uss: int | None = None
    pss: int | None = None
    disk: int | None = None
    cache: int | None = None


@dataclass(frozen=True, slots=True)
class Growth:
    """One process from the baseline to the end. Memory in bytes, disk in bytes a round."""

    name: str
    samples: Sequence[Sample]
    baseline: int
    last: int

    def _near(self, number: int, width: int) -> list[Sample]:
        return [s for s in self.samples if number - width < s.round <= number]

    def memory(self, kind: str) -> tuple[float, float]:
        """At the baseline and at the end. kind: rss, uss or pss."""
        width = WINDOW if kind == "rss" else 2 * FULL_EVERY
        before, after = (
            statistics.median(
                value for s in self._near(n, width) if (value := getattr(s, kind)) is not None
            )
            for n in (self.baseline, self.last)
        )
        return before, after

    @property
    def ratio(self) -> float:
        """Of the resident memory at the end to that at the baseline."""
        before, after = self.memory("rss")
        return after / before

    @property
    def per_round(self) -> float:
        """By how many bytes resident memory rose with each round of the second half: from the median of
        its first quarter to that of its last."""
        half = [s for s in self.samples if s.round > self.last // 2]
        few = len(half) // 4
        if not few:
            return 0.0
        (first, before), (last, after) = (
            (statistics.median(s.round for s in part), statistics.median(s.rss for s in part))
            for part in (half[:few], half[-few:])
        )
        return float((after - before) / (last - first))

    def counted(self, kind: str) -> tuple[int, int]:
        """The fewest of some rounds, at the baseline and at the end: what is open for a moment is no leak.
        kind: fds, threads, tasks, blocks."""
        before, after = (
            min(getattr(s, kind) for s in self._near(n, COUNTS)) for n in (self.baseline, self.last)
        )
        return before, after

    @property
    def disk_per_round(self) -> float:
        """By which the directory grew."""
        found = [(s.round, s.disk) for s in self.samples if s.disk is not None]
        since = [(n, size) for n, size in found if n >= self.baseline]
        if len(since) < 2:
            return 0.0
        (first, before), (last, after) = since[0], since[-1]
        return (after - before) / (last - first)


def plot(values: Sequence[float], low: float, high: float, width: int = 40) -> str:
    """A line of `width` bars at most: the mean of each stretch of rounds, between low and high."""
    bars = " ▁▂▃▄▅▆▇█"
    pieces = np.array_split(np.asarray(values, dtype=float), min(width, len(values)))
    steps = [(float(piece.mean()) - low) / (high - low) * (len(bars) - 1) for piece in pieces]
    return "".join(bars[max(0, min(len(bars) - 1, round(step)))] for step in steps)


# -- the fleet -------------------------------------------------------------------------------------


@dataclass
class Process:
    """One that is watched. probe: where it tells of itself, if it is asked to. disk: its directory, and
    what in it is not counted."""

    name: str
    process: psutil.Process
    probe: Path | None = None
    disk: Path | None = None
    without: tuple[str, ...] = ()
    traced: bool = False
    samples: list[Sample] = field(default_factory=list)

    def ask(self) -> None:
        """To tell of itself; it takes a moment."""
        if self.probe is not None:
            self.process.send_signal(signal.SIGUSR1)

    def sample(self, number: int, *, full: bool) -> None:
        """Read everything. full: what takes longer as well."""
        with self.process.oneshot():
            tasks, blocks = self._told()
            memory = self.process.memory_full_info() if full else self.process.memory_info()
            self.samples.append(
                Sample(
                    round=number,
                    rss=memory.rss,
                    fds=self.process.num_fds(),
                    threads=self.process.num_threads(),
                    tasks=tasks,
                    blocks=blocks,
                    uss=memory.uss if full else None,
                    pss=memory.pss if full else None,
                    disk=size_of(self.disk, self.without) if full and self.disk else None,
                    cache=size_of(self.disk / CACHE) if full and self.disk else None,
                )
            )

    def _told(self) -> tuple[int, int]:
        if self.probe is None:
            return 0, 0
        try:
            tasks, blocks = self.probe.read_text().split()
        except FileNotFoundError:
            return 0, 0
        return int(tasks), int(blocks)

    def snapshot(self) -> tracemalloc.Snapshot:
        """Where a traced process has its memory from. Waits for it."""
        assert self.probe is not None
        path = self.probe.with_name(self.probe.name + ".trace")
        path.unlink(missing_ok=True)
        self.process.send_signal(signal.SIGUSR2)
        wait(path.exists, START_S, f"{self.name} does not tell where its memory is")
        return tracemalloc.Snapshot.load(str(path))


def size_of(directory: Path, without: tuple[str, ...] = ()) -> int:
    """Bytes of all files below it; those come and go while it is read."""
    total = 0
    left_out = {directory / path for path in without}
    for folder, names, files in os.walk(directory):
        names[:] = [name for name in names if Path(folder) / name not in left_out]
        for file in files:
            with contextlib.suppress(OSError):
                total += (Path(folder) / file).stat().st_size
    return total


def wait(true: Callable[[], bool], seconds: float, otherwise: str) -> None:
    """Until it is. Raises ClickException saying what else."""
    until = time.monotonic() + seconds
    while not true():
        if time.monotonic() > until:
            raise click.ClickException(otherwise)
        time.sleep(0.02)


class Fleet:
    """A fleet in `path`, and its processes, until `close`."""

    def __init__(self, path: Path, devices: int, traced: Sequence[str]) -> None:
        self.path, self.traced = path, traced
        self.fleet = path / "fleet"
        self.probes, self.logs = path / "probes", path / "logs"
        for folder in (self.probes, self.logs):
            folder.mkdir()
        width = len(str(devices))
        self.names = [f"pi-{i:0{width}}" for i in range(1, devices + 1)]
        self.children: list[subprocess.Popen[bytes]] = []
        self.processes: list[Process] = []

    def make(self) -> None:
        """The fleet's files, each device's with its part of the data."""
        rng = np.random.default_rng(7)
        train, test = digits.hold_out(digits.load(), rng)
        rows = digits.spread(train.labels, len(self.names), digits.Iid(), rng)
        self._command("init", self.fleet, "--broker", "mosquitto", "--port", free_port())
        for name, part in zip(self.names, rows, strict=True):
            data, own = self.path / f"{name}.npz", train.take(part)
            np.savez(data, features=own.features, labels=own.labels)
            self._command("device", "add", name, "--data", data, "--fleet-dir", self.fleet)
            with (self.fleet / "devices" / name / "device.toml").open("a") as config:
                config.write(f"\n[cache]\nmax_mb = {CACHE_MB}\n")
        np.savez(self.path / "test.npz", features=test.features, labels=test.labels)

    def start(self) -> None:
        """Everything but the run; returns when all devices are online."""
        up = self._start("coordinator", COVEY, "up", "--fleet-dir", self.fleet)
        up.disk, up.without = self.fleet, ("devices", "runs")
        status = self.fleet / "status.json"
        wait(status.exists, START_S, f"covey up does not start; see {self.logs}")
        for name in self.names:
            directory = self.fleet / "devices" / name
            device = self._start(name, COVEY_DEVICE, "run", "--config", directory / "device.toml")
            device.disk, device.without = directory, (CACHE,)
        (broker,) = [p for p in up.process.children() if "mosquitto" in p.name()]
        self.processes.insert(1, Process("broker", broker))

        def all_here() -> bool:
            with contextlib.suppress(ValueError, OSError):
                return len(json.loads(status.read_bytes())["present"]) == len(self.names)
            return False

        wait(all_here, START_S, f"not all devices are online; see {self.logs}")

    def queue(self, rounds: int) -> Path:
        """The run -> its directory. Deadlines are for the worst of machines: answers end the phases."""
        n = len(self.names)
        table = {
            "plan": str(PLANS / "mlp"),
            "rounds": rounds,
            "work": {"batches": 2, "batch_size": 16, "hyper": {"lr": 0.05}},
            "cohort": {"goal": n, "minimum": 3},
            "encoding": {"max_weight": 32},
            "deadlines": {
                "gather_s": ROUND_S,
                "share_s": ROUND_S,
                "collect_s": ROUND_S,
                "unmask_s": ROUND_S,
                "absent_grace_s": 60.0,
            },
            "evaluation": {"file": str(self.path / "test.npz")},
        }
        file = self.path / "run.toml"
        file.write_text(tomli_w.dumps(table))
        return queue_run(self.fleet, file, "soak", {}).path

    def check(self) -> None:
        """Raises ClickException if one has ended: then there is nothing to measure."""
        for child, name in zip(self.children, ["coordinator", *self.names], strict=False):
            if child.poll() is not None:
                raise click.ClickException(f"{name} ended by itself; see {self.logs}")

    def processor_s(self) -> float:
        """Seconds that all processes have computed so far."""
        return sum(sum(one.process.cpu_times()[:2]) for one in self.processes)

    def close(self) -> None:
        """End what runs, the devices first."""
        for child in reversed(self.children):
            child.terminate()
        for child in self.children:
            try:
                child.wait(30)
            except subprocess.TimeoutExpired:
                child.kill()

    def _start(self, name: str, program: str, *arguments: object) -> Process:
        probe, traced = self.probes / name, name in self.traced
        more = {"PYTHONTRACEMALLOC": "12"} if traced else {}
        with (self.logs / f"{name}.log").open("wb") as log:
            child = subprocess.Popen(
                [sys.executable, "-c", program, str(probe), *map(str, arguments)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment() | more,
            )
        self.children.append(child)
        process = Process(name, psutil.Process(child.pid), probe, traced=traced)
        self.processes.append(process)
        return process

    def _command(self, *arguments: object) -> None:
        """A command of the operator's that ends by itself."""
        start = "from covey_coordinator.cli import main; main()"
        done = subprocess.run(
            [sys.executable, "-c", start, *map(str, arguments)],
            env=environment(),
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise click.ClickException(done.stderr.strip())


def environment() -> dict[str, str]:
    """This one's, without settings of covey."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("COVEY_")}
    return kept | {
        "COVEY_HOST_ROOT": "/nonexistent"
    }  # no device minds how busy it makes the machine


@contextlib.contextmanager
def fleet_in(path: Path, devices: int, traced: Sequence[str]) -> Iterator[Fleet]:
    """A fleet that is up."""
    fleet = Fleet(path, devices, traced)
    try:
        fleet.make()
        fleet.start()
        yield fleet
    finally:
        fleet.close()


# -- the soak --------------------------------------------------------------------------------------


@dataclass
class Played:
    """How it went. lines: of metrics.jsonl. traces: name -> snapshots at the baseline and at the end.
    run_disk: (round, bytes of the run's directory). seconds: it took; processor_s: of all processes."""

    lines: list[dict[str, Any]]
    processes: list[Process]
    traces: dict[str, list[tracemalloc.Snapshot]]
    run_disk: list[tuple[int, int]]
    seconds: float
    processor_s: float


def soak(fleet: Fleet, rounds: int, baseline: int, console: Console) -> Played:
    """Play the rounds, and look at everything after each. Raises ClickException."""
    run = fleet.queue(rounds)
    metrics, lines, started = run / "metrics.jsonl", 0, time.monotonic()
    played = Played([], fleet.processes, {}, [], 0.0, 0.0)
    before_s = fleet.processor_s()
    progress_s = started
    while lines < rounds:
        since, last = time.monotonic(), lines
        while lines == last:
            fleet.check()
            if time.monotonic() - since > 2 * ROUND_S:
                raise click.ClickException(f"round {lines + 1} does not end; see {fleet.logs}")
            time.sleep(0.02)
            with contextlib.suppress(FileNotFoundError):
                lines = metrics.read_bytes().count(b"\n")
        full = lines // FULL_EVERY > last // FULL_EVERY or lines in (baseline, rounds)
        for process in fleet.processes:
            process.ask()
        for process in fleet.processes:
            process.sample(lines, full=full)
        if full:
            played.run_disk.append((lines, size_of(run)))
        if last < baseline <= lines or lines == rounds:
            for process in fleet.processes:
                if process.traced:
                    played.traces.setdefault(process.name, []).append(process.snapshot())
        if time.monotonic() - progress_s > 30:
            progress_s = time.monotonic()
            up = fleet.processes[0].samples[-1].rss / 1e6
            console.print(f"round {lines} of {rounds}; the coordinator holds {up:.1f} MB")
    played.seconds, played.processor_s = time.monotonic() - started, fleet.processor_s() - before_s
    text = metrics.read_text(encoding="utf-8")
    played.lines = [json.loads(line) for line in text.splitlines()]
    return played


def shown(grown: Sequence[Growth]) -> list[Growth]:
    """Of many devices those three that grew most, least, and in the middle: they are much alike."""
    devices = sorted(
        (one for one in grown if one.name not in ("coordinator", "broker")),
        key=lambda one: one.ratio,
    )
    if len(devices) > MOST_SHOWN:
        devices = [devices[-1], devices[len(devices) // 2], devices[0]]
    return [one for one in grown if one.name in ("coordinator", "broker")] + devices


def table_of(grown: Sequence[Growth]) -> Table:
    """Each process, with its resident memory over the rounds, between 90% and 110% of the baseline."""
    first = grown[0]
    table = Table(
        "process",
        f"MB, {first.baseline}",
        f"MB, {first.last}",
        "growth",
        "USS",
        "PSS",
        "files",
        "threads",
        "tasks",
        "blocks",
        "disk/round",
        "resident memory, ±10%",
    )
    for one in grown:
        before, after = one.memory("rss")
        resident = [s.rss for s in one.samples if s.round >= min(10, one.baseline)]

        def change(kind: str, one: Growth = one) -> str:
            old, new = one.counted(kind)
            return f"{new:,}" if old == new else f"{old:,} > {new:,}"

        uss, pss = ("{0[0]:.1f} > {0[1]:.1f}".format([v / 1e6 for v in one.memory(kind)])
                    for kind in ("uss", "pss"))  # fmt: skip
        table.add_row(
            one.name,
            f"{before / 1e6:.1f}",
            f"{after / 1e6:.1f}",
            f"{100 * (one.ratio - 1):+.1f}%",
            uss,
            pss,
            *(change(kind) for kind in ("fds", "threads", "tasks", "blocks")),
            f"{one.disk_per_round:,.0f} B",
            plot(resident, 0.9 * before, 1.1 * before),
        )
    return table


def rows_of(
    grown: Sequence[Growth], played: Played, baseline: int, traced: Sequence[str] = ()
) -> list[Row]:
    """The figures with their bounds; of the devices the worst."""
    held = [one for one in grown if one.name not in traced]
    groups = [
        ("coordinator", [one for one in held if one.name == "coordinator"]),
        ("broker", [one for one in held if one.name == "broker"]),
        ("devices", [one for one in held if one.name not in ("coordinator", "broker")]),
    ]
    rounds = len(played.lines)
    completed = sum(line["outcome"] == "completed" for line in played.lines)
    rows = [
        Row("rounds", rounds, "", "", True),
        Row("rounds completed", completed, "", f">= {rounds}", completed >= rounds),
        Row("seconds a round", played.seconds / max(1, rounds), "s", "", True),
        Row("processor time, a round", played.processor_s / max(1, rounds), "s", "", True),
    ]
    limit = 1 + MOST_GROWTH
    for name, group in groups:
        if not group:
            continue
        worst = max(group, key=lambda one: one.ratio)
        before, after = worst.memory("rss")
        rows += [
            Row(f"{name}: resident, round {baseline}", before / 1e6, "MB", "", True),
            Row(f"{name}: resident, round {rounds}", after / 1e6, "MB", "", True),
            Row(
                f"{name}: resident, last to first",
                worst.ratio,
                "",
                f"<= {limit:g}",
                worst.ratio <= limit,
            ),
        ]
        if rounds >= LONG_ENOUGH:
            most, bound = max(one.per_round for one in group), MOST_A_ROUND[name]
            rows.append(
                Row(
                    f"{name}: resident, a round",
                    most / 1e3,
                    "kB",
                    f"<= {bound / 1e3:g}",
                    most <= bound,
                )
            )
        for kind, words in (("fds", "open files"), ("threads", "threads"), ("tasks", "tasks")):
            if kind == "tasks" and name == "broker":
                continue
            more = max(after - before for before, after in (one.counted(kind) for one in group))
            rows.append(
                Row(f"{name}: {words} more", more, "", f"<= {MOST_MORE}", more <= MOST_MORE)
            )
    disk = {"coordinator": MOST_FLEET_BYTES, "devices": MOST_DEVICE_BYTES}
    for name, group in groups:
        if name in disk and group:
            most, bound = max(one.disk_per_round for one in group), disk[name]
            rows.append(Row(f"{name}: disk, a round", most, "B", f"<= {bound}", most <= bound))
    cached = max((s.cache or 0 for one in groups[2][1] for s in one.samples), default=0)
    limit_mb = f"<= {CACHE_MB}"
    rows.append(Row("devices: cache", cached / 1e6, "MB", limit_mb, cached <= CACHE_MB * 10**6))
    since = [(n, size) for n, size in played.run_disk if n >= baseline]
    if len(since) > 1:
        kept = (since[-1][1] - since[0][1]) / (since[-1][0] - since[0][0])
        rows.append(Row("the run's own files, a round", kept, "B", "", True))
    return rows


def tell_traces(played: Played, console: Console, most: int = 15) -> None:
    """What traced processes hold more than at the baseline, by the line that allocated it."""
    for name, snapshots in played.traces.items():
        if len(snapshots) < 2:
            continue
        console.print(f"\n{name}: what grew, in Python's own memory")
        ours = [
            tracemalloc.Filter(False, tracemalloc.__file__),
            tracemalloc.Filter(False, "<string>"),
        ]
        before, after = (
            snapshot.filter_traces(ours) for snapshot in snapshots[:: len(snapshots) - 1]
        )
        for entry in after.compare_to(before, "lineno")[:most]:
            console.print(f"  {entry.size_diff:+,} B, {entry.count_diff:+,} blocks", entry.traceback,
                          highlight=False, markup=False)  # fmt: skip
        for entry in after.compare_to(before, "traceback")[:3]:
            console.print(f"  {entry.size_diff:+,} B came from", highlight=False)
            console.print("\n".join(entry.traceback.format()), highlight=False, markup=False)


@click.command(help=__doc__)
@click.option("--rounds", default=500, show_default=True, type=click.IntRange(min=20))
@click.option("--devices", default=20, show_default=True, type=click.IntRange(3, 128))
@click.option(
    "--baseline",
    type=click.IntRange(min=10),
    help="The round that the end is compared with.  [default: 50, or half of the rounds]",
)
@click.option("--trace", "traced", multiple=True, metavar="NAME", help="Say where memory grew.")
@click.option("--keep", is_flag=True, help="Leave the fleet's directory, and say where it is.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the rows too.")
def main(
    rounds: int,
    devices: int,
    baseline: int | None,
    traced: tuple[str, ...],
    keep: bool,
    json_path: Path | None,
) -> None:
    """Play, measure, print and judge."""
    baseline = min(50, rounds // 2) if baseline is None else baseline
    if baseline >= rounds:
        raise click.UsageError("the baseline comes before the last round")
    console = Console()
    path = Path(tempfile.mkdtemp(prefix="covey-soak-"))
    ended = False
    try:
        with fleet_in(path, devices, traced) as fleet:
            played = soak(fleet, rounds, baseline, console)
        ended = True
    finally:
        if keep or not ended:
            console.print(f"its files are in {path}")
        else:
            shutil.rmtree(path, ignore_errors=True)
    grown = [Growth(p.name, p.samples, baseline, rounds) for p in played.processes]
    # Twelve columns; into a file they go at full width.
    wide = console if console.is_terminal else Console(width=200)
    wide.print(table_of(shown(grown)))
    tell_traces(played, wide)
    sys.exit(0 if report(rows_of(grown, played, baseline, traced), json_path) else 1)


if __name__ == "__main__":
    main()
