"""`covey transcript` and `covey verify`: what they print, and what they leave behind."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner, Result

from covey_coordinator.cli import main
from covey_coordinator.store import FILE, RunDirectory, Store
from covey_shared.messages import MaskedUpdate, ViewVote
from covey_shared.messages import Result as RoundResult
from lab import Lab, Mail, Play
from transcripts import Story, told

Covey = Callable[..., Result]


def without_updates_of_the_last(lab: Lab) -> Callable[[Play], None]:
    def before(play: Play) -> None:
        def intercept(mail: Mail) -> tuple[Mail, ...]:
            lost = mail.sender == lab.names[-1] and isinstance(mail.message, MaskedUpdate)
            return () if lost else (mail,)

        play.intercept = intercept

    return before


LAB = Lab(5, seed="cli")
STORY = told(LAB, without_updates_of_the_last(LAB))
CA, COORDINATOR = LAB.trust.ca.hex(), LAB.trust.coordinator.hex()


@pytest.fixture
def covey(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Covey:
    """Runs a command in tmp_path, and holds every error to one line."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("COVEY_FLEET", raising=False)

    def run(*arguments: object) -> Result:
        result = CliRunner().invoke(main, [str(a) for a in arguments])
        assert "Traceback" not in result.output
        assert result.exception is None or isinstance(result.exception, SystemExit)
        assert result.stderr == "" or re.match(r"covey: [^\n]+\n\Z|Usage: ", result.stderr)
        return result

    return run


@pytest.fixture
def round_7(tmp_path: Path) -> Path:
    """A fleet's directory with a run, and its seventh round's transcript."""
    with Store.open(tmp_path / FILE) as store:
        runs = tmp_path / "runs"
        run = RunDirectory.create(runs / "first", b"", os.urandom(16), store, created_unix=2.0)
        RunDirectory.create(runs / "older", b"", os.urandom(16), store, created_unix=1.0)
    return write(run, 7, STORY)


def write(run: RunDirectory, index: int, story: Story) -> Path:
    path = run.path / "rounds" / f"{index:05}"
    path.mkdir(parents=True)
    (path / "transcript").write_bytes(story.data())
    (path / "model-before.bin").write_bytes(story.model.astype("<f4").tobytes())
    return path / "transcript"


# -- covey transcript ------------------------------------------------------------------------------


def test_what_happened_in_a_round(covey: Covey, round_7: Path):
    result = covey("transcript", 7)
    assert result.exit_code == 0, result.output
    path = Path("runs/first/rounds/00007/transcript")
    assert result.stdout.splitlines() == [
        "round 1 of run first (fleet lab, number 1): completed",
        "checked in    5: pi-000, pi-001, pi-002, pi-003, pi-004",
        "cohort        5: pi-000, pi-001, pi-002, pi-003, pi-004; at least 3 in a sum, quorum 4",
        "shared        5: pi-000, pi-001, pi-002, pi-003, pi-004",
        "roster        5: pi-000, pi-001, pi-002, pi-003, pi-004; 5 votes",
        "updates       4: pi-000, pi-001, pi-002, pi-003",
        "in the sum    4: pi-000, pi-001, pi-002, pi-003; 4 votes",
        "revealed      by 4 members: the self masks of 4 devices in the sum, the mask keys of 1 not in it",
        f"model before  {LAB.model.hex()}",
        f"next model    {STORY.said(RoundResult).next_model.hex()}",
        "averaging     fedavg, server_lr 1",
        f"payloads      4 masked updates, {4 * len(STORY.payloads[0]):,} bytes",
        f"file          {path} ({round_7.stat().st_size:,} bytes)",
        f"check it with: covey verify {path}",
    ]


def test_an_export_and_one_of_signatures(covey: Covey, round_7: Path, tmp_path: Path):
    result = covey("transcript", 7, "--run", "first", "-o", "out.transcript")
    assert result.exit_code == 0
    assert result.stdout.splitlines()[-2:] == [
        "written to out.transcript",
        "whoever shall check the average needs runs/first/rounds/00007/model-before.bin, too",
    ]
    assert (tmp_path / "out.transcript").read_bytes() == round_7.read_bytes()
    result = covey("transcript", 7, "-o", "thin", "--signatures")
    assert result.stdout.splitlines()[-1] == "written to thin"
    assert (tmp_path / "thin").read_bytes() == STORY.but(thinned=set(STORY.payloads)).data()
    assert covey("transcript", 7, "--signatures").exit_code == 2
    lost = covey("transcript", 7, "-o", "no/such/directory")
    assert lost.exit_code == 1
    assert "cannot write no/such/directory: No such file or directory" in lost.stderr


def test_rounds_that_are_not_there(covey: Covey, round_7: Path, tmp_path: Path):
    for arguments, said in (
        ((8,), "run first has no transcript of round 8; there are those of rounds 7 to 7"),
        ((7, "--run", "older"), "run older has no transcript of round 7; there is none yet"),
        ((7, "--run", "nope"), "there is no run 'nope'; there are: first, older"),
        (
            (7, "--fleet-dir", "else"),
            "there is no run in else; name the fleet with --fleet-dir, or queue one with covey run",
        ),
    ):
        result = covey("transcript", *arguments)
        assert (result.exit_code, result.stderr) == (1, f"covey: {said}\n")
    assert covey("transcript", 0).exit_code == 2


def test_a_round_that_still_runs_is_shown_so_far(covey: Covey, round_7: Path):
    data = round_7.read_bytes()
    round_7.unlink()
    round_7.with_name(".transcript.part").write_bytes(data[: len(data) // 3])
    result = covey("transcript", 7)
    assert result.exit_code == 0
    assert "not ended (the transcript ends within" in result.stdout
    assert "checked in    5: pi-000" in result.stdout


def test_damaged_files_are_named(covey: Covey, round_7: Path):
    round_7.write_bytes(b"what is this?")
    result = covey("transcript", 7)
    assert result.exit_code == 1
    assert re.match(r"covey: runs/first/rounds/00007/transcript: .*\n\Z", result.stderr)
    round_7.write_bytes(b"covey transcript 1\n")
    assert "the transcript is empty" in covey("transcript", 7).stderr


def test_an_abandoned_round(covey: Covey, tmp_path: Path):
    lab = Lab(4, seed="cli abandoned")

    def before(play: Play) -> None:
        play.intercept = lambda mail: () if isinstance(mail.message, ViewVote) else (mail,)

    with Store.open(tmp_path / FILE) as store:
        run = RunDirectory.create(tmp_path / "runs" / "first", b"", os.urandom(16), store)
    path = write(run, 1, told(lab, before))
    shown = covey("transcript", 1).stdout
    assert shown.splitlines()[0].endswith(
        "abandoned: 0 of the committee's 4 members confirmed the view; 3 are needed"
    )
    assert "payloads" not in shown
    result = covey("verify", path)
    assert result.exit_code == 0
    assert "PASS         Who is on the roster sent its shares" in result.stdout
    assert "NOT CHECKED  Their sum without the masks" in result.stdout
    assert "The round was abandoned: it has no sum, and shows how far it came." in result.stdout
    assert "It proves that" not in result.stdout


# -- covey verify ----------------------------------------------------------------------------------


def marks(result: Result) -> list[str]:
    return re.findall(r"^(PASS|FAIL|NOT CHECKED) ", result.stdout, re.MULTILINE)


def test_a_round_is_verified(covey: Covey, round_7: Path, tmp_path: Path):
    (tmp_path / "ca.pub").write_text(CA + "\n")
    after = tmp_path / "parameters.bin"
    after.write_bytes(STORY.average().astype("<f4").tobytes())
    result = covey(
        "verify", round_7, "--fleet-ca", "ca.pub", "--coordinator", COORDINATOR, "--model", after,
        "--strict",
    )  # fmt: skip
    assert result.exit_code == 0, result.stdout
    assert set(marks(result)) == {"PASS"}
    assert len(marks(result)) == 18
    flat = re.sub(r"\s+", " ", result.stdout)
    assert "It proves that 4 of 5 devices with certificates of the fleet CA are in the sum" in flat
    assert "The next model is exactly the one before and the average of that sum." in flat
    assert f"{after} is that next model." in flat.replace("- ", "-")
    assert "It does not prove what the devices trained on" in flat
    assert "at least a third of the members had signed twice" in flat
    assert "on faith" not in flat


def test_a_round_is_verified_without_anything_else(covey: Covey, round_7: Path, tmp_path: Path):
    alone = tmp_path / "elsewhere" / "sent.transcript"
    alone.parent.mkdir()
    alone.write_bytes(round_7.read_bytes())
    result = covey("verify", alone)
    assert result.exit_code == 0
    assert marks(result).count("NOT CHECKED") == 3
    flat = re.sub(r"\s+", " ", result.stdout)
    assert "Whose fleet it is was taken on faith" in flat
    assert "That the next model comes from that sum was not checked." in flat
    assert covey("verify", alone, "--strict").exit_code == 1


def test_a_model_that_has_nothing_to_do_with_it(covey: Covey, round_7: Path, tmp_path: Path):
    (tmp_path / "other").write_bytes(bytes(4 * LAB.n_params))
    result = covey("verify", round_7, "--model", "other")
    assert result.exit_code == 0
    assert "other is neither the model before this round nor the next one." in result.stdout
    assert "other is that" not in result.stdout


def test_what_a_file_says_does_not_write_on_the_terminal(covey: Covey, round_7: Path):
    about = msgspec.structs.replace(STORY.about, rule="\x1b[31mfedavg")
    round_7.write_bytes(STORY.but(about=about).data())
    for result in (covey("transcript", 7), covey("verify", round_7)):
        assert result.exit_code == 0
        assert "\x1b" not in result.output
        assert "fedavg" in result.output


def test_a_transcript_that_does_not_hold(covey: Covey, round_7: Path):
    data = bytearray(round_7.read_bytes())
    data[len(data) // 2] ^= 1
    round_7.write_bytes(data)
    result = covey("verify", round_7)
    assert result.exit_code == 1
    assert result.stderr == ""
    assert "FAIL" in marks(result)
    assert "This transcript does not hold" in result.stdout
    assert "It proves that" not in result.stdout


def test_another_fleets_transcript(covey: Covey, round_7: Path):
    result = covey("verify", round_7, "--fleet-ca", "00" * 32)
    assert result.exit_code == 1
    assert "FAIL         The fleet CA's key is the one that you named" in result.stdout


@pytest.mark.parametrize("data", [b"", b"nonsense", b"covey transcript 1\n\xff\xff\xff\xff\xff"])
def test_files_that_are_no_transcripts(covey: Covey, tmp_path: Path, data: bytes):
    (tmp_path / "file").write_bytes(data)
    result = covey("verify", "file")
    assert result.exit_code == 1
    assert marks(result)[0] == "FAIL"
    assert "PASS" not in marks(result)


def test_wrong_uses_say_what_to_do(covey: Covey, round_7: Path, tmp_path: Path):
    (tmp_path / "empty").write_text("")
    for arguments, said in (
        (("nowhere",), "cannot read nowhere: No such file or directory"),
        ((round_7, "--fleet-ca", "nowhere"), "--fleet-ca nowhere"),
        ((round_7, "--coordinator", "empty"), "--coordinator empty holds no key of 64 hexadecimal"),
        ((round_7, "--model", "nowhere"), "--model nowhere does not exist"),
    ):
        result = covey("verify", *arguments)
        assert result.exit_code == 1
        assert said in result.stderr


def test_verifying_takes_no_more_than_a_device_has(round_7: Path):
    """Neither rich nor onnxruntime nor a network is loaded for it."""
    code = (
        "import sys; from covey_coordinator.cli import main\n"
        f"try: main(['verify', {str(round_7)!r}])\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "loaded = {'rich', 'onnxruntime', 'paho', 'torch'} & set(sys.modules)\n"
        "assert not loaded, loaded"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
