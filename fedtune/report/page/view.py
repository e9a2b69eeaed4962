"""The wording of a report in one language, and JSON pointers to its values."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Hashable, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from markupsafe import Markup

from fedtune.federation.drift import FELL
from fedtune.formatting import convert_none_to_infinite
from fedtune.model.spec import NO_ADAPTER
from fedtune.report import model
from fedtune.report.derive.dpia_fields import format_rank
from fedtune.report.derive.profile import BANDS, find_strength_band
from fedtune.report.derive.verdicts import WORST_FIRST, explain_missing_room, find_report_outcome
from fedtune.report.facts import CohortFigures, LedgerFacts
from fedtune.report.model import Assumption, Report
from fedtune.report.page.translations import MAX_RIGHT, Catalog
from fedtune.show.budget_text import ArrivalRange, merge_adjacent_ranges
from fedtune.show.drawing import MAX_LINES
from fedtune.show.lines import shorten_middle

One = TypeVar("One")
_LONGEST_IN_CHART = 18
_MAX_ASSUMPTIONS = 4
_HIDDEN = {"well": 60, "moderately": 80, "poorly": 95, "hardly": 100}  # word -> largest number of right guesses of 100
_SAYS_NOTHING = 99  # right guesses of 100, above which a bound from (epsilon, delta) alone is uninformative
_RESULT = {"no_noise": 1, "seeded": 2, "noised": 2}  # column for the other site's result after subtracting one's own
_MAX_FOR_SUBTRACTION = 2
format_row_count = Markup('<span class="rows">{}</span>').format


class Words:
    """A report together with the text catalog of its display language."""

    def __init__(self, report: Report, catalog: Catalog) -> None:
        facts = report.facts
        self.report, self.facts, self.is_ledger = report, facts, facts.kind == "ledger"
        self.catalog = catalog.override_texts(f"by_{facts.unit}").override_texts(f"where_{self.noise}")
        self.text, self.code, self.listed = self.catalog.text, self.catalog.code, self.catalog.listed
        self.json = model.to_json(report)
        self.room, self.result = explain_missing_room(report), find_report_outcome(report)
        self.promises = report.verdict.state != "no_guarantee" and report.epsilon is not None
        self.band = find_strength_band(report.epsilon if self.promises else None)
        # Whether several sites added the noise jointly, under secure aggregation.
        self.shared = any(one.shared for site in report.sites for one in site.mechanisms)
        # A ledger's budget figures by arrival cohort; () if all people share one budget.
        life = report.sites[0].lifetime
        self.cohorts: tuple[CohortFigures, ...] = (life and life.cohorts) or ()
        self.delta_at = "/facts/delta" if isinstance(facts, LedgerFacts) else "/facts/plan/delta"
        self.audit, self.attacks = (None, None) if isinstance(facts, LedgerFacts) else (facts.audit, facts.attacks)
        at_most = [] if isinstance(facts, LedgerFacts) else [facts.is_upper_bound(site) for site in facts.sites]
        self.silent = {f"/sites/{n}" for n, is_so in enumerate(at_most) if is_so}
        spent = {f"/sites/{n}": (one.spent.epsilon, one.spent.epsilon_pld) for n, one in enumerate(report.sites)}
        losses = {site: tuple(map(convert_none_to_infinite, both)) for site, both in spent.items()}
        # The site with the report's epsilon; among several, the first with a signed final receipt.
        self.worst = max(losses, key=lambda site: (losses[site], site not in self.silent))
        states = {f"/sites/{n}": WORST_FIRST.index(one.verdict.state) for n, one in enumerate(report.sites)}
        # Sites in order of verdict and epsilon, the worst site first.
        self.sites = sorted(losses, key=lambda site: (states[site], *(-loss for loss in losses[site])))

    @property
    def noise(self) -> str:
        """The kind of noise: "noised", "seeded", or "no_noise" if any mechanism had no noise."""
        noises = [one.noise_multiplier for site in self.report.sites for one in site.mechanisms]
        if 0 in noises or "no_noise" in self.report.verdict.reasons:
            return "no_noise"
        return "seeded" if self.facts.seeded_noise else "noised"

    @property
    def is_limited_by_period(self) -> bool:
        """Whether a ledger's cap per period allows fewer typical runs now than its lifetime cap."""
        life = self.report.sites[0].lifetime
        return life is not None and life.reference_remaining_runs != life.reference_runs_in_lifetime

    @property
    def findings(self) -> tuple[str, ...]:
        """The codes of all warnings about scores, including the sites' noised scores."""
        drop = self.report.utility and self.report.utility.score_drop
        found = () if isinstance(self.facts, LedgerFacts) else self.facts.findings
        return (*found, *((FELL,) if drop and drop.significant else ()))

    @property
    def without_base(self) -> bool:
        """Whether every run trained a head without a base model."""
        return {*str(self.report.known.get("rank")).split(", ")} == {format_rank(NO_ADAPTER, 0)}

    def band_range(self, band: str) -> Markup:
        """Describe the epsilon range of a strength band."""
        least, most = (f"{edge:g}" for edge in BANDS[band])
        key = "up_to" if band == "strong" else "above" if band == "weak" else "between"
        return self.text(f"strength.{key}", least=least, most=most)

    def at(self, pointer: str, *, absent: object = None) -> Any:
        """Return the value at a JSON pointer into report.json, or `absent` if one of its parents is null."""
        found: Any = self.json
        for part in pointer.split("/")[1:]:
            if found is None:
                return absent
            found = found[int(part) if isinstance(found, list) else get_pointer_name(part)]
        return found

    def place(self, kind: str, site: str) -> str:
        """Return the JSON pointer to a section of a site's data: "sites", "facts", "own" or "life", as in page.toml."""
        if self.is_ledger:
            return {"sites": site, "facts": "/facts", "own": "/facts", "life": f"{site}/lifetime"}[kind]
        facts, own = f"/facts{site}", f"/facts{site}/statement"
        return {"sites": site, "facts": facts, "own": own, "life": f"{own}/lifetime"}[kind]

    def get_site_pointer(self, pointer: str) -> str:
        """Return the pointer to the site that contains `pointer`."""
        return self.sites[0] if self.is_ledger else f"/sites/{pointer.removeprefix('/facts').split('/')[2]}"

    def together(self, sites: Sequence[str], *, of: int) -> Markup:
        """Label a chart line that several sites with equal values share; `of` is the total number of sites."""
        name = shorten_middle(self.at(f"{sites[0]}/site"), _LONGEST_IN_CHART)
        if len(sites) == 1:
            return Markup("{}").format(name)
        if len(sites) == of:
            return self.text("chart.all_alike", sites=format_row_count(of))
        return self.text("chart.some_alike", name=name, others=format_row_count(len(sites) - 1))

    @property
    def drawn(self) -> dict[int, str]:
        """Index -> date range of each cohort that a chart shows: the newest cohorts with a nonzero epsilon."""
        spent = [place for place, one in enumerate(self.cohorts) if one.epsilon != 0][-MAX_LINES:]
        return {place: self.cohorts[place].people.dates for place in spent}

    def figure(self, pointer: str, kind: str) -> Markup:
        """Format the figure at a JSON pointer as a `<data>` element with its exact value and its pointer."""
        value = self.at(pointer)
        element = Markup('<data value="{}" data-at="{}" data-as="{}">{}</data>')
        return element.format(json.dumps(value), pointer, kind, self.catalog.figure(value, kind))

    def spent(self, pointer: str, kind: str = "epsilon") -> Markup:
        """Format a figure of a site's charges, with "at most" if the site has not signed a final receipt."""
        figure = self.figure(pointer, kind)
        if self.get_site_pointer(pointer) not in self.silent:
            return figure
        return Markup("<span>{}</span>").format(self.text("word.at_most", figure=figure))

    def rows(self, of: str) -> list[str]:
        """Expand a row pattern of page.toml to the JSON pointers of a table's rows."""
        if " and " in of:
            return [row for one in of.split(" and ") for row in self.rows(one)]
        of, _, having = of.partition(" having ")
        start, *parts = of.split("/")
        found = [start and self.worst] if start in ("", "worst") else [self.place(start, site) for site in self.sites]
        for part in parts:
            entries = {one: self._list_entry_names(one) if part == "*" else [part] for one in found}
            found = [f"{one}/{entry}" for one, several in entries.items() for entry in several]
        return [row for row in found if not having or self.at(f"{row}/{having}") is not None]

    def _list_entry_names(self, at: str) -> list[str]:
        """Return the last pointer part of each entry in a list or mapping."""
        found = self.at(at) or ()
        return [pointer(name)[1:] for name in (found if isinstance(found, dict) else range(len(found)))]

    # Texts of page 1.

    def access(self) -> Mapping[str, Sequence[str]]:
        """Return observer -> a code for each column of the table of what observers can see."""
        noise, rows = self.noise, load_page_layout()["access"]
        masked = rows["masked"] if self.shared and noise == "noised" else {}
        sees = {who: list(codes) for who, codes in {**rows["noised"], **rows[noise], **masked}.items()}
        if how := self.by_subtraction():
            sees["other_sites"][_RESULT[noise]] = how
        return sees

    def by_subtraction(self) -> str | None:
        """Return the code for how one of two sites can compute the other site's result from the average; None if it
        cannot.
        """
        if isinstance(self.facts, LedgerFacts):
            return "if_two_sites"  # a ledger does not record the other sites of its runs
        rounds = self.facts.rounds
        took_part = [len(self.report.sites), *(len(one.sites) for one in rounds if one.sites)]
        return "by_subtraction" if min(took_part) <= _MAX_FOR_SUBTRACTION else None

    def limit(self) -> str | None:
        """Return the JSON pointer to the limit for the report's epsilon; None if there is no limit."""
        found = "/facts/approved/max_epsilon" if self.is_ledger else "/facts/target_epsilon"
        return None if self.at(found) is None else found

    def assumptions(self) -> tuple[Assumption, ...]:
        """Return all violated assumptions, and as many unconfirmed ones as page 1 has room to ask about.

        Assumptions with an `if_not` text come first.
        Without a guarantee no question is asked, because no answer could change the result.
        """
        found = self.report.assumptions
        violated = [one for one in found if one.status == "violated"]
        asked = [one for one in found if one.status == "assumed" and self.catalog.has("question", one.code)]
        asked.sort(key=lambda one: not self.catalog.has("if_not", one.code))
        room = max(0, _MAX_ASSUMPTIONS - len(violated)) if self.promises else 0
        return (*violated, *asked[:room])

    def right(self, site: str) -> str:
        """Return which bound on membership guesses applies at a site: "mechanism" if it was computed, otherwise
        "ceiling".
        """
        by_mechanism = f"{site}/meaning/correct_of_100_mechanism"
        return "ceiling" if self.at(by_mechanism) is None else "mechanism"

    def has_no_useful_bound(self, site: str) -> bool:
        """Whether the bound on membership guesses at a site is too close to 100 to be informative."""
        found: float = self.at(f"{site}/meaning/correct_of_100_{self.right(site)}")
        return found > (_SAYS_NOTHING if self.right(site) == "ceiling" else MAX_RIGHT)

    @property
    def shows_figure(self) -> bool:
        """Whether page 1 shows the bound on membership guesses at the worst site."""
        return self.promises and bool(self.at(f"{self.worst}/meaning")) and not self.has_no_useful_bound(self.worst)

    def describe_protection(self) -> Markup:
        """Describe in words how well one record or person of the worst site is protected, and how well five are."""
        means = f"{self.worst}/meaning/correct_of_100_"
        found = (self.at(means + which) for which in (self.right(self.worst), "for_5"))
        one, five = (next(word for word, most in _HIDDEN.items() if right <= most) for right in found)
        return self.text("hidden.answer", one=self.text(f"hidden.{one}"), five=self.text(f"hidden.{five}"))

    def list_unprotected(self) -> list[str]:
        """Return the codes of information that the guarantee never protects, for the list on page 1."""
        return [code for code in load_page_layout()["limits"]["first"] if code in self.report.not_protected]

    def explain_ceiling(self, site: str) -> Markup:
        """Explain why only the bound from epsilon and delta is available at a site."""
        runs = {row["run"] for row in self.at(f"{site}/mechanisms") if row["rounds"]}
        key = "meaning.several_runs" if len(runs) > 1 else "meaning.open_end"
        key = "meaning.too_little_noise" if self.right(site) == "mechanism" else key
        return self.text(key, section=self.text("curve.heading"))

    def people(self) -> list[tuple[Markup, str]]:
        """List the groups of people with equal figures, the newest last, each with the JSON pointer to its figures."""
        whom = Markup('<span data-at="{}">{}</span>').format
        if admitted := self.report.admits:
            return [(whom("/admits", self.catalog.arrivals([admitted])), f"{self.worst}/spent")]
        figures, lines = [(one.epsilon, one.with_reserved, one.remaining_epsilon) for one in self.cohorts], []
        for places in group_by_key(zip(figures, range(len(figures)), strict=True)):
            at = f"/sites/0/lifetime/cohorts/{places[0]}"
            lines.append((whom(f"{at}/people", self.catalog.arrivals(self._merge_arrivals(places))), at))
        return lines[-MAX_LINES:]

    def _merge_arrivals(self, places: Sequence[int]) -> list[ArrivalRange]:
        return merge_adjacent_ranges({place: self.cohorts[place].people for place in places})

    def describe_most_exposed_unit(self) -> Markup | None:
        """Describe when the people with the largest epsilon joined; None if all people have the same epsilon."""
        epsilons = {place: convert_none_to_infinite(one.epsilon) for place, one in enumerate(self.cohorts)}
        if admitted := self.report.admits:
            return self.text("label.others_none", dates=admitted.dates)
        if len(set(epsilons.values())) < 2:
            return None
        most = self._merge_arrivals([place for place, one in epsilons.items() if one == max(epsilons.values())])
        return self.text("label.others_less", dates=", ".join(one.dates for one in most))


def pointer(*parts: str | int) -> str:
    """Build a JSON pointer (RFC 6901) from its parts."""
    return "".join("/" + str(part).replace("~", "~0").replace("/", "~1") for part in parts)


def get_pointer_name(pointer: str) -> str:
    """Return the unescaped last part of a JSON pointer."""
    return pointer.rpartition("/")[2].replace("~1", "/").replace("~0", "~")


def group_by_key(keyed: Iterable[tuple[Hashable, One]]) -> list[list[One]]:
    """Group values by their key, in order of first occurrence."""
    groups: dict[Hashable, list[One]] = {}
    for key, one in keyed:
        groups.setdefault(key, []).append(one)
    return list(groups.values())


@cache
def load_page_layout() -> Mapping[str, Any]:
    """Load the page's layout from `page.toml`."""
    return tomllib.loads(Path(__file__).with_name("page.toml").read_text(encoding="utf-8"))
