"""A machine's file tree that does not run, for the real tools of systemd and of Debian.

As root the tools themselves work on it. Another user may not make users: then `systemd-sysusers`,
`systemd-tmpfiles` and `userdel` are played by what they would write, and so they are where the service's
user is to be the test's own.
"""

import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from covey_device.installation.machine import USER, Machine, Ran, run_program

FILES = {
    "etc/passwd": "root:x:0:0:root:/root:/bin/bash\n",
    "etc/group": "root:x:0:\n",
    "etc/shadow": "root:*:19000:0:99999:7:::\n",
    "etc/gshadow": "root:*::\n",
    "etc/systemd/system/other.service": "[Service]\nExecStart=/bin/true\n",
    "usr/lib/systemd/systemd": "",
    "home/pi/notes": "",
}


@dataclass
class Tools:
    """Runs them, and keeps what was run. played: those that make users are only played. refused: names of
    programs that fail, with what they say."""

    root: Path
    played: bool = False
    ran: list[list[str]] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)

    def __call__(self, arguments: Sequence[str]) -> Ran:
        self.ran.append(list(arguments))
        name = arguments[0]
        if name in self.refused:
            return Ran(1, self.refused[name])
        if name not in ("systemctl", "systemd-sysusers", "systemd-tmpfiles", "userdel", "groupdel"):
            return Ran(0, "")
        if (os.geteuid() == 0 and not self.played) or name == "systemctl":
            return run_program(arguments)
        return self._play(name)

    def _play(self, name: str) -> Ran:
        passwd, group = self.root / "etc/passwd", self.root / "etc/group"
        if name == "systemd-sysusers":
            ids = f"{os.geteuid()}:{os.getegid()}"
            passwd.write_text(
                passwd.read_text() + f"{USER}:x:{ids}::/var/lib/covey-device:/bin/no\n"
            )
            group.write_text(group.read_text() + f"{USER}:x:{os.getegid()}:\n")
        elif name == "systemd-tmpfiles":
            for path, mode in (
                ("etc/covey", 0o755),
                ("var/lib/covey-device", 0o750),
                ("var/lib/covey-device/data", 0o2770),
            ):
                (self.root / path).mkdir(parents=True, exist_ok=True)
                (self.root / path).chmod(mode)
        else:
            for path in (passwd, group):
                lines = path.read_text().splitlines(keepends=True)
                path.write_text("".join(x for x in lines if not x.startswith(f"{USER}:")))
        return Ran(0, "")


def fake_machine(root: Path, *, played: bool = False) -> tuple[Machine, Tools]:
    """A tree under `root` with what an installation meets."""
    for name, text in FILES.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    tools = Tools(root, played)
    return Machine(root, tools, lambda: True), tools


def contents(root: Path) -> dict[str, str]:
    """Everything in a tree -> what it is and holds; without the copies that tools keep of the user lists."""
    kept = {"passwd-", "group-", "shadow-", "gshadow-", ".pwd.lock", "subuid-", "subgid-"}
    found = {}
    for path in sorted(root.rglob("*")):
        name = str(path.relative_to(root))
        if path.parent == root / "etc" and path.name in kept:
            continue
        if path.is_symlink():
            found[name] = f"-> {path.readlink()}"
        elif path.is_dir():
            found[name] = "directory"
        else:
            found[name] = path.read_bytes().decode("utf-8", "replace")
    return found


def analyze(*arguments: str) -> subprocess.CompletedProcess[str]:
    """systemd-analyze, which needs no systemd that runs."""
    return subprocess.run(
        ["systemd-analyze", *arguments], capture_output=True, text=True, timeout=60, check=False
    )
