"""A plan's directory: read and written whole, or not at all."""

import hashlib
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest

from covey_coordinator.plans import bundle
from covey_coordinator.plans.bundle import load_bundle, write
from covey_fleet.models import PLANS
from covey_shared.errors import MalformedError, StorageError
from covey_shared.plan import GraphRef, encode_header

FILES = {"plan.json", "train.onnx", "eval.onnx", "infer.onnx", "initial.bin"}


@pytest.fixture(scope="module")
def plan():
    return load_bundle(PLANS / "mlp")


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_what_is_written_is_read_again(plan, tmp_path):
    write(plan, tmp_path / "deep" / "plan")
    again = load_bundle(tmp_path / "deep" / "plan")
    assert again.header == plan.header
    assert again.header_bytes == plan.header_bytes
    assert again.graphs == plan.graphs
    assert again.hash == plan.hash
    np.testing.assert_array_equal(again.initial, plan.initial)
    assert {p.name for p in (tmp_path / "deep" / "plan").iterdir()} == FILES
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["plan"]


def test_initial_values_are_the_flat_vector_in_little_endian(plan, tmp_path):
    write(plan, tmp_path / "plan")
    data = (tmp_path / "plan" / "initial.bin").read_bytes()
    assert data == np.asarray(plan.initial, "<f4").tobytes()


def test_an_existing_directory_is_kept_unless_told(plan, tmp_path):
    write(plan, tmp_path / "plan")
    (tmp_path / "plan" / "initial.bin").write_bytes(b"mine")
    with pytest.raises(StorageError, match=r"exists already.*--force"):
        write(plan, tmp_path / "plan")
    assert (tmp_path / "plan" / "initial.bin").read_bytes() == b"mine"
    write(plan, tmp_path / "plan", replace=True)
    load_bundle(tmp_path / "plan")
    assert [p.name for p in tmp_path.iterdir()] == ["plan"]


def test_replacing_never_deletes_what_is_no_plan(plan, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(StorageError, match=r"holds 'thesis\.tex'"):
        write(plan, tmp_path, replace=True)
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match="not a directory"):
        write(plan, tmp_path / "file", replace=True)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


# Five files, then one rename; over an existing plan one more.
STEPS = [(False, n) for n in range(1, 7)] + [(True, n) for n in range(1, 8)]


@pytest.mark.parametrize(("existing", "fails_at"), STEPS)
def test_a_failure_leaves_what_was_there(plan, tmp_path, monkeypatch, existing, fails_at):
    """The disk is full at the n-th file or rename: the old plan or none, never half a one."""
    target = tmp_path / "plan"
    before = None
    if existing:
        write(plan, target)
        (target / "initial.bin").write_bytes(b"old")
        before = contents(target)
    calls = 0

    def failing(real):
        def call(*args):
            nonlocal calls
            calls += 1
            if calls == fails_at:
                raise OSError(28, "No space left on device")
            return real(*args)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(bundle, "_write_durably", failing(bundle._write_durably))
        patch.setattr(Path, "rename", failing(Path.rename))
        with pytest.raises(StorageError, match="No space left"):
            write(plan, target, replace=True)
    assert (contents(target) if target.exists() else None) == before
    assert [p.name for p in tmp_path.iterdir()] == (["plan"] if existing else [])


@pytest.mark.parametrize("name", ["train", "eval", "infer"])
def test_a_plan_that_devices_would_refuse_is_refused_here(plan, tmp_path, name):
    """Though its files are what its header says: the operator learns it, and no fleet is called."""
    graph = plan.graphs[name] + b"\xca\x01\x00"  # an empty function
    ref = GraphRef(sha256=hashlib.sha256(graph).hexdigest(), size=len(graph))
    header = msgspec.structs.replace(plan.header, **{name: ref})
    graphs = {**plan.graphs, name: graph}
    write(replace(plan, header_bytes=encode_header(header), graphs=graphs), tmp_path / "plan")
    with pytest.raises(MalformedError, match=rf"would refuse it: {name}\.onnx: .*functions"):
        load_bundle(tmp_path / "plan")


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_changed_file_is_named(plan, tmp_path, name):
    write(plan, tmp_path / "plan")
    path = tmp_path / "plan" / name
    data = bytearray(path.read_bytes())
    if name == "initial.bin":
        data[3::4] = b"\xff" * len(data[3::4])
        data[2::4] = b"\xff" * len(data[2::4])
    else:
        data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(MalformedError, match=name):
        load_bundle(tmp_path / "plan")
    path.write_bytes(data[:-1])
    with pytest.raises(MalformedError, match=name):
        load_bundle(tmp_path / "plan")
    path.unlink()
    with pytest.raises(StorageError, match=name):
        load_bundle(tmp_path / "plan")
