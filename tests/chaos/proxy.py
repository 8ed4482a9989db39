"""A TCP proxy before the broker, one for each client, that can do what networks do.

It passes bytes, and knows nothing of what they mean. A stall keeps the connection and passes nothing, as
a radio that is out of reach; a cut resets it; while it refuses, whoever connects is turned away at once.
"""

import asyncio
import contextlib
import socket
import struct

CHUNK = 64 * 1024


class Link:
    """``async with`` listens. upstream: (host, port). port: of ours."""

    def __init__(self, host: str, upstream: tuple[str, int]) -> None:
        self.host, self.upstream = host, upstream
        self.port = 0
        self.delay_s = 0.0
        self.refusing = False
        self.n_connections = 0
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()

    async def __aenter__(self) -> "Link":
        self._server = await asyncio.start_server(self._serve, self.host, 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *error: object) -> None:
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @property
    def sound(self) -> bool:
        """Nothing is wrong with it right now."""
        return self._flowing.is_set() and not self.refusing and not self.delay_s

    def stall(self, stalled: bool) -> None:
        """Pass nothing in either direction; connections stand, and new ones hang."""
        (self._flowing.clear if stalled else self._flowing.set)()

    def cut(self) -> None:
        """Reset every connection there is, on both sides."""
        for writer in list(self._writers):
            if (connection := writer.get_extra_info("socket")) is not None:
                # With no time to linger, closing sends a reset.
                linger = struct.pack("ii", 1, 0)
                with contextlib.suppress(OSError):
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        self.n_connections += 1
        self._writers.add(writer)
        ours: asyncio.StreamWriter | None = None
        try:
            if self.refusing:
                return
            await self._flowing.wait()
            back, ours = await asyncio.open_connection(*self.upstream)
            self._writers.add(ours)
            pumps = {
                asyncio.create_task(self._pump(reader, ours)),
                asyncio.create_task(self._pump(back, writer)),
            }
            try:
                await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for pump in pumps:
                    pump.cancel()
                await asyncio.gather(*pumps, return_exceptions=True)
        except OSError:
            pass  # there is no broker right now: neither are we
        finally:
            for one in (writer, ours):
                if one is not None:
                    self._writers.discard(one)
                    one.transport.abort() if self.refusing else one.close()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Until one side ends. A delay holds up what comes after as well: order is TCP's promise."""
        while data := await reader.read(CHUNK):
            if self.delay_s:
                await asyncio.sleep(self.delay_s)
            await self._flowing.wait()
            writer.write(data)
            await writer.drain()
