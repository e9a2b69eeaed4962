"""GGUF weights are expanded once, bitwise."""

import dataclasses
import hashlib
from pathlib import Path

import pytest
import torch
from transformers.integrations.ggml import GGUF_CONFIG_MAPPING
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from fedtune.model.base_model import expanded_gguf, load_base, load_gguf, load_tokenizer, tiny_base, tiny_tokenizer
from fedtune.model.refusals import ARCHITECTURES, OF_ANY_CONFIG
from fedtune.model.spec import ModelSpec
from fedtune.spec import ConfigError


@pytest.fixture
def quantised(tmp_path: Path) -> Path:
    """A tiny llama in four bits a weight, with its tokenizer of one token a byte, and one of two."""
    gguf = pytest.importorskip("gguf")
    base, tokens = tiny_base("random:llama", predicts_tokens=True), tiny_tokenizer("random:llama").get_vocab()
    base.resize_token_embeddings(len(tokens) + 1, mean_resizing=False)
    config, file = base.config, tmp_path / "model" / "tiny.Q4_1.gguf"
    file.parent.mkdir()
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*sorted(tokens, key=tokens.__getitem__), "ZZ"])
    writer.add_token_merges(["Z Z"])
    writer.add_bos_token_id(config.bos_token_id)
    writer.add_eos_token_id(config.eos_token_id)
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


def test_expanded_weights_give_bitwise_equal_logits(
    quantised: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    sha256 = hashlib.sha256(quantised.read_bytes()).hexdigest()
    spec = ModelSpec(path=str(quantised.parent), gguf_file=quantised.name, sha256=sha256)
    original = load_gguf(quantised)
    monkeypatch.setenv("FEDTUNE_CACHE", str(tmp_path / "cache"))
    expanded = load_base(spec, predicts_tokens=True)
    monkeypatch.setattr("fedtune.model.base_model.load_gguf", lambda _: pytest.fail("the cache was not used"))
    token_ids = torch.tensor([load_tokenizer(spec)("The capital of France is")["input_ids"]])
    assert token_ids.shape[1] >= 24
    with torch.no_grad():
        logits = original(token_ids).logits
        assert torch.equal(logits, expanded(token_ids).logits)
        again = load_base(spec, predicts_tokens=True)
        assert torch.equal(logits, again(token_ids).logits)
        unquantised = tiny_base("random:llama", predicts_tokens=True)(token_ids).logits
        assert not torch.allclose(logits[..., :-1], unquantised), "four bits a weight are fewer"
    assert expanded.get_output_embeddings().weight is expanded.get_input_embeddings().weight
    assert capfd.readouterr() == ("", "")
    assert [path.name[:8] for path in (tmp_path / "cache" / "gguf").iterdir()] == [sha256[:8]]


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
