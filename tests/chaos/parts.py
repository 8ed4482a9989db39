"""The processes of a fleet, as things that can be killed, stopped, cut off and started again."""

import asyncio
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

from chaos.machine import Machine, dies_with_us
from chaos.proxy import Link
from covey_coordinator.broker.running import _listens

TESTS = Path(__file__).resolve().parents[1]
COVEY = [sys.executable, "-c", "from covey_coordinator.cli import main; main()"]
COVEY_DEVICE = [sys.executable, "-c", "from covey_device.cli import main; main()"]
ENVIRONMENT = {k: v for k, v in os.environ.items() if not k.startswith("COVEY_")} | {
    "COVEY_HOST_ROOT": "/nonexistent",  # what machine this is, is no matter
    "COLUMNS": "200",
    "PYTHONUNBUFFERED": "1",
    "COVEY_DEBUG": "1",
    "PYTHONPATH": os.pathsep.join(
        [str(TESTS), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    ),
    # A core apiece for eight devices is more than there is.
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}
START_S = 60.0


async def command(*words: object, stdin: str = "") -> str:
    """Run a command that ends by itself -> its standard output. Raises RuntimeError."""
    child = await asyncio.create_subprocess_exec(
        *map(str, words),
        env=ENVIRONMENT,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        preexec_fn=dies_with_us,
    )
    out, error = await asyncio.wait_for(child.communicate(stdin.encode()), START_S)
    if child.returncode:
        raise RuntimeError(f"{' '.join(map(str, words[-4:]))}: {error.decode()[-2000:]}")
    return out.decode()


class Part:
    """One component: a command that runs until we end it, and everything it says.

    name: "coordinator", "broker" or a device's. exits: ends that nobody asked for. log: a file of ours,
    on no disk that is ever full.
    """

    def __init__(self, name: str, words: list[str], log: Path) -> None:
        self.name, self.words, self.log = name, words, log
        self.kills = 0
        self.stops = 0
        self.exits: list[str] = []
        self.last_lines: deque[str] = deque(maxlen=8)
        self.started_at = 0.0
        self.state = "down"
        self.turn = asyncio.Lock()
        """Held by the fault that is at work on this process."""
        self._process: asyncio.subprocess.Process | None = None
        self._ending = False
        self._reader: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int | None:
        """Of the process that runs."""
        process = self._process
        return process.pid if process is not None and process.returncode is None else None

    async def start(self) -> None:
        """Start it; returns when there is a process."""
        self._ending = False
        self.started_at = time.monotonic()
        with self.log.open("a") as log:
            log.write(f"--- started, {self.started_at:.3f}\n")
        self._process = await asyncio.create_subprocess_exec(
            *self.words,
            env=ENVIRONMENT,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=dies_with_us,
            limit=1 << 20,
        )
        self.state = "up"
        self._reader = asyncio.create_task(self._read(self._process))

    async def _read(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        with self.log.open("a", buffering=1) as log:
            while line := await process.stdout.readline():
                text = line.decode(errors="replace").rstrip("\n")
                log.write(f"{time.monotonic():.3f} {text}\n")
                self.last_lines.append(text)
        status = await process.wait()
        if process is self._process and not self._ending:
            self.state = "ended"
            self.exits.append(
                f"{self.name} ended by itself with status {status}: {' | '.join(self.last_lines)}"
            )

    async def kill(self) -> None:
        """As if its plug were pulled."""
        self._ending = True
        await self._end(signal.SIGKILL)
        self.kills += 1

    async def end(self) -> None:
        """Ask it to end, as an operator would; kill it if it does not."""
        self._ending = True
        self.resume()
        try:
            async with asyncio.timeout(30):
                await self._end(signal.SIGTERM)
        except TimeoutError:
            self.exits.append(f"{self.name} did not end when it was asked to")
            await self._end(signal.SIGKILL)

    async def _end(self, number: int) -> None:
        process = self._process
        if process is None or self._reader is None:
            return
        if process.returncode is None:
            # Only the process itself: what it started must notice by itself.
            os.kill(process.pid, number)
        await process.wait()
        self.state = "down"
        # A child of its own may hold the pipe open for a moment.
        await asyncio.wait({self._reader}, timeout=5)

    def stop(self) -> None:
        """SIGSTOP."""
        if self.pid is not None:
            os.kill(self.pid, signal.SIGSTOP)
            self.state = "stopped"
            self.stops += 1

    def resume(self) -> None:
        """SIGCONT."""
        if self.pid is not None and self.state == "stopped":
            os.kill(self.pid, signal.SIGCONT)
            self.state = "up"


class Broker(Part):
    """A mosquitto of our own. stored: where it keeps what is retained."""

    def __init__(self, program: Path, directory: Path, port: int, log: Path) -> None:
        super().__init__("broker", [str(program), "-c", str(directory / "mosquitto.conf")], log)
        self.stored = directory / "mosquitto.db"
        self.port = port

    async def start(self) -> None:
        """Returns when it listens."""
        await super().start()
        async with asyncio.timeout(START_S):
            while self.pid is not None and not _listens(self.pid, self.port):
                await asyncio.sleep(0.02)

    def forget(self) -> None:
        """Lose all retained messages."""
        self.stored.unlink(missing_ok=True)


class DevicePart(Part):
    """A device, its way to the broker, and its state's disk."""

    def __init__(
        self, machine: Machine, name: str, config: Path, evidence: Path, link: Link, log: Path
    ) -> None:
        words = [sys.executable, "-m", "chaos.device", "--evidence", str(evidence)]
        words += ["-v", "--config", str(config)]
        super().__init__(name, [*machine.within(name), *words], log)
        self.disk = config.parent / "state"
        self.link = link


class CoordinatorPart(Part):
    """`covey up`, its way to the broker, and the fleet's disk. on_start: told when it is started."""

    def __init__(self, fleet: Path, link: Link, log: Path) -> None:
        super().__init__("coordinator", [*COVEY, "up", "--verbose", "--fleet-dir", str(fleet)], log)
        self.disk = fleet
        self.link = link
        self.on_start: Callable[[], None] = lambda: None

    async def start(self) -> None:
        """Start it."""
        await super().start()
        self.on_start()
