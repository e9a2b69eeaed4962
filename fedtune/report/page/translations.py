"""The translations of the report's page in `texts.toml`, and each language's number formats.

Privacy losses are rounded up and remaining budgets down; a missing limit is shown as a word, never as 0 or a blank.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import ROUND_CEILING, ROUND_FLOOR, ROUND_HALF_EVEN, Context, Decimal
from functools import lru_cache
from pathlib import Path
from typing import Any

from markupsafe import Markup, escape

from fedtune.privacy.accountant import format_epsilon, format_factor
from fedtune.show.budget_text import ArrivalRange
from fedtune.show.lines import format_power_of_ten
from fedtune.spec import check_one_of

LANGUAGES = ("en", "de")
_TIMES = "\N{MULTIPLICATION SIGN}"
MAX_RIGHT = Decimal("99.9999")  # right guesses of 100; a larger bound is shown as unbounded
_SMALLEST_PLAIN = Decimal("1e-7")  # smaller numbers are shown with an exponent
_ANY_FLOAT = Context(prec=700)  # enough digits for the largest and the smallest float
_PREFIXES = ("", "k", "M", "G", "T", "P", "E")
_UNITS = {"bytes": "B", "flop": "FLOP"}
_EVEN = ROUND_HALF_EVEN
_PLACES = {"left": (3, ROUND_FLOOR), "score": (4, _EVEN), "of_100_fine": (2, ROUND_CEILING), "seconds": (1, _EVEN)}


@dataclass(frozen=True, slots=True)
class Catalog:
    """Translated texts by section and key; `language` is also the page's `lang` attribute."""

    language: str
    texts: Mapping[str, Mapping[str, str]]

    def override_texts(self, of: str) -> Catalog:
        """Return a catalog in which the texts of the section `of` override texts of other sections.

        A key of that section has the form `section__key`; an unknown section overrides nothing.
        """
        others = {tuple(key.split("__")): text for key, text in self.texts.get(of, {}).items()}
        texts = {
            section: {key: others.get((section, key), text) for key, text in of_section.items()}
            for section, of_section in self.texts.items()
        }
        return Catalog(self.language, texts)

    def text(self, key: str, **values: object) -> Markup:
        """Return the text `section.key` with its placeholders filled in; values that are not Markup are escaped."""
        section, name = key.split(".")
        return Markup(escape(self.texts[section][name])).format(**values)

    def has(self, section: str, code: str) -> bool:
        return code in self.texts[section]

    def code(self, section: str, code: str) -> Markup:
        """Return the text for a code in the report; an unknown code, such as one from a later version, is shown
        unchanged.
        """
        return self.text(f"{section}.{code}") if self.has(section, code) else Markup("<code>{}</code>").format(code)

    def listed(self, section: str, codes: Sequence[str]) -> Markup:
        """Join the texts for several codes as "a, b and c", or with semicolons if a text contains a comma."""
        words = [self.code(section, code) for code in codes]
        if any(", " in word for word in words):
            return Markup("; ").join(words)
        if len(words) < 2:
            return words[0] if words else self.text("word.none")
        return Markup(", ").join(words[:-1]) + self.text("word.list_end") + words[-1]

    def arrivals(self, people: Iterable[ArrivalRange]) -> Markup:
        """Describe people by the time when they joined."""
        return Markup(", ").join(self.text(f"arrivals.{one.code}", first=one.first, last=one.last) for one in people)

    def figure(self, value: Any, kind: str) -> str:
        """Format a figure in this language, by its kind.

        Kinds: "epsilon" (rounded up), "factor" (e to that power, rounded up), "cap" (as set), "left" (rounded down),
        "exact" (as set), "number" (six digits), "score", "count", "of_100" (a percentage of guesses, rounded up to an
        integer; above 99, to enough digits to differ from 100), "of_100_fine" (rounded up), "percent" (rounded up),
        "share" (a percentage rounded up to two digits, or above 10 as "of_100"), "failures" (rounded up), "seconds",
        "duration", "bytes", "flop", "day", "moment", "length" (of a list).

        None is "unbounded" for an epsilon, "no limit" for a cap or a remaining budget, and otherwise "not known".
        """
        if kind in ("epsilon", "factor"):
            text = format_epsilon(value) if kind == "epsilon" else format_factor(value)
            return self.texts["word"]["unbounded"] if text == "unbounded" else self._localize_marks(text)
        if value is None:
            return self.texts["word"]["no_cap" if kind in ("cap", "left") else "unknown"]
        if kind in ("day", "moment"):
            return self._format_time(value, kind)
        if isinstance(value, float) and not math.isfinite(value):
            return self.texts["word"]["unbounded"]
        exact = Decimal(len(value)) if kind == "length" else Decimal(repr(value))
        if kind in _PLACES:
            return self._localize_marks(str(_round_to_places(exact, *_PLACES[kind])))
        match kind:
            case "cap" | "exact":
                return self._format_plain(exact)
            case "number" | "failures":
                return self._format_plain(_round_to_digits(exact, 6 if kind == "number" else 2, kind))
            case "count" | "length":
                return self._localize_marks(f"{exact:,}")
            case "of_100" if exact > MAX_RIGHT:
                return self.texts["word"]["unbounded"]
            case "of_100":
                places = -(100 - exact).adjusted() if exact > 99 else 0
                return self._localize_marks(str(_round_to_places(exact, places, ROUND_CEILING))) + "\N{NO-BREAK SPACE}%"
            case "percent":
                return self._format_plain(_round_to_digits(100 * exact, 4, "failures")) + "\N{NO-BREAK SPACE}%"
            case "share" if exact < Decimal("0.1"):
                return self._format_plain(_round_to_digits(100 * exact, 2, "failures")) + "\N{NO-BREAK SPACE}%"
            case "share":
                return self.figure(float(100 * exact), "of_100")
            case "duration":
                units = ((3600, "h"), (60, "min"), (1, "s"))
                seconds, unit = next((one for one in units if value >= 2 * one[0]), units[-1])
                return f"{self._format_plain(Decimal(math.ceil(value / seconds)))}\N{NO-BREAK SPACE}{unit}"
            case "bytes" | "flop":
                step = min(int(math.log10(value)) // 3, len(_PREFIXES) - 1) if value >= 1 else 0
                scaled = _round_to_digits(Decimal(value).scaleb(-3 * step), 3, "number")
                return f"{self._format_plain(scaled)} {_PREFIXES[step]}{_UNITS[kind]}"
        raise ValueError(f"no kind of figure: {kind}")

    def _format_plain(self, value: Decimal) -> str:
        """Format a number without an exponent, or as 1.5 × 10⁻⁹ if it is below 1e-7."""
        if value and abs(value) < _SMALLEST_PLAIN:
            power = value.adjusted()
            factor = self._localize_marks(f"{value.scaleb(-power).normalize():f}")
            return f"{factor} {_TIMES} {format_power_of_ten(power)}"
        whole = value.to_integral_value()
        return self._localize_marks(f"{whole:,f}" if whole == value else f"{value.normalize():,f}")

    def _format_time(self, value: str, kind: str) -> str:
        try:
            moment = datetime.fromisoformat(value)
            moment = moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
        except (ValueError, OverflowError):
            return value
        if len(value) == len("2026-03-01"):
            kind = "day"  # the value has no time of day
        texts = self.texts["language"]
        fields = {"day": moment.day, "month": texts["months"].split()[moment.month - 1], "year": moment.year}
        return texts[kind].format(**fields, clock=f"{moment:%H:%M}")

    def _localize_marks(self, text: str) -> str:
        """Replace the decimal point and the thousands separators of Python's format by those of this language."""
        marks = self.texts["language"]
        return text.translate({ord("."): marks["decimal"], ord(","): marks["group"]})


@lru_cache(maxsize=len(LANGUAGES))
def load_catalog(language: str) -> Catalog:
    """Load the texts of a language.

    Raises:
        ConfigError: the language is not available.
    """
    check_one_of("report.language", language, LANGUAGES)
    texts = tomllib.loads(Path(__file__).with_name("texts.toml").read_text(encoding="utf-8"))
    of_language = {
        section: {key: text[language].replace(" %", "\N{NO-BREAK SPACE}%") for key, text in keys.items()}
        for section, keys in texts.items()
    }
    return Catalog(language, of_language)


def _round_to_places(value: Decimal, places: int, rounding: str) -> Decimal:
    found = value.quantize(Decimal(1).scaleb(-places), rounding=rounding, context=_ANY_FLOAT)
    return _ANY_FLOAT.plus(found)  # turns -0 into 0


def _round_to_digits(value: Decimal, digits: int, kind: str) -> Decimal:
    """Round to `digits` significant digits; the kind "failures", also used for percentages, is rounded up."""
    if not value:
        return value
    if kind != "failures":
        return _round_to_places(value, digits - 1 - value.adjusted(), ROUND_HALF_EVEN)
    # A float's rounding error (0.0023000000000000004) must not raise the last shown digit.
    value = _round_to_places(value, 12 - value.adjusted(), ROUND_HALF_EVEN)
    return _round_to_places(value, digits - 1 - value.adjusted(), ROUND_CEILING)
