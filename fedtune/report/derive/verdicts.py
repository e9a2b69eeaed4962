"""Verdicts: whether the spent epsilon is within the approved budget, derived from a report's figures.

A verdict follows from its reasons: `REASONS` assigns a state to each reason, and the verdict has the worst of these
states. This module also reads the results of privacy audits, checks them, and decides whether they refute an epsilon.
"""

from __future__ import annotations

import math
import tomllib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from fedtune.codec import decode, read_json_object
from fedtune.evaluation import audit_bound
from fedtune.evaluation.fdp_bound import compute_fdp_lower_bound
from fedtune.federation.run_folder import RunFolder
from fedtune.formatting import convert_none_to_infinite
from fedtune.report.derive import profile
from fedtune.report.facts import (
    ApprovedBudget,
    Audit,
    AuditBound,
    BudgetVerdict,
    Lifetime,
    RunFacts,
    SiteFacts,
    Source,
    State,
)
from fedtune.report.model import Problem, Report, SiteReport, SpentBudget
from fedtune.spec import RUN_SCHEMA, RunError

CODES: Mapping[str, Mapping[Any, Sequence[str]]] = tomllib.loads(
    Path(__file__).with_name("codes.toml").read_text(encoding="utf-8")
)
REASONS: Mapping[State, Sequence[str]] = CODES["reasons"]  # state -> the reasons for it, the worst state first
WORST_FIRST: tuple[State, ...] = tuple(REASONS)
Room = Literal["closed", "used_up", "no_run_fits", "no_run_now", "cohort_full"]
_MAX_EPSILON = 1e3  # far above any bound that canaries can prove
_AUDIT_DIGITS = 5e-6  # relative tolerance: the bisection for a bound may end elsewhere on another machine
_LAST_DIGITS = 1e-9  # relative tolerance: two ways to compute the same epsilon may differ by rounding


def derive_verdict(reasons: Iterable[str]) -> BudgetVerdict:
    """Derive the verdict from all `reasons`."""
    holding = tuple(dict.fromkeys(reasons))
    state: State = next((state for state in WORST_FIRST if not set(REASONS[state]).isdisjoint(holding)), "within")
    return BudgetVerdict(state=state, reasons=tuple(code for code in holding if code in REASONS[state]))


def combine_verdicts(verdicts: Iterable[BudgetVerdict]) -> BudgetVerdict:
    """Combine several verdicts into the worst state, with the distinct reasons of all verdicts in that state.

    "nothing_spent" is only included if all of these verdicts have it.
    """
    several = list(verdicts)
    state = min((verdict.state for verdict in several), key=WORST_FIRST.index, default=WORST_FIRST[-1])
    having = [verdict.reasons for verdict in several if verdict.state == state]
    codes = dict.fromkeys(code for reasons in having for code in reasons)
    if not all("nothing_spent" in reasons for reasons in having):
        codes.pop("nothing_spent", None)
    return BudgetVerdict(state=state, reasons=tuple(codes))


def explain_missing_room(report: Report) -> Room | None:
    """Return the code for why a site's budget permits no further run; None: it permits one, or the verdict is not
    "within".
    """
    life = report.sites[0].lifetime
    if life is None or report.verdict.state != "within":
        return None
    if life.frozen:
        return "closed"
    is_used_up = life.remaining_epsilon is not None and life.remaining_epsilon <= 0
    if not is_used_up and life.reference_remaining_runs != 0:
        return None
    if life.reference_runs_in_lifetime != 0:
        return "no_run_now"  # until the next period
    if life.cohorts:
        return "cohort_full"  # a run may admit others
    return "used_up" if is_used_up else "no_run_fits"


def find_report_outcome(report: Report) -> str:
    """Return the code of a report's overall result, which pages, labels, cards and the terminal show."""
    return explain_missing_room(report) or (
        f"within_{report.facts.kind}" if report.verdict.state == "within" else report.verdict.state
    )


def judge_site(reasons: Iterable[str], spent: SpentBudget, *, source: Source) -> BudgetVerdict:
    """Derive a site's verdict from its `reasons`, and from whether its PLD and RDP figures contradict each other."""
    agree = profile.accountants_agree(spent, width=profile.choose_pld_interval(source))
    return derive_verdict([*reasons, *([] if agree else ["accountants_disagree"])])


def iter_run_reasons(site: SiteFacts, facts: RunFacts, spent: SpentBudget, *, sampling: str | None) -> Iterator[str]:
    """Yield the reasons for the verdict at one site of a run.

    The plan was fixed in advance, so the epsilon of the whole plan is proved no matter why the run ended.
    """
    of_spending = _iter_true_codes(
        no_noise=spent.epsilon is None,
        seeded_noise=facts.seeded_noise,
        above_target=exceeds_cap(spent.epsilon, facts.target_epsilon),
        not_finished=not facts.finished,
        charged_less=spent.rounds < facts.plan.max_rounds,
        site_silent=facts.is_upper_bound(site),
        sampling_not_recorded=sampling is None,
    )
    yield from of_spending if spent.rounds > 0 else ["nothing_spent"]
    yield from _iter_true_codes(
        began_in_an_adapter=facts.provenance.start_adapter is not None,
        configuration_changed=not facts.unchanged,
    )


def iter_ledger_reasons(
    life: Lifetime, approved: ApprovedBudget, *, charges: int, verified: bool, limits_loosened: bool = False
) -> Iterator[str]:
    """Yield the reasons for a ledger's verdict by comparing its spent epsilon with the current limits.

    `charges` is the number of charges in the ledger, counted as in `Cap.charges_before`.
    """
    something = life.epsilon != 0
    yield from _iter_true_codes(
        ledger_not_verified=not verified,
        ledger_in_doubt=life.in_doubt,
        seeded_noise=life.seeded,
        no_noise=life.epsilon is None,
        # A Renyi filter is a bound only while its cap is fixed and never exceeded.
        no_lifetime_cap=life.has_spent_without_cap(charges) or (approved.max_epsilon is None and something),
        above_lifetime_cap=something and exceeds_cap(life.epsilon, approved.max_epsilon),
        above_period_cap=something and exceeds_cap(life.period_epsilon, approved.max_epsilon_per_period),
        nothing_spent=not something,
        cap_raised=life.cap_raised,
        limits_loosened=limits_loosened,
    )


def _iter_true_codes(**known: bool) -> Iterator[str]:
    yield from (code for code, is_so in known.items() if is_so)


def exceeds_cap(epsilon: float | None, cap: float | None) -> bool:
    """Whether an epsilon, or another figure, exceeds a cap by more than rounding errors; None: unbounded, or no cap.

    NaN exceeds every cap.
    """
    return cap is not None and not convert_none_to_infinite(epsilon) <= cap * (1 + _LAST_DIGITS)


def read_audit(folder: Path) -> Audit | None:
    """Read the audit results from a run's `audit.json`; None if no audit has finished.

    Raises:
        RunError: the file is damaged.
    """
    path = RunFolder(folder).audit
    if not path.is_file():
        return None
    try:
        fields = read_json_object(path, key=str(path))
        if fields.pop("schema_version", None) != RUN_SCHEMA:
            raise ValueError("schema_version")
        return decode(Audit, fields)
    except (OSError, ValueError) as error:
        raise RunError(f"{path} is damaged: run fedtune audit again") from error


def apply_audit(sites: Sequence[SiteReport], audit: Audit | None, *, marked: bool) -> tuple[SiteReport, ...]:
    """Remove the guarantee of each site whose claim the audit refutes, or of all sites if an audit was `marked` but not
    finished.
    """
    if audit is None:
        return tuple(_remove_guarantee(site, "holds_canaries") if marked else site for site in sites)
    places = {bound.site for bound in list_refuted_bounds(audit, sites)}
    # A bound over all sites together refutes each site's claim.
    everywhere = None in places or (audit.exceeded and not places)
    made: list[SiteReport] = []
    for site in sites:
        if everywhere or site.site in places:
            site = _remove_guarantee(site, "refuted_by_audit")
        elif site.verdict.state != "no_guarantee":
            # Canaries are covered like other records; the verdict only reports that the adapter was trained on them.
            site = replace(site, verdict=replace(site.verdict, reasons=(*site.verdict.reasons, "audited")))
        made.append(site)
    return tuple(made)


def list_refuted_bounds(audit: Audit, sites: Iterable[SiteReport] = ()) -> tuple[AuditBound, ...]:
    """Return the bounds whose counts refute the claimed epsilon, or the smaller epsilon in the site's report.

    The tests share one error probability, so each bound needs more confidence than a single test would.
    """
    spent = _map_epsilon_by_place(audit, sites)
    errors = audit_bound.split_error_probability(audit.confidence, [bound.site for bound in audit.bounds])

    def chance(bound: AuditBound) -> float:
        claim = min(spent.get(bound.site, math.inf), bound.claimed_epsilon)
        if claim >= _MAX_EPSILON:
            return 1.0
        counts = bound.canaries, bound.guesses, bound.correct
        return audit_bound.compute_p_value(*counts, epsilon=claim, delta=audit.delta)

    return tuple(bound for bound, error in zip(audit.bounds, errors, strict=True) if chance(bound) < error)


def _map_epsilon_by_place(audit: Audit, sites: Iterable[SiteReport]) -> dict[str | None, float]:
    """Return site -> epsilon in the report; None maps to the largest epsilon of the audited sites, if all of these are
    bounded.
    """
    audited = {bound.site for bound in audit.bounds if bound.site}
    spent = {site.site: site.spent.epsilon for site in sites}
    known: dict[str | None, float] = {site: epsilon for site, epsilon in spent.items() if epsilon is not None}
    together = [spent[site] for site in spent if site in audited or not audited]
    epsilons = [epsilon for epsilon in together if epsilon is not None]
    return known if len(epsilons) < len(together) or not epsilons else known | {None: max(epsilons)}


def _remove_guarantee(site: SiteReport, why: str) -> SiteReport:
    return replace(site, verdict=derive_verdict([*site.verdict.reasons, why]), meaning=None)


def find_wrong_audit_bounds(audit: Audit) -> Iterator[Problem]:
    """Yield each bound of an audit that does not follow from its counts."""
    lower, by_fdp = audit_bound.compute_epsilon_lower_bound, compute_fdp_lower_bound
    for number, bound in enumerate(audit.bounds):
        for key, compute, right in (
            ("lower_bound", lower, bound.correct),
            ("best_possible", lower, bound.guesses),
            ("fdp_bound", by_fdp, bound.correct),
        ):
            if (said := getattr(bound, key)) is None:  # an older audit has no `fdp_bound`
                continue
            found = compute(bound.canaries, bound.guesses, right, delta=audit.delta, confidence=audit.confidence)
            if not abs(said - found) <= _AUDIT_DIGITS * max(1.0, found):
                yield Problem(f"audit.bounds.{number}.{key}", said, found)


def find_audit_problems(report: Report) -> Iterator[Problem]:
    """Yield each audit figure that contradicts its counts or the report's claims."""
    audit = report.facts.audit if isinstance(report.facts, RunFacts) else None
    if audit is None:
        return
    if audit.delta != report.facts.delta:
        yield Problem("audit.delta", audit.delta, report.facts.delta)
    places, known = Counter(bound.site for bound in audit.bounds), {None, *(site.site for site in report.sites)}
    if twice := [site for site, count in places.items() if count > 1 or site not in known]:
        yield Problem("audit.bounds", twice, "at most one bound for each site of the report")
    spent = _map_epsilon_by_place(audit, report.sites)
    for number, bound in enumerate(audit.bounds):
        where, most, claim = f"audit.bounds.{number}", spent.get(bound.site), bound.claimed_epsilon
        if exceeds_cap(claim, most):
            yield Problem(f"{where}.claimed_epsilon", claim, f"at most {most}, the charged epsilon")
    yield from find_wrong_audit_bounds(audit)
    if not audit.exceeded and list_refuted_bounds(audit, report.sites):
        yield Problem("audit.exceeded", False, True)
