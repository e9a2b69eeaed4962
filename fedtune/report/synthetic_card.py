"""The card of a file of synthetic records: how it was made, what that promises, and what it is not for."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from fedtune.codec import decode, parse_json
from fedtune.evaluation.spec import WritingSpec
from fedtune.privacy.selection import released
from fedtune.report import signing
from fedtune.report.facts import RunFacts, StartAdapter, State
from fedtune.report.model import Report
from fedtune.report.model_card import owed, rendered
from fedtune.report.page.catalogue import catalogue
from fedtune.report.page.report_words import Words
from fedtune.sites.run_records import card_of, file_sha256
from fedtune.spec import RUN_SCHEMA, ConfigError, check_at_least, check_fraction, spec
from fedtune.words import total

Told = Mapping[str, Any]  # what a card tells programs


@spec
class Behind:
    """A run that records owe to: its adapter, what all that was released for it owes, and where it began."""

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
class Made(WritingSpec):
    """How records were made: what was asked for, and what they were chosen and labelled by."""

    rows: int
    codes: int
    missing: int
    left_out: Mapping[str, int]
    shares: Literal["declared", "voted", "varied"]
    codes_file: str | None = None
    codes_sha256: str | None = None
    candidates: int | None = None
    chosen_by: str | None = None
    labels: tuple[Mapping[str, str], ...] = ()
    beside: Told | None = None
    classified: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        WritingSpec.__post_init__(self)  # super() knows no class with slots
        for key, count in {"rows": self.rows, "codes": self.codes, "missing": self.missing, **self.left_out}.items():
            check_at_least(key, count, 0)
        if any(one.keys() != {"column", "by"} for one in self.labels):
            raise ConfigError("labels", list(self.labels), "must each have a column and by whom")


@spec
class Figures:
    """How alike texts are."""

    texts: int
    distinct: float  # the share that no other one equals
    words: tuple[int, int, int]  # so many at most have 5 %, half and 95 % of them
    distinct_pairs: float  # the share of all pairs of neighbouring words that come once (distinct-2, Li et al. 2016)


@spec
class Card:
    """The card for programs; the first run wrote the records, and `figures` are by the name of a file."""

    schema_version: int
    file: str
    sha256: str
    runs: tuple[Behind, ...]
    together: Mapping[str, float | None]
    made: Made
    figures: Mapping[str, Figures]

    def __post_init__(self) -> None:
        epsilon, delta = together([asdict(run) for run in self.runs]) if self.runs else (None, None)
        if not self.runs or self.together != {"epsilon": epsilon, "delta": delta}:
            raise ConfigError("together", self.together, "must be what the runs come to")


def together(runs: Sequence[Told]) -> tuple[float | None, float]:
    """Epsilon and delta of all of a card's runs for one unit, at most: both add up (basic composition).

    So do those of adapters that runs began in and are not public: they may know the same unit.  None: without a bound.
    """
    starts = [run["start"] for run in runs if run["start"] is not None and not run["start"]["public"]]
    parts = [*once(runs), *once(starts)]
    if any(part["epsilon"] is None or part["delta"] is None or part["unit"] != runs[0]["unit"] for part in parts):
        return None, total(run["delta"] for run in runs)
    return total(part["epsilon"] for part in parts), total(part["delta"] for part in parts)


def once(told: Sequence[Told]) -> list[Told]:
    """Each of these once: what the same adapter, by its digest, released owes once, however often that is used."""
    return [one for place, one in enumerate(told) if one not in told[:place]]


def in_words(runs: Sequence[Told]) -> str | None:
    """`together` for people."""
    epsilon, delta = together(runs)
    return None if epsilon is None else owed(epsilon, delta)


def run_of(report: Report, adapter_digest: str) -> dict[str, Any]:
    """A run as a card tells it."""
    facts = report.facts
    assert isinstance(facts, RunFacts), "a run wrote the records"
    own = report.epsilon if Words(report, catalogue("en")).promises else None
    epsilon, delta = released(own, facts.delta, facts.selection)
    about: Any = {"run": facts.name, "unit": facts.unit, "verdict": report.verdict.state}
    made = facts.provenance
    about |= {"task": made.task, "config_sha256": made.config_sha256, "start": made.start_adapter}
    return asdict(Behind(epsilon=epsilon, delta=delta, adapter_digest=adapter_digest, **about))


def read_card(file: Path, writer: Told | None = None, *, option: str) -> Told:
    """The card of records that a run wrote, as `as_json` made it: only they may be published under its promise.

    A card that is missing, says what cannot be, or is of another file or another run than `writer` is a ConfigError.
    """
    path, sha256 = card_of(file.resolve(), ".json"), file_sha256(file, key=option)
    of = " with this RUN" if writer else ""
    bound = f"must be as fedtune synthesize or choose wrote it{of}, with its card beside it ({path.name})"
    read = signing.read_file(path, key=option, name=str(file), bound=bound)
    try:
        found = parse_json(read, key=path.name, bound="must be JSON")
        told = decode(Card, found)
    except ConfigError as error:
        raise ConfigError(option, str(file), f"{bound}: its {error}") from None
    wrote = asdict(told.runs[0])
    if (told.schema_version, told.sha256, wrote) != (RUN_SCHEMA, sha256, writer or wrote):
        raise ConfigError(option, str(file), bound)
    return found


def card(reports: Sequence[Report], told: Told) -> str:
    """The card as Markdown, of the same reports as `told`, which is what `as_json` made."""
    words = [Words(report, catalogue("en")) for report in reports]
    return rendered(
        "synthetic_card.md.j2",
        name=told["file"],
        sha256=told["sha256"],
        writer=words[0],
        runs=list(zip(words, told["runs"], strict=False)),
        earlier=told["runs"][len(reports) :],
        alone=told["together"]["epsilon"] == reports[0].epsilon,
        promised=all(run["epsilon"] is not None for run in told["runs"]),
        together=in_words(told["runs"]),
        made=told["made"],
        figures=told["figures"],
    )


def as_json(file: Path, lines: bytes, runs: Sequence[Told], *, made: Told, figures: Told) -> dict[str, Any]:
    """The card of `lines` for programs: `runs` are all behind them, first the one that wrote them."""
    return {
        "schema_version": RUN_SCHEMA,
        "file": file.name,
        "sha256": hashlib.sha256(lines).hexdigest(),
        "runs": once(runs),
        "together": dict(zip(("epsilon", "delta"), together(runs), strict=True)),
        "made": dict(made),
        "figures": dict(figures),
    }
