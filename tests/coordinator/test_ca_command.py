"""A fleet CA on another machine, command by command, and the files that are carried between the two."""

import base64
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from covey_coordinator import fleet_ca
from covey_coordinator.cli import main
from covey_coordinator.enrolment import EnrolmentDesk
from covey_coordinator.fleet import FleetDirectory
from covey_coordinator.fleet_ca import AuthorityDirectory, Certificates, Requests, read_file
from covey_shared import keys, wire
from covey_shared.enrolment import Enrolled, IdentityRequest
from covey_shared.errors import ConfigError
from covey_shared.messages import Certificate, DeviceId
from enrolling import NOW, Applicant, Bench

Covey = Callable[..., Result]


@pytest.fixture
def covey(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Covey:
    """Runs a command in tmp_path, and holds every error to one line."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("COVEY_FLEET", raising=False)

    def run(*arguments: object, answer: str = "") -> Result:
        result = CliRunner().invoke(main, [str(a) for a in arguments], input=answer)
        assert "Traceback" not in result.output
        assert result.exception is None or isinstance(result.exception, SystemExit), result.output
        return result

    return run


def lines(result: Result) -> list[str]:
    assert result.exit_code == 0, result.output
    return result.stdout.splitlines()


def failed(result: Result) -> str:
    assert result.exit_code == 1, result.output
    assert re.fullmatch(r"covey: [^\n]+\n", result.stderr), result.stderr
    return result.stderr.removeprefix("covey: ").removesuffix("\n")


class Offline(Bench):
    """A fleet that knows its CA's public key alone."""

    def __init__(self, covey: Covey, path: Path) -> None:
        lines(covey("ca", "init", "vault", "--fleet", "farm"))
        super().__init__(path / "farm", ca=path / "vault" / "ca.pub")
        self.vault = AuthorityDirectory(path / "vault")

    def waits(self, name: str, applicant: Applicant) -> Enrolled:
        """A device joins, and has to wait for its identity's certificate."""
        enrolled = self.enrol(name, applicant)
        assert enrolled.certificate == b""
        assert enrolled.tls_certificate
        return enrolled

    @property
    def coordinator(self) -> str:
        return self.fleet.trust.coordinator.hex()


@pytest.fixture
def offline(covey: Covey, tmp_path: Path) -> Offline:
    return Offline(covey, tmp_path)


def grouped(public: bytes) -> str:
    return " ".join(re.findall("....", public.hex()[:32]))


def test_the_whole_way(covey: Covey, offline: Offline, tmp_path: Path):
    pi, other = Applicant(1), Applicant(2)
    offline.waits("pi-1", pi)
    offline.waits("pi-12", other)
    assert offline.said[1] == "device pi-1 waits for the fleet CA: covey ca requests -o FILE"
    assert [e.status(NOW) for e in offline.fleet.devices()] == ["pending", "pending"]
    assert offline.renew(pi, b"").certificate == b""  # it asks again by itself, in vain
    assert not offline.fleet.ca_here

    told = lines(covey("ca", "requests", "-o", "wanted", "--fleet-dir", "farm"))
    assert told[:2] == [
        "requests of pi-1, pi-12 written to wanted",
        "next: carry it to the CA's machine; there: covey ca sign wanted",
    ]
    assert offline.coordinator in told[2]
    shown = lines(
        covey("ca", "sign", "wanted", "--ca-dir", "vault", "--coordinator", offline.coordinator,
              answer="y\n")
    )  # fmt: skip
    assert shown[:2] == [
        f"pi-1   {grouped(pi.public)}  90 days  new",
        f"pi-12  {grouped(other.public)}  90 days  new",
    ]
    assert shown[2:] == [
        "sign 2 for fleet farm? [y/N]: y",
        "signed: wanted.signed",
        "next: carry it to the coordinator; there: covey ca import wanted.signed",
    ]
    assert lines(covey("ca", "import", "wanted.signed", "--fleet-dir", "farm")) == [
        "device pi-1: certificate taken in",
        "device pi-12: certificate taken in",
    ]
    certificate = offline.certificate(offline.renew(pi, b""))
    assert (certificate.device, certificate.identity) == ("pi-1", pi.public)
    assert certificate.not_after_unix - certificate.issued_unix == 90 * 86_400
    assert [e.revoked_unix for e in offline.fleet.devices()] == [0, 0]
    assert lines(covey("ca", "requests", "-o", "wanted", "--fleet-dir", "farm")) == [
        "no device waits for the fleet CA"
    ]


def carry(covey: Covey, offline: Offline, *options: object, answer: str = "") -> Result:
    lines(covey("ca", "requests", "-o", "wanted", "--fleet-dir", "farm"))
    return covey("ca", "sign", "wanted", "--ca-dir", "vault", *options, answer=answer)


def test_a_renewal_and_a_replacement_are_told_apart(covey: Covey, offline: Offline, tmp_path: Path):
    pi, other = Applicant(1), Applicant(2)
    offline.waits("pi-1", pi)
    offline.waits("pi-2", other)
    lines(carry(covey, offline, "--yes", "--coordinator", offline.coordinator))
    lines(covey("ca", "import", "wanted.signed", "--fleet-dir", "farm"))
    offline.now = max(e.not_after_unix for e in offline.fleet.devices()) - 86_400
    offline.renew(pi, b"")
    assert offline.enrol("pi-2", Applicant(3), again=True).certificate == b""
    shown = lines(carry(covey, offline, "--yes"))
    assert shown[0].endswith("90 days  renewal")
    assert shown[1].endswith(f"90 days  REPLACES {grouped(other.public)}")
    signed = (tmp_path / "vault" / "signed.jsonl").read_text().splitlines()
    assert [json.loads(line)["device"] for line in signed] == ["pi-1", "pi-2", "pi-1", "pi-2"]


def test_nothing_is_signed_without_a_yes(covey: Covey, offline: Offline, tmp_path: Path):
    offline.waits("pi-1", Applicant(1))
    result = carry(covey, offline, "--coordinator", offline.coordinator, answer="n\n")
    assert result.exit_code == 1
    assert not (tmp_path / "wanted.signed").exists()
    assert not (tmp_path / "vault" / "signed.jsonl").exists()
    assert offline.vault.config.coordinator is None


def test_the_coordinator_is_pinned(covey: Covey, offline: Offline):
    offline.waits("pi-1", Applicant(1))
    assert "does not know the fleet's coordinator yet: give --coordinator KEY" in failed(
        carry(covey, offline, "--yes")
    )
    stranger = keys.SigningKey(b"\7" * 32).public.hex()
    assert "not signed by the coordinator that is pinned here" in failed(
        carry(covey, offline, "--yes", "--coordinator", stranger)
    )
    assert "--coordinator is not a key of 64 hexadecimal digits" in failed(
        carry(covey, offline, "--yes", "--coordinator", "abc")
    )
    lines(carry(covey, offline, "--yes", "--coordinator", offline.coordinator))
    lines(carry(covey, offline, "--yes"))
    assert "this CA knows another coordinator" in failed(
        carry(covey, offline, "--yes", "--coordinator", stranger)
    )


def rewritten(path: Path, **fields: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_requests_that_are_not_in_order_are_refused_as_a_whole(
    covey: Covey, offline: Offline, tmp_path: Path
):
    offline.waits("pi-1", Applicant(1))
    lines(carry(covey, offline, "--yes", "--coordinator", offline.coordinator))
    wanted, key = tmp_path / "wanted", offline.fleet.coordinator_key()
    good = wanted.read_text()

    def sign() -> str:
        return failed(covey("ca", "sign", "wanted", "--ca-dir", "vault", "--yes"))

    def request(**fields: object) -> str:
        values = {"fleet": "farm", "device": DeviceId("pi-7"), "identity": bytes(32), "days": 90}
        made = IdentityRequest(**(values | fields))  # type: ignore[arg-type]
        return base64.b64encode(wire.sign(made, key).envelope).decode()

    rewritten(wanted, fleet="barn")
    assert "these requests are of fleet barn; vault signs for fleet farm" in sign()
    rewritten(wanted, fleet="farm", requests=[request(fleet="barn")])
    assert "a request is for a device of fleet barn, not farm; nothing was signed" in sign()
    rewritten(wanted, requests=[request(), request(identity=b"\1" * 32)])
    assert "there are two requests for device pi-7; nothing was signed" in sign()
    rewritten(wanted, requests=[request(), "AAAA"])
    assert "a request is refused: a message has 67 to" in sign()
    for garbage in ("", "{}", "[]", good[:-20], good.replace("requests", "requirements")):
        wanted.write_text(garbage)
        assert "wanted is not what `covey ca requests` writes: " in sign()
    rewritten_file = json.loads(good) | {"requests": []}
    wanted.write_text(json.dumps(rewritten_file))
    assert lines(covey("ca", "sign", "wanted", "--ca-dir", "vault")) == ["there is nothing to sign"]
    signed = (tmp_path / "vault" / "signed.jsonl").read_text()
    assert signed.count("\n") == 1


def test_a_coordinator_cannot_sign_for_itself(covey: Covey, offline: Offline, tmp_path: Path):
    """It invents a device, and signs its certificate with the key it has."""
    offline.waits("pi-1", Applicant(1))
    lines(carry(covey, offline, "--yes", "--coordinator", offline.coordinator))
    forged = wire.sign(
        Certificate("farm", DeviceId("pi-1"), Applicant(1).public, NOW, NOW + 1000),
        offline.fleet.coordinator_key(),
    )
    rewritten(tmp_path / "wanted.signed", certificates=[base64.b64encode(forged.envelope).decode()])
    assert "1 not taken in: certificate is not signed by this fleet's CA" in failed(
        covey("ca", "import", "wanted.signed", "--fleet-dir", "farm")
    )
    assert [e.not_after_unix for e in offline.fleet.devices()] == [0]


def test_what_does_not_fit_is_not_taken_in(covey: Covey, offline: Offline, tmp_path: Path):
    pi = Applicant(1)
    offline.waits("pi-1", pi)
    key = offline.vault.key
    signed = tmp_path / "wanted.signed"
    lines(carry(covey, offline, "--yes", "--coordinator", offline.coordinator))

    def take(**fields: object) -> str:
        values = {
            "fleet": "farm", "device": DeviceId("pi-1"), "identity": pi.public,
            "issued_unix": NOW, "not_after_unix": NOW + 1000,
        }  # fmt: skip
        made = wire.sign(Certificate(**(values | fields)), key)  # type: ignore[arg-type]
        rewritten(signed, certificates=[base64.b64encode(made.envelope).decode()])
        return failed(covey("ca", "import", "wanted.signed", "--fleet-dir", "farm"))

    assert take(fleet="barn").endswith("device pi-1: it is for fleet barn")
    assert take(device=DeviceId("pi-9")).endswith("device pi-9: there is no such device here")
    assert take(identity=bytes(32)).endswith("for another identity than the registered one")
    rewritten(signed, fleet="barn")
    assert "these certificates are of fleet barn, not farm" in failed(
        covey("ca", "import", "wanted.signed", "--fleet-dir", "farm")
    )
    lines(carry(covey, offline, "--yes"))
    lines(covey("ca", "import", "wanted.signed", "--fleet-dir", "farm"))
    assert take(issued_unix=NOW - 10**6).endswith("device pi-1: there is a newer one")
    offline.fleet.revoke("pi-1", NOW)
    assert take().endswith("device pi-1: its identity was revoked")
    with pytest.raises(ConfigError, match="is not what `covey ca sign` writes"):
        read_file(tmp_path / "wanted", Certificates)


def test_revoked_devices_are_not_asked_for(covey: Covey, offline: Offline):
    offline.waits("pi-1", Applicant(1))
    offline.waits("pi-2", Applicant(2))
    offline.fleet.revoke("pi-1", NOW)
    assert lines(covey("ca", "requests", "-o", "wanted", "--fleet-dir", "farm"))[0] == (
        "requests of pi-2 written to wanted"
    )


def test_a_ca_s_directory_can_move_away(covey: Covey, tmp_path: Path):
    """`ca/` of a fleet that was made with its CA in it knows its coordinator."""
    bench = Bench(tmp_path / "farm")
    bench.enrol("pi-0", Applicant(9))
    (tmp_path / "vault").mkdir()
    for name in ("ca.key", "ca.pub", "ca.toml"):
        (tmp_path / "vault" / name).write_bytes((tmp_path / "farm" / "ca" / name).read_bytes())
        (tmp_path / "vault" / name).chmod(0o600)
    (tmp_path / "farm" / "ca" / "ca.key").unlink()
    pi = Applicant(1)
    assert bench.enrol("pi-1", pi).certificate == b""
    lines(covey("ca", "requests", "-o", "wanted", "--fleet-dir", "farm"))
    lines(covey("ca", "sign", "wanted", "-o", "done", "--ca-dir", "vault", "--yes"))
    lines(covey("ca", "import", "done", "--fleet-dir", "farm"))
    assert bench.certificate(bench.renew(pi, b"")).identity == pi.public


def test_a_ca_is_made_once(covey: Covey, tmp_path: Path):
    told = lines(covey("ca", "init", "vault", "--fleet", "farm"))
    public = bytes.fromhex((tmp_path / "vault/ca.pub").read_text())
    assert told == [
        f"CA for fleet farm made in {tmp_path}/vault: {grouped(public)}",
        "next: carry vault/ca.pub to the coordinator; there: covey init --fleet farm --address HOST "
        "--ca ca.pub",
    ]
    assert (tmp_path / "vault").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "vault/ca.key").stat().st_mode & 0o777 == 0o600
    assert "vault holds a fleet CA already" in failed(covey("ca", "init", "vault", "--fleet", "x"))
    assert "fleet name 'X': 1 to 32" in failed(covey("ca", "init", "other", "--fleet", "X"))
    made = lines(covey("init", "farm", "--fleet", "farm", "--address", "h", "--ca", "vault/ca.pub"))
    assert made[2] == f"fleet CA: {grouped(public)}, on another machine"
    assert FleetDirectory(tmp_path / "farm").trust.ca == public
    assert not (tmp_path / "farm" / "ca" / "ca.key").exists()
    status = covey("status", "--fleet-dir", "farm").stdout
    assert "is on this machine" not in status


def test_a_device_waits_over_a_restart(covey: Covey, offline: Offline):
    pi = Applicant(1)
    offline.waits("pi-1", pi)
    desk = EnrolmentDesk(offline.fleet)
    answer = wire.decode(desk.handle(pi.renews("pi-1", b""), pi.peer(), NOW)).message
    assert isinstance(answer, Enrolled)
    assert answer.certificate == b""


def test_a_file_without_end_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(fleet_ca, "MAX_FILE_BYTES", 100)
    (tmp_path / "f").write_bytes(bytes(101))
    with pytest.raises(ConfigError, match="is too large; it has at most 100 bytes"):
        read_file(tmp_path / "f", Requests)
