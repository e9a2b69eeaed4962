"""What fedtune knows for the cells of an impact assessment, as short texts: figures, names, hashes and codes.

A fact that is not known is left out, so that its cell shows as missing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from fedtune.federation.results import FinalResult
from fedtune.privacy.accountant import epsilon_text
from fedtune.report.cells import BY_DESIGN
from fedtune.report.ledger_record import LedgerRecord
from fedtune.report.model import Provenance, Scores
from fedtune.report.site_model import SiteReport
from fedtune.report.verdicts import worst

if TYPE_CHECKING:  # it imports torch, which a ledger's report does without
    from fedtune.report.run_record import RunRecord

Facts = dict[str, str | None]
_ALWAYS: Facts = dict(BY_DESIGN)
_TRANSPORT = {"simulation": "in_process", "ray": "ray", "deployment": "mutual_tls"}


def of_run(record: RunRecord, sites: Sequence[SiteReport], provenance: Provenance) -> dict[str, str]:
    """Those of a run, as its lead knows them."""
    config, data = record.config, record.config.data
    sizes = config.declared_sizes()
    final = record.result.final if record.result else FinalResult(metrics={})
    targets = config.lora.target_modules
    known = _ALWAYS | figures(sites, delta=record.plan.delta) | _of_software(provenance)
    known |= {
        "unit": record.plan.unit,
        "dataset": data.dataset,
        "task": config.task,
        "declared_sizes": _pairs(sizes),
        "declared_total": str(sum(sizes.values())),
        "columns_used": _listed(data.needed_columns(config.task, unit=record.plan.unit)),
        "num_sites": str(len(sites)),
        "runtime": config.runtime.kind,
        "most_tokens": str(data.max_length),
        "trained_parameters": _parameters(record),
        "parameters_per_record": _per_record(_parameters(record), sum(sizes.values())),
        "rank": str(config.lora.rank),
        "target_modules": targets if isinstance(targets, str) else _listed(targets),
        "update_checks": config.federation.strategy,
        "mechanism": "dp_sgd" if record.plan.private else "none",
        "transport": _TRANSPORT[config.runtime.kind],
        "seconds": _number(final.seconds),
        "labels": str(len(data.labels)) if data.labels else None,
        "heldout_fraction": _number(data.heldout_fraction),
        # How much of a file a simulation uses says nothing of real sites' files.
        "used_fraction": None if record.deployed else _number(data.train_fraction),
        "scores_before": _scores(record.state.metrics_before if record.state else final.metrics_before),
        "scores_final": _scores(final.metrics),
    }
    return _known(known)


def of_ledger(record: LedgerRecord, site: SiteReport, provenance: Provenance) -> dict[str, str]:
    """Those of a ledger, over all its runs."""
    policy, history = record.policy, record.history
    sizes = {dataset.id: dataset.declared_size for dataset in policy.dataset}
    proposals = [run.proposal for run in history.runs.values()]
    known = _ALWAYS | figures([site], delta=history.delta) | _of_software(provenance)
    known |= {
        "unit": history.opened.unit,
        "dataset": _listed(sizes),
        "task": _listed(proposal.task for proposal in proposals),
        "declared_sizes": _pairs(sizes),
        "declared_total": str(sum(sizes.values())),
        "num_sites": "1",
        "rank": _listed(str(proposal.rank) for proposal in proposals),
        "target_modules": _listed(name for proposal in proposals for name in proposal.target_modules),
        "mechanism": _listed("dp_sgd" if run.plan.private else "none" for run in history.runs.values()),
        "rollback_excluded": _rollback_excluded(record),
        "ledger_verified": _yes_or_no(record.verified is not None),
        "base_model": _listed(proposal.base_model for proposal in proposals),
    }
    return _known(known)


def of_report(
    *, released: Iterable[str], randomness: str, not_protected: Iterable[str], date: str | None
) -> dict[str, str]:
    """Those that a report says elsewhere, too."""
    return _known(
        {
            "released": _listed(released),
            "randomness": randomness,
            "known_limits": _listed(not_protected),
            "date": date,
        }
    )


def figures(sites: Sequence[SiteReport], *, delta: float) -> Facts:
    """Those that follow from the sites' own figures, of the worst site each."""
    verdict = worst(site.verdict for site in sites)
    promised = verdict.state != "no_guarantee"
    epsilons = [site.spent.epsilon if site.spent else None for site in sites]
    meanings = [site.meaning for site in sites if site.meaning]
    mechanisms = {mechanism.sampling_run for site in sites for mechanism in site.mechanisms}
    by_mechanism = [meaning.right_of_100_mechanism for meaning in meanings]
    ceiling = _of_100(meaning.right_of_100_ceiling for meaning in meanings) if promised else "100"
    failures = [meaning.expected_failures for meaning in meanings if meaning.expected_failures is not None]
    technologies = ["federated_learning", *(["differential_privacy"] if promised else [])]
    return {
        "verdict": verdict.state,
        "epsilon": "unbounded" if not promised or None in epsilons else epsilon_text(_largest(epsilons)),
        "delta": f"{delta:g}",
        "expected_failures": _number(max(failures, default=None)),
        "right_of_100_ceiling": ceiling,
        "right_of_100_mechanism": _by_mechanism(by_mechanism) if promised else None,
        "singling_out_bound": ceiling,
        "linkability_bound": ceiling,
        "sampling_run": _listed(sorted(mechanisms)),
        "technologies_on": _listed(technologies),
        "technologies_off": _listed(["secure_aggregation", *([] if promised else ["differential_privacy"])]),
    }


def _of_software(provenance: Provenance) -> Facts:
    version = provenance.libraries.get("dp-accounting")
    return {
        "accountant": f"PLD, RDP: dp-accounting {version}" if version else "PLD, RDP: dp-accounting",
        "base_model": provenance.model,
        "base_model_sha256": provenance.model_sha256,
        "base_model_licence": provenance.model_licence,
        "fedtune_version": provenance.fedtune_version,
        "hardware": provenance.machine,
        "libraries": _listed(f"{name} {version}" for name, version in provenance.libraries.items()),
    }


def _parameters(record: RunRecord) -> str | None:
    return str(sum(value.size for value in record.state.adapter.tensors.values())) if record.state else None


def _per_record(parameters: str | None, records: int) -> str | None:
    return None if parameters is None else f"{int(parameters) / records:.3g}"


def _scores(metrics: Scores) -> str | None:
    shown = [(name, value) for name, value in metrics.items() if value is not None and math.isfinite(value)]
    return _listed(f"{name} {value:.4f}" for name, value in shown)


def _by_mechanism(values: Sequence[float | None]) -> str | None:
    return "not_computed" if None in values else _of_100(values)


def _rollback_excluded(record: LedgerRecord) -> str:
    if record.verified is not None and record.verified.rollback_excluded and not record.anchored_to_the_end:
        return "up_to_the_anchor"
    return _yes_or_no(record.anchored_to_the_end)


def _of_100(values: Iterable[float | None]) -> str | None:
    """In hundredths, upwards."""
    return _number(max((math.ceil(value * 100) / 100 for value in values if value is not None), default=None))


def _largest(values: Iterable[float | None]) -> float:
    return max((value for value in values if value is not None), default=0.0)


def _pairs(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{name}: {size}" for name, size in sizes.items())


def _listed(names: Iterable[str]) -> str | None:
    return ", ".join(dict.fromkeys(names)) or None


def _number(value: float | None) -> str | None:
    return None if value is None else f"{value:.6g}"


def _yes_or_no(value: bool) -> str:
    return "yes" if value else "no"


def _known(facts: Facts) -> dict[str, str]:
    def usable() -> Iterator[tuple[str, str]]:
        for name, value in facts.items():
            if value is not None:
                yield name, value

    return dict(usable())
