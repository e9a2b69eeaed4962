"""Sweeps: executed runs, and results as table, CSV and JSON."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fedtune.api.compose import compose_run
from fedtune.lab.studies.trials import SearchTrial, Trials
from fedtune.privacy.ledger.verify import verify
from fedtune.runs.results import DIVERGED, FinalResult, PrivacyResult, RunResult
from fedtune.show.run_progress import Display
from fedtune.show.terminal_tables import show
from fedtune.spec import RunError

from ...builders import run_result
from ...conftest import fail_where, list_tiny_overrides, read_result, run_command
from ...federation.conftest import round_of

SHORT = ("federation.num_rounds=1", "training.local_steps=1", "tracking=quiet")


def read_csv_lines(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sweep")


@pytest.fixture(scope="module")
def sweep_words(folder: Path) -> list[str]:
    """Overrides of a sweep whose second run fails at loading the model."""
    return list_tiny_overrides("lora.target_modules=[query],[nonesuch],[key]", *SHORT, into=folder, name="three")


@pytest.fixture(scope="module")
def outcome(sweep_words: list[str]) -> Any:
    return run_command("simulate", "-m", *sweep_words)


def test_failed_run_does_not_stop_the_sweep(outcome: Any, folder: Path) -> None:
    reason = "lora.target_modules = 'nonesuch': must be among the base's modules: dense, key, query, value"
    states = ["finished", "failed", "finished"]
    assert outcome.failed() == reason
    table = outcome.out.split("Sweep")[1]
    assert f"run 2 failed: {reason}" in " ".join(table.split())
    assert [line.split()[-1] for line in table.splitlines() if "[" in line] == states
    assert "Continue the sweep" not in table, "it would fail again"
    assert str(folder / "three.csv") in outcome.out
    lines = read_csv_lines(folder / "three.csv")
    assert [line["state"] for line in lines] == states
    assert [line["reason"] for line in lines] == ["", reason, ""]
    assert (lines[1]["epsilon_spent"], lines[1]["validation_accuracy"]) == ("", "")
    assert [line["lora.target_modules"] for line in lines] == ["[query]", "[nonesuch]", "[key]"]
    assert "federation.num_rounds" not in lines[0], "it was not swept"
    for line in (lines[0], lines[2]):
        result = read_result(folder / line["run"])
        assert float(line["epsilon_spent"]) == result["privacy"]["epsilon"]
        for name, score in result["final"]["metrics"].items():
            assert float(line[f"test_{name}"]) == score
        for name, score in result["rounds"][-1]["metrics"].items():
            assert float(line[f"validation_{name}"]) == score


def test_repeated_sweep_runs_only_missing_runs(outcome: Any, sweep_words: list[str], folder: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in folder.glob("three-*/run.json")}
    (folder / "three.csv").unlink()
    repeated = run_command("simulate", "-m", *sweep_words, "--json")
    assert repeated.code == outcome.code
    assert {path: path.stat().st_mtime_ns for path in folder.glob("three-*/run.json")} == before
    assert len(read_csv_lines(folder / "three.csv")) == 3
    output = json.loads(repeated.out)
    assert output["table"] == str(folder / "three.csv")
    assert [run["state"] for run in output["runs"]] == ["finished", "failed", "finished"]
    assert output["runs"][0]["values"] == {"lora.target_modules": "[query]"}
    assert output["runs"][0]["result"] == json.loads((folder / "three-lora.target_modules=-query/run.json").read_text())
    assert output["runs"][1]["result"] is None
    assert "nonesuch" in output["runs"][1]["reason"]
    marked = [line["folder"] for line in read_csv_lines(folder / "three.csv") if line["best"]]
    assert [output["best"]] == marked


def test_existing_sweep_name_is_refused_before_the_first_run(
    outcome: Any, sweep_words: list[str], folder: Path
) -> None:
    def read_refusal(*more: str, words: Sequence[str] = sweep_words) -> str:
        found = run_command("simulate", "-m", *words, *more)
        assert (found.code, found.out) == (2, "")
        return str(found.message)

    assert "is taken: " in (changed := read_refusal("lora.rank=3"))
    assert "lora.rank was 4, is 3" in changed
    assert "lora.target_modules: has several values and is set again" in read_refusal("lora.target_modules=[value]")
    fixed = [word for word in sweep_words if not word.startswith("lora.target_modules")]
    others = read_refusal("lora.target_modules=[value],[dense]", words=fixed)
    assert f"{folder / 'three.csv'} contains other runs, such as three-lora.target_modules=-key" in others
    assert "is used by two runs" in read_refusal("name=a,a")
    (folder / "mine.csv").write_text("text,label\na,b\n")
    assert "is not a sweep's table" in read_refusal("name=mine")
    assert (folder / "mine.csv").read_text() == "text,label\na,b\n"
    assert len(read_csv_lines(folder / "three.csv")) == 3


@pytest.mark.nightly
def test_interrupted_sweep_resumes_with_its_rows(tmp_path: Path) -> None:
    words = list_tiny_overrides(
        "seed=1,2,3", "federation.num_rounds=2", "training.local_steps=1", into=tmp_path, name="stopped"
    )
    with pytest.MonkeyPatch.context() as patched:
        rounds = count(1)
        fail_where(patched, Display, "on_round_finished", lambda *_: next(rounds) == 3, KeyboardInterrupt())
        stopped = run_command("simulate", "-m", *words)  # in the first round of the second run
    assert stopped.code == 1
    assert [line["state"] for line in read_csv_lines(tmp_path / "stopped.csv")] == ["finished", "interrupted"]
    output = " ".join(stopped.out.split())
    assert "1 run not begun yet." in output
    assert "Continue the sweep with: fedtune simulate -m experiment=debug" in output
    assert "name=stopped" in output
    assert float(read_csv_lines(tmp_path / "stopped.csv")[1]["epsilon_spent"]) > 0, "its first round was charged"

    repeated = run_command("simulate", "-m", *words)
    assert (repeated.code, repeated.err) == (0, "")
    assert verify(tmp_path / "stopped-seed=2/sites/site-1/ledger.db").history.count_total_charges().total() == 2, (
        "none twice"
    )
    assert "1 run had already finished" in repeated.out
    lines = read_csv_lines(tmp_path / "stopped.csv")
    assert [line["state"] for line in lines] == ["finished"] * 3
    assert len({line["epsilon_spent"] for line in lines}) == 1


@pytest.mark.nightly
def test_sweep_runs_in_python_and_resumes_without_a_name(tmp_path: Path) -> None:
    words = [word for word in list_tiny_overrides("seed=1,2", *SHORT, into=tmp_path) if not word.startswith("name=")]
    trials = Trials.from_sweep(words)
    assert Trials.from_sweep(trials.again) == trials
    assert Trials.from_sweep(["experiment=debug", "name=a,b"]).table.name == "a-sweep.csv"
    trials.run()
    assert [trial.state for trial in trials.rows.values()] == ["finished"] * 2
    assert trials.best in trials.rows.values()


@pytest.mark.nightly
def test_sweep_over_budget_names_the_refused_run(tmp_path: Path) -> None:
    assert run_command("simulate", "-m", *list_tiny_overrides("lora.layers=[7],[8]", *SHORT, into=tmp_path)).code == 2
    assert list(tmp_path.iterdir()) == [], "where every run fails at once"
    shared = ("training.learning_rate=0.01,0.02", f"runtime.sites_dir='{tmp_path / 'sites'}'")
    outcome = run_command("simulate", "-m", *list_tiny_overrides(*shared, *SHORT, into=tmp_path / "runs", name="s"))
    first, second = read_csv_lines(tmp_path / "runs" / "s.csv")
    assert (first["state"], second["state"]) == ("finished", "failed")
    assert second["reason"] == outcome.failed(3)


def make_result(
    validation: Mapping[str, float | None], *, test: float = 0.5, findings: tuple[str, ...] = ()
) -> RunResult:
    rounds = (round_of(1, metrics=dict(validation)),)
    final = FinalResult(metrics={"accuracy": test, "loss": test}, findings=findings)
    return run_result(rounds=rounds, final=final, privacy=PrivacyResult(delta=1e-5, seeded_noise=False, sites={}))


@pytest.fixture
def make_row(tmp_path: Path) -> Any:
    def make(score: float | None, *overrides: str, **changes: Any) -> SearchTrial:
        config = compose_run(list_tiny_overrides(*overrides, into=tmp_path))
        name = "loss" if config.task == "causal_lm" else "accuracy"
        scores = {} if score is None else {name: score}
        return SearchTrial(config=config, folder=tmp_path / "x", values={}, result=make_result(scores, **changes))

    return make


def pick_best(rows: Sequence[SearchTrial]) -> SearchTrial | None:
    return Trials(Path("x.csv"), rows={Path(str(number)): row for number, row in enumerate(rows)}).best


WRITES = ("task=causal_lm", "model=random_llama", "data=e2e_nlg", "lora=all_linear", "evaluation.generate=false")


def test_best_run_is_selected_by_validation_score(make_row: Any) -> None:
    rows = [make_row(0.4, test=0.9), make_row(0.6, test=0.1), make_row(0.5, test=0.5)]
    assert pick_best(rows) is rows[1]
    assert pick_best([make_row(None, test=0.9), make_row(None, test=0.1)]) is None
    assert pick_best(rows[:1]) is None, "one run is the best of nothing"
    first, second = make_row(0.5), make_row(0.5)
    assert pick_best([first, second]) is first
    losses = [make_row(2.0, *WRITES), make_row(1.0, *WRITES), make_row(3.0, *WRITES)]
    assert pick_best(losses) is losses[1], "the smallest"


@pytest.mark.nightly
def test_failed_runs_and_training_scores_are_not_best_run_candidates(make_row: Any) -> None:
    rows = [
        make_row(0.4),
        make_row(0.3),
        make_row(0.9, findings=(DIVERGED,)),
        replace(make_row(0.8), error=RunError("x")),
    ]
    assert [one.state for one in rows] == ["finished", "finished", "diverged", "failed"]
    assert pick_best(rows) is rows[0]
    train = (f"data.validation_file={make_row(0.4).config.data.train_file}",)
    assert pick_best([make_row(0.4, *train), make_row(0.6, *train)]) is None
    share = ("data.validation_fraction=0.2", "data.validation_file=null")
    rows = [make_row(0.4, *share, test=0.9), make_row(0.6, *share, test=0.1)]
    assert pick_best(rows) is rows[1], "no site trains on a simulation's share"
    assert pick_best([make_row(0.4, *share), make_row(0.6, *share, "seed=7")]) is None, "other records"
    assert pick_best([make_row(0.4), make_row(0.6, "data.on_bad_record=skip")]) is None


@pytest.mark.parametrize(
    ("one", "other", "comparable"),
    [
        ((), ("lora.rank=2", "privacy.epsilon=3", "data.max_length=8"), True),
        *((("data.validation_rows=5",), ("data.validation_rows=6",), False), ((), WRITES, False)),
        *((WRITES, (*WRITES, "lora.rank=2"), True), (WRITES, (*WRITES, "data.max_length=9"), False)),
    ],
)
def test_only_scores_on_the_same_records_are_compared(make_row: Any, one: Any, other: Any, comparable: bool) -> None:
    assert (pick_best([make_row(0.4, *one), make_row(0.5, *other)]) is not None) == comparable


def test_unexpected_error_ends_the_sweep_without_its_text(tmp_path: Path) -> None:
    trials, started = Trials.from_sweep(list_tiny_overrides("seed=1,2,3", into=tmp_path, name="s")), []

    def run_trial(trial: SearchTrial) -> RunResult:
        started.append(trial.folder)
        trial.folder.mkdir()
        if len(started) == 2:
            raise ValueError("a record's text")
        return make_result({"accuracy": 0.5})

    with pytest.raises(ValueError, match="a record's text"):
        trials.run(run_trial)
    output = [(line["state"], line["reason"]) for line in read_csv_lines(tmp_path / "s.csv")]
    assert output == [("finished", ""), ("failed", "ValueError")]
    assert len(started) == 2
    assert "record's text" not in str(trials.section())


@pytest.mark.by_day("80")
@pytest.mark.parametrize("width", [80, 120])
def test_sweep_table_fits_the_terminal_width(tmp_path: Path, width: int) -> None:
    swept = ("privacy.epsilon=1,3", "training.learning_rate=0.005,0.01", "federation.num_sites=2,3")
    out, given = io.StringIO(), iter([0.5, 0.625, *[None] * 6])
    trials = Trials.from_sweep(list_tiny_overrides(*swept, into=tmp_path))
    trials.run(lambda trial: make_result({"accuracy": next(given)}))
    show([trials.section()], console=Console(file=out, width=width))
    table = out.getvalue().splitlines()
    assert max(map(len, table)) <= width
    (best,) = [line.split() for line in table if line.startswith("  *") and "finished" in line]
    assert best == ["*", "2", "1", "0.005", "3", "0.625", "0.500", "unbounded", "finished"]
    assert sum("not finite" in line for line in table) == 6
