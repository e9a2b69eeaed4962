"""Complete runs of a language model on chats, plain texts and preferences, with and without privacy."""

import csv
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ..cli import snapshots
from ..conftest import list_tiny_overrides, read_result, run_command, simulate

pytestmark = pytest.mark.nightly

ANSWERS = {"red": "stop", "green": "go", "blue": "swim"}
ROWS = 60


def build_conversation(number: int) -> str:
    first, second = (list(ANSWERS)[(number + step) % 3] for step in (0, 1))
    turns = [f"{first} {number}", ANSWERS[first], second, ANSWERS[second]]
    roles = ("user", "assistant") * 2
    return json.dumps([{"role": role, "content": text} for role, text in zip(roles, turns, strict=True)])


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty conversations as chats and as texts; a sixth of them are the lead's."""
    folder = tmp_path_factory.mktemp("files")
    texts = [
        {"role": build_conversation(number), "text": f"{build_conversation(number)}!", "who": f"p{number % 20}"}
        for number in range(ROWS)
    ]
    for name, rows in (("train", texts), ("test", texts[::6])):
        with (folder / f"{name}.csv").open("w", newline="") as stream:
            writer = csv.writer(stream)
            writer.writerow(["chat", "text", "who"])
            writer.writerows(row.values() for row in rows)
    return folder


@pytest.fixture(scope="module")
def tune_model(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    def run(*overrides: str) -> Path:
        settings = (
            *("model=random_llama", "data=e2e_nlg", "task=causal_lm", f"data.train_file='{files / 'train.csv'}'"),
            *(f"data.{name}_file='{files / 'test.csv'}'" for name in ("validation", "test")),
            *("data.prompt_template='{prompt}'", "data.train_fraction=1.0", "data.declared_sizes=30"),
            *("data.max_length=80", "training.learning_rate=0.05", "federation.num_rounds=3"),
        )
        return simulate(*settings, *overrides, into=tmp_path_factory.mktemp("runs"))

    return run


CHAT = ("data.columns={messages: chat}", "data.chat_template=plain", "evaluation.generate=true")
TEXT = ("data.columns={text: text}", "evaluation.generate=true")


@pytest.mark.parametrize("private", [True, False], ids=["private", "plain"])
@pytest.mark.parametrize("layout", [CHAT, TEXT], ids=["chat", "text"])
def test_chat_and_text_runs_train_and_report_scores(tune_model: Any, layout: tuple[str, ...], private: bool) -> None:
    scored = ("privacy.metrics=noised", "privacy.metrics_noise_multiplier=4.0", "data.heldout_fraction=0.4")
    result = read_result(
        tune_model(*layout, "evaluation.max_new_tokens=6", *(scored if private else ("privacy=none",)))
    )
    scores, before = result["final"]["metrics"], result["final"]["metrics_before"]
    assert np.isfinite(scores["loss"])
    assert set(scores) == ({"loss", "perplexity", "bleu", "rouge_l"} if layout == CHAT else {"loss", "perplexity"})
    assert (result["privacy"]["epsilon"] is None) != private
    if not private:
        assert scores["loss"] < before["loss"] - 0.3, "the run must learn"
    for entry in result["rounds"]:
        assert not entry["failed_sites"]
        assert set(entry["metrics"]) == {"loss", "perplexity"}, "generation in each round is too slow"
        assert set(entry["site_scores"]) == ({"site-1", "site-2"} if private else set())
        assert np.isfinite([*entry["site_scores"].values()]).all()
    template = result["provenance"]["template"]
    assert template["sha256"] == hashlib.sha256(template["prompt"].encode()).hexdigest()


# Preferences, from files in each format to a scored and usable model, with and without privacy.


COLORS, NUMBERS = ("red", "green", "blue"), ("one", "two", "three four")
SCORES = ["accuracy", "accuracy_length_controlled", "margin", "margin_length_controlled", "loss"]


def make_turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def make_pairs(form: str) -> list[dict[str, Any]]:
    """Create ninety preference pairs that prefer colors to numbers; in a third of them the color is the longer
    answer.
    """
    pairs: list[dict[str, Any]] = []
    for number in range(90):
        prompt, answers = f"say {number}", {"better": COLORS[number % 3], "worse": NUMBERS[number // 3 % 3]}
        chats = {name: [make_turn("user", prompt), make_turn("assistant", text)] for name, text in answers.items()}
        pairs.append(chats if form == "whole" else {"asked": prompt, **answers})
    return pairs


COLUMNS = {
    "text": ("data.columns={prompt: asked, chosen: better, rejected: worse}",),
    "whole": ("data.columns={chosen: better, rejected: worse}", "data.chat_template=plain"),
}


@pytest.fixture(scope="module")
def list_pair_overrides(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[str]]:
    """List the overrides of a tiny run on preference pairs of this format."""
    folder = tmp_path_factory.mktemp("files")

    def make(form: str, *overrides: str) -> list[str]:
        file = folder / f"{form}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in make_pairs(form)))
        return [
            *("experiment=own_preferences", "model=random_llama", "lora=all_linear", "lora.layers=null"),
            *(f"data.train_file='{file}'", "data.validation_file=null", "data.test_file=null"),
            *("data.validation_fraction=0.1", "data.test_fraction=0.2", "data.train_fraction=1.0"),
            *("data.declared_sizes=30", "data.max_length=48", "data.test_rows=null"),
            *("federation.num_sites=2", "federation.num_rounds=2", "training.local_steps=3"),
            *("training.learning_rate=0.05", *COLUMNS[form], *overrides),
        ]

    return make


@pytest.fixture(scope="module")
def private_run(list_pair_overrides: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    held_out = ("data.heldout_fraction=0.2", "privacy.metrics=noised")
    folder: Path = simulate(
        *list_pair_overrides("text", *held_out), into=tmp_path_factory.mktemp("runs"), name="private"
    )
    return folder


def test_private_preference_run_is_scored_charged_and_reported(private_run: Path) -> None:
    result = read_result(private_run)
    assert result["task"] == "preference"
    assert list(result["final"]["metrics"]) == SCORES
    assert set(result["rounds"][0]["metrics"]) == set(SCORES)
    assert result["final"]["metrics_before"]["accuracy"] == 0.5
    assert result["final"]["metrics"] != result["final"]["metrics_before"]
    assert 0 < result["privacy"]["epsilon"] < 8
    assert not any(entry["failed_sites"] for entry in result["rounds"])
    assert run_command("report", "verify", str(private_run / "report.json")).code == 0


def test_preference_run_without_privacy_learns(list_pair_overrides: Any, tmp_path: Path) -> None:
    learns = ("privacy=none", "privacy.noise_multiplier=null", "training.learning_rate=0.5", "training.local_steps=6")
    beta = ("task_settings.beta=0.5", "lora.layers=[-1]", "evaluation.generate=true", "evaluation.max_new_tokens=4")
    # Sampling decides how much a run learns in so few steps: with fresh samples some runs learn too little.
    folder = simulate(
        *list_pair_overrides("whole", *learns, *beta, "runtime.seeded_noise=true"), into=tmp_path, name="plain"
    )
    final = read_result(folder)["final"]
    assert list(final["metrics"]) == [*SCORES, "bleu", "rouge_l"]
    for score in ("accuracy", "accuracy_length_controlled"):
        assert final["metrics"][score] > final["metrics_before"][score] + 0.3, "on answers of any length"
    assert final["metrics"]["margin"] > 0.2
    assert final["metrics"]["loss"] < final["metrics_before"]["loss"] - 0.1


def test_continued_preference_run_keeps_the_base_as_reference(
    list_pair_overrides: Any, private_run: Path, tmp_path: Path
) -> None:
    more = list_pair_overrides("text", f"model.adapter={private_run}", "federation.num_rounds=1")
    before = read_result(simulate(*more, into=tmp_path, name="more"))["final"]["metrics_before"]
    assert before == read_result(private_run)["final"]["metrics"]
    assert before["loss"] != pytest.approx(0.6931, abs=1e-4)


@snapshots.parametrize_mistakes("mistakes-preference")
def test_incompatible_preference_settings_are_named(list_pair_overrides: Any, tmp_path: Path, typed: str) -> None:
    message = run_command("simulate", *list_tiny_overrides(*list_pair_overrides("text"), typed, into=tmp_path)).failed()
    snapshots.check_message("mistakes-preference", typed, message)
