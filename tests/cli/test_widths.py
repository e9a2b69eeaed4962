"""Nothing is wider than 80 columns: help, tables, steps to take, errors; and what is copied from there is whole."""

from __future__ import annotations

import io
from collections.abc import Callable
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import pytest

from fedtune.cli.main import main
from fedtune.ops.kits.members import REQUEST, site_init
from fedtune.privacy.policy_file import write_policy
from fedtune.privacy.site_policy import Policy

from .conftest import Here
from .widths import COLUMNS, too_wide


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(COLUMNS))


WORDS = (["show"], ["show", "--rounds"], ["spent"], ["verify"], ["show", "--last", "1"])


@pytest.mark.parametrize("words", WORDS, ids=" ".join)
def test_a_ledger(words: list[str], lived: Any, command: Any) -> None:
    outcome = command("ledger", *words, str(lived.ledger))
    assert outcome.code == 0, outcome.err
    assert too_wide(outcome.out) == []
    assert str(lived.ledger) in outcome.out


def test_a_policy_with_its_keys_whole(lived: Any, command: Any) -> None:
    out = command("site", "check-policy", str(lived.policy)).out
    assert too_wide(out) == []
    assert lived.lead.public in out
    assert str(lived.anchor) in out


def test_runs_that_wait(joined: Callable[..., Here], run_proposal: Any, command: Any) -> None:
    here = joined("north")
    here.state.wait_for_approval(run_proposal(run="triage"), "experiment: {training: {learning_rate: 0.5}}")
    for words in (("approve",), ("approve", "triage", "--yes"), ("deny", "triage", "--reason", "x"), ("approve",)):
        outcome = command("site", *words, *here.words)
        assert too_wide(outcome.out) == [], words


def test_a_federation_from_its_file(
    tmp_path: Path, site_policy: Callable[..., Policy], command: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "federation.toml").write_text('name = "cardiology"\nserver = "fl.example.org:9092"\n')
    (tmp_path / "north").mkdir()
    write_policy(site_policy("north"), tmp_path / "north" / "site.toml")
    named, request = ("--federation", "cardiology"), f"north/kit/{REQUEST}"
    for words in (
        ("provision", "init", "federation.toml"),
        ("site", "init", "--site", "north/site.toml"),
        ("provision", "add-site", request, *named, "--days", "20", "--compared"),
        ("provision", "list", *named),
        ("provision", "renew-site", "north", request, *named, "--compared"),
        ("provision", "renew-server", *named),
        ("provision", "revoke-site", "north", *named),
        ("provision", "list", *named),
    ):
        outcome = command(*words)
        assert outcome.code == 0, outcome.err
        assert outcome.out
        assert too_wide(outcome.out) == [], words


class Terminal(io.StringIO):
    """What a process takes for one."""

    def isatty(self) -> bool:
        return True


def test_an_error_is_broken_on_a_terminal_and_one_line_in_a_log(tmp_path: Path, site_policy: Any) -> None:
    write_policy(site_policy("north"), tmp_path / "site.toml")
    site_init(tmp_path / "site.toml", out=None)
    wrong = ["site", "init", "--site", str(tmp_path / "site.toml")]
    for words in (wrong, ["simulate", "privacy.epsilon=0", "--surely"], ["report", "none"]):
        terminal, log = Terminal(), io.StringIO()
        with redirect_stderr(terminal):
            code = main(words)
        with redirect_stderr(log):
            assert main(words) == code == 2
        assert too_wide(terminal.getvalue()) == []
        assert len(log.getvalue().splitlines()) == 1
        assert terminal.getvalue().split() == log.getvalue().split()
