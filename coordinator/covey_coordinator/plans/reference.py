"""The other side of the comparison: the module itself, trained in torch.

Trains a copy without dropout on batches of different sizes and with two learning rates, in float32
as a plan does, and in float64 to see how much of float32's result is rounding.
"""

import copy
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from covey_coordinator.plans.losses import Loss
from covey_coordinator.plans.trace import UNTRAINABLE, Sgd
from covey_shared.errors import CompileError

Tensor = Any

NEEDS_TWO = "more than 1 value per channel"  # how torch refuses batch norm of one example
# Some gradients are nothing but rounding (a bias in front of batch norm), and some models magnify
# it. A plan may be this many times as far from torch in float32 as that is from torch in float64.
NOISE_FACTOR = 10.0
_QUIET = 1e-6
_GENTLER = 2
_ATTEMPTS = 8
_DIVERGED = 1e4


@dataclass(frozen=True, slots=True)
class Problem:
    """What is trained: module is only copied. names: the slots to look at."""

    module: Any
    features: Tensor
    labels: Tensor
    loss: Loss
    optimizer: Sgd
    lr: float
    names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Step:
    """One step: its batch, and torch's loss and slots after it.

    noise: how far torch in float32 is from torch in float64, by slot; the loss's under "".
    """

    rows: slice
    lr: float
    loss: float
    slots: dict[str, np.ndarray[Any, Any]]
    noise: dict[str, float] = field(default_factory=dict)

    @property
    def largest(self) -> float:
        """The largest number of the step, infinite if one is no number."""
        values = [abs(self.loss), *(float(np.abs(v).max()) for v in self.slots.values())]
        return max(values) if np.isfinite(values).all() else np.inf


def reference(problem: Problem) -> tuple[list[Step], tuple[int, ...]]:
    """-> the steps, and the batch sizes that torch itself refuses for this model.

    Where training diverges or magnifies rounding, it is done again with a smaller learning rate;
    but not much smaller for rounding, which would hide errors of the update. Raises CompileError
    if it always diverges.
    """
    lr = problem.lr
    for attempt in range(_ATTEMPTS):
        steps, skipped = _train(problem, lr, exact=False)
        if max(step.largest for step in steps) < _DIVERGED:
            steps = _with_noise(steps, problem, lr)
            noise = max((value for step in steps for value in step.noise.values()), default=0.0)
            if noise <= _QUIET or attempt >= _GENTLER:
                return steps, skipped
        lr /= 10
    raise CompileError(
        f"training diverges in torch on the sample batch, even with a learning rate of {lr:.0e}: "
        "check the model's initial values and the scale of features and labels"
    )


def _with_noise(steps: list[Step], problem: Problem, lr: float) -> list[Step]:
    """The same training in float64. Not every model runs in it; then no noise is known."""
    try:
        truths, _ = _train(problem, lr, exact=True)
    except Exception:  # the model's own code
        return steps
    result = []
    for step, truth in zip(steps, truths, strict=True):
        noise = {
            name: float(np.abs(value - truth.slots[name]).max())
            for name, value in step.slots.items()
        }
        result.append(replace(step, noise={**noise, "": abs(step.loss - truth.loss)}))
    return result


def _train(problem: Problem, lr: float, *, exact: bool) -> tuple[list[Step], tuple[int, ...]]:
    """Five steps on parts of the sample, from the module's own values."""
    module = copy.deepcopy(problem.module).train()
    features, labels = problem.features, problem.labels
    if exact:
        module = module.double()
        features, labels = (t.double() if t.is_floating_point() else t for t in (features, labels))
    sgd = torch.optim.SGD(
        [parameter for parameter in module.parameters() if parameter.requires_grad],
        lr=lr,
        momentum=problem.optimizer.momentum,
        weight_decay=problem.optimizer.weight_decay,
        nesterov=problem.optimizer.nesterov,
    )
    steps, skipped = [], []
    size = len(features)
    for number, count in enumerate((size, size, 1, (size + 1) // 2, size)):
        rows = slice(0, count)
        step_lr = lr if number % 2 == 0 else lr / 2
        for group in sgd.param_groups:
            group["lr"] = step_lr
        sgd.zero_grad()
        try:
            value = problem.loss.reference(module(features[rows]), labels[rows])
        except ValueError as error:
            if count > 1 or NEEDS_TWO not in str(error):
                raise
            skipped.append(count)
            continue
        if not value.requires_grad:
            raise CompileError(UNTRAINABLE)
        value.backward()
        sgd.step()
        values = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        slots = {name: values[name].detach().numpy().copy() for name in problem.names}
        steps.append(Step(rows, step_lr, float(value.detach()), slots))
    return steps, tuple(skipped)
