"""What page 1 says beyond single figures: who could see what, a picture of 100 guesses, which assumptions to list."""

from __future__ import annotations

import math

from markupsafe import Markup

from fedtune.report.model import Assumption
from fedtune.report.words import Words

Access = dict[str, tuple[str, ...]]
"""Who -> a code for each of `COLUMNS`."""

COLUMNS = ("raw", "before_noise", "after_noise", "combined", "final")
"""What there is to see."""
_MOST_ASSUMPTIONS = 5
_COIN_TOSSING = 50
_SEES: Access = {
    "own_site": ("yes", "yes", "own", "yes", "yes"),
    "other_sites": ("no", "no", "no", "yes", "yes"),
    "lead": ("no", "no", "yes", "yes", "yes"),
    "users": ("no", "no", "no", "no", "yes"),
    "public": ("no", "no", "no", "no", "if_published"),
}
_WITHOUT_NOISE: Access = {
    "own_site": ("yes", "yes", "none_made", "yes", "yes"),
    "other_sites": ("no", "no", "none_made", "yes", "yes"),
    "lead": ("no", "same_as_before", "none_made", "yes", "yes"),
}
# The sites make their noise from the same seed.
_WITH_A_SEED: Access = {
    "other_sites": ("no", "with_seed", "no", "yes", "yes"),
    "lead": ("no", "with_seed", "yes", "yes", "yes"),
}
_RESULT = {"no_noise": 1, "seeded": 2, "noised": 2}
"""The column of the result that a site is left with when it takes its own from all combined."""
_MOST_FOR_SUBTRACTION = 2


class PageOne:
    """Of one report; every word and figure comes from elsewhere."""

    def __init__(self, words: Words) -> None:
        self._words = words

    def access(self) -> Access:
        """What each of five sees."""
        noise = self._words.noise
        sees = _SEES | {"noised": {}, "seeded": _WITH_A_SEED, "no_noise": _WITHOUT_NOISE}[noise]
        if how := self.by_subtraction():
            others = list(sees["other_sites"])
            others[_RESULT[noise]] = how
            sees["other_sites"] = tuple(others)
        return sees

    def by_subtraction(self) -> str | None:
        """How one of two sites sees the other's result: it takes its own from the average of both; None: it cannot."""
        report = self._words.report
        if report.kind == "ledger":
            return "if_two_sites"  # of its runs the ledger knows no others that took part
        rounds = report.utility.rounds if report.utility else ()
        took_part = [len(report.sites), *(len(one.sites) for one in rounds if one.sites)]
        return "by_subtraction" if min(took_part) <= _MOST_FOR_SUBTRACTION else None

    def is_simulated(self) -> bool:
        """Whether the record says that no real sites took part."""
        return any(cell.facts.get("runtime") in ("simulation", "ray") for cell in self._words.report.cells)

    def largest_failures(self) -> str | None:
        """Pointer to the site that expects most failures of the promise."""
        sites = self._words.report.sites
        known = {
            place: site.meaning.expected_failures
            for place, site in enumerate(sites)
            if site.meaning is not None and site.meaning.expected_failures is not None
        }
        return f"/sites/{max(known, key=lambda place: known[place])}" if known else None

    def assumptions(self) -> tuple[Assumption, ...]:
        """All violated ones, and then as many others as page 1 has room for."""
        found = self._words.report.assumptions
        violated = [one for one in found if one.status == "violated"]
        others = [one for one in found if one.status != "violated"]
        return (*violated, *others[: max(0, _MOST_ASSUMPTIONS - len(violated))])

    def guesses(self, pointer: str) -> Markup:
        """A picture of 100 guesses: discs are right by luck, diamonds right beyond that, rings wrong."""
        right = min(100, math.ceil(self._words.at(pointer)))
        marks = "".join(_mark(number, right) for number in range(100))
        label = self._words.text("meaning.picture", number=right)
        return Markup('<svg class="guesses" viewBox="0 0 200 50" role="img" aria-label="{}">{}</svg>').format(
            label, Markup(marks)
        )


def _mark(number: int, right: int) -> str:
    x, y = number % 20 * 10 + 5, number // 20 * 10 + 5
    if number >= right:
        return f'<circle cx="{x}" cy="{y}" r="3" fill="#fff" stroke="#666"/>'
    if number < _COIN_TOSSING:
        return f'<circle cx="{x}" cy="{y}" r="3.2" fill="#767676"/>'
    return f'<path d="M{x} {y - 4.4}l4.4 4.4-4.4 4.4-4.4-4.4z" fill="#0b3d66"/>'
