"""Terminal output of an audit: lower bounds next to the claims, and membership-inference baselines."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from fedtune.federation.run_folder import RunFolder
from fedtune.privacy.accountant import format_epsilon
from fedtune.report.derive.verdicts import list_refuted_bounds
from fedtune.report.facts import Audit, AuditHitRate
from fedtune.show.terminal_tables import Section, say, show
from fedtune.spec import RunError

_ATTACKER = {
    "gradient_canaries": "who sees every noisy step of a site, or (aggregated) only the average that all sites receive",
    "record_canaries": "who only sees the final model",
}
_SCORES = {"loss": "loss", "reference_ratio": "ratio"}


def require_not_refuted(result: Audit) -> None:
    """Raise an error if a lower bound refutes its claim.

    Raises:
        RunError: a lower bound exceeds the claimed epsilon; the message contains site, bound and claim.
    """
    sure, wrong = f"with {result.confidence:.0%} confidence, above the claimed", []
    for bound in list_refuted_bounds(result):
        shown = f"{format_site_label(bound.site)}: epsilon is at least {bound.lower_bound:.3f}"
        wrong.append(f"{shown} {sure} {format_epsilon(bound.claimed_epsilon)}")
    if wrong:
        raise RunError(f"the audit refutes the claim, so the implementation or the claim is wrong ({'; '.join(wrong)})")


def show_findings(console: Console, result: Audit, folder: Path) -> None:
    """Print the lower bounds next to the claims, the membership baselines, and a plain-language explanation."""
    show([_build_bounds_section(result), _build_membership_section(result)], console=console)
    say(_explain_result(result), style="red" if result.exceeded else "", console=console)
    canaries = "The adapter in this folder was trained on canaries: do not use it (see AUDIT.txt)."
    say(canaries, style="yellow", console=console)
    say(f"audit:      {RunFolder(folder).audit}", console=console)


def _build_bounds_section(result: Audit) -> Section:
    wrong, rows = list_refuted_bounds(result), []
    for bound in result.bounds:
        gaussian = "" if bound.fdp_bound is None else f"{bound.fdp_bound:.3f}"
        bounds = f"{bound.lower_bound:.3f}", gaussian, f"{bound.best_possible:.3f}"
        guesses = f"{bound.correct:,} of {bound.guesses:,}"
        claimed = format_epsilon(bound.claimed_epsilon)
        rows.append((format_site_label(bound.site), claimed, *bounds, guesses, f"{bound.canaries:,}"))
    headings = ("", "claimed", "shown", "as Gaussian", "ceiling", "right guesses", "canaries")
    styles = {number: "red" for number, bound in enumerate(result.bounds) if bound in wrong}
    shown = f"claimed: upper bound; shown: lower bound at {result.confidence:.0%} confidence"
    notes = [f"{shown}; ceiling: the largest bound that these guesses could show"]
    notes.append("as Gaussian: the f-DP lower bound, if noise and sampling together act like one Gaussian mechanism")
    return Section("Epsilon: claimed, and shown by the attack", headings, rows, styles=styles, notes=notes)


def _explain_result(result: Audit) -> str:
    attacker = f"The attacker is one {_ATTACKER[result.method]}."
    if result.exceeded:
        worst = max(list_refuted_bounds(result), key=lambda bound: bound.lower_bound - bound.claimed_epsilon)
        shown = f"the attack shows an epsilon of at least {worst.lower_bound:.3f}"
        claimed = f"the run claims at most {format_epsilon(worst.claimed_epsilon)}"
        both = f"At {format_site_label(worst.site)} {shown}, and {claimed}"
        return f"{attacker} {both}: the implementation or the claim is wrong."
    blind = [format_site_label(bound.site) for bound in result.bounds if bound.best_possible <= bound.claimed_epsilon]
    more = "use more canaries or guesses, or a smaller delta (docs/audit.md)"
    limit = f" Even with every guess right it could not have refuted the claim at {', '.join(blind)}: {more}."
    above = [format_site_label(bound.site) for bound in result.bounds if bound.lower_bound > bound.claimed_epsilon]
    found = "No bound is above its claim, so nothing contradicts the guarantee."
    if above:
        found = f"The bound at {', '.join(above)} exceeds its claim on its own, but so little that it may be chance"
        bounds = f"the {len(result.bounds)} bounds refute no claim at {result.confidence:.0%} confidence"
        found = f"{found}: taken together, {bounds}."
    return f"{attacker} {found} This is no proof: another attack may show more.{limit if blind else ''}"


def format_site_label(site: str | None) -> str:
    """Return a site's name, or "aggregated" for the aggregated model."""
    return "aggregated" if site is None else site


def _build_membership_section(result: Audit) -> Section:
    if not result.membership:
        return Section()
    rates = [f"{rate.false_positive_rate:.1%}" for rate in result.membership[0].hit_rates]
    rows = []
    for one in result.membership:
        area = f"{one.auroc:.3f} [{one.auroc_low:.2f}, {one.auroc_high:.2f}]"
        rows.append((format_site_label(one.site), _SCORES[one.score], area, *map(_format_hit_rate, one.hit_rates)))
    headings = ("", "by", "AUROC", *(f"found at {rate}" for rate in rates))
    guessing = f"AUROC 0.5 is guessing; {result.confidence:.0%} intervals; ratio: loss relative to before training"
    found = "the share of training records found, at that rate of false alarms among unused records"
    notes = [f"{guessing}; {found}"]
    return Section("Real records: trained on, or never used?", headings, rows, words={0, 1}, notes=notes)


def _format_hit_rate(rate: AuditHitRate) -> str:
    if rate.true_positive_rate is None or rate.low is None or rate.high is None:
        return "few records"
    return f"{rate.true_positive_rate:.1%} [{100 * rate.low:.1f}, {100 * rate.high:.1f}]"
