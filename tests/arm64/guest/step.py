"""Trains a plan on made-up data: `python step.py PLAN STEPS` writes the parameters to standard output.

The same numbers go in wherever it runs. Before the parameters come the losses; all are float32.
"""

import platform
import sys
from pathlib import Path

import numpy as np

from covey_shared.plan import decode_header
from covey_shared.runtime import TrainStep

BATCH = 16


def main(plan: Path, steps: int) -> None:
    """Train, and write."""
    header = decode_header((plan / "plan.json").read_bytes())
    step = TrainStep(header, (plan / "train.onnx").read_bytes())
    step.load(np.frombuffer((plan / "initial.bin").read_bytes(), "<f4").astype(np.float32))
    rng = np.random.default_rng(11)
    losses = []
    for _ in range(steps):
        features = rng.random((BATCH, *header.features.shape), np.float32)
        losses.append(step.step(features, rng.integers(0, 10, BATCH)))
    print(platform.machine(), platform.python_version(), file=sys.stderr)
    out = np.concatenate([np.array(losses, np.float32), step.parameters()])
    sys.stdout.buffer.write(out.astype("<f4").tobytes())


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
