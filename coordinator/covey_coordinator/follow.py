"""Follows a run from outside, by its directory: one line a round, and where the open one stands."""

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from covey_coordinator.store import RunDirectory

POLL_S = 0.3


def follow(directory: RunDirectory, console: Console | None = None) -> bool:
    """Print until the run ends. True if it completed. Ctrl-C stops following, not the run."""
    console = console or Console()
    shown = 0
    columns = (
        TextColumn("round {task.fields[round]}"),
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    try:
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task("waiting", total=None, round="-")
            while True:
                state = directory.state()
                lines = directory.read_metrics()
                for line in lines[shown:]:
                    bar.console.print(describe(line), soft_wrap=True)
                shown = len(lines)
                if state.status in ("completed", "failed", "stopped"):
                    break
                if (now := directory.progress()) is not None and state.status == "running":
                    bar.update(
                        task,
                        description=now.phase,
                        completed=now.answered,
                        total=max(now.awaited, now.answered),
                        round=str(now.index),
                    )
                time.sleep(POLL_S)
    except KeyboardInterrupt:
        console.print(f"run {directory.name} goes on; covey status shows it")
        return True
    console.print(
        f"run {directory.name} {state.status}: {state.rounds_completed} rounds completed, "
        f"{state.rounds_abandoned} abandoned {state.message}".rstrip(),
        soft_wrap=True,
    )
    if state.rounds_completed:
        console.print(f"model: {directory.path / 'model.onnx'}", soft_wrap=True)
        console.print(f"metrics: {directory.metrics}", soft_wrap=True)
    return state.status == "completed"


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
    return f"{head}  " + "  ".join(parts)
