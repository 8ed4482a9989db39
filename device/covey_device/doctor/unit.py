"""The service under systemd: installed, enabled, running, and bounded."""

import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Literal

from covey_device.doctor.findings import Finding, combined
from covey_device.doctor.machine import UNIT, Machine, unit_file

if TYPE_CHECKING:
    from covey_device.host.config import HostConfig
    from covey_device.host.readings import Readings

PROPERTIES = (
    "LoadState",
    "UnitFileState",
    "ActiveState",
    "SubState",
    "Result",
    "MainPID",
    "NRestarts",
)
TOO_HOT_C = 80.0
"""Where no owner says otherwise."""

LOG = "journalctl -u covey-device -n 50 says why"
_MB = 1_000_000

Running = Literal["running", "stopped", "unknown"]

Show = Callable[[], dict[str, str] | None]
"""-> the unit's properties as systemctl shows them; None if it cannot be asked."""


def show() -> dict[str, str] | None:
    """Ask systemctl."""
    if shutil.which("systemctl") is None:
        return None
    command = ["systemctl", "show", "--no-pager", f"--property={','.join(PROPERTIES)}", UNIT]
    try:
        done = subprocess.run(command, capture_output=True, timeout=20, check=True, text=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)


def service(machine: Machine, running: Running, show: Show = show) -> tuple[Finding, int | None]:
    """-> and the number of its main process, if it has one."""
    check = "service"
    by_hand = "; a covey-device runs without it" if running == "running" else ""
    if not (machine.root / "run/systemd/system").exists():
        says = f"this machine does not run systemd{by_hand}"
        fix = "" if by_hand else "have whatever starts services here run `covey-device run`"
        return Finding(check, "note", says, fix), None
    if unit_file(machine) is None:
        says = f"{UNIT} is not installed{by_hand}"
        return Finding(check, "note", says, "sudo covey-device install-service"), None
    found = show()
    if found is None:
        return Finding(
            check, "unknown", "systemctl does not answer", f"systemctl status {UNIT}"
        ), None
    return combined(check, _judged(check, found, by_hand)), int(found.get("MainPID") or 0) or None


def _judged(check: str, found: dict[str, str], by_hand: str) -> list[Finding]:
    active, enabled = found.get("ActiveState", ""), found.get("UnitFileState", "")
    if found.get("LoadState") != "loaded":
        state = found.get("LoadState") or "in an unknown state"
        return [Finding(check, "problem", f"{UNIT} is {state}", "sudo systemctl daemon-reload")]
    if enabled == "masked":
        return [Finding(check, "problem", f"{UNIT} is masked", f"sudo systemctl unmask {UNIT}")]
    parts = []
    if active == "active":
        parts.append(Finding(check, "ok", f"{enabled}, running" if enabled else "running"))
    elif active in ("activating", "reloading"):
        parts.append(
            Finding(check, "note", f"{enabled}, {active} ({found.get('SubState', '')})", LOG)
        )
    elif active == "failed":
        says = f"it failed ({found.get('Result', '')})"
        fix = f"{LOG}; then sudo systemctl restart covey-device"
        parts.append(Finding(check, "problem", says, fix))
    else:
        fix = "sudo systemctl start covey-device"
        parts.append(Finding(check, "problem", f"it does not run ({active}){by_hand}", fix))
    if enabled == "disabled":
        fix = "sudo systemctl enable covey-device"
        parts.append(Finding(check, "problem", "it does not start with the machine", fix))
    restarts = int(found.get("NRestarts") or 0)
    if restarts > 3:
        parts.append(Finding(check, "note", f"it was restarted {restarts} times", LOG))
    return parts


def limits(machine: Machine, pid: int | None, max_memory_mb: int | None = None) -> Finding:
    """What bounds the memory of the running service (or, with None, of this process). max_memory_mb: what
    the owner's policy gives, if it is known."""
    check, who = "limits", "self" if pid is None else str(pid)
    groups, bounds = machine.text(f"proc/{who}/cgroup"), machine.text(f"proc/{who}/limits")
    if groups is None and bounds is None:
        return Finding(check, "unknown", f"/proc/{who} does not show them")
    whose = "of the service" if pid is not None else "of this process; the service does not run"
    group = _least_of_groups(machine, groups or "")
    data = re.search(r"^Max data size\s+(\d+)", bounds or "", re.M)
    words = []
    if group is not None:
        words.append(f"{group // _MB:,} MB by its control group")
    if data is not None:
        words.append(f"{int(data[1]) // _MB:,} MB of data (LimitDATA)")
    if not words:
        fix = "see the line `memory-controller`, and run it as the unit that covey-device installs"
        verdict = Finding(check, "note", f"nothing bounds the memory {whose}", fix)
        return verdict if pid is not None else Finding(check, "ok", f"none {whose}")
    parts = [Finding(check, "ok", f"memory {whose}: {' and '.join(words)}")]
    given = None if max_memory_mb is None else max_memory_mb * _MB
    if group is not None and given is not None and group < given:
        parts.append(
            Finding(
                check, "note",
                f"the policy lets a round take {given // _MB:,} MB, more than that: the system may end the "
                "service in a round",
                f"set limits.max_memory_mb in policy.toml to {int(group * 0.8) // _MB}, or raise MemoryMax=",
            )
        )  # fmt: skip
    return combined(check, parts)


def _least_of_groups(machine: Machine, groups: str) -> int | None:
    """The least memory.max or memory.high (or, in the old hierarchy, limit) of a process's groups and of
    those around them; None if there is none."""
    found: list[int] = []
    names: tuple[str, ...]
    for line in groups.splitlines():
        parts = line.split(":", 2)
        if len(parts) != 3:
            continue
        _, controllers, path = parts
        if controllers == "":
            base, names = "sys/fs/cgroup", ("memory.max", "memory.high")
        elif "memory" in controllers.split(","):
            base, names = "sys/fs/cgroup/memory", ("memory.limit_in_bytes",)
        else:
            continue
        steps = [step for step in path.split("/") if step not in ("", ".", "..")]
        for depth in range(len(steps), -1, -1):
            for name in names:
                text = (machine.text("/".join([base, *steps[:depth], name])) or "").strip()
                # The old hierarchy writes the largest number there is for no limit.
                if text.isdigit() and int(text) < 1 << 60:
                    found.append(int(text))
    return min(found, default=None)


def sensors(machine: Machine, conditions: "HostConfig | None" = None) -> Finding:
    """What the machine says of itself, and what it does not: what is unknown keeps it from nothing, unless
    its owner's conditions require it. conditions: [host] of the policy, if it is known."""
    from covey_device.host.readings import read

    patterns = () if conditions is None else conditions.metered_interfaces
    check, seen = "sensors", read(machine.root, patterns)
    known = {
        "temperature": None if seen.temperature_c is None else f"{seen.temperature_c:.0f} C",
        "throttling": _yes(seen.throttled, "throttled", "not throttled"),
        "voltage": _yes(seen.under_voltage, "too low", "in order"),
        "memory": None
        if seen.memory_bytes is None
        else f"{seen.memory_bytes // _MB:,} MB available",
        "pressure": None if seen.cpu is None else f"{seen.cpu.some:g}% wait for the processor",
        "power": _yes(seen.on_battery, "from a battery", "from the mains"),
        "network": None
        if seen.interface is None
        else seen.interface + (" (metered)" if seen.metered else ""),
    }
    there = [f"{name} {value}" for name, value in known.items() if value is not None]
    absent = [name for name, value in known.items() if value is None]
    says = ", ".join(there) or "none"
    parts = [Finding(check, "ok", f"{says}; unknown: {', '.join(absent)}" if absent else says)]
    cool = "a heat sink or a fan, and air around it"
    if seen.under_voltage:
        fix = "use the power supply made for this Pi, and a short cable"
        parts.append(Finding(check, "problem", "the voltage is too low", fix))
    elif seen.under_voltage_since_start:
        fix = "use the power supply made for this Pi, and a short cable"
        parts.append(Finding(check, "note", "the voltage was too low since the start", fix))
    if seen.throttled:
        parts.append(Finding(check, "note", "the processor is held back", cool))
    if conditions is not None:
        parts += _conditions(check, machine, conditions, seen)
    elif seen.temperature_c is not None and seen.temperature_c >= TOO_HOT_C:
        parts.append(Finding(check, "note", "too hot to train", cool))
    return combined(check, parts)


def _conditions(
    check: str, machine: Machine, conditions: "HostConfig", seen: "Readings"
) -> Iterator[Finding]:
    """What of the owner's conditions keeps this device from training, now or ever. Neither pressure, for
    this very command presses, nor what was said of throttling already."""
    from covey_device.host.eligibility import Moment, Standing, judge

    local = time.localtime(machine.clock())
    moment = Moment(0.0, minute=60 * local.tm_hour + local.tm_min)
    verdict, _ = judge(conditions, seen, moment, Standing())
    for reason in verdict.reasons:
        if "host.require" in reason.line:
            fix = "take it out of host.require in policy.toml: with it this device joins no round"
            yield Finding(check, "problem", reason.line, fix)
        elif reason.sensor not in ("pressure", "throttling"):
            fix = "nothing, if that is meant; otherwise change [host] in policy.toml (docs/host.md)"
            yield Finding(check, "note", f"would not train now: {reason.line}", fix)


def _yes(fact: bool | None, yes: str, no: str) -> str | None:
    return None if fact is None else yes if fact else no
