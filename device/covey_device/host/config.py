"""[host] of policy.toml: the owner's conditions on taking part."""

import re
from typing import Annotated, Literal

from msgspec import Meta

from covey_shared.config import Config, FileName

Sensor = Literal["temperature", "throttling", "memory", "pressure", "power", "network", "clock"]

Celsius = Annotated[float, Meta(ge=0, le=150)]
Percent = Annotated[float, Meta(ge=0, le=100)]
Span = Annotated[
    str,
    Meta(
        pattern=r"^([01][0-9]|2[0-3]):[0-5][0-9]-([01][0-9]|2[0-3]):[0-5][0-9]\Z",
        description='two times of day in quotes, as "22:00-07:00"',
    ),
]
InterfaceName = Annotated[
    str,
    Meta(
        pattern=r"^[A-Za-z0-9_.:*-]{1,15}\Z",
        description='a network interface in quotes, as "wlan1" or "wlan*"',
    ),
]


class HostConfig(Config, frozen=True):
    """[host]: when this device takes part, and when it makes room. docs/host.md has the reasons.

    start_below_c, pause_c, stop_c: temperatures; training begins or resumes below the first, pauses from the
    second on, ends from the third on. when_throttled, on_battery, on_metered: take part then all the same.
    min_memory_mb: what must stay available to others. cpu_pressure, memory_pressure, io_pressure: per cent of
    the last ten seconds in which something waited; pauses there, resumes below half; 0: not looked at.
    metered_interfaces: besides those that are known by their name or driver. quiet_hours: local times, to the
    minute. veto_file: instead of `veto` beside the local socket. programs: whether they are heard. require:
    readings without which the device does not take part. max_pause_s: a longer pause ends training. tell:
    whether the coordinator learns which condition it was.
    """

    start_below_c: Celsius = 70.0
    pause_c: Celsius = 75.0
    stop_c: Celsius = 80.0
    when_throttled: bool = False
    min_memory_mb: Annotated[int, Meta(ge=0, le=1_000_000)] = 64
    cpu_pressure: Percent = 0.0
    memory_pressure: Percent = 20.0
    io_pressure: Percent = 80.0
    on_battery: bool = False
    on_metered: bool = False
    metered_interfaces: tuple[InterfaceName, ...] = ()
    quiet_hours: tuple[Span, ...] = ()
    veto_file: FileName | None = None
    programs: bool = True
    max_pause_s: Annotated[float, Meta(ge=0, le=86_400)] = 120.0
    require: tuple[Sensor, ...] = ()
    tell: bool = True

    def __post_init__(self) -> None:
        """Refuse temperatures that leave no band between them, and hours that are none."""
        if not self.start_below_c < self.pause_c <= self.stop_c:
            raise ValueError(
                f"start_below_c ({self.start_below_c:g}) must be below pause_c ({self.pause_c:g}), and that "
                f"not above stop_c ({self.stop_c:g})"
            )
        for span in self.quiet_hours:
            first, last = re.split("-", span, maxsplit=1)
            if first == last:
                raise ValueError(
                    f'quiet_hours "{span}" begins when it ends; a whole day is "00:00-23:59"'
                )

    @property
    def quiet_minutes(self) -> tuple[tuple[int, int], ...]:
        """quiet_hours as minutes of the day: from the first on, up to the second, over midnight if that
        is the smaller one."""
        return tuple(
            (_minutes(first), _minutes(last))
            for first, _, last in (span.partition("-") for span in self.quiet_hours)
        )

    def in_words(self) -> list[str]:
        """What this device minds, a line each, for its owner."""
        lines = [
            f"trains below {self.start_below_c:g} C, pauses from {self.pause_c:g} C on, ends from "
            f"{self.stop_c:g} C on; leaves others {self.min_memory_mb:,} MB of memory"
        ]
        avoided = [
            what
            for what, allowed in (
                ("while throttled", self.when_throttled),
                ("on battery", self.on_battery),
                ("on a metered network", self.on_metered),
            )
            if not allowed
        ]
        if self.quiet_hours:
            avoided.append(f"at {', '.join(self.quiet_hours)}")
        if avoided:
            lines.append(f"does not train {_or(avoided)}")
        if self.require:
            lines.append(f"takes part only where these are known: {', '.join(self.require)}")
        if not self.tell:
            lines.append("does not tell the coordinator which of these it was")
        return lines


def _minutes(time_of_day: str) -> int:
    hours, _, minutes = time_of_day.partition(":")
    return int(hours) * 60 + int(minutes)


def _or(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"
