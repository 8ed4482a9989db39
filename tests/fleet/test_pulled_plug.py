"""`covey-device run` is killed in the middle of its upload, over a slow link to a real mosquitto, and started
again: the same upload arrives whole, byte for byte, and is in the sum."""

import asyncio
import contextlib
import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import tomli_w

from covey_coordinator.broker import mosquitto
from covey_shared import chunks, wire
from covey_shared.messages import Decline, MaskedUpdate, Message, WantBlob
from covey_shared.mqtt import MqttTransport
from covey_shared.topics import Topics
from mqtt_clients import Listener, run
from prerequisites import missing
from processes import COVEY, COVEY_DEVICE, Child, covey, free_port, start

__all__ = ["start"]  # a fixture

N, VICTIM = 4, "pi-1"  # three of four members are a quorum
TOPICS = Topics("farm")

# Half a million parameters: an update of a megabyte, in ten chunks.
COMPILE = """
import sys
from pathlib import Path
import numpy as np
import torch
from covey_coordinator.plans.bundle import write
from covey_coordinator.plans.compile import compile_plan

torch.manual_seed(0)
torch.set_num_threads(1)
nn = torch.nn
model = nn.Sequential(nn.Flatten(), nn.Linear(64, 2000), nn.ReLU(), nn.Linear(2000, 200), nn.ReLU(),
                      nn.Linear(200, 10))
examples = np.random.default_rng(0).random((8, 1, 8, 8), np.float32)
write(compile_plan(model, examples, np.arange(8), loss="cross_entropy", name="wide"), Path(sys.argv[1]))
"""


class SlowLink:
    """Stands between a device and its broker. bytes_per_s: upwards, once it is `slow`."""

    def __init__(self, upstream: int, bytes_per_s: float) -> None:
        self.upstream, self.bytes_per_s = upstream, bytes_per_s
        self.slow = False
        self.port = 0

    async def __aenter__(self) -> "SlowLink":
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *error: object) -> None:
        self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            up, down = await asyncio.open_connection("127.0.0.1", self.upstream)
        except OSError:
            writer.close()
            return
        with contextlib.suppress(OSError):
            both = (self._pass(reader, down, up=True), self._pass(up, writer, up=False))
            await asyncio.gather(*both)

    async def _pass(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, up: bool
    ) -> None:
        try:
            while data := await reader.read(8192):
                writer.write(data)
                await writer.drain()
                if up and self.slow:
                    await asyncio.sleep(len(data) / self.bytes_per_s)
        finally:
            writer.close()


def make_fleet(tmp_path: Path, port: int) -> None:
    plan = tmp_path / "plan"
    subprocess.run([sys.executable, "-c", COMPILE, plan], check=True, timeout=200)
    made = covey(
        tmp_path, "init", "farm", "--fleet", "farm", "--broker", "mosquitto", "--port", port
    )
    assert made.returncode == 0, made.stderr
    rng = np.random.default_rng(0)
    for i in range(N):
        features = rng.random((16, 1, 8, 8)).astype(np.float32)
        np.savez(tmp_path / f"{i}.npz", features=features, labels=rng.integers(0, 10, 16))
        added = covey(
            tmp_path, "device", "add", f"pi-{i}", "--data", f"{i}.npz", "--fleet-dir", "farm"
        )
        assert added.returncode == 0, added.stderr
    table = {
        "plan": str(plan),
        "rounds": 1,
        "cohort": {"goal": N},
        "work": {"batches": 1},
        # Nobody is given up while a process starts again on a busy machine.
        "deadlines": {"gather_s": 60.0, "absent_grace_s": 50.0, "resend_s": 1.0},
    }
    (tmp_path / "run.toml").write_text(tomli_w.dumps(table))


class Tap(Listener):
    """Hears all that a device says."""

    def said(self, kind: type[Message]) -> list[bytes]:
        outbox = TOPICS.outbox(VICTIM)
        heard = [m.payload for m in self.messages if m.topic == outbox]
        return [payload for payload in heard if payload[1] == kind.CODE]

    def frames(self, since: int = 0) -> list[chunks.Chunk]:
        upload = TOPICS.upload(VICTIM)
        return [chunks.decode_frame(m.payload) for m in self.messages[since:] if m.topic == upload]


def test_an_upload_that_kill_9_cut_off_is_finished_byte_for_byte(
    tmp_path: Path, start: Callable[..., Child]
):
    if mosquitto.find() is None:
        missing("mosquitto is not installed: apt install mosquitto")
    port = free_port()
    make_fleet(tmp_path, port)
    start(COVEY, "up", "--fleet-dir", "farm").until("waiting for devices and runs; Ctrl-C stops$")

    async def scenario() -> None:
        home = tmp_path / "farm" / "devices" / VICTIM
        text = (home / "device.toml").read_text()
        user = re.search(r'username = "(.+)"', text)
        password = re.search(r'password_file = "(.+)"', text)
        assert user is not None
        assert password is not None
        transport = MqttTransport(
            f"mqtt://127.0.0.1:{port}",
            "tap",
            username=user[1],
            password=(home / password[1]).read_text().strip(),
        )
        async with SlowLink(port, 400_000.0) as link, Tap(transport) as tap:
            await tap.transport.subscribe(TOPICS.outbox(VICTIM), TOPICS.upload(VICTIM))
            # It keeps no model: what it asks for then is no part of the round.
            text = text.replace(f":{port}", f":{link.port}") + "\n[model]\nkeep = false\n"
            (home / "device.toml").write_text(text)

            def launch(name: str) -> Child:
                return start(COVEY_DEVICE, "run", "--config", f"farm/devices/{name}/device.toml")

            devices = {f"pi-{i}": launch(f"pi-{i}") for i in range(N)}
            for name, child in devices.items():
                await asyncio.to_thread(child.until, f"{name}: connected$")
            link.slow = True
            playing = start(COVEY, "run", "run.toml", "--name", "one", "--fleet-dir", "farm")
            await tap.until(lambda: len(tap.frames()) >= 2)
            devices[VICTIM]._process.send_signal(signal.SIGKILL)
            await asyncio.to_thread(devices[VICTIM]._process.wait)
            await asyncio.sleep(0.2)  # what the broker still has to pass on
            before = tap.frames()
            assert 2 <= len(before) < chunks.n_chunks(before[0].size), (
                "it was too quick to be killed"
            )
            messages = len(tap.messages)
            kept = (home / "state" / "unfinished.bin").read_bytes()
            link.slow = False

            back = launch(VICTIM)
            await asyncio.to_thread(
                back.until, f"{VICTIM}: round 1: its upload may not have arrived"
            )
            await asyncio.to_thread(
                playing.until, "^run one completed: 1 rounds completed, 0 abandoned$"
            )
            await asyncio.to_thread(back.until, f"{VICTIM}: round 1: completed$")

            updates = tap.said(MaskedUpdate)
            assert len(set(updates)) == 1
            update = wire.decode_as(MaskedUpdate, updates[0]).message
            payload: dict[int, bytes] = {}
            for chunk in tap.frames():
                assert (chunk.digest, chunk.size) == (update.payload, update.payload_bytes)
                assert payload.setdefault(chunk.index, chunk.data) == chunk.data
            assert b"".join(payload[i] for i in sorted(payload)) == kept
            # After the restart only what had not arrived was sent, and nothing was fetched again.
            arrived = {chunk.index for chunk in before}
            assert arrived.isdisjoint(chunk.index for chunk in tap.frames(messages))
            outbox = TOPICS.outbox(VICTIM)
            later = [m.payload[1] for m in tap.messages[messages:] if m.topic == outbox]
            assert not {Decline.CODE, WantBlob.CODE} & set(later)
            assert not list((home / "state").glob("unfinished.*"))

    run(scenario())
    (line,) = (tmp_path / "farm" / "runs" / "one" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line)["survivors"] == N
