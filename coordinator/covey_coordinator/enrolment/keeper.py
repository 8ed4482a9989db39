"""What `covey up` does about devices beside their rounds: the enrolment port, certificates that are due,
and word of what commands changed in the fleet's directory.

Commands change files and nothing else; here a running coordinator notices. The broker's share is
`kept_broker`'s.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterator

from covey_coordinator.config import FleetConfig
from covey_coordinator.enrolment.desk import EnrolmentDesk
from covey_coordinator.enrolment.listener import EnrolmentListener
from covey_coordinator.fleet import FleetDirectory
from covey_coordinator.service import CoordinatorService
from covey_shared import wire
from covey_shared.enrolment import RenewalWanted
from covey_shared.errors import CoveyError, TransportError
from covey_shared.messages import DeviceId

log = logging.getLogger("covey.enrolment")

WATCH_S = 0.5
REFRESH_S = 3600.0
ASK_AGAIN_S = 600.0
"""A device answers at most once an hour; one that was offline hears of it when it is back."""


@contextlib.asynccontextmanager
async def enrolment_of(
    fleet: FleetDirectory,
    config: FleetConfig,
    service: CoordinatorService,
    say: Callable[[str], None],
) -> AsyncIterator[None]:
    """Look after a fleet's devices. service: started. Raises CoveyError if the port is taken."""
    keeper = _Keeper(fleet, config, service, say)
    async with contextlib.AsyncExitStack() as stack:
        if config.networked:
            desk = await asyncio.to_thread(EnrolmentDesk, fleet, say)
            listener = EnrolmentListener(desk, fleet.tls.server_context, port=config.enrol.port)
            await stack.enter_async_context(listener)
            say(f"devices join at port {listener.port}")
        tasks = [asyncio.create_task(keeper.watch())]
        if config.networked:
            tasks.append(asyncio.create_task(keeper.refresh()))
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


class _Keeper:
    def __init__(
        self,
        fleet: FleetDirectory,
        config: FleetConfig,
        service: CoordinatorService,
        say: Callable[[str], None],
    ) -> None:
        self._fleet, self._config, self._service, self._say = fleet, config, service, say
        self._key = fleet.coordinator_key()
        self._wanted: dict[DeviceId, int] = {}
        self._asked: dict[tuple[DeviceId, int], float] = {}
        self._problem = ""

    async def refresh(self) -> None:
        """Certificates that become due while this runs. Those at the start are made before."""
        while True:
            await asyncio.sleep(REFRESH_S)
            with self._told("certificates cannot be renewed"):
                for line in await asyncio.to_thread(
                    self._fleet.refresh_tls, self._config, int(time.time())
                ):
                    self._say(line)

    async def watch(self) -> None:
        """Take up what was changed, and ask devices for renewals, for ever."""
        seen: object = self
        while True:
            now = self._fleet.book.generation()
            if now != seen:
                with self._told("what changed among the devices is not in force yet"):
                    await asyncio.to_thread(self._take_up)
                    seen = now
            await self._ask()
            await asyncio.sleep(WATCH_S)

    def _take_up(self) -> None:
        registry = self._service.registry
        registry.revoked = self._fleet.revoked_identities()  # whatever else may be damaged
        if self._config.networked:
            # Who revoked may have been killed before it came to this.
            with self._fleet.book.held():
                self._fleet.write_revocations(int(time.time()))
        entries = self._fleet.devices()
        registry.identities = {entry.name: entry.identity for entry in entries}
        issued = {entry.name: entry.issued_unix for entry in entries if not entry.revoked_unix}
        self._wanted = {
            record.device: record.wanted_unix
            for record in self._fleet.book.records()
            if issued.get(record.device, record.wanted_unix) < record.wanted_unix
        }
        # What was done, or asked for anew, is not asked for again.
        wanted = set(self._wanted.items())
        self._asked = {asked: at for asked, at in self._asked.items() if asked in wanted}

    async def _ask(self) -> None:
        """RenewalWanted to those of whom the operator wants it, and who are online."""
        present = self._service.registry.present
        for device, since in list(self._wanted.items()):
            asked = self._asked.get((device, since))
            if device not in present or (
                asked is not None and time.monotonic() - asked < ASK_AGAIN_S
            ):
                continue
            message = RenewalWanted(
                fleet=self._config.fleet, device=device, issued_unix=int(time.time())
            )
            with contextlib.suppress(TransportError):
                await self._service.tell(device, wire.sign(message, self._key))
                self._asked[device, since] = time.monotonic()

    @contextlib.contextmanager
    def _told(self, what: str) -> Iterator[None]:
        try:
            yield
        except CoveyError as error:
            if str(error) != self._problem:  # not twice a second
                log.error("%s: %s", what, error)
            self._problem = str(error)
        else:
            self._problem = ""
