"""`covey broker`: what a broker that somebody else runs is to be told."""

import time
from pathlib import Path

import click

from covey_coordinator.options import fleet_option

INSTALLED = "/etc/mosquitto/covey"


@click.group(short_help="Configure a broker of your own.")
def broker() -> None:
    """Brokers that `covey up` does not run."""


@broker.command("config", short_help="Write a configuration for mosquitto.")
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    help="Where to write it.  [default: broker/mosquitto in the fleet's directory]",
)
@click.option(
    "--install-dir",
    type=click.Path(path_type=Path),
    default=INSTALLED,
    show_default=True,
    help="Where the files will be on the broker's machine.",
)
@click.option("--days", type=click.IntRange(1, 3650), default=365, show_default=True,
              help="How long a certificate that is made for the broker lasts.")  # fmt: skip
@fleet_option
def broker_config(output: Path | None, install_dir: Path, days: int, fleet_dir: Path) -> None:
    """Write mosquitto's configuration for a networked fleet, and say what to do with it.

    The same that `covey up` uses: TLS, a certificate for every client, for each its own topics, and
    limits. To be repeated, and taken up by the broker, whenever a device is revoked.
    """
    from covey_coordinator.broker.export import write_configuration
    from covey_coordinator.config import load_fleet
    from covey_coordinator.fleet import FleetDirectory

    fleet, config = FleetDirectory(fleet_dir), load_fleet(fleet_dir)
    directory = (output or fleet_dir / "broker" / "mosquitto").absolute()
    written = write_configuration(
        fleet, config, directory, install_dir, days=days, now_unix=int(time.time())
    )
    ends = time.strftime("%Y-%m-%d", time.gmtime(written.ends_unix))
    click.echo(f"mosquitto's configuration for fleet {config.fleet} is in {directory}")
    if written.revoked:
        click.echo(f"revoked in it: {', '.join(written.revoked)}")
    files = " ".join(written.names)
    click.echo(f"""
On the broker's machine, as root, in a copy of that directory (server.key is secret):
  install -d -o root -g mosquitto -m 750 {install_dir}
  install -o root -g mosquitto -m 640 {files} {install_dir}/
  install -m 644 mosquitto.conf /etc/mosquitto/mosquitto.conf
  systemctl restart mosquitto

After every `covey device revoke`: this command again, and there
  install -o root -g mosquitto -m 640 covey.acl crl.pem {install_dir}/
  systemctl reload mosquitto
Reload only when both are whole: mosquitto 2.0 lets everybody do everything without covey.acl, and
revoked devices in without crl.pem.

Before {ends}, when the broker's certificate ends: all of it again (a reload is enough).""")
