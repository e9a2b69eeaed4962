"""Discrete-time survival analysis: a hazard for each declared interval, from records with censored event times.

The head has one output per interval, the logit of the hazard: the probability that the event occurs in this interval,
given that it has not occurred before.  The loss is the mean binary cross-entropy over all intervals, to which unknown
intervals contribute 0.  Intervals are known up to the event or, for a censored record, if they ended before censoring
(Gensheimer and Narasimhan 2019, arXiv 1805.00917).  A record's loss depends on that record alone.  Cox's partial
likelihood is not available, because it couples records: it compares each record with all records still at risk.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from fedtune.data.batching import Batch
from fedtune.data.features import check_range
from fedtune.data.records import Record
from fedtune.data.spec import DataSpec
from fedtune.data.tokenization import UNSUPERVISED, Targets
from fedtune.data.values import normalize_category
from fedtune.model.spec import TaskModelSpec
from fedtune.process import torch
from fedtune.spec import ConfigError, DataError, spec
from fedtune.tasks.base import Draws, FirstTarget, Ids, Model
from fedtune.tasks.measures import Floats
from fedtune.tasks.pooled import PooledTask, TargetOf

_MAX_INTERVALS = 100
_EVENTS = {"1": True, "true": True, "0": False, "false": False}


@spec
class SurvivalSettings:
    """Settings of survival analysis: the intervals of event times.

    Attributes:
        intervals: the end of each interval in which the event may occur, ascending, in the unit of the role `time`.
    """

    intervals: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        ascend = all(start < end for start, end in pairwise((0.0, *self.intervals)))
        if len(self.intervals) > _MAX_INTERVALS or not ascend:
            bound = f"must be at most {_MAX_INTERVALS} ascending numbers above 0"
            raise ConfigError("intervals", list(self.intervals), bound)
        if self.intervals:
            check_range("intervals", (0.0, self.intervals[-1]))


class Survival(PooledTask):
    """Discrete-time survival model with one head row per interval.

    A target is 1 for the interval of the event, 0 for an interval that was survived, and otherwise `UNSUPERVISED`.
    """

    name = "survival"
    roles = ("text", "time", "event")
    answers = frozenset({"time", "event"})
    data_settings = PooledTask.data_settings | {"event_values"}
    settings = SurvivalSettings
    own: SurvivalSettings
    hub_name = ""
    primary_metric = "concordance"
    baseline = 0.5  # a constant answer does not rank records
    target_type = np.int8

    def check_own(self, data: DataSpec) -> None:
        if not self.own.intervals:
            bound = "is empty: list the end of each interval, in the unit of the time column"
            raise ConfigError("task_settings.intervals", [], bound)

    def target(self, data: DataSpec) -> TargetOf:
        ends = np.array(self.own.intervals)
        event_values = dict(zip(map(normalize_category, data.event_values), (False, True), strict=False)) or _EVENTS

        def read_target(record: Record) -> npt.NDArray[np.int8]:
            time, event = float(record.fields["time"]), event_values.get(normalize_category(record.fields["event"]))
            if event is None:
                bound = "must be 1 or true for an event and 0 or false otherwise, or one of data.event_values"
                raise DataError(record.at("event"), "an unknown value", bound)
            if time < 0:
                raise DataError(record.at("time"), "a number below 0", "must be at least 0, the start of the record")
            target = np.full(len(ends), UNSUPERVISED, dtype=np.int8)
            target[: int((ends < time).sum() if event else (ends <= time).sum())] = 0
            if event and time <= ends[-1]:
                target[(ends < time).sum()] = 1
            return target

        return read_target

    def get_target_shape(self, data: DataSpec) -> tuple[int, ...]:
        return (len(self.own.intervals),)

    def num_outputs(self, spec: TaskModelSpec) -> int:
        return len(self.own.intervals)

    def predictions(self, logits: torch.Tensor, *, spec: TaskModelSpec) -> dict[str, torch.Tensor]:
        return {"survival": (1 - logits.sigmoid()).cumprod(dim=1)}

    def compute_task_scores(self, figures: Mapping[str, Floats], *, spec: TaskModelSpec) -> dict[str, float]:
        """Compute Harrell's `concordance` and `integrated_brier` over the discrete intervals, both in [0, 1]."""
        followed, event = count_observed_intervals(figures["truth"])
        return {
            "concordance": concordance(-figures["survival"].sum(axis=1), followed, event),
            "integrated_brier": integrated_brier(figures["survival"], followed, event),
        }

    def score_unit(self, model: Model, batch: Batch) -> float:
        """Return the geometric mean of the probabilities that the model assigns to the record's known intervals.

        The score is 0 if no interval is known.
        """
        known = int((batch.targets[0] != UNSUPERVISED).sum())
        return float((-model.losses(batch)[0] * len(batch.targets[0]) / known).exp()) if known else 0.0

    def answer(self, logits: torch.Tensor, *, spec: TaskModelSpec) -> tuple[str, object]:
        """Return the probability that the event has not occurred by the end of each interval."""
        chances = self.predictions(logits[None], spec=spec)["survival"][0].tolist()
        rows = [{"until": end, "survival": chance} for end, chance in zip(self.own.intervals, chances, strict=True)]
        return ", ".join(f"{row['survival']:.3f} until {row['until']:g}" for row in rows), rows

    def dummy_field(self, role: str, data: DataSpec, *, draw: Callable[[int], int]) -> str | None:
        ends, events = self.own.intervals, data.event_values or ("0", "1")
        made = {"time": lambda: repr(ends[draw(len(ends))]), "event": lambda: events[draw(2)]}
        return made[role]() if role in made else None

    def dummy_targets(self, input_ids: Ids, *, spec: TaskModelSpec, draws: Draws, first: FirstTarget) -> Targets:
        count = len(self.own.intervals)
        places, last = np.arange(count), draws.integers(0, count, size=(len(input_ids), 1))
        event = draws.integers(0, 2, size=(len(input_ids), 1))
        return np.where(places < last, 0, np.where(places == last, event, UNSUPERVISED)).astype(np.int8)


def count_observed_intervals(truth: Floats) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Return each record's number of survived intervals, and whether the event followed, from targets (records,
    intervals).
    """
    return (truth == 0).sum(axis=1), np.asarray((truth == 1).any(axis=1))


def concordance(risk: Floats, followed: npt.NDArray[np.int64], event: npt.NDArray[np.bool_]) -> float:
    """Compute the share of comparable pairs in which the record with the earlier event has the higher risk.

    A pair is comparable if one record is known to have the event earlier.  A tie of risks counts as one half; the
    result is 0.5 without comparable pairs.
    """
    right = pairs = 0.0
    for passed in np.unique(followed[event]):  # intervals before the event; `later` records survived one more
        later, risks = np.sort(risk[followed > passed]), risk[event & (followed == passed)]
        pairs += len(later) * len(risks)
        right += float((np.searchsorted(later, risks) + np.searchsorted(later, risks, side="right")).sum()) / 2
    return right / pairs if pairs else 0.5


def integrated_brier(survival: Floats, followed: npt.NDArray[np.int64], event: npt.NDArray[np.bool_]) -> float:
    """Compute the mean Brier score of (records, intervals) survival probabilities, weighted for censoring.

    Records with a known state at the end of an interval are weighted by the inverse probability of remaining
    uncensored, a Kaplan-Meier estimate (Graf et al. 1999).  Within an interval, events precede censoring.  Intervals
    for which this estimate is 0 are excluded from the mean: no record without the event was followed to their end.

    Raises:
        DataError: no interval has a known state at its end.
    """
    count = survival.shape[1]
    stays = np.ones(count + 1)
    for place in range(count):
        here = followed == place
        at_risk = int((followed >= place).sum() - (here & event).sum())
        lost = int((here & ~event).sum())
        stays[place + 1] = stays[place] * (1 - lost / at_risk if at_risk else 1.0)
    known = [place for place in range(count) if stays[place + 1] > 0]
    if not known:
        bound = "must have records that were followed through the first interval, or had their events in it"
        raise DataError("evaluation data", "no interval with a known state at its end", bound)
    total = 0.0
    for place in known:
        occurred, survived = event & (followed <= place), followed > place
        total += float((survival[occurred, place] ** 2 / stays[followed[occurred]]).sum())
        total += float(((1 - survival[survived, place]) ** 2).sum() / stays[place + 1])
    return float(total / (len(known) * len(survival)))
