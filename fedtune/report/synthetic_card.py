"""The card of a file with synthetic records: how they were generated, their privacy guarantee, and their limits."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from fedtune.codec import decode, parse_json, read_bounded_file, require
from fedtune.evaluation.spec import WritingSpec
from fedtune.formatting import total
from fedtune.privacy.selection import compute_released_epsilon
from fedtune.report.facts import RunFacts, StartAdapter, State
from fedtune.report.model import Report
from fedtune.report.model_card import format_privacy_loss, render_card
from fedtune.report.page.translations import load_catalog
from fedtune.report.page.view import Words
from fedtune.runs.lineage import is_counted
from fedtune.sites.run_records import find_card_path, hash_file
from fedtune.spec import RUN_SCHEMA, ConfigError, check_at_least, check_fraction, spec

Told = Mapping[str, Any]  # fields of a machine-readable card, as plain values


@spec
class Behind:
    """A run whose data influenced the synthetic records, with its adapter, its privacy loss and its start adapter."""

    run: str
    adapter_digest: str
    task: str | None
    config_sha256: str | None
    epsilon: float | None
    delta: float
    unit: str
    verdict: State
    start: StartAdapter | None

    def __post_init__(self) -> None:
        for told in (self, self.start or self):
            check_at_least("epsilon", told.epsilon or 0.0, 0)
            check_fraction("delta", told.delta or 0.0, zero=True)


@spec
class SyntheticRecords(WritingSpec):
    """How the synthetic records were generated, selected and labeled."""

    rows: int
    prompts: int
    missing: int
    left_out: Mapping[str, int]
    shares: Literal["declared", "voted", "varied"]
    prompts_file: str | None = None
    prompts_sha256: str | None = None
    candidates: int | None = None
    chosen_by: str | None = None
    labels: tuple[Mapping[str, str], ...] = ()
    beside: Told | None = None
    classified: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        WritingSpec.__post_init__(self)  # super() fails in a dataclass with slots
        counts = {"rows": self.rows, "prompts": self.prompts, "missing": self.missing}
        for key, count in (*counts.items(), *self.left_out.items()):
            check_at_least(key, count, 0)
        right = all(one.keys() == {"column", "by"} for one in self.labels)
        require("labels", list(self.labels), right, 'must each have exactly the keys "column" and "by"')


@spec
class Figures:
    """Statistics on the lengths of the texts and on their similarity to each other."""

    texts: int
    distinct: float  # share of texts that occur only once
    words: tuple[int, int, int]  # 5th, 50th and 95th percentile of the number of words
    distinct_pairs: float  # distinct word bigrams divided by all bigrams (distinct-2, Li et al. 2016)


@spec
class Card:
    """The machine-readable card; the first run generated the records, and the keys of `figures` are file names."""

    schema_version: int
    file: str
    sha256: str
    runs: tuple[Behind, ...]
    together: Mapping[str, float | None]
    made: SyntheticRecords
    figures: Mapping[str, Figures]

    def __post_init__(self) -> None:
        epsilon, delta = compose_losses([asdict(run) for run in self.runs]) if self.runs else (None, None)
        if not self.runs or self.together != {"epsilon": epsilon, "delta": delta}:
            raise ConfigError("together", self.together, "must be the sum of the runs' privacy losses")


def compose_losses(runs: Sequence[Told]) -> tuple[float | None, float]:
    """Bound epsilon and delta of all runs on a card for one record or person by basic composition: both are summed.

    Start adapters also count (`is_counted`), because they may have been trained on the same record or person.
    An epsilon of None means unbounded.
    """
    starts = [run["start"] for run in runs if run["start"] is not None and is_counted(run["start"])]
    parts = [*remove_duplicates(runs), *remove_duplicates(starts)]
    if any(part["epsilon"] is None or part["delta"] is None or part["unit"] != runs[0]["unit"] for part in parts):
        return None, total(run["delta"] for run in runs)
    return total(part["epsilon"] for part in parts), total(part["delta"] for part in parts)


def remove_duplicates(told: Sequence[Told]) -> list[Told]:
    """Remove repeated entries, because the releases of one adapter count once, no matter how often it is used."""
    return [one for place, one in enumerate(told) if one not in told[:place]]


def format_total_loss(runs: Sequence[Told]) -> str | None:
    """Format the total privacy loss of the runs from `compose_losses`; None: unbounded."""
    epsilon, delta = compose_losses(runs)
    return None if epsilon is None else format_privacy_loss(epsilon, delta)


def describe_run(report: Report, adapter_digest: str) -> dict[str, Any]:
    """Return a run's entry on a card, as plain values."""
    facts = report.facts
    assert isinstance(facts, RunFacts), "a run wrote the records"
    own = report.epsilon if Words(report, load_catalog("en")).promises else None
    epsilon, delta = compute_released_epsilon(own, facts.delta, facts.selection)
    about: Any = {"run": facts.name, "unit": facts.unit, "verdict": report.verdict.state}
    made = facts.provenance
    about |= {"task": made.task, "config_sha256": made.config_sha256, "start": made.start_adapter}
    return asdict(Behind(epsilon=epsilon, delta=delta, adapter_digest=adapter_digest, **about))


def read_card(file: Path, writer: Told | None = None, *, option: str) -> Told:
    """Read and validate the card of a file with synthetic records, without which the run's guarantee does not apply to
    them.

    Raises:
        ConfigError: the card is missing or inconsistent, or belongs to another file or to another run than `writer`.
    """
    path, sha256 = find_card_path(file.resolve(), ".json"), hash_file(file, key=option)
    of = " with this RUN" if writer else ""
    bound = f"must be an unchanged output of fedtune synthesize{of}, with its card next to it ({path.name})"
    read = read_bounded_file(path, key=option, name=str(file), bound=bound)
    try:
        found = parse_json(read, key=path.name, bound="must be JSON")
        told = decode(Card, found)
    except ConfigError as error:
        raise ConfigError(option, str(file), f"{bound}: its {error}") from None
    wrote = asdict(told.runs[0])
    if (told.schema_version, told.sha256, wrote) != (RUN_SCHEMA, sha256, writer or wrote):
        raise ConfigError(option, str(file), bound)
    return found


def render_card_markdown(reports: Sequence[Report], told: Told) -> str:
    """Render a card as Markdown; `told` is the result of `build_card` for the same reports."""
    words = [Words(report, load_catalog("en")) for report in reports]
    return render_card(
        "synthetic_card.md.j2",
        name=told["file"],
        sha256=told["sha256"],
        writer=words[0],
        runs=list(zip(words, told["runs"], strict=False)),
        earlier=told["runs"][len(reports) :],
        alone=told["together"]["epsilon"] == reports[0].epsilon,
        promised=all(run["epsilon"] is not None for run in told["runs"]),
        together=format_total_loss(told["runs"]),
        made=told["made"],
        figures=told["figures"],
    )


def build_card(file: Path, lines: bytes, runs: Sequence[Told], *, made: Told, figures: Told) -> dict[str, Any]:
    """Build the machine-readable card for the records in `lines`; the first of `runs` generated them."""
    return {
        "schema_version": RUN_SCHEMA,
        "file": file.name,
        "sha256": hashlib.sha256(lines).hexdigest(),
        "runs": remove_duplicates(runs),
        "together": dict(zip(("epsilon", "delta"), compose_losses(runs), strict=True)),
        "made": dict(made),
        "figures": dict(figures),
    }
