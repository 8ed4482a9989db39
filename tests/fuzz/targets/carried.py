"""The files that are carried by hand between a coordinator and a fleet CA on another machine.

The first byte of an input says which of the two files it is, and whether the messages in it are signed again
by whoever should have signed them; the rest is the file.
"""

import base64
import contextlib
import json
import os
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import msgspec

from covey_coordinator import fleet_ca
from covey_coordinator.fleet_ca import AuthorityDirectory, Certificates, Requests, read_file
from covey_shared import keys, wire
from covey_shared.enrolment import IdentityRequest
from covey_shared.errors import ConfigError
from covey_shared.messages import Certificate, DeviceId
from fuzz import msgpack
from fuzz.harness import Mutate, Run, Target, expect
from fuzz.targets.desk import DAY, IDENTITIES, NOW, PUBLIC, Directory, made_fleet

MAX_FILE_BYTES = 64 * 1024
"""Less than in the field: so much is set aside for a file before it is read."""


class _Judge:
    def __init__(self, folder: Path) -> None:
        self.fleet = made_fleet(folder / "fleet")
        self.coordinator, self.ca = self.fleet.coordinator_key(), self.fleet.ca_key()
        self.authority = AuthorityDirectory(folder / "ca")
        self.authority.create("lab", coordinator=self.coordinator.public)
        self.directory = Directory(folder)
        self.path = folder / "carried.json"

    def key_of(self, code: int, fields: list[object]) -> keys.SigningKey | None:
        return self.ca if code == Certificate.CODE else self.coordinator

    def __call__(self, data: bytes) -> list[str]:
        if not data:
            return []
        file = (
            _changed(data[1:], lambda e: msgpack.resealed(e, self.key_of))
            if data[0] & 2
            else data[1:]
        )
        self.path.write_bytes(file)
        try:
            return [self.certificates() if data[0] & 1 else self.requests()]
        finally:
            self.path.unlink()
            self.directory.restore()

    def requests(self) -> str:
        """`covey ca sign`: what is signed was asked for by the coordinator, each once."""
        wanted = self.authority.review(read_file(self.path, Requests), None)
        names = [entry.request.device for entry in wanted]
        expect(names == sorted(set(names)), "a device twice")
        made = self.authority.sign(wanted, None, NOW)
        expect(len(made.certificates) == len(wanted), "another number of certificates")
        again = self.authority.review(read_file(self.path, Requests), None)
        expect(
            all(entry.before == entry.request.identity for entry in again),
            "what was signed is not known",
        )
        return f"signed {len(wanted)}"

    def certificates(self) -> str:
        """`covey ca import`: only what fits a device that is registered and not revoked."""
        taken, refused = self.fleet.import_certificates(read_file(self.path, Certificates))
        expect(set(taken) <= {"pi-2"}, "a certificate for a stranger or for who was revoked")
        expect(all(len(words) < 4096 for words in refused), "an error that is no line")
        for name in taken:
            held = self.fleet.book.certificate(name)
            assert held is not None
            made = wire.opened(Certificate, held, self.ca.public, signer="the CA").message
            expect((made.device, made.identity) == (name, PUBLIC[1]), "another's certificate")
        return f"taken {taken} {refused[:1]}"


def _changed(file: bytes, change):  # type: ignore[no-untyped-def]
    """The file with each of its messages changed; as it is, if it has none."""
    try:
        table = json.loads(file)
        for name in ("requests", "certificates"):
            if name in table:
                envelopes = [base64.b64decode(text) for text in table[name]]
                table[name] = [
                    base64.b64encode(change(envelope)).decode() for envelope in envelopes
                ]
        return json.dumps(table).encode()
    except (ValueError, TypeError, RecursionError):
        return file


@contextlib.contextmanager
def ready() -> Iterator[Run]:
    """A coordinator and a CA. Nothing waits for a disk."""
    memory = Path("/dev/shm")
    with (
        tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder,
        mock.patch.object(os, "fsync", return_value=None),
        mock.patch.object(fleet_ca, "MAX_FILE_BYTES", MAX_FILE_BYTES),
    ):
        yield _Judge(Path(folder))


def _mutate(data: bytes, longest: int, chance: random.Random, mutate: Mutate) -> bytes:
    if len(data) < 3 or chance.random() < 0.1:
        return mutate(data, longest)
    if chance.random() < 0.3:
        try:
            table = msgpack.changed(json.loads(data[1:]), chance, mutate, longest)
            return (data[:1] + json.dumps(table).encode())[:longest]
        except (ValueError, TypeError, RecursionError):
            return mutate(data, longest)
    made: bytes = _changed(data[1:], lambda e: msgpack.mutated_envelope(e, chance, mutate, 2000))
    return data[:1] + made if len(made) < longest else data


def _seeds() -> Iterator[bytes]:
    signer = next(iter(IDENTITIES.values()))
    requests = [
        wire.sign(IdentityRequest("lab", DeviceId(name), public, 90), signer).envelope
        for name, public in (("pi-1", PUBLIC[0]), ("pi-2", PUBLIC[1]))
    ]
    certificates = [
        wire.sign(Certificate("lab", DeviceId(name), public, NOW, NOW + DAY), signer).envelope
        for name, public in (("pi-2", PUBLIC[1]), ("pi-4", PUBLIC[2]), ("pi-1", PUBLIC[0]))
    ]
    for kind in (0, 2):
        asked = Requests(fleet="lab", coordinator=signer.public.hex(), requests=requests)
        yield bytes((kind,)) + msgspec.json.encode(asked)
        for some in (certificates, certificates[:1], []):
            yield bytes((kind | 1,)) + msgspec.json.encode(
                Certificates(fleet="lab", certificates=some)
            )


TARGET = Target(
    "carried",
    ready,
    # What is set aside; the file twice, as text and as messages; the few records of the fleet.
    memory=lambda n: MAX_FILE_BYTES + 512 * 1024 + 100 * n,
    seeds=_seeds,
    mutate=_mutate,
    allowed=(ConfigError,),
    longest=6000,
)
