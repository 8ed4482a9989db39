"""What a device may be: a release of Debian on an architecture.

Raspberry Pi OS has Debian's names, versions and Pythons. Wheels are per Python and per architecture,
and so is everything that is made here.
"""

from dataclasses import dataclass
from pathlib import Path

from covey_shared.errors import CoveyError

ROOT = Path(__file__).resolve().parents[2]

CACHE = ROOT / "build" / "packaging"
"""Where fetched wheels and unpacked trees are kept between runs; safe to delete."""


class PackagingError(CoveyError):
    """No package comes of this. The message names the target or the tool, and what to do."""


@dataclass(frozen=True, slots=True)
class Release:
    """A release of Debian. glibc: the y of its glibc 2.y, which decides what wheels run there."""

    name: str
    number: int
    python: str
    python_full: str
    glibc: int


RELEASES = {
    release.name: release
    for release in (
        Release("bookworm", 12, "3.11", "3.11.2", 36),
        Release("trixie", 13, "3.13", "3.13.5", 41),
    )
}

MACHINES = {"arm64": "aarch64", "amd64": "x86_64"}
"""Debian's architectures, and what the kernel and wheels call them."""

OLDEST_GLIBC = 17  # what the oldest wheels for aarch64 were built against: manylinux2014


@dataclass(frozen=True, slots=True)
class Target:
    """A release on an architecture (Debian's word for it)."""

    release: Release
    arch: str

    @property
    def name(self) -> str:
        """As files are called."""
        return f"{self.release.name}-{self.arch}"

    @property
    def machine(self) -> str:
        """The architecture, as the kernel calls it."""
        return MACHINES[self.arch]

    @property
    def platforms(self) -> list[str]:
        """The platforms of wheels that run there, the best first, as pip would find them there."""
        newest_first = range(self.release.glibc, OLDEST_GLIBC - 1, -1)
        named = [f"manylinux_2_{glibc}_{self.machine}" for glibc in newest_first]
        return [*named, f"manylinux2014_{self.machine}"]

    @property
    def markers(self) -> dict[str, str]:
        """What the conditions of requirements are judged by there."""
        return {
            "implementation_name": "cpython",
            "implementation_version": self.release.python_full,
            "os_name": "posix",
            "platform_machine": self.machine,
            "platform_python_implementation": "CPython",
            "platform_release": "",
            "platform_system": "Linux",
            "platform_version": "",
            "python_full_version": self.release.python_full,
            "python_version": self.release.python,
            "sys_platform": "linux",
            "extra": "",
        }


def target(release: str, arch: str) -> Target:
    """A target by its names. Raises PackagingError for one that nothing is made for."""
    if release not in RELEASES:
        raise PackagingError(f"no release {release!r}: there are {', '.join(RELEASES)}")
    if arch not in MACHINES:
        raise PackagingError(
            f"no architecture {arch!r}: there are {', '.join(MACHINES)} (a device is a 64-bit machine)"
        )
    return Target(RELEASES[release], arch)


TARGETS = [target(release, arch) for release in RELEASES for arch in MACHINES]
