"""What operators look at and change in a fleet's runs, whether or not a `covey up` plays them.

A `covey up` that plays a run is asked through the database, and does it itself, within a second. What
nobody plays is changed here at once.
"""

import contextlib
import fcntl
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from covey_coordinator.config import load_fleet
from covey_coordinator.files import storage_error
from covey_coordinator.store import FILE, RoundRecord, RunDirectory, RunRecord, Store, Wish
from covey_coordinator.store.directory import PARAMETERS
from covey_shared.errors import ConfigError

LOCK = ".lock"
"""Held by the one `covey up` of a fleet."""

ENDED = ("completed", "aborted")


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


@contextlib.contextmanager
def locked(fleet_dir: Path) -> Iterator[bool]:
    """Try to be the one process that plays a fleet's runs -> whether it is. Raises StorageError."""
    try:
        lock = (fleet_dir / LOCK).open("w")
    except OSError as error:
        raise storage_error("write", fleet_dir / LOCK, error) from error
    with lock as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
        else:
            yield True


class Operator:
    """One command of an operator's. ``with Operator(fleet_dir) as operator``.

    alone: no `covey up` runs, and none starts while this lasts. Every method returns what is to be said,
    and raises ConfigError for what cannot be, StorageError.
    """

    def __init__(self, fleet_dir: Path) -> None:
        load_fleet(fleet_dir)
        self._path = fleet_dir
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "Operator":
        self.alone = self._stack.enter_context(locked(self._path))
        self.store = self._stack.enter_context(store_of(self._path))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def directory(self, name: str) -> RunDirectory:
        """A run's files."""
        return RunDirectory(self._path / "runs" / name, self.store)

    def _has_open_round(self, name: str) -> bool:
        opened = self.store.opened()
        return opened is not None and opened.run == name

    def pause(self, name: str, *, now: bool) -> str:
        """Call no more rounds. now: and abandon the open one."""
        wish: Wish = "pause now" if now else "pause"
        # What nobody plays can be paused at once, but for a round that is to be finished first.
        at_once = self.alone and (now or not self._has_open_round(name))
        before = ""

        def change(record: RunRecord) -> Wish:
            nonlocal before
            before = record.state.status
            if before in (*ENDED, "failed", "stopped"):
                raise ConfigError(f"run {name} is not to be paused: it is {before}")
            if before == "running" and not at_once:
                return wish
            record.state.status, record.state.message = "paused", ""
            return ""

        status = self.store.amend(name, change).state.status
        if before == "paused":
            return f"run {name} is paused already"
        if status == "paused":
            return f"run {name} is paused; covey resume {name} lets it go on"
        if self.alone:
            return (
                f"run {name} has an open round, which the next `covey up` finishes before it pauses; "
                "--now abandons it"
            )
        return (
            f"run {name} pauses now: its open round is abandoned"
            if now
            else f"run {name} pauses when its open round is over; --now abandons that"
        )

    def resume(self, name: str) -> str:
        """Let a run go on that was paused, that failed or was stopped."""
        before: tuple[str, Wish] = "", ""

        def change(record: RunRecord) -> Wish:
            nonlocal before
            before = record.state.status, record.wish
            if record.state.status in ENDED:
                raise ConfigError(
                    f"run {name} cannot go on: it is {record.state.status}; queue a new one"
                    + (", or take it back with covey rollback" if before[0] == "completed" else "")
                )
            if record.wish == "abort":
                raise ConfigError(f"run {name} is being aborted")
            if record.state.status not in ("queued", "running"):
                record.state.status, record.state.message = "queued", ""
            return ""

        self.store.amend(name, change)
        status, wish = before
        if self.alone and status == "paused" and self._has_open_round(name):
            self.store.forget_round()  # it was to be abandoned
        if status in ("queued", "running"):
            return f"run {name} goes on" if wish else f"run {name} is {status} already"
        return f"run {name} is queued again{self._unplayed()}"

    def abort(self, name: str) -> str:
        """End a run for good, and abandon its open round. Its models stay."""
        before = ""

        def change(record: RunRecord) -> Wish:
            nonlocal before
            before = record.state.status
            if before == "completed":
                raise ConfigError(f"run {name} is over: it is completed")
            if before == "running" and not self.alone:
                return "abort"
            record.state.status, record.state.message = "aborted", ""
            return ""

        after = self.store.amend(name, change)
        if before == "aborted":
            return f"run {name} is aborted already"
        if after.state.status == "aborted":
            return f"run {name} is aborted"
        return f"run {name} is aborted now: its open round is abandoned"

    def roll_back(self, name: str, to: int, now_unix: float) -> str:
        """Make the model after one of its rounds the run's model. to: that round's number within the
        run; 0 is the plan's own model."""
        directory = self.directory(name)
        played = 0

        def change(record: RunRecord, rounds: list[RoundRecord]) -> None:
            nonlocal played
            state = record.state
            played = state.rounds_done
            if state.status == "running" and not self.alone:
                raise ConfigError(
                    f"run {name} is being played: covey pause {name}, and wait for covey status to say "
                    "that it is paused"
                )
            by_index = {done.index: done.line for done in rounds}
            if to == state.rounds_done:
                raise ConfigError(f"run {name} stands at round {to}: there is nothing to take back")
            if to > state.rounds_done:
                raise ConfigError(f"run {name} has played {state.rounds_done} rounds, not {to}")
            state.model = _model_after(directory, by_index, to) if to else ""
            kept = [by_index[index] for index in sorted(by_index) if index <= to]
            done = sum(line.get("outcome") == "completed" for line in kept)
            state.rounds_done = state.model_index = to
            state.rounds_completed, state.rounds_abandoned = done, len(kept) - done
            state.last = by_index.get(to)
            state.message = f"rolled back from round {played} to round {to}"
            if state.status not in ("queued", "running"):
                state.status = "paused"  # what is over does not begin again by itself

        record = self.store.roll_back(name, now_unix, change)
        directory.settle(record.state, whole=True)
        said = f"run {name} is back at round {to} of the {played} that it had played"
        if record.state.status == "paused":
            return f"{said}; covey resume {name} lets it go on from there"
        return f"{said}, and goes on from there{self._unplayed()}"

    def _unplayed(self) -> str:
        return ": `covey up` does not run for this fleet" if self.alone else ""


def _model_after(directory: RunDirectory, lines: dict[int, dict[str, object]], index: int) -> str:
    """The hash of a round's model, which is there whole. Raises ConfigError."""
    line = lines.get(index, {})
    if line.get("outcome") != "completed":
        reason = line.get("reason", "")
        raise ConfigError(
            f"round {index} of run {directory.name} gave no model: it was abandoned ({reason}); name "
            "one that was completed"
        )
    path = directory.round(index) / PARAMETERS
    try:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
    except FileNotFoundError:
        kept = sorted(directory.staged().keys() & lines.keys())
        there = ", ".join(map(str, kept)) or "none"
        raise ConfigError(
            f"the model after round {index} of run {directory.name} is not kept any more "
            f"(`models.keep_rounds` in run.toml); there are those after rounds: {there}"
        ) from None
    except OSError as error:
        raise storage_error("read", path, error) from error
    if digest != line.get("next_model", digest):
        raise ConfigError(f"{path} is damaged: it is not the model after round {index}; restore it")
    return digest


@dataclass(frozen=True, slots=True)
class Shown:
    """A round, with what there is of it on the disk."""

    record: RoundRecord
    transcript: Path | None
    model: Path | None


def shown(directory: RunDirectory, record: RoundRecord) -> Shown:
    """Find a round's files."""
    back = record.rolled_back_unix is not None
    place = directory.aside(record) if back else directory.round(record.index)
    transcript, model = place / "transcript", place / "model.onnx"
    return Shown(
        record,
        transcript if transcript.exists() else None,
        model if model.exists() else None,
    )


def find_round(store: Store, run: str, index: int) -> tuple[RoundRecord, list[RoundRecord]]:
    """A round by its number within the run, and those that had it before and were rolled back. If all
    were, the last of them. Raises ConfigError."""
    found = [record for record in store.history(run) if record.index == index]
    if not found:
        done = store.run(run).rounds_done
        raise ConfigError(f"run {run} has no round {index}; it has played {done}")
    counted = [record for record in found if record.rolled_back_unix is None]
    chosen = (counted or found)[-1]
    return chosen, [record for record in found if record.id != chosen.id]
