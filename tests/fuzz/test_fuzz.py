"""Whatever comes from outside is understood or refused in our own words: never another exception, never a hang."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings

from . import file_targets, ledger_target, wire_targets
from .target import Target

TARGETS = {target.name: target for target in (*wire_targets.TARGETS, *file_targets.TARGETS, *ledger_target.TARGETS)}
EXAMPLES, EXAMPLES_AT_NIGHT = 60, 3_000
"""Of each target.  The same ones every time by day; others each night."""


def fuzz(target: Target, *, examples: int, always_the_same: bool) -> None:
    """Give the target's parser so many broken inputs; a failure names the smallest one found."""
    checked = given(target.broken())(target.check)
    limits = settings(
        max_examples=max(10, examples // target.cost),
        derandomize=always_the_same,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    limits(checked)()


@pytest.mark.parametrize("name", TARGETS)
def test_broken_input_is_refused_in_our_own_words(name: str) -> None:
    fuzz(TARGETS[name], examples=EXAMPLES, always_the_same=True)


@pytest.mark.nightly
@pytest.mark.parametrize("name", TARGETS)
def test_much_more_broken_input_is(name: str) -> None:
    fuzz(TARGETS[name], examples=EXAMPLES_AT_NIGHT, always_the_same=False)
