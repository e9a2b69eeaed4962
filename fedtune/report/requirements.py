"""A report mapped to the requirements of a document such as GDPR Article 35, with the answers and the gaps.

The requirements are data in `maps/`: short paraphrases with their numbers, the document's version and its source. An
answer is "auto" (a recorded fact), "design" (true for every run of an unmodified fedtune), "site" (a person's
statement, taken from report.about), or "missing" (a fact that should be recorded and is not). No answer claims that a
requirement is met, which is for people to judge. Requirements and answers are in English.
"""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from fedtune.config import AboutSpec
from fedtune.formatting import pluralize
from fedtune.privacy.accountant import format_epsilon
from fedtune.report.derive.dpia_fields import BY_DESIGN
from fedtune.report.derive.profile import bound_secret_chance, count_charged_events
from fedtune.report.facts import LedgerFacts, RunFacts
from fedtune.report.gate_verdict import GateVerdict
from fedtune.report.model import Report
from fedtune.report.model_card import render_card
from fedtune.report.page.render import create_template_environment, format_fact
from fedtune.report.page.tables import Charts
from fedtune.report.page.translations import load_catalog
from fedtune.report.page.view import pointer
from fedtune.report.signing import compute_report_digest
from fedtune.show.terminal_tables import Section, to_json_text

_MAPS = Path(__file__).with_name("maps")
_CANDIDATES = 1_000_000  # number of candidate values of a secret, such as a six-digit number
_DATA = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
LABELS: Mapping[str, str] = _DATA["labels"]  # fact that no cell shows -> its name
_BY_GATE: Mapping[str, Sequence[str]] = _DATA["by_gate"]  # fact from a verdict -> the rules that provide it

Answer = Mapping[str, str]
"""The `state` of an answer (a `CellState`), its subject (`about`) and its `text`, which is empty if it is missing."""


def read_map(name: str) -> Mapping[str, Any]:
    """Read a document's requirements: title, version, source, and number -> requirement.

    A requirement has a `text`, recorded `facts`, a sentence about the `design` of fedtune, the report.about fields that
    must be `stated`, and tasks that a `person` does outside of fedtune.
    """
    return tomllib.loads((_MAPS / f"{name}.toml").read_text(encoding="utf-8"))


def answer_requirement(
    asked: Mapping[str, Any], known: Mapping[str, str], about: Mapping[str, str]
) -> Iterator[Answer]:
    """Yield the answers to one requirement from the `known` facts and from the report.about fields in `about`."""
    for fact in asked.get("facts", ()):
        state = "missing" if fact not in known else "design" if fact in BY_DESIGN else "auto"
        yield {"state": state, "about": fact, "text": known.get(fact, "")}
    if "design" in asked:
        yield {"state": "design", "about": "", "text": asked["design"]}
    for field in asked.get("stated", ()):
        yield {"state": "site", "about": f"report.about.{field}", "text": about[field].strip()}
    for what in asked.get("person", ()):
        yield {"state": "site", "about": what, "text": ""}


def collect_known_facts(report: Report, verdict: GateVerdict | None) -> Mapping[str, str]:
    """Return fact -> its text, for all recorded facts that a requirement may refer to."""
    words, facts = Charts(report, load_catalog("en")), report.facts
    known = {
        fact: format_fact(words, pointer("cells", field, state), fact, value).striptags()
        for field, states in report.cells.items()
        for state, values in states.items()
        for fact, value in values.items()
        if value is not None
    }
    known["report_sha256"] = compute_report_digest(report)
    known["neighboring_relation"] = words.code("relation", report.neighboring_relation).unescape()
    if isinstance(epsilon := report.known.get("epsilon"), float):
        plan = facts.plan if isinstance(facts, RunFacts) and facts.plan.private else None
        spent = None if plan is None else count_charged_events(plan, plan.max_rounds)
        chance = bound_secret_chance(spent, epsilon=epsilon, delta=facts.delta, candidates=_CANDIDATES)
        known["extraction"] = (
            f"a secret with {_CANDIDATES:,} possible values is reconstructed with probability at most {chance:.2g}"
        )
    if report.signature:
        known["report_signature"] = report.signature.key
    if isinstance(facts, LedgerFacts):
        lifetimes = {facts.site: report.sites[0].lifetime}
        if facts.verification:
            known["ledger_check"] = f"the ledger verifies, with {pluralize(facts.verification.num_events, 'event')}"
    else:
        lifetimes = {site.site: site.statement.lifetime if site.statement else None for site in facts.sites}
        if facts.files:
            known["model_files"] = ", ".join(f"{name} {digest[:16]}" for name, digest in facts.files.items())
        if facts.attacks:
            known["attack_results"] = " ".join(one.sentence for one in facts.attacks.findings)
    if all(lifetimes.values()):
        known["lifetime"] = ", ".join(
            f"{site} {format_epsilon(life.epsilon)}" for site, life in lifetimes.items() if life
        )
    if verdict is not None and verdict.report_sha256 == compute_report_digest(report):
        signer = f"signed with the key {verdict.signature.key}" if verdict.signature else "not signed"
        known["gate"] = f"the model {verdict.decision} (rules {verdict.rules}, {verdict.judged}, {signer})"
        for fact, rules in _BY_GATE.items():
            if found := [verdict.reasons[rule] for rule in rules if verdict.results.get(rule) in ("passed", "failed")]:
                known[fact] = " ".join([*([known[fact]] if fact in known else []), "; ".join(found)])
    return known


def map_report(name: str, report: Report, about: AboutSpec, verdict: GateVerdict | None) -> Mapping[str, Any]:
    """Answer all requirements of a document from a report; the result is the content of the JSON file."""
    asked, known, stated = read_map(name), collect_known_facts(report, verdict), dataclasses.asdict(about)
    document = {key: asked[key] for key in ("title", "version", "source")}
    requirements = [
        {
            "number": number,
            "text": requirement["text"],
            "answers": list(answer_requirement(requirement, known, stated)),
        }
        for number, requirement in asked["requirement"].items()
    ]
    return {"map": name, **document, "report_sha256": known["report_sha256"], "requirements": requirements}


def render_map(mapped: Mapping[str, Any], *, name: str) -> Mapping[str, bytes]:
    """Render a mapped document as JSON, Markdown and HTML (file name -> content); `name` is the name of the run or
    site.
    """
    stem, values = f"map_{mapped['map']}", {"mapped": mapped, "name": name, "label": label_answer}
    values |= {"state": load_catalog("en").texts["cells"], "blank": Markup("______")}
    html = create_template_environment().get_template("requirements.html.j2").render(values)
    texts = {"json": to_json_text(mapped), "md": render_card("requirements.md.j2", **values), "html": html}
    return {f"{stem}.{ending}": text.encode() for ending, text in texts.items()}


def label_answer(answer: Answer) -> str:
    """Return the label of an answer: the name of its fact, or what a person has to supply."""
    about, catalog = answer["about"], load_catalog("en")
    if answer["state"] == "site" or not about:
        return about
    return LABELS[about] if about in LABELS else catalog.code("fact", about).unescape()


def build_map_section(mapped: Mapping[str, Any]) -> Section:
    """Build the terminal table of a mapped document: a row for each requirement, followed by a row for each of its
    answers.
    """
    words = {"auto": "record", "design": "design", "site": "person", "missing": "MISSING"}
    rows, styles = list[tuple[str, str, str]](), dict[int, str]()
    for requirement in mapped["requirements"]:
        styles[len(rows)] = "bold"
        rows.append((requirement["number"], "", requirement["text"]))
        for answer in requirement["answers"]:
            state = words[answer["state"]] if answer["text"] or answer["state"] == "missing" else "PERSON"
            styles |= {len(rows): "yellow"} if not answer["text"] else {}
            rows.append(("", state, ": ".join(part for part in (label_answer(answer), answer["text"]) if part)))
    title, notes = f"{mapped['title']}, {mapped['version']}", [f"Source: {mapped['source']}"]
    return Section(title, rows=rows, words={0, 1, 2}, whole={1}, styles=styles, notes=notes)
