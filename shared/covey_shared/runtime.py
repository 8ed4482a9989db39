"""Runs a plan's graphs: the only onnxruntime import.

Used by the device's trainer and by the coordinator's evaluation. What lives here: sessions, bound
buffers, and the checks that a graph is what its header says. What does not: bounds on time and
memory (the trainer's), data sources, and anything that builds a graph (`covey_coordinator.plans`).

Plans come over the network. A graph that breaks the rules of `covey_shared.vetting`, which is asked
before onnxruntime sees a byte of it, or that onnxruntime cannot load, raises MalformedError; a batch
that does not fit the header raises DataError; a run that fails inside onnxruntime raises TrainingError.
"""

import os

# onnxruntime >= 1.29 for Linux sends telemetry unless this is set before the import: it stores a
# persistent device id and looks up a collector. `disable_telemetry_events()` comes too late.
# Overwritten, not defaulted: no setting of the environment may turn it back on.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from covey_shared.errors import (
    DataError,
    LocalProtocolError,
    MalformedError,
    StorageError,
    TrainingError,
)
from covey_shared.layout import Flat
from covey_shared.plan import GraphName, PlanHeader, TensorSpec
from covey_shared.vetting import BATCH, Ports, ports, vet

Array = NDArray[Any]

VERSION: str = ort.__version__
"""onnxruntime's. What one release ran well, another may not."""

OUT_OF_MEMORY = "it ran out of memory"
"""What others are told when it did."""

_NO_MEMORY = ("Failed to allocate memory", "bad_alloc", "bad allocation", "Available memory of")
"""Parts of what onnxruntime says when there was not enough: it has no class of its own for that."""

_ORT_TYPES = {"float32": "tensor(float)", "int64": "tensor(int64)", "uint8": "tensor(uint8)"}


class TrainStep:
    """One training step, again and again, on `train.onnx`.

    Parameters and optimiser state live in two sets of buffers bound to the session. A step reads
    one set and writes the other, then they change places: no step copies a parameter.
    """

    def __init__(self, header: PlanHeader, train_graph: bytes, *, threads: int = 1) -> None:
        """header: as decoded by `plan.decode_header`. train_graph: the bytes it names."""
        self._header = header
        self._hyper = {h.name: np.array(h.default, np.float32) for h in header.hyperparameters}
        self._defaults = {h.name: h.default for h in header.hyperparameters}
        self._loss = np.zeros((), np.float32)
        self._flats = [np.zeros(header.n_params, np.float32) for _ in range(2)]
        self._states = [
            {spec.name: np.zeros(spec.shape, spec.dtype) for spec in header.state} for _ in range(2)
        ]
        self._session = _session(header, train_graph, _options(threads), "train")
        self._bindings = [self._bind(source=0, target=1), self._bind(source=1, target=0)]
        self._current = 0
        self._run = ort.RunOptions()

    def _bind(self, source: int, target: int) -> Any:
        """Bind everything but the batch: one set of buffers as inputs, the other as outputs."""
        binding = self._session.io_binding()
        for name, scalar in self._hyper.items():
            binding.bind_ortvalue_input(f"hyper.{name}", _shared(scalar))
        for name, view in self._tensors(source):
            binding.bind_ortvalue_input(name, _shared(view))
        for name, view in self._tensors(target):
            binding.bind_ortvalue_output(f"next.{name}", _shared(view))
        binding.bind_ortvalue_output("loss", _shared(self._loss))
        return binding

    def _tensors(self, index: int) -> Iterator[tuple[str, Array]]:
        for name, view in self._header.layout.views(self._flats[index]).items():
            yield f"slot.{name}", view
        for name, tensor in self._states[index].items():
            yield f"state.{name}", tensor

    def load(self, parameters: Flat) -> None:
        """Start from these parameters (copied in) with the optimiser's state at zero."""
        self._header.layout.views(parameters)  # checks dtype and length
        self._current = 0
        self._run.terminate = False
        self._flats[0][...] = parameters
        for tensor in self._states[0].values():
            tensor[...] = 0

    def step(
        self, features: Array, labels: Array, hyper: Mapping[str, float] | None = None
    ) -> float:
        """Train on one batch; return its mean loss, taken before the update.

        features, labels: [batch, *shape] of the header's dtypes. hyper: overrides the header's
        defaults for this step. When it raises, parameters and state are as before.
        """
        features, labels = check_batch(self._header, features, labels)
        hyper = hyper or {}
        if unknown := sorted(set(hyper) - set(self._hyper)):
            raise LocalProtocolError(
                f"plan {self._header.name!r} has no hyper-parameter {unknown[0]!r}; "
                f"it has {sorted(self._hyper)}"
            )
        for name, scalar in self._hyper.items():
            scalar[...] = hyper.get(name, self._defaults[name])
        binding = self._bindings[self._current]
        binding.bind_cpu_input("features", features)
        binding.bind_cpu_input("labels", labels)
        try:
            self._session.run_with_iobinding(binding, self._run)
        except Exception as error:  # onnxruntime raises its own, undocumented classes
            raise _failed(f"train step of plan {self._header.name!r}", error) from error
        self._current = 1 - self._current
        return float(self._loss)

    def interrupt(self) -> None:
        """From another thread: have the step that runs, and every later one until `load`, fail.

        onnxruntime looks between two operators; one that runs is not interrupted.
        """
        self._run.terminate = True

    def parameters(self) -> Flat:
        """A copy of the current parameters: float32[n_params]."""
        return self._flats[self._current].copy()


class Evaluator:
    """Evaluates parameters on `eval.onnx`, whose outputs are sums over a batch's examples."""

    def __init__(self, header: PlanHeader, eval_graph: bytes, *, threads: int = 1) -> None:
        """header: as decoded by `plan.decode_header`. eval_graph: the bytes it names."""
        self._header = header
        self._session = _session(header, eval_graph, _options(threads), "eval")

    def evaluate(
        self, parameters: Flat, features: Array, labels: Array, *, batch_size: int = 256
    ) -> dict[str, float]:
        """Metric name -> its sum over all examples, evaluated batch by batch.

        `loss_sum / examples` is the mean loss, `correct / examples` the accuracy.
        """
        views = self._header.layout.views(np.ascontiguousarray(parameters))
        feeds: dict[str, Array] = {f"slot.{name}": view for name, view in views.items()}
        sums = dict.fromkeys(self._header.metrics, 0.0)
        for start in range(0, len(features), batch_size):
            end = start + batch_size
            batch = check_batch(self._header, features[start:end], labels[start:end])
            feeds["features"], feeds["labels"] = batch
            for name, value in zip(
                self._header.metrics,
                _run(self._session, self._header, list(self._header.metrics), feeds, "eval"),
                strict=True,
            ):
                sums[name] += float(value)
        return sums


class Predictor:
    """A release of the model: `infer.onnx` with one flat vector as its external data."""

    def __init__(
        self, header: PlanHeader, infer_graph: bytes, parameters: Flat, *, threads: int = 1
    ) -> None:
        """parameters: float32[n_params], copied by onnxruntime; what `parameters.bin` holds."""
        self._header = header
        self._session = _filled(header, infer_graph, parameters, _options(threads))

    def predict(self, features: Array) -> NDArray[np.float32]:
        """features: [batch, *shape] -> predictions: float32[batch, ...]."""
        features = _check_array("features", self._header.features, features)
        feeds = {"features": features}
        outputs = _run(self._session, self._header, ["predictions"], feeds, "infer")
        predictions: NDArray[np.float32] = outputs[0]
        return predictions


def export_model(header: PlanHeader, infer_graph: bytes, parameters: Flat) -> bytes:
    """`infer.onnx` with the parameters inside: one ONNX file that any runtime can load.

    onnxruntime writes it, unoptimised, so that no onnx package is needed where rounds are run; into
    memory where there are such files (Linux), so that it is on no disk that may be full or somebody else's.
    Raises MalformedError for a graph that does not fit the header, StorageError if there is no room.
    """
    try:
        if hasattr(os, "memfd_create"):
            with open(os.memfd_create("model.onnx"), "rb") as file:  # noqa: PTH123 - it has no path
                _exported(header, infer_graph, parameters, Path(f"/proc/self/fd/{file.fileno()}"))
                return file.read()
        with tempfile.TemporaryDirectory(prefix="covey-") as directory:
            path = Path(directory) / "model.onnx"
            _exported(header, infer_graph, parameters, path)
            return path.read_bytes()
    except OSError as error:
        raise StorageError(
            f"cannot write a model in memory or {tempfile.gettempdir()}: {error.strerror}; free some "
            "space"
        ) from error


def try_export(
    header: PlanHeader, infer_graph: bytes, parameters: Flat, path: Path
) -> tuple[int, ...]:
    """`export_model` into a file, and one run on an example of zeros -> the shape of its prediction.

    Raises MalformedError as `export_model`, TrainingError if the run fails.
    """
    session = _exported(header, infer_graph, parameters, path)
    zeros = np.zeros((1, *header.features.shape), header.features.dtype)
    outputs = _run(session, header, ["predictions"], {"features": zeros}, "infer")
    return tuple(outputs[0].shape[1:])


def _exported(header: PlanHeader, infer_graph: bytes, parameters: Flat, path: Path) -> Any:
    """The session that wrote the file."""
    options = _options(1)
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.optimized_model_filepath = str(path)
    return _filled(header, infer_graph, parameters, options)


class LocalModel:
    """A model as `export_model` writes it, or any other with one input and one output. For files of
    this machine's owner: unlike a plan's graphs it is not vetted.

    features: the input; its shape is one example's. Raises MalformedError for anything else.
    """

    def __init__(self, model: bytes, name: str, *, threads: int = 1) -> None:
        """name: for messages."""
        self._name = name
        try:
            self._session = ort.InferenceSession(
                model, _options(threads), providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # onnxruntime raises its own, undocumented classes
            raise MalformedError(f"{name}: onnxruntime cannot load it: {error}") from error
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        if len(inputs) != 1 or len(outputs) != 1:
            raise MalformedError(
                f"{name} has {len(inputs)} inputs and {len(outputs)} outputs; give a model with one "
                "of each"
            )
        dtypes = {spelled: dtype for dtype, spelled in _ORT_TYPES.items()}
        shape = tuple(inputs[0].shape[1:])
        if inputs[0].type not in dtypes or not all(isinstance(side, int) for side in shape):
            raise MalformedError(
                f"{name}: its input is {inputs[0].type}{inputs[0].shape}; give a model of "
                f"{', '.join(sorted(dtypes.values()))} with the batch as its one free side"
            )
        dtype: Any = dtypes[inputs[0].type]
        self.features = TensorSpec(name=inputs[0].name, dtype=dtype, shape=shape)

    def predict(self, features: Array) -> Array:
        """features: [batch, *shape] -> predictions: [batch, ...]. Raises DataError, TrainingError."""
        features = _check_array("features", self.features, features)
        try:
            predictions: Array = self._session.run(None, {self.features.name: features})[0]
        except Exception as error:  # onnxruntime raises its own, undocumented classes
            raise _failed(self._name, error) from error
        return predictions


def _filled(header: PlanHeader, infer_graph: bytes, parameters: Flat, options: Any) -> Any:
    """A session of `infer.onnx` with these parameters."""
    views = header.layout.views(np.ascontiguousarray(parameters))
    # By the slots' names rather than by file: nothing is read from disk, and onnxruntime
    # checks each slot's type and shape. The values must outlive the session's construction.
    values = {f"slot.{name}": _shared(view) for name, view in views.items()}
    options.add_external_initializers(list(values), list(values.values()))
    return _session(header, infer_graph, options, "infer")


def check_batch(header: PlanHeader, features: Array, labels: Array) -> tuple[Array, Array]:
    """The batch, C-contiguous. Raises DataError, naming the array, if it does not fit the plan."""
    features = _check_array("features", header.features, features)
    labels = _check_array("labels", header.labels, labels)
    if len(features) != len(labels):
        raise DataError(f"batch has {len(features)} features but {len(labels)} labels")
    if header.classes is not None and not 0 <= labels.min() <= labels.max() < header.classes:
        raise DataError(
            f"labels range from {labels.min()} to {labels.max()}, the plan has classes 0 to "
            f"{header.classes - 1}"
        )
    return features, labels


def _check_array(what: str, spec: TensorSpec, array: Array) -> Array:
    if array.dtype != np.dtype(spec.dtype) or array.shape[1:] != spec.shape or array.ndim < 1:
        expected = ", ".join(["batch", *map(str, spec.shape)])
        raise DataError(
            f"{what} are {array.dtype}{list(array.shape)}, the plan wants {spec.dtype}[{expected}]"
        )
    if len(array) == 0:
        raise DataError(f"{what}: the batch is empty")
    return np.ascontiguousarray(array)


def _shared(array: Array) -> Any:
    """An OrtValue on the array's own memory (no copy on the CPU)."""
    return ort.OrtValue.ortvalue_from_numpy(array)


def _options(threads: int) -> Any:
    if threads < 1:
        raise LocalProtocolError(f"threads must be at least 1, not {threads}")
    options = ort.SessionOptions()
    # Set explicitly: left to itself onnxruntime pins threads, which a seccomp filter may forbid.
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = 4  # errors are raised; nothing is printed from a network's graph
    # Planned ahead, a step's tensors come in one block that only ever grows; on demand they take a few
    # megabytes less, at the same speed.
    options.enable_mem_pattern = False
    # A device shares its processor with other work: waiting threads sleep.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # A graph may name files as its external data, which onnxruntime would look up in the working
    # directory. A plan reads no file of the device: below /dev/null there cannot be any.
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", "/dev/null"
    )
    return options


def _session(header: PlanHeader, graph: bytes, options: Any, what: GraphName) -> Any:
    vet(header, graph, what)
    try:
        session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises its own, undocumented classes
        if _out_of_memory(error):
            raise _failed(f"loading {what}.onnx", error) from error
        refused = MalformedError(f"{what}.onnx: onnxruntime cannot load it: {error}")
        refused.public = "the plan's graph cannot be loaded"  # onnxruntime may name files
        raise refused from error
    _check_ports(session, what, *ports(header, what))
    return session


def _run(
    session: Any, header: PlanHeader, outputs: list[str], feeds: Mapping[str, Array], what: str
) -> Sequence[Array]:
    try:
        result: Sequence[Array] = session.run(outputs, feeds)
    except Exception as error:  # onnxruntime raises its own, undocumented classes
        raise _failed(f"{what} graph of plan {header.name!r}", error) from error
    return result


def _out_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError) or any(part in str(error) for part in _NO_MEMORY)


def _failed(what: str, error: Exception) -> TrainingError:
    public = OUT_OF_MEMORY if _out_of_memory(error) else TrainingError("").public
    return TrainingError(f"{what}: {str(error) or type(error).__name__}", public=public)


def _check_ports(session: Any, what: GraphName, inputs: Ports, outputs: Ports) -> None:
    """Names, types and shapes of a graph's inputs and outputs are exactly the expected ones."""
    for kind, found, expected in (
        ("input", session.get_inputs(), inputs),
        ("output", session.get_outputs(), outputs),
    ):
        names = {node.name for node in found}
        if wrong := sorted(names ^ set(expected)):
            state = "lacks" if wrong[0] in expected else "has an unknown"
            raise MalformedError(f"{what}.onnx {state} {kind} {wrong[0]!r}")
        for node in found:
            dtype, shape = expected[node.name]
            sides = tuple(side if isinstance(side, int) else BATCH for side in node.shape)
            if node.type != _ORT_TYPES[dtype] or (shape is not None and sides != shape):
                raise MalformedError(
                    f"{what}.onnx: {kind} {node.name!r} is {node.type}{node.shape}, "
                    f"the header says {dtype}{'' if shape is None else list(shape)}"
                )
