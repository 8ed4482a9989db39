"""What a device gives back while it rests, and that it goes on as before."""

import asyncio
import hashlib
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from covey_device import service as device_service
from covey_device.footprint import ENGINE, clean_mappings
from covey_device.preparation import Preparation
from covey_device.trainer import Work
from covey_fleet.demo import PLANS
from covey_shared.plan import plan_hash
from memory_fleet import Fleet, config, go

TESTS = str(Path(__file__).parents[1])


def entry(start: int, pages: int, perms: str, inode: int, path: str, anonymous: int) -> list[str]:
    return [
        f"{start:x}-{start + 4096 * pages:x} {perms} 00001000 08:01 {inode}    {path}\n",
        "Size:                  4 kB\n",
        f"Anonymous:             {anonymous} kB\n",
        "VmFlags: rd mr mw me sd\n",
    ]


@pytest.mark.parametrize(
    ("perms", "inode", "anonymous", "given_back"),
    [
        ("r-xp", 7, 0, True),
        ("r--p", 7, 0, True),
        ("r--s", 7, 0, True),
        ("r--p", 7, 4, False),  # relocated by the linker: the file has other bytes
        ("rw-p", 7, 0, False),  # may be written to at any moment
        ("rw-s", 7, 0, False),
        ("r--p", 0, 0, False),  # of no file
    ],
)
def test_only_what_the_file_has_as_well_is_given_back(
    perms: str, inode: int, anonymous: int, given_back: bool
):
    lines = entry(0x7F00_0000_0000, 3, perms, inode, "/opt/x y/lib.so", anonymous)
    expected = [(0x7F00_0000_0000, 3 * 4096)] if given_back else []
    assert list(clean_mappings(lines)) == expected
    assert list(clean_mappings(lines, "lib.so")) == expected
    assert list(clean_mappings(lines, "other")) == []


MAPPINGS = st.lists(
    st.tuples(
        st.integers(1, 50),
        st.sampled_from(["r-xp", "r--p", "rw-p", "---p", "r--s"]),
        st.sampled_from([0, 12]),
        st.sampled_from(["", "[heap]", "/a/onnxruntime.so", "/b/libc.so (deleted)"]),
        st.sampled_from([0, 4, 100]),
    ),
    max_size=20,
)


@given(MAPPINGS)
def test_each_mapping_is_judged_by_itself(mappings: list[tuple[int, str, int, str, int]]):
    starts = itertools.accumulate([4096 * (m[0] + 1) for m in mappings], initial=1 << 40)
    lines, expected = [], []
    for start, (pages, perms, inode, path, anonymous) in zip(starts, mappings, strict=False):
        lines += entry(start, pages, perms, inode, path, anonymous)
        if "w" not in perms and inode and not anonymous:
            expected.append((start, 4096 * pages))
    assert list(clean_mappings(lines)) == expected


GIVES_BACK = """
import json, sys
import numpy as np
from covey_device.footprint import ENGINE, give_back
import covey_shared.keys as keys
import onnxruntime
from pathlib import Path
from covey_shared.plan import decode_header
from covey_shared.runtime import TrainStep

def resident():
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmRSS")).split()[1]) * 1024

def trained():
    plan = Path(sys.argv[1])
    header = decode_header((plan / "plan.json").read_bytes())
    step = TrainStep(header, (plan / "train.onnx").read_bytes())
    step.load(np.frombuffer((plan / "initial.bin").read_bytes(), "<f4").copy())
    shape = (8, *header.features.shape)
    loss = step.step(np.ones(shape, header.features.dtype), np.zeros(8, np.int64))
    return loss, float(step.parameters().sum()), keys.SigningKey(bytes(32)).sign("x", b"y").hex()

before, found = resident(), trained()
loaded = resident()
give_back("")
after = resident()
again = trained()
give_back(ENGINE)
print(json.dumps({"loaded": loaded, "after": after, "same": found == again == trained()}))
"""


def test_a_process_that_gave_its_pages_back_computes_the_same_as_before():
    plan = Path(device_service.__file__).parents[2] / "deploy/covey_fleet/plans/mlp"
    done = subprocess.run(
        [sys.executable, "-c", GIVES_BACK, plan],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([TESTS, *sys.path])},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["same"]
    # onnxruntime's and the other libraries' code alone is more than this.
    assert found["after"] <= found["loaded"] - 10_000_000


def test_a_device_rests_after_a_round_and_takes_part_in_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Each rest gives the trainer back; the next round makes it again, without fetching the plan."""
    monkeypatch.setattr(device_service, "REST_AFTER_S", 0.01)

    async def scenario() -> None:
        async with Fleet(tmp_path) as fleet:
            seat = fleet.seats[0]
            asked: list[str] = []
            rested = asyncio.Event()
            loop = asyncio.get_running_loop()

            def give_back(library: str) -> None:
                asked.append(library)
                loop.call_soon_threadsafe(rested.set)

            # As the command does for a process that is one device; simulations have many.
            seat.service.give_back = give_back
            seat.service._spawn(seat.service._tasks, seat.service._rest(give_back))
            await rested.wait()
            assert asked == [""]
            fetched: list[bytes] = []
            fetch = seat.service.preparation._blobs.fetch

            async def counted(digest: bytes, size: int, *, limit: int) -> bytes:
                fetched.append(digest)
                return await fetch(digest, size, limit=limit)

            monkeypatch.setattr(seat.service.preparation._blobs, "fetch", counted)
            for number in range(2):
                rested.clear()
                run = fleet.run(config(rounds=1), f"run-{number}")
                assert (await fleet.play(run)).rounds_completed == 1
                await rested.wait()
                assert seat.service.preparation.plan is None
                assert asked[1:] == [ENGINE] * (number + 1)
                assert seat.made == number + 1
            assert len(fetched) == 3  # header, graph and model, and then nothing that was there

    go(scenario())


class Blobs:
    """Both of the demo's plans and their first models."""

    def __init__(self) -> None:
        self.data: dict[bytes, bytes] = {}

    def hold(self, digests: object) -> None:
        pass

    async def fetch(self, digest: bytes, size: int, *, limit: int) -> bytes:
        return self.data[digest]

    def call(self, name: str) -> Any:
        folder = PLANS / name
        header, model = (folder / "plan.json").read_bytes(), (folder / "initial.bin").read_bytes()
        graph = (folder / "train.onnx").read_bytes()
        plan, digest = plan_hash(header), hashlib.sha256(model).digest()
        self.data |= {plan: header, digest: model, hashlib.sha256(graph).digest(): graph}
        return SimpleNamespace(
            plan=plan, plan_bytes=len(header), model=digest, model_bytes=len(model)
        )


def test_after_a_rest_it_is_the_called_plan_that_is_made_again():
    """The graph that was kept is of one plan, and no other call is served with it."""
    made: list[tuple[str, bytes]] = []

    def make_trainer(header: Any, graph: bytes) -> Any:
        made.append((header.name, hashlib.sha256(graph).digest()))
        assert made[-1][1].hex() == header.train.sha256
        return SimpleNamespace(refresh=lambda: None)

    async def scenario() -> None:
        blobs = Blobs()
        limits = Work(100, 1, 10.0, 1 << 40)
        preparation = Preparation(blobs, make_trainer, limits=limits, rng=os.urandom)  # type: ignore[arg-type]
        for name in ("mlp", "mlp", "cnn", "mlp"):
            header = await preparation.fetch(blobs.call(name))
            assert header.name == f"digits-{name}"
            assert preparation.plan is not None
            assert preparation.plan[:2] == (blobs.call(name).plan, header)
            preparation.rest(model=True)
        assert [name for name, _ in made] == ["digits-mlp"] * 2 + ["digits-cnn", "digits-mlp"]

    asyncio.run(scenario())


def test_nothing_is_given_back_in_the_middle_of_a_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(device_service, "REST_AFTER_S", 0.01)

    async def scenario() -> None:
        async with Fleet(tmp_path) as fleet:
            service = fleet.seats[0].service
            given: list[int | None] = []

            def give_back(library: str) -> None:
                given.append(service._session.round_id)

            playing = asyncio.create_task(fleet.play(fleet.run(config(rounds=1))))
            await fleet.until(lambda: service._session.round_id is not None)
            service._tired.set()
            service._spawn(service._tasks, service._rest(give_back))
            await playing
            await fleet.until(lambda: bool(given))
            assert given == [None] * len(given)

    go(scenario())
