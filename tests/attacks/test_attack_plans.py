"""Hostile plans, served by a coordinator that vets nothing to a real device service among others.

Each costs its device one declined round, with a sentence that names nothing of the device, within bounded
time and memory; and the same service then takes part in a round of an honest plan.
"""

import contextlib
import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper

from covey_coordinator.config import CohortConfig, WorkConfig
from covey_device import trials
from covey_device.budget import resident_bytes
from covey_device.config import LimitsConfig
from covey_device.data import NpzData
from covey_device.preparation import TriedTrainers
from covey_device.trainer import Work
from covey_shared import wire
from covey_shared.errors import RemoteProtocolError
from covey_shared.messages import Decline
from covey_shared.vetting import PUBLIC
from hostile_plans import (
    FLOAT,
    INT64,
    bundle_of,
    bytes_of,
    constant,
    examples,
    info,
    node,
    train_model,
)
from memory_fleet import Fleet, config, go, hasten, short

MB = 1_000_000
NOT_FINITE = "its loss or parameters are not finite after training"
LIMITS = LimitsConfig(max_seconds=20.0, max_memory_mb=2000, trial_seconds=20.0)
SHORT = LimitsConfig(max_seconds=20.0, max_memory_mb=2000, trial_seconds=2.0)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    hasten(monkeypatch)


class Victims(Fleet):
    """Four devices, the first of them as it is in the field: data, trials, onnxruntime."""

    async def __aenter__(self):
        await super().__aenter__()
        self.victim, self.limits = self.seats[0], LIMITS
        features, labels = examples()
        np.savez(self.directory / "d.npz", features=features, labels=labels)
        service = self.victim.service
        service.preparation.make_trainer = TriedTrainers(
            NpzData(file="d.npz"), self.directory, self.directory / "state", lambda: self.limits
        )
        service.preparation.limits = Work(1000, 1, LIMITS.max_seconds, LIMITS.max_memory_mb * MB)
        self.rounds, self.gate = 0, threading.Event()
        ended = service.on_ended

        def on_ended(event):
            ended(event)
            self.gate.set()

        service.on_ended = on_ended
        for seat in self.seats[1:]:
            seat.service.preparation.make_trainer = self.patient(
                seat.service.preparation.make_trainer
            )
        return self

    def patient(self, make):
        """The others check in when the victim has made up its mind: nothing waits for a deadline."""

        def wait_and_make(header, graph):
            assert self.gate.wait(60)
            return make(header, graph)

        return wait_and_make

    async def serve(self, bundle, goal=4):
        """A round of this plan -> what the victim's part in it came to, and who survived."""
        self.bundle, self.rounds = bundle, self.rounds + 1
        self.victim.ended.clear()
        if goal == 4:
            self.gate.set()
        else:
            self.gate.clear()
        settings = config(
            rounds=1,
            cohort=CohortConfig(goal=goal, minimum=3),
            work=WorkConfig(batches=6, batch_size=16, seconds=30.0),
            deadlines=short(gather_s=30.0, collect_s=30.0, share_s=10.0, unmask_s=10.0),
        )
        await self.play(self.run(settings, f"run-{self.rounds}"))
        await self.until(lambda: bool(self.victim.ended))
        return self.victim.ended[-1].outcome, self.outcomes[-1].completed.survivors

    async def serve_honest(self):
        outcome, survivors = await self.serve(bundle_of(train_model(), f"honest-{self.rounds}"))
        assert self.victim.name in survivors, outcome
        assert len(survivors) == 4

    async def refuse(self, name, bundle, expected, *, late=False):
        """One declined round, and no more. late: after the device has checked in."""
        start, before, mark = time.monotonic(), resident_bytes(), len(self.network.log)
        _, survivors = await self.serve(bundle, 4 if late else 3)
        assert len(survivors) == 3, name
        assert self.victim.name not in survivors, name
        (reason,) = self.declined_since(mark)
        assert reason in expected, name
        assert time.monotonic() - start < 60
        assert resident_bytes() - before < 700 * MB, name

    def declined_since(self, mark):
        """What the victim told everybody."""
        for sender, topic, payload in self.network.log[mark:]:
            if (sender, topic) == (self.victim.name, self.topics.outbox(self.victim.name)):
                with contextlib.suppress(RemoteProtocolError):
                    yield wire.decode_as(Decline, payload).message.reason


# -- what breaks the rules --------------------------------------------------------------------------


def loop(trips, body_nodes=(), name="Loop"):
    """A node that runs a graph again and again. trips: names a constant; "" for without end."""
    body = helper.make_graph(
        [node("Identity", ["going"], ["go_on"]), node("Neg", ["carried"], ["after"]), *body_nodes],
        "body",
        [
            info("i", INT64, []),
            info("going", TensorProto.BOOL, []),
            info("carried", FLOAT, []),
        ],
        [info("go_on", TensorProto.BOOL, []), info("after", FLOAT, [])],
    )
    return node(name, [trips, "true", "hyper.lr"], ["h"], body=body)


def deep_branches(depth):
    inside = helper.make_graph([node("Neg", ["hyper.lr"], ["v"])], "g", [], [info("v", FLOAT, [])])
    for _ in range(depth):
        branch = node("If", ["true"], ["v"], then_branch=inside, else_branch=inside)
        inside = helper.make_graph([branch], "g", [], [info("v", FLOAT, [])])
    return node("If", ["true"], ["h"], then_branch=inside, else_branch=inside)


def reading(location, **more):
    """A constant that refers to a file."""
    tensor = TensorProto(
        name="stolen", data_type=FLOAT, dims=[4], data_location=TensorProto.EXTERNAL
    )
    for key, value in ({"location": location, "offset": "0", "length": "16"} | more).items():
        tensor.external_data.add(key=key, value=value)
    return train_model(node("Neg", ["stolen"]), constants=[tensor])


def changed(change):
    proto = train_model()
    change(proto)
    return proto


def with_function():
    proto = train_model(node("Spin", ["hyper.lr"], domain="local"))
    opset = helper.make_opsetid("", 18)
    body = [helper.make_node("Neg", ["a"], ["b"])]
    proto.functions.append(helper.make_function("local", "Spin", ["a"], ["b"], body, [opset]))
    proto.opset_import.append(helper.make_opsetid("local", 1))
    return proto


def custom_domain():
    product = node("FusedMatMul", ["features", "slot.w"], domain="com.microsoft")
    proto = train_model(product)
    proto.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    return proto


TRUE = constant("true", True, np.bool_)
COUNT = [
    node("ReduceSum", ["features"], ["sum"], keepdims=0),
    node("Mul", ["sum", "much"], ["grown"]),
    node("Cast", ["grown"], ["count"], to=INT64),
    node("Reshape", ["count", "one"], ["size"]),
]
COUNTED = [constant("much", 1e12, np.float32), constant("one", [1])]
GOOD = bytes_of(train_model())

RULES = {
    "a loop without end": train_model(loop(""), constants=[TRUE]),
    "loops in a loop": train_model(
        loop("often", [loop("often", name="Loop")]),
        constants=[TRUE, constant("often", 10**9)],
    ),
    "a scan": train_model(
        node("Scan", ["features"], body=helper.make_graph([], "b", [], []), num_scan_inputs=1)
    ),
    "branches 12 deep, twice as many each time": train_model(deep_branches(12), constants=[TRUE]),
    "graphs 30,000 deep": GOOD[:-8] + b"\x0a\x80\x80\x02" * 30_000,
    "groups 30,000 deep": GOOD + b"\x4b" * 30_000,
    "a custom domain": custom_domain(),
    "a function": with_function(),
    "the passwords": reading("/etc/passwd"),
    "a file next door": reading("../d.npz"),
    "a file that is there": reading("d.npz"),
    "the device's memory": reading("*/_ORT_MEM_ADDR_/*", offset="4096"),
    "a file behind a checksum": reading("d.npz", checksum="0" * 40),
    "an attribute of a megabyte": train_model(node("Neg", ["hyper.lr"], x="a" * MB)),
    "an attribute of a million numbers": train_model(node("Neg", ["hyper.lr"], x=[1] * MB)),
    "one name twice": train_model(node("Neg", ["hyper.lr"]), node("Abs", ["hyper.lr"])),
    "a circle": train_model(node("Neg", ["b"], ["h"]), node("Abs", ["h"], ["b"])),
    "a million nodes": b"\x08\x0a\x3a\x80\x89\x7a" + b"\x0a\x00" * MB,
    "text": train_model(
        node("Neg", ["s"]), constants=[helper.make_tensor("s", TensorProto.STRING, [1], [b"x"])]
    ),
    "float8": train_model(
        node("Neg", ["s"]),
        constants=[TensorProto(name="s", data_type=17, dims=[4], raw_data=b"\x7f" * 4)],
    ),
    "complex numbers": train_model(
        node("Neg", ["s"]),
        constants=[TensorProto(name="s", data_type=14, dims=[2], raw_data=bytes(16))],
    ),
    "more sides than bytes": train_model(
        node("Neg", ["s"]),
        constants=[TensorProto(name="s", data_type=1, dims=[2**40, 2**20], raw_data=bytes(4))],
    ),
    "a size out of the data": train_model(*COUNT, node("ConstantOfShape", ["size"]), constants=COUNTED),
    "a range out of the data": train_model(
        *COUNT, node("Range", ["zero", "count", "step"]),
        constants=[*COUNTED, constant("zero", 0), constant("step", 1)],
    ),
    "a size out of chance": train_model(
        node("RandomUniformLike", ["hyper.lr"], ["grown"], high=1e12, dtype=FLOAT), *COUNT[2:],
        node("ConstantOfShape", ["size"]), constants=COUNTED,
    ),
    "as many as are not zero": train_model(node("NonZero", ["features"])),
    "a division that ends the process, for some data": train_model(
        *COUNT[:3], node("Div", ["count", "minus"], ["q"]), node("Cast", ["q"], to=FLOAT),
        constants=[*COUNTED, constant("minus", -1)],
    ),
    "an input as an output": changed(lambda p: p.graph.output.append(p.graph.input[3])),
    "an output less": changed(lambda p: p.graph.output.pop()),
    "another shape": changed(
        lambda p: setattr(p.graph.input[3].type.tensor_type.shape.dim[0], "dim_value", 2**40)
    ),
    "nothing": b"\x00",
    "half of it": GOOD[: len(GOOD) // 2],
    "two of it": GOOD + GOOD,
    "a byte more": GOOD + b"\x00",
    "a number without end": GOOD + b"\xff" * 60,
    "noise": os.urandom(2000),
}  # fmt: skip


def test_plans_that_break_the_rules(tmp_path: Path, monkeypatch):
    """None of them starts a process, or reaches onnxruntime."""

    def never(*_, **__):
        raise AssertionError("a process was started for it")

    async def scenario():
        async with Victims(tmp_path) as fleet:
            await fleet.serve_honest()
            with monkeypatch.context() as patch:
                patch.setattr(trials.subprocess, "Popen", never)
                for name, train in RULES.items():
                    await fleet.refuse(name, bundle_of(train), {PUBLIC})
            await fleet.serve_honest()

    go(scenario(), 200)


# -- what keeps the rules --------------------------------------------------------------------------

TERA = 10**12
ROOT = [  # a size that is not known before it is computed
    node("Cast", ["many"], ["real"], to=TensorProto.DOUBLE),
    node("Sqrt", ["real"], ["root"]),
    node("Mul", ["root", "root"], ["many_"]),
    node("Cast", ["many_"], ["size"], to=INT64),
]
PLAIN = [node("Identity", ["many"], ["size"])]


def large(how, size=TERA, hidden=False):
    """A tensor of so many numbers, by one operator."""
    operators = {
        "Expand": [node("Expand", ["hyper.lr", "size"])],
        "Tile": [node("Reshape", ["hyper.lr", "one"], ["row"]), node("Tile", ["row", "size"])],
        "ConstantOfShape": [node("ConstantOfShape", ["size"])],
        "Range": [
            node("Squeeze", ["size"], ["end"]),
            node("Range", ["zero", "end", "step"], ["numbers"]),
            node("Cast", ["numbers"], to=FLOAT),
        ],
        "Resize": [
            node("Reshape", ["hyper.lr", "one"], ["row"]),
            node("Resize", ["row", "", "", "size"]),
        ],
        "Pad": [
            node("Reshape", ["hyper.lr", "one"], ["row"]),
            node("Concat", ["nothing", "size"], ["pads"], axis=0),
            node("Pad", ["row", "pads"]),
        ],
    }
    constants = [
        constant("many", [size]), constant("one", [1]), constant("zero", 0), constant("step", 1),
        constant("nothing", [0]),
    ]  # fmt: skip
    return train_model(*(ROOT if hidden else PLAIN), *operators[how], constants=constants)


def chain(operator, length, hidden):
    """Twice as many with every node."""
    start = ROOT if hidden else PLAIN
    nodes = [*start, node("Expand", ["hyper.lr", "size"], ["v0"])]
    for i in range(length):
        inputs = [f"v{i}", f"v{i}"] if operator == "Concat" else [f"v{i}", "two"]
        more = {"axis": 0} if operator == "Concat" else {}
        nodes.append(node(operator, inputs, [f"v{i + 1}" if i < length - 1 else "h"], **more))
    return train_model(*nodes, constants=[constant("many", [16]), constant("two", [2])])


def product(side, n):
    """One product of large matrices, or many."""
    nodes = [*ROOT, node("Concat", ["size", "size"], ["sides"], axis=0)]
    nodes += [node("Expand", ["hyper.lr", "sides"], ["p0"])]
    nodes += [node("MatMul", ["p0", f"p{i}"], [f"p{i + 1}"]) for i in range(n)]
    return train_model(*nodes, node("Neg", [f"p{n}"]), constants=[constant("many", [side])])


MEANS = ["Expand", "Tile", "ConstantOfShape", "Range", "Resize", "Pad"]

IN_SIGHT = {
    **{f"a terabyte by {how}": large(how) for how in MEANS},
    "doubling by Concat, 40 times": chain("Concat", 40, False),
    "doubling by Tile, 40 times": chain("Tile", 40, False),
}


def test_plans_that_are_too_large_in_plain_sight(tmp_path: Path, monkeypatch):
    async def scenario():
        async with Victims(tmp_path) as fleet:
            for name, train in IN_SIGHT.items():
                await fleet.refuse(name, bundle_of(train), {trials.TOO_LARGE})
            await fleet.serve_honest()

    go(scenario(), 100)


TRIED = {
    **{f"a hidden terabyte by {how}": (large(how, TERA, True), {trials.TOO_LARGE, trials.FAILED})
       for how in MEANS},
    "hidden gigabytes": (large("ConstantOfShape", 10**9, True), {trials.TOO_LARGE}),
    "hidden doubling by Concat": (chain("Concat", 40, True), {trials.TOO_LARGE, trials.TOO_SLOW}),
    "hidden doubling by Tile": (
        chain("Tile", 40, True), {trials.TOO_LARGE, trials.TOO_SLOW, trials.FAILED},
    ),
    "one enormous product": (product(9000, 1), {trials.TOO_SLOW}),
    "many products": (product(1500, 3000), {trials.TOO_SLOW}),
    "a division that ends the process": (
        train_model(
            node("Div", ["least", "minus"], ["q"]), node("Cast", ["q"], to=FLOAT),
            constants=[constant("least", [-(2**63)]), constant("minus", [-1])],
        ),
        {trials.CRASHED},
    ),
    "the same in a step, on every batch": (
        train_model(
            node("Shape", ["features"], ["n"]), node("Sub", ["n", "n"], ["none"]),
            node("Add", ["none", "least"], ["l"]), node("Add", ["none", "minus"], ["m"]),
            node("Mod", ["l", "m"], ["q"]), node("Cast", ["q"], to=FLOAT),
            constants=[constant("least", [-(2**63)]), constant("minus", [-1])],
        ),
        {trials.CRASHED},
    ),
    "an index out of range": (
        train_model(node("Gather", ["features", "far"], axis=0), constants=[constant("far", [10**9])]),
        {trials.FAILED},
    ),
    "what onnxruntime cannot load": (train_model(node("Conv", ["hyper.lr"])), {trials.FAILED}),
}  # fmt: skip


@pytest.mark.parametrize("name", TRIED)
def test_plans_that_keep_the_rules(tmp_path: Path, name):
    """A child process may be lost; the service stays, and plays the next round."""

    async def scenario():
        train, expected = TRIED[name]
        async with Victims(tmp_path) as fleet:
            fleet.limits = SHORT if trials.TOO_SLOW in expected else LIMITS
            await fleet.refuse(name, bundle_of(train), expected)
            fleet.limits = LIMITS
            await fleet.serve_honest()

    go(scenario(), 100)


def test_a_plan_that_is_hostile_to_one_size_of_batch(tmp_path: Path):
    """Batches have 16 examples; the last one of an epoch has 8, and for it alone there is too much."""
    trap = [
        node("Shape", ["features"], ["n"], end=1),
        node("Equal", ["n", "eight"], ["is_eight"]),
        node("Where", ["is_eight", "much", "one"], ["size"]),
        node("ConstantOfShape", ["size"]),
    ]
    constants = [constant("eight", [8]), constant("much", [TERA]), constant("one", [1])]

    async def scenario():
        async with Victims(tmp_path) as fleet:
            bundle = bundle_of(train_model(*trap, constants=constants))
            await fleet.refuse("a trap for the last batch", bundle, {trials.TOO_LARGE}, late=True)
            await fleet.serve_honest()

    go(scenario(), 100)


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_plans_whose_results_are_not_finite(tmp_path: Path, value):
    made = {
        "nan": [node("Sub", ["features", "features"], ["z"]), node("Div", ["z", "z"])],
        "inf": [node("Exp", ["features"], ["e"]), node("Mul", ["e", "much"])],
    }[value]

    async def scenario():
        async with Victims(tmp_path) as fleet:
            train = train_model(*made, constants=[constant("much", 3e38, np.float32)])
            await fleet.refuse(value, bundle_of(train), {NOT_FINITE}, late=True)
            await fleet.serve_honest()

    go(scenario(), 100)


def test_a_plan_whose_outputs_are_its_inputs_gives_no_update(tmp_path: Path):
    """The model as it was: nothing is gained by it, and nothing of memory is mixed up."""
    proto = train_model()
    del proto.graph.node[-3:]
    proto.graph.node.append(node("Identity", ["slot.w"], ["next.slot.w"]))

    async def scenario():
        async with Victims(tmp_path) as fleet:
            bundle = bundle_of(proto)
            outcome, survivors = await fleet.serve(bundle)
            assert fleet.victim.name in survivors, outcome
            trainer = fleet.victim.service.preparation.plan[2]
            assert (trainer._step.parameters() == bundle.initial).all()
            await fleet.serve_honest()

    go(scenario(), 100)


def test_a_trial_ends_with_its_round(tmp_path: Path):
    """One that would go on for long does not keep the device from the next round."""

    async def scenario():
        async with Victims(tmp_path) as fleet:
            fleet.gate.set()
            fleet.limits = LimitsConfig(max_memory_mb=2000)
            fleet.bundle = bundle_of(product(1500, 8000), "slow")
            await fleet.play(fleet.run(config(rounds=1, deadlines=short(gather_s=1.0)), "slow"))
            assert fleet.victim.name not in fleet.outcomes[-1].completed.survivors
            await fleet.serve_honest()

    start = time.monotonic()
    go(scenario(), 100)
    assert time.monotonic() - start < 40  # of the 60 that a trial may take
