"""Scores by group: of a site, a hospital's ward, an age band, whatever a column of the test file says of a record.

For each group: its score, and its gap to all others, which is the score in the group less the score outside it.  The
gap of the best group to the worst is not used: the more groups there are and the smaller they are, the larger it is by
chance alone, and no interval that treats the two as chosen beforehand is true of it.

Small groups are merged by a rule that looks at their sizes and at no score (`merged`), so that nobody chooses the
groups by what came out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedtune.evaluation.bootstrap import Comparison, Drawn, Estimate, Figures, Scores, drawn
from fedtune.spec import DataError

OTHERS = "all others"  # the group of all units that belong to no group of its own
_GROUP = "group"  # beside a model's figures: the number of each record's group


@dataclass(frozen=True, kw_only=True, slots=True)
class Groups:
    """Which group each record is in."""

    names: tuple[str, ...]  # of the groups, the largest first and `OTHERS` last
    codes: npt.NDArray[np.int64]  # (records,) the place of each record's group in `names`
    sizes: tuple[int, ...]  # units of each group; a user with records in two groups counts in both
    merged: tuple[str, ...] = ()  # the names that became `OTHERS`

    @property
    def smallest(self) -> str:
        """The name of the smallest group."""
        return min(zip(self.sizes, self.names, strict=True))[1]


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupScores:
    """One score of models in each group."""

    groups: Groups  # that they were scored in
    scores: Mapping[str, Mapping[str, Estimate]]  # by group and model
    gaps: Mapping[str, Mapping[str, Estimate]]  # likewise, to all other groups
    # by group and pair of models, the second beside the first
    changes: Mapping[str, Mapping[tuple[str, str], Comparison]]


def merged(values: Sequence[str], *, smallest: int, units: Sequence[npt.NDArray[np.int64]] | None = None) -> Groups:
    """Groups of at least `smallest` units, where there are that many units.

    Each value with fewer units goes to `OTHERS`; while that has too few itself, the next smallest group joins it.  The
    sizes alone decide, and among equal sizes the names.

    Args:
        values: of each record.
        smallest: units of a group.
        units: for each unit the places of its records; None: each record is one.
    """
    own_values = [{value} for value in values] if units is None else [{values[i] for i in places} for places in units]

    def units_in(chosen: set[str]) -> int:
        return sum(not chosen.isdisjoint(own) for own in own_values)

    counts = Counter(value for own in own_values for value in own)
    small = {value for value, count in counts.items() if count < smallest or value == OTHERS}
    left = sorted(set(counts) - small, key=lambda value: (counts[value], value))
    while small and left and units_in(small) < smallest:
        small.add(left.pop(0))
    names = (*reversed(left), *((OTHERS,) if small else ()))
    place = {value: names.index(value) for value in left} | dict.fromkeys(small, len(left))
    sizes = [counts[value] for value in reversed(left)]
    sizes += [units_in(small)] if small else []
    return Groups(
        names=names,
        codes=np.array([place[value] for value in values], dtype=np.int64),
        sizes=tuple(sizes),
        merged=tuple(sorted(small)),
    )


def by_group(
    models: Mapping[str, Figures],
    groups: Groups,
    *,
    score: str,
    scores: Scores,
    pairs: Sequence[tuple[str, str]],
    units: Sequence[npt.NDArray[np.int64]] | None = None,
) -> GroupScores:
    """Score models in each group, with intervals from the same draws of units for all.

    Args:
        models: figures of the same records under each model.
        groups: of the records, at least two.
        score: the one that counts.
        scores: from figures to scores by name.
        pairs: models to compare in each group.
        units: for each unit the places of its records; None: each record is one.
    """

    def in_each(figures: Figures) -> dict[str, float]:
        """From figures to the score in each group, and its gap to the records outside it."""
        codes, own = figures[_GROUP], {name: values for name, values in figures.items() if name != _GROUP}
        found: dict[str, float] = {}
        for number in range(len(groups.names)):
            parts = codes == number, codes != number
            if not all(part.any() for part in parts):
                raise DataError("evaluation data", "no record", "must hold a record of each group")
            inside, outside = (scores({name: values[part] for name, values in own.items()})[score] for part in parts)
            found |= {f"in {number}": inside, f"gap {number}": inside - outside}
        return found

    codes: npt.NDArray[np.float64] = groups.codes.astype(np.float64)
    coded: dict[str, Figures] = {model: {**figures, _GROUP: codes} for model, figures in models.items()}
    found, numbers = drawn(coded, scores=in_each, units=units), {name: n for n, name in enumerate(groups.names)}
    # The group's own units are what must be enough.
    of_group = {n: Drawn(found.values, found.draws, num_units=size) for n, size in enumerate(groups.sizes)}
    return GroupScores(
        groups=groups,
        scores={name: {model: found.estimate(model, f"in {n}") for model in models} for name, n in numbers.items()},
        gaps={name: {model: found.estimate(model, f"gap {n}") for model in models} for name, n in numbers.items()},
        changes={
            name: {pair: of_group[n].comparison(*pair, f"in {n}", judged=score) for pair in pairs}
            for name, n in numbers.items()
        },
    )
