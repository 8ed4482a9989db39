"""Small fleets for tests: real broker, coordinator and devices, little data, short deadlines."""

import asyncio
import os
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from covey_coordinator.broker import BrokerKind
from covey_coordinator.config import (
    CohortConfig,
    DeadlinesConfig,
    EncodingConfig,
    RunConfig,
    WorkConfig,
)
from covey_coordinator.plans.bundle import PlanBundle, load_bundle
from covey_coordinator.run import RoundOutcome, Run
from covey_coordinator.store import FILE, RunDirectory, RunState, Store
from covey_fleet.demo import PLANS
from covey_fleet.digits import Examples
from covey_fleet.faults import FaultPlan, Moment
from covey_fleet.fleet import Fleet, FleetEvent, FleetSettings
from covey_shared.messages import DeviceId

DEADLINES = DeadlinesConfig(
    gather_s=1.0,
    share_s=20.0,
    collect_s=20.0,
    unmask_s=20.0,
    absent_grace_s=0.3,
    resend_s=0.5,
)


def plan() -> PlanBundle:
    """The demo's smaller plan."""
    return load_bundle(PLANS / "mlp")


def examples(n: int, seed: int = 0) -> Examples:
    """Noise with labels: nothing to learn, quick to make."""
    rng = np.random.default_rng(seed)
    features = rng.random((n, 1, 8, 8), dtype=np.float32)
    return Examples(features, rng.integers(0, 10, n, dtype=np.int64))


def device_names(n: int) -> tuple[DeviceId, ...]:
    """As `Fleet` names them."""
    return tuple(DeviceId(f"pi-{i}") for i in range(1, n + 1))


@dataclass(frozen=True)
class Script(FaultPlan):
    """Faults by name: (round, device) -> moment."""

    fates: dict[tuple[int, DeviceId], Moment] = field(default_factory=dict, hash=False)

    def fate(self, device: DeviceId, round_id: int) -> Moment | None:
        return self.fates.get((round_id, device))


def script(fates: dict[tuple[int, str], Moment]) -> Script:
    """Exactly these devices vanish, and nobody else."""
    return Script(0, 0.0, (), fates={(r, DeviceId(name)): m for (r, name), m in fates.items()})


@dataclass
class Played:
    """A running fleet and what it came to so far."""

    fleet: Fleet
    run: Run
    outcomes: list[RoundOutcome]

    async def play(self) -> RunState:
        """All rounds, to their end."""
        return await self.fleet.play(self.run)

    @property
    def survivors(self) -> list[tuple[DeviceId, ...]]:
        """Of each round; nobody if it was abandoned."""
        return [o.completed.survivors if o.completed else () for o in self.outcomes]

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """What metrics.jsonl says."""
        return self.run.directory.read_metrics()


@asynccontextmanager
async def small_fleet(
    directory: Path,
    kind: BrokerKind,
    *,
    devices: int = 4,
    rounds: int = 3,
    lr: float = 0.05,
    on_event: Callable[[FleetEvent], None] = lambda event: None,
    deadlines: DeadlinesConfig = DEADLINES,
    minimum: int = 3,
    settings: dict[str, Any] | None = None,
) -> AsyncIterator[Played]:
    """A fleet that is up, and a run that has not begun. settings: fields of `FleetSettings`."""
    outcomes: list[RoundOutcome] = []

    def observe(event: FleetEvent) -> None:
        if isinstance(event, RoundOutcome):
            outcomes.append(event)
        on_event(event)

    parts = [examples(40, seed) for seed in range(devices)]
    chosen = replace(FleetSettings(parts=parts, broker=kind), **(settings or {}))
    config = RunConfig(
        plan="mlp",
        rounds=rounds,
        cohort=CohortConfig(goal=devices, minimum=minimum),
        work=WorkConfig(batches=3, batch_size=16, hyper={"lr": lr}),
        encoding=EncodingConfig(max_weight=48),
        deadlines=deadlines,
    )
    with Store.open(directory / FILE) as store:
        run_directory = RunDirectory.create(directory / "run", b"", os.urandom(16), store)
        run = Run(run_directory, config, plan())
        async with Fleet(directory, chosen, store, observe) as fleet:
            yield Played(fleet, run, outcomes)


def mutated(data: bytes, chance: random.Random) -> bytes:
    """Bytes with something wrong: flipped, cut, extended, doubled or swapped."""
    changed = bytearray(data)
    match chance.randrange(6):
        case 0 if changed:
            changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
        case 1:
            del changed[chance.randrange(len(changed) + 1) :]
        case 2:
            changed += chance.randbytes(chance.randrange(1, 40))
        case 3 if changed:
            at = chance.randrange(len(changed))
            changed[at : at + 8] = chance.randbytes(8)
        case 4:
            changed = (changed * 2)[:122_000]
        case _:
            changed = bytearray(chance.randbytes(chance.randrange(200)))
    return bytes(changed)


def go(scenario: Any, timeout_s: float = 120.0) -> None:
    """Run a scenario in an event loop of its own; a hang fails the test."""
    asyncio.run(asyncio.wait_for(scenario, timeout_s))
