"""Model owners' keys, their signatures in a plan's directory, and their way into a round's call."""

import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from covey_coordinator.cli import main
from covey_coordinator.config import BrokerConfig, RunConfig
from covey_coordinator.daemon import load_run
from covey_coordinator.fleet import FleetDirectory
from covey_coordinator.plans.bundle import load_bundle, write
from covey_coordinator.plans.signing import (
    make_owner_key,
    owner_of,
    read_owner_key,
    read_signatures,
    sign_plan,
)
from covey_coordinator.queueing import queue_run
from covey_coordinator.run import Run
from covey_coordinator.store import RunDirectory, Store
from covey_device.policy import Day, Policy, signers_of
from covey_fleet.models import PLANS
from covey_shared import wire
from covey_shared.errors import ConfigError, MalformedError, StorageError
from covey_shared.keys import SigningKey
from covey_shared.messages import MAX_PLAN_SIGNATURES, PlanSignature

OWNER, OTHER = SigningKey(b"o" * 32), SigningKey(b"x" * 32)
MLP = load_bundle(PLANS / "mlp")


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    shutil.copytree(PLANS / "mlp", tmp_path / "plan")
    return tmp_path / "plan"


def covey(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["plan", *map(str, arguments)])


# -- keys ------------------------------------------------------------------------------------------


def test_a_key_is_its_owner_s_alone_and_read_again(tmp_path: Path):
    path = tmp_path / "owner.key"
    public = make_owner_key(path, b"o" * 32)
    assert path.stat().st_mode & 0o777 == 0o600
    assert read_owner_key(path).public == public == OWNER.public
    assert [p.name for p in tmp_path.iterdir()] == ["owner.key"]


def test_a_key_is_never_written_over(tmp_path: Path):
    path = tmp_path / "owner.key"
    make_owner_key(path, b"o" * 32)
    with pytest.raises(ConfigError, match="is there already"):
        make_owner_key(path, b"x" * 32)
    assert read_owner_key(path).public == OWNER.public
    assert [p.name for p in tmp_path.iterdir()] == ["owner.key"]
    with pytest.raises(StorageError, match="cannot write"):
        make_owner_key(tmp_path / "none" / "owner.key", b"o" * 32)


def test_keys_that_cannot_be_used(tmp_path: Path):
    path = tmp_path / "owner.key"
    with pytest.raises(ConfigError, match="`covey plan owner-key FILE` makes one"):
        read_owner_key(path)
    make_owner_key(path, b"o" * 32)
    path.chmod(0o644)
    with pytest.raises(ConfigError, match=r"can be read by others \(mode 0644\); run: chmod 600"):
        read_owner_key(path)
    path.chmod(0o600)
    path.write_text("ab")
    with pytest.raises(ConfigError, match="is not 64 hexadecimal digits"):
        read_owner_key(path)


# -- signing ---------------------------------------------------------------------------------------


def test_several_owners_sign_each_once(plan: Path):
    for key in (OWNER, OTHER, OWNER):
        sign_plan(plan, MLP.hash, key)
    bundle = load_bundle(plan)
    assert {owner_of(envelope) for envelope in bundle.signatures} == {OWNER.public, OTHER.public}
    assert len(bundle.signatures) == 2
    assert bundle.hash == MLP.hash


def test_no_more_sign_than_a_round_can_carry(plan: Path):
    owners = [SigningKey(bytes([i]) * 32) for i in range(MAX_PLAN_SIGNATURES + 1)]
    for key in owners[:-1]:
        sign_plan(plan, MLP.hash, key)
    with pytest.raises(ConfigError, match="4 owners have signed already"):
        sign_plan(plan, MLP.hash, owners[-1])
    sign_plan(plan, MLP.hash, owners[0])  # once more does no harm
    envelope = wire.sign(PlanSignature(owners[-1].public, MLP.hash), owners[-1]).envelope
    (plan / "signatures" / "fifth.sig").write_bytes(envelope)
    with pytest.raises(MalformedError, match="has 5 signatures; a round can carry 4"):
        load_bundle(plan)


def good() -> bytes:
    return wire.sign(PlanSignature(OWNER.public, MLP.hash), OWNER).envelope


BROKEN = {
    "empty": (b"", "is no signature of a plan"),
    "torn": (good()[:-1], "is no signature of a plan"),
    "flipped": (good()[:30] + bytes([good()[30] ^ 1]) + good()[31:], "is not signed by"),
    "forged": (wire.sign(PlanSignature(OWNER.public, MLP.hash), OTHER).envelope, "is not signed"),
    "foreign": (
        wire.sign(PlanSignature(OWNER.public, bytes(32)), OWNER).envelope,
        "is of plan 0000",
    ),
}


@pytest.mark.parametrize(("data", "problem"), BROKEN.values(), ids=BROKEN)
def test_a_signature_that_is_none_is_named_when_a_run_is_queued(
    tmp_path: Path, plan: Path, data: bytes, problem: str
):
    fleet = FleetDirectory.create(tmp_path / "fleet", "farm", BrokerConfig()).path
    sign_plan(plan, MLP.hash, OTHER)
    (plan / "signatures" / "mine.sig").write_bytes(data)
    with pytest.raises(MalformedError, match=problem) as caught:
        queue_run(fleet, plan, "run", {})
    assert str(caught.value).startswith(f"{plan / 'signatures' / 'mine.sig'} is ")
    assert "remove it" in str(caught.value)
    assert not (fleet / "runs" / "run").exists()
    with pytest.raises(MalformedError):
        sign_plan(plan, MLP.hash, OWNER)
    (plan / "signatures" / "mine.sig").unlink()
    (plan / "signatures" / ".DS_Store").write_bytes(b"a file manager's own")
    queue_run(fleet, plan, "run", {})


# -- their way -------------------------------------------------------------------------------------


def test_a_run_carries_the_signatures_it_was_queued_with(tmp_path: Path, plan: Path):
    fleet = FleetDirectory.create(tmp_path / "fleet", "farm", BrokerConfig()).path
    sign_plan(plan, MLP.hash, OWNER)
    sign_plan(plan, MLP.hash, OTHER)
    directory = queue_run(fleet, plan, "run", {})
    shutil.rmtree(plan / "signatures")
    _, run = load_run(RunDirectory(directory.path, directory.store))
    call = run.spec("farm", 1).call
    assert set(signers_of(call)) == {OWNER.public, OTHER.public}
    assert wire.decode(wire.sign(call, OTHER).envelope).message == call
    picky = Policy(owners=frozenset([OWNER.public]), plans=frozenset([MLP.hash]))
    assert picky.objection(call, {}, Day(), 0.0) is None


def test_without_signatures_everything_is_as_before(tmp_path: Path, plan: Path):
    fleet = FleetDirectory.create(tmp_path / "fleet", "farm", BrokerConfig()).path
    directory = queue_run(fleet, plan, "run", {})
    assert not directory.signatures.exists()
    _, run = load_run(directory)
    assert run.spec("farm", 1).call.plan_signatures == ()
    assert read_signatures(plan / "none", MLP.hash) == ()


def test_a_call_is_of_the_bundle_s_signatures(tmp_path: Path):
    directory = RunDirectory.create(tmp_path / "run", b"", bytes(16), Store.in_memory())
    assert Run(directory, RunConfig(plan="p"), MLP).spec("farm", 1).call.plan_signatures == ()


def test_the_same_plan_written_again_stays_signed(plan: Path):
    sign_plan(plan, MLP.hash, OWNER)
    write(MLP, plan, replace=True)
    assert [owner_of(envelope) for envelope in load_bundle(plan).signatures] == [OWNER.public]
    other = load_bundle(PLANS / "cnn")
    write(other, plan, replace=True)
    assert load_bundle(plan).signatures == ()
    assert not (plan / "signatures").exists()


# -- as typed --------------------------------------------------------------------------------------


def test_a_plan_is_signed_and_shown(tmp_path: Path, plan: Path):
    key = tmp_path / "owner.key"
    made = covey("owner-key", key)
    assert made.exit_code == 0
    public = read_owner_key(key).public.hex()
    assert made.output == (
        f"private key: {key}; whoever reads it signs as you\n"
        f'for policy.toml on devices: owners = ["{public}"]\n'
    )
    assert read_owner_key(key).seed.hex() not in made.output
    assert "signed by" not in covey("show", plan).output
    signed = covey("sign", plan, "--key", key)
    assert signed.exit_code == 0
    assert signed.output == (
        f"{plan / 'signatures' / f'{public}.sig'}: plan {MLP.hash.hex()[:12]}, signed by {public}\n"
    )
    shown = covey("show", plan).output
    assert "signed by" in shown
    assert public in "".join(shown.split())


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("sign", "plan", "--key", "none.key"), "`covey plan owner-key FILE` makes one"),
        (("sign", "none", "--key", "owner.key"), "a plan's directory is what"),
        (("owner-key", "owner.key"), "is there already"),
    ],
)
def test_what_is_wrong_is_one_line(
    tmp_path: Path,
    plan: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    problem: str,
):
    monkeypatch.chdir(tmp_path)
    make_owner_key(Path("owner.key"), b"o" * 32)
    done = covey(*arguments)
    assert done.exit_code == 1
    assert done.stderr.startswith("covey: ")
    assert problem in done.stderr
    assert done.stderr.count("\n") == 1
