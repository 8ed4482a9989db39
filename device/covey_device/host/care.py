"""Care for the machine, put together: looks at it when a round wants something, decides, and remembers why.

Nothing runs while no round is on: a look is taken when a call comes, before the first batch, and then every
`POLL_S` by the threads that train anyway.
"""

import logging
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from covey_device.host.config import HostConfig
from covey_device.host.decisions import Decisions
from covey_device.host.eligibility import (
    Moment,
    Standing,
    State,
    Verdict,
    begin,
    judge,
    next_quiet,
)
from covey_device.host.port import directory_of
from covey_device.host.readings import Readings, read
from covey_device.host.waits import Waits, file_line

if TYPE_CHECKING:
    from covey_device.config import PolicyFile

log = logging.getLogger("covey.device")

POLL_S = 2.0
STEP_S = 0.5
"""A pause looks so often whether it is still wanted, and at the machine every `POLL_S`."""

FIRST_YEAR = 2026
"""A clock before this code was written is one that was never set."""

Look = Callable[[tuple[str, ...]], Readings]


def local_minute() -> int | None:
    """The minute of the local day; None from a clock that was never set."""
    now = time.localtime()
    return None if now.tm_year < FIRST_YEAR else now.tm_hour * 60 + now.tm_min


class Care:
    """One device's. For several threads.

    conditions: the owner's, as they are now. look: at the machine, given the owner's metered interfaces.
    veto_file: where it is if the owner names none. wait: sleeps; an argument for tests.
    """

    def __init__(
        self,
        conditions: Callable[[], HostConfig],
        decisions: Decisions,
        look: Look,
        *,
        veto_file: Path | None = None,
        base: Path = Path(),
        clock: Callable[[], float] = time.monotonic,
        minute: Callable[[], int | None] = local_minute,
        wait: Callable[[float], None] = time.sleep,
    ) -> None:
        """base: the folder that a relative `veto_file` of the owner's is in."""
        self._conditions, self.decisions = conditions, decisions
        self._look, self._base, self._veto_file = look, base, veto_file
        self.clock, self._minute, self.wait = clock, minute, wait
        self.waits = Waits()
        self._lock = threading.Lock()
        self._standing = Standing()
        self._readings: Readings | None = None
        self._looked_s = 0.0
        self.paused: str | None = None
        """Why training waits now, if it does."""
        self.on_change: Callable[[], None] = lambda: None
        """Told when training pauses, resumes or ends early; in the thread that trains."""

    def called(self, round_id: int) -> Verdict:
        """A round is called: whether to join it. What stopped an earlier one is over."""
        with self._lock:
            self._standing = begin(self._standing)
        self.paused = None
        verdict = self.judged(fresh=True)
        if verdict.state is not State.GO:
            self.decisions.add("declined", verdict.line, round_id)
        return verdict

    def gate(self, round_id: int) -> "HostGate":
        """What training asks between batches."""
        return HostGate(self, round_id)

    def judged(
        self,
        *,
        need_bytes: int | None = None,
        beginning: bool = True,
        fresh: bool = False,
        peek: bool = False,
        idle: bool = False,
    ) -> Verdict:
        """The verdict now. peek: without consequences for later ones. fresh: look again even if the last look
        is not `POLL_S` old. idle: whether a call that came now would be joined; goes with peek."""
        conditions, now = self._conditions(), self.clock()
        with self._lock:
            readings = self._readings
            if readings is None or fresh or now - self._looked_s >= POLL_S:
                readings = self._readings = self._look(conditions.metered_interfaces)
                self._looked_s = now
            vetoes = self._vetoes(conditions, now)
            moment = Moment(now, self._minute(), need_bytes, beginning, vetoes)
            standing = begin(self._standing) if idle else self._standing
            verdict, standing = judge(conditions, readings, moment, standing)
            if not peek:
                self._standing = standing
        return verdict

    def may_upload(self) -> Verdict:
        """After training: on a network that costs, the update stays here."""
        verdict = self.judged(beginning=False, fresh=True, peek=True)
        costs = tuple(reason for reason in verdict.reasons if reason.sensor == "network")
        return Verdict(State.STOP if costs else State.GO, costs, verdict.tell)

    def facts(self, *, training: bool) -> dict[str, Any]:
        """All there is to know now, as JSON can hold it. training: judge what goes on, not what might."""
        verdict = self.judged(beginning=not training, peek=True, idle=not training)
        conditions, minute = self._conditions(), self._minute()
        readings = self._readings or Readings()
        quiet = None if minute is None else next_quiet(conditions, minute)
        return {
            "state": verdict.state.name.lower(),
            "why": [reason.line for reason in verdict.reasons],
            "told": verdict.public if verdict.reasons else None,
            "temperature_c": readings.temperature_c,
            "throttled": readings.throttled,
            "under_voltage": readings.under_voltage,
            "under_voltage_since_start": readings.under_voltage_since_start,
            "memory_available_mb": (
                None if readings.memory_bytes is None else round(readings.memory_bytes / 1e6)
            ),
            **{
                f"{name}_pressure": None if pressure is None else pressure.some
                for name, pressure in (
                    ("cpu", readings.cpu), ("memory", readings.memory), ("io", readings.io)
                )
            },
            "on_battery": readings.on_battery,
            "interface": readings.interface,
            "metered": readings.metered,
            "waits": list(self.waits.lines(self.clock())),
            "quiet_hours": list(conditions.quiet_hours),
            "quiet_in_minutes": None if quiet is None else quiet[0],
        }  # fmt: skip

    @property
    def heeds_programs(self) -> bool:
        """Whether waits that local programs ask for count."""
        return self._conditions().programs

    def _vetoes(self, conditions: HostConfig, now_s: float) -> tuple[str, ...]:
        named = conditions.veto_file
        line = file_line(self._veto_file if named is None else self._base / named)
        lines = self.waits.lines(now_s) if conditions.programs else ()
        return lines if line is None else (line, *lines)


class HostGate:
    """One round's training as its host lets it: `trainer.Gate`. passes is asked by the thread that trains,
    and stopping by the one that watches it."""

    def __init__(self, care: Care, round_id: int) -> None:
        self._care, self._round = care, round_id
        self._begun = False
        self._passed_s: float | None = None
        self._lock = threading.Lock()
        self.ended: Verdict | None = None

    @property
    def line(self) -> str:
        """Why training ended, for the owner."""
        return "" if self.ended is None else self.ended.line

    @property
    def public(self) -> str:
        """The same for the coordinator."""
        return "" if self.ended is None else self.ended.public

    def passes(
        self, left_s: float, need_bytes: int | None = None, stop: Callable[[], bool] = lambda: False
    ) -> bool:
        """Whether the next batch may begin; waits while training is to pause, for at most left_s. False: it
        is to end. need_bytes: memory that training has yet to take; before the first batch."""
        care = self._care
        if self.ended is not None:
            return False
        now = care.clock()
        if self._passed_s is not None and now - self._passed_s < POLL_S and not care.waits.any():
            return True  # between batches of a millisecond there is nothing to see
        ends, paused = now + left_s, False
        while True:
            verdict = care.judged(need_bytes=need_bytes, beginning=not self._begun)
            if verdict.state is State.GO:
                if paused:
                    self._note("resumed", f"after {care.clock() - now:.0f} s", None)
                self._begun, self._passed_s = True, care.clock()
                return True
            if verdict.state is State.PAUSE and care.clock() >= ends:
                verdict = verdict.and_over("the round's time was over in a pause")
            if verdict.state is State.STOP:
                self._end(verdict)
                return False
            if not paused:
                paused = True
                self._note("paused", verdict.line, verdict.line)
            if stop():
                care.paused = None
                return True  # whoever asked sees to it
            care.wait(min(STEP_S, max(0.0, ends - care.clock())))

    def stopping(self) -> bool:
        """Whether a batch that runs for long is to be given up."""
        verdict = self._care.judged(beginning=False, peek=True)
        if self._begun and verdict.state is State.STOP:
            self._end(verdict)
        return self.ended is not None

    def _end(self, verdict: Verdict) -> None:
        with self._lock:
            if self.ended is not None:
                return
            self.ended = verdict
        if self._begun:  # else there is no update, and whoever declines says why
            self._note("ended early", verdict.line, None)
        else:
            self._care.paused = None
            self._care.on_change()

    def _note(self, what: str, why: str, paused: str | None) -> None:
        care = self._care
        log.info("round %d: training: %s: %s", self._round, what, why)
        care.paused = paused
        care.decisions.add(what, why, self._round)
        care.on_change()


def care_of(policy: "PolicyFile", state: Path, environment: Mapping[str, str]) -> Care:
    """For the machine this runs on. state: the device's directory. COVEY_HOST_ROOT in the environment: where
    the machine's /sys and /proc are, for a container that has them elsewhere."""
    root = Path(environment.get("COVEY_HOST_ROOT") or "/")
    return Care(
        lambda: policy.current.host,
        Decisions(state),
        lambda interfaces: read(root, interfaces),
        veto_file=directory_of(state) / "veto",
        base=policy.path.parent,
    )
