"""docs/security.md: its tables are what is on the disk, and its commands do what it says."""

import re
import shlex
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from covey_coordinator.broker import running
from covey_coordinator.cli import main
from covey_coordinator.config import BrokerConfig, load_fleet
from covey_coordinator.devices import DeviceRecord
from covey_coordinator.fleet import FleetDirectory
from covey_coordinator.kept_broker import broker_of
from covey_coordinator.plans.signing import make_owner_key
from covey_device.cli import main as device_main
from covey_shared.keys import SigningKey
from covey_shared.messages import DeviceId
from mqtt_clients import run
from watched_fleet import DEVICES, lived

PAGE = Path(__file__).parents[2] / "docs" / "security.md"
TEXT = PAGE.read_text()

# A private key in PEM or as a seed, or a password: what the tables must not miss.
SEED = re.compile(rb"[0-9a-f]{64}\n")


def rows(heading: str) -> dict[str, int]:
    """File -> mode, of the tables in one section."""
    section = TEXT.split(f"\n### {heading}\n")[1].split("\n### ")[0].split("\n## ")[0]
    found = re.findall(r"^\|[^|]+\| `([^`|]+)` \| (0\d{3}) \|", section, re.MULTILINE)
    assert len(found) == len([line for line in section.splitlines() if re.search(r"\| 0\d", line)])
    return {name: int(mode, 8) for name, mode in found}


def matching(pattern: str) -> re.Pattern[str]:
    """Words in capitals stand for any name."""
    parts = re.split(r"\b([A-Z]+)\b", pattern)
    return re.compile("".join("[^/]+" if i % 2 else re.escape(p) for i, p in enumerate(parts)))


def is_secret(path: Path) -> bool:
    data = path.read_bytes()
    seed = SEED.fullmatch(data) is not None and path.suffix != ".pub"
    return seed or b"PRIVATE KEY" in data or path.suffix in (".password", ".key")


def check(base: Path, tables: dict[str, int], *, without: tuple[str, ...] = ()) -> set[str]:
    """Hold what is in `base` against the tables -> the entries that were found.

    Every file that an entry names has its mode, and every file that only its owner may read, or that
    looks like a secret, is named by one.
    """
    found = set()
    for path in base.rglob("*"):
        name = str(path.relative_to(base))
        if not path.is_file() or name.startswith(without):
            continue
        mode = path.stat().st_mode & 0o777
        named = [pattern for pattern in tables if matching(pattern).fullmatch(name)]
        found |= set(named)
        # the first that names it: what comes later is about the rest
        if named:
            assert mode == tables[named[0]], name
        assert named or not (is_secret(path) or mode & 0o077 == 0), f"{name} is not in the table"
    return found


def test_the_coordinators_machine_is_as_the_page_says(tmp_path_factory: pytest.TempPathFactory):
    watched, _ = lived(tmp_path_factory)
    fleet, tables = watched.fleet, rows("On the coordinator's machine")
    fleet.revoke(DEVICES[0], int(time.time()))
    assert check(fleet.path, tables) == set(tables)
    for directory in ("ca", "tls", "tokens", "broker", "broker/run", f"devices/{DEVICES[0]}"):
        assert (fleet.path / directory).stat().st_mode & 0o777 == 0o700, directory


def test_a_device_is_as_the_page_says(tmp_path_factory: pytest.TempPathFactory):
    watched, _ = lived(tmp_path_factory)
    tables = rows("On a device")
    for name in DEVICES:
        assert check(watched.path / name, tables) == set(tables)
        for directory in (watched.path / name).glob("enrolment-*"):
            assert directory.stat().st_mode & 0o777 == 0o700


def test_a_local_fleet_is_as_the_page_says(tmp_path: Path):
    fleet = FleetDirectory.create(
        tmp_path / "fleet", "farm", BrokerConfig(port=running._free_port())
    )
    fleet.add_device("pi-1", days=1, data=None)

    async def scenario() -> None:
        async with broker_of(fleet, load_fleet(fleet.path)):
            pass

    run(scenario())
    local, elsewhere = rows("A local fleet"), rows("On the coordinator's machine")
    found = check(fleet.path, local | elsewhere)
    assert set(local) <= found


def test_what_is_missing_in_a_table_is_noticed(tmp_path: Path):
    (tmp_path / "a.txt").write_text("x")
    assert check(tmp_path, {}) == set()
    for name, text, mode in (
        ("new.key", "x", 0o644),
        ("plain", "0" * 64 + "\n", 0o644),
        ("pem", "-----BEGIN PRIVATE KEY-----", 0o644),
        ("private", "x", 0o600),
    ):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(mode)
        with pytest.raises(AssertionError, match=f"{name} is not in the table"):
            check(tmp_path, {})
        assert check(tmp_path, {name: mode}) == {name}
        with pytest.raises(AssertionError):
            check(tmp_path, {name: 0o640})
        (tmp_path / name).unlink()


def test_the_model_owners_key_is_as_the_page_says(tmp_path: Path):
    make_owner_key(tmp_path / "owner.key", bytes(range(32)))
    assert (tmp_path / "owner.key").stat().st_mode & 0o777 == 0o600


def test_what_is_removed_is_made_anew_with_another_key(tmp_path: Path):
    """Of the broker and the coordinator: the page says to remove the certificate alone."""
    fleet = FleetDirectory.create(
        tmp_path / "fleet", "farm", BrokerConfig(), addresses=("127.0.0.1",)
    )
    for name in ("server", "coordinator"):
        assert f"remove `tls/{name}.crt`" in TEXT
        before = fleet.tls.read(f"{name}.key")
        (fleet.tls.path / f"{name}.crt").unlink()
        fleet.refresh_tls(load_fleet(fleet.path), int(time.time()))
        assert fleet.tls.read(f"{name}.key") != before


def test_the_commands_do_what_the_page_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """In their order, in one directory: carrying files is copying them. The device is a record."""
    monkeypatch.chdir(tmp_path)
    commands = [
        shlex.split(line)
        for block in re.findall(r"```sh\n(.*?)```", TEXT, re.DOTALL)
        for line in block.splitlines()
    ]
    names = [" ".join(command[:3]) for command in commands]
    assert names == [
        *("covey ca init", "covey init home", "covey ca requests", "covey ca sign"),
        *("covey ca import", "covey device revoke", "covey device token"),
    ]
    identity = SigningKey(bytes(32)).public
    home = FleetDirectory(tmp_path / "home")
    for command in commands:
        if command[:3] == ["covey", "init", "home"]:
            (tmp_path / "ca.pub").write_bytes((tmp_path / "home-ca" / "ca.pub").read_bytes())
        if command[1:3] == ["ca", "requests"]:
            record = DeviceRecord(
                device=DeviceId("pi-1"),
                identity=identity.hex(),
                enrolled_unix=int(time.time()),
                requested_unix=int(time.time()),
            )
            with home.book.changing():
                home.book.save(record)
        key = (home.path / "coordinator.pub").read_text().strip() if home.path.exists() else ""
        arguments = [key if word == "KEY" else word for word in command[1:]]
        done = CliRunner().invoke(main, arguments, input="y\n")
        assert done.exit_code == 0, (command, done.output)
        if command[1:3] == ["ca", "sign"]:
            assert "pi-1" in done.output
        if command[1:3] == ["ca", "import"]:
            (entry,) = home.devices()
            assert entry.status(time.time()) == "active"
            assert not (home.path / "ca" / "ca.key").exists()
        if command[1:3] == ["device", "revoke"]:
            assert home.revoked_names() == ("pi-1",)


def test_every_command_and_option_on_the_page_is_there():
    for program, name in re.findall(r"`(covey(?:-device)?) ([a-z]+(?: [a-z-]+)?)", TEXT):
        command = main if program == "covey" else device_main
        for word in name.split():
            if not hasattr(command, "get_command"):
                break
            found = command.get_command(None, word)  # type: ignore[arg-type]
            assert found is not None, f"{program} {name}"
            command = found


def test_every_link_leads_somewhere():
    for target, heading in re.findall(r"\]\(([\w./-]+)(?:#([\w-]+))?\)", TEXT):
        page = PAGE.parent / target
        assert page.exists(), target
        assert not heading or heading in page.read_text().lower().replace(" ", "-")
