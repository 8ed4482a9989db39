"""The demo from its options to its report."""

import asyncio
import importlib.util
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from rich.console import Console

from covey_coordinator.config import (
    CohortConfig,
    DeadlinesConfig,
    EncodingConfig,
    RunConfig,
    WorkConfig,
)
from covey_coordinator.plans.bundle import PlanBundle, load_bundle
from covey_coordinator.run import HeldOut, RoundOutcome, Run
from covey_coordinator.store import FILE, RunDirectory, Store
from covey_fleet import baseline, digits, report
from covey_fleet.digits import ByLabel, Dirichlet, Examples, Split
from covey_fleet.fleet import BrokerChoice, Fleet, FleetEvent, FleetSettings
from covey_fleet.report import Summary
from covey_fleet.view import View
from covey_shared.errors import ConfigError

log = logging.getLogger("covey.fleet")

Model = Literal["mlp", "cnn"]

PLANS = Path(__file__).parent / "plans"
MIN_DEVICES = 3
LOG = "demo.log"

# Found by trying: for both models and all splits, over several seeds. Higher rates diverge where
# each device knows only some digits.
LR = 0.07
BATCHES, BATCH_SIZE = 20, 64
DEFAULT_ROUNDS = 24
# Devices that know only some digits pull the model apart, and of three devices, which it takes all
# to unmask a sum, some round or other loses one.
DEFAULT_ROUNDS_BY_LABEL = 75


@dataclass(frozen=True, slots=True)
class DemoOptions:
    """`covey demo`'s options. rounds: None for as many as the split needs."""

    devices: int = 10
    rounds: int | None = None
    dropout: float = 0.15
    split: Split = field(default_factory=lambda: Dirichlet(0.5))
    model: Model = "mlp"
    seed: int = 7
    broker: BrokerChoice = "auto"
    processes: bool = False
    report: Path = Path("covey-demo")
    verbose: bool = False

    @property
    def n_rounds(self) -> int:
        """Rounds to play."""
        if self.rounds is not None:
            return self.rounds
        return DEFAULT_ROUNDS_BY_LABEL if isinstance(self.split, ByLabel) else DEFAULT_ROUNDS


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a demo came to. text: the statement for people."""

    summary: Summary
    text: list[str]
    files: list[Path]


def check_packages(broker: BrokerChoice) -> None:
    """Raises ConfigError naming what to install."""
    wanted = ["sklearn", "matplotlib", "rich"] + ["amqtt"] * (broker == "embedded")
    for package in wanted:
        if importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"the demo needs {package}, which is not installed; run: pip install 'covey[demo]'"
            )


def run_config(options: DemoOptions) -> RunConfig:
    """The demo's run. Deadlines are short: everything is on one machine, and who vanishes is told
    of by the broker; what takes long, in large cohorts, is the arithmetic."""
    n = options.devices
    return RunConfig(
        plan=options.model,
        rounds=options.n_rounds,
        cohort=CohortConfig(goal=n, minimum=MIN_DEVICES),
        work=WorkConfig(batches=BATCHES, batch_size=BATCH_SIZE, hyper={"lr": LR}),
        encoding=EncodingConfig(max_weight=BATCHES * BATCH_SIZE),
        deadlines=DeadlinesConfig(
            gather_s=2.0 + n / 20,
            share_s=20.0 + n / 2,
            collect_s=60.0 + n / 2,
            unmask_s=20.0 + n / 2,
            absent_grace_s=0.5,
            resend_s=1.0,
        ),
    )


async def run_demo(options: DemoOptions, console: Console) -> Outcome:
    """Play the demo and write its report. Raises CoveyError."""
    started = time.monotonic()
    check_packages(options.broker)
    report.prepare(options.report)
    log_file = options.report / LOG if options.verbose else None
    directory = Path(tempfile.mkdtemp(prefix="covey-demo-"))
    try:
        with logging_to(log_file):
            return await _play(options, console, directory, log_file, started)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


async def _play(
    options: DemoOptions, console: Console, directory: Path, log_file: Path | None, started: float
) -> Outcome:
    bundle = load_bundle(PLANS / options.model)
    config = run_config(options)
    sizes: list[int] = []
    with (
        Store.open(directory / FILE) as store,
        View(console, config.rounds, options.devices) as view,
    ):

        def observe(event: FleetEvent) -> None:
            if isinstance(event, RoundOutcome) and event.completed is not None:
                sizes.append(len(event.completed.survivors))
            view.observe(event)

        rng = np.random.default_rng(options.seed)
        train, test = digits.hold_out(digits.load(), rng)
        rows = digits.spread(train.labels, options.devices, options.split, rng)
        settings = FleetSettings(
            parts=[train.take(part) for part in rows],
            broker=options.broker,
            seed=options.seed,
            dropout=options.dropout,
            processes=options.processes,
            log_file=log_file,
        )
        run_directory = RunDirectory.create(directory / "run", b"", os.urandom(16), store)
        run = Run(run_directory, config, bundle, held_out=HeldOut(test.features, test.labels))
        async with Fleet(directory, settings, store, observe) as fleet:
            view.say(_opening(options, fleet, bundle, train, test))
            playing = time.monotonic()
            state = await fleet.play(run)
            seconds_per_round = (time.monotonic() - playing) / config.rounds
    lines = run_directory.read_metrics()
    examples = sum(line.get("examples", 0) for line in lines)
    central: float | None = None
    if examples:
        parameters = await asyncio.to_thread(
            baseline.train_centrally, bundle, train, examples, BATCH_SIZE, LR, options.seed
        )
        central = baseline.accuracy(bundle, parameters, test)
    overheard = fleet.ear.overheard
    share = options.devices * config.rounds
    summary = Summary(
        accuracy=round(baseline.accuracy(bundle, run.parameters, test), 4),
        baseline_accuracy=None if central is None else round(central, 4),
        initial_accuracy=round(baseline.accuracy(bundle, bundle.initial, test), 4),
        rounds_requested=config.rounds,
        rounds_completed=state.rounds_completed,
        rounds_abandoned=state.rounds_abandoned,
        abandoned_reasons=report.abandoned_reasons(lines),
        devices=options.devices,
        dropout=options.dropout,
        dropouts_injected=len(fleet.vanished),
        dropouts_by_moment=report.by_moment(v.moment for v in fleet.vanished),
        sums_checked=fleet.sums_checked,
        sum_mismatches=fleet.sum_mismatches,
        smallest_sum=min(sizes, default=0),
        largest_sum=max(sizes, default=0),
        examples=examples,
        parameters=bundle.header.n_params,
        bytes_up_per_device_round=round(fleet.traffic.up / share, 1),
        bytes_down_per_device_round=round(fleet.traffic.down / share, 1),
        seconds_per_round=round(seconds_per_round, 3),
        seconds=round(time.monotonic() - started, 1),
        masked_update_correlation=None if overheard is None else round(overheard.correlation, 4),
        broker=fleet.broker_name,
        model=options.model,
        split=str(options.split),
        processes=options.processes,
        seed=options.seed,
    )
    plot = await asyncio.to_thread(report.draw, lines, summary)
    files = report.write(options.report, summary, run_directory, plot)
    text = report.statement(summary, overheard, test.n)
    return Outcome(summary, text, files if log_file is None else [*files, log_file])


def _opening(
    options: DemoOptions, fleet: Fleet, bundle: PlanBundle, train: Examples, test: Examples
) -> str:
    where = "each in a process of its own" if options.processes else "in one process"
    return (
        f"{options.devices} devices, {where}, on {fleet.broker_name}; secure aggregation always on\n"
        f"{options.model} with {bundle.header.n_params:,} parameters; {train.n:,} digits spread "
        f"{options.split}, {test.n} held out"
    )


@contextmanager
def logging_to(path: Path | None) -> Iterator[None]:
    """Send all logging to a file, or nowhere: it must not get between the lines of the view."""
    root = logging.getLogger()
    old_handlers, old_level = root.handlers[:], root.level
    handler: logging.Handler = (
        logging.NullHandler() if path is None else logging.FileHandler(path, "w", "utf-8")
    )
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING if path is None else logging.INFO)
    logging.captureWarnings(True)
    try:
        yield
    finally:
        logging.captureWarnings(False)
        root.handlers[:] = old_handlers
        root.setLevel(old_level)
        handler.close()
