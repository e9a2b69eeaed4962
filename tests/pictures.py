"""Images and tiny vision models with random weights, for tests of several layers."""

import csv
import io
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import (
    BitImageProcessorPil,
    DeiTConfig,
    DeiTImageProcessorPil,
    DeiTModel,
    Dinov2Config,
    Dinov2Model,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTImageProcessorPil,
    ViTModel,
)

from fedtune.model.hf_logging import silence_transformers

SIDE = 8
_EXACT = {"size": {"height": SIDE, "width": SIDE}}
_CUT = {"size": {"height": 10, "width": 10}, "crop_size": {"height": SIDE, "width": SIDE}}
_CUT_EDGE = {"size": {"shortest_edge": 10}, "crop_size": {"height": SIDE, "width": SIDE}}
_SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 4, "image_size": SIDE}
# In such a narrow model the input would otherwise hardly affect the output.
_PLAIN = {**_SMALL, "intermediate_size": 32, "initializer_range": 0.2}
_SIGLIP = SiglipVisionConfig(**_SMALL, intermediate_size=32)
# The position grid is for larger images than the processor produces, as in the published models.
_DINOV2 = Dinov2Config(**{**_SMALL, "image_size": 20, "mlp_ratio": 2, "initializer_range": 0.2})
MODELS: dict[str, tuple[Any, Any, int]] = {
    "vit": (partial(ViTModel, ViTConfig(**_PLAIN), add_pooling_layer=False), ViTImageProcessorPil(**_EXACT), 5),
    "deit": (partial(DeiTModel, DeiTConfig(**_PLAIN)), DeiTImageProcessorPil(**_CUT), 6),
    "dinov2": (partial(Dinov2Model, _DINOV2), BitImageProcessorPil(**_CUT_EDGE), 5),
    "siglip": (partial(SiglipVisionModel, _SIGLIP), SiglipImageProcessorPil(**_EXACT), 4),
}
"""Each model by name: its configuration, its image processor, and the number of positions per image."""


def write_vision_folder(folder: Path, kind: str = "vit") -> Path:
    """Write a transformers folder with a model and its image processor; every call writes the same weights."""
    build_model, processor, _ = MODELS[kind]
    with silence_transformers(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        build_model().save_pretrained(folder)
        processor.save_pretrained(folder)
    return folder


def make_picture(*, seed: int = 0, size: tuple[int, int] = (12, 10), tint: int | None = None) -> Image.Image:
    """Draw noise; with `tint`, one of the three colors is brighter."""
    pixels = np.random.default_rng(seed).integers(0, 130, size=(size[1], size[0], 3))
    if tint is not None:
        pixels[..., tint] += 120
    return Image.fromarray(pixels.astype(np.uint8))


def encode_image(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


COLORS = ("red", "green", "blue")


def write_pictures(folder: Path, name: str, count: int, *, seed: int) -> Path:
    """Write a table of image paths below `images/`, each with its brighter color as the label, and a number."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    draws = np.random.default_rng(seed)
    with (folder / name).open("w", newline="") as stream:
        table = csv.writer(stream)
        table.writerow(["image", "label", "number", "several", "months", "died"])
        for index in range(count):
            tint, path = int(draws.integers(3)), f"images/{seed}-{index}.png"
            (folder / path).write_bytes(encode_image(make_picture(seed=1000 * seed + index, tint=tint)))
            several = ";".join(color for color in COLORS[:2] if color == COLORS[tint])
            table.writerow([path, COLORS[tint], tint, several, 1 + 2 * tint, int(tint < 2)])
    return folder / name
