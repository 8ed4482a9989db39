"""A plan's graph: vetting, and the estimate of the memory that a step takes.

The first byte of an input chooses the graph's role, the next what batch it is estimated for.
"""

import contextlib
import random
from collections.abc import Iterator
from typing import Any

from covey_shared.layout import layout_of
from covey_shared.plan import GraphName, TensorSpec
from covey_shared.vetting import operators, peak_bytes, step_bytes, vet
from fuzz import protobuf
from fuzz.harness import Mutate, Run, Target, expect
from fuzz.protobuf import Part
from fuzz.targets.header import small

_ROLES: tuple[GraphName, ...] = ("train", "eval", "infer")
_HEADERS = (
    small(),
    small(
        layout=layout_of({"w": ((3, 1), "parameter"), "mean": ((1,), "buffer")}),
        state=(TensorSpec(name="momentum", dtype="float32", shape=(3, 1)),),
        features=TensorSpec(name="features", dtype="float32", shape=(1, 4, 4)),
    ),
)
_WORDS = (
    *(name.encode() for name in sorted(operators.ALLOWED)),
    b"features", b"labels", b"hyper.lr", b"slot.w", b"loss", b"next.slot.w", b"predictions", b"error", b"xw",
    b"c", b"axis", b"axes", b"to", b"keepdims", b"perm", b"shape", b"value", b"start", b"end", b"dtype",
    b"kernel_shape", b"pads", b"strides", b"", b"slot.mean", b"state.momentum",
)  # fmt: skip


def _read(data: bytes) -> list[str]:
    if len(data) < 2:
        return []
    header, what = _HEADERS[data[0] // 3 % 2], _ROLES[data[0] % 3]
    graph = vet(header, data[2:], what)
    batch = (1, 7, 32, 1 << 20)[data[1] % 4]
    peak, least = peak_bytes(graph, batch), step_bytes(header, graph, batch)
    expect(0 <= peak <= least, "an estimate that is none")
    return [f"a sound {what}", *(f"uses {node.operator}" for node in graph.nodes)]


@contextlib.contextmanager
def ready() -> Iterator[Run]:
    """Nothing to make."""
    yield _read


def _mutate(data: bytes, longest: int, chance: random.Random, mutate: Mutate) -> bytes:
    if len(data) < 3 or chance.random() < 0.03:
        return mutate(data, longest)
    head = data[:2]
    if chance.random() < 0.05:
        head = bytes((chance.randrange(6), chance.randrange(4)))
    if chance.random() < 0.25 and (model := protobuf.parsed(data[2:])) is not None:
        _set_attribute(model, chance)
        made = head + protobuf.written(model)
        return made if len(made) <= longest else data
    return head + protobuf.mutated(data[2:], chance, mutate, longest - 2, _WORDS)


def _set_attribute(model: list[Part], chance: random.Random) -> None:
    """An attribute of some node, a new one or in the place of another, of a type that may be wrong for it."""
    nodes = [
        node.parts
        for graph in model
        if graph.number == 7 and graph.parts
        for node in graph.parts
        if node.number == 1 and node.parts
    ]
    if not nodes:
        return
    node = chance.choice(nodes)
    name = Part(1, 2, chance.choice(_ATTRIBUTES))
    number = chance.choice((0, 1, 2, 3, 4, 15, -1, -2, 2**31))
    fields = {
        1: [name, Part(2, 5, chance.randbytes(4)), Part(20, 0, 1)],
        2: [name, Part(3, 0, number), Part(20, 0, 2)],
        3: [name, Part(4, 2, chance.choice(_TEXTS)), Part(20, 0, 3)],
        6: [name, Part(7, 5, chance.randbytes(4)), Part(20, 0, 6)],
        7: [name, *[Part(8, 0, number)] * chance.randrange(5), Part(20, 0, 7)],
    }[chance.choice((1, 2, 3, 6, 7))]
    old = [part for part in node if part.number == 5]
    if old and chance.random() < 0.7:
        node.remove(chance.choice(old))
    node.append(Part(5, 2, b"", fields))


_ATTRIBUTES = (
    b"axis", b"axes", b"to", b"keepdims", b"perm", b"start", b"end", b"kernel_shape", b"pads", b"strides",
    b"dilations", b"auto_pad", b"group", b"num_outputs", b"allowzero", b"ceil_mode", b"batch_dims", b"transB",
    b"noop_with_empty_axes", b"output_padding", b"dtype", b"value",
)  # fmt: skip
_TEXTS = (b"", b"NOTSET", b"SAME_UPPER", b"linear", b"a", b"1")


def _seeds() -> Iterator[bytes]:
    # Only here is onnx needed: what is kept in the corpus is bytes.
    import numpy as np

    from hostile_plans import FLOAT, bytes_of, constant, infer_model, node, train_model

    def train(*extra: Any, constants: Any = ()) -> bytes:
        return bytes((0, 2)) + bytes_of(train_model(*extra, constants=constants))

    c, two = constant("c", [1, 3]), constant("d", [0, 1])
    yield train()
    yield bytes((2, 1)) + bytes_of(infer_model())
    yield train(node("Reshape", ["features", "c"]), constants=[constant("c", [-1, 3])])
    yield train(node("Expand", ["features", "c"]), constants=[c])
    yield train(node("Slice", ["features", "d", "c"]), constants=[c, two])
    yield train(node("Concat", ["features", "features"], axis=0))
    yield train(node("Gather", ["features", "d"], axis=1), constants=[two])
    yield train(node("ConstantOfShape", ["c"]), constants=[c])
    yield train(node("Pad", ["features", "c"]), constants=[constant("c", [0, 0, 1, 1])])
    yield train(node("Cast", ["features"], to=FLOAT))
    yield train(node("Range", ["c", "d", "e"], ["r"]), node("Cast", ["r"], to=FLOAT), constants=[
        constant("c", 0), constant("d", 9), constant("e", 2),
    ])  # fmt: skip
    yield train(node("Tile", ["features", "c"]), constants=[c])
    yield train(node("Shape", ["features"], ["s"]), node("Reshape", ["features", "s"]))
    yield train(node("Split", ["features"], ["h", "g"], axis=1, num_outputs=2))
    yield train(node("TopK", ["features", "c"], ["h", "i"]), constants=[constant("c", [2])])
    yield train(node("ReduceSum", ["features", "c"], keepdims=0), constants=[constant("c", [1])])
    yield train(node("Unsqueeze", ["features", "c"]), constants=[constant("c", [0])])
    yield train(node("Squeeze", ["c"], ["s"]), node("Cast", ["s"], to=FLOAT), constants=[c])
    yield train(node("Clip", ["features", "c"]), constants=[constant("c", 0.5, np.float32)])
    yield train(
        node("Shape", ["features"], ["s"]),
        node("Mul", ["s", "c"], ["m"]),
        node("Div", ["m", "d"], ["q"]),
        node("Concat", ["q", "s"], ["k"], axis=0),
        node("Gather", ["k", "d"], ["g"]),
        node("ConstantOfShape", ["g"]),
        constants=[c, constant("d", [1, 2])],
    )
    image = [constant("k", [-1, 1, 1, 3])]
    weights = constant("f", np.ones((2, 1, 1, 2)), np.float32)
    reshaped = node("Reshape", ["features", "k"], ["x"])
    yield train(
        reshaped, node("Conv", ["x", "f"], kernel_shape=[1, 2]), constants=[*image, weights]
    )
    yield train(
        reshaped, node("MaxPool", ["x"], kernel_shape=[1, 2], strides=[1, 1]), constants=image
    )
    yield train(
        reshaped,
        node("AveragePool", ["x"], kernel_shape=[1, 2], pads=[0, 0, 0, 1]),
        constants=image,
    )
    yield train(reshaped, node("Flatten", ["x"], axis=2), constants=image)
    yield train(reshaped, node("Transpose", ["x"], perm=[0, 3, 1, 2]), constants=image)
    yield train(
        node("LayerNormalization", ["features", "s"]),
        constants=[constant("s", [1, 1, 1], np.float32)],
    )
    yield train(node("Gemm", ["features", "slot.w"], transB=0))
    yield train(node("ArgMax", ["features"], ["a"], axis=1), node("Cast", ["a"], to=FLOAT))


TARGET = Target(
    "graph",
    ready,
    # An object or two for each field, of which a field takes two bytes; constants stay where they are.
    memory=lambda n: 256 * 1024 + 160 * n,
    seeds=_seeds,
    mutate=_mutate,
    words=_WORDS[:-12],
    longest=8 * 1024,
)
