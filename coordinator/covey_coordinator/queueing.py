"""Queues a run: options and run.toml -> a checked run directory that `covey up` picks up."""

import os
import time
import tomllib
from pathlib import Path
from typing import Any

import msgspec
import tomli_w

from covey_coordinator.config import CohortConfig, RunConfig, check_run, load, load_fleet
from covey_coordinator.daemon import load_held_out
from covey_coordinator.fleet import FleetDirectory, check_name
from covey_coordinator.plans.bundle import load_bundle
from covey_coordinator.plans.signing import owner_of, signature_file
from covey_coordinator.round import new_run_id
from covey_coordinator.run import hyper_values, rehearse
from covey_coordinator.store import FILE, RunDirectory, Store
from covey_shared import config as config_reader
from covey_shared.errors import ConfigError, DataError

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

    The run's database stays open. Raises ConfigError, DataError, MalformedError or StorageError that names
    the file and the key.
    """
    load_fleet(fleet_dir)
    if name is not None:
        check_name(name, "run")
    source = "the command line" if plan.is_dir() else str(plan)
    table: dict[str, Any] = {"plan": str(plan.absolute())} if plan.is_dir() else _given(plan)
    for option, value in options.items():
        if value is not None:
            _set(table, _KEYS[option], str(value.absolute()) if option == "test" else value)
    if "goal" not in table.get("cohort", {}):
        # A goal above the size of the fleet would make every round wait for devices there are not.
        devices, now = FleetDirectory(fleet_dir).devices(), time.time()
        cohort, known = CohortConfig(), sum(d.status(now) == "active" for d in devices)
        minimum = table.get("cohort", {}).get("minimum", cohort.minimum)
        _set(table, ("cohort", "goal"), max(minimum, min(cohort.goal, known or cohort.goal)))
    config = config_reader.convert(table, RunConfig, file=source)
    check_run(config, file=source)
    bundle, held_out = load_bundle(Path(config.plan)), None
    hyper_values(bundle, config)
    if config.evaluation is not None:
        held_out = load_held_out(Path(config.evaluation.file), config.evaluation)
    try:
        rehearse(bundle, held_out)
    except DataError as error:
        file = config.evaluation.file if config.evaluation is not None else ""
        raise DataError(f"evaluation set {file}: {error}") from error
    text = tomli_w.dumps(_table(config)).encode()
    runs = fleet_dir / "runs"
    signatures = {signature_file(owner_of(s)): s for s in bundle.signatures}
    path, store = runs / (name or _free_name(runs)), Store.open(fleet_dir / FILE)
    return RunDirectory.create(
        path, text, new_run_id(os.urandom), store, signatures, created_unix=time.time()
    )


def _given(file: Path) -> dict[str, Any]:
    """A run.toml as it stands, with absolute paths: what it leaves out is not the default yet."""
    config = load(file, RunConfig, hint="give a plan's directory or a run.toml")
    table = tomllib.loads(file.read_text(encoding="utf-8"))
    table["plan"] = str((file.parent / config.plan).absolute())
    if config.evaluation is not None:
        table["evaluation"]["file"] = str((file.parent / config.evaluation.file).absolute())
    return table


def _free_name(runs: Path) -> str:
    """The time, and a number if there is a run of that second already."""
    name = now = time.strftime("%Y%m%d-%H%M%S")
    number = 1
    while (runs / name).exists():
        number += 1
        name = f"{now}-{number}"
    return name


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
