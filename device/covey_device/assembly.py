"""From device.toml to a running device: the one place where the parts are put together."""

import os
import random
import ssl
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from covey_device import config as configuration
from covey_device import tls
from covey_device.audit import Audit, AuditLog
from covey_device.budget import resident_bytes
from covey_device.cache import RESERVE_BYTES, BlobCache
from covey_device.config import BrokerConfig, DeviceConfig, PolicyFile
from covey_device.data.config import CsvData, IdxData, NpyData, NpzData, PythonData, ShardsData
from covey_device.home.files import ModelDirectory
from covey_device.home.keeper import Home
from covey_device.host.care import Care, care_of
from covey_device.host.port import FILE as SOCKET
from covey_device.host.port import LocalPort, directory_of
from covey_device.keystore import (
    MemoryFile,
    certificate_end,
    load_certificate,
    load_identity,
)
from covey_device.preparation import limits_of, trainer_factory
from covey_device.present import Present
from covey_device.renewal import WAITS, Renewal, trust_of
from covey_device.service import DeviceService
from covey_device.session import Session
from covey_shared.config import unreadable
from covey_shared.errors import ConfigError
from covey_shared.keys import SigningKey
from covey_shared.messages import DeviceId
from covey_shared.mqtt import MqttTransport
from covey_shared.secagg.cohort import Trust
from covey_shared.topics import OFFLINE, Topics
from covey_shared.transport import Will

SESSION_S = 300.0
"""What the broker kept for us while we were away for longer is not worth its time: all that matters of a
round is repeated, and the call is retained."""


@dataclass(frozen=True, slots=True)
class DeviceParts:
    """What a device is made of, read from disk and checked. base: device.toml's folder. certificate:
    empty while the fleet CA has yet to sign it."""

    path: Path
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
    trust = trust_of(config)
    identity = load_identity(base / config.identity)
    certificate = _certificate(config, base, trust, identity)
    password = None
    if config.broker.password_file is not None:
        password = password_of(base / config.broker.password_file)
    tls = tls_of(config.broker, base)
    memory = MemoryFile(base / config.state)
    policy = PolicyFile(base / config.policy)
    return DeviceParts(
        path, config, base, trust, identity, certificate, memory, policy, password, tls
    )


def _certificate(config: DeviceConfig, base: Path, trust: Trust, identity: SigningKey) -> bytes:
    path = base / config.certificate
    if config.enrol is not None and not path.exists():
        return b""  # the fleet CA has yet to sign it; `renewal` asks for it
    return load_certificate(path, trust.ca, config.fleet, config.device, identity.public)


def password_of(path: Path) -> str:
    """The first line of the file that `broker.password_file` names. Raises ConfigError."""
    try:
        return path.read_text(encoding="utf-8").split("\n", 1)[0].strip()
    except (OSError, UnicodeDecodeError) as error:
        raise unreadable(f"broker.password_file {path}", error) from error


def tls_of(broker: BrokerConfig, base: Path) -> ssl.SSLContext | None:
    """Trusts the configured authority, and no other; None if none is configured. base: device.toml's
    folder. Raises ConfigError."""
    if broker.ca_file is None:
        return None
    ca_file = base / broker.ca_file
    if broker.cert_file is not None and broker.key_file is not None:
        return tls.of_files(ca_file, base / broker.cert_file, base / broker.key_file)
    try:
        context = ssl.create_default_context(cafile=ca_file)
        # Python 3.13 would refuse an authority that does not say what its key is for, as a plain
        # `openssl req -x509` makes one: a fleet that works must not end with an upgrade. Nothing hangs on
        # that: its owner named this one authority in the file, and chain, name and dates are checked.
        context.verify_flags &= ~ssl.VERIFY_X509_STRICT
        return context
    except ssl.SSLError as error:
        raise ConfigError(f"broker.ca_file {ca_file} is no certificate in PEM") from error
    except OSError as error:
        raise unreadable(f"broker.ca_file {ca_file}", error) from error


def concerns(parts: DeviceParts, now_unix: float) -> list[str]:
    """What will keep this device out of rounds, as far as can be told without a round. A service
    starts all the same: data may be mounted later, and a clock without a battery may be wrong."""
    found = []
    enrolled = parts.config.enrol is not None
    if parts.certificate and (ends := certificate_end(parts.certificate)) < now_unix:
        day = time.strftime("%Y-%m-%d", time.gmtime(ends))
        anew = (
            "`covey-device renew` asks for another"
            if enrolled
            else "make another with `covey device add`"
        )
        found.append(f"the certificate ended on {day}: {anew}")
    data = parts.config.data
    files = {
        NpzData: ("file",),
        CsvData: ("file",),
        NpyData: ("features", "labels"),
        IdxData: ("features", "labels"),
        PythonData: (),
        ShardsData: ("directory",),
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


def cache_of(parts: DeviceParts) -> BlobCache | None:
    """Where plans and models are kept, back within its limit; None if its owner wants none."""
    config, base = parts.config.cache, parts.base
    directory = base / (config.directory or Path(parts.config.state, "cache"))
    cache = BlobCache(directory, config.max_mb * 1_000_000)
    if config.max_mb == 0:
        cache.clear()
        return None
    cache.tidy()
    return cache


def home_of(parts: DeviceParts) -> Home | None:
    """What keeps the model for this device's own applications; None if its owner wants none."""
    config = parts.config
    if not config.model.keep:
        return None
    policy = parts.policy

    def room() -> tuple[int, float]:
        limits = policy.current.limits
        free = limits.max_memory_mb * 1_000_000 - resident_bytes()
        return free, min(limits.trial_seconds, limits.max_seconds)

    return Home(
        ModelDirectory(config.model_directory(parts.base), reserve_bytes=RESERVE_BYTES),
        parts.trust,
        DeviceId(config.device),
        parts.identity,
        policy=lambda: policy.current.policy,
        room=room,
        rng=os.urandom,
        hook=config.model.hook,
        hook_seconds=config.model.hook_seconds,
    )


def port_of(parts: DeviceParts, service: DeviceService, care: Care) -> LocalPort:
    """The local socket of a service."""
    return LocalPort(
        directory_of(parts.base / parts.config.state) / SOCKET,
        care.waits,
        status=service.facts,
        explain=service.decisions,
        heeds=lambda: care.heeds_programs,
        clock=care.clock,
    )


def steady_clock() -> Callable[[], float]:
    """Seconds since 1970 when this was called, and from then on only what really passed: whoever sets
    the clock of a running device, by NTP or otherwise, changes nothing."""
    started = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
    return lambda: started + time.clock_gettime(time.CLOCK_BOOTTIME)


def certificates_in_words(parts: DeviceParts, now_unix: float) -> list[str]:
    """What this device can show of itself and until when, a line each, for its owner.

    Loads `cryptography` for a device with a TLS certificate: not for the service. Raises ConfigError for
    certificates that are not from whom this device trusts, or have ended.
    """
    from covey_device import enrol
    from covey_device.renewal import tls_life_of

    lines = []
    if parts.certificate:
        ends = tls.in_words(certificate_end(parts.certificate))
        lines.append(f"identity certificate: until {ends}")
    else:
        lines.append(f"identity certificate: none yet; {WAITS}")
    broker = parts.config.broker
    if broker.cert_file is not None and broker.ca_file is not None:
        path = parts.base / broker.cert_file
        if parts.config.enrol is not None:
            enrol.check_pair_file(path, parts.base / broker.ca_file, parts.config.device)
        life = tls_life_of(path)
        if life.ends_unix <= now_unix:
            raise ConfigError(
                f"the TLS certificate ended on {tls.in_words(life.ends_unix)}: set the clock if it is "
                "wrong, or ask your operator for a token and run `covey-device join --force`"
            )
        lines.append(f"TLS certificate: until {tls.in_words(life.ends_unix)}")
        if parts.config.enrol is not None:
            lines.append(f"renewal: by {tls.in_words(life.due_unix)} at the latest")
    return lines


def assemble(parts: DeviceParts) -> DeviceService:
    """A device service, not started."""
    config = parts.config
    device = DeviceId(config.device)
    policy, memory = parts.policy, parts.memory.load()
    session = Session(
        parts.trust,
        parts.identity,
        parts.certificate,
        device,
        policy.current.policy,
        memory,
        os.urandom,
        clock=steady_clock(),
        unfinished=parts.memory.unfinished(parts.trust, parts.identity.public, device),
    )
    transport = MqttTransport(
        config.broker.url,
        # A broker that knows its clients by certificates makes their names the client ids.
        device if config.broker.cert_file else f"{config.fleet}-{device}",
        username=config.broker.username,
        password=parts.password,
        tls=parts.tls,
        keepalive_s=config.broker.keepalive_s,
        session_s=SESSION_S,
        will=Will(Topics(config.fleet).presence(device), OFFLINE),
    )
    service = DeviceService(
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
        cache=cache_of(parts),
    )
    service.home = home_of(parts)
    service.care = care = care_of(policy, parts.base / config.state, os.environ)
    service.port = port_of(parts, service, care)
    service.present = present = Present(memory.signed_unix)
    if isinstance(parts.tls, tls.PinnedContext):
        parts.tls.clock = lambda: present.surely_unix
    if config.enrol is not None:
        service.renewal = Renewal(
            parts.path,
            device,
            lambda: _use_renewed(parts, service),
            waiting=not parts.certificate,
            uniform=random.SystemRandom().uniform,
        )
    return service


async def _use_renewed(parts: DeviceParts, service: DeviceService) -> None:
    """Certificates on the disk are new: the next connection and the next round use them."""
    config, base = parts.config, parts.base
    broker = config.broker
    if parts.tls is not None and broker.cert_file is not None and broker.key_file is not None:
        tls.load_own(parts.tls, base / broker.cert_file, base / broker.key_file)
    await service.recertify(_certificate(config, base, parts.trust, parts.identity))
