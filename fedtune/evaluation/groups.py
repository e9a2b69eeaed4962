"""Scores by group: by site, hospital ward, age band, or any other column of the test file.

Each group gets its score, and its gap: the score inside the group minus the score of all records outside it.  The gap
between the best and the worst group is not used.  It grows by chance alone with more and smaller groups, and an
interval that treats the two groups as chosen in advance would be wrong.

Small groups are merged by a rule that depends on their sizes and on no score (`merge_values`), so that nobody can
choose the groups by the results.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedtune.evaluation.bootstrap import Comparison, Drawn, Estimate, Figures, Scores, score_draws
from fedtune.spec import DataError

OTHERS = "all others"  # the group of merged small groups
_GROUP = "group"  # key of each record's group index, next to a model's figures


@dataclass(frozen=True, kw_only=True, slots=True)
class Groups:
    """Assignment of records to groups."""

    names: tuple[str, ...]  # group names, the largest group first and `OTHERS` last
    codes: npt.NDArray[np.int64]  # (records,) index of each record's group in `names`
    sizes: tuple[int, ...]  # units of each group; a user with records in two groups counts in both
    merged: tuple[str, ...] = ()  # names of the groups in `OTHERS`

    @property
    def smallest(self) -> str:
        """Name of the smallest group."""
        return min(zip(self.sizes, self.names, strict=True))[1]


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupScores:
    """One score of several models, by group."""

    groups: Groups
    scores: Mapping[str, Mapping[str, Estimate]]  # by group and model
    gaps: Mapping[str, Mapping[str, Estimate]]  # gap to all other groups, by group and model
    # by group and pair of models, the second compared with the first
    changes: Mapping[str, Mapping[tuple[str, str], Comparison]]


def merge_values(
    values: Sequence[str], *, smallest: int, units: Sequence[npt.NDArray[np.int64]] | None = None
) -> Groups:
    """Form groups of at least `smallest` units, if there are that many units.

    Each value with fewer units joins `OTHERS`; while `OTHERS` itself is too small, the next smallest group joins it.
    The rule depends only on the sizes, and between groups of equal size on their names.

    Args:
        values: the group value of each record.
        smallest: the minimum number of units of a group.
        units: the indices of each unit's records; None: each record is a unit.
    """
    by_unit = [{value} for value in values] if units is None else [{values[i] for i in places} for places in units]

    def count_units(chosen: set[str]) -> int:
        return sum(not chosen.isdisjoint(unit_values) for unit_values in by_unit)

    counts = Counter(value for unit_values in by_unit for value in unit_values)
    small = {value for value, count in counts.items() if count < smallest or value == OTHERS}
    left = sorted(set(counts) - small, key=lambda value: (counts[value], value))
    while small and left and count_units(small) < smallest:
        small.add(left.pop(0))
    names = (*reversed(left), *((OTHERS,) if small else ()))
    place = {value: names.index(value) for value in left} | dict.fromkeys(small, len(left))
    sizes = [counts[value] for value in reversed(left)]
    sizes += [count_units(small)] if small else []
    return Groups(
        names=names,
        codes=np.array([place[value] for value in values], dtype=np.int64),
        sizes=tuple(sizes),
        merged=tuple(sorted(small)),
    )


def score_groups(
    models: Mapping[str, Figures],
    groups: Groups,
    *,
    score: str,
    scores: Scores,
    pairs: Sequence[tuple[str, str]],
    units: Sequence[npt.NDArray[np.int64]] | None = None,
) -> GroupScores:
    """Score models in each group, with confidence intervals from the same draws of units for all groups and models.

    Args:
        models: per-record inputs of the scores, by model, for the same records.
        groups: at least two groups of these records.
        score: the name of the score to compare.
        scores: computes scores by name from the inputs.
        pairs: pairs of models to compare in each group.
        units: the indices of each unit's records; None: each record is a unit.
    """

    def score_each(figures: Figures) -> dict[str, float]:
        """Compute the score inside each group, and its gap to the records outside the group."""
        codes, rest = figures[_GROUP], {name: values for name, values in figures.items() if name != _GROUP}
        scored: dict[str, float] = {}
        for number in range(len(groups.names)):
            parts = codes == number, codes != number
            if not all(part.any() for part in parts):
                raise DataError("evaluation data", "no record", "must contain a record of each group")
            inside, outside = (scores({name: values[part] for name, values in rest.items()})[score] for part in parts)
            scored |= {f"in {number}": inside, f"gap {number}": inside - outside}
        return scored

    codes: npt.NDArray[np.float64] = groups.codes.astype(np.float64)
    coded: dict[str, Figures] = {model: {**figures, _GROUP: codes} for model, figures in models.items()}
    drawn = score_draws(coded, scores=score_each, units=units)
    numbers = {name: n for n, name in enumerate(groups.names)}
    # The minimum number of units applies to the group's own units.
    of_group = {n: Drawn(drawn.values, drawn.draws, num_units=size) for n, size in enumerate(groups.sizes)}
    return GroupScores(
        groups=groups,
        scores={
            name: {model: drawn.estimate(model, f"in {n}", judged=score) for model in models}
            for name, n in numbers.items()
        },
        gaps={name: {model: drawn.estimate(model, f"gap {n}") for model in models} for name, n in numbers.items()},
        changes={
            name: {pair: of_group[n].compare_scores(*pair, f"in {n}", judged=score) for pair in pairs}
            for name, n in numbers.items()
        },
    )
