"""`covey-device doctor` as its owner runs it: every check a line, nothing changed, nothing that the service
would load."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from covey_coordinator.config import BrokerConfig
from covey_coordinator.fleet import FleetDirectory
from covey_device.cli import main
from covey_device.doctor.checkup import CHECKS, DEVICE_CHECKS, MACHINE_CHECKS
from covey_device.keystore import MemoryFile
from covey_device.session import Memory
from prerequisites import missing

Doctor = Callable[..., Result]
MLP = Path(str(files("covey_fleet"))) / "plans" / "mlp"
WITHOUT_ENROLMENT = [check for check in CHECKS if check != "enrolment-port"]
LINE = re.compile(r"(ok|note|problem|unknown) +([a-z-]+): (.+)")


@pytest.fixture
def doctor(monkeypatch: pytest.MonkeyPatch) -> Doctor:
    """Runs the command, and holds it to its form."""
    monkeypatch.setattr("covey_device.cli.os.umask", lambda mask: 0)

    def run(*arguments: object) -> Result:
        result = CliRunner().invoke(main, ["doctor", *map(str, arguments)])
        assert "Traceback" not in result.output
        assert result.exception is None or isinstance(result.exception, SystemExit)
        assert result.stderr == ""
        return result

    return run


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A device's directory, as it was copied to it; nobody listens where its broker should be."""
    broker = BrokerConfig(kind="external", url="mqtt://127.0.0.1:9")
    fleet = FleetDirectory.create(tmp_path / "fleet", "farm", broker)
    features = np.random.default_rng(0).random((40, 1, 8, 8)).astype(np.float32)
    np.savez(tmp_path / "data.npz", features=features, labels=np.arange(40) % 10)
    return fleet.add_device("pi-1", days=30, data=tmp_path / "data.npz")


def lines_of(result: Result) -> list[tuple[str, str, str]]:
    """(verdict, check, what it says) of each line before the first empty one, or the summary."""
    found = []
    for line in result.stdout.split("\n\n")[0].splitlines():
        if match := LINE.fullmatch(line):
            found.append((match[1], match[2], match[3]))
    return found


def of(result: Result, check: str) -> tuple[str, str]:
    """A check's verdict, and what it says."""
    (found,) = [(verdict, says) for verdict, name, says in lines_of(result) if name == check]
    return found


def snapshot(folder: Path) -> dict[str, tuple[int, int, int, bytes]]:
    """All files and directories, with what could change of them."""
    found = {}
    for path in [folder, *sorted(folder.rglob("*"))]:
        status = path.stat()
        content = path.read_bytes() if path.is_file() else b""
        # A directory's own time changes when a file is made in it, if only for a moment.
        when = status.st_mtime_ns if path.is_file() else 0
        found[str(path)] = (status.st_mode, status.st_uid, when, content)
    return found


def test_before_joining(doctor: Doctor, tmp_path: Path):
    result = doctor("--config", tmp_path / "device.toml")
    checks = [check for _, check, _ in lines_of(result)]
    assert checks == [*MACHINE_CHECKS, "configuration"]
    assert of(result, "configuration")[0] == "note"
    problems = [line for line in lines_of(result) if line[0] == "problem"]
    assert result.exit_code == (1 if problems else 0)
    for check in ("architecture", "python", "packages", "known-answers", "training"):
        assert of(result, check)[0] == "ok", result.stdout
    assert re.fullmatch(
        r"\d+ ok, \d+ notes?, \d+ problems?, \d+ unknown", result.stdout.splitlines()[-1]
    )
    assert list(tmp_path.iterdir()) == []


def test_after_joining(doctor: Doctor, home: Path):
    MemoryFile(home / "state").save(Memory(41))
    before = snapshot(home)
    result = doctor("--config", home / "device.toml")
    assert [check for _, check, _ in lines_of(result)] == WITHOUT_ENROLMENT
    assert result.exit_code == 1  # there is no broker
    assert of(result, "broker") == (
        "problem",
        "no broker at 127.0.0.1:9: connection refused; is it running? Fix: bring the network and the "
        "broker up, or correct broker.url in device.toml",
    )
    for check in ("configuration", "policy", "keys", "certificates", "state", "data", "plan"):
        assert of(result, check)[0] == "ok", result.stdout
    assert of(result, "state")[1].endswith("last round 41")
    assert snapshot(home) == before


def test_as_json(doctor: Doctor, home: Path):
    result = doctor("--config", home / "device.toml", "--json", "--plan", MLP, "--peers", 10)
    told = json.loads(result.stdout)
    assert set(told) == {"worst", "checks", "estimate"}
    assert not (home / "state").exists()  # looking does not make it
    assert told["worst"] == "problem"
    assert result.exit_code == 1
    assert [check["check"] for check in told["checks"]] == WITHOUT_ENROLMENT
    assert all(set(check) == {"check", "verdict", "says", "fix"} for check in told["checks"])
    assert told["estimate"]["name"] == "digits-mlp"
    assert told["estimate"]["round"]["peers"] == 10
    assert told["estimate"]["seconds"] == pytest.approx(sum(told["estimate"]["phases"].values()))
    data = next(check for check in told["checks"] if check["check"] == "data")
    assert data["says"].endswith("40 examples, which fit plan 'digits-mlp'")


def test_an_estimate_before_joining(doctor: Doctor, tmp_path: Path):
    options = ("--plan", MLP, "--batches", 3, "--batch-size", 16, "--peers", 20)
    links = ("--uplink-mbit", 0.5, "--downlink-mbit", 4)
    result = doctor("--config", tmp_path / "device.toml", *options, *links)
    said = result.stdout.split("\n\n")[1].splitlines()
    assert said[0].endswith("on this machine, 3 batches of 16, 20 devices:")
    assert "MB at 0.5 Mbit/s" in next(line for line in said if line.startswith("  upload"))
    assert "MB at 4 Mbit/s" in next(line for line in said if line.startswith("  fetch"))
    assert of(result, "plan")[1].startswith("a round of 'digits-mlp' takes ")


def test_a_plan_that_is_none(doctor: Doctor, tmp_path: Path):
    result = doctor("--config", tmp_path / "device.toml", "--plan", tmp_path)
    verdict, says = of(result, "plan")
    assert (verdict, result.exit_code) == ("problem", 1)
    assert "--plan takes a plan's directory" in says


def test_data_that_do_not_fit_the_plan(doctor: Doctor, home: Path, tmp_path: Path):
    np.savez(tmp_path / "data.npz", features=np.zeros((3, 7), np.float32), labels=np.zeros(3))
    result = doctor("--config", home / "device.toml", "--plan", MLP)
    verdict, says = of(result, "data")
    assert (verdict, result.exit_code) == ("problem", 1)
    assert "docs/data.md" in says


def test_the_machine_of_a_broken_device_is_looked_at_all_the_same(doctor: Doctor, home: Path):
    (home / "device.toml").write_text("fleet = 3\n")
    result = doctor("--config", home / "device.toml")
    assert of(result, "configuration")[0] == "problem"
    assert [check for _, check, _ in lines_of(result)] == [*MACHINE_CHECKS, "configuration"]
    assert result.exit_code == 1


# -- in processes of their own -------------------------------------------------------------------


def alone(*command: object, **environment: str) -> "subprocess.CompletedProcess[str]":
    """Run it as a process of its own."""
    path = os.pathsep.join([*environment.pop("first", "").split(), *sys.path])
    return subprocess.run(
        [str(part) for part in command],
        env=os.environ | {"PYTHONPATH": path} | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


DOCTOR = (sys.executable, "-c", "from covey_device.cli import main; main()", "doctor")


def test_without_any_network(home: Path):
    if alone("unshare", "-rn", "true").returncode != 0:
        missing("unprivileged network namespaces are not allowed on this machine")
    text = (home / "device.toml").read_text()
    (home / "device.toml").write_text(text.replace("127.0.0.1:9", "192.0.2.1:1883"))
    done = alone("unshare", "-rn", *DOCTOR, "--config", home / "device.toml")
    assert done.returncode == 1, done.stderr
    assert "problem  broker: cannot reach 192.0.2.1:1883: the network is unreachable" in done.stdout
    (home / "device.toml").write_text(text.replace("127.0.0.1:9", "broker.lan:1883"))
    done = alone("unshare", "-rn", *DOCTOR, "--config", home / "device.toml")
    assert "problem  broker: cannot look up the host broker.lan" in done.stdout
    assert done.stderr == ""


def test_with_a_broken_package_it_lives_to_say_so(home: Path, tmp_path: Path):
    """Whatever imports numpy fails, as on a processor that it was not built for."""
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "numpy.py").write_text("import os\nos.kill(os.getpid(), 4)\n")
    done = alone(*DOCTOR, "--config", home / "device.toml", first=str(tmp_path / "broken"))
    assert done.returncode == 1, done.stderr
    assert "problem  packages: importing numpy failed: this processor has not" in done.stdout
    assert "unknown  training: not tried" in done.stdout
    assert "unknown  configuration: not tried" in done.stdout
    assert re.search(r"^ok +disk: ", done.stdout, re.M)
    assert done.stderr == ""


LOADED = """
import sys
import covey_device.cli, covey_device.assembly, covey_device.service, covey_shared.mqtt
print(sorted(name for name in sys.modules if name.startswith("covey_device.doctor.")))
print("covey_device.doctor" in sys.modules)
import covey_device.doctor.checkup
print(sorted({"numpy", "msgspec", "Crypto", "paho", "psutil", "onnxruntime"} & set(sys.modules)))
"""

LIGHT = """
import sys
import covey_device.cli, covey_device.doctor.checkup
print(sorted({"numpy", "msgspec", "Crypto", "paho", "psutil", "onnxruntime"} & set(sys.modules)))
"""


def test_the_service_loads_nothing_of_it_and_it_loads_little_itself():
    done = alone(sys.executable, "-c", LOADED)
    assert done.stdout.splitlines()[:2] == ["[]", "False"], done.stderr
    done = alone(sys.executable, "-c", LIGHT)
    assert done.stdout == "[]\n", done.stderr


STRANGER = """
import os, sys
from pathlib import Path
from covey_device.doctor import enrolled
from covey_device.doctor.machine import Machine
import covey_device.renewal, covey_device.keystore, covey_device.enrol
config = Path(sys.argv[1])
known, device = enrolled.load(config, Machine())
for path in os.environ["closed"].split(os.pathsep):
    os.chmod(path, 0)
if os.geteuid() == 0:
    os.setgroups([]); os.setgid(65534); os.setuid(65534)
here = Machine()
print(enrolled.load(config, here)[0].line())
print(enrolled.keys(device).line())
print(enrolled.certificates(device, here.clock()).line())
print(enrolled.state(device)[0].line())
print(enrolled.data(device, here).line())
"""


def test_a_stranger_is_told_whom_to_be(home: Path, tmp_path: Path):
    MemoryFile(home / "state").save(Memory(41))
    closed = [tmp_path / "data.npz", home / "device.toml", home / "state", home / "identity.key"]
    closed.append(home)
    modes = [path.stat().st_mode for path in closed]
    command = [sys.executable, "-c", STRANGER, home / "device.toml"]
    try:
        done = alone(*command, closed=os.pathsep.join(map(str, closed)))
    finally:
        for path, mode in reversed(list(zip(closed, modes, strict=True))):
            path.chmod(mode)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 5
    for line in lines:
        assert line.startswith("unknown  "), lines
        assert "sudo covey-device doctor" in line


def test_every_check_has_a_name_of_its_own():
    assert len(set(CHECKS)) == len(CHECKS) == len(MACHINE_CHECKS) + len(DEVICE_CHECKS)
