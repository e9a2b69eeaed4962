"""The price of a search in words, as `fedtune plan` and `fedtune search` tell it before anything is trained."""

from __future__ import annotations

from fedtune.cli.plan_sections import SEEDED
from fedtune.privacy.accountant import epsilon_text
from fedtune.privacy.selection import MOST_TRIALS, SearchPrice
from fedtune.show.sections import Section
from fedtune.spec import ConfigError, check_at_least

_NOT_PRIVATE = "Nothing is promised: a trial without noise is for public records, and costs what it trains."


def check_trials(trials: int) -> None:
    """Require a number of trials."""
    check_at_least("--trials", trials, 1)
    if trials > MOST_TRIALS:
        raise ConfigError("--trials", trials, f"must be at most {MOST_TRIALS}")


def price_section(price: SearchPrice, *, seeded_noise: bool) -> Section:
    """The price before the first trial."""
    if not price.private:
        return Section(title="Price of the search", notes=[_NOT_PRIVATE])
    rows = [
        ("trials", f"{price.trials}"),
        ("epsilon of the dearest trial", epsilon_text(price.epsilon_of_one)),
        ("epsilon of all together", f"{epsilon_text(price.epsilon)} (by RDP {epsilon_text(price.epsilon_rdp)})"),
        ("least lifetime cap", f"{epsilon_text(price.epsilon_filter)}, by the ledgers' filter"),
    ]
    notes = [promise(price), "Anybody who sees the picked adapter alone may learn as much."]
    if seeded_noise:
        notes.append(SEEDED)
    return Section(title="Price of the search", rows=rows, words={0, 1}, notes=notes)


def promise(price: SearchPrice) -> str:
    """The one sentence that matters most."""
    if not price.private:
        return _NOT_PRIVATE
    bound = f"epsilon at most {epsilon_text(price.epsilon)} at delta {price.delta:g} for each {price.unit}"
    return f"All trials together: {bound}, at every site."
