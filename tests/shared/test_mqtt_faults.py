"""The MQTT client against brokers that do everything wrong, and callbacks that raise."""

import asyncio
import logging
import random
import socket
import ssl
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from covey_shared.errors import LocalProtocolError, TransportError
from covey_shared.mqtt import MqttTransport, publish_all
from covey_shared.transport import MAX_PAYLOAD_BYTES, Will
from mqtt_clients import Draws, Listener, poll, run
from scripted_broker import (
    CONNACK,
    CONNECT,
    DISCONNECT,
    PUBACK,
    PUBLISH,
    SUBACK,
    SUBSCRIBE,
    UNSUBSCRIBE,
    ScriptedBroker,
    encode,
    encode_publish,
)
from tls_files import TlsFiles, make_tls_files


def listener(url: str, *, connected: bool = True, **more: object) -> Listener:
    more = {"backoff_base_s": 0.02, "backoff_cap_s": 0.05} | more
    return Listener(MqttTransport(url, "x", **more), connected=connected)  # type: ignore[arg-type]


def test_what_was_not_acknowledged_is_sent_again_after_the_reconnection() -> None:
    async def scenario() -> None:
        async with ScriptedBroker() as broker, listener(broker.url) as x:
            await x.transport.subscribe("a/#", "b")
            broker.acking = False
            sent = [f"{i}".encode() for i in range(3)]
            publishes = [asyncio.create_task(x.transport.publish("t", data)) for data in sent]
            await poll(lambda: len(broker.clients[0].of(PUBLISH)) == 3)
            broker.acking = True
            broker.clients[0].writer.close()
            await asyncio.gather(*publishes)
            await x.until_connected(2)
            first, second = broker.clients
            assert [p.payload for p in first.of(PUBLISH)] == sent
            assert [p.payload for p in second.of(PUBLISH)] == sent
            # the subscriptions stood before anything was published
            assert [p.kind for p in second.packets[:3]] == [CONNECT, SUBSCRIBE, PUBLISH]
            assert b"a/#" in second.packets[1].body
            assert len(x.reasons) == 1
            assert x.transport.bytes_out == 2 * len("t0t1t2")

    run(scenario())


def test_publishes_in_flight_are_bounded_and_frames_are_made_when_needed() -> None:
    made = 0

    def messages() -> Iterator[tuple[str, bytes]]:
        nonlocal made
        while made < 40:
            made += 1
            yield "t", b"x"

    async def scenario() -> None:
        async with ScriptedBroker() as broker:
            broker.acking = False
            transport = MqttTransport(broker.url, "x", window=4)
            async with Listener(transport):
                first = asyncio.create_task(transport.publish("first", b""))
                await poll(lambda: len(broker.clients[0].of(PUBLISH)) == 1)
                upload = asyncio.create_task(publish_all(transport, messages(), window=8))
                for acknowledged in range(41):
                    in_flight = min(acknowledged + 4, 41)
                    await poll(lambda: len(broker.clients[0].of(PUBLISH)) >= in_flight)  # noqa: B023
                    await asyncio.sleep(0.005)
                    packets = broker.clients[0].of(PUBLISH)
                    assert len(packets) == in_flight
                    assert made <= acknowledged + 8
                    mid = packets[acknowledged].mid
                    broker.clients[0].send(encode(PUBACK, mid.to_bytes(2, "big")))
                await upload
                await first
        assert made == 40

    run(scenario())


def test_publish_all_raises_what_the_source_raises() -> None:
    def messages() -> Iterator[tuple[str, bytes]]:
        yield "t", b"x"
        raise OSError("the spool is gone")

    async def scenario() -> None:
        async with ScriptedBroker() as broker, listener(broker.url) as x:
            with pytest.raises(OSError, match="spool is gone"):
                await publish_all(x.transport, messages())

    run(scenario())


def test_a_cancelled_publish_gives_its_place_back() -> None:
    async def scenario() -> None:
        async with ScriptedBroker() as broker, listener(broker.url, window=1) as x:
            broker.acking = False
            publish = asyncio.create_task(x.transport.publish("t", b"1"))
            await poll(lambda: bool(broker.clients[0].of(PUBLISH)))
            publish.cancel()
            broker.acking = True
            await x.transport.publish("t", b"2")

    run(scenario())


def test_exceptions_in_callbacks_are_logged_and_change_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def fail() -> None:
        raise ValueError("connected badly")

    def fail_on_message(message: object) -> None:
        raise KeyError("read badly")

    async def scenario() -> None:
        broker = ScriptedBroker()
        broker.greeting = encode_publish(b"a", b"1") + encode_publish(b"a", b"2", mid=2)
        async with broker:
            x = listener(broker.url, connected=False)
            x.on_connected = fail
            x.on_message = fail_on_message
            x.on_disconnected = lambda reason: 1 / 0
            async with x:
                await x.until_messages(2)
                # acknowledged all the same: a second delivery would fail again
                await poll(lambda: len(broker.clients[0].of(PUBACK)) == 2)
                await x.transport.publish("still", b"alive")
                broker.clients[0].writer.close()
                await x.until_connected(2)

    run(scenario())
    for text in ("connected badly", "read badly", "division by zero"):
        assert text in caplog.text


def test_on_connected_may_publish_through_a_lost_connection_and_is_never_run_twice_at_once() -> (
    None
):
    running = 0

    async def scenario() -> None:
        async with ScriptedBroker() as broker:
            broker.acking = False
            x = listener(broker.url, connected=False)

            async def on_connected() -> None:
                nonlocal running
                running += 1
                assert running == 1
                await x.transport.publish("presence", b"", retain=True)
                running -= 1

            x.on_connected = on_connected
            async with x:
                await poll(lambda: bool(broker.clients and broker.clients[0].of(PUBLISH)))
                broker.acking = True
                broker.clients[0].writer.close()
                await x.until_connected(2)
                await poll(lambda: len(broker.clients[1].of(PUBLISH)) == 2)
                assert running == 0

    run(scenario())


def test_stop_from_within_on_connected_does_not_wait_for_itself() -> None:
    async def scenario() -> None:
        async with ScriptedBroker() as broker:
            x = listener(broker.url, connected=False)
            x.on_connected = x.transport.stop
            async with x:
                await poll(lambda: bool(broker.clients and broker.clients[0].of(DISCONNECT)))

    run(scenario())


@pytest.mark.parametrize("graceful", [True, False])
def test_stop_says_goodbye_unless_told_not_to(graceful: bool) -> None:
    async def scenario() -> None:
        async with ScriptedBroker() as broker:
            x = listener(broker.url, will=Will("presence", b"gone"))
            async with x:
                broker.acking = False
                pending = asyncio.create_task(x.transport.publish("t", b""))
                await poll(lambda: bool(broker.clients[0].of(PUBLISH)))
                await x.transport.stop(graceful=graceful)
                with pytest.raises(TransportError, match="stopped"):
                    await pending
                assert x.reasons == []
                await poll(broker.clients[0].writer.is_closing)
                assert len(broker.clients[0].of(DISCONNECT)) == graceful
                assert b"presence\0\4gone" in broker.clients[0].of(CONNECT)[0].body

    run(scenario())


def test_stop_says_goodbye_also_before_the_subscriptions_stand() -> None:
    async def scenario() -> None:
        async with ScriptedBroker() as broker:
            broker.suback = None
            x = listener(broker.url, connected=False)
            await x.transport.subscribe("a")
            async with x:
                await poll(lambda: bool(broker.clients and broker.clients[0].of(SUBSCRIBE)))
                assert not x.transport.connected
            await poll(lambda: bool(broker.clients[0].of(DISCONNECT)))

    run(scenario())


def test_a_subscription_asked_for_while_others_are_renewed_is_not_forgotten() -> None:
    async def scenario() -> None:
        async with ScriptedBroker() as broker:
            broker.suback = None
            x = listener(broker.url, connected=False)
            await x.transport.subscribe("first")
            async with x:
                await poll(lambda: bool(broker.clients and broker.clients[0].of(SUBSCRIBE)))
                await x.transport.subscribe("second")
                packet = broker.clients[0].of(SUBSCRIBE)[0]
                broker.suback = 1
                broker._answer(broker.clients[0], packet)
                await x.until_connected()
                assert [p.body[4:-1] for p in broker.clients[0].of(SUBSCRIBE)] == [
                    b"first",
                    b"second",
                ]

    run(scenario())


def test_a_refused_subscription_names_the_filter_and_what_is_undone_stays_undone(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def scenario() -> None:
        async with ScriptedBroker() as broker, listener(broker.url) as x:
            broker.suback = 0x80
            with pytest.raises(TransportError, match="refuses the subscription to secret/#"):
                await x.transport.subscribe("secret/#")
            broker.suback = 1
            await x.transport.subscribe("mine")
            broker.suback = 0x80
            broker.clients[0].writer.close()
            await x.until_connected(2)
            assert len(broker.clients[1].of(SUBSCRIBE)) == 1
            assert b"secret" not in broker.clients[1].of(SUBSCRIBE)[0].body
            assert "refuses the subscription to mine" in caplog.text
            await x.transport.unsubscribe("mine")
            assert len(broker.clients[1].of(UNSUBSCRIBE)) == 1
            broker.clients[1].writer.close()
            await x.until_connected(3)
            assert broker.clients[2].of(SUBSCRIBE) == []

    run(scenario())


@pytest.mark.parametrize("topic_filter", ["", "a/#/b", "a#", "a+/b", "a\0"])
def test_what_is_not_a_filter_is_refused_here(topic_filter: str) -> None:
    async def scenario() -> None:
        with pytest.raises(LocalProtocolError, match="not a topic filter"):
            await MqttTransport("mqtt://h", "x").subscribe("good", topic_filter)

    run(scenario())


@pytest.mark.parametrize("topic", ["", "a/+", "a/#", "a\0", "a" * 65536])
def test_what_is_not_a_topic_is_refused_here(topic: str) -> None:
    async def scenario() -> None:
        with pytest.raises(LocalProtocolError, match="not a topic"):
            await MqttTransport("mqtt://h", "x").publish(topic, b"")
        with pytest.raises(LocalProtocolError):
            MqttTransport("mqtt://h", "x", will=Will(topic, b""))

    run(scenario())


@pytest.mark.parametrize("arguments", [{"client_id": ""}, {"keepalive_s": 0}, {"window": 0}])
def test_what_cannot_work_is_refused_here(arguments: dict[str, object]) -> None:
    with pytest.raises(LocalProtocolError):
        MqttTransport("mqtt://h", **({"client_id": "x"} | arguments))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (1, "closed the connection before letting us in"),
        (2, "refuses the client id 'x'"),
        (3, "refuses the connection: server unavailable"),
        (4, "refuses user None; check user name and password"),
        (5, "refuses user None; check user name and password"),
        (6, "refuses the connection: unspecified error"),
    ],
)
def test_why_the_broker_refuses_is_said(code: int, reason: str) -> None:
    async def scenario() -> None:
        async with ScriptedBroker() as broker:
            broker.connack = code
            async with listener(broker.url, connected=False) as x:
                await x.until_reasons(2)
                assert all(reason in given for given in x.reasons)
                broker.connack = 0
                await x.until_connected()

    run(scenario())


def test_a_connection_that_ends_at_once_counts_as_a_failure() -> None:
    async def scenario() -> None:
        rng = Draws(lambda upper: 0.0)
        async with ScriptedBroker() as broker:
            broker.close_on = PUBLISH
            x = listener(broker.url, connected=False, rng=rng, backoff_base_s=10, backoff_cap_s=999)
            x.on_connected = lambda: x.transport.publish("t", b"")
            async with x:
                await x.until_reasons(8)
            assert [upper for _, upper in rng.bounds[:8]] == [10, 20, 40, 80, 160, 320, 640, 999]
            assert "another client may be using the client id 'x'" in x.reasons[0]

    run(scenario())


def test_a_fleet_s_pace_is_the_least_that_the_back_off_spreads() -> None:
    """The broker may be gone for longer than the window: the later attempts are spread as well."""

    async def scenario() -> None:
        rng = Draws(lambda upper: 0.0)
        async with ScriptedBroker() as broker:
            x = listener(broker.url, rng=rng, backoff_base_s=1, backoff_cap_s=16)
            async with x:
                x.transport.reconnect_within(6.0)
                broker.connack = 5
                broker.clients[-1].writer.close()
                await x.until_reasons(6)
            assert [upper for _, upper in rng.bounds[:6]] == [6, 6, 6, 8, 16, 16]

    run(scenario())


def test_a_pace_does_not_make_a_short_connection_a_failure() -> None:
    async def scenario() -> None:
        rng = Draws(lambda upper: 0.0)
        async with ScriptedBroker() as broker:
            x = listener(broker.url, rng=rng, backoff_base_s=0.001, backoff_cap_s=0.001)
            async with x:
                x.transport.reconnect_within(600.0)
                for n in range(1, 4):
                    await asyncio.sleep(0.01)
                    broker.clients[-1].writer.close()
                    await x.until_connected(n + 1)
            assert [upper for _, upper in rng.bounds] == [600.0] * 3
            x.transport.reconnect_within(0.0)
            assert x.transport._ceiling_s(3) == 0.001

    run(scenario())


def test_a_connection_that_stood_starts_the_back_off_anew() -> None:
    async def scenario() -> None:
        rng = Draws(lambda upper: 0.0)
        async with ScriptedBroker() as broker:
            broker.connack = 5
            x = listener(broker.url, connected=False, rng=rng, backoff_base_s=0.001)
            async with x:
                await x.until_reasons(4)
                broker.connack = 0
                await x.until_connected()
                failed = len(x.reasons)
                assert rng.bounds[failed - 1][1] > 0.005
                # longer than the cap of 0.05 s
                await asyncio.sleep(0.1)
                broker.clients[-1].writer.close()
                await x.until_reasons(failed + 1)
            assert rng.bounds[failed] == (0, 0.001)

    run(scenario())


def test_a_broker_that_never_answers() -> None:
    async def scenario() -> None:
        async with ScriptedBroker() as broker:
            broker.connack = None
            async with listener(broker.url, connected=False, connect_timeout_s=0.1) as x:
                await x.until_reasons()
                assert "no answer from 127.0.0.1" in x.reasons[0]
                assert "within 0.1 s" in x.reasons[0]
                broker.connack, broker.suback = 0, None
                await x.transport.subscribe("a")
                await x.until(lambda: "does not answer subscriptions" in x.reasons[-1])

    run(scenario())


def test_a_broker_that_stops_answering_pings() -> None:
    async def scenario() -> None:
        async with ScriptedBroker() as broker, listener(broker.url, keepalive_s=1) as x:
            # two rounds of pings
            await asyncio.sleep(2.5)
            assert x.reasons == []
            broker.pinging = False
            await x.until_reasons()
            assert "stopped answering" in x.reasons[0]

    run(scenario())


@pytest.mark.parametrize(
    "garbage",
    [
        b"\0",
        b"\xff\xff\xff\xff\xff",
        encode(CONNACK, b""),
        encode(PUBLISH, b"\xff\xff"),
        encode(PUBLISH, b"\0\1a", flags=6),
        encode(SUBSCRIBE, b"\0\1"),
        encode(PUBACK, b"\0"),
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
    ],
)
def test_bytes_that_are_not_mqtt_end_the_connection_and_nothing_else(garbage: bytes) -> None:
    async def scenario() -> None:
        async with ScriptedBroker() as broker, listener(broker.url) as x:
            broker.clients[0].send(garbage + bytes(64))
            await x.until_connected(2)
            assert len(x.reasons) == 1
            await x.transport.publish("t", b"")

    run(scenario())


def test_whatever_bytes_come_the_client_lives() -> None:
    rng = random.Random(20)
    valid = [encode_publish(b"a/b", b"payload"), encode(PUBACK, b"\0\1"), encode(SUBACK, b"\0\1\1")]

    def mutated() -> bytes:
        data = bytearray(rng.choice(valid) + rng.choice(valid))
        for _ in range(rng.randrange(1, 6)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        return bytes(data[: rng.randrange(1, len(data) + 1)])

    async def scenario() -> None:
        async with ScriptedBroker() as broker:
            broker.greeting = mutated()
            broker.close_on = PUBLISH
            x = listener(broker.url, connected=False, rng=Draws(lambda upper: 0.0))
            await x.transport.subscribe("a")
            pending = asyncio.create_task(x.transport.publish("t", b""))
            async with x:
                for n in range(300):
                    broker.greeting = mutated() if n % 2 else rng.randbytes(rng.randrange(1, 99))
                    known = len(broker.clients)
                    if known:
                        broker.clients[-1].writer.close()
                    await poll(lambda: len(broker.clients) > known)  # noqa: B023
                    await poll(lambda: bool(broker.clients[-1].packets))
                broker.greeting, broker.close_on = b"", None
                broker.clients[-1].writer.close()
                await pending
                assert x.transport.connected

    run(scenario())


def test_answers_to_nothing_and_odd_topics_are_ignored(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        async with ScriptedBroker() as broker, listener(broker.url) as x:
            broker.clients[0].send(
                encode(PUBACK, b"\x12\x34")
                + encode(CONNACK, b"\0\0")
                + encode_publish(b"\xff\xfe", b"not UTF-8")
                + encode_publish(b"a", bytes(MAX_PAYLOAD_BYTES + 1))
                + encode_publish(b"b", b"good")
            )
            await x.until_messages(1)
            assert x.topics == ["b"]
            assert x.reasons == []

    with caplog.at_level(logging.WARNING):
        run(scenario())
    assert "not UTF-8" in caplog.text
    assert "dropped a message of 122881 bytes on a" in caplog.text


def test_a_giant_packet_is_not_read() -> None:
    async def scenario() -> None:
        async with ScriptedBroker() as broker, listener(broker.url) as x:
            # says 200 MB, and nothing of it need come
            broker.clients[0].send(b"\x32\x80\x84\xaf\x5f" + bytes(100))
            await x.until_reasons()
            assert "a packet of 200000000 bytes, more than 1048576" in x.reasons[0]
            await x.until_connected(2)

    run(scenario())


@pytest.fixture(scope="module")
def tls_files(tmp_path_factory: pytest.TempPathFactory) -> TlsFiles:
    return make_tls_files(tmp_path_factory.mktemp("tls"))


def server_side(files: TlsFiles) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(files.certificate, files.key)
    return context


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_tls(tls_files: TlsFiles, host: str) -> None:
    async def scenario() -> None:
        broker = ScriptedBroker(server_side(tls_files))
        # The small ones share the last TLS record: once it is decrypted, nothing wakes the event
        # loop for those that are still in it.
        small = b"".join(encode_publish(b"s", b"%d" % i, mid=i + 2) for i in range(200))
        broker.greeting = encode_publish(b"large", bytes(MAX_PAYLOAD_BYTES)) + small
        async with broker:
            trust = ssl.create_default_context(cafile=tls_files.authority)
            url = broker.url.replace("127.0.0.1", host)
            async with listener(url, tls=trust) as x:
                await x.until_messages(201)
                assert [m.payload for m in x.messages[1:]] == [b"%d" % i for i in range(200)]
                await publish_all(
                    x.transport, (("up", bytes(MAX_PAYLOAD_BYTES)) for _ in range(20))
                )
                assert len(broker.clients[0].of(PUBLISH)) == 20

    run(scenario())


def test_tls_needs_the_right_authority_and_the_right_name(tls_files: TlsFiles) -> None:
    async def scenario() -> None:
        async with ScriptedBroker(server_side(tls_files)) as broker:
            # the system's authorities do not know it
            async with listener(broker.url, connected=False) as x:
                await x.until_reasons()
                assert "does not verify" in x.reasons[0]
                assert "self-signed" in x.reasons[0] or "issuer" in x.reasons[0]
            trust = ssl.create_default_context(cafile=tls_files.authority)
            url = broker.url.replace("127.0.0.1", "127.0.0.2")
            async with listener(url, connected=False, tls=trust) as x:
                await x.until_reasons()
                assert "does not verify" in x.reasons[0] or "refused" in x.reasons[0]
            assert not any(client.packets for client in broker.clients)

    run(scenario())


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (b"HTTP/1.1 400 Bad Request", "is this its TLS port?"),
        (b"", "no answer from 127.0.0.1"),
        (None, "is this its TLS port?"),
    ],
    ids=["something else", "nothing", "closes"],
)
def test_tls_where_none_is_spoken(answer: bytes | None, reason: str) -> None:
    async def scenario() -> None:
        # One that is forgotten is closed, from Python 3.13 on.
        kept: list[asyncio.StreamWriter] = []

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            kept.append(writer)
            await reader.read(1)
            if answer is None:
                writer.close()
            else:
                writer.write(answer)

        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            url = f"mqtts://127.0.0.1:{server.sockets[0].getsockname()[1]}"
            async with listener(url, connected=False, connect_timeout_s=0.3) as x:
                await x.until_reasons()
                assert reason in x.reasons[0]
                assert "TLS port" in x.reasons[0]
            for writer in kept:
                writer.close()

    run(scenario())


def test_a_reset_in_the_midst_of_a_handshake_is_not_the_last_attempt() -> None:
    """As of a proxy or a firewall that turns clients away for a while."""

    async def scenario() -> None:
        async def reset(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.read(1)
            connection = writer.get_extra_info("socket")
            # With no time to linger, closing sends a reset.
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()

        async with await asyncio.start_server(reset, "127.0.0.1", 0) as server:
            url = f"mqtts://127.0.0.1:{server.sockets[0].getsockname()[1]}"
            async with listener(url, connected=False) as x:
                await x.until_reasons(3)
                assert "the other side closed the connection" in x.reasons[0]

    run(scenario())


def test_no_tls_where_it_is_wanted(tls_files: TlsFiles) -> None:
    async def scenario() -> None:
        async with ScriptedBroker(server_side(tls_files)) as broker:
            x = listener(broker.url.replace("mqtts:", "mqtt:"), connected=False)
            async with x:
                await x.until_reasons()
            assert "does it want TLS (mqtts://)?" in x.reasons[0]

    run(scenario())


def test_a_handshake_that_hangs_does_not_stall_the_event_loop() -> None:
    async def scenario() -> None:
        async def say_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            reached.set()
            await reader.read()

        reached = asyncio.Event()
        async with await asyncio.start_server(say_nothing, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            x = listener(f"mqtts://127.0.0.1:{port}", connected=False, connect_timeout_s=60)
            async with x:
                await reached.wait()
                # a client that blocked would still be doing so
                async with ScriptedBroker() as broker, listener(broker.url) as other:
                    await other.transport.publish("t", b"")
                assert x.reasons == []

    run(scenario())


def test_no_descriptor_is_left_behind(tmp_path: Path) -> None:
    def descriptors() -> int:
        return sum(1 for _ in Path("/proc/self/fd").iterdir())

    async def scenario() -> None:
        async with ScriptedBroker() as broker:
            before = descriptors()
            broker.connack = 5
            async with listener(broker.url, connected=False) as x:
                await x.until_reasons(20)
            await poll(lambda: all(client.writer.is_closing() for client in broker.clients))
            await poll(lambda: descriptors() <= before)

    run(scenario())
