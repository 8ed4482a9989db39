"""A hostile broker between real services and a real mosquitto: it may do what it likes to messages.

Whatever it does, a round gives the exact sum or none, nobody is blamed for it, and no update lies open.
"""

import random
from dataclasses import replace

import msgspec
import pytest

import covey_device.blobs
from attacks.programs.broker import (
    CrossedInboxes,
    FirstOfEach,
    HostileBroker,
    Meddler,
    Passing,
)
from attacks.programs.wiretap import Wiretap
from covey_shared.topics import OFFLINE, ONLINE
from live_fleet import PATIENT, connection, patient
from memory_fleet import go, short

QUICK = msgspec.structs.replace(PATIENT, resend_s=0.1)


def upstream(broker):
    return "127.0.0.1", broker.port


def tapped(fleet, broker):
    """Reads behind the meddling, at the real broker; what went in before it is added."""
    return Wiretap(connection(broker.url, "wiretap"), fleet.trust.fleet)


def everything(hostile, tap):
    """All that passed the hostile broker, besides what the real one carried."""
    tap.messages += [(message.topic, message.payload) for message in hostile.messages]
    return tap


def nobody_is_blamed(fleet):
    return not fleet.coordinator.registry.faults


@pytest.mark.parametrize(
    "what", ["drop", "twice", "later", "flip", "truncate", "swap", "replay", "inject"]
)
def test_the_first_copy_of_every_message(what, stage, real_broker, outcome):
    """One thing is done to the first copy of everything, in both directions; the round gets through."""

    async def scenario():
        async with HostileBroker(upstream(real_broker)) as hostile:
            fleet = stage(4, url=hostile.url)
            async with fleet, tapped(fleet, real_broker) as tap:
                # A flipped bit in a model costs each device that gets it the round: see below.
                hostile.tamper = FirstOfEach(what, spared="/blob/" if what == "flip" else None)
                state = await fleet.play(fleet.run(patient(1, deadlines=QUICK)))
                assert state.rounds_completed == 1, fleet.outcomes[0].reason
                assert fleet.sums[1].survivors == tuple(fleet.names)
                assert fleet.honest_sum_is_right(1)
                assert hostile.n_changed > 30
                assert nobody_is_blamed(fleet)
                assert await everything(hostile, tap).hidden(fleet) == 4
                outcome(
                    f"{hostile.n_changed} messages hit; the exact sum of all 4, nobody unmasked"
                )

    go(scenario())


def test_a_bit_is_flipped_in_the_model(stage, real_broker, outcome, monkeypatch):
    """Devices notice, and leave the round; the next one is as if nothing had been."""
    monkeypatch.setattr(covey_device.blobs, "MAX_WHOLE_ATTEMPTS", 2)

    async def scenario():
        async with HostileBroker(upstream(real_broker)) as hostile:
            fleet = stage(4, url=hostile.url)
            async with fleet, tapped(fleet, real_broker) as tap:
                model = fleet.run().model_digest.hex()
                chance = random.Random(1)

                def tamper(message: Passing):
                    if fleet.outcomes or not message.topic.endswith(model) or message.inbound:
                        return [message]
                    return [message.changed(message.payload[:-8] + chance.randbytes(8))]

                hostile.tamper = tamper
                deadlines = msgspec.structs.replace(QUICK, gather_s=5.0)
                state = await fleet.play(fleet.run(patient(2, deadlines=deadlines), "other"))
                first, second = fleet.outcomes
                assert first.completed is None
                assert "expected" in first.reason
                assert model[:16] in first.reason
                assert state.rounds_completed == 1
                assert second.completed.survivors == tuple(fleet.names)
                assert fleet.honest_sum_is_right(2)
                assert await everything(hostile, tap).hidden(fleet) == 4
                outcome(f"abandoned: {first.reason[:60]} ...; then an exact sum")

    go(scenario())


def meddled_with(seed, stage, real_broker, *, rounds, rate):
    """Rounds under a meddling broker -> what it did, and how many rounds came to a sum."""
    told = {}

    async def scenario():
        meddler = Meddler(seed, rate)
        async with HostileBroker(upstream(real_broker)) as hostile:
            fleet = stage(4, url=hostile.url)
            async with fleet, tapped(fleet, real_broker) as tap:
                hostile.tamper = meddler
                deadlines = short(gather_s=6.0, share_s=6.0, collect_s=8.0, unmask_s=6.0)
                state = await fleet.play(fleet.run(patient(rounds, deadlines=deadlines)))
                for over in fleet.outcomes:
                    assert (over.completed is None) == bool(over.reason)
                    if over.completed is not None:
                        assert fleet.honest_sum_is_right(over.round_id)
                assert nobody_is_blamed(fleet)
                hidden = await everything(hostile, tap).hidden(fleet)
                told.update(
                    hits=sum(meddler.done.values()), done=meddler.done,
                    sums=state.rounds_completed, hidden=hidden,
                )  # fmt: skip

    go(scenario(), 150.0)
    return told


@pytest.mark.parametrize("seed", [1, 2])
def test_meddling_by_chance(seed, stage, real_broker, outcome):
    """Any message in either direction is dropped, doubled, delayed, flipped, cut, swapped, played
    back or made up, and presence is lied about."""
    told = meddled_with(seed, stage, real_broker, rounds=2, rate=0.12)
    assert told["hits"] > 10
    assert told["sums"] >= 1
    assert told["hidden"] >= 3
    outcome(
        "{hits} messages hit; {sums} of 2 rounds gave their exact sum, none a wrong one".format(
            **told
        )
    )


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 112))
def test_meddling_by_chance_for_long(seed, stage, real_broker):
    told = meddled_with(seed, stage, real_broker, rounds=4, rate=0.05 + 0.02 * (seed % 6))
    assert told["hits"] >= 10
    assert told["hidden"] >= 3


def test_one_devices_inbox_is_given_to_another(stage, real_broker, outcome):
    async def scenario():
        async with HostileBroker(upstream(real_broker)) as hostile:
            fleet = stage(4, url=hostile.url)
            async with fleet, tapped(fleet, real_broker) as tap:
                hostile.tamper = CrossedInboxes(list(fleet.names))
                state = await fleet.play(fleet.run(patient(1)))
                # A device refuses a delivery to another, and says so: that costs the round at most.
                assert hostile.n_changed >= 4
                assert nobody_is_blamed(fleet)
                if state.rounds_completed:
                    assert fleet.honest_sum_is_right(1)
                await everything(hostile, tap).hidden(fleet)
                outcome(fleet.outcomes[0].reason or "the exact sum")

    go(scenario())


def test_an_old_round_is_played_back_in_a_new_one(stage, real_broker, outcome):
    """Everything that passed in round 1 comes again, to everybody, in the midst of round 2."""

    async def scenario():
        async with HostileBroker(upstream(real_broker)) as hostile:
            fleet = stage(4, url=hostile.url)
            async with fleet, tapped(fleet, real_broker) as tap:
                run = fleet.run(patient(2))
                old, played_back = [], []

                def tamper(message: Passing):
                    if not fleet.outcomes:
                        old.append(message)
                        return [message]
                    out = [message]
                    for _ in range(8):  # a few with each message, in their old order
                        if len(played_back) < len(old):
                            played_back.append(old[len(played_back)])
                            out.append(replace(played_back[-1], retain=False))
                    return out

                hostile.tamper = tamper
                state = await fleet.play(run)
                assert state.rounds_completed == 2, [o.reason for o in fleet.outcomes]
                assert len(played_back) > 50
                assert all(len(o.completed.survivors) == 4 for o in fleet.outcomes)
                assert nobody_is_blamed(fleet)
                assert await everything(hostile, tap).hidden(fleet) == 8
                outcome(f"{len(played_back)} old messages among the new; both sums exact")

    go(scenario())


def test_lies_about_who_is_there(stage, real_broker, outcome):
    """Everybody is said to have gone, ghosts to have come: waiting times change, the sum does not."""

    async def scenario():
        async with HostileBroker(upstream(real_broker)) as hostile:
            fleet = stage(4, url=hostile.url)
            async with fleet, tapped(fleet, real_broker) as tap:
                presence = fleet.topics.presence
                said = 0

                def tamper(message: Passing):
                    nonlocal said
                    if not message.client.startswith("coordinator") or message.inbound:
                        return [message]
                    said += 1
                    names, word = (
                        (fleet.names, OFFLINE) if said % 2 else (["ghost-1", "ghost-2"], ONLINE)
                    )
                    lies = [replace(message, topic=presence(n), payload=word) for n in names]
                    return [message, *lies]

                hostile.tamper = tamper
                deadlines = short(
                    gather_s=3.0, share_s=6.0, collect_s=6.0, unmask_s=6.0, absent_grace_s=2.0
                )
                state = await fleet.play(fleet.run(patient(1, deadlines=deadlines)))
                assert said > 10
                assert state.rounds_completed == 1, fleet.outcomes[0].reason
                assert fleet.honest_sum_is_right(1)
                assert await everything(hostile, tap).hidden(fleet) >= 3
                outcome(f"{said} lies; the exact sum of {len(fleet.sums[1].survivors)}")

    go(scenario())
