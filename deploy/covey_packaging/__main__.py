"""``python -m covey_packaging``: what `make deb` and `make wheels` run."""

import click

from covey_packaging.deb import build_deb
from covey_packaging.target import MACHINES, RELEASES, ROOT, TARGETS
from covey_packaging.wheels import locked, resolve, write_lock
from covey_shared.errors import CoveyError


@click.group("covey_packaging", context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Packages of a device, for Debian and Raspberry Pi OS."""


@main.command()
@click.option("--release", "releases", type=click.Choice(list(RELEASES)), multiple=True)
@click.option("--arch", "arches", type=click.Choice(list(MACHINES)), multiple=True)
def deb(releases: tuple[str, ...], arches: tuple[str, ...]) -> None:
    """Make Debian packages, in dist/. By default for both releases, on arm64."""
    for release in releases or RELEASES:
        for arch in arches or ("arm64",):
            made = build_deb(ROOT / "dist", release=release, arch=arch)
            click.echo(f"{made.relative_to(ROOT)}  {made.stat().st_size / 1e6:.1f} MB")


@main.command()
def wheels() -> None:
    """Choose the wheels of every target anew, and say what is another than before."""
    for target in TARGETS:
        before = {pin.name: pin.version for pin in locked(target)}
        pins = resolve(target)
        write_lock(target, pins)
        after = {pin.name: pin.version for pin in pins}
        for name in sorted({*before, *after}):
            if before.get(name) != after.get(name):
                said = f"{before.get(name, 'none')} -> {after.get(name, 'none')}"
                click.echo(f"{target.name}: {name} {said}")


if __name__ == "__main__":
    try:
        main(prog_name="python -m covey_packaging")
    except CoveyError as error:
        raise SystemExit(f"covey_packaging: {error}") from None
