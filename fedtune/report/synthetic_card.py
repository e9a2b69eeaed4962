"""The card of a file of synthetic records: how it was made, what that promises, and what it is not for."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from statistics import quantiles
from typing import Any

from fedtune.report.model import Report
from fedtune.report.model_card import rendered, start_of, statements
from fedtune.report.page.catalogue import catalogue
from fedtune.report.page.report_words import Words
from fedtune.sites.run_records import file_sha256
from fedtune.spec import RUN_SCHEMA, ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class Figures:
    """What texts are like.

    Attributes:
        texts: how many.
        distinct: the share of them that no other one equals.
        words: of a text: 5 %, half and 95 % have as many or fewer.
        distinct_pairs: the share of all pairs of neighbouring words that come once (distinct-2, Li et al. 2016).
    """

    texts: int
    distinct: float
    words: tuple[int, int, int]
    distinct_pairs: float


def figures_of(texts: Sequence[str]) -> Figures:
    """Of at least one text; lower case, and words end at spaces."""
    times, lengths = Counter(texts), [len(text.split()) for text in texts]
    cuts = quantiles(lengths, n=20, method="inclusive") if len(lengths) > 1 else lengths * 19
    pairs = [pair for text in texts for pair in _pairs(text)]
    return Figures(
        texts=len(texts),
        distinct=sum(count == 1 for count in times.values()) / len(texts),
        words=(round(cuts[0]), round(cuts[9]), round(cuts[18])),
        distinct_pairs=len(set(pairs)) / len(pairs) if pairs else 0.0,
    )


def shared_pairs(texts: Sequence[str], others: Sequence[str]) -> float:
    """The share of the pairs of words in `others`, each as often as it comes, that come in `texts` too."""
    known = {pair for text in texts for pair in _pairs(text)}
    found = [pair in known for text in others for pair in _pairs(text)]
    return sum(found) / len(found) if found else 0.0


def _pairs(text: str) -> Iterator[tuple[str, str]]:
    return pairwise(text.lower().split())


def together(runs: Sequence[Mapping[str, Any]]) -> tuple[float | None, float]:
    """Epsilon and delta of all of a card's runs for one unit, at most: both add up (basic composition).

    So do those of the adapters that runs began in, but for public ones: they may have learnt from the same unit.  None:
    nothing bounds it.
    """
    starts = [run["start"] for run in runs if run["start"] is not None and not run["start"]["public"]]
    parts = [*runs, *starts]
    if any(part["epsilon"] is None or part["delta"] is None or part["unit"] != runs[0]["unit"] for part in parts):
        return None, sum(run["delta"] for run in runs)
    return sum(part["epsilon"] for part in parts), sum(part["delta"] for part in parts)


def in_words(runs: Sequence[Mapping[str, Any]]) -> str | None:
    """`together` for people."""
    (epsilon, delta), figure = together(runs), catalogue("en").figure
    return None if epsilon is None else f"epsilon {figure(epsilon, 'epsilon')} at delta {figure(delta, 'exact')}"


def run_of(report: Report) -> dict[str, Any]:
    """A run as a card tells it."""
    return {
        "run": report.name,
        "task": report.provenance.task,
        "config_sha256": report.provenance.config_sha256,
        "epsilon": report.epsilon if Words(report, catalogue("en")).promises else None,
        "delta": report.delta,
        "unit": report.unit,
        "verdict": report.verdict.state,
        "start": asdict(start) if (start := report.provenance.start_adapter) else None,
    }


def read_card(file: Path, writer: Report | None = None, *, option: str) -> Mapping[str, Any]:
    """The card of records that a run wrote, as `as_json` made it: only they may be published under its promise.

    Raises:
        ConfigError: there is none beside the file, or it is of another file, or of another run than `writer`'s.
    """
    path, sha256, fits = card_of(file, ".json"), file_sha256(file, key=option), False
    with suppress(OSError, ValueError, LookupError, TypeError, RecursionError):
        found: dict[str, Any] = json.loads(path.read_bytes())
        together(found["runs"])  # what cannot be added up is no card
        run, own = found["runs"][0]["config_sha256"], writer and writer.provenance.config_sha256
        fits = (found["schema_version"], found["sha256"], run) == (RUN_SCHEMA, sha256, own or run)
    if not fits:
        of = " with this RUN" if writer else ""
        bound = f"must be as fedtune synthesize or choose wrote it{of}, with its card beside it ({path.name})"
        raise ConfigError(option, str(file), bound)
    return found


def card(reports: Sequence[Report], told: Mapping[str, Any]) -> str:
    """The card as Markdown, of the same reports as `told`, which is what `as_json` made."""
    words = [Words(report, catalogue("en")) for report in reports]
    return rendered(
        "synthetic_card.md.j2",
        name=told["file"],
        sha256=told["sha256"],
        runs=[
            {"name": report.name, "task": report.provenance.task, "start": start_of(own), **statements(own)}
            for report, own in zip(reports, words, strict=True)
        ],
        earlier=told["runs"][len(reports) :],
        promised=all(run["epsilon"] is not None for run in told["runs"]),
        together=in_words(told["runs"]),
        made=told["made"],
        figures=told["figures"],
    )


def as_json(
    file: Path,
    lines: bytes,
    reports: Sequence[Report],
    *,
    earlier: Sequence[Mapping[str, Any]] = (),
    made: Mapping[str, Any],
    figures: Mapping[str, Figures],
) -> dict[str, Any]:
    """The card of `lines` for programs: by reports of the run that wrote them, and of the votes' run if there is one.

    What stood on a card of candidates comes along as `earlier`: all runs behind them but the one that wrote them.
    """
    runs = [*map(run_of, reports), *map(dict, earlier)]
    epsilon, delta = together(runs)
    return {
        "schema_version": RUN_SCHEMA,
        "file": file.name,
        "sha256": hashlib.sha256(lines).hexdigest(),
        "runs": runs,
        "together": {"epsilon": epsilon, "delta": delta},
        "made": dict(made),
        "figures": {name: asdict(one) for name, one in figures.items()},
    }


def card_of(file: Path, suffix: str) -> Path:
    """Where the card of a file of synthetic records is: `.json` for programs, `.md` for people."""
    return file.with_name(f"{file.name}.card{suffix}")
