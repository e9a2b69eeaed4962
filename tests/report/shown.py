"""Pages of reports in many situations, and their elements, for the tests that look at them."""

from __future__ import annotations

import hashlib
import json
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache, lru_cache, partial
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import TypeAdapter

from fedtune.federation.drift import HeldOut
from fedtune.privacy.cohorts import Cohorts
from fedtune.privacy.keys import SigningKey
from fedtune.privacy.release import RECEIPT, Receipt
from fedtune.report.derive import dpia_fields
from fedtune.report.derive.verdicts import CODES
from fedtune.report.facts import BudgetVerdict, Cap, LedgerFacts, Release, RunFacts, SiteStatement
from fedtune.report.model import Assumption, EpsilonStep, Report
from fedtune.report.page import render
from fedtune.report.verify_report import derive_report, problems
from fedtune.runs.cost import Energy
from fedtune.show.budget_text import ArrivalRange
from fedtune.tasks.measures import ClassScores, Detail, ReliabilityBin

Make = Callable[..., Report]

HOSTILE = "<script>alert(1)</script>\"'&{x}{{y}}</style>]]>$\\frac{1}$"
"""A name that no policy would allow, but a file may hold."""
NAMES = (
    *("within", "exceeded", "no_guarantee", "unbounded", "upper_bound", "ledger", "by_user", "used_up"),
    *("no_run_fits", "alike", "site_reports", "wide_run", "wide_ledger", "secure", "arrivals", "admitting", "drifting"),
)
"""Of the situations that there are pages of."""
CLINIC = "northern-university-clinic"
LONG = "university-hospital-of-the-northern-region-cardiology-and-internal-medicine-of-the-year-2026-abcdefgh"


@cache
def load_report_on_file(name: str) -> Make:
    """`on_file(name)(**changes)`: the report of which reports/ has the facts; its sites sign their receipts here."""
    text = (Path(__file__).parent / "reports" / f"{name}.json").read_bytes()
    facts = TypeAdapter(RunFacts | LedgerFacts).validate_json(text, strict=True)
    return partial(replace, derive_report(sign_by_sites(facts) if isinstance(facts, RunFacts) else facts))


def make_site_key(site: str) -> SigningKey:
    return SigningKey(Ed25519PrivateKey.from_private_bytes(hashlib.sha256(site.encode()).digest()))


def sign_by_sites(facts: RunFacts, **changes: Any) -> RunFacts:
    """The facts of a run whose sites signed receipts of this run and plan, with the `changes` in each."""
    common = {"run": facts.run, "plan": facts.plan.digest(), "seeded_noise": facts.seeded_noise} | changes
    sites = (
        site if site.receipt is None else replace(site, receipt=sign_receipt(site.receipt, site.site, **common))
        for site in facts.sites
    )
    return replace(facts, sites=tuple(sites))


def sign_receipt(receipt: Receipt, signer: str, **changes: Any) -> Receipt:
    """The receipt with changes, signed with the key of a site."""
    receipt = replace(receipt, site_key=make_site_key(signer).public, **changes)
    return replace(receipt, signature=make_site_key(signer).sign(RECEIPT, receipt.encode_signed_bytes()))


def list_problem_places(report: Report) -> set[str]:
    """The places at which `report verify` finds something wrong."""
    return {problem.where for problem in problems(report)}


def require_sound(report: Report) -> Report:
    """The report, in which `report verify` finds nothing wrong."""
    assert problems(report) == []
    return report


def change_facts(report: Report, **changes: Any) -> Report:
    """The report with changed facts, and all else as it was."""
    return replace(report, facts=replace(report.facts, **changes))


def change_first_site(report: Report, **changes: Any) -> Report:
    """The report with its first site changed."""
    first, *others = report.sites
    return replace(report, sites=(replace(first, **changes), *others))


def find_assumption(report: Report, code: str) -> Assumption:
    (match,) = [item for item in report.assumptions if item.code == code]
    return match


def read_status(report: Report, code: str) -> str:
    return find_assumption(report, code).status


def fill_report(report: Report, **changes: Any) -> Report:
    """The report with every kind of code, field and assumption, as a real one has them."""
    stored = json.loads(Path(__file__).with_name("known.json").read_text())
    known = {name: tuple(fact) if isinstance(fact, list) else fact for name, fact in stored.items()}
    known["verdict"] = report.verdict.state
    tested = "fedtune 0.2.0: tests/training/test_dp_step.py"
    ensured = ("noise_in_every_step", "poisson_sampling", "unpredictable_randomness")
    verified = ["delta_below_one_over_size", "accountants_agree", "one_record_is_one_unit"]
    verified += ["every_record_names_its_person", "units_at_one_site_only"]
    supposed = (
        Assumption(code="units_at_one_site_only", status="violated", evidence="north-hospital"),
        Assumption(code="clipping_but_for_rounding", status="assumed", evidence="docs/guarantee.md"),
        Assumption(code="one_record_is_one_unit", status="assumed", evidence="unit=record"),
        Assumption(code="sites_run_their_own_software", status="asserted", evidence="tests/deployment"),
        *(Assumption(code=code, status="ensured", evidence=tested) for code in ensured),
        *(Assumption(code=code, status="verified", evidence="delta=1e-05; declared_size=1200") for code in verified),
    )
    without = () if report.facts.unit == "record" else ("several_records",)
    fields: dict[str, Any] = {
        "cells": dpia_fields.build_cells(known),
        **{kind: tuple(item for item in codes if item not in without) for kind, codes in CODES["listed"].items()},
        "covers": ("rounds_and_steps", "charged_retries", "noised_scores"),
        "released": ("updates", "noised_scores", "aggregates", "final_adapter", "refusals_and_receipts"),
        "assumptions": tuple(
            item for item in supposed if report.randomness != "none" or item.code != "unpredictable_randomness"
        ),
    }
    return replace(report, **{**fields, **changes})


@cache
def build_reports() -> dict[str, Report]:
    """By situation; page 1 is kept as golden text of all but the wide ones."""
    run, ledger = load_report_on_file("run")(), change_facts(load_report_on_file("ledger")(), simulated=True)
    exceeded = BudgetVerdict(state="exceeded", reasons=("above_target",))
    seeded = BudgetVerdict(state="no_guarantee", reasons=("seeded_noise",))
    of_study = tuple(replace(site, verdict=seeded, meaning=None) for site in run.sites)
    silent = BudgetVerdict(state="within", reasons=("site_silent",))
    unheard = (replace(run.facts.sites[0], receipt=None), *run.facts.sites[1:])
    return {
        "within": fill_report(run),
        "exceeded": change_facts(
            fill_report(change_first_site(run, verdict=exceeded), verdict=exceeded), target_epsilon=1.0
        ),
        "no_guarantee": change_facts(
            fill_report(replace(run, randomness="seeded"), verdict=seeded, sites=of_study), seeded_noise=True
        ),
        "unbounded": fill_report(
            load_report_on_file("run_without_privacy")(
                verdict=BudgetVerdict(state="no_guarantee", reasons=("no_noise",))
            )
        ),
        "upper_bound": fill_report(
            change_facts(change_first_site(run, verdict=silent, source="not_released"), sites=unheard), verdict=silent
        ),
        "ledger": fill_report(ledger),
        "by_user": count_by_user(run),
        "used_up": fill_report(use_up_room(ledger, left=0.0)),
        "no_run_fits": fill_report(use_up_room(ledger, left=0.3)),
        "no_run_now": fill_report(use_up_room(ledger, left=0.3, in_lifetime=4)),
        "cohort_full": fill_report(use_up_room(add_arrivals(ledger), left=0.0)),
        "alike": fill_report(
            change_sites(run, [1, *[0] * 32], [run.sites[1].site, *(f"clinic-{n}" for n in range(1, 33))])
        ),
        "arrivals": fill_report(add_arrivals(ledger)),
        "admitting": fill_report(add_admission(run)),
        "drifting": fill_report(add_drift(run)),
        "site_reports": fill_report(add_site_reports(run, ledger)),
        "wide_run": build_wide_run(),
        "wide_ledger": build_wide_ledger(),
        "secure": load_report_on_file("secure")(),
    }


def change_sites(run: Report, like: Sequence[int], names: Sequence[str]) -> Report:
    """The run at sites with these names, each like the one with that number."""
    sites = tuple(replace(run.sites[n], site=name) for n, name in zip(like, names, strict=True))
    facts = tuple(replace(run.facts.sites[n], site=name) for n, name in zip(like, names, strict=True))
    return change_facts(replace(run, sites=sites), sites=facts)


def add_site_reports(run: Report, ledger: Report) -> Report:
    """The run at nine sites that released reports of their own, all like that of the ledger."""
    (ledger_site,) = ledger.sites
    statement = SiteStatement(
        date="2026-03-01T09:30:00+00:00",
        same_plan=True,
        verdict=ledger_site.verdict,
        approved=ledger.facts.approved,
        lifetime=ledger_site.lifetime,
        charges=5,
        verification=None,
        releases=(),
        asserted={},
    )
    changed = change_sites(run, [0] * 9, [f"{CLINIC}-{n}" for n in range(1, 10)])
    return change_facts(changed, sites=tuple(replace(site, statement=statement) for site in changed.facts.sites))


def add_arrivals(ledger: Report) -> Report:
    """A ledger of people who come every year: each run admits those of two years, and the last one is open."""
    facts, last, runs, charges = ledger.facts, 2026, [], []
    for year in range(2022, last + 1):
        cohorts = Cohorts(period="year", first=None if year == 2022 else str(year - 1), last=str(year))
        first = facts.runs[0]
        plan = replace(first.plan, unit="user", cohorts=cohorts, num_rounds=3, noise_multiplier=2.0)
        runs.append(replace(first, run=f"triage-{year}", plan=plan, state="open" if year == last else "ended"))
        rounds = 2 if year == last else 3
        charges.append(replace(facts.charges[0], run=f"triage-{year}", rounds=rounds, day=f"{year}-02-01"))
    changed = replace(facts, unit="user", arrivals="year", runs=tuple(runs), charges=tuple(charges), releases=())
    return derive_report(changed)


def list_periods(report: Report) -> list[ArrivalRange]:
    """In which people came, of whom a report tells by themselves."""
    lives = [site.lifetime for site in report.sites if site.lifetime]
    match = [item.people for life in lives for item in life.cohorts or ()]
    return [*match, report.admits] if report.admits else match


def change_plan(run: Report, **changes: Any) -> Report:
    """The run with another plan, of which its sites signed receipts."""
    return derive_report(sign_by_sites(replace(run.facts, plan=replace(run.facts.plan, **changes))))


def add_admission(run: Report) -> Report:
    """A run that admits people of two years alone."""
    cohorts = Cohorts(period="year", first="2025", last="2026")
    return change_plan(run, unit="user", cohorts=cohorts)


def add_drift(run: Report) -> Report:
    """A run that began in another one's release, and of four runs the one that does worse at the sites."""
    plan = replace(run.facts.plan, metrics_noise_multiplier=20.0)
    means = {"spring": 0.82, "summer": 0.83, "autumn": 0.81, run.facts.name: 0.7}
    line = [HeldOut(run=name, date="2026-03-01", mean=mean, deviation=0.02) for name, mean in means.items()]
    return derive_report(sign_by_sites(replace(run.facts, plan=plan, held_out=tuple(line))))


def use_up_room(ledger: Report, *, left: float, in_lifetime: int = 0) -> Report:
    """The ledger with so much spent that no reference run fits now; `in_lifetime` still fit under the lifetime cap."""
    (site,) = ledger.sites
    fits = {"reference_remaining_runs": 0, "reference_runs_in_lifetime": in_lifetime}
    lifetime = replace(site.lifetime, remaining_epsilon=left, with_reserved=6.0 - left, **fits)
    return change_first_site(ledger, lifetime=lifetime)


def count_by_user(run: Report) -> Report:
    """The same run with people for rows."""
    code, evidence = "every_record_names_its_person", "unit=user; docs/user_level.md"
    people = Assumption(code=code, status="assumed", evidence=evidence)
    rows = [tuple(replace(item, records_per_user=8) for item in site.mechanisms) for site in run.sites]
    sites = tuple(replace(site, mechanisms=row) for site, row in zip(run.sites, rows, strict=True))
    plan = replace(run.facts.plan, unit="user", records_per_user=8)
    report = fill_report(change_facts(replace(run, sites=sites), plan=plan))
    supposed = (people if item.code == "one_record_is_one_unit" else item for item in report.assumptions)
    return replace(report, assumptions=tuple({item.code: item for item in supposed}.values()))


def make_detail(*labels: str) -> Detail:
    return Detail(
        classes=tuple(ClassScores(label=item, precision=0.5, recall=0.25, f1=1 / 3, support=8) for item in labels),
        reliability=tuple(ReliabilityBin(confidence=n / 10, accuracy=n / 12, count=30) for n in range(1, 11)),
    )


def build_wide_run() -> Report:
    """Ten sites, some with long or strange names, and sixty rounds."""
    run = load_report_on_file("run")()
    names = (LONG, HOSTILE, "_underscore", "klinikum-süd", "病院", "f", "g", "h", "i", "j")
    first, last, round_ = run.sites[0], run.sites[0].steps[-1], run.facts.rounds[0]
    changed = change_sites(run, [0] * 10, names)
    sites = tuple(
        replace(
            item,
            steps=tuple(replace(last, round=n, epsilon=(1.105 - number / 100) * n / 60) for n in range(1, 61)),
            spent=replace(first.spent, epsilon=first.spent.epsilon - number / 100),
        )
        for number, item in enumerate(changed.sites)
    )
    failed = {True: {HOSTILE: "max_epsilon"}, False: {}}
    rounds = tuple(
        replace(round_, round=n, sites=names, seconds=1.5 + n % 5, failed_sites=failed[n % 7 == 0])
        for n in range(1, 61)
    )
    energy = Energy(kwh=0.5, carbon_kg=0.19, seconds=930.0)
    detail = make_detail(LONG, HOSTILE, "c")
    utility = replace(run.utility, epsilons=(run.utility.epsilons[0],) * 60)
    exceeded = BudgetVerdict(state="exceeded", reasons=("above_target", "above_run_cap"))
    sites = (*sites[:-1], replace(sites[-1], verdict=exceeded))
    purpose = "To sort what patients write by the ward that can answer it, and to tell what is urgent; " * 3
    provenance = replace(run.facts.provenance, purpose=purpose)
    changed = change_facts(changed, name=LONG, rounds=rounds, detail=detail, energy=energy, provenance=provenance)
    return fill_report(changed, sites=sites, utility=utility, verdict=exceeded)


def build_wide_ledger(*, runs: int = 500) -> Report:
    """Many runs in one ledger, with limits that changed."""
    report = load_report_on_file("ledger")()
    (site,) = report.sites

    def repeat_items(items: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(replace(items[n % len(items)], run=f"run-{n:04d}-0123456789abcdef") for n in range(runs))

    days = [f"{2020 + n // 100}-03-01T08:00:00+00:00" for n in range(runs)]
    steps = [
        EpsilonStep(run=f"run-{n:04d}", round=None, time=day, epsilon=2.0 * (n + 1) / runs)
        for n, day in enumerate(days)
    ]
    limits = [(f"{2020 + n}-01-01T08:00:00+00:00", 4.0 + n, n) for n in range(3)]
    caps = tuple(Cap(time=time, max_epsilon=cap, charges_before=charges) for time, cap, charges in limits)
    lifetime = replace(site.lifetime, runs=repeat_items(site.lifetime.runs), caps=caps, with_reserved=2.5)
    last = "2026-02-01T08:00:00+00:00"
    refusal = Release(kind="refusal", run=HOSTILE, reason="max_epsilon", count=12345, first=None, last=last)
    site_fields = {"lifetime": lifetime, "mechanisms": repeat_items(site.mechanisms), "steps": tuple(steps)}
    releases = (*repeat_items(report.facts.releases), refusal)
    changed = change_facts(report, site=HOSTILE, caps=caps, releases=releases)
    return fill_report(changed, sites=(replace(site, site=HOSTILE, **site_fields),))


@cache
def render_page(name: str, language: str) -> str:
    return render.render(build_reports()[name], language=language)


class Element(ElementTree.Element):
    def all(self, tag: str = "*", **attributes: str) -> list[Any]:
        """Those with a tag and attributes (`_` for `-`), this one included."""
        expected = {name.replace("_", "-"): value for name, value in attributes.items()}
        return [item for item in self.iter(tag) if expected.items() <= item.attrib.items()]

    @property
    def said(self) -> str:
        return "".join(self.itertext())

    def texts(self, *, without: Callable[[Element], bool]) -> Iterator[str]:
        """Pieces of text that are within no such element."""
        yield self.text or ""
        for child in self:
            yield from () if without(child) else child.texts(without=without)
            yield child.tail or ""


class _Parser(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.made = ElementTree.TreeBuilder(Element)
        self.made.start("page", {})

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.made.start(tag, {name: value or "" for name, value in attrs})
        if tag in {"meta", "link"}:
            self.made.end(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.made.end(tag).tag == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        self.made.data(data)


@lru_cache(maxsize=2 * len(NAMES))
def parse_page(html: str) -> Element:
    """The page's elements; every tag that is opened is closed."""
    parser = _Parser()
    parser.feed(html)
    parser.close()
    parser.handle_endtag("page")
    return parser.made.close()


def list_numbers(text: str) -> list[str]:
    return re.findall(r"\d+(?:[.,]\d+)*", text)


def put(data: Any, path: tuple[Any, ...], value: Any) -> None:
    for key in path[:-1]:
        data = data[key]
    data[path[-1]] = value


def iter_leaves(data: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Each value of plain data, and its place."""
    if isinstance(data, dict | list):
        for key in data if isinstance(data, dict) else range(len(data)):
            yield from iter_leaves(data[key], (*path, key))
    else:
        yield path, data


def look_up(data: Any, pointer: str) -> Any:
    """What a JSON pointer names."""
    for part in pointer.split("/")[1:]:
        data = data[int(part)] if isinstance(data, list) else data[part.replace("~1", "/").replace("~0", "~")]
    return data
