"""A coordinator that dies, and another that goes on with its open round: over an in-memory network.

`test_round_restore` has the machine alone; here are the store, the spool, the transcript and devices.
"""

import asyncio
import contextlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from covey_coordinator import blobs
from covey_coordinator.phases import encode_spec
from covey_coordinator.run import Run
from covey_coordinator.service import CoordinatorService, to_go_on_with
from covey_coordinator.store import OpenRound, Store
from covey_shared import wire
from covey_shared.errors import TransportError
from covey_shared.messages import (
    Manifest,
    Message,
    Result,
    Roster,
    RosterVote,
    RoundAbandoned,
    RoundCall,
    View,
    ViewProposal,
    WantUpload,
)
from memory_fleet import TOPICS, Fleet, config, go, hasten, short
from memory_transport import Delivery, Network

PHASES = ["gather", "share", "roster", "collect", "view", "unmask"]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    hasten(monkeypatch)


def said(fleet: Fleet, kind: type[Message]) -> dict[int, set[bytes]]:
    """What the coordinators said of a kind, by round or, where it has none, under 0."""
    found: dict[int, set[bytes]] = {}
    for _, topic, payload in fleet.network.log:
        ours = topic in (TOPICS.round, TOPICS.all)
        if ours and payload[1:2] == bytes((kind.CODE,)):
            message = wire.decode(payload).message
            head = getattr(message, "head", message)
            found.setdefault(getattr(head, "round", 0), set()).add(payload)
    return found


def only_said_once(fleet: Fleet) -> None:
    for kind in (RoundCall, Manifest, Result):
        assert all(len(bytes_) == 1 for bytes_ in said(fleet, kind).values()), kind.LABEL
    rounds = len(said(fleet, Manifest))
    for kind in (Roster, ViewProposal, View):  # these name their round by its hash
        messages = said(fleet, kind).get(0, set())
        assert len({wire.decode(data).message.h for data in messages}) == len(messages) <= rounds


async def die(fleet: Fleet, playing: "asyncio.Task[Any]", how: str) -> None:
    """The process ends: asked to, or not."""
    if how == "stopped":
        playing.cancel()
        await asyncio.wait({playing})
        await fleet.coordinator.close()
    else:
        await fleet.transport.stop(graceful=False)
        with contextlib.suppress(TransportError):
            await playing
        for task in fleet.coordinator._tasks:
            task.cancel()
    fleet.coordinator.store.close()


async def another(fleet: Fleet) -> CoordinatorService:
    """The next process."""
    fleet.coordinator = fleet.make_coordinator()
    await fleet.coordinator.start()
    return fleet.coordinator


@pytest.mark.parametrize("how", ["stopped", "killed"])
@pytest.mark.parametrize("phase", PHASES)
def test_the_open_round_goes_on(tmp_path: Path, phase: str, how: str):
    async def scenario() -> None:
        async with Fleet(tmp_path) as fleet:
            run = fleet.run(config(rounds=2))
            playing = asyncio.create_task(fleet.play(run))
            await fleet.phase(phase)
            done = len(fleet.outcomes)
            await die(fleet, playing, how)
            await another(fleet)
            run = fleet.run(config(rounds=2))
            state = await fleet.play(run)
            assert (state.status, state.rounds_done, state.rounds_completed) == ("completed", 2, 2)
            lines = run.directory.read_metrics()
            assert [(line["index"], line["round"]) for line in lines] == [(1, 1), (2, 2)]
            assert [line["survivors"] for line in lines] == [4, 4]
            assert len(fleet.outcomes) >= 2 - done
            only_said_once(fleet)
            assert sorted(said(fleet, RoundCall)) == [1, 2]  # none was lost
            await fleet.until(lambda: all(len(seat.ended) == 2 for seat in fleet.seats))
            ended = [[e.outcome for e in seat.ended] for seat in fleet.seats]
            assert ended == [["completed"] * 2] * 4  # a delay, and nothing else
            assert fleet.coordinator.store.opened() is None

    go(scenario())


def test_dying_again_and_again(tmp_path: Path):
    """In every phase of one round."""

    async def scenario() -> None:
        async with Fleet(tmp_path) as fleet:
            for phase in PHASES:
                playing = asyncio.create_task(fleet.play(fleet.run(config(rounds=1))))
                if fleet.coordinator.store.opened() is None or phase == "gather":
                    await fleet.phase(phase)
                else:
                    await fleet.until(lambda: fleet.coordinator._play is not None)
                    play = fleet.coordinator._play
                    assert play is not None
                    await fleet.until(lambda play=play, p=phase: _reached(play, p))  # type: ignore[misc]
                await die(fleet, playing, "killed")
                await another(fleet)
            run = fleet.run(config(rounds=1))
            state = await fleet.play(run) if run.rounds_left else run.state
            assert state.rounds_completed == 1
            only_said_once(fleet)

    go(scenario())


def _reached(play: Any, phase: str) -> bool:
    order = [*PHASES, "done", "abandoned"]
    return order.index(play.machine.phase.value) >= order.index(phase)


def test_half_an_upload_is_not_sent_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Chunks that were saved before the death are not asked for after it."""
    monkeypatch.setattr(blobs, "CHECKPOINT_S", 0.0)
    monkeypatch.setattr("covey_shared.chunks.CHUNK_BYTES", 512)
    held = True

    def tamper(delivery: Delivery) -> tuple[Delivery, ...]:
        late = held and delivery.topic == TOPICS.upload("pi-0") and count[0] >= 3
        if delivery.topic == TOPICS.upload("pi-0"):
            count[0] += 1
        return () if late else (delivery,)

    count = [0]

    async def scenario() -> None:
        nonlocal held
        network = Network()
        async with Fleet(tmp_path, network=network) as fleet:
            network.tamper = tamper
            playing = asyncio.create_task(fleet.play(fleet.run(config(rounds=1))))
            store: Store = fleet.coordinator.store
            await fleet.until(lambda: "pi-0" in store.received_chunks())
            received = store.received_chunks()["pi-0"]
            assert received.count(b"\x00") < len(received)
            before = len(network.log)
            await die(fleet, playing, "killed")
            held = False
            await another(fleet)
            state = await fleet.play(fleet.run(config(rounds=1)))
            assert state.rounds_completed == 1
            wanted = [
                wire.decode_as(WantUpload, payload).message.ranges
                for _, topic, payload in network.log[before:]
                if topic == TOPICS.inbox("pi-0") and payload[1:2] == bytes((WantUpload.CODE,))
            ]
            assert wanted
            assert all(first >= 1 for ranges in wanted for first, _ in ranges)

    go(scenario())


@pytest.mark.parametrize("harm", ["upload", "other upload", "journal", "unannounced", "garbage"])
def test_a_round_that_cannot_go_on_is_abandoned_and_said_to_be(tmp_path: Path, harm: str):
    async def scenario() -> None:
        async with Fleet(tmp_path) as fleet:
            playing = asyncio.create_task(fleet.play(fleet.run(config(rounds=2))))
            await fleet.phase("view")
            await die(fleet, playing, "killed")
            coordinator = await another(fleet)
            run = fleet.run(config(rounds=2))
            if harm == "upload":
                (run.directory.spool / "pi-1").unlink()
            if harm == "other upload":
                (run.directory.spool / "pi-1").write_bytes(
                    (run.directory.spool / "pi-2").read_bytes()
                )
            if harm in ("unannounced", "garbage"):
                entry = b"unobody" if harm == "unannounced" else b"\xff\x00"
                coordinator.store.journal([entry])
            if harm == "journal":
                entries = coordinator.store.entries()
                cut = [e for e in entries if e[2:3] != bytes((RosterVote.CODE,))]
                assert len(cut) < len(entries)
                coordinator.store.entries = lambda: cut  # type: ignore[method-assign]
            state = await fleet.play(run)
            assert (state.rounds_abandoned, state.rounds_completed) == (1, 1)
            first, second = run.directory.read_metrics()
            assert "could not take it up again" in first["reason"]
            assert second["outcome"] == "completed"
            (notice,) = said(fleet, RoundAbandoned)[1]
            assert "could not take it up again" in wire.decode(notice).message.reason
            assert not list(run.directory.spool.iterdir())

    go(scenario())


def test_the_open_round_of_another_run_is_given_up(tmp_path: Path):
    async def scenario() -> None:
        async with Fleet(tmp_path) as fleet:
            playing = asyncio.create_task(fleet.play(fleet.run(config(rounds=1), "one")))
            await fleet.phase("collect")
            await die(fleet, playing, "killed")
            await another(fleet)
            two = await fleet.play(fleet.run(config(rounds=1), "two"))
            one = await fleet.play(fleet.run(config(rounds=1), "one"))
            assert (one.rounds_completed, two.rounds_completed) == (1, 1)
            assert list(said(fleet, RoundAbandoned)) == [1]
            assert sorted(said(fleet, RoundCall)) == [1, 2, 3]

    go(scenario())


def test_a_round_that_was_never_called_is_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """It died between opening the round and saying so."""

    async def scenario() -> None:
        async with Fleet(tmp_path) as fleet:
            with monkeypatch.context() as patch:

                async def dead(play: Any) -> None:
                    raise asyncio.CancelledError

                patch.setattr("covey_coordinator.round_play.RoundPlay.run", dead)
                with pytest.raises(asyncio.CancelledError):
                    await fleet.play(fleet.run(config(rounds=1)))
            assert said(fleet, RoundCall) == {}
            opened = fleet.coordinator.store.opened()
            assert opened is not None
            state = await fleet.play(fleet.run(config(rounds=1)))
            assert state.rounds_completed == 1
            assert list(said(fleet, RoundCall)) == [opened.round]

    go(scenario())


def test_a_sum_that_was_not_saved_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """It died when it knew the sum, before anything of it was on the disk."""

    async def scenario() -> None:
        async with Fleet(tmp_path) as fleet:
            with monkeypatch.context() as patch:

                def dead(run: Run, outcome: Any) -> Any:
                    raise RuntimeError("dead")

                patch.setattr(Run, "absorb", dead)
                with pytest.raises(RuntimeError, match="dead"):
                    await fleet.play(fleet.run(config(rounds=1)))
            first = dict(fleet.sums)
            await fleet.coordinator.close()
            await another(fleet)
            run = fleet.run(config(rounds=1))
            state = await fleet.play(run)
            assert state.rounds_completed == 1
            assert list(fleet.sums) == list(first)  # the same round; `_on_sum` compared them
            only_said_once(fleet)

    go(scenario())


def test_a_round_is_given_up_when_asked(tmp_path: Path):
    async def scenario() -> None:
        async with Fleet(tmp_path) as fleet:
            playing = asyncio.create_task(fleet.play(fleet.run(config(rounds=2))))
            await fleet.phase("collect")
            fleet.coordinator.give_up_round("the operator abandoned it")
            state = await playing
            assert (state.rounds_abandoned, state.rounds_completed) == (1, 1)
            assert fleet.outcomes[0].reason == "the operator abandoned it"

    go(scenario())


def test_a_device_that_left_meanwhile_is_not_waited_for(tmp_path: Path):
    async def scenario() -> None:
        async with Fleet(tmp_path) as fleet:
            settings = config(rounds=1, deadlines=short(share_s=15.0, collect_s=15.0))
            playing = asyncio.create_task(fleet.play(fleet.run(settings)))
            await fleet.phase("share")
            await die(fleet, playing, "killed")
            await fleet.seats[0].service.close(graceful=False)
            await another(fleet)
            loop = asyncio.get_running_loop()
            began = loop.time()
            state = await fleet.play(fleet.run(settings))
            assert state.rounds_completed == 1
            assert loop.time() - began < 10.0

    go(scenario())


def test_only_a_round_that_its_run_still_wants_goes_on(tmp_path: Path):
    """Each of what is compared stands for a round that devices would refuse, or that nobody asked for."""

    async def scenario() -> None:
        async with Fleet(tmp_path) as fleet:
            run = fleet.run(config(rounds=2))
            spec = run.spec(fleet.trust.fleet, 1)

            def opened(name: str = "run", index: int = 1, **call: Any) -> OpenRound:
                changed = replace(spec, call=msgspec.structs.replace(spec.call, **call))
                return OpenRound(name, index, 1, encode_spec(changed), bytes(32), 0.0)

            assert to_go_on_with(run, opened()) == (spec, "")
            for left, problem in [
                (opened(name="other"), "it is one of run 'other'"),
                (opened(index=2), "the run stands elsewhere now"),
                (opened(model=bytes(32)), "the run stands elsewhere now"),
                (opened(plan=bytes(32)), "the run has another plan now"),
            ]:
                found, said_why = to_go_on_with(run, left)
                assert found is not None
                assert said_why == problem
            damaged = replace(opened(), spec=b"\xc1")
            found, said_why = to_go_on_with(run, damaged)
            assert found is None
            assert "settings cannot be read" in said_why

    go(scenario())
