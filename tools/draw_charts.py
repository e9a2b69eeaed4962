"""Draw the charts of the README and the gallery into docs/pictures/, from what the studies in simulations/ measured.

python tools/draw_charts.py            writes the charts
python tools/draw_charts.py --check    exit code 1 if a chart is out of date

Each chart has a form for pages and a narrow one for phones. It has a ground of its own and two themes, so that it can
be read on any page. Blue and orange stay apart for readers with any kind of color blindness, and marks differ in form
as well.
"""

from __future__ import annotations

import json
import math
import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

REPOSITORY = Path(__file__).parents[1]
PICTURES = REPOSITORY / "docs" / "pictures"
STUDIES = REPOSITORY / "simulations"

WIDTH, PHONE_WIDTH = 760, 360


class Frame(NamedTuple):
    """Width of a picture, the place of the plot in it, and the sizes of its texts in pixels and letters a line."""

    width: int
    left: int
    right: int
    top: int
    bottom: int
    size: int
    title_size: int
    letters: int
    title_letters: int


WIDE = Frame(WIDTH, 64, 740, 84, 352, size=15, title_size=18, letters=118, title_letters=84)
LOW = WIDE._replace(bottom=262)
"""For the README's first screen, which also holds two commands and four links."""
PHONE = Frame(PHONE_WIDTH, 52, 346, 0, 220, size=13, title_size=16, letters=54, title_letters=41)
LIGHT = {
    "ground": "#ffffff",
    "ink": "#1f2933",
    "soft": "#55606c",
    "grid": "#d5dae0",
    "blue": "#0b62a4",
    "orange": "#b45309",
}
DARK = {
    "ground": "#0d1117",
    "ink": "#e6edf3",
    "soft": "#a8b3bf",
    "grid": "#30363d",
    "blue": "#7fb8e6",
    "orange": "#f59a55",
}
FONTS = "Helvetica,Arial,'Liberation Sans',sans-serif"
NO_BREAK = "\N{NO-BREAK SPACE}"


def draw_sixteen_sites(frame: Frame = WIDE) -> str:
    """Sixteen sites of 150 records: the base, each site alone, together, and all records in one place."""
    models = _read("small_sites/compare.json")["models"]
    score = {model["name"]: model["scores"]["accuracy"] for model in models}
    alone = [score[model["name"]] for model in models if model.get("kind") == "alone"]
    scale = _Scale(0.44, 0.86, frame)
    low, high = (round(100 * pick(one["value"] for one in alone)) for pick in (min, max))
    together, pooled, base = score["federated"], score["pooled"], score["base"]["value"]
    y_base, gain = scale.place(base), together["value"] - base
    y_best = scale.place(max(together["high"], pooled["high"])) - 8
    phone = frame is PHONE
    first, step = (64, 8) if phone else (110, 16)
    x_alone, x_together, x_pooled = first + 7.5 * step, *((234, 308) if phone else (500, 660))
    below = ("16 sites,\neach alone", "16 sites\ntogether", "all in\none place")
    parts = [
        *scale.draw((0.5, 0.6, 0.7, 0.8)),
        _line(frame.left, y_base, frame.right, y_base, "soft", dashes="6 4"),
        _text(frame.left + 8, y_base - 9, f"before training {base:.0%}", "soft", frame),
    ]
    for number, one in enumerate(alone):
        x = first + step * number
        parts += [_bar(x, scale, one, "orange", 1.2), _ring(x, scale.place(one["value"]), 3.5 if phone else 5)]
    parts += [
        _text(x_alone, scale.place(0.46), f"{low} to {high}%", "orange", frame, anchor="middle", bold=True),
        _line(x_together, y_base, x_together, scale.place(together["low"]), "blue", dashes="2 4"),
        _text(x_together + 8, scale.place(0.71), f"+{100 * gain:.1f} points", "blue", frame),
        _bar(x_together, scale, together, "blue", 3),
        _dot(x_together, scale.place(together["value"]), "blue", 5),
        _text(x_together, y_best, f"{together['value']:.0%}", "blue", frame, anchor="middle", bold=True),
        _bar(x_pooled, scale, pooled, "soft", 3),
        _square(x_pooled, scale.place(pooled["value"])),
        _text(x_pooled, y_best, f"{pooled['value']:.0%}", "soft", frame, anchor="middle", bold=True),
        *(
            _text(x, frame.bottom + 24, words if phone else words.replace("\n", " "), "ink", frame, anchor="middle")
            for x, words in zip((x_alone, x_together, x_pooled), below, strict=True)
        ),
    ]
    return _chart(
        frame,
        f"Alone, sixteen small sites do worse than no training. Together they reach {together['value']:.0%}.",
        "Accuracy on Banking77, 77 intents, 3,080 test questions. 150 records a site, epsilon 8 at delta 0.00001.",
        "Bars: 95% intervals over the test questions. One run each. Secure aggregation. simulations/small_sites",
        parts,
        bottom=frame.bottom + (42 if phone else 24),
    )


def draw_charts(frame: Frame = WIDE) -> str:
    """Four banks: accuracy against epsilon, each bank alone, and all records in one place."""
    lines = _read("banks_intents/results.json")["lines"]
    scale = _Scale(0.6, 0.95, frame)
    questions, base = 3080, lines["e8"]["before"]["accuracy"]
    phone = frame is PHONE
    x_first, x_eight, x_break, x_without = (80, 216, 268, 314) if phone else (130, 430, 600, 695)

    def find_interval(line: dict[str, Any]) -> dict[str, float]:
        value = float(line["metrics"]["accuracy"])
        margin = 1.96 * math.sqrt(value * (1 - value) / questions)
        return {"value": value, "low": value - margin, "high": value + margin}

    def find_place(epsilon: float) -> float:
        return x_first + (x_eight - x_first) * math.log(epsilon) / math.log(8)

    private = [(find_place(lines[key]["epsilon"]), find_interval(lines[key])) for key in ("e1", "e3", "e8")]
    points = " ".join(f"{x:.1f},{scale.place(one['value']):.1f}" for x, one in private)
    y_base = scale.place(base)
    names = "" if phone else ", from the labels' names alone"
    parts = [
        *scale.draw((0.6, 0.7, 0.8, 0.9)),
        _line(frame.left, y_base, frame.right, y_base, "soft", dashes="6 4"),
        _text(frame.left + 8, y_base - 8, f"before training{names}: {base:.0%}", "soft", frame),
        f'<polyline fill="none" stroke-width="2.5" class="blue line" points="{points}"/>',
        *_break_axis(x_break, frame.bottom),
    ]
    without = find_interval(lines["none"])
    for x, one in [*private, (x_without, without)]:
        y = scale.place(one["value"])
        parts += [_bar(x, scale, one, "blue", 2.5), _dot(x, y, "blue", 5)]
        below = phone and x >= private[-1][0]
        place, anchor = ((x, y + 24), "middle") if below else ((x - 10, y - 10), "end")
        parts += [_text(*place, f"{one['value']:.0%}", "blue", frame, anchor=anchor, bold=True)]
    alone, pooled = (find_interval(lines[key]) for key in ("local", "central"))
    x_alone, x_pooled = x_eight + 14, x_eight + (18 if phone else 30)
    words = (
        f"each bank alone, epsilon 8: {alone['value']:.0%}",
        f"in one place, epsilon 8: {pooled['value']:.0%}",
    )
    y_alone, y_pooled = (scale.place(one["value"]) for one in (alone, pooled))
    parts += [
        _bar(x_alone, scale, alone, "orange", 2),
        _ring(x_alone, y_alone),
        _bar(x_pooled, scale, pooled, "soft", 2),
        _square(x_pooled, y_pooled),
        *(
            [
                _text(frame.right, y_alone + 28, words[0], "orange", frame, anchor="end"),
                _text(x_pooled + 44, y_pooled - 22, words[1], "soft", frame, anchor="end"),
            ]
            if phone
            else [
                _text(x_alone + 14, y_alone + 5, words[0], "orange", frame),
                _text(x_pooled + 14, y_pooled + 5, words[1], "soft", frame),
            ]
        ),
        *(
            _text(find_place(one), frame.bottom + 24, f"epsilon {one}", "ink", frame, anchor="middle")
            for one in (1, 3, 8)
        ),
        _text(x_without, frame.bottom + 24, "no privacy", "ink", frame, anchor="middle"),
    ]
    best = private[-1][1]["value"]
    return _chart(
        frame,
        f"Four banks reach {best:.0%} at epsilon 8, and would reach {without['value']:.0%} without privacy.",
        "Accuracy on Banking77 by epsilon of each record (log scale: stronger protection to the left), delta 0.00001.",
        "Bars: 95% intervals over 3,080 test questions. "
        "Epsilon 1, alone and in one place: an earlier recipe. simulations/banks_intents",
        parts,
    )


def draw_audit(frame: Frame = WIDE) -> str:
    """What attacks showed beside what was claimed, and what they show where a fault is planted."""
    rows = [
        (title, [max(bound["lower_bound"] for bound in lines["audit"]["bounds"] if bound["site"]), claimed])
        for title, claimed, lines in _list_audits()
    ]
    phone = frame is PHONE
    left, width, step, most = (20, 250, 44, 8.2) if phone else (220, 370, 29, 8.2)
    top = frame.top + (24 if phone else 4)
    groups = [[claimed for _, (_, claimed) in rows[:number]] for number in range(1, len(rows) + 1)]
    places = [top + step * number + 12 * (len(set(group)) - 1) for number, group in enumerate(groups)]
    bottom = places[-1] + step
    parts = [
        _line(left + width * tick / most, top - 8, left + width * tick / most, bottom, "grid") for tick in (2, 4, 6, 8)
    ]
    for y, (title, (shown, claimed)) in zip(places, rows, strict=True):
        refuted = shown > claimed
        color = "orange" if refuted else "blue"
        words = f"shown {shown:.2f}, " + ("refuted" if refuted else f"claim {claimed}")
        end, mark = left + width * min(shown, most) / most, left + width * claimed / most
        parts += [
            _text(left, y - 7, title, "ink", frame)
            if phone
            else _text(left - 14, y + 13, title, "ink", frame, anchor="end"),
            f'<rect x="{left}" y="{y}" width="{end - left:.1f}" height="16" class="{color}"/>',
            _line(mark, y - 3, mark, y + 19, "ink", width=2.5),
            _text(frame.right, y - 7, words, color, frame, anchor="end")
            if phone
            else _text(max(end, mark) + 8, y + 13, words, color, frame),
        ]
    parts += [
        *(
            _text(left + width * tick / most, bottom + 16, str(tick), "soft", frame, anchor="middle")
            for tick in (0, 2, 4, 6, 8)
        ),
        _text(left + width * 8 / most + 14, bottom + 16, "epsilon", "soft", frame),
    ]
    return _chart(
        frame,
        "Attacks show less than fedtune claims, and refute it where a fault is planted.",
        "Bar: epsilon that an audit shows with 95% confidence. Upright mark: the claim.",
        "White-box canaries at a site, 1,000 to 15,000; the strongest bound of each line. simulations/audit",
        parts,
        bottom=bottom + (16 if phone else 27),
    )


def draw_two_years(frame: Frame = WIDE) -> str:
    """Two years of monthly runs: with cohorts each run is admitted, without them the budget ends after eight."""
    lines = _read("calendar/results.json")["lines"]
    scale = _Scale(0.7, 0.87, frame)
    cohorts, everybody = ([run["accuracy"] for run in lines[key]["runs"]] for key in ("cohorts", "everybody"))
    phone = frame is PHONE

    def find_place(month: int) -> float:
        return frame.left + 20 + (frame.right - frame.left - 40) * month / 23

    def mark_cohort(x: float, y: float) -> str:
        return _dot(x, y, "blue", 3 if phone else 4)

    def mark_everybody(x: float, y: float) -> str:
        return _ring(x, y, 3.5 if phone else 5)

    parts = list(scale.draw((0.7, 0.75, 0.8, 0.85)))
    for values, color, mark in ((everybody, "orange", mark_everybody), (cohorts, "blue", mark_cohort)):
        points = " ".join(f"{find_place(n):.1f},{scale.place(value):.1f}" for n, value in enumerate(values))
        parts += [f'<polyline fill="none" stroke-width="2" class="{color} line" points="{points}"/>']
        parts += [mark(find_place(n), scale.place(value)) for n, value in enumerate(values)]
    place = (find_place(17), scale.place(0.86)) if phone else (find_place(13), scale.place(cohorts[13]) - 22)
    refused = "everybody in each run:\nthe ninth is refused"
    parts += [
        _text(
            find_place(8) + (0 if phone else -4),
            scale.place(everybody[-1]) + (30 if phone else 36),
            refused if phone else refused.replace("\n", " "),
            "orange",
            frame,
        ),
        _text(
            *place,
            "people of the last eight months",
            "blue",
            frame,
            anchor="end",
        ),
        *(
            _text(find_place(n - 1), frame.bottom + 24, str(n) if n > 1 else "month 1", "ink", frame, anchor="middle")
            for n in (1, 6, 12, 18, 24)
        ),
    ]
    return _chart(
        frame,
        "With cohorts a site can train every month for two years at epsilon 8 a person.",
        "Accuracy by month. Each run costs a person epsilon 2.481; eight of them come to 8.",
        "One run a month, four banks, secure aggregation. 95% interval of a score: \u00b10.013. simulations/calendar",
        parts,
    )


def draw_price(frame: Frame = WIDE) -> str:
    """Points that privacy costs on public test files with their intervals, beside what others lost."""
    rows = list(_list_prices())
    phone = frame is PHONE
    left, width, step = (20, 310, 64) if phone else (330, 370, 44)
    least, most = -5, 20  # larger losses are written as numbers
    top = frame.top + (24 if phone else 4)
    bottom = top + step * len(rows)
    right = left + width

    def find_place(lost: float) -> float:
        return left + width * (max(lost, least) - least) / (most - least)

    ticks = range(0, most + 1, 5)
    parts = [_line(find_place(tick), top - 12, find_place(tick), bottom - 8, "grid") for tick in ticks]
    for number, (title, color, lost) in enumerate(rows):
        y = top + step * number + (26 if phone else 8)
        parts.append(
            _text(left, y - 22, title, "ink", frame)
            if phone
            else _text(left - 20, y + 5, title, "ink", frame, anchor="end")
        )
        if max(points for points, _ in lost.values()) > most:
            beyond = ", ".join(f"{points:.0f} at {epsilon}" for epsilon, (points, _) in lost.items())
            parts.append(_text(right, y + 5, f"{beyond} \u2192", color, frame, anchor="end"))
            continue
        for row, (epsilon, (points, margin)) in enumerate(lost.items()):
            x, y_mark = find_place(points), y + 11 * (row - (len(lost) - 1) / 2)
            if margin is not None:
                parts.append(
                    _line(find_place(points - margin), y_mark, find_place(points + margin), y_mark, color, width=2)
                )
            marks = {8: _dot(x, y_mark, color, 4), 3: _ring(x, y_mark, 4, color), 1: _square(x, y_mark, color)}
            parts.append(marks[epsilon])
    parts += [_text(find_place(tick), bottom + 12, str(tick), "soft", frame, anchor="middle") for tick in ticks]
    return _chart(
        frame,
        "With secure aggregation, epsilon 8 costs at most 2.5 points on three sets, and far more on two others.",
        "Points lost to the score without privacy, in brackets. Dot: epsilon 8, ring: 3, square: 1.",
        "Lines: 95% intervals. Blue: federated. Orange: published, in one place. simulations/known_ground",
        parts,
        bottom=bottom + 14,
    )


def draw_who_sees_what(frame: Frame = WIDE) -> str:
    """What stays at a site, what leaves it, and who reads it."""
    rows = (
        ("records, and how many there really are", "a size that the site chose to declare"),
        ("the update before noise", "the update with noise, or only the sum over sites"),
        ("exact losses, scores and gradients", "noised scores, only if the policy allows them"),
        ("the ledger", "signed receipts: what was charged, of which plan"),
        ("the policy and private keys", "a refusal's rule, with its limit"),
        ("the log, errors' texts, names of files", "address, times, version, whether a round failed"),
    )
    phone = frame is PHONE
    first, step = (50, 25) if phone else (66, 38)
    deep = first + step * 5 + (18 if phone else 38)
    boxes = (
        (8 if phone else 20, frame.top - 6, 344 if phone else 330, "orange", "Stays at the site"),
        (
            8 if phone else 370,
            frame.top + (deep + 8 if phone else -6),
            344 if phone else 370,
            "blue",
            "Server and lead see",
        ),
    )
    parts = []
    for (x, y, width, color, title), column in zip(boxes, zip(*rows, strict=True), strict=True):
        place = f'x="{x}" y="{y}" width="{width}" height="{deep}"'
        parts += [
            f'<rect {place} class="{color} line" stroke-width="2"/>',
            _text(x + 12, y + 26, title, color, frame, bold=True),
            *(_text(x + 12, y + first + step * number, words, "ink", frame) for number, words in enumerate(column)),
        ]
    return _chart(
        frame,
        "Records stay at the site. What is computed from them leaves it with noise.",
        "Updates and scores are computed from records: epsilon bounds what anybody learns from them.",
        "docs/threat_model.md has each line with its test.",
        parts,
        bottom=boxes[1][1] + deep - (8 if phone else 0),
    )


CHARTS: dict[str, Callable[..., str]] = {
    "sixteen_sites": draw_sixteen_sites,
    "accuracy": draw_charts,
    "audit": draw_audit,
    "two_years": draw_two_years,
    "price": draw_price,
    "who_sees_what": draw_who_sees_what,
}


def draw_pictures() -> Iterator[tuple[str, str]]:
    """Draw every chart twice: for pages, and for phones (its name ends in -phone)."""
    for name, draw in CHARTS.items():
        yield name, draw(LOW if draw is draw_sixteen_sites else WIDE)
        yield f"{name}-phone", draw(PHONE)


def _read(name: str) -> Any:
    return json.loads((STUDIES / name).read_text(encoding="utf-8"))


def _list_audits() -> Iterable[tuple[str, float, dict[str, Any]]]:
    """Title, claimed epsilon and results of each line of the study."""
    for line in _read("audit/results.json")["lines"].values():
        bounds = [bound for bound in line["audit"]["bounds"] if bound["site"]]
        if bounds[0]["guesses"] == bounds[0]["canaries"]:
            claimed = round(bounds[0]["claimed_epsilon"])
            yield f"epsilon {claimed}: {line['ran']}", claimed, line


def _list_prices() -> Iterator[tuple[str, str, dict[int, tuple[float, float | None]]]]:
    """Title, color and points lost with their margin by epsilon, of our own lines and of published ones."""
    for line in _read("known_ground/losses.json"):
        base, _, layers = line["base"].partition(", ")
        without, how = line["without"], line["aggregation"] or base
        how += f", {layers}" if line["aggregation"] and layers else ""
        shown = f"{without:.3f}" if without < 1 else f"{without:.1f}"
        lost = {one["near"]: (one["points"], one["margin"]) for one in line["lost"]}
        yield f"{line['set']}, {how} ({shown})", "blue" if line["aggregation"] else "orange", lost


class _Scale:
    """A vertical axis of shares."""

    def __init__(self, least: float, most: float, frame: Frame) -> None:
        self.least, self.most, self.frame = least, most, frame

    def place(self, share: float) -> float:
        top, bottom = self.frame.top, self.frame.bottom
        return bottom - (bottom - top) * (share - self.least) / (self.most - self.least)

    def draw(self, ticks: Iterable[float]) -> Iterable[str]:
        left, right = self.frame.left, self.frame.right
        for tick in ticks:
            yield _line(left, self.place(tick), right, self.place(tick), "grid")
            yield _text(left - 10, self.place(tick) + 5, f"{tick:.0%}", "soft", self.frame, anchor="end")


def _chart(
    frame: Frame, title: str, subtitle: str, note: str, parts: Iterable[str], *, bottom: float | None = None
) -> str:
    """A picture with its ground, its finding as the title, and both themes; `bottom`: where the parts end."""
    titles = _balance_lines(title, frame.title_letters)
    subtitles, notes = (_break_lines(words, frame.letters) for words in (subtitle, note))
    size = min(14, frame.size)
    y_title = frame.title_size + 14
    y_subtitle = y_title + (frame.title_size + 5) * (len(titles) - 1) + 24
    shift = y_subtitle + (size + 4) * (len(subtitles) - 1) + 28 - frame.top
    y_note = shift + (frame.bottom + 24 if bottom is None else bottom) + 38
    height = round(y_note + (size + 4) * (len(notes) - 1) + 16)
    style = _write_theme(LIGHT) + "@media (prefers-color-scheme:dark){" + _write_theme(DARK) + "}"
    style += "text{paint-order:stroke;stroke-width:5px;stroke-linejoin:round}.line{fill:none}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {frame.width} {height}" width="{frame.width}" '
        f'height="{height}" role="img" aria-labelledby="title" font-family="{FONTS}" font-size="15">\n'
        f'<title id="title">{_space(title)}</title>\n<style>{style}</style>\n'
        f'<rect width="{frame.width}" height="{height}" class="ground"/>\n'
        + "\n".join(
            [
                _text(20, y_title, "\n".join(titles), "ink", frame, size=frame.title_size, bold=True),
                _text(20, y_subtitle, "\n".join(subtitles), "soft", frame, size=size),
                f'<g transform="translate(0 {shift})">',
                *parts,
                "</g>",
                _text(20, y_note, "\n".join(notes), "soft", frame, size=size),
            ]
        )
        + "\n</svg>\n"
    )


def _space(words: str) -> str:
    return re.sub(r"(?<=\d) ?%", f"{NO_BREAK}%", words)


def _break_lines(words: str, most: int) -> list[str]:
    """Break a text into lines of at most so many letters."""
    return textwrap.wrap(_space(words), most, break_on_hyphens=False, break_long_words=False)


def _balance_lines(words: str, most: int) -> list[str]:
    """Break a text into as few lines as possible, of similar lengths."""
    count = len(_break_lines(words, most))
    least = min(letters for letters in range(1, most + 1) if len(_break_lines(words, letters)) <= count)
    return _break_lines(words, least)


def _write_theme(colors: dict[str, str]) -> str:
    halo = f"text{{stroke:{colors['ground']}}}"
    return halo + "".join(
        f".{name}{{fill:{color}}}.{name}.line{{stroke:{color};fill:none}}" for name, color in colors.items()
    )


def _text(
    x: float,
    y: float,
    words: str,
    color: str,
    frame: Frame,
    *,
    anchor: str = "start",
    size: int | None = None,
    bold: bool = False,
) -> str:
    """One or several lines of text; their halo in the color of the ground keeps lines behind them away."""
    size = size or frame.size
    weight = ' font-weight="700"' if bold else ""
    return "\n".join(
        f'<text x="{x:.1f}" y="{y + number * (size + (5 if bold else 4)):.1f}" text-anchor="{anchor}" '
        f'class="{color}" font-size="{size}"{weight}>{_space(line)}</text>'
        for number, line in enumerate(words.split("\n"))
    )


def _line(x1: float, y1: float, x2: float, y2: float, color: str, *, dashes: str = "", width: float = 1) -> str:
    pattern = f' stroke-dasharray="{dashes}"' if dashes else ""
    return f'<path d="M{x1:.1f} {y1:.1f}L{x2:.1f} {y2:.1f}" class="{color} line" stroke-width="{width}"{pattern}/>'


def _bar(x: float, scale: _Scale, interval: dict[str, float], color: str, width: float) -> str:
    return _line(x, scale.place(interval["low"]), x, scale.place(interval["high"]), color, width=width)


def _dot(x: float, y: float, color: str, radius: float) -> str:
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" class="{color}"/>'


def _ring(x: float, y: float, radius: float = 5, color: str = "orange") -> str:
    place = f'cx="{x:.1f}" cy="{y:.1f}" r="{radius}"'
    return f'<circle {place} class="ground"/><circle {place} class="{color} line" stroke-width="2"/>'


def _break_axis(x: float, y: float) -> list[str]:
    """Two slanted strokes where an axis leaves out a part of its range."""
    gap = f'<rect x="{x - 4:.1f}" y="{y - 2:.1f}" width="8" height="4" class="ground"/>'
    return [gap, *(_line(x + at - 3, y + 7, x + at + 3, y - 7, "soft", width=1.5) for at in (-4, 4))]


def _square(x: float, y: float, color: str = "soft") -> str:
    return f'<rect x="{x - 6:.1f}" y="{y - 6:.1f}" width="12" height="12" class="{color}"/>'


def main() -> int:
    """Write the charts, or check them."""
    stale = []
    for name, text in draw_pictures():
        path = PICTURES / f"{name}.svg"
        if "--check" in sys.argv[1:]:
            stale += [name] if not path.exists() or path.read_text(encoding="utf-8") != text else []
        else:
            path.write_text(text, encoding="utf-8")
    if stale:
        sys.stderr.write(f"out of date: {', '.join(stale)}; run python tools/draw_charts.py\n")
    return int(bool(stale))


if __name__ == "__main__":
    sys.exit(main())
