"""Hostile model folders are refused with a reason, and additional files are never read."""

import json
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaModel, Phi3Config, Phi3Model, PreTrainedModel, RobertaConfig, RobertaModel

from fedtune.model.base_model import hash_model, load_base, load_tokenizer
from fedtune.model.compatibility import check_ignores_batch_length, check_tokenizer_fits, get_max_positions
from fedtune.model.spec import ModelSpec
from fedtune.spec import ConfigError

CASES: dict[str, dict[str, Any]] = yaml.safe_load(Path(__file__).with_name("hostile_folders.yaml").read_text())
CASES |= {
    "extremely deeply nested": {"config.json": "[" * 90_000, "refused": "config.json is not readable JSON"},
    "oversized config": {"config.json": " " * (1 << 20) + "{}", "refused": "larger than 1 MiB"},
    "shard index with a long name": {
        "index": json.dumps({"weight_map": {"w": "a" * 300 + ".safetensors"}}),
        "refused": "names safetensors files next to it",
    },
    "deep shard index": {"index": "[" * 50_000, "refused": "model.safetensors.index.json is not readable JSON"},
    "truncated weights": {"cut": 100, "refused": "cannot be loaded"},
}


def set_json_fields(folder: Path, name: str, **changes: Any) -> None:
    """Set fields of a JSON file, creating the file if needed."""
    file = folder / name
    file.write_text(json.dumps((json.loads(file.read_text()) if file.exists() else {}) | changes))


def prepare(folder: Path, case: dict[str, Any]) -> None:
    weights = folder / "model.safetensors"
    if "index" in case:
        weights.rename(folder / "a.safetensors")
        (folder / "model.safetensors.index.json").write_text(case["index"])
    if "cut" in case:
        os.truncate(weights, case["cut"])
    for name, target in case.get("links", {}).items():
        if target == "moved":
            target = shutil.move(folder / name, folder.parent / name)
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target)
    if name := case.get("pipe"):
        (folder / name).unlink()
        os.mkfifo(folder / name)
    for name in case.keys() - {"index", "cut", "links", "pipe", "refused"}:
        if isinstance(content := case[name], dict):
            set_json_fields(folder, name, **content)
        elif content is None:
            (folder / name).unlink()
        else:
            (folder / name).write_bytes(content.encode("latin-1"))


WEIGHT_ERRORS = ("cannot be loaded", "describes a model of")
"""Problems found while the weights are built, which a tokenizer does not need."""


@pytest.mark.parametrize("attack", CASES)
def test_hostile_model_folder_is_refused_with_a_reason(attack: str, folder: Path) -> None:
    prepare(folder, CASES[attack])
    reason = CASES[attack]["refused"]
    needs_weights = any(word in reason for word in WEIGHT_ERRORS)
    for load in (load_base,) if needs_weights else (load_base, load_tokenizer):
        with pytest.raises(ConfigError, match=reason) as caught:
            load(ModelSpec(path=str(folder)))
        assert caught.value.key == "model.path"
        assert "\n" not in str(caught.value)


FILES = {
    "config.4.0.0.json": '{"model_type": "gpt2"}',
    "tokenizer.4.0.0.json": "{}",
    "modeling_bert.py": "raise SystemExit",
    "pytorch_model.bin": "\x80\x04.",
    "tekken.json": "{}",
    "preprocessor_config.json": '{"auto_map": {"AutoProcessor": "p.P"}}',
    "modules.json": '[{"type": "evil.Module"}]',
}


def test_files_outside_the_manifest_are_ignored(clean: Path, folder: Path) -> None:
    prepare(folder, FILES)
    zeros = {key: torch.zeros_like(tensor) for key, tensor in load_file(folder / "model.safetensors").items()}
    # A paper's name, an adapter's weights, a variant, and shards next to the single file.
    for name in ("README", "adapter_model", "model.fp16", "a"):
        save_file(zeros, folder / f"{name}.safetensors", metadata={"format": "pt"})
    set_json_fields(folder, "model.safetensors.index.json", weight_map=dict.fromkeys(zeros, "a.safetensors"))
    for name in ("custom_generate", "additional_chat_templates"):
        (folder / name).mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("{{ evil }}")
    plain = ModelSpec(path=str(clean))
    spec = ModelSpec(path=str(folder), sha256=hash_model(plain))
    ours, theirs = load_base(spec), load_base(plain)
    for (name, tensor), (_, expected) in zip(ours.state_dict().items(), theirs.state_dict().items(), strict=True):
        assert torch.equal(tensor, expected), name
    ids, expected_ids = (load_tokenizer(model)("Grüße")["input_ids"] for model in (spec, plain))
    assert ids == expected_ids


def edit_tokenizer(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    fields = json.loads((folder / "tokenizer.json").read_text())
    edit(fields)
    set_json_fields(folder, "tokenizer.json", **fields)


def add_token(fields: dict[str, Any], number: int) -> None:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    fields["added_tokens"].append({"id": number, "content": "metastasis", "special": False, **flags})
    fields["model"]["vocab"]["metastasis"] = number


def check_fits(folder: Path) -> None:
    spec = ModelSpec(path=str(folder))
    check_tokenizer_fits(load_tokenizer(spec), load_base(spec), path=spec.path)


@pytest.mark.parametrize(
    "change",
    [
        partial(edit_tokenizer, edit=partial(add_token, number=261)),
        partial(edit_tokenizer, edit=partial(add_token, number=100_000)),
        partial(
            edit_tokenizer, edit=lambda fields: fields["post_processor"]["special_tokens"]["[CLS]"].update(ids=[4000])
        ),
        partial(set_json_fields, name="tokenizer_config.json", sep_token="[NEW]"),
        partial(set_json_fields, name="tokenizer_config.json", extra_special_tokens=["<|patient|>"]),
    ],
)
def test_token_beyond_the_embedding_is_refused(folder: Path, change: Callable[[Path], None]) -> None:
    change(folder)
    with pytest.raises(ConfigError, match=r"has ids up to \d+, but its embedding has only 261 rows") as caught:
        check_fits(folder)
    assert caught.value.key == "model.path"


def test_last_embedding_row_is_usable_and_padding_is_required(folder: Path) -> None:
    def take_last_id(fields: dict[str, Any]) -> None:
        vocab = fields["model"]["vocab"]
        del vocab[next(token for token, number in vocab.items() if number == 260)]
        add_token(fields, 260)

    check_fits(folder)
    edit_tokenizer(folder, take_last_id)
    check_fits(folder)
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(ConfigError, match="must have a padding token or an end-of-sequence token"):
        check_fits(folder)


def make_tiny_base(kind: type[PreTrainedModel], settings: Any, **changes: Any) -> PreTrainedModel:
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    return kind(settings(vocab_size=32, **shape, **changes)).eval()


@pytest.mark.parametrize("padding", [0, 1, 5])
def test_usable_positions_exclude_the_padding_offset(padding: int, clean: Path) -> None:
    assert get_max_positions(load_base(ModelSpec(path=str(clean)))) == 512, "other models use all positions"
    assert get_max_positions(make_tiny_base(LlamaModel, LlamaConfig, max_position_embeddings=20)) == 20
    base = make_tiny_base(RobertaModel, RobertaConfig, max_position_embeddings=20, pad_token_id=padding)
    max_positions = get_max_positions(base)
    assert max_positions == 20 - padding - 1
    base(input_ids=torch.full((1, max_positions), 7))
    with pytest.raises((IndexError, RuntimeError)):
        base(input_ids=torch.full((1, max_positions + 1), 7))


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default"},
        {"rope_type": "linear", "factor": 2.0},
        {"rope_type": "yarn", "original_max_position_embeddings": 8, "factor": 2.0},
        {"rope_type": "llama3", **dict.fromkeys(("factor", "low_freq_factor"), 2.0), "high_freq_factor": 4.0}
        | {"original_max_position_embeddings": 8},
    ],
)
def test_static_rope_types_are_accepted(tmp_path: Path, rope: dict[str, Any]) -> None:
    make_tiny_base(LlamaModel, LlamaConfig, rope_parameters={"rope_theta": 1e4, **rope}).save_pretrained(tmp_path)
    assert load_base(ModelSpec(path=str(tmp_path))).config.rope_parameters["rope_type"] == rope["rope_type"]


def test_rope_type_depending_on_batch_length_is_refused() -> None:
    """Phi-3 accepts the old name "yarn" for longrope, so the check inspects the built model."""
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    settings = {"original_max_position_embeddings": 8, "max_position_embeddings": 16, "pad_token_id": 0}
    base = make_tiny_base(Phi3Model, Phi3Config, rope_parameters=rope, **settings)
    with pytest.raises(
        ConfigError, match="rope type longrope, which chooses its frequencies from the longest example of a batch"
    ):
        check_ignores_batch_length(base, path="phi")
