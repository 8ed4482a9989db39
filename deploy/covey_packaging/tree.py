"""The tree of a device: a venv for /opt/covey, made on another machine.

Its Python is the release's own (/usr/bin/python3.x); what it holds is covey and the locked wheels, for
the target's architecture, less what no device uses (`covey_device.trim`, and covey's coordinator and
simulated fleet). Nothing in it knows where it was made.
"""

import hashlib
import shutil
import tempfile
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import installer
from installer.destinations import SchemeDictionaryDestination
from installer.sources import WheelFile

from covey_device import trim
from covey_packaging.target import CACHE, Target
from covey_packaging.target import target as target_of
from covey_packaging.wheels import build_covey, check_complete, fetch, lock_of, settle, wheel_name

PREFIX = Path("/opt/covey")

NOT_FOR_DEVICES = {"covey": ("covey_coordinator/*", "covey_fleet/*", "*/bin/covey")}
"""`covey` needs packages that a device does not have, and the fleet is for a desk."""


@dataclass(frozen=True, slots=True)
class Distribution:
    """One distribution of a tree. Sizes in bytes: of the wheel, of all its files, of those kept."""

    name: str
    version: str
    wheel_bytes: int
    unpacked_bytes: int
    kept_bytes: int


@dataclass(frozen=True, slots=True)
class Tree:
    """A tree that is done. path: what is to become /opt/covey."""

    path: Path
    target: Target
    distributions: tuple[Distribution, ...]

    @property
    def site_packages(self) -> Path:
        """Where the distributions lie."""
        return self.path / site_packages(self.target)


def site_packages(target: Target) -> Path:
    """Where distributions lie in the venv of a target, from its top."""
    return Path("lib") / f"python{target.release.python}" / "site-packages"


def build_tree(path: Path, *, release: str, arch: str, cache: Path = CACHE) -> Tree:
    """Make the tree of a device at `path`, which must not exist.

    release: "bookworm" or "trixie". arch: "arm64" or "amd64". Wheels come from the cache or from the
    index that pip is set to use; unpacked ones are kept in the cache, so that a second tree takes a
    second. Raises PackagingError if wheels cannot be had or do not fit together.
    """
    target = target_of(release, arch)
    wheels = fetch(target, cache)
    with tempfile.TemporaryDirectory(prefix="covey-wheel-") as temporary:
        ours = build_covey(Path(temporary))
        check_complete([*wheels, ours], target)
        shutil.copytree(_base(target, wheels, cache), path, symlinks=True)
        _install([ours], path, target)
        trim.trim(path / site_packages(target), NOT_FOR_DEVICES)
        _set_modes(path)
        distributions = [_weigh(wheel, path, target) for wheel in (ours, *wheels)]
    return Tree(path, target, tuple(distributions))


def _base(target: Target, wheels: list[Path], cache: Path) -> Path:
    """The venv with everything but covey, made once for each lock and each version of this code."""
    digest = hashlib.sha256()
    for path in (lock_of(target), Path(__file__), Path(trim.__file__)):
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    base = cache / "trees" / f"{target.name}-{digest.hexdigest()[:16]}"
    if not base.is_dir():
        base.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=base.parent, prefix=".tree-") as temporary:
            venv = Path(temporary) / "venv"
            _make_venv(venv, target)
            _install(wheels, venv, target)
            trim.trim(venv / site_packages(target))
            settle(venv, base)
    return base


def _make_venv(path: Path, target: Target) -> None:
    """What `python3 -m venv --without-pip` makes on the target."""
    python = f"python{target.release.python}"
    (path / "bin").mkdir(parents=True)
    (path / site_packages(target)).mkdir(parents=True)
    (path / "bin" / python).symlink_to(f"/usr/bin/{python}")
    for alias in ("python3", "python"):
        (path / "bin" / alias).symlink_to(python)
    (path / "pyvenv.cfg").write_text(
        "home = /usr/bin\n"
        "include-system-site-packages = false\n"
        f"version = {target.release.python_full}\n"
        f"executable = /usr/bin/{python}\n"
    )


def _install(wheels: Iterable[Path], path: Path, target: Target) -> None:
    """Unpack wheels as they would lie in PREFIX, with scripts that start its Python."""
    place = str(path / site_packages(target))
    destination = SchemeDictionaryDestination(
        {
            "purelib": place,
            "platlib": place,
            "headers": str(path / "include"),
            "scripts": str(path / "bin"),
            "data": str(path),
        },
        interpreter=str(PREFIX / "bin" / "python"),
        script_kind="posix",
    )
    for wheel in wheels:
        with WheelFile.open(wheel) as source:
            source.validate_record()
            installer.install(source, destination, {"INSTALLER": b"covey\n"})


def _set_modes(path: Path) -> None:
    """What Debian has: programs and directories 0755, all other files 0644, whatever the umask was."""
    path.chmod(0o755)
    for entry in path.rglob("*"):
        if not entry.is_symlink():
            program = entry.is_dir() or entry.parent == path / "bin"
            entry.chmod(0o755 if program else 0o644)


def _weigh(wheel: Path, path: Path, target: Target) -> Distribution:
    name, version = wheel_name(wheel)
    place = path / site_packages(target)
    with zipfile.ZipFile(wheel) as archive:
        unpacked = sum(member.file_size for member in archive.infolist())
        record = next(name for name in archive.namelist() if name.endswith(".dist-info/RECORD"))
    kept = sum((place / row[0]).stat().st_size for row in trim.rows_of(place / record))
    return Distribution(name, version, wheel.stat().st_size, unpacked, kept)
