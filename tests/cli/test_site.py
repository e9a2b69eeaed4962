"""`fedtune site`: the template is a policy, and a policy's meaning is said in words with the ledger's own figures."""

import dataclasses
import json
import re
import shutil
import tomllib
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from fedtune.api.config_groups import config_folder
from fedtune.privacy import accountant
from fedtune.privacy.policy_file import read_policy
from fedtune.show.budget_text import amount_of

from ..conftest import command
from . import snapshots


def keys_in(table: Any, prefix: str = "") -> set[str]:
    if isinstance(table, list | tuple) and table and isinstance(table[0], dict):
        return keys_in(table[0], prefix)
    if not isinstance(table, dict) or prefix in ("dataset.columns.", "trust.members."):
        return {prefix.removesuffix(".")}
    return {leaf for name, value in table.items() for leaf in keys_in(value, f"{prefix}{name}.")}


def test_the_template_is_a_policy_that_lets_nobody_ask_until_it_is_filled_in(tmp_path: Path) -> None:
    out, file = command("site", "template").printed, tmp_path / "site.toml"
    assert out == (config_folder() / "site.toml").read_text(encoding="utf-8")
    file.write_text(out)
    fresh = command("site", "check-policy", str(file), "--json")
    open_ = {"asserted.no_person_at_another_site", "allow.leads", "allow.base_models"}
    assert (fresh.code, {one["key"] for one in json.loads(fresh.out)["warnings"]}) == (0, open_)
    answered = out.replace("# no_person_at_another_site = ?", "no_person_at_another_site = true")
    file.write_text(answered)
    assert read_policy(file).site == "north-hospital"
    told = json.loads(command("site", "check-policy", str(file), "--json").out)["warnings"]
    warnings = {warning["key"]: warning["text"] for warning in told}
    assert warnings.keys() == {"allow.leads", "allow.base_models"}
    assert warnings["allow.leads"] == "empty: every request is refused"
    # It sets and explains every key.
    assert keys_in(tomllib.loads(answered)) == keys_in(dataclasses.asdict(read_policy(file)))
    for before, line in pairwise(out.splitlines()):
        explained = before.startswith("#") or re.match(
            r"(max_local_steps|path|max_epsilon_per_period|max_lora_scale) = ", before
        )
        assert explained or not re.match(r"\w+ = ", line), line


@pytest.mark.parametrize("words", [("init", "--site"), ("doctor", "--kit", "kit", "--site")])
def test_no_command_but_check_policy_takes_a_policy_without_answers(words: tuple[str, ...], site: Any) -> None:
    site.write_policy(no_person_at_another_site=None)
    outcome = command("site", *words, str(site.site_toml))
    said = " ".join((outcome.out + outcome.err).split())
    assert outcome.code == 2
    assert re.search(r"asserted.no_person_at_another_site:? must be true", said)
    assert not (site.folder / "kit").exists()


def test_check_policy_prints_the_ledgers_own_figures(site: Any) -> None:
    reference = read_policy(site.site_toml).budget.reference
    amount = json.loads(command("site", "check-policy", str(site.site_toml), "--json").out)["amount"]
    assert amount["reference_pld"] == accountant.epsilon_pld([reference.event], 1e-5)
    assert site.open().history.order == amount["order"]
    left = json.loads(command("ledger", "spent", str(site.ledger), "--json").out)["reference_runs_left"]
    assert left == amount["runs_in_lifetime"]
    assert dataclasses.asdict(amount_of(read_policy(site.site_toml))) == amount


@snapshots.mistakes("site-warnings")
def test_what_is_warned_of(typed: str, site: Any) -> None:
    site.write_policy(**{"anchor": '"elsewhere/anchor.json"', **json.loads(typed)})  # by itself there is no warning
    out = command("site", "check-policy", str(site.site_toml), "--json").printed
    (warning,) = json.loads(out)["warnings"]
    snapshots.check_message("site-warnings", typed, f"{warning['key']}: {warning['text']}")


def test_a_place_holder_never_passes_for_a_lead_s_key(site: Any) -> None:
    # Only zeros is a point of small order: anybody can make signatures that verify under it.
    site.write_policy(leads=f'["{"0" * 64}"]')
    outcome = command("site", "check-policy", str(site.site_toml))
    assert outcome.code == 2 or "anybody can sign for it" in outcome.out


@snapshots.mistakes("site-ledgers")
def test_a_ledger_of_something_else(typed: str, lived: Any) -> None:
    lived.write_policy(**json.loads(typed))
    outcome = command("site", "check-policy", str(lived.site_toml))
    message = outcome.failed().removeprefix(f"{lived.site_toml}: ")
    snapshots.check_message("site-ledgers", typed, message)
    assert "It does not fit this policy" in outcome.out
    told = json.loads(command("site", "check-policy", str(lived.site_toml), "--json").out)["ledger"]
    assert [difference["key"] for difference in told["differences"]] == [message.partition(" = ")[0]]


def test_another_key_does_not_fit_and_missing_files_beside_a_ledger_are_warned_of(lived: Any) -> None:
    key = lived.folder / "site_key.pem"
    shutil.copy(lived.folder / "lead.pem", key)
    assert "site_key" in command("site", "check-policy", str(lived.site_toml)).failed()
    for path in (lived.anchor, key):
        path.unlink()
    told = json.loads(command("site", "check-policy", str(lived.site_toml), "--json").out)["warnings"]
    assert {warning["key"] for warning in told} == {"site_key", "anchor"}


def test_a_ledger_that_was_put_back_is_exit_code_one(put_back: Any) -> None:
    assert "put back" in command("site", "check-policy", str(put_back.site_toml)).failed(1)
