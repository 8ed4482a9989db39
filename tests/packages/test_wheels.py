"""The locks fit pyproject.toml and the machines they are for, and nothing else gets in."""

import hashlib
import os
import zipfile

import pytest
from packaging.utils import canonicalize_name

from covey_packaging import wheels
from covey_packaging.target import TARGETS, PackagingError, Target, target
from covey_shared import __version__

MOST_DISTRIBUTIONS = 16
EVERY_TARGET = pytest.mark.parametrize("wanted", TARGETS, ids=lambda wanted: wanted.name)


@EVERY_TARGET
def test_a_lock_satisfies_what_covey_needs(wanted):
    pins = {pin.name: pin.version for pin in wheels.locked(wanted)}
    for requirement in wheels.requirements():
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)])
    assert len(pins) + 1 <= MOST_DISTRIBUTIONS, sorted(pins)


@EVERY_TARGET
def test_a_lock_reads_as_it_was_written(wanted, monkeypatch, tmp_path):
    pins, text = wheels.locked(wanted), wheels.lock_of(wanted).read_bytes()
    assert all(len(bytes.fromhex(pin.sha256)) == 32 for pin in pins)
    monkeypatch.setattr(wheels, "LOCKS", tmp_path / "locks")
    wheels.write_lock(wanted, pins)
    assert wheels.lock_of(wanted).read_bytes() == text


def test_there_is_no_lock_for_anything_else():
    assert {path.stem for path in wheels.LOCKS.iterdir()} == {wanted.name for wanted in TARGETS}


def test_no_lock_names_where_wheels_come_from():
    for lock in wheels.LOCKS.iterdir():
        assert "://" not in lock.read_text()
        assert "index" not in lock.read_text()


@EVERY_TARGET
def test_the_wheels_need_nothing_but_each_other(wanted, locked_wheels, covey_wheel):
    wheels.check_complete([*locked_wheels(wanted), covey_wheel], wanted)


def test_covey_s_own_wheel_comes_out_the_same_again(tmp_path, monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1790000000")
    made = []
    for name, mask in (("a", 0o022), ("b", 0o077)):
        (tmp_path / name).mkdir()
        before = os.umask(mask)
        try:
            made.append(wheels.build_covey(tmp_path / name))
        finally:
            os.umask(before)
    assert made[0].name == made[1].name == f"covey-{__version__}-py3-none-any.whl"
    assert made[0].read_bytes() == made[1].read_bytes()


def a_wheel(folder, name, version="1.0", needs=()):
    """A wheel with nothing but its needs."""
    path = folder / f"{name}-{version}-py3-none-any.whl"
    lines = [f"Name: {name}", f"Version: {version}", *(f"Requires-Dist: {need}" for need in needs)]
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{name}-{version}.dist-info/METADATA", "\n".join(lines) + "\n\n")
    return path


BOOKWORM = target("bookworm", "arm64")


@pytest.mark.parametrize(
    ("needs", "said"),
    [
        (["other>=2"], "covey needs other>=2 on bookworm-arm64, and the lock has 1.0"),
        (["other", "third"], "covey needs third on bookworm-arm64, and the lock has none"),
        (["other; python_version < '3.11'"], "nothing needs other on bookworm-arm64"),
        (["other; platform_machine == 'x86_64'"], "nothing needs other on bookworm-arm64"),
        (["other; extra == 'demo'"], "nothing needs other on bookworm-arm64"),
    ],
)
def test_wheels_that_do_not_fit_are_told(tmp_path, needs, said):
    made = [a_wheel(tmp_path, "other"), a_wheel(tmp_path, "covey", needs=needs)]
    with pytest.raises(PackagingError) as caught:
        wheels.check_complete(made, BOOKWORM)
    assert said in str(caught.value)
    assert "make wheels" in str(caught.value)


def test_needs_are_judged_for_the_machine_they_are_for(tmp_path):
    needs = ["other; platform_machine == 'aarch64' and python_version == '3.11'"]
    made = [a_wheel(tmp_path, "other"), a_wheel(tmp_path, "covey", needs=needs)]
    wheels.check_complete(made, BOOKWORM)
    with pytest.raises(PackagingError, match="nothing needs other"):
        wheels.check_complete(made, target("trixie", "arm64"))


def test_a_wheel_in_the_cache_that_is_not_the_locked_one_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(wheels, "LOCKS", tmp_path / "locks")
    wheel = a_wheel(tmp_path, "other")
    wheels.write_lock(BOOKWORM, [wheels.Pin("other", "1.0", wheels.digest_of(wheel))])
    lock = hashlib.sha256(wheels.lock_of(BOOKWORM).read_bytes()).hexdigest()[:16]
    folder = tmp_path / "cache" / "wheels" / f"bookworm-arm64-{lock}"
    folder.mkdir(parents=True)
    kept = wheel.rename(folder / wheel.name)
    assert wheels.fetch(BOOKWORM, tmp_path / "cache") == [kept]
    kept.write_bytes(kept.read_bytes() + b"\0")
    with pytest.raises(PackagingError, match="does not hold what"):
        wheels.fetch(BOOKWORM, tmp_path / "cache")


def test_pip_refuses_a_wheel_with_another_hash(tmp_path, monkeypatch):
    served = tmp_path / "served"
    served.mkdir()
    a_wheel(served, "other")
    monkeypatch.setattr(wheels, "LOCKS", tmp_path / "locks")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(served))
    wheels.write_lock(BOOKWORM, [wheels.Pin("other", "1.0", "00" * 32)])
    with pytest.raises(PackagingError) as caught:
        wheels.fetch(BOOKWORM, tmp_path / "cache")
    assert "the wheels of bookworm-arm64 cannot be fetched" in str(caught.value)
    assert not list((tmp_path / "cache" / "wheels").iterdir())  # nothing half-fetched stays


@pytest.mark.parametrize(("release", "arch"), [("sid", "arm64"), ("trixie", "armhf")])
def test_what_nothing_is_made_for_is_told(release, arch):
    with pytest.raises(PackagingError, match="there are "):
        target(release, arch)


def test_platforms_are_those_that_pip_finds_there():
    platforms = BOOKWORM.platforms
    assert platforms[0] == "manylinux_2_36_aarch64"
    assert {"manylinux_2_28_aarch64", "manylinux2014_aarch64"} <= set(platforms)
    newer = set(target("trixie", "arm64").platforms) - set(platforms)
    assert newer == {f"manylinux_2_{minor}_aarch64" for minor in range(37, 42)}
    assert isinstance(BOOKWORM, Target)
