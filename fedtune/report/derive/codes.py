"""Every code that a report's builders write; the catalogue of texts has words for each, and no others are needed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from fedtune.privacy.plan import Plan
from fedtune.privacy.release import METRICS

AUDIT_METHODS = ("gradient_canaries", "record_canaries")
AUDIT_SCORES = ("loss", "reference_ratio")
"""What an audit planted, and by what membership of real records was guessed."""

STATISTICS = tuple(known.name for known in METRICS.values() if known.name)
"""What rounds may release beside updates."""

RELEASED = ("updates", *STATISTICS, "aggregates", "final_adapter", "refusals_and_receipts")
"""What left the sites, or the lead."""

COVERS = ("rounds_and_steps", "charged_retries", *STATISTICS, "all_runs", "tuning_trials", "lost_branches")
"""What the epsilon of a report adds up."""

LEAVES_OUT = (
    "other_runs",
    "tuning_trials",
    "other_ledgers",
    "lead_evaluation",
    "preprocessing",
    "pretraining_data",
    "unreleased_statistics",
    "refusals_and_receipts",
    "side_channels",
)
"""What it does not."""

NOT_PROTECTED = (
    "facts_about_people_in_general",
    "outside_training",
    "several_records",
    "several_sites",
    "reply_time_and_absence",
    "public_choices",
    "ledger_length",
    "lead_files",
    "pretraining_data",
    "site_administrator",
    "model_against_malicious_sites",
)


def of_unit(not_protected: Sequence[str], unit: str) -> tuple[str, ...]:
    """Those of `NOT_PROTECTED` that hold for a privacy unit: by user, a person's records are protected as a whole."""
    return tuple(code for code in not_protected if unit == "record" or code != "several_records")


def statistics_of(plans: Iterable[Plan]) -> tuple[str, ...]:
    """Those of `STATISTICS` that rounds of these plans release."""
    released = {plan.metrics for plan in plans if plan.releases_metrics}
    return tuple(known.name for kind, known in METRICS.items() if kind in released)


UNPROTECTED_FIGURES = (
    "scores_on_lead_files",
    "declared_sizes",
    "times",
    "bytes",
    "who_took_part",
    "attack_on_real_records",
    "counts_of_events",
)
"""Exact figures of a report that no noise covers."""

NOT_RECORDED = "not_recorded"
"""For a fact that was not recorded at the time."""

RANDOMNESS = ("operating_system", "seeded", NOT_RECORDED, "none")

RELEASE_KINDS = ("update", "refusal", "no_answer", "offer", "reservation_without_update")
RELEASE_REASONS = ("no_reply", "unsigned_reply", "invalid_update", "beyond_plan")
"""Beside those of `privacy.release.Reason`."""

SAMPLING = ("poisson", NOT_RECORDED)

RUN_STATES = ("open", "ended", "expired")
