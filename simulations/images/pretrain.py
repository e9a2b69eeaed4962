"""A tiny vision transformer that knows scikit-learn's digits 0 to 4, and the images of 5 to 9 that sites learn from.

    python simulations/images/pretrain.py

They lie in `files` beside this script.  It needs scikit-learn (the extra export brings it along) and the extra images.
"""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits
from transformers import ViTConfig, ViTImageProcessorPil, ViTModel

SIDE, PATCH = 16, 4


def write_images(folder: Path, *, seed: int = 0) -> None:
    """Write the digits 5 to 9 as PNGs, and tables of their paths and labels: three of four to train on."""
    digits = load_digits()
    chosen = np.flatnonzero(digits.target >= 5)
    np.random.default_rng(seed).shuffle(chosen)
    (folder / "digits").mkdir(parents=True, exist_ok=True)
    for name, places in (("train", chosen[len(chosen) // 4 :]), ("test", chosen[: len(chosen) // 4])):
        with (folder / f"{name}.csv").open("w", newline="") as stream:
            table = csv.writer(stream)
            table.writerow(["image", "label"])
            for place in places:
                path = f"digits/{place}.png"
                Image.fromarray((digits.images[place] * 15).astype(np.uint8)).save(folder / path)
                table.writerow([path, ("five", "six", "seven", "eight", "nine")[digits.target[place] - 5]])


def pretrain(folder: Path, *, steps: int = 600, seed: int = 0) -> float:
    """Train on 0 to 4 from a random start, without privacy; save a folder of transformers.  The accuracy on a fifth."""
    torch.manual_seed(seed)
    config = ViTConfig(
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=128,
        image_size=SIDE,
        patch_size=PATCH,
    )
    processor = ViTImageProcessorPil(size={"height": SIDE, "width": SIDE})
    model, head = ViTModel(config, add_pooling_layer=False), torch.nn.Linear(64, 5)
    digits = load_digits()
    known = np.flatnonzero(digits.target < 5)
    images = [Image.fromarray((one * 15).astype(np.uint8)).convert("RGB") for one in digits.images[known]]
    pixels = processor(images=images, return_tensors="pt")["pixel_values"]
    targets = torch.from_numpy(digits.target[known])
    held, rest = np.arange(0, len(known), 5), np.setdiff1d(np.arange(len(known)), np.arange(0, len(known), 5))
    optimizer = torch.optim.AdamW([*model.parameters(), *head.parameters()], lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps)
    for _ in range(steps):
        batch = torch.from_numpy(np.random.default_rng(torch.randint(1 << 30, ()).item()).choice(rest, 64))
        # Moved by up to two pixels, so that it learns strokes and not places.
        down, right = torch.randint(-2, 3, (2,)).tolist()
        hidden = model(torch.roll(pixels[batch], (down, right), (2, 3))).last_hidden_state[:, 1:].mean(dim=1)
        loss = torch.nn.functional.cross_entropy(head(hidden), targets[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()
    with torch.no_grad():
        said = head(model(pixels[held]).last_hidden_state[:, 1:].mean(dim=1)).argmax(dim=1)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return float((said == targets[held]).double().mean())


if __name__ == "__main__":
    into = Path(__file__).parent / "files"
    print("accuracy on 0 to 4:", pretrain(into / "model"))
    write_images(into)
