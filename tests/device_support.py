"""What several device tests need: plan headers, a training step in plain numpy, a fake clock."""

import numpy as np

from covey_shared.layout import layout_of
from covey_shared.plan import GraphRef, Hyperparameter, PlanHeader, TensorSpec

_NO_GRAPH = GraphRef(sha256="0" * 64, size=1)


def make_header(
    features=("float32", (3,)),
    labels=("float32", (1,)),
    loss="mse",
    slots=None,
    name="small",
    classes=None,
) -> PlanHeader:
    """A plan header without graphs. features, labels: (dtype, shape of one example)."""
    slots = slots or {"weight": ((3, 1), "parameter"), "bias": ((1,), "parameter")}
    return PlanHeader(
        format=1,
        name=name,
        loss=loss,
        optimizer="sgd",
        opset=18,
        features=TensorSpec(name="features", dtype=features[0], shape=features[1]),
        labels=TensorSpec(name="labels", dtype=labels[0], shape=labels[1]),
        classes=classes,
        hyperparameters=(Hyperparameter(name="lr", default=0.1),),
        layout=layout_of(slots),
        state=(),
        metrics=("loss_sum", "examples"),
        train=_NO_GRAPH,
        eval=_NO_GRAPH,
        infer=_NO_GRAPH,
        versions={},
    )


IMAGES = make_header(
    ("float32", (1, 28, 28)), ("int64", ()), "cross_entropy", name="digits", classes=10
)


class LinearStep:
    """Linear regression by gradient descent: the interface of `runtime.TrainStep` in numpy."""

    def __init__(self, header: PlanHeader) -> None:
        self.header = header
        self.hypers: list[dict[str, float]] = []
        self.sizes: list[int] = []
        self.after_step = lambda: None
        self._flat = np.zeros(header.n_params, np.float32)

    def load(self, parameters):
        self._flat = parameters.copy()

    def step(self, features, labels, hyper):
        self.hypers.append(dict(hyper))
        self.sizes.append(len(labels))
        views = self.header.layout.views(self._flat)
        error = features @ views["weight"] + views["bias"] - labels
        scale = np.float32(2 * hyper["lr"] / len(labels))
        views["weight"] -= scale * (features.T @ error)
        views["bias"] -= scale * error.sum(axis=0)
        self.after_step()
        return float(np.mean(error**2))

    def parameters(self):
        return self._flat.copy()

    def interrupt(self):
        pass  # each step is over in no time


class FakeClock:
    """Seconds that pass only when told."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now
