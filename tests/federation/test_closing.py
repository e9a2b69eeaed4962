"""When a lead stops waiting: k of n and a grace period, and who is known to be away."""

import pytest

from fedtune.federation.replies import Closing
from fedtune.federation.spec import FederationSpec


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


# What happens in a round of four sites, one line each time that a lead looks: the seconds since, good updates, sites at
# work, others, and whether the round is over.
STORIES: dict[str, list[tuple[float, int, int, int, bool]]] = {
    "every site at work is waited for": [(1000, 3, 1, 0, False)] * 10,
    "enough updates are waited for": [(1000, 1, 0, 3, False)] * 10,
    "one absent site costs the grace period": [(0, 3, 0, 1, False), (59.9, 3, 0, 1, False), (0.2, 3, 0, 1, True)],
    "a site that comes back and works starts it anew": [
        *((0, 2, 0, 2, False), (50, 2, 1, 1, False), (50, 2, 0, 2, False), (61, 2, 0, 2, True)),
    ],
    "three have refused": [(0, 1, 0, 0, True)],
    "one may still come": [(0, 1, 0, 1, False)],
    "everybody's answer is heard": [(0, 0, 1, 0, False)],
}
SLOW = {"three are enough": [(0, 2, 2, 0, False), (1000, 3, 1, 0, False), (60, 3, 1, 0, True)]}


@pytest.mark.parametrize("story", [*STORIES, *SLOW])
def test_when_a_lead_stops_waiting(story: str) -> None:
    clock, enough = Clock(), 3 if story in SLOW else None
    rule = Closing(FederationSpec(num_sites=4, min_sites=2, grace_s=60.0, enough_sites=enough), clock=clock)
    for number, (seconds, good, at_work, others, over) in enumerate({**STORIES, **SLOW}[story]):
        clock.now += seconds
        assert rule.is_over(good=good, at_work=at_work, others=others) is over, number
