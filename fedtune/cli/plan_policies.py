"""What sites' policies would say to a plan, as sentences and tables."""

from __future__ import annotations

import math

from fedtune.cli.plain_words import counted, printable, reason_text
from fedtune.cli.plan_outlook import Outlook
from fedtune.cli.plan_words import Section
from fedtune.federation.verdict import Verdict
from fedtune.privacy.accountant import epsilon_text


def policies(outlook: Outlook) -> list[Section]:
    """What each site would say."""
    return [_policy(verdict, outlook) for verdict in outlook.verdicts]


def _policy(verdict: Verdict, outlook: Outlook) -> Section:
    rows = tuple(
        (
            f"{reason_text(one.rule)} ({one.rule})",
            printable(one.asked or "-", 40),
            printable(one.allowed or "-", 60),
        )
        for one in verdict.broken
    )
    answer = "would accept the run" if verdict.allowed else "would refuse the run"
    lead = f"Asked by lead {verdict.lead[:16]}..."
    notes = [f"{lead} (assumed: --lead was not given)." if outlook.lead_assumed else f"{lead}"]
    if verdict.taken is not None and verdict.would_be is not None:
        notes.append(_budget(verdict))
    if rows:
        notes.append(_remedy(verdict))
    if verdict.note:
        notes.append(f"Note: {verdict.note}.")
    return Section(
        title=f"{verdict.site} {answer} ({verdict.policy})",
        headings=("broken rule", "asked for", "allowed"),
        rows=rows,
        words=frozenset({0, 1, 2}),
        notes=tuple(notes),
    )


def _budget(verdict: Verdict) -> str:
    """How much of the lifetime budget is taken."""
    of = "no lifetime cap" if math.isinf(verdict.max_epsilon) else f"a lifetime cap of {verdict.max_epsilon:g}"
    ledger = "Its ledger" if verdict.ledger == "read" else "No ledger beside the policy; a new one"
    left = "" if verdict.runs_left is None else f" Room for {counted(verdict.runs_left, 'run')} like this one."
    taken, would_be = epsilon_text(verdict.taken), epsilon_text(verdict.would_be)
    return f"{ledger}: epsilon {taken} taken, {would_be} with this run, by the filter; {of}.{left}"


def _remedy(verdict: Verdict) -> str:
    """What would be accepted instead."""
    ways = []
    if verdict.most_rounds:
        ways.append(counted(verdict.most_rounds, "round"))
    if verdict.least_noise is not None:
        ways.append(f"noise multiplier {verdict.least_noise:g}")
    if not ways:
        return "Neither fewer rounds nor more noise alone would be accepted."
    return f"Would be accepted: {' or '.join(ways)}, all else as planned."
