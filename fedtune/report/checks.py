"""The checks of `fedtune report verify`, each with its result."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fedtune.config import RunConfig, saved_config
from fedtune.federation.run_folder import LABEL, RunFolder
from fedtune.report import signing
from fedtune.report.derive import cells
from fedtune.report.facts import RunFacts
from fedtune.report.model import Problem, Report
from fedtune.report.rederive import problems
from fedtune.spec import REPORT_SCHEMA, RunError
from fedtune.version import __version__
from fedtune.words import counted

_CALIBRATED, _STEP = 1e-3, 1e-4
"""How much less noise than searched for here another version may have found, relatively, and how much more: a step."""


@dataclass(frozen=True, slots=True)
class Check:
    """One check with its result in a sentence; `name` is what was checked, or the file drawn from the report."""

    name: str
    state: Literal["right", "wrong", "not_checked"]
    text: str
    problems: tuple[Problem, ...] = ()


def check_report(path: Path, report: Report, *, key: str | None, config_sha256: str | None = None) -> tuple[Check, ...]:
    """All checks of a report that was read from `path`; its run's settings and its drawings may lie beside it.

    Where they are known from elsewhere: the `key` that must have signed it, and the hash that the settings must have.
    """
    of_run = isinstance(report.facts, RunFacts) and RunFolder(path.parent).config.is_file()
    found = (
        Check("schema", "right", f"It is a report of schema version {REPORT_SCHEMA}."),
        _signature(report, key),
        *_figures(report),
        *_taken(report),
        _configuration(report, config_sha256, saved_config(path.parent) if of_run else None),
    )
    return (*found, *_drawn(path, report)) if all(check.state != "wrong" for check in found) else found


def _signature(report: Report, key: str | None) -> Check:
    try:
        signer = signing.check(report, expected_key=key)
    except RunError as error:
        return Check("signature", "wrong", f"{str(error)[0].upper()}{str(error)[1:]}.")
    if signer is not None and key is not None:
        return Check("signature", "right", f"It is signed with the key {key}, and nothing was changed.")
    text = "It is not signed: anybody could have changed what cannot be computed again."
    if signer is not None:
        text = (
            f"It was made with the key in the file, {signer}: not checked. Anybody can sign with a key of their own; "
            "give the key that you know with --key."
        )
    return Check("signature", "not_checked", text)


def _figures(report: Report) -> Iterator[Check]:
    found = problems(report)
    of_verdict = tuple(problem for problem in found if ".verdict." in f".{problem.where}")
    others = tuple(problem for problem in found if problem not in of_verdict)
    events = sum(charge.count for site in report.sites for row in site.mechanisms for charge in row.charges)
    again = f"computed again from the {events:,} mechanisms that {counted(len(report.sites), 'site')} ran"
    right, wrong = f"Each epsilon that its events give, {again}, is as it says.", counted(len(others), "figure")
    for name, those, if_right, if_wrong in (
        ("figures", others, right, f"{wrong} not as {again}:"),
        ("verdict", of_verdict, "No verdict is better than its figures.", "The verdict does not fit the figures:"),
    ):
        yield Check(name, "wrong" if those else "right", if_wrong if those else if_right, those)


def _taken(report: Report) -> Iterator[Check]:
    """Name the figures of joined ledgers over all their runs, which no fact in the report gives."""
    sites = report.facts.sites if isinstance(report.facts, RunFacts) else ()
    told = [(site.site, site.statement.date) for site in sites if site.statement]
    if joined := [f"{site} ({day or 'undated'})" for site, day in told]:
        text = (
            f"Not computed again: the figures over all runs of {', '.join(joined)} (spent, set aside, left, period, "
            "runs). The lead took them from the site's own report, whose signature is not in this file."
        )
        yield Check("taken", "not_checked", text)


def _drawn(path: Path, report: Report) -> Iterator[Check]:
    """Compare the page and the label beside a report with what is drawn from it: equal reports give equal bytes."""
    from fedtune.report.page.catalogue import LANGUAGES
    from fedtune.report.page.render import as_svg, render

    for name, draw in (("report.html", render), (LABEL, as_svg)):
        file = path.with_name(name)
        if not file.is_file():
            continue
        content = file.read_bytes() if file.stat().st_size <= signing.MOST_BYTES else b""
        if any(draw(report, language=language).encode() == content for language in LANGUAGES):
            yield Check(name, "right", "It shows what the report says, byte for byte.")
        elif report.facts.provenance.fedtune_version == __version__:
            text = f"It is not what fedtune draws of this report: write it anew with fedtune report {path.parent}."
            yield Check(name, "wrong", text)
        else:
            text = f"Not compared: fedtune {__version__} may draw it in another form."
            yield Check(name, "not_checked", text)


def settings_problems(facts: RunFacts, config: RunConfig) -> Iterator[Problem]:
    """Every fact of a run that its settings deny.

    Guarantee: where there is none, each number of the plan, and so each mechanism, is the one that the settings ask
    for; what the report says of data, model and settings is what they say.  That they are the run's own shows their
    digest.  What a base that an export wrote comes from, they do not say.
    """
    if config.digest() != facts.provenance.config_sha256:
        yield Problem("provenance.config_sha256", facts.provenance.config_sha256, config.digest())
        return
    plan, said, noise = config.plan(), facts.plan, facts.plan.noise_multiplier
    # Noise that was searched for may differ by what two versions of the search find; one version finds no more.
    more = _STEP * max(1.01, noise / 10) if facts.provenance.fedtune_version != __version__ else 0.0
    searched = config.privacy.noise_multiplier is None and noise > 0
    if searched and -_CALIBRATED * noise <= noise - plan.noise_multiplier <= more:
        plan = dataclasses.replace(config, privacy=dataclasses.replace(config.privacy, noise_multiplier=noise)).plan()
    made, start = facts.provenance, facts.provenance.start_adapter
    began = config.model.adapter_sha256 or (start and start.digest)  # what a base or records owe stands in no settings
    for where, is_so, asked in (
        *((f"plan.{key.name}", getattr(said, key.name), getattr(plan, key.name)) for key in dataclasses.fields(plan)),
        *((key, getattr(facts, key), asked) for key, asked in cells.facts_of(config, plan).items()),
        *((f"provenance.{key}", getattr(made, key), asked) for key, asked in cells.provenance_of(config).items()),
        ("seeded_noise", facts.seeded_noise, facts.seeded_noise or config.runtime.seeded_noise),
        ("provenance.start_adapter", start and start.digest, began),
        ("provenance.start_adapter.public", bool(start and start.public), config.public.train_file is not None),
        ("sites", facts.declared_sizes, dict(config.declared_sizes())),
    ):
        if is_so != asked:
            yield Problem(where, is_so, asked)


def _configuration(report: Report, sha256: str | None, config: RunConfig | None) -> Check:
    """The run's settings against the report: their digest, and the plan that they give."""
    facts, name = report.facts, "configuration"
    if not isinstance(facts, RunFacts):
        return Check(name, "not_checked", "A ledger covers many runs and has no single configuration.")
    said = facts.provenance.config_sha256
    found = [Problem("provenance.config_sha256", said, sha256)] if sha256 not in (None, said) else []
    found += settings_problems(facts, config) if config is not None else ()
    if found:
        return Check(name, "wrong", "The run's settings say something else:", tuple(found))
    if config is not None:
        text = "The run's config.yaml gives the same noise, sampling rate, clip norm, steps, rounds and epsilon."
        return Check(name, "right", text)
    first = "The" if sha256 is None else f"It is of the configuration {sha256}, whose settings are not at hand: the"
    text = "run's config.yaml does not lie beside the report: nobody compared noise, sampling rate and steps with it."
    return Check(name, "not_checked", f"{first} {text}")
