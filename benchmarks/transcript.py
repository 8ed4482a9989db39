"""What a round's transcript takes: bytes on disk, the coordinator's time to write, a reader's to verify.

    python benchmarks/transcript.py [--params 50000] [--devices 10 --devices 128] [--json FILE]

A round of a fleet in memory, with real cryptography; a tenth of the devices is lost before the upload.
Writing is measured on the file system of the temporary directory, all calls of the round together.
"""

import sys
import tempfile
import time
import tracemalloc
from pathlib import Path

import click

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from _report import Row, report

from covey_coordinator.config import TranscriptsConfig
from covey_coordinator.round import Completed
from covey_coordinator.store import RunDirectory, Store
from covey_coordinator.transcript import Scribe, thin
from covey_shared.messages import MaskedUpdate
from covey_shared.secagg import rules
from covey_shared.transcript import Kind
from covey_shared.transcript_checks import Report
from lab import Lab, Mail, Play
from transcripts import Story, checked, told

VERIFY_S = {10: 1.0, 128: 20.0}
"""Longest that verifying a full transcript may take, one core."""


def story_of(devices: int, params: int) -> Story:
    """A round in which a tenth of the devices vanishes before the upload."""
    lab = Lab(devices, seed="bench", n_params=params)
    lost = set(lab.names[: devices // 10])

    def before(play: Play) -> None:
        def intercept(mail: Mail) -> tuple[Mail, ...]:
            gone = mail.sender in lost and isinstance(mail.message, MaskedUpdate)
            return () if gone else (mail,)

        play.intercept = intercept

    return told(lab, before)


def written(story: Story, directory: Path) -> tuple[Path, float]:
    """Write it as the coordinator does: (the round's directory, seconds)."""
    lab = story.lab
    run = RunDirectory.create(directory / "run", b"", bytes(16), Store.in_memory())
    scribe = Scribe(run, TranscriptsConfig(), lab.trust, lab.coordinator_key)
    run.spool.mkdir()
    cohort = rules.verified_cohort(story.manifest(), lab.trust)
    completed = story._completed
    assert isinstance(completed, Completed)
    assert story.key is not None
    model = story.model.astype("<f4").tobytes()
    taken = -time.perf_counter()
    writer = scribe.open(1, lab.call(), "fedavg", 1.0)
    for signed in story.messages:
        writer.message(signed)
    taken += time.perf_counter()
    for index, payload in story.payloads.items():
        place = writer.place_for(cohort.peers[index].device)
        assert place is not None
        place.write_bytes(payload)  # in a real round, the upload's own file is moved here
    taken -= time.perf_counter()
    writer.completed(cohort, completed, story.key, model)
    scribe.tidy()
    taken += time.perf_counter()
    assert writer.problem is None
    return run.path / "rounds" / "00001", taken


def timed(data: bytes, story: Story) -> tuple[float, Report]:
    """The faster of two verifications, and what it found."""
    best = float("inf")
    for _ in range(2):
        rules.forget_certificates()
        start = time.perf_counter()
        found = checked(
            data,
            model=story.model,
            fleet_ca=story.lab.trust.ca,
            coordinator=story.lab.trust.coordinator,
        )
        best = min(best, time.perf_counter() - start)
    return best, found


@click.command()
@click.option("--params", default=50_000, show_default=True, help="Parameters of the model.")
@click.option("--devices", multiple=True, default=(10, 128), show_default=True, help="Cohorts.")
@click.option(
    "--json", "json_path", type=click.Path(path_type=Path), help="Write the figures here."
)
def main(params: int, devices: tuple[int, ...], json_path: Path | None) -> None:
    """Measure, print and judge."""
    rows = []
    for n in devices:
        story = story_of(n, params)
        with tempfile.TemporaryDirectory(prefix="covey-bench-") as directory:
            place, seconds = written(story, Path(directory))
            path = place / "transcript"
            full, model = path.stat().st_size, (place / "model-before.bin").stat().st_size
            data = path.read_bytes()
            start = time.perf_counter()
            thin(place)
            thinning = time.perf_counter() - start
            small = path.stat().st_size
            thinned = path.read_bytes()
        verifying, found = timed(data, story)
        assert found.complete, found.checks
        signatures, rest = timed(thinned, story)
        assert not rest.failed
        tracemalloc.start()
        checked(data, model=story.model)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        messages = sum(kind is Kind.MESSAGE for kind, _ in story.records())
        limit = VERIFY_S.get(n)
        rows += [
            Row(f"{n} devices: messages", messages, "", "", True),
            Row(f"{n} devices: full", full / 1e6, "MB", "", True),
            Row(f"{n} devices: model before", model / 1e6, "MB", "", True),
            Row(f"{n} devices: signatures", small / 1e6, "MB", "", True),
            Row(f"{n} devices: writing, a round", 1000 * seconds, "ms", "", True),
            Row(f"{n} devices: thinning", 1000 * thinning, "ms", "", True),
            Row(
                f"{n} devices: verifying, full",
                verifying,
                "s",
                f"<= {limit:g}" if limit else "",
                limit is None or verifying <= limit,
            ),
            Row(f"{n} devices: verifying, signatures", signatures, "s", "", True),
            Row(f"{n} devices: peak memory of verifying", peak / 1e6, "MB", "", True),
        ]
    sys.exit(0 if report(rows, json_path) else 1)


if __name__ == "__main__":
    main()
