"""What a device's owner sees of `covey-device`, without a broker."""

import re
import shutil
import tomllib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tomli_w
from click.testing import CliRunner, Result

from covey_coordinator.config import BrokerConfig
from covey_coordinator.fleet import FleetDirectory
from covey_device.cli import main
from covey_device.keystore import MemoryFile, certificate_end, load_identity
from covey_device.session import Memory
from covey_device.tls import in_words
from covey_shared.keys import SigningKey, in_groups

CoveyDevice = Callable[..., Result]


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A device's directory, as it was copied to it."""
    fleet = FleetDirectory.create(tmp_path / "fleet", "farm", BrokerConfig())
    np.savez(tmp_path / "data.npz", features=np.zeros(1), labels=np.zeros(1))
    return fleet.add_device("pi-1", days=30, data=tmp_path / "data.npz")


@pytest.fixture
def covey_device(home: Path, monkeypatch: pytest.MonkeyPatch) -> CoveyDevice:
    """Runs a command in the device's directory, and holds every error to one line."""
    monkeypatch.chdir(home)
    # Of the test's own process neither is to be changed.
    monkeypatch.setattr("covey_device.footprint.keep_small", lambda: None)
    monkeypatch.setattr("covey_device.cli.os.umask", lambda mask: 0)

    def run(*arguments: str) -> Result:
        result = CliRunner().invoke(main, arguments)
        assert "Traceback" not in result.output
        assert result.exception is None or isinstance(result.exception, SystemExit)
        if result.exit_code == 1:
            assert re.fullmatch(r"covey-device: [^\n]+\n", result.stderr), result.stderr
        return result

    return run


def failed(result: Result) -> str:
    assert result.exit_code == 1
    return result.stderr.removeprefix("covey-device: ").removesuffix("\n")


def check(covey_device: CoveyDevice) -> Result:
    return covey_device("check", "--config", "device.toml")


def change(home: Path, **tables: dict[str, object]) -> None:
    """Edit device.toml."""
    table = tomllib.loads((home / "device.toml").read_text())
    for name, changes in tables.items():
        table[name] = table.get(name, {}) | changes
    (home / "device.toml").write_text(tomli_w.dumps(table))


def test_a_sound_device(covey_device: CoveyDevice, home: Path):
    MemoryFile(home / "state").save(Memory(41))
    result = check(covey_device)
    assert result.exit_code == 0
    identity = load_identity(home / "identity.key").public
    ca = FleetDirectory(home.parents[1]).trust.ca
    ends = certificate_end((home / "certificate").read_bytes())
    lines = result.stdout.splitlines()
    assert lines[:6] == [
        "device pi-1 of fleet farm",
        f"identity: {in_groups(identity)}",
        f"fleet CA: {in_groups(ca)}",
        "broker: mqtt://127.0.0.1:1883",
        f"identity certificate: until {in_words(ends)}",
        "last round: 41",
    ]
    assert lines[-1] == (
        "configuration, identity, certificate, state and data files are there and sound"
    )


def test_the_policy_that_holds_is_shown(covey_device: CoveyDevice, home: Path):
    lines = check(covey_device).stdout.splitlines()
    at = lines.index("policy: the defaults")
    assert lines[at + 1] == "  takes part in sums of at least 3 devices"
    policy = home / "policy.toml"
    policy.write_text(f'rounds_per_day = 24\nowners = ["{"ab" * 32}"]\n')
    lines = check(covey_device).stdout.splitlines()
    at = lines.index("policy: policy.toml")
    assert "  joins at most 24 rounds a day" in lines[at:]
    assert "  runs only plans signed by abababababababab..." in lines[at:]
    assert policy.read_text().startswith("rounds_per_day = 24\n")  # its owner's own


def test_a_password_in_the_url_is_not_shown(covey_device: CoveyDevice, home: Path):
    change(home, broker={"url": "mqtt://me:hunter2@broker.lan"})
    result = check(covey_device)
    assert "broker: mqtt://broker.lan:1883" in result.stdout
    assert "hunter2" not in result.output


def policy_typo(home: Path) -> None:
    (home / "policy.toml").write_text("[limits]\nmax_memory = 100\n")


def other_policy(home: Path) -> None:
    text = (home / "device.toml").read_text()
    (home / "device.toml").write_text('policy = "mine.toml"\n' + text)


def break_key(home: Path) -> None:
    (home / "identity.key").write_text("zz" * 32)


def open_key(home: Path) -> None:
    (home / "identity.key").chmod(0o644)


def other_key(home: Path) -> None:
    (home / "identity.key").write_text(SigningKey(bytes(32)).seed.hex())


def other_certificate(home: Path) -> None:
    fleet = FleetDirectory(home.parents[1])
    shutil.copy(fleet.add_device("pi-2", days=1, data=None) / "certificate", home)


def no_password(home: Path) -> None:
    (home / "broker.password").unlink()


def torn_memory(home: Path) -> None:
    MemoryFile(home / "state").save(Memory(41))
    (home / "state" / "memory.json").write_bytes(b'{"last_round": 4')


def no_data(home: Path) -> None:
    change(home, data={"file": "gone.npz"})


def typo(home: Path) -> None:
    change(home, broker={"keepalive": 100})


def no_config(home: Path) -> None:
    (home / "device.toml").unlink()


PROBLEMS: dict[Callable[[Path], None], str] = {
    no_config: "device.toml does not exist; `covey-device join TOKEN` writes one (for a device on the "
    "coordinator's own machine, `covey device add NAME`)",
    typo: "device.toml: unknown key `broker.keepalive`; did you mean `broker.keepalive_s`?",
    policy_typo: "policy.toml: unknown key `limits.max_memory`; did you mean `limits.max_memory_mb`?",
    other_policy: "mine.toml does not exist; key `policy` of device.toml names it: write one, or "
    "remove the key",
    break_key: "identity key identity.key is not 64 hexadecimal digits",
    open_key: "identity key identity.key can be read by others (mode 0644); "
    "run: chmod 600 identity.key",
    other_key: "certificate certificate is for another identity key; "
    "use the two that belong together",
    other_certificate: "certificate certificate is for pi-2 in fleet farm, this is pi-1 in fleet farm; "
    "use its own",
    no_password: "broker.password_file broker.password cannot be read: No such file or directory",
    torn_memory: "state/memory.json is damaged (Input data was truncated); restore it, or enrol this "
    "device anew under another name",
    no_data: "key `data.file`: gone.npz does not exist: put it there, or correct [data]",
}


@pytest.mark.parametrize("damage", PROBLEMS, ids=lambda damage: damage.__name__)
def test_what_is_wrong_is_one_line(
    covey_device: CoveyDevice, home: Path, damage: Callable[[Path], None]
):
    damage(home)
    assert failed(check(covey_device)) == PROBLEMS[damage]
    if damage is not no_data:  # data may come later, everything else may not
        assert failed(covey_device("run", "--config", "device.toml")) == PROBLEMS[damage]


def test_twice_is_once_too_often(covey_device: CoveyDevice, home: Path):
    with MemoryFile(home / "state").held():
        assert failed(covey_device("run", "--config", "device.toml")) == (
            "another covey-device runs with state; stop it first"
        )


def test_help_is_short_enough_to_read(covey_device: CoveyDevice):
    top = covey_device("--help").stdout
    assert re.search(r"^  check +Check the configuration and what it names\.$", top, re.MULTILINE)
    assert re.search(r"^  run +Serve until stopped\.$", top, re.MULTILINE)
    assert re.search(
        r"^  join +Join a fleet, with a token of its coordinator\.$", top, re.MULTILINE
    )
    for command in ("check", "renew", "run"):
        text = covey_device(command, "-h").stdout
        assert text.startswith(f"Usage: covey-device {command} [OPTIONS]")
        assert max(map(len, text.splitlines())) <= 80


def test_a_bug_is_one_line_too(covey_device: CoveyDevice, monkeypatch: pytest.MonkeyPatch):
    def load(path: Path) -> None:
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr("covey_device.assembly.load_device", load)
    assert failed(check(covey_device)).startswith("unexpected ZeroDivisionError: division by zero.")
    monkeypatch.setenv("COVEY_DEBUG", "1")
    result = CliRunner().invoke(main, ["check", "--config", "device.toml"])
    assert isinstance(result.exception, ZeroDivisionError)
