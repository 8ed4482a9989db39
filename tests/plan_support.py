"""Compiling small models in tests, and holding their training steps against torch's.

Compiling a whole plan takes seconds; most tests need the training graph alone.
"""

import logging

import numpy as np
import torch

from covey_coordinator.plans import lower
from covey_coordinator.plans.losses import LOSSES
from covey_coordinator.plans.trace import Model, Sgd, momentum_of, own_copy
from covey_shared.layout import layout_of
from covey_shared.plan import FORMAT, GraphRef, Hyperparameter, PlanHeader, TensorSpec
from covey_shared.runtime import TrainStep

torch.set_num_threads(1)
# pytest listens to every logger at every level; this one would render each graph for it.
logging.getLogger("torch.__trace").disabled = True

NOTHING = GraphRef(sha256="0" * 64, size=1)
DTYPES = {torch.float32: "float32", torch.int64: "int64", torch.uint8: "uint8"}
TOLERANCE = 1e-5


def spec(name, sample):
    return TensorSpec(name=name, dtype=DTYPES[sample.dtype], shape=tuple(sample.shape[1:]))


def train_step(module, features, labels, *, loss="cross_entropy", sgd=Sgd()):  # noqa: B008
    """Compile the training graph alone -> a runtime at the module's own values, and its header."""
    model = Model(own_copy(module), features)
    layout = layout_of({n: (tuple(v.shape), role) for n, (v, role) in model.slots.items()})
    graph = lower.serialise(
        lower.to_onnx(model.train_step(labels, LOSSES[loss], sgd, lower.table()))
    )
    header = PlanHeader(
        format=FORMAT,
        name="test",
        loss=loss,
        optimizer="sgd",
        opset=lower.OPSET,
        features=spec("features", features),
        labels=spec("labels", labels),
        hyperparameters=(Hyperparameter(name="lr", default=0.1),),
        layout=layout,
        state=tuple(
            TensorSpec(name=momentum_of(n), dtype="float32", shape=tuple(model.slots[n][0].shape))
            for n in (model.trainable if sgd.momentum else ())
        ),
        metrics=(),
        train=NOTHING,
        eval=NOTHING,
        infer=NOTHING,
        versions={},
    )
    step = TrainStep(header, graph)
    step.load(layout.flatten({n: v.numpy() for n, (v, _) in model.slots.items()}))
    return step, header


def agree_for_ten_steps(module, batch, *, loss="cross_entropy", sgd=Sgd(), lr=0.05):  # noqa: B008
    """Train a module in torch and its plan in onnxruntime on the same batches, and compare.

    batch(size) -> (features, labels). The loss of every step and every slot after it must agree
    to `TOLERANCE`. Returns the module, trained, and the runtime.
    """
    step, header = train_step(module, *batch(4), loss=loss, sgd=sgd)
    module.train()
    optimizer = torch.optim.SGD(
        [p for p in module.parameters() if p.requires_grad],
        lr=lr,
        momentum=sgd.momentum,
        weight_decay=sgd.weight_decay,
        nesterov=sgd.nesterov,
    )
    values = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    start = step.parameters()
    for number in range(10):
        features, labels = batch(8 if number % 2 else 5)
        optimizer.zero_grad()
        value = LOSSES[loss].reference(module(features), labels)
        value.backward()
        optimizer.step()
        ours = step.step(features.numpy(), labels.numpy(), {"lr": lr})
        assert abs(ours - float(value.detach())) <= TOLERANCE, f"loss of step {number}"
        for name, view in header.layout.views(step.parameters()).items():
            np.testing.assert_allclose(
                view, values[name].detach().numpy(), rtol=0, atol=TOLERANCE, err_msg=name
            )
    moved = header.layout.views(np.abs(step.parameters() - start))
    still = [n for n, v in moved.items() if v.max() < 20 * TOLERANCE]
    assert not still, f"nothing happened to {still}: the comparison shows nothing"
    return module, step
