"""The broker authority's certificates, as TLS libraries see them."""

import ssl
import subprocess
import time
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import dsa, ec, ed448, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from hypothesis import given, settings
from hypothesis import strategies as st

from covey_coordinator import pki
from covey_coordinator.pki import DAY_S, Authority, Pair
from covey_shared.errors import ConfigError, MalformedError, RefusedError, RemoteProtocolError

NOW = int(time.time())
HOSTS = ("farm.lan", "localhost", "127.0.0.1", "::1")


@pytest.fixture(scope="module")
def authority() -> Authority:
    return pki.make_authority("farm", NOW)


def csr_of(key: object, subject: str = "anything", *extensions: x509.ExtensionType) -> bytes:
    """A request as a device makes it, or a liar."""
    builder = x509.CertificateSigningRequestBuilder().subject_name(
        x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject)])
    )
    for extension in extensions:
        builder = builder.add_extension(extension, critical=True)
    algorithm = (
        None
        if isinstance(key, ed25519.Ed25519PrivateKey | ed448.Ed448PrivateKey)
        else hashes.SHA256()
    )
    return builder.sign(key, algorithm).public_bytes(serialization.Encoding.DER)  # type: ignore[arg-type]


def device_pair(
    authority: Authority, name: str = "pi-1", key: object = None, **times: int
) -> tuple[bytes, Pair]:
    key = key or ec.generate_private_key(ec.SECP256R1())
    der = pki.client_certificate(
        authority, csr_of(key), name, days=times.get("days", 90), now_unix=times.get("now", NOW)
    )
    private = key.private_bytes(  # type: ignore[attr-defined]
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    return der, Pair(ssl.DER_cert_to_PEM_cert(der).encode(), private)


def context(directory: Path, purpose: ssl.Purpose, authority: Authority, pair: Pair | None):
    made = ssl.create_default_context(purpose, cadata=authority.der)
    made.verify_flags |= ssl.VERIFY_X509_STRICT
    if purpose is ssl.Purpose.CLIENT_AUTH:
        made.verify_mode = ssl.CERT_REQUIRED
    if pair is not None:
        (directory / "pair.pem").write_bytes(pair.key + pair.certificate)
        made.load_cert_chain(directory / "pair.pem")
    return made


def shake(server: ssl.SSLContext, client: ssl.SSLContext, host: str = "127.0.0.1"):
    """A handshake in memory -> the two connections. Raises ssl.SSLError of whoever refuses."""
    a, b = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = (
        server.wrap_bio(a, b, server_side=True),
        client.wrap_bio(b, a, server_hostname=host),
    )
    for _ in range(10):
        done = 0
        for end in ends:
            try:
                end.do_handshake()
                done += 1
            except ssl.SSLWantReadError:
                pass
        if done == 2:
            return ends
    raise AssertionError("no handshake")


@pytest.mark.parametrize("host", HOSTS)
def test_a_device_and_the_broker_believe_each_other(
    tmp_path: Path, authority: Authority, host: str
):
    """Under the strict rules of RFC 5280, by every name of the server."""
    pair = pki.server_certificate(authority, HOSTS, days=90, now_unix=NOW)
    server = context(tmp_path, ssl.Purpose.CLIENT_AUTH, authority, pair)
    client = context(tmp_path, ssl.Purpose.SERVER_AUTH, authority, device_pair(authority)[1])
    ours, _ = shake(server, client, host)
    peer = ours.getpeercert()
    assert peer is not None
    assert dict(part[0] for part in peer["subject"]) == {"commonName": "pi-1"}
    with pytest.raises(ssl.SSLCertVerificationError, match="is not valid for"):
        shake(server, client, "other.lan")


def test_an_ed25519_key_will_do(tmp_path: Path, authority: Authority):
    pair = pki.server_certificate(authority, HOSTS, days=90, now_unix=NOW)
    server = context(tmp_path, ssl.Purpose.CLIENT_AUTH, authority, pair)
    _, mine = device_pair(authority, key=ed25519.Ed25519PrivateKey.generate())
    shake(server, context(tmp_path, ssl.Purpose.SERVER_AUTH, authority, mine))


def test_neither_kind_passes_for_the_other(tmp_path: Path, authority: Authority):
    """A device cannot play the broker, nor can the broker's certificate connect as a client."""
    _, device = device_pair(authority, "localhost")
    broker = pki.server_certificate(authority, HOSTS, days=90, now_unix=NOW)
    server = context(tmp_path, ssl.Purpose.CLIENT_AUTH, authority, broker)
    with pytest.raises(ssl.SSLError, match=r"unsuitable|purpose"):
        shake(server, context(tmp_path, ssl.Purpose.SERVER_AUTH, authority, broker))
    server = context(tmp_path, ssl.Purpose.CLIENT_AUTH, authority, device)
    client = context(tmp_path, ssl.Purpose.SERVER_AUTH, authority, device)
    with pytest.raises(ssl.SSLError, match=r"unsuitable|purpose"):
        shake(server, client, "localhost")


def test_another_authority_of_the_same_name_is_refused(tmp_path: Path, authority: Authority):
    rogue = pki.make_authority("farm", NOW)
    broker = pki.server_certificate(authority, HOSTS, days=90, now_unix=NOW)
    server = context(tmp_path, ssl.Purpose.CLIENT_AUTH, authority, broker)
    client = context(tmp_path, ssl.Purpose.SERVER_AUTH, authority, device_pair(rogue)[1])
    with pytest.raises(ssl.SSLError, match=r"verify failed|unable to get"):
        shake(server, client)


def test_certificates_end(tmp_path: Path, authority: Authority):
    broker = pki.server_certificate(authority, HOSTS, days=90, now_unix=NOW)
    server = context(tmp_path, ssl.Purpose.CLIENT_AUTH, authority, broker)
    _, ended = device_pair(authority, days=10, now=NOW - 11 * DAY_S)
    with pytest.raises(ssl.SSLError, match="expired"):
        shake(server, context(tmp_path, ssl.Purpose.SERVER_AUTH, authority, ended))


def test_the_revocation_list_is_obeyed(tmp_path: Path, authority: Authority):
    broker = pki.server_certificate(authority, HOSTS, days=90, now_unix=NOW)
    (der, revoked), (_, other) = device_pair(authority), device_pair(authority, "pi-2")
    for serials, pair, refused in (
        ([pki.read_leaf(der).serial], revoked, True),
        ([pki.read_leaf(der).serial, 7], other, False),
        ([], revoked, False),
    ):
        (tmp_path / "crl.pem").write_bytes(pki.revocation_list(authority, serials, NOW))
        server = context(tmp_path, ssl.Purpose.CLIENT_AUTH, authority, broker)
        server.load_verify_locations(tmp_path / "crl.pem")
        server.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF
        client = context(tmp_path, ssl.Purpose.SERVER_AUTH, authority, pair)
        if refused:
            with pytest.raises(ssl.SSLError, match="revoked"):
                shake(server, client)
        else:
            shake(server, client)


def test_a_list_is_read_by_its_own_authority(authority: Authority):
    pem = pki.revocation_list(authority, [5, 2**150], NOW)
    assert pki.listed(authority, pem) == {5, 2**150}
    assert pki.listed(authority, pki.revocation_list(authority, [], NOW)) == frozenset()
    assert pki.listed(pki.make_authority("farm", NOW), pem) is None
    assert pki.listed(authority, pem[:100]) is None


def test_openssl_finds_nothing_to_object_to(tmp_path: Path, authority: Authority):
    """Strictly, with the purposes, and with the revocation list, thirty years less a month from now."""
    (tmp_path / "ca.pem").write_bytes(authority.pem)
    (tmp_path / "crl.pem").write_bytes(pki.revocation_list(authority, [1, 2**150], NOW))
    broker = pki.server_certificate(authority, HOSTS, days=99_999, now_unix=NOW)
    (tmp_path / "server.pem").write_bytes(broker.certificate)
    (tmp_path / "client.pem").write_bytes(device_pair(authority, days=99_999)[1].certificate)
    far = str(NOW + (pki.AUTHORITY_DAYS - 30) * DAY_S)
    for purpose in ("server", "client"):
        command = (
            *("openssl", "verify", "-x509_strict", "-purpose", f"ssl{purpose}", "-attime", far),
            *("-crl_check", "-CRLfile", tmp_path / "crl.pem", "-CAfile", tmp_path / "ca.pem"),
        )
        done = subprocess.run(
            [*command, tmp_path / f"{purpose}.pem"], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr


# -- what a device may ask for -----------------------------------------------------------------------


def test_nothing_of_a_request_but_its_key_is_believed(authority: Authority):
    key = ec.generate_private_key(ec.SECP256R1())
    greedy = csr_of(
        key,
        "coordinator",
        x509.BasicConstraints(ca=True, path_length=None),
        x509.SubjectAlternativeName([x509.DNSName("farm.lan")]),
        x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]),
    )
    der = pki.client_certificate(authority, greedy, "pi-1", days=90, now_unix=NOW)
    certificate, leaf = x509.load_der_x509_certificate(der), pki.read_leaf(der)
    assert certificate.public_key() == key.public_key()
    assert certificate.subject.rfc4514_string() == "CN=pi-1"
    extensions = certificate.extensions
    assert not extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert [*extensions.get_extension_for_class(x509.ExtendedKeyUsage).value] == [
        ExtendedKeyUsageOID.CLIENT_AUTH
    ]
    assert not extensions.get_extension_for_class(x509.KeyUsage).value.key_cert_sign
    assert (leaf.name, leaf.hosts) == ("pi-1", frozenset())
    assert (leaf.issued_unix, leaf.not_after_unix) == (NOW, NOW + 90 * DAY_S)
    assert leaf.serial == certificate.serial_number


@pytest.mark.parametrize(
    "make",
    [
        lambda: rsa.generate_private_key(public_exponent=65537, key_size=1024),  # noqa: S505
        lambda: rsa.generate_private_key(public_exponent=65537, key_size=2048),
        lambda: ec.generate_private_key(ec.SECP384R1()),
        lambda: ec.generate_private_key(ec.SECP256K1()),
        lambda: dsa.generate_private_key(key_size=1024),  # noqa: S505
        ed448.Ed448PrivateKey.generate,
    ],
    ids=["rsa-1024", "rsa-2048", "p-384", "secp256k1", "dsa", "ed448"],
)
def test_other_kinds_of_keys_are_refused(make: object):
    with pytest.raises(RefusedError, match="a key on P-256 or Ed25519, not of another kind"):
        pki.requested_key(csr_of(make()))  # type: ignore[operator]


@pytest.mark.parametrize("kind", ["p-256", "ed25519"])
def test_a_request_is_signed_with_its_own_key(kind: str):
    """Else one could have another's key certified in one's own name."""
    key: object = (
        ec.generate_private_key(ec.SECP256R1())
        if kind == "p-256"
        else ed25519.Ed25519PrivateKey.generate()
    )
    good = csr_of(key, "abcdefgh")
    assert pki.requested_key(good)
    with pytest.raises(RefusedError, match="not signed with its own key"):
        pki.requested_key(good.replace(b"abcdefgh", b"abcdefgX"))


@given(st.binary(max_size=300))
def test_garbage_is_no_request(data: bytes):
    with pytest.raises(MalformedError):
        pki.requested_key(data)


GOOD = csr_of(ec.generate_private_key(ec.SECP256R1()))


@settings(max_examples=300)
@given(st.integers(0, len(GOOD) - 1), st.integers(1, 255))
def test_a_request_with_one_byte_changed_is_refused(at: int, change: int):
    damaged = bytearray(GOOD)
    damaged[at] ^= change
    with pytest.raises(RemoteProtocolError):
        pki.requested_key(bytes(damaged))


def test_a_request_is_short():
    with pytest.raises(MalformedError, match="at most 4096 bytes"):
        pki.requested_key(GOOD + bytes(4096))
    with pytest.raises(MalformedError, match="no certificate request"):
        pki.requested_key(GOOD + b"\0")


# -- names, ends, files ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given_", "host"),
    [
        ("Farm.LAN", "farm.lan"), ("farm.lan.", "farm.lan"), ("10.0.0.1", "10.0.0.1"),
        ("[::1]", "::1"), ("0:0::1", "::1"), ("pi_3.local", "pi_3.local"),
    ],
)  # fmt: skip
def test_hosts_have_one_spelling(authority: Authority, given_: str, host: str):
    pair = pki.server_certificate(authority, [given_, host], days=1, now_unix=NOW)
    leaf = pki.read_leaf(x509.load_pem_x509_certificate(pair.certificate))
    assert leaf.hosts == {host}


@pytest.mark.parametrize(
    "name", ["", "a b", "mqtts://x", "x:1", "ä.lan", "-a", "a..b", "a\n", "*.a"]
)
def test_what_is_no_host_is_named(authority: Authority, name: str):
    with pytest.raises(ConfigError, match="is no host: give a name of letters"):
        pki.server_certificate(authority, [name], days=1, now_unix=NOW)


def test_a_certificate_is_due_at_two_thirds_of_its_life(authority: Authority):
    leaf = pki.read_leaf(device_pair(authority, days=90)[0])
    assert not leaf.due(NOW + 60 * DAY_S - 1)
    assert leaf.due(NOW + 60 * DAY_S)


def test_no_certificate_outlives_the_authority(authority: Authority):
    leaf = pki.read_leaf(device_pair(authority, days=99_999)[0])
    assert leaf.not_after_unix == NOW + pki.AUTHORITY_DAYS * DAY_S
    with pytest.raises(ConfigError, match="authority's own certificate has ended"):
        device_pair(authority, now=leaf.not_after_unix)


def test_the_authority_is_kept(tmp_path: Path, authority: Authority):
    pki.save_authority(tmp_path, authority)
    assert (tmp_path / "ca.key").stat().st_mode & 0o777 == 0o600
    assert pki.load_authority(tmp_path).der == authority.der
    assert "PrivateKey" not in repr(authority)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("ca.crt", None, "ca.crt cannot be read: No such file or directory"),
        ("ca.key", None, "ca.key cannot be read: No such file or directory"),
        ("ca.crt", b"x", "ca.crt is no certificate in PEM; restore it"),
        ("ca.key", b"x", "ca.key is no private key of a broker authority; restore it"),
        ("ca.key", "other", "ca.key does not belong to ca.crt beside it; restore both"),
    ],
)
def test_a_damaged_authority_is_named(
    tmp_path: Path, authority: Authority, name: str, data: bytes | str | None, message: str
):
    pki.save_authority(tmp_path, authority)
    if data is None:
        (tmp_path / name).unlink()
    elif data == "other":
        pki.save_authority(tmp_path, pki.make_authority("farm", NOW))
        (tmp_path / "ca.crt").write_bytes(authority.pem)
    else:
        (tmp_path / name).write_bytes(data)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=message):
        pki.load_authority(tmp_path)


def test_an_authority_that_others_can_read_is_refused(tmp_path: Path, authority: Authority):
    pki.save_authority(tmp_path, authority)
    (tmp_path / "ca.key").chmod(0o640)
    with pytest.raises(ConfigError, match=r"can be read by others \(mode 0640\); run: chmod 600"):
        pki.load_authority(tmp_path)
