"""`fedtune compare` on an experiment, and on existing runs."""

import gzip
import io
import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest

from fedtune.evaluation.bootstrap import NO_DIFFERENCE, Comparison, Estimate
from fedtune.lab.studies.comparison import format_change, plan_runs
from fedtune.show.run_progress import Display
from fedtune.sites import work as site_work

from ...cli import snapshots
from ...conftest import REPOSITORY, fail_where, list_tiny_overrides, read_result, run_command

pytestmark = pytest.mark.nightly

SHORT = ("federation.num_rounds=1", "training.local_steps=1", "tracking=quiet")
SITES = ("data.partition.kind=dirichlet", "data.test_rows=60")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("compared")


@pytest.fixture(scope="module")
def words(folder: Path) -> list[str]:
    return list_tiny_overrides(*SHORT, *SITES, into=folder, name="both")


@pytest.fixture(scope="module")
def comparison_json(words: list[str]) -> Any:
    return json.loads(run_command("compare", *words, "--without-privacy", "--smallest", "10", "--json").printed)


MODELS = ["base", "federated", "site-1 alone", "site-2 alone", "pooled"]
PLAIN = [f"{name}, no privacy" for name in MODELS[1:]]
MEANS = ["alone, mean of 2", "alone, mean of 2, no privacy"]


def test_compare_trains_all_variants_with_and_without_privacy(comparison_json: Any, folder: Path) -> None:
    models = {model["name"]: model for model in comparison_json["models"]}
    assert list(models) == [*MODELS, *PLAIN, *MEANS]
    assert {name for name, model in models.items() if model.get("epsilon") is not None} == set(MODELS[1:])
    assert all(set(model["scores"]) == {"accuracy", "macro_f1", "loss"} for model in models.values())
    assert {path.name for path in (folder / "both").iterdir() if path.is_dir()} == {
        f"both-{who}{how}" for who in ("federated", "alone-site-1", "alone-site-2", "pooled") for how in ("", "-plain")
    }
    assert json.loads((folder / "both" / "compare.json").read_text()) == comparison_json


def test_compared_scores_match_the_runs(comparison_json: Any) -> None:
    models = {model["name"]: model for model in comparison_json["models"]}
    for name in (*MODELS[1:], *PLAIN):
        run = read_result(Path(models[name]["folder"]))
        assert models[name]["scores"]["loss"]["value"] == pytest.approx(run["final"]["metrics"]["loss"])
        assert models["base"]["scores"]["loss"]["value"] == pytest.approx(run["final"]["metrics_before"]["loss"])
        assert models[name]["seconds"] == run["final"]["seconds"]
        traffic = sum(entry["bytes_up"] + entry["bytes_down"] for entry in run["rounds"])
        assert models[name]["bytes"] == (traffic if name.startswith("federated") else 0)
    separate = [models[f"site-{number} alone"]["scores"]["loss"]["value"] for number in (1, 2)]
    assert models[MEANS[0]]["scores"]["loss"]["value"] == pytest.approx(sum(separate) / 2)
    # Sites are groups of the records that they would have.
    groups = comparison_json["groups"]["by site"]["groups"]
    assert {group["name"] for group in groups} == {"site-1", "site-2"}
    assert sum(group["units"] for group in groups) == comparison_json["records"] == 60
    pairs = {(entry["base"], entry["tuned"]) for entry in groups[0]["changes"]}
    assert pairs == {(name, "federated") for name in ("base", *MODELS[2:], *PLAIN)}


def test_comparison_lists_all_pairwise_differences(comparison_json: Any) -> None:
    pairs = {(pair["base"], pair["tuned"]): pair for pair in comparison_json["pairs"] if pair["score"] == "loss"}
    assert len(pairs) == 11 * 10 / 2
    models = {model["name"]: model["scores"]["loss"]["value"] for model in comparison_json["models"]}
    for (base, tuned), pair in pairs.items():
        assert pair["difference"]["value"] == pytest.approx(models[tuned] - models[base], abs=1e-12)
        distinct = pair["difference"]["low"] > 0 or pair["difference"]["high"] < 0
        assert (pair["verdict"] != "cannot be told apart") == distinct
    first, *others = comparison_json["verdict"]
    assert first.startswith("Federated ")
    assert others[0].startswith("Compared with each site alone, on each site's own test records, federated is ")
    assert others[0].count("site-1") == others[0].count("site-2") == 1
    for output in ("These records cannot distinguish: ", "The smallest group is "):
        assert any(sentence.startswith(output) for sentence in others)


def test_compared_runs_differ_only_in_their_participants(words: list[str]) -> None:
    runs = {line.name: line.run.config for line in plan_runs(words, without_privacy=True, leave_out=())}
    joint, alone, pooled, plain = (runs[name] for name in ("federated", "site-2 alone", "pooled", "pooled, no privacy"))
    assert alone.federation.active == ("site-2",)
    assert pooled.data.declared_sizes == 180
    assert (pooled.federation.names, pooled.federation.min_sites) == (("all",), 1)
    assert plain.privacy.mechanism == "none"
    assert len({config.data.columns["text"] for config in runs.values()}) == 1
    assert {config.plan() for config in (joint, alone, pooled)} == {joint.plan()}
    # Rates that are left to fedtune fit each run.
    lines = plan_runs([*words, "name=rates", "training.learning_rate=auto"], without_privacy=False, leave_out=())
    rates = {line.name: line.run.config.training.learning_rate for line in lines}
    assert rates["pooled"] > rates["federated"] > rates["site-1 alone"]


def test_repeated_compare_reruns_nothing_and_resumes(
    comparison_json: Any, words: list[str], folder: Path, tmp_path: Path
) -> None:
    made = (folder / "both" / "both-pooled" / "run.json").stat().st_mtime_ns
    rerun = run_command("compare", *words, "--without-privacy", "--smallest", "10", "--json")
    assert json.loads(rerun.out) == comparison_json
    assert "of 8, " not in rerun.err
    assert (folder / "both" / "both-pooled" / "run.json").stat().st_mtime_ns == made
    shutil.copytree(folder / "both", tmp_path / "both")
    shutil.rmtree(tmp_path / "both" / "both-pooled")
    (tmp_path / "both" / "both-federated" / "run.json").unlink()
    here = [f"tracking.output_dir='{tmp_path}'" if word.startswith("tracking.output_dir") else word for word in words]
    rerun = run_command("compare", *here, "--leave-out", "alone", "--json")
    assert rerun.code == 0, rerun.err
    assert [model["name"] for model in json.loads(rerun.out)["models"]] == ["base", "federated", "pooled"]
    about, spends, *lines = rerun.err.splitlines()
    assert about.endswith("one after the other: federated, pooled.")
    assert spends.startswith("Each spends epsilon ")
    assert [line.partition(":")[0] for line in lines[:2]] == ["1 of 2, federated", "2 of 2, pooled"]


def test_interrupted_compare_can_be_resumed(tmp_path: Path) -> None:
    words = ("compare", *list_tiny_overrides(*SHORT, *SITES, into=tmp_path, name="both"), "--leave-out", "alone")
    with pytest.MonkeyPatch.context() as patched:
        fail_where(patched, Display, "on_round_finished", lambda *_: True, KeyboardInterrupt())
        stopped = run_command(*words)
    assert (stopped.code, "Continue with: fedtune compare" in " ".join(stopped.out.split())) == (1, True)
    assert not (tmp_path / "both" / "both-pooled").exists()
    output = json.loads(run_command(*words, "--json").printed)
    assert [model["name"] for model in output["models"]] == ["base", "federated", "pooled"]
    assert [entry["round"] for entry in read_result(tmp_path / "both" / "both-federated")["rounds"]] == [1]


def test_interrupted_single_site_run_keeps_its_completed_rounds(tmp_path: Path) -> None:
    """Its plan is exhausted one round early, which ends the run with a message and does not block other runs."""
    words = ("compare", *list_tiny_overrides("federation.num_rounds=2", *SHORT[1:], *SITES, into=tmp_path, name="both"))
    separate = tmp_path / "both" / "both-alone-site-1"

    def is_in_second_round(model: Any, adapter: Any, examples: Any, work: Any, **_: Any) -> bool:
        return bool((work.site, work.round, separate.exists()) == ("site-1", 2, True))

    with pytest.MonkeyPatch.context() as patched:
        fail_where(patched, site_work, "train_round", is_in_second_round, KeyboardInterrupt())
        assert run_command(*words).code == 1
    repeated = run_command(*words, "--json")
    assert repeated.code == 0, repeated.err
    output = " ".join(repeated.err.split())
    assert "site-1 alone: Round 2 of 2 is missing: an earlier round was" in output
    assert "Set federation.spare_rounds=1 in the next run" in output
    assert [entry["name"] for entry in json.loads(repeated.out)["models"]][:5] == MODELS
    run = read_result(separate)
    assert [(entry["round"], entry["sites"]) for entry in run["rounds"]] == [(1, ["site-1"]), (2, [])]
    assert run["privacy"]["sites"]["site-1"]["rounds"] == 2, "what was interrupted stays charged"
    told = run_command(*words, "--json")
    assert (told.code, "of 4, " in told.err, json.loads(told.out)) == (0, False, json.loads(repeated.out))
    assert run_command("report", "verify", str(separate)).code == 0


def test_single_site_run_without_rounds_is_omitted(tmp_path: Path) -> None:
    words = ("compare", *list_tiny_overrides(*SHORT, *SITES, into=tmp_path, name="both"))
    separate = tmp_path / "both" / "both-alone-site-1"
    with pytest.MonkeyPatch.context() as patched:
        fail_where(patched, site_work, "train_round", lambda *_, **__: separate.exists(), KeyboardInterrupt())
        assert run_command(*words).code == 1
    repeated = run_command(*words, "--json")
    assert repeated.code == 0, repeated.err
    output = " ".join(repeated.err.split())
    assert "site-1 alone was skipped: round 1: refused by a policy or budget" in output
    assert "site-1 alone" not in [entry["name"] for entry in json.loads(repeated.out)["models"]]


def test_rounded_zero_difference_has_no_minus_sign() -> None:
    """A difference that rounds to zero would be printed as -0.0000."""
    zero = Estimate(-1e-6, -2e-6, 1e-6)
    comparison = Comparison(base=zero, tuned=zero, difference=zero, verdict=NO_DIFFERENCE)
    assert format_change(comparison)[:2] == ("+0.0000", "+0.0000 to +0.0000")


def test_compare_without_an_experiment_states_its_cost_and_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedtune.cli.compare._run_unfinished_lines", lambda *_, **__: pytest.fail("nobody agreed"))
    monkeypatch.setattr("sys.stdin", io.StringIO("\n"))
    outcome = run_command("compare")
    assert (outcome.code, outcome.message) == (1, "nothing was trained; to use other records, set experiment=NAME")
    assert "Each spends epsilon 7.9" in outcome.out or "Each spends epsilon 8.000" in outcome.out
    assert "Train them now? [y/N]" in outcome.out


def test_existing_runs_are_scored_on_one_file(
    comparison_json: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(snapshots.COLUMNS))
    entry, other = folder / "both" / "both-federated", folder / "both" / "both-pooled"
    with gzip.open(REPOSITORY / "simulations/data/banking77/test.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(next(file)) for _ in range(40)]
    own_file = tmp_path / "mine.jsonl"
    own_file.write_text("".join(json.dumps(row | {"where": number % 3 // 2}) + "\n" for number, row in enumerate(rows)))
    command_line = (str(entry), str(other), "--data", str(own_file), "--by", "where")
    comparison = run_command("compare", *command_line)
    assert comparison.code == 0, comparison.err
    assert snapshots.find_wide_lines(comparison.out) == []
    output = " ".join(comparison.out.split())
    assert "No scores by where: fewer than two groups have 20 records." in output
    assert "Both-federated minus each other" in output
    comparison_json = json.loads(run_command("compare", *command_line, "--smallest", "10", "--json").out)
    assert [model["name"] for model in comparison_json["models"]] == ["base", "both-federated", "both-pooled"]
    assert run_command("compare", str(entry), "--personal").failed().split(":")[0] == "--personal", (
        "with an experiment alone"
    )
    groups = comparison_json["groups"]["by where"]["groups"]
    assert [(group["name"], group["units"]) for group in groups] == [("0", 27), ("1", 13)]


@snapshots.parametrize_mistakes("mistakes-compare")
def test_invalid_compare_command_is_refused(typed: str, tmp_path: Path) -> None:
    message = run_command("compare", *list_tiny_overrides(into=tmp_path, name="x"), *shlex.split(typed)).failed()
    snapshots.check_message("mistakes-compare", typed, message)
    assert not list(tmp_path.iterdir())


def test_personalized_adapters_are_compared_with_alternatives(tmp_path: Path) -> None:
    larger = ("data.train_fraction=0.04", "data.declared_sizes=180")
    command_line = [
        *list_tiny_overrides(*SHORT, *SITES, *larger, into=tmp_path, name="own"),
        "--personal",
        "--leave-out=pooled",
    ]
    command_line += ["--smallest", "10"]
    outcome = run_command("compare", *command_line, "--json")
    assert outcome.code == 0, outcome.err
    told = json.loads(outcome.out)
    models = {model["name"]: model for model in told["models"] if not model["mean_of"]}
    assert list(models) == ["base", "federated", "site-1 alone", "site-2 alone", "site-1 own", "site-2 own"]
    run = tmp_path / "own" / "own-federated"
    for site in ("site-1", "site-2"):
        own = models[f"{site} own"]
        assert (own["kind"], own["site"], own["private"]) == ("own", site, False)
        assert ("epsilon" in own, Path(own["folder"])) == (False, run / f"private_to_{site}")
        (group,) = (entry for entry in told["groups"]["by site"]["groups"] if entry["name"] == site)
        changes = {entry["base"]: entry["difference"] for entry in group["changes"] if entry["tuned"] == f"{site} own"}
        assert set(changes) == {"base", "federated", f"{site} alone"}, "not what another site has"
        scores = group["scores"]
        value = scores[f"{site} own"]["value"] - scores["federated"]["value"]
        assert changes["federated"]["value"] == pytest.approx(value)
    *others, last = told["verdict"]
    assert {output.partition(", the own ")[0] for output in others if ", the own " in output} == {
        f"Compared with {name}" for name in ("base", "federated", "alone")
    }
    assert last.startswith("No guarantee covers the scores of site-1 own and site-2 own")
    shutil.rmtree(run / "private_to_site-2")
    modified = (run / "private_to_site-1").stat().st_mtime_ns
    repeated = run_command("compare", *command_line)
    assert repeated.code == 0, repeated.err
    assert "Own adapter minus each other, on the records that the site would have" in repeated.out
    assert (run / "private_to_site-1").stat().st_mtime_ns == modified, "what is there is not made again"
    assert json.loads((tmp_path / "own" / "compare.json").read_text()) == told, "the same records give the same adapter"


def test_runs_without_privacy_release_no_scores_or_aggregates() -> None:
    noised = ["experiment=debug", "data.heldout_fraction=0.4", "privacy.metrics=noised"]
    runs = plan_runs(noised, without_privacy=True, leave_out=())
    assert {(line.private, line.run.config.privacy.metrics) for line in runs} == {(True, "noised"), (False, "none")}
    runs = plan_runs(["experiment=debug", "federation.aggregation=secure"], without_privacy=True, leave_out=())
    assert [line.name for line in runs if line.run.config.federation.aggregation == "secure"] == ["federated"]
    assert {(line.run.config.federation.num_rounds, line.run.config.training.local_steps) for line in runs} == {(4, 1)}
