"""What brokers keep for a client that is away, and what it makes of that when it is back."""

import asyncio
from typing import Any

import pytest

from brokers import Brokers, client
from covey_coordinator.broker import RunningBroker
from covey_shared.mqtt import MqttTransport
from mqtt_clients import Listener, run
from scripted_broker import SUBSCRIBE, UNSUBSCRIBE, ScriptedBroker

MAX_QUEUED = 1000 + 20
"""Of one client: what mosquitto's configuration allows to wait, and to be under way."""


def lasting(broker: RunningBroker, client_id: str = "x", **more: Any) -> Listener:
    """A client whose messages the broker keeps while it is away."""
    return client(broker, client_id, **({"session_s": 600.0} | more))


async def cut(listener: Listener, *, until: asyncio.Event) -> None:
    """Lose the connection, and do not come back before the event."""
    transport = listener.transport
    establish = transport._establish

    async def held(connection: Any) -> Any:
        await until.wait()
        return await establish(connection)

    transport._establish = held  # type: ignore[method-assign]
    lost = len(listener.reasons)
    transport._current._drop("the test cut it")  # type: ignore[union-attr]
    await listener.until_reasons(lost + 1)


def age(listener: Listener, seconds: float) -> None:
    """As if it had lost its connection that much earlier."""
    transport = listener.transport
    assert transport._lost_at_s is not None
    transport._lost_at_s -= seconds


async def fence(sender: Listener, receiver: Listener, topic: str = "fence") -> None:
    """What was published before, and is to come, has come."""
    await receiver.transport.subscribe(topic)
    await sender.transport.publish(topic, b"")
    await receiver.until(lambda: topic in receiver.topics)


def test_what_came_while_away_is_delivered(broker: RunningBroker) -> None:
    async def scenario() -> None:
        back = asyncio.Event()
        async with client(broker, "a") as a, lasting(broker) as x:
            await x.transport.subscribe("away/+")
            await cut(x, until=back)
            for i in range(20):
                await a.transport.publish(f"away/{i}", b"word")
            assert x.messages == []
            back.set()
            await x.until_messages(20)
            assert x.topics[:20] == [f"away/{i}" for i in range(20)]
            if broker.kind == "mosquitto":  # amqtt passes them off as retained
                assert not any(m.retained for m in x.messages)

    run(scenario())


def test_a_client_keeps_no_session_unless_it_asks_for_one(broker: RunningBroker) -> None:
    async def scenario() -> None:
        back = asyncio.Event()
        async with client(broker, "a") as a, client(broker, "plain") as x:
            await x.transport.subscribe("plain/+")
            await cut(x, until=back)
            await a.transport.publish("plain/missed", b"")
            back.set()
            await x.until_connected(2)
            await fence(a, x)
            assert x.topics == ["fence"]

    run(scenario())


def test_a_broker_that_forgot_its_sessions_is_subscribed_to_again(brokers: Brokers) -> None:
    async def scenario() -> None:
        broker = await brokers.start()
        async with client(broker, "a") as a, lasting(broker) as x:
            await x.transport.subscribe("t/+")
            await broker.kill()
            for path in broker.directory.glob("mosquitto.db*"):
                path.unlink()
            await brokers.start(port=broker.port)
            await x.until_connected(2)
            assert not x.transport._current.session_present  # type: ignore[union-attr]
            await a.transport.publish("t/1", b"")
            await x.until_messages(1)

    run(scenario())


# amqtt sends all of a queue at once, and puts no limit to one: it is for clients that we started ourselves.
only_mosquitto = pytest.mark.parametrize(
    "broker_kind", ["mosquitto"], indirect=True, scope="session"
)


@only_mosquitto
def test_what_is_old_is_discarded(broker: RunningBroker) -> None:
    """Hours of it would hold up what is new."""

    async def scenario() -> None:
        back = asyncio.Event()
        async with client(broker, "a") as a, lasting(broker) as x:
            await x.transport.subscribe("old/#")
            await cut(x, until=back)
            for i in range(200):
                await a.transport.publish(f"old/{i}", bytes(50_000))
            age(x, 601.0)
            back.set()
            await x.until_connected(2)
            came = len(x.messages)
            await a.transport.publish("old/new", b"")
            await x.until(lambda: "old/new" in x.topics)
            assert came < 200, "more than what was under way"
            assert x.topics[came:] == ["old/new"]

    run(scenario())


def test_another_process_of_the_same_client_begins_anew(broker: RunningBroker) -> None:
    """It does not know what its predecessor subscribed to, and could not unsubscribe."""

    async def scenario() -> None:
        async with client(broker, "a") as a:
            async with lasting(broker) as x:
                await x.transport.subscribe("blob/1", "all")
            await a.transport.publish("all", b"missed")
            async with lasting(broker) as x:
                await x.transport.subscribe("all")
                await a.transport.publish("blob/1", b"")
                await a.transport.publish("all", b"new")
                await x.until(lambda: any(m.payload == b"new" for m in x.messages))
                assert "blob/1" not in x.topics

    run(scenario())


def test_what_is_unsubscribed_from_while_away_is_not_kept(broker: RunningBroker) -> None:
    async def scenario() -> None:
        back = asyncio.Event()
        async with client(broker, "a") as a, lasting(broker) as x:
            await x.transport.subscribe("blob/1", "blob/2", "blob/3")
            await cut(x, until=back)
            await x.transport.unsubscribe("blob/1", "blob/2")
            await x.transport.subscribe("blob/2")
            back.set()
            await x.until_connected(2)
            for i in (1, 2, 3):
                await a.transport.publish(f"blob/{i}", b"")
            await fence(a, x)
            assert x.topics == ["blob/2", "blob/3", "fence"]
            assert x.transport._dropped == {}

    run(scenario())


@only_mosquitto
def test_the_queue_of_an_absent_client_is_bounded(broker: RunningBroker) -> None:
    """And what the broker retains comes all the same, as does what is published from then on."""

    async def scenario() -> None:
        back = asyncio.Event()
        async with client(broker, "a") as a, lasting(broker) as x:
            await x.transport.subscribe("flood", "call")
            await cut(x, until=back)
            for _ in range(6):
                await asyncio.gather(*(a.transport.publish("flood", b"x" * 99) for _ in range(400)))
            await a.transport.publish("call", b"dropped", retain=True)
            back.set()
            await x.until_connected(2)
            await x.until(lambda: "call" in x.topics)
            await fence(a, x)
            assert 900 < x.topics.count("flood") <= MAX_QUEUED
            await a.transport.publish("call", b"", retain=True)

    if (
        broker.kind == "mosquitto"
    ):  # amqtt has no limit: it is for clients that we started ourselves
        run(scenario())


def test_unsubscribing_while_it_reconnects() -> None:
    """The filter may be part of what it has just asked for."""

    async def scenario() -> None:
        async with ScriptedBroker() as broker:
            transport = MqttTransport(broker.url, "x", backoff_base_s=0.01, session_s=60.0)
            await_suback = asyncio.Event()
            async with Listener(transport) as x:
                await transport.subscribe("a", "b")
                connection_subscribe = transport._current.__class__.subscribe  # type: ignore[union-attr]

                async def slow(self: Any, filters: Any) -> Any:
                    answer = await connection_subscribe(self, filters)
                    await await_suback.wait()
                    return answer

                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(transport._current.__class__, "subscribe", slow)
                    broker.clients[-1].writer.close()
                    while len(broker.clients) < 2 or not broker.clients[-1].of(SUBSCRIBE):
                        await asyncio.sleep(0.005)
                    await transport.unsubscribe("a")
                    await_suback.set()
                    await x.until_connected(2)
                (gone,) = broker.clients[-1].of(UNSUBSCRIBE)
                assert gone.body[2:] == b"\0\x01a"

    run(scenario())
