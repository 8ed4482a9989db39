"""Trees of devices, each made once for all tests of a worker."""

import fcntl
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from covey_packaging.target import PackagingError
from covey_packaging.tree import Tree, build_tree
from covey_packaging.wheels import build_covey, fetch
from prerequisites import missing


@pytest.fixture(scope="session")
def locked_wheels():
    """Fetches the wheels of a target, which needs an index of Python packages within reach, once."""

    def fetched(target):
        try:
            return fetch(target)
        except PackagingError as error:
            missing(str(error))

    return fetched


@pytest.fixture(scope="session")
def tree_of(tmp_path_factory, locked_wheels) -> Callable[..., Tree]:
    """The tree of a target. Read it, do not change it."""
    made = {}

    def tree(target):
        if target not in made:
            locked_wheels(target)
            path = tmp_path_factory.mktemp("trees") / target.name
            made[target] = build_tree(path, release=target.release.name, arch=target.arch)
        return made[target]

    return tree


@pytest.fixture(scope="session")
def once(tmp_path_factory):
    """Makes a file in a folder that all workers share, if none of them has; the others wait for it."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent

    def made(name: str, make: Callable[[Path], Path]) -> Path:
        place = folder / name
        with (folder / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not place.exists():
                with tempfile.TemporaryDirectory(dir=folder) as temporary:
                    made = make(Path(temporary))
                    place.mkdir()
                    made.rename(place / made.name)
        (found,) = place.iterdir()
        return found

    return made


@pytest.fixture(scope="session")
def covey_wheel(once):
    """The wheel of this checkout."""
    return once("covey-wheel", build_covey)
