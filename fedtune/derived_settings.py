"""Settings that follow from others: of secure aggregation, and of a run without privacy."""

from __future__ import annotations

import math
from collections.abc import Container, Mapping
from typing import Any

from pydantic import TypeAdapter, ValidationError

from fedtune.federation.spec import FederationSpec
from fedtune.training.spec import TrainingSpec

_FASTER = 5 / 3  # largest tested increase of SGD's rates: from 5 to 8.33 and from 40 to 66.7 with four banks


def use_secure_aggregation(settings: Mapping[str, Any], *, keep: Container[str] = ()) -> dict[str, Any]:
    """Convert the settings of a run to secure aggregation, without validating the result.

    Each step becomes a round, each sum covers all participating sites, and learning rates decay linearly to zero,
    unless each step uses every record, where a constant rate leaves less noise (simulations/utility). The average has
    less noise than in a plain run, by the square root of the number of honest sites. SGD's learning rates grow by that
    factor, up to the largest factor that was tested (simulations/banks_intents); Adam's learning rates do not depend on
    the noise.

    Args:
        settings: nested plain data, as `parse` accepts it.
        keep: dotted keys whose values must not change. If training.local_steps is one of them, no value changes.
    """
    settings = {**settings, "federation": {**settings["federation"], "aggregation": "secure"}}
    try:
        federation = TypeAdapter(FederationSpec).validate_python(settings["federation"])
        training = TypeAdapter(TrainingSpec).validate_python(settings["training"])
    except (ValidationError, KeyError):
        return settings  # `parse` reports the error
    if "training.local_steps" in keep:
        return settings
    threshold = federation.threshold or federation.enough_sites or len(federation.active)
    faster = min(math.sqrt(threshold - federation.colluders), _FASTER) if training.optimizer == "sgd" else 1.0
    rates = {key: getattr(training, key) for key in ("learning_rate", "head_learning_rate")}
    chosen: dict[str, dict[str, Any]] = {
        "federation": {"threshold": threshold, "num_rounds": federation.num_rounds * training.local_steps},
        "training": {"local_steps": 1}
        | ({} if settings.get("privacy", {}).get("sampling_rate") == 1 else {"schedule": "linear"})
        | {key: float(f"{rate * faster:.3g}") for key, rate in rates.items() if isinstance(rate, float)},
    }
    for group, values in chosen.items():
        settings[group] = settings[group] | {key: one for key, one in values.items() if f"{group}.{key}" not in keep}
    return settings


def use_recipe_without_privacy(settings: Mapping[str, Any], *, keep: Container[str] = ()) -> dict[str, Any]:
    """Give a run without privacy its own steps, schedule and sampling rate, without validating the result.

    Args:
        settings: nested plain data, as `parse` accepts it; unchanged if the run has privacy.
        keep: dotted keys whose values must not change.
    """
    changed = {**settings}
    try:
        training = TypeAdapter(TrainingSpec).validate_python(settings["training"])
        if settings["privacy"]["mechanism"] != "none":
            return changed
    except (ValidationError, LookupError, TypeError):
        return changed  # `parse` reports the error
    recipe: dict[tuple[str, str], Any] = {
        ("training", "local_steps"): training.unclipped_local_steps,
        ("training", "schedule"): training.unclipped_schedule,
        ("privacy", "sampling_rate"): training.unclipped_sampling_rate,
    }
    for (group, key), value in recipe.items():
        if value is not None and f"{group}.{key}" not in keep:
            changed[group] = {**changed[group], key: value}
    return changed
