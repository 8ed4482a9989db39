"""What may reach onnxruntime: the strict reader, the rules for graphs, and what a step is said to need."""

import itertools
import re
import time
import tracemalloc
from importlib.resources import files
from pathlib import Path

import msgspec
import numpy as np
import onnx
import onnxruntime as ort
import onnxscript.function_libs.torch_lib.ops as translations
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from covey_coordinator.plans import lower
from covey_shared.errors import MalformedError
from covey_shared.plan import decode_header
from covey_shared.vetting import PUBLIC, operators, peak_bytes, step_bytes, vet
from covey_shared.vetting import graph as rules
from covey_shared.vetting.protobuf import varint
from covey_shared.vetting.shapes import _Known

PLANS = Path(str(files("covey_fleet"))) / "plans"
GRAPHS = [(plan, what) for plan in ("mlp", "cnn") for what in ("train", "eval", "infer")]
FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64


def shipped(plan, what):
    header = decode_header((PLANS / plan / "plan.json").read_bytes())
    return header, (PLANS / plan / f"{what}.onnx").read_bytes()


HEADER, TRAIN = shipped("mlp", "train")


def changed(change, what="train"):
    """A shipped graph after a change, in the canonical form."""
    proto = onnx.load_model_from_string(shipped("mlp", what)[1])
    change(proto)
    return proto.SerializeToString(deterministic=True)


def refused(data, message, what="train"):
    with pytest.raises(MalformedError, match=message) as caught:
        vet(HEADER, data, what)
    assert str(caught.value).startswith(f"{what}.onnx: ")
    assert caught.value.public == PUBLIC


# -- real plans ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("plan", "what"), GRAPHS)
def test_a_real_graph_is_read_as_the_onnx_package_reads_it(plan, what):
    header, data = shipped(plan, what)
    graph, proto = vet(header, data, what), onnx.load_model_from_string(data).graph
    assert [node.operator for node in graph.nodes] == [node.op_type for node in proto.node]
    for node, other in zip(graph.nodes, proto.node, strict=True):
        assert (node.inputs, node.outputs) == (tuple(other.input), tuple(other.output))
        values = {a.name: helper.get_attribute_value(a) for a in other.attribute}
        assert node.attributes == {
            name: value.decode() if isinstance(value, bytes) else value
            for name, value in values.items()
        }
    assert list(graph.constants) == [tensor.name for tensor in proto.initializer]
    for tensor in proto.initializer:
        ours = graph.constants[tensor.name]
        assert ours.shape == tuple(tensor.dims)
        assert ours.dtype == helper.tensor_dtype_to_np_dtype(tensor.data_type).name
        if ours.data is not None:
            assert ours.data.tobytes() == tensor.raw_data
        else:
            assert what == "infer"
    assert {i.name for i in proto.input} == set(graph.inputs)
    assert {o.name for o in proto.output} == set(graph.outputs)


def test_the_rules_are_the_compilers():
    assert (rules.OPSET, rules.IR_VERSION) == (lower.OPSET, lower.IR_VERSION)
    assert rules.PARAMETERS_FILE == lower.PARAMETERS_FILE


def test_the_operators_are_those_that_the_compiler_can_emit():
    """Torch's translations write ``op.Name(...)``. That every compiled plan keeps to the list is shown
    wherever one is run, since `runtime` runs nothing that was not vetted."""
    used = set()
    for path in Path(translations.__file__).parent.glob("*.py"):
        used |= set(re.findall(r"\bop\d*\.([A-Z]\w*)\(", path.read_text()))
    standard = {
        schema.name
        for schema in onnx.defs.get_all_schemas_with_history()
        if schema.domain == "" and schema.since_version <= rules.OPSET and not schema.deprecated
    }
    assert used <= standard
    assert used - set(operators.LEFT_OUT) == operators.ALLOWED
    assert set(operators.LEFT_OUT) <= used


def test_no_operator_has_a_graph_or_a_sequence_inside():
    for name in operators.ALLOWED:
        schema = onnx.defs.get_schema(name, rules.OPSET)
        kinds = {attribute.type for attribute in schema.attributes.values()}
        assert not kinds & {onnx.defs.OpSchema.AttrType.GRAPH, onnx.defs.OpSchema.AttrType.GRAPHS}
        for value in (*schema.inputs, *schema.outputs):
            assert any(t.startswith("tensor(") for t in value.types), name


def test_every_input_that_can_set_a_size_is_known():
    """Integer inputs by the schema's own names, but for those that only pick elements."""
    sizing = re.compile(
        "shape|axes|axis|pads|repeats|size|split|starts|ends|steps|^k$|length|dims|limit"
    )
    picked = {"indices", "index"}
    for name in operators.ALLOWED:
        schema = onnx.defs.get_schema(name, rules.OPSET)
        for position, taken in enumerate(schema.inputs):
            if sizing.search(taken.name.lower()) and taken.name.lower() not in picked:
                assert position in operators.SIZES.get(name, ()), (name, taken.name)


# -- the reader ------------------------------------------------------------------------------------


def twisted(data, draw):
    """Bytes with a few things wrong."""
    mutated = bytearray(data)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(mutated)))
        match draw(st.integers(0, 4)):
            case 0:
                mutated[at : at + 1] = bytes([draw(st.integers(0, 255))])
            case 1:
                del mutated[at : at + draw(st.integers(1, 40))]
            case 2:
                mutated[at:at] = draw(st.binary(min_size=1, max_size=12))
            case 3:
                other = draw(st.integers(0, len(mutated)))
                mutated[at:at] = mutated[other : other + draw(st.integers(1, 60))]
            case _:
                mutated[at : at + 2] = mutated[at : at + 2][::-1]
    return bytes(mutated)


@settings(max_examples=400, deadline=None)
@given(st.data(), st.sampled_from(GRAPHS))
def test_damaged_graphs_raise_one_error_or_have_one_reading(data, graph):
    header, original = shipped(*graph)
    mutated = twisted(original, data.draw)
    try:
        vet(header, mutated, graph[1])
    except MalformedError:
        return
    # What is accepted another reader takes for the same: its own serialisation gives the bytes back.
    proto = onnx.load_model_from_string(mutated)
    assert proto.SerializeToString(deterministic=True) == mutated


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=400))
def test_random_bytes_raise_one_error(data):
    with pytest.raises(MalformedError):
        vet(HEADER, data, "train")


@given(st.integers(0, 2**64 - 1))
def test_numbers_are_read_as_they_are_written(number):
    written, rest = bytearray(), number
    while rest > 0x7F:
        written.append(rest & 0x7F | 0x80)
        rest >>= 7
    written.append(rest)
    assert varint(memoryview(written), 0, len(written)) == (number, len(written))
    padded = bytes([*written[:-1], written[-1] | 0x80, 0])
    with pytest.raises(MalformedError):
        varint(memoryview(padded), 0, len(padded))


def length_of(data):
    """A message's length, as it stands before it."""
    number, out = len(data), bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*out, number])


def model_of(graph, *, before=b"", after=b""):
    """A model around a graph's bytes, with other bytes before and behind the graph's field."""
    opset = b"\x42\x04\x0a\x00\x10\x12"
    return b"\x08\x0a" + before + b"\x3a" + length_of(graph) + graph + opset + after


GRAPH = onnx.load_model_from_string(TRAIN).graph.SerializeToString(deterministic=True)


def test_the_bytes_above_make_a_good_graph():
    assert len(vet(HEADER, model_of(GRAPH), "train").nodes) == 40


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "ir_version is None"),
        (TRAIN[:-1], "longer than what is left|cut off"),
        (TRAIN + b"\x00", "field 0"),
        (TRAIN + TRAIN, "does not stand in its place"),
        (model_of(GRAPH, before=b"\x08\x0a"), "ir_version stands there twice"),
        (model_of(GRAPH, after=b"\x42\x04\x0a\x00\x10\x12"), "opset_import stands there twice"),
        (model_of(GRAPH, before=b"\x3a\x00"), "graph stands there twice"),
        (model_of(GRAPH, after=b"\xa2\x01\x00"), "training_info"),
        (model_of(GRAPH, after=b"\xca\x01\x00"), "functions"),
        (model_of(GRAPH, after=b"\x9a\x3e\x00"), "field 995"),
        (model_of(GRAPH, after=b"\x43\x44"), "wire type 3"),  # a group
        (model_of(GRAPH, after=b"\x80" * 11), "more than 10 bytes"),
        (model_of(GRAPH, after=b"\xff" * 9 + b"\x7f"), "shortest form"),
        (model_of(GRAPH, before=b"\x12\x02\xff\xfe"), "not UTF-8"),
        (model_of(GRAPH, before=b"\x12\x02\x1b\x5b"), "not printable"),
        (b"\x88\x00\x0a" + model_of(GRAPH)[2:], "shortest form"),
        (b"\x08\x8a\x00" + model_of(GRAPH)[2:], "shortest form"),
        (model_of(GRAPH + b"\x12\x01x"), "name does not stand in its place"),
        (model_of(b"\x0a\x7f" + GRAPH), "wire type 7"),
        (model_of(b"\x0d\x00\x00\x00\x00" + GRAPH), "wire type 5"),
    ],
)  # fmt: skip
def test_what_a_reader_might_understand_in_two_ways_is_refused(data, message):
    refused(data, message)


def wide(number):
    """A node with many inputs, all of them left out."""
    made = b"\x0a\x00" * 1900 + b"\x12\x05n%04d" % number + b"\x22\x03Max"
    return b"\x0a" + length_of(made) + made


def test_a_flood_of_small_fields_takes_bounded_time_and_memory():
    """Each of a few million fields of two bytes would become an object of dozens."""
    floods = [
        model_of(b"\x0a\x00" * 2_000_000),  # nodes
        model_of(b"\x2a\x00" * 2_000_000),  # initializers
        model_of(b"".join(map(wide, range(1000))) + GRAPH),  # inputs of nodes
        model_of(b"\x2a" + length_of(b"\x08\x01" * 2_000_000) + b"\x08\x01" * 2_000_000),  # dims
        b"\x08\x0a" * 2_000_000,
    ]
    for flood in floods:
        tracemalloc.start()
        try:
            refused(flood, "more than|twice|not on the list")
            assert tracemalloc.get_traced_memory()[1] < 3 * len(flood) + 10_000_000
        finally:
            tracemalloc.stop()


def many_nodes(n):
    """A valid graph with a chain of n nodes more."""

    def change(proto):
        names = ["loss_", *[f"n{i}" for i in range(n - 1)], "loss"]
        for node in proto.graph.node:
            node.output[:] = ["loss_" if name == "loss" else name for name in node.output]
        proto.graph.node.extend(
            helper.make_node("Neg", [a], [b]) for a, b in itertools.pairwise(names)
        )

    return changed(change)


def test_time_grows_with_the_graph_and_ends_at_the_bound():
    times = []
    for n in (2_000, 16_000):
        data = many_nodes(n)
        best = min(_seconds(lambda data=data: vet(HEADER, data, "train")) for _ in range(3))
        times.append(best)
    assert times[1] < 24 * times[0]  # eight times the nodes
    refused(many_nodes(20_000), "more than 20000 of node")


def _seconds(run):
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


# -- the rules -------------------------------------------------------------------------------------


def inserted(*nodes, constants=(), at=0):
    """The graph with nodes put in, and one of its losses made of the last one's result."""

    def change(proto):
        for position, node in enumerate(nodes):
            proto.graph.node.insert(at + position, node)
        proto.graph.initializer.extend(constants)

    return change


def node(operator, inputs, outputs=("new",), **attributes):
    return helper.make_node(operator, list(inputs), list(outputs), **attributes)


def constant(values, dtype=np.int64, name="c"):
    return numpy_helper.from_array(np.asarray(values, dtype), name)


def tensor_with(change):
    tensor = constant([1, 2, 3])
    change(tensor)
    return inserted(constants=[tensor])


def attribute_with(change):
    made = node("Softmax", ["slot.1.weight"], axis=1)
    change(made.attribute[0])
    return inserted(made)


def body():
    """A graph as loops have."""
    return helper.make_graph([], "inside", [], [])


def setting(**fields):
    def change(message):
        for name, value in fields.items():
            setattr(message, name, value)

    return change


RULES = {
    "another ir": (setting(ir_version=9), "ir_version is 9"),
    "a producer's version": (setting(producer_version="1"), "producer_version"),
    "no opset": (lambda m: m.ClearField("opset_import"), "operator set '' None"),
    "another opset": (lambda m: setting(version=17)(m.opset_import[0]), "operator set '' 17"),
    "a custom domain": (
        lambda m: setting(domain="com.microsoft")(m.opset_import[0]),
        "operator set 'com.microsoft'",
    ),
    "a second domain": (
        lambda m: m.opset_import.append(helper.make_opsetid("com.microsoft", 1)),
        "opset_import stands there twice",
    ),
    "a node's domain": (
        inserted(node("FusedMatMul", ["hyper.lr", "hyper.lr"], domain="com.microsoft")),
        "a domain",
    ),
    "a function": (
        lambda m: m.functions.append(
            helper.make_function("x", "f", [], [], [], [helper.make_opsetid("", 18)])
        ),
        "functions",
    ),
    "training info": (lambda m: m.training_info.add(), "training_info"),
    "metadata": (lambda m: setting(key="a", value="b")(m.metadata_props.add()), "metadata_props"),
    "a doc string": (setting(doc_string="made by"), "a doc_string"),
    "a node's doc string": (inserted(node("Neg", ["hyper.lr"], doc_string="x")), "a doc_string"),
    "value info": (
        lambda m: m.graph.value_info.append(helper.make_tensor_value_info("x", FLOAT, [1])),
        "value_info",
    ),
    "quantization": (lambda m: m.graph.quantization_annotation.add(), "quantization_annotation"),
    "a sparse constant": (lambda m: m.graph.sparse_initializer.add(), "sparse_initializer"),
    "a loop": (inserted(node("Loop", ["", ""], body=body())), "operator 'Loop'"),
    "a branch": (
        inserted(node("If", ["hyper.lr"], then_branch=body(), else_branch=body())),
        "operator 'If'",
    ),
    "a scan": (inserted(node("Scan", ["hyper.lr"], body=body(), num_scan_inputs=1)), "'Scan'"),
    "a sequence": (inserted(node("SequenceMap", ["hyper.lr"], body=body())), "'SequenceMap'"),
    "a constant node": (
        inserted(node("Constant", [], value=constant([1]))),
        "keeps constants as initialisers",
    ),
    "an unknown operator": (inserted(node("Frobnicate", ["hyper.lr"])), "'Frobnicate'.*not on the list"),
    "no operator": (inserted(node("", ["hyper.lr"])), "operator ''"),
    "values decide a size": (inserted(node("NonZero", ["features"])), "depends on values"),
    "a graph in an attribute": (inserted(node("Neg", ["hyper.lr"], body=body())), "has a graph"),
    "graphs in an attribute": (inserted(node("Neg", ["hyper.lr"], bodies=[body()])), "has graphs"),
    "a tensor in an attribute": (
        inserted(node("Neg", ["hyper.lr"], value=constant([1]))),
        "has a tensor",
    ),
    "strings in an attribute": (inserted(node("Neg", ["hyper.lr"], x=["a", "b"])), "has strings"),
    "a long string": (inserted(node("Neg", ["hyper.lr"], x="a" * 65)), "s has 65 bytes; at most 64"),
    "many integers": (inserted(node("Neg", ["hyper.lr"], x=[1] * 65)), "more than 64 of ints"),
    "a huge integer": (inserted(node("Neg", ["hyper.lr"], x=2**40)), "'x' of node 'Neg' is 1099511627776"),
    "huge integers": (inserted(node("Neg", ["hyper.lr"], x=[1, -(2**40)])), "is -1099511627776"),
    "two values": (attribute_with(setting(f=1.0)), "has field 2 too"),
    "another type": (attribute_with(setting(type=1)), "has field 3 too"),
    "an unknown type": (attribute_with(setting(type=13)), "is of type 13"),
    "no value": (attribute_with(lambda a: a.ClearField("i")), "has no value"),
    "an attribute's name twice": (
        inserted(node("Neg", ["hyper.lr"], x=1)),
        None,
    ),
    "many attributes": (
        inserted(node("Neg", ["hyper.lr"], **{f"x{i}": i for i in range(33)})),
        "more than 32 of attribute",
    ),
    "a cast to a short float": (inserted(node("Cast", ["hyper.lr"], to=17)), "element type 17"),
    "a cast to a number that is none": (
        inserted(node("Cast", ["hyper.lr"], to=1.0)),
        "element type 1.0",
    ),
    "a cast to a list": (inserted(node("Cast", ["hyper.lr"], to=[1])), r"element type \[1\]"),
    "a cast to text": (inserted(node("Cast", ["hyper.lr"], to=8)), "element type 8"),
    "random numbers of another type": (
        inserted(node("RandomNormalLike", ["hyper.lr"], dtype=10)),
        "element type 10",
    ),
    "text": (
        inserted(constants=[helper.make_tensor("c", TensorProto.STRING, [1], [b"x"])]),
        "string_data",
    ),
    "complex numbers": (
        tensor_with(setting(data_type=TensorProto.COMPLEX64, raw_data=bytes(24))),
        "element type 14",
    ),
    "float8": (
        tensor_with(setting(data_type=TensorProto.FLOAT8E4M3FN, raw_data=bytes(3))),
        "element type 17",
    ),
    "no element type": (tensor_with(lambda t: t.ClearField("data_type")), "element type None"),
    "typed data": (
        inserted(constants=[helper.make_tensor("c", INT64, [1], [1])]),
        "has int64_data",
    ),
    "too few bytes": (tensor_with(setting(raw_data=bytes(16))), r"16 bytes; its shape \[3\] needs 24"),
    "too many bytes": (tensor_with(setting(raw_data=bytes(25))), "25 bytes"),
    "no bytes": (tensor_with(lambda t: t.dims.__setitem__(0, 2**62)), "24 bytes"),
    "a negative side": (tensor_with(lambda t: t.dims.__setitem__(0, -1)), "side of -1"),
    "sides that wrap": (tensor_with(lambda t: t.dims.extend([2**32, 2**32])), "24 bytes"),
    "vast and empty": (
        tensor_with(lambda t: (t.dims.insert(0, 0), t.dims.append(2**62), setting(raw_data=b"")(t))),
        r"is empty, with the sides \[0, 3, 4611686018427387904\]",
    ),
    "high rank": (tensor_with(lambda t: t.dims.extend([1] * 16)), "more than 16 of dims"),
    "a name without end": (tensor_with(setting(name="n" * 1001)), "1001 bytes; at most 1000"),
    "no name": (tensor_with(lambda t: t.ClearField("name")), "has no name"),
    "a bool of 2": (
        tensor_with(setting(data_type=TensorProto.BOOL, raw_data=b"\0\1\2")),
        "not all of it is 0 or 1",
    ),
    "a file": (
        tensor_with(
            lambda t: (
                setting(data_location=1)(t),
                setting(key="location", value="/etc/passwd")(t.external_data.add()),
            )
        ),
        "refers to a file",
    ),
    "a file without a place": (
        tensor_with(
            lambda t: setting(key="location", value="../x")(t.external_data.add())
        ),
        "refers to a file",
    ),
    "the constants' name twice": (
        inserted(constants=[constant([1]), constant([2])]),
        "name 'c' is given twice",
    ),
    "an input's name": (inserted(constants=[constant([1], name="hyper.lr")]), "name of an input"),
    "a node's name twice": (
        inserted(node("Neg", ["hyper.lr"]), node("Abs", ["hyper.lr"])),
        "name 'new' is given twice",
    ),
    "an input made again": (inserted(node("Neg", ["hyper.lr"], ["slot.1.bias"])), "is given twice"),
    "one node, one name twice": (
        inserted(node("Dropout", ["hyper.lr"], ["new", "new"])),
        "is given twice",
    ),
    "a use before": (
        inserted(node("Neg", ["later"]), node("Abs", ["hyper.lr"], ["later"])),
        "before it is made",
    ),
    "a circle": (inserted(node("Neg", ["new"])), "uses 'new' before it is made"),
    "a result of nothing": (inserted(node("Neg", ["hyper.lr"], [])), "makes nothing"),
    "unnamed results": (inserted(node("Neg", ["hyper.lr"], [""])), "makes nothing"),
    "an unknown input": (
        lambda m: m.graph.input.append(helper.make_tensor_value_info("x", FLOAT, [1])),
        "unknown input 'x'",
    ),
    "an input twice": (lambda m: m.graph.input.append(m.graph.input[0]), "input 'features' twice"),
    "an input less": (lambda m: m.graph.input.pop(), "lacks input"),
    "an output less": (lambda m: m.graph.output.pop(), "lacks output"),
    "an output twice": (lambda m: m.graph.output.append(m.graph.output[0]), "output 'loss' twice"),
    "an output that nobody makes": (
        lambda m: m.graph.node.remove(next(n for n in m.graph.node if "loss" in n.output)),
        "no node makes output 'loss'",
    ),
    "a fixed batch": (
        lambda m: setting(dim_value=8)(m.graph.input[0].type.tensor_type.shape.dim[0]),
        "input 'features'",
    ),
    "another type of input": (
        lambda m: setting(elem_type=7)(m.graph.input[0].type.tensor_type),
        "input 'features' is of element type 7",
    ),
    "no shape": (
        lambda m: m.graph.input[0].type.tensor_type.ClearField("shape"),
        "'features' has no shape",
    ),
    "a sequence as input": (
        lambda m: m.graph.input[0].type.sequence_type.elem_type.tensor_type.SetInParent(),
        "has a sequence",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), RULES.values(), ids=RULES)
def test_a_graph_that_breaks_a_rule_is_refused_by_name(change, message):
    data = changed(change)
    if message is None:  # the one that protobuf's own classes do not write
        made = b"\x0a\x01x\x18\x01\xa0\x01\x02"
        assert data.count(made) == 1
        both = b"\x2a\x08" + made + b"\x2a\x08" + made
        graph = onnx.load_model_from_string(data).graph
        first, rest = graph.node[0], graph.SerializeToString(deterministic=True)
        old = first.SerializeToString(deterministic=True)
        new = old.replace(b"\x2a\x08" + made, both)
        whole = rest.replace(b"\x0a" + length_of(old) + old, b"\x0a" + length_of(new) + new, 1)
        data, message = model_of(whole), "attribute 'x' twice"
    refused(data, message)


def test_values_of_data_set_no_size():
    """So that the sizes of a step are the same for any data of one shape."""
    reduced = node("ReduceSum", ["features"], ["sum"], keepdims=0)
    cast = node("Cast", ["sum"], ["n"], to=INT64)
    one = constant([1])
    row = node("Reshape", ["n", "c"], ["n1"])
    for last in (
        node("Expand", ["hyper.lr", "n1"]),
        node("ConstantOfShape", ["n1"]),
        node("Tile", ["slot.1.bias", "n1"]),
        node("Reshape", ["slot.1.bias", "n1"]),
        node("TopK", ["slot.1.bias", "n1"], ["new", "which"]),
        node("Range", ["n", "n", "n"]),
        node("Pad", ["slot.1.bias", "n1"]),
        node("Slice", ["slot.1.bias", "c", "n1"]),
        node("Resize", ["slot.1.weight", "", "", "n1"]),
    ):
        data = changed(inserted(reduced, cast, row, last, constants=[one]))
        refused(data, rf"\({last.op_type}\) takes a size from 'n1?', whose values depend on data")
    # From a shape, or from the size of anything, the same is allowed.
    shape = node("Shape", ["features"], ["shape"])
    vet(HEADER, changed(inserted(shape, node("ConstantOfShape", ["shape"]))), "train")
    size = node("Size", ["sum"], ["size"])
    grown = node("Reshape", ["size", "c"], ["n1"])
    last = node("ConstantOfShape", ["n1"])
    vet(HEADER, changed(inserted(reduced, size, grown, last, constants=[one])), "train")


def test_integers_that_depend_on_data_are_not_divided():
    """The smallest number by -1 ends the process, and no trial on zeros would show it."""
    cast = node("Cast", ["features"], ["whole"], to=INT64)
    minus = constant([-1])
    for operator, operands in (
        ("Div", ["whole", "c"]),
        ("Mod", ["whole", "c"]),
        ("Div", ["c", "whole"]),
    ):
        data = changed(inserted(cast, node(operator, operands), constants=[minus]))
        refused(data, "divides integers that depend on data")
    masked = node("Where", ["mask", "c", "whole"], ["chosen"])
    mask = node("Equal", ["whole", "whole"], ["mask"])
    data = changed(inserted(cast, mask, masked, node("Div", ["c", "chosen"]), constants=[minus]))
    refused(data, "divides integers")
    vet(HEADER, changed(inserted(node("Div", ["features", "features"]))), "train")
    shape = node("Shape", ["features"], ["shape"])
    vet(HEADER, changed(inserted(shape, node("Div", ["shape", "c"]), constants=[minus])), "train")


def test_neither_do_random_numbers():
    made = node("RandomUniformLike", ["c"], ["random"], dtype=FLOAT, high=1e12)
    cast = node("Cast", ["random"], ["n"], to=INT64)
    last = node("ConstantOfShape", ["n"])
    refused(changed(inserted(made, cast, last, constants=[constant([1])])), "depend on data")


INFER = {
    "another file": (2, "value", "/etc/passwd"),
    "a folder up": (2, "value", "../parameters.bin"),
    "another place": (0, "value", "8"),
    "another length": (1, "value", "8"),
    "another key": (0, "key", "checksum"),
}


@pytest.mark.parametrize(("entry", "field", "value"), INFER.values(), ids=INFER)
def test_slots_of_infer_lie_where_the_header_has_them(entry, field, value):
    def change(proto):
        slot = next(t for t in proto.graph.initializer if t.name == "slot.1.weight")
        setattr(slot.external_data[entry], field, value)

    refused(changed(change, "infer"), "'slot.1.weight' does not lie where", "infer")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.ClearField("external_data"), "does not lie where"),
        (lambda t: t.ClearField("data_location"), "does not lie where"),
        (setting(raw_data=bytes(16384)), "does not lie where"),
        (lambda t: t.dims.reverse() or t.dims.append(1), "not as the header has it"),
        (setting(data_type=INT64), "not as the header has it"),
        (setting(name="slot.9.weight"), "refers to a file"),
        (setting(name="x"), "refers to a file"),
        (lambda t: setting(key="x", value="y")(t.external_data.add()), "more than 3"),
    ],
)
def test_slots_of_infer_are_the_headers(change, message):
    def alter(proto):
        change(next(t for t in proto.graph.initializer if t.name == "slot.1.weight"))

    refused(changed(alter, "infer"), message, "infer")


def test_infer_has_all_its_slots_and_train_none():
    def drop(proto):
        slot = next(t for t in proto.graph.initializer if t.name == "slot.1.weight")
        proto.graph.initializer.remove(slot)

    refused(changed(drop, "infer"), "lacks initializer 'slot.1.weight'", "infer")
    infer = onnx.load_model_from_string(shipped("mlp", "infer")[1])
    slot = next(t for t in infer.graph.initializer if t.name == "slot.1.weight")
    slot.name = "c"
    refused(changed(inserted(constants=[slot])), "refers to a file")


def test_the_header_must_be_of_the_same_operator_set():
    header = msgspec.structs.replace(HEADER, opset=17)
    with pytest.raises(MalformedError, match="its header of 17"):
        vet(header, TRAIN, "train")


# -- what a step needs -----------------------------------------------------------------------------


def intermediates(proto, feeds):
    """Every value that onnxruntime computes, by name."""
    known = {value.name for value in proto.graph.output}
    for made in proto.graph.node:
        for name in made.output:
            if name and name not in known:
                proto.graph.output.add(name=name)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    session = ort.InferenceSession(proto.SerializeToString(), options)
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


@pytest.mark.parametrize("batch", [1, 7, 32])
@pytest.mark.parametrize(("plan", "what"), [g for g in GRAPHS if g[1] != "infer"])
def test_the_sizes_of_everything_in_a_shipped_graph_are_known(plan, what, batch):
    header, data = shipped(plan, what)
    graph = vet(header, data, what)
    feeds = {
        name: np.zeros([batch if side < 0 else side for side in shape], dtype)
        for name, (dtype, shape) in graph.inputs.items()
    }
    known = _Known(graph, batch)
    for made in graph.nodes:
        known.infer(made)
    for name, value in intermediates(onnx.load_model_from_string(data), feeds).items():
        assert known.shapes[name] == value.shape, name
        assert graph.types[name] == value.dtype.name, name


X = constant(np.arange(48).reshape(2, 3, 2, 4), np.float32, "x")
ONE_OPERATOR = {
    "pad": (node("Pad", ["x", "c"]), [0, 0, 1, 2, 0, 0, 3, 0]),
    "pad two axes": (node("Pad", ["x", "c", "", "d"]), [1, 2, 3, 4]),
    "tile": (node("Tile", ["x", "c"]), [1, 2, 3, 1]),
    "expand": (node("Expand", ["x", "c"]), [5, 1, 1, 2, 4]),
    "resize": (node("Resize", ["x", "", "", "c"]), [2, 3, 5, 7]),
    "reshape": (node("Reshape", ["x", "c"]), [0, -1, 2]),
    "fill": (node("ConstantOfShape", ["c"]), [3, 4]),
    "squeeze": (node("Squeeze", ["u"]), None),
    "unsqueeze": (node("Unsqueeze", ["x", "c"]), [0, -1]),
    "slice": (node("Slice", ["x", "c", "e", "d"]), [-3, 1]),
    "slice back": (node("Slice", ["x", "c", "f", "d", "g"]), [-1, 5]),
    "split": (node("Split", ["x"], ["new", "two", "three"], axis=1, num_outputs=3), None),
    "split as given": (node("Split", ["x", "c"], ["new", "two"], axis=1), [1, 2]),
    "most": (node("TopK", ["x", "k"], ["new", "which"]), None),
    "concat": (node("Concat", ["x", "x", "x"], axis=-1), None),
    "gather": (node("Gather", ["x", "c"], axis=1), [[0, 1], [2, 0]]),
    "gather elements": (node("GatherElements", ["x", "c"]), [[[[1]]]]),
    "gather nd": (node("GatherND", ["x", "c"]), [[1, 2], [0, 0], [1, 1]]),
    "flatten": (node("Flatten", ["x"], axis=2), None),
    "arg": (node("ArgMax", ["x"], axis=2, keepdims=0), None),
    "arg kept": (node("ArgMin", ["x"], axis=-1), None),
    "mean": (node("ReduceMean", ["x", "c"], keepdims=0), [1, -1]),
    "sum of all": (node("ReduceSum", ["x"]), None),
    "sum of none": (node("ReduceSum", ["x"], noop_with_empty_axes=1), None),
    "range": (node("Range", ["r", "s", "t"]), None),
    "product": (node("MatMul", ["x", "m"]), None),
    "vector": (node("MatMul", ["x", "v"]), None),
    "vector first": (node("MatMul", ["w", "x"]), None),
    "gemm": (node("Gemm", ["m", "m"], transA=1), None),
    "pool": (node("MaxPool", ["x"], ["new", "which"], kernel_shape=[2, 2], pads=[1, 0, 0, 1]), None),
    "pool up": (node("AveragePool", ["x"], kernel_shape=[1, 3], strides=[1, 2], ceil_mode=1), None),
    "conv": (node("Conv", ["x", "k4"], dilations=[1, 2], pads=[0, 1, 0, 1]), None),
    "conv back": (
        node("ConvTranspose", ["x", "k4t"], strides=[2, 3], output_padding=[1, 0]),
        None,
    ),
    "norm": (node("LayerNormalization", ["x", "v"], ["new", "mean", "deviation"]), None),
    "drop": (node("Dropout", ["x"], ["new", "mask"]), None),
    "cast": (node("Cast", ["x"], to=TensorProto.DOUBLE), None),
    "where": (node("Where", ["b", "x", "v"]), None),
    "compare": (node("Greater", ["x", "v"]), None),
    "shape": (node("Shape", ["x"], start=1, end=-1), None),
    "transpose": (node("Transpose", ["x"], perm=[2, 0, 3, 1]), None),
    "turned": (node("Transpose", ["x"]), None),
}  # fmt: skip


@pytest.mark.parametrize(("made", "values"), ONE_OPERATOR.values(), ids=ONE_OPERATOR)
def test_the_size_of_each_operators_results_is_known(made, values):
    constants = [
        X,
        constant([2, 3], name="d"),
        constant([9, 9], name="e"),
        constant([-9, 0], name="f"),
        constant([-1, -2], name="g"),
        constant([2], name="k"),
        constant(1, name="r"),
        constant(14, name="s"),
        constant(3, name="t"),
        constant(np.ones((1, 3, 1)), np.float32, "u"),
        constant(np.ones((4, 5)), np.float32, "m"),
        constant(np.ones(4), np.float32, "v"),
        constant(np.ones(2), np.float32, "w"),
        constant(np.ones((4, 3, 1, 2)), np.float32, "k4"),
        constant(np.ones((3, 4, 2, 1)), np.float32, "k4t"),
        constant([True], np.bool_, "b"),
    ]
    if values is not None:
        constants.append(constant(values))
    graph = vet(HEADER, changed(inserted(made, constants=constants)), "train")
    known = _Known(graph, 4)
    known.infer(graph.nodes[0])
    proto = helper.make_model(
        helper.make_graph([made], "g", [], [], constants),
        opset_imports=[helper.make_opsetid("", 18)],
        ir_version=10,
    )
    for name, value in intermediates(proto, {}).items():
        assert known.shapes[name] == value.shape
        assert graph.types[name] == value.dtype.name
        assert known.size(name) == value.nbytes


def test_what_does_not_fit_together_is_left_to_onnxruntime():
    for made in (
        node("MatMul", ["x", "x"]),
        node("Reshape", ["x", "c"]),
        node("Conv", ["x"], kernel_shape=[1, 1], strides=[0, 0]),
        node("Conv", ["x", "x"], strides=[0, 0]),
        node("Gather", ["x", "c"], axis=77),
        node("Concat", ["x", "x"]),
        node("Slice", ["x", "c", "c", "x"]),
        node("Transpose", ["x"], perm=[5, 6]),
        node("Range", ["c", "c", "c"]),
        node("Cast", ["x"]),
        node("Add", ["x"]),
        node("Add", ["x", "c"]),
        node("Neg", []),
    ):
        constants = [X, constant([0, 0, 0, 0, 0, 0, 0])]
        graph = vet(HEADER, changed(inserted(made, constants=constants)), "train")
        assert peak_bytes(graph, 4) > 0


def test_a_terabyte_in_plain_sight_is_seen_without_running():
    side = 2**20
    for made, values in (
        (node("Expand", ["hyper.lr", "c"]), [side, side]),
        (node("ConstantOfShape", ["c"]), [side, side]),
        (node("Tile", ["slot.1.bias", "c"]), [side * 2**15]),
        (node("Pad", ["slot.1.bias", "c"]), [0, side * side]),
        (node("Resize", ["slot.1.weight", "", "", "c"]), [side, side]),
    ):
        graph = vet(HEADER, changed(inserted(made, constants=[constant(values)])), "train")
        assert step_bytes(HEADER, graph, 1) > 2**40


def test_a_larger_batch_needs_more():
    header, data = shipped("cnn", "train")
    graph = vet(header, data, "train")
    one, many = step_bytes(header, graph, 1), step_bytes(header, graph, 64)
    assert many > 4 * one > 4 * 16 * header.n_params
