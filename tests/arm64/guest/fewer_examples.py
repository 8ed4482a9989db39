"""A plugin of pytest: tests of properties try fewer examples, since qemu is slow."""

from hypothesis import HealthCheck, settings

settings.register_profile(
    "emulated", max_examples=20, deadline=None, suppress_health_check=list(HealthCheck)
)
settings.load_profile("emulated")
