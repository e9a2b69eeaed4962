"""Events as JSON: values without an exact representation are refused, never approximated."""

import json
from collections import Counter
from pathlib import Path

import pytest
import yaml
from dp_accounting import ComposedDpEvent, DpEvent, LaplaceDpEvent, NonPrivateDpEvent, PoissonSampledDpEvent, ZCDpEvent
from dp_accounting import GaussianDpEvent as Gaussian
from dp_accounting import SampledWithoutReplacementDpEvent as SampledWithoutReplacement
from dp_accounting import SelfComposedDpEvent as SelfComposed
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.privacy import events
from fedtune.spec import ConfigError

simple = st.one_of(
    st.just(NonPrivateDpEvent()), st.floats(1e-3, 1e3).map(Gaussian), st.floats(1e-3, 1e3).map(LaplaceDpEvent)
)
every_kind: st.SearchStrategy[DpEvent] = st.recursive(
    simple,
    lambda inner: st.one_of(
        st.builds(PoissonSampledDpEvent, st.floats(1e-6, 1), inner),
        st.builds(SelfComposed, inner, st.integers(0, 10_000)),
        st.lists(inner, max_size=3).map(tuple).map(ComposedDpEvent),
    ),
    max_leaves=6,
)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(every_kind)
def test_events_round_trip_through_json(event: DpEvent) -> None:
    assert events.from_json(json.loads(json.dumps(events.to_json(event)))) == event


def test_dp_sgd_composes_poisson_sampled_gaussian_steps() -> None:
    event = events.build_dp_sgd_event(sampling_rate=0.1, noise_multiplier=1.5, steps=7)
    assert event == SelfComposed(PoissonSampledDpEvent(0.1, Gaussian(1.5)), 7)
    assert events.build_dp_sgd_event(sampling_rate=0.1, noise_multiplier=0, steps=1) == NonPrivateDpEvent()


def group_recursively(event: DpEvent) -> Counter[DpEvent]:
    """Count the mechanisms of an event recursively: each part as often as it is repeated."""
    match event:
        case ComposedDpEvent():
            return sum((group_recursively(part) for part in event.events), Counter())
        case SelfComposed():
            return sum((group_recursively(event.event) for _ in range(event.count)), Counter())
    return Counter({event: 1})


sampled = PoissonSampledDpEvent(0.1, Gaussian(2.0))
mechanisms = st.sampled_from([NonPrivateDpEvent(), Gaussian(2.0), Gaussian(3.0), sampled])
compositions: st.SearchStrategy[DpEvent] = st.recursive(
    mechanisms,
    lambda inner: st.one_of(
        st.builds(SelfComposed, inner, st.integers(0, 4)), st.lists(inner, max_size=3).map(ComposedDpEvent)
    ),
    max_leaves=8,
)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(compositions, max_size=4))
def test_grouping_counts_every_occurrence_of_a_mechanism(history: list[DpEvent]) -> None:
    grouped = events.count_mechanisms(history)
    assert grouped == sum(map(group_recursively, history), Counter())
    assert all(count > 0 for count in grouped.values())
    assert events.count_mechanisms(grouped) == grouped
    tripled = Counter({event: 3 * count for event, count in grouped.items()})
    assert events.count_mechanisms(history * 3) == events.count_mechanisms(tripled) == tripled


def test_grouping_flattens_compositions_but_not_sampled_events() -> None:
    one = Gaussian(1.0)
    assert events.count_mechanisms({SelfComposed(one, 4): 3, ComposedDpEvent((one, one)): 5, one: 1}) == {one: 23}
    # Sampling does not commute with composition: two mechanisms on one sample are not two samples.
    event = PoissonSampledDpEvent(0.1, SelfComposed(Gaussian(1.0), 2))
    assert events.count_mechanisms([event, event]) == {event: 2}


def test_unsupported_events_cannot_be_serialized() -> None:
    unsupported = ZCDpEvent(1.0)
    parts = (SelfComposed(unsupported, 2), ComposedDpEvent([Gaussian(1.0), unsupported]))
    for event in (unsupported, SampledWithoutReplacement(100, 10, Gaussian(1.0)), *parts):
        with pytest.raises(TypeError, match=r"unsupported privacy event (ZC|SampledWithoutReplacement)DpEvent"):
            events.to_json(event)


GAUSSIAN = {"kind": "gaussian", "noise_multiplier": 1.0}


@pytest.mark.parametrize("data", yaml.safe_load(Path(__file__).with_name("invalid_events.yaml").read_text()))
def test_invalid_events_cannot_be_deserialized(data: object) -> None:
    with pytest.raises(ConfigError, match="event = "):
        events.from_json(data)
