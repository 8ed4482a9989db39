"""A coordinator that lies: it has the fleet's real key, and signs whatever serves it.

`HostileCoordinator` talks to real devices over a real broker. Its steps, called without arguments, are
an honest round; each may be told what to say to whom. It speaks to a device through that device's own
inbox, or, where the broker plays along (`broker.HostileBroker` with `private`), on the topics that all
are meant to read. Accomplices are rogue devices that tell it everything and sign what it likes.

By hand, from the tests' folder: `python -m attacks.programs.coordinator --fleet DIRECTORY
--plan PLAN --lie two-views pi-1 pi-2 pi-3 pi-4`, with a fleet on this machine (`covey init`), whose devices
run and whose coordinator (`covey up`) has no run to do.
"""

import argparse
import asyncio
import hashlib
import os
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from attacks.programs.broker import private_topic
from attacks.programs.device import Rogue
from covey_coordinator.blobs import BlobServer
from covey_coordinator.config import load_fleet
from covey_coordinator.fleet import FleetDirectory
from covey_coordinator.plans.bundle import PlanBundle, load_bundle
from covey_shared import chunks, keys, wire
from covey_shared.errors import CoveyError, RemoteProtocolError
from covey_shared.keys import SigningKey
from covey_shared.messages import (
    CheckIn,
    Decline,
    Delivery,
    DeviceId,
    Head,
    Manifest,
    MaskedUpdate,
    Message,
    Reveal,
    Roster,
    RosterVote,
    RoundCall,
    RunId,
    Shares,
    View,
    ViewProposal,
    ViewVote,
    WantBlob,
)
from covey_shared.mqtt import MqttTransport
from covey_shared.secagg.cohort import Trust
from covey_shared.topics import Topics
from covey_shared.transport import Incoming
from covey_shared.wire import Signed
from mallory import Forger

ANSWER_S = 30.0


@dataclass
class Realm:
    """What a coordinator has: keys, a plan, and the names of the devices it talks to."""

    trust: Trust
    coordinator_key: SigningKey
    bundle: PlanBundle
    names: list[DeviceId]
    rng: Callable[[int], bytes] = os.urandom
    run: RunId = field(default_factory=lambda: RunId(os.urandom(16)))

    @property
    def n_params(self) -> int:
        return self.bundle.header.n_params

    @property
    def model(self) -> bytes:
        return self.bundle.initial.astype("<f4").tobytes()

    def call(self, round_id: int = 1, **changes: Any) -> RoundCall:
        fields: dict[str, Any] = {
            "fleet": self.trust.fleet,
            "run": self.run,
            "round": round_id,
            "plan": self.bundle.hash,
            "plan_bytes": len(self.bundle.header_bytes),
            "model": hashlib.sha256(self.model).digest(),
            "model_bytes": len(self.model),
            "revision": 0,
            "n_min": 3,
            "plan_signatures": (),
            "gather_s": 60.0,
            "chance": 1.0,
            "spread_s": 0.0,
            "reconnect_s": 0.0,
        }
        return RoundCall(**(fields | changes))


class HostileCoordinator(Forger):
    """``async with`` connects. heard: device -> all it said. declines: device -> why it left.

    private: speak to each device on topics of its own that pass for everybody's. whispered: what its
    accomplices said, which no broker carries.
    """

    def __init__(
        self,
        realm: Realm,
        transport: MqttTransport,
        round_id: int = 1,
        *,
        accomplices: Iterable[Rogue] = (),
        private: bool = False,
        **call: Any,
    ) -> None:
        super().__init__(realm, round_id, **call)  # type: ignore[arg-type]
        self.realm, self.transport, self.private = realm, transport, private
        self.topics = Topics(realm.trust.fleet)
        self.accomplices = {rogue.name: rogue for rogue in accomplices}
        self.heard: dict[DeviceId, list[Signed[Message]]] = {}
        self.declines: dict[DeviceId, str] = {}
        self.whispered: list[tuple[str, bytes]] = []
        self.blobs = BlobServer(transport, self.topics)
        self._offered = [realm.bundle.header_bytes, realm.bundle.graphs["train"], realm.model]
        self.manifests: dict[DeviceId, bytes] = {}  # what each was shown
        self._frames: dict[bytes, dict[int, bytes]] = {}
        self._news = asyncio.Event()

    async def __aenter__(self) -> "HostileCoordinator":
        up = asyncio.Event()

        async def connected() -> None:
            up.set()

        await self.transport.subscribe(self.topics.outbox("+"), self.topics.upload("+"))
        await self.transport.start(self._on_message, connected, lambda reason: None)
        async with asyncio.timeout(30):
            await up.wait()
        self.offer()
        self._serving = asyncio.create_task(self.blobs.serve())
        return self

    async def __aexit__(self, *error: object) -> None:
        self._serving.cancel()
        await asyncio.gather(self._serving, return_exceptions=True)
        await self.transport.publish(self.topics.round, b"", retain=True)
        await self.transport.stop()

    @property
    def keys(self) -> list[keys.AgreementKey]:
        """All that it and its accomplices could open boxes with."""
        theirs = [key for rogue in self.accomplices.values() for key in rogue.keys]
        return [self.reveal_key, *theirs]

    def offer(self, *more: bytes) -> None:
        """Blobs that devices may fetch, besides those that were offered before."""
        self._offered += more
        self.blobs.offer(self._offered)

    async def next_round(self, **call: Any) -> "HostileCoordinator":
        """Forget the round that was, and call another. What was heard stays."""
        self.call = self.realm.call(self.call.round + 1, **call)
        self.reveal_key = keys.AgreementKey(os.urandom(32))
        self.cohort = None  # type: ignore[assignment]
        for kept in (self.check_ins, self.shares, self.roster_votes, self.updates, self.payloads,
                     self.view_votes, self.reveals, self.declines):  # fmt: skip
            kept.clear()
        return self

    # -- talking ----------------------------------------------------------------------------------

    def _on_message(self, incoming: Incoming) -> None:
        device = self.topics.device_of(incoming.topic)
        try:
            if device is None or not incoming.payload:
                return
            if incoming.topic == self.topics.upload(device):
                chunk = chunks.decode_frame(incoming.payload)
                self._frames.setdefault(chunk.digest, {})[chunk.index] = chunk.data
            else:
                signed = wire.decode(incoming.payload)
                if isinstance(signed.message, WantBlob):
                    self.blobs.want(signed.message.blob, signed.message.ranges)
                    return
                self._heard(device, signed)
        except RemoteProtocolError:
            return
        self._news.set()

    def _heard(self, device: DeviceId, signed: Signed[Message]) -> None:
        self.heard.setdefault(device, []).append(signed)
        if isinstance(signed.message, Decline) and signed.message.round == self.call.round:
            self.declines[device] = signed.message.reason

    async def say(self, name: DeviceId, message: Message | bytes) -> None:
        """Sign it, if it is not bytes that somebody signed, and give it to one device."""
        data = message
        if not isinstance(data, bytes):
            data = wire.sign(data, self.realm.coordinator_key).envelope
        if name in self.accomplices:
            self.accomplices[name].said.clear()  # it answers whatever it is asked, twice if need be
            for topic, payload in self.accomplices[name].hear(data):
                self.whispered.append((topic, payload))
                self._on_message(Incoming(topic, payload))
            return
        topic = self.topics.inbox(name)
        if self.private:
            kind = wire.decode(data).message
            if not isinstance(kind, Delivery):
                shared = self.topics.round if isinstance(kind, RoundCall) else self.topics.all
                topic = private_topic(shared, name)
        await self.transport.publish(topic, data)

    async def until(self, true: Callable[[], bool], timeout_s: float = ANSWER_S) -> None:
        """Wait until something was heard that made it true."""
        async with asyncio.timeout(timeout_s):
            while not true():
                self._news.clear()
                await self._news.wait()

    async def answers(
        self, told: Mapping[DeviceId, Message | bytes], kind: type[Message]
    ) -> dict[DeviceId, Signed[Message]]:
        """Tell devices something, each its own; wait until each has answered with this kind of
        message, or has left the round. Who left is not in the answer."""
        before = {name: len(self.heard.get(name, ())) for name in told}
        left = dict(self.declines)

        def answer(name: DeviceId) -> Signed[Message] | None:
            news = self.heard.get(name, [])[before[name] :]
            return next((s for s in news if isinstance(s.message, kind)), None)

        for name, message in told.items():
            await self.say(name, message)
        gone = {name for name in told if name in left}
        await self.until(lambda: all(answer(n) or n in self.declines for n in set(told) - gone))
        return {name: found for name in told if (found := answer(name)) is not None}

    async def settled(self, name: DeviceId) -> None:
        """Wait until a device has dealt with all it was told: it answers the manifest's bytes, when
        they come again, with its shares again. Only in a round that it has not left or ended."""
        await self.answers({name: self.manifests[name]}, Shares)

    @property
    def members(self) -> list[DeviceId]:
        if self.cohort is None:
            return sorted([*self.realm.names, *self.accomplices])
        return [peer.device for peer in self.cohort.peers]

    def head(self, envelopes: tuple[bytes, ...] | None = None, **changes: object) -> Head:
        return super().head(envelopes, **({"issued_unix": int(time.time())} | changes))

    # -- the steps of a round, each to be told to whom what ---------------------------------------

    async def gather(
        self, calls: Mapping[DeviceId, RoundCall] | None = None
    ) -> "HostileCoordinator":
        told = calls or dict.fromkeys(self.members, self.call)
        found = await self.answers(told, CheckIn)
        self.check_ins = {name: signed.envelope for name, signed in sorted(found.items())}
        return self

    async def share(
        self, manifests: Mapping[DeviceId, Manifest] | None = None
    ) -> "HostileCoordinator":
        """The cohort is that of the first manifest. By default all get the same one."""
        if manifests is None:
            manifests = dict.fromkeys(self.check_ins, self.manifest())
        self.cohort = self.cohort_of(next(iter(manifests.values())))
        self.manifests = {
            name: wire.sign(manifest, self.realm.coordinator_key).envelope
            for name, manifest in manifests.items()
        }
        found = await self.answers(self.manifests, Shares)
        self.shares = {name: signed.message for name, signed in found.items()}  # type: ignore[misc]
        self.u2 = frozenset(
            self.cohort.index_of(n) for n, s in self.shares.items() if s.h == self.cohort.h
        )
        return self

    async def deliver(
        self, deliveries: Mapping[DeviceId, Delivery] | None = None
    ) -> "HostileCoordinator":
        told = deliveries or {name: self.delivery(name) for name in self.members}
        found = await self.answers(told, RosterVote)
        self.roster_votes |= {name: signed.envelope for name, signed in found.items()}
        return self

    async def collect(
        self, rosters: Mapping[DeviceId, Roster] | None = None
    ) -> "HostileCoordinator":
        told = rosters or dict.fromkeys(self.cohort.names(self.u2), self.roster())
        found = await self.answers(told, MaskedUpdate)
        self.updates |= found  # type: ignore[arg-type]
        await self.until(lambda: all(map(self._uploaded, found)))
        self.u3 = frozenset(self.cohort.index_of(name) for name in self.updates)
        return self

    def _uploaded(self, name: DeviceId) -> bool:
        update = self.updates[name].message
        have = self._frames.get(update.payload, {})
        if len(have) < chunks.n_chunks(update.payload_bytes):
            return False
        self.payloads[name] = b"".join(have[i] for i in sorted(have))
        return True

    async def propose(
        self, proposals: Mapping[DeviceId, ViewProposal] | None = None
    ) -> "HostileCoordinator":
        told = proposals or dict.fromkeys(self.members, self.proposal())
        found = await self.answers(told, ViewVote)
        self.view_votes |= {name: signed.envelope for name, signed in found.items()}
        return self

    async def reveal(self, views: Mapping[DeviceId, View] | None = None) -> "HostileCoordinator":
        told = views or dict.fromkeys(self.members, self.view())
        self.reveals |= await self.answers(told, Reveal)  # type: ignore[arg-type]
        return self

    async def until_view(self) -> "HostileCoordinator":
        """An honest round, up to where the view is proposed."""
        await self.gather()
        await self.share()
        await self.deliver()
        return await self.collect()


# -- lies -----------------------------------------------------------------------------------------


async def honest(c: HostileCoordinator, victim: DeviceId) -> None:
    """No lie: a round to its end."""
    await c.until_view()
    await c.propose()
    await c.reveal()


async def two_views(c: HostileCoordinator, victim: DeviceId) -> None:
    """Have a view with everybody signed, then one in which the victim "dropped out"."""
    await c.until_view()
    await c.propose()
    without = c.u3 - {c.cohort.index_of(victim)}
    for name in c.members:
        await c.say(name, c.proposal(without))
    for name in c.realm.names:
        await c.settled(name)
    await c.reveal(dict.fromkeys(c.members, c.view(without)))


async def views_after_reveals(c: HostileCoordinator, victim: DeviceId) -> None:
    """Get the shares of one view, then ask for those of another."""
    await honest(c, victim)
    without = c.u3 - {c.cohort.index_of(victim)}
    for name in c.members:
        await c.say(name, c.proposal(without))
        await c.say(name, c.view(without))
    for name in c.realm.names:
        await c.settled(name)


async def split_quorum(c: HostileCoordinator, victim: DeviceId) -> None:
    """Half of the members are shown one view, half another; accomplices sign both, and twice."""
    await c.until_view()
    everyone, without = c.u3, c.u3 - {c.cohort.index_of(victim)}
    half = len(c.realm.names) // 2
    first, second = c.realm.names[:half], c.realm.names[half:]
    votes = {}
    for names, view in ((first, everyone), (second, without)):
        c.view_votes.clear()
        await c.propose(dict.fromkeys(names, c.proposal(view)))
        votes[view] = list(c.view_votes.values())
        for rogue in c.accomplices.values():
            bitmap = c.cohort.bitmap(view)
            vote = ViewVote(c.cohort.h, rogue.name, c.cohort.bitmap(c.u2), bitmap)
            votes[view].append(rogue.signed(vote))
    # One half is shown the votes there are, the other as many as are needed, some of them twice.
    enough = (votes[without] * c.cohort.threshold)[: c.cohort.threshold]
    told = dict.fromkeys(first, c.view(everyone, votes=tuple(votes[everyone])))
    told |= dict.fromkeys(second, c.view(without, votes=tuple(enough)))
    await c.reveal(told)


async def small_view(c: HostileCoordinator, victim: DeviceId) -> None:
    """A view of the victim and one more."""
    await c.until_view()
    at = c.cohort.index_of(victim)
    other = min(c.u3 - {at})
    await c.propose(dict.fromkeys(c.members, c.proposal(frozenset({at, other}))))


async def small_roster(c: HostileCoordinator, victim: DeviceId) -> None:
    """A roster of fewer than the committee's threshold, the victim among them."""
    await c.gather()
    await c.share()
    at = c.cohort.index_of(victim)
    few = frozenset({at, *sorted(c.u2 - {at})[: c.cohort.threshold - 2]})
    await c.deliver({name: c.delivery(name, few) for name in c.members})


async def two_rosters(c: HostileCoordinator, victim: DeviceId) -> None:
    """Some members get the boxes of all, some of all but the victim; then each gets the votes there
    are, or votes for both rosters, or one vote several times."""
    await c.gather()
    await c.share()
    everyone, without = c.u2, c.u2 - {c.cohort.index_of(victim)}
    names, t = c.realm.names, c.cohort.threshold
    half = (len(names) + 1) // 2
    first, second = names[:half], names[half:]
    await c.deliver({name: c.delivery(name, everyone) for name in [*first, *c.accomplices]})
    votes = list(c.roster_votes.values())
    c.roster_votes.clear()
    await c.deliver({name: c.delivery(name, without) for name in second})
    others = list(c.roster_votes.values())
    rosters = [
        c.roster(votes=tuple(votes)),
        c.roster(votes=tuple((votes + others)[:t])),
        c.roster(votes=tuple((votes * t)[:t])),
        c.roster(u2=c.cohort.bitmap(without), votes=tuple((others * t)[:t])),
    ]
    await c.answers({n: rosters[i % len(rosters)] for i, n in enumerate(names)}, MaskedUpdate)


LIES: dict[str, Callable[[HostileCoordinator, DeviceId], Awaitable[None]]] = {
    "none": honest,
    "two-views": two_views,
    "views-after-reveals": views_after_reveals,
    "split-quorum": split_quorum,
    "small-view": small_view,
    "small-roster": small_roster,
    "two-rosters": two_rosters,
}


async def _main(arguments: argparse.Namespace) -> None:
    directory = FleetDirectory(arguments.fleet)
    trust, key = directory.trust, directory.coordinator_key()
    realm = Realm(trust, key, load_bundle(arguments.plan), sorted(map(DeviceId, arguments.devices)))
    url = directory.broker_url(load_fleet(arguments.fleet))
    # Beside the real one, which has no round open and takes no notice.
    transport = MqttTransport(
        url, "liar", username="coordinator", password=directory.password("coordinator")
    )
    c = HostileCoordinator(realm, transport, arguments.round, revision=arguments.revision)
    async with c:
        try:
            await LIES[arguments.lie](c, realm.names[0])
        except (CoveyError, TimeoutError) as error:
            print(f"the lie came to an end: {error or 'a device did not answer'}")
        for name in realm.names:
            print(f"{name}: {c.declines.get(name, 'stayed')}")
        print(f"{len(c.updates)} masked updates, {len(c.reveals)} members revealed shares")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="A coordinator that lies, in a fleet of your own.")
    parser.add_argument(
        "devices", nargs="+", help="those that are to take part; the first is the victim"
    )
    parser.add_argument("--fleet", type=Path, required=True, help="the fleet's directory")
    parser.add_argument("--plan", type=Path, required=True, help="a compiled plan")
    parser.add_argument("--lie", choices=LIES, default="none")
    parser.add_argument("--round", type=int, default=1, help="later than any before")
    parser.add_argument("--revision", type=int, default=0, help="higher, to ask for a model again")
    asyncio.run(_main(parser.parse_args()))
