"""A broker as a child process, for fleets that do not run their own.

For a local fleet mosquitto where it is installed, otherwise the embedded one (amqtt, pure Python): it
listens on loopback only and knows only the users it is given. For a networked fleet mosquitto, on all
addresses, for clients with a certificate of the fleet's. Either keeps everything in one private
directory, and dies with us: the kernel signals it when this process ends, however it ends.

`mosquitto` and `embedded` say how each is configured, `access` who may do what; here is what they have
in common. Commands start through ``python -m covey_coordinator.broker`` (see `__main__`).
"""

from covey_coordinator.broker.access import Access
from covey_coordinator.broker.running import (
    BrokerKind,
    RunningBroker,
    start_broker,
    start_networked_broker,
)

__all__ = ["Access", "BrokerKind", "RunningBroker", "start_broker", "start_networked_broker"]
