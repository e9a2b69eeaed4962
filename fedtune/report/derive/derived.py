"""A report from its facts."""

from __future__ import annotations

from dataclasses import replace

from fedtune.report.derive import cells, ledger_figures, profile, run_figures
from fedtune.report.facts import LedgerFacts, RunFacts
from fedtune.report.model import Report


def derive(facts: RunFacts | LedgerFacts) -> Report:
    """The whole report; equal facts give equal bytes on one machine."""
    report = figures_of(facts)
    sites = (replace(site, meaning=profile.as_stated(site.meaning)) for site in report.sites)
    report = replace(report, sites=tuple(sites))
    # Texts, so they are of the figures as they are stated.
    return replace(report, cells=cells.of_report(report))


def figures_of(facts: RunFacts | LedgerFacts) -> Report:
    """The same without cells, and with every digit of what its epsilons mean."""
    return run_figures.report_of(facts) if isinstance(facts, RunFacts) else ledger_figures.report_of(facts)
