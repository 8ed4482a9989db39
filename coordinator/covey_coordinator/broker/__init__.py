"""A broker as a child process, for fleets that do not run their own.

mosquitto where it is installed, otherwise the embedded one (amqtt, pure Python). Either listens on
loopback only, knows only the users it is given, keeps everything in one private directory, and
dies with us: the kernel signals it when this process ends, however it ends.

`mosquitto` and `embedded` say how each is configured; here is what they have in common. Commands
start through ``python -m covey_coordinator.broker`` (see `__main__`). Brokers for a fleet spread
over a network are the operator's own: see deploy/mosquitto.
"""

from covey_coordinator.broker.running import BrokerKind, RunningBroker, start_broker

__all__ = ["BrokerKind", "RunningBroker", "start_broker"]
