"""The losses a plan can have, with their gradients written out.

Autograd would lower a loss to a long chain (log-softmax, gather, where, scatter, ...); each loss
here states its value and its derivative with respect to the model's output in a few operators.
The batch mean matches `torch.nn.functional` with ``reduction="mean"``.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F

from covey_shared.errors import CompileError

Tensor = Any
LossName = Literal["cross_entropy", "mse", "bce_with_logits"]


@dataclass(frozen=True, slots=True)
class Loss:
    """One loss. All functions take (outputs, labels), the batch in the first dimension.

    gradient: -> (batch mean, its derivative by the outputs). mean: -> batch mean alone.
    reference: torch's own, for verification. check: raises CompileError unless they fit.
    """

    gradient: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    mean: Callable[[Tensor, Tensor], Tensor]
    reference: Callable[[Tensor, Tensor], Tensor]
    check: Callable[[Tensor, Tensor], None]
    labels_are_classes: bool


def _minus_truth(outputs: Tensor, labels: Tensor) -> Tensor:
    """-1 at each label's class, 0 elsewhere: the sign that both the loss and its gradient want."""
    chosen = labels.unsqueeze(1) == torch.arange(outputs.shape[1])
    return torch.where(chosen, -1.0, 0.0)


def _cross_entropy(outputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    log_p = torch.log_softmax(outputs, 1)
    minus_truth = _minus_truth(outputs, labels)
    examples = labels.shape[0]
    return (log_p * minus_truth).sum() / examples, (torch.exp(log_p) + minus_truth) / examples


def _cross_entropy_mean(outputs: Tensor, labels: Tensor) -> Tensor:
    log_p = torch.log_softmax(outputs, 1)
    return (log_p * _minus_truth(outputs, labels)).sum() / labels.shape[0]


def _check_classes(outputs: Tensor, labels: Tensor) -> None:
    if outputs.dim() != 2:
        raise CompileError(
            f"cross_entropy wants outputs of shape [batch, classes], the model gives "
            f"{list(outputs.shape)}"
        )
    if labels.dtype != torch.int64 or labels.dim() != 1:
        raise CompileError(
            f"cross_entropy wants int64 labels of shape [batch], the sample has "
            f"{_described(labels)}"
        )
    classes = outputs.shape[1]
    if labels.min() < 0 or labels.max() >= classes:
        raise CompileError(
            f"cross_entropy: the sample's labels range from {int(labels.min())} to "
            f"{int(labels.max())}, but the model has {classes} outputs (classes 0 to {classes - 1})"
        )


def _mse(outputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    error = outputs - labels
    return (error * error).mean(), error * (2.0 / math.prod(outputs.shape))


def _mse_mean(outputs: Tensor, labels: Tensor) -> Tensor:
    error = outputs - labels
    return (error * error).mean()


def _bce(outputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    return _bce_mean(outputs, labels), (torch.sigmoid(outputs) - labels) / math.prod(outputs.shape)


def _bce_mean(outputs: Tensor, labels: Tensor) -> Tensor:
    return (F.softplus(outputs) - outputs * labels).mean()


def _check_same_shape(outputs: Tensor, labels: Tensor) -> None:
    if labels.dtype != torch.float32 or labels.shape != outputs.shape:
        raise CompileError(
            f"this loss wants labels like the model's outputs, {_described(outputs)}; "
            f"the sample has {_described(labels)}"
        )


def _check_probabilities(outputs: Tensor, labels: Tensor) -> None:
    _check_same_shape(outputs, labels)
    if labels.min() < 0 or labels.max() > 1:
        raise CompileError("bce_with_logits wants labels between 0 and 1")


def _described(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


LOSSES: dict[LossName, Loss] = {
    "cross_entropy": Loss(
        _cross_entropy, _cross_entropy_mean, F.cross_entropy, _check_classes, True
    ),
    "mse": Loss(_mse, _mse_mean, F.mse_loss, _check_same_shape, False),
    "bce_with_logits": Loss(
        _bce, _bce_mean, F.binary_cross_entropy_with_logits, _check_probabilities, False
    ),
}
