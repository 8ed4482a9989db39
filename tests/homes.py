"""Fleets whose devices keep the model, for tests."""

import asyncio
import hashlib
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from covey_coordinator.run import Run
from covey_device.cache import BlobCache
from covey_device.home import keeper as home_module
from covey_device.home.export import Exported
from covey_device.home.files import ModelDirectory, Sidecar, read_sidecar, verify
from covey_device.home.keeper import Home
from covey_device.policy import Policy
from covey_shared import wire
from covey_shared.messages import RoundCall, WantBlob
from covey_shared.plan import decode_header
from covey_shared.runtime import LocalModel, try_export
from memory_fleet import TOPICS, Fleet, Seat, hasten

IMAGES = np.random.default_rng(5).random((7, 1, 8, 8), dtype=np.float32)
MB = 1_000_000


def hasten_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is waited for longer than it takes in memory."""
    hasten(monkeypatch)
    monkeypatch.setattr(home_module, "SETTLE_S", 0.05)
    monkeypatch.setattr(home_module, "RETRY_S", 0.2)


def without_children(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models are put together in this process: a child of every device takes most of a test's time."""

    @asynccontextmanager
    async def exported(
        header: bytes, graph: bytes, parameters: bytes, *, resident_bytes: int, seconds: float
    ) -> AsyncIterator[Exported]:
        fd = os.memfd_create("model")
        try:
            flat = np.frombuffer(parameters, "<f4").astype(np.float32)
            shape = try_export(decode_header(header), graph, flat, Path(f"/proc/self/fd/{fd}"))
            yield Exported(fd, os.fstat(fd).st_size, shape)
        finally:
            os.close(fd)

    monkeypatch.setattr(home_module, "exported", exported)


class Settled:
    """A fleet whose devices keep the model. Devices that are (re)booted keep it too."""

    def __init__(self, fleet: Fleet, **options: Any) -> None:
        self.fleet, self.options = fleet, options
        self.kept: list[tuple[str, int]] = []

    def move_in(self, *seats: Seat, **options: Any) -> None:
        """As `assemble` does, for services that run already."""
        for seat in seats or self.fleet.seats:
            self._move_in(seat, self.options | options)

    def _move_in(self, seat: Seat, options: dict[str, Any]) -> None:
        service = seat.service
        given: dict[str, Any] = {
            "policy": Policy,
            "room": lambda: (300 * MB, 30.0),
            "rng": os.urandom,
        }
        home = Home(
            self.directory(seat), self.fleet.trust, seat.name, seat.identity, **(given | options)
        )
        cache = BlobCache(seat.directory / "cache", 10**8, reserve_bytes=0)
        service._cache = service._blobs._cache = cache
        service.home = home
        service._session.told = home.heard
        home.on_kept = lambda: self.kept.append((seat.name, self.sidecar(seat).round))
        service._spawn(service._tasks, home.run(service._blobs, lambda: service._session.round_id))

    def directory(self, seat: Seat) -> ModelDirectory:
        return ModelDirectory(seat.directory / "model", reserve_bytes=0)

    def sidecar(self, seat: Seat) -> Sidecar:
        folder = self.directory(seat).folder()
        assert folder is not None
        return read_sidecar(folder)

    def has(self, seat: Seat, model: bytes) -> bool:
        sidecar = self.directory(seat).sidecar()
        return sidecar is not None and sidecar.model == model.hex()

    async def everybody_has(self, model: bytes, *seats: Seat, timeout_s: float = 30.0) -> None:
        wanted = seats or tuple(self.fleet.seats)
        await self.fleet.until(lambda: all(self.has(seat, model) for seat in wanted), timeout_s)

    def check(self, seat: Seat, model: Path) -> Sidecar:
        """It predicts what the coordinator's own file does, and everything vouches for it."""
        sidecar = verify(
            self.directory(seat).folder() or Path(), self.fleet.trust, seat.name,
            seat.identity.public,
        )  # fmt: skip
        here, there = seat.directory / "model" / "current.onnx", model
        assert hashlib.sha256(here.read_bytes()).hexdigest() == sidecar.onnx
        ours, theirs = (LocalModel(p.read_bytes(), p.name).predict(IMAGES) for p in (here, there))
        assert np.array_equal(ours, theirs)
        return sidecar


def wants(fleet: Fleet, name: str, log: list[tuple[str, str, bytes]] | None = None) -> list[bytes]:
    """Blobs that a device asked for, in order. log: the part of the network's that is looked at."""
    return [
        wire.decode_as(WantBlob, payload).message.blob
        for sender, topic, payload in (fleet.network.log if log is None else log)
        if sender == name and topic == TOPICS.outbox(name) and payload[1] == WantBlob.CODE
    ]


def stepwise(fleet: Fleet, settled: Settled) -> None:
    """From now on no round is called before everybody has the model of the one before."""
    real = fleet.coordinator._enough_present

    async def patient(run: Run, stop: asyncio.Event | None) -> None:
        if run.index > 1:
            await settled.everybody_has(run.model_digest)
            for seat in fleet.seats:
                settled.check(seat, run.directory.path / "model.onnx")
        await real(run, stop)

    fleet.coordinator._enough_present = patient  # type: ignore[method-assign]


def model_hashes(fleet: Fleet) -> dict[int, bytes]:
    """Of each round's call."""
    calls = [
        wire.decode_as(RoundCall, payload).message
        for sender, topic, payload in fleet.network.log
        if topic == TOPICS.round and payload
    ]
    return {call.round: call.model for call in calls}
