"""Runs the owner's command on a new model: without a shell, with a small environment, for so long at most.

It is the owner's own program, and runs as the service does: as the same user, under the same restrictions of
the unit. Its output goes to the log as far as it is short.
"""

import asyncio
import contextlib
import logging
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from covey_device.home.files import MODEL, SIDECAR, Sidecar

log = logging.getLogger("covey.device")

POLL_S = 0.1
MAX_LINES = 20
MAX_OUTPUT_BYTES = 4000
_READ_BYTES = 1 << 16
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def environment(folder: Path, sidecar: Sidecar) -> dict[str, str]:
    """All that the command is told; nothing of the service's own environment is in it."""
    return {
        "PATH": _PATH,
        "LANG": "C.UTF-8",
        "COVEY_MODEL": str(folder / MODEL),
        "COVEY_MODEL_JSON": str(folder / SIDECAR),
        "COVEY_FLEET": sidecar.fleet,
        "COVEY_DEVICE": sidecar.device,
        "COVEY_RUN": sidecar.run,
        "COVEY_ROUND": str(sidecar.round),
        "COVEY_PLAN": sidecar.plan_name,
        "COVEY_MODEL_SHA256": sidecar.onnx,
    }


async def run_hook(command: Sequence[str], seconds: float, folder: Path, sidecar: Sidecar) -> None:
    """Run it to its end, or for so long; never raises for what it does."""
    where = f"the hook {command[0]} of round {sidecar.round}"
    started = time.monotonic()
    try:
        child = subprocess.Popen(
            list(command),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env=environment(folder, sidecar),
            start_new_session=True,
        )
    except OSError as error:
        log.warning("%s cannot be run: %s", where, error.strerror)
        return
    output = bytearray()
    late = False
    with child:
        try:
            while child.poll() is None and not late:
                _drain(child, output)
                await asyncio.sleep(POLL_S)
                late = time.monotonic() - started > seconds
            _drain(child, output)
        finally:
            # What it started and left behind goes with it.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(child.pid, signal.SIGKILL)
    for line in _lines(bytes(output)):
        log.info("%s: %s", where, line)
    took = time.monotonic() - started
    if late:
        log.warning("%s was ended after %.0f s (model.hook_seconds)", where, took)
    elif child.returncode:
        log.warning("%s ended with status %d after %.1f s", where, child.returncode, took)
    else:
        log.info("%s ended well after %.1f s", where, took)


def _drain(child: "subprocess.Popen[bytes]", output: bytearray) -> None:
    """Take what it said, and keep the beginning of it."""
    assert child.stdout is not None  # noqa: S101  a pipe was asked for
    pipe = child.stdout.fileno()
    os.set_blocking(pipe, False)
    with contextlib.suppress(BlockingIOError):
        for _ in range(64):  # whoever writes without end is not to keep us from the rest
            part = os.read(pipe, _READ_BYTES)
            if not part:
                return
            output += part[: MAX_OUTPUT_BYTES - len(output)]


def _lines(output: bytes) -> list[str]:
    """Printable, and not too many."""
    text = output.decode("utf-8", "replace")
    lines = ["".join(c if c.isprintable() else "?" for c in line) for line in text.splitlines()]
    more = len(lines) > MAX_LINES or len(output) >= MAX_OUTPUT_BYTES
    return [*lines[:MAX_LINES], *(["..."] if more else [])]
