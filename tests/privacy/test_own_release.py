"""A release of the site's own data: exact noise, exact sensitivity, its cost, and who may request it."""

import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mpmath
import numpy as np
import pytest
from dp_accounting import DpEvent, GaussianDpEvent, LaplaceDpEvent, PoissonSampledDpEvent
from dp_accounting.pld import privacy_loss_distribution as pld
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fedtune.privacy import accountant, filter
from fedtune.privacy.ledger.site_ledger import Reservation, SiteLedger
from fedtune.privacy.ledger.verify import verify
from fedtune.privacy.own_release import clip_to_cells, propose_release, release_sum
from fedtune.privacy.randomness import SeededRandomness
from fedtune.privacy.release import Reason, Refused
from fedtune.spec import ConfigError

from .builders import make_policy, make_proposal, plan, read_refusal_reason, reserve

QUERY = {"sampling_rate": 1.0, "local_steps": 1, "max_grad_norm": 1.0}


def propose_own_release(name: str, **changes: Any) -> Any:
    return propose_release("count", name, make_policy(), **QUERY | {"noise_multiplier": 20.0} | changes)


def ask(ledger: SiteLedger, release: Any, *, itself: bool = True) -> Any:
    return ledger.reserve(release, round=1, request=release.digest(), own=itself)


def test_rounded_laplace_has_the_probabilities_of_a_rounded_real_value() -> None:
    scale, count = 1.5, 6_000
    samples = np.array(SeededRandomness(7).stream("laplace").draw_rounded_laplace(count, scale))
    values = np.arange(-6, 7)
    cumulative = stats.laplace(scale=scale).cdf(np.append(values[:-1] + 0.5, math.inf))
    expected = count * np.diff(cumulative, prepend=0.0)
    counts = [(np.clip(samples, -6, 6) == value).sum() for value in values]
    assert stats.chisquare(counts, expected).pvalue > 1e-6
    geometric = count * stats.dlaplace(1 / scale).pmf(values[1:-1])  # what a discrete Laplace distribution would give
    assert stats.chisquare(counts[1:-1], geometric * sum(counts[1:-1]) / geometric.sum()).pvalue < 1e-6


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.lists(st.floats(width=64), min_size=1, max_size=5),
    st.floats(1e-30, 1e30),
    st.sampled_from(["gaussian", "laplace"]),
)
def test_clipped_row_never_exceeds_its_integer_bound(row: list[float], bound: float, noise: str) -> None:
    cells = clip_to_cells(row, plan(**QUERY | {"max_grad_norm": bound}, num_rounds=1, noise=noise))
    size = sum(cell**2 for cell in cells) if noise == "gaussian" else sum(map(abs, cells)) ** 2
    assert size <= 4**24
    norm = math.hypot(*row) if noise == "gaussian" else sum(map(abs, row))
    if norm <= bound:
        assert cells == [int(value * (2.0**24 / bound)) for value in row], "a row within the bound must not be scaled"


@pytest.mark.parametrize("noise", ["gaussian", "laplace"])
def test_released_sum_has_the_planned_noise_around_the_true_sum(noise: str) -> None:
    release = plan(**QUERY | {"max_grad_norm": 4.0}, num_rounds=1, noise=noise, noise_multiplier=2.0)
    stream = SeededRandomness(3).stream(noise)
    counts = np.array(release_sum([[3.0] * 4000, [4.0] + [0.0] * 3999], release, width=4000, stream=stream))
    share = 3 * 4 / (3 * 4000**0.5) if noise == "gaussian" else 4 / 4000  # the share of a row scaled to the bound
    around = counts[1:] - share
    size = np.sqrt(np.mean(around**2)) if noise == "gaussian" else np.mean(np.abs(around))
    assert size == pytest.approx(8.0, rel=0.05)
    assert abs(around.mean()) < 0.6
    assert len(set(counts)) == 4000


def test_composed_laplace_epsilon_matches_dp_accounting_and_the_closed_form() -> None:
    delta = 1e-6
    for noise in (0.2, 1.0, 30.0):
        exact = max(0.0, 1 / noise + 2 * math.log1p(-delta))
        assert exact <= accountant.epsilon_pld([LaplaceDpEvent(noise)], delta) <= exact + 1e-4
    sampled = PoissonSampledDpEvent(0.02, GaussianDpEvent(1.1))
    spent: Counter[DpEvent] = Counter({LaplaceDpEvent(4.0): 3, GaussianDpEvent(5.0): 2, sampled: 50})
    parts = [
        pld.from_laplace_mechanism(4.0).self_compose(3),
        pld.from_gaussian_mechanism(5.0).self_compose(2),
        pld.from_gaussian_mechanism(1.1, sampling_prob=0.02).self_compose(50),
    ]
    golden = parts[0].compose(parts[1]).compose(parts[2]).get_epsilon_for_delta(delta)
    assert accountant.epsilon_pld(spent, delta) == pytest.approx(golden, rel=1e-4)
    assert accountant.epsilon_rdp(spent, delta) > golden


@pytest.mark.parametrize("noise", [0.01, 0.5, 3.0, 1e4])
def test_laplace_divergence_is_an_upper_bound_at_every_order(noise: float) -> None:
    for order in filter.ORDERS[::9]:
        with mpmath.workdps(60):
            a, step = mpmath.mpf(order), 1 / mpmath.mpf(noise)
            moment = a / (2 * a - 1) * mpmath.exp((a - 1) * step) + (a - 1) / (2 * a - 1) * mpmath.exp(-a * step)
            exact = mpmath.log(moment) / (a - 1)
        counts = accountant.compute_renyi_divergence(LaplaceDpEvent(noise), order)
        assert exact <= counts <= float(exact) * (1 + 1e-9) + 1e-12 / (order - 1)


def test_own_release_is_charged_once_before_its_answer(path: Path, open_ledger: Callable[..., Any]) -> None:
    ledger = open_ledger(anchor=path.with_name("anchor.json"))
    reservation = ask(ledger, propose_own_release("a"))
    assert isinstance(reservation, Reservation)
    charged = open_ledger(anchor=path.with_name("anchor.json")).history.count_total_charges()  # as after a crash
    assert charged == Counter({PoissonSampledDpEvent(1.0, GaussianDpEvent(20.0)): 1})
    assert read_refusal_reason(ask, ledger, propose_own_release("a")) is Reason.PLAN_EXHAUSTED, (
        "a lost answer must not be drawn again"
    )
    ledger.commit(reservation, b"[1.0]")
    ledger.end_run(reservation.run)
    assert ask(open_ledger(), propose_own_release("a")) == b"[1.0]"
    assert read_refusal_reason(ask, ledger, propose_own_release("a", noise_multiplier=19.0)) is Reason.PLAN_CHANGED
    assert ledger.sign_receipt("count a").charged_rounds == 1
    assert verify(path).history.count_total_charges() == charged


def test_leads_cannot_request_own_releases_or_their_answers(open_ledger: Callable[..., Any]) -> None:
    ledger = open_ledger()
    assert read_refusal_reason(ask, ledger, propose_own_release("a"), itself=False) is Reason.LEADS
    ledger.commit(ask(ledger, propose_own_release("a")), b"[1.0]")
    assert read_refusal_reason(ask, ledger, propose_own_release("a"), itself=False) is Reason.LEADS
    assert read_refusal_reason(ledger.make_offer, propose_own_release("b")) is Reason.LEADS
    assert read_refusal_reason(ask, ledger, make_proposal()) is Reason.LEADS, (
        "a lead's run must still respect the limits for leads"
    )
    with pytest.raises(ConfigError, match=r"plan\.noise = 'laplace': must be gaussian in a lead's run"):
        make_proposal(plan={"noise": "laplace", "sampling_rate": 1.0})


def test_own_releases_and_runs_share_the_caps(open_ledger: Callable[..., Any]) -> None:
    ledger = open_ledger(policy=make_policy(budget={"max_epsilon_per_run": 8.0}))
    reserve(ledger, make_proposal())
    draw, charged, refused = np.random.default_rng(5), 0, Counter[Reason]()
    for number in range(60):
        noise = str(draw.choice(["gaussian", "laplace"]))
        options = {
            "noise_multiplier": float(draw.choice([0.3, 3.0, 20.0])),
            "noise": noise,
            "local_steps": int(draw.integers(1, 4)),
        }
        before = ledger.history.count_total_charges()
        try:
            ask(ledger, propose_own_release(str(number), **options))
            charged += 1
        except Refused as error:
            refused[error.reason] += 1
            assert ledger.history.count_total_charges() == before, "a refused release must not be charged"
        reserved = ledger.history.count_charges_and_reservations(ledger.history.clock)
        assert ledger.history.epsilon(reserved) <= 11.0
    assert charged > 3
    assert refused.keys() == {Reason.MAX_EPSILON, Reason.MAX_EPSILON_PER_RUN}


def test_own_release_is_refused_for_populations_with_arrivals(open_ledger: Callable[..., Any]) -> None:
    columns = {"text": "body", "user": "who", "arrival": "since"}
    notes = make_policy().dataset[0]
    arriving = make_policy(
        population={"unit": "user", "arrivals": "year"},
        dataset=(type(notes)(id="notes", declared_size=2000, columns=columns),),
    )
    release = propose_release("count", "a", arriving, **QUERY, noise_multiplier=20.0)
    assert read_refusal_reason(ask, open_ledger(policy=arriving), release) is Reason.COHORTS
