"""A fleet's directory: keys that are secret, devices that are whole, mistakes that are named."""

import errno
import os
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from covey_coordinator import files, pki
from covey_coordinator.config import BrokerConfig, load_fleet
from covey_coordinator.fleet import DAY_S, DEVICE_USER, FleetDirectory, check_name
from covey_coordinator.kept_broker import tls_of
from covey_device.assembly import concerns, load_device
from covey_shared.errors import ConfigError, LocalProtocolError, StorageError
from tls_files import make_tls_files

NOW = int(time.time())


@pytest.fixture
def fleet(tmp_path: Path) -> FleetDirectory:
    return FleetDirectory.create(tmp_path / "fleet", "farm", BrokerConfig(port=1999))


def modes(path: Path) -> dict[str, int]:
    found = [path, *sorted(path.rglob("*"))]
    return {str(p.relative_to(path.parent)): stat.S_IMODE(p.stat().st_mode) for p in found}


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_secrets_are_the_owner_s_alone_whatever_the_umask(tmp_path: Path, umask: int):
    before = os.umask(umask)
    try:
        fleet = FleetDirectory.create(tmp_path / "fleet", "farm", BrokerConfig())
        fleet.add_device("pi-1", days=10, data=None)
    finally:
        os.umask(before)
    found = modes(fleet.path)
    secret = {
        "fleet/ca/ca.key", "fleet/coordinator.key", "fleet/broker/coordinator.password",
        "fleet/broker/device.password", "fleet/devices/pi-1/identity.key",
        "fleet/devices/pi-1/broker.password",
    }  # fmt: skip
    assert secret <= set(found)
    assert {name: found[name] for name in secret} == dict.fromkeys(secret, 0o600)
    for name in ("fleet/ca", "fleet/broker", "fleet/devices/pi-1"):
        assert found[name] == 0o700
    files_ = [path for path in fleet.path.rglob("*") if path.is_file()]
    assert not any(path.stat().st_mode & 0o022 for path in files_)


def test_the_keys_are_different_ones_and_belong_together(fleet: FleetDirectory):
    assert fleet.trust.fleet == "farm"
    assert fleet.ca_key().public == fleet.trust.ca
    assert fleet.coordinator_key().public == fleet.trust.coordinator
    assert fleet.trust.ca != fleet.trust.coordinator
    assert fleet.password("coordinator") != fleet.password("device")
    assert len(fleet.password("device")) >= 20


def test_a_fleet_is_not_made_over_another(fleet: FleetDirectory):
    with pytest.raises(ConfigError, match="holds a fleet already; choose another directory"):
        FleetDirectory.create(fleet.path, "other", BrokerConfig())
    (fleet.path / "covey.toml").unlink()
    with pytest.raises(ConfigError, match=r"holds the keys of a fleet without its covey\.toml"):
        FleetDirectory.create(fleet.path, "other", BrokerConfig())


@pytest.mark.parametrize("name", ["", "A", "a b", "a/b", "../x", "-a", "a-", "a" * 33, "a\n", "ä"])
def test_names_are_topic_levels_and_file_names(fleet: FleetDirectory, name: str):
    for make in (
        lambda: check_name(name, "run"),
        lambda: fleet.add_device(name, days=1, data=None),
        lambda: FleetDirectory.create(fleet.path / "x", name, BrokerConfig()),
    ):
        with pytest.raises(ConfigError, match="1 to 32 lower-case letters, digits and inner"):
            make()
    assert not (fleet.path / "x").exists()
    assert list((fleet.path / "devices").iterdir()) == []


def test_a_broker_that_cannot_be_is_refused_before_anything_is_made(tmp_path: Path):
    broker = BrokerConfig(kind="external", url="http://host")
    with pytest.raises(ConfigError, match=r"key `broker\.url`: broker URL http://host: it starts"):
        FleetDirectory.create(tmp_path / "fleet", "farm", broker)
    assert not (tmp_path / "fleet").exists()


def test_a_device_is_sound_where_it_is_carried(fleet: FleetDirectory, tmp_path: Path):
    """The printed directory is all that a device needs, wherever it is copied to."""
    directory = fleet.add_device("pi-1", days=10, data=None)
    there = tmp_path / "elsewhere"
    directory.rename(there)
    parts = load_device(there / "device.toml")
    assert (parts.config.device, parts.config.fleet) == ("pi-1", "farm")
    assert parts.trust == fleet.trust
    assert parts.password == fleet.password(DEVICE_USER)
    assert parts.config.broker.url == "mqtt://127.0.0.1:1999"
    assert concerns(parts, 0) == [
        f"key `data.file`: {there / 'data.npz'} does not exist: put it there, or correct [data]"
    ]


def test_a_certificate_that_ended_is_a_concern(fleet: FleetDirectory, tmp_path: Path):
    (tmp_path / "data.npz").write_bytes(b"")
    directory = fleet.add_device("pi-1", days=10, data=tmp_path / "data.npz")
    (entry,) = fleet.devices()
    parts = load_device(directory / "device.toml")
    assert concerns(parts, entry.not_after_unix) == []
    (concern,) = concerns(parts, entry.not_after_unix + 1)
    assert concern.startswith("the certificate ended on 20")


def test_a_device_elsewhere_gets_the_broker_s_address(fleet: FleetDirectory):
    directory = fleet.add_device("pi-1", days=1, data=None, broker_url="mqtts://broker.lan")
    assert load_device(directory / "device.toml").config.broker.url == "mqtts://broker.lan"
    with pytest.raises(ConfigError, match="it starts with mqtt://"):
        fleet.add_device("pi-2", days=1, data=None, broker_url="broker.lan")
    assert [entry.name for entry in fleet.devices()] == ["pi-1"]


def test_devices_are_listed_by_name_with_their_ends(fleet: FleetDirectory):
    for name in ("pi-2", "pi-1"):
        fleet.add_device(name, days=3, data=None)
    entries = fleet.devices()
    assert [entry.name for entry in entries] == ["pi-1", "pi-2"]
    assert all(abs(e.not_after_unix - time.time() - 3 * DAY_S) < 60 for e in entries)
    assert entries[0].identity != entries[1].identity


def test_a_name_is_taken_once(fleet: FleetDirectory):
    fleet.add_device("pi-1", days=1, data=None)
    before = (fleet.path / "devices" / "pi-1" / "identity.key").read_bytes()
    with pytest.raises(ConfigError, match="there is a device 'pi-1' already"):
        fleet.add_device("pi-1", days=1, data=None)
    assert (fleet.path / "devices" / "pi-1" / "identity.key").read_bytes() == before


@pytest.mark.parametrize("at", range(6))
def test_a_device_is_there_whole_or_not_at_all(fleet: FleetDirectory, at: int):
    real, left = os.write, [at]

    def write(*args: Any) -> int:
        left[0] -= 1
        if left[0] == -1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files.os, "write", write)
        if at < 4:
            with pytest.raises(StorageError, match="No space left on device"):
                fleet.add_device("pi-1", days=1, data=None)
            assert list((fleet.path / "devices").iterdir()) == []
    fleet.add_device("pi-1", days=1, data=None)
    assert load_device(fleet.path / "devices" / "pi-1" / "device.toml")


def test_without_the_authority_s_key_no_device_is_added(fleet: FleetDirectory):
    """It may well live on another machine; nothing is left half made."""
    (fleet.path / "ca" / "ca.key").unlink()
    with pytest.raises(ConfigError, match=r"ca\.key cannot be read: No such file or directory"):
        fleet.add_device("pi-1", days=1, data=None)
    assert list((fleet.path / "devices").iterdir()) == []


@pytest.mark.parametrize(
    ("name", "read"),
    [("ca/ca.key", FleetDirectory.ca_key), ("coordinator.key", FleetDirectory.coordinator_key)],
    ids=["authority", "coordinator"],
)
@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604])
def test_a_key_that_others_can_read_is_refused(
    fleet: FleetDirectory, name: str, read: Callable[[FleetDirectory], object], mode: int
):
    path = fleet.path / name
    path.chmod(mode)
    with pytest.raises(ConfigError) as caught:
        read(fleet)
    assert str(caught.value) == (
        f"{path} can be read by others (mode {mode:04o}); run: chmod 600 {path}"
    )


@pytest.mark.parametrize("text", ["", "00", "zz" * 32, "00" * 33])
def test_a_damaged_key_is_named_and_not_shown(fleet: FleetDirectory, text: str):
    (fleet.path / "coordinator.key").write_text(text)
    with pytest.raises(ConfigError) as caught:
        fleet.coordinator_key()
    path = fleet.path / "coordinator.key"
    assert str(caught.value) == f"{path} is not a key of 64 hexadecimal digits; restore it"


@pytest.mark.parametrize("data", [b"", b"garbage", bytes(200)])
def test_a_damaged_certificate_is_named(fleet: FleetDirectory, data: bytes):
    directory = fleet.add_device("pi-1", days=1, data=None)
    (directory / "certificate").write_bytes(data)
    with pytest.raises(ConfigError) as caught:
        fleet.devices()
    assert str(caught.value).startswith(f"{directory / 'certificate'}: ")
    assert "add the device anew" in str(caught.value)


def test_a_device_that_is_being_added_is_not_listed(fleet: FleetDirectory):
    fresh = fleet.path / "devices" / ".pi-9.new"
    fresh.mkdir()
    (fresh / "certificate").write_bytes(b"half")
    assert fleet.devices() == []


def test_a_directory_that_is_no_fleet(tmp_path: Path):
    with pytest.raises(
        ConfigError, match=r"covey\.toml does not exist; `covey init` makes a fleet"
    ):
        FleetDirectory(tmp_path).add_device("pi-1", days=1, data=None)


def test_what_init_wrote_is_what_is_read(fleet: FleetDirectory):
    assert load_fleet(fleet.path).broker == BrokerConfig(port=1999)
    assert fleet.broker_url(load_fleet(fleet.path)) == "mqtt://127.0.0.1:1999"


def external(tmp_path: Path, **settings: Any) -> FleetDirectory:
    broker = BrokerConfig(kind="external", url="mqtts://broker.lan", **settings)
    return FleetDirectory.create(tmp_path / "fleet", "farm", broker)


def test_at_an_external_broker_each_device_is_itself(tmp_path: Path):
    """Else the broker could not confine it to its own topics, as deploy/mosquitto does."""
    fleet = external(tmp_path)
    parts = [
        load_device(fleet.add_device(name, days=1, data=None) / "device.toml")
        for name in ("pi-1", "pi-2")
    ]
    assert [p.config.broker.username for p in parts] == ["pi-1", "pi-2"]
    assert parts[0].password != parts[1].password
    assert fleet.password(DEVICE_USER) not in {p.password for p in parts}
    assert parts[0].tls is None


def test_the_broker_s_authority_is_handed_to_devices(tmp_path: Path):
    fleet = external(tmp_path, ca_file="authority.pem")
    with pytest.raises(
        ConfigError, match=r"broker\.ca_file .*authority\.pem cannot be read: No such"
    ):
        fleet.add_device("pi-1", days=1, data=None)
    with pytest.raises(
        ConfigError, match=r"broker\.ca_file .*authority\.pem cannot be read: No such"
    ):
        tls_of(fleet, load_fleet(fleet.path))
    (fleet.path / "authority.pem").write_bytes(make_tls_files(tmp_path).authority.read_bytes())
    directory = fleet.add_device("pi-1", days=1, data=None)
    for context in (
        load_device(directory / "device.toml").tls,
        tls_of(fleet, load_fleet(fleet.path)),
    ):
        assert context is not None
        assert [dict(part[0] for part in c["subject"]) for c in context.get_ca_certs()] == [
            {"commonName": "test authority"}
        ]
    (fleet.path / "authority.pem").write_text("no certificate")
    (directory / "broker.ca").write_text("no certificate")
    with pytest.raises(ConfigError, match=r"broker\.ca_file .* is no certificate in PEM"):
        load_device(directory / "device.toml")
    with pytest.raises(ConfigError, match=r"broker\.ca_file .* is no certificate in PEM"):
        tls_of(fleet, load_fleet(fleet.path))


def test_the_coordinator_shows_its_certificate(tmp_path: Path):
    files = make_tls_files(tmp_path)
    settings = {"cert_file": str(files.certificate), "key_file": str(files.key)}
    fleet = external(tmp_path, **settings)
    config = load_fleet(fleet.path)
    files.key.chmod(0o600)
    assert tls_of(fleet, config) is not None
    files.key.chmod(0o640)
    with pytest.raises(ConfigError, match=r"server\.key can be read by others .*chmod 600"):
        tls_of(fleet, config)
    files.key.chmod(0o600)
    files.key.write_text("no key")
    with pytest.raises(ConfigError, match=r"server\.key are no certificate in PEM and its key"):
        tls_of(fleet, config)
    files.key.unlink()
    with pytest.raises(ConfigError, match=r"server\.key cannot be read: No such"):
        tls_of(fleet, config)


# -- a fleet with an address -------------------------------------------------------------------------


def networked(path: Path, *addresses: str, **settings: Any) -> FleetDirectory:
    return FleetDirectory.create(
        path, "farm", BrokerConfig(**settings), addresses=addresses or ("farm.lan",), now_unix=NOW
    )


def test_a_networked_fleet_has_certificates_and_no_passwords(tmp_path: Path):
    before = os.umask(0)
    try:
        fleet = networked(tmp_path / "fleet")
    finally:
        os.umask(before)
    found = modes(fleet.path)
    secret = {"ca/ca.key", "coordinator.key", "tls/ca.key", "tls/server.key", "tls/coordinator.key"}
    assert {name: found[f"fleet/{name}"] for name in secret} == dict.fromkeys(secret, 0o600)
    assert found["fleet/tls"] == 0o700
    assert not list((fleet.path / "broker").iterdir())
    config = load_fleet(fleet.path)
    assert (config.addresses, config.broker_port, config.enrol.port) == (("farm.lan",), 8883, 8884)
    assert fleet.broker_url(config) == "mqtts://127.0.0.1:8883"
    assert fleet.device_broker_url(config) == "mqtts://farm.lan:8883"
    server = pki.read_leaf(pki.load_certificate(fleet.tls.path / "server.crt"))
    assert {"farm.lan", "localhost", "127.0.0.1", "::1"} <= server.hosts
    own = pki.read_leaf(pki.load_certificate(fleet.tls.path / "coordinator.crt"))
    assert (own.name, own.not_after_unix) == ("coordinator", NOW + 90 * DAY_S)
    fleet.tls.client_context()
    fleet.tls.server_context()


def test_devices_are_told_the_first_address(tmp_path: Path):
    fleet = networked(tmp_path / "fleet", "FE80::1:2", "farm.lan", port=9000)
    config = load_fleet(fleet.path)
    assert fleet.device_broker_url(config) == "mqtts://[fe80::1:2]:9000"
    token, _ = fleet.make_token("pi-1", hours=None, again=False, now_unix=NOW)
    assert (token.host, token.port) == ("fe80::1:2", 8884)
    hosts = pki.read_leaf(pki.load_certificate(fleet.tls.path / "server.crt")).hosts
    assert {"fe80::1:2", "farm.lan"} <= hosts


def test_an_external_broker_keeps_its_address(tmp_path: Path):
    fleet = networked(tmp_path / "fleet", kind="external", url="mqtts://broker.lan")
    config = load_fleet(fleet.path)
    assert fleet.device_broker_url(config) == fleet.broker_url(config) == "mqtts://broker.lan"


@pytest.mark.parametrize(
    ("address", "settings", "message"),
    [
        ("mqtts://x", {}, r"the command line: key `address`: 'mqtts://x' is no host: give a name"),
        ("1.2.3", {}, "'1.2.3' is no host"),
        ("fe80::1%eth0", {}, "'fe80::1%eth0' is no host"),
        ("h", {"kind": "embedded"}, 'is "embedded", which is for one machine'),
        ("h", {"port": 8884}, r"keys `broker\.port` and `enrol\.port` are the same"),
        ("h", {"kind": "external", "url": "mqtt://b"}, "an `address` needs TLS: mqtts://HOST"),
    ],
)
def test_what_cannot_be_networked(
    tmp_path: Path, address: str, settings: dict[str, Any], message: str
):
    with pytest.raises(ConfigError, match=message):
        networked(tmp_path / "fleet", address, **settings)
    assert not (tmp_path / "fleet").exists()


def test_certificates_are_made_anew_when_they_are_due(tmp_path: Path):
    fleet = networked(tmp_path / "fleet")
    config = load_fleet(fleet.path)
    authority = fleet.tls.authority_der

    def serials() -> list[int]:
        names = ("server.crt", "coordinator.crt")
        return [pki.read_leaf(pki.load_certificate(fleet.tls.path / n)).serial for n in names]

    first = serials()
    assert fleet.refresh_tls(config, NOW + 60 * DAY_S - 1) == []
    assert serials() == first
    assert fleet.refresh_tls(config, NOW + 60 * DAY_S) == [
        "the broker's certificate is made anew: two thirds of its life are over",
        "the coordinator's certificate is made anew: two thirds of its life are over",
    ]
    assert not set(serials()) & set(first)
    assert fleet.tls.authority_der == authority
    fleet.tls.server_context()


def test_certificates_are_made_anew_for_another_address(tmp_path: Path):
    fleet = networked(tmp_path / "fleet")
    path = fleet.path / "covey.toml"
    path.write_text(path.read_text().replace("farm.lan", "barn.lan"))
    (line,) = fleet.refresh_tls(load_fleet(fleet.path), NOW)
    assert line.startswith("the broker's certificate is made anew: the fleet's hosts are now ")
    assert "barn.lan" in line
    assert "farm.lan" not in line
    assert fleet.refresh_tls(load_fleet(fleet.path), NOW) == []


@pytest.mark.parametrize("name", ["server", "coordinator"])
def test_half_a_pair_of_certificate_and_key_is_made_anew(tmp_path: Path, name: str):
    """The power went between the two; or one is gone, or damaged."""
    fleet = networked(tmp_path / "fleet")
    config = load_fleet(fleet.path)
    other = networked(tmp_path / "other").tls.path
    for file in (f"{name}.key", f"{name}.crt"):
        for data in ((other / file).read_bytes(), b"x", None):
            if data is None:
                (fleet.tls.path / file).unlink()
            else:
                (fleet.tls.path / file).write_bytes(data)
            assert len(fleet.refresh_tls(config, NOW)) == 1
            fleet.tls.client_context()
            fleet.tls.server_context()
    # a pair that fits, of another fleet's authority
    for file in (f"{name}.key", f"{name}.crt"):
        (fleet.tls.path / file).write_bytes((other / file).read_bytes())
    (line,) = fleet.refresh_tls(config, NOW)
    assert line.endswith("certificate is made anew: another authority signed it")
    assert fleet.refresh_tls(config, NOW) == []


def test_a_lost_authority_is_not_made_anew(tmp_path: Path):
    """All devices pin it: an error says so, and nothing takes its place."""
    fleet = networked(tmp_path / "fleet")
    for name in ("ca.key", "ca.crt"):
        path = fleet.tls.path / name
        kept = path.read_bytes()
        path.unlink()
        with pytest.raises(ConfigError, match=rf"tls/{name} cannot be read: No such file"):
            fleet.refresh_tls(load_fleet(fleet.path), NOW + 80 * DAY_S)
        path.write_bytes(kept)
        path.chmod(0o600)


@pytest.mark.parametrize("name", ["ca.crt", "server.crt", "server.key"])
def test_a_damaged_certificate_of_the_broker_s_is_named(tmp_path: Path, name: str):
    fleet = networked(tmp_path / "fleet")
    (fleet.tls.path / name).write_bytes(b"x")
    shown = "server.crt or its .key" if name.startswith("server") else name
    with pytest.raises(ConfigError, match=rf"tls/{shown} is damaged; restore it"):
        fleet.tls.server_context()
    (fleet.tls.path / name).unlink()
    with pytest.raises(ConfigError, match=rf"tls/{name} cannot be read: No such file"):
        fleet.tls.server_context()


def test_a_local_device_is_revoked_too(fleet: FleetDirectory):
    fleet.add_device("pi-1", days=10, data=None)
    (entry,) = fleet.devices()
    assert fleet.revoke("pi-1", int(time.time()))
    assert [e.status(time.time()) for e in fleet.devices()] == ["revoked"]
    assert fleet.revoked_identities() == {entry.identity}
    with pytest.raises(ConfigError, match="there is no device 'pi-2' in this fleet"):
        fleet.revoke("pi-2", 0)
    with pytest.raises(ConfigError, match="has its certificate from `covey device add`"):
        fleet.want_renewal("pi-1", 0)


def test_the_book_of_devices_is_not_held_twice_by_one(tmp_path: Path):
    """It would wait for itself for ever."""
    fleet = FleetDirectory.create(tmp_path / "fleet", "farm", BrokerConfig())
    with fleet.book.held(), pytest.raises(LocalProtocolError, match="held already"):
        fleet.book.held().__enter__()
    with fleet.book.held():
        pass
