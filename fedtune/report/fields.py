"""The fields of an impact assessment and of technical documentation, as the page groups their cells."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from markupsafe import Markup

from fedtune.report.words import Words, pointer

Group = Literal["impact", "health", "documentation"]
_GROUPS: tuple[tuple[str, Group], ...] = (("hipaa", "health"), ("ai_act", "documentation"), ("gpai", "documentation"))
_SECTIONS = {
    "released": "released",
    "known_limits": "not_protected",
    "randomness": "randomness",
    "sampling_run": "sampling",
    "verdict": "state",
    "unit": "unit",
} | dict.fromkeys(
    (
        "candidate_criteria",
        "epsilon",
        "erasure_reaches_model",
        "erasure_reaches_records",
        "inference_covered",
        "ledger_verified",
        "mechanism",
        "modality",
        "raw_records_leave_site",
        "right_of_100_mechanism",
        "rollback_excluded",
        "runtime",
        "secure_aggregation",
        "source_type",
        "technologies_off",
        "technologies_on",
        "transport",
    ),
    "value",
)
"""Facts whose values are codes, and the section of texts that has them; the others are names and figures."""
_NUMBERS = (
    "compute_ratio",
    "declared_sizes",
    "declared_total",
    "delta",
    "epsilon",
    "expected_failures",
    "heldout_fraction",
    "labels",
    "linkability_bound",
    "most_tokens",
    "num_sites",
    "parameters_per_record",
    "rank",
    "right_of_100_ceiling",
    "right_of_100_mechanism",
    "scores_before",
    "scores_final",
    "seconds",
    "singling_out_bound",
    "trained_parameters",
    "used_fraction",
)
"""Facts that end in a number; in the others digits belong to names, versions and hashes."""
_NUMBER = re.compile(r"(?<!\S)\d+(?:\.\d+)?(?:e-?\d+)?$")


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """The cell of one state: its facts, each with what it is called and what it says."""

    state: str
    facts: tuple[tuple[Markup, Markup], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Field:
    """All cells of one code."""

    name: Markup
    parts: tuple[Part, ...]

    @property
    def known(self) -> list[Part]:
        """What fedtune fills in, and what it should have been able to."""
        return [part for part in self.parts if part.state != "site"]

    @property
    def open(self) -> list[Part]:
        """What somebody at the site fills in."""
        return [part for part in self.parts if part.state == "site"]


class Fields:
    """The fields of one report."""

    def __init__(self, words: Words) -> None:
        self._words = words

    def of(self, group: Group) -> list[Field]:
        """The fields of a group, in the report's order."""
        found: dict[str, list[Part]] = {}
        for place, cell in enumerate(self._words.report.cells):
            if _group(cell.code) == group:
                facts = tuple((self._words.code("fact", key), self._value(place, key)) for key in cell.facts)
                found.setdefault(cell.code, []).append(Part(state=cell.state, facts=facts))
        return [Field(name=self._words.code("field", code), parts=tuple(parts)) for code, parts in found.items()]

    def _value(self, place: int, key: str) -> Markup:
        """What a fact says: codes in words, numbers in the language's way, names as they are."""
        where = pointer("cells", place, "facts", key)
        value = self._words.at(where)
        if not value:
            return Markup("")
        if key == "date":
            return self._words.figure(where, "moment")
        section = _SECTIONS.get(key)
        tokens = [self._token(section, key, token) for token in value.split(", ")]
        separator = "; " if section == "not_protected" else ", "
        return Markup('<span data-at="{}" data-as="fact">{}</span>').format(where, Markup(separator).join(tokens))

    def _token(self, section: str | None, key: str, token: str) -> Markup:
        if section and self._words.catalogue.has(section, token):
            return self._words.code(section, token)
        return Markup("{}").format(_NUMBER.sub(self._number, token) if key in _NUMBERS else token)

    def _number(self, found: re.Match[str]) -> str:
        text = found.group()
        return self._words.catalogue.digits(text)


def _group(code: str) -> Group:
    return next((group for prefix, group in _GROUPS if code.startswith(prefix)), "impact")
