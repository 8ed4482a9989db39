"""Degree of the mask graph, committee size and threshold for a cohort of n.

In cohorts up to 128 the graph is complete and everybody is on the committee. The threshold of
floor(2n/3) + 1 is the actively secure one: two quorums of that size share more than n/3 members, so
fewer than n/3 corrupt devices cannot make one roster or view for some and another for others
(Bonawitz et al. 2017, section 6).
"""

from dataclasses import dataclass

from covey_shared.errors import LocalProtocolError
from covey_shared.messages import MAX_COHORT

PRG = "chacha20"


@dataclass(frozen=True, slots=True)
class Parameters:
    """degree: neighbours of each device (k). min_side: survivors that every survivor must see on
    each side of the ring (e_min; 0 in a complete graph, where the quorum says it all). committee:
    number of share holders (L). threshold: shares, and votes, that are needed (t)."""

    degree: int
    min_side: int
    committee: int
    threshold: int


def parameters_for(n: int) -> Parameters:
    """The only parameters that a device accepts for a cohort of n."""
    if not 2 <= n <= MAX_COHORT:
        raise LocalProtocolError(f"a cohort has 2 to {MAX_COHORT} devices, not {n}")
    return Parameters(degree=n - 1, min_side=0, committee=n, threshold=2 * n // 3 + 1)
