"""Fields of an impact assessment and of technical documentation: what fedtune knows, and what only a site can say.

A cell is "auto" (facts of the run or ledger), "design" (what is so in every run of an unchanged fedtune, and was not
observed in this one), "site" (the names of facts that a person at the site supplies) or "missing" (facts that belong on
record and are not).  No prose, no judgement: purpose, legal basis and necessity are the
controller's, and whether anything is anonymous or lawful is nobody's to compute.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from fedtune.report.model import Cell


class Row(NamedTuple):
    """A field, the facts that fedtune fills in where they are known, and those that it never can."""

    code: str
    facts: tuple[str, ...]
    of_the_site: tuple[str, ...]


ROWS = (
    Row(
        "dpia_description",  # GDPR Art. 35(7)(a), WP248 Annex 2
        (
            "unit",
            "dataset",
            "task",
            "declared_sizes",
            "columns_used",
            "num_sites",
            "runtime",
            "released",
            "base_model",
            "date",
        ),
        ("purpose", "context", "recipients", "retention", "codes_of_conduct"),
    ),
    Row(
        "dpia_necessity",  # Art. 35(7)(b)
        ("raw_records_leave_site", "columns_used", "most_tokens", "trained_parameters", "rank", "target_modules"),
        ("legal_basis", "why_this_much_data", "alternatives"),
    ),
    Row(
        "dpia_rights",  # Art. 12-22, 28, 36, chapter V
        ("erasure_reaches_records", "erasure_reaches_model", "excluded_records"),
        ("notices", "access_and_objection", "contracts", "joint_controllers", "transfers"),
    ),
    Row(
        "dpia_risks",  # Art. 35(7)(c)
        (
            "epsilon",
            "delta",
            "expected_failures",
            "right_of_100_ceiling",
            "right_of_100_mechanism",
            "attack_results",
            "update_checks",
            "rollback_excluded",
        ),
        ("severity", "impact_scenarios", "rating"),
    ),
    Row(
        "dpia_measures",  # Art. 35(7)(d)
        ("mechanism", "sampling_run", "randomness", "ledger_verified", "transport", "secure_aggregation"),
        ("organisational_measures", "staff", "physical_security"),
    ),
    Row(
        "dpia_advice",  # Art. 35(2), 35(9), 36
        ("verdict",),
        ("officer_advice", "views_of_data_subjects", "prior_consultation"),
    ),
    Row(
        "dpia_needed",  # WP248, nine criteria
        ("candidate_criteria",),
        ("criteria_confirmed",),
    ),
    Row(
        "edpb_anonymity",  # EDPB opinion 28/2024
        ("epsilon", "delta", "trained_parameters", "parameters_per_record", "attack_results", "date"),
        ("claim", "threat_model", "reviewed_by"),
    ),
    Row(
        "wp216_tests",  # WP216: singling out, linkability, inference
        ("singling_out_bound", "linkability_bound", "inference_covered"),
        ("judgement", "review_date"),
    ),
    Row(
        "ico_pets",  # ICO, privacy-enhancing technologies, 2023
        ("technologies_on", "technologies_off"),
        ("uk_dpia_decision",),
    ),
    Row(
        "hipaa_expert",  # 45 CFR 164.514(b)(1)
        ("mechanism", "accountant", "epsilon", "delta", "recompute_with"),
        ("expert", "recipient_analysis", "determination", "expiry"),
    ),
    Row(
        "ai_act_general",  # Annex IV 1, 2(a)-(c)
        (
            "base_model",
            "base_model_sha256",
            "base_model_licence",
            "fedtune_version",
            "rank",
            "target_modules",
            "hardware",
            "seconds",
        ),
        ("intended_purpose", "provider", "high_risk_class", "rationale_of_epsilon"),
    ),
    Row(
        "ai_act_data",  # Annex IV 2(d)
        ("dataset", "columns_used", "labels", "most_tokens", "heldout_fraction", "used_fraction", "file_hashes"),
        ("origin", "collection", "labelling", "cleaning", "representativeness"),
    ),
    Row(
        "ai_act_validation",  # Annex IV 2(g)
        ("scores_before", "scores_final", "scores_by_group", "confidence_intervals", "date"),
        ("relevance", "signatures"),
    ),
    Row(
        "ai_act_oversight",  # Annex IV 2(e), 2(h), 3-9
        ("libraries", "update_checks", "transport", "known_limits"),
        ("oversight", "risk_management", "standards", "declaration", "post_market_plan"),
    ),
    Row(
        "gpai_summary",  # summary of training content, July 2025
        ("modality", "declared_total", "source_type", "languages", "collected_between"),
        ("narrative", "publication", "copyright_policy"),
    ),
    Row(
        "gpai_role",  # a third of the original's compute
        ("compute_ratio",),
        ("legal_role",),
    ),
)


BY_DESIGN: Mapping[str, str] = {
    "raw_records_leave_site": "no",
    "erasure_reaches_records": "yes",
    "erasure_reaches_model": "no",
    "secure_aggregation": "no",
    "candidate_criteria": "innovative_technology",
    "inference_covered": "no",
    "recompute_with": "fedtune report verify report.json",
    "modality": "text",
    "source_type": "held_by_sites",
}
"""Facts that are so in every run of fedtune: no record of a run shows them."""


def rows(known: Mapping[str, str]) -> tuple[Cell, ...]:
    """The cells, filled from what is known.

    Args:
        known: name of a fact -> its value; facts that no row asks for are a mistake of ours.
    """
    assert known.keys() <= {name for row in ROWS for name in row.facts}, "a fact that no cell shows"
    return tuple(cell for row in ROWS for cell in _cells(row, known))


def _cells(row: Row, known: Mapping[str, str]) -> Iterator[Cell]:
    found = {name: known[name] for name in row.facts if name in known}
    if of_record := {name: value for name, value in found.items() if name not in BY_DESIGN}:
        yield Cell(code=row.code, state="auto", facts=of_record)
    if by_design := {name: value for name, value in found.items() if name in BY_DESIGN}:
        yield Cell(code=row.code, state="design", facts=by_design)
    if unknown := {name: "" for name in row.facts if name not in known}:
        yield Cell(code=row.code, state="missing", facts=unknown)
    yield Cell(code=row.code, state="site", facts=dict.fromkeys(row.of_the_site, ""))
