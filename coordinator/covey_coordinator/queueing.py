"""Queues a run: options and run.toml -> a checked run directory that `covey up` picks up."""

import os
import time
from pathlib import Path
from typing import Any

import msgspec
import tomli_w

from covey_coordinator.config import CohortConfig, RunConfig, check_run, load, load_fleet
from covey_coordinator.daemon import load_held_out
from covey_coordinator.fleet import FleetDirectory, check_name
from covey_coordinator.plans.bundle import load_bundle
from covey_coordinator.round import new_run_id
from covey_coordinator.run import hyper_values
from covey_coordinator.store import RunDirectory
from covey_shared import config as config_reader
from covey_shared.errors import ConfigError

# Command-line option -> key in run.toml.
_KEYS = {
    "rounds": ("rounds",),
    "goal": ("cohort", "goal"),
    "minimum": ("cohort", "minimum"),
    "batches": ("work", "batches"),
    "batch_size": ("work", "batch_size"),
    "lr": ("work", "hyper", "lr"),
    "test": ("evaluation", "file"),
}


def queue_run(
    fleet_dir: Path, plan: Path, name: str | None, options: dict[str, Any]
) -> RunDirectory:
    """Check everything that can be checked now, then queue. plan: a plan's directory or a run.toml.

    Raises ConfigError, DataError, MalformedError or StorageError that names the file and the key.
    """
    load_fleet(fleet_dir)
    if plan.is_dir():
        table: dict[str, Any] = {"plan": str(plan.absolute())}
        source = "the command line"
    else:
        config = load(plan, RunConfig, hint="give a plan's directory or a run.toml")
        table = _table(config)
        table["plan"] = str((plan.parent / config.plan).absolute())
        if config.evaluation is not None:
            table["evaluation"]["file"] = str((plan.parent / config.evaluation.file).absolute())
        source = str(plan)
    for option, value in options.items():
        if value is not None:
            _set(table, _KEYS[option], str(value.absolute()) if option == "test" else value)
    if "goal" not in table.get("cohort", {}):
        # A goal above the size of the fleet would make every round wait for devices there are not.
        cohort, known = CohortConfig(), len(FleetDirectory(fleet_dir).devices())
        minimum = table.get("cohort", {}).get("minimum", cohort.minimum)
        _set(table, ("cohort", "goal"), max(minimum, min(cohort.goal, known or cohort.goal)))
    config = config_reader.convert(table, RunConfig, file=source)
    check_run(config, file=source)
    hyper_values(load_bundle(Path(config.plan)), config)
    if config.evaluation is not None:
        load_held_out(Path(config.evaluation.file), config.evaluation)
    name = name or time.strftime("%Y%m%d-%H%M%S")
    check_name(name, "run")
    text = tomli_w.dumps(_table(config)).encode()
    return RunDirectory.create(fleet_dir / "runs" / name, text, new_run_id(os.urandom))


def _set(table: dict[str, Any], keys: tuple[str, ...], value: Any) -> None:
    for key in keys[:-1]:
        table = table.setdefault(key, {})
    table[keys[-1]] = value


def _table(config: RunConfig) -> dict[str, Any]:
    """The configuration as TOML has it: without the keys that are not set."""
    built = msgspec.to_builtins(config)
    if not isinstance(built, dict):
        raise ConfigError("a run's configuration is a table")
    return {key: value for key, value in built.items() if value is not None}
