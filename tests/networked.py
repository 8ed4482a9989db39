"""The broker of a networked fleet for tests: real mosquitto, certificates made by `pki`."""

import asyncio
import ssl
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from covey_coordinator import pki
from covey_coordinator.broker import Access, RunningBroker, mosquitto, start_networked_broker
from covey_shared.topics import Topics
from prerequisites import missing
from raw_mqtt import RawClient, TurnedAwayError

FLEET = "farm"
TOPICS = Topics(FLEET)
HOSTS = ("127.0.0.1", "localhost")


@dataclass
class Gate:
    """A broker authority, whom it let in, and the broker that believes it."""

    directory: Path
    authority: pki.Authority = field(
        default_factory=lambda: pki.make_authority(FLEET, int(time.time()))
    )
    serials: dict[str, int] = field(default_factory=dict)
    revoked: tuple[str, ...] = ()
    broker: RunningBroker | None = None
    connections: int = 1024

    def __post_init__(self) -> None:
        if mosquitto.find() is None:
            missing("mosquitto is not installed: apt install mosquitto")
        self.directory.mkdir(exist_ok=True)
        (self.directory / "authority.pem").write_bytes(self.authority.pem)
        self.server = self.server_pair()

    def server_pair(self) -> pki.Pair:
        return pki.server_certificate(self.authority, HOSTS, days=30, now_unix=int(time.time()))

    def access(self, *, serials: bool = True, names: bool = True) -> Access:
        """For the broker. serials, names: whether either list has those who are revoked."""
        listed = [self.serials[name] for name in self.revoked] if serials else []
        return Access(
            fleet=FLEET,
            authority=self.authority.pem,
            revocations=pki.revocation_list(self.authority, listed, int(time.time())),
            certificate=self.server.certificate,
            key=self.server.key,
            revoked=self.revoked if names else (),
            connections=self.connections,
        )

    def start(self, **settings: Any) -> RunningBroker:
        self.broker = asyncio.run(
            start_networked_broker(
                self.directory / "broker", self.access(), host="127.0.0.1", **settings
            )
        )
        return self.broker

    def stop(self) -> None:
        if self.broker is not None:
            asyncio.run(self.broker.stop())

    def admit(self, access: Access | None = None) -> bool:
        """Have the running broker take up who is revoked."""
        assert self.broker is not None
        return asyncio.run(self.broker.admit(access or self.access()))

    def pair(
        self, name: str, *, authority: pki.Authority | None = None, age_days: int = 0
    ) -> pki.Pair:
        """A client's certificate of 30 days. age_days: made so long ago."""
        made = int(time.time()) - age_days * pki.DAY_S
        pair = pki.client_pair(authority or self.authority, name, days=30, now_unix=made)
        if authority is None:
            certificate = pki.x509.load_pem_x509_certificate(pair.certificate)
            self.serials[name] = pki.read_leaf(certificate).serial
        return pair

    def context(self, pair: pki.Pair | None) -> ssl.SSLContext:
        """Trusts the authority and shows the certificate, if any."""
        context = ssl.create_default_context(cafile=str(self.directory / "authority.pem"))
        if pair is not None:
            certificate, key = self.directory / "client.crt", self.directory / "client.key"
            certificate.write_bytes(pair.certificate)
            key.write_bytes(pair.key)
            context.load_cert_chain(certificate, key)
        return context

    def client(self, name: str, **settings: Any) -> RawClient:
        """A client with a fresh certificate of this name."""
        return self.raw(self.context(self.pair(name)), **settings)

    def raw(self, context: ssl.SSLContext | None, **settings: Any) -> RawClient:
        """A client that shows what the context says. Raises TurnedAwayError."""
        assert self.broker is not None
        return RawClient(self.broker.port, context, **settings)

    def lets_in(self, context: ssl.SSLContext | None, **settings: Any) -> bool:
        """Whether such a client gets in, and may speak."""
        try:
            with self.raw(context, **settings) as client:
                client.ping()
        except TurnedAwayError:
            return False
        return True
