"""Rendering of a report as HTML, PDF and SVG; the HTML file is self-contained, without scripts, system fonts or
requests.

The SVG is a privacy label that fits on one screen, for a model card, a slide or a web page. It uses the report's
wording, and contains the SHA-256 of its report.json.
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
from fedtune.formatting import format_score_name, group_hex
from fedtune.privacy.durable import write_durably
from fedtune.report import signing
from fedtune.report.attacks import FILE, PAGE, RunAttacks, findings_to_json, format_table_cells
from fedtune.report.derive.dpia_fields import KINDS
from fedtune.report.derive.profile import TIERS_SOURCE
from fedtune.report.facts import RunFacts, Value
from fedtune.report.model import Report
from fedtune.report.page.tables import Charts, TableColumn
from fedtune.report.page.translations import load_catalog
from fedtune.report.page.view import Words, load_page_layout, pointer
from fedtune.show.lines import shorten_middle
from fedtune.spec import NOT_GIVEN, ConfigError

FONTS = Path(__file__).parent / "fonts"
_GROUPS = {"hipaa": "health", "ai_act": "documentation", "gpai": "documentation"}  # prefix of a field -> its group
# facts whose value is a figure, or the code of a reason for its absence
_OR_CODE = ("epsilon", "correct_of_100_mechanism")
_NARROW, _WIDE = "iljtfrI.,:;|!'()[] -/", "mwMWGOQ%@—"  # narrow and wide characters


def render(report: Report, *, language: str, fillable: bool = False) -> str:
    """Render the page of a report in "en" or "de"; equal reports give equal pages.

    Every figure on the page has a pointer to its value in report.json.

    Args:
        report: the report.
        language: "en" or "de".
        fillable: whether page 1 has form fields, for `convert_to_pdf`, instead of blank lines.
    """
    model = find_model_file(report)
    return _render_page(
        "report.html.j2",
        Charts(report, load_catalog(language)),
        fillable=fillable,
        # The first digits are enough for two people to compare.
        key_begins=group_hex(report.signature.key[:16]) if report.signature else "",
        model=model and (model[0], group_hex(model[1][:16])),
    )


def render_live(
    report: Report, *, language: str, planned: int, written: str, seconds: float | None, again_s: int | None
) -> str:
    """Render the page of a run in progress, with its state, two charts and a table of sites, but without a verdict.

    Args:
        report: the report after at least one finished round.
        language: "en" or "de".
        planned: the planned number of rounds.
        written: the current time, formatted in the page's language.
        seconds: the expected duration of a round in seconds; None: unknown.
        again_s: seconds after which the page reloads itself; None: the run has stopped.
    """
    words = Charts(report, load_catalog(language))
    of_run = {"planned": planned, "written": written, "seconds": seconds, "again_s": again_s}
    return _render_page("live.html.j2", words, fillable=False, **of_run)


def _render_page(template: str, words: Charts, **values: Any) -> str:
    banner = Markup(" ").join(words.code("banner", code) for code in words.report.banners)
    functions = {"figure": words.figure, "fields_of": partial(list_fields, words)}
    functions["short"] = lambda name, most=28: shorten_middle(name, most)
    return _render(template, words, banner=banner, **functions, **values)


def find_model_file(report: Report) -> tuple[str, str] | None:
    """Return the name and SHA-256 of the finished model's weights file; None: the report lists no such file."""
    files = report.facts.files if isinstance(report.facts, RunFacts) else {}
    return next((one for one in files.items() if one[0].endswith(".safetensors")), None)


def _render(template: str, words: Words, **values: Any) -> str:
    """Render a template with the variables that pages and labels share, and with `values`."""
    report = words.report
    values |= {"report": report, "facts": report.facts, "digest": signing.compute_report_digest(report)}
    values["verify"] = signing.format_verify_command(report)
    values |= {"words": words, "t": words.text, "code": words.code, "language": words.catalog.language}
    return create_template_environment().get_template(template).render(values)


def quote_css_string(text: str) -> Markup:
    """Quote `text` as a CSS string, escaped so that it cannot close the string, the style sheet or its element."""
    safe = "".join(letter if letter.isascii() and letter.isalnum() else f"\\{ord(letter):x} " for letter in text)
    return Markup(f'"{safe}"')


@lru_cache(maxsize=1)
def create_template_environment() -> Environment:
    """Return the shared Jinja environment, which escapes all values and raises an error for undefined names."""
    loader = FileSystemLoader(Path(__file__).parent / "templates")
    made = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    made.globals |= {
        "font": lambda name: base64.b64encode((FONTS / f"{name}.woff2").read_bytes()).decode(),
        "quote_css_string": quote_css_string,
        "pointer": pointer,
        "parts": load_page_layout(),
        "tiers_source": TIERS_SOURCE,
        "format_score_name": format_score_name,
        "plain": _to_printable_text,
        "short": shorten_middle,
        "wrapped": _wrap_label_text,
        # the texts of SVG elements, as a description for screen readers
        "said_in": lambda marks: Markup(" ".join(re.findall("<text [^>]*>([^<]*)</text>", marks))),
        "below": lambda size: round(1.3 * size),
    }
    return made


def write_files(
    folder: Path, report: Report, *, language: str, pdf: bool = False, beside: Mapping[str, bytes] = {}
) -> list[Path]:
    """Write a report's files and the files in `beside` (name -> content), as `write_all` does; return their paths."""
    html = render(report, language=language).encode()
    files = {"report.json": signing.encode_report(report), "report.html": html}
    if pdf:
        files["report.pdf"] = convert_to_pdf(render(report, language=language, fillable=True))
    return write_all(folder, {**files, **beside})


def write_all(folder: Path, files: Mapping[str, bytes]) -> list[Path]:
    """Write files (name -> content) into a folder, each of them atomically; return their paths.

    Raises:
        ConfigError: the folder is not writable.
    """
    try:
        for name, content in files.items():
            write_durably(folder / name, content)
    except OSError as error:
        raise ConfigError("output", str(folder), f"is not writable ({error.strerror}): choose another folder") from None
    return [folder / name for name in files]


def write_attacks(folder: Path, found: RunAttacks) -> list[Path]:
    """Write `attack.json` and the self-contained page `attack.html` into a run folder; return their paths."""
    html = create_template_environment().get_template("attacks.html.j2").render(found=found, cells=format_table_cells)
    return write_all(folder, {FILE: findings_to_json(found), PAGE: html.encode()})


def convert_to_pdf(html: str) -> bytes:
    """Convert a page from `render` to a tagged PDF without network access; equal pages give equal bytes on one machine.

    Raises:
        ConfigError: WeasyPrint, or a system library on which it depends, is not installed.
    """
    weasyprint = _import_weasyprint()
    # WeasyPrint warns about every CSS rule that only applies to screens.
    logging.getLogger("weasyprint").setLevel(logging.ERROR)
    fetcher = weasyprint.urls.URLFetcher(allowed_protocols={"data"})  # the page's own fonts
    document = weasyprint.HTML(string=html, base_url=None, url_fetcher=fetcher)
    identifier = hashlib.sha256(html.encode()).digest()[:16]
    before = os.environ.get("SOURCE_DATE_EPOCH")
    # Without HarfBuzz's subsetter, fontTools writes the current time into each font unless this variable is set.
    os.environ["SOURCE_DATE_EPOCH"] = "0"
    try:
        return bytes(document.write_pdf(pdf_identifier=identifier, pdf_tags=True, pdf_forms=True))
    finally:
        del os.environ["SOURCE_DATE_EPOCH"]
        if before is not None:
            os.environ["SOURCE_DATE_EPOCH"] = before


def _import_weasyprint() -> Any:
    require_extra("pdf", NOT_GIVEN, "pdf", "weasyprint")
    try:
        with warnings.catch_warnings():
            # The pages are the same without HarfBuzz-Subset; WeasyPrint only warns that it will be required later.
            warnings.filterwarnings("ignore", "HarfBuzz-Subset", DeprecationWarning)
            warnings.filterwarnings("ignore", "No fonts configured", UserWarning)  # a page carries its own
            importlib.import_module("weasyprint.urls")
            return importlib.import_module("weasyprint")
    except OSError as error:  # the package is installed, but a system library is missing
        bound = f"requires Pango (on Debian: apt-get install libpango-1.0-0 libpangoft2-1.0-0): {error}"
        raise ConfigError("pdf", NOT_GIVEN, bound) from None


def list_fields(words: Charts, group: str) -> list[Mapping[str, Any]]:
    """List the fields of a group in the report's order: name, `known` cells, and `open` cells for the site to fill in.

    A cell has a state and a list of facts, each with its label and its text.
    """
    found: list[Mapping[str, Any]] = []
    for code, states in words.report.cells.items():
        if group != next((other for prefix, other in _GROUPS.items() if code.startswith(prefix)), "impact"):
            continue
        cells: dict[str, list[dict[str, Any]]] = {"known": [], "open": []}
        for state, facts in states.items():
            # The page shows only the tighter of the two bounds, as on page 1.
            by_method = isinstance(facts.get("correct_of_100_mechanism"), float)
            worse = "correct_of_100_ceiling" if by_method else "correct_of_100_mechanism"
            row, shown = pointer("cells", code, state), []
            for key, value in facts.items():
                said = Markup("") if value is None else format_fact(words, row, key, value)
                shown += [(words.code("fact", key), said)] if key != worse else []
            cells["open" if state == "site" else "known"].append({"state": state, "facts": shown})
        found.append({"name": words.code("field", code), **cells})
    return found


def format_fact(words: Charts, row: str, key: str, value: Value) -> Markup:
    """Format the value of a fact for the cell at the JSON pointer `row`."""
    kind = "code:value" if key in _OR_CODE and isinstance(value, str) else KINDS.get(key, "text")
    return words.cell(row, TableColumn(f"fact.{key}", key, kind))


def render_label(report: Report, *, language: str) -> str:
    """Render the privacy label as SVG without external resources; equal reports give equal labels."""
    words = Words(report, load_catalog(language))
    model = find_model_file(report)
    limits = [words.text("label.shared")] if words.shared and words.promises else []
    limits += [words.code("not_protected", code) for code in report.not_protected]
    return _render(
        "label.svg.j2",
        words,
        figure=words.catalog.figure,
        model=model and group_hex(model[1][:16]),
        reasons=Markup(" ").join(words.code("reason", code) for code in report.verdict.reasons),
        data=report.known.get("dataset"),
        limits=Markup("; ").join(limits),
    )


def render_personalized_label(site: str, run: str) -> str:
    """Render the label of a site's personalized adapter, in English like its card, without a guarantee or figures."""
    return create_template_environment().get_template("own_label.svg.j2").render(language="en", site=site, run=run)


def _wrap_label_text(text: str, size: float, width: float, *, font: str = "plain", most: int = 8) -> list[str]:
    """Wrap a text into at most `most` lines of the given width, with an ellipsis if it is longer."""
    lines: list[str] = []
    size *= 1.12 if font == "bold" else 1.0
    for word in _to_printable_text(text).split(" "):
        longer = f"{lines[-1]} {word}" if lines else word
        each = (0.3 if one in _NARROW else 0.88 if one in _WIDE else 0.7 if one.isupper() else 0.56 for one in longer)
        if lines and sum(each) * size <= width:  # a rough upper estimate of the line's width
            lines[-1] = longer
        else:
            lines.append(word)
    return [*lines[: most - 1], f"{lines[most - 1]} …"] if len(lines) > most else lines


def _to_printable_text(text: str) -> str:
    """Replace non-printable characters by spaces and remove soft hyphens."""
    unescaped = text.unescape() if isinstance(text, Markup) else text
    return "".join(letter if letter.isprintable() else " " for letter in unescaped).replace("\N{SOFT HYPHEN}", "")
