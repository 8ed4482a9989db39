"""The local socket: what it answers, and what becomes of whoever abuses it."""

import asyncio
import json
import os
import socket
import stat
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from covey_device.host import port as local_port
from covey_device.host.port import (
    FILE,
    MAX_CLIENTS,
    MAX_LINE_BYTES,
    LocalPort,
    ask,
    directory_of,
)
from covey_device.host.waits import MAX_WAITS, Waits, file_line
from covey_shared.errors import ConfigError, LocalProtocolError, StorageError
from device_support import FakeClock
from memory_fleet import go


class Desk:
    """A port whose clock stands still."""

    def __init__(self, directory: Path) -> None:
        self.clock, self.waits, self.heeds = FakeClock(0.0), Waits(), True
        self.path = directory / FILE
        self.port = self.another()

    def another(self) -> LocalPort:
        async def status() -> Any:
            return {"device": "pi-1"}

        async def explain() -> Any:
            return []

        return LocalPort(
            self.path,
            self.waits,
            status=status,
            explain=explain,
            heeds=lambda: self.heeds,
            clock=self.clock,
        )

    async def client(self) -> "Client":
        return Client(*await asyncio.open_unix_connection(self.path))

    @property
    def lines(self) -> tuple[str, ...]:
        return self.waits.lines(self.clock.now)

    async def until(self, true: Callable[[], bool]) -> None:
        async with asyncio.timeout(20):
            while not true():
                await asyncio.sleep(0.005)


class Client:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def say(self, request: dict[str, Any] | bytes) -> dict[str, Any] | None:
        """-> the answer; None if the connection ended instead."""
        data = request if isinstance(request, bytes) else json.dumps(request).encode()
        try:
            self.writer.write(data + b"\n")
            async with asyncio.timeout(20):
                line = await self.reader.readline()
        except OSError:
            return None
        return json.loads(line) if line else None

    def leave(self) -> None:
        self.writer.transport.abort()


@asynccontextmanager
async def desk(directory: Path) -> AsyncIterator[Desk]:
    made = Desk(directory)
    await made.port.open()
    try:
        yield made
    finally:
        await made.port.close()


def test_a_program_has_its_say(tmp_path: Path):
    async def scenario() -> None:
        async with desk(tmp_path) as at:
            assert stat.S_IMODE(at.path.stat().st_mode) == 0o660
            camera = await at.client()
            assert await camera.say({"ask": "status"}) == {"ok": True, "status": {"device": "pi-1"}}
            assert await camera.say({"ask": "explain"}) == {"ok": True, "explain": []}
            assert at.lines == ()
            answer = await camera.say({"ask": "wait", "seconds": 30, "why": "the camera is in use"})
            assert answer == {"ok": True, "heeded": True}
            assert at.lines == (
                "a local program asks to wait: the camera is in use (30 s more, host.programs = true)",
            )
            camera.leave()
            at.clock.now = 29.9
            assert len(at.lines) == 1
            at.clock.now = 30.0
            assert at.lines == ()

    go(scenario())


def test_a_wait_without_a_time_lasts_as_long_as_its_connection(tmp_path: Path):
    async def scenario() -> None:
        async with desk(tmp_path) as at:
            one, other = await at.client(), await at.client()
            assert await one.say({"ask": "wait"}) == {"ok": True, "heeded": True}
            await other.say({"ask": "wait", "why": "compiling\x1b[2J"})
            assert "no reason given (while it is connected" in at.lines[0]
            assert "compiling\N{REPLACEMENT CHARACTER}[2J" in at.lines[1]
            at.clock.now = 1e9
            assert len(at.lines) == 2
            await one.say({"ask": "go on"})
            assert len(at.lines) == 1
            other.leave()
            await at.until(lambda: at.lines == ())

    go(scenario())


def test_an_owner_who_heeds_no_programs_is_not_hidden(tmp_path: Path):
    async def scenario() -> None:
        async with desk(tmp_path) as at:
            at.heeds = False
            client = await at.client()
            assert await client.say({"ask": "wait"}) == {"ok": True, "heeded": False}

    go(scenario())


@pytest.mark.parametrize(
    "request_",
    [
        b"",
        b"wait",
        b"[]",
        b"{}",
        b'{"ask": "stop"}',
        b'{"ask": "wait", "seconds": 0}',
        b'{"ask": "wait", "seconds": -1}',
        b'{"ask": "wait", "seconds": 1e9}',
        b'{"ask": "wait", "seconds": "long"}',
        b'{"ask": "wait", "why": "' + b"x" * 101 + b'"}',
        b'{"ask": "wait", "until": 3}',
        b"\xff\xfe",
        b"[" * 2000,
    ],
)
def test_what_is_no_request_is_answered_with_an_error(tmp_path: Path, request_: bytes):
    async def scenario() -> None:
        async with desk(tmp_path) as at:
            client = await at.client()
            answer = await client.say(request_)
            assert answer is not None
            assert answer["ok"] is False
            assert answer["error"].startswith("not a request: ")
            assert at.lines == ()
            assert await client.say({"ask": "status"})  # and the connection lives

    go(scenario())


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.lists(
        st.one_of(
            st.binary(max_size=300),
            st.dictionaries(
                st.sampled_from(["ask", "seconds", "why", "x"]),
                st.sampled_from(["wait", "status", "go on", "", 1, 0.5, 1e300, None, [], {}, True]),
                max_size=4,
            ).map(lambda d: json.dumps(d).encode() + b"\n"),
        ),
        max_size=6,
    )
)
def test_any_bytes_leave_it_serving(tmp_path_factory: pytest.TempPathFactory, parts: list[bytes]):
    async def scenario() -> None:
        async with desk(tmp_path_factory.mktemp("port")) as at:
            client = await at.client()
            client.writer.write(b"".join(parts))
            client.writer.write_eof()
            async with asyncio.timeout(20):
                told = (await client.reader.read()).splitlines()
            assert all(isinstance(json.loads(line)["ok"], bool) for line in told)
            await at.until(lambda: not at.port._clients)
            assert all("while it is connected" not in line for line in at.lines)
            assert len(at.lines) <= MAX_WAITS
            assert await (await at.client()).say({"ask": "status"})

    go(scenario())


def test_a_line_without_end_ends_its_connection(tmp_path: Path):
    async def scenario() -> None:
        async with desk(tmp_path) as at:
            client = await at.client()
            answer = await client.say(b"x" * (2 * MAX_LINE_BYTES))
            assert answer is None or "at most 4096 bytes" in answer["error"]
            await at.until(lambda: not at.port._clients)
            assert await (await at.client()).say({"ask": "status"})

    go(scenario())


def test_a_crowd_is_turned_away_and_makes_room(tmp_path: Path):
    async def scenario() -> None:
        async with desk(tmp_path) as at:
            crowd = [await at.client() for _ in range(MAX_CLIENTS)]
            for client in crowd:
                assert await client.say({"ask": "wait"})
            late = await at.client()
            told = json.loads(await late.reader.readline())
            assert told == {"ok": False, "error": "16 programs are connected already"}
            crowd[0].leave()
            await at.until(lambda: len(at.port._clients) < MAX_CLIENTS)
            assert await (await at.client()).say({"ask": "status"})

    go(scenario())


def test_who_comes_and_goes_leaves_room_at_once(tmp_path: Path):
    """A program that asks again and again does not keep the others out."""

    async def scenario() -> None:
        async with desk(tmp_path) as at:
            for _ in range(5 * MAX_CLIENTS):
                told = await asyncio.to_thread(lambda: ask(at.path, {"ask": "status"}))
                assert told == {"device": "pi-1"}

    go(scenario())


def test_waits_are_bounded(tmp_path: Path):
    async def scenario() -> None:
        async with desk(tmp_path) as at:
            client = await at.client()
            for _ in range(MAX_WAITS):
                assert (await client.say({"ask": "wait", "seconds": 60}))["ok"]  # type: ignore[index]
            answer = await client.say({"ask": "wait", "seconds": 60})
            assert answer == {"ok": False, "error": "too many programs ask to wait already"}
            at.clock.now = 60.0
            assert (await client.say({"ask": "wait", "seconds": 60}))["ok"]  # type: ignore[index]

    go(scenario())


def test_who_says_nothing_is_hung_up_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(local_port, "IDLE_S", 0.05)

    async def scenario() -> None:
        async with desk(tmp_path) as at:
            idle, waiting = await at.client(), await at.client()
            await waiting.say({"ask": "wait"})
            async with asyncio.timeout(20):
                assert await idle.reader.read() == b""
            await asyncio.sleep(0.2)
            assert await waiting.say({"ask": "status"})  # whoever waits may be silent

    go(scenario())


def test_who_takes_no_answers_is_hung_up_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(local_port, "ANSWER_S", 0.1)
    monkeypatch.setattr(local_port, "PAUSE_S", 0.0)

    async def scenario() -> None:
        async with desk(tmp_path) as at:
            at.port._answers["status"] = _large
            with socket.socket(socket.AF_UNIX) as client:
                client.setblocking(False)
                client.connect(os.fspath(at.path))
                client.send(b'{"ask":"status"}\n' * 100)
                await at.until(lambda: bool(at.port._clients))
                await at.until(lambda: not at.port._clients)
            assert await (await at.client()).say({"ask": "explain"})

    go(scenario())


async def _large() -> Any:
    return "x" * 1_000_000


def test_an_answer_that_fails_ends_one_connection(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    async def failing() -> Any:
        raise RuntimeError("a sensor exploded")

    async def scenario() -> None:
        async with desk(tmp_path) as at:
            at.port._answers["status"] = failing
            assert await (await at.client()).say({"ask": "status"}) is None
            assert await (await at.client()).say({"ask": "explain"})

    go(scenario())
    assert "the service goes on" in caplog.text


# -- the file --------------------------------------------------------------------------------------


def test_a_socket_that_nobody_serves_is_replaced_and_one_that_is_served_is_not(tmp_path: Path):
    async def scenario() -> None:
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(os.fspath(tmp_path / FILE))
        async with desk(tmp_path) as at:
            with pytest.raises(ConfigError, match=f"another covey-device serves {at.path}"):
                await at.another().open()
            assert await (await at.client()).say({"ask": "status"})
        assert not at.path.exists()

    go(scenario())


def test_what_is_no_socket_is_left_alone(tmp_path: Path):
    (tmp_path / FILE).write_text("mine")
    with pytest.raises(ConfigError, match="is no socket"):
        go(Desk(tmp_path).port.open())
    assert (tmp_path / FILE).read_text() == "mine"


def test_a_socket_that_is_another_s_by_now_is_not_removed(tmp_path: Path):
    async def scenario() -> None:
        async with desk(tmp_path) as at:
            at.path.unlink()
            at.path.write_text("another's")
        assert at.path.read_text() == "another's"

    go(scenario())


def test_a_directory_with_a_long_name(tmp_path: Path):
    deep = tmp_path / ("d" * 100) / ("e" * 100)
    deep.mkdir(parents=True)

    async def scenario() -> None:
        made = Desk(deep)
        await made.port.open()
        assert await asyncio.to_thread(lambda: ask(made.path, {"ask": "status"})) == {
            "device": "pi-1"
        }
        with pytest.raises(ConfigError, match="another covey-device serves"):
            await made.another().open()
        await made.port.close()
        assert list(deep.iterdir()) == []

    go(scenario())


def test_where_it_cannot_be_made(tmp_path: Path):
    with pytest.raises(StorageError, match="cannot make the local socket"):
        go(Desk(tmp_path / "gone").port.open())


def test_asking(tmp_path: Path):
    assert ask(tmp_path / FILE, {"ask": "status"}) is None

    async def scenario() -> None:
        async with desk(tmp_path) as at:
            with pytest.raises(LocalProtocolError, match="not a request"):
                await asyncio.to_thread(lambda: ask(at.path, {"ask": "nonsense"}))

    go(scenario())
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(os.fspath(tmp_path / FILE))
    assert ask(tmp_path / FILE, {"ask": "status"}) is None


def test_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("RUNTIME_DIRECTORY", raising=False)
    assert directory_of(tmp_path) == tmp_path
    monkeypatch.setenv("RUNTIME_DIRECTORY", "/run/covey-device:/run/other")
    assert directory_of(tmp_path) == Path("/run/covey-device")


def test_a_veto_file_of_any_kind(tmp_path: Path):
    assert file_line(None) is None
    assert file_line(tmp_path / "veto") is None
    (tmp_path / "veto").symlink_to("nowhere")
    assert file_line(tmp_path / "veto") == (
        f"{tmp_path / 'veto'} is there; paused until it is removed (host.veto_file)"
    )
    assert file_line(Path("a\0b")) is None
