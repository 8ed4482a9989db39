"""The authority that an owner names in device.toml, made by whatever tool."""

import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from covey_device.assembly import tls_of
from covey_device.config import BrokerConfig
from tls_files import TlsFiles, make_tls_files


def handshake(client: ssl.SSLContext, files: TlsFiles, name: str = "localhost") -> None:
    """One in memory. Raises what the client finds wrong."""
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(files.certificate, files.key)
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    ours = client.wrap_bio(back, there, server_hostname=name)
    theirs = server.wrap_bio(there, back, server_side=True)
    pending = [ours, theirs]
    for _ in range(20):
        for side in list(pending):
            try:
                side.do_handshake()
                pending.remove(side)
            except ssl.SSLWantReadError:
                continue
        if not pending:
            return
    raise AssertionError("no end of the handshake")


def as_python_3_13(real: Callable[..., ssl.SSLContext]) -> Callable[..., ssl.SSLContext]:
    def made(*args: Any, **more: Any) -> ssl.SSLContext:
        context = real(*args, **more)
        context.verify_flags |= ssl.VERIFY_X509_STRICT | ssl.VERIFY_X509_PARTIAL_CHAIN
        return context

    return made


def broker(files: TlsFiles) -> BrokerConfig:
    return BrokerConfig(url="mqtts://localhost", ca_file=files.authority.name)


@pytest.mark.parametrize("plain", [True, False])
def test_an_authority_of_the_owners_own_is_believed_on_every_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plain: bool
):
    files = make_tls_files(tmp_path, plain=plain)
    made = as_python_3_13(ssl.create_default_context)
    if plain:
        with pytest.raises(ssl.SSLCertVerificationError):
            handshake(made(cafile=files.authority), files)
    monkeypatch.setattr(ssl, "create_default_context", made)
    context = tls_of(broker(files), tmp_path)
    assert context is not None
    handshake(context, files)


def test_what_it_did_not_sign_and_other_names_are_not(tmp_path: Path):
    (tmp_path / "other").mkdir()
    files, others = make_tls_files(tmp_path, plain=True), make_tls_files(tmp_path / "other")
    context = tls_of(broker(files), tmp_path)
    assert context is not None
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(context, others)
    context = tls_of(broker(files), tmp_path)
    assert context is not None
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(context, files, name="elsewhere")
