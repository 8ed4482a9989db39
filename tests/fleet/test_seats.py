"""Seats whose devices do not even start."""

import asyncio
import os
from pathlib import Path

from covey_device.data import NpzData
from covey_fleet.device import DeviceSpec
from covey_fleet.seats import ProcessSeat, start_fork_server
from covey_shared import keys
from covey_shared.mqtt import parse_broker_url
from covey_shared.secagg.cohort import Trust
from small_fleet import device_names, go, script


def unusable(directory: Path) -> DeviceSpec:
    """A device whose state directory cannot be made."""
    (directory / "file").touch()
    public = keys.SigningKey(os.urandom(32)).public
    return DeviceSpec(
        trust=Trust("f", public, public),
        device=device_names(1)[0],
        identity_seed=os.urandom(32),
        certificate=b"",
        broker=parse_broker_url("mqtt://127.0.0.1:1"),
        username=None,
        password=None,
        directory=directory / "file",
        data=NpzData(file="data.npz"),
        faults=script({}),
        witness=None,
    )


def test_a_process_that_never_starts_is_given_up_with_its_last_words(tmp_path: Path) -> None:
    async def scenario() -> None:
        failure = asyncio.get_running_loop().create_future()
        seat = ProcessSeat(
            unusable(tmp_path), lambda vanished: None, failure.set_result, tmp_path / "log"
        )
        start_fork_server()
        await seat.start()
        error = await failure
        assert "the process of pi-1 does not start (exit status 1)" in str(error)
        assert "last words: covey_shared.errors.StorageError: cannot make" in str(error)
        assert seat.pid is None
        await seat.close()

    go(scenario())
    assert (tmp_path / "log").read_text().count("cannot make the state directory") == 3


def test_secrets_are_not_shown(tmp_path: Path) -> None:
    spec = unusable(tmp_path)
    assert repr(spec) == "<device pi-1 of fleet f>"
