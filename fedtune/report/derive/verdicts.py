"""Verdicts: whether the spent epsilon stays within the approved one, derived from a report's figures.

A verdict follows from its reasons: its state is the worst among theirs, and `REASONS` gives the state of each.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from fedtune.federation.secure.agreement import MOST_SITES
from fedtune.privacy.events import Spent
from fedtune.report.derive import profile
from fedtune.report.derive.profile import accountants_agree, interval_of
from fedtune.report.facts import NOT_RECORDED, Approved, Lifetime, RunFacts, State, Verdict
from fedtune.report.model import Report, SiteReport
from fedtune.words import unbounded

CODES: Mapping[str, Mapping[Any, Sequence[str]]] = tomllib.loads(
    Path(__file__).with_name("codes.toml").read_text(encoding="utf-8")
)
REASONS: Mapping[State, Sequence[str]] = CODES["reasons"]  # state -> the reasons for it, the worst state first
# Of a site, until `judged` has seen its figures.
UNJUDGED: Mapping[str, Any] = {"verdict": Verdict(state="within"), "meaning": None}
WORST_FIRST: tuple[State, ...] = tuple(REASONS)
Room = Literal["closed", "used_up", "no_run_fits"]
_LAST_DIGITS = 1e-9  # relative tolerance: two ways to compute the same epsilon may differ by rounding


def verdict_of(reasons: Iterable[str]) -> Verdict:
    """The verdict for all reasons that hold."""
    holding = tuple(dict.fromkeys(reasons))
    state: State = next((state for state in WORST_FIRST if not set(REASONS[state]).isdisjoint(holding)), "within")
    return Verdict(state=state, reasons=tuple(code for code in holding if code in REASONS[state]))


def worst(verdicts: Iterable[Verdict]) -> Verdict:
    """The worst state of several verdicts, with the reasons of those in that state, each once.

    "nothing_spent" is kept only if it holds for all of them.
    """
    several = list(verdicts)
    state = min((verdict.state for verdict in several), key=WORST_FIRST.index, default=WORST_FIRST[-1])
    having = [verdict.reasons for verdict in several if verdict.state == state]
    codes = dict.fromkeys(code for reasons in having for code in reasons)
    if not all("nothing_spent" in reasons for reasons in having):
        codes.pop("nothing_spent", None)
    return Verdict(state=state, reasons=tuple(codes))


def room_of(report: Report) -> Room | None:
    """Why a kept budget has no room for another run, in a site's own report; None: it has room, or was not kept."""
    life = report.sites[0].lifetime if report.kind == "ledger" and report.sites else None
    if life is None or report.verdict.state != "within":
        return None
    if life.frozen:
        return "closed"
    if life.left is not None and life.left <= 0:
        return "used_up"
    return "no_run_fits" if life.reference_runs_left == 0 else None


def judged(site: SiteReport, reasons: Iterable[str], *, charged: Spent, delta: float) -> SiteReport:
    """Add to a site its verdict, also on whether accountants agree, and the meaning of its epsilon for all `charged`.

    Without a guarantee the meaning is left out, unless missing noise is the only reason.
    """
    spent = site.spent
    assert spent is not None
    agree = accountants_agree(spent, width=interval_of(site.source))
    verdict = verdict_of([*reasons, *([] if agree else ["accountants_disagree"])])
    if verdict.state == "no_guarantee" and verdict.reasons != ("no_noise",):
        return replace(site, verdict=verdict, meaning=None)
    trust, rows = site.by_trust, site.mechanisms
    others = (profile.charged_against(rows, colluders=MOST_SITES), trust.with_all_others) if trust else None
    of_site = partial(profile.meaning, declared_size=site.declared_size, fixed=were_fixed(site), others=others)
    return replace(site, verdict=verdict, meaning=of_site(charged, epsilon=profile.claimed(spent), delta=delta))


def of_run(site: SiteReport, facts: RunFacts, *, believed: bool) -> Iterator[str]:
    """The reasons at one site of a run.  The plan was fixed, so its whole epsilon is a proof whatever ended the run."""
    spent = site.spent
    assert spent is not None
    of_spending = _holding(
        no_noise=spent.epsilon is None,
        seeded_noise=facts.seeded_noise,
        above_target=any(above(epsilon, facts.target_epsilon) for epsilon in (spent.epsilon, spent.planned_epsilon)),
        not_finished=not facts.finished,
        ended_by_scores=facts.ended_by_scores,
        site_silent=spent.upper_bound,
        sampling_not_recorded=any(row.sampling_run == NOT_RECORDED for row in site.mechanisms),
    )
    yield from of_spending if spent.rounds > 0 else ["nothing_spent"]
    yield from _holding(
        began_in_an_adapter=facts.provenance.start_adapter is not None,
        configuration_changed=not facts.unchanged,
        receipts_not_believed=not believed,
    )


def of_ledger(
    life: Lifetime, approved: Approved, *, charges: int, verified: bool, limits_loosened: bool = False
) -> Iterator[str]:
    """The reasons of a ledger: what was spent against what is approved now; `charges` as `Cap.charges_before`."""
    something = life.epsilon != 0
    yield from _holding(
        ledger_not_verified=not verified,
        ledger_in_doubt=life.in_doubt,
        seeded_noise=life.seeded,
        no_noise=life.epsilon is None,
        # A Renyi filter is a bound only while its cap is fixed and never exceeded.
        no_lifetime_cap=life.spent_without_cap(charges) or (approved.max_epsilon is None and something),
        above_lifetime_cap=something and above(life.epsilon, approved.max_epsilon),
        above_period_cap=something and above(life.period_epsilon, approved.max_epsilon_per_period),
        nothing_spent=not something,
        cap_raised=life.cap_raised,
        limits_loosened=limits_loosened,
    )


def _holding(**known: bool) -> Iterator[str]:
    yield from (code for code, is_so in known.items() if is_so)


def above(epsilon: float | None, cap: float | None) -> bool:
    """An epsilon exceeds a cap by more than rounding; None is an unbounded epsilon, or no cap."""
    return cap is not None and unbounded(epsilon) > cap * (1 + _LAST_DIGITS)


def were_fixed(site: SiteReport) -> bool:
    """All that was charged was fixed before any of it was released: one run, charged its whole plan.

    A later run may be chosen, and an earlier one ended, because of what was released.
    """
    if site.source != "own_ledger":  # one run's plan
        return not (site.spent and site.spent.ended_by_scores)
    charged = [row for row in site.mechanisms if row.rounds]
    most = {run.run: run.most_rounds for run in site.lifetime.runs} if site.lifetime else {}
    return len(charged) == 1 and most.get(charged[0].run) == charged[0].rounds
