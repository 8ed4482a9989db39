"""Enrols a device whose service it makes: what root joins, the service's user owns."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from covey_device import enrol
from covey_device.files import write_durably
from covey_device.installation import service
from covey_device.installation.machine import (
    Machine,
    MachineError,
    acting_as,
    acting_as_root,
)
from covey_shared.enrolment import Token
from covey_shared.errors import StorageError


@dataclass(frozen=True, slots=True)
class ServiceJoined:
    """What `enrol.join` did, and where the service is. copied: where the data were put, if they had to
    be. started: not, where nothing runs (offline)."""

    joined: enrol.Joined
    unit: Path
    copied: Path | None
    started: bool


def join(
    machine: Machine,
    token: Token,
    *,
    data: Path | None = None,
    expect_ca: str | None = None,
    force: bool = False,
    command: Path | None = None,
) -> ServiceJoined:
    """Install the service, enrol as its user, start it. command: the program that it runs.

    Raises CoveyError. Whatever was done by then stays, and the same again goes on from there.
    """
    config, home = machine.path(str(service.CONFIG)), machine.path(service.STATE)
    enrol.must_be_free(config, force)
    installed = service.install(machine, command)
    ids = installed.ids
    copied = None
    if data is not None and not _is_readable(data, ids):
        data = copied = _copied(data, home / "data", ids)
    with acting_as(ids):
        joined = enrol.join(
            token,
            config,
            data=data,
            expect_ca=expect_ca,
            force=force,
            home=home,
            write=lambda path, text: _write_as_root(path, text, ids[1]),
        )
    if not machine.offline:
        service.start(machine)
    return ServiceJoined(joined, installed.unit, copied, not machine.offline)


def _write_as_root(path: Path, text: bytes, group: int) -> None:
    """The configuration is its owner's to change, and the service's to read. Raises StorageError."""
    with acting_as_root():
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        write_durably(path, text)
        try:
            if os.geteuid() == 0:
                os.chown(path, 0, group)
            path.chmod(0o640)
        except OSError as error:
            raise StorageError(f"cannot change {path}: {error.strerror}") from error


def _is_readable(path: Path, ids: tuple[int, int]) -> bool:
    """Whether the service will be able to read it."""
    if str(path.resolve()).startswith(service.UNREACHABLE):
        return False
    with acting_as(ids):
        return os.access(path, os.R_OK, effective_ids=True)


def _copied(source: Path, directory: Path, ids: tuple[int, int]) -> Path:
    """A copy that belongs to the service, in place of one of that name. Raises MachineError."""
    target = directory / source.name
    fresh = target.with_name(f".{target.name}.new")
    try:
        with source.open("rb") as reading, acting_as(ids):
            fresh.unlink(missing_ok=True)
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            with open(os.open(fresh, flags, 0o640), "wb") as writing:  # noqa: PTH123
                os.fchmod(writing.fileno(), 0o640)
                shutil.copyfileobj(reading, writing, 1 << 20)
            fresh.replace(target)
    except OSError as error:
        raise MachineError(
            f"cannot copy {source} to {target}: {error.strerror}; the service reads no file in a home "
            f"directory: put it into {directory} yourself, and leave --data out"
        ) from error
    return target
