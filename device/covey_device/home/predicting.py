"""The kept model on a file or on this device's own data. Everything stays here: nothing of it has a network.

Files are read by the rules of `[data]` where device.toml has them: the names of arrays and columns, scale,
offset and reshape.
"""

import csv
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from covey_device.config import DeviceConfig
from covey_device.data import open_source
from covey_device.data.config import CsvData, NpzData
from covey_device.data.files import map_npy
from covey_device.data.fit import Fit, Range
from covey_device.home.files import (
    CURRENT,
    ModelDirectory,
    none_yet,
    read_model,
    read_plan,
    read_sidecar,
)
from covey_shared.errors import ConfigError, DataError
from covey_shared.plan import PlanHeader, TensorSpec
from covey_shared.runtime import LocalModel

Array = NDArray[Any]

BLOCK = 256
SHOWN = 10


@dataclass(frozen=True, slots=True)
class Using:
    """A model that is loaded, and what is known of it. name: for people. header: of a kept one."""

    model: LocalModel
    name: str
    header: PlanHeader | None = None


@dataclass(frozen=True, slots=True)
class Block:
    """Predictions of some examples. first: the number of the first one. labels: where there are any."""

    first: int
    predictions: Array
    labels: Array | None = None


def kept_model(config: DeviceConfig, base: Path) -> Using:
    """The current model, its hash checked. Raises ConfigError if there is none, StorageError."""
    directory = ModelDirectory(config.model_directory(base), reserve_bytes=0)
    folder = directory.folder(CURRENT)
    if folder is None:
        raise ConfigError(none_yet(directory.path, keep=config.model.keep))
    sidecar = read_sidecar(folder)
    header = read_plan(folder, sidecar)
    name = f"the model of round {sidecar.round}, plan {header.name!r}"
    return Using(LocalModel(read_model(folder, sidecar), name), name, header)


def model_file(path: Path) -> Using:
    """Any other model. Raises ConfigError, MalformedError."""
    try:
        return Using(LocalModel(path.read_bytes(), str(path)), str(path))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error


# -- on what ---------------------------------------------------------------------------------------


def on_file(using: Using, path: Path, config: DeviceConfig | None) -> Iterator[Block]:
    """Predictions for the examples of an .npz, .npy or .csv file. Raises DataError, TrainingError."""
    data = None if config is None else config.data
    fit = Fit(
        tensor=using.model.features,
        plan=using.name if using.header is None else using.header.name,
        origin=str(path),
        allowed=Range(None, None, "only finite numbers are allowed"),
        reshape=data is not None and data.reshape,
        scale=1.0 if data is None else data.factor,
        offset=0.0 if data is None else data.offset,
    )
    match path.suffix.lower():
        case ".npy":
            rows: Array = map_npy(path, str(path))
        case ".npz":
            rows = _of_npz(path, data.features if isinstance(data, NpzData) else "features")
        case ".csv":
            rows = _of_csv(path, data if isinstance(data, CsvData) else None, using.model.features)
        case _:
            raise DataError(f"{path} is none of .npz, .npy and .csv: give one of these")
    fit.check(rows)
    if len(rows) == 0:
        raise fit.error("has no examples", "give at least one")
    for first in range(0, len(rows), BLOCK):
        block = fit.convert(rows[first : first + BLOCK])
        fit.check_values(block, range(first, first + len(block)))
        yield Block(first, using.model.predict(block))


def on_own(using: Using, config: DeviceConfig, base: Path) -> Iterator[Block]:
    """Predictions for what this device trains on. Raises DataError, TrainingError."""
    if using.header is None:
        raise ConfigError("--own goes with the kept model, whose plan says how the data are read")
    source = open_source(config.data, using.header, base=base)
    for first in range(0, source.n_examples, BLOCK):
        numbers = np.arange(first, min(first + BLOCK, source.n_examples))
        features, labels = source.batch(numbers)
        yield Block(first, using.model.predict(features), labels)


def _of_npz(path: Path, name: str) -> Array:
    try:
        with np.load(path, allow_pickle=False) as archive:
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise DataError(f"{path} is not an npz file: write one with numpy.savez")
            if name not in archive.files:
                raise DataError(
                    f"{path} has no array {name!r}, it has {sorted(archive.files)}: name it so, or set "
                    "features in [data]"
                )
            rows: Array = archive[name]
            return rows
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} is damaged, or no npz file: {error}") from error


def _of_csv(path: Path, config: CsvData | None, features: TensorSpec) -> Array:
    """Feature columns alone; the labels' may be there or not."""
    rows: list[list[float]] = []
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            lines = csv.reader(stream, delimiter="," if config is None else config.delimiter)
            names = [name.strip() for name in next(lines, [])]
            columns = _columns(path, names, config, prod(features.shape))
            for record in filter(None, lines):
                if len(record) != len(names):
                    raise DataError(
                        f"{path}, row {lines.line_num} has {len(record)} columns, the header row has "
                        f"{len(names)}: correct the row, or the delimiter in [data]"
                    )
                try:
                    rows.append([float(record[column]) for column in columns])
                except ValueError as error:
                    raise DataError(f"{path}, row {lines.line_num}: {error}: correct it") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} is no table of comma-separated values: {error}") from error
    if features.dtype == "float32":
        return np.array(rows, np.float64).reshape(len(rows), len(columns))
    whole = np.array(rows, np.float64).reshape(len(rows), len(columns))
    if not (whole == np.floor(whole)).all():
        raise DataError(
            f"{path} has numbers that are not whole, and the plan wants {features.dtype}"
        )
    return whole.astype(features.dtype)


def _columns(path: Path, names: list[str], config: CsvData | None, wanted: int) -> list[int]:
    chosen = names
    if config is not None:
        labels = [config.labels] if isinstance(config.labels, str) else config.labels
        chosen = list(config.features) or [name for name in names if name not in labels]
    if missing := sorted(set(chosen) - set(names)):
        raise DataError(
            f"{path} has no column {missing[0]!r}: its header row has {', '.join(names[:SHOWN])}"
        )
    if len(chosen) != wanted:
        raise DataError(
            f"{path} has {len(chosen)} columns of features, the model wants {wanted}: give these "
            "alone, or name them in [data]"
        )
    return [names.index(name) for name in chosen]


# -- what they say ---------------------------------------------------------------------------------


def lines(using: Using, block: Block) -> Iterator[tuple[dict[str, Any], str]]:
    """Each example's prediction, for programs and for people."""
    loss = None if using.header is None else using.header.loss
    values = block.predictions.astype(np.float64)
    classes = loss == "cross_entropy" and values.ndim == 2
    if classes:
        values = _softmax(values)
    elif loss == "bce_with_logits":
        values = 0.5 * (1.0 + np.tanh(0.5 * values))
    for row, value in enumerate(values):
        number = block.first + row
        found: dict[str, Any] = {"example": number}
        if classes:
            best = int(value.argmax())
            found |= {"class": best, "probability": float(value[best])}
            found["probabilities"] = value.tolist()
            words = f"class {best} ({value[best]:.3f})"
        else:
            found["probabilities" if loss == "bce_with_logits" else "prediction"] = value.tolist()
            flat = value.reshape(-1)
            more = ", ..." if flat.size > SHOWN else ""
            words = ", ".join(f"{v:.6g}" for v in flat[:SHOWN]) + more
        if block.labels is not None:
            found["label"] = block.labels[row].tolist()
            if block.labels[row].size == 1:
                words += f", label {block.labels[row].reshape(-1)[0]:g}"
        yield found, f"{number}: {words}"


class Tally:
    """How right predictions are that have labels, by what the plan's loss means."""

    def __init__(self) -> None:
        self._examples = self._values = 0
        self._sum = 0.0

    def add(self, using: Using, block: Block) -> None:
        """Count some more."""
        if block.labels is None or using.header is None:
            return
        predictions, labels = block.predictions, block.labels
        match using.header.loss:
            case "cross_entropy":
                right = predictions.argmax(axis=1) == labels
            case "bce_with_logits":
                right = (predictions > 0) == (labels.reshape(predictions.shape) > 0.5)
            case _:
                right = (predictions - labels.reshape(predictions.shape)) ** 2
        self._examples += len(predictions)
        self._values += right.size
        self._sum += float(right.sum())

    def in_words(self, using: Using) -> str:
        """One line; empty without labels."""
        if not self._values or using.header is None:
            return ""
        what = "mean squared error" if using.header.loss == "mse" else "accuracy"
        return (
            f"{what} on {self._examples:,} examples of this device's own: "
            f"{self._sum / self._values:.4g}; it stays on this device"
        )


def _softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    probabilities: NDArray[np.float64] = powers / powers.sum(axis=1, keepdims=True)
    return probabilities
