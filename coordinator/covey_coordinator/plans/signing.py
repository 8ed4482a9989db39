"""Model owners' signatures of plans: keys in files, and ``signatures/`` in a plan's directory.

A signature says that its owner stands by the plan with this hash, and so by every byte that a device will
run. The coordinator passes it on; devices whose owners ask for one check it themselves.
"""

import os
from pathlib import Path

from covey_coordinator.files import storage_error, sync_directory, write_atomic
from covey_shared import wire
from covey_shared.config import unreadable
from covey_shared.errors import ConfigError, CoveyError, MalformedError, RemoteProtocolError
from covey_shared.keys import PublicKey, SigningKey
from covey_shared.messages import MAX_PLAN_SIGNATURES, PlanSignature
from covey_shared.wire import Signed

SIGNATURES = "signatures"


def make_owner_key(path: Path, seed: bytes) -> PublicKey:
    """Write a new private key, for its owner alone. Raises ConfigError if there is a file already."""
    key = SigningKey(seed)
    try:
        # Linked into place, so that not even a key made at the same moment is written over.
        fresh = path.with_name(f".{path.name}.{os.getpid()}.new")
        write_atomic(fresh, key.seed.hex().encode() + b"\n", mode=0o600)
        try:
            os.link(fresh, path)
        finally:
            fresh.unlink()
        sync_directory(path.parent)
    except FileExistsError:
        raise ConfigError(
            f"{path} is there already; a key that is lost cannot be made again: choose another name"
        ) from None
    except OSError as error:
        raise storage_error("write", path, error) from error
    return key.public


def read_owner_key(path: Path) -> SigningKey:
    """A private key that `make_owner_key` wrote. Raises ConfigError."""
    try:
        mode = path.stat().st_mode & 0o777
        text = path.read_text(encoding="utf-8").strip()
    except FileNotFoundError as error:
        problem = unreadable(f"owner key {path}", error)
        raise ConfigError(f"{problem}; `covey plan owner-key FILE` makes one") from error
    except (OSError, UnicodeDecodeError) as error:
        raise unreadable(f"owner key {path}", error) from error
    if mode & 0o077:
        raise ConfigError(
            f"owner key {path} can be read by others (mode {mode:04o}); run: chmod 600 {path}"
        )
    try:
        return SigningKey(bytes.fromhex(text))
    except (ValueError, CoveyError) as error:
        raise ConfigError(f"owner key {path} is not 64 hexadecimal digits") from error


def sign_plan(directory: Path, plan: bytes, key: SigningKey) -> Path:
    """Put an owner's signature into a plan's directory. plan: its hash. Returns the file.

    Raises ConfigError if as many have signed as a round can carry, MalformedError if one of the
    signatures that are there is not of this plan, StorageError.
    """
    folder = directory / SIGNATURES
    others = {owner_of(envelope) for envelope in read_signatures(folder, plan)} - {key.public}
    if len(others) >= MAX_PLAN_SIGNATURES:
        raise ConfigError(
            f"{len(others)} owners have signed already, as many as a round can carry; remove one from "
            f"{folder}"
        )
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise storage_error("make", folder, error) from error
    path = folder / signature_file(key.public)
    write_atomic(path, wire.sign(PlanSignature(key.public, plan), key).envelope)
    return path


def signature_file(owner: bytes) -> str:
    """The name of an owner's signature."""
    return f"{owner.hex()}.sig"


def read_signatures(folder: Path, plan: bytes) -> tuple[bytes, ...]:
    """The envelopes of all owners who signed this plan, each once, by key; none without a folder.

    Raises MalformedError naming the file that is damaged or of another plan, StorageError.
    """
    found: dict[bytes, bytes] = {}
    try:
        paths = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except FileNotFoundError:
        return ()
    except OSError as error:
        raise storage_error("read", folder, error) from error
    for path in paths:
        try:
            envelope = path.read_bytes()
        except OSError as error:
            raise storage_error("read", path, error) from error
        try:
            signed = _opened(envelope)
        except RemoteProtocolError as error:
            raise MalformedError(
                f"{path} is no signature of a plan ({error}); remove it, and have its owner sign again"
            ) from error
        if signed.message.plan != plan:
            raise MalformedError(
                f"{path} is of plan {signed.message.plan.hex()[:12]}, and this is {plan.hex()[:12]}; "
                "remove it, and have its owner sign this one"
            )
        found[signed.message.owner] = envelope
    if len(found) > MAX_PLAN_SIGNATURES:
        raise MalformedError(
            f"{folder} has {len(found)} signatures; a round can carry {MAX_PLAN_SIGNATURES}: remove some"
        )
    return tuple(found[owner] for owner in sorted(found))


def owner_of(envelope: bytes) -> bytes:
    """Whose signature it is: the public key. The envelope was read by `read_signatures`."""
    return wire.decode_as(PlanSignature, envelope).message.owner


def _opened(envelope: bytes) -> Signed[PlanSignature]:
    signed = wire.decode_as(PlanSignature, envelope)
    signed.check(signed.message.owner, signer="the owner it names")
    return signed
