"""A coordinator that lies to real devices, over a real broker, with the fleet's real key.

Where accomplices help, they have certificates of the fleet CA. After each lie the coordinator has all
traffic, its own keys and its accomplices'; what it can then compute are sums of enough devices, or
nothing. `test_a_round_without_a_lie` is the control: the same program, honest, gets its sum.
"""

import hashlib
import os
import time
from contextlib import asynccontextmanager

import msgspec
import numpy as np
import pytest

from attacks.programs import coordinator as lies
from attacks.programs.broker import HostileBroker
from attacks.programs.coordinator import HostileCoordinator, Realm
from attacks.programs.device import Rogue
from attacks.programs.wiretap import Wiretap, unmask_attempt
from covey_shared import keys, wire
from covey_shared.fixedpoint import to_signed
from covey_shared.messages import (
    Certificate,
    CheckIn,
    DeviceId,
    MaskedUpdate,
    RosterVote,
    Shares,
    ViewVote,
)
from covey_shared.plan import encode_header, plan_hash
from live_fleet import connection
from memory_fleet import Policy, go

VICTIM = DeviceId("pi-0")


def rogue(fleet, name, ca=None):
    """A device of the attacker's; its certificate is the fleet CA's, or another's."""
    identity, now = keys.SigningKey(os.urandom(32)), int(time.time())
    certificate = Certificate(fleet.trust.fleet, DeviceId(name), identity.public, now, now + 3600)
    envelope = wire.sign(certificate, ca or fleet._ca).envelope
    return Rogue(name, identity, envelope, fleet.trust)


@asynccontextmanager
async def lied_to(stage, n=5, *, accomplices=(), private=False, upstream=None, **call):
    """Real devices, a hostile coordinator, a wiretap. private: through a broker that plays along."""
    broker = HostileBroker(upstream, private=True) if private else None
    if broker is not None:
        await broker.__aenter__()
    try:
        fleet = stage(n, coordinator=False, devices_url=broker and broker.url)
        async with fleet, Wiretap(connection(fleet.url, "wiretap"), fleet.trust.fleet) as tap:
            realm = Realm(fleet.trust, fleet.key, fleet.bundle, fleet.names)
            helpers = [rogue(fleet, name) for name in accomplices]
            transport = connection(fleet.url, "coordinator")
            async with HostileCoordinator(
                realm, transport, accomplices=helpers, private=private, **call
            ) as c:
                c.whispered = tap.messages
                yield fleet, c, tap
    finally:
        if broker is not None:
            await broker.__aexit__()


def heard(c, kind, name=None):
    """All messages of a kind that came from a device, or from all."""
    names = c.realm.names if name is None else [name]
    return [s for n in names for s in c.heard.get(n, []) if isinstance(s.message, kind)]


def all_decline(c, reason):
    assert set(c.declines) >= set(c.realm.names)
    assert all(reason in c.declines[name] for name in c.realm.names), c.declines
    return True


def never_both_kinds(c, tap, fleet):
    """Of no honest device as many shares of b and of s lie open as either would take."""
    view = tap.view(c.keys)
    for seen in view.rounds.values():
        for name in fleet.names:
            counts = [view.n_shares(seen, kind, name) for kind in "bs"]
            if min(counts) >= seen.head.threshold:
                return False
    return True


async def knows_nothing(c, tap, fleet, n_hidden):
    """Neither a single update nor, here, any sum: nobody revealed. n_hidden: updates that were sent."""
    await tap.until_uploads(n_hidden)
    await tap.caught_up()
    assert c.reveals.keys() <= c.accomplices.keys()
    assert never_both_kinds(c, tap, fleet)
    assert await tap.hidden(fleet, c.keys, accomplices=len(c.accomplices)) == n_hidden
    view = tap.view(c.keys)
    for seen in view.rounds.values():
        assert all(view.smallest_sum(seen, name) is None for name in fleet.names)


# -- the control ----------------------------------------------------------------------------------


def test_a_round_without_a_lie(stage, outcome):
    """The program itself is sound: told the truth, devices give it their sum, and no less than that."""

    async def scenario():
        async with lied_to(stage, 4, accomplices=["zz-evil"]) as (fleet, c, tap):
            await lies.honest(c, VICTIM)
            await tap.until_uploads(4)
            await tap.caught_up()
            assert c.declines == {}
            assert set(c.reveals) == {*fleet.names, "zz-evil"}
            evil = c.accomplices["zz-evil"].plain[1]
            bits = c.cohort.head.bits
            honest = to_signed(c.aggregate() - to_signed(evil, bits), bits)
            assert (honest == fleet.sum_of(1, fleet.names, bits)).all()
            assert await tap.hidden(fleet, c.keys, accomplices=1) == 4
            view = tap.view(c.keys)
            who, ring = view.smallest_sum(view.rounds[c.cohort.h], VICTIM)
            assert who == set(fleet.names)
            assert (ring == honest).all()
            assert never_both_kinds(c, tap, fleet)
            outcome("control: the sum of the 4 honest, exact; no single update")

    go(scenario())


def test_accomplices_enough_bare_a_device(stage, outcome):
    """The limit, and the other control: two certified accomplices in a cohort of three leave one device,
    whose update is then what the sum holds. Only its owner's `min_cohort` is against that."""

    async def scenario():
        accomplices = ["zz-evil-1", "zz-evil-2"]
        async with lied_to(stage, 1, accomplices=accomplices) as (fleet, c, tap):
            await lies.honest(c, VICTIM)
            await tap.until_uploads(1)
            await tap.caught_up()
            bare = unmask_attempt(tap.view(c.keys), VICTIM)
            bits = c.cohort.head.bits
            assert bare is not None
            assert (bare == to_signed(fleet.plain[1, VICTIM], bits)).all()
            await fleet.seats[0].service.close()
            await fleet.boot(fleet.seats[0], policy=Policy(min_cohort=5))
            await fleet.until(lambda: fleet.seats[0].transport.connected)
            await c.next_round(revision=1)
            await c.gather()
            assert VICTIM not in c.check_ins
            assert "at least 5" in c.declines[VICTIM]
            outcome("NOT resisted without the owner's min_cohort; with it, declined")

    go(scenario())


# -- different things to different devices --------------------------------------------------------


@pytest.mark.parametrize("what", ["model", "plan"])
def test_different_models_or_plans(what, stage, real_broker, outcome):
    """A broker that plays along gives each device its own call. One manifest fits only half of them;
    under two, nobody has votes enough."""

    async def scenario():
        upstream = ("127.0.0.1", real_broker.port)
        async with lied_to(stage, 4, private=True, upstream=upstream) as (fleet, c, tap):
            if what == "model":
                other = np.zeros(c.lab.n_params, "<f4").tobytes()
                changes = {"model": hashlib.sha256(other).digest()}
            else:
                header = msgspec.structs.replace(fleet.bundle.header, name="another-name")
                other = encode_header(header)
                changes = {"plan": plan_hash(other), "plan_bytes": len(other)}
            c.offer(other)
            calls = {
                name: msgspec.structs.replace(c.call, **(changes if i > 1 else {}))
                for i, name in enumerate(fleet.names)
            }
            await c.gather(calls)
            assert set(c.check_ins) == set(fleet.names)
            in_head = {what: changes[what]}
            manifests = {
                name: c.manifest(**(in_head if i > 1 else {})) for i, name in enumerate(fleet.names)
            }
            await c.share(manifests)
            assert len(c.shares) == 4
            assert len({s.h for s in c.shares.values()}) == 2
            everyone = frozenset(range(4))
            other_h = c.shares[fleet.names[3]].h
            await c.deliver({
                name: c.delivery(name, everyone, **({"h": other_h} if i > 1 else {}))
                for i, name in enumerate(fleet.names)
            })  # fmt: skip
            # What each could open are the boxes of those who saw the same manifest.
            for name in fleet.names:
                (vote,) = heard(c, RosterVote, name)
                assert bin(int.from_bytes(vote.message.readable, "little")).count("1") == 2
            bitmap = c.cohort.bitmap(everyone)
            told = {
                name: c.roster(u2=bitmap, **({"h": other_h} if i > 1 else {}))
                for i, name in enumerate(fleet.names)
            }
            await c.answers(told, MaskedUpdate)
            assert all_decline(c, "roster vote of another round or manifest")
            await knows_nothing(c, tap, fleet, 0)

            # One manifest for all: half of them were called to something else.
            await c.next_round()
            calls = {
                name: msgspec.structs.replace(c.call, **(changes if i > 1 else {}))
                for i, name in enumerate(fleet.names)
            }
            await c.gather(calls)
            await c.share()
            refused = f"the manifest's {what} is not the one that was called"
            assert c.declines == dict.fromkeys(fleet.names[2:], refused)
            await knows_nothing(c, tap, fleet, 0)
            outcome(f"declined: {refused}")

    go(scenario())


def test_a_cohort_of_its_own(stage, real_broker, outcome):
    """The victim is shown a cohort of three, the others one of five: its roster gets no votes."""

    async def scenario():
        upstream = ("127.0.0.1", real_broker.port)
        async with lied_to(stage, 5, private=True, upstream=upstream) as (fleet, c, tap):
            await c.gather()
            few = tuple(c.check_ins[name] for name in fleet.names[:3])
            small = c.manifest(few)
            await c.share({VICTIM: small} | dict.fromkeys(fleet.names[1:], c.manifest()))
            assert c.cohort.n == 3
            assert len(c.shares) == 5
            await c.deliver({VICTIM: c.delivery(VICTIM, frozenset(range(3)))})
            (vote,) = heard(c, RosterVote, VICTIM)
            assert c.cohort.subset(vote.message.readable) == {0}  # its own
            assert c.cohort.threshold == 3
            u2 = c.cohort.bitmap(frozenset(range(3)))
            await c.answers({VICTIM: c.roster(u2=u2, votes=(vote.envelope,) * 3)}, MaskedUpdate)
            assert c.declines == {VICTIM: "the roster repeats a signer"}
            await knows_nothing(c, tap, fleet, 0)
            outcome(f"declined: {c.declines[VICTIM]}")

    go(scenario())


def test_two_rosters(stage, outcome):
    async def scenario():
        async with lied_to(stage, 4, accomplices=["zz-evil"]) as (fleet, c, tap):
            await lies.two_rosters(c, VICTIM)
            assert set(c.declines) == set(fleet.names)
            reasons = " ".join(c.declines.values())
            for reason in ("votes; 4 are needed", "for another roster", "repeats a signer"):
                assert reason in reasons
            assert heard(c, MaskedUpdate) == []
            await knows_nothing(c, tap, fleet, 0)
            outcome(f"declined: {c.declines[VICTIM]}, and so on; nobody uploads")

    go(scenario())


def test_invented_devices(stage, outcome):
    """Certificates of the coordinator's own making, around one real device or many."""

    async def scenario():
        async with lied_to(stage, 3) as (fleet, c, tap):
            ca = keys.SigningKey(os.urandom(32))
            for i in range(3):
                c.accomplices[DeviceId(f"zz-{i}")] = rogue(fleet, f"zz-{i}", ca)
            await c.gather()
            assert len(c.check_ins) == 6
            invented = [c.check_ins[name] for name in sorted(c.accomplices)]
            for name in fleet.names:
                around_one = c.manifest((c.check_ins[name], *invented))
                everybody = c.manifest()
                manifest = around_one if name == VICTIM else everybody
                assert await c.answers({name: manifest}, Shares) == {}
            assert all_decline(c, "is not signed by the fleet CA")
            await knows_nothing(c, tap, fleet, 0)
            outcome(f"declined: {c.declines[VICTIM]}")

    go(scenario())


# -- both kinds of share --------------------------------------------------------------------------


def test_two_views(stage, outcome):
    async def scenario():
        async with lied_to(stage, 4, accomplices=["zz-evil"]) as (fleet, c, tap):
            await lies.two_views(c, VICTIM)
            # The second proposal is dropped; a view of it is refused, whoever signed it.
            assert all_decline(c, "the view is not the one this member signed")
            assert len(heard(c, ViewVote)) == 4  # one each
            await knows_nothing(c, tap, fleet, 4)
            outcome(f"declined: {c.declines[VICTIM]}")

    go(scenario())


def test_another_view_after_the_reveals(stage, outcome):
    async def scenario():
        async with lied_to(stage, 4, accomplices=["zz-evil"]) as (fleet, c, tap):
            await lies.views_after_reveals(c, VICTIM)
            await tap.until_uploads(4)
            await tap.caught_up()
            assert len(heard(c, ViewVote)) == len(heard(c, lies.Reveal)) == 4  # one each
            assert never_both_kinds(c, tap, fleet)
            assert await tap.hidden(fleet, c.keys, accomplices=1) == 4
            outcome("the second view is dropped; it has the one sum, and no more")

    go(scenario())


def test_a_split_quorum(stage, outcome):
    """Two views, each with the votes of half the members and of an accomplice, who signs both."""

    async def scenario():
        async with lied_to(stage, 4, accomplices=["zz-evil"]) as (fleet, c, tap):
            await lies.split_quorum(c, VICTIM)
            assert set(c.declines) == set(fleet.names)
            assert c.declines[VICTIM] == "the view has 3 votes; 4 are needed"
            assert c.declines[fleet.names[3]] == "the view repeats a signer"
            await knows_nothing(c, tap, fleet, 4)
            outcome(f"declined: {c.declines[VICTIM]}; {c.declines[fleet.names[3]]}")

    go(scenario())


def test_another_view_after_a_restart(stage, outcome):
    """A member is cut off from power after its vote, and asked for another vote when it is back: it has its
    upload, and nothing to vote or to reveal with."""

    async def scenario():
        async with lied_to(stage, 4, accomplices=["zz-evil"]) as (fleet, c, tap):
            await c.until_view()
            await c.propose()
            member = fleet.names[1]
            (vote,) = heard(c, ViewVote, member)
            without = c.u3 - {c.cohort.index_of(VICTIM)}
            await fleet.crash(member)
            for _ in range(2):
                told = [c.manifests[member], c.delivery(member), c.roster(), c.proposal(without),
                        c.view(without)]  # fmt: skip
                for message in told:
                    await c.say(member, message)
                # The call comes again, as it does with every connection.
                await c.say(member, c.call)
                await c.answers({member: c.roster()}, MaskedUpdate)
            assert member not in c.declines
            assert len({signed.envelope for signed in heard(c, MaskedUpdate, member)}) == 1
            assert heard(c, ViewVote, member) == [vote]
            assert len(heard(c, CheckIn, member)) == 1
            # The others go on with the view that they signed, which is enough for the sum.
            left = [name for name in c.members if name != member]
            await c.reveal(dict.fromkeys(left, c.view()))
            assert set(c.reveals) == set(left)
            await tap.until_uploads(4)
            await tap.caught_up()
            assert never_both_kinds(c, tap, fleet)
            assert await tap.hidden(fleet, c.keys, accomplices=1) == 4
            # The next round is joined under new keys.
            await c.next_round(revision=1)
            await c.gather()
            first, second = heard(c, CheckIn, member)
            assert first.message.pk_mask != second.message.pk_mask
            assert first.message.self_mask_commitment != second.message.self_mask_commitment
            outcome("it sends its upload again and nothing else; one view, one sum")

    go(scenario())


# -- too few --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lie", "reason", "n_sent"),
    [
        (lies.small_view, "the view has 2 devices; at least 3 are needed", 4),
        (lies.small_roster, "a roster of 3 devices is too small to vote for", 0),
    ],
)
def test_one_device_is_isolated(lie, reason, n_sent, stage, outcome):
    async def scenario():
        async with lied_to(stage, 4, accomplices=["zz-evil"]) as (fleet, c, tap):
            await lie(c, VICTIM)
            assert all_decline(c, reason)
            await knows_nothing(c, tap, fleet, n_sent)
            outcome(f"declined: {reason}")

    go(scenario())


LOWERED = {
    "n_min": (lambda head: {"n_min": 2}, "takes part among at least 3"),
    "threshold": (lambda head: {"threshold": 2}, "degree, side, committee and threshold"),
    "neighbours": (lambda head: {"degree": 2}, "degree, side, committee and threshold"),
    "committee": (lambda head: {"committee": 3}, "degree, side, committee and threshold"),
    "clip": (lambda head: {"clip": 0.0}, "clip is 0"),
    "bits": (lambda head: {"bits": head.bits - 1}, "value bits and"),
    "value bits": (lambda head: {"value_bits": head.value_bits + 1}, "value bits and"),
    "weight": (lambda head: {"w_max": 2**31}, "this device allows"),
    "reveal key": (lambda head: {"pk_reveal": bytes(32)}, "low order"),
    "parameters": (lambda head: {"n_params": 1}, "the manifest says 1 parameters"),
    "revision": (lambda head: {"revision": 1}, "revision is not the one that was called"),
    "metrics": (lambda head: {"metric_clips": ()}, "asks for 0 metrics"),
}


def test_lowered_parameters(stage, outcome):
    """Each in a round of its own, in a head that the coordinator signs."""

    async def scenario():
        async with lied_to(stage, 4) as (fleet, c, tap):
            for what, (change, reason) in LOWERED.items():
                await c.gather()
                honest = c.head()
                manifest = c.manifest(**change(honest))
                assert await c.answers(dict.fromkeys(fleet.names, manifest), Shares) == {}, what
                assert all_decline(c, reason)
                await c.next_round()
            assert heard(c, Shares) == []
            await knows_nothing(c, tap, fleet, 0)
            await lies.honest(c, VICTIM)  # a head in which nothing is lowered
            assert len(c.reveals) == 4
            outcome(f"declined, each with its reason: {', '.join(LOWERED)}")

    go(scenario())


def test_old_rounds_are_played_back(stage, outcome):
    """Call, manifest, model, roster and view of a round that was, alone and within a new round."""

    async def scenario():
        async with lied_to(stage, 4) as (fleet, c, tap):
            await lies.honest(c, VICTIM)
            first_call, old, old_check_ins = c.call, dict(c.manifests), dict(c.check_ins)
            old_roster, old_proposal, old_view = c.roster(), c.proposal(), c.view()
            n_said = {name: len(c.heard[name]) for name in fleet.names}

            await c.next_round()  # the same model, as if for the first time
            assert await c.answers(dict.fromkeys(fleet.names, c.call), CheckIn) == {}
            assert all_decline(c, "already contributed to this model")
            for name in fleet.names:
                for message in (first_call, old[name], old_roster, old_proposal, old_view):
                    await c.say(name, message)

            await c.next_round(revision=1)
            await c.gather()
            for name in fleet.names:
                # A decline and a check-in is all that came of all that.
                assert len(c.heard[name]) == n_said[name] + 2
                for message in (first_call, old[name], old_roster, old_proposal, old_view):
                    await c.say(name, message)
            await c.share()
            assert c.declines == {}
            for name in fleet.names:
                assert len(c.heard[name]) == n_said[name] + 3  # the shares

            await c.next_round(revision=1)
            await c.gather()
            stale = c.manifest(tuple(old_check_ins.values()))
            assert await c.answers(dict.fromkeys(fleet.names, stale), Shares) == {}
            assert all_decline(c, "is of another round")
            await tap.until_uploads(4)
            await tap.caught_up()
            assert len(heard(c, MaskedUpdate)) == 4
            assert await tap.hidden(fleet, c.keys) == 4
            outcome("ignored, or declined: already contributed to this model; is of another round")

    go(scenario())
