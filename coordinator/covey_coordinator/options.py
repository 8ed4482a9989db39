"""Command-line options that several commands share."""

from pathlib import Path

import click

fleet_option = click.option(
    "--fleet-dir",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path(),
    envvar="COVEY_FLEET",
    show_default="the current directory",
    help="The fleet's directory, as `covey init` made it.",
)
