"""Carries the faults out, and notes what became of each."""

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field

import psutil

from chaos.observer import Observer
from chaos.parts import DevicePart, Part
from chaos.schedule import Fault
from chaos.stage import Stage

PHASE_PATIENCE_S = 20.0
"""So long a fault waits for its phase; then it happens in whichever there is."""
BACK_AT_WORK_S = 60.0


@dataclass
class Done:
    """What was done. phase: in which it happened."""

    fault: Fault
    at: float
    phase: str
    round: int


@dataclass
class Return:
    """A restart. ready_s: from the start of the process until it was heard. clean: nothing else was
    wrong meanwhile that it had to wait for. processor_s: of its own, until then."""

    name: str
    phase: str
    ready_s: float
    clean: bool
    processor_s: float


@dataclass
class Monkey:
    """tell: a line for whoever watches. position: rounds of the run that are over."""

    stage: Stage
    observer: Observer
    tell: Callable[[str], None]
    position: Callable[[], int]
    done: list[Done] = field(default_factory=list)
    returns: list[Return] = field(default_factory=list)
    recoveries: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    ails: Counter[str] = field(default_factory=Counter)
    """What is wrong right now: of which component, how many faults."""
    moved: asyncio.Event = field(default_factory=asyncio.Event)
    stopped: bool = False
    _links: dict[str, asyncio.Lock] = field(default_factory=dict)
    _watches: set[asyncio.Task[None]] = field(default_factory=set)

    async def unleash(self, faults: list[Fault]) -> None:
        """All of them, each in its round, until they are done or `stopped`. Raises what a fault of
        ours raised."""
        async with asyncio.TaskGroup() as group:
            for fault in faults:
                while self.position() + 1 < fault.round and not self.stopped:
                    await asyncio.sleep(0.02)
                if self.stopped:
                    break
                group.create_task(self._carry_out(fault))
        if self._watches:
            await asyncio.wait(self._watches, timeout=BACK_AT_WORK_S)

    async def _carry_out(self, fault: Fault) -> None:
        lock = self._lock_of(fault)
        async with lock:
            if not await self._its_moment(fault):
                return
            observer = self.observer
            self.done.append(Done(fault, time.monotonic(), observer.phase, observer.round))
            self.tell(
                f"{fault.kind} {fault.target}"
                + (f", {fault.seconds:.1f} s" if fault.seconds else "")
            )
            self.ails[fault.target] += 1
            try:
                await self._do(fault)
            finally:
                self.ails[fault.target] -= 1

    async def _its_moment(self, fault: Fault) -> bool:
        try:
            async with asyncio.timeout(PHASE_PATIENCE_S):
                await self.observer.entry_of(fault.phase)
        except TimeoutError:
            pass
        if not self.stopped:
            await asyncio.sleep(fault.into * min(2.0, self.observer.typical_s(fault.phase)))
        return not self.stopped

    def _lock_of(self, fault: Fault) -> asyncio.Lock:
        """One fault at a time for each process, and one for each way to the broker."""
        if fault.kind == "kill all":
            return self.stage.broker.turn  # the others' as well, see there
        if fault.kind.startswith(("kill", "stop", "fill")):
            return self._part(fault.target).turn
        return self._links.setdefault(fault.target, asyncio.Lock())

    def _part(self, name: str) -> Part:
        return next(part for part in self.stage.parts if part.name == name)

    async def _do(self, fault: Fault) -> None:
        stage, seconds = self.stage, fault.seconds
        match fault.kind:
            case "kill" | "kill and wipe":
                await self._killed(self._part(fault.target), seconds, "wipe" in fault.kind)
            case "kill thrice":
                part = self._part(fault.target)
                for _ in range(2):
                    await part.kill()
                    await part.start()
                    await asyncio.sleep(seconds)
                await self._killed(part, 0.0, False)
            case "kill both" | "kill all":
                others: list[Part] = [stage.coordinator]
                if fault.kind == "kill all":
                    others += stage.devices
                await self._killed_together(others, seconds)
            case "stop":
                part = self._part(fault.target)
                part.stop()
                await asyncio.sleep(seconds)
                part.resume()
            case "fill":
                await self._filled(self._part(fault.target), seconds)
            case _:
                await self._network(fault)

    async def _killed_together(self, others: list[Part], seconds: float) -> None:
        """The broker, which forgets everything, and these."""
        async with AsyncExitStack() as stack:
            for part in others:
                await stack.enter_async_context(part.turn)
                self.ails[part.name] += 1
                stack.callback(self.ails.subtract, [part.name])
            for part in others:
                await part.kill()
            await self._killed(self.stage.broker, seconds, True)
            for part in others:
                await self._started(part)

    async def _killed(self, part: Part, seconds: float, wipe: bool) -> None:
        await part.kill()
        await asyncio.sleep(seconds)
        if wipe and part is self.stage.broker:
            self.stage.broker.forget()
        await self._started(part)

    async def _started(self, part: Part) -> None:
        phase = self.observer.phase
        await part.start()
        if part is self.stage.broker:
            self._watch(self._progress_after(part.started_at))
        elif part is self.stage.coordinator:
            self._watch(self._coordinator_back(phase, part.started_at))

    def _watch(self, work) -> None:  # type: ignore[no-untyped-def]
        task = asyncio.create_task(work)
        self._watches.add(task)
        task.add_done_callback(self._watches.discard)

    async def _coordinator_back(self, phase: str, started: float) -> None:
        """Until it is heard: it calls a round, or goes on with one."""
        observer, others_well = self.observer, True
        until = started + BACK_AT_WORK_S
        while observer.coordinator_spoke_at <= started and time.monotonic() < until:
            broker = self.ails["broker"] or self.ails["all"] or not observer.connected
            ours = self.ails["coordinator"] > 1 or not self.stage.coordinator.link.sound
            others_well = others_well and not broker and not ours
            if self.stage.coordinator.started_at != started:
                return  # it was killed again before
            await asyncio.sleep(0.01)
        ready, processor_s = observer.coordinator_spoke_at - started, 0.0
        with contextlib.suppress(psutil.Error):
            times = psutil.Process(self.stage.coordinator.pid).cpu_times()
            processor_s = times.user + times.system
        if ready <= 0:
            self.failures.append(
                f"the coordinator said nothing for {BACK_AT_WORK_S:.0f} s after its start"
            )
            return
        self.returns.append(Return("coordinator", phase, ready, others_well, processor_s))

    async def _progress_after(self, started: float) -> None:
        """Until a round moves on, after the broker is back."""
        until = started + BACK_AT_WORK_S
        while self.observer.progress_at <= started:
            if time.monotonic() > until:
                self.failures.append(
                    f"no round moved on for {BACK_AT_WORK_S:.0f} s after the broker was back"
                )
                return
            if self.stage.broker.started_at != started:
                return
            await asyncio.sleep(0.02)
        self.recoveries.append(self.observer.progress_at - started)

    async def _filled(self, part: Part, seconds: float) -> None:
        machine = self.stage.machine
        disk = getattr(part, "disk", None)
        if disk is None or part.pid is None or (not machine.disks and isinstance(part, DevicePart)):
            return
        machine.fill(disk, part.pid)
        try:
            await asyncio.sleep(seconds)
        finally:
            machine.free(disk, part.pid)

    async def _network(self, fault: Fault) -> None:
        stage, machine, seconds = self.stage, self.stage.machine, fault.seconds
        devices = [d for d in stage.devices if fault.target in (d.name, "all")]
        links = [d.link for d in devices]
        if fault.target in ("coordinator", "all"):
            links.append(stage.coordinator.link)
        kind = fault.kind
        if not machine.namespaces:
            kind = {"unplug": "stall", "shape": "delay"}.get(kind, kind)
        match kind:
            case "cut":
                for link in links:
                    link.cut()
            case "refuse":
                for link in links:
                    link.refusing = True
                    link.cut()
                await asyncio.sleep(seconds)
                for link in links:
                    link.refusing = False
            case "stall":
                for link in links:
                    link.stall(True)
                await asyncio.sleep(seconds)
                for link in links:
                    link.stall(False)
            case "delay":
                for link in links:
                    link.delay_s = 0.05 + 0.25 * fault.into
                await asyncio.sleep(seconds)
                for link in links:
                    link.delay_s = 0.0
            case "unplug":
                for device in devices:
                    machine.plug(device.name, False)
                await asyncio.sleep(seconds)
                for device in devices:
                    machine.plug(device.name, True)
            case "shape":
                how = ("tbf", "rate", "200kbit", "burst", "8k", "latency", "2s")
                if machine.netem:
                    how = ("netem", "delay", "80ms", "40ms", "loss", f"{5 + 15 * fault.into:.0f}%")
                for device in devices:
                    machine.shape(device.name, *how)
                await asyncio.sleep(seconds)
                for device in devices:
                    machine.unshape(device.name)
            case other:
                raise ValueError(f"there is no fault of the kind {other!r}")
