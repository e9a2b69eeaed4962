"""`fedtune gate`: decision by rules on the release of a finished run's model (output checking)."""

from __future__ import annotations

from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

from fedtune.cli.command import Argument, AsJson, Option, print_answer
from fedtune.cli.finished_run import Run
from fedtune.cli.report import read_roster
from fedtune.federation.run_folder import RunFolder
from fedtune.model.adapter_files import CARD
from fedtune.ops.kits.kit_file import read_signing_key
from fedtune.privacy.keys import parse_public_key
from fedtune.show.lines import to_printable
from fedtune.show.terminal_tables import Section, to_json_text, write_file
from fedtune.spec import RUN_SCHEMA, ConfigError, RunError

_MARKS = {"passed": ("holds", ""), "failed": ("FAILS", "bold red"), "missing": ("MISSING", "bold red")}


def gate(
    run: Run,
    rules: Annotated[str, Argument("RULES", help="default, tre, or the path of a rules file")] = "default",
    audit: Annotated[Path | None, Option("run folder of an audit of the same plan and model", metavar="RUN")] = None,
    groups: Annotated[Path | None, Option("output of fedtune compare RUN --by COLUMN --json", metavar="FILE")] = None,
    signer: Annotated[
        str | None,
        Option("the key that must have signed the report, from a source you trust", ("--key",), metavar="HEX"),
    ] = None,
    roster: Annotated[Path | None, Option("the federation's roster.json, with the sites' keys", metavar="FILE")] = None,
    key: Annotated[
        Path | None, Option("signing key: a lead's kit.toml, a site.toml or a PEM file", ("--sign",), metavar="KEY")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Decide by rules whether a finished run's model may be released, and write down the decision.

      fedtune gate runs/tighter                          fedtune's default rules
      fedtune gate runs/tighter tre --roster roster.json --audit runs/audited    for a trusted research environment
      fedtune gate runs/tighter rules.toml --sign kit.toml                       your own rules, with a signed decision

    Exit code 1 if a rule fails or the run is a simulation. A rule also fails if its evidence is missing, such as an
    audit; the output names the command for it. The decision is written to gate.json in the run folder. The model card
    and the cards of later exports repeat it only if --sign names the key that signed the report. See docs/report.md for
    each rule.
    """
    signer = parse_public_key("--key", signer)
    own = None if key is None else read_signing_key(key)
    from fedtune.ops.kits.members import Roster
    from fedtune.report import gate_rules, gate_verdict, signing  # they import torch, which takes seconds
    from fedtune.report.checks import TrustedValues
    from fedtune.report.model_card import render_adapter_card
    from fedtune.version import __version__

    limits, digest = gate_rules.read_rules(rules)
    known = TrustedValues(key=signer)
    if roster is not None:
        Roster.read(roster)
        with suppress(RunError, ConfigError):  # the rule `signed` reports an unsigned report
            known, _ = read_roster(signing.read_report(str(run))[1], roster, known)
    evidence = gate_rules.collect_evidence(run, known, audit=audit, groups=groups)
    found = gate_rules.judge_run(limits, evidence)
    verdict = gate_verdict.GateVerdict(
        schema_version=RUN_SCHEMA,
        fedtune_version=__version__,
        judged=f"{datetime.now(UTC):%Y-%m-%d}",
        run=evidence.facts.run,
        adapter_digest=evidence.facts.adapter_digest,
        report_sha256=signing.compute_report_digest(evidence.report),
        simulated=evidence.facts.simulated,
        rules=limits.name,
        rules_sha256=digest,
        limits={rule: to_json_text(limit).strip() for rule, limit in limits.limits.items()},
        results={check.name: check.state for check in found},
        reasons={check.name: check.text for check in found},
    )
    verdict = verdict if own is None else verdict.sign(own)
    write_file(run / gate_verdict.GATE, gate_verdict.verdict_to_json(verdict), option="RUN")
    # The model card reads the decision from the folder. It also repeats the report, so both must be of this model.
    matches = (RunFolder(run).adapter / CARD).is_file() and not {"consistent", "files"} & set(verdict.failed)
    cards = render_adapter_card(run, evidence.report) if matches else {}
    for name, content in cards.items():
        write_file(run / name, content, option="RUN")
    rows = [(check.name, _MARKS[check.state][0], to_printable(check.text)) for check in found]
    styles = {number: _MARKS[check.state][1] for number, check in enumerate(found)}
    notes = [f"written: {run / name}" for name in (gate_verdict.GATE, *cards)]
    section = Section(rows=rows, words={0, 1, 2}, whole={0, 1}, styles=styles, notes=notes)
    heading = f"{run} by the rules {limits.name}: the model {'may' if verdict.passed else 'must NOT'} be released"
    figures = {"passed": verdict.passed, "verdict": verdict}
    print_answer(figures, [section], as_json=as_json, heading=heading)
    if not verdict.passed:
        raise RunError(f"the model of {run} {verdict.decision}")
