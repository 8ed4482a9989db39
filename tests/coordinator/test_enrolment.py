"""The enrolment desk: who is let in, once; who is refused, and told why; what a power cut leaves."""

import errno
import logging
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import NameOID
from hypothesis import given, settings
from hypothesis import strategies as st

from covey_coordinator import files, pki
from covey_coordinator.enrolment import EnrolmentDesk, Peer
from covey_coordinator.enrolment import desk as desk_module
from covey_coordinator.fleet import FleetDirectory
from covey_coordinator.tokens import TokenBook, TokenRecord
from covey_shared import wire
from covey_shared.config import Config
from covey_shared.enrolment import Enrolled, EnrolRefused, FleetTrust, Token, fingerprint
from covey_shared.errors import ConfigError
from covey_shared.messages import Certificate
from enrolling import ADDRESS, NOW, Applicant, Bench, new_csr, who_is_there

DAY_S = 86_400


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path / "fleet")


# -- the way in --------------------------------------------------------------------------------------


def test_whom_to_trust_is_what_the_token_pins(bench: Bench):
    token = bench.token("pi-1")
    trust = bench.answer(who_is_there(token))
    assert isinstance(trust, FleetTrust)
    assert fingerprint(wire.body_of(trust)) == token.fingerprint == bench.desk.fingerprint
    assert (trust.fleet, trust.fleet_ca) == ("farm", bench.fleet.trust.ca)
    assert trust.tls_ca == bench.fleet.tls.authority.der


def test_a_device_joins(bench: Bench):
    pi = Applicant(1)
    enrolled = bench.enrol("pi-1", pi)
    assert (enrolled.fleet, enrolled.device, enrolled.identity) == ("farm", "pi-1", pi.public)
    assert enrolled.broker_url == "mqtts://127.0.0.1:8883"
    assert bench.certificate(enrolled) == Certificate(
        "farm",
        "pi-1",
        pi.public,
        NOW,
        NOW + 90 * DAY_S,  # type: ignore[arg-type]
    )
    leaf = pki.read_leaf(enrolled.tls_certificate)
    assert (leaf.name, leaf.not_after_unix) == ("pi-1", NOW + 90 * DAY_S)
    assert pki.key_of(enrolled.tls_certificate) == pi.tls_key.public_key()
    (entry,) = bench.fleet.devices()
    assert (entry.name, entry.identity, entry.status(NOW)) == ("pi-1", pi.public, "active")
    assert bench.said == [f"device pi-1 joined with the identity {_grouped(pi.public)}"]


def _grouped(public: bytes) -> str:
    text = public.hex()[:32]
    return " ".join(text[i : i + 4] for i in range(0, 32, 4))


def test_an_answer_that_was_lost_is_given_again(bench: Bench):
    pi, token = Applicant(1), bench.token("pi-1")
    first = bench.answer(pi.asks(token))
    bench.now += 3600
    assert bench.answer(pi.asks(token)) == first
    # it may have lost its TLS key with the answer
    second = bench.answer(pi.asks(token, new_csr()[1]))
    assert isinstance(second, Enrolled)
    assert isinstance(first, Enrolled)
    assert second.tls_certificate != first.tls_certificate
    record = bench.fleet.book.record("pi-1")
    assert record is not None
    assert (record.token_uses, len(record.grants)) == (3, 2)
    assert len(bench.said) == 1


# -- tokens ------------------------------------------------------------------------------------------


def test_a_token_used_by_another_is_refused_and_told(
    bench: Bench, caplog: pytest.LogCaptureFixture
):
    token, pi, thief = bench.token("pi-1"), Applicant(1), Applicant(2)
    assert isinstance(bench.answer(pi.asks(token)), Enrolled)
    with caplog.at_level(logging.DEBUG):
        reason = bench.refused(thief.asks(token), Peer("6.6.6.6"))
    assert reason.startswith("this token was used by another device; if that was not yours, tell")
    assert bench.said[-1].startswith("WARNING: the token for pi-1 came a second time, from 6.6.6.6")
    assert "may have been stolen" in bench.said[-1]
    record = bench.fleet.book.record("pi-1")
    assert record is not None
    assert [(r.peer, r.reason) for r in record.refusals] == [("6.6.6.6", reason)]
    assert record.key == pi.public
    assert token.secret.hex() not in caplog.text
    assert token.encode().rsplit(":", 1)[1] not in caplog.text
    # and who came first is not disturbed
    assert isinstance(bench.answer(pi.asks(token)), Enrolled)


def test_a_token_ends(bench: Bench):
    token, pi = bench.token("pi-1", hours=2), Applicant(1)
    bench.now += 7199
    assert isinstance(bench.answer(pi.asks(token)), Enrolled)
    bench.now += 1
    assert bench.refused(pi.asks(token)) == "this token has expired; ask for a new one"
    assert bench.refused(Applicant(2).asks(bench.token("pi-2", hours=-1))) == (
        "this token has expired; ask for a new one"
    )
    assert bench.fleet.book.record("pi-2") is None


def test_a_token_of_another_fleet_is_none(
    bench: Bench, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    other = Bench(tmp_path / "other")
    token = other.token("pi-1")
    assert "not one of this coordinator's" in bench.refused(Applicant(1).asks(token))
    trust = bench.answer(who_is_there(token))
    assert fingerprint(wire.body_of(trust)) != token.fingerprint
    assert f"{ADDRESS} has a token of another fleet" in caplog.text


def test_a_newer_token_replaces_one_that_was_not_used(bench: Bench):
    old, new, pi = bench.token("pi-1"), bench.token("pi-1"), Applicant(1)
    assert "or was withdrawn" in bench.refused(pi.asks(old))
    assert isinstance(bench.answer(pi.asks(new)), Enrolled)


def test_guessing_is_slow(bench: Bench):
    """Per address, or per /64: after five wrong ones even the right one has to wait."""
    token, pi = bench.token("pi-1"), Applicant(1)
    for n in range(desk_module.FAILURES):
        wrong = Token("h", 1, bytes(32), n.to_bytes(16, "big"))
        assert "not one of" in bench.refused(pi.asks(wrong), Peer(f"2001:db8::{n}"))
    right = pi.asks(token)
    assert bench.refused(right, Peer("2001:db8::ffff:1")) == (
        "too many wrong tokens from your address; wait a minute"
    )
    assert bench.fleet.book.record("pi-1") is None
    bench.now += 59
    assert "too many" in bench.refused(right, Peer("2001:db8::1"))
    assert isinstance(bench.answer(right, Peer("2001:db8:0:1::1")), Enrolled)  # a neighbour
    bench.now += 2
    assert isinstance(bench.answer(right, Peer("2001:db8::1")), Enrolled)


def test_wrong_addresses_are_not_remembered_without_end(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(desk_module, "MAX_ADDRESSES", 10)
    limit = desk_module.FailureLimit()
    for n in range(100):
        limit.failed(f"10.0.0.{n}", NOW)
    assert len(limit._failures) == 10


@pytest.mark.parametrize("again", [False, True])
def test_of_two_at_once_exactly_one_wins(
    bench: Bench, again: bool, monkeypatch: pytest.MonkeyPatch
):
    """Desks of their own, as two processes would have them, on a disk that takes its time."""
    if again:
        bench.enrol("pi-1", Applicant(99))
    token = bench.token("pi-1", again=again)
    applicants = [Applicant(n) for n in range(1, 9)]
    real = TokenBook.save

    def save(book: TokenBook, hash_: str, record: TokenRecord) -> None:
        time.sleep(0.1)
        real(book, hash_, record)

    monkeypatch.setattr(TokenBook, "save", save)
    answers: dict[int, object] = {}
    start = threading.Barrier(len(applicants))

    def use(applicant: Applicant) -> None:
        desk = EnrolmentDesk(bench.fleet)
        start.wait()
        data = desk.handle(applicant.asks(token), Peer(f"10.0.0.{applicant.seed}"), NOW)
        answers[applicant.seed] = wire.decode(data).message

    threads = [threading.Thread(target=use, args=(a,)) for a in applicants]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    winners = [seed for seed, answer in answers.items() if isinstance(answer, Enrolled)]
    assert len(winners) == 1
    assert sum(isinstance(answer, EnrolRefused) for answer in answers.values()) == 7
    record = bench.fleet.book.record("pi-1")
    assert record is not None
    assert record.key == applicants[winners[0] - 1].public


# -- names and identities ----------------------------------------------------------------------------


def test_a_taken_name_needs_again(bench: Bench):
    bench.enrol("pi-1", Applicant(1))
    with pytest.raises(ConfigError, match=r"device pi-1 is there already; choose another.*--again"):
        bench.token("pi-1")


def test_two_tokens_for_one_name_let_one_device_in(bench: Bench):
    """The second was made while nobody had used the first."""
    first = bench.token("pi-1")
    bench.answer(Applicant(1).asks(first))
    with pytest.raises(ConfigError, match="is there already"):
        bench.token("pi-1")
    hash_, record = next(iter(bench.fleet.tokens.all().items()))
    record.used_by = ""  # as if it had been made beside it
    bench.fleet.tokens.save(hash_, record)
    assert "there is a device pi-1 already" in bench.refused(Applicant(2).asks(first))


def test_a_device_that_lost_its_keys_is_replaced(bench: Bench):
    old, new = Applicant(1), Applicant(2)
    bench.enrol("pi-1", old)
    bench.token("pi-1", again=True)
    assert bench.renew(old)  # until the token is used, nothing changes
    bench.now += 60
    enrolled = bench.enrol("pi-1", new, again=True)
    (entry,) = bench.fleet.devices()
    assert (entry.identity, entry.status(bench.now)) == (new.public, "active")
    assert bench.certificate(enrolled).identity == new.public
    assert bench.fleet.revoked_identities() == {old.public}
    assert bench.fleet.revoked_names() == ()
    assert _revoked_serials(bench.fleet) == {old.peer().serial}
    assert "another identity" in bench.refused(old.renews("pi-1"), new.peer())
    assert "not one of this device's, or not any more" in bench.refused(
        new.renews("pi-1"), old.peer()
    )


def test_a_device_that_kept_its_identity_gets_new_certificates(bench: Bench):
    """Its TLS certificate ended, say; the one it had does not count any more."""
    pi = Applicant(1)
    before = bench.enrol("pi-1", pi)
    bench.now += 100 * DAY_S
    assert bench.fleet.devices()[0].status(bench.now) == "ended"
    after = bench.enrol("pi-1", pi, again=True)
    assert after.tls_certificate != before.tls_certificate
    assert bench.certificate(after).not_after_unix == bench.now + 90 * DAY_S
    assert bench.fleet.revoked_identities() == frozenset()
    assert bench.fleet.devices()[0].status(bench.now) == "active"


def test_an_identity_has_one_name(bench: Bench):
    pi = Applicant(1)
    bench.enrol("pi-1", pi)
    assert "registered under another name" in bench.refused(pi.asks(bench.token("pi-2")))


def test_the_coordinator_s_name_is_no_device_s(bench: Bench):
    with pytest.raises(ConfigError, match="that is the coordinator's own; choose another"):
        bench.token("coordinator")


# -- what a request may not be -----------------------------------------------------------------------


def _csr(key: Any, subject: str = "x", *extensions: Any) -> bytes:
    builder = x509.CertificateSigningRequestBuilder().subject_name(
        x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject)])
    )
    for extension in extensions:
        builder = builder.add_extension(extension, critical=True)
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.DER)


def test_a_bad_request_does_not_spend_the_token(bench: Bench):
    token, pi = bench.token("pi-1"), Applicant(1)
    weak = _csr(rsa.generate_private_key(public_exponent=65537, key_size=1024))  # noqa: S505
    assert "P-256 or Ed25519" in bench.refused(pi.asks(token, weak))
    assert "no certificate request" in bench.refused(pi.asks(token, b"\x30\x00"))
    stolen = pi.csr[:-8] + bytes(8)
    assert bench.refused(pi.asks(token, stolen))
    pi.fleet = "barn"
    assert bench.refused(pi.asks(token)) == "this is fleet farm, not barn"
    pi.fleet = "farm"
    forged = wire.decode(pi.asks(token)).message
    assert "not signed by the identity it names" in bench.refused(Applicant(2).signed(forged))
    assert isinstance(bench.answer(pi.asks(token)), Enrolled)


def test_what_else_a_csr_asks_for_is_not_given(bench: Bench):
    key = ec.generate_private_key(ec.SECP256R1())
    greedy = _csr(
        key,
        "coordinator",
        x509.BasicConstraints(ca=True, path_length=None),
        x509.SubjectAlternativeName([x509.DNSName("localhost")]),
    )
    answer = bench.answer(Applicant(1).asks(bench.token("pi-1"), greedy))
    assert isinstance(answer, Enrolled)
    leaf = pki.read_leaf(answer.tls_certificate)
    assert (leaf.name, leaf.hosts) == ("pi-1", frozenset())
    certificate = x509.load_der_x509_certificate(answer.tls_certificate)
    constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints)
    assert not constraints.value.ca


@pytest.fixture(scope="module")
def shared_bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("enrolment") / "fleet")


@settings(max_examples=200, deadline=None)
@given(data=st.binary(max_size=400), code=st.sampled_from([None, *range(60, 75), 1, 2]))
def test_garbage_is_answered_with_a_refusal(shared_bench: Bench, data: bytes, code: int | None):
    if code is not None:
        data = bytes((1, code)) + data
    assert isinstance(shared_bench.answer(data), EnrolRefused)


SAMPLE = Applicant(7).asks(Token("h", 1, bytes(32), bytes(16)))


@settings(max_examples=100, deadline=None)
@given(at=st.integers(0, len(SAMPLE) - 1), change=st.integers(1, 255))
def test_a_request_that_was_tampered_with_is_refused(shared_bench: Bench, at: int, change: int):
    shared_bench.now += 61  # the limit on wrong tokens is another test's
    damaged = bytearray(SAMPLE)
    damaged[at] ^= change
    reason = shared_bench.refused(bytes(damaged))
    assert "token" not in reason  # it did not come so far


def test_messages_for_others_are_no_requests(bench: Bench):
    pi = Applicant(1)
    enrolled = bench.enrol("pi-1", pi)
    assert bench.refused(pi.signed(enrolled)) == "expected a request, got a enrolled"


# -- renewals ----------------------------------------------------------------------------------------


def test_a_device_renews(bench: Bench):
    pi = Applicant(1)
    first = bench.enrol("pi-1", pi)
    bench.now += 60 * DAY_S
    key, csr = new_csr()
    second = bench.renew(pi, csr)
    assert bench.certificate(second).issued_unix == bench.now
    assert pki.key_of(second.tls_certificate) == key.public_key()
    assert bench.renew(pi, csr) == second  # a lost answer
    # the old connection serves until the new certificate is in place
    record = bench.fleet.book.record("pi-1")
    assert record is not None
    assert len(record.grants) == 2
    assert first.certificate != second.certificate
    assert bench.fleet.book.certificate("pi-1") == second.certificate


def test_before_it_is_due_an_identity_s_certificate_stays(bench: Bench):
    pi = Applicant(1)
    first = bench.enrol("pi-1", pi)
    bench.now += 59 * DAY_S
    assert bench.renew(pi, b"").certificate == first.certificate
    assert bench.renew(pi, b"").tls_certificate == b""


def test_the_operator_wants_a_renewal(bench: Bench):
    pi = Applicant(1)
    first = bench.enrol("pi-1", pi)
    bench.now += 10
    bench.fleet.want_renewal("pi-1", bench.now)
    second = bench.renew(pi)
    assert bench.certificate(second).issued_unix == bench.now
    assert second.tls_certificate != first.tls_certificate  # although the key is the same
    assert bench.renew(pi) == second


def test_a_renewal_comes_over_the_device_s_own_certificate(bench: Bench):
    pi, other = Applicant(1), Applicant(2)
    bench.enrol("pi-1", pi)
    bench.enrol("pi-2", other)
    request = pi.renews("pi-1")
    assert bench.refused(request) == (
        "a renewal comes over a connection with the device's certificate"
    )
    assert bench.refused(request, other.peer()) == (
        "a renewal for pi-1 came with the certificate of pi-2"
    )
    # another device asks in this one's name, over its own connection and over the stolen one
    assert "with the certificate of pi-2" in bench.refused(other.renews("pi-1"), other.peer())
    assert "registered with another identity" in bench.refused(other.renews("pi-1"), pi.peer())
    message = wire.decode(request).message
    assert "not signed by device pi-1" in bench.refused(other.signed(message), pi.peer())
    assert "there is no device" in bench.refused(pi.renews("pi-9"), Peer(ADDRESS, "pi-9", 5))
    record = bench.fleet.book.record("pi-1")
    assert record is not None
    assert len(record.refusals) == 2


def test_the_coordinator_s_certificate_renews_nothing(bench: Bench):
    pi = Applicant(1)
    bench.enrol("pi-1", pi)
    assert "certificate of coordinator" in bench.refused(
        pi.renews("pi-1"), Peer(ADDRESS, "coordinator", 5)
    )


def test_a_device_gone_mad_is_bounded(bench: Bench, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(desk_module, "MAX_GRANTS", 3)
    pi = Applicant(1)
    bench.enrol("pi-1", pi)
    for _ in range(2):
        bench.renew(pi, new_csr()[1])
    reason = bench.refused(pi.renews("pi-1", new_csr()[1]), pi.peer())
    assert reason.startswith("3 certificates of this device have not ended")
    bench.now += 91 * DAY_S
    assert bench.renew(pi, new_csr()[1])


# -- revocation --------------------------------------------------------------------------------------


def _revoked_serials(fleet: FleetDirectory) -> set[int]:
    crl = x509.load_pem_x509_crl(fleet.tls.read("crl.pem"))
    return {entry.serial_number for entry in crl}


def test_a_revoked_device_is_out(bench: Bench):
    pi = Applicant(1)
    bench.enrol("pi-1", pi)
    bench.enrol("pi-2", Applicant(2))
    bench.renew(pi, new_csr()[1])
    generation = bench.fleet.book.generation()
    assert bench.fleet.revoke("pi-1", bench.now)
    assert bench.fleet.book.generation() != generation
    assert not bench.fleet.revoke("pi-1", bench.now)
    assert bench.fleet.revoked_names() == ("pi-1",)
    assert bench.fleet.revoked_identities() == {pi.public}
    assert len(_revoked_serials(bench.fleet)) == 2
    assert bench.refused(pi.renews("pi-1"), pi.peer()) == "device pi-1 was revoked"
    assert [e.status(bench.now) for e in bench.fleet.devices()] == ["revoked", "active"]


def test_a_revoked_identity_does_not_come_back_under_another_name(bench: Bench):
    pi = Applicant(1)
    bench.enrol("pi-1", pi)
    bench.fleet.revoke("pi-1", bench.now)
    with pytest.raises(ConfigError, match="device pi-1 was revoked"):
        bench.token("pi-1")
    for name in ("pi-1", "pi-2"):
        reason = bench.refused(pi.asks(bench.token(name, again=True)))
        assert reason.startswith("this device's identity was revoked; remove its identity key")
    enrolled = bench.enrol("pi-1", Applicant(2), again=True)
    assert bench.fleet.revoked_names() == ()
    assert bench.certificate(enrolled).identity != pi.public


def test_revoking_withdraws_tokens(bench: Bench):
    bench.enrol("pi-1", Applicant(1))
    token = bench.token("pi-1", again=True)
    bench.fleet.revoke("pi-1", bench.now)
    assert "was withdrawn" in bench.refused(Applicant(2).asks(token))


def test_a_revocation_of_what_ended_leaves_the_list(bench: Bench):
    bench.enrol("pi-1", Applicant(1))
    bench.fleet.revoke("pi-1", bench.now)
    assert len(_revoked_serials(bench.fleet)) == 1
    bench.fleet.refresh_tls(_config(bench), bench.now + 91 * DAY_S)
    assert _revoked_serials(bench.fleet) == set()


def _config(bench: Bench) -> Any:
    from covey_coordinator.config import load_fleet

    config: Config = load_fleet(bench.fleet.path)
    return config


def test_a_damaged_list_of_the_revoked_lets_nobody_in(bench: Bench):
    pi = Applicant(1)
    bench.enrol("pi-1", pi)
    (bench.fleet.path / "revoked.json").write_bytes(b"{")
    for read in (bench.fleet.devices, bench.fleet.revoked_names, bench.fleet.revoked_identities):
        with pytest.raises(ConfigError, match=r"revoked\.json is damaged"):
            read()
    assert "in trouble of its own" in bench.refused(pi.renews("pi-1"), pi.peer())


# -- power cuts and full disks -----------------------------------------------------------------------


class PowerCut(BaseException):
    """Nothing after it happens."""


@pytest.mark.parametrize("again", [False, True], ids=["new", "again"])
def test_whenever_the_power_goes_one_device_has_the_token(tmp_path: Path, again: bool):
    """Before and after every rename: whoever was first goes on, nobody else comes in, and what was
    before it is revoked."""
    cut = 0
    while True:
        cut += 1
        bench = Bench(tmp_path / f"fleet-{cut}")
        before, pi, thief = Applicant(1), Applicant(2), Applicant(3)
        if again:
            bench.enrol("pi-1", before)
        token = bench.token("pi-1", again=again)
        if not _cut_after(
            cut, lambda bench=bench, pi=pi, token=token: bench.answer(pi.asks(token))
        ):
            break
        bench.desk = EnrolmentDesk(bench.fleet)
        if _spent(bench, pi):
            assert isinstance(bench.answer(thief.asks(token)), EnrolRefused)
        answer = bench.answer(pi.asks(token))
        assert isinstance(answer, Enrolled)
        pi.enrolled = answer
        assert bench.certificate(answer).identity == pi.public
        assert [e.status(NOW) for e in bench.fleet.devices()] == ["active"]
        assert isinstance(bench.answer(thief.asks(token)), EnrolRefused)
        if again:
            assert bench.fleet.revoked_identities() == {before.public}
            assert before.peer().serial in _revoked_serials(bench.fleet)
        record = bench.fleet.book.record("pi-1")
        assert record is not None
        assert f"{pi.peer().serial:x}" in {grant.serial for grant in record.grants}
    assert cut > (10 if again else 7)


def _spent(bench: Bench, applicant: Applicant) -> bool:
    return any(r.used_by == applicant.public.hex() for r in bench.fleet.tokens.all().values())


def _cut_after(n: int, work: Any) -> bool:
    """Cut the power at the n-th write, odd ones before a rename and even ones after it."""
    real, left = Path.replace, [n]

    def replace(self: Path, target: Path) -> Path:
        for before in (True, False):
            left[0] -= 1
            if left[0] == 0:
                raise PowerCut
            if before:
                real(self, target)
        return target

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "replace", replace)
        try:
            work()
        except PowerCut:
            return True
    return False


def test_a_full_disk_is_a_refusal_and_not_the_end(bench: Bench):
    pi, token = Applicant(1), bench.token("pi-1")

    def write(*args: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files.os, "write", write)
        assert "trouble of its own; try again later" in bench.refused(pi.asks(token))
    assert isinstance(bench.answer(pi.asks(token)), Enrolled)


# -- what is kept ------------------------------------------------------------------------------------


def test_no_secret_is_kept_or_said(bench: Bench, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.DEBUG)
    token, pi = bench.token("pi-1"), Applicant(1)
    bench.answer(pi.asks(token))
    bench.refused(Applicant(2).asks(token))
    kept = b"".join(p.read_bytes() for p in bench.fleet.path.rglob("*") if p.is_file())
    shown = caplog.text + "\n".join(bench.said) + repr(token)
    encoded = token.encode().rsplit(":", 1)[1]
    for secret in (token.secret, token.secret.hex().encode(), encoded.encode()):
        assert secret not in kept
        assert secret not in shown.encode()
    for path in (
        *(bench.fleet.path / "tokens").iterdir(),
        *bench.fleet.path.glob("devices/*/*.json"),
    ):
        assert path.stat().st_mode & 0o777 == 0o600


def test_a_local_fleet_has_no_desk(tmp_path: Path):
    from covey_coordinator.config import BrokerConfig

    fleet = FleetDirectory.create(tmp_path / "fleet", "farm", BrokerConfig())
    with pytest.raises(ConfigError, match="devices join a fleet with an address"):
        EnrolmentDesk(fleet)
    with pytest.raises(
        ConfigError, match=r"tokens are for fleets with an address.*device add pi-1"
    ):
        fleet.make_token("pi-1", hours=None, again=False, now_unix=NOW)


def test_a_device_is_not_added_to_a_networked_fleet(bench: Bench):
    with pytest.raises(
        ConfigError, match=r"make their own keys and join.*covey device token --name"
    ):
        bench.fleet.add_device("pi-1", days=1, data=None)
