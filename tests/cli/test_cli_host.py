"""What an owner sees of `covey-device status` and `explain`, with a service and without one."""

import json
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from covey_coordinator.config import BrokerConfig
from covey_coordinator.fleet import FleetDirectory
from covey_device.cli import main
from covey_device.host.decisions import Decisions
from covey_device.host.port import FILE, ask
from covey_device.keystore import MemoryFile
from covey_device.session import Memory
from fake_host import FakeHost, laptop_on_battery, pi_4, zero_2_w
from processes import COVEY_DEVICE, Child, free_port

CoveyDevice = Callable[..., list[str]]
EXAMPLE = Path(__file__).parents[2] / "examples" / "veto.py"


@pytest.fixture
def home(tmp_path: Path) -> Path:
    broker = BrokerConfig(kind="external", url=f"mqtt://127.0.0.1:{free_port()}")
    fleet = FleetDirectory.create(tmp_path / "fleet", "farm", broker)
    np.savez(tmp_path / "data.npz", features=np.zeros(1), labels=np.zeros(1))
    return fleet.add_device("pi-1", days=30, data=tmp_path / "data.npz")


@pytest.fixture
def covey_device(home: Path, monkeypatch: pytest.MonkeyPatch) -> CoveyDevice:
    monkeypatch.chdir(home)
    monkeypatch.delenv("RUNTIME_DIRECTORY", raising=False)

    def run(command: str, *arguments: str) -> list[str]:
        result = CliRunner().invoke(main, [command, "--config", "device.toml", *arguments])
        assert (result.exit_code, result.stderr) == (0, ""), result.output
        return result.stdout.splitlines()

    return run


def on(monkeypatch: pytest.MonkeyPatch, host: FakeHost) -> None:
    monkeypatch.setenv("COVEY_HOST_ROOT", str(host.root))


# -- no service ------------------------------------------------------------------------------------


def test_a_hot_pi_whose_service_does_not_run(
    covey_device: CoveyDevice, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    on(monkeypatch, pi_4(tmp_path / "host", celsius=76.2, bits=0x50000))
    MemoryFile(home / "state").save(Memory(41))
    assert covey_device("status") == [
        "device pi-1 of fleet farm",
        "service: does not run; what follows is judged from the machine as it is now",
        "last round joined: 41",
        "would train: no, for now",
        "  76.2 C, paused from 75 on (host.pause_c) until below 70",
        "temperature: 76.2 C",
        "throttled: no; voltage too low: no, too low at some time since the start",
        "memory available: 3,100 MB",
        "waiting in the last 10 s: processor 0%, memory 0%, disk 0%",
        "on battery: unknown",
        "network: eth0, not known to be metered",
        "quiet hours: none",
    ]
    assert covey_device("explain") == [
        "nothing decided yet",
        "the service does not run; judged from the machine as it is now:",
        "now: would wait: 76.2 C, paused from 75 on (host.pause_c) until below 70",
    ]


def test_a_machine_of_which_nothing_is_known(covey_device: CoveyDevice):
    lines = covey_device("status")
    assert lines[2:] == [
        "last round joined: none",
        "would train: yes: nothing speaks against it",
        "temperature: unknown",
        "throttled: unknown; voltage too low: unknown",
        "memory available: unknown",
        "waiting in the last 10 s: processor unknown, memory unknown, disk unknown",
        "on battery: unknown",
        "network: unknown",
        "quiet hours: none",
    ]
    assert covey_device("explain")[-1] == "now: would take part: nothing speaks against training"


def test_the_owners_policy_decides(
    covey_device: CoveyDevice, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    on(monkeypatch, laptop_on_battery(tmp_path / "host"))
    (home / "policy.toml").write_text(
        '[host]\non_battery = true\nquiet_hours = ["00:00-23:59"]\nrequire = ["throttling"]\n'
    )
    lines = covey_device("status")
    at = lines.index("would train: no")
    whys = lines[at + 1 : at + 4]
    assert whys[0] == "  throttling is unknown here, and host.require names it"
    assert whys[1] == "  enx0 is metered; paused until another way out (host.on_metered = false)"
    assert re.fullmatch(r"  it is \d\d:\d\d, within 00:00-23:59 \(host.quiet_hours\)", whys[2])
    assert "on battery: yes" in lines
    assert "quiet hours: 00:00-23:59: now" in lines


def test_json_has_the_same(
    covey_device: CoveyDevice, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    on(monkeypatch, zero_2_w(tmp_path / "host"))
    facts = json.loads("\n".join(covey_device("status", "--json")))
    assert (facts["device"], facts["running"], facts["host"]["state"]) == ("pi-1", False, "go")
    assert facts["host"]["memory_available_mb"] == 210
    assert facts["host"]["under_voltage_since_start"] is True
    assert facts["host"]["cpu_pressure"] is None
    assert not (home / "state").exists()  # whoever asks leaves nothing behind
    MemoryFile(home / "state")
    Decisions(home / "state").add("declined", "76.2 C, hot", 3)
    told = json.loads("\n".join(covey_device("explain", "--json")))
    assert told["now"] == {"state": "go", "why": [], "told": None}
    (decision,) = told["decisions"]
    assert (decision["what"], decision["why"], decision["round"]) == ("declined", "76.2 C, hot", 3)


def test_decisions_are_explained_in_their_order(covey_device: CoveyDevice, home: Path):
    MemoryFile(home / "state")
    decisions = Decisions(home / "state")
    decisions.add("declined", "76.2 C, hot", 3)
    decisions.add("declined", "76.2 C, hot", 4)
    decisions.add("paused", "the camera is on", 5)
    decisions.add("took part", "its update is in the sum", 5)
    decisions.flush()
    lines = covey_device("explain")
    when = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d "
    for line, expected in zip(
        lines,
        [
            "round 4: declined: 76.2 C, hot (2 times in a row)",
            "round 5: paused: the camera is on",
            "round 5: took part: its update is in the sum",
        ],
        strict=False,
    ):
        assert re.fullmatch(when + re.escape(expected), line)
    assert "paused" not in "".join(covey_device("explain", "--last", "1"))


def test_a_damaged_policy_is_one_clear_error(home: Path, covey_device: CoveyDevice):
    (home / "policy.toml").write_text("[host]\npause_c = 60\n")
    result = CliRunner().invoke(main, ["status", "--config", "device.toml"])
    assert result.exit_code == 1
    assert result.stderr == (
        "covey-device: policy.toml: in table `host`: start_below_c (70) must be below pause_c (60), and "
        "that not above stop_c (80)\n"
    )


# -- a service -------------------------------------------------------------------------------------


def test_a_service_tells_of_itself_and_a_program_has_its_say(
    start: Callable[..., Child], home: Path, covey_device: CoveyDevice
):
    """No broker is there: the owner is answered all the same."""
    child = start(COVEY_DEVICE, "run", "--config", home / "device.toml")
    child.until("Ctrl-C stops")
    path = home / "state" / FILE
    wait_for(lambda: ask(path, {"ask": "status"}) is not None)
    lines = covey_device("status")
    assert re.fullmatch(r"service: runs for \d+ seconds?, not connected to the broker", lines[1])
    assert lines[2] == "now: not connected to the broker; waiting for a round"
    assert lines[3] == "since its start: 0 rounds called, update in the sum of 0, 0 batches trained"
    assert "would train: yes: nothing speaks against it" in lines

    said = subprocess.run(
        [sys.executable, str(EXAMPLE), "600", "the camera is in use", FILE],
        cwd=path.parent,  # a socket's whole name has at most 108 bytes
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert json.loads(said.stdout) == {"ok": True, "heeded": True}
    why = covey_device("explain")[-1]
    assert why.startswith(
        "now: would decline: a local program asks to wait: the camera is in use ("
    )
    lines = covey_device("status")
    assert "would train: no, for now" in lines
    assert lines[-1].startswith("asked to wait: a local program asks to wait: the camera is in use")
    assert json.loads("\n".join(covey_device("status", "--json")))["host"]["told"] == (
        "its owner or a program of its host asks it to wait"
    )
    # a second service on the same state is refused, and the socket goes with the first
    second = start(COVEY_DEVICE, "run", "--config", home / "device.toml")
    second.until("another covey-device runs with")
    assert child.end() == 0
    assert not path.exists()
    assert covey_device("status")[1].startswith("service: does not run")


def wait_for(true: Callable[[], Any]) -> None:
    for _ in range(600):
        if true():
            return
        threading.Event().wait(0.05)
    raise AssertionError("waited too long")


def test_a_killed_service_leaves_a_socket_that_the_next_one_replaces(
    start: Callable[..., Child], home: Path
):
    path = home / "state" / FILE
    child = start(COVEY_DEVICE, "run", "--config", home / "device.toml")
    wait_for(lambda: ask(path, {"ask": "status"}) is not None)
    child.kill()
    assert path.exists()
    assert ask(path, {"ask": "status"}) is None
    start(COVEY_DEVICE, "run", "--config", home / "device.toml")
    wait_for(lambda: ask(path, {"ask": "status"}) is not None)
