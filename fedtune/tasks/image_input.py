"""Image input: a vision transformer with adapters, and the conversion from images to patches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedtune.data.images import decode_image, generate_image_field, require_pillow
from fedtune.data.records import Record
from fedtune.data.spec import DataSpec
from fedtune.model.spec import RANDOM, ModelSpec, TaskModelSpec
from fedtune.process import torch
from fedtune.spec import ConfigError
from fedtune.tasks.inputs import Input, NoTokenizer, Row, Rows, Text, mean_pool, read_rows, require_no_label_texts


@dataclass(frozen=True)
class ImageReader(NoTokenizer):
    """Converter from images to patches, with the interface of a tokenizer."""

    process: Any  # the model's processor from `fedtune.model.base_model.load_processor`
    side: int  # side length of its square output images
    patch: int  # side length of a patch
    before: int  # number of special tokens before the patch tokens

    def make_blank(self) -> NDArray[np.float32]:
        """Return the patches of a blank image, (positions, 3 * patch * patch) zeros."""
        return np.zeros((self.before + (self.side // self.patch) ** 2, 3 * self.patch**2), dtype=np.float32)

    def cut_patches(self, image: Any) -> NDArray[np.float32]:
        """Cut an image into patches, (positions, 3 * patch * patch): red, green and blue pixels of each patch, row by
        row.
        """
        pixels, count, patches = self.preprocess(image), self.side // self.patch, self.make_blank()
        cut = pixels.reshape(3, count, self.patch, count, self.patch)
        patches[self.before :] = cut.transpose(1, 3, 0, 2, 4).reshape(count**2, -1)
        return patches

    def preprocess(self, image: Any) -> NDArray[np.float32]:
        """Resize and normalize an image with the model's processor, to (3, side, side) float32."""
        pixels: NDArray[Any] = self.process(images=image, return_tensors="np")["pixel_values"][0]
        return pixels.astype(np.float32)

    def save_pretrained(self, folder: Path) -> None:
        self.process.save_pretrained(folder)


class Image(Text):
    """Input for vision transformers; the embedding of an image is the mean over its patches."""

    modality = "image"
    is_fixed = True
    num_ids = Input.num_ids

    def roles(self, task_roles: tuple[str, ...]) -> tuple[str, ...]:
        return tuple("image" if role == "text" else role for role in task_roles)

    def check_model(self, spec: TaskModelSpec) -> None:
        super().check_model(spec)
        if spec.model.path.startswith(RANDOM) or spec.model.gguf_file:
            raise ConfigError("model.path", spec.model.path, "must be an image model for data.input = image")
        require_no_label_texts(spec.head, "for data.input = image, whose model cannot read a label's text")

    def load_reader(self, data: DataSpec, model: ModelSpec, *, base: Any = None) -> Any:
        from fedtune.model.base_model import load_processor

        require_pillow()
        reader = ImageReader(*load_processor(model))
        if base is not None and data.max_length != (places := len(reader.make_blank())):
            bound = f"must be {places}, the number of positions of an image in this model"
            raise ConfigError("data.max_length", data.max_length, bound)
        return reader

    def check_record(self, data: DataSpec) -> Callable[[Record], object]:
        require_pillow()
        return _decode_image

    def encode_records(
        self, records: Sequence[Record], reader: Any, *, data: DataSpec, lenient_within: int | None
    ) -> Rows:
        def read_patches(record: Record) -> Any:  # at a real site a file may have changed since it was validated
            return reader.cut_patches(_decode_image(record))

        return read_rows(read_patches, records, nothing=reader.make_blank(), lenient=lenient_within is not None)

    def check_batch_independence(self, base: Any, model: ModelSpec) -> None:
        from fedtune.model.base_model import load_processor
        from fedtune.model.compatibility import check_examples_independent
        from fedtune.model.hf_logging import get_first_line

        reader, frozen = ImageReader(*load_processor(model)), base.get_base_model()
        blank = torch.from_numpy(np.stack(2 * [reader.make_blank()])).to(frozen.device)
        frozen.places = blank.shape[1]  # for dummy inputs

        def run() -> None:
            try:
                self.embed_rows(base, blank, torch.ones(blank.shape[:2]).to(blank))
            except Exception as error:
                bound = f"cannot read images of {reader.side} x {reader.side} pixels, which its processor produces"
                raise ConfigError("model.path", model.path, f"{bound}: {get_first_line(error)}") from error

        check_examples_independent(base, run, places=blank.shape[1])

    def embed_rows(self, base: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        from fedtune.model.unsupported_models import VISION

        frozen = getattr(base, "get_base_model", lambda: base)()  # an exported base is plain
        before = VISION[frozen.config.model_type]
        # Without a mask, because every row is a complete image; an empty row is a gray image.
        hidden = frozen(pixel_values=_join_patches(input_ids[:, before:])).last_hidden_state
        return mean_pool(hidden[:, before:], attention_mask[:, before:])

    def generate_dummies(self, base: Any, lengths: Sequence[int], draws: np.random.Generator) -> tuple[Row, ...]:
        frozen = base.get_base_model()
        width = 3 * frozen.config.patch_size**2
        dummies = [draws.normal(size=(frozen.places, width)).astype(np.float32) for _ in lengths]
        for place, patches in enumerate(dummies[::2]):
            patches[:] = (0, 3, -3)[place % 3] if place % 2 else patches * 3
        return tuple(dummies)

    def generate_dummy_field(self, role: str, data: DataSpec, *, draw: Callable[[int], int]) -> str | None:
        return generate_image_field(draw) if role == "image" else None

    def list_supported_formats(self, task_formats: tuple[str, ...]) -> tuple[str, ...]:
        return ("peft", "safetensors")


def _decode_image(record: Record) -> Any:
    return decode_image(record.fields["image"], file=record.file, at=record.at("image"))


def _join_patches(patches: torch.Tensor) -> torch.Tensor:
    """Reassemble patches (n, count * count, 3 * patch * patch) to pixels (n, 3, side, side), inverting
    `ImageReader.cut_patches`.
    """
    count, patch = int(patches.shape[1] ** 0.5), int((patches.shape[2] // 3) ** 0.5)
    cut = patches.reshape(-1, count, count, 3, patch, patch)
    return cut.permute(0, 3, 1, 4, 2, 5).reshape(-1, 3, count * patch, count * patch)
