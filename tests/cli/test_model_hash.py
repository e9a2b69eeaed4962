"""`fedtune model-hash`: what it prints is what settings, federation and policy take."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from fedtune.model.base_model import model_sha256
from fedtune.model.manifest import manifest_of
from fedtune.model.spec import ModelSpec


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "tiny"
    made.mkdir()
    save_file({"w": torch.arange(3.0)}, made / "model.safetensors")
    (made / "config.json").write_text('{"model_type": "bert"}')
    (made / "tokenizer.json").write_text('{"model": {"type": "BPE", "vocab": {}, "merges": []}}')
    (made / "README.md").write_text("not covered")
    return made


def test_the_hash_and_what_it_covers(folder: Path, command: Any) -> None:
    outcome = command("model-hash", str(folder))
    digest, blank, title, *files = outcome.out.splitlines()
    assert outcome.code == 0
    assert digest == manifest_of(folder).sha256 == model_sha256(ModelSpec(path=str(folder)))
    assert (blank, title) == ("", "It covers:")
    assert [line.split()[1] for line in files] == ["config.json", "model.safetensors", "tokenizer.json"]
    said = json.loads(command("model-hash", str(folder), "--json").out)
    assert (said["sha256"], said["files"]) == (digest, dict(manifest_of(folder).files))
    assert command("model-hash", str(folder), "--json", "--files").code == 2
    assert command("model-hash", "random:bert").out == f"{model_sha256(ModelSpec(path='random:bert'))}\n"
    # Anybody can compute it from the files.
    assert hashlib.sha256(command("model-hash", str(folder), "--files").out.encode()).hexdigest() == digest


@pytest.mark.parametrize("named", ["folder", "file"])
def test_a_gguf_file_has_the_hash_that_sha256sum_prints(named: str, tmp_path: Path, command: Any) -> None:
    file = tmp_path / "a.gguf"
    file.write_bytes(b"GGUF")
    out = command("model-hash", str(tmp_path if named == "folder" else file)).out
    assert out.splitlines()[0] == hashlib.sha256(b"GGUF").hexdigest()


def test_a_model_that_a_site_would_refuse(folder: Path, command: Any) -> None:
    (folder / "config.json").write_text('{"transformers_weights": "README.safetensors"}')
    assert "has transformers_weights" in command("model-hash", str(folder)).failed()
    assert command("model-hash", str(folder.parent)).code == 2
    assert command("model-hash", "/no/such/model").code == 2
