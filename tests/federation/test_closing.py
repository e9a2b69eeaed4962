"""When a lead stops waiting: k of n and a grace period, and who is known to be away."""

from __future__ import annotations

from typing import Any

import pytest

from fedtune.federation.replies import Closing
from fedtune.federation.spec import FederationSpec


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def closing(clock: Clock, **settings: Any) -> Closing:
    spec = FederationSpec(**({"num_sites": 4, "min_sites": 2, "grace_s": 60.0} | settings))
    return Closing(spec, clock=clock)


@pytest.mark.parametrize(("good", "at_work", "others"), [(3, 1, 0), (1, 0, 3)], ids=["at work", "too few"])
def test_a_round_waits_for_every_site_that_is_at_work_and_for_enough_updates(
    good: int, at_work: int, others: int
) -> None:
    clock = Clock()
    rule = closing(clock)
    for _ in range(10):
        assert not rule.is_over(good=good, at_work=at_work, others=others)
        clock.now += 1000


def test_one_absent_site_costs_the_grace_period_and_not_the_whole_time() -> None:
    clock = Clock()
    rule = closing(clock)
    assert not rule.is_over(good=3, at_work=0, others=1)
    clock.now += 59.9
    assert not rule.is_over(good=3, at_work=0, others=1)
    clock.now += 0.2
    assert rule.is_over(good=3, at_work=0, others=1)


def test_a_site_that_comes_back_and_works_starts_the_grace_period_anew() -> None:
    clock = Clock()
    rule = closing(clock)
    rule.is_over(good=2, at_work=0, others=2)
    clock.now += 50
    assert not rule.is_over(good=2, at_work=1, others=1)
    clock.now += 50
    assert not rule.is_over(good=2, at_work=0, others=2), "its 60 seconds begin again"
    clock.now += 61
    assert rule.is_over(good=2, at_work=0, others=2)


def test_with_enough_sites_named_a_slow_one_is_not_waited_for() -> None:
    clock = Clock()
    rule = closing(clock, enough_sites=3)
    assert not rule.is_over(good=2, at_work=2, others=0)
    clock.now += 1000
    assert not rule.is_over(good=3, at_work=1, others=0)
    clock.now += 60
    assert rule.is_over(good=3, at_work=1, others=0)


def test_nobody_waits_for_what_cannot_come_any_more() -> None:
    assert closing(Clock()).is_over(good=1, at_work=0, others=0), "three of four have refused"
    assert not closing(Clock()).is_over(good=1, at_work=0, others=1)
    assert not closing(Clock()).is_over(good=0, at_work=1, others=0), "but everybody's answer is heard"
