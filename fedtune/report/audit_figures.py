"""An audit's bounds in a report, computed again from their counts and compared with the rest of the report."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator

from fedtune.report import one_run
from fedtune.report.audit_record import Audit, AuditBound, can_be_counts, charged, refuted
from fedtune.report.contradictions import Problem
from fedtune.report.model import Report

_LAST_DIGITS = 5e-6
"""Where a search for a bound may end on another machine."""


def audit_problems(report: Report) -> Iterator[Problem]:
    """Every figure of the report's audit that is not what its counts come to, or not what the report claims."""
    audit = report.audit
    if audit is None:
        return
    if audit.delta != report.delta:
        yield Problem("audit.delta", audit.delta, report.delta)
    if not one_run.LEAST_CONFIDENCE <= audit.confidence < 1:
        yield Problem("audit.confidence", audit.confidence, f"a number from {one_run.LEAST_CONFIDENCE} to 1")
        return
    places, known = Counter(bound.site for bound in audit.bounds), {None, *(site.site for site in report.sites)}
    if twice := [site for site, count in places.items() if count > 1 or site not in known]:
        yield Problem("audit.bounds", twice, "each site of the report once at most")
    spent = charged(audit, report.sites)
    for number, bound in enumerate(audit.bounds):
        for key, said, found in _of_bound(audit, bound, spent.get(bound.site)):
            yield Problem(f"audit.bounds.{number}.{key}", said, found)
    if not audit.exceeded and refuted(audit, report.sites):
        yield Problem("audit.exceeded", False, True)


def _of_bound(audit: Audit, bound: AuditBound, spent: float | None) -> Iterator[Problem]:
    if not can_be_counts(bound):
        counts = f"{bound.right} of {bound.guesses} of {bound.canaries}"
        yield Problem("right", counts, "no more right than guessed, and no more guesses than canaries")
        return
    charged_most = math.inf if spent is None else spent * (1 + 1e-9)
    if not (0 <= bound.claimed_epsilon <= charged_most and math.isfinite(bound.claimed_epsilon)):
        yield Problem("claimed_epsilon", bound.claimed_epsilon, f"at most {spent}, which was charged")
    for key, right in (("lower_bound", bound.right), ("best_possible", bound.guesses)):
        found = one_run.epsilon_lower_bound(
            bound.canaries, bound.guesses, right, delta=audit.delta, confidence=audit.confidence
        )
        if not abs(getattr(bound, key) - found) <= _LAST_DIGITS * max(1.0, found):
            yield Problem(key, getattr(bound, key), found)
