"""Bytes -> a graph that keeps the rules for plans, or MalformedError.

What a plan's graph may be is much less than what ONNX may be: one graph of standard operators in an order
in which they can run, every name made once and before its use, constants whose bytes are there and of the
size that they claim, inputs and outputs exactly those that `covey_shared.plan` lays down for the header.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from covey_shared.errors import MalformedError
from covey_shared.plan import GraphName, PlanHeader
from covey_shared.vetting import operators
from covey_shared.vetting.protobuf import PUBLIC, Field, Kind, Meter, Schema, read, refusal

OPSET = 18
IR_VERSION = 10
PARAMETERS_FILE = "parameters.bin"
"""What `infer.onnx` calls the file of its slots. Nothing ever opens a file of that name for it."""

MAX_NODES = 20_000
MAX_INITIALIZERS = 10_000
MAX_FIELDS = 500_000
MAX_ARGUMENTS = 2_000
MAX_ATTRIBUTES = 32
MAX_INTS = 64
MAX_NAME_BYTES = 1_000
MAX_RANK = 16
MAX_INTEGER = 1 << 31
"""Of an attribute. Those of real plans are axes, sides of kernels and flags."""

# ONNX's numbers of element types: name, bytes of one element. Strings, complex numbers and the many
# kinds of short floats and integers are left out: plans train in float32.
DTYPES = {1: ("float32", 4), 2: ("uint8", 1), 6: ("int32", 4), 7: ("int64", 8), 9: ("bool", 1)}
DTYPES[11] = ("float64", 8)
_NUMBERS = {name: number for number, (name, _) in DTYPES.items()}
_NAMES = {number: name for number, (name, _) in DTYPES.items()}

BATCH = -1
"""Stands for the batch dimension in a shape."""

Port = tuple[str, tuple[int, ...] | None]
Ports = dict[str, Port]
"""Name -> element type and shape; None for a shape that the header leaves open."""


def ports(header: PlanHeader, what: GraphName) -> tuple[Ports, Ports]:
    """The inputs and the outputs of a graph of this plan."""
    features: Ports = {"features": (header.features.dtype, (BATCH, *header.features.shape))}
    labels: Ports = {"labels": (header.labels.dtype, (BATCH, *header.labels.shape))}
    slots: Ports = {f"slot.{s.name}": ("float32", s.shape) for s in header.layout.slots}
    if what == "infer":
        return features, {"predictions": ("float32", None)}
    if what == "eval":
        metrics: Ports = {
            name: ("float32" if name == "loss_sum" else "int64", ()) for name in header.metrics
        }
        return features | labels | slots, metrics
    state: Ports = {f"state.{s.name}": (s.dtype, s.shape) for s in header.state}
    hyper: Ports = {f"hyper.{h.name}": ("float32", ()) for h in header.hyperparameters}
    after: Ports = {f"next.{name}": port for name, port in (slots | state).items()}
    return features | labels | hyper | slots | state, {"loss": ("float32", ()), **after}


# --- what a graph is made of ----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Tensor:
    """A constant. data: its elements, little-endian; None for a slot of `infer.onnx`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: memoryview | None


@dataclass(frozen=True, slots=True)
class Node:
    """An operator's use. inputs, outputs: names; "" for one that is left out."""

    operator: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Graph:
    """A graph that keeps the rules. nodes: in an order in which they can run. types: of every value."""

    nodes: Sequence[Node]
    types: Mapping[str, str]
    constants: Mapping[str, Tensor]
    inputs: Ports
    outputs: Ports


# --- ONNX's messages, as far as a plan's has them -------------------------------------------------


def _name(name: str = "name", most: int = 1) -> Field:
    return Field(name, Kind.TEXT, most, MAX_NAME_BYTES)


def _message(name: str, most: int = 1) -> Field:
    return Field(name, Kind.BYTES, most)


_DOCS = {"doc": "a doc_string", "meta": "metadata_props"}
_MODEL = Schema(
    "a model",
    {
        1: Field("ir_version", Kind.INT),
        2: _name("producer_name"),
        7: _message("graph"),
        8: _message("opset_import"),
    },
    {
        3: "a producer_version", 4: "a domain", 5: "a model_version", 6: _DOCS["doc"], 14: _DOCS["meta"],
        20: "training_info", 25: "functions", 26: "configuration",
    },
)  # fmt: skip
_OPSET = Schema("opset_import", {1: _name("domain"), 2: Field("version", Kind.INT)}, {})
_GRAPH = Schema(
    "the graph",
    {
        1: _message("node", MAX_NODES),
        2: _name(),
        5: _message("initializer", MAX_INITIALIZERS),
        11: _message("input", MAX_NODES),
        12: _message("output", MAX_NODES),
    },
    {
        10: _DOCS["doc"], 13: "value_info", 14: "quantization_annotation", 15: "sparse_initializer",
        16: _DOCS["meta"],
    },
)  # fmt: skip
_NODE = Schema(
    "a node",
    {
        1: _name("input", MAX_ARGUMENTS),
        2: _name("output", MAX_ARGUMENTS),
        3: _name(),
        4: _name("op_type"),
        5: _message("attribute", MAX_ATTRIBUTES),
    },
    {6: _DOCS["doc"], 7: "a domain", 8: "an overload", 9: _DOCS["meta"], 10: "a device"},
)
_ATTRIBUTE = Schema(
    "an attribute",
    {
        1: _name(),
        2: Field("f", Kind.FLOAT),
        3: Field("i", Kind.INT),
        4: Field("s", Kind.TEXT, 1, 64),
        7: Field("floats", Kind.FLOAT, MAX_INTS),
        8: Field("ints", Kind.INT, MAX_INTS),
        20: Field("type", Kind.INT),
    },
    {
        5: "a tensor", 6: "a graph", 9: "strings", 10: "tensors", 11: "graphs", 13: _DOCS["doc"],
        14: "a type", 15: "types", 21: "a reference", 22: "a sparse tensor", 23: "sparse tensors",
    },
)  # fmt: skip
_TYPES = {1: 2, 2: 3, 3: 4, 6: 7, 7: 8}
"""ONNX's number of an attribute's type -> the field that holds the value."""
_MANY = {6, 7}
_TENSOR = Schema(
    "an initializer",
    {
        1: Field("dims", Kind.INT, MAX_RANK),
        2: Field("data_type", Kind.INT),
        8: _name(),
        9: _message("raw_data"),
        13: _message("external_data", 3),
        14: Field("data_location", Kind.INT),
    },
    {
        3: "a segment", 4: "float_data", 5: "int32_data", 6: "string_data", 7: "int64_data",
        10: "double_data", 11: "uint64_data", 12: _DOCS["doc"], 16: _DOCS["meta"],
    },
)  # fmt: skip
_ENTRY = Schema("external_data", {1: _name("key"), 2: _name("value")}, {})
_VALUE = Schema(
    "an input or output", {1: _name(), 2: _message("type")}, {3: _DOCS["doc"], 4: _DOCS["meta"]}
)
_TYPE = Schema(
    "a type",
    {1: _message("tensor_type")},
    {4: "a sequence", 5: "a map", 6: "a denotation", 8: "a sparse tensor", 9: "an optional"},
)
_TENSOR_TYPE = Schema(
    "a tensor's type", {1: Field("elem_type", Kind.INT), 2: _message("shape")}, {}
)
_SHAPE = Schema("a shape", {1: _message("dim", MAX_RANK)}, {})
_DIM = Schema(
    "a dimension", {1: Field("dim_value", Kind.INT), 2: _name("dim_param")}, {3: "a denotation"}
)


# --- reading and judging --------------------------------------------------------------------------


def vet(header: PlanHeader, data: bytes, what: GraphName) -> Graph:
    """The graph, if it keeps the rules. Raises MalformedError, whatever the bytes, and nothing else.

    data: the bytes that the header names. Takes time in proportion to them, and memory for at most
    `MAX_FIELDS` small objects; constants stay where they are.
    """
    try:
        return _vet(header, memoryview(data).toreadonly(), what)
    except MalformedError as error:
        named = MalformedError(f"{what}.onnx: {error}")
        named.public = PUBLIC
        raise named from None


def _vet(header: PlanHeader, data: memoryview, what: GraphName) -> Graph:
    meter = Meter(MAX_FIELDS)
    model = read(data, _MODEL, meter)
    if model.get(1) != IR_VERSION:
        raise refusal(f"its ir_version is {model.get(1)}; plans have {IR_VERSION}")
    opset = read(model.get(8, memoryview(b"")), _OPSET, meter)
    if opset.get(1, "") or opset.get(2) != OPSET or header.opset != OPSET:
        raise refusal(
            f"it is of operator set {opset.get(1, '')!r} {opset.get(2)}, its header of "
            f"{header.opset}; plans are of ONNX's own, version {OPSET}"
        )
    graph = read(model.get(7, memoryview(b"")), _GRAPH, meter)
    inputs, outputs = ports(header, what)
    constants: dict[str, Tensor] = {}
    slots = {s.name: s for s in header.layout.slots} if what == "infer" else {}
    for message in graph.get(5, ()):
        tensor = _tensor(read(message, _TENSOR, meter), meter, slots)
        if tensor.name in constants:
            raise refusal(f"the name {tensor.name!r} is given twice")
        constants[tensor.name] = tensor
    if missing := sorted(f"slot.{n}" for n in slots if f"slot.{n}" not in constants):
        raise refusal(f"it lacks initializer {missing[0]!r}")
    _check_ports("input", graph.get(11, ()), inputs, meter)
    _check_ports("output", graph.get(12, ()), outputs, meter)
    known = _Known(
        {name: name for name in (*constants, *inputs)},
        {n: t.dtype for n, t in constants.items()} | {n: port[0] for n, port in inputs.items()},
        {name for name, tensor in constants.items() if tensor.data is not None},
    )
    if len(known.names) < len(constants) + len(inputs):
        raise refusal("an initializer has the name of an input")
    nodes = [_node(read(m, _NODE, meter), meter, known) for m in graph.get(1, ())]
    for name, (dtype, _) in sorted(outputs.items()):
        if name not in known.names or name in inputs:
            raise refusal(f"no node makes output {name!r}")
        if known.types[name] != dtype:
            raise refusal(f"output {name!r} comes out as {known.types[name]}")
    return Graph(nodes, known.types, constants, inputs, outputs)


def _tensor(fields: dict[int, Any], meter: Meter, slots: Mapping[str, Any]) -> Tensor:
    name, shape = fields.get(8, ""), tuple(fields.get(1, ()))
    if not name:
        raise refusal("an initializer has no name")
    if fields.get(2) not in DTYPES:
        raise refusal(
            f"initializer {name!r} is of element type {fields.get(2)}, which plans have not"
        )
    dtype, width = DTYPES[fields[2]]
    size = extent = width
    for side in shape:
        if side < 0:
            raise refusal(f"initializer {name!r} has a side of {side}")
        size *= side
        extent *= side or 1
    if not size and extent > MAX_INTEGER:  # nothing in it, and yet too large for numpy to describe
        raise refusal(f"initializer {name!r} is empty, with the sides {list(shape)}")
    slot = slots.get(name.removeprefix("slot.")) if name.startswith("slot.") else None
    if slot is not None:
        entries = [read(entry, _ENTRY, meter) for entry in fields.get(13, ())]
        expected = [
            {1: "offset", 2: str(4 * slot.offset)},
            {1: "length", 2: str(4 * slot.size)},
            {1: "location", 2: PARAMETERS_FILE},
        ]
        if (dtype, shape) != ("float32", slot.shape):
            raise refusal(f"initializer {name!r} is {dtype}{list(shape)}, not as the header has it")
        if fields.get(14) != 1 or 9 in fields or entries != expected:
            raise refusal(f"initializer {name!r} does not lie where the header has it")
        return Tensor(name, dtype, shape, None)
    if 13 in fields or fields.get(14, 0):
        raise refusal(f"initializer {name!r} refers to a file")
    data = fields.get(9, memoryview(b""))
    if len(data) != size:
        raise refusal(
            f"initializer {name!r} has {len(data)} bytes; its shape {list(shape)} needs {size}"
        )
    if dtype == "bool" and bytes(data).strip(b"\0\1"):
        raise refusal(f"initializer {name!r} is bool, but not all of it is 0 or 1")
    return Tensor(name, dtype, shape, data)


def _check_ports(kind: str, messages: Sequence[memoryview], expected: Ports, meter: Meter) -> None:
    """Names, types and shapes are exactly the expected ones, each once."""
    found: set[str] = set()
    for message in messages:
        value = read(message, _VALUE, meter)
        name = value.get(1, "")
        if name not in expected:
            raise refusal(f"it has an unknown {kind} {name!r}")
        if name in found:
            raise refusal(f"it has {kind} {name!r} twice")
        found.add(name)
        kinds = read(value.get(2, memoryview(b"")), _TYPE, meter)
        tensor = read(kinds.get(1, memoryview(b"")), _TENSOR_TYPE, meter)
        if 2 not in tensor:
            raise refusal(f"{kind} {name!r} has no shape")
        dims = [read(d, _DIM, meter) for d in read(tensor[2], _SHAPE, meter).get(1, ())]
        dtype, shape = expected[name]
        sides = tuple(
            d[1] if 1 in d and 2 not in d else BATCH if 1 not in d else None for d in dims
        )
        fits = None not in sides if shape is None else sides == shape
        if tensor.get(1) != _NUMBERS[dtype] or not fits:
            raise refusal(
                f"{kind} {name!r} is of element type {tensor.get(1)} and shape {list(sides)}; the header "
                f"says {dtype}{'' if shape is None else list(shape)}"
            )
    if missing := sorted(set(expected) - found):
        raise refusal(f"it lacks {kind} {missing[0]!r}")


_NONE: Mapping[str, Any] = {}


@dataclass(frozen=True, slots=True)
class _Known:
    """Of the values so far: their names, each as one object; element types; those that are fixed, which
    is to say the same for all data of one shape."""

    names: dict[str, str]
    types: dict[str, str]
    fixed: set[str]


def _node(fields: dict[int, Any], meter: Meter, known: _Known) -> Node:
    """A node, judged; its outputs are known from then on."""
    operator = fields.get(4, "")
    if operator not in operators.ALLOWED:
        why = operators.LEFT_OUT.get(
            operator, "it is not on the list of those that plans are made of"
        )
        raise refusal(f"operator {operator!r}: {why}")
    where = fields.get(3) or operator
    given, outputs = fields.get(1, ()), tuple(fields.get(2, ()))
    if unknown := [name for name in given if name and name not in known.names]:
        raise refusal(f"node {where!r} uses {unknown[0]!r} before it is made")
    inputs = tuple(known.names[name] if name else "" for name in given)
    for position in operators.SIZES.get(operator, ()):
        name = inputs[position] if position < len(inputs) else ""
        if name and name not in known.fixed:
            raise refusal(
                f"node {where!r} ({operator}) takes a size from {name!r}, whose values depend on data"
            )
    attributes = _attributes(fields.get(5, ()), where, meter)
    fixed = operator in operators.FROM_SHAPES or (
        operator not in operators.RANDOM and all(n in known.fixed for n in inputs if n)
    )
    given = [known.types[name] if name else "" for name in inputs]
    if operator in operators.TRAPS and not fixed and not all(t.startswith("float") for t in given):
        raise refusal(f"node {where!r} ({operator}) divides integers that depend on data")
    first, others = operators.types(operator, given, attributes, _NAMES)
    for position, name in enumerate(outputs):
        if not name:
            continue
        if name in known.names:
            raise refusal(f"the name {name!r} is given twice")
        known.names[name] = name
        known.types[name] = others if position else first
        if fixed:
            known.fixed.add(name)
    if not any(outputs):
        raise refusal(f"node {where!r} makes nothing")
    return Node(operator, inputs, outputs, attributes)


def _attributes(messages: Sequence[memoryview], where: str, meter: Meter) -> Mapping[str, Any]:
    if not messages:
        return _NONE
    attributes: dict[str, Any] = {}
    for message in messages:
        fields = read(message, _ATTRIBUTE, meter)
        name, kind = fields.get(1, ""), fields.get(20)
        if not name or name in attributes:
            raise refusal(f"node {where!r} has attribute {name!r} twice or without a name")
        holder = _TYPES.get(kind) if kind is not None else None
        if holder is None:
            raise refusal(f"attribute {name!r} of node {where!r} is of type {kind}")
        if others := sorted(set(fields) - {1, 20, holder}):
            raise refusal(f"attribute {name!r} of node {where!r} has field {others[0]} too")
        if holder not in fields and kind not in _MANY:
            raise refusal(f"attribute {name!r} of node {where!r} has no value")
        value = fields.get(holder, [])
        for number in value if kind == 7 else [value] if kind == 2 else []:
            if abs(number) > MAX_INTEGER:
                raise refusal(f"attribute {name!r} of node {where!r} is {number}")
        if name in ("to", "dtype") and (kind != 2 or value not in DTYPES):
            raise refusal(f"node {where!r} makes element type {value}, which plans have not")
        attributes[name] = value
    return attributes
