"""Whether this device may train now: go, pause or stop, with every reason.

Pure: readings, the owner's conditions and the moment come in, a verdict comes out. Its laws:

* what is unknown blocks nothing, unless the owner requires it;
* training goes on under looser bounds than it begins or resumes under, so that nothing flaps within a band;
* a pause that lasts for `max_pause_s` becomes a stop, and a stop holds until the next round.

Each reason has a line for the owner, with numbers and the key that decides, and a fixed sentence for the
coordinator, with neither.
"""

import enum
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from covey_device.host.config import HostConfig, Sensor
from covey_device.host.readings import Pressure, Readings

SETTLE_S = 30.0
"""How long throttling and low voltage must be over: both end by the very pause they cause."""

MARGIN_BYTES = 16_000_000
"""More memory than the floor that training needs to begin, where nothing is known of the plan's need."""

DAY_MINUTES = 24 * 60

UNTOLD = "its owner's conditions are not met"


class State(enum.IntEnum):
    """What training may do now. Of several reasons the highest counts."""

    GO = 0
    PAUSE = 1
    STOP = 2


@dataclass(frozen=True, slots=True)
class Reason:
    """Why not to go. line: for the owner. public: for the coordinator."""

    state: State
    sensor: str
    line: str
    public: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """state: the highest of the reasons', or that of a pause that lasted too long. tell: whether the
    coordinator may know which reason it was."""

    state: State
    reasons: tuple[Reason, ...] = ()
    tell: bool = True

    @property
    def line(self) -> str:
        """All reasons in one line, the decisive ones first; empty if there are none."""
        return "; ".join(reason.line for reason in self._sorted())

    @property
    def public(self) -> str:
        """One fixed sentence, without a number or a name."""
        decisive = self._sorted()
        return decisive[0].public if decisive and self.tell else UNTOLD

    def and_over(self, line: str) -> "Verdict":
        """A pause that is an end, and why."""
        over = Reason(State.STOP, "pause", line, self._sorted()[0].public)
        return Verdict(State.STOP, (*self.reasons, over), self.tell)

    def _sorted(self) -> list[Reason]:
        return sorted(self.reasons, key=lambda reason: -reason.state)


@dataclass(frozen=True, slots=True)
class Moment:
    """What is no reading. now_s: seconds of a clock that only advances. minute: of the local day; None where
    the clock is not to be trusted. need_bytes: memory that training has yet to take; None: unknown.
    beginning: before the first batch. vetoes: lines of those who ask to wait."""

    now_s: float
    minute: int | None = None
    need_bytes: int | None = None
    beginning: bool = True
    vetoes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Standing:
    """What must be remembered from one look to the next.

    going: training may go on. paused_s: since when it may not. ill_s: when throttling or low voltage was last
    seen. stopped: the reasons of a stop, which holds.
    """

    going: bool = False
    paused_s: float | None = None
    ill_s: float | None = None
    stopped: tuple[Reason, ...] = field(default=())


def begin(standing: Standing) -> Standing:
    """For a new round: what stopped the last one is forgotten, not what the machine suffered from."""
    return Standing(ill_s=standing.ill_s)


def judge(
    conditions: HostConfig, readings: Readings, moment: Moment, standing: Standing
) -> tuple[Verdict, Standing]:
    """One look -> the verdict, and what to remember."""
    tell = conditions.tell
    if standing.stopped:
        return Verdict(State.STOP, standing.stopped, tell), standing
    if readings.under_voltage or readings.throttled:
        standing = replace(standing, ill_s=moment.now_s)
    reasons = tuple(_reasons(conditions, readings, moment, standing))
    state = max((reason.state for reason in reasons), default=State.GO)
    if state is State.GO:
        return Verdict(State.GO, (), tell), replace(standing, going=True, paused_s=None)
    since = moment.now_s if standing.paused_s is None else standing.paused_s
    if state is State.PAUSE and moment.now_s - since >= conditions.max_pause_s:
        waited = moment.now_s - since
        line = f"paused for {waited:.0f} s (host.max_pause_s = {conditions.max_pause_s:g})"
        reasons = Verdict(state, reasons).and_over(line).reasons
        state = State.STOP
    stopped = reasons if state is State.STOP else ()
    return Verdict(state, reasons, tell), replace(
        standing, going=False, paused_s=since, stopped=stopped
    )


def _reasons(
    conditions: HostConfig, readings: Readings, moment: Moment, standing: Standing
) -> Iterator[Reason]:
    yield from _unknown(conditions, readings, moment)
    yield from _temperature(conditions, readings.temperature_c, going=standing.going)
    if not conditions.when_throttled:
        yield from _throttling(readings, moment.now_s, standing.ill_s)
    yield from _memory(conditions, readings.memory_bytes, moment, going=standing.going)
    for name, pressure, bound in (
        ("cpu", readings.cpu, conditions.cpu_pressure),
        ("memory", readings.memory, conditions.memory_pressure),
        ("io", readings.io, conditions.io_pressure),
    ):
        yield from _pressure(name, pressure, bound, going=standing.going)
    if readings.on_battery and not conditions.on_battery:
        line = "on battery; paused until on mains (host.on_battery = false)"
        yield Reason(State.PAUSE, "power", line, "its host runs on battery")
    if readings.metered and not conditions.on_metered:
        line = f"{readings.interface} is metered; paused until another way out (host.on_metered = false)"
        yield Reason(State.PAUSE, "network", line, "its host is on a metered network")
    yield from _quiet(conditions, moment.minute)
    for line in moment.vetoes:
        yield Reason(
            State.PAUSE, "veto", line, "its owner or a program of its host asks it to wait"
        )


def _unknown(conditions: HostConfig, readings: Readings, moment: Moment) -> Iterator[Reason]:
    known: dict[Sensor, bool] = {
        "temperature": readings.temperature_c is not None,
        "throttling": not readings.throttled is readings.under_voltage is None,
        "memory": readings.memory_bytes is not None,
        "pressure": not readings.cpu is readings.memory is readings.io is None,
        "power": readings.on_battery is not None,
        "network": readings.metered is not None,
        "clock": moment.minute is not None,
    }
    for sensor in conditions.require:
        if not known[sensor]:
            line = f"{sensor} is unknown here, and host.require names it"
            yield Reason(
                State.PAUSE, sensor, line, "its host lacks a sensor that its owner requires"
            )


def _temperature(conditions: HostConfig, celsius: float | None, *, going: bool) -> Iterator[Reason]:
    if celsius is None:
        return
    public, until = "its host is too hot", f"until below {conditions.start_below_c:g}"
    if celsius >= conditions.stop_c:
        line = f"{celsius:.1f} C, ended from {conditions.stop_c:g} on (host.stop_c)"
        yield Reason(State.STOP, "temperature", line, public)
    elif celsius >= conditions.pause_c:
        line = f"{celsius:.1f} C, paused from {conditions.pause_c:g} on (host.pause_c) {until}"
        yield Reason(State.PAUSE, "temperature", line, public)
    elif not going and celsius >= conditions.start_below_c:
        line = f"{celsius:.1f} C, not {until} (host.start_below_c)"
        yield Reason(State.PAUSE, "temperature", line, public)


def _throttling(readings: Readings, now_s: float, ill_s: float | None) -> Iterator[Reason]:
    key = "(host.when_throttled = false)"
    if readings.under_voltage:
        line = f"the voltage is too low {key}: check the power supply and its cable"
        yield Reason(State.PAUSE, "throttling", line, "its host's power supply is too weak")
    if readings.throttled:
        line = f"the processor is throttled {key}: check the fan and the power supply"
        yield Reason(State.PAUSE, "throttling", line, "its host is throttled")
    elif not readings.under_voltage and ill_s is not None and now_s - ill_s < SETTLE_S:
        ago = f"throttled or of low voltage {now_s - ill_s:.0f} s ago"
        line = f"{ago}; paused until {SETTLE_S:g} s without {key}"
        yield Reason(State.PAUSE, "throttling", line, "its host is throttled")


def _memory(
    conditions: HostConfig, available: int | None, moment: Moment, *, going: bool
) -> Iterator[Reason]:
    """A pause gives no memory back, so there is none: training does not begin, or ends."""
    if available is None:
        return
    floor, need = conditions.min_memory_mb * 1_000_000, moment.need_bytes
    public = "its host has too little memory free"
    # Once going, only what is really needed is asked for on top of the floor.
    more = need if need is not None else 0 if going else MARGIN_BYTES
    if floor and moment.beginning and available < floor + more:
        what = "to begin with" if need is None else "for this plan"
        line = (
            f"{_mb(available)} MB of memory available, {_mb(floor)} (host.min_memory_mb) and {_mb(more)} "
            f"{what} needed"
        )
        yield Reason(State.STOP, "memory", line, public)
    elif available < floor:
        line = f"{_mb(available)} MB of memory available, ended below {_mb(floor)} (host.min_memory_mb)"
        yield Reason(State.STOP, "memory", line, public)


def _mb(count: int) -> str:
    return f"{count / 1e6:,.0f}"


def _pressure(
    name: str, pressure: Pressure | None, bound: float, *, going: bool
) -> Iterator[Reason]:
    if pressure is None or bound == 0:
        return
    if pressure.some < (bound if going else bound / 2):
        return
    waited = f"something waited for {_WAITED[name]} {pressure.some:.0f}% of the last 10 s"
    at = f"paused from {bound:g} on" if pressure.some >= bound else "not"
    line = f"{waited}, {at} (host.{name}_pressure) until below {bound / 2:g}"
    yield Reason(State.PAUSE, "pressure", line, "its host is busy")


_WAITED = {"cpu": "a processor", "memory": "memory", "io": "the disk"}


def _quiet(conditions: HostConfig, minute: int | None) -> Iterator[Reason]:
    """No pause either: they last for hours."""
    if minute is None:
        return
    for span, (first, last) in zip(conditions.quiet_hours, conditions.quiet_minutes, strict=True):
        if within(minute, first, last):
            line = f"it is {minute // 60:02}:{minute % 60:02}, within {span} (host.quiet_hours)"
            yield Reason(State.STOP, "quiet hours", line, "its owner's quiet hours")


def within(minute: int, first: int, last: int) -> bool:
    """Whether a minute of the day is in a span, which may go over midnight."""
    return first <= minute < last if first < last else minute >= first or minute < last


def next_quiet(conditions: HostConfig, minute: int) -> tuple[int, int] | None:
    """The quiet hours that are on or come next -> minutes until they begin (0: they are on) and the minute of
    the day at which they end. None: there are none."""
    spans = [
        (0 if within(minute, first, last) else (first - minute) % DAY_MINUTES, last)
        for first, last in conditions.quiet_minutes
    ]
    return min(spans, default=None)
