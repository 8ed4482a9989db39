"""A plan and its files: what `covey plan compile` writes and a coordinator publishes.

A plan's directory holds ``plan.json`` (the header's canonical bytes), ``train.onnx``,
``eval.onnx``, ``infer.onnx`` and ``initial.bin`` (the module's own initial values, one
little-endian float32 vector in the header's layout), and ``signatures/`` if model owners signed it
(see `signing`). No torch here, no network, no compiling.
"""

import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args

import numpy as np

from covey_coordinator.plans.signing import SIGNATURES, owner_of, read_signatures, signature_file
from covey_shared.errors import CoveyError, MalformedError, StorageError
from covey_shared.layout import Flat
from covey_shared.plan import (
    GraphName,
    GraphRef,
    PlanHash,
    PlanHeader,
    check_graph,
    decode_header,
    plan_hash,
)
from covey_shared.vetting import vet

HEADER_FILE = "plan.json"
INITIAL_FILE = "initial.bin"
GRAPH_NAMES: tuple[GraphName, ...] = get_args(GraphName)


@dataclass(frozen=True, slots=True)
class PlanBundle:
    """A plan in memory. header_bytes: the canonical bytes that are hashed and published.

    initial: float32[n_params], the parameters a fresh run starts from. signatures: envelopes of
    PlanSignature, of this plan.
    """

    header: PlanHeader
    header_bytes: bytes
    graphs: Mapping[GraphName, bytes]
    initial: Flat
    signatures: tuple[bytes, ...] = field(default=(), kw_only=True)

    @property
    def hash(self) -> PlanHash:
        """The plan hash, which pins the graphs too."""
        return plan_hash(self.header_bytes)

    def ref(self, name: GraphName) -> GraphRef:
        """What the header says of one graph."""
        return {"train": self.header.train, "eval": self.header.eval, "infer": self.header.infer}[
            name
        ]


def graph_file(name: GraphName) -> str:
    """A graph's file name inside the plan's directory."""
    return f"{name}.onnx"


def write(plan: PlanBundle, directory: Path, *, replace: bool = False) -> None:
    """Write the plan's files as one directory, all or nothing.

    Signatures that are there already stay if they are of this very plan. Written beside the target,
    then renamed: a reader never sees half a plan, and a failure leaves what was there. Raises
    StorageError if `directory` exists and `replace` is false, if it holds anything but a plan's
    files, or if the disk refuses.
    """
    files: dict[str, bytes] = {
        HEADER_FILE: plan.header_bytes,
        INITIAL_FILE: plan.initial.astype("<f4", copy=False).tobytes(),
        **{graph_file(name): plan.graphs[name] for name in GRAPH_NAMES},
    }
    directory = directory.absolute()
    check_target(directory, replace=replace)
    for envelope in plan.signatures or _standing_signatures(directory, plan.hash):
        files[f"{SIGNATURES}/{signature_file(owner_of(envelope))}"] = envelope
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    except OSError as error:
        raise StorageError(f"cannot write beside {directory}: {error.strerror}") from error
    try:
        fresh = staging / "new"
        fresh.mkdir()
        for name, data in files.items():
            (fresh / name).parent.mkdir(exist_ok=True)
            _write_durably(fresh / name, data)
        if directory.exists():
            # A directory cannot be renamed over one that is not empty. Between these two calls
            # there is none, and a crash leaves the old one in the staging directory.
            directory.rename(staging / "old")
        fresh.rename(directory)
    except OSError as error:
        if (staging / "old").exists() and not directory.exists():
            (staging / "old").rename(directory)
        raise StorageError(f"cannot write plan {directory}: {error.strerror}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def check_target(directory: Path, *, replace: bool) -> None:
    """Raise StorageError if `write` would: something is there that it may not replace."""
    if not directory.exists():
        return
    if not directory.is_dir():
        raise StorageError(f"{directory} is not a directory; choose another name")
    if not replace:
        raise StorageError(f"{directory} exists already; choose another name or pass --force")
    names = {HEADER_FILE, INITIAL_FILE, SIGNATURES, *map(graph_file, GRAPH_NAMES)}
    if foreign := sorted({entry.name for entry in directory.iterdir()} - names):
        raise StorageError(
            f"{directory} holds {foreign[0]!r}, which is no file of a plan; choose another name"
        )


def _standing_signatures(directory: Path, plan: bytes) -> tuple[bytes, ...]:
    try:
        return read_signatures(directory / SIGNATURES, plan)
    except CoveyError:
        return ()  # of another plan, which is about to be replaced


def _write_durably(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def load_bundle(directory: Path) -> PlanBundle:
    """Read and check a plan's directory.

    Raises StorageError if a file cannot be read, MalformedError if the files are not one plan;
    both name the file.
    """
    header_bytes = _read(directory / HEADER_FILE)
    try:
        header = decode_header(header_bytes)
    except MalformedError as error:
        raise MalformedError(f"{directory / HEADER_FILE}: {error}") from error
    bundle = PlanBundle(
        header=header,
        header_bytes=header_bytes,
        graphs={name: _read(directory / graph_file(name)) for name in GRAPH_NAMES},
        initial=_initial(directory / INITIAL_FILE, header),
        signatures=read_signatures(directory / SIGNATURES, plan_hash(header_bytes)),
    )
    for name, data in bundle.graphs.items():
        check_graph(bundle.ref(name), data, str(directory / graph_file(name)))
        try:
            vet(header, data, name)
        except MalformedError as error:
            raise MalformedError(f"{directory}: devices would refuse it: {error}") from error
    return bundle


def _initial(path: Path, header: PlanHeader) -> Flat:
    data = _read(path)
    if len(data) != 4 * header.n_params:
        raise MalformedError(
            f"{path}: {len(data)} bytes, expected {4 * header.n_params} for "
            f"{header.n_params} parameters; compile the plan again"
        )
    initial = np.frombuffer(data, "<f4").astype(np.float32)
    if not np.isfinite(initial).all():
        raise MalformedError(f"{path}: not all values are finite; compile the plan again")
    return initial


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise StorageError(
            f"cannot read {path}: {error.strerror}; a plan's directory is what "
            "`covey plan compile` wrote"
        ) from error
