"""The kept models' files: old or new, never half, and never at odds; what vouches for them; the child."""

import asyncio
import contextlib
import errno
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from covey_device.config import DeviceConfig
from covey_device.home import keeper as home_module
from covey_device.home.child import Request, file_bytes
from covey_device.home.export import UnfitError, exported
from covey_device.home.files import (
    CURRENT,
    PREVIOUS,
    ModelDirectory,
    Sidecar,
    Vouched,
    read_model,
    read_sidecar,
    sidecar_of,
    verify,
    vouched,
)
from covey_device.home.keeper import Home
from covey_device.policy import Policy
from covey_shared import keys, wire
from covey_shared.config import parse
from covey_shared.errors import (
    ConfigError,
    CoveyError,
    RefusedError,
    SignatureError,
    StorageError,
    TrainingError,
)
from covey_shared.messages import DeviceId, ManifestDigest, Result, RoundCall, RunId
from covey_shared.plan import decode_header, plan_hash
from covey_shared.runtime import LocalModel, export_model
from covey_shared.secagg.cohort import Trust
from memory_fleet import go

PLAN = Path(str(files("covey_fleet"))) / "plans" / "mlp"
HEADER_BYTES = (PLAN / "plan.json").read_bytes()
HEADER = decode_header(HEADER_BYTES)
INFER = (PLAN / "infer.onnx").read_bytes()
FLAT = np.frombuffer((PLAN / "initial.bin").read_bytes(), "<f4").astype(np.float32)
MB = 1_000_000

COORDINATOR = keys.SigningKey(bytes(range(32)))
IDENTITY = keys.SigningKey(bytes(range(1, 33)))
TRUST = Trust("farm", bytes(32), COORDINATOR.public)
ME = DeviceId("pi-1")


def call(round_id: int, **changes: Any) -> wire.Signed[RoundCall]:
    fields: dict[str, Any] = {
        "fleet": "farm", "run": RunId(bytes(16)), "round": round_id, "plan": plan_hash(HEADER_BYTES),
        "plan_bytes": len(HEADER_BYTES), "model": hashlib.sha256(b"%d" % (round_id - 1)).digest(),
        "model_bytes": FLAT.nbytes, "revision": 0, "n_min": 3, "plan_signatures": (), "gather_s": 1.0,
        "chance": 1.0, "spread_s": 0.0, "reconnect_s": 0.0,
    }  # fmt: skip
    return wire.sign(RoundCall(**(fields | changes)), COORDINATOR)


def result(round_id: int, **changes: Any) -> wire.Signed[Result]:
    fields: dict[str, Any] = {
        "h": ManifestDigest(bytes(32)), "fleet": "farm", "run": RunId(bytes(16)), "round": round_id,
        "u3": b"\x07", "votes": (), "ring_sum": bytes(32),
        "next_model": hashlib.sha256(b"%d" % round_id).digest(),
    }  # fmt: skip
    return wire.sign(Result(**(fields | changes)), COORDINATOR)


def put(directory: ModelDirectory, round_id: int, content: bytes | None = None) -> Path:
    """Keep a made-up model."""
    content = b"model %d" % round_id * 1000 if content is None else content
    source = Vouched(call(round_id), result(round_id))
    fd = os.memfd_create("model")
    try:
        with os.fdopen(os.dup(fd), "wb") as file:
            file.write(content)

        def describe(onnx: str, before: str | None) -> Sidecar:
            return sidecar_of(
                source, HEADER, (10,), device=ME, onnx=onnx, size=len(content), written_unix=7,
                before=before,
            ).signed(IDENTITY)  # fmt: skip

        return directory.put(fd, len(content), HEADER_BYTES, f"{round_id:08}", describe)
    finally:
        os.close(fd)


@pytest.fixture
def directory(tmp_path: Path) -> ModelDirectory:
    return ModelDirectory(tmp_path / "model", reserve_bytes=0)


# -- old or new ------------------------------------------------------------------------------------


DISK = [
    "open",
    "write",
    "fchmod",
    "fsync",
    "mkdir",
    "rename",
    "replace",
    "symlink",
    "unlink",
    "chmod",
]


class Crash(BaseException):
    """The power goes."""


@contextmanager
def trouble(at: int, error: Callable[[], BaseException], log: list[str]) -> Iterator[None]:
    """Call number `at` of those that change the disk fails, and with a crash all that come after it."""

    def wrapped(name: str, real: Any) -> Any:
        def function(*args: Any, **kwargs: Any) -> Any:
            log.append(name)
            dead = isinstance(error(), Crash) and len(log) > at
            if len(log) == at + 1 or dead:
                raise error()
            return real(*args, **kwargs)

        return function

    with pytest.MonkeyPatch.context() as patch:
        for name in DISK:
            patch.setattr(os, name, wrapped(name, getattr(os, name)))
        patch.setattr(shutil, "rmtree", wrapped("rmtree", shutil.rmtree))
        yield


def readers_view(path: Path) -> tuple[int | None, int | None]:
    """Rounds of the current and previous model; whatever is there belongs together."""
    seen = []
    for link in (CURRENT, PREVIOUS):
        folder = (path / link).resolve()
        if not (path / link).exists():
            seen.append(None)
            continue
        sidecar = read_sidecar(folder)
        assert read_model(folder, sidecar) == b"model %d" % sidecar.round * 1000
        assert (path / f"{link}.onnx").resolve() == folder / "model.onnx"
        verify(folder, TRUST, ME, IDENTITY.public)
        seen.append(sidecar.round)
    return seen[0], seen[1]


@pytest.mark.parametrize("rounds", [0, 1, 2, 3])
def test_whenever_the_power_goes_it_is_the_old_model_or_the_new_one(tmp_path: Path, rounds: int):
    """At each call that changes the disk; then the next process goes on, and gets there."""
    old = (rounds or None, rounds - 1 or None if rounds > 1 else None)
    new = (rounds + 1, rounds or None)
    allowed = {old, new, (rounds + 1, old[1])}
    seen = set()
    for at in range(200):
        directory = ModelDirectory(tmp_path / str(at), reserve_bytes=0)
        for round_id in range(1, rounds + 1):
            put(directory, round_id)
        log: list[str] = []
        try:
            with trouble(at, Crash, log):
                put(directory, rounds + 1)
        except Crash:
            view = readers_view(directory.path)
            assert view in allowed
            seen.add(view)
        else:
            break
        again = ModelDirectory(directory.path, reserve_bytes=0)
        again.settle()
        settled = readers_view(directory.path)
        assert settled in (old, new)  # once it was made current, the one before is the previous one
        if settled == old:
            put(again, rounds + 1)
        assert readers_view(directory.path) == new
        kept = sorted(folder.name for folder in (directory.path / "kept").iterdir())
        assert len(kept) == min(rounds + 1, 2)
    assert {old, new} <= seen
    assert readers_view(directory.path) == new
    assert len(log) > 15


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EROFS])
def test_whatever_the_disk_refuses_the_old_model_stays(tmp_path: Path, number: int):
    def refuse() -> OSError:
        return OSError(number, os.strerror(number))

    problems: set[str] = set()
    for at in range(80):
        directory = ModelDirectory(tmp_path / str(at), reserve_bytes=0)
        put(directory, 1)
        put(directory, 2)
        try:
            with trouble(at, refuse, []):
                put(directory, 3)
        except StorageError as error:
            problems.add(str(error))
        view = readers_view(directory.path)
        assert view in {(2, 1), (3, 1), (3, 2)}
        put(directory, 4)
        assert readers_view(directory.path)[0] == 4
        if view == (3, 2) and at > 40:
            break
    assert all(os.strerror(number) in problem for problem in problems)
    assert view == (3, 2)


def test_everything_is_on_the_disk_before_it_is_current(directory: ModelDirectory):
    """Files, then their folder, then its name, and only then the switch; the directory after it."""
    put(directory, 1)
    said: list[str] = []
    at = str(directory.path)
    real_fsync, real_replace = os.fsync, os.replace

    def fsync(fd: int) -> None:
        said.append("sync " + str(Path(f"/proc/self/fd/{fd}").readlink()).removeprefix(at))
        real_fsync(fd)

    def replace(source: Any, target: Any) -> None:
        said.append("switch " + os.fspath(target).removeprefix(at))
        real_replace(source, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        patch.setattr(os, "replace", replace)
        put(directory, 2)
    assert said == [
        "sync /kept/.new/model.onnx",
        "sync /kept/.new/plan.json",
        "sync /kept/.new/model.json",
        "sync /kept/.new",
        "sync /kept",
        "switch /current",
        "sync ",
        "switch /previous",
        "sync ",
    ]


def test_a_reader_that_opened_a_model_keeps_it(directory: ModelDirectory):
    put(directory, 1)
    folder = (directory.path / CURRENT).resolve()
    with (directory.path / "current.onnx").open("rb") as file:
        put(directory, 2)
        assert read_sidecar(folder).round == 1  # for one model more
        put(directory, 3)
        assert not folder.exists()
        assert file.read() == b"model 1" * 1000


def test_files_are_for_the_group_to_read_whatever_the_umask(directory: ModelDirectory):
    before = os.umask(0o077)
    try:
        put(directory, 1)
        directory.note("wanted", b"{}")
    finally:
        os.umask(before)
    modes = {
        str(path.relative_to(directory.path)): stat.S_IMODE(path.stat().st_mode)
        for path in directory.path.rglob("*")
        if not path.is_symlink()
    }
    assert modes == {
        "kept": 0o750,
        "kept/00000001": 0o750,
        "kept/00000001/model.onnx": 0o640,
        "kept/00000001/model.json": 0o640,
        "kept/00000001/plan.json": 0o640,
        "wanted": 0o640,
    }
    assert stat.S_IMODE(directory.path.stat().st_mode) == 0o750


def test_too_little_space_is_told_beforehand(tmp_path: Path):
    directory = ModelDirectory(tmp_path / "model", reserve_bytes=10**18)
    with pytest.raises(StorageError, match="too little space for a model"):
        put(directory, 1)
    assert directory.folder() is None


# -- going back ------------------------------------------------------------------------------------


def test_rollback_changes_the_two_and_back(directory: ModelDirectory):
    with pytest.raises(ConfigError, match="no previous model"):
        directory.rollback()
    put(directory, 1)
    with pytest.raises(ConfigError, match="no previous model"):
        directory.rollback()
    put(directory, 2)
    assert directory.rollback().round == 1
    assert readers_view(directory.path) == (1, 2)
    directory.settle()
    assert readers_view(directory.path) == (1, 2)
    put(directory, 3)
    assert readers_view(directory.path) == (3, 1)
    assert directory.rollback().round == 1
    assert directory.rollback().round == 3


def test_the_same_name_again_is_another_folder(directory: ModelDirectory):
    first = put(directory, 1)
    assert put(directory, 1).name == f"{first.name}-again"
    assert first.exists()


# -- who vouches -----------------------------------------------------------------------------------


def rewritten(folder: Path, identity: keys.SigningKey | None, **changes: Any) -> None:
    """The description with changes; identity: signs it anew."""
    sidecar = msgspec.structs.replace(read_sidecar(folder), **changes)
    if identity is not None:
        sidecar = sidecar.signed(identity)
    (folder / "model.json").write_bytes(msgspec.json.encode(sidecar))


def test_everything_that_vouches_is_checked(directory: ModelDirectory):
    folder = put(directory, 5)

    def check(trust: Trust = TRUST, device: str = ME, identity: bytes = IDENTITY.public) -> Sidecar:
        return verify(folder, trust, DeviceId(device), identity)

    sidecar = check()
    assert (sidecar.round, sidecar.model) == (5, hashlib.sha256(b"5").hexdigest())
    other = keys.SigningKey(bytes(range(2, 34)))
    with pytest.raises(SignatureError, match="this device"):
        check(identity=other.public)
    with pytest.raises(SignatureError, match="the coordinator"):
        check(Trust("farm", bytes(32), other.public))
    with pytest.raises(RefusedError):
        check(device="pi-2")
    with pytest.raises(RefusedError):
        check(Trust("field", bytes(32), COORDINATOR.public))
    good = (folder / "model.json").read_bytes()
    for changes in (
        {"round": 6}, {"model": "0" * 64}, {"plan_name": "other"}, {"classes": 9}, {"loss": "mse"},
        {"result": None}, {"result": result(6).envelope}, {"round_call": call(6).envelope},
        {"round_call": call(5, plan=bytes(32)).envelope}, {"size": 7}, {"onnx": "0" * 64},
        {"fleet": "field"}, {"run": "0" * 31 + "1"},
        {"input": msgspec.structs.replace(sidecar.input, shape=(64,))},
        {"result": wire.sign(result(5).message, other).envelope},
    ):  # fmt: skip
        rewritten(folder, None, **changes)
        with pytest.raises(SignatureError):
            check()
        rewritten(folder, IDENTITY, **changes)
        with pytest.raises(CoveyError):
            check()
        (folder / "model.json").write_bytes(good)
    check()
    for name in ("model.onnx", "plan.json", "model.json"):
        path = folder / name
        before = path.read_bytes()
        for damaged in (before[:-1], before + b" ", before[:9] + b"?" + before[10:], b""):
            path.write_bytes(damaged)
            # A space after a description changes nothing that it says.
            if not (name == "model.json" and damaged == before + b" "):
                with pytest.raises(CoveyError):
                    check()
        path.unlink()
        with pytest.raises(StorageError):
            check()
        path.write_bytes(before)
    check()


def test_a_call_alone_vouches_for_what_it_begins_with():
    source = vouched(call(5).envelope, None, TRUST)
    assert source.model == hashlib.sha256(b"4").digest()
    assert source.key < vouched(call(5).envelope, result(5).envelope, TRUST).key
    other = keys.SigningKey(bytes(range(2, 34)))
    for forged in (None, result(5).envelope):
        with pytest.raises(SignatureError):
            vouched(wire.sign(call(5).message, other).envelope, forged, TRUST)
    with pytest.raises(SignatureError):
        vouched(call(5).envelope, wire.sign(result(5).message, other).envelope, TRUST)
    with pytest.raises(RefusedError, match="two rounds"):
        vouched(call(5).envelope, result(6).envelope, TRUST)
    with pytest.raises(RefusedError, match="two rounds"):
        vouched(call(5).envelope, result(5, run=RunId(b"?" * 16)).envelope, TRUST)


@pytest.mark.parametrize("data", [b"", b"{}", b"[" * 100_000, b"\xff", b'{"format": 2}', b"null"])
def test_a_damaged_description_is_a_storage_error(directory: ModelDirectory, data: bytes):
    folder = put(directory, 1)
    (folder / "model.json").write_bytes(data)
    with pytest.raises(StorageError):
        read_sidecar(folder)
    assert directory.sidecar() is None
    directory.settle()
    put(directory, 2)
    assert directory.sidecar() is not None


# -- the child -------------------------------------------------------------------------------------


def export(
    header: bytes = HEADER_BYTES,
    graph: bytes = INFER,
    parameters: bytes = FLAT.tobytes(),
    *,
    resident_bytes: int = 300 * MB,
    seconds: float = 30.0,
) -> tuple[bytes, tuple[int, ...]]:
    async def scenario() -> tuple[bytes, tuple[int, ...]]:
        async with exported(
            header, graph, parameters, resident_bytes=resident_bytes, seconds=seconds
        ) as model:
            return os.pread(model.fd, model.size, 0), model.shape

    found: list[tuple[bytes, tuple[int, ...]]] = []

    async def run() -> None:
        found.append(await scenario())

    go(run())
    return found[0]


def test_the_childs_file_is_the_coordinators_byte_for_byte():
    data, shape = export()
    assert data == export_model(HEADER, INFER, FLAT)
    assert shape == (10,)
    images = np.random.default_rng(0).random((3, 1, 8, 8), np.float32)
    assert LocalModel(data, "it").predict(images).shape == (3, 10)


def test_a_graph_that_breaks_the_rules_is_unfit():
    damaged = bytearray(INFER)
    damaged[40] ^= 0xFF
    with pytest.raises(UnfitError):
        export(graph=bytes(damaged))
    with pytest.raises(UnfitError, match=r"infer\.onnx"):
        export(graph=(PLAN / "train.onnx").read_bytes())


@pytest.mark.parametrize(
    ("program", "problem"),
    [
        ("import os; os.abort()", "the process ended with status -6"),
        ("print('{}')", "the process ended with status 0"),
        ("print('[' * 5000)", "the process ended with status 0"),
        ("import time; time.sleep(60)", "not done after 1 s"),
        ("x = bytes(range(256)) * 10**6; import time; time.sleep(60)", "more memory than there is"),
    ],
)
def test_a_child_that_is_lost_costs_the_model_and_no_more(
    monkeypatch: pytest.MonkeyPatch, program: str, problem: str
):
    """onnxruntime may do anything with a graph: the service sees a process end."""
    from covey_device.home import export as home_export

    real = home_export.subprocess.Popen
    children = []

    def popen(command: list[str], **options: Any) -> Any:
        children.append(real([command[0], "-c", program], **options))
        return children[-1]

    monkeypatch.setattr(home_export.subprocess, "Popen", popen)
    with pytest.raises(TrainingError, match=problem) as caught:
        export(seconds=1.0, resident_bytes=20 * MB)
    assert not isinstance(caught.value, UnfitError)
    assert children[0].returncode is not None


def test_the_child_gives_up_what_it_does_not_need():
    """Its file has a bound, as have its memory, its descriptors and its time."""
    import subprocess
    import sys

    program = """
import os, resource, sys
from covey_device.home import child as home_child
def answer(output, header, graph, parameters):
    limits = [resource.getrlimit(kind)[1] for kind in
              (resource.RLIMIT_FSIZE, resource.RLIMIT_NOFILE, resource.RLIMIT_CORE)]
    return home_child.Refused("refused", f"{limits} {os.nice(0)} {sorted(os.environ)}")
home_child._answer = answer
home_child.main()
"""
    request = Request(len(HEADER_BYTES), len(INFER), 1, 100 * MB, 5.0)
    head = msgspec.json.encode(request)
    body = len(head).to_bytes(4, "big") + head + HEADER_BYTES + INFER + FLAT.tobytes()
    done = subprocess.run(
        [sys.executable, "-c", program], input=body, capture_output=True, timeout=60, check=True
    )
    most = file_bytes(len(HEADER_BYTES), len(INFER), FLAT.nbytes)
    assert f"[{most}, 64, 0] 19" in done.stdout.decode()


def test_memory_that_is_not_there():
    with pytest.raises(TrainingError, match=r"limits\.max_memory_mb leaves it 0 MB"):
        export(resident_bytes=-79 * MB)


def test_the_service_does_not_load_onnxruntime_for_it():
    import subprocess
    import sys

    program = "import sys, covey_device.home.keeper; print('onnxruntime' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.split()[0] == "False"


# -- when ------------------------------------------------------------------------------------------


class Nothing:
    """A fetcher of which nothing comes, and which is asked when it should be."""

    def __init__(self) -> None:
        self.asked: list[float] = []

    async def fetch(self, digest: bytes, size: int, *, limit: int) -> bytes:
        self.asked.append(asyncio.get_running_loop().time())
        raise RefusedError("it does not come")


def at_home(directory: ModelDirectory, draw: int = 0) -> Home:
    """draw: the first byte of what is drawn at random, of 256."""
    return Home(
        directory, TRUST, ME, IDENTITY, policy=Policy, room=lambda: (300 * MB, 30.0),
        rng=lambda n: bytes((draw,)) + bytes(n - 1),
    )  # fmt: skip


@pytest.mark.parametrize("draw", [0, 128, 255])
def test_devices_of_a_large_fleet_fetch_over_the_window_that_the_call_gives(
    directory: ModelDirectory, draw: int
):
    async def scenario() -> None:
        home, blobs = at_home(directory, draw), Nothing()
        running = asyncio.create_task(home.run(blobs, lambda: None))  # type: ignore[arg-type]
        await asyncio.sleep(0.1)
        loop = asyncio.get_running_loop()
        home.heard(call(5, spread_s=2.0))
        home.heard(result(5))
        at = loop.time()
        async with asyncio.timeout(10):
            while not blobs.asked:
                await asyncio.sleep(0.01)
        wait_s = 2.0 * draw / 256
        assert wait_s - 0.01 <= blobs.asked[0] - at < wait_s + 1.0
        running.cancel()

    go(scenario())


def test_while_a_device_is_in_a_round_it_waits_for_what_that_leads_to(
    directory: ModelDirectory, monkeypatch: pytest.MonkeyPatch
):
    """Of the call's model nothing is fetched for the device itself until its part is over."""
    monkeypatch.setattr(home_module, "SETTLE_S", 0.02)
    monkeypatch.setattr(home_module, "LOOK_S", 0.05)

    async def scenario() -> None:
        home, blobs = at_home(directory), Nothing()
        inside: list[int | None] = [5]
        running = asyncio.create_task(home.run(blobs, lambda: inside[0]))  # type: ignore[arg-type]
        await asyncio.sleep(0.05)
        home.heard(call(5))
        await asyncio.sleep(0.3)
        assert blobs.asked == []
        home.ended(4)  # of another round
        await asyncio.sleep(0.1)
        assert blobs.asked == []
        home.ended(5)
        async with asyncio.timeout(10):
            while not blobs.asked:
                await asyncio.sleep(0.01)
        # One whose end nobody told, as after a lost connection.
        blobs.asked.clear()
        home.heard(call(6))
        inside[0] = 6
        await asyncio.sleep(0.2)
        assert blobs.asked == []
        inside[0] = None
        async with asyncio.timeout(10):
            while not blobs.asked:
                await asyncio.sleep(0.01)
        running.cancel()

    go(scenario())


def test_what_does_not_come_is_asked_for_more_and_more_seldom(
    directory: ModelDirectory, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(home_module, "RETRY_S", 0.05)
    monkeypatch.setattr(home_module, "MAX_RETRY_S", 0.4)

    async def scenario() -> None:
        home, blobs = at_home(directory), Nothing()
        running = asyncio.create_task(home.run(blobs, lambda: None))  # type: ignore[arg-type]
        await asyncio.sleep(0.05)
        home.heard(call(5))
        home.heard(result(5))
        async with asyncio.timeout(20):
            while len(blobs.asked) < 6:
                await asyncio.sleep(0.01)
        waits = [after - before for before, after in pairwise(blobs.asked)]
        for wait_s, least in zip(waits, (0.05, 0.1, 0.2, 0.4, 0.4), strict=True):
            assert wait_s >= least - 0.01
        assert waits[-1] < 1.5
        running.cancel()

    go(scenario())


def test_the_next_call_does_not_put_off_what_the_last_result_led_to(
    directory: ModelDirectory, monkeypatch: pytest.MonkeyPatch
):
    """Rounds that follow each other at once, in which this device takes part all the time."""
    monkeypatch.setattr(home_module, "SETTLE_S", 0.02)
    monkeypatch.setattr(home_module, "RETRY_S", 30.0)

    async def scenario() -> None:
        home, blobs = at_home(directory, 128), Nothing()
        inside: list[int | None] = [5]
        running = asyncio.create_task(home.run(blobs, lambda: inside[0]))  # type: ignore[arg-type]
        await asyncio.sleep(0.05)
        home.heard(call(5, spread_s=0.6))
        home.heard(result(5))
        inside[0] = 6
        home.heard(call(6, spread_s=0.6))  # which begins with that very model
        async with asyncio.timeout(10):
            while not blobs.asked:
                await asyncio.sleep(0.01)
        # Of another run, whose model is another: it has its turn when the first does not come.
        home.heard(call(7, plan=bytes(32)))
        inside[0] = None
        home.ended(7)
        home.heard(result(6))  # of a round that is no longer the last one called
        await asyncio.sleep(0.2)
        assert len(blobs.asked) == 1
        assert home._later is not None
        home._due = 0.0
        home._news.set()
        async with asyncio.timeout(10):
            while len(blobs.asked) < 3:
                await asyncio.sleep(0.01)
        assert home._wanted is not None
        assert home._wanted.key == (7, False)
        running.cancel()

    go(scenario())


def test_an_old_call_or_another_fleets_takes_the_place_of_none(directory: ModelDirectory):
    """Whoever plays one back, or sends one that was signed for another fleet, would have this device miss
    the result of the round that it knows of."""

    async def scenario() -> None:
        home = at_home(directory)
        running = asyncio.create_task(home.run(Nothing(), lambda: 5))  # type: ignore[arg-type]
        await asyncio.sleep(0.02)
        home.heard(call(5))
        for other in (call(4), call(5, plan=bytes(32)), call(6, fleet="other")):
            home.heard(other)
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            assert home._call is not None
            assert home._call.envelope == call(5).envelope
        home.heard(result(5))
        await asyncio.sleep(0.02)
        assert home._wanted is not None
        assert home._wanted.key == (5, True)
        running.cancel()

    go(scenario())


@pytest.mark.parametrize(
    "error", [OSError(errno.EAGAIN, "no process"), ValueError("a bug"), MemoryError()]
)
def test_whatever_goes_wrong_the_next_model_has_its_turn(
    directory: ModelDirectory, monkeypatch: pytest.MonkeyPatch, error: Exception
):
    monkeypatch.setattr(home_module, "RETRY_S", 0.05)

    async def scenario() -> None:
        home, blobs = at_home(directory), Nothing()
        real = blobs.fetch

        async def fetch(digest: bytes, size: int, *, limit: int) -> bytes:
            with contextlib.suppress(RefusedError):
                await real(digest, size, limit=limit)
            raise error

        blobs.fetch = fetch  # type: ignore[method-assign]
        running = asyncio.create_task(home.run(blobs, lambda: None))  # type: ignore[arg-type]
        await asyncio.sleep(0.05)
        for round_id in (5, 6):
            home.heard(call(round_id))
            home.heard(result(round_id))
            blobs.asked.clear()
            async with asyncio.timeout(10):
                while len(blobs.asked) < 2:
                    await asyncio.sleep(0.01)
        assert not running.done()
        running.cancel()

    go(scenario())


# -- where -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("state", "chosen", "where"),
    [
        ("state", "", "/etc/covey/model"),
        ("state/farm.pi-1", "", "/etc/covey/model"),
        ("/var/lib/covey-device/state/farm.pi-1", "", "/var/lib/covey-device/model"),
        ("memory/pi", "", "/etc/covey/memory/model"),
        ("state", 'directory = "elsewhere"', "/etc/covey/elsewhere"),
        ("state", 'directory = "/run/model"', "/run/model"),
    ],
)
def test_the_directory_lies_beside_the_state(state: str, chosen: str, where: str):
    """And not in it: it is for others to read."""
    text = f"""
fleet = "farm"
device = "pi-1"
state = {json.dumps(state)}
[broker]
url = "mqtt://127.0.0.1"
[trust]
fleet_ca = "{"0" * 64}"
coordinator = "{"0" * 64}"
[data]
kind = "npz"
file = "x.npz"
[model]
{chosen}
"""
    config = parse(text, DeviceConfig, file="device.toml")
    assert config.model_directory(Path("/etc/covey")) == Path(where)
