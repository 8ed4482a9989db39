"""What a round of a plan costs on this machine: seconds of each phase, bytes, memory.

Measured where that is cheap: a training step in the plan's own trial (a child process under the owner's
limits), keys and boxes for a few peers, encoding, masking and packing on a slice of the update. The rest is
arithmetic: so many batches, peers and parameters. What it cannot know is how long the others take.
"""

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from covey_device import trials
from covey_device.config import LimitsConfig
from covey_device.doctor.children import run
from covey_device.doctor.findings import Finding, combined
from covey_device.doctor.machine import Machine, meminfo
from covey_device.doctor.round import Round
from covey_shared import fixedpoint, keys, masking, sharing
from covey_shared.errors import ConfigError, CoveyError, MalformedError
from covey_shared.fixedpoint import Encoding
from covey_shared.plan import (
    MAX_GRAPH_BYTES,
    MAX_HEADER_BYTES,
    PlanHeader,
    check_graph,
    decode_header,
    plan_hash,
)
from covey_shared.secagg.parameters import parameters_for

SLICE = 1 << 18
"""Coordinates that encoding and masking are timed on: more than a cache holds."""

FEW = 6
"""Peers that keys and boxes are timed for."""

STEPS = 10
VALUE_BITS = 16
"""What run.toml has if it says nothing else; METRICS as well."""

METRICS = 1
ROUND_BYTES = 4_000_000
"""Of memory: threads, messages on their way, a batch of the data. The difference to services that were
measured in rounds."""

CHECK_IN_BYTES = 320
BOX_BYTES = 82
VOTE_BYTES = 114
"""Of messages, for each device of the cohort; with what MessagePack adds."""

_MB = 1_000_000


@dataclass(frozen=True, slots=True)
class Plan:
    """A plan's header and training graph. origin: where it is from, for people."""

    header: PlanHeader
    header_bytes: bytes
    graph: bytes
    origin: str

    @property
    def hash(self) -> str:
        """In hexadecimal."""
        return plan_hash(self.header_bytes).hex()


@dataclass(frozen=True, slots=True)
class Estimate:
    """Seconds by phase, in the order of a round; bytes each way; memory in bytes, at the highest.

    once_s: for a plan that is new, its trial and its transfer on top. service_bytes: of the memory, what the
    service holds whatever the plan. batch_s: one of the batches that `train` is made of.
    """

    plan: str
    name: str
    n_params: int
    round: Round
    phases: dict[str, float]
    once_s: float
    batch_s: float
    down_bytes: int
    up_bytes: int
    service_bytes: int
    training_bytes: int
    masking_bytes: int

    @property
    def seconds(self) -> float:
        """All phases."""
        return sum(self.phases.values())

    @property
    def peak_bytes(self) -> int:
        """The most that the service holds at any time of the round."""
        return max(self.training_bytes, self.masking_bytes)

    def facts(self) -> dict[str, Any]:
        """For programs."""
        return asdict(self) | {"seconds": self.seconds, "peak_bytes": self.peak_bytes}


# -- which plan ------------------------------------------------------------------------------------------


def plan_at(path: Path) -> Plan:
    """A plan's directory, or the plan.json in it. Raises ConfigError."""
    file = path / "plan.json" if path.is_dir() else path
    what = (
        "--plan takes a plan's directory, as `covey plan compile` writes it, or the plan.json in it"
    )
    try:
        header_bytes = _limited(file, MAX_HEADER_BYTES)
        graph = _limited(file.with_name("train.onnx"), MAX_GRAPH_BYTES)
        header = decode_header(header_bytes)
        check_graph(header.train, graph, "train.onnx")
    except OSError as error:
        raise ConfigError(f"{error.filename} cannot be read: {error.strerror}; {what}") from error
    except MalformedError as error:
        raise ConfigError(f"{file} is not a plan's: {error}; {what}") from error
    return Plan(header, header_bytes, graph, str(file))


def cached_plan(directory: Path) -> Plan | None:
    """The plan in a device's cache that was used last; None if there is none. Changes nothing."""
    try:
        files = [p for p in directory.iterdir() if len(p.name) == 64 and p.is_file()]
        files.sort(key=lambda path: path.stat().st_mtime, reverse=True)
    except OSError:
        return None
    for path in files:
        try:
            if path.stat().st_size > MAX_HEADER_BYTES:
                continue
            header_bytes = path.read_bytes()
            if not header_bytes.startswith(b"{") or plan_hash(header_bytes).hex() != path.name:
                continue
            header = decode_header(header_bytes)
            graph = _limited(directory / header.train.sha256, MAX_GRAPH_BYTES)
            check_graph(header.train, graph, "train.onnx")
        except (OSError, MalformedError):
            continue
        return Plan(header, header_bytes, graph, "the last that this device used")
    return None


def _limited(path: Path, most: int) -> bytes:
    with path.open("rb") as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise MalformedError(f"{path} has more than {most:,} bytes")
    return data


# -- what it costs ---------------------------------------------------------------------------------------


def estimate(plan: Plan, asked: Round, limits: LimitsConfig) -> Estimate:
    """Measure, and reckon. limits: the owner's. Raises TrainingError, MalformedError as a trial does."""
    n, header = asked.peers, plan.header
    encoding = Encoding(VALUE_BITS, n, header.n_params, 1.0, 1000, (10.0,) * METRICS)
    if (problem := encoding.problem()) is not None:
        raise ConfigError(f"a round cannot be reckoned: {problem}")
    service_bytes = _service_bytes()
    allowed = trials.Allowed(
        limits.max_memory_mb * _MB, min(limits.trial_seconds, limits.max_seconds), limits.threads
    )
    model_bytes = 4 * header.n_params
    went = trials.measure(
        header, plan.graph, asked.batch_size, STEPS, allowed,
        resident_before=service_bytes + model_bytes,
    )  # fmt: skip
    first = went.steps[0].seconds
    batch = statistics.median([step.seconds for step in went.steps[1:]] or [first])
    batches = min(asked.batches, limits.max_batches)
    grown = max(step.grown_bytes for step in went.steps)
    key_s, duty_s = _peers(n)
    down = (
        model_bytes
        + n * (CHECK_IN_BYTES + BOX_BYTES)
        + 2 * parameters_for(n).threshold * VOTE_BYTES
    )
    up = encoding.payload_bytes + n * BOX_BYTES
    phases = {
        "fetch": 8e-6 * down / asked.downlink_mbit,
        "keys": key_s,
        "train": went.loaded_s + first + batch * (batches - 1),
        "mask": _masking_s(encoding),
        "upload": 8e-6 * up / asked.uplink_mbit,
        "committee": duty_s,
    }
    return Estimate(
        plan=plan.hash,
        name=header.name,
        n_params=header.n_params,
        round=asked,
        phases=phases,
        once_s=went.seconds
        + 8e-6 * (len(plan.header_bytes) + len(plan.graph)) / asked.downlink_mbit,
        batch_s=batch,
        down_bytes=down,
        up_bytes=up,
        service_bytes=service_bytes,
        training_bytes=service_bytes + ROUND_BYTES + model_bytes + grown,
        masking_bytes=service_bytes + ROUND_BYTES + 2 * model_bytes + grown + _mask_bytes(encoding),
    )


def _mask_bytes(encoding: Encoding) -> int:
    """Of the encoded update, and of packing it: two more copies in lanes, three packed ones."""
    lanes = encoding.n_coordinates * encoding.lane_bits // 8
    return 3 * lanes + 3 * encoding.payload_bytes


def _timed(step: Callable[[], Any], times: int = 1) -> float:
    """Seconds of one call, the quickest of a few rounds: others use this machine too."""
    took = []
    for _ in range(3):
        began = time.perf_counter()
        for _ in range(times):
            step()
        took.append(time.perf_counter() - began)
    return min(took) / times


def _peers(n: int) -> tuple[float, float]:
    """Seconds for the keys of a round among n: checking everybody's, sharing and sealing, agreeing on masks;
    and for the duties of a member of the committee."""
    rng, threshold = os.urandom, parameters_for(n).threshold
    signer, mine, theirs = keys.SigningKey(rng(32)), keys.mask_key(rng(16)), keys.mask_key(rng(16))
    signature = signer.sign("check-in", bytes(250))
    verify = _timed(
        lambda: keys.verify(signer.public, "check-in", bytes(250), signature, signer="itself"), FEW
    )
    import_ = _timed(lambda: keys.check_agreement_key(theirs.public, owner="a peer"), FEW)
    split = _timed(lambda: sharing.split(rng(16), threshold, n, rng))
    seal = _timed(lambda: mine.seal(theirs.public, info=b"", plaintext=bytes(32)), FEW)
    box = mine.seal(theirs.public, info=b"", plaintext=bytes(32))
    open_ = _timed(lambda: theirs.open(box, sender=mine.public, info=b""), FEW)
    agree = _timed(
        lambda: masking.pair_mask_key(mine, theirs.public, bytes(32), "device-1", "device-2"), FEW
    )
    checking = n * (2 * verify + 2 * import_)
    return checking + 2 * split + n * seal + (
        n - 1
    ) * agree, n * open_ + 2 * threshold * verify + seal


def _masking_s(encoding: Encoding) -> float:
    """Encode, mask with every peer's stream, pack: on a slice, for all of it."""
    part = min(SLICE, encoding.n_params)
    small = Encoding(encoding.value_bits, encoding.n, part, 1.0, 1000, encoding.metric_clips)
    delta = np.random.default_rng(0).normal(scale=0.3, size=part).astype(np.float32)
    metrics = [0.0] * len(encoding.metric_clips)
    ring = small.encode(delta, 100, metrics, os.urandom)
    encode = _timed(lambda: small.encode(delta, 100, metrics, os.urandom))
    few = min(FEW, encoding.n)
    streams = [os.urandom(32) for _ in range(few)]
    mask = _timed(lambda: masking.add_masks(ring, streams[: few // 2], streams[few // 2 :]))
    pack = _timed(lambda: fixedpoint.pack(ring, encoding.bits))
    return (encode + mask * encoding.n / few + pack) * encoding.n_params / part


def _service_bytes() -> int:
    """What the service holds besides a plan, seen on a process that does what it does."""
    ended = run("covey_device.doctor.loaded")
    try:
        return int(ended.output)
    except ValueError:
        raise ConfigError(
            f"the service's parts cannot be loaded: {ended.why or ended.error}; see the line `packages`"
        ) from None


# -- what follows from it --------------------------------------------------------------------------------


def judge(found: Estimate, limits: LimitsConfig, machine: Machine) -> Finding:
    """Whether the round fits this machine and what its owner gives."""
    check, peak = "plan", found.peak_bytes // _MB
    says = f"a round of {found.name!r} takes {_seconds(found.seconds)} and {peak:,} MB here"
    parts = [Finding(check, "ok", says)]
    smaller = "ask for a smaller batch_size or model"
    training = found.training_bytes // _MB
    if training > limits.max_memory_mb:
        parts.append(
            Finding(
                check, "problem",
                f"training takes {training:,} MB, and limits.max_memory_mb gives {limits.max_memory_mb:,}",
                f"raise limits.max_memory_mb in policy.toml, or {smaller}",
            )
        )  # fmt: skip
    available = meminfo(machine).get("MemAvailable")
    if available is not None and found.peak_bytes > available:
        parts.append(
            Finding(
                check, "problem",
                f"{peak:,} MB is more than the {available // _MB:,} MB that are available",
                f"free some memory, or {smaller}",
            )
        )  # fmt: skip
    train = found.phases["train"]
    if train > limits.max_seconds:
        done = int(limits.max_seconds / max(found.batch_s, 1e-9))
        parts.append(
            Finding(
                check, "note",
                f"training ends after about {done:,} of {found.round.batches:,} batches, at "
                f"limits.max_seconds ({limits.max_seconds:g})",
                "raise limits.max_seconds in policy.toml, or ask for fewer batches",
            )
        )  # fmt: skip
    if found.round.batches > limits.max_batches:
        parts.append(
            Finding(
                check, "note",
                f"limits.max_batches ends training after {limits.max_batches:,} batches",
                "raise it in policy.toml, or leave it: the update counts for what was trained",
            )
        )  # fmt: skip
    return combined(check, parts)


def estimated(
    plan: Plan, asked: Round, limits: LimitsConfig, machine: Machine
) -> tuple[Finding, Estimate | None]:
    """`estimate`, judged; of a plan that its trial refuses, why."""
    try:
        found = estimate(plan, asked, limits)
    except CoveyError as error:
        fix = "ask for a smaller batch_size or model, or raise [limits] in policy.toml"
        return Finding("plan", "problem", str(error), fix), None
    return judge(found, limits, machine), found


PHASES = {
    "fetch": "fetch the model, and messages",
    "keys": "check and make keys, share seeds",
    "train": "train",
    "mask": "encode, mask and pack",
    "upload": "upload",
    "committee": "serve on the committee",
}


def in_words(found: Estimate) -> list[str]:
    """For people."""
    asked = found.round
    details = {
        "fetch": f"{found.down_bytes / 1e6:,.2f} MB at {asked.downlink_mbit:g} Mbit/s",
        "train": f"{found.batch_s * 1000:,.1f} ms a batch of {asked.batch_size}",
        "upload": f"{found.up_bytes / 1e6:,.2f} MB at {asked.uplink_mbit:g} Mbit/s",
    }
    lines = [
        f"a round of plan {found.name!r} {found.plan[:12]} ({found.n_params:,} parameters) on this machine, "
        f"{asked.batches:,} batches of {asked.batch_size}, {asked.peers} devices:"
    ]
    for name, words in PHASES.items():
        detail = f"   {details[name]}" if name in details else ""
        lines.append(f"  {words:<34}{_seconds(found.phases[name]):>10}{detail}")
    lines.append(f"  {'together':<34}{_seconds(found.seconds):>10}   and the waiting for others")
    lines.append(
        f"  {'memory at its highest':<34}{found.peak_bytes / 1e6:>7,.0f} MB   "
        f"{found.service_bytes / 1e6:,.0f} MB of it without a plan"
    )
    lines.append(
        f"  {'once, as long as the plan is new':<34}{_seconds(found.once_s):>10}   its trial"
    )
    return lines


def _seconds(seconds: float) -> str:
    if seconds >= 120:
        return f"{seconds / 60:,.1f} min"
    return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.0f} s"
