"""Privacy events: serializable descriptions of the mechanisms that ran on private records.

Each event is a dp-accounting `DpEvent`. Only the types that fedtune's mechanisms produce can be serialized; every other
type raises, so that no event is ever approximated by a weaker one.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from fedtune.privacy.dp_library import (
    ComposedDpEvent,
    DpEvent,
    GaussianDpEvent,
    LaplaceDpEvent,
    NonPrivateDpEvent,
    PoissonSampledDpEvent,
    SelfComposedDpEvent,
)
from fedtune.spec import ConfigError, spec

Json = dict[str, object]


@spec
class Charge:
    """A privacy event that was charged, serialized as JSON, with the number of its repetitions."""

    event: Mapping[str, Any]
    count: int


Spent = Iterable[DpEvent] | Mapping[DpEvent, int]  # events, or events with counts


def build_dp_sgd_event(*, sampling_rate: float, noise_multiplier: float, steps: int) -> DpEvent:
    """Build the privacy event of `steps` DP-SGD steps, each a Gaussian mechanism on a Poisson sample.

    Args:
        sampling_rate: probability with which each unit joins a step, in (0, 1].
        noise_multiplier: standard deviation of the noise divided by the clip norm; 0 means no guarantee.
        steps: number of noisy steps, at least 0.

    Guarantee: under add-or-remove-one adjacency for a unit whose clipped contribution has L2 norm at most the clip
    norm, the joint output of the steps is as private as this event (Abadi et al. 2016, arXiv 1607.00133).
    """
    if noise_multiplier == 0:
        return NonPrivateDpEvent() if steps else ComposedDpEvent(())
    return SelfComposedDpEvent(PoissonSampledDpEvent(sampling_rate, GaussianDpEvent(noise_multiplier)), steps)


def count_mechanisms(spent: Spent) -> Counter[DpEvent]:
    """Flatten composed events into single mechanisms, and count the repetitions of each mechanism.

    The privacy loss of a composition does not depend on order or grouping.
    """
    counts: Counter[DpEvent] = Counter()
    for event, count in spent.items() if isinstance(spent, Mapping) else ((event, 1) for event in spent):
        match event:
            case ComposedDpEvent():
                parts, times = count_mechanisms(event.events), count
            case SelfComposedDpEvent():
                parts, times = count_mechanisms([event.event]), count * event.count
            case _:
                parts, times = Counter({event: 1}), count
        for part, once in parts.items():
            counts[part] += times * once
    return +counts


def to_json(event: DpEvent) -> Json:
    """Serialize an event as plain JSON.

    Raises:
        TypeError: fedtune never produces events of this type.
    """
    match event:
        case GaussianDpEvent():
            return {"kind": "gaussian", "noise_multiplier": event.noise_multiplier}
        case LaplaceDpEvent():
            return {"kind": "laplace", "noise_multiplier": event.noise_multiplier}
        case PoissonSampledDpEvent():
            return {
                "kind": "poisson_sampled",
                "sampling_probability": event.sampling_probability,
                "event": to_json(event.event),
            }
        case SelfComposedDpEvent():
            return {"kind": "self_composed", "count": event.count, "event": to_json(event.event)}
        case ComposedDpEvent():
            return {"kind": "composed", "events": [to_json(part) for part in event.events]}
        case NonPrivateDpEvent():
            return {"kind": "non_private"}
    raise TypeError(f"unsupported privacy event {type(event).__name__}")


def from_json(data: object) -> DpEvent:
    """Deserialize an event that `to_json` wrote.

    Raises:
        ConfigError: the data is not an event of a known type, or a value is out of range.
    """
    match data:
        case {"kind": "gaussian" | "laplace" as kind, "noise_multiplier": int() | float() as noise} if (
            type(noise) is not bool and noise > 0 and math.isfinite(noise)
        ):
            return GaussianDpEvent(float(noise)) if kind == "gaussian" else LaplaceDpEvent(float(noise))
        case {"kind": "poisson_sampled", "sampling_probability": int() | float() as rate, "event": part} if (
            type(rate) is not bool and 0 < rate <= 1
        ):
            return PoissonSampledDpEvent(float(rate), from_json(part))
        case {"kind": "self_composed", "count": int() as count, "event": part} if (
            type(count) is not bool and count >= 0
        ):
            return SelfComposedDpEvent(from_json(part), count)
        case {"kind": "composed", "events": list() as parts}:
            return ComposedDpEvent(tuple(from_json(part) for part in parts))
        case {"kind": "non_private"}:
            return NonPrivateDpEvent()
    raise ConfigError("event", data, "must be a privacy event written by fedtune, with values in range")


def count_mechanisms_as_json(spent: Spent) -> list[tuple[Json, int]]:
    """Return the distinct mechanisms as (JSON, count) pairs in a fixed order."""
    pairs = [(to_json(event), count) for event, count in count_mechanisms(spent).items()]
    return sorted(pairs, key=lambda pair: json.dumps(pair[0], sort_keys=True))
