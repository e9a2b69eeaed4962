"""The scores of a run's model by group, from the JSON output of `fedtune compare --by`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

from fedtune.codec import parse_json, read_bounded_file
from fedtune.spec import ConfigError

_BOUND = "must be the JSON output of fedtune compare --by"


class GroupScore(NamedTuple):
    """The score of a model on one group of records or persons.

    Attributes:
        column: title of the groups, such as "by ward".
        name: name of the group.
        units: number of records or persons in the group.
        score: the model's primary metric on the group; None: it is not defined there.
        gap: the score minus the score of all other groups; None: one of them is not defined.
    """

    column: str
    name: str
    units: int
    score: float | None
    gap: float | None


def read_group_scores(
    path: Path, *, adapter_digest: str, primary_metric: str, key: str = "groups", bound: str = _BOUND
) -> tuple[GroupScore, ...]:
    """Read the groups of a comparison, with the scores of the model whose adapter has this digest.

    Args:
        path: the JSON output of `fedtune compare --by`, or a `compare.json`.
        adapter_digest: digest of the final adapter in `run.json`; "": of no model.
        primary_metric: the score that ranks models of the run.
        key: name of the file, for error messages.
        bound: the accepted file, for error messages.

    Raises:
        ConfigError: the file cannot be read, is not such a comparison, or does not contain this model.
    """
    data = read_bounded_file(path, key=key)
    try:
        told = parse_json(data, key=key, bound=bound)
        digests = {model["name"]: model.get("adapter_digest") for model in told["models"]}
        own = next(name for name, digest in digests.items() if digest and digest == adapter_digest)
        found = tuple(
            GroupScore(column, str(one["name"]), one["units"], one["scores"][own]["value"], one["gaps"][own]["value"])
            for column, groups in told["groups"].items()
            for one in groups["groups"]
        )
        valid = all(type(one.units) is int and _is_score(one.score) and _is_score(one.gap) for one in found)
        if valid and told["primary_metric"] == primary_metric:
            return found
    except (LookupError, TypeError, ValueError, AttributeError, StopIteration):
        pass
    raise ConfigError(key, str(path), bound)


def _is_score(value: object) -> bool:
    return value is None or (type(value) in (int, float) and abs(value) <= sys.float_info.max)  # type: ignore[arg-type]
