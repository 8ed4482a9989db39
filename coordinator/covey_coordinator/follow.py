"""Follows a run from outside, by its directory: one line a round, and where the open one stands."""

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from covey_coordinator.store import RunDirectory, RunState

if TYPE_CHECKING:
    from rich.console import Console

POLL_S = 0.3


def follow(
    directory: RunDirectory, up: Callable[[], bool], console: "Console | None" = None
) -> bool:
    """Print until the run ends. True if it gave a model. Ctrl-C stops following, not the run.

    up: whether there is a `covey up` that plays it.
    """
    # Not above: `covey up` has only words from this module, and starts sooner without.
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
    )

    console = console or Console()
    shown, paused = 0, False
    columns = (
        TextColumn("round {task.fields[round]}"),
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    try:
        hidden = not console.is_terminal
        with Progress(*columns, console=console, transient=True, disable=hidden) as bar:
            task = bar.add_task("queued", total=None, round="-")
            while True:
                state = directory.state()
                for record in directory.store.history(directory.name, after=shown):
                    bar.console.print(describe(record.line), soft_wrap=True, highlight=False)
                    shown = record.id
                if state.status in ("completed", "failed", "stopped", "aborted"):
                    break
                if (state.status == "paused") is not paused:
                    paused = not paused
                    said = "is paused; covey resume lets it go on" if paused else "goes on"
                    bar.console.print(f"run {directory.name} {said}", highlight=False)
                now = directory.progress()
                if paused:
                    bar.update(task, description="paused", total=None)
                elif not up():
                    bar.update(task, description="waiting for `covey up`", total=None)
                elif now is not None and state.status == "running":
                    bar.update(
                        task,
                        description=now.phase,
                        completed=now.answered,
                        total=max(now.awaited, now.answered),
                        round=str(now.index),
                    )
                time.sleep(POLL_S)
    except KeyboardInterrupt:
        console.print(f"run {directory.name} goes on without you; `covey status` shows it")
        return True
    console.print(f"run {directory.name} {ending(state)}", soft_wrap=True, highlight=False)
    if state.rounds_completed:
        console.print(f"model: {directory.path / 'model.onnx'}", soft_wrap=True, highlight=False)
        console.print(f"metrics: {directory.metrics}", soft_wrap=True, highlight=False)
    return state.status == "completed" and state.rounds_completed > 0


def ending(state: RunState) -> str:
    """How a run ended, for people."""
    counts = f"{state.rounds_completed} rounds completed, {state.rounds_abandoned} abandoned"
    return f"{state.status}: {state.message or counts}"


def describe(line: dict[str, Any]) -> str:
    """One line of metrics.jsonl for people."""
    head = f"round {line['index']:>3}  {line['seconds']:6.1f} s"
    if line["outcome"] != "completed":
        return f"{head}  abandoned: {line['reason']}"
    parts = [f"{line['survivors']}/{line['cohort']} devices", f"{line['examples']} examples"]
    parts.append(f"training loss {line['train_loss']:.4f}")
    if "test_accuracy" in line:
        parts.append(f"test accuracy {line['test_accuracy']:.4f}")
    elif "test_loss" in line:
        parts.append(f"test loss {line['test_loss']:.4f}")
    elif "test_problem" in line:
        parts.append(f"not evaluated: {line['test_problem']}")
    return f"{head}  " + "  ".join(parts)
