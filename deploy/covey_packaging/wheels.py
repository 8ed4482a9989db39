"""Which wheels a device gets: locked by version and hash for every target, and fetched by pip.

The locks (``locks/*.txt``, in the format of pip's requirements) make a package the same whenever it is
built, and let nothing in that nobody saw. ``resolve`` makes one anew; pip then chooses as it would on a
machine of that target.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from email.parser import Parser
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name, parse_wheel_filename

from covey_packaging.target import CACHE, ROOT, PackagingError, Target

LOCKS = Path(__file__).parent / "locks"

# Of a checkout that git knows nothing about; what hatchling takes, too.
SOME_DATE_S = 1_580_601_600


@dataclass(frozen=True, slots=True)
class Pin:
    """One distribution as it was chosen. sha256: of its wheel, in hex."""

    name: str
    version: str
    sha256: str


def lock_of(target: Target) -> Path:
    """Where a target's lock lies."""
    return LOCKS / f"{target.name}.txt"


def locked(target: Target) -> list[Pin]:
    """What a target's lock says; nothing if there is none yet."""
    if not lock_of(target).exists():
        return []
    text = lock_of(target).read_text().replace("\\\n", " ")
    pins = []
    for line in text.splitlines():
        if line and not line.startswith("#"):
            requirement, digest = line.split()
            name, version = requirement.split("==")
            pins.append(Pin(name, version, digest.removeprefix("--hash=sha256:")))
    return pins


def requirements() -> list[Requirement]:
    """What covey needs on a device, from pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return [Requirement(line) for line in project["dependencies"]]


def source_date_s() -> int:
    """The date that everything made here bears: SOURCE_DATE_EPOCH, or the last commit's."""
    if stated := os.environ.get("SOURCE_DATE_EPOCH"):
        return int(stated)
    git = ["git", "-C", str(ROOT), "log", "-1", "--format=%ct"]
    try:
        return int(subprocess.run(git, check=True, capture_output=True, text=True).stdout)
    except (OSError, subprocess.CalledProcessError, ValueError):
        return SOME_DATE_S


def _pip(what: str, *arguments: str) -> str:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        said = [line for line in result.stderr.splitlines() if line.startswith("ERROR:")]
        raise PackagingError(f"{what}: pip says: {said[-1] if said else result.stderr.strip()}")
    return result.stdout


def _for(target: Target) -> list[str]:
    """What makes pip choose for another machine than this one."""
    platforms = [f"--platform={platform}" for platform in target.platforms]
    python = ["--implementation=cp", f"--python-version={target.release.python}"]
    return ["--only-binary=:all:", *python, *platforms]


def resolve(target: Target) -> list[Pin]:
    """Choose anew: what pip would install there today.

    pip judges the conditions of requirements by the Python it runs on itself, not by the one it chooses
    for; `check_complete` finds out if that ever made a difference.
    """
    with tempfile.TemporaryDirectory(prefix="covey-wheels-") as folder:
        _pip(
            f"no set of wheels for {target.name}",
            *("download", "--quiet", f"--dest={folder}", *_for(target)),
            *(str(requirement) for requirement in requirements()),
        )
        wheels = sorted(Path(folder).iterdir())
        return [Pin(*wheel_name(wheel), digest_of(wheel)) for wheel in wheels]


def digest_of(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_lock(target: Target, pins: Sequence[Pin]) -> None:
    """Lock these."""
    release = target.release
    lines = [
        f"# What a device with Debian {release.number} ({release.name}, Python {release.python}) on "
        f"{target.arch} gets.",
        "# Chosen by pip: `make wheels` chooses anew.",
    ]
    lines += [f"{pin.name}=={pin.version} \\\n    --hash=sha256:{pin.sha256}" for pin in pins]
    LOCKS.mkdir(exist_ok=True)
    lock_of(target).write_text("\n".join(lines) + "\n")


def fetch(target: Target, cache: Path = CACHE) -> list[Path]:
    """The locked wheels, from the cache or from the index that pip is set to use.

    Raises PackagingError if one cannot be had, or is another than was locked.
    """
    lock = lock_of(target)
    name = f"{target.name}-{digest_of(lock)[:16]}"
    folder = cache / "wheels" / name
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".fetch-") as temporary:
            fetched = Path(temporary) / "wheels"
            _pip(
                f"the wheels of {target.name} cannot be fetched",
                *("download", "--quiet", "--no-deps", "--require-hashes"),
                *(f"--dest={fetched}", f"--requirement={lock}", *_for(target)),
            )
            settle(fetched, folder)
    wheels = sorted(folder.glob("*.whl"))
    if {digest_of(wheel) for wheel in wheels} != {pin.sha256 for pin in locked(target)}:
        raise PackagingError(f"{folder} does not hold what {lock} names: delete it and try again")
    return wheels


def settle(made: Path, place: Path) -> None:
    """Move a finished directory to its place. Whoever else made the same one first has won."""
    try:
        made.rename(place)
    except OSError:
        if not place.is_dir():
            raise


def build_covey(destination: Path) -> Path:
    """The wheel of this checkout, as it lies there, uncommitted changes and all."""
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel"]
    environment = {**os.environ, "SOURCE_DATE_EPOCH": str(source_date_s())}
    result = subprocess.run(
        [*command, "--directory", str(destination)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    wheels = sorted(destination.glob("covey-*.whl"))
    if result.returncode != 0 or len(wheels) != 1:
        raise PackagingError(f"hatchling cannot build covey's wheel: {result.stderr.strip()}")
    return wheels[0]


def wheel_name(wheel: Path) -> tuple[str, str]:
    """Name and version of a wheel, from its file name."""
    name, version, _, _ = parse_wheel_filename(wheel.name)
    return name, str(version)


def check_complete(wheels: Sequence[Path], target: Target) -> None:
    """See that wheels need nothing but each other there, and that covey needs them all.

    Raises PackagingError naming what is missing or too much.
    """
    needs: dict[str, list[Requirement]] = {}
    versions = {}
    for wheel in wheels:
        name, versions[name] = wheel_name(wheel)
        with zipfile.ZipFile(wheel) as archive:
            path = next(path for path in archive.namelist() if path.endswith(".dist-info/METADATA"))
            metadata = Parser().parsestr(archive.read(path).decode())
        lines = metadata.get_all("Requires-Dist") or []
        needs[name] = [
            requirement
            for requirement in map(Requirement, lines)
            if requirement.marker is None or requirement.marker.evaluate(target.markers)
        ]
    reached, ahead = set(), ["covey"]
    while ahead:
        name = ahead.pop()
        if name in reached:
            continue
        reached.add(name)
        for requirement in needs[name]:
            needed = canonicalize_name(requirement.name)
            version = versions.get(needed)
            if version is None or not requirement.specifier.contains(version, prereleases=True):
                raise PackagingError(
                    f"{name} needs {requirement} on {target.name}, and the lock has "
                    f"{version or 'none'}: run `make wheels`"
                )
            ahead.append(needed)
    if spare := sorted(set(versions) - reached):
        raise PackagingError(
            f"nothing needs {', '.join(spare)} on {target.name}: run `make wheels`"
        )
