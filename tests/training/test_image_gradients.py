"""A model of images: its per-example gradients, the same in any company, and what a broken image adds to a step."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fedtune.data.images import ImageReader, image_of
from fedtune.data.records import Record
from fedtune.model import Adapter, LoraSpec, ModelSpec
from fedtune.model.base_model import load_processor
from fedtune.tasks import TaskModel, build_task_model
from fedtune.training.machine import ready_model, shapes_for
from fedtune.training.preflight import moved_by_others
from fedtune.training.spec import RuntimeSpec

from ..builders import DEVICE, with_random_values
from ..data.test_feature_vectors import data
from ..pictures import MODELS, encoded, picture, vision_folder
from .conftest import examples_of
from .test_companies import each_one, require_alone, same
from .test_feature_gradients import (
    LABELS,
    records,
    require_gradients_of_a_loop,
    require_nothing_added,
    spec_of,
)

kinds = pytest.mark.parametrize("kind", MODELS)
RUNTIME = RuntimeSpec(num_threads=1, micro_batch_tokens=60)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: vision_folder(tmp_path_factory.mktemp(kind), kind) for kind in MODELS}


def made(folder: Path, task: str = "classification", *, layers: tuple[int, ...] | None = None) -> TaskModel:
    """As after some training, so that every tensor has a gradient."""
    settings = {"model": ModelSpec(path=str(folder)), "lora": LoraSpec(rank=2, layers=layers), "input": "image"}
    spec = replace(spec_of(task), **settings, values=())  # type: ignore[arg-type]
    return with_random_values(ready_model(lambda: build_task_model(spec, device=DEVICE), RUNTIME, max_length=4), 0.3)


TASKS = ("multi_label", "ordinal", "regression", "survival")


@pytest.mark.parametrize(
    ("kind", "task"), [*((kind, "classification") for kind in MODELS), *(("vit", task) for task in TASKS)]
)
def test_gradients_of_examples_are_those_of_a_loop(folders: dict[str, Path], kind: str, task: str) -> None:
    model = made(folders[kind], task)
    dataset = records(model, 4)
    assert dataset.lengths.tolist() == [MODELS[kind][2]] * 4
    found = require_gradients_of_a_loop(model, dataset, rtol=1e-3, atol=1e-5)
    assert len(found) == 1 + 2 * 2 * 6, "A and B of six linear layers in each of two, and the head"


@kinds
@pytest.mark.parametrize("layers", [None, (-1,)])
def test_a_record_adds_the_same_bits_in_any_company(
    folders: dict[str, Path], kind: str, layers: tuple[int, ...] | None
) -> None:
    model = made(folders[kind], layers=layers)
    places = MODELS[kind][2]
    shapes = shapes_for(model, RUNTIME, max_length=places)
    most = 60 // places
    assert (shapes.lengths, shapes.rows(places)[0], shapes.room(places, most)) == ((places,), most, most)
    dataset = records(model, 31)
    everyone = each_one(model, examples_of(dataset, shapes), np.arange(31))
    examples = examples_of(dataset, shapes, kept_by=model if layers else None)
    require_alone(model, examples, companies=5)
    again = each_one(model, examples, np.arange(31))  # perhaps from the states that the frozen layers made of it
    assert all(same(one, everyone[place]) for place, one in again.items())


@pytest.mark.parametrize(("kind", "layers"), [("dinov2", None), ("vit", (-1,))])
def test_the_trial_finds_that_no_record_moves_another(
    folders: dict[str, Path], kind: str, layers: tuple[int, ...] | None
) -> None:
    model = made(folders[kind], layers=layers)
    before, shapes = Adapter.of(model).digest(), shapes_for(model, RUNTIME, max_length=MODELS[kind][2])
    assert moved_by_others(model, shapes, keeps_states=bool(layers), max_grad_norm=1.0) == 0.0
    assert Adapter.of(model).digest() == before


def test_a_broken_image_at_a_site_adds_nothing_and_the_others_what_they_add_without_it(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = made(folders["vit"])
    spec = data(columns={"image": "i", "label": "y"}, max_length=5, input="image", labels=LABELS)
    reader = ImageReader(load_processor(model.spec.model))
    good = [Record({"image": image_of(encoded(picture(seed=place)), "image"), "label": "two"}) for place in range(4)]
    bad = Record({**good[1].fields, "image": image_of(encoded(picture(seed=1))[:-40], "image")})
    fault = model.task.fault(spec)(bad)
    assert "no image that can be decoded" in str(fault)
    require_nothing_added(model, bad, good, reader, spec, monkeypatch)
