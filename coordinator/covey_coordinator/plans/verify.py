"""Runs a compiled plan beside torch and refuses it when they differ.

The exporter can be silently wrong, so every plan is held against its module before anything is
written: several training steps with batches of different sizes and two learning rates, then
evaluation and prediction. Dropout draws its own random numbers in onnxruntime, so a plan with
dropout is compared with its twin, compiled with every dropout left out.
"""

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from covey_coordinator.plans.dropout import without_dropout
from covey_coordinator.plans.losses import Loss
from covey_coordinator.plans.trace import UNTRAINABLE, Sgd
from covey_shared.errors import CompileError
from covey_shared.layout import Flat
from covey_shared.plan import GraphName, PlanHeader
from covey_shared.runtime import Evaluator, Predictor, TrainStep

Tensor = Any

# A step's rounding differs between the two by a few units in the last place (6e-8 of a value of
# 1), and the next steps carry it on; a wrong rule is off by the size of the update itself.
TOLERANCE = 1e-5
UPDATE_TOLERANCE = 1e-2
UPDATE_FLOOR = 2e-6
_DIVERGED = 1e4
_NEEDS_TWO = "more than 1 value per channel"  # how torch refuses batch norm of one example


@dataclass(frozen=True, slots=True)
class Verification:
    """What was compared. Differences are absolute, on values scaled to at most 1.

    skipped: batch sizes that torch itself refuses for this model.
    """

    steps: int
    batch_sizes: tuple[int, ...]
    skipped: tuple[int, ...]
    loss_difference: float
    parameter_difference: float
    evaluation_difference: float
    prediction_difference: float


@dataclass(frozen=True, slots=True)
class _Step:
    """One step of the reference: its batch, and torch's loss and slots after it."""

    rows: slice
    lr: float
    loss: float
    slots: dict[str, np.ndarray[Any, np.dtype[np.float32]]]


def verify(
    header: PlanHeader,
    graphs: Mapping[GraphName, bytes],
    initial: Flat,
    module: Any,
    features: Tensor,
    labels: Tensor,
    loss: Loss,
    optimizer: Sgd,
    lr: float,
) -> Verification:
    """Compare a plan with its module. Raises CompileError, with figures, if they differ.

    graphs: train (without dropout), eval and infer. module: its values must be `initial`'s.
    """
    reference = without_dropout(module)
    steps, skipped = _reference(reference, header, features, labels, loss, optimizer, lr)
    runtime = TrainStep(header, graphs["train"])
    runtime.load(initial)
    x, y = features.numpy(), labels.numpy()
    loss_difference = parameter_difference = 0.0
    before = header.layout.views(initial)
    for number, step in enumerate(steps, 1):
        value = runtime.step(x[step.rows], y[step.rows], {"lr": step.lr})
        where = f"step {number} with {len(x[step.rows])} examples"
        loss_difference = max(
            loss_difference, _close(value, step.loss, f"loss of {where}", TOLERANCE)
        )
        flat = runtime.parameters()
        for name, view in header.layout.views(flat).items():
            moved = float(np.abs(step.slots[name] - before[name]).max())
            scale = max(1.0, float(np.abs(step.slots[name]).max()))
            allowed = min(TOLERANCE, UPDATE_TOLERANCE * moved / scale + UPDATE_FLOOR)
            parameter_difference = max(
                parameter_difference,
                _close(view, step.slots[name], f"{name!r} after {where}", allowed),
            )
    evaluation, prediction = _check_evaluation(
        header, graphs, runtime.parameters(), reference, features, labels, loss
    )
    return Verification(
        steps=len(steps),
        batch_sizes=tuple(dict.fromkeys(len(x[step.rows]) for step in steps)),
        skipped=skipped,
        loss_difference=loss_difference,
        parameter_difference=parameter_difference,
        evaluation_difference=evaluation,
        prediction_difference=prediction,
    )


def check_randomness(header: PlanHeader, train: bytes, initial: Flat, x: Any, y: Any) -> None:
    """A plan with dropout draws afresh in every step, and its loss is finite."""
    runtime = TrainStep(header, train)
    losses = []
    for _ in range(4):
        runtime.load(initial)
        losses.append(runtime.step(x, y))
    if not all(map(math.isfinite, losses)):
        raise CompileError(f"the plan's loss with dropout is not finite: {losses}")
    if len(set(losses)) == 1:
        raise CompileError("the plan draws the same dropout mask in every step; report this model")


def _check_evaluation(
    header: PlanHeader,
    graphs: Mapping[GraphName, bytes],
    parameters: Flat,
    reference: Any,
    features: Tensor,
    labels: Tensor,
    loss: Loss,
) -> tuple[float, float]:
    """-> the differences of evaluation and prediction, with the plan's parameters in both."""
    values = {**dict(reference.named_parameters()), **dict(reference.named_buffers())}
    with torch.no_grad():
        for name, view in header.layout.views(parameters).items():
            values[name].copy_(torch.from_numpy(view.copy()))
        output = reference.eval()(features)
        mean = float(loss.reference(output, labels))
    x, y = features.numpy(), labels.numpy()
    sums = Evaluator(header, graphs["eval"]).evaluate(parameters, x, y, batch_size=len(x))
    evaluation = _close(sums["loss_sum"] / len(x), mean, "evaluation loss", TOLERANCE)
    if sums["examples"] != len(x):
        raise CompileError(f"eval.onnx counts {sums['examples']} examples of {len(x)}")
    if loss.labels_are_classes:
        correct = int((output.argmax(1) == labels).sum())
        top = output.topk(min(2, output.shape[1]), 1).values
        ties = int(((top[:, 0] - top[:, -1]) < TOLERANCE).sum())
        if abs(sums["correct"] - correct) > ties:
            raise CompileError(f"eval.onnx counts {sums['correct']} correct, torch {correct}")
    predictor = Predictor(header, graphs["infer"], parameters)
    prediction = _close(predictor.predict(x), output.numpy(), "predictions", TOLERANCE)
    try:
        with torch.no_grad():
            alone = reference(features[:1]).numpy()
    except ValueError as error:
        if _NEEDS_TWO not in str(error):
            raise
    else:
        single = _close(predictor.predict(x[:1]), alone, "prediction of one example", TOLERANCE)
        prediction = max(prediction, single)
    return evaluation, prediction


def _close(value: Any, expected: Any, what: str, allowed: float) -> float:
    """The largest difference, on values scaled to at most 1; CompileError above `allowed`."""
    value, expected = np.asarray(value, np.float64), np.asarray(expected, np.float64)
    if value.shape != expected.shape:
        raise CompileError(
            f"the plan's {what} has shape {list(value.shape)}, torch's {list(expected.shape)}"
        )
    scale = max(1.0, float(np.abs(expected).max(initial=0.0)))
    difference = float(np.abs(value - expected).max(initial=0.0)) / scale
    if not difference <= allowed:
        raise CompileError(
            f"the plan differs from torch: {what} by {difference:.1e} (at most {allowed:.1e}); "
            "nothing was written. Either the model does what a plan cannot carry over (an "
            "autograd.Function of its own, a counter that changes its output), or an operator is "
            "translated wrongly: find the layer by leaving others out, and report it"
        )
    return difference


def _reference(
    module: Any,
    header: PlanHeader,
    features: Tensor,
    labels: Tensor,
    loss: Loss,
    optimizer: Sgd,
    lr: float,
) -> tuple[list[_Step], tuple[int, ...]]:
    """Train the module in torch; if that diverges, more gently."""
    start = copy.deepcopy(module.state_dict())
    for _ in range(8):
        module.load_state_dict(start)
        steps, skipped = _train(module, header, features, labels, loss, optimizer, lr)
        largest = max(float(np.abs(v).max()) for s in steps for v in s.slots.values())
        if all(abs(step.loss) < _DIVERGED for step in steps) and largest < _DIVERGED:
            return steps, skipped
        lr /= 10
    raise CompileError(
        f"training diverges in torch on the sample batch, even with a learning rate of {lr:.0e}: "
        "check the model's initial values and the scale of features and labels"
    )


def _train(
    module: Any,
    header: PlanHeader,
    features: Tensor,
    labels: Tensor,
    loss: Loss,
    optimizer: Sgd,
    lr: float,
) -> tuple[list[_Step], tuple[int, ...]]:
    module.train()
    sgd = torch.optim.SGD(
        [parameter for parameter in module.parameters() if parameter.requires_grad],
        lr=lr,
        momentum=optimizer.momentum,
        weight_decay=optimizer.weight_decay,
        nesterov=optimizer.nesterov,
    )
    names = [slot.name for slot in header.layout.slots]
    steps, skipped = [], []
    size = len(features)
    for number, count in enumerate((size, size, 1, (size + 1) // 2, size)):
        rows = slice(0, count)
        step_lr = lr if number % 2 == 0 else lr / 2
        for group in sgd.param_groups:
            group["lr"] = step_lr
        sgd.zero_grad()
        try:
            value = loss.reference(module(features[rows]), labels[rows])
        except ValueError as error:
            if count > 1 or _NEEDS_TWO not in str(error):
                raise
            skipped.append(count)
            continue
        if not value.requires_grad:
            raise CompileError(UNTRAINABLE)
        value.backward()
        sgd.step()
        values = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        slots = {name: values[name].detach().numpy().copy() for name in names}
        steps.append(_Step(rows, step_lr, float(value.detach()), slots))
    return steps, tuple(skipped)
