"""Images and tiny vision models with random weights, as tests of several layers need them."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
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

from fedtune.model.quiet import quiet

SIDE, PATCH = 8, 4
_SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": PATCH}
_WIDE = {"initializer_range": 0.2}  # in so narrow a model the input would otherwise hardly reach the output
_EXACT = {"size": {"height": SIDE, "width": SIDE}}
MODELS: dict[str, tuple[Callable[[], Any], Any, int]] = {
    "vit": (
        lambda: ViTModel(ViTConfig(intermediate_size=32, image_size=SIDE, **_SMALL, **_WIDE), add_pooling_layer=False),
        ViTImageProcessorPil(**_EXACT),
        5,
    ),
    "deit": (
        lambda: DeiTModel(DeiTConfig(intermediate_size=32, image_size=SIDE, **_SMALL, **_WIDE)),
        DeiTImageProcessorPil(size={"height": 10, "width": 10}, crop_size={"height": SIDE, "width": SIDE}),
        6,
    ),
    # Of larger images than its processor makes, as the published ones are.
    "dinov2": (
        lambda: Dinov2Model(Dinov2Config(mlp_ratio=2, image_size=20, **_SMALL, **_WIDE)),
        BitImageProcessorPil(size={"shortest_edge": 10}, crop_size={"height": SIDE, "width": SIDE}),
        5,
    ),
    "siglip": (
        lambda: SiglipVisionModel(SiglipVisionConfig(intermediate_size=32, image_size=SIDE, **_SMALL)),
        SiglipImageProcessorPil(**_EXACT),
        4,
    ),
}
"""By name: the model, its image processor, and how many places an image has in it."""


def vision_folder(folder: Path, kind: str = "vit") -> Path:
    """A folder of transformers with a model and its image processor; the same weights in every call."""
    make, processor, _ = MODELS[kind]
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        make().save_pretrained(folder)
        processor.save_pretrained(folder)
    return folder


def picture(*, seed: int = 0, size: tuple[int, int] = (12, 10), tint: int | None = None) -> Image.Image:
    """Noise; `tint`: with one of the three colours brighter."""
    pixels = np.random.default_rng(seed).integers(0, 130, size=(size[1], size[0], 3))
    if tint is not None:
        pixels[..., tint] += 120
    return Image.fromarray(pixels.astype(np.uint8))


def encoded(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    """The bytes of its file."""
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


COLOURS = ("red", "green", "blue")


def write_pictures(folder: Path, name: str, count: int, *, seed: int) -> Path:
    """A table of paths below `images/` with the brighter colour of each as its label, and a number."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    draws = np.random.default_rng(seed)
    with (folder / name).open("w", newline="") as stream:
        table = csv.writer(stream)
        table.writerow(["image", "label", "number", "several", "months", "died"])
        for place in range(count):
            tint, path = int(draws.integers(3)), f"images/{seed}-{place}.png"
            (folder / path).write_bytes(encoded(picture(seed=1000 * seed + place, tint=tint)))
            several = ";".join(colour for colour in COLOURS[:2] if colour == COLOURS[tint])
            table.writerow([path, COLOURS[tint], tint, several, 1 + 2 * tint, int(tint < 2)])
    return folder / name
