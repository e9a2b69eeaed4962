import difflib
import hashlib
import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from fedtune.formatting import group_hex
from fedtune.privacy.keys import SigningKey
from fedtune.report import signing
from fedtune.report.derive import profile
from fedtune.report.derive.verdicts import explain_missing_room
from fedtune.report.facts import BudgetVerdict, StartAdapter
from fedtune.report.model import Report, to_json
from fedtune.report.page import render
from fedtune.report.page.render import render_label
from fedtune.report.page.tables import MAX_ROWS, ROWS_OF_LONGER
from fedtune.report.page.translations import load_catalog
from fedtune.report.page.view import Words, pointer
from fedtune.show.lines import shorten_middle

from . import shown as made
from .shown import (
    HOSTILE,
    NAMES,
    Element,
    Make,
    build_reports,
    change_first_site,
    list_numbers,
    look_up,
    parse_page,
    render_page,
)

GOLDEN = Path(__file__).parent / "golden_pages"


@pytest.fixture(params=NAMES)
def shown(request: pytest.FixtureRequest, language: str) -> tuple[Report, str]:
    return build_reports()[request.param], render_page(request.param, language)


def main(html: str) -> Element:
    (match,) = parse_page(html).all("main")
    return match


def join_words(element: Element) -> str:
    return " ".join(element.said.split())


def test_figures_names_and_codes_on_the_page_are_in_the_json(shown: tuple[Report, str], language: str) -> None:
    report, html = shown
    data, figures = json.loads(json.dumps(to_json(report))), main(html).all("data")
    assert len(figures) > 40
    for figure in figures:
        match = look_up(data, figure.attrib["data-at"])
        assert json.loads(figure.attrib["value"]) == match
        assert figure.said == load_catalog(language).figure(match, figure.attrib["data-as"])
    words = Words(report, load_catalog(language))
    texts = [one for one in main(html).iter() if "data-at" in one.attrib and one.tag != "data"]
    assert len(texts) > 30
    for element in texts:
        match, text = look_up(data, element.attrib["data-at"]), element.said
        sections = words.catalog.texts.values()
        spoken = {section[match] for section in sections if isinstance(match, str) and match in section}
        if isinstance(match, str) and element.attrib.get("data-as") != "fact":
            short = re.escape(text).replace("…", ".*")
            assert text == match or text in spoken or re.fullmatch(short, match, re.DOTALL), (match, text)


def test_page_numbers_come_only_from_figures_or_fixed_texts(shown: tuple[Report, str], language: str) -> None:
    """Outside of figures there are numbers only in fixed texts, names, and how many rows are left out."""
    report, html = shown

    def is_known(node: Element) -> bool:
        return "data-at" in node.attrib or node.tag in ("code", "svg") or node.attrib.get("class", "").endswith("rows")

    fixed = " ".join(text for texts in load_catalog(language).texts.values() for text in texts.values())
    named = " ".join([report.facts.name, *(site.site for site in report.sites), *report.facts.provenance.libraries])
    named += " ".join(node.dates for node in made.list_periods(report))
    source = "arXiv 2303.00654"
    rest = " ".join(main(html).texts(without=is_known))
    assert set(list_numbers(rest)) <= set(list_numbers(f"{fixed} {named} {source}"))


def test_page_tables_match_the_rows_of_the_json(shown: tuple[Report, str]) -> None:
    report, html = shown
    data = json.loads(json.dumps(to_json(report)))
    words = Words(report, load_catalog("en"))
    for kind, prefix in (
        ("sites", "mechanisms"),
        ("life", "runs"),
        ("life", "caps"),
        ("own", "releases"),
        ("sites", "releases"),
    ):
        rows = words.rows(f"{kind}/{prefix}/*") if words.at(words.place(kind, words.sites[0])) else []
        shown_rows = {row for row in rows if f'data-at="{row}/' in html}
        if len(report.sites) == 1:
            assert len(shown_rows) == (len(rows) if len(rows) <= MAX_ROWS else ROWS_OF_LONGER), prefix
        else:  # what several sites have alike is one line
            told, full = ({json.dumps(look_up(data, row)) for row in listed_rows} for listed_rows in (shown_rows, rows))
            assert told == full, prefix
    assert report.utility is None or html.count("/facts/rounds/") > 3
    # No row mixes the figures of two sites, runs or rounds.
    kinds = re.compile(r"(/facts)?/sites/\d+(/(statement/)?(mechanisms|releases|lifetime/runs|curve)/\d+)?")
    for row in main(html).all("tr"):
        found = [cell.attrib.get("data-at", "") for cell in row.iter()]
        paths = {match.group() for match in map(kinds.match, found) if match}
        paths = {path.removeprefix("/facts").replace("/statement", "") for path in paths}
        longest = {node for node in paths if not any(longer.startswith(f"{node}/") for longer in paths)}
        assert len(longest) <= 1 or any("/steps/" in path for path in found)


def test_sites_are_listed_worst_first(language: str) -> None:
    html = main(render_page("wide_run", language))
    budget = find_by_id(html, "budget")
    assert len(budget.all("tr")) == 11, "ten sites that differ, below the headings"
    first = budget.all("tr")[1]  # the one that exceeded its budget
    assert first.all(data_at="/sites/9/site")
    for path in range(10):
        assert html.all(data_at=f"/sites/{path}/spent/epsilon_pld")


def test_page_has_no_unfilled_placeholders_or_missing_values(shown: tuple[Report, str]) -> None:
    text = " ".join(main(shown[1]).texts(without=lambda element: element.tag in ("code", "svg")))  # events are JSON
    for name in (shown[0].facts.name, HOSTILE):
        for said in (name, *(shorten_middle(name, max_length) for max_length in range(10, 70))):
            text = text.replace(said, "")
    assert not re.search(r"\{\w*\}|\{\{|\{%|undefined|None\b|\bnull\b", text)
    first = find_by_id(main(shown[1]), "page-1")
    assert not re.search(r"\d (of|von) 100\b", join_words(first)), "no figure of guesses reads as one of people"


def test_page_is_self_contained_and_shows_the_report_digest(shown: tuple[Report, str]) -> None:
    report, html = shown
    digest = hashlib.sha256(signing.report_to_json(report).encode()).hexdigest()
    # On page 1, for technical documentation, how to check, and at the foot of each page.
    assert html.count(digest) == 4
    tree = parse_page(html)
    tags = {one.tag for one in tree.iter()}
    assert not tags & {"script", "iframe", "object", "embed", "img", "form", "input", "base", "audio", "video"}
    for element in tree.iter():
        for name, value in element.attrib.items():
            assert not name.startswith("on"), name
            if name in ("href", "src", "xlink:href", "action", "data", "poster", "srcset"):
                assert value.startswith(("#", "data:,")), value
    style = "".join(one.said for one in tree.all("style"))
    assert not re.search(r"@import|url\((?!#|data:font/woff2;base64,[\w+/=]+\))|expression\(", style)
    assert "default-src 'none'" in html
    ids = [one.attrib["id"] for one in tree.iter() if "id" in one.attrib]
    assert len(ids) == len(set(ids))
    assert {one.attrib["href"][1:] for one in tree.all("a")} <= set(ids)


def test_hostile_names_are_escaped_on_the_page(language: str) -> None:
    for name in ("wide_run", "wide_ledger"):
        html = render_page(name, language)
        assert "<script" not in html
        assert html.count("</style>") == 1
        assert html.count("<svg") == html.count("</svg>")
        assert any(element.said == HOSTILE for element in main(html).iter())


@pytest.mark.parametrize("text", [HOSTILE, 'a\\b\n"; } body { display: none', "</style><script>", "ü病"])
def test_css_strings_cannot_be_escaped_from(text: str) -> None:
    quoted = render.quote_css_string(text)
    assert re.fullmatch(r'"(?:[A-Za-z0-9]|\\[0-9a-f]+ )*"', quoted)
    assert re.sub(r"\\([0-9a-f]+) ", lambda match: chr(int(match.group(1), 16)), quoted[1:-1]) == text


MAX_WORDS = 450  # of page 1, whatever the situation


@pytest.mark.parametrize("name", NAMES)
def test_page_one_has_at_most_450_words(name: str, language: str, tmp_path: Path) -> None:
    """Signed and not; a word has a letter or a digit, and the scale for phones says what the other one says."""
    report = build_reports()[name]
    signed = signing.sign_report(replace(report, signature=None), SigningKey.load_or_create(tmp_path / "key.pem"))
    for element in (report, signed):
        (first,) = main(render.render(element, language=language)).all("section", id="page-1")
        text = " ".join(first.texts(without=lambda part: part.attrib.get("class") == "narrow"))
        assert len(re.findall(r"\S*\w\S*", text)) <= MAX_WORDS


def test_scale_shows_bounds_for_one_two_and_five_records(language: str) -> None:
    report = build_reports()["ledger"]
    first, words = find_by_id(main(render_page("ledger", language)), "page-1"), load_catalog(language)
    (scale,) = first.all("svg", **{"class": "wide"})
    means = report.sites[0].meaning
    shown = (means.correct_of_100_ceiling, means.correct_of_100_for_2, means.correct_of_100_for_5)
    assert all(words.figure(value, "of_100").replace("\N{NO-BREAK SPACE}", " ") in join_words(scale) for value in shown)
    marks = [float(one.attrib["cx"]) for one in scale.all("circle")]
    assert marks == sorted(marks), "the more records, the nearer to certainty"
    worst = [one.attrib["data-at"] for row in first.all("tr", **{"class": "worst"}) for one in row.all("data")]
    assert [at for at in worst if at.endswith("ceiling")] == [f"/sites/0/meaning/posterior/{n}/ceiling" for n in (2, 0)]


@pytest.mark.parametrize(("right", "five", "text"), [(60.0, 60.1, "Well for one"), (80.1, 99.9, "Poorly for one")])
def test_protection_wording_depends_on_the_guess_bounds(right: float, five: float, text: str) -> None:
    (site,) = build_reports()["ledger"].sites
    means = replace(site.meaning, correct_of_100_ceiling=right, correct_of_100_for_5=five)
    html = main(render.render(change_first_site(build_reports()["ledger"], meaning=means), language="en"))
    assert join_words(find_by_id(html, "strong").all("p")[0]).startswith(text)


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith("wide")])
def test_page_one_matches_its_golden_text(name: str, language: str) -> None:
    check_text(f"{name}-{language}", main(render_page(name, language)).all("section", id="page-1"))


SHORT = ("engineer", "utility", "cost")
LONG = (*SHORT, "cells", "documentation", "formulae", "glossary", "check")
ANNEXES = {
    ("within", "en"): LONG,
    ("ledger", "de"): LONG,
    ("secure", "en"): SHORT,
    ("unbounded", "en"): SHORT,
    ("no_guarantee", "de"): SHORT,
    ("alike", "en"): SHORT,
    ("drifting", "en"): ("utility",),
}
"""What follows page 1: whole of a run and of a ledger, else the parts that differ."""


@pytest.mark.parametrize(("name", "language", "parts"), [(*key, parts) for key, parts in ANNEXES.items()])
def test_annex_matches_its_golden_text(name: str, language: str, parts: Sequence[str]) -> None:
    html = main(render_page(name, language))
    check_text(f"{name}-{language}-annex", [find_by_id(html, part) for part in parts])


def check_text(name: str, parts: Sequence[Element]) -> None:
    text = re.sub(r"[0-9a-f]{64}", "HASH", "".join(map(list_lines, parts)))
    path = GOLDEN / f"{name}.txt"
    if os.environ.get("FEDTUNE_WRITE_GOLDEN"):
        path.write_text(text)
    assert text == path.read_text(), "\n".join(difflib.unified_diff(path.read_text().splitlines(), text.splitlines()))


def list_lines(element: Element) -> str:
    """Its text, a line for each block."""
    blocks = {"p", "h1", "h2", "h3", "li", "tr", "div", "section", "header", "ul", "ol", "table", "thead", "tbody"}

    def walk(one: Element) -> str:
        if one.tag == "svg":
            return f"[{one.attrib['aria-label']}]\n" if "aria-label" in one.attrib else ""
        inner = (one.text or "") + "".join(walk(child) + (child.tail or "") for child in one)
        if one.tag in ("td", "th"):
            return " ".join(inner.split()) + " | "
        if one.tag == "tr":
            return f"\n{' '.join(inner.split())}\n"
        return f"\n{inner}\n" if one.tag in blocks else inner

    lines = (" ".join(line.split()).removesuffix(" |") for line in walk(element).splitlines())
    return "\n".join(line for line in lines if line) + "\n"


def find_by_id(html: Element, name: str) -> Element:
    (match,) = html.all(id=name)
    return match


def test_exceeded_budget_takes_precedence_over_an_exhausted_budget(a_ledger_report: Make) -> None:
    full = made.use_up_room(a_ledger_report(), left=0.0)
    assert explain_missing_room(full) == "used_up"
    assert (
        explain_missing_room(replace(full, verdict=BudgetVerdict(state="exceeded", reasons=("above_lifetime_cap",))))
        is None
    )
    (site,) = full.sites
    assert explain_missing_room(change_first_site(full, lifetime=replace(site.lifetime, frozen=True))) == "closed"


def test_uninformative_ceiling_is_not_shown_as_a_figure(language: str) -> None:
    """Neither on page 1 nor on the label: one sentence says where it stands, and why no more is proved."""
    words, report = load_catalog(language), build_reports()["ledger"]
    (site,) = report.sites
    for ceiling, is_shown in ((98.9, True), (99.98, False)):
        means = replace(site.meaning, correct_of_100_ceiling=ceiling, correct_of_100_mechanism=None)
        shown = change_first_site(report, meaning=means)
        html = main(render.render(shown, language=language))
        (first,) = html.all("section", id="page-1")
        ceilings = [one for one in first.all("data") if "correct_of_100" in one.attrib["data-at"]]
        assert bool(ceilings) == bool(first.all(id="scale")) == is_shown
        section = words.texts["curve"]["heading"]
        said = words.text("meaning.several_runs", section=section).unescape()
        assert join_words(find_by_id(first, "ceiling")) == said
        assert said.split(",")[0] in render_label(shown, language=language) or is_shown
        for text in (join_words(first), render_label(shown, language=language)):
            assert bool(re.search(r"\b99\s%", text)) == is_shown
            assert not re.search(r"\b100\s%", text)
        assert html.all("data", data_at="/sites/0/meaning/correct_of_100_ceiling"), "in the annex"
    once = replace(site, mechanisms=site.mechanisms[:1])
    said = join_words(find_by_id(main(render.render(replace(report, sites=(once,)), language=language)), "ceiling"))
    assert said == words.text("meaning.open_end", section=section).unescape(), "of a run that may have ended early"


@pytest.mark.parametrize("code", ["strong", "reasonable", "weak"])
def test_strength_rating_shows_its_epsilon_thresholds(code: str, a_report: Make, language: str) -> None:
    min_epsilon, max_length = profile.BANDS[code]
    assert profile.find_strength_band(math.nextafter(min_epsilon, math.inf)) == code
    assert math.isinf(max_length) or profile.find_strength_band(max_length) == code != profile.find_strength_band(
        math.nextafter(max_length, 99)
    )
    report = replace(a_report(), epsilon=min(max_length, 11.0))
    (level,) = main(render.render(report, language=language)).all("li", **{"class": "here"})
    text = join_words(level).split(load_catalog(language).texts["strength"]["here"].split(":")[0])[0]
    assert load_catalog(language).texts["strength"][code] in text
    edges = [f"{edge:g}" for edge in (min_epsilon, max_length) if 0 < edge < math.inf]
    assert list_numbers(text)[-2:][-len(edges) :] == edges


def test_purpose_is_quoted_escaped_and_shortened(a_report: Make, language: str) -> None:
    words = load_catalog(language).texts["page"]
    for purpose, shown in (
        (None, words["no_purpose"]),
        ("To <b>sort</b> letters", "To <b>sort</b> letters"),
        ("x" * 200, "x" * 90 + "…"),
        ("ab " * 50, "ab " * 29 + "ab…"),
    ):
        report = made.change_facts(a_report(), provenance=replace(a_report().facts.provenance, purpose=purpose))
        text = find_by_id(main(render.render(report, language=language)), "purpose")
        assert join_words(text) == f"{words['purpose']} {shown}"
        assert bool(text.all("span", **{"class": "absent"})) == (purpose is None)


def test_page_one_names_the_epsilon_of_a_private_base_model(a_report: Make, language: str) -> None:
    words, provenance = load_catalog(language), a_report().facts.provenance
    unit = "sequence of 1,024 tokens"
    start = StartAdapter(digest="vaultgemma", run="VaultGemma 1B", dataset=None, unit=unit, delta=1.1e-10, epsilon=2.0)

    def render_with(start: StartAdapter) -> Element:
        report = made.change_facts(a_report(), provenance=replace(provenance, start_adapter=start))
        return find_by_id(main(render.render(report, language=language)), "page-1")

    said = join_words(find_by_id(render_with(start), "base"))
    assert all(text in said for text in ("VaultGemma 1B", f"psilon {words.figure(2.0, 'epsilon')}", unit))
    unknown = join_words(find_by_id(render_with(replace(start, delta=None, epsilon=None)), "base"))
    assert words.texts["word"]["unknown"] in unknown
    assert not render_with(replace(start, public=True)).all(id="base"), "no records were protected there"


def test_sign_off_states_the_limits_of_a_decision_first(a_ledger_report: Make, language: str) -> None:
    words = load_catalog(language).texts["sign_off"]

    def read_parts(html: str) -> tuple[bool, ...]:
        parts = (("to-do", "simulated"), ("sign-off", "limit_first"))
        return tuple(words[key] in join_words(find_by_id(main(html), part)) for part, key in parts)

    assert read_parts(render_page("within", language)) == read_parts(render_page("ledger", language)) == (True, False)
    assert (
        read_parts(render_page("used_up", language)) == read_parts(render_page("no_run_fits", language)) == (True, True)
    )
    assert read_parts(render_page("no_run_now", language)) == (True, False), "the next period has room again"
    assert read_parts(render_page("cohort_full", language)) == (True, False), "other cohorts may have room"
    assert read_parts(render.render(a_ledger_report(), language=language)) == (False, False), "of a real site"
    exceeded = BudgetVerdict(state="exceeded", reasons=("above_lifetime_cap",))
    assert read_parts(render.render(a_ledger_report(verdict=exceeded), language=language)) == (False, True)


def test_questions_about_people_are_asked_first(a_report: Make) -> None:
    """With real sites, all assumptions are open, and page 1 has room for four questions."""
    open_ones = (replace(one, status="assumed") for one in a_report().assumptions)
    asked = Words(replace(a_report(), assumptions=tuple(open_ones)), load_catalog("en")).assumptions()
    assert [one.code for one in asked[:2]] == ["one_record_is_one_unit", "units_at_one_site_only"]
    assert len(asked) == 4


def test_page_one_shows_the_commands_and_key_for_verification(a_report: Make, language: str, tmp_path: Path) -> None:
    texts, key = load_catalog(language).texts["check"], SigningKey.load_or_create(tmp_path / "key.pem")
    for report in (a_report(), signing.sign_report(a_report(), key)):
        page = main(render.render(report, language=language))
        model, start_command = [element.said for element in find_by_id(page, "model").all("code")]
        command, digest, verify, *key_commands = [element.said for element in find_by_id(page, "check-one").all("code")]
        assert (model, start_command) == ("adapter/adapter_model.safetensors", "5656 5656 5656 5656")
        assert (command, len(digest)) == ("sha256sum report.json", 64)
        assert verify == signing.format_verify_command(report)
        assert verify.endswith("report.json --key KEY" if report.signature else "report.json"), (
            "simulations need no roster"
        )
        assert (texts["unsigned"] in join_words(find_by_id(page, "page-1"))) == (report.signature is None)
        if report.signature:
            assert key_commands == [group_hex(key.public[:16])], "as kits and `report verify` write it"


def test_identical_sites_share_one_line_in_the_annex(language: str) -> None:
    engineer = find_by_id(main(render_page("alike", language)), "engineer")
    for at in ("spent/epsilon_pld", "verdict/state", "mechanisms/0/noise_multiplier", "meaning/hit_rates/0/ceiling"):
        shown = [path for path in range(33) if engineer.all(data_at=f"/sites/{path}/{at}")]
        assert shown in ([1], [0, 1], [1, 0]), f"of 32 equal sites the annex tells {at} once, of the other perhaps, too"
    table = find_by_id(find_by_id(main(render_page("alike", "en")), "engineer"), "chart-epsilon_spent").all("table")[0]
    headings = [join_words(one) for one in table.all("thead")[0].all("th")]
    assert headings == ["Site", "Round", "Date", "Epsilon so far"]
    sites = {join_words(row.all("th")[0]) for row in table.all("tbody")[0].all("tr")}
    assert sites == {*(f"clinic-1 and {count} more, all alike" for count in (31, 32)), "south-hospital"}
    assert {one.attrib["data-label"] for one in table.all("td")} == set(headings[1:])
    secure = find_by_id(main(render_page("secure", "en")), "chart-epsilon_spent").all("tbody")[0]
    assert all(join_words(row.all("th")[0]).endswith("and 4 more, all alike") for row in secure.all("tr"))
    assert len(build_reports()["secure"].sites) == 5


def test_unknown_values_are_grayed_out_in_the_annex(a_report: Make, language: str) -> None:
    texts = load_catalog(language).texts
    known = a_report().facts.provenance
    unknown = replace(known, model=None, machine="not_recorded", config_sha256=None, libraries={})
    html = main(render.render(made.change_facts(a_report(), provenance=unknown), language=language))
    (machine,) = [node for node in html.all("div") if join_words(node).startswith(texts["provenance"]["machine"])]
    assert join_words(machine.all("span", **{"class": "absent"})[0]) == texts["value"]["not_recorded"]
    for section, field in (("fact", "base_model"), ("provenance", "config_sha256"), ("fact", "libraries")):
        name = texts[section][field]
        match = [node for node in html.all("div") if [join_words(dt) for dt in node.all("dt")] == [name]]
        assert [join_words(gray) for gray in match[0].all("span", **{"class": "absent"})] == [texts["word"]["unknown"]]


def test_every_page_of_a_study_shows_its_banner_first(run_report: Report, ledger_report: Report, language: str) -> None:
    text = load_catalog(language).texts["banner"]
    for report, banners in (
        (run_report, ["simulation"]),
        (made.change_facts(run_report, seeded_noise=True), ["simulation", "seeded"]),
        (made.change_facts(ledger_report, lost_seed=True), ["seeded"]),
        (ledger_report, []),
    ):
        html = render.render(report, language=language)
        first = [join_words(element) for element in main(html).iter() if element.tag in ("p", "h1")][: len(banners)]
        assert first == [text[code] for code in banners]
        on_paper = [str(render.quote_css_string(" ".join(first)))] if banners else []
        assert re.findall(r"@top-center \{ content: (\".*?\");", html) == on_paper


def test_figures_of_a_silent_site_are_marked_as_upper_bounds(language: str) -> None:
    at_most, cells = (
        {"en": "at most", "de": "höchstens"}[language],
        main(render_page("upper_bound", language)).all("td"),
    )
    shown_rows = [(element.attrib.get("data-at", ""), join_words(cell)) for cell in cells for element in cell.iter()]
    for key in ("epsilon", "epsilon_pld", "epsilon_rdp", "rounds", "steps"):
        for site in (0, 1):
            bounds = [text.startswith(at_most) for prefix, text in shown_rows if f"/sites/{site}/spent/{key}" in prefix]
            assert set(bounds) == {site == 0}


def test_dpia_fields_in_each_state_look_different(language: str) -> None:
    html, borders = render_page("within", language), set()
    (section,) = main(html).all("section", id="cells")
    words, css = load_catalog(language), "".join(element.said for element in parse_page(html).all("style"))
    for state in ("auto", "design", "site", "missing"):
        match = section.all(**{"class": f"cell {state}"})
        assert match
        assert all(str(words.text(f"cells.{state}")) in element.said for element in match)
        borders.add(re.search(rf"\.cell\.{state} \{{ [^}}]*border[^:]*: \d+px (\w+)", css).group(1))
    assert borders == {"solid", "dotted", "dashed", "double"}
    for blank in section.all(**{"class": "cell site"}):
        assert all(not join_words(value) for value in blank.all("dd"))
        assert all(words.text(key) in blank.said for key in ("cells.who", "sign_off.date"))


def test_all_violated_assumptions_are_listed_first(language: str) -> None:
    report = build_reports()["within"]
    violated = tuple(replace(element, status="violated") for element in report.assumptions[:8])
    html = main(render.render(replace(report, assumptions=(*violated, *report.assumptions[8:])), language=language))
    listed = html.all(id="assumptions")[0].all("li")
    assert [element.attrib["class"] for element in listed if "class" in element.attrib] == ["violated"] * 8


def test_site_results_can_be_subtracted_only_with_few_participants() -> None:
    def read_row(report: Report) -> list[str]:
        html = main(render.render(report, language="en"))
        return [join_words(cell) for cell in html.all(id="access")[0].all("tr")[2].all("td")]

    wide = build_reports()["wide_run"]
    assert read_row(wide) == ["no", "no", "no", "yes", "yes"]
    element, *count = wide.facts.rounds
    few_sites = made.change_facts(wide, rounds=(replace(element, sites=("a", "b")), *count))
    assert read_row(few_sites)[2] == "by subtraction"


def test_long_ledger_history_is_truncated_to_its_last_rows() -> None:
    few_sites, many_sites = (render.render(made.build_wide_ledger(runs=runs), language="en") for runs in (100, 2500))
    assert "/sites/0/lifetime/runs/99/" in few_sites
    assert "/sites/0/lifetime/runs/0/" not in few_sites
    assert f"The table shows {ROWS_OF_LONGER} of 100 rows" in few_sites
    assert len(many_sites) < 2 * len(few_sites)  # 25 times as many runs


def test_json_pointer_escapes_special_characters() -> None:
    assert look_up({"a/b~c": [{"": 1}]}, pointer("a/b~c", 0, "")) == 1
