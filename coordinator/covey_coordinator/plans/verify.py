"""Runs a compiled plan beside torch and refuses it when they differ.

The exporter can be silently wrong, so every plan is held against its module before anything is
written: several training steps with batches of different sizes and two learning rates, then
evaluation and prediction. Dropout draws its own random numbers in onnxruntime, so a plan with
dropout is compared with its twin, compiled with every dropout left out.
"""

import copy
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from covey_coordinator.plans.reference import (
    NEEDS_TWO,
    NOISE_FACTOR,
    Problem,
    Tensor,
    reference,
)
from covey_shared.errors import CompileError, MalformedError, TrainingError
from covey_shared.layout import Flat
from covey_shared.plan import GraphName, PlanHeader
from covey_shared.runtime import Evaluator, Predictor, TrainStep
from covey_shared.vetting import vet

# A step's rounding differs between the two by a few units in the last place (6e-8 of a value of
# 1), and the next steps carry it on; a wrong rule is off by the size of the update itself.
TOLERANCE = 1e-5
UPDATE_TOLERANCE = 1e-2
UPDATE_FLOOR = 2e-6


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


def check_rules(header: PlanHeader, graphs: Mapping[GraphName, bytes]) -> None:
    """Raise CompileError if devices would refuse to run the plan (see `covey_shared.vetting`)."""
    for name, data in graphs.items():
        try:
            vet(header, data, name)
        except MalformedError as error:
            raise CompileError(
                f"devices would refuse the plan: {error}. Leave out or replace the layer that needs "
                'this; docs/plans.md has the rules, under "What a device refuses to run"'
            ) from error


def verify(
    header: PlanHeader, graphs: Mapping[GraphName, bytes], initial: Flat, problem: Problem
) -> Verification:
    """Compare a plan with its module. Raises CompileError, with figures, if they differ.

    graphs: train (without dropout), eval and infer. problem: with the same `initial` values.
    """
    with _refusing():
        return _verify(header, graphs, initial, problem)


@contextmanager
def _refusing() -> Iterator[None]:
    """A graph that onnxruntime does not take is the model's fault, not a peer's."""
    try:
        yield
    except (MalformedError, TrainingError) as error:
        raise CompileError(
            f"onnxruntime cannot run the plan: {error}; leave out or replace the layer that needs "
            "this operator"
        ) from error


def _verify(
    header: PlanHeader, graphs: Mapping[GraphName, bytes], initial: Flat, problem: Problem
) -> Verification:
    steps, skipped = reference(problem)
    runtime = TrainStep(header, graphs["train"])
    runtime.load(initial)
    x, y = problem.features.numpy(), problem.labels.numpy()
    loss_difference = parameter_difference = 0.0
    before = header.layout.views(initial)
    for number, step in enumerate(steps, 1):
        value = runtime.step(x[step.rows], y[step.rows], {"lr": step.lr})
        where = f"step {number} with {len(x[step.rows])} examples"
        allowed = max(TOLERANCE, NOISE_FACTOR * step.noise.get("", 0.0))
        loss_difference = max(
            loss_difference, _close(value, step.loss, f"loss of {where}", allowed)
        )
        flat = runtime.parameters()
        for name, view in header.layout.views(flat).items():
            moved = float(np.abs(step.slots[name] - before[name]).max())
            scale = max(1.0, float(np.abs(step.slots[name]).max()))
            allowed = min(TOLERANCE, UPDATE_TOLERANCE * moved / scale + UPDATE_FLOOR)
            allowed = max(allowed, NOISE_FACTOR * step.noise.get(name, 0.0) / scale)
            parameter_difference = max(
                parameter_difference,
                _close(view, step.slots[name], f"{name!r} after {where}", allowed),
            )
    evaluation, prediction = _check_evaluation(header, graphs, runtime.parameters(), problem)
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
    losses = []
    with _refusing():
        runtime = TrainStep(header, train)
        for _ in range(4):
            runtime.load(initial)
            losses.append(runtime.step(x, y))
    if not all(map(math.isfinite, losses)):
        raise CompileError(f"the plan's loss with dropout is not finite: {losses}")
    if len(set(losses)) == 1:
        raise CompileError("the plan draws the same dropout mask in every step; report this model")


def _check_evaluation(
    header: PlanHeader, graphs: Mapping[GraphName, bytes], parameters: Flat, problem: Problem
) -> tuple[float, float]:
    """-> the differences of evaluation and prediction, with the plan's parameters in both."""
    module = copy.deepcopy(problem.module).eval()
    features, labels, loss = problem.features, problem.labels, problem.loss
    values = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    with torch.no_grad():
        for name, view in header.layout.views(parameters).items():
            values[name].copy_(torch.from_numpy(view.copy()))
        output = module(features)
        mean = float(loss.reference(output, labels))
    allowed = max(TOLERANCE, NOISE_FACTOR * _rounding(module, features, output))
    x, y = features.numpy(), labels.numpy()
    sums = Evaluator(header, graphs["eval"]).evaluate(parameters, x, y, batch_size=len(x))
    evaluation = _close(sums["loss_sum"] / len(x), mean, "evaluation loss", allowed)
    if sums["examples"] != len(x):
        raise CompileError(f"eval.onnx counts {sums['examples']} examples of {len(x)}")
    if loss.labels_are_classes:
        correct = int((output.argmax(1) == labels).sum())
        top = output.topk(min(2, output.shape[1]), 1).values
        ties = int(((top[:, 0] - top[:, -1]) < allowed).sum())
        if abs(sums["correct"] - correct) > ties:
            raise CompileError(f"eval.onnx counts {sums['correct']} correct, torch {correct}")
    predictor = Predictor(header, graphs["infer"], parameters)
    prediction = _close(predictor.predict(x), output.numpy(), "predictions", allowed)
    try:
        with torch.no_grad():
            alone = module(features[:1]).numpy()
    except ValueError as error:
        if NEEDS_TWO not in str(error):
            raise
    else:
        single = _close(predictor.predict(x[:1]), alone, "prediction of one example", allowed)
        prediction = max(prediction, single)
    return evaluation, prediction


def _rounding(module: Any, features: Tensor, output: Tensor) -> float:
    """How far torch's output in float32 is from float64's; 0 for a model that does not run in it."""
    wide = features.double() if features.is_floating_point() else features
    try:
        with torch.no_grad():
            exact = copy.deepcopy(module).double()(wide)
    except Exception:  # the model's own code
        return 0.0
    return float((exact - output).abs().max()) / max(1.0, float(output.abs().max()))


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
