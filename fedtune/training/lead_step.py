"""The optimizer's step that a lead takes with a secure sum: post-processing of what the sum released."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch

from fedtune.model.adapter import Adapter
from fedtune.privacy.run_plan import Plan
from fedtune.training.dp_step import descend
from fedtune.training.local import project
from fedtune.training.optimizer import learning_rate_factor, make_optimizer, set_learning_rate
from fedtune.training.spec import TrainingSpec

log = logging.getLogger(__name__)

State = Mapping[str, npt.NDArray[np.float32]]
_DEVIATIONS = 8  # standard deviations: a sum of honest sites passes the bound with a probability below 1e-14


def lead_step(
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
    """The adapter after one step, and the optimizer's state for the next.

    Args:
        adapter: at which the sites took their gradients.
        total: the sum of the sites' shares, in cells of the plan's secure sums, in the order of the adapter's tensors.
        state: as the last step returned it; empty at first.
        training: optimizer, rates and their schedule.
        plan: of the run; its rounds are the schedule's steps.
        step: how many were taken before; places this one in the learning-rate schedule.
        sites: in the sum.
        most: bound on the adapter's values; sites compute at no larger ones either.
        declared_size: of these sites together, the public denominator.
    """
    parameters = {name: torch.nn.Parameter(torch.tensor(value)) for name, value in adapter.tensors.items()}
    optimizer = make_optimizer(parameters, training)
    for name, parameter in parameters.items():
        kept = {key.partition("/")[0]: value for key, value in state.items() if key.partition("/")[2] == name}
        optimizer.state[parameter].update({key: torch.tensor(value) for key, value in kept.items()})
    set_learning_rate(optimizer, learning_rate_factor(training, step=step, total_steps=plan.num_rounds))
    cell = plan.max_grad_norm * 2.0**-plan.sums.cell_bits
    ends = np.cumsum([value.size for value in adapter.tensors.values()])[:-1]
    values = held_back(total, plan, sites=sites, declared_size=declared_size)
    parts = zip(adapter.tensors.items(), np.split(values, ends), strict=True)
    sums = {name: part.reshape(value.shape) for (name, value), part in parts}
    descend(sums, parameters, optimizer, denominator=plan.sampling_rate * declared_size / cell)
    project(parameters, most)
    after = {
        f"{key}/{name}": np.asarray(value, dtype=np.float32)
        for name, parameter in parameters.items()
        for key, value in optimizer.state[parameter].items()
        if value is not None
    }
    return Adapter({name: parameter.detach().numpy() for name, parameter in parameters.items()}), after


def held_back(total: npt.NDArray[np.int64], plan: Plan, *, sites: int, declared_size: int) -> npt.NDArray[np.int64]:
    """The sum, scaled down to the greatest length that a sum of honest sites can have; unchanged within it.

    Nobody can check a single site's part, so this is what bounds a part that is made up.  The bound is public: as many
    clipped gradients as are sampled of the declared units, all in one direction, and the noise of all sites.
    """
    sampled = plan.sampling_rate * declared_size
    units = sampled + _DEVIATIONS * (math.sqrt(sampled) + 1)
    noise = plan.sums.noise_multiplier * math.sqrt(sites) * (math.sqrt(total.size) + _DEVIATIONS)
    longest = (units + noise) * 2.0**plan.sums.cell_bits
    length = float(np.sqrt(np.square(total, dtype=np.float64).sum()))
    if length <= longest:
        return total
    log.warning("a secure sum is %.3g times as long as one of honest sites can be; it is held back", length / longest)
    shorter: npt.NDArray[np.int64] = np.rint(total * (longest / length)).astype(np.int64)
    return shorter
