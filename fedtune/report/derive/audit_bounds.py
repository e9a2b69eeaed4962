"""An audit's findings: their file `audit.json`, the verdicts that follow from them, and whether they add up."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from fedtune.codec import decode, parse_json
from fedtune.evaluation import audit_bound
from fedtune.federation.run_folder import RunFolder
from fedtune.report.derive.profile import claimed
from fedtune.report.derive.verdicts import verdict_of
from fedtune.report.facts import Audit, AuditBound
from fedtune.report.model import Problem, Report, SiteReport
from fedtune.spec import RUN_SCHEMA, RunError

_MOST_CANARIES = 10**6
_MOST_EPSILON = 1e3  # far more than that many canaries can show
_LAST_DIGITS = 5e-6  # where a search for a bound may end on another machine


def read_audit(folder: Path) -> Audit | None:
    """The findings of an audit of the run, or a RunError if they are damaged; None: none was finished."""
    path = RunFolder(folder).audit
    if not path.is_file():
        return None
    try:
        fields = parse_json(path.read_bytes(), key=str(path), bound="must be an object")
        if fields.pop("schema_version", None) != RUN_SCHEMA:
            raise ValueError("schema_version")
        return decode(Audit, fields)
    except (OSError, ValueError) as error:
        raise RunError(f"{path} is damaged: what the audit found is not known") from error


def judged(sites: Sequence[SiteReport], audit: Audit | None, *, marked: bool) -> tuple[SiteReport, ...]:
    """The sites, with no guarantee where the audit refutes the claim, or has begun (`marked`) and found nothing yet."""
    if audit is None:
        return tuple(_nothing_promised(site, "holds_canaries") if marked else site for site in sites)
    places = {bound.site for bound in refuted(audit, sites)}
    # A bound over all sites together denies each site's claim.
    everywhere = None in places or (audit.exceeded and not places)
    made: list[SiteReport] = []
    for site in sites:
        if everywhere or site.site in places:
            site = _nothing_promised(site, "refuted_by_audit")
        elif site.verdict.state != "no_guarantee":
            # Canaries are records, each at the same cost; but the verdict alone must tell what the adapter holds.
            site = replace(site, verdict=replace(site.verdict, reasons=(*site.verdict.reasons, "audited")))
        made.append(site)
    return tuple(made)


def refuted(audit: Audit, sites: Iterable[SiteReport] = ()) -> tuple[AuditBound, ...]:
    """The bounds whose claim the counts refute; where one of the `sites` claims less than the audit says, that counts.

    All bounds are judged at once, so each is asked for more confidence than it has by itself.
    """
    spent, found = charged(audit, sites), list[AuditBound]()
    errors = audit_bound.allowed_errors(audit.confidence, [bound.site for bound in audit.bounds])
    for bound, error in zip(audit.bounds, errors, strict=True):
        # In this order what is no number is passed over.
        claim, counts = min(spent.get(bound.site, math.inf), bound.claimed_epsilon), _counts(bound)
        if not 0 <= claim < _MOST_EPSILON:
            is_refuted = not claim >= _MOST_EPSILON
        elif counts is None:
            is_refuted = not bound.lower_bound <= claim
        else:
            is_refuted = audit_bound.p_value(*counts, epsilon=claim, delta=audit.delta) < error
        found += [bound] if is_refuted else []
    return tuple(found)


def charged(audit: Audit, sites: Iterable[SiteReport]) -> dict[str | None, float]:
    """Place -> epsilon of the report, as far as it has one: for all audited sites together, the largest of theirs."""
    audited = {bound.site for bound in audit.bounds if bound.site}
    spent = {site.site: claimed(site.spent) for site in sites if site.spent}
    known: dict[str | None, float] = {site: epsilon for site, epsilon in spent.items() if epsilon is not None}
    together = [spent[site] for site in spent if site in audited or not audited]
    epsilons = [epsilon for epsilon in together if epsilon is not None]
    return known if len(epsilons) < len(together) or not epsilons else known | {None: max(epsilons)}


def _counts(bound: AuditBound) -> tuple[int, int, int] | None:
    """Canaries, guesses and right ones; None: no bound can be computed from these."""
    possible = 0 <= bound.right <= bound.guesses <= bound.canaries <= _MOST_CANARIES
    return (bound.canaries, bound.guesses, bound.right) if possible else None


def _nothing_promised(site: SiteReport, why: str) -> SiteReport:
    return replace(site, verdict=verdict_of([*site.verdict.reasons, why]), meaning=None)


def audit_problems(report: Report) -> Iterator[Problem]:
    """Every figure of the report's audit that is not what its counts come to, or not what the report claims."""
    audit = report.audit
    if audit is None:
        return
    if audit.delta != report.delta:
        yield Problem("audit.delta", audit.delta, report.delta)
    if not audit_bound.LEAST_CONFIDENCE <= audit.confidence < 1:
        yield Problem("audit.confidence", audit.confidence, f"a number from {audit_bound.LEAST_CONFIDENCE} to 1")
        return
    places, known = Counter(bound.site for bound in audit.bounds), {None, *(site.site for site in report.sites)}
    if twice := [site for site, count in places.items() if count > 1 or site not in known]:
        yield Problem("audit.bounds", twice, "each site of the report once at most")
    spent = charged(audit, report.sites)
    for number, bound in enumerate(audit.bounds):
        where, most, claim = f"audit.bounds.{number}", spent.get(bound.site), bound.claimed_epsilon
        if _counts(bound) is None:
            said = f"{bound.right} of {bound.guesses} of {bound.canaries}"
            yield Problem(f"{where}.right", said, "no more right than guessed, and no more guesses than canaries")
            continue
        if not 0 <= claim < math.inf or (most is not None and claim > most * (1 + 1e-9)):
            yield Problem(f"{where}.claimed_epsilon", claim, f"at most {most}, which was charged")
        for key, right in (("lower_bound", bound.right), ("best_possible", bound.guesses)):
            counts = bound.canaries, bound.guesses, right
            found = audit_bound.epsilon_lower_bound(*counts, delta=audit.delta, confidence=audit.confidence)
            if not abs(getattr(bound, key) - found) <= _LAST_DIGITS * max(1.0, found):
                yield Problem(f"{where}.{key}", getattr(bound, key), found)
    if not audit.exceeded and refuted(audit, report.sites):
        yield Problem("audit.exceeded", False, True)
