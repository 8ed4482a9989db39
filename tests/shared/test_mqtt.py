"""The MQTT client, over real brokers of both kinds. Misbehaving ones: test_mqtt_faults."""

import asyncio
import hashlib
import random

import pytest
from paho.mqtt import publish as paho_publish

from brokers import PASSWORD, USER, Brokers, client
from covey_coordinator.broker import RunningBroker
from covey_shared import chunks
from covey_shared.errors import ConfigError, LocalProtocolError, TransportError
from covey_shared.mqtt import BrokerUrl, MqttTransport, parse_broker_url, publish_all
from covey_shared.transport import MAX_PAYLOAD_BYTES, Incoming, Transport, Will
from mqtt_clients import Draws, Listener, poll, run
from scripted_broker import ScriptedBroker


def test_it_is_a_transport() -> None:
    transport: Transport = MqttTransport("mqtt://127.0.0.1", "x")
    assert transport is not None


class TestUrl:
    @pytest.mark.parametrize(
        ("url", "parts"),
        [
            ("mqtt://host", BrokerUrl("host", 1883)),
            ("mqtt://host/", BrokerUrl("host", 1883)),
            ("mqtts://host", BrokerUrl("host", 8883, tls=True)),
            ("mqtt://u:p@host:1", BrokerUrl("host", 1, username="u", password="p")),
            ("mqtt://u@10.0.0.1:2", BrokerUrl("10.0.0.1", 2, username="u")),
            ("mqtts://u:a%40b%2Fc%3A@[::1]:9", BrokerUrl("::1", 9, True, "u", "a@b/c:")),
        ],
    )
    def test_parts(self, url: str, parts: BrokerUrl) -> None:
        assert parse_broker_url(url) == parts

    @pytest.mark.parametrize(
        ("url", "named"),
        [
            ("", "starts with mqtt://"),
            ("host:1883", "starts with mqtt://"),
            ("u:secret@host", "starts with mqtt://"),
            ("http://u:secret@host", "http://...@host: it starts with mqtt://"),
            ("mqtt://", "host is missing"),
            ("mqtt://u:secret@:1883", "host is missing"),
            ("mqtt://host:0", "port 0"),
            ("mqtt://u:secret@host:99999", "port is a number"),
            ("mqtt://host:mqtt", "port is a number"),
            ("mqtt://u:secret/@host", "percent-encoded"),
            ("mqtt://[::1", "brackets"),
            ("mqtt://u:secret@host/topic", "nothing follows the port"),
            ("mqtt://host?x=secret@", "nothing follows the port"),
            ("mqtt://:secret@host", "a password without a user"),
            ("mqtt://u:secret%ff@host", "not UTF-8"),
            ("mqtt://u:sec ret@host", "a space"),
            ("mqtt://u:sec\nret@host", "control character"),
        ],
    )
    def test_what_is_wrong_is_named_and_the_password_is_not(self, url: str, named: str) -> None:
        with pytest.raises(ConfigError) as caught:
            parse_broker_url(url)
        assert named in str(caught.value)
        assert "secret" not in str(caught.value)

    def test_neither_str_nor_repr_shows_the_password(self) -> None:
        url = parse_broker_url("mqtts://user:secret@host:1")
        assert "secret" not in str(url) + repr(url)
        assert str(url) == "mqtts://host:1"
        assert BrokerUrl("::1", 1883).address == "[::1]:1883"


def test_publish_and_subscribe(broker: RunningBroker) -> None:
    async def scenario() -> None:
        async with client(broker, "a") as a, client(broker, "b") as b:
            await b.transport.subscribe("one/+/ä", "two/#")
            await a.transport.publish("one/x/ä", b"\0\xff")
            await a.transport.publish("other", b"not for b")
            await a.transport.publish("two", b"")
            await a.transport.publish("two/y/z", bytes(MAX_PAYLOAD_BYTES))
            await b.until_messages(3)
            await b.transport.unsubscribe("one/+/ä")
            await a.transport.publish("one/x/ä", b"not any more")
            await a.transport.publish("two/end", b"")
            await b.until(lambda: b.topics[-1] == "two/end")
        assert sorted((m.topic, m.payload, m.retained) for m in b.messages) == [
            ("one/x/ä", b"\0\xff", False),
            ("two", b"", False),
            ("two/end", b"", False),
            ("two/y/z", bytes(MAX_PAYLOAD_BYTES), False),
        ]
        assert b.transport.bytes_in == MAX_PAYLOAD_BYTES + 2 + len("one/x/ätwotwo/endtwo/y/z")

    run(scenario())


def test_retained_messages_come_first_and_say_so(broker: RunningBroker) -> None:
    async def scenario() -> None:
        async with client(broker, "a") as a, client(broker, "b") as b, client(broker, "c") as c:
            await a.transport.publish("kept/1", b"old", retain=True)
            await a.transport.publish("kept/1", b"new", retain=True)
            await b.transport.subscribe("kept/+")
            await b.until_messages(1)
            await a.transport.publish("kept/1", b"live", retain=True)
            await b.until_messages(2)
            # an empty one clears it
            await a.transport.publish("kept/1", b"", retain=True)
            await c.transport.subscribe("kept/+")
            await a.transport.publish("kept/2", b"end")
            await c.until_messages(1)
        assert [(m.payload, m.retained) for m in b.messages[:2]] == [
            (b"new", True),
            (b"live", False),
        ]
        assert c.topics == ["kept/2"]

    run(scenario())


@pytest.mark.parametrize("graceful", [False, True])
def test_the_will_is_published_only_when_the_connection_just_ends(
    broker: RunningBroker, graceful: bool
) -> None:
    topic = f"presence/{graceful}"

    async def scenario() -> None:
        async with client(broker, "watcher") as watcher, client(broker, "other") as other:
            await watcher.transport.subscribe("presence/#")
            async with client(broker, "mortal", will=Will(topic, b"gone")) as mortal:
                await mortal.transport.stop(graceful=graceful)
            if graceful:
                # a will would have come before this
                await asyncio.sleep(0.2)
                await other.transport.publish("presence/end", b"")
            await watcher.until_messages(1)
            async with client(broker, "late") as late:
                await late.transport.subscribe(topic)
                await late.transport.subscribe("presence/late")
                await other.transport.publish("presence/late", b"")
                await late.until(lambda: "presence/late" in late.topics)
            # a set: amqtt sends it twice to those who subscribe just then
            kept = {(m.topic, m.retained) for m in late.messages}
            if graceful:
                assert watcher.topics[0] == "presence/end"
                assert kept == {("presence/late", False)}
            else:
                assert watcher.topics[0] == topic
                assert kept == {(topic, True), ("presence/late", False)}
            await other.transport.publish(topic, b"", retain=True)

    run(scenario())


class Download:
    """A subscriber that puts a blob together."""

    def __init__(self, listener: Listener, blob: chunks.Blob) -> None:
        self.listener = listener
        self.sink = chunks.MemorySink(blob.size)
        self.assembly = chunks.Assembly(blob.digest, blob.size, self.sink)
        listener.on_message = self.add

    def add(self, message: Incoming) -> None:
        self.assembly.add(chunks.decode_frame(message.payload))
        self.listener.messages.clear()

    def complete(self) -> bool:
        return self.assembly.complete


def test_five_megabytes_to_twenty_subscribers(broker: RunningBroker) -> None:
    data = hashlib.shake_256(b"model").digest(5_000_000)
    blob = chunks.blob_of(data)

    async def scenario() -> None:
        async with client(broker, "publisher") as publisher:
            downloads = [Download(client(broker, f"subscriber-{i}"), blob) for i in range(20)]
            for download in downloads:
                await download.listener.__aenter__()
                await download.listener.transport.subscribe("blob")
            await publish_all(
                publisher.transport, (("blob", frame) for frame in chunks.split(blob))
            )
            for download in downloads:
                await download.listener.until(download.complete)
                download.assembly.verify()
                assert download.sink.data == data
                await download.listener.transport.stop()

    run(scenario())


def test_a_broker_that_was_killed_and_comes_back(brokers: Brokers) -> None:
    async def scenario() -> None:
        broker = await brokers.start()
        async with client(broker, "a") as a, client(broker, "b") as b:
            await b.transport.subscribe("news/#")
            await a.transport.publish("news/before", b"")
            await b.until(lambda: b.topics == ["news/before"])
            await broker.kill()
            await a.until_reasons()
            await b.until_reasons()
            assert "closed the connection" in a.reasons[0]
            pending = asyncio.create_task(a.transport.publish("news/pending", b""))
            # asked for while nobody is there to grant it
            await b.transport.subscribe("more")
            await b.transport.unsubscribe("news/nothing")
            await asyncio.sleep(0.05)
            assert not pending.done()
            assert a.n_connected == b.n_connected == 1
            await brokers.start(port=broker.port)
            await pending
            await a.until_connected(2)
            await b.until_connected(2)
            # b may have come back after the pending message; nothing relies on a queue
            await a.transport.publish("news/after", b"")
            await a.transport.publish("more", b"")
            await b.until(lambda: {"news/after", "more"} <= set(b.topics))

    run(scenario())


def test_the_wrong_password_is_refused_and_said(broker: RunningBroker) -> None:
    async def scenario() -> None:
        for username, password in ((USER, "wrong"), ("nobody", PASSWORD)):
            async with client(
                broker, "x", username=username, password=password, connected=False
            ) as x:
                await x.until_reasons(2)
                assert all(f"refuses user '{username}'" in reason for reason in x.reasons)
                assert all("next try in 0." in reason for reason in x.reasons)
                assert x.n_connected == 0
                assert not x.transport.connected

    run(scenario())


def test_anonymous_clients_are_refused(broker: RunningBroker) -> None:
    async def scenario() -> None:
        listener = Listener(MqttTransport(broker.url, "x", backoff_base_s=0.01), connected=False)
        async with listener as x:
            await x.until_reasons()
            assert "refuses user None" in x.reasons[0]

    run(scenario())


def test_user_and_password_may_stand_in_the_url(broker: RunningBroker) -> None:
    async def scenario() -> None:
        password = PASSWORD.replace(" ", "%20")
        url = f"mqtt://{USER}:{password}@localhost:{broker.port}"
        async with Listener(MqttTransport(url, "x")) as x:
            await x.transport.publish("a", b"")

    run(scenario())


def test_oversize_messages_are_dropped_on_both_sides(
    broker: RunningBroker, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        async with client(broker, "a") as a:
            with pytest.raises(LocalProtocolError, match=r"122881 bytes for big: at most 122880"):
                await a.transport.publish("big", bytes(MAX_PAYLOAD_BYTES + 1))
            assert a.transport.bytes_out == 0
            await a.transport.subscribe("big", "small")
            # a stranger that does not keep to our limit
            await asyncio.to_thread(
                paho_publish.single,
                "big",
                bytes(MAX_PAYLOAD_BYTES + 1),
                qos=1,
                port=broker.port,
                hostname="127.0.0.1",
                auth={"username": USER, "password": PASSWORD},
            )
            await a.transport.publish("small", b"")
            await a.until(lambda: "small" in a.topics)
            await poll(lambda: "dropped a message of 122881 bytes on big" in caplog.text)
            assert a.topics == ["small"]

    run(scenario())


def test_two_hundred_clients_in_one_process(broker: RunningBroker) -> None:
    async def scenario() -> None:
        listeners = [client(broker, f"fleet-{i}", connected=False) for i in range(200)]
        for i, listener in enumerate(listeners):
            await listener.transport.subscribe(f"fleet/{i}", "fleet/all")
            await listener.__aenter__()
        async with client(broker, "caller") as caller:
            for listener in listeners:
                await listener.until_connected()
            await caller.transport.publish("fleet/all", b"")
            await publish_all(caller.transport, ((f"fleet/{i}", b"") for i in range(200)))
            for i, listener in enumerate(listeners):
                await listener.until_messages(2)
                assert set(listener.topics) == {f"fleet/{i}", "fleet/all"}
                assert listener.reasons == []
        await asyncio.gather(*(listener.transport.stop() for listener in listeners))

    run(scenario())


def test_nothing_listens_there() -> None:
    async def scenario() -> None:
        rng = Draws(lambda upper: upper / 100)
        async with ScriptedBroker() as gone:
            url = gone.url
        transport = MqttTransport(url, "x", rng=rng, backoff_base_s=0.1, backoff_cap_s=1.0)
        async with Listener(transport, connected=False) as x:
            await x.until_reasons(6)
        assert rng.bounds[:6] == [(0, 0.1), (0, 0.2), (0, 0.4), (0, 0.8), (0, 1.0), (0, 1.0)]
        address = url.removeprefix("mqtt://")
        assert x.reasons[0] == (
            f"no broker at {address}: connection refused; is it running?; next try in 0.0 s"
        )

    run(scenario())


def test_the_defaults_wait_up_to_a_minute_and_a_seed_repeats_them() -> None:
    transports = [MqttTransport("mqtt://h", "x", rng=random.Random(7)) for _ in range(2)]
    assert [transports[0]._ceiling_s(n) for n in (0, 1, 5, 6, 10_000)] == [1, 2, 32, 60, 60]
    draws = [[t._rng.uniform(0, t._ceiling_s(n)) for n in range(9)] for t in transports]
    assert draws[0] == draws[1]


def test_an_unknown_host_is_named() -> None:
    async def scenario() -> None:
        transport = MqttTransport("mqtt://no-such-host.invalid", "x", backoff_base_s=0.01)
        async with Listener(transport, connected=False) as x:
            await x.until_reasons()
            assert "cannot look up the host no-such-host.invalid" in x.reasons[0]

    run(scenario())


def test_stop_ends_what_waits(broker: RunningBroker) -> None:
    async def scenario() -> None:
        async with ScriptedBroker() as gone:
            url = gone.url
        x = Listener(MqttTransport(url, "x"), connected=False)
        await x.__aenter__()
        waiting = [asyncio.create_task(x.transport.publish("a", b"")) for _ in range(20)]
        await x.until_reasons()
        await x.transport.stop()
        results = await asyncio.gather(*waiting, return_exceptions=True)
        assert all(isinstance(result, TransportError) for result in results)
        with pytest.raises(TransportError, match="stopped"):
            await x.transport.publish("a", b"")
        with pytest.raises(TransportError, match="stopped"):
            await x.transport.subscribe("a")
        with pytest.raises(TransportError, match="stopped"):
            await x.transport.unsubscribe("a")
        with pytest.raises(LocalProtocolError, match="starts once"):
            await x.__aenter__()
        await x.transport.stop()

    run(scenario())
