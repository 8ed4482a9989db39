"""Who gets in at a networked fleet's broker, and what a client that is in cannot do.

The attackers are raw MQTT clients at a real mosquitto, configured by the code that `covey up` uses. Beside
each attempt that fails stands the same one by somebody who may: it succeeds.
"""

import contextlib
import socket
import ssl
import time
import warnings

import pytest

from covey_coordinator import pki
from covey_coordinator.broker.mosquitto import MAX_PACKET_BYTES
from covey_shared.transport import MAX_PAYLOAD_BYTES
from networked import FLEET, TOPICS, Gate
from raw_mqtt import CONNECT, TurnedAwayError

OWN = (TOPICS.outbox, TOPICS.upload, TOPICS.presence)
BLOB = TOPICS.blob(bytes(32))


@pytest.fixture(scope="module")
def gate(tmp_path_factory):
    """A broker that runs, for all tests that change nothing about it."""
    gate = Gate(tmp_path_factory.mktemp("gate"))
    gate.start()
    yield gate
    gate.stop()


@pytest.fixture
def own_gate(tmp_path):
    """A broker of the test's own."""
    gate = Gate(tmp_path / "gate")
    gate.start()
    yield gate
    gate.stop()


def ears(gate):
    """The coordinator, listening to all that it may hear, from now on."""
    coordinator = gate.client("coordinator")
    coordinator.subscribe(*(make("+") for make in OWN))
    coordinator.ping()
    coordinator.heard.clear()  # what other tests have left
    return coordinator


# -- getting in -----------------------------------------------------------------------------------


def test_without_a_certificate(gate):
    assert not gate.lets_in(gate.context(None))
    assert not gate.lets_in(gate.context(None), username="coordinator")
    assert gate.lets_in(gate.context(gate.pair("pi-1")))


def test_certificate_of_another_authority(gate):
    """Of the same name even, for the same device."""
    rogue = pki.make_authority(FLEET, int(time.time()))
    assert not gate.lets_in(gate.context(gate.pair("pi-1", authority=rogue)))
    assert gate.lets_in(gate.context(gate.pair("pi-1")))


def test_a_devices_certificate_certifies_nobody(gate):
    """A device that signs another's certificate with its own key, and shows both."""
    device = gate.pair("pi-1")
    certificate = pki.x509.load_pem_x509_certificate(device.certificate)
    key = pki.serialization.load_pem_private_key(device.key, None)
    below = gate.pair("coordinator", authority=pki.Authority(certificate, key))
    chain = pki.Pair(below.certificate + device.certificate, below.key)
    assert not gate.lets_in(gate.context(chain))
    assert gate.lets_in(gate.context(device))


def test_certificate_that_has_ended(gate):
    assert not gate.lets_in(gate.context(gate.pair("pi-1", age_days=31)))
    assert gate.lets_in(gate.context(gate.pair("pi-1", age_days=29)))


def test_the_servers_certificate_is_no_clients(gate):
    assert not gate.lets_in(gate.context(gate.server))
    assert gate.lets_in(gate.context(gate.pair("broker")))  # the same name, for a client


def test_old_tls_and_none(gate):
    """TLS 1.1, and MQTT in clear at the TLS port."""
    context = gate.context(gate.pair("pi-1"))
    context.set_ciphers("ALL:@SECLEVEL=0")
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
        context.minimum_version = ssl.TLSVersion.TLSv1
        context.maximum_version = ssl.TLSVersion.TLSv1_1
    assert not gate.lets_in(context)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    assert gate.lets_in(context)
    assert not gate.lets_in(None)


def test_a_device_cannot_play_the_broker(tmp_path):
    """Its certificate is the authority's as well, but not for a server."""
    gate = Gate(tmp_path / "gate")
    gate.server = gate.pair("pi-1")
    try:
        gate.start()
        lenient = gate.context(gate.pair("pi-2"))
        lenient.check_hostname = False
        assert not gate.lets_in(lenient)
        lenient.verify_mode = ssl.CERT_NONE
        assert gate.lets_in(lenient)
    finally:
        gate.stop()


# -- passing for another --------------------------------------------------------------------------


def test_another_devices_client_id_throws_nobody_off(gate):
    with gate.client("pi-2", client_id="pi-2") as victim:
        with gate.client("pi-1", client_id="pi-2") as intruder:
            intruder.ping()
            victim.ping()
        with (
            gate.client("pi-2", client_id="something else"),  # itself, elsewhere
            pytest.raises(TurnedAwayError),
        ):
            victim.ping()


def test_another_devices_user_name_gives_nothing(gate):
    with (
        ears(gate) as coordinator,
        gate.client("pi-1", username="pi-2", client_id="pi-2") as intruder,
        gate.client("pi-1x", username="coordinator") as usurper,
    ):
        for make in OWN:
            intruder.publish(make("pi-2"), b"forged")
        usurper.publish(TOPICS.inbox("pi-1"), b"forged")
        usurper.publish(TOPICS.outbox("pi-1x"), b"as itself")
        intruder.publish(TOPICS.outbox("pi-1"), b"as itself too")
        coordinator.until(b"as itself too")
        assert [p for _, p, _ in coordinator.heard] == [b"as itself", b"as itself too"]


# -- saying what one may not ----------------------------------------------------------------------


def test_publishing_on_another_devices_topics(gate):
    with ears(gate) as coordinator, gate.client("pi-1") as intruder:
        for retain in (False, True):
            for make in OWN:
                intruder.publish(make("pi-2"), b"forged", retain=retain)
        for make in OWN:
            intruder.publish(make("pi-1"), b"mine")
        coordinator.until(b"mine")
        coordinator.ping()
        assert [(t, p) for t, p, _ in coordinator.heard] == [
            (make("pi-1"), b"mine") for make in OWN
        ]


def test_publishing_what_only_the_coordinator_says(gate):
    topics = (TOPICS.round, TOPICS.all, TOPICS.inbox("pi-2"), BLOB)
    with (
        gate.client("coordinator") as coordinator,
        gate.client("pi-1") as intruder,
        gate.client("pi-2") as victim,
    ):
        victim.subscribe(*topics)
        for topic in (*topics, TOPICS.inbox("pi-1")):
            intruder.publish(topic, b"forged", retain=True)
        for topic in topics:
            coordinator.publish(topic, b"true")
        coordinator.publish(TOPICS.all, b"end")
        victim.until(b"end")
        assert [(t, p) for t, p, _ in victim.heard[:-1]] == [(t, b"true") for t in topics]
    with gate.client("pi-2") as later:  # nothing was retained either
        later.subscribe(*topics)
        later.ping()
        assert later.heard == []


def test_poisoning_anothers_presence(gate):
    """By a retained message, and by a last will."""
    with gate.client("pi-2") as victim:
        victim.publish(TOPICS.presence("pi-2"), b"online", retain=True)
    with gate.client("pi-1") as intruder:
        intruder.publish(TOPICS.presence("pi-2"), b"offline", retain=True)
        intruder.publish(TOPICS.presence("pi-2"), b"", retain=True)  # would delete it
    will = (TOPICS.presence("pi-2"), b"offline")
    with contextlib.suppress(TurnedAwayError):  # as good
        gate.client("pi-1", will=will).drop()
    gate.client("pi-3", will=(TOPICS.presence("pi-3"), b"gone")).drop()
    with gate.client("coordinator") as coordinator:
        coordinator.subscribe(TOPICS.presence("+"))
        coordinator.until(b"gone")
        coordinator.ping()
        heard = {t: p for t, p, _ in coordinator.heard}
        assert heard[TOPICS.presence("pi-2")] == b"online"


def test_the_coordinators_certificate_is_not_the_devices(gate):
    """It cannot speak in a device's name at the broker either, nor say who is there."""
    with ears(gate) as coordinator, gate.client("pi-1") as device:
        for make in OWN:
            coordinator.publish(make("pi-1"), b"forged", retain=True)
        device.publish(TOPICS.outbox("pi-1"), b"mine")
        coordinator.until(b"mine")
        assert b"forged" not in [p for _, p, _ in coordinator.heard]


def test_another_fleets_topics(gate):
    with gate.client("coordinator") as coordinator, gate.client("pi-1") as device:
        device.subscribe("covey/other/round", "covey/other/all", TOPICS.all)
        coordinator.publish("covey/other/round", b"x", retain=True)
        coordinator.publish("covey/other/all", b"x")
        coordinator.publish(TOPICS.all, b"end")
        device.until(b"end")
        assert device.heard == [(TOPICS.all, b"end", False)]


# -- hearing what one may not ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "wanted",
    ["#", "+/#", "covey/#", "+/+/+/+", f"covey/{FLEET}/#", f"covey/{FLEET}/+/pi-2", "all three"],
)
def test_subscribing_to_what_others_say_and_are_told(gate, wanted):
    """mosquitto grants such a subscription, and then delivers nothing."""
    others = [TOPICS.inbox("pi-2"), *(make("pi-2") for make in OWN)]
    filters = others if wanted == "all three" else [wanted]
    with (
        ears(gate) as coordinator,
        gate.client("pi-1") as intruder,
        gate.client("pi-2") as victim,
    ):
        intruder.subscribe(*filters, TOPICS.inbox("pi-1"))
        victim.subscribe(TOPICS.inbox("pi-2"))
        coordinator.publish(TOPICS.inbox("pi-2"), b"for pi-2 alone")
        for make in OWN:
            victim.publish(make("pi-2"), b"to the coordinator alone", retain=True)
        coordinator.publish(TOPICS.inbox("pi-1"), b"for pi-1")
        intruder.until(b"for pi-1")
        intruder.ping()
        assert {t for t, _, _ in intruder.heard} == {TOPICS.inbox("pi-1")}
        victim.until(b"for pi-2 alone")
        coordinator.until(b"to the coordinator alone")
    with gate.client("pi-1") as later:  # nor what is retained
        later.subscribe(*filters)
        later.ping()
        assert [t for t, _, _ in later.heard if t in others] == []


def test_subscribing_to_the_brokers_own_topics(gate):
    """Who is connected, and how much they send, is in mosquitto's $SYS."""
    with gate.client("pi-1") as intruder, gate.client("coordinator") as coordinator:
        intruder.subscribe("$SYS/#", TOPICS.all)
        coordinator.publish(TOPICS.all, b"end")
        intruder.until(b"end")
        assert [t for t, _, _ in intruder.heard] == [TOPICS.all]


# -- too much -------------------------------------------------------------------------------------


def test_a_packet_above_the_limit_ends_its_senders_connection(gate):
    topic = TOPICS.upload("pi-1")
    with ears(gate) as coordinator, gate.client("pi-1") as device:
        device.publish(topic, b"m" * MAX_PAYLOAD_BYTES)
        coordinator.until(b"m" * MAX_PAYLOAD_BYTES)
        with pytest.raises(TurnedAwayError):
            device.publish(topic, b"x" * MAX_PACKET_BYTES)
        coordinator.ping()
        assert len(coordinator.heard) == 1


def test_a_packet_announced_as_huge_is_not_waited_for(gate):
    """256 MiB, the largest that MQTT can announce, before anybody is let in and after."""
    assert gate.broker is not None
    with gate.client("pi-1") as device:
        device.socket.sendall(b"\x32\xff\xff\xff\x7f")
        with pytest.raises(TurnedAwayError):
            device.ping()
    with gate.client("pi-1") as device:
        device.ping()


def test_one_certificate_is_one_connection(gate):
    """However many a device opens: each ends the one before."""
    context = gate.context(gate.pair("pi-1"))
    clients = [gate.raw(context, client_id=f"id-{i}") for i in range(20)]
    for client in clients[:-1]:
        with pytest.raises(TurnedAwayError):
            client.ping()
    clients[-1].ping()
    clients[-1].close()


# -- revoked --------------------------------------------------------------------------------------


def test_revoked_before_it_connects(own_gate):
    gate = own_gate
    device, other = gate.context(gate.pair("pi-1")), gate.context(gate.pair("pi-2"))
    assert gate.lets_in(device)
    gate.revoked = ("pi-1",)
    assert gate.admit(gate.access(names=False))  # by its certificate alone
    assert not gate.lets_in(device)
    assert gate.lets_in(other)


def test_revoked_while_it_is_connected(own_gate):
    """It neither says nor hears a thing from then on; to the others nothing happens."""
    gate = own_gate
    with (
        ears(gate) as coordinator,
        gate.client("pi-1") as revoked,
        gate.client("pi-2") as other,
    ):
        heard = (TOPICS.all, TOPICS.inbox("pi-1"))
        revoked.subscribe(*heard)
        revoked.publish(TOPICS.outbox("pi-1"), b"before")
        gate.revoked = ("pi-1",)
        assert gate.admit()
        for make in OWN:
            revoked.publish(make("pi-1"), b"after", retain=True)
        for topic in heard:
            coordinator.publish(topic, b"not for the revoked")
        revoked.ping()
        other.publish(TOPICS.outbox("pi-2"), b"end")
        coordinator.until(b"end")
        assert [p for _, p, _ in coordinator.heard] == [b"before", b"end"]
        assert revoked.heard == []


def test_revoked_and_resuming_its_tls_session(own_gate):
    """A resumed session shows no certificate, and so might escape the list of revoked ones."""
    gate = own_gate
    for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
        context = gate.context(gate.pair("pi-1"))
        context.minimum_version = context.maximum_version = version
        gate.revoked = ()
        gate.admit()
        with gate.raw(context) as first:
            first.ping()
            session = first.socket.session
        with gate.raw(context, session=session) as again:
            assert again.socket.session_reused
            again.ping()
            session = again.socket.session
        gate.revoked = ("pi-1",)
        gate.admit(gate.access(names=False))
        assert not gate.lets_in(context, session=session)


def test_a_revoked_devices_name_lives_on_with_a_new_certificate(own_gate):
    """Revoking takes away a certificate. Who enrols the name again gets in."""
    gate = own_gate
    old = gate.context(gate.pair("pi-1"))
    gate.revoked = ("pi-1",)
    gate.admit()
    assert not gate.lets_in(old)
    gate.admit(gate.access(names=False))
    with ears(gate) as coordinator, gate.client("pi-1") as new:
        new.publish(TOPICS.outbox("pi-1"), b"back")
        coordinator.until(b"back")
    assert not gate.lets_in(old)


# -- floods ---------------------------------------------------------------------------------------


def test_a_flood_of_connections_leaves_those_who_are_in_alone(tmp_path):
    """Strangers get as far as the handshake. They can fill the places that are left, while they last."""
    gate = Gate(tmp_path / "gate", connections=8)
    port = gate.start().port
    try:
        with ears(gate) as coordinator, gate.client("pi-1") as device:
            flood = [socket.create_connection(("127.0.0.1", port), 20) for _ in range(30)]
            flood[0].sendall(bytes((CONNECT,)))
            device.publish(TOPICS.outbox("pi-1"), b"in the flood")
            coordinator.until(b"in the flood")
            assert not gate.lets_in(gate.context(gate.pair("pi-2")))
            for connection in flood:
                connection.close()
            device.ping()
            gate.client("pi-2").close()
    finally:
        gate.stop()
