"""`covey-device join`, `install-service` and `uninstall`."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from covey_device import enrol
    from covey_device.installation.machine import Machine

CONFIG = Path("/etc/covey/device.toml")


def _machine(context: click.Context) -> "Machine":
    """Of this process, or the one that a test has."""
    from covey_device.installation.machine import Machine

    return context.find_object(Machine) or Machine()


@click.command(short_help="Join a fleet, with a token of its coordinator.")
@click.argument("token")
@click.option(
    "--config",
    "config_path",
    type=click.Path(dir_okay=False, path_type=Path),
    default=CONFIG,
    show_default=True,
    help="The device's configuration.",
)
@click.option(
    "--data",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="The device's .npz file; otherwise set [data] in its device.toml.",
)
@click.option(
    "--expect-ca",
    metavar="FINGERPRINT",
    help="Join only a fleet whose CA has this fingerprint.",
)
@click.option("--force", is_flag=True, help="Replace an enrolment that is there.")
@click.option("--no-service", is_flag=True, help="Enrol alone, and leave systemd as it is.")
@click.pass_context
def join(
    context: click.Context,
    token: str,
    config_path: Path,
    data: Path | None,
    expect_ca: str | None,
    force: bool,
    no_service: bool,
) -> None:
    """Join a fleet with the TOKEN that `covey device token` printed: make this device's keys, have them
    certified, write device.toml, and with sudo on a machine with systemd start the service. TOKEN may be -
    to be read from standard input."""
    from covey_device import enrol
    from covey_shared.enrolment import decode_token

    if token == "-":  # noqa: S105  (no secret: where it is read from)
        hidden = sys.stdin.isatty()
        token = click.prompt("token", hide_input=True) if hidden else sys.stdin.readline()
    decoded = decode_token(token)
    expected = None if expect_ca is None else enrol.expected_ca(expect_ca)
    machine = _machine(context)
    wanted = config_path == CONFIG and not no_service
    if wanted and machine.has_systemd and machine.is_root():
        from covey_device.installation import joining

        done = joining.join(machine, decoded, data=data, expect_ca=expected, force=force)
        _tell(done.joined, "for the user covey-device alone")
        if done.copied is not None:
            click.echo(f"data: copied to {done.copied}, as the service reads no home directory")
        click.echo(f"service: {done.unit.name}, enabled{' and started' if done.started else ''}")
        _tell_controller(machine)
        if not done.joined.data_there:
            click.echo(f"next: put the data into {done.joined.data}, or set [data]")
        click.echo(
            "see it with: systemctl status covey-device; its log: journalctl -u covey-device"
        )
        return
    joined = enrol.join(decoded, config_path, data=data, expect_ca=expected, force=force)
    _tell(joined, "for this user alone")
    there = "" if joined.data_there else f"put the data into {joined.data}, or set [data], then "
    click.echo(f"next: {there}covey-device run --config {joined.config}")
    if wanted and machine.has_systemd:
        click.echo(
            "it runs while you run it; joined with sudo, it would be a service that starts at boot"
        )
    elif wanted:
        click.echo("no systemd runs here: have this machine start that command at boot")


def _tell_controller(machine: "Machine") -> None:
    """Stock Raspberry Pi OS is without."""
    from covey_device.ceiling import CONTROLLER_FIX, memory_controller

    if memory_controller(machine.root) is False:
        click.echo(
            "note: this kernel's memory controller is off; LimitDATA holds all the same, and for MemoryMax: "
            f"{CONTROLLER_FIX}"
        )


def _tell(joined: "enrol.Joined", whose: str) -> None:
    from covey_shared.keys import in_groups

    click.echo(f"joined fleet {joined.fleet} as {joined.device}")
    click.echo(f"fleet CA: {in_groups(joined.fleet_ca)}")
    click.echo(f"identity: {in_groups(joined.identity)}")
    click.echo(f"keys and certificates: {joined.keys}, {whose}")
    click.echo(f"configuration: {joined.config}")
    if joined.kept is not None:
        click.echo(f"the configuration before is in {joined.kept}; its keys are where they were")
    if joined.waiting:
        click.echo(
            "waiting: the fleet CA, on another machine, has yet to sign this device's identity; tell "
            "your operator to run `covey ca sign`. Until then this device takes part in no round, and "
            "covey-device run asks again by itself"
        )


@click.command("install-service", short_help="Make or renew the systemd unit.")
@click.pass_context
def install_service(context: click.Context) -> None:
    """Make the service's user, directories and systemd unit, or bring them up to date after an upgrade. A
    device that has joined is started, or started anew. `covey-device join` does the same by itself."""
    from covey_device.installation import service

    machine = _machine(context)
    installed = service.install(machine)
    click.echo(f"unit: {installed.unit}{', written' if installed.changed else ', as it was'}")
    _tell_controller(machine)
    if not machine.path(str(service.CONFIG)).exists():
        click.echo("next: sudo covey-device join TOKEN, with a line from `covey device token`")
    elif not machine.offline:
        service.start(machine)
        click.echo("service: started")


@click.command(short_help="Remove the device and its service from this machine.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.option(
    "--keep-data", is_flag=True, help="Keep the configuration, the keys, the state and the data."
)
@click.pass_context
def uninstall(context: click.Context, yes: bool, keep_data: bool) -> None:
    """Stop the service and remove everything of it: unit, configuration, keys, state, data, user and
    group, and the program where deploy/install.sh or a Debian package put it."""
    from covey_device.installation import service
    from covey_device.installation.machine import MachineError

    machine = _machine(context)
    if not machine.is_root():
        raise MachineError("this changes the system: run it with sudo")
    found = service.belongings(machine, keep_data=keep_data)
    by_package = service.packaged(machine)
    if not found and not by_package and machine.ids() is None:
        click.echo("there is no service of covey on this machine")
        return
    if not yes:
        click.echo("this will be removed, with all that is in it:")
        for path in found:
            click.echo(f"  {path}")
        if not keep_data:
            click.echo("  the user and group covey-device")
        if by_package:
            click.echo("  the package covey-device")
        click.confirm("remove it?", abort=True)
    for line in service.uninstall(machine, keep_data=keep_data):
        click.echo(line)
    if not keep_data:
        click.echo(
            "to its fleet the device is only silent: tell your operator, who runs `covey device revoke`"
        )
    prefix = machine.path(service.PREFIX)
    if machine.path(service.COORDINATOR).exists():
        click.echo(f"{prefix} stays: the coordinator on this machine needs it")
    elif not by_package and prefix not in found:
        click.echo("the program itself is where you put it; if by pip: pip uninstall covey")
