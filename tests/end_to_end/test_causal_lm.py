"""A whole run of a causal language model with generation."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedtune.config import saved_config

pytestmark = pytest.mark.nightly

REPOSITORY = Path(__file__).parents[2]
_SCORES = {"loss", "perplexity", "bleu", "rouge_l"}


@pytest.fixture(scope="module")
def folder(simulate: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return simulate(
        "model=random_llama",
        "data=e2e_nlg",
        "task=causal_lm",
        "data.max_length=384",
        "data.declared_sizes=40",
        "evaluation.generate=true",
        "evaluation.max_new_tokens=8",
        "privacy.metrics=noised",
        "privacy.metrics_noise_multiplier=4.0",
        "data.heldout_fraction=0.4",
        into=tmp_path_factory.mktemp("runs"),
    )


def test_scores_of_a_language_model(folder: Path, result_of: Any) -> None:
    result = result_of(folder)
    assert result["task"] == "causal_lm"
    assert set(result["final"]["metrics"]) == set(result["final"]["metrics_before"]) == _SCORES
    for entry in result["rounds"]:
        # Writing text after every round would take longer than training.
        assert set(entry["metrics"]) == {"loss", "perplexity"}
        assert set(entry["site_scores"]) == {"site-1", "site-2"}, "a language model is scored by its sites, too"
        assert np.isfinite([*entry["site_scores"].values()]).all()
    assert 0 < result["privacy"]["epsilon"] < 8
    assert {path.name for path in (folder / "adapter").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "fedtune.json",
        "README.md",
        "label.svg",
    }
    template = result["provenance"]["template"]
    assert (template["prompt"], template["chat"]) == (saved_config(folder).data.prompt_template, "none")
    assert template["sha256"] == hashlib.sha256(template["prompt"].encode()).hexdigest()
