"""The `[data]` table of a device's configuration, one typed struct per kind.

Each struct mirrors the TOML table key by key; `kind` picks the struct, so a key of another kind is
an error when the file is loaded. What the keys lead to lives beside it: `files`, `table` and
`provider` read, `fit` holds the arrays against the plan. Paths are relative to the folder of the
configuration file.
"""

from fractions import Fraction
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

Text = Annotated[str, Meta(min_length=1)]
OneCharacter = Annotated[str, Meta(min_length=1, max_length=1)]
FractionText = Annotated[
    str,
    Meta(pattern=r"^-?[0-9]+/[0-9]+\Z", description='a fraction in quotes, such as "1/255"'),
]

# 16-bit integers times this, plus this, stay far below float32's largest number: integer features
# then need no search for infinities.
MAX_SCALE = 1e30


class _Common(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="kind"
):
    """Keys of every kind.

    The plan sees `features * scale + offset`. scale: a number, or a fraction in quotes such as
    "1/255". reshape: take each example's values in their order when only the number of values
    matches the plan's shape; see `fit.reshapes` for what needs no such permission.
    """

    scale: float | FractionText = 1.0
    offset: float = 0.0
    reshape: bool = False

    def __post_init__(self) -> None:
        """Raises ValueError, which msgspec reports as a validation error with the table's path."""
        try:
            factor = self.factor
        except ZeroDivisionError:
            raise ValueError(f"scale = {self.scale!r} divides by zero") from None
        if not 0 < abs(factor) <= MAX_SCALE:
            raise ValueError(f"scale = {self.scale!r}: give a number from -1e30 to 1e30 but not 0")
        if not abs(self.offset) <= MAX_SCALE:
            raise ValueError(f"offset = {self.offset!r}: give a number from -1e30 to 1e30")

    @property
    def factor(self) -> float:
        """`scale` as a number."""
        return float(Fraction(self.scale) if isinstance(self.scale, str) else self.scale)


class NpzData(_Common, frozen=True, kw_only=True, tag="npz"):
    """Two named arrays of one `.npz` file, read into memory."""

    file: Text
    features: Text = "features"
    labels: Text = "labels"


class NpyData(_Common, frozen=True, kw_only=True, tag="npy"):
    """Two `.npy` files, memory-mapped: the data may be larger than the memory."""

    features: Text
    labels: Text


class CsvData(_Common, frozen=True, kw_only=True, tag="csv"):
    """A text table with a header row, parsed into memory once.

    labels: the label column's name, or several names in the plan's order. features: the feature
    columns in the plan's order; empty means all other columns in the file's order.
    """

    file: Text
    labels: Text | Annotated[tuple[Text, ...], Meta(min_length=1)]
    features: tuple[Text, ...] = ()
    delimiter: OneCharacter = ","


class IdxData(_Common, frozen=True, kw_only=True, tag="idx"):
    """Two files in MNIST's idx format: memory-mapped, or read into memory if gzipped."""

    features: Text
    labels: Text


class PythonData(_Common, frozen=True, kw_only=True, tag="python"):
    """A function of yours, called without arguments when the device starts.

    function: "module:function". The module may lie in the folder of the configuration file.
    """

    function: Annotated[
        str,
        Meta(
            pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*\Z",
            description='a function in quotes, as "module:function"',
        ),
    ]


class ShardsData(_Common, frozen=True, kw_only=True, tag="shards"):
    """A directory to which a local program adds shards: `.npz` files, and `.csv` with a header row.

    select: which examples are trained on, at most `max_examples`. features, labels: the arrays of npz
    shards. columns, label_columns, delimiter: of csv shards, as in `CsvData`. max_age_days, max_mb,
    max_shards: beyond them this device deletes the oldest shards; None: it never deletes any.
    """

    directory: Text
    select: Literal["recent", "reservoir", "all"] = "recent"
    max_examples: Annotated[int, Meta(ge=1, le=100_000_000)] = 100_000
    features: Text = "features"
    labels: Text = "labels"
    columns: tuple[Text, ...] = ()
    label_columns: Text | Annotated[tuple[Text, ...], Meta(min_length=1)] = "label"
    delimiter: OneCharacter = ","
    max_age_days: Annotated[float, Meta(gt=0, le=36_500)] | None = None
    max_mb: Annotated[int, Meta(ge=1)] | None = None
    max_shards: Annotated[int, Meta(ge=1)] | None = None


DataConfig = NpzData | NpyData | CsvData | IdxData | PythonData | ShardsData
