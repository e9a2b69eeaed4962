"""The lead's optimizer step in secure aggregation: post-processing of the released sum."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch

from fedtune.model.adapter import Adapter
from fedtune.privacy.run_plan import Plan
from fedtune.training.dp_step import apply_gradient_sum
from fedtune.training.local import clamp_parameters
from fedtune.training.optimizer import compute_learning_rate_factor, make_optimizer, set_learning_rate
from fedtune.training.spec import TrainingSpec

log = logging.getLogger(__name__)

State = Mapping[str, npt.NDArray[np.float32]]
_DEVIATIONS = 8  # standard deviations; a sum of honest sites exceeds the limit with a probability below 1e-14


def take_secure_server_step(
    adapter: Adapter,
    total: npt.NDArray[np.int64],
    state: State,
    *,
    training: TrainingSpec,
    plan: Plan,
    step: int,
    sites: int,
    most: float,
    declared_size: int,
) -> tuple[Adapter, dict[str, npt.NDArray[np.float32]]]:
    """Take one optimizer step at the lead, along the sum of the sites' clipped and noised gradients.

    Guarantee: post-processing of the released sum.

    Args:
        adapter: the adapter at which the sites computed their gradients.
        total: the sum of the sites' shares, in cells of the plan's shared noise, in the order of the adapter's tensors.
        state: the optimizer state that the previous step returned; empty before the first step.
        training: optimizer, learning rates and their schedule.
        plan: the run's plan; its rounds are the steps of the schedule.
        step: the number of previous steps; selects the learning rate in the schedule.
        sites: the number of sites in the sum.
        most: the limit on the adapter's absolute values, which sites enforce as well.
        declared_size: the total declared size of these sites, the public denominator.

    Returns:
        The new adapter, and the optimizer state for the next step.
    """
    parameters = {name: torch.nn.Parameter(torch.tensor(value)) for name, value in adapter.tensors.items()}
    optimizer = make_optimizer(parameters, training)
    for name, parameter in parameters.items():
        kept = {key.partition("/")[0]: value for key, value in state.items() if key.partition("/")[2] == name}
        optimizer.state[parameter].update({key: torch.tensor(value) for key, value in kept.items()})
    set_learning_rate(optimizer, compute_learning_rate_factor(training, step=step, total_steps=plan.num_rounds))
    cell = plan.max_grad_norm * 2.0**-plan.secure_noise.cell_bits
    ends = np.cumsum([value.size for value in adapter.tensors.values()])[:-1]
    values = limit_sum_length(total, plan, sites=sites, declared_size=declared_size)
    parts = zip(adapter.tensors.items(), np.split(values, ends), strict=True)
    sums = {name: part.reshape(value.shape) for (name, value), part in parts}
    apply_gradient_sum(sums, parameters, optimizer, denominator=plan.sampling_rate * declared_size / cell)
    clamp_parameters(parameters, most)
    after = {
        f"{key}/{name}": np.asarray(value, dtype=np.float32)
        for name, parameter in parameters.items()
        for key, value in optimizer.state[parameter].items()
        if value is not None
    }
    return Adapter({name: parameter.detach().numpy() for name, parameter in parameters.items()}), after


def limit_sum_length(
    total: npt.NDArray[np.int64], plan: Plan, *, sites: int, declared_size: int
) -> npt.NDArray[np.int64]:
    """Scale the sum down to the largest L2 norm that a sum of honest sites can have; smaller sums are unchanged.

    Nobody can check a single site's share, so this limit bounds the effect of a forged share. The limit is public: the
    expected sample of the declared units, with some slack and with all clipped gradients in the same direction, plus
    the noise of all sites.
    """
    sampled = plan.sampling_rate * declared_size
    units = sampled + _DEVIATIONS * (math.sqrt(sampled) + 1)
    noise = plan.secure_noise.noise_multiplier * math.sqrt(sites) * (math.sqrt(total.size) + _DEVIATIONS)
    longest = (units + noise) * 2.0**plan.secure_noise.cell_bits
    length = float(np.sqrt(np.square(total, dtype=np.float64).sum()))
    if length <= longest:
        return total
    log.warning(
        "the norm of a secure aggregate is %.3g times the maximum for honest sites; the sum is scaled down",
        length / longest,
    )
    shorter: npt.NDArray[np.int64] = np.rint(total * (longest / length)).astype(np.int64)
    return shorter
