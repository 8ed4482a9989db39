"""What the same work would have given in one place: the yardstick of the demo.

The same plan, hyper-parameters and number of examples, but all data in one heap and one model
trained on it without a break. With the device's own trainer, so that nothing else differs.
"""

import math
import time

import numpy as np

from covey_coordinator.plans.bundle import PlanBundle
from covey_device.data import source_of_arrays
from covey_device.trainer import Trainer, Work
from covey_fleet.digits import Examples
from covey_shared.layout import Flat
from covey_shared.runtime import Evaluator, TrainStep

_NO_BOUND = 2**62


def train_centrally(
    bundle: PlanBundle, train: Examples, n_examples: int, batch_size: int, lr: float, seed: int
) -> Flat:
    """Parameters after training on n_examples (repeats counted), in batches of batch_size."""
    trainer = Trainer(
        TrainStep(bundle.header, bundle.graphs["train"]),
        source_of_arrays(train.features, train.labels, bundle.header),
        bundle.header,
    )
    work = Work(
        batches=max(1, round(n_examples / min(batch_size, train.n))),
        batch_size=batch_size,
        max_seconds=math.inf,
        max_resident_bytes=_NO_BOUND,
        hyper={"lr": lr},
    )
    rng = np.random.default_rng(seed)
    result = trainer.train(bundle.initial, work, clock=time.monotonic, rng=rng)
    return bundle.initial + result.delta


def accuracy(bundle: PlanBundle, parameters: Flat, test: Examples) -> float:
    """The share of the examples that are classified correctly."""
    evaluator = Evaluator(bundle.header, bundle.graphs["eval"])
    sums = evaluator.evaluate(parameters, test.features, test.labels)
    return sums["correct"] / sums["examples"]
