"""Fields of a data protection impact assessment and of technical documentation, filled in with known facts.

A cell is "auto" (facts of the run or ledger), "design" (true for every run of an unmodified fedtune, and not observed
in this run), "site" (names of facts that a person at the site supplies) or "missing" (facts that should be recorded and
are not). Facts are figures, names, hashes and codes. Cells contain no prose and no judgment: purpose, legal basis and
necessity are for the controller to state, and no program can decide whether something is anonymous or lawful.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping, Sequence
from operator import attrgetter
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from fedtune.model.spec import NO_ADAPTER
from fedtune.privacy.run_plan import Plan
from fedtune.report.facts import RunFacts, StartAdapter, Value
from fedtune.report.model import Cells, CellState, Report
from fedtune.tasks.inputs import get_input_for

if TYPE_CHECKING:  # it imports torch, which a ledger's report does without
    from fedtune.config import RunConfig

_DATA = tomllib.loads(Path(__file__).with_name("dpia_fields.toml").read_text(encoding="utf-8"))
FIELDS: Mapping[str, Mapping[str, Sequence[str]]] = _DATA["field"]  # known `facts`, and facts to supply (`of_the_site`)
BY_DESIGN: Mapping[str, str] = _DATA["by_design"]
KINDS: Mapping[str, str] = {fact: kind for kind, facts in _DATA["kinds"].items() for fact in facts}
"""Fact -> format of its value on a page, as in `TableColumn.kind`; other facts are shown as text."""
_PLACES: Mapping[str, str] = _DATA["places"]  # fact that the report states elsewhere -> its attribute of `Report`
OPTIONAL = frozenset(_DATA["optional"]["facts"])  # facts that a cell omits if they were not measured
SETTINGS = frozenset(_DATA["settings"]["facts"])  # facts that come from the settings of a run or of a ledger's runs
TRANSPORT = {"simulation": "in_process", "ray": "ray", "deployment": "mutual_tls"}


def build_cells(known: Mapping[str, Value]) -> Cells:
    """Build the cells from the `known` facts (name -> value)."""
    assert known.keys() <= {name for field in FIELDS.values() for name in field["facts"]}, "a fact that no cell shows"
    made: dict[str, dict[CellState, dict[str, Value]]] = {}
    for code, field in FIELDS.items():
        found: dict[CellState, dict[str, Value]] = {"auto": {}, "design": {}, "missing": {}}
        for name in field["facts"]:
            value = known.get(name)
            if value is None and name in OPTIONAL:
                continue
            found["missing" if value is None else "design" if name in BY_DESIGN else "auto"][name] = value
        found["site"] = dict.fromkeys(field["of_the_site"])
        made[code] = {state: facts for state, facts in found.items() if facts}
    return made


def build_report_cells(report: Report) -> Cells:
    """Build the cells from a report's figures; the report's existing cells are ignored."""
    facts, made = report.facts, report.facts.provenance
    # Each figure that differs between sites is that of the worst site, like the report's verdict and epsilon.
    promised = report.verdict.state != "no_guarantee"
    epsilon = report.epsilon if promised else None
    meanings = [site.meaning for site in report.sites if site.meaning]
    by_mechanism = [one.correct_of_100_mechanism for one in meanings if one.correct_of_100_mechanism is not None]
    ceiling = max((one.correct_of_100_ceiling for one in meanings), default=None) if promised else 100.0
    mechanism: Value = max(by_mechanism, default=None) if len(by_mechanism) == len(meanings) else "not_computed"
    bound = (ceiling if mechanism == "not_computed" else mechanism) if promised else 100.0
    failures = [one.expected_failures for one in meanings if one.expected_failures is not None]
    rows_of_all = [row for site in report.sites for row in site.mechanisms]
    summed, sizes = any(row.shared for row in rows_of_all), facts.declared_sizes
    technologies = {"federated_learning": True, "secure_aggregation": summed, "differential_privacy": promised}
    total = sum(size or 0 for size in sizes.values())
    known: dict[str, Value] = {
        **BY_DESIGN,
        **facts.settings,
        **{name: attrgetter(place)(report) for name, place in _PLACES.items()},
        "epsilon": "unbounded" if epsilon is None else epsilon,
        "expected_failures": max(failures, default=None),
        "correct_of_100_ceiling": ceiling,
        "correct_of_100_mechanism": mechanism if promised else None,
        "singling_out_bound": bound,
        "sampling_run": tuple(sorted({row.sampling_run for row in rows_of_all})) or None,
        "secure_aggregation": "yes" if summed else "no",
        "technologies_on": tuple(name for name, on in technologies.items() if on),
        "technologies_off": tuple(name for name, on in technologies.items() if not on),
        "accountant": f"PLD, RDP: dp-accounting {made.libraries.get('dp-accounting', '')}".strip(),
        "libraries": tuple(f"{name} {version}" for name, version in made.libraries.items()) or None,
        "declared_total": total,
        "num_sites": len(sizes),
    }
    if isinstance(facts, RunFacts):
        known |= {
            "mechanism": "dp_sgd" if facts.plan.private else "none",
            "transport": TRANSPORT.get(str(facts.settings.get("runtime"))),
            "trained_parameters": facts.trained_parameters,
            "total_parameters": facts.total_parameters,
            "training_flops": estimate_training_flops(report, facts),
            "energy_kwh": facts.energy.kwh if facts.energy else None,
            "group_scores": facts.group_scores or None,
            "parameters_per_record": None if facts.trained_parameters is None else facts.trained_parameters / total,
            "seconds": facts.seconds,
            "scores_before": facts.before or None,
            "scores_final": facts.final or None,
        }
    else:
        verified = facts.verification
        up_to_there = verified is not None and verified.anchor_sequence is not None and not verified.rollback_excluded
        to_the_end = verified is not None and verified.rollback_excluded
        known |= {
            "runtime": "simulation" if facts.simulated else None,
            "mechanism": tuple(dict.fromkeys("dp_sgd" if run.plan.private else "none" for run in facts.runs)) or None,
            "base_model": tuple(dict.fromkeys(run.base_model for run in facts.runs)) or None,
            "ledger_verified": "no" if verified is None else "yes",
            "rollback_excluded": "up_to_the_anchor" if up_to_there else "yes" if to_the_end else "no",
        }
    return build_cells(known)


def estimate_training_flops(report: Report, facts: RunFacts) -> float | None:
    """Estimate a run's floating-point operations as 6 N D, for a model with N parameters and D training tokens.

    D is an upper estimate: the expected number of sampled records times the largest number of tokens of a record. The
    result is None if the model's size is unknown, or if its input is not text.
    """
    plan, tokens, sizes = facts.plan, facts.settings.get("most_tokens"), facts.declared_sizes
    if facts.total_parameters is None or not isinstance(tokens, int) or facts.settings.get("modality") != "text":
        return None
    drawn = sum(site.spent.steps * plan.sampling_rate * (sizes[site.site] or 0) for site in report.sites)
    return float(f"{6 * facts.total_parameters * drawn * plan.records_per_user * tokens:.2g}")


def derive_facts_from_settings(config: RunConfig, plan: Plan) -> dict[str, Any]:
    """Derive the fields of `RunFacts` that follow from a run's settings and plan."""
    return {
        "name": config.name,
        "target_epsilon": config.privacy.epsilon if plan.private else None,
        "settings": derive_cell_facts(config, plan),
        "primary_metric": config.primary_metric,
        "checkpoint_selection": config.federation.checkpoint_selection,
        "early_stopping_patience": config.federation.early_stopping_patience,
    }


def derive_provenance(config: RunConfig) -> dict[str, str | None]:
    """Derive the fields of `Provenance` that follow from a run's settings alone."""
    about = config.report.about
    return {
        "model": config.model.public_path,
        "model_license": config.model.license,
        "dataset": config.data.dataset,
        "task": config.task,
        "purpose": about.purpose,
        "channel": about.channel or None,
        "acceptable_use": about.acceptable_use or None,
    }


def compare_start(
    said: StartAdapter | None, digest: str | None, privacy: Mapping[str, Any], public: bool
) -> Iterator[tuple[str, Any, Any]]:
    """Yield the place in the report, the reported value and the value in the settings of each field of a start adapter
    that the settings decide.

    Args:
        said: the start in the report.
        digest: `model.adapter_sha256` in the settings; None: the start is only stated.
        privacy: the settings in the group `privacy`.
        public: whether the settings have a public stage.
    """
    yield "provenance.start_adapter.public", said is not None and said.public, public
    for key in ("digest", "epsilon", "delta", "unit") if digest else ():
        asked = digest if key == "digest" else privacy.get(f"start_{key}")
        yield f"provenance.start_adapter.{key}", getattr(said, key, None), asked


def derive_cell_facts(config: RunConfig, plan: Plan) -> dict[str, Value]:
    """Derive the facts in cells that follow from a run's settings."""
    data, real = config.data, config.runtime.kind == "deployment"
    excluded = {
        "unusable_records": real or data.skips_bad_records,
        "held_out_records": data.heldout_fraction > 0,
        "unused_records": not real and data.train_fraction < 1,
    }
    known: dict[str, Value] = {
        "excluded": tuple(code for code, is_so in excluded.items() if is_so) or None,
        "columns_used": tuple(dict.fromkeys(config.bound_task.columns(data, unit=plan.unit))),
        "runtime": config.runtime.kind,
        "most_tokens": data.max_length,
        "modality": get_input_for(data).modality,
        "rank": format_rank(config.lora.kind, config.lora.effective_rank, config.federation.site_ranks),
        "target_modules": tuple(config.lora.adapted_modules) or "none",
        "update_checks": config.federation.algorithm,
        "labels": len(data.labels) or None,
        "heldout_fraction": data.heldout_fraction,
        # The setting only applies to the files of a simulation.
        "used_fraction": None if real else data.train_fraction,
    }
    return {name: value for name, value in known.items() if value is not None}


def format_rank(adapter: str, rank: int, ranks: Mapping[str, int | None] = MappingProxyType({})) -> str:
    """Format an adapter's rank, followed by the adapter's kind unless it is LoRA, or by the rank of each site."""
    rank = 0 if adapter == NO_ADAPTER else rank
    notes = [adapter] if adapter != "lora" else [f"{site} {own}" for site, own in ranks.items() if own is not None]
    return f"{rank} ({', '.join(notes)})" if notes else str(rank)
