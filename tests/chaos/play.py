"""One chaos run, from an empty directory to a verdict."""

import asyncio
import contextlib
import hashlib
import json
import resource
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path

from chaos import schedule
from chaos.checker import Checker, Verdict, alarms, gather, history, left_behind
from chaos.machine import Machine
from chaos.monkey import Monkey
from chaos.observer import Observer
from chaos.parts import COVEY, command
from chaos.stage import PLAN, RUN, Stage, staged, write_run
from chaos.view import View
from covey_coordinator.fleet import FleetDirectory

SETTLE_ROUNDS = 3
"""With a bound on time: so many rounds have to complete after the last fault."""
CALM_S = 180.0
POLL_S = 0.1


@dataclass(frozen=True)
class Wanted:
    """What is asked for. rounds: None for a bound on time alone. only_kills: one of each component.
    proofs: rounds that `covey verify` looks at, besides the checker."""

    rounds: int | None
    seconds: float | None
    seed: int
    devices: int
    network: str
    only_kills: bool
    proofs: int


@dataclass
class Outcome:
    """What came of it. kills: by component. seconds: of the run itself. took: of each restart of the
    coordinator, and of each of the broker until a round moved on."""

    verdict: Verdict
    finished: bool
    seconds: float
    kills: dict[str, int]
    faults: dict[str, int]
    phases: dict[str, int]
    coordinator_back: list[float]
    coordinator_back_busy: list[float]
    coordinator_processor: list[float]
    broker_back: list[float]
    lacks: list[str] = field(default_factory=list)

    @property
    def broken(self) -> list[str]:
        """Everything that must not be."""
        return self.verdict.broken


class Files:
    """Reads what others may read while it is written: it must be whole at every moment."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.broken: list[str] = []
        self.position, self.completed = 0, 0
        self.models: set[bytes] = set()
        self._seen = (0, 0)
        self._copied: dict[str, tuple[int, int]] = {}

    async def read(self) -> None:
        """For ever."""
        while True:
            await asyncio.to_thread(self.look)
            await asyncio.sleep(POLL_S)

    def look(self) -> None:
        """Once."""
        run = self.stage.run
        try:
            lines = history(run)
            self.position = len(lines)
            self.completed = sum(line["outcome"] == "completed" for line in lines)
        except (ValueError, KeyError) as error:
            self.broken.append(f"metrics.jsonl was read half-written: {error}")
        for name in ("state.json", "progress.json"):
            self._json(run / name)
        self._json(self.stage.fleet.path / "status.json")
        with contextlib.suppress(FileNotFoundError):
            path = run / "model.onnx"
            status = path.stat()
            if (seen := (status.st_ino, status.st_mtime_ns)) != self._seen:
                self._seen = seen
                self.models.add(hashlib.sha256(path.read_bytes()).digest())

        self._transcripts(run)

    def _transcripts(self, run: Path) -> None:
        """Copy each with its payloads before they are taken out: a full disk costs all of them."""
        for path in (run / "rounds").glob("*/transcript"):
            with contextlib.suppress(FileNotFoundError):
                status, name = path.stat(), path.parent.name
                now = (status.st_ino, status.st_mtime_ns)
                before = path.with_name("model-before.bin")
                if self._copied.get(name) == now or (name in self._copied and not before.exists()):
                    continue
                self._copied[name] = now
                there = self.stage.transcripts / name
                there.mkdir(exist_ok=True, parents=True)
                shutil.copy(path, there)
                shutil.copy(before, there)

    def _json(self, path: Path) -> None:
        try:
            json.loads(path.read_bytes())
        except FileNotFoundError:
            pass
        except ValueError as error:
            self.broken.append(f"{path.name} was read half-written: {error}")


async def play(machine: Machine, wanted: Wanted, view: View) -> Outcome:
    """Raises RuntimeError if the stage cannot even be set."""
    base = machine.directory
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, 4096)), hard))
    machine.prepare(wanted.network)
    for line in machine.lacks:
        view.say(f"note: {line}")
    rounds = wanted.rounds or 1_000_000
    expected = wanted.rounds or max(4, int(wanted.seconds or 60))
    view.rounds = wanted.rounds or 0
    async with staged(base, machine, wanted.devices) as stage:
        view.stage = stage
        async with Observer(stage) as observer:
            async with asyncio.timeout(120):
                while len(observer.present) < wanted.devices:
                    await asyncio.sleep(0.05)
            view.say(f"{wanted.devices} devices joined and are online")
            file = write_run(stage, rounds, wanted.devices)
            said = await command(
                *COVEY, "run", file, "--name", RUN, "--detach", "--fleet-dir", stage.fleet.path
            )
            view.say(said.splitlines()[0])
            names = [device.name for device in stage.devices]
            faults = schedule.draw(wanted.seed, expected, names, only_kills=wanted.only_kills)
            files = Files(stage)
            monkey = Monkey(stage, observer, view.say, lambda: files.position)
            view.monkey = monkey
            started = time.monotonic()
            tasks = [asyncio.create_task(files.read()), asyncio.create_task(_follow(view, files))]
            try:
                finished = await _rage(stage, monkey, files, faults, wanted, view)
            finally:
                for task in tasks:
                    task.cancel()
            seconds = time.monotonic() - started
            view.say("the faults are over and the run has ended; everything is asked to end")
            await _end(stage)
            files.look()
            view.say("checking every round")
            verdict = await _judge(stage, observer, files, wanted)
        verdict.broken += monkey.failures
        for part in stage.parts:
            verdict.broken += part.exits
        if not finished:
            verdict.breach(
                f"the run did not come to its end within {CALM_S:.0f} s after the last fault: "
                f"{files.position} rounds of {view.rounds or 'unbounded'}"
            )
        return Outcome(
            verdict=verdict,
            finished=finished,
            seconds=seconds,
            kills={part.name: part.kills for part in stage.parts},
            faults=_counted([done.fault.kind for done in monkey.done]),
            phases=_counted([d.phase for d in monkey.done if d.fault.kind.startswith("kill")]),
            coordinator_back=[r.ready_s for r in monkey.returns if r.clean],
            coordinator_back_busy=[r.ready_s for r in monkey.returns if not r.clean],
            coordinator_processor=[r.processor_s for r in monkey.returns if r.clean],
            broker_back=list(monkey.recoveries),
            lacks=list(machine.lacks),
        )


def _counted(names: list[str]) -> dict[str, int]:
    return {name: names.count(name) for name in sorted(set(names))}


async def _follow(view: View, files: Files) -> None:
    while True:
        if files.position != view.position:
            view.position, view.completed = files.position, files.completed
            if not view.console.is_terminal:
                view.say(f"{files.position} rounds over, {files.completed} completed")
        await asyncio.sleep(POLL_S)


async def _rage(
    stage: Stage,
    monkey: Monkey,
    files: Files,
    faults: list[schedule.Fault],
    wanted: Wanted,
    view: View,
) -> bool:
    """The faults, and then the calm. Returns whether the run came to its end."""
    raging = asyncio.create_task(monkey.unleash(faults))
    if wanted.seconds is not None:
        until = asyncio.get_running_loop().time() + wanted.seconds
        while not raging.done() and asyncio.get_running_loop().time() < until:
            await asyncio.sleep(POLL_S)
        monkey.stopped = True
    while not raging.done():
        if wanted.rounds is not None and files.position >= wanted.rounds:
            monkey.stopped = True
        await asyncio.wait({raging}, timeout=POLL_S)
    raging.result()
    at = files.completed
    view.say("no more faults")
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(CALM_S):
            while True:
                over = wanted.rounds is not None and files.position >= wanted.rounds
                if over or (wanted.rounds is None and files.completed >= at + SETTLE_ROUNDS):
                    return True
                await asyncio.sleep(POLL_S)
    return False


async def _end(stage: Stage) -> None:
    """Everything stops as an operator would stop it: nothing is left half done."""
    await asyncio.sleep(1.0)  # the last round's transcript is written after its line
    await asyncio.gather(*(device.end() for device in stage.devices))
    await stage.coordinator.end()
    await stage.broker.end()


async def _judge(stage: Stage, observer: Observer, files: Files, wanted: Wanted) -> Verdict:
    fleet: FleetDirectory = stage.fleet

    def judge() -> Verdict:
        said = gather(fleet.trust, observer.heard, stage.evidence, stage.run)
        lines = history(stage.run)
        checker = Checker(said, lines, stage.run, stage.evidence, PLAN, copies=stage.transcripts)
        verdict = checker.check()
        verdict.broken += files.broken
        if foreign := files.models - checker.models:
            verdict.breach(f"model.onnx held {len(foreign)} files that no round led to")
        for part in stage.parts:
            verdict.broken += alarms(part.log)
        # Without a bound on rounds the coordinator is stopped in the midst of one.
        following = stage.run / "rounds" / f"{verdict.rounds + 1:05}"
        open_round = following if wanted.rounds is None else None
        for directory in (stage.fleet.path, *(device.disk for device in stage.devices)):
            verdict.broken += left_behind(directory, but=open_round)
        verdict.broken += spilled(stage)
        return verdict

    verdict = await asyncio.to_thread(judge)
    for line in history(stage.run)[-wanted.proofs :]:
        # The command itself, as anybody would use it.
        path = stage.run / "rounds" / f"{line['index']:05}" / "transcript"
        if line["outcome"] == "completed" and path.exists():
            try:
                await command(
                    *COVEY, "verify", path, "--fleet-ca", stage.fleet.path / "ca" / "ca.pub",
                    "--coordinator", stage.fleet.path / "coordinator.pub",
                )  # fmt: skip
            except RuntimeError as error:
                verdict.breach(f"covey verify of round {line['round']}: {error}")
    if wanted.rounds is not None:
        table = await command(*COVEY, "status", "--fleet-dir", stage.fleet.path)
        row = next((x.split() for x in table.splitlines() if x.split()[:1] == [RUN]), [])
        if row[1:2] != ["completed"]:
            verdict.breach(f"covey status does not call the run completed: {' '.join(row)}")
    return verdict


def spilled(stage: Stage) -> list[str]:
    """Secrets in logs: every private key that lies anywhere here."""
    secrets: dict[bytes, str] = {}
    for path in [*stage.fleet.path.rglob("*.key"), *stage.base.glob("pi-*/*/*.key")]:
        with contextlib.suppress(ValueError, UnicodeDecodeError):
            value = bytes.fromhex(path.read_text().strip())
            if len(value) == 32:
                secrets[value] = path.name
    found = []
    for log in sorted((stage.base / "logs").glob("*.log")):
        text = log.read_bytes()
        found += [
            f"{log.name} holds the secret of {name}"
            for value, name in secrets.items()
            if value.hex().encode() in text or b"PRIVATE KEY" in text
        ]
    return found


def keep(base: Path, where: Path) -> None:
    """Copy everything out: small disks end with us."""
    shutil.copytree(base, where, dirs_exist_ok=True, symlinks=True, ignore_dangling_symlinks=True)
