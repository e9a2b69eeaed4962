"""What a report's guarantee rests on, and how far each of these is known to hold.

"verified" names what checked it: a test of fedtune's, or a check made for this report.  "asserted" names who says so.
"assumed" is said by nobody, and "violated" is known not to hold.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

from fedtune.privacy.chain import Kind
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
    "clipping_but_for_rounding",
    "delta_below_one_over_size",
    "accountants_agree",
    "one_record_is_one_unit",
    "units_at_one_site_only",
    # Of a run.
    "receipts_signed",
    "every_site_answered",
    "end_independent_of_releases",
    "configuration_unchanged",
    "site_reports_agree",
    "sites_run_their_own_software",
    # Of a ledger.
    "ledger_intact",
    "no_event_missing",
    "site_key_known",
    "order_fixed_beforehand",
    "cap_never_raised",
    "runs_fixed_beforehand",
    "policy_noted",
    "lost_events_made_up_for",
)

_Found = tuple[str, Status, str]


def of_run(record: RunRecord, sites: Sequence[SiteReport]) -> tuple[Assumption, ...]:
    """Those of a run, as its lead knows them; violated ones first."""
    return _ordered([*_of_mechanism(record, sites), *_of_any(record.plan.delta, sites), *_of_lead(record, sites)])


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
        ("clipping_but_for_rounding", "assumed", "docs/threat_model.md"),
        *_of_any(history.delta, [site]),
        *_of_file(record),
        *_of_history(record),
    ]
    return _ordered(found)


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
    private = record.plan.private
    yield (
        "noise_in_every_step",
        "verified" if private else "violated",
        "tests/training/test_dp_step.py" if private else "privacy.mechanism=none",
    )
    said = [site.site for site in sites if site.source == "signed_site_report"]
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
    dtype = f"model.dtype={record.config.model.dtype}"
    yield "clipping_but_for_rounding", "assumed", f"docs/threat_model.md; {dtype}"


def _randomness(seeded: bool, why: str, said_by: str) -> _Found:
    return "unpredictable_randomness", "violated" if seeded else "asserted", why if seeded else said_by


def _of_any(delta: float, sites: Sequence[SiteReport]) -> Iterator[_Found]:
    largest = max((site.declared_size or 0 for site in sites), default=0)
    compared = f"delta={delta:g}; declared_size={largest}"
    yield "delta_below_one_over_size", "verified" if delta * largest < 1 else "violated", compared
    spent = [site.spent for site in sites if site.spent and site.spent.epsilon_pld and site.spent.epsilon_rdp]
    if spent:
        # RDP is looser; where it says less, one of the two is wrong.
        agree = all((one.epsilon_pld or 0) <= (one.epsilon_rdp or 0) for one in spent)
        yield (
            "accountants_agree",
            "verified" if agree else "violated",
            "PLD <= RDP; tests/privacy/test_accountant.py",
        )
    yield "one_record_is_one_unit", "assumed", "unit=record"
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
    if record.deployed:
        yield "sites_run_their_own_software", "assumed", "tests/deployment"


def _receipts(record: RunRecord, sites: Sequence[SiteReport]) -> _Found:
    """Of each site that was charged, whether the lead holds its signed word."""
    code = "receipts_signed"
    if record.state is None:
        return code, "assumed", "run.json"
    wrong = [site for site, receipt in record.receipts.items() if not receipt.is_signed() or receipt.site != site]
    if wrong:
        return code, "violated", _named(wrong)
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
        "violated" if record.history.in_doubt else "verified" if found.rollback_excluded else "assumed",
        f"{found.anchor_sequence}" if found.rollback_excluded else "anchor: none",
    )
    yield "site_key_known", "verified" if found.key_expected else "assumed", found.site_key


def _of_history(record: LedgerRecord) -> Iterator[_Found]:
    history = record.history
    yield "order_fixed_beforehand", "verified", f"1: {history.order:g}"
    caps = ", ".join(f"{cap.time[:10]}: {cap.max_epsilon}" for cap in caps_of(history))
    yield "cap_never_raised", "violated" if cap_was_raised(record) else "verified", caps
    if len(history.runs) > 1:
        yield "runs_fixed_beforehand", "assumed", "PLD, RDP"
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
