"""SVG charts: ticks, limits, labels and distinguishable lines."""

import itertools
import re
import xml.etree.ElementTree as ElementTree
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from fedtune.show import drawing
from fedtune.show.drawing import Panel, Series

from ..conftest import run_python

SVG = "{http://www.w3.org/2000/svg}"


@pytest.mark.nightly
def test_chart_bytes_do_not_depend_on_the_hash_seed() -> None:
    program = (
        "from fedtune.show.drawing import Panel, Series, chart\n"
        "one = Series(points=[(1, 3), (2, 4)], number=0, label='a')\n"
        "two = Series(points=[(1, 2)], number=1, kind='limit')\n"
        "print(chart('x', Panel(series=[one, two], y='y'), named=('t', 'd'), number=str))"
    )
    outputs = [run_python("-c", program, env={"PYTHONHASHSEED": seed}) for seed in ("1", "2")]
    assert outputs[0] == outputs[1]


def test_axis_ticks_are_round_numbers() -> None:
    for low, high, ticks in (
        (0.0, 1.0, [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (0.0, 8.3, [0.0, 2.0, 4.0, 6.0, 8.0]),
        (-0.5, 0.5, [-0.4, -0.2, 0.0, 0.2, 0.4]),
        (1e-9, 1.06e-7, [2e-8, 4e-8, 6e-8, 8e-8, 1e-7]),
        (99_999.0, 100_001.0, [99_999.0, 99_999.5, 100_000.0, 100_000.5, 100_001.0]),
    ):
        assert drawing._round_ticks(low, high) == pytest.approx(ticks)


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(st.tuples(st.floats(1e-9, 1e9), st.floats(0, 1e12)), min_size=1, max_size=60),
    st.sampled_from(["number", "whole", "powers"]),
    st.sampled_from(["line", "limit"]),
    st.booleans(),
)
@example([(1.0, 5e-324)], "number", "line", True)
def test_chart_elements_stay_within_the_axes(points: Any, scale: Any, kind: Any, from_zero: bool) -> None:
    panel = Panel(series=[Series(points=points, number=1, label="<b>", kind=kind)], scale=scale, from_zero=from_zero)
    root = ElementTree.fromstring(str(drawing.chart("x", panel, named=("t", "d"), number=str)))
    width, height = (float(side) for side in root.attrib["viewBox"].split()[2:])
    for path in root.iter(f"{SVG}path"):
        for x, y in re.findall(r"translate\(([-\d.]+) ([-\d.]+)\)", path.attrib.get("transform", "")):
            assert 0 <= float(x) <= width
            assert 0 <= float(y) <= height


def test_chart_lines_are_distinguishable_without_color() -> None:
    for aspect in (drawing.COLORS, drawing.DASHES, drawing.MARKERS):
        assert len(set(aspect)) == drawing.MAX_LINES
    # Okabe and Ito's, of which yellow and sky blue are too light for a line on white, and orange is darkened.
    for color in drawing.COLORS:
        red, green, blue = (int(color[n : n + 2], 16) / 255 for n in (1, 3, 5))
        assert 0.2126 * red**2.2 + 0.7152 * green**2.2 + 0.0722 * blue**2.2 < 0.5


def test_line_labels_are_placed_next_to_their_ends_without_overlap() -> None:
    series = [Series(points=[(1, 0), (2, 5 + n / 100)], number=n, label=f"site-{n}") for n in range(drawing.MAX_LINES)]
    panel = Panel(series=series, levels=[(5.0, "limit", "1 2")])
    root = ElementTree.fromstring(str(drawing.chart("x", panel, named=("t", "d"), number=str)))
    places = {}
    for group in root.iter(f"{SVG}g"):
        x, y = map(float, re.fullmatch(r"translate\(([\d.]+) ([\d.]+)\)", group.attrib["transform"]).groups())
        places["".join(group.itertext())] = y
        assert x > 150
    assert set(places) == {"limit", *(line.label for line in series)}
    heights = sorted(places.values())
    assert all(below - above >= 9 for above, below in itertools.pairwise(heights))
    assert sorted(places, key=places.get)[0] == f"site-{drawing.MAX_LINES - 1}", "the highest line's is on top"
