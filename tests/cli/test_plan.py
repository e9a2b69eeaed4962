"""`fedtune plan`: what a person sees, and what it writes."""

from __future__ import annotations

import dataclasses
import io
import json
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fedtune.api.compose import compose_run
from fedtune.cli.plan import chart_svg
from fedtune.cli.plan_sections import Outlook, show_outlook
from fedtune.federation import planner, verdict
from fedtune.model.base_model import model_sha256
from fedtune.model.spec import ModelSpec
from fedtune.privacy import accountant
from fedtune.privacy.keys import SigningKey
from fedtune.privacy.policy_file import write_policy
from fedtune.privacy.run_plan import Plan
from fedtune.privacy.site_policy import Dataset, Policy
from fedtune.words import duration, size

from . import snapshots

Run = Callable[..., Any]


@pytest.fixture
def plan(command: Callable[..., Any], tiny: Callable[..., list[str]], tmp_path: Path) -> Run:
    """The command on the smallest run, without its model unless `model`; options come first."""

    def run(*arguments: str, model: bool = False) -> Any:
        options = [part for part in arguments if part.startswith("--")]
        overrides = [part for part in arguments if not part.startswith("--")]
        return command("plan", *tiny(*overrides, into=tmp_path), *(["--time"] if model else []), *options)

    return run


@pytest.fixture
def plan_json(plan: Run) -> Run:
    """What the command prints as JSON."""

    def run(*arguments: str, **options: Any) -> Any:
        outcome = plan(*arguments, "--json", **options)
        assert outcome.code == 0, outcome.err
        return json.loads(outcome.out)

    return run


@pytest.fixture
def outlook(tiny: Callable[..., list[str]], tmp_path: Path) -> Callable[..., Outlook]:
    """What is known of the smallest run with these overrides; its other plans are left out."""

    def make(*overrides: str, **fields: Any) -> Outlook:
        config = compose_run(tiny(*overrides, into=tmp_path))
        planned = config.plan()
        values: dict[str, Any] = {
            "config": config,
            "price": planner.price(planned, config.declared_sizes()),
            "solved": None,
            "epsilon": 8.0,
            "changes": (),
            "forecast": None,
            "device": "",
            "verdicts": (),
            "lead_assumed": False,
        }
        return Outlook(**(values | fields))

    return make


def text(outlook: Outlook, width: int = 80) -> str:
    out = io.StringIO()
    show_outlook(Console(file=out, width=width), outlook)
    return out.getvalue()


def test_the_plan_says_what_the_run_will_say(
    plan_json: Run, command: Any, tiny: Any, result_of: Any, tmp_path: Path
) -> None:
    promised = plan_json()
    (said,) = json.loads(command("simulate", *tiny(into=tmp_path), "--json").out)["runs"]
    assert said == {"folder": str(tmp_path / "run"), "result": result_of(tmp_path / "run")}
    privacy = said["result"]["privacy"]
    assert promised["epsilon"] == privacy["epsilon"]
    for name, site in privacy["sites"].items():
        for key in ("epsilon", "epsilon_rdp", "steps", "sampling_rate", "noise_multiplier"):
            assert promised["sites"][name][key] == site[key]


def test_nothing_is_read_and_nothing_is_made(plan: Run, tmp_path: Path) -> None:
    outcome = plan(f"data.train_file='{tmp_path}/missing.csv'", f"data.test_file='{tmp_path}/missing.csv'")
    assert outcome.code == 0
    assert list(tmp_path.iterdir()) == []


def test_calibrated_noise_is_the_run_s_own(plan_json: Run) -> None:
    said = plan_json("privacy.noise_multiplier=null", "privacy.epsilon=3")
    expected = accountant.calibrate_noise(epsilon=3.0, delta=1e-5, sampling_rate=0.2, steps=4)
    assert said["plan"]["noise_multiplier"] == expected
    assert said["noise_calibrated"]
    assert said["epsilon"] <= 3.0


def test_only_sites_that_take_part_are_shown(plan_json: Run) -> None:
    said = plan_json("federation.num_sites=3", "data.declared_sizes=[90,80,70]", "federation.participants=[site-2]")
    assert list(said["sites"]) == ["site-2"]
    assert said["sites"]["site-2"]["weight"] == 1.0


def test_bytes_and_time_come_from_the_model(plan_json: Run, simulate: Any, result_of: Any, tmp_path: Path) -> None:
    found = plan_json(model=True)["forecast"]
    (first, *_) = result_of(simulate(into=tmp_path))["rounds"]
    # What really travels has a header beside the values.
    assert 0 <= first["bytes_up"] - 2 * found["bytes_up"] < 20_000
    assert found["device"] == "cpu"


def test_the_base_model_is_named_by_the_hash_that_sites_know_it_by(plan_json: Run, outlook: Any) -> None:
    expected = model_sha256(ModelSpec(path="random:bert"))
    assert plan_json(model=True)["model_sha256"] == expected
    assert plan_json()["model_sha256"] is None, "it is not known without the model"
    assert plan_json(f"model.sha256={expected}")["model_sha256"] == expected, "unless the settings pin it"
    assert re.search(f"SHA-256 +{expected}", text(outlook(model_sha256=expected)))
    assert "SHA-256" not in text(outlook())


def test_solving_for_noise(plan_json: Run) -> None:
    said = plan_json("--target=noise", "privacy.epsilon=2")
    assert said["solved_for"] == "noise"
    expected = accountant.calibrate_noise(epsilon=2.0, delta=1e-5, sampling_rate=0.2, steps=4)
    assert said["plan"]["noise_multiplier"] == expected, "the given noise of 4 is not what was asked for"


def test_solving_for_rounds_with_noise_that_a_run_would_refuse(plan_json: Run) -> None:
    # Twenty rounds would pass epsilon 1, which a run says is wrong; here it is the question.
    said = plan_json("--target=rounds", "privacy.epsilon=1", "federation.num_rounds=20")
    assert 0.9 < said["epsilon"] <= 1.0
    more = Plan(**(said["plan"] | {"num_rounds": said["plan"]["num_rounds"] + 1}))
    assert planner.coarse_epsilon(more) > 1.0


def test_solving_for_the_sampling_rate(plan_json: Run) -> None:
    said = plan_json("--target=sampling_rate", "privacy.epsilon=1")
    assert said["plan"]["sampling_rate"] > 0.2
    assert 0.99 < said["epsilon"] <= 1.0


def test_what_was_solved_for_can_be_pasted(plan: Run, tiny: Any, tmp_path: Path) -> None:
    out = plan("--target=rounds", "privacy.epsilon=1").out
    found = re.search(r"use it +(\S+) (\S+) *\n", out)
    assert found
    config = compose_run(tiny("privacy.epsilon=1", *found.groups(), into=tmp_path))
    assert config.federation.num_rounds > 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["privacy.noise_multiplier=null", "--target=rounds"], "privacy.noise_multiplier = null: must be given"),
        (["privacy=none", "--target=noise"], "--target = 'noise': needs a run with privacy"),
        (["privacy.epsilon=0.01", "--target=rounds"], "privacy.noise_multiplier = 4.0: passes privacy.epsilon = 0.01"),
        (["privacy.epsilon=0.01"], "privacy.noise_multiplier = 4.0: gives epsilon"),
        (["--output=plan.pdf"], "--output = 'plan.pdf': must end in .svg, .json"),
        (["--lead=me"], "--lead = 'me': must be a public key"),
        (["--policy=missing.toml"], "policy = 'missing.toml': must be a readable file"),
        (["--output=/dev/null/plan.svg"], "--output = '/dev/null/plan.svg': must be a file that can be written"),
        (["nonsense=1"], "nonsense = '1': is not a setting"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_two(plan: Run, arguments: list[str], message: str) -> None:
    outcome = plan(*arguments)
    assert outcome.code == 2
    assert outcome.message.startswith(message)


@pytest.mark.parametrize("width", [80, 120])
def test_the_terminal(outlook: Callable[..., Outlook], width: int) -> None:
    """Sites of unequal size with long names, a spare round, released scores, and other plans."""
    known = outlook(
        "federation.site_names=[university-hospital,rural-clinic-in-the-north]",
        "data.declared_sizes=[90,30]",
        "federation.num_rounds=4",
        "federation.spare_rounds=1",
        "privacy.metrics=noised",
        "data.heldout_fraction=0.2",
    )
    epsilon = planner.coarse_epsilon(known.plan)
    shown = text(
        dataclasses.replace(known, changes=planner.what_if(known.plan, epsilon=epsilon), epsilon=epsilon), width
    )
    assert max(map(len, shown.splitlines())) <= width
    assert "spare rounds from 5" in chart_svg(known)
    snapshots.check_text(f"plan-{width}.txt", shown)


def test_seeded_noise_is_no_guarantee(outlook: Callable[..., Outlook]) -> None:
    study = outlook("runtime.seeded_noise=true")
    assert not study.guaranteed
    assert text(study).splitlines()[1].startswith("NO GUARANTEE")


def test_without_privacy_no_epsilon_is_promised(outlook: Callable[..., Outlook]) -> None:
    plain = outlook("privacy=none", "privacy.noise_multiplier=null")
    shown = text(plain)
    assert "No epsilon is promised" in shown
    assert "Epsilon after each round" not in shown
    assert "No epsilon is promised" in chart_svg(plain)
    said = plain.to_json()
    assert (said["epsilon"], said["rounds"], said["target_epsilon"]) == (None, [], None)
    json.dumps(said, allow_nan=False)


def test_the_chart_is_an_svg_that_names_its_axes_and_lines(outlook: Callable[..., Outlook]) -> None:
    known = outlook()
    svg = chart_svg(known)
    words = "".join(ElementTree.fromstring(svg).itertext())
    for part in ("rounds (of 2 steps each)", "epsilon at delta 1e-05", "PLD", "RDP", "Renyi filter", "WRONG"):
        assert part in words
    assert svg == chart_svg(known), "the same figures give the same bytes"


@pytest.mark.parametrize("suffix", ["svg", "json"])
def test_the_output_is_what_its_ending_says(plan: Run, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"plan.{suffix}"
    outcome = plan(f"--output={path}")
    assert outcome.code == 0, outcome.err
    assert outcome.out.endswith(f"written: {path}\n")
    start = {"svg": "<svg", "json": "{"}[suffix]
    assert path.read_text().startswith(start)


@pytest.fixture
def policy_file(
    tmp_path: Path, site_policy: Callable[..., Policy], lead_key: SigningKey, tiny: Callable[..., list[str]]
) -> Callable[..., Path]:
    """A site.toml that allows the smallest run; keywords change the policy."""

    def make(**changes: Any) -> Path:
        config = compose_run(tiny(into=tmp_path))
        proposal = config.proposal(lead=lead_key.public, plan=config.plan())
        allow = {
            "leads": (lead_key.public,),
            "base_models": (proposal.base_model,),
            "target_modules": proposal.target_modules,
        }
        datasets = (Dataset(id=proposal.dataset, declared_size=90),)
        write_policy(site_policy("site-1", allow=allow, dataset=datasets, **changes), tmp_path / "site.toml")
        return tmp_path / "site.toml"

    return make


def test_a_policy_is_asked(plan_json: Run, policy_file: Callable[..., Path], lead_key: SigningKey) -> None:
    said = plan_json(f"--policy={policy_file()}")
    (policy,) = said["policies"]
    assert (policy["allowed"], policy["site"], policy["ledger"]) == (True, "site-1", "new")
    assert policy["lead"] == lead_key.public
    assert said["lead_assumed"]


def test_another_lead_is_refused(plan: Run, policy_file: Callable[..., Path], stranger_key: SigningKey) -> None:
    outcome = plan(f"--policy={policy_file()}", f"--lead={stranger_key.public}")
    assert outcome.code == 0, "the question was answered"
    assert "site-1 would refuse the run" in outcome.out
    assert "(leads)" in outcome.out
    assert "Neither fewer rounds nor more noise alone would be accepted." in outcome.out


def test_the_plan_that_was_solved_for_is_what_a_policy_is_asked_about(
    plan: Run, policy_file: Callable[..., Path]
) -> None:
    outcome = plan("--target=rounds", "privacy.epsilon=1", f"--policy={policy_file()}")
    assert "max_rounds" in outcome.out
    assert "Would be accepted: 4 rounds, all else as planned." in outcome.out


def test_a_verdict_is_shown(
    outlook: Callable[..., Outlook], policy_file: Callable[..., Path], lead_key: SigningKey
) -> None:
    known = outlook()
    proposal = known.config.proposal(lead=lead_key.public, plan=known.plan)
    said = verdict.ask(policy_file(), proposal, declared_sizes=known.config.declared_sizes())
    shown = text(outlook(verdicts=(said,)))
    assert "site-1 would accept the run" in shown
    assert "No ledger beside the policy" in shown


@pytest.mark.parametrize(("seconds", "shown"), [(0.01, "0.1 s"), (61.2, "62 s"), (200, "4 min"), (9000, "2.5 h")])
def test_a_time_is_about_as_exact_as_it_can_be(seconds: float, shown: str) -> None:
    assert duration(seconds) == shown


@pytest.mark.parametrize(
    ("count", "shown"), [(10, "10 bytes"), (2048, "2.0 KiB"), (3 * 2**20, "3.0 MiB"), (5 * 2**30, "5.0 GiB")]
)
def test_bytes_in_the_unit_that_fits(count: int, shown: str) -> None:
    assert size(count) == shown


def test_the_signal_is_shown_where_the_model_was_loaded(plan: Run, plan_json: Run) -> None:
    weak = " ".join(plan("privacy.noise_multiplier=400", "privacy.epsilon=8", model=True).out.split())
    assert "nothing is likely to be learnt; a run wants training.go_on_without_signal=true" in weak
    strong = " ".join(plan("data.declared_sizes=5000", model=True).out.split())
    assert "records can move the adapter at most" in strong
    assert plan_json(model=True)["signal_to_noise"] > 0
    assert plan_json()["signal_to_noise"] is None
    assert plan_json("privacy=none", model=True)["signal_to_noise"] is None, "no bound, as everywhere in its JSON"


def test_what_secure_sums_would_give_is_told_beside_a_plain_run(plan: Run, plan_json: Run) -> None:
    four = ("federation.num_sites=4", "data.declared_sizes=80")
    sums = plan_json(*four)["secure_sums"]
    assert sums["plan"]["local_steps"] == 1
    assert sums["noise_in_average"] == pytest.approx(0.5, abs=1e-3), "the root of four sites less"
    shown = " ".join(plan(*four).out.split())
    assert "needs 50% of this noise in the average" in shown
    assert "federation.aggregation=secure" in shown
    given = ("privacy.noise_multiplier=6", "federation.num_rounds=3")
    assert plan_json(*four, *given)["secure_sums"]["noise_in_average"] == pytest.approx(0.5, abs=1e-2)
    for none in (("privacy=none",), ("federation.num_sites=1",), ("federation.aggregation=secure", *four)):
        assert plan_json(*none)["secure_sums"] is None, none


def test_the_price_of_a_search_is_told_beside_the_plan(command: Any) -> None:
    words = ("plan", "experiment=debug", "privacy.noise_multiplier=4.0")
    alone = json.loads(command(*words, "--json").out)
    assert "search" not in alone
    of_eight = command(*words, "--trials", "8", "--json")
    told = json.loads(of_eight.out)
    assert told["search"]["trials"] == 8
    assert told["search"]["epsilon_of_one"] == told["epsilon"] < told["search"]["epsilon"]
    assert command(*words, "--trials", "0").message.startswith("--trials = 0: must be")
