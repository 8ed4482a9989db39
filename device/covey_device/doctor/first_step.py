"""Whether onnxruntime trains as it should: three steps of a tiny plan, against torch's numbers.

The plan lies in ``plan/`` beside this file: the header, the training graph, the initial values, and in
``expected.json`` the batch and what torch made of it. `covey_fleet.models` writes all of them (``make
plans``). The steps run in a process of their own, ``python -m covey_device.doctor.first_step``, which says
what came out; here it is compared.
"""

import sys
from importlib.resources import files
from typing import Any

import msgspec

from covey_device.doctor.children import run
from covey_device.doctor.findings import Finding
from covey_device.doctor.known_answers import REINSTALL

TOLERANCE = 1e-5
"""Between two machines' orders of adding floats; a step that is wrong is off by more than a thousandth."""


class Numbers(msgspec.Struct, frozen=True):
    """losses: of each step, before it. parameters: after the last."""

    losses: list[float]
    parameters: list[float]


class Expected(msgspec.Struct, frozen=True):
    """features, labels: one batch, trained on again and again. What torch made of it."""

    features: list[list[float]]
    labels: list[int]
    numbers: Numbers


def read(name: str) -> bytes:
    """A file of the tiny plan."""
    return files("covey_device.doctor").joinpath("plan", name).read_bytes()


def expected() -> Expected:
    """What has to come out."""
    return msgspec.json.decode(read("expected.json"), type=Expected)


def train() -> Numbers:
    """Run the steps in this process."""
    import numpy as np

    from covey_shared.plan import check_graph, decode_header
    from covey_shared.runtime import TrainStep

    known = expected()
    header, graph = decode_header(read("plan.json")), read("train.onnx")
    check_graph(header.train, graph, "train.onnx")
    step = TrainStep(header, graph)
    step.load(np.frombuffer(read("initial.bin"), "<f4").astype(np.float32))
    features, labels = np.array(known.features, np.float32), np.array(known.labels, np.int64)
    losses = [step.step(features, labels) for _ in known.numbers.losses]
    return Numbers(losses, step.parameters().tolist())


def first_step() -> Finding:
    """Have them run in a child, and compare."""
    check = "training"
    ended = run("covey_device.doctor.first_step")
    try:
        found: Any = msgspec.json.decode(ended.output, type=Numbers)
    except msgspec.MsgspecError:
        why = "; ".join(part for part in (ended.why, ended.error) if part) or "it said nothing"
        return Finding(check, "problem", f"a step of a tiny plan failed: {why}", REINSTALL)
    return compare(found, expected().numbers)


def compare(found: Numbers, known: Numbers) -> Finding:
    """What came out, against what has to."""
    check = "training"
    pairs = [
        *zip(found.losses, known.losses, strict=False),
        *zip(found.parameters, known.parameters, strict=False),
    ]
    whole = len(pairs) == len(known.losses) + len(known.parameters)
    worst = max((abs(a - b) if a == a else float("inf") for a, b in pairs), default=float("inf"))
    if not whole or worst > TOLERANCE:
        return Finding(
            check, "problem",
            f"{len(known.losses)} steps of a tiny plan give other numbers than torch, by {worst:.2g}",
            REINSTALL,
        )  # fmt: skip
    return Finding(
        check, "ok",
        f"{len(known.losses)} steps of a tiny plan give torch's numbers, to {max(worst, 1e-9):.0e}",
    )  # fmt: skip


if __name__ == "__main__":
    sys.stdout.buffer.write(msgspec.json.encode(train()))
