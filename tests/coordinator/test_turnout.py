"""What became of each device in a round: from the machine's course, over whole rounds, and in the store."""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from covey_coordinator.phases import Phase
from covey_coordinator.run import Run
from covey_coordinator.sightings import Sightings
from covey_coordinator.store import Attendance, DeviceRound, Sighting, Store, database
from covey_coordinator.turnout import MAX_REASONS, MAX_WORDS, OTHERS, Course, Fate, counted, fates
from covey_shared import wire
from covey_shared.errors import StorageError
from covey_shared.messages import CheckIn, Decline, DeviceId, Reveal, ViewVote
from memory_fleet import TOPICS, Fleet, config, go, hasten, short
from memory_transport import Delivery

A, B, C, D, E = (DeviceId(name) for name in "abcde")
EVERYBODY = frozenset((A, B, C, D))
PARTS = (Phase.SHARE, Phase.ROSTER, Phase.COLLECT, Phase.VIEW, Phase.UNMASK)


def course(**changes: Any) -> Course:
    """A round that four devices saw through to its end."""
    whole = Course(
        last=Phase.UNMASK,
        completed=True,
        present=EVERYBODY,
        called=EVERYBODY,
        checked_in=EVERYBODY,
        late=frozenset(),
        declined={},
        refused={},
        cohort=(A, B, C, D),
        answered=dict.fromkeys(PARTS, EVERYBODY),
    )
    return replace(whole, **changes)


def without(device: DeviceId, *phases: Phase) -> dict[Phase, frozenset[DeviceId]]:
    return {p: EVERYBODY - {device} if p in phases else EVERYBODY for p in PARTS}


# -- of a course -----------------------------------------------------------------------------------


def test_a_round_that_all_saw_through():
    assert fates(course()) == dict.fromkeys(EVERYBODY, Fate("summed", "unmask"))


@pytest.mark.parametrize(
    ("missing", "fate"),
    [
        ((Phase.UNMASK,), Fate("summed", "view")),
        ((Phase.VIEW, Phase.UNMASK), Fate("summed", "collect")),
        ((Phase.ROSTER,), Fate("summed", "unmask")),
        (PARTS[2:], Fate("silent", "collect")),
        (PARTS[1:], Fate("silent", "roster")),
        (PARTS, Fate("silent", "share")),
        (
            (Phase.COLLECT,),
            Fate("silent", "collect", "what a member owes the others it did"),
        ),
    ],
)
def test_where_a_member_fell_silent(missing: tuple[Phase, ...], fate: Fate):
    found = fates(course(answered=without(D, *missing)))
    assert found == dict.fromkeys((A, B, C), Fate("summed", "unmask")) | {D: fate}


def test_why_an_update_is_missing():
    late = course(
        answered=without(D, *PARTS[2:]),
        begun=frozenset((D,)),
        spared=True,
        present=EVERYBODY - {D},
    )
    assert fates(late)[D] == Fate(
        "silent", "collect", "it went offline; its upload had begun; the goal was met without it"
    )


def test_who_is_not_drawn_declines_is_refused_or_late():
    found = fates(
        course(
            checked_in=EVERYBODY | {E},
            called=EVERYBODY | {E, DeviceId("f"), DeviceId("g"), DeviceId("h")},
            present=EVERYBODY - {DeviceId("g")},
            declined={DeviceId("f"): "too hot", B: "a limit"},
            refused={DeviceId("i"): "its identity was revoked"},
            late=frozenset((DeviceId("h"),)),
            answered=without(B, *PARTS[2:]),
        )
    )
    assert found[E] == Fate("undrawn", words="5 checked in, 4 were drawn")
    assert found[DeviceId("f")] == Fate("declined", "gather", "too hot")
    assert found[DeviceId("g")] == Fate("silent", "gather", "it went offline")
    assert found[DeviceId("h")] == Fate("late")
    assert found[DeviceId("i")] == Fate("refused", words="its identity was revoked")
    assert found[B] == Fate("declined", "collect", "a limit")
    assert found[A] == Fate("summed", "unmask")


def test_who_declines_with_its_update_in_the_sum():
    assert fates(course(declined={A: "going home"}))[A] == Fate("summed", "unmask", "going home")


@pytest.mark.parametrize(
    "last", [Phase.SHARE, Phase.ROSTER, Phase.COLLECT, Phase.VIEW, Phase.UNMASK]
)
@pytest.mark.parametrize("outside", [True, False])
def test_a_round_that_was_given_up(last: Phase, outside: bool):
    """Who had not answered when a deadline passed was silent; when an operator stopped the run, was not."""
    before = PARTS[: PARTS.index(last)]
    answered = dict.fromkeys(before, EVERYBODY) | {last: EVERYBODY - {D}}
    found = fates(
        course(last=last, completed=False, answered=answered, outside=outside, reason="too few")
    )
    assert found[A] == Fate("spent", last.value)
    # A share that never came was never one that is being made.
    assert found[D] == Fate("spent" if outside else "silent", last.value)


def test_a_round_that_nobody_was_drawn_for():
    given_up = course(
        last=Phase.GATHER, completed=False, cohort=(), answered={}, checked_in=frozenset((A, B))
    )
    assert fates(given_up) == {
        A: Fate("spent", "gather"),
        B: Fate("spent", "gather"),
        C: Fate("silent", "gather"),
        D: Fate("silent", "gather"),
    }
    assert fates(replace(given_up, outside=True)).keys() == {A, B}
    # In a fleet where chance decided who was to answer, nobody is silent who did not.
    assert fates(replace(given_up, called=frozenset())).keys() == {A, B}


def test_who_was_to_blame():
    found = fates(
        course(last=Phase.ROSTER, completed=False, blamed=frozenset((D,)), reason="bad boxes")
    )
    assert found[D] == Fate("blamed", "roster", "bad boxes")
    assert found[A] == Fate("spent", "roster")


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_everybody_who_was_heard_of_has_one_fate(data: st.DataObject):
    names = st.frozensets(st.sampled_from([*EVERYBODY, E]))
    cohort = tuple(sorted(data.draw(st.frozensets(st.sampled_from(sorted(EVERYBODY))))))
    last = data.draw(st.sampled_from(PARTS)) if cohort else Phase.GATHER
    made = Course(
        last=last,
        completed=last is Phase.UNMASK and data.draw(st.booleans()),
        present=data.draw(names),
        called=data.draw(names),
        checked_in=frozenset(cohort) | data.draw(names),
        late=data.draw(names),
        declined=dict.fromkeys(data.draw(names), "no" * 400),
        refused=dict.fromkeys(data.draw(names), "why"),
        cohort=cohort,
        answered={p: data.draw(names) & set(cohort) for p in PARTS},
        outside=data.draw(st.booleans()),
    )
    found = fates(made)
    assert found.keys() >= made.checked_in | made.late | made.refused.keys() | made.declined.keys()
    for device, fate in found.items():
        assert msgspec.convert(msgspec.to_builtins(fate), Fate) == fate
        assert len(fate.words) <= MAX_WORDS
        assert (fate.what == "undrawn") <= (bool(cohort) and device not in cohort)
        if fate.what == "summed":
            assert made.completed
            assert device in made.answered[Phase.COLLECT]


def test_declines_are_counted_by_their_words():
    declined = {DeviceId(f"d{i}"): "too hot" if i < 50 else f"words {i}" for i in range(90)}
    found = counted(course(declined=declined), 1.0, 2.0, 0.5)
    assert found.declined["too hot"] == 50
    assert len(found.declined) == MAX_REASONS + 1
    assert found.declined[OTHERS] == 90 - 50 - (MAX_REASONS - 1)
    assert (found.checked_in, found.chosen, found.chance) == (4, 4, 0.5)


# -- over whole rounds -----------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    hasten(monkeypatch)


def know(fleet: Fleet) -> None:
    fleet.coordinator.registry.identities = {
        seat.name: seat.identity.public for seat in fleet.seats
    }


def became(fleet: Fleet, device: str, limit: int = 10) -> list[Fate | None]:
    return [r.fate for r in fleet.coordinator.store.device_rounds(device, limit)]


def in_brief(fleet: Fleet, device: str) -> list[str]:
    """Without the phase: it takes as many of the members to unmask a sum as are fastest."""
    return ["nothing" if fate is None else fate.what for fate in became(fleet, device)]


def test_a_fleet_s_rounds(tmp_path: Path, quick: None):
    """Of six devices one declines, one's update never arrives, one says nothing after its update, one is
    kept out, and one is nobody's."""

    async def scenario() -> None:
        async with Fleet(tmp_path, 7) as fleet:
            know(fleet)
            no, mute, tired, out, stranger = (seat.name for seat in fleet.seats[:5])
            registry = fleet.coordinator.registry
            del registry.identities[stranger]
            words = "its owner's conditions\nare not met"
            decliner = fleet.seats[0]

            def filtered(delivery: Delivery) -> list[Delivery]:
                sender = TOPICS.device_of(delivery.topic)
                payload = delivery.incoming.payload
                kind = payload[1] if len(payload) > 1 else 0
                if sender in (no, stranger) and kind == CheckIn.CODE:
                    call = wire.decode_as(CheckIn, payload).message
                    name = DeviceId(sender)
                    said = Decline("memory", call.run, call.round, name, words)
                    return [delivery.changed(wire.sign(said, decliner.identity).envelope)]
                if sender == mute and delivery.topic == TOPICS.upload(mute):
                    return []
                if sender == tired and kind in (ViewVote.CODE, Reveal.CODE):
                    return []
                return [delivery]

            fleet.network.tamper = filtered
            registry.blame(out, 5, "it dealt bad boxes")
            deadlines = short(gather_s=1.5, collect_s=1.5, unmask_s=0.5)
            await fleet.play(fleet.run(config(rounds=1, n=6, deadlines=deadlines)))
            shown = words.replace("\n", "\N{REPLACEMENT CHARACTER}")
            assert became(fleet, no) == [Fate("declined", "gather", shown)]
            (fate,) = became(fleet, mute)
            assert fate is not None
            assert (fate.what, fate.phase) == ("silent", "collect")
            assert "its upload had begun" in fate.words
            assert became(fleet, tired) == [Fate("summed", "collect")]
            (fate,) = became(fleet, out)
            why = "may not take part: kept out until round 15: it dealt bad boxes"
            assert fate == Fate("refused", words=f"{out} {why}")
            assert became(fleet, stranger) == [None], "a name that nobody vouches for"
            for seat in fleet.seats[5:]:
                assert in_brief(fleet, seat.name) == ["summed"]
            (found,) = fleet.coordinator.store.device_rounds(no, 10)
            assert found.turnout is not None
            assert found.turnout.declined == {shown: 2}
            assert (found.turnout.checked_in, found.turnout.chosen) == (4, 4)
            assert found.turnout.refused == 1
            assert time.time() - 60 < found.turnout.opened_unix < found.turnout.ended_unix

    go(scenario())


def test_more_check_in_than_are_drawn(tmp_path: Path, quick: None):
    async def scenario() -> None:
        async with Fleet(tmp_path, 6) as fleet:
            know(fleet)
            await fleet.play(fleet.run(config(rounds=1, n=4)))
            found = [became(fleet, seat.name)[0] for seat in fleet.seats]
            what = sorted(fate.what for fate in found if fate is not None)
            assert what == ["summed"] * 4 + ["undrawn"] * 2
            assert Fate("undrawn", words="6 checked in, 4 were drawn") in found

    go(scenario())


@pytest.mark.parametrize("when", ["before", "after"])
def test_killed_as_a_round_ends(
    tmp_path: Path, quick: None, when: str, monkeypatch: pytest.MonkeyPatch
):
    """Nothing of its devices is lost, and nothing is there twice, on whichever side of the one transaction
    the process dies."""

    class Killed(Exception):
        pass

    async def scenario() -> None:
        async with Fleet(tmp_path) as fleet:
            know(fleet)
            real = Store.finish_round

            def dying(self: Store, *arguments: Any) -> None:
                if when == "after":
                    real(self, *arguments)
                raise Killed

            with monkeypatch.context() as patch:
                patch.setattr(Store, "finish_round", dying)
                with pytest.raises(Killed):
                    await fleet.play(fleet.run(config(rounds=2)))
            await fleet.transport.stop(graceful=False)
            fleet.coordinator.store.close()
            registry = fleet.coordinator.registry
            fleet.coordinator = fleet.make_coordinator()
            fleet.coordinator.registry.identities = registry.identities
            await fleet.coordinator.start()
            ended = 1 if when == "after" else 0
            assert len(became(fleet, "pi-0")) == ended
            await fleet.until(lambda: len(fleet.coordinator.registry.present) == len(fleet.seats))
            state = await fleet.play(fleet.run(config(rounds=2)))
            assert state.rounds_completed == 2
            for seat in fleet.seats:
                assert in_brief(fleet, seat.name) == ["summed"] * 2
                numbers = [r.round for r in fleet.coordinator.store.device_rounds(seat.name, 9)]
                assert numbers == [2, 1]

    go(scenario())


def test_a_sum_that_cannot_be_used(tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch):
    """The devices did their part; that the round came to nothing is the round's."""

    def useless(self: Run, completed: object) -> Any:
        raise StorageError("no room for a model")

    async def scenario() -> None:
        async with Fleet(tmp_path) as fleet:
            know(fleet)
            monkeypatch.setattr(Run, "_average", useless)
            await fleet.play(fleet.run(config(rounds=1)))
            (found,) = fleet.coordinator.store.device_rounds("pi-0", 9)
            assert (found.outcome, found.reason) == ("abandoned", "no room for a model")
            assert in_brief(fleet, "pi-0") == ["summed"]

    go(scenario())


# -- in the store ----------------------------------------------------------------------------------


@pytest.fixture
def store() -> Any:
    with Store.in_memory() as store:
        store.add_run("one", bytes(16), 0.0)
        yield store


def finish(
    store: Store, number: int, found: dict[DeviceId, Fate], keep: int = 20, turnout: bool = True
) -> None:
    state = store.run("one")
    state.rounds_done = number
    state.last = {"round": number, "index": number, "outcome": "completed"}
    told = counted(course(), 1.0, 60.0 * number, 1.0) if turnout else None
    store.finish_round("one", state, Attendance(told, found, keep))


def known(store: Store, device: str, limit: int = 200) -> list[DeviceRound]:
    return [found for found in store.device_rounds(device, limit) if found.fate is not None]


@pytest.mark.parametrize(
    ("keep", "kept"), [(1, database.FEWEST_KEPT), (30, 30), (1_000_000, database.MOST_KEPT)]
)
def test_of_each_device_the_last_rounds_are_kept(store: Store, keep: int, kept: int):
    rounds = database.MOST_KEPT + 5
    finish(store, 1, {A: Fate("late"), B: Fate("summed", "unmask")}, keep)
    for number in range(2, rounds + 1):
        finish(store, number, {B: Fate("summed", "unmask")}, keep)
    assert [found.round for found in known(store, B)] == list(range(rounds, rounds - kept, -1))
    # However long ago: it was in no round since that could have taken its place.
    assert [found.round for found in known(store, A)] == [1]
    assert known(store, C) == []


def test_a_round_s_end_that_is_repeated_adds_nothing(store: Store):
    for _ in range(2):
        finish(store, 1, {A: Fate("late")})
    assert [found.fate for found in known(store, A)] == [Fate("late")]


def test_rounds_without_the_device_lie_between(store: Store):
    finish(store, 1, {A: Fate("late")})
    finish(store, 2, {})
    finish(store, 3, {A: Fate("declined", "gather", "too hot"), B: Fate("late")})
    finish(store, 4, {}, turnout=False)
    found = store.device_rounds(A, 10)
    assert [(r.round, r.fate and r.fate.what) for r in found] == [
        (4, None), (3, "declined"), (2, None), (1, "late"),
    ]  # fmt: skip
    assert found[0].turnout is None
    assert found[1].turnout is not None
    assert [r.round for r in store.device_rounds(A, 1)] == [4, 3]


def test_a_fate_of_a_newer_covey_is_not_guessed_at(store: Store):
    finish(store, 1, {A: Fate("late")})
    with store._writing() as connection:
        connection.exec_driver_sql("UPDATE fates SET what = 'promoted'")
    with pytest.raises(StorageError, match=r"is damaged \(round 1: .*'promoted'"):
        store.device_rounds(A, 1)


def test_ten_thousand_devices_do_not_hold_up_a_round_s_end(tmp_path: Path):
    """All of them declined, and have a full history: the worst that a round can come to."""
    crowd = {
        DeviceId(f"pi-{i}"): Fate("declined", "gather", "its owner's conditions are not met")
        for i in range(10_000)
    }
    with Store.open(tmp_path / "covey.db") as store:
        store.add_run("one", bytes(16), 0.0)
        with store._writing(durable=False) as connection:
            connection.exec_driver_sql(
                "WITH RECURSIVE n(i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM n WHERE i < 9999), "
                "r(k) AS (SELECT 1 UNION ALL SELECT k + 1 FROM r WHERE k < 20) INSERT INTO fates "
                "SELECT 'pi-' || i, k, 'summed', 'unmask', '' FROM n, r"
            )
        before = time.perf_counter()
        finish(store, 21, crowd)
        seconds = time.perf_counter() - before
        assert [found.fate.what for found in known(store, "pi-77") if found.fate] == ["declined"]
        with store._reading() as connection:
            kept = connection.exec_driver_sql("SELECT count(*) FROM fates").scalar_one()
    assert kept == 20 * 10_000
    assert seconds < 5, f"{seconds:.2f} s"  # half a second on an idle machine


# -- who is there ----------------------------------------------------------------------------------


def test_since_when_devices_are_there():
    seen = Sightings({"a": Sighting(True, 1.0), "b": Sighting(False, 2.0)})
    seen.look({"a", "b", "c"}, set(), 10.0)
    assert seen.take() == {"b": Sighting(True, 10.0), "c": Sighting(True, 10.0)}
    seen.look({"a"}, {"c"}, 20.0)  # b's going was not heard of; it is gone all the same
    assert seen.take() == {"b": Sighting(False, 20.0), "c": Sighting(False, 20.0)}
    seen.look({"a"}, {"c"}, 30.0)
    assert seen.take() == {}


def test_sightings_that_could_not_be_saved():
    seen = Sightings({})
    seen.look({"a", "b"}, set(), 1.0)
    lost = seen.take()
    seen.look({"a"}, {"b"}, 2.0)
    seen.put_back(lost)
    assert seen.take() == {"a": Sighting(True, 1.0), "b": Sighting(False, 2.0)}


def test_sightings_outlive_the_process(tmp_path: Path):
    for at in (1.0, 2.0):
        with Store.open(tmp_path / "covey.db") as store:
            store.saw({})
            store.saw({"a": Sighting(True, at), f"b{at:g}": Sighting(False, at)})
    with Store.open(tmp_path / "covey.db") as store:
        assert store.sightings() == {
            "a": Sighting(True, 2.0),
            "b1": Sighting(False, 1.0),
            "b2": Sighting(False, 2.0),
        }
