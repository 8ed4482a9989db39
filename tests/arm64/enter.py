"""Becomes a command in another machine's userland: `python enter.py [OPTIONS] ROOT COMMAND...`.

Makes namespaces of its own (users and mounts), tells their binfmt_misc that qemu runs aarch64 programs,
changes root, and executes the command: the same process with the same streams, so that signals and exit
statuses need nobody in between, and the children of that command are run as it is. Nothing outside is
changed, and all of it is gone when the last process is.

A binfmt_misc for each user namespace takes Linux 6.7. An older kernel does as well if it runs aarch64
programs already, as where systemd or binfmt-support registered Debian's qemu-user-static.

Run by root: only root can give the userland all users and groups of a Debian, which its packages take for
granted. Needs nothing but the standard library: it runs as a program of its own.
"""

import argparse
import contextlib
import ctypes
import os
import sys
from pathlib import Path

CLONE_NEWNS = 0x00020000
CLONE_NEWUSER = 0x10000000
MS_BIND, MS_REC, MS_PRIVATE = 0x1000, 0x4000, 1 << 18

BINFMT = Path("/proc/sys/fs/binfmt_misc")
# The first bytes of an ELF file: 64 bits, little endian, executable or shared, machine 183.
MAGIC = r"\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\xb7\x00"
MASK = r"\xff\xff\xff\xff\xff\xff\xff\x00\xff\xff\xff\xff\xff\xff\xff\xff\xfe\xff\xff\xff"
# F: the kernel opens qemu now, so that it need not be in the other root.
FLAGS = "F"

USERS = 65536
"""As many as Debian's packages count on."""

ENVIRONMENT = {
    "HOME": "/root",
    "LANG": "C.UTF-8",
    "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
    "PYTHONUNBUFFERED": "1",
    "COVEY_HOST_ROOT": "/nonexistent",  # no device minds how busy the host of the emulation is
    # A Raspberry Pi 4's. qemu's own choice signs every return address, which it computes by hand: that made
    # trixie's Python ten times slower.
    "QEMU_CPU": "cortex-a72",
}

PROCESSORS = 4
# What /proc/cpuinfo says of that processor.
CPUINFO = """processor\t: {}
BogoMIPS\t: 108.00
Features\t: fp asimd evtstrm crc32 cpuid
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x0
CPU part\t: 0xd08
CPU revision\t: 3

"""

_libc = ctypes.CDLL(None, use_errno=True)


def mount(source: str, target: Path, kind: str, flags: int = 0) -> None:
    """mount(2). Raises OSError."""
    if _libc.mount(source.encode(), bytes(target), kind.encode(), flags, None) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"cannot mount on {target}: {os.strerror(number)}")


def separate() -> None:
    """Go into namespaces of our own, as their root. Raises OSError."""
    me = os.getpid()
    wait, go = os.pipe()
    helper = os.fork()
    if helper == 0:  # stays outside, where one may say who the users inside are
        status = 1
        with contextlib.suppress(BaseException):
            os.read(wait, 1)
            for kind in ("gid_map", "uid_map"):
                Path(f"/proc/{me}/{kind}").write_text(f"0 0 {USERS}")
            status = 0
        os._exit(status)
    made = _libc.unshare(CLONE_NEWUSER | CLONE_NEWNS)
    number = ctypes.get_errno()
    os.write(go, b"\n")
    os.close(wait)
    os.close(go)
    _, status = os.waitpid(helper, 0)
    if made != 0:
        raise OSError(number, f"no user namespace: {os.strerror(number)}")
    if status != 0:
        raise PermissionError("no users could be mapped into a user namespace")
    os.setgid(0)
    os.setuid(0)
    mount("none", Path("/"), "none", MS_REC | MS_PRIVATE)


def register(qemu: str) -> None:
    """Have this user namespace run aarch64 programs with qemu. Does nothing on an older kernel."""
    with contextlib.suppress(PermissionError):
        mount("binfmt_misc", BINFMT, "binfmt_misc")
        (BINFMT / "register").write_text(f":covey-aarch64:M::{MAGIC}:{MASK}:{qemu}:{FLAGS}")


def furnish(root: Path, binds: list[str]) -> None:
    """Mount what a running system has, and what is to be seen from outside.

    /sys has nothing but processors: onnxruntime crashes under qemu when it sees the host's there.
    """
    for name in ("proc", "dev", "sys"):
        (root / name).mkdir(exist_ok=True)
    for name in ("proc", "dev"):
        mount(f"/{name}", root / name, "none", MS_BIND | MS_REC)
    mount("none", root / "sys", "tmpfs")
    processors = root / "sys/devices/system/cpu"
    processors.mkdir(parents=True)
    for name in ("possible", "present", "online"):
        (processors / name).write_text(f"0-{PROCESSORS - 1}\n")
    described = root / "sys" / "cpuinfo"
    described.write_text("".join(CPUINFO.format(number) for number in range(PROCESSORS)))
    mount(str(described), root / "proc" / "cpuinfo", "none", MS_BIND)
    for bind in binds:
        source, _, target = bind.partition(":")
        place = root / target.lstrip("/")
        place.mkdir(parents=True, exist_ok=True)
        mount(source, place, "none", MS_BIND)


def become(user: str) -> None:
    """Another user of the userland, by name."""
    lines = (line.split(":") for line in Path("/etc/passwd").read_text().splitlines())
    uid, gid = next((int(line[2]), int(line[3])) for line in lines if line[0] == user)
    os.setgroups([gid])
    os.setgid(gid)
    os.setuid(uid)


def main() -> None:
    """Become the command."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--qemu", required=True, help="a qemu that is linked statically")
    parser.add_argument("--bind", action="append", default=[], metavar="FROM:TO")
    parser.add_argument("--env", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--user", help="one of the userland's")
    parser.add_argument("root", type=Path)
    parser.add_argument("command", nargs=argparse.REMAINDER)
    given = parser.parse_args()
    separate()
    register(given.qemu)
    furnish(given.root, given.bind)
    os.chroot(given.root)
    os.chdir("/")
    if given.user is not None:
        become(given.user)
    environment = ENVIRONMENT | dict(pair.split("=", 1) for pair in given.env)
    os.execvpe(given.command[0], given.command, environment)  # noqa: S606  (no shell, on purpose)


if __name__ == "__main__":
    try:
        main()
    except OSError as error:
        sys.exit(f"enter: {error}")
