"""What a report's guarantee rests on, and how far each of these is known to hold.

"verified" names what checked it: a test of fedtune's, or a check made for this report.  "asserted" names who says so.
"assumed" is said by nobody, and "violated" is known not to hold.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

from fedtune.privacy.ledger.chain import Kind
from fedtune.report import profile
from fedtune.report.ledger_lifetime import caps_of
from fedtune.report.ledger_record import LedgerRecord
from fedtune.report.model import Assumption
from fedtune.report.site_model import SiteReport

if TYPE_CHECKING:  # it imports torch, which a ledger's report does without
    from fedtune.report.run_record import RunRecord

Status = Literal["violated", "assumed", "asserted", "verified"]
WORST_FIRST: tuple[Status, ...] = ("violated", "assumed", "asserted", "verified")

CODES = (
    "noise_in_every_step",
    "poisson_sampling",
    "unpredictable_randomness",
    "clipping_exact",
    "clipping_but_for_rounding",
    "delta_below_one_over_size",
    "accountants_agree",
    "one_record_is_one_unit",
    "every_record_names_its_person",
    "units_at_one_site_only",
    # Of a run.
    "receipts_signed",
    "every_site_answered",
    "end_independent_of_releases",
    "configuration_unchanged",
    "site_reports_agree",
    "site_reports_are_newest",
    "sites_run_their_own_software",
    # Of a ledger.
    "ledger_intact",
    "no_event_missing",
    "site_key_known",
    "order_fixed_beforehand",
    "cap_never_raised",
    "runs_fixed_beforehand",
    "ends_independent_of_releases",
    "policy_noted",
    "lost_events_made_up_for",
)

NEVER_CHECKED = (
    "clipping_but_for_rounding",
    "one_record_is_one_unit",
    "every_record_names_its_person",
    "end_independent_of_releases",
    "ends_independent_of_releases",
    "runs_fixed_beforehand",
    "site_reports_are_newest",
)
"""What nothing in fedtune checks, and nobody is asked to assert."""

CLIPPING = ("clipping_exact", "clipping_but_for_rounding")
"""A report states one of these.  The second is for machines that a site accepts although they round a record by its
neighbours, and for all reports made before there was the first."""

_Found = tuple[str, Status, str]
_EXACT = "tests/training/test_preflight.py; docs/guarantee.md"
_MOST_NAMED = 5  # runs; report.json lists all of them
_OF_USERS: _Found = ("every_record_names_its_person", "assumed", "unit=user; docs/user_level.md")


def of_run(record: RunRecord, sites: Sequence[SiteReport]) -> tuple[Assumption, ...]:
    """Those of a run, as its lead knows them; violated ones first."""
    return _ordered(
        [
            *_of_mechanism(record, sites),
            *of_figures(record.plan.delta, sites, unit=record.plan.unit),
            *_of_lead(record, sites),
        ]
    )


def of_ledger(record: LedgerRecord, site: SiteReport) -> tuple[Assumption, ...]:
    """Those of a ledger; violated ones first."""
    history = record.history
    plans = [run.plan for run in history.runs.values()]
    by_site = f"{site.site}: {_versions(record)}"
    found: list[_Found] = [
        (
            "noise_in_every_step",
            "verified" if all(plan.private for plan in plans) else "violated",
            "tests/training/test_dp_step.py"
            if all(plan.private for plan in plans)
            else _named(run for run, known in history.runs.items() if not known.plan.private),
        ),
        ("poisson_sampling", "asserted", by_site),
        _randomness(
            history.seeded, _named(name for name, run in history.runs.items() if run.proposal.seeded_noise), by_site
        ),
        _clipping_of_ledger(record),
        *of_figures(history.delta, [site], unit=history.opened.unit),
        *_of_file(record),
        *_of_history(record, site),
    ]
    return _ordered(found if record.verified else list(map(_unverified, found)))


def _unverified(found: _Found) -> _Found:
    """What a ledger says that does not fit together shows nothing, not even what its site asserts."""
    code, status, evidence = found
    return (code, status, evidence) if status == "violated" else (code, "assumed", evidence)


def cap_was_raised(record: LedgerRecord) -> bool:
    """Whether a lifetime cap was raised after something was charged, and so perhaps because of what it released."""
    charged_at = next((event.time for event in record.events if event.kind is Kind.RESERVE), None)
    if charged_at is None:
        return False
    caps = record.history.policies
    return any(after > before and time >= charged_at for (_, before), (time, after) in pairwise(caps))


def _of_mechanism(record: RunRecord, sites: Sequence[SiteReport]) -> Iterator[_Found]:
    """What a simulation's own process knows, and of real sites only those that signed a report."""
    noted = record.environments[-1] if record.environments else None
    said = [site.site for site in sites if site.source == "signed_site_report"]
    if not record.plan.private:
        yield "noise_in_every_step", "violated", "privacy.mechanism=none"
    elif noted and noted.sampling:
        yield "noise_in_every_step", "verified", "environment.json; tests/training/test_dp_step.py"
    else:
        all_said = len(said) == len(sites)
        yield "noise_in_every_step", "asserted" if all_said else "assumed", _named(said) or "the sites' fedtune"
    sampled = {mechanism.sampling_run for site in sites for mechanism in site.mechanisms}
    if noted and noted.sampling == "poisson":
        yield "poisson_sampling", "verified", "environment.json; tests/training/test_dp_step.py"
    elif sampled and sampled <= {"poisson"}:
        yield "poisson_sampling", "asserted", _named(said)
    else:
        yield "poisson_sampling", "assumed", "the sites' fedtune"
    if record.seeded:
        yield _randomness(True, "runtime.seeded_noise=true", "")
    elif noted and noted.randomness:
        yield "unpredictable_randomness", "verified", "environment.json; tests/privacy/test_randomness.py"
    else:
        yield (
            "unpredictable_randomness",
            "asserted" if len(said) == len(sites) else "assumed",
            _named(said) or "the sites' fedtune",
        )
    yield _clipping_of_run(record, trained_here=bool(noted and noted.sampling))


def _clipping_of_run(record: RunRecord, *, trained_here: bool) -> _Found:
    """Whether the bound on one unit was exact, by the policies of simulated sites; real ones keep theirs."""
    accepted = record.inexact_gradients
    if accepted:
        return "clipping_but_for_rounding", "assumed", "allow.inexact_gradients=true; docs/guarantee.md"
    if not record.plan.private:
        return "clipping_exact", "violated", "privacy.mechanism=none"
    if accepted is None or not trained_here:
        return "clipping_exact", "assumed", "allow.inexact_gradients; docs/guarantee.md"
    return "clipping_exact", "verified", f"allow.inexact_gradients=false; {_EXACT}"


def _clipping_of_ledger(record: LedgerRecord) -> _Found:
    """The same by every policy that the ledger noted: one that says nothing is of a version that was not exact yet."""
    noted = [event.detail["policy"] for event in record.events if event.detail.get("what") == "policy"]
    said = {policy["allow"].get("inexact_gradients") for policy in noted}
    if without := [name for name, run in record.history.runs.items() if not run.plan.private]:
        return "clipping_exact", "violated", _named(without)
    if said == {False}:
        return "clipping_exact", "verified", f"allow.inexact_gradients=false; {_EXACT}"
    why = "true" if True in said else "not noted"
    return "clipping_but_for_rounding", "assumed", f"allow.inexact_gradients: {why}; docs/guarantee.md"


def _randomness(seeded: bool, why: str, said_by: str) -> _Found:
    return "unpredictable_randomness", "violated" if seeded else "asserted", why if seeded else said_by


def of_figures(delta: float, sites: Sequence[SiteReport], *, unit: str) -> Iterator[_Found]:
    """What the sites' figures themselves say, each with its status and evidence."""
    largest = max((site.declared_size or 0 for site in sites), default=0)
    compared = f"delta={delta:g}; declared_size={largest}"
    yield "delta_below_one_over_size", "verified" if delta * largest < 1 else "violated", compared
    spent = [(site.source, site.spent) for site in sites if site.spent]
    if any(one.epsilon_pld and one.epsilon_rdp for _, one in spent):
        agree = all(profile.accountants_agree(one, width=profile.interval_of(source)) for source, one in spent)
        yield (
            "accountants_agree",
            "verified" if agree else "violated",
            "PLD <= RDP; tests/privacy/test_accountant.py",
        )
    yield ("one_record_is_one_unit", "assumed", "unit=record") if unit == "record" else _OF_USERS
    yield _units_at_one_site_only(sites)


def _units_at_one_site_only(sites: Sequence[SiteReport]) -> _Found:
    code = "units_at_one_site_only"
    said = {site.site: site.asserted.get("no_person_at_another_site") for site in sites}
    if denied := [site for site, answer in said.items() if answer is False]:
        return code, "violated", _named(denied)
    silent = [site for site, answer in said.items() if answer is None]
    return (code, "assumed", _named(silent)) if silent else (code, "asserted", _named(said))


def _of_lead(record: RunRecord, sites: Sequence[SiteReport]) -> Iterator[_Found]:
    yield _receipts(record, sites)
    silent = [site.site for site in sites if site.spent and site.spent.upper_bound]
    if silent:
        yield "every_site_answered", "violated", _named(silent)
    if not record.finished:
        done, planned = len(record.rounds), record.config.federation.num_rounds
        yield "end_independent_of_releases", "assumed", f"{done} / {planned}"
    unchanged = record.config_unchanged
    yield "configuration_unchanged", "verified" if unchanged else "violated", f"config.yaml: {record.config.digest()}"
    said = [site for site in sites if site.source == "signed_site_report"]
    if said:
        disagree = [site.site for site in said if "site_report_disagrees" in site.verdict.reasons]
        yield (
            "site_reports_agree",
            "violated" if disagree else "verified",
            _named(disagree or [site.site for site in said]),
        )
        # A lead may keep a newer one back; the site alone knows.
        yield "site_reports_are_newest", "assumed", _named(f"{site.site}: {site.reported}" for site in said)
    if record.deployed:
        yield "sites_run_their_own_software", "assumed", "tests/deployment"


def _receipts(record: RunRecord, sites: Sequence[SiteReport]) -> _Found:
    """Of each site that was charged, whether the lead holds its signed word."""
    code = "receipts_signed"
    if record.state is None:
        return code, "assumed", "run.json"
    if record.doubtful:
        return code, "violated", _named(record.doubtful)
    without = [site.site for site in sites if site.spent and site.spent.rounds and site.site not in record.receipts]
    if without:
        return code, "assumed", _named(without)
    return code, "verified", _named(f"{site} {receipt.site_key[:16]}" for site, receipt in record.receipts.items())


def _of_file(record: LedgerRecord) -> Iterator[_Found]:
    found = record.verified
    if found is None:
        yield "ledger_intact", "violated", record.problem
        return
    yield "ledger_intact", "verified", f"{len(found.events)}: {found.hash}"
    yield (
        "no_event_missing",
        "violated" if record.history.in_doubt else "verified" if record.anchored_to_the_end else "assumed",
        f"anchor: {found.anchor_sequence} / {len(found.events)}" if found.rollback_excluded else "anchor: none",
    )
    yield "site_key_known", "verified" if found.key_expected else "assumed", found.site_key


def _of_history(record: LedgerRecord, site: SiteReport) -> Iterator[_Found]:
    history = record.history
    yield "order_fixed_beforehand", "verified", f"1: {history.order:g}"
    caps = ", ".join(f"{cap.time[:10]}: {cap.max_epsilon}" for cap in caps_of(history))
    yield "cap_never_raised", "violated" if cap_was_raised(record) else "verified", caps
    if len(history.runs) > 1:
        yield "runs_fixed_beforehand", "assumed", "PLD, RDP"
    if early := [run for run in site.lifetime.runs if 0 < run.rounds < run.most_rounds] if site.lifetime else []:
        parts = _named(f"{run.run}: {run.rounds} / {run.most_rounds}" for run in early[:_MOST_NAMED])
        yield "ends_independent_of_releases", "assumed", parts + (", …" if len(early) > _MOST_NAMED else "")
    if record.policy_file is not None:
        noted = record.policy_file.to_json() == record.policy.to_json()
        yield "policy_noted", "verified" if noted else "violated", record.policy_file.digest()
    if history.restored:
        events = [event for event in record.events if event.detail.get("what") == "restored"]
        yield "lost_events_made_up_for", "verified", ", ".join(f"{event.sequence}" for event in events)


def _versions(record: LedgerRecord) -> str:
    return "fedtune " + ", ".join(dict.fromkeys(event.code for event in record.events))


def _named(names: Iterable[str]) -> str:
    return ", ".join(names)


def _ordered(found: Sequence[_Found]) -> tuple[Assumption, ...]:
    made = [Assumption(code=code, status=status, evidence=evidence) for code, status, evidence in found]
    return tuple(sorted(made, key=lambda assumption: WORST_FIRST.index(assumption.status)))
