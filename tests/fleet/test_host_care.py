"""Fleets on machines that have limits: who is not fit declines, who overheats gives what it has."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from covey_coordinator.config import WorkConfig
from covey_device.data import source_of_arrays
from covey_device.host import readings
from covey_device.host.care import Care
from covey_device.host.config import HostConfig
from covey_device.host.decisions import Decisions
from covey_device.host.port import FILE, LocalPort, ask
from covey_device.trainer import Trainer, TrainResult, Work
from covey_shared.fixedpoint import to_signed
from covey_shared.plan import decode_header
from covey_shared.runtime import TrainStep
from device_support import FakeClock
from fake_host import FakeHost, pi_4
from memory_fleet import PLAN, Fleet, Seat, config, go, hasten

BATCHES = WorkConfig(batches=20, batch_size=4, seconds=600.0)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    hasten(monkeypatch)


class Machine:
    """What a device runs on. Its time is that of the batches, so that each looks at it."""

    def __init__(self, seat: Seat, root: Path, conditions: HostConfig | None = None) -> None:
        self.seat, self.host = seat, pi_4(root)
        self.clock = FakeClock(0.0)
        self.conditions = conditions or HostConfig()
        self.care = Care(
            lambda: self.conditions,
            Decisions(seat.directory),
            lambda interfaces: readings.read(root, interfaces),
            veto_file=seat.directory / "veto",
            clock=self.clock,
            minute=lambda: None,
            wait=self._wait,
        )
        self.on_wait: Callable[[], None] = lambda: None
        seat.service.care = self.care

    def _wait(self, seconds: float) -> None:
        time.sleep(0.005)
        self.clock.now += seconds
        self.on_wait()

    def heat(self, celsius: float) -> None:
        self.host.zone(celsius)

    def decided(self) -> list[tuple[str, str]]:
        return [(d.what, d.why) for d in self.care.decisions.all()]


class Training:
    """A real trainer on the plan that is shipped."""

    def __init__(self, machine: Machine) -> None:
        header = decode_header((PLAN / "plan.json").read_bytes())
        chance = np.random.default_rng(5)
        features = chance.random((40, *header.features.shape)).astype(np.float32)
        labels = chance.integers(0, 10, 40)
        step = TrainStep(header, (PLAN / "train.onnx").read_bytes())
        self.trainer = Trainer(step, source_of_arrays(features, labels, header), header)
        self.machine = machine
        self.batches = 0
        self.after: Callable[[int], None] = lambda batches: None
        self.results: list[TrainResult] = []
        real = step.step

        def stepped(*arguments: Any) -> float:
            loss = real(*arguments)
            self.batches += 1
            machine.clock.now += 2.5
            self.after(self.batches)
            return loss

        step.step = stepped  # type: ignore[method-assign]

    def refresh(self) -> None:
        self.trainer.refresh()

    def train(self, parameters: Any, work: Work, **rest: Any) -> TrainResult:
        result = self.trainer.train(
            parameters,
            replace(work, max_resident_bytes=10**12),
            **rest | {"clock": self.machine.clock},
        )
        self.results.append(result)
        return result


def weight_of(fleet: Fleet, name: Any, round_id: int = 1) -> float:
    """Examples that a device's update counts for in the sum, from what it encoded."""
    encoding = fleet.sums[round_id].encoding
    ring = to_signed(fleet.plain[round_id, name], encoding.bits)
    at = encoding.n_params if hasattr(encoding, "n_params") else len(ring) - 2
    return float(ring[at]) * encoding.w_max / (2 ** (encoding.value_bits - 1) - 1)


async def outcome(fleet: Fleet, work: WorkConfig = BATCHES) -> tuple[str, ...]:
    """Who is in the sum of a round."""
    await fleet.play(fleet.run(config(rounds=1, work=work)))
    completed = fleet.outcomes[-1].completed
    return () if completed is None else tuple(completed.survivors)


def test_a_device_that_overheats_in_mid_training_gives_what_it_has(tmp_path: Path):
    async def scenario() -> None:
        async with Fleet(tmp_path) as fleet:
            seat = fleet.seats[1]
            machine = Machine(seat, tmp_path / "host")
            seat.trainer = training = Training(machine)  # type: ignore[assignment]
            training.after = lambda batches: machine.heat(83.4) if batches == 3 else None
            assert await outcome(fleet) == ("pi-0", "pi-1", "pi-2", "pi-3")  # every sum is checked
            await fleet.until(lambda: bool(seat.ended))
            assert seat.ended[0].contributed
            (result,) = training.results
            assert (result.stopped_by, result.batches, result.examples) == ("host", 3, 12)
            assert weight_of(fleet, seat.name) == pytest.approx(12, rel=0.02)
            assert machine.decided() == [
                ("ended early", "83.4 C, ended from 80 on (host.stop_c)"),
                ("took part", "its update is in the sum"),
            ]

    go(scenario())


def test_a_device_that_pauses_takes_part_with_all_its_batches(tmp_path: Path):
    async def scenario() -> None:
        async with Fleet(tmp_path) as fleet:
            seat = fleet.seats[2]
            machine = Machine(seat, tmp_path / "host")
            seat.trainer = training = Training(machine)  # type: ignore[assignment]
            training.after = lambda batches: machine.heat(77.0) if batches == 2 else None
            machine.on_wait = lambda: machine.heat(60.0) if machine.clock.now > 20 else None
            lines: list[str] = []
            seat.service.on_status = lines.append
            assert (
                len(await outcome(fleet, WorkConfig(batches=12, batch_size=4, seconds=60.0))) == 4
            )
            (result,) = training.results
            assert (result.stopped_by, result.batches) == ("batches", 12), machine.decided()
            assert [what for what, _ in machine.decided()][:2] == ["paused", "resumed"]
            paused = "training paused: 77.0 C, paused from 75 on (host.pause_c) until below 70"
            assert f"round 1: {paused}" in lines

    go(scenario())


@pytest.mark.parametrize(
    ("change", "words", "line"),
    [
        (
            lambda host: host.zone(71.0),
            "its host is too hot",
            "71.0 C, not until below 70 (host.start_below_c)",
        ),
        (
            lambda host: host.throttled(0x50005),
            "its host's power supply is too weak",
            "the voltage is too low",
        ),
        (
            lambda host: host.memory(70),
            "its host has too little memory free",
            "70 MB of memory available",
        ),
        (lambda host: host.route("wwan0"), "its host is on a metered network", "wwan0 is metered"),
    ],
    ids=["hot", "voltage", "memory", "metered"],
)
def test_a_machine_that_is_not_fit_declines_before_anything_is_fetched(
    tmp_path: Path, change: Callable[[FakeHost], Any], words: str, line: str
):
    async def scenario() -> None:
        async with Fleet(tmp_path) as fleet:
            seat = fleet.seats[1]
            machine = Machine(seat, tmp_path / "host")
            change(machine.host)
            assert await outcome(fleet, config().work) == ("pi-0", "pi-2", "pi-3")
            assert seat.made == 0  # no plan came
            assert seat.ended[0].outcome == f"declined: {words}"
            ((what, why),) = machine.decided()
            assert what == "declined"
            assert why.startswith(line)
            # and the coordinator keeps the words, and no number
            kept = list(fleet.coordinator.store.device_rounds(seat.name, 10))
            assert words in repr(kept)
            assert line not in repr(kept)

    go(scenario())


def test_an_owner_who_tells_nothing(tmp_path: Path):
    async def scenario() -> None:
        async with Fleet(tmp_path) as fleet:
            seat = fleet.seats[1]
            machine = Machine(seat, tmp_path / "host", HostConfig(tell=False))
            machine.host.zone(90.0)
            assert len(await outcome(fleet, config().work)) == 3
            assert seat.ended[0].outcome == "declined: its owner's conditions are not met"
            assert not any(b"too hot" in data for _, _, data in fleet.network.log)
            assert machine.decided()[0][1].startswith("90.0 C")  # its owner knows

    go(scenario())


def test_too_hot_by_the_time_of_the_first_batch(tmp_path: Path):
    """It joined, and has nothing to give; the others' sum is whole."""

    async def scenario() -> None:
        async with Fleet(tmp_path) as fleet:
            seat = fleet.seats[1]
            machine = Machine(seat, tmp_path / "host")
            seat.trainer = training = Training(machine)  # type: ignore[assignment]
            called = machine.care.called

            def heats(round_id: int) -> Any:
                verdict = called(round_id)
                machine.host.zone(81.0)
                machine.clock.now += 10
                return verdict

            machine.care.called = heats  # type: ignore[method-assign]
            assert await outcome(fleet) == ("pi-0", "pi-2", "pi-3")
            assert training.batches == 0
            assert "its host is too hot" in repr(
                fleet.coordinator.store.device_rounds(seat.name, 10)
            )

    go(scenario())


def test_an_update_stays_home_when_the_way_out_costs_by_then(tmp_path: Path):
    async def scenario() -> None:
        async with Fleet(tmp_path) as fleet:
            seat = fleet.seats[1]
            machine = Machine(seat, tmp_path / "host")
            seat.trainer.on_train = lambda stop: machine.host.route("ppp0")  # type: ignore[func-returns-value]
            assert await outcome(fleet, config().work) == ("pi-0", "pi-2", "pi-3")
            assert "its host is on a metered network" in repr(
                fleet.coordinator.store.device_rounds(seat.name, 10)
            )

    go(scenario())


def test_a_local_program_and_the_status_in_a_round(tmp_path: Path):
    """Over the socket: a wait before the call has the device decline; afterwards it takes part."""

    async def scenario() -> None:
        async with Fleet(tmp_path) as fleet:
            seat = fleet.seats[1]
            machine, service = Machine(seat, tmp_path / "host"), seat.service
            path = seat.directory / FILE
            port = LocalPort(
                path,
                machine.care.waits,
                status=service.facts,
                explain=service.decisions,
                heeds=lambda: True,
                clock=machine.clock,
            )
            service.port = port
            await port.open()
            await asyncio.to_thread(
                lambda: ask(path, {"ask": "wait", "seconds": 5, "why": "the camera is in use"})
            )
            run = fleet.run(config(rounds=2))
            fleet.on_event = lambda event: (
                setattr(machine.clock, "now", 10.0) if _over(event) else None
            )
            await fleet.play(run)
            survivors = [o.completed.survivors for o in fleet.outcomes if o.completed]
            assert [seat.name in who for who in survivors] == [False, True]
            facts = await asyncio.to_thread(lambda: ask(path, {"ask": "status"}))
            assert (facts["device"], facts["called"], facts["contributed"]) == ("pi-1", 2, 1)
            assert facts["host"]["state"] == "go"
            assert facts["last"]["contributed"] is True
            told = await asyncio.to_thread(lambda: ask(path, {"ask": "explain"}))
            assert [(d["round"], d["what"]) for d in told] == [(1, "declined"), (2, "took part")]
            assert "the camera is in use" in told[0]["why"]
            assert msgspec.json.encode(facts)

    go(scenario())


def _over(event: Any) -> bool:
    return type(event).__name__ == "RoundOutcome"
