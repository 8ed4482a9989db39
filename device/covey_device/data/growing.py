"""The source over a directory of shards, to which a local program adds while the device trains.

What is new is taken in by `refresh`, once before each round; in between nothing changes. Trouble with a
shard costs that shard, and one line in the log for as long as the file stays as it is.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from covey_device.data import retention
from covey_device.data.config import ShardsData
from covey_device.data.fit import Array, Fit, fits
from covey_device.data.reservoir import NOWHERE, LogFile, Reservoir
from covey_device.data.shard_files import (
    Shard,
    Stamp,
    in_words,
    opened_folder,
    read_shard,
    recognised,
    shard_names,
    stamp_of,
)
from covey_device.data.source import BLOCK_ELEMENTS, Indices
from covey_device.data.window import Kind, Places, Window
from covey_shared.errors import DataError, LocalProtocolError, StorageError
from covey_shared.plan import PlanHeader

log = logging.getLogger("covey.device")

_Read = Callable[[str], Shard | None]
_Take = Callable[[int, Places], tuple[Array, Array]]


class Growth:
    """What a device's sources have in common, however often they are opened.

    state: the device's state directory, where a reservoir is kept; None: none can be. rng: decides what
    goes into a reservoir. clock: seconds since 1970, by which shards grow old.
    """

    def __init__(
        self,
        state: Path | None = None,
        *,
        rng: np.random.Generator | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.state, self.clock = state, clock
        self.rng = rng or np.random.default_rng()
        self._told: dict[tuple[str, str], tuple[Stamp | None, str]] = {}

    def known(self, about: str, name: str) -> tuple[Stamp | None, str] | None:
        """What was told, and of which state of the file."""
        return self._told.get((about, name))

    def tell(self, about: str, name: str, stamp: Stamp | None, what: str) -> None:
        """One line in the log, unless it was told of the file as it is. about: kinds of trouble."""
        if self.known(about, name) != (stamp, what):
            self._told[about, name] = (stamp, what)
            log.warning("%s", what)

    def about(self, about: str) -> list[str]:
        """All that was told of a kind of trouble."""
        return [what for key, (_, what) in self._told.items() if key[0] == about]

    def forget(self, about: str, but: set[str] | frozenset[str] = frozenset()) -> None:
        """What was told of files that are gone, or of trouble that is over."""
        for key in [key for key in self._told if key[0] == about and key[1] not in but]:
            del self._told[key]


@dataclass(frozen=True, slots=True, eq=False)
class _View:
    """Where every example is, and how to take them."""

    kinds: NDArray[np.uint8]
    places: Places
    take: _Take


class GrowingSource:
    """The chosen examples of a directory of shards, converted batch by batch.

    Until the next `refresh` it is the same examples, whatever becomes of the shards.
    """

    def __init__(self, config: ShardsData, header: PlanHeader, base: Path, growth: Growth) -> None:
        """Raises DataError unless there is a shard that fits the plan."""
        self._config, self._header, self._growth = config, header, growth
        self._path = base / config.directory
        shown = config.directory
        self._fits = fits(config, header, f"{shown}, features", f"{shown}, labels")
        # A shard that one plan cannot use, or as it is configured now, may do for another.
        plan = (header.name, header.features, header.labels, header.classes, header.loss)
        self._about = f"shard {config} {plan}"
        self._keeper: _Recent | _Sample
        if config.select == "reservoir":
            if growth.state is None:
                raise LocalProtocolError("a reservoir of examples needs a state directory")
            self._keeper = _Sample(
                reservoir_path(growth.state, self._path),
                config.max_examples, growth, self._fits,
            )  # fmt: skip
        else:
            self._keeper = _Recent(config, growth)
        self._view = self._keeper.view()
        self.refresh()

    @property
    def n_examples(self) -> int:
        return len(self._view.places)

    def batch(self, indices: Indices) -> tuple[Array, Array]:
        view = self._view
        kinds, places = view.kinds[indices], view.places[indices]
        if len(kinds) and (kinds == kinds[0]).all():
            features, labels = view.take(int(kinds[0]), places)
            return self._fits[0].convert(features), self._fits[1].convert(labels)
        out = [np.empty((len(indices), *f.tensor.shape), f.tensor.dtype) for f in self._fits]
        for kind in np.unique(kinds):
            there = kinds == kind
            taken = view.take(int(kind), places[there])
            for array, rows, fit in zip(out, taken, self._fits, strict=True):
                array[there] = fit.convert(rows)
        return out[0], out[1]

    def refresh(self) -> None:
        """Take in shards that are new, let go of those that are gone, delete those beyond the owner's
        limits. Raises DataError if no example is left."""
        try:
            self._refresh()
        except MemoryError:
            raise DataError(
                f"{self._config.directory}: max_examples = {self._config.max_examples} are more examples "
                'than fit into memory: lower it, or keep them on the disk with select = "reservoir"'
            ) from None

    def _refresh(self) -> None:
        n_shards, problem = 0, None
        try:
            with opened_folder(self._path, self._config.directory) as folder:
                names = shard_names(folder, self._config.directory)
                n_shards = len(names)
                self._growth.forget(self._about, set(names))
                if self._keeper.take_in(
                    names,
                    lambda name: stamp_of(folder, name),
                    lambda name: self._read(folder, name),
                ):
                    self._retain(folder, names)
            self._growth.forget("directory")
        except DataError as error:
            # Without its directory a sample still has its examples: a disk may be mounted later.
            problem = error
            if self._config.select == "reservoir":
                self._growth.tell("directory", "", None, f"{error}; the sample is used as it is")
        self._view = self._keeper.view()
        if problem is not None and (self._config.select != "reservoir" or not self.n_examples):
            raise problem
        if not self.n_examples:
            raise self._nothing(n_shards)

    def _nothing(self, n_shards: int) -> DataError:
        if self._keeper.problem is not None:
            return DataError(self._keeper.problem)
        directory = self._config.directory
        if n_shards == 0:
            return DataError(
                f"{directory} has no shard yet, a file that ends in .npz or .csv: this device takes part "
                "from the first round after one is there; docs/data.md says how to write them"
            )
        first = next(iter(self._growth.about(self._about)), "")
        return DataError(
            f"{directory}: none of its {n_shards} shards can be used; the first: {first}"
        )

    def _read(self, folder: int, name: str) -> Shard | None:
        """None if it is gone or cannot be used, which is told once."""
        stamp = stamp_of(folder, name)
        known = self._growth.known(self._about, name)
        if stamp is None or (known is not None and known[0] == stamp):
            return None
        try:
            return read_shard(folder, name, self._config, self._header)
        except FileNotFoundError:
            return None
        except DataError as error:
            self._growth.tell(self._about, name, stamp, f"{error} (this shard is left out)")
            return None

    # -- retention --------------------------------------------------------------------------------

    def _retain(self, folder: int, names: list[str]) -> None:
        config, growth = self._config, self._growth
        if not retention.is_limited(config):
            return
        taken = self._keeper.taken(names)
        shards = []
        for name, is_taken in zip(names, taken, strict=True):
            # What could not be read is no shard, for all that we know; and a sample has yet to see the
            # shards that it did not take.
            if growth.known(self._about, name) is None and (
                is_taken or self._config.select != "reservoir"
            ):
                entry = retention.entry_of(folder, name)
                if entry is not None:
                    shards.append((entry, is_taken))
        certain = {entry.name for entry, is_taken in shards if is_taken}
        chosen = []
        for entry in retention.surplus([e for e, _ in shards], config, growth.clock()):
            if entry.name in certain or recognised(folder, entry.name, config):
                chosen.append(entry)
            else:
                growth.tell(
                    self._about, entry.name, stamp_of(folder, entry.name),
                    f"{config.directory}/{in_words(entry.name)} would be deleted as an old shard, but is "
                    "none: move it elsewhere, or give it another ending",
                )  # fmt: skip
        gone, failed = retention.delete(folder, chosen)
        for entry in gone:
            self._keeper.forget(entry.name)
        if gone:
            first, last = in_words(gone[0].name), in_words(gone[-1].name)
            log.info(
                "%s: deleted %s (%.1f MB), beyond the limits of [data]",
                config.directory,
                first if len(gone) == 1 else f"{len(gone):,} shards, {first} to {last}",
                sum(entry.size for entry in gone) / 1e6,
            )
        if failed is None:
            growth.forget("retention")
        else:
            growth.tell(
                "retention", config.directory, None,
                f"{config.directory}: old shards cannot be deleted ({failed.strerror}), so the limits of "
                "[data] do not hold: let this device's user write to the directory, or remove "
                "max_age_days, max_mb and max_shards",
            )  # fmt: skip


def reservoir_path(state: Path, directory: Path) -> Path:
    """Where the sample of a directory is kept: each directory has its own."""
    name = blake2b(bytes(directory.absolute()), digest_size=6).hexdigest()
    return state / f"reservoir-{name}.log"


class _Recent:
    """The most recent examples, or all while there is room for them."""

    problem: str | None = None

    def __init__(self, config: ShardsData, growth: Growth) -> None:
        self._config, self._growth = config, growth
        self._window = Window(config.max_examples)

    def take_in(self, names: list[str], stamp: Callable[[str], Stamp | None], read: _Read) -> bool:
        left_out = self._window.refresh(names, stamp, read)
        config = self._config
        if left_out and config.select == "all":
            self._growth.tell(
                "all", config.directory, None,
                f"{config.directory} has more examples than max_examples = {config.max_examples}: the "
                "oldest are left out. Raise it, or say what is wanted by select = \"recent\" or "
                '"reservoir"',
            )  # fmt: skip
        return True

    def taken(self, names: list[str]) -> list[bool]:
        return [self._window.holds(name) for name in names]

    def forget(self, name: str) -> None:
        self._window.forget(name)

    def view(self) -> _View:
        kinds, places = self._window.index()
        return _View(kinds, places, self._window.take)


class _Sample:
    """A reservoir, and which of its examples the plan can use: they may have been taken under another."""

    def __init__(self, path: Path, capacity: int, growth: Growth, both: tuple[Fit, Fit]) -> None:
        self.problem: str | None = None
        """Why there may be nothing in it, if that is known."""
        self._growth, self._fits = growth, both
        self._reservoir = Reservoir(path, capacity, growth.rng)
        self._good = np.empty(0, np.bool_)
        self._unfit: str | None = None
        self._search()

    def take_in(self, names: list[str], stamp: Callable[[str], Stamp | None], read: _Read) -> bool:
        """Whether all went well, and what was taken is on the disk."""
        reservoir = self._reservoir
        try:
            with reservoir.held() as mine:
                if not mine:  # another process takes them in
                    if reservoir.catch_up():
                        self._search()
                    return False
                if reservoir.settle():
                    self._search()
                for name, taken in zip(names, reservoir.taken(names), strict=True):
                    if not taken and (shard := read(name)) is not None:
                        slots = reservoir.add(name, shard.features, shard.labels)
                        more = np.zeros(len(reservoir) - len(self._good), np.bool_)
                        self._good = np.concatenate([self._good, more])
                        self._good[slots] = True
                reservoir.sync()
        except StorageError as error:
            self.problem = str(error)
            self._growth.tell("storage", "", None, f"{error}; the sample does not grow until then")
            return False
        self.problem = None if self._good.any() else self._unfit
        self._growth.forget("storage")
        return True

    def taken(self, names: list[str]) -> list[bool]:
        return [bool(taken) for taken in self._reservoir.taken(names)]

    def forget(self, name: str) -> None:
        """Nothing: what was chosen of a shard outlives it."""

    def view(self) -> _View:
        kinds, places, file = self._reservoir.index()
        good = np.flatnonzero(self._good)
        return _View(
            kinds[good], places[good], lambda kind, where: self._reservoir.take(file, kind, where)
        )

    def _search(self) -> None:
        """Hold every example against the plan."""
        kinds, places, file = self._reservoir.index()
        self._good = np.zeros(len(places), np.bool_)
        for number, kind in enumerate(self._reservoir.kinds):
            slots = np.flatnonzero((kinds == number) & (places != NOWHERE))
            slots = slots[np.argsort(places[slots])]
            self._good[slots] = self._usable(kind, number, places[slots], file)
        lost = len(places) - int(self._good.sum())
        if lost:
            self._unfit = (
                f"{self._reservoir.path}: {lost} of {len(places)} examples do not fit the plan "
                f"{self._fits[0].plan!r} and are left out"
            )
            self._growth.tell("sample", self._fits[0].plan, None, self._unfit)

    def _usable(
        self, kind: Kind, number: int, places: Places, file: LogFile | None
    ) -> NDArray[np.bool_]:
        good = np.ones(len(places), np.bool_)
        try:
            for fit, array in zip(self._fits, kind.empty(1), strict=True):
                fit.check(array)
        except DataError:
            return ~good
        step = max(1, BLOCK_ELEMENTS // max(1, sum(kind.sizes)))
        for at in range(0, len(places), step):
            taken = self._reservoir.take(file, number, places[at : at + step])
            for fit, rows in zip(self._fits, taken, strict=True):
                if fit.needs_search(rows.dtype):
                    good[at : at + step] &= fit.good_rows(fit.convert(rows))
        return good
