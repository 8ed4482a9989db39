"""Who gets into a networked fleet's broker, and what each may do there.

A client is who its certificate says: the common name is user name and client id, whatever it claims.
A device publishes below its own topics and reads what concerns it; the coordinator reads what devices
say and writes the rest. Neither integrity nor privacy rests on this, since messages are signed and
updates masked: it keeps strangers out, and devices from disturbing one another.

`Access` is what `covey up` and `covey broker config` hand to mosquitto; `access_control` its rules.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

from covey_shared.errors import ConfigError
from covey_shared.topics import Topics

COORDINATOR = "coordinator"
"""The common name of the coordinator's certificate; no device has it."""

_ANY = "+"
_SELF = "%u"


@dataclass(frozen=True, slots=True)
class Access:
    """What a broker needs to let the right clients in; everything but the names is PEM.

    authority: the broker authority's certificate. revocations: its list of certificates that no longer
    count. certificate, key: the broker's own. connections: most at once, strangers included until they
    are turned away. revoked: devices that are silenced though they may still be connected.
    """

    fleet: str
    authority: bytes
    revocations: bytes
    certificate: bytes
    key: bytes = field(repr=False)
    connections: int
    revoked: tuple[str, ...] = ()

    def files(self) -> dict[str, bytes]:
        """File name -> content, as the configuration names them."""
        return {
            "covey.acl": access_control(self.fleet, self.revoked).encode(),
            "ca.crt": self.authority,
            "crl.pem": self.revocations,
            "server.crt": self.certificate,
            "server.key": self.key,
        }

    def check(self) -> None:
        """That mosquitto can use it: given a list it cannot read, a running one would go on without,
        and let revoked devices in. Raises ConfigError."""
        from cryptography import x509
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives import serialization

        try:
            authority = x509.load_pem_x509_certificate(self.authority)
            server = x509.load_pem_x509_certificate(self.certificate)
        except ValueError:
            raise ConfigError(
                "a certificate of the broker's is damaged (ca.crt or server.crt)"
            ) from None
        try:
            revocations = x509.load_pem_x509_crl(self.revocations)
        except ValueError:
            raise ConfigError("the list of revoked certificates (crl.pem) is damaged") from None
        try:
            key = serialization.load_pem_private_key(self.key, password=None)
        except (ValueError, TypeError):
            raise ConfigError("the broker's private key (server.key) is damaged") from None
        public = authority.public_key()
        try:
            server.verify_directly_issued_by(authority)
            ours = revocations.is_signature_valid(public)  # type: ignore[arg-type]
        except (ValueError, TypeError, InvalidSignature):
            ours = False
        if not ours or revocations.issuer != authority.subject:
            raise ConfigError(
                "the broker's certificate (server.crt) or the list of revoked ones (crl.pem) is not "
                "of the broker authority (ca.crt)"
            )
        if key.public_key() != server.public_key():
            raise ConfigError("the broker's key (server.key) and certificate do not go together")


def access_control(fleet: str, revoked: Iterable[str] = ()) -> str:
    """mosquitto's acl_file. fleet: "+" for any. revoked: names to whom everything is denied.

    A subscription to more than this is granted all the same by mosquitto 2.0, and filtered at
    delivery: nothing comes of it.
    """
    topics = Topics(fleet)
    blobs = topics.blob(b"") + _ANY
    lines = ["# What each may do; everything else is denied.", ""]
    for name in sorted(set(revoked)):
        # Its certificate is on the list of revoked ones, but a connection that stands is not ended.
        lines += [f"user {name}", "topic deny #", ""]
    lines += [f"user {COORDINATOR}"]
    lines += [f"topic write {t}" for t in (topics.round, topics.all, topics.inbox(_ANY), blobs)]
    said = (topics.outbox, topics.upload, topics.presence)
    lines += [f"topic read {make(_ANY)}" for make in said]
    lines += [
        "",
        "# Everybody's. mosquitto warns that there is no %u in these three: none is meant.",
    ]
    lines += [f"pattern read {topic}" for topic in (topics.round, topics.all, blobs)]
    lines += ["", "# A device's own; %u is its name."]
    lines += [f"pattern read {topics.inbox(_SELF)}"]
    lines += [f"pattern write {make(_SELF)}" for make in said]
    return "\n".join(lines) + "\n"
