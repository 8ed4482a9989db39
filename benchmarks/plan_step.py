"""One training step of a plan in onnxruntime beside the same step in torch.

Same module, same batch of 32, one thread each, and in turn within one process, so that a busy machine
slows both; what is compared are the medians. torch's step is zero_grad, forward, backward, step.
Then a process of its own for each: 20 steps of the convolutional network from start to finish.

    python benchmarks/plan_step.py [--json FILE]

Ends with status 1 if a bound is broken.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from _report import Row, report

from covey_coordinator.plans.bundle import PlanBundle, write
from covey_coordinator.plans.compile import compile_plan
from covey_fleet.models import cnn_28x28, mlp_28x28
from covey_shared.runtime import TrainStep

BATCH = 32
LR = 0.01
MODELS: dict[str, tuple[Callable[[], Any], float]] = {
    "MLP 784-256-10": (mlp_28x28, 1.7),
    "CNN 20-50-500-10": (cnn_28x28, 1.0),
}
"""How to build it, and how many times faster than torch a plan without momentum has to be."""
SECONDS = 4.0
"""How long to measure each model."""
BLOCK = 5
"""Steps at a time of each side."""


def sample() -> tuple[Any, Any]:
    """features: float32[32, 1, 28, 28]. labels: int64[32]."""
    generator = torch.Generator().manual_seed(1)
    return (
        torch.rand(BATCH, 1, 28, 28, generator=generator),
        torch.randint(0, 10, (BATCH,), generator=generator),
    )


def compiled(build: Callable[[], Any], momentum: float) -> tuple[Any, PlanBundle]:
    """A module and its plan."""
    torch.manual_seed(1)
    module = build()
    plan = compile_plan(module, *sample(), loss="cross_entropy", momentum=momentum, name="step")
    return module, plan


def torch_step(module: Any, momentum: float) -> Callable[[], float]:
    """The eager step, as one writes it."""
    features, labels = sample()
    optimizer = torch.optim.SGD(module.parameters(), lr=LR, momentum=momentum)

    def step() -> float:
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(module(features), labels)
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return step


def plan_step(plan: PlanBundle) -> Callable[[], float]:
    """The plan's step, as a device runs it."""
    features, labels = (tensor.numpy() for tensor in sample())
    runtime = TrainStep(plan.header, plan.graphs["train"])
    runtime.load(plan.initial)
    return lambda: runtime.step(features, labels, {"lr": LR})


def medians(one: Callable[[], float], other: Callable[[], float]) -> tuple[float, float]:
    """Seconds of one step of each, measured in turn."""
    times: tuple[list[float], list[float]] = ([], [])
    end = time.perf_counter() + SECONDS
    while time.perf_counter() < end:
        for step, found in zip((one, other), times, strict=True):
            start = time.perf_counter()
            for _ in range(BLOCK):
                step()
            found.append((time.perf_counter() - start) / BLOCK)
    return statistics.median(times[0]), statistics.median(times[1])


def step_rows(name: str, momentum: float) -> list[Row]:
    """Time per step of one model, and how far apart the two are after ten steps."""
    build, bound = MODELS[name]
    module, plan = compiled(build, momentum)
    ours, theirs = plan_step(plan), torch_step(module, momentum)
    apart = max(abs(ours() - theirs()) for _ in range(10))
    plan_s, torch_s = medians(ours, theirs)
    ratio = torch_s / plan_s
    label = f"{name}, momentum {momentum:g}" if momentum else name
    return [
        Row(f"{label}: plan step", plan_s * 1e3, "ms", "", True),
        Row(f"{label}: torch step", torch_s * 1e3, "ms", "", True),
        Row(f"{label}: torch / plan", ratio, "times", "", True)
        if momentum
        else Row(f"{label}: torch / plan", ratio, "times", f">= {bound}", ratio >= bound),
        Row(f"{label}: losses differ in ten steps by", apart, "", "<= 1e-05", apart <= 1e-5),
    ]


RUN_PLAN = """
import sys
import numpy as np
from pathlib import Path
from covey_shared.plan import decode_header
from covey_shared.runtime import TrainStep
plan = Path(sys.argv[1])
header = decode_header((plan / "plan.json").read_bytes())
step = TrainStep(header, (plan / "train.onnx").read_bytes())
step.load(np.fromfile(plan / "initial.bin", "<f4"))
x, y = np.ones((32, 1, 28, 28), np.float32), np.arange(32) % 10
for _ in range(20):
    step.step(x, y)
"""
RUN_TORCH = """
import sys
import torch
from covey_fleet.models import cnn_28x28
torch.set_num_threads(1)
module = cnn_28x28()
optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
x, y = torch.ones(32, 1, 28, 28), torch.arange(32) % 10
for _ in range(20):
    optimizer.zero_grad()
    torch.nn.functional.cross_entropy(module(x), y).backward()
    optimizer.step()
"""
PEAK = """
with open("/proc/self/status") as status:
    print(1024 * int(next(line for line in status if line.startswith("VmHWM")).split()[1]))
"""


def process_rows() -> list[Row]:
    """Peak memory and duration of a whole process that trains the convolutional network."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "plan"
        write(compiled(cnn_28x28, 0.0)[1], directory)
        for name, code in (("plan", RUN_PLAN), ("torch", RUN_TORCH)):
            start = time.perf_counter()
            done = subprocess.run(
                [sys.executable, "-c", code + PEAK, directory],
                capture_output=True,
                text=True,
                check=True,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )
            taken = time.perf_counter() - start
            peak = int(done.stdout) / 1e6
            rows.append(Row(f"process with {name}, 20 CNN steps: peak", peak, "MB", "", True))
            rows.append(Row(f"process with {name}, 20 CNN steps: whole", taken, "s", "", True))
    return rows


@click.command()
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the rows here.")
def main(json_path: Path | None) -> None:
    """Measure the training step of two models in onnxruntime and in torch."""
    torch.set_num_threads(1)
    rows = [row for name in MODELS for momentum in (0.0, 0.9) for row in step_rows(name, momentum)]
    rows += process_rows()
    sys.exit(0 if report(rows, json_path) else 1)


if __name__ == "__main__":
    main()
