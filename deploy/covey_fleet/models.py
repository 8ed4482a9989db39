"""The torch modules behind the demo's plans, and the program that compiles them.

Needs `covey[compile]`; torch is imported inside the functions alone, since the demo itself runs
the compiled plans beside this file and no torch. ``python -m covey_fleet.models`` compiles them
again; a test holds them equal to a fresh compile.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from covey_coordinator.plans.bundle import PlanBundle

PLANS = Path(__file__).parent / "plans"
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


def main() -> None:
    """Compile every demo plan into the package's folder."""
    from covey_coordinator.plans.bundle import write

    for name in DEMO_MODELS:
        write(compile_demo(name), PLANS / name, replace=True)
        print(PLANS / name)  # noqa: T201


if __name__ == "__main__":
    main()
