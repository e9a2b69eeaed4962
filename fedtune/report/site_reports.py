"""Reports that sites made of their own ledgers, signed, and gave to the lead: checked, then joined into its own.

A site's word about its ledger is worth what its signature is, and no more than the receipts that it gave before.  It is
checked by itself, because the figures over all runs cannot be computed again from what is joined.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from fedtune.federation.run_folder import RunFolder
from fedtune.report import recompute, signing
from fedtune.report.codes import NOT_RECORDED
from fedtune.report.model import Report
from fedtune.report.run_record import RunRecord
from fedtune.report.run_site import Charged, site_report
from fedtune.report.site_model import LifetimeRun, SiteReport, Verdict
from fedtune.report.verdicts import worst
from fedtune.spec import ConfigError, RunError


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
    sampling = next((one.sampling_run for one in own.mechanisms if one.run == record.run), NOT_RECORDED)
    made = site_report(record, own.site, _charged(record, own.site, run), sampling=sampling)
    disagrees = _disagrees(record, report, run)
    verdicts = [made.verdict, own.verdict]
    if disagrees:
        verdicts.append(Verdict(state="no_guarantee", reasons=("site_report_disagrees",)))
    return replace(
        made,
        verdict=worst(verdicts),
        meaning=None if worst(verdicts).state == "no_guarantee" else made.meaning,
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
