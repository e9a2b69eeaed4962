"""Every command's help and JSON, as they were when somebody last read them."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import click
import pytest

from fedtune.cli.main import fedtune, main
from fedtune.ops.kits.members import REQUEST, site_init
from fedtune.privacy.policy_file import write_policy

from . import snapshots
from .widths import too_wide


def every_command() -> list[str]:
    """Each command of the command line, in words; the empty one is `fedtune` itself."""
    context, names = click.Context(fedtune), [""]
    for name in fedtune.list_commands(context):
        found = fedtune.get_command(context, name)
        names += [name, *(f"{name} {inner}" for inner in getattr(found, "commands", ()))]
    return names


@pytest.mark.parametrize("command", every_command(), ids=lambda words: words or "fedtune")
def test_help(command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    assert main([*command.split(), "--help"]) == 0
    name, shown = "-".join(["fedtune", *command.split()]), capsys.readouterr().out
    snapshots.check_text(f"{name}.txt", shown)
    assert too_wide(shown) == [], "also where the terminal is wider"


@pytest.mark.parametrize("words", ["ledger show", "ledger spent", "ledger verify", "site check-policy"])
def test_json_of_a_ledger_and_its_policy(words: str, lived: Any, command: Any) -> None:
    path = lived.policy if words.startswith("site") else lived.ledger
    outcome = command(*words.split(), str(path), "--json")
    assert outcome.code == 0, outcome.err
    snapshots.check_json(words.replace(" ", "-"), outcome.out, folder=lived.folder)


def test_json_of_an_export(lived: Any, command: Any) -> None:
    snapshots.check_json("ledger-export", command("ledger", "export", str(lived.ledger)).out, folder=lived.folder)


def test_json_of_reports(lived: Any, command: Any) -> None:
    before, after = lived.folder / "before", lived.folder / "after"
    key = str(lived.folder / "site_key.pem")
    assert command("report", str(lived.policy), "--sign", key, "--output", str(before)).code == 0
    lived.train(lived.open(), lived.proposal("triage", noise_multiplier=2.5), 2)
    assert command("report", str(lived.policy), "--output", str(after)).code == 0
    verified = command("report", "verify", str(before), "--json")
    assert verified.code == 0, verified.err
    snapshots.check_json("report-verify", verified.out, folder=lived.folder)
    changed = command("report", "diff", str(before), str(after), "--json")
    assert changed.code == 0, changed.err
    snapshots.check_json("report-diff", changed.out, folder=lived.folder)


def test_json_of_a_plan(lived: Any, tiny: Any, tmp_path: Path, command: Any) -> None:
    words = tiny("model.sha256=null", into=tmp_path)
    outcome = command("plan", *words, "--no-model", "--policy", str(lived.policy), "--json")
    assert outcome.code == 0, outcome.err
    snapshots.check_json("plan", outcome.out, folder=lived.folder)


def test_json_of_a_federation(tmp_path: Path, site_policy: Any, command: Any) -> None:
    (tmp_path / "federation.toml").write_text('name = "cardiology"\nserver = "fl.example.org:9092"\n')
    federation = tmp_path / "cardiology"
    assert command("provision", "init", str(tmp_path / "federation.toml"), "--out", str(federation)).code == 0
    (tmp_path / "north").mkdir()
    write_policy(site_policy("north"), tmp_path / "north" / "site.toml")
    request = site_init(tmp_path / "north" / "site.toml", out=None) / REQUEST
    named = ("--federation", str(federation))
    assert command("provision", "add-site", str(request), *named, "--days", "20", "--compared").code == 0
    assert zipfile.is_zipfile(federation / "sites" / "north-kit.zip")
    outcome = command("provision", "list", *named, "--json")
    snapshots.check_json("provision-list", outcome.out, folder=tmp_path)
