"""What operators look at and change in a fleet's runs, whether or not a `covey up` plays them."""

from pathlib import Path

from covey_coordinator.store import FILE, Store
from covey_shared.errors import ConfigError


def store_of(fleet_dir: Path) -> Store:
    """A fleet's database. Raises ConfigError if there is none yet: looking makes none."""
    if not (fleet_dir / FILE).exists():
        raise ConfigError(
            f"there is no run in {fleet_dir}; name the fleet with --fleet-dir, or queue one with "
            "covey run"
        )
    return Store.open(fleet_dir / FILE)


def chosen_run(store: Store, name: str | None) -> str:
    """The run of that name; without one the run queued last. Raises ConfigError, StorageError."""
    names = [known for known, _ in store.runs()]
    if name is None and names:
        return names[-1]
    if name is None or not names:
        raise ConfigError("there is no run in this fleet yet: covey run PLAN")
    if name not in names:
        raise ConfigError(f"there is no run {name!r}; there are: {', '.join(sorted(names))}")
    return name
