"""covey.toml and run.toml: frozen types that mirror the files, validated once at load."""

import ipaddress
import re
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import msgspec
from msgspec import Meta

from covey_shared import config
from covey_shared.config import Config, FileName, Name, Seconds
from covey_shared.errors import ConfigError
from covey_shared.fixedpoint import MAX_CLIP, MAX_VALUE_BITS, MIN_CLIP, MIN_VALUE_BITS
from covey_shared.messages import MAX_COHORT
from covey_shared.mqtt import parse_broker_url

Cohort = Annotated[int, Meta(ge=2, le=MAX_COHORT)]
Port = Annotated[int, Meta(ge=1, le=65535)]
Host = Annotated[str, Meta(min_length=1, description="a host name or address in quotes")]
Clip = Annotated[float, Meta(ge=MIN_CLIP, le=MAX_CLIP)]
# Below this the repeats of one round would be a flood.
Interval = Annotated[float, Meta(ge=0.2, le=3600)]

MQTT_PORT = 1883
MQTTS_PORT = 8883
MAX_CONNECTIONS = 1024

_LABEL = r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9])?"
_HOST = re.compile(rf"(?=.{{1,253}}\Z){_LABEL}(\.{_LABEL})*")

T = TypeVar("T", bound=msgspec.Struct)


class BrokerConfig(Config, frozen=True):
    """[broker]. kind "external": url is a broker that somebody else runs; any other kind is started
    by `covey up` on this machine's loopback. password_file: its first line. ca_file: PEM, the authority
    of a mqtts:// broker's certificate, if the system does not know it. cert_file, key_file: PEM, who the
    coordinator is to a mqtts:// broker that asks for a certificate. max_connections: of a networked
    fleet's broker."""

    kind: Literal["auto", "embedded", "mosquitto", "external"] = "auto"
    port: Port | None = None
    url: str | None = None
    username: str = "coordinator"
    password_file: FileName | None = None
    ca_file: FileName | None = None
    cert_file: FileName | None = None
    key_file: FileName | None = None
    max_connections: Annotated[int, Meta(ge=16, le=200_000)] = MAX_CONNECTIONS


class EnrolConfig(Config, frozen=True):
    """[enrol], of a networked fleet. days: how long devices' certificates last; token_hours: how long a
    token may be used."""

    port: Port = 8884
    days: Annotated[int, Meta(ge=1, le=3650)] = 90
    token_hours: Annotated[float, Meta(gt=0, le=8760)] = 24.0


class FleetConfig(Config, frozen=True):
    """covey.toml. address: hosts by which devices find the coordinator, the one that they are told
    first; without it the fleet is local, and its broker on loopback."""

    fleet: Name
    address: Host | Annotated[tuple[Host, ...], Meta(min_length=1)] | None = None
    broker: BrokerConfig = BrokerConfig()
    enrol: EnrolConfig = EnrolConfig()

    @property
    def addresses(self) -> tuple[str, ...]:
        """The fleet's hosts; empty for a local fleet."""
        if self.address is None:
            return ()
        return (self.address,) if isinstance(self.address, str) else self.address

    @property
    def networked(self) -> bool:
        """Whether devices join over the network."""
        return self.address is not None

    @property
    def broker_port(self) -> int:
        """Where the broker that `covey up` runs listens."""
        return self.broker.port or (MQTTS_PORT if self.networked else MQTT_PORT)


class WorkConfig(Config, frozen=True):
    """[work]: what each device does in a round, at most."""

    batches: Annotated[int, Meta(ge=1, le=2**31)] = 10
    batch_size: Annotated[int, Meta(ge=1, le=2**20)] = 32
    seconds: Seconds = 300.0
    hyper: dict[str, float] = msgspec.field(default_factory=dict)


class CohortConfig(Config, frozen=True):
    """[cohort]: how many devices. goal: updates that are enough; minimum: fewest in a sum."""

    goal: Cohort = 10
    minimum: Cohort = 3
    over_selection: Annotated[float, Meta(ge=0, le=1)] = 0.0


class EncodingConfig(Config, frozen=True):
    """[encoding]: floats to integers. clip: of one coordinate of a device's difference; loss_clip:
    of its mean loss; max_weight: examples beyond which a device's voice stops growing."""

    value_bits: Annotated[int, Meta(ge=MIN_VALUE_BITS, le=MAX_VALUE_BITS)] = 16
    clip: Clip = 1.0
    loss_clip: Clip = 20.0
    max_weight: Annotated[int, Meta(ge=1, le=2**31)] = 1000


class DeadlinesConfig(Config, frozen=True):
    """[deadlines]: the longest that each phase waits, in seconds."""

    gather_s: Seconds = 30.0
    share_s: Seconds = 30.0
    collect_s: Seconds = 600.0
    unmask_s: Seconds = 30.0
    absent_grace_s: Annotated[float, Meta(ge=0, le=3600)] = 3.0
    resend_s: Interval = 5.0


class PaceConfig(Config, frozen=True):
    """[pace]: what the coordinator's machine and network bear, of a fleet of more than a few dozen
    devices; see `pace.Capacity`."""

    devices_per_s: Annotated[float, Meta(gt=0, le=1_000_000)] = 50.0
    mb_per_s: Annotated[float, Meta(gt=0, le=1_000_000)] = 10.0


class TranscriptsConfig(Config, frozen=True):
    """[transcripts]: what is kept of each round for a third party to check. full: with the masked
    updates of the last full_rounds rounds, or of fewer, so that they take at most max_mb."""

    keep: Literal["full", "signatures", "off"] = "full"
    full_rounds: Annotated[int, Meta(ge=1, le=1_000_000)] = 10
    max_mb: Annotated[int, Meta(ge=1, le=10**9)] = 1000


class ModelsConfig(Config, frozen=True):
    """[models]: of how many completed rounds the model is kept, to go back to. The last one and the best
    one are kept whatever this says."""

    keep_rounds: Annotated[int, Meta(ge=1, le=1_000_000)] = 20


class EvaluationConfig(Config, frozen=True):
    """[evaluation]: a held-out set on the coordinator: an .npz file with two arrays."""

    file: FileName
    features: str = "features"
    labels: str = "labels"


class RunConfig(Config, frozen=True):
    """run.toml. plan and evaluation.file are relative to the file."""

    plan: FileName
    rounds: Annotated[int, Meta(ge=1, le=1_000_000)] = 20
    server_lr: Annotated[float, Meta(gt=0, le=1000)] = 1.0
    cohort: CohortConfig = CohortConfig()
    work: WorkConfig = WorkConfig()
    encoding: EncodingConfig = EncodingConfig()
    deadlines: DeadlinesConfig = DeadlinesConfig()
    pace: PaceConfig = PaceConfig()
    transcripts: TranscriptsConfig = TranscriptsConfig()
    models: ModelsConfig = ModelsConfig()
    evaluation: EvaluationConfig | None = None


def load(path: Path, kind: type[T], *, hint: str) -> T:
    """Read a configuration file. hint: where such a file comes from. Raises ConfigError."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist; {hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise config.unreadable(path, error) from error
    return config.parse(text, kind, file=str(path))


def load_fleet(directory: Path) -> FleetConfig:
    """covey.toml of a fleet's directory. Raises ConfigError."""
    path = directory / "covey.toml"
    fleet = load(path, FleetConfig, hint="`covey init` makes a fleet")
    check_fleet(fleet, file=str(path))
    return fleet


def check_fleet(fleet: FleetConfig, *, file: str) -> None:
    """What the types cannot say. Raises ConfigError."""
    broker = fleet.broker
    for host in fleet.addresses:
        try:
            normal_host(host)
        except ConfigError as error:
            raise ConfigError(f"{file}: key `address`: {error}") from error
    if fleet.networked and broker.kind == "embedded":
        raise ConfigError(
            f'{file}: key `broker.kind` is "embedded", which is for one machine; a fleet with an '
            '`address` needs mosquitto: set it to "mosquitto" or "external"'
        )
    if fleet.networked and broker.kind != "external" and fleet.broker_port == fleet.enrol.port:
        raise ConfigError(f"{file}: keys `broker.port` and `enrol.port` are the same; change one")
    if (broker.kind == "external") != (broker.url is not None):
        raise ConfigError(
            f'{file}: key `broker.url` goes with `broker.kind = "external"`, and only with it'
        )
    tls = False
    if broker.url is not None:
        try:
            tls = parse_broker_url(broker.url).tls
        except ConfigError as error:
            raise ConfigError(f"{file}: key `broker.url`: {error}") from error
    if fleet.networked and broker.url is not None and not tls:
        raise ConfigError(
            f"{file}: key `broker.url`: a fleet with an `address` needs TLS: mqtts://HOST:PORT"
        )
    for key in ("ca_file", "cert_file", "key_file"):
        if getattr(broker, key) is not None and not tls:
            raise ConfigError(f"{file}: key `broker.{key}` goes with a `broker.url` of mqtts://")
    if (broker.cert_file is None) != (broker.key_file is None):
        raise ConfigError(f"{file}: keys `broker.cert_file` and `broker.key_file` go together")


def normal_host(name: str) -> str:
    """A host in its one spelling: lower case, addresses in their usual form. Raises ConfigError."""
    host = name.lower().removesuffix(".")
    try:
        host = str(ipaddress.ip_address(name.removeprefix("[").removesuffix("]")))
        usable = "%" not in host  # a zone means something on one machine only
    except ValueError:
        usable = bool(_HOST.fullmatch(host)) and not host.replace(".", "").isdigit()
    if not usable:
        raise ConfigError(
            f"{name!r} is no host: give a name of letters, digits, dots and hyphens, or an address"
        )
    return host


def check_run(run: RunConfig, *, file: str) -> None:
    """What the types cannot say. Raises ConfigError."""
    if run.cohort.minimum > run.cohort.goal:
        raise ConfigError(
            f"{file}: key `cohort.minimum` is {run.cohort.minimum}, above `cohort.goal` "
            f"({run.cohort.goal}); lower it, or raise the goal"
        )
