"""The report of a run: what its lead can show, from the run folder, and what sites chose to release beside it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from fedtune.federation.results import FinalResult
from fedtune.federation.run_folder import RunFolder
from fedtune.privacy.accountant import NEIGHBOURING_RELATION
from fedtune.report import assumptions, cells, codes, facts
from fedtune.report.audit_record import Audit, judged, read_audit
from fedtune.report.mechanisms import largest
from fedtune.report.model import Provenance, Report, RoundCost, Utility, finite
from fedtune.report.run_record import RunRecord, read_run
from fedtune.report.run_site import Charged, epsilon_by_round, site_report
from fedtune.report.site_model import SiteReport
from fedtune.report.site_reports import by_site, joined, released_in
from fedtune.report.verdicts import worst
from fedtune.sites.environment import Environment
from fedtune.spec import RunError

LEAVES_OUT = tuple(code for code in codes.LEAVES_OUT if code != "other_ledgers")


def build(folder: Path, *, site_reports: Sequence[Report] = ()) -> Report:
    """The report of the run in `folder`, finished or not.

    Args:
        folder: the run's.
        site_reports: signed ones that sites released, beside those in the folder's `site_reports/`.

    Raises:
        ConfigError: the folder holds no run, its files belong to different runs, or a site report does not belong here.
        RunError: what it holds is damaged.
    """
    record = read_run(folder)
    audit, marked = read_audit(folder), RunFolder(folder).audit_mark.exists()
    if audit is not None and audit.delta != record.plan.delta:
        raise RunError(f"{RunFolder(folder).audit} is of another run: its delta is {audit.delta:g}")
    sites = judged(_sites(record, [*released_in(folder), *site_reports]), audit, marked=marked)
    provenance, released, date = _provenance(record), tuple(_released(record)), _date(record)
    randomness = _randomness(record, sites)
    known = facts.of_run(record, sites, provenance) | facts.of_report(
        released=released,
        randomness=randomness,
        not_protected=codes.of_unit(codes.NOT_PROTECTED, record.plan.unit),
        date=date,
    )
    return Report(
        kind="run",
        name=record.config.name,
        date=date,
        verdict=worst(site.verdict for site in sites),
        unit=record.plan.unit,
        neighbouring_relation=NEIGHBOURING_RELATION.name.lower(),
        delta=record.plan.delta,
        epsilon=largest(site.spent.epsilon if site.spent else None for site in sites),
        target_epsilon=record.config.privacy.epsilon if record.plan.private else None,
        seeded_noise=record.seeded,
        randomness=randomness,
        released=released,
        sites=sites,
        covers=("rounds_and_steps", "charged_retries", *(("noised_scores",) if record.plan.releases_metrics else ())),
        leaves_out=LEAVES_OUT,
        not_protected=codes.of_unit(codes.NOT_PROTECTED, record.plan.unit),
        unprotected_figures=tuple(_unprotected_figures(sites, audit)),
        assumptions=assumptions.of_run(record, sites),
        cells=cells.rows(known),
        provenance=provenance,
        utility=_utility(record, sites),
        audit=audit,
    )


def _sites(record: RunRecord, released: Iterable[Report]) -> Iterator[SiteReport]:
    own = by_site(record, released)
    sampling = record.environments[-1].sampling if record.environments else None
    for site in record.config.federation.active:
        if site in own:
            yield joined(record, own[site])
        else:
            charged = Charged.by_receipts(record, site)
            yield site_report(record, site, charged, sampling=sampling or codes.NOT_RECORDED)


def _date(record: RunRecord) -> str | None:
    """Of the newest thing on record."""
    times = [result.ended for result in record.rounds if result.ended]
    return max([*times, *(environment.since for environment in record.environments)], default=None)


def _randomness(record: RunRecord, sites: Sequence[SiteReport]) -> str:
    """Where noise and samples came from, as far as somebody who knows has said so."""
    if not record.plan.private:
        return "none"
    if record.seeded:
        return "seeded"
    noted = record.environments[-1].randomness if record.environments else None
    # A site that signed its ledger's report runs fedtune, which draws from the operating system unless it is seeded.
    if noted is None and all(site.source == "signed_site_report" for site in sites):
        return "operating_system"
    return noted or codes.NOT_RECORDED


def _released(record: RunRecord) -> Iterator[str]:
    yield "updates"
    if record.plan.releases_metrics:
        yield "noised_scores"
    yield from ("aggregates", "refusals_and_receipts")
    if record.finished:
        yield "final_adapter"


def _unprotected_figures(sites: Sequence[SiteReport], audit: Audit | None) -> Iterator[str]:
    """Exact figures of this report: a joined site's count of entries, and how an attack did on records trained on."""
    there = {
        "attack_on_real_records": audit is not None and bool(audit.membership),
        "counts_of_events": any(site.verification for site in sites),
    }
    yield from (code for code in codes.UNPROTECTED_FIGURES if there.get(code, True))


def _provenance(record: RunRecord) -> Provenance:
    config, environments = record.config, record.environments
    return Provenance(
        fedtune_version=_version(record),
        config_sha256=record.config_sha256,
        model=_model_name(config.model.path),
        model_sha256=_one(environment.model_sha256 for environment in environments) or config.model.sha256,
        model_licence=config.model.licence,
        dataset=config.data.dataset,
        task=config.task,
        libraries=_libraries(environments),
        python=_one(environment.python for environment in environments),
        machine=_one(f"{one.system} {one.machine}, {one.device}" for one in environments),
    )


def _version(record: RunRecord) -> str:
    noted = _one(environment.fedtune_version for environment in record.environments)
    return noted or (record.result.fedtune_version if record.result else "") or codes.NOT_RECORDED


def _model_name(path: str) -> str:
    """Without the folder on the lead's machine."""
    return Path(path).name if path.startswith(("/", "~", ".")) else path


def _libraries(environments: Sequence[Environment]) -> dict[str, str]:
    names = dict.fromkeys(name for environment in environments for name in environment.libraries)
    found = {name: _one(one.libraries[name] for one in environments if name in one.libraries) for name in names}
    return {name: version for name, version in found.items() if version}


def _one(values: Iterable[str]) -> str | None:
    """What all parts of a run had in common, or in order what they had."""
    return " / ".join(dict.fromkeys(values)) or None


def _utility(record: RunRecord, sites: Sequence[SiteReport]) -> Utility:
    epsilons, final = epsilon_by_round(sites), record.result.final if record.result else FinalResult(metrics={})
    before = record.state.metrics_before if record.state else final.metrics_before
    return Utility(
        before=finite(before),
        final=finite(final.metrics),
        non_private=None,
        rounds=tuple(
            RoundCost(
                round=result.round,
                sites=result.sites,
                failed_sites=dict(result.failed_sites),
                seconds=result.seconds,
                bytes_down=result.bytes_down,
                bytes_up=result.bytes_up,
                scores=finite(result.metrics),
                epsilon=epsilons[result.round],
            )
            for result in record.rounds
        ),
    )
