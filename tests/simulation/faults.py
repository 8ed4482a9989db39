"""What goes wrong, and when: drawn from the seed before anything begins.

Each kind draws from a stream of its own, so that leaving one out leaves the others as they are, and a
seed enables only some of the kinds: what few faults do to each other is found sooner when the others do
not end every round.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

KINDS = (
    "loss", "doubling", "reordering", "slow-link", "slow-device", "partition", "one-way",
    "kill", "power-cut", "stop", "coordinator-kill", "coordinator-power-cut", "coordinator-stop",
    "coordinator-partition", "broker", "disk", "coordinator-disk", "clock", "training",
)  # fmt: skip

CHAOS_S = (6.0, 20.0)
"""For how long things go wrong."""
DAY_S = 86_400.0
PHASES = ("gather", "share", "roster", "collect", "view", "unmask", "done")


class Victim(Protocol):
    """What faults can do to a world. Machines go by their names."""

    devices: list[str]
    coordinator: str

    def weather(self, **changes: float) -> None: ...
    def cut(self, names: list[str], *, up: bool, down: bool) -> None: ...
    def mend(self, names: list[str]) -> None: ...
    def slow_link(self, name: str, seconds: float) -> None: ...
    def slow(self, name: str, factor: float) -> None: ...
    def kill(self, name: str, after: int, kind: str, back_s: float, *, power: bool) -> None: ...
    def stop(self, name: str, back_s: float) -> None: ...
    def broker(self, *, running: bool, forget: bool = False) -> None: ...
    def disk(self, name: str, *, full: bool) -> None: ...
    def clock(self, name: str, seconds: float) -> None: ...
    def spoil_training(self, name: str, probability: float) -> None: ...


@dataclass(frozen=True)
class Fault:
    """One thing that goes wrong. at_s: when, or, with a phase, how long after the coordinator enters
    that for the nth time. end is None for what is over at once."""

    kind: str
    at_s: float
    phase: str
    nth: int
    for_s: float
    begin: Callable[[Victim], None]
    end: Callable[[Victim], None] | None
    what: str


def enabled(seed: str) -> tuple[str, ...]:
    """The kinds of faults of a seed: about a third of all, and in every 16th seed none."""
    chance = random.Random(f"{seed}/kinds")
    share = chance.choice((0.0, *(0.1, 0.2, 0.3, 0.4, 0.5) * 3))
    return tuple(kind for kind in KINDS if chance.random() < share)


def chaos_s(seed: str) -> float:
    """How long it lasts."""
    return random.Random(f"{seed}/chaos").uniform(*CHAOS_S)


def plan(seed: str, kinds: tuple[str, ...], devices: list[str], coordinator: str) -> list[Fault]:
    """All faults of a seed, by time."""
    length_s = chaos_s(seed)
    found = []
    for kind in kinds:
        chance = random.Random(f"{seed}/{kind}")
        for _ in range(chance.choice((1, 1, 2, 3, 5))):
            at_s, phase, nth = chance.uniform(0.0, length_s), "", 0
            if chance.random() < 0.6:
                # Most phases are over in a moment, which those that come by the clock rarely meet.
                phase, nth = chance.choice(PHASES), chance.choice((1, 1, 2, 3))
                at_s = chance.choice((0.0, chance.uniform(0.0, 0.08)))
            for_s = chance.expovariate(1 / 6.0)
            for begin, end, what in _faults(kind, chance, devices, coordinator):
                found.append(Fault(kind, at_s, phase, nth, for_s, begin, end, what))
    return sorted(found, key=lambda fault: (fault.at_s, fault.kind))


_Doing = tuple[Callable[[Victim], None], Callable[[Victim], None] | None, str]


def _faults(
    kind: str, chance: random.Random, devices: list[str], coordinator: str
) -> Iterator[_Doing]:
    one = chance.choice(devices)
    some = chance.sample(devices, chance.randint(1, len(devices)))
    back_s = chance.choice((0.1, 1.0, 3.0, 8.0))
    # Most deaths between two writes or two messages: what is half done then, a restart must make whole.
    effects = [("", 60), ("disk", 30), ("publish", 10)]
    if kind.startswith("coordinator"):
        effects.append(("disk: commit", 12))
    effect, after = chance.choice(effects)
    after = chance.randint(0, after)
    moment = f"before its {effect or 'any'} effect {after} from now, back after {back_s:g} s"
    match kind:
        case "loss":
            p = chance.choice((0.02, 0.1, 0.3, 0.6))
            yield lambda w: w.weather(loss=p), lambda w: w.weather(loss=0.0), f"loss of {p:.0%}"
        case "doubling":
            p = chance.choice((0.1, 0.5))
            yield (
                lambda w: w.weather(doubling=p),
                lambda w: w.weather(doubling=0.0),
                f"doubling of {p:.0%}",
            )
        case "reordering":
            s = chance.choice((0.05, 0.3, 1.5))
            yield (
                lambda w: w.weather(spread_s=s),
                lambda w: w.weather(spread_s=0.0),
                f"delays around {s:g} s",
            )
        case "slow-link":
            s = chance.choice((0.2, 1.0, 3.0))
            yield (
                lambda w: w.slow_link(one, s),
                lambda w: w.slow_link(one, 0.0),
                f"the link of {one} takes {s:g} s more",
            )
        case "slow-device":
            f = chance.choice((5.0, 30.0))
            yield (
                lambda w: w.slow(one, f),
                lambda w: w.slow(one, 1.0),
                f"{one} is {f:g} times slower",
            )
        case "partition":
            yield (
                lambda w: w.cut(some, up=False, down=False),
                lambda w: w.mend(some),
                f"{', '.join(some)} cut off",
            )
        case "one-way":
            up = chance.random() < 0.5
            way = "towards" if up else "from"
            yield (
                lambda w: w.cut(some, up=up, down=not up),
                lambda w: w.mend(some),
                f"{', '.join(some)}: messages only {way} the broker",
            )
        case "coordinator-partition":
            up, down = chance.choice(((False, False), (True, False), (False, True)))
            yield (
                lambda w: w.cut([coordinator], up=up, down=down),
                lambda w: w.mend([coordinator]),
                f"{coordinator} cut off (up: {up}, down: {down})",
            )
        case "kill" | "power-cut":
            power = kind == "power-cut"
            for name in some[:3]:
                yield (
                    lambda w, name=name: w.kill(name, after, effect, back_s, power=power),  # type: ignore[misc]
                    None,
                    f"{kind} of {name} {moment}",
                )
        case "coordinator-kill" | "coordinator-power-cut":
            power = kind == "coordinator-power-cut"
            yield (
                lambda w: w.kill(coordinator, after, effect, back_s, power=power),
                None,
                f"{kind} {moment}",
            )
        case "stop":
            yield lambda w: w.stop(one, back_s), None, f"{one} is stopped, back after {back_s:g} s"
        case "coordinator-stop":
            yield (
                lambda w: w.stop(coordinator, back_s),
                None,
                f"{coordinator} is stopped, back after {back_s:g} s",
            )
        case "broker":
            forget = chance.random() < 0.7
            yield (
                lambda w: w.broker(running=False, forget=forget),
                lambda w: w.broker(running=True),
                f"the broker dies{', what it retained is lost' if forget else ''}",
            )
        case "disk":
            for name in some[:3]:
                yield (
                    lambda w, name=name: w.disk(name, full=True),  # type: ignore[misc]
                    lambda w, name=name: w.disk(name, full=False),  # type: ignore[misc]
                    f"the disk of {name} is full",
                )
        case "coordinator-disk":
            yield (
                lambda w: w.disk(coordinator, full=True),
                lambda w: w.disk(coordinator, full=False),
                f"the disk of {coordinator} is full",
            )
        case "clock":
            who = chance.choice([*devices, coordinator])
            s = chance.choice((-365 * DAY_S, -3600.0, 5.0, 3600.0, 365 * DAY_S))
            yield lambda w: w.clock(who, s), None, f"the clock of {who} jumps by {s:g} s"
        case "training":
            p = chance.choice((0.3, 1.0))
            yield (
                lambda w: w.spoil_training(one, p),
                lambda w: w.spoil_training(one, 0.0),
                f"training of {one} fails ({p:.0%})",
            )
