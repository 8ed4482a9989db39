"""device.toml: everything that an owner can set, as frozen types that mirror the file."""

from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from covey_device.data import DataConfig
from covey_device.host.config import HostConfig
from covey_device.policy import MAX_ROUNDS_PER_DAY, Policy
from covey_shared import config
from covey_shared.config import Config, FileName, HexKey, Name, PositiveInt, Seconds
from covey_shared.errors import ConfigError
from covey_shared.messages import MAX_COHORT
from covey_shared.mqtt import parse_broker_url

DEFAULT_POLICY = "policy.toml"

PlanHex = Annotated[
    str,
    Meta(
        pattern=r"^[0-9a-f]{64}\Z",
        description="a plan's hash in quotes: 64 hexadecimal digits, lower case",
    ),
]


class BrokerConfig(Config, frozen=True):
    """[broker]: where the fleet meets. password_file: its first line is the password. ca_file: PEM, the
    authority of a mqtts:// broker's certificate, if the system does not know it. cert_file, key_file:
    PEM, perhaps one file: who this device is to a broker that asks for certificates."""

    url: str
    username: str | None = None
    password_file: FileName | None = None
    ca_file: FileName | None = None
    cert_file: FileName | None = None
    key_file: FileName | None = None
    keepalive_s: Annotated[int, Meta(ge=5, le=3600)] = 60


class EnrolConfig(Config, frozen=True):
    """[enrol]: where certificates are renewed; `covey-device join` writes it."""

    host: Annotated[str, Meta(min_length=1, description="a host name or address in quotes")]
    port: Annotated[int, Meta(ge=1, le=65535)] = 8884


class TrustConfig(Config, frozen=True):
    """[trust]: the two public keys this device believes, in hexadecimal."""

    fleet_ca: HexKey
    coordinator: HexKey


class CacheConfig(Config, frozen=True):
    """[cache]: plans and models that are kept on the disk. max_mb: what they may take; 0: none are.
    directory: where; without one, `cache` in the state directory."""

    max_mb: Annotated[int, Meta(ge=0, le=1_000_000)] = 200
    directory: FileName | None = None


class ModelConfig(Config, frozen=True):
    """[model]: what the fleet has learned, kept for this device's own applications. directory: where; without
    one, `model` beside `state`. hook: a command and its arguments, run on a new model for
    hook_seconds at most."""

    keep: bool = True
    directory: FileName | None = None
    hook: tuple[Annotated[str, Meta(min_length=1)], ...] = ()
    hook_seconds: Seconds = 60.0


class DeviceConfig(Config, frozen=True):
    """device.toml. Paths in it are relative to the file."""

    fleet: Name
    device: Name
    broker: BrokerConfig
    trust: TrustConfig
    data: DataConfig
    identity: FileName = "identity.key"
    certificate: FileName = "certificate"
    state: FileName = "state"
    policy: FileName = DEFAULT_POLICY
    enrol: EnrolConfig | None = None
    cache: CacheConfig = CacheConfig()
    model: ModelConfig = ModelConfig()

    def model_directory(self, base: Path) -> Path:
        """Where the model is kept for this device's own applications. base: device.toml's folder."""
        beside = Path(self.state).parent
        # That one is the device's alone; `join` names one in it for each enrolment.
        if beside.name == "state":
            beside = beside.parent
        return base / (self.model.directory or beside / "model")


class LimitsConfig(Config, frozen=True):
    """[limits]: the most this device gives to one round, whatever a round asks for."""

    max_batches: PositiveInt = 10_000
    max_seconds: Seconds = 600.0
    max_memory_mb: PositiveInt = 400
    threads: Annotated[int, Meta(ge=1, le=64)] = 1
    trial_seconds: Seconds = 60.0


class PolicyConfig(Config, frozen=True):
    """policy.toml, the owner's own: rounds this device refuses, whatever the coordinator says."""

    min_cohort: Annotated[int, Meta(ge=2, le=MAX_COHORT)] = 3
    max_weight: PositiveInt = 1_000_000
    max_revisions: Annotated[int, Meta(ge=0)] = 50
    rounds_per_day: Annotated[int, Meta(ge=0, le=MAX_ROUNDS_PER_DAY)] = 0
    plans: Annotated[tuple[PlanHex, ...], Meta(min_length=1)] | None = None
    owners: Annotated[tuple[HexKey, ...], Meta(min_length=1)] | None = None
    limits: LimitsConfig = LimitsConfig()
    host: HostConfig = HostConfig()

    @property
    def policy(self) -> Policy:
        """What decides about rounds."""
        return Policy(
            min_cohort=self.min_cohort,
            max_weight=self.max_weight,
            max_revisions=self.max_revisions,
            rounds_per_day=self.rounds_per_day,
            plans=frozenset(map(bytes.fromhex, self.plans or ())),
            owners=frozenset(map(bytes.fromhex, self.owners or ())),
        )

    def facts(self) -> dict[str, Any]:
        """Every key with its value, as a table."""
        return dict(msgspec.to_builtins(self))

    def in_words(self) -> list[str]:
        """What this device does and does not, a line each, for its owner."""
        limits, lines = self.limits, []
        lines.append(f"takes part in sums of at least {self.min_cohort} devices")
        lines.append(f"counts in a sum for at most {self.max_weight:,} examples")
        lines.append(
            f"gives an update to one and the same model at most {1 + self.max_revisions:,} times"
        )
        lines.append(
            f"joins at most {_rounds(self.rounds_per_day)} a day"
            if self.rounds_per_day
            else "joins any number of rounds a day"
        )
        if self.plans:
            lines.append(f"runs only the plans {_listed(self.plans)}")
        if self.owners:
            lines.append(f"runs only plans signed by {_listed(self.owners)}")
        if not self.plans and not self.owners:
            lines.append("runs any plan of the coordinator")
        lines.append(
            f"trains at most {limits.max_batches:,} batches and {limits.max_seconds:g} seconds a "
            f"round, on {limits.threads} thread{'s' if limits.threads > 1 else ''}, within "
            f"{limits.max_memory_mb:,} MB"
        )
        lines.append(f"tries a plan it has not seen for at most {limits.trial_seconds:g} seconds")
        lines += self.host.in_words()
        return lines


def _rounds(count: int) -> str:
    return "1 round" if count == 1 else f"{count:,} rounds"


def _listed(names: tuple[str, ...]) -> str:
    short = [f"{name[:16]}..." for name in names]
    return short[0] if len(short) == 1 else f"{', '.join(short[:-1])} or {short[-1]}"


def load_policy(path: Path) -> PolicyConfig:
    """Read policy.toml. Without one everything is at its default. Raises ConfigError that names the
    file and the key; also if another name was given and there is no such file."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        if path.name == DEFAULT_POLICY:
            return PolicyConfig()
        raise ConfigError(
            f"{path} does not exist; key `policy` of device.toml names it: write one, or remove the key"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise config.unreadable(path, error) from error
    return config.parse(text, PolicyConfig, file=str(path))


class PolicyFile:
    """policy.toml, read when it is there and again when it changed; never written.

    current: what holds. Raises ConfigError, at the start and whenever it is read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stamp = self._look()
        self._was_there = self._stamp is not None
        self.current = load_policy(path)

    def refresh(self, *, anyway: bool = False) -> bool:
        """Read it again if it changed, or `anyway`; whether something else holds now.

        Raises ConfigError, once for each change, for a file that cannot be used or is gone; what held
        before goes on holding.
        """
        stamp = self._look()
        if stamp == self._stamp and not anyway:
            return False
        self._stamp = stamp
        self._was_there = self._was_there or stamp is not None
        if stamp is None and self._was_there:
            # Its owner may be about to write it anew; what it forbade is not allowed meanwhile.
            raise ConfigError(f"{self.path} is gone; what it said holds until the next start")
        was, self.current = self.current, load_policy(self.path)
        return self.current != was

    def _look(self) -> tuple[int, int, int] | None:
        try:
            status = self.path.stat()
        except OSError:
            return None
        return status.st_mtime_ns, status.st_size, status.st_ino


def load(path: Path) -> DeviceConfig:
    """Read device.toml. Raises ConfigError that names the file and the key."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(
            f"{path} does not exist; `covey-device join TOKEN` writes one (for a device on the "
            "coordinator's own machine, `covey device add NAME`)"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise config.unreadable(path, error) from error
    device = config.parse(text, DeviceConfig, file=str(path))
    try:
        url = parse_broker_url(device.broker.url)
    except ConfigError as error:
        raise ConfigError(f"{path}: key `broker.url`: {error}") from error
    if device.broker.password_file and not (device.broker.username or url.username):
        raise ConfigError(
            f"{path}: key `broker.username` is missing; `broker.password_file` goes with it"
        )
    for key in ("ca_file", "cert_file", "key_file"):
        if getattr(device.broker, key) and not url.tls:
            raise ConfigError(f"{path}: key `broker.{key}` goes with a `broker.url` of mqtts://")
    if (device.broker.cert_file is None) != (device.broker.key_file is None):
        raise ConfigError(f"{path}: keys `broker.cert_file` and `broker.key_file` go together")
    if device.broker.cert_file and not device.broker.ca_file:
        raise ConfigError(
            f"{path}: key `broker.ca_file` is missing; `broker.cert_file` goes with it"
        )
    if device.enrol and (
        device.broker.cert_file is None or device.broker.cert_file != device.broker.key_file
    ):
        # A new key and its certificate can only be put in place together as one file.
        raise ConfigError(
            f"{path}: table `enrol` goes with `broker.cert_file` and `broker.key_file` that are one "
            "and the same file"
        )
    return device
