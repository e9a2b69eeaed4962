"""Sweeps over several runs with a table of results; the best run is selected by validation score only.

Selection by test score would bias the test score, because the same records would select and evaluate the run.
"""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

from fedtune.api.compose import (
    MAX_RUNS,
    SearchedSetting,
    compose_run,
    parse_override_key,
    parse_override_value,
    split_search_space,
)
from fedtune.config import RunConfig
from fedtune.evaluation.bootstrap import get_score_direction
from fedtune.federation.lead import Scores
from fedtune.federation.run_folder import RunFolder
from fedtune.formatting import convert_none_to_infinite, pluralize
from fedtune.privacy import accountant
from fedtune.privacy.accountant import format_epsilon
from fedtune.privacy.durable import write_durably
from fedtune.runs.results import DIVERGED, RunResult
from fedtune.runs.run_paths import find_run_folder, is_finished, make_default_run_name, resume_config
from fedtune.show.terminal_tables import SCHEMA_VERSION, Section
from fedtune.spec import ConfigError, FedtuneError, RunError, StuckError

_FIRST_COLUMNS = ("run", "folder", "state", "reason", "best")
"""First columns of the CSV, before varied settings, spending and scores."""
_IN_JSON = ("values", "state", "reason", "result")  # attributes of a trial in the JSON output
_MAX_NAMED = 12  # maximum number of runs listed before the first run starts

Values = Mapping[str, str]  # varied settings of a run and their values, as typed


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchTrial:
    """One run of a sweep or search, with its settings, state and result."""

    config: RunConfig
    folder: Path
    values: Values = field(default_factory=dict)  # varied settings, as typed
    earlier: bool = False  # whether the run was finished before this command
    error: BaseException | None = None  # error that ended the run
    result: RunResult | None = None  # result so far; None without run.json
    # cumulative epsilon of a search up to this trial; None if the runs do not share ledgers
    together: float | None = None

    @classmethod
    def from_config(cls, config: RunConfig, values: Values | None = None) -> SearchTrial:
        """Read a trial's state from disk: new, unfinished, or finished.

        Raises:
            ConfigError: another run has the same name.
        """
        folder = Path(config.tracking.output_dir) / config.name
        if config.resume is None and RunFolder(folder).has_begun():
            config = resume_config(config, folder, name=config.name)
        folder = find_run_folder(config)
        result = read_result(folder, finished=True)
        return cls(config=config, folder=folder, values=values or {}, earlier=result is not None, result=result)

    def run(self, work: Callable[[SearchTrial], RunResult]) -> SearchTrial:
        """Execute the trial with `work`, and return it with its result or error; skip a finished trial."""
        if self.earlier:
            return self
        try:
            return replace(self, result=work(self))
        except BaseException as error:
            return replace(self, error=error, result=read_result(self.folder))

    @property
    def state(self) -> str:
        if self.error is not None:
            return "interrupted" if isinstance(self.error, KeyboardInterrupt) else "failed"
        if self.result is None:
            return "not begun"
        return "diverged" if DIVERGED in self.result.final.findings else "finished"

    @property
    def reason(self) -> str:
        if self.state != "failed":
            return ""
        # The text of an unexpected error may contain a record.
        text = str(self.error) if isinstance(self.error, FedtuneError) else type(self.error).__name__
        return " ".join(text.split())

    @property
    def can_resume(self) -> bool:
        stopped = isinstance(self.error, RunError) and not isinstance(self.error, StuckError)
        return stopped or self.state in ("interrupted", "not begun")

    @property
    def validation(self) -> Scores:
        """Validation scores of the run's final adapter on the lead's records."""
        if not (self.result and self.result.rounds):
            return {}
        kept = self.result.final.selected_round
        return self.result.rounds[kept.round - 1 if kept else -1].metrics

    @property
    def test(self) -> Scores:
        return self.result.final.metrics if self.result else {}

    @property
    def score(self) -> float | None:
        """The validation score for selecting a run; None for an unfinished or diverged run, or without a score.

        Scores on a simulation's held-out validation fraction count, because a sweep only marks the best run in a table
        with all scores. A selection in a report (`fedtune search`) requires a validation file of the lead.
        """
        from fedtune.sites.data_warnings import scores_may_decide

        if self.state != "finished" or not (self.config.data.validation_fraction or scores_may_decide(self.config)):
            return None
        return self.validation.get(self.config.primary_metric)


def share_number_format(trials: Sequence[SearchTrial]) -> list[SearchTrial]:
    """Set a common number format for trials with `model.dtype=auto`, so that their scores are comparable.

    The format is that of the first started trial.  Without a started trial, the first trial measures the format, and
    the process caches it for the other trials.
    """
    begun = next((one.config.model.dtype for one in trials if one.config.resume is not None), "auto")
    return [replace(one, config=one.config.with_number_format(begun)) for one in trials]


def describe_price(runs: Mapping[str, SearchTrial]) -> Iterator[str]:
    """Yield sentences about the number of unfinished runs and the privacy cost of each, if there are any."""
    if not (waiting := {name: trial.config.plan() for name, trial in runs.items() if not trial.earlier}):
        return
    names = [*waiting][:_MAX_NAMED]
    names += [f"and {len(waiting) - _MAX_NAMED} more"] if len(waiting) > _MAX_NAMED else []
    rounds = _format_range(pluralize(most, "round") for most in sorted({plan.num_rounds for plan in waiting.values()}))
    yield f"{pluralize(len(waiting), 'run')} of {rounds}, one after the other: {', '.join(names)}."
    if prices := {(plan.full_event, plan.delta) for plan in waiting.values() if plan.private}:
        epsilons = sorted(accountant.epsilon_pld([whole], delta) for whole, delta in prices)
        deltas = _format_range(f"{delta:g}" for delta in sorted({delta for _, delta in prices}))
        spends = f"epsilon {_format_range(map(format_epsilon, epsilons))} at delta {deltas}"
        yield f"Each spends {spends} of its records; together they spend more."


def _format_range(values: Iterable[str]) -> str:
    first, *others = dict.fromkeys(values)
    return f"{first} to {others[-1]}" if others else first


def run_quietly(trial: SearchTrial) -> RunResult:
    """Simulate a trial without terminal output."""
    from fedtune.api.public import simulate

    return simulate(trial.config).result


def build_comparability_key(config: RunConfig) -> tuple[Any, ...]:
    """Build a key that is equal for runs with comparable validation scores."""
    data = config.data
    read = (tuple(sorted(data.columns.items())), data.on_bad_record, data.labels)
    # The records of a share follow from these.
    share = (data.validation_fraction, data.test_fraction, data.train_file, config.privacy.unit, config.seed)
    # A loss is one of tokens: model, template and length decide which these are.
    tokens = (config.model.path, data.prompt_template, data.chat_template, data.max_length)
    on_tokens = tokens if config.primary_metric == "loss" else ()
    chosen = (data.validation_file, data.validation_rows, *(share if data.validation_fraction else ()))
    return (config.task, *chosen, *read, *on_tokens)


def read_result(folder: Path, *, finished: bool = False) -> RunResult | None:
    """Read the result of the run in `folder`; None without a result, or for an unfinished run if `finished` is set."""
    if not RunFolder(folder).result.is_file():
        return None
    from fedtune.report.from_run import read_run

    with suppress(FedtuneError):  # resuming the run reports a damaged folder
        return read_run(folder).result if not finished or is_finished(folder) else None
    return None


def list_combinations(searched: Sequence[SearchedSetting]) -> list[Values]:
    """List all combinations of values; the last setting varies fastest.

    Raises:
        ConfigError: a setting has an interval instead of values, or there are too many combinations.
    """
    for one in searched:
        if not one.choices:
            bound = "has infinitely many values: list values for a grid or a sweep, as in 0.001,0.01,0.1"
            raise ConfigError(one.key, f"{one.low:g} to {one.high:g}", bound)
    keys = [one.key for one in searched]
    if math.prod(len(one.choices) for one in searched) > MAX_RUNS:
        raise ConfigError(", ".join(keys), "...", f"must produce at most {MAX_RUNS} runs in all")
    return [dict(zip(keys, values, strict=True)) for values in product(*(one.choices for one in searched))]


@dataclass
class Trials:
    """The trials of a sweep or search in order, and their CSV table."""

    table: Path
    fewest: int = 2  # scored runs among which one is called the best
    rows: dict[Path, SearchTrial] = field(default_factory=dict)  # by folder
    again: tuple[str, ...] = ()  # overrides that repeat the sweep under the same name

    @classmethod
    def from_sweep(cls, overrides: Sequence[str], compose: Callable[[list[str]], RunConfig] = compose_run) -> Trials:
        """Build one trial per combination of comma-separated values, named after the sweep unless `name` is swept."""
        fixed, searched = split_search_space(overrides)
        given = [str(parse_override_value(override)) for override in fixed if parse_override_key(override) == "name"]
        is_named = any(one.key == "name" for one in searched)
        name = given[-1] if given else make_default_run_name()
        trials = cls(Path(), again=(*overrides, *([] if given or is_named else [f"name={name}"])))
        differ = [one.key for one in searched if len(one.choices) > 1]
        for values in list_combinations(searched):
            words = [*fixed, *(f"{key}={value}" for key, value in values.items())]
            if not is_named:
                chosen = ",".join(f"{key}={value}" for key, value in values.items())
                suffix = re.sub(r"[^A-Za-z0-9_.,=-]+", "-", chosen).strip("-") or "run"
                words.append(f"name='{name}-{suffix}'")
            trial = SearchTrial.from_config(compose(words), {key: values[key].strip("'\"") for key in differ})
            if trial.folder in trials.rows:
                raise ConfigError("name", trial.config.name, "is used by two runs of the sweep: give each its own name")
            trials.rows[trial.folder] = trial
        first = next(iter(trials.rows))
        trials.table = first.parent / f"{f'{first.name}-sweep' if is_named else name}.csv"
        trials._check_table()
        return trials

    def run(self, work: Callable[[SearchTrial], RunResult] = run_quietly) -> None:
        """Run all unfinished trials, then raise the first error; unexpected errors are raised immediately."""
        for trial in share_number_format([*self.rows.values()]):
            done = self.rows[trial.folder] = trial.run(work)
            self.write()
            if done.error is not None and not isinstance(done.error, FedtuneError):
                raise done.error
        self.raise_first_error()

    def raise_first_error(self) -> None:
        for trial in self.rows.values():
            if trial.error is not None:
                raise trial.error

    @property
    def best(self) -> SearchTrial | None:
        """The trial with the best validation score; None if there are too few scores, or they are not comparable."""
        scored = [(score, trial) for trial in self.rows.values() if (score := trial.score) is not None]
        if len(scored) < self.fewest or len({build_comparability_key(trial.config) for _, trial in scored}) > 1:
            return None
        sign = get_score_direction(scored[0][1].config.primary_metric)
        return max(scored, key=lambda pair: sign * pair[0])[1]

    def _check_table(self) -> None:
        """Raise an error if the table's path is a file that is not the table of these trials."""
        path = self.table
        if not path.exists():
            return
        try:
            with path.open(encoding="utf-8", newline="") as file:
                table = csv.DictReader(file)
                ours = tuple(table.fieldnames or ())[: len(_FIRST_COLUMNS)] == _FIRST_COLUMNS
                others = {row["run"] for row in table} - {folder.name for folder in self.rows} if ours else set()
        except (OSError, UnicodeError, csv.Error):
            ours, others = False, set()
        if not ours or others:
            holds = f"contains other runs, such as {min(others)}" if others else "is not a sweep's table"
            raise ConfigError("name", path.stem, f"is taken: {path} {holds}; choose another name")

    def write(self) -> None:
        """Write the table of all started trials with full precision; do nothing before the first trial starts."""
        if not any(folder.exists() for folder in self.rows):
            return
        best, lines = self.best, list[dict[str, Any]]()
        for trial in self.rows.values():
            if trial.state == "not begun":
                continue
            first = (trial.folder.name, trial.folder, trial.state, trial.reason, "yes" if trial is best else "")
            cells = dict(zip(_FIRST_COLUMNS, first, strict=True)) | dict(trial.values)
            if trial.result is not None:
                privacy = trial.result.privacy
                cells |= {"epsilon_spent": convert_none_to_infinite(privacy.epsilon), "delta": privacy.delta}
            if trial.together is not None:
                cells["epsilon_so_far"] = trial.together
            for kind, scores in (("validation", trial.validation), ("test", trial.test)):
                cells |= {f"{kind}_{name}": "nan" if value is None else value for name, value in scores.items()}
            lines.append(cells)
        columns = dict.fromkeys((*_FIRST_COLUMNS, *(column for line in lines for column in line)))
        text = io.StringIO()
        writer = csv.DictWriter(text, list(columns), restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
        try:
            write_durably(self.table, text.getvalue().encode())
        except OSError as error:
            raise RunError(f"the sweep's table {self.table} cannot be written ({error.strerror})") from error

    def to_json(self) -> dict[str, Any]:
        best, trials = self.best, self.rows.values()
        return {
            "schema_version": SCHEMA_VERSION,
            "table": str(self.table) if self.table.is_file() else None,
            "best": str(best.folder) if best else None,
            "runs": [{"folder": str(one.folder)} | {key: getattr(one, key) for key in _IN_JSON} for one in trials],
        }

    def section(self) -> Section:
        trials, best = list(self.rows.values()), self.best
        shared = any(trial.together is not None for trial in trials)
        judged = dict.fromkeys(trial.config.primary_metric for trial in trials)
        every = [(kind, name) for kind in ("validation", "test") for name in judged]
        scores = [(kind, name) for kind, name in every if any(name in getattr(trial, kind) for trial in trials)]
        keys = list(trials[0].values)
        rows, styles = list[tuple[str, ...]](), dict[int, str]()
        for number, trial in enumerate(trials, start=1):
            if trial.state == "not begun":
                continue
            styles |= {len(rows): "bold"} if trial is best else {}
            figures = [_format_figure(getattr(trial, kind), name) for kind, name in scores]
            figures.append(format_epsilon(trial.result.privacy.epsilon) if trial.result else "-")
            figures += [format_epsilon(trial.together)] if shared else []
            mark = "*" if trial is best else ""
            rows.append((mark, str(number), *trial.values.values(), *figures, trial.state))
        headings = ("", "run", *(key.replace(".", ".\n") for key in keys))
        headings += (*(f"{kind}\n{name}" for kind, name in scores), "epsilon\nspent")
        headings += (*(["epsilon\nso far"] if shared else []), "state")
        title, words = "Trials" if shared else "Sweep", {0, *range(2, 2 + len(keys)), len(headings) - 1}
        notes = list(_list_trial_notes(trials, best))
        return Section(title=title, headings=headings, rows=rows, words=words, styles=styles, notes=notes)


def _format_figure(scores: Scores, name: str) -> str:
    value = scores.get(name)
    return f"{value:.3f}" if value is not None else "not finite" if name in scores else "-"


def _list_trial_notes(trials: Sequence[SearchTrial], best: SearchTrial | None) -> Iterator[str]:
    reasons: dict[str, list[str]] = {}
    for number, trial in enumerate(trials, start=1):
        if trial.reason:
            reasons.setdefault(trial.reason, []).append(str(number))
    for reason, numbers in reasons.items():
        yield f"run{'s' * (len(numbers) > 1)} {', '.join(numbers)} failed: {reason}"
    if waiting := sum(trial.state == "not begun" for trial in trials):
        yield f"{pluralize(waiting, 'run')} not begun yet."
    if earlier := sum(trial.earlier for trial in trials):
        yield f"{pluralize(earlier, 'run')} had already finished, with the same settings."
    finished = [trial for trial in trials if trial.state == "finished"]
    if best is not None:
        yield f"* best by validation {best.config.primary_metric}. Selection by test score would bias the test score."
    elif len(finished) > 1 and not any(trial.validation for trial in finished):
        yield "No run is marked as best: without validation records, selection by test score would be biased."
    elif len(finished) > 1 and not any(trial.score is not None for trial in finished):
        yield "No run is marked as the best: this requires a data.validation_file without training records."
    elif len(finished) > 1:
        yield "No run is marked as the best: their validation scores cannot be compared."
    charged = [trial for trial in trials if trial.result and trial.config.privacy.private]
    if len(charged) > 1 and charged[0].together is None:
        yield "Runs on the same records add up: the total privacy loss is more than one row's."
