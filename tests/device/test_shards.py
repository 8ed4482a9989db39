"""A directory that grows: what is a shard, what is read of it, what is chosen, what is deleted."""

import errno
import io
import logging
import os
import re
import socket
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from covey_device.data import ShardsData, batches, open_source, retention, shard_files
from covey_device.data.growing import Growth, reservoir_path
from covey_device.data.retention import DAY_S, Entry, surplus
from covey_shared.errors import DataError, LocalProtocolError
from device_support import IMAGES, make_header

HEADER = make_header()


def npz(first, n=4, **changes):
    """The bytes of a shard whose examples tell their numbers."""
    numbers = np.arange(first, first + n, dtype=np.float32)
    arrays = {"features": np.stack([numbers, numbers, -numbers], 1), "labels": numbers}
    packed = io.BytesIO()
    np.savez(packed, **(arrays | changes))
    return packed.getvalue()


def csv(first, n=4):
    lines = [f"{i},{i},{-i},{i}" for i in range(first, first + n)]
    return "\n".join(["a,b,c,label", *lines, ""]).encode()


class Home:
    """A directory of shards beside a state directory, and sources over it."""

    def __init__(self, base, **config):
        self.base, self.folder = base, base / "data"
        self.folder.mkdir()
        self.now = 1_800_000_000.0
        self.config = ShardsData(directory="data", **config)
        self.growth = Growth(base / "state", rng=np.random.default_rng(1), clock=lambda: self.now)

    def put(self, name, content):
        part = self.folder / f".{name}.part"
        part.write_bytes(content)
        return part.rename(self.folder / name)

    def open(self, header=HEADER, growth=None):
        return open_source(self.config, header, base=self.base, growth=growth or self.growth)

    @property
    def names(self):
        return sorted(path.name for path in self.folder.iterdir())


@pytest.fixture
def make_home(tmp_path, caplog):
    caplog.set_level(logging.INFO, "covey.device")
    return lambda **config: Home(tmp_path, **config)


def numbers(source):
    """The numbers of all examples, each checked to be whole."""
    features, labels = source.batch(np.arange(source.n_examples))
    assert (features.dtype, labels.dtype) == (np.float32, np.float32)
    assert features.flags.c_contiguous
    np.testing.assert_array_equal(features, np.concatenate([labels, labels, -labels], 1))
    return labels[:, 0].astype(int).tolist()


def warnings(caplog):
    return [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]


# --- what is a shard ------------------------------------------------------------------------------


def test_only_complete_shards_are_read(make_home, caplog):
    home = make_home()
    home.put("a.npz", npz(0))
    home.put("b.csv", csv(4))
    (home.folder / ".c.npz").write_bytes(npz(100))
    (home.folder / "d.npz.part").write_bytes(npz(100))
    (home.folder / "e.NPZ").write_bytes(npz(100))
    (home.folder / "notes.txt").write_text("not a shard")
    (home.folder / "f.npz").mkdir()
    (home.base / "outside.npz").write_bytes(npz(100))
    (home.folder / "g.npz").symlink_to(home.base / "outside.npz")
    os.mkfifo(home.folder / "h.npz")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(home.folder / "i.csv"))
        assert numbers(home.open()) == list(range(8))
    assert warnings(caplog) == []  # none of the others is a shard, not even a bad one


def test_the_next_refresh_takes_what_is_new(make_home):
    home = make_home()
    home.put("a.npz", npz(0))
    source = home.open()
    home.put("b.npz", npz(4))
    assert numbers(source) == [0, 1, 2, 3]  # not in the middle of a round
    source.refresh()
    assert numbers(source) == list(range(8))


@pytest.mark.parametrize("select", ["recent", "reservoir", "all"])
def test_without_a_shard_rounds_are_declined_until_there_is_one(make_home, select):
    home = make_home(select=select)
    for _ in range(2):
        with pytest.raises(DataError, match=r"^data has no shard yet.*takes part from the first"):
            home.open()
    home.put("a.npz", npz(0))
    assert numbers(home.open()) == [0, 1, 2, 3]


def test_a_directory_that_is_not_there(make_home):
    home = make_home()
    home.folder.rmdir()
    with pytest.raises(DataError, match=r"^data: no such directory .looked in .*: make it, or"):
        home.open()
    home.folder.touch()
    with pytest.raises(DataError, match=r"^data cannot be opened: Not a directory"):
        home.open()


@pytest.mark.parametrize("select", ["recent", "reservoir"])
def test_cut_anywhere_a_shard_is_not_read_and_the_others_are(make_home, caplog, select):
    """All lengths of a file that somebody writes in place, as nobody should."""
    home = make_home(select=select)
    home.put("a.npz", npz(0))
    source, whole = home.open(), npz(4)
    for size in range(0, len(whole), 3):
        (home.folder / "b.npz").write_bytes(whole[:size])
        source.refresh()
        assert numbers(source) == [0, 1, 2, 3]
    told = len(caplog.records)
    source.refresh()
    home.open()
    assert len(caplog.records) == told  # one warning for a file as it is, however often it is met
    assert all("data/b.npz" in line for line in warnings(caplog))
    (home.folder / "b.npz").write_bytes(whole)
    source.refresh()
    assert sorted(numbers(source)) == list(range(8))


def test_a_csv_shard_that_ends_within_a_line_is_not_read(make_home, caplog):
    home = make_home()
    home.put("a.npz", npz(0))
    source, whole = home.open(), csv(4)
    for size in range(len(whole) - 5, len(whole)):
        (home.folder / "b.csv").write_bytes(whole[:size])
        source.refresh()
        assert numbers(source) == [0, 1, 2, 3]
    assert "does not end with the end of a line" in warnings(caplog)[0]


@given(st.data())
@settings(max_examples=250, deadline=None)
def test_a_damaged_shard_is_read_right_or_not_at_all(tmp_path_factory, data):
    """The zip's checksums cover every byte of the arrays and their headers."""
    home = Home(tmp_path_factory.mktemp("shards"))
    home.put("a.npz", npz(0))
    compressed = io.BytesIO()
    values = np.arange(4, 8, dtype=np.float32)
    np.savez_compressed(compressed, features=np.stack([values, values, -values], 1), labels=values)
    content = bytearray(data.draw(st.sampled_from([npz(4), compressed.getvalue()])))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(content) - 1))
        length = data.draw(st.integers(0, 4))
        content[at : at + length] = data.draw(st.binary(min_size=length, max_size=length))
    home.put("b.npz", content)
    assert numbers(home.open()) in (list(range(4)), list(range(8)))


# --- odd and hostile content ----------------------------------------------------------------------


def zipped(*members, method=zipfile.ZIP_STORED):
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", method) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return packed.getvalue()


def npy(array_bytes, header):
    text = header.encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + array_bytes


def header_of(shape, descr="<f4"):
    return f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape!r}, }}"


GOOD_LABELS = ("labels.npy", npy(bytes(16), header_of((4,))))
BOMB = zipped(
    ("features.npy", npy(bytes(200_000_000), header_of((16_666_666, 3)))),
    GOOD_LABELS,
    method=zipfile.ZIP_DEFLATED,
)
LYING_BOMB = BOMB.replace(
    (len(npy(b"", header_of((1, 1)))) + 200_000_000).to_bytes(4, "little"),
    (128 + 48).to_bytes(4, "little"),
)
MANY_MEMBERS = zipped(*((f"m{i}", b"") for i in range(3000)), GOOD_LABELS)
ZIP64 = npz(0)[:-22] + b"PK\6\7" + bytes(16) + npz(0)[-22:]
ENCRYPTED = bytearray(npz(0))
for magic, flags in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
    for found in re.finditer(re.escape(magic), bytes(ENCRYPTED)):
        ENCRYPTED[found.start() + flags] |= 1
TWICE = zipped(
    ("features.npy", npy(bytes(48), header_of((4, 3)))), ("labels.npz", b""), GOOD_LABELS
).replace(b"labels.npz", b"labels.npy")

BAD = {
    "empty.npz": (b"", "does not end as an npz file does"),
    "text.npz": (b"hello, world\n" * 9, "does not end as an npz file does"),
    "bomb.npz": (BOMB, r"takes 200 MB, and a shard may take 67 MB: write smaller shards"),
    "liar.npz": (LYING_BOMB, "is damaged: Bad CRC"),
    "members.npz": (MANY_MEMBERS, "has more members than an npz file needs"),
    "zip64.npz": (ZIP64, "has more members than an npz file needs"),
    "encrypted.npz": (ENCRYPTED, "is damaged: .*encrypted"),
    "twice.npz": (TWICE, "has two arrays of one name"),
    "other.npz": (zipped(GOOD_LABELS), r"has no array 'features', it has \['labels'\]"),
    "objects.npz": (
        npz(0, labels=np.array([1, "a", None, 2], object)),
        "labels': it holds Python objects kept as pickle",
    ),
    "evil.npz": (
        zipped(("features.npy", npy(b"cos\nsystem\n", header_of((1, 3), "|O"))), GOOD_LABELS),
        "Python objects kept as pickle",
    ),
    "strings.npz": (npz(0, labels=np.array(["a", "b", "c", "d"])), "labels' holds str"),
    "structured.npz": (npz(0, labels=np.zeros(4, "f4,f4")), "labels' holds void"),
    "times.npz": (npz(0, labels=np.zeros(4, "M8[s]")), "labels' holds datetime64"),
    "complex.npz": (npz(0, labels=np.zeros(4, np.complex64)), "labels' holds complex64"),
    "huge-shape.npz": (
        zipped(("features.npy", npy(b"", header_of((10**15, 3)))), GOOD_LABELS),
        "not as long as its shape",
    ),
    "negative.npz": (
        zipped(("features.npy", npy(bytes(48), header_of((-4, -3)))), GOOD_LABELS),
        "not as long as its shape|is damaged",
    ),
    "nothing-wide.npz": (
        zipped(("features.npy", npy(b"", header_of((10**15, 0)))), GOOD_LABELS),
        r"has 0 values \[0\] per example",
    ),
    "no-npy.npz": (zipped(("features.npy", b"hello"), GOOD_LABELS), "is damaged"),
    "cut-npy.npz": (zipped(("features.npy", npy(b"", "")[:20]), GOOD_LABELS), "is damaged"),
    "nested.npz": (
        zipped(("features.npy", npy(b"", "(" * 110)), GOOD_LABELS),
        "is damaged|does not fit into memory",
    ),
    "nan.npz": (npz(0, labels=np.float32([0, np.nan, 0, 0])), r"holds nan .*example 1, value 0"),
    "inf.npz": (npz(0, features=np.full((4, 3), np.inf)), "holds inf where only finite"),
    "wide.npz": (npz(0, features=np.zeros((4, 5), np.float32)), r"has 5 values \[5\] per example"),
    "int64.npz": (npz(0, features=np.zeros((4, 3), np.int64)), "holds int64, the plan"),
    "lengths.npz": (npz(0, labels=np.zeros(3, np.float32)), "has 4 examples, .* has 3"),
    "none.npz": (
        npz(0, features=np.zeros((0, 3), np.float32), labels=np.zeros(0, np.float32)),
        "has no examples",
    ),
    "number.npz": (npz(0, features=np.float32(3)), "is a single number"),
    "empty.csv": (b"", "does not end with the end of a line"),
    "header.csv": (b"a,b,c,label\n", "has no examples"),
    "no-label.csv": (b"a,b,c,d\n1,2,3,4\n", "has no column 'label'"),
    "word.csv": (b"a,b,c,label\n1,2,x,4\n", r"row 2, column 'c' holds 'x'"),
    "nan.csv": (b"a,b,c,label\n1,2,nan,4\n", r"row 2, column 'c' holds nan"),
    "binary.csv": (bytes(range(256)) + b"\n", "row|UTF-8|empty"),
    "latin1.csv": ("a,b,c,label\n1,2,3,é\n".encode("latin-1"), "is not UTF-8"),
    "endless.csv": (b"a,b,c,label\n1,2,3," + b"4" * (1 << 20) + b"\n", "does not end with its line"),
    "quoted.csv": (b'a,b,c,label\n1,2,3,"4\n1,2,3,4\n', "row 2 does not end with its line"),
    "large.csv": (b"a,b,c,label\n" + bytes(16 << 20) + b"\n", "takes 17 MB, and a csv shard may"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_bad_shard_is_left_out_and_named_once(make_home, caplog, name):
    content, message = BAD[name]
    home = make_home()
    home.put("a.npz", npz(0))
    home.put(name, content)
    home.put("z.npz", npz(4))
    source = home.open()
    source.refresh()
    home.open()
    assert numbers(source) == list(range(8))
    (line,) = warnings(caplog)
    assert line.startswith(f"data/{name}")
    assert line.endswith("(this shard is left out)")
    (home.folder / "a.npz").unlink()
    (home.folder / "z.npz").unlink()
    with pytest.raises(DataError, match=message) as caught:
        home.open()
    assert str(caught.value).startswith("data: none of its 1 shards can be used; the first: data/")


def test_a_bomb_takes_no_memory(make_home):
    import tracemalloc

    home = make_home()
    home.put("a.npz", npz(0))
    for name in ("bomb.npz", "liar.npz", "members.npz", "huge-shape.npz", "large.csv"):
        home.put(name, BAD[name][0])
    tracemalloc.start()
    home.open()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4_000_000


def test_classes_out_of_range_cost_their_shard_alone(make_home, caplog):
    home = make_home(scale="1/255")
    pictures = np.arange(8 * 784, dtype=np.uint16).reshape(8, 28, 28).astype(np.uint8)
    for name, classes in (("a", range(8)), ("b", range(3, 11)), ("c", [-1] * 8), ("d", [9] * 8)):
        home.put(f"{name}.npz", npz(0, features=pictures, labels=np.array(classes)))
    features, labels = home.open(IMAGES).batch(np.arange(16))
    assert labels.tolist() == [*range(8), *[9] * 8]
    np.testing.assert_allclose(features[8:, 0], pictures / np.float32(255), rtol=1e-6)
    assert [line.partition(",")[0] for line in warnings(caplog)] == ["data/c.npz", "data/b.npz"]


def test_a_name_cannot_break_the_log(make_home, caplog):
    home = make_home()
    home.put("a.npz", npz(0))
    home.put("b\nWARNING: all is lost\x1b[31m.npz", b"")
    (home.folder / os.fsdecode(b"c\xff.npz")).write_bytes(b"")
    home.open()
    assert len(warnings(caplog)) == 2
    assert all(line.isprintable() for line in warnings(caplog))


def test_a_shard_that_cannot_be_opened_is_one_of_the_bad_ones(make_home, caplog, monkeypatch):
    home = make_home()
    home.put("a.npz", npz(0))
    home.put("b.npz", npz(4))
    opened = os.open

    def forbidden(path, *arguments, **more):
        if path == "b.npz":
            raise PermissionError(errno.EACCES, "Permission denied")
        return opened(path, *arguments, **more)

    monkeypatch.setattr(os, "open", forbidden)
    source = home.open()
    assert numbers(source) == [0, 1, 2, 3]
    assert warnings(caplog)[0].startswith("data/b.npz cannot be read: Permission denied")


# --- shards that change and vanish ----------------------------------------------------------------


def vanishing(monkeypatch, act):
    """Before a shard is opened, `act(name)` happens."""
    read = shard_files.os.open

    def opened(path, *arguments, **more):
        if isinstance(path, str) and path.endswith((".npz", ".csv")):
            act(path)
        return read(path, *arguments, **more)

    monkeypatch.setattr(shard_files.os, "open", opened)


@pytest.mark.parametrize("select", ["recent", "reservoir", "all"])
def test_shards_that_vanish_between_listing_and_reading(make_home, monkeypatch, caplog, select):
    home = make_home(select=select)
    for number in range(6):
        home.put(f"{number}.npz", npz(4 * number))
    vanishing(
        monkeypatch, lambda name: name in ("1.npz", "4.npz") and (home.folder / name).unlink()
    )
    assert sorted(numbers(home.open())) == [0, 1, 2, 3, *range(8, 16), 20, 21, 22, 23]
    assert warnings(caplog) == []


@pytest.mark.parametrize("select", ["recent", "reservoir"])
def test_whatever_becomes_of_shards_while_a_round_trains_it_goes_on(make_home, select):
    """Deleted, cut to nothing, replaced: files that were mapped would end the process here."""
    home = make_home(select=select, max_examples=6000)
    for number in range(3):
        home.put(f"{number}.npz", npz(2000 * number, 2000))
    source = home.open()
    supply = batches(source, 32, np.random.default_rng(0))
    before = sorted(numbers(source))
    for _ in range(5):
        next(supply)
    (home.folder / "0.npz").unlink()
    os.truncate(home.folder / "1.npz", 0)
    (home.folder / "2.npz").write_bytes(b"other")
    for _ in range(400):
        next(supply)
    assert sorted(numbers(source)) == before


def test_a_file_that_is_written_to_while_it_is_read_is_left_out(make_home, monkeypatch, caplog):
    home = make_home()
    home.put("a.npz", npz(0))
    path = home.put("b.csv", csv(4))
    reading = shard_files.read_table

    def meanwhile(*arguments):
        with path.open("ab") as file:
            file.write(b"100,100,-100,100\n")
        return reading(*arguments)

    monkeypatch.setattr(shard_files, "read_table", meanwhile)
    source = home.open()
    assert numbers(source) == [0, 1, 2, 3]
    assert "data/b.csv was written to while it was read" in warnings(caplog)[0]
    monkeypatch.undo()
    source.refresh()
    assert numbers(source) == [*range(8), 100]


def test_a_shard_that_was_written_anew_is_read_anew_but_not_into_a_sample(make_home):
    home = make_home()
    home.put("a.npz", npz(0))
    source = home.open()
    home.put("a.npz", npz(50, 3))
    source.refresh()
    assert numbers(source) == [50, 51, 52]


# --- selection ------------------------------------------------------------------------------------


def shards_strategy():
    return st.lists(
        st.tuples(
            st.sampled_from(["put", "delete", "refresh"]), st.integers(0, 9), st.integers(1, 9)
        ),
        max_size=25,
    )


@given(shards_strategy(), st.integers(1, 20))
@settings(max_examples=80, deadline=None)
def test_recent_is_the_last_examples_by_name(tmp_path_factory, steps, most):
    """Against a list: shards come in any order, go, and are replaced."""
    home = Home(tmp_path_factory.mktemp("shards"), max_examples=most)
    there, first = {"5": (0, 3)}, 3
    home.put("5.npz", npz(0, 3))
    source = home.open()
    for action, name, n in [*steps, ("refresh", 0, 1)]:
        path = home.folder / f"{name}.npz"
        if action == "put":
            home.put(path.name, npz(first, n))
            there[str(name)] = (first, n)
            first += n
        elif action == "delete" and str(name) in there and len(there) > 1:
            path.unlink()
            del there[str(name)]
        elif action == "refresh":
            source.refresh()
            wanted = [i for _, (at, size) in sorted(there.items()) for i in range(at, at + size)]
            assert numbers(source) == wanted[-most:]
            assert numbers(home.open()) == wanted[-most:]


def test_recent_does_not_open_what_is_too_old(make_home, monkeypatch):
    home = make_home(max_examples=10)
    for number in range(20):
        home.put(f"{number:02}.npz", npz(4 * number))
    opened = []
    vanishing(monkeypatch, opened.append)
    source = home.open()
    assert numbers(source) == list(range(70, 80))
    assert opened == ["19.npz", "18.npz", "17.npz"]
    opened.clear()
    home.put("20.npz", npz(80))
    home.put("03.5.npz", npz(1000))  # late, and older than all that is held
    source.refresh()
    assert numbers(source) == list(range(74, 84))
    assert opened == ["20.npz"]


def test_memory_is_bounded_by_the_examples_that_are_held(make_home):
    """200 shards of 0.5 MB each, of which 2 MB are held."""
    import tracemalloc

    header = make_header(("float32", (1000,)), slots={
        "weight": ((1000, 1), "parameter"), "bias": ((1,), "parameter")})  # fmt: skip
    home = make_home(max_examples=500)

    def put(number):
        home.put(f"{number:03}.npz", npz(
            0, features=np.full((125, 1000), number, np.float32), labels=np.zeros(125)))  # fmt: skip

    put(0)
    tracemalloc.start()
    source = home.open(header)
    for number in range(1, 60):
        put(number)
        source.refresh()
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert source.n_examples == 500
    assert held < 2_000_000 + 600_000  # two pieces: room is made before a shard comes in
    assert (
        peak < held + 3 * 500_000 + 2_000_000
    )  # a shard while it is read, and while it is checked


def test_more_examples_than_fit_into_memory(make_home, monkeypatch):
    home = make_home(max_examples=1_000_000)
    home.put("a.npz", npz(0))

    def full(*_):
        raise MemoryError

    monkeypatch.setattr("covey_device.data.window.Kind.empty", full)
    with pytest.raises(
        DataError, match=r"data: max_examples = 1000000 are more .*: lower it, or keep"
    ):
        home.open()


def test_all_says_when_it_is_not_all(make_home, caplog):
    home = make_home(select="all", max_examples=10)
    home.put("a.npz", npz(0))
    source = home.open()
    home.put("b.npz", npz(4, 6))
    source.refresh()
    assert numbers(source) == list(range(10))
    assert warnings(caplog) == []
    home.put("c.npz", npz(10))
    for _ in range(3):
        source.refresh()
    assert numbers(source) == list(range(4, 14))
    (line,) = warnings(caplog)
    assert line.startswith("data has more examples than max_examples = 10: the oldest are left out")


def test_npz_and_csv_and_types_mix(make_home):
    home = make_home(select="reservoir")
    values = np.arange(8, 12)
    home.put("a.npz", npz(0))
    home.put("b.csv", csv(4))
    home.put("c.npz", npz(0, features=np.stack([values, values, -values], 1).astype(np.int16),
                          labels=values.astype(np.float64)))  # fmt: skip
    home.put("d.npz", npz(0, features=np.asfortranarray(
        np.stack([values + 4, values + 4, -values - 4], 1).astype(">f4")), labels=values + 4.0))  # fmt: skip
    for source in (home.open(), home.open()):
        assert numbers(source) == list(range(16))
        features, labels = source.batch(np.array([13, 1, 9, 5, 9]))
        assert labels[:, 0].tolist() == [13, 1, 9, 5, 9]
        assert features[:, 2].tolist() == [-13, -1, -9, -5, -9]


def test_csv_columns_and_delimiter(make_home):
    home = make_home(delimiter=";", columns=("b", "a", "c"), label_columns=("rain",), offset=1.0)
    home.put("a.csv", b"rain;a;unused;b;c\n7;1;0;2;3\n")
    features, labels = home.open().batch(np.arange(1))
    assert (features.tolist(), labels.tolist()) == ([[3, 2, 4]], [[7]])


# --- the sample -----------------------------------------------------------------------------------


def test_a_sample_outlives_its_shards_and_its_process(make_home):
    home = make_home(select="reservoir", max_examples=30)
    for number in range(10):
        home.put(f"{number}.npz", npz(10 * number, 10))
    first = sorted(numbers(home.open()))
    assert len(set(first)) == 30
    assert len({number // 10 for number in first}) > 4
    for path in home.folder.iterdir():
        path.unlink()
    again = home.open(growth=Growth(home.base / "state"))
    assert sorted(numbers(again)) == first
    home.put("10.npz", npz(100, 1000))
    again.refresh()
    assert len(set(numbers(again))) == 30
    assert sum(number >= 100 for number in numbers(again)) > 15


def test_a_sample_counts_each_shard_once(make_home):
    home = make_home(select="reservoir", max_examples=1000)
    home.put("a.npz", npz(0))
    for _ in range(3):
        assert numbers(home.open()) == [0, 1, 2, 3]
    hidden = home.base / "elsewhere"
    home.folder.rename(hidden)  # a disk that is not mounted for a while
    home.folder.mkdir()
    assert numbers(home.open()) == [0, 1, 2, 3]
    home.folder.rmdir()
    hidden.rename(home.folder)
    assert numbers(home.open()) == [0, 1, 2, 3]


def test_a_sample_goes_on_without_its_directory(make_home, caplog):
    home = make_home(select="reservoir")
    path = home.put("a.npz", npz(0))
    source = home.open()
    path.unlink()
    home.folder.rmdir()
    for _ in range(3):
        source.refresh()
        assert numbers(source) == [0, 1, 2, 3]
        assert numbers(home.open()) == [0, 1, 2, 3]
    (line,) = warnings(caplog)
    assert "no such directory" in line
    assert line.endswith("the sample is used as it is")


def test_another_plan_takes_what_it_can_of_a_sample(make_home, caplog):
    ten = make_header(("float32", (3,)), ("int64", ()), "cross_entropy", name="ten", classes=10)
    three = make_header(("float32", (3,)), ("int64", ()), "cross_entropy", name="three", classes=3)
    wide = make_header(("float32", (4,)), ("int64", ()), "cross_entropy", name="wide", classes=10)
    home = make_home(select="reservoir")
    home.put("a.npz", npz(0, 10, labels=np.arange(10)))
    assert home.open(ten).n_examples == 10
    assert home.open(three).batch(np.arange(3))[1].tolist() == [0, 1, 2]
    assert "7 of 10 examples do not fit the plan 'three' and are left out" in warnings(caplog)[0]
    with pytest.raises(DataError, match="10 of 10 examples do not fit the plan 'wide'"):
        home.open(wide)
    assert home.open(ten).n_examples == 10


def test_a_sample_that_cannot_be_written(make_home, caplog, monkeypatch):
    home = make_home(select="reservoir", max_shards=1)
    home.put("a.npz", npz(0))
    source = home.open()

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    home.put("b.npz", npz(4))
    monkeypatch.setattr(os, "pwrite", full)
    for _ in range(2):
        source.refresh()
        assert numbers(source) == [0, 1, 2, 3]
    (line,) = warnings(caplog)
    assert "No space left on device; free some space" in line
    assert home.names == ["a.npz", "b.npz"]  # what was not taken is not deleted
    monkeypatch.undo()
    source.refresh()
    assert sorted(numbers(source)) == list(range(8))
    assert home.names == ["b.npz"]


def test_a_sample_needs_a_state_directory(make_home):
    home = make_home(select="reservoir")
    with pytest.raises(LocalProtocolError, match="state directory"):
        home.open(growth=Growth())


def test_each_directory_has_a_sample_of_its_own(tmp_path):
    paths = {reservoir_path(tmp_path, Path(name)) for name in ("/a", "/b", "/a/../b", "c")}
    assert len(paths) == 4
    assert all(path.parent == tmp_path for path in paths)


# --- retention ------------------------------------------------------------------------------------


def shards_of(**limits):
    return ShardsData(directory="data", **limits)


@given(
    st.lists(st.tuples(st.integers(0, 900_000), st.integers(-10, 100)), max_size=12),
    st.one_of(st.none(), st.integers(1, 12)),
    st.one_of(st.none(), st.integers(1, 5)),
    st.one_of(st.none(), st.integers(1, 90)),
)
def test_what_stays_is_within_the_limits_and_what_goes_had_to(shards, n, mb, days):
    entries = [Entry(f"{i:02}", size, -DAY_S * age) for i, (size, age) in enumerate(shards)]
    gone = surplus(entries, shards_of(max_shards=n, max_mb=mb, max_age_days=days), 0.0)
    kept = [entry for entry in entries if entry not in gone]
    assert len(gone) == len(set(gone))
    if entries:
        assert entries[-1] in kept  # the newest stays
    if len(kept) > 1:
        assert n is None or len(kept) <= n
        assert mb is None or sum(entry.size for entry in kept) <= 1_000_000 * mb
        assert days is None or all(e.changed_unix >= -DAY_S * days for e in kept[:-1])
    young = [e for e in gone if days is None or e.changed_unix >= -DAY_S * days]
    if young:  # the last of them went for the sake of the number or the size
        with_it = [young[-1], *kept]
        assert (n is not None and len(with_it) > n) or (
            mb is not None and sum(entry.size for entry in with_it) > 1_000_000 * mb
        )
    if (n, mb, days) == (None, None, None):
        assert gone == []


@pytest.mark.parametrize("select", ["recent", "reservoir", "all"])
def test_the_oldest_shards_are_deleted_if_the_owner_says_so(make_home, caplog, select):
    home = make_home(select=select, max_shards=3, max_examples=6)
    for number in range(8):
        home.put(f"{number}.npz", npz(4 * number))
    home.put("notes.txt", b"keep me")
    home.put("damaged.npz", b"keep me")
    home.put("0-damaged.npz", b"keep me")
    source = home.open()
    kept = ["0-damaged.npz", "5.npz", "6.npz", "7.npz", "damaged.npz", "notes.txt"]
    assert home.names == kept
    assert len(numbers(source)) == 6
    (line,) = [r.getMessage() for r in caplog.records if r.levelno == logging.INFO]
    assert line.startswith("data: deleted 5 shards, 0.npz to 4.npz (0.0 MB), beyond the limits")
    if select == "reservoir":
        assert len({n // 4 for n in numbers(source)} - {5, 6, 7}) > 0


def test_what_is_deleted_was_taken_and_is_on_the_disk(make_home, monkeypatch):
    home, events = make_home(select="reservoir", max_shards=1), []
    for number in range(3):
        home.put(f"{number}.npz", npz(4 * number))
    sync, unlink = os.fdatasync, os.unlink

    def synced(fd):
        sync(fd)
        events.append("sync")

    def unlinked(name, **more):
        unlink(name, **more)
        events.append(name)

    monkeypatch.setattr(os, "fdatasync", synced)
    monkeypatch.setattr(os, "unlink", unlinked)
    home.open()
    assert events == ["sync", "0.npz", "1.npz"]  # once for all that a round takes in


def test_without_limits_nothing_is_ever_deleted(make_home, monkeypatch):
    monkeypatch.setattr(retention, "delete", None)
    home = make_home(max_examples=3)
    for number in range(20):
        home.put(f"{number:02}.npz", npz(4 * number))
    home.open().refresh()
    assert len(home.names) == 20


def test_old_shards_go_by_age_but_for_the_newest(make_home):
    home = make_home(max_age_days=30)
    for number, days in enumerate([100, 31, 29, -5, 40]):
        path = home.put(f"{number}.npz", npz(4 * number))
        when = home.now - DAY_S * days
        os.utime(path, (when, when))
    source = home.open()
    assert home.names == ["2.npz", "3.npz", "4.npz"]
    assert numbers(source) == list(range(8, 20))


def test_nothing_but_surely_a_shard_is_deleted(make_home, caplog):
    """A window that is full does not open older files: they are looked at before they are deleted."""
    home = make_home(max_shards=2, max_examples=4)
    home.put("0.npz", b"my thesis, by mistake")
    home.put("1.csv", b"name,telephone\nAda,1\n")
    home.put("2.npz", npz(0))
    home.put("3.csv", csv(4))
    for number in (4, 5):
        home.put(f"{number}.npz", npz(4 * number))
    source = home.open()
    assert home.names == ["0.npz", "1.csv", "4.npz", "5.npz"]
    source.refresh()
    assert len(warnings(caplog)) == 2
    assert "data/0.npz would be deleted as an old shard, but is none" in warnings(caplog)[0]


def test_links_are_not_followed_out_of_the_directory(make_home):
    home = make_home(max_shards=1, max_examples=4)
    outside = home.base / "outside"
    outside.mkdir()
    (outside / "x.npz").write_bytes(npz(0))
    (home.folder / "0.npz").symlink_to(outside / "x.npz")
    (home.folder / "1").symlink_to(outside)
    for number in (2, 3, 4):
        home.put(f"{number}.npz", npz(4 * number))
    home.open()
    assert home.names == ["0.npz", "1", "4.npz"]
    assert (outside / "x.npz").exists()


def test_a_directory_that_may_only_be_read_is_told_once(make_home, caplog, monkeypatch):
    home = make_home(max_shards=1)
    for number in range(3):
        home.put(f"{number}.npz", npz(4 * number))

    def forbidden(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(retention.os, "unlink", forbidden)
    source = home.open()
    source.refresh()
    home.open()
    assert numbers(source) == list(range(12))
    (line,) = warnings(caplog)
    assert line.startswith("data: old shards cannot be deleted (Permission denied)")
    assert "remove max_age_days, max_mb and max_shards" in line
    monkeypatch.undo()
    source.refresh()
    assert home.names == ["2.npz"]


def test_the_same_generators_give_the_same_batches(make_home):
    home = make_home(select="reservoir", max_examples=20)
    for number in range(10):
        home.put(f"{number}.npz", npz(10 * number, 10))
    found = []
    for state in ("one", "two"):
        growth = Growth(home.base / state, rng=np.random.default_rng(4))
        supply = batches(home.open(growth=growth), 8, np.random.default_rng(5))
        found.append([next(supply)[1].tolist() for _ in range(10)])
    assert found[0] == found[1]
