"""Reports made by hand whose figures agree: of a run at two sites, and of a site's ledger."""

from __future__ import annotations

import dataclasses
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from fedtune.privacy import accountant, events, filter
from fedtune.privacy.plan import Plan
from fedtune.report.derive import profile
from fedtune.report.model import (
    Approved,
    Assumption,
    Cap,
    Cell,
    Charge,
    Lifetime,
    LifetimeRun,
    Mechanism,
    Provenance,
    Release,
    Report,
    RoundCost,
    SiteReport,
    Spent,
    Step,
    Utility,
    Verdict,
    Verification,
)

DELTA = 1e-5
ORDER = 8.0
RUN = "diagnosis-0123456789abcdef"

CHROMIUM = ("chromium-headless-shell", "chromium", "chromium-browser")
"""The first that is there is taken; a page takes the first a third of the work of the second."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Headless Chromium."""
    playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    path = next((found for name in CHROMIUM if (found := shutil.which(name))), None)
    if path is None:
        pytest.skip("Chromium is not installed")
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield chromium
        chromium.close()


def plan(**changes: Any) -> Plan:
    fields: dict[str, Any] = {
        "unit": "record",
        "delta": DELTA,
        "sampling_rate": 0.05,
        "noise_multiplier": 1.5,
        "max_grad_norm": 1.0,
        "local_steps": 10,
        "num_rounds": 4,
    }
    return Plan(**{**fields, **changes})


def mechanism(plan: Plan, *, run: str = RUN, rounds: int) -> Mechanism:
    """What `rounds` rounds of a plan did."""
    return Mechanism(
        run=run,
        sampling_assumed="poisson",
        sampling_run="poisson",
        sampling_rate=plan.sampling_rate,
        noise_multiplier=plan.noise_multiplier,
        max_grad_norm=plan.max_grad_norm,
        local_steps=plan.local_steps,
        rounds=rounds,
        metrics_noise_multiplier=plan.metrics_noise_multiplier,
        charges=tuple(Charge(event=event, count=count) for event, count in events.counted([plan.event(rounds=rounds)])),
    )


def run_site(site: str, plan: Plan, *, rounds: int, declared_size: int) -> SiteReport:
    """A site as a lead knows it."""
    spent = [plan.event(rounds=rounds)]

    def epsilon(rounds: int) -> float | None:
        return profile.epsilon_pld([plan.event(rounds=rounds)], DELTA, interval=accountant.FINE)

    figure = epsilon(rounds)
    return SiteReport(
        site=site,
        source="charged_by_receipts",
        verdict=Verdict(state="no_guarantee", reasons=("no_noise",)) if figure is None else Verdict(state="within"),
        declared_size=declared_size,
        approved=None,
        spent=Spent(
            epsilon=figure,
            epsilon_pld=figure,
            epsilon_rdp=profile.epsilon_rdp(spent, DELTA),
            planned_epsilon=epsilon(plan.most_rounds),
            upper_bound=False,
            rounds=rounds,
            steps=rounds * plan.local_steps,
        ),
        left=None,
        meaning=profile.meaning(spent, epsilon=figure, delta=DELTA, declared_size=declared_size),
        mechanisms=(mechanism(plan, rounds=rounds),),
        curve=profile.curve(spent, profile.curve_deltas(DELTA)),
        steps=tuple(Step(run=RUN, round=round, time=None, epsilon=epsilon(round)) for round in range(1, rounds + 1)),
        releases=(Release(kind="update", run=RUN, reason=None, count=rounds, first=None, last=None),),
    )


def ledger_site(runs: dict[str, tuple[Plan, int]], *, cap: float = 6.0) -> SiteReport:
    """A site as its own ledger knows it: runs by name, with the rounds that each was charged."""
    charged: Counter[Any] = Counter()
    steps, lives = [], []
    for number, (run, (of_run, rounds)) in enumerate(runs.items(), 1):
        charged = events.grouped(charged + events.grouped([of_run.event(rounds=rounds)]))
        spent_so_far = filter.epsilon_filter(charged, order=ORDER, delta=DELTA)
        steps.append(Step(run=run, round=None, time=f"2026-0{number}-01T08:00:00+00:00", epsilon=spent_so_far))
        lives.append(
            LifetimeRun(
                run=run,
                lead="ab" * 32,
                dataset="letters",
                state="ended",
                rounds=rounds,
                most_rounds=of_run.most_rounds,
                steps=rounds * of_run.local_steps,
                epsilon=profile.epsilon_pld([of_run.event(rounds=rounds)], DELTA),
                planned_epsilon=profile.epsilon_pld([of_run.whole], DELTA),
                seeded_noise=False,
            )
        )
    epsilon = filter.epsilon_filter(charged, order=ORDER, delta=DELTA)
    pld, rdp = profile.epsilon_pld(charged, DELTA), profile.epsilon_rdp(charged, DELTA)
    return SiteReport(
        site="north-hospital",
        source="own_ledger",
        verdict=Verdict(state="within" if epsilon <= cap else "exceeded"),
        declared_size=1200,
        approved=Approved(
            max_epsilon=cap,
            max_epsilon_per_run=4.0,
            max_epsilon_per_period=None,
            period="year",
            since="2026-01-01T08:00:00+00:00",
        ),
        spent=Spent(
            epsilon=epsilon,
            epsilon_pld=pld,
            epsilon_rdp=rdp,
            planned_epsilon=None,
            upper_bound=False,
            rounds=sum(run.rounds for run in lives),
            steps=sum(run.steps for run in lives),
        ),
        left=max(0.0, cap - epsilon),
        meaning=profile.meaning(charged, epsilon=epsilon, delta=DELTA, declared_size=1200, fixed=len(runs) == 1),
        mechanisms=tuple(mechanism(of_run, run=run, rounds=rounds) for run, (of_run, rounds) in runs.items()),
        curve=profile.curve(charged, profile.curve_deltas(DELTA)),
        steps=tuple(steps),
        lifetime=Lifetime(
            order=ORDER,
            epsilon=epsilon,
            with_set_aside=epsilon,
            epsilon_pld=pld,
            epsilon_rdp=rdp,
            left=max(0.0, cap - epsilon),
            period="year",
            period_epsilon=epsilon,
            reference_runs_left=3,
            caps=(Cap(time="2026-01-01T08:00:00+00:00", max_epsilon=cap),),
            runs=tuple(lives),
            frozen=False,
            in_doubt=False,
            restored=0,
            seeded=False,
        ),
        verification=Verification(
            num_events=40,
            head="cd" * 32,
            site_key="ef" * 32,
            key_expected=False,
            rollback_excluded=False,
            anchor_sequence=None,
        ),
        releases=tuple(
            Release(
                kind="update",
                run=run,
                reason=None,
                count=rounds,
                first="2026-01-01T08:00:00+00:00",
                last="2026-01-02T08:00:00+00:00",
            )
            for run, (_, rounds) in runs.items()
        ),
        asserted={"units_are_disjoint": True},
    )


def supposed(*codes: str) -> tuple[Assumption, ...]:
    """What reports of both kinds rest on, and `codes`, but for how units joined a step."""
    every = (
        "noise_in_every_step",
        "unpredictable_randomness",
        "clipping_exact",
        "delta_below_one_over_size",
        "accountants_agree",
        "one_record_is_one_unit",
        "units_at_one_site_only",
    )
    return tuple(Assumption(code=code, status="assumed", evidence="") for code in (*every, *codes))


def report_of(sites: tuple[SiteReport, ...], **changes: Any) -> Report:
    """A run's report around `sites`, with its worst epsilon and verdict."""
    epsilons = [site.spent.epsilon for site in sites if site.spent]
    states = [site.verdict.state for site in sites]
    worst = next(state for state in ("no_guarantee", "exceeded", "within") if state in states)
    fields: dict[str, Any] = {
        "kind": "run",
        "name": "diagnosis",
        "date": "2026-03-01T09:30:00+00:00",
        "verdict": next(site.verdict for site in sites if site.verdict.state == worst),
        "unit": "record",
        "neighbouring_relation": "add_or_remove_one",
        "delta": DELTA,
        "epsilon": None if None in epsilons else max(e for e in epsilons if e is not None),
        "target_epsilon": 2.0,
        "seeded_noise": False,
        "randomness": "operating_system",
        "released": ("updates", "aggregates", "final_adapter", "refusals_and_receipts"),
        "sites": sites,
        "covers": ("rounds_and_steps", "charged_retries"),
        "leaves_out": ("other_runs", "tuning_trials", "lead_evaluation", "side_channels"),
        "not_protected": ("facts_about_people_in_general", "outside_training", "several_records", "lead_files"),
        "unprotected_figures": ("scores_on_lead_files", "declared_sizes", "times", "bytes", "who_took_part"),
        "assumptions": (
            *supposed("receipts_signed", "configuration_unchanged"),
            Assumption(code="poisson_sampling", status="verified", evidence="tests/privacy/test_mechanism.py"),
        ),
        "cells": (
            Cell(code="systematic_description", state="auto", facts={"sites": str(len(sites))}),
            Cell(code="legal_basis", state="site", facts={}),
            Cell(code="retention", state="missing", facts={}),
        ),
        "provenance": Provenance(
            fedtune_version="0.5.0",
            config_sha256="12" * 32,
            model="minilm",
            model_sha256="34" * 32,
            model_licence="Apache-2.0",
            dataset="letters",
            task="classification",
            libraries={"torch": "2.8.0", "dp-accounting": "0.6.0"},
            python="3.11.9",
            machine="x86_64",
        ),
        "utility": Utility(
            before={"accuracy": 0.25, "loss": 1.4},
            final={"accuracy": 0.75, "loss": 0.6},
            non_private=None,
            rounds=tuple(
                RoundCost(
                    round=round,
                    sites=tuple(site.site for site in sites),
                    failed_sites={},
                    seconds=2.5,
                    bytes_down=40_000,
                    bytes_up=41_000,
                    scores={"accuracy": 0.25 + 0.125 * round, "loss": None},
                    epsilon=sites[0].steps[round - 1].epsilon if len(sites[0].steps) >= round else None,
                )
                for round in range(1, 5)
            ),
        ),
    }
    return Report(**{**fields, **changes})


_SITES = (
    run_site("north-hospital", plan(), rounds=4, declared_size=1200),
    run_site("south-hospital", plan(), rounds=3, declared_size=800),
)


@pytest.fixture
def a_report() -> Callable[..., Report]:
    """`a_report(**changes)`: a run at two sites, one of which was charged a round less."""
    return lambda **changes: dataclasses.replace(report_of(_SITES), **changes)


@pytest.fixture
def a_report_without_privacy() -> Callable[..., Report]:
    """The same without noise."""
    site = run_site("north-hospital", plan(noise_multiplier=0.0), rounds=4, declared_size=1200)
    made = report_of((site,), target_epsilon=None)
    noiseless = tuple(
        dataclasses.replace(one, status="violated") if one.code in ("noise_in_every_step", "clipping_exact") else one
        for one in made.assumptions
        if one.code != "accountants_agree"
    )
    return lambda **changes: dataclasses.replace(made, assumptions=noiseless, **changes)


@pytest.fixture
def a_ledger_report() -> Callable[..., Report]:
    """`a_ledger_report(**changes)`: a site with two ended runs, the second with noised scores."""
    site = ledger_site(
        {
            "diagnosis": (plan(), 4),
            "triage": (plan(noise_multiplier=2.0, metrics_noise_multiplier=20.0), 3),
        }
    )
    return lambda **changes: dataclasses.replace(
        report_of(
            (site,),
            kind="ledger",
            name="north-hospital",
            target_epsilon=None,
            utility=None,
            assumptions=(
                *supposed(
                    "ledger_intact",
                    "no_event_missing",
                    "site_key_known",
                    "order_fixed_beforehand",
                    "cap_never_raised",
                    "runs_fixed_beforehand",
                    "ends_independent_of_releases",
                ),
                Assumption(code="poisson_sampling", status="asserted", evidence="north-hospital"),
            ),
        ),
        **changes,
    )
