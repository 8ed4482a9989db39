"""When devices came and went, as far as the broker says. Without I/O."""

from collections.abc import Mapping, Set

from covey_coordinator.store import Sighting


class Sightings:
    """Since when each device has been online, or has not. kept: as the store has it of a process before;
    who is still there when this one starts has been so since then, as far as anybody can tell."""

    def __init__(self, kept: Mapping[str, Sighting]) -> None:
        self._known = dict(kept)
        self._present: frozenset[str] = frozenset()
        self._unsaved: dict[str, Sighting] = {}

    def look(self, present: Set[str], gone: Set[str], now_unix: float) -> None:
        """Who is there now, and who is known not to be: of others nothing has been heard."""
        for device in present - self._present:
            self._note(device, True, now_unix)
        for device in (gone | self._present) - present:
            self._note(device, False, now_unix)
        self._present = frozenset(present)

    def _note(self, device: str, online: bool, now_unix: float) -> None:
        before = self._known.get(device)
        if before is None or before.online is not online:
            self._known[device] = self._unsaved[device] = Sighting(online, now_unix)

    def take(self) -> dict[str, Sighting]:
        """What has changed since this was asked last."""
        unsaved, self._unsaved = self._unsaved, {}
        return unsaved

    def put_back(self, unsaved: Mapping[str, Sighting]) -> None:
        """It could not be saved: what has not changed again is to be taken again."""
        self._unsaved = dict(unsaved) | self._unsaved
