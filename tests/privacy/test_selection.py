"""The privacy cost of a search: compared with other formulas, and with cases that claim no bound."""

import math
from dataclasses import replace

import numpy as np
import pytest
from dp_accounting import ComposedDpEvent
from scipy import special

from fedtune.privacy import accountant, filter
from fedtune.privacy.run_plan import Plan
from fedtune.privacy.selection import compute_search_cost

from ..conftest import run_plan

ORDERS = range(2, 65)


def compute_step_rdp(order: int, *, rate: float, noise: float) -> float:
    """Compute the Renyi divergence of a sampled Gaussian at an integer order.

    Mironov, Talwar, Zhang 2019 (arXiv 1908.10530), equation 30.
    """
    k = np.arange(order + 1)
    logs = (order - k) * math.log1p(-rate) + k * math.log(rate) + (k * k - k) / (2 * noise**2)
    return float(special.logsumexp(logs, b=special.comb(order, k))) / (order - 1)


def compute_plan_rdp(plan: Plan) -> dict[int, float]:
    steps = plan.local_steps * plan.max_rounds
    return {a: steps * compute_step_rdp(a, rate=plan.sampling_rate, noise=plan.noise_multiplier) for a in ORDERS}


def test_search_trials_are_charged_as_a_composition_of_all_steps() -> None:
    other = replace(run_plan(), local_steps=5, noise_multiplier=3.0)
    price = compute_search_cost([run_plan(), other, run_plan()])
    both = {a: 2 * one + compute_plan_rdp(other)[a] for a, one in compute_plan_rdp(run_plan()).items()}
    # Canonne, Kamath, Steinke 2020, Proposition 12.
    ref = min(rho + math.log1p(-1 / a) - math.log(run_plan().delta * a) / (a - 1) for a, rho in both.items())
    assert price.epsilon_rdp == pytest.approx(ref, rel=1e-3)
    assert price.epsilon < price.epsilon_rdp < price.epsilon_filter * (1 + 1e-9)
    assert price.epsilon_of_one == accountant.epsilon_pld([other.full_event], other.delta) < price.epsilon
    assert price.epsilon == accountant.epsilon_pld({run_plan().full_event: 2, other.full_event: 1}, run_plan().delta)
    every = ComposedDpEvent((run_plan().full_event, other.full_event, run_plan().full_event))
    assert price.epsilon_filter == filter.find_smallest_cap(every, delta=1e-5)[0]
    assert price.trials == 3
    without = compute_search_cost([replace(run_plan(), noise_multiplier=0.0)] * 2)
    assert (without.private, without.epsilon) == (False, math.inf)
