"""A networked fleet from nothing, as its people make it: every command in a process of its own.

`covey init --address`, `covey up` with a real mosquitto, tokens, `covey-device join`, rounds; then one
device's certificates are renewed while it runs, and another one is revoked.
"""

import json
import re
import socket
import ssl
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import tomli_w

from covey_coordinator.broker import BrokerKind
from covey_coordinator.fleet import FleetDirectory
from covey_coordinator.queueing import queue_run
from covey_device import tls
from covey_device.assembly import load_device
from memory_fleet import PLAN
from processes import COVEY, COVEY_DEVICE, Child, covey, ended, free_port, wait

DEVICES = ("pi-0", "pi-1", "pi-2", "pi-3")


def said(folder: Path, *arguments: object) -> str:
    """What a command of the operator's prints."""
    done = covey(folder, *arguments, "--fleet-dir", "farm")
    assert done.returncode == 0, done.stderr
    return done.stdout


def joined(folder: Path, name: str) -> Path:
    """A device that came by its token as its owner would bring it there."""
    if name == DEVICES[0]:
        token = said(folder, "device", "token", "--name", name)
        assert re.fullmatch(r"covey1:127\.0\.0\.1:\d+:[\w-]{43}:[\w-]{22}\n", token)
    else:  # the same in this process, which is quicker
        fleet = FleetDirectory(folder / "farm")
        made, _ = fleet.make_token(name, hours=None, again=False, now_unix=int(time.time()))
        token = made.encode() + "\n"
    rng = np.random.default_rng(0)
    features = rng.random((64, 1, 8, 8)).astype(np.float32)
    np.savez(folder / f"{name}.npz", features=features, labels=rng.integers(0, 10, 64))
    config = folder / name / "device.toml"
    options = ("--config", config, "--data", f"{name}.npz")
    done = ended(folder, COVEY_DEVICE, "join", "-", *options, stdin=token)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"joined fleet farm as {name}\n")
    return config


def survivors(folder: Path, coordinator: Child, run: str, goal: int = 4) -> list[str]:
    """Play a run of one round -> who checked in and was in the sum."""
    table = {
        "plan": str(PLAN),
        "rounds": 1,
        "work": {"batches": 2},
        "cohort": {"goal": goal, "minimum": 3, "over_selection": 1.0},  # whoever may, is in it
        "deadlines": {"gather_s": 30.0, "absent_grace_s": 0.5, "resend_s": 1.0},
    }
    (folder / "run.toml").write_text(tomli_w.dumps(table))
    if run == "first":
        said(folder, "run", "run.toml", "--name", run, "--detach")
    else:
        queue_run(folder / "farm", folder / "run.toml", run, {})
    coordinator.until(rf"run {run} completed: 1 rounds? completed, 0 abandoned$")
    played = folder / "farm" / "runs" / run
    transcript = (played / "rounds" / "00001" / "transcript").read_bytes()
    found = [name for name in DEVICES if certificate(folder, name) in transcript]
    line = (played / "metrics.jsonl").read_text()
    assert json.loads(line)["survivors"] == len(found)
    return found


def certificate(folder: Path, name: str) -> bytes:
    """A device's identity certificate, as it is in its check-in."""
    return load_device(folder / name / "device.toml").certificate


def let_in(folder: Path, name: str) -> bool:
    """Whether the broker welcomes a connection with this device's TLS certificate."""
    parts = load_device(folder / name / "device.toml")
    assert isinstance(parts.tls, tls.PinnedContext)
    port = int(parts.config.broker.url.rpartition(":")[2])
    client = name.encode()
    packet = b"\x00\x04MQTT\x04\x02\x00\x3c" + len(client).to_bytes(2, "big") + client
    try:
        with (
            socket.create_connection(("127.0.0.1", port), timeout=10) as plain,
            parts.tls.wrap_socket(plain, server_hostname="127.0.0.1") as secure,
        ):
            secure.sendall(b"\x10" + bytes([len(packet)]) + packet)
            return secure.recv(4) == b"\x20\x02\x00\x00"
    except (ssl.SSLError, ConnectionResetError):
        return False


def test_a_networked_fleet_from_nothing(
    tmp_path: Path, start: Callable[..., Child], one_kind: BrokerKind
):
    ports = ("--port", free_port(), "--enrol-port", free_port())
    made = covey(tmp_path, "init", "farm", "--fleet", "farm", "--address", "127.0.0.1", *ports)
    assert made.returncode == 0, made.stderr
    coordinator = start(COVEY, "up", "--fleet-dir", "farm")
    coordinator.until("waiting for devices and runs; Ctrl-C stops$")
    with ThreadPoolExecutor(2) as pool:
        configs = list(pool.map(lambda name: joined(tmp_path, name), DEVICES))
    devices = {
        name: start(COVEY_DEVICE, "run", "--config", config)
        for name, config in zip(DEVICES, configs, strict=True)
    }
    for name, device in devices.items():
        device.until(rf"{name}: connected$")

    assert survivors(tmp_path, coordinator, "first") == list(DEVICES)

    # Renewed while it runs: the broker's certificate and the identity's, by the device itself.
    before = certificate(tmp_path, "pi-1")
    pair = load_device(configs[1]).config.broker.cert_file
    tls_before = (configs[1].parent / str(pair)).read_bytes()
    said(tmp_path, "device", "renew", "pi-1")
    devices["pi-1"].until("pi-1: renewed: TLS certificate and identity certificate$")
    assert certificate(tmp_path, "pi-1") != before
    assert (configs[1].parent / str(pair)).read_bytes() != tls_before
    assert survivors(tmp_path, coordinator, "second") == list(DEVICES)
    transcript = tmp_path / "farm" / "runs" / "second" / "rounds" / "00001" / "transcript"
    assert before not in transcript.read_bytes()

    # Revoked: out of the next round, and of the broker at once.
    assert let_in(tmp_path, "pi-3")  # the control
    said(tmp_path, "device", "revoke", "pi-3")
    wait(lambda: not let_in(tmp_path, "pi-3"))  # the coordinator notices within a second
    assert let_in(tmp_path, "pi-2")
    assert survivors(tmp_path, coordinator, "third", goal=3) == ["pi-0", "pi-1", "pi-2"]
    for child in (coordinator, *devices.values()):
        assert "Traceback" not in child.text
