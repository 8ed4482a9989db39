"""All checks, in their order: the machine, what is installed, what the device is made of, the network.

What needs a package is imported only after all of them could be, in another process: this one has to live
to say what is wrong with them. So nothing imported here needs any but click.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from covey_device.doctor import disk, machine, unit
from covey_device.doctor.findings import Finding, guarded, worst
from covey_device.doctor.machine import Machine
from covey_device.doctor.packages import packages
from covey_device.doctor.round import Round

if TYPE_CHECKING:
    from covey_device.doctor.device import Device
    from covey_device.doctor.estimate import Estimate

STATE = Path("/var/lib/covey-device")
"""Where the service's unit keeps its state; looked at before there is a device.toml."""

MACHINE_CHECKS = (
    "architecture",
    "python",
    "packages",
    "processor",
    "memory",
    "memory-controller",
    "swap",
    "clock",
    "disk",
    "sensors",
    "known-answers",
    "training",
)
DEVICE_CHECKS = (
    "configuration",
    "policy",
    "keys",
    "certificates",
    "state",
    "data",
    "broker",
    "enrolment-port",
    "service",
    "limits",
    "plan",
)
CHECKS = MACHINE_CHECKS + DEVICE_CHECKS


@dataclass(slots=True)
class Checkup:
    """One look at everything. findings: in their order. estimate: of a round, if a plan is known."""

    findings: list[Finding] = field(default_factory=list)
    estimate: "Estimate | None" = None

    @property
    def ill(self) -> bool:
        """Whether there is a problem."""
        return worst(finding.verdict for finding in self.findings) == "problem"

    def summary(self) -> str:
        """How many of each verdict."""
        counts = {"ok": 0, "note": 0, "problem": 0, "unknown": 0}
        for finding in self.findings:
            counts[finding.verdict] += 1
        notes = "1 note" if counts["note"] == 1 else f"{counts['note']} notes"
        problems = "1 problem" if counts["problem"] == 1 else f"{counts['problem']} problems"
        return f"{counts['ok']} ok, {notes}, {problems}, {counts['unknown']} unknown"

    def facts(self) -> dict[str, Any]:
        """For programs."""
        return {
            "worst": worst(finding.verdict for finding in self.findings),
            "checks": [
                {"check": f.check, "verdict": f.verdict, "says": f.says, "fix": f.fix}
                for f in self.findings
            ],
            "estimate": None if self.estimate is None else self.estimate.facts(),
        }


def check_up(
    config_path: Path,
    here: Machine,
    asked: Round,
    plan_path: Path | None = None,
    *,
    tell: Callable[[Finding], None] = lambda finding: None,
    show: unit.Show = unit.show,
    state: Path = STATE,
) -> Checkup:
    """Look at everything. plan_path: of a plan; without one, that of the device's cache. tell: of each
    finding as it is made, as some take seconds. show: asks systemd. state: where the service will keep its
    own, if there is no device.toml to say so."""
    done = Checkup()
    for finding in _findings(config_path, here, asked, plan_path, done, show, state):
        done.findings.append(finding)
        tell(finding)
    return done


def _findings(
    config_path: Path,
    here: Machine,
    asked: Round,
    plan_path: Path | None,
    done: Checkup,
    show: unit.Show,
    state: Path,
) -> Iterator[Finding]:
    yield from guarded("architecture", lambda: machine.architecture(here))
    yield from guarded("python", lambda: machine.python(here))
    found = guarded("packages", packages)
    yield from found
    if any(finding.verdict != "ok" for finding in found):
        yield from _of_machine(here, None, state)
        for check in ("known-answers", "training", "configuration"):
            yield Finding(check, "unknown", "not tried, as packages are missing or broken")
        return
    from covey_device.doctor.device import Device

    device = Device(config_path, here, asked, plan_path)
    yield from _of_machine(here, device, state)
    yield from device.findings(show)
    done.estimate = device.estimate


def _of_machine(here: Machine, device: "Device | None", state: Path) -> Iterator[Finding]:
    max_memory_mb, signed_unix, serves = None, 0.0, False
    if device is not None and device.enrolled is not None:
        state, max_memory_mb = device.enrolled.state, device.max_memory_mb
        signed_unix, serves = device.signed_unix, device.enrolled.service.uid == here.uid
    yield from guarded("processor", lambda: machine.processor(here))
    yield from guarded("memory", lambda: machine.memory(here, max_memory_mb))
    yield from guarded("memory-controller", lambda: machine.memory_controller(here))
    yield from guarded("swap", lambda: machine.swap(here))
    yield from guarded("clock", lambda: machine.clock(here, signed_unix))
    yield from guarded("disk", lambda: disk.disk(state, serves=serves))
    conditions = None if device is None else device.conditions
    yield from guarded("sensors", lambda: unit.sensors(here, conditions))
