"""A hostile client that has the broker's password, against a fleet that is training.

It can say anything on any topic. Services must stay up, finish their rounds, and give exact sums of
whoever took part; what it can do at all is waste their time.
"""

import asyncio
import hashlib
import random
import struct
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest
from paho.mqtt import client as paho
from paho.mqtt.enums import CallbackAPIVersion

from covey_coordinator.broker import BrokerKind
from covey_fleet.fleet import DEVICE, Fleet
from covey_shared import chunks, wire
from covey_shared.chunks import Blob, BlobDigest
from covey_shared.keys import SigningKey
from covey_shared.messages import MaskedUpdate, WantBlob
from covey_shared.mqtt import MqttTransport, publish_all
from covey_shared.transport import Incoming
from small_fleet import DEADLINES, go, mutated, small_fleet

N_MESSAGES = 10_000

PATIENT = msgspec.structs.replace(DEADLINES, gather_s=30.0)
"""A flood may hold check-ins up; they are repeated until the deadline."""


@asynccontextmanager
async def intruder(
    fleet: Fleet, on_message: Callable[[Incoming], None] = lambda message: None
) -> AsyncIterator[MqttTransport]:
    """A client of the broker that hears everything."""
    transport = MqttTransport(
        fleet.url, "intruder", username=DEVICE, password=fleet.users[DEVICE], window=64
    )

    async def nothing() -> None:
        pass

    await transport.start(on_message, nothing, lambda reason: None)
    await transport.subscribe("#")
    try:
        yield transport
    finally:
        await transport.stop()


def unexpected(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What was logged with a traceback: exceptions that nobody had thought of."""
    return [record.getMessage() for record in caplog.records if record.exc_info]


def test_ten_thousand_messages_of_garbage(
    broker_kind: BrokerKind, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    chance = random.Random(1)
    heard: list[Incoming] = []

    async def scenario() -> None:
        async with small_fleet(tmp_path, broker_kind, rounds=3, deadlines=PATIENT) as played:
            fleet, topics = played.fleet, all_topics(played.fleet)

            def hear(incoming: Incoming) -> None:
                if incoming.payload and len(heard) < 500:
                    heard.append(incoming)

            def garbage() -> Iterator[tuple[str, bytes]]:
                for _ in range(N_MESSAGES):
                    sample = chance.choice(heard)
                    topic = sample.topic if chance.random() < 0.5 else chance.choice(topics)
                    yield topic, mutated(sample.payload, chance)

            async with intruder(fleet, hear) as transport:
                playing = asyncio.create_task(played.play())
                while len(heard) < 20:
                    await asyncio.sleep(0.01)
                assert played.outcomes == []  # the first round is under way
                await publish_all(transport, garbage(), window=64)
                state = await playing
                # Words that mean nothing say nothing about who is there.
                assert fleet.registry.present == set(fleet.devices)
        assert [o.reason for o in played.outcomes] == ["", "", ""]
        assert (state.rounds_completed, state.rounds_abandoned) == (3, 0)
        assert fleet.sums_checked == 3
        assert fleet.sum_mismatches == 0
        assert unexpected(caplog) == []

    go(scenario())


def test_forged_chunks_cost_time_and_nothing_else(
    broker_kind: BrokerKind, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # Whoever sees a request or an announcement can be faster than the honest answer. Once for each
    # blob: somebody who keeps at it can starve a device, as a broker can that drops its messages.
    forged: list[bytes] = []

    async def scenario() -> None:
        async with small_fleet(tmp_path, broker_kind, rounds=2, deadlines=PATIENT) as played:
            fleet, own = played.fleet, played.fleet.topics
            sizes = {bytes(hashlib.sha256(b).digest()): len(b) for b in played.run.blobs()}
            tasks = set()

            def forge(topic: str, digest: bytes, size: int) -> None:
                if digest not in forged:
                    forged.append(digest)
                    blob = Blob(BlobDigest(digest), size, lambda offset, n: bytes(n))
                    task = asyncio.create_task(transport.publish(topic, chunks.frame(blob, 0)))
                    tasks.add(task)

            def hear(incoming: Incoming) -> None:
                device = own.device_of(incoming.topic)
                if device is None or incoming.topic != own.outbox(device):
                    return
                match wire.decode(incoming.payload).message:
                    case WantBlob(blob=digest) if digest in sizes:
                        forge(own.blob(digest), digest, sizes[digest])
                    case MaskedUpdate(payload=digest, payload_bytes=size):
                        forge(own.upload(device), digest, size)

            async with intruder(fleet, hear) as transport:
                state = await played.play()
                await asyncio.gather(*tasks)
        assert len(forged) == 3 + 2 * 4  # header, graph and first model; every update
        assert (state.rounds_completed, state.rounds_abandoned) == (2, 0)
        assert [len(names) for names in played.survivors] == [4, 4]
        assert fleet.sum_mismatches == 0
        assert unexpected(caplog) == []

    go(scenario())


def test_oversize_blobs_and_messages_are_refused(
    broker_kind: BrokerKind, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        async with small_fleet(tmp_path, broker_kind, rounds=2) as played:
            fleet, own = played.fleet, played.fleet.topics
            identity = SigningKey(fleet.seats[0].spec.identity_seed)
            announced = []

            def hear(incoming: Incoming) -> None:
                device = own.device_of(incoming.topic)
                if device is None or incoming.topic != own.outbox(device):
                    return
                message = wire.decode(incoming.payload).message
                if isinstance(message, MaskedUpdate) and message.device == "pi-1" and not announced:
                    # An enrolled device that announces a terabyte, under its own signature.
                    huge = msgspec.structs.replace(message, payload_bytes=1 << 40)
                    announced.append(
                        asyncio.create_task(
                            transport.publish(incoming.topic, wire.sign(huge, identity).envelope)
                        )
                    )

            async with intruder(fleet, hear) as transport:
                raw = paho.Client(CallbackAPIVersion.VERSION2, "raw")
                raw.username_pw_set(DEVICE, fleet.users[DEVICE])
                raw.connect("127.0.0.1", fleet.broker.port)
                raw.loop_start()
                playing = asyncio.create_task(played.play())
                # Chunks of blobs that are too large to exist, and packets beyond any limit: some
                # brokers drop the connection for those, others pass them on.
                for size in (1 << 31, (1 << 63) - 1):
                    header = struct.pack(">B32sQI", 1, bytes(32), size, 0)
                    for device in fleet.devices:
                        await transport.publish(own.upload(device), header + bytes(1000))
                for topic in (own.round, own.all, own.inbox("pi-2"), own.outbox("pi-2")):
                    raw.publish(topic, bytes(300_000), qos=0)
                state = await playing
                raw.loop_stop()
                raw.disconnect()
        assert len(announced) == 1
        assert (state.rounds_completed, state.rounds_abandoned) == (2, 0)
        assert [len(names) for names in played.survivors] == [4, 4]
        assert fleet.sum_mismatches == 0
        assert unexpected(caplog) == []

    go(scenario())


def all_topics(fleet: Fleet) -> list[str]:
    """Where a fleet listens, and some places where it does not."""
    own, name = fleet.topics, fleet.name
    kinds = (own.inbox, own.outbox, own.upload)
    return [
        *(topic(device) for device in (*fleet.devices, "pi-99") for topic in kinds),
        # Of devices that there are: one that is said to be there is waited for until the deadline.
        *(own.presence(device) for device in fleet.devices),
        *(own.round, own.all, own.blob(bytes(32))),
        *("covey", "covey/other/from/pi-1", f"covey/{name}", f"covey/{name}/from/pi-1/more"),
        *(f"covey/{name}/from/NOT A NAME", f"covey/{name}/up/" + "x" * 500),
    ]
