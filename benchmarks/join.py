"""How long `covey-device join` takes: from the start of the interpreter to its end, on loopback.

The whole command, imports included, against a real enrolment port; beside it, in turn, the same
interpreter that does nothing but import what covey's command line needs, so that a busy machine slows
both. The median of each.

    python benchmarks/join.py [--json FILE]

Ends with status 1 if the bound is broken.
"""

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click
from _report import Row, report

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from enrolment_lab import Lab

LONGEST_S = 2.0
REPEATS = 7


def seconds(*arguments: str) -> float:
    """One run of the interpreter, which must succeed."""
    start = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
    return time.perf_counter() - start


@click.command(help=__doc__)
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the rows too.")
def main(json_path: Path | None) -> None:
    """Measure, print, and say whether the bound holds."""
    joins, bare = [], []
    with tempfile.TemporaryDirectory(prefix="covey-bench-") as directory:
        folder = Path(directory)
        with Lab(folder / "fleet") as lab:
            for index in range(REPEATS):
                token = lab.token(f"pi-{index}").encode()
                config = folder / f"pi-{index}" / "device.toml"
                start = ("-c", "from covey_device.cli import main; main()")
                joins.append(seconds(*start, "join", token, "--config", str(config)))
                bare.append(seconds(*start, "--version"))
    joining, starting = statistics.median(joins), statistics.median(bare)
    rows = [
        Row(
            "covey-device join",
            joining,
            "s",
            f"<= {LONGEST_S:g}",
            joining <= LONGEST_S,
        ),
        Row("covey-device --version", starting, "s", "", True),
    ]
    sys.exit(0 if report(rows, json_path) else 1)


if __name__ == "__main__":
    main()
