"""A report on one screen, for a model card, a slide or a web page, as SVG by a template.

What it says stands in report.json, whose SHA-256 it names, in the report's own words.
"""

from __future__ import annotations

import re

from markupsafe import Markup

from fedtune.report import signing
from fedtune.report.model import Report
from fedtune.report.page.catalogue import catalogue
from fedtune.report.page.render import environment
from fedtune.report.page.report_words import Words
from fedtune.words import shortened

_NARROW, _WIDE = "iljtfrI.,:;|!'()[] -/", "mwMWGOQ%@—"


def as_svg(report: Report, *, language: str) -> str:
    """The label as SVG that loads nothing; equal reports give equal labels."""
    words = Words(report, catalogue(language))
    limits = [words.text("label.shared")] if words.shared and words.promises else []
    limits += [words.code("not_protected", code) for code in report.not_protected]
    return _drawn(
        "label.svg.j2",
        language=language,
        report=report,
        words=words,
        t=words.text,
        figure=words.catalogue.figure,
        reasons=Markup(" ").join(words.code("reason", code) for code in report.verdict.reasons),
        data=next((cell.facts["dataset"] for cell in report.cells if cell.facts.get("dataset")), None),
        limits=Markup("; ").join(limits),
        digest=signing.digest(report),
    )


def as_svg_of_own(site: str, run: str) -> str:
    """The label of a site's own adapter, in English as its card: it has no guarantee, and so no figure."""
    return _drawn("own_label.svg.j2", language="en", site=site, run=run)


def _drawn(file: str, **values: object) -> str:
    """A label by its template; what its lines say is said again for who cannot see it."""
    template = environment().get_template(file)
    return template.render(
        plain=_plain,
        short=lambda name, most=32: shortened(name, most),
        wrapped=_wrapped,
        below=lambda size: round(1.3 * size),
        said_in=lambda marks: Markup(" ".join(re.findall("<text [^>]*>([^<]*)</text>", marks))),
        **values,
    )


def _wrapped(text: str, size: float, width: float, *, font: str = "plain", most: int = 8) -> list[str]:
    """Lines that fit a width; what does not fit into as many as there may be ends in dots."""
    lines: list[str] = []
    size *= 1.12 if font == "bold" else 1.0
    for word in _plain(text).split(" "):
        longer = f"{lines[-1]} {word}" if lines else word
        each = (0.3 if one in _NARROW else 0.88 if one in _WIDE else 0.7 if one.isupper() else 0.56 for one in longer)
        if lines and sum(each) * size <= width:  # about, and rather too wide
            lines[-1] = longer
        else:
            lines.append(word)
    return [*lines[: most - 1], f"{lines[most - 1]} …"] if len(lines) > most else lines


def _plain(text: str) -> str:
    """A text of the catalogue, or a name in it, as letters that can be drawn in one line."""
    unescaped = text.unescape() if isinstance(text, Markup) else text
    return "".join(letter if letter.isprintable() else " " for letter in unescaped).replace("\N{SOFT HYPHEN}", "")
