"""The writer: whole shards or none, whenever it is killed, the power is cut or the disk is full."""

import contextlib
import errno
import json
import os
import random
import stat
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from covey_device import shards
from covey_device.data import ShardsData
from covey_device.data.shard_files import opened_folder, read_shard, shard_names
from covey_device.shards import ShardWriter
from covey_shared.errors import DataError
from device_support import make_header

HEADER = make_header()
CONFIG = ShardsData(directory="data")
NOW = 1_795_000_000.0


def contents(directory):
    """(name, labels) of every shard, in order, each read as the device does: an error if one is bad."""
    with opened_folder(directory, "data") as folder:
        return [
            (name, read_shard(folder, name, CONFIG, HEADER).labels[:, 0].astype(int).tolist())
            for name in shard_names(folder, "data")
        ]


def labels_in(directory):
    return [label for _, part in contents(directory) for label in part]


def append(writer, number):
    return writer.append([number, number + 0.5, -number], label=float(number))


def test_a_shard_when_there_are_enough_rows_and_the_rest_at_the_end(tmp_path):
    with ShardWriter(tmp_path / "new" / "data", rows_per_shard=4) as writer:
        paths = [append(writer, number) for number in range(10)]
    assert [path is not None for path in paths] == 2 * [False, False, False, True] + 2 * [False]
    found = contents(tmp_path / "new" / "data")
    assert [labels for _, labels in found] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert [name for name, _ in found][:2] == [path.name for path in paths if path]


def test_a_shard_when_its_first_example_is_old_enough(tmp_path):
    now = [0.0]
    writer = ShardWriter(tmp_path, every_s=60.0, monotonic=lambda: now[0])
    assert append(writer, 0) is None
    now[0] = 59.9
    assert append(writer, 1) is None
    now[0] = 60.0
    assert append(writer, 2) is not None
    assert append(writer, 3) is None
    now[0] = 119.0
    assert append(writer, 4) is None
    assert writer.flush() is not None
    assert writer.flush() is None
    assert labels_in(tmp_path) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("compress", [False, True])
def test_types_are_what_a_plan_wants(tmp_path, compress):
    writer = ShardWriter(tmp_path, compress=compress)
    picture = np.arange(12, dtype=np.uint8).reshape(3, 4)
    writer.append(picture, 7)
    picture[:] = 0  # the caller's own again
    with np.load(writer.flush()) as archive:
        assert (archive["features"].dtype, archive["labels"].dtype) == (np.uint8, np.int64)
        assert archive["features"].sum() == 66
    writer.append([1, 2.5], 0.5)
    with np.load(writer.flush()) as archive:
        assert (archive["features"].dtype, archive["labels"].dtype) == (np.float32, np.float32)
    writer.append(np.float64([1, 2]), np.float64([0.5, 1]))
    with np.load(writer.flush()) as archive:
        assert (archive["features"].dtype, archive["labels"].shape) == (np.float32, (1, 2))


@pytest.mark.parametrize(
    ("features", "label", "told"),
    [
        ([1, 2], 0.5, r"features is float32\[2\], that of the examples before float32\[3\]"),
        ([1, 2, 3], 5, r"label is int64\[\], that of the examples before float32\[\]"),
        ([1, 2, float("nan")], 0.5, "features is not finite as float32: leave this example out"),
        ([1, 2, 1e39], 0.5, "features is not finite as float32"),
        ([1, 2, 3], float("inf"), "label is not finite"),
        ([1, 2, "three"], 0.5, "features is .*: give numbers"),
        ([1, 2, None], 0.5, "features is object: give numbers"),
        (np.zeros(3, np.complex64), 0.5, "features is complex64: give numbers"),
    ],
)
def test_what_would_cost_the_device_a_shard_is_refused_at_once(tmp_path, features, label, told):
    writer = ShardWriter(tmp_path)
    append(writer, 0)
    with pytest.raises(ValueError, match=told):
        writer.append(features, label)
    append(writer, 1)
    writer.close()
    assert labels_in(tmp_path) == [0, 1]


def test_settings_that_make_no_sense(tmp_path):
    for wrong in ({"rows_per_shard": 0}, {"every_s": 0.0}, {"every_s": float("nan")}):
        with pytest.raises(ValueError, match="rows_per_shard is at least 1"):
            ShardWriter(tmp_path, **wrong)


def test_names_sort_as_shards_were_written_whatever_the_clock_does(tmp_path):
    clock = iter([NOW, NOW, NOW - 1e8, NOW + 1, NOW - 1e9, NOW - 1e9 + 1])
    for first in (0, 3):  # another process goes on where the first one was
        writer = ShardWriter(tmp_path, rows_per_shard=1, clock=lambda: next(clock))
        for number in range(first, first + 3):
            append(writer, number)
    assert labels_in(tmp_path) == list(range(6))
    assert len(contents(tmp_path)) == 6


def test_odd_names_do_not_confuse_it(tmp_path):
    for name in (
        "20261399T000000.000000Z-00000000.npz", "99991231T235959.999999Z-00000000.npz", "zzz.npz",
        ".20260101T000000.000000Z-00000000.npz.part.old", "20260101T000000.000000Z-00000000.csv",
    ):  # fmt: skip
        (tmp_path / name).write_bytes(b"")
    writer = ShardWriter(tmp_path, rows_per_shard=1, clock=lambda: NOW)
    assert append(writer, 0).name.startswith("20261118T110640.000000Z-")
    assert len(list(tmp_path.iterdir())) == 6


def test_writers_at_once_do_not_collide(tmp_path):
    def write(first):
        with ShardWriter(tmp_path, rows_per_shard=3, clock=lambda: NOW) as writer:
            for number in range(first, first + 50):
                append(writer, number)

    threads = [threading.Thread(target=write, args=(1000 * n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(labels_in(tmp_path)) == [1000 * n + i for n in range(6) for i in range(50)]
    assert all(path.suffix == ".npz" for path in tmp_path.iterdir())


def test_threads_of_one_writer(tmp_path):
    writer = ShardWriter(tmp_path, rows_per_shard=7)

    def write(first):
        for number in range(first, first + 100):
            append(writer, number)

    threads = [threading.Thread(target=write, args=(100 * n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    writer.close()
    assert sorted(labels_in(tmp_path)) == list(range(400))


def test_a_shard_can_be_read_by_whom_the_umask_lets(tmp_path):
    os.umask(0o027)
    writer = ShardWriter(tmp_path, rows_per_shard=1)
    assert stat.S_IMODE(append(writer, 0).stat().st_mode) == 0o640


# --- deaths ---------------------------------------------------------------------------------------


class Killed(BaseException):
    """The process is gone: nothing of it runs any more."""


class DyingOs:
    """`os` as the writer knows it, for a process that is killed at its nth call, and a disk that then
    loses its power: files that were not synced are cut, and a name that was not may be the old one."""

    def __init__(self, dies_at, rng):
        self._left, self._rng = dies_at, rng
        self._fds, self._unsynced, self._renamed = {}, set(), []

    def __getattr__(self, name):
        return getattr(os, name)

    def _call(self):
        self._left -= 1
        if self._left < 0:
            raise Killed

    def open(self, path, flags, mode=0o777):
        self._call()
        fd = os.open(path, flags, mode)
        self._fds[fd] = Path(path)
        return fd

    def write(self, fd, data):
        self._unsynced.add(self._fds[fd])
        if self._left == 0 or self._rng.random() < 0.3:
            data = data[: self._rng.randrange(len(data)) or 1]  # short, as a write may be
            os.write(fd, data)
            self._call()
            return len(data)
        self._call()
        return os.write(fd, data)

    def fsync(self, fd):
        self._call()
        self._unsynced.discard(self._fds[fd])
        if self._fds[fd].is_dir():
            self._renamed = []

    def close(self, fd):
        self._call()
        del self._fds[fd]
        os.close(fd)

    def rename(self, old, new):
        self._call()
        Path(old).rename(new)
        self._renamed.append((Path(old), Path(new)))
        if old in self._unsynced:
            self._unsynced.add(new)

    def unlink(self, path):
        self._call()
        Path(path).unlink()

    def end(self, *, power):
        for fd in self._fds:
            os.close(fd)
        if not power:
            return
        for path in filter(Path.exists, self._unsynced):
            os.truncate(path, self._rng.randrange(path.stat().st_size + 1))
        for old, new in self._renamed:
            if self._rng.random() < 0.5:
                new.rename(old)


@pytest.mark.parametrize("power", [False, True], ids=["kill", "power cut"])
def test_killed_anywhere_it_loses_at_most_what_waited(tmp_path, monkeypatch, power):
    rng, rows, deaths = random.Random(8), 3, 0
    for trial in range(1000):
        directory = tmp_path / str(trial)
        dying = DyingOs(rng.randrange(40), rng)
        monkeypatch.setattr(shards, "os", dying)
        promised, appended = 0, 0
        try:
            writer = ShardWriter(directory, rows_per_shard=rows)
            for number in range(14):
                appended += 1
                if append(writer, number) is not None:
                    promised = appended
        except Killed:
            deaths += 1
        monkeypatch.undo()
        dying.end(power=power)
        if not directory.exists():
            continue
        kept = labels_in(directory)  # every shard that is there is whole
        assert kept == list(range(len(kept)))
        assert promised <= len(kept) <= appended
        assert appended - len(kept) <= rows
        with ShardWriter(directory, rows_per_shard=1, sync=False) as writer:  # the next life
            append(writer, 100)
        assert labels_in(directory) == [*kept, 100]
        assert all(path.suffix == ".npz" for path in directory.iterdir())
    assert 750 < deaths < 1000


def test_without_the_sync_a_power_cut_would_be_found_out(tmp_path, monkeypatch):
    """What the test above sees when files are not synced before they get their names."""
    rng, bad = random.Random(8), 0
    for trial in range(200):
        directory = tmp_path / str(trial)
        dying = DyingOs(rng.randrange(5, 40), rng)
        monkeypatch.setattr(shards, "os", dying)
        with contextlib.suppress(Killed):
            writer = ShardWriter(directory, rows_per_shard=3, sync=False)
            for number in range(14):
                append(writer, number)
        monkeypatch.undo()
        dying.end(power=True)
        try:
            contents(directory)
        except DataError:  # which costs the device this shard and no more
            bad += 1
    assert bad > 50


def test_a_writer_that_starts_leaves_the_files_of_others_alone(tmp_path, monkeypatch):
    """In the middle of another one's write, and before that one holds its file."""
    starts, renames = [], []
    write, lock = os.write, shards.fcntl.flock

    class Meddled(DyingOs):
        def write(self, fd, data):
            if not starts:
                starts.append(ShardWriter(tmp_path))
            return write(fd, data)

        def rename(self, old, new):
            renames.append(old)
            super().rename(old, new)

    meddled = Meddled(10**9, random.Random(0))
    monkeypatch.setattr(shards, "os", meddled)
    writer = ShardWriter(tmp_path, rows_per_shard=1)
    assert append(writer, 0) is not None
    assert len(renames) == 1

    def late(fd, how):
        if how == shards.fcntl.LOCK_EX and len(starts) == 1:
            starts.append(ShardWriter(tmp_path))
        lock(fd, how)

    monkeypatch.setattr(shards.fcntl, "flock", late)
    append(writer, 1)
    assert (len(starts), len(renames)) == (2, 3)  # the first was removed, and it was written again
    assert labels_in(tmp_path) == [0, 1]


def test_a_full_disk_makes_examples_wait(tmp_path, monkeypatch):
    class Full(DyingOs):
        full = True

        def write(self, fd, data):
            if self.full:
                os.write(fd, data[:10])
                raise OSError(errno.ENOSPC, "No space left on device")
            return os.write(fd, data)

    disk = Full(10**9, random.Random(0))
    monkeypatch.setattr(shards, "os", disk)
    writer = ShardWriter(tmp_path, rows_per_shard=2)
    append(writer, 0)
    for number in range(1, 60):
        with pytest.raises(OSError, match="No space left"):
            append(writer, number)
        assert list(tmp_path.iterdir()) == []
    disk.full = False
    append(writer, 60)
    assert labels_in(tmp_path) == list(range(44, 61))  # the last eight shards' worth, and this one


def test_importing_it_loads_next_to_nothing():
    code = (
        "import json, sys; import covey_device.shards\n"
        "print(json.dumps([sorted({n.partition('.')[0] for n in sys.modules}),"
        " sorted(n for n in sys.modules if n.startswith('covey'))]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    found, ours = json.loads(done.stdout)
    assert ours == ["covey_device", "covey_device.shards"]
    others = set(found) - set(sys.stdlib_module_names) - {"covey_device", "__main__"}
    assert {name for name in others if not name.startswith(("_", "sitecustomize"))} <= {"numpy"}
