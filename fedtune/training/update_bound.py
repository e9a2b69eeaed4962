"""Bounds on the change of an adapter in one round of honest training. Leads refuse larger updates.

The bounds use public numbers only. A step's gradient is a clipped sum plus noise, over a public denominator, and the
optimizer turns it into a move of bounded length. An update that moved further was not trained under the plan, even if
it is signed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from types import MappingProxyType

import numpy as np

from fedtune.model.adapter import Adapter
from fedtune.privacy.run_plan import MORE_THAN_DECLARED, Plan
from fedtune.training.algorithms.fedavg import FEDAVG
from fedtune.training.algorithms.local_algorithm import Arrays, LocalAlgorithm
from fedtune.training.optimizer import compute_round_factors
from fedtune.training.spec import TrainingSpec

_NOISE_SIGMAS = 10.0  # standard deviations; one normal value in 1e22 exceeds them
_NONE: Arrays = MappingProxyType({})
_ROUNDING = 1e-3  # relative slack: training rounds to float32, and these bounds are computed in float64


@dataclass(frozen=True, kw_only=True, slots=True)
class UpdateBound:
    """Bounds on the change of an adapter in one round.

    The bounds are infinite if nothing limits the optimizer's steps.
    """

    value: Mapping[str, float]  # name of a tensor -> maximum move of one of its values away from 0
    norm: float  # maximum L2 norm of all moves together

    def allows(self, update: Mapping[str, np.ndarray], *, sent: Adapter, rounding: float = 0.0) -> bool:
        """Whether an update with the tensors of `sent` stays within both bounds.

        Moves towards 0 are free, because a site first clamps values to its own limit, which the lead does not know.
        Rounding in an update's encoding is free too: each difference from `sent` has a relative error of at most
        `rounding`.
        """
        square = 0.0
        for name, start in sent.tensors.items():
            end, begin = update[name].astype(np.float64), start.astype(np.float64)  # NaNs were refused earlier
            moved = np.abs(end - np.clip(end, np.minimum(begin, 0), np.maximum(begin, 0)))
            moved = np.maximum(moved - rounding * np.abs(end - begin), 0.0)
            if moved.max(initial=0.0) > self.value[name]:
                return False
            square += float(np.square(moved).sum())
        return math.sqrt(square) <= self.norm


def bound_round_update(
    training: TrainingSpec,
    plan: Plan,
    *,
    round: int,
    declared_size: int,
    sent: Adapter,
    frozen: frozenset[str] = frozenset(),
    algorithm: LocalAlgorithm = FEDAVG,
    arrays: Arrays = _NONE,
) -> UpdateBound:
    """Compute the bounds on a site's update of the received adapter `sent` in one round.

    An honest update exceeds the bounds with probability below 1e-10 per round, by the tails of noise and sampling,
    unless the site trains on more than four times its declared size.

    Args:
        training: optimizer, learning rates and their schedule.
        plan: the run's plan.
        round: the round, from 1.
        declared_size: the site's declared size.
        sent: the adapter that the lead sent.
        frozen: names of tensors that do not train. They may move towards 0, because of a site's own limit; apart from
            this, each value may only change by rounding. They do not count in the norm.
        algorithm: the run's algorithm, which may change a gradient.
        arrays: the arrays that the algorithm's lead half sent.
    """
    trained = {name: tensor for name, tensor in sent.tensors.items() if name not in frozen}
    still = {name: tensor for name, tensor in sent.tensors.items() if name in frozen}
    resting = {
        name: _bound_move(training, (), lambda moved: 0.0, at=_find_largest(tensor)) for name, tensor in still.items()
    }
    if not plan.private and training.optimizer == "sgd":
        return UpdateBound(value=resting | dict.fromkeys(trained, math.inf), norm=math.inf)  # unclipped gradients
    head = {name: tensor for name, tensor in trained.items() if name.startswith("head.")}
    lora = {name: tensor for name, tensor in trained.items() if name not in head}
    factors = compute_round_factors(training, plan, round=round)
    sent_values = _flatten(arrays)
    # The mean gradient: the maximum norm of its clipped part, and the standard deviation of the noise in one value.
    expected = plan.sampling_rate * declared_size
    units = MORE_THAN_DECLARED * expected + _NOISE_SIGMAS * math.sqrt(MORE_THAN_DECLARED * expected) + _NOISE_SIGMAS**2
    signal = plan.max_grad_norm * min(units, MORE_THAN_DECLARED * declared_size + 1) / expected
    noise = plan.noise_multiplier * plan.max_grad_norm / expected
    value = dict(resting)
    square = 0.0
    for group, rate in zip((lora, head), training.compute_peak_rates(clipped=plan.private), strict=True):
        flat = _flatten(group)
        rates = [rate * factor for factor in factors]
        largest = partial(_bound_gradient, algorithm, signal + _NOISE_SIGMAS * noise, _find_largest(sent_values))
        most = _bound_move(training, rates, largest, at=_find_largest(flat))
        norm = math.sqrt(flat.size) * most
        if training.optimizer == "sgd":  # SGD's step has the gradient's length; Adam rescales each value
            noisy = signal + (math.sqrt(flat.size) + _NOISE_SIGMAS) * noise
            longest = partial(_bound_gradient, algorithm, noisy, float(np.linalg.norm(sent_values)))
            norm = min(norm, _bound_move(training, rates, longest, at=float(np.linalg.norm(flat))))
        value |= dict.fromkeys(group, most)
        square += norm**2
    return UpdateBound(value=value, norm=math.sqrt(square))


def _bound_gradient(algorithm: LocalAlgorithm, noised: float, sent: float, moved: float) -> float:
    return algorithm.bound_gradient(noised, moved=moved, sent=sent)


def _flatten(arrays: Arrays) -> np.ndarray:
    """Concatenate all values in float64, with a leading 0, so that the result is never empty."""
    return np.concatenate([np.zeros(1), *(value.ravel() for value in arrays.values())]).astype(np.float64)


def _find_largest(values: np.ndarray) -> float:
    return float(np.abs(values).max(initial=0))


def _bound_move(
    training: TrainingSpec, rates: Sequence[float], gradient: Callable[[float], float], *, at: float
) -> float:
    """Bound the move of a value or vector of size `at` over steps with these learning rates.

    `gradient` bounds the gradient after a move of the given length.
    """
    moved, velocity = 0.0, 0.0
    for number, rate in enumerate(rates, 1):
        if training.optimizer == "sgd":
            velocity = training.momentum * velocity + gradient(moved) + training.weight_decay * (at + moved)
            moved += rate * velocity
        else:
            # AdamW's decay moves towards 0, which is free; only an overshoot past 0 counts.
            beyond = rate * training.weight_decay - 1
            moved += rate * _bound_adam_ratio(training.betas, number) + (beyond * (at + moved) if beyond > 0 else 0.0)
    return moved * (1 + _ROUNDING) + 1e-6 * (1 + at)


@lru_cache(maxsize=4096)
def _bound_adam_ratio(betas: tuple[float, float], step: int) -> float:
    """Bound the ratio of Adam's bias-corrected mean to its root mean square, for one value after `step` steps.

    The bound follows from the Cauchy-Schwarz inequality on the gradients' weights in both means.
    """
    first, second = betas
    if step > 1 and first > 0 and second == 0:
        return math.inf
    term, ratio = (1 - first) ** 2 / (1 - second), 0.0
    for _ in range(step):  # a running product: second**age alone may be too small for a float
        ratio, term = ratio + term, term * first**2 / second if first and second else 0.0
    return math.sqrt(ratio * (1 - second**step)) / (1 - first**step)
