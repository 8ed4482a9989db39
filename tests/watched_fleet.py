"""A networked fleet on loopback that is watched: everything that it leaves behind, and every secret.

As an operator would have it: `covey up` with mosquitto, four devices that join with tokens, a run of two
rounds, everything logged as verbosely as it goes. One device vanishes in the second round, so that both
kinds of secrets are recovered by the coordinator. A client to whom the broker's rules were opened for
the purpose hears all messages; proxies record the bytes of devices' connections, enrolment included.
"""

import asyncio
import base64
import functools
import logging
import ssl
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
from cryptography.hazmat.primitives import serialization

from covey_coordinator import pki
from covey_coordinator import round as coordinator_round
from covey_coordinator.broker import access, mosquitto, running
from covey_coordinator.config import BrokerConfig, EnrolConfig
from covey_coordinator.daemon import Daemon
from covey_coordinator.fleet import FleetDirectory
from covey_coordinator.plans import signing
from covey_coordinator.plans.bundle import load_bundle
from covey_coordinator.queueing import queue_run
from covey_device import enrol
from covey_device.assembly import assemble, load_device
from covey_shared import keys, sharing
from covey_shared.enrolment import Token
from covey_shared.mqtt import MqttTransport
from memory_fleet import PLAN
from mqtt_clients import Listener, poll, run
from prerequisites import missing

HOST = "127.0.0.1"
DEVICES = ("pi-1", "pi-2", "pi-3", "pi-4")
DEADLINES = {
    "gather_s": 20.0,
    "share_s": 20.0,
    "collect_s": 20.0,
    "unmask_s": 20.0,
    "absent_grace_s": 0.3,
    "resend_s": 0.3,
}


# -- looking ---------------------------------------------------------------------------------------


def spellings(secret: bytes) -> set[bytes]:
    """As it is, in hexadecimal, and in base64 of either alphabet, wherever in a longer text."""
    found = {secret, secret.hex().encode(), secret.hex().upper().encode()}
    for offset in range(3):
        text = base64.b64encode(bytes(offset) + secret)
        # without the characters that the bytes before and after have a part in
        first, last = -(-offset * 8 // 6), (offset + len(secret)) * 8 // 6
        found |= {text[first:last], text[first:last].translate(bytes.maketrans(b"+/", b"-_"))}
    return found


def holders(secret: bytes, places: dict[str, bytes]) -> set[str]:
    """Where it is. Line breaks, of PEM say, hide nothing."""
    wanted = spellings(secret)
    return {place for place, data in places.items() if any(form in data for form in wanted)}


def searchable(data: bytes) -> bytes:
    return data + b"\0" + b"".join(data.split())


@dataclass
class Evidence:
    """All that a fleet left behind. secrets: kind -> secret -> the places where it may be."""

    places: dict[str, bytes] = field(default_factory=dict)
    secrets: dict[str, dict[bytes, frozenset[str]]] = field(default_factory=dict)

    def secret(self, kind: str, value: bytes, *homes: str) -> None:
        assert len(value) >= 16
        self.secrets.setdefault(kind, {})[value] = frozenset(homes)

    def out_of_place(self, kind: str) -> list[str]:
        """Where secrets of this kind are and should not be, and where they should be and are not."""
        return [
            f"{kind} {value.hex()[:6]}.. is in {sorted(held)}, not in {sorted(homes)}"
            for value, homes in self.secrets[kind].items()
            if (held := holders(value, self.places)) != homes
        ]


# -- a fleet that is watched -----------------------------------------------------------------------


class RecordingProxy:
    """Passes bytes on, and keeps them."""

    def __init__(self, port: int) -> None:
        self._port = port
        self.recorded = bytearray()

    async def __aenter__(self) -> "RecordingProxy":
        self._server = await asyncio.start_server(self._serve, HOST, 0)
        self.port: int = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection(HOST, self._port)

        async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
            try:
                while data := await source.read(65536):
                    self.recorded += data
                    sink.write(data)
                    await sink.drain()
            except OSError:
                pass
            finally:
                sink.close()

        await asyncio.gather(pump(reader, far_writer), pump(far_reader, writer))


def everywhere(
    monkeypatch: pytest.MonkeyPatch, function: Callable[..., Any], note: Callable[..., None]
) -> None:
    """Tell `note` of every call, whichever module made it: (result, *arguments)."""

    @functools.wraps(function)
    def noted(*arguments: Any, **more: Any) -> Any:
        result = function(*arguments, **more)
        note(result, *arguments)
        return result

    for name, module in list(sys.modules.items()):
        if name.startswith("covey_") and getattr(module, function.__name__, None) is function:
            monkeypatch.setattr(module, function.__name__, noted)


def listen_in(monkeypatch: pytest.MonkeyPatch, evidence: Evidence) -> None:
    """Learn every secret of the rounds, on both sides."""
    for make in (keys.mask_key, keys.seal_key, keys.self_mask_commitment):
        everywhere(monkeypatch, make, lambda _, seed: evidence.secret("seed", seed))
    everywhere(
        monkeypatch,
        sharing.split,
        lambda shares, *_: [evidence.secret("share", share) for share in shares],
    )
    everywhere(monkeypatch, keys.hkdf, lambda key, *_: evidence.secret("derived key", key))
    begin = coordinator_round.Round.__init__

    def begun(self: Any, *arguments: Any, **more: Any) -> None:
        begin(self, *arguments, **more)
        # Of a round with a result its transcript tells it, for others to check the sum by.
        number = len(evidence.secrets.get("reveal key", {})) + 1
        home = f"fleet/runs/run/rounds/{number:05}/transcript"
        evidence.secret("reveal key", self._reveal_secret, home)

    monkeypatch.setattr(coordinator_round.Round, "__init__", begun)


def scalar(pem: bytes) -> bytes:
    """The private number of a key."""
    key = serialization.load_pem_private_key(pem, password=None)
    return key.private_numbers().private_value.to_bytes(32, "big")  # type: ignore[union-attr]


def seed(path: Path) -> bytes:
    return bytes.fromhex(path.read_text())


def make_data(path: Path, number: int) -> None:
    rng = np.random.default_rng(number)
    np.savez(
        path,
        features=rng.random((32, 1, 8, 8)).astype(np.float32),
        labels=rng.integers(0, 10, 32),
    )


@dataclass
class Watched:
    """A networked fleet in `path`, of which everything is kept."""

    path: Path
    evidence: Evidence
    said: list[str] = field(default_factory=list)
    tokens: list[Token] = field(default_factory=list)

    def __post_init__(self) -> None:
        broker = BrokerConfig(port=running._free_port())
        enrolment = EnrolConfig(port=running._free_port())
        self.fleet = FleetDirectory.create(
            self.path / "fleet", "farm", broker, addresses=(HOST,), enrol=enrolment
        )
        self.broker_port, self.enrol_port = broker.port or 0, enrolment.port
        self.plan = self.path / "plan"
        bundle = load_bundle(PLAN)
        self.plan.mkdir()
        for file in PLAN.iterdir():
            (self.plan / file.name).write_bytes(file.read_bytes())
        self.owner = self.path / "owner.key"
        signing.make_owner_key(self.owner, bytes(range(100, 132)))
        signing.sign_plan(self.plan, bundle.hash, signing.read_owner_key(self.owner))

    def device_file(self, name: str) -> Path:
        return self.path / name / "device.toml"

    def join(self, name: str, proxy: RecordingProxy, broker: RecordingProxy) -> None:
        """As on a device: `covey-device join`. Its connections go through the proxies."""
        token, _ = self.fleet.make_token(name, hours=None, again=False, now_unix=int(time.time()))
        self.tokens.append(token)
        data = self.path / f"{name}.npz"
        make_data(data, len(self.tokens))
        enrol.join(replace(token, port=proxy.port), self.device_file(name), data=data)
        text = self.device_file(name).read_text()
        assert f":{self.broker_port}" in text
        self.device_file(name).write_text(text.replace(f":{self.broker_port}", f":{broker.port}"))
        # The limit is the whole process's.
        (self.path / name / "policy.toml").write_text("[limits]\nmax_memory_mb = 10000\n")

    def ear(self) -> Listener:
        """Hears every message that goes through the broker."""
        pair = pki.client_pair(self.fleet.tls.authority, "ear", days=1, now_unix=int(time.time()))
        certificate, key = self.path / "ear.crt", self.path / "ear.key"
        certificate.write_bytes(pair.certificate)
        key.write_bytes(pair.key)
        context = pki_context(self.fleet, certificate, key)
        return Listener(MqttTransport(f"mqtts://{HOST}:{self.broker_port}", "ear", tls=context))

    async def play(self) -> None:
        """Everything, from the first token to the end of the run."""
        stop = asyncio.Event()
        serving = asyncio.create_task(Daemon(self.fleet, self.said.append).serve(stop))
        try:
            await poll(lambda: serving.done() or any("waiting for" in line for line in self.said))
            assert not serving.done(), serving.exception()
            async with (
                RecordingProxy(self.enrol_port) as enrolment,
                RecordingProxy(self.broker_port) as traffic,
                self.ear() as ear,
            ):
                await ear.transport.subscribe("#")
                for name in DEVICES:
                    await asyncio.to_thread(self.join, name, enrolment, traffic)
                await self._rounds()
                for i, message in enumerate(ear.messages):
                    where = f"message {i} on {message.topic}"
                    self.evidence.places[where] = searchable(message.payload)
                for name, proxy in (("enrolment", enrolment), ("broker", traffic)):
                    self.evidence.places[f"bytes to and from the {name}"] = bytes(proxy.recorded)
        finally:
            stop.set()
            await serving

    async def _rounds(self) -> None:
        devices = [assemble(load_device(self.device_file(name))) for name in DEVICES]
        table = {
            "plan": str(self.plan),
            "rounds": 2,
            "work": {"batches": 1},
            "cohort": {"goal": len(DEVICES)},
            "deadlines": DEADLINES,
        }
        file = self.path / "run.toml"
        file.write_text(tomli_w.dumps(table))
        directory = queue_run(self.fleet.path, file, "run", {})
        vanishing: list[asyncio.Task[None]] = []
        gone = devices[-1]
        publish = gone.transport.publish

        async def publish_or_vanish(topic: str, payload: bytes, *, retain: bool = False) -> None:
            """In the second round, with its keys shared, it goes: the others take its masks off."""
            if "/up/" in topic and directory.state().rounds_done:
                if not vanishing:
                    vanishing.append(asyncio.create_task(gone.close(graceful=False)))
                await asyncio.Event().wait()
            await publish(topic, payload, retain=retain)

        gone.transport.publish = publish_or_vanish  # type: ignore[method-assign]
        for device in devices:
            await device.start()
        try:
            await poll(lambda: directory.state().status not in ("queued", "running"))
            lines = directory.read_metrics()
            assert [line["survivors"] for line in lines] == [4, 3], (lines, self.said)
        finally:
            directory.store.close()
            for device in devices:
                await device.close()


def pki_context(fleet: FleetDirectory, certificate: Path, key: Path) -> ssl.SSLContext:
    """Of a client with this certificate."""
    context = ssl.create_default_context(cafile=fleet.tls.path / "ca.crt")
    context.load_cert_chain(certificate, key)
    return context


# -- its life --------------------------------------------------------------------------------------

_lived: list[tuple[Watched, Evidence]] = []


def lived(tmp_path_factory: pytest.TempPathFactory) -> tuple[Watched, Evidence]:
    """The fleet, stopped, and what it left: one for all tests of a process."""
    if not _lived:
        if mosquitto.find() is None:
            missing("mosquitto is not installed: apt install mosquitto")
        path, evidence = tmp_path_factory.mktemp("watched"), Evidence()
        with pytest.MonkeyPatch.context() as monkeypatch, logged(path / "python.log"):
            rules = access.access_control
            monkeypatch.setattr(
                access,
                "access_control",
                lambda fleet, revoked=(): rules(fleet, revoked) + "\nuser ear\ntopic read #\n",
            )
            listen_in(monkeypatch, evidence)
            watched = Watched(path, evidence)
            run(watched.play())
        collect(watched, evidence)
        _lived.append((watched, evidence))
    return _lived[0]


@contextmanager
def logged(path: Path) -> Iterator[None]:
    """Everything that anybody logs goes into a file."""
    log = logging.FileHandler(path)
    log.setFormatter(logging.Formatter("%(asctime)s %(name)s %(message)s"))
    root = logging.getLogger()
    level = root.level
    root.addHandler(log)
    root.setLevel(logging.DEBUG)
    try:
        yield
    finally:
        root.removeHandler(log)
        root.setLevel(level)
        log.close()


def collect(watched: Watched, evidence: Evidence) -> None:
    """Everything on disk, and where each lasting secret is at home."""
    path, fleet = watched.path, watched.fleet.path
    for file in path.rglob("*"):
        if file.is_file():
            evidence.places[str(file.relative_to(path))] = searchable(file.read_bytes())
    evidence.places["what covey up said"] = "\n".join(watched.said).encode()

    def home(kind: str, file: Path, *more: str, read: Callable[[Path], bytes]) -> None:
        evidence.secret(kind, read(file), str(file.relative_to(path)), *more)

    def of_pem(file: Path) -> bytes:
        return scalar(file.read_bytes())

    home("fleet CA", fleet / "ca" / "ca.key", read=seed)
    home("coordinator", fleet / "coordinator.key", read=seed)
    home("model owner", watched.owner, read=seed)
    home("TLS", fleet / "tls" / "ca.key", read=of_pem)
    home("TLS", fleet / "tls" / "server.key", "fleet/broker/run/server.key", read=of_pem)
    home("TLS", fleet / "tls" / "coordinator.key", read=of_pem)
    for name in DEVICES:
        (keys_,) = (path / name).glob("enrolment-*")
        home("identity", keys_ / "identity.key", read=seed)
        home("TLS", keys_ / "broker.pem", read=of_pem)
    for token in watched.tokens:
        evidence.secret("token", token.secret)
