"""The report of a run: what its lead can show, from the run folder, and what sites chose to release beside it.

A site may sign a report of its own ledger and give it to the lead.  Its word is worth what its signature is, and no
more than the receipts that it gave before.  Such a report is checked by itself before it is joined, because the figures
over all runs cannot be computed again from what is joined.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from fedtune.federation.results import FinalResult
from fedtune.federation.run_folder import RunFolder
from fedtune.privacy.accountant import NEIGHBOURING_RELATION
from fedtune.report import recompute, signing
from fedtune.report.derive import assumptions, cells, codes, verdicts
from fedtune.report.derive.audit_bounds import judged, read_audit
from fedtune.report.derive.facts import RunFacts
from fedtune.report.derive.profile import largest
from fedtune.report.derive.run_site import Charged, epsilon_by_round, site_report
from fedtune.report.model import (
    Audit,
    LifetimeRun,
    Provenance,
    Report,
    RoundCost,
    SiteReport,
    Utility,
    Verdict,
)
from fedtune.report.record.run_record import RunRecord, read_run
from fedtune.sites.environment import Environment
from fedtune.spec import ConfigError, RunError
from fedtune.words import finite_scores

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
    plan, provenance = record.plan, _provenance(record)
    report = Report(
        kind="run",
        name=record.config.name,
        date=_date(record),
        verdict=verdicts.worst(site.verdict for site in sites),
        unit=plan.unit,
        neighbouring_relation=NEIGHBOURING_RELATION.name.lower(),
        delta=plan.delta,
        epsilon=largest(site.spent.epsilon if site.spent else None for site in sites),
        target_epsilon=record.config.privacy.epsilon if plan.private else None,
        seeded_noise=record.seeded,
        randomness=_randomness(record, sites),
        released=tuple(_released(record)),
        sites=sites,
        covers=("rounds_and_steps", "charged_retries", *codes.statistics_of([plan])),
        leaves_out=LEAVES_OUT,
        not_protected=codes.of_unit(codes.NOT_PROTECTED, plan.unit),
        unprotected_figures=tuple(_unprotected_figures(sites, audit)),
        assumptions=assumptions.ordered(assumptions.of_run(RunFacts.of_record(record), sites)),
        cells=(),
        provenance=provenance,
        utility=_utility(record, sites),
        audit=audit,
    )
    return replace(report, cells=cells.rows(cells.of_run(record, provenance) | cells.of_report(report)))


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
    yield from codes.statistics_of([record.plan])
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
        before=finite_scores(before),
        final=finite_scores(final.metrics),
        non_private=None,
        rounds=tuple(
            RoundCost(
                round=result.round,
                sites=result.sites,
                failed_sites=dict(result.failed_sites),
                seconds=result.seconds,
                bytes_down=result.bytes_down,
                bytes_up=result.bytes_up,
                scores=finite_scores(result.metrics),
                epsilon=epsilons[result.round],
            )
            for result in record.rounds
        ),
    )


def read_site_report(path: Path) -> Report:
    """The report in the file `path`; who signed it is checked when it is joined.

    Raises:
        ConfigError: the file cannot be read, or holds no report.
    """
    try:
        return signing.read(path.read_bytes())
    except OSError as error:
        raise ConfigError("site report", str(path), f"must be a readable file ({error.strerror})") from None
    except ConfigError as error:
        raise error.in_file(path) from None


def released_in(folder: Path) -> tuple[Report, ...]:
    """The reports that lie in a run folder.

    Raises:
        ConfigError: a file there is no report.
    """
    return tuple(read_site_report(path) for path in sorted(RunFolder(folder).site_reports.glob("*.json")))


def by_site(record: RunRecord, reports: Iterable[Report]) -> Mapping[str, Report]:
    """Site -> its report, each one checked.

    Guarantee: each was made, and signed, by whoever holds the key under which the site gave this run its receipts, and
    is about a ledger that knows the run, unless the receipts say that nothing was charged to it.  Its figures follow
    from its own events, and it is no older than the run's newest receipt; whether there is a newer one, only the site
    knows.

    Raises:
        ConfigError: a report is about something else, is not signed so, or a site has two different ones.
    """
    found: dict[str, Report] = {}
    for report in reports:
        site = _checked(record, report).site
        if found.setdefault(site, report) != report:
            raise _refused(report, f"must be the only report of {site}: it gave another one, too")
    return found


def joined(record: RunRecord, report: Report) -> SiteReport:
    """What a run's report says of a site that released its own."""
    own, run = report.sites[0], _this_run(record, report)
    sampling = next((one.sampling_run for one in own.mechanisms if one.run == record.run), codes.NOT_RECORDED)
    made = site_report(record, own.site, _charged(record, own.site, run), sampling=sampling)
    disagrees = _disagrees(record, report, run)
    words = [made.verdict, own.verdict]
    if disagrees:
        words.append(Verdict(state="no_guarantee", reasons=("site_report_disagrees",)))
    return replace(
        made,
        verdict=verdicts.worst(words),
        meaning=None if verdicts.worst(words).state == "no_guarantee" else made.meaning,
        approved=own.approved,
        left=own.left,
        lifetime=own.lifetime,
        verification=own.verification,
        releases=tuple(release for release in own.releases if release.run == record.run),
        asserted=own.asserted,
        reported=report.date[:10] if report.date else None,
    )


def _charged(record: RunRecord, site: str, run: LifetimeRun | None) -> Charged:
    """The larger of both words, unless the ledger can charge nothing more to the run: then its own."""
    rounds, upper_bound = record.charged(site)
    if run and upper_bound and run.state != "open":
        rounds, upper_bound = _by_receipt(record, site), False
    return Charged(rounds=max(rounds, run.rounds if run else 0), upper_bound=upper_bound, source="signed_site_report")


def _by_receipt(record: RunRecord, site: str) -> int:
    """Rounds that the site signed for; no fewer than the updates that it gave."""
    receipt = record.receipts.get(site)
    return max(record.updates(site), receipt.charged_rounds if receipt else 0)


def _disagrees(record: RunRecord, report: Report, run: LifetimeRun | None) -> bool:
    """Whether the report says less than the site's receipts, or something else than what the run asked for."""
    if run is None:
        return False
    plan, own = record.plan, report.sites[0]
    if run.rounds < _by_receipt(record, own.site) or run.seeded_noise != record.seeded:
        return True
    if (report.unit, report.delta, run.most_rounds) != (plan.unit, plan.delta, plan.most_rounds):
        return True
    keys = ("sampling_rate", "noise_multiplier", "local_steps", "metrics_noise_multiplier", "records_per_user")
    ran = [mechanism for mechanism in own.mechanisms if mechanism.run == record.run]
    return any(getattr(mechanism, key) != getattr(plan, key) for mechanism in ran for key in keys)


def _this_run(record: RunRecord, report: Report) -> LifetimeRun | None:
    """The run in the site's ledger; None: the site refused all of it."""
    own = report.sites[0]
    if own.lifetime is None:
        raise _refused(report, "must hold the ledger's figures over all its runs")
    known = next((run for run in own.lifetime.runs if run.run == record.run), None)
    if known is None and _by_receipt(record, own.site):
        raise _refused(report, f"must be of a ledger that knows the run {record.run}")
    return known


def _checked(record: RunRecord, report: Report) -> SiteReport:
    if report.kind != "ledger" or len(report.sites) != 1:
        raise _refused(report, "must be a site's report of its own ledger")
    (own,) = report.sites
    _require_site(record.config.federation.active, report, own.site)
    receipt = record.receipts.get(own.site)
    if receipt is None:
        raise _refused(report, f"cannot be checked: {own.site} gave this run no receipt, so its key is not known")
    try:
        key = signing.check(report)
    except RunError as error:
        raise _refused(report, f"must carry its site's signature: {error}") from None
    if key != receipt.site_key:
        by = f"is signed by {key}" if key else "is not signed"
        raise _refused(report, f"must be signed by {receipt.site_key}, as the receipts of {own.site} are; it {by}")
    _this_run(record, report)
    if own.verification is not None and own.verification.num_events < receipt.sequence:
        had = f"{own.verification.num_events} entries, and the site's receipt was given at entry {receipt.sequence}"
        raise _refused(report, f"must be no older than this run: its ledger had {had}")
    if found := recompute.problems(report):
        first = found[0]
        raise _refused(report, f"must agree with itself: {first.where} says {first.said}, found {first.found}")
    return own


def _require_site(sites: Sequence[str], report: Report, site: str) -> None:
    if site not in sites:
        raise _refused(report, f"must be about a site of this run ({', '.join(sites)}), not {site}")


def _refused(report: Report, bound: str) -> ConfigError:
    return ConfigError("site report", report.name, bound)
