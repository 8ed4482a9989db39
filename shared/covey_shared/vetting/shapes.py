"""How much memory one step of a graph takes at least, told before it runs.

The sizes of intermediate results follow from the batch, the header and the constants; each operator that
plans are mostly made of has a rule here. A value whose size cannot be told is counted as nothing, and so is
everything that follows from it alone: the estimate is a lower bound, give or take what onnxruntime saves by
working in place. It is there so that an honest plan that is too large for a device is declined with a clear
sentence, and a terabyte that stands in a graph in plain sight without running it. What is hidden from
it, the trial finds.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from covey_shared.plan import PlanHeader
from covey_shared.vetting.graph import BATCH, DTYPES, MAX_RANK, Graph, Node, Tensor

Shape = tuple[int, ...]
_Value = NDArray[np.int64]
MAX_VALUES = 64
"""Elements of a tensor that is followed by value: shapes and axes have no more."""

_WIDTHS = dict(DTYPES.values())
_BROADCAST = frozenset(
    """Add Sub Mul Div Pow Max Min Mod PRelu Where Equal Greater GreaterOrEqual Less LessOrEqual And Or Xor
    BitwiseAnd BitwiseOr BitwiseXor BitShift""".split()  # noqa: SIM905
)
_LIKE_FIRST = frozenset(
    """Abs Acos Acosh Asin Asinh Atan Atanh BatchNormalization Bernoulli BitwiseNot Cast CastLike Ceil Celu
    Clip Cos Cosh CumSum Dropout Elu Erf Exp Floor HardSigmoid HardSwish Identity InstanceNormalization
    IsInf IsNaN LayerNormalization LeakyRelu Log LogSoftmax Mish Neg Not RandomNormalLike
    RandomUniformLike Reciprocal Relu Round ScatterElements ScatterND Selu Sigmoid Sign Sin Sinh Softmax
    Softplus Sqrt Tan Tanh Trilu EyeLike""".split()  # noqa: SIM905  one a line would be a page
)  # fmt: skip


def step_bytes(header: PlanHeader, graph: Graph, batch: int) -> int:
    """Bytes that one step on `batch` examples needs at least: parameters, state, constants, intermediates.

    Counted as `runtime.TrainStep` holds them: two sets of parameters and state, the model that a round starts
    from and the difference it gives.
    """
    state = sum(math.prod(spec.shape) * _WIDTHS[spec.dtype] for spec in header.state)
    examples = sum(
        batch * math.prod(spec.shape) * _WIDTHS[spec.dtype]
        for spec in (header.features, header.labels)
    )
    constants = sum(len(t.data) for t in graph.constants.values() if t.data is not None)
    return 4 * 4 * header.n_params + 2 * state + examples + constants + peak_bytes(graph, batch)


def peak_bytes(graph: Graph, batch: int) -> int:
    """Most bytes of intermediate results at any moment of a step, as far as their sizes can be told."""
    known = _Known(graph, batch)
    last: dict[str, int] = {}
    for position, node in enumerate(graph.nodes):
        last.update(dict.fromkeys(node.inputs, position))
    bound = set(graph.inputs) | set(graph.outputs) | set(graph.constants)
    live: dict[str, int] = {}
    peak = now = 0
    for position, node in enumerate(graph.nodes):
        known.infer(node)
        made = {n: known.size(n) for n in node.outputs if n and n not in bound}
        ends = {n for n in (*node.inputs, *made) if n in live or n in made}
        ends = {n for n in ends if last.get(n, -1) <= position}
        # An elementwise operator writes over an input that is not needed any more, if it fits.
        reused = 0
        if node.operator in _BROADCAST or node.operator in _LIKE_FIRST:
            sizes = {live[n] for n in ends if n in live}
            reused = max((size for size in made.values() if size in sizes), default=0)
        live |= made
        now += sum(made.values())
        peak = max(peak, now - reused)
        for name in ends:
            now -= live.pop(name)
    return peak


class _Known:
    """Shapes and small integer values, as far as they are known."""

    def __init__(self, graph: Graph, batch: int) -> None:
        self.shapes: dict[str, Shape] = {}
        self._types = graph.types
        self.values: dict[str, _Value] = {}
        for name, (_, shape) in graph.inputs.items():
            if shape is not None:
                self.shapes[name] = tuple(batch if side == BATCH else side for side in shape)
        for name, tensor in graph.constants.items():
            self.shapes[name] = tensor.shape
            value = _small(tensor)
            if value is not None:
                self.values[name] = value

    def size(self, name: str) -> int:
        """Bytes of a value; 0 if its shape is not known."""
        shape = self.shapes.get(name)
        return 0 if shape is None else math.prod(shape) * _WIDTHS[self._types[name]]

    def infer(self, node: Node) -> None:
        """Learn what can be told of the node's outputs."""
        try:
            shapes = self._shapes(node)
            for name, shape in zip(node.outputs, shapes, strict=False):
                if not name or shape is None or len(shape) > MAX_RANK:
                    continue
                if all(0 <= side < 1 << 62 for side in shape):
                    self.shapes[name] = tuple(shape)
            if len(node.outputs) == 1:
                self._follow(node)
        except (LookupError, ValueError, TypeError, ArithmeticError):
            pass  # it does not fit together, or stands on something unknown: onnxruntime will tell

    def _shapes(self, node: Node) -> Sequence[Shape | None]:
        operator = node.operator
        if operator in _BROADCAST:
            return [_broadcast(*(self.shapes[name] for name in node.inputs))]
        if operator in _LIKE_FIRST:
            shape = self.shapes[node.inputs[0]]
            if operator == "LayerNormalization":  # and its mean and deviation
                axis = node.attributes.get("axis", -1) % len(shape)
                return [shape, *[(*shape[:axis], *[1] * (len(shape) - axis))] * 2]
            return [shape] * (len(node.outputs) if operator == "Dropout" else 1)
        if operator.startswith("Reduce"):
            return [self._reduced(node)]
        rule = _RULES.get(operator)
        return [] if rule is None else rule(self, node)

    def value(self, node: Node, position: int) -> list[int]:
        """The integers in an input. LookupError if they are not known."""
        return [int(number) for number in self.values[node.inputs[position]].ravel()]

    def axes(self, node: Node, position: int, rank: int) -> set[int] | None:
        """The axes that an input names; None if it is left out."""
        if position >= len(node.inputs) or not node.inputs[position]:
            return None
        return {axis % rank for axis in self.value(node, position)}

    def _reduced(self, node: Node) -> Shape:
        shape = self.shapes[node.inputs[0]]
        axes = self.axes(node, 1, len(shape)) if len(shape) else set()
        if axes is None:
            axes = set() if node.attributes.get("noop_with_empty_axes") else set(range(len(shape)))
        if node.attributes.get("keepdims", 1):
            return tuple(1 if i in axes else side for i, side in enumerate(shape))
        return tuple(side for i, side in enumerate(shape) if i not in axes)

    def _follow(self, node: Node) -> None:
        """Keep the value, if it is a few integers made from known ones: shapes in the making."""
        name, shape = node.outputs[0], self.shapes.get(node.outputs[0])
        if shape is None or math.prod(shape) > MAX_VALUES:
            return
        if node.operator == "Shape":
            self.values[name] = np.array(_sliced_shape(self, node), np.int64)
            return
        rule = _ARITHMETIC.get(node.operator)
        if rule is None or any(n and n not in self.values for n in node.inputs):
            return
        with np.errstate(all="ignore"):
            value = rule([self.values[n] for n in node.inputs if n], node)
        self.values[name] = np.asarray(value, np.int64).reshape(shape)


def _small(tensor: Tensor) -> _Value | None:
    if tensor.data is None or math.prod(tensor.shape) > MAX_VALUES:
        return None
    value = np.frombuffer(tensor.data, tensor.dtype).reshape(tensor.shape)
    if tensor.dtype.startswith("float") and not (np.abs(value) < 1 << 52).all():
        return None
    # Scales of Resize are floats; those that plans have are whole.
    return value.astype(np.int64) if (value == np.trunc(value)).all() else None


# --- rules: shapes of the outputs, in their order --------------------------------------------------

_Rule = Callable[[_Known, Node], Sequence[Shape | None]]


def _sliced_shape(known: _Known, node: Node) -> Shape:
    shape = known.shapes[node.inputs[0]]
    return shape[node.attributes.get("start", 0) : node.attributes.get("end", len(shape))]


def _broadcast(*shapes: Shape) -> Shape:
    rank = max(map(len, shapes), default=0)
    result = [1] * rank
    for shape in shapes:
        for i, side in enumerate(shape, rank - len(shape)):
            if side != 1:
                if result[i] not in (1, side):
                    raise ValueError("not to be broadcast")
                result[i] = side
    return tuple(result)


def _matmul(known: _Known, node: Node) -> list[Shape | None]:
    a, b = (known.shapes[name] for name in node.inputs)
    left, right = (1, *a) if len(a) == 1 else a, (*b, 1) if len(b) == 1 else b
    shape = (*_broadcast(left[:-2], right[:-2]), left[-2], right[-1])
    if len(a) == 1:
        shape = (*shape[:-2], shape[-1])
    return [shape[:-1] if len(b) == 1 else shape]


def _gemm(known: _Known, node: Node) -> list[Shape | None]:
    a, b = known.shapes[node.inputs[0]], known.shapes[node.inputs[1]]
    rows = a[1] if node.attributes.get("transA") else a[0]
    return [(rows, b[0] if node.attributes.get("transB") else b[1])]


def _window(known: _Known, node: Node) -> tuple[Shape, list[int], list[int], list[int], list[int]]:
    """-> shape of the input, kernel, strides, dilations, padding of both sides together."""
    shape = known.shapes[node.inputs[0]]
    n, given = len(shape) - 2, node.attributes
    kernel = given.get("kernel_shape") or list(known.shapes[node.inputs[1]][2:])
    pads = given.get("pads") or [0] * (2 * n)
    if given.get("auto_pad", "NOTSET") != "NOTSET":
        raise ValueError("not followed")
    both = [pads[i] + pads[n + i] for i in range(n)]
    return shape, kernel, given.get("strides") or [1] * n, given.get("dilations") or [1] * n, both


def _conv(known: _Known, node: Node) -> list[Shape | None]:
    shape, kernel, strides, dilations, pads = _window(known, node)
    channels = shape[1] if node.operator.endswith("Pool") else known.shapes[node.inputs[1]][0]
    round_up = node.attributes.get("ceil_mode", 0)
    sides = [
        (side + pad - dilation * (k - 1) - 1 + (stride - 1 if round_up else 0)) // stride + 1
        for side, k, stride, dilation, pad in zip(
            shape[2:], kernel, strides, dilations, pads, strict=True
        )
    ]
    return [(shape[0], channels, *sides)] * len(node.outputs)


def _conv_transpose(known: _Known, node: Node) -> list[Shape | None]:
    shape, kernel, strides, dilations, pads = _window(known, node)
    extra = node.attributes.get("output_padding") or [0] * len(kernel)
    sides = [
        stride * (side - 1) + more + (k - 1) * dilation + 1 - pad
        for side, k, stride, dilation, pad, more in zip(
            shape[2:], kernel, strides, dilations, pads, extra, strict=True
        )
    ]
    groups = node.attributes.get("group", 1)
    return [(shape[0], known.shapes[node.inputs[1]][1] * groups, *sides)]


def _transpose(known: _Known, node: Node) -> list[Shape | None]:
    shape = known.shapes[node.inputs[0]]
    return [tuple(shape[i] for i in node.attributes.get("perm") or range(len(shape))[::-1])]


def _reshape(known: _Known, node: Node) -> list[Shape | None]:
    shape, target = known.shapes[node.inputs[0]], known.value(node, 1)
    if not node.attributes.get("allowzero"):
        target = [shape[i] if side == 0 else side for i, side in enumerate(target)]
    rest = math.prod(side for side in target if side != -1)
    return [tuple(math.prod(shape) // rest if side == -1 else side for side in target)]


def _expand(known: _Known, node: Node) -> list[Shape | None]:
    return [_broadcast(known.shapes[node.inputs[0]], tuple(known.value(node, 1)))]


def _concat(known: _Known, node: Node) -> list[Shape | None]:
    shapes = [known.shapes[name] for name in node.inputs]
    axis = node.attributes["axis"] % len(shapes[0])
    total = sum(shape[axis] for shape in shapes)
    return [(*shapes[0][:axis], total, *shapes[0][axis + 1 :])]


def _slice(known: _Known, node: Node) -> list[Shape | None]:
    sides = list(known.shapes[node.inputs[0]])
    starts, ends = known.value(node, 1), known.value(node, 2)
    given = [
        known.value(node, i) if i < len(node.inputs) and node.inputs[i] else [] for i in (3, 4)
    ]
    axes, steps = given[0] or list(range(len(starts))), given[1] or [1] * len(starts)
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        stop = None if step < 0 and end < -sides[axis] else end
        sides[axis] = len(range(*slice(start, stop, step).indices(sides[axis])))
    return [tuple(sides)]


def _gather(known: _Known, node: Node) -> list[Shape | None]:
    shape, indices = (known.shapes[name] for name in node.inputs)
    axis = node.attributes.get("axis", 0) % len(shape)
    return [(*shape[:axis], *indices, *shape[axis + 1 :])]


def _gather_nd(known: _Known, node: Node) -> list[Shape | None]:
    shape, indices = (known.shapes[name] for name in node.inputs)
    return [(*indices[:-1], *shape[node.attributes.get("batch_dims", 0) + indices[-1] :])]


def _squeeze(known: _Known, node: Node) -> list[Shape | None]:
    shape = known.shapes[node.inputs[0]]
    axes = known.axes(node, 1, len(shape))
    return [tuple(s for i, s in enumerate(shape) if (s != 1 if axes is None else i not in axes))]


def _unsqueeze(known: _Known, node: Node) -> list[Shape | None]:
    shape, given = list(known.shapes[node.inputs[0]]), known.value(node, 1)
    rank = len(shape) + len(given)
    for axis in sorted(axis % rank for axis in given):
        shape.insert(axis, 1)
    return [tuple(shape)]


def _pad(known: _Known, node: Node) -> list[Shape | None]:
    shape = list(known.shapes[node.inputs[0]])
    pads = known.value(node, 1)
    chosen = known.value(node, 3) if len(node.inputs) > 3 and node.inputs[3] else range(len(shape))
    for i, axis in enumerate(chosen):
        shape[axis] += pads[i] + pads[i + len(pads) // 2]
    return [tuple(shape)]


def _resize(known: _Known, node: Node) -> list[Shape | None]:
    shape = known.shapes[node.inputs[0]]
    if len(node.inputs) > 3 and node.inputs[3]:
        return [tuple(known.value(node, 3))]
    return [tuple(a * b for a, b in zip(shape, known.value(node, 2), strict=True))]


def _tile(known: _Known, node: Node) -> list[Shape | None]:
    shape = known.shapes[node.inputs[0]]
    return [tuple(a * b for a, b in zip(shape, known.value(node, 1), strict=True))]


def _range(known: _Known, node: Node) -> list[Shape | None]:
    start, limit, step = (known.value(node, i)[0] for i in range(3))
    return [(len(range(start, limit, step)),)]


def _split(known: _Known, node: Node) -> list[Shape | None]:
    shape = known.shapes[node.inputs[0]]
    axis, n = node.attributes.get("axis", 0) % len(shape), len(node.outputs)
    each = -(-shape[axis] // n)
    parts = [min(each, shape[axis] - i * each) for i in range(n)]
    if len(node.inputs) > 1 and node.inputs[1]:
        parts = known.value(node, 1)
    return [(*shape[:axis], part, *shape[axis + 1 :]) for part in parts]


def _arg(known: _Known, node: Node) -> list[Shape | None]:
    shape = list(known.shapes[node.inputs[0]])
    axis = node.attributes.get("axis", 0) % len(shape)
    shape[axis : axis + 1] = [1] if node.attributes.get("keepdims", 1) else []
    return [tuple(shape)]


def _flatten(known: _Known, node: Node) -> list[Shape | None]:
    shape = known.shapes[node.inputs[0]]
    axis = node.attributes.get("axis", 1)
    return [(math.prod(shape[:axis]), math.prod(shape[axis:]))]


def _topk(known: _Known, node: Node) -> list[Shape | None]:
    shape = list(known.shapes[node.inputs[0]])
    shape[node.attributes.get("axis", -1)] = known.value(node, 1)[0]
    return [tuple(shape)] * 2


_RULES: Mapping[str, _Rule] = {
    "ArgMax": _arg,
    "ArgMin": _arg,
    "AveragePool": _conv,
    "Concat": _concat,
    "ConstantOfShape": lambda known, node: [tuple(known.value(node, 0))],
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "Expand": _expand,
    "Flatten": _flatten,
    "Gather": _gather,
    "GatherElements": lambda known, node: [known.shapes[node.inputs[1]]],
    "GatherND": _gather_nd,
    "Gemm": _gemm,
    "MatMul": _matmul,
    "MaxPool": _conv,
    "Pad": _pad,
    "Range": _range,
    "Reshape": _reshape,
    "Resize": _resize,
    "Shape": lambda known, node: [(len(_sliced_shape(known, node)),)],
    "Size": lambda known, node: [()],
    "Slice": _slice,
    "Split": _split,
    "Squeeze": _squeeze,
    "Tile": _tile,
    "TopK": _topk,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
}


def _sliced(values: list[_Value], node: Node) -> _Value:
    value, starts, ends, *rest = values
    axes, steps = [*rest, np.arange(len(starts)), np.ones(len(starts), np.int64)][:2]
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        chosen = [slice(None)] * value.ndim
        chosen[axis] = slice(start, end, step)
        value = value[tuple(chosen)]
    return value


_ARITHMETIC: Mapping[str, Callable[[list[_Value], Node], Any]] = {
    "Add": lambda v, node: v[0] + v[1],
    "Cast": lambda v, node: v[0],
    "Concat": lambda v, node: np.concatenate(v),
    "Div": lambda v, node: v[0] // v[1],
    "Gather": lambda v, node: np.take(v[0], v[1], node.attributes.get("axis", 0)),
    "Identity": lambda v, node: v[0],
    "Mul": lambda v, node: v[0] * v[1],
    "Reshape": lambda v, node: v[0],
    "Slice": _sliced,
    "Squeeze": lambda v, node: v[0],
    "Sub": lambda v, node: v[0] - v[1],
    "Unsqueeze": lambda v, node: v[0],
}
