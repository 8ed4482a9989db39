"""Fixtures that any test may ask for by name."""

import os
from collections.abc import Iterator

import pytest

from brokers import broker, broker_kind, brokers
from processes import start

__all__ = ["broker", "broker_kind", "brokers", "start"]


@pytest.fixture(autouse=True, scope="session")
def no_test_hangs_on_this_machines_fan() -> Iterator[None]:
    """Devices under test do not mind what machine they are on, unless a test gives them one."""
    os.environ["COVEY_HOST_ROOT"] = "/nonexistent"
    yield
    del os.environ["COVEY_HOST_ROOT"]


@pytest.fixture(autouse=True)
def umask_is_this_tests_own() -> Iterator[None]:
    """The device's commands set it for their process, which here is that of all tests."""
    before = os.umask(0o077)
    os.umask(before)
    yield
    os.umask(before)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """In CI nothing skips: what may be missing on a desk may not be missing there."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if os.environ.get("CI") and reporter is not None and reporter.stats.get("skipped"):
        reporter.write_line("tests were skipped, and in CI nothing may be", red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
