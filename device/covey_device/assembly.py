"""From device.toml to a running device: the one place where the parts are put together."""

import os
import ssl
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from covey_device import config as configuration
from covey_device.audit import Audit, AuditLog
from covey_device.config import DeviceConfig, PolicyFile
from covey_device.data.config import CsvData, IdxData, NpyData, NpzData, PythonData
from covey_device.keystore import (
    MemoryFile,
    certificate_end,
    load_certificate,
    load_identity,
)
from covey_device.service import DeviceService, limits_of, trainer_factory
from covey_device.session import Session
from covey_shared.config import unreadable
from covey_shared.errors import ConfigError
from covey_shared.keys import PublicKey, SigningKey
from covey_shared.messages import DeviceId
from covey_shared.mqtt import MqttTransport
from covey_shared.secagg.cohort import Trust
from covey_shared.topics import OFFLINE, Topics
from covey_shared.transport import Will


@dataclass(frozen=True, slots=True)
class DeviceParts:
    """What a device is made of, read from disk and checked. base: device.toml's folder."""

    config: DeviceConfig
    base: Path
    trust: Trust
    identity: SigningKey
    certificate: bytes
    memory: MemoryFile
    policy: PolicyFile
    password: str | None
    tls: ssl.SSLContext | None


def load_device(path: Path) -> DeviceParts:
    """Read and check everything that device.toml names. Raises ConfigError or StorageError."""
    config, base = configuration.load(path), path.parent
    trust = Trust(
        config.fleet,
        PublicKey(bytes.fromhex(config.trust.fleet_ca)),
        PublicKey(bytes.fromhex(config.trust.coordinator)),
    )
    identity = load_identity(base / config.identity)
    certificate = load_certificate(
        base / config.certificate, trust.ca, config.fleet, config.device, identity.public
    )
    password = None
    if config.broker.password_file is not None:
        password = _password(base / config.broker.password_file)
    tls = None if config.broker.ca_file is None else _tls(base / config.broker.ca_file)
    memory = MemoryFile(base / config.state)
    policy = PolicyFile(base / config.policy)
    return DeviceParts(config, base, trust, identity, certificate, memory, policy, password, tls)


def _password(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").split("\n", 1)[0].strip()
    except (OSError, UnicodeDecodeError) as error:
        raise unreadable(f"broker.password_file {path}", error) from error


def _tls(ca_file: Path) -> ssl.SSLContext:
    """Trusts this authority, and no other."""
    try:
        return ssl.create_default_context(cafile=ca_file)
    except ssl.SSLError as error:
        raise ConfigError(f"broker.ca_file {ca_file} is no certificate in PEM") from error
    except OSError as error:
        raise unreadable(f"broker.ca_file {ca_file}", error) from error


def concerns(parts: DeviceParts, now_unix: float) -> list[str]:
    """What will keep this device out of rounds, as far as can be told without a round. A service
    starts all the same: data may be mounted later, and a clock without a battery may be wrong."""
    found = []
    ends = certificate_end(parts.certificate)
    if ends < now_unix:
        day = time.strftime("%Y-%m-%d", time.gmtime(ends))
        found.append(f"the certificate ended on {day}: make another with `covey device add`")
    data = parts.config.data
    files = {
        NpzData: ("file",),
        CsvData: ("file",),
        NpyData: ("features", "labels"),
        IdxData: ("features", "labels"),
        PythonData: (),
    }[type(data)]
    for key in files:
        path = parts.base / getattr(data, key)
        if not path.exists():
            found.append(
                f"key `data.{key}`: {path} does not exist: put it there, or correct [data]"
            )
    return found


def audit_of(parts: DeviceParts) -> Audit:
    """The device's own record, in its state directory."""
    return Audit(AuditLog(parts.base / parts.config.state))


def steady_clock() -> Callable[[], float]:
    """Seconds since 1970 when this was called, and from then on only what really passed: whoever sets
    the clock of a running device, by NTP or otherwise, changes nothing."""
    started = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
    return lambda: started + time.clock_gettime(time.CLOCK_BOOTTIME)


def assemble(parts: DeviceParts) -> DeviceService:
    """A device service, not started."""
    config = parts.config
    device = DeviceId(config.device)
    policy = parts.policy
    session = Session(
        parts.trust,
        parts.identity,
        parts.certificate,
        device,
        policy.current.policy,
        parts.memory.load(),
        os.urandom,
        clock=steady_clock(),
    )
    transport = MqttTransport(
        config.broker.url,
        f"{config.fleet}-{device}",
        username=config.broker.username,
        password=parts.password,
        tls=parts.tls,
        keepalive_s=config.broker.keepalive_s,
        will=Will(Topics(config.fleet).presence(device), OFFLINE),
    )
    return DeviceService(
        session,
        parts.identity,
        config.fleet,
        transport,
        parts.memory,
        trainer_factory(config, parts.base, policy),
        limits=limits_of(policy.current.limits),
        rng=os.urandom,
        # One thread each: every further one would cost a memory arena of its own.
        pool=ThreadPoolExecutor(1, "covey-protocol"),
        train_pool=ThreadPoolExecutor(1, "covey-training"),
        policy=policy,
        audit=audit_of(parts),
    )
