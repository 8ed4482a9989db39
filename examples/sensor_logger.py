"""Logs temperatures for a device to train on: the last readings, and the one that came next.

    python examples/sensor_logger.py --directory data --every 10

Each example has `--history` readings in degrees Celsius as its features, float32[N], and the reading
after them as its label, float32[]. Beside it, in device.toml:

    [data]
    kind = "shards"
    directory = "data"
    scale = 0.01        # 0.21 for 21 degrees: of the features; the label stays in degrees
    max_shards = 1000

Readings are of the machine's first thermal zone; with `--simulate`, or where there is none, they are a
random walk. It ends with SIGTERM or Ctrl-C and writes what it has.
"""

import argparse
import contextlib
import random
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path

from covey_device.shards import ShardWriter

ZONES = Path("/sys/class/thermal")


def thermal_zone(root: Path = ZONES) -> Callable[[], float] | None:
    """Reads the first zone that can be read; None if there is none."""
    for path in sorted(root.glob("thermal_zone*/temp")):
        with contextlib.suppress(OSError, ValueError):
            int(path.read_text())
            return lambda path=path: int(path.read_text()) / 1000  # type: ignore[misc]
    return None


def random_walk(rng: random.Random) -> Callable[[], float]:
    """Degrees that wander about 21, a little at a time."""
    degrees = 21.0

    def read() -> float:
        nonlocal degrees
        degrees += 0.1 * (21.0 - degrees) + rng.gauss(0.0, 0.3)
        return degrees

    return read


def log(
    read: Callable[[], float],
    writer: ShardWriter,
    stop: threading.Event,
    *,
    every_s: float,
    history: int,
    most: int | None = None,
) -> int:
    """Until `stop`, or until there are `most` examples -> how many there were."""
    before: deque[float] = deque(maxlen=history)
    n_examples = 0
    while n_examples != most:
        try:
            reading = read()
        except (OSError, ValueError) as error:  # a sensor that comes and goes
            print(f"no reading: {error}", file=sys.stderr)
        else:
            if len(before) == history:
                try:
                    writer.append(list(before), label=reading)
                except OSError as error:  # a full disk: the examples wait
                    print(f"cannot write: {error}", file=sys.stderr)
                n_examples += 1
            before.append(reading)
        if stop.wait(every_s):
            break
    return n_examples


def main(arguments: list[str] | None = None) -> None:
    """Log until told to stop."""
    parser = argparse.ArgumentParser(description="Logs temperatures into shards.")
    parser.add_argument("--directory", type=Path, required=True, help="where the shards go")
    parser.add_argument("--every", type=float, default=10.0, help="seconds between readings")
    parser.add_argument("--history", type=int, default=3, help="readings that are the features")
    parser.add_argument("--rows", type=int, default=256, help="examples in a shard")
    parser.add_argument("--shard-every", type=float, default=600.0, help="seconds a shard covers")
    parser.add_argument(
        "--examples", type=int, help="how many to log; all until stopped if not set"
    )
    parser.add_argument("--simulate", action="store_true", help="a random walk, not a sensor")
    parser.add_argument("--seed", type=int, help="of the random walk")
    options = parser.parse_args(arguments)
    read = None if options.simulate else thermal_zone()
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    with ShardWriter(
        options.directory, rows_per_shard=options.rows, every_s=options.shard_every
    ) as writer:
        n_examples = log(
            read or random_walk(random.Random(options.seed)),
            writer,
            stop,
            every_s=options.every,
            history=options.history,
            most=options.examples,
        )
    print(f"{n_examples} examples in {options.directory}")


if __name__ == "__main__":
    main()
