"""Results of attacks on a finished run: attack strength, confidence interval and a one-sentence summary."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Final

from fedtune.codec import decode, read_json_object, require
from fedtune.evaluation.audit_bound import MIN_CONFIDENCE
from fedtune.report.page.translations import load_catalog
from fedtune.spec import ConfigError, RunError, check_one_of, check_schema, spec

ATTACK_SCHEMA: Final = 1  # attack.json
FILE, PAGE = "attack.json", "attack.html"

NAMES = ("membership", "site", "reconstruction", "extraction", "attribute")
"""Codes of the attacks, in the order of the page; texts.toml has the words of the field for them."""
MEASURES = (
    *("auroc", "auroc_of_groups", "secret_of_10000", "picked_from_update"),
    *("exposed_secrets", "written_secrets", "written_answers", "guessed_labels"),
)
"""Codes of the attack measures."""


def check_confidence(value: float) -> None:
    """Check that the confidence of an interval or bound is at least `MIN_CONFIDENCE`, and below 1."""
    require("confidence", value, MIN_CONFIDENCE <= value < 1, f"must be in [{MIN_CONFIDENCE}, 1)")


@spec
class AttackFinding:
    """The result of one attack on a run.

    Attributes:
        attack: one of `NAMES`.
        measure: the metric in `strength`, one of `MEASURES`.
        sentence: a one-sentence summary of the result.
        strength: the attack's measured strength; None: the attack was not run or shows nothing, for the reason in
            `sentence`.
        low: lower end of the confidence interval of `strength`.
        high: upper end of the confidence interval.
        guessing: the strength of an attacker who guesses without access to the run's releases; below 1, because an
            attack shows nothing if guessing always succeeds.
        ceiling: the largest strength that the guarantee permits; None: the guarantee gives no bound.
        applies: whether the attack can be run on a model of this task at all.
        figures: additional values by name.
    """

    attack: str
    measure: str
    sentence: str
    strength: float | None = None
    low: float | None = None
    high: float | None = None
    guessing: float | None = None
    ceiling: float | None = None
    applies: bool = True
    figures: Mapping[str, float | None] | None = None

    def __post_init__(self) -> None:
        check_one_of("attack", self.attack, NAMES)
        check_one_of("measure", self.measure, MEASURES)
        interval = [value for value in (self.low, self.strength, self.high) if value is not None]
        ordered = all(below <= above for below, above in pairwise((-1.0, *interval, 1.0)))  # false for NaN
        whole = len(interval) == (0 if self.strength is None else 3)
        require("strength", interval, ordered and whole, "must be low, strength and high of an interval within [-1, 1]")
        require("guessing", self.guessing, 0 <= (self.guessing or 0) < 1, "must be in [0, 1)")


@spec
class RunAttacks:
    """The results of all attacks on one run."""

    run: str
    adapter_sha256: str  # digest of the attacked adapter, as in run.json
    epsilon: float | None  # epsilon of the run's whole plan at `delta`; None: unbounded
    delta: float
    confidence: float  # confidence level of each interval separately
    seconds: float
    findings: tuple[AttackFinding, ...]

    def __post_init__(self) -> None:
        check_confidence(self.confidence)

    def find(self, attack: str) -> tuple[AttackFinding, ...]:
        """Return the findings of one kind of attack."""
        return tuple(one for one in self.findings if one.attack == attack)


def read_findings(folder: Path, adapter_digest: str) -> RunAttacks | None:
    """Read the findings of `fedtune attack` from a run's folder; None if there are none, or they are of another model.

    Args:
        folder: the run's folder.
        adapter_digest: the digest of the run's adapter; see `combine_hashes`.

    Raises:
        RunError: the file is damaged.
    """
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        fields = read_json_object(path, key=FILE)
        check_schema("schema_version", fields.pop("schema_version", None), ATTACK_SCHEMA, of="attack")
        found = decode(RunAttacks, fields)
    except ConfigError as error:
        raise RunError(f"{path} is damaged or of another version: run fedtune attack again") from error
    return found if found.adapter_sha256 == adapter_digest else None


def findings_to_json(found: RunAttacks) -> bytes:
    """Serialize the findings as the content of attack.json; `read_findings` is the inverse."""
    fields = {**asdict(found), "schema_version": ATTACK_SCHEMA}
    return json.dumps(fields, indent=1, allow_nan=False).encode() + b"\n"


def format_figure(value: float | None) -> str:
    """Format a strength or a ceiling with three decimals, or in scientific notation below 0.01."""
    if value is None:
        return "-"
    return f"{value:.3f}" if value == 0 or abs(value) >= 0.01 else f"{value:.1e}"


def format_table_cells(finding: AttackFinding) -> tuple[str, ...]:
    """Return the table cells of one attack: attack, measure, guessing, strength, confidence interval, and ceiling."""
    words = load_catalog("en")
    names = words.code("attack", finding.attack).unescape(), words.code("attack_measure", finding.measure).unescape()
    ends = "-"
    if finding.low is not None and finding.high is not None:
        ends = f"{format_figure(finding.low)} to {format_figure(finding.high)}"
    guessing, strength, ceiling = map(format_figure, (finding.guessing, finding.strength, finding.ceiling))
    return *names, guessing, strength, ends, ceiling
