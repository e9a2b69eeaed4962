"""A run that is attacked on this machine, and what the attack found next to the run's guarantee."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from rich.console import Console

from fedtune.api.compose import compose_run, override_key, override_value
from fedtune.cli.command import print_answer
from fedtune.cli.interruptible_run import show_run
from fedtune.config import RunConfig, config_yaml
from fedtune.federation.run_folder import RunFolder
from fedtune.lab.audit.spec import AuditSpec
from fedtune.privacy.accountant import format_epsilon
from fedtune.report.derive.verdicts import read_audit, refuted_bounds
from fedtune.report.facts import Audit, AuditHitRate
from fedtune.runs.run_paths import find_run_folder
from fedtune.show.terminal_tables import SCHEMA_VERSION, Section, key_value_section, print_json, say, show
from fedtune.spec import ConfigError, RunError

_PREFIX = "audit."
_ATTACKER = {
    "gradient_canaries": "who sees every noisy step of a site, or (aggregated) only the average that all sites receive",
    "record_canaries": "who sees the final model only",
}
_SCORES = {"loss": "loss", "reference_ratio": "ratio"}


def attack_run(overrides: Sequence[str], *, as_json: bool) -> None:
    """Attack the run that the overrides describe, and print what was found; the arguments are those of `fedtune audit`.

    Raises:
        ConfigError: a setting is wrong, or the run has no claim to audit.
        RunError: the claim is refuted.
    """
    spec = parse_audit_spec([one for one in overrides if one.lstrip("+").startswith(_PREFIX)])
    config = compose_run([one for one in overrides if not one.lstrip("+").startswith(_PREFIX)])
    if spec.kind == "sensitivity":
        _search_violations(config, spec, as_json=as_json)
        return
    began = time.monotonic()
    # Here, because torch and Flower take seconds to import and a mistake in an override should not wait for them.
    from fedtune.lab.audit.experiment import make_auditable, run_audit

    config = make_auditable(config, spec)
    folder, console = find_run_folder(config), Console(stderr=as_json)
    again = "a new audit; this one cannot be resumed"
    show_run(config, folder, console, work=partial(run_audit, spec=spec), again=again, began=began)
    result = read_audit(folder)
    assert result is not None, "an audit that ended has written what it found"
    if as_json:
        print_json({"schema_version": SCHEMA_VERSION, "folder": str(folder), "result": result})
    else:
        show_findings(console, result, folder)
    sure, wrong = f"with {result.confidence:.0%} confidence, above the claimed", []
    for bound in refuted_bounds(result):
        shown = f"{site_label(bound.site)}: epsilon is at least {bound.lower_bound:.3f}"
        wrong.append(f"{shown} {sure} {format_epsilon(bound.claimed_epsilon)}")
    if wrong:
        raise RunError(f"the audit refutes the claim, so the implementation or the claim is wrong ({'; '.join(wrong)})")


def _search_violations(config: RunConfig, spec: AuditSpec, *, as_json: bool) -> None:
    """Search for a violation of the sensitivity bound, and print the result.

    Raises:
        RunError: a violation was found.
        ConfigError: the run has no privacy to audit.
    """
    from fedtune.lab.audit import sensitivity

    if not config.privacy.private:
        raise ConfigError("privacy", config.privacy.mechanism, "makes no privacy claim that could be audited")
    folder = find_run_folder(config)
    RunFolder(folder).create(config_yaml(config))
    found = sensitivity.search_violations(config, spec, folder, seed=config.seed)
    title = f"{found.tries} cases, one more {found.unit} each: the sum moved by at most {found.moved:.6f} clip norms"
    moved = {"above one clip norm": f"{found.exceeded}", f"other {found.unit}s, by a cell": f"{found.others_moved}"}
    told = {"schema_version": SCHEMA_VERSION, "folder": str(folder), "result": found}
    print_answer(
        told, [key_value_section({**moved, "written": str(folder / sensitivity.FILE)}, title=title)], as_json=as_json
    )
    if found.exceeded or found.others_moved:
        beyond = "one unit moved a sum by more than its own clipped contribution"
        raise RunError(f"{beyond}: no epsilon holds on this machine")


def parse_audit_spec(overrides: Sequence[str]) -> AuditSpec:
    """Build the audit's own settings from overrides such as `audit.canaries=500`."""
    given = {override_key(override): override_value(override) for override in overrides}
    for key, value in given.items():
        if isinstance(value, bool):
            raise ConfigError(key, str(value), "must be one plain value")
    return AuditSpec.from_mapping({key.removeprefix(_PREFIX): value for key, value in given.items()})


def show_findings(console: Console, result: Audit, folder: Path) -> None:
    """Print lower bounds next to the claims, the membership baselines, and an explanation in plain words."""
    show([_bounds_section(result), _membership_section(result)], console=console)
    say(_explain_result(result), style="red" if result.exceeded else "", console=console)
    canaries = "The adapter in this folder was trained on canaries: use it for nothing else (see AUDIT.txt)."
    say(canaries, style="yellow", console=console)
    say(f"audit:      {RunFolder(folder).audit}", console=console)


def _bounds_section(result: Audit) -> Section:
    wrong, rows = refuted_bounds(result), []
    for bound in result.bounds:
        figures = (format_epsilon(bound.claimed_epsilon), f"{bound.lower_bound:.3f}", f"{bound.best_possible:.3f}")
        guesses = f"{bound.right:,} of {bound.guesses:,}"
        rows.append((site_label(bound.site), *figures, guesses, f"{bound.canaries:,}"))
    headings = ("", "claimed", "shown", "ceiling", "right guesses", "canaries")
    styles = {number: "red" for number, bound in enumerate(result.bounds) if bound in wrong}
    shown = f"claimed: upper bound; shown: lower bound at {result.confidence:.0%} confidence"
    notes = [f"{shown}; ceiling: the largest bound that these guesses could show"]
    return Section("Epsilon: claimed, and shown by the attack", headings, rows, styles=styles, notes=notes)


def _explain_result(result: Audit) -> str:
    attacker = f"The attacker is one {_ATTACKER[result.method]}."
    if result.exceeded:
        worst = max(refuted_bounds(result), key=lambda bound: bound.lower_bound - bound.claimed_epsilon)
        shown = (
            f"{attacker} At {site_label(worst.site)} the attack shows an epsilon of at least {worst.lower_bound:.3f}"
        )
        claimed = f"the run claims at most {format_epsilon(worst.claimed_epsilon)}"
        return f"{shown}, and {claimed}: the implementation or the claim is wrong."
    blind = [site_label(bound.site) for bound in result.bounds if bound.best_possible <= bound.claimed_epsilon]
    more = "use more canaries or guesses, or a smaller delta (docs/audit.md)"
    limit = f" Even with every guess right it could not have refuted the claim at {', '.join(blind)}: {more}."
    above = [site_label(bound.site) for bound in result.bounds if bound.lower_bound > bound.claimed_epsilon]
    found = "No bound is above its claim, so nothing contradicts the guarantee."
    if above:
        found = f"The bound at {', '.join(above)} exceeds its claim on its own, but so little that it may be chance"
        bounds = f"the {len(result.bounds)} bounds refute no claim at {result.confidence:.0%} confidence"
        found = f"{found}: taken together, {bounds}."
    return f"{attacker} {found} This is no proof: another attack may show more.{limit if blind else ''}"


def site_label(site: str | None) -> str:
    """Return a site's name, or "aggregated" for the aggregated model."""
    return "aggregated" if site is None else site


def _membership_section(result: Audit) -> Section:
    if not result.membership:
        return Section()
    rates = [f"{rate.false_alarms:.1%}" for rate in result.membership[0].hit_rates]
    rows = []
    for one in result.membership:
        area = f"{one.auroc:.3f} [{one.auroc_low:.2f}, {one.auroc_high:.2f}]"
        rows.append((site_label(one.site), _SCORES[one.score], area, *map(_format_hit_rate, one.hit_rates)))
    headings = ("", "by", "AUROC", *(f"found at {rate}" for rate in rates))
    guessing = f"AUROC 0.5 is guessing; {result.confidence:.0%} intervals; ratio: loss relative to before training"
    found = "the share of training records found, at that rate of false alarms among unused records"
    notes = [f"{guessing}; {found}"]
    return Section("Real records: trained on, or never used?", headings, rows, words={0, 1}, notes=notes)


def _format_hit_rate(rate: AuditHitRate) -> str:
    if rate.found is None or rate.low is None or rate.high is None:
        return "few records"
    return f"{rate.found:.1%} [{100 * rate.low:.1f}, {100 * rate.high:.1f}]"
