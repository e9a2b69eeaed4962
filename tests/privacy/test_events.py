"""Events as JSON: what cannot be written or read exactly is refused, never approximated."""

from __future__ import annotations

import json
import math

import pytest
from dp_accounting import (
    ComposedDpEvent,
    DpEvent,
    GaussianDpEvent,
    LaplaceDpEvent,
    NonPrivateDpEvent,
    PoissonSampledDpEvent,
    SampledWithoutReplacementDpEvent,
    SelfComposedDpEvent,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.privacy import events
from fedtune.spec import ConfigError

simple = st.one_of(
    st.just(NonPrivateDpEvent()),
    st.floats(1e-3, 1e3).map(GaussianDpEvent),
)
every_kind: st.SearchStrategy[DpEvent] = st.recursive(
    simple,
    lambda inner: st.one_of(
        st.builds(PoissonSampledDpEvent, st.floats(1e-6, 1), inner),
        st.builds(SelfComposedDpEvent, inner, st.integers(0, 10_000)),
        st.lists(inner, max_size=3).map(ComposedDpEvent),
    ),
    max_leaves=6,
)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(every_kind)
def test_events_survive_json(event: DpEvent) -> None:
    assert events.from_json(json.loads(json.dumps(events.to_json(event)))) == event


def test_dp_sgd_is_sampled_gaussians() -> None:
    event = events.dp_sgd(sampling_rate=0.1, noise_multiplier=1.5, steps=7)
    assert event == SelfComposedDpEvent(PoissonSampledDpEvent(0.1, GaussianDpEvent(1.5)), 7)


def test_steps_without_noise_are_not_private() -> None:
    assert events.dp_sgd(sampling_rate=0.1, noise_multiplier=0, steps=1) == NonPrivateDpEvent()


@pytest.mark.parametrize(
    "event",
    [
        LaplaceDpEvent(1.0),
        SampledWithoutReplacementDpEvent(100, 10, GaussianDpEvent(1.0)),
        SelfComposedDpEvent(LaplaceDpEvent(1.0), 2),
        ComposedDpEvent([GaussianDpEvent(1.0), LaplaceDpEvent(1.0)]),
    ],
)
def test_an_unsupported_event_cannot_be_written(event: DpEvent) -> None:
    with pytest.raises(TypeError, match=r"unsupported privacy event (Laplace|SampledWithoutReplacement)DpEvent"):
        events.to_json(event)


GAUSSIAN = {"kind": "gaussian", "noise_multiplier": 1.0}


@pytest.mark.parametrize(
    "data",
    [
        None,
        [],
        "gaussian",
        {},
        {"kind": "laplace", "noise_multiplier": 1.0},
        {"kind": "gaussian"},
        {"kind": "gaussian", "noise_multiplier": "1.0"},
        {"kind": "gaussian", "noise_multiplier": 0},
        {"kind": "gaussian", "noise_multiplier": -1.0},
        {"kind": "gaussian", "noise_multiplier": math.nan},
        {"kind": "gaussian", "noise_multiplier": math.inf},  # would be a mechanism that costs nothing
        {"kind": "poisson_sampled", "sampling_probability": 0, "event": GAUSSIAN},
        {"kind": "poisson_sampled", "sampling_probability": 1.1, "event": GAUSSIAN},
        {"kind": "poisson_sampled", "sampling_probability": 0.1, "event": {"kind": "nothing"}},
        {"kind": "self_composed", "count": -1, "event": GAUSSIAN},
        {"kind": "self_composed", "count": 2.5, "event": GAUSSIAN},
        {"kind": "composed", "events": GAUSSIAN},
        {"kind": "composed", "events": [GAUSSIAN, None]},
    ],
)
def test_what_is_no_event_cannot_be_read(data: object) -> None:
    with pytest.raises(ConfigError, match="event = "):
        events.from_json(data)
