"""Who vanishes when: by the seed alone, as many as were asked for."""

import asyncio
import pickle
from collections import Counter
from typing import Any

import pytest

from covey_fleet.faults import MOMENTS, FaultPlan, FaultyTransport, Moment, Vanished
from covey_shared import chunks, keys, wire
from covey_shared.messages import CheckIn, DeviceId, ManifestDigest, MaskedUpdate, Reveal, RunId
from covey_shared.topics import Topics
from small_fleet import device_names, script

NAMES = device_names(20)
TOPICS = Topics("f")
ME = DeviceId("pi-1")
KEY = keys.SigningKey(bytes(32))


def vanishing(plan: FaultPlan, round_id: int) -> dict[DeviceId, Moment]:
    fates = {name: plan.fate(name, round_id) for name in plan.devices}
    return {name: moment for name, moment in fates.items() if moment is not None}


def test_a_seed_is_a_plan_in_any_process() -> None:
    plan = FaultPlan(7, 0.2, NAMES)
    again = pickle.loads(pickle.dumps(plan))
    for round_id in (1, 2, 100):
        assert vanishing(again, round_id) == vanishing(plan, round_id)
    # Written down: the same in every release of covey that calls it seed 7.
    assert vanishing(FaultPlan(7, 0.1, NAMES[:10]), 1) == {"pi-3": Moment.AFTER_SHARES}


def test_dropout_is_the_share_of_the_fleet_in_each_round() -> None:
    plan = FaultPlan(1, 0.2, NAMES)
    assert {len(vanishing(plan, r)) for r in range(1, 200)} == {4}
    plan = FaultPlan(1, 0.15, NAMES[:10])
    counts = Counter(len(vanishing(plan, r)) for r in range(1, 2001))
    assert set(counts) == {1, 2}
    assert 0.45 < counts[2] / 2000 < 0.55
    assert all(vanishing(FaultPlan(1, 0.0, NAMES), r) == {} for r in range(1, 100))
    assert len(vanishing(FaultPlan(1, 1.0, NAMES), 1)) == len(NAMES)


def test_every_device_and_every_moment_has_its_turn() -> None:
    plan = FaultPlan(3, 0.2, NAMES)
    rounds = [vanishing(plan, r) for r in range(1, 401)]
    devices = Counter(name for fates in rounds for name in fates)
    moments = Counter(moment for fates in rounds for moment in fates.values())
    assert set(devices) == set(NAMES)
    assert set(moments) == set(MOMENTS)
    assert min(devices.values()) > 40
    assert min(moments.values()) > 80


class Wire:
    """Where a device's bytes end up."""

    bytes_in = bytes_out = 0

    def __init__(self) -> None:
        self.sent: list[tuple[str, bytes]] = []

    async def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        self.sent.append((topic, payload))


def speak(moment: Moment | None, n_chunks: int = 4) -> tuple[list[object], list[Vanished]]:
    """A device checks in, uploads and reveals; what got out, and when it vanished."""
    out, gone = Wire(), []
    inner: Any = out
    plan = script({(5, ME): moment} if moment else {})
    transport = FaultyTransport(inner, TOPICS, ME, plan, gone.append)
    blob = chunks.blob_of(bytes(chunks.CHUNK_BYTES * n_chunks))
    said = [
        CheckIn("f", RunId(bytes(16)), 5, ME, bytes(80), bytes(32), bytes(31) + b"\1", bytes(32)),
        MaskedUpdate(ManifestDigest(bytes(32)), ME, b"\1", blob.digest, blob.size),
        *(chunks.frame(blob, i) for i in range(n_chunks)),
        Reveal(ManifestDigest(bytes(32)), ME, b"\1", b"\1", bytes(64)),
    ]

    async def device() -> None:
        for thing in said:
            if isinstance(thing, bytes):
                await transport.publish(TOPICS.upload(ME), thing)
            else:
                envelope = wire.sign(thing, KEY).envelope
                await transport.publish(TOPICS.outbox(ME), envelope)

    async def scenario() -> None:
        task = asyncio.create_task(device())
        await asyncio.wait({task}, timeout=0.05 if moment else 5.0)
        assert task.done() is (moment is None)
        task.cancel()

    asyncio.run(scenario())
    names: list[object] = []
    for topic, payload in out.sent:
        if topic == TOPICS.upload(ME):
            names.append(chunks.decode_frame(payload).index)
        else:
            names.append(type(wire.decode(payload).message))
    return names, gone


@pytest.mark.parametrize(
    ("moment", "expected"),
    [
        (None, [CheckIn, MaskedUpdate, 0, 1, 2, 3, Reveal]),
        (Moment.BEFORE_CHECK_IN, []),
        (Moment.AFTER_CHECK_IN, [CheckIn]),
        (Moment.BEFORE_UPDATE, [CheckIn]),
        (Moment.IN_UPLOAD, [CheckIn, MaskedUpdate, 0, 1]),
        (Moment.AFTER_UPLOAD, [CheckIn, MaskedUpdate, 0, 1, 2, 3]),
        (Moment.BEFORE_REVEAL, [CheckIn, MaskedUpdate, 0, 1, 2, 3]),
        (Moment.AFTER_REVEAL, [CheckIn, MaskedUpdate, 0, 1, 2, 3, Reveal]),
    ],
)
def test_nothing_gets_out_after_the_moment(moment: Moment | None, expected: list[object]) -> None:
    sent, gone = speak(moment)
    assert sent == expected
    assert gone == ([Vanished(ME, 5, moment)] if moment else [])


def test_of_an_upload_in_one_piece_nothing_comes() -> None:
    sent, gone = speak(Moment.IN_UPLOAD, n_chunks=1)
    assert sent == [CheckIn, MaskedUpdate]
    assert [v.moment for v in gone] == [Moment.IN_UPLOAD]
