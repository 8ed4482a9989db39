"""The unit by systemd's own judgement, and the service's processes under its sandbox."""

import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tomli_w

import sandboxed
from covey_device.installation import service
from covey_device.installation.machine import USER
from fake_machine import analyze
from memory_fleet import PLAN
from processes import COVEY, COVEY_DEVICE, Child, covey, free_port

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "device/covey_device/systemd"
UNIT = FOLDER / "covey-device.service"
SANDBOX = [sys.executable, str(ROOT / "tests/sandboxed.py"), str(UNIT)]
SETTINGS = dict(sandboxed.settings(UNIT))
MAX_EXPOSURE = 1.2


@pytest.fixture
def unit(tmp_path: Path) -> Path:
    """As it is installed, but that its program is there on every machine."""
    path = tmp_path / "covey-device.service"
    path.write_text(UNIT.read_text().replace(SETTINGS["ExecStart"], "/bin/true"))
    return path


def test_it_verifies_in_silence(unit: Path):
    """systemd-analyze returns 0 for keys that it does not know: what counts is that it says nothing."""
    done = analyze("verify", str(unit))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    unit.write_text(unit.read_text() + "[Service]\nNoSuchKey=yes\n")
    assert "NoSuchKey" in analyze("verify", str(unit)).stderr


def test_it_exposes_next_to_nothing(unit: Path):
    shown = analyze("security", "--offline=yes", "--no-pager", str(unit))
    found = re.search(r"Overall exposure level for \S+: ([\d.]+)", shown.stdout)
    assert found is not None, shown.stderr
    assert float(found[1]) <= MAX_EXPOSURE
    assert analyze("security", "--offline=yes", "--threshold=12", str(unit)).returncode == 0


def test_every_step_of_the_hardening_counts(unit: Path):
    """Were one of them taken out, the figure would be worse: nothing stands there for show."""
    text = unit.read_text()

    def exposure() -> float:
        shown = analyze("security", "--offline=yes", "--no-pager", str(unit)).stdout
        rows = [line.split()[-1] for line in shown.splitlines() if line.startswith("✗")]
        return sum(float(row) for row in rows)

    whole = exposure()
    for key in (
        "CapabilityBoundingSet",
        "PrivateMounts",
        "ProtectClock",
        "RestrictAddressFamilies",
    ):
        unit.write_text(re.sub(rf"^{key}=.*\n", "", text, flags=re.MULTILINE))
        assert exposure() > whole, key


def test_names_and_places_are_those_of_the_installation():
    assert SETTINGS["User"] == SETTINGS["Group"] == USER
    assert SETTINGS["ExecStart"] == f"{service.PREFIX}/bin/covey-device run"
    assert f"/var/lib/{SETTINGS['StateDirectory']}" == service.STATE
    assert f"/run/{SETTINGS['RuntimeDirectory']}" == service.RUNTIME
    assert SETTINGS["ConditionPathExists"] == str(service.CONFIG)
    assert f"u {USER} " in (FOLDER / "covey-device.sysusers").read_text()
    for line in (FOLDER / "covey-device.tmpfiles").read_text().splitlines():
        assert line.split()[1].startswith((service.STATE, service.CONFIG_DIRECTORY))


def test_deploy_has_the_very_files_of_the_package():
    links = {path.name: path for path in (ROOT / "deploy/systemd").iterdir()}
    for path in FOLDER.iterdir():
        assert links[path.name].is_symlink()
        assert links[path.name].resolve() == path


def test_the_script_is_clean_shell():
    done = subprocess.run(
        ["shellcheck", ROOT / "deploy/install.sh"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


# -- the sandbox -----------------------------------------------------------------------------------------


def python(program: str) -> list[str]:
    """What a program says within."""
    done = subprocess.run(
        [*SANDBOX, sys.executable, "-c", program],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_the_sandbox_holds():
    """A control: what the unit forbids fails here, too."""
    assert python(
        """
import ctypes, mmap, os, resource, socket
def tried(what):
    try:
        what()
    except OSError as error:
        return error.errno
    return 0
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(status["Seccomp"].strip(), status["NoNewPrivs"].strip())
print(tried(lambda: os.chown("/", 0, 0)))
print(tried(lambda: os.sched_setaffinity(0, {0})))
print(tried(lambda: os.setpriority(os.PRIO_PROCESS, 0, 0)))
print(tried(lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)))
print(tried(lambda: socket.socket(socket.AF_INET).close()))
both = mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC
kept = ctypes.CDLL(None).prctl(66, 0, 0, 0, 0) > 0  # PR_GET_MDWE, of Linux 6.3
print(tried(lambda: mmap.mmap(-1, 4096, prot=both)) if kept else 13)
print(resource.getrlimit(resource.RLIMIT_CORE)[0], oct(os.umask(0)))
"""
    ) == ["2", "1", "1", "1", "1", "1", "0", "13", "0", "0o77"]


def test_a_trial_confines_itself_within_the_sandbox():
    """prctl, resource limits and the score of who goes first when memory runs out: all still work."""
    assert python(
        """
import os, resource
adjusted = os.open("/proc/self/oom_score_adj", os.O_RDONLY)
status = os.open("/proc/self/status", os.O_RDONLY)
from covey_device.confine import confine
confine(32 << 20, 5.0)
print(os.pread(adjusted, 20, 0).decode().strip())
print(resource.getrlimit(resource.RLIMIT_CPU)[0], resource.getrlimit(resource.RLIMIT_NOFILE)[0])
print(resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY)
try:
    bytearray(512 << 20)
except MemoryError:
    print("bounded")
"""
    ) == ["1000", "6", "0", "True", "bounded"]


RUN = {
    "plan": str(PLAN),
    "rounds": 1,
    "work": {"batches": 3, "batch_size": 16, "seconds": 60.0},
    "cohort": {"goal": 3, "minimum": 3},
    "deadlines": {"gather_s": 60.0, "share_s": 60.0, "collect_s": 60.0, "unmask_s": 60.0},
}


def test_a_round_with_trial_and_training_in_the_sandbox(
    tmp_path: Path, start: Callable[..., Child]
) -> None:
    """The service as its unit starts it, three of them, from the first connection to the sum."""
    assert covey(tmp_path, "init", "farm", "--fleet", "farm", "--port", free_port()).returncode == 0
    devices = []
    for seed, name in enumerate(("pi-1", "pi-2", "pi-3")):
        rng = np.random.default_rng(seed)
        features = rng.random((40, 1, 8, 8)).astype(np.float32)
        np.savez(tmp_path / f"{name}.npz", features=features, labels=rng.integers(0, 10, 40))
        added = covey(
            tmp_path, "device", "add", name, "--data", f"{name}.npz", "--fleet-dir", "farm"
        )
        assert added.returncode == 0, added.stderr
    coordinator = start(COVEY, "up", "--fleet-dir", "farm")
    coordinator.until("waiting for devices and runs; Ctrl-C stops$")
    for name in ("pi-1", "pi-2", "pi-3"):
        config = tmp_path / "farm/devices" / name / "device.toml"
        device = start([*SANDBOX, *COVEY_DEVICE], "run", "--config", config)
        device.until(f"{name}: connected$")
        devices.append(device)
        status = Path(f"/proc/{device.pid}/status").read_text()
        assert re.search(r"^Seccomp:\t2$", status, re.MULTILINE)
    (tmp_path / "run.toml").write_text(tomli_w.dumps(RUN))
    queued = covey(tmp_path, "run", "run.toml", "--name", "r", "--detach", "--fleet-dir", "farm")
    assert queued.returncode == 0, queued.stderr
    coordinator.until("run r completed: 1 rounds? completed, 0 abandoned$", 120)
    for device in devices:
        device.until("trained 3 batches")
        assert "tried in" in device.text
        assert device.end(signal.SIGTERM) == 0
    assert coordinator.end() == 0
