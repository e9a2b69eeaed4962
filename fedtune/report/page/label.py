"""A report on one screen, for a model card, a slide or a web page, as SVG.

What it says stands in report.json, whose SHA-256 it names, in the report's own words.  A drawing is a list of boxes
and texts in units of 1200 x 675.
"""

from __future__ import annotations

from markupsafe import Markup, escape

from fedtune.report import signing
from fedtune.report.model import Report
from fedtune.report.page.catalogue import catalogue
from fedtune.report.page.report_words import Words
from fedtune.words import shortened

_WIDTH, _HEIGHT, _MARGIN = 1200, 675, 44
_INK, _SOFT, _RULE, _BLUE, _RED, _PAPER = "#1a1a1a", "#555555", "#c4c4c4", "#0b3d66", "#8f1d00", "#ffffff"
_LEFT, _RIGHT = 580, 640  # where the left column ends, and where the right one begins
_NAME_LETTERS, _VALUE_LETTERS = 32, 44
_FAMILY = "'Helvetica Neue', Arial, 'Liberation Sans', 'DejaVu Sans Condensed', sans-serif"
_MONO = "'Liberation Mono', 'DejaVu Sans Mono', Consolas, monospace"
_NARROW, _WIDE = "iljtfrI.,:;|!'()[] -/", "mwMWGOQ%@—"


class _Drawing:
    """Boxes and lines of text, from the back to the front."""

    def __init__(self) -> None:
        self.marks, self.said = list[str](), list[str]()
        self.box(0, 0, _WIDTH, _HEIGHT, _PAPER)

    def box(self, x: float, y: float, width: float, height: float, fill: str) -> None:
        """A filled rectangle."""
        self.marks.append(f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" fill="{fill}"/>')

    def line(
        self, text: str, x: float, y: float, size: float, *, fill: str = _INK, font: str = "plain", at: str = "start"
    ) -> None:
        """A line of text, whose letters stand on `y`; `at` its "start" or "end"."""
        family = f' font-family="{_MONO}"' if font == "mono" else ' font-weight="700"' if font == "bold" else ""
        anchor = f' text-anchor="{at}"' if at != "start" else ""
        place = f'x="{x:g}" y="{y:g}" font-size="{size:g}" fill="{fill}"'
        self.marks.append(f"<text {place}{family}{anchor}>{escape(text)}</text>")
        self.said.append(text)

    def text(
        self, text: str, x: float, y: float, size: float, *, width: float, most: int = 8, font: str = "plain"
    ) -> float:
        """A text in lines, below each other, and where the last one stands; what does not fit ends in dots."""
        lines = _wrapped(text, size, width, font=font)
        below = round(1.3 * size)
        for place, line in enumerate(lines[:most]):
            end = " …" if place == most - 1 and len(lines) > most else ""
            self.line(line + end, x, y + place * below, size, font=font)
        return y + (min(len(lines), most) - 1) * below

    def svg(self, title: Markup, *, language: str) -> str:
        """The whole, with a title and what it says for who cannot see it."""
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" lang="{language}"'
            f' aria-labelledby="label-title label-desc" font-family="{_FAMILY}">'
            f'<title id="label-title">{title}</title><desc id="label-desc">{escape(" ".join(self.said))}</desc>\n'
            + "\n".join(self.marks)
            + "\n</svg>\n"
        )


def as_svg(report: Report, *, language: str) -> str:
    """The label as SVG that loads nothing; equal reports give equal labels."""
    words, drawing = Words(report, catalogue(language)), _Drawing()
    text = words.text
    drawing.box(0, 0, _WIDTH, 104, _BLUE if report.verdict.state == "within" else _RED)
    drawing.line(_plain(text("label.heading")), _MARGIN, 40, 19, fill=_PAPER)
    drawing.line(_shown(report.name, _NAME_LETTERS), _MARGIN, 80, 34, fill=_PAPER, font="bold")
    lines = _wrapped(_plain(words.heading()), 21, 440, font="bold")
    for y, said in enumerate(lines, 1 - len(lines)):
        drawing.line(said, _WIDTH - _MARGIN, 80 + 27 * y, 21, fill=_PAPER, font="bold", at="end")
    if report.banners:
        drawing.box(0, 104, _WIDTH, 42, "#f7e3dc")
    first, size = (131, 17) if len(report.banners) == 1 else (121, 13)
    for place, code in enumerate(report.banners):
        drawing.line(_plain(words.code("banner", code)), _MARGIN, first + 18 * place, size, fill=_RED, font="bold")
    _promise(drawing, words)
    _facts(drawing, words)
    top, width = 556, _WIDTH - 2 * _MARGIN
    drawing.box(0, top - 26, _WIDTH, _HEIGHT - top + 26, "#f3f3f1")
    drawing.line(_plain(text("limits.heading")), _MARGIN, top, 18, font="bold")
    limits = [text("label.shared")] if words.shared and words.promises else []
    limits += [words.code("not_protected", code) for code in report.not_protected]
    drawing.text("; ".join(map(_plain, limits)), _MARGIN, top + 21, 13.5, width=width, most=4)
    drawing.line(_plain(text("label.check")), _MARGIN, _HEIGHT - 16, 15, fill=_SOFT)
    drawing.line(signing.digest(report), _WIDTH - _MARGIN, _HEIGHT - 16, 15, font="mono", at="end")
    return drawing.svg(text("label.title", name=_shown(report.name, _NAME_LETTERS)), language=language)


def as_svg_of_own(site: str, run: str) -> str:
    """The label of a site's own adapter, in English as its card: it has no guarantee, and so no figure."""
    said, drawing = f"Private to {_shown(site, _NAME_LETTERS)}: no guarantee", _Drawing()
    about = (
        "It was trained on the site's own records without noise, from the final adapter of the run. No differential "
        "privacy protects those records here: whoever holds it may learn about them. It stays at that site, and no run "
        "begins in it. Records of other sites are protected as the run's own label says."
    )
    drawing.box(0, 0, _WIDTH, 104, _RED)
    drawing.line("PRIVACY LABEL OF A SITE'S OWN ADAPTER", _MARGIN, 40, 19, fill=_PAPER)
    drawing.line(_shown(run, _NAME_LETTERS), _MARGIN, 80, 34, fill=_PAPER, font="bold")
    drawing.text(said, _MARGIN, 200, 36, width=_WIDTH - 2 * _MARGIN, font="bold")
    drawing.text(about, _MARGIN, 330, 26, width=_WIDTH - 2 * _MARGIN)
    return drawing.svg(escape(said), language="en")


def _promise(drawing: _Drawing, words: Words) -> None:
    """The one figure, large, and the promise in a sentence."""
    report, worst, text, figure = words.report, words.worst, words.text, words.catalogue.figure
    width = _LEFT - _MARGIN
    if not words.promises or worst is None or words.at(f"{worst}/meaning") is None:
        reasons = " ".join(_plain(words.code("reason", code)) for code in report.verdict.reasons)
        last = drawing.text(_plain(text("promise.none")), _MARGIN, 186, 26, width=width, font="bold")
        drawing.text(reasons, _MARGIN, last + 54, 19, width=width)
        return
    delta = figure(report.delta, "exact")
    promise = text(f"promise.{report.unit}", factor=figure(report.epsilon, "factor"), delta=delta)
    if words.says_nothing(worst):
        last = drawing.text(_plain(promise), _MARGIN, 186, 22, width=width, font="bold")
        drawing.text(_plain(words.about_ceiling(worst)), _MARGIN, last + 40, 17, width=width, most=4)
        return
    right = figure(words.at(f"{worst}/meaning/right_of_100_{words.right(worst)}"), "of_100")
    drawing.line(right, _MARGIN, 222, 84, font="bold")
    last = drawing.text(_plain(text("label.guesses")), _MARGIN, 268, 21, width=width, most=4)
    promise += " " + text("promise.average")
    if report.verdict.state == "within":
        promise += " " + text("verdict.no_approval")
    drawing.text(_plain(promise), _MARGIN, last + 54, 17, width=width, most=6)


def _facts(drawing: _Drawing, words: Words) -> None:
    """Data and unit, the method, and how much of the limit is used, a line each."""
    report, figure, text = words.report, words.catalogue.figure, words.text
    data = next((cell.facts["dataset"] for cell in report.cells if cell.facts.get("dataset")), None)
    epsilon: str = figure(report.epsilon, "epsilon") if words.promises else text("word.unbounded")
    if limit := words.limit():
        epsilon = text(f"label.of_limit_{report.kind}", used=epsilon, limit=figure(words.at(limit), "cap"))
    band = words.band_range(words.band) if words.promises else ""
    said = {
        "label.data": shortened(data, _VALUE_LETTERS) if data else text("word.unknown"),
        "label.unit": words.code("unit", report.unit),
        "label.epsilon": epsilon,
        "label.people": words.of_whom(),
        "setting.delta": figure(report.delta, "exact"),
        "label.strength": _plain(words.code("strength", words.band)) + (f" ({_plain(band)})" if band else ""),
        "label.mechanism": text("label.mechanism_text"),
        "label.sites": figure(len(report.sites), "count"),
        "label.date": figure(report.date, "day") if report.date else None,
    }
    rows = {key: value for key, value in said.items() if value is not None}
    y, width = 172.0, _WIDTH - _MARGIN - _RIGHT
    for number, (key, value) in enumerate(rows.items()):
        if number:
            drawing.box(_RIGHT, y - 27, width, 1, _RULE)
        drawing.line(_plain(text(key)), _RIGHT, y, 17, fill=_SOFT)
        lines = _wrapped(_plain(value), 19, width - 170, font="bold")
        for place, line in enumerate(lines):
            drawing.line(line, _RIGHT + 170, y + 24 * place, 19, font="bold")
        y += 24 * len(lines) + (15 if len(rows) < 9 else 10)


def _wrapped(text: str, size: float, width: float, *, font: str) -> list[str]:
    """Lines that fit a width."""
    lines: list[str] = []
    size *= 1.12 if font == "bold" else 1.0
    for word in text.split(" "):
        longer = f"{lines[-1]} {word}" if lines else word
        each = (0.3 if one in _NARROW else 0.88 if one in _WIDE else 0.7 if one.isupper() else 0.56 for one in longer)
        if lines and sum(each) * size <= width:  # about, and rather too wide
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def _plain(text: Markup | str) -> str:
    """A text of the catalogue, or a name in it, as letters that can be drawn in one line."""
    unescaped = text.unescape() if isinstance(text, Markup) else text
    return "".join(letter if letter.isprintable() else " " for letter in unescaped).replace("\N{SOFT HYPHEN}", "")


def _shown(name: str, most: int) -> str:
    return _plain(shortened(name, most))
