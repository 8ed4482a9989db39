"""Fixtures of the fleet's tests."""

import pytest

from brokers import missing
from covey_coordinator.broker import BrokerKind, mosquitto


@pytest.fixture
def one_kind() -> BrokerKind:
    """mosquitto, for what need not be shown with both brokers."""
    if mosquitto.find() is None:
        missing("mosquitto is not installed: apt install mosquitto")
    return "mosquitto"
