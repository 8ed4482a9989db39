"""What no device uses goes, and a RECORD tells the truth about what is left."""

import sys
from fnmatch import fnmatchcase
from zipfile import ZipFile

import pytest

from covey_device import trim
from covey_packaging.target import ROOT, TARGETS
from covey_packaging.wheels import wheel_name


def install(place, name, *paths):
    """A distribution of small files."""
    rows = []
    for path in (*paths, f"{name}-1.0.dist-info/licenses/{name}/tests/LICENSE"):
        (place / path).parent.mkdir(parents=True, exist_ok=True)
        (place / path).write_text("twelve bytes")
        rows.append(f"{path},sha256=x,12")
    record = place / f"{name}-1.0.dist-info" / "RECORD"
    record.write_text("\n".join([*rows, f"{name}-1.0.dist-info/RECORD,,"]) + "\n")
    return record


@pytest.fixture
def place(tmp_path):
    """site-packages in a venv."""
    path = tmp_path / "lib" / "python3.11" / "site-packages"
    path.mkdir(parents=True)
    return path


def test_what_it_names_goes_and_the_record_says_so(place):
    (place / "../../../bin").resolve().mkdir()
    record = install(
        place,
        "numpy",
        "numpy/__init__.py",
        "numpy/__init__.pyi",
        "numpy/lib/tests/data/a, quoted.npy",
        "numpy/lib/npyio.py",
        "numpy/f2py/__pycache__/cfuncs.cpython-311.pyc",
        "../../../bin/f2py",
    )
    text = record.read_text().replace(
        "numpy/lib/tests/data/a, quoted.npy", '"numpy/lib/tests/data/a, quoted.npy"'
    )
    record.write_text(text)
    assert trim.trim(place) == 4 * 12
    left = {str(path.relative_to(place)) for path in place.rglob("*") if path.is_file()}
    assert left == {
        "numpy/__init__.py",
        "numpy/lib/npyio.py",
        "numpy-1.0.dist-info/RECORD",
        "numpy-1.0.dist-info/licenses/numpy/tests/LICENSE",
    }
    assert {row[0] for row in trim.rows_of(record)} == left
    assert not (place / "numpy" / "f2py").exists()
    assert not (place / "numpy" / "lib" / "tests").exists()
    assert list((place / "../../../bin").resolve().iterdir()) == []


def test_nobody_elses_files_go(place):
    install(place, "scipy", "numpy/tests/not_its_own.py", "scipy/tests/test_it.py", "scipy/a.pyi")
    install(place, "onnx_other", "onnxruntime/tools/other.py")
    before = sorted(place.rglob("*"))
    assert trim.trim(place) == 0
    assert sorted(place.rglob("*")) == before


def test_a_second_time_changes_nothing(place):
    record = install(place, "msgspec", "msgspec/__init__.py", "msgspec/__init__.pyi")
    assert trim.trim(place) == 12
    text = record.read_text()
    record.chmod(0o444)
    assert trim.trim(place) == 0
    assert record.read_text() == text


def test_a_file_that_is_gone_already_is_no_error(place):
    record = install(place, "msgspec", "msgspec/__init__.py", "msgspec/__init__.pyi")
    (place / "msgspec" / "__init__.pyi").unlink()
    assert trim.trim(place) == 0
    assert "pyi" not in record.read_text()


def test_every_pattern_still_names_something(locked_wheels):
    """A library that moves its tests would otherwise come back onto the cards unseen."""
    names: dict[str, set[str]] = {}
    for target in TARGETS:
        for wheel in locked_wheels(target):
            with ZipFile(wheel) as archive:
                found = names.setdefault(wheel_name(wheel)[0], set())
                found.update(archive.namelist())
                if "entry_points.txt" in "".join(archive.namelist()):
                    path = next(p for p in archive.namelist() if p.endswith("entry_points.txt"))
                    scripts = archive.read(path).decode().splitlines()
                    found.update(f"../../../bin/{line.split('=')[0].strip()}" for line in scripts)
    dead: list[tuple[str, tuple[str, ...]]] = []
    for distribution, patterns in trim.UNUSED.items():
        wanted = {(pattern,) for pattern in patterns if pattern not in trim.STUBS}
        if trim.STUBS[0] in patterns:
            wanted.add(trim.STUBS)  # one kind of them is enough
        dead += [
            (distribution, group)
            for group in wanted
            if not any(fnmatchcase(name, one) for name in names[distribution] for one in group)
        ]
    assert dead == []


def test_what_is_no_venv_is_left_alone(monkeypatch):
    monkeypatch.setattr(sys, "prefix", sys.base_prefix)
    monkeypatch.setattr(trim, "trim", lambda place: pytest.fail("it must not"))
    with pytest.raises(SystemExit, match="this is no venv"):
        trim.main()


def test_a_venv_is_told_what_went(monkeypatch, capsys, place):
    install(place, "msgspec", "msgspec/__init__.pyi")
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(place))
    monkeypatch.setattr(sys, "prefix", "/opt/covey")
    trim.main()
    assert capsys.readouterr().out == f"0 MB that no device uses removed from {place}\n"
    assert not list(place.rglob("*.pyi"))


def test_the_script_trims_before_it_compiles():
    steps = (ROOT / "deploy" / "install.sh").read_text()
    install, compile_ = steps.index('"$@" --only-binary'), steps.index("-m compileall")
    assert install < steps.index("-m covey_device.trim") < compile_
    assert "--no-compile" in steps[:install]  # what goes is not compiled first
