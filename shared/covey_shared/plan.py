"""What a plan is: graphs, their roles and shapes, and the hashes that name them.

A plan is a header (canonical JSON) and three ONNX graphs. The header names each graph by SHA-256
and size, so the header's own SHA-256, the *plan hash*, pins every byte a device will run.

Names inside the graphs follow from the header, so that nothing needs to be looked up:

=================  ==========================================================================
graph              inputs -> outputs
=================  ==========================================================================
``train.onnx``     ``features``, ``labels``, ``hyper.<name>`` (float32 scalars), ``slot.<name>``,
                   ``state.<name>`` -> ``loss`` (float32 scalar, the batch mean),
                   ``next.slot.<name>``, ``next.state.<name>``
``eval.onnx``      ``features``, ``labels``, ``slot.<name>`` -> ``loss_sum`` (float32 scalar),
                   ``examples`` (int64 scalar), for class labels also ``correct`` (int64 scalar)
``infer.onnx``     ``features`` -> ``predictions``; the slots are initialisers kept as external
                   data in ``parameters.bin``, whose bytes are exactly the flat float32 vector
                   (little-endian): a new release is that one file
=================  ==========================================================================

The batch dimension, the first of ``features`` and ``labels``, is dynamic in every graph.
Compiling lives in `covey_coordinator.plans`, running in `covey_shared.runtime`.
"""

import hashlib
import math
from typing import Annotated, Literal, NewType

import msgspec
from msgspec import Meta

from covey_shared.errors import MalformedError
from covey_shared.layout import Layout, Name, Shape

FORMAT = 1
MAX_HEADER_BYTES = 1 << 20
MAX_GRAPH_BYTES = 64 << 20
MAX_PARAMETERS = 1 << 28
MAX_STATE = 2 * MAX_PARAMETERS  # as many as Adam keeps

PlanHash = NewType("PlanHash", bytes)
Digest = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
DType = Literal["float32", "int64", "uint8"]
GraphName = Literal["train", "eval", "infer"]


class TensorSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One tensor. For features and labels, shape is one example's: without the batch dimension."""

    name: Name
    dtype: DType
    shape: Shape


class Hyperparameter(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A float32 scalar input of the training step that a round can set."""

    name: Name
    default: float


class GraphRef(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A graph by content: SHA-256 of its bytes and their number."""

    sha256: Digest
    size: Annotated[int, Meta(ge=1, le=MAX_GRAPH_BYTES)]


class PlanHeader(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything a device must know of a plan besides the graphs' bytes.

    state: the optimiser's local tensors (momentum), full shapes; zero at the start of each round
    and never leaving the device. classes: for class labels, their number: a label is one of
    0 ... classes - 1. metrics: the outputs of ``eval.onnx``, in order. versions: the tools that
    compiled it, for people.
    """

    format: Annotated[int, Meta(ge=1)]
    name: Name
    loss: Literal["cross_entropy", "mse", "bce_with_logits"]
    optimizer: Name
    opset: int
    features: TensorSpec
    labels: TensorSpec
    classes: Annotated[int, Meta(ge=1)] | None = None
    hyperparameters: tuple[Hyperparameter, ...]
    layout: Layout
    state: tuple[TensorSpec, ...]
    metrics: tuple[Name, ...]
    train: GraphRef
    eval: GraphRef
    infer: GraphRef
    versions: dict[str, str]

    @property
    def n_params(self) -> int:
        """Length of the flat vector."""
        return self.layout.n_params


def encode_header(header: PlanHeader) -> bytes:
    """Header -> its canonical bytes (the ones that are hashed)."""
    return msgspec.json.format(msgspec.json.encode(header, order="deterministic"), indent=1)


def decode_header(data: bytes) -> PlanHeader:
    """Canonical bytes -> header. Raises MalformedError, whatever the bytes."""
    if len(data) > MAX_HEADER_BYTES:
        raise MalformedError(f"plan header of {len(data)} bytes; at most {MAX_HEADER_BYTES}")
    try:
        header = msgspec.json.decode(data, type=PlanHeader)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise MalformedError(f"plan header: {_shortened(str(error))}") from error
    if header.format != FORMAT:
        raise MalformedError(
            f"plan header has format {header.format}, this covey reads {FORMAT}: "
            "compile the plan again or upgrade"
        )
    header.layout.check()
    if not 0 < header.n_params <= MAX_PARAMETERS:
        raise MalformedError(f"plan has {header.n_params} parameters; 1 to {MAX_PARAMETERS}")
    state = sum(math.prod(spec.shape) for spec in header.state)
    if state > MAX_STATE:
        raise MalformedError(f"plan has {state} numbers of state; at most {MAX_STATE}")
    for what, names in (
        ("state tensor", [spec.name for spec in header.state]),
        ("hyper-parameter", [hyper.name for hyper in header.hyperparameters]),
        ("metric", list(header.metrics)),
    ):
        if repeated := [name for name in names if names.count(name) > 1]:
            raise MalformedError(f"plan header names {what} {repeated[0]!r} twice")
    if encode_header(header) != data:
        raise MalformedError("plan header is not in canonical form")
    return header


def _shortened(words: str) -> str:
    """An error that may quote a name of any length; it ends with where that stands."""
    return words if len(words) <= 300 else f"{words[:150]} ... {words[-100:]}"


def plan_hash(header: bytes) -> PlanHash:
    """SHA-256 of the header's bytes: pins the graphs too, through their digests."""
    return PlanHash(hashlib.sha256(header).digest())


def check_graph(ref: GraphRef, data: bytes, what: str) -> None:
    """Raise MalformedError unless `data` is the graph that `ref` names."""
    if len(data) != ref.size or hashlib.sha256(data).hexdigest() != ref.sha256:
        raise MalformedError(f"{what}: bytes do not match the plan header's digest")
