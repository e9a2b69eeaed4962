"""A lead whose scores end a run: what it keeps, what its sites learn, and what their ledgers save."""

from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from fedtune.model.adapter import Adapter
from fedtune.privacy.ledger.chain import Kind
from fedtune.runs.results import site_charge


def with_scores(made: Any, *scores: float) -> Any:
    """The same, with a lead whose validation file gives one score after the other."""
    left = iter(scores)
    made.lead = replace(made.lead, evaluate=lambda _: {"accuracy": next(left)}, judged_by="accuracy")
    return made


def test_the_best_round_is_kept_and_sites_learn_the_end_and_save_the_rest(federation: Any) -> None:
    """A run of four planned rounds that its scores end after the third."""
    asks = {"num_rounds": 4, "spare_rounds": 0}
    made = with_scores(federation(num_rounds=4, stop_after=1, keep_round="best", asks=asks), 0.25, 0.75, 0.75)
    adapters: list[Adapter] = []
    state: Any = made.run(gives_adapter=True, finished=lambda state: adapters.append(state.adapter))
    assert (state.round, len(adapters)) == (3, 3)
    assert made.trained == [*made.spec.names] * 3
    assert state.kept.digest() == adapters[1].digest() != state.adapter.digest()
    # A checkpoint holds it, too.
    loaded = made.lead.checkpoints.load()
    assert (loaded.kept.digest(), loaded.adapter.digest()) == (adapters[1].digest(), adapters[2].digest())
    for site in made.spec.names:
        last = made.events(site)[-1]
        assert (last.kind, last.detail["what"]) == (Kind.NOTE, "run_ended")
        assert last.detail["adapter_sha256"] == adapters[1].digest()
        history = made.ledger(site).history
        assert not history.set_aside(datetime.now(UTC))
        charge = site_charge(state, site, made.plan)
        assert charge.rounds == 3
        assert 0 < charge.epsilon < charge.planned_epsilon == charge.claim(ended_by_scores=True)
        assert charge.claim(ended_by_scores=False) == charge.epsilon


def test_a_run_that_crashed_keeps_the_best_of_all_its_rounds(federation: Any) -> None:
    made = with_scores(federation(num_rounds=2, keep_round="best"), 0.75, 0.5)
    after_one = made.run_until(1)
    state = made.run(after_one)
    assert state.round == 2
    assert state.kept.digest() == after_one.adapter.digest() != state.adapter.digest()
