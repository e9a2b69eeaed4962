"""Draw docs/accuracy.svg, the chart of the README, from simulations/banks_intents/results.json.

python docs/draw_accuracy.py            writes the chart
python docs/draw_accuracy.py --check    exit code 1 if the chart is out of date
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

CHART = Path(__file__).with_name("accuracy.svg")
RESULTS = Path(__file__).parents[1] / "simulations" / "banks_intents" / "results.json"

WIDTH, HEIGHT = 760, 400
LEFT, RIGHT, TOP, BOTTOM = 64, 744, 56, 336
LEAST, MOST = 0.60, 0.95
NO_PRIVACY = 650  # x of the column that has no epsilon
INK, GRAY, GRID = "#1f2933", "#5f6c7b", "#e1e5ea"
TOGETHER, ALONE, POOLED = "#0b62a4", "#b45309", "#3f7d3f"


def chart(lines: dict[str, Any]) -> str:
    """The chart as SVG text.

    Args:
        lines: `lines` of results.json, with the keys e1, e3, e8, none, local and central.
    """
    together = [(_x(line["epsilon"]), _accuracy(line)) for line in (lines["e1"], lines["e3"], lines["e8"])]
    before = lines["e8"]["before"]["accuracy"]
    at_8 = _x(8)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        'role="img" aria-labelledby="title" font-family="Helvetica, Arial, sans-serif" font-size="14">',
        '<title id="title">Test accuracy of four banks against epsilon</title>',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
        _text(LEFT, 28, "Test accuracy on Banking77, 77 intents", size=17),
        *_axes(),
        _line(LEFT, _y(before), RIGHT, _y(before), GRAY, dashes="5 4"),
        _text(LEFT + 8, _y(before) - 7, f"before training, from the label names alone: {before:.3f}", color=GRAY),
        '<polyline fill="none" stroke-width="2.5" '
        f'stroke="{TOGETHER}" points="{" ".join(f"{x:.1f},{_y(y):.1f}" for x, y in together)}"/>',
        *(_point(x, y, TOGETHER, side="above") for x, y in together[:2]),
        _point(at_8, together[2][1], TOGETHER),
        _point(NO_PRIVACY, _accuracy(lines["none"]), TOGETHER, side="above"),
        _point(at_8, _accuracy(lines["local"]), ALONE, "each bank alone (mean)"),
        _point(at_8, _accuracy(lines["central"]), POOLED, "all records in one place", side="above"),
        _text(_x(1.9), _y(0.815), "four banks together", color=TOGETHER, anchor="end"),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _accuracy(line: dict[str, Any]) -> float:
    return float(line["metrics"]["accuracy"])


def _x(epsilon: float) -> float:
    """Place of an epsilon, on a logarithmic scale with 1 at 130 and 8 at 450."""
    return 130 + 320 * math.log(epsilon) / math.log(8)


def _y(accuracy: float) -> float:
    return BOTTOM - (BOTTOM - TOP) * (accuracy - LEAST) / (MOST - LEAST)


def _axes() -> list[str]:
    parts = []
    for tenths in (0.6, 0.7, 0.8, 0.9):
        parts += [_line(LEFT, _y(tenths), RIGHT, _y(tenths), GRID)]
        parts += [_text(LEFT - 10, _y(tenths) + 5, f"{tenths:.1f}", color=GRAY, anchor="end")]
    for epsilon in (1, 3, 8):
        parts += [_line(_x(epsilon), BOTTOM, _x(epsilon), BOTTOM + 6, GRAY)]
        parts += [_text(_x(epsilon), BOTTOM + 22, str(epsilon), color=INK, anchor="middle")]
    parts += [_line(NO_PRIVACY, BOTTOM, NO_PRIVACY, BOTTOM + 6, GRAY)]
    parts += [_text(NO_PRIVACY, BOTTOM + 22, "no privacy", anchor="middle")]
    words = "epsilon of the whole run, at delta 1e-5 for each record (less epsilon: more privacy)"
    return [*parts, _text(LEFT, BOTTOM + 50, words, color=GRAY)]


def _point(x: float, accuracy: float, color: str, words: str = "", *, side: str = "right") -> str:
    label = f"{words} {accuracy:.3f}".strip()
    place = (x + 12, _y(accuracy) + 5, "start") if side == "right" else (x, _y(accuracy) - 12, "middle")
    circle = f'<circle cx="{x:.1f}" cy="{_y(accuracy):.1f}" r="5" fill="{color}"/>'
    return circle + "\n" + _text(place[0], place[1], label, color=color, anchor=place[2])


def _line(x1: float, y1: float, x2: float, y2: float, color: str, dashes: str = "") -> str:
    pattern = f' stroke-dasharray="{dashes}"' if dashes else ""
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{color}"{pattern}/>'


def _text(x: float, y: float, words: str, *, color: str = INK, anchor: str = "start", size: int = 14) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" fill="{color}" text-anchor="{anchor}" font-size="{size}">{words}</text>'


def main() -> int:
    """Write the chart, or check it."""
    text = chart(json.loads(RESULTS.read_text(encoding="utf-8"))["lines"])
    if "--check" in sys.argv[1:]:
        return int(not CHART.exists() or CHART.read_text(encoding="utf-8") != text)
    CHART.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
