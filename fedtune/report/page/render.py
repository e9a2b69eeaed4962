"""A report as one HTML file that needs nothing else: no script, no font of the machine, no request; as PDF; its files.

Also as a label: on one screen, for a model card, a slide or a web page, as SVG.  What it says stands in report.json,
whose SHA-256 it names, in the report's own words.
"""

from __future__ import annotations

import base64
import hashlib
import importlib
import logging
import os
import re
import warnings
from collections.abc import Mapping
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from fedtune.extras import require_extra
from fedtune.privacy.durable import write_durably
from fedtune.report import signing
from fedtune.report.derive.cells import KINDS
from fedtune.report.derive.profile import TIERS_SOURCE
from fedtune.report.facts import RunFacts
from fedtune.report.model import Report
from fedtune.report.page.catalogue import catalogue
from fedtune.report.page.report_words import Words, data, pointer
from fedtune.report.page.tables import Charts, Column
from fedtune.show.lines import shortened
from fedtune.spec import NOT_GIVEN, ConfigError
from fedtune.words import score_words, spoken

FONTS = Path(__file__).parent / "fonts"
_GROUPS = {"hipaa": "health", "ai_act": "documentation", "gpai": "documentation"}  # of fields, by how they begin
_OR_CODE = ("epsilon", "right_of_100_mechanism")  # facts that are a figure, or say why there is none
_NARROW, _WIDE = "iljtfrI.,:;|!'()[] -/", "mwMWGOQ%@—"  # letters


def render(
    report: Report, *, language: str, fillable: bool = False, notice: str = "", again_s: int | None = None
) -> str:
    """The page of a report, in "en" or "de"; equal reports give equal pages.

    Every figure on it carries its place in report.json.  Where it is `fillable`, what a person fills in on page 1 are
    fields, for `as_pdf`; otherwise they are drawn for the pen.  A `notice` stands first; with `again_s` the page loads
    itself again after so many seconds.
    """
    words = Charts(report, catalogue(language))
    files = report.facts.files if isinstance(report.facts, RunFacts) else {}
    model = next((one for one in files.items() if one[0].endswith(".safetensors")), None)
    return (
        environment()
        .get_template("report.html.j2")
        .render(
            _values(words),
            fillable=fillable,
            notice=notice,
            again_s=again_s,
            figure=words.figure,
            code=words.code,
            # By the beginning that two people compare.
            key_begins=spoken(report.signature.key[:16]) if report.signature else "",
            model=model and (model[0], spoken(model[1][:16])),
            fields_of=partial(fields_of, words),
            short=lambda name, most=28: shortened(name, most),
            banner=Markup(" ").join(words.code("banner", code) for code in report.banners),
        )
    )


def _values(words: Words) -> dict[str, Any]:
    """The values that the templates of the page and of the label both take."""
    report, language = words.report, words.catalogue.language
    of_report = {"report": report, "facts": report.facts, "digest": signing.digest(report)}
    return {**of_report, "words": words, "t": words.text, "language": language}


def css_string(text: str) -> Markup:
    """`text` as a string of a style sheet; nothing in it can end the string, the sheet or its element."""
    safe = "".join(letter if letter.isascii() and letter.isalnum() else f"\\{ord(letter):x} " for letter in text)
    return Markup(f'"{safe}"')


@lru_cache(maxsize=1)
def environment() -> Environment:
    """The templates of all pages: everything that is filled in is escaped, and a name that is not there is an error."""
    loader = FileSystemLoader(Path(__file__).parent / "templates")
    made = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    made.globals["font"] = lambda name: base64.b64encode((FONTS / f"{name}.woff2").read_bytes()).decode()
    made.globals |= {"css_string": css_string, "pointer": pointer, "parts": data(), "tiers_source": TIERS_SOURCE}
    made.globals |= {"spoken": score_words, "plain": _plain, "short": _short, "wrapped": _wrapped, "said_in": _said_in}
    made.globals["below"] = lambda size: round(1.3 * size)
    return made


def write_files(
    folder: Path, report: Report, *, language: str, pdf: bool = False, beside: Mapping[str, bytes] = {}
) -> list[Path]:
    """Write a report's files, and what lies `beside` them, by name; each is whole at any moment."""
    html = render(report, language=language).encode()
    files = {"report.json": signing.to_text(report).encode(), "report.html": html}
    if pdf:
        files["report.pdf"] = as_pdf(render(report, language=language, fillable=True))
    files |= beside
    try:
        for name, content in files.items():
            write_durably(folder / name, content)
    except OSError as error:
        raise ConfigError("--output", str(folder), f"must be a folder that can be written ({error.strerror})") from None
    return [folder / name for name in files]


def as_pdf(html: str) -> bytes:
    """`html`, a page of `render`, as tagged PDF; equal pages give equal bytes on one machine, and nothing is fetched.

    A ConfigError says that WeasyPrint, or a library of the system that it needs, is not installed.
    """
    weasyprint = _weasyprint()
    # It tells of each rule of the style sheet that is for screens only.
    logging.getLogger("weasyprint").setLevel(logging.ERROR)
    fetcher = weasyprint.urls.URLFetcher(allowed_protocols={"data"})  # the page's own fonts
    document = weasyprint.HTML(string=html, base_url=None, url_fetcher=fetcher)
    identifier = hashlib.sha256(html.encode()).digest()[:16]
    before = os.environ.get("SOURCE_DATE_EPOCH")
    # Without HarfBuzz's library for subsets, fontTools writes the time into each font, unless this says another.
    os.environ["SOURCE_DATE_EPOCH"] = "0"
    try:
        return bytes(document.write_pdf(pdf_identifier=identifier, pdf_tags=True, pdf_forms=True))
    finally:
        del os.environ["SOURCE_DATE_EPOCH"]
        if before is not None:
            os.environ["SOURCE_DATE_EPOCH"] = before


def _weasyprint() -> Any:
    require_extra("--pdf", NOT_GIVEN, "pdf", "weasyprint")
    try:
        with warnings.catch_warnings():
            # It makes the same pages without that library, and only says that a later version will not.
            warnings.filterwarnings("ignore", "HarfBuzz-Subset", DeprecationWarning)
            warnings.filterwarnings("ignore", "No fonts configured", UserWarning)  # a page carries its own
            importlib.import_module("weasyprint.urls")
            return importlib.import_module("weasyprint")
    except OSError as error:  # the package is there, a library of the system is not
        bound = f"needs Pango (on Debian: apt-get install libpango-1.0-0 libpangoft2-1.0-0): {error}"
        raise ConfigError("--pdf", NOT_GIVEN, bound) from None


def fields_of(words: Charts, group: str) -> list[Mapping[str, Any]]:
    """The fields of a group, in the report's order: the name of each, and its cells, `known` or `open` for the site.

    A cell is its state and its facts, each with what it is called and what it says.
    """
    found: list[Mapping[str, Any]] = []
    for code, states in words.report.cells.items():
        if group != next((other for prefix, other in _GROUPS.items() if code.startswith(prefix)), "impact"):
            continue
        cells: dict[str, list[dict[str, Any]]] = {"known": [], "open": []}
        for state, facts in states.items():
            # Of two bounds on one figure the page names the better one, here as on page 1.
            by_method = isinstance(facts.get("right_of_100_mechanism"), float)
            worse = "right_of_100_ceiling" if by_method else "right_of_100_mechanism"
            row, shown = pointer("cells", code, state), []
            for key, value in facts.items():
                kind = "code:value" if key in _OR_CODE and isinstance(value, str) else KINDS.get(key, "text")
                said = Markup("") if value is None else words.cell(row, Column(f"fact.{key}", key, kind))
                shown += [(words.code("fact", key), said)] if key != worse else []
            cells["open" if state == "site" else "known"].append({"state": state, "facts": shown})
        found.append({"name": words.code("field", code), **cells})
    return found


def as_svg(report: Report, *, language: str) -> str:
    """The label as SVG that loads nothing; equal reports give equal labels."""
    words = Words(report, catalogue(language))
    limits = [words.text("label.shared")] if words.shared and words.promises else []
    limits += [words.code("not_protected", code) for code in report.not_protected]
    return (
        environment()
        .get_template("label.svg.j2")
        .render(
            _values(words),
            figure=words.catalogue.figure,
            reasons=Markup(" ").join(words.code("reason", code) for code in report.verdict.reasons),
            data=report.known.get("dataset"),
            limits=Markup("; ").join(limits),
        )
    )


def as_svg_of_own(site: str, run: str) -> str:
    """The label of a site's own adapter, in English as its card: it has no guarantee, and so no figure."""
    return environment().get_template("own_label.svg.j2").render(language="en", site=site, run=run)


def _short(name: str, most: int = 32) -> str:
    """A name that fits a line of a label."""
    return shortened(name, most)


def _said_in(marks: str) -> Markup:
    """The text of a label's lines, for people who cannot see the label."""
    return Markup(" ".join(re.findall("<text [^>]*>([^<]*)</text>", marks)))


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
