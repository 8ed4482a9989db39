"""A device's size: within its bounds, measured on what really lies there, and told as every benchmark is."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from covey_packaging import weights
from covey_packaging.target import ROOT, TARGETS, target
from covey_packaging.tree import Tree

BENCHMARK = ROOT / "benchmarks" / "device_size.py"


@pytest.mark.parametrize("wanted", TARGETS, ids=lambda wanted: wanted.name)
def test_a_device_keeps_within_its_bounds(tree_of, wanted):
    weight = weights.weigh(tree_of(wanted))
    assert weight.disk_bytes <= {"arm64": 150_000_000, "amd64": 180_000_000}[wanted.arch]
    assert len(weight.tree.distributions) <= 16
    # And this is no empty tree: without onnxruntime or numpy it would be a third lighter.
    assert weight.disk_bytes > 100_000_000
    assert weight.bytecode_bytes > 5_000_000


def a_tree(path: Path) -> Tree:
    """Two modules, one of which only a later Python can read, and a link."""
    package = path / "lib" / "package"
    package.mkdir(parents=True)
    (package / "__init__.py").write_bytes(b"")
    (package / "later.py").write_bytes(b"this is no Python that anybody knows\n" * 200)
    (package / "data.bin").write_bytes(bytes(4097))
    (path / "link").symlink_to(package / "data.bin")
    return Tree(path, target("bookworm", "arm64"), ())


def test_it_is_measured_as_it_lies_on_a_card(tmp_path):
    tree = a_tree(tmp_path / "tree")
    before = sorted(tree.path.rglob("*"))
    weight = weights.weigh(tree)
    assert sorted(tree.path.rglob("*")) == before
    later = 37 * 200
    assert later < weight.bytecode_bytes < later + 1000  # in place of what could not be compiled
    # An empty file takes nothing, its bytecode a block; later.py two and two; the data two. Then the
    # directories: the tree, lib, package, and its __pycache__.
    assert weight.disk_bytes == (0 + 1 + 2 + 2 + 2 + 4) * 4096


def test_the_benchmark_tells_every_distribution(tree_of, tmp_path):
    written = tmp_path / "size.json"
    done = subprocess.run(
        [
            *(sys.executable, BENCHMARK, "--release", "bookworm", "--arch", "arm64"),
            *("--json", written),
        ],
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    rows = {row["name"]: row for row in json.loads(written.read_bytes())["rows"]}
    for each in tree_of(target("bookworm", "arm64")).distributions:
        assert each.name in done.stdout
        name = f"bookworm aarch64: {each.name} {each.version}"
        assert rows[f"{name}, wheel"]["value"] > 0
        if each.name != "covey":  # somebody may be at work on it
            assert rows[f"{name}, kept"]["value"] == each.kept_bytes / 1e6
    assert rows["bookworm aarch64: distributions"]["value"] == 14
    disk = rows["bookworm aarch64: on the disk"]
    assert (disk["bound"], disk["unit"], disk["holds"]) == ("<= 150", "MB", True)


def test_a_bound_that_is_broken_is_told(tree_of, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARK.parent))
    import device_size

    tree = tree_of(target("trixie", "arm64"))
    tree = replace(tree, distributions=(*tree.distributions, *tree.distributions[:3]))
    rows = device_size.rows_of(weights.Weight(tree, 0, 150_000_001))
    broken = {row.name for row in rows if not row.holds}
    assert broken == {"trixie aarch64: distributions", "trixie aarch64: on the disk"}
    assert all(row.holds for row in device_size.rows_of(weights.Weight(tree, 0, 150_000_000))[1:])
