"""SVG charts: axes, lines and intervals, with titles and descriptions for screen readers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from itertools import chain, count
from typing import Literal

from markupsafe import Markup, escape

from fedtune.show.lines import format_power_of_ten

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#9A6A00")
DASHES = ("", "6 2", "2 1", "6 2 1 2", "10 3", "1 2")
MARKERS = (
    "M-2.6 0a2.6 2.6 0 1 0 5.2 0a2.6 2.6 0 1 0-5.2 0z",
    "M-2.4-2.4h4.8v4.8h-4.8z",
    "M0-3l2.8 5.2h-5.6z",
    "M0-3.2l3.2 3.2-3.2 3.2-3.2-3.2z",
    "M0 3l-2.8-5.2h5.6z",
    "M-2.4-2.4l4.8 4.8M2.4-2.4l-4.8 4.8",
)
MAX_LINES = len(COLORS)  # maximum number of distinguishable lines
LIMIT, BEFORE = "5 4", "1 2"  # dashes of horizontal reference lines
_WIDTH = 310.0  # text of size 10 is legible at half of a page's width and on a phone
_HEIGHT, _PANEL_HEIGHT = 194.0, 154.0  # height of a chart, and of the area within its axes
_LETTER = 5.6  # approximate width of a character
_SMALL_LETTER, _LINE_HEIGHT = 5.0, 10.5  # width and line height for text of size 9
_MAX_MARKERS = 40  # lines with more points have no markers, which would overlap

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Series:
    """A data series of a chart.  Its `number` selects color, dashes and marker."""

    points: Points
    number: int
    label: str = ""
    kind: Literal["line", "limit"] = "line"


@dataclass(frozen=True, kw_only=True, slots=True)
class Panel:
    """Axes and data of a chart."""

    series: Sequence[Series]
    x: str = ""  # axis label, as is `y`
    y: str = ""
    levels: Sequence[tuple[float, str, str]] = ()  # (height, label, dashes) of horizontal reference lines
    notes: Sequence[tuple[float, float, str]] = ()  # (x, y, text) of annotated points
    # scale of x; "days" are proleptic ordinals, as from `date.toordinal`
    scale: Literal["number", "whole", "powers", "days"] = "number"
    from_zero: bool = True  # whether the y axis starts at 0
    until: float | None = None  # smallest end of the x axis


@dataclass(frozen=True, kw_only=True, slots=True)
class _Axis:
    """A linear map from values to coordinates.  `low` maps to `start`; an axis with negative `length` runs upward."""

    low: float
    high: float
    start: float
    length: float

    def to_coordinate(self, value: float) -> float:
        return round(self.start + (value - self.low) / (self.high - self.low) * self.length, 2)


def chart(code: str, panel: Panel, *, named: tuple[str, str], number: Callable[[float], str]) -> Markup:
    """Render a chart as SVG.

    Args:
        code: prefix of element ids, unique on the page.
        panel: axes and data.
        named: title and description for screen readers.
        number: function that formats a number in the page's language.
    """
    bottom, top = _compute_y_span(panel)
    marks = [(tick, number(tick)) for tick in _round_ticks(bottom, top)]
    ends, scale = list(_iter_labeled_ends(panel)), panel.scale
    left = 22 + _LETTER * max(len(text) for _, text in marks)
    right = 8 + max([10 + _SMALL_LETTER * len(label) for _, label, _ in ends], default=0.0)
    places = [x for one in panel.series for x, _ in one.points] + ([] if panel.until is None else [panel.until])
    places = list(map(math.log10, places)) if scale == "powers" else places
    room = 0.04 * (max(places) - min(places)) or 0.5
    low, high = min(places) - room, max(places) + room
    across = _Axis(low=low, high=high, start=left, length=_WIDTH - left - right)
    down = _Axis(low=bottom, high=top, start=8 + _PANEL_HEIGHT, length=-_PANEL_HEIGHT)
    parts = [*_draw_axes(panel, across, down, marks)]
    for one in panel.series:
        parts += _draw_series(one, panel, across, down)
    parts += [*_draw_levels(panel, across, down), *_draw_end_labels(ends, across, down)]
    if scale == "days":
        labels = _list_date_ticks(low, high)
    else:
        write = (lambda tick: format_power_of_ten(round(tick))) if scale == "powers" else number
        labels = [(tick, write(tick)) for tick in _list_x_ticks(low, high, scale)]
    parts += _draw_x_axis(panel.x, across, _HEIGHT - 32, labels)
    title, description = map(escape, named)
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH:g} {_HEIGHT:g}" role="img" font-size="10"'
        f' font-family="Fedtune Sans, sans-serif" stroke-linejoin="round" aria-labelledby="{code}-title {code}-desc">'
        f'<title id="{code}-title">{title}</title><desc id="{code}-desc">{description}</desc>'
    )
    return Markup(head + "".join(parts) + "</svg>")  # all texts are escaped


def _draw_text(x: float, y: float, text: str, *, anchor: str = "start", more: str = "") -> str:
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}"{more}>{escape(text)}</text>'


def _compute_y_span(panel: Panel) -> tuple[float, float]:
    """Compute the limits of the y axis, with space for a marker."""
    values = [y for one in panel.series for _, y in one.points] + [height for height, _, _ in panel.levels]
    low, high = (0.0 if panel.from_zero else min(values)), max(values)
    if high - low < 1e-300:  # a smaller span underflows
        return (0.0, 1.0) if panel.from_zero else (low - 0.5, high + 0.5)
    room = 0.06 * (high - low)
    return (low if panel.from_zero else low - room), high + room


def _round_ticks(low: float, high: float, *, most: int = 6) -> list[float]:
    """List at most `most` round numbers between `low` and `high`."""
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    step = next(width * power for width in (1, 2, 2.5, 5, 10) if (high - low) / (width * power) <= most)
    first = math.ceil(low / step - 1e-9)
    return [round(number * step, 12) for number in range(first, math.floor(high / step + 1e-9) + 1)]


def _list_x_ticks(low: float, high: float, scale: str) -> list[float]:
    if scale == "number":
        return _round_ticks(low, high)
    whole = [tick for tick in _round_ticks(low, high, most=8) if tick == round(tick)]
    return whole or [float(round((low + high) / 2))]


def _list_date_ticks(low: float, high: float) -> list[tuple[float, str]]:
    """List ticks at the first days of months or years between two days, or the middle day if there is no such day."""
    first, last = date.fromordinal(math.floor(low)), date.fromordinal(math.floor(high))
    months = range(12 * first.year + first.month, 12 * last.year + last.month)
    step = next(step for step in chain((1, 2, 3, 6), count(12, 12)) if len(months) <= 5 * step)
    starts = [date(month // 12, month % 12 + 1, 1) for month in months if month % step == 0]
    form = "%Y-%m" if step < 12 else "%Y"
    middle = date.fromordinal(round((low + high) / 2))
    return [(day.toordinal(), day.strftime(form)) for day in starts] or [(middle.toordinal(), middle.isoformat())]


def _draw_axes(panel: Panel, across: _Axis, down: _Axis, ticks: Sequence[tuple[float, str]]) -> Iterator[str]:
    end, bottom = across.start + across.length, down.start
    for tick, text in ticks:
        y = down.to_coordinate(tick)
        yield f'<path d="M{across.start:g} {y:g}H{end:g}" stroke="#d9d9d9" stroke-width="0.6"/>'
        yield _draw_text(across.start - 5, y + 3.5, text, anchor="end")
    top = down.to_coordinate(down.high)
    yield f'<path d="M{across.start:g} {top:g}V{bottom:g}H{end:g}" stroke="#000000" stroke-width="0.8" fill="none"/>'
    if panel.y:
        middle = round((top + bottom) / 2, 2)
        yield _draw_text(10, middle, panel.y, anchor="middle", more=f' transform="rotate(-90 10 {middle:g})"')


def _draw_x_axis(name: str, across: _Axis, bottom: float, ticks: Sequence[tuple[float, str]]) -> Iterator[str]:
    for tick, text in ticks:
        x = across.to_coordinate(tick)
        yield f'<path d="M{x:g} {bottom:g}v3.5" stroke="#000000" stroke-width="0.8"/>'
        yield _draw_text(x, bottom + 14, text, anchor="middle")
    yield _draw_text(round(across.start + across.length / 2, 2), bottom + 28, name, anchor="middle")


def _draw_series(one: Series, panel: Panel, across: _Axis, down: _Axis) -> Iterator[str]:
    place = (lambda x: across.to_coordinate(math.log10(x))) if panel.scale == "powers" else across.to_coordinate
    points = [(place(x), down.to_coordinate(y)) for x, y in one.points]
    if one.kind == "limit":
        steps = "".join(f"H{x:g}V{y:g}" for x, y in points[1:])
        yield _draw_line(f"M{points[0][0]:g} {points[0][1]:g}{steps}", "#000000", LIMIT)
    else:
        color, dashes, marker = (values[one.number % MAX_LINES] for values in (COLORS, DASHES, MARKERS))
        yield _draw_line("M" + "L".join(f"{x:g} {y:g}" for x, y in points), color, dashes)
        if len(points) <= _MAX_MARKERS:
            yield from (_draw_marker(x, y, color, marker) for x, y in points)


def _draw_line(path: str, color: str, dashes: str) -> str:
    dashed = f' stroke-dasharray="{dashes}"' if dashes else ""
    return f'<path d="{path}" stroke="{color}" stroke-width="1.4" fill="none"{dashed}/>'


def _draw_marker(x: float, y: float, color: str, marker: str) -> str:
    return f'<path d="{marker}" transform="translate({x:g} {y:g})" fill="{color}" stroke="{color}"/>'


def _draw_levels(panel: Panel, across: _Axis, down: _Axis) -> Iterator[str]:
    for height, _, dashes in panel.levels:
        yield _draw_line(f"M{across.start:g} {down.to_coordinate(height):g}h{across.length:g}", "#000000", dashes)
    for x, y, text in panel.notes:
        # A rising line leaves space below its start and above its end.
        left, top = across.to_coordinate(x), down.to_coordinate(y)
        is_early = left < across.start + across.length / 2
        aside = 14 if is_early and top + 16 < down.start else -6
        yield _draw_text(left, top + aside, text, anchor="start" if is_early else "end")


def _iter_labeled_ends(panel: Panel) -> Iterator[tuple[float, str, str]]:
    """Yield (height, label, marker) for each label at the right edge.  A chart with a single line has no labels."""
    if len(panel.series) + len(panel.levels) < 2:
        return
    for one in panel.series:
        color, marker = (values[one.number % MAX_LINES] for values in (COLORS, MARKERS))
        yield max(one.points)[1], one.label, _draw_marker(4, -3, color, marker) if one.kind == "line" else ""
    for height, label, _ in panel.levels:
        yield height, label, ""


def _draw_end_labels(ends: Sequence[tuple[float, str, str]], across: _Axis, down: _Axis) -> Iterator[str]:
    """Draw the labels at the right edge without overlaps."""
    sorted_ends = sorted((down.to_coordinate(height) + 3, label, mark) for height, label, mark in ends)
    below = down.start + 3 - _LINE_HEIGHT * len(sorted_ends)  # leaves space for all labels above the axis
    y = -math.inf
    for place, (wanted, label, mark) in enumerate(sorted_ends, 1):
        y = max(min(wanted, below + _LINE_HEIGHT * place), y + _LINE_HEIGHT)
        said = mark + _draw_text(9 if mark else 2, 0, label)
        yield f'<g transform="translate({across.start + across.length + 3:g} {y:g})" font-size="9">{said}</g>'
