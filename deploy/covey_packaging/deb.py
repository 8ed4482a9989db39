"""A Debian package of a device's tree, made by debhelper (``debian/``) on any machine.

One per release, since wheels are per Python: its version says which, and so do its dependencies.
"""

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from email.utils import formatdate
from importlib.resources import as_file, files
from pathlib import Path

from packaging.tags import Tag
from packaging.utils import parse_wheel_filename
from packaging.version import Version

from covey_packaging.target import CACHE, ROOT, PackagingError, Target
from covey_packaging.target import target as target_of
from covey_packaging.tree import Tree, build_tree
from covey_packaging.wheels import fetch, source_date_s
from covey_shared import __version__

PACKAGE = "covey-device"
DEBIAN = Path(__file__).parent / "debian"

LIBRARIES = {
    "ld-linux-aarch64.so.1": "libc6",
    "ld-linux-x86-64.so.2": "libc6",
    "libc.so.6": "libc6",
    "libdl.so.2": "libc6",
    "libgcc_s.so.1": "libgcc-s1",
    "libm.so.6": "libc6",
    "libpthread.so.0": "libc6",
    "librt.so.1": "libc6",
    "libstdc++.so.6": "libstdc++6",
    "libutil.so.1": "libc6",
    "libz.so.1": "zlib1g",
}
"""Debian's packages of the libraries that a wheel may expect of any Linux (PEP 600)."""


def debian_version(version: str, target: Target) -> str:
    """A version as Debian orders them: pre-releases first, a newer release of Debian later.

    "0.2.0rc1" for bookworm is "0.2.0~rc1+deb12".
    """
    parsed = Version(version)
    text = ".".join(str(number) for number in parsed.release)
    if parsed.pre is not None:
        text += "~" + "".join(str(part) for part in parsed.pre)
    if parsed.dev is not None:
        text += f"~dev{parsed.dev}" if parsed.pre is not None else f"~~dev{parsed.dev}"
    if parsed.post is not None:
        text += f"+post{parsed.post}"
    return f"{text}+deb{target.release.number}"


def build_deb(destination: Path, *, release: str, arch: str, cache: Path = CACHE) -> Path:
    """Make the package of a release and an architecture. Returns its path, in `destination`.

    Two packages of the same commit have the same bytes. Raises PackagingError if a tool is missing or
    fails, or wheels cannot be had.
    """
    for tool in ("dpkg-buildpackage", "dh", "readelf"):
        if shutil.which(tool) is None:
            raise PackagingError(f"no {tool} on this machine: sudo apt install debhelper dpkg-dev")
    target = target_of(release, arch)
    with tempfile.TemporaryDirectory(prefix="covey-deb-") as temporary:
        stage = Path(temporary) / "covey"
        shutil.copytree(DEBIAN, stage / "debian")
        tree = build_tree(stage / "tree", release=release, arch=arch, cache=cache)
        _write_units(stage / "debian")
        (stage / "debian" / "changelog").write_text(_changelog(target))
        (stage / "substvars").write_text(
            f"python:Depends={_python(target)}\n"
            f"wheels:Depends={', '.join(_libraries(tree, fetch(target, cache)))}\n"
        )
        _run_debhelper(stage, target)
        name = f"{PACKAGE}_{debian_version(__version__, target)}_{arch}.deb"
        destination.mkdir(parents=True, exist_ok=True)
        shutil.move(Path(temporary) / name, destination / name)
        return destination / name


def _write_units(debian: Path) -> None:
    """Where debhelper looks for them: the unit, its user and its directories."""
    with as_file(files("covey_device") / "systemd") as units:
        for kind in ("service", "sysusers", "tmpfiles"):
            shutil.copyfile(units / f"{PACKAGE}.{kind}", debian / f"{PACKAGE}.{kind}")


def _changelog(target: Target) -> str:
    maintainer = re.search("^Maintainer: (.*)$", (DEBIAN / "control").read_text(), re.MULTILINE)
    assert maintainer is not None  # noqa: S101  (the file is ours)
    return (
        f"covey ({debian_version(__version__, target)}) {target.release.name}; urgency=medium\n\n"
        f"  * covey {__version__}; what is new in it stands in its CHANGELOG.md.\n\n"
        f" -- {maintainer.group(1)}  {formatdate(source_date_s())}\n"
    )


def _python(target: Target) -> str:
    """The release's Python and no other: wheels are for one minor version."""
    major, minor = map(int, target.release.python.split("."))
    return f"python3 (>= {major}.{minor}), python3 (<< {major}.{minor + 1})"


def _libraries(tree: Tree, wheels: Iterable[Path]) -> list[str]:
    """Debian's packages of the libraries that a tree's own libraries need and it does not have.

    How old a C library will do is what the wheels' names promise (manylinux_2_34: glibc 2.34).
    """
    libraries = [path for path in tree.path.rglob("*") if ".so" in path.name]
    shown = subprocess.run(
        ["readelf", "--dynamic", *libraries],
        env={**os.environ, "LC_ALL": "C"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    needed = set(re.findall(r"\(NEEDED\).*\[(.*)\]", shown)) - {path.name for path in libraries}
    if unknown := sorted(needed - set(LIBRARIES)):
        raise PackagingError(
            f"{', '.join(unknown)}: no package is known to have it (deb.LIBRARIES)"
        )
    glibc = max(_oldest_glibc(parse_wheel_filename(wheel.name)[3]) for wheel in wheels)
    packages = {LIBRARIES[name] for name in needed} - {"libc6"}
    return [f"libc6 (>= 2.{glibc})", *sorted(packages)]


def _oldest_glibc(tags: Iterable[Tag]) -> int:
    """The y of the oldest glibc 2.y that a wheel runs with; 0 if it needs none."""
    found = [re.match(r"manylinux_2_(\d+)_", tag.platform) for tag in tags]
    named = [int(match.group(1)) for match in found if match is not None]
    named += [17 for tag in tags if tag.platform.startswith("manylinux2014_")]
    return min(named, default=0)


def _run_debhelper(stage: Path, target: Target) -> None:
    command = ["dpkg-buildpackage", "--build=binary", f"--host-arch={target.arch}"]
    # It would ask for a compiler, too.
    command += ["--no-check-builddeps", "--unsigned-source", "--unsigned-changes"]
    result = subprocess.run(
        command,
        cwd=stage,
        env={**os.environ, "SOURCE_DATE_EPOCH": str(source_date_s()), "LC_ALL": "C.UTF-8"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if result.returncode != 0:
        log = ROOT / "build" / "packaging" / "debhelper.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text(result.stdout)
        raise PackagingError(f"dpkg-buildpackage ended with {result.returncode}: see {log}")
