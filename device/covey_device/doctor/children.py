"""Processes for what may crash: a library that is built for another processor ends its process at once."""

import os
import signal
import subprocess
import sys
from dataclasses import dataclass

from covey_device.confine import minimal_environment

SECONDS = 120.0
"""For importing everything, on a card that is slow and a processor that is hot."""


@dataclass(frozen=True, slots=True)
class Ended:
    """output: what it said. why: how it ended, in words; empty if well. error: the last line it wrote on
    stderr."""

    output: str
    why: str
    error: str


def run(module: str, *arguments: str, seconds: float = SECONDS) -> Ended:
    """``python -m module arguments``, with the imports of this process and little of its environment."""
    environment = minimal_environment(os.pathsep.join(filter(os.path.isabs, sys.path)))
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-m", module, *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            cwd="/",
            env=environment | {"ORT_DISABLE_TELEMETRY": "1"},
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        return Ended(_text(error.stdout), f"not done after {seconds:g} s", "")
    except OSError as error:
        return Ended("", f"no process can be started ({error.strerror})", "")
    lines = _text(done.stderr).strip().splitlines()
    return Ended(_text(done.stdout), _why(done.returncode), lines[-1] if lines else "")


def _why(status: int) -> str:
    if status >= 0:
        return f"its process ended with status {status}" if status else ""
    try:
        name = signal.Signals(-status).name
    except ValueError:
        name = str(-status)
    words = {
        "SIGILL": "this processor has not the instructions that it was built for",
        "SIGKILL": "its process was killed, as when memory runs out",
        "SIGSEGV": "it crashed",
    }
    return words.get(name, "its process was ended") + f" ({name})"


def _text(data: bytes | None) -> str:
    return (data or b"").decode("utf-8", "replace")
