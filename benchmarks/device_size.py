"""What a device takes on the disk: each distribution of it, and all of them, beside what they may.

    python benchmarks/device_size.py [--release bookworm] [--arch arm64] [--json FILE]

For every release and architecture that packages are made for, from the same wheels: what a wheel weighs,
what is in it, and what a device keeps of that (covey_device.trim says what it does not). The bound is on
all of it as it lies on a card, in blocks of 4 KiB, bytecode included; MB are 10^6 bytes. Needs an index of
Python packages within reach, the first time.

Ends with status 1 if a bound is broken.
"""

import sys
import tempfile
from pathlib import Path

import click
from _report import Row, report, write
from rich.console import Console
from rich.table import Table

from covey_packaging.target import MACHINES, RELEASES, PackagingError
from covey_packaging.tree import build_tree
from covey_packaging.weights import MOST_DISTRIBUTIONS, Weight, weigh

MB = 1e6


def print_distributions(weight: Weight) -> None:
    """Each distribution of a tree, the heaviest first."""
    target = weight.tree.target
    title = (
        f"Debian {target.release.number} ({target.release.name}), Python {target.release.python}"
    )
    table = Table("distribution", "version", title=f"{title}, {target.machine}")
    for column in ("wheel", "in it", "kept, MB"):
        table.add_column(column, justify="right")
    for each in sorted(weight.tree.distributions, key=lambda each: -each.kept_bytes):
        numbers = (each.wheel_bytes, each.unpacked_bytes, each.kept_bytes)
        table.add_row(each.name, each.version, *(f"{number / MB:.2f}" for number in numbers))
    Console().print(table)


def rows_of(weight: Weight) -> list[Row]:
    """The totals of a tree, with their bounds."""
    target = weight.tree.target
    name = f"{target.release.name} {target.machine}"
    count, disk = len(weight.tree.distributions), weight.disk_bytes
    most = weight.most_bytes
    return [
        Row(
            f"{name}: distributions",
            count,
            "",
            f"<= {MOST_DISTRIBUTIONS}",
            count <= MOST_DISTRIBUTIONS,
        ),
        Row(f"{name}: wheels", weight.wheel_bytes / MB, "MB", "", True),
        Row(f"{name}: all that is in them", weight.unpacked_bytes / MB, "MB", "", True),
        Row(f"{name}: kept of that", weight.kept_bytes / MB, "MB", "", True),
        Row(f"{name}: bytecode", weight.bytecode_bytes / MB, "MB", "", True),
        Row(f"{name}: on the disk", disk / MB, "MB", f"<= {most / MB:g}", disk <= most),
    ]


def rows_of_distributions(weight: Weight) -> list[Row]:
    """For the record: every distribution's wheel, and what is kept of it."""
    target = weight.tree.target
    rows = []
    for each in weight.tree.distributions:
        name = f"{target.release.name} {target.machine}: {each.name} {each.version}"
        rows.append(Row(f"{name}, wheel", each.wheel_bytes / MB, "MB", "", True))
        rows.append(Row(f"{name}, kept", each.kept_bytes / MB, "MB", "", True))
    return rows


@click.command(help=__doc__)
@click.option("--release", "releases", type=click.Choice(list(RELEASES)), multiple=True)
@click.option("--arch", "arches", type=click.Choice(list(MACHINES)), multiple=True)
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the rows too.")
def main(releases: tuple[str, ...], arches: tuple[str, ...], json_path: Path | None) -> None:
    """Weigh, print, and say whether the bounds hold."""
    totals, details = [], []
    for arch in arches or MACHINES:
        for release in releases or RELEASES:
            with tempfile.TemporaryDirectory(prefix="covey-bench-") as folder:
                try:
                    tree = build_tree(Path(folder) / "tree", release=release, arch=arch)
                except PackagingError as error:
                    sys.exit(f"device_size: {error}")
                weight = weigh(tree)
            print_distributions(weight)
            totals += rows_of(weight)
            details += rows_of_distributions(weight)
    holds = report(totals)
    if json_path is not None:
        write([*totals, *details], json_path)
    sys.exit(not holds)


if __name__ == "__main__":
    main()
