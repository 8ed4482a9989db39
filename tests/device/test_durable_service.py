"""Devices that die, come back, and find their disk full, in whole rounds: nothing is fetched, sent or lost
that need not be."""

import asyncio
import errno
import logging
import os
import stat
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from covey_device.audit import AuditLog, lines_of, verify
from covey_device.audit_words import stories, told
from covey_device.cache import BlobCache
from covey_device.session import Phase
from covey_shared import chunks, wire
from covey_shared.messages import Decline, MaskedUpdate, ViewVote, WantBlob
from memory_fleet import TOPICS, Fleet, Seat, config, go, hasten, short
from memory_transport import Delivery

EVERYONE = ("pi-0", "pi-1", "pi-2", "pi-3")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    hasten(monkeypatch)
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 2048)  # a model of ten chunks, an update of six


def survivors(fleet: Fleet) -> list[tuple[str, ...]]:
    return [o.completed.survivors if o.completed else () for o in fleet.outcomes]


def with_cache(seat: Seat) -> BlobCache:
    """As `assemble` has it."""
    cache = BlobCache(seat.directory / "cache", 10**8, reserve_bytes=0)
    seat.service._cache = seat.service._blobs._cache = cache
    return cache


def said(fleet: Fleet, name: str, kind: type) -> list[bytes]:
    return [
        payload
        for sender, topic, payload in fleet.network.log
        if sender == name and topic == TOPICS.outbox(name) and payload[1] == kind.CODE
    ]


def frames(fleet: Fleet, name: str) -> list[chunks.Chunk]:
    return [
        chunks.decode_frame(payload)
        for sender, topic, payload in fleet.network.log
        if sender == name and topic == TOPICS.upload(name)
    ]


# -- an upload that is cut off ---------------------------------------------------------------------


@pytest.mark.parametrize("at", [0, 2, 5])
def test_a_device_killed_in_mid_upload_finishes_that_upload(tmp_path: Path, at: int):
    """It dies when so many chunks have gone, and is back: the same message, the same bytes, in the sum."""

    async def scenario() -> None:
        async with Fleet(tmp_path) as fleet:
            seat = fleet.seats[1]
            killed: list[asyncio.Task[None]] = []
            gone: list[str] = []

            async def kill() -> None:
                await seat.service.close(graceful=False)
                files = {path.name: path for path in seat.directory.iterdir()}
                for name in ("unfinished.bin", "unfinished.json"):
                    assert stat.S_IMODE(files[name].stat().st_mode) == 0o600
                await fleet.boot(seat)
                assert seat.service._session.phase is Phase.FINISHING

            def tamper(delivery: Delivery) -> Iterable[Delivery]:
                if delivery.topic == TOPICS.upload(seat.name) and not killed:
                    gone.append(delivery.topic)
                    if len(gone) > at:
                        seat.transport._stopped = True  # from now on nothing leaves it
                        killed.append(asyncio.ensure_future(kill()))
                        return ()
                return (delivery,)

            fleet.network.tamper = tamper
            settings = config(rounds=2, deadlines=short(absent_grace_s=5.0, collect_s=20.0))
            state = await fleet.play(fleet.run(settings))
            assert killed
            await killed[0]
            assert state.rounds_completed == 2
            assert survivors(fleet) == [EVERYONE, EVERYONE]
            first = set(said(fleet, seat.name, MaskedUpdate))
            assert len(first) == 2  # of two rounds
            by_digest: dict[bytes, dict[int, bytes]] = {}
            for chunk in frames(fleet, seat.name):
                kept = by_digest.setdefault(chunk.digest, {})
                assert kept.setdefault(chunk.index, chunk.data) == chunk.data
            assert len(by_digest) == 2
            assert {len(kept) for kept in by_digest.values()} == {6}
            assert seat.trainer.rounds == 2
            assert said(fleet, seat.name, Decline) == []
            # It has no seeds any more: its vote in the first round is nobody's.
            assert len({wire.decode(v).message.h for v in said(fleet, seat.name, ViewVote)}) == 1
            assert not [p for p in seat.directory.iterdir() if p.name.startswith("unfinished")]
            # The owner's record is one chain, with the update once, and in words.
            assert verify(seat.directory) is not None
            lines = [line for _, line in lines_of(seat.directory)]
            assert sum(b'"masked update"' in line for line in lines) == 2
            story = told(next(s for s in stories(seat.directory) if s.round_id == 1))
            assert "this device's update is in it" in story

    go(scenario())


def test_a_device_killed_between_keeping_and_sending_sends_what_it_kept(tmp_path: Path):
    """Nothing had left: neither the message nor a chunk."""

    async def scenario() -> None:
        async with Fleet(tmp_path) as fleet:
            seat = fleet.seats[1]
            dead = asyncio.Event()
            service = seat.service
            real = service.perform

            async def perform(action: Any) -> None:
                if type(action).__name__ == "Publish" and isinstance(
                    action.message.message, MaskedUpdate
                ):
                    dead.set()
                    await asyncio.get_running_loop().create_future()
                await real(action)

            service.perform = perform  # type: ignore[method-assign]
            settings = config(rounds=1, deadlines=short(absent_grace_s=5.0, collect_s=20.0))
            playing = asyncio.create_task(fleet.play(fleet.run(settings)))
            await asyncio.wait_for(dead.wait(), 20)
            await service.close(graceful=False)
            assert said(fleet, seat.name, MaskedUpdate) == []
            await fleet.boot(seat)
            await playing
            assert survivors(fleet) == [EVERYONE]
            assert len(set(said(fleet, seat.name, MaskedUpdate))) == 1

    go(scenario())


def test_an_upload_that_cannot_be_kept_is_sent_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    async def scenario() -> None:
        async with Fleet(tmp_path) as fleet:
            with full(monkeypatch, lambda path: "/pi-1/unfinished" in path):
                await fleet.play(fleet.run(config(rounds=1)))
            assert survivors(fleet) == [EVERYONE]
            assert "would not survive a restart" in caplog.text
            assert not [p for p in fleet.seats[1].directory.iterdir() if "unfinished" in p.name]

    go(scenario())


# -- what was fetched before -----------------------------------------------------------------------


def wanted(fleet: Fleet, name: str) -> list[WantBlob]:
    return [wire.decode(p).message for p in said(fleet, name, WantBlob)]  # type: ignore[misc]


def test_a_restart_fetches_nothing_again_and_a_later_round_only_the_new_model(tmp_path: Path):
    async def scenario() -> None:
        async with Fleet(tmp_path) as fleet:
            seat = fleet.seats[1]
            with_cache(seat)
            await fleet.play(fleet.run(config(rounds=1), "one"))
            first = wanted(fleet, seat.name)
            assert len({want.blob for want in first}) == 3  # header, graph, model
            assert sum(w.blob == first[0].blob for w in first) == 1
            await seat.service.close(graceful=False)
            await fleet.boot(seat)
            with_cache(seat)
            fleet.network.log.clear()
            # Another run from the same start, and then a model that it has never seen.
            await fleet.play(fleet.run(config(rounds=2), "two"))
            assert survivors(fleet) == [EVERYONE] * 3
            (new,) = {want.blob for want in wanted(fleet, seat.name)}
            assert new not in {want.blob for want in first}
            assert seat.made == 2

    go(scenario())


def test_a_device_killed_in_mid_download_asks_only_for_what_it_lacks(tmp_path: Path):
    async def scenario() -> None:
        async with Fleet(tmp_path) as fleet:
            seat = fleet.seats[1]
            cache = with_cache(seat)
            model = fleet.bundle.initial.tobytes()
            digest = chunks.blob_of(model).digest
            topic = TOPICS.blob(digest)
            through: list[int] = []
            restarted = False

            def tamper(delivery: Delivery) -> Iterable[Delivery]:
                if delivery.receiver == seat.name and delivery.topic == topic and not restarted:
                    index = chunks.decode_frame(delivery.incoming.payload).index
                    if index not in (0, 3, 4):
                        return ()
                    through.append(index)
                return (delivery,)

            fleet.network.tamper = tamper
            settings = config(rounds=1, deadlines=short(gather_s=20.0))
            playing = asyncio.create_task(fleet.play(fleet.run(settings)))
            have = seat.directory / "cache" / f"{digest.hex()}.have"
            await fleet.until(lambda: have.exists() and have.stat().st_size == 3 * 20)
            assert cache is not None
            await seat.service.close(graceful=False)
            restarted = True
            await fleet.boot(seat)
            with_cache(seat)
            fleet.network.log.clear()
            await playing
            assert survivors(fleet) == [EVERYONE]
            ranges = [want.ranges for want in wanted(fleet, seat.name) if want.blob == digest]
            assert ranges[0] == ((1, 2), (5, 5))
            assert {want.blob for want in wanted(fleet, seat.name)} == {digest}

    go(scenario())


# -- full disks ------------------------------------------------------------------------------------


class full:
    """While it lasts, every write below a path fails as on a full disk. times: only so often."""

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        where: Callable[[str], bool],
        times: int = 10**9,
        calls: Iterable[str] = ("write", "pwrite", "fsync", "fdatasync"),
    ) -> None:
        self._context = monkeypatch.context()
        self._where, self._calls, self.left = where, calls, times

    def __enter__(self) -> "full":
        patch = self._context.__enter__()
        for name in self._calls:
            patch.setattr(os, name, self._failing(getattr(os, name)))
        return self

    def __exit__(self, *error: Any) -> None:
        self._context.__exit__(*error)

    def _failing(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(fd: int, *rest: Any) -> Any:
            if self.left and self._where(str(Path(f"/proc/self/fd/{fd}").readlink())):
                self.left -= 1
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(fd, *rest)

        return call


@pytest.mark.parametrize(
    ("call", "nth"),
    [
        ("write", 0),
        ("write", 2),
        ("write", 5),
        ("write", 12),
        ("pwrite", 0),
        ("pwrite", 3),
        ("fsync", 0),
        ("fsync", 3),
        ("fdatasync", 1),
    ],
)
def test_a_full_disk_costs_at_most_the_round(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    call: str,
    nth: int,
):
    """From its n-th write of a kind on, until the end of the round."""

    async def scenario() -> None:
        async with Fleet(tmp_path) as fleet:
            seat = fleet.seats[1]
            with_cache(seat)
            seen = [0]

            def where(path: str) -> bool:
                if "/pi-1/" not in path:
                    return False
                seen[0] += 1
                return seen[0] > nth

            with full(monkeypatch, where, calls=(call,)):
                settings = config(rounds=1, deadlines=short(gather_s=2.0, collect_s=4.0))
                await fleet.play(fleet.run(settings, "one"))
            before = fleet.memory(seat)
            assert survivors(fleet)[0] in (EVERYONE, ("pi-0", "pi-2", "pi-3"))
            state = await fleet.play(fleet.run(config(rounds=1), "two"))
            assert state.rounds_completed == 1
            assert survivors(fleet)[1] == EVERYONE
            after = fleet.memory(seat)
            assert after.last_round > before.last_round
            assert before.contributed.items() <= after.contributed.items() or (
                before.contributed.keys() <= after.contributed.keys()
            )
            assert verify(seat.directory) is not None
            assert not [r for r in caplog.records if r.exc_info]  # nothing that was not foreseen

    with caplog.at_level(logging.WARNING):
        go(scenario())


def test_the_cache_gives_way_to_what_matters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    async def scenario() -> None:
        async with Fleet(tmp_path) as fleet:
            seat = fleet.seats[1]
            with_cache(seat)

            def memory_of_it(path: str) -> bool:
                # As long as the cache takes the space.
                room = not list((seat.directory / "cache").glob("*"))
                return "/pi-1/memory" in path and not room

            with full(monkeypatch, memory_of_it, calls=("write",)):
                await fleet.play(fleet.run(config(rounds=1)))
            assert survivors(fleet) == [EVERYONE]
            assert "the cache was emptied for it" in caplog.text
            assert AuditLog(seat.directory).last("ended")["in_sum"] is True

    go(scenario())
