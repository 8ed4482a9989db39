"""What a running `covey up` notices of its devices: joined, revoked, wanted to renew."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from covey_coordinator import daemon, pki
from covey_coordinator.broker import running
from covey_coordinator.config import load_fleet
from covey_coordinator.daemon import Daemon
from covey_coordinator.devices import Revoked
from covey_coordinator.enrolment import enrolment_of, keeper
from covey_coordinator.fleet import FleetDirectory
from covey_coordinator.service import CoordinatorService
from covey_coordinator.store import Store
from covey_shared import wire
from covey_shared.enrolment import Enrolled, RenewalWanted
from covey_shared.errors import TransportError
from covey_shared.messages import DeviceId
from covey_shared.topics import ONLINE, Topics
from enrolling import Applicant, Client, make_fleet, new_csr
from memory_transport import MemoryTransport, Network

TOPICS = Topics("farm")
PI = DeviceId("pi-1")


class Up:
    """As much of `covey up` as looks after devices. The clock is the real one: TLS looks at it."""

    def __init__(self, path: Path) -> None:
        now = int(time.time())
        self.path = path
        self.port = running._free_port()
        self.fleet = make_fleet(path / "fleet", now=now, port=self.port)
        self.network = Network()
        self.said: list[str] = []
        self.client = Client(self.port, path, self.fleet)
        self.service = CoordinatorService(
            self.fleet.trust,
            self.fleet.coordinator_key(),
            self.network.client("coordinator"),
            Store.in_memory(),
        )

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        await self.service.start()
        config = load_fleet(self.fleet.path)
        try:
            async with (
                asyncio.timeout(60),
                enrolment_of(self.fleet, config, self.service, self.said.append),
            ):
                yield
        finally:
            await self.service.close()

    async def until(self, what: Callable[[], object]) -> None:
        while not what():
            await asyncio.sleep(0.01)

    async def joined(self, name: str, applicant: Applicant) -> Path:
        token, _ = self.fleet.make_token(name, hours=1, again=False, now_unix=int(time.time()))
        answer = await self.client.ask(applicant.asks(token))
        assert isinstance(answer, Enrolled)
        applicant.enrolled = answer
        return applicant.pair(self.path)

    def wanted(self) -> list[RenewalWanted]:
        """What lies in the device's inbox, signatures checked."""
        return [
            wire.opened(
                RenewalWanted, data, self.fleet.trust.coordinator, signer="the coordinator"
            ).message
            for _, topic, data in self.network.log
            if topic == TOPICS.inbox(PI)
        ]


@pytest.fixture
def up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Up:
    monkeypatch.setattr(keeper, "WATCH_S", 0.02)
    return Up(tmp_path)


def test_who_joins_and_who_is_revoked_is_noticed(up: Up):
    async def scenario() -> None:
        registry, pi = up.service.registry, Applicant(1)
        async with up.running():
            assert up.said == [f"devices join at port {up.port}"]
            await up.joined("pi-1", pi)
            await up.until(lambda: registry.identities.get(PI) == pi.public)
            assert registry.admit(PI, pi.public, 1) is None
            assert registry.admit(PI, bytes(32), 1) == (
                "its identity key is not the one that was registered"
            )
            # what `covey device revoke` does, in another process
            FleetDirectory(up.fleet.path).revoke("pi-1", int(time.time()))
            await up.until(lambda: registry.revoked)
            for name in ("pi-1", "pi-2"):
                assert registry.admit(DeviceId(name), pi.public, 1) == "its identity was revoked"

    asyncio.run(scenario())


def test_a_revocation_that_was_cut_short_is_finished(up: Up):
    """The command was killed between its list and the one that TLS libraries read."""

    async def scenario() -> None:
        async with up.running():
            await up.joined("pi-1", pi := Applicant(1))
            await up.until(lambda: up.service.registry.identities)
            up.fleet.book.revoke(_revocation(up))  # and nothing else
            await up.until(lambda: up.service.registry.revoked == {pi.public})
            authority, path = up.fleet.tls.authority, up.fleet.tls.path / "crl.pem"
            await up.until(lambda: pki.listed(authority, path.read_bytes()) == {pi.peer().serial})
            written = path.stat().st_mtime_ns
            with up.fleet.book.changing():
                pass
            await asyncio.sleep(0.2)
            assert path.stat().st_mtime_ns == written  # it says so already

    asyncio.run(scenario())


def _revocation(up: Up) -> Revoked:
    record = up.fleet.book.record("pi-1")
    assert record is not None
    return Revoked(device=PI, identity=record.identity, unix=1, grants=record.grants)


def test_a_renewal_is_asked_for_until_it_is_done(up: Up, monkeypatch: pytest.MonkeyPatch):
    """Not of a device that is offline, nor of one that has renewed since."""
    monkeypatch.setattr(keeper, "ASK_AGAIN_S", 0.2)

    async def scenario() -> None:
        pi = Applicant(1)
        async with up.running():
            pair = await up.joined("pi-1", pi)
            since = int(time.time()) + 1  # certificates are dated by the second
            FleetDirectory(up.fleet.path).want_renewal("pi-1", since)
            await up.until(lambda: up.service.registry.identities)
            await asyncio.sleep(0.1)
            assert up.wanted() == []  # it is offline
            up.network.publish("pi-1", TOPICS.presence(PI), ONLINE, retain=True)
            await up.until(lambda: len(up.wanted()) >= 2)  # the first may have been lost
            assert {(w.fleet, w.device) for w in up.wanted()} == {("farm", PI)}
            await up.until(lambda: time.time() > since)
            answer = await up.client.ask(pi.renews("pi-1", new_csr()[1]), pair)
            assert isinstance(answer, Enrolled)
            asked = -1
            while asked != len(up.wanted()):  # until it has taken that up
                asked = len(up.wanted())
                await asyncio.sleep(0.7)

    asyncio.run(scenario())


def test_a_broker_that_is_away_is_asked_later(up: Up, monkeypatch: pytest.MonkeyPatch):
    async def scenario() -> None:
        tried = []
        real = up.service.tell

        async def tell(device: DeviceId, message: wire.Signed[RenewalWanted]) -> None:
            tried.append(device)
            if len(tried) < 3:
                raise TransportError("not connected")
            await real(device, message)

        async with up.running():
            await up.joined("pi-1", Applicant(1))
            monkeypatch.setattr(up.service, "tell", tell)
            up.network.publish("pi-1", TOPICS.presence(PI), ONLINE, retain=True)
            up.fleet.want_renewal("pi-1", int(time.time()) + 1)
            await up.until(lambda: len(up.wanted()) == 1)
            assert tried == [PI] * 3

    asyncio.run(scenario())


def test_a_damaged_record_is_told_once_and_revocations_hold(
    up: Up, caplog: pytest.LogCaptureFixture
):
    async def scenario() -> None:
        pi = Applicant(1)
        async with up.running():
            await up.joined("pi-1", pi)
            up.fleet.revoke("pi-1", int(time.time()))
            path = up.fleet.path / "devices" / "pi-1" / "record.json"
            kept = path.read_bytes()
            path.write_bytes(b"{")
            with up.fleet.book.changing():
                pass
            await up.until(lambda: "record.json is damaged" in caplog.text)
            await asyncio.sleep(0.2)
            assert caplog.text.count("record.json is damaged") == 1
            assert up.service.registry.revoked == {pi.public}
            path.write_bytes(kept)
            await up.until(lambda: up.service.registry.identities)

    asyncio.run(scenario())


def test_certificates_are_renewed_while_it_runs(up: Up, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(keeper, "REFRESH_S", 0.05)

    async def scenario() -> None:
        async with up.running():
            (up.fleet.tls.path / "server.crt").unlink()
            await up.until(lambda: any("is made anew" in line for line in up.said))
            await up.joined("pi-1", Applicant(1))

    asyncio.run(scenario())


def test_a_networked_fleet_comes_up_with_its_port(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """`covey up` as a whole, but for the network of its rounds."""
    port = running._free_port()
    fleet = make_fleet(tmp_path / "fleet", now=int(time.time()) - 70 * 86_400, port=port)
    path = fleet.path / "covey.toml"
    broker = '[broker]\nkind = "external"\nurl = "mqtts://nowhere"\n'
    path.write_text(path.read_text().replace('[broker]\nkind = "auto"\n', broker))
    network, said = Network(), list[str]()

    def transport(url: object, client_id: str, **settings: object) -> MemoryTransport:
        return network.client(client_id)

    monkeypatch.setattr(daemon, "MqttTransport", transport)

    async def scenario() -> None:
        stop = asyncio.Event()
        serving = asyncio.create_task(Daemon(fleet, said.append).serve(stop))
        async with asyncio.timeout(60):
            while not any("waiting for devices" in line for line in said) and not serving.done():
                await asyncio.sleep(0.01)
            client, pi = Client(port, tmp_path, fleet), Applicant(1)
            token, _ = fleet.make_token("pi-1", hours=1, again=False, now_unix=int(time.time()))
            answer = await client.ask(pi.asks(token))
            assert isinstance(answer, Enrolled)
            assert answer.broker_url == "mqtts://nowhere"
            stop.set()
            await serving
        with pytest.raises(ConnectionError):
            await client.connect()

    asyncio.run(scenario())
    assert said[:2] == [
        "the broker's certificate is made anew: two thirds of its life are over",
        "the coordinator's certificate is made anew: two thirds of its life are over",
    ]
    assert f"devices join at port {port}" in said
    assert any(line.startswith("device pi-1 joined") for line in said)
    assert not (fleet.path / "status.json").exists()
