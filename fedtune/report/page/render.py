"""A report as one HTML file that needs nothing else: no script, no font of the machine, no request; as PDF; its files.

What page 1 says beyond single figures is here, too, and how cells are grouped to fields.
"""

from __future__ import annotations

import base64
import hashlib
import importlib
import logging
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from fedtune.privacy.durable import write_durably
from fedtune.report import signing
from fedtune.report.derive.cells import CODES, NUMBERS
from fedtune.report.derive.profile import TIERS_SOURCE
from fedtune.report.derive.verdicts import room_of
from fedtune.report.model import Assumption, Report
from fedtune.report.page.catalogue import MOST_RIGHT, catalogue
from fedtune.report.page.report_words import Words, pointer
from fedtune.report.page.tables import Charts, Tables, data, in_groups
from fedtune.show.budget_text import Arrivals, neighbours_together
from fedtune.show.drawing import MOST_LINES
from fedtune.spec import NOT_GIVEN, ConfigError
from fedtune.words import score_words, shortened, unbounded

TEMPLATES = FileSystemLoader(Path(__file__).parent / "templates")
FONTS = Path(__file__).parent / "fonts"
_LONGEST_NAME = 28  # in the running footer, and within a sentence
_LONGEST_TITLE = 40
_LONGEST_PURPOSE = 90
_MOST_ASSUMPTIONS = 4
_SAYS_NOTHING = 99
"""Right guesses of 100, above which a limit from epsilon and delta alone is no news to anybody."""
_RESULT = {"no_noise": 1, "seeded": 2, "noised": 2}
"""The column of the result that a site is left with when it takes its own from all combined."""
_MOST_FOR_SUBTRACTION = 2
Group = Literal["impact", "health", "documentation"]
_GROUPS: tuple[tuple[str, Group], ...] = (("hipaa", "health"), ("ai_act", "documentation"), ("gpai", "documentation"))
_RIGHT_GUESSES = ("right_of_100_ceiling", "right_of_100_mechanism", "singling_out_bound", "linkability_bound")
_SCORES = ("scores_before", "scores_final")
_NUMBER = re.compile(r"(?<!\S)\d+(?:\.\d+)?(?:e-?\d+)?$")
AGAIN_S = 15
"""After this time a page of a run that goes on loads itself again."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Unfinished:
    """What a page says of a run that is not at its end.

    Attributes:
        done: rounds, of `planned` ones.
        goes_on: a process works on the run.
        written: in ISO form.
    """

    done: int
    planned: int
    goes_on: bool
    written: str


def render(report: Report, *, language: str, fillable: bool = False, unfinished: Unfinished | None = None) -> str:
    """The page of a report, in "en" or "de"; equal reports give equal pages.

    Every figure on it carries its place in report.json.  Where it is `fillable`, what a person fills in on page 1 are
    fields, for `as_pdf`; otherwise they are drawn for the pen.  A page of an `unfinished` run says so, and loads itself
    again while the run goes on.

    Raises:
        ConfigError: there are no texts in this language.
    """
    words = Words(report, catalogue(language))
    tables = Tables(words)
    digest = hashlib.sha256(signing.to_text(report).encode()).hexdigest()
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
        tables=tables,
        charts=Charts(words, tables),
        key_digest=signing.digest_of_key(report.signature.key) if report.signature else "",
        one=PageOne(words),
        fields=Fields(words),
        columns=data()["access"]["columns"],
        pointer=pointer,
        sections=data()["section"],
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


def write_files(folder: Path, report: Report, *, language: str, pdf: bool = False) -> list[Path]:
    """Write a report's files; each is whole at any moment.

    Raises:
        ConfigError: there is no such language, what makes a PDF is not installed, or the folder cannot be written.
    """
    html = render(report, language=language)
    files = {"report.json": signing.to_text(report).encode(), "report.html": html.encode()}
    if pdf:
        files["report.pdf"] = as_pdf(render(report, language=language, fillable=True))
    return write_all(folder, files)


def write_all(folder: Path, files: Mapping[str, bytes]) -> list[Path]:
    """Write files, by name, into a folder; each is whole at any moment.

    Raises:
        ConfigError: the folder cannot be written.
    """
    try:
        for name, data in files.items():
            write_durably(folder / name, data)
    except OSError as error:
        raise ConfigError("--output", str(folder), f"must be a folder that can be written ({error.strerror})") from None
    return [folder / name for name in files]


def as_pdf(html: str) -> bytes:
    """`html`, a page of `render`, as tagged PDF; equal pages give equal bytes on one machine.

    Nothing is fetched: what a page names outside itself is left out.

    Raises:
        ConfigError: WeasyPrint is not installed, or a library of the system that it needs.
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
        os.environ |= {} if before is None else {"SOURCE_DATE_EPOCH": before}


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


class PageOne:
    """Of one report; every word and figure comes from elsewhere."""

    def __init__(self, words: Words) -> None:
        self._words = words

    def access(self) -> Mapping[str, Sequence[str]]:
        """Who -> a code for each column of what there is to see."""
        noise = self._words.noise
        rows = data()["access"]
        masked = rows["masked"] if self._words.shared and noise == "noised" else {}
        sees = {who: list(codes) for who, codes in {**rows["noised"], **rows[noise], **masked}.items()}
        if how := self.by_subtraction():
            sees["other_sites"][_RESULT[noise]] = how
        return sees

    def by_subtraction(self) -> str | None:
        """How one of two sites sees the other's result: it takes its own from the average of both; None: it cannot."""
        report = self._words.report
        if report.kind == "ledger":
            return "if_two_sites"  # of its runs the ledger knows no others that took part
        rounds = report.utility.rounds if report.utility else ()
        took_part = [len(report.sites), *(len(one.sites) for one in rounds if one.sites)]
        return "by_subtraction" if min(took_part) <= _MOST_FOR_SUBTRACTION else None

    def largest_failures(self) -> str | None:
        """Pointer to the site that expects most failures of the promise."""
        sites = [f"/sites/{place}" for place in range(len(self._words.report.sites))]
        failures = {site: self._words.at(f"{site}/meaning/expected_failures") for site in sites}
        return max((site for site in sites if failures[site] is not None), key=failures.__getitem__, default=None)

    def heading(self) -> Markup:
        """The result, or that a budget that is kept has no room for more."""
        report = self._words.report
        return self._words.code("verdict", room_of(report) or f"{report.verdict.state}_{report.kind}")

    def state(self) -> str:
        """Code of how the result looks."""
        return room_of(self._words.report) or self._words.report.verdict.state

    def is_full(self) -> bool:
        """Whether a site's own limit has to be raised before anything more can be spent."""
        report = self._words.report
        return room_of(report) in ("used_up", "no_run_fits") or "above_lifetime_cap" in report.verdict.reasons

    def purpose(self) -> str:
        """Of the training, as far as a line has room."""
        whole = self._words.report.provenance.purpose or ""
        cut = whole[:_LONGEST_PURPOSE].rpartition(" ")[0] or whole[:_LONGEST_PURPOSE]
        return whole if len(whole) <= _LONGEST_PURPOSE else f"{cut}…"

    def limit(self) -> str | None:
        """Pointer to the limit that the result is judged by; None: there is none."""
        is_run, worst = self._words.report.kind == "run", self._words.worst
        found = "/target_epsilon" if is_run else f"{worst}/approved/max_epsilon"
        return found if worst and self._words.at(found) is not None else None

    def assumptions(self) -> tuple[Assumption, ...]:
        """All violated ones, and of those that nobody has stated as many as page 1 has room to ask for.

        Where nothing is promised, nobody's answer could change that.
        """
        found = self._words.report.assumptions
        violated = [one for one in found if one.status == "violated"]
        asked = [one for one in found if one.status == "assumed" and self._words.catalogue.has("question", one.code)]
        room = max(0, _MOST_ASSUMPTIONS - len(violated)) if self._words.promises else 0
        return (*violated, *asked[:room])

    def to_do(self) -> Markup:
        """What the officer who reads the page must do next."""
        report = self._words.report
        first = ["violated"] if any(one.status == "violated" for one in report.assumptions) else []
        full = {"closed": "closed", "used_up": "full", "no_run_fits": "full"}.get(room_of(report) or "")
        then = full or (report.kind if report.verdict.state == "within" else report.verdict.state)
        return Markup(" ").join(self._words.text(f"verdict.to_do_{code}") for code in (*first, then))

    def limits(self, *, several: bool) -> list[str]:
        """What is not protected that an officer must know; `several`: figures tell of several records already."""
        first = set(data()["limits"]["first"]) - ({"several_records"} if several else set())
        return [limit for limit in self._words.report.not_protected if limit in first]

    def right(self, site: str) -> str:
        """Which figure of the best attacker at a site holds: of the method that ran, else from epsilon and delta."""
        by_mechanism = f"{site}/meaning/right_of_100_mechanism"
        return "ceiling" if self._words.at(by_mechanism) is None else "mechanism"

    def says_nothing(self, site: str) -> bool:
        """Whether all that is proved of the best attacker at a site is about what nothing would be."""
        found: float = self._words.at(f"{site}/meaning/right_of_100_{self.right(site)}")
        return found > (_SAYS_NOTHING if self.right(site) == "ceiling" else MOST_RIGHT)

    def about_ceiling(self, site: str) -> Markup:
        """Why no more is proved of the best attacker than what follows from epsilon and delta."""
        runs = {row["run"] for row in self._words.at(f"{site}/mechanisms") if row["rounds"]}
        key = "meaning.several_runs" if len(runs) > 1 else "meaning.open_end"
        if self.right(site) == "mechanism":
            key = "meaning.too_little_noise"
        return self._words.text(key, section=self._words.text("curve.heading"))

    def cohorts(self) -> list[tuple[Markup, str]]:
        """Who spent how much, by when they came: a line for all with the same figures, the newest last; and where."""
        words, whom = self._words, Markup('<span data-at="{}">{}</span>').format
        if (admitted := words.report.admits) and words.worst:
            return [(whom("/admits", words.catalogue.arrivals([admitted])), f"{words.worst}/spent")]
        figures = {place: (one.epsilon, one.with_set_aside, one.left) for place, one in enumerate(words.cohorts)}
        lines = []
        for places in in_groups((figure, place) for place, figure in figures.items()):
            at = f"/sites/0/lifetime/cohorts/{places[0]}"
            lines.append((whom(f"{at}/people", words.catalogue.arrivals(self._people(places))), at))
        return lines[-MOST_LINES:]

    def _people(self, places: Sequence[int]) -> list[Arrivals]:
        return neighbours_together({place: self._words.cohorts[place].people for place in places})

    def of_whom(self) -> Markup | None:
        """When the people came whom the largest figure is of; None: it is of everybody."""
        epsilons = {place: unbounded(one.epsilon) for place, one in enumerate(self._words.cohorts)}
        if admitted := self._words.report.admits:
            return self._words.text("label.others_none", dates=admitted.dates)
        if len(set(epsilons.values())) < 2:
            return None
        most = self._people([place for place, one in epsilons.items() if one == max(epsilons.values())])
        return self._words.text("label.others_less", dates=", ".join(one.dates for one in most))

    def triggers(self) -> list[Markup]:
        """When somebody should look at this again."""
        text, runs = self._words.text, "/sites/0/lifetime/reference_runs_left"
        attack = ["attack"] if self._words.promises else []
        if self._words.report.kind == "run":
            return [text(f"again.{code}") for code in ("next_run", "other_use", *attack, "date")]
        left = [text("again.runs_left", runs=self._words.figure(runs, "count"))] if self._words.at(runs) else []
        return [*left, *(text(f"again.{code}") for code in ("limit", *attack, "date"))]


class Part(NamedTuple):
    """The cell of one state: its facts, each with what it is called and what it says."""

    state: str
    facts: tuple[tuple[Markup, Markup], ...]


class Field(NamedTuple):
    """All cells of one code: `known` to fedtune, or that it should have known, and `open` for somebody at the site."""

    name: Markup
    known: list[Part]
    open: list[Part]


class Fields:
    """The fields of one report."""

    def __init__(self, words: Words) -> None:
        self._words = words

    def of(self, group: Group) -> list[Field]:
        """The fields of a group, in the report's order."""
        found: dict[str, Field] = {}
        for place, cell in enumerate(self._words.report.cells):
            if group == next((other for prefix, other in _GROUPS if cell.code.startswith(prefix)), "impact"):
                # Of two bounds on one figure the page names the better one, here as on page 1.
                by_method = _NUMBER.fullmatch(cell.facts.get("right_of_100_mechanism", ""))
                shown = [key for key in cell.facts if key != "right_of_100_ceiling" or not by_method]
                shown = [key for key in shown if key != "right_of_100_mechanism" or by_method]
                facts = tuple((self._words.code("fact", key), self._value(place, key)) for key in shown)
                field = found.setdefault(cell.code, Field(self._words.code("field", cell.code), [], []))
                (field.open if cell.state == "site" else field.known).append(Part(cell.state, facts))
        return list(found.values())

    def _value(self, place: int, key: str) -> Markup:
        """What a fact says: codes in words, numbers in the language's way, names as they are."""
        where = pointer("cells", place, "facts", key)
        value = self._words.at(where)
        if not value:
            return Markup("")
        if key == "date":
            return self._words.figure(where, "moment")
        section = CODES.get(key)
        tokens = [self._token(section, key, token) for token in value.split(", ")]
        separator = "; " if section == "not_protected" else ", "
        return Markup('<span data-at="{}" data-as="fact">{}</span>').format(where, Markup(separator).join(tokens))

    def _token(self, section: str | None, key: str, token: str) -> Markup:
        if section and self._words.catalogue.has(section, token):
            return self._words.code(section, token)
        if key in _RIGHT_GUESSES:
            return Markup("{}").format(self._words.catalogue.figure(float(token), "of_100"))
        if key in _SCORES:
            name, _, score = token.rpartition(" ")
            token = f"{score_words(name)} {score}"
        digits = self._words.catalogue.digits
        return Markup("{}").format(_NUMBER.sub(lambda found: digits(found[0]), token) if key in NUMBERS else token)
