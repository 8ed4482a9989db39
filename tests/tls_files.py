"""Certificates for tests, made afresh each time."""

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from prerequisites import missing


@dataclass(frozen=True)
class TlsFiles:
    """A throw-away authority, and a certificate of it for 127.0.0.1 and localhost."""

    authority: Path
    certificate: Path
    key: Path


def make_tls_files(directory: Path, *, plain: bool = False) -> TlsFiles:
    """Made with the openssl command, so that no private key lies in the repository. plain: as that makes
    them by itself, without saying what the keys are for."""
    if shutil.which("openssl") is None:
        missing("openssl is not installed: apt install openssl")
    files = TlsFiles(directory / "ca.crt", directory / "server.crt", directory / "server.key")
    ca_key, names = directory / "ca.key", "subjectAltName=IP:127.0.0.1,DNS:localhost"
    # Python 3.13 believes no certificate of an authority, as openssl makes them here, that does not say
    # what its key is for.
    usage = () if plain else ("-addext", "keyUsage=critical,digitalSignature,keyCertSign,cRLSign")
    _openssl("/CN=test authority", *usage, "-keyout", ca_key, "-out", files.authority)
    _openssl(
        *("/CN=localhost", *usage, "-addext", names, "-CA", files.authority, "-CAkey", ca_key),
        *("-keyout", files.key, "-out", files.certificate),
    )
    return files


def _openssl(subject: str, *arguments: str | Path) -> None:
    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")
    command = ("openssl", "req", "-x509", "-days", "30", *key, "-subj", subject, *arguments)
    subprocess.run(command, check=True, capture_output=True)
