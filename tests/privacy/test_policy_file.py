"""site.toml: strict parsing, serialization that reads back, and a template that explains every key."""

import dataclasses
import json
import math
import re
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.privacy.ledger.site_ledger import SiteLedger
from fedtune.privacy.policy_file import decode_policy_json, read_policy, write_policy
from fedtune.privacy.release import Reason
from fedtune.privacy.site_files import SiteFiles
from fedtune.privacy.site_policy import Asserted, Dataset, Policy
from fedtune.sites.site_settings import read_site_settings
from fedtune.spec import ConfigError

from .builders import change_values, lead_key, make_policy, make_proposal, read_refusal_reason, reserve, site_key

MISTAKES = tomllib.loads(Path(__file__).with_name("mistakes.toml").read_text())["mistake"]
TEMPLATE = Path(__file__).parents[2] / "conf" / "site.toml"


@pytest.fixture
def site_toml(tmp_path: Path) -> Path:
    write_policy(make_policy(), tmp_path / "site.toml")
    return tmp_path / "site.toml"


@pytest.fixture
def filled_template(tmp_path: Path) -> Path:
    """The template with its one question answered."""
    text, count = re.subn(r"^# (no_person_at_another_site) = \?$", r"\1 = false", TEMPLATE.read_text(), flags=re.M)
    assert count == 1
    (tmp_path / "filled_in.toml").write_text(text)
    return tmp_path / "filled_in.toml"


def read_error(path: Path, *edits: tuple[str, str]) -> str:
    """Return the error after replacing text that occurs once in the file."""
    text = path.read_text()
    for old, new in edits:
        assert text.count(old) == 1, (old, text)
        text = text.replace(old, new)
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_policy(path)
    assert str(caught.value).startswith(f"{path}: ") or str(path) in str(caught.value)
    return str(caught.value).removeprefix(f"{path}: ")


def test_policy_round_trips_through_its_file(tmp_path: Path) -> None:
    for policy in (
        make_policy(),
        make_policy(budget={"max_epsilon": math.inf, "max_epsilon_per_run": 3, "max_epsilon_per_period": 9.5}),
        make_policy(allow={"leads": (), "target_modules": ()}, anchor="/elsewhere/anchor.json"),
    ):
        write_policy(policy, tmp_path / "site.toml")
        assert read_policy(tmp_path / "site.toml") == policy
        assert decode_policy_json(json.loads(json.dumps(policy.to_json()))) == policy


def test_omitted_keys_have_the_defaults_of_the_template(site_toml: Path, filled_template: Path) -> None:
    left_out = {"min_grad_norm": 1e-3, "max_adapter_value": 2.0, "inexact_gradients": False, "reply_after_s": 600.0}
    lines = site_toml.read_text().splitlines(keepends=True)
    site_toml.write_text("".join(line for line in lines if line.partition(" = ")[0] not in left_out))
    for site in (read_policy(site_toml), read_policy(filled_template)):
        defaults = dataclasses.asdict(site.limits) | dataclasses.asdict(site.allow) | dataclasses.asdict(site.releases)
        assert defaults.items() >= left_out.items()
    write_policy(make_policy(), site_toml, others={"machine": {"device": "cpu"}})
    assert read_site_settings(site_toml).machine == replace(read_site_settings(filled_template).machine, device="cpu")


@settings(max_examples=60, deadline=None, derandomize=True)
@given(text=st.text(max_size=12), role=st.text(min_size=1, max_size=5), number=st.floats(1e-300, 1e300))
def test_arbitrary_text_and_numbers_round_trip_through_the_policy_file(
    tmp_path_factory: Any, text: str, role: str, number: float
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.toml"
    data = (Dataset(id="d", declared_size=9, path=text, columns={role: text}),)
    limits = {"min_grad_norm": number, "max_grad_norm": number}
    policy = make_policy(dataset=data, limits=limits, allow={"tasks": (text, text)})
    write_policy(policy, path)
    assert read_policy(path) == policy


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: str(mistake["new"] or mistake["old"]))
def test_policy_error_names_the_file_key_value_and_remedy(site_toml: Path, mistake: dict[str, str]) -> None:
    assert read_error(site_toml, (mistake["old"], mistake["new"])).startswith(mistake["message"])


def test_misplaced_values_and_tables_are_named_in_the_error(site_toml: Path, tmp_path: Path) -> None:
    text = site_toml.read_text()
    site_toml.write_text("asserted = true\n" + text.replace("[asserted]\nno_person_at_another_site = true\n", ""))
    assert read_error(site_toml) == "asserted = true: must be a table, as in [asserted]"
    write_policy(make_policy(dataset=(Dataset(id="d", declared_size=9),)), tmp_path / "site.toml")
    assert read_error(tmp_path / "site.toml", ("[[dataset]]", "[dataset]")).endswith("must be a list")
    assert read_error(tmp_path / "site.toml", ("[dataset]", "dataset = [5]\n[allow2]")).startswith(
        "allow2: is not a known key"
    )


@pytest.mark.parametrize("content", [b"site = ", b"[budget\n", b'site = "a"\nsite = "b"', b"\xff\xfe"])
def test_invalid_toml_raises_a_config_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "site.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"policy = '.*site\.toml': must be TOML"):
        read_policy(path)
    for path, why in ((tmp_path / "none.toml", r" \(No such file"), (tmp_path, "")):
        with pytest.raises(ConfigError, match=rf"policy = '{path}': must be a readable file{why}"):
            read_policy(path)
    for fields in (None, [], "site", 3):  # as stored in a ledger
        with pytest.raises(ConfigError, match="must be a table"):
            decode_policy_json(fields)


def test_errors_in_other_tables_are_reported_by_their_reader(site_toml: Path) -> None:
    write_policy(make_policy(), site_toml, others={"machine": {"num_threads": -1}, "about": {"curator": "north"}})
    assert read_policy(site_toml) == make_policy(), "other tables must not change the policy"
    with pytest.raises(ConfigError, match=r"site.toml: machine.num_threads = -1: must be a whole number of at least"):
        read_site_settings(site_toml)


def test_policy_file_keys_match_the_policy_fields(site_toml: Path) -> None:
    # Each table of the file must have exactly the fields of its class.
    table = tomllib.loads(site_toml.read_text())
    assert set(table) == {field.name for field in dataclasses.fields(Policy)}


@pytest.mark.parametrize(
    "left_out", ["no_person_at_another_site = true\n", "[asserted]\nno_person_at_another_site = true\n"]
)
def test_real_sites_must_state_whether_anyone_is_at_another_site(site_toml: Path, left_out: str) -> None:
    true = "true (no person of this population has records at another site)"
    message = f"asserted.no_person_at_another_site: must be {true} or false (otherwise, or if unknown)"
    site_toml.write_text(site_toml.read_text().replace(left_out, ""))
    for path in (site_toml, TEMPLATE):  # an unedited template does not count as an answer
        with pytest.raises(ConfigError) as caught:
            SiteFiles.from_site_toml(path)
        assert str(caught.value) == f"{path}: {message}"
        assert SiteFiles.from_site_toml(path, may_be_unanswered=True).policy == read_policy(path), "reading must work"
    # A simulation has nobody who could answer.
    made_up = dataclasses.replace(make_policy(), simulated=True, asserted=Asserted())
    write_policy(made_up, site_toml)
    assert read_policy(site_toml) == made_up == decode_policy_json(made_up.to_json())


def test_template_lists_and_explains_every_key(filled_template: Path) -> None:
    table = tomllib.loads(filled_template.read_text())
    specs = {
        field.name: getattr(template, field.name)
        for template in (read_policy(filled_template), read_site_settings(filled_template))
        for field in dataclasses.fields(template)
    }
    assert set(table) == set(specs)
    for name, spec in specs.items():
        if dataclasses.is_dataclass(spec):
            assert {field.name for field in dataclasses.fields(spec)} == set(table[name]), f"[{name}] of the template"
    assert all({"id", "declared_size", "min_units", "path", "columns"} == set(policy) for policy in table["dataset"])
    before = ""
    for line in TEMPLATE.read_text().splitlines():
        if "=" in line and not line.startswith("#"):
            assert before.startswith("#") or "=" in before, f"{line!r} is not explained"
        before = line


def test_template_policy_accepts_a_typical_run(tmp_path: Path, filled_template: Path) -> None:
    template = read_policy(filled_template)
    waits = change_values(template, allow={"leads": (lead_key.public,)})
    reference, allow = template.budget.reference, template.allow
    plan = {"delta": template.budget.delta, "sampling_rate": reference.sampling_rate, "local_steps": 10}
    plan |= {"noise_multiplier": reference.noise_multiplier, "num_rounds": reference.steps // 10}
    model = {"base_model": allow.base_models[0], "target_modules": allow.target_modules}
    proposal = make_proposal(dataset=template.dataset[0].id, task=allow.tasks[0], plan=plan, **model)
    reserve(SiteLedger(tmp_path / "ledger.db", replace(waits, approval="automatic"), site_key, create=True), proposal)
    for strict, reason in ((template, Reason.LEADS), (waits, Reason.AWAITING_APPROVAL)):
        assert (
            read_refusal_reason(reserve, SiteLedger(tmp_path / f"{reason}.db", strict, site_key, create=True), proposal)
            is reason
        )
