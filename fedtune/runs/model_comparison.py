"""Comparison of finished runs and their base models on the same records, by score and by group."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fedtune.config import RunConfig
from fedtune.data import Record, group_by_user
from fedtune.data.records import read_column_values
from fedtune.evaluation.bootstrap import Comparison, Drawn, Estimate, Figures, Scores, score_draws
from fedtune.evaluation.generation import compute_text_scores
from fedtune.evaluation.groups import Groups, GroupScores, merge_values, score_groups
from fedtune.model.spec import LoraSpec
from fedtune.privacy.mechanism import Unit
from fedtune.runs.saved_model import BASE, SavedModel
from fedtune.sites.run_records import LeadRecords
from fedtune.sites.shared_model import Evaluation, LeadData, ignore_progress
from fedtune.spec import ConfigError, DataError, check_one_of
from fedtune.tasks.measures import Detail

_MAX_GROUPS = 100


@dataclass(frozen=True, kw_only=True)
class SideBySide:
    """Evaluations of several models on the same records, with bootstrap intervals."""

    records: Sequence[Record] = field(repr=False)  # the scored records
    # Record indices of each user; None: each record is a unit.
    users: list[npt.NDArray[np.int64]] | None = field(repr=False)
    primary_metric: str  # name of the primary metric
    measured: Mapping[str, Evaluation] = field(repr=False)  # model -> evaluation, the untrained model first
    means: Mapping[str, Sequence[str]]  # name -> models whose average is an additional model
    score: Scores = field(repr=False)  # function from figures to scores
    detailed: Callable[[Figures], Detail | None] = field(repr=False)  # function from figures to detailed scores
    constant: float | None = None  # primary metric of the best constant prediction; None without one

    @property
    def unit(self) -> Unit:
        """Resampling unit of the bootstrap intervals."""
        return "record" if self.users is None else "user"

    @cached_property
    def _drawn(self) -> tuple[Drawn, ...]:
        """Bootstrap samples of the records and, if all models generated texts for the same prompts, of the prompts."""
        examples = {name: measured.examples for name, measured in self.measured.items()}
        sets = [score_draws(examples, scores=self.score, units=self.users)]
        if len({len(measured.texts.get("rouge_l", ())) for measured in self.measured.values()} | {0}) == 2:
            texts = {name: measured.texts for name, measured in self.measured.items()}
            sets.append(score_draws(texts, scores=compute_text_scores))
        for name, models in self.means.items():
            sets = [drawing.with_mean(name, models) for drawing in sets]
        return tuple(sets)

    @property
    def num_units(self) -> int:
        """Number of units that the bootstrap resamples."""
        return self._drawn[0].num_units

    @property
    def scores(self) -> tuple[str, ...]:
        """Names of all scores, the primary metric first."""
        names = [score for drawing in self._drawn for score in next(iter(drawing.values.values()))]
        return tuple(sorted(names, key=lambda name: name != self.primary_metric))

    def estimate(self, model: str, score: str) -> Estimate:
        """Estimate a model's score with its bootstrap interval."""
        return self._get_draws_for_score(score).estimate(model, score)

    def compare_models(self, base: str, tuned: str, score: str | None = None) -> Comparison:
        """Compare two models by a score, by default by the primary metric."""
        drawn = self._get_draws_for_score(score := score or self.primary_metric)
        for model in (base, tuned):
            check_one_of("model", model, drawn.values)
        return drawn.compare_scores(base, tuned, score)

    def _get_draws_for_score(self, score: str) -> Drawn:
        check_one_of("score", score, self.scores)
        return next(drawing for drawing in self._drawn if score in next(iter(drawing.values.values())))

    def score_by_group(
        self, values: Sequence[str], *, smallest: int, pairs: Sequence[tuple[str, str]]
    ) -> GroupScores | None:
        """Compute the primary metric by group, or return None if fewer than two groups have at least `smallest` units.

        Args:
            values: group of each record, in the order of the records.
            smallest: minimum number of units in a group; smaller groups are merged.
            pairs: pairs of models to compare within each group.

        Raises:
            ConfigError: there are more than `_MAX_GROUPS` groups, which is too many to read or to score quickly.
        """
        groups: Groups = merge_values(values, smallest=smallest, units=self.users)
        if len(groups.names) > _MAX_GROUPS:
            bound = f"leaves {len(groups.names)} groups; raise it until at most {_MAX_GROUPS} are left"
            raise ConfigError("smallest", smallest, bound)
        if len(groups.names) < 2:
            return None
        examples = {name: measured.examples for name, measured in self.measured.items()}
        return score_groups(
            examples, groups, score=self.primary_metric, scores=self.score, pairs=pairs, units=self.users
        )


def compare_runs(
    runs: Mapping[str, tuple[RunConfig, Path]],
    *,
    file: str | None = None,
    records: Sequence[Record] | None = None,
    means: Mapping[str, Sequence[str]] | None = None,
    final: bool = False,
    progress: Callable[[str, int, int], None] = ignore_progress,
) -> SideBySide:
    """Score finished runs and their base model on the same records.

    Models are loaded one at a time. Runs that differ only in the values of the adapter share one model.

    Args:
        runs: name -> (scoring settings, folder of the adapter), at least one. The first run's settings select the
            records.
        file: file of records; None: the test records of the first run.
        records: a site's own records to score instead; records that cannot be used are skipped.
        means: name -> names of runs whose average adapter is scored as an additional model.
        final: compute the final scores of a run, which take longer than the scores of a round.
        progress: callback for slow steps.

    Raises:
        ConfigError: an adapter or the file cannot be used, or the runs' scores are not comparable.
    """
    first, _ = next(iter(runs.values()))
    for name, (config, _) in runs.items():
        _require_comparable(name, config, first)
    evaluations: dict[str, Evaluation] = {}
    bases: dict[Hashable, str] = {}
    places: list[int] = []
    together: dict[Hashable, list[str]] = {}
    for name, (config, _) in runs.items():
        together.setdefault((config.task_model(), _list_input_settings(config)), []).append(name)
    for done, names in enumerate(together.values()):
        progress(f"scoring {', '.join(names)}", done, len(together))
        config, _ = runs[names[0]]
        # Before loading the model, which is slower.
        lead_records = LeadRecords.read_for_scoring(config, file) if records is None else None
        saved = SavedModel(config, {name: runs[name][1] for name in names})
        if lead_records is not None:
            data = LeadData.build(lead_records, config, saved.tokenizer)
        else:
            task, within, rows = saved.model.task, saved.model.num_ids, list(records or ())
            data = LeadData(rows, task.tokenize(rows, saved.tokenizer, data=config.data, lenient_within=within))
        places = places or [record.line for record in data.records]
        if places != [record.line for record in data.records]:
            bound = "must select the first run's test records"
            raise ConfigError("run", names[0], f"{bound}; give both a data file")
        of_these = saved.evaluate_models(data)
        # A new adapter does not change the model, so the base model is scored without one.
        base = replace(config.task_model(), lora=LoraSpec(), seed=0), _list_input_settings(config)
        if base not in bases:
            bases[base] = f"{BASE} of {names[0]}" if bases else BASE
            evaluations[bases[base]] = of_these[BASE]
        evaluations |= {name: of_these[name] for name in names}
    users = None
    if first.privacy.unit == "user":
        with suppress(DataError):  # the file of the records has no user column
            who = read_column_values(data.records, first.data.columns["user"], key="data.columns.user", role="user")
            users = group_by_user([Record({"user": user}) for user in who])
    scored = saved.model.task
    return SideBySide(
        records=data.records,
        users=users,
        primary_metric=scored.primary_metric_for(first.data),
        measured={name: evaluations[name] for name in (*bases.values(), *runs)},
        means=means or {},
        score=partial(scored.compute_final_scores if final else scored.scores, spec=saved.model.spec),
        detailed=partial(scored.detail, spec=saved.model.spec),
        constant=scored.majority_baseline(data.examples) if records is None else None,
    )


def _list_input_settings(config: RunConfig) -> Hashable:
    """List the settings, other than the model, that determine the model's input for a record."""
    data = config.data
    return data.max_length, data.prompt_template, data.chat_template, tuple(sorted(data.columns.items()))


def _require_comparable(name: str, config: RunConfig, first: RunConfig) -> None:
    """Check that a run's scores are comparable with those of the first run.

    Args:
        name: name of the run.
        config: configuration of the run.
        first: configuration of the first run.

    Raises:
        ConfigError: a setting differs that changes the meaning of the scores.
    """
    task = config.bound_task
    for key, value, expected in (
        ("task", config.task, first.task),
        ("data.labels", config.data.labels, first.data.labels),
        ("data.target_range", config.data.target_range, first.data.target_range),
        ("data.columns", task.count_texts_per_record(config.data), task.count_texts_per_record(first.data)),
        ("privacy.unit", config.privacy.unit, first.privacy.unit),
    ):
        if value != expected:
            raise ConfigError("run", name, f"must have the first run's {key} to be compared with it")
    if task.predicts_tokens and (config.model.path, _list_input_settings(config)) != (
        first.model.path,
        _list_input_settings(first),
    ):
        bound = "must have the first run's model.path, columns, template and data.max_length"
        raise ConfigError("run", name, f"{bound}: otherwise the losses are averages over different tokens")
