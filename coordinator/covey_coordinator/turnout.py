"""What became of each device in a round, from what its machine knows when it is over. Without I/O.

For the operator who asks why a device does not take part, and for nothing else: a round's course hangs on
none of it. What devices said before they checked in, nobody vouches for; of what was refused or came late, a
process that is killed in the middle of a round forgets some.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import msgspec

from covey_coordinator.phases import Phase
from covey_shared.messages import DeviceId

Became = Literal["summed", "declined", "refused", "late", "undrawn", "silent", "spent", "blamed"]
"""summed: its update is in the sum. declined: it left, in words of its own. refused: its check-in was.
late: it checked in when the cohort was made already. undrawn: it checked in, and more had than were wanted.
silent: it did not answer in a phase. spent: it did what it was asked, until the round was given up.
blamed: it was to blame for that."""

MAX_WORDS = 240
MAX_REASONS = 20
"""Different words of those who declined, that are counted one by one; the rest together."""

OTHERS = "in other words"


class Fate(msgspec.Struct, frozen=True):
    """What became of one device. phase: the last one that it did its part in if it is in the sum, else
    the one in which it left or fell silent. words: its own, or why."""

    what: Became
    phase: str = ""
    words: str = ""


class Turnout(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A round's devices, counted. chance: with which each that was online answered the call. declined:
    words -> how many left with them."""

    opened_unix: float
    ended_unix: float
    chance: float = 1.0
    checked_in: int = 0
    chosen: int = 0
    refused: int = 0
    late: int = 0
    declined: dict[str, int] = {}


@dataclass(frozen=True, slots=True)
class Course:
    """All that a round's machine knows of its devices at the end.

    last: the phase before the end. outside: it was given up for a reason that has nothing to do with its
    devices. present: who was online, called: when the gathering ended and if everybody was to answer.
    answered: who did what a phase waits for. begun: whose upload began. spared: not all updates were
    waited for. reason: why it was given up.
    """

    last: Phase
    completed: bool
    present: frozenset[DeviceId]
    called: frozenset[DeviceId]
    checked_in: frozenset[DeviceId]
    late: frozenset[DeviceId]
    declined: Mapping[DeviceId, str]
    refused: Mapping[DeviceId, str]
    cohort: tuple[DeviceId, ...]
    answered: Mapping[Phase, frozenset[DeviceId]]
    begun: frozenset[DeviceId] = frozenset()
    blamed: frozenset[DeviceId] = frozenset()
    outside: bool = False
    spared: bool = False
    reason: str = ""


def counted(course: Course, opened_unix: float, ended_unix: float, chance: float) -> Turnout:
    """A course in figures."""
    words = Counter(course.declined.values()).most_common()
    declined = dict(words[:MAX_REASONS])
    if rest := sum(count for _, count in words[MAX_REASONS:]):
        declined[OTHERS] = declined.get(OTHERS, 0) + rest
    return Turnout(
        opened_unix=opened_unix,
        ended_unix=ended_unix,
        chance=chance,
        checked_in=len(course.checked_in),
        chosen=len(course.cohort),
        refused=len(course.refused),
        late=len(course.late),
        declined=declined,
    )


def fates(course: Course) -> dict[DeviceId, Fate]:
    """Device -> what became of it. Of others nothing was heard, and nothing was to be."""
    found = {device: Fate("refused", words=words) for device, words in course.refused.items()}
    if not course.outside:
        found |= {
            device: Fate("silent", Phase.GATHER.value, _offline(course, device))
            for device in course.called - found.keys()
        }
    found |= dict.fromkeys(course.late, Fate("late"))
    drawn = bool(course.cohort)
    why = f"{len(course.checked_in)} checked in, {len(course.cohort)} were drawn"
    for device in course.checked_in:
        found[device] = Fate("undrawn", words=why) if drawn else Fate("spent", Phase.GATHER.value)
    for device, words in course.declined.items():
        found[device] = Fate("declined", Phase.GATHER.value, words)
    for device in course.cohort:
        found[device] = _of_member(course, device)
    return {
        device: Fate(fate.what, fate.phase, fate.words[:MAX_WORDS])
        for device, fate in found.items()
    }


_PARTS = (Phase.SHARE, Phase.ROSTER, Phase.COLLECT, Phase.VIEW, Phase.UNMASK)


def _of_member(course: Course, device: DeviceId) -> Fate:
    """Of one that was drawn."""
    did = [phase for phase in _PARTS if device in course.answered.get(phase, ())]
    words = course.declined.get(device)
    if course.completed and Phase.COLLECT in did:
        return Fate("summed", did[-1].value, words or "")
    missed = _missed(course, did)
    if words is not None:
        return Fate("declined", (missed or course.last).value, words)
    if device in course.blamed:
        return Fate("blamed", course.last.value, course.reason)
    if missed is None or (course.outside and missed is course.last):
        return Fate("spent", course.last.value)
    why = [_offline(course, device)]
    if missed is Phase.COLLECT:
        if device in course.begun:
            why.append("its upload had begun")
        if course.spared:
            why.append("the goal was met without it")
        if did[-1] in (Phase.VIEW, Phase.UNMASK):
            why.append("what a member owes the others it did")
    return Fate("silent", missed.value, "; ".join(filter(None, why)))


def _missed(course: Course, did: list[Phase]) -> Phase | None:
    """In which phase a member fell silent; None if it did not. Votes are enough when a quorum of them is
    there: one that is missing says something only of a member that was not heard of again."""
    if Phase.SHARE not in did:
        return Phase.SHARE
    reached = _PARTS[: _PARTS.index(course.last) + 1]
    if Phase.COLLECT in reached and Phase.COLLECT not in did:
        return Phase.COLLECT if len(did) > 1 else Phase.ROSTER
    return None if course.last in did else course.last


def _offline(course: Course, device: DeviceId) -> str:
    return "" if device in course.present else "it went offline"
