"""Bytes and time of a run, from the model and made-up examples: nothing here reads a record."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from fedtune.privacy.run_plan import Plan
from fedtune.tasks.task_model import TaskModel
from fedtune.training.machine import choose_states_location, measure_example_seconds, measure_model_bytes
from fedtune.training.spec import RuntimeSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class Forecast:
    """The time and bytes of a run on this machine and on the wire, spare rounds left out.

    Times are upper estimates for this machine: every example has full length, and every user as many records as may
    take part.  Evaluation, start-up and the way over a network are not in them.
    """

    values: int  # trained parameters
    model_bytes: int  # of memory that base, adapter and head take where they lie, in the run's number format
    bytes_down: int  # of all messages of a round to a site, with settings and signatures
    bytes_up: int  # of all its answers in a round
    bytes_total: int  # both ways, all sites and rounds; without invitation and end
    # whether the layers below the first adapter run once for each record, and not in each step
    frozen_states_kept: bool
    first_seconds: float  # of what is computed once, for all sites
    step_seconds: Mapping[str, float]  # of one step, by site
    round_seconds: Mapping[str, float]  # of one round, by site; real sites work at the same time
    seconds_one_after_another: float  # of all training where one machine plays all sites, as a simulation does


def forecast(
    plan: Plan,
    model: TaskModel,
    *,
    declared_sizes: Mapping[str, int],
    max_length: int,
    runtime: RuntimeSpec,
    traffic: tuple[int, int],
) -> Forecast:
    """Bytes and time for `plan` at sites of these declared sizes.

    Args:
        plan: the run's.
        model: lies on the device that trains.
        declared_sizes: of the sites that take part.
        max_length: tokens of each text of a full example.
        runtime: how this machine trains.
        traffic: bytes of a round to a site and from it.

    Raises:
        ConfigError: for `runtime.kept_states_folder`.
    """
    num_values, draws = sum(one.numel() for one in model.trainable().values()), np.random.default_rng(0)
    num_records = sum(declared_sizes.values()) * plan.records_per_user
    kept, _ = choose_states_location(model, runtime, num_tokens=num_records * max_length * model.spec.texts)
    below, above = measure_example_seconds(model, max_length=max_length, runtime=runtime, kept=kept, draws=draws)
    in_step = plan.sampling_rate * plan.records_per_user  # records, for each declared unit
    steps = {site: in_step * size * above for site, size in declared_sizes.items()}
    rounds = {site: plan.local_steps * seconds for site, seconds in steps.items()}
    return Forecast(
        values=num_values,
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
