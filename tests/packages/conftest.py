"""Trees of devices, each made once for all tests of a worker."""

from collections.abc import Callable

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
def covey_wheel(tmp_path_factory):
    """The wheel of this checkout."""
    return build_covey(tmp_path_factory.mktemp("covey-wheel"))
