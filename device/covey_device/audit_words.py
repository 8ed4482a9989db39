"""The audit log in plain words: what this device joined, refused and sent, for those who live with it."""

import datetime
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from covey_device.audit import ROUND_KINDS, lines_of
from covey_device.config import PolicyConfig
from covey_shared.messages import for_display


@dataclass
class Story:
    """A round, or one entry about something else. lines: as they stand in the log."""

    at: int
    round_id: int | None
    entries: list[dict[str, Any]] = field(default_factory=list)
    lines: list[bytes] = field(default_factory=list)

    def fact(self, name: str, default: Any = None) -> Any:
        """The last word on something."""
        for entry in reversed(self.entries):
            if name in entry:
                return entry[name]
        return default

    def of(self, kind: str) -> dict[str, Any] | None:
        """The last entry of a kind."""
        entry: dict[str, Any]
        for entry in reversed(self.entries):
            if entry.get("kind") == kind:
                return entry
        return None


def stories(directory: Path, *, since_unix: float = 0) -> Iterator[Story]:
    """Rounds and other entries in the order of their first lines, each when all of it is known. Lines
    that cannot be read, which `verify` tells of, are left out. Raises StorageError."""
    waiting: list[Story] = []  # a round, and what else happened before the next one
    open_round: Story | None = None
    for _, raw in lines_of(directory):
        try:
            entry = msgspec.json.decode(raw, type=dict[str, Any])
            at = _unix(entry["at"])
            kind, round_id = str(entry["kind"]), entry.get("round")
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, KeyError, ValueError):
            continue
        about_round = kind in ROUND_KINDS and isinstance(round_id, int)
        if about_round and open_round is not None and open_round.round_id == round_id:
            story = open_round
        else:
            story = Story(at, round_id if about_round else None)
            if about_round:
                yield from waiting
                waiting, open_round = [], story
            if at >= since_unix:
                waiting.append(story)
        story.entries.append(entry)
        story.lines.append(raw.rstrip(b"\n"))
    yield from waiting


def _unix(text: str) -> int:
    moment = datetime.datetime.strptime(text, "%Y-%m-%dT%H:%M:%SZ")
    return int(moment.replace(tzinfo=datetime.UTC).timestamp())


def latest(found: Iterator[Story], rounds: int | None) -> Iterator[Story]:
    """The last so many rounds, and what else happened since the first of them. None: everything."""
    if rounds is None:
        yield from found
        return
    kept: deque[Story] = deque()
    count = 0
    for story in found:
        kept.append(story)
        count += story.round_id is not None
        while count > rounds:
            count -= kept.popleft().round_id is not None
    while count == rounds and kept[0].round_id is None:
        kept.popleft()
    yield from kept


# -- in words --------------------------------------------------------------------------------------


def told(story: Story, *, last: bool = False) -> str:
    """One paragraph. last: nothing came after it, so that a round may still be going on."""
    when = time.strftime("%Y-%m-%d %H:%M", time.localtime(story.at))
    if story.round_id is None:
        return f"{when} {_other(story.entries[0])}"
    joined = story.of("joined")
    what = _joined(story, joined, last) if joined is not None else _refused(story)
    return f"{when} round {story.round_id}: {what}"


def _joined(story: Story, joined: dict[str, Any], last: bool) -> str:
    at_least = _n(story.fact("at_least"))
    cohort = story.fact("cohort")
    among = f"one of {_n(cohort)} devices" if cohort is not None else "no cohort came of it"
    text = f"joined, {among} (at least {at_least} in a sum). {_left(story)}; {_end(story, last)}."
    text += f" Plan {_plan(joined)}, model {_short(joined.get('model'))}"
    return f"{text}{_detail(story)}."


def _refused(story: Story) -> str:
    entry = story.of("refused") or story.entries[-1]
    reason = for_display(str(entry.get("reason", entry.get("outcome", "no reason is known"))))
    text = f"refused: {reason}. {_left(story)}"
    if "plan" in entry:
        text += f". Plan {_plan(entry)}, model {_short(entry.get('model'))}"
    if more := entry.get("more_refused"):
        text += f". Before it {_n(more)} more were refused that are not listed here"
    return f"{text}{_detail(story)}."


def _left(story: Story) -> str:
    sent = [entry for entry in story.entries if "sha256" in entry]
    size = sum(_int(entry.get("bytes")) + _int(entry.get("update_bytes")) for entry in sent)
    size += _int(story.fact("again_bytes")) + _int(story.fact("request_bytes"))
    count = f"{len(sent)} message{'' if len(sent) == 1 else 's'}"
    text = f"Left this device: {count}, {_size(size)}"
    update = next((entry for entry in sent if "update_sha256" in entry), None)
    if update is not None:
        text += f", of which {_size(_int(update.get('update_bytes')))} a masked update"
        text += f" (SHA-256 {_short(update.get('update_sha256'))})"
    elif story.of("joined") is not None:
        text += ", no update"
    return text


def _end(story: Story, last: bool) -> str:
    ended, refused = story.of("ended"), story.of("refused")
    if ended is None:
        if refused is not None:
            return f"then left: {for_display(str(refused.get('reason')))}"
        return "not over yet" if last else "its end is not in the log: this device stopped"
    outcome = for_display(str(ended.get("outcome")))
    if outcome != "completed":
        return outcome
    if ended.get("in_sum"):
        return "the sum is complete, and this device's update is in it"
    return "the sum is complete, without an update of this device"


def _detail(story: Story) -> str:
    detail = story.fact("detail")
    return f"; what happened here: {for_display(str(detail))}" if detail else ""


def _plan(entry: dict[str, Any]) -> str:
    name = for_display(str(entry.get("plan_name") or ""))
    text = f"{name} {_short(entry.get('plan'))}".strip()
    signers = entry.get("signed_by")
    if isinstance(signers, list) and signers:
        text += f", signed by {' and '.join(_short(signer) for signer in signers)},"
    return text


def _other(entry: dict[str, Any]) -> str:
    kind = for_display(str(entry["kind"]))
    if kind == "policy":
        try:
            config = msgspec.convert(entry.get("policy"), PolicyConfig)
        except msgspec.ValidationError:
            return "policy: one that this covey does not know"
        return f"policy: this device {'; '.join(config.in_words())}."
    if kind == "repaired":
        return (
            f"log: a line that was cut off was dropped, {_size(_int(entry.get('dropped_bytes')))}."
        )
    facts = [
        f"{for_display(name)} {for_display(str(value))}"
        for name, value in entry.items()
        if name not in ("n", "at", "kind", "before")
    ]
    return f"{kind}: {', '.join(facts)}." if facts else f"{kind}."


def _short(value: Any) -> str:
    return for_display(str(value))[:12]


def _int(value: Any) -> int:
    return value if isinstance(value, int) else 0


def _n(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else for_display(str(value))


def _size(size: int) -> str:
    for unit, factor in (("MB", 1_000_000), ("kB", 1000)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size} bytes"
