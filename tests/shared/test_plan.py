"""The plan's header: canonical bytes, and whatever else arrives is refused by the right error."""

import hashlib
import json

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from covey_shared import plan
from covey_shared.errors import MalformedError
from covey_shared.layout import Layout, layout_of
from covey_shared.plan import (
    GraphRef,
    Hyperparameter,
    PlanHeader,
    TensorSpec,
    check_graph,
    decode_header,
    encode_header,
    plan_hash,
)

REF = GraphRef(sha256="ab" * 32, size=10)
HEADER = PlanHeader(
    format=1,
    name="digits",
    loss="cross_entropy",
    optimizer="sgd(momentum=0.9)",
    opset=18,
    features=TensorSpec(name="features", dtype="float32", shape=(1, 8, 8)),
    labels=TensorSpec(name="labels", dtype="int64", shape=()),
    classes=10,
    hyperparameters=(Hyperparameter(name="lr", default=0.1),),
    layout=layout_of({"w": ((10, 64), "parameter"), "mean": ((), "buffer")}),
    state=(TensorSpec(name="momentum.w", dtype="float32", shape=(10, 64)),),
    metrics=("loss_sum", "examples", "correct"),
    train=REF,
    eval=REF,
    infer=REF,
    versions={"torch": "2.13.0", "onnx": "1.23.2"},
)
BYTES = encode_header(HEADER)


def changed(**fields):
    return encode_header(msgspec.structs.replace(HEADER, **fields))


def test_a_header_is_read_as_it_was_written():
    assert decode_header(BYTES) == HEADER
    assert encode_header(decode_header(BYTES)) == BYTES


def test_the_plan_hash_is_the_headers_and_pins_the_graphs():
    assert plan_hash(BYTES) == hashlib.sha256(BYTES).digest()
    other = GraphRef(sha256="cd" * 32, size=10)
    assert plan_hash(changed(train=other)) != plan_hash(BYTES)


def test_a_graph_is_held_to_its_digest_and_size():
    data = b"graph"
    ref = GraphRef(sha256=hashlib.sha256(data).hexdigest(), size=5)
    check_graph(ref, data, "train.onnx")
    for wrong in (b"grapH", b"graph!", b""):
        with pytest.raises(MalformedError, match=r"train\.onnx"):
            check_graph(ref, wrong, "train.onnx")
    with pytest.raises(MalformedError):
        check_graph(msgspec.structs.replace(ref, size=6), data, "train.onnx")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{}",
        b"null",
        b"\xff\xfe",
        b"[" * 100_000,
        BYTES[:-1],
        BYTES + b" ",
        BYTES.replace(b" ", b""),  # the same fields, but other bytes
        BYTES.replace(b'"format": 1', b'"format": 1.0'),
        json.dumps(json.loads(BYTES), indent=1, sort_keys=True).encode(),
        BYTES.replace(b'"digits"', b'"dig\\u0069ts"'),
        BYTES.replace(b'"digits"', b'"\\ud800"'),
        BYTES.replace(b'"digits"', b'"a\\u001b[31m"'),
        BYTES.replace(b'"digits"', b'"' + b"a" * 201 + b'"'),
        BYTES.replace(b'"digits"', b'"a", "name": "digits"'),
        BYTES.replace(b'"opset": 18', b'"opset": 18, "more": 1'),
        BYTES.replace(b'"default": 0.1', b'"default": 1e999'),
        BYTES.replace(b'"default": 0.1', b'"default": null'),
        BYTES.replace(b"ab" * 32, b"AB" * 32),
        b" " * (plan.MAX_HEADER_BYTES + 1),
    ],
    ids=range(20),
)
def test_other_bytes_are_malformed(data):
    with pytest.raises(MalformedError):
        decode_header(data)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"format": 2}, "format 2, this covey reads 1: compile the plan again or upgrade"),
        ({"layout": Layout(())}, "has 0 parameters"),
        (
            {"layout": layout_of({"w": ((1 << 15, 1 << 15), "parameter")})},
            f"has {1 << 30} parameters; 1 to {plan.MAX_PARAMETERS}",
        ),
        (
            {"state": (TensorSpec(name="v", dtype="float32", shape=(1 << 30,)),)},
            f"{1 << 30} numbers of state; at most",
        ),
        ({"state": HEADER.state * 2}, r"state tensor 'momentum\.w' twice"),
        ({"hyperparameters": HEADER.hyperparameters * 2}, "hyper-parameter 'lr' twice"),
        ({"metrics": ("examples", "examples")}, "metric 'examples' twice"),
        ({"train": GraphRef(sha256="ab" * 32, size=plan.MAX_GRAPH_BYTES + 1)}, "size"),
        ({"classes": 0}, "classes"),
        ({"features": TensorSpec(name="f", dtype="float32", shape=(0,))}, "shape"),
    ],
)
def test_what_a_header_may_not_say(fields, message):
    with pytest.raises(MalformedError, match=message):
        decode_header(changed(**fields))


def test_an_error_quotes_no_more_of_a_header_than_a_line_holds():
    with pytest.raises(MalformedError, match="unknown field `xxx") as caught:
        plan.decode_header(b'{"' + b"x" * 100_000 + b'": 1}')
    assert len(str(caught.value)) < 400


@given(st.binary(max_size=300))
def test_arbitrary_bytes_raise_nothing_else(data):
    with pytest.raises(MalformedError):
        decode_header(data)


@given(st.data())
def test_mutated_headers_raise_nothing_else(data):
    """A header with bytes changed, dropped or put in is refused, or is canonical itself."""
    mutated = bytearray(BYTES)
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(mutated) - 1))
        action = data.draw(st.sampled_from(["set", "drop", "insert"]))
        if action == "drop":
            del mutated[place]
        elif action == "set":
            mutated[place] = data.draw(st.integers(0, 255))
        else:
            mutated.insert(place, data.draw(st.sampled_from(b'0123456789-.eE"\\{}[],: ntfu')))
    try:
        header = decode_header(bytes(mutated))
    except MalformedError:
        return
    assert encode_header(header) == bytes(mutated)
