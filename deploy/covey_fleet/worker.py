"""One device in a process of its own, as its child side: run a life, report, and die for real.

Imported by the fork server before anything else, so that every child has it already.
"""

import asyncio
import logging
import multiprocessing
import os
import signal
import sys
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NoReturn

import covey_shared.runtime  # noqa: F401 - the slowest import
from covey_fleet.device import DeviceSpec, Life
from covey_fleet.faults import Vanished

VANISHED_STATUS = 77
REPORT_EVERY_S = 0.5


def main(spec: DeviceSpec, reports: Connection, log_file: Path, level: int) -> None:
    """Run the device until SIGTERM, until it vanishes, or until the parent has ended.

    reports: gets a `Traffic` now and then, and a `Vanished` before the end.
    """
    # Ctrl-C goes to the whole terminal; the fleet then ends its devices one by one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _write_to(log_file, level)
    asyncio.run(_live(spec, reports))


def _write_to(log_file: Path, level: int) -> None:
    """Log to the file, and let nothing of this process get on the terminal."""
    fd = os.open(log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(fd, sys.stdout.fileno())
    os.dup2(fd, sys.stderr.fileno())
    os.close(fd)
    logging.basicConfig(level=level, format="%(asctime)s %(message)s", force=True)


async def _live(spec: DeviceSpec, reports: Connection) -> None:
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    parent = multiprocessing.parent_process()
    if parent is not None:
        loop.add_reader(parent.sentinel, os._exit, 1)

    def vanish(vanished: Vanished) -> NoReturn:
        reports.send(life.traffic)
        reports.send(vanished)
        os._exit(VANISHED_STATUS)  # no clean-up, no goodbye: as if the power were gone

    life = Life(spec, vanish)
    await life.start()
    while not stop.is_set():
        reports.send(life.traffic)
        try:
            await asyncio.wait_for(stop.wait(), REPORT_EVERY_S)
        except TimeoutError:
            continue
    await life.close()
    reports.send(life.traffic)
