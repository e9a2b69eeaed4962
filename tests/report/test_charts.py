from __future__ import annotations

import itertools
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fedtune.report.model import Cap, Report
from fedtune.report.page.catalogue import catalogue
from fedtune.report.page.charts import Chart, Charts
from fedtune.report.page.tables import Tables, Words
from fedtune.show import drawing
from fedtune.show.drawing import Panel, Series

from .shown import HOSTILE, Make, detail_of, filled, wide_ledger, wide_run, with_site

CODES = ("epsilon_spent", "budget_left", "profile", "utility", "mechanism", "cost")
SVG = "{http://www.w3.org/2000/svg}"


def charts(report: Report, language: str = "en") -> Charts:
    words = Words(report, catalogue(language))
    return Charts(words, Tables(words))


def chart(report: Report, code: str, language: str = "en") -> Chart:
    return getattr(charts(report, language), code)()


def drawn(report: Report, code: str, language: str = "en") -> ElementTree.Element:
    svg = chart(report, code, language).svg
    return ElementTree.fromstring(str(svg))


def texts(svg: ElementTree.Element) -> list[str]:
    return ["".join(one.itertext()).strip() for one in svg.iter(f"{SVG}text")]


@pytest.fixture
def run(a_report: Make) -> Report:
    """A run in which noise, times and traffic differ: what never changes is not drawn."""
    report = a_report()
    north, south = report.sites
    south = replace(
        south, mechanisms=tuple(replace(one, noise_multiplier=one.noise_multiplier + 0.3) for one in south.mechanisms)
    )
    rounds = tuple(
        replace(one, seconds=1.5 + n, bytes_down=one.bytes_down + n) for n, one in enumerate(report.utility.rounds)
    )
    return filled(replace(report, sites=(north, south), utility=replace(report.utility, rounds=rounds)))


@pytest.fixture
def ledger(a_ledger_report: Make) -> Report:
    return filled(a_ledger_report())


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("language", ["en", "de"])
def test_each_chart_is_named_for_who_cannot_see_it(code: str, language: str, run: Report, ledger: Report) -> None:
    svg = drawn(ledger if code == "budget_left" else run, code, language)
    words = catalogue(language)
    assert svg.attrib["role"] == "img"
    title, description = svg.attrib["aria-labelledby"].split()
    named = {one.attrib["id"]: one.text for one in svg if "id" in one.attrib}
    assert named[title] == words.text(f"chart.{code}").unescape()
    assert named[description] == words.text(f"chart.{code}_desc").unescape()


@pytest.mark.parametrize("code", CODES)
def test_equal_charts_have_equal_bytes_in_every_process(code: str, run: Report, ledger: Report) -> None:
    report = ledger if code == "budget_left" else run
    assert chart(report, code).svg == chart(report, code).svg
    assert not re.search(r"\d{4}-\d\d-\d\dT| style=", str(chart(report, code).svg))


@pytest.mark.nightly
def test_the_bytes_do_not_depend_on_pythons_hash_seed() -> None:
    program = (
        "from fedtune.show.drawing import Panel, Series, chart\n"
        "one = Series(points=[(1, 3), (2, 4)], number=0, label='a')\n"
        "two = Series(points=[(1, 2)], number=1, kind='bars')\n"
        "print(chart('x', [Panel(series=[one, two], y='y')], named=('t', 'd'), number=str))"
    )
    made = {
        subprocess.run(
            [sys.executable, "-c", program], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    assert len(made) == 1


def test_lines_differ_in_more_than_colour() -> None:
    for aspect in (drawing.COLOURS, drawing.DASHES, drawing.MARKERS):
        assert len(set(aspect)) == drawing.MOST_LINES


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0.0, 1.0, [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (0.0, 8.3, [0.0, 2.0, 4.0, 6.0, 8.0]),
        (-0.5, 0.5, [-0.4, -0.2, 0.0, 0.2, 0.4]),
        (1e-9, 1.06e-7, [2e-8, 4e-8, 6e-8, 8e-8, 1e-7]),
        (99_999.0, 100_001.0, [99_999.0, 99_999.5, 100_000.0, 100_000.5, 100_001.0]),
    ],
)
def test_ticks_are_round_numbers(low: float, high: float, ticks: list[float]) -> None:
    assert drawing._ticks(low, high) == pytest.approx(ticks)


@given(
    st.lists(st.tuples(st.floats(1e-9, 1e9), st.floats(0, 1e12)), min_size=1, max_size=60),
    st.sampled_from(["number", "whole", "powers"]),
    st.sampled_from(["line", "points", "bars", "limit"]),
    st.booleans(),
)
@example([(1.0, 5e-324)], "number", "line", True)
def test_whatever_is_drawn_stays_on_its_axes(points: Any, scale: Any, kind: Any, from_zero: bool) -> None:
    panel = Panel(series=[Series(points=points, number=1, label="<b>", kind=kind)], scale=scale, from_zero=from_zero)
    root = ElementTree.fromstring(str(drawing.chart("x", [panel], named=("t", "d"), number=str)))
    width, height = (float(side) for side in root.attrib["viewBox"].split()[2:])
    for path in root.iter(f"{SVG}path"):
        for x, y in re.findall(r"translate\(([-\d.]+) ([-\d.]+)\)", path.attrib.get("transform", "")):
            assert 0 <= float(x) <= width
            assert 0 <= float(y) <= height


def test_colours_are_told_apart_in_grey_or_by_their_dashes() -> None:
    # Okabe and Ito's, of which yellow and sky blue are too light for a line on white, and orange is darkened.
    for colour in drawing.COLOURS:
        red, green, blue = (int(colour[n : n + 2], 16) / 255 for n in (1, 3, 5))
        assert 0.2126 * red**2.2 + 0.7152 * green**2.2 + 0.0722 * blue**2.2 < 0.5


def test_epsilon_by_round_has_a_point_for_each_round_and_the_target(run: Report) -> None:
    found = texts(drawn(run, "epsilon_spent"))
    assert {"north-hospital", "south-hospital", "limit"} <= set(found)
    without = texts(drawn(replace(run, target_epsilon=None), "epsilon_spent"))
    assert "limit" not in without
    north, south = run.sites
    gone = replace(run, sites=(north, replace(south, steps=south.steps[:3])))  # a round that the site has no step of
    rows = chart(gone, "epsilon_spent").table.rows
    assert len(rows) == 4
    assert [re.sub("<[^>]*>", "", cell) for cell in rows[3]] == ["4", "1.104", "–"]  # noqa: RUF001 - a dash: no round


def test_epsilon_by_run_shows_the_limit_of_its_time(ledger: Report) -> None:
    site = ledger.sites[0]
    caps = (
        Cap(time="2026-01-01T08:00:00+00:00", max_epsilon=6.0, charges_before=0),
        Cap(time="2026-02-01T07:00:00+00:00", max_epsilon=9.0, charges_before=0),
    )
    raised = replace(ledger, sites=(replace(site, lifetime=replace(site.lifetime, caps=caps)),))
    assert chart(raised, "epsilon_spent").svg != chart(ledger, "epsilon_spent").svg
    assert "limit" in texts(drawn(raised, "epsilon_spent"))


@pytest.mark.parametrize("language", ["en", "de"])
def test_rounds_of_a_ledgers_run_are_not_shown_as_runs(language: str, ledger: Report) -> None:
    (site,) = ledger.sites
    last, said = site.steps[-1], catalogue(language).texts["chart"]
    for rounds, axis in (([1, 2, 3], "axis_charged"), ([None, None], "axis_run"), ([None, 1, 2], "axis_run_or_round")):
        steps = tuple(
            replace(last, run="r" if one else "q", round=one, epsilon=last.epsilon + n) for n, one in enumerate(rounds)
        )
        report = replace(ledger, sites=(replace(site, steps=steps),))
        shown = texts(drawn(report, "epsilon_spent", language))
        named = {one for one in shown if one in [said[key] for key in said if key.startswith("axis_")]}
        assert named == {said["axis_epsilon"], said[axis]}
        rows = [[re.sub("<[^>]*>", "", cell) for cell in row] for row in chart(report, "epsilon_spent").table.rows]
        assert [row[:2] for row in rows] == [["r", str(one)] if one else ["q", "all"] for one in rounds]


def test_figures_on_the_axes_are_the_languages(run: Report) -> None:
    assert any(
        re.fullmatch(r"\d\.\d+", text)
        for text in texts(drawn(run, "profile", "en")) + texts(drawn(run, "mechanism", "en"))
    )
    german = texts(drawn(run, "mechanism", "de"))
    assert any(re.fullmatch(r"\d,\d+", text) for text in german)
    assert not any("." in text for text in german)
    assert "10⁻⁵" in texts(drawn(run, "profile"))


@pytest.mark.parametrize("language", ["en", "de"])
def test_how_sure_the_model_is_stands_beside_a_model_as_sure_as_right(run: Report, language: str) -> None:
    report = replace(run, utility=replace(run.utility, detail=detail_of("a", "b")))
    svg = drawn(report, "reliability", language)
    markers = [one for one in svg.iter(f"{SVG}path") if "translate" in one.attrib.get("transform", "")]
    assert len(markers) >= 10, "a marker for each bin"
    words = catalogue(language)
    for key in ("reliability_found", "reliability_perfect", "axis_probability", "axis_right"):
        assert words.text(f"chart.{key}").unescape() in texts(svg)
    for name, rows in (("reliability", 10), ("classes", 2)):
        assert charts(report, language)._tables.named(name).all == rows


def test_the_score_chart_leaves_out_losses(run: Report) -> None:
    assert "accuracy" in texts(drawn(run, "utility"))


@pytest.mark.parametrize(
    ("code", "changes"),
    [
        ("epsilon_spent", {"sites": ()}),
        ("budget_left", {}),
        ("profile", {"sites": ()}),
        ("utility", {"utility": None}),
        ("mechanism", {"sites": ()}),
        ("cost", {"utility": None}),
    ],
)
def test_without_figures_there_is_no_chart(code: str, changes: dict[str, Any], run: Report) -> None:
    assert chart(replace(run, **changes), code).svg is None
    assert catalogue("en").has("chart", f"{code}_none")


def test_what_nothing_bounds_is_not_drawn(a_report_without_privacy: Make) -> None:
    report = a_report_without_privacy()
    assert chart(report, "epsilon_spent").svg is None
    assert chart(report, "profile").svg is None
    assert chart(report, "utility").svg is None

    last = report.sites[0].mechanisms[-1]
    mechanisms = (last, replace(last, noise_multiplier=1.0))
    assert chart(with_site(report, mechanisms=mechanisms), "mechanism").svg is not None


def test_what_never_changes_is_said_and_not_drawn(a_report: Make, run: Report) -> None:
    same = filled(a_report())
    assert chart(same, "mechanism").svg is None
    assert chart(same, "mechanism").seen == catalogue("en").text("chart.same")
    said = re.sub("<[^>]*>", "", chart(same, "cost").seen)
    first = same.utility.rounds[0]
    assert len({one.bytes_down for one in same.utility.rounds}) == 1
    assert chart(same, "cost").svg is None
    assert said.startswith(f"The longest round took {first.seconds:.1f} s. Each moved ")
    assert "sampling" not in " ".join(texts(drawn(run, "mechanism"))), "one panel: the rate is that of all"
    assert catalogue("en").texts["chart"]["axis_rate"] not in texts(drawn(run, "mechanism"))
    assert catalogue("en").texts["chart"]["axis_noise"] in texts(drawn(run, "mechanism"))


@pytest.mark.parametrize(("language", "said"), [("en", "all 3 sites alike"), ("de", "alle 3 Standorte gleich")])
def test_equal_lines_are_drawn_once(run: Report, language: str, said: str) -> None:
    north, south = run.sites
    three = tuple(replace(north, site=f"clinic-{n}") for n in range(3))
    alone = drawn(replace(run, sites=three), "epsilon_spent", language)
    assert said in texts(alone)
    both = drawn(replace(run, sites=(*three, south)), "epsilon_spent", language)
    assert {"clinic-0 (+2)", "south-hospital"} <= set(texts(both))

    def lines(svg: ElementTree.Element) -> int:
        return sum(one.attrib.get("stroke-width") == "1.4" and "L" in one.attrib["d"] for one in svg.iter(f"{SVG}path"))

    assert (lines(alone), lines(both)) == (1, 2)


def test_lines_are_named_beside_their_ends_and_names_do_not_touch() -> None:
    series = [Series(points=[(1, 0), (2, 5 + n / 100)], number=n, label=f"site-{n}") for n in range(drawing.MOST_LINES)]
    panel = Panel(series=series, levels=[(5.0, "limit", "1 2")])
    root = ElementTree.fromstring(str(drawing.chart("x", [panel], named=("t", "d"), number=str)))
    places = {}
    for group in root.iter(f"{SVG}g"):
        x, y = map(float, re.fullmatch(r"translate\(([\d.]+) ([\d.]+)\)", group.attrib["transform"]).groups())
        places["".join(group.itertext())] = y
        assert x > 150
    assert set(places) == {"limit", *(one.label for one in series)}
    heights = sorted(places.values())
    assert all(below - above >= 9 for above, below in itertools.pairwise(heights))
    assert sorted(places, key=places.get)[0] == f"site-{drawing.MOST_LINES - 1}", "the highest line's is on top"


def test_scores_are_written_in_words(run: Report) -> None:
    rounds = tuple(replace(one, scores={"macro_f1": n / 9}) for n, one in enumerate(run.utility.rounds))
    report = replace(run, utility=replace(run.utility, rounds=rounds, before={}))
    shown = chart(report, "utility")
    assert "macro F1" in texts(drawn(report, "utility"))
    assert str(shown.seen).startswith("macro F1")
    assert "macro F1" in [str(heading) for heading, _ in shown.table.columns]


def test_a_title_says_what_is_seen(run: Report, ledger: Report) -> None:
    def title(report: Report, code: str) -> str:
        return re.sub("<[^>]*>", "", chart(report, code).seen)

    assert title(run, "epsilon_spent") == "Epsilon rose to 1.104 of 2"
    assert title(replace(run, target_epsilon=None), "epsilon_spent") == "Epsilon rose to 1.104"
    first, last = (run.utility.rounds[n].scores["accuracy"] for n in (0, -1))
    assert title(run, "utility") == f"accuracy: {first:.4f} after the first round, {last:.4f} after the last"
    assert title(ledger, "budget_left") == "4.381 of 6 is left"
    assert title(run, "cost").startswith(f"The longest round took {run.utility.rounds[-1].seconds:.1f} s.")


@pytest.mark.parametrize("code", CODES)
def test_strange_names_stay_text(code: str, a_report: Make, a_ledger_report: Make) -> None:
    for report in (wide_run(a_report), wide_ledger(a_ledger_report, runs=60)):
        svg = chart(report, code).svg
        if svg is None:
            continue
        root = ElementTree.fromstring(str(svg))
        assert not [one for one in root.iter() if "script" in one.tag.lower()]
        assert not re.search(r"<(?:script|style|metadata|!--)", str(svg))
    found = texts(drawn(wide_run(a_report), "epsilon_spent"))
    assert any(text.startswith("<script>") for text in found)  # shortened, and nothing but text
    assert any("_underscore" in text for text in found)  # a legend would leave it out


def test_ids_of_charts_do_not_meet(run: Report) -> None:
    ids: list[str] = []
    for code in CODES:
        if (svg := chart(run, code).svg) is not None:
            ids += re.findall(r'\bid="([^"]*)"', str(svg))
            used = re.findall(r'(?:href="|url\()#([^")]*)', str(svg))
            assert set(used) <= set(ids)
    assert len(ids) == len(set(ids))


def test_only_as_many_sites_as_can_be_told_apart_are_drawn(a_report: Make) -> None:
    report = wide_run(a_report)
    others = r"[\d.]*|round|epsilon used"
    legend = [text for text in texts(drawn(report, "epsilon_spent")) if not re.fullmatch(others, text)]
    assert len(legend) == drawing.MOST_LINES + 1
    assert HOSTILE not in legend


def test_budget_left_adds_up_to_the_limit(ledger: Report) -> None:
    found = texts(drawn(ledger, "budget_left"))
    assert {"spent", "held for open runs", "left", "north-hospital"} <= set(found)
    (row,) = chart(ledger, "budget_left").table.rows
    site, spent, held, limit, left = (re.sub("<[^>]*>", "", cell) for cell in row)
    assert site == "north-hospital"
    assert float(spent) <= float(held)
    assert float(limit) - float(spent) == pytest.approx(float(left), abs=0.002)
