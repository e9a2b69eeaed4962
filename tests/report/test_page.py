from __future__ import annotations

import difflib
import hashlib
import json
import math
import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedtune.privacy.distributed_noise import SharedNoise
from fedtune.privacy.keys import SigningKey
from fedtune.report import signing
from fedtune.report.derive import profile
from fedtune.report.derive.verdicts import room_of
from fedtune.report.model import ByTrust, Report, Verdict, to_json
from fedtune.report.page import render
from fedtune.report.page.catalogue import LANGUAGES, catalogue
from fedtune.report.page.label import as_svg
from fedtune.report.page.tables import MOST_ROWS, Words, pointer
from fedtune.words import shortened

from .shown import (
    HOSTILE,
    NAMES,
    Element,
    Make,
    filled,
    lookup,
    page_of,
    parsed,
    reports_of,
    wide_ledger,
    wide_run,
    with_site,
    without_room,
)

Rendered = Callable[[str, str], str]
GOLDEN = Path(__file__).parent / "golden_pages"


@pytest.fixture
def reports(request: pytest.FixtureRequest) -> dict[str, Report]:
    return reports_of(request)


@pytest.fixture
def rendered(request: pytest.FixtureRequest) -> Rendered:
    return lambda name, language: page_of(request, name, language)


@pytest.fixture(params=LANGUAGES)
def language(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=NAMES)
def shown(
    request: pytest.FixtureRequest, reports: dict[str, Report], rendered: Rendered, language: str
) -> tuple[Report, str]:
    return reports[request.param], rendered(request.param, language)


def main(html: str) -> Element:
    (found,) = parsed(html).all("main")
    return found


def words_of(element: Element) -> str:
    return " ".join(element.text.split())


def test_every_figure_is_in_the_json(shown: tuple[Report, str], language: str) -> None:
    report, html = shown
    data, figures = json.loads(json.dumps(to_json(report)["derived"])), main(html).all("data")
    assert len(figures) > 40
    for figure in figures:
        found = lookup(data, figure.attributes["data-at"])
        assert json.loads(figure.attributes["value"]) == found
        assert figure.text == catalogue(language).figure(found, figure.attributes["data-as"])


def test_every_name_and_code_is_in_the_json(shown: tuple[Report, str], language: str) -> None:
    report, html = shown
    data, words = json.loads(json.dumps(to_json(report)["derived"])), Words(report, catalogue(language))
    texts = [one for one in main(html).walk() if "data-at" in one.attributes and one.tag != "data"]
    assert len(texts) > 30
    for element in texts:
        found, text = lookup(data, element.attributes["data-at"]), element.text
        sections = words.catalogue.texts.values()
        spoken = {section[found] for section in sections if isinstance(found, str) and found in section}
        if isinstance(found, str) and element.attributes.get("data-as") != "fact":
            short = re.escape(text).replace("…", ".*")
            assert text == found or text in spoken or re.fullmatch(short, found, re.DOTALL), (found, text)


def test_no_other_number_is_shown(shown: tuple[Report, str], language: str) -> None:
    """Outside of figures there are numbers only in fixed texts, names, and how many rows are left out."""
    report, html = shown
    tree = main(html)
    for element in tree.walk():
        if element.attributes.get("class", "").endswith("rows"):
            element.children.clear()
        element.children = [
            child for child in element.children if isinstance(child, str) or "data-at" not in child.attributes
        ]
    fixed = " ".join(text for texts in catalogue(language).texts.values() for text in texts.values())
    named = " ".join([report.name, *(site.site for site in report.sites), *report.provenance.libraries])
    source = "arXiv 2303.00654"
    left = " ".join(tree.texts(without=("code", "svg")))
    assert set(numbers(left)) <= set(numbers(f"{fixed} {named} {source}"))


def numbers(text: str) -> list[str]:
    return re.findall(r"\d+(?:[.,]\d+)*", text)


def test_tables_hold_the_rows_of_the_json(shown: tuple[Report, str]) -> None:
    report, html = shown
    for at, of in (
        ("mechanisms", "mechanisms"),
        ("lifetime/runs", "lifetime/runs"),
        ("lifetime/caps", "lifetime/caps"),
        ("releases", "releases"),
    ):
        rows = [
            f"/sites/{place}/{at}/{number}"
            for place, site in enumerate(to_json(report)["derived"]["sites"])
            for number in range(len(_within(site, of) or ()))
        ]
        shown_rows = {row for row in rows if f'data-at="{row}/' in html}
        data = json.loads(json.dumps(to_json(report)["derived"]))
        told = {json.dumps(lookup(data, row)) for row in shown_rows}
        if len(report.sites) == 1:
            assert len(shown_rows) == min(len(rows), MOST_ROWS), at
        else:  # what several sites have alike is one line
            assert told == {json.dumps(lookup(data, row)) for row in rows}, at
    assert report.utility is None or html.count("/utility/rounds/") > 3


def _within(data: Any, at: str) -> Any:
    for part in at.split("/"):
        data = None if data is None else data[part]
    return data


def test_a_row_tells_of_one_thing(shown: tuple[Report, str]) -> None:
    """No row mixes the figures of two sites, runs or rounds."""
    _, html = shown
    for row in main(html).all("tr"):
        places = {
            match.group()
            for cell in row.walk()
            if (
                match := re.match(
                    r"/sites/\d+(/(mechanisms|releases|lifetime/runs|curve)/\d+)?", cell.attributes.get("data-at", "")
                )
            )
        }
        longest = {
            place for place in places if not any(other != place and other.startswith(place + "/") for other in places)
        }
        is_by_round = any("/steps/" in cell.attributes.get("data-at", "") for cell in row.walk())
        assert len(longest) <= 1 or is_by_round


def test_each_site_is_listed_worst_first(rendered: Rendered, language: str) -> None:
    html = main(rendered("wide_run", language))
    budget = next(one for one in html.walk() if one.attributes.get("id") == "budget")
    assert [len(table.all("tr")) for table in budget.all("table")] == [5, 5], "eight sites in two halves"
    first = budget.all("tr")[1]  # the one that exceeded its budget
    assert first.all(data_at="/sites/9/site")
    for place in range(10):
        assert html.all(data_at=f"/sites/{place}/spent/epsilon_pld")


def test_nothing_is_left_open(shown: tuple[Report, str]) -> None:
    text = " ".join(main(shown[1]).texts(without=("code", "svg")))  # events are JSON
    for name in (HOSTILE, *(shortened(HOSTILE, most) for most in range(10, 70))):
        text = text.replace(name, "")
    assert not re.search(r"\{\w*\}|\{\{|\{%|undefined|None\b|\bnull\b", text)


def test_the_page_needs_nothing_else(shown: tuple[Report, str]) -> None:
    _, html = shown
    page_ = parsed(html)
    tags = {one.tag for one in page_.walk()}
    assert not tags & {"script", "iframe", "object", "embed", "img", "form", "input", "base", "audio", "video"}
    for element in page_.walk():
        for name, value in element.attributes.items():
            assert not name.startswith("on"), name
            if name in ("href", "src", "xlink:href", "action", "data", "poster", "srcset"):
                assert value.startswith(("#", "data:,")), value
    assert not re.search(
        r"@import|url\((?!#|data:font/woff2;base64,[\w+/=]+\))|expression\(",
        "".join(one.text for one in page_.all("style")),
    )
    assert "default-src 'none'" in html
    ids = [one.attributes["id"] for one in page_.walk() if "id" in one.attributes]
    assert len(ids) == len(set(ids))
    assert {one.attributes["href"][1:] for one in page_.all("a")} <= set(ids)


def test_hostile_names_stay_text(rendered: Rendered, language: str) -> None:
    for name in ("wide_run", "wide_ledger"):
        html = rendered(name, language)
        assert "<script" not in html
        assert html.count("</style>") == 1
        assert html.count("<svg") == html.count("</svg>")
        assert any(one.text == HOSTILE for one in main(html).walk())


@pytest.mark.parametrize("text", [HOSTILE, 'a\\b\n"; } body { display: none', "</style><script>", "ü病"])
def test_a_style_sheets_string_cannot_be_left(text: str) -> None:
    made = render.css_string(text)
    assert re.fullmatch(r'"(?:[A-Za-z0-9]|\\[0-9a-f]+ )*"', made)
    back = re.sub(r"\\([0-9a-f]+) ", lambda match: chr(int(match.group(1), 16)), made[1:-1])
    assert back == text


def test_the_pages_hash_is_that_of_the_file(shown: tuple[Report, str]) -> None:
    report, html = shown
    digest = hashlib.sha256(signing.to_text(report).encode()).hexdigest()
    # On page 1, for technical documentation, how to check, and at the foot of each page.
    assert html.count(digest) == 4


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith("wide")])
def test_page_one_reads_as_it_was_read(name: str, rendered: Rendered, language: str) -> None:
    html = main(rendered(name, language))
    (first,) = html.all("section", id="page-1")
    text = re.sub(r"\b[0-9a-f]{64}\b", "HASH", as_lines(first))
    path = GOLDEN / f"{name}-{language}.txt"
    if os.environ.get("FEDTUNE_WRITE_GOLDEN"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert text == path.read_text(), "\n".join(difflib.unified_diff(path.read_text().splitlines(), text.splitlines()))


def as_lines(element: Element) -> str:
    """Its text, a line for each block."""
    blocks = {"p", "h1", "h2", "h3", "li", "tr", "div", "section", "header", "ul", "ol", "table", "thead", "tbody"}

    def walk(one: Element) -> str:
        if one.tag == "svg":
            return f"[{one.attributes['aria-label']}]\n" if "aria-label" in one.attributes else ""
        inner = "".join(child if isinstance(child, str) else walk(child) for child in one.children)
        if one.tag in ("td", "th"):
            return " ".join(inner.split()) + " | "
        if one.tag == "tr":
            return f"\n{' '.join(inner.split())}\n"
        return f"\n{inner}\n" if one.tag in blocks else inner

    lines = (" ".join(line.split()).removesuffix(" |") for line in walk(element).splitlines())
    return "\n".join(line for line in lines if line) + "\n"


def by_id(html: Element, name: str) -> Element:
    (found,) = html.all(id=name)
    return found


def test_page_one_answers_three_questions_first(rendered: Rendered, language: str) -> None:
    """Whether the budget was kept, how strong that is, and what to do; a kept limit is no approval."""
    texts = catalogue(language).texts["verdict"]
    for name, to_do in (
        ("secure", "run"),
        ("ledger", "ledger"),
        ("used_up", "full"),
        ("exceeded", "exceeded"),
        ("no_guarantee", "no_guarantee"),
    ):
        verdict = by_id(main(rendered(name, language)), "verdict")
        assert [words_of(one) for one in verdict.all("h2")] == [texts[key] for key in ("kept", "strong", "to_do")]
        said, state = words_of(verdict), verdict.attributes["class"].split()[-1]
        assert texts[f"to_do_{to_do}"] in said
        assert (texts["no_approval"] in said) == (state not in ("exceeded", "no_guarantee"))
        assert (texts["to_do_violated"] in said) == (name != "secure"), "of what is violated page 1 says so"
        assert not verdict.all("svg"), "a full bar reads as approval"


@pytest.mark.parametrize(
    ("name", "state"), [("used_up", "used_up"), ("no_run_fits", "no_run_fits"), ("ledger", "within")]
)
def test_a_site_reads_first_whether_its_budget_has_room(
    name: str, state: str, rendered: Rendered, language: str
) -> None:
    verdict = by_id(main(rendered(name, language)), "verdict")
    texts = catalogue(language).texts["verdict"]
    assert verdict.attributes["class"] == f"verdict {state}"
    (result,) = verdict.all("p", **{"class": "result"})
    assert words_of(result) == f"{texts['kept_within']} {texts['within_ledger' if state == 'within' else state]}."


def test_what_is_held_for_open_runs_is_said_beside_what_is_used(
    rendered: Rendered, reports: dict[str, Report], language: str
) -> None:
    """The site's line has no result of its own, which would say "within" below a limit that is used up."""
    text = catalogue(language).texts["verdict"]["with_held"].partition("{")[0]
    for name, held in (("used_up", 6.0), ("no_run_fits", 5.7), ("ledger", None), ("within", None)):
        html = main(rendered(name, language))
        (used,) = by_id(html, "verdict").all("span", **{"class": "used"})
        assert (text in words_of(used)) == (held is not None), name
        if held is not None:
            assert used.all("data")[-1].attributes["data-at"] == "/sites/0/lifetime/with_set_aside"
            assert json.loads(used.all("data")[-1].attributes["value"]) == held
        headings = [words_of(one) for one in by_id(html, "budget").all("th", scope="col")]
        assert (catalogue(language).texts["budget"]["verdict"] in headings) == (name == "within")


def test_more_was_spent_than_approved_is_worse_than_no_room(a_ledger_report: Make) -> None:
    full = without_room(a_ledger_report(), left=0.0)
    assert room_of(full) == "used_up"
    assert room_of(replace(full, verdict=Verdict(state="exceeded", reasons=("above_lifetime_cap",)))) is None
    (site,) = full.sites
    frozen = replace(site.lifetime, frozen=True)
    assert room_of(with_site(full, lifetime=frozen)) == "closed"


def test_one_figure_of_the_attacker_stands_beside_a_coin(rendered: Rendered, language: str) -> None:
    """Of the method that ran where that holds; what follows from epsilon and delta alone stands in the annex."""
    for name, which in (("within", "mechanism"), ("ledger", "ceiling")):
        html = main(rendered(name, language))
        strong = by_id(html, "strong")
        (figure,) = strong.all("data", data_as="of_100")
        assert figure.attributes["data-at"] == f"/sites/0/meaning/right_of_100_{which}"
        assert "50\N{NO-BREAK SPACE}%" in strong.text
        assert html.all("data", data_at="/sites/0/meaning/right_of_100_ceiling"), "in the annex"


def test_no_figure_of_guesses_reads_as_one_of_people(shown: tuple[Report, str], language: str) -> None:
    (first,) = main(shown[1]).all("section", id="page-1")
    assert not re.search(r"\d (of|von) 100\b", words_of(first))


def test_the_attackers_figure_comes_before_the_factor(rendered: Rendered, language: str) -> None:
    for name in ("within", "ledger", "secure"):
        said = [one for one in main(rendered(name, language)).walk() if one.tag == "data"]
        kinds = [one.attributes["data-as"] for one in said]
        assert kinds.index("of_100") < kinds.index("factor")


def test_a_limit_that_says_nothing_is_no_figure(a_ledger_report: Make, language: str) -> None:
    """Neither on page 1 nor on the label: one sentence says where it stands, and why no more is proved."""
    words = catalogue(language)
    report = filled(a_ledger_report())
    (site,) = report.sites
    for ceiling, is_shown in ((98.9, True), (99.98, False)):
        means = replace(site.meaning, right_of_100_ceiling=ceiling, right_of_100_mechanism=None)
        shown = with_site(report, meaning=means)
        html = main(render.render(shown, language=language))
        (first,) = html.all("section", id="page-1")
        ceilings = [one for one in first.all("data") if "right_of_100" in one.attributes["data-at"]]
        assert bool(ceilings) == bool(first.all(id="several")) == is_shown
        section = words.texts["curve"]["heading"]
        said = words.text("meaning.several_runs", section=section).unescape()
        assert words_of(by_id(first, "ceiling")) == said
        assert said.split(",")[0] in as_svg(shown, language=language) or is_shown
        for text in (words_of(first), as_svg(shown, language=language)):
            assert bool(re.search(r"\b99\s%", text)) == is_shown
            assert not re.search(r"\b100\s%", text)
        assert html.all("data", data_at="/sites/0/meaning/right_of_100_ceiling"), "in the annex"
    once = replace(site, mechanisms=site.mechanisms[:1])
    said = words_of(by_id(main(render.render(replace(report, sites=(once,)), language=language)), "ceiling"))
    assert said == words.text("meaning.open_end", section=section).unescape(), "of a run that may have ended early"


@pytest.mark.parametrize("code", ["strong", "reasonable", "weak"])
def test_a_word_for_the_strength_says_by_what_bounds_it_goes(code: str, a_report: Make, language: str) -> None:
    """The bounds are those that the word was chosen by."""
    least, most = profile.band_limits(code)
    assert profile.strength_band(math.nextafter(least, math.inf)) == code
    assert math.isinf(most) or profile.strength_band(most) == code != profile.strength_band(math.nextafter(most, 99))
    report = replace(a_report(), epsilon=min(most, 11.0))
    said = words_of(by_id(main(render.render(report, language=language)), "band"))
    assert catalogue(language).texts["strength"][code] in said
    assert numbers(said)[-2:][-sum(0 < edge < math.inf for edge in (least, most)) :] == [
        f"{edge:g}" for edge in (least, most) if 0 < edge < math.inf
    ]


def test_of_a_secure_sum_it_is_said_how_much_all_others_could_tell(
    rendered: Rendered, reports: dict[str, Report], language: str
) -> None:
    (shown,) = by_id(main(rendered("secure", language)), "told").all("data")
    means = reports["secure"].sites[0].meaning
    assert means.right_of_100_mechanism < means.right_of_100_with_all_others < means.right_of_100_ceiling
    assert shown.attributes["data-at"] == "/sites/0/meaning/right_of_100_with_all_others"
    assert int(shown.text.split()[0]) == math.ceil(means.right_of_100_with_all_others)
    assert not main(rendered("within", language)).all(id="told")


def test_what_it_is_for_is_said_in_the_words_of_a_person(a_report: Make, language: str) -> None:
    words = catalogue(language).texts["page"]
    for purpose, shown in (
        (None, words["no_purpose"]),
        ("To <b>sort</b> letters", "To <b>sort</b> letters"),
        ("x" * 200, "x" * 90 + "…"),
        ("ab " * 50, "ab " * 29 + "ab…"),
    ):
        report = replace(a_report(), provenance=replace(a_report().provenance, purpose=purpose))
        said = by_id(main(render.render(report, language=language)), "purpose")
        assert words_of(said) == f"{words['purpose']} {shown}"
        assert bool(said.all("span", **{"class": "absent"})) == (purpose is None)


def test_a_decision_says_first_what_it_cannot_do(rendered: Rendered, a_ledger_report: Make, language: str) -> None:
    words = catalogue(language).texts["sign_off"]

    def said(html: str) -> tuple[bool, bool]:
        html = main(html)
        return words["simulated"] in words_of(by_id(html, "to-do")), words["limit_first"] in words_of(
            by_id(html, "sign-off")
        )

    assert said(rendered("within", language)) == said(rendered("ledger", language)) == (True, False)
    assert said(rendered("used_up", language)) == said(rendered("no_run_fits", language)) == (True, True)
    assert said(render.render(a_ledger_report(), language=language)) == (False, False), "of a real site"
    above = Verdict(state="exceeded", reasons=("above_lifetime_cap",))
    assert said(render.render(a_ledger_report(verdict=above), language=language)) == (False, True)


def test_page_one_says_with_what_and_with_whose_key_to_check(a_report: Make, language: str, tmp_path: Path) -> None:
    texts, key = catalogue(language).texts["check"], SigningKey.load_or_make(tmp_path / "key.pem")
    for report in (a_report(), signing.signed(a_report(), key)):
        html = by_id(main(render.render(report, language=language)), "check-one")
        command, digest, verify, *of_key = [one.text for one in html.all("code")]
        assert (command, len(digest)) == ("sha256sum report.json", 64)
        assert verify == "fedtune report verify report.json --key KEY"
        assert (texts["unsigned"] in words_of(html)) == (report.signature is None)
        if report.signature:
            whole = hashlib.sha256(key.public.encode()).hexdigest()
            assert [one.replace(" ", "") for one in of_key] == [whole[:16]]


def test_a_person_with_several_records_is_told_how_much_less(rendered: Rendered, reports: dict[str, Report]) -> None:
    for name in ("within", "ledger"):
        means = reports[name].sites[0].meaning
        figures = by_id(main(rendered(name, "en")), "several").all("data")
        right = means.right_of_100_ceiling if name == "ledger" else means.right_of_100_mechanism
        known = [right, means.right_of_100_for_2, means.right_of_100_for_5]
        assert [json.loads(one.attributes["value"]) for one in figures] == known
        assert 50 < known[0] < known[1] < known[2] < 100


def test_what_nobody_stated_is_asked_with_a_box_for_yes_and_no(rendered: Rendered, language: str) -> None:
    texts = catalogue(language).texts
    html = by_id(main(rendered("within", language)), "assumptions")
    asked = [one for one in html.all("li") if one.attributes.get("class") == "asked"]
    assert len(asked) == 2
    for one in asked:
        question, choices = (words_of(part) for part in one.children if isinstance(part, Element))
        assert question in texts["question"].values()
        assert choices == f"{texts['word']['yes']} {texts['word']['no']}"
        assert len([box for box in one.walk() if box.attributes.get("class") == "box"]) == 2


def test_without_a_promise_nobody_is_asked_to_confirm_it(rendered: Rendered, language: str) -> None:
    texts = catalogue(language).texts
    for name, promised in (("no_guarantee", False), ("unbounded", False), ("within", True), ("ledger", True)):
        html = main(rendered(name, language))
        asked = by_id(html, "assumptions")
        said = words_of(asked)
        assert bool([one for one in asked.all("li") if one.attributes.get("class") == "asked"]) == promised, name
        assert [one for one in asked.all("li") if one.attributes.get("class") == "violated"], "that is known, anyhow"
        assert (texts["assumptions"]["after_no"] in said) == promised
        assert (texts["assumptions"]["no_promise"] in said) != promised
        assert (texts["again"]["attack"] in words_of(by_id(html, "again"))) == promised


def test_who_decides_what_and_when_to_look_again(rendered: Rendered, language: str) -> None:
    texts = catalogue(language).texts
    for name, kind, triggers in (
        ("within", "run", ("next_run", "other_use", "attack", "date")),
        ("ledger", "ledger", ("limit", "attack", "date")),
    ):
        html = main(rendered(name, language))
        decided = by_id(html, "sign-off")
        assert words_of(decided.all("h2")[0]).startswith(texts["sign_off"][f"heading_{kind}"])
        assert texts["sign_off"]["who"] in words_of(decided)
        said = words_of(by_id(html, "again")).removesuffix(".").split("; ")
        assert [one.removeprefix(texts["again"]["heading"]).strip() for one in said][-len(triggers) :] == [
            texts["again"][code] for code in triggers
        ]
        runs = [one.attributes["data-at"] for one in by_id(html, "again").all("data")]
        assert runs == ([] if kind == "run" else ["/sites/0/lifetime/reference_runs_left"])


def test_page_one_names_eight_sites_and_the_annex_all(rendered: Rendered, language: str) -> None:
    html = main(rendered("alike", language))
    rows = [words_of(row.all("th")[0]) for table in by_id(html, "budget").all("tbody") for row in table.all("tr")]
    assert rows == [f"clinic-{number}" for number in range(1, 9)]
    (table,) = [one for one in by_id(html, "engineer").all("table") if one.all(data_at="/sites/1/source")]
    (alike,) = table.all("tbody")[0].all("tr")
    names = [*(f"clinic-{number}" for number in range(1, 33)), "south-hospital"]
    assert words_of(alike.all("th")[0]) == ", ".join(names)


def test_equal_sites_are_one_line_in_the_annex(rendered: Rendered, language: str) -> None:
    engineer = by_id(main(rendered("alike", language)), "engineer")
    for at in ("spent/epsilon_pld", "verdict/state", "mechanisms/0/noise_multiplier", "meaning/hit_rates/0/ceiling"):
        shown = [place for place in range(33) if engineer.all(data_at=f"/sites/{place}/{at}")]
        assert shown in ([1], [0, 1], [1, 0]), f"of 32 equal sites the annex tells {at} once, of the other perhaps, too"


def test_under_the_chart_equal_sites_are_one_column(rendered: Rendered, reports: dict[str, Report]) -> None:
    table = by_id(by_id(main(rendered("alike", "en")), "engineer"), "chart-epsilon_spent").all("table")[0]
    headings = [words_of(one) for one in table.all("thead")[0].all("th")]
    assert sorted(headings) == ["Round", "clinic-1 (+31)", "south-hospital"]
    assert all(len(row.all("td")) == 2 for row in table.all("tbody")[0].all("tr"))
    labels = {one.attributes["data-label"] for one in table.all("td")}
    assert labels == set(headings) - {"Round"}
    secure = by_id(main(rendered("secure", "en")), "chart-epsilon_spent").all("thead")[0]
    assert [words_of(one) for one in secure.all("th")] == ["Round", "all 5 sites alike"]
    assert len(reports["secure"].sites) == 5


def test_whose_noise_secure_sums_counted_with_is_told_of_secure_sums_alone(rendered: Rendered, language: str) -> None:
    caption = catalogue(language).texts["trust"]["shared_caption"]
    for name in NAMES:
        html = main(rendered(name, language))
        captions = [words_of(one) for one in html.all("caption")]
        assert captions.count(caption) == (name == "secure"), name
    shared = [one.attributes["data-at"] for one in html.all("data") if "/shared/" in one.attributes["data-at"]]
    assert {at.rpartition("/")[2] for at in shared} >= {"num_sites", "threshold", "colluders", "noise_multiplier"}


def test_what_is_not_on_record_is_grey(rendered: Rendered, language: str) -> None:
    html = main(rendered("not_released", language))
    grey = [words_of(one) for one in by_id(html, "budget").walk() if one.attributes.get("class") == "absent"]
    assert grey == [catalogue(language).texts["word"]["not_released"]]
    headings = [words_of(one) for one in by_id(html, "budget").all("thead")[0].all("th")]
    assert catalogue(language).texts["budget"]["left"] not in headings, "no site has released it"


def test_what_is_not_known_is_grey_in_the_annex_too(a_report: Make, language: str) -> None:
    texts = catalogue(language).texts
    known = a_report().provenance
    made = replace(known, model=None, machine="not_recorded", config_sha256=None, libraries={})
    html = main(render.render(a_report(provenance=made), language=language))
    (machine,) = [one for one in html.all("div") if words_of(one).startswith(texts["provenance"]["machine"])]
    assert words_of(machine.all("span", **{"class": "absent"})[0]) == texts["value"]["not_recorded"]
    for field in ("model", "config_sha256", "libraries"):
        found = [
            one for one in html.all("div") if [words_of(dt) for dt in one.all("dt")] == [texts["provenance"][field]]
        ]
        assert [words_of(grey) for grey in found[0].all("span", **{"class": "absent"})] == [texts["word"]["unknown"]]


def test_every_page_of_a_study_says_so_first(of_run: Report, of_ledger: Report, language: str) -> None:
    said = catalogue(language).texts["banner"]
    for report, banners in (
        (of_run, ["simulation"]),
        (replace(of_run, seeded_noise=True), ["simulation", "seeded"]),
        (replace(of_ledger, seeded_noise=True), ["seeded"]),
        (of_ledger, []),
    ):
        html = render.render(report, language=language)
        first = [words_of(one) for one in main(html).walk() if one.tag in ("p", "h1")][: len(banners)]
        assert first == [said[code] for code in banners]
        on_paper = [str(render.css_string(" ".join(first)))] if banners else []
        assert re.findall(r"@top-center \{ content: (\".*?\");", html) == on_paper


UNBOUNDED = {"en": "unbounded", "de": "unbegrenzt"}
AT_MOST = {"en": "at most", "de": "höchstens"}


def cells(html: Element, where: str) -> list[str]:
    return [
        words_of(cell)
        for row in html.all("tr")
        for cell in row.all("td")
        if any(where in inner.attributes.get("data-at", "") for inner in cell.walk())
    ]


def test_what_nothing_bounds_is_never_a_number_or_blank(rendered: Rendered, language: str) -> None:
    html = main(rendered("unbounded", language))
    for where in ("spent/epsilon", "spent/epsilon_pld", "spent/epsilon_rdp", "spent/planned_epsilon"):
        found = cells(html, f"/sites/0/{where}")
        assert found
        assert set(found) == {UNBOUNDED[language]}
    assert not html.all(id="chart-epsilon_spent")[0].all("svg")
    assert words_of(html.all(id="promise")[0]).count(
        words_of(Element("p", {}, [str(catalogue(language).text("promise.none"))]))
    )


def test_a_silent_sites_figures_are_upper_bounds(rendered: Rendered, language: str) -> None:
    html = main(rendered("upper_bound", language))
    for where in ("epsilon", "epsilon_pld", "epsilon_rdp", "rounds", "steps"):
        assert all(text.startswith(AT_MOST[language]) for text in cells(html, f"/sites/0/spent/{where}"))
        assert not any(text.startswith(AT_MOST[language]) for text in cells(html, f"/sites/1/spent/{where}"))


def test_cells_of_each_state_are_told_apart(rendered: Rendered, language: str) -> None:
    html = main(rendered("within", language))
    (section,) = html.all("section", id="cells")
    words = catalogue(language)
    for state in ("auto", "design", "site", "missing"):
        found = [one for one in section.walk() if one.attributes.get("class") == f"cell {state}"]
        assert found
        assert all(str(words.text(f"cells.{state}")) in one.text for one in found)
    css = "".join(one.text for one in parsed(rendered("within", language)).all("style"))
    borders = {
        re.search(rf"\.cell\.{state} \{{ [^}}]*border[^:]*: \d+px (\w+)", css).group(1)
        for state in ("auto", "design", "site", "missing")
    }
    assert borders == {"solid", "dotted", "dashed", "double"}
    for blank in (one for one in section.walk() if one.attributes.get("class") == "cell site"):
        assert all(not words_of(value) for value in blank.all("dd"))
        assert (
            words_of(blank).endswith(f"{words.text('cells.who')}{words.text('cells.when')}")
            or words.text("cells.when") in blank.text
        )


def test_violated_assumptions_come_first_and_all_of_them(a_report: Make, language: str) -> None:
    report = filled(a_report())
    turned = tuple(replace(one, status="violated") for one in report.assumptions[:8])
    html = main(render.render(replace(report, assumptions=(*turned, *report.assumptions[8:])), language=language))
    listed = html.all(id="assumptions")[0].all("li")
    assert [one.attributes["class"] for one in listed if "class" in one.attributes] == ["violated"] * 8


def test_of_ten_sites_one_sees_another_s_result_only_if_most_were_missing(a_report: Make) -> None:
    def row(report: Report) -> list[str]:
        html = main(render.render(report, language="en"))
        return [words_of(cell) for cell in html.all(id="access")[0].all("tr")[2].all("td")]

    wide = wide_run(a_report)
    assert row(wide) == ["no", "no", "no", "yes", "yes"]
    one, *others = wide.utility.rounds
    few = replace(wide.utility, rounds=(replace(one, sites=("a", "b")), *others))
    assert row(replace(wide, utility=few))[2] == "by subtraction"


def test_a_run_without_noise_is_not_described_as_one_with_noise(rendered: Rendered, language: str) -> None:
    texts = catalogue(language).texts
    noised = (
        texts["documentation"]["method_text"],
        texts["setting"]["model_text"],
        texts["setting"]["dropout_text"],
        texts["mechanism"]["note"],
    )
    for name, said in (("within", True), ("ledger", True), ("unbounded", False), ("no_guarantee", False)):
        text = words_of(main(rendered(name, language)))
        assert [one in text for one in noised] == [said] * len(noised), name
    assert texts["setting"]["contribution_text"] not in words_of(main(rendered("unbounded", language)))
    assert texts["documentation"]["method_text_seeded"] in words_of(main(rendered("no_guarantee", language)))


def test_a_ledgers_history_shows_its_end(a_ledger_report: Make) -> None:
    html = render.render(wide_ledger(a_ledger_report, runs=100), language="en")
    assert "/sites/0/lifetime/runs/99/" in html
    assert "/sites/0/lifetime/runs/0/" not in html
    assert f"{MOST_ROWS} of 100 rows are shown" in html


def test_the_page_of_many_runs_stays_short(a_ledger_report: Make) -> None:
    few, many = (render.render(wide_ledger(a_ledger_report, runs=runs), language="en") for runs in (100, 2500))
    assert len(many) < 2 * len(few)  # 25 times as many runs


def test_a_pointer_finds_names_with_any_letter() -> None:
    assert lookup({"a/b~c": [{"": 1}]}, pointer("a/b~c", 0, "")) == 1


def test_a_site_of_a_secure_sum_is_not_said_to_add_all_its_noise(a_report: Make, language: str) -> None:
    report = filled(a_report())
    together = SharedNoise(num_sites=3, threshold=3, colluders=1, noise_multiplier=1.0, cell_bits=20, bound=8)
    trust = ByTrust(server_alone=1.1, with_colluders=1.2, with_all_others=2.0)
    sites = tuple(
        replace(site, mechanisms=tuple(replace(one, shared=together) for one in site.mechanisms), by_trust=trust)
        for site in report.sites
    )
    texts = catalogue(language).texts["setting"]
    for shown, one in ((report, False), (replace(report, sites=sites), True)):
        text = words_of(main(render.render(shown, language=language)))
        for key in ("model_text", "dropout_text"):
            assert (texts[key] in text, texts[f"{key}_shared"] in text) == (not one, one)
