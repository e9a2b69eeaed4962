"""A model is pinned whole: one hash covers every file that loading reads, and nothing else is loaded."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fedtune.model import ModelSpec, load_base, load_tokenizer
from fedtune.spec import ConfigError

BERT = ModelSpec(path="random:bert")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A local folder with the tiny bert and its tokenizer."""
    load_base(BERT, task="classification").save_pretrained(tmp_path / "model")
    load_tokenizer(BERT).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def changed_json(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_a_config_does_not_point_the_loader_at_other_weights(folder: Path) -> None:
    """What is hashed was model.safetensors; what was loaded was the file that config.json named."""
    pinned = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    other = {name: torch.zeros_like(tensor) for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(other, folder / "README.safetensors", metadata={"format": "pt"})
    changed_json(folder / "config.json", transformers_weights="README.safetensors")
    with pytest.raises(ConfigError):
        load_base(ModelSpec(path=str(folder), sha256=pinned), task="classification")


def test_another_config_beside_pinned_weights_is_refused(folder: Path) -> None:
    pinned = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    changed_json(folder / "config.json", hidden_act="relu")
    with pytest.raises(ConfigError):
        load_base(ModelSpec(path=str(folder), sha256=pinned), task="classification")


def test_another_tokenizer_beside_pinned_weights_is_refused(folder: Path) -> None:
    pinned = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    changed_json(folder / "tokenizer_config.json", unk_token="e")
    with pytest.raises(ConfigError):
        load_tokenizer(ModelSpec(path=str(folder), sha256=pinned))
