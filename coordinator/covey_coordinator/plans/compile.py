"""torch module -> plan.

`compile_plan` is the whole way: check the sample, trace, lower, lay out, verify against torch.
Nothing is returned unless the plan's own bytes agreed with torch. Files are `bundle`'s.
"""

import hashlib
import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnxscript
import torch

from covey_coordinator.plans import diagnose, lower, verify
from covey_coordinator.plans.bundle import PlanBundle
from covey_coordinator.plans.dropout import refuse_recurrent_dropout, without_dropout
from covey_coordinator.plans.losses import LOSSES, Loss, LossName
from covey_coordinator.plans.reference import Problem
from covey_coordinator.plans.trace import Model, Sgd, momentum_of, own_copy, tracing
from covey_shared.errors import CompileError, MalformedError
from covey_shared.layout import layout_of
from covey_shared.plan import (
    FORMAT,
    MAX_GRAPH_BYTES,
    MAX_PARAMETERS,
    DType,
    GraphName,
    GraphRef,
    Hyperparameter,
    PlanHeader,
    TensorSpec,
    decode_header,
    encode_header,
)

Tensor = Any

_RANDOM_OPERATORS = {
    "Bernoulli",
    "Dropout",
    "Multinomial",
    "RandomNormal",
    "RandomNormalLike",
    "RandomUniform",
    "RandomUniformLike",
}
_DTYPES: dict[Any, DType] = {
    torch.float32: "float32",
    torch.int64: "int64",
    torch.uint8: "uint8",
}


@dataclass(frozen=True, slots=True)
class CompiledPlan(PlanBundle):
    """A plan together with how closely it agreed with torch."""

    verification: verify.Verification


def compile_plan(
    module: Any,
    sample_features: Any,
    sample_labels: Any,
    *,
    loss: LossName,
    name: str,
    optimizer: str = "sgd",
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    lr: float = 0.1,
) -> CompiledPlan:
    """Compile a `torch.nn.Module` into a plan and verify it against torch.

    sample_features, sample_labels: numpy arrays or tensors, the batch first; real examples, at
    least two. They fix shapes and dtypes, and verification trains on them. The module is not
    changed; its values become the plan's initial parameters. Frozen parameters (requires_grad
    false) become constants of the graphs, which a fleet receives once.

    Raises CompileError naming operator and line of what cannot be compiled, or the figures by
    which the plan differs from torch.
    """
    sgd = _optimizer(optimizer, momentum, weight_decay, nesterov, lr)
    if loss not in LOSSES:
        raise CompileError(f"loss {loss!r} is not one of {', '.join(LOSSES)}")
    if not isinstance(module, torch.nn.Module):
        raise CompileError(
            f"a plan is compiled from a torch.nn.Module, not from {type(module).__name__}"
        )
    features, labels = _sample("features", sample_features), _sample("labels", sample_labels)
    if len(features) != len(labels):
        raise CompileError(f"the sample has {len(features)} features but {len(labels)} labels")
    if len(features) == 1:  # torch.export would make a batch of one a constant
        features, labels = (
            features.repeat(2, *([1] * (features.dim() - 1))),
            labels.repeat(2, *([1] * (labels.dim() - 1))),
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        copy = own_copy(module)
        classes = _check_module(copy, features, labels, LOSSES[loss])
        return _compile(copy, features, labels, loss, sgd, lr, name, classes)


def _compile(
    module: Any,
    features: Tensor,
    labels: Tensor,
    loss_name: LossName,
    sgd: Sgd,
    lr: float,
    name: str,
    classes: int | None,
) -> CompiledPlan:
    loss, table = LOSSES[loss_name], lower.table()
    model = Model(module, features)
    layout = layout_of(
        {name: (tuple(value.shape), role) for name, (value, role) in model.slots.items()}
    )
    if layout.n_params > MAX_PARAMETERS:
        raise CompileError(f"the model has {layout.n_params} parameters; at most {MAX_PARAMETERS}")
    initial = layout.flatten({name: value.numpy() for name, (value, _) in model.slots.items()})
    if not np.isfinite(initial).all():
        raise CompileError("the model's initial values are not all finite")

    train = lower.to_onnx(model.train_step(labels, loss, sgd, table))
    evaluate = model.evaluate(labels, loss, table)
    infer = lower.to_onnx(model.predict(table))
    lower.fold_slots(infer, layout)
    graphs: dict[GraphName, bytes] = {
        "train": lower.serialise(train),
        "eval": lower.serialise(lower.to_onnx(evaluate)),
        "infer": lower.serialise(infer),
    }
    header = PlanHeader(
        format=FORMAT,
        name=name,
        loss=loss_name,
        optimizer=_described(sgd),
        opset=lower.OPSET,
        features=_spec("features", features),
        labels=_spec("labels", labels),
        classes=classes,
        hyperparameters=(Hyperparameter(name="lr", default=lr),),
        layout=layout,
        state=tuple(
            TensorSpec(
                name=momentum_of(name), dtype="float32", shape=tuple(model.slots[name][0].shape)
            )
            for name in (model.trainable if sgd.momentum else ())
        ),
        metrics=evaluate.outputs,
        train=_ref("train", graphs),
        eval=_ref("eval", graphs),
        infer=_ref("infer", graphs),
        versions={
            "torch": str(torch.__version__).split("+")[0],  # the same for CPU and GPU builds
            "onnx": onnx.__version__,
            "onnxscript": onnxscript.__version__,
        },
    )
    header_bytes = encode_header(header)
    try:
        decode_header(header_bytes)
    except MalformedError as error:
        raise CompileError(f"the plan would not be accepted: {error}") from error
    verify.check_rules(header, graphs)
    verified = graphs["train"]
    if _draws(train):
        twin_model = Model(without_dropout(module), features)
        twin = lower.to_onnx(twin_model.train_step(labels, loss, sgd, table))
        if _draws(twin):
            raise CompileError(
                "the model draws random numbers in training other than for dropout, so that it "
                "cannot be verified; draw them beforehand, as part of the features"
            )
        verified = lower.serialise(twin)
        verify.check_randomness(header, graphs["train"], initial, features.numpy(), labels.numpy())
    problem = Problem(
        without_dropout(module),
        features,
        labels,
        loss,
        sgd,
        lr,
        tuple(slot.name for slot in layout.slots),
    )
    report = verify.verify(header, {**graphs, "train": verified}, initial, problem)
    return CompiledPlan(header, header_bytes, graphs, initial, report)


def _optimizer(
    optimizer: str, momentum: float, weight_decay: float, nesterov: bool, lr: float
) -> Sgd:
    if optimizer != "sgd":
        raise CompileError(f"optimizer {optimizer!r} is not known; use sgd")
    for what, value in (("momentum", momentum), ("weight decay", weight_decay), ("lr", lr)):
        if not (math.isfinite(value) and value >= 0):
            raise CompileError(f"{what} must be a number of at least 0, not {value}")
    if momentum >= 1:
        raise CompileError(f"momentum must be below 1, not {momentum}")
    if nesterov and not momentum:
        raise CompileError("nesterov needs a momentum above 0")
    return Sgd(float(momentum), float(weight_decay), nesterov)


def _described(sgd: Sgd) -> str:
    """The optimiser in the header, for people: what cannot be seen from inputs and state."""
    parts = [f"momentum={sgd.momentum:g}"] if sgd.momentum else []
    parts += ["nesterov"] if sgd.nesterov else []
    parts += [f"weight_decay={sgd.weight_decay:g}"] if sgd.weight_decay else []
    return f"sgd({', '.join(parts)})" if parts else "sgd"


def _sample(what: str, value: Any) -> Tensor:
    tensor = torch.as_tensor(value).detach().cpu().contiguous().clone()
    if tensor.dtype not in _DTYPES:
        raise CompileError(
            f"sample {what} are {str(tensor.dtype).removeprefix('torch.')}; a plan's are one of "
            f"{', '.join(_DTYPES.values())}: convert them, for example with .astype('float32')"
        )
    if tensor.dim() < 1 or 0 in tensor.shape:
        raise CompileError(
            f"sample {what} have shape {list(tensor.shape)}; the first dimension is the batch, "
            "and no dimension may be empty"
        )
    return tensor


def _check_module(module: Any, features: Tensor, labels: Tensor, loss: Loss) -> int | None:
    """Refuse what is plain before tracing -> the number of classes, if labels are classes."""
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if (tensor.is_floating_point() and tensor.dtype != torch.float32) or tensor.is_complex():
            raise CompileError(
                f"{name!r} is {str(tensor.dtype).removeprefix('torch.')}; plans train in float32: "
                "call .float() on the model"
            )
        if tensor.device.type != "cpu":
            raise CompileError(f"{name!r} is on {tensor.device}; call .cpu() on the model")
    if not any(parameter.requires_grad for parameter in module.parameters()):
        raise CompileError(
            "the model has no parameter that can be trained; check requires_grad, and that layers "
            "are attributes of their module"
        )
    refuse_recurrent_dropout(module)
    module.train()
    try:
        with tracing(), torch.no_grad():
            output = own_copy(module)(features)
    except CompileError:
        raise
    except Exception as error:
        raise diagnose.failed("the model fails on the sample batch", error) from error
    if not isinstance(output, torch.Tensor):
        raise CompileError(
            f"{_definition(module)}: the model returns a {type(output).__name__}; a plan needs "
            "one tensor: return the predictions alone"
        )
    if output.dtype != torch.float32 or output.dim() < 1 or len(output) != len(features):
        raise CompileError(
            f"{_definition(module)}: the model returns "
            f"{str(output.dtype).removeprefix('torch.')}{list(output.shape)} for {len(features)} "
            "examples; a plan needs float32 with the batch first"
        )
    loss.check(output, labels)
    return int(output.shape[1]) if loss.labels_are_classes else None


def _definition(module: Any) -> str:
    """Where the module's class is defined, for an error message."""
    try:
        return f"{inspect.getsourcefile(type(module))}:{inspect.getsourcelines(type(module))[1]}"
    except (OSError, TypeError):
        return type(module).__name__


def _spec(name: str, sample: Tensor) -> TensorSpec:
    return TensorSpec(name=name, dtype=_DTYPES[sample.dtype], shape=tuple(sample.shape[1:]))


def _ref(name: GraphName, graphs: Mapping[GraphName, bytes]) -> GraphRef:
    data = graphs[name]
    if len(data) > MAX_GRAPH_BYTES:
        raise CompileError(
            f"{name}.onnx has {len(data)} bytes; at most {MAX_GRAPH_BYTES}. Constants and frozen "
            "parameters are part of the graphs: are they needed?"
        )
    return GraphRef(sha256=hashlib.sha256(data).hexdigest(), size=len(data))


def _draws(model: Any) -> bool:
    return any(node.op_type in _RANDOM_OPERATORS for node in model.graph.node)
