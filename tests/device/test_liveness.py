"""READY, STATUS, the watchdog: what systemd hears of a service that lives, hangs, reloads and ends."""

import asyncio
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from covey_device.liveness import BEATS, Supervised
from covey_shared.errors import LocalProtocolError
from covey_shared.notify import Notifier
from memory_fleet import Fleet, config


class Supervisor:
    """Listens where systemd would."""

    def __init__(self, path: Path) -> None:
        self.address = str(path)
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(self.address)
        self.socket.setblocking(False)

    async def hears(self) -> str:
        """The next thing that is said."""
        async with asyncio.timeout(20):
            data = await asyncio.get_running_loop().sock_recv(self.socket, 4096)
        return data.decode()

    async def hears_until(self, word: str) -> list[str]:
        said = [await self.hears()]
        while said[-1] != word:
            said.append(await self.hears())
        return said

    def silent(self) -> bool:
        try:
            self.socket.recv(4096)
        except BlockingIOError:
            return True
        return False


class Sleep:
    """`asyncio.sleep` that ends when the test says so."""

    def __init__(self) -> None:
        self.asked: list[float] = []
        self.over = asyncio.Event()

    async def __call__(self, seconds: float) -> None:
        self.asked.append(seconds)
        await self.over.wait()
        self.over.clear()


class Double:
    """A service whose parts work or do not."""

    def __init__(self) -> None:
        self.on_status: Callable[[str], None] = lambda line: None
        self.log: list[str] = []
        self.works = asyncio.Event()
        self.works.set()
        self.problem: Exception | None = None

    async def start(self) -> None:
        self.log.append("start")

    async def close(self) -> None:
        self.log.append("close")

    async def beat(self) -> None:
        await self.works.wait()
        if self.problem is not None:
            raise self.problem

    async def reload_policy(self, *, anyway: bool = False) -> None:
        self.log.append(f"reload anyway={anyway}")
        if self.problem is not None:
            raise self.problem


@pytest.fixture
def supervisor(tmp_path: Path):
    listening = Supervisor(tmp_path / "notify")
    yield listening
    listening.socket.close()


def play(supervisor: Supervisor, scenario, *, watchdog_s: float | None = 40.0) -> Double:
    async def go() -> Double:
        service, sleep, stop = Double(), Sleep(), asyncio.Event()
        supervised = Supervised(
            service, Notifier(supervisor.address, watchdog_s), sleep=sleep, steady_us=lambda: 77
        )
        running = asyncio.create_task(supervised.run(stop, "starts"))
        assert await supervisor.hears() == "STATUS=starts"
        assert await supervisor.hears() == "READY=1"
        assert service.log == ["start"]
        await scenario(service, sleep, supervised)
        stop.set()
        await running
        assert await supervisor.hears() == "STOPPING=1"
        assert service.log[-1] == "close"
        return service

    return asyncio.run(go())


def test_ready_then_beats_then_stopping(supervisor: Supervisor):
    async def scenario(service, sleep, supervised):
        for _ in range(3):
            assert await supervisor.hears() == "WATCHDOG=1"
            sleep.over.set()
        assert await supervisor.hears() == "WATCHDOG=1"
        assert set(sleep.asked) == {40.0 / BEATS}

    play(supervisor, scenario)


def test_no_beat_while_the_service_hangs(supervisor: Supervisor):
    async def scenario(service, sleep, supervised):
        assert await supervisor.hears() == "WATCHDOG=1"
        service.works.clear()
        sleep.over.set()
        for _ in range(20):
            await asyncio.sleep(0)
        assert supervisor.silent()
        service.works.set()
        assert await supervisor.hears() == "WATCHDOG=1"

    play(supervisor, scenario)


def test_no_beat_of_a_service_that_has_lost_a_part(supervisor: Supervisor, caplog):
    async def scenario(service, sleep, supervised):
        assert await supervisor.hears() == "WATCHDOG=1"
        service.problem = LocalProtocolError("a part of the service has ended")
        sleep.over.set()
        for _ in range(20):
            await asyncio.sleep(0)
        assert supervisor.silent()

    play(supervisor, scenario)
    assert "systemd will restart it" in caplog.text


def test_without_a_watchdog_nobody_beats(supervisor: Supervisor):
    async def scenario(service, sleep, supervised):
        for _ in range(20):
            await asyncio.sleep(0)
        assert supervisor.silent()
        assert not sleep.asked

    play(supervisor, scenario, watchdog_s=None)


@pytest.mark.parametrize("problem", [None, RuntimeError("a bug")])
def test_a_reload_ends_in_ready_whatever_becomes_of_it(supervisor: Supervisor, problem):
    async def scenario(service, sleep, supervised):
        service.problem = problem
        supervised.reload()
        assert await supervisor.hears() == "RELOADING=1\nMONOTONIC_USEC=77"
        assert await supervisor.hears() == "READY=1"
        assert service.log[-1] == "reload anyway=True"

    play(supervisor, scenario, watchdog_s=None)


def test_a_status_of_the_service_is_passed_on(supervisor: Supervisor):
    async def scenario(service, sleep, supervised):
        service.on_status("waits")
        assert await supervisor.hears() == "STATUS=waits"

    play(supervisor, scenario, watchdog_s=None)


def test_a_real_service_beats_until_its_worker_hangs_or_ends(tmp_path: Path):
    """In memory: the beat goes through the inbox, the worker and the thread that messages go through."""

    async def go() -> None:
        async with Fleet(tmp_path, 3) as fleet:
            service = fleet.seats[0].service
            async with asyncio.timeout(20):
                await service.beat()
            async with service._lock:  # as a step would that never comes back
                beat = asyncio.create_task(service.beat())
                await asyncio.wait([beat], timeout=0.1)
                assert not beat.done()
            async with asyncio.timeout(20):
                await beat
            service._lasting[0].cancel()
            await asyncio.wait([service._lasting[0]])
            with pytest.raises(LocalProtocolError):
                await service.beat()
            assert config(1, 3)

    asyncio.run(go())
