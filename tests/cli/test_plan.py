"""`fedtune plan`: terminal and JSON output."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedtune.api.compose import compose_run
from fedtune.federation import planner
from fedtune.model.base_model import hash_model
from fedtune.model.spec import ModelSpec
from fedtune.privacy.keys import SigningKey
from fedtune.privacy.policy_file import read_policy, write_policy
from fedtune.privacy.run_plan import Plan
from fedtune.privacy.site_policy import Dataset

from ..conftest import list_tiny_overrides, make_site_policy, read_result, run_command
from . import snapshots

Run = Callable[..., Any]


@pytest.fixture
def plan(tmp_path: Path) -> Run:
    """Return a function that runs `fedtune plan` on the debug run, without its model unless `model`."""

    def run(*arguments: str, model: bool = False) -> Any:
        options = [part for part in arguments if part.startswith("--")]
        overrides = [part for part in arguments if not part.startswith("--")]
        return run_command(
            "plan", *list_tiny_overrides(*overrides, into=tmp_path), *(["--time"] if model else []), *options
        )

    return run


@pytest.fixture
def plan_json(plan: Run) -> Run:
    """Return a function that parses the JSON output of `fedtune plan`."""
    return lambda *arguments, **options: json.loads(plan(*arguments, "--json", **options).printed)


def test_plan_predicts_the_privacy_results_of_the_run(plan_json: Run, finished_run: Path) -> None:
    (run,) = json.loads((finished_run.parent / "printed.json").read_text())["runs"]
    assert run == {"folder": str(finished_run), "result": read_result(finished_run)}
    planned, privacy = plan_json(), run["result"]["privacy"]
    assert planned["epsilon"] == privacy["epsilon"]
    for name, site in privacy["sites"].items():
        for key in ("epsilon", "epsilon_rdp", "steps", "sampling_rate", "noise_multiplier"):
            assert planned["sites"][name][key] == site[key]


def test_plan_solves_for_rounds_beyond_the_configured_epsilon(plan: Run, plan_json: Run, tmp_path: Path) -> None:
    target = ("--target=rounds", "privacy.epsilon=1")
    # A run refuses twenty rounds, which exceed epsilon 1; here the rounds are solved for.
    output = plan_json(*target, "federation.num_rounds=20")
    assert 0.9 < output["epsilon"] <= 1.0
    more = Plan(**(output["plan"] | {"num_rounds": output["plan"]["num_rounds"] + 1}))
    assert planner.compute_target_epsilon(more) > 1.0
    secure = ("federation.aggregation=secure", "training.local_steps=1", "federation.num_sites=4")
    output = plan_json(*target, *secure)
    assert output["plan"]["shared"]["num_sites"] == 4, "the noise of all four sites is counted"
    assert 0.9 < output["epsilon"] <= 1.0
    # The printed setting can be pasted.
    match = re.search(r"use it +(\S+) (\S+) *\n", plan(*target).out)
    assert match
    assert (
        compose_run(list_tiny_overrides("privacy.epsilon=1", *match.groups(), into=tmp_path)).federation.num_rounds > 2
    )


@snapshots.parametrize_mistakes("mistakes-plan")
def test_invalid_plan_command_prints_one_line_and_exits_with_code_two(plan: Run, typed: str) -> None:
    snapshots.check_message("mistakes-plan", typed, plan(*typed.split()).failed())


def test_plan_output_matches_its_snapshot(
    plan: Run, policy_file: Any, narrow_terminal: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(policy_file().parent)
    out = plan(
        *("federation.site_names=[university-hospital,rural-clinic-in-the-north]", "data.declared_sizes=[90,30]"),
        *("federation.num_rounds=4", "federation.spare_rounds=1", "privacy.metrics=noised"),
        *("data.heldout_fraction=0.2", "public.train_file=public.csv", "--policy=site.toml"),
    ).printed
    snapshots.check_output("plan", out)


def test_plan_reads_no_data_and_lists_only_participants(plan_json: Run, tmp_path: Path) -> None:
    sites = ("federation.num_sites=3", "data.declared_sizes=[90,80,70]", "federation.participants=[site-2]")
    missing = (f"data.train_file='{tmp_path}/missing.csv'", f"data.test_file='{tmp_path}/missing.csv'")
    output = plan_json(*sites, *missing)
    assert [(name, site["weight"]) for name, site in output["sites"].items()] == [("site-2", 1.0)]
    stage = plan_json("public.train_file=public.csv", "public.num_rounds=3")["public_stage"]
    assert [*stage.values()] == ["public.csv", None, 3, 2, 0.0033, None]
    assert output["public_stage"] is None
    assert list(tmp_path.iterdir()) == []


def test_plan_without_privacy_prints_no_epsilon(plan: Run, plan_json: Run) -> None:
    plain = ("privacy=none", "privacy.noise_multiplier=null")
    text, output = plan(*plain).out, plan_json(*plain)
    assert "No epsilon is promised" in text
    assert "Epsilon after each round" not in text
    assert (output["epsilon"], output["rounds"], output["target_epsilon"]) == (None, [], None)
    # Seeded noise has no guarantee, either.
    assert plan("runtime.seeded_noise=true").out.splitlines()[1].startswith("NO GUARANTEE")
    assert not plan_json("runtime.seeded_noise=true")["guaranteed"]


def test_plan_with_an_epsilon_of_zero_is_printed(plan_json: Run) -> None:
    small = ("privacy.noise_multiplier=1", "privacy.sampling_rate=0.000001", "training.local_steps=1")
    output = plan_json(*small, "federation.num_rounds=2", "training.ignore_weak_signal=true")
    assert (output["epsilon"], output["what_if"]) == (0, [])


@pytest.fixture
def policy_file(tmp_path: Path, lead_key: SigningKey) -> Callable[[], Path]:
    """Return a function that writes a site.toml that permits the debug run."""

    def write() -> Path:
        config = compose_run(list_tiny_overrides(into=tmp_path))
        proposal = config.proposal(lead=lead_key.public, plan=config.plan())
        allow = {"leads": (lead_key.public,), "base_models": (proposal.base_model,)}
        allow["target_modules"] = proposal.target_modules
        datasets = (Dataset(id=proposal.dataset, declared_size=90),)
        write_policy(make_site_policy("site-1", allow=allow, dataset=datasets), tmp_path / "site.toml")
        return tmp_path / "site.toml"

    return write


def test_plan_checks_a_policy_and_suggests_acceptable_settings(
    plan: Run, plan_json: Run, policy_file: Any, lead_key: SigningKey, stranger_key: SigningKey
) -> None:
    policy = f"--policy={policy_file()}"
    outcome = plan(policy, f"--lead={stranger_key.public}")
    assert outcome.code == 0, "a refusal is a valid answer"
    assert "site-1 would refuse the run" in outcome.out
    assert "(leads)" in outcome.out
    assert "Neither fewer rounds nor more noise alone would be accepted." in outcome.out
    # The policy is checked against the plan that was solved for.
    outcome = plan("--target=rounds", "privacy.epsilon=1", policy)
    assert "max_rounds" in outcome.out
    assert "Acceptable: 4 rounds, with all other settings as planned." in outcome.out
    output = plan_json("model.dtype=auto", policy)
    (result,) = output["policies"]
    assert [result[key] for key in ("allowed", "site", "ledger", "lead")] == [True, "site-1", "new", lead_key.public]
    assert output["lead_assumed"]


def test_plan_prints_the_strictest_site_and_a_common_epsilon(
    plan: Run, plan_json: Run, policy_file: Any, tmp_path: Path
) -> None:
    allowed, policies = read_policy(policy_file()), []
    for site, cap in (("site-1", 3.0), ("site-2", 0.2), ("site-3", 1.0)):
        budget = replace(allowed.budget, max_epsilon=50.0, max_epsilon_per_run=cap)
        limits = replace(allowed.limits, min_noise_multiplier=0.1)
        write_policy(replace(allowed, site=site, budget=budget, limits=limits), tmp_path / f"{site}.toml")
        policies.append(f"--policy={tmp_path / site}.toml")
    output = plan_json(*policies)
    assert (output["strictest_site"], output["epsilon_for_all_sites"]) == ("site-2", 0.2)
    sentence = "Strictest site: site-2 (max_epsilon_per_run: at most 0.2); all 3 sites accept this run up to"
    assert f"{sentence} privacy.epsilon=0.2." in " ".join(plan(*policies).out.split())
    higher = plan_json("privacy.noise_multiplier=null", "privacy.epsilon=0.21", *policies)
    assert [result["allowed"] for result in higher["policies"]] == [True, False, True]
    refused = " ".join(plan("lora.rank=64", *policies[:2]).out.split())
    assert "Strictest: site-1, site-2 would refuse this run at every epsilon because of the rules above." in refused
    assert "Strictest" not in plan("privacy=none", "privacy.noise_multiplier=null", *policies).out


def test_plan_with_a_model_reports_signal_forecast_and_digest(plan: Run, plan_json: Run) -> None:
    weak = " ".join(plan("privacy.noise_multiplier=400", "privacy.epsilon=8", model=True).out.split())
    assert "the run will likely learn nothing; it requires training.ignore_weak_signal=true" in weak
    loaded, digest = plan_json(model=True), hash_model(ModelSpec(path="random:bert"))
    assert loaded["signal_to_noise"] > 0
    assert (loaded["forecast"]["device"], loaded["model_sha256"]) == ("cpu", digest)
    without = plan_json()
    assert [without[key] for key in ("signal_to_noise", "forecast", "model_sha256")] == [None] * 3
    assert plan_json(f"model.sha256={digest}")["model_sha256"] == digest, "the settings pin it"


def test_plan_compares_noise_with_secure_aggregation(plan: Run, plan_json: Run) -> None:
    four = ("federation.num_sites=4", "data.declared_sizes=80")
    secure = plan_json(*four)["secure_aggregation"]
    assert secure["plan"]["local_steps"] == 1
    assert secure["noise_in_average"] == pytest.approx(0.5, abs=1e-3), "less by the root of four sites"
    text = " ".join(plan(*four).out.split())
    assert "requires 50% of this noise in the average" in text
    assert "federation.aggregation=secure" in text
    overrides = ("privacy.noise_multiplier=6", "federation.num_rounds=3")
    assert plan_json(*four, *overrides)["secure_aggregation"]["noise_in_average"] == pytest.approx(0.5, abs=1e-2)
    for incompatible in (("privacy=none",), ("federation.num_sites=1",), ("federation.aggregation=secure", *four)):
        assert plan_json(*incompatible)["secure_aggregation"] is None, incompatible


def test_plan_shows_the_privacy_cost_of_a_search() -> None:
    words = ("plan", "experiment=debug", "privacy.noise_multiplier=4.0")
    assert "search" not in json.loads(run_command(*words, "--json").out)
    output = json.loads(run_command(*words, "--trials", "8", "--json").out)
    assert output["search"]["trials"] == 8
    assert output["search"]["epsilon_of_one"] == output["epsilon"] < output["search"]["epsilon"]
    assert run_command(*words, "--trials", "0").message.startswith("--trials = 0: must be")
