"""What a demo leaves behind: summary.json, the plot, and a plain statement of what happened.

Every number is one of this run's; nothing is said that the run did not show.
"""

import io
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from covey_coordinator.files import write_atomic
from covey_coordinator.store import RunDirectory
from covey_fleet.eavesdropper import Overheard
from covey_fleet.faults import Moment
from covey_shared.errors import StorageError

PLOT, MODEL, METRICS, SUMMARY = "accuracy.png", "model.onnx", "metrics.jsonl", "summary.json"


class Summary(msgspec.Struct, kw_only=True):
    """summary.json. accuracy: of the last model, on held-out digits. baseline_accuracy: same model,
    same number of examples, trained centrally. sum_mismatches: coordinates in which a revealed sum
    was not the sum of its devices' plaintext, over all sums. Bytes: topics and payloads of devices,
    divided by devices and rounds requested. masked_update_correlation: of one intercepted masked
    update with its plaintext; None if none was heard whole."""

    accuracy: float
    baseline_accuracy: float | None
    initial_accuracy: float
    rounds_requested: int
    rounds_completed: int
    rounds_abandoned: int
    abandoned_reasons: dict[str, int]
    devices: int
    dropout: float
    dropouts_injected: int
    dropouts_by_moment: dict[str, int]
    sums_checked: int
    sum_mismatches: int
    smallest_sum: int
    largest_sum: int
    examples: int
    parameters: int
    bytes_up_per_device_round: float
    bytes_down_per_device_round: float
    seconds_per_round: float
    seconds: float
    masked_update_correlation: float | None
    broker: str
    model: str
    split: str
    processes: bool
    seed: int


def statement(summary: Summary, overheard: Overheard | None, test_size: int) -> list[str]:
    """Plain paragraphs: what was learned, what the coordinator saw, what was lost."""
    paragraphs = [_learned(summary, test_size)]
    if summary.rounds_completed:
        paragraphs.append(_seen(summary, overheard))
    paragraphs.append(_lost(summary))
    return paragraphs


def _learned(s: Summary, test_size: int) -> str:
    if not s.rounds_completed:
        return f"Nothing was learned: none of {_n(s.rounds_requested, 'round')} was completed."
    text = (
        f"What was learned: in {_n(s.rounds_completed, 'round')} the fleet's model went from "
        f"{s.initial_accuracy:.1%} to {s.accuracy:.1%} right answers on {test_size} handwritten "
        f"digits that no device has."
    )
    if s.baseline_accuracy is not None:
        text += (
            f" Trained in one place on as many examples ({s.examples:,}), the same model "
            f"reaches {s.baseline_accuracy:.1%}."
        )
    return text


def _seen(s: Summary, overheard: Overheard | None) -> str:
    devices = (
        f"{s.smallest_sum}"
        if s.smallest_sum == s.largest_sum
        else f"{s.smallest_sum} to {s.largest_sum}"
    )
    text = (
        f"What the coordinator saw: who took part, and {_n(s.rounds_completed, 'sum')}, each of "
        f"{devices} devices' updates, with their total of examples and mean loss. Of no single "
        f"device did it see an update, an example count or a loss."
    )
    if overheard is not None:
        text += (
            f" A masked update on its own is noise: {overheard.device}'s of round "
            f"{overheard.round}, recorded at the broker, correlates with what the device had "
            f"trained by {overheard.correlation:+.3f} over {overheard.coordinates:,} values."
        )
    if s.sum_mismatches:
        text += (
            f" ERROR: {s.sum_mismatches:,} coordinates of the revealed sums differ from the sum of "
            "the devices' plaintext."
        )
    else:
        text += (
            f" All {s.sums_checked} sums equal, in every value, the sum of the devices' plaintext, "
            "which only this simulation knows."
        )
    return text


def _lost(s: Summary) -> str:
    if not s.dropouts_injected:
        text = "What was lost: no device vanished."
    else:
        common = Counter(s.dropouts_by_moment).most_common(3)
        text = (
            f"What was lost: {_n(s.dropouts_injected, 'time')} a device vanished without a word, "
            f"at {_n(len(s.dropouts_by_moment), 'different moment')} (most often "
            f"{', '.join(moment for moment, _ in common)})."
        )
    if not s.rounds_abandoned:
        return f"{text} No round was abandoned for it."
    reasons = "; ".join(f"{reason} ({n})" for reason, n in s.abandoned_reasons.items())
    return f"{text} {_n(s.rounds_abandoned, 'round')} abandoned: {reasons}."


def _n(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def by_moment(moments: Iterable[Moment]) -> dict[str, int]:
    """How often devices vanished at which moment, in the order of a round."""
    counts = Counter(moments)
    return {moment.value: counts[moment] for moment in Moment if counts[moment]}


def abandoned_reasons(lines: Sequence[dict[str, Any]]) -> dict[str, int]:
    """Why rounds were abandoned, and how often each."""
    return dict(Counter(line["reason"] for line in lines if line["outcome"] != "completed"))


def prepare(directory: Path) -> None:
    """Make the report's directory. Raises StorageError before anything was computed in vain."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe = directory / f".{SUMMARY}.new"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise StorageError(
            f"cannot write the report to {directory}: {error.strerror}; choose another --report"
        ) from error


def write(directory: Path, summary: Summary, run: RunDirectory, plot: bytes) -> list[Path]:
    """Write the files of a report over those of an earlier one. Returns what there is now."""
    files = {PLOT: plot}
    for name in (MODEL, METRICS):
        source = run.path / name
        if source.exists():
            files[name] = source.read_bytes()
    files[SUMMARY] = msgspec.json.format(msgspec.json.encode(summary), indent=2) + b"\n"
    for name in (PLOT, MODEL, METRICS, SUMMARY):
        (directory / name).unlink(missing_ok=True)
    for name, data in files.items():
        write_atomic(directory / name, data, durable=False)
    return [directory / name for name in files]


def draw(lines: Sequence[dict[str, Any]], summary: Summary) -> bytes:
    """Accuracy by round as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    plot_on(figure.add_subplot(), lines, summary)
    image = io.BytesIO()
    figure.savefig(image, format="png")
    return image.getvalue()


def plot_on(axes: Any, lines: Sequence[dict[str, Any]], summary: Summary) -> None:
    """Accuracy by round, on matplotlib's axes. lines: of metrics.jsonl."""
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    done = [line for line in lines if line["outcome"] == "completed"]
    lost = [line["index"] for line in lines if line["outcome"] != "completed"]
    axes.plot(
        [0, *(line["index"] for line in done)],
        [summary.initial_accuracy, *(line["test_accuracy"] for line in done)],
        marker="o",
        markersize=3.5,
        color="#0b6e4f",
        label=f"{summary.devices} devices, only sums revealed ({summary.accuracy:.1%})",
    )
    if summary.baseline_accuracy is not None:
        axes.axhline(
            summary.baseline_accuracy,
            linestyle="--",
            linewidth=1,
            color="#6c757d",
            label=f"same work in one place ({summary.baseline_accuracy:.1%})",
        )
    if lost:
        axes.plot(
            lost, [0.02] * len(lost), "x", color="#b23a48", label=f"abandoned rounds ({len(lost)})"
        )
    axes.set(xlabel="round", ylabel="right answers on held-out digits", ylim=(0, 1.02))
    axes.set_title(
        f"covey demo: {summary.model}, split {summary.split}, "
        f"{summary.dropouts_injected} dropouts in {summary.rounds_requested} rounds",
        fontsize=10,
    )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.grid(alpha=0.25)
    axes.legend(loc="lower right", fontsize=9)
