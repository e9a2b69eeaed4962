"""A report on one screen, for a model card, a slide or a web page, as SVG.

What it says stands in report.json, whose SHA-256 it names, in the report's own words.  A drawing is a list of boxes
and texts in units of 1200 x 675.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from fedtune.report import signing
from fedtune.report.model import Report
from fedtune.report.page.catalogue import catalogue
from fedtune.report.page.report_words import Words
from fedtune.words import shortened

_WIDTH, _HEIGHT, _MARGIN = 1200, 675, 44
_INK, _SOFT, _RULE, _BLUE, _RED, _PAPER = "#1a1a1a", "#555555", "#c4c4c4", "#0b3d66", "#8f1d00", "#ffffff"
_LEFT, _RIGHT = 580, 640
"""Where the left column ends, and where the right one begins."""
_NAME_LETTERS, _VALUE_LETTERS = 32, 44
_FAMILY = "'Helvetica Neue', Arial, 'Liberation Sans', 'DejaVu Sans Condensed', sans-serif"
_MONO = "'Liberation Mono', 'DejaVu Sans Mono', Consolas, monospace"
_NARROW, _WIDE = "iljtfrI.,:;|!'()[] -/", "mwMWGOQ%@—"


@dataclass(frozen=True, kw_only=True, slots=True)
class _Text:
    """A line of text, whose letters stand on `y`."""

    x: float
    y: float
    text: str
    size: float
    fill: str = _INK
    font: str = "plain"
    anchor: str = "start"


@dataclass(frozen=True, slots=True)
class _Box:
    """A filled rectangle."""

    x: float
    y: float
    width: float
    height: float
    fill: str


_Mark = _Text | _Box


def as_svg(report: Report, *, language: str) -> str:
    """The label as SVG that loads nothing; equal reports give equal labels."""
    words = Words(report, catalogue(language))
    title = words.text("label.title", name=_shown(report.name, _NAME_LETTERS))
    # From its back to its front.
    marks = [_Box(0, 0, _WIDTH, _HEIGHT, _PAPER), *_head(words), *_promise(words), *_facts(words), *_foot(words)]
    return _svg(marks, title=title, language=language)


def as_svg_of_own(site: str, run: str) -> str:
    """The label of a site's own adapter, in English as its card: it has no guarantee, and so no figure."""
    name, head = _shown(site, _NAME_LETTERS), _shown(run, _NAME_LETTERS)
    about = (
        "It was trained on the site's own records without noise, from the final adapter of the run. No differential "
        "privacy protects those records here: whoever holds it may learn about them. It stays at that site, and no run "
        "begins in it. Records of other sites are protected as the run's own label says."
    )
    marks: list[_Mark] = [_Box(0, 0, _WIDTH, _HEIGHT, _PAPER), _Box(0, 0, _WIDTH, 104, _RED)]
    marks += [_Text(x=_MARGIN, y=40, text="PRIVACY LABEL OF A SITE'S OWN ADAPTER", size=19, fill=_PAPER)]
    marks += [_Text(x=_MARGIN, y=80, text=head, size=34, fill=_PAPER, font="bold")]
    for text, y, size, font in ((f"Private to {name}: no guarantee", 200, 36, "bold"), (about, 330, 26, "plain")):
        marks += _lines(text, x=_MARGIN, y=y, size=size, width=_WIDTH - 2 * _MARGIN, most=8, font=font)
    return _svg(marks, title=escape(f"Private to {name}: no guarantee"), language="en")


def _svg(marks: Sequence[_Mark], *, title: Markup, language: str) -> str:
    said = " ".join(mark.text for mark in marks if isinstance(mark, _Text))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" lang="{language}"'
        f' aria-labelledby="label-title label-desc" font-family="{_FAMILY}">'
        f'<title id="label-title">{title}</title><desc id="label-desc">{escape(said)}</desc>\n'
        + "\n".join(map(_drawn, marks))
        + "\n</svg>\n"
    )


def _drawn(mark: _Mark) -> str:
    if isinstance(mark, _Box):
        size = f'width="{mark.width:g}" height="{mark.height:g}"'
        return f'<rect x="{mark.x:g}" y="{mark.y:g}" {size} fill="{mark.fill}"/>'
    family = f' font-family="{_MONO}"' if mark.font == "mono" else ' font-weight="700"' if mark.font == "bold" else ""
    anchor = f' text-anchor="{mark.anchor}"' if mark.anchor != "start" else ""
    place = f'x="{mark.x:g}" y="{mark.y:g}" font-size="{mark.size:g}" fill="{mark.fill}"'
    return f"<text {place}{family}{anchor}>{escape(mark.text)}</text>"


def _head(words: Words) -> Iterator[_Mark]:
    report, text = words.report, words.text
    yield _Box(0, 0, _WIDTH, 104, _BLUE if report.verdict.state == "within" else _RED)
    yield _Text(x=_MARGIN, y=40, text=_plain(text("label.heading")), size=19, fill=_PAPER)
    yield _Text(x=_MARGIN, y=80, text=_shown(report.name, _NAME_LETTERS), size=34, fill=_PAPER, font="bold")
    lines = _wrapped(_plain(words.heading()), 21, 440, font="bold")
    for line, said in enumerate(lines):
        y = 80 - 27 * (len(lines) - 1 - line)
        yield _Text(x=_WIDTH - _MARGIN, y=y, text=said, size=21, fill=_PAPER, font="bold", anchor="end")
    if report.banners:
        yield _Box(0, 104, _WIDTH, 42, "#f7e3dc")
    size = 17 if len(report.banners) == 1 else 13
    for line, code in enumerate(report.banners):
        y = 131 if len(report.banners) == 1 else 121 + 18 * line
        yield _Text(x=_MARGIN, y=y, text=_plain(words.code("banner", code)), size=size, fill=_RED, font="bold")


def _promise(words: Words) -> Iterator[_Mark]:
    """The one figure, large, and the promise in a sentence."""
    report, worst, text = words.report, words.worst, words.text
    top = 172.0
    if not words.promises or worst is None or words.at(f"{worst}/meaning") is None:
        reasons = " ".join(_plain(words.code("reason", code)) for code in report.verdict.reasons)
        for said in _wrapped(_plain(text("promise.none")), 26, _LEFT - _MARGIN, font="bold"):
            yield _Text(x=_MARGIN, y=top + 14, text=said, size=26, font="bold")
            top += 34
        yield from _lines(reasons, x=_MARGIN, y=top + 34, size=19, width=_LEFT - _MARGIN, most=8)
        return
    width = _LEFT - _MARGIN
    factor = words.catalogue.figure(report.epsilon, "factor")
    promise = text(f"promise.{report.unit}", factor=factor, delta=words.catalogue.figure(report.delta, "exact"))
    if words.says_nothing(worst):
        lines = list(_lines(_plain(promise), x=_MARGIN, y=top + 14, size=22, width=width, most=8, font="bold"))
        yield from lines
        said = _plain(words.about_ceiling(worst))
        yield from _lines(said, x=_MARGIN, y=lines[-1].y + 40, size=17, width=width, most=4)
        return
    right = words.catalogue.figure(words.at(f"{worst}/meaning/right_of_100_{words.right(worst)}"), "of_100")
    yield _Text(x=_MARGIN, y=top + 50, text=right, size=84, font="bold")
    about = list(_lines(_plain(text("label.guesses")), x=_MARGIN, y=top + 96, size=21, width=width, most=4))
    yield from about
    promise += " " + text("promise.average")
    if report.verdict.state == "within":
        promise += " " + text("verdict.no_approval")
    yield from _lines(_plain(promise), x=_MARGIN, y=about[-1].y + 54, size=17, width=width, most=6)


def _facts(words: Words) -> Iterator[_Mark]:
    """What was protected, how, and how much of the limit is used, a line each."""
    y, rows = 172.0, list(_rows(words))
    for number, (name, value) in enumerate(rows):
        if number:
            yield _Box(_RIGHT, y - 27, _WIDTH - _MARGIN - _RIGHT, 1, _RULE)
        yield _Text(x=_RIGHT, y=y, text=name, size=17, fill=_SOFT)
        lines = _wrapped(value, 19, _WIDTH - _MARGIN - _RIGHT - 170, font="bold")
        for place, line in enumerate(lines):
            yield _Text(x=_RIGHT + 170, y=y + 24 * place, text=line, size=19, font="bold")
        y += 24 * len(lines) + (15 if len(rows) < 9 else 10)


def _rows(words: Words) -> Iterator[tuple[str, str]]:
    report, figure, text = words.report, words.catalogue.figure, words.text
    known = next((cell.facts["dataset"] for cell in report.cells if cell.facts.get("dataset")), None)
    limit = words.limit()
    used = figure(report.epsilon, "epsilon") if words.promises else str(text("word.unbounded"))
    epsilon = text(f"label.of_limit_{report.kind}", used=used, limit=figure(words.at(limit), "cap")) if limit else used
    yield _plain(text("label.data")), _shown(known, _VALUE_LETTERS) if known else _plain(text("word.unknown"))
    yield _plain(text("label.unit")), _plain(words.code("unit", report.unit))
    yield _plain(text("label.epsilon")), _plain(epsilon)
    if whom := words.of_whom():
        yield _plain(text("label.people")), _plain(whom)
    yield _plain(text("setting.delta")), figure(report.delta, "exact")
    band = words.band_range(words.band) if words.promises else ""
    strength = _plain(words.code("strength", words.band)) + (f" ({_plain(band)})" if band else "")
    yield _plain(text("label.strength")), strength
    yield _plain(text("label.mechanism")), _plain(text("label.mechanism_text"))
    yield _plain(text("label.sites")), figure(len(report.sites), "count")
    if report.date:
        yield _plain(text("label.date")), figure(report.date, "day")


def _foot(words: Words) -> Iterator[_Mark]:
    report, top = words.report, 556.0
    yield _Box(0, top - 26, _WIDTH, _HEIGHT - top + 26, "#f3f3f1")
    yield _Text(x=_MARGIN, y=top, text=_plain(words.text("limits.heading")), size=18, font="bold")
    limits = [words.text("label.shared")] if words.shared and words.promises else []
    limits += [words.code("not_protected", code) for code in report.not_protected]
    yield from _lines(
        "; ".join(map(_plain, limits)), x=_MARGIN, y=top + 21, size=13.5, width=_WIDTH - 2 * _MARGIN, most=4
    )
    digest = hashlib.sha256(signing.to_text(report).encode()).hexdigest()
    yield _Text(x=_MARGIN, y=_HEIGHT - 16, text=_plain(words.text("label.check")), size=15, fill=_SOFT)
    yield _Text(x=_WIDTH - _MARGIN, y=_HEIGHT - 16, text=digest, size=15, font="mono", anchor="end")


def _lines(
    text: str, *, x: float, y: float, size: float, width: float, most: int, font: str = "plain"
) -> Iterator[_Text]:
    """A text in lines, below each other; what does not fit ends in dots."""
    lines = _wrapped(text, size, width, font=font)
    for place, line in enumerate(lines[:most]):
        end = " …" if place == most - 1 and len(lines) > most else ""
        yield _Text(x=x, y=y + place * round(1.3 * size), text=line + end, size=size, font=font)


def _wrapped(text: str, size: float, width: float, *, font: str) -> list[str]:
    """Lines that fit a width."""
    lines: list[str] = []
    size *= 1.12 if font == "bold" else 1.0
    for word in text.split(" "):
        if lines and _length(f"{lines[-1]} {word}") * size <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def _length(text: str) -> float:
    """How wide a text is, in sizes of its font: about, and rather too wide."""
    return sum(0.3 if one in _NARROW else 0.88 if one in _WIDE else 0.7 if one.isupper() else 0.56 for one in text)


def _plain(text: Markup | str) -> str:
    """A text of the catalogue, or a name in it, as letters that can be drawn in one line."""
    unescaped = text.unescape() if isinstance(text, Markup) else text
    return "".join(letter if letter.isprintable() else " " for letter in unescaped).replace("\N{SOFT HYPHEN}", "")


def _shown(name: str, most: int) -> str:
    return _plain(shortened(name, most))
