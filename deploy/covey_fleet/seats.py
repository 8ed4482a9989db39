"""Places for devices: in this process, or each in one of its own. A seat outlives its device's lives.

Seats are used on one event loop, by `fleet`.
"""

import asyncio
import contextlib
import logging
import multiprocessing
import signal
from collections.abc import Callable
from concurrent.futures import Executor
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Protocol

from covey_fleet import worker
from covey_fleet.device import DeviceSpec, Life, Traffic
from covey_fleet.faults import Vanished
from covey_shared.errors import LocalProtocolError

log = logging.getLogger("covey.fleet")

RESTART_S = 1.0
"""After which time a device's process is started again, as a service manager would."""

MAX_FAILED_STARTS = 3
"""A process that ends so often in a row before it has connected will not do better."""

_GOODBYE_S = 5.0


def start_fork_server() -> None:
    """Begin importing what devices need, in the process that theirs are forked from.

    A fork is there within milliseconds, where an interpreter that imports numpy and onnxruntime
    takes most of a second. Harmless when it runs already.
    """
    multiprocessing.get_context("forkserver").set_forkserver_preload(["covey_fleet.worker"])
    # Ctrl-C goes to the whole terminal. The server would die of it while it imports, and with a
    # traceback; what is ignored here stays so in it and in its children.
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        forkserver.ensure_running()
    finally:
        signal.signal(signal.SIGINT, before)


class Seat(Protocol):
    """Where a device lives."""

    spec: DeviceSpec

    @property
    def traffic(self) -> Traffic:
        """Bytes of all lives so far."""
        ...

    async def start(self) -> None:
        """Begin the first life."""
        ...

    def round_over(self, round_id: int) -> None:
        """Whoever vanished in this round may come back."""
        ...

    async def close(self) -> None:
        """End the life, and the seat."""
        ...


class LocalSeat:
    """A device in this process. When it vanishes, it stays away until the round is over."""

    def __init__(
        self,
        spec: DeviceSpec,
        on_vanished: Callable[[Vanished], None],
        *,
        pool: Executor,
        train_pool: Executor,
    ) -> None:
        self.spec = spec
        self._on_vanished = on_vanished
        self._pool, self._train_pool = pool, train_pool
        self._life: Life | None = None
        self._last_over = 0
        self._vanished_in = 0
        self._changing: asyncio.Task[None] | None = None
        self._past = Traffic()

    @property
    def traffic(self) -> Traffic:
        """Bytes of all lives so far."""
        return self._past if self._life is None else self._past + self._life.traffic

    async def start(self) -> None:
        """Begin the first life."""
        self._life = Life(self.spec, self._vanish, pool=self._pool, train_pool=self._train_pool)
        await self._life.start()

    def round_over(self, round_id: int) -> None:
        """Whoever vanished in this round may come back."""
        self._last_over = round_id
        self._come_back()

    async def close(self) -> None:
        """End the life, and the seat."""
        if self._changing is not None:
            await self._changing
        await self._end(graceful=True)

    def _vanish(self, vanished: Vanished) -> None:
        self._vanished_in = vanished.round
        # In a task of its own: the device's own tasks, which are to be cancelled, call this.
        self._changing = asyncio.create_task(self._end(graceful=False))
        self._on_vanished(vanished)
        if vanished.round <= self._last_over:
            self._come_back()

    def _come_back(self) -> None:
        if self._vanished_in:
            self._vanished_in = 0
            self._changing = asyncio.create_task(self._begin_again(self._changing))

    async def _begin_again(self, ending: asyncio.Task[None] | None) -> None:
        if ending is not None:
            await ending
        await self.start()

    async def _end(self, *, graceful: bool) -> None:
        life, self._life = self._life, None
        if life is not None:
            await life.close(graceful=graceful)
            self._past += life.traffic


class ProcessSeat:
    """A device in a process of its own, which ends when this one does.

    When it vanishes, it is started again after a moment, mostly while the round still goes on.
    """

    def __init__(
        self,
        spec: DeviceSpec,
        on_vanished: Callable[[Vanished], None],
        on_failure: Callable[[Exception], None],
        log_file: Path,
    ) -> None:
        """on_failure: told when the process cannot be kept running. log_file: appended to."""
        self.spec = spec
        self._on_vanished = on_vanished
        self._on_failure = on_failure
        self._log_file = log_file
        self._context = multiprocessing.get_context("forkserver")
        self._process: multiprocessing.process.BaseProcess | None = None
        self._reports: Connection | None = None
        self._ended = asyncio.Event()
        self._restart: asyncio.TimerHandle | None = None
        self._closing = False
        self._failed_starts = 0
        self._past, self._present = Traffic(), Traffic()

    @property
    def traffic(self) -> Traffic:
        """Bytes of all lives so far, as far as they were reported."""
        return self._past + self._present

    @property
    def pid(self) -> int | None:
        """Of the running process."""
        return None if self._process is None else self._process.pid

    async def start(self) -> None:
        """Begin the first life."""
        self._launch()

    def round_over(self, round_id: int) -> None:
        """Nothing: time brings it back."""

    async def close(self) -> None:
        """End the life, and the seat."""
        self._closing = True
        if self._restart is not None:
            self._restart.cancel()
        process = self._process
        if process is None:
            return
        process.terminate()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_GOODBYE_S):
                await self._ended.wait()
        if self._process is not None:
            process.kill()
            await self._ended.wait()

    def _launch(self) -> None:
        self._ended.clear()
        self._reports, child = self._context.Pipe(duplex=False)
        process = self._context.Process(
            target=worker.main,
            args=(self.spec, child, self._log_file, log.getEffectiveLevel()),
            name=self.spec.device,
            daemon=True,
        )
        process.start()
        child.close()
        self._process = process
        loop = asyncio.get_running_loop()
        loop.add_reader(self._reports.fileno(), self._read_reports)
        loop.add_reader(process.sentinel, self._process_ended)

    def _read_reports(self) -> None:
        reports = self._reports
        try:
            while reports is not None and reports.poll():
                match reports.recv():
                    case Vanished() as vanished:
                        self._on_vanished(vanished)
                    case Traffic() as traffic:
                        self._failed_starts = 0
                        self._present = traffic
        except (EOFError, OSError):
            self._close_reports()

    def _close_reports(self) -> None:
        if self._reports is not None:
            asyncio.get_running_loop().remove_reader(self._reports.fileno())
            self._reports.close()
            self._reports = None

    def _process_ended(self) -> None:
        process = self._process
        if process is None:
            return
        loop = asyncio.get_running_loop()
        loop.remove_reader(process.sentinel)
        self._read_reports()
        self._close_reports()
        process.join()
        code = process.exitcode
        process.close()
        self._process = None
        self._past, self._present = self._past + self._present, Traffic()
        self._ended.set()
        if self._closing:
            return
        log.info("%s: process ended (exit status %s)", self.spec.device, code)
        self._failed_starts += 1
        if self._failed_starts >= MAX_FAILED_STARTS:
            self._on_failure(
                LocalProtocolError(
                    f"the process of {self.spec.device} does not start (exit status {code}); its "
                    f"last words: {_last_line(self._log_file)}"
                )
            )
        else:
            self._restart = loop.call_later(RESTART_S, self._launch)


def _last_line(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()[-1]
    except (OSError, IndexError):
        return "none"
