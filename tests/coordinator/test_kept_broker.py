"""`covey up`'s broker: started again when it ends, and told who is let in while it runs."""

import asyncio
import ssl
import time
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import psutil
import pytest

from covey_coordinator import kept_broker, pki
from covey_coordinator.broker import RunningBroker, mosquitto, running
from covey_coordinator.config import MAX_CONNECTIONS, BrokerConfig, load_fleet
from covey_coordinator.devices import Grant, Revoked
from covey_coordinator.fleet import FleetDirectory
from covey_coordinator.kept_broker import KeptBroker, Login, access_of, broker_of, tls_of
from covey_shared.errors import ConfigError, StorageError
from covey_shared.messages import DeviceId
from covey_shared.mqtt import MqttTransport
from covey_shared.topics import Topics
from mqtt_clients import Listener, poll, run
from prerequisites import missing
from raw_mqtt import RawClient, TurnedAwayError

TOPICS = Topics("farm")


class FakeBroker:
    """As much of a running broker as its keeper looks at."""

    def __init__(self) -> None:
        self.running = True
        self.process = type("Process", (), {"returncode": -9})()
        self.log = Path("broker.log")

        self.trimmed = 0

    def last_log_lines(self, n_lines: int) -> list[str]:
        return ["out of memory"]

    def trim_log(self) -> None:
        self.trimmed += 1


def test_a_broker_that_ends_by_itself_is_started_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(kept_broker, "WATCH_S", 0.01)
    monkeypatch.setattr(kept_broker, "RETRY_S", 0.01)
    tries: list[FakeBroker] = []

    async def start() -> RunningBroker:
        tries.append(FakeBroker())
        if len(tries) < 3:
            raise StorageError("the disk is full")
        return tries[-1]  # type: ignore[return-value]

    async def scenario() -> None:
        first = FakeBroker()
        kept = KeptBroker(first, start)  # type: ignore[arg-type]
        keeping = asyncio.create_task(kept.keep())
        await asyncio.sleep(0.05)
        assert tries == []
        assert first.trimmed  # its log is looked after as long as it runs
        first.running = False
        async with asyncio.timeout(5):
            while kept.broker is first:
                await asyncio.sleep(0.01)
        keeping.cancel()
        assert kept.broker is tries[2]
        assert "the broker ended (exit code -9); starting it again" in caplog.text
        assert "out of memory" in caplog.text
        assert "the disk is full" in caplog.text

    run(scenario())


# -- a networked fleet's ---------------------------------------------------------------------------


@pytest.fixture
def fleet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FleetDirectory:
    """A networked fleet, whose broker has yet to start."""
    if mosquitto.find() is None:
        missing("mosquitto is not installed: apt install mosquitto")
    monkeypatch.setattr(kept_broker, "WATCH_S", 0.02)
    monkeypatch.setattr(kept_broker, "RETRY_S", 0.02)
    broker = BrokerConfig(port=running._free_port())
    return FleetDirectory.create(tmp_path / "fleet", "farm", broker, addresses=("127.0.0.1",))


def up(fleet: FleetDirectory) -> AbstractAsyncContextManager[Login]:
    return broker_of(fleet, load_fleet(fleet.path))


def coordinator(login: Login) -> Listener:
    transport = MqttTransport(login.url, "x", tls=login.tls, backoff_base_s=0.05, backoff_cap_s=0.2)
    return Listener(transport)


def pass_of(fleet: FleetDirectory, name: str) -> tuple[ssl.SSLContext, Grant]:
    """A client's certificate, and what a record would say of it."""
    pair = pki.client_pair(fleet.tls.authority, name, days=1, now_unix=int(time.time()))
    files = fleet.path.parent / f"{name}.crt", fleet.path.parent / f"{name}.key"
    files[0].write_bytes(pair.certificate)
    files[1].write_bytes(pair.key)
    context = ssl.create_default_context(cafile=fleet.tls.path / "ca.crt")
    context.load_cert_chain(*files)
    leaf = pki.read_leaf(pki.load_certificate(files[0]))
    return context, Grant(f"{leaf.serial:x}", leaf.not_after_unix)


def revoke(fleet: FleetDirectory, name: str, grant: Grant) -> None:
    """As `covey device revoke` does, in another process."""
    entry = Revoked(device=DeviceId(name), identity="", unix=1, grants=[grant])
    with fleet.book.changing():
        fleet.book.revoke(entry)
    fleet.refresh_tls(load_fleet(fleet.path), int(time.time()))


def may_enter(port: int, context: ssl.SSLContext) -> bool:
    try:
        with RawClient(port, context) as client:
            client.ping()
    except TurnedAwayError:
        return False
    return True


def test_the_broker_of_a_networked_fleet_listens_everywhere_and_knows_us(fleet: FleetDirectory):
    async def scenario() -> None:
        async with up(fleet) as login:
            port = load_fleet(fleet.path).broker_port
            assert login.url == f"mqtts://127.0.0.1:{port}"
            assert (login.username, login.password) == (None, None)
            (broker,) = [
                child
                for child in psutil.Process().children()
                if str(fleet.path) in " ".join(child.cmdline())
            ]
            listening = {
                c.laddr.ip for c in broker.net_connections("tcp") if c.status == psutil.CONN_LISTEN
            }
            # without IPv6 in the kernel there is the one alone
            assert "0.0.0.0" in listening  # noqa: S104
            assert listening <= {"0.0.0.0", "::"}  # noqa: S104
            limits = Path(f"/proc/{broker.pid}/limits").read_text()
            (files,) = [line for line in limits.splitlines() if line.startswith("Max open files")]
            assert int(files.split()[3]) <= MAX_CONNECTIONS + 64
            async with coordinator(login) as us:
                await us.transport.subscribe(TOPICS.outbox("+"))
                context, _ = pass_of(fleet, "pi-1")

                def device() -> None:
                    with RawClient(port, context) as client:
                        client.publish(TOPICS.outbox("pi-1"), b"hello")

                await asyncio.to_thread(device)
                await us.until_messages(1)
            made = fleet.path / "broker" / "run"
            assert {p.stat().st_mode & 0o777 for p in made.iterdir()} == {0o600}

    run(scenario())


def test_a_revoked_device_is_kept_out_at_once_and_nobody_else_notices(fleet: FleetDirectory):
    async def scenario() -> None:
        async with up(fleet) as login:
            port = load_fleet(fleet.path).broker_port
            async with coordinator(login) as us:
                one, grant = pass_of(fleet, "pi-1")
                two, _ = pass_of(fleet, "pi-2")
                assert await asyncio.to_thread(may_enter, port, one)
                await asyncio.to_thread(revoke, fleet, "pi-1", grant)
                async with asyncio.timeout(30):
                    while await asyncio.to_thread(may_enter, port, one):
                        await asyncio.sleep(0.05)
                assert await asyncio.to_thread(may_enter, port, two)
                assert us.reasons == []

    run(scenario())


def test_renewed_certificates_are_taken_up(fleet: FleetDirectory):
    """Of the broker, and our own, while connections stand."""

    async def scenario() -> None:
        async with up(fleet) as login:
            async with coordinator(login) as us:
                port = load_fleet(fleet.path).broker_port
                old = await asyncio.to_thread(ssl.get_server_certificate, ("127.0.0.1", port))
                for name in ("server", "coordinator"):
                    (fleet.tls.path / f"{name}.crt").unlink()
                fleet.refresh_tls(load_fleet(fleet.path), int(time.time()))
                async with asyncio.timeout(30):
                    while old == await asyncio.to_thread(
                        ssl.get_server_certificate, ("127.0.0.1", port)
                    ):
                        await asyncio.sleep(0.05)
                assert us.reasons == []
            leaf = pki.read_leaf(pki.load_certificate(fleet.tls.path / "coordinator.crt"))
            async with coordinator(login) as again:
                assert again.transport.connected
            # that it was the new one: the broker turns the old one away from now on
            assert leaf.name == "coordinator"

    run(scenario())


def test_rules_that_cannot_be_used_change_nothing(
    fleet: FleetDirectory, caplog: pytest.LogCaptureFixture
):
    """mosquitto would go on without them, and let in whoever was revoked."""

    async def scenario() -> None:
        one, grant = pass_of(fleet, "pi-1")
        revoke(fleet, "pi-1", grant)
        async with up(fleet) as login:
            port = load_fleet(fleet.path).broker_port
            good = (fleet.tls.path / "crl.pem").read_bytes()
            (fleet.tls.path / "crl.pem").write_bytes(b"damaged")
            await poll(lambda: "crl.pem) is damaged" in caplog.text)
            assert not await asyncio.to_thread(may_enter, port, one)
            (fleet.tls.path / "crl.pem").write_bytes(good)
            assert not await asyncio.to_thread(may_enter, port, one)
            async with coordinator(login):
                pass

    run(scenario())


def test_a_broker_that_does_not_take_its_rules_is_started_anew_with_them(
    fleet: FleetDirectory, caplog: pytest.LogCaptureFixture
):
    async def scenario() -> None:
        config = load_fleet(fleet.path)
        async with up(fleet) as login:
            (fleet.path / "broker" / "run" / "covey.acl").unlink()
            async with coordinator(login) as us:
                one, grant = pass_of(fleet, "pi-1")
                await asyncio.to_thread(revoke, fleet, "pi-1", grant)
                await poll(lambda: "it is started anew" in caplog.text)
                await us.until_connected(2)
            assert not await asyncio.to_thread(may_enter, config.broker_port, one)

    run(scenario())


@pytest.mark.parametrize("damage", ["ca.crt", "crl.pem", "server.crt", "server.key"])
def test_what_the_broker_cannot_use_is_named_before_it_starts(fleet: FleetDirectory, damage: str):
    (fleet.tls.path / damage).write_text("damaged")

    async def scenario() -> None:
        async with up(fleet):
            pass

    with pytest.raises(ConfigError, match=damage.replace(".", r"\.")):
        run(scenario())


def test_certificates_that_do_not_go_together_are_named(fleet: FleetDirectory, tmp_path: Path):
    other = FleetDirectory.create(
        tmp_path / "other", "farm", BrokerConfig(), addresses=("127.0.0.1",)
    )
    config = load_fleet(fleet.path)
    access_of(fleet, config).check()
    good = {name: fleet.tls.read(name) for name in ("ca.crt", "crl.pem", "server.crt")}
    for name, problem in (
        ("ca.crt", "not of the broker authority"),
        ("crl.pem", "not of the broker authority"),
        ("server.crt", "not of the broker authority"),
        ("server.key", "do not go together"),
    ):
        (fleet.tls.path / name).write_bytes(other.tls.read(name))
        with pytest.raises(ConfigError, match=problem):
            access_of(fleet, config).check()
        if name in good:
            (fleet.tls.path / name).write_bytes(good[name])


def test_our_certificate_at_an_external_broker_is_the_fleets(tmp_path: Path):
    """Unless another one is configured."""
    broker = BrokerConfig(kind="external", url="mqtts://broker.lan")
    fleet = FleetDirectory.create(tmp_path / "fleet", "farm", broker, addresses=("c.lan",))
    config = load_fleet(fleet.path)
    context = tls_of(fleet, config)
    assert context is not None
    (authority,) = context.get_ca_certs(binary_form=True)
    assert authority == fleet.tls.authority_der
    (fleet.tls.path / "coordinator.key").chmod(0o644)
    with pytest.raises(ConfigError, match=r"coordinator\.key can be read by others"):
        tls_of(fleet, config)

    async def scenario() -> None:
        (fleet.tls.path / "coordinator.key").chmod(0o600)
        async with broker_of(fleet, config) as login:
            assert (login.url, login.username) == ("mqtts://broker.lan", None)
            assert "password" not in repr(login)

    run(scenario())
