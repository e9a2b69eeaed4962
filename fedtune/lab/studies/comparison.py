"""Comparison of several runs on the same records, with results as sentences, tables and JSON."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fedtune.api.compose import compose_run
from fedtune.api.public import Callback, make_stage_callback
from fedtune.config import RunConfig
from fedtune.data.records import Record, read_column_values
from fedtune.evaluation.bootstrap import (
    MIN_UNITS,
    NO_DIFFERENCE,
    RESAMPLES,
    Comparison,
    Estimate,
    describe_against_constant,
)
from fedtune.evaluation.groups import OTHERS, GroupScores
from fedtune.formatting import convert_to_jsonable, format_score_name, format_size, pluralize
from fedtune.lab.studies.trials import SearchTrial, share_number_format
from fedtune.privacy.accountant import format_epsilon
from fedtune.show.lines import duration
from fedtune.show.terminal_tables import SCHEMA_VERSION, Section
from fedtune.spec import ConfigError
from fedtune.version import __version__

if TYPE_CHECKING:  # they import torch, which takes seconds
    from fedtune.runs.model_comparison import SideBySide

Kind = Literal["alone", "federated", "pooled", "run", "own"]
NO_PRIVACY = ", no privacy"  # suffix of the names of runs without privacy
AT_SITES = "by site"
_MAX_NAMED = 8  # maximum number of names in a sentence


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """One run in a comparison, with its name and participants."""

    name: str  # name in tables
    kind: Kind  # participants; "run": existing run; "own": personalized adapter
    run: SearchTrial
    site: str | None = None  # site of a single-site run or personalized adapter

    @property
    def private(self) -> bool:
        return self.run.config.privacy.private and self.kind != "own"

    @property
    def bytes_moved(self) -> int:
        """Size of all transferred adapters in bytes; 0 without a federation."""
        if self.run.result is None or self.kind in ("alone", "pooled"):
            return 0
        return sum(one.bytes_down + one.bytes_up for one in self.run.result.rounds)


def plan_runs(words: Sequence[str], *, without_privacy: bool, leave_out: Sequence[Kind]) -> list[Line]:
    """Plan the runs of a comparison for an experiment, starting with the federation, with their state on disk.

    Args:
        words: overrides of the experiment.
        without_privacy: whether to repeat every run without privacy.
        leave_out: kinds of runs to omit.

    Raises:
        ConfigError: the experiment cannot be compared, or all runs are omitted.
    """
    asked = compose_run(words)
    if asked.runtime.kind == "deployment":
        bound = "cannot be compared: real sites' records cannot be pooled; use a simulation"
        raise ConfigError("runtime", "deployment", bound)
    if asked.resume is not None:
        raise ConfigError("resume", asked.resume, "conflicts with compare: repeat the same command to resume it")
    if asked.federation.participants:
        bound = "must be empty to compare, because the comparison includes runs of each site and of all sites"
        raise ConfigError("federation.participants", list(asked.federation.participants), bound)
    if asked.runtime.sites_dir is not None:
        bound = "must be null to compare: otherwise all runs are charged to the same sites"
        raise ConfigError("runtime.sites_dir", asked.runtime.sites_dir, bound)
    kinds: list[tuple[Kind, str | None]] = [("federated", None)]
    if asked.federation.num_sites > 1:
        kinds += [("alone", site) for site in asked.federation.names]
        kinds += [("pooled", None)] if asked.data.partition.kind != "file" else []
    if not (kinds := [(kind, site) for kind, site in kinds if kind not in leave_out]):
        raise ConfigError("leave_out", ", ".join(leave_out), "must leave at least one run")
    plain: list[dict[str, Any]] = [{}]
    if without_privacy and asked.privacy.private:
        plain.append({"privacy.mechanism": "none", "privacy.noise_multiplier": None, "privacy.metrics": "none"})
    lines = []
    for changes in plain:
        for kind, site in kinds:
            suffix = "-".join(filter(None, (kind, site, "plain" if changes else "")))
            into = str(Path(asked.tracking.output_dir) / asked.name)
            named: dict[str, Any] = {"name": f"{asked.name}-{suffix}", "tracking.output_dir": into}
            if kind != "federated":  # only the federated run is checked for a weak signal
                named["training.ignore_weak_signal"] = True
            if kind != "federated" or changes:  # secure aggregation needs several sites, and noise
                named |= {"federation.aggregation": "plain", "federation.threshold": None, "federation.colluders": 0}
            config = compose_run(words, changed={**_list_participant_settings(asked, kind, site), **changes, **named})
            name = (f"{site} alone" if site else kind) + ("" if config.privacy.private else NO_PRIVACY)
            lines.append(Line(name=name, kind=kind, site=site, run=SearchTrial.from_config(config)))
    runs = share_number_format([line.run for line in lines])
    return [replace(line, run=run) for line, run in zip(lines, runs, strict=True)]


def _list_participant_settings(asked: RunConfig, kind: Kind, site: str | None) -> dict[str, Any]:
    alone = {"federation.min_sites": 1, "federation.enough_sites": None}
    if kind == "alone":
        return {**alone, "federation.participants": [site]}
    if kind == "federated":
        return {}
    # The partition's kind is unchanged: the keyed hash that selects test records depends on the partition's columns.
    return {
        **alone,
        "federation.num_sites": 1,
        "federation.site_names": ["all"],
        "federation.ranks": [],
        "data.declared_sizes": sum(asked.data.list_site_sizes(asked.federation.num_sites)),
        "data.partition.proportions": [],
        "data.partition.sites": dict.fromkeys(asked.data.partition.sites, 0),
    }


@dataclass(frozen=True, kw_only=True)
class Compared:
    """The result of a comparison of several models, with tables, sentences and JSON."""

    lines: Sequence[Line]  # the runs; the first is the reference
    means: Mapping[str, Sequence[str]]  # name of a mean -> names of the averaged runs
    sides: SideBySide  # scores
    groups: Mapping[str, GroupScores]  # column of the groups -> scores by group
    data: str | None  # evaluation file; None: test records, or a site's held-out records
    notes: Sequence[str]  # additional notes

    @property
    def main(self) -> str:
        return self.lines[0].name

    @property
    def models(self) -> list[str]:
        """Model names in table order, starting with the base model."""
        return [*self.sides.measured, *self.means]

    @property
    def _score(self) -> str:
        return format_score_name(self.sides.primary_metric)

    def sections(self) -> Iterator[Section]:
        yield Section(title="Verdict", notes=self.verdict())
        yield self._build_scores_section()
        others = [name for name in self.models[1:] if name != self.main]
        rows = [(name, *format_change(self.sides.compare_models(name, self.main))) for name in others]
        headings: tuple[str, ...] = ("compared with", "difference", "95 % interval", f"{self.main} is")
        yield Section(f"{_capitalize(self.main)} minus each other", headings, rows, words={0, 3})
        if names := [name for name in self.sides.scores if name != self.sides.primary_metric]:
            estimates = {model: [self.sides.estimate(model, name) for name in names] for model in self.models}
            scores = [(model, *map(_format_estimate, some)) for model, some in estimates.items()]
            yield Section("Other scores, with 95 % intervals", ("model", *map(format_score_name, names)), scores)
        for title, found in self.groups.items():
            yield self._group_section(title, found)
        besides = self._compare_personalized_adapters().items()
        of_own = [(site, beside, *format_change(one)) for beside, at in besides for site, one in at.items()]
        where = "the records that the site would have" if AT_SITES in self.groups else "all records"
        headings = ("site", "compared with", "difference", "95 % interval", "own is")
        yield Section(f"Own adapter minus each other, on {where}", headings, of_own, words={0, 1, 4})
        costs = []
        for line, result in ((line, line.run.result) for line in self.lines):
            if result is not None:
                took = "-" if result.final.seconds is None else duration(result.final.seconds)
                moved = format_size(line.bytes_moved) if line.bytes_moved else "none"
                costs.append((line.name, format_epsilon(result.privacy.epsilon), took, moved))
        if costs:
            notes = ["Time: the whole run on this machine, which simulates all sites in turn."]
            if any(line.kind == "pooled" for line in self.lines):
                notes.append("Pooled training would require all records to leave their sites.")
            yield Section("Cost", ("model", "epsilon", "time", "adapters moved"), costs, notes=notes)
        yield Section(title="How to read this table", notes=[*self.notes, *self._iter_reading_notes()])

    def verdict(self) -> list[str]:
        """Summarize the result in sentences, most important first."""
        compare, base, private = self.sides.compare_models, self.models[0], self.lines[0].private
        told, constant, score = [self._format_comparison_sentence(base)], self.sides.constant, self.sides.primary_metric
        if constant is not None:
            mine = self.sides.estimate(self.main, score)
            units = self.sides.num_units
            told.insert(0, describe_against_constant(self.main, mine, constant, score=score, num_units=units))
        told[-1:-1] = self._compare_with_local_training()
        others = [name for name in self.sides.measured if name not in (self.main, base)]
        for verdict in ("better", "worse"):
            if names := [name for name in others if compare(name, self.main).verdict == verdict]:
                told.append(f"{_capitalize(self.main)} is {verdict} than {_join_names(names)}.")
        private_of = {line.name: line.private for line in self.lines}
        means = [mean for mean, names in self.means.items() if private_of[names[0]] == private]
        told += map(self._format_comparison_sentence, means)
        plain = f"{self.main}{NO_PRIVACY}"
        if plain in private_of:
            found = compare(plain, self.main)
            said = f"With privacy it is {found.verdict} than without: {self._score}"
            said = "These records show no measurable cost of privacy:" if found.verdict == NO_DIFFERENCE else said
            told.append(f"{said} {format_with_interval(found)}.")
        pairs = combinations(self.sides.measured, 2)
        if alike := [pair for pair in pairs if compare(*pair).verdict == NO_DIFFERENCE]:
            alike.sort(key=lambda pair: self.main not in pair)
            shown = "; ".join(map(" and ".join, alike[:_MAX_NAMED]))
            more = f"; and {pluralize(len(alike) - _MAX_NAMED, 'more pair')}" if len(alike) > _MAX_NAMED else ""
            told.append(f"These records cannot distinguish: {shown}{more}.")
        for title, groups in self.groups.items():
            changes = {name: pairs[base, self.main] for name, pairs in groups.changes.items()}
            told.append(
                f"{_capitalize(title)}, compared with {base}, {self.main} is {_list_by_verdict(changes, 'in')}."
            )
            name, count = groups.groups.smallest, pluralize(min(groups.groups.sizes), self.sides.unit)
            told.append(f"The smallest group is {name} ({count}): {_format_estimate(groups.scores[name][self.main])}.")
        besides = self._compare_personalized_adapters().items()
        told += [f"Compared with {beside}, the own adapter is {_list_by_verdict(at, 'at')}." for beside, at in besides]
        if own := [line.name for line in self.lines if line.kind == "own"]:
            told.append(f"No guarantee covers the scores of {_join_names(own)}: trained without noise at one site.")
        return told

    @property
    def _runs_alone(self) -> Mapping[str, str]:
        """Site -> name of its single-site run with the same privacy setting as the main run."""
        first = self.lines[0]
        return {str(one.site): one.name for one in self.lines if one.kind == "alone" and one.private == first.private}

    def _compare_with_local_training(self) -> Iterator[str]:
        """Yield the sentence that compares the federation with each single-site run.

        Uses the site's own test records if the records are grouped by site, otherwise all records.
        """
        at_sites, each = self.groups.get(AT_SITES), dict[str, Comparison]()
        for site, name in self._runs_alone.items():
            if at_sites is None:
                each[site] = self.sides.compare_models(name, self.main)
            elif site in at_sites.changes:
                each[site] = at_sites.changes[site][name, self.main]
        if each and self.lines[0].kind == "federated":
            where = "on all records" if at_sites is None else "on each site's own test records"
            yield f"Compared with each site alone, {where}, {self.main} is {_list_by_verdict(each, 'at')}."

    def _format_comparison_sentence(self, base: str) -> str:
        found = self.sides.compare_models(base, self.main)
        if found.verdict == NO_DIFFERENCE:
            interval = format_with_interval(found)
            return f"{_capitalize(self.main)} cannot be told apart from {base} by {self._score}: {interval}."
        return f"{_capitalize(self.main)} is {found.verdict} than {base}: {self._score} {format_with_interval(found)}."

    def _compare_personalized_adapters(self) -> dict[str, dict[str, Comparison]]:
        """Compare each personalized adapter with the site's alternatives, on its own records if grouped by site.

        Returns:
            alternative -> site -> comparison.
        """
        at_sites, found = self.groups.get(AT_SITES), dict[str, dict[str, Comparison]]()
        for beside, own in _iter_personalized_pairs(self.lines, base=self.models[0]):
            pairs = {} if at_sites is None else at_sites.changes.get(str(own.site), {})
            if at_sites is None or pairs:  # otherwise the site has too few test records
                one = pairs.get((beside, own.name)) or self.sides.compare_models(beside, own.name)
                found.setdefault(beside.removeprefix(f"{own.site} "), {})[str(own.site)] = one
        return found

    def _build_scores_section(self) -> Section:
        base, *others = self.models
        own = self.sides.estimate(base, self.sides.primary_metric)
        rows = [(base, _format_score(own.value), _format_interval(own), "", "", "")]
        if self.sides.constant is not None:
            rows.append(("best constant answer", _format_score(self.sides.constant), "", "", "", ""))
        for name in others:
            found = self.sides.compare_models(base, name)
            rows.append((name, _format_score(found.tuned.value), _format_interval(found.tuned), *format_change(found)))
        where = f" on {self.data}" if self.data else ""
        title = f"{_capitalize(self._score)}{where}: {pluralize(len(self.sides.records), 'record')}"
        headings = ("model", self._score, "95 % interval", f"minus {base}", "95 % interval", "compared with it")
        return Section(title=title, headings=headings, rows=rows, words={0, 5})

    def _group_section(self, title: str, found: GroupScores) -> Section:
        """Build the table of scores by group.

        Groups by site are compared with the single-site run, other groups with the base model.
        """
        base, groups, runs = self.models[0], found.groups, self._runs_alone if title == AT_SITES else {}
        alone = {name: runs[name] for name in groups.names if name in runs}
        rows = []
        for name, count in zip(groups.names, groups.sizes, strict=True):
            scores = found.scores[name]
            change = found.changes[name][alone.get(name, base), self.main]
            values = [_format_score(scores[base].value)]
            values += [_format_score(scores[alone[name]].value) if name in alone else "-"] if alone else []
            values += [_format_score(scores[self.main].value), *format_change(change)[1:]]
            rows.append((name, f"{count:,}", *values))
        headings = ("group", f"{self.sides.unit}s", base, *(("alone",) if alone else ()), self.main)
        headings += (f"minus {'alone' if alone else base},\n95 % interval", "compared with it")
        merged = f"{OTHERS}: {pluralize(len(groups.merged), 'small group')}, merged by size alone."
        title, notes = f"{_capitalize(self._score)} {title}", [merged] if groups.merged else []
        return Section(title=title, headings=headings, rows=rows, words={0, len(headings) - 1}, notes=notes)

    def _iter_reading_notes(self) -> Iterator[str]:
        count, unit = self.sides.num_units, self.sides.unit
        drawn = f"from {RESAMPLES:,} draws of {pluralize(count, unit)}, with replacement, the same for all models"
        told = "They show the variation between samples of test records, and not the variation between training runs."
        yield f"Intervals: 95 %, {drawn}. {told}"
        if count < MIN_UNITS:
            yield f"Fewer than {MIN_UNITS} {unit}s are too few to call a model better or worse."
        if (pairs := math.comb(len(self.models), 2)) >= 20:
            yield f"Of {pairs} pairs, about {pairs // 20} would look different by chance alone."

    def to_json(self) -> dict[str, Any]:
        sides, lines = self.sides, {line.name: line for line in self.lines}
        models = []
        for name in self.models:
            scores = {score: sides.estimate(name, score) for score in sides.scores}
            about = {"name": name, "mean_of": list(self.means.get(name, ())) or None, "scores": scores}
            models.append(about | (_run_json(lines[name]) if name in lines else {}))
        pairs = [
            _convert_pair_to_json(one, other, sides.compare_models(one, other, score)) | {"score": score}
            for one, other in combinations(self.models, 2)
            for score in sides.scores
        ]
        told: dict[str, Any] = convert_to_jsonable(
            {
                "schema_version": SCHEMA_VERSION,
                "fedtune_version": __version__,
                "data": self.data,
                "records": len(sides.records),
                "unit": sides.unit,
                "units": sides.num_units,
                "primary_metric": sides.primary_metric,
                "constant_answer": sides.constant,
                "compared_with": self.main,
                "verdict": self.verdict(),
                "models": models,
                "pairs": pairs,
                "groups": {title: _convert_groups_to_json(found) for title, found in self.groups.items()},
            }
        )
        return told


def _run_json(line: Line) -> dict[str, Any]:
    about: dict[str, Any] = {"kind": line.kind, "site": line.site, "private": line.private}
    about["folder"] = str(line.run.folder)
    if line.run.result is None:  # a site's copy of a final adapter
        return about
    about["adapter_digest"] = line.run.result.adapter_digest  # the compared model, for `fedtune gate --groups`
    final, privacy = line.run.result.final, line.run.result.privacy
    about |= {"epsilon": privacy.epsilon, "delta": privacy.delta, "seconds": final.seconds}
    return about | {"bytes": line.bytes_moved, "energy": final.energy}


def _convert_pair_to_json(base: str, tuned: str, found: Comparison) -> dict[str, Any]:
    return {"base": base, "tuned": tuned, "difference": found.difference, "verdict": found.verdict}


def _convert_groups_to_json(found: GroupScores) -> dict[str, Any]:
    groups, each = found.groups, list[dict[str, Any]]()
    for name, count in zip(groups.names, groups.sizes, strict=True):
        changes = [_convert_pair_to_json(*pair, one) for pair, one in found.changes[name].items()]
        scores = {"scores": found.scores[name], "gaps": found.gaps[name], "changes": changes}
        each.append({"name": name, "units": count, **scores})
    return {"merged": groups.merged, "smallest": groups.smallest, "groups": each}


def score_side_by_side(
    lines: Sequence[Line],
    finished: Sequence[tuple[RunConfig, Path]],
    *,
    data: str | None,
    by: str | None,
    smallest: int,
    records: Sequence[Record] | None = None,
    progress: Callback = lambda progress: None,
) -> Compared:
    """Score runs on the same records, in total and by group.

    Args:
        lines: the runs of the comparison.
        finished: configuration and adapter folder of each run.
        data: a file to score on; None: `records`, or the first run's test records.
        by: the column of the groups; None: no groups.
        smallest: minimum number of units of a group.
        records: a site's own held-out records.
        progress: callback for progress.
    """
    from fedtune.runs.model_comparison import compare_runs
    from fedtune.sites.run_records import assign_sites

    means = {}
    for suffix in ("", NO_PRIVACY):
        names = [line.name for line in lines if line.kind == "alone" and line.private == (suffix == "")]
        if len(names) > 1:
            means[f"alone, mean of {len(names)}{suffix}"] = names
    runs = dict(zip((line.name for line in lines), finished, strict=True))
    sides = compare_runs(runs, file=data, records=records, means=means, progress=make_stage_callback(progress))
    first, main = finished[0][0], lines[0].name
    base, notes = next(iter(sides.measured)), []
    pairs = [(name, main) for name in sides.measured if name != main]
    pairs += [(beside, own.name) for beside, own in _iter_personalized_pairs(lines, base=base)]
    is_federated = any(line.kind == "federated" for line in lines)
    values = {f"by {by}": read_column_values(sides.records, by, key="by")} if by else {}
    if is_federated and (at_sites := assign_sites(first, sides.records)) is not None:
        values = {AT_SITES: at_sites, **values}
    groups = {}
    for title, of_records in values.items():
        if (found := sides.score_by_group(of_records, smallest=smallest, pairs=pairs)) is None:
            notes.append(f"No scores {title}: fewer than two groups have {smallest} {sides.unit}s.")
        else:
            groups[title] = found
    if first.model.adapter_sha256 is not None:
        notes.append(f"Training started from another adapter; {base} is the model without any.")
    if is_federated and first.data.partition.kind == "file":
        notes.append("There is no pooled run: each site's records are in its own file.")
    if AT_SITES in groups:
        notes.append("A simulation has all sites' test records in one place, so scores by site release nothing.")
    return Compared(lines=lines, means=means, sides=sides, groups=groups, data=data, notes=notes)


def _iter_personalized_pairs(lines: Sequence[Line], *, base: str) -> Iterator[tuple[str, Line]]:
    """Yield (alternative, personalized adapter) for all sites; alternatives include the base model."""
    for own in (line for line in lines if line.kind == "own" and line.site):
        others = [line.name for line in lines if line.kind != "own" and line.site in (None, own.site)]
        yield from ((beside, own) for beside in (base, *others))


def _list_by_verdict(changes: Mapping[str, Comparison], place: str) -> str:
    parts = []
    for verdict, said in (("better", "better"), ("worse", "worse"), (NO_DIFFERENCE, "not told apart")):
        names = [name for name, one in changes.items() if one.verdict == verdict]
        shown = [*names[:_MAX_NAMED], *([f"{len(names) - _MAX_NAMED} more"] if len(names) > _MAX_NAMED else [])]
        parts += [f"{said} {place} {_join_names(shown)}"] if names else []
    return "; ".join(parts)


def _capitalize(text: str) -> str:
    return text[:1].upper() + text[1:]


def _join_names(names: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def _format_score(value: float) -> str:
    return f"{value:z.4f}" if math.isfinite(value) else "not finite"


def _format_interval(estimate: Estimate, *, sign: str = "") -> str:
    if math.isnan(estimate.low):
        return "unknown"
    return f"{estimate.low:{sign}z.4f} to {estimate.high:{sign}z.4f}"


def _format_estimate(estimate: Estimate) -> str:
    return f"{_format_score(estimate.value)} ({_format_interval(estimate)})"


def format_change(found: Comparison) -> tuple[str, str, str]:
    """Format a comparison as difference, interval, and verdict on the second model."""
    return f"{found.difference.value:+z.4f}", _format_interval(found.difference, sign="+"), found.verdict


def format_with_interval(found: Comparison) -> str:
    """Format the difference between two models, with its interval in brackets."""
    return "{} ({})".format(*format_change(found))
