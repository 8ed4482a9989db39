"""What `covey-device join` made, and what its owner added: configuration, keys, certificates, state, data.

Nothing is loaded as the service loads it, for that makes directories and removes what is damaged. Whoever
runs this may be root, while the service is somebody else: what matters is what the service may read.
"""

import contextlib
import os
import re
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec

from covey_device import config as configuration
from covey_device.config import DeviceConfig, PolicyConfig, load_policy
from covey_device.doctor.findings import Finding, combined
from covey_device.doctor.machine import Account, Machine, account_of, group_name, unit_file
from covey_shared.errors import ConfigError, CoveyError, StorageError

AS_ROOT = "run it as root (sudo covey-device doctor) or as the service's user"
DAY_S = 86_400


@dataclass(frozen=True, slots=True)
class Enrolled:
    """A device.toml that can be used. base: its folder. service: who the service runs as."""

    path: Path
    config: DeviceConfig
    base: Path
    service: Account
    signed_unix: float = 0.0

    @property
    def state(self) -> Path:
        """Its directory, there or not."""
        return self.base / self.config.state

    @property
    def cache(self) -> Path:
        """Where plans and models are kept, likewise."""
        config = self.config
        return self.base / (config.cache.directory or Path(config.state, "cache"))


def load(path: Path, machine: Machine) -> tuple[Finding, Enrolled | None]:
    """device.toml. No Enrolled if there is nothing to go on with."""
    check = "configuration"
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return Finding(
            check, "note",
            f"this machine has not joined a fleet ({path} does not exist): only the machine is checked",
            "covey-device join TOKEN, with a token of your operator's `covey device token`",
        ), None  # fmt: skip
    except PermissionError:
        return Finding(check, "unknown", f"this user may not read {path}", AS_ROOT), None
    try:
        config = configuration.load(path)
    except ConfigError as error:
        if not os.access(path, os.R_OK):
            return Finding(check, "unknown", f"this user may not read {path}", AS_ROOT), None
        fix = f"correct {path}; docs/configuration.md has every key"
        return Finding(check, "problem", str(error), fix), None
    service = _service_account(config, path.parent, machine)
    enrolled = Enrolled(path, config, path.parent, service)
    said = Finding(check, "ok", f"{path}: device {config.device} of fleet {config.fleet}")
    readable = _readable(check, path, enrolled, machine)
    return (said if readable is None else readable), enrolled


def _service_account(config: DeviceConfig, base: Path, machine: Machine) -> Account:
    """The unit's user, or else whoever owns the identity key, or else whoever runs this."""
    found = re.findall(r"^User=(\S+)\s*$", unit_file(machine) or "", re.M)
    account = machine.account(found[-1]) if found else None
    if account is not None:
        return account
    with contextlib.suppress(OSError):
        return account_of((base / config.identity).stat().st_uid)
    return account_of(machine.uid)


# -- who may do what ------------------------------------------------------------------------------------


def may(account: Account, path: Path, wanted: int) -> bool | None:
    """Whether an account may do this with a file, going by modes: `wanted` is of os.R_OK, W_OK, X_OK. None if
    this process cannot see that far. Raises FileNotFoundError."""
    if account.uid == os.geteuid():
        path.stat()
        return os.access(path, wanted)
    try:
        for parent in reversed(path.absolute().parents):
            if not _allowed(account, parent.stat(), os.X_OK):
                return False
        return _allowed(account, path.stat(), wanted)
    except PermissionError:
        return None


def _allowed(account: Account, status: os.stat_result, wanted: int) -> bool:
    if account.uid == 0:
        return True
    shift = 6 if status.st_uid == account.uid else 3 if status.st_gid in account.gids else 0
    return (status.st_mode >> shift) & wanted == wanted


def _readable(check: str, path: Path, enrolled: Enrolled, machine: Machine) -> Finding | None:
    """What keeps the service from reading a file that is there; None if nothing does."""
    service = enrolled.service
    directory = path.is_dir()
    if may(service, path, os.R_OK | os.X_OK if directory else os.R_OK) is not False:
        return None
    status = path.stat()
    owner = f"{account_of(status.st_uid).name}:{group_name(status.st_gid)}"
    x = "x" if directory else ""
    if status.st_gid in service.gids:
        fix = f"sudo chmod g+r{x} {path}"
    else:
        fix = f"sudo chgrp {service.name} {path} && sudo chmod g+r{x} {path}"
    return Finding(
        check, "problem",
        f"the service's user {service.name} may not read {path} ({owner}, mode "
        f"{stat.S_IMODE(status.st_mode):04o})", f"{fix}, and let it into the directories above",
    )  # fmt: skip


# -- keys ----------------------------------------------------------------------------------------------


def keys(enrolled: Enrolled) -> Finding:
    """Secrets are there, their owner's alone, and the service's."""
    check, config, base = "keys", enrolled.config, enrolled.base
    secrets = {"identity key": config.identity}
    if config.broker.key_file is not None:
        secrets["TLS key"] = config.broker.key_file
    if config.broker.password_file is not None:
        secrets["broker password"] = config.broker.password_file
    parts = [_secret(what, base / name, enrolled) for what, name in secrets.items()]
    bad = [part for part in parts if part.verdict != "ok"]
    return combined(
        check,
        bad or [Finding(check, "ok", f"{', '.join(secrets)}: for {enrolled.service.name} alone")],
    )


def _secret(what: str, path: Path, enrolled: Enrolled) -> Finding:
    check, service = "keys", enrolled.service
    try:
        status = path.stat()
    except FileNotFoundError:
        fix = "restore it, or enrol this device anew with `covey-device join --force`"
        return Finding(check, "problem", f"{what} {path} does not exist", fix)
    except OSError as error:
        return Finding(check, "unknown", f"{what} {path}: {error.strerror}", AS_ROOT)
    mode = stat.S_IMODE(status.st_mode)
    if mode & 0o077 and what != "broker password":
        says = f"{what} {path} can be read by others (mode {mode:04o}): the service refuses it"
        return Finding(check, "problem", says, f"sudo chmod 600 {path}")
    if mode & 0o077:
        says = f"{what} {path} can be read by others (mode {mode:04o})"
        return Finding(check, "problem", says, f"sudo chmod 600 {path}")
    if may(service, path, os.R_OK) is False:
        owner = account_of(status.st_uid).name
        says = f"{what} {path} is {owner}'s: the service's user {service.name} cannot read it"
        return Finding(check, "problem", says, f"sudo chown {service.name} {path}")
    return Finding(check, "ok", what)


# -- certificates ------------------------------------------------------------------------------------------


def certificates(enrolled: Enrolled, now_unix: float) -> Finding:
    """Who signed this device's certificates, and what is left of their life."""
    check = "certificates"
    now = max(now_unix, enrolled.signed_unix)
    return combined(check, list(_certificates(check, enrolled, now)))


def _certificates(check: str, enrolled: Enrolled, now: float) -> Iterator[Finding]:
    from covey_device.keystore import load_identity
    from covey_device.renewal import WAITS, kept_certificate, life_of, tls_life_of, trust_of

    config, base = enrolled.config, enrolled.base
    token = "ask your operator for a token and run covey-device join --force"  # noqa: S105  no secret
    renew = (
        "sudo covey-device renew"
        if config.enrol
        else "have your operator run `covey device add` anew"
    )
    try:
        identity = load_identity(base / config.identity)
        own = kept_certificate(config, base, trust_of(config), identity)
    except ConfigError as error:
        if (
            denied := _denied(check, base / config.identity, base / config.certificate)
        ) is not None:
            yield denied
            return
        yield Finding(check, "problem", str(error), token if config.enrol else renew)
    else:
        if own is not None:
            life = life_of(own)
            yield _life(
                check, "identity", life.ends_unix, life.due_unix, now, renew, bool(config.enrol)
            )
        elif config.enrol is not None:
            yield Finding(
                check, "problem", f"no identity certificate yet: {WAITS}", "ask your operator"
            )
        else:
            yield Finding(check, "problem", f"{base / config.certificate} does not exist", renew)
    broker = config.broker
    if broker.cert_file is None or broker.ca_file is None:
        return
    from covey_device import enrol

    pair = base / broker.cert_file
    try:
        if config.enrol is not None:
            enrol.check_pair_file(pair, base / broker.ca_file, config.device)
        life = tls_life_of(pair)
    except CoveyError as error:
        yield _denied(check, pair, base / broker.ca_file) or Finding(
            check, "problem", str(error), token
        )
        return
    yield _life(check, "TLS", life.ends_unix, life.due_unix, now, renew, bool(config.enrol), token)


def _denied(check: str, *paths: Path) -> Finding | None:
    """The first that is there and that this user may not read."""
    for path in paths:
        try:
            if path.exists() and not os.access(path, os.R_OK):
                return Finding(check, "unknown", f"this user may not read {path}", AS_ROOT)
        except OSError:
            return Finding(check, "unknown", f"this user may not look at {path}", AS_ROOT)
    return None


def _life(
    check: str,
    what: str,
    ends_unix: float,
    due_unix: float,
    now: float,
    renew: str,
    renews: bool,
    over: str = "",
) -> Finding:
    day = time.strftime("%Y-%m-%d", time.gmtime(ends_unix))
    left = (ends_unix - now) / DAY_S
    if left <= 0:
        clock = "set the clock if it is wrong; otherwise "
        return Finding(
            check, "problem", f"the {what} certificate ended on {day}", clock + (over or renew)
        )
    days = f"{left:.0f} days" if left >= 2 else f"{left * 24:.0f} hours"
    says = f"{what} until {day}, {days} left"
    if renews and now > due_unix + 2 * DAY_S:
        return Finding(check, "note", f"{says}; its renewal is overdue", renew)
    if not renews and left < 14:
        return Finding(check, "note", f"{says}, and it is not renewed by itself", renew)
    return Finding(check, "ok", says)


# -- policy, state, data -----------------------------------------------------------------------------------


def policy(enrolled: Enrolled, machine: Machine) -> tuple[Finding, PolicyConfig | None]:
    """The owner's word can be read, by the service too, and written by nobody else."""
    check, path = "policy", enrolled.base / enrolled.config.policy
    try:
        found = load_policy(path)
    except ConfigError as error:
        if (denied := _denied(check, path)) is not None:
            return denied, None
        return Finding(
            check, "problem", str(error), f"correct {path}; docs/policy.md explains it"
        ), None
    there = path.exists()
    words = f"sums of at least {found.min_cohort} devices, {found.limits.max_memory_mb:,} MB"
    parts = [Finding(check, "ok", f"{path if there else 'the defaults'}: {words}")]
    if there:
        unreadable = _readable(check, path, enrolled, machine)
        parts += [] if unreadable is None else [unreadable]
    for file in (path, enrolled.path):
        with contextlib.suppress(OSError):
            if (mode := stat.S_IMODE(file.stat().st_mode)) & 0o022:
                parts.append(
                    Finding(
                        check, "problem", f"others may write {file} (mode {mode:04o})",
                        f"sudo chmod go-w {file}",
                    )
                )  # fmt: skip
    return combined(check, parts), found


def state(enrolled: Enrolled) -> tuple[Finding, float]:
    """What must outlive a crash is whole, and the service's alone -> and the latest time that the coordinator
    signed, 0 if none is known."""
    check, directory, service = "state", enrolled.state, enrolled.service
    try:
        status = directory.stat()
    except FileNotFoundError:
        return Finding(check, "ok", f"{directory} is not there yet: the first start makes it"), 0.0
    except OSError as error:
        return Finding(check, "unknown", f"{directory}: {error.strerror}", AS_ROOT), 0.0
    if may(service, directory, os.R_OK | os.W_OK | os.X_OK) is False:
        owner = account_of(status.st_uid).name
        return Finding(
            check, "problem",
            f"{directory} is {owner}'s: the service's user {service.name} cannot write there",
            f"sudo chown -R {service.name}: {directory}",
        ), 0.0  # fmt: skip
    if not os.access(directory, os.R_OK | os.X_OK):
        return Finding(check, "unknown", f"this user may not read {directory}", AS_ROOT), 0.0
    parts, signed_unix = [], 0.0
    try:
        last_round, signed_unix = _remembered(directory)
        parts.append(Finding(check, "ok", f"{directory}: last round {last_round}"))
    except PermissionError:
        parts.append(
            Finding(check, "unknown", f"this user may not read all of {directory}", AS_ROOT)
        )
    except StorageError as error:
        fix = "restore it from a backup, or enrol this device anew under another name"
        parts.append(Finding(check, "problem", str(error), fix))
    if (mode := stat.S_IMODE(status.st_mode)) & 0o022:
        says = f"others may write to it (mode {mode:04o})"
        parts.append(Finding(check, "problem", says, f"sudo chmod 700 {directory}"))
    elif mode & 0o005:
        says = f"others may look into it (mode {mode:04o})"
        parts.append(Finding(check, "note", says, f"sudo chmod 700 {directory}"))
    return combined(check, parts), signed_unix


class _Memory(msgspec.Struct):
    last_round: int
    signed_unix: int = 0


def _remembered(directory: Path) -> tuple[int, float]:
    """Last round, latest signed time. Raises StorageError for damage, PermissionError."""
    found = _Memory(0)
    for name, kind in (("memory.json", _Memory), ("votes.json", list)):
        path = directory / name
        try:
            data = msgspec.json.decode(path.read_bytes(), type=kind)
        except FileNotFoundError:
            continue
        except PermissionError:
            raise
        except OSError as error:
            raise StorageError(f"{path} cannot be read: {error.strerror}") from error
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise StorageError(f"{path} is damaged ({error})") from error
        if isinstance(data, _Memory):
            found = data
    return found.last_round, float(found.signed_unix)


def data(enrolled: Enrolled, machine: Machine, fits: Callable[[], str] | None = None) -> Finding:
    """What the device trains on is there, and the service may read it. fits: holds it against a plan ->
    what fits, in words; raises CoveyError. None without a plan."""
    check, table = "data", enrolled.config.data
    kind = str(msgspec.to_builtins(table)["kind"])
    if kind == "python":
        return _module(check, enrolled, machine, getattr(table, "function", ""))
    keys_ = (
        ("directory",)
        if kind == "shards"
        else ("file",)
        if hasattr(table, "file")
        else ("features", "labels")
    )
    paths = {key: enrolled.base / getattr(table, key) for key in keys_}
    for key, path in paths.items():
        try:
            there = path.exists()
        except OSError:
            return Finding(check, "unknown", f"this user may not look at {path}", AS_ROOT)
        if not there:
            fix = "put it there, or correct [data] in device.toml"
            return Finding(check, "problem", f"key data.{key}: {path} does not exist", fix)
        if (unreadable := _readable(check, path, enrolled, machine)) is not None:
            return unreadable
        if not os.access(path, os.R_OK):
            return Finding(check, "unknown", f"this user may not read {path}", AS_ROOT)
        if path.is_dir() != (kind == "shards"):
            is_ = "a directory" if path.is_dir() else "no directory"
            return Finding(
                check,
                "problem",
                f"key data.{key}: {path} is {is_}",
                "correct [data] in device.toml",
            )
        if path.is_file() and path.stat().st_size == 0:
            return Finding(
                check, "problem", f"key data.{key}: {path} is empty", "put the examples there"
            )
    names = ", ".join(str(path) for path in paths.values())
    if kind == "shards":
        return _shards(check, paths["directory"])
    if fits is not None:
        try:
            return Finding(check, "ok", f"{names}: {fits()}")
        except CoveyError as error:
            return Finding(check, "problem", str(error), "correct the data or [data]; docs/data.md")
    size = sum(path.stat().st_size for path in paths.values())
    return Finding(
        check, "ok", f"{names}, {size / 1e6:,.1f} MB, readable; no plan to hold it against yet"
    )


def _shards(check: str, directory: Path) -> Finding:
    shards = [
        p for p in sorted(directory.iterdir()) if p.suffix in (".npz", ".csv") and p.is_file()
    ]
    if not shards:
        fix = "have a local program write shards there; docs/data.md shows one"
        return Finding(check, "note", f"{directory} holds no shard yet", fix)
    size = sum(path.stat().st_size for path in shards)
    return Finding(check, "ok", f"{directory}: {len(shards):,} shards, {size / 1e6:,.1f} MB")


def _module(check: str, enrolled: Enrolled, machine: Machine, function: str) -> Finding:
    """A function of the owner's is looked for, and never called: whoever runs this may be root."""
    module = function.partition(":")[0]
    own = enrolled.base / f"{module.replace('.', '/')}.py"
    if own.exists():
        unreadable = _readable(check, own, enrolled, machine)
        return unreadable or Finding(check, "ok", f"{function}, in {own}; it is not called here")
    return Finding(
        check, "unknown", f"{function}: {own} does not exist, so that it is a module installed elsewhere",
    )  # fmt: skip
