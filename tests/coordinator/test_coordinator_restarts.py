"""The coordinator's service when disks are full, when it is stopped, and when it starts again.

Every sum of every run here is checked against the devices' own plaintext (`Fleet.play`).
"""

import asyncio
import errno
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

import covey_coordinator.files
from covey_coordinator.spool import FileSink
from covey_shared import wire
from covey_shared.errors import TransportError
from covey_shared.messages import RoundCall, ViewVote
from memory_fleet import TOPICS, Fleet, config, go, hasten, short
from memory_transport import Delivery, Network


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    hasten(monkeypatch)


# -- what disks do ---------------------------------------------------------------------------------


def test_a_full_disk_at_the_end_of_a_round_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    real, failures = os.fsync, Counter[str]()

    def fsync(fd: int) -> None:
        path = str(Path(f"/proc/self/fd/{fd}").readlink())
        if "/runs/" in path:
            failures[path] += 1
            if failures[path] <= 2:
                raise OSError(errno.ENOSPC, "No space left on device")
        real(fd)

    async def scenario() -> None:
        async with Fleet(tmp_path) as fleet:
            run = fleet.run(config(rounds=2))
            monkeypatch.setattr(covey_coordinator.files.os, "fsync", fsync)
            state = await fleet.play(run)
            monkeypatch.undo()
            assert state.rounds_completed == 2
            assert len(failures) >= 4  # models, states and lines of metrics were all refused
            assert [line["index"] for line in run.directory.read_metrics()] == [1, 2]
            assert run.directory.metrics.read_bytes().count(b"\n") == 2

    go(scenario())


def test_a_full_spool_is_asked_for_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    real, refused = FileSink._reserve, []

    def reserve(sink: FileSink, fd: int) -> None:
        if len(refused) < 6:
            refused.append(sink.path.name)
            raise OSError(errno.ENOSPC, "No space left on device")
        real(sink, fd)

    monkeypatch.setattr(FileSink, "_reserve", reserve)

    async def scenario() -> None:
        async with Fleet(tmp_path) as fleet:
            state = await fleet.play(fleet.run(config(rounds=1)))
            assert state.rounds_completed == 1
            assert fleet.outcomes[0].completed is not None
            assert len(fleet.outcomes[0].completed.survivors) == 4
            assert len(refused) == 6

    go(scenario())


def test_a_spool_that_stays_full_is_named_as_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def reserve(sink: FileSink, fd: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(FileSink, "_reserve", reserve)

    async def scenario() -> None:
        async with Fleet(tmp_path) as fleet:
            run = fleet.run(config(rounds=1, deadlines=short(collect_s=1.0)))
            state = await fleet.play(run)
            assert (state.status, state.rounds_abandoned) == ("completed", 1)
            (line,) = run.directory.read_metrics()
            assert "0 updates arrived" in line["reason"]
            assert "No space left on device; free some space" in line["reason"]

    go(scenario())


# -- being stopped and started again ---------------------------------------------------------------


def test_a_coordinator_that_stops_leaves_no_call_behind(tmp_path: Path):
    """Nobody would answer a device that begins with it now; who is in the round stays there."""

    async def scenario() -> None:
        async with Fleet(tmp_path) as fleet:
            playing = asyncio.create_task(fleet.play(fleet.run(config(rounds=2))))
            await fleet.phase("share")
            playing.cancel()
            await asyncio.wait({playing})
            assert TOPICS.round in fleet.network.retained
            await fleet.coordinator.close()
            assert TOPICS.round not in fleet.network.retained
            assert all(seat.service._session.round_id == 1 for seat in fleet.seats)

    go(scenario())


def test_a_process_that_is_killed_leaves_a_run_that_goes_on(tmp_path: Path):
    """No goodbye: the call stays retained, devices wait in a round that nobody leads any more."""

    async def scenario() -> None:
        async with Fleet(tmp_path) as fleet:
            playing = asyncio.create_task(fleet.play(fleet.run(config(rounds=2))))
            await fleet.phase("view")
            await fleet.transport.stop(graceful=False)
            with pytest.raises(TransportError):
                await playing
            assert TOPICS.round in fleet.network.retained
            fleet.coordinator = fleet.make_coordinator()
            await fleet.coordinator.start()
            await fleet.until(lambda: len(fleet.coordinator.registry.present) == 4)
            state = await fleet.play(fleet.run(config(rounds=2)))
            assert state.rounds_completed == 2

    go(scenario())


def test_stopping_between_rounds(tmp_path: Path):
    async def scenario() -> None:
        async with Fleet(tmp_path) as fleet:
            stop = asyncio.Event()
            fleet.on_event = lambda event: stop.set() if fleet.outcomes else None
            state = await fleet.coordinator.play(fleet.run(config(rounds=5)), stop=stop)
            assert (state.status, state.rounds_done) == ("stopped", 1)

    go(scenario())


def test_being_stopped_right_after_a_round_keeps_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The sum is known and nothing of it on disk yet: the most expensive moment to be stopped."""

    async def scenario() -> None:
        async with Fleet(tmp_path) as fleet:
            run = fleet.run(config(rounds=3))
            absorb, begun = run.absorb, asyncio.Event()
            loop = asyncio.get_running_loop()

            def absorb_slowly(outcome: Any) -> Any:
                loop.call_soon_threadsafe(begun.set)
                return absorb(outcome)

            monkeypatch.setattr(run, "absorb", absorb_slowly)
            playing = asyncio.create_task(fleet.play(run))
            await begun.wait()
            playing.cancel()
            await asyncio.wait({playing})
            assert playing.cancelled()
            again = fleet.run(config(rounds=3))
            assert (again.state.rounds_done, again.state.rounds_completed) == (1, 1)
            assert again.state.model == again.model_digest.hex()
            assert [line["index"] for line in again.directory.read_metrics()] == [1]

    go(scenario())


# -- revisions -------------------------------------------------------------------------------------


def calls(fleet: Fleet) -> list[RoundCall]:
    """Each round's call, once."""
    seen: dict[int, RoundCall] = {}
    for _, topic, payload in fleet.network.log:
        if topic == TOPICS.round and payload:
            message = wire.decode_as(RoundCall, payload).message
            seen[message.round] = message
    return [seen[number] for number in sorted(seen)]


def test_a_model_whose_uploads_began_is_called_again_under_a_higher_revision(tmp_path: Path):
    done = 0

    def tamper(delivery: Delivery) -> Iterable[Delivery]:
        lost = done < 2 and delivery.incoming.payload[1:2] == bytes((ViewVote.CODE,))
        return () if lost else (delivery,)

    async def scenario() -> None:
        nonlocal done

        def count(event: Any) -> None:
            nonlocal done
            done = len(fleet.outcomes)

        async with Fleet(tmp_path, network=Network(tamper)) as fleet:
            fleet.on_event = count
            state = await fleet.play(fleet.run(config(rounds=4, deadlines=short(unmask_s=0.4))))
            assert (state.rounds_abandoned, state.rounds_completed) == (2, 2)
            assert [o.after_uploads for o in fleet.outcomes[:2]] == [True, True]
            made = calls(fleet)
            assert [call.revision for call in made] == [0, 1, 2, 0]
            assert len({call.model for call in made[:3]}) == 1
            assert made[3].model != made[2].model

    go(scenario())


def test_a_round_that_ends_before_uploads_uses_no_revision_up(tmp_path: Path):
    async def scenario() -> None:
        async with Fleet(tmp_path, n=2) as fleet:
            settings = config(rounds=2, n=3, deadlines=short(gather_s=0.4))
            state = await fleet.play(fleet.run(settings))
            assert state.rounds_abandoned == 2
            assert [call.revision for call in calls(fleet)] == [0, 0]
            assert fleet.outcomes[0].reason == (
                "2 devices checked in within 0.4 s; at least 3 are needed"
            )

    go(scenario())


def test_the_same_plan_can_be_run_again(tmp_path: Path):
    """Devices contribute to one model once for each revision, and both runs start from the same."""

    async def scenario() -> None:
        async with Fleet(tmp_path) as fleet:
            assert (await fleet.play(fleet.run(config(rounds=1), "one"))).rounds_completed == 1
            assert (await fleet.play(fleet.run(config(rounds=2), "two"))).rounds_completed == 2
            made = calls(fleet)
            assert [call.revision for call in made] == [0, 1, 0]
            assert made[0].model == made[1].model
            assert made[0].run != made[1].run

    go(scenario())
