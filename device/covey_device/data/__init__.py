"""Data sources: what a device trains on, checked against the plan before a round needs it.

Read `config` for the `[data]` table, `source` for what a source is, `fit` for the rules that data
must keep. `files`, `table` and `provider` read the kinds that stay as they are, `growing` and what it
imports a directory of shards, which grows (`covey_device.shards` writes one). Training lives in
`covey_device.trainer`; the data never leaves the device.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from covey_device.data.config import (
    CsvData,
    DataConfig,
    IdxData,
    NpyData,
    NpzData,
    PythonData,
    ShardsData,
)
from covey_device.data.files import map_npy, read_idx, read_npz
from covey_device.data.fit import Array, fits
from covey_device.data.provider import open_provider
from covey_device.data.source import ArraySource, DataSource, batches
from covey_device.data.table import read_csv
from covey_shared.errors import DataError
from covey_shared.plan import PlanHeader

if TYPE_CHECKING:
    from covey_device.data.growing import Growth

__all__ = [
    "ArraySource",
    "CsvData",
    "DataConfig",
    "DataSource",
    "IdxData",
    "NpyData",
    "NpzData",
    "PythonData",
    "ShardsData",
    "batches",
    "open_source",
    "source_of_arrays",
]


def open_source(
    config: DataConfig, header: PlanHeader, *, base: Path, growth: "Growth | None" = None
) -> DataSource:
    """Open the configured data and hold it against the plan.

    base: the folder that paths in the configuration start from. growth: what sources of a directory of
    shards share; None for one of its own, without a reservoir. Reads float arrays once from end
    to end, in search of values that are not allowed.
    Raises DataError, which names the file and the array or column.
    """
    try:
        return _open(config, header, base, growth)
    except MemoryError:
        raise DataError(
            "the data named in [data] does not fit into memory: save it as two npy files (kind = "
            '"npy"), which are memory-mapped'
        ) from None


def source_of_arrays(
    features: Array, labels: Array, header: PlanHeader, *, name: str = "arrays"
) -> DataSource:
    """A source over arrays at hand, with the same checks. name: for messages."""
    config = NpzData(file=name)
    return ArraySource(
        features, labels, fits(config, header, f"{name}, features", f"{name}, labels")
    )


def _open(
    config: DataConfig, header: PlanHeader, base: Path, growth: "Growth | None"
) -> DataSource:
    match config:
        case NpzData():
            names = (config.features, config.labels)
            both = fits(config, header, *(f"{config.file}, array {name!r}" for name in names))
            features, labels = read_npz(base / config.file, config.file, names)
            return ArraySource(features, labels, both)
        case NpyData() | IdxData():
            read = map_npy if isinstance(config, NpyData) else read_idx
            features = read(base / config.features, config.features)
            labels = read(base / config.labels, config.labels)
            both = fits(config, header, config.features, config.labels)
            return ArraySource(features, labels, both)
        case CsvData():
            both = fits(config, header, f"{config.file}, features", f"{config.file}, labels")
            features, labels = read_csv(base / config.file, config, both)
            return ArraySource(features, labels, both)
        case PythonData():
            origins = [f"{config.function}, {role}" for role in ("features", "labels")]
            return open_provider(config, fits(config, header, *origins), base)
        case ShardsData():
            # Here, since other kinds have no use for it: the idle service is kept small.
            from covey_device.data.growing import GrowingSource, Growth

            return GrowingSource(config, header, base, growth or Growth())
