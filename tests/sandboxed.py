"""Becomes a command under a unit's sandbox, without systemd: `python sandboxed.py UNIT COMMAND...`.

What of the unit any process may do to itself: system calls (SystemCallFilter=, with the sets that this
machine's systemd-analyze knows), address families, no memory both written and executed, resource limits, no
new privileges, the mask for files. What takes root or control groups is in `booted`.

Needs libseccomp and the standard library: it runs as a program of its own.
"""

import ctypes
import errno
import os
import resource
import socket
import subprocess
import sys
from pathlib import Path

ALLOW = 0x7FFF0000
ERRNO = 0x00050000
EQUAL = 4  # SCMP_CMP_EQ
NO_SUCH_CALL = -1
PR_SET_NO_NEW_PRIVS, PR_SET_MDWE, REFUSE_EXEC_GAIN = 38, 65, 1


class Comparison(ctypes.Structure):
    """struct scmp_arg_cmp of seccomp.h."""

    _fields_ = (
        ("arg", ctypes.c_uint),
        ("op", ctypes.c_int),
        ("a", ctypes.c_uint64),
        ("b", ctypes.c_uint64),
    )


def settings(unit: Path) -> list[tuple[str, str]]:
    """The keys of a unit with their values, in their order."""
    lines = [line.strip() for line in unit.read_text().splitlines()]
    pairs = [line.partition("=") for line in lines if line and line[0] not in "#["]
    return [(key, value) for key, _, value in pairs]


def calls_of(name: str) -> set[str]:
    """A system call, or those in one of systemd's sets."""
    if not name.startswith("@"):
        return {name}
    shown = subprocess.run(
        ["systemd-analyze", "syscall-filter", name], capture_output=True, text=True, check=True
    ).stdout
    found = set()
    for line in shown.splitlines()[1:]:
        word = line.strip()
        if word and not word.startswith("#"):
            found |= calls_of(word)
    return found


def allowed_calls(unit: Path) -> set[str]:
    """systemd.exec(5): the first list says what is allowed, those with ~ take away from it."""
    calls: set[str] = set()
    for key, value in settings(unit):
        if key == "SystemCallFilter":
            named = set().union(*map(calls_of, value.removeprefix("~").split()))
            calls = calls - named if value.startswith("~") else calls | named
    return calls | calls_of("@default")


def filter_calls(unit: Path) -> None:
    """From here on, for this process and all it starts."""
    library = ctypes.CDLL("libseccomp.so.2", use_errno=True)
    library.seccomp_init.restype = ctypes.c_void_p
    context = ctypes.c_void_p(library.seccomp_init(ctypes.c_uint32(ERRNO | errno.EPERM)))
    families = dict(settings(unit))["RestrictAddressFamilies"].split()
    for name in sorted(allowed_calls(unit)):
        number = library.seccomp_syscall_resolve_name(name.encode())
        if number == NO_SUCH_CALL:
            continue  # of another kernel, or another kind of machine
        if name == "socket":
            for family in families:
                value = int(getattr(socket, family))
                only = (Comparison * 1)(Comparison(0, EQUAL, value, 0))
                added = library.seccomp_rule_add_array(
                    context, ctypes.c_uint32(ALLOW), number, ctypes.c_uint(1), only
                )
                assert added == 0, (name, added)
            continue
        added = library.seccomp_rule_add(context, ctypes.c_uint32(ALLOW), number, ctypes.c_uint(0))
        assert added in (0, -errno.EDOM), (name, added)  # the latter: not on this kind of machine
    loaded = library.seccomp_load(context)
    assert loaded == 0, loaded


LIMITS = {
    "LimitCORE": resource.RLIMIT_CORE,
    "LimitDATA": resource.RLIMIT_DATA,
    "LimitNOFILE": resource.RLIMIT_NOFILE,
}
UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def number(text: str) -> int:
    """A limit as units spell it."""
    if text == "infinity":
        return resource.RLIM_INFINITY
    return int(text[:-1]) * UNITS[text[-1]] if text[-1] in UNITS else int(text)


def limit(unit: Path) -> None:
    """Resources. A hard limit that is lower already stays."""
    for key, value in settings(unit):
        if key.startswith("Limit"):
            soft, _, hard = value.partition(":")
            before = resource.getrlimit(LIMITS[key])[1]
            wanted = [number(soft), number(hard or soft)]
            if before != resource.RLIM_INFINITY:
                wanted = [before if w == resource.RLIM_INFINITY else min(w, before) for w in wanted]
            resource.setrlimit(LIMITS[key], (wanted[0], wanted[1]))


def main() -> None:
    unit, command = Path(sys.argv[1]), sys.argv[2:]
    given = dict(settings(unit))
    assert given["MemoryDenyWriteExecute"] == given["NoNewPrivileges"] == "yes"
    for assignment in given["Environment"].split():
        name, _, value = assignment.partition("=")
        os.environ[name] = value
    os.umask(int(given["UMask"], 8))
    limit(unit)
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    assert prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
    prctl(PR_SET_MDWE, REFUSE_EXEC_GAIN, 0, 0, 0)  # Linux 6.3; systemd does without
    filter_calls(unit)
    os.execv(command[0], command)  # noqa: S606  (that is what it is for)


if __name__ == "__main__":
    main()
