"""Write the privacy report of a run or of a site's ledger: guarantee, spending, and their meaning.

  fedtune report runs/tighter                        the lead's view of a run
  fedtune report site.toml --sign site_key.pem       a site's view of all its runs, signed
  fedtune report verify ledger.db.report/report.json --key HEX    check signature and epsilon
  fedtune report schema                              the JSON schema of report.json
  fedtune report runs/tighter --map art-35           also answers to the requirements of a document

Writes report.html, a self-contained page for screen and print, and report.json with all figures; with --pdf also
report.pdf, with --label a privacy label, with --registry an entry for a public registry. A run's report is written
to its folder, a ledger's report to a folder next to the ledger with the suffix .report.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

from fedtune.cli.command import Argument, AsJson, Language, Option, command, group, print_answer
from fedtune.cli.ledger import find_ledger
from fedtune.config import AboutSpec, read_saved_config
from fedtune.federation.run_folder import RunFolder
from fedtune.model.adapter_files import CARD, LABEL
from fedtune.ops.files import act_as_owner
from fedtune.ops.kits.kit_file import read_signing_key
from fedtune.privacy.accountant import format_epsilon
from fedtune.privacy.keys import parse_public_key
from fedtune.privacy.site_files import SiteFiles
from fedtune.report import signing
from fedtune.report.checks import Check, TrustedValues, check_report
from fedtune.report.derive.verdicts import explain_missing_room, find_report_outcome
from fedtune.report.facts import LedgerFacts, State
from fedtune.report.model import Report, render_schema
from fedtune.report.page.translations import load_catalog
from fedtune.show.lines import to_printable
from fedtune.show.terminal_tables import Section, say, show
from fedtune.sites.site_settings import read_site_settings
from fedtune.spec import ConfigError, RunError

app = group(__doc__, default="build")
_STYLES: Mapping[State, str] = {"within": "bold", "exceeded": "bold red", "no_guarantee": "bold yellow"}
_NO_ROOM = "bold yellow"
_LOUD = re.compile("^(Exceeded|No guarantee|Closed|Used up)")
"""First words of the verdicts that are printed in capitals."""
_MARKS: Mapping[str, tuple[str, str]] = {
    "passed": ("passed", ""),
    "failed": ("FAILED", "bold red"),
    "missing": ("NOT COMPARED", "bold yellow"),
    "skipped": ("not checked", "yellow"),
}
_MAX_PROBLEMS = 12
_VERIFIER = "verify_report.py"


@command(app, "write a report (`build` may be omitted)")
def build(
    path: Annotated[Path, Argument("PATH", help="a run folder, a ledger.db or its site.toml")],
    output: Annotated[
        Path | None, Option(metavar="DIR", help="output folder (default: the run folder, or <ledger>.report)")
    ] = None,
    language: Annotated[Language | None, Option("language of the page (default: the run's setting, else en)")] = None,
    pdf: Annotated[bool, Option("also write report.pdf (requires the extra pdf)")] = False,
    label: Annotated[bool, Option("also write label.svg, a privacy label to publish")] = False,
    registry: Annotated[bool, Option("also write registry.json, an entry for a public registry of runs")] = False,
    requirements: Annotated[
        Literal["satre", "edpb-28", "sp800-226", "art-35", "annex-xi"] | None,
        Option("also answer a document's requirements, in map_NAME.html, .md and .json", names=("--map",)),
    ] = None,
    verifier: Annotated[bool, Option("also write verify_report.py, which checks the report without fedtune")] = False,
    key: Annotated[
        Path | None,
        Option("key to sign the report: a site_key.pem, a site.toml or a lead's kit.toml", ("--sign",), metavar="KEY"),
    ] = None,
    anchor: Annotated[
        Path | None, Option(metavar="FILE", help="for a ledger: its anchor, to show that no event is missing")
    ] = None,
) -> None:
    """Write report.html and report.json for a run folder or a ledger; the word `build` is optional.

    A run's report includes site reports that are in the run folder (site_reports/NAME.json). A ledger is verified
    first, with a site.toml also against the site's key and anchor. The ledger is not changed, and the report reveals
    nothing about the records beyond earlier releases.
    """
    own = None if key is None else read_signing_key(key)
    of_policy = path.suffix == ".toml"
    if (path / "config.yaml").is_file():
        from fedtune.report import from_run

        if anchor is not None:
            bound = "is for the report of a ledger, but PATH is a run folder: remove --anchor"
            raise ConfigError("--anchor", str(anchor), bound)
        report, folder, settings = from_run.build_run_report(path), path, read_saved_config(path).report
        own_language, about, place = settings.language, settings.about, "report.about"
    else:
        from fedtune.report import from_ledger

        act_as_owner(path)
        ledger = SiteFiles.from_site_toml(path).ledger if of_policy else find_ledger(str(path))
        report = from_ledger.build_ledger_report(path if of_policy else ledger, anchor=anchor)
        folder = ledger.with_name(f"{ledger.name}.report")
        own_language, place = "en", "[about] of site.toml"
        about = read_site_settings(path).about if of_policy else AboutSpec()
    if own is not None:
        report = signing.sign_report(report, own)
        signing.verify_report_signature(report)  # a ledger's report must be signed with the key of its events
    from fedtune.data.records import resolve_file
    from fedtune.report.page.render import render_label, write_all, write_files
    from fedtune.report.registry_entry import REGISTRY, build_registry_entry, registry_entry_to_json
    from fedtune.version import find_shipped_folders

    spoken = language or own_language
    beside = {LABEL: render_label(report, language=spoken).encode()} if label else {}
    if registry:
        beside[REGISTRY] = registry_entry_to_json(report, about).encode()
    if verifier:
        beside[_VERIFIER] = resolve_file(f"verifier/{_VERIFIER}", find_shipped_folders(), key="--verifier").read_bytes()
    mapped = None
    if requirements is not None:
        from fedtune.report.gate_verdict import read_verdict
        from fedtune.report.requirements import build_map_section, map_report, render_map

        verdict = None if isinstance(report.facts, LedgerFacts) else read_verdict(folder, report)
        mapped = map_report(requirements, report, about, verdict)
        beside |= render_map(mapped, name=report.facts.name)
    paths = write_files(output or folder, report, language=spoken, pdf=pdf, beside=beside)
    if output is None and (RunFolder(folder).adapter / CARD).is_file() and not isinstance(report.facts, LedgerFacts):
        from fedtune.report.model_card import render_adapter_card

        # The label contains the hash of this report.json, whose signature decides whether the card repeats a verdict.
        write_all(folder, render_adapter_card(folder, report))
    for code in report.banners:
        say(load_catalog("en").code("banner", code).unescape(), style="bold yellow")
    said, style = format_verdict(report)
    say(said, style=style)
    if report.epsilon:
        say(load_catalog("en").text(f"publish.which_{report.facts.kind}").unescape())
    for written in (path for path in paths if path.parent == (output or folder)):
        say(f"{written.name + ':':<12} {written}")
    if registry and (missing := build_registry_entry(report, about)["missing"]):
        text = f"{REGISTRY} lacks entries that only a person can provide in {place}: {', '.join(missing)}"
        say(text, style="bold yellow")
    if mapped is not None:
        show([build_map_section(mapped)])


@command(app, "check signature and epsilon")
def verify(
    file: Annotated[str, Argument("FILE", help="a report.json, or a folder that contains one")],
    key: Annotated[
        str | None,
        Option(metavar="HEX", help="the public key that must have signed the report, from a source you trust"),
    ] = None,
    roster: Annotated[
        Path | None,
        Option(metavar="FILE", help="the federation's roster.json, with the sites' keys and the lead's signature"),
    ] = None,
    config: Annotated[str | None, Option(metavar="SHA", help="the expected SHA-256 of the run's configuration")] = None,
    model: Annotated[
        Path | None,
        Option(metavar="DIR", help="the folder of the model or of an export (default: adapter/ next to the report)"),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Verify a report: signatures, format, verdict, settings, model, and every epsilon, recomputed from the signed
    events.

    Exit code 1 if a check fails, or if a requested comparison is not possible. A report of real sites is checked
    against the given keys (--key, or --roster with the sites' keys), and against config.yaml and the model in the run
    folder; missing files are skipped.
    """
    key = parse_public_key("--key", key)
    if config is not None and (len(config) != 64 or set(config) - set("0123456789abcdef")):
        raise ConfigError("--config", config, "must be a SHA-256 of 64 lower-case hex digits")
    path, report = signing.read_report(file)
    if model is not None and not model.is_dir():
        raise ConfigError("--model", str(model), "must be a folder")
    known, of_roster = TrustedValues(key=key, config_sha256=config, model=model), list[Check]()
    if roster:
        known, *of_roster = read_roster(report, roster, known)
    found = (*check_report(path, report, known), *of_roster)
    rows, styles = list[tuple[str, ...]](), dict[int, str]()
    about = f"{report.verdict.state}, epsilon {format_epsilon(report.epsilon)} at delta {report.facts.delta:g}"
    rows.append(("reported", "", about))
    for check in found:
        mark, styles[len(rows)] = _MARKS[check.state]
        rows.append((check.name, mark, check.text))
        for problem in check.problems[:_MAX_PROBLEMS]:
            said, again = to_printable(problem.reported), to_printable(problem.expected)
            rows.append(("", "", f"{to_printable(problem.where)} is {said}, but {again} was found"))
        if len(check.problems) > _MAX_PROBLEMS:
            rows.append(("", "", f"and {len(check.problems) - _MAX_PROBLEMS:,} more"))
    section = Section(rows=rows, words={0, 1, 2}, whole={0, 1}, styles=styles)
    heading = f"{path}: report of {report.facts.kind} {to_printable(report.facts.name)}"
    figures = {"verdict": report.verdict.state, "epsilon": report.epsilon}
    print_answer({"file": str(path), **figures, "checks": found}, [section], as_json=as_json, heading=heading)
    for state, said in (("failed", "does not hold"), ("missing", "could not be checked completely; not compared")):
        if names := [check.name for check in found if check.state == state]:
            raise RunError(f"{path} {said}: {', '.join(names)}")


@command(app, "print the JSON schema of report.json")
def schema() -> None:
    """Print the JSON schema of this version's report.json."""
    sys.stdout.write(render_schema())


def read_roster(report: Report, path: Path, known: TrustedValues) -> tuple[TrustedValues, Check]:
    """Read the keys that verify a report: the site's key for a ledger's report, or the lead's key for a run's report.

    Returns:
        `known` with the key that must have signed the report, the sites' keys and the revoked sites, and the check of
        the roster.

    Raises:
        ConfigError: the roster does not list the ledger's site.
        RunError: the report and the roster are signed with different keys.
    """
    from fedtune.ops.kits.members import Roster

    roster = Roster.read(path)
    keys = {member.site: member.site_key for member in roster.sites}
    revoked = {member.site: member.revoked for member in roster.sites if member.revoked}
    if isinstance(report.facts, LedgerFacts):
        site = report.facts.site
        if (member := next((one for one in roster.sites if one.site == site), None)) is None:
            raise ConfigError("--roster", str(path), f"does not list the site {to_printable(site)}")
        text = f"{path} names this key for {site}. The lead's signature on that roster is not checked."
        if member.revoked:
            text += f" {site} was revoked at {member.revoked}; a later report does not belong to this federation."
        known = replace(known, key=known.key or member.site_key)
        return known, Check(name="roster", state="skipped", text=to_printable(text))
    signer = known.key or (report.signature.key if report.signature else "")
    try:
        roster.check_lead_signature(signer)
    except ConfigError:
        raise RunError(f"the report is not signed with the key of the lead that signed {path}") from None
    known = replace(known, key=signer, site_keys=keys, revoked=revoked)
    return known, Check(name="roster", state="passed", text=f"The key that signed the report also signed {path}.")


def format_verdict(report: Report) -> tuple[str, str]:
    """Format the verdict with its epsilon and delta, and return the text with its terminal style."""
    reasons = ", ".join(code.replace("_", " ") for code in report.verdict.reasons)
    style, facts = _NO_ROOM if explain_missing_room(report) else _STYLES[report.verdict.state], report.facts
    said = load_catalog("en").texts["verdict"][find_report_outcome(report)]
    shown = _LOUD.sub(lambda found: found.group().upper(), said) + (f" ({reasons})" if reasons else "")
    return f"{shown}: epsilon {format_epsilon(report.epsilon)} at delta {facts.delta:g} for each {facts.unit}", style
