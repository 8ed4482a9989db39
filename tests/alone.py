"""A whole fleet in a network namespace of its own, with every call that could leave a trace written down.

``alone(directory, ...)`` starts this file's `main` in the namespace, where there is a loopback and nothing
else: `covey up` with mosquitto, three devices, a run, and `covey-device predict`. `strace` writes down what
the coordinator, one device, `covey run` and the prediction ask of the kernel; `Traces` reads it.
"""

import array
import fcntl
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

LIMIT_S = 180.0
WATCHED = "device", "coordinator", "follower", "prediction"

QUIET = {"CI", "ORT_DISABLE_TELEMETRY"}
"""Either keeps onnxruntime from sending anything by itself."""

_CALLS = (
    "connect,sendto,sendmsg,sendmmsg,?open,openat,?openat2,?creat,?mkdir,mkdirat,?mknod,mknodat,?rename,"
    "renameat,renameat2,?link,linkat,?symlink,symlinkat,?truncate"
)
_IFF_UP, _SIOCGIFFLAGS, _SIOCSIFFLAGS = 1, 0x8913, 0x8914


def namespaced() -> list[str] | None:
    """What a command is to be preceded by to be alone on the network; None if the kernel does not let us."""
    for who in ([], ["--user", "--map-root-user"]):
        wanted = ["unshare", *who, "--net"]
        if shutil.which("unshare") and subprocess.run([*wanted, "true"]).returncode == 0:
            return wanted
    return None


def alone(
    unshare: list[str],
    directory: Path,
    *,
    before: str = "",
    environment: dict[str, str] | None = None,
) -> None:
    """Play it. directory: `farm`, as `covey init` and `covey device add` made it, `run.toml`, and a place
    for the traces. before: Python that the device and the coordinator run first."""
    home = directory / "home"
    home.mkdir()
    kept = {k: v for k, v in os.environ.items() if k not in QUIET and k[:4] not in ("XDG_", "COVE")}
    done = subprocess.run(
        [*unshare, sys.executable, __file__, str(directory), before],
        env=kept
        | {"HOME": str(home), "PYTHONDONTWRITEBYTECODE": "1", "COLUMNS": "200"}
        | (environment or {}),
        cwd=home,
        capture_output=True,
        text=True,
        timeout=LIMIT_S + 30,
    )
    assert done.returncode == 0, done.stdout + done.stderr


# -- in the namespace ------------------------------------------------------------------------------


def _loopback_up() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        request = array.array("B", b"lo".ljust(16, b"\0") + bytes(24))
        fcntl.ioctl(control, _SIOCGIFFLAGS, request)
        flags = int.from_bytes(request[16:18], sys.byteorder) | _IFF_UP
        request[16:18] = array.array("B", flags.to_bytes(2, sys.byteorder))
        fcntl.ioctl(control, _SIOCSIFFLAGS, request)


def main(directory: Path, before: str) -> None:
    """All of it, in the namespace."""
    _loopback_up()
    with socket.socket() as probe:
        probe.settimeout(2)
        assert probe.connect_ex(("192.0.2.1", 80)) != 0, "this is no empty network"
    farm, children = directory / "farm", list[subprocess.Popen[bytes]]()

    def command(package: str, name: str, *arguments: object) -> list[str]:
        code = f"from {package}.cli import main; main()"
        if name in ("device", "coordinator") and before:
            code = f"{before}; {code}"
        traced = ["strace", "-ff", "-y", "-s", "4096", "-qq", "-e", "signal=none", "-e",
                  f"trace={_CALLS}", "-o", str(directory / f"trace-{name}")]  # fmt: skip
        line = [sys.executable, "-c", code, *map(str, arguments)]
        return [*traced, *line] if name in WATCHED else line

    def start(package: str, name: str, *arguments: object) -> None:
        with (directory / f"{name}.log").open("wb") as log:
            children.append(
                subprocess.Popen(
                    command(package, name, *arguments), stdout=log, stderr=subprocess.STDOUT
                )
            )

    def present() -> int:
        try:
            return len(json.loads((farm / "status.json").read_bytes())["present"])
        except (OSError, ValueError, KeyError):
            return -1

    def until(n: int) -> None:
        ends = time.monotonic() + LIMIT_S / 3
        while present() < n:
            logs = "".join(path.read_text() for path in directory.glob("*.log"))
            assert time.monotonic() < ends, f"{present()} devices are there:\n{logs}"
            assert all(child.poll() is None for child in children), logs
            time.sleep(0.05)

    try:
        start("covey_coordinator", "coordinator", "up", "--fleet-dir", farm)
        until(0)
        for index, name in enumerate(("device", "second", "third")):
            config = farm / "devices" / f"pi-{index}" / "device.toml"
            start("covey_device", name, "run", "--config", config)
        until(3)
        followed = command(
            "covey_coordinator", "follower", "run", directory / "run.toml", "--name", "alone",
            "--fleet-dir", farm,
        )  # fmt: skip
        subprocess.run(followed, check=True, timeout=LIMIT_S)
        if before:
            return  # it has left its traces by now, or does not
        config = farm / "devices" / "pi-0" / "device.toml"
        ends = time.monotonic() + 30
        while not list((farm / "devices" / "pi-0").rglob("current.onnx")):
            assert time.monotonic() < ends, "the device keeps no model"
            time.sleep(0.05)
        predicted = command(
            "covey_device", "prediction", "predict", "--config", config, directory / "0.npz"
        )  # fmt: skip
        subprocess.run(predicted, check=True, timeout=60, stdout=subprocess.DEVNULL)
    finally:
        # strace ends when what it traces has: it is that which is to end by itself. With telemetry on, that
        # would wait for lookups that nobody answers.
        for child in children:
            subprocess.run(
                ["pkill", "-KILL" if before else "-TERM", "-P", str(child.pid)], check=False
            )
            child.terminate()
        for child in children:
            try:
                child.wait(20)
            except subprocess.TimeoutExpired:
                child.kill()


# -- what was written down -------------------------------------------------------------------------


@dataclass(frozen=True)
class Call:
    """One system call: its name, and its arguments as strace writes them."""

    name: str
    arguments: str


@dataclass(frozen=True)
class Traces:
    """Of one of the programs, all its processes and threads."""

    directory: Path
    name: str

    def calls(self) -> Iterator[Call]:
        """All, in no order."""
        files = sorted(self.directory.glob(f"trace-{self.name}.*"))
        assert files, f"nothing was written down of {self.name}"
        for file in files:
            for line in file.read_text(errors="replace").splitlines():
                if (match := re.match(r"(\w+)\((.*)", line)) is not None:
                    yield Call(match[1], match[2])

    def processes(self) -> int:
        """How many processes and threads there were."""
        return len(list(self.directory.glob(f"trace-{self.name}.*")))

    def peers(self) -> set[str]:
        """Whom it connected to or sent to by address: HOST:PORT, a path, or the kind of another address."""
        found = set()
        for call in self.calls():
            if call.name not in ("connect", "sendto", "sendmsg", "sendmmsg"):
                continue
            for body in re.findall(r"\{(sa_family=[^{}]*)\}", call.arguments):
                found.add(_address(body))
        return found

    def opened(self) -> set[str]:
        """What it opened, or tried to, for whatever purpose."""
        return {path for call in self.calls() if "open" in call.name for path in _paths(call)}

    def written(self) -> set[str]:
        """What it made, renamed, or opened for writing, or tried to."""
        found = set[str]()
        for call in self.calls():
            if call.name in ("connect", "sendto", "sendmsg", "sendmmsg"):
                continue
            if "open" in call.name and not re.search(
                r"O_(WRONLY|RDWR|CREAT|TRUNC)", call.arguments
            ):
                continue
            paths = list(_paths(call))
            found.update(paths[-1:] if call.name.startswith("symlink") else paths)
        return found


def _address(body: str) -> str:
    if (match := re.search(r"htons\((\d+)\).*?\"([^\"]*)\"", body)) is not None:
        return f"{match[2]}:{match[1]}"
    if (match := re.search(r"sun_path=@?\"([^\"]*)\"", body)) is not None:
        return match[1]
    return re.sub(r"sa_family=(\w+).*", r"\1", body)


def _paths(call: Call) -> Iterator[str]:
    """Paths among the arguments, whole: relative ones are behind the directory that strace resolved."""
    arguments = call.arguments.rsplit(") = ", 1)[0]
    for directory, path in re.findall(
        r'(?:(?:AT_FDCWD|\d+)<([^>]*)>, )?"((?:[^"\\]|\\.)*)"', arguments
    ):
        yield os.path.normpath(Path(directory or "/") / path)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
