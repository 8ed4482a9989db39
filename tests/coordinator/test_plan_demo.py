"""The demo's plans, shipped compiled: what they are compiled from, and that they learn."""

from importlib.resources import files

import numpy as np
import pytest
from sklearn.datasets import load_digits

from covey_coordinator.plans.bundle import load_bundle
from covey_fleet.models import DEMO_MODELS, PLANS, compile_demo
from covey_shared.runtime import Evaluator, TrainStep


@pytest.mark.parametrize("name", DEMO_MODELS)
def test_shipped_plans_equal_a_fresh_compile(name):
    shipped, fresh = load_bundle(PLANS / name), compile_demo(name)
    assert fresh.header.versions == shipped.header.versions, "other tools: run `make plans`"
    assert fresh.header_bytes == shipped.header_bytes, "models or compiler changed: `make plans`"
    assert fresh.graphs == shipped.graphs
    np.testing.assert_array_equal(fresh.initial, shipped.initial)


def test_plans_are_package_data():
    assert {path.name for path in files("covey_fleet").joinpath("plans").iterdir()} == set(
        DEMO_MODELS
    )


@pytest.mark.parametrize("name", DEMO_MODELS)
def test_they_learn_digits(name):
    pixels, labels = load_digits(return_X_y=True)
    features = (pixels / 16).astype(np.float32).reshape(-1, 1, 8, 8)
    labels = labels.astype(np.int64)
    plan = load_bundle(PLANS / name)
    step = TrainStep(plan.header, plan.graphs["train"])
    step.load(plan.initial)
    rng = np.random.default_rng(0)
    train, held_out = np.split(rng.permutation(len(labels)), [1400])
    for _ in range(10):
        for rows in np.array_split(rng.permutation(train), 44):
            step.step(features[rows], labels[rows])
    evaluator = Evaluator(plan.header, plan.graphs["eval"])
    sums = evaluator.evaluate(step.parameters(), features[held_out], labels[held_out])
    assert sums["correct"] / sums["examples"] > 0.94
