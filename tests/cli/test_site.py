"""`fedtune site`: the template is a policy, and a policy's meaning is said in words with the ledger's own figures."""

import dataclasses
import json
import re
import shutil
import tomllib
import typing
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from fedtune.api.experiment_file import config_folder
from fedtune.privacy import accountant
from fedtune.privacy.policy_file import read_policy
from fedtune.privacy.site_policy import Policy
from fedtune.show.budget_text import amount_of

from . import snapshots


def keys_of(cls: Any = Policy, prefix: str = "") -> set[str]:
    """Dotted keys of everything a policy can say, lists of tables as one."""
    keys: set[str] = set()
    for name, hint in typing.get_type_hints(cls).items():
        inner = next((part for part in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(part)), None)
        keys |= keys_of(inner, f"{prefix}{name}.") if inner else {prefix + name}
    return keys


def keys_in(table: Any, prefix: str = "") -> set[str]:
    if isinstance(table, list) and table and isinstance(table[0], dict):
        return keys_in(table[0], prefix)
    if not isinstance(table, dict) or prefix in ("dataset.columns.", "trust.members."):
        return {prefix.removesuffix(".")}
    return {leaf for name, value in table.items() for leaf in keys_in(value, f"{prefix}{name}.")}


def test_the_template_is_a_policy(command: Any, tmp_path: Path) -> None:
    out = command("site", "template").printed
    assert out == (config_folder() / "site.toml").read_text(encoding="utf-8")
    (tmp_path / "site.toml").write_text(answered(out))
    assert read_policy(tmp_path / "site.toml").site == "north-hospital"


def answered(template: str) -> str:
    """The template with an answer to what a person must state."""
    return template.replace("# no_person_at_another_site = ?", "no_person_at_another_site = true")


@pytest.mark.parametrize("words", [("check-policy",), ("init", "--site"), ("doctor", "--kit", "kit", "--site")])
def test_no_command_takes_a_policy_without_answers(words: tuple[str, ...], site: Any, command: Any) -> None:
    site.write_policy(no_person_at_another_site=None)
    outcome = command("site", *words, str(site.site_toml))
    assert outcome.code == 2
    assert re.search(
        r"asserted.no_person_at_another_site:? must be true", " ".join((outcome.out + outcome.err).split())
    )
    assert not (site.folder / "kit").exists()


def test_the_template_sets_and_explains_every_key() -> None:
    text = (config_folder() / "site.toml").read_text(encoding="utf-8")
    assert keys_in(tomllib.loads(answered(text))) == keys_of()
    for before, line in pairwise(text.splitlines()):
        if re.match(r"\w+ = ", line):
            explained = before.startswith("#") or re.match(
                r"(max_local_steps|path|max_epsilon_per_period|max_lora_scale) = ", before
            )
            assert explained, line


def test_the_template_lets_nobody_ask_until_it_is_filled_in(command: Any, tmp_path: Path) -> None:
    (tmp_path / "site.toml").write_text(answered((config_folder() / "site.toml").read_text(encoding="utf-8")))
    outcome = command("site", "check-policy", str(tmp_path / "site.toml"), "--json")
    warnings = {warning["key"]: warning["text"] for warning in json.loads(outcome.out)["warnings"]}
    assert warnings.keys() == {"allow.leads", "allow.base_models"}
    assert warnings["allow.leads"] == "empty: every request is refused"


def test_the_figures_are_the_ledger_s(site: Any, command: Any) -> None:
    amount = json.loads(command("site", "check-policy", str(site.site_toml), "--json").out)["amount"]
    policy = read_policy(site.site_toml)
    assert amount["reference_pld"] == accountant.epsilon_pld([policy.budget.reference.event], 1e-5)
    assert site.open().history.order == amount["order"]
    left = json.loads(command("ledger", "spent", str(site.ledger), "--json").out)["reference_runs_left"]
    assert left == amount["runs_in_lifetime"]
    assert dataclasses.asdict(amount_of(policy)) == amount


def test_what_the_caps_come_to_has_the_noise_that_the_site_promises(site: Any, command: Any) -> None:
    reference = read_policy(site.site_toml).budget.reference
    site.write_policy(noise_factor="2.0")
    amount = json.loads(command("site", "check-policy", str(site.site_toml), "--json").out)["amount"]
    own = dataclasses.replace(reference, noise_multiplier=2 * reference.noise_multiplier)
    assert amount["reference_pld"] == accountant.epsilon_pld([own.event], 1e-5)
    assert f"by what you promise {own.noise_multiplier:g}) costs epsilon" in " ".join(
        command("site", "check-policy", str(site.site_toml)).out.split()
    )
    site.open()
    left = json.loads(command("ledger", "spent", str(site.ledger), "--json").out)["reference_runs_left"]
    assert left == amount["runs_in_lifetime"]


@snapshots.mistakes("site-warnings")
def test_what_is_warned_of(typed: str, site: Any, command: Any) -> None:
    site.write_policy(**{"anchor": '"elsewhere/anchor.json"', **json.loads(typed)})  # by itself there is no warning
    out = command("site", "check-policy", str(site.site_toml), "--json").printed
    (warning,) = json.loads(out)["warnings"]
    snapshots.check_message("site-warnings", typed, f"{warning['key']}: {warning['text']}")


def test_delta_is_compared_with_all_data_sets_together(site: Any, command: Any) -> None:
    site.write_policy(delta="1e-4")
    text = site.site_toml.read_text()
    site.site_toml.write_text(text.replace("[budget]", '[[dataset]]\nid = "more"\ndeclared_size = 2000\n\n[budget]'))
    message = command("site", "check-policy", str(site.site_toml)).failed()
    bound = "must be below 1 / 10,000 = 0.0001, with the declared sizes of all data sets added up"
    assert message == f"{site.site_toml}: budget.delta = 0.0001: {bound}"


def test_a_place_holder_never_passes_for_a_lead_s_key(site: Any, command: Any) -> None:
    # Only zeros is a point of small order: anybody can make signatures that verify under it.
    site.write_policy(leads=f'["{"0" * 64}"]')
    outcome = command("site", "check-policy", str(site.site_toml))
    assert outcome.code == 2 or "anybody can sign for it" in outcome.out


@snapshots.mistakes("site-ledgers")
def test_a_ledger_of_something_else(typed: str, lived: Any, command: Any) -> None:
    lived.write_policy(**json.loads(typed))
    outcome = command("site", "check-policy", str(lived.site_toml))
    message = outcome.failed().removeprefix(f"{lived.site_toml}: ")
    snapshots.check_message("site-ledgers", typed, message)
    assert "It does not fit this policy" in outcome.out
    told = json.loads(command("site", "check-policy", str(lived.site_toml), "--json").out)["ledger"]
    assert [difference["key"] for difference in told["differences"]] == [message.partition(" = ")[0]]


def test_another_key_does_not_fit(lived: Any, command: Any) -> None:
    shutil.copy(lived.folder / "lead.pem", lived.folder / "site_key.pem")
    assert "site_key" in command("site", "check-policy", str(lived.site_toml)).failed()


def test_missing_files_beside_a_ledger_are_warned_of(lived: Any, command: Any) -> None:
    for path in (lived.anchor, lived.folder / "site_key.pem"):
        path.unlink()
    told = json.loads(command("site", "check-policy", str(lived.site_toml), "--json").out)["warnings"]
    assert {warning["key"] for warning in told} == {"site_key", "anchor"}


def test_a_ledger_that_was_put_back_is_exit_code_one(put_back: Any, command: Any) -> None:
    assert "put back" in command("site", "check-policy", str(put_back.site_toml)).failed(1)
