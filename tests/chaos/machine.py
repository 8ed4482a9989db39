"""What this machine lets us do to it: namespaces of our own, small disks, shaped links.

The whole fleet moves into namespaces that end with it, for mounts and for networks (`unshare`). There
each device gets a network namespace of its own, and each component a small tmpfs. Of what the machine
refuses, a plainer way is taken, and `Machine.lacks` says so in words.
"""

import ctypes
import os
import resource
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import psutil

INSIDE = "COVEY_CHAOS_INSIDE"
ADDRESS = "10.77.0.1"
PATH = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"))


def find(program: str) -> str | None:
    """Where a program is; those of root's as well."""
    return shutil.which(program, path=PATH)


def done(*command: object, check: bool = False) -> bool:
    """Run a command; whether it succeeded. check: raise if it did not."""
    words = [str(word) for word in command]
    words[0] = find(words[0]) or words[0]
    try:
        ended = subprocess.run(words, check=False, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        if check:
            raise
        return False
    if check and ended.returncode:
        raise RuntimeError(f"{' '.join(words)}: {ended.stderr.strip()}")
    return ended.returncode == 0


def enter(arguments: list[str]) -> None:
    """Start this program again within namespaces, if the machine allows; otherwise return."""
    if os.environ.get(INSIDE) is not None or not sys.platform.startswith("linux"):
        return
    for who in ([], ["--user", "--map-root-user"]):
        wanted = ["unshare", *who, "--mount", "--net"]
        if not done(*wanted, "true"):
            continue
        os.environ[INSIDE] = "1"
        program = find("unshare")
        assert program is not None
        os.execv(program, [*wanted, sys.executable, "-m", "chaos", *arguments])  # noqa: S606
    os.environ[INSIDE] = ""


def dies_with_us() -> None:
    """In a child, before it becomes the program: whatever ends us ends it."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


@dataclass
class Machine:
    """directory: of the fleet. lacks: what is done in a plainer way here, in words."""

    directory: Path
    isolated: bool = False
    namespaces: bool = False
    netem: bool = False
    shaping: bool = False
    disks: bool = False
    lacks: list[str] = field(default_factory=list)
    _mounted: list[Path] = field(default_factory=list)

    def prepare(self, network: str) -> None:
        """Find out, and set the stage. network: "auto" or "proxy"."""
        self.isolated = os.environ.get(INSIDE) == "1"
        if not self.isolated:
            self.lacks.append(
                "no namespaces of our own (unshare): all is on this machine's loopback"
            )
        else:
            done("ip", "link", "set", "lo", "up", check=True)
            done("mount", "--make-rprivate", "/")
        self.disks = self.isolated and self._try_disk()
        if not self.disks:
            self.lacks.append(
                "no tmpfs can be mounted: instead of a full disk the coordinator gets a limit on the "
                "size of files, and devices get none"
            )
        if network == "proxy":
            self.lacks.append("no network namespaces, as was asked: faults are the proxies' alone")
        elif self.isolated and self._try_namespace():
            self.namespaces = True
        else:
            self.lacks.append("no network namespaces: partitions and delays are the proxies' alone")
        if self.namespaces and not self.netem:
            self.lacks.append(
                "this kernel has no netem (CONFIG_NET_SCH_NETEM), so no packets are lost: delays and stalls "
                "are the proxies', partitions are real"
                + (", and so are slow links (tbf)" if self.shaping else "")
            )

    @property
    def address(self) -> str:
        """Where everything of ours listens."""
        return ADDRESS if self.namespaces else "127.0.0.1"

    def _try_disk(self) -> bool:
        probe = self.directory / "probe"
        probe.mkdir()
        there = done("mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", probe)
        if there:
            done("umount", probe)
        probe.rmdir()
        return there

    def _try_namespace(self) -> bool:
        """Make one and shape its link, as a trial."""
        if find("ip") is None or not done("mount", "-t", "tmpfs", "tmpfs", "/run"):
            return False
        try:
            self.add_namespace("trial", 254)
        except (RuntimeError, OSError, subprocess.TimeoutExpired):
            return False
        self.netem = self.shape("trial", "netem", "delay", "1ms")
        self.unshape("trial")
        self.shaping = self.shape("trial", "tbf", "rate", "1mbit", "burst", "16k", "latency", "1s")
        done("ip", "netns", "del", "trial")
        return done("ip", "address", "add", f"{ADDRESS}/32", "dev", "lo")

    # -- networks ----------------------------------------------------------------------------------

    def add_namespace(self, name: str, number: int) -> None:
        """A network for one device: a cable to us, and nothing else. Raises RuntimeError."""
        cable, near, far = f"to-{name}", f"10.77.{number}.1", f"10.77.{number}.2"
        inside = ("ip", "-n", name)
        for command in (
            ("ip", "netns", "add", name),
            ("ip", "link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", name),
            ("ip", "address", "add", f"{near}/30", "dev", cable),
            ("ip", "link", "set", cable, "up"),
            (*inside, "address", "add", f"{far}/30", "dev", "eth0"),
            (*inside, "link", "set", "lo", "up"),
            (*inside, "link", "set", "eth0", "up"),
            (*inside, "route", "add", "default", "via", near),
        ):
            done(*command, check=True)

    def within(self, name: str) -> list[str]:
        """What starts a command in a device's network."""
        if not self.namespaces:
            return []
        return [find("nsenter") or "nsenter", f"--net=/run/netns/{name}", "--"]

    def plug(self, name: str, there: bool) -> None:
        """Pull the device's cable out, or put it back. Raises RuntimeError."""
        done("ip", "link", "set", f"to-{name}", "up" if there else "down", check=True)

    def shape(self, name: str, *how: str) -> bool:
        """Shape what goes to and from a device."""
        here = done("tc", "qdisc", "replace", "dev", f"to-{name}", "root", *how)
        enter = self.within(name) if self.namespaces else [
            find("nsenter") or "nsenter", f"--net=/run/netns/{name}", "--",
        ]  # fmt: skip
        there = done(*enter, find("tc") or "tc", "qdisc", "replace", "dev", "eth0", "root", *how)
        return here and there

    def unshape(self, name: str) -> None:
        """As it was."""
        done("tc", "qdisc", "del", "dev", f"to-{name}", "root")
        enter = [find("nsenter") or "nsenter", f"--net=/run/netns/{name}", "--"]
        done(*enter, find("tc") or "tc", "qdisc", "del", "dev", "eth0", "root")

    # -- disks -------------------------------------------------------------------------------------

    def disk(self, path: Path, megabytes: int) -> None:
        """Put a small disk there, if this machine lets us. path: a directory that is empty."""
        path.mkdir(exist_ok=True)
        if self.disks:
            size = f"size={megabytes}m,mode=700"
            done("mount", "-t", "tmpfs", "-o", size, "tmpfs", path, check=True)
            self._mounted.append(path)

    def close(self) -> None:
        """Take the disks away, and what was on them."""
        while self._mounted:
            done("umount", "--lazy", self._mounted.pop())

    def fill(self, path: Path, pid: int) -> None:
        """Leave nothing of a disk, or let a process write no more."""
        if not self.disks:
            _, hard = psutil.Process(pid).rlimit(resource.RLIMIT_FSIZE)
            psutil.Process(pid).rlimit(resource.RLIMIT_FSIZE, (0, hard))
            return
        with (path / FILLER).open("ab") as file:
            step = 1 << 20
            while step:
                try:
                    os.posix_fallocate(file.fileno(), os.fstat(file.fileno()).st_size, step)
                except OSError:
                    step //= 2

    def free(self, path: Path, pid: int | None) -> None:
        """Undo `fill`."""
        if self.disks:
            (path / FILLER).unlink(missing_ok=True)
        elif pid is not None and psutil.pid_exists(pid):
            _, hard = psutil.Process(pid).rlimit(resource.RLIMIT_FSIZE)
            psutil.Process(pid).rlimit(resource.RLIMIT_FSIZE, (hard, hard))


FILLER = "filler"
