"""A device that lies: its identity and certificate are real, what it says is what it wants.

`Rogue` is a device written anew from the protocol, without any of the real one's refusals; as it stands
it is honest. Each class below it lies at one point. `RogueDevice` lets it speak over a real broker.

By hand, from the tests' folder, with the files that `covey device add` makes: `python -m
attacks.programs.device --config DEVICE/device.toml --lie wrong-reveal`.
"""

import argparse
import asyncio
import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import numpy as np

from covey_device.assembly import load_device
from covey_shared import chunks, keys, sharing, wire
from covey_shared.errors import CoveyError
from covey_shared.fixedpoint import pack
from covey_shared.keys import AgreementKey, SigningKey
from covey_shared.masking import Ring, add_masks, pair_mask_key, self_mask_key
from covey_shared.messages import (
    CheckIn,
    Delivery,
    DeviceId,
    Manifest,
    MaskedUpdate,
    Message,
    Reveal,
    Roster,
    RosterVote,
    RoundCall,
    Shares,
    View,
    ViewProposal,
    ViewVote,
)
from covey_shared.mqtt import MqttTransport
from covey_shared.secagg import rules
from covey_shared.secagg.cohort import Cohort, Trust
from covey_shared.secagg.committee import reveal_info
from covey_shared.secagg.participant import box_info
from covey_shared.topics import OFFLINE, ONLINE, Topics
from covey_shared.transport import Incoming

Said = tuple[str, bytes]  # topic, payload


class Rogue:
    """What a device says, without I/O. plain: round -> what it put under its mask. keys: all agreement
    keys it ever had, for its accomplices. gone: it has fallen silent. spoke_last: its reveal has left."""

    vanishes_at: type[Message] | None = None

    def __init__(self, name: str, identity: SigningKey, certificate: bytes, trust: Trust) -> None:
        self.name, self.identity, self.certificate = DeviceId(name), identity, certificate
        self.trust, self.topics = trust, Topics(trust.fleet)
        self.call: RoundCall | None = None
        self.cohort: Cohort | None = None
        self.plain: dict[int, Ring] = {}
        self.keys: list[AgreementKey] = []
        self.held: dict[int, bytes] = {}  # peer index -> share of b, share of s
        self.u2 = b""
        self.gone = False
        self.spoke_last = asyncio.Event()
        self.said: set[type[Message]] = set()

    # -- the honest part --------------------------------------------------------------------------

    def signed(self, message: Message) -> bytes:
        return wire.sign(message, self.identity).envelope

    def out(self, message: Message | bytes) -> Said:
        data = message if isinstance(message, bytes) else self.signed(message)
        return self.topics.outbox(self.name), data

    def hear(self, data: bytes) -> Iterator[Said]:
        """One message from the coordinator -> what it says to that, once."""
        try:
            message = wire.decode(data).message
        except CoveyError:
            return
        if isinstance(message, RoundCall) and message != self.call:
            self.call, self.cohort, self.said = message, None, set()
            self.b, self.s = os.urandom(16), os.urandom(16)
            self.mask_key, self.seal_key = keys.mask_key(self.s), keys.seal_key(os.urandom(16))
            self.keys += [self.mask_key, self.seal_key]
        kind = type(message)
        if self.gone or self.call is None or kind in self.said:
            return
        if not isinstance(message, RoundCall | Manifest) and (
            self.cohort is None or getattr(message, "h", None) != self.cohort.h
        ):
            return
        if isinstance(message, Delivery) and message.member != self.name:
            return
        answers: dict[type[Message], Callable[..., Iterator[Said]]] = {
            RoundCall: self.check_in,
            Manifest: self.share,
            Delivery: self.vote_roster,
            Roster: self.update,
            ViewProposal: self.vote_view,
            View: self.reveal,
        }
        if kind not in answers:
            return
        self.said.add(kind)
        if kind is self.vanishes_at:
            self.gone = True
            return
        yield from answers[kind](message)

    def check_in_message(self, call: RoundCall, **changes: object) -> CheckIn:
        honest = CheckIn(
            fleet=call.fleet,
            run=call.run,
            round=call.round,
            device=self.name,
            certificate=self.certificate,
            pk_mask=self.mask_key.public,
            pk_seal=self.seal_key.public,
            self_mask_commitment=keys.self_mask_commitment(self.b),
        )
        return msgspec.structs.replace(honest, **changes)

    def check_in(self, call: RoundCall) -> Iterator[Said]:
        yield self.out(self.check_in_message(call))

    def shared(self) -> tuple[bytes, bytes]:
        """The secrets that it deals."""
        return self.b, self.s

    def box(self, slot: int, plaintext: bytes) -> bytes:
        assert self.cohort is not None
        info = box_info(self.cohort.h, self.name, slot)
        return self.seal_key.seal(
            self.cohort.peers[slot - 1].pk_seal, info=info, plaintext=plaintext
        )

    def share(self, manifest: Manifest) -> Iterator[Said]:
        self.cohort = self.read(manifest)
        n, t = self.cohort.n, self.cohort.threshold
        b, s = (sharing.split(secret, t, n, os.urandom) for secret in self.shared())
        boxes = tuple(self.box(i + 1, b[i] + s[i]) for i in range(n))
        yield self.out(Shares(self.cohort.h, self.name, boxes))

    def read(self, manifest: Manifest) -> Cohort:
        """Whoever signed it: a rogue takes part in anything."""
        anybody = SigningKey(bytes(32))
        trust = Trust(self.trust.fleet, self.trust.ca, anybody.public)
        return rules.verified_cohort(wire.sign(manifest, anybody), trust)

    def vote_roster(self, delivery: Delivery) -> Iterator[Said]:
        cohort = self.cohort
        assert cohort is not None
        slot = cohort.index_of(self.name) + 1
        for index, box in zip(sorted(cohort.subset(delivery.u2)), delivery.boxes, strict=True):
            peer = cohort.peers[index]
            try:
                info = box_info(cohort.h, peer.device, slot)
                self.held[index] = self.seal_key.open(box, sender=peer.pk_seal, info=info)
            except CoveyError:
                continue
        yield self.out(RosterVote(cohort.h, self.name, delivery.u2, delivery.u2))

    def ring(self) -> Ring:
        """What it puts under its mask: lane[n_coordinates]."""
        assert self.cohort is not None
        encoding = self.cohort.encoding
        values = np.random.default_rng().integers(-500, 500, encoding.n_coordinates)
        return (values & ((1 << encoding.bits) - 1)).astype(encoding.lane)

    def masks(self, ring: Ring, sign: int = 1) -> Ring:
        """The ring with its masks put on, or taken off for sign = -1."""
        cohort = self.cohort
        assert cohort is not None
        masked, me = ring.copy(), cohort.index_of(self.name)
        plus, minus = [self_mask_key(keys.Seed(self.b), cohort.h, self.name)], []
        for index in sorted(cohort.subset(self.u2) - {me}):
            peer = cohort.peers[index]
            key = pair_mask_key(self.mask_key, peer.pk_mask, cohort.h, self.name, peer.device)
            (plus if me < index else minus).append(key)
        add_masks(masked, *((plus, minus) if sign > 0 else (minus, plus)))
        return masked

    def announced(self, payload: bytes, **changes: object) -> MaskedUpdate:
        assert self.cohort is not None
        digest = hashlib.sha256(payload).digest()
        honest = MaskedUpdate(self.cohort.h, self.name, self.u2, digest, len(payload))
        return msgspec.structs.replace(honest, **changes)

    def frames(self, payload: bytes) -> Iterator[Said]:
        for frame in chunks.split(chunks.blob_of(payload)):
            yield self.topics.upload(self.name), frame

    def update(self, roster: Roster) -> Iterator[Said]:
        self.u2 = roster.u2
        assert self.call is not None
        assert self.cohort is not None
        self.plain[self.call.round] = ring = self.ring()
        payload = pack(self.masks(ring), self.cohort.head.bits)
        yield self.out(self.announced(payload))
        yield from self.frames(payload)

    def vote_view(self, proposal: ViewProposal) -> Iterator[Said]:
        yield self.out(ViewVote(proposal.h, self.name, proposal.u2, proposal.u3))

    def revealed(self, index: int, survivor: bool) -> bytes:
        """A share that it gives up."""
        half = keys.SEED_BYTES
        return self.held[index][:half] if survivor else self.held[index][half:]

    def reveal(self, view: View) -> Iterator[Said]:
        cohort = self.cohort
        assert cohort is not None
        survivors = cohort.subset(view.u3)
        plaintext = b"".join(self.revealed(i, i in survivors) for i in sorted(self.held))
        box = self.seal_key.seal(
            cohort.head.pk_reveal, info=reveal_info(cohort.h, self.name), plaintext=plaintext
        )
        yield self.out(Reveal(cohort.h, self.name, view.u3, cohort.bitmap(set(self.held)), box))


# -- lies -----------------------------------------------------------------------------------------


def _vanishing(kind: type[Message]) -> type[Rogue]:
    """Falls silent, and off the network, when it should answer such a message."""
    return type("Vanishing", (Rogue,), {"vanishes_at": kind})


class OtherShares(Rogue):
    """Deals shares of secrets that are not those it committed to."""

    def shared(self) -> tuple[bytes, bytes]:
        return os.urandom(16), os.urandom(16)


class SealedShut(Rogue):
    """Boxes that nobody can open."""

    def box(self, slot: int, plaintext: bytes) -> bytes:
        return os.urandom(len(super().box(slot, plaintext)))


class TwoCheckIns(Rogue):
    """Checks in with two sets of keys."""

    def check_in(self, call: RoundCall) -> Iterator[Said]:
        yield from super().check_in(call)
        other = keys.seal_key(os.urandom(16)).public
        yield self.out(self.check_in_message(call, pk_seal=other))


class TwoUpdates(Rogue):
    """Announces one update and another, and sends both."""

    def update(self, roster: Roster) -> Iterator[Said]:
        first = list(super().update(roster))
        assert self.cohort is not None
        second = pack(self.masks(self.ring()), self.cohort.head.bits)
        yield first[0]
        yield self.out(self.announced(second))
        yield from self.frames(second)
        yield from first[1:]


class TwoVotes(Rogue):
    """Votes for the roster and for one without somebody; for the view, and for another."""

    def vote_roster(self, delivery: Delivery) -> Iterator[Said]:
        yield from super().vote_roster(delivery)
        yield self.out(
            RosterVote(delivery.h, self.name, self.less(delivery.u2), b"\0" * len(delivery.u2))
        )

    def vote_view(self, proposal: ViewProposal) -> Iterator[Said]:
        yield from super().vote_view(proposal)
        yield self.out(ViewVote(proposal.h, self.name, proposal.u2, self.less(proposal.u3)))

    def less(self, bitmap: bytes) -> bytes:
        assert self.cohort is not None
        everyone = self.cohort.subset(bitmap)
        return self.cohort.bitmap(everyone - {min(everyone)})


class Repeats(Rogue):
    """Says everything five times, its update's chunks included, and turned around."""

    def hear(self, data: bytes) -> Iterator[Said]:
        said = list(super().hear(data))
        for turn in range(5):
            yield from said if turn % 2 == 0 else reversed(said)


class Impostor(Rogue):
    """Speaks from another's topics, in the other's name and in its own."""

    def other(self) -> DeviceId:
        return DeviceId("pi-0")

    def hear(self, data: bytes) -> Iterator[Said]:
        for topic, payload in super().hear(data):
            yield topic.replace(self.name, self.other()), payload
            yield topic, payload

    def check_in(self, call: RoundCall) -> Iterator[Said]:
        # its own certificate under the other's name
        stolen = self.check_in_message(call, device=self.other())
        yield self.topics.outbox(self.other()), self.signed(stolen)
        yield self.out(stolen)
        yield from super().check_in(call)

    def vote_view(self, proposal: ViewProposal) -> Iterator[Said]:
        forged = ViewVote(proposal.h, self.other(), proposal.u2, proposal.u2)
        yield self.topics.outbox(self.other()), self.signed(forged)
        yield from super().vote_view(proposal)


class Edges(Rogue):
    """Puts the ring's edges under its mask: all ones, the largest, the smallest."""

    def ring(self) -> Ring:
        assert self.cohort is not None
        bits = self.cohort.head.bits
        edges = [(1 << bits) - 1, (1 << (bits - 1)) - 1, 1 << (bits - 1)]
        return np.resize(np.array(edges), self.cohort.encoding.n_coordinates).astype(
            self.cohort.encoding.lane
        )


class AllOnes(Rogue):
    """Sends a payload of ones for its masked update, masks or not."""

    def update(self, roster: Roster) -> Iterator[Said]:
        self.u2 = roster.u2
        assert self.call is not None
        assert self.cohort is not None
        bits, encoding = self.cohort.head.bits, self.cohort.encoding
        ones = np.full(encoding.n_coordinates, (1 << bits) - 1, encoding.lane)
        # What that comes to, once the others' masks are taken off.
        self.plain[self.call.round] = self.masks(ones, -1) & encoding.lane.type((1 << bits) - 1)
        payload = pack(ones, bits)
        yield self.out(self.announced(payload))
        yield from self.frames(payload)


class _Garbled(Rogue):
    def garbled(self, payload: bytes) -> bytes:
        raise NotImplementedError

    def update(self, roster: Roster) -> Iterator[Said]:
        self.u2 = roster.u2
        assert self.cohort is not None
        payload = self.garbled(pack(self.masks(self.ring()), self.cohort.head.bits))
        yield self.out(self.announced(payload))
        yield from self.frames(payload)
        self.gone = True


class WrongLength(_Garbled):
    """Announces and sends a byte too many."""

    def garbled(self, payload: bytes) -> bytes:
        return payload + b"\0"


class WrongPadding(_Garbled):
    """Sets the bits after the last number."""

    def garbled(self, payload: bytes) -> bytes:
        return payload[:-1] + bytes((payload[-1] | 0x80,))


class WrongReveal(Rogue):
    """Reveals something else than the shares it was dealt."""

    def revealed(self, index: int, survivor: bool) -> bytes:
        return os.urandom(keys.SEED_BYTES)


class OtherKind(Rogue):
    """Reveals of everybody the share that nobody asked for."""

    def revealed(self, index: int, survivor: bool) -> bytes:
        return super().revealed(index, not survivor)


class Flood(Rogue):
    """With everything it says goes a heap of garbage, under its own name and others'."""

    PER_MESSAGE = 300

    def hear(self, data: bytes) -> Iterator[Said]:
        said = list(super().hear(data))
        for i in range(self.PER_MESSAGE if said else 0):
            topics = (self.topics.outbox, self.topics.upload, self.topics.presence)
            yield topics[i % 3](f"pi-{i % 5}" if i % 2 else self.name), os.urandom(1 + i % 400)
        yield from said


LIES: dict[str, type[Rogue]] = {
    "none": Rogue,
    "vanish-at-call": _vanishing(RoundCall),
    "vanish-at-manifest": _vanishing(Manifest),
    "vanish-at-delivery": _vanishing(Delivery),
    "vanish-at-roster": _vanishing(Roster),
    "vanish-at-proposal": _vanishing(ViewProposal),
    "vanish-at-view": _vanishing(View),
    "other-shares": OtherShares,
    "sealed-shut": SealedShut,
    "two-check-ins": TwoCheckIns,
    "two-updates": TwoUpdates,
    "two-votes": TwoVotes,
    "repeats": Repeats,
    "impostor": Impostor,
    "edges": Edges,
    "all-ones": AllOnes,
    "wrong-length": WrongLength,
    "wrong-padding": WrongPadding,
    "wrong-reveal": WrongReveal,
    "other-kind": OtherKind,
    "flood": Flood,
}


class RogueDevice:
    """``async with``: a rogue on a real broker, there until it vanishes."""

    def __init__(self, rogue: Rogue, transport: MqttTransport) -> None:
        self.rogue, self.transport = rogue, transport
        self.n_said = 0
        self._inbox: asyncio.Queue[bytes] = asyncio.Queue()

    async def __aenter__(self) -> "RogueDevice":
        topics, name = self.rogue.topics, self.rogue.name
        up = asyncio.Event()

        async def connected() -> None:
            up.set()

        await self.transport.subscribe(topics.round, topics.all, topics.inbox(name))
        await self.transport.start(self._on_message, connected, lambda reason: None)
        async with asyncio.timeout(30):
            await up.wait()
        await self.transport.publish(topics.presence(name), ONLINE, retain=True)
        self._task = asyncio.create_task(self._work())
        return self

    async def __aexit__(self, *error: object) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        await self.transport.stop()

    def _on_message(self, incoming: Incoming) -> None:
        if incoming.payload:
            self._inbox.put_nowait(incoming.payload)

    async def _work(self) -> None:
        while True:
            data = await self._inbox.get()
            for topic, payload in self.rogue.hear(data):
                await self.transport.publish(topic, payload)
                self.n_said += 1
            if View in self.rogue.said:
                self.rogue.spoke_last.set()
            if self.rogue.gone:
                presence = self.rogue.topics.presence(self.rogue.name)
                await self.transport.publish(presence, OFFLINE, retain=True)
                return


async def _main(arguments: argparse.Namespace) -> None:
    parts = load_device(arguments.config)
    broker = parts.config.broker
    transport = MqttTransport(
        broker.url,
        parts.config.device,
        username=broker.username,
        password=parts.password,
        tls=parts.tls,
    )
    kind = LIES[arguments.lie]
    rogue = kind(parts.config.device, parts.identity, parts.certificate, parts.trust)
    async with RogueDevice(rogue, transport) as device:
        print(f"{rogue.name} is there, and lies: {arguments.lie}")
        await asyncio.sleep(arguments.seconds)
        print(f"it said {device.n_said} messages")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="A device that lies, in a fleet of your own.")
    parser.add_argument("--config", type=Path, required=True, help="its device.toml")
    parser.add_argument("--lie", choices=LIES, default="none")
    parser.add_argument("--seconds", type=float, default=600.0, help="how long to stay")
    asyncio.run(_main(parser.parse_args()))
