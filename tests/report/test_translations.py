import json
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

import fedtune.report
from fedtune.federation.drift import FELL
from fedtune.privacy.release import Reason
from fedtune.report.attacks import MEASURES, NAMES
from fedtune.report.derive import dpia_fields, verdicts
from fedtune.report.facts import BudgetVerdict
from fedtune.report.model import Assumption, CellState, SiteReport
from fedtune.report.page.tables import TableColumn
from fedtune.report.page.translations import LANGUAGES, load_catalog
from fedtune.report.page.view import load_page_layout
from fedtune.runs import results
from fedtune.tasks.inputs import get_input

from .masking import GOLDEN, read_golden

PACKAGE = Path(fedtune.report.__file__).parent
TEXTS = {language: load_catalog(language).texts for language in LANGUAGES}
KEYS = {(section, key) for section, texts in TEXTS["en"].items() for key in texts}

STATES = get_args(get_type_hints(BudgetVerdict)["state"])
ACCESS = load_page_layout()["access"]
ACCESS_CODES = {
    code
    for noise in ("noised", "seeded", "no_noise", "masked")
    for observer, visible in ACCESS[noise].items()
    for code in (observer, *visible)
} | {"by_subtraction", "if_two_sites"}
CODES: dict[str, set[str]] = {
    "kind": {"run", "ledger"},
    "state": set(STATES),
    "reason": {code for codes in verdicts.REASONS.values() for code in codes},
    **{kind.removesuffix("s"): set(codes) for kind, codes in verdicts.CODES["listed"].items()},
    "refusal": {str(reason) for reason in Reason},
    "source": set(get_args(get_type_hints(SiteReport)["source"])),
    "status": set(get_args(get_type_hints(Assumption)["status"])),
    "field": set(dpia_fields.FIELDS),
    "fact": {name for field in dpia_fields.FIELDS.values() for names in field.values() for name in names},
    "period": {"month", "quarter", "year"},
    "unit": {"record", "user"},
    "attack": set(NAMES),
    "attack_measure": set(MEASURES),
    "relation": {"add_or_remove_one"},
    "arrivals": {"all", "undated", "undated_to", "dated", "to", "from", "in", "between"},
    "banner": {"simulation", "seeded"},
    "excluded": {"unusable_records", "held_out_records", "unused_records"},
    "value": {str(get_input("features").modality)},
    "finding": {results.DATA_CHANGED, results.DIVERGED, results.WORSE, results.GUESS, FELL},
}
"""Codes that types and rules list, by the section that has words for them."""
CODE_PATHS = {
    "released": "released.*",
    "covers": "covers.*",
    "randomness": "randomness",
    "release": "(facts|sites.*|facts.sites.*.statement).releases.*.kind",
    "refusal": "(facts|sites.*|facts.sites.*.statement).releases.*.reason",
    "sampling": "sites.*.mechanisms.*.sampling_run",
    "run_state": "sites.*.lifetime.runs.*.state",
    "assumption": "assumptions.*.code",
    "reason": "verdict.reasons.*",
    "audit_method": "facts.audit.method",
    "audit_score": "facts.audit.membership.*.score",
}
"""Sections of the codes that builders write, and their paths in a report."""


def read_sources() -> Iterator[str]:
    for path in [*PACKAGE.rglob("*.py"), PACKAGE / "page" / "page.toml", *PACKAGE.glob("page/templates/*.j2")]:
        yield path.read_text()


STORED_REPORTS = {path.stem: read_golden(path.stem) for path in GOLDEN.glob("*.json")}


def find_in_parts(parts: dict[str, Any], path: str) -> Iterator[str]:
    nested = [
        (f"{at}/{key}", value) for at, part in parts.items() if isinstance(part, dict) for key, value in part.items()
    ]
    pattern = "/" + path.removesuffix(".*").replace(".", "/").replace("*", "[^/]+")
    for at, value in [*parts.items(), *nested]:
        if value is not None and re.fullmatch(pattern, at):
            yield from value if isinstance(value, list) else [value]


def test_every_code_in_stored_reports_has_a_translation(language: str) -> None:
    for name, parts in STORED_REPORTS.items():
        for section, path in CODE_PATHS.items():
            assert set(find_in_parts(parts, path)) <= TEXTS[language][section].keys(), name
    assert all(
        any(list(find_in_parts(parts, path)) for parts in STORED_REPORTS.values())
        for path in CODE_PATHS.values()
        if "audit" not in path
    )


def test_translations_have_the_same_keys_and_placeholders(language: str) -> None:
    assert {(section, key) for section, texts in TEXTS[language].items() for key in texts} == KEYS
    for section, key in KEYS:
        english, translated = (sorted(re.findall(r"\{\w*\}", TEXTS[code][section][key])) for code in ("en", language))
        assert english == translated, (section, key)


CLAIM_WORDS = tomllib.loads(Path(__file__).with_name("claim_words.toml").read_text())
"""Words that strengthen or weaken a claim: both translations must contain them."""
LIST_SECTIONS = {"not_protected", "leaves_out", "covers", "access"}
MIN_LENGTH_RATIO = 0.7
"""Length of the German text relative to the English one; German is usually longer."""


def count_sentences(text: str) -> int:
    """Count the sentences; dots that end a German abbreviation do not count."""
    return len(re.findall(r"[.!?](?= [A-ZÄÖÜ“„]|$)", re.sub(r"\b(Abs|Art|lit|Nr)\. (?=\w)", "", text)))


def count_items(text: str) -> int:
    _, colon, items = text.partition(": ")
    return len(re.split(r", | and | und ", items)) if colon else 0


def test_translations_agree_in_hedges_and_completeness() -> None:
    mismatches = []
    for section, key in sorted(KEYS - {(name, key) for name, key in KEYS if name in ("language", "field", "word")}):
        english, german = (re.sub(r"\{\w+\}", "{}", TEXTS[language][section][key]) for language in ("en", "de"))
        differences = [
            word
            for word, (en, de) in CLAIM_WORDS.items()
            if bool(re.search(en, english)) != bool(re.search(de, german))
        ]
        if count_sentences(english) != count_sentences(german):
            differences.append("sentences")
        if (section in LIST_SECTIONS or key == "against") and count_items(english) != count_items(german):
            differences.append("items")
        if len(english) > 25 and not len(german) / len(english) > MIN_LENGTH_RATIO:
            differences.append("short")
        if differences:
            mismatches.append((section, key, differences))
    assert mismatches == []


@pytest.mark.parametrize("section", CODES)
def test_every_report_code_has_a_translation(language: str, section: str) -> None:
    assert set(TEXTS[language][section]) >= CODES[section]


def test_every_translation_key_is_used() -> None:
    sources = "\n".join(read_sources())
    used = {(section, key) for section, key in re.findall(r'"(\w+)\.(\w+)"', sources)}
    # Keys that are concatenated, such as "chart." ~ code.
    charts = {"epsilon_spent", "profile", "utility", "reliability", "learning"}
    used |= {("chart", f"{code}{end}") for code in charts for end in ("", "_desc", "_none")}
    used |= set(re.findall(r"\b(\w+)\.(\w+)", (PACKAGE / "page" / "page.toml").read_text()))
    all_code = "\n".join(path.read_text() for path in PACKAGE.parent.rglob("*.py"))
    used |= {(section, code) for section in CODE_PATHS for code in re.findall(r'"(\w+)"', all_code)}
    used |= {("chart", key) for key in re.findall(r'"(\w+)"', (PACKAGE / "page" / "tables.py").read_text())}
    used |= {("access", key) for key in (*ACCESS_CODES, *ACCESS["columns"])}
    used |= {("strength", band) for band in ("strong", "reasonable", "weak", "none")}
    used |= {("promise", key + unit) for unit in CODES["unit"] for key in ("", "unit_")}
    used |= {("meaning", f"{key}_note") for key in ("ceiling", "mechanism")}
    by_kind = [("verdict", "spent"), ("to_do", "weigh"), ("check", "owner"), ("publish", "heading")]
    by_kind += [("publish", "within"), ("publish", "which"), ("sign_off", "question")]
    by_kind += [("verdict", state) for state in STATES]
    used |= {(section, f"{key}_{kind}") for section, key in by_kind for kind in CODES["kind"]}
    used |= {("verdict", f"{kept}{state}") for kept in ("", "kept_") for state in STATES}
    used |= {(section, state) for section in ("to_do", "publish") for state in STATES}
    used |= {("to_do", code) for code in ("wait", "weigh", "full", "closed", "no_run_now", "cohort_full")}
    used |= {("verdict", kept + room) for kept in ("", "kept_") for room in get_args(verdicts.Room)}
    used |= {("hidden", f"question_{unit}") for unit in CODES["unit"]}
    used |= {("hidden", word) for word in ("well", "moderately", "poorly", "hardly")}
    used |= {("scale", key) for key in ("one", "two", "five")}
    used |= {("if_not", code) for section, code in KEYS if section == "question"}
    used |= {("glossary", term) for term in load_page_layout()["glossary"]["terms"]}
    used |= {("question", code) for section, code in KEYS if section == "assumption"}
    used |= {("language", key) for key in ("decimal", "group", "day", "moment", "months")}
    used |= {("cells", state + end) for state in get_args(CellState) for end in ("", "_means")}
    used |= {(section, code) for section, codes in CODES.items() for code in codes}
    templates = "\n".join(path.read_text() for path in PACKAGE.glob("page/templates/*.j2"))
    page_code = templates + "".join(
        (PACKAGE / "page" / name).read_text() for name in ("translations.py", "view.py", "tables.py")
    )
    for section in ("formulae", "provenance", "sign_off", "utility", "page", "word", "cells", "ledger", "strength"):
        used |= {(section, key) for key in re.findall(r'"(\w+)"', page_code)}
    used |= {(section, "heading") for section in re.findall(r'"(\w+)"', templates)}
    dpia_code = "".join((PACKAGE / "derive" / name).read_text() for name in ("dpia_fields.py", "dpia_fields.toml"))
    used |= {("value", key) for key in re.findall(r'"(\w+)"', dpia_code)}
    used |= {("value", "unbounded")}  # of `format_epsilon`
    # Variants of an existing text.
    for variant in ("by_user", "where_no_noise", "where_seeded"):
        used |= {(variant, f"{section}__{key}") for section, key in KEYS}
    assert KEYS - used == set()


def test_every_translation_key_in_use_exists() -> None:
    for text in read_sources():
        for section, key in re.findall(r'(?:\bt|\.text|heading=|absent=|zero=)\(?"(\w+)\.(\w+)"(?! ~)', text):
            assert (section, key) in KEYS
    for table in load_page_layout()["table"].values():
        for column in (TableColumn(*column) for column in table["columns"]):
            for key in (table["caption"], column.heading, column.absent or "word.none", column.zero or "word.none"):
                assert tuple(key.split(".")) in KEYS
            assert not column.kind.startswith("code:") or column.kind.removeprefix("code:") in TEXTS["en"]


def test_every_assertable_assumption_has_a_question(language: str) -> None:
    """Except the assumptions behind the annex's figures."""
    verified = [parts for parts in STORED_REPORTS.values() if "ledger_not_verified" not in parts["/verdict/reasons"]]
    assumptions = [part for parts in verified for at, part in parts.items() if at.startswith("/assumptions/")]
    assumed = {part["code"] for part in assumptions if part["status"] == "assumed"}
    assert len(assumed) > 5
    annex_only = {"runs_fixed_beforehand", "ends_independent_of_releases"}
    assert assumed - annex_only <= TEXTS[language]["question"].keys()
    assert annex_only.isdisjoint(TEXTS[language]["question"])


CLAIMS = "anonym|complian|konform|impossible|unmöglich|✓|✔|guaranteed safe|vertretbar"


def test_texts_make_no_legal_claims_or_judgments(language: str) -> None:
    for section, texts in TEXTS[language].items():
        for key, text in texts.items():
            assert not re.search(CLAIMS, text, re.I), (section, key)
    plan, spent = {"en": ("plan", "spent"), "de": ("Plan", "verbraucht")}[language]
    text = TEXTS[language]["reason"]["above_run_cap"]
    assert plan in text, "a run's plan is compared with the limit for a run"
    assert spent not in text


def test_numbers_are_formatted_for_both_languages() -> None:
    kinds = json.loads(Path(__file__).with_name("figures.json").read_text())
    for kind, value, english, german in ((kind, *row) for kind, rows in kinds.items() for row in rows):
        assert (load_catalog("en").figure(value, kind), load_catalog("de").figure(value, kind)) == (english, german)


@given(st.floats(min_value=0, max_value=1e12))
def test_losses_are_rounded_up_and_remaining_budgets_down(value: float) -> None:
    def read(text: str) -> float:
        return float(text.replace(".", "").replace(",", "."))

    german = load_catalog("de")
    assert read(german.figure(value, "epsilon")) >= value
    assert read(german.figure(value, "left")) <= value
    share = german.figure(value, "of_100")
    assert value > 99.9999 if share == "unbegrenzt" else read(share.removesuffix("\N{NO-BREAK SPACE}%")) >= value
    assert share != "100\N{NO-BREAK SPACE}%", "100 % would mean certainty"


@given(
    st.sampled_from(["exact", "number", "failures", "score", "of_100_fine", "percent", "seconds", "bytes", "left"]),
    st.floats(allow_nan=False),
)
def test_every_float_can_be_formatted(kind: str, value: float) -> None:
    assert load_catalog("en").figure(value if kind != "bytes" else abs(value), kind)


def test_unknown_values_are_escaped_and_lists_are_joined_as_sentences() -> None:
    catalog = load_catalog("en")
    title = catalog.text("page.title", name="<b>{digest}</b>")
    assert title == "Privacy report: &lt;b&gt;{digest}&lt;/b&gt;", "and not formatted again"
    assert catalog.code("reason", "<new>") == "<code>&lt;new&gt;</code>"
    assert load_catalog("de").code("reason", "no_noise").startswith("Es wurde kein Rauschen")
    for codes, expected in (
        (["times", "bytes", "declared_sizes"], "recorded times, network traffic and declared dataset sizes"),
        ([], "none"),
    ):
        assert catalog.listed("unprotected_figure", codes) == expected
    assert catalog.listed("unprotected_figure", ["times"]) == "recorded times"
