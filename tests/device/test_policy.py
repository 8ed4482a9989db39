"""The owner's policy: what it refuses, how its file is read, and a day that no clock can stretch."""

import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from hypothesis import given
from hypothesis import strategies as st

import covey_device.assembly
from config_walk import Key, keys_of, put, wrong_values
from covey_device import config
from covey_device.assembly import steady_clock
from covey_device.config import PolicyConfig, PolicyFile, load_policy
from covey_device.policy import DAY_S, MAX_ROUNDS_PER_DAY, SAVE_CLOCK_S, Day, Policy, signers_of
from covey_shared import wire
from covey_shared.errors import ConfigError
from covey_shared.keys import SigningKey
from covey_shared.messages import PlanSignature, RoundCall
from lab import Lab

LAB = Lab(3)
OWNER, OTHER = SigningKey(b"o" * 32), SigningKey(b"x" * 32)
KEYS = keys_of(PolicyConfig)


def signature(owner: SigningKey, plan: bytes, *, name: bytes | None = None) -> bytes:
    return wire.sign(PlanSignature(name or owner.public, plan), owner).envelope


def call(**changes: Any) -> RoundCall:
    return LAB.call(1, **changes)


def objection(policy: Policy, called: RoundCall, day: Day | None = None) -> str | None:
    return policy.objection(called, {}, day or Day(), 0.0)


# -- what it refuses -------------------------------------------------------------------------------

PLAN = call().plan
ALONE = [
    (Policy(min_cohort=4), call(n_min=3), call(n_min=4), "takes part among at least 4"),
    (Policy(max_revisions=1), call(revision=2), call(revision=1), "policy allows 1"),
    (Policy(plans=frozenset([bytes(32)])), call(), call(plan=bytes(32)), "is not one of those"),
    (
        Policy(owners=frozenset([OWNER.public])),
        call(plan_signatures=(signature(OTHER, PLAN),)),
        call(plan_signatures=(signature(OTHER, PLAN), signature(OWNER, PLAN))),
        "is not signed by a model owner",
    ),
]


@pytest.mark.parametrize(("policy", "refused", "fine", "because"), ALONE)
def test_each_restriction_holds_by_itself(
    policy: Policy, refused: RoundCall, fine: RoundCall, because: str
):
    assert because in str(objection(policy, refused))
    assert objection(policy, fine) is None
    assert objection(Policy(), refused) is None


def test_a_plan_must_be_both_listed_and_signed_if_both_are_asked_for():
    listed = frozenset([PLAN])
    both = Policy(plans=listed, owners=frozenset([OWNER.public]))
    assert "is not signed" in str(objection(both, call()))
    signed = call(plan_signatures=(signature(OWNER, PLAN),))
    assert objection(both, signed) is None
    elsewhere = replace(both, plans=frozenset([bytes(32)]))
    assert "is not one of those" in str(objection(elsewhere, signed))


FORGED = wire.sign(PlanSignature(OWNER.public, PLAN), OTHER).envelope
NO_SIGNATURES = {
    "none": (),
    "of another plan": (signature(OWNER, bytes(32)),),
    "by another": (signature(OTHER, PLAN),),
    "in the owner's name": (FORGED,),
    "damaged": (signature(OWNER, PLAN)[:-1] + b"\x00",),
    "no signature at all": (b"\x01" * 100,),
    "another kind of message": (LAB.certificates[LAB.names[0]],),
    "all of them": (signature(OWNER, bytes(32)), FORGED, b"\x01" * 100, signature(OTHER, PLAN)),
}


@pytest.mark.parametrize("signatures", NO_SIGNATURES.values(), ids=NO_SIGNATURES)
def test_what_is_no_signature_of_the_owner(signatures: tuple[bytes, ...]):
    called = call(plan_signatures=signatures)
    assert OWNER.public not in signers_of(called)
    assert "is not signed" in str(objection(Policy(owners=frozenset([OWNER.public])), called))
    # Rubbish beside a good one does no harm: the coordinator could always leave it out.
    good = call(plan_signatures=(*signatures[:3], signature(OWNER, PLAN)))
    assert signers_of(good)[-1] == OWNER.public
    assert objection(Policy(owners=frozenset([OWNER.public])), good) is None


def test_a_signer_counts_once():
    assert signers_of(call(plan_signatures=(signature(OWNER, PLAN),) * 3)) == (OWNER.public,)


# -- a day -----------------------------------------------------------------------------------------


def test_rounds_of_the_last_24_hours_count():
    policy, day = Policy(rounds_per_day=2), Day()
    for now in (1000, 2000):
        assert policy.objection(call(), {}, day, now) is None
        day = day.join(now)
    assert "allows 2 rounds a day" in str(policy.objection(call(), {}, day, 2001))
    assert policy.objection(call(), {}, day, 1000 + DAY_S - 1) is not None
    assert policy.objection(call(), {}, day, 1000 + DAY_S) is None
    assert day.at(2000 + DAY_S).rounds == 0


def test_a_running_device_keeps_its_own_time(monkeypatch: pytest.MonkeyPatch):
    """Whoever sets its clock, over the network for instance, moves no day."""
    clock = steady_clock()
    before = clock()
    assert abs(before - time.time()) < 1
    monkeypatch.setattr(covey_device.assembly.time, "time", lambda: before + 10 * DAY_S)
    assert 0 <= clock() - before < 60
    assert steady_clock()() - before > 9 * DAY_S  # it is looked at when a process starts


STEPS = st.lists(st.integers(0, DAY_S), min_size=1, max_size=60)


def joins(policy: Policy, day: Day, now: float) -> tuple[bool, Day]:
    """A round is called. Returns whether it was joined, and what is remembered then."""
    fine = policy.objection(call(), {}, day, now) is None
    return fine, day.join(now) if fine else day.at(now)


@given(limit=st.integers(1, 5), steps=STEPS)
def test_with_a_sound_clock_the_bound_is_exact(limit: int, steps: list[int]):
    policy, day, now, joined = Policy(rounds_per_day=limit), Day(), 1_800_000_000, []
    for step in steps:
        now += step
        recent = sum(now - t < DAY_S for t in joined)
        fine, day = joins(policy, day, now)
        assert fine == (recent < limit)
        if fine:
            joined.append(now)


JUMPS = st.integers(-60 * 365 * DAY_S, 60 * 365 * DAY_S)


@given(
    limit=st.integers(1, 4),
    steps=st.lists(st.tuples(st.integers(0, DAY_S // 4), st.none() | JUMPS), max_size=60),
)
def test_each_jump_forward_gives_at_most_one_day_more(
    limit: int, steps: list[tuple[int, int | None]]
):
    """In any true 24 hours: the bound, and once more for each jump forward of the clock."""
    policy, day, true, wrong = Policy(rounds_per_day=limit), Day(), 0, 1_800_000_000
    joined: list[int] = []
    forward: list[int] = []
    for step, jump in steps:
        true += step
        if jump is not None:
            wrong += jump
            if jump > 0:
                forward.append(true)
        fine, day = joins(policy, day, true + wrong)
        if fine:
            joined.append(true)
            window = [t for t in joined if true - t < DAY_S]
            extra = sum(t >= window[0] for t in forward)
            assert len(window) <= limit * (1 + extra)


@given(
    limit=st.integers(1, 4),
    used=st.integers(0, 4),
    back=st.integers(0, 80 * 365 * DAY_S),
    forward=st.integers(0, 80 * 365 * DAY_S),
)
def test_no_jump_locks_a_device_out_for_longer_than_a_day(
    limit: int, used: int, back: int, forward: int
):
    policy, day, now = Policy(rounds_per_day=limit), Day(), 1_800_000_000
    for _ in range(min(limit, used)):
        fine, day = joins(policy, day, now)
        assert fine
    now += forward
    day = day.at(now)
    now -= back
    day = day.at(now)  # seen in 1910, perhaps; and from here on the clock is sound
    fine, _ = joins(policy, day.at(now + DAY_S // 2), now + DAY_S)
    assert fine


def test_a_device_that_restarts_without_a_clock_gets_its_day_back():
    """A Pi without a battery that is off every night and starts in 1970 each morning, while its quota
    is used up: what it waited is saved now and then, or it would wait for ever."""
    policy = Policy(rounds_per_day=1)
    saved = Day().join(1_800_000_000)
    for morning in range(1, 20):
        day = saved
        for minute in range(0, 8 * 60, 5):
            fine, day = joins(policy, day, 60 * minute)
            if fine:
                assert morning in (3, 4, 5)  # 24 hours of eight each, and some lost at each end
                return
            if day.worth_saving(saved):
                saved = day
    pytest.fail("it never joined again")


def test_a_clock_that_went_back_is_kept_at_once():
    """Or a device that restarts every hour would see it go back each time, and wait for ever."""
    saved = Day().join(1_800_000_000)
    assert saved.at(1000).worth_saving(saved)
    assert saved.at(1_799_999_999).worth_saving(saved)
    assert not saved.at(1_800_000_000).worth_saving(saved)
    assert not Day().at(5).worth_saving(Day())


@given(steps=STEPS)
def test_waiting_is_saved_at_most_once_an_hour(steps: list[int]):
    now, saved = 1000, Day(0, 1000)
    day = saved
    writes = 0
    for step in steps:
        now += step
        day = day.at(now)
        if day.worth_saving(saved):
            writes, saved = writes + 1, day
    assert writes <= sum(steps) / SAVE_CLOCK_S
    assert day.own_s - saved.own_s < SAVE_CLOCK_S


def test_what_is_remembered_is_bounded():
    day = Day()
    for now in range(3 * MAX_ROUNDS_PER_DAY):
        day = day.join(now)
    assert day.rounds == MAX_ROUNDS_PER_DAY
    limit = Policy(rounds_per_day=MAX_ROUNDS_PER_DAY)
    assert limit.objection(call(), {}, day, 3 * MAX_ROUNDS_PER_DAY) is not None


# -- the file --------------------------------------------------------------------------------------


def test_the_defaults_are_the_policy_s_own(tmp_path: Path):
    assert load_policy(tmp_path / "policy.toml") == PolicyConfig()
    assert PolicyConfig().policy == Policy()


def test_a_file_of_another_name_must_be_there(tmp_path: Path):
    with pytest.raises(ConfigError) as caught:
        load_policy(tmp_path / "mine.toml")
    assert str(caught.value) == (
        f"{tmp_path / 'mine.toml'} does not exist; key `policy` of device.toml names it: write one, "
        "or remove the key"
    )


def test_every_key_arrives(tmp_path: Path):
    path = tmp_path / "policy.toml"
    path.write_text(
        tomli_w.dumps(
            {
                "min_cohort": 5,
                "max_weight": 10,
                "max_revisions": 1,
                "rounds_per_day": 2,
                "plans": ["ab" * 32],
                "owners": ["cd" * 32],
                "limits": {"max_batches": 7, "threads": 2},
            }
        )
    )
    read = load_policy(path)
    plans, owners = frozenset([b"\xab" * 32]), frozenset([b"\xcd" * 32])
    assert read.policy == Policy(5, 10, 1, 2, plans, owners)
    assert (read.limits.max_batches, read.limits.threads) == (7, 2)


@pytest.mark.parametrize("key", KEYS, ids=lambda key: key.name)
def test_each_key_refuses_what_it_cannot_be(tmp_path: Path, key: Key):
    path = tmp_path / "policy.toml"
    for value in wrong_values(key.kind):
        path.write_text(tomli_w.dumps(put({}, key.name, value)))
        with pytest.raises(ConfigError, match=f"key `{key.name}") as caught:
            load_policy(path)
        assert str(caught.value).startswith(f"{path}: ")
    path.write_text(tomli_w.dumps(put({}, key.name + "x", 1)))
    with pytest.raises(ConfigError, match=f"did you mean `{key.name}`"):
        load_policy(path)


@pytest.mark.parametrize("key", ["plans", "owners"])
def test_an_empty_list_is_not_taken_for_no_restriction(tmp_path: Path, key: str):
    path = tmp_path / "policy.toml"
    path.write_text(f"{key} = []\n")
    with pytest.raises(ConfigError, match=f"key `{key}` is an empty list; it must be a list of at"):
        load_policy(path)


def test_what_holds_is_said_in_words():
    assert PolicyConfig().in_words() == [
        "takes part in sums of at least 3 devices",
        "counts in a sum for at most 1,000,000 examples",
        "gives an update to one and the same model at most 51 times",
        "joins any number of rounds a day",
        "runs any plan of the coordinator",
        "trains at most 10,000 batches and 600 seconds a round, on 1 thread, within 400 MB",
        "tries a plan it has not seen for at most 60 seconds",
        "trains below 70 C, pauses from 75 C on, ends from 80 C on; leaves others 64 MB of memory",
        "does not train while throttled, on battery or on a metered network",
    ]
    strict = PolicyConfig(
        rounds_per_day=24, plans=("ab" * 32,), owners=("1" * 64, "2" * 64, "3" * 64)
    )
    assert strict.in_words()[3:6] == [
        "joins at most 24 rounds a day",
        "runs only the plans abababababababab...",
        "runs only plans signed by 1111111111111111..., 2222222222222222... or 3333333333333333...",
    ]


# -- the file, changed -----------------------------------------------------------------------------


def written(path: Path, text: str) -> None:
    """As an editor does it: a new file in place of the old one."""
    fresh = path.with_suffix(".tmp")
    fresh.write_text(text)
    fresh.replace(path)


def test_a_change_is_noticed(tmp_path: Path):
    path = tmp_path / "policy.toml"
    file = PolicyFile(path)
    assert file.current == PolicyConfig()
    assert not file.refresh()
    written(path, "min_cohort = 5\n")
    assert file.refresh()
    assert file.current.min_cohort == 5
    assert not file.refresh()
    written(path, "min_cohort = 5 # as it was\n")
    assert not file.refresh()


@pytest.mark.parametrize("text", ["min_cohort = 1\n", "min_cohort =\n", "nonsense = 3\n"])
def test_a_broken_file_leaves_what_held_and_is_told_once(tmp_path: Path, text: str):
    path = tmp_path / "policy.toml"
    path.write_text("min_cohort = 5\n")
    file = PolicyFile(path)
    written(path, text)
    with pytest.raises(ConfigError, match=r"policy\.toml: "):
        file.refresh()
    assert not file.refresh()
    assert file.current.min_cohort == 5
    with pytest.raises(ConfigError):
        file.refresh(anyway=True)
    written(path, "min_cohort = 6\n")
    assert file.refresh()
    assert file.current.min_cohort == 6


def test_a_file_that_vanishes_allows_nothing_new(tmp_path: Path):
    path = tmp_path / "policy.toml"
    path.write_text("min_cohort = 5\n")
    file = PolicyFile(path)
    path.unlink()
    with pytest.raises(ConfigError, match="is gone; what it said holds until the next start"):
        file.refresh()
    assert not file.refresh()
    with pytest.raises(ConfigError, match="is gone"):
        file.refresh(anyway=True)
    assert file.current.min_cohort == 5
    written(path, "min_cohort = 4\n")
    assert file.refresh()
    assert file.current.min_cohort == 4


def test_a_signal_reads_what_no_time_stamp_tells(tmp_path: Path):
    path = tmp_path / "policy.toml"
    path.write_text("min_cohort = 5\n")
    file = PolicyFile(path)
    before = path.stat()
    path.write_text("min_cohort = 6\n")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert not file.refresh()
    assert file.refresh(anyway=True)
    assert file.current.min_cohort == 6


def test_it_is_never_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = PolicyFile(tmp_path / "policy.toml")
    file.refresh(anyway=True)
    assert list(tmp_path.iterdir()) == []
    assert config.DEFAULT_POLICY == "policy.toml"
