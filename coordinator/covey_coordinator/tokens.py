"""Enrolment tokens: what of them the coordinator keeps, which is never the secret.

`tokens/HASH.json`, one file each, readable by this user alone. A token is found by the SHA-256 of its
secret, so that nothing is compared whose timing could tell a part of it; who reads the directory has
128 bits to guess. It works once: the first identity that uses it is written here before anything else
happens, and only that one may repeat itself, until the token ends.
"""

from pathlib import Path

import msgspec

from covey_coordinator.files import read_json, storage_error, write_atomic
from covey_shared import keys
from covey_shared.messages import DeviceId

KEEP_S = 30 * 86_400
"""How long after its end a token is remembered, so that whoever comes too late is told so."""


class TokenRecord(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """again: it may replace a device of that name. used_by: the identity that used it, hexadecimal."""

    device: DeviceId
    made_unix: int
    expires_unix: int
    again: bool = False
    used_by: str = ""
    used_unix: int = 0
    uses: int = 0


def token_hash(secret: bytes) -> str:
    """What is kept of a secret, hexadecimal."""
    return keys.digest("enrolment token", secret).hex()


class TokenBook:
    """Reads and writes one fleet's tokens. Hold `DeviceBook.changing` while using it to change one."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def add(self, secret: bytes, record: TokenRecord) -> None:
        """Keep a new token, and forget older ones for the same device that nobody used, as well as
        those that ended long ago. Raises StorageError, ConfigError."""
        try:
            self._path.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise storage_error("make", self._path, error) from error
        for hash_, old in self.all().items():
            superseded = old.device == record.device and not old.used_by
            if superseded or old.expires_unix + KEEP_S < record.made_unix:
                self._remove(hash_)
        self.save(token_hash(secret), record)

    def find(self, secret: bytes) -> tuple[str, TokenRecord] | None:
        """Its hash and what is known of it; None for a secret that nobody made here."""
        hash_ = token_hash(secret)
        record = read_json(self._file(hash_), TokenRecord, mend="remove it")
        return None if record is None else (hash_, record)

    def save(self, hash_: str, record: TokenRecord) -> None:
        """Keep a change, durably. Raises StorageError."""
        write_atomic(self._file(hash_), msgspec.json.encode(record) + b"\n", mode=0o600)

    def withdraw(self, device: str) -> None:
        """Forget the tokens for a device that nobody used. Raises StorageError."""
        for hash_, record in self.all().items():
            if record.device == device and not record.used_by:
                self._remove(hash_)

    def all(self) -> dict[str, TokenRecord]:
        """Hash -> token, in no order. Raises ConfigError."""
        found = {
            path.stem: read_json(path, TokenRecord, mend="remove it")
            for path in self._path.glob("*.json")
        }
        return {hash_: record for hash_, record in found.items() if record is not None}

    def open(self, now_unix: float) -> list[TokenRecord]:
        """Tokens that can still be used."""
        return [r for r in self.all().values() if not r.used_by and r.expires_unix > now_unix]

    def _file(self, hash_: str) -> Path:
        return self._path / f"{hash_}.json"

    def _remove(self, hash_: str) -> None:
        try:
            self._file(hash_).unlink(missing_ok=True)
        except OSError as error:
            raise storage_error("remove", self._file(hash_), error) from error
