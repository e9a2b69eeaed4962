"""Each value of an unsigned report changed by itself: what `report verify` finds, and what it takes as it is said."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from fedtune.report import signing
from fedtune.report.model import Report, to_json
from fedtune.report.recompute import problems
from fedtune.spec import ConfigError

UNSEEN = {
    # What a report is of, and by what it was made: no other part of it says so, too.
    r"name|date|sites\.\*\.site": "names and times",
    r"provenance\..*": "what the run was made of; `verify` compares the hash of a configuration that lies beside it",
    r"randomness": "said by the process that trained; only that it fits `seeded_noise` can be seen",
    r"target_epsilon": "what the lead asked for; `verify` compares it with the configuration beside it",
    r"cells\.\*\.facts\..*": "facts that stand in one cell and nowhere else",
    # What the site decides.
    r"sites\.\*\.approved\.(max_epsilon_per_run|max_epsilon_per_period|period|since)": "the policy's, on its word",
    r"sites\.\*\.(declared_size|left|asserted.*|reported)": "the site's own statement",
    r"sites\.\*\.lifetime\.(period|period_epsilon|reference_runs_left|restored|seeded|caps.*)": "the ledger's",
    r"sites\.\*\.lifetime\.runs\.\*\.(lead|dataset|state|base_model|adapter_sha256|most_rounds)": "the ledger's",
    r"sites\.\*\.(lifetime\.runs\.\*|spent)\.planned_epsilon": "may be said to be more; less is found",
    r"sites\.\*\.verification\..*": "what checking the ledger found: the ledger itself shows it",
    # What happened, where no figure depends on it.
    r"sites\.\*\.mechanisms\.\*\.(run|sampling_assumed|max_grad_norm)": "of no effect on epsilon",
    r"sites\.\*\.steps\.\*\.(round|time|epsilon)": "may lie between what came before and after",
    r"sites\.\*\.(releases.*|spent\.upper_bound|verdict\.reasons.*)": "who answered when, and why not; in their words",
    r"verdict\.reasons.*": "codes that say why; the state itself is derived",
    r"assumptions\.\*\.(evidence|status)": "what checked an assumption; not better than the facts allow",
    r"assumptions": "that the ledger has noted the policy is said only where the policy was there to compare",
    r"utility\..*": "exact figures on the lead's own files, which no guarantee covers",
    r"released": "that a final adapter left the lead",
    r"schema_version|audit.*|signature": "no part of the figures",
}
"""Places where one change alone is not found, and why."""


def places(part: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Each value and each list; of equal parts of a list the first only, which is enough."""
    if path and not isinstance(part, dict):
        yield path, part
    if isinstance(part, dict):
        for key, value in part.items():
            yield from places(value, (*path, key))
    elif isinstance(part, list):
        for number, value in enumerate(part if path[0] == "cells" else part[:2]):
            yield from places(value, (*path, number))


def others(value: Any) -> list[Any]:
    match value:
        case bool():
            return [not value]
        case int():
            return [value + 1, 0]
        case float():
            return [value * 0.5, None]
        case str():
            return [f"{value}x"]
        case list():
            return [[], value[:-1]] if value else []
        case _:
            return [0.0, "2026-01-01"]


def unseen(report: Report) -> Iterator[str]:
    whole = to_json(report)
    for path, value in places(whole):
        name = ".".join("*" if isinstance(key, int) else key for key in path)
        if any(re.fullmatch(pattern, name) for pattern in UNSEEN):
            continue
        for other in others(value):
            changed = copy.deepcopy(whole)
            part = changed
            for key in path[:-1]:
                part = part[key]
            part[path[-1]] = other
            try:
                found = problems(signing.read(json.dumps(changed).encode()))
            except ConfigError:
                continue  # no report
            if not found and other != value:
                yield f"{name}: {value!r} -> {other!r}"


@pytest.mark.parametrize("made", ["a_report", "a_ledger_report", "of_ledger"])
def test_one_change_is_found_wherever_it_is_not_listed(made: str, request: pytest.FixtureRequest) -> None:
    report = request.getfixturevalue(made)
    whole = report if isinstance(report, Report) else report()
    assert problems(whole) == []
    assert list(unseen(whole)) == []


def test_what_a_run_was_to_spend_is_no_less_than_its_rounds_come_to(a_report: Callable[..., Report]) -> None:
    whole = to_json(a_report())
    south = whole["sites"][1]["spent"]
    assert south["epsilon"] < south["planned_epsilon"]
    south["planned_epsilon"] = south["epsilon"]
    found = problems(signing.read(json.dumps(whole).encode()))
    assert [problem.where for problem in found] == ["sites.south-hospital.spent.planned_epsilon"]


@pytest.mark.parametrize("made", ["a_report", "of_ledger"])
def test_steps_cannot_be_nothing_until_the_last(made: str, request: pytest.FixtureRequest) -> None:
    report = request.getfixturevalue(made)
    whole = to_json(report if isinstance(report, Report) else report())
    for step in whole["sites"][0]["steps"][:-1]:
        step["epsilon"] = 0.0
    whole["utility"] = None
    assert any("steps" in problem.where for problem in problems(signing.read(json.dumps(whole).encode())))
