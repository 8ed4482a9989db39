"""What an owner is shown of a device and its decisions: facts -> lines, one screen."""

import time
from collections.abc import Sequence
from typing import Any

from covey_device.host.decisions import Decision
from covey_shared.messages import for_display

_STATES = {
    "go": "yes: nothing speaks against it",
    "pause": "no, for now",
    "stop": "no",
}


def status_lines(facts: dict[str, Any], *, now_unix: float) -> list[str]:
    """Of `DeviceService.facts`, or of what is known without a service."""
    lines = [f"device {facts['device']} of fleet {facts['fleet']}"]
    if facts.get("running"):
        since = ago(now_unix - facts["since_unix"])
        lines.append(f"service: runs for {since}, {_connected(facts)}")
        lines.append(f"now: {facts['line']}")
        lines.append(
            f"since its start: {_count(facts['called'], 'round')} called, update in the sum of "
            f"{facts['contributed']:,}, {_count(facts['batches'], 'batch', 'batches')} trained"
        )
        last = facts.get("last")
        if last is not None:
            share = " (its update is in the sum)" if last["contributed"] else ""
            when = ago(now_unix - last["at_unix"])
            lines.append(f"last round: {last['round']}, {when} ago: {last['outcome']}{share}")
    else:
        lines.append("service: does not run; what follows is judged from the machine as it is now")
        lines.append(f"last round joined: {facts['last_round'] or 'none'}")
    host = facts.get("host")
    if host is not None:
        lines += host_lines(host)
    return [for_display(line) for line in lines]


def host_lines(host: dict[str, Any]) -> list[str]:
    """The verdict and what it rests on."""
    lines = [f"would train: {_STATES[host['state']]}"]
    lines += [f"  {why}" for why in host["why"]]
    lines.append(f"temperature: {_known(host['temperature_c'], '{:.1f} C')}")
    since = ", too low at some time since the start" if host["under_voltage_since_start"] else ""
    lines.append(
        f"throttled: {_yes(host['throttled'])}; voltage too low: {_yes(host['under_voltage'])}{since}"
    )
    lines.append(f"memory available: {_known(host['memory_available_mb'], '{:,} MB')}")
    lines.append(
        "waiting in the last 10 s: "
        + ", ".join(
            f"{shown} {_known(host[f'{name}_pressure'], '{:.0f}%')}"
            for name, shown in (("cpu", "processor"), ("memory", "memory"), ("io", "disk"))
        )
    )
    lines.append(f"on battery: {_yes(host['on_battery'])}")
    network = "unknown"
    if host["interface"] is not None:
        network = (
            f"{host['interface']}, {'metered' if host['metered'] else 'not known to be metered'}"
        )
    lines.append(f"network: {network}")
    lines.append(f"quiet hours: {_quiet(host)}")
    lines += [f"asked to wait: {line}" for line in host["waits"]]
    return lines


def decision_lines(decisions: Sequence[Decision]) -> list[str]:
    """One each, the newest last. Times are local."""
    lines = []
    for decision in decisions:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(decision.at_unix))
        about = "" if decision.round is None else f"round {decision.round}: "
        times = f" ({decision.times:,} times in a row)" if decision.times > 1 else ""
        lines.append(for_display(f"{when} {about}{decision.what}: {decision.why}{times}"))
    return lines


def ago(seconds: float) -> str:
    """A time span, to one unit: "3 minutes"."""
    for size, name in ((86_400, "day"), (3600, "hour"), (60, "minute")):
        if seconds >= size:
            return _count(int(seconds // size), name)
    return _count(max(0, int(seconds)), "second")


def _connected(facts: dict[str, Any]) -> str:
    return "connected to the broker" if facts["connected"] else "not connected to the broker"


def _count(count: int, one: str, many: str = "") -> str:
    return f"1 {one}" if count == 1 else f"{count:,} {many or one + 's'}"


def _known(value: Any, form: str) -> str:
    return "unknown" if value is None else form.format(value)


def _yes(value: bool | None) -> str:
    return "unknown" if value is None else "yes" if value else "no"


def _quiet(host: dict[str, Any]) -> str:
    if not host["quiet_hours"]:
        return "none"
    spans, minutes = ", ".join(host["quiet_hours"]), host["quiet_in_minutes"]
    if minutes is None:
        return f"{spans}; the clock is not set"
    if minutes == 0:
        return f"{spans}: now"
    return f"{spans}; the next in {minutes // 60} h {minutes % 60:02} min"
