"""A running `covey-device run` is told of another policy by SIGHUP, without a broker in sight."""

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from covey_coordinator.config import BrokerConfig
from covey_coordinator.fleet import FleetDirectory
from covey_device.audit import AuditLog


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A device whose broker's port nobody answers at."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    fleet = FleetDirectory.create(tmp_path / "fleet", "farm", BrokerConfig())
    home = fleet.add_device("pi-1", days=30, data=None)
    text = (home / "device.toml").read_text()
    text = re.sub(r'url = ".*"', f'url = "mqtt://127.0.0.1:{port}"', text)
    (home / "device.toml").write_text(text)
    (home / "policy.toml").write_text("min_cohort = 4\n")
    return home


@pytest.fixture
def running(home: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", "from covey_device.cli import main; main()"]
    child = subprocess.Popen(
        [*command, "run", "--config", home / "device.toml"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield child
    finally:
        child.kill()
        child.wait()


def until(child: subprocess.Popen[str], words: str) -> str:
    """Its log up to a line with these words; the test's time limit bounds the wait."""
    assert child.stderr is not None
    for line in child.stderr:
        if words in line:
            return line
    raise AssertionError(f"it ended without saying {words!r}")


def test_a_signal_has_the_policy_read_again(home: Path, running: subprocess.Popen[str]):
    until(running, "Ctrl-C stops")
    (home / "policy.toml").write_text("min_cohort = 1\n")
    running.send_signal(signal.SIGHUP)
    line = until(running, "the policy stays as it was")
    assert "policy.toml: key `min_cohort` is 1; it must be a whole number from 2 to 128" in line
    (home / "policy.toml").write_text("min_cohort = 6\n")
    running.send_signal(signal.SIGHUP)
    until(running, "was read again")
    (home / "policy.toml").write_text("min_cohort = 7\n")
    running.send_signal(signal.SIGHUP)
    until(running, "was read again")
    # What it said of the one before is in the log by now.
    noted = AuditLog(home / "state").last("policy")["policy"]["min_cohort"]
    assert noted in (6, 7)
    running.terminate()
    until(running, "stopped")
    assert running.wait(30) == 0
