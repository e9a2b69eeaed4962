"""Reviewed snapshots of every command's help, terminal output and JSON output.

The terminal has 80 columns; only values to copy, which are never cut, may be wider.
"""

import json
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import click
import pytest

from fedtune.cli.main import fedtune, main
from fedtune.ops.kits.members import REQUEST, initialize_site
from fedtune.privacy.keys import SigningKey
from fedtune.privacy.policy_file import write_policy

from ..conftest import list_tiny_overrides, make_site_policy, name_run, read_files, run_command, run_proposal
from . import snapshots

pytestmark = pytest.mark.usefixtures("narrow_terminal")


def list_commands() -> list[str]:
    """List all commands as words; the empty list is `fedtune` itself."""
    context, names = click.Context(fedtune), [""]
    for name in fedtune.list_commands(context):
        command = fedtune.get_command(context, name)
        names += [name, *(f"{name} {inner}" for inner in getattr(command, "commands", ()))]
    return names


@pytest.mark.parametrize("command", list_commands(), ids=lambda words: words or "fedtune")
def test_help_text_matches_its_snapshot(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    assert main([*command.split(), "--help"]) == 0
    name, output = "-".join(["fedtune", *command.split()]), capsys.readouterr().out
    own, title, groups = output.partition("\nGroups (key=option):\n")  # the same groups in every command with settings
    snapshots.check_text(f"{name}.txt", own)
    if title:
        snapshots.check_text("fedtune-groups.txt", groups)
    assert snapshots.find_wide_lines(output) == [], "although the terminal is wider"


def print_commands(*lines: str, options: tuple[str, ...] = ()) -> str:
    """Return the concatenated output of these commands, each with `options` appended."""
    output = ""
    for line in lines:
        outcome = run_command(*line.split(), *options)
        assert (outcome.code, outcome.err) == (0, ""), line
        assert snapshots.find_wide_lines(outcome.out) == [], line
        output += f"$ fedtune {line}\n{outcome.out}\n"
    return output


SITE_COMMANDS = [
    "ledger show ledger.db",
    "ledger spent ledger.db",
    "ledger verify ledger.db",
    "ledger verify ledger.db --anchor anchor.json",
    "site check-policy site.toml",
]


@pytest.mark.parametrize("words", SITE_COMMANDS)
def test_site_ledger_commands_match_their_snapshots(
    words: str, site_with_history: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(site_with_history.folder)
    name, before = (
        "-".join(word.lstrip("-") for word in words.split() if "." not in word),
        read_files(site_with_history.folder),
    )
    snapshots.check_output(name, print_commands(words))
    assert read_files(site_with_history.folder) == before, "read-only commands write nothing"


def test_json_of_policy_ledger_and_plan_matches_snapshots(site_with_history: Any, tmp_path: Path) -> None:
    """`export` contains the output of all other commands; the snapshot keeps the first event of each kind."""
    export = json.loads(run_command("ledger", "export", str(site_with_history.ledger)).out)
    kind = itemgetter("kind")
    export["events"] = [next(group) for _, group in groupby(sorted(export["events"], key=kind), key=kind)]
    snapshots.check_json("ledger-export", json.dumps(export), folder=site_with_history.folder)
    checked = run_command("site", "check-policy", str(site_with_history.site_toml), "--json")
    snapshots.check_json("site-check-policy", checked.out, folder=site_with_history.folder)
    planned = run_command(
        "plan",
        *list_tiny_overrides("model.sha256=null", into=tmp_path),
        "--policy",
        str(site_with_history.site_toml),
        "--json",
    )
    snapshots.check_json("plan", planned.printed, folder=site_with_history.folder)


def test_report_commands_match_their_snapshots(site_with_history: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(site_with_history.folder)
    assert run_command("report", "site.toml", "--sign", "site_key.pem", "--output", "before").code == 0
    key = SigningKey.load(site_with_history.folder / "site_key.pem").public
    snapshots.check_output("report", print_commands(f"report verify before --key {key}"))
    assert json.loads(run_command("report", "schema").printed)["title"] == "fedtune report"
    verified = run_command("report", "verify", "before", "--key", key, "--json")
    snapshots.check_json("report-verify", verified.out, folder=site_with_history.folder)


def test_calendar_output_matches_its_snapshot(tmp_path: Path) -> None:
    words = list_tiny_overrides(
        "privacy.unit=user", "+data.columns.user=u", "+data.columns.arrival=came", into=tmp_path
    )
    window = "privacy.cohorts={period: quarter, first: '2025-Q3', last: '2026-Q1'}"
    out = run_command("plan", *words, "privacy.planned_runs=4", "privacy.noise_multiplier=null", window).printed
    split = out.partition("Four runs a year")
    snapshots.check_output("plan-calendar", "".join(split[1:]).partition("\nWhat if")[0])


def test_approval_output_matches_its_snapshot(join_site: Any) -> None:
    here = join_site("north")
    settings = '{"training": {"learning_rate": 0.5}, "data": {"labels": ["a", "b"]}}'
    triage, later = name_run("triage", settings), name_run("follow-up", settings)
    here.state.queue_for_approval(run_proposal(run=triage), settings)
    output = print_commands("site approve", f"site approve {triage} --yes", options=here.words)
    here.state.queue_for_approval(run_proposal(run=later), settings)
    output += print_commands(f"site deny {later} --reason x", "site approve", options=here.words)
    snapshots.check_output("site-approve", output)


def test_provisioning_output_matches_its_snapshots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "federation.toml").write_text('name = "cardiology"\nserver = "fl.example.org:9092"\n')
    for name in ("north", "south"):
        (tmp_path / name).mkdir()
        write_policy(make_site_policy(name), tmp_path / name / "site.toml")
    for kit in ("kit", "new"):  # a site that joins again has a new connection key
        initialize_site(tmp_path / "south" / "site.toml", out=tmp_path / "south" / kit, new_ledger=kit == "new")
    output = print_commands(
        *("provision init federation.toml", "site init --site north/site.toml"),
        f"provision add-site north/kit/{REQUEST} --federation cardiology --days 20 --compared",
        f"provision add-site south/kit/{REQUEST} --federation cardiology --days 40 --compared",
        *("provision list --federation cardiology", "provision renew-site north --federation cardiology --days 40"),
        "provision renew-server --federation cardiology --days 1",
        "provision renew-lead --federation cardiology --days 60",
        *("provision revoke-site south --federation cardiology", "provision list --federation cardiology"),
        f"provision renew-site south south/new/{REQUEST} --federation cardiology --compared",
    )
    snapshots.check_output("provision", output)
    listing = run_command("provision", "list", "--federation", "cardiology", "--json")
    assert "PRIVATE" not in listing.out
    snapshots.check_json("provision-list", listing.out, folder=tmp_path)
