"""The coordinator's unit by systemd's own judgement, and `covey up` with its broker under its sandbox."""

import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest
import tomli_w

import sandboxed
from covey_coordinator.broker import mosquitto
from fake_machine import analyze
from memory_fleet import PLAN
from prerequisites import missing
from processes import COVEY, COVEY_DEVICE, Child, covey, free_port

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "coordinator/covey_coordinator/systemd"
UNIT = FOLDER / "covey-coordinator.service"
SANDBOX = [sys.executable, str(ROOT / "tests/sandboxed.py"), str(UNIT)]
SETTINGS = dict(sandboxed.settings(UNIT))
MAX_EXPOSURE = 1.5


@pytest.fixture
def unit(tmp_path: Path) -> Path:
    """As it is installed, but that its program is there on every machine."""
    path = tmp_path / "covey-coordinator.service"
    path.write_text(UNIT.read_text().replace(SETTINGS["ExecStart"], "/bin/true"))
    return path


def test_it_verifies_in_silence(unit: Path):
    done = analyze("verify", str(unit))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    unit.write_text(unit.read_text() + "[Service]\nNoSuchKey=yes\n")
    assert "NoSuchKey" in analyze("verify", str(unit)).stderr


def test_it_exposes_little(unit: Path):
    shown = analyze("security", "--offline=yes", "--no-pager", str(unit))
    found = re.search(r"Overall exposure level for \S+: ([\d.]+)", shown.stdout)
    assert found is not None, shown.stderr
    assert float(found[1]) <= MAX_EXPOSURE
    bare = unit.with_name("bare.service")
    bare.write_text("[Service]\nExecStart=/bin/true\n")
    assert analyze("security", "--offline=yes", "--threshold=15", str(bare)).returncode != 0


def test_names_and_places_fit_together():
    directory = f"/var/lib/{SETTINGS['StateDirectory']}"
    assert SETTINGS["ExecStart"] == f"/opt/covey/bin/covey up --fleet-dir {directory}"
    assert SETTINGS["WorkingDirectory"] == directory
    assert SETTINGS["ConditionPathExists"] == f"{directory}/covey.toml"
    assert "ORT_DISABLE_TELEMETRY=1" in SETTINGS["Environment"].split()
    user = SETTINGS["User"]
    assert user == SETTINGS["Group"]
    assert (FOLDER / "covey-coordinator.sysusers").read_text().startswith(f"u {user} ")


def test_deploy_has_the_very_files_of_the_package():
    for path in FOLDER.iterdir():
        link = ROOT / "deploy/systemd" / path.name
        assert link.is_symlink()
        assert link.resolve() == path


def test_the_page_names_what_is_installed():
    page = (ROOT / "docs/small-coordinator.md").read_text()
    for key in ("User", "StateDirectory"):
        assert SETTINGS[key] in page
    for path in FOLDER.iterdir():
        assert path.name in page


# -- under its sandbox -----------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def with_mosquitto() -> None:
    if mosquitto.find() is None:
        missing("mosquitto is not installed: apt install mosquitto")


def confined(process: psutil.Process) -> bool:
    """By a filter of system calls, and without new privileges."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    return "Seccomp:\t2\n" in status and "NoNewPrivs:\t1\n" in status


def broker_of(child: Child) -> psutil.Process:
    (broker,) = [p for p in psutil.Process(child.pid).children() if "mosquitto" in p.name()]
    return broker


def test_a_run_under_the_sandbox(tmp_path: Path, start: Callable[..., Child]):
    """Coordinator and broker confined as the unit has it; evaluation, transcripts and database included."""
    made = covey(tmp_path, "init", "farm", "--broker", "mosquitto", "--port", free_port())
    assert made.returncode == 0, made.stderr
    rng = np.random.default_rng(0)
    for i in range(3):
        features = rng.random((64, 1, 8, 8)).astype(np.float32)
        np.savez(tmp_path / f"{i}.npz", features=features, labels=rng.integers(0, 10, 64))
        name = ("device", "add", f"pi-{i}", "--data", f"{i}.npz", "--fleet-dir", "farm")
        assert covey(tmp_path, *name).returncode == 0
        (tmp_path / f"farm/devices/pi-{i}/policy.toml").write_text(
            "[host]\ncpu_pressure = 0\nmemory_pressure = 0\nio_pressure = 0\n"
        )
    table = {
        "plan": str(PLAN), "rounds": 1, "work": {"batches": 2}, "cohort": {"goal": 3},
        "deadlines": {"gather_s": 60.0, "share_s": 60.0, "unmask_s": 60.0, "resend_s": 1.0},
        "evaluation": {"file": "0.npz"},
    }  # fmt: skip
    (tmp_path / "run.toml").write_text(tomli_w.dumps(table))
    up = start([*SANDBOX, *COVEY], "up", "--fleet-dir", "farm")
    up.until("waiting for devices and runs")
    assert confined(psutil.Process(up.pid))
    assert confined(broker_of(up))
    for i in range(3):
        start(COVEY_DEVICE, "run", "--config", f"farm/devices/pi-{i}/device.toml")
    line = ("run", "run.toml", "--name", "one", "--detach", "--fleet-dir", "farm")
    assert covey(tmp_path, *line).returncode == 0
    up.until("run one completed: 1 rounds completed, 0 abandoned")
    assert "not evaluated" not in up.text
    assert up.end() == 0


def test_a_networked_fleet_under_the_sandbox(tmp_path: Path, start: Callable[..., Child]):
    """Its broker has TLS and rules of its own, and devices join at another port."""
    made = covey(
        tmp_path, "init", "farm", "--address", "localhost", "--port", free_port(),
        "--enrol-port", free_port(),
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    up = start([*SANDBOX, *COVEY], "up", "--fleet-dir", "farm")
    up.until("waiting for devices and runs")
    assert confined(broker_of(up))
    assert up.end() == 0
