"""Per-example gradients of feature and image models: batch invariance, and bad records."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedtune.data import Shapes, TextDataset, collate
from fedtune.data.features import FeatureSpec
from fedtune.data.images import read_image_field
from fedtune.data.records import Record
from fedtune.data.spec import DataSpec
from fedtune.model.adapter import Adapter
from fedtune.model.base_model import load_processor
from fedtune.model.spec import HeadSpec, LoraSpec, ModelSpec, TaskModelSpec
from fedtune.tasks.image_input import ImageReader
from fedtune.tasks.inputs import NoTokenizer
from fedtune.tasks.survival import SurvivalSettings
from fedtune.tasks.task_model import TaskModel, build_task_model
from fedtune.training.batch_invariance import max_batch_influence
from fedtune.training.machine import choose_micro_batch_shapes, prepare_model
from fedtune.training.spec import RuntimeSpec

from ..builders import DEVICE, record_example_gradients, set_random_values
from ..data.test_feature_vectors import make_data
from ..pictures import MODELS, encode_image, make_picture, write_vision_folder
from .conftest import make_examples
from .test_companies import are_same_bits, compute_each, require_batch_invariance

FEATURES = (
    FeatureSpec(columns=tuple("abcdefg"), range=(-1.0, 3.0), missing="indicator"),
    FeatureSpec(columns=("kind",), categories=("x", "y")),
    FeatureSpec(columns=("states",), range=(0.0, 1.0), size=5),
)
Gradients = dict[str, torch.Tensor]
RUNTIME = RuntimeSpec(num_threads=1, micro_batch_tokens=60)
LABELS = ("one", "two", "three")
TASKS = ("classification", "multi_label", "ordinal", "regression", "survival")
tasks = pytest.mark.parametrize("task", TASKS)
layers = pytest.mark.parametrize("hidden", [(), (16,), (9, 5)])


def make_spec(task: str, hidden: tuple[int, ...] = (), *, seed: int = 3, wider: int = 0) -> TaskModelSpec:
    return TaskModelSpec(
        model=ModelSpec(path="none"),
        lora=LoraSpec(kind="none"),
        head=HeadSpec(scale=5.0, hidden=hidden),
        task=task,
        task_settings=SurvivalSettings(intervals=(1.0, 2.0, 5.0)) if task == "survival" else None,
        labels=() if task in ("regression", "survival") else LABELS,
        target_range=(0.0, 4.0) if task == "regression" else None,
        input="features",
        values=(*(value for feature in FEATURES for value in feature.iter_value_names()), *map(str, range(wider))),
        seed=seed,
    )


def build_trained(spec: TaskModelSpec, *, max_length: int = 1) -> TaskModel:
    """Build a model with moved parameters, so that every tensor has a gradient."""
    model = prepare_model(lambda: build_task_model(spec, device=DEVICE), RUNTIME, max_length=max_length)
    return set_random_values(model, 0.3)


def make_records(model: TaskModel, count: int) -> TextDataset:
    draws = np.random.default_rng(5)
    rows = model.generate_dummies([1] * count, draws)
    targets = model.task.dummy_targets(rows, spec=model.spec, draws=draws, first=lambda _: 0)
    return TextDataset(rows, targets)


def require_gradients_of_a_loop(model: TaskModel, dataset: TextDataset, *, rtol: float, atol: float) -> Gradients:
    """Require that the gradients of all examples, none of them zero, match the gradients of single examples."""
    count = len(dataset)
    gradients = record_example_gradients(model, collate(dataset, range(count), pad_id=0).to(DEVICE))
    assert list(gradients) == list(model.trainable())
    assert all(feature.any() for feature in gradients.values())
    for index in range(count):
        loss = model.losses(collate(dataset, [index], pad_id=0).to(DEVICE)).sum()
        reference = torch.autograd.grad(loss, list(model.trainable().values()))
        largest = max(1.0, *(float(feature.abs().max()) for feature in reference))  # the scale of rounding errors
        for (name, _), feature in zip(model.trainable().items(), reference, strict=True):
            torch.testing.assert_close(gradients[name][index], feature, rtol=rtol, atol=atol * largest)
    return gradients


@tasks
@layers
def test_feature_model_gradients_match_a_loop_and_pass_the_trial(task: str, hidden: tuple[int, ...]) -> None:
    model = build_trained(make_spec(task, hidden))
    dataset = make_records(model, 7)
    gradients = require_gradients_of_a_loop(model, dataset, rtol=1e-5, atol=1e-6)
    assert len(gradients) == 2 * (len(hidden) + 1), "each layer must have a weight and a bias"
    # The preflight must also find that no record affects another.
    shapes = replace(choose_micro_batch_shapes(model, RUNTIME, max_length=1), max_tokens=128)
    require_nothing_moved(model, shapes, keeps_states=False, weights_chosen=False)


@pytest.mark.parametrize("wider", [0, 400])
@layers
def test_feature_record_is_bitwise_equal_in_any_batch(hidden: tuple[int, ...], wider: int) -> None:
    model = build_trained(make_spec("classification", hidden, wider=wider))
    dataset, shapes = make_records(model, 90), Shapes.from_limits(max_length=1, max_tokens=24, positions=1)
    assert (shapes.lengths, shapes.rows(1)) == ((1,), (24, 12, 6, 3))
    require_batch_invariance(model, make_examples(dataset, shapes), companies=9)


def require_nothing_moved(model: TaskModel, shapes: Shapes, **settings: bool) -> None:
    before = Adapter.from_task_model(model).digest()
    assert max_batch_influence(model, shapes, max_grad_norm=1.0, **settings) == 0.0
    assert Adapter.from_task_model(model).digest() == before


def test_trial_detects_a_head_that_mixes_its_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_trained(make_spec("classification", (16,)))
    shapes = Shapes.from_limits(max_length=1, max_tokens=64, positions=1)
    rows = type(model.base).forward

    def mix_batch(base: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        return rows(base, input_ids + input_ids.sum(dim=0) * 1e-3, attention_mask)

    monkeypatch.setattr(type(model.base), "forward", mix_batch)
    assert max_batch_influence(model, shapes, keeps_states=False, max_grad_norm=1.0, weights_chosen=False) > 0


def test_new_feature_model_has_zero_logits_and_is_determined_by_its_seed() -> None:
    model, repeated, other_seed = (build_task_model(make_spec("ordinal", (8,), seed=seed)) for seed in (1, 1, 2))
    assert (
        Adapter.from_task_model(model).digest()
        == Adapter.from_task_model(repeated).digest()
        != Adapter.from_task_model(other_seed).digest()
    )
    assert not model.logits(collate(make_records(model, 4), range(4), pad_id=0)).any()


def test_invalid_feature_record_does_not_change_the_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_trained(make_spec("classification"))
    spec, reader = make_data(*FEATURES, labels=("one", "two", "three")), NoTokenizer()
    draws = np.random.default_rng(1)
    rows = [
        Record({f"feature:{name}": one.generate_dummies(draws.integers) for one in FEATURES for name in one.columns})
        for _ in range(4)
    ]
    good = [Record({**row.fields, "label": "two"}) for row in rows]
    bad = Record({**good[1].fields, "feature:states": "[1, 2]"})
    assert model.task.record_validator(spec)(bad) is not None
    require_nothing_added(model, bad, good, reader, spec, monkeypatch)


def require_nothing_added(
    model: TaskModel, bad: Record, good: list[Record], reader: Any, spec: DataSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Require that a bad record adds nothing, and that the other three records' contributions do not change."""
    task = model.task
    assert [task.record_validator(spec)(one) for one in good] == [None] * 4
    with monkeypatch.context() as patched:  # as if validation had accepted it
        patched.setattr(type(task), "record_validator", lambda self, data: lambda record: None)
        mixed = task.tokenize([good[0], bad, *good[2:]], reader, data=spec, lenient_within=1)
    read = (mixed, task.tokenize(good, reader, data=spec))
    grads, without = (record_example_gradients(model, collate(ref, range(4), pad_id=0).to(DEVICE)) for ref in read)
    for name, one in grads.items():
        assert not one[1].any(), name
        for index in (0, 2, 3):
            assert torch.equal(one[index], without[name][index])


Folders, Layers = dict[str, Path], tuple[int, ...] | None
kinds = pytest.mark.parametrize("kind", MODELS)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return {kind: write_vision_folder(tmp_path_factory.mktemp(kind), kind) for kind in MODELS}


def make_image_spec(folder: Path, task: str = "classification", *, layers: Layers = None) -> TaskModel:
    settings = {"model": ModelSpec(path=str(folder)), "lora": LoraSpec(rank=2, layers=layers), "input": "image"}
    spec = replace(make_spec(task), **settings, values=())  # type: ignore[arg-type]
    return build_trained(spec, max_length=4)


@pytest.mark.parametrize(
    ("kind", "task"), [*((kind, "classification") for kind in MODELS), *(("vit", task) for task in TASKS[1:])]
)
def test_image_gradients_match_a_loop(folders: Folders, kind: str, task: str) -> None:
    model = make_image_spec(folders[kind], task)
    dataset = make_records(model, 4)
    assert dataset.lengths.tolist() == [MODELS[kind][2]] * 4
    gradients = require_gradients_of_a_loop(model, dataset, rtol=1e-3, atol=1e-5)
    assert len(gradients) == 1 + 2 * 2 * 6, "A and B of six linear layers in two blocks, and the head"


@kinds
@pytest.mark.parametrize("layers", [None, (-1,)])
def test_image_is_bitwise_equal_in_any_batch(folders: Folders, kind: str, layers: Layers) -> None:
    model = make_image_spec(folders[kind], layers=layers)
    places = MODELS[kind][2]
    shapes = choose_micro_batch_shapes(model, RUNTIME, max_length=places)
    most = 60 // places
    assert (shapes.lengths, shapes.rows(places)[0], shapes.capacity(places, most)) == ((places,), most, most)
    dataset = make_records(model, 31)
    grads = compute_each(model, make_examples(dataset, shapes), np.arange(31))
    examples = make_examples(dataset, shapes, kept_by=model if layers else None)
    require_batch_invariance(model, examples, companies=5)
    rerun = compute_each(model, examples, np.arange(31))  # possibly from cached states of the frozen layers
    assert all(are_same_bits(one, grads[index]) for index, one in rerun.items())
    if (kind, layers) in (("dinov2", None), ("vit", (-1,))):  # the trial must detect it, too
        require_nothing_moved(model, shapes, keeps_states=bool(layers))


def test_undecodable_image_does_not_change_the_sum(folders: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_image_spec(folders["vit"])
    spec = make_data(columns={"image": "i", "label": "y"}, max_length=5, input="image", labels=LABELS)
    reader = ImageReader(*load_processor(model.spec.model))
    good = [
        Record({"image": read_image_field(encode_image(make_picture(seed=index)), "image"), "label": "two"})
        for index in range(4)
    ]
    bad = Record({**good[1].fields, "image": read_image_field(encode_image(make_picture(seed=1))[:-40], "image")})
    fault = model.task.record_validator(spec)(bad)
    assert "not a decodable image" in str(fault)
    require_nothing_added(model, bad, good, reader, spec, monkeypatch)
