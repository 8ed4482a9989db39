"""The torch modules behind the plans that are shipped, and the program that compiles them: the demo's,
and the tiny one that `covey-device doctor` trains to see whether it comes out right.

Needs `covey[compile]`; torch is imported inside the functions alone, since the demo itself runs
the compiled plans beside this file and no torch. ``python -m covey_fleet.models`` compiles them
again; a test holds them equal to a fresh compile.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

if TYPE_CHECKING:
    from covey_coordinator.plans.bundle import PlanBundle
    from covey_device.doctor.first_step import Expected

PLANS = Path(__file__).parent / "plans"
TINY = Path(str(files("covey_device.doctor"))) / "plan"
SEED = 7
SAMPLE_SIZE = 32


@dataclass(frozen=True, slots=True)
class DemoModel:
    """One shipped plan: how to build its module, and the defaults it is compiled with."""

    build: Callable[[], Any]
    lr: float
    momentum: float


def mlp() -> Any:
    """For 8x8 digits: one hidden layer, 4,810 parameters."""
    from torch import nn

    return nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def cnn() -> Any:
    """For 8x8 digits: two convolutions and a dense layer, 6,090 parameters."""
    from torch import nn

    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(128, 10),
    )


def cnn_28x28() -> Any:
    """For 28x28 digits, as in the classic MNIST examples: 431,080 parameters. For measurements."""
    from torch import nn

    return nn.Sequential(
        nn.Conv2d(1, 20, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(20, 50, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(800, 500),
        nn.ReLU(),
        nn.Linear(500, 10),
    )


def mlp_28x28() -> Any:
    """For 28x28 digits: one hidden layer of 256, 203,530 parameters. For measurements."""
    from torch import nn

    return nn.Sequential(nn.Flatten(), nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 10))


DEMO_MODELS: Mapping[str, DemoModel] = {
    "mlp": DemoModel(mlp, lr=0.1, momentum=0.9),
    "cnn": DemoModel(cnn, lr=0.1, momentum=0.9),
}


def compile_demo(name: str) -> "PlanBundle":
    """Compile one demo plan: seeded, so that it always comes out the same."""
    import torch

    from covey_coordinator.plans.compile import compile_plan

    model = DEMO_MODELS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        module = model.build()
    rng = np.random.default_rng(SEED)
    # Shapes and types of scikit-learn's digits, scaled to 0..1; the values do not matter.
    features = rng.random((SAMPLE_SIZE, 1, 8, 8), np.float32)
    labels = rng.integers(0, 10, SAMPLE_SIZE)
    return compile_plan(
        module,
        features,
        labels,
        loss="cross_entropy",
        momentum=model.momentum,
        lr=model.lr,
        name=f"digits-{name}",
    )


TINY_LR, TINY_MOMENTUM, TINY_STEPS = 0.5, 0.9, 3


def tiny() -> Any:
    """For `covey-device doctor`: 43 parameters."""
    from torch import nn

    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))


def tiny_batch() -> tuple[Any, Any]:
    """Eight examples: float32[8, 4], int64[8]."""
    rng = np.random.default_rng(SEED)
    return rng.normal(size=(8, 4)).astype(np.float32), rng.integers(0, 3, 8)


def compile_tiny() -> "PlanBundle":
    """Compile the doctor's plan: seeded, so that it always comes out the same."""
    import torch

    from covey_coordinator.plans.compile import compile_plan

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        module = tiny()
    features, labels = tiny_batch()
    return compile_plan(
        module,
        features,
        labels,
        loss="cross_entropy",
        momentum=TINY_MOMENTUM,
        lr=TINY_LR,
        name="doctor",
    )


def expect_tiny() -> "Expected":
    """What torch makes of the doctor's plan in a few steps."""
    import torch

    from covey_device.doctor.first_step import Expected, Numbers

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        module = tiny()
    features, labels = tiny_batch()
    optimizer = torch.optim.SGD(module.parameters(), lr=TINY_LR, momentum=TINY_MOMENTUM)
    losses = []
    for _ in range(TINY_STEPS):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(
            module(torch.from_numpy(features)), torch.from_numpy(labels)
        )
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    flat = torch.cat([p.detach().reshape(-1) for p in module.parameters()])
    return Expected(features.tolist(), labels.tolist(), Numbers(losses, flat.tolist()))


def tiny_files() -> dict[str, bytes]:
    """What of it a device needs, by file name."""
    plan = compile_tiny()
    known = msgspec.json.format(msgspec.json.encode(expect_tiny()), indent=0)
    return {
        "plan.json": plan.header_bytes,
        "train.onnx": plan.graphs["train"],
        "initial.bin": plan.initial.astype("<f4").tobytes(),
        "expected.json": known + b"\n",
    }


def main() -> None:
    """Compile every plan that is shipped into its package's folder."""
    from covey_coordinator.plans.bundle import write

    for name in DEMO_MODELS:
        write(compile_demo(name), PLANS / name, replace=True)
        print(PLANS / name)  # noqa: T201
    TINY.mkdir(exist_ok=True)
    for name, data in tiny_files().items():
        (TINY / name).write_bytes(data)
    print(TINY)  # noqa: T201


if __name__ == "__main__":
    main()
