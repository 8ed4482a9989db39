"""Who would like to join, or to be joined, and must not. Real sockets, and the coordinator's real port.

Attackers stand where the network puts them: in between (`Impostor`, which passes on what it likes), in
the coordinator's place, or as clients with somebody else's token or certificate. What they must not get is
a certificate, and the token's secret before its owner has used it.
"""

import ssl
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from cryptography import x509

from covey_coordinator import pki
from covey_coordinator.fleet_ca import certify
from covey_device import enrol, tls
from covey_device.assembly import load_device
from covey_device.config import DeviceConfig
from covey_device.enrol import join, make_tls_key
from covey_device.renewal import renew
from covey_shared import wire
from covey_shared.enrolment import (
    Enrolled,
    EnrolRefused,
    EnrolRequest,
    FleetTrust,
    IdentityRequest,
    RenewRequest,
    Token,
    WhoIsThere,
)
from covey_shared.errors import CoveyError, RefusedError, SignatureError, TransportError
from covey_shared.keys import SigningKey
from covey_shared.messages import DeviceId
from enrolment_lab import HOST, Impostor, Lab, anybody, context_of, relayed, server_context

THIEF = SigningKey(bytes(range(32)))


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with Lab(tmp_path_factory.mktemp("lab") / "fleet") as lab:
        yield lab


@pytest.fixture
def strangers(tmp_path: Path) -> pki.Authority:
    """An authority that calls itself what the fleet's is called."""
    return pki.make_authority("farm", int(time.time()))


def request_of(token: Token, identity: SigningKey = THIEF, csr: bytes = b"") -> bytes:
    """Whoever has a token can ask."""
    request = EnrolRequest(
        fleet="farm",
        secret=token.secret,
        identity=identity.public,
        csr=csr or make_tls_key().csr,
    )
    return wire.sign(request, identity).envelope


def refusal(answer: bytes) -> str:
    message = wire.decode(answer).message
    assert isinstance(message, EnrolRefused)
    return message.reason


def nothing_was_made(lab: Lab, config: Path, name: str) -> None:
    assert not config.exists()
    assert lab.fleet.book.record(name) is None


def unspent(lab: Lab, config: Path, token: Token) -> None:
    """The owner can still use it."""
    assert join(replace(token, port=lab.port), config).fleet == "farm"


def tell_tale(way: Impostor, token: Token) -> bool:
    """Whether the secret passed by."""
    return any(token.secret in heard for heard in way.heard)


# -- tokens ------------------------------------------------------------------------------------------


def test_a_stolen_token_is_noticed_by_its_owner(lab: Lab, tmp_path: Path):
    """Whoever comes first gets the certificate; the other one learns of it, and so does the operator."""
    token = lab.token("stolen")
    key = make_tls_key()
    answer = wire.decode(relayed(lab.port, request_of(token, csr=key.csr))).message
    assert isinstance(answer, Enrolled)  # the control: the token is all it takes
    with pytest.raises(
        RefusedError, match=r"this token was used by another device.* it was stolen"
    ):
        join(token, tmp_path / "device.toml")
    assert not (tmp_path / "device.toml").exists()
    record = lab.fleet.book.record("stolen")
    assert record is not None
    assert [r.peer for r in record.refusals] == [HOST]
    warning = [line for line in lab.said if line.startswith("WARNING: the token for stolen")]
    assert len(warning) == 1
    lab.fleet.revoke("stolen", lab.now())  # and so the thief is out again
    request = RenewRequest(fleet="farm", device=DeviceId("stolen"), identity=THIEF.public, csr=b"")
    context = anybody()
    (tmp_path / "thief.pem").write_bytes(enrol.pair(key, _certificate(answer.tls_certificate)))
    context.load_cert_chain(tmp_path / "thief.pem")
    answer = relayed(lab.port, wire.sign(request, THIEF).envelope, context)
    assert refusal(answer) == "device stolen was revoked"


def _certificate(der: bytes) -> x509.Certificate:
    return x509.load_der_x509_certificate(der)


def _der(pem: bytes) -> bytes:
    return ssl.PEM_cert_to_DER_cert(pem.decode())


def test_a_token_works_once(lab: Lab, tmp_path: Path):
    token = lab.token("once")
    joined = join(token, tmp_path / "a" / "device.toml")
    with pytest.raises(RefusedError, match="was used by another device"):
        join(token, tmp_path / "b" / "device.toml")
    with pytest.raises(RefusedError, match="was used by another device"):
        enrol.granted(
            relayed(lab.port, request_of(token)), fleet="farm", identity=THIEF.public,
            coordinator=lab.fleet.trust.coordinator,
        )  # fmt: skip
    record = lab.fleet.book.record("once")
    assert record is not None
    assert record.key == joined.identity


def test_a_token_expires(lab: Lab, tmp_path: Path):
    token = lab.token("late", hours=1)
    lab.ahead_s = 3601
    try:
        with pytest.raises(RefusedError, match="this token has expired; ask for a new one"):
            join(token, tmp_path / "device.toml")
    finally:
        lab.ahead_s = 0
    nothing_was_made(lab, tmp_path / "device.toml", "late")
    unspent(lab, tmp_path / "device.toml", token)  # the control: an hour earlier it works


def test_a_replayed_request_is_of_no_use_to_whoever_saw_it(lab: Lab, tmp_path: Path):
    """The very bytes of another's request: the same certificate, for keys that the replayer lacks."""
    seen: list[bytes] = []

    def pass_on(request: bytes) -> bytes:
        seen.append(request)
        return relayed(lab.port, request)

    context = server_context(lab.fleet.tls.authority, tmp_path / "tls")
    token = lab.token("replayed")
    with Impostor(context, pass_on).running() as way:
        joined = join(replace(token, port=way.port), tmp_path / "device.toml")
    again = wire.decode(relayed(lab.port, seen[-1])).message
    assert isinstance(again, Enrolled)
    assert again.identity == joined.identity
    own = pki.load_certificate(joined.keys / "broker.pem")
    assert _certificate(again.tls_certificate) == own  # nothing new
    forged = wire.decode_as(EnrolRequest, seen[-1]).message
    altered = wire.sign(
        EnrolRequest(forged.fleet, forged.secret, forged.identity, make_tls_key().csr), THIEF
    )
    assert "not signed by" in refusal(relayed(lab.port, altered.envelope))


# -- in between ----------------------------------------------------------------------------------------


def test_in_the_middle_with_a_certificate_of_its_own(
    lab: Lab, tmp_path: Path, strangers: pki.Authority
):
    """It passes everything on, truthfully: the first answer is believed, and nothing after it."""
    context = server_context(strangers, tmp_path / "tls")
    token, config = lab.token("middle"), tmp_path / "device.toml"
    with Impostor(context, lambda request: relayed(lab.port, request)).running() as way:
        with pytest.raises(TransportError, match=r"certificate .* does not hold"):
            join(replace(token, port=way.port), config)
        assert len(way.heard) == 1  # who is there?
        assert not tell_tale(way, token)
    nothing_was_made(lab, config, "middle")
    unspent(lab, config, token)


def test_in_the_middle_with_keys_of_its_own(lab: Lab, tmp_path: Path, strangers: pki.Authority):
    """It answers in the fleet's place, with a whole fleet of its own behind it."""
    mine = FleetTrust(
        fleet="farm", fleet_ca=THIEF.public, coordinator=THIEF.public, tls_ca=strangers.der
    )
    answer = wire.sign(mine, THIEF).envelope
    token, config = lab.token("keys"), tmp_path / "device.toml"
    with Impostor(server_context(strangers, tmp_path / "tls"), lambda _: answer).running() as way:
        with pytest.raises(
            RefusedError, match="has other keys than the fleet that made this token"
        ):
            join(replace(token, port=way.port), config)
        assert [type(wire.decode(heard).message) for heard in way.heard] == [WhoIsThere]
        assert not tell_tale(way, token)
    unspent(lab, config, token)


def swapped_authority(trust: FleetTrust, authority: bytes) -> bytes:
    return wire.sign(replace_(trust, tls_ca=authority), THIEF).envelope


def swapped_ca(trust: FleetTrust, authority: bytes) -> bytes:
    return wire.sign(replace_(trust, fleet_ca=THIEF.public), THIEF).envelope


def swapped_coordinator(trust: FleetTrust, authority: bytes) -> bytes:
    return wire.sign(replace_(trust, coordinator=THIEF.public), THIEF).envelope


def signed_by_another(trust: FleetTrust, authority: bytes) -> bytes:
    return wire.sign(trust, THIEF).envelope


def replace_(trust: FleetTrust, **changes: bytes) -> FleetTrust:
    fields = {name: getattr(trust, name) for name in trust.__struct_fields__}
    return FleetTrust(**(fields | changes))


@pytest.mark.parametrize(
    "swap", [swapped_authority, swapped_ca, swapped_coordinator, signed_by_another]
)
def test_in_the_middle_swapping_whom_the_fleet_trusts(
    lab: Lab,
    tmp_path: Path,
    strangers: pki.Authority,
    swap: Callable[[FleetTrust, bytes], bytes],
):
    def answer(request: bytes) -> bytes:
        told = relayed(lab.port, request)
        message = wire.decode(told).message
        return swap(message, strangers.der) if isinstance(message, FleetTrust) else told

    token, config = lab.token(swap.__name__.replace("_", "-")), tmp_path / "device.toml"
    with Impostor(server_context(strangers, tmp_path / "tls"), answer).running() as way:
        with pytest.raises((RefusedError, SignatureError)):
            join(replace(token, port=way.port), config)
        assert len(way.heard) == 1
        assert not tell_tale(way, token)
    unspent(lab, config, token)


@dataclass
class Swapper:
    """In the middle with what only a thief of the broker authority's key has: the fleet's own
    certificate. It sees the secret, and swaps the answer for one that `make` returns."""

    lab: Lab
    make: Callable[[Enrolled], bytes]

    def __call__(self, request: bytes) -> bytes:
        told = relayed(self.lab.port, request)
        message = wire.decode(told).message
        return self.make(message) if isinstance(message, Enrolled) else told


def changed(answer: Enrolled, **changes: object) -> Enrolled:
    fields = {name: getattr(answer, name) for name in answer.__struct_fields__}
    return Enrolled(**(fields | changes))


def test_in_the_middle_swapping_the_answer(lab: Lab, tmp_path: Path, strangers: pki.Authority):
    """Nobody but the coordinator signs answers, whatever certificate the connection has."""

    def make(answer: Enrolled) -> bytes:
        return wire.sign(changed(answer, broker_url="mqtts://evil:8883"), THIEF).envelope

    token, config = lab.token("answer"), tmp_path / "device.toml"
    context = server_context(lab.fleet.tls.authority, tmp_path / "tls")
    with (
        Impostor(context, Swapper(lab, make)).running() as way,
        pytest.raises(SignatureError, match="not signed by the coordinator"),
    ):
        join(replace(token, port=way.port), config)
    assert not config.exists()
    unspent(lab, config, token)  # the keys are kept: the true answer can be had again


def test_a_rogue_server_that_knows_whom_the_fleet_trusts(
    lab: Lab, tmp_path: Path, strangers: pki.Authority
):
    """FleetTrust is no secret: everybody may ask for it. What it names cannot be played."""
    asked = wire.sign(WhoIsThere(fingerprint=bytes(32)), THIEF).envelope
    trust = relayed(lab.port, asked)
    token, config = lab.token("rogue"), tmp_path / "device.toml"
    for authority in (strangers, pki.make_authority("other", int(time.time()))):
        context = server_context(authority, tmp_path / "tls")
        with Impostor(context, lambda _: trust).running() as way:
            with pytest.raises(TransportError, match=r"certificate .* does not hold"):
                join(replace(token, port=way.port), config)
            assert not tell_tale(way, token)
    unspent(lab, config, token)


def test_a_device_cannot_play_the_coordinator(lab: Lab, tmp_path: Path):
    """A client's certificate is of the right authority, and for the wrong purpose."""
    pair = pki.client_pair(lab.fleet.tls.authority, HOST, days=1, now_unix=lab.now())
    asked = wire.sign(WhoIsThere(fingerprint=bytes(32)), THIEF).envelope
    trust = relayed(lab.port, asked)
    token = lab.token("client")
    with Impostor(context_of(pair, tmp_path / "tls"), lambda _: trust).running() as way:
        with pytest.raises(TransportError, match=r"certificate .* does not hold"):
            join(replace(token, port=way.port), tmp_path / "device.toml")
        assert not tell_tale(way, token)


@pytest.mark.parametrize("wrong", ["another host", "ended"])
def test_a_certificate_of_the_fleet_that_does_not_count(lab: Lab, tmp_path: Path, wrong: str):
    """For another host of the fleet's, or one that ended: an old server's key, found on the rubbish."""
    host = "elsewhere.example" if wrong == "another host" else HOST
    ago = 0 if wrong == "another host" else 40 * 86_400
    pair = pki.server_certificate(
        lab.fleet.tls.authority, [host], days=30, now_unix=lab.now() - ago
    )
    asked = wire.sign(WhoIsThere(fingerprint=bytes(32)), THIEF).envelope
    trust = relayed(lab.port, asked)
    token = lab.token("old")
    with Impostor(context_of(pair, tmp_path / "tls"), lambda _: trust).running() as way:
        with pytest.raises(TransportError, match=r"it ended on|IP address mismatch"):
            join(replace(token, port=way.port), tmp_path / "device.toml")
        assert not tell_tale(way, token)


def old_tls(context: ssl.SSLContext) -> ssl.SSLContext:
    """Speaks TLS 1.1 at most, as OpenSSL still can if it is asked to."""
    context.set_ciphers("ALL:@SECLEVEL=0")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        context.minimum_version = ssl.TLSVersion.TLSv1
        context.maximum_version = ssl.TLSVersion.TLSv1_1
    return context


def test_downgrade_to_tls_1_1(lab: Lab, tmp_path: Path, strangers: pki.Authority):
    asked = wire.sign(WhoIsThere(fingerprint=bytes(32)), THIEF).envelope
    trust = relayed(lab.port, asked)
    context = old_tls(server_context(lab.fleet.tls.authority, tmp_path / "tls"))
    token = lab.token("downgrade")
    with Impostor(context, lambda _: trust).running() as way:
        assert (
            relayed(way.port, asked, old_tls(anybody())) == trust
        )  # the control: it can be spoken
        way.heard.clear()
        with pytest.raises(CoveyError):
            join(replace(token, port=way.port), tmp_path / "device.toml")
        assert way.heard == []
        # Nor on the connection that counts.
        pinned = tls.pinned(lab.fleet.tls.authority.der)
        with pytest.raises(ssl.SSLError):
            relayed(way.port, asked, pinned)
    with pytest.raises(ssl.SSLError):
        relayed(lab.port, asked, old_tls(anybody()))  # the coordinator does not speak it either


# -- a coordinator that lies -----------------------------------------------------------------------------


def other_device(lab: Lab, answer: Enrolled) -> Enrolled:
    return changed(answer, device="somebody-else")


def other_fleet(lab: Lab, answer: Enrolled) -> Enrolled:
    return changed(answer, fleet="other")


def other_identity(lab: Lab, answer: Enrolled) -> Enrolled:
    return changed(answer, identity=THIEF.public)


def tls_key_that_is_not_ours(lab: Lab, answer: Enrolled) -> Enrolled:
    made = pki.client_certificate(
        lab.fleet.tls.authority, make_tls_key().csr, answer.device, days=9, now_unix=lab.now()
    )
    return changed(answer, tls_certificate=made)


def tls_of_another_authority(lab: Lab, answer: Enrolled) -> Enrolled:
    authority = pki.make_authority("farm", lab.now())
    made = pki.client_certificate(
        authority, make_tls_key().csr, answer.device, days=9, now_unix=lab.now()
    )
    return changed(answer, tls_certificate=made)


def no_tls_certificate(lab: Lab, answer: Enrolled) -> Enrolled:
    return changed(answer, tls_certificate=b"")


def a_servers_certificate(lab: Lab, answer: Enrolled) -> Enrolled:
    pem = pki.server_certificate(lab.fleet.tls.authority, [HOST], days=9, now_unix=lab.now())
    return changed(answer, tls_certificate=_der(pem.certificate))


def identity_for(**changes: object) -> Callable[[Lab, Enrolled], Enrolled]:
    """A certificate that the fleet CA did sign, and not for this device."""

    def change(lab: Lab, answer: Enrolled) -> Enrolled:
        fields = {"fleet": "farm", "device": answer.device, "identity": answer.identity, "days": 9}
        request = IdentityRequest(**(fields | changes))  # type: ignore[arg-type]
        made = certify(lab.fleet.ca_key(), request, lab.now()).envelope
        return changed(answer, certificate=made)

    return change


def identity_of_another_ca(lab: Lab, answer: Enrolled) -> Enrolled:
    request = IdentityRequest(fleet="farm", device=answer.device, identity=answer.identity, days=9)
    return changed(answer, certificate=certify(THIEF, request, lab.now()).envelope)


def identity_that_ended(lab: Lab, answer: Enrolled) -> Enrolled:
    request = IdentityRequest(fleet="farm", device=answer.device, identity=answer.identity, days=9)
    made = certify(lab.fleet.ca_key(), request, lab.now() - 10 * 86_400).envelope
    return changed(answer, certificate=made)


def broker_in_clear(lab: Lab, answer: Enrolled) -> Enrolled:
    return changed(answer, broker_url="mqtt://127.0.0.1:1883")


LIES: dict[Callable[[Lab, Enrolled], Enrolled], str] = {
    other_device: "for another name than somebody-else",
    other_fleet: "an answer of fleet other",
    other_identity: "for another identity key",
    tls_key_that_is_not_ours: "for a key that is not this device's",
    tls_of_another_authority: "not from the fleet's broker authority",
    no_tls_certificate: "not one that can be read",
    a_servers_certificate: "for another name than|not a client's",
    identity_for(device=DeviceId("pi-9")): "the identity certificate is for pi-9",
    identity_for(fleet="other"): "of fleet other",
    identity_for(identity=THIEF.public): "and its key, not for",
    identity_of_another_ca: "not signed by the fleet CA",
    identity_that_ended: "the identity certificate ended on",
    broker_in_clear: "names no broker with TLS",
}


@pytest.mark.parametrize("lie", LIES)
def test_an_answer_that_is_not_this_devices(
    lab: Lab, tmp_path: Path, lie: Callable[[Lab, Enrolled], Enrolled]
):
    """Signed by the coordinator, over the right connection, and wrong: nothing of it is written."""

    def change(answer: bytes) -> bytes:
        message = wire.decode(answer).message
        if not isinstance(message, Enrolled):
            return answer
        return wire.sign(lie(lab, message), lab.fleet.coordinator_key()).envelope

    token, config = lab.token(f"lie-{list(LIES).index(lie)}"), tmp_path / "device.toml"
    lab.change = change
    try:
        with pytest.raises(CoveyError, match=LIES[lie]):
            join(token, config)
    finally:
        lab.change = lambda answer: answer
    assert not config.exists()
    assert list(tmp_path.glob("enrolment-*")) == []
    unspent(lab, config, token)  # the control: the true answer is accepted


# -- renewals --------------------------------------------------------------------------------------------


def enrolled(lab: Lab, folder: Path, name: str) -> tuple[Path, DeviceConfig]:
    config = join(lab.token(name), folder / name / "device.toml").config
    return config, load_device(config).config


def asked(lab: Lab, config: Path, request: RenewRequest, identity: SigningKey) -> bytes:
    """What the port answers to a request that comes with this device's certificate."""
    parts = load_device(config)
    assert parts.tls is not None
    return relayed(lab.port, wire.sign(request, identity).envelope, parts.tls)


def test_a_renewal_with_another_devices_identity(lab: Lab, tmp_path: Path):
    """Each device can speak for itself alone, whichever part of another's it has."""
    mine, _ = enrolled(lab, tmp_path, "mine")
    theirs, _ = enrolled(lab, tmp_path, "theirs")
    me, them = load_device(mine).identity, load_device(theirs).identity

    def said(device: str, identity: SigningKey, signer: SigningKey) -> str:
        request = RenewRequest(
            fleet="farm", device=DeviceId(device), identity=identity.public, csr=make_tls_key().csr
        )
        return refusal(asked(lab, mine, request, signer))

    assert "came with the certificate of mine" in said("theirs", me, me)
    assert "came with the certificate of mine" in said(
        "theirs", them, them
    )  # a stolen identity key
    assert "registered with another identity" in said("mine", them, them)
    assert "not signed by" in said("mine", me, them)
    ours = RenewRequest(
        fleet="farm", device=DeviceId("mine"), identity=me.public, csr=make_tls_key().csr
    )
    assert isinstance(wire.decode(asked(lab, mine, ours, me)).message, Enrolled)  # the control


def test_a_renewal_without_a_certificate(lab: Lab, tmp_path: Path):
    config, _ = enrolled(lab, tmp_path, "bare")
    identity = load_device(config).identity
    request = RenewRequest(
        fleet="farm", device=DeviceId("bare"), identity=identity.public, csr=make_tls_key().csr
    )
    answer = relayed(lab.port, wire.sign(request, identity).envelope)
    assert "comes over a connection with the device's certificate" in refusal(answer)


def test_a_revoked_devices_renewal(lab: Lab, tmp_path: Path):
    config, _ = enrolled(lab, tmp_path, "revoked")
    before = {p: p.read_bytes() for p in config.parent.rglob("*") if p.is_file()}
    lab.fleet.revoke("revoked", lab.now())
    with pytest.raises(CoveyError, match="the coordinator refuses: device revoked was revoked"):
        renew(config, now_unix=time.time(), anyway=True)
    assert {p: p.read_bytes() for p in config.parent.rglob("*") if p.is_file()} == before


def test_a_revoked_identity_does_not_join_again(lab: Lab, tmp_path: Path):
    config, _ = enrolled(lab, tmp_path, "again")
    identity = load_device(config).identity
    lab.fleet.revoke("again", lab.now())
    token = lab.token("again", again=True)
    answer = relayed(lab.port, request_of(token, identity))
    assert "this device's identity was revoked" in refusal(answer)
    unspent(lab, tmp_path / "new" / "device.toml", token)


@pytest.mark.parametrize("lie", [other_device, other_fleet, other_identity])
def test_an_answer_to_a_renewal_that_is_not_this_devices(
    lab: Lab, tmp_path: Path, lie: Callable[[Lab, Enrolled], Enrolled]
):
    config, _ = enrolled(lab, tmp_path, f"renew-{lie.__name__[6:]}")
    before = {p: p.read_bytes() for p in config.parent.rglob("*") if p.is_file()}
    lab.change = lambda answer: (
        wire.sign(lie(lab, m), lab.fleet.coordinator_key()).envelope
        if isinstance(m := wire.decode(answer).message, Enrolled)
        else answer
    )
    try:
        with pytest.raises(RefusedError):
            renew(config, now_unix=time.time(), anyway=True)
    finally:
        lab.change = lambda answer: answer
    assert {p: p.read_bytes() for p in config.parent.rglob("*") if p.is_file()} == before
