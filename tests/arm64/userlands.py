"""Makes aarch64 userlands: a Debian's essential packages and its Python, and the device's package.

A release's archive is made once by mmdebstrap and kept in build/arm64; each test unpacks a copy of its own.
Packages are unpacked and noted as installed, not configured: qemu would work four minutes on that, most of
them to compile Python's library. What covey's package asks of them is configured by hand, and dpkg, which
runs in the userland, sees to it that they are those that covey's package depends on.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from prerequisites import missing

ROOT = Path(__file__).parents[2]
BUILT = ROOT / "build" / "arm64"
ENTER = Path(__file__).parent / "enter.py"
GUEST = Path(__file__).parent / "guest"
BUILD_S = 300.0

RELEASES = {"bookworm": "3.11", "trixie": "3.13"}
"""Raspberry Pi OS has Debian's releases, with their names and Pythons."""

PACKAGES = ("?essential", "adduser", "ca-certificates", "libstdc++6", "python3", "systemd")

# In the userland that is being made, $1: dpkg's list of what is there, and Debian's own users.
SETTLE = r"""
set -e
for deb in "$1"/var/cache/apt/archives/*.deb; do
  dpkg-deb --field "$deb"
  printf 'Status: install ok installed\n\n'
done > "$1/var/lib/dpkg/status"
cp "$1/usr/share/base-passwd/passwd.master" "$1/etc/passwd"
cp "$1/usr/share/base-passwd/group.master" "$1/etc/group"
rm -rf "$1"/usr/share/doc "$1"/usr/share/locale "$1"/usr/share/man
"""


def qemu() -> str:
    """Where qemu is; skips the test without what userlands take."""
    if os.getuid() != 0:
        missing("the users of a userland are root's to give: sudo make arm64")
    found = shutil.which("qemu-aarch64-static")
    if found is None:
        missing("qemu-aarch64-static is not installed: apt install qemu-user-static")
    if shutil.which("mmdebstrap") is None:
        missing("mmdebstrap is not installed: apt install mmdebstrap debian-archive-keyring")
    return found


def archive(release: str) -> Path:
    """The userland of a release as a tar file, made if it is not there."""
    digest = hashlib.sha256(repr((PACKAGES, SETTLE)).encode()).hexdigest()
    path = BUILT / f"{release}-{digest[:12]}.tar"
    if path.exists():
        return path
    BUILT.mkdir(parents=True, exist_ok=True)
    fresh = BUILT / f".{path.stem}.{os.getpid()}.tar"
    hooks = Path("/usr/share/mmdebstrap/hooks/maybe-merged-usr")
    command = [
        *("mmdebstrap", "--quiet", "--variant=extract", "--arch=arm64", f"--hook-dir={hooks}"),
        *(f"--include={package}" for package in PACKAGES),
        f"--extract-hook={SETTLE}",
        *(release, str(fresh)),
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=BUILD_S)
        if done.returncode != 0:
            missing(f"mmdebstrap cannot make a {release} for arm64: {done.stderr[-1000:]}")
        fresh.replace(path)
    finally:
        fresh.unlink(missing_ok=True)
    return path


@dataclass(frozen=True)
class Userland:
    """One that is there. root: its files. qemu: what runs its programs."""

    release: str
    root: Path
    qemu: str

    @property
    def python(self) -> str:
        """Its version of Python, as 3.11."""
        return RELEASES[self.release]

    def command(self, *arguments: object, user: str = "root", **binds: Path) -> list[str]:
        """What to execute here to have a command executed there. binds: directories of ours by what they
        are called there, in /run/covey-tests."""
        options = [f"--bind={path}:/run/covey-tests/{name}" for name, path in binds.items()]
        if user != "root":
            options.append(f"--user={user}")
        enter = [sys.executable, str(ENTER), f"--qemu={self.qemu}", *options, str(self.root)]
        return [*enter, *map(str, arguments)]

    def run(
        self, *arguments: object, seconds: float, stdin: str = "", **binds: Path
    ) -> subprocess.CompletedProcess[str]:
        """A command that ends by itself, at the latest after so many seconds."""
        return subprocess.run(
            self.command(*arguments, **binds),
            input=stdin,
            capture_output=True,
            text=True,
            timeout=seconds,
        )


def unpack(release: str, root: Path) -> Userland:
    """A fresh userland of a release in `root`, which does not exist."""
    found, made = qemu(), archive(release)
    root.mkdir(parents=True)
    subprocess.run(["tar", "-xf", made, "-C", root, "--exclude=./dev/*"], check=True)
    userland = Userland(release, root, found)
    done = userland.run("/usr/bin/uname", "-m", seconds=60)
    if done.returncode != 0 or done.stdout != "aarch64\n":
        missing(
            f"this kernel runs no aarch64 programs: {(done.stderr or done.stdout).strip()}. It takes Linux "
            "6.7 with user namespaces, or qemu-aarch64 registered with binfmt_misc"
        )
    return userland


def make_package(release: str, folder: Path) -> Path:
    """The device's package of this checkout, as `make deb` makes it."""
    done = subprocess.run(
        [sys.executable, "-c", MAKE, folder, release],
        env=os.environ | {"PYTHONPATH": str(ROOT / "deploy"), "DPKG_DEB_COMPRESSOR_LEVEL": "1"},
        capture_output=True,
        text=True,
        timeout=BUILD_S,
    )
    if done.returncode != 0:
        missing(f"no package can be made: {done.stderr[-1000:]}")
    return Path(done.stdout.strip())


def fetch_pytest(userland: Userland) -> Path:
    """A directory with pytest and hypothesis for the userland's Python."""
    path = BUILT / f"tools-{userland.python}"
    if path.is_dir():
        return path
    BUILT.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=BUILT, prefix=".tools-") as folder:
        fresh = Path(folder) / "tools"
        platforms = [f"--platform=manylinux_2_{minor}_aarch64" for minor in (34, 28, 17)]
        command = [
            *(sys.executable, "-m", "pip", "install", "--quiet", "--no-cache-dir"),
            *(f"--target={fresh}", "--only-binary=:all:", "--implementation=cp"),
            *(f"--python-version={userland.python}", *platforms, "pytest", "hypothesis"),
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=BUILD_S)
        if done.returncode != 0:
            missing(f"pip fetches no pytest for aarch64: {done.stderr[-1000:]}")
        if not path.is_dir():
            fresh.rename(path)
    return path


MAKE = """
import sys
from pathlib import Path
from covey_packaging.deb import build_deb
print(build_deb(Path(sys.argv[1]), release=sys.argv[2], arch="arm64"))
"""


def install(userland: Userland, package: Path) -> None:
    """As on a Pi: dpkg, which asks for what the package depends on and runs its scripts."""
    shutil.copy(package, userland.root / "tmp")
    done = userland.run("/usr/bin/dpkg", "--install", f"/tmp/{package.name}", seconds=300)
    assert done.returncode == 0, done.stdout + done.stderr
