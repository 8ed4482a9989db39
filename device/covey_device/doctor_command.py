"""`covey-device doctor`: only parsing and printing. The checks are in `doctor`."""

from pathlib import Path

import click


@click.command(short_help="Check this machine and this device, before it matters.")
@click.option(
    "--config",
    "config_path",
    type=click.Path(dir_okay=False, path_type=Path),
    default=Path("/etc/covey/device.toml"),
    show_default=True,
    help="The device's configuration; without one, the machine alone is checked.",
)
@click.option(
    "--plan",
    "plan_path",
    type=click.Path(exists=True, path_type=Path),
    metavar="DIR|FILE",
    help="Estimate what a round of this plan costs here; by default of the last one the device used.",
)
@click.option(
    "--batches", type=click.IntRange(min=1), default=10, show_default=True, help="Of the round."
)
@click.option(
    "--batch-size", type=click.IntRange(1, 1 << 20), default=32, show_default=True, help="Examples."
)
@click.option(
    "--peers",
    type=click.IntRange(2, 128),
    default=100,
    show_default=True,
    help="Devices in the round.",
)
@click.option(
    "--uplink-mbit",
    type=click.FloatRange(min=0, min_open=True),
    default=10.0,
    show_default=True,
    help="What this machine's network can send, in Mbit/s.",
)
@click.option(
    "--downlink-mbit",
    type=click.FloatRange(min=0, min_open=True),
    default=10.0,
    show_default=True,
    help="What it can receive.",
)
@click.option("--json", "as_json", is_flag=True, help="Print it as JSON, for programs.")
def doctor(
    config_path: Path,
    plan_path: Path | None,
    batches: int,
    batch_size: int,
    peers: int,
    uplink_mbit: float,
    downlink_mbit: float,
    as_json: bool,
) -> None:
    """Check this machine and, once it joined a fleet, this device: a line for each check, with what to do
    about it. Nothing is changed. The exit status is 1 if there is a problem."""
    import json

    from covey_device.doctor.checkup import check_up
    from covey_device.doctor.findings import Finding
    from covey_device.doctor.machine import Machine
    from covey_device.doctor.round import Round

    asked = Round(batches, batch_size, peers, uplink_mbit, downlink_mbit)

    def tell(finding: Finding) -> None:
        if not as_json:
            click.echo(finding.line())

    done = check_up(config_path, Machine(), asked, plan_path, tell=tell)
    if as_json:
        click.echo(json.dumps(done.facts(), indent=1))
    else:
        if done.estimate is not None:
            from covey_device.doctor.estimate import in_words

            click.echo("")
            for line in in_words(done.estimate):
                click.echo(line)
            click.echo("")
        click.echo(done.summary())
    if done.ill:
        raise click.exceptions.Exit(1)
