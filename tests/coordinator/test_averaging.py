"""Federated averaging: the weighted mean of differences, added to the model."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from covey_coordinator.averaging import FedAvg
from covey_shared.errors import TrainingError
from covey_shared.fixedpoint import DecodedSum

MODEL = np.array([1.0, -2.0, 0.5], np.float32)


def total(*average: float) -> DecodedSum:
    return DecodedSum(np.array(average, np.float32), examples=10.0, metrics=(0.5,))


def test_the_average_is_added():
    following = FedAvg().step(MODEL, total(0.5, 1.0, -0.5))
    assert following.tolist() == [1.5, -1.0, 0.0]
    assert following.dtype == np.float32
    assert MODEL.tolist() == [1.0, -2.0, 0.5]


def test_the_server_s_learning_rate_scales_it():
    assert FedAvg(0.5).step(MODEL, total(1.0, 1.0, 1.0)).tolist() == [1.5, -1.5, 1.0]


FLOATS = arrays.arrays(np.float32, 3, elements=st.floats(-100, 100, width=32))


@given(
    model=FLOATS, deltas=st.lists(st.tuples(FLOATS, st.integers(1, 1000)), min_size=1, max_size=8)
)
def test_it_is_mcmahan_s_weighted_average_of_models(
    model: np.ndarray, deltas: list[tuple[np.ndarray, int]]
):
    """w + sum(n_k d_k) / n is sum(n_k (w + d_k)) / n."""
    n = sum(weight for _, weight in deltas)
    mean = sum(delta.astype(np.float64) * weight for delta, weight in deltas) / n
    models = sum((model.astype(np.float64) + delta) * weight for delta, weight in deltas) / n
    following = FedAvg().step(model, DecodedSum(mean.astype(np.float32), float(n), ()))
    assert np.allclose(following, models, atol=1e-3)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3e38])
def test_a_model_that_is_not_finite_is_refused(value: float):
    model = np.array([3e38, 0.0, 0.0], np.float32)
    with pytest.raises(TrainingError, match="the averaged model is not finite: lower the learning"):
        FedAvg().step(model, total(value, 0.0, 0.0))
