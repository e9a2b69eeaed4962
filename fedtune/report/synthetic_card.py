"""The card of a file of synthetic records: how it was made, what that promises, and what it is not for."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from statistics import quantiles
from typing import Any

from fedtune.report.model import Report
from fedtune.report.model_card import rendered, start_of, statements
from fedtune.report.page.catalogue import catalogue
from fedtune.report.page.tables import Words
from fedtune.spec import RUN_SCHEMA

_TEMPLATE = "synthetic_card.md.j2"


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
    words = text.lower().split()
    return pairwise(words)


def together(reports: Sequence[Report]) -> tuple[float | None, float]:
    """Epsilon and delta of all runs for one unit, at most: both add up (basic composition); None: nothing is promised.

    A promise for each record and one for each user count as one for each record.
    """
    promised = [report.epsilon for report in reports if Words(report, catalogue("en")).promises]
    known = [epsilon for epsilon in promised if epsilon is not None]
    return sum(known) if len(known) == len(reports) else None, sum(report.delta for report in reports)


def card(file: Path, reports: Sequence[Report], *, made: Mapping[str, Any], figures: Mapping[str, Figures]) -> str:
    """The card as Markdown.

    Args:
        file: of the records.
        reports: of the run that wrote them, and of the votes' run where there is one.
        made: as `as_json` takes it.
        figures: of the texts, and of public ones beside them, by what they are.
    """
    words = [Words(report, catalogue("en")) for report in reports]
    epsilon, delta = together(reports)
    figure = words[0].catalogue.figure
    return rendered(
        _TEMPLATE,
        name=file.name,
        sha256=_digest(file),
        runs=[
            {"name": report.name, "task": report.provenance.task, "start": start_of(own), **statements(own)}
            for report, own in zip(reports, words, strict=True)
        ],
        together=None if epsilon is None else f"epsilon {figure(epsilon, 'epsilon')} at delta {figure(delta, 'exact')}",
        made=made,
        figures=figures,
    )


def as_json(
    file: Path, reports: Sequence[Report], *, made: Mapping[str, Any], figures: Mapping[str, Figures]
) -> dict[str, Any]:
    """The same for programs."""
    epsilon, delta = together(reports)
    runs = [
        {
            "run": report.name,
            "config_sha256": report.provenance.config_sha256,
            "epsilon": report.epsilon,
            "delta": report.delta,
            "unit": report.unit,
            "verdict": report.verdict.state,
        }
        for report in reports
    ]
    return {
        "schema_version": RUN_SCHEMA,
        "file": file.name,
        "sha256": _digest(file),
        "runs": runs,
        "together": {"epsilon": epsilon, "delta": delta},
        "made": dict(made),
        "figures": {name: asdict(one) for name, one in figures.items()},
    }


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
