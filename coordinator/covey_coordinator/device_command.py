"""`covey device`: the devices of a fleet."""

import time
from pathlib import Path

import click

from covey_coordinator.options import fleet_option


@click.group(short_help="Add and list devices.")
def device() -> None:
    """Devices of the fleet."""


@device.command("add", short_help="Make a device's identity and configuration.")
@click.argument("name")
@click.option(
    "--data",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="The device's .npz file, if it is on this machine.",
)
@click.option("--days", type=click.IntRange(1, 3650), default=365, show_default=True,
              help="How long its certificate lasts.")  # fmt: skip
@click.option("--broker-url", help="Where the device finds the broker, if not at this machine's.")
@fleet_option
def device_add(
    name: str, data: Path | None, days: int, broker_url: str | None, fleet_dir: Path
) -> None:
    """Make a device's identity, certificate and device.toml.

    Copy the printed directory to the device, and start it with `covey-device run`.
    """
    from covey_coordinator.config import load_fleet
    from covey_coordinator.fleet import FleetDirectory

    directory = FleetDirectory(fleet_dir).add_device(
        name, days=days, data=data, broker_url=broker_url
    )
    click.echo(f"device {name} added: {directory}")
    if load_fleet(fleet_dir).broker.kind == "external":
        click.echo(
            f"the broker must know the user {name}, with the password in "
            f"{directory / 'broker.password'}"
        )
    if data is None:
        click.echo(f"next: set [data] in {directory / 'device.toml'} to the device's own data")
    click.echo(f"then: covey-device run --config {directory / 'device.toml'}")


@device.command("list", short_help="List devices.")
@fleet_option
def device_list(fleet_dir: Path) -> None:
    """Devices, whether they are online, and until when their certificates last."""
    from rich.console import Console
    from rich.table import Table

    from covey_coordinator.fleet import FleetDirectory
    from covey_coordinator.status import read_status

    entries, status = FleetDirectory(fleet_dir).devices(), read_status(fleet_dir)
    if not entries:
        click.echo("no devices yet: covey device add NAME")
        return
    table = Table(box=None)
    for column in ("device", "online", "certificate ends", "identity"):
        table.add_column(column)
    for entry in entries:
        online = "?" if status is None else "yes" if entry.name in status.present else "no"
        ends = time.strftime("%Y-%m-%d", time.gmtime(entry.not_after_unix))
        if entry.not_after_unix < time.time():
            ends += " (ended)"
        table.add_row(entry.name, online, ends, entry.identity.hex()[:16])
    Console().print(table)
