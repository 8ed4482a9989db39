"""The runtime on a hand-written plan: linear regression by gradient descent with momentum."""

import hashlib
import os
import subprocess
import sys

import msgspec
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from covey_shared import runtime
from covey_shared.errors import DataError, LocalProtocolError, MalformedError, TrainingError
from covey_shared.layout import layout_of
from covey_shared.plan import GraphRef, Hyperparameter, PlanHeader, TensorSpec

FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64
BATCH = ["features", "labels"]


def info(name, dtype, shape):
    return helper.make_tensor_value_info(name, dtype, shape)


def model(nodes, inputs, outputs, initializers=()):
    graph = helper.make_graph(nodes, "g", inputs, outputs, list(initializers))
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(proto)
    return proto


def train_model():
    """loss = mean((x w - y)^2); v' = momentum v + 2/n x^T (x w - y); w' = w - lr v'."""
    nodes = [
        helper.make_node("MatMul", ["features", "slot.w"], ["xw"]),
        helper.make_node("Sub", ["xw", "labels"], ["error"]),
        helper.make_node("Mul", ["error", "error"], ["square"]),
        helper.make_node("ReduceMean", ["square"], ["loss"], keepdims=0),
        helper.make_node("Transpose", ["features"], ["xt"], perm=[1, 0]),
        helper.make_node("MatMul", ["xt", "error"], ["sum"]),
        helper.make_node("Shape", ["features"], ["n"], start=0, end=1),
        helper.make_node("Cast", ["n"], ["n_float"], to=FLOAT),
        helper.make_node("Div", ["sum", "n_float"], ["half"]),
        helper.make_node("Add", ["half", "half"], ["gradient"]),
        helper.make_node("Mul", ["state.v", "hyper.momentum"], ["kept"]),
        helper.make_node("Add", ["kept", "gradient"], ["next.state.v"]),
        helper.make_node("Mul", ["next.state.v", "hyper.lr"], ["update"]),
        helper.make_node("Sub", ["slot.w", "update"], ["next.slot.w"]),
    ]
    inputs = [
        info("features", FLOAT, ["batch", 3]),
        info("labels", FLOAT, ["batch", 1]),
        info("hyper.lr", FLOAT, []),
        info("hyper.momentum", FLOAT, []),
        info("slot.w", FLOAT, [3, 1]),
        info("state.v", FLOAT, [3, 1]),
    ]
    outputs = [
        info("loss", FLOAT, []),
        info("next.slot.w", FLOAT, [3, 1]),
        info("next.state.v", FLOAT, [3, 1]),
    ]
    return model(nodes, inputs, outputs)


def eval_model():
    nodes = [
        helper.make_node("MatMul", ["features", "slot.w"], ["xw"]),
        helper.make_node("Sub", ["xw", "labels"], ["error"]),
        helper.make_node("Mul", ["error", "error"], ["square"]),
        helper.make_node("ReduceSum", ["square"], ["loss_sum"], keepdims=0),
        helper.make_node("Shape", ["features"], ["n"], start=0, end=1),
        helper.make_node("Squeeze", ["n"], ["examples"]),
    ]
    inputs = [
        info("features", FLOAT, ["batch", 3]),
        info("labels", FLOAT, ["batch", 1]),
        info("slot.w", FLOAT, [3, 1]),
    ]
    return model(nodes, inputs, [info("loss_sum", FLOAT, []), info("examples", INT64, [])])


def infer_model(location="parameters.bin"):
    weight = TensorProto(
        name="slot.w", data_type=FLOAT, dims=[3, 1], data_location=TensorProto.EXTERNAL
    )
    for key, value in {"offset": "0", "length": "12", "location": location}.items():
        weight.external_data.add(key=key, value=value)
    node = helper.make_node("MatMul", ["features", "slot.w"], ["predictions"])
    graph = helper.make_graph(
        [node],
        "g",
        [info("features", FLOAT, ["batch", 3])],
        [info("predictions", FLOAT, ["batch", 1])],
        [weight],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def ref(data):
    return GraphRef(sha256=hashlib.sha256(data).hexdigest(), size=len(data))


TRAIN, EVAL, INFER = (
    proto.SerializeToString() for proto in (train_model(), eval_model(), infer_model())
)
HEADER = PlanHeader(
    format=1,
    name="regression",
    loss="mse",
    optimizer="sgd",
    opset=18,
    features=TensorSpec(name="features", dtype="float32", shape=(3,)),
    labels=TensorSpec(name="labels", dtype="float32", shape=(1,)),
    hyperparameters=(
        Hyperparameter(name="lr", default=0.1),
        Hyperparameter(name="momentum", default=0.9),
    ),
    layout=layout_of({"w": ((3, 1), "parameter")}),
    state=(TensorSpec(name="v", dtype="float32", shape=(3, 1)),),
    metrics=("loss_sum", "examples"),
    train=ref(TRAIN),
    eval=ref(EVAL),
    infer=ref(INFER),
    versions={},
)


def batches(count, size=8):
    rng = np.random.default_rng(3)
    for _ in range(count):
        x = rng.normal(size=(size, 3)).astype(np.float32)
        yield x, x @ np.array([[1.0], [-2.0], [0.5]], np.float32)


def reference(w, steps, hyper):
    """The same training in numpy, float64."""
    w, v, losses = w.astype(np.float64).reshape(3, 1), np.zeros((3, 1)), []
    for x, y in steps:
        error = x @ w - y
        losses.append(float(np.mean(error**2)))
        v = hyper["momentum"] * v + 2 * x.T @ error / len(x)
        w = w - hyper["lr"] * v
    return w.ravel(), losses


def test_steps_follow_the_reference_with_the_headers_defaults():
    start = np.array([0.1, 0.2, 0.3], np.float32)
    step = runtime.TrainStep(HEADER, TRAIN)
    step.load(start)
    losses = [step.step(x, y, {}) for x, y in batches(5)]
    expected, expected_losses = reference(start, batches(5), {"lr": 0.1, "momentum": 0.9})
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-5)
    np.testing.assert_allclose(step.parameters(), expected, rtol=1e-5)
    assert start.tolist() == np.array([0.1, 0.2, 0.3], np.float32).tolist()


def test_hyper_parameters_override_the_defaults_for_one_step_only():
    start = np.zeros(3, np.float32)
    step = runtime.TrainStep(HEADER, TRAIN)
    step.load(start)
    (first, second) = batches(2)
    step.step(*first, {"lr": 0.0})
    assert step.parameters().tolist() == [0, 0, 0]
    step.step(*second, {})
    assert np.any(step.parameters())
    with pytest.raises(LocalProtocolError, match="no hyper-parameter 'beta'"):
        step.step(*first, {"beta": 1.0})


@pytest.mark.parametrize("steps_before", [1, 2])
def test_load_starts_over_with_fresh_optimiser_state(steps_before):
    start = np.array([0.1, 0.2, 0.3], np.float32)
    step = runtime.TrainStep(HEADER, TRAIN)
    step.load(start)
    step.step(*next(batches(1)))
    fresh = step.parameters()
    step.load(start)
    for batch in batches(steps_before):
        step.step(*batch)
    step.load(start)
    step.step(*next(batches(1)))
    np.testing.assert_array_equal(step.parameters(), fresh)


def test_parameters_are_a_copy():
    step = runtime.TrainStep(HEADER, TRAIN)
    step.load(np.ones(3, np.float32))
    step.parameters()[...] = 7
    assert step.parameters().tolist() == [1, 1, 1]


@pytest.mark.parametrize("size", [1, 5, 32])
def test_batch_size_is_free(size):
    start = np.zeros(3, np.float32)
    step = runtime.TrainStep(HEADER, TRAIN)
    step.load(start)
    for x, y in batches(2, size):
        step.step(x, y)
    expected, _ = reference(start, batches(2, size), {"lr": 0.1, "momentum": 0.9})
    np.testing.assert_allclose(step.parameters(), expected, rtol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 3, 7, 100])
def test_evaluation_sums_over_the_whole_set(batch_size):
    x, y = next(batches(1, size=7))
    w = np.array([1, 0, 0], np.float32)
    sums = runtime.Evaluator(HEADER, EVAL).evaluate(w, x, y, batch_size=batch_size)
    assert sums["examples"] == 7
    assert sums["loss_sum"] == pytest.approx(float(np.sum((x[:, :1] - y) ** 2)), rel=1e-5)


def test_prediction_takes_its_parameters_from_the_flat_vector_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # no parameters.bin anywhere
    x, _ = next(batches(1))
    for w in ([1, 2, 3], [3, 2, 1]):
        flat = np.array(w, np.float32)
        predictions = runtime.Predictor(HEADER, INFER, flat).predict(x)
        np.testing.assert_allclose(predictions, x @ flat.reshape(3, 1), rtol=1e-5)


@pytest.mark.parametrize(
    ("features", "labels", "message"),
    [
        (np.zeros((4, 3)), np.zeros((4, 1), np.float32), r"features are float64\[4, 3\]"),
        (np.zeros((4, 2), np.float32), np.zeros((4, 1), np.float32), r"wants float32\[batch, 3\]"),
        (np.zeros((4, 3), np.float32), np.zeros(4, np.float32), r"labels are float32\[4\]"),
        (np.zeros((4, 3), np.float32), np.zeros((3, 1), np.float32), "4 features but 3 labels"),
        (np.zeros((0, 3), np.float32), np.zeros((0, 1), np.float32), "the batch is empty"),
        (np.float32(3), np.zeros((3, 1), np.float32), "features are"),
    ],
)
def test_a_batch_that_does_not_fit_names_the_array(features, labels, message):
    step = runtime.TrainStep(HEADER, TRAIN)
    with pytest.raises(DataError, match=message):
        step.step(features, labels, {})


def test_a_label_that_is_no_class_is_named():
    """Its gradient would be wrong without any other sign."""
    header = msgspec.structs.replace(
        HEADER,
        labels=TensorSpec(name="labels", dtype="int64", shape=()),
        classes=3,
    )
    features = np.zeros((2, 3), np.float32)
    runtime.check_batch(header, features, np.array([0, 2]))
    for labels, message in (([0, 3], "from 0 to 3"), ([-1, 2], "from -1 to 2")):
        with pytest.raises(DataError, match=f"{message}, the plan has classes 0 to 2"):
            runtime.check_batch(header, features, np.array(labels))


def rewired(change):
    proto = train_model()
    change(proto.graph)
    return proto.SerializeToString()


def rename_input(graph):
    graph.input[0].name = "feature"
    graph.node[0].input[0] = graph.node[4].input[0] = graph.node[6].input[0] = "feature"


def wrong_shape(graph):
    graph.input[4].type.tensor_type.shape.dim[0].dim_value = 4


def fixed_batch(graph):
    graph.input[0].type.tensor_type.shape.dim[0].dim_value = 8


def drop_output(graph):
    del graph.output[2]


def extra_output(graph):
    graph.output.append(info("gradient", FLOAT, [3, 1]))


@pytest.mark.parametrize(
    "graph",
    [
        b"",
        b"not a graph",
        TRAIN[:-10],
        TRAIN[:100],
        EVAL,
        INFER,
        *map(rewired, (rename_input, wrong_shape, fixed_batch, drop_output, extra_output)),
    ],
)
def test_a_graph_that_is_not_the_headers_is_malformed(graph):
    with pytest.raises(MalformedError, match=r"train\.onnx"):
        runtime.TrainStep(HEADER, graph)


def test_eval_and_infer_graphs_are_held_to_the_header_too():
    with pytest.raises(MalformedError, match=r"eval\.onnx"):
        runtime.Evaluator(HEADER, TRAIN)
    with pytest.raises(MalformedError, match=r"infer\.onnx"):
        runtime.Predictor(HEADER, EVAL, np.zeros(3, np.float32))


@pytest.mark.parametrize("vetted", [True, False])
@pytest.mark.parametrize("place", ["initializer", "constant", "fill"])
@pytest.mark.parametrize(
    "location",
    ["secret", "{here}/secret", "../secret", "sub/secret", "*/_ORT_MEM_ADDR_/*"],
)
def test_a_graph_cannot_read_files_of_the_device(tmp_path, monkeypatch, location, place, vetted):
    """Nor its memory, which onnxruntime names like a file inside itself.

    Vetting refuses each of these graphs; without it, what onnxruntime is told refuses them too.
    """
    if not vetted:
        monkeypatch.setattr(runtime, "vet", lambda *_: None)
    here = tmp_path / "here"
    (here / "sub").mkdir(parents=True)
    monkeypatch.chdir(here)
    # Large enough that onnxruntime reads it late, past its constant folding.
    size = 1 if place == "fill" else 4096
    for folder in (tmp_path, here, here / "sub"):
        (folder / "secret").write_bytes(np.ones(size, np.float32).tobytes())
    proto = infer_model()
    stolen = TensorProto(
        name="stolen", data_type=FLOAT, dims=[size], data_location=TensorProto.EXTERNAL
    )
    entries = {"location": location.format(here=here), "offset": "0", "length": str(4 * size)}
    for key, value in entries.items():
        stolen.external_data.add(key=key, value=value)
    if place == "initializer":
        proto.graph.initializer.append(stolen)
    elif place == "constant":
        proto.graph.node.append(helper.make_node("Constant", [], ["stolen"], value=stolen))
    else:
        shape = helper.make_tensor("shape", INT64, [1], [1])
        proto.graph.initializer.append(shape)
        node = helper.make_node("ConstantOfShape", ["shape"], ["stolen"], value=stolen)
        proto.graph.node.append(node)
    proto.graph.node[0].output[0] = "product"
    proto.graph.node.append(helper.make_node("Mul", ["product", "stolen"], ["predictions"]))
    proto.graph.output[0].type.tensor_type.shape.dim[1].dim_value = size
    with pytest.raises(MalformedError, match=r"infer\.onnx") as caught:
        runtime.Predictor(HEADER, proto.SerializeToString(), np.zeros(3, np.float32))
    assert ("onnxruntime" in str(caught.value)) is not vetted
    assert str(here) not in caught.value.public
    assert "secret" not in caught.value.public


def test_a_step_that_fails_leaves_the_parameters_alone():
    """An index out of range is found inside onnxruntime, in the middle of a step."""
    proto = train_model()
    index = numpy_helper.from_array(np.array([9]), "index")
    proto.graph.initializer.append(index)
    proto.graph.node.insert(0, helper.make_node("Gather", ["features", "index"], ["row"]))
    proto.graph.node.insert(1, helper.make_node("Add", ["features", "row"], ["shifted"]))
    proto.graph.node[2].input[0] = "shifted"
    step = runtime.TrainStep(HEADER, proto.SerializeToString())
    step.load(np.ones(3, np.float32))
    with pytest.raises(TrainingError, match="regression"):
        step.step(*next(batches(1, size=4)))
    assert step.parameters().tolist() == [1, 1, 1]


@pytest.mark.parametrize("setting", [None, "0"])
def test_telemetry_is_off_before_onnxruntime_is_imported(setting):
    """The setting must stand at the moment of the import; afterwards is too late."""
    program = (
        "import builtins, os, sys; real = builtins.__import__\n"
        "def spy(name, *rest):\n"
        "    if name == 'onnxruntime' and name not in sys.modules:\n"
        "        print(os.environ.get('ORT_DISABLE_TELEMETRY'))\n"
        "    return real(name, *rest)\n"
        "builtins.__import__ = spy\n"
        "import covey_shared.runtime\n"
        "print([m for m in ('torch', 'onnx', 'sklearn') if m in sys.modules])\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "ORT_DISABLE_TELEMETRY"}
    if setting is not None:
        environment["ORT_DISABLE_TELEMETRY"] = setting
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.split("\n")[:2] == ["1", "[]"]


@pytest.mark.parametrize("imported", ["covey_shared.runtime", "onnxruntime"])
def test_training_leaves_no_trace_at_home(tmp_path, imported):
    """Nothing is written outside; and the same session without our import does leave a trace."""
    (tmp_path / "eval.onnx").write_bytes(EVAL)
    home = tmp_path / "home"
    home.mkdir()
    program = (
        f"import {imported}, onnxruntime\n"
        "onnxruntime.InferenceSession('eval.onnx', providers=['CPUExecutionProvider'])\n"
    )
    quiet = {"CI", "ORT_DISABLE_TELEMETRY"}  # either would keep onnxruntime from writing by itself
    environment = {k: v for k, v in os.environ.items() if k not in quiet and k[:4] != "XDG_"}
    subprocess.run(
        [sys.executable, "-c", program],
        env=environment | {"HOME": str(home)},
        cwd=tmp_path,
        check=True,
    )
    traces = [path.name for path in home.rglob("*")]
    if imported == "onnxruntime":
        assert "deviceid" in traces, "onnxruntime has stopped doing this: drop the control"
    else:
        assert not traces
