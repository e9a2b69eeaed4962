"""A run's entry for a public registry of differential-privacy deployments.

Statements by people come from the run's `report.about`, or from `[about]` in a site's `site.toml`; empty fields are
listed under `missing`. All other fields come from report.json, whose SHA-256 the entry contains.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from fedtune.config import AboutSpec
from fedtune.report import signing
from fedtune.report.facts import RunFacts
from fedtune.report.model import Report
from fedtune.report.page.translations import load_catalog
from fedtune.report.page.view import Words

REGISTRY = "registry.json"
SCHEMA_VERSION = 1
_TOGETHER = (
    "The sites generate the noise jointly: each relies on other sites not to reveal their noise shares to the lead."
)
_MODEL = {"noised": "setting.model_text", "seeded": "setting.model_text_seeded", "no_noise": "setting.model_text_none"}


def build_registry_entry(report: Report, about: AboutSpec) -> dict[str, Any]:
    """Build the fields of a registry entry, in English."""
    words, of_run = Words(report, load_catalog("en")), isinstance(report.facts, RunFacts)

    def translate_codes(section: str, codes: Sequence[str]) -> list[str]:
        return [words.code(section, code).unescape() for code in codes]

    keys = ("sampling", "sampling_rate", "noise_multiplier", "clip_norm", "steps_a_round")
    rows = dict.fromkeys(  # distinct step settings over all sites and runs
        (row.sampling_run, row.sampling_rate, row.noise_multiplier, row.max_grad_norm, row.local_steps)
        for site in report.sites
        for row in site.mechanisms
    )
    facts = report.facts
    picked = facts.selection if isinstance(facts, RunFacts) else None  # in a fedtune search
    how = f"selected by {picked.primary_metric} out" if picked and picked.score is not None else "one"
    search = f"{how} of {picked.trials} trials of {picked.search}" if picked else ""
    by_people = dataclasses.asdict(about) | {"tuning": about.tuning or search}
    first = ("curator", "description", "intended_use", "sector", "published", "channel", "acceptable_use")
    known = report.known
    return {
        "schema_version": SCHEMA_VERSION,
        "name": facts.name,
        **{field: by_people[field] for field in first},
        "data_product": {
            "kind": "fine-tuned model" if of_run else "updates to models",
            "task": known.get("task"),
            "base_model": known.get("base_model"),
            "released": translate_codes("released", report.released),
            "release": "one run" if of_run else "all runs of one site so far",
            "access": about.access,
            "files": dict(facts.files) if isinstance(facts, RunFacts) else {},
        },
        "data": {"name": known.get("dataset"), "dynamics": about.dynamics, "preprocessing": about.preprocessing},
        "privacy": {
            "result": report.verdict.state,
            "holds_for": "a simulation on one machine" if "simulation" in report.banners else "real sites",
            "flavour": "(epsilon, delta)-differential privacy",
            "unit": words.code("unit", facts.unit).unescape(),
            "neighboring_relation": words.code("relation", report.neighboring_relation).unescape(),
            "epsilon": report.epsilon if words.promises else None,
            "delta": facts.delta,
            "sites": len(report.sites),
            "model": _TOGETHER if words.shared else words.text(_MODEL[words.noise]).unescape(),
            "mechanisms": [
                {"name": "DP-SGD" if row[2] else "none", **dict(zip(keys, row, strict=True))} for row in rows
            ],
        },
        "accounting": {
            "accountant": known.get("accountant"),
            "covers": translate_codes("covers", report.covers),
            "leaves_out": translate_codes("leaves_out", report.leaves_out),
        },
        "tuning": by_people["tuning"],
        "not_protected": translate_codes("not_protected", report.not_protected),
        "unprotected_quantities": translate_codes("unprotected_figure", report.unprotected_figures),
        "implementation": {
            "software": f"fedtune {facts.provenance.fedtune_version}",
            "libraries": dict(facts.provenance.libraries),
            "randomness": words.code("randomness", report.randomness).unescape(),
        },
        "justification": about.justification,
        "report_sha256": signing.compute_report_digest(report),
        "missing": [name for name, value in by_people.items() if not value.strip()],
    }


def read_fields_by_people(data: bytes) -> AboutSpec:
    """Read the statements by people back from an entry's file; all are empty if the file is not a registry entry."""
    try:
        fields = json.loads(data)
        places = {**fields, **fields["data"], "access": fields["data_product"]["access"]}
        return AboutSpec(**{key.name: str(places[key.name]) for key in dataclasses.fields(AboutSpec)})
    except (ValueError, TypeError, KeyError, AttributeError):
        return AboutSpec()


def registry_entry_to_json(report: Report, about: AboutSpec) -> str:
    """Serialize a registry entry as the content of registry.json; equal reports give equal bytes."""
    return json.dumps(build_registry_entry(report, about), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
