"""Fixtures that any test may ask for by name."""

from brokers import broker, broker_kind, brokers

__all__ = ["broker", "broker_kind", "brokers"]
