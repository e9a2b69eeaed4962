"""Draw the charts of the README and the gallery into docs/pictures/, from what the studies in simulations/ measured.

python tools/draw_charts.py            writes the charts
python tools/draw_charts.py --check    exit code 1 if a chart is out of date

Each chart has a ground of its own and two themes, so that it can be read on any page. Blue and orange stay apart for
readers with any kind of color blindness, and marks differ in form as well.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[1]
PICTURES = REPOSITORY / "docs" / "pictures"
STUDIES = REPOSITORY / "simulations"

WIDTH, HEIGHT = 760, 430
LEFT, RIGHT, TOP, BOTTOM = 64, 740, 84, 352
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
BESIDE = 16
"""How far apart the points of single sites are, so that none hides another."""


def draw_sixteen_sites() -> str:
    """Sixteen sites of 150 records: the base, each site alone, together, and all records in one place."""
    models = _read("small_sites/compare.json")["models"]
    score = {model["name"]: model["scores"]["accuracy"] for model in models}
    alone = [score[model["name"]] for model in models if model.get("kind") == "alone"]
    scale = _Scale(0.5, 0.85)
    low, high = (round(100 * pick(one["value"] for one in alone)) for pick in (min, max))
    together, pooled, base = score["federated"], score["pooled"], score["base"]["value"]
    y_base = scale.place(base)
    parts = [
        *scale.draw((0.5, 0.6, 0.7, 0.8)),
        _line(LEFT, y_base, RIGHT, y_base, "soft", dashes="6 4"),
        _text(RIGHT - 4, y_base + 20, f"before training {base:.0%}", "soft", anchor="end"),
    ]
    for number, one in enumerate(alone):
        x = 110 + BESIDE * number
        parts += [_bar(x, scale, one, "orange", 1.2), _ring(x, scale.place(one["value"]))]
    parts += [
        _text(230, y_base - 14, f"each alone: {low} to {high} %", "orange", anchor="middle", bold=True),
        _bar(500, scale, together, "blue", 3),
        _dot(500, scale.place(together["value"]), "blue", 7),
        _text(500, scale.place(together["high"]) - 12, f"{together['value']:.0%}", "blue", anchor="middle", bold=True),
        _bar(660, scale, pooled, "soft", 3),
        _square(660, scale.place(pooled["value"])),
        _text(660, scale.place(pooled["high"]) - 12, f"{pooled['value']:.0%}", "soft", anchor="middle", bold=True),
        *(
            _text(x, BOTTOM + 24, words, "ink", anchor="middle")
            for x, words in ((230, "16 sites, each alone"), (500, "16 sites together"), (660, "all in one place"))
        ),
    ]
    return _chart(
        f"Alone, sixteen small sites do worse than no training. Together they reach {together['value']:.0%}.",
        "Accuracy on Banking77, 77 intents, 3,080 test questions. 150 records a site, epsilon 8 at delta 0.00001.",
        "Bars: 95 % intervals over the test questions. One run each. Secure aggregation. simulations/small_sites",
        parts,
    )


def draw_charts() -> str:
    """Four banks: accuracy against epsilon, each bank alone, and all records in one place."""
    lines = _read("banks_intents/results.json")["lines"]
    scale = _Scale(0.6, 0.95)
    questions, base = 3080, lines["e8"]["before"]["accuracy"]

    def find_interval(line: dict[str, Any]) -> dict[str, float]:
        value = float(line["metrics"]["accuracy"])
        margin = 1.96 * math.sqrt(value * (1 - value) / questions)
        return {"value": value, "low": value - margin, "high": value + margin}

    def find_place(epsilon: float) -> float:
        return 130 + 300 * math.log(epsilon) / math.log(8)

    private = [(find_place(lines[key]["epsilon"]), find_interval(lines[key])) for key in ("e1", "e3", "e8")]
    points = " ".join(f"{x:.1f},{scale.place(one['value']):.1f}" for x, one in private)
    y_base = scale.place(base)
    parts = [
        *scale.draw((0.6, 0.7, 0.8, 0.9)),
        _line(LEFT, y_base, RIGHT, y_base, "soft", dashes="6 4"),
        _text(LEFT + 8, y_base - 8, f"before training, from the labels' names alone: {base:.0%}", "soft"),
        f'<polyline fill="none" stroke-width="2.5" class="blue line" points="{points}"/>',
    ]
    without = find_interval(lines["none"])
    for x, one in [*private, (640, without)]:
        value = one["value"]
        parts += [_bar(x, scale, one, "blue", 2.5), _dot(x, scale.place(value), "blue", 5)]
        parts += [_text(x - 10, scale.place(value) - 13, f"{value:.0%}", "blue", anchor="end", bold=True)]
    alone, pooled = (find_interval(lines[key]) for key in ("local", "central"))
    parts += [
        _bar(446, scale, alone, "orange", 2),
        _ring(446, scale.place(alone["value"])),
        _text(460, scale.place(alone["value"]) + 5, f"each bank alone {alone['value']:.0%}", "orange"),
        _bar(462, scale, pooled, "soft", 2),
        _square(462, scale.place(pooled["value"])),
        _text(478, scale.place(pooled["value"]) + 4, f"in one place {pooled['value']:.0%}", "soft"),
        *(_text(find_place(one), BOTTOM + 24, str(one), "ink", anchor="middle") for one in (1, 3, 8)),
        _text(640, BOTTOM + 24, "no privacy", "ink", anchor="middle"),
    ]
    best = private[-1][1]["value"]
    return _chart(
        f"Four banks reach {best:.0%} at epsilon 8, and would reach {without['value']:.0%} without privacy.",
        "Accuracy on Banking77 by epsilon of each record (log scale: stronger protection to the left), delta 0.00001.",
        "Bars: 95 % intervals over 3,080 test questions. One or two runs a point. simulations/banks_intents",
        parts,
    )


def draw_audit() -> str:
    """What attacks showed beside what was claimed, and what they show where a fault is planted."""
    rows = [
        (title, [max(bound["lower_bound"] for bound in lines["audit"]["bounds"] if bound["site"]), claimed])
        for title, claimed, lines in _list_audits()
    ]
    width = 380
    parts = []
    for number, (title, (shown, claimed)) in enumerate(rows):
        y = TOP + 12 + number * 29
        refuted = shown > claimed
        color = "orange" if refuted else "blue"
        end = 250 + width * min(shown, 8.2) / 8.2
        parts += [
            _text(236, y + 13, title, "ink", anchor="end"),
            f'<rect x="250" y="{y}" width="{end - 250:.1f}" height="16" class="{color}"/>',
            _line(250 + width * claimed / 8.2, y - 4, 250 + width * claimed / 8.2, y + 20, "ink", width=2.5),
            _text(
                max(end, 250 + width * claimed / 8.2) + 8,
                y + 13,
                f"{shown:.2f}" + (" refuted" if refuted else ""),
                color,
            ),
        ]
    return _chart(
        "Attacks show less than fedtune claims, and refute it where a fault is planted.",
        "Bar: epsilon that an audit shows with 95 % confidence. Upright mark: the claim.",
        "White-box canaries at a site, 1,000 to 15,000; the strongest bound of each line. simulations/audit",
        parts,
    )


def draw_two_years() -> str:
    """Two years of monthly runs: with cohorts each run is admitted, without them the budget ends after eight."""
    lines = _read("calendar/results.json")["lines"]
    scale = _Scale(0.7, 0.87)
    cohorts, everybody = ([run["accuracy"] for run in lines[key]["runs"]] for key in ("cohorts", "everybody"))

    def find_place(month: int) -> float:
        return LEFT + 20 + (RIGHT - LEFT - 40) * month / 23

    parts = list(scale.draw((0.7, 0.75, 0.8, 0.85)))
    for values, color, mark in ((everybody, "orange", _ring), (cohorts, "blue", lambda x, y: _dot(x, y, "blue", 4))):
        points = " ".join(f"{find_place(n):.1f},{scale.place(value):.1f}" for n, value in enumerate(values))
        parts += [f'<polyline fill="none" stroke-width="2" class="{color} line" points="{points}"/>']
        parts += [mark(find_place(n), scale.place(value)) for n, value in enumerate(values)]
    parts += [
        _text(
            find_place(8) - 4, scale.place(everybody[-1]) + 36, "everybody in each run: the ninth is refused", "orange"
        ),
        _text(find_place(13), scale.place(cohorts[13]) - 22, "people of the last eight months", "blue", anchor="end"),
        *(_text(find_place(n - 1), BOTTOM + 24, str(n), "ink", anchor="middle") for n in (1, 6, 12, 18, 24)),
    ]
    return _chart(
        "With cohorts a site can train every month for two years at epsilon 8 a person.",
        "Accuracy by month. Each run costs a person epsilon 2.481; eight of them come to 8.",
        "One run a month, four banks, secure aggregation. 95 % of a score: 0.013 either way. simulations/calendar",
        parts,
    )


def draw_who_sees_what() -> str:
    """What stays at a site, what leaves it, and who reads it."""
    columns = ((20, 330, "orange", "Stays at the site"), (370, 370, "blue", "Server and lead see"))
    rows = (
        ("records, and how many there really are", "a size that the site chose to declare"),
        ("the update before noise", "the update with noise, or only the sum over sites"),
        ("exact losses, scores and gradients", "noised scores, only if the policy allows them"),
        ("the ledger", "signed receipts: what was charged, of which plan"),
        ("the policy and private keys", "a refusal's rule, with its limit"),
        ("the log, errors' texts, names of files", "address, times, version, whether a round failed"),
    )
    parts = []
    for x, width, color, title in columns:
        place = f'x="{x}" y="{TOP - 6}" width="{width}" height="{BOTTOM - TOP + 26}"'
        parts += [
            f'<rect {place} class="{color} line" stroke-width="2"/>',
            _text(x + 14, TOP + 20, title, color, bold=True),
        ]
    for number, row in enumerate(rows):
        for (x, _, _, _), words in zip(columns, row, strict=True):
            parts += [_text(x + 14, TOP + 60 + 38 * number, words, "ink")]
    return _chart(
        "Records stay at the site. What is computed from them leaves it with noise.",
        "Updates and scores are computed from records: epsilon bounds what anybody learns from them.",
        "docs/threat_model.md has each line with its test.",
        parts,
    )


CHARTS: dict[str, Callable[[], str]] = {
    "sixteen_sites": draw_sixteen_sites,
    "accuracy": draw_charts,
    "audit": draw_audit,
    "two_years": draw_two_years,
    "who_sees_what": draw_who_sees_what,
}


def _read(name: str) -> Any:
    return json.loads((STUDIES / name).read_text(encoding="utf-8"))


def _list_audits() -> Iterable[tuple[str, float, dict[str, Any]]]:
    """Title, claimed epsilon and results of each line of the study."""
    for line in _read("audit/results.json")["lines"].values():
        bounds = [bound for bound in line["audit"]["bounds"] if bound["site"]]
        if bounds[0]["guesses"] == bounds[0]["canaries"]:
            claimed = round(bounds[0]["claimed_epsilon"])
            yield f"epsilon {claimed}: {line['ran']}", claimed, line


class _Scale:
    """A vertical axis of shares."""

    def __init__(self, least: float, most: float) -> None:
        self.least, self.most = least, most

    def place(self, share: float) -> float:
        return BOTTOM - (BOTTOM - TOP) * (share - self.least) / (self.most - self.least)

    def draw(self, ticks: Iterable[float]) -> Iterable[str]:
        for tick in ticks:
            yield _line(LEFT, self.place(tick), RIGHT, self.place(tick), "grid")
            yield _text(LEFT - 10, self.place(tick) + 5, f"{tick:.0%}", "soft", anchor="end")


def _chart(title: str, subtitle: str, note: str, parts: Iterable[str]) -> str:
    """A picture with its ground, its finding as the title, and both themes."""
    style = _write_theme(LIGHT) + "@media (prefers-color-scheme:dark){" + _write_theme(DARK) + "}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        f'role="img" aria-labelledby="title" font-family="{FONTS}" font-size="15">\n'
        f'<title id="title">{title.replace("%", " %")}</title>\n<style>{style}.line{{fill:none}}</style>\n'
        f'<rect width="{WIDTH}" height="{HEIGHT}" class="ground"/>\n'
        + "\n".join(
            [
                _text(20, 32, title, "ink", size=18, bold=True),
                _text(20, 56, subtitle, "soft", size=14),
                *parts,
                _text(20, HEIGHT - 16, note, "soft", size=14),
            ]
        )
        + "\n</svg>\n"
    )


def _write_theme(colors: dict[str, str]) -> str:
    return "".join(f".{name}{{fill:{color}}}.{name}.line{{stroke:{color};fill:none}}" for name, color in colors.items())


def _text(
    x: float, y: float, words: str, color: str, *, anchor: str = "start", size: int = 15, bold: bool = False
) -> str:
    weight = ' font-weight="700"' if bold else ""
    words = re.sub(r"(?<=\d)%", " %", words)
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f'<text {place} class="{color}" font-size="{size}"{weight}>{words}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, color: str, *, dashes: str = "", width: float = 1) -> str:
    pattern = f' stroke-dasharray="{dashes}"' if dashes else ""
    return f'<path d="M{x1:.1f} {y1:.1f}L{x2:.1f} {y2:.1f}" class="{color} line" stroke-width="{width}"{pattern}/>'


def _bar(x: float, scale: _Scale, interval: dict[str, float], color: str, width: float) -> str:
    return _line(x, scale.place(interval["low"]), x, scale.place(interval["high"]), color, width=width)


def _dot(x: float, y: float, color: str, radius: float) -> str:
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" class="{color}"/>'


def _ring(x: float, y: float) -> str:
    place = f'cx="{x:.1f}" cy="{y:.1f}" r="5"'
    return f'<circle {place} class="ground"/><circle {place} class="orange line" stroke-width="2"/>'


def _square(x: float, y: float) -> str:
    return f'<rect x="{x - 6:.1f}" y="{y - 6:.1f}" width="12" height="12" class="soft"/>'


def main() -> int:
    """Write the charts, or check them."""
    stale = []
    for name, draw in CHARTS.items():
        path, text = PICTURES / f"{name}.svg", draw()
        if "--check" in sys.argv[1:]:
            stale += [name] if not path.exists() or path.read_text(encoding="utf-8") != text else []
        else:
            path.write_text(text, encoding="utf-8")
    if stale:
        sys.stderr.write(f"out of date: {', '.join(stale)}; run python tools/draw_charts.py\n")
    return int(bool(stale))


if __name__ == "__main__":
    sys.exit(main())
