"""A service's life as its supervisor sees it: READY, STATUS, the watchdog, and the end.

The watchdog is fed by nobody but the service's own worker. A beat goes the way of every message: through
the event loop, the inbox, the worker, its lock and the thread of the protocol's arithmetic. If any of these
hangs for good, no beat comes back, and systemd starts the service anew (WatchdogSec= of the unit).
"""

import asyncio
import faulthandler
import logging
import os
import time
from collections.abc import Awaitable, Callable
from typing import Protocol

from covey_shared.errors import CoveyError
from covey_shared.notify import Notifier

log = logging.getLogger("covey.device")

BEATS = 4
"""In the time of the watchdog: one that comes late on a busy machine is no reason for a restart."""


class Lives(Protocol):
    """What of a service is needed here."""

    on_status: Callable[[str], None]

    async def start(self) -> None: ...
    async def close(self) -> None: ...
    async def beat(self) -> None: ...
    async def reload_policy(self, *, anyway: bool = False) -> None: ...


class Supervised:
    """A service, and whoever supervises it. steady_us: microseconds of CLOCK_MONOTONIC."""

    def __init__(
        self,
        service: Lives,
        notifier: Notifier,
        *,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        steady_us: Callable[[], int] = lambda: time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000,
    ) -> None:
        self._service, self._notifier = service, notifier
        self._sleep, self._steady_us = sleep, steady_us
        self._reloads: set[asyncio.Task[None]] = set()

    async def run(self, stop: asyncio.Event, status: str) -> None:
        """Serve until `stop`. status: what is said of the service until it says something itself.

        READY comes when everything that is this machine's own has started; whether there is a broker, or a
        network at all, is no condition of it.
        """
        notifier = self._notifier
        notifier.status(status)
        self._service.on_status = notifier.status
        await self._service.start()
        feeding = asyncio.create_task(self._feed())
        try:
            notifier.ready()
            await stop.wait()
        finally:
            notifier.stopping()
            for task in (feeding, *self._reloads):
                task.cancel()
            await self._service.close()

    def reload(self) -> None:
        """Read the policy again: for a signal's handler, which cannot wait."""
        task = asyncio.ensure_future(self._reload())
        self._reloads.add(task)
        task.add_done_callback(self._reloads.discard)

    async def _reload(self) -> None:
        self._notifier.reloading(self._steady_us())
        try:
            await self._service.reload_policy(anyway=True)
        except Exception:
            log.exception("the policy was not read again; the service goes on")
        finally:
            self._notifier.ready()

    async def _feed(self) -> None:
        period_s = self._notifier.watchdog_s
        if period_s is None:
            return
        try:
            while True:
                await self._service.beat()
                self._notifier.alive()
                await self._sleep(period_s / BEATS)
        except CoveyError as error:
            # Nothing is said any more: the supervisor will come and see.
            log.error("the service does not work any more: %s; systemd will restart it", error)


def supervisor() -> Notifier:
    """Whoever started this process. Its children are not told: what they said would be taken for ours."""
    notifier = Notifier.of(os.environ, os.getpid())
    for name in ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"):
        os.environ.pop(name, None)
    if notifier.watchdog_s is not None:
        # The watchdog ends a service that hangs with SIGABRT: then its log shows where it hung.
        faulthandler.enable()
    return notifier
