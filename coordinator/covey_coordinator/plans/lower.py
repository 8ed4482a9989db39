"""fx graphs -> ONNX bytes that depend on the model alone.

Translation is torch's own ONNX exporter; what is added here: the check that every operator has a
translation, before torch is asked, and the cleaning of its output. Two compilations of one model
give the same bytes, and no file name, line or machine of the compiler's stands in them.
"""

from functools import cache
from types import SimpleNamespace
from typing import Any

import onnx
import onnx_ir
import onnxscript.optimizer
import torch
from onnx_ir.passes import Sequential
from onnx_ir.passes import common as passes
from torch.export.graph_signature import (
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    TensorArgument,
)
from torch.onnx._internal.exporter import _core, _decomp, _fx_passes, _registration

from covey_coordinator.plans import diagnose
from covey_coordinator.plans.decompositions import RULES
from covey_coordinator.plans.trace import BATCH, Table, Traced, tracing
from covey_shared.errors import CompileError
from covey_shared.layout import Layout

OPSET = 18
IR_VERSION = 10
# onnxscript's rewriting rules are left out: onnxruntime has the ones that matter here itself, and
# trying them takes longer than all the rest.
_SIMPLIFY = Sequential(
    passes.RemoveUnusedNodesPass(),
    passes.RemoveUnusedOpsetsPass(),
    passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
    passes.DeduplicateInitializersPass(),
    passes.CommonSubexpressionEliminationPass(),
    passes.OutputFixPass(),
    passes.NameFixPass(),
)

PARAMETERS_FILE = "parameters.bin"


@cache
def _registry() -> Any:
    with tracing():
        return _registration.ONNXRegistry.from_torchlib()


@cache
def table() -> Table:
    """Operator -> rule: ours, and torch's for what its exporter would have to break up anyway."""
    known = set(_decomp.get_onnx_implemented_overloads(_registry()))
    return {**_decomp.create_onnx_friendly_decomposition_table(known), **RULES}


def to_onnx(traced: Traced) -> onnx.ModelProto:
    """Translate, clean and check one traced function."""
    _fx_passes.remove_assertion_nodes(traced.graph)
    _check_operators(traced)
    with tracing():
        try:
            # What torch.onnx.export does with an ExportedProgram, without exporting the traced
            # graph once more and decomposing what is decomposed already: half the time.
            _fx_passes.insert_type_promotion_nodes(traced.graph)
            exported = _core._exported_program_to_onnx_program(
                _program(traced), registry=_registry()
            ).model
            passes.InlinePass()(exported)
            onnxscript.optimizer.fold_constants_ir(exported)
            _SIMPLIFY(exported)
        except Exception as error:  # torch raises dozens of classes here
            raise diagnose.failed("torch's ONNX exporter failed", error) from error
    for values, names in (
        (exported.graph.inputs, traced.inputs),
        (
            exported.graph.outputs,
            traced.outputs,
        ),
    ):
        for value, name in zip(values, names, strict=True):
            value.name = name
    model = onnx_ir.to_proto(exported)
    _clean(model, traced)
    try:
        onnx.checker.check_model(model)
    except onnx.checker.ValidationError as error:
        raise diagnose.failed("torch's ONNX exporter wrote an invalid graph", error) from error
    return model


def _program(traced: Traced) -> Any:
    """A traced graph in the guise of the ExportedProgram that the exporter reads."""
    nodes = list(traced.graph.graph.nodes)
    placeholders = [node.name for node in nodes if node.op == "placeholder"]
    results = [node.name for node in nodes[-1].args[0]]
    names = placeholders[len(traced.inputs) :]
    signature = ExportGraphSignature(
        [
            InputSpec(InputKind.USER_INPUT, TensorArgument(name=name), None)
            for name in placeholders[: len(traced.inputs)]
        ]
        + [InputSpec(InputKind.CONSTANT_TENSOR, TensorArgument(name=name), name) for name in names],
        [OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(name=name), None) for name in results],
    )
    return SimpleNamespace(
        graph_module=traced.graph,
        graph_signature=signature,
        range_constraints={},
        named_parameters=lambda: (),
        named_buffers=lambda: (),
        constants=dict(zip(names, traced.constants, strict=True)),
    )


def _check_operators(traced: Traced) -> None:
    for node in traced.graph.graph.nodes:
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            continue
        if not _registry().is_registered(node.target):
            raise diagnose.unsupported(
                node,
                "has no translation to ONNX",
                hint="Replace it with operators listed in docs/plans.md, or compute it beforehand "
                "as part of the features.",
            )


def _clean(model: Any, traced: Traced) -> None:
    """Drop everything that says where and from what source a graph was made; rename the rest."""
    names = (
        tuple(value.name for value in model.graph.input),
        tuple(value.name for value in model.graph.output),
    )
    if names != (traced.inputs, traced.outputs):
        raise CompileError(
            f"torch's ONNX exporter changed the graph's inputs or outputs to {names}; "
            "report this model to covey"
        )
    model.ir_version = IR_VERSION
    model.producer_name = "covey"
    for field in ("producer_version", "doc_string", "metadata_props", "domain", "model_version"):
        model.ClearField(field)
    for index, value in enumerate((*model.graph.input, *model.graph.output)):
        batched = index < traced.batched or value.name == "predictions"
        if batched:
            value.type.tensor_type.shape.dim[0].dim_param = BATCH
    model.graph.name = "plan"
    _rename(model.graph, {name: name for name in (*traced.inputs, *traced.outputs)}, [0])


def _rename(graph: Any, scope: dict[str, str], counter: list[int]) -> None:
    """Give nodes and inner values names from their order; recursively, with what they capture."""

    def fresh(stem: str) -> str:
        counter[0] += 1
        return f"{stem}_{counter[0]}"

    for field in ("doc_string", "metadata_props", "value_info"):
        graph.ClearField(field)
    for value in (*graph.input, *graph.output):
        value.ClearField("doc_string")
        value.ClearField("metadata_props")
    for tensor in graph.initializer:
        tensor.ClearField("doc_string")
        tensor.name = scope.setdefault(tensor.name, fresh("constant"))
    for node in graph.node:
        for field in ("doc_string", "metadata_props"):
            node.ClearField(field)
        stem = node.op_type.lower()
        node.name = fresh(stem)
        node.input[:] = [scope[name] if name else "" for name in node.input]
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                if inner.node:
                    inputs = {value.name: fresh("inner") for value in inner.input}
                    for value in inner.input:
                        value.name = inputs[value.name]
                    _rename(inner, {**scope, **inputs}, counter)
        node.output[:] = [
            scope.setdefault(name, node.name if index == 0 else f"{node.name}_{index}")
            if name
            else ""
            for index, name in enumerate(node.output)
        ]
    for value in graph.output:
        value.name = scope[value.name]


def fold_slots(model: Any, layout: Layout) -> None:
    """Turn a graph's slot inputs into initialisers kept in `PARAMETERS_FILE`.

    Offsets and lengths are the flat layout's, in bytes: that file is the flat vector.
    """
    slots = {f"slot.{slot.name}": slot for slot in layout.slots}
    kept = [value for value in model.graph.input if value.name not in slots]
    del model.graph.input[:]
    model.graph.input.extend(kept)
    for name, slot in slots.items():
        tensor = model.graph.initializer.add(
            name=name,
            dims=slot.shape,
            data_type=onnx.TensorProto.FLOAT,
            data_location=onnx.TensorProto.EXTERNAL,
        )
        for key, number in (("offset", 4 * slot.offset), ("length", 4 * slot.size)):
            tensor.external_data.add(key=key, value=str(number))
        tensor.external_data.add(key="location", value=PARAMETERS_FILE)


def serialise(model: Any) -> bytes:
    """An ONNX model's bytes, the same for the same model."""
    data: bytes = model.SerializeToString(deterministic=True)
    return data
