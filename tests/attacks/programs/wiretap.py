"""Someone who reads everything, and does the arithmetic.

`Wiretap` subscribes to all topics of a fleet. `View` is what an attacker has: the bytes that it saw and
the keys it holds. From these alone it opens every box it can, recovers every secret it has shares
enough for, and takes off every mask it can make: `smallest_sum`, `unmask_attempt`. What it
cannot compute it does not guess.

By hand, from the tests' folder: `python -m attacks.programs.wiretap mqtt://HOST:PORT --fleet NAME`.
"""

import argparse
import asyncio
import contextlib
import hashlib
import itertools
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from covey_shared import chunks, keys, sharing, wire
from covey_shared.errors import CoveyError, RemoteProtocolError
from covey_shared.fixedpoint import to_signed, unpack
from covey_shared.keys import AgreementKey
from covey_shared.masking import Ring, add_masks, pair_mask_key, self_mask_key
from covey_shared.messages import (
    Certificate,
    CheckIn,
    DeviceId,
    Head,
    Manifest,
    MaskedUpdate,
    Reveal,
    Shares,
)
from covey_shared.mqtt import MqttTransport
from covey_shared.secagg.cohort import Peer, encoding_of, manifest_digest
from covey_shared.secagg.committee import reveal_info
from covey_shared.secagg.participant import box_info
from covey_shared.transport import Incoming
from live_fleet import LiveFleet

Secret = tuple[str, DeviceId]  # ("b" or "s", whose)


@dataclass
class Seen:
    """One manifest's round, as an attacker knows it. Nothing here is verified: it need not be."""

    h: bytes
    head: Head
    peers: tuple[Peer, ...]
    u2: dict[DeviceId, bytes] = field(default_factory=dict)  # the roster it masked for
    payloads: dict[DeviceId, list[bytes]] = field(default_factory=lambda: defaultdict(list))
    # (kind, whose) -> holder's number -> every share of it that could be opened
    shares: dict[Secret, dict[int, set[bytes]]] = field(
        default_factory=lambda: defaultdict(lambda: defaultdict(set))
    )

    def peer(self, device: DeviceId) -> Peer:
        return next(peer for peer in self.peers if peer.device == device)

    def members(self, bitmap: bytes) -> list[DeviceId]:
        return [p.device for p in self.peers if bitmap[p.index >> 3] >> (p.index & 7) & 1]

    def ring(self, device: DeviceId) -> Ring:
        """A device's masked update, unpacked."""
        encoding = encoding_of(self.head)
        payload = self.payloads[device][0]
        return unpack(payload, encoding.n_coordinates, encoding.bits, encoding.lane)


def _peer(index: int, envelope: bytes) -> Peer:
    c = wire.decode_as(CheckIn, envelope).message
    identity = wire.decode_as(Certificate, c.certificate).message.identity
    return Peer(index, c.device, identity, c.pk_mask, c.pk_seal, c.self_mask_commitment)


@dataclass
class View:
    """messages: (topic, payload). keys: X25519 keys that the attacker holds, whatever they are for.

    seeds: 16-byte secrets that it holds or was told, whosever they are.
    """

    messages: list[tuple[str, bytes]]
    keys: list[AgreementKey] = field(default_factory=list)
    seeds: list[bytes] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._by_public = {key.public: key for key in self.keys}
        self._secrets: dict[tuple[bytes, str, DeviceId], bytes | None] = {}
        self.rounds: dict[bytes, Seen] = {}
        self.opened = 0  # boxes
        self._read()

    # -- reading ----------------------------------------------------------------------------------

    def _read(self) -> None:
        envelopes, frames = [], defaultdict(dict)
        for topic, data in self.messages:
            with contextlib.suppress(RemoteProtocolError):
                envelopes.append(wire.decode(data))
                continue
            if "/up/" in topic:
                with contextlib.suppress(RemoteProtocolError):
                    chunk = chunks.decode_frame(data)
                    frames[chunk.digest].setdefault(chunk.index, set()).add(chunk.data)
        for signed in envelopes:
            if isinstance(signed.message, Manifest):
                self._manifest(signed.message)
        seen: set[bytes] = set()
        for signed in envelopes:
            round_ = self.rounds.get(getattr(signed.message, "h", b""))
            if round_ is None or signed.envelope in seen:
                continue
            seen.add(signed.envelope)
            with contextlib.suppress(CoveyError, StopIteration, IndexError):
                match signed.message:
                    case Shares() as message:
                        self._shares(round_, message)
                    case Reveal() as message:
                        self._reveal(round_, message)
                    case MaskedUpdate() as message:
                        self._update(round_, message, frames)

    def _manifest(self, manifest: Manifest) -> None:
        h = manifest_digest(manifest.head)
        with contextlib.suppress(RemoteProtocolError):
            peers = tuple(_peer(i, e) for i, e in enumerate(manifest.check_ins))
            self.rounds.setdefault(h, Seen(h, manifest.head, peers))

    def _shares(self, seen: Seen, message: Shares) -> None:
        sender = seen.peer(message.device)
        for peer, box in zip(seen.peers, message.boxes, strict=True):
            key = self._by_public.get(peer.pk_seal)
            if key is not None:
                info = box_info(seen.h, message.device, peer.index + 1)
                both = key.open(box, sender=sender.pk_seal, info=info)
                self.opened += 1
                seen.shares["b", message.device][peer.index + 1].add(both[: keys.SEED_BYTES])
                seen.shares["s", message.device][peer.index + 1].add(both[keys.SEED_BYTES :])

    def _reveal(self, seen: Seen, message: Reveal) -> None:
        key, member = self._by_public.get(seen.head.pk_reveal), seen.peer(message.member)
        if key is None:
            return
        info = reveal_info(seen.h, message.member)
        plaintext = key.open(message.box, sender=member.pk_seal, info=info)
        self.opened += 1
        survivors = set(seen.members(message.u3))
        for i, name in enumerate(seen.members(message.present)):
            share = plaintext[keys.SEED_BYTES * i : keys.SEED_BYTES * (i + 1)]
            kind = "b" if name in survivors else "s"
            seen.shares[kind, name][member.index + 1].add(share)

    @staticmethod
    def _update(
        seen: Seen, message: MaskedUpdate, frames: dict[bytes, dict[int, set[bytes]]]
    ) -> None:
        n = chunks.n_chunks(message.payload_bytes)
        parts = [sorted(frames[message.payload].get(i, ())) for i in range(n)]
        for choice in itertools.islice(itertools.product(*parts), 50):  # some may be damaged
            payload = b"".join(choice)
            if hashlib.sha256(payload).digest() == message.payload:
                if payload not in seen.payloads[message.device]:
                    seen.payloads[message.device].append(payload)
                seen.u2[message.device] = message.u2
                return

    # -- what follows from it ---------------------------------------------------------------------

    def n_shares(self, seen: Seen, kind: str, device: DeviceId) -> int:
        """How many members' shares of a secret lie open."""
        return len(seen.shares[kind, device])

    def secret(self, seen: Seen, kind: str, device: DeviceId) -> bytes | None:
        """A device's b or s, if it was handed over or there are shares enough; checked against what
        the device committed to."""
        at = seen.h, kind, device
        if at not in self._secrets:
            self._secrets[at] = self._recover(seen, kind, device)
        return self._secrets[at]

    def _recover(self, seen: Seen, kind: str, device: DeviceId) -> bytes | None:
        peer = seen.peer(device)

        def fits(secret: bytes) -> bool:
            if kind == "b":
                return keys.self_mask_commitment(secret) == peer.self_mask_commitment
            return keys.mask_key(secret).public == peer.pk_mask

        held = {x: sorted(found) for x, found in seen.shares[kind, device].items()}
        # As many points as make the polynomial; fewer say nothing, and more than t are not needed,
        # but some may be wrong.
        subsets = itertools.combinations(sorted(held), seen.head.threshold)
        guesses = (
            sharing.combine({x: [share] for x, share in zip(holders, choice, strict=True)})[0]
            for holders in subsets
            for choice in itertools.product(*(held[x] for x in holders))
        )
        candidates = itertools.chain(self.seeds, itertools.islice(guesses, 500))
        return next((secret for secret in candidates if fits(secret)), None)

    def pair_key(self, seen: Seen, a: DeviceId, b: DeviceId) -> bytes | None:
        """The key of the mask that two devices share, if either's mask key is known."""
        for mine, theirs in ((a, b), (b, a)):
            key = self._by_public.get(seen.peer(mine).pk_mask)
            secret = self.secret(seen, "s", mine)
            if key is None and secret is not None:
                key = keys.mask_key(secret)
            if key is not None:
                with contextlib.suppress(CoveyError):
                    return pair_mask_key(key, seen.peer(theirs).pk_mask, seen.h, mine, theirs)
        return None

    def without_masks(self, seen: Seen, device: DeviceId) -> Ring | None:
        """A device's masked update without all the masks that are known; None if b is not."""
        ring, b = seen.ring(device).copy(), self.secret(seen, "b", device)
        if b is None:
            return None
        plus, minus = [], [self_mask_key(keys.Seed(b), seen.h, device)]
        for other in seen.members(seen.u2[device]):
            if other != device and (key := self.pair_key(seen, device, other)) is not None:
                (minus if device < other else plus).append(key)
        add_masks(ring, plus, minus)
        return ring

    def smallest_sum(
        self, seen: Seen, device: DeviceId
    ) -> tuple[frozenset[DeviceId], np.ndarray] | None:
        """The smallest sum with this device in it that can be computed -> who is in it, signed integers.

        Devices whose pair mask is not known hang together: only with both does it cancel. What hangs
        together with the device comes as a whole, or not at all.
        """
        if not seen.payloads[device]:
            return None
        together, fringe = {device}, [device]
        while fringe:
            one = fringe.pop()
            for other in seen.members(seen.u2[one]):
                if other not in together and self.pair_key(seen, one, other) is None:
                    if not seen.payloads[other] or seen.u2[other] != seen.u2[device]:
                        return None
                    together.add(other)
                    fringe.append(other)
        parts = [self.without_masks(seen, name) for name in sorted(together)]
        if any(part is None for part in parts):
            return None
        total = np.sum([part.astype(np.int64) for part in parts if part is not None], axis=0)
        return frozenset(together), to_signed(total, seen.head.bits)

    def masked_twice(self, device: DeviceId) -> bool:
        """Whether two different updates went out under one set of masks: their difference is bare."""
        return any(len(seen.payloads[device]) > 1 for seen in self.rounds.values())


def unmask_attempt(view: View, device: DeviceId) -> np.ndarray | None:
    """A device's update, signed integers, from what an attacker has; None if it cannot be had."""
    for seen in view.rounds.values():
        found = view.smallest_sum(seen, device)
        if found is not None and found[0] == {device}:
            return found[1]
    return None


class Wiretap:
    """``async with``: reads all topics of a fleet from then on. messages: (topic, payload)."""

    def __init__(self, transport: MqttTransport, fleet: str) -> None:
        self.transport, self.fleet = transport, fleet
        self.messages: list[tuple[str, bytes]] = []
        self._news = asyncio.Event()
        self._marks = 0

    async def __aenter__(self) -> "Wiretap":
        up = asyncio.Event()

        async def connected() -> None:
            up.set()

        await self.transport.subscribe(f"covey/{self.fleet}/#")
        await self.transport.start(self._on_message, connected, lambda reason: None)
        async with asyncio.timeout(30):
            await up.wait()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.transport.stop()

    def _on_message(self, incoming: Incoming) -> None:
        self.messages.append((incoming.topic, incoming.payload))
        self._news.set()

    def view(self, keys: Iterable[AgreementKey] = (), seeds: Iterable[bytes] = ()) -> View:
        """What has come so far, with these keys."""
        return View(list(self.messages), list(keys), list(seeds))

    async def caught_up(self, timeout_s: float = 60.0) -> None:
        """Wait until all that the broker had by now has come: it keeps the order, so a mark that is sent
        now comes after it."""
        self._marks += 1
        mark = (f"covey/{self.fleet}/mark", str(self._marks).encode())
        await self.transport.publish(*mark)
        async with asyncio.timeout(timeout_s):
            while mark not in self.messages:
                self._news.clear()
                await self._news.wait()

    async def hidden(
        self, fleet: LiveFleet, keys: Iterable[AgreementKey] = (), *, accomplices: int = 0
    ) -> int:
        """Try to unmask every honest device with these keys -> updates that were seen, and stayed hidden.

        As a control the same attempt is made with the devices' secrets handed over; it finds exactly
        what each device had encoded. Sums that are known hold n_min devices, accomplices included.
        """
        await self.caught_up()
        keys, n_hidden = list(keys), 0
        view, told = self.view(keys), self.view(keys, fleet.secrets)
        for name in fleet.names:
            assert unmask_attempt(view, name) is None, f"the update of {name} lies open"
            assert not view.masked_twice(name), f"{name} masked two updates alike"
            for h, seen in told.rounds.items():
                if not seen.payloads[name]:
                    continue
                who, ring = told.smallest_sum(seen, name) or (frozenset(), None)
                assert who == {name}
                plain = fleet.plain[seen.head.round, name]
                assert (ring == to_signed(plain, seen.head.bits)).all()
                known = view.smallest_sum(view.rounds[h], name)
                assert known is None or len(known[0]) + accomplices >= seen.head.n_min
                n_hidden += 1
        return n_hidden

    async def until_uploads(self, n: int, timeout_s: float = 60.0) -> None:
        """Wait until n masked updates have passed as a whole."""
        async with asyncio.timeout(timeout_s):
            while sum(map(len, (s.payloads for s in self.view().rounds.values()))) < n:
                self._news.clear()
                await self._news.wait()


def report(view: View) -> list[str]:
    """What an eavesdropper knows, in words."""
    lines = []
    for seen in view.rounds.values():
        bare = [d for d in sorted(seen.payloads) if unmask_attempt(view, d) is not None]
        lines.append(
            f"round {seen.head.round} of {seen.head.n} devices: {len(seen.payloads)} masked updates of "
            f"{seen.head.bits}-bit numbers; unmasked: {', '.join(bare) or 'none'}"
        )
    return lines


async def _main(arguments: argparse.Namespace) -> None:
    transport = MqttTransport(
        arguments.url, "wiretap", username=arguments.username, password=arguments.password
    )
    async with Wiretap(transport, arguments.fleet) as tap:
        await asyncio.sleep(arguments.seconds)
        print(f"{len(tap.messages)} messages")
        print("\n".join(report(tap.view())))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Read everything a fleet's broker carries.")
    parser.add_argument("url", help="mqtt://HOST:PORT of the broker")
    parser.add_argument("--fleet", required=True)
    parser.add_argument("--username")
    parser.add_argument("--password")
    parser.add_argument("--seconds", type=float, default=60.0, help="how long to listen")
    asyncio.run(_main(parser.parse_args()))
