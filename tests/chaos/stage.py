"""A fleet as its operator would set it up: by commands, over TLS, every device joined with a token.

The broker is an external mosquitto with the configuration that `covey broker config` writes, so that it
is a process of its own, which neither side starts or ends. Every client has a `Link` before it.
"""

import asyncio
import pwd
import socket
import ssl
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import tomli_w

from chaos.machine import Machine
from chaos.parts import (
    COVEY,
    COVEY_DEVICE,
    START_S,
    Broker,
    CoordinatorPart,
    DevicePart,
    Part,
    command,
)
from chaos.proxy import Link
from covey_coordinator import pki
from covey_coordinator.broker import mosquitto
from covey_coordinator.broker.export import write_configuration
from covey_coordinator.config import load_fleet
from covey_coordinator.fleet import FleetDirectory

FLEET = "chaos"
RUN = "storm"
PLAN = Path(__file__).resolve().parents[2] / "deploy" / "covey_fleet" / "plans" / "mlp"
FLEET_DISK_MB = 256
DEVICE_DISK_MB = 8
MINIMUM = 3
DEADLINES = {
    "gather_s": 8.0,
    "share_s": 8.0,
    "collect_s": 10.0,
    "unmask_s": 8.0,
    "absent_grace_s": 0.5,
    "resend_s": 0.5,
}


@dataclass
class Stage:
    """Everything that is there. base: a directory of ours, with the logs and the evidence in it."""

    base: Path
    machine: Machine
    fleet: FleetDirectory
    broker: Broker
    coordinator: CoordinatorPart
    devices: list[DevicePart] = field(default_factory=list)

    @property
    def parts(self) -> list[Part]:
        """All processes."""
        return [self.broker, self.coordinator, *self.devices]

    @property
    def run(self) -> Path:
        """The run's directory."""
        return self.fleet.path / "runs" / RUN

    @property
    def evidence(self) -> Path:
        """What devices leave (see `device`)."""
        return self.base / "evidence"

    @property
    def transcripts(self) -> Path:
        """Copies of rounds' transcripts, made while they had everything in them."""
        return self.base / "transcripts"

    @property
    def broker_url(self) -> str:
        """Past all proxies."""
        return f"mqtts://{self.machine.address}:{self.broker.port}"

    def ear_context(self) -> ssl.SSLContext:
        """Of a client that may read everything."""
        return pki_context(self.fleet, self.base)


def pki_context(fleet: FleetDirectory, base: Path) -> ssl.SSLContext:
    """A certificate of the fleet's authority for the client "ear", which the broker's rules know."""
    pair = pki.client_pair(fleet.tls.authority, "ear", days=2, now_unix=int(time.time()))
    (base / "ear.crt").write_bytes(pair.certificate)
    (base / "ear.key").write_bytes(pair.key)
    context = ssl.create_default_context(cafile=fleet.tls.path / "ca.crt")
    context.load_cert_chain(base / "ear.crt", base / "ear.key")
    return context


def free_ports(n: int) -> list[int]:
    """Different ones."""
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(n)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


def make_data(path: Path, number: int) -> None:
    """A device's made-up digits."""
    rng = np.random.default_rng(number)
    features = rng.random((64, 1, 8, 8)).astype(np.float32)
    np.savez(path, features=features, labels=rng.integers(0, 10, 64))


@asynccontextmanager
async def staged(base: Path, machine: Machine, n_devices: int) -> AsyncIterator[Stage]:
    """Set everything up and start it; at the end whatever still runs is ended.

    Raises RuntimeError with the words of the command that failed.
    """
    program = mosquitto.find()
    if program is None:
        raise RuntimeError("mosquitto is not installed: apt install mosquitto")
    address = machine.address
    broker_port, enrol_port = free_ports(2)
    logs, path = base / "logs", base / "fleet"
    (base / "evidence").mkdir()
    logs.mkdir()
    machine.disk(path, FLEET_DISK_MB)
    names = [f"pi-{number}" for number in range(1, n_devices + 1)]
    async with AsyncExitStack() as stack:
        up = (address, broker_port)
        links = {n: await stack.enter_async_context(Link(address, up)) for n in ["us", *names]}
        await command(
            *COVEY, "init", path, "--fleet", FLEET, "--address", address, "--enrol-port", enrol_port,
            "--broker", "external", "--broker-url", f"mqtts://{address}:{broker_port}",
        )  # fmt: skip
        fleet = FleetDirectory(path)
        directory = base / "mosquitto"
        now_unix = int(time.time())
        write_configuration(
            fleet, load_fleet(path), directory, directory, days=2, now_unix=now_unix
        )
        adapt_broker(directory)
        broker = Broker(program, directory, broker_port, logs / "broker.log")
        replace_in(path / "covey.toml", f":{broker_port}", f":{links['us'].port}")
        coordinator = CoordinatorPart(path, links["us"], logs / "coordinator.log")
        stage = Stage(base, machine, fleet, broker, coordinator)
        try:
            await broker.start()
            await coordinator.start()
            async with asyncio.timeout(START_S):
                while not (path / "status.json").exists():
                    if coordinator.exits:
                        raise RuntimeError(coordinator.exits[0])
                    await asyncio.sleep(0.05)
            for number, name in enumerate(names, start=1):
                if machine.namespaces:
                    machine.add_namespace(name, number)
            await asyncio.gather(*(_join(stage, name, links) for name in names))
            stage.devices.sort(key=lambda device: int(device.name.removeprefix("pi-")))
            yield stage
        finally:
            for part in stage.parts:
                if part.pid is not None:
                    part.resume()
                    await part.kill()


async def _join(stage: Stage, name: str, links: dict[str, Link]) -> None:
    """One device: its token, its data, its disk and its process."""
    base, machine = stage.base, stage.machine
    token, _ = stage.fleet.make_token(name, hours=None, again=False, now_unix=int(time.time()))
    make_data(base / f"{name}.npz", int(name.removeprefix("pi-")))
    config = base / name / "device.toml"
    await command(
        *COVEY_DEVICE, "join", "-", "--config", config, "--data", base / f"{name}.npz",
        stdin=token.encode() + "\n",
    )  # fmt: skip
    replace_in(config, f":{links['us'].port}", f":{links[name].port}")
    replace_in(config, "[broker]\n", "[broker]\nkeepalive_s = 5\n")
    log = base / "logs" / f"{name}.log"
    device = DevicePart(machine, name, config, stage.evidence, links[name], log)
    machine.disk(device.disk, DEVICE_DISK_MB)
    stage.devices.append(device)
    await device.start()


def adapt_broker(directory: Path) -> None:
    """What differs from a broker of its own machine's: where it keeps things, and our ear."""
    configuration = directory / "mosquitto.conf"
    replace_in(
        configuration,
        "persistence_location /var/lib/mosquitto/",
        f"persistence_location {directory}/\nuser {pwd.getpwuid(0).pw_name}",
    )
    with (directory / "covey.acl").open("a") as rules:
        rules.write("\nuser ear\ntopic read #\n")


def replace_in(path: Path, old: str, new: str) -> None:
    """In a file that must contain it."""
    text = path.read_text()
    assert old in text, f"{path} has no {old!r}"
    mode = path.stat().st_mode
    path.write_text(text.replace(old, new))
    path.chmod(mode)


def write_run(stage: Stage, rounds: int, goal: int) -> Path:
    """run.toml for `covey run`."""
    table = {
        "plan": str(PLAN),
        "rounds": rounds,
        "cohort": {"goal": goal, "minimum": MINIMUM},
        "work": {"batches": 100, "batch_size": 8, "seconds": 8.0},
        "deadlines": DEADLINES,
        # To check every round by, and not the last few.
        "transcripts": {"full_rounds": 1_000_000},
        "models": {"keep_rounds": 1_000_000},
    }
    file = stage.base / "run.toml"
    file.write_text(tomli_w.dumps(table))
    return file
