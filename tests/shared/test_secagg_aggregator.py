"""The coordinator's arithmetic: sums, shares, wrong shares, and who is named for them."""

import numpy as np
import pytest

from covey_shared import wire
from covey_shared.errors import LocalProtocolError, MalformedError, RefusedError, SignatureError
from covey_shared.messages import Reveal
from covey_shared.secagg import aggregator as module
from covey_shared.secagg.aggregator import Aggregator, NotEnoughSharesError
from lab import Lab
from mallory import Mallory, dealt_wrongly, lie


def until_collected(n, *, dropped=0, dealers=()):
    """A round up to the uploads. dealers: (device's number, members' numbers that it deals wrongly)."""
    lab = Lab(n)
    mallory = Mallory(lab).gather().share()
    for dealer, members in dealers:
        name = lab.names[dealer]
        envelope = dealt_wrongly(lab, name, [lab.names[i] for i in members])
        mallory.shares[name] = wire.decode(envelope).message
    mallory.deliver().collect()
    mallory.u3 -= set(range(n - dropped, n))
    return mallory


def names_of(mallory):
    return mallory.cohort.names(mallory.u3)


def sum_of(mallory, aggregator):
    for index in sorted(mallory.u3):
        aggregator.add(index, mallory.payloads[mallory.cohort.peers[index].device])
    return aggregator


def unmasked(mallory, holders=None):
    """An aggregator with all updates and the reveals of some members (numbers) or of all."""
    aggregator = sum_of(mallory, Aggregator(mallory.cohort, mallory.u2, mallory.reveal_key))
    for at, name in enumerate(mallory.lab.names):
        if holders is None or at in holders:
            aggregator.add_reveal(mallory.reveals[name], mallory.cohort.bitmap(mallory.u3))
    return aggregator


# -- the sum --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dropped", [0, 1, 2])
def test_any_quorum_of_reveals_gives_the_same_sum(dropped):
    mallory = until_collected(7, dropped=dropped).propose().reveal()
    expected = mallory.plain(names_of(mallory))
    for holders in ([0, 1, 2, 3, 4], [2, 3, 4, 5, 6], [0, 2, 3, 5, 6], range(7)):
        names = [mallory.lab.names[i] for i in holders]
        assert np.array_equal(mallory.aggregate(names), expected)


def test_one_reveal_less_than_the_threshold():
    mallory = until_collected(4).propose().reveal()
    aggregator = unmasked(mallory, [0, 1])
    with pytest.raises(
        NotEnoughSharesError, match="2 shares of pi-000's secret; 3 are needed"
    ) as e:
        aggregator.finish()
    assert e.value.blamed == ()
    # More reveals mend it: nothing was lost.
    aggregator.add_reveal(mallory.reveals[mallory.lab.names[3]], mallory.cohort.bitmap(mallory.u3))
    assert aggregator.finish() is not None


def test_members_that_hold_shares_of_different_devices():
    mallory = until_collected(4).propose()
    for member, lacking in ((0, 1), (1, 2), (2, 0)):
        del mallory.lab.sessions[mallory.lab.names[member]]._round.member._shares[lacking]
    mallory.reveal()
    assert np.array_equal(mallory.aggregate(), mallory.plain(mallory.lab.names))


def test_a_sum_is_taken_once():
    mallory = until_collected(3).propose().reveal()
    aggregator = unmasked(mallory)
    assert aggregator.added == {0, 1, 2}
    assert aggregator.n_reveals == 3
    aggregator.finish()
    with pytest.raises(LocalProtocolError, match="taken already"):
        aggregator.finish()
    with pytest.raises(LocalProtocolError, match="cannot be added"):
        aggregator.add(0, mallory.payloads[mallory.lab.names[0]])


def test_nothing_is_added_once_the_sum_was_taken():
    mallory = until_collected(7, dropped=1).propose().reveal()
    aggregator = unmasked(mallory)
    aggregator.finish()
    with pytest.raises(LocalProtocolError, match="cannot be added"):
        aggregator.add(6, mallory.payloads[mallory.lab.names[6]])


def test_an_update_is_added_once_and_only_from_the_roster():
    mallory = until_collected(4)
    aggregator = Aggregator(mallory.cohort, frozenset({0, 1, 2}), mallory.reveal_key)
    payload = mallory.payloads[mallory.lab.names[0]]
    aggregator.add(0, payload)
    for index in (0, 3):
        before = aggregator._sum.copy()
        with pytest.raises(LocalProtocolError, match=f"index {index} cannot be added"):
            aggregator.add(index, payload)
        assert np.array_equal(aggregator._sum, before)


def test_an_update_of_a_wrong_size_names_its_sender():
    mallory = until_collected(3)
    aggregator = Aggregator(mallory.cohort, mallory.u2, mallory.reveal_key)
    with pytest.raises(MalformedError) as caught:
        aggregator.add(1, mallory.payloads[mallory.lab.names[1]][:-1])
    assert caught.value.sender == mallory.lab.names[1]
    assert aggregator.added == frozenset()
    assert not aggregator._sum.any()


# -- reveals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "signer", "error", "match"),
    [
        ({"h": bytes(32)}, 0, RefusedError, "another round or manifest"),
        ({"member": "stranger"}, 0, RefusedError, "not in the cohort"),
        ({}, 1, SignatureError, "not signed by pi-000"),
        ({"member": "pi-001"}, 1, RefusedError, "does not open"),
        ({"u3": b"\x0f"}, 0, RefusedError, "for another view"),
        ({"present": b"\x0f"}, 0, RefusedError, "beyond the roster"),
        ({"present": b"\x03"}, 0, MalformedError, "wrong number of shares"),
        ({"present": b"\x1f"}, 0, MalformedError, "does not fit"),
        ({"box": bytes(48)}, 0, RefusedError, "does not open"),
    ],
)
def test_reveals_that_are_refused(changes, signer, error, match):
    # Device 3 shared, but is not on the roster; device 2 is, and dropped out.
    lab = Lab(4)
    mallory = Mallory(lab).gather().share()
    mallory.u2 -= {3}
    mallory.deliver().collect()
    reveal = mallory.propose().reveal().reveals[lab.names[0]].message
    aggregator = sum_of(mallory, Aggregator(mallory.cohort, mallory.u2, mallory.reveal_key))
    fields = {field: getattr(reveal, field) for field in reveal.__struct_fields__}
    forged = wire.sign(Reveal(**(fields | changes)), lab.identities[lab.names[signer]])
    with pytest.raises(error, match=match):
        aggregator.add_reveal(forged, mallory.cohort.bitmap(mallory.u3))
    assert aggregator.n_reveals == 0
    aggregator.add_reveal(mallory.reveals[lab.names[0]], mallory.cohort.bitmap(mallory.u3))
    assert aggregator.n_reveals == 1


# -- wrong shares ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dropped", [0, 1])
@pytest.mark.parametrize("liar", [0, 2, 4, 6])
def test_one_liar_is_named_and_the_sum_is_right(liar, dropped):
    mallory = until_collected(7, dropped=dropped).propose()
    lie(mallory.lab, mallory.lab.names[liar])
    mallory.reveal()
    aggregator = unmasked(mallory)
    aggregator.finish()
    # Known only if another's share stood in the liar's place, or the liar's was checked.
    assert aggregator.liars <= {mallory.lab.names[liar]}
    assert (mallory.lab.names[liar] in aggregator.liars) is (liar < mallory.cohort.threshold)
    assert np.array_equal(mallory.aggregate(), mallory.plain(names_of(mallory)))


def test_two_liars_about_one_device():
    mallory = until_collected(7).propose()
    for liar in (0, 1):
        lie(mallory.lab, mallory.lab.names[liar], about=[mallory.lab.names[5]])
    mallory.reveal()
    aggregator = unmasked(mallory)
    assert aggregator.finish() is not None
    assert aggregator.liars == set(mallory.lab.names[:2])


def test_looking_for_a_liar_is_done_once_and_not_for_every_device(monkeypatch):
    mallory = until_collected(7).propose()
    lie(mallory.lab, mallory.lab.names[0])
    mallory.reveal()
    aggregator = unmasked(mallory)
    searched = []
    search = Aggregator._search
    monkeypatch.setattr(
        Aggregator, "_search", lambda self, *a: searched.append(a[1]) or search(self, *a)
    )
    aggregator.finish()
    assert searched == [0]


def test_a_liar_without_shares_to_spare_gets_nobody_blamed():
    # Exactly t reveals, one of them a lie: whose, and about whom, cannot be told.
    mallory = until_collected(7).propose()
    lie(mallory.lab, mallory.lab.names[1], about=[mallory.lab.names[3]])
    mallory.reveal()
    aggregator = unmasked(mallory, range(5))
    with pytest.raises(NotEnoughSharesError, match=r"pi-003.*none to spare") as caught:
        aggregator.finish()
    assert caught.value.blamed == ()
    # One more reveal, and the liar is found.
    aggregator.add_reveal(mallory.reveals[mallory.lab.names[6]], mallory.cohort.bitmap(mallory.u3))
    aggregator.finish()
    assert aggregator.liars == {mallory.lab.names[1]}


def test_liars_about_everyone_get_nobody_blamed():
    # Two liars and one share to spare: no secret fits, which no single dealer can have caused.
    mallory = until_collected(7).propose()
    for liar in (0, 3):
        lie(mallory.lab, mallory.lab.names[liar])
    mallory.reveal()
    with pytest.raises(NotEnoughSharesError, match="too many members revealed wrongly") as caught:
        unmasked(mallory, range(6)).finish()
    assert caught.value.blamed == ()


def test_inconsistent_shares_name_the_dealer():
    mallory = until_collected(7, dealers=[(2, (0, 1, 3))]).propose().reveal()
    with pytest.raises(NotEnoughSharesError, match="pi-002 shared wrongly") as caught:
        unmasked(mallory).finish()
    assert caught.value.blamed == (mallory.lab.names[2],)


def test_as_many_dealers_as_may_lie_are_not_taken_for_honest():
    # n - t of them; with one more it must be the members who lie.
    dealers = [(2, (0, 1, 3)), (4, (0, 1, 3))]
    mallory = until_collected(7, dealers=dealers).propose().reveal()
    with pytest.raises(NotEnoughSharesError, match="pi-002 shared wrongly") as caught:
        unmasked(mallory).finish()
    assert caught.value.blamed == (mallory.lab.names[2],)


def test_a_dealer_cannot_have_its_victim_blamed_for_the_round():
    # It deals one member a share that fits nothing. The sum is right all the same, and the member
    # is named only as what it is: the holder of a share that does not fit.
    mallory = until_collected(7, dealers=[(2, (0,))]).propose().reveal()
    aggregator = unmasked(mallory)
    aggregator.finish()
    assert aggregator.liars == {mallory.lab.names[0]}
    assert np.array_equal(mallory.aggregate(), mallory.plain(mallory.lab.names))


def test_looking_for_liars_ends(monkeypatch):
    mallory = until_collected(10, dealers=[(2, range(10))]).propose().reveal()
    combined = []
    combine = Aggregator._combine
    monkeypatch.setattr(
        Aggregator, "_combine", lambda self, *a, **k: combined.append(a) or combine(self, *a, **k)
    )
    with pytest.raises(NotEnoughSharesError):
        unmasked(mallory).finish()
    assert len(combined) <= 1 + module.MAX_SUBSETS
