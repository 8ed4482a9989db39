"""The machine that covey is installed on: its paths, its programs, its users.

The only place that calls systemctl and its like. With another root than / everything happens in that tree,
offline, by the same programs' own options for it: for images of cards, and for tests.
"""

import contextlib
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from covey_shared.errors import CoveyError

USER = "covey-device"
"""The service's user, and its group of the same name."""

UNIT = "covey-device.service"


class MachineError(CoveyError):
    """The machine lacks something, or one of its programs failed."""


@dataclass(frozen=True, slots=True)
class Ran:
    """A program that has ended. output: what it wrote, errors last."""

    status: int
    output: str


Runner = Callable[[Sequence[str]], Ran]


def run_program(arguments: Sequence[str]) -> Ran:
    """Run one of the system's programs to its end."""
    environment = os.environ | {"LC_ALL": "C.UTF-8", "DEBIAN_FRONTEND": "noninteractive"}
    try:
        ended = subprocess.run(
            list(arguments),
            stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace",
            env=environment, check=False,
        )  # fmt: skip
    except OSError as error:
        return Ran(127, f"{arguments[0]}: {error.strerror}")
    return Ran(ended.returncode, ended.stdout + ended.stderr)


@dataclass(frozen=True)
class Machine:
    """root: of its file system. run: runs a program. is_root: whether we may change the system."""

    root: Path = Path("/")
    run: Runner = run_program
    is_root: Callable[[], bool] = field(default=lambda: os.geteuid() == 0)

    def path(self, name: str) -> Path:
        """An absolute path of the machine, as it is reached from here."""
        return self.root / name.lstrip("/")

    @property
    def offline(self) -> bool:
        """Whether this is a tree that does not run."""
        return self.root != Path("/")

    @property
    def has_systemd(self) -> bool:
        """Whether systemd runs it, or will (sd_booted(3))."""
        return (
            self.path("/usr/lib/systemd/systemd").exists()
            if self.offline
            else self.path("/run/systemd/system").is_dir()
        )

    def must(self, *arguments: str) -> str:
        """Run a program that has to succeed -> what it wrote. Raises MachineError."""
        ran = self.run(arguments)
        if ran.status != 0:
            told = ran.output.strip().splitlines()
            why = told[-1] if told else f"it ended with status {ran.status}"
            raise MachineError(f"`{' '.join(arguments)}` failed: {why}")
        return ran.output

    def systemctl(self, *arguments: str) -> None:
        """For what works on files: enable, disable. Raises MachineError."""
        self.must("systemctl", *([f"--root={self.root}"] if self.offline else []), *arguments)

    def manager(self, *arguments: str) -> None:
        """For what the running systemd does: start, stop, reload. Raises MachineError."""
        if not self.offline:
            self.must("systemctl", *arguments)

    def systemd_version(self) -> int:
        """The number of its release; 0 if that cannot be told."""
        words = self.run(["systemctl", "--version"]).output.split()
        return int(words[1]) if len(words) > 1 and words[1].isdigit() else 0

    def ids(self) -> tuple[int, int] | None:
        """The service's user and group; None if there is no such user."""
        with contextlib.suppress(OSError):
            for line in self.path("/etc/passwd").read_text("utf-8", "replace").splitlines():
                fields = line.split(":")
                if fields[0] == USER and len(fields) > 3:
                    return int(fields[2]), int(fields[3])
        return None

    def make_user(self, sysusers: Path) -> tuple[int, int]:
        """Make the service's user and group if they are not there. Raises MachineError."""
        if (ids := self.ids()) is not None:
            return ids
        root = [f"--root={self.root}"] if self.offline else []
        self.must("systemd-sysusers", *root, str(sysusers))
        if (ids := self.ids()) is None:
            raise MachineError(f"systemd-sysusers made no user {USER}; make one: useradd -r {USER}")
        return ids

    def remove_user(self) -> bool:
        """Whether there was one. Raises MachineError."""
        prefix = ["--prefix", str(self.root)] if self.offline else []
        there = self.ids() is not None
        if there:
            self.must("userdel", *prefix, USER)  # its group as well, if nobody else is in it
        with contextlib.suppress(OSError):
            groups = self.path("/etc/group").read_text("utf-8", "replace").splitlines()
            if any(line.split(":")[0] == USER for line in groups):
                self.must("groupdel", *prefix, USER)
        return there


@contextlib.contextmanager
def acting_as(ids: tuple[int, int]) -> Iterator[None]:
    """Within, this process reads and writes files as another user, if it is root's; what that user could
    have put into its own directories leads nowhere that it could not go itself."""
    if os.geteuid() != 0:
        yield
        return
    uid, gid, groups = os.geteuid(), os.getegid(), os.getgroups()
    os.setgroups([])
    os.setegid(ids[1])
    os.seteuid(ids[0])
    try:
        yield
    finally:
        os.seteuid(uid)
        os.setegid(gid)
        os.setgroups(groups)


@contextlib.contextmanager
def acting_as_root() -> Iterator[None]:
    """Within `acting_as`, root again."""
    uid, gid = os.geteuid(), os.getegid()
    if os.getresuid()[2] != 0 or uid == 0:
        yield
        return
    os.seteuid(0)
    os.setegid(0)
    try:
        yield
    finally:
        os.setegid(gid)
        os.seteuid(uid)


def remove(path: Path) -> bool:
    """A file, a link or a whole directory; whether there was one. Raises MachineError."""
    try:
        if path.is_symlink() or path.is_file():
            path.unlink()
        elif path.is_dir():
            shutil.rmtree(path)
        else:
            return False
    except OSError as error:
        where = error.filename or path
        raise MachineError(
            f"cannot remove {where}: {error.strerror}; remove {path} by hand"
        ) from error
    return True
