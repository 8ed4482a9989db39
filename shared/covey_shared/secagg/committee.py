"""A device as a committee member: holds shares, signs one roster and one view, reveals one kind.

What breaks privacy is a member that signs two views, or reveals both kinds of share of one device:
with the share of b the self mask goes, with the share of s the pair masks, with both the update is
bare. So a member votes once for a roster and once for a view, reveals for that view alone, and
forgets all shares when it has.

Source: Bonawitz et al. 2017, figure 4 (rounds 3 and 4: consistency check and unmasking).
"""

from collections.abc import Callable

from covey_shared import keys, wire
from covey_shared.errors import LocalProtocolError, RefusedError, RemoteProtocolError
from covey_shared.keys import AgreementKey, SigningKey
from covey_shared.messages import (
    Delivery,
    DeviceId,
    Reveal,
    RosterVote,
    View,
    ViewProposal,
    ViewVote,
)
from covey_shared.secagg import rules
from covey_shared.secagg.cohort import Cohort
from covey_shared.secagg.participant import box_info
from covey_shared.wire import Signed

REVEAL_INFO = b"reveal\x00"


def reveal_info(h: bytes, member: str) -> bytes:
    """What a box of revealed shares is bound to."""
    return REVEAL_INFO + h + member.encode()


def _unpledged(vote: RosterVote | ViewVote) -> None:
    """For members whose votes nobody keeps."""


class CommitteeMember:
    """One device's duties as a share holder in one round.

    pledge: told each vote before it is signed; it may raise RemoteProtocolError, and then nothing is.
    """

    def __init__(
        self,
        cohort: Cohort,
        device: DeviceId,
        identity: SigningKey,
        seal_key: AgreementKey,
        pledge: Callable[[RosterVote | ViewVote], None] = _unpledged,
    ) -> None:
        self._cohort = cohort
        self._device = device
        self._index = cohort.index_of(device)
        self._identity = identity
        self._seal_key = seal_key
        self._pledge = pledge
        self._shares: dict[int, bytes] = {}  # peer index -> share of b, share of s
        self._voted_roster: bytes | None = None
        self._voted_view: bytes | None = None
        self._revealed = False

    def vote_roster(self, delivery: Delivery) -> Signed[RosterVote]:
        """Open the boxes and stand by the set they came from. Once a round.

        A box that does not open is reported, not fatal: its sender's secrets are then recovered
        from other members, or the round abandoned before anyone uploads.
        """
        cohort = self._cohort
        if delivery.h != cohort.h or delivery.member != self._device:
            raise RefusedError("a delivery of another round, or for another device")
        if self._voted_roster is not None:
            raise RefusedError("a second delivery for one round: equivocation")
        u2 = cohort.subset(delivery.u2)
        if len(delivery.boxes) != len(u2):
            raise RefusedError(f"a delivery of {len(delivery.boxes)} boxes from {len(u2)} devices")
        if len(u2) < max(cohort.head.n_min, cohort.threshold):
            raise RefusedError(f"a roster of {len(u2)} devices is too small to vote for")
        for index, box in zip(sorted(u2), delivery.boxes, strict=True):
            sender = cohort.peers[index]
            try:
                self._shares[index] = self._seal_key.open(
                    box,
                    sender=sender.pk_seal,
                    info=box_info(cohort.h, sender.device, self._index + 1),
                )
            except RemoteProtocolError:
                continue
        vote = RosterVote(
            h=cohort.h,
            member=self._device,
            u2=delivery.u2,
            readable=cohort.bitmap(self._shares.keys() & u2),
        )
        self._pledge(vote)
        self._voted_roster = delivery.u2
        return wire.sign(vote, self._identity)

    @property
    def has_voted_roster(self) -> bool:
        """Whether this member has its boxes, and signed this round's one roster."""
        return self._voted_roster is not None

    def vote_view(
        self, proposal: ViewProposal, roster: frozenset[int] | None, *, uploaded: bool
    ) -> Signed[ViewVote]:
        """Stand by a view of the roster, and by no other. Once a round.

        roster: what `Participant.accept_roster` found a quorum for. uploaded: whether our own
        masked update has left.
        """
        cohort = self._cohort
        if proposal.h != cohort.h:
            raise RefusedError("a view proposal of another round or manifest")
        if roster is None:
            raise RefusedError("a view was proposed before the roster stood")
        if self._voted_view is not None:
            raise RefusedError("a second view proposal for one round: equivocation")
        if proposal.u2 != cohort.bitmap(roster):
            raise RefusedError("the view proposal names another roster than the one that stands")
        if self._voted_roster != proposal.u2:
            raise RefusedError("a view was proposed to a member without boxes of its roster")
        view = rules.check_view_shape(cohort, roster, proposal.u3)
        if self._index in view and not uploaded:
            raise RefusedError("the view claims an update of this device that it never sent")
        vote = ViewVote(h=cohort.h, member=self._device, u2=proposal.u2, u3=proposal.u3)
        self._pledge(vote)
        self._voted_view = proposal.u3
        return wire.sign(vote, self._identity)

    def reveal(self, view: View, roster: frozenset[int]) -> Signed[Reveal]:
        """Give up the shares that the view we signed allows, and forget all of them."""
        cohort = self._cohort
        if view.h != cohort.h:
            raise RefusedError("a view of another round or manifest")
        if view.u3 != self._voted_view:
            raise RefusedError("the view is not the one this member signed")
        if self._revealed:
            raise LocalProtocolError("this round's shares were revealed already")
        survivors = rules.check_view(cohort, roster, view.votes, view.u3)
        present = sorted(self._shares)
        half = keys.SEED_BYTES
        plaintext = b"".join(
            self._shares[i][:half] if i in survivors else self._shares[i][half:] for i in present
        )
        signed = wire.sign(
            Reveal(
                h=cohort.h,
                member=self._device,
                u3=view.u3,
                present=cohort.bitmap(set(present)),
                box=self._seal_key.seal(
                    cohort.head.pk_reveal,
                    info=reveal_info(cohort.h, self._device),
                    plaintext=plaintext,
                ),
            ),
            self._identity,
        )
        self.forget()
        return signed

    def forget(self) -> None:
        """Drop all shares and refuse to reveal from now on."""
        self._shares.clear()
        self._revealed = True
