"""A Debian whose own systemd runs, as process 1 of namespaces of its own on this machine.

Root alone can make one: systemd wants to mount, and to have a tree of control groups to itself. It shares
this machine's network, so that a broker on 127.0.0.1 is its broker. When its first process ends, so does
everything in it.
"""

import contextlib
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from prerequisites import missing

BUILD = Path(__file__).parents[1] / "build" / "booted"
PACKAGES = "python3,python3-venv,systemd,systemd-sysv,procps,passwd,ca-certificates"
BOOT_S = 60.0

_INSIDE = """
set -e
mount --make-rprivate /
mount --bind "$1" "$1"
cd "$1"
mount -t proc proc proc
mount -t sysfs -o ro sysfs sys
mount -t cgroup2 none sys/fs/cgroup
mount -t tmpfs -o mode=755 tmpfs run
mount -t tmpfs tmpfs tmp
mount -t tmpfs -o mode=755 tmpfs dev
for name in null zero full random urandom tty; do
  touch dev/$name; mount --bind /dev/$name dev/$name
done
mkdir dev/pts dev/shm
mount -t devpts devpts dev/pts
mount -t tmpfs tmpfs dev/shm
ln -s /proc/self/fd dev/fd
ln -s pts/ptmx dev/ptmx
# Not chroot alone: in a root that is not its namespace's, no process may make user namespaces.
mkdir -p .outside
pivot_root . .outside
exec env -i container=covey PATH=/usr/sbin:/usr/bin:/sbin:/bin chroot . sh -c '
  cd /; umount -l /.outside; rmdir /.outside
  exec /lib/systemd/systemd --log-target=console --show-status=0' </dev/null
"""


def archive(release: str) -> Path:
    """A small Debian with systemd and Python, made once. mmdebstrap fetches it."""
    path = BUILD / f"{release}.tar"
    if path.exists():
        return path
    if shutil.which("mmdebstrap") is None:
        missing("mmdebstrap is not installed: apt install mmdebstrap debian-archive-keyring")
    BUILD.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(f".{os.getpid()}.new")
    done = subprocess.run(
        [
            *("mmdebstrap", "--quiet", "--format=tar", "--variant=minbase"),
            *(f"--include={PACKAGES}", release, fresh),
        ],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    if done.returncode != 0:
        fresh.unlink(missing_ok=True)
        missing(f"mmdebstrap cannot make a {release}: {done.stderr[-1000:]}")
    fresh.replace(path)
    return path


def unpack(release: str, root: Path) -> None:
    """A copy of its own, in a directory through which every user may go."""
    root.mkdir(mode=0o755)
    subprocess.run(
        ["tar", "--extract", "--numeric-owner", "--exclude=./dev/*", "-C", root, "-f", archive(release)],
        check=True, timeout=120,
    )  # fmt: skip
    (root / "etc/machine-id").write_text("")
    (root / "etc/resolv.conf").write_text("")


class Booted:
    """One that runs. root: its file system, as seen from here."""

    def __init__(self, root: Path, process: "subprocess.Popen[bytes]", log: Path) -> None:
        self.root, self._process, self._log = root, process, log
        self._first = self._find_first()

    def _find_first(self) -> int:
        """Its process 1, as numbered here."""
        until = time.monotonic() + BOOT_S
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children")
        while time.monotonic() < until and self._process.poll() is None:
            with contextlib.suppress(OSError, IndexError):
                return int(children.read_text().split()[0])
            time.sleep(0.02)
        raise RuntimeError(f"nothing was started: {self.log}")

    @property
    def log(self) -> str:
        return self._log.read_text("utf-8", "replace")[-3000:]

    def run(
        self, *command: object, seconds: float = 60.0, stdin: str = ""
    ) -> subprocess.CompletedProcess[str]:
        """A command within, as root."""
        return subprocess.run(
            [
                *("nsenter", "-t", str(self._first), "-m", "-p", "-u", "-i", "-C", "--"),
                *("timeout", "--signal=KILL", str(seconds)),
                *("/usr/bin/env", "-i", "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"),
                *("PIP_NO_INDEX=1", "PIP_FIND_LINKS=/wheels", "LANG=C.UTF-8", *map(str, command)),
            ],
            input=stdin, capture_output=True, text=True, timeout=seconds + 30, check=False,
        )  # fmt: skip

    def must(self, *command: object, seconds: float = 60.0, stdin: str = "") -> str:
        """-> what it wrote."""
        done = self.run(*command, seconds=seconds, stdin=stdin)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def show(self, *names: str) -> dict[str, str]:
        """Properties of the device's unit."""
        text = self.must(
            "systemctl", "show", "covey-device.service", *(f"-p{name}" for name in names)
        )
        return dict(line.split("=", 1) for line in text.splitlines())

    def journal(self) -> str:
        """The service's log."""
        return self.must("journalctl", "--no-pager", "-o", "cat", "-u", "covey-device")

    def wait_until_up(self) -> None:
        """Until systemd says that it has booted."""
        until = time.monotonic() + BOOT_S
        state = ""
        while time.monotonic() < until:
            state = self.run("systemctl", "is-system-running", seconds=10).stdout.strip()
            if state in ("running", "degraded"):
                return
            time.sleep(0.1)
        raise RuntimeError(f"systemd does not come up ({state}): {self.log}")


@contextlib.contextmanager
def booted(root: Path) -> Iterator[Booted]:
    """A tree with its systemd running. Skips, or fails in CI, where that cannot be."""
    if os.geteuid() != 0:
        missing("only root can have a systemd of its own")
    with tempfile.TemporaryDirectory(prefix="covey-booted-") as place:
        groups, log = Path(place) / "cgroup", Path(place) / "log"
        groups.mkdir()
        mounted = ["mount", "-t", "cgroup2", "none", groups]
        if subprocess.run(mounted, capture_output=True, check=False).returncode != 0:
            missing("this machine has no cgroups v2")
        own = groups / f"covey-booted-{os.getpid()}"
        try:
            own.mkdir()
            with log.open("wb") as writing:
                process = subprocess.Popen(
                    [
                        *("sh", "-c", 'echo 0 >"$1/cgroup.procs"; shift; exec "$@"', "sh", own),
                        *("unshare", "--mount", "--pid", "--fork", "--uts", "--ipc", "--cgroup"),
                        *("--kill-child", "sh", "-c", _INSIDE, "sh", root),
                    ],
                    stdin=subprocess.DEVNULL, stdout=writing, stderr=writing,
                    start_new_session=True,
                )  # fmt: skip
            try:
                machine = Booted(root, process, log)
                machine.wait_until_up()
                yield machine
            finally:
                process.kill()  # and with it, its child
                process.wait(30)
        finally:
            _clear(own)
            subprocess.run(["umount", groups], check=False)


def _clear(groups: Path) -> None:
    """Remove a tree of control groups whose processes are about to end."""
    until = time.monotonic() + 20
    while groups.exists() and time.monotonic() < until:
        for path in sorted(groups.rglob("*"), key=lambda p: -len(p.parts)):
            if path.is_dir():
                with contextlib.suppress(OSError):
                    path.rmdir()
        with contextlib.suppress(OSError):
            groups.rmdir()
        time.sleep(0.05)
