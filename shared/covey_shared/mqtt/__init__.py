"""MQTT 3.1.1 behind `transport.Transport`: the one place of the protocol code with sockets in it.

`client` holds what services use: `MqttTransport`, which reconnects, subscribes again, and sends
again what was not acknowledged. `connection` is one connection and the only import of paho-mqtt;
`sockets` opens what it runs on; `url` says where the broker is.

paho encodes and decodes, the asyncio event loop opens and watches the sockets: a process can hold
hundreds of clients without a thread for any of them. Nothing of the round is known here, and
nothing is retried but the connection: what gets lost in brokers' queues is asked for again by the
protocol.
"""

from covey_shared.mqtt.client import MqttTransport, publish_all
from covey_shared.mqtt.url import BrokerUrl, parse_broker_url

__all__ = ["BrokerUrl", "MqttTransport", "parse_broker_url", "publish_all"]
