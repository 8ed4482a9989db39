"""Rules for the operators that torch's ONNX exporter does not translate, or translates wrongly.

A rule has its operator's signature and spells it out in operators that the exporter knows. Rules
apply below autograd, to the forward and the backward pass alike. The batch dimension, the first,
may be symbolic; all others are numbers.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from covey_coordinator.plans.pooling import POOLING_RULES

Tensor = Any
aten = torch.ops.aten


def _convolution_backward(
    grad: Tensor,
    features: Tensor,
    weight: Tensor,
    bias_sizes: Sequence[int] | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    output_mask: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of a convolution by its input, weight and bias.

    A transposed convolution is the input gradient of a plain one, so the two change places.
    """
    spatial = range(2, features.dim())
    by_features = by_weight = by_bias = None
    if output_mask[0] and transposed:
        by_features = aten.convolution(
            grad, weight, None, stride, padding, dilation, False, [0 for _ in spatial], groups
        )
    elif output_mask[0]:
        # What the strides of the forward pass dropped at the far edge.
        rest = [
            features.shape[d]
            - (grad.shape[d] - 1) * stride[i]
            + 2 * padding[i]
            - dilation[i] * (weight.shape[d] - 1)
            - 1
            for i, d in enumerate(spatial)
        ]
        by_features = aten.convolution(
            grad, weight, None, stride, padding, dilation, True, rest, groups
        )
    if output_mask[1]:
        inner, outer = (grad, features) if transposed else (features, grad)
        by_weight = _weight_gradient(inner, outer, weight, stride, padding, dilation, groups)
    if output_mask[2]:
        by_bias = grad.sum([0, *spatial])
    return by_features, by_weight, by_bias


def _weight_gradient(
    features: Tensor,
    grad: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """Correlate input and output gradient over the batch: itself a convolution.

    Batch and channels change places, stride and dilation too. With groups, the batch of every
    group becomes a block of channels: (N, G*C, ...) -> (C, G*N, ...).
    """
    spatial = range(2, features.dim())
    batch, channels = features.shape[0], features.shape[1] // groups
    if groups == 1:
        turned = features.transpose(0, 1)
    else:
        sides = features.shape[2:]
        turned = features.reshape(batch, groups, channels, *sides)
        turned = turned.permute(2, 1, 0, *(d + 1 for d in spatial))
        turned = turned.reshape(channels, groups * batch, *sides)
    result = aten.convolution(
        turned,
        grad.transpose(0, 1),
        None,
        dilation,
        padding,
        stride,
        False,
        [0 for _ in spatial],
        groups,
    )
    for d in spatial:
        if result.shape[d] != weight.shape[d]:
            result = result.narrow(d, 0, weight.shape[d])
    return result.transpose(0, 1)


def _batch_norm_functional(
    features: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    training: bool,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Batch normalisation -> (output, mean, 1 / deviation, next running mean, next variance).

    The exporter would silently normalise by the running statistics. In a batch of one example
    and one pixel torch refuses; here its variance is 0, not the NaN of 0/0.
    """
    if not training:
        keep = _per_channel(features.dim())
        mean, var = running_mean.reshape(keep), running_var.reshape(keep)
        output, invstd = _normalised(features - mean, var, weight, bias, eps)
        return output, mean.reshape(-1), invstd, running_mean, running_var
    output, mean, invstd, var = _batch_norm(features, weight, bias, eps)
    count = features.shape[0] * math.prod(features.shape[2:])
    unbiased = var * (count / torch.sym_max(count - 1, 1))
    return (
        output,
        mean,
        invstd,
        running_mean * (1 - momentum) + mean * momentum,
        running_var * (1 - momentum) + unbiased * momentum,
    )


def _batch_norm_no_stats(
    features: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Batch normalisation without running statistics -> (output, mean, 1 / deviation)."""
    return _batch_norm(features, weight, bias, eps)[:3]


def _batch_norm(
    features: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """By the batch's own statistics -> (output, mean, 1 / deviation, variance), per channel."""
    dims = [0, *range(2, features.dim())]
    mean = features.mean(dims, keepdim=True)
    centred = features - mean
    var = (centred * centred).mean(dims, keepdim=True)
    output, invstd = _normalised(centred, var, weight, bias, eps)
    return output, mean.reshape(-1), invstd, var.reshape(-1)


def _normalised(
    centred: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    invstd = torch.rsqrt(var + eps)
    keep = _per_channel(centred.dim())
    output = centred * (invstd if weight is None else invstd * weight.reshape(keep))
    if bias is not None:
        output = output + bias.reshape(keep)
    return output, invstd.reshape(-1)


def _per_channel(dims: int) -> list[int]:
    return [1, -1, *([1] * (dims - 2))]


def _native_dropout(features: Tensor, p: float, train: bool | None) -> tuple[Tensor, Tensor]:
    """Drop each element with probability p, afresh in every run -> (output, what was kept)."""
    if train is False or p == 0:
        return features, torch.ones_like(features, dtype=torch.bool)
    if p == 1:
        return features * 0, torch.zeros_like(features, dtype=torch.bool)
    kept = torch.rand_like(features) >= p
    return features * (kept * (1 / (1 - p))), kept


def _empty_permuted(size: Sequence[int], physical_layout: Sequence[int], **options: Any) -> Tensor:
    """Memory that is overwritten whole; zeros, since ONNX has no uninitialised tensor."""
    return torch.zeros(size, dtype=options.get("dtype") or torch.float32)


RULES: dict[Any, Callable[..., Any]] = {
    **POOLING_RULES,
    aten.convolution_backward.default: _convolution_backward,
    aten._native_batch_norm_legit_functional.default: _batch_norm_functional,
    aten._native_batch_norm_legit.no_stats: _batch_norm_no_stats,
    aten.native_dropout.default: _native_dropout,
    aten.empty_permuted.default: _empty_permuted,
}
