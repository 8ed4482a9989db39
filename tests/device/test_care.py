"""Care in training: what pauses, resumes and ends it, and what becomes of the update."""

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from covey_device.data import DataSource, source_of_arrays
from covey_device.host.care import POLL_S, Care, local_minute
from covey_device.host.config import HostConfig
from covey_device.host.decisions import MAX_DECISIONS, WRITE_S, Decisions, load
from covey_device.host.eligibility import State
from covey_device.host.readings import Readings
from covey_device.trainer import Gate, Trainer, Work
from covey_shared.errors import TrainingError
from device_support import FakeClock, LinearStep, make_header

HEADER = make_header()
PLAIN = HostConfig()
COOL = Readings(temperature_c=50.0, memory_bytes=10**9)
HOT = replace(COOL, temperature_c=76.0)
BURNING = replace(COOL, temperature_c=85.0)


class Host:
    """A machine whose readings are told, and whose time passes only in pauses and when told."""

    def __init__(self, conditions: HostConfig = PLAIN, directory: Path | None = None) -> None:
        self.clock = FakeClock(0.0)
        self.readings = COOL
        self.conditions = conditions
        self.looks = 0
        self.on_wait: Callable[[float], None] = lambda seconds: None
        self.decisions = Decisions(
            directory, clock=lambda: 1000.0 + self.clock.now, monotonic=self.clock
        )
        self.care = Care(
            lambda: self.conditions,
            self.decisions,
            self._look,
            veto_file=None if directory is None else directory / "veto",
            clock=self.clock,
            minute=lambda: 12 * 60,
            wait=self._wait,
        )

    def _look(self, interfaces: tuple[str, ...]) -> Readings:
        self.looks += 1
        return self.readings

    def _wait(self, seconds: float) -> None:
        assert seconds > 0  # a pause burns no processor
        self.clock.now += seconds
        self.on_wait(seconds)

    @property
    def told(self) -> list[tuple[str, str]]:
        return [(d.what, d.why) for d in self.decisions.all()]


def source() -> DataSource:
    rng = np.random.default_rng(1)
    features = rng.standard_normal((10, 3)).astype(np.float32)
    return source_of_arrays(features, features @ np.float32([[1.0], [-2.0], [0.5]]), HEADER)


def update(start: np.ndarray, n_batches: int) -> np.ndarray:
    """Of so many batches where no machine has a say."""
    trainer = Trainer(LinearStep(HEADER), source(), HEADER, resident=lambda: 50)
    work = Work(n_batches, 4, 1000.0, 100)
    return trainer.train(start, work, clock=lambda: 0.0, rng=np.random.default_rng(3)).delta


class Round:
    """A round's training on a host."""

    def __init__(self, host: Host, batch_s: float = 2.5) -> None:
        self.host, self.step = host, LinearStep(HEADER)
        self.trainer = Trainer(self.step, source(), HEADER, resident=lambda: 50)
        self.start = np.array([0.1, 0.2, 0.3, 0.4], np.float32)
        self.after: Callable[[int], None] = lambda batches: None
        self.step.after_step = self._stepped
        self.batch_s = batch_s
        self.stop: Callable[[], bool] = lambda: False

    def _stepped(self) -> None:
        self.host.clock.now += self.batch_s
        self.after(len(self.step.sizes))

    def train(self, gate: Gate | None = None, **changes: Any) -> Any:
        asked = {"batches": 6, "batch_size": 4, "max_seconds": 1000.0, "max_resident_bytes": 100}
        return self.trainer.train(
            self.start,
            Work(**(asked | changes)),
            clock=self.host.clock,
            rng=np.random.default_rng(3),
            stop=self.stop,
            gate=gate or self.host.care.gate(1),
        )


def test_nothing_against_it():
    round_ = Round(Host())
    assert round_.host.care.called(1).state is State.GO
    result = round_.train()
    assert (result.stopped_by, result.batches) == ("batches", 6)
    assert round_.host.told == []


def test_heat_pauses_training_and_it_resumes_cool():
    host = Host()
    round_ = Round(host)

    def after(batches: int) -> None:
        if batches == 2:
            host.readings = HOT

    def cools(_: float) -> None:
        if host.clock.now > 60:
            host.readings = replace(COOL, temperature_c=72.0)  # in the band: still waits
        if host.clock.now > 80:
            host.readings = COOL

    round_.after, host.on_wait = after, cools
    result = round_.train()
    assert (result.stopped_by, result.batches) == ("batches", 6)
    np.testing.assert_array_equal(result.delta, update(round_.start, 6))
    (paused, line), (resumed, after_) = host.told
    assert (paused, resumed) == ("paused", "resumed")
    assert line == "76.0 C, paused from 75 on (host.pause_c) until below 70"
    assert 70 <= float(after_.removeprefix("after ").removesuffix(" s")) <= 80
    assert host.care.paused is None


def test_a_pause_is_no_slow_batch():
    """The time of the work goes on in a pause; but it does not count as a batch's."""
    host = Host()
    round_ = Round(host)
    round_.after = lambda batches: setattr(host, "readings", HOT if batches == 1 else COOL)
    host.on_wait = lambda _: setattr(host, "readings", COOL if host.clock.now > 50 else HOT)
    result = round_.train(max_seconds=70.0)  # were the pause the first batch's, this would be over
    assert (result.stopped_by, result.batches) == ("batches", 6)
    assert result.seconds > 60


def test_a_pause_that_lasts_ends_training_with_the_update_of_what_was_done():
    host = Host()
    round_ = Round(host)
    round_.after = lambda batches: setattr(host, "readings", HOT if batches == 2 else COOL)
    result = round_.train()
    assert (result.stopped_by, result.batches, result.examples) == ("host", 2, 8)
    np.testing.assert_array_equal(result.delta, update(round_.start, 2))
    assert [what for what, _ in host.told] == ["paused", "ended early"]
    assert host.told[1][1].startswith("paused for 120 s (host.max_pause_s = 120); 76.0 C")
    assert host.clock.now < 140


def test_the_rounds_time_ends_a_pause_too():
    host = Host()
    round_ = Round(host)
    round_.after = lambda batches: setattr(host, "readings", HOT)
    result = round_.train(max_seconds=30.0)
    assert (result.stopped_by, result.batches) == ("host", 1)
    assert result.seconds == pytest.approx(30.0, abs=1.0)
    assert host.told[1][1].startswith(
        "the round's time was over in a pause; 76.0 C, paused from 75"
    )


def test_a_stop_ends_training_at_once():
    host = Host()
    round_ = Round(host)
    round_.after = lambda batches: setattr(host, "readings", BURNING if batches == 3 else COOL)
    result = round_.train()
    assert (result.stopped_by, result.batches) == ("host", 3)
    assert host.told == [("ended early", "85.0 C, ended from 80 on (host.stop_c)")]


def test_no_batch_is_no_update_and_others_learn_the_words_alone():
    host = Host()
    host.readings = HOT
    with pytest.raises(TrainingError) as caught:
        Round(host).train()
    assert caught.value.public == "its host is too hot"
    assert "76.0 C, paused from 75 on" in str(caught.value)
    host = Host(HostConfig(tell=False))
    host.readings = BURNING
    with pytest.raises(TrainingError) as caught:
        Round(host).train()
    assert caught.value.public == "its owner's conditions are not met"


def test_who_is_asked_to_stop_in_a_pause_stops():
    host = Host()
    round_ = Round(host)
    round_.after = lambda batches: setattr(host, "readings", HOT)
    round_.stop = lambda: host.clock.now > 20
    result = round_.train()
    assert (result.stopped_by, result.batches) == ("stop", 1)
    assert host.care.paused is None


def test_a_local_program_pauses_training_between_two_batches():
    host = Host()
    round_ = Round(host, batch_s=0.01)  # far more often than the machine is looked at
    waits = host.care.waits

    def after(batches: int) -> None:
        if batches == 3:
            waits.add("the camera is in use", host.clock.now + 20.0, host.clock.now)

    round_.after = after
    result = round_.train()
    assert result.stopped_by == "batches"
    assert host.clock.now == pytest.approx(20.0, abs=1.0)
    assert host.told[0] == (
        "paused",
        "a local program asks to wait: the camera is in use (20 s more, host.programs = true)",
    )


def test_programs_that_are_not_heeded():
    host = Host(HostConfig(programs=False))
    host.care.waits.add("mine", None, 0.0)
    assert Round(host).train().stopped_by == "batches"


def test_the_veto_file(tmp_path: Path):
    host = Host(directory=tmp_path)
    veto = tmp_path / "veto"
    veto.touch()
    assert host.care.called(4).public == "its owner or a program of its host asks it to wait"
    assert host.told == [
        ("declined", f"{veto} is there; paused until it is removed (host.veto_file)")
    ]
    veto.unlink()
    assert host.care.called(5).state is State.GO
    host.conditions = HostConfig(veto_file=str(tmp_path / "mine"))
    (tmp_path / "mine").touch()
    assert host.care.called(6).state is State.PAUSE


def test_the_machine_is_looked_at_now_and_then_however_short_batches_are():
    host = Host()
    Round(host, batch_s=0.01).train(batches=400)
    assert host.looks <= 4.0 / POLL_S + 2


def test_nothing_is_looked_at_while_nothing_is_asked():
    host = Host()
    host.clock.now = 1e6
    assert host.looks == 0


def test_memory_for_the_plan_is_asked_for_before_the_first_batch():
    host = Host()
    host.readings = replace(COOL, memory_bytes=100_000_000)
    round_ = Round(host)

    class Tried:
        def need_bytes(self, size: int) -> int:
            assert size == 4
            return 50_000_000

        def batches(self, *_: Any) -> None:
            pass

    round_.trainer._trial = Tried()  # type: ignore[assignment]
    with pytest.raises(
        TrainingError, match=r"100 MB of memory available, 64 .* and 50 for this plan"
    ):
        round_.train()
    # while it lasts, the plan has its memory, and the floor alone must be left
    host.readings = replace(COOL, memory_bytes=200_000_000)
    host.care.called(2)
    round_.after = lambda batches: setattr(host, "readings", replace(COOL, memory_bytes=70_000_000))
    assert round_.train(gate=host.care.gate(2)).stopped_by == "batches"


def test_memory_that_runs_short_in_training_ends_it():
    host = Host()
    round_ = Round(host)
    host.care.called(1)
    round_.after = lambda batches: setattr(host, "readings", replace(COOL, memory_bytes=50_000_000))
    assert round_.train().stopped_by == "host"
    line = "50 MB of memory available, ended below 64 (host.min_memory_mb)"
    assert host.told == [("ended early", line)]


def test_a_batch_that_runs_for_long_is_given_up_for_heat():
    """By the thread that watches; the batches before it are a valid update."""
    host = Host()
    host.care = Care(lambda: HostConfig(), host.decisions, host._look, minute=lambda: None)
    round_ = Round(host, batch_s=0.0)
    interrupted = threading.Event()

    class LongStep(LinearStep):
        def step(self, features: Any, labels: Any, hyper: Any) -> float:
            if len(self.sizes) == 2:
                host.readings = BURNING
                assert interrupted.wait(30)
                raise TrainingError("interrupted")
            return super().step(features, labels, hyper)

        def interrupt(self) -> None:
            interrupted.set()

    round_.trainer._step = LongStep(HEADER)
    result = round_.train(gate=host.care.gate(1))
    assert (result.stopped_by, result.batches) == ("host", 2)
    np.testing.assert_array_equal(result.delta, update(round_.start, 2))
    assert host.told == [("ended early", "85.0 C, ended from 80 on (host.stop_c)")]


def test_what_stopped_one_round_does_not_stop_the_next():
    host = Host()
    round_ = Round(host)
    round_.after = lambda batches: setattr(host, "readings", BURNING)
    assert round_.train().stopped_by == "host"
    assert host.care.called(2).state is State.STOP
    host.readings = COOL
    assert host.care.called(3).state is State.GO
    assert host.told[1:] == [("declined", "85.0 C, ended from 80 on (host.stop_c)")]


def test_a_question_changes_nothing():
    """Whoever asks for the status in a band does not decide what comes of it."""
    host = Host()
    host.care.called(1)
    host.readings = replace(COOL, temperature_c=72.0)
    host.clock.now = 10.0
    assert host.care.facts(training=True)["state"] == "go"
    assert host.care.facts(training=False)["state"] == "pause"
    assert host.care.judged(beginning=False).state is State.GO


def test_an_update_does_not_leave_by_a_network_that_costs():
    host = Host()
    host.care.called(1)
    assert host.care.may_upload().state is State.GO
    host.readings = replace(HOT, metered=True, interface="wwan0")
    verdict = host.care.may_upload()
    assert (verdict.state, verdict.public) == (State.STOP, "its host is on a metered network")
    host.conditions = HostConfig(on_metered=True)
    assert host.care.may_upload().state is State.GO


def test_a_clock_that_was_never_set_is_unknown(monkeypatch: pytest.MonkeyPatch):
    import time

    assert local_minute() is not None
    monkeypatch.setattr("covey_device.host.care.time.localtime", lambda: time.gmtime(3600))
    assert local_minute() is None


# -- what is kept ----------------------------------------------------------------------------------


def test_decisions_are_bounded_and_outlive_the_process(tmp_path: Path):
    host = Host(directory=tmp_path)
    for number in range(80):
        host.decisions.add("declined", f"reason {number}", number)
    assert len(host.decisions.all()) == MAX_DECISIONS
    host.decisions.flush()
    again = load(tmp_path)
    assert again == host.decisions.all()
    assert (again[-1].why, again[-1].round, again[-1].at_unix) == ("reason 79", 79, 1000.0)
    assert (tmp_path / "decisions.json").stat().st_mode & 0o777 == 0o600
    assert Decisions(tmp_path).all() == again


def test_one_reason_again_and_again_is_one_decision(tmp_path: Path):
    host = Host(directory=tmp_path)
    host.decisions.add("paused", "hot", 1)
    for number in range(1, 1000):
        host.decisions.add("declined", "hot", number)
    last = host.decisions.all()[-1]
    assert (len(host.decisions.all()), last.times, last.round) == (2, 999, 999)


def test_the_card_is_spared(tmp_path: Path):
    host = Host(directory=tmp_path)
    host.decisions.add("declined", "a", 1)
    host.decisions.add("declined", "b", 2)
    assert [d.why for d in load(tmp_path)] == ["a"]
    host.clock.now = WRITE_S
    host.decisions.add("declined", "c", 3)
    assert [d.why for d in load(tmp_path)] == ["a", "b", "c"]


@pytest.mark.parametrize("damage", [b"", b"[", b"{}", b"\xff", b"[" * 100_000, b'[{"what": 3}]'])
def test_a_damaged_file_is_begun_anew(tmp_path: Path, damage: bytes):
    (tmp_path / "decisions.json").write_bytes(damage)
    decisions = Decisions(tmp_path)
    assert decisions.all() == []
    decisions.add("declined", "x\x1b[2J", 1)
    assert load(tmp_path)[0].why == "x\N{REPLACEMENT CHARACTER}[2J"


def test_a_full_disk_costs_the_file_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_: Any, **__: Any) -> int:
        raise OSError(28, "full")

    monkeypatch.setattr("covey_device.host.decisions.os.open", full)
    decisions = Decisions(tmp_path)
    decisions.add("declined", "hot", 1)
    assert len(decisions.all()) == 1
