"""The service is put into a machine's tree and taken away again, by systemd's own tools."""

import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner, Result

from covey_device import config as configuration
from covey_device.ceiling import CONTROLLER_FIX
from covey_device.cli import main
from covey_device.installation import commands, service
from covey_device.installation.joining import join
from covey_device.installation.machine import (
    Machine,
    MachineError,
    acting_as,
    acting_as_root,
    remove,
    run_program,
)
from covey_shared.errors import CoveyError
from enrolment_lab import Lab
from fake_machine import Tools, contents, fake_machine

COMMAND = Path("/opt/covey/bin/covey-device")
WANTED = "etc/systemd/system/multi-user.target.wants/covey-device.service"
UNIT = "etc/systemd/system/covey-device.service"


@pytest.fixture
def root() -> Iterator[Path]:
    """A tree that every user may walk through: files in it belong to several."""
    directory = Path(tempfile.mkdtemp(prefix="covey-root-"))
    directory.chmod(0o755)
    yield directory
    shutil.rmtree(directory)


@pytest.fixture
def tools(root: Path) -> Tools:
    return fake_machine(root)[1]


@pytest.fixture
def machine(root: Path, tools: Tools) -> Machine:
    return Machine(root, tools, lambda: True)


@pytest.fixture
def own(root: Path) -> Machine:
    """One where the service's user is the test's own: a fleet's coordinator runs in this process too, and
    has to read its files. With users of their own: tests/house/test_booted_machine.py."""
    return fake_machine(root, played=True)[0]


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with Lab(tmp_path_factory.mktemp("fleet") / "farm") as running:
        yield running


@pytest.fixture(autouse=True)
def reachable(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The tree of a test lies in /tmp, which no service sees, and its Python perhaps in a home."""
    monkeypatch.setattr(service, "UNREACHABLE", ("/nowhere/",))
    before = os.umask(0o077)  # as the command does
    yield
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def command(machine: Machine, *arguments: str, text: str | None = None) -> Result:
    return CliRunner().invoke(main, list(arguments), obj=machine, input=text)


def test_an_installation_has_a_user_directories_and_an_enabled_unit(machine: Machine, root: Path):
    installed = service.install(machine, COMMAND)
    assert installed.changed
    assert installed.unit == root / UNIT
    assert (root / UNIT).read_text() == service.shipped("covey-device.service")
    assert mode(root / UNIT) == 0o644
    assert (root / WANTED).is_symlink()
    uid, gid = installed.ids
    for path, expected in (("", 0o750), ("/data", 0o2770)):
        found = root / f"var/lib/covey-device{path}"
        assert mode(found) == expected
        assert (found.stat().st_uid, found.stat().st_gid) == (uid, gid)
    assert f"covey-device:x:{uid}:{gid}:" in (root / "etc/passwd").read_text()


def test_a_second_installation_changes_nothing(machine: Machine, root: Path):
    service.install(machine, COMMAND)
    before = contents(root)
    assert not service.install(machine, COMMAND).changed
    assert contents(root) == before


def test_an_upgrade_writes_the_unit_anew_and_leaves_drop_ins(machine: Machine, root: Path):
    service.install(machine, COMMAND)
    drop_in = root / f"{UNIT}.d/override.conf"
    drop_in.parent.mkdir(exist_ok=True)
    drop_in.write_text("[Service]\nMemoryMax=200M\n")
    (root / UNIT).write_text("of a release before")
    assert service.install(machine, COMMAND).changed
    assert "ExecStart" in (root / UNIT).read_text()
    assert drop_in.read_text() == "[Service]\nMemoryMax=200M\n"


def test_the_unit_of_a_package_is_left_alone(machine: Machine, root: Path):
    packaged = root / "usr/lib/systemd/system/covey-device.service"
    packaged.parent.mkdir(parents=True, exist_ok=True)
    packaged.write_text(service.shipped("covey-device.service"))
    installed = service.install(machine, COMMAND)
    assert installed.unit == packaged
    assert not installed.changed
    assert not (root / UNIT).exists()
    assert (root / WANTED).is_symlink()


@pytest.mark.parametrize(
    ("version", "there"), [(252, False), (253, False), (254, True), (257, True)]
)
def test_restart_steps_only_where_systemd_knows_them(
    root: Path, tools: Tools, version: int, there: bool
):
    def run(arguments):
        if list(arguments) == ["systemctl", "--version"]:
            from covey_device.installation.machine import Ran

            return Ran(0, f"systemd {version} ({version}.1-1)\n+PAM +AUDIT\n")
        return tools(arguments)

    service.install(Machine(root, run, lambda: True), COMMAND)
    steps = root / f"{UNIT}.d/10-restart-steps.conf"
    assert steps.exists() is there
    if there:
        # After a step back to an older release it must go: that one would warn at each start.
        service.install(Machine(root, tools, lambda: True), COMMAND)
        assert steps.exists() is (
            int(run_program(["systemctl", "--version"]).output.split()[1]) >= 254
        )


@pytest.mark.parametrize("place", ["/home/pi/venv", "/root/venv", "/tmp/venv"])
def test_a_program_that_the_service_could_not_see_is_refused(place: str, monkeypatch):
    monkeypatch.undo()
    with pytest.raises(MachineError, match="the service sees no home directory"):
        service.unit_for(Path(place) / "bin/covey-device")


@pytest.mark.parametrize("name", ["my venv", "100%", "a;b", 'quo"te'])
def test_a_path_that_a_unit_would_read_otherwise_is_refused(name: str):
    with pytest.raises(MachineError, match="without spaces"):
        service.unit_for(Path("/opt") / name / "bin/covey-device")


def test_without_systemd_or_root_nothing_is_touched(root: Path, tools: Tools):
    before = contents(root)
    with pytest.raises(MachineError, match="sudo"):
        service.install(Machine(root, tools, lambda: False), COMMAND)
    with pytest.raises(MachineError, match="sudo"):
        service.uninstall(Machine(root, tools, lambda: False))
    (root / "usr/lib/systemd/systemd").unlink()
    with pytest.raises(MachineError, match="no systemd"):
        service.install(Machine(root, tools, lambda: True), COMMAND)
    before.pop("usr/lib/systemd/systemd")
    assert contents(root) == before
    assert not tools.ran


def test_a_tool_that_fails_is_named_with_what_it_says(machine: Machine, tools: Tools):
    tools.refused["systemd-sysusers"] = "trouble\nno space left\n"
    with pytest.raises(MachineError, match=r"systemd-sysusers .*: no space left"):
        service.install(machine, COMMAND)


# -- joining -----------------------------------------------------------------------------------------------


def test_a_device_that_joins_is_the_services_own(own: Machine, root: Path, lab: Lab):
    done = join(own, lab.token("pi-own"), command=COMMAND)
    ids = own.ids()
    assert ids is not None
    config = root / "etc/covey/device.toml"
    assert mode(config) == 0o640
    assert config.stat().st_uid == os.geteuid()
    assert config.stat().st_gid == ids[1]
    state = root / "var/lib/covey-device"
    device = configuration.load(config)
    for name in (device.identity, device.certificate, device.state, device.data.file):  # type: ignore[union-attr]
        assert name.startswith(f"{state}/")
    found = [path for path in state.rglob("*") if path != state / "data"]
    assert any(path.name == "identity.key" for path in found)
    for path in found:
        assert (path.stat().st_uid, path.stat().st_gid) == ids, path
        assert mode(path) == (0o700 if path.is_dir() else 0o600), path
    assert done.joined.keys.parent == state
    assert not done.started  # nothing runs here
    assert (root / WANTED).is_symlink()


def test_data_in_a_home_directory_are_copied_to_where_the_service_reads(
    own: Machine, root: Path, lab: Lab, monkeypatch: pytest.MonkeyPatch
):
    mine = root / "home/pi/mine.npz"
    mine.write_bytes(b"data" * 1000)
    mine.chmod(0o600)
    monkeypatch.setattr(service, "UNREACHABLE", (str(root / "home"),))
    done = join(own, lab.token("pi-data"), data=mine, command=COMMAND)
    copy = root / "var/lib/covey-device/data/mine.npz"
    assert done.copied == copy
    assert copy.read_bytes() == mine.read_bytes()
    assert mode(copy) == 0o640
    assert (copy.stat().st_uid, copy.stat().st_gid) == own.ids()
    assert str(copy) in (root / "etc/covey/device.toml").read_text()
    assert sorted(p.name for p in copy.parent.iterdir()) == ["mine.npz"]


def test_data_that_the_service_can_read_stay_where_they_are(own: Machine, root: Path, lab: Lab):
    mine = root / "mine.npz"
    mine.write_bytes(b"data")
    mine.chmod(0o644)
    done = join(own, lab.token("pi-stay"), data=mine, command=COMMAND)
    assert done.copied is None
    assert f'"{mine}"' in (root / "etc/covey/device.toml").read_text()


def test_data_that_cannot_be_copied_cost_no_token(
    own: Machine, root: Path, lab: Lab, monkeypatch: pytest.MonkeyPatch
):
    mine = root / "home/pi/mine.npz"
    mine.write_bytes(b"data")
    monkeypatch.setattr(service, "UNREACHABLE", (str(root / "home"),))
    service.install(own, COMMAND)
    target = root / "var/lib/covey-device/data/mine.npz"
    target.mkdir(mode=0o777)
    (target / "x").touch()
    token = lab.token("pi-nocopy")
    with pytest.raises(MachineError, match="cannot copy"):
        join(own, token, data=mine, command=COMMAND)
    remove(target)
    assert join(own, token, data=mine, command=COMMAND).copied == target


def test_joining_again_with_force_keeps_the_data_and_what_was_there(
    own: Machine, root: Path, lab: Lab
):
    first = join(own, lab.token("pi-anew"), command=COMMAND)
    with pytest.raises(CoveyError, match="--force"):
        join(own, lab.token("pi-anew", again=True), command=COMMAND)
    again = join(own, lab.token("pi-anew", again=True), force=True, command=COMMAND)
    assert again.joined.kept == root / "etc/covey/device.toml.old"
    assert mode(again.joined.kept) == 0o640
    assert first.joined.keys != again.joined.keys
    assert first.joined.keys.exists()


def test_root_is_another_only_within(root: Path):
    if os.geteuid() != 0:
        with acting_as((1, 1)), acting_as_root():
            assert os.geteuid() != 0
        return
    groups = os.getgroups()
    with acting_as((12345, 12346)):
        assert (os.geteuid(), os.getegid(), os.getgroups()) == (12345, 12346, [])
        with acting_as_root():
            assert os.geteuid() == 0
        assert os.geteuid() == 12345
    assert (os.geteuid(), os.getgroups()) == (0, groups)


# -- the commands ------------------------------------------------------------------------------------------


def test_join_tells_what_it_did(
    own: Machine, root: Path, lab: Lab, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(service, "program", lambda: COMMAND)
    result = command(own, "join", "-", text=f"{lab.token('pi-told').encode()}\n")
    assert result.exit_code == 0, result.output
    said = result.output.replace(str(root), "")
    assert "joined fleet farm as pi-told" in said
    assert "keys and certificates: /var/lib/covey-device/enrolment-" in said
    assert "for the user covey-device alone" in said
    assert "configuration: /etc/covey/device.toml" in said
    assert "service: covey-device.service, enabled" in said
    assert "put the data into /var/lib/covey-device/data/data.npz" in said
    assert len(said.splitlines()) <= 10


def test_join_without_a_service_is_as_before(root: Path, tools: Tools, lab: Lab, tmp_path: Path):
    config = tmp_path / "device.toml"
    token = lab.token("pi-alone").encode()
    result = command(Machine(root, tools, lambda: True), "join", token, "--config", str(config))
    assert result.exit_code == 0, result.output
    assert result.output.splitlines()[-1].startswith("next: put the data into")
    assert "systemctl" not in result.output
    assert "sudo" not in result.output
    assert not tools.ran


@pytest.mark.parametrize(
    ("systemd", "told"),
    [(True, "joined with sudo, it would be a service"), (False, "no systemd runs here")],
)
def test_join_that_makes_no_service_says_how(
    root: Path, tools: Tools, lab: Lab, monkeypatch: pytest.MonkeyPatch, systemd: bool, told: str
):
    if not systemd:
        (root / "usr/lib/systemd/systemd").unlink()
    config = root / "etc/covey/device.toml"
    config.parent.mkdir()
    monkeypatch.setattr(commands, "CONFIG", config)
    token = lab.token(f"pi-{'not-root' if systemd else 'elsewhere'}").encode()
    machine = Machine(root, tools, lambda: not systemd)
    result = command(machine, "join", token, "--config", str(config))
    assert result.exit_code == 0, result.output
    assert told in result.output.splitlines()[-1]
    assert not tools.ran


def test_install_service_says_what_comes_next(
    machine: Machine, root: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(service, "program", lambda: COMMAND)
    first, second = (command(machine, "install-service") for _ in range(2))
    assert first.output.splitlines()[0] == f"unit: {root / UNIT}, written"
    assert second.output.splitlines()[0] == f"unit: {root / UNIT}, as it was"
    assert "next: sudo covey-device join TOKEN" in second.output


@pytest.mark.parametrize(("controllers", "told"), [("cpu io pids", True), ("cpu memory", False)])
def test_a_memory_controller_that_is_off_is_told_with_its_fix(
    machine: Machine, root: Path, monkeypatch: pytest.MonkeyPatch, controllers: str, told: bool
):
    monkeypatch.setattr(service, "program", lambda: COMMAND)
    groups = root / "sys/fs/cgroup"
    groups.mkdir(parents=True)
    (groups / "cgroup.controllers").write_text(f"{controllers}\n")
    assert (CONTROLLER_FIX in command(machine, "install-service").output) is told


def test_a_failing_command_is_one_line(machine: Machine, tools: Tools, monkeypatch):
    monkeypatch.setattr(service, "program", lambda: COMMAND)
    tools.refused["systemctl"] = "Access denied\n"
    result = command(machine, "install-service")
    assert result.exit_code == 1
    assert "failed: Access denied" in result.output
    assert "Traceback" not in result.output


# -- the end -----------------------------------------------------------------------------------------------


def script_made(root: Path) -> None:
    """What deploy/install.sh leaves."""
    (root / "opt/covey/bin").mkdir(parents=True)
    (root / "opt/covey/bin/covey-device").touch()
    (root / "opt/covey/.made-by-install.sh").touch()
    (root / "usr/local/bin").mkdir(parents=True)
    (root / "usr/local/bin/covey-device").symlink_to("/opt/covey/bin/covey-device")
    (root / "usr/local/bin/covey").symlink_to("/usr/bin/another-covey")


def test_uninstall_leaves_the_machine_as_it_was(
    own: Machine, root: Path, lab: Lab, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(service, "program", lambda: COMMAND)
    (root / "opt").mkdir()
    (root / "usr/local/bin").mkdir(parents=True)
    (root / "var/lib").mkdir(parents=True)
    (root / "run").mkdir()
    (root / "etc/systemd/system/multi-user.target.wants").mkdir()
    (root / "etc/systemd/system/multi-user.target.wants/other.service").symlink_to(
        "../other.service"
    )
    (root / "usr/local/bin/covey").symlink_to("/usr/bin/another-covey")
    before = contents(root)
    shutil.rmtree(root / "usr/local/bin")
    script_made(root)
    service.install(own, COMMAND)
    join(own, lab.token("pi-gone"), command=COMMAND)
    (root / "etc/covey/policy.toml").write_text("min_cohort = 4\n")
    drop_in = root / f"{UNIT}.d/override.conf"
    drop_in.parent.mkdir(exist_ok=True)
    drop_in.write_text("[Service]\nNice=5\n")
    (root / "run/covey-device").mkdir(parents=True)
    (root / "run/covey-device/veto").touch()
    result = command(own, "uninstall", text="y\n")
    assert result.exit_code == 0, result.output
    assert contents(root) == before
    for word in ("/opt/covey", "/etc/covey/device.toml", "user and group", "/var/lib/covey-device"):
        assert word in result.output
    assert command(own, "uninstall", "--yes").output.startswith("there is no service of covey")


def test_uninstall_asks_and_a_no_changes_nothing(machine: Machine, root: Path):
    service.install(machine, COMMAND)
    before = contents(root)
    result = command(machine, "uninstall", text="n\n")
    assert result.exit_code == 1
    assert "/var/lib/covey-device" in result.output
    assert contents(root) == before


def test_uninstall_can_keep_what_the_device_is(own: Machine, root: Path, lab: Lab):
    join(own, lab.token("pi-kept"), command=COMMAND)
    state = {k: v for k, v in contents(root).items() if "covey" in k and "systemd" not in k}
    assert command(own, "uninstall", "--yes", "--keep-data").exit_code == 0
    left = contents(root)
    assert {k: left[k] for k in state} == state
    assert not (root / UNIT).exists()
    assert not os.path.lexists(root / WANTED)
    assert own.ids() is not None
    assert configuration.load(root / "etc/covey/device.toml").device == "pi-kept"


def test_uninstall_keeps_what_others_have_in_etc_covey(machine: Machine, root: Path):
    service.install(machine, COMMAND)
    (root / "etc/covey/coordinator.toml").touch()
    (root / "etc/covey/policy.toml").touch()
    result = command(machine, "uninstall", "--yes")
    assert "with what is not of this device: coordinator.toml" in result.output
    assert [p.name for p in (root / "etc/covey").iterdir()] == ["coordinator.toml"]


def test_uninstall_leaves_the_program_to_a_coordinator(machine: Machine, root: Path):
    script_made(root)
    service.install(machine, COMMAND)
    (root / "etc/systemd/system/covey-coordinator.service").touch()
    result = command(machine, "uninstall", "--yes")
    assert f"{root}/opt/covey stays: the coordinator on this machine needs it" in result.output
    assert (root / "opt/covey/bin/covey-device").exists()
    assert (root / "usr/local/bin/covey-device").is_symlink()
    assert not (root / UNIT).exists()


def test_uninstall_hands_a_package_to_apt(machine: Machine, root: Path, tools: Tools):
    listing = root / "var/lib/dpkg/info/covey-device.list"
    listing.parent.mkdir(parents=True)
    listing.touch()
    service.install(machine, COMMAND)
    command(machine, "uninstall", "--yes", "--keep-data")
    assert tools.ran[-1] == ["apt-get", "remove", "--yes", "--quiet", "covey-device"]
    command(machine, "uninstall", "--yes")
    assert tools.ran[-1] == ["apt-get", "purge", "--yes", "--quiet", "covey-device"]


def test_what_cannot_be_removed_is_named(machine: Machine, root: Path, monkeypatch):
    service.install(machine, COMMAND)

    def refuse(path: Path) -> None:
        raise PermissionError(1, "Operation not permitted", str(path))

    monkeypatch.setattr(shutil, "rmtree", refuse)
    with pytest.raises(MachineError, match=r"cannot remove .*var/lib/covey-device.*by hand"):
        service.uninstall(machine)
    monkeypatch.undo()


def test_a_table_of_a_joined_device_is_toml(own: Machine, root: Path, lab: Lab):
    join(own, lab.token("pi-toml"), command=COMMAND)
    table = msgspec.toml.decode((root / "etc/covey/device.toml").read_bytes())
    assert table["state"].endswith("/state/farm.pi-toml")
