"""Runs and rounds in words, for people, and as JSON, for programs."""

from pathlib import Path
from typing import Any

import msgspec
from rich.table import Table

from covey_coordinator.config import RunConfig, load
from covey_coordinator.explaining import declines
from covey_coordinator.moments import moment
from covey_coordinator.status import Status
from covey_coordinator.store import OpenRound, Progress, RoundRecord, RunRecord
from covey_shared.errors import ConfigError

ENDINGS = {"pause": "pausing", "pause now": "pausing", "abort": "aborting"}

PHASES = {
    "gather": "devices check in",
    "share": "keys are shared",
    "roster": "devices vote on who takes part",
    "collect": "devices train and send their updates",
    "view": "devices vote on whose updates are in",
    "unmask": "the masks are removed",
}


def standing(record: RunRecord, up: bool) -> str:
    """A run's status in a word. up: whether a `covey up` runs."""
    if record.state.status != "running":
        return record.state.status
    return ENDINGS.get(record.wish, "running") if up else "interrupted"


def note_of(record: RunRecord) -> str:
    """What is to be said of a run."""
    state = record.state
    notes = [state.message] if state.message else []
    if state.transcripts_lost:
        notes.append(
            f"{state.transcripts_lost} rounds without a transcript: {state.transcript_problem}"
        )
    return "; ".join(notes)


def open_round(opened: OpenRound, progress: Progress | None, now: Status | None) -> str:
    """Which round is open, and what it waits for. progress: what was last said of it."""
    head = f"{opened.index} of run {opened.run} (number {opened.round})"
    if now is None:
        return f"{head} waits for `covey up`"
    if not now.connected:
        return f"{head} waits for the broker"
    if progress is None or progress.round != opened.round:
        return f"{head} has just been called"
    what = PHASES.get(progress.phase, "")
    answered = f"{progress.answered} of {max(progress.awaited, progress.answered)} answered"
    return f"{head}, {progress.phase}{f': {what}' if what else ''}; {answered}"


def runs_table(records: list[RunRecord], up: bool, fleet_dir: Path) -> Table:
    """One row a run."""
    table = Table(box=None)
    for column in ("run", "queued", "status", "rounds", "completed", "abandoned", "last", "note"):
        table.add_column(column)
    for record in records:
        state = record.state
        table.add_row(
            record.name, moment(record.created_unix), standing(record, up),
            f"{state.rounds_done}/{_asked(fleet_dir, record.name) or '?'}",
            str(state.rounds_completed), str(state.rounds_abandoned), _figure(state.last or {}),
            note_of(record),
        )  # fmt: skip
    return table


def run_json(record: RunRecord, up: bool, fleet_dir: Path) -> dict[str, Any]:
    state = record.state
    return {
        "run": record.name,
        "run_id": state.run_id,
        "queued_unix": record.created_unix,
        "status": standing(record, up),
        "rounds": _asked(fleet_dir, record.name),
        "rounds_done": state.rounds_done,
        "rounds_completed": state.rounds_completed,
        "rounds_abandoned": state.rounds_abandoned,
        "model": state.model or None,
        "last": state.last,
        "note": note_of(record),
    }


def _asked(fleet_dir: Path, name: str) -> int | None:
    """How many rounds a run is to play, if its run.toml can be read."""
    try:
        return load(fleet_dir / "runs" / name / "run.toml", RunConfig, hint="").rounds
    except ConfigError:
        return None


def _figure(line: dict[str, Any]) -> str:
    """How good a round's model is, in the figure that says most."""
    for key, what in (
        ("test_accuracy", "accuracy"),
        ("test_loss", "test loss"),
        ("train_loss", "loss"),
    ):
        if key in line:
            return f"{what} {line[key]:.4f}"
    return ""


def round_json(record: RoundRecord) -> dict[str, Any]:
    turnout = None if record.turnout is None else msgspec.to_builtins(record.turnout)
    return (
        {"run": record.run}
        | record.line
        | {"rolled_back_unix": record.rolled_back_unix, "turnout": turnout}
    )


def round_rows(record: RoundRecord) -> list[tuple[str, str]]:
    """A round for people: (what, how much of it)."""
    line = record.line
    number, outcome = line.get("round", "?"), line["outcome"]
    rows = [
        ("round", f"{record.index} of run {record.run} (number {number})"),
        ("outcome", outcome if outcome == "completed" else f"{outcome}: {line.get('reason', '')}"),
    ]
    if record.rolled_back_unix is not None:
        rows.append(("rolled back", moment(record.rolled_back_unix)))
    if (turnout := record.turnout) is not None:
        rows.append(("ended", moment(turnout.ended_unix)))
        rows.append(("checked in", str(turnout.checked_in)))
        if told := declines(turnout):
            rows.append(("declined", told))
        for what, count in (("left out", turnout.refused), ("too late", turnout.late)):
            if count:
                rows.append((what, str(count)))
    rows.append(("cohort", str(line.get("cohort", "?"))))
    if outcome == "completed":
        dropped = line.get("dropped", [])
        rows.append(("in the sum", str(line.get("survivors", "?"))))
        rows.append(("dropped", f"{len(dropped)}: {', '.join(dropped)}" if dropped else "none"))
    for key, what in (
        ("examples", "examples"), ("train_loss", "training loss"), ("test_loss", "test loss"),
        ("test_accuracy", "test accuracy"), ("test_problem", "not evaluated"),
        ("update_norm", "update norm"),
    ):  # fmt: skip
        if key in line:
            value = line[key]
            rows.append((what, f"{value:.4f}" if isinstance(value, float) else str(value)))
    seconds = line.get("phase_seconds", {})
    spent = ", ".join(f"{phase} {s:.1f}" for phase, s in seconds.items())
    rows.append(("seconds", f"{line.get('seconds', 0):.1f}" + (f" ({spent})" if spent else "")))
    for key, what in (("bytes_received", "bytes received"), ("bytes_sent", "bytes sent")):
        if key in line:
            rows.append((what, f"{line[key]:,}"))
    if "model" in line:
        rows.append(("model before", f"{line['model']}, revision {line.get('revision', 0)}"))
    if "next_model" in line:
        rows.append(("next model", line["next_model"]))
    return rows


def as_json(value: object) -> str:
    """Indented, one value."""
    return msgspec.json.format(msgspec.json.encode(value), indent=2).decode()
