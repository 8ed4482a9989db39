"""Draws docs/images/demo.png: the terminal and the plot of one real run of `covey demo`.

Run it from the repository's root, with `covey[demo]` installed::

    python docs/images/demo.py

It plays the demo with its default options, draws what that printed, and the accuracy beside it.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import msgspec
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from covey_fleet import report
from covey_fleet.report import Summary

PICTURE = Path(__file__).with_suffix(".png")
COLUMNS = 114
# Of DejaVu Sans Mono, which comes with matplotlib: a character's width and a line's height, in em.
CHARACTER_EM, LINE_EM = 0.602, 1.36
DPI = 130
FONT_POINTS = 9 * 72 / DPI / CHARACTER_EM
"""Characters are nine dots wide: with a fraction, hinting would let lines drift."""

MARGIN_INCHES = 0.22
PLOT_INCHES = 3.3

PAPER, INK, FAINT, GREEN, YELLOW = "#12181f", "#d7dee6", "#7d8a97", "#6bd490", "#e0b95a"
COLOURS = [
    (re.compile(r"^\$ .*"), GREEN),
    (re.compile(r"\d+\.\d% right(?=  )"), GREEN),
    (re.compile(r"lost pi-.*"), FAINT),
    (re.compile(r"abandoned: .*"), YELLOW),
]


def play(directory: Path) -> tuple[list[str], list[dict[str, Any]], Summary]:
    """One run: what it printed, its metrics, its summary."""
    command = [sys.executable, "-m", "covey_fleet"]
    wide = {**os.environ, "COLUMNS": str(COLUMNS)}
    done = subprocess.run(
        command, cwd=directory, env=wide, stdout=subprocess.PIPE, text=True, check=True
    )
    where = directory / "covey-demo"
    metrics = [json.loads(line) for line in (where / report.METRICS).read_text().splitlines()]
    summary = msgspec.json.decode((where / report.SUMMARY).read_bytes(), type=Summary)
    return ["$ covey demo", *done.stdout.splitlines()], metrics, summary


def folded(lines: list[str]) -> list[str]:
    """Long lines as a terminal breaks them."""
    return [
        line[start : start + COLUMNS]
        for line in lines
        for start in range(0, max(len(line), 1), COLUMNS)
    ]


def pieces(line: str) -> list[tuple[int, str, str]]:
    """(column, text, colour) of a line."""
    found = [(0, line, INK)]
    for pattern, colour in COLOURS:
        for match in pattern.finditer(line):
            # Over the plain text, whose part there becomes blanks.
            column, text, ink = found[0]
            start, end = match.span()
            found[0] = (column, text[:start] + " " * (end - start) + text[end:], ink)
            found.append((start, match.group(), colour))
    return found


def draw(lines: list[str], metrics: list[dict[str, Any]], summary: Summary) -> Figure:
    """The terminal above, the plot below."""
    em = FONT_POINTS / 72
    terminal_inches = len(lines) * LINE_EM * em + 2 * MARGIN_INCHES
    width = COLUMNS * CHARACTER_EM * em + 2 * MARGIN_INCHES
    height = terminal_inches + PLOT_INCHES
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    bottom = PLOT_INCHES / height
    terminal = figure.add_axes((0, bottom, 1, 1 - bottom))
    terminal.set_axis_off()
    terminal.set(xlim=(0, width), ylim=(terminal_inches, 0))
    terminal.add_patch(Rectangle((0, 0), width, terminal_inches, color=PAPER))
    for row, line in enumerate(lines):
        for column, text, colour in pieces(line):
            terminal.text(
                MARGIN_INCHES + column * CHARACTER_EM * em,
                MARGIN_INCHES + row * LINE_EM * em,
                text,
                family="DejaVu Sans Mono",
                fontsize=FONT_POINTS,
                color=colour,
                verticalalignment="top",
                parse_math=False,
            )
    side, under = 0.75 / width, 0.55 / height
    axes = figure.add_axes((side, under, 1 - 1.4 * side, bottom - 1.75 * under))
    report.plot_on(axes, metrics, summary)
    return figure


def main() -> None:
    """Play and draw."""
    with tempfile.TemporaryDirectory() as directory:
        lines, metrics, summary = play(Path(directory))
    draw(folded(lines), metrics, summary).savefig(PICTURE)
    sys.stdout.write(f"{PICTURE}\n")


if __name__ == "__main__":
    main()
