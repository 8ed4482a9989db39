"""Certificates that are renewed before they end, by the device itself.

Three parts, apart because of what they need:

* `Schedule` decides when to ask. It has no clock, no randomness and no files of its own.
* `renew` asks, over mutual TLS, checks the answer and writes it: a new TLS key each time, key and
  certificate in one file that is replaced by a rename. It needs `cryptography`, so that the service has
  it run in a process of its own: ``python -m covey_device.renewal FILE --now UNIX``.
* `Renewal` runs in the service, and does what the schedule says through such processes.

What "now" is: the device's clock may be wrong by decades, but time passes in one direction. So it is the
latest of that clock and of the times that the coordinator signed (`Renewal.seen`). A lying coordinator
can make a device ask too early, about once an hour, and nothing more.
"""

import argparse
import asyncio
import contextlib
import logging
import os
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec

from covey_device import audit, enrol, tls
from covey_device import config as configuration
from covey_device.config import DeviceConfig
from covey_device.files import write_durably
from covey_device.keystore import load_identity
from covey_device.present import Present
from covey_shared import keys, wire
from covey_shared.enrolment import RenewRequest
from covey_shared.errors import ConfigError, CoveyError, RefusedError
from covey_shared.messages import Certificate, DeviceId
from covey_shared.secagg.cohort import Trust

log = logging.getLogger("covey.device")

LIFE_SPENT = 2 / 3
"""The share of a certificate's life after which it is renewed."""

FIRST_S = 30.0
"""The first look at the certificates after a start comes at a random moment of this time: after a power
cut all of a fleet start at once."""

LOOK_S = 86_400.0
"""The longest between two looks: a clock may be set, and files restored."""

RETRY_BASE_S = 60.0
RETRY_CAP_S = 6 * 3600.0
WAITING_CAP_S = 3600.0
"""The same for a fleet CA on another machine, which somebody is about to carry a file to."""

WANTED_S = 3600.0
"""Requests by the coordinator are followed once in this time."""

CHILD_S = 180.0


@dataclass(frozen=True, slots=True)
class Life:
    """Of one certificate, in seconds since 1970."""

    began_unix: float
    ends_unix: float

    @property
    def due_unix(self) -> float:
        """When to renew it."""
        return self.began_unix + LIFE_SPENT * (self.ends_unix - self.began_unix)


class Report(msgspec.Struct, frozen=True):
    """What `renew` did. renewed: which certificates. waiting: the fleet CA has yet to sign. due_unix: when
    the next one is due. note: for the owner."""

    renewed: tuple[str, ...]
    waiting: bool
    due_unix: float
    note: str = ""


# -- when ------------------------------------------------------------------------------------------------


class Schedule:
    """When to look after the certificates next. All times are of one clock that never jumps.

    uniform: (low, high) -> a random number in between. next_s: the moment to act at. asked: act
    then even if nothing is due.
    """

    def __init__(self, now_s: float, uniform: Callable[[float, float], float]) -> None:
        self._uniform = uniform
        self._failures = 0
        self._done_s: float | None = None
        self._wanted_s: float | None = None
        self.asked = False
        self.next_s = now_s + uniform(0.0, FIRST_S)

    def done(self, now_s: float, due_in_s: float) -> None:
        """All is well until `due_in_s` from now."""
        self._failures, self._done_s = 0, now_s
        self.next_s = now_s + min(max(due_in_s, RETRY_BASE_S), LOOK_S) + self._uniform(0.0, FIRST_S)
        if self.asked:  # meanwhile
            self.next_s = now_s

    def failed(self, now_s: float, *, waiting: bool = False) -> float:
        """It did not work. Returns the seconds until the next attempt."""
        cap = WAITING_CAP_S if waiting else RETRY_CAP_S
        delay = min(cap, RETRY_BASE_S * 2.0 ** min(self._failures, 32))
        self._failures += 1
        self.next_s = now_s + self._uniform(delay / 2, delay)
        return self.next_s - now_s

    def due(self, now_s: float) -> None:
        """Something turned out to be due earlier than was thought. By the word of others: at most
        once in a while, and never instead of the back-off."""
        if self._failures == 0 and (self._done_s is None or now_s - self._done_s >= WANTED_S):
            self.next_s = min(self.next_s, now_s)

    def wanted(self, now_s: float) -> bool:
        """The coordinator asks for it. Whether it is done, at once."""
        if self._wanted_s is not None and now_s - self._wanted_s < WANTED_S:
            return False
        self._wanted_s = self.next_s = now_s
        self.asked = True
        return True


# -- how -------------------------------------------------------------------------------------------------


def renew(
    config_path: Path, *, now_unix: float, anyway: bool = False, rng: keys.Rng = os.urandom
) -> Report:
    """Renew what is due, or everything `anyway`, and ask for an identity certificate that is missing.

    now_unix: the time, as far as it is known; this device's own clock is not looked at. Raises
    CoveyError, with nothing changed.
    """
    config, base = configuration.load(config_path), config_path.parent
    if config.enrol is None or config.broker.cert_file is None or config.broker.ca_file is None:
        raise ConfigError(
            f"{config_path} has no table [enrol]: this device was not enrolled with a token, so that "
            "its certificate comes from `covey device add`"
        )
    pair_file, ca_file = base / config.broker.cert_file, base / config.broker.ca_file
    trust, identity = trust_of(config), load_identity(base / config.identity)
    context = tls.of_files(ca_file, pair_file, pair_file)
    context.clock = lambda: now_unix
    authority = enrol.der_of(ca_file.read_bytes())
    tls_life, own = tls_life_of(pair_file), kept_certificate(config, base, trust, identity)
    tls_due = anyway or now_unix >= tls_life.due_unix
    identity_due = own is None or now_unix >= life_of(own).due_unix
    if not (tls_due or identity_due):
        return Report((), False, _due(tls_life, own))
    if now_unix >= tls_life.ends_unix:
        raise ConfigError(
            f"the TLS certificate ended on {tls.in_words(tls_life.ends_unix)}: it cannot be renewed any "
            "more; ask your operator for a token and run `covey-device join --force`"
        )
    key = enrol.make_tls_key() if tls_due else None
    request = RenewRequest(
        fleet=trust.fleet,
        device=DeviceId(config.device),
        identity=identity.public,
        csr=key.csr if key else b"",
    )
    envelope = wire.sign(request, identity).envelope
    try:
        answer = enrol.exchange(config.enrol.host, config.enrol.port, context, envelope)
    except enrol.LostError as error:
        # A certificate that the authority does not know is not told anything but that.
        raise enrol.LostError(
            f"{error}, and if that does not help, ask your operator whether this device was revoked"
        ) from error
    granted = enrol.granted(
        answer,
        fleet=trust.fleet,
        identity=identity.public,
        coordinator=trust.coordinator,
        device=config.device,
    )
    # Everything is checked before anything is written.
    fresh_pair, fresh, done = None, None, []
    if key is not None:
        certificate = enrol.check_tls_certificate(
            granted.tls_certificate,
            authority,
            device=config.device,
            public=key.public,
            now_unix=now_unix,
        )
        fresh_pair = enrol.pair(key, certificate)
    elif granted.tls_certificate:
        raise RefusedError("the coordinator sent a TLS certificate that was not asked for")
    if granted.certificate:
        fresh = enrol.check_identity_certificate(
            granted.certificate,
            fleet=trust.fleet,
            fleet_ca=trust.ca,
            device=config.device,
            identity=identity.public,
            now_unix=now_unix,
        )
    if fresh_pair is not None:
        write_durably(pair_file, fresh_pair)
        done.append("TLS certificate")
    if fresh is not None and (own is None or fresh.issued_unix > own.issued_unix):
        write_durably(base / config.certificate, granted.certificate)
        own = fresh
        done.append("identity certificate")
    if done:
        ends = {} if own is None else {"identity_ends": tls.in_words(own.not_after_unix)}
        audit.note(base / config.state, "renewed", what=" and ".join(done), **ends)
    waiting = own is None or (identity_due and "identity certificate" not in done)
    note = ""
    if granted.broker_url != config.broker.url:
        note = f"the fleet's broker is now at {granted.broker_url}: set `broker.url` to that"
    return Report(tuple(done), waiting, _due(tls_life_of(pair_file), own), note)


def trust_of(config: DeviceConfig) -> Trust:
    """The keys that a device pins."""
    return Trust(
        config.fleet,
        keys.PublicKey(bytes.fromhex(config.trust.fleet_ca)),
        keys.PublicKey(bytes.fromhex(config.trust.coordinator)),
    )


def kept_certificate(
    config: DeviceConfig, base: Path, trust: Trust, identity: keys.SigningKey
) -> Certificate | None:
    """The identity certificate that is there; None while the fleet CA has yet to sign one.

    One that has ended is none the worse: it is about to be replaced. Raises ConfigError.
    """
    from covey_device.keystore import load_certificate

    path = base / config.certificate
    if not path.exists():
        return None
    envelope = load_certificate(path, trust.ca, config.fleet, config.device, identity.public)
    return wire.decode_as(Certificate, envelope).message


def life_of(certificate: Certificate) -> Life:
    """An identity certificate's."""
    return Life(certificate.issued_unix, certificate.not_after_unix)


def tls_life_of(pair_file: Path) -> Life:
    """A TLS certificate's. Raises ConfigError."""
    from cryptography import x509

    try:
        certificate = x509.load_pem_x509_certificate(pair_file.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(f"broker.cert_file {pair_file} is no certificate in PEM") from error
    return Life(
        certificate.not_valid_before_utc.timestamp(), certificate.not_valid_after_utc.timestamp()
    )


def _due(tls_life: Life, own: Certificate | None) -> float:
    return min(life.due_unix for life in (tls_life, *([life_of(own)] if own else [])))


# -- in the service --------------------------------------------------------------------------------------


class Renewal:
    """Keeps a running device's certificates fresh.

    renewed: called when the files may have changed, to have them used. waiting: there is no identity
    certificate yet. clock: seconds since 1970 by this device; steady: of a clock that never jumps.
    """

    def __init__(
        self,
        config_path: Path,
        device: str,
        renewed: Callable[[], Awaitable[None]],
        *,
        waiting: bool,
        uniform: Callable[[float, float], float],
        clock: Callable[[], float] = time.time,
        steady: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config_path = config_path
        self._device = device
        self._renewed = renewed
        self._waiting = waiting
        self._clock, self._steady = clock, steady
        self._schedule = Schedule(steady(), uniform)
        self._seen = (0.0, steady())
        self._present = Present(clock=clock, steady=steady)
        self._due_unix: float | None = None
        self._news = asyncio.Event()

    @property
    def now_unix(self) -> float:
        """The time by the coordinator's clock, once it told it; until then the latest of the device's own
        and of what is known to have passed."""
        if self._present.is_told:
            return self._present.signed_unix
        seen_unix, at_s = self._seen
        return max(self._clock(), seen_unix + self._steady() - at_s)

    def told(self, issued_unix: int) -> None:
        """The coordinator signed this time just now: whatever the device's clock says, and whoever sets
        it, certificates are renewed when they must be."""
        self._present.told(issued_unix)
        self._hurry_if_due()

    def seen(self, issued_unix: int) -> None:
        """The coordinator signed this time once, so that it is over."""
        if self._present.is_told:
            return
        if issued_unix > self.now_unix:
            self._seen = (issued_unix, self._steady())
        self._hurry_if_due()

    def _hurry_if_due(self) -> None:
        if self._due_unix is not None and self.now_unix >= self._due_unix:
            self._schedule.due(self._steady())
            self._news.set()

    def wanted(self) -> None:
        """The coordinator asks for a renewal."""
        if self._schedule.wanted(self._steady()):
            log.info("%s: the coordinator asks for a renewal of the certificates", self._device)
            self._news.set()

    async def run(self) -> None:
        """Go on until cancelled."""
        if self._waiting:
            log.warning("%s: %s", self._device, WAITS)
        while True:
            left = self._schedule.next_s - self._steady()
            if left > 0:
                self._news.clear()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(left):
                        await self._news.wait()
                continue
            await self._act()

    async def _act(self) -> None:
        anyway, self._schedule.asked = self._schedule.asked, False
        report = await self._child(anyway)
        if isinstance(report, str):
            self._schedule.asked |= anyway
            delay = self._schedule.failed(self._steady())
            log.warning(
                "%s: certificates were not renewed: %s; next attempt in %s",
                self._device, report, _spelled(delay),
            )  # fmt: skip
            return
        try:
            await self._renewed()  # also what was renewed by hand
        except CoveyError as error:
            log.error("%s: %s", self._device, error)
        if report.renewed:
            log.info("%s: renewed: %s", self._device, " and ".join(report.renewed))
        if report.note:
            log.warning("%s: %s", self._device, report.note)
        if report.waiting:
            delay = self._schedule.failed(self._steady(), waiting=True)
            log.info("%s: %s; asks again in %s", self._device, WAITS, _spelled(delay))
            return
        self._waiting = False
        self._due_unix = report.due_unix
        self._schedule.done(self._steady(), report.due_unix - self.now_unix)

    async def _child(self, anyway: bool) -> Report | str:
        """Renew in a process of its own -> what it did, or why it did not."""
        # -P: what lies in the service's working directory is not to be imported.
        command = [sys.executable, "-P", "-m", "covey_device.renewal", str(self._config_path)]
        command += ["--now", f"{self.now_unix:.0f}", *(["--anyway"] if anyway else [])]
        try:
            child = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
            )
        except OSError as error:
            return f"no process can be started ({error.strerror})"
        try:
            async with asyncio.timeout(CHILD_S):
                told, problem = await child.communicate()
        except TimeoutError:
            return "it took too long"
        finally:
            if child.returncode is None:
                child.kill()
                await child.wait()
        if child.returncode == 0:
            with contextlib.suppress(msgspec.MsgspecError):
                return msgspec.json.decode(told, type=Report)
        lines = problem.decode("utf-8", "replace").strip().splitlines()
        return lines[-1] if lines else f"the process ended with status {child.returncode}"


def _spelled(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


WAITS = (
    "the fleet CA has yet to sign this device's identity, so that it takes part in no round; the "
    "operator runs `covey ca sign`"
)


def main(arguments: list[str] | None = None) -> int:
    """The process that the service starts: a report in JSON, or one line on stderr and status 1."""
    parser = argparse.ArgumentParser("covey_device.renewal")
    parser.add_argument("config", type=Path)
    parser.add_argument("--now", type=float, required=True)
    parser.add_argument("--anyway", action="store_true")
    given = parser.parse_args(arguments)
    os.umask(0o077)
    try:
        report = renew(given.config, now_unix=given.now, anyway=given.anyway)
    except CoveyError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    except Exception as error:
        if os.environ.get("COVEY_DEBUG"):
            raise
        sys.stderr.write(f"unexpected {type(error).__name__}: {error}; a bug in covey\n")
        return 1
    sys.stdout.buffer.write(msgspec.json.encode(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
