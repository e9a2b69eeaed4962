"""A promise of the site's own: which noise keeps it, that the ledger charges that noise, and what it never weakens."""

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent
from dp_accounting.pld import PLDAccountant

from fedtune.privacy import accountant, events
from fedtune.privacy import promise as promise_module
from fedtune.privacy.distributed_noise import Together
from fedtune.privacy.ledger.chain import Kind
from fedtune.privacy.ledger.site_ledger import Ledger
from fedtune.privacy.ledger.verify import verify
from fedtune.privacy.promise import Promise
from fedtune.privacy.release import Offer, Reason, Receipt
from fedtune.spec import ConfigError, RunError

from .builders import plan, policy, proposal, reason_of, train

STRONGER = Promise(noise_factor=1.5)
THREE = Together(num_sites=3, threshold=3, colluders=0).with_share(1.0)


def of_steps(noise: float, steps: int) -> SelfComposedDpEvent:
    return SelfComposedDpEvent(PoissonSampledDpEvent(0.25, GaussianDpEvent(noise)), steps)


def test_the_epsilon_at_one_and_a_half_times_the_noise() -> None:
    # By dp-accounting 0.6: an accountant that this project did not write.
    asked = plan(num_rounds=5)
    found = []
    for factor in (1.0, 1.5):
        by_others = PLDAccountant().compose(of_steps(factor, 15)).get_epsilon(1e-5)
        own = accountant.epsilon_pld([asked.stronger(factor).whole], 1e-5)
        assert own == pytest.approx(by_others, rel=1e-3)
        found.append(own)
    assert found == pytest.approx([7.09917508, 3.70309849], rel=1e-5)


def test_an_epsilon_is_kept_with_the_least_noise_that_does() -> None:
    asked = plan(num_rounds=5)
    for factor, most in ((1.0, 2.0), (1.0, 4.0), (3.0, 2.0)):
        found = Promise(noise_factor=factor, epsilon_per_run=most).factor_for(asked)
        assert accountant.epsilon_pld([asked.stronger(found).whole], asked.delta) <= most
        assert (found == 3.0) == (factor == 3.0), "more than the epsilon needs"
        less = asked.stronger(found - 2e-3)
        assert (accountant.epsilon_pld([less.whole], asked.delta) > most) == (factor == 1.0)
    assert Promise(epsilon_per_run=50.0).factor_for(asked) == 1.0


def test_what_no_noise_of_the_sites_own_can_keep_is_refused() -> None:
    fine = replace(THREE, cell_bits=14)  # a shorter clip norm could not be rounded as the theorem says
    sums, none = {"shared": fine, "local_steps": 1}, {"noise_multiplier": 0.0}
    scores = {"metrics_noise_multiplier": 1.0}
    lax = {"limits": {"min_noise_multiplier": 0.0}, "releases": {"metrics": "noised"}, "trust": {"secure": True}}
    half = Promise(epsilon_per_run=0.5)
    for promise, change in ((STRONGER, sums), (STRONGER, none), (half, none), (half, scores)):
        assert reason_of(policy(promise=promise, **lax).check, proposal(plan=change)) is Reason.PROMISE
        policy(**lax).check(proposal(plan=change))  # accepted where nothing more is promised
    assert Promise(epsilon_per_run=1e-3).factor_for(plan(sampling_rate=1.0, num_rounds=500)) is None


def test_in_a_secure_sum_a_shorter_clip_norm_keeps_the_promise(opened: Any) -> None:
    sums = {"shared": THREE, "local_steps": 1, "num_rounds": 15}
    asked, trust = plan(**sums), {"trust": {"secure": True}}
    factor = Promise(noise_factor=1.1).factor_for(asked)
    assert factor == 1127 / 1024, "the next multiple of 1 / 1024"
    own = asked.stronger(factor)
    assert own == replace(
        asked,
        noise_multiplier=factor,
        max_grad_norm=asked.max_grad_norm / factor,
        shared=replace(THREE, noise_multiplier=factor),  # in the cells that all others send
    )
    # By dp-accounting 0.6: the noise of three shares beside a clip norm that is half as long.
    own = asked.stronger(2.0)
    by_others = PLDAccountant().compose(of_steps(2 * 3**0.5, 15)).get_epsilon(1e-5)
    assert accountant.epsilon_pld([own.whole], 1e-5) == pytest.approx(by_others, rel=1e-3)
    assert by_others == pytest.approx(1.18436334, rel=1e-5)
    assert own.by_own_noise_alone.noise_multiplier == 2.0
    promise = Promise(epsilon_per_run=1.0)
    needed = promise.factor_for(asked) or 0.0
    for times, kept in ((needed, True), (needed - 2 / 1024, False)):
        assert (accountant.epsilon_pld([asked.stronger(times).whole], 1e-5) <= 1.0) == kept
    ledger = opened(policy=policy(promise=promise, **trust))
    train(ledger, proposal(plan=sums), 1)
    assert ledger.history.charged() == events.grouped([asked.stronger(needed).event()])
    capped = {"secure": True, "max_epsilon_if_all_collude": 3.0}
    assert reason_of(policy(trust=capped).check, proposal(plan=sums)) is Reason.MAX_EPSILON_IF_ALL_COLLUDE
    double = Promise(noise_factor=2.0)
    policy(trust=capped, promise=double).check(proposal(plan=sums))
    lowest = {"min_grad_norm": asked.max_grad_norm / 1.5}
    assert reason_of(policy(promise=double, limits=lowest, **trust).check, proposal(plan=sums)) is Reason.MIN_GRAD_NORM
    inexact = policy(promise=double, allow={"inexact_gradients": True}, **trust)
    assert reason_of(inexact.check, proposal(plan=sums)) is Reason.PROMISE


def test_limits_count_the_noise_that_is_made() -> None:
    asked = proposal(plan={"noise_multiplier": 0.5})
    assert reason_of(policy().check, asked) is Reason.MIN_NOISE_MULTIPLIER
    policy(promise=STRONGER).check(asked)
    capped = policy(budget={"max_epsilon_per_run": 4.0})
    assert reason_of(capped.check, proposal()) is Reason.MAX_EPSILON_PER_RUN
    replace(capped, promise=Promise(epsilon_per_run=4.0)).check(proposal())


def test_the_ledger_charges_the_noise_that_the_site_makes(opened: Any, path: Path) -> None:
    ledger, asked = opened(policy=policy(promise=STRONGER)), proposal()
    train(ledger, asked, 1)
    assert ledger.history.runs["r"].plan == replace(asked.plan, noise_multiplier=1.5)
    assert ledger.history.runs["r"].proposal == asked
    assert ledger.history.charged() == events.grouped([of_steps(1.5, 3)])
    assert ledger.history.set_aside(ledger.history.clock) == events.grouped([of_steps(1.5, 12)])
    receipt = ledger.receipt("r")
    assert (receipt.noise_factor, receipt.charged_rounds, receipt.is_signed()) == (1.5, 1, True)
    assert not replace(receipt, noise_factor=2.0).is_signed()
    assert [event.detail["noise_factor"] for event in verify(path).events if event.kind is Kind.PLAN] == [1.5]
    assert verify(path).history.charged() == ledger.history.charged()


def test_a_site_that_promises_nothing_more_says_what_it_did(opened: Any, path: Path) -> None:
    ledger = opened()
    train(ledger, proposal(), 1)
    (accepted,) = [event.detail for event in verify(path).events if event.kind is Kind.PLAN]
    assert accepted.keys() == {"proposal", "expires"}
    assert ledger.history.runs["r"].plan is ledger.history.runs["r"].proposal.plan
    said = ledger.receipt("r").to_json()
    assert "noise_factor" not in said
    assert Receipt.from_json(said) == ledger.receipt("r")
    for factor in (0.5, 101.0, float("nan")):
        with pytest.raises(ConfigError, match="noise_factor"):
            Receipt.from_json(said | {"noise_factor": factor})
    assert b"noise_factor" not in Offer(site="a", run="r", most_rounds=1, least_noise=1.0).to_bytes()


@pytest.mark.parametrize("said", [0.5, 2, "1.5", 1e3, 1.3])
def test_a_ledger_with_another_factor_cannot_be_read(opened: Any, said: object, monkeypatch: Any) -> None:
    monkeypatch.setattr(Ledger, "noise_factor", lambda *of: said)
    sums = {"shared": THREE, "local_steps": 1} if said == 1.3 else {}  # no clip norm of a secure sum is so much shorter
    with pytest.raises(RunError, match=r"multiple of the plan's|more than the plan can have"):
        train(opened(policy=policy(trust={"secure": True})), proposal(plan=sums), 1)


def test_a_run_keeps_the_noise_that_it_began_with(opened: Any) -> None:
    train(opened(policy=policy(promise=STRONGER)), proposal(), 1)
    without = opened(policy=policy())
    train(without, proposal(), 2)
    assert without.history.charged() == events.grouped([of_steps(1.5, 6)])
    # A run whose noise does not keep what is promised by now ends here.
    more = opened(policy=policy(promise=Promise(noise_factor=2.0)))
    assert reason_of(more.reserve, proposal(), round=3, request="q") is Reason.PROMISE
    assert reason_of(more.require_allowed, proposal()) is Reason.PROMISE
    assert more.noise_factor(proposal()) == 1.5
    assert more.noise_factor(proposal(run="s")) == 2.0


def test_a_run_that_costs_too_much_fits_with_the_sites_own_noise(opened: Any) -> None:
    small = {"max_epsilon": 6.0}
    assert reason_of(opened(policy=policy(budget=small)).require_acceptable, proposal()) is Reason.MAX_EPSILON
    ledger = opened(policy=policy(budget=small, promise=Promise(epsilon_per_run=2.0)))
    ledger.require_acceptable(proposal())
    train(ledger, proposal(), 1, 2, 3, 4, 5)
    run = ledger.history.runs["r"]
    assert accountant.epsilon_pld([run.plan.whole], run.plan.delta) <= 2.0
    assert ledger.history.epsilon() <= 6.0
    assert ledger.offer(proposal(run="s")).noise_factor == run.noise_factor > 1


def test_no_offer_computes_an_epsilon_beyond_the_limits(opened: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    above = Mock(wraps=promise_module._plan_epsilon_above)
    monkeypatch.setattr(promise_module, "_plan_epsilon_above", above)
    ledger = opened(policy=policy(promise=Promise(epsilon_per_run=2.0), limits={"min_noise_multiplier": 0.6}))
    most = ledger.policy.limits.max_rounds
    assert ledger.offer(proposal(plan={"noise_multiplier": 0.1})).noise_factor == 1, "no rounds at this noise"
    assert ledger.offer(proposal(run="s", plan={"num_rounds": most * 5})).noise_factor > 1
    priced = [called.args[0] for called in above.call_args_list]
    assert {(one.noise_multiplier >= 0.6, one.most_rounds <= most) for one in priced} == {(True, True)}
