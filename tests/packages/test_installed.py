"""The Debian package where it belongs: installed, upgraded, removed and purged by dpkg, on both releases.

In a root of the release that mmdebstrap makes; systemd does not run there, and what maintainer scripts
tell it is written down.
"""

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from covey_packaging.deb import build_deb
from covey_packaging.target import RELEASES
from covey_shared import __version__
from prerequisites import missing

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SYSTEMCTL = """#!/bin/sh
echo "$*" >>/run/told-systemd
case " $* " in
*" start "* | *" stop "* | *" restart "* | *" daemon-reload "* | *" is-active "*) ;;
*" is-enabled "*) echo enabled ;;
*) exec /usr/bin/systemctl.real "$@" ;;
esac
"""

# With /proc, which systemd-tmpfiles asks for, and /sys, by which onnxruntime finds the processors.
INSIDE = """
mount -t proc proc "$1/proc"
mount --rbind /sys "$1/sys"
root="$1"
shift
exec chroot "$root" "$@"
"""


@dataclass(frozen=True)
class Root:
    """A root of a release, and a package for it."""

    path: Path
    package: Path

    def run(self, *command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a command in it."""
        done = subprocess.run(
            ["unshare", "--mount", "sh", "-ec", INSIDE, "sh", str(self.path), *command],
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "DEBIAN_FRONTEND": "noninteractive"},
        )
        assert done.returncode == 0 or not check, done.stdout + done.stderr
        return done

    def dpkg(self, action: str) -> subprocess.CompletedProcess[str]:
        """Have dpkg install, remove or purge it."""
        return self.run("dpkg", action, "/var/tmp/it.deb" if action == "-i" else "covey-device")

    def told_systemd(self) -> list[str]:
        """What systemd was told about the service since the last time."""
        log = self.path / "run" / "told-systemd"
        lines = log.read_text().splitlines() if log.exists() else []
        log.unlink(missing_ok=True)
        verbs = {"start", "stop", "restart"}
        return [word for line in lines for word in line.split() if word in verbs]

    def everything(self) -> dict[str, tuple[object, ...]]:
        """All files but dpkg's own records: mode, owner, and what is in those of /etc."""
        found = {}
        for path in sorted(self.path.rglob("*")):
            name = str(path.relative_to(self.path))
            if name.startswith(("proc/", "sys/", "var/lib/dpkg/", "var/log/", "dev/")):
                continue
            if name.startswith("etc/") and name.endswith("-"):
                continue  # passwd- and the like: what user management keeps of the last change
            kept = name.startswith("etc/") and path.is_file()
            state = path.lstat()
            found[name] = (state.st_mode, state.st_uid, state.st_gid, kept and path.read_bytes())
        return found


@pytest.fixture(scope="module", params=RELEASES)
def root(request, tmp_path_factory, locked_wheels):
    """A fresh root for each release."""
    if os.geteuid() != 0:
        missing("a root to install in needs root")
    for tool in ("mmdebstrap", "dh", "lintian"):
        if shutil.which(tool) is None:
            missing(f"no {tool}: sudo apt install mmdebstrap debhelper lintian")
    folder = tmp_path_factory.mktemp(request.param)
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("DPKG_DEB_COMPRESSOR_LEVEL", "0")
        package = build_deb(folder, release=request.param, arch="amd64")
    path = folder / "root"
    command = ["mmdebstrap", "--quiet", "--variant=minbase", "--include=python3,systemd"]
    # Debian's keys of a later release need not be here; its packages are only installed in this root.
    made = subprocess.run(
        [*command, "--architectures=amd64", request.param, path], capture_output=True, text=True
    )
    if made.returncode != 0:
        missing(f"no {request.param} can be made: {made.stderr.strip()[-300:]}")
    (path / "usr/bin/systemctl").rename(path / "usr/bin/systemctl.real")
    (path / "usr/bin/systemctl").write_text(SYSTEMCTL)
    (path / "usr/bin/systemctl").chmod(0o755)
    (path / "run/systemd/system").mkdir(parents=True)
    shutil.copy(package, path / "var/tmp/it.deb")
    return Root(path, package)


def test_a_life_of_the_package(root):
    before = root.everything()

    root.dpkg("-i")
    assert root.told_systemd() == ["start"]  # of which the unit's condition makes nothing yet
    version = root.run("covey-device", "--version").stdout
    assert version == f"covey-device, version {__version__}\n"
    user = root.run("id", "covey-device").stdout
    assert "(covey-device)" in user
    state, data = root.path / "var/lib/covey-device", root.path / "var/lib/covey-device/data"
    assert oct(state.stat().st_mode & 0o7777) == "0o750"
    assert oct(data.stat().st_mode & 0o7777) == "0o2770"
    assert state.stat().st_uid == int(user.split("=")[1].split("(")[0])
    wants = root.path / "etc/systemd/system/multi-user.target.wants/covey-device.service"
    assert wants.is_symlink()
    sources = list((root.path / "opt/covey").rglob("*.py"))
    tag = f"cpython-{root.run('python3', '-c', 'import sys; print(*sys.version_info[:2])').stdout}"
    tag = tag.replace(" ", "").strip()
    uncompiled = [path.name for path in sources
                  if not (path.parent / "__pycache__" / f"{path.stem}.{tag}.pyc").exists()]  # fmt: skip
    assert len(sources) > 500
    assert uncompiled == []

    # What joining and a life of service leave.
    (root.path / "etc/covey/device.toml").write_text("# joined")
    (root.path / "etc/covey/policy.toml").write_text("# the owner's")
    (state / "state").mkdir()
    (state / "state" / "device.key").write_text("secret")
    dropin = root.path / "etc/systemd/system/covey-device.service.d"
    dropin.mkdir()
    (dropin / "10-restart-steps.conf").write_text("[Service]")
    root.run("runuser", "-u", "covey-device", "--", "touch", "/var/lib/covey-device/data/mine.npz")

    root.dpkg("-i")  # as an upgrade does
    assert root.told_systemd() == ["restart"]
    assert (state / "state" / "device.key").read_text() == "secret"

    root.dpkg("-r")
    assert root.told_systemd() == ["stop"]
    assert not (root.path / "opt/covey").exists()
    assert (root.path / "etc/covey/device.toml").read_text() == "# joined"
    assert (state / "data" / "mine.npz").exists()

    root.dpkg("-i")
    root.dpkg("-P")
    root.told_systemd()
    after = root.everything()
    gone = {name for name in before if after.get(name) != before[name]}
    assert set(after) - set(before) == set()
    assert gone <= {"opt"}  # which dpkg takes along when nothing is in it


def test_it_is_not_put_over_an_installation_by_script(root):
    (root.path / "opt/covey/bin").mkdir(parents=True)
    try:
        done = root.run("dpkg", "-i", "/var/tmp/it.deb", check=False)
    finally:
        shutil.rmtree(root.path / "opt/covey")
        root.run("dpkg", "-P", "covey-device", check=False)
    assert done.returncode != 0
    assert "sudo covey-device uninstall" in done.stderr


def test_a_round_s_libraries_load_there(root):
    """With the system's C and C++ libraries, and as the service's user."""
    root.dpkg("-i")
    loaded = (
        "import numpy, onnxruntime, msgspec, psutil, Crypto.Cipher.AES, cryptography.x509, paho"
    )
    try:
        command = ["/opt/covey/bin/python", "-c", f"{loaded}; print(onnxruntime.__version__)"]
        assert root.run("runuser", "-u", "covey-device", "--", *command).stdout
    finally:
        root.dpkg("-P")


def test_lintian_has_no_errors(root):
    done = subprocess.run(
        ["lintian", "--allow-root", "--fail-on", "error,warning", root.package],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:]
