"""placeholder until the compiler's command lands"""

import click


@click.group()
def plan() -> None:
    """Plans."""
