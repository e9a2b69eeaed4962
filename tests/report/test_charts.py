import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from datetime import date

import pytest

from fedtune.report.facts import Cap
from fedtune.report.model import Report
from fedtune.report.page.tables import Charts, Table
from fedtune.report.page.translations import load_catalog
from fedtune.show import drawing

from .shown import (
    HOSTILE,
    Make,
    add_arrivals,
    build_reports,
    build_wide_ledger,
    change_facts,
    change_first_site,
    change_sites,
    fill_report,
    make_detail,
)

CODES = ("epsilon_spent", "profile", "utility")
SVG = "{http://www.w3.org/2000/svg}"


def draw_chart(report: Report, code: str, language: str = "en") -> Table:
    return getattr(Charts(report, load_catalog(language)), code)()


def parse_chart(report: Report, code: str, language: str = "en") -> ElementTree.Element:
    return ElementTree.fromstring(str(draw_chart(report, code, language).svg))


def list_texts(svg: ElementTree.Element) -> list[str]:
    return ["".join(element.itertext()).strip() for element in svg.iter(f"{SVG}text")]


@pytest.fixture
def run(a_report: Make) -> Report:
    return fill_report(a_report())


@pytest.fixture
def ledger(a_ledger_report: Make) -> Report:
    return fill_report(a_ledger_report())


@pytest.mark.parametrize("code", CODES)
def test_charts_have_accessible_titles_and_descriptions(code: str, language: str, run: Report) -> None:
    svg = parse_chart(run, code, language)
    words = load_catalog(language)
    assert svg.attrib["role"] == "img"
    title, description = svg.attrib["aria-labelledby"].split()
    texts_by_id = {element.attrib["id"]: element.text for element in svg if "id" in element.attrib}
    assert texts_by_id[title] == words.text(f"chart.{code}").unescape()
    assert texts_by_id[description] == words.text(f"chart.{code}_desc").unescape()


def test_rounds_missing_at_a_site_are_omitted_from_the_chart(run: Report) -> None:
    assert "limit" in list_texts(parse_chart(run, "epsilon_spent"))
    assert "limit" not in list_texts(parse_chart(change_facts(run, target_epsilon=None), "epsilon_spent"))
    north, south = run.sites
    shorter = replace(run, sites=(north, replace(south, steps=south.steps[:3])))
    rows = [[re.sub("<[^>]*>", "", cell) for cell in row] for row in draw_chart(shorter, "epsilon_spent").rows]
    assert [row[0] for row in rows if row[1] == "4"] == ["north-hospital"]


def test_epsilon_chart_shows_the_limit_in_force_at_each_run(ledger: Report) -> None:
    both = (("2026-01-01T08:00:00+00:00", 6.0), ("2026-02-01T07:00:00+00:00", 9.0))
    caps = tuple(Cap(time=time, max_epsilon=cap, charges_before=0) for time, cap in both)
    raised = change_facts(ledger, caps=caps)
    assert draw_chart(raised, "epsilon_spent").svg != draw_chart(ledger, "epsilon_spent").svg
    assert "limit" in list_texts(parse_chart(raised, "epsilon_spent"))


def test_epsilon_chart_labels_rounds_and_whole_runs_differently(language: str, ledger: Report) -> None:
    (site,) = ledger.sites
    last, said = site.steps[-1], load_catalog(language).texts["chart"]
    for rounds, axis in (([1, 2, 3], "axis_charged"), ([None, None], "axis_run"), ([None, 1, 2], "axis_charged")):
        steps = tuple(
            replace(last, run="r" if one else "q", round=one, epsilon=last.epsilon + n) for n, one in enumerate(rounds)
        )
        report = change_first_site(ledger, steps=steps)
        shown = list_texts(parse_chart(report, "epsilon_spent", language))
        named = {one for one in shown if one in [said[key] for key in said if key.startswith("axis_")]}
        assert named == {said["axis_epsilon"], said[axis]}
        rows = [[re.sub("<[^>]*>", "", cell) for cell in row] for row in draw_chart(report, "epsilon_spent").rows]
        assert [row[:2] for row in rows] == [["r", str(one)] if one else ["q", "all"] for one in rounds]


def test_arrival_cohorts_have_separate_lines_over_the_calendar(a_ledger_report: Make) -> None:
    report = add_arrivals(a_ledger_report())
    chart_texts = list_texts(parse_chart(report, "epsilon_spent"))
    years = [str(year) for year in range(2022, 2027)]
    assert chart_texts.count("2026") == 2, "a tick, and a line"
    assert {*years, "…–2021", "limit", load_catalog("en").texts["chart"]["axis_day"]} <= set(chart_texts)  # noqa: RUF001
    assert "2027–…" not in chart_texts, "nothing was spent"  # noqa: RUF001
    table = draw_chart(report, "epsilon_spent")
    assert [str(heading) for heading, _ in table.columns][-6:] == ["…–2021", *years]  # noqa: RUF001
    assert [re.sub("<[^>]*>", "", cell) for cell in table.rows[1]][-5:] == ["1.402", "1.308", "0.000", "0.000", "0.000"]
    (site,) = report.sites
    assert site.steps[-1].cohorts == tuple(element.epsilon for element in site.lifetime.cohorts)


def test_calendar_axis_has_few_round_dates() -> None:
    for first, last, ticks in (
        ("2026-01-05", "2026-01-20", ["2026-01-12"]),
        ("2026-01-05", "2026-04-20", ["2026-02", "2026-03", "2026-04"]),
        ("2025-11-05", "2027-01-20", ["2026-01", "2026-04", "2026-07", "2026-10", "2027-01"]),
        ("2020-01-05", "2033-01-20", ["2022", "2025", "2028", "2031"]),
    ):
        found = drawing._list_date_ticks(date.fromisoformat(first).toordinal(), date.fromisoformat(last).toordinal())
        assert [name for _, name in found] == ticks


def test_axis_numbers_follow_the_report_language(run: Report) -> None:
    for language, mark in (("en", "."), ("de", ",")):
        ticks = [
            text for text in list_texts(parse_chart(run, "utility", language)) if re.fullmatch(r"\d+[.,]\d+", text)
        ]
        assert ticks
        assert all(mark in tick for tick in ticks)
    assert "10⁻⁵" in list_texts(parse_chart(run, "profile"))
    assert "accuracy" in list_texts(parse_chart(run, "utility"))


def test_reliability_chart_shows_a_perfectly_calibrated_reference(run: Report, language: str) -> None:
    report = change_facts(run, detail=make_detail("a", "b"))
    svg = parse_chart(report, "reliability", language)
    markers = [element for element in svg.iter(f"{SVG}path") if "translate" in element.attrib.get("transform", "")]
    assert len(markers) >= 10, "a marker for each bin"
    words = load_catalog(language)
    for key in ("reliability_found", "reliability_perfect", "axis_probability", "axis_right"):
        assert words.text(f"chart.{key}").unescape() in list_texts(svg)
    for name, rows in (("reliability", 10), ("classes", 2)):
        assert Charts(report, words).named(name).all == rows


@pytest.mark.parametrize("code", CODES)
def test_charts_without_data_or_bounds_are_omitted(code: str, run: Report, a_report_without_privacy: Make) -> None:
    of_nothing = replace(run.sites[0], steps=(), curve=())
    without_data = change_facts(run, rounds=()) if code == "utility" else replace(run, sites=(of_nothing,))
    for report in (without_data, a_report_without_privacy()):
        assert draw_chart(report, code).svg is None
    assert load_catalog("en").has("chart", f"{code}_none")
    # What never changes is said and not drawn.
    one_round = change_facts(run, rounds=run.facts.rounds[:1])
    assert draw_chart(one_round, "utility").svg is None
    assert draw_chart(one_round, "utility").seen == load_catalog("en").text("chart.same")


def test_identical_lines_are_drawn_once(run: Report, language: str) -> None:
    said = {"en": "all 3 sites alike", "de": "alle 3 Einrichtungen gleich"}[language]
    three = [f"clinic-{n}" for n in range(3)]
    alone = parse_chart(change_sites(run, [0] * 3, three), "epsilon_spent", language)
    assert said in list_texts(alone)
    caps = parse_chart(change_sites(run, [0] * 3 + [1], [*three, "south-hospital"]), "epsilon_spent", language)
    assert {"clinic-0 (+2)", "south-hospital"} <= set(list_texts(caps))

    def count_lines(svg: ElementTree.Element) -> int:
        return sum(one.attrib.get("stroke-width") == "1.4" and "L" in one.attrib["d"] for one in svg.iter(f"{SVG}path"))

    assert (count_lines(alone), count_lines(caps)) == (1, 2)


def test_hostile_site_names_are_escaped_and_chart_lines_are_limited() -> None:
    for report in (build_reports()["wide_run"], build_wide_ledger(runs=60)):
        codes = CODES if report.utility else CODES[:2]
        for svg in filter(None, (draw_chart(report, code).svg for code in codes)):
            root = ElementTree.fromstring(str(svg))
            assert not [element for element in root.iter() if "script" in element.tag.lower()]
            assert not re.search(r"<(?:script|style|metadata|!--)", str(svg))
    ticks = list_texts(parse_chart(build_reports()["wide_run"], "epsilon_spent"))
    assert any(text.startswith("<script>") for text in ticks)  # shortened, and nothing but text
    assert any("_underscore" in text for text in ticks)  # a legend would leave it out
    legend = [text for text in ticks if not re.fullmatch(r"[\d.]*|round|epsilon spent", text)]
    assert len(legend) == drawing.MAX_LINES + 1
    assert HOSTILE not in legend
