"""Why a device does or does not take part, from what a fleet's directory has of it. Changes nothing."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from covey_coordinator.config import load_fleet
from covey_coordinator.devices import DeviceRecord
from covey_coordinator.fleet import DeviceEntry, FleetDirectory
from covey_coordinator.moments import moment
from covey_coordinator.phases import Phase
from covey_coordinator.status import Status, read_status
from covey_coordinator.store import FILE, DeviceRound, RunDirectory, RunRecord, Sighting, Store
from covey_coordinator.turnout import Turnout
from covey_shared.errors import ConfigError
from covey_shared.messages import for_display

SOON_S = 3 * 86400
"""A certificate that ends within this should have been renewed long ago."""

SUMMARY_ROUNDS = 10


@dataclass(slots=True)
class Explanation:
    """All that is to be said of a device. status: "invited" if it has yet to join. online: None if
    nobody knows. certificate_ends_unix: 0 if it has none. lines: (what, how it is with that)."""

    device: str
    status: str
    lines: list[tuple[str, str]] = field(default_factory=list)
    online: bool | None = None
    since_unix: float | None = None
    certificate_ends_unix: int = 0
    rounds: list[DeviceRound] = field(default_factory=list)
    advice: list[str] = field(default_factory=list)


# -- rounds ----------------------------------------------------------------------------------------


# Of what members owe the others a quorum is enough, and who is slower than that is not heard.
_DUTY = {
    Phase.UNMASK.value: ", and helped to unmask it",
    Phase.VIEW.value: ", and confirmed it; others were enough to unmask it",
    Phase.COLLECT.value: "; others were enough to confirm and unmask it",
}

_SILENT = {
    Phase.GATHER.value: "online, and did not answer the call",
    Phase.SHARE.value: "silent since share: the boxes with its shares did not come",
    Phase.ROSTER.value: "silent since roster: neither its vote nor its update came",
    Phase.COLLECT.value: "silent since collect: its update did not come, or not whole",
    Phase.VIEW.value: "silent since view, after its update: its vote did not come",
    Phase.UNMASK.value: "silent since unmask, after its update: the shares that it held did not come",
}


def told(found: DeviceRound, device: str) -> str:
    """What became of a device in a round."""
    fate, turnout = found.fate, found.turnout
    if fate is None:
        if turnout is None:
            return "nothing is on record of its devices"
        if turnout.chance < 1.0:
            return (
                f"not heard of: who was online answered with a chance of {_share(turnout.chance)}"
            )
        return "not heard of: it was not online when devices were called"
    words, given_up = for_display(fate.words), for_display(found.reason)
    match fate.what:
        case "summed" if found.outcome != "completed":
            return f"in the sum, which could not be used: {given_up}"
        case "summed":
            left = f"; then it left: {words}" if words else ""
            return f"in the sum{_DUTY.get(fate.phase, '')}{left}"
        case "declined":
            early = fate.phase == Phase.GATHER.value
            return f"{'declined' if early else f'left in {fate.phase}'}: {words}"
        case "refused":
            why = words.removeprefix(f"{device} may not take part: ")
            return f"checked in, and was left out: {why}"
        case "late":
            return "checked in too late: the cohort had been made"
        case "undrawn":
            return f"checked in, and was not drawn: {words}"
        case "silent":
            return _SILENT.get(fate.phase, "silent") + (f"; {words}" if words else "")
        case "blamed":
            return f"to blame for the end of the round: {words}"
        case "spent":
            return f"the round was given up in {fate.phase}: {given_up}"


def _share(chance: float) -> str:
    return f"{100 * chance:.2g}%"


def round_lines(rounds: Sequence[DeviceRound], device: str, limit: int) -> list[tuple[str, str]]:
    """(which, when and what) for each round, newest first; rounds that the device was not heard of in,
    one after the other, are one line."""
    lines: list[tuple[str, str]] = []

    def alike(found: DeviceRound) -> tuple[Any, ...]:
        return (found.round if found.fate is not None else None, found.run, told(found, device))

    for _, group in groupby(rounds, alike):
        found = list(group)
        newest, oldest = found[0], found[-1]
        which = f"round {newest.index} of {newest.run}"
        if len(found) > 1:
            which = f"rounds {oldest.index} to {newest.index} of {newest.run}"
        when = "" if newest.turnout is None else f"{moment(newest.turnout.ended_unix)}: "
        back = "  (rolled back)" if newest.rolled_back else ""
        lines.append((which, f"{when}{told(newest, device)}{back}"))
    return lines[:limit]


def summary(rounds: Sequence[DeviceRound]) -> str:
    """What a device did in its last rounds, in one line; empty if nothing is on record."""
    last = [found for found in rounds if found.turnout is not None][:SUMMARY_ROUNDS]
    if not last:
        return ""
    words = {
        "summed": "in the sum", "declined": "declined", "refused": "left out", "late": "too late",
        "undrawn": "not drawn", "silent": "silent", "spent": "given up", "blamed": "to blame",
        None: "not heard of",
    }  # fmt: skip
    counts = Counter(words[None if f.fate is None else f.fate.what] for f in last)
    return (
        f"{', '.join(f'{n} {what}' for what, n in counts.most_common())} (of the last {len(last)})"
    )


def declines(turnout: Turnout) -> str:
    """Who declined, counted by their words; empty if nobody did."""
    declined = turnout.declined
    if not declined:
        return ""
    counts = [f"{n} {for_display(words) or 'without a word'}" for words, n in declined.items()]
    return f"{sum(declined.values())}: {', '.join(counts)}"


# -- the device ------------------------------------------------------------------------------------


def explain(fleet_dir: Path, name: str, limit: int, now_unix: float) -> Explanation:
    """Look at everything. limit: rounds. Raises ConfigError for a device that nobody knows, StorageError."""
    config, fleet, up = load_fleet(fleet_dir), FleetDirectory(fleet_dir), read_status(fleet_dir)
    entry = next((entry for entry in fleet.devices() if entry.name == name), None)
    record, again = fleet.book.record(name), f"covey device token --name {name}"
    tokens = [token for token in fleet.tokens.open(now_unix) if token.device == name]
    if entry is None:
        if not tokens:
            how = again if config.networked else f"covey device add {name}"
            raise ConfigError(
                f"there is no device {name!r} in this fleet, and no token for it; {how} lets it in"
            )
        found = Explanation(name, "invited")
        until = moment(tokens[-1].expires_unix)
        found.lines = [
            ("standing", f"invited, and has not joined; its token may be used until {until}")
        ]
        found.advice = ["on the device: covey-device join TOKEN, with the token that was printed; "
                        f"{again} makes another"]  # fmt: skip
        return found
    found = Explanation(name, entry.status(now_unix))
    found.certificate_ends_unix = entry.not_after_unix
    sighting, runs, waiting = None, list[RunRecord](), ""
    if (fleet_dir / FILE).exists():
        with Store.open(fleet_dir / FILE) as store:
            found.rounds = store.device_rounds(name, limit)
            sighting, runs = store.sightings().get(name), store.records()
            waiting = _waiting(fleet_dir, store, runs)
    _standing(found, entry, record, bool(tokens))
    _presence(found, up, sighting)
    played = any(run.state.status in ("queued", "running") for run in runs)
    if not played:
        found.lines.append(("runs", "none is queued or played: no device is called"))
    elif waiting:
        found.lines.append(("runs", waiting))
    if up is not None and up.faults.get(name):
        found.lines.append(("faults", f"{up.faults[name]} in rounds since `covey up` started"))
    found.advice = _advice(found, entry, up, now_unix, again if config.networked else "")
    return found


def _waiting(fleet_dir: Path, store: Store, runs: Sequence[RunRecord]) -> str:
    for run in runs:
        progress = RunDirectory(fleet_dir / "runs" / run.name, store).progress()
        if run.state.status == "running" and progress is not None and not progress.round:
            return f"{run.name} waits for devices: {progress.answered} online, {progress.awaited} needed"
    return ""


def _standing(
    found: Explanation, entry: DeviceEntry, record: DeviceRecord | None, invited: bool
) -> None:
    joined = (
        "added by covey device add" if record is None else f"joined {moment(record.enrolled_unix)}"
    )
    match found.status:
        case "revoked":
            text = f"revoked {moment(entry.revoked_unix)}: no round lets it in"
        case "pending":
            since = f" since {moment(record.requested_unix)}" if record is not None else ""
            text = f"{joined}; waits for the fleet CA to sign its certificate{since}"
        case "ended":
            text = f"{joined}; its certificate ended {moment(entry.not_after_unix)}"
        case _:
            text = f"{joined}; its certificate ends {moment(entry.not_after_unix)}"
    found.lines.append(("standing", text + ("; a token for it is open" if invited else "")))


def _presence(found: Explanation, up: Status | None, sighting: Sighting | None) -> None:
    if up is None:
        last = ""
        if sighting is not None:
            state = "online" if sighting.online else "offline"
            last = f"; it was {state} then, since {moment(sighting.since_unix)}"
            found.since_unix = sighting.since_unix
        found.lines.append(("online", f"unknown: `covey up` does not run{last}"))
        return
    found.online = found.device in up.present
    since = ""
    if sighting is not None and sighting.online is found.online:
        found.since_unix = sighting.since_unix
        since = f", since {moment(sighting.since_unix)}"
    elif sighting is None and not found.online:
        since = ", and was never seen"
    found.lines.append(("online", ("yes" if found.online else "no") + since))


def _advice(
    found: Explanation, entry: DeviceEntry, up: Status | None, now_unix: float, token: str
) -> list[str]:
    """What would help. token: the command that lets it join anew, in a networked fleet."""
    join_anew = f"{token} --again, and covey-device join on the device" if token else ""
    match found.status:
        case "revoked":
            return [f"to let it in with new keys: {join_anew}"] if token else []
        case "pending":
            return ["covey ca requests, and covey ca sign on the machine with the fleet CA's key"]
        case "ended":
            mend = join_anew or "covey device add a device of another name"
            return [f"it was away for too long to renew its certificate: {mend}"]
    if up is None:
        return ["start `covey up`: without it no device takes part"]
    advice = []
    if not up.connected:
        advice.append("the coordinator has no connection to the broker: see the log of `covey up`")
    elif not found.online:
        advice.append("on the device: covey-device check says what keeps it from the broker")
    if token and entry.not_after_unix - now_unix < SOON_S:
        advice.append(f"its certificate ends soon: covey device renew {found.device}")
    last = next((f for f in found.rounds if f.fate is not None), None)
    if last is None or last.fate is None or not found.online:
        return advice
    match last.fate.what:
        case "declined":
            advice.append("on the device: covey-device explain, or covey-device log, says more")
        case "silent" if last.fate.phase == Phase.COLLECT.value:
            advice.append(
                "if it is merely slow: more `deadlines.collect_s`, or less `work`, in run.toml"
            )
        case "silent":
            advice.append("on the device: covey-device log says how its rounds ended")
        case "undrawn":
            advice.append("nothing is wrong; a higher `cohort.goal` in run.toml takes more in")
        case "late":
            advice.append("if it is often late: more `deadlines.gather_s` in run.toml")
    return advice


def as_record(found: Explanation, limit: int) -> dict[str, Any]:
    """For programs: the last rounds, and those before that something is known of."""
    shown = [r for at, r in enumerate(found.rounds) if at < limit or r.fate is not None]
    return {
        "device": found.device,
        "status": found.status,
        "online": found.online,
        "since_unix": found.since_unix,
        "certificate_ends_unix": found.certificate_ends_unix or None,
        "rounds": [
            {
                "run": r.run,
                "index": r.index,
                "round": r.round,
                "outcome": r.outcome,
                "rolled_back": r.rolled_back,
                "ended_unix": None if r.turnout is None else r.turnout.ended_unix,
                "what": None if r.fate is None else r.fate.what,
                "phase": (r.fate.phase or None) if r.fate is not None else None,
                "words": for_display(r.fate.words) if r.fate is not None else "",
                "told": told(r, found.device),
            }
            for r in shown
        ],
        "advice": found.advice,
    }
