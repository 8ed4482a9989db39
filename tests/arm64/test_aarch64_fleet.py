"""A fleet of three, two of them on aarch64: bookworm's Python and trixie's, and one of this machine.

As their owners would have it: a networked coordinator with mosquitto and TLS, the package as dpkg installed
it, a token for each, `covey-device join`, `doctor` and `run`. Each round's sum is made again in the clear.
"""

import functools
import hashlib
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tomli_w

from arm64.conftest import each, timed
from arm64.userlands import GUEST, Userland
from covey_coordinator.broker import mosquitto
from covey_coordinator.fleet import FleetDirectory
from covey_shared import wire
from covey_shared.fixedpoint import pack, to_signed
from covey_shared.messages import Manifest, Message, Result
from covey_shared.transcript import Kind, Reader, Record
from memory_fleet import PLAN
from prerequisites import missing
from processes import COVEY, COVEY_DEVICE, Child, covey, ended, free_port

pytestmark = [pytest.mark.arm64, pytest.mark.timeout(600)]

NATIVE = "native"
USER = "covey-device"
WITNESS = Path("/var/lib/covey-device/witness")
ROUNDS = 2
PATIENT_S = 120.0
"""For what takes a second on a Pi."""

# What the owner of an emulated machine sets: the emulator's memory counts as the device's there, and it
# keeps a processor busy, which is no reason to wait.
POLICY = {
    "limits": {"max_memory_mb": 4000, "trial_seconds": 200.0},
    "host": {"cpu_pressure": 0, "memory_pressure": 0, "io_pressure": 0},
}

RUN = {
    "plan": str(PLAN),
    "rounds": ROUNDS,
    "work": {"batches": 3, "batch_size": 16, "seconds": PATIENT_S},
    "cohort": {"goal": 3, "minimum": 3},
    "deadlines": {
        "gather_s": 240.0,
        "share_s": PATIENT_S,
        "collect_s": 240.0,
        "unmask_s": PATIENT_S,
        "absent_grace_s": 30.0,
    },
}


def data(path: Path, seed: int) -> None:
    """A device's own examples."""
    rng = np.random.default_rng(seed)
    features = rng.random((64, 1, 8, 8)).astype(np.float32)
    np.savez(path, features=features, labels=rng.integers(0, 10, 64))


def token(folder: Path, name: str) -> str:
    """As `covey device token` prints it."""
    fleet = FleetDirectory(folder / "farm")
    made, _ = fleet.make_token(name, hours=None, again=False, now_unix=int(time.time()))
    return made.encode() + "\n"


def join_emulated(folder: Path, userland: Userland) -> None:
    """A device joins as its owner would have it join."""
    name, etc = userland.release, userland.root / "etc" / "covey"
    data(userland.root / "tmp" / "data.npz", len(name))
    with timed(f"{name}: covey-device join"):
        done = userland.run(
            *("/usr/bin/covey-device", "join", "-", "--data", "/tmp/data.npz"),
            seconds=PATIENT_S,
            stdin=token(folder, name),
        )
    assert done.returncode == 0, done.stderr
    assert f"joined fleet farm as {name}\n" in done.stdout
    (etc / "policy.toml").write_text(tomli_w.dumps(POLICY))
    # No systemd runs here, so it is for the owner to let the service's user have all this.
    given = f"install -d {WITNESS} && chown -R {USER}: {WITNESS} /etc/covey"
    done = userland.run("/bin/sh", "-c", given, seconds=PATIENT_S)
    assert done.returncode == 0, done.stderr


def examine(userland: Userland) -> None:
    """The device finds nothing wrong with itself, its machine, or the way to its broker."""
    with timed(f"{userland.release}: covey-device doctor"):
        done = userland.run("/usr/bin/covey-device", "doctor", "--json", seconds=300)
    found = {one["check"]: one for one in json.loads(done.stdout)["checks"]}
    ill = [one for one in found.values() if one["verdict"] in ("problem", "unknown")]
    assert (done.returncode, ill) == (0, []), done.stdout + done.stderr
    for name in ("architecture", "python", "packages", "known-answers", "training"):
        assert found[name]["verdict"] == "ok", found[name]
    assert found["architecture"]["says"].startswith("aarch64, 64-bit programs")
    assert found["python"]["says"].startswith(f"Python {userland.python}.")


def remove(userland: Userland) -> None:
    """The owner has had enough: nothing stays, keys included."""
    with timed(f"{userland.release}: dpkg removes the package"):
        done = userland.run("/usr/bin/dpkg", "--purge", "covey-device", seconds=300)
    assert done.returncode == 0, done.stdout + done.stderr
    left = ("opt/covey", "usr/bin/covey-device", "etc/covey/device.toml", "var/lib/covey-device")
    assert [place for place in left if os.path.lexists(userland.root / place)] == []
    for name in ("passwd", "group"):
        assert "covey-device" not in (userland.root / "etc" / name).read_text()


def join_native(folder: Path) -> Path:
    config = folder / NATIVE / "device.toml"
    data(folder / "native.npz", 0)
    options = ("--config", config, "--data", "native.npz")
    done = ended(folder, COVEY_DEVICE, "join", "-", *options, stdin=token(folder, NATIVE))
    assert done.returncode == 0, done.stderr
    (config.parent / "policy.toml").write_text(tomli_w.dumps(POLICY))
    return config


def said(path: Path, kind: type[Message], coordinator: bytes) -> Message:
    """The one message of a kind in a transcript, signed by the coordinator."""
    with path.open("rb") as file:
        records = [r for r in Reader(file.read) if isinstance(r, Record) and r.kind is Kind.MESSAGE]
    signed = [wire.decode(record.body) for record in records]
    (found,) = [one for one in signed if isinstance(one.message, kind)]
    found.check(coordinator, signer="the coordinator")
    return found.message


def exact(played: Path, index: int, plain: Callable[[str, int], np.ndarray], key: bytes) -> bytes:
    """Make the sum of a round and the next model again, from what devices encoded -> the model's hash.

    Arithmetic of its own: nothing here is taken from what the coordinator computed with.
    """
    round_directory = played / "rounds" / f"{index:05}"
    transcript = round_directory / "transcript"
    manifest, result = said(transcript, Manifest, key), said(transcript, Result, key)
    assert isinstance(manifest, Manifest)
    assert isinstance(result, Result)
    head = manifest.head
    assert head.n == 3
    names = ("bookworm", NATIVE, "trixie")
    rings = [plain(name, result.round) for name in names]
    assert len({ring.tobytes() for ring in rings}) == 3
    total = np.sum([ring.astype(np.uint64) for ring in rings], axis=0) % (1 << head.bits)
    assert hashlib.sha256(pack(total.astype(np.uint32), head.bits)).digest() == result.ring_sum

    before = np.fromfile(round_directory / "model-before.bin", "<f4")
    assert hashlib.sha256(before.tobytes()).digest() == head.model
    signed = to_signed(total, head.bits)
    weight = int(signed[head.n_params])
    average = (signed[: head.n_params] * (head.clip / weight)).astype(np.float32)
    following = before + average
    assert np.abs(average).max() > 1e-4  # they learnt something
    assert hashlib.sha256(following.astype("<f4").tobytes()).digest() == result.next_model
    return result.next_model


def test_two_rounds_with_exact_sums(
    tmp_path: Path, start: Callable[..., Child], userlands: list[Userland]
) -> None:
    if mosquitto.find() is None:
        missing("mosquitto is not installed: apt install mosquitto")
    ports = ("--port", free_port(), "--enrol-port", free_port())
    made = covey(tmp_path, "init", "farm", "--fleet", "farm", "--address", "127.0.0.1", *ports)
    assert made.returncode == 0, made.stderr
    coordinator = start(COVEY, "up", "--fleet-dir", "farm")
    coordinator.until("waiting for devices and runs; Ctrl-C stops$")
    each(userlands, functools.partial(join_emulated, tmp_path))
    each(userlands, examine)

    devices = {}
    witnessed = {NATIVE: tmp_path / "native-witness"}
    with timed("both: covey-device run, until it is connected"):
        for userland in userlands:
            witnessed[userland.release] = userland.root / str(WITNESS).lstrip("/")
            program = ("/opt/covey/bin/python", "/run/covey-tests/guest/witnessed.py", WITNESS)
            command = userland.command(*program, user=USER, guest=GUEST)
            devices[userland.release] = start(command, "run")
        witnessed[NATIVE].mkdir()
        native = [COVEY_DEVICE[0], GUEST / "witnessed.py", witnessed[NATIVE]]
        config = join_native(tmp_path)
        devices[NATIVE] = start([*map(str, native)], "run", "--config", config)
        for name, device in devices.items():
            device.until(rf"{name}: connected$", PATIENT_S)

    (tmp_path / "run.toml").write_text(tomli_w.dumps(RUN))
    queued = covey(tmp_path, "run", "run.toml", "--name", "both", "--detach", "--fleet-dir", "farm")
    assert queued.returncode == 0, queued.stderr
    with timed(f"both: {ROUNDS} rounds"):
        ended_so = coordinator.until(r"(run both completed: .*|run both: .* abandoned: .*)$", 400)
    assert ended_so[1].endswith(f" {ROUNDS} rounds completed, 0 abandoned"), coordinator.text

    # Each sum is the sum of what the three encoded, and each model what follows from it.
    def plain(name: str, round_id: int) -> np.ndarray:
        return np.load(witnessed[name] / f"{round_id}.npy")

    farm, played = tmp_path / "farm", tmp_path / "farm" / "runs" / "both"
    keys = ("--fleet-ca", farm / "ca" / "ca.pub", "--coordinator", farm / "coordinator.pub")
    coordinator_key = bytes.fromhex((farm / "coordinator.pub").read_text().strip())
    models = [exact(played, index, plain, coordinator_key) for index in (1, 2)]
    assert hashlib.sha256((played / "parameters.bin").read_bytes()).digest() == models[-1]
    for index in (1, 2):  # and a stranger is convinced of it
        transcript = played / "rounds" / f"{index:05}" / "transcript"
        verified = covey(tmp_path, "verify", transcript, *keys, "--strict")
        assert verified.returncode == 0, verified.stdout

    for name, device in devices.items():
        assert device.end(signal.SIGTERM) == 0, device.text
        assert device.text.endswith(f"{name}: stopped")
    assert coordinator.end() == 0
    each(userlands, remove)
