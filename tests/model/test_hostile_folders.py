"""Model folders that somebody prepared: each is refused with its reason, or what was added to it is never read."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaModel, Phi3Config, Phi3Model, PreTrainedModel, RobertaConfig, RobertaModel

from fedtune.model.base_model import load_base, load_tokenizer, model_sha256
from fedtune.model.fits import check_ignores_batch_length, check_tokenizer_fits, usable_positions
from fedtune.model.spec import ModelSpec
from fedtune.spec import ConfigError

Change = Callable[[Path], object]


def edits(name: str, edit: Callable[[dict[str, Any]], object]) -> Change:
    """Edit a JSON file, which is made where there is none."""

    def change(folder: Path) -> None:
        file = folder / name
        fields = json.loads(file.read_text()) if file.exists() else {}
        edit(fields)
        file.write_text(json.dumps(fields))

    return change


def sets(name: str, **changes: Any) -> Change:
    return edits(name, lambda fields: fields.update(changes))


def writes(name: str, text: str | bytes) -> Change:
    return lambda folder: (folder / name).write_bytes(text.encode() if isinstance(text, str) else text)


def config(**changes: Any) -> Change:
    return sets("config.json", **changes)


def linked(name: str, target: str) -> Change:
    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target)

    return change


def outside(name: str) -> Change:
    """Move a file out of the folder, and leave a link to it."""

    def change(folder: Path) -> None:
        shutil.move(folder / name, folder.parent / name)
        (folder / name).symlink_to(folder.parent / name)

    return change


def index(text: str, **links: str) -> Change:
    def change(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "a.safetensors")
        for name, target in links.items():
            (folder / f"{name}.safetensors").symlink_to(target)
        (folder / "model.safetensors.index.json").write_text(text)

    return change


def pipe(name: str) -> Change:
    def change(folder: Path) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return change


ROPE = {"rope_theta": 1e4, "factor": 2.0}
LONG = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "original_max_position_embeddings": 8}
BATCH = "chooses its frequencies by the longest example of a batch"
REDIRECTED = "would load files or code other than the pinned ones"

NO_SETTING, NO_TOKENIZER = "is no known setting of a bert model", "is no known setting of a tokenizer"
NO_TOKEN = "which is no special token"
UNKNOWN = "of which fedtune does not know that it computes each example of a batch by itself"

REFUSED: dict[str, tuple[Change, str]] = {
    # Keys that redirect.
    "weights elsewhere": (config(transformers_weights="README.safetensors"), f"has transformers_weights.*{REDIRECTED}"),
    "weights elsewhere, nested": (config(text_config={"transformers_weights": "x.safetensors"}), REDIRECTED),
    "code of its own": (config(auto_map={"AutoModel": "modeling.Evil"}), f"has auto_map.*{REDIRECTED}"),
    "code of a repository": (config(auto_map={"AutoConfig": "someone/repo--c.C"}), "has auto_map"),
    "quantised": (config(quantization_config={"quant_method": "bitsandbytes"}), "has quantization_config"),
    "pipelines": (config(custom_pipelines={"p": {"impl": "p.P"}}), "has custom_pipelines"),
    "another config": (config(configuration_files=["config.4.0.0.json"]), "has configuration_files"),
    # Keys by which transformers makes another one of an innocent one, or that it reads without declaring them.
    "weights by an alias": (config(attribute_map={"notes": "transformers_weights"}, notes="x.safetensors"), NO_SETTING),
    "a kernel by an alias": (config(attribute_map={"it": "_attn_implementation_internal"}, it="a/b"), NO_SETTING),
    "quantised by an alias": (config(attribute_map={"notes": "quantization_config"}, notes={}), NO_SETTING),
    "another type by an alias": (config(attribute_map={"model_type": "kind"}, kind="roberta"), NO_SETTING),
    "kernels for parts": (config(fusion_config={"mlp": "me/kernel"}), "has fusion_config"),
    "kernels for parts, by an alias": (config(attribute_map={"notes": "fusion_config"}, notes={}), NO_SETTING),
    "layers of their own": (config(per_layer_config={"0": {"hidden_act": "gelu_new"}}), "has per_layer_config"),
    "eyes for what comes": (config(is_causal=False), NO_SETTING),
    "a tokenizer within": (sets("tokenizer_config.json", slow_tokenizer="x"), NO_TOKENIZER),
    "a kernel": (config(attn_implementation="kernels-community/flash-attn"), "attn_implementation.*can load code"),
    "a kernel, private": (config(_attn_implementation="me/kernel"), "can load code"),
    "a kernel, by part": (config(attn_implementation={"": "eager", "text_config": "me/kernel"}), "can load code"),
    "a kernel, nested": (config(text_config={"attn_implementation": "flash_attention_2"}), "can load code"),
    "experts' code": (config(experts_implementation="me/kernel"), NO_SETTING),
    "tokenizer code": (sets("tokenizer_config.json", auto_map={"AutoTokenizer": ["t.T", None]}), NO_TOKENIZER),
    "another tokenizer": (sets("tokenizer_config.json", fast_tokenizer_files=["tokenizer.4.0.0.json"]), NO_TOKENIZER),
    "arguments": (sets("tokenizer_config.json", init_inputs=["/etc/passwd"]), NO_TOKENIZER),
    "a vocabulary elsewhere": (sets("tokenizer_config.json", vocab_file="/etc/passwd"), NO_TOKENIZER),
    "a GGUF tokenizer": (sets("tokenizer_config.json", gguf_file="../x.gguf"), NO_TOKENIZER),
    "a vocabulary by path": (sets("tokenizer_config.json", vocab="../x.json"), NO_TOKENIZER),
    "a map that names files": (sets("special_tokens_map.json", vocab_file="/etc/passwd"), NO_TOKEN),
    "a map that names its own": (sets("special_tokens_map.json", tokenizer_file="t.json"), NO_TOKEN),
    "a map that names a repository": (
        sets("special_tokens_map.json", name_or_path="someone/beacon", is_local=False, local_files_only=False),
        f"has name_or_path, {NO_TOKEN}",
    ),
    "a map that names a folder": (sets("special_tokens_map.json", fix_mistral_regex=True), "is no special token"),
    "a map of settings": (sets("special_tokens_map.json", eos_token={"cache_dir": 1}), "which is no token"),
    # Files that redirect, or that some machines read in another's place.
    "an adapter": (writes("adapter_config.json", "{}"), "must not hold adapter_config.json"),
    "mixed case": (writes("Config.json", "{}"), "Config.json, whose name differs from config.json only in case"),
    "mixed case weights": (writes("MODEL.safetensors", b""), "differs from model.safetensors only in case"),
    "mixed case tokenizer": (writes("tokenizer.JSON", "{}"), "differs from tokenizer.json only in case"),
    # Links, and what is no file.
    "config elsewhere": (outside("config.json"), "must not hold config.json, a link out of it"),
    "weights linked": (outside("model.safetensors"), "must not hold model.safetensors, a link out of it"),
    "tokenizer linked": (outside("tokenizer.json"), "must not hold tokenizer.json, a link out of it"),
    "a secret as a template": (linked("chat_template.jinja", "/etc/passwd"), "a link out of it"),
    "a link to itself": (linked("config.json", "config.json"), "config.json that can be read"),
    "a broken link": (linked("vocab.txt", "nothing"), "vocab.txt that can be read"),
    "a pipe": (pipe("tokenizer.json"), "must hold tokenizer.json as a plain file"),
    "a device": (linked("vocab.txt", "/dev/zero"), "a link out of it"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "must hold config.json"),
    # JSON that two readers read differently, or none.
    "a key twice": (writes("config.json", '{"model_type": "bert", "model_type": "gpt2"}'), "model_type twice"),
    "a key twice, nested": (writes("config.json", '{"a": {"b": 1, "b": 2}}'), "has the key b twice"),
    "a key twice, tokenizer": (writes("tokenizer_config.json", '{"a": 1, "a": 2}'), "has the key a twice"),
    "not a number": (writes("config.json", '{"layer_norm_eps": NaN}'), "holds NaN"),
    "infinite": (writes("config.json", '{"initializer_range": -Infinity}'), "holds -Infinity"),
    "too large a float": (writes("config.json", '{"layer_norm_eps": 1e999}'), "not a finite number"),
    "cut off": (writes("config.json", '{"model_type": "be'), "config.json is not readable JSON"),
    "not UTF-8": (writes("config.json", b'{"model_type": "\xff"}'), "config.json is not readable JSON"),
    "a list": (writes("config.json", "[]"), "config.json must be a JSON object"),
    "deep": (writes("config.json", "[" * 40 + "]" * 40), "nested more than 32 deep"),
    "far too deep": (writes("config.json", "[" * 90_000), "config.json is not readable JSON"),
    "a long config": (writes("config.json", " " * (1 << 20) + "{}"), "larger than 1 MiB"),
    "a tokenizer without JSON": (writes("tokenizer.json", "{"), "tokenizer.json is not readable JSON"),
    # Steps of a tokenizer that a text can break.
    "a pattern that gives up": (
        sets("tokenizer.json", normalizer={"type": "Replace", "pattern": {"Regex": "(?:|.){30}(?!)"}, "content": ""}),
        "does not know whether it takes linear time",
    ),
    "a word that grows": (
        sets("tokenizer.json", normalizer={"type": "Replace", "pattern": {"String": "JANE"}, "content": "X" * 1000}),
        "which makes a text longer",
    ),
    "pieces of no length": (sets("tokenizer.json", pre_tokenizer={"type": "FixedLength", "length": 0}), "FixedLength"),
    # Sizes that fill a machine.
    "a huge vocabulary": (config(vocab_size=10**12), "nothing in a model is larger"),
    "many layers": (config(num_hidden_layers=10**6), "1000000 layers"),
    "a wide model": (config(hidden_size=1 << 14, intermediate_size=1 << 16), r"describes a model of \d+ MiB"),
    "many tokens": (config(vocab_size=1 << 24), r"describes a model of \d+ MiB"),
    "many positions": (config(max_position_embeddings=1 << 24), r"describes a model of \d+ MiB"),
    "many experts": (config(num_local_experts=1 << 20), NO_SETTING),
    "negative": (config(hidden_size=-8), "cannot be loaded"),
    "zero": (config(hidden_size=0, num_attention_heads=0), "cannot be loaded"),
    "words for numbers": (config(hidden_size="many"), "cannot be loaded"),
    # Models that look at the whole batch, in ways that weights can hide from a try.
    "no such type": (config(model_type="own"), f"has model_type own, {UNKNOWN}"),
    "no type": (config(model_type=None), f"has model_type null, {UNKNOWN}"),
    "patches of the richest row": (config(model_type="blt"), f"has model_type blt, {UNKNOWN}"),
    "experts": (config(model_type="gpt_oss", num_local_experts=2), f"has model_type gpt_oss, {UNKNOWN}"),
    "a scale of the batch": (config(model_type="nystromformer"), UNKNOWN),
    "a state that stays": (config(model_type="recurrent_gemma"), UNKNOWN),
    "a model in a model": (config(text_config={"model_type": "bert"}), "has text_config, a model within the model"),
    "a picture's backbone": (config(vision_config={"backbone": "evil/vision"}), f"has backbone.*{REDIRECTED}"),
    "a backbone": (config(use_timm_backbone=True), f"has use_timm_backbone.*{REDIRECTED}"),
    # Rotary frequencies that depend on the batch.
    "dynamic": (config(rope_scaling={"type": "dynamic", "factor": 2.0}), f"rope type dynamic, which {BATCH}"),
    "dynamic, new key": (config(rope_parameters={"rope_type": "dynamic", **ROPE}), BATCH),
    "longrope": (config(rope_scaling={"rope_type": "longrope", **LONG}), f"rope type longrope, which {BATCH}"),
    "su": (config(rope_scaling={"type": "su", **LONG}), f"rope type su, which {BATCH}"),
    "by layer": (config(rope_parameters={"full_attention": {"rope_type": "dynamic", **ROPE}}), BATCH),
    "of the text part": (config(text_config={"rope_scaling": {"type": "longrope", **LONG}}), BATCH),
    "a name with dynamic in it": (config(rope_scaling={"type": "my_dynamic_ntk"}), BATCH),
    "an unknown type": (config(rope_scaling={"type": "secret"}), "rope type secret, of which fedtune does not know"),
    # Tricks with shards.
    "an index out": (index('{"weight_map": {"w": "../a.safetensors"}}'), "names safetensors files beside it"),
    "an index to a pickle": (index('{"weight_map": {"w": "pytorch_model.bin"}}'), "names safetensors files beside it"),
    "an index to nothing": (index('{"weight_map": {"w": "b.safetensors"}}'), "must hold b.safetensors"),
    "an index with a long name": (
        index(json.dumps({"weight_map": {"w": "a" * 300 + ".safetensors"}})), "names safetensors files beside it"
    ),
    "an index that is deep": (index("[" * 50_000), "model.safetensors.index.json is not readable JSON"),
    "an index that is a list": (index('{"weight_map": ["a.safetensors"]}'), "must hold a readable model.safetensors"),
    "an index of nothing": (index('{"weight_map": {}}'), "names safetensors files beside it"),
    "an index to a folder": (index('{"weight_map": {"w": ".."}}'), "names safetensors files beside it"),
    "an index to no name": (index('{"weight_map": {"w": "\\u0000.safetensors"}}'), "names safetensors files beside it"),
    "an index of NaN": (index('{"weight_map": {"w": NaN}}'), "holds NaN"),
    "an index with a key twice": (index('{"weight_map": {"w": "a.safetensors", "w": "b.safetensors"}}'), "key w twice"),
    "an index to a link out": (
        index('{"weight_map": {"w": "b.safetensors"}}', b="/etc/passwd"), "not hold b.safetensors, a link out of it"
    ),
    # Weights that are none.
    "cut weights": (lambda folder: os.truncate(folder / "model.safetensors", 100), "cannot be loaded"),
    "empty weights": (writes("model.safetensors", b""), "cannot be loaded"),
    "pickled weights": (writes("model.safetensors", b"\x80\x04."), "cannot be loaded"),
}  # fmt: skip


OF_WEIGHTS = ("cannot be loaded", "describes a model of")
"""What is found when weights are made, which a tokenizer needs none of."""


@pytest.mark.parametrize("attack", REFUSED)
def test_a_hostile_folder_is_refused_with_its_reason(attack: str, folder: Path) -> None:
    change, reason = REFUSED[attack]
    change(folder)
    needs_weights = any(word in reason for word in OF_WEIGHTS)
    for load in (load_base,) if needs_weights else (load_base, load_tokenizer):
        with pytest.raises(ConfigError, match=reason) as caught:
            load(ModelSpec(path=str(folder)))
        assert caught.value.key == "model.path"
        assert "\n" not in str(caught.value)


def other_weights(folder: Path, name: str) -> None:
    zeros = {key: torch.zeros_like(tensor) for key, tensor in load_file(folder / "model.safetensors").items()}
    save_file(zeros, folder / name, metadata={"format": "pt"})


def template_folder(folder: Path) -> None:
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("{{ evil }}")


def shards_beside(folder: Path) -> None:
    other_weights(folder, "a.safetensors")
    named = dict.fromkeys(load_file(folder / "a.safetensors"), "a.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": named}))


HARMLESS: dict[str, Change] = {
    "weights as a paper": lambda folder: other_weights(folder, "README.safetensors"),
    "an adapter's weights": lambda folder: other_weights(folder, "adapter_model.safetensors"),
    "a variant": lambda folder: other_weights(folder, "model.fp16.safetensors"),
    "shards beside the single file": shards_beside,
    "another config's file": writes("config.4.0.0.json", '{"model_type": "gpt2"}'),
    "another tokenizer's file": writes("tokenizer.4.0.0.json", "{}"),
    "code": writes("modeling_bert.py", "raise SystemExit"),
    "a generator": lambda folder: (folder / "custom_generate").mkdir(),
    "a pickle": writes("pytorch_model.bin", b"\x80\x04."),
    "a Mistral tokenizer": writes("tekken.json", "{}"),
    "templates": template_folder,
    "an image processor": writes("preprocessor_config.json", '{"auto_map": {"AutoProcessor": "p.P"}}'),
    "a sentence transformer": writes("modules.json", '[{"type": "evil.Module"}]'),
}


@pytest.mark.parametrize("added", HARMLESS)
def test_what_is_not_in_the_manifest_changes_nothing(added: str, clean: Path, folder: Path) -> None:
    HARMLESS[added](folder)
    pinned = model_sha256(ModelSpec(path=str(clean)))
    spec = ModelSpec(path=str(folder), sha256=pinned)
    ours, theirs = load_base(spec), load_base(ModelSpec(path=str(clean)))
    for (name, one), (_, other) in zip(ours.state_dict().items(), theirs.state_dict().items(), strict=True):
        assert torch.equal(one, other), name
    ids, same = (load_tokenizer(one)("Grüße")["input_ids"] for one in (spec, ModelSpec(path=str(clean))))
    assert ids == same


# --- the tokenizer and the embedding ---


def adds_token(token: str, number: int) -> Change:
    def edit(fields: dict[str, Any]) -> None:
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        fields["added_tokens"].append({"id": number, "content": token, "special": False, **flags})
        fields["model"]["vocab"][token] = number

    return edits("tokenizer.json", edit)


def template_gives(number: int) -> Change:
    return edits(
        "tokenizer.json", lambda fields: fields["post_processor"]["special_tokens"]["[CLS]"].update(ids=[number])
    )


def fits(folder: Path) -> None:
    spec = ModelSpec(path=str(folder))
    check_tokenizer_fits(load_tokenizer(spec), load_base(spec), path=spec.path)


def test_a_tokenizer_fits_its_own_model(folder: Path) -> None:
    fits(folder)


@pytest.mark.parametrize(
    "change",
    [
        adds_token("metastasis", 261),
        adds_token("metastasis", 100_000),
        template_gives(4000),
        sets("tokenizer_config.json", sep_token="[NEW]"),
        sets("tokenizer_config.json", extra_special_tokens=["<|patient|>"]),
    ],
)
def test_a_token_beyond_the_embedding_is_refused(folder: Path, change: Change) -> None:
    change(folder)
    with pytest.raises(ConfigError, match=r"gives ids up to \d+, and its embedding has 261 rows") as caught:
        fits(folder)
    assert caught.value.key == "model.path"


def test_the_last_row_may_be_used(folder: Path) -> None:
    adds_token("word", 260)(folder)
    fields = json.loads((folder / "tokenizer.json").read_text())
    del fields["model"]["vocab"][next(token for token, number in fields["model"]["vocab"].items() if number == 260)]
    fields["model"]["vocab"]["word"] = 260
    (folder / "tokenizer.json").write_text(json.dumps(fields))
    fits(folder)


def test_a_tokenizer_without_padding_or_end_is_refused(folder: Path) -> None:
    writes("tokenizer_config.json", '{"tokenizer_class": "PreTrainedTokenizerFast"}')(folder)
    with pytest.raises(ConfigError, match="must have a padding token or an end-of-text token"):
        fits(folder)


# --- positions, and rotary types that are fine ---


def tiny(kind: type[PreTrainedModel], settings: Any, **changes: Any) -> PreTrainedModel:
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    return kind(settings(vocab_size=32, **shape, **changes)).eval()


@pytest.mark.parametrize("padding", [0, 1, 5])
def test_positions_behind_the_padding_row_are_those_that_can_be_used(padding: int) -> None:
    base = tiny(RobertaModel, RobertaConfig, max_position_embeddings=20, pad_token_id=padding)
    most = usable_positions(base)
    assert most == 20 - padding - 1
    base(input_ids=torch.full((1, most), 7))
    with pytest.raises((IndexError, RuntimeError)):
        base(input_ids=torch.full((1, most + 1), 7))


def test_positions_of_other_models_are_all_usable(clean: Path) -> None:
    assert usable_positions(load_base(ModelSpec(path=str(clean)))) == 512
    assert usable_positions(tiny(LlamaModel, LlamaConfig, max_position_embeddings=20)) == 20


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 1e4},
        {"rope_type": "linear", **ROPE},
        {"rope_type": "yarn", "original_max_position_embeddings": 8, **ROPE},
        {
            "rope_type": "llama3",
            "original_max_position_embeddings": 8,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            **ROPE,
        },
    ],
)
def test_static_rope_types_load(tmp_path: Path, rope: dict[str, Any]) -> None:
    tiny(LlamaModel, LlamaConfig, rope_parameters=rope).save_pretrained(tmp_path)
    assert load_base(ModelSpec(path=str(tmp_path))).config.rope_parameters["rope_type"] == rope["rope_type"]


def test_a_rope_type_that_the_library_makes_of_another_is_refused() -> None:
    """Phi-3 takes the old name "yarn" for longrope: what counts is what was built."""
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    settings = {"original_max_position_embeddings": 8, "max_position_embeddings": 16, "pad_token_id": 0}
    base = tiny(Phi3Model, Phi3Config, rope_parameters=rope, **settings)
    with pytest.raises(ConfigError, match=f"rope type longrope, which {BATCH}"):
        check_ignores_batch_length(base, path="phi")
