"""A device as a contributor: fresh keys, shares of its seeds, one masked update.

One object lives for one round and is thrown away. It speaks three times: `check_in`, `share`,
`mask`. All randomness comes in through `rng`, which is the operating system's in the field.

Source: Bonawitz et al. 2017, figure 4 (rounds 0 to 2), with the roster votes of docs/protocol.md
between 1 and 2.
"""

import hashlib

from covey_shared import keys, sharing, wire
from covey_shared.errors import LocalProtocolError, RefusedError
from covey_shared.fixedpoint import pack
from covey_shared.keys import AgreementKey, Rng, SigningKey
from covey_shared.masking import Ring, add_masks, pair_mask_key, self_mask_key
from covey_shared.messages import (
    CheckIn,
    DeviceId,
    Manifest,
    MaskedUpdate,
    Roster,
    RoundCall,
    Shares,
)
from covey_shared.secagg import rules
from covey_shared.secagg.cohort import Cohort, Trust
from covey_shared.wire import Signed


def box_info(h: bytes, sender: str, slot: int) -> bytes:
    """What a box of shares is bound to: the manifest, who sealed it, and whose slot it is for."""
    return b"shares\x00" + h + sender.encode() + b"\x00" + slot.to_bytes(2, "big")


class Participant:
    """One device's contribution to one round.

    identity: the device's Ed25519 key. certificate: the envelope that the fleet CA signed.
    """

    def __init__(
        self,
        trust: Trust,
        identity: SigningKey,
        certificate: bytes,
        device: DeviceId,
        call: RoundCall,
        rng: Rng,
    ) -> None:
        self._trust = trust
        self._identity = identity
        self.device = device
        self._call = call
        self._rng = rng
        self._b = rng(keys.SEED_BYTES)
        self._s = rng(keys.SEED_BYTES)
        mask_key = keys.mask_key(self._s)
        self._mask_key: AgreementKey | None = mask_key
        # c, the seal key's seed, is never shared: nobody else may open this device's boxes.
        self.seal_key = keys.seal_key(rng(keys.SEED_BYTES))
        self.check_in: Signed[CheckIn] = wire.sign(
            CheckIn(
                fleet=trust.fleet,
                run=call.run,
                round=call.round,
                device=device,
                certificate=certificate,
                pk_mask=mask_key.public,
                pk_seal=self.seal_key.public,
                self_mask_commitment=keys.self_mask_commitment(self._b),
            ),
            identity,
        )
        self._manifest: bytes | None = None
        self.cohort: Cohort | None = None
        self.index = -1
        self.roster: frozenset[int] | None = None

    def share(self, manifest: Signed[Manifest], expected: rules.Expectation) -> Signed[Shares]:
        """Check the manifest and share both seeds among the committee.

        Raises RemoteProtocolError if anything about the manifest is wrong, also when it is the
        second, different one of this round.
        """
        if self._manifest is not None:
            raise (
                LocalProtocolError("shares were made already")
                if self._manifest == manifest.envelope
                else RefusedError("a second, different manifest for one round: equivocation")
            )
        cohort = rules.verified_cohort(manifest, self._trust)
        index = cohort.index_of(self.device)
        rules.check_expectation(cohort, expected, self.check_in.envelope, index)
        t, n = cohort.threshold, cohort.n
        b_shares = sharing.split(self._b, t, n, self._rng)
        s_shares = sharing.split(self._s, t, n, self._rng)
        boxes = tuple(
            self.seal_key.seal(
                peer.pk_seal,
                info=box_info(cohort.h, self.device, peer.index + 1),
                plaintext=b_shares[peer.index] + s_shares[peer.index],
            )
            for peer in cohort.peers
        )
        signed = wire.sign(Shares(h=cohort.h, device=self.device, boxes=boxes), self._identity)
        # Only now, with nothing left that can fail, is this the round's one manifest.
        self._manifest, self.cohort, self.index = manifest.envelope, cohort, index
        return signed

    def is_manifest(self, manifest: Signed[Manifest]) -> bool:
        """Whether this is, byte for byte, the manifest that was accepted."""
        return self._manifest == manifest.envelope

    def accept_roster(self, roster: Roster) -> None:
        """Check the quorum behind the roster. Whether we are on it, `on_roster` says then."""
        cohort = self._cohort()
        if roster.h != cohort.h:
            raise RefusedError("a roster of another round or manifest")
        u2 = rules.check_roster(cohort, roster.votes, roster.u2)
        if self.roster is not None and self.roster != u2:
            raise RefusedError("a second, different roster for one round: equivocation")
        self.roster = u2

    @property
    def on_roster(self) -> bool:
        """Whether a roster stands and names us: only then is there anyone to mask with."""
        return self.roster is not None and self.index in self.roster

    def mask(self, ring: Ring) -> tuple[Signed[MaskedUpdate], bytes]:
        """Mask an encoded update and forget the seeds. Once a round: a second mask would reveal.

        ring: lane[n_coordinates], overwritten. Returns the signed digest and the packed payload.
        """
        cohort, roster = self._cohort(), self.roster or frozenset()
        if self.index not in roster:
            raise LocalProtocolError("an update cannot be masked without a roster that names us")
        # Taken before it is used: whatever fails from here on, there is no second mask.
        mask_key, self._mask_key = self._mask_key, None
        if mask_key is None:
            raise LocalProtocolError("this round's update was masked already")
        plus: list[bytes] = [self_mask_key(self._b, cohort.h, self.device)]
        minus: list[bytes] = []
        for peer in cohort.peers:
            if peer.index == self.index or peer.index not in roster:
                continue
            key = pair_mask_key(mask_key, peer.pk_mask, cohort.h, self.device, peer.device)
            (plus if self.index < peer.index else minus).append(key)
        add_masks(ring, plus, minus)
        payload = pack(ring, cohort.head.bits)
        ring[...] = 0
        self.forget()
        signed = wire.sign(
            MaskedUpdate(
                h=cohort.h,
                device=self.device,
                u2=cohort.bitmap(roster),
                payload=hashlib.sha256(payload).digest(),
                payload_bytes=len(payload),
            ),
            self._identity,
        )
        return signed, payload

    def forget(self) -> None:
        """Drop the seeds. Python cannot wipe memory, but nothing refers to them any longer."""
        self._b = self._s = b""
        self._mask_key = None

    def _cohort(self) -> Cohort:
        if self.cohort is None:
            raise LocalProtocolError("there is no manifest yet")
        return self.cohort
