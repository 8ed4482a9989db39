"""A plan's header: any text, and what a device computes from one that it accepted."""

import contextlib
import hashlib
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

import covey_fleet
from covey_shared import plan
from covey_shared.errors import MalformedError
from covey_shared.layout import Layout, Slot, layout_of
from covey_shared.plan import GraphRef, Hyperparameter, PlanHeader, TensorSpec
from covey_shared.vetting import ports
from fuzz import msgpack
from fuzz.harness import Mutate, Run, Target, expect

_PLANS = Path(covey_fleet.__file__).parent / "plans"


def _read(data: bytes) -> list[str]:
    header = plan.decode_header(data)
    expect(plan.encode_header(header) == data, "an accepted header encodes to other bytes")
    expect(0 < header.n_params <= plan.MAX_PARAMETERS, "as many parameters as there may be")
    end = 0
    for slot in header.layout.slots:
        expect(slot.offset == end, "slots without gaps")
        end += slot.size
    expect(end == header.n_params, "slots that fill the vector")
    for what in ("train", "eval", "infer"):
        inputs, outputs = ports(header, what)
        expect(bool(inputs) and outputs is not None, "ports")
    return [
        f"a header of {header.loss}, {len(header.layout.slots).bit_length() * 'x'}",
        _graph(header, data),
    ]


def _graph(header: PlanHeader, data: bytes) -> str:
    """The bytes that a header names, and others."""
    mine = GraphRef(sha256=hashlib.sha256(data).hexdigest(), size=len(data))
    plan.check_graph(mine, data, "train.onnx")
    try:
        plan.check_graph(header.train, data, "train.onnx")
    except MalformedError:
        return "another graph"
    raise AssertionError("a header that names itself")


@contextlib.contextmanager
def ready() -> Iterator[Run]:
    """Nothing to make."""
    yield _read


def _mutate(data: bytes, longest: int, chance: random.Random, mutate: Mutate) -> bytes:
    """A value changed, and the text put into the one form that is accepted."""
    try:
        value: Any = json.loads(data)
    except (ValueError, RecursionError):
        return mutate(data, longest)
    if chance.random() < 0.15:
        return mutate(data, longest)
    try:
        for _ in range(chance.choice((1, 1, 2, 4))):
            value = msgpack.changed(value, chance, mutate, longest)
        if chance.random() < 0.5:
            _lay_out(value)
        text = msgspec.json.encode(value)
        with contextlib.suppress(msgspec.MsgspecError):
            text = msgspec.json.encode(
                msgspec.json.decode(text, type=PlanHeader), order="deterministic"
            )
        made = msgspec.json.format(text, indent=1)
    except (msgspec.MsgspecError, TypeError, ValueError, RecursionError):
        return mutate(data, longest)
    return made if len(made) <= longest else data


def _lay_out(value: Any) -> None:
    """Offsets that fit, where there are slots."""
    end = 0
    with contextlib.suppress(LookupError, TypeError, AttributeError):
        for slot in value["layout"]["slots"]:
            slot["offset"] = end
            for side in slot["shape"] or [1]:
                end += side if slot["shape"][1:] == [] else 0
            if slot["shape"][1:]:
                size = 1
                for side in slot["shape"]:
                    size *= side
                end += size


def _seeds() -> Iterator[bytes]:
    for path in sorted(_PLANS.glob("*/plan.json")):
        yield path.read_bytes()
    yield plan.encode_header(small())
    yield b'{"' + b"x" * 9000 + b'": 1}'
    yield b'{"format": 1, "name": "' + b"x" * 9000 + b'", "loss": "' + b"y" * 5000 + b'"}'
    gap = Layout((Slot(name="w", shape=(3, 1), offset=1, role="parameter"),))
    yield plan.encode_header(small(layout=gap))


def small(**changes: Any) -> PlanHeader:
    """The header of a plan of linear regression."""
    ref = GraphRef(sha256="0" * 64, size=1)
    return msgspec.structs.replace(
        PlanHeader(
            format=1,
            name="regression",
            loss="mse",
            optimizer="sgd",
            opset=18,
            features=TensorSpec(name="features", dtype="float32", shape=(3,)),
            labels=TensorSpec(name="labels", dtype="float32", shape=(1,)),
            hyperparameters=(Hyperparameter(name="lr", default=0.01),),
            layout=layout_of({"w": ((3, 1), "parameter")}),
            state=(),
            metrics=("loss_sum", "examples"),
            train=ref,
            eval=ref,
            infer=ref,
            versions={},
        ),
        **changes,
    )


TARGET = Target(
    "header",
    ready,
    # Slots and tensors as objects, the text once more to compare it, and the text as it is formatted.
    memory=lambda n: 64 * 1024 + 64 * min(n, plan.MAX_HEADER_BYTES),
    seeds=_seeds,
    mutate=_mutate,
    words=(
        *(f'"{name}"'.encode() for name in PlanHeader.__struct_fields__),
        *(
            b'"float32"',
            b'"shape"',
            b'"offset"',
            b'"role"',
            b'"buffer"',
            b"4294967296",
            b"1e999",
            b"null",
        ),
    ),
    longest=16 * 1024,
)
