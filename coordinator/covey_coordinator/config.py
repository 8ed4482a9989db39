"""covey.toml and run.toml: frozen types that mirror the files, validated once at load."""

from pathlib import Path
from typing import Annotated, Literal, TypeVar

import msgspec
from msgspec import Meta

from covey_shared import config
from covey_shared.config import Config
from covey_shared.errors import ConfigError
from covey_shared.fixedpoint import MAX_VALUE_BITS, MIN_VALUE_BITS
from covey_shared.messages import MAX_COHORT

Name = Annotated[str, Meta(pattern=r"^[a-z0-9]([a-z0-9-]{0,30}[a-z0-9])?$")]
Positive = Annotated[float, Meta(gt=0)]
Cohort = Annotated[int, Meta(ge=2, le=MAX_COHORT)]

T = TypeVar("T", bound=msgspec.Struct)


class BrokerConfig(Config, frozen=True):
    """[broker]. kind "external": url is a broker that somebody else runs; any other kind is started
    by `covey up` on this machine's loopback. password_file: its first line."""

    kind: Literal["auto", "embedded", "mosquitto", "external"] = "auto"
    port: Annotated[int, Meta(ge=1, le=65535)] = 1883
    url: str | None = None
    username: str = "coordinator"
    password_file: str | None = None


class FleetConfig(Config, frozen=True):
    """covey.toml."""

    fleet: Name
    broker: BrokerConfig = BrokerConfig()


class WorkConfig(Config, frozen=True):
    """[work]: what each device does in a round, at most."""

    batches: Annotated[int, Meta(ge=1, le=2**31)] = 10
    batch_size: Annotated[int, Meta(ge=1, le=2**20)] = 32
    seconds: Positive = 300.0
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
    clip: Positive = 1.0
    loss_clip: Positive = 20.0
    max_weight: Annotated[int, Meta(ge=1, le=2**31)] = 1000


class DeadlinesConfig(Config, frozen=True):
    """[deadlines]: the longest that each phase waits, in seconds."""

    gather_s: Positive = 30.0
    share_s: Positive = 30.0
    collect_s: Positive = 600.0
    unmask_s: Positive = 30.0
    absent_grace_s: Positive = 3.0
    resend_s: Positive = 5.0


class EvaluationConfig(Config, frozen=True):
    """[evaluation]: a held-out set on the coordinator: an .npz file with two arrays."""

    file: str
    features: str = "features"
    labels: str = "labels"


class RunConfig(Config, frozen=True):
    """run.toml. plan and evaluation.file are relative to the file."""

    plan: str
    rounds: Annotated[int, Meta(ge=1, le=1_000_000)] = 20
    server_lr: Positive = 1.0
    cohort: CohortConfig = CohortConfig()
    work: WorkConfig = WorkConfig()
    encoding: EncodingConfig = EncodingConfig()
    deadlines: DeadlinesConfig = DeadlinesConfig()
    evaluation: EvaluationConfig | None = None


def load(path: Path, kind: type[T], *, hint: str) -> T:
    """Read a configuration file. hint: where such a file comes from. Raises ConfigError."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist; {hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    return config.parse(text, kind, file=str(path))


def load_fleet(directory: Path) -> FleetConfig:
    """covey.toml of a fleet's directory. Raises ConfigError."""
    fleet = load(directory / "covey.toml", FleetConfig, hint="`covey init` makes a fleet")
    if (fleet.broker.kind == "external") != (fleet.broker.url is not None):
        raise ConfigError(
            f'{directory / "covey.toml"}: key `broker.url` goes with kind = "external", and only '
            "with it"
        )
    return fleet


def check_run(run: RunConfig, *, file: str) -> None:
    """What the types cannot say. Raises ConfigError."""
    if run.cohort.minimum > run.cohort.goal:
        raise ConfigError(
            f"{file}: key `cohort.minimum` is {run.cohort.minimum}, above `cohort.goal` "
            f"({run.cohort.goal}); lower it"
        )
