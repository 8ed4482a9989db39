"""Parameter names, shapes and offsets <-> one flat float32 vector.

The flat vector is what a round publishes, sums and averages. Slots lie back to back in the order
of the plan's header, without padding, each in C order. Views are taken, not copies: a trainer that
writes a slot's view writes the flat vector.
"""

from collections.abc import Mapping
from typing import Annotated, Literal

import msgspec
import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

from covey_shared.errors import LocalProtocolError, MalformedError

Flat = NDArray[np.float32]

# Headers come over the network: names go to logs and terminals, and products of sides must stay
# numbers that can be printed.
Name = Annotated[str, Meta(min_length=1, max_length=200, pattern="^[^\\x00-\\x1f\\x7f-\\x9f]+\\Z")]
Side = Annotated[int, Meta(ge=1, le=1 << 32)]
Shape = Annotated[tuple[Side, ...], Meta(max_length=8)]


class Slot(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One tensor's place in the flat vector.

    offset: in elements, not bytes. role: "parameter" is trained by the optimiser; "buffer" is float
    state that the forward pass updates and the fleet averages (BatchNorm's running statistics).
    """

    name: Name
    shape: Shape
    offset: Annotated[int, Meta(ge=0, le=1 << 40)]
    role: Literal["parameter", "buffer"]

    @property
    def size(self) -> int:
        """Number of elements; 1 for a scalar."""
        size = 1
        for side in self.shape:
            size *= side
        return size


class Layout(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All slots of a plan, in order."""

    slots: tuple[Slot, ...]

    @property
    def n_params(self) -> int:
        """Length of the flat vector."""
        return sum(slot.size for slot in self.slots)

    def check(self) -> None:
        """Refuse gaps, overlaps, repeated names and empty tensors.

        Raises MalformedError: headers come over the network.
        """
        end = 0
        names: set[str] = set()
        for slot in self.slots:
            if slot.name in names:
                raise MalformedError(f"layout names slot {slot.name!r} twice")
            names.add(slot.name)
            if any(side <= 0 for side in slot.shape):
                raise MalformedError(f"slot {slot.name!r} has an empty shape {slot.shape}")
            if slot.offset != end:
                raise MalformedError(
                    f"slot {slot.name!r} starts at {slot.offset}, expected {end}: gap or overlap"
                )
            end += slot.size

    def views(self, flat: Flat) -> dict[str, Flat]:
        """Name -> view of its slot, shaped. flat: float32[n_params], C-contiguous."""
        if flat.dtype != np.float32 or flat.shape != (self.n_params,):
            raise LocalProtocolError(
                f"flat vector is {flat.dtype}{list(flat.shape)}, expected float32[{self.n_params}]"
            )
        return {
            slot.name: flat[slot.offset : slot.offset + slot.size].reshape(slot.shape)
            for slot in self.slots
        }

    def flatten(self, tensors: Mapping[str, NDArray[np.float32]]) -> Flat:
        """Named tensors -> a new float32[n_params]. Raises LocalProtocolError on a mismatch."""
        missing = [slot.name for slot in self.slots if slot.name not in tensors]
        extra = sorted(set(tensors) - {slot.name for slot in self.slots})
        if missing or extra:
            raise LocalProtocolError(f"tensors missing: {missing}, unknown: {extra}")
        flat = np.empty(self.n_params, np.float32)
        for name, view in self.views(flat).items():
            tensor = tensors[name]
            if tensor.shape != view.shape:
                raise LocalProtocolError(
                    f"tensor {name!r} has shape {tensor.shape}, expected {view.shape}"
                )
            view[...] = tensor
        return flat


def layout_of(
    tensors: Mapping[str, tuple[tuple[int, ...], Literal["parameter", "buffer"]]],
) -> Layout:
    """Lay named (shape, role) pairs back to back, in their order."""
    slots: list[Slot] = []
    end = 0
    for name, (shape, role) in tensors.items():
        slot = Slot(name=name, shape=shape, offset=end, role=role)
        slots.append(slot)
        end += slot.size
    return Layout(tuple(slots))
