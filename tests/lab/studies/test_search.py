"""Hyperparameter search: budget checks, charges, selection by validation score, and reports."""

import csv
import json
import re
import shlex
import shutil
from collections import Counter
from dataclasses import replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest

from fedtune.api.compose import compose_run
from fedtune.cli.command import Command
from fedtune.lab.studies.trial_search import Search
from fedtune.lab.studies.trials import Trials
from fedtune.privacy import accountant, events
from fedtune.privacy.ledger.verify import verify
from fedtune.privacy.policy_file import read_policy
from fedtune.report.facts import RunFacts
from fedtune.report.model import from_json
from fedtune.report.synthetic_card import describe_run
from fedtune.show.run_progress import Display
from fedtune.sites.virtual_site import VirtualSites, build_covering_budget
from fedtune.spec import RefusedError

from ...cli import snapshots
from ...conftest import REPOSITORY, fail_where, list_tiny_overrides, read_files, run_command

pytestmark = pytest.mark.nightly

SHORT = ("federation.num_rounds=1", "training.local_steps=1", "tracking=quiet")
SPACE = ("training.learning_rate=log(0.001,0.1)", "lora.rank=4,8")


def list_charges(sites: Path) -> list[Counter[Any]]:
    """Return the charges in each site's ledger."""
    ledgers = sorted(sites.glob("*/ledger.db"))
    assert len(ledgers) == 2
    return [verify(path).history.count_total_charges() for path in ledgers]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("search")


@pytest.fixture(scope="module")
def words(folder: Path) -> list[str]:
    return list_tiny_overrides(*SPACE, *SHORT, into=folder, name="s")


@pytest.fixture(scope="module")
def outcome(words: list[str]) -> Any:
    with pytest.MonkeyPatch.context() as here:
        here.setenv("COLUMNS", str(snapshots.COLUMNS))
        return run_command("search", *words, "--trials", "3")


def test_every_trial_is_charged_to_the_same_ledgers(outcome: Any, words: list[str], folder: Path) -> None:
    assert (outcome.code, outcome.err) == (0, "")
    plan = compose_run([*words[: -len(SHORT) - len(SPACE)], *SHORT]).plan()
    for spent in list_charges(folder / "s/sites"):
        assert spent == events.count_mechanisms([plan.full_event] * 3)
    price = json.loads((folder / "s/search.json").read_text())["cost"]
    assert price["epsilon"] == accountant.epsilon_pld({plan.full_event: 3}, plan.delta)
    cap = read_policy(folder / "s/sites/site-1/site.toml").budget.max_epsilon
    assert price["epsilon_filter"] <= cap < price["epsilon_filter"] + 0.2, "the price, and little more"
    with (folder / "s/trials.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["state"] for line in lines] == ["finished"] * 3
    so_far = [float(line["epsilon_so_far"]) for line in lines]
    assert so_far == sorted(so_far)
    assert so_far[0] == pytest.approx(float(lines[0]["epsilon_spent"]))
    assert so_far[2] == price["epsilon"]
    best = max(lines, key=lambda line: float(line["validation_accuracy"]))
    assert [line["run"] for line in lines if line["best"]] == [best["run"]]
    output = " ".join(outcome.out.split())
    assert "Privacy cost of the search trials 3" in output
    assert output.index("Privacy cost of the search") < output.index("trial 1 of 3: training.learning_rate=")
    assert f"picked: {best['folder']}" in output
    assert snapshots.find_wide_lines(outcome.out) == []
    assert "out of 3 trials, as its report states. All trials together: epsilon at most" in output


def test_report_of_the_selected_run_includes_the_search_cost(outcome: Any, folder: Path) -> None:
    search_record = json.loads((folder / "s/search.json").read_text())
    best = folder / "s" / search_record["picked"]
    report = from_json((best / "report.json").read_text())
    assert isinstance(report.facts, RunFacts)
    selection = report.facts.selection
    assert selection is not None
    assert (selection.search, selection.method, selection.primary_metric) == ("s", "random", "accuracy")
    assert selection.trials == 3
    assert selection.epsilon == search_record["cost"]["epsilon"]
    assert "out of" in (best / "report.html").read_text().split("The run was selected by accuracy")[1][:100]
    card = (best / "adapter/README.md").read_text()
    assert "The run was picked by accuracy on the lead's own validation file, out of 3 trials" in card
    assert run_command("report", "verify", str(best)).code == 0
    for trial in {*(folder / "s").glob("s-trial-*")} - {best}:  # whoever uses one has seen all of them
        assert describe_run(out := from_json((trial / "report.json").read_text()), "")["epsilon"] == selection.epsilon
        assert isinstance(out.facts, RunFacts)
        assert out.facts.selection == replace(selection, score=None)
        card = (trial / "adapter/README.md").read_text()
        assert "3 trials of a search on the same records, which picked another" in card
        assert "search s (random). The search selected another run, or none" in (trial / "report.html").read_text()
        assert run_command("report", "verify", str(trial)).code == 0


def test_report_understating_its_search_is_detected(outcome: Any, folder: Path, tmp_path: Path) -> None:
    best = folder / "s" / json.loads((folder / "s/search.json").read_text())["picked"]
    output = json.loads((best / "report.json").read_text())

    def find_problem(**changes: Any) -> str:
        changed = json.loads(json.dumps(output))
        changed["facts"]["selection"] |= changes
        # Any other layout of the same values is refused before the values are compared.
        (tmp_path / "report.json").write_text(json.dumps(changed, indent=1, ensure_ascii=False) + "\n")
        checked = run_command("report", "verify", str(tmp_path))
        assert checked.code != 0
        return " ".join((checked.out + checked.err).split())

    assert "selection.epsilon" in find_problem(epsilon=output["facts"]["selection"]["epsilon"] / 2)
    assert "selection.trials" in find_problem(trials=4)
    assert "selection.delta" in find_problem(delta=1e-3)
    (charge,) = output["facts"]["selection"]["charges"]
    assert "selection.charges" in find_problem(charges=[], epsilon=0.0)
    assert "selection.epsilon" in find_problem(charges=[charge | {"count": 4}])
    for trials in (0, 1000, None):
        assert "selection.trials" in find_problem(trials=trials)
    assert "selection.method" in find_problem(method="by hand")


def test_repeated_search_charges_nothing(outcome: Any, words: list[str], folder: Path) -> None:
    """The number of trials is fixed before the first trial."""
    whole, error = read_files(folder), f"is taken: {folder / 's/search.json'} belongs to a search with other settings"
    assert run_command("search", *words, "--trials", "4").failed() == f"name = 's': {error}: choose another name"
    assert run_command("search", *words, "--trials", "3", "--method", "tpe").code == 2
    assert run_command("search", *words, "--trials", "3", "lora.alpha=4").code == 2
    (folder / "mine").mkdir()
    (folder / "mine/notes.txt").write_text("mine")
    assert "exists and is not a search" in run_command("search", *words, "name=mine", "--trials", "3").message
    shutil.rmtree(folder / "mine")
    assert read_files(folder) == whole
    before = {path: path.stat().st_mtime_ns for path in folder.glob("s/*/*.json")}
    spent = list_charges(folder / "s/sites")
    rerun = run_command("search", *words, "--trials", "3", "--json")
    assert (rerun.code, len([path for path in before if path.name == "run.json"])) == (0, 3)
    assert {path: path.stat().st_mtime_ns for path in folder.glob("s/*/*.json")} == before, "a signature is kept, too"
    assert list_charges(folder / "s/sites") == spent
    out = json.loads(rerun.out)
    assert [run["state"] for run in out["runs"]] == ["finished"] * 3
    assert out["best"].endswith(json.loads((folder / "s/search.json").read_text())["picked"])
    assert out["cost"]["trials"] == 3


def test_interrupted_selection_is_completed(outcome: Any, words: Any, folder: Path) -> None:
    file = folder / "s/search.json"
    original, search_record = file.read_text(), json.loads(file.read_text())
    best = folder / "s" / search_record["picked"]
    other = next(entry for entry in (folder / "s").glob("s-trial-*") if entry != best)
    shutil.copy(best / "selection.json", other)
    (best / "selection.json").unlink()
    file.write_text(json.dumps(search_record | {"picked": other.name}))
    assert run_command("search", *words, "--trials", "3").code == 0
    assert file.read_text() == original
    for trial, score in ((best, search_record["score"]), (other, None)):
        output = json.loads((trial / "report.json").read_text())["facts"]["selection"]
        assert output["score"] == json.loads((trial / "selection.json").read_text())["score"] == score


def test_interrupted_trial_is_not_charged_twice(tmp_path: Path) -> None:
    two_rounds = (SPACE[0], "federation.num_rounds=2", "training.local_steps=1", "tracking=quiet")
    words = list_tiny_overrides(*two_rounds, into=tmp_path, name="stopped")
    with pytest.MonkeyPatch.context() as patched:
        rounds = count(1)
        fail_where(patched, Display, "on_round_finished", lambda *_: next(rounds) == 3, KeyboardInterrupt())
        stopped = run_command("search", *words, "--trials", "2")  # in the first round of the second trial
    assert stopped.code == 1
    assert "Continue the search with: fedtune search" in " ".join(stopped.out.split())
    output = [json.loads(path.read_text()) for path in tmp_path.glob("*/*/selection.json")]
    assert [(entry["trials"], entry["score"]) for entry in output] == [(2, None)] * 2, "owed, and not picked yet"
    by_hand = tmp_path / "stopped" / "stopped-trial-2"
    assert run_command("simulate", f"resume={by_hand}").code == 0
    price = json.loads((tmp_path / "stopped/search.json").read_text())["cost"]
    assert describe_run(from_json((by_hand / "report.json").read_text()), "")["epsilon"] == price["epsilon"]
    repeated = run_command("search", *words, "--trials", "2")
    assert (repeated.code, repeated.err) == (0, "")
    plan = compose_run([word for word in words if word != SPACE[0]]).plan()
    for spent in list_charges(tmp_path / "stopped/sites"):
        assert spent == events.count_mechanisms([plan.full_event] * 2)


def write_roomy_policies(runs: int, words: list[str], sites: Path) -> list[str]:
    """Write policies of sites with budget for a number of runs; return the search's overrides and the sites."""
    words = [*words, "privacy.noise_multiplier=1.5"]  # dear enough that one more trial is seen in a cap's tenths
    config = compose_run([*words, f"runtime.sites_dir='{sites}'"])
    VirtualSites.create(config, sites, config.plan()).write_policies(
        within=build_covering_budget([config.plan()] * runs)
    )
    return [*words, f"runtime.sites_dir='{sites}'"]


def test_search_is_refused_if_its_trials_exceed_the_budget(tmp_path: Path) -> None:
    words = write_roomy_policies(8, list_tiny_overrides(*SHORT, into=tmp_path / "runs", name="s"), tmp_path / "sites")
    before = read_files(tmp_path)
    argv = [*words, SPACE[0]]
    for method in ("random", "tpe"):
        said = run_command("search", *argv, "--trials", "12", "--method", method).failed(3)
        begun = "--trials = 12: site site-1 has budget for 8 of these trials; nothing was started (max_epsilon: asked "
        assert said.startswith(begun)
    rates = "training.learning_rate=" + ",".join(f"0.{number:02}" for number in range(1, 13))
    assert run_command("search", *words, rates, "--method", "grid").code == 3
    assert read_files(tmp_path) == before
    for method in ("random", "tpe"):
        Search.from_overrides(argv, method, trials=8).check_room()
        with pytest.raises(RefusedError):
            Search.from_overrides(argv, method, trials=9).check_room()


def test_policy_limits_and_prior_spending_count_before_the_first_trial(tmp_path: Path) -> None:
    words = write_roomy_policies(2, list_tiny_overrides(*SHORT, into=tmp_path / "runs", name="s"), tmp_path / "sites")
    refused = run_command("search", *words, "lora.rank=int(interval(4,64))", "--trials", "2", "--method", "tpe")
    message = "refuses these trials; nothing was started (max_rank: requested 64, allowed at most 4)"
    assert refused.failed(3) == f"--trials = 2: site site-1 {message}"
    missing = run_command("search", *words, SPACE[0], f"runtime.sites_dir='{tmp_path / 'none'}'", "--trials", "2")
    assert "runtime.sites_dir" in missing.failed()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sites"]
    assert run_command("simulate", *words, "name=other").code == 0
    assert "has budget for 1 of these trials" in run_command("search", *words, SPACE[0], "--trials", "2").failed(3)
    assert run_command("search", *words, SPACE[0], "--trials", "1").code == 0
    assert run_command("search", *words, SPACE[0], "--trials", "1").code == 0, "it is paid for"
    assert "has budget for 0 of" in run_command("search", *words, "name=t", SPACE[0], "--trials", "1").message


def test_search_on_public_data_costs_no_epsilon(tmp_path: Path) -> None:
    public = [word for word in list_tiny_overrides(*SHORT, into=tmp_path, name="g") if "noise_multiplier" not in word]
    outcome = run_command("search", *public, "privacy=none", "training.learning_rate=0.01,0.02", "--method", "grid")
    assert (outcome.code, outcome.err) == (0, "")
    output = " ".join(outcome.out.split())
    assert "There is no privacy guarantee: use trials without noise only for public records." in output
    search_record = json.loads((tmp_path / "g/search.json").read_text())
    assert search_record["cost"]["epsilon"] is None
    assert run_command("report", "verify", str(tmp_path / "g" / search_record["picked"])).code == 0


def test_failed_trial_is_not_selected(tmp_path: Path) -> None:
    words = list_tiny_overrides("lora.target_modules=[nonesuch],[key]", *SHORT, into=tmp_path, name="f")
    out = run_command("search", *words, "--method", "grid").printed
    assert "run 1 failed: lora.target_modules" in " ".join(out.split())
    assert json.loads((tmp_path / "f/search.json").read_text())["picked"] == "f-trial-2"
    shutil.rmtree(tmp_path / "f")
    words = list_tiny_overrides("lora.target_modules=[nonesuch],[other]", *SHORT, into=tmp_path, name="f")
    outcome = run_command("search", *words, "--method", "grid")
    assert outcome.code == 2
    assert "No trial was selected, because no trial has a score." in outcome.out


def test_refused_trial_costs_only_its_charged_rounds(tiny: Any, tmp_path: Path, monkeypatch: Any) -> None:
    search = Search.from_overrides(
        tiny("training.learning_rate=0.01,0.02,0.03", *SHORT, into=tmp_path, name="s"), "grid"
    )
    rounds = iter([0, 1, 0])

    def read_result(folder: Path, *, finished: bool = False) -> Any:
        if finished:
            return None
        return SimpleNamespace(privacy=SimpleNamespace(sites={"site-1": SimpleNamespace(rounds=next(rounds))}))

    monkeypatch.setattr("fedtune.lab.studies.trials.read_result", read_result)
    search.run(trials := Trials(tmp_path / "s.csv"), Mock(side_effect=RefusedError("no")))
    single_run = accountant.epsilon_pld([search.plans[0].full_event], search.plans[0].delta)
    assert [trial.together for trial in trials.rows.values()] == [0.0, single_run, single_run]


PAGE = (REPOSITORY / "docs/planning.md").read_text().partition("\n## Search\n")[2].partition("\n## ")[0]
COMMANDS = [shlex.split(line) for line in re.findall(r"^fedtune (?=plan|search)(.*)$", PAGE, re.MULTILINE)]


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_documented_search_commands_are_valid(words: list[str], monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    if words[0] == "plan":
        planned = run_command(*words)
        assert (planned.code, planned.err) == (0, "")
        assert "Privacy cost of the search" in planned.out
        return
    command_line: list[Any] = []
    monkeypatch.setattr(Command, "invoke", lambda self, ctx: command_line.append(ctx.params))
    run_command(*words)
    (output,) = command_line
    search = Search.from_overrides(output["overrides"], output["method"], trials=output["trials"])
    assert {entry.key for entry in search.searched} <= {"training.learning_rate", "lora.rank"}


@snapshots.parametrize_mistakes("mistakes-search")
def test_invalid_search_command_is_refused(typed: str, tmp_path: Path) -> None:
    found = run_command("search", *list_tiny_overrides(*SHORT, into=tmp_path / "runs"), *shlex.split(typed))
    snapshots.check_message("mistakes-search", typed, found.failed())
    assert found.out == ""
    assert list(tmp_path.iterdir()) == []


def test_search_on_training_records_is_refused(tmp_path: Path) -> None:
    words = list_tiny_overrides(*SHORT, into=tmp_path, name="s")
    train = compose_run(words).data.train_file
    refused = run_command("search", *words, SPACE[0], f"data.validation_file={train}", "--trials", "2")
    assert "has the same records as data.train_file: its scores select the result" in refused.failed()
