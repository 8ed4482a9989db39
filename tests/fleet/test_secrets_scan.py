"""No secret is anywhere but in its own home: not in logs, files, metrics, transcripts or traffic.

Of the fleet in `watched_fleet`, every secret, those of the rounds too, is looked for in everything that
it left behind: as it is, in hexadecimal, and in base64 at any offset.
"""

import asyncio
import base64
import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from covey_coordinator.broker import mosquitto, running
from covey_coordinator.config import BrokerConfig
from covey_coordinator.daemon import Daemon
from covey_coordinator.fleet import FleetDirectory
from covey_device.assembly import assemble, load_device
from mqtt_clients import poll, run
from prerequisites import missing
from watched_fleet import DEVICES, Evidence, lived, make_data, searchable

ROUND_KINDS = ("seed", "share", "derived key", "reveal key")
LASTING = ("fleet CA", "coordinator", "model owner", "TLS", "identity", "token")


def test_passwords_of_a_local_fleet_are_at_home_and_nowhere_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    """On loopback, where they go over the wire as they are."""
    if mosquitto.find() is None:
        missing("mosquitto is not installed: apt install mosquitto")
    caplog.set_level(logging.DEBUG)
    said: list[str] = []
    fleet = FleetDirectory.create(
        tmp_path / "fleet", "farm", BrokerConfig(kind="mosquitto", port=running._free_port())
    )
    make_data(tmp_path / "pi-1.npz", 1)
    added = fleet.add_device("pi-1", days=1, data=tmp_path / "pi-1.npz")

    async def scenario() -> None:
        stop = asyncio.Event()
        serving = asyncio.create_task(Daemon(fleet, said.append).serve(stop))
        device = assemble(load_device(added / "device.toml"))
        await device.start()
        try:
            await poll(lambda: serving.done() or '"pi-1"' in status_of(fleet))
            assert not serving.done(), serving.exception()
        finally:
            await device.close()
            stop.set()
            await serving

    run(scenario())
    evidence = Evidence({"log": caplog.text.encode(), "said": "\n".join(said).encode()})
    for file in tmp_path.rglob("*"):
        if file.is_file():
            evidence.places[str(file.relative_to(tmp_path))] = searchable(file.read_bytes())
    for user, homes in (
        ("coordinator", ()),
        ("device", ("fleet/devices/pi-1/broker.password",)),
    ):
        password = fleet.password(user).encode()
        evidence.secret("password", password, f"fleet/broker/{user}.password", *homes)
    assert evidence.places.keys() > {"fleet/broker/run/passwords", "fleet/broker/run/broker.log"}
    assert evidence.out_of_place("password") == []


def status_of(fleet: FleetDirectory) -> str:
    """What `covey up` says of itself."""
    path = fleet.path / "status.json"
    return path.read_text() if path.exists() else ""


@pytest.fixture(scope="module")
def evidence(tmp_path_factory: pytest.TempPathFactory) -> Evidence:
    """Of one fleet's life."""
    return lived(tmp_path_factory)[1]


@pytest.mark.parametrize("kind", [*LASTING, *ROUND_KINDS])
def test_a_secret_is_at_home_and_nowhere_else(evidence: Evidence, kind: str):
    assert evidence.secrets[kind]
    assert evidence.out_of_place(kind) == []


def test_everything_was_looked_at(evidence: Evidence):
    """Else nothing found would mean nothing."""
    assert len(evidence.secrets["identity"]) == len(evidence.secrets["token"]) == len(DEVICES)
    # b, s and c of four devices in two rounds, each with shares for four, and what comes of them
    assert len(evidence.secrets["seed"]) >= 3 * len(DEVICES) * 2
    assert len(evidence.secrets["share"]) >= 2 * len(DEVICES) ** 2 * 2
    assert len(evidence.secrets["reveal key"]) == 2
    files = "\n".join(evidence.places)
    for name in (
        *("python.log", "broker.log", "metrics.jsonl", "transcript", "mosquitto.conf", "state"),
        *("tokens/", "record.json", "device.toml", "audit", "what covey up said"),
        *(f"covey/farm/{part}" for part in ("round", "all", "to/pi-1", "from/pi-1", "up/pi-1")),
    ):
        assert name in files, name
    assert b"phase" in evidence.places["python.log"]
    for name in ("enrolment", "broker"):
        assert len(evidence.places[f"bytes to and from the {name}"]) > 10_000


@pytest.mark.parametrize(
    "spelled",
    [
        lambda secret: secret,
        lambda secret: secret.hex().encode(),
        lambda secret: secret.hex().upper().encode(),
        *(
            lambda secret, n=n, encode=encode: encode(bytes(n) + secret + b"more")
            for n in range(4)
            for encode in (base64.b64encode, base64.urlsafe_b64encode, base64.encodebytes)
        ),
    ],
)
def test_a_secret_that_is_somewhere_else_is_found(spelled: Callable[[bytes], bytes]):
    """In each spelling, for secrets with every kind of byte."""
    for secret in (bytes(range(0xF0, 0x100)), b"\xfb\xff" * 16, bytes(range(32))):
        evidence = Evidence(
            {"home": secret, "log": searchable(b"... " + spelled(secret) + b" ...")}
        )
        evidence.secret("planted", secret, "home")
        assert len(evidence.out_of_place("planted")) == 1
        evidence.places["log"] = searchable(b"... " + spelled(bytes(len(secret))) + b" ...")
        assert evidence.out_of_place("planted") == []
