"""Ending a device service leaves nothing half begun."""

import asyncio
import gc
import os
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from covey_device.service import DeviceService
from covey_device.trainer import Work
from covey_shared.transport import Incoming
from lab import FLEET, Lab


class Silent:
    """A transport that is connected at once and never gets a publish through."""

    async def start(
        self,
        on_message: Callable[[Incoming], None],
        on_connected: Callable[[], Awaitable[None]],
        on_disconnected: Callable[[str], None],
    ) -> None:
        await on_connected()

    async def subscribe(self, *topic_filters: str) -> None:
        pass

    async def unsubscribe(self, *topic_filters: str) -> None:
        pass

    async def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        await asyncio.get_running_loop().create_future()

    def reconnect_within(self, seconds: float) -> None:
        pass

    async def stop(self, *, graceful: bool = True) -> None:
        pass


def idle_service() -> DeviceService:
    """That will never train."""
    lab = Lab(3)
    name = lab.names[0]
    trainer: Any = None
    return DeviceService(
        lab.sessions[name],
        lab.identities[name],
        FLEET,
        Silent(),
        None,
        trainer,
        limits=Work(1, 1, 1.0, 10**9),
        rng=os.urandom,
    )


class Renewing:
    """Renews for ever; ending it takes a moment, as a process of its own does."""

    ended = False

    async def run(self) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            for _ in range(5):
                await asyncio.sleep(0)
            self.ended = True


def test_a_service_that_renews_waits_for_the_end_of_that() -> None:
    """Otherwise the event loop is closed around a process that is still there."""
    service, renewing = idle_service(), Renewing()
    service.renewal = renewing  # type: ignore[assignment]

    async def scenario() -> None:
        await service.start()
        await asyncio.sleep(0)
        await service.close()
        assert renewing.ended

    asyncio.run(scenario())


@pytest.mark.filterwarnings("error")  # a coroutine that was never awaited is a warning
def test_a_service_that_ends_before_its_first_word() -> None:
    async def scenario() -> None:
        service = idle_service()
        await service.start()
        await service.close(graceful=False)

    asyncio.run(scenario())
    gc.collect()
