"""What a report takes from its source, and what its rules have to know beside its sites' figures.

The builder of a report takes these facts from a run folder or a ledger; who checks a report takes those that its rules
need from the report itself, as favourably as it allows.  The rules are the same for both.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, TypeVar

from fedtune.federation.kept_round import Kept, rounds_in_all
from fedtune.privacy.ledger.chain import Kind
from fedtune.privacy.policy_file import policy_of
from fedtune.privacy.proposal import UNVERIFIED
from fedtune.privacy.release import METRICS
from fedtune.privacy.run_plan import Plan
from fedtune.report.derive import profile
from fedtune.report.model import Mechanism, Problem, Provenance, Report, SiteReport, StartAdapter
from fedtune.report.record.ledger_record import LedgerRecord
from fedtune.runs.environment import UNKNOWN
from fedtune.words import finite

if TYPE_CHECKING:  # it imports torch, which a ledger's report does without
    from fedtune.config import RunConfig
    from fedtune.report.record.run_record import RunRecord

NOT_RECORDED = "not_recorded"
"""For a fact that was not recorded at the time."""
_UPDATES = {False: "updates", True: "masked_updates"}
"""What a site's training releases, by whether it is readable in a secure sum alone."""
_Place = TypeVar("_Place", int, str)
_CALIBRATED = 1e-3
"""Relative; what the noise that two versions find for one target may differ by.  Epsilon differs by as little."""
_LAST_DIGITS = 1e-6


@dataclass(frozen=True, kw_only=True)
class _Facts:
    """Of a run or a ledger; what has a default is evidence, or stands in the report as it is: the builder's alone.

    Attributes:
        date: of the newest thing on record.
        seeded: whether noise came from a seed.
        released: codes of what left the sites, or the lead; `covers` of what the report's epsilon adds up.
    """

    delta: float
    unit: str
    seeded: bool
    name: str = ""
    date: str | None = None
    released: tuple[str, ...] = ()
    covers: tuple[str, ...] = ()
    provenance: Provenance | None = None

    @property
    def program(self) -> str:
        """The fedtune that trained."""
        return f"fedtune {self.provenance.fedtune_version}" if self.provenance else "fedtune"


@dataclass(frozen=True, kw_only=True)
class RunFacts(_Facts):
    """Of a run.

    Attributes:
        target: epsilon that the run was given; None: it promises nothing.
        sampling: how the process that trained says units joined a step; None: nobody noted it.
        randomness: where it says noise came from, likewise.
        inexact: whether the policies of all simulated sites accept inexact gradients; None: not on file.
        finished: whether every round was aggregated, or scores ended the run; `progress` says how many.
        kept: what validation scores decided; None: nothing.
        unchanged: whether `config.yaml` is the one that the run had; `digest` is of the file.
        deployed: whether the sites were real ones.
        doubtful: sites whose receipts are not believed.
        keys: site -> the key of its newest receipt, shortened.
    """

    target: float | None
    private: bool
    sampling: str | None
    randomness: str | None
    inexact: bool | None
    finished: bool
    unchanged: bool
    deployed: bool
    doubtful: tuple[str, ...]
    kept: Kept | None = None
    progress: str = ""
    digest: str = ""
    keys: tuple[tuple[str, str], ...] = ()

    @property
    def ended_by_scores(self) -> bool:
        """Whether validation scores ended the run before its plan did."""
        return self.kept is not None and self.kept.ended_early

    @classmethod
    def of_record(cls, record: RunRecord) -> RunFacts:
        """As the run's folder has them."""
        noted, plan = record.environments[-1] if record.environments else None, record.plan
        statistics = statistics_of([plan])
        times = [result.ended for result in record.rounds if result.ended]
        return cls(
            name=record.config.name,
            date=max([*times, *(environment.since for environment in record.environments)], default=None),
            delta=plan.delta,
            unit=plan.unit,
            released=(
                *(_UPDATES[plan.shared is not None], *statistics, "aggregates", "refusals_and_receipts"),
                *(("final_adapter",) if record.finished else ()),
            ),
            covers=("rounds_and_steps", "charged_retries", *statistics),
            provenance=_provenance_of_run(record),
            target=record.config.privacy.epsilon if plan.private else None,
            private=plan.private,
            seeded=record.seeded,
            sampling=noted.sampling if noted else None,
            randomness=noted.randomness if noted else None,
            inexact=record.inexact_gradients,
            finished=record.finished,
            unchanged=record.config_unchanged,
            deployed=record.deployed,
            doubtful=record.doubtful,
            kept=record.kept,
            progress=f"{len(record.rounds)} / {rounds_in_all(record.rounds, record.config.federation)}",
            digest=record.config.digest(),
            keys=tuple((site, receipt.site_key[:16]) for site, receipt in record.receipts.items()),
        )

    @classmethod
    def of_report(cls, report: Report) -> RunFacts:
        """As favourably as a run's report allows."""
        stated = {one.code for one in report.assumptions}
        rows = [row for site in report.sites for row in site.mechanisms]
        sampled = sorted({row.sampling_run for row in rows} - {NOT_RECORDED})
        doubtful = [site.site for site in report.sites if "receipts_not_believed" in site.verdict.reasons]
        return cls(
            delta=report.delta,
            unit=report.unit,
            target=report.target_epsilon,
            private=report.randomness != "none" and all(row.noise_multiplier > 0 for row in rows),
            seeded=report.seeded_noise,
            sampling="poisson" if "poisson" in sampled or not rows else next(iter(sampled), None),
            randomness=None if report.randomness == NOT_RECORDED else report.randomness,
            inexact="clipping_but_for_rounding" in stated,
            finished="end_independent_of_releases" not in stated,
            unchanged=not any("configuration_changed" in site.verdict.reasons for site in report.sites),
            deployed="sites_run_their_own_software" in stated,
            doubtful=tuple(doubtful),
            kept=report.utility.kept if report.utility else None,
        )


@dataclass(frozen=True, kw_only=True)
class LedgerFacts(_Facts):
    """Of a ledger.

    Attributes:
        randomness: the worst source of noise of all runs.
        inexact: whether one of its policies accepted inexact gradients.
        cap_raised: whether a lifetime cap was raised after something was charged.
        spent_without_cap: whether something was charged while no lifetime cap was in force.
        above_run_cap: whether a plan is above the cap on one run that was in force when it was accepted.
        policy_noted: whether the ledger has noted the policy in force, with its digest; None: it was not given.
        restored: the entries that made up for lost ones.
        problem: why the ledger does not verify.
        versions: of fedtune, that wrote it.
    """

    randomness: str
    inexact: bool
    cap_raised: bool
    spent_without_cap: bool
    above_run_cap: bool
    policy_noted: bool | None
    policy_digest: str = ""
    restored: str = ""
    problem: str = ""
    versions: str = ""

    @classmethod
    def of_record(cls, record: LedgerRecord, *, above_run_cap: bool) -> LedgerFacts:
        """As the ledger has them."""
        history, events = record.history, record.events
        plans = [run.plan for run in history.runs.values()]
        statistics = statistics_of(plans)
        policies = [event for event in events if event.detail.get("what") == "policy"]
        restored = [event.sequence for event in events if event.detail.get("what") == "restored"]
        caps = [(event.sequence, finite(policy_of(event.detail["policy"]).budget.max_epsilon)) for event in policies]
        charges = [event.sequence for event in events if event.kind is Kind.RESERVE] + restored
        versions = list(dict.fromkeys(event.code for event in events))
        released = {history.runs[one.run].plan.shared is not None for one in events if one.kind is Kind.COMMIT}
        # A simulation notes that it is one, whatever the file says.
        own = record.policy_file and replace(record.policy_file, simulated=record.policy.simulated)
        without_noise = plans and not all(plan.private for plan in plans)
        return cls(
            name=f"{history.opened.site} {history.opened.population}",
            date=record.now.date().isoformat(),
            delta=history.delta,
            unit=history.opened.unit,
            seeded=history.seeded,
            randomness="seeded" if history.seeded else "none" if without_noise else "operating_system",
            released=(
                *(code for masked, code in _UPDATES.items() if masked in released),
                *(*statistics, "refusals_and_receipts"),
            ),
            covers=(
                *("rounds_and_steps", "charged_retries", *statistics, "all_runs", "tuning_trials"),
                *(("lost_branches",) if history.restored else ()),
            ),
            provenance=_provenance_of_ledger(record, versions),
            inexact=any(event.detail["policy"]["allow"]["inexact_gradients"] is not False for event in policies),
            cap_raised=cap_was_raised(caps, charges),
            spent_without_cap=spent_without_cap(caps, charges),
            above_run_cap=above_run_cap,
            policy_noted=None if own is None else own.to_json() == record.policy.to_json(),
            policy_digest=own.digest() if own else "",
            restored=", ".join(map(str, restored)),
            problem=record.problem,
            versions="fedtune " + ", ".join(versions),
        )

    @classmethod
    def of_report(cls, report: Report, site: SiteReport) -> LedgerFacts:
        """As favourably as a report allows, of one of its sites.

        A ledger has entries, a report has days alone; and a cap on one run that was in force once is only in a ledger.
        """
        stated = {one.code for one in report.assumptions}
        caps = [(cap.time[:10], cap.max_epsilon) for cap in site.lifetime.caps] if site.lifetime else []
        # What a lead joined has the steps of its own run alone.
        days = [step.time[:10] for step in site.steps if step.time] if site.source == "own_ledger" else []
        return cls(
            delta=report.delta,
            unit=report.unit,
            seeded=report.seeded_noise,
            randomness=report.randomness,
            inexact="clipping_but_for_rounding" in stated,
            cap_raised=cap_was_raised(caps, days),
            spent_without_cap=spent_without_cap(caps, days),
            above_run_cap="above_run_cap" in site.verdict.reasons,
            policy_noted=True if "policy_noted" in stated else None,
        )


def statistics_of(plans: Iterable[Plan]) -> tuple[str, ...]:
    """What rounds of these plans release beside updates."""
    released = {plan.metrics for plan in plans if plan.releases_metrics}
    return tuple(known.name for kind, known in METRICS.items() if kind in released)


def updates_of(report: Report) -> tuple[set[str], set[str]]:
    """What training released, by the settings of the runs that sent something; and what these settings allow."""
    how = {row.run: _UPDATES[row.shared is not None] for site in report.sites for row in site.mechanisms}
    every = set(how.values()) or set(_UPDATES.values())
    if report.kind == "run":
        return set(how.values()), every
    sent = [one.run for site in report.sites for one in site.releases if one.kind == "update" and not one.reason]
    return {how[run] for run in sent if run in how}, every


def _provenance_of_run(record: RunRecord) -> Provenance:
    config, environments = record.config, record.environments
    names = dict.fromkeys(name for environment in environments for name in environment.libraries)
    libraries = {name: _one(one.libraries[name] for one in environments if name in one.libraries) for name in names}
    version = _one(environment.fedtune_version for environment in environments)
    return Provenance(
        fedtune_version=version or (record.result.fedtune_version if record.result else "") or NOT_RECORDED,
        config_sha256=record.config_sha256,
        model=config.model.shown_path,
        model_sha256=_one(environment.model_sha256 for environment in environments) or config.model.sha256,
        model_licence=config.model.licence,
        dataset=config.data.dataset,
        task=config.task,
        libraries={name: version for name, version in libraries.items() if version},
        python=_one(environment.python for environment in environments),
        machine=_one(f"{one.system} {one.machine}, {one.device}" for one in environments),
        start_adapter=_start_adapter(record),
        purpose=config.report.about.purpose,
    )


def _start_adapter(record: RunRecord) -> StartAdapter | None:
    """As the run noted it, in files that anybody may have written: what has another form is not known."""
    digest, noted = record.config.model.adapter_sha256, record.start_adapter

    def text(key: str) -> str | None:
        value = noted.get(key)
        return value if isinstance(value, str) and value != UNKNOWN else None

    def number(key: str) -> float | None:
        value = noted.get(key)
        return finite(value) if isinstance(value, float) else None

    if digest is None:
        return None
    return StartAdapter(
        digest=digest,
        run=text("from"),
        dataset=text("dataset"),
        unit=text("unit"),
        delta=number("delta"),
        epsilon=number("epsilon"),
    )


def _one(values: Iterable[str]) -> str | None:
    """What all parts of a run had in common, or in order what they had."""
    return " / ".join(dict.fromkeys(values)) or None


def _provenance_of_ledger(record: LedgerRecord, versions: Sequence[str]) -> Provenance:
    """What the events name; the machine that they came about on is not among it."""
    proposals = [run.proposal for run in record.history.runs.values()]
    models = {proposal.base_model for proposal in proposals}
    return Provenance(
        fedtune_version=" / ".join(versions),
        config_sha256=None,
        model=None,
        model_sha256=models.pop() if len(models) == 1 and models != {UNVERIFIED} else None,
        model_licence=None,
        dataset=", ".join(dataset.id for dataset in record.policy.dataset),
        task=", ".join(dict.fromkeys(proposal.task for proposal in proposals)) or None,
        libraries={},
        python=None,
        machine=None,
        purpose=record.policy_file.about.purpose if record.policy_file else None,
    )


def spent_without_cap(caps: Sequence[tuple[_Place, float | None]], charges: Sequence[_Place]) -> bool:
    """Whether something was charged while no lifetime cap was in force: no later cap makes that a promise.

    Args:
        caps: from where on each held, None being none; in order.
        charges: where something was charged.  Places are entries of a ledger, or days where no more is known: of two
            things on one day either may have come first, so that nothing is certain.
    """
    return any(
        cap is None and place < charge and all(charge < end for end, _ in caps[number + 1 : number + 2])
        for number, (place, cap) in enumerate(caps)
        for charge in charges
    )


def cap_was_raised(caps: Sequence[tuple[_Place, float | None]], charges: Sequence[_Place]) -> bool:
    """Whether a lifetime cap was raised after something was charged, and so perhaps because of what it released."""
    return bool(charges) and any(
        place > min(charges) and before is not None and (after is None or after > before)
        for (_, before), (place, after) in pairwise(caps)
    )


def settings_problems(report: Report, config: RunConfig) -> Iterator[Problem]:
    """Every figure of a run's report that its settings deny.

    Guarantee: where there is none, each mechanism in the report has the noise, sampling rate, clip norm and number of
    steps that the settings ask for, no site has more rounds than the plan, and the whole plan costs what it says.

    Args:
        report: of a run.
        config: its settings; that they are the run's own shows their digest.
    """
    if config.digest() != report.provenance.config_sha256:
        yield Problem("provenance.config_sha256", report.provenance.config_sha256, config.digest())
        return
    plan = _plan_of(config, report)
    sizes = config.declared_sizes()
    rounds = len(report.utility.rounds) if report.utility else 0
    stopped = "end_independent_of_releases" in {one.code for one in report.assumptions}
    early = stopped or bool(report.utility and report.utility.kept and report.utility.kept.ended_early)
    for where, said, asked in (
        ("unit", report.unit, plan.unit),
        ("delta", report.delta, plan.delta),
        ("target_epsilon", report.target_epsilon, config.privacy.epsilon if plan.private else None),
        ("seeded_noise", report.seeded_noise, report.seeded_noise or config.runtime.seeded_noise),
        ("provenance.model", report.provenance.model, config.model.shown_path),
        ("provenance.dataset", report.provenance.dataset, config.data.dataset),
        ("provenance.task", report.provenance.task, config.task),
        ("sites", ", ".join(site.site for site in report.sites), ", ".join(sizes)),
        ("utility.rounds", rounds, rounds if early else max(rounds, plan.num_rounds)),
    ):
        if said != asked:
            yield Problem(where, said, asked)
    for site in report.sites:
        for key, is_so, should_be in _of_site(site, plan, declared=sizes.get(site.site)):
            yield Problem(f"sites.{site.site}.{key}", is_so, should_be)


def differing(row: Mechanism, plan: Plan) -> Iterator[tuple[str, object, object]]:
    """What a site did otherwise than its plan asked: the figure, as it is and as the plan has it."""
    asked = profile.mechanism_of(plan, run=row.run, rounds=1, sampling=row.sampling_run)
    for key in (
        *("sampling_rate", "noise_multiplier", "max_grad_norm", "local_steps"),
        *("metrics_noise_multiplier", "records_per_user", "shared"),
    ):
        if getattr(row, key) != getattr(asked, key):
            yield key, getattr(row, key), getattr(asked, key)


def _of_site(site: SiteReport, plan: Plan, *, declared: int | None) -> Iterator[tuple[str, object, object]]:
    if site.declared_size != declared:
        yield "declared_size", site.declared_size, declared
    for row in site.mechanisms:
        for key, said, asked in differing(row, plan):
            yield f"mechanisms.{row.run}.{key}", said, asked
        if row.rounds > plan.most_rounds:
            yield f"mechanisms.{row.run}.rounds", row.rounds, f"at most {plan.most_rounds}"
    if site.spent is None:
        return
    whole = profile.epsilon_pld([plan.whole], plan.delta, interval=profile.interval_of(site.source))
    planned = site.spent.planned_epsilon
    if planned != whole and not (planned and whole and math.isclose(planned, whole, rel_tol=_LAST_DIGITS)):
        yield "spent.planned_epsilon", planned, whole


def _plan_of(config: RunConfig, report: Report) -> Plan:
    """The plan that settings give, with the report's own noise where that is what a search for it finds."""
    plan = config.plan()
    rows = [row for site in report.sites for row in site.mechanisms]
    said = {row.shared.noise_multiplier if row.shared else row.noise_multiplier for row in rows}
    if config.privacy.noise_multiplier is None and len(said) == 1:
        (noise,) = said
        if noise > 0 and math.isclose(noise, plan.noise_multiplier, rel_tol=_CALIBRATED):
            return replace(config, privacy=replace(config.privacy, noise_multiplier=noise)).plan()
    return plan
