"""The most recent examples of a directory of shards, in memory.

Nothing is written: after a start they are read again, from the newest shard backwards. Examples stay as
they are stored, in pieces of about a megabyte, and a place that became free is used again: what is held
never goes beyond the wanted number of examples and one shard.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from covey_device.data.fit import Array
from covey_device.data.shard_files import Shard, Stamp

PIECE_BYTES = 1 << 20

Places = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Kind:
    """How examples are stored: element types as numpy writes them, and shapes of one example."""

    features: tuple[str, tuple[int, ...]]
    labels: tuple[str, tuple[int, ...]]

    @staticmethod
    def of(features: Array, labels: Array) -> "Kind":
        """Of two arrays with a row for each example."""
        return Kind((features.dtype.str, features.shape[1:]), (labels.dtype.str, labels.shape[1:]))

    def empty(self, n: int) -> tuple[Array, Array]:
        """Two arrays for so many examples."""
        return (
            np.empty((n, *self.features[1]), self.features[0]),
            np.empty((n, *self.labels[1]), self.labels[0]),
        )

    @property
    def sizes(self) -> tuple[int, int]:
        """Bytes of one example's features and of its labels."""
        features, labels = self.empty(1)
        return features.nbytes, labels.nbytes


class _Pool:
    """Examples of one kind, by place."""

    def __init__(self, kind: Kind) -> None:
        self._kind = kind
        self._per_piece = max(1, PIECE_BYTES // max(1, sum(kind.sizes)))
        self._pieces: list[tuple[Array, Array]] = []
        self._free: Places = np.empty(0, np.int64)

    def add(self, features: Array, labels: Array) -> Places:
        n = len(labels)
        while len(self._free) < n:
            start = len(self._pieces) * self._per_piece
            self._pieces.append(self._kind.empty(self._per_piece))
            fresh = np.arange(start, start + self._per_piece, dtype=np.int64)
            self._free = np.concatenate([self._free, fresh])
        places, self._free = self._free[:n].copy(), self._free[n:].copy()
        for piece, there, rows in self._split(places):
            for array, values in zip(self._pieces[piece], (features, labels), strict=True):
                array[rows] = values[there]
        return places

    def free(self, places: Places) -> None:
        self._free = np.concatenate([self._free, places])

    def take(self, places: Places) -> tuple[Array, Array]:
        out = self._kind.empty(len(places))
        for piece, there, rows in self._split(places):
            for array, values in zip(self._pieces[piece], out, strict=True):
                values[there] = array[rows]
        return out

    def _split(self, places: Places) -> list[tuple[int, NDArray[np.bool_], Places]]:
        """By pieces: (piece, which of the places are in it, their rows there)."""
        pieces, rows = np.divmod(places, self._per_piece)
        found = []
        for piece in np.unique(pieces):
            there = pieces == piece
            found.append((int(piece), there, rows[there]))
        return found


@dataclass(slots=True)
class _Held:
    """What is held of one shard: its newest examples. total: how many it has."""

    stamp: Stamp
    total: int
    kind: int
    places: Places


class Window:
    """The newest examples. most: how many."""

    def __init__(self, most: int) -> None:
        self.kinds: list[Kind] = []
        self._most = most
        self._pools: list[_Pool] = []
        self._shards: dict[str, _Held] = {}
        self._n = 0

    def __len__(self) -> int:
        return self._n

    def holds(self, name: str) -> bool:
        """Whether an example of this shard is among them."""
        return name in self._shards

    def refresh(
        self,
        names: list[str],
        stamp: Callable[[str], Stamp | None],
        read: Callable[[str], Shard | None],
    ) -> bool:
        """Bring it to these shards, in their order. stamp: of a shard as it is now. read: what one
        holds, None if it is not fit to be used. Whether a shard was left out for want of room."""
        there = set(names)
        for name in [*self._shards]:
            now = stamp(name) if name in there else None
            if now is None or now[:3] != self._shards[name].stamp[:3]:
                self.forget(name)
        room = self._most
        for at in range(len(names) - 1, -1, -1):
            name = names[at]
            if room == 0:
                self._trim(names[: at + 1], 0)
                return True
            held = self._shards.get(name)
            if held is None or len(held.places) < min(held.total, room):
                self.forget(name)
                shard = read(name)
                if shard is None:
                    continue
                wanted = min(room, len(shard))
                if len(self) + wanted > self._most:
                    self._trim(names[:at], room - wanted)
                held = self._shards[name] = self._hold(shard, wanted)
                self._n += wanted
            else:
                self._keep(name, room)
            room -= len(held.places)
            if len(held.places) < held.total:
                self._trim(names[:at], 0)
                return True
        return False

    def forget(self, name: str) -> None:
        """Its examples are held no longer."""
        held = self._shards.pop(name, None)
        if held is not None:
            self._pools[held.kind].free(held.places)
            self._n -= len(held.places)

    def index(self) -> tuple[NDArray[np.uint8], Places]:
        """Kind and place of every example, in the shards' order."""
        held = [self._shards[name] for name in sorted(self._shards, key=os.fsencode)]
        kinds = [np.full(len(one.places), one.kind, np.uint8) for one in held]
        return (
            np.concatenate([np.empty(0, np.uint8), *kinds]),
            np.concatenate([np.empty(0, np.int64), *(one.places for one in held)]),
        )

    def take(self, kind: int, places: Places) -> tuple[Array, Array]:
        """Features and labels of these examples, copied, as they are stored."""
        return self._pools[kind].take(places)

    def _hold(self, shard: Shard, wanted: int) -> _Held:
        kind = Kind.of(shard.features, shard.labels)
        if kind not in self.kinds:
            self.kinds.append(kind)
            self._pools.append(_Pool(kind))
        number = self.kinds.index(kind)
        rest = slice(len(shard) - wanted, None)
        places = self._pools[number].add(shard.features[rest], shard.labels[rest])
        return _Held(shard.stamp, len(shard), number, places)

    def _trim(self, names: list[str], most: int) -> None:
        """Keep at most so many examples of these shards, the newest."""
        for name in reversed(names):
            if name in self._shards:
                self._keep(name, most)
                most -= len(self._shards[name].places) if name in self._shards else 0

    def _keep(self, name: str, most: int) -> None:
        """Keep at most so many of a shard's examples."""
        held = self._shards[name]
        if most == 0:
            self.forget(name)
        elif len(held.places) > most:
            self._pools[held.kind].free(held.places[:-most])
            self._n -= len(held.places) - most
            held.places = held.places[-most:]
