"""`covey ca`: the fleet CA on a machine of its own, and the files carried between it and the fleet."""

import time
from pathlib import Path

import click

from covey_coordinator.options import fleet_option


@click.group(short_help="A fleet CA on a machine of its own.")
def ca() -> None:
    """The fleet CA, which signs devices' identities.

    On a machine of its own it makes what a fleet's coordinator cannot make up: devices. Requests and
    certificates are carried between the two in files, neither of which is secret.
    """


@ca.command("init", short_help="Make a fleet CA.")
@click.argument("directory", type=click.Path(file_okay=False, path_type=Path), metavar="DIR")
@click.option("--fleet", required=True, help="The fleet that it will sign for.")
def ca_init(directory: Path, fleet: str) -> None:
    """Make a fleet CA in DIR, on the machine where it is to stay."""
    from covey_coordinator.fleet import check_name
    from covey_coordinator.fleet_ca import AuthorityDirectory
    from covey_shared.keys import in_groups

    check_name(fleet, "fleet")
    public = AuthorityDirectory(directory).create(fleet)
    click.echo(f"CA for fleet {fleet} made in {directory.absolute()}: {in_groups(public)}")
    click.echo(
        f"next: carry {directory / 'ca.pub'} to the coordinator; there: "
        f"covey init --fleet {fleet} --address HOST --ca ca.pub"
    )


@ca.command("requests", short_help="Export what the fleet CA is to sign.")
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    required=True,
    metavar="FILE",
    help="Where to write the requests.",
)
@fleet_option
def ca_requests(output: Path, fleet_dir: Path) -> None:
    """Export all devices that wait for the fleet CA, to be carried to it."""
    from covey_coordinator.fleet import FleetDirectory
    from covey_coordinator.fleet_ca import write_file
    from covey_shared.keys import in_groups

    fleet = FleetDirectory(fleet_dir)
    requests, names = fleet.identity_requests()
    if not names:
        click.echo("no device waits for the fleet CA")
        return
    write_file(output, requests)
    click.echo(f"requests of {', '.join(names)} written to {output}")
    click.echo(f"next: carry it to the CA's machine; there: covey ca sign {output.name}")
    click.echo(f"the coordinator's key: {fleet.trust.coordinator.hex()} "
               f"({in_groups(fleet.trust.coordinator)})")  # fmt: skip


@ca.command("sign", short_help="Sign what a fleet asks for.")
@click.argument(
    "file", type=click.Path(exists=True, dir_okay=False, path_type=Path), metavar="FILE"
)
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Where to write the certificates.  [default: FILE with .signed at its end]",
)
@click.option(
    "--ca-dir",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    default=Path(),
    show_default="the current directory",
    help="The CA's directory, as `covey ca init` made it.",
)
@click.option(
    "--coordinator",
    metavar="KEY",
    help="The public key of the fleet's coordinator, 64 hexadecimal digits as `covey status` shows "
    "it; at the first use, and remembered.",
)
@click.option("--yes", is_flag=True, help="Do not ask.")
def ca_sign(
    file: Path, output: Path | None, ca_dir: Path, coordinator: str | None, yes: bool
) -> None:
    """Show the devices in FILE with the fingerprints of their identities, ask, and sign them.

    Compare the fingerprints with what `covey-device join` showed on the devices: a coordinator that was
    taken over could ask for devices that do not exist.
    """
    from covey_coordinator.fleet_ca import (
        AuthorityDirectory,
        Requests,
        parse_public,
        read_file,
        write_file,
    )
    from covey_shared.keys import in_groups

    authority = AuthorityDirectory(ca_dir)
    key = None if coordinator is None else parse_public(coordinator, "--coordinator")
    wanted = authority.review(read_file(file, Requests), key)
    if not wanted:
        click.echo("there is nothing to sign")
        return
    width = max(len(entry.request.device) for entry in wanted)
    for entry in wanted:
        request = entry.request
        click.echo(f"{request.device:{width}}  {in_groups(request.identity)}  {request.days} days  "
                   f"{entry.what}")  # fmt: skip
    if not yes:
        click.confirm(f"sign {len(wanted)} for fleet {authority.config.fleet}?", abort=True)
    output = output or file.with_name(f"{file.name}.signed")
    write_file(output, authority.sign(wanted, key, int(time.time())))
    click.echo(f"signed: {output}")
    click.echo(f"next: carry it to the coordinator; there: covey ca import {output.name}")


@ca.command("import", short_help="Take in what the fleet CA signed.")
@click.argument(
    "file", type=click.Path(exists=True, dir_okay=False, path_type=Path), metavar="FILE"
)
@fleet_option
def ca_import(file: Path, fleet_dir: Path) -> None:
    """Check the certificates in FILE and keep them for their devices, which ask for them again."""
    from covey_coordinator.fleet import FleetDirectory
    from covey_coordinator.fleet_ca import Certificates, read_file
    from covey_shared.errors import ConfigError

    taken, refused = FleetDirectory(fleet_dir).import_certificates(read_file(file, Certificates))
    for name in taken:
        click.echo(f"device {name}: certificate taken in")
    if refused:
        raise ConfigError(f"{file}: {len(refused)} not taken in: {'; '.join(refused)}")
