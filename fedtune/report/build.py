"""`report.json` and a plain `report.html` of a finished run: what was promised, spent and assumed."""

from __future__ import annotations

import dataclasses
import html
import json
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fedtune import __version__
from fedtune.config import RunConfig
from fedtune.privacy import events
from fedtune.privacy.accountant import epsilon_text
from fedtune.privacy.durable import write_durably
from fedtune.privacy.plan import Plan

SCHEMA_VERSION = 1
_LIBRARIES = ("dp-accounting", "flwr", "numpy", "opacus", "peft", "torch", "transformers")


def write_report(folder: Path, config: RunConfig, run: Mapping[str, Any]) -> None:
    """Write `report.json` and `report.html` into a run folder."""
    report = report_json(config, run)
    write_durably(folder / "report.json", json.dumps(report, indent=2).encode() + b"\n")
    write_durably(folder / "report.html", report_html(report).encode())


def report_json(config: RunConfig, run: Mapping[str, Any]) -> dict[str, Any]:
    """Everything needed to recompute the claim: each site's event, delta, accountant and version."""
    privacy = run["privacy"]
    promised = privacy["epsilon"] is not None and not privacy["seeded_noise"]
    return {
        "schema_version": SCHEMA_VERSION,
        "run": config.name,
        "verdict": _verdict(config, privacy),
        "promise": _promise(privacy) if promised else None,
        "unit": privacy["unit"],
        "neighbouring_relation": privacy["neighbouring_relation"],
        "target_epsilon": config.privacy.epsilon if config.privacy.private else None,
        "delta": privacy["delta"],
        "epsilon": privacy["epsilon"],
        "sites": {site: _site(config, site, spent) for site, spent in privacy["sites"].items()},
        "mechanism": _mechanism(config, seeded_noise=privacy["seeded_noise"]),
        "accountant": {
            "headline": "PLD",
            "cross_check": "RDP",
            "library": f"dp-accounting {version('dp-accounting')}",
            "direction": "both are upper bounds",
            "composition_covers": ["every round and step of this run, charged retries included"],
            "composition_leaves_out": ["other runs on the same records", "tuning trials", "the lead's evaluation data"],
        },
        "assumptions": [
            "units are disjoint between sites (asserted by each site)",
            f"in {config.model.dtype}, one record moves the other records' clipped gradients by rounding only; "
            "measured at adapters of trained size (docs/threat_model.md), not accounted for",
        ],
        "releases": _releases(config),
        "not_protected": [
            "what the adapter teaches about people in general",
            "the lead's own validation and test files",
            "whether a site replied, and how long it took",
            "declared sizes, label set and configuration: public by choice",
            "the base model's pretraining data",
            "a person with several records, beyond what k records of one person imply",
        ],
        "utility": {
            "rounds": [{"round": r["round"], **r["metrics"]} for r in run["rounds"]],
            "final": run["final"]["metrics"],
            "before": run["final"]["metrics_before"],
        },
        "provenance": _provenance(config, run["config_sha256"]),
    }


def report_html(report: Mapping[str, Any]) -> str:
    """A self-contained page with the report's first figures and one table of sites; no script, no network."""
    verdict = report["verdict"]
    headings = ["site", "declared size", "steps", "sampling rate", "noise multiplier", "epsilon (PLD)", "epsilon (RDP)"]
    rows = "".join(_row("td", _cells(site, fields)) for site, fields in report["sites"].items())
    scores = "".join(
        _row("td", [name, "not finite" if value is None else f"{value:.4f}"])
        for name, value in report["utility"]["final"].items()
    )
    assumed = "".join(f"<li>{html.escape(text)}</li>" for text in report["assumptions"])
    not_covered = "".join(f"<li>{html.escape(text)}</li>" for text in report["not_protected"])
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Privacy report: {html.escape(report["run"])}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a; }}
table {{ border-collapse: collapse; display: block; overflow-x: auto; }}
th, td {{ border: 1px solid #888; padding: .3rem .6rem; text-align: right; }}
th:first-child, td:first-child {{ text-align: left; }}
.verdict {{ border-left: .4rem solid #444; padding-left: 1rem; font-size: 1.1rem; }}
</style></head><body>
<h1>Privacy report: {html.escape(report["run"])}</h1>
<p class="verdict"><strong>{html.escape(verdict["state"])}.</strong> {html.escape(verdict["why"])}</p>
<p>{html.escape(report["promise"] or "Records of this run are not protected by differential privacy.")}</p>
<h2>What each site has spent</h2><table>{_row("th", headings)}{rows}</table>
<h2>Scores on the lead's test file</h2><table>{_row("th", ["metric", "value"])}{scores}</table>
<h2>Assumed</h2><ul>{assumed}</ul>
<h2>Not protected</h2><ul>{not_covered}</ul>
<p>report.json beside this page holds every figure, the events and the versions to recompute them.</p>
</body></html>
"""


def _mechanism(config: RunConfig, *, seeded_noise: bool) -> dict[str, Any]:
    """What was done to each step's sum, and how records were drawn for it."""
    return {
        "name": "DP-SGD" if config.privacy.private else "none",
        "max_grad_norm": config.privacy.max_grad_norm if config.privacy.private else None,
        "clipping": "one L2 norm per record over all trained tensors together" if config.privacy.private else None,
        "sampling_assumed": "poisson",
        "sampling_run": "poisson",
        "randomness": "seed of the configuration" if seeded_noise else "operating system's CSPRNG",
    }


def _provenance(config: RunConfig, config_sha256: str) -> dict[str, Any]:
    """What the run was made of, by version and hash."""
    return {
        "fedtune_version": __version__,
        "config_sha256": config_sha256,
        "model": config.model.path,
        "model_sha256": config.model.sha256,
        "model_licence": config.model.licence,
        "dataset": config.data.dataset,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "libraries": {name: version(name) for name in _LIBRARIES},
    }


def _cells(site: str, fields: Mapping[str, Any]) -> list[str]:
    """One site's row; a bound where the site fell silent is called so."""
    most = "at most " if fields["upper_bound"] else ""
    numbers = [f"{fields['declared_size']:,}", f"{most}{fields['steps']}"]
    settings = [f"{fields[key]:g}" for key in ("sampling_rate", "noise_multiplier")]
    return [site, *numbers, *settings, *(most + epsilon_text(fields[key]) for key in ("epsilon", "epsilon_rdp"))]


def _site(config: RunConfig, site: str, spent: Mapping[str, Any]) -> dict[str, Any]:
    # With the noise that was calibrated then: searching for it again takes a second.
    privacy = dataclasses.replace(config.privacy, noise_multiplier=spent["noise_multiplier"] or None)
    plan = Plan.of(privacy, local_steps=config.training.local_steps, num_rounds=config.federation.num_rounds)
    event = plan.event(rounds=spent["rounds"])
    return {**spent, "declared_size": config.declared_sizes()[site], "event": events.to_json(event)}


def _releases(config: RunConfig) -> str:
    scores = " and noised scores of its held-out records" if config.privacy.metrics == "noised" else ""
    return f"each site's adapter{scores} after each round, to the server; the averages, to every site"


def _verdict(config: RunConfig, privacy: Mapping[str, Any]) -> dict[str, str]:
    """Three states only; a run that cannot promise says why."""
    if privacy["epsilon"] is None:
        return {"state": "NO GUARANTEE", "why": "The run added no noise."}
    if privacy["seeded_noise"]:
        return {
            "state": "NO GUARANTEE",
            "why": "The noise came from the configured seed: a study, not a protected run.",
        }
    spent, target = privacy["epsilon"], config.privacy.epsilon
    why = f"Every site spent at most epsilon {epsilon_text(spent)}; the run's target was {target:g}."
    return {"state": "WITHIN" if spent <= target else "EXCEEDED", "why": why}


def _promise(privacy: Mapping[str, Any]) -> str:
    return (
        f"Adding or removing one {privacy['unit']} at one site changes the probability of anything that left the site "
        f"by at most a factor of e^{epsilon_text(privacy['epsilon'])}, plus {privacy['delta']:g}."
    )


def _row(cell: str, values: list[str]) -> str:
    return "<tr>" + "".join(f"<{cell}>{html.escape(value)}</{cell}>" for value in values) + "</tr>"
