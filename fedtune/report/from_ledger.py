"""The report of a ledger: one site's own view over all runs and years, from events that were verified."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from fedtune.privacy.accountant import NEIGHBOURING_RELATION
from fedtune.privacy.ledger.chain import Kind
from fedtune.privacy.ledger.history import History
from fedtune.privacy.ledger.spending import spending
from fedtune.privacy.proposal import UNVERIFIED
from fedtune.report.derive import assumptions, cells, codes
from fedtune.report.derive.ledger_site import day_of, site_report
from fedtune.report.model import Provenance, Report
from fedtune.report.record.ledger_record import LedgerRecord, read_ledger

LEAVES_OUT = tuple(code for code in codes.LEAVES_OUT if code not in ("other_runs", "tuning_trials", "lead_evaluation"))
NOT_PROTECTED = tuple(
    code for code in codes.NOT_PROTECTED if code not in ("lead_files", "model_against_malicious_sites")
)
UNPROTECTED_FIGURES = ("declared_sizes", "times", "counts_of_events")


def build(site_toml_or_ledger: Path, *, anchor: Path | None = None) -> Report:
    """The report of a ledger, as of its newest event.

    Guarantee: it holds nothing of the records but what was released; the records' fingerprints stay in the ledger.  A
    ledger that does not verify gives a report that says so and promises nothing.

    Args:
        site_toml_or_ledger: a `ledger.db`, or a `site.toml`, whose key and anchor are then used too.
        anchor: file that shows that no event is missing.

    Raises:
        ConfigError: there is no such file, or the files do not belong together.
        RunError: the ledger cannot be read at all.
    """
    record = read_ledger(site_toml_or_ledger, anchor=anchor)
    history, provenance = record.history, _provenance(record)
    site, facts = site_report(record, spending(history, record.now))
    report = Report(
        kind="ledger",
        name=f"{history.opened.site} {history.opened.population}",
        date=day_of(record.now.isoformat()),
        verdict=site.verdict,
        unit=history.opened.unit,
        neighbouring_relation=NEIGHBOURING_RELATION.name.lower(),
        delta=history.delta,
        epsilon=site.spent.epsilon if site.spent else None,
        target_epsilon=None,
        seeded_noise=history.seeded,
        randomness=_randomness(history),
        released=tuple(_released(record)),
        sites=(site,),
        covers=tuple(_covers(history)),
        leaves_out=LEAVES_OUT,
        not_protected=codes.of_unit(NOT_PROTECTED, history.opened.unit),
        unprotected_figures=UNPROTECTED_FIGURES,
        assumptions=assumptions.ordered(assumptions.of_ledger(facts, site)),
        cells=(),
        provenance=provenance,
    )
    return replace(report, cells=cells.rows(cells.of_ledger(record, provenance) | cells.of_report(report)))


def _released(record: LedgerRecord) -> Iterator[str]:
    kinds = {event.kind for event in record.events}
    plans = [run.plan for run in record.history.runs.values()]
    if Kind.COMMIT in kinds:
        yield "updates"
    yield from codes.statistics_of(plans)
    yield "refusals_and_receipts"


def _covers(history: History) -> Iterator[str]:
    yield from ("rounds_and_steps", "charged_retries")
    yield from codes.statistics_of(run.plan for run in history.runs.values())
    yield from ("all_runs", "tuning_trials")
    if history.restored:
        yield "lost_branches"


def _randomness(history: History) -> str:
    """Of all runs: the worst source."""
    if history.seeded:
        return "seeded"
    plans = [run.plan for run in history.runs.values()]
    return "none" if plans and not all(plan.private for plan in plans) else "operating_system"


def _provenance(record: LedgerRecord) -> Provenance:
    """What the events name; the machine that they came about on is not among it."""
    proposals = [run.proposal for run in record.history.runs.values()]
    models = {proposal.base_model for proposal in proposals}
    return Provenance(
        fedtune_version=" / ".join(dict.fromkeys(event.code for event in record.events)),
        config_sha256=None,
        model=None,
        model_sha256=models.pop() if len(models) == 1 and models != {UNVERIFIED} else None,
        model_licence=None,
        dataset=", ".join(dataset.id for dataset in record.policy.dataset),
        task=", ".join(dict.fromkeys(proposal.task for proposal in proposals)) or None,
        libraries={},
        python=None,
        machine=None,
    )
