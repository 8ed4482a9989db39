"""Go, pause or stop: each condition with its line, and laws that hold for all readings."""

from dataclasses import replace
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from covey_device.host.config import HostConfig
from covey_device.host.eligibility import (
    DAY_MINUTES,
    MARGIN_BYTES,
    SETTLE_S,
    UNTOLD,
    Moment,
    Standing,
    State,
    Verdict,
    begin,
    judge,
    next_quiet,
    within,
)
from covey_device.host.readings import THROTTLED, Pressure, Readings
from covey_shared.config import parse
from covey_shared.errors import ConfigError

PLAIN = HostConfig()
FRESH, GOING = Standing(), Standing(going=True)
NOW = Moment(now_s=1000.0, minute=12 * 60)


def verdict(
    readings: Readings,
    conditions: HostConfig = PLAIN,
    standing: Standing = FRESH,
    **moment: Any,
) -> Verdict:
    return judge(conditions, readings, replace(NOW, **moment), standing)[0]


def test_nothing_known_and_nothing_against_it():
    assert verdict(Readings()) == Verdict(State.GO)
    assert verdict(Readings(), standing=GOING).line == ""


@pytest.mark.parametrize(
    ("celsius", "begins", "goes_on"),
    [
        (69.9, State.GO, State.GO),
        (70.0, State.PAUSE, State.GO),
        (74.9, State.PAUSE, State.GO),
        (75.0, State.PAUSE, State.PAUSE),
        (79.9, State.PAUSE, State.PAUSE),
        (80.0, State.STOP, State.STOP),
    ],
)
def test_heat(celsius: float, begins: State, goes_on: State):
    readings = Readings(temperature_c=celsius)
    assert verdict(readings).state is begins
    assert verdict(readings, standing=GOING).state is goes_on


LINES = [
    (
        {"temperature_c": 76.2},
        {},
        {},
        "76.2 C, paused from 75 on (host.pause_c) until below 70",
        "its host is too hot",
    ),
    (
        {"temperature_c": 72.0},
        {},
        {},
        "72.0 C, not until below 70 (host.start_below_c)",
        "its host is too hot",
    ),
    (
        {"temperature_c": 81.0},
        {},
        {},
        "81.0 C, ended from 80 on (host.stop_c)",
        "its host is too hot",
    ),
    (
        {"under_voltage": True},
        {},
        {},
        "the voltage is too low (host.when_throttled = false): check the power supply and its cable",
        "its host's power supply is too weak",
    ),
    (
        {"throttle_bits": THROTTLED},
        {},
        {},
        "the processor is throttled (host.when_throttled = false): check the fan and the power supply",
        "its host is throttled",
    ),
    (
        {"memory_bytes": 70_000_000},
        {},
        {},
        "70 MB of memory available, 64 (host.min_memory_mb) and 16 to begin with needed",
        "its host has too little memory free",
    ),
    (
        {"memory_bytes": 100_000_000},
        {},
        {"need_bytes": 50_000_000},
        "100 MB of memory available, 64 (host.min_memory_mb) and 50 for this plan needed",
        "its host has too little memory free",
    ),
    (
        {"cpu": Pressure(45.0)},
        {"cpu_pressure": 80.0},
        {},
        "something waited for a processor 45% of the last 10 s, not (host.cpu_pressure) until below 40",
        "its host is busy",
    ),
    (
        {"io": Pressure(91.0, 80.0)},
        {},
        {},
        "something waited for the disk 91% of the last 10 s, paused from 80 on (host.io_pressure) until "
        "below 40",
        "its host is busy",
    ),
    (
        {"on_battery": True},
        {},
        {},
        "on battery; paused until on mains (host.on_battery = false)",
        "its host runs on battery",
    ),
    (
        {"metered": True, "interface": "wwan0"},
        {},
        {},
        "wwan0 is metered; paused until another way out (host.on_metered = false)",
        "its host is on a metered network",
    ),
    (
        {},
        {"quiet_hours": ("22:00-07:00",)},
        {"minute": 6 * 60 + 5},
        "it is 06:05, within 22:00-07:00 (host.quiet_hours)",
        "its owner's quiet hours",
    ),
    (
        {},
        {},
        {"vetoes": ("the camera is on",)},
        "the camera is on",
        "its owner or a program of its host asks it to wait",
    ),
    (
        {},
        {"require": ("temperature",)},
        {},
        "temperature is unknown here, and host.require names it",
        "its host lacks a sensor that its owner requires",
    ),
]


@pytest.mark.parametrize(("readings", "conditions", "moment", "line", "public"), LINES)
def test_every_condition_has_its_line_and_its_words(readings, conditions, moment, line, public):
    """For the owner with the numbers and the key; for the coordinator without any number."""
    told = verdict(Readings(**readings), HostConfig(**conditions), **moment)
    assert (told.line, told.public) == (line, public)
    assert told.state is not State.GO
    assert not any(c.isdigit() for c in told.public)
    assert (
        verdict(Readings(**readings), HostConfig(**conditions, tell=False), **moment).public
        == UNTOLD
    )


@pytest.mark.parametrize(
    ("readings", "conditions"),
    [
        ({"throttle_bits": THROTTLED, "under_voltage": True}, {"when_throttled": True}),
        ({"memory_bytes": 1_000}, {"min_memory_mb": 0}),
        ({"memory": Pressure(100.0)}, {"memory_pressure": 0.0}),
        ({"io": Pressure(100.0)}, {"io_pressure": 0.0}),
        ({"on_battery": True}, {"on_battery": True}),
        ({"metered": True}, {"on_metered": True}),
    ],
)
def test_each_condition_is_the_owners_to_drop(readings, conditions):
    for standing in (Standing(), GOING):
        assert verdict(Readings(**readings), standing=standing).state is not State.GO
        assert verdict(Readings(**readings), HostConfig(**conditions), standing) == Verdict(
            State.GO
        )


def test_a_busy_processor_is_the_owners_to_mind():
    """Training has the lowest priority, and is most of what waits."""
    assert verdict(Readings(cpu=Pressure(100.0))).state is State.GO


def test_memory_that_runs_short_ends_training_as_a_pause_would_free_none():
    short = Readings(memory_bytes=63_000_000)
    told = verdict(short, standing=GOING, beginning=False)
    assert (told.state, told.line) == (
        State.STOP,
        "63 MB of memory available, ended below 64 (host.min_memory_mb)",
    )
    assert (
        verdict(Readings(memory_bytes=64_000_000), standing=GOING, beginning=False).state
        is State.GO
    )
    assert verdict(Readings(memory_bytes=64_000_000 + MARGIN_BYTES)).state is State.GO


def test_throttling_must_be_over_for_a_while():
    told, standing = judge(PLAIN, Readings(under_voltage=True), NOW, GOING)
    assert told.state is State.PAUSE
    later = replace(NOW, now_s=NOW.now_s + SETTLE_S - 1)
    told, standing = judge(PLAIN, Readings(under_voltage=False), later, standing)
    assert told.line == (
        "throttled or of low voltage 29 s ago; paused until 30 s without (host.when_throttled = false)"
    )
    told, _ = judge(PLAIN, Readings(), replace(NOW, now_s=NOW.now_s + SETTLE_S), standing)
    assert told.state is State.GO
    assert (
        judge(PLAIN, Readings(), later, begin(standing))[0].state is State.PAUSE
    )  # a new round's too


def test_a_pause_that_lasts_is_an_end():
    hot, standing = Readings(temperature_c=76.0), GOING
    states = []
    for second in range(0, 125, 5):
        told, standing = judge(PLAIN, hot, replace(NOW, now_s=1000.0 + second), standing)
        states.append(told.state)
    assert states == [State.PAUSE] * 24 + [State.STOP]
    assert told.line.startswith("paused for 120 s (host.max_pause_s = 120); 76.0 C")
    assert told.public == "its host is too hot"
    # and is not taken back in that round
    assert judge(PLAIN, Readings(), NOW, standing)[0].state is State.STOP
    assert judge(PLAIN, Readings(), NOW, begin(standing))[0].state is State.GO


@given(
    st.integers(0, DAY_MINUTES - 1),
    st.integers(0, DAY_MINUTES - 1),
    st.integers(0, DAY_MINUTES - 1),
)
def test_spans_over_midnight(minute: int, first: int, last: int):
    if first != last:
        inside = {(first + i) % DAY_MINUTES for i in range((last - first) % DAY_MINUTES)}
        assert within(minute, first, last) == (minute in inside)


def test_the_next_quiet_hours():
    conditions = HostConfig(quiet_hours=("22:00-07:00", "12:30-13:00"))
    assert next_quiet(conditions, 12 * 60) == (30, 13 * 60)
    assert next_quiet(conditions, 13 * 60) == (9 * 60, 7 * 60)
    assert next_quiet(conditions, 3 * 60) == (0, 7 * 60)
    assert next_quiet(PLAIN, 0) is None


# -- laws ------------------------------------------------------------------------------------------

maybe = st.none() | st.booleans()
pressures = st.none() | st.builds(Pressure, st.floats(0, 100), st.none() | st.floats(0, 100))
readings_of_any_kind = st.builds(
    Readings,
    temperature_c=st.none() | st.floats(-40, 150),
    throttle_bits=st.none() | st.integers(0, 2**20 - 1),
    under_voltage=maybe,
    memory_bytes=st.none() | st.integers(0, 2**33),
    cpu=pressures,
    memory=pressures,
    io=pressures,
    on_battery=maybe,
    interface=st.none() | st.just("eth0"),
    metered=maybe,
)
fields = list(Readings.__dataclass_fields__)


@settings(max_examples=200, deadline=None)
@given(readings_of_any_kind, st.sampled_from(fields), st.booleans())
def test_what_is_unknown_blocks_nothing(readings: Readings, field: str, going: bool):
    """Whatever one reading says, to know nothing of it is no worse."""
    standing = Standing(going=going)
    known = verdict(readings, standing=standing)
    unknown = verdict(replace(readings, **{field: None}), standing=standing)
    assert unknown.state <= known.state


@settings(max_examples=200, deadline=None)
@given(readings_of_any_kind)
def test_going_on_is_never_harder_than_beginning(readings: Readings):
    fresh, going = verdict(readings), verdict(readings, standing=GOING, beginning=False)
    assert going.state <= fresh.state
    assert (fresh.state is State.GO) == (fresh.reasons == ())


class Band(RuleBasedStateMachine):
    """Heat and pressure that move by small steps: training does not stutter."""

    @initialize(celsius=st.floats(40, 90), busy=st.floats(0, 100))
    def first(self, celsius: float, busy: float) -> None:
        self.now, self.standing = 0.0, Standing()
        self.celsius, self.busy = celsius, busy
        self.conditions = HostConfig(max_pause_s=86_400.0, cpu_pressure=80.0)
        self.low = self.high = celsius  # since training last went on or paused
        self.busy_low = self.busy_high = busy
        self.was: State | None = None
        self.look()

    def look(self) -> None:
        readings = Readings(temperature_c=self.celsius, cpu=Pressure(self.busy))
        told, self.standing = judge(
            self.conditions, readings, Moment(self.now, beginning=False), self.standing
        )
        self.low, self.high = min(self.low, self.celsius), max(self.high, self.celsius)
        self.busy_low, self.busy_high = (
            min(self.busy_low, self.busy),
            max(self.busy_high, self.busy),
        )
        if (
            self.was is not None
            and told.state is not self.was
            and State.STOP not in (told.state, self.was)
        ):
            crossed = (self.low < 70.0 and self.high >= 75.0) or (
                self.busy_low < 40.0 and self.busy_high >= 80.0
            )
            assert crossed or self.started_in_the_band
            self.low = self.high = self.celsius
            self.busy_low = self.busy_high = self.busy
            self.started_in_the_band = False
        if self.was is None:
            # The first look of all has no past: within the band it waits.
            self.started_in_the_band = told.state is State.PAUSE
        self.was, self.told = told.state, told

    @rule(by=st.floats(-4, 4))
    def warms(self, by: float) -> None:
        self.now += 2
        self.celsius = min(79.9, max(20.0, self.celsius + by))
        self.look()

    @rule(by=st.floats(-30, 30))
    def gets_busy(self, by: float) -> None:
        self.now += 2
        self.busy = min(100.0, max(0.0, self.busy + by))
        self.look()

    @invariant()
    def every_stop_or_pause_has_a_reason_and_a_line(self) -> None:
        if not hasattr(self, "told"):
            return
        assert (self.told.state is State.GO) == (self.told.line == "")
        if self.told.state is State.GO:
            assert self.celsius < 75
            assert self.busy < 80


Band.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
test_no_flapping_within_the_band = Band.TestCase


# -- the file --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("start_below_c = 75", "start_below_c (75) must be below pause_c (75)"),
        ("stop_c = 74", "that not above stop_c (74)"),
        ('quiet_hours = ["22-7"]', "key `host.quiet_hours[0]`"),
        ('quiet_hours = ["07:00-07:00"]', "begins when it ends"),
        ('quiet_hours = ["24:00-07:00"]', "two times of day in quotes"),
        ('require = ["fan"]', "key `host.require[0]`"),
        ('metered_interfaces = ["a b"]', "a network interface in quotes"),
        ("pause = 3", "unknown key `host.pause`"),
    ],
)
def test_mistakes_in_the_table_are_named(text: str, problem: str):
    class File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
        host: HostConfig = HostConfig()

    with pytest.raises(ConfigError) as caught:
        parse(f"[host]\n{text}\n", File, file="policy.toml")
    assert problem in str(caught.value)


def test_in_words():
    assert PLAIN.in_words() == [
        "trains below 70 C, pauses from 75 C on, ends from 80 C on; leaves others 64 MB of memory",
        "does not train while throttled, on battery or on a metered network",
    ]
    strict = HostConfig(quiet_hours=("22:00-07:00",), require=("temperature",), tell=False)
    assert strict.in_words()[1:] == [
        "does not train while throttled, on battery, on a metered network or at 22:00-07:00",
        "takes part only where these are known: temperature",
        "does not tell the coordinator which of these it was",
    ]
