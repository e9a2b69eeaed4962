"""The privacy label: it says what the report says, and all of it fits."""

import hashlib
import re
import xml.etree.ElementTree as Xml
from dataclasses import replace

import pytest

from fedtune.config import AboutSpec
from fedtune.privacy.distributed_noise import DistributedNoise
from fedtune.report import registry_entry, signing
from fedtune.report.model import Report
from fedtune.report.page.render import FONTS, render_label, render_personalized_label
from fedtune.report.page.translations import load_catalog
from fedtune.report.page.view import Words
from fedtune.show.lines import shorten_middle

from .shown import HOSTILE, NAMES, build_reports, change_facts, change_first_site, list_numbers, list_periods

FILES = {"plain": "sans-regular", "bold": "sans-bold", "mono": "mono-regular"}
SPACE = "{http://www.w3.org/2000/svg}"
RED, MARGIN = "#8f1d00", 80
MARGIN_OF_OWN = 44  # of a personalized adapter's label


@pytest.fixture(params=[*NAMES, "says_nothing"])
def report(request: pytest.FixtureRequest) -> Report:
    if request.param in NAMES:
        return build_reports()[request.param]
    ledger = build_reports()["ledger"]
    means = replace(ledger.sites[0].meaning, correct_of_100_ceiling=99.98, correct_of_100_mechanism=None)
    return change_first_site(ledger, meaning=means)


def list_lines(svg: str) -> list[str]:
    return [element.text or "" for element in Xml.fromstring(svg).iter(f"{SPACE}text")]


def test_label_shows_only_report_figures_and_names_uncovered_releases(report: Report, language: str) -> None:
    words = Words(report, load_catalog(language))
    known = [report.facts.name, report.known.get("dataset", "")]
    known += [text for section in words.catalog.texts.values() for text in section.values()]
    figures = [(report.epsilon, "epsilon"), (report.epsilon, "factor"), (len(report.sites), "count")]
    figures += [(report.facts.delta, "exact"), (report.facts.date, "day")]
    is_run = report.facts.kind == "run"
    figures += [(report.facts.target_epsilon if is_run else report.facts.approved.max_epsilon, "cap")]
    known += ["50 60 70 80 90 100 SHA-256", "5656 5656 5656 5656"]
    for means in (site.meaning for site in report.sites if site.meaning):
        figures += [(means.correct_of_100_for_2, "of_100"), (means.correct_of_100_for_5, "of_100")]
        figures += [(means.correct_of_100_mechanism, "of_100"), (means.correct_of_100_ceiling, "of_100")]
    known += [words.catalog.figure(value, kind) for value, kind in figures]
    known += [element.dates for element in list_periods(report)]
    lines = list_lines(render_label(report, language=language))
    shown = [line for line in lines if not re.fullmatch("[0-9a-f]{64}", line)]
    assert set(list_numbers(" ".join(shown))) <= set(list_numbers(" ".join(known)))
    # It names what is not covered, and the file to check.
    said = " ".join(lines)
    assert all(words.code("not_protected", code).unescape() in said for code in report.not_protected)
    assert all(words.code("banner", code).unescape() in said for code in report.banners)
    assert said.endswith(hashlib.sha256(signing.report_to_json(report).encode()).hexdigest())
    for value in (words.code("unit", report.facts.unit), words.text("label.mechanism_text")):
        assert value.unescape() in said
    assert ("…" in said) == (len(report.facts.name) > 32), "nothing but a long name is cut"


def test_label_warns_of_reliance_on_other_sites(language: str) -> None:
    """In the label and in a registry's entry: where sites make their noise together."""
    found = build_reports()["within"]
    shared_noise = DistributedNoise(num_sites=3, threshold=3, colluders=1, noise_multiplier=1.0, cell_bits=20, bound=8)
    shared = change_first_site(
        found, mechanisms=tuple(replace(row, shared=shared_noise) for row in found.sites[0].mechanisms)
    )
    text = " ".join(list_lines(render_label(shared, language=language)))
    assert load_catalog(language).texts["label"]["shared"] in text
    assert load_catalog(language).texts["label"]["shared"] not in " ".join(
        list_lines(render_label(found, language=language))
    )
    assert "…" not in text
    model = registry_entry.build_registry_entry(shared, AboutSpec())["privacy"]["model"]
    assert model.startswith("The sites generate the noise jointly")


def test_label_without_a_guarantee_shows_no_figures(language: str) -> None:
    words = load_catalog(language)
    for name in ("no_guarantee", "unbounded"):
        found = build_reports()[name]
        text = " ".join(list_lines(render_label(found, language=language)))
        assert words.text("promise.none").unescape() in text
        assert all(words.code("reason", reason).unescape() in text for reason in found.verdict.reasons)
        assert words.texts["word"]["unbounded"] in text
        assert RED in render_label(found, language=language).split("<text")[0], "its head is red"
        assert "100" not in list_numbers(text)


def test_label_is_self_contained_escapes_names_and_fits_its_lines(report: Report, language: str) -> None:
    key = "name" if report.facts.kind == "run" else "site"
    hostile = change_facts(report, **{key: HOSTILE[:20] + "\x00"})
    svg = render_label(hostile, language=language)
    root = Xml.fromstring(svg)
    assert {element.tag.removeprefix(SPACE) for element in root.iter()} <= {
        *("svg", "title", "desc", "rect", "text", "path", "circle", "defs", "linearGradient", "stop"),
    }
    assert not any(name.startswith("on") or "href" in name for element in root.iter() for name in element.attrib)
    assert HOSTILE[:20] in " ".join(list_lines(svg))
    assert svg == render_label(hostile, language=language)
    fit(render_label(report, language=language))


@pytest.mark.parametrize("name", ["bank-a", "W" * 64, HOSTILE])
def test_label_of_a_personalized_adapter_promises_nothing(name: str) -> None:
    svg = render_personalized_label(name, name)
    text, short = " ".join(list_lines(svg)), shorten_middle(name, 32)
    assert f"Private to {short}: no guarantee" in text
    assert "trained on the site's own records without noise" in text
    assert list_numbers(text.replace(short, "")) == [], "no figure, which would look like a promise"
    assert RED in svg.split("<text")[0], "its head is red"
    fit(svg)


def fit(svg: str) -> None:
    """All lines, as wide as the letters of Liberation are; none lies on another."""
    fonts = pytest.importorskip("PIL.ImageFont", reason="Pillow is not installed")
    boxes = []
    for element in Xml.fromstring(svg).iter(f"{SPACE}text"):
        size, x, y = (float(element.get(key, "")) for key in ("font-size", "x", "y"))
        kind = "mono" if element.get("font-family") else "bold" if element.get("font-weight") else "plain"
        width = fonts.truetype(FONTS / f"{FILES[kind]}.woff2", 10 * size).getlength(element.text) / 10
        start = x - width if element.get("text-anchor") == "end" else x
        boxes.append((start, y - 0.75 * size, start + width, y + 0.2 * size))
        margin = MARGIN_OF_OWN if "OWN ADAPTER" in svg else MARGIN
        in_column = margin == MARGIN and x in (MARGIN, 190) and 430 < y < 610
        column = 640 if in_column else 1200 - margin
        assert start >= margin
        assert start + width <= column + 1, element.text
        assert 0 < y < 675
    for index, (start, top, end, bottom) in enumerate(boxes):
        for other_left, other_top, other_right, other_bottom in boxes[:index]:
            assert end <= other_left or other_right <= start or bottom <= other_top or other_bottom <= top


def test_label_names_the_cohorts_covered_by_its_epsilon() -> None:
    used, unused = "2022–2024; others used less", "2025–2026; others not used"  # noqa: RUF001
    for name, wording in (("arrivals", used), ("admitting", unused)):
        text = list_lines(render_label(build_reports()[name], language="en"))
        assert text[text.index("Joined") + 1] == wording
    assert "Joined" not in list_lines(render_label(build_reports()["ledger"], language="en"))
