"""A tuned adapter starts runs of the same kind only."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fedtune.model.adapter import Adapter
from fedtune.model.adapter_files import compute_adapter_digest
from fedtune.model.spec import HeadSpec, LoraSpec, ModelSpec, TaskModelSpec
from fedtune.spec import RUN_SCHEMA, ConfigError
from fedtune.tasks.saved import SavedAdapter, save_task_model
from fedtune.tasks.task_model import TaskModel, build_task_model

from ..model.conftest import make_spec

TABLE: dict[str, Any] = {"model": ModelSpec(path="none"), "lora": LoraSpec(kind="none"), "input": "features"}
TABLE |= {"head": HeadSpec(scale=1.0, hidden=(2,)), "values": ("age",)}


def make_lora(**changes: Any) -> LoraSpec:
    return replace(LoraSpec(rank=2, layers=(0, 1)), **changes)


SPEC = make_spec(lora=make_lora(), head=HeadSpec(center=True, init="label_names"), labels=("billing", "sales"), seed=0)
OTHER_LABELS = ("billing", "technical", "sales")


def build_moved(spec: TaskModelSpec) -> TaskModel:
    """Build a model whose trained tensors are all 0.5 away from their initial values."""
    model = build_task_model(spec)
    Adapter({name: value + 0.5 for name, value in Adapter.from_task_model(model).tensors.items()}).load_into(model)
    return model


@pytest.fixture(scope="module")
def tuned_adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("earlier") / "run" / "adapter"
    save_task_model(build_moved(SPEC), folder)
    return folder


def begin_adapter(folder: Path, spec: TaskModelSpec = SPEC) -> Adapter:
    return SavedAdapter.read_initial(str(folder)).find_initial_adapter(build_task_model(spec))


def test_run_starts_from_the_saved_adapter(tuned_adapter: Path) -> None:
    expected = Adapter.from_task_model(build_moved(SPEC)).digest()
    assert begin_adapter(tuned_adapter).digest() == begin_adapter(tuned_adapter.parent).digest() == expected
    saved = SavedAdapter.read_initial(str(tuned_adapter))
    assert (saved.digest, saved.trained_sha256) == (compute_adapter_digest(tuned_adapter), expected)
    # in any order
    saved.require_compatible(replace(SPEC, lora=make_lora(layers=(1, 0))))


@pytest.mark.parametrize(
    "spec",
    [
        *(replace(SPEC, lora=replace(SPEC.lora, kind=kind)) for kind in ("dora", "ia3")),
        make_spec("random:llama", "causal_lm"),
    ],
    ids=["dora", "ia3", "a language model"],
)
def test_run_starts_only_from_an_adapter_of_the_same_kind(tmp_path: Path, spec: TaskModelSpec) -> None:
    model = build_moved(spec)
    save_task_model(model, tmp_path)
    assert begin_adapter(tmp_path, spec).digest() == Adapter.from_task_model(model).digest()
    if spec.task == "causal_lm":
        assert not SavedAdapter.read_initial(str(tmp_path)).can_reuse_head(spec), "a language model has no head"
        return
    with pytest.raises(ConfigError, match=rf"its lora\.kind is '{spec.lora.kind}', not 'lora'"):
        begin_adapter(tmp_path)


def test_head_is_reinitialized_for_other_labels(tuned_adapter: Path) -> None:
    relabeled = replace(SPEC, labels=("billing", "technical", "praise"))  # one label is missing
    before, started = Adapter.from_task_model(build_task_model(relabeled)), begin_adapter(tuned_adapter, relabeled)
    assert started.has_same_shapes(before)
    for name, value in started.tensors.items():
        expected = before.tensors[name] + (0.0 if name.startswith("head.") else 0.5)
        assert np.array_equal(value, expected), name
    assert not SavedAdapter.read_initial(str(tuned_adapter)).can_reuse_head(relabeled)


@pytest.mark.parametrize("labels", [OTHER_LABELS, SPEC.labels[::-1]])
@pytest.mark.parametrize("changes", [{}, {"task": "token_classification", "head": HeadSpec()}, TABLE], ids=str)
def test_matching_labels_keep_head_rows_and_new_labels_are_initialized(
    tmp_path: Path, changes: dict[str, Any], labels: tuple[str, ...]
) -> None:
    was, now = replace(SPEC, **changes), replace(SPEC, **changes, labels=labels)
    save_task_model(build_moved(was), tmp_path)
    fresh, started, saved = (
        Adapter.from_task_model(build_task_model(now)).tensors,
        begin_adapter(tmp_path, now).tensors,
        build_moved(was),
    )
    outputs, before = (saved.task.name_outputs(labels_spec.labels) for labels_spec in (now, was))
    *layers, last = [
        name for name in saved.collect_adapter_parameters() if name.startswith("head.") and "weight" in name
    ]
    for index, name in enumerate(outputs):
        old = Adapter.from_task_model(saved).tensors[last][before.index(name)] if name in before else fresh[last][index]
        assert np.array_equal(started[last][index], old), name
    assert all(np.array_equal(started[name], Adapter.from_task_model(saved).tensors[name]) for name in layers)
    ordinal = replace(was, task="ordinal")  # its rows are thresholds between labels
    assert not SavedAdapter(tmp_path, ordinal, "").can_reuse_head(replace(ordinal, labels=labels))


@pytest.mark.parametrize(
    ("differing", "message"),
    [
        ({"lora": make_lora(rank=4)}, r"its lora\.rank is 2, not 4"),
        ({"lora": make_lora(kind="dora")}, r"its lora\.kind is 'lora', not 'dora'"),
        ({"lora": make_lora(kind="ia3")}, r"its lora\.kind is 'lora', not 'ia3'"),
        ({"lora": make_lora(layers=(1,))}, r"its lora\.layers is \[0, 1\], not \[1\]"),
        ({"lora": make_lora(alpha=2.0)}, r"its lora\.scale is 8\.0, not 1\.0"),
        ({"lora": make_lora(target_modules=("query",))}, r"its lora\.target_modules is 'all-linear', not \['query'\]"),
        ({"head": HeadSpec(scale=5.0, center=True)}, r"its head\.scale is 20\.0, not 5\.0"),
        ({"head": HeadSpec()}, r"its head\.center is true, not false"),
        (
            {"lora": make_lora(rank=4), "head": HeadSpec()},
            r"its lora\.rank .*; its lora\.scale .*; its head\.center is true",
        ),
        ({"task": "causal_lm", "labels": ()}, r"its task is 'classification', not 'causal_lm'"),
    ],
)
def test_all_differences_from_the_start_adapter_are_named(
    tuned_adapter: Path, differing: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=rf"^model\.adapter = .*{message}"):
        SavedAdapter.read_initial(str(tuned_adapter)).require_compatible(replace(SPEC, **differing))


@pytest.mark.parametrize(
    ("value", "message"),
    [(np.nan, "non-finite"), (np.inf, "non-finite"), (1.0, "do not match the digest")],
)
def test_damaged_or_non_finite_start_adapter_is_refused(
    tuned_adapter: Path, tmp_path: Path, value: float, message: str
) -> None:
    copied = shutil.copytree(tuned_adapter, tmp_path / "changed")
    tensors = {name: array.copy() for name, array in load_file(copied / "adapter_model.safetensors").items()}
    next(iter(tensors.values()))[0, 0] = value
    save_file(tensors, copied / "adapter_model.safetensors", metadata={"format": "pt"})
    if message == "non-finite":  # as an attacker could send it
        settings = json.loads((copied / "fedtune.json").read_text())
        trained = tensors | {"head.weight": load_file(copied / "head.safetensors")["weight"]}
        (copied / "fedtune.json").write_text(json.dumps(settings | {"trained_sha256": Adapter(trained).digest()}))
    with pytest.raises(ConfigError, match=rf"model\.adapter = .*{message}"):
        begin_adapter(copied)
    settings = json.loads((tuned_adapter / "fedtune.json").read_text())  # nor may its hash name another base
    other_base = settings | {"model": settings["model"] | {"sha256": "ab" * 32}}
    (copied / "fedtune.json").write_text(json.dumps(other_base))
    with pytest.raises(ConfigError, match=r"model\.adapter.*was tuned for base model abab.*, but the run uses"):
        begin_adapter(copied)


def test_frozen_lora_a_must_match_the_start_adapter(tuned_adapter: Path, tmp_path: Path) -> None:
    frozen = replace(SPEC, lora=LoraSpec(rank=2, layers=(0, 1), train_a=False))
    save_task_model(build_moved(frozen), tmp_path / "frozen")
    assert begin_adapter(tmp_path / "frozen", frozen).digest() == Adapter.from_task_model(build_moved(frozen)).digest()
    with pytest.raises(ConfigError, match=r"does not train .*lora_A.*the adapter has seed 0"):
        begin_adapter(tmp_path / "frozen", replace(frozen, seed=1))
    # A run that also trains A sends it, and so may start from any adapter.
    both_trained = begin_adapter(tmp_path / "frozen", replace(SPEC, seed=1))
    expected = build_moved(frozen).collect_adapter_parameters()
    assert all(np.array_equal(value, expected[name].detach().numpy()) for name, value in both_trained.tensors.items())
    with pytest.raises(ConfigError, match=r"does not train .*lora_A"):  # A was trained, and the run freezes it
        begin_adapter(tuned_adapter, frozen)


@pytest.mark.parametrize("content", [None, "{", "[]", {}, {"model": 5}])
def test_folder_without_a_saved_adapter_raises_a_one_line_error(tmp_path: Path, content: Any) -> None:
    if content is not None:
        content_text = json.dumps({"schema_version": RUN_SCHEMA, **content}) if isinstance(content, dict) else content
        (tmp_path / "fedtune.json").write_text(content_text)
    with pytest.raises(ConfigError, match=r"^model\.adapter = .*must be (the folder of a fin|a saved adapter)"):
        SavedAdapter.read_initial(str(tmp_path))
