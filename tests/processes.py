"""covey's commands as processes of their own, with waits that are bounded.

`start` is a fixture that any test may ask for. No process outlives its test.
"""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

WAIT_S = 60.0
COVEY = [sys.executable, "-c", "from covey_coordinator.cli import main; main()"]
COVEY_DEVICE = [sys.executable, "-c", "from covey_device.cli import main; main()"]
ENVIRONMENT = {k: v for k, v in os.environ.items() if not k.startswith("COVEY_")} | {
    "COLUMNS": "200",
    "PYTHONUNBUFFERED": "1",
    "COVEY_HOST_ROOT": "/nonexistent",  # what machine this is, is no matter
}


class Child:
    """A process whose lines can be waited for. lines: both streams together, as a terminal has it."""

    def __init__(self, command: list[str], *arguments: object, cwd: Path) -> None:
        self.lines: list[str] = []
        self._process = subprocess.Popen(
            [*command, *map(str, arguments)],
            cwd=cwd,
            env=ENVIRONMENT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.lines.append(line.rstrip("\n"))

    @property
    def pid(self) -> int:
        """Its number."""
        return self._process.pid

    @property
    def text(self) -> str:
        return "\n".join(self.lines)

    def until(self, pattern: str, wait_s: float = WAIT_S) -> re.Match[str]:
        """Wait for a line."""

        def found() -> re.Match[str] | None:
            return re.search(pattern, self.text, re.MULTILINE)

        wait(
            lambda: found() is not None or self._process.poll() is not None,
            lambda: self.text,
            wait_s,
        )
        match = found()
        assert match is not None, f"{pattern!r} never came:\n{self.text}"
        return match

    def end(self, number: int = signal.SIGTERM) -> int:
        """Ask it to stop; returns its exit status."""
        self._process.send_signal(number)
        return self.wait()

    def wait(self) -> int:
        status = self._process.wait(WAIT_S)
        self._reader.join(WAIT_S)
        assert "Traceback" not in self.text
        return status

    def kill(self) -> None:
        if self._process.poll() is None:
            for child in psutil.Process(self._process.pid).children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    child.kill()
            self._process.kill()
        self._process.wait(WAIT_S)


def wait(
    true: Callable[[], bool], told: Callable[[], str] = lambda: "", wait_s: float = WAIT_S
) -> None:
    until = time.monotonic() + wait_s
    while not true():
        assert time.monotonic() < until, f"waited too long; so far:\n{told()}"
        time.sleep(0.02)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Child]]:
    """Starts processes in tmp_path; all end with the test."""
    children: list[Child] = []

    def launch(command: list[str], *arguments: object) -> Child:
        children.append(Child(command, *arguments, cwd=tmp_path))
        return children[-1]

    yield launch
    for child in children:
        child.kill()


def covey(tmp_path: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """A command of the operator's that ends by itself."""
    return ended(tmp_path, COVEY, *arguments)


def ended(
    tmp_path: Path, command: list[str], *arguments: object, stdin: str = ""
) -> subprocess.CompletedProcess[str]:
    """A command that ends by itself."""
    done = subprocess.run(
        [*command, *map(str, arguments)],
        cwd=tmp_path,
        input=stdin,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=WAIT_S,
    )
    assert "Traceback" not in done.stderr
    return done


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port
