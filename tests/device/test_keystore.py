"""What a device keeps: keys that others can read are refused, and nothing is ever half written."""

import errno
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import covey_device.files
import covey_device.keystore
from covey_device.keystore import MemoryFile, load_certificate, load_identity
from covey_device.memory import MAX_CONTRIBUTIONS
from covey_device.session import Memory
from covey_shared import wire
from covey_shared.errors import ConfigError, StorageError
from covey_shared.keys import SigningKey
from covey_shared.messages import Certificate, DeviceId

SEED = bytes(range(32))
KEY, CA = SigningKey(SEED), SigningKey(bytes(32))


def identity_file(tmp_path: Path, text: str = SEED.hex() + "\n", mode: int = 0o600) -> Path:
    path = tmp_path / "identity.key"
    path.write_text(text)
    path.chmod(mode)
    return path


# -- keys ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [0o600, 0o400])
def test_an_identity_is_read(tmp_path: Path, mode: int):
    assert load_identity(identity_file(tmp_path, mode=mode)).public == KEY.public


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o660, 0o601])
def test_a_key_that_others_can_read_is_refused(tmp_path: Path, mode: int):
    path = identity_file(tmp_path, mode=mode)
    with pytest.raises(ConfigError) as caught:
        load_identity(path)
    assert str(caught.value) == (
        f"identity key {path} can be read by others (mode {mode:04o}); run: chmod 600 {path}"
    )


@pytest.mark.parametrize(
    "text", ["", "ab", "zz" * 32, SEED.hex() + "00", f"{SEED.hex()}\n{SEED.hex()}"]
)
def test_what_is_no_key_is_refused_and_not_shown(tmp_path: Path, text: str):
    with pytest.raises(ConfigError, match="is not 64 hexadecimal digits") as caught:
        load_identity(identity_file(tmp_path, text))
    assert not text or text not in str(caught.value)


def test_a_key_that_is_not_there_is_named(tmp_path: Path):
    path = tmp_path / "none.key"
    with pytest.raises(ConfigError) as caught:
        load_identity(path)
    assert str(caught.value) == (
        f"identity key {path} cannot be read: No such file or directory; `covey-device join` makes one"
    )


def test_a_key_that_is_not_text(tmp_path: Path):
    path = identity_file(tmp_path)
    path.write_bytes(b"\xff" * 64)
    with pytest.raises(ConfigError, match=r"identity\.key cannot be read: it is not UTF-8 text"):
        load_identity(path)


# -- certificates ----------------------------------------------------------------------------------


def certificate_file(tmp_path: Path, fleet: str = "farm", device: str = "pi-1") -> Path:
    certificate = Certificate(fleet, DeviceId(device), KEY.public, 0, 2**31)
    path = tmp_path / "certificate"
    path.write_bytes(wire.sign(certificate, CA).envelope)
    return path


def test_a_certificate_is_read(tmp_path: Path):
    path = certificate_file(tmp_path)
    read = load_certificate(path, CA.public, "farm", "pi-1", KEY.public)
    assert read == path.read_bytes()


@pytest.mark.parametrize(
    ("fleet", "device", "problem"),
    [
        ("other", "pi-1", "is for pi-1 in fleet other, this is pi-1 in fleet farm"),
        ("farm", "pi-2", "is for pi-2 in fleet farm, this is pi-1 in fleet farm"),
    ],
)
def test_another_s_certificate_is_refused(tmp_path: Path, fleet: str, device: str, problem: str):
    path = certificate_file(tmp_path, fleet, device)
    with pytest.raises(ConfigError) as caught:
        load_certificate(path, CA.public, "farm", "pi-1", KEY.public)
    assert problem in str(caught.value)


def test_a_certificate_for_another_key_is_refused(tmp_path: Path):
    path = certificate_file(tmp_path)
    with pytest.raises(ConfigError, match="is for another identity key"):
        load_certificate(path, CA.public, "farm", "pi-1", CA.public)


def test_a_certificate_of_another_authority_is_refused(tmp_path: Path):
    path = certificate_file(tmp_path)
    with pytest.raises(ConfigError, match=r"is \[trust\]\.fleet_ca right\?"):
        load_certificate(path, KEY.public, "farm", "pi-1", KEY.public)


@pytest.mark.parametrize("data", [b"", b"garbage", bytes(200)])
def test_what_is_no_certificate_is_refused(tmp_path: Path, data: bytes):
    path = tmp_path / "certificate"
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=f"certificate {path}: "):
        load_certificate(path, CA.public, "farm", "pi-1", KEY.public)


def test_a_certificate_that_is_not_there(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"cannot be read: No such file or directory"):
        load_certificate(tmp_path / "certificate", CA.public, "farm", "pi-1", KEY.public)


# -- memory ----------------------------------------------------------------------------------------


def test_a_new_device_remembers_nothing(tmp_path: Path):
    assert MemoryFile(tmp_path / "state").load() == Memory()


MODELS = st.dictionaries(st.binary(min_size=32, max_size=32).map(bytes.hex), st.integers(0, 65535))


@settings(deadline=None)  # it waits for the disk
@given(last_round=st.integers(0, 2**53), contributed=MODELS)
def test_what_was_saved_is_loaded(
    tmp_path_factory: pytest.TempPathFactory, last_round: int, contributed: dict[str, int]
):
    file = MemoryFile(tmp_path_factory.mktemp("state"))
    file.save(Memory(last_round, contributed))
    assert file.load() == Memory(last_round, contributed)


def test_state_is_the_owner_s_alone_whatever_the_umask(tmp_path: Path):
    before = os.umask(0)
    try:
        MemoryFile(tmp_path / "state").save(Memory(1))
    finally:
        os.umask(before)
    assert (tmp_path / "state").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "state" / "memory.json").stat().st_mode & 0o777 == 0o600


def test_the_newest_contributions_are_kept(tmp_path: Path):
    file = MemoryFile(tmp_path)
    contributed = {f"{i:064x}": 0 for i in range(MAX_CONTRIBUTIONS + 5)}
    file.save(Memory(7, contributed))
    assert list(file.load().contributed) == list(contributed)[5:]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"\xff",
        b"[]",
        b'{"last_round": 1}',
        b'{"last_round": -1, "contributed": {}}',
        b'{"last_round": 1.5, "contributed": {}}',
        b'{"last_round": 1, "contributed": {"a": -1}}',
        b'{"last_round": 1, "contributed": {}, "more": 1}',
        b'{"last_round": 1, "contributed": ' + b"[" * 100_000,
    ],
)
def test_damaged_memory_is_refused_rather_than_forgotten(tmp_path: Path, data: bytes):
    (tmp_path / "memory.json").write_bytes(data)
    with pytest.raises(StorageError, match=r"memory\.json is damaged \(") as caught:
        MemoryFile(tmp_path).load()
    assert "restore it, or enrol this device anew under another name" in str(caught.value)


class Crash(BaseException):
    """The power goes."""


def test_a_power_cut_leaves_the_old_memory_or_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Crash at every call that touches the disk, one after the other."""
    calls = ["unlink", "open", "write", "fsync", "replace", "close"]
    file = MemoryFile(tmp_path)
    outcomes = set()
    for at in range(20):
        file.save(Memory(1, {"aa": 1}))
        left = [at]

        def crash(name: str, left: list[int] = left) -> None:
            left[0] -= 1
            if left[0] == -1:
                raise Crash

        with monkeypatch.context() as patch:
            for name in calls:
                real = getattr(os, name)
                patch.setattr(
                    covey_device.keystore.os,
                    name,
                    lambda *a, real=real, name=name, **k: (crash(name), real(*a, **k))[1],
                )
            try:
                file.save(Memory(2, {"aa": 2}))
            except Crash:
                pass
            else:
                break
        loaded = MemoryFile(tmp_path).load()
        outcomes.add(loaded.last_round)
        assert loaded in (Memory(1, {"aa": 1}), Memory(2, {"aa": 2}))
    else:
        pytest.fail("it never got through")
    assert 1 in outcomes
    assert MemoryFile(tmp_path).load() == Memory(2, {"aa": 2})


@pytest.mark.parametrize("name", ["write", "fsync"])
def test_a_full_disk_keeps_the_old_memory_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
):
    file = MemoryFile(tmp_path)
    file.save(Memory(1))

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(covey_device.keystore.os, name, full)
        with pytest.raises(StorageError) as caught:
            file.save(Memory(2))
    assert str(caught.value) == (
        f"cannot write {tmp_path / 'memory.json'}: No space left on device; free some space, or "
        "check its owner"
    )
    assert MemoryFile(tmp_path).load() == Memory(1)
    assert os.listdir(tmp_path) == ["memory.json"]  # noqa: PTH208
    file.save(Memory(3))
    assert file.load() == Memory(3)


def test_what_a_process_acts_on_no_power_cut_takes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    MemoryFile(tmp_path).save(Memory(last_round=7))
    synced = []
    real = os.fsync

    def fsync(fd: int) -> None:
        synced.append(os.fstat(fd).st_ino)
        real(fd)

    monkeypatch.setattr(covey_device.files.os, "fsync", fsync)
    # Whoever saved it may have been killed before its name was synced.
    assert MemoryFile(tmp_path).load().last_round == 7
    assert tmp_path.stat().st_ino in synced


def test_a_state_directory_that_cannot_be(tmp_path: Path):
    (tmp_path / "state").write_text("a file")
    with pytest.raises(StorageError, match=r"cannot make the state directory .*: File exists"):
        MemoryFile(tmp_path / "state")


def test_a_state_directory_is_one_process_s_own(tmp_path: Path):
    """Two devices of one identity would each forget what the other did."""
    file = MemoryFile(tmp_path)
    with file.held():
        with (
            pytest.raises(ConfigError, match=r"another covey-device runs with .*; stop it first"),
            MemoryFile(tmp_path).held(),
        ):
            pass
        file.save(Memory(1))
    with MemoryFile(tmp_path).held():
        assert file.load() == Memory(1)
