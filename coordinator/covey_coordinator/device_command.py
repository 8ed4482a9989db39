"""`covey device`: let devices in, look at them, and shut them out."""

import time
from pathlib import Path

import click

from covey_coordinator.moments import moment
from covey_coordinator.options import fleet_option


@click.group(short_help="Add, list, show and revoke devices.")
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
    """Make a device's identity, certificate and device.toml, in a local fleet.

    Copy the printed directory to the device, and start it with `covey-device run`. In a networked
    fleet, devices join with `covey device token`.
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


@device.command("token", short_help="Make a token that lets one device join.")
@click.option("--name", required=True, help="What the device will be called.")
@click.option(
    "--hours",
    type=click.FloatRange(0, 8760, min_open=True),
    help="How long the token may be used.  [default: `enrol.token_hours` of covey.toml]",
)
@click.option(
    "--again",
    is_flag=True,
    help="For a device that there is already, and that lost its keys: they are revoked when the "
    "token is used.",
)
@fleet_option
def device_token(name: str, hours: float | None, again: bool, fleet_dir: Path) -> None:
    """Make a token, which lets one device join a networked fleet, once.

    The token is the only line on stdout; what to do with it is told on stderr. Whoever has it first
    becomes the device, so give it away as you would a password.
    """
    from covey_coordinator.fleet import FleetDirectory
    from covey_coordinator.status import read_status
    from covey_shared.keys import in_groups

    fleet = FleetDirectory(fleet_dir)
    token, expires = fleet.make_token(name, hours=hours, again=again, now_unix=int(time.time()))
    click.echo(token.encode())
    for line in (
        "",
        f"on the device: covey-device join TOKEN     (for {name}, once, until {moment(expires)})",
        f"compare there: fleet CA {in_groups(fleet.trust.ca)}",
    ):
        click.echo(line, err=True)
    if read_status(fleet_dir) is None:
        click.echo("`covey up` does not run for this fleet: start it first", err=True)


@device.command("list", short_help="List devices.")
@fleet_option
def device_list(fleet_dir: Path) -> None:
    """Devices, whether they are online, where they stand, and until when their certificates last."""
    from rich.console import Console
    from rich.table import Table

    from covey_coordinator.config import load_fleet
    from covey_coordinator.fleet import FleetDirectory
    from covey_coordinator.status import read_status

    fleet, now = FleetDirectory(fleet_dir), time.time()
    entries, status = fleet.devices(), read_status(fleet_dir)
    invited = sorted(
        {token.device for token in fleet.tokens.open(now)} - {entry.name for entry in entries}
    )
    if not entries and not invited:
        how = "token --name" if load_fleet(fleet_dir).networked else "add"
        click.echo(f"no devices yet: covey device {how} NAME")
        return
    table = Table(box=None)
    for column in ("device", "online", "status", "certificate ends", "identity"):
        table.add_column(column)
    for entry in entries:
        online = "?" if status is None else "yes" if entry.name in status.present else "no"
        table.add_row(
            entry.name, online, entry.status(now), _day(entry.not_after_unix),
            entry.identity.hex()[:16],
        )  # fmt: skip
    for name in invited:
        table.add_row(name, "no", "invited", "", "")
    Console().print(table)


@device.command("show", short_help="Everything that is known of a device.")
@click.argument("name")
@fleet_option
def device_show(name: str, fleet_dir: Path) -> None:
    """Everything that the coordinator knows of a device, refusals in its name included."""
    from covey_coordinator.explaining import SUMMARY_ROUNDS, summary
    from covey_coordinator.fleet import FleetDirectory
    from covey_coordinator.status import read_status
    from covey_coordinator.store import FILE, Store
    from covey_shared.keys import in_groups
    from covey_shared.messages import for_display

    fleet, now = FleetDirectory(fleet_dir), time.time()
    entry, record, status = fleet.device(name), fleet.book.record(name), read_status(fleet_dir)
    click.echo(f"device {name}: {entry.status(now)}")
    if status is not None:
        click.echo(f"online: {'yes' if name in status.present else 'no'}")
        if status.faults.get(name):
            click.echo(f"faults in rounds: {status.faults[name]}")
    if (fleet_dir / FILE).exists():
        with Store.open(fleet_dir / FILE) as store:
            told = summary(store.device_rounds(name, SUMMARY_ROUNDS))
        if told:
            click.echo(f"rounds: {told}; covey device explain {name} says more")
    click.echo(f"identity: {in_groups(entry.identity)}")
    if entry.not_after_unix:
        click.echo(
            f"identity certificate: from {moment(entry.issued_unix)} to "
            f"{moment(entry.not_after_unix)}"
        )
    if entry.revoked_unix:
        click.echo(f"revoked: {moment(entry.revoked_unix)}")
    if record is None:
        click.echo("added by covey device add")
        return
    times = "" if record.token_uses == 1 else f", its token used {record.token_uses} times"
    click.echo(f"joined: {moment(record.enrolled_unix)}{times}")
    if record.renewed_unix:
        click.echo(f"asked for a renewal: {moment(record.renewed_unix)}")
    if record.wanted_unix > entry.issued_unix:
        click.echo(f"a renewal is wanted of it: since {moment(record.wanted_unix)}")
    if record.requested_unix:
        click.echo(
            f"waits for the fleet CA: since {moment(record.requested_unix)} (covey ca requests)"
        )
    for grant in record.grants:
        click.echo(f"TLS certificate {grant.serial}: to {moment(grant.not_after_unix)}")
    for refusal in record.refusals:
        click.echo(f"refused {moment(refusal.unix)}, {refusal.peer}: {for_display(refusal.reason)}")


@device.command("explain", short_help="Why a device does or does not take part.")
@click.argument("name")
@click.option(
    "--rounds",
    "limit",
    type=click.IntRange(1, 200),
    default=10,
    show_default=True,
    help="How many of its last rounds to tell of.",
)
@click.option("--json", "as_is", is_flag=True, help="Print it as JSON, for programs.")
@fleet_option
def device_explain(name: str, limit: int, as_is: bool, fleet_dir: Path) -> None:
    """Why a device does or does not take part: how it stands, whether it is online, and what became of it
    in its last rounds, newest first."""
    from covey_coordinator.explaining import as_record, explain, round_lines
    from covey_coordinator.runs_view import as_json

    found = explain(fleet_dir, name, limit, time.time())
    if as_is:
        click.echo(as_json(as_record(found, limit)))
        return
    click.echo(f"device {name}: {found.status}")
    rounds = round_lines(found.rounds, name, limit)
    lines = [*found.lines, *rounds, *(("advice", line) for line in found.advice)]
    width = max(len(what) for what, _ in lines)
    for what, text in lines:
        click.echo(f"{what:<{width}}  {text}")


@device.command("revoke", short_help="Shut a device out for good.")
@click.argument("name")
@fleet_option
def device_revoke(name: str, fleet_dir: Path) -> None:
    """Shut a device out: of the broker at once, of rounds from the next one on.

    Its identity is refused for ever, under any name. A device of the same name with new keys can join
    with `covey device token --again`.
    """
    from covey_coordinator.config import load_fleet
    from covey_coordinator.fleet import FleetDirectory
    from covey_coordinator.status import read_status

    fleet = FleetDirectory(fleet_dir)
    if not fleet.revoke(name, int(time.time())):
        click.echo(f"device {name} was revoked before")
        return
    click.echo(f"device {name} revoked: from the next round on no sum contains it")
    if read_status(fleet_dir) is None:
        click.echo("`covey up` does not run for this fleet; it will know when it starts")
    if load_fleet(fleet_dir).broker.kind == "external":
        click.echo("your broker still lets it in: covey broker config says how to tell it")


@device.command("renew", short_help="Have a device renew its certificates now.")
@click.argument("name")
@fleet_option
def device_renew(name: str, fleet_dir: Path) -> None:
    """Have a device renew its certificates, which it does by itself when two thirds of their life are
    over. A device that is offline is asked when it is back."""
    from covey_coordinator.fleet import FleetDirectory
    from covey_coordinator.status import read_status

    FleetDirectory(fleet_dir).want_renewal(name, int(time.time()))
    status = read_status(fleet_dir)
    if status is None:
        click.echo(f"`covey up` does not run for this fleet; {name} is asked when both are there")
    elif name not in status.present:
        click.echo(f"{name} is offline; it is asked when it is back")
    else:
        click.echo(f"{name} is asked to renew; covey device show {name} tells whether it did")


def _day(unix: int) -> str:
    return time.strftime("%Y-%m-%d", time.gmtime(unix)) if unix else ""
