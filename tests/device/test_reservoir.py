"""The reservoir: a uniform sample, whatever is cut off, deleted, restarted or resized meanwhile."""

import errno
import os
import stat

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from covey_device.data import reservoir
from covey_device.data.reservoir import NOWHERE, Reservoir, choose
from covey_shared.errors import StorageError

CHI2_001 = {19: 43.82, 29: 58.30, 39: 72.05, 189: 256.6}
"""Quantiles 0.999 of the chi-square distribution, by degrees of freedom (any table has them)."""


@pytest.fixture(autouse=True)
def no_disk_waits(monkeypatch):
    """Thousands of files are synced here, none of which has to outlive the power."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    monkeypatch.setattr(os, "fdatasync", lambda fd: None)


def chi_square(counts, expected):
    return float(((counts - expected) ** 2 / expected).sum())


def rows(first, n, dtype=np.float32):
    """Examples that tell their numbers."""
    numbers = np.arange(first, first + n)
    return np.stack([numbers, -numbers], axis=1).astype(dtype), numbers.astype(np.int64)


def add(sample, name, first, n, dtype=np.float32):
    with sample.held() as mine:
        assert mine
        sample.settle()
        slots = sample.add(name, *rows(first, n, dtype))
        sample.sync()
    return slots


def held(sample):
    """The numbers of the examples in it, each checked to be whole."""
    kinds, places, file = sample.index()
    found = []
    for kind in np.unique(kinds[places != NOWHERE]):
        features, labels = sample.take(
            file, int(kind), places[(kinds == kind) & (places != NOWHERE)]
        )
        np.testing.assert_array_equal(features[:, 0], labels)
        np.testing.assert_array_equal(features[:, 1], -labels)
        found += labels.tolist()
    return sorted(found)


def test_all_are_kept_while_there_is_room(tmp_path):
    sample = Reservoir(tmp_path / "r.log", 10, np.random.default_rng(0))
    add(sample, "a", 0, 4)
    add(sample, "b", 4, 6)
    assert held(sample) == list(range(10))
    add(sample, "c", 10, 1)
    assert len(set(held(sample))) == 10
    assert sample.seen == 11


@given(
    st.integers(1, 30), st.lists(st.integers(1, 40), min_size=1, max_size=12), st.integers(0, 2**32)
)
@settings(max_examples=200, deadline=None)
def test_chosen_rows_and_slots_are_whole_and_distinct(capacity, shards, seed):
    rng = np.random.default_rng(seed)
    slots_of, seen = {}, 0
    for n in shards:
        chosen, slots = choose(n, seen, capacity, rng)
        assert len(chosen) == len(slots) == len(set(slots.tolist())) == len(set(chosen.tolist()))
        assert all(0 <= row < n for row in chosen.tolist())
        for row, slot in zip(chosen.tolist(), slots.tolist(), strict=True):
            slots_of[slot] = seen + row
        seen += n
        assert sorted(slots_of) == list(range(min(capacity, seen)))
        assert len(set(slots_of.values())) == len(slots_of)  # without replacement


def sampled(capacity, shards, rng):
    """Numbers of the chosen, by `choose` alone."""
    slots_of, seen = np.full(capacity, -1), 0
    for n in shards:
        chosen, slots = choose(n, seen, capacity, rng)
        slots_of[slots] = seen + chosen
        seen += n
    return slots_of


@pytest.mark.parametrize(
    "shards", [[40], [1] * 40, [3, 17, 1, 1, 9, 9], [7, 33], [20, 20]], ids=str
)
def test_every_example_is_as_likely_as_any_other(shards):
    # The statistic of inclusion counts without replacement: scaled by (N-1)/(N-k), about chi-square.
    rng, runs, capacity, n = np.random.default_rng(12), 2400, 7, 40
    counts = np.zeros(n)
    for _ in range(runs):
        counts[sampled(capacity, shards, rng)] += 1
    assert counts.sum() == runs * capacity
    statistic = chi_square(counts, runs * capacity / n) * (n - 1) / (n - capacity)
    assert statistic < CHI2_001[39]


def test_every_pair_is_as_likely_as_any_other():
    """Not only each example by itself: 190 pairs of 20, one of which is the whole sample of two."""
    rng, runs, n = np.random.default_rng(5), 9_500, 20
    counts = np.zeros((n, n))
    for _ in range(runs):
        one, other = sorted(sampled(2, [5, 1, 8, 6], rng))
        counts[one, other] += 1
    assert chi_square(counts[np.triu_indices(n, 1)], runs / 190) < CHI2_001[189]


def test_the_test_of_uniformity_can_fail():
    """A reservoir that forgets across shards how many it saw is found out by the same statistic."""
    rng, runs, capacity, n = np.random.default_rng(12), 2400, 7, 40
    counts = np.zeros(n)
    for _ in range(runs):
        slots_of = np.arange(capacity)
        for first in range(capacity, n, 3):
            chosen, slots = choose(3, capacity, capacity, rng)  # should be `first`
            slots_of[slots] = first + chosen
        counts[slots_of] += 1
    statistic = chi_square(counts, runs * capacity / n) * (n - 1) / (n - capacity)
    assert statistic > 4 * CHI2_001[39]


def test_uniform_across_restarts_rewrites_and_deleted_shards(tmp_path, monkeypatch):
    """On the disk, opened anew for each shard, and written anew as often as can be."""
    monkeypatch.setattr(reservoir, "SLACK_BYTES", -200)
    rng, runs, capacity, n = np.random.default_rng(3), 160, 5, 20
    counts = np.zeros(n)
    rewrites = 0
    for run in range(runs):
        path = tmp_path / f"{run}.log"
        inodes = set()
        for first in range(0, n, 4):
            sample = Reservoir(path, capacity, rng)
            add(sample, f"shard-{first}", first, 4)
            inodes.add(path.stat().st_ino)
        rewrites += len(inodes) - 1
        numbers = held(Reservoir(path, capacity, rng))
        assert len(set(numbers)) == capacity
        counts[numbers] += 1
        path.unlink()
    assert rewrites > runs / 4
    statistic = chi_square(counts, runs * capacity / n) * (n - 1) / (n - capacity)
    assert statistic < CHI2_001[19]


def test_a_smaller_sample_is_uniform_too_and_a_larger_one_says_why_not(tmp_path, caplog):
    rng, runs, n = np.random.default_rng(9), 300, 30
    counts = np.zeros(n)
    for run in range(runs):
        path = tmp_path / f"{run}.log"
        add(Reservoir(path, 12, rng), "a", 0, 20)
        add(Reservoir(path, 6, rng), "b", 20, 10)
        numbers = held(Reservoir(path, 6, rng))
        assert len(set(numbers)) == 6
        counts[numbers] += 1
    assert chi_square(counts, runs * 6 / n) * (n - 1) / (n - 6) < CHI2_001[29]
    before = held(Reservoir(path, 6, rng))
    larger = Reservoir(path, 100, rng)
    add(larger, "c", 30, 1)
    assert len(set(held(larger)) & set(before)) >= 5
    assert len(held(larger)) == 6
    assert "cannot grow to max_examples = 100" in caplog.text
    small = Reservoir(tmp_path / "small.log", 50, rng)
    add(small, "a", 0, 20)
    add(Reservoir(tmp_path / "small.log", 100, rng), "b", 20, 70)  # nothing was left out yet
    assert held(Reservoir(tmp_path / "small.log", 100, rng)) == list(range(90))


def test_the_same_generator_gives_the_same_sample(tmp_path):
    found = []
    for name in ("one", "two"):
        sample = Reservoir(tmp_path / name, 9, np.random.default_rng(77))
        for first in range(0, 200, 20):
            add(sample, f"{first}", first, 20)
        found.append(held(sample))
    assert found[0] == found[1]
    other = Reservoir(tmp_path / "three", 9, np.random.default_rng(78))
    add(other, "all", 0, 200)
    assert held(other) != found[0]


def test_only_its_owner_can_read_it(tmp_path):
    os.umask(0)
    path = tmp_path / "r.log"
    add(Reservoir(path, 5, np.random.default_rng(0)), "a", 0, 3)
    for file in tmp_path.iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o600


# --- power cuts, damage, full disks ---------------------------------------------------------------


def states(tmp_path, n_shards=5):
    """A log of some shards -> its bytes, and (size, sample, names taken) after each of them."""
    path = tmp_path / "r.log"
    sample = Reservoir(path, 4, np.random.default_rng(1))
    after = [(0, [], 0)]
    for number in range(n_shards):
        dtype = np.float32 if number % 2 else np.int16
        add(sample, f"s{number}", 10 * number, 3, dtype)
        after.append((path.stat().st_size, held(sample), number + 1))
    return path, path.read_bytes(), after


def test_cut_anywhere_it_is_as_it_was_after_a_whole_shard(tmp_path):
    path, data, after = states(tmp_path)
    for size in range(len(data) + 1):
        path.write_bytes(data[:size])
        _, numbers, n_taken = max(state for state in after if state[0] <= size)
        sample = Reservoir(path, 4, np.random.default_rng(2))
        assert held(sample) == numbers
        taken = sample.taken([f"s{i}" for i in range(5)])
        assert taken.tolist() == [i < n_taken for i in range(5)]
        with sample.held(), np.errstate(all="raise"):
            sample.settle()
            sample.add("next", *rows(100, 2))
            sample.sync()
        again = Reservoir(path, 4, np.random.default_rng(3))
        assert held(again) == held(sample)
        assert again.taken(["next"]).all()


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_whatever_stands_in_the_file_only_whole_examples_come_out(tmp_path_factory, data):
    path, content, _ = states(tmp_path_factory.mktemp("reservoir"))
    damaged = bytearray(content)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(damaged) - 1))
        damaged[at : at + data.draw(st.integers(0, 8))] = data.draw(st.binary(max_size=8))
    damaged += data.draw(st.sampled_from([b"", bytes(4096), b"CVR1", b"CVR1" + bytes(60)]))
    path.write_bytes(damaged)
    sample = Reservoir(path, 4, np.random.default_rng(2))
    held(sample)  # checks every example
    add(sample, "next", 100, 2)
    assert held(Reservoir(path, 4, np.random.default_rng(2))) == held(sample)


def test_what_a_power_cut_left_is_cut_off_and_told_once(tmp_path, caplog):
    path, data, _ = states(tmp_path)
    path.write_bytes(data + bytes(4096))
    sample = Reservoir(path, 4, np.random.default_rng(2))
    add(sample, "next", 100, 2)
    assert len(data) < path.stat().st_size < len(data) + 500
    add(Reservoir(path, 4, np.random.default_rng(2)), "after", 200, 2)
    (line,) = caplog.messages
    assert "the last 4096 bytes are not whole" in line


def test_a_damaged_shard_costs_no_other(tmp_path, caplog):
    path, data, after = states(tmp_path)
    damaged = bytearray(data)
    damaged[after[2][0] - 1] ^= 1  # in the examples of the second shard
    path.write_bytes(damaged)
    sample = Reservoir(path, 4, np.random.default_rng(2))
    assert sample.taken([f"s{i}" for i in range(5)]).tolist() == [True, False, True, True, True]
    assert "r.log is damaged: the examples of one shard are lost" in caplog.text


def test_a_full_disk_changes_nothing(tmp_path, monkeypatch):
    path, data, _ = states(tmp_path)
    sample = Reservoir(path, 4, np.random.default_rng(2))
    before = held(sample)
    write = os.pwrite

    def full(fd, part, at):
        write(fd, bytes(part)[: len(part) // 2], at)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(StorageError, match=r"cannot be written: No space left.*free some space"):
        add(sample, "s9", 90, 30)
    monkeypatch.undo()
    assert path.read_bytes() == data
    assert (held(sample), sample.seen) == (before, 15)
    assert not sample.taken(["s9"]).any()
    add(sample, "s9", 90, 30)
    assert held(Reservoir(path, 4, np.random.default_rng(2))) == held(sample) != before


def test_readers_need_no_lock(tmp_path, monkeypatch):
    """What was looked up before the file was written anew is still read right."""
    monkeypatch.setattr(reservoir, "SLACK_BYTES", -1000)
    path = tmp_path / "r.log"
    writer = Reservoir(path, 5, np.random.default_rng(0))
    add(writer, "a", 0, 5)
    reader = Reservoir(path, 5, np.random.default_rng(0))
    _, places, file = reader.index()
    inode = path.stat().st_ino
    for number in range(1, 30):
        add(writer, f"s{number}", 10 * number, 5)
    assert path.stat().st_ino != inode  # it was written anew
    _, labels = reader.take(file, 0, places)
    assert sorted(labels.tolist()) == list(range(5))
    assert reader.catch_up()
    assert held(reader) == held(writer)
    with writer.held() as mine, reader.held() as other:
        assert (mine, other) == (True, False)


def test_a_file_that_was_deleted_is_begun_anew(tmp_path):
    path = tmp_path / "r.log"
    sample = Reservoir(path, 5, np.random.default_rng(0))
    add(sample, "a", 0, 5)
    path.unlink()
    add(sample, "b", 10, 2)
    assert held(sample) == [10, 11]
    assert sample.taken(["a", "b"]).tolist() == [False, True]


def test_bytes_written_per_shard(tmp_path, monkeypatch):
    """A full reservoir of 2000 examples of 400 bytes, and 1000 shards of 20: the log never has more than
    the chosen examples and a hundred bytes a shard, and with all that is written anew no more than three
    times that."""
    written = 0
    write = os.pwrite

    def counted(fd, part, at):
        nonlocal written
        written += len(part)
        return write(fd, part, at)

    monkeypatch.setattr(os, "pwrite", counted)
    monkeypatch.setattr(reservoir, "SLACK_BYTES", 0)
    sample = Reservoir(tmp_path / "r.log", 2000, np.random.default_rng(4))
    features, labels = np.zeros((20, 98), np.float32), np.zeros(20, np.int64)
    chosen, before = 0, 0
    for number in range(1100):
        with sample.held():
            sample.settle()
            slots = sample.add(f"{number}", features, labels)
            sample.sync()
        if number == 99:
            before = written  # it is full
        elif number > 99:
            chosen += len(slots)
    assert sample.seen == 22_000
    needed = 400 * chosen + 120 * 1000
    assert written - before < 3 * needed
    assert (written - before) / 1000 < 0.6 * 20 * 400  # of a shard's own 8000 bytes
