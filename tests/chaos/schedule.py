"""Which faults, when and for how long: drawn from a seed.

Every kind of fault is dealt out evenly over the rounds and, where that makes sense, over the phases, and
then shuffled; so a short run has few of each and a long one enough of all. Each fault waits for its round,
then for its phase, then for a share of the time that this phase usually takes.
"""

import math
import random
from dataclasses import dataclass

from chaos.observer import PHASES

CALM_ROUNDS = 3
"""At the end nothing is done any more: the run must come to its end by itself."""


@dataclass(frozen=True)
class Fault:
    """One. round: of the run, from 1: earlier it does not happen. into: of the phase's usual length,
    when. seconds: for how long. target: a component, or "all" devices at once."""

    number: int
    round: int
    phase: str
    into: float
    kind: str
    target: str
    seconds: float

    def __str__(self) -> str:
        lasting = f" for {self.seconds:.1f} s" if self.seconds else ""
        return f"{self.kind} {self.target}{lasting} in {self.phase} of round {self.round}"


@dataclass(frozen=True)
class Kind:
    """A kind of fault. per_200: how many in 200 rounds, of a device kind for each device. at_least: in
    any run. shortest, longest: seconds."""

    name: str
    target: str
    per_200: float
    shortest: float
    longest: float
    at_least: int = 0


KINDS = (
    Kind("kill", "coordinator", 28, 0.0, 1.5, at_least=1),
    Kind("kill", "broker", 11, 0.0, 1.0, at_least=1),
    Kind("kill and wipe", "broker", 11, 0.0, 1.0),
    Kind("kill", "device", 12, 0.0, 3.0, at_least=1),
    Kind("stop", "coordinator", 8, 0.5, 4.0),
    Kind("stop", "broker", 6, 0.5, 3.0),
    Kind("stop", "device", 2, 0.5, 9.0),
    Kind("cut", "coordinator", 6, 0.0, 0.0),
    Kind("refuse", "coordinator", 3, 0.5, 2.0),
    Kind("stall", "coordinator", 5, 0.5, 4.0),
    Kind("delay", "coordinator", 3, 2.0, 5.0),
    Kind("cut", "device", 1.5, 0.0, 0.0),
    Kind("refuse", "device", 0.8, 0.5, 3.0),
    Kind("stall", "device", 1.5, 0.5, 5.0),
    Kind("delay", "device", 1, 2.0, 6.0),
    Kind("unplug", "device", 2, 0.5, 10.0),
    Kind("shape", "device", 1, 2.0, 6.0),
    Kind("unplug", "all", 4, 0.5, 3.0),
    Kind("fill", "coordinator", 8, 0.5, 4.0),
    Kind("fill", "device", 1.5, 0.5, 4.0),
    Kind("kill thrice", "coordinator", 4, 0.1, 0.8),
    Kind("kill thrice", "device", 0.5, 0.1, 1.0),
    Kind("kill both", "broker", 4, 0.0, 0.5),
    Kind("kill all", "all", 3, 0.0, 1.0),
)
"""kill thrice: and twice more while it starts. kill both: the coordinator as well. kill all: a power cut for
everybody. Of a network that cannot be unplugged or shaped, the proxy stalls or delays."""


def draw(seed: int, rounds: int, devices: list[str], *, only_kills: bool = False) -> list[Fault]:
    """The faults of a run, in the order of their rounds. only_kills: one of each component."""
    chance = random.Random(seed)
    last = max(1, rounds - CALM_ROUNDS)
    found: list[tuple[int, str, float, Kind, str, float]] = []
    for kind in KINDS:
        targets = devices if kind.target == "device" else [kind.target]
        # Whole ones for sure, the rest by chance; each device has its own.
        wanted = kind.per_200 * rounds / 200
        if only_kills:
            wanted = float(kind.name == "kill")
        for target in targets:
            n = math.floor(wanted) + (chance.random() < wanted % 1)
            n = max(n, kind.at_least)
            phases = [PHASES[(i + chance.randrange(100)) % len(PHASES)] for i in range(n)]
            if n >= len(PHASES):
                phases = [PHASES[i % len(PHASES)] for i in range(n)]
            chance.shuffle(phases)
            for i in range(n):
                low, high = last * i / n, last * (i + 1) / n
                at = 1 + min(last - 1, int(chance.uniform(low, high)))
                found.append(
                    (
                        at,
                        phases[i],
                        chance.uniform(0, 1),
                        kind,
                        target,
                        chance.uniform(kind.shortest, kind.longest),
                    )
                )
    chance.shuffle(found)
    found.sort(key=lambda entry: entry[0])
    return [
        Fault(number, at, phase, into, kind.name, target, round(seconds, 2))
        for number, (at, phase, into, kind, target, seconds) in enumerate(found, start=1)
    ]
