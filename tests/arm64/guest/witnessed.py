"""`covey-device` that also writes down its plaintext: `python witnessed.py DIRECTORY ARGUMENTS...`.

What a session encoded, before it is masked, is left in the directory as `ROUND.npy`, so that the sum can be
made again in the clear. Everything else is the command itself, put together as ever.
"""

import functools
import sys
from pathlib import Path
from typing import Any

import numpy as np

from covey_device import assembly
from covey_device.cli import main
from covey_shared.masking import Ring

Session = assembly.Session


def witnessed(directory: Path, *arguments: Any, **more: Any) -> Any:
    """A session with a witness."""

    def record(round_id: int, ring: Ring) -> None:
        fresh = directory / f"{round_id}.new"
        with fresh.open("wb") as file:
            np.save(file, ring)
        fresh.rename(directory / f"{round_id}.npy")

    return Session(*arguments, witness=record, **more)


if __name__ == "__main__":
    place = Path(sys.argv.pop(1))
    assembly.Session = functools.partial(witnessed, place)  # type: ignore[assignment,misc]
    main(prog_name="covey-device")
