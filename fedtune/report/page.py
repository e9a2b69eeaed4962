"""A report as one HTML file that needs nothing else: no script, no font, no request."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from fedtune.report.catalogue import catalogue
from fedtune.report.charts import Charts
from fedtune.report.fields import Fields
from fedtune.report.model import Report
from fedtune.report.page_one import COLUMNS, PageOne
from fedtune.report.signing import to_text
from fedtune.report.tables import Tables
from fedtune.report.words import Words, pointer, shortened

_TEMPLATES = Path(__file__).parent / "templates"
_LONGEST_NAME = 28  # in the running footer, and within a sentence
_LONGEST_TITLE = 40


def render(report: Report, *, language: str) -> str:
    """The page of a report, in "en" or "de"; equal reports give equal pages.

    Every figure on it carries its place in report.json.

    Raises:
        ConfigError: there are no texts in this language.
    """
    words = Words(report, catalogue(language))
    tables = Tables(words)
    digest = hashlib.sha256(to_text(report).encode()).hexdigest()
    footer = words.text("page.footer", name=shortened(report.name, _LONGEST_NAME), digest=digest)
    return (
        environment()
        .get_template("report.html.j2")
        .render(
            language=language,
            report=report,
            words=words,
            t=words.text,
            figure=words.figure,
            code=words.code,
            tables=tables,
            charts=Charts(words, tables),
            one=PageOne(words),
            fields=Fields(words),
            columns=COLUMNS,
            pointer=pointer,
            title=words.text("page.title", name=shortened(report.name, _LONGEST_TITLE)),
            short=lambda name: shortened(name, _LONGEST_NAME),
            digest=digest,
            footer=css_string(footer.unescape()),
        )
    )


def css_string(text: str) -> Markup:
    """`text` as a string of a style sheet; nothing in it can end the string, the sheet or its element."""
    safe = "".join(letter if letter.isascii() and letter.isalnum() else f"\\{ord(letter):x} " for letter in text)
    return Markup(f'"{safe}"')


@lru_cache(maxsize=1)
def environment() -> Environment:
    """The templates of all pages: everything that is filled in is escaped, and a name that is not there is an error."""
    return Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
