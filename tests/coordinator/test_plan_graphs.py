"""What makes a plan's step fast, held as the shape of its graph: timings belong to benchmarks."""

from collections import Counter

import numpy as np
import onnx
import pytest
from torch import nn

import plan_support  # noqa: F401  quietens torch under pytest
from covey_coordinator.plans.compile import compile_plan


def train_graph(*layers, momentum=0.0, side=8):
    rng = np.random.default_rng(1)
    features = rng.normal(size=(4, 1, side, side)).astype(np.float32)
    plan = compile_plan(
        nn.Sequential(*layers),
        features,
        rng.integers(0, 3, 4),
        loss="cross_entropy",
        momentum=momentum,
        name="net",
    )
    return onnx.load_model_from_string(plan.graphs["train"]).graph


def operators(graph):
    return Counter(node.op_type for node in graph.node)


def maker(graph, name):
    [node] = [node for node in graph.node if name in node.output]
    return node


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_dense_layers_update_is_part_of_its_gradients_product(momentum):
    graph = train_graph(nn.Flatten(), nn.Linear(64, 3), momentum=momentum)
    if momentum:
        node, base = maker(graph, "next.state.momentum.1.weight"), "state.momentum.1.weight"
        expected = {"beta": momentum, "alpha": 1.0}
    else:
        node, base = maker(graph, "next.slot.1.weight"), "slot.1.weight"
        expected = {"beta": 1.0, "alpha": -1.0}
    assert node.op_type == "Gemm"
    assert node.input[2] == base
    values = {a.name: a.f for a in node.attribute if a.name in expected}
    assert values == pytest.approx(expected)


def test_without_momentum_only_the_outputs_derivative_is_scaled():
    layers = nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 3)
    graph = train_graph(*layers)
    assert sum("hyper.lr" in node.input for node in graph.node) == 1


def test_pooling_side_by_side_takes_no_indices():
    layers = nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()
    graph = train_graph(*layers, nn.Linear(32, 3))
    found = operators(graph)
    assert found["MaxPool"] == 2  # the forward pass, and torch's choice among equals
    assert all(len(node.output) == 1 for node in graph.node if node.op_type == "MaxPool")
    assert not found["ScatterElements"]
    assert maker(graph, maker_of_relu(graph).input[0]).op_type == "MaxPool"


def maker_of_relu(graph):
    [relu] = [node for node in graph.node if node.op_type == "Relu"]
    return relu


def test_the_number_of_examples_is_computed_once():
    layers = nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(72, 3)
    found = operators(train_graph(*layers))
    assert found["Shape"] == 1  # for the mean
    assert not found["Concat"]
    assert not found["Gather"]
