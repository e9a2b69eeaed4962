"""Scores by group: of a site, a hospital's ward, an age band, whatever a column of the test file says of a record.

For each group: its score, and its gap to all others, which is the score in the group less the score outside it.  The
gap of the best group to the worst is not used: the more groups there are and the smaller they are, the larger it is by
chance alone, and no interval that treats the two as chosen beforehand is true of it.

Small groups are merged by a rule that looks at their sizes and at no score (`merged`), so that nobody chooses the
groups by what came out.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedtune.evaluation.bootstrap import Comparison, Drawn, Estimate, Figures, Scores, drawn
from fedtune.privacy.mechanism import OTHERS
from fedtune.privacy.run_plan import MORE_THAN_DECLARED
from fedtune.spec import DataError

_TWO_SIDED = 1.96
_GROUP = "group"
"""Beside a model's figures: the number of each record's group."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Groups:
    """Which group each record is in.

    Attributes:
        names: of the groups, the largest first and `OTHERS` last.
        codes: (records,) the place of each record's group in `names`.
        sizes: units of each group; a user with records in two groups counts in both.
        merged: the names that became `OTHERS`.
    """

    names: tuple[str, ...]
    codes: npt.NDArray[np.int64]
    sizes: tuple[int, ...]
    merged: tuple[str, ...] = ()

    @property
    def smallest(self) -> str:
        """The name of the smallest group."""
        return min(zip(self.sizes, self.names, strict=True))[1]


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupScores:
    """One score of models in each group.

    Attributes:
        groups: that they were scored in.
        scores: by group and model.
        gaps: likewise, to all other groups.
        changes: by group and pair of models, the second beside the first.
    """

    groups: Groups
    scores: Mapping[str, Mapping[str, Estimate]]
    gaps: Mapping[str, Mapping[str, Estimate]]
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


@dataclass(frozen=True, kw_only=True, slots=True)
class NoisedGroup:
    """One group over all sites, by the noised scores that they released.

    Attributes:
        name: of the group; `OTHERS` last.
        units: held-out units in it, noised.
        score: their mean score in [0, 1].
        gap: `score` less that of all other groups that are told; NaN where there is none.
        error, gap_error: what the interval of 95 % adds on either side, for the noise and for the units that happened
            to be held out.
    """

    name: str
    units: float
    score: float
    error: float
    gap: float = math.nan
    gap_error: float = math.nan


@dataclass(frozen=True, kw_only=True, slots=True)
class NoisedGroups:
    """The groups of which noised scores say something.

    Attributes:
        told: the largest first.
        merged: names that are part of `OTHERS`, or were left out with it.
        impossible: sites whose numbers no scores between 0 and 1 can have; they have no part in it.
    """

    told: tuple[NoisedGroup, ...] = ()
    merged: tuple[str, ...] = ()
    impossible: tuple[str, ...] = ()


_FEWEST_NOISED = 20
_CLEAR_OF_NOISE = 6.0
"""Deviations of the noise in a group's size.  Of smaller groups those would be told whose size noise made too large,
and with it their scores too small."""
_BEYOND_NOISE = 6.0
"""Deviations by which a number misses what it can be without noise, where that is no chance."""


def fewest_told(noise_multiplier: float, num_sites: int, *, merged: int = 1) -> float:
    """Noised units that a group needs to be told; `merged`: of how many groups it is made."""
    return max(_FEWEST_NOISED, _CLEAR_OF_NOISE * _deviation(noise_multiplier, num_sites, merged=merged))


def _deviation(noise_multiplier: float, num_sites: int, *, merged: int = 1) -> float:
    """Of the noise in a sum over sites and groups, in units."""
    return noise_multiplier * math.sqrt(2 * num_sites * merged)


def noised_groups(
    released: Mapping[str, Sequence[float]],
    *,
    names: Sequence[str],
    sizes: Mapping[str, float],
    noise_multiplier: float,
) -> NoisedGroups:
    """Scores by group over all sites, of what each site released.

    A group of fewer noised units than `fewest_told` goes to `OTHERS`, which is told if it has enough for as many groups
    as it is made of.  All of it reads released numbers alone: post-processing, which costs no epsilon.  A site may lie
    about its scores, as about anything; numbers that are impossible are found here.

    Args:
        released: site -> (score, count) of each of `names` and of all others, as `mechanism.noised_scores` gives them.
        names: of the groups.
        sizes: site -> its declared held-out units, by which its numbers were divided.
        noise_multiplier: of these numbers.
    """
    each = {site: np.array(values).reshape(-1, 2) * sizes[site] for site, values in released.items()}
    wrong = tuple(site for site, pairs in each.items() if _is_impossible(pairs, sizes[site], noise_multiplier))
    good = [pairs for site, pairs in each.items() if site not in wrong]
    if not good:
        return NoisedGroups(merged=tuple(names), impossible=wrong)
    totals = np.sum(good, axis=0).tolist()
    parts = {name: (score, units, 1) for name, (score, units) in zip([*names, OTHERS], totals, strict=True)}
    fewest = fewest_told(noise_multiplier, len(good))
    small = [name for name in names if parts[name][1] < fewest]
    rest = _together([parts[name] for name in (*small, OTHERS)])
    kept = {name: parts[name] for name in sorted(names, key=lambda name: (-parts[name][1], name)) if name not in small}
    if rest[1] >= fewest_told(noise_multiplier, len(good), merged=rest[2]):
        kept[OTHERS] = rest
    told = []
    for name, part in kept.items():
        score, error = _mean(part, noise_multiplier, len(good))
        others = [kept[other] for other in kept if other != name]
        gap = gap_error = math.nan
        if others:
            beside, error_beside = _mean(_together(others), noise_multiplier, len(good))
            gap, gap_error = score - beside, math.hypot(error, error_beside)
        told.append(NoisedGroup(name=name, units=part[1], score=score, error=error, gap=gap, gap_error=gap_error))
    return NoisedGroups(told=tuple(told), merged=tuple(small), impossible=wrong)


def _is_impossible(pairs: npt.NDArray[np.float64], declared: float, noise_multiplier: float) -> bool:
    """Whether no scores can be so, by more than noise explains, of a site with this declared number of held-out units.

    Sums of scores and numbers of units are at least 0, and a group's score is at most its number of units.  A unit is
    in one group, so that all groups together have no more units than a site may hold out: as many times the declared
    number as a site may have, and what its draw of them may add (a binomial's tail, by Bernstein, for six deviations).
    """
    scores, units = pairs.T
    noise = _BEYOND_NOISE * _deviation(noise_multiplier, 1)
    most = MORE_THAN_DECLARED * declared
    most += _BEYOND_NOISE * math.sqrt(most) + _BEYOND_NOISE**2
    too_many = units.sum() > most + _BEYOND_NOISE * _deviation(noise_multiplier, 1, merged=len(units))
    below, above = np.minimum(scores, units) < -noise, scores - units > math.sqrt(2) * noise  # of two noised numbers
    return bool(too_many or np.any(below | above))


def _together(parts: Sequence[tuple[float, float, int]]) -> tuple[float, float, int]:
    scores, units, merged = zip(*parts, strict=True)
    return sum(scores), sum(units), sum(merged)


def _mean(part: tuple[float, float, int], noise_multiplier: float, num_sites: int) -> tuple[float, float]:
    """A group's mean score, and half of its interval; `part` is merged of groups, each with the noise of all sites."""
    total, units, merged = part
    score = min(1.0, max(0.0, total / units))
    noise = _deviation(noise_multiplier, num_sites, merged=merged) ** 2 * (1 + score**2) / units**2
    return score, _TWO_SIDED * math.sqrt(noise + score * (1 - score) / units)


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
