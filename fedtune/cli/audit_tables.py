"""An audit's findings on the terminal."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from fedtune.federation.run_folder import RunFolder
from fedtune.privacy.accountant import epsilon_text
from fedtune.report.derive.audit_bounds import refuted
from fedtune.report.model import Audit, AuditHitRate, AuditMembership

_ATTACKER = {
    "gradient_canaries": "who sees every noisy step of a site, or (aggregated) only the average that all sites receive",
    "record_canaries": "who sees the final model only",
}
_SCORES = {"loss": "loss", "reference_ratio": "ratio"}


def show_findings(console: Console, result: Audit, folder: Path) -> None:
    """Lower bounds beside claims, the membership baselines, and both in plain words."""
    console.print(_bounds(result))
    if result.membership:
        console.print(_membership(result))
    console.print(_meaning(result), soft_wrap=True)
    console.print(
        "[yellow]The adapter in this folder holds canaries: use it for nothing else (AUDIT.txt says so).[/yellow]",
        soft_wrap=True,
    )
    console.print(f"audit:      {RunFolder(folder).audit}", soft_wrap=True)


def _bounds(result: Audit) -> Table:
    wrong = refuted(result)
    table = Table(
        title="Epsilon: claimed, and shown by the attack",
        caption=f"claimed: at most; shown: at least, at {result.confidence:.0%} confidence; "
        "ceiling: the most that so many guesses about so many canaries can show",
    )
    for heading in ("", "claimed", "shown", "ceiling", "right guesses", "canaries"):
        table.add_column(heading, justify="right" if heading else "left")
    for bound in result.bounds:
        table.add_row(
            place(bound.site),
            epsilon_text(bound.claimed_epsilon),
            f"{bound.lower_bound:.3f}",
            f"{bound.best_possible:.3f}",
            f"{bound.right:,} of {bound.guesses:,}",
            f"{bound.canaries:,}",
            style="red" if bound in wrong else "",
        )
    return table


def _meaning(result: Audit) -> str:
    attacker = f"The attacker is one {_ATTACKER[result.method]}."
    if result.exceeded:
        worst = max(refuted(result), key=lambda bound: bound.lower_bound - bound.claimed_epsilon)
        return (
            f"{attacker} [red]At {place(worst.site)} the attack shows an epsilon of at least {worst.lower_bound:.3f}, "
            f"and the run claims at most {epsilon_text(worst.claimed_epsilon)}: the implementation or the claim is "
            "wrong.[/red]"
        )
    blind = [place(bound.site) for bound in result.bounds if bound.best_possible <= bound.claimed_epsilon]
    limit = (
        f" Even with every guess right it could not have refuted the claim at {', '.join(blind)}: that takes more "
        "canaries or guesses, or a smaller delta (docs/audit.md)."
        if blind
        else ""
    )
    above = [place(bound.site) for bound in result.bounds if bound.lower_bound > bound.claimed_epsilon]
    found = (
        f"The bound at {', '.join(above)} is above its claim by itself, but so little that it may be by chance: taken "
        f"together, the {len(result.bounds)} bounds refute no claim at {result.confidence:.0%} confidence."
        if above
        else "No bound is above its claim, so nothing contradicts the guarantee."
    )
    return f"{attacker} {found} That is no proof of it: another attack may show more.{limit}"


def place(site: str | None) -> str:
    """A site's name, or what the aggregated model is called."""
    return "aggregated" if site is None else site


def _membership(result: Audit) -> Table:
    table = Table(
        title="Real records: trained on, or never used?",
        caption=f"AUROC 0.5 is guessing; {result.confidence:.0%} intervals; ratio: the loss against that before "
        "training; the share found among those trained on, at so many false alarms among those never used",
    )
    rates = [f"{rate.false_alarms:.1%}" for rate in result.membership[0].hit_rates]
    for heading in ("", "by", "AUROC", *(f"found at {rate}" for rate in rates)):
        table.add_column(heading, justify="left" if heading in ("", "by") else "right")
    for one in result.membership:
        table.add_row(place(one.site), _SCORES[one.score], _area(one), *map(_rate, one.hit_rates))
    return table


def _area(one: AuditMembership) -> str:
    return f"{one.auroc:.3f} [{one.auroc_low:.2f}, {one.auroc_high:.2f}]"


def _rate(rate: AuditHitRate) -> str:
    if rate.found is None or rate.low is None or rate.high is None:
        return "few records"
    return f"{rate.found:.1%} [{100 * rate.low:.1f}, {100 * rate.high:.1f}]"
