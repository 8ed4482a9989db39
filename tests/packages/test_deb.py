"""The Debian package: what its fields say, what is in it and how, and that it comes out the same again."""

import io
import os
import shutil
import subprocess
import sys
import tarfile
from email.parser import Parser
from functools import partial
from importlib.resources import files
from itertools import pairwise
from pathlib import Path

import pytest

from covey_packaging import deb, tree, wheels
from covey_packaging.target import ROOT, PackagingError, target
from covey_shared import __version__
from prerequisites import missing

SOME_TIME = "1790000000"
BOOKWORM, TRIXIE = target("bookworm", "amd64"), target("trixie", "arm64")


def copier(wheel: Path):
    """In place of building covey's wheel: nobody else's change to the checkout gets in between."""
    return lambda folder: Path(shutil.copy(wheel, folder))


def build(wanted, folder: Path) -> Path:
    """Make a target's package."""
    return deb.build_deb(folder, release=wanted.release.name, arch=wanted.arch)


@pytest.fixture(scope="module")
def packages(once, locked_wheels, covey_wheel):
    """A package for this kind of machine, and one for another."""
    for tool in ("dh", "dpkg-buildpackage", "readelf"):
        if shutil.which(tool) is None:
            missing(f"no {tool}: sudo apt install debhelper dpkg-dev")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("DPKG_DEB_COMPRESSOR_LEVEL", "0")  # a tenth of the time
        patched.setenv("SOURCE_DATE_EPOCH", SOME_TIME)
        patched.setattr(tree, "build_covey", copier(covey_wheel))
        made = {}
        for wanted in (BOOKWORM, TRIXIE):
            locked_wheels(wanted)
            made[wanted] = once(f"deb-{wanted.name}", partial(build, wanted))
        yield made


def control(package: Path, name: str = "control") -> str:
    """A control file of a package."""
    command = ["dpkg-deb", "--info", str(package), name]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def content(package: Path) -> tarfile.TarFile:
    """The files of a package."""
    command = ["dpkg-deb", "--fsys-tarfile", str(package)]
    done = subprocess.run(command, check=True, capture_output=True)
    return tarfile.open(fileobj=io.BytesIO(done.stdout))


def file_of(archive: tarfile.TarFile, path: str) -> bytes:
    """A file's bytes."""
    file = archive.extractfile(path)
    assert file is not None
    return file.read()


def test_its_fields_bind_it_to_one_python(packages):
    fields = Parser().parsestr(control(packages[BOOKWORM]))
    assert fields["Package"] == "covey-device"
    assert fields["Version"] == f"{__version__}+deb12"
    assert fields["Architecture"] == "amd64"
    depends = fields["Depends"].split(", ")
    assert {"python3 (>= 3.11)", "python3 (<< 3.12)", "libstdc++6", "zlib1g"} <= set(depends)
    assert "libc6 (>= 2.34)" in depends  # cryptography's wheel is manylinux_2_34
    assert any("systemd-sysusers" in depend for depend in depends)
    assert 90_000 < int(fields["Installed-Size"]) < 150_000  # KiB


def test_another_machines_package_needs_nothing_of_it(packages):
    fields = Parser().parsestr(control(packages[TRIXIE]))
    assert fields["Architecture"] == "arm64"
    assert fields["Version"] == f"{__version__}+deb13"
    assert {"python3 (>= 3.13)", "python3 (<< 3.14)"} <= set(fields["Depends"].split(", "))
    with content(packages[TRIXIE]) as archive:
        runtime = "./opt/covey/lib/python3.13/site-packages/onnxruntime/capi"
        assert any(
            name.startswith(f"{runtime}/onnxruntime_pybind11") for name in archive.getnames()
        )


def test_what_it_installs_and_how(packages):
    with content(packages[BOOKWORM]) as archive:
        members = {member.name: member for member in archive}
        outside = {name for name in members if not name.startswith("./opt/covey")}
        files_outside = {name for name in outside if not members[name].isdir()}
        assert files_outside == {
            "./usr/bin/covey-device",
            "./usr/lib/systemd/system/covey-device.service",
            "./usr/lib/sysusers.d/covey-device.conf",
            "./usr/lib/tmpfiles.d/covey-device.conf",
            "./usr/share/doc/covey-device/changelog.gz",
            "./usr/share/doc/covey-device/copyright",
            "./usr/share/lintian/overrides/covey-device",
        }
        assert members["./usr/bin/covey-device"].linkname == "/opt/covey/bin/covey-device"
        assert members["./opt/covey/bin/python3.11"].linkname == "/usr/bin/python3.11"
        assert {(member.uname, member.gname) for member in members.values()} == {("root", "root")}
        modes = {member.mode for member in members.values() if not member.issym()}
        assert modes == {0o755, 0o644}
        shipped = files("covey_device") / "systemd"
        for path, name in {
            "system/covey-device.service": "covey-device.service",
            "../sysusers.d/covey-device.conf": "covey-device.sysusers",
            "../tmpfiles.d/covey-device.conf": "covey-device.tmpfiles",
        }.items():
            inside = "./usr/lib/" + os.path.normpath(f"systemd/{path}")
            assert file_of(archive, inside) == (shipped / name).read_bytes()
        # Until the device has joined, starting it does nothing.
        unit = file_of(archive, "./usr/lib/systemd/system/covey-device.service").decode()
        assert "\nConditionPathExists=/etc/covey/device.toml\n" in unit
        assert "\nExecStart=/opt/covey/bin/covey-device run" in unit


def test_it_owns_no_configuration(packages):
    """device.toml and policy.toml are the owner's, written by `covey-device join`."""
    listed = control(packages[BOOKWORM], "md5sums")
    assert "opt/covey/bin/covey-device" in listed
    assert " etc/" not in listed
    with pytest.raises(subprocess.CalledProcessError):
        control(packages[BOOKWORM], "conffiles")


def test_its_scripts_are_sound_and_do_what_the_service_needs(packages):
    for name in ("preinst", "postinst", "prerm", "postrm"):
        script = control(packages[BOOKWORM], name)
        subprocess.run(["sh", "-n"], input=script, text=True, check=True)
        assert "#DEBHELPER#" not in script
    after = control(packages[BOOKWORM], "postinst")
    user, started = after.index("systemd-sysusers"), after.index("deb-systemd-invoke")
    assert after.index("py3compile") < started
    assert user < after.index("systemd-tmpfiles") < started
    assert "_dh_action=restart" in after  # on upgrades
    before = control(packages[BOOKWORM], "prerm")
    assert before.index("deb-systemd-invoke stop") < before.index("py3clean")


def test_nothing_in_it_knows_where_it_was_made(packages):
    hosts = index_hosts()
    for package in packages.values():
        texts = [control(package, name).encode() for name in ("control", "postinst", "postrm")]
        with content(package) as archive:
            for member in archive:
                if member.isfile():
                    data = file_of(archive, member.name)
                    assert str(ROOT).encode() not in data, member.name
                    _, inside, name = member.name.partition("site-packages/")
                    ours = not inside or name.startswith("covey")
                    if ours or member.name.endswith(("INSTALLER", "RECORD", "REQUESTED")):
                        texts.append(data)
        assert len(texts) > 100
        for text in texts:
            assert not [host for host in hosts if host.encode() in text]


def index_hosts() -> set[str]:
    """The hosts that this machine's pip fetches from, and those it would by itself."""
    from pip._internal.models.index import PyPI

    command = [sys.executable, "-m", "pip", "config", "list"]
    told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    told += "\n".join(value for name, value in os.environ.items() if name.startswith("PIP_"))
    found = {part.partition("/")[0] for part in told.replace("'", "/").split("://")[1:]}
    return {host.rpartition("@")[2] for host in found if "." in host} | {
        PyPI.netloc,
        PyPI.file_storage_domain,
    }


@pytest.mark.slow
def test_it_comes_out_the_same_again(packages, tmp_path, monkeypatch, covey_wheel):
    """At another time, in another place and time zone, with nothing unpacked yet, and a stricter umask."""
    monkeypatch.setattr(tree, "build_covey", copier(covey_wheel))
    monkeypatch.setenv("SOURCE_DATE_EPOCH", SOME_TIME)
    cache = tmp_path / "cache"
    (cache / "wheels").mkdir(parents=True)
    fetched = wheels.fetch(BOOKWORM)[0].parent
    (cache / "wheels" / fetched.name).symlink_to(fetched)
    monkeypatch.setenv("DPKG_DEB_COMPRESSOR_LEVEL", "0")
    monkeypatch.setenv("TZ", "Pacific/Apia")
    before = os.umask(0o077)
    try:
        again = deb.build_deb(tmp_path / "again", release="bookworm", arch="amd64", cache=cache)
    finally:
        os.umask(before)
    assert again.name == packages[BOOKWORM].name
    assert again.read_bytes() == packages[BOOKWORM].read_bytes()


def test_versions_come_in_debians_order():
    versions = ["0.2.0.dev1", "0.2.0a1", "0.2.0rc1", "0.2.0", "0.2.0.post1", "0.2.1", "0.10.0"]
    named = [deb.debian_version(version, BOOKWORM) for version in versions]
    assert named[2] == "0.2.0~rc1+deb12"
    for older, newer in pairwise(named):
        subprocess.run(["dpkg", "--compare-versions", older, "lt", newer], check=True)
    for version in versions:  # a newer Debian's package takes the place of the older one's
        pair = deb.debian_version(version, BOOKWORM), deb.debian_version(version, TRIXIE)
        subprocess.run(["dpkg", "--compare-versions", pair[0], "lt", pair[1]], check=True)


def test_a_library_that_no_package_is_known_for_is_told(tree_of, locked_wheels, monkeypatch):
    known = {name: package for name, package in deb.LIBRARIES.items() if package != "zlib1g"}
    monkeypatch.setattr(deb, "LIBRARIES", known)
    with pytest.raises(PackagingError, match=r"^libz\.so\.1: "):
        deb._libraries(tree_of(BOOKWORM), locked_wheels(BOOKWORM))


def test_a_tool_that_is_missing_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(PackagingError, match="sudo apt install debhelper"):
        deb.build_deb(tmp_path, release="bookworm", arch="amd64")


def test_a_failing_build_says_where_its_words_are(tmp_path, monkeypatch):
    (tmp_path / "stage" / "debian").mkdir(parents=True)
    monkeypatch.setattr(deb, "ROOT", tmp_path)
    with pytest.raises(PackagingError, match=r"dpkg-buildpackage ended with \d+: see "):
        deb._run_debhelper(tmp_path / "stage", BOOKWORM)
    assert "changelog" in (tmp_path / "build" / "packaging" / "debhelper.log").read_text()
