"""Whose a device's files are. Loaded by every command: it imports nothing large."""

import os
from pathlib import Path


def as_owner(config_path: Path) -> None:
    """If root gives a command, be whom the device's keys belong to from here on: what root wrote among
    them, the service could not read. Where there is no device yet, nothing changes. Raises ConfigError."""
    if os.geteuid() != 0 or not config_path.exists():
        return
    from covey_device.config import load

    keys = (config_path.parent / load(config_path).identity).parent
    try:
        found = keys.stat()
    except OSError:
        return  # whoever reads it will say so
    if found.st_uid == 0:
        return
    os.setgroups([])
    os.setgid(found.st_gid)
    os.setuid(found.st_uid)
