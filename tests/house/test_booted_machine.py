"""A device's life on a Debian that has booted: deploy/install.sh, join, rounds, restarts, uninstall.

Its systemd is a real one, so that the unit's sandbox, limits, watchdog and users are. See `booted`.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import tomli_w

from booted import Booted, booted, unpack
from covey_coordinator.broker import mosquitto
from covey_coordinator.fleet import FleetDirectory
from covey_device.ceiling import CONTROLLER_FIX
from covey_packaging.target import target
from covey_packaging.wheels import fetch
from memory_fleet import PLAN
from prerequisites import missing
from processes import COVEY, COVEY_DEVICE, Child, covey, ended, free_port, wait

pytestmark = [pytest.mark.slow, pytest.mark.timeout(500)]

ROOT = Path(__file__).parents[2]
STATE = "var/lib/covey-device"
ORDINARY = "CPUSchedulingPolicy=other\nNice=0\nCPUWeight=100\n"
"""For the rest of a test, once the unit's own priority was seen: other tests want the processors as well."""

RUN = {
    "plan": str(PLAN),
    "rounds": 2,
    "work": {"batches": 3, "batch_size": 16, "seconds": 60.0},
    "cohort": {"goal": 3, "minimum": 3},
    "deadlines": {"gather_s": 120.0, "share_s": 60.0, "collect_s": 120.0, "unmask_s": 60.0},
}


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """covey as it is now."""
    directory = tmp_path_factory.mktemp("wheels")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(directory)],
        cwd=ROOT, check=True, capture_output=True,
    )  # fmt: skip
    (wheel,) = directory.iterdir()
    return wheel


@pytest.fixture
def machine(package: Path, release: str) -> Iterator[Booted]:
    """A machine fresh from its card, but for the script on it, and what pip may install there."""
    place = Path(tempfile.mkdtemp(prefix="covey-machine-"))
    place.chmod(0o755)
    root = place / "root"
    try:
        unpack(release, root)
        (root / "wheels").mkdir(mode=0o755)
        for wheel in (package, *fetch(target(release, "amd64"))):
            shutil.copy(wheel, root / "wheels")
        shutil.copy(ROOT / "deploy/install.sh", root / "root/install.sh")
        with booted(root) as running:
            yield running
    finally:
        shutil.rmtree(place)


def install(machine: Booted) -> str:
    (wheel,) = (machine.root / "wheels").glob("covey-*.whl")
    return machine.must("sh", "/root/install.sh", f"/wheels/{wheel.name}", seconds=200)


def tree(root: Path) -> dict[str, str]:
    """What is on the machine and belongs to nobody's log -> what it is."""
    passing = re.compile(
        r"(proc|sys|dev|run|tmp|var/log|var/tmp|var/lib/systemd|var/cache|root/\.cache)/"
        # What the system itself keeps of user lists that are changed.
        r"|etc/((passwd|group|shadow|gshadow|subuid|subgid)-|\.pwd\.lock)$"
    )
    found = {}
    for path in sorted(root.rglob("*")):
        name = str(path.relative_to(root))
        if passing.match(f"{name}/") or passing.match(name):
            continue
        if path.is_symlink():
            found[name] = f"-> {path.readlink()}"
        elif path.is_dir():
            found[name] = "directory"
        elif name in ("etc/passwd", "etc/group", "etc/shadow", "etc/gshadow"):
            found[name] = path.read_text()
        else:
            found[name] = str(path.stat().st_size)
    return found


def data(path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    features = rng.random((64, 1, 8, 8)).astype(np.float32)
    np.savez(path, features=features, labels=rng.integers(0, 10, 64))


def token(folder: Path, name: str) -> str:
    made, _ = FleetDirectory(folder / "farm").make_token(
        name, hours=None, again=False, now_unix=int(time.time())
    )
    return made.encode() + "\n"


def fleet(folder: Path, start: Callable[..., Child]) -> Child:
    """A coordinator with its broker."""
    if mosquitto.find() is None:
        missing("mosquitto is not installed: apt install mosquitto")
    ports = ("--port", free_port(), "--enrol-port", free_port())
    made = covey(folder, "init", "farm", "--fleet", "farm", "--address", "127.0.0.1", *ports)
    assert made.returncode == 0, made.stderr
    coordinator = start(COVEY, "up", "--fleet-dir", "farm")
    coordinator.until("waiting for devices and runs; Ctrl-C stops$")
    return coordinator


def pid(machine: Booted) -> int:
    """Of the service, within the machine."""
    return int(machine.show("MainPID")["MainPID"])


def overridden(machine: Booted, text: str) -> None:
    folder = machine.root / "etc/systemd/system/covey-device.service.d"
    folder.mkdir(exist_ok=True)
    (folder / "test.conf").write_text(f"[Service]\n{ORDINARY}{text}")
    machine.must("systemctl", "daemon-reload")
    machine.must("systemctl", "restart", "covey-device")


@pytest.mark.parametrize("release", ["bookworm"])
def test_a_life_from_installation_to_nothing(
    machine: Booted, tmp_path: Path, start: Callable[..., Child]
) -> None:
    coordinator = fleet(tmp_path, start)
    before = tree(machine.root)

    # One command installs, and again it changes nothing.
    said = install(machine)
    assert "unit: /etc/systemd/system/covey-device.service, written" in said
    assert machine.show("ActiveState", "UnitFileState") == {
        "ActiveState": "inactive",
        "UnitFileState": "enabled",
    }
    assert "covey-device.service, as it was" in install(machine)

    # Another enrols and starts it. How busy this machine is with other tests is no matter here.
    policy = "[host]\ncpu_pressure = 0\nmemory_pressure = 0\nio_pressure = 0\n"
    (machine.root / "etc/covey/policy.toml").write_text(policy)
    data(machine.root / "root/mine.npz", 1)
    said = machine.must(
        "covey-device", "join", "-", "--data", "/root/mine.npz", stdin=token(tmp_path, "pi-booted")
    )
    assert "joined fleet farm as pi-booted" in said
    assert f"data: copied to /{STATE}/data/mine.npz" in said
    assert "service: covey-device.service, enabled and started" in said
    assert machine.show("ActiveState", "SubState", "NRestarts") == {
        "ActiveState": "active",
        "SubState": "running",
        "NRestarts": "0",
    }
    main = pid(machine)
    assert machine.must("ps", "-o", "cls=", "-p", main).strip() == "IDL"
    assert machine.must("cat", f"/proc/{main}/stat").split()[18] == "19"
    assert machine.must("ionice", "-p", main).strip() == "idle"
    overridden(machine, "")
    folder = machine.root / STATE
    ids = {(path.lstat().st_uid, path.lstat().st_gid) for path in (folder, *folder.rglob("*"))}
    assert len(ids) == 1
    assert ids != {(0, 0)}
    assert (machine.root / "etc/covey/device.toml").stat().st_mode & 0o777 == 0o640
    wait(lambda: "pi-booted: connected" in machine.journal(), machine.journal)

    # It is in two rounds, with a trial and training inside the sandbox.
    for name in ("pi-2", "pi-3"):
        data(tmp_path / f"{name}.npz", 2)
        options = ("--config", tmp_path / name / "device.toml", "--data", f"{name}.npz")
        joined = ended(tmp_path, COVEY_DEVICE, "join", "-", *options, stdin=token(tmp_path, name))
        assert joined.returncode == 0, joined.stderr
        start(COVEY_DEVICE, "run", *options[:2]).until(f"{name}: connected$")
    (tmp_path / "run.toml").write_text(tomli_w.dumps(RUN))
    queued = covey(tmp_path, "run", "run.toml", "--name", "r", "--detach", "--fleet-dir", "farm")
    assert queued.returncode == 0, queued.stderr
    coordinator.until("run r completed: 2 rounds completed, 0 abandoned$", 240)
    wait(lambda: machine.journal().count("trained 3 batches") == 2, machine.journal)
    journal = machine.journal()
    assert "tried in" in journal  # the plan's trial, a process with limits of its own
    assert "Traceback" not in journal
    assert machine.show("NRestarts")["NRestarts"] == "0"
    assert "waiting for a round" in machine.show("StatusText")["StatusText"]
    controllers = (machine.root / "sys/fs/cgroup").exists() and machine.must(
        "cat", "/sys/fs/cgroup/cgroup.controllers"
    )
    assert (CONTROLLER_FIX in journal) == ("memory" not in str(controllers).split())

    # Renewal by hand, as root: what it writes, the service still owns and reads.
    said = machine.must("covey-device", "renew")
    assert "renewed: TLS certificate" in said
    assert {(p.lstat().st_uid, p.lstat().st_gid) for p in (folder, *folder.rglob("*"))} == ids
    machine.must("systemctl", "restart", "covey-device")
    wait(lambda: machine.journal().count("pi-booted: connected") >= 2, machine.journal)

    # And by the service itself, within the sandbox, when the operator asks.
    renewed = machine.journal().count("renewed: ")
    asked = covey(tmp_path, "device", "renew", "pi-booted", "--fleet-dir", "farm")
    assert asked.returncode == 0, asked.stderr
    wait(lambda: machine.journal().count("renewed: ") > renewed, machine.journal)
    assert {(p.lstat().st_uid, p.lstat().st_gid) for p in (folder, *folder.rglob("*"))} == ids

    # A reload is the policy, and no restart.
    was = pid(machine)
    (machine.root / "etc/covey/policy.toml").write_text("rounds_per_day = 7\n")
    machine.must("systemctl", "reload", "covey-device")
    wait(lambda: "policy.toml was read again" in machine.journal(), machine.journal)
    wait(lambda: machine.show("ActiveState")["ActiveState"] == "active")
    assert pid(machine) == was

    # A link that the service's user planted leads root nowhere.
    target_directory = machine.root / "etc/only-root"
    target_directory.mkdir(mode=0o700)
    machine.must("systemctl", "stop", "covey-device")
    state = folder / "state"
    state.rename(folder / "moved")
    state.symlink_to("/etc/only-root")
    refused = machine.run("covey-device", "join", "--force", "-", stdin=token(tmp_path, "pi-again"))
    assert refused.returncode == 1
    assert "Permission denied" in refused.stderr
    assert not list(target_directory.iterdir())
    target_directory.rmdir()
    state.unlink()
    (folder / "moved").rename(state)
    (machine.root / "root/mine.npz").unlink()

    # And nothing is left.
    machine.must("systemctl", "start", "covey-device")
    overridden(machine, "MemoryMax=500M\n")
    said = machine.must("covey-device", "uninstall", "--yes")
    assert "removed /opt/covey" in said
    assert tree(machine.root) == before
    assert machine.run("systemctl", "cat", "covey-device").returncode != 0
    assert not (machine.root / "run/covey-device").exists()
    assert machine.run("id", "covey-device").returncode != 0


@pytest.mark.parametrize("release", ["bookworm", "trixie"])
def test_a_service_that_hangs_or_dies_is_started_again(
    machine: Booted, release: str, tmp_path: Path, start: Callable[..., Child]
) -> None:
    fleet(tmp_path, start)
    install(machine)
    machine.must("covey-device", "join", "-", stdin=token(tmp_path, "pi-hung"))
    shown = machine.show("RestartUSec")["RestartUSec"]
    steps = machine.root / "etc/systemd/system/covey-device.service.d/10-restart-steps.conf"
    assert (shown, steps.exists()) == (("10s", True) if release == "trixie" else ("30s", False))
    overridden(machine, "WatchdogSec=4s\nRestartSec=100ms\nTimeoutAbortSec=2s\n")

    # It is fed while all is well.
    first = pid(machine)
    time.sleep(9)
    assert pid(machine) == first

    # A worker that hangs, with its event loop and everything else alive, is not fed: the thread of the
    # protocol is stopped by a lock on the file that it reads, which nobody gives back.
    os.mkfifo(machine.root / "etc/covey/policy.toml")
    machine.must("chmod", "644", "/etc/covey/policy.toml")
    machine.run("kill", "-HUP", first)
    wait(lambda: machine.show("NRestarts")["NRestarts"] != "0", machine.journal, 60)
    (machine.root / "etc/covey/policy.toml").unlink()
    assert "Fatal Python error: Aborted" in machine.journal()  # and the log shows where it hung
    assert "policy" in machine.journal().split("Fatal Python error: Aborted")[1]
    wait(
        lambda: machine.show("SubState")["SubState"] == "running" and pid(machine) != first,
        machine.journal,
    )

    second, restarts = pid(machine), int(machine.show("NRestarts")["NRestarts"])
    machine.must("kill", "-KILL", second)
    wait(lambda: int(machine.show("NRestarts")["NRestarts"]) > restarts, machine.journal)
    wait(lambda: machine.show("SubState")["SubState"] == "running", machine.journal)

    # A stop that was asked for is the end of it.
    machine.must("systemctl", "stop", "covey-device")
    assert machine.show("ActiveState", "Result") == {"ActiveState": "inactive", "Result": "success"}
