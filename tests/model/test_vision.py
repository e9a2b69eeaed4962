"""Image models and their processors: pinned together, and limited to transformers' PIL processors."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoImageProcessor, AutoModel, ResNetConfig, ResNetModel

from fedtune.model.base_model import hash_model, load_base, load_processor
from fedtune.model.manifest import build_manifest
from fedtune.model.spec import LoraSpec, ModelSpec, TaskModelSpec
from fedtune.model.unsupported_models import VISION
from fedtune.spec import ConfigError
from fedtune.tasks.image_input import ImageReader
from fedtune.tasks.inputs import get_input
from fedtune.tasks.task_model import build_task_model

from ..pictures import MODELS, make_picture, write_vision_folder

PROCESSORS = yaml.safe_load(Path(__file__).with_name("refused_processors.yaml").read_text())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_vision_folder(tmp_path / "model")


def make_task_spec(spec: ModelSpec) -> TaskModelSpec:
    return TaskModelSpec(model=spec, lora=LoraSpec(), task="classification", labels=("a", "b"), input="image")


def read_refusal(folder: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        load_processor(ModelSpec(path=str(folder)))
    assert caught.value.key == "model.path"
    return str(caught.value)


def change(folder: Path, **changes: Any) -> None:
    file = folder / "preprocessor_config.json"
    fields = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in fields.items() if value != "removed"}))


@pytest.mark.parametrize("kind", MODELS)
def test_image_embeddings_match_transformers(kind: str, tmp_path: Path) -> None:
    folder = write_vision_folder(tmp_path / "model", kind)
    spec = ModelSpec(path=str(folder))
    model = build_task_model(make_task_spec(spec))
    reader = ImageReader(*load_processor(spec))
    assert len(reader.make_blank()) == MODELS[kind][2]
    image = make_picture(size=(31, 20))
    rows = torch.from_numpy(reader.cut_patches(image))[None]
    embeddings = get_input("image").embed_rows(model.base, rows, torch.ones(rows.shape[:2]))
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    hidden = AutoModel.from_pretrained(folder)(**processor(images=image, return_tensors="pt")).last_hidden_state
    patches = hidden[:, VISION[model.base.config.model_type] :].mean(dim=1)
    torch.testing.assert_close(embeddings, torch.nn.functional.normalize(patches, dim=-1), rtol=1e-4, atol=1e-5)


def test_model_digest_covers_the_image_processor(folder: Path) -> None:
    lines = [
        f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n"
        for name in ("config.json", "model.safetensors", "preprocessor_config.json")
    ]
    first = "fedtune model manifest 1\nimages are processed by transformers' classes for PIL\n"
    assert build_manifest(folder).text == first + "".join(lines)
    spec = ModelSpec(path=str(folder), sha256=hash_model(ModelSpec(path=str(folder))))
    load_processor(spec)
    change(folder, image_mean=[0.5, 0.5, 0.25])
    for load in (lambda: load_processor(spec), lambda: load_base(spec, images=True)):
        with pytest.raises(ConfigError, match="does not match"):
            load()


def test_older_image_processor_names_are_recognized(folder: Path) -> None:
    def read_pixels() -> Any:
        return ImageReader(*load_processor(ModelSpec(path=str(folder)))).preprocess(make_picture())

    new = read_pixels()
    change(folder, image_processor_type="removed", feature_extractor_type="ViTFeatureExtractor")
    np.testing.assert_array_equal(read_pixels(), new)
    change(folder, image_processor_type="ViTImageProcessorFast", feature_extractor_type="removed", size=8, do_pad=None)
    np.testing.assert_array_equal(read_pixels(), new)


@pytest.mark.parametrize("changes", PROCESSORS, ids=lambda changes: changes["refused"])
def test_image_processors_with_unsupported_steps_are_refused(folder: Path, changes: dict[str, Any]) -> None:
    change(folder, **{name: value for name, value in changes.items() if name != "refused"})
    assert changes["refused"] in read_refusal(folder)


def test_vision_model_must_match_its_processor_and_mix_no_images(folder: Path, tmp_path: Path) -> None:
    change(folder, size={"height": 12, "width": 12})
    with pytest.raises(ConfigError, match="cannot read images of 12 x 12 pixels, which its processor produces"):
        build_task_model(make_task_spec(ModelSpec(path=str(folder))))
    (folder / "preprocessor_config.json").unlink()
    (folder / "processor_config.json").write_text("{}")
    assert "lacks preprocessor_config.json" in read_refusal(folder)
    ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1])).save_pretrained(tmp_path / "mixes")
    assert "has model_type resnet, which has BatchNorm and so mixes the examples of a batch" in read_refusal(
        tmp_path / "mixes"
    )
