"""The price of a search in words, as `fedtune plan` and `fedtune search` tell it before anything is trained."""

from __future__ import annotations

from fedtune.cli.plan_sections import SEEDED
from fedtune.cli.sections import Section
from fedtune.privacy.accountant import epsilon_text
from fedtune.privacy.run_plan import Plan
from fedtune.privacy.selection import MOST_TRIALS, SearchPrice, price_of, price_of_drawn
from fedtune.spec import ConfigError, check_at_least

_NOT_PRIVATE = "Nothing is promised: a trial without noise is for public records, and costs what it trains."


def price_asked_for(plan: Plan, *, trials: int | None, mean_trials: float | None) -> SearchPrice | None:
    """The price of a search whose trials all have this plan; None: no number of them is given.

    Raises:
        ConfigError: the number is none, or two are given.
    """
    if trials is not None and mean_trials is not None:
        raise ConfigError("--mean-trials", mean_trials, "does not go with --trials")
    if mean_trials is not None:
        return price_of_drawn(plan, mean=mean_trials, key="--mean-trials")
    if trials is None:
        return None
    check_trials(trials)
    return price_of([plan] * trials)


def check_trials(trials: int) -> None:
    """Require a number of trials."""
    check_at_least("--trials", trials, 1)
    if trials > MOST_TRIALS:
        raise ConfigError("--trials", trials, f"must be at most {MOST_TRIALS}")


def price_section(price: SearchPrice, *, seeded_noise: bool) -> Section:
    """The price before the first trial."""
    if not price.private:
        return Section(title="Price of the search", notes=[_NOT_PRIVATE])
    mean = price.mean
    number = f"{price.trials}" if mean is None else f"drawn: {mean:g} on average, at most {price.trials}"
    rows = [
        ("trials", number),
        ("epsilon of the dearest trial", epsilon_text(price.epsilon_of_one)),
        ("epsilon of all together", f"{epsilon_text(price.epsilon)} (by RDP {epsilon_text(price.epsilon_rdp)})"),
        ("least lifetime cap", f"{epsilon_text(price.epsilon_filter)}, by the ledgers' filter"),
    ]
    if price.epsilon_of_picked is not None:
        rows.append(
            ("epsilon of the picked adapter", f"{epsilon_text(price.epsilon_of_picked)}, for who sees only that")
        )
    notes = [promise(price)]
    if mean is None:
        notes.append("Anybody who sees the picked adapter alone may learn as much: the number of trials is fixed.")
    else:
        notes.append(
            "No ledger is charged with the last figure: it holds if you keep all else of the search to yourself."
        )
    if seeded_noise:
        notes.append(SEEDED)
    return Section(title="Price of the search", rows=rows, words=frozenset({0, 1}), notes=notes)


def promise(price: SearchPrice) -> str:
    """The one sentence that matters most."""
    if not price.private:
        return _NOT_PRIVATE
    bound = f"epsilon at most {epsilon_text(price.epsilon)} at delta {price.delta:g} for each {price.unit}"
    return f"All trials together: {bound}, at every site."
