"""A comparison in sections: verdict, scores, groups and cost, the same on the terminal and on the page."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from markupsafe import Markup

from fedtune.cli.finished_run import finished_run
from fedtune.data.records import Record, column_values
from fedtune.evaluation.bootstrap import FEWEST_UNITS, RESAMPLES, Comparison, Estimate, Verdict
from fedtune.evaluation.groups import GroupScores
from fedtune.federation.cost import Energy
from fedtune.privacy.accountant import epsilon_text
from fedtune.privacy.mechanism import OTHERS
from fedtune.report.page.drawing import intervals
from fedtune.show.sections import SCHEMA_VERSION, Section
from fedtune.version import __version__
from fedtune.words import counted, duration, jsonable, score_words, size

if TYPE_CHECKING:  # they import torch, which takes seconds
    from fedtune.runs.results import RunResult
    from fedtune.runs.side_by_side import SideBySide

Kind = Literal["alone", "federated", "pooled", "run"]
NO_PRIVACY = ", no privacy"
"""Behind the name of a run without any."""
AT_SITES = "by site"
_ALIKE: Verdict = "cannot be told apart"
_TOLD_ALIKE, _MOST_NAMED = 8, 8
"""Pairs and groups that are named in a sentence."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """One run of a comparison.

    Attributes:
        name: what tables call it.
        kind: who took part; "run" for one that was there already.
        site: the one that trained alone.
        private: whether noise was added.
        folder: of the run.
        result: what it came to, where a run.json says it.
    """

    name: str
    kind: Kind
    site: str | None
    private: bool
    folder: Path
    result: RunResult | None

    @property
    def moved(self) -> int:
        """Bytes of adapters, both ways; 0 where nobody shares any."""
        if self.result is None or self.kind in ("alone", "pooled"):
            return 0
        return sum(one.bytes_down + one.bytes_up for one in self.result.rounds)


@dataclass(frozen=True, kw_only=True)
class Compared:
    """Models side by side.

    Attributes:
        lines: the runs; the first is the one that the others are compared with.
        means: names of models that are means of several, by the runs that they are of.
        sides: their scores.
        groups: scores by group, by what the groups are called.
        data: the file that was scored; None: the runs' own test records, or a site's held-out ones.
        notes: what else must be said.
    """

    lines: Sequence[Line]
    means: Mapping[str, Sequence[str]]
    sides: SideBySide
    groups: Mapping[str, GroupScores]
    data: str | None
    notes: Sequence[str]

    @property
    def main(self) -> str:
        """The model that the others are compared with."""
        return self.lines[0].name

    @property
    def score(self) -> str:
        """The score that counts."""
        return self.sides.judged_by

    @property
    def models(self) -> list[str]:
        """All of them, as tables list them."""
        return [*self.sides.measured, *self.means]

    def sections(self) -> list[Section]:
        """All that there is to say."""
        return [
            Section(title="Verdict", notes=self.verdict()),
            self._scores(),
            self._beside_main(),
            self._other_scores(),
            *(draw(title, found) for title, found in self.groups.items() for draw in (self._by_group, self._gaps)),
            self._cost(),
            Section(title="How to read this", notes=[*self.notes, *self._about()]),
        ]

    def chart(self) -> Markup:
        """The score that counts with its interval, a row for each model."""
        rows = []
        for name in self.models:
            found = self.sides.estimate(name, self.score)
            ends = (found.low, found.value, found.high)
            if all(map(math.isfinite, ends)):
                rows.append((name, *ends))
        if not rows:
            return Markup("")
        named = (f"{score_words(self.score)} of each model", "With 95 % intervals; the tables have the figures.")
        return intervals(
            "models", rows, x=f"{score_words(self.score)}, with 95 % intervals", named=named, number="{:g}".format
        )

    @property
    def _base(self) -> str:
        return next(iter(self.sides.measured))

    def verdict(self) -> list[str]:
        """What can be said, in sentences; the first is the one that matters most."""
        told = [self._sentence(self.main, self._base)]
        others = [name for name in self.models if name not in (self.main, self._base) and name not in self.means]
        for verdict in ("better", "worse"):
            names = [name for name in others if self.sides.comparison(name, self.main).verdict == verdict]
            if names:
                told.append(f"{_capital(self.main)} is {verdict} than {_listed(names)}.")
        told += [self._sentence(self.main, mean) for mean in self.means if self._kind(mean) == self._kind(self.main)]
        told += [self._price(line) for line in self.lines[1:] if self._plain_of(line) == self.main]
        alike = sorted(self._alike(), key=lambda pair: self.main not in pair)
        if alike:
            shown = "; ".join(f"{one} and {other}" for one, other in alike[:_TOLD_ALIKE])
            more = f"; and {counted(len(alike) - _TOLD_ALIKE, 'more pair')}" if len(alike) > _TOLD_ALIKE else ""
            told.append(f"These records do not tell apart: {shown}{more}.")
        return told + [sentence for title, found in self.groups.items() for sentence in self._fair(title, found)]

    def _kind(self, name: str) -> bool:
        """Whether a model's training was private."""
        names = self.means.get(name, (name,))
        return next(line.private for line in self.lines if line.name in names)

    @staticmethod
    def _plain_of(line: Line) -> str | None:
        """The name of the same run with privacy, for one without."""
        return None if line.private else line.name.removesuffix(NO_PRIVACY)

    def _sentence(self, tuned: str, base: str) -> str:
        found = self.sides.comparison(base, tuned)
        if found.verdict == _ALIKE:
            return (
                f"{_capital(tuned)} cannot be told apart from {base} by {score_words(self.score)}: {_interval(found)}."
            )
        return f"{_capital(tuned)} is {found.verdict} than {base}: {score_words(self.score)} {_interval(found)}."

    def _price(self, plain: Line) -> str:
        found = self.sides.comparison(plain.name, self.main)
        if found.verdict == _ALIKE:
            return f"What privacy costs it cannot be told on these records: {_interval(found)}."
        return f"With privacy it is {found.verdict} than without: {score_words(self.score)} {_interval(found)}."

    def _alike(self) -> Iterator[tuple[str, str]]:
        names = list(self.sides.measured)
        for place, one in enumerate(names):
            for other in names[place + 1 :]:
                if self.sides.comparison(one, other).verdict == _ALIKE:
                    yield one, other

    def _fair(self, title: str, found: GroupScores) -> Iterator[str]:
        """Whom training served, and whom it did not."""
        changes = {name: pairs[self._base, self.main] for name, pairs in found.changes.items()}
        parts = []
        for verdict, said in (("better", "better"), ("worse", "worse"), (_ALIKE, "not told apart")):
            names = [name for name, one in changes.items() if one.verdict == verdict]
            shown = [*names[:_MOST_NAMED], *([f"{len(names) - _MOST_NAMED} more"] if len(names) > _MOST_NAMED else [])]
            parts += [f"{said} in {_listed(shown)}"] if names else []
        yield f"{_capital(title)}, {self.main} is beside {self._base}: {'; '.join(parts)}."
        name = found.groups.smallest
        count = counted(min(found.groups.sizes), self.sides.unit)
        yield f"The smallest group is {name} ({count}): {_range(found.scores[name][self.main])}."

    def _scores(self) -> Section:
        rows = []
        for name in self.models:
            row = (name, _figure(self.sides.estimate(name, self.score).value))
            if name == self._base:
                rows.append((*row, _ends(self.sides.estimate(name, self.score)), "", "", ""))
                continue
            found = self.sides.comparison(self._base, name)
            rows.append((*row, _ends(found.tuned), f"{found.difference.value:+.4f}", _ends(found.difference, sign="+"),
                         found.verdict))  # fmt: skip
        where = f" on {self.data}" if self.data else ""
        title = f"{_capital(score_words(self.score))}{where}: {counted(len(self.sides.records), 'record')}"
        headings = (
            "model",
            score_words(self.score),
            "95 % interval",
            f"less {self._base}",
            "95 % interval",
            "beside it",
        )
        return Section(title=title, headings=headings, rows=rows, words={0, 5})

    def _beside_main(self) -> Section:
        rows = []
        for name in self.models:
            if name in (self.main, self._base):
                continue
            found = self.sides.comparison(name, self.main)
            rows.append((name, f"{found.difference.value:+.4f}", _ends(found.difference, sign="+"), found.verdict))
        headings = ("beside", "difference", "95 % interval", f"{self.main} is")
        return Section(title=f"{_capital(self.main)} less each", headings=headings, rows=rows, words={0, 3})

    def _other_scores(self) -> Section:
        names = [name for name in self.sides.scores if name != self.score]
        rows = [
            (model, *(f"{_figure(one.value)} ({_ends(one)})" for one in self._estimates(model, names)))
            for model in self.models
        ]
        headings = ("model", *map(score_words, names))
        return Section(title="Other scores, with 95 % intervals", headings=headings, rows=rows if names else [])

    def _estimates(self, model: str, names: Sequence[str]) -> Iterator[Estimate]:
        return (self.sides.estimate(model, name) for name in names)

    def _by_group(self, title: str, found: GroupScores) -> Section:
        """At sites beside each site's own run alone, else beside the model before training."""
        own = {line.site: line.name for line in self.lines if line.site and line.private == self.lines[0].private}
        alone = {name: own[name] for name in found.groups.names if title == AT_SITES and name in own}
        rows = []
        for name, count in zip(found.groups.names, found.groups.sizes, strict=True):
            scores = found.scores[name]
            change = found.changes[name][alone.get(name, self._base), self.main]
            values = [_figure(scores[self._base].value)]
            values += [_figure(scores[alone[name]].value) if name in alone else "-"] if alone else []
            values += [_figure(scores[self.main].value), _ends(change.difference, sign="+")]
            rows.append((name, f"{count:,}", *values, change.verdict))
        beside = "alone" if alone else self._base
        headings = ("group", f"{self.sides.unit}s", self._base, *(("alone",) if alone else ()), self.main)
        headings += (f"less {beside},\n95 % interval", "beside it")
        notes = []
        if found.groups.merged:
            notes.append(f"{OTHERS}: {counted(len(found.groups.merged), 'small group')}, merged by size alone.")
        words = {0, len(headings) - 1}
        about = f"{_capital(score_words(self.score))} {title}"
        return Section(title=about, headings=headings, rows=rows, words=words, notes=notes)

    def _gaps(self, title: str, found: GroupScores) -> Section:
        rows = [
            (name, *(text for one in (gaps[self._base], gaps[self.main]) for text in _signed(one)))
            for name, gaps in found.gaps.items()
        ]
        headings = ("group", self._base, "95 % interval", self.main, "95 % interval")
        notes = ["A gap is the score in the group less the score of all records outside it."]
        return Section(title=f"Gaps {title}", headings=headings, rows=rows, notes=notes)

    def _cost(self) -> Section:
        lines = [(line, line.result) for line in self.lines if line.result is not None]  # a site's copy has none
        known = {line.name: told for line, result in lines if (told := _told(result.final.energy))}
        rows = [
            (
                line.name,
                epsilon_text(result.privacy.epsilon),
                "-" if result.final.seconds is None else duration(result.final.seconds),
                size(line.moved) if line.moved else "none",
                *((known.get(line.name, "-"),) if known else ()),
            )
            for line, result in lines
        ]
        if not rows:
            return Section()
        notes = ["Time: the whole run on this machine, which plays all sites one after another."]
        if any(line.kind == "pooled" for line in self.lines):
            notes.append("Pooled, all records themselves would have to leave their sites.")
        headings = ("model", "epsilon", "time", "adapters moved", *(("energy",) if known else ()))
        return Section(title="Cost", headings=headings, rows=rows, notes=notes)

    def _about(self) -> Iterator[str]:
        sides = self.sides
        yield (
            f"Intervals: 95 %, from {RESAMPLES:,} draws of {counted(sides.num_units, sides.unit)}, with replacement, "
            "the same for all models. They say how far other test records would move a score, and nothing about "
            "another run of the same training."
        )
        if sides.num_units < FEWEST_UNITS:
            yield f"Fewer than {FEWEST_UNITS} {sides.unit}s are too few to call a model better or worse."
        pairs = len(list(self.models)) * (len(self.models) - 1) // 2
        if pairs >= 20:
            yield f"Of {pairs} pairs, about {pairs // 20} would look different by chance where none is."

    def to_json(self) -> dict[str, Any]:
        """Every figure as plain JSON."""
        sides = self.sides
        models = [
            {
                "name": name,
                "mean_of": list(self.means.get(name, ())) or None,
                "scores": {score: dataclasses.asdict(sides.estimate(name, score)) for score in sides.scores},
                **self._of_run(name),
            }
            for name in self.models
        ]
        pairs = [
            {"base": one, "tuned": other, "score": score, **_of_pair(sides.comparison(one, other, score))}
            for place, one in enumerate(self.models)
            for other in self.models[place + 1 :]
            for score in sides.scores
        ]
        groups = {title: _of_groups(found) for title, found in self.groups.items()}
        about = {"schema_version": SCHEMA_VERSION, "fedtune_version": __version__, "data": self.data}
        counts = {"records": len(sides.records), "unit": sides.unit, "units": sides.num_units, "judged_by": self.score}
        found = {**about, **counts, "compared_with": self.main, "verdict": self.verdict(), "models": models}
        return {key: jsonable(value) for key, value in {**found, "pairs": pairs, "groups": groups}.items()}

    def _of_run(self, name: str) -> dict[str, Any]:
        line = next((line for line in self.lines if line.name == name), None)
        if line is None:
            return {}
        about = {"kind": line.kind, "site": line.site, "private": line.private, "folder": str(line.folder)}
        if line.result is None:
            return about
        final, privacy = line.result.final, line.result.privacy
        return about | {
            "epsilon": privacy.epsilon,
            "delta": privacy.delta,
            "seconds": final.seconds,
            "bytes": line.moved,
            "energy": None if final.energy is None else dataclasses.asdict(final.energy),
        }


def scored(
    lines: Sequence[Line],
    *,
    data: str | None,
    by: str | None,
    smallest: int,
    generate: int | None = None,
    records: Sequence[Record] | None = None,
) -> Compared:
    """Score runs side by side.

    Args:
        lines: the runs.
        data: the file to score; None: the first run's test records, or `records`.
        by: a column to group by.
        smallest: units of a group.
        generate: write texts for so many prompts.
        records: a site's own, to score instead.
    """
    from fedtune.runs.side_by_side import Finished, side_by_side, sites_of

    runs = {}
    for line in lines:
        config, adapter = finished_run(line.folder, generate=generate)
        runs[line.name] = Finished(folder=line.folder, config=config, adapter=adapter)
    means = {}
    for suffix in ("", NO_PRIVACY):
        names = [line.name for line in lines if line.kind == "alone" and line.private == (suffix == "")]
        if len(names) > 1:
            means[f"alone, mean of {len(names)}{suffix}"] = names
    sides = side_by_side(runs, file=data, records=records, means=means)
    first, main = next(iter(runs.values())).config, lines[0].name
    base, notes = next(iter(sides.measured)), []
    pairs = [(name, main) for name in sides.measured if name != main]
    values = {f"by {by}": column_values(sides.records, by, key="--by")} if by else {}
    if any(line.kind == "federated" for line in lines) and (at_sites := sites_of(first, sides.records)) is not None:
        values = {AT_SITES: at_sites, **values}
    groups = {}
    for title, of_records in values.items():
        found = sides.by(of_records, smallest=smallest, pairs=pairs)
        if found is None:
            notes.append(f"No scores {title}: fewer than two groups have {smallest} {sides.unit}s.")
        else:
            groups[title] = found
    if first.model.adapter_sha256 is not None:
        notes.append(f"Training began in another adapter; {base} is the model without any.")
    if first.data.partition.kind == "file" and any(line.kind == "federated" for line in lines):
        notes.append("There is no pooled run and no score by site: the sites' records are in files of their own.")
    return Compared(lines=lines, means=means, sides=sides, groups=groups, data=data, notes=notes)


def _told(energy: Energy | None) -> str:
    """Energy and carbon, as far as they are known."""
    if energy is None:
        return ""
    carbon = "" if energy.carbon_kg is None else f", {1000 * energy.carbon_kg:.3g} g CO2e"
    return f"{1000 * energy.kwh:.3g} Wh{carbon}"


def _of_pair(found: Comparison) -> dict[str, Any]:
    return {"difference": dataclasses.asdict(found.difference), "verdict": found.verdict}


def _of_groups(found: GroupScores) -> dict[str, Any]:
    groups = found.groups
    return {
        "merged": list(groups.merged),
        "smallest": groups.smallest,
        "groups": [
            {
                "name": name,
                "units": count,
                "scores": {model: dataclasses.asdict(one) for model, one in found.scores[name].items()},
                "gaps": {model: dataclasses.asdict(one) for model, one in found.gaps[name].items()},
                "changes": [
                    {"base": base, "tuned": tuned, **_of_pair(one)}
                    for (base, tuned), one in found.changes[name].items()
                ],
            }
            for name, count in zip(groups.names, groups.sizes, strict=True)
        ],
    }


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _listed(names: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def _figure(value: float) -> str:
    return f"{value:.4f}" if math.isfinite(value) else "not finite"


def _ends(estimate: Estimate, *, sign: str = "") -> str:
    if math.isnan(estimate.low):
        return "unknown"
    return f"{estimate.low:{sign}.4f} to {estimate.high:{sign}.4f}"


def _signed(estimate: Estimate) -> tuple[str, str]:
    return f"{estimate.value:+.4f}", _ends(estimate, sign="+")


def _range(estimate: Estimate) -> str:
    return f"{_figure(estimate.value)} ({_ends(estimate)})"


def _interval(found: Comparison) -> str:
    return f"{found.difference.value:+.4f} ({_ends(found.difference, sign='+')})"
