"""What `fedtune report verify` checks of a report, and what each check came to."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fedtune.config import RunConfig, saved_config
from fedtune.federation.run_folder import RunFolder
from fedtune.report import recompute, signing
from fedtune.report.derive.facts import settings_problems
from fedtune.report.model import Problem, Report, SiteReport
from fedtune.spec import REPORT_SCHEMA, ConfigError, RunError
from fedtune.words import counted


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """One check and what it came to.

    Attributes:
        name: "schema", "signature", "figures", "verdict", "taken" or "configuration".
        text: the result, in a sentence.
        problems: what differs.
    """

    name: str
    state: Literal["right", "wrong", "not_checked"]
    text: str
    problems: tuple[Problem, ...] = ()


def check_report(path: Path, report: Report, *, key: str | None, config_sha256: str | None = None) -> tuple[Check, ...]:
    """`checks` of a report that lies at `path`, with the settings that lie beside a run's."""
    of_run = report.kind == "run" and RunFolder(path.parent).config.is_file()
    config = saved_config(path.parent) if of_run else None
    return checks(report, key=key, config_sha256=config_sha256, config=config)


def checks(
    report: Report, *, key: str | None, config_sha256: str | None = None, config: RunConfig | None = None
) -> tuple[Check, ...]:
    """All checks of a report.

    Args:
        report: that was read, and so has the form of one.
        key: public key that must have signed it, if one is known from elsewhere.
        config_sha256: hash that the run's settings must have, if it is known.
        config: the run's settings, where they are at hand.
    """
    form = Check(name="schema", state="right", text=f"It is a report of schema version {REPORT_SCHEMA}.")
    return (
        form,
        _signature(report, key),
        *_figures(report),
        *_taken(report),
        _configuration(report, config_sha256, config),
    )


def _signature(report: Report, key: str | None) -> Check:
    try:
        signer = signing.check(report, expected_key=key)
    except RunError as error:
        return Check(name="signature", state="wrong", text=f"{str(error)[0].upper()}{str(error)[1:]}.")
    if signer is None:
        text = "It is not signed: anybody could have changed what cannot be computed again."
        return Check(name="signature", state="not_checked", text=text)
    if key is None:
        text = (
            f"It was made with the key in the file, {signer}: not checked. Anybody can sign with a key of their own; "
            "give the key that you know with --key."
        )
        return Check(name="signature", state="not_checked", text=text)
    return Check(name="signature", state="right", text=f"It is signed with the key {key}, and nothing was changed.")


def _figures(report: Report) -> Iterator[Check]:
    problems = recompute.problems(report)
    of_verdict = tuple(problem for problem in problems if ".verdict." in f".{problem.where}")
    others = tuple(problem for problem in problems if problem not in of_verdict)
    events = sum(charge.count for site in report.sites for row in site.mechanisms for charge in row.charges)
    again = f"computed again from the {events:,} mechanisms that {counted(len(report.sites), 'site')} ran"
    if others:
        yield Check(
            name="figures", state="wrong", text=f"{counted(len(others), 'figure')} not as {again}:", problems=others
        )
    else:
        yield Check(name="figures", state="right", text=f"Each epsilon that its events give, {again}, is as it says.")
    if of_verdict:
        yield Check(name="verdict", state="wrong", text="The verdict does not fit the figures:", problems=of_verdict)
    else:
        yield Check(name="verdict", state="right", text="No verdict is better than its figures.")


def _taken(report: Report) -> Iterator[Check]:
    """What no event in the report gives: a joined ledger's figures over all its runs."""
    if joined := [f"{site.site} ({site.reported or 'undated'})" for site in report.sites if _is_joined(site)]:
        text = (
            f"Not computed again: the figures over all runs of {', '.join(joined)} (spent, set aside, left, period, "
            "runs). The lead took them from the site's own report, whose signature is not in this file."
        )
        yield Check(name="taken", state="not_checked", text=text)


def _is_joined(site: SiteReport) -> bool:
    return site.source == "signed_site_report" and site.lifetime is not None


def _configuration(report: Report, sha256: str | None, config: RunConfig | None) -> Check:
    """The run's settings against the report: their digest, and the plan that they give."""
    if report.kind == "ledger":
        text = "A ledger covers many runs and has no single configuration."
        return Check(name="configuration", state="not_checked", text=text)
    problems = [*settings_problems(report, config)] if config is not None else []
    said = report.provenance.config_sha256
    if sha256 not in (None, said):
        problems.insert(0, Problem("provenance.config_sha256", said, sha256))
    if problems:
        text = "The run's settings say something else:"
        return Check(name="configuration", state="wrong", text=text, problems=tuple(problems))
    if config is not None:
        text = "The run's config.yaml gives the same noise, sampling rate, clip norm, steps, rounds and epsilon."
        return Check(name="configuration", state="right", text=text)
    text = (
        "The run's config.yaml does not lie beside the report: nobody compared noise, sampling rate and steps with it."
    )
    if sha256 is not None:
        text = f"It is of the configuration {sha256}, whose settings are not at hand: {text[0].lower()}{text[1:]}"
    return Check(name="configuration", state="not_checked", text=text)


def read_report(name: str) -> tuple[Path, Report]:
    """The report in a file, or in the report.json of a folder.

    Raises:
        ConfigError: there is none.
    """
    path = Path(name) / "report.json" if Path(name).is_dir() else Path(name)
    bound = "must be a report.json, or a folder with one"
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a pipe would wait for ever
            raise ConfigError("report", name, bound)
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError("report", name, f"{bound} ({error.strerror})") from None
    try:
        return path, signing.read(data)
    except ConfigError as error:
        raise error.in_file(path) from None
