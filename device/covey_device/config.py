"""device.toml: everything that an owner can set, as frozen types that mirror the file."""

from pathlib import Path
from typing import Annotated

from msgspec import Meta

from covey_device.data import DataConfig
from covey_shared import config
from covey_shared.config import Config, FileName, HexKey, Name, PositiveInt, Seconds
from covey_shared.errors import ConfigError
from covey_shared.messages import MAX_COHORT
from covey_shared.mqtt import parse_broker_url


class BrokerConfig(Config, frozen=True):
    """[broker]: where the fleet meets. password_file: its first line is the password. ca_file: PEM, the
    authority of a mqtts:// broker's certificate, if the system does not know it."""

    url: str
    username: str | None = None
    password_file: FileName | None = None
    ca_file: FileName | None = None
    keepalive_s: Annotated[int, Meta(ge=5, le=3600)] = 60


class TrustConfig(Config, frozen=True):
    """[trust]: the two public keys this device believes, in hexadecimal."""

    fleet_ca: HexKey
    coordinator: HexKey


class LimitsConfig(Config, frozen=True):
    """[limits]: the most this device gives to one round, whatever a round asks for."""

    max_batches: PositiveInt = 10_000
    max_seconds: Seconds = 600.0
    max_memory_mb: PositiveInt = 400
    threads: Annotated[int, Meta(ge=1, le=64)] = 1


class PolicyConfig(Config, frozen=True):
    """[policy]: rounds this device refuses, whatever the coordinator says."""

    min_cohort: Annotated[int, Meta(ge=2, le=MAX_COHORT)] = 3
    max_weight: PositiveInt = 1_000_000
    max_revisions: Annotated[int, Meta(ge=0)] = 50


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
    limits: LimitsConfig = LimitsConfig()
    policy: PolicyConfig = PolicyConfig()


def load(path: Path) -> DeviceConfig:
    """Read device.toml. Raises ConfigError that names the file and the key."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(
            f"{path} does not exist; `covey device add NAME` on the coordinator writes one"
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
    if device.broker.ca_file and not url.tls:
        raise ConfigError(f"{path}: key `broker.ca_file` goes with a `broker.url` of mqtts://")
    return device
