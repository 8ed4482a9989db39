"""What covey needs is installed, in the versions it needs, and can be imported on this machine.

Imported in a process of its own, one after another: ``python -m covey_device.doctor.packages NAME...``. Of
onnxruntime that is `covey_shared.runtime`, which keeps its telemetry off.
"""

import importlib
import re
import sys
from importlib import metadata

from covey_device.doctor.children import Ended, run
from covey_device.doctor.findings import Finding

MODULES = {
    "click": "click",
    "cryptography": "cryptography.x509",
    "msgspec": "msgspec",
    "numpy": "numpy",
    "onnxruntime": "covey_shared.runtime",
    "paho-mqtt": "paho.mqtt.client",
    "psutil": "psutil",
    "pycryptodome": "Crypto.Cipher.ChaCha20",
}
"""Distribution -> what of it, or of ours on top of it, is imported."""

_REQUIREMENT = re.compile(r"([A-Za-z0-9._-]+)[^;]*?(?:>=\s*([0-9.]+)|$|;)")


def required() -> dict[str, tuple[int, ...]]:
    """Distribution -> the least version that covey says it needs. Raises PackageNotFoundError."""
    found = {}
    for line in metadata.requires("covey") or ():
        match = _REQUIREMENT.match(line)
        if match is not None and "extra ==" not in line:
            found[match[1]] = _numbers(match[2] or "0")
    return found


def _numbers(version: str) -> tuple[int, ...]:
    """The release of a version: what comes before letters does not count for more."""
    release = re.match(r"[0-9]+(?:\.[0-9]+)*", version)
    return tuple(map(int, release[0].split("."))) if release else (0,)


def packages() -> list[Finding]:
    """One line if all is there, and otherwise one for each that is not."""
    check, wrong, versions = "packages", [], {}
    try:
        needed = required()
    except metadata.PackageNotFoundError:
        needed = dict.fromkeys(MODULES, (0,))
    anew = "install covey anew: its own script, its .deb or pip brings what it needs"
    for name, least in needed.items():
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            wrong.append(Finding(check, "problem", f"{name} is not installed", anew))
            continue
        if _numbers(versions[name]) < least:
            words = ".".join(map(str, least))
            wrong.append(
                Finding(
                    check, "problem",
                    f"{name} is {versions[name]}; covey needs {words} or later", anew,
                )
            )  # fmt: skip
    wrong += _imported([name for name in needed if name in MODULES and name in versions], anew)
    told = ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))
    return wrong or [Finding(check, "ok", told)]


def _imported(names: list[str], anew: str) -> list[Finding]:
    """What cannot be imported. After a crash the others get a process of their own."""
    wrong: list[Finding] = []
    rest = names
    while rest:
        ended: Ended = run("covey_device.doctor.packages", *rest)
        lines = [line.split(" ", 2) for line in ended.output.splitlines()]
        for line in lines:
            if line[0] == "failed" and len(line) == 3:
                says = f"{line[1]} cannot be imported: {line[2]}"
                wrong.append(Finding("packages", "problem", says, anew))
        tried = {line[1] for line in lines if len(line) > 1}
        left = [name for name in rest if name not in tried]
        if not left:
            break
        why = ended.why or ended.error or "its process said nothing"
        wrong.append(Finding("packages", "problem", f"importing {left[0]} failed: {why}", anew))
        rest = left[1:]
    return wrong


def main(names: list[str]) -> None:
    """In the child: import these, and say after each how it went."""
    for name in names:
        try:
            importlib.import_module(MODULES[name])
        except Exception as error:  # a broken library raises anything
            text = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            sys.stdout.write(f"failed {name} {text}\n")
        else:
            sys.stdout.write(f"imported {name}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1:])
