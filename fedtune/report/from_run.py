"""The report of a run: what its lead can show, from the run folder, and what sites chose to release beside it.

A site may sign a report of its own ledger and give it to the lead.  Its word is worth what its signature is, and no
more than the receipts that it gave before.  Such a report is checked by itself before it is joined, because the figures
over all runs cannot be computed again from what is joined.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from fedtune.federation.lead import RoundResult
from fedtune.federation.replies import BEYOND_PLAN, INVALID_UPDATE, LEFT_OUT, NO_REPLY, UNSIGNED_REPLY
from fedtune.federation.run_folder import RunFolder
from fedtune.privacy import accountant
from fedtune.privacy.run_plan import Plan
from fedtune.report import recompute, signing
from fedtune.report.derive import cells, profile, reliance, verdicts
from fedtune.report.derive.audit_bounds import judged, read_audit
from fedtune.report.derive.facts import NOT_RECORDED, RunFacts, differing
from fedtune.report.derive.profile import charged_events, largest, mechanism_of
from fedtune.report.derive.rules import report_of
from fedtune.report.model import (
    LifetimeRun,
    Release,
    Report,
    RoundCost,
    SiteReport,
    Source,
    Spent,
    Step,
    Utility,
    Verdict,
)
from fedtune.report.record.run_record import RunRecord, read_run
from fedtune.runs.results import FinalResult, charged_epsilons
from fedtune.spec import ConfigError, RunError
from fedtune.words import finite, finite_scores

_MOST_FIGURES = 64
"""Different numbers of rounds for which epsilon is computed; in between, that of the next larger one is shown."""


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
    return of_record(folder, record, own=by_site(record, [*released_in(folder), *site_reports]))


def of_record(folder: Path, record: RunRecord, *, own: Mapping[str, Report]) -> Report:
    """The report of a run that may be under way.

    Args:
        folder: the run's, which says whether an attack on it was planned, and what came of it.
        record: of the folder.
        own: site -> the report that it released, checked.

    Raises:
        RunError: the findings of the attack are damaged, or of another run.
    """
    audit, marked = read_audit(folder), RunFolder(folder).audit_mark.exists()
    if audit is not None and audit.delta != record.plan.delta:
        raise RunError(f"{RunFolder(folder).audit} is of another run: its delta is {audit.delta:g}")
    facts = RunFacts.of_record(record)
    made = (
        joined(record, own[site], facts) if site in own else _from_receipts(record, site, facts)
        for site in record.config.federation.active
    )
    sites = judged(made, audit, marked=marked)
    known = cells.of_run(record, facts.provenance)
    return report_of(facts, sites, known=known, utility=_utility(record, sites), audit=audit)


def _from_receipts(record: RunRecord, site: str, facts: RunFacts) -> SiteReport:
    """A site as the lead knows it."""
    rounds, upper_bound = record.charged(site)
    source: Source = "charged_by_receipts" if site in record.receipts else "not_released"
    charged = Charged(rounds=rounds, upper_bound=upper_bound, source="run_record" if record.state is None else source)
    return site_report(record, site, charged, facts, sampling=facts.sampling or NOT_RECORDED)


def _utility(record: RunRecord, sites: Sequence[SiteReport]) -> Utility:
    epsilons, final = epsilon_by_round(sites), record.result.final if record.result else FinalResult(metrics={})
    before = record.state.metrics_before if record.state else final.metrics_before
    return Utility(
        before=finite_scores(before),
        final=finite_scores(final.metrics),
        non_private=None,
        findings=final.findings,
        energy=final.energy,
        detail=final.detail,
        kept=record.kept,
        selection=record.selection,
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


def joined(record: RunRecord, report: Report, facts: RunFacts) -> SiteReport:
    """What a run's report says of a site that released its own."""
    own, run = report.sites[0], _this_run(record, report)
    sampling = next((one.sampling_run for one in own.mechanisms if one.run == record.run), NOT_RECORDED)
    made = site_report(record, own.site, _charged(record, own.site, run), facts, sampling=sampling)
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
    return any(True for row in own.mechanisms if row.run == record.run for _ in differing(row, plan))


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
    if own.site not in (sites := record.config.federation.active):
        raise _refused(report, f"must be about a site of this run ({', '.join(sites)}), not {own.site}")
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


def _refused(report: Report, bound: str) -> ConfigError:
    return ConfigError("site report", report.name, bound)


@dataclass(frozen=True, kw_only=True, slots=True)
class Charged:
    """What was charged to a run at one site.

    Attributes:
        rounds: retries included.
        upper_bound: the site fell silent, and every round asked of it is counted.
        source: who says so.
    """

    rounds: int
    upper_bound: bool
    source: Source


def site_report(record: RunRecord, site: str, charged: Charged, facts: RunFacts, *, sampling: str) -> SiteReport:
    """One site of a run.

    Args:
        record: of the run.
        site: its name.
        charged: to the run at that site.
        facts: of the run.
        sampling: how units really joined its steps, or "not_recorded".
    """
    plan, grid = record.plan, profile.interval_of(charged.source)
    mechanisms = charged_events(plan, charged.rounds)
    rows = [mechanism_of(plan, run=record.run, rounds=charged.rounds, sampling=sampling)] if charged.rounds else []
    made = SiteReport(
        site=site,
        source=charged.source,
        verdict=Verdict(state="within"),
        declared_size=record.config.declared_sizes()[site],
        approved=None,
        spent=_spent(plan, charged, ended_by_scores=facts.ended_by_scores),
        left=None,
        meaning=None,
        mechanisms=tuple(rows),
        curve=profile.curve(mechanisms, profile.curve_deltas(plan.delta)) if mechanisms else (),
        steps=tuple(_steps(record, site, charged.rounds)),
        releases=tuple(_releases(record, site)),
        by_trust=reliance.by_trust(
            # What scores ended claims its whole plan.
            [replace(row, rounds=plan.most_rounds) for row in rows] if facts.ended_by_scores else rows,
            lambda spent: profile.epsilon_pld(spent, plan.delta, interval=grid),
        ),
    )
    return verdicts.judged(made, verdicts.of_run(made, facts), charged=mechanisms, delta=plan.delta)


def epsilon_by_round(sites: Iterable[SiteReport]) -> dict[int, float | None]:
    """Round -> the worst site's epsilon after it."""
    worst: dict[int, list[float | None]] = {}
    for site in sites:
        for step in site.steps:
            worst.setdefault(step.round or 0, []).append(step.epsilon)
    return {number: largest(values) for number, values in worst.items()}


def _spent(plan: Plan, charged: Charged, *, ended_by_scores: bool) -> Spent:
    mechanisms, grid = charged_events(plan, charged.rounds), profile.interval_of(charged.source)
    by_pld = profile.epsilon_pld(mechanisms, plan.delta, interval=grid)
    return Spent(
        epsilon=by_pld,
        epsilon_pld=by_pld,
        epsilon_rdp=profile.epsilon_rdp(mechanisms, plan.delta),
        planned_epsilon=profile.epsilon_pld([plan.whole], plan.delta, interval=grid),
        upper_bound=charged.upper_bound,
        rounds=charged.rounds,
        steps=charged.rounds * plan.local_steps,
        ended_by_scores=ended_by_scores and charged.rounds > 0,
    )


def _steps(record: RunRecord, site: str, charged: int) -> Iterator[Step]:
    """Epsilon after each round: at most all that was charged, but for one round for each later update of the site."""
    took_part = [site in result.sites for result in record.rounds]
    for index, result in enumerate(record.rounds):
        so_far = max(0, charged - sum(took_part[index + 1 :]))
        yield Step(
            run=record.run,
            round=result.round,
            time=result.ended or None,
            epsilon=_epsilon_after(record.plan, so_far, charged),
        )


def _epsilon_after(plan: Plan, rounds: int, charged: int) -> float | None:
    every = math.ceil(charged / _MOST_FIGURES) or 1
    shown = min(charged, math.ceil(rounds / every) * every)
    final = charged_epsilons(plan, charged)[0]
    return finite(final if shown == charged else min(final, _coarse_epsilon(plan, shown)))


@lru_cache(maxsize=256)
def _coarse_epsilon(plan: Plan, rounds: int) -> float:
    """Never less than on the fine grid, and several times faster."""
    if rounds == 0:
        return 0.0
    return accountant.epsilon_pld([plan.event(rounds=rounds)], plan.delta, interval=accountant.COARSE)


def _releases(record: RunRecord, site: str) -> Iterator[Release]:
    """What came from a site over all rounds, by kind and reason."""
    groups: dict[tuple[str, str | None], list[RoundResult]] = {}
    for result in record.rounds:
        if (what := _what_came(result, site)) is not None:
            groups.setdefault(what, []).append(result)
    for (kind, reason), results in groups.items():
        times = [result.ended for result in results if result.ended]
        yield Release(
            kind=kind,
            run=record.run,
            reason=reason,
            count=len(results),
            first=min(times, default=None),
            last=max(times, default=None),
        )
    receipt = record.receipts.get(site)
    came = Counter({kind: len(results) for (kind, _), results in groups.items()})["update"]
    if receipt and receipt.charged_rounds > came:
        without = receipt.charged_rounds - came
        yield Release(
            kind="reservation_without_update", run=record.run, reason=None, count=without, first=None, last=None
        )


def _what_came(result: RoundResult, site: str) -> tuple[str, str | None] | None:
    """Kind and reason; None where the site was not asked."""
    if site in result.sites:
        return "update", None
    match result.failed_sites.get(site):
        case reason if reason in (None, LEFT_OUT):
            return None
        case reason if reason in (NO_REPLY, UNSIGNED_REPLY):
            return "no_answer", reason
        case reason if reason in (INVALID_UPDATE, BEYOND_PLAN):
            return "update", reason
        case reason:
            return "refusal", reason
