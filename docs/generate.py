"""Fills the generated parts of docs/protocol.md from the code: `make docs`. A test holds them equal.

Between `<!-- generated: NAME -->` and `<!-- end -->` stands what the function of that name returns.
"""

import re
import sys
import typing
from pathlib import Path

import msgspec

from covey_coordinator import round as coordinator
from covey_device import session as device
from covey_shared import enrolment, messages
from covey_shared.secagg.parameters import parameters_for

PROTOCOL = Path(__file__).parent / "protocol.md"

# Who sends what to whom; the code's docstrings say the rest.
ROUTES = {
    "RoundCall": ("coordinator", "all, retained"),
    "CheckIn": ("device", "coordinator"),
    "Manifest": ("coordinator", "all"),
    "Shares": ("device", "coordinator"),
    "Delivery": ("coordinator", "one member"),
    "RosterVote": ("member", "coordinator"),
    "Roster": ("coordinator", "all"),
    "MaskedUpdate": ("device", "coordinator"),
    "ViewProposal": ("coordinator", "all"),
    "ViewVote": ("member", "coordinator"),
    "View": ("coordinator", "all"),
    "Reveal": ("member", "coordinator"),
    "Result": ("coordinator", "all"),
    "RoundAbandoned": ("coordinator", "all"),
    "Decline": ("device", "coordinator"),
    "WantBlob": ("device", "coordinator"),
    "WantUpload": ("coordinator", "one device"),
    "Certificate": ("fleet CA", "inside CheckIn"),
    "PlanSignature": ("model owner", "inside RoundCall"),
    "WhoIsThere": ("device", "coordinator, over TLS"),
    "FleetTrust": ("coordinator", "device, over TLS"),
    "EnrolRequest": ("device", "coordinator, over TLS"),
    "RenewRequest": ("device", "coordinator, over mutual TLS"),
    "Enrolled": ("coordinator", "device, over TLS"),
    "EnrolRefused": ("coordinator", "device, over TLS"),
    "IdentityRequest": ("coordinator", "fleet CA, in a file"),
    "RenewalWanted": ("coordinator", "one device"),
}


def message_table() -> str:
    """One row a message: type byte, label, route, number in the paper's order, fields."""
    lines = ["| type | message | signed as | from | to | fields |", "|---|---|---|---|---|---|"]
    for kind in (*messages.ALL, *enrolment.ALL):
        sender, receiver = ROUTES[kind.__name__]
        fields = ", ".join(f"`{f.name}`" for f in msgspec.structs.fields(kind))
        lines.append(
            f"| {kind.CODE} | **{kind.__name__}** | `{kind.LABEL}` | {sender} | {receiver} | {fields} |"
        )
    return "\n".join(lines)


def head_table() -> str:
    """The head's fields with their types' bounds."""
    hints = typing.get_type_hints(messages.Head, include_extras=True)
    lines = ["| field | bounds |", "|---|---|"]
    for field in msgspec.structs.fields(messages.Head):
        lines.append(f"| `{field.name}` | {_bounds(hints[field.name])} |")
    return "\n".join(lines)


def _bounds(hint: object) -> str:
    if hint is messages.Work:
        return "batches, batch size, seconds, hyper-parameters"
    metas = [m for m in getattr(hint, "__metadata__", ()) if isinstance(m, msgspec.Meta)]
    words = []
    for meta in metas:
        if meta.min_length is not None and meta.min_length == meta.max_length:
            words.append(f"{meta.min_length} bytes")
        elif meta.max_length is not None:
            words.append(f"at most {meta.max_length} long")
        if meta.ge is not None and meta.le is not None:
            words.append(f"{meta.ge:,} to {meta.le:,}")
        if meta.gt is not None and meta.le is not None:
            words.append(f"above {meta.gt:g}, at most {meta.le:,}")
        if meta.pattern is not None:
            words.append("a name: 1 to 32 of a-z, 0-9 and inner hyphens")
    return ", ".join(words) or "finite"


def coordinator_diagram() -> str:
    """The round's phases, as `covey_coordinator.round.TRANSITIONS` has them."""
    lines = ["```mermaid", "stateDiagram-v2", "    [*] --> gather"]
    for phase, events in coordinator.TRANSITIONS.items():
        for event, following in events.items():
            lines.append(f"    {phase.value} --> {following.value}: {event.value}")
    return "\n".join([*lines, "    done --> [*]", "    abandoned --> [*]", "```"])


def device_diagram() -> str:
    """A device's phases, as `covey_device.session.TRANSITIONS` has them; the two events that lead out
    of every phase are told in the text instead of drawn."""
    lines = ["```mermaid", "stateDiagram-v2", "    [*] --> idle"]
    for phase, events in device.TRANSITIONS.items():
        for event, following in events.items():
            leaves = event is device.Event.END
            recalled = event is device.Event.CALL and phase is not device.Phase.IDLE
            if leaves or recalled:
                continue
            here, there = (p.value.replace(" ", "_") for p in (phase, following))
            lines.append(f"    {here} --> {there}: {event.value}")
    return "\n".join([*lines, "```"])


def thresholds() -> str:
    """The built-in parameters for some cohort sizes."""
    lines = ["| devices n | neighbours k | committee L | threshold t | may vanish |",
             "|---|---|---|---|---|"]  # fmt: skip
    for n in (3, 5, 10, 20, 50, 100, 128):
        p = parameters_for(n)
        lines.append(f"| {n} | {p.degree} | {p.committee} | {p.threshold} | {n - p.threshold} |")
    return "\n".join(lines)


GENERATED = {
    "messages": message_table,
    "head": head_table,
    "coordinator": coordinator_diagram,
    "device": device_diagram,
    "thresholds": thresholds,
}


def filled(text: str) -> str:
    """The document with its generated parts as the code has them now."""

    def part(match: re.Match[str]) -> str:
        return f"<!-- generated: {match[1]} -->\n{GENERATED[match[1]]()}\n<!-- end -->"

    return re.sub(r"<!-- generated: (\w+) -->\n.*?<!-- end -->", part, text, flags=re.S)


if __name__ == "__main__":
    before = PROTOCOL.read_text(encoding="utf-8")
    after = filled(before)
    PROTOCOL.write_text(after, encoding="utf-8")
    sys.stdout.write("docs/protocol.md " + ("is unchanged\n" if after == before else "written\n"))
