"""A coordinator that lies, against a lab's real devices.

Mallory holds the fleet's real coordinator key and a reveal key of her own, and talks to every device
as she likes. Her steps, called without arguments, are an honest round; a test changes what she says
at one of them, or says something else to some devices, and looks at what the devices give away.
"""

import hashlib
from collections.abc import Iterable

import numpy as np

from covey_device import session as device
from covey_shared import keys, sharing, wire
from covey_shared.fixedpoint import Encoding, to_signed, unpack
from covey_shared.masking import add_masks, pair_mask_key, self_mask_key
from covey_shared.messages import (
    CheckIn,
    Delivery,
    DeviceId,
    Head,
    Manifest,
    MaskedUpdate,
    Message,
    Reveal,
    Roster,
    RosterVote,
    Shares,
    View,
    ViewProposal,
    ViewVote,
    Work,
)
from covey_shared.secagg import rules
from covey_shared.secagg.aggregator import Aggregator
from covey_shared.secagg.cohort import Cohort, check_ins_digest
from covey_shared.secagg.committee import reveal_info
from covey_shared.secagg.parameters import PRG, parameters_for
from covey_shared.secagg.participant import box_info
from covey_shared.wire import Signed
from lab import NOW_UNIX, Lab


def published(actions: Iterable[device.Action], kind: type[Message]) -> list[Signed[Message]]:
    """The messages of a kind among a device's actions."""
    found = [a.message for a in actions if isinstance(a, device.Publish)]
    return [signed for signed in found if isinstance(signed.message, kind)]


def declined(actions: Iterable[device.Action]) -> str | None:
    """Why a device left the round, if it did."""
    for action in actions:
        if isinstance(action, device.Ended) and action.outcome.startswith("declined: "):
            return action.outcome.removeprefix("declined: ")
    return None


class Forger:
    """What a lying coordinator can say in one round, and work out from the answers, kept by name."""

    def __init__(self, lab: Lab, round_id: int = 1, **call: object) -> None:
        self.lab = lab
        self.call = lab.call(round_id, **call)
        self.reveal_key = keys.AgreementKey(lab.rng(32))
        self.check_ins: dict[DeviceId, bytes] = {}
        self.cohort: Cohort = None  # type: ignore[assignment]  # until `share`
        self.shares: dict[DeviceId, Shares] = {}
        self.u2: frozenset[int] = frozenset()
        self.u3: frozenset[int] = frozenset()
        self.roster_votes: dict[DeviceId, bytes] = {}
        self.updates: dict[DeviceId, Signed[MaskedUpdate]] = {}
        self.payloads: dict[DeviceId, bytes] = {}
        self.view_votes: dict[DeviceId, bytes] = {}
        self.reveals: dict[DeviceId, Signed[Reveal]] = {}

    @property
    def members(self) -> list[DeviceId]:
        """The devices that are in the round, as far as it has got."""
        if self.cohort is None:
            return list(self.lab.names)
        return [peer.device for peer in self.cohort.peers]

    # -- what she says ----------------------------------------------------------------------------

    def head(self, envelopes: tuple[bytes, ...] | None = None, **changes: object) -> Head:
        """An honest head over these check-ins, with some fields changed."""
        envelopes = tuple(self.check_ins.values()) if envelopes is None else envelopes
        call, n = self.call, len(envelopes)
        encoding = Encoding(16, n, self.lab.n_params, 1.0, 1000, (10.0,))
        parameters = parameters_for(n)
        fields: dict[str, object] = {
            "fleet": call.fleet,
            "run": call.run,
            "round": call.round,
            "plan": call.plan,
            "model": call.model,
            "revision": call.revision,
            "check_ins": check_ins_digest(envelopes),
            "n": n,
            "n_params": self.lab.n_params,
            "value_bits": encoding.value_bits,
            "bits": encoding.bits,
            "lane_bits": encoding.lane_bits,
            "prg": PRG,
            "degree": parameters.degree,
            "min_side": parameters.min_side,
            "committee": parameters.committee,
            "threshold": parameters.threshold,
            "n_min": call.n_min,
            "w_max": encoding.w_max,
            "clip": encoding.clip,
            "metric_clips": encoding.metric_clips,
            "work": Work(batches=1, batch_size=1, seconds=10.0, hyper=(0.1,)),
            "pk_reveal": self.reveal_key.public,
            "issued_unix": NOW_UNIX,
            "share_s": 10.0,
            "collect_s": 20.0,
            "unmask_s": 10.0,
        }
        return Head(**(fields | changes))  # type: ignore[arg-type]

    def manifest(self, envelopes: tuple[bytes, ...] | None = None, **changes: object) -> Manifest:
        """An honest manifest over these check-ins, with some fields of the head changed."""
        envelopes = tuple(self.check_ins.values()) if envelopes is None else envelopes
        return Manifest(self.head(envelopes, **changes), envelopes)

    def cohort_of(self, manifest: Manifest) -> Cohort:
        """What a device makes of a manifest."""
        signed = wire.sign(manifest, self.lab.coordinator_key)
        return rules.verified_cohort(signed, self.lab.trust)

    def delivery(
        self, name: DeviceId, u2: frozenset[int] | None = None, **changes: object
    ) -> Delivery:
        """The boxes for one member."""
        u2 = self.u2 if u2 is None else u2
        slot = self.cohort.index_of(name)
        senders = self.cohort.names(u2)
        fields: dict[str, object] = {
            "h": self.cohort.h,
            "member": name,
            "u2": self.cohort.bitmap(u2),
            "boxes": tuple(self.shares[sender].boxes[slot] for sender in senders),
        }
        return Delivery(**(fields | changes))  # type: ignore[arg-type]

    def roster(self, **changes: object) -> Roster:
        """A roster with as many votes as are needed."""
        votes = tuple(self.roster_votes.values())[: self.cohort.threshold]
        fields: dict[str, object] = {
            "h": self.cohort.h,
            "u2": self.cohort.bitmap(self.u2),
            "votes": votes,
        }
        return Roster(**(fields | changes))  # type: ignore[arg-type]

    def proposal(self, u3: frozenset[int] | None = None, **changes: object) -> ViewProposal:
        fields: dict[str, object] = {
            "h": self.cohort.h,
            "u2": self.cohort.bitmap(self.u2),
            "u3": self.cohort.bitmap(self.u3 if u3 is None else u3),
        }
        return ViewProposal(**(fields | changes))  # type: ignore[arg-type]

    def view(self, u3: frozenset[int] | None = None, **changes: object) -> View:
        fields: dict[str, object] = {
            "h": self.cohort.h,
            "u3": self.cohort.bitmap(self.u3 if u3 is None else u3),
            "votes": tuple(self.view_votes.values())[: self.cohort.threshold],
        }
        return View(**(fields | changes))  # type: ignore[arg-type]

    # -- what she learns --------------------------------------------------------------------------

    def opened(self, reveal: Reveal) -> dict[tuple[DeviceId, str], bytes]:
        """(device, "b" or "s") -> this member's share of that secret."""
        names = self.cohort.names(self.cohort.subset(reveal.present))
        survivors = set(self.cohort.names(self.cohort.subset(reveal.u3)))
        plaintext = self.reveal_key.open(
            reveal.box,
            sender=self.cohort.peers[self.cohort.index_of(reveal.member)].pk_seal,
            info=reveal_info(self.cohort.h, reveal.member),
        )
        size = keys.SEED_BYTES
        return {
            (name, "b" if name in survivors else "s"): plaintext[size * i : size * (i + 1)]
            for i, name in enumerate(names)
        }

    def aggregate(self, names: Iterable[DeviceId] | None = None) -> np.ndarray:
        """The signed sum of the devices in the view, unmasked with the reveals of `names`."""
        aggregator = Aggregator(self.cohort, self.u2, self.reveal_key)
        for index in sorted(self.u3):
            aggregator.add(index, self.payloads[self.cohort.peers[index].device])
        for name in self.reveals if names is None else names:
            aggregator.add_reveal(self.reveals[name], self.cohort.bitmap(self.u3))
        return to_signed(aggregator.finish(), self.cohort.head.bits)

    def plain(self, names: Iterable[DeviceId]) -> np.ndarray:
        """What the sum of these devices ought to be, in signed integers."""
        bits = self.cohort.head.bits
        return sum(to_signed(self.lab.plain[name, self.call.round], bits) for name in names)  # type: ignore[return-value]

    def stripped(self, name: DeviceId, *, s: bytes, b: bytes | None) -> np.ndarray:
        """A device's masked update with the pair masks of seed s taken off, and the self mask of b."""
        cohort = self.cohort
        index, mask_key = cohort.index_of(name), keys.mask_key(s)
        encoding = cohort.encoding
        ring = unpack(self.payloads[name], encoding.n_coordinates, encoding.bits, encoding.lane)
        plus, minus = [], [] if b is None else [self_mask_key(keys.Seed(b), cohort.h, name)]
        for other in sorted(self.u2 - {index}):
            peer = cohort.peers[other]
            key = pair_mask_key(mask_key, peer.pk_mask, cohort.h, name, peer.device)
            (minus if index < other else plus).append(key)
        add_masks(ring, plus, minus)
        return to_signed(ring, encoding.bits)

    def payload_digest(self, name: DeviceId) -> bytes:
        return hashlib.sha256(self.payloads[name]).digest()


class Mallory(Forger):
    """One round of a lying coordinator, against the devices of a lab."""

    # -- talking ----------------------------------------------------------------------------------

    def tell(self, name: DeviceId, message: Message) -> list[device.Action]:
        """Sign a message, give it to a device, and let the device get on with what it has to do."""
        return self.give(name, wire.sign(message, self.lab.coordinator_key).envelope)

    def give(self, name: DeviceId, envelope: bytes) -> list[device.Action]:
        """Give a device bytes that somebody signed."""
        return self._follow(name, self.lab.sessions[name].receive(envelope))

    def _follow(self, name: DeviceId, actions: list[device.Action]) -> list[device.Action]:
        session, done = self.lab.sessions[name], []
        for action in actions:
            done.append(action)
            match action:
                case device.Fetch(call):
                    prepared = device.Prepared(self.lab.n_params, 1, 1)
                    done += self._follow(name, session.ready(call.round, prepared))
                case device.Train(round_id):
                    update = self.lab.update(name, round_id)
                    done += self._follow(name, session.trained(round_id, *update))
                case device.Save(memory):
                    self.lab.saved[name].append(memory)
                case device.Keep(unfinished):
                    self.lab.kept[name] = unfinished
                case device.Forget():
                    self.lab.kept[name] = None
                case device.Upload(payload):
                    self.payloads[name] = payload
        return done

    def ask(
        self, message: Message, kind: type[Message], names: Iterable[DeviceId] | None = None
    ) -> dict[DeviceId, Signed[Message]]:
        """Tell devices (by default all that there are in the round) the same thing; their answers of
        one kind."""
        answers = {}
        for name in self.members if names is None else names:
            for signed in published(self.tell(name, message), kind):
                answers[name] = signed
        return answers

    # -- the steps of a round ---------------------------------------------------------------------

    def gather(self) -> "Mallory":
        found = self.ask(self.call, CheckIn)
        self.check_ins = {name: signed.envelope for name, signed in sorted(found.items())}
        return self

    def share(self) -> "Mallory":
        manifest = self.manifest()
        self.cohort = self.cohort_of(manifest)
        answers = self.ask(manifest, Shares, self.check_ins)
        self.shares = {name: signed.message for name, signed in answers.items()}  # type: ignore[misc]
        self.u2 = frozenset(self.cohort.index_of(name) for name in self.shares)
        return self

    def deliver(self) -> "Mallory":
        for name in self.members:
            for vote in published(self.tell(name, self.delivery(name)), RosterVote):
                self.roster_votes[name] = vote.envelope
        return self

    def collect(self) -> "Mallory":
        self.updates = self.ask(self.roster(), MaskedUpdate)  # type: ignore[assignment]
        self.u3 = frozenset(self.cohort.index_of(name) for name in self.updates)
        return self

    def propose(self) -> "Mallory":
        answers = self.ask(self.proposal(), ViewVote)
        self.view_votes = {name: signed.envelope for name, signed in answers.items()}
        return self

    def reveal(self) -> "Mallory":
        self.reveals = self.ask(self.view(), Reveal)  # type: ignore[assignment]
        return self


def dealt_wrongly(lab: Lab, name: DeviceId, members: Iterable[DeviceId]) -> bytes:
    """A device's message of shares in which these members' boxes open, but hold something else."""
    inner = lab.sessions[name]._round
    assert inner is not None
    participant = inner.participant
    assert participant is not None
    cohort = participant._cohort()
    t, n = cohort.threshold, cohort.n
    b_shares = sharing.split(participant._b, t, n, lab.rng)
    s_shares = sharing.split(participant._s, t, n, lab.rng)
    wrong = set(members)
    boxes = tuple(
        participant.seal_key.seal(
            peer.pk_seal,
            info=box_info(cohort.h, name, peer.index + 1),
            plaintext=lab.rng(32) if peer.device in wrong else b_shares[i] + s_shares[i],
        )
        for i, peer in enumerate(cohort.peers)
    )
    return wire.sign(Shares(cohort.h, name, boxes), lab.identities[name]).envelope


def lie(lab: Lab, member: DeviceId, about: Iterable[DeviceId] | None = None) -> None:
    """Let a member reveal something else than the shares it was dealt, of some devices or of all."""
    inner = lab.sessions[member]._round
    assert inner is not None
    holder = inner.member
    assert holder is not None
    targets = None if about is None else {holder._cohort.index_of(name) for name in about}
    for index in holder._shares:
        if targets is None or index in targets:
            holder._shares[index] = lab.rng(32)
