"""Which settings the trials of a search try: every combination, at random, or by TPE after earlier scores.

What is drawn depends on settings, seeds and scores alone, so the same search again tries the same, one after another.
"""

from __future__ import annotations

import hashlib
import inspect
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any, Protocol

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override
from hydra.errors import HydraException

from fedtune.api.compose import in_grammar, in_our_words, require_few
from fedtune.privacy.selection import MOST_TRIALS
from fedtune.spec import NOT_GIVEN, ConfigError

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

Values = Mapping[str, str]
"""Of one trial: the searched settings with their values, as they are typed."""
_MOST_ENDS = 64
"""Combinations that are looked at before the first trial."""
_OF_A_SPACE = "must be values with commas between them, interval(LOW,HIGH), log(LOW,HIGH), or int(...) of one of these"


@dataclass(frozen=True, kw_only=True, slots=True)
class Searched:
    """A setting, or a group of them, that a search gives values.

    Attributes:
        choices: its values as they are typed; empty: any number from `low` to `high`, whole where both are.
        log: whether numbers are drawn evenly by their logarithm.
    """

    key: str
    choices: tuple[str, ...] = ()
    low: float = 0.0
    high: float = 0.0
    log: bool = False


def split_searched(overrides: Sequence[str]) -> tuple[list[str], tuple[Searched, ...]]:
    """The overrides that all trials of a search have in common, and the settings that it gives values.

    Raises:
        ConfigError: one is no override, or its range of values is empty.
    """
    words = [in_grammar(override) for override in overrides]
    parser = OverridesParser.create()
    parser.functions.register(name="log", func=_log)
    parser.functions.definitions["log"] = inspect.signature(_log, eval_str=True)  # Hydra takes no types in strings
    try:
        parsed = parser.parse_overrides(words)
    except HydraException as error:
        wrong = in_our_words(error, words)
        key, _, value = str(wrong.value).partition("=")
        raise ConfigError(key, value, _OF_A_SPACE) if re.match(r"\w+\(", value) else wrong from error
    keys = [one.get_key_element() for one in parsed]
    for place, (key, one) in enumerate(zip(keys, parsed, strict=True)):
        if one.is_sweep_override() and key in keys[place + 1 :]:
            raise ConfigError(
                key, NOT_GIVEN, "must not be given again after its values: the last would be all that counts"
            )
    fixed = [typed for typed, one in zip(overrides, parsed, strict=True) if not one.is_sweep_override()]
    return fixed, tuple(_searched(one) for one in parsed if one.is_sweep_override())


def _log(start: int | float, end: int | float) -> IntervalSweep:
    return IntervalSweep(start=float(start), end=float(end), tags={"log"})


def _searched(override: Override) -> Searched:
    key, value = override.get_key_element(), override.value()
    typed = override.input_line.partition("=")[2] if override.input_line else ""
    if not isinstance(value, IntervalSweep):
        try:
            require_few([override])
            values = tuple(dict.fromkeys(map(str, override.sweep_string_iterator())))
        except (ValueError, HydraException):  # a range of steps of 0, or names of files
            raise ConfigError(key, typed, _OF_A_SPACE) from None
        return Searched(key=key, choices=values)
    low, high, log = value.start, value.end, "log" in value.tags
    if low is None or high is None or not (low < high and math.isfinite(high - low) and (low > 0 or not log)):
        least = ", both above 0" if log else ""
        raise ConfigError(key, typed, f"must go from a smaller number to a larger one{least}")
    return Searched(key=key, low=low, high=high, log=log)


class Proposer(Protocol):
    """Says what to try next."""

    def ask(self, number: int) -> Values:
        """The values of trial `number`, counted from 0; asked for in this order."""

    def tell(self, score: float | None) -> None:
        """The score of the trial that was asked for last, and larger is better; None: it has none."""


class Listed:
    """Trials that are known before the first one."""

    def __init__(self, trials: Sequence[Values]) -> None:
        self.trials = tuple(trials)

    def ask(self, number: int) -> Values:
        return self.trials[number]

    def tell(self, score: float | None) -> None:
        """Nothing follows from it."""


def grid(searched: Sequence[Searched]) -> Listed:
    """Every combination, the last setting's values changing fastest.

    Raises:
        ConfigError: a setting has no end of values, or there are too many combinations.
    """
    count = 1
    for one in searched:
        if not one.choices:
            bound = "has no end of values, and a grid tries all: list some, as in 0.001,0.01,0.1"
            raise ConfigError(one.key, f"{one.low:g} to {one.high:g}", bound)
        count *= len(one.choices)
    if count > MOST_TRIALS:
        raise ConfigError("--method", "grid", f"must give at most {MOST_TRIALS} trials, and these values give {count}")
    keys = [one.key for one in searched]
    return Listed([dict(zip(keys, values, strict=True)) for values in product(*(one.choices for one in searched))])


def at_random(searched: Sequence[Searched], *, seed: str, number: int) -> Listed:
    """Trials that are each drawn by themselves from the same distribution."""
    optuna = _optuna()
    spaces = {one.key: _distribution(one) for one in searched}
    trials = []
    for place in range(number):
        # One seed for each, so that one trial's values say nothing about its place among them.
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=_number_from(seed, place)))
        trials.append(_typed(searched, study.ask(spaces).params))
    return Listed(trials)


class Tpe:
    """Optuna's tree-structured Parzen estimator; a third of the trials, ten at most, are drawn at random first."""

    def __init__(self, searched: Sequence[Searched], *, seed: str, number: int) -> None:
        optuna = _optuna()
        first = max(1, min(10, number // 3))
        sampler = optuna.samplers.TPESampler(seed=_number_from(seed, 0), n_startup_trials=first)
        self._study = optuna.create_study(direction="maximize", sampler=sampler)
        self._failed = optuna.trial.TrialState.FAIL
        self._searched, self._spaces = tuple(searched), {one.key: _distribution(one) for one in searched}

    def ask(self, number: int) -> Values:
        self._trial = self._study.ask(self._spaces)
        return _typed(self._searched, self._trial.params)

    def tell(self, score: float | None) -> None:
        if score is None:
            self._study.tell(self._trial, state=self._failed)
        else:
            self._study.tell(self._trial, score)


def ends(searched: Sequence[Searched]) -> list[Values]:
    """Each listed value, and both ends of each interval: with all of the others', or their first where that is many."""
    keys, values = [one.key for one in searched], [_of_all(one) for one in searched]
    if math.prod(map(len, values)) <= _MOST_ENDS:
        return [dict(zip(keys, some, strict=True)) for some in product(*values)]
    first = {one.key: _of_all(one)[0] for one in searched}
    return [first, *({**first, one.key: value} for one in searched for value in _of_all(one)[1:])]


def _of_all(one: Searched) -> tuple[str, ...]:
    return one.choices or (_number(one, one.low), _number(one, one.high))


def _number_from(seed: str, place: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} values {place}".encode()).digest()[:4], "big")


def _typed(searched: Sequence[Searched], values: Mapping[str, Any]) -> Values:
    return {one.key: str(values[one.key]) if one.choices else _number(one, values[one.key]) for one in searched}


def _number(one: Searched, value: float) -> str:
    """Four digits are enough to tell trials apart."""
    if _is_whole(one):
        return str(value)
    return repr(min(max(float(f"{value:.4g}"), one.low), one.high))


def _is_whole(one: Searched) -> bool:
    return isinstance(one.low, int) and isinstance(one.high, int)


def _distribution(one: Searched) -> BaseDistribution:
    from optuna import distributions

    if one.choices:
        return distributions.CategoricalDistribution(one.choices)
    if _is_whole(one):
        return distributions.IntDistribution(int(one.low), int(one.high), log=one.log)
    return distributions.FloatDistribution(one.low, one.high, log=one.log)


def _optuna() -> Any:
    try:
        import optuna
    except ImportError:
        bound = "needs Optuna: pip install 'fedtune[search]'; a grid does without"
        raise ConfigError("--method", "random or tpe", bound) from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna
