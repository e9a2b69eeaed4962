"""Hyperparameter search with a total privacy cost that is checked against the budgets before the first trial.

`fedtune.privacy.selection` computes the privacy cost. Scores on the lead's validation file select the best trial and
guide TPE; they have no privacy cost, because the file contains no site's records. All trials share one ledger per
simulated site; without `runtime.sites_dir` the sites are new, with a budget equal to the search's cost. Trials depend
only on settings, seeds and scores, so a repeated search draws the same trials, resumes, and charges no trial twice.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fedtune.api.compose import SearchedSetting, compose_run, split_search_space
from fedtune.codec import read_regular_file
from fedtune.config import RunConfig, read_saved_config
from fedtune.evaluation.bootstrap import get_score_direction
from fedtune.extras import require_extra
from fedtune.federation.run_folder import RunFolder
from fedtune.formatting import pluralize
from fedtune.lab.studies.trials import (
    SearchTrial,
    Trials,
    Values,
    build_comparability_key,
    list_combinations,
    run_quietly,
)
from fedtune.privacy import accountant
from fedtune.privacy.accountant import format_epsilon
from fedtune.privacy.durable import write_durably
from fedtune.privacy.run_plan import Plan
from fedtune.privacy.selection import MAX_TRIALS, SearchCost, Selection, compute_search_cost
from fedtune.show.budget_text import SEEDED
from fedtune.show.terminal_tables import SCHEMA_VERSION, Section, to_json_text
from fedtune.spec import NOT_GIVEN, ConfigError, FedtuneError, RefusedError, check_at_least, check_at_most

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

    from fedtune.runs.results import RunResult
    from fedtune.sites.virtual_site import VirtualSites  # which imports torch

Method = Literal["grid", "random", "tpe"]
_NOT_SEARCHED = ("name", "resume", "tracking", "runtime", "report", "cost")  # settings without an effect on training
_FILE = "search.json"
_MAX_ENDS = 64  # maximum number of validated combinations of extreme values
_NOT_PRIVATE = "There is no privacy guarantee: use trials without noise only for public records."


@dataclass(frozen=True, kw_only=True)
class Search:
    """A hyperparameter search with the plans of all trials, before the first trial runs."""

    fixed: tuple[str, ...]  # overrides of all trials
    asked: RunConfig  # configuration of the fixed overrides
    searched: tuple[SearchedSetting, ...]  # search space
    method: Method
    trials: int | None  # number of trials; None: the size of the grid
    listed: tuple[Values, ...] = ()  # values of each trial; empty for TPE
    shapes: tuple[RunConfig, ...] = ()  # configurations of the trials; for TPE, of extreme values
    plans: tuple[Plan, ...] = ()  # plans of all trials

    @classmethod
    def from_overrides(cls, overrides: Sequence[str], method: Method, *, trials: int | None = None) -> Search:
        """Draw trials in advance (except for TPE), validate them, and compute their plans.

        Args:
            overrides: settings, some with several values or an interval.
            method: "random", "grid" or "tpe".
            trials: number of trials; None: the size of the grid.

        Raises:
            ConfigError: a setting cannot be searched, or a setting that must be fixed differs between trials.
        """
        if (method == "grid") != (trials is None):
            bound = "cannot be combined with --method grid" if method == "grid" else "is required"
            raise ConfigError("trials", NOT_GIVEN, bound)
        if trials is not None:
            check_trials(trials)
        fixed, searched = split_search_space(overrides)
        if not searched:
            raise ConfigError("KEY=VALUE", NOT_GIVEN, "must contain a setting with several values, as in lora.rank=4,8")
        for one in searched:
            if one.key.split(".")[0] in _NOT_SEARCHED:
                bound = "must have one value in a search: it does not affect training"
                raise ConfigError(one.key, NOT_GIVEN, bound)
        asked = compose_run(fixed)
        if asked.runtime.kind == "deployment":
            bound = "is not available, because real sites approve each run: search in a simulation or on public data"
            raise ConfigError("runtime", "deployment", bound)
        if asked.resume is not None:
            raise ConfigError("resume", asked.resume, "conflicts with a search: repeat the same command to resume it")
        if asked.may_be_fitted:
            bound = "must be stop in a search, because its cost is fixed before the first trial"
            raise ConfigError("federation.if_over_budget", asked.federation.if_over_budget, bound)
        from fedtune.sites.data_warnings import check_decision_scores

        check_decision_scores(asked)
        search = cls(fixed=tuple(fixed), asked=asked, searched=searched, method=method, trials=trials)
        search._check_name()
        if method == "tpe" and trials is not None:
            tried = combine_extreme_values(searched)
            shapes = tuple(search.trial("shape", values) for values in tried)
            search._check_compatible(shapes)
            return replace(search, shapes=shapes, plans=(_find_common_plan(tried, shapes),) * trials)
        if trials is None:
            listed = list_combinations(searched)
        else:
            listed = draw_random_trials(searched, seed=str(asked.seed), number=trials)
        search = replace(search, listed=tuple(listed))
        shapes = tuple(search.trial(name, values) for name, values in zip(search.names, listed, strict=True))
        search._check_compatible(shapes)
        return replace(search, shapes=shapes, plans=tuple(shape.plan() for shape in shapes))

    @property
    def number(self) -> int:
        return self.trials or len(self.listed)

    @property
    def folder(self) -> Path:
        return Path(self.asked.tracking.output_dir) / self.asked.name

    @property
    def names(self) -> list[str]:
        return [f"{self.asked.name}-trial-{n + 1:0{len(str(self.number))}}" for n in range(self.number)]

    @cached_property
    def price(self) -> SearchCost:
        return compute_search_cost(self.plans)

    def trial(self, name: str, values: Values) -> RunConfig:
        sites = self.asked.runtime.sites_dir or str(RunFolder(self.folder).sites)
        places = {"name": name, "tracking.output_dir": str(self.folder), "runtime.sites_dir": sites}
        config = compose_run([*self.fixed, *(f"{key}={value}" for key, value in values.items())], changed=places)
        return config if config.model.dtype != "auto" else config.with_number_format(self._number_format)

    @cached_property
    def _number_format(self) -> str:
        """Common number format of all trials with `model.dtype=auto`, from an earlier trial or from a measurement."""
        from fedtune.sites.virtual_site import fix_number_format

        begun = (RunFolder(self.folder / name).config.parent for name in self.names)
        known = next((read_saved_config(one).model.dtype for one in begun if RunFolder(one).config.is_file()), None)
        return known or fix_number_format(self.asked, self.folder, alone=True).model.dtype

    def check_room(self) -> None:
        """Raise an error if the search exceeds the budgets of existing sites (`runtime.sites_dir`)."""
        if self.asked.runtime.sites_dir is None:
            return
        sites = self._create_sites(self.shapes[0])
        sites.check_policies_exist()  # before anything is written there
        lead = sites.lead_key().public
        known = {shape.name: shape for shape in self.shapes}
        runs = []
        for name in self.names:
            begun = RunFolder(self.folder / name).config.is_file()
            shape = known.get(name) or replace(self.shapes[0], name=name)
            config = read_saved_config(self.folder / name) if begun else shape
            runs.append(config.proposal(lead=lead, plan=config.plan()))
        others = [one.proposal(lead=lead, plan=one.plan()) for one in self.shapes]
        sites.check_room(runs, asked=f"--trials = {self.number}", shapes=others)

    def run(self, trials: Trials, work: Callable[[SearchTrial], RunResult] = run_quietly) -> None:
        """Run all unfinished trials, add them to `trials`, and record the selected trial."""
        from fedtune.sites.virtual_site import build_covering_budget

        if not (self.folder / _FILE).exists():
            self._record_search()
        tpe = None if self.listed else Tpe(self.searched, seed=str(self.asked.seed), number=self.number)
        within = build_covering_budget(self.plans) if self.asked.runtime.sites_dir is None else None
        spent: list[Plan] = []
        for place, name in enumerate(self.names):
            values = tpe.ask() if tpe else self.listed[place]
            trial = SearchTrial.from_config(self.trial(name, values), values)
            if trial.config.plan() not in self.plans:
                bound = "together determine a trial's cost: use a grid"
                raise ConfigError("KEY=VALUE", ", ".join(values), bound)
            if within is not None and not trial.earlier:
                self._create_sites(trial.config).write_policies(within=within)
            trial = trial.run(work)
            of_sites = trial.result.privacy.sites.values() if trial.result else ()
            if any(one.rounds for one in of_sites) or not isinstance(trial.error, RefusedError):  # else no charge
                spent.append(trial.config.plan())
            together = accountant.epsilon_pld([plan.full_event for plan in spent], self.plans[0].delta)
            trials.rows[trial.folder] = trial = replace(trial, together=together)
            trials.write()
            if trial.error is not None and (trial.can_resume or not isinstance(trial.error, FedtuneError)):
                raise trial.error
            if tpe:
                sign = get_score_direction(trial.config.primary_metric)
                tpe.tell(None if trial.score is None else sign * trial.score)
        if (best := trials.best) is not None:
            self._record_selection(best)

    def _check_name(self) -> None:
        if not self.folder.exists() or not any(self.folder.iterdir()):
            return
        path, name = self.folder / _FILE, self.asked.name
        try:
            same = json.loads(read_regular_file(path))["search"] == self._build_identity()
        except (OSError, ValueError, TypeError, KeyError, RecursionError):
            bound = f"is taken: {self.folder} exists and is not a search: choose another name"
            raise ConfigError("name", name, bound) from None
        if not same:
            bound = f"is taken: {path} belongs to a search with other settings: choose another name"
            raise ConfigError("name", name, bound)

    def _build_identity(self) -> dict[str, Any]:
        kept = {"method": self.method, "trials": self.trials, "searched": [*map(asdict, self.searched)]}
        return dict(json.loads(json.dumps(kept))) | {"settings": self.asked.digest()}

    def _check_compatible(self, shapes: Sequence[RunConfig]) -> None:
        from fedtune.sites.virtual_site import select_partition_settings  # torch takes seconds to import

        active = [{"federation.participants": list(one.federation.active)} for one in shapes]
        dealt = [select_partition_settings(shape) | sites for shape, sites in zip(shapes, active, strict=True)]
        for shape, settings in zip(shapes, dealt, strict=True):
            for key, value in settings.items():
                if value != dealt[0][key]:
                    bound = "must be the same in all trials: the sites' records are partitioned once"
                    raise ConfigError(key, value, bound)
            if shape.privacy.delta != shapes[0].privacy.delta:
                bound = "must be the same in all trials: a ledger has one delta"
                raise ConfigError("privacy.delta", shape.privacy.delta, bound)
            if shape.privacy.private != shapes[0].privacy.private:
                bound = "must be the same in all trials: a trial without noise makes epsilon infinite"
                raise ConfigError("privacy", "none", bound)
        if len(set(map(build_comparability_key, shapes))) > 1:
            bound = "must not change the task or the validation records, which makes scores incomparable"
            raise ConfigError("KEY=VALUE", ", ".join(one.key for one in self.searched), bound)

    def _create_sites(self, config: RunConfig) -> VirtualSites:
        from fedtune.sites.virtual_site import VirtualSites

        return VirtualSites.create(config, self.folder, config.plan())

    def _record_search(self, **more: Any) -> None:
        """Write the search file, which reserves the folder for this search."""
        about = {"schema_version": SCHEMA_VERSION, "search": self._build_identity(), "cost": self.price}
        try:
            write_durably(self.folder / _FILE, to_json_text(about | more).encode())
            self._record_price(self.folder)  # before the first trial, which inherits it
        except OSError as error:
            bound = f"must be a folder to write {self.asked.name} into ({error.strerror})"
            raise ConfigError("tracking.output_dir", self.asked.tracking.output_dir, bound) from None

    def _record_price(self, folder: Path, score: float | None = None) -> None:
        """Write a folder's selection file with the search's total cost, which every trial inherits, and a trial's
        `score`.
        """
        about = {"search": self.asked.name, "method": self.method, "primary_metric": self.asked.primary_metric}
        owed = Selection.from_cost(self.price, self.plans, **about, score=score)
        write_durably(RunFolder(folder).selection, to_json_text(asdict(owed)).encode())

    def _record_selection(self, best: SearchTrial) -> None:
        """Record the selected trial, and update its report and card and those of the previously selected trial."""
        from fedtune.report import model_card

        noted = json.loads(read_regular_file(self.folder / _FILE)).get("picked")
        if noted == best.folder.name:
            return
        for folder, score in {**({self.folder / noted: None} if noted else {}), best.folder: best.score}.items():
            self._record_price(folder, score)
            model_card.write_report_and_card(folder, language=best.config.report.language)
        self._record_search(picked=best.folder.name, primary_metric=best.config.primary_metric, score=best.score)

    def describe_selection(self, best: SearchTrial) -> str:
        by, trials, promise = best.config.primary_metric, pluralize(self.number, "trial"), _describe_promise(self.price)
        return f"Selected by validation {by} ({best.score:.3f}) out of {trials}, as its report states. {promise}"


def check_trials(trials: int) -> None:
    """Raise a ConfigError for an invalid number of trials."""
    check_at_least("trials", trials, 1)
    check_at_most("trials", trials, MAX_TRIALS)


def _find_common_plan(tried: Sequence[Values], shapes: Sequence[RunConfig]) -> Plan:
    """Return the common plan of all trials of a TPE search, which chooses values later.

    Raises:
        ConfigError: a setting in the search space changes the privacy cost of a trial.
    """
    plan = shapes[0].plan()
    for values, shape in zip(tried, shapes, strict=True):
        if shape.plan() != plan:
            key = ", ".join(key for key, value in values.items() if value != tried[0][key])
            bound = "determines a trial's cost, which --method tpe must know first: use random or grid"
            raise ConfigError(key, NOT_GIVEN, bound)
    return plan


def build_cost_section(price: SearchCost, *, seeded_noise: bool) -> Section:
    """Build the table of the search's privacy cost, for display before the first trial."""
    if not price.private:
        return Section(title="Privacy cost of the search", notes=[_NOT_PRIVATE])
    rows = [
        ("trials", f"{price.trials}"),
        ("epsilon of the most expensive trial", format_epsilon(price.epsilon_of_one)),
        ("epsilon of all trials", f"{format_epsilon(price.epsilon)} (by RDP {format_epsilon(price.epsilon_rdp)})"),
        ("smallest lifetime cap", f"{format_epsilon(price.epsilon_filter)}, by the ledgers' filter"),
    ]
    notes = [_describe_promise(price), "The selected adapter alone may reveal as much as all trials."]
    notes += [SEEDED] if seeded_noise else []
    return Section(title="Privacy cost of the search", rows=rows, words={0, 1}, notes=notes)


def _describe_promise(price: SearchCost) -> str:
    if not price.private:
        return _NOT_PRIVATE
    bound = f"epsilon at most {format_epsilon(price.epsilon)} at delta {price.delta:g} for each {price.unit}"
    return f"All trials together: {bound}, at every site."


def draw_random_trials(searched: Sequence[SearchedSetting], *, seed: str, number: int) -> list[Values]:
    """Draw independent, identically distributed trials, each with its own seed."""
    optuna = _import_optuna()
    spaces = {one.key: _make_distribution(one) for one in searched}
    trials = []
    for place in range(number):
        # Independent seeds: a trial's values are independent of its index.
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=_derive_seed(seed, place)))
        trials.append(_format_values(searched, study.ask(spaces).params))
    return trials


class Tpe:
    """A sampler with Optuna's tree-structured Parzen estimator (TPE), after random trials: a third of all trials, at
    most ten.
    """

    def __init__(self, searched: Sequence[SearchedSetting], *, seed: str, number: int) -> None:
        optuna = _import_optuna()
        first = max(1, min(10, number // 3))
        sampler = optuna.samplers.TPESampler(seed=_derive_seed(seed, 0), n_startup_trials=first)
        self._study = optuna.create_study(direction="maximize", sampler=sampler)
        self._failed = optuna.trial.TrialState.FAIL
        self._searched, self._spaces = searched, {one.key: _make_distribution(one) for one in searched}

    def ask(self) -> Values:
        self._trial = self._study.ask(self._spaces)
        return _format_values(self._searched, self._trial.params)

    def tell(self, score: float | None) -> None:
        """Report the score of the latest trial, where higher is better; None for a trial without a score."""
        self._study.tell(self._trial, score, state=self._failed if score is None else None)


def combine_extreme_values(searched: Sequence[SearchedSetting]) -> list[Values]:
    """List all combinations of choices and interval ends; if there are too many, vary one setting at a time."""
    values = {one.key: one.choices or (_format_number(one, one.low), _format_number(one, one.high)) for one in searched}
    if math.prod(map(len, values.values())) <= _MAX_ENDS:
        return [dict(zip(values, some, strict=True)) for some in product(*values.values())]
    first = {key: choices[0] for key, choices in values.items()}
    return [first, *({**first, key: value} for key, choices in values.items() for value in choices[1:])]


def _derive_seed(seed: str, place: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} values {place}".encode()).digest()[:4], "big")


def _format_values(searched: Sequence[SearchedSetting], values: Mapping[str, Any]) -> Values:
    return {one.key: str(values[one.key]) if one.choices else _format_number(one, values[one.key]) for one in searched}


def _format_number(one: SearchedSetting, value: float) -> str:
    """Format a sampled value with four significant digits."""
    return str(value) if one.is_integer else repr(min(max(float(f"{value:.4g}"), one.low), one.high))


def _make_distribution(one: SearchedSetting) -> BaseDistribution:
    from optuna import distributions

    if one.choices:
        return distributions.CategoricalDistribution(one.choices)
    if one.is_integer:
        return distributions.IntDistribution(int(one.low), int(one.high), log=one.log)
    return distributions.FloatDistribution(one.low, one.high, log=one.log)


def _import_optuna() -> Any:
    require_extra("method", "random or tpe", "search", "optuna", or_else="; or use --method grid")
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna
