"""Two reports beside each other: what changed in settings, privacy, utility and cost."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fedtune.report.facts import RunFacts
from fedtune.report.model import Report, to_json
from fedtune.spec import NOT_GIVEN, ConfigError
from fedtune.words import dotted

Group = Literal["settings", "privacy", "utility", "cost"]
GROUPS: tuple[Group, ...] = ("utility", "privacy", "settings", "cost")
Value = str | float | bool | None
Figures = dict[str, Value]
Missing = Literal["before", "after"] | None
_PLACES: Mapping[str, Mapping[Group, Sequence[str]]] = tomllib.loads(
    Path(__file__).with_name("compared.toml").read_text(encoding="utf-8")
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """One thing that differs, by its dotted key in `report.json`; None also for what one has not (`missing`)."""

    group: Group
    key: str
    before: Value
    after: Value
    missing: Missing = None


def differences(
    before: Report, after: Report, *, settings: tuple[Mapping[str, object], Mapping[str, object]] = ({}, {})
) -> tuple[Change, ...]:
    """The differences between two reports, group by group; a ConfigError if they are of different kinds.

    `settings` are those of both runs, where their configurations are at hand: a report holds only the hash.
    """
    if before.kind != after.kind:
        bound = f"the first report is of a {before.kind} and the second of a {after.kind}: give two of one kind"
        raise ConfigError("report diff", NOT_GIVEN, bound)
    found, both = list[Change](), (_figures(before), _figures(after))
    for figures, one in zip(both, settings, strict=True):
        figures["settings"] |= _flat(one, "config.")
    for group in GROUPS:
        old, new = (figures[group] for figures in both)
        for key in old | new:
            missing: Missing = "before" if key not in old else "after" if key not in new else None
            if missing or old[key] != new[key]:
                found.append(Change(group=group, key=key, before=old.get(key), after=new.get(key), missing=missing))
    return tuple(found)


def _figures(report: Report) -> dict[Group, Figures]:
    """Figures by group: settings and machine, privacy with verdicts, scores, sums over rounds."""
    data = to_json(report)["derived"]
    found = {group: _picked(data, _PLACES["of_report"].get(group, ()), "") for group in GROUPS}
    for site in data["sites"]:
        where = f"sites.{site['site']}."
        for group, places in _PLACES["of_site"].items():
            found[group] |= _picked(site, places, where)
            for row in site["mechanisms"]:
                # A run's report has one row for a site, whose run is called otherwise in every report.
                one_run = report.kind == "run" and len(site["mechanisms"]) == 1
                name = "mechanism." if one_run else f"runs.{row['run']}."
                found[group] |= _picked(row, _PLACES["of_mechanism"][group], where + name)
    found["privacy"] |= {f"assumptions.{one.code}": one.status for one in report.assumptions}
    if report.audit:
        found["privacy"] |= _picked(data["audit"], ("method", "confidence"), "audit.")
        for bound in data["audit"]["bounds"]:
            where = f"audit.{bound['site'] or 'all_sites'}."
            found["privacy"] |= _picked(bound, _PLACES["of_bound"]["privacy"], where)
        for attack in data["audit"]["membership"]:
            found["privacy"][f"audit.{attack['site'] or 'all_sites'}.{attack['score']}.auroc"] = attack["auroc"]
    if isinstance(report.facts, RunFacts):
        # Whether records were protected from anybody at all: a simulation has them in one place.
        found["settings"]["runtime"] = report.facts.settings.get("runtime", "simulation")
    if report.utility:
        if report.utility.selection is not None:
            found["privacy"] |= _flat(data["utility"]["selection"], "selection.")
        found["utility"], rounds = _picked(data["utility"], _PLACES["of_utility"]["utility"], ""), report.utility.rounds
        found["cost"] = {
            "rounds": len(rounds),
            "seconds": math.fsum(one.seconds for one in rounds),
            "bytes_down": sum(one.bytes_down for one in rounds),
            "bytes_up": sum(one.bytes_up for one in rounds),
            "sites_that_failed": sum(len(one.failed_sites) for one in rounds),
            **_picked(data["utility"], ("energy.*",), ""),
        }
    return found


def _picked(data: Mapping[str, Any], places: Sequence[str], prefix: str) -> Figures:
    """The values at some places, as far as there is anything."""
    found: Figures = {}
    for place in places:
        parent, dot, name = place.rpartition(".")
        fields = data[parent] if parent else data
        if fields is not None:
            found |= _flat(fields if name == "*" else {name: fields[name]}, prefix + parent + dot)
    return found


def _flat(fields: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, Value]]:
    """Nested mappings as dotted keys; a list of mappings has one key a place, any other list is one text."""
    for key, value in dotted(fields, prefix):
        if isinstance(value, list | tuple) and value and all(isinstance(part, Mapping) for part in value):
            for number, part in enumerate(value, 1):
                yield from _flat(part, f"{key}.{number}.")
        else:
            yield key, ", ".join(map(str, value)) if isinstance(value, list | tuple) else value
