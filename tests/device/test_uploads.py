"""Sending an update's chunks: in order, each at most once at a time, and again when it got lost."""

import asyncio

import pytest

from covey_device.uploads import Uploads
from covey_shared import chunks
from covey_shared.errors import TransportError
from covey_shared.mqtt.client import WINDOW
from memory_fleet import go

N = 3 * WINDOW
PAYLOAD = bytes(range(256)) * (N * chunks.CHUNK_BYTES // 256)
FRAMES = list(chunks.split(chunks.blob_of(PAYLOAD)))


class Link:
    """Takes frames; each gets through when `let` says so."""

    def __init__(self) -> None:
        self.begun: list[bytes] = []
        self.gates: list[asyncio.Event] = []
        self.error: Exception | None = None

    async def publish(self, frame: bytes) -> None:
        self.begun.append(frame)
        if self.error is not None:
            raise self.error
        gate = asyncio.Event()
        self.gates.append(gate)
        await gate.wait()

    async def let(self, count: int) -> None:
        for _ in range(count):
            self.gates.pop(0).set()
        await settle()


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


def test_what_waits_or_is_under_way_is_not_asked_for_twice():
    async def scenario() -> None:
        link = Link()
        uploads = Uploads(link.publish)
        assert uploads.want(PAYLOAD, None) == sum(map(len, FRAMES))
        sending = asyncio.create_task(uploads.send())
        await settle()
        assert link.begun == FRAMES[: WINDOW // 2]  # half of the window is left to others
        assert uploads.want(PAYLOAD, ((0, N),) * 3) == 0
        await uploads.send()  # somebody else does
        await link.let(2)
        # Those two are through as far as we know: whoever lacks them may ask again.
        assert uploads.want(PAYLOAD, ((0, 4),)) == 2 * len(FRAMES[0])
        while not sending.done():
            await link.let(len(link.gates))
        assert link.begun == FRAMES + FRAMES[:2]
        await sending
        assert uploads.want(PAYLOAD, ((5, 1),)) == len(FRAMES[5])
        again = asyncio.create_task(uploads.send())
        await settle()
        await link.let(1)
        await again
        assert link.begun[-1] == FRAMES[5]

    go(scenario())


def test_another_update_takes_the_place_of_the_one_before():
    other = bytes(chunks.CHUNK_BYTES + 1)

    async def scenario() -> None:
        link = Link()
        uploads = Uploads(link.publish)
        uploads.want(PAYLOAD, None)
        sending = asyncio.create_task(uploads.send())
        await settle()
        before = len(link.begun)
        uploads.want(other, None)
        while not sending.done():
            await link.let(len(link.gates))
        assert link.begun[before:] == list(chunks.split(chunks.blob_of(other)))
        uploads.want(PAYLOAD, None)
        uploads.clear()
        await uploads.send()
        assert len(link.begun) == before + 2

    go(scenario())


def test_a_transport_that_stops_ends_it_and_it_can_begin_again():
    async def scenario() -> None:
        link = Link()
        link.error = TransportError("stopped")
        uploads = Uploads(link.publish)
        uploads.want(PAYLOAD, ((0, 1),))
        with pytest.raises(TransportError):
            await uploads.send()
        link.error = None
        assert uploads.want(PAYLOAD, ((0, 1),)) == len(FRAMES[0])
        sending = asyncio.create_task(uploads.send())
        await settle()
        await link.let(1)
        await sending
        assert link.begun == [FRAMES[0]] * 2

    go(scenario())
