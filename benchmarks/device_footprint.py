"""What one device costs its host: memory and processor time, idle and in rounds, and how soon it is there.

The real `covey-device run` at a real mosquitto and coordinator. Its companions, as many as asked for, are
real services whose training is made up, so that only the measured device computes. Beside it the same
training in a minimal torch process, and a Flower client that trains nothing (its server is not counted; it
is left out with a reason where Flower does not install, or with --no-flower).

    python benchmarks/device_footprint.py [--peers 100] [--idle 30] [--json FILE]

Memory is resident memory as the kernel counts it: VmHWM of the service's process, set back before what is
measured. The child process in which a new plan is tried, before the first round of a plan, is added in a row
of its own, by proportional set sizes (each shared page once). Ends with status 1 if a bound is broken.
"""

import contextlib
import json
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import click
import numpy as np
import psutil
from _flower import Peer, install
from _report import Row, report

from covey_coordinator.fleet import FleetDirectory

MB = 1_000_000
PEAK_MB = 130.0
IDLE_MB = 60.0
IDLE_CORE = 0.001
START_S = 1.5
MLP_ADDS_MB = 20.0
STARTS = 5
SETTLE_S = 10.0
"""After a round, in which its model is put together and memory is given back: work, not idleness."""

COMPILE = """
import sys
import numpy as np, torch
from pathlib import Path
from torch import nn
from covey_coordinator.plans.bundle import write
from covey_coordinator.plans.compile import compile_plan
from covey_fleet.models import cnn_28x28
torch.manual_seed(0)
images = np.random.default_rng(0).random((8, 1, 28, 28), np.float32)
mlp = nn.Sequential(nn.Flatten(), nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10))
for name, module in (("cnn", cnn_28x28()), ("mlp", mlp)):
    plan = compile_plan(module, images, np.arange(8), loss="cross_entropy", name=name)
    write(plan, Path(sys.argv[1]) / name)
"""

TORCH = """
import sys
import numpy as np, torch
from torch import nn
from covey_fleet.models import cnn_28x28
torch.set_num_threads(1)
module = cnn_28x28()
optimizer = torch.optim.SGD(module.parameters(), lr=0.01)
x, y = torch.from_numpy(np.load(sys.argv[1])), torch.from_numpy(np.load(sys.argv[2]))
for step in range(10):
    optimizer.zero_grad()
    part = slice(32 * step, 32 * step + 32)
    nn.functional.cross_entropy(module(x[part]), y[part]).backward()
    optimizer.step()
for line in open("/proc/self/status"):
    if line.startswith("VmHWM"):
        print(line.split()[1])
"""


def status(pid: int, field: str) -> float:
    """A field of /proc/PID/status in MB."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return 1024 * int(line.split()[1]) / MB
    raise KeyError(field)


def forget_peak(pid: int) -> None:
    """From now on VmHWM counts anew."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")


def core_seconds(pid: int) -> float:
    """Processor time of all threads so far, with the scheduler's own precision."""
    tasks = Path(f"/proc/{pid}/task").glob("*/schedstat")
    return sum(int(task.read_text().split()[0]) for task in tasks) / 1e9


class Together:
    """The most that a process and its children held at once, by proportional set sizes, asked 20 times a
    second."""

    def __init__(self, pid: int) -> None:
        self.most_mb, self._pid, self._over = 0.0, pid, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Together":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        service = psutil.Process(self._pid)
        while not self._over.wait(0.05):
            held = 0.0
            for process in (service, *service.children(recursive=True)):
                with contextlib.suppress(psutil.Error, OSError):
                    held += process.memory_full_info().pss / MB
            self.most_mb = max(self.most_mb, held)


def free_port() -> int:
    """One that nobody uses now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def command(package: str, *arguments: object) -> list[str]:
    """A command line of ours, in this interpreter."""
    code = f"from {package}.cli import main; main()"
    return [sys.executable, "-c", code, *map(str, arguments)]


@contextlib.contextmanager
def process(arguments: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Running within; ended with SIGTERM."""
    with log.open("wb") as output:
        # Whether this machine is fit to train now is no question here.
        environment = os.environ | {"COVEY_HOST_ROOT": os.devnull}
        child = subprocess.Popen(
            arguments, stdout=output, stderr=subprocess.STDOUT, env=environment
        )
    try:
        yield child
    finally:
        child.send_signal(signal.SIGTERM)
        try:
            child.wait(20)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def until(log: Path, what: str, limit_s: float = 60.0) -> None:
    """Wait until it stands in the log."""
    ends = time.monotonic() + limit_s
    while not re.search(what, log.read_text(errors="replace") if log.exists() else ""):
        if time.monotonic() > ends:
            raise click.ClickException(
                f"{log.name}: no {what!r} within {limit_s:g} s:\n{log.read_text()}"
            )
        time.sleep(0.005)


class Lab:
    """A fleet of one measured device and its companions, all on this machine."""

    def __init__(self, directory: Path, peers: int) -> None:
        self.directory, self.peers = directory, peers
        self.fleet = directory / "fleet"
        subprocess.run([sys.executable, "-c", COMPILE, directory], check=True)
        rng = np.random.default_rng(0)
        np.save(directory / "x.npy", rng.random((640, 1, 28, 28), np.float32))
        np.save(directory / "y.npy", rng.integers(0, 10, 640))
        self._run("init", self.fleet, "--port", free_port(), "--broker", "mosquitto")
        fleet = FleetDirectory(self.fleet)
        self.configs = []
        for index in range(peers + 1):
            config = fleet.add_device(f"pi-{index:03d}", days=1, data=None) / "device.toml"
            head = config.read_text().split("[data]")[0]
            config.write_text(
                f'{head}[data]\nkind = "npy"\nfeatures = "{directory}/x.npy"\n'
                f'labels = "{directory}/y.npy"\n'
            )
            self.configs.append(config)

    @staticmethod
    def _run(*arguments: object) -> None:
        line = command("covey_coordinator", *arguments)
        done = subprocess.run(line, capture_output=True, text=True)
        if done.returncode != 0:
            raise click.ClickException(f"covey {arguments[0]}: {done.stdout}{done.stderr}")

    @contextlib.contextmanager
    def up(self) -> Iterator[None]:
        """The coordinator with its broker."""
        log = self.directory / "up.log"
        with process(command("covey_coordinator", "up", "--fleet-dir", self.fleet), log):
            until(log, "listening|serving|waiting|broker")
            yield

    @contextlib.contextmanager
    def companions(self, count: int) -> Iterator[None]:
        """So many of them, in two processes."""
        with contextlib.ExitStack() as stack:
            for half in range(2):
                configs = self.configs[1 : count + 1][half::2]
                log = self.directory / f"companions-{half}.log"
                script = str(Path(__file__).with_name("_companions.py"))
                stack.enter_context(process([sys.executable, script, *map(str, configs)], log))
            self._await_presence(count)
            yield

    def _await_presence(self, count: int) -> None:
        ends = time.monotonic() + 120
        while time.monotonic() < ends:
            with contextlib.suppress(OSError, ValueError, KeyError):
                if len(json.loads((self.fleet / "status.json").read_bytes())["present"]) >= count:
                    return
            time.sleep(0.2)
        raise click.ClickException(f"{count} companions are not all there after 120 s")

    @contextlib.contextmanager
    def device(self, name: str = "device") -> Iterator[tuple[int, float]]:
        """The measured one: its process id, and its seconds from the start to its connection."""
        log = self.directory / f"{name}.log"
        started = time.monotonic()
        with process(command("covey_device", "run", "--config", self.configs[0]), log) as child:
            until(log, ": connected")
            yield child.pid, time.monotonic() - started

    def rounds(self, plan: str, name: str, count: int, goal: int) -> None:
        """Play them; ends the program if one was not completed."""
        self._run(
            "run", self.directory / plan, "--name", name, "--rounds", count, "--goal", goal,
            "--minimum", goal, "--batches", 10, "--batch-size", 32, "--fleet-dir", self.fleet,
        )  # fmt: skip
        lines = (self.fleet / "runs" / name / "metrics.jsonl").read_text().splitlines()
        if [json.loads(line)["survivors"] for line in lines] != [goal] * count:
            raise click.ClickException(f"run {name}: {lines}")


def torch_peak_mb(directory: Path) -> float:
    """Ten batches of the convolutional network in a torch process that does nothing else."""
    arguments = [sys.executable, "-c", TORCH, directory / "x.npy", directory / "y.npy"]
    done = subprocess.run(arguments, check=True, capture_output=True, text=True)
    return 1024 * int(done.stdout.split()[-1]) / MB


def flower_mb(directory: Path) -> tuple[float, float]:
    """A Flower client's memory, over its processes: idle, and the most in two rounds of as many parameters
    without any training."""
    with Peer(directory / "flower") as peer:
        time.sleep(SETTLE_S)
        with Together(peer.client) as together:
            time.sleep(1.0)
        idle = together.most_mb
        with Together(peer.client) as together:
            peer.play(parameters=431_080, rounds=2)
        return idle, together.most_mb


def bounded(name: str, value: float, unit: str, most: float) -> Row:
    """A row with an upper bound."""
    return Row(name, value, unit, f"<= {most:g}", value <= most)


@click.command(help=__doc__)
@click.option("--peers", default=100, show_default=True, help="Companions in the large round.")
@click.option("--idle", default=30.0, show_default=True, help="Seconds of idleness to measure.")
@click.option(
    "--flower/--no-flower", default=True, show_default=True, help="Beside a Flower client."
)
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the rows too.")
def main(peers: int, idle: float, flower: bool, json_path: Path | None) -> None:
    """Measure, print, and say whether the bounds hold."""
    rows = []
    with tempfile.TemporaryDirectory(prefix="covey-bench-") as folder:
        lab = Lab(Path(folder), peers)
        with lab.up():
            starts, bare = [], []
            for index in range(STARTS):
                with lab.device(f"start-{index}") as (_, seconds):
                    starts.append(seconds)
                began = time.monotonic()
                subprocess.run([sys.executable, "-c", "import numpy, onnxruntime"], check=True)
                bare.append(time.monotonic() - began)
            start = statistics.median(starts)
            rows.append(bounded("start to connection", start, "s", START_S))
            bare_s = statistics.median(bare)
            rows.append(
                Row("the same / importing numpy and onnxruntime", start / bare_s, "x", "", True)
            )
            with lab.device() as (pid, _):
                time.sleep(SETTLE_S)
                rows.append(bounded("idle, before any round", status(pid, "VmRSS"), "MB", IDLE_MB))
                few = min(9, peers)
                with lab.companions(few):
                    lab.rounds("mlp", "mlp-first", 1, few + 1)
                    time.sleep(SETTLE_S)
                    resting = status(pid, "VmRSS")
                    forget_peak(pid)
                    lab.rounds("mlp", "mlp", 1, few + 1)
                    grown = status(pid, "VmHWM") - resting
                    rows.append(bounded("idle, after a round of the MLP", resting, "MB", IDLE_MB))
                    rows.append(
                        bounded("a round of the MLP (101,770) adds", grown, "MB", MLP_ADDS_MB)
                    )
            with lab.device("large") as (pid, _), lab.companions(peers):
                forget_peak(pid)
                with Together(pid) as together:
                    lab.rounds("cnn", "cnn", 2, peers + 1)
                peak = status(pid, "VmHWM")
                rows.append(bounded(f"peak, CNN (431,080), {peers} peers", peak, "MB", PEAK_MB))
                rows.append(
                    Row(
                        "with the trial's process, shared pages once",
                        together.most_mb,
                        "MB",
                        "",
                        True,
                    )
                )
                time.sleep(SETTLE_S)
                before, began = core_seconds(pid), time.monotonic()
                time.sleep(idle)
                core = (core_seconds(pid) - before) / (time.monotonic() - began)
                rows.append(
                    bounded("idle, after the CNN's rounds", status(pid, "VmRSS"), "MB", IDLE_MB)
                )
                rows.append(bounded("idle, of a core", 100 * core, "%", 100 * IDLE_CORE))
                rows.append(Row("of that, anonymous", status(pid, "RssAnon"), "MB", "", True))
            torch_mb = torch_peak_mb(Path(folder))
            rows.append(Row("the same training in torch, nothing else", torch_mb, "MB", "", True))
            rows.append(Row("torch / covey-device", torch_mb / peak, "x", "", True))
            if flower and (reason := install()):
                click.echo(f"no Flower client: {reason}", err=True)
            elif flower:
                resting, busy = flower_mb(Path(folder))
                rows.append(Row("a Flower client, idle", resting, "MB", "", True))
                rows.append(Row("a Flower client, rounds without training", busy, "MB", "", True))
    sys.exit(0 if report(rows, json_path) else 1)


if __name__ == "__main__":
    main()
