"""A report as one HTML file that needs nothing else: no script, no font of the machine, no request; as PDF; its files.

How cells are grouped to fields is here, too.
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
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from fedtune.privacy.durable import write_durably
from fedtune.report import signing
from fedtune.report.derive.cells import CODES, NUMBERS
from fedtune.report.derive.profile import TIERS_SOURCE
from fedtune.report.model import Report
from fedtune.report.page.catalogue import catalogue
from fedtune.report.page.report_words import Words, data, pointer
from fedtune.report.page.tables import Charts
from fedtune.spec import NOT_GIVEN, ConfigError
from fedtune.words import score_words, shortened, spoken

TEMPLATES = FileSystemLoader(Path(__file__).parent / "templates")
FONTS = Path(__file__).parent / "fonts"
_LONGEST_NAME = 28  # in the running footer, and within a sentence
_LONGEST_TITLE = 40
Group = Literal["impact", "health", "documentation"]
_GROUPS: tuple[tuple[str, Group], ...] = (("hipaa", "health"), ("ai_act", "documentation"), ("gpai", "documentation"))
_RIGHT_GUESSES = ("right_of_100_ceiling", "right_of_100_mechanism", "singling_out_bound", "linkability_bound")
_SCORES = ("scores_before", "scores_final")
_NUMBER = re.compile(r"(?<!\S)\d+(?:\.\d+)?(?:e-?\d+)?$")
AGAIN_S = 15  # after this time a page of a run that goes on loads itself again


@dataclass(frozen=True, kw_only=True, slots=True)
class Unfinished:
    """A run that is not at its end, `done` so many rounds of `planned` ones; it `goes_on` if a process works on it."""

    done: int
    planned: int
    goes_on: bool
    written: str


def render(report: Report, *, language: str, fillable: bool = False, unfinished: Unfinished | None = None) -> str:
    """The page of a report, in "en" or "de"; equal reports give equal pages.

    Every figure on it carries its place in report.json.  Where it is `fillable`, what a person fills in on page 1 are
    fields, for `as_pdf`; otherwise they are drawn for the pen.  A page of an `unfinished` run says so, and loads itself
    again while the run goes on.
    """
    words = Charts(report, catalogue(language))
    digest = signing.digest(report)
    # By whose beginning two people compare the key: `printf %s KEY | sha256sum`.
    of_key = hashlib.sha256(report.signature.key.encode()).hexdigest() if report.signature else ""
    footer = words.text("page.footer", name=shortened(report.name, _LONGEST_NAME), digest=digest)
    page = environment().get_template("report.html.j2")
    return page.render(
        language=language,
        fillable=fillable,
        unfinished=unfinished,
        again_s=AGAIN_S,
        written=words.catalogue.figure(unfinished.written, "moment") if unfinished else "",
        report=report,
        words=words,
        t=words.text,
        figure=words.figure,
        code=words.code,
        spoken=score_words,
        key_digest=spoken(of_key[:16]),
        fields_of=partial(fields_of, words),
        columns=data()["access"]["columns"],
        pointer=pointer,
        sections=data()["section"],
        first_limits=data()["limits"]["first"],
        tiers_source=TIERS_SOURCE,
        title=words.text("page.title", name=shortened(report.name, _LONGEST_TITLE)),
        short=lambda name: shortened(name, _LONGEST_NAME),
        digest=digest,
        footer=css_string(footer.unescape()),
        banner=css_string(" ".join(words.code("banner", code).unescape() for code in report.banners)),
    )


def css_string(text: str) -> Markup:
    """`text` as a string of a style sheet; nothing in it can end the string, the sheet or its element."""
    safe = "".join(letter if letter.isascii() and letter.isalnum() else f"\\{ord(letter):x} " for letter in text)
    return Markup(f'"{safe}"')


@lru_cache(maxsize=1)
def environment() -> Environment:
    """The templates of all pages: everything that is filled in is escaped, and a name that is not there is an error."""
    made = Environment(
        loader=TEMPLATES, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    made.globals["font"] = lambda name: base64.b64encode((FONTS / f"{name}.woff2").read_bytes()).decode()
    return made


def write_files(
    folder: Path, report: Report, *, language: str, pdf: bool = False, beside: Mapping[str, bytes] = {}
) -> list[Path]:
    """Write a report's files, and what lies `beside` them, by name; each is whole at any moment."""
    html = render(report, language=language)
    files = {"report.json": signing.to_text(report).encode(), "report.html": html.encode()}
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
    try:
        with warnings.catch_warnings():
            # It makes the same pages without that library, and only says that a later version will not.
            warnings.filterwarnings("ignore", "HarfBuzz-Subset", DeprecationWarning)
            warnings.filterwarnings("ignore", "No fonts configured", UserWarning)  # a page carries its own
            importlib.import_module("weasyprint.urls")
            return importlib.import_module("weasyprint")
    except ImportError:
        raise ConfigError("--pdf", NOT_GIVEN, "needs WeasyPrint: pip install 'fedtune[pdf]'") from None
    except OSError as error:  # the package is there, a library of the system is not
        bound = f"needs Pango (on Debian: apt-get install libpango-1.0-0 libpangoft2-1.0-0): {error}"
        raise ConfigError("--pdf", NOT_GIVEN, bound) from None


def fields_of(words: Words, group: Group) -> list[Mapping[str, Any]]:
    """The fields of a group, in the report's order: the name of each, and its cells, `known` or `open` for the site.

    A cell is its state and its facts, each with what it is called and what it says.
    """
    found: dict[str, dict[str, Any]] = {}
    for place, cell in enumerate(words.report.cells):
        if group == next((other for prefix, other in _GROUPS if cell.code.startswith(prefix)), "impact"):
            # Of two bounds on one figure the page names the better one, here as on page 1.
            by_method = _NUMBER.fullmatch(cell.facts.get("right_of_100_mechanism", ""))
            worse = "right_of_100_ceiling" if by_method else "right_of_100_mechanism"
            facts = [(words.code("fact", key), _fact(words, place, key)) for key in cell.facts if key != worse]
            field = found.setdefault(cell.code, {"name": words.code("field", cell.code), "known": [], "open": []})
            field["open" if cell.state == "site" else "known"].append({"state": cell.state, "facts": facts})
    return list(found.values())


def _fact(words: Words, place: int, key: str) -> Markup:
    """A fact as people read it: codes in words, numbers in the language's way, names as they are."""
    where, section = pointer("cells", place, "facts", key), CODES.get(key)
    value = words.at(where)
    if not value:
        return Markup("")
    if key == "date":
        return words.figure(where, "moment")
    said: list[str] = []
    for token in value.split(", "):
        if section and words.catalogue.has(section, token):
            said.append(words.code(section, token))
        elif key in _RIGHT_GUESSES:
            said.append(words.catalogue.figure(float(token), "of_100"))
        else:
            if key in _SCORES:
                name, _, score = token.rpartition(" ")
                token = f"{score_words(name)} {score}"
            in_its_marks = _NUMBER.sub(lambda found: words.catalogue.digits(found[0]), token)
            said.append(in_its_marks if key in NUMBERS else token)
    separator = Markup("; " if section == "not_protected" else ", ")
    return Markup('<span data-at="{}" data-as="fact">{}</span>').format(where, separator.join(said))
