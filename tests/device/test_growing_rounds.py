"""Data that grows between rounds: through what prepares a round, a real logger, and a whole fleet."""

import asyncio
import importlib.util
import math
import random
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest

from covey_coordinator.run import RoundOutcome
from covey_device.assembly import concerns
from covey_device.data import ShardsData, open_source
from covey_device.data.growing import Growth
from covey_device.preparation import Preparation, TriedTrainers
from covey_device.shards import ShardWriter
from covey_device.trainer import Trainer, Work, load_trainer
from covey_shared.errors import DataError
from covey_shared.plan import decode_header, plan_hash
from device_support import LinearStep, make_header
from processes import wait
from small_fleet import go, small_fleet

MLP = Path(str(files("covey_fleet"))) / "plans" / "mlp"
LOGGER = Path(__file__).parents[2] / "examples" / "sensor_logger.py"
DATA = ShardsData(directory="data")


def write(directory, n, seed=0):
    """A shard of n examples for the shipped plan."""
    rng = np.random.default_rng(seed)
    with ShardWriter(directory, rows_per_shard=n) as writer:
        for _ in range(n):
            writer.append(rng.random((1, 8, 8), np.float32), int(rng.integers(10)))


class Blobs:
    """What a round names, at hand."""

    def __init__(self):
        self.header = (MLP / "plan.json").read_bytes()
        graph, self.model = (MLP / "train.onnx").read_bytes(), (MLP / "initial.bin").read_bytes()
        decoded = decode_header(self.header)
        self._blobs = {
            plan_hash(self.header): self.header,
            bytes.fromhex(decoded.train.sha256): graph,
            b"model": self.model,
        }

    def hold(self, digests):
        pass

    async def fetch(self, digest, size, *, limit):
        return self._blobs[digest]

    @property
    def call(self):
        class Call:
            plan, plan_bytes = plan_hash(self.header), len(self.header)
            model, model_bytes = b"model", len(self.model)

        return Call


class Prepared:
    def __init__(self, base, select="recent"):
        self.base, self.loop = base, threading.get_ident()
        self.threads = set()
        config = ShardsData(directory="data", select=select)
        growth = Growth(base / "state")

        def make_trainer(header, graph):
            self.threads.add(threading.get_ident())
            return load_trainer(header, graph, config, base, growth=growth)

        self.preparation = Preparation(
            Blobs(),
            make_trainer,
            limits=Work(10, 1, math.inf, 1 << 40),
            rng=lambda n: bytes(n),
            pool=ThreadPoolExecutor(1),
        )

    async def round(self):
        """How many examples the next round would train on."""
        await self.preparation.fetch(Blobs().call)
        trainer = self.preparation.plan[2]
        refresh = trainer.refresh

        def watched():
            self.threads.add(threading.get_ident())
            refresh()

        trainer.refresh = watched
        return trainer.n_examples


@pytest.mark.parametrize("select", ["recent", "reservoir", "all"])
def test_each_round_is_prepared_with_what_is_there(tmp_path, select):
    async def scenario():
        prepared = Prepared(tmp_path, select)
        with pytest.raises(DataError, match="no such directory"):
            await prepared.round()
        (tmp_path / "data").mkdir()
        with pytest.raises(DataError, match="has no shard yet"):
            await prepared.round()
        write(tmp_path / "data", 5)
        assert await prepared.round() == 5
        write(tmp_path / "data", 7)
        assert await prepared.round() == 12
        assert await prepared.round() == 12
        for path in (tmp_path / "data").iterdir():
            path.unlink()
        if select == "reservoir":
            assert await prepared.round() == 12
        else:
            with pytest.raises(DataError, match="has no shard yet"):
                await prepared.round()
        write(tmp_path / "data", 3)
        assert await prepared.round() == (15 if select == "reservoir" else 3)
        assert prepared.loop not in prepared.threads  # the event loop waits for no disk
        assert prepared.threads

    asyncio.run(scenario())


def test_data_are_not_taken_in_under_a_training(tmp_path):
    """An earlier round's may still be ending when the next one is prepared."""

    async def scenario():
        (tmp_path / "data").mkdir()
        write(tmp_path / "data", 5)
        prepared = Prepared(tmp_path)
        prepared.preparation._pool = None  # threads enough for both
        assert await prepared.round() == 5
        with prepared.preparation._in_use:
            write(tmp_path / "data", 5)
            fetching = asyncio.create_task(prepared.round())
            done, _ = await asyncio.wait([fetching], timeout=0.2)
            assert not done
        assert await fetching == 10

    asyncio.run(scenario())


def test_a_device_that_starts_before_its_data_says_so(tmp_path):
    class Parts:
        certificate, base = b"", tmp_path

        class config:
            enrol, data = None, DATA

    (found,) = concerns(Parts, 0.0)
    assert found.startswith(f"key `data.directory`: {tmp_path / 'data'} does not exist")
    (tmp_path / "data").mkdir()
    assert concerns(Parts, 0.0) == []


def test_trainers_share_what_was_told(tmp_path):
    assert TriedTrainers(DATA, tmp_path, tmp_path, lambda: None)._growth.state == tmp_path


# --- the example ----------------------------------------------------------------------------------


def test_the_logger_logs_while_a_device_trains(tmp_path, start):
    """A process appends, trainings go on beside it, and it dies as it may. The model learns."""
    header = make_header(labels=("float32", (1,)))
    command = [sys.executable, str(LOGGER)]
    options = [
        "--directory",
        tmp_path / "data",
        "--every",
        "0.002",
        "--rows",
        "8",
        "--simulate",
        "--seed",
        1,
    ]
    logger = start(command, *options)
    config = ShardsData(directory="data", scale=0.01, select="reservoir", max_examples=64)
    growth = Growth(tmp_path / "state", rng=np.random.default_rng(0))
    data = tmp_path / "data"
    wait(lambda: len(list(data.glob("*.npz"))) >= 1, lambda: "no shard")
    source = open_source(config, header, base=tmp_path, growth=growth)
    trainer = Trainer(LinearStep(header), source, header)
    parameters, losses, sizes = np.zeros(header.n_params, np.float32), [], []
    work = Work(40, 16, math.inf, 1 << 60, {"lr": 0.5})
    while sizes[-1:] != [64]:
        trainer.refresh()
        rng = np.random.default_rng(len(sizes))
        result = trainer.train(parameters, work, clock=lambda: 0.0, rng=rng)
        parameters = parameters + result.delta
        losses.append(result.loss)
        if sizes[-1:] != [trainer.n_examples]:
            sizes.append(trainer.n_examples)
        if len(losses) == 1:
            logger.end(signal.SIGKILL)
            logger = start(command, *options)
    assert logger.end() == 0
    assert sizes == sorted(sizes)
    assert sizes[0] < 64
    assert losses[-1] < 0.1 * losses[0]
    assert len(list(data.glob("*.npz"))) > 4
    assert list(data.glob(".*")) == []


def load_example():
    spec = importlib.util.spec_from_file_location("sensor_logger", LOGGER)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_logger_reads_a_thermal_zone_that_comes_and_goes(tmp_path, capsys):
    logger = load_example()
    assert logger.thermal_zone(tmp_path) is None
    for number, text in enumerate(["broken", "48250\n"]):
        (tmp_path / f"thermal_zone{number}").mkdir()
        (tmp_path / f"thermal_zone{number}" / "temp").write_text(text)
    read = logger.thermal_zone(tmp_path)
    assert read() == 48.25
    readings = iter([40.0, OSError("gone"), 41.0, 42.0, 43.0, 44.0])

    def unsteady():
        reading = next(readings)
        if isinstance(reading, OSError):
            raise reading
        return reading

    writer = ShardWriter(tmp_path / "data")
    found = logger.log(unsteady, writer, threading.Event(), every_s=0.0, history=2, most=3)
    assert found == 3
    assert "no reading: gone" in capsys.readouterr().err
    with np.load(writer.flush()) as archive:
        assert archive["features"].tolist() == [[40, 41], [41, 42], [42, 43]]
        assert archive["labels"].tolist() == [42, 43, 44]


def test_the_simulated_sensor_stays_in_a_room():
    read = load_example().random_walk(random.Random(3))
    readings = [read() for _ in range(5000)]
    assert 15 < min(readings) < max(readings) < 27


def test_the_logger_as_a_command(tmp_path):
    done = subprocess.run(
        [sys.executable, LOGGER, "--directory", "x", "--every", "0", "--examples", "5", "--simulate"],
        cwd=tmp_path, capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    assert done.stdout == "5 examples in x\n"
    assert len(list((tmp_path / "x").glob("*.npz"))) == 1


# --- a fleet --------------------------------------------------------------------------------------


def test_a_fleet_trains_on_what_came_between_its_rounds(tmp_path):
    """Real broker and coordinator. The first device declines while it has nothing; then it has 5, 10 and
    16 examples, each of which is in all three of its batches. The others' 40 are in one batch each."""
    more = iter([5, 5, 6])
    played = None

    def on_event(event):
        if isinstance(event, RoundOutcome) and (n := next(more, None)):
            write(played.fleet.directory / "pi-1" / "data", n, seed=n)

    async def scenario():
        nonlocal played
        fleet = small_fleet(
            tmp_path, "embedded", rounds=4, on_event=on_event,
            settings={"data": {0: DATA}},
        )  # fmt: skip
        async with fleet as played:
            (played.fleet.directory / "pi-1" / "data").mkdir()
            await played.play()
            assert [len(names) for names in played.survivors] == [3, 4, 4, 4]
            found = [line["examples"] for line in played.metrics]
            assert found == [120, 120 + 3 * 5, 120 + 3 * 10, 120 + 3 * 16]

    go(scenario())
