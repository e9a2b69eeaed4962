"""Forecast of a run's duration and traffic, measured with the model on dummy examples; no record is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from fedtune.model.adapter import Adapter
from fedtune.model.ranks import count_trained_values
from fedtune.privacy.run_plan import Plan
from fedtune.tasks.task_model import TaskModel
from fedtune.training.machine import choose_hidden_states_location, measure_example_seconds, measure_model_bytes
from fedtune.training.spec import RuntimeSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class Forecast:
    """Estimated time and traffic of a run on this machine, without spare rounds.

    Times are upper estimates for this machine: every example has the maximum length, and every user has the maximum
    number of records.  Evaluation, start-up and network latency are excluded.
    """

    values: int  # trained parameters of the shared adapter
    site_values: Mapping[str, int]  # site -> trained parameters at this site
    model_bytes: int  # memory of base model, adapter and head, in the run's number format
    bytes_down: int  # messages to one site in one round, including settings and signatures
    bytes_up: int  # answers from one site in one round
    bytes_total: int  # both directions, all sites and rounds; without the invitation and the notice of the end
    # whether the layers below the first adapter are computed once per record instead of in every step
    frozen_states_kept: bool
    first_seconds: float  # one-time computation for all sites
    step_seconds: Mapping[str, float]  # site -> time of one step
    round_seconds: Mapping[str, float]  # site -> time of one round; real sites train in parallel
    seconds_one_after_another: float  # total training time if one machine simulates all sites in sequence


def forecast(
    plan: Plan,
    model: TaskModel,
    *,
    declared_sizes: Mapping[str, int],
    ranks: Mapping[str, int | None],
    max_length: int,
    runtime: RuntimeSpec,
    traffic: tuple[int, int],
) -> Forecast:
    """Estimate the time and traffic of `plan` by timing the model on dummy examples.

    Args:
        plan: the plan of the run.
        model: the model, on the device that trains.
        declared_sizes: site -> its declared size, for the participating sites.
        ranks: site -> the rank that it trains; None: the whole adapter.
        max_length: the number of tokens in each text of a full-length example.
        runtime: the runtime settings of this machine.
        traffic: bytes per round to a site and from a site.

    Raises:
        ConfigError: `runtime.kept_states_folder` cannot be used.
    """
    adapter, draws = Adapter.from_task_model(model), np.random.default_rng(0)
    num_records = sum(declared_sizes.values()) * plan.records_per_user
    kept, _ = choose_hidden_states_location(model, runtime, num_tokens=num_records * max_length * model.spec.texts)
    below, above = measure_example_seconds(model, max_length=max_length, runtime=runtime, kept=kept, draws=draws)
    in_step = plan.sampling_rate * plan.records_per_user  # records, for each declared unit
    steps = {site: in_step * size * above for site, size in declared_sizes.items()}
    rounds = {site: plan.local_steps * seconds for site, seconds in steps.items()}
    return Forecast(
        values=adapter.num_values,
        site_values=count_trained_values(adapter.tensors, ranks),
        model_bytes=measure_model_bytes(model),
        bytes_down=traffic[0],
        bytes_up=traffic[1],
        bytes_total=sum(traffic) * len(declared_sizes) * plan.num_rounds,
        frozen_states_kept=kept and model.has_frozen_prefix,
        first_seconds=num_records * below,
        step_seconds=steps,
        round_seconds=rounds,
        seconds_one_after_another=num_records * below + plan.num_rounds * sum(rounds.values()),
    )
