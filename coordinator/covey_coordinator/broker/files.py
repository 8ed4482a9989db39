"""Files that only we may read: a broker's directory holds password hashes and retained messages."""

import os
from pathlib import Path


def private_directory(path: Path) -> None:
    """Make the directory if need be; mode 0700 either way."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.chmod(0o700)


def write_private(path: Path, text: str) -> None:
    """Write a file of mode 0600. An old one goes first, whatever its mode or kind."""
    path.unlink(missing_ok=True)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(fd, "w", encoding="utf-8") as file:
        file.write(text)
