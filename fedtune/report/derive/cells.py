"""Fields of an impact assessment and of technical documentation: what fedtune knows, and what only a site can say.

A cell is "auto" (facts of the run or ledger), "design" (what is so in every run of an unchanged fedtune, and was not
observed in this one), "site" (the names of facts that a person at the site supplies) or "missing" (facts that belong on
record and are not).  Facts are short texts: figures, names, hashes and codes.  No prose, no judgement: purpose, legal
basis and necessity are the controller's, and whether anything is anonymous or lawful is nobody's to compute.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping, Sequence
from math import ceil, isfinite
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING

from fedtune.federation.lead import Scores
from fedtune.model.spec import NO_ADAPTER
from fedtune.privacy.accountant import epsilon_text
from fedtune.privacy.run_plan import Plan
from fedtune.report.derive.profile import claimed, largest
from fedtune.report.derive.verdicts import worst
from fedtune.report.facts import RunFacts
from fedtune.report.model import Cells, CellState, Report
from fedtune.tasks.inputs import input_of
from fedtune.tasks.registry import task_named
from fedtune.words import score_text

if TYPE_CHECKING:  # it imports torch, which a ledger's report does without
    from fedtune.config import RunConfig

_DATA = tomllib.loads(Path(__file__).with_name("cells.toml").read_text(encoding="utf-8"))
FIELDS: Mapping[str, Mapping[str, Sequence[str]]] = _DATA["field"]  # `facts` that are known, and others `of_the_site`
BY_DESIGN: Mapping[str, str] = _DATA["by_design"]
CODES: Mapping[str, str] = {fact: section for section, facts in _DATA["codes"].items() for fact in facts}
"""Fact -> the section of texts that has words for its values."""
NUMBERS = frozenset(_DATA["numbers"]["facts"])
SETTINGS = frozenset(_DATA["settings"]["facts"])  # facts that a run's settings, or those of a ledger's runs, say
TRANSPORT = {"simulation": "in_process", "ray": "ray", "deployment": "mutual_tls"}


def rows(known: Mapping[str, str | None]) -> Cells:
    """The cells; `known`: name of a fact -> its value, None where it is not known."""
    assert known.keys() <= {name for field in FIELDS.values() for name in field["facts"]}, "a fact that no cell shows"
    made: dict[str, dict[CellState, dict[str, str]]] = {}
    for code, field in FIELDS.items():
        found: dict[CellState, dict[str, str]] = {"auto": {}, "design": {}, "missing": {}}
        for name in field["facts"]:
            value = known.get(name)
            found["missing" if value is None else "design" if name in BY_DESIGN else "auto"][name] = value or ""
        found["site"] = dict.fromkeys(field["of_the_site"], "")
        made[code] = {state: facts for state, facts in found.items() if facts}
    return made


def of_report(report: Report) -> Cells:
    """The cells of a report; what its figures say is taken from the report, whose own cells are not looked at."""
    facts, libraries = report.facts, report.facts.provenance.libraries
    # What follows from the sites' own figures is of the worst site each.
    verdict = worst(site.verdict for site in report.sites)
    promised = verdict.state != "no_guarantee"
    epsilons = [claimed(site.spent) for site in report.sites]
    meanings = [site.meaning for site in report.sites if site.meaning]
    mechanisms = {mechanism.sampling_run for site in report.sites for mechanism in site.mechanisms}
    by_mechanism = [meaning.right_of_100_mechanism for meaning in meanings]
    ceiling, mechanism = _of_100(meaning.right_of_100_ceiling for meaning in meanings), _of_100(by_mechanism)
    bound = (ceiling if None in by_mechanism else mechanism) if promised else "100"
    failures = [meaning.expected_failures for meaning in meanings if meaning.expected_failures is not None]
    summed = any(row.shared for site in report.sites for row in site.mechanisms)
    technologies = {"federated_learning": True, "secure_aggregation": summed, "differential_privacy": promised}
    version = libraries.get("dp-accounting")
    sizes = {site: size or 0 for site, size in facts.declared_sizes.items()}
    known: dict[str, str | None] = {
        **BY_DESIGN,
        **facts.settings,
        **{fact: attrgetter(place)(report) for fact, place in _DATA["places"].items()},
        "verdict": verdict.state,
        "epsilon": epsilon_text(largest(epsilons) if promised else None),
        "delta": f"{facts.delta:g}",
        "expected_failures": _number(max(failures, default=None)),
        "right_of_100_ceiling": ceiling if promised else "100",
        "right_of_100_mechanism": ("not_computed" if None in by_mechanism else mechanism) if promised else None,
        "singling_out_bound": bound,
        "linkability_bound": bound,
        "sampling_run": _listed(sorted(mechanisms)),
        "secure_aggregation": "yes" if summed else "no",
        "technologies_on": _listed(name for name, on in technologies.items() if on),
        "technologies_off": _listed(name for name, on in technologies.items() if not on),
        "released": _listed(report.released),
        "known_limits": _listed(report.not_protected),
        "accountant": f"PLD, RDP: dp-accounting {version}" if version else "PLD, RDP: dp-accounting",
        "libraries": _listed(f"{name} {version}" for name, version in libraries.items()),
        "declared_sizes": ", ".join(f"{name}: {size}" for name, size in sizes.items()),
        "declared_total": str(sum(sizes.values())),
        "num_sites": str(len(sizes)),
    }
    if isinstance(facts, RunFacts):
        parameters = facts.trained_parameters
        known |= {
            "mechanism": "dp_sgd" if facts.plan.private else "none",
            "transport": TRANSPORT.get(facts.settings.get("runtime", "")),
            "trained_parameters": None if parameters is None else str(parameters),
            "parameters_per_record": None if parameters is None else f"{parameters / sum(sizes.values()):.3g}",
            "seconds": _number(facts.seconds),
            "scores_before": _scores(facts.before),
            "scores_final": _scores(facts.final),
        }
    else:
        verified = facts.verification
        up_to_there = verified is not None and verified.anchor_sequence is not None and not verified.rollback_excluded
        to_the_end = verified is not None and verified.rollback_excluded
        known |= {
            "runtime": "simulation" if facts.simulated else None,
            "mechanism": _listed("dp_sgd" if run.plan.private else "none" for run in facts.runs),
            "base_model": _listed(run.base_model for run in facts.runs),
            "ledger_verified": "no" if verified is None else "yes",
            "rollback_excluded": "up_to_the_anchor" if up_to_there else "yes" if to_the_end else "no",
        }
    return rows(known)


def settings_of(config: RunConfig, plan: Plan) -> dict[str, str]:
    """Facts of cells that a run's settings say."""
    data, targets, federation = config.data, config.lora.modules, config.federation
    columns = task_named(config.task).columns(data, unit=plan.unit)
    # How much of a file a simulation uses says nothing of real sites' files.
    used = None if config.runtime.kind == "deployment" else data.train_fraction
    known = {
        "columns_used": _listed(columns),
        "runtime": config.runtime.kind,
        "most_tokens": str(data.max_length),
        "modality": input_of(data).modality,
        "rank": rank_text(config.lora.kind, config.lora.matrices),
        "target_modules": _listed(targets) or "none",
        "update_checks": federation.strategy,
        "labels": str(len(data.labels)) if data.labels else None,
        "heldout_fraction": _number(data.heldout_fraction),
        "used_fraction": _number(used),
    }
    return {name: value for name, value in known.items() if value is not None}


def rank_text(adapter: str, rank: int) -> str:
    """An adapter's rank, with its kind where it isn't LoRA."""
    rank = 0 if adapter == NO_ADAPTER else rank
    return str(rank) if adapter == "lora" else f"{rank} ({adapter})"


def _scores(metrics: Scores) -> str | None:
    return _listed(f"{name} {score_text(one)}" for name, one in metrics.items() if one is not None and isfinite(one))


def _of_100(values: Iterable[float | None]) -> str | None:
    """In hundredths, upwards."""
    return _number(max((ceil(value * 100) / 100 for value in values if value is not None), default=None))


def _listed(names: Iterable[str]) -> str | None:
    return ", ".join(dict.fromkeys(names)) or None


def _number(value: float | None) -> str | None:
    return None if value is None else f"{value:.6g}"
