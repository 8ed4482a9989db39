"""The userlands, with the device's package installed, and how long things took in them."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import pytest

from arm64.userlands import RELEASES, Userland, install, make_package, unpack

T = TypeVar("T")

SECONDS: list[tuple[str, float]] = []
_lock = threading.Lock()


@contextmanager
def timed(what: str) -> Iterator[None]:
    """Say in the end how long this took."""
    began = time.monotonic()
    yield
    with _lock:
        SECONDS.append((what, time.monotonic() - began))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if SECONDS:
        terminalreporter.section("seconds under emulation, on this machine as busy as it is")
        for what, seconds in SECONDS:
            terminalreporter.write_line(f"{seconds:7.1f}  {what}")


def each(releases: Any, work: Callable[[Any], T]) -> list[T]:
    """Do it for all, at the same time: emulation is slow, and machines have more than one processor."""
    with ThreadPoolExecutor(len(RELEASES)) as pool:
        return list(pool.map(work, releases))


def _prepared(folder: Path, release: str) -> Userland:
    with timed(f"{release}: the userland and the package are made"):
        userland = unpack(release, folder / release)
        package = make_package(release, folder)
    with timed(f"{release}: dpkg installs the package"):
        install(userland, package)
    return userland


@pytest.fixture(scope="session")
def userlands(tmp_path_factory: pytest.TempPathFactory) -> list[Userland]:
    """One of each release."""
    return each(RELEASES, partial(_prepared, tmp_path_factory.mktemp("userlands")))
