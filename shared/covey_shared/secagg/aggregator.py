"""The coordinator's side of the cryptography: a running sum, the shares, the unmasking.

Memory is O(d): one running sum, never a list of updates. Of every surviving device the coordinator
learns the self-mask seed, of every device that shared but did not upload the mask-key seed, and each
is checked against what the device committed to at check-in. What the sum then is, it is exactly.

Source: Bonawitz et al. 2017, figure 4 (round 4, server).
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from covey_shared import keys, sharing
from covey_shared.errors import LocalProtocolError, MalformedError, RefusedError
from covey_shared.fixedpoint import unpack
from covey_shared.keys import AgreementKey
from covey_shared.masking import Ring, add_masks, pair_mask_key, self_mask_key
from covey_shared.messages import DeviceId, Reveal
from covey_shared.secagg.cohort import Cohort, Peer
from covey_shared.secagg.committee import reveal_info
from covey_shared.wire import Signed

# How many sets of share holders are tried when a recovered secret does not match its commitment: in a
# cohort of 128 that many take a few seconds. One liar is always found, several if they sit together.
MAX_SUBSETS = 200


class NotEnoughSharesError(RefusedError):
    """A secret cannot be recovered (yet): too few shares, or too many wrong ones.

    blamed: the device whose shares are inconsistent with its commitment, if there were shares to
    spare and the same members' shares of the other devices fit. Members who conspire could still
    bring that about, as many of them as there were shares to spare, and one more.
    """

    def __init__(self, message: str, blamed: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.blamed = tuple(blamed)


class Aggregator:
    """One round's sum. roster: U2. reveal_key: the private half of the head's pk_reveal."""

    def __init__(self, cohort: Cohort, roster: frozenset[int], reveal_key: AgreementKey) -> None:
        self._cohort = cohort
        self._roster = roster
        self._reveal_key = reveal_key
        self._encoding = cohort.encoding
        self._sum: Ring | None = np.zeros(self._encoding.n_coordinates, self._encoding.lane)
        self._added: set[int] = set()
        self._shares: dict[int, dict[int, bytes]] = {}  # holder -> target -> share
        # Holders of a share that does not lie on the polynomial of t others. They revealed wrongly, or
        # were dealt wrongly: which of the two, these shares cannot tell.
        self.liars: set[str] = set()

    @property
    def added(self) -> frozenset[int]:
        """Indices of the devices whose update is in the sum: U3, once the view is fixed."""
        return frozenset(self._added)

    def add(self, index: int, payload: bytes | memoryview) -> None:
        """Add one packed masked update. Raises MalformedError for one of a wrong size."""
        if self._sum is None or index in self._added or index not in self._roster:
            raise LocalProtocolError(f"an update of index {index} cannot be added")
        encoding = self._encoding
        try:
            update = unpack(payload, encoding.n_coordinates, encoding.bits, encoding.lane)
        except MalformedError as error:
            error.sender = self._cohort.peers[index].device
            raise
        np.add(self._sum, update, out=self._sum)
        self._added.add(index)

    def add_reveal(self, signed: Signed[Reveal], view: bytes) -> None:
        """Open a member's shares. view: U3 as the bitmap the quorum signed.

        Raises RemoteProtocolError for anything but shares of this view by the member it names.
        """
        reveal, cohort = signed.message, self._cohort
        if reveal.h != cohort.h:
            raise RefusedError("a reveal of another round or manifest")
        holder = cohort.index_of(reveal.member)
        signed.check(cohort.peers[holder].identity, signer=reveal.member)
        if reveal.u3 != view:
            raise RefusedError(f"{reveal.member} reveals for another view", sender=reveal.member)
        present = sorted(cohort.subset(reveal.present))
        if not set(present) <= self._roster:
            raise RefusedError(f"{reveal.member} reveals beyond the roster", sender=reveal.member)
        plaintext = self._reveal_key.open(
            reveal.box,
            sender=cohort.peers[holder].pk_seal,
            info=reveal_info(cohort.h, reveal.member),
        )
        size = keys.SEED_BYTES
        if len(plaintext) != size * len(present):
            raise MalformedError(
                f"{reveal.member} reveals a wrong number of shares", sender=reveal.member
            )
        self._shares[holder] = {
            target: plaintext[i * size : (i + 1) * size] for i, target in enumerate(present)
        }

    @property
    def n_reveals(self) -> int:
        """Members that have revealed."""
        return len(self._shares)

    def finish(self) -> Ring:
        """The exact sum of the added updates, lane[n_coordinates], low b bits.

        Raises NotEnoughSharesError while a secret cannot be recovered; more reveals may mend that.
        """
        if self._sum is None:
            raise LocalProtocolError("the sum was taken already")
        cohort = self._cohort
        survivors, dropped = sorted(self._added), sorted(self._roster - self._added)
        secrets = self._recover([*survivors, *dropped])
        plus: list[bytes] = []
        minus: list[bytes] = [
            self_mask_key(keys.Seed(secrets[i]), cohort.h, cohort.peers[i].device)
            for i in survivors
        ]
        for j in dropped:
            lost = cohort.peers[j]
            mask_key = keys.mask_key(secrets[j])
            for i in survivors:
                peer = cohort.peers[i]
                key = pair_mask_key(mask_key, peer.pk_mask, cohort.h, lost.device, peer.device)
                # The survivor added it if it comes before the lost device, else subtracted it.
                (minus if i < j else plus).append(key)
        total, self._sum = self._sum, None
        add_masks(total, plus, minus)
        total &= total.dtype.type((1 << self._encoding.bits) - 1)
        self._shares.clear()
        return total

    def _recover(self, targets: Sequence[int]) -> dict[int, bytes]:
        """Secrets by target: all targets with the same t holders in one batch."""
        by_holders: dict[tuple[int, ...], list[int]] = {}
        for target in targets:
            holders = tuple(x for x in sorted(self._shares) if target in self._shares[x])
            if len(holders) < self._cohort.threshold:
                raise NotEnoughSharesError(
                    f"{len(holders)} shares of {self._cohort.peers[target].device}'s secret; "
                    f"{self._cohort.threshold} are needed"
                )
            by_holders.setdefault(holders, []).append(target)
        secrets: dict[int, bytes] = {}
        for holders, group in by_holders.items():
            left = self._combine_into(secrets, holders, group)
            if len(left) > self._cohort.n - self._cohort.threshold:
                suspects = []  # so many devices cannot all have dealt wrongly: members lie
            else:
                suspects = [self._cohort.peers[i].device for i in left]
            while left:
                secrets[left[0]] = self._search(holders, left[0], suspects)
                # Who lied about one secret mostly lied about all: try the rest without them.
                left = self._combine_into(secrets, holders, left[1:])
        return secrets

    def _combine_into(
        self, secrets: dict[int, bytes], holders: Sequence[int], targets: Sequence[int]
    ) -> list[int]:
        """Recover what t of the holders not known as liars can; return the targets that do not fit."""
        peers, t = self._cohort.peers, self._cohort.threshold
        chosen = [x for x in holders if peers[x].device not in self.liars][:t]
        if len(chosen) < t:
            return list(targets)
        found = dict(zip(targets, self._combine(chosen, targets), strict=True))
        fitting = {i: secret for i, secret in found.items() if self._fits(i, secret)}
        secrets.update(fitting)
        return [i for i in targets if i not in fitting]

    def _combine(self, holders: Sequence[int], targets: Sequence[int], at: int = 0) -> list[bytes]:
        shares: Mapping[int, Sequence[bytes]] = {
            holder + 1: [self._shares[holder][target] for target in targets] for holder in holders
        }
        return sharing.combine(shares, at=at)

    def _fits(self, target: int, secret: bytes) -> bool:
        """Whether a recovered secret is the one its device committed to at check-in."""
        peer: Peer = self._cohort.peers[target]
        if target in self._added:
            return keys.self_mask_commitment(secret) == peer.self_mask_commitment
        return keys.mask_key(secret).public == peer.pk_mask

    def _search(self, holders: tuple[int, ...], target: int, suspects: Sequence[DeviceId]) -> bytes:
        """Some share is wrong: find t holders that agree with the commitment, name the others."""
        t = self._cohort.threshold
        device = self._cohort.peers[target].device
        if len(holders) == t:
            raise NotEnoughSharesError(
                f"the shares of {device}'s secret do not fit its commitment, and there are none to "
                "spare: it shared wrongly, or a member revealed wrongly"
            )
        known = [x for x in holders if self._cohort.peers[x].device in self.liars]
        ordered = (*(x for x in holders if x not in known), *known)
        for chosen in itertools.islice(_subsets(ordered, t), MAX_SUBSETS):
            secret = self._combine(chosen, [target])[0]
            if self._fits(target, secret):
                for holder in set(holders) - set(chosen):
                    expected = self._combine(chosen, [target], at=holder + 1)[0]
                    if expected != self._shares[holder][target]:
                        self.liars.add(self._cohort.peers[holder].device)
                return secret
        raise NotEnoughSharesError(
            f"the shares of {device}'s secret do not fit its commitment: {device} shared wrongly, "
            "or too many members revealed wrongly",
            blamed=(device,) if device in suspects else (),
        )


def _subsets(holders: tuple[int, ...], t: int) -> Iterator[tuple[int, ...]]:
    """Subsets of t holders, in an order that leaves every holder out early: first the rotations of
    the list, then all combinations."""
    n = len(holders)
    for start in range(n):
        yield tuple(holders[(start + i) % n] for i in range(t))
    yield from itertools.combinations(holders, t)
