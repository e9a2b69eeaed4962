"""`fedtune model-hash`: hashes for settings, federations and policies."""

import hashlib
import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from fedtune.model.base_model import hash_model
from fedtune.model.manifest import build_manifest
from fedtune.model.spec import ModelSpec

from ..conftest import run_command


def test_model_hash_covers_weights_configuration_and_tokenizer(tmp_path: Path) -> None:
    folder, gguf = tmp_path / "tiny", tmp_path / "a.gguf"
    folder.mkdir()
    save_file({"w": torch.arange(3.0)}, folder / "model.safetensors")
    (folder / "config.json").write_text('{"model_type": "bert"}')
    (folder / "tokenizer.json").write_text('{"model": {"type": "BPE", "vocab": {}, "merges": []}}')
    (folder / "README.md").write_text("not covered")
    digest, blank, title, *files = run_command("model-hash", str(folder)).printed.splitlines()
    assert digest == build_manifest(folder).sha256 == hash_model(ModelSpec(path=str(folder)))
    assert (blank, title) == ("", "Hashed files:")
    assert [line.split()[1] for line in files] == ["config.json", "model.safetensors", "tokenizer.json"]
    result = json.loads(run_command("model-hash", str(folder), "--json").out)
    assert (result["sha256"], result["files"]) == (digest, dict(build_manifest(folder).files))
    assert run_command("model-hash", str(folder), "--json", "--files").code == 2
    assert run_command("model-hash", "random:bert").out == f"{hash_model(ModelSpec(path='random:bert'))}\n"
    # The hash can be recomputed from the files; a GGUF file's hash is what sha256sum prints.
    assert hashlib.sha256(run_command("model-hash", str(folder), "--files").out.encode()).hexdigest() == digest
    for missing in (tmp_path, tmp_path / "no"):
        assert run_command("model-hash", str(missing)).code == 2
    gguf.write_bytes(b"GGUF")
    for path in (tmp_path, gguf):
        assert run_command("model-hash", str(path)).out.splitlines()[0] == hashlib.sha256(b"GGUF").hexdigest()
    # A model that sites refuse has no hash.
    (folder / "config.json").write_text('{"transformers_weights": "README.safetensors"}')
    assert "has transformers_weights" in run_command("model-hash", str(folder)).failed()
