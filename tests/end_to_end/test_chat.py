"""Whole runs of a language model on chats and on plain texts, with privacy and without."""

import csv
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ..conftest import result_of, simulate

pytestmark = pytest.mark.nightly

ANSWERS = {"red": "stop", "green": "go", "blue": "swim"}
ROWS = 60


def conversation(number: int) -> str:
    first, second = (list(ANSWERS)[(number + step) % 3] for step in (0, 1))
    said = [f"{first} {number}", ANSWERS[first], second, ANSWERS[second]]
    roles = ("user", "assistant") * 2
    return json.dumps([{"role": role, "content": text} for role, text in zip(roles, said, strict=True)])


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same sixty conversations as chats and as texts; the lead's are a sixth of them."""
    folder = tmp_path_factory.mktemp("files")
    texts = [
        {"role": conversation(number), "text": f"{conversation(number)}!", "who": f"p{number % 20}"}
        for number in range(ROWS)
    ]
    for name, rows in (("train", texts), ("test", texts[::6])):
        with (folder / f"{name}.csv").open("w", newline="") as stream:
            writer = csv.writer(stream)
            writer.writerow(["chat", "text", "who"])
            writer.writerows(row.values() for row in rows)
    return folder


@pytest.fixture(scope="module")
def tuned(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    def run(*overrides: str) -> Path:
        given = (
            *("model=random_llama", "data=e2e_nlg", "task=causal_lm", f"data.train_file='{files / 'train.csv'}'"),
            *(f"data.{name}_file='{files / 'test.csv'}'" for name in ("validation", "test")),
            *("data.prompt_template='{prompt}'", "data.train_fraction=1.0", "data.declared_sizes=30"),
            *("data.max_length=80", "training.learning_rate=0.05", "federation.num_rounds=3"),
        )
        return simulate(*given, *overrides, into=tmp_path_factory.mktemp("runs"))

    return run


CHAT = ("~data.columns", "+data.columns={messages: chat}", "data.chat_template=plain", "evaluation.generate=true")
TEXT = ("~data.columns", "+data.columns={text: text}", "evaluation.generate=true")


@pytest.mark.parametrize("private", [True, False], ids=["private", "plain"])
@pytest.mark.parametrize("layout", [CHAT, TEXT], ids=["chat", "text"])
def test_a_run_trains_and_scores(tuned: Any, layout: tuple[str, ...], private: bool) -> None:
    scored = ("privacy.metrics=noised", "privacy.metrics_noise_multiplier=4.0", "data.heldout_fraction=0.4")
    result = result_of(tuned(*layout, "evaluation.max_new_tokens=6", *(scored if private else ("privacy=none",))))
    scores, before = result["final"]["metrics"], result["final"]["metrics_before"]
    assert np.isfinite(scores["loss"])
    assert set(scores) == ({"loss", "perplexity", "bleu", "rouge_l"} if layout == CHAT else {"loss", "perplexity"})
    assert (result["privacy"]["epsilon"] is None) != private
    if not private:
        assert scores["loss"] < before["loss"] - 0.3, "it learns"
    for one in result["rounds"]:
        assert not one["failed_sites"]
        assert set(one["metrics"]) == {"loss", "perplexity"}, "writing text each time would take longer than training"
        assert set(one["site_scores"]) == ({"site-1", "site-2"} if private else set())
        assert np.isfinite([*one["site_scores"].values()]).all()
    template = result["provenance"]["template"]
    assert template["sha256"] == hashlib.sha256(template["prompt"].encode()).hexdigest()
