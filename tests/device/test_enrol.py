"""Joining a fleet, against the coordinator's real enrolment port."""

import logging
import os
import socket
import ssl
import stat
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from covey_coordinator import pki
from covey_coordinator.config import load_fleet
from covey_coordinator.fleet_ca import certify
from covey_device import enrol
from covey_device.assembly import concerns, load_device
from covey_device.audit import AuditLog
from covey_device.cli import main
from covey_device.enrol import join
from covey_device.renewal import renew
from covey_shared import wire
from covey_shared.enrolment import IdentityRequest, Token, WhoIsThere
from covey_shared.errors import (
    ConfigError,
    CoveyError,
    RefusedError,
    StorageError,
    TransportError,
)
from covey_shared.keys import SigningKey, in_groups
from enrolment_lab import HOST, Impostor, Lab, relayed, server_context

FOREVER = 2**32


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with Lab(tmp_path_factory.mktemp("lab") / "fleet") as lab:
        yield lab


@pytest.fixture
def names() -> Iterator[str]:
    """Device names that no test had yet."""
    return (f"pi-{os.urandom(4).hex()}" for _ in iter(int, 1))


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return tmp_path / "etc" / "device.toml"


def secrets_in(folder: Path, token: Token) -> list[Path]:
    """Files that hold the token's secret, in whatever spelling."""
    spelled = (token.secret, token.secret.hex().encode(), token.encode().encode()[-22:])
    files = [path for path in folder.rglob("*") if path.is_file()]
    return [p for p in files if any(s in p.read_bytes() for s in spelled)]


# -- what it leaves ----------------------------------------------------------------------------------


def test_a_device_that_joined_is_whole(lab: Lab, config: Path, names: Iterator[str]):
    name = next(names)
    token = lab.token(name)
    joined = join(token, config)
    assert (joined.device, joined.fleet, joined.waiting) == (name, "farm", False)
    assert joined.fleet_ca == lab.fleet.trust.ca
    record = lab.fleet.book.record(name)
    assert record is not None
    assert record.key == joined.identity
    parts = load_device(config)
    assert parts.identity.public == joined.identity
    assert parts.trust == lab.fleet.trust
    assert parts.config.broker.url == lab.fleet.device_broker_url(load_fleet(lab.fleet.path))
    assert parts.config.enrol is not None
    assert (parts.config.enrol.host, parts.config.enrol.port) == (HOST, lab.port)
    assert concerns(parts, time.time()) == [
        f"key `data.file`: {config.parent / 'data.npz'} does not exist: put it there, or correct [data]"
    ]
    kept = sorted(path.name for path in joined.keys.iterdir())
    assert kept == ["broker.ca", "broker.pem", "certificate", "identity.key"]
    assert {path.name for path in config.parent.iterdir()} == {
        "device.toml", "state", joined.keys.name,
    }  # fmt: skip
    for path in (config, *joined.keys.iterdir()):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(joined.keys.stat().st_mode) == 0o700
    assert secrets_in(config.parent, token) == []
    entry = AuditLog(config.parent / parts.config.state).last("enrolled")
    assert (entry["fleet"], entry["device"]) == ("farm", name)
    assert entry["identity"] == joined.identity.hex()


def test_the_command_says_what_it_did(
    lab: Lab, config: Path, names: Iterator[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.DEBUG)
    np.savez(tmp_path / "mine.npz", features=np.zeros(1), labels=np.zeros(1))
    name = next(names)
    token = lab.token(name)
    arguments = ["--config", str(config), "--data", str(tmp_path / "mine.npz")]
    ca = in_groups(lab.fleet.trust.ca)
    done = CliRunner().invoke(
        main, ["join", "-", *arguments, "--expect-ca", ca], input=token.encode() + "\n"
    )
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert lines[:2] == [f"joined fleet farm as {name}", f"fleet CA: {ca}"]
    record = lab.fleet.book.record(name)
    assert record is not None
    assert lines[2] == f"identity: {in_groups(record.key)}"
    assert lines[-2:] == [f"configuration: {config}", f"next: covey-device run --config {config}"]
    said = done.output + caplog.text + "".join(lab.said)
    assert token.encode()[-22:] not in said
    assert token.secret.hex() not in said
    checked = CliRunner().invoke(main, ["check", "--config", str(config)])
    assert checked.exit_code == 0, checked.output
    lines = checked.stdout.splitlines()
    assert lines[0] == f"device {name} of fleet farm"
    assert f"identity: {in_groups(record.key)}" in lines
    assert f"fleet CA: {ca}" in lines
    assert [line.split(":")[0] for line in lines[3:7]] == [
        "broker", "identity certificate", "TLS certificate", "renewal",
    ]  # fmt: skip


def test_the_service_s_modules_do_not_load_cryptography():
    code = "import sys, covey_device.assembly, covey_device.service, covey_device.cli\n"
    code += "assert 'cryptography' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


# -- once more ---------------------------------------------------------------------------------------


def test_a_lost_answer_is_asked_for_again_with_the_same_keys(
    lab: Lab, config: Path, names: Iterator[str], tmp_path: Path
):
    name, answers = next(names), []

    def losing(request: bytes) -> bytes:
        answer = relayed(lab.port, request)
        answers.append(answer)
        if 1 < len(answers) < 4:  # the first is the fleet's trust
            raise ConnectionResetError
        return answer

    # The fleet's own certificate: what is lost is lost on the way.
    context = server_context(lab.fleet.tls.authority, tmp_path / "tls")
    token = lab.token(name)
    with Impostor(context, losing).running() as way:
        here = replace(token, port=way.port)
        with pytest.raises(TransportError, match="try again"):
            join(here, config)
    assert not config.exists()
    assert [p.name.split("-")[0] for p in config.parent.iterdir()] == [".joining"]
    record = lab.fleet.book.record(name)
    assert record is not None  # so that it was asked for
    joined = join(token, config)
    assert joined.identity == record.key
    assert [path.name for path in config.parent.glob(".joining-*")] == []
    said = [line for line in lab.said if name in line]
    assert len(said) == 1  # one device, not two


def failing_at(step: int, how: BaseException) -> Callable[[Path, bytes], None]:
    """Writes until the given one."""
    from covey_device.keystore import write_durably

    count = iter(range(1000))

    def write(path: Path, data: bytes) -> None:
        if next(count) == step:
            raise how
        write_durably(path, data)

    return write


class PowerCutError(BaseException):
    """Nothing runs after it."""


@pytest.mark.parametrize("how", [StorageError("cannot write: No space left"), PowerCutError()])
def test_whenever_it_ends_there_is_one_whole_enrolment(
    lab: Lab,
    tmp_path: Path,
    names: Iterator[str],
    monkeypatch: pytest.MonkeyPatch,
    how: BaseException,
):
    """A full disk or a power cut at each write of a new enrolment over an old one."""
    first = next(names)
    config = tmp_path / "device.toml"
    join(lab.token(first), config)
    before = config.read_bytes()
    for step in range(20):
        token = lab.token(second := next(names))
        with monkeypatch.context() as patch:
            patch.setattr(enrol, "write_durably", failing_at(step, how))
            try:
                join(token, config, force=True)
            except (StorageError, PowerCutError):
                assert config.read_bytes() == before
                assert load_device(config).config.device == first
            else:
                break
        joined = join(token, config, force=True)  # the same token, once there is space again
        assert load_device(config).config.device == joined.device == second
        first, before = second, config.read_bytes()
    assert step == 7  # two keys, four files, device.toml twice
    assert load_device(config).config.device == second


def test_an_enrolment_is_not_written_over(lab: Lab, config: Path, names: Iterator[str]):
    join(lab.token(next(names)), config)
    before, said = config.read_bytes(), len(lab.said)
    with pytest.raises(
        ConfigError, match="is there already: this device has joined a fleet; --force"
    ):
        join(lab.token(next(names)), config)
    assert (config.read_bytes(), len(lab.said)) == (before, said)


def test_force_keeps_what_is_the_owner_s(lab: Lab, config: Path, names: Iterator[str]):
    name = next(names)
    join(lab.token(name), config)
    text = (
        config.read_text().split("[data]")[0].replace('state = "', 'policy = "my.toml"\nstate = "')
    )
    text = text.replace("[enrol]", "keepalive_s = 33\n[enrol]")
    data = '[data]\nkind = "csv"\nfile = "a.csv"\nlabels = ["y", "z"]\nscale = "1/255"\n'
    own = '[cache]\nmax_mb = 7\n\n[model]\nhook = ["/bin/true", "a b"]\nhook_seconds = 5.0\n'
    config.write_text(text + data + own)
    before = config.read_text()
    joined = join(lab.token(name, again=True), config, force=True)
    new = tomllib.loads(config.read_text())
    assert new["policy"] == "my.toml"
    assert new["broker"]["keepalive_s"] == 33
    assert new["data"].items() >= tomllib.loads(data)["data"].items()
    for name, table in tomllib.loads(own).items():
        assert new[name].items() >= table.items()
    assert new["state"] == tomllib.loads(before)["state"]  # the same name: nothing is forgotten
    assert joined.kept is not None
    assert joined.kept.read_text() == before
    other = next(names)
    join(lab.token(other), config, force=True)
    assert tomllib.loads(config.read_text())["state"] == f"state/farm.{other}"


# -- a fleet CA elsewhere ----------------------------------------------------------------------------


def test_a_device_waits_for_a_fleet_ca_elsewhere(tmp_path: Path):
    ca = SigningKey(bytes(range(32)))
    (tmp_path / "ca.pub").write_text(ca.public.hex())

    config = tmp_path / "pi" / "device.toml"
    with Lab(tmp_path / "fleet", ca=tmp_path / "ca.pub") as lab:
        done = CliRunner().invoke(
            main, ["join", lab.token("pi-1").encode(), "--config", str(config)]
        )
        assert done.exit_code == 0, done.output
        assert "waiting: the fleet CA, on another machine, has yet to sign" in done.stdout
        parts = load_device(config)
        assert parts.certificate == b""
        assert (
            CliRunner().invoke(main, ["check", "--config", str(config)]).stdout.count("none yet")
            == 1
        )
        report = renew(config, now_unix=time.time())
        assert (report.renewed, report.waiting) == ((), True)
        request = IdentityRequest(
            fleet="farm",
            device="pi-1",
            identity=parts.identity.public,
            days=90,  # type: ignore[arg-type]
        )
        signed = certify(ca, request, int(time.time()))
        lab.fleet.book.install("pi-1", signed.envelope)
        pair = (config.parent / str(parts.config.broker.cert_file)).read_bytes()
        report = renew(config, now_unix=time.time())
        assert (report.renewed, report.waiting) == (("identity certificate",), False)
        assert load_device(config).certificate == signed.envelope
        assert (config.parent / str(parts.config.broker.cert_file)).read_bytes() == pair


# -- clocks ------------------------------------------------------------------------------------------


def test_a_clock_in_1970_does_not_matter(lab: Lab, config: Path, names: Iterator[str]):
    joined = join(lab.token(next(names)), config, now=lambda: 60.0)
    assert load_device(config).identity.public == joined.identity


def test_a_fleet_in_the_future_does_not_matter(tmp_path: Path):
    """To OpenSSL, which reads the machine's own clock, no certificate of this fleet is valid yet."""
    with Lab(tmp_path / "fleet", ahead_s=10 * 365 * 86_400) as lab:
        token = lab.token("pi-1")
        authority = lab.fleet.tls.authority.pem.decode()
        context = ssl.create_default_context(cadata=authority)
        with pytest.raises(ssl.SSLCertVerificationError, match="not yet valid"):
            relayed(lab.port, b"anything", context)  # so the case is the one that is meant
        joined = join(token, tmp_path / "pi" / "device.toml")
        assert joined.device == "pi-1"


def test_a_clock_far_ahead_is_named(lab: Lab, config: Path, names: Iterator[str]):
    with pytest.raises(TransportError) as caught:
        join(lab.token(next(names)), config, now=lambda: FOREVER)
    assert "this device's clock says 2106-02-07 06:28 UTC" in str(caught.value)
    assert "is this device's clock right?" in str(caught.value)


# -- what goes wrong ---------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind((HOST, 0))
        return int(listener.getsockname()[1])


def failure(token: str, config: Path, *more: str) -> str:
    done = CliRunner().invoke(main, ["join", token, "--config", str(config), *more])
    assert done.exit_code == 1, done.output
    assert done.stdout == ""
    assert done.stderr.startswith("covey-device: ")
    assert done.stderr.count("\n") == 1
    assert token[-22:] not in done.stderr
    return done.stderr


def test_nobody_there(lab: Lab, config: Path, names: Iterator[str]):
    token = replace(lab.token(next(names)), port=free_port())
    assert "connection refused; does `covey up` run there?" in failure(token.encode(), config)
    assert not config.parent.exists()


def test_a_host_without_an_address(lab: Lab, config: Path, names: Iterator[str]):
    token = replace(lab.token(next(names)), host="no-such-host.invalid")
    assert "cannot look up the host no-such-host.invalid" in failure(token.encode(), config)


def test_a_port_that_speaks_something_else(lab: Lab, config: Path, names: Iterator[str]):
    with socket.create_server((HOST, 0)) as server:

        def greet() -> None:
            connection, _ = server.accept()
            with connection:
                connection.sendall(b"220 mail.example ESMTP\r\n")
                connection.recv(1000)

        thread = threading.Thread(target=greet, daemon=True)
        thread.start()
        token = replace(lab.token(next(names)), port=server.getsockname()[1])
        assert "is this the fleet's enrolment port" in failure(token.encode(), config)
        thread.join(10)


@pytest.mark.parametrize("token", ["", "covey1", "covey1:h:1:AA:AA", "hello"])
def test_what_is_no_token(config: Path, token: str):
    done = CliRunner().invoke(main, ["join", "--config", str(config), "--", token])
    assert done.exit_code == 1
    assert "cop" in done.stderr  # copy the whole line


def test_a_place_that_cannot_be_written(lab: Lab, tmp_path: Path, names: Iterator[str]):
    (tmp_path / "file").write_text("")
    token, said = lab.token(next(names)), len(lab.said)
    told = failure(token.encode(), tmp_path / "file" / "device.toml")
    assert "cannot make" in told
    assert "give --config a file elsewhere" in told
    assert len(lab.said) == said  # found out before the token was spent
    join(token, tmp_path / "device.toml")


@pytest.mark.parametrize("given", ["abcd", "xyz" * 20, "0" * 65])
def test_a_fingerprint_that_is_none(lab: Lab, config: Path, names: Iterator[str], given: str):
    told = failure(lab.token(next(names)).encode(), config, "--expect-ca", given)
    assert "has 32 hexadecimal digits" in told


def test_another_fleet_than_expected(lab: Lab, config: Path, names: Iterator[str]):
    said = len(lab.said)
    told = failure(lab.token(next(names)).encode(), config, "--expect-ca", "ab" * 16)
    assert "not the one that you expect; nothing was given away" in told
    assert len(lab.said) == said


def test_no_error_is_of_another_family(lab: Lab, config: Path, names: Iterator[str]):
    """Whatever an answer is: bytes that are no message, or another message."""
    for answer in (b"", b"\x01", os.urandom(200), lab_answer(lab)):
        lab.change = lambda _, answer=answer: answer  # type: ignore[misc]
        try:
            with pytest.raises(CoveyError):
                join(lab.token(next(names)), config)
        finally:
            lab.change = lambda answer: answer
    assert not config.exists()


def lab_answer(lab: Lab) -> bytes:
    """A message that is not an answer."""
    return wire.sign(WhoIsThere(fingerprint=bytes(32)), lab.fleet.coordinator_key()).envelope


VALUES = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"])),
    st.integers(-(2**53), 2**53),
    st.booleans(),
    st.floats(allow_nan=False, allow_infinity=False),
    st.lists(st.text(st.characters(exclude_categories=["Cs"]))),
)


@given(
    st.dictionaries(
        st.from_regex(r"[a-z_]{1,8}", fullmatch=True),
        st.one_of(VALUES, st.dictionaries(st.from_regex(r"[a-z_]{1,8}", fullmatch=True), VALUES)),
    )
)
def test_what_is_written_as_toml_is_read_as_it_was(table: dict[str, Any]):
    assert tomllib.loads(enrol.toml(table)) == table


@given(st.data())
def test_a_tls_certificate_with_any_byte_changed_is_refused(lab: Lab, data: st.DataObject):
    key, authority = made_once(lab)
    der, now = authority[1], time.time()
    at = data.draw(st.integers(0, len(der) - 1))
    wrong = bytearray(der)
    wrong[at] ^= data.draw(st.integers(1, 255))
    cut = data.draw(st.one_of(st.just(len(der)), st.integers(0, len(der))))
    what = {"device": "pi-1", "public": key.public, "now_unix": now}
    with pytest.raises(RefusedError):
        enrol.check_tls_certificate(bytes(wrong[:cut]), authority[0], **what)
    enrol.check_tls_certificate(der, authority[0], **what)  # the control


_MADE: list[tuple[enrol.TlsKey, tuple[bytes, bytes]]] = []


def made_once(lab: Lab) -> tuple[enrol.TlsKey, tuple[bytes, bytes]]:
    """A TLS key; its authority and its certificate, DER."""
    if not _MADE:
        key, authority = enrol.make_tls_key(), lab.fleet.tls.authority
        der = pki.client_certificate(authority, key.csr, "pi-1", days=9, now_unix=int(time.time()))
        _MADE.append((key, (authority.der, der)))
    return _MADE[0]
