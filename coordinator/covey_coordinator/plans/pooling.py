"""Rules for pooling: the backward passes, and adaptive pooling both ways.

Like all rules (see `decompositions`), each spells its operator out in operators that the exporter
knows. Planes have fixed sizes; only the batch may be symbolic.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

Tensor = Any
aten = torch.ops.aten


def _max_pool2d_backward(
    grad: Tensor,
    features: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
    indices: Tensor,
) -> Tensor:
    """Give each output's gradient to the input it was taken from.

    Of equal inputs torch takes the first, row by row. indices: flat, per plane; windows that do
    not overlap need none, and MaxPool without indices is several times faster.
    """
    plain = tuple(dilation) == (1, 1) and not ceil_mode and features.dim() == 4
    if plain and _apart(kernel, stride or kernel, padding):
        return _max_pool2d_apart_backward(grad, features, kernel)
    planes = features.shape[:-2]
    size = features.shape[-2] * features.shape[-1]
    flat = torch.zeros([*planes, size], dtype=grad.dtype)
    flat = flat.scatter_add(-1, indices.flatten(-2), grad.flatten(-2))
    return flat.reshape(features.shape)


def _max_pool2d_apart_backward(grad: Tensor, features: Tensor, kernel: Sequence[int]) -> Tensor:
    """The same for windows side by side: an equality mask in place of indices.

    Every input that equals its window's maximum gets a rank, the higher the earlier it stands;
    the highest rank of the window, found by pooling once more, is torch's choice.
    """
    height, width = (k * side for k, side in zip(kernel, grad.shape[2:], strict=True))
    window = features[:, :, :height, :width]
    largest = aten.max_pool2d_with_indices(window, list(kernel), list(kernel))[0]
    rows, columns = torch.arange(height), torch.arange(width)
    rank = (kernel[0] - rows % kernel[0]).unsqueeze(1) * kernel[1] - columns % kernel[1]
    nothing = torch.zeros(())
    ranks = torch.where(window == _spread(largest, kernel), rank.to(torch.float32), nothing)
    best = aten.max_pool2d_with_indices(ranks, list(kernel), list(kernel))[0]
    result = torch.where(ranks == _spread(best, kernel), _spread(grad, kernel), nothing)
    return _pad_to(result, features.shape[2], features.shape[3])


def _apart(kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]) -> bool:
    """Whether windows neither overlap nor leave gaps nor reach over the edge."""
    return tuple(stride) == tuple(kernel) and len(kernel) == 2 and not any(padding)


def _pad_to(planes: Tensor, height: int, width: int) -> Tensor:
    """Zeros for the elements at the far edges that no window reaches."""
    rest = [0, width - planes.shape[3], 0, height - planes.shape[2]]
    return F.pad(planes, rest) if any(rest) else planes


def _spread(pooled: Tensor, kernel: Sequence[int]) -> Tensor:
    """Repeat every element over its window."""
    sides = [side * k for side, k in zip(pooled.shape[2:], kernel, strict=True)]
    return aten.upsample_nearest2d.default(pooled, sides, float(kernel[0]), float(kernel[1]))


def _avg_pool2d(
    features: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0, 0),
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    """Average pooling; the exporter would silently ignore a divisor of one's own."""
    if not divisor_override:
        return NotImplemented  # keeps the operator as it is
    area = kernel[0] * kernel[-1]
    pooled = aten.avg_pool2d(features, kernel, stride, padding, ceil_mode, True)
    return pooled * (area / divisor_override)


def _avg_pool2d_backward(
    grad: Tensor,
    features: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool,
    count_include_pad: bool,
    divisor_override: int | None,
) -> Tensor:
    """Spread each output's gradient evenly over its window.

    Windows side by side repeat it; others take two products with 0/1 matrices.
    """
    stride = stride or kernel
    height, width = features.shape[-2:]
    if _apart(kernel, stride, padding) and not ceil_mode and features.dim() == 4:
        share = grad / (divisor_override or kernel[0] * kernel[-1])
        return _pad_to(_spread(share, kernel), height, width)
    rows = _windows(grad.shape[-2], height, kernel[0], stride[0], padding[0])
    columns = _windows(grad.shape[-1], width, kernel[-1], stride[-1], padding[-1])
    if divisor_override:
        grad = grad / divisor_override
    else:
        grad = grad / (
            _counts(rows, count_include_pad).unsqueeze(1) * _counts(columns, count_include_pad)
        )
    return _cover(rows, height).t() @ grad @ _cover(columns, width)


def _windows(
    count: int, side: int, kernel: int, stride: int, padding: int
) -> list[tuple[int, int, int]]:
    """Along one side: (first, last + 1, number of elements with padding) of each window."""
    result = []
    for index in range(count):
        start = index * stride - padding
        end = min(start + kernel, side + padding)
        result.append((max(start, 0), min(end, side), end - start))
    return result


def _counts(windows: list[tuple[int, int, int]], count_include_pad: bool) -> Tensor:
    return _constant([padded if count_include_pad else b - a for a, b, padded in windows])


def _cover(windows: list[tuple[int, int, int]], side: int) -> Tensor:
    """float32[windows, side]: 1 where the window covers the element."""
    positions = torch.arange(side).unsqueeze(0)
    first = _constant([a for a, _, _ in windows]).unsqueeze(1)
    end = _constant([b for _, b, _ in windows]).unsqueeze(1)
    return ((positions >= first) & (positions < end)).to(torch.float32)


def _adaptive_matrix(count: int, side: int) -> Tensor:
    """float32[count, side]: the averages that adaptive pooling takes along one side."""
    windows = []
    for index in range(count):
        start, end = index * side // count, -(-(index + 1) * side // count)
        windows.append((start, end, end - start))
    return _cover(windows, side) / _counts(windows, True).unsqueeze(1)


def _adaptive_avg_pool2d(features: Tensor, output_size: Sequence[int]) -> Tensor:
    """Adaptive average pooling: along each side a product with a fixed matrix."""
    height, width = features.shape[-2:]
    if tuple(output_size) == (1, 1):
        return features.mean([-2, -1], keepdim=True)
    rows = _adaptive_matrix(output_size[0], height)
    return rows @ features @ _adaptive_matrix(output_size[1], width).t()


def _adaptive_avg_pool2d_backward(grad: Tensor, features: Tensor) -> Tensor:
    height, width = features.shape[-2:]
    rows = _adaptive_matrix(grad.shape[-2], height)
    return rows.t() @ grad @ _adaptive_matrix(grad.shape[-1], width)


def _constant(values: list[int]) -> Tensor:
    """int64[n] as a graph constant. Made of scalars: a tracer cannot take up a tensor's data."""
    return torch.stack([torch.full((), value, dtype=torch.int64) for value in values])


POOLING_RULES: dict[Any, Callable[..., Any]] = {
    aten.max_pool2d_with_indices_backward.default: _max_pool2d_backward,
    aten.avg_pool2d.default: _avg_pool2d,
    aten.avg_pool2d_backward.default: _avg_pool2d_backward,
    aten._adaptive_avg_pool2d.default: _adaptive_avg_pool2d,
    aten._adaptive_avg_pool2d_backward.default: _adaptive_avg_pool2d_backward,
}
