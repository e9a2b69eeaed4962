"""A model's hash covers every file that loading reads, and nothing else is loaded."""

import hashlib
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from transformers import LlamaConfig

from fedtune.model.base_model import expand_gguf, hash_model, load_base, load_tokenizer
from fedtune.model.manifest import Manifest, build_manifest, stage_files
from fedtune.model.spec import ModelSpec
from fedtune.spec import ConfigError, RunError

BERT = ModelSpec(path="random:bert")
FILES = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]


def hash_content(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        *(("config.json", {"hidden_act": "relu"}), ("config.json", {"layer_norm_eps": 0.5})),
        *(("tokenizer_config.json", {"unk_token": "e"}), ("tokenizer.json", {"truncation": None, "version": "1.0 "})),
        *(("generation_config.json", {}), ("special_tokens_map.json", {}), ("vocab.json", {"a": 1})),
        *(("chat_template.jinja", {}), ("tokenizer_config.json", None), ("model.safetensors", b"?")),
    ],
)
def test_any_changed_model_file_changes_the_digest(folder: Path, name: str, changes: Any) -> None:
    spec = ModelSpec(path=str(folder), sha256=hash_model(ModelSpec(path=str(folder))))
    load_base(spec)
    file = folder / name
    if changes is None:
        file.unlink()
    elif isinstance(changes, bytes):  # the hash is cached only for an unchanged file
        file.write_bytes(file.read_bytes()[:-1] + changes)
    else:
        file.write_text(json.dumps((json.loads(file.read_text()) if file.exists() else {}) | changes))
    for load in (lambda: load_base(spec), lambda: load_tokenizer(spec)):
        with pytest.raises(ConfigError, match="does not match") as caught:
            load()
        assert caught.value.key == "model.sha256"


def test_model_digest_is_the_hash_of_a_sha256sum_manifest(folder: Path) -> None:
    lines = "".join(f"{hash_content((folder / name).read_bytes())}  {name}\n" for name in FILES)
    expected = "fedtune model manifest 1\n" + lines
    assert build_manifest(folder).text == expected
    assert hash_model(ModelSpec(path=str(folder))) == hash_content(expected.encode())
    (folder / "a.gguf").write_bytes(b"GGUF")
    manifest = build_manifest(folder, gguf_file="a.gguf")
    assert manifest.sha256 == hash_content(b"GGUF"), "a GGUF file must keep its plain hash"
    assert manifest.text == f"{hash_content(b'GGUF')}  a.gguf\n"
    assert Manifest(files=(("model.safetensors", hash_content(b"GGUF")),)).sha256 != manifest.sha256, (
        "a manifest must not have a GGUF file's hash"
    )


def test_digest_of_a_sharded_model_covers_index_and_shards(folder: Path) -> None:
    load_base(BERT).save_pretrained(folder, max_shard_size="20KB")
    (folder / "model.safetensors").unlink()
    shards = sorted(set(json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"].values()))
    manifest = build_manifest(folder)
    assert len(shards) > 1
    assert {"model.safetensors.index.json", *shards} < dict(manifest.files).keys()
    lines = "".join(f"{hash_content((folder / name).read_bytes())}  {name}\n" for name in shards)
    assert manifest.sha256 != hash_content(lines.encode()), "a manifest must not equal a list of shards"
    spec = ModelSpec(path=str(folder), sha256=manifest.sha256)
    before = load_base(BERT).state_dict()
    assert all(torch.equal(value, before[name]) for name, value in load_base(spec).named_parameters())


def test_staged_folder_contains_the_manifest_files_and_is_removed(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"\x80")
    with stage_files(folder) as (staged, manifest):
        assert sorted(os.listdir(staged)) == [name for name, _ in manifest.files] == FILES
    assert not staged.exists()
    with stage_files(folder, with_weights=False) as (staged, manifest):
        assert "model.safetensors" not in os.listdir(staged)
        assert manifest == build_manifest(folder)
    with stage_files(folder) as (staged, manifest):  # the hashed files are the loaded files
        before = (staged / "config.json").read_bytes()
        (folder / "config.json").write_text("{}")
        assert (staged / "config.json").read_bytes() == before
        assert dict(manifest.files)["config.json"] == hash_content(before)


@pytest.mark.parametrize("how", ["in place", "replaced", "removed"])
def test_weights_changed_during_loading_are_refused(folder: Path, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = folder / "model.safetensors"

    def change() -> None:
        with stage_files(folder):
            content = weights.read_bytes()
            if how != "in place":
                weights.unlink()
            if how != "removed":
                weights.write_bytes(content[:-1] + b"?")

    with pytest.raises(ConfigError, match=r"must not change while it is loaded: model\.safetensors changed"):
        change()
    monkeypatch.setattr("tempfile.tempdir", str(folder / "nowhere"))
    with pytest.raises(RunError, match="no folder for temporary files is writable"):
        build_manifest(folder)


def test_hub_snapshot_may_link_only_into_its_cache(folder: Path, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "0123"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for name in FILES:
        shutil.copy(folder / name, blobs / name)
        (snapshot / name).symlink_to(Path("..", "..", "blobs", name))
    assert build_manifest(snapshot) == build_manifest(folder)
    (snapshot / "vocab.txt").symlink_to("/etc/passwd")
    with pytest.raises(ConfigError, match=r"must not contain vocab\.txt, a link to a file outside the folder"):
        build_manifest(snapshot)


def test_gguf_file_is_expanded_without_neighboring_files(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Transformers would also read an adapter or generation settings next to a GGUF file."""
    gguf_folder = tmp_path / "gguf"
    gguf_folder.mkdir()
    for name in ("a.gguf", "adapter_config.json", "generation_config.json", "config.json"):
        (gguf_folder / name).write_text("{}")
    calls: list[tuple[list[str], str]] = []

    def expand_file(file: Path, *, sha256: str, cache: Path) -> Path:
        calls.append((os.listdir(file.parent), sha256))
        return folder

    monkeypatch.setattr("fedtune.model.base_model.expand_gguf", expand_file)
    spec = ModelSpec(path=str(gguf_folder), gguf_file="a.gguf", sha256=hash_content(b"{}"))
    load_base(spec)
    load_tokenizer(spec)
    assert calls == [(["a.gguf"], hash_content(b"{}"))] * 2
    with pytest.raises(ConfigError, match="does not match"):
        load_tokenizer(replace(spec, sha256="0" * 64))


def test_gguf_metadata_is_subject_to_the_config_rules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    config = Mock(return_value=LlamaConfig(rope_parameters=rope))
    monkeypatch.setattr("fedtune.model.base_model.AutoConfig.from_pretrained", config)
    monkeypatch.setattr("fedtune.model.base_model.load_gguf", lambda _: pytest.fail("it must be refused"))
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    with pytest.raises(ConfigError, match="its metadata has rope type dynamic") as caught:
        expand_gguf(tmp_path / "a.gguf", sha256="ab", cache=tmp_path / "cache")
    assert caught.value.key == "model.gguf_file"
    assert config.call_args.kwargs == {"gguf_file": "a.gguf", "local_files_only": True, "trust_remote_code": False}
