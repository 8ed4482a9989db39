"""MQTT clients for tests: a transport, everything it told us, and waiting for it."""

import asyncio
import random
from collections.abc import Callable, Coroutine
from types import TracebackType
from typing import Any

from covey_shared.mqtt import MqttTransport
from covey_shared.transport import Incoming


def run(scenario: Coroutine[Any, Any, None], timeout_s: float = 120.0) -> None:
    """Run it to its end in an event loop of its own; a hang fails the test rather than the run."""
    asyncio.run(asyncio.wait_for(scenario, timeout_s))


async def poll(true: Callable[[], bool], timeout_s: float = 60.0) -> None:
    """Wait for what nobody tells us of."""
    async with asyncio.timeout(timeout_s):
        while not true():
            await asyncio.sleep(0.005)


class Listener:
    """``async with`` starts the transport and stops it; waits for the connection by default.

    on_message, on_connected, on_disconnected: called besides remembering.
    """

    def __init__(self, transport: MqttTransport, *, connected: bool = True) -> None:
        self.transport = transport
        self.messages: list[Incoming] = []
        self.reasons: list[str] = []
        self.n_connected = 0
        self.on_message: Callable[[Incoming], object] = lambda message: None
        self.on_disconnected: Callable[[str], object] = lambda reason: None
        self.on_connected: Callable[[], Coroutine[Any, Any, None]] | None = None
        self._wait = connected
        self._news = asyncio.Event()

    @property
    def topics(self) -> list[str]:
        """Of all messages, in order."""
        return [message.topic for message in self.messages]

    async def until(self, true: Callable[[], bool], timeout_s: float = 60.0) -> None:
        """Wait until something came that made it true."""
        async with asyncio.timeout(timeout_s):
            while not true():
                self._news.clear()
                await self._news.wait()

    async def until_messages(self, n: int) -> None:
        """Wait for n messages in all."""
        await self.until(lambda: len(self.messages) >= n)

    async def until_reasons(self, n: int = 1) -> None:
        """Wait for n reasons in all."""
        await self.until(lambda: len(self.reasons) >= n)

    async def until_connected(self, n: int = 1) -> None:
        """Wait for n connections in all."""
        await self.until(lambda: self.n_connected >= n)

    async def __aenter__(self) -> "Listener":
        await self.transport.start(self._message, self._connected, self._disconnected)
        if self._wait:
            await self.until_connected()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.transport.stop()

    def _message(self, message: Incoming) -> None:
        self.messages.append(message)
        self._news.set()
        self.on_message(message)

    async def _connected(self) -> None:
        self.n_connected += 1
        self._news.set()
        if self.on_connected is not None:
            await self.on_connected()

    def _disconnected(self, reason: str) -> None:
        self.reasons.append(reason)
        self._news.set()
        self.on_disconnected(reason)


class Draws(random.Random):
    """Jitter that draws `draw(upper bound)`, and remembers the bounds."""

    def __init__(self, draw: Callable[[float], float]) -> None:
        super().__init__()
        self.bounds: list[tuple[float, float]] = []
        self._draw = draw

    def uniform(self, a: float, b: float) -> float:
        self.bounds.append((a, b))
        return self._draw(b)
