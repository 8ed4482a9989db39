"""A verified manifest: who takes part, with which keys, under which head."""

from dataclasses import dataclass, field

from covey_shared import keys, wire
from covey_shared.errors import MalformedError, RefusedError
from covey_shared.fixedpoint import Encoding
from covey_shared.messages import DeviceId, Head, ManifestDigest
from covey_shared.secagg.bitmap import from_bitmap, to_bitmap
from covey_shared.secagg.parameters import Parameters


def manifest_digest(head: Head) -> ManifestDigest:
    """h: binds every key and every later message of the round to this head."""
    return ManifestDigest(keys.digest("manifest head", wire.body_of(head)))


def check_ins_digest(envelopes: tuple[bytes, ...]) -> bytes:
    """What the head says of the check-ins that follow it."""
    return keys.digest("check-ins", *envelopes)


@dataclass(frozen=True, slots=True)
class Trust:
    """The public keys that everything hangs on, pinned when a device joins a fleet."""

    fleet: str
    ca: keys.PublicKey
    coordinator: keys.PublicKey


@dataclass(frozen=True, slots=True)
class Peer:
    """One device of the cohort. index: its place in the manifest; the committee's slot is index + 1."""

    index: int
    device: DeviceId
    identity: bytes
    pk_mask: bytes
    pk_seal: bytes
    self_mask_commitment: bytes


@dataclass(frozen=True, slots=True)
class Cohort:
    """Made only by `rules.verified_cohort`. peers: in the manifest's order, sorted by device id."""

    h: ManifestDigest
    head: Head
    peers: tuple[Peer, ...]
    envelopes: tuple[bytes, ...]
    _index: dict[DeviceId, int] = field(repr=False)

    @property
    def n(self) -> int:
        """Size of the cohort."""
        return self.head.n

    @property
    def parameters(self) -> Parameters:
        """The head's, already checked against the built-in ones."""
        head = self.head
        return Parameters(head.degree, head.min_side, head.committee, head.threshold)

    @property
    def threshold(self) -> int:
        """Votes that make a quorum, and shares that recover a secret (t)."""
        return self.head.threshold

    @property
    def encoding(self) -> Encoding:
        """How updates become ring elements in this round."""
        return encoding_of(self.head)

    def index_of(self, device: DeviceId) -> int:
        """Raises RefusedError for a device that is not in the cohort."""
        try:
            return self._index[device]
        except KeyError:
            raise RefusedError(f"device {device} is not in the cohort of this round") from None

    def __contains__(self, device: object) -> bool:
        return device in self._index

    def names(self, indices: frozenset[int] | set[int]) -> list[DeviceId]:
        """Device ids, sorted."""
        return [self.peers[i].device for i in sorted(indices)]

    def bitmap(self, indices: frozenset[int] | set[int]) -> bytes:
        """A subset of the cohort as the wire carries it."""
        return to_bitmap(indices, self.n)

    def subset(self, bitmap: bytes) -> frozenset[int]:
        """Undo `bitmap`. Raises MalformedError."""
        return from_bitmap(bitmap, self.n)


def encoding_of(head: Head) -> Encoding:
    """The head's encoding. Raises MalformedError when its derived fields contradict it."""
    encoding = Encoding(
        value_bits=head.value_bits,
        n=head.n,
        n_params=head.n_params,
        clip=head.clip,
        w_max=head.w_max,
        metric_clips=head.metric_clips,
    )
    if head.bits != encoding.bits or head.lane_bits != encoding.lane_bits:
        raise MalformedError(
            f"the head says {head.bits} bits in {head.lane_bits}-bit lanes; {encoding.value_bits} "
            f"value bits and {encoding.n} devices take {encoding.bits} in {encoding.lane_bits}"
        )
    return encoding
