"""Puts the service in its place, and takes everything away again."""

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path

from covey_device.installation.machine import UNIT, Machine, MachineError, remove

CONFIG = Path("/etc/covey/device.toml")
CONFIG_DIRECTORY, STATE, RUNTIME = "/etc/covey", "/var/lib/covey-device", "/run/covey-device"
PREFIX = "/opt/covey"
"""Where deploy/install.sh and the Debian package put the program."""

MARK = f"{PREFIX}/.made-by-install.sh"
OWN_UNIT = f"/etc/systemd/system/{UNIT}"
PACKAGED_UNITS = (f"/usr/lib/systemd/system/{UNIT}", f"/lib/systemd/system/{UNIT}")
STEPS = f"/etc/systemd/system/{UNIT}.d/10-restart-steps.conf"
STEPS_SINCE = 254
"""The release of systemd that has RestartSteps=; others warn of it."""

PACKAGED_LIST = "/var/lib/dpkg/info/covey-device.list"
COORDINATOR = "/etc/systemd/system/covey-coordinator.service"
"""A machine with this one needs the program still."""

LINKS = ("/usr/local/bin/covey-device", "/usr/local/bin/covey")

OF_DEVICE = (
    "device.toml",
    "device.toml.*",
    "policy.toml",
    "enrolment-*",
    ".joining-*",
    "state",
    "model",
)
"""In /etc/covey. The last four are of devices that were enrolled without a service."""

UNREACHABLE = ("/home/", "/root/", "/run/user/", "/tmp/", "/var/tmp/")  # noqa: S108
"""What the unit hides from the service: ProtectHome=, PrivateTmp=."""


def shipped(name: str) -> str:
    """A file of those for systemd, as it comes with this package."""
    return (files("covey_device") / "systemd" / name).read_text(encoding="utf-8")


def program() -> Path:
    """The `covey-device` that runs now."""
    here = Path(sys.prefix) / "bin" / "covey-device"
    return here if here.exists() else Path(sys.argv[0]).absolute()


def unit_for(command: Path) -> str:
    """The unit that starts this program. Raises MachineError for one that the unit could not see."""
    for place in (command, Path(sys.executable).resolve()):
        if str(place).startswith(UNREACHABLE):
            raise MachineError(
                f"the service sees no home directory, and {place} is in one: install covey into {PREFIX}, "
                "as deploy/install.sh does, or give --no-service and run it yourself"
            )
    if any(c.isspace() or c in "\"'\\$%;" for c in str(command)):
        raise MachineError(f"{command}: a unit needs a path without spaces and special characters")
    lines = shipped(UNIT).splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("ExecStart="))
    lines[start] = f"ExecStart={command} run"
    return "\n".join(lines) + "\n"


def must_be_possible(machine: Machine) -> None:
    """Raises MachineError where no service can be installed."""
    if not machine.has_systemd:
        raise MachineError(
            "no systemd runs on this machine; start `covey-device run` with what it has instead"
        )
    if not machine.is_root():
        raise MachineError("this changes the system: run it with sudo")


@dataclass(frozen=True, slots=True)
class Installed:
    """ids: of the service's user. unit: where its unit is. changed: whether it was written anew."""

    ids: tuple[int, int]
    unit: Path
    changed: bool


def install(machine: Machine, command: Path | None = None) -> Installed:
    """User, directories and unit, whatever of them was there before; the unit is enabled and not started.

    A unit that a package brought is left as it is. Raises MachineError.
    """
    must_be_possible(machine)
    with as_file(files("covey_device") / "systemd") as directory:
        ids = machine.make_user(directory / "covey-device.sysusers")
        root = [f"--root={machine.root}"] if machine.offline else []
        machine.must(
            "systemd-tmpfiles", *root, "--create", str(directory / "covey-device.tmpfiles")
        )
    unit = next((p for p in map(machine.path, PACKAGED_UNITS) if p.exists()), None)
    changed = False
    if unit is None:
        unit = machine.path(OWN_UNIT)
        changed = _write(unit, unit_for(command or program()))
    steps = machine.path(STEPS)
    if machine.systemd_version() >= STEPS_SINCE:
        changed |= _write(steps, shipped("restart-steps.conf"))
    elif remove(steps):
        changed = True
    machine.manager("daemon-reload")
    machine.systemctl("enable", "--quiet", UNIT)
    return Installed(ids, unit, changed)


def start(machine: Machine) -> None:
    """Start the service, or start it anew; returns when it serves. Raises MachineError."""
    try:
        machine.manager("restart", UNIT)
    except MachineError as error:
        log = machine.run(["journalctl", "--quiet", "--unit", UNIT, "--lines=40", "--output=cat"])
        told = [line for line in log.output.splitlines() if "covey-device: " in line]
        why = told[-1].partition("covey-device: ")[2] if told else str(error)
        raise MachineError(f"the service does not start: {why} (journalctl -u {UNIT})") from error


def _write(path: Path, text: str) -> bool:
    """Whether it was another before."""
    data = text.encode()
    try:
        if path.is_file() and path.read_bytes() == data:
            return False
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        path.parent.chmod(0o755)
        fresh = path.with_name(f".{path.name}.new")
        fresh.write_bytes(data)
        fresh.chmod(0o644)
        fresh.replace(path)
    except OSError as error:
        raise MachineError(f"cannot write {path}: {error.strerror}") from error
    return True


# -- the end -------------------------------------------------------------------------------------------


def belongings(machine: Machine, *, keep_data: bool = False) -> list[Path]:
    """What of covey is on the machine, in the order in which it is removed. keep_data: without what a
    device knows and is (configuration, keys, state, data)."""
    names = [f"{OWN_UNIT}.d", OWN_UNIT, RUNTIME]
    found = [machine.path(name) for name in names]
    if not keep_data:
        found.append(machine.path(STATE))
        configured = machine.path(CONFIG_DIRECTORY)
        for pattern in OF_DEVICE:
            found += sorted(configured.glob(pattern))
    found = [path for path in found if os.path.lexists(path)]
    if machine.path(MARK).exists() and not machine.path(COORDINATOR).exists():
        found += [*list(_links(machine)), machine.path(PREFIX)]
    return found


def _links(machine: Machine) -> Iterator[Path]:
    """Commands that lead into our prefix, as install.sh made them."""
    for path in map(machine.path, LINKS):
        if path.is_symlink() and str(path.readlink()).startswith(f"{PREFIX}/"):
            yield path


def packaged(machine: Machine) -> bool:
    """Whether a Debian package brought the program."""
    return machine.path(PACKAGED_LIST).exists()


def uninstall(machine: Machine, *, keep_data: bool = False) -> list[str]:
    """Stop the service and remove all of it -> what was done, a line each.

    Raises MachineError; then what is left can be removed by the same again.
    """
    if not machine.is_root():
        raise MachineError("this changes the system: run it with sudo")
    done = []
    if machine.has_systemd:
        # A unit that is not there is as good as one that was stopped and disabled.
        live = [] if machine.offline else ["--now"]
        root = [f"--root={machine.root}"] if machine.offline else []
        machine.run(["systemctl", *root, "disable", "--quiet", *live, UNIT])
        done.append("the service is stopped and disabled")
    for path in belongings(machine, keep_data=keep_data):
        if remove(path):
            done.append(f"removed {path}")
    if not keep_data and (configured := machine.path(CONFIG_DIRECTORY)).is_dir():
        others = sorted(path.name for path in configured.iterdir())
        if others:
            done.append(f"kept {configured}, with what is not of this device: {', '.join(others)}")
        else:
            configured.rmdir()
            done.append(f"removed {configured}")
    if machine.has_systemd:
        machine.manager("daemon-reload")
        if not machine.offline:
            machine.run(["systemctl", "reset-failed", UNIT])
    if not keep_data and machine.remove_user():
        done.append("removed the user and group covey-device")
    if packaged(machine):
        verb = "remove" if keep_data else "purge"
        machine.must("apt-get", verb, "--yes", "--quiet", "covey-device")
        done.append(f"apt {verb}: the package covey-device")
    return done
