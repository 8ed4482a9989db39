"""Real brokers for tests, of both kinds.

``brokers`` starts any number of them, ``broker`` is one that runs for the whole module with the
user `USER`; both fixtures run a test once per kind. `client` connects to one. Where mosquitto or
amqtt is not installed the tests are skipped, but not in CI (environment variable ``CI``), where
they fail.
"""

import asyncio
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from covey_coordinator.broker import BrokerKind, RunningBroker, embedded, mosquitto, start_broker
from covey_shared.mqtt import MqttTransport
from mqtt_clients import Listener
from prerequisites import missing

USER = "covey"
PASSWORD = "correct horse battery staple"


@dataclass
class Brokers:
    """Starts brokers of one kind; the fixture stops them all."""

    kind: BrokerKind
    directory: Path
    started: list[RunningBroker] = field(default_factory=list)

    async def start(
        self, name: str = "broker", *, port: int = 0, users: Mapping[str, str] | None = None
    ) -> RunningBroker:
        """A broker in its own directory; the same name uses the same one again."""
        broker = await start_broker(
            self.kind, self.directory / name, port=port, users=users or {USER: PASSWORD}
        )
        self.started.append(broker)
        return broker

    async def stop_all(self) -> None:
        for broker in self.started:
            await broker.stop()


@pytest.fixture(scope="session", params=["embedded", "mosquitto"])
def broker_kind(request: pytest.FixtureRequest) -> BrokerKind:
    """Each kind in turn."""
    if request.param == "mosquitto":
        if mosquitto.find() is None:
            missing("mosquitto is not installed: apt install mosquitto")
        return "mosquitto"
    if not embedded.available():
        missing("amqtt is not installed: pip install 'covey[demo]'")
    return "embedded"


@pytest.fixture
def brokers(broker_kind: BrokerKind, tmp_path: Path) -> Iterator[Brokers]:
    """Starts brokers of each kind in turn, stops them at the end of the test."""
    started = Brokers(broker_kind, tmp_path)
    yield started
    asyncio.run(started.stop_all())


@pytest.fixture(scope="module")
def broker(
    broker_kind: BrokerKind, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningBroker]:
    """One running broker of each kind in turn, shared by the module's tests."""
    started = Brokers(broker_kind, tmp_path_factory.mktemp("broker"))
    yield asyncio.run(started.start())
    asyncio.run(started.stop_all())


def client(
    broker: RunningBroker, client_id: str, *, connected: bool = True, **more: Any
) -> Listener:
    """A listener on a real broker, that does not wait long between attempts."""
    arguments: dict[str, Any] = {"username": USER, "password": PASSWORD}
    arguments |= {"backoff_base_s": 0.05, "backoff_cap_s": 0.2}
    transport = MqttTransport(broker.url, client_id, **(arguments | more))
    return Listener(transport, connected=connected)
