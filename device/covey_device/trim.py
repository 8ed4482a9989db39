"""What a device's dependencies bring along that no device uses, and its removal.

    python -m covey_device.trim

removes it from the installation it runs in: test suites, compilers' headers and stubs, tools that
prepare models, and a second copy of onnxruntime for programs in other languages. That is a third of
what lies on the disk, on cards that have little room and less speed. What is left is what the tests of
the packages run with. Licences stay, and so does every RECORD: it lists what is still there.

`covey-device` itself never imports this.
"""

import csv
import os
import sys
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

STUBS = ("*.pyi", "*.pxd", "*.pyx", "*.h")

UNUSED: Mapping[str, Sequence[str]] = {
    "cffi": (*STUBS, "*/bin/cffi-gen-src"),
    "cryptography": STUBS,
    "msgspec": STUBS,
    "numpy": (
        *STUBS,
        "numpy/tests/*",
        "numpy/*/tests/*",
        "numpy/conftest.py",
        # For building other extensions: numpy.f2py and numpy.distutils are loaded only when asked for.
        "numpy/f2py/*",
        "numpy/distutils/*",
        "numpy/_core/include/*",
        "numpy/_core/lib/*",
        "numpy/random/lib/*",
        "numpy/random/_examples/*",
        "*/bin/f2py",
        "*/bin/numpy-config",
    ),
    "onnxruntime": (
        # The Python module has the whole runtime in itself; this copy is for programs in C.
        "onnxruntime/capi/libonnxruntime.so.*",
        "onnxruntime/datasets/*",
        "onnxruntime/quantization/*",
        "onnxruntime/tools/*",
        "onnxruntime/transformers/*",
        "*/bin/onnxruntime_test",
    ),
    "pycryptodome": ("Crypto/SelfTest/*",),
}
"""By distribution: files, as its RECORD names them; a star stands for slashes too."""


def trim(site_packages: Path, unused: Mapping[str, Sequence[str]] = UNUSED) -> int:
    """Remove these files of the distributions installed there. Returns how many bytes they had.

    unused: by distribution. The distribution's own metadata, where licences lie, always stays.
    """
    removed = 0
    for metadata in sorted(site_packages.glob("*.dist-info")):
        patterns = unused.get(metadata.name.split("-")[0].lower())
        if patterns is not None:
            removed += _trim_one(site_packages, metadata / "RECORD", patterns)
    return removed


def rows_of(record: Path) -> list[list[str]]:
    """The rows of a RECORD: path from site-packages, hash, size."""
    with record.open(encoding="utf-8", newline="") as file:
        return list(csv.reader(file))


def _trim_one(site_packages: Path, record: Path, patterns: Sequence[str]) -> int:
    rows = rows_of(record)
    kept, removed = [], 0
    for row in rows:
        inside = row[0].startswith(record.parent.name + "/")
        if inside or not any(fnmatchcase(row[0], pattern) for pattern in patterns):
            kept.append(row)
            continue
        path = Path(os.path.normpath(site_packages / row[0]))
        if path.is_file():
            removed += path.stat().st_size
            path.unlink()
            _remove_empty(path.parent, site_packages)
    if len(kept) < len(rows):
        with record.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows(kept)
    return removed


def _remove_empty(directory: Path, above: Path) -> None:
    """Remove a directory, and those over it, as long as they are empty and below this one."""
    while directory.is_relative_to(above) and directory != above and not any(directory.iterdir()):
        directory.rmdir()
        directory = directory.parent


def main() -> None:
    """Trim the installation that this runs in."""
    import sysconfig

    site_packages = Path(sysconfig.get_path("purelib"))
    if sys.prefix == sys.base_prefix:
        sys.exit("covey_device.trim: this is no venv; what others share is left as it is")
    print(f"{trim(site_packages) / 1e6:.0f} MB that no device uses removed from {site_packages}")  # noqa: T201


if __name__ == "__main__":
    main()
