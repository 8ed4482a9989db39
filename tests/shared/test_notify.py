"""What a supervisor hears, on real sockets; and that nothing of it can hurt the service."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from covey_shared import notify
from covey_shared.notify import MAX_STATUS, Notifier


@pytest.fixture(params=["path", "abstract"])
def supervisor(
    request: pytest.FixtureRequest, tmp_path: Path
) -> Iterator[tuple[str, socket.socket]]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        if request.param == "path":
            address = str(tmp_path / "notify")
            listening.bind(address)
        else:
            address = f"@covey-test-{os.getpid()}-{tmp_path.name}"
            listening.bind(f"\0{address[1:]}")
        listening.settimeout(5)
        yield address, listening


def test_each_word_is_one_datagram_in_systemds_spelling(supervisor):
    address, heard = supervisor
    notifier = Notifier.of({"NOTIFY_SOCKET": address}, pid=1)
    assert notifier.listens
    notifier.ready()
    notifier.alive()
    notifier.reloading(1234567)
    notifier.status("waits for a round")
    notifier.stopping()
    assert [heard.recv(4096) for _ in range(5)] == [
        b"READY=1",
        b"WATCHDOG=1",
        b"RELOADING=1\nMONOTONIC_USEC=1234567",
        b"STATUS=waits for a round",
        b"STOPPING=1",
    ]


def test_a_status_is_said_once_and_again_when_it_changes(supervisor):
    address, heard = supervisor
    notifier = Notifier(address)
    for line in ("idle", "idle", "trains", "idle"):
        notifier.status(line)
    notifier.ready()
    said = [heard.recv(4096) for _ in range(4)]
    assert said == [b"STATUS=idle", b"STATUS=trains", b"STATUS=idle", b"READY=1"]


@given(st.text(max_size=1000))
def test_no_status_brings_an_assignment_of_its_own(line: str):
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with ours, theirs, pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            notify.socket.socket, "sendto", lambda _, data, address: ours.send(data), raising=False
        )
        Notifier("/nowhere").status("x" + line)
        said = theirs.recv(1 << 16).decode()
    assert said.startswith("STATUS=x")
    assert not set(said) & set("\n\r\0")
    assert len(said) <= len("STATUS=") + MAX_STATUS


@pytest.mark.parametrize(
    "address",
    [None, "", "relative", "vsock:2:1234", "/does/not/exist", "/nul\0inside", "/" + "x" * 200],
)
def test_without_a_supervisor_nothing_happens(address: str | None):
    notifier = Notifier(address, watchdog_s=None)
    notifier.ready()
    notifier.status("on")
    notifier.alive()
    notifier.reloading(1)
    notifier.stopping()


def test_a_status_that_nobody_took_is_said_again(tmp_path: Path):
    address = str(tmp_path / "late")
    notifier = Notifier(address)
    notifier.status("on")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as heard:
        heard.bind(address)
        heard.settimeout(5)
        notifier.status("on")
        assert heard.recv(100) == b"STATUS=on"


def test_a_supervisor_that_never_reads_holds_nobody_up_for_long(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(notify, "SEND_S", 0.01)
    address = str(tmp_path / "full")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as heard:
        heard.bind(address)
        notifier = Notifier(address)
        for _ in range(2000):  # many more than any queue holds; it would block on the first beyond
            if not notifier._send("WATCHDOG=1"):
                return
    pytest.fail("the queue never got full")


@pytest.mark.parametrize(
    ("environment", "watchdog_s"),
    [
        ({"WATCHDOG_USEC": "300000000"}, 300.0),
        ({"WATCHDOG_USEC": "300000000", "WATCHDOG_PID": "7"}, 300.0),
        ({"WATCHDOG_USEC": "300000000", "WATCHDOG_PID": "8"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "-5"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
        ({"WATCHDOG_USEC": "9" * 40}, None),
        ({}, None),
    ],
)
def test_a_watchdog_is_fed_only_where_it_is_meant_for_this_process(environment, watchdog_s):
    assert Notifier.of({"NOTIFY_SOCKET": "/run/n"} | environment, pid=7).watchdog_s == watchdog_s
    assert Notifier.of(environment, pid=7).watchdog_s is None
