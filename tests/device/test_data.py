"""Data sources: every kind with good files, and with each mistake a file or a table can have."""

import gzip
import pickle
import struct
import sys
import tomllib
import zipfile

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from covey_device.data import DataConfig, batches, open_source, source_of_arrays
from covey_device.data.fit import reshapes
from covey_shared.errors import DataError, LocalProtocolError
from device_support import IMAGES, make_header

HEADER = make_header()  # float32[3] -> float32[1]
CLASSES = make_header(labels=("int64", ()), loss="cross_entropy")
IDX_CODES = {"u1": 0x08, "i1": 0x09, "i2": 0x0B, "i4": 0x0C, "f4": 0x0D, "f8": 0x0E}


def config(text):
    return msgspec.convert(tomllib.loads(text)["data"], type=DataConfig)


def opened(folder, text, header=HEADER):
    return open_source(config("[data]\n" + text), header, base=folder)


def everything(source):
    return source.batch(np.arange(source.n_examples))


def refuses(folder, text, *parts, header=HEADER):
    """Opening fails, and the message has all the parts."""
    with pytest.raises(DataError) as caught:
        opened(folder, text, header)
    message = str(caught.value)
    for part in parts:
        assert part in message, message
    return message


def features_and_labels(n=5):
    rng = np.random.default_rng(0)
    return rng.random((n, 3)).astype(np.float32), rng.random((n, 1)).astype(np.float32)


def write_idx(path, array, opener=open):
    code = IDX_CODES[array.dtype.str[1:]]
    head = bytes([0, 0, code, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    with opener(path, "wb") as stream:
        stream.write(head + array.astype(array.dtype.newbyteorder(">")).tobytes())


# --- the table ------------------------------------------------------------------------------------

NPY = 'kind = "npy"\nfeatures = "x.npy"\nlabels = "y.npy"\n'
NPZ = 'kind = "npz"\nfile = "d.npz"\n'
IDX = 'kind = "idx"\nfeatures = "x.idx"\nlabels = "y.idx"\n'
CSV = 'kind = "csv"\nfile = "d.csv"\nlabels = "y"\n'


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ('kind = "parquet"', "parquet"),
        ('file = "d.npz"', "kind"),
        ('kind = "npz"', "file"),
        (NPZ + "delimiter = ','", "delimiter"),
        (NPY + "sclae = 2", "sclae"),
        (NPZ + 'file2 = "x"', "file2"),
        (NPZ + "scale = nan", "scale = nan"),
        (NPZ + "scale = inf", "scale = inf"),
        (NPZ + "scale = 0", "scale = 0"),
        (NPZ + 'scale = "1/0"', "divides by zero"),
        (NPZ + 'scale = "255"', "scale"),
        (NPZ + "offset = nan", "offset = nan"),
        (NPZ + "reshape = 1", "reshape"),
        (CSV + 'delimiter = ";;"', "delimiter"),
        ('kind = "csv"\nfile = "d.csv"\nlabels = []', "labels"),
        ('kind = "python"\nfunction = "module"', "function"),
        ('kind = "python"\nfunction = "os.path;x:y"', "function"),
    ],
)
def test_a_mistyped_table_is_refused_by_its_key(text, part):
    with pytest.raises(msgspec.ValidationError) as caught:
        config("[data]\n" + text)
    assert part in str(caught.value)


def test_fractions():
    assert config(f'[data]\n{NPZ}scale = "1/255"').factor == 1 / 255
    assert config(f'[data]\n{NPZ}scale = "-1/2"').factor == -0.5
    assert config(f"[data]\n{NPZ}scale = 2").factor == 2.0


# --- npy and npz ----------------------------------------------------------------------------------


def save_npy(folder, features, labels):
    np.save(folder / "x.npy", features)
    np.save(folder / "y.npy", labels)
    return NPY


def save_npz(folder, features, labels):
    np.savez(folder / "d.npz", features=features, labels=labels)
    return NPZ


SAVERS = [save_npy, save_npz]


@pytest.mark.parametrize("save", SAVERS)
def test_arrays_come_back(tmp_path, save):
    features, labels = features_and_labels()
    source = opened(tmp_path, save(tmp_path, features, labels))
    assert source.n_examples == 5
    got = source.batch(np.array([4, 0, 4]))
    np.testing.assert_array_equal(got[0], features[[4, 0, 4]])
    np.testing.assert_array_equal(got[1], labels[[4, 0, 4]])


@pytest.mark.parametrize("save", SAVERS)
@pytest.mark.parametrize("dtype", ["u1", "i1", "u2", "i2", "f2", "f4", "f8", ">f8", "?"])
def test_safe_types_become_float32(tmp_path, save, dtype):
    values = np.array([[0, 1, 1], [1, 0, 1]]).astype(dtype)
    source = opened(tmp_path, save(tmp_path, values, values[:, :1]))
    for got, wanted in zip(everything(source), (values, values[:, :1]), strict=True):
        assert got.dtype == np.float32
        assert got.flags.c_contiguous
        np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("dtype", ["i4", "u4", "i8", "c8", "U3", "M8[s]", "m8[s]", "g", "i4,f4"])
def test_other_types_are_refused(tmp_path, dtype):
    labels = np.zeros((2, 1), np.float32)
    text = save_npy(tmp_path, np.zeros((2, 3), dtype), labels)
    refuses(tmp_path, text, "x.npy holds", "wants float32", ".astype('float32')")


@pytest.mark.parametrize("dtype", ["u1", "i4", "u4", "i8"])
def test_whole_numbers_become_classes(tmp_path, dtype):
    text = save_npy(tmp_path, np.zeros((3, 3), np.float32), np.array([2, 0, 1], dtype))
    labels = everything(opened(tmp_path, text, CLASSES))[1]
    assert labels.dtype == np.int64
    np.testing.assert_array_equal(labels, [2, 0, 1])


@pytest.mark.parametrize("dtype", ["u8", "f4", "f8"])
def test_other_types_of_classes_are_refused(tmp_path, dtype):
    text = save_npy(tmp_path, np.zeros((3, 3), np.float32), np.array([2, 0, 1], dtype))
    refuses(tmp_path, text, "y.npy holds", "wants int64", header=CLASSES)


def test_a_long_double_is_no_float64(tmp_path):
    text = save_npy(tmp_path, np.zeros((2, 3), np.float32), np.zeros((2, 1), np.longdouble))
    refuses(tmp_path, text, "y.npy holds")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e300])
@pytest.mark.parametrize("save", SAVERS)
def test_a_value_that_is_not_finite_is_named(tmp_path, save, bad):
    features = np.zeros((200_000, 3))  # more than one block
    features[199_999, 1] = bad
    text = save(tmp_path, features, np.zeros((200_000, 1)))
    origin = "x.npy" if save is save_npy else "d.npz, array 'features'"
    refuses(tmp_path, text, origin, "example 199999, value 1, counted from 0", "finite")


def test_a_label_that_is_not_finite_is_named(tmp_path):
    text = save_npz(tmp_path, np.zeros((2, 3)), np.array([[0], [np.nan]]))
    refuses(tmp_path, text, "d.npz, array 'labels' holds nan", "example 1, value 0")


def test_negative_classes_are_named(tmp_path):
    text = save_npy(tmp_path, np.zeros((2, 3)), np.array([0, -100]))
    refuses(tmp_path, text, "y.npy holds -100", "example 1,", "start at 0", header=CLASSES)


@pytest.mark.parametrize("bad", [-1, 3, 255])
def test_classes_that_the_plan_does_not_have_are_named(tmp_path, bad):
    header = make_header(labels=("int64", ()), loss="cross_entropy", classes=3)
    good = save_npy(tmp_path, np.zeros((3, 3)), np.array([0, 2, 1], np.uint8))
    assert opened(tmp_path, good, header).n_examples == 3
    text = save_npy(tmp_path, np.zeros((3, 3)), np.array([0, 2, bad]))
    refuses(tmp_path, text, f"y.npy holds {bad}", "classes 0 to 2", "example 2,", header=header)
    text = save_csv(tmp_path, f"a,b,c,y\n1,2,3,2\n1,2,3,{bad}\n")
    refuses(tmp_path, text, f"row 3, column 'y' holds {bad}", "0 to 2", header=header)


@pytest.mark.parametrize("bad", [-0.5, 1.5, 2])
def test_labels_of_binary_cross_entropy_lie_between_0_and_1(tmp_path, bad):
    header = make_header(loss="bce_with_logits")
    good = save_npy(tmp_path, np.zeros((3, 3)), np.array([[0.0], [1.0], [0.25]]))
    assert opened(tmp_path, good, header).n_examples == 3
    text = save_npy(tmp_path, np.zeros((2, 3)), np.array([[0.0], [bad]]))
    refuses(tmp_path, text, "y.npy holds", "0, 1 or a probability", header=header)


def test_lengths_differ(tmp_path):
    text = save_npy(tmp_path, np.zeros((4, 3)), np.zeros((3, 1)))
    refuses(tmp_path, text, "x.npy has 4 examples, y.npy has 3", "one label per example")


@pytest.mark.parametrize("save", SAVERS)
def test_no_examples(tmp_path, save):
    text = save(tmp_path, np.zeros((0, 3)), np.zeros((0, 1)))
    refuses(tmp_path, text, "has no examples", "at least one")


@pytest.mark.parametrize(
    ("shape", "parts"),
    [
        ((2, 4), ["has 4 values [4]", "wants 3 values [3]", "use data of the plan's shape"]),
        ((2,), ["has 1 value []", "wants 3 values [3]"]),
        ((), ["single number", "one row per example"]),
    ],
)
def test_a_wrong_shape_is_named(tmp_path, shape, parts):
    text = save_npy(tmp_path, np.zeros(shape), np.zeros((2, 1)))
    refuses(tmp_path, text, "x.npy", *parts)


def test_missing_files_and_arrays(tmp_path):
    refuses(tmp_path, NPY, "x.npy: no such file", str(tmp_path), "folder of the configuration file")
    refuses(tmp_path, NPZ, "d.npz: no such file")
    refuses(tmp_path, IDX, "x.idx: no such file")
    refuses(tmp_path, CSV, "d.csv: no such file")
    np.savez(tmp_path / "d.npz", X=np.zeros(3), labels=np.zeros(3))
    refuses(tmp_path, NPZ, "d.npz has no array 'features'", "['X', 'labels']", "[data]")


def test_a_folder_is_no_file(tmp_path):
    (tmp_path / "x.npy").mkdir()
    refuses(tmp_path, NPY, "x.npy cannot be read")


def test_names_of_arrays_can_be_set(tmp_path):
    features, labels = features_and_labels()
    np.savez_compressed(tmp_path / "d.npz", X=features, y=labels)
    source = opened(tmp_path, NPZ + 'features = "X"\nlabels = "y"')
    np.testing.assert_array_equal(everything(source)[0], features)


def test_nothing_is_unpickled(tmp_path):
    class Trap:
        def __reduce__(self):
            return (exec, ("raise SystemExit('unpickled')",))

    objects = np.array([Trap(), Trap()], dtype=object)
    np.save(tmp_path / "x.npy", objects, allow_pickle=True)
    np.save(tmp_path / "y.npy", np.zeros((2, 1)))
    refuses(tmp_path, NPY, "x.npy", "pickle, which can run code", "array.astype('float32')")
    np.savez(tmp_path / "d.npz", features=objects, labels=np.zeros((2, 1)))
    refuses(tmp_path, NPZ, "d.npz", "pickle, which can run code", "array.astype('float32')")
    (tmp_path / "x.npy").write_bytes(pickle.dumps([1, 2]))
    refuses(tmp_path, NPY, "x.npy is not an npy file", "numpy.save")
    (tmp_path / "d.npz").write_bytes(pickle.dumps([1, 2]))
    refuses(tmp_path, NPZ, "d.npz is not an npz file", "numpy.savez")


def test_paths_may_leave_the_folder(tmp_path):
    (tmp_path / "etc").mkdir()
    save_npy(tmp_path, *features_and_labels())
    text = f'kind = "npy"\nfeatures = "../x.npy"\nlabels = "{tmp_path}/y.npy"'
    assert opened(tmp_path / "etc", text).n_examples == 5


def test_fortran_order_is_only_another_order_in_the_file(tmp_path):
    features, labels = features_and_labels()
    source = opened(tmp_path, save_npy(tmp_path, np.asfortranarray(features), labels))
    got = everything(source)[0]
    np.testing.assert_array_equal(got, features)
    assert got.flags.c_contiguous


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_damaged_file_opens_or_raises_data_error(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("damaged")
    features, labels = features_and_labels()
    kind = data.draw(st.sampled_from(["npy", "npz", "idx", "idx.gz", "csv"]))
    if kind == "npy":
        text, name = save_npy(folder, features, labels), "x.npy"
    elif kind == "npz":
        text, name = save_npz(folder, features, labels), "d.npz"
    elif kind == "csv":
        text, name = save_csv(folder, "a,b,c,y\n1,2,3,4\n5,6,7,8\n"), "d.csv"
    else:
        opener = gzip.open if kind == "idx.gz" else open
        write_idx(folder / "x.idx", features, opener)
        write_idx(folder / "y.idx", labels)
        text, name = IDX, "x.idx"
    content = bytearray((folder / name).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(content) - 1))
        content[place] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(content)) | st.just(len(content)))
    (folder / name).write_bytes(content[:cut])
    try:
        source = opened(folder, text)
    except DataError as error:
        told = str(error)
    else:
        told = name
        assert everything(source)[0].shape == (source.n_examples, 3)
    assert name in told or "does not fit into memory" in told


# --- scale, offset, shapes ------------------------------------------------------------------------


@pytest.mark.parametrize("save", SAVERS)
def test_scale_and_offset_change_features_only(tmp_path, save):
    pixels = np.array([[0, 128, 255]], np.uint8)
    text = save(tmp_path, pixels, np.array([[7]], np.uint8))
    features, labels = everything(opened(tmp_path, text + 'scale = "1/255"\noffset = -0.5'))
    np.testing.assert_allclose(features, pixels / 255 - 0.5, atol=1e-7)
    np.testing.assert_array_equal(labels, [[7]])


def test_scaling_to_infinity_is_found(tmp_path):
    text = save_npy(tmp_path, np.full((1, 3), 1e20, np.float32), np.zeros((1, 1)))
    assert opened(tmp_path, text).n_examples == 1
    refuses(tmp_path, text + "scale = 1e30", "x.npy holds inf")


def test_a_batch_leaves_the_stored_values_alone(tmp_path):
    features, labels = features_and_labels()
    source = opened(tmp_path, save_npz(tmp_path, features, labels) + "scale = 3")
    first = everything(source)[0]
    first[:] = 0
    np.testing.assert_allclose(everything(source)[0], features * 3, rtol=1e-6)


def test_whole_numbers_are_not_scaled(tmp_path):
    header = make_header(features=("int64", (3,)))
    text = save_npy(tmp_path, np.zeros((1, 3), np.int64), np.zeros((1, 1)))
    assert everything(opened(tmp_path, text, header))[0].dtype == np.int64
    refuses(tmp_path, text + "scale = 2", "x.npy would be scaled", "remove scale", header=header)


@pytest.mark.parametrize(
    ("stored", "wanted", "expected"),
    [
        ((28, 28), (1, 28, 28), True),
        ((1, 28, 28), (28, 28), True),
        ((784,), (1, 28, 28), True),
        ((28, 28, 3), (2352,), True),
        ((), (1,), True),
        ((1, 1), (), True),
        ((28, 28, 3), (3, 28, 28), False),
        ((14, 56), (28, 28), False),
        ((4,), (), False),
    ],
)
def test_reshapes_when_the_order_is_beyond_doubt(stored, wanted, expected):
    assert reshapes(stored, wanted) is expected


def test_another_order_needs_permission(tmp_path):
    header = make_header(features=("float32", (3, 2, 2)))
    values = np.arange(12.0).reshape(1, 2, 2, 3)
    text = save_npy(tmp_path, values, np.zeros((1, 1)))
    refuses(tmp_path, text, "[2, 2, 3]", "[3, 2, 2]", "reshape = true", header=header)
    features = everything(opened(tmp_path, text + "reshape = true", header))[0]
    np.testing.assert_array_equal(features.ravel(), np.arange(12.0))
    assert features.shape == (1, 3, 2, 2)


# --- idx ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("opener", [open, gzip.open])
def test_idx_images(tmp_path, opener):
    images = np.random.default_rng(0).integers(0, 256, (6, 28, 28), np.uint8)
    classes = np.array([5, 0, 4, 1, 9, 2], np.uint8)
    write_idx(tmp_path / "x.idx", images, opener)
    write_idx(tmp_path / "y.idx", classes, opener)
    source = opened(tmp_path, IDX + 'scale = "1/255"', IMAGES)
    features, labels = source.batch(np.array([2, 5]))
    assert features.shape == (2, 1, 28, 28)
    np.testing.assert_allclose(features[:, 0], images[[2, 5]] / 255, rtol=1e-6)
    np.testing.assert_array_equal(labels, [4, 2])
    assert labels.dtype == np.int64


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(["u1", "i1", "i2", "f4", "f8"]).flatmap(
        lambda dtype: hnp.arrays(
            dtype,
            st.tuples(st.integers(1, 5), st.just(3)),
            elements={"min_value": 0 if dtype == "u1" else -100, "max_value": 100},
        )
    ),
    st.booleans(),
)
def test_every_idx_type_comes_back(tmp_path_factory, features, zipped):
    folder = tmp_path_factory.mktemp("idx")
    write_idx(folder / "x.idx", features, gzip.open if zipped else open)
    write_idx(folder / "y.idx", features[:, :1])
    got = everything(opened(folder, IDX))[0]
    np.testing.assert_array_equal(got, features.astype(np.float32))


@pytest.mark.parametrize("opener", [open, gzip.open])
def test_broken_idx_files(tmp_path, opener):
    write_idx(tmp_path / "y.idx", np.zeros(2, np.uint8))
    path = tmp_path / "x.idx"

    def write(content):
        with opener(path, "wb") as stream:
            stream.write(content)

    good = bytes([0, 0, 0x0D, 2]) + struct.pack(">2I", 2, 3)
    for content, parts in [
        (b"", ["x.idx is not an idx file", "nothing"]),
        (b"\x89PNG\r\n", ["x.idx is not an idx file", "89504e47"]),
        (bytes([0, 0, 0x0A, 2]), ["x.idx is not an idx file"]),
        (bytes([0, 0, 0x08, 0]), ["x.idx is not an idx file"]),
        (good[:7], ["x.idx ends within its header"]),
        (good + bytes(23), ["x.idx has fewer bytes than the 24", "[2, 3]"]),
        (good + bytes(25), ["x.idx has more bytes than the 24"]),
        (good[:4] + struct.pack(">2I", 0, 3), ["x.idx has 0 examples"]),
    ]:
        write(content)
        refuses(tmp_path, IDX, *parts)


def test_a_gzip_file_that_ends_early(tmp_path):
    write_idx(tmp_path / "x.idx", np.zeros((500, 3), np.float32), gzip.open)
    content = (tmp_path / "x.idx").read_bytes()
    (tmp_path / "x.idx").write_bytes(content[:-12])
    refuses(tmp_path, IDX, "x.idx")


# --- csv ------------------------------------------------------------------------------------------


def save_csv(folder, text, **options):
    (folder / "d.csv").write_text(text, newline="", **options)
    return CSV


def test_csv(tmp_path):
    text = save_csv(tmp_path, 'a,"b, too",y,c\n1,2.5,7,-3\n\n" 4 ",5e-1,8,6\n')
    features, labels = everything(opened(tmp_path, text))
    np.testing.assert_array_equal(features, np.array([[1, 2.5, -3], [4, 0.5, 6]], np.float32))
    np.testing.assert_array_equal(labels, [[7], [8]])


def test_csv_columns_can_be_chosen_and_ordered(tmp_path):
    save_csv(tmp_path, "id;c;b;a;y;z\nx1;3;2;1;9;8\nx2;6;5;4;7;6\n")
    header = make_header(labels=("float32", (2,)))
    text = (
        'kind = "csv"\nfile = "d.csv"\ndelimiter = ";"\n'
        'labels = ["z", "y"]\nfeatures = ["a", "b", "c"]'
    )
    features, labels = everything(opened(tmp_path, text, header))
    np.testing.assert_array_equal(features, [[1, 2, 3], [4, 5, 6]])
    np.testing.assert_array_equal(labels, [[8, 9], [6, 7]])


def test_csv_as_a_spreadsheet_writes_it(tmp_path):
    text = save_csv(tmp_path, "a\tb\tc\ty\r\n1\t2\t3\t4\r\n", encoding="utf-8-sig")
    text += 'delimiter = "\\t"\nfeatures = ["a", "c", "b"]'
    assert everything(opened(tmp_path, text))[0].tolist() == [[1, 3, 2]]


def test_csv_of_one_feature_and_whole_labels(tmp_path):
    header = make_header(("float32", (1,)), ("int64", ()), "cross_entropy")
    text = save_csv(tmp_path, "x,y\n0.5,3\n1.5,2.0\n")
    features, labels = everything(opened(tmp_path, text, header))
    assert features.tolist() == [[0.5], [1.5]]
    assert labels.tolist() == [3, 2]
    assert labels.dtype == np.int64


def test_csv_of_whole_features(tmp_path):
    text = save_csv(tmp_path, "a,b,c,y\n0,128,255,1\n")
    for dtype in ("int64", "uint8"):
        features = everything(opened(tmp_path, text, make_header((dtype, (3,)))))[0]
        assert features.tolist() == [[0, 128, 255]]
        assert features.dtype == dtype
    text = save_csv(tmp_path, "a,b,c,y\n0,1,256,1\n")
    header = make_header(("uint8", (3,)))
    refuses(tmp_path, text, "row 2, column 'c' holds 256", "uint8", header=header)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", ["d.csv is empty"]),
        ("\n\n", ["d.csv is empty"]),
        ("a,b,c,y\n", ["has no examples"]),
        ("a,b,c,label\n1,2,3,4\n", ["no column 'y'", "'a', 'b', 'c', 'label'", "[data]"]),
        ("a;b;c;y\n1;2;3;4\n", ["no column 'y'", "'a;b;c;y'", "delimiter"]),
        ("a,a,c,y\n1,2,3,4\n", ["2 columns 'a'", "rename"]),
        (",b,c,y\n1,2,3,4\n", ["column 1 has no name", "features = [...]"]),
        ("y\n1\n", ["no column besides its labels"]),
        ("a,b,y\n1,2,3\n", ["d.csv, features has 2 values", "wants 3 values"]),
        ("a,b,c,y\n1,2,3,4\n1,2,x,4\n", ["row 3, column 'c' holds 'x', which is not a number"]),
        ("a,b,c,y\n1,,3,4\n", ["row 2, column 'b' holds nothing"]),
        ("a,b,c,y\n1,2,3,4\n\n1,nan,3,4\n", ["row 4, column 'b' holds nan"]),
        ("a,b,c,y\n1,2,3,-inf\n", ["row 2, column 'y' holds -inf"]),
        ("a,b,c,y\n1e300,2,3,4\n", ["row 2, column 'a' holds inf"]),
        ("a,b,c,y\n1,2,3\n", ["row 2 has 3 columns", "header row has 4"]),
        ("a,b,c,y\n1,2,3,4,5\n", ["row 2 has 5 columns"]),
        ("a,b,c,y\n1,'2,3',4\n", ["row 2, column 'b'"]),
        ('a,b,c,y\n1,"2,3,4\n', ["row 2: ", "correct the row"]),
        ("a,b,c,y\n1,2,3,4\0\n", ["row 2"]),
    ],
)
def test_mistakes_in_csv_files_are_named(tmp_path, text, parts):
    refuses(tmp_path, save_csv(tmp_path, text), "d.csv", *parts)


@pytest.mark.parametrize(
    ("label", "part"),
    [("-1", "holds -1 where class numbers"), ("1.5", "1.5 where int64"), ("nan", "nan where")],
)
def test_wrong_classes_in_csv_files_are_named(tmp_path, label, part):
    text = save_csv(tmp_path, f"a,b,c,y\n1,2,3,0\n1,2,3,{label}\n")
    refuses(tmp_path, text, "d.csv, row 3, column 'y' holds", part, header=CLASSES)


def test_a_mistake_far_down_is_found_in_its_row(tmp_path):
    rows = ["1,2,3,4"] * 3000
    rows[2500] = "1,2,nan,4"
    text = save_csv(tmp_path, "a,b,c,y\n" + "\n".join(rows))
    refuses(tmp_path, text, "row 2502, column 'c' holds nan")


@pytest.mark.parametrize(
    ("more", "part"),
    [('features = ["a", "y", "c"]', "'y' is named twice"), ('features = ["a", "a"]', "'a' is na")],
)
def test_csv_columns_named_twice(tmp_path, more, part):
    refuses(tmp_path, save_csv(tmp_path, "a,b,c,y\n1,2,3,4\n") + more, part)


def test_csv_that_is_not_text(tmp_path):
    (tmp_path / "d.csv").write_bytes(b"a,b,c,y\n1,2,3,\xff\n")
    refuses(tmp_path, CSV, "d.csv is not UTF-8")


@settings(max_examples=40, deadline=None)
@given(
    hnp.arrays(
        np.float32,
        st.tuples(st.integers(1, 40), st.just(4)),
        elements=st.floats(width=32, allow_nan=False, allow_infinity=False),
    )
)
def test_csv_keeps_every_float32(tmp_path_factory, values):
    folder = tmp_path_factory.mktemp("csv")
    lines = [",".join(repr(float(value)) for value in row) for row in values]
    source = opened(folder, save_csv(folder, "\n".join(["a,b,c,y", *lines])))
    features, labels = everything(source)
    np.testing.assert_array_equal(np.hstack([features, labels]), values)


# --- python ---------------------------------------------------------------------------------------


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Writes a module of a name not used before; gives the [data] table for its `load`."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    written = []

    def write(code, function="load"):
        name = f"own_data_{tmp_path.name}_{len(written)}"
        written.append(name)
        (tmp_path / f"{name}.py").write_text("import numpy as np\n" + code)
        return f'kind = "python"\nfunction = "{name}:{function}"\n'

    yield write
    for name in written:
        sys.modules.pop(name, None)


PROVIDER = """
class Own:
    def __len__(self): return {length}
    def batch(self, indices):
        {body}
def load(): return Own()
"""


def test_python_arrays(tmp_path, module):
    text = module("def load(): return np.arange(6.0).reshape(2, 3), np.ones((2, 1))")
    features, labels = everything(opened(tmp_path, text + "scale = 2"))
    assert features.tolist() == [[0, 2, 4], [6, 8, 10]]
    assert labels.tolist() == [[1], [1]]


def test_python_batches(tmp_path, module):
    text = module(PROVIDER.format(length=9, body="return indices[:, None] * np.ones(3), indices"))
    header = make_header(labels=("int64", ()), loss="cross_entropy")
    source = opened(tmp_path, text, header)
    assert source.n_examples == 9
    features, labels = source.batch(np.array([8, 3]))
    assert features.tolist() == [[8, 8, 8], [3, 3, 3]]
    assert features.dtype == np.float32
    assert labels.tolist() == [8, 3]


@pytest.mark.parametrize(
    ("body", "part"),
    [
        ("return np.zeros((1, 3))", "not a pair"),
        ("return [0.0], np.zeros(1)", "returned list where an array"),
        ("return np.zeros((len(indices), 4)), np.zeros(len(indices))", "features has 4 values"),
        ("return np.zeros((2, 3)), np.zeros(1)", "features has 2 rows for 1 indices"),
        ("return np.zeros((1, 3)), np.zeros(2)", "labels has 2 rows for 1 indices"),
        ("return np.zeros((1, 3), np.int64), np.zeros(1)", "features holds int64"),
        ("return np.full((1, 3), np.nan), np.zeros(1)", "features holds nan"),
        ("return np.zeros((1, 3)), np.array([np.inf])", "labels holds inf"),
        ("raise KeyError('camera')", "batch raised KeyError: 'camera'"),
    ],
)
def test_wrong_python_batches(tmp_path, module, body, part):
    refuses(tmp_path, module(PROVIDER.format(length=3, body=body)), "own_data", ":load", part)


def test_a_later_python_batch_is_checked_too(tmp_path, module):
    body = (
        "return np.where(indices == 7, np.nan, 0.0)[:, None] * np.ones(3), np.zeros(len(indices))"
    )
    source = opened(tmp_path, module(PROVIDER.format(length=9, body=body)))
    with pytest.raises(DataError, match=r"features holds nan.*example 7, value 0"):
        source.batch(np.array([2, 7]))


@pytest.mark.parametrize(
    ("code", "parts"),
    [
        ("def load(): return np.zeros((2, 4)), np.zeros(2)", [":load, features has 4 values"]),
        ("def load(): return np.zeros((2, 3)), np.zeros(3)", ["2 examples", "3"]),
        ("def load(): return [1, 2]", ["returned list", "(features, labels)"]),
        ("def load(): return None", ["returned NoneType"]),
        ("def load(a): return a", ["raised TypeError"]),
        ("def load(): raise OSError('no camera')", ["raised OSError: no camera"]),
        ("def other(): pass", ["has no function 'load'"]),
        ("load = 3", ["has no function 'load'"]),
        ("import a_module_that_is_not_there", ["raised ModuleNotFoundError"]),
        ("def load(:", ["raised SyntaxError"]),
        (PROVIDER.format(length=0, body=""" """ + "pass"), ["has no examples"]),
        (PROVIDER.format(length="None", body="pass"), ["__len__ raised TypeError"]),
    ],
)
def test_wrong_python_functions(tmp_path, module, code, parts):
    refuses(tmp_path, module(code), "own_data", *parts)


def test_a_module_that_is_not_there(tmp_path):
    text = 'kind = "python"\nfunction = "not_there.deeper:load"'
    refuses(tmp_path, text, "no module 'not_there'", str(tmp_path), "install")


def test_a_folder_cannot_hide_an_installed_module(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "wave.py").write_text("raise SystemExit('the wrong module')")
    refuses(tmp_path, 'kind = "python"\nfunction = "wave:load"', "no function 'load'")


# --- memory and batches ---------------------------------------------------------------------------


@pytest.fixture
def mapped(monkeypatch):
    """Even small files are memory-mapped."""
    monkeypatch.setattr("covey_device.data.files.SMALL_BYTES", 0)


@pytest.mark.usefixtures("mapped")
@pytest.mark.parametrize("kind", ["npy", "idx"])
def test_mapped_rows_come_back(tmp_path, kind):
    features, labels = features_and_labels(100)
    if kind == "npy":
        text = save_npy(tmp_path, features, labels)
    else:
        write_idx(tmp_path / "x.idx", features)
        write_idx(tmp_path / "y.idx", labels)
        text = IDX
    source = opened(tmp_path, text)
    assert isinstance(source._rows[0].array, np.memmap)
    indices = np.random.default_rng(0).permutation(100)[:37]
    np.testing.assert_array_equal(source.batch(indices)[0], features[indices])
    np.testing.assert_array_equal(source.batch(indices)[1], labels[indices])


@pytest.mark.usefixtures("mapped")
def test_a_mapped_file_that_is_written_to_is_an_error_and_no_crash(tmp_path):
    features, labels = features_and_labels(2000)
    source = opened(tmp_path, save_npy(tmp_path, features, labels))
    np.save(tmp_path / "x.npy", features[:1])  # in place and shorter: touching the map would kill
    with pytest.raises(DataError, match=r"x.npy was written to while in use.*rename"):
        everything(source)


@pytest.mark.usefixtures("mapped")
@pytest.mark.parametrize("how", ["renamed", "deleted"])
def test_a_mapped_file_that_is_replaced_keeps_its_content(tmp_path, how):
    features, labels = features_and_labels()
    source = opened(tmp_path, save_npy(tmp_path, features, labels))
    if how == "renamed":
        np.save(tmp_path / "new.npy", features[:1])
        (tmp_path / "new.npy").rename(tmp_path / "x.npy")
    else:
        (tmp_path / "x.npy").unlink()
    np.testing.assert_array_equal(everything(source)[0], features)


def test_a_map_of_the_owners_that_was_changed_keeps_its_changes(tmp_path):
    features, labels = features_and_labels()
    save_npy(tmp_path, features, labels)
    own = np.load(tmp_path / "x.npy", mmap_mode="c")
    own[0] = 7
    source = source_of_arrays(own, labels, HEADER)
    assert source.batch(np.arange(5))[0][0].tolist() == [7, 7, 7]
    assert source.batch(np.arange(5))[0][0].tolist() == [7, 7, 7]


def test_data_that_does_not_fit_into_memory_says_what_to_do(tmp_path):
    huge = np.lib.format.header_data_from_array_1_0(np.zeros((1, 3), np.float32))
    huge["shape"] = (1 << 44, 3)
    with zipfile.ZipFile(tmp_path / "d.npz", "w") as archive:
        for name in ("features.npy", "labels.npy"):
            with archive.open(name, "w") as stream:
                np.lib.format.write_array_header_1_0(stream, huge)
    refuses(tmp_path, NPZ, "does not fit into memory", "npy", "memory-mapped")


def test_arrays_at_hand():
    features, labels = features_and_labels()
    source = source_of_arrays(features, labels, HEADER)
    np.testing.assert_array_equal(everything(source)[1], labels)
    with pytest.raises(DataError, match="device 3, features has 4 values"):
        source_of_arrays(np.zeros((2, 4)), labels[:2], HEADER, name="device 3")


class Numbers:
    """Examples that are their own numbers."""

    def __init__(self, n):
        self.n_examples = n

    def batch(self, indices):
        return indices, indices


@settings(deadline=None)
@given(st.integers(1, 50), st.integers(1, 60), st.integers(0, 1000))
def test_every_epoch_holds_every_example_once(n, batch_size, seed):
    supply = batches(Numbers(n), batch_size, np.random.default_rng(seed))
    for _ in range(3):
        epoch = []
        while len(epoch) < n:
            features, labels = next(supply)
            assert len(features) == min(batch_size, n - len(epoch))
            np.testing.assert_array_equal(features, labels)
            epoch.extend(features.tolist())
        assert sorted(epoch) == list(range(n))


def test_the_order_is_random_and_follows_from_the_generator():
    def first_epochs(seed):
        supply = batches(Numbers(50), 50, np.random.default_rng(seed))
        return [next(supply)[0].tolist() for _ in range(2)]

    one, two = first_epochs(1)
    assert one != two
    assert one != sorted(one)
    assert first_epochs(1) == [one, two]
    assert first_epochs(2)[0] != one


def test_a_batch_size_of_zero_is_refused():
    with pytest.raises(LocalProtocolError, match="batch_size"):
        next(batches(Numbers(3), 0, np.random.default_rng(0)))
