"""A csv file with a header row, parsed once into two arrays.

Cost: 4 bytes a feature value (8 for integer plans) and 8 a label in the end, about 6% more while
reading, and one block of rows. Text is slow to parse: save larger data as npy.
"""

import csv
from array import array as Buffer
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np

from covey_device.data.config import CsvData
from covey_device.data.files import missing
from covey_device.data.fit import Array, Fit
from covey_shared.errors import DataError

BLOCK_ROWS = 1024
_EXACT = 2.0**53  # every whole number up to here is a float64
_CODES = {"float32": "f", "int64": "q", "uint8": "B"}
_Pick = Callable[[Sequence[str]], tuple[str, ...]]


def read_csv(path: Path, config: CsvData, fits: tuple[Fit, Fit]) -> tuple[Array, Array]:
    """Features [rows, columns] and labels [rows, columns], of the plan's types.

    Every value is checked here, so that a message can name its row and column.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            return read_table(stream, config, fits)
    except FileNotFoundError:
        raise missing(path, config.file) from None
    except OSError as error:
        raise DataError(f"{config.file} cannot be read: {error.strerror or error}") from error


def read_table(lines: Iterable[str], config: CsvData, fits: tuple[Fit, Fit]) -> tuple[Array, Array]:
    """The same of the lines of a file. config.file: its name in messages."""
    try:
        return _Table(lines, config, fits).read()
    except UnicodeDecodeError as error:
        raise DataError(f"{config.file} is not UTF-8 text ({error}): save it as UTF-8") from error


class _Table:
    """One reading of one file."""

    def __init__(self, lines: Iterable[str], config: CsvData, fits: tuple[Fit, Fit]) -> None:
        self._file = config.file
        self._reader = csv.reader(lines, delimiter=config.delimiter, strict=True)
        self._lines = self._records()
        names = next(self._lines, [])
        if not names:
            raise DataError(f"{self._file} is empty: it needs a header row and at least one row")
        self._names = [name.strip() for name in names]
        self._columns = self._choose(config)
        self._fits = fits

    def read(self) -> tuple[Array, Array]:
        parts = [
            _Part(self._file, self._names, columns, fit)
            for columns, fit in zip(self._columns, self._fits, strict=True)
        ]
        for record in self._lines:
            if len(record) != len(self._names):
                raise DataError(
                    f"{self._file}, row {self._reader.line_num} has {len(record)} columns, the "
                    f"header row has {len(self._names)}: correct the row, or the delimiter in "
                    "[data]"
                )
            for part in parts:
                part.add(record, self._reader.line_num)
        features, labels = (part.finish() for part in parts)
        return features, labels

    def _records(self) -> Iterator[list[str]]:
        """Rows of cells; empty lines are left out."""
        try:
            yield from filter(None, self._reader)
        except csv.Error as error:
            raise DataError(
                f"{self._file}, row {self._reader.line_num}: {error}; correct the row"
            ) from error

    def _choose(self, config: CsvData) -> tuple[list[int], list[int]]:
        """Numbers of the feature and the label columns."""
        labels = [config.labels] if isinstance(config.labels, str) else list(config.labels)
        if not config.features and "" in self._names:
            raise DataError(
                f"{self._file}, column {self._names.index('') + 1} has no name: name it, or choose "
                "columns with features = [...] in [data]"
            )
        features = list(config.features) or [n for n in self._names if n not in labels]
        if not features:
            raise DataError(f"{self._file} has no column besides its labels: add the features")
        columns = {name: number for number, name in enumerate(self._names)}
        there, chosen = Counter(self._names), Counter([*labels, *features])
        for name in chosen:
            if name not in columns:
                raise DataError(
                    f"{self._file} has no column {name!r}, its header row has "
                    f"{_shortened(self._names)}: name one of these in [data], or set the delimiter"
                )
            if there[name] > 1:
                raise DataError(f"{self._file} has {there[name]} columns {name!r}: rename them")
            if chosen[name] > 1:
                raise DataError(
                    f"{self._file}, column {name!r} is named twice in [data]: remove it once, "
                    "a column is one feature or one label"
                )
        return [columns[name] for name in features], [columns[name] for name in labels]


class _Part:
    """The growing features or labels."""

    def __init__(self, file: str, names: list[str], columns: list[int], fit: Fit) -> None:
        self._file, self._names, self._columns, self._fit = file, names, columns, fit
        fit.check(np.empty((1, len(columns)), fit.tensor.dtype))
        self._pick = _picker(columns)
        self._block: Buffer[float] = Buffer("d")
        self._block_rows: list[int] = []
        self._done: Buffer[Any] = Buffer(_CODES[fit.tensor.dtype])

    def add(self, record: list[str], row: int) -> None:
        """row: the file's line number, counted from 1, for messages."""
        cells = self._pick(record)
        try:
            self._block.extend(map(float, cells))
        except ValueError:
            raise self._not_a_number(cells, row) from None
        self._block_rows.append(row)
        if len(self._block_rows) == BLOCK_ROWS:
            self._flush()

    def finish(self) -> Array:
        self._flush()
        return np.frombuffer(self._done, self._fit.tensor.dtype).reshape(-1, len(self._columns))

    def _flush(self) -> None:
        """Turn the block into the plan's type, check it, and append it."""
        values = np.array(self._block, np.float64)
        if self._fit.tensor.dtype != "float32":
            whole = (values == np.rint(values)) & (np.abs(values) <= _EXACT)
            if self._fit.tensor.dtype == "uint8":
                whole &= (values >= 0) & (values <= 255)
            if not whole.all():
                index = int(np.argmin(whole))
                raise self._bad(index, f"{values[index]} where {self._fit.tensor.dtype} is wanted")
        with np.errstate(over="ignore"):
            stored = values.astype(self._fit.tensor.dtype)
        # Searched as the plan will see them, kept as they are: `batch` scales.
        found = self._fit.first_bad(self._fit.convert(stored.reshape(-1, len(self._columns))))
        if found is not None:
            raise self._bad(*found)
        self._done.frombytes(stored.tobytes())
        del self._block[:]
        self._block_rows.clear()

    def _bad(self, index: int, what: str) -> DataError:
        row, column = divmod(index, len(self._columns))
        return DataError(
            f"{self._file}, row {self._block_rows[row]}, column "
            f"{self._names[self._columns[column]]!r} holds {what}: correct it or leave the row out"
        )

    def _not_a_number(self, cells: Sequence[str], row: int) -> DataError:
        for cell, column in zip(cells, self._columns, strict=True):
            try:
                float(cell)
            except ValueError:
                held = f"{cell[:40]!r}, which is not a number" if cell.strip() else "nothing"
                return DataError(
                    f"{self._file}, row {row}, column {self._names[column]!r} holds {held}: "
                    "write a number, leave the row out, or leave the column out with features = "
                    "[...] in [data]"
                )
        raise AssertionError("every cell is a number")


def _picker(columns: list[int]) -> _Pick:
    if len(columns) == 1:  # itemgetter of one index gives no tuple
        column = columns[0]
        return lambda record: (record[column],)
    return itemgetter(*columns)


def _shortened(names: list[str]) -> str:
    shown = ", ".join(map(repr, names[:12]))
    return shown if len(names) <= 12 else f"{shown} and {len(names) - 12} more"
