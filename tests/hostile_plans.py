"""Small plans made by hand with the onnx package: one that is honest, and what may be put into it.

The honest one is linear regression by gradient descent: ``loss = mean((x w - y)^2)``, ``w' = w - lr g``.
"""

import hashlib

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from covey_coordinator.plans.bundle import PlanBundle
from covey_shared.layout import layout_of
from covey_shared.plan import GraphRef, Hyperparameter, PlanHeader, TensorSpec, encode_header

FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64


def node(operator, inputs, outputs=("h",), **attributes):
    """An operator's use; the last hostile one makes "h"."""
    return helper.make_node(operator, list(inputs), list(outputs), **attributes)


def constant(name, values, dtype=np.int64):
    return numpy_helper.from_array(np.asarray(values, dtype), name)


def info(name, dtype, shape):
    return helper.make_tensor_value_info(name, dtype, shape)


def train_model(*extra, constants=(), at=0):
    """The training graph. extra: nodes put in front; if one makes "h", its mean is added to the loss."""
    hostile = any("h" in made.output for made in extra)
    nodes = [
        node("MatMul", ["features", "slot.w"], ["xw"]),
        node("Sub", ["xw", "labels"], ["error"]),
        node("Mul", ["error", "error"], ["square"]),
        node("ReduceMean", ["square"], ["loss_" if hostile else "loss"], keepdims=0),
        node("Transpose", ["features"], ["xt"], perm=[1, 0]),
        node("MatMul", ["xt", "error"], ["gradient"]),
        node("Mul", ["gradient", "hyper.lr"], ["update"]),
        node("Sub", ["slot.w", "update"], ["next.slot.w"]),
    ]
    nodes[at:at] = extra
    if hostile:
        nodes += [
            node("ReduceMean", ["h"], ["mean_of_h"], keepdims=0),
            node("Add", ["loss_", "mean_of_h"], ["loss"]),
        ]
    graph = helper.make_graph(
        nodes,
        "g",
        [
            info("features", FLOAT, ["batch", 3]),
            info("labels", FLOAT, ["batch", 1]),
            info("hyper.lr", FLOAT, []),
            info("slot.w", FLOAT, [3, 1]),
        ],
        [info("loss", FLOAT, []), info("next.slot.w", FLOAT, [3, 1])],
        list(constants),
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def infer_model():
    """Predictions; what a coordinator exports at the end."""
    weight = TensorProto(
        name="slot.w", data_type=FLOAT, dims=[3, 1], data_location=TensorProto.EXTERNAL
    )
    for key, value in (("offset", "0"), ("length", "12"), ("location", "parameters.bin")):
        weight.external_data.add(key=key, value=value)
    graph = helper.make_graph(
        [node("MatMul", ["features", "slot.w"], ["predictions"])],
        "g",
        [info("features", FLOAT, ["batch", 3])],
        [info("predictions", FLOAT, ["batch", 1])],
        [weight],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def bytes_of(proto):
    return proto.SerializeToString(deterministic=True)


def ref(data):
    return GraphRef(sha256=hashlib.sha256(data).hexdigest(), size=len(data))


def bundle_of(train, name="regression"):
    """A plan of this training graph, as a coordinator has it. train: bytes, or a model."""
    data = train if isinstance(train, bytes) else bytes_of(train)
    infer = bytes_of(infer_model())
    none = GraphRef(sha256="0" * 64, size=1)
    header = PlanHeader(
        format=1,
        name=name,
        loss="mse",
        optimizer="sgd",
        opset=18,
        features=TensorSpec(name="features", dtype="float32", shape=(3,)),
        labels=TensorSpec(name="labels", dtype="float32", shape=(1,)),
        hyperparameters=(Hyperparameter(name="lr", default=0.01),),
        layout=layout_of({"w": ((3, 1), "parameter")}),
        state=(),
        metrics=("loss_sum", "examples"),
        train=ref(data),
        eval=none,
        infer=ref(infer),
        versions={},
    )
    graphs = {"train": data, "eval": b"", "infer": infer}
    return PlanBundle(header, encode_header(header), graphs, np.zeros(3, np.float32))


def examples(n=40, seed=0):
    """Features and labels that fit the plan."""
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(n, 3)).astype(np.float32)
    return features, features @ np.array([[1.0], [-2.0], [0.5]], np.float32)
