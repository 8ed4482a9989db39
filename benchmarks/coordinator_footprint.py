"""What a coordinator costs its machine: memory and processor time, idle and in rounds, its start, its size.

The real `covey up` with mosquitto, in a fleet of its own for each figure; the devices are real services in
other processes whose training is made up. Memory is resident memory as the kernel counts it: VmHWM of the
coordinator's process and of its broker's, set back before what is measured. Plans are compiled beforehand, by
another process: the coordinator has no torch.

    python benchmarks/coordinator_footprint.py [--devices 100] [--idle 30] [--sizes] [--json FILE]

--sizes also installs what `covey[coordinator]` needs, from wheels alone, for x86-64 and for aarch64 (through
pip, from where it is configured to look), without byte code, and counts it. Bounds are what a Raspberry Pi 4
of 1 GB leaves room for; ends with status 1 if one is broken.
"""

import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path

import click
import psutil
import tomli_w
from _report import Row, report
from device_footprint import (
    MB,
    SETTLE_S,
    STARTS,
    Lab,
    bounded,
    command,
    core_seconds,
    forget_peak,
    process,
    status,
    until,
)

START_CORE_S = 2.0
IDLE_MB = 120.0
IDLE_CORE = 0.01
PEAK_MB = 350.0
BROKER_MB = 300.0
SIZE_MB = 250.0

FEW = 10
PATIENCE_S = 300.0
PLANS = {"mlp": 101_770, "cnn": 431_080}
MACHINES = (("x86_64", "3.11"), ("aarch64", "3.11"), ("aarch64", "3.13"))
ANY_HOST = "[host]\ncpu_pressure = 0\nmemory_pressure = 0\nio_pressure = 0\n"
GLIBC = {"3.11": 36, "3.13": 41}
"""Of the Debian release that has this Python: 2.36 in bookworm, 2.41 in trixie."""


@contextlib.contextmanager
def up(lab: Lab, name: str) -> Iterator[tuple[int, int, float]]:
    """`covey up` -> its process and its broker's, and the seconds until it waits for devices."""
    log, began = lab.directory / f"{name}.log", time.monotonic()
    arguments = command("covey_coordinator", "up", "--fleet-dir", lab.fleet)
    with process(arguments, log) as child:
        until(log, "waiting for devices and runs")
        seconds = time.monotonic() - began
        (broker,) = [p for p in psutil.Process(child.pid).children() if "mosquitto" in p.name()]
        yield child.pid, broker.pid, seconds


def import_s() -> float:
    """Importing all that a coordinator needs, in a fresh interpreter, the median of some times."""
    taken = []
    for _ in range(STARTS):
        began = time.monotonic()
        subprocess.run([sys.executable, "-c", "import covey_coordinator.daemon"], check=True)
        taken.append(time.monotonic() - began)
    return statistics.median(taken)


def play(lab: Lab, plan: str, name: str, rounds: int, devices: int) -> None:
    """A run that waits for all of its devices, all of which compute on this machine. Ends the program if
    one of them is missing in a sum."""
    table = {
        "plan": str(lab.directory / plan),
        "rounds": rounds,
        "cohort": {"goal": devices},
        "deadlines": dict.fromkeys(("gather_s", "share_s", "collect_s", "unmask_s"), PATIENCE_S)
        | {"absent_grace_s": PATIENCE_S},
    }
    queued = lab.directory / f"{name}.toml"
    queued.write_text(tomli_w.dumps(table))
    line = command("covey_coordinator", "run", queued, "--name", name, "--fleet-dir", lab.fleet)
    done = subprocess.run(line, capture_output=True, text=True)
    lines = (lab.fleet / "runs" / name / "metrics.jsonl").read_text().splitlines()
    if [json.loads(line)["survivors"] for line in lines] != [devices] * rounds:
        raise click.ClickException(f"run {name}: {done.stdout}{done.stderr}")


def in_rounds(lab: Lab, devices: int, idle_s: float) -> Iterator[Row]:
    """Rounds of each plan with so many devices."""
    for plan, parameters in PLANS.items():
        what = f"{parameters:,} parameters, {devices} devices"
        with up(lab, f"{plan}-{devices}") as (pid, broker, _), lab.companions(devices):
            time.sleep(SETTLE_S)
            if plan == "mlp":
                yield bounded(
                    f"idle, {devices} devices online", status(pid, "VmRSS"), "MB", IDLE_MB
                )
                before, began = core_seconds(pid), time.monotonic()
                time.sleep(idle_s)
                core = (core_seconds(pid) - before) / (time.monotonic() - began)
                yield bounded(f"idle, {devices} devices online", core, "cores", IDLE_CORE)
            play(lab, plan, f"{plan}-{devices}-first", 1, devices)  # in which all fetch the plan
            for watched in (pid, broker):
                forget_peak(watched)
            before, began = core_seconds(pid), time.monotonic()
            play(lab, plan, f"{plan}-{devices}", 2, devices)
            spent, took = core_seconds(pid) - before, time.monotonic() - began
            yield bounded(f"peak, {what}", status(pid, "VmHWM"), "MB", PEAK_MB)
            yield bounded(f"the broker's peak, {what}", status(broker, "VmHWM"), "MB", BROKER_MB)
            yield Row(f"a round's processor time, {what}", spent / 2, "s", "", True)
            yield Row(f"a round, {what}", took / 2, "s", "", True)


def requirements() -> list[str]:
    """Of the package and its extra `coordinator`, as pyproject.toml has them."""
    document = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())
    project = document["project"]
    return [*project["dependencies"], *project["optional-dependencies"]["coordinator"]]


def installed(machine: str, python: str, directory: Path) -> tuple[float, int]:
    """MB and distributions, from wheels alone. Ends the program if one of them is not a wheel."""
    platforms = [f"manylinux_2_{minor}_{machine}" for minor in range(GLIBC[python], 16, -1)]
    done = subprocess.run(
        [
            sys.executable, "-m", "pip", "install", "--quiet", "--no-compile", "--target", directory,
            "--only-binary=:all:", "--implementation", "cp", "--python-version", python,
            *(word for name in platforms for word in ("--platform", name)),
            *(w for abi in (f"cp{python.replace('.', '')}", "abi3", "none") for w in ("--abi", abi)),
            *requirements(),
        ],
        capture_output=True,
        text=True,
    )  # fmt: skip
    if done.returncode != 0:
        raise click.ClickException(f"{machine}, Python {python}: {done.stderr}")
    size = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
    return size / MB, len(list(directory.glob("*.dist-info")))


@click.command(help=__doc__)
@click.option("--devices", default=100, show_default=True, help="In the large rounds.")
@click.option("--idle", default=30.0, show_default=True, help="Seconds of idleness to measure.")
@click.option("--sizes", is_flag=True, help="Install it for other machines, and count.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the rows too.")
def main(devices: int, idle: float, sizes: bool, json_path: Path | None) -> None:
    """Measure, print, and say whether the bounds hold."""
    rows = [Row("importing the coordinator", import_s(), "s", "", True)]
    with tempfile.TemporaryDirectory(prefix="covey-bench-") as folder:
        for machine, python in MACHINES if sizes else ():
            target = Path(folder) / f"{machine}-{python}"
            megabytes, distributions = installed(machine, python, target)
            what = f"installed, {machine}, Python {python}"
            rows.append(bounded(what, megabytes, "MB", SIZE_MB))
            rows.append(Row(what, distributions, "distributions", "", True))
        (directory := Path(folder) / "lab").mkdir()
        lab = Lab(directory, max(devices, FEW))
        for config in lab.configs:
            # All of them are on this machine, which is to be busy.
            config.with_name("policy.toml").write_text(ANY_HOST)
        starts, spent = [], []
        for index in range(STARTS):
            with up(lab, f"start-{index}") as (pid, _, seconds):
                starts.append(seconds)
                spent.append(core_seconds(pid))
                if index == 0:
                    time.sleep(SETTLE_S)
                    rows.append(bounded("idle, alone", status(pid, "VmRSS"), "MB", IDLE_MB))
        rows.append(Row("start to serving", statistics.median(starts), "s", "", True))
        took = statistics.median(spent)
        rows.append(bounded("its processor time", took, "s", START_CORE_S))
        for count in (FEW, devices):
            rows += in_rounds(lab, count, idle)
    if not report(rows, json_path):
        sys.exit(1)


if __name__ == "__main__":
    main()
