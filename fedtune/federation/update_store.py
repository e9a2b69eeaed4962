"""Disk store for the valid updates of a round until they are averaged, so that memory holds one update at a time."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from itertools import accumulate
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt

from fedtune.model.adapter import Adapter
from fedtune.model.ranks import project_average
from fedtune.model.spec import LORA_A, LORA_B
from fedtune.spec import RunError


class UpdateStore:
    """On-disk store of updates with the names and shapes of `sent`, one flat float32 vector per site.

    The store is a context manager that deletes its folder on exit; the next store removes files left by a killed
    process.  Only the lead's user can read the folder.  The store reveals nothing new, because the lead receives every
    update.

    Args:
        folder: the folder of this round; created, and emptied first.
        sent: the adapter that was sent to the sites.
    """

    def __init__(self, folder: Path, sent: Adapter) -> None:
        self._folder, self.sent = folder, sent
        sizes = (value.size for value in sent.tensors.values())
        self._starts = dict(zip(sent.tensors, accumulate(sizes, initial=0), strict=False))

    def __enter__(self) -> UpdateStore:
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir(parents=True, mode=0o700)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)

    def put(self, site: str, tensors: Mapping[str, npt.NDArray[np.float32]]) -> None:
        """Write a site's update to disk.

        Raises:
            RunError: the update cannot be written.
        """
        try:
            with self._path(site).open("wb") as file:
                for name in self.sent.tensors:
                    file.write(np.ascontiguousarray(tensors[name], dtype="<f4").data)
        except OSError as error:
            needed = f"{4 * self.sent.num_values} bytes per site"
            raise RunError(f"{self._folder} cannot store the updates ({error.strerror}): free {needed}") from error

    def read_values(self, site: str, *, start: int, count: int) -> npt.NDArray[np.float32]:
        """Read `count` values of a site's update, beginning at index `start`; shape (count,)."""
        return np.fromfile(self._path(site), dtype="<f4", count=count, offset=4 * start)

    def read_tensor(self, site: str, name: str) -> npt.NDArray[np.float32]:
        """Read one tensor of a site's update, in its shape."""
        value = self.sent.tensors[name]
        return self.read_values(site, start=self._starts[name], count=value.size).reshape(value.shape)

    def average_products(self, average: Adapter, weights: Mapping[str, float]) -> Adapter:
        """Replace the LoRA factors in `average` by those of each layer's average product B A, at the adapter's rank.

        Guarantee: post-processing of updates.

        Args:
            average: the element-wise average of the updates; its other tensors, such as the head's, are kept.
            weights: site -> its weight, in a fixed order for reproducible sums.
        """
        total, tensors = sum(weights.values()), dict(average.tensors)
        for name in average.tensors:
            if LORA_A not in name:
                continue
            other = name.replace(LORA_A, LORA_B)
            products = [
                (weight / total, self.read_tensor(site, other), self.read_tensor(site, name))
                for site, weight in weights.items()
            ]
            tensors[other], tensors[name] = project_average(products, self.sent.tensors[name])
        return Adapter(tensors)

    def build_adapter(self, values: npt.NDArray[np.float32]) -> Adapter:
        """Reshape a flat vector of shape (num_values,), in storage order, into an adapter."""
        ends = np.cumsum([value.size for value in self.sent.tensors.values()])
        parts = np.split(values, ends[:-1])
        named = zip(self.sent.tensors.items(), parts, strict=True)
        return Adapter({name: part.reshape(value.shape) for (name, value), part in named})

    def _path(self, site: str) -> Path:
        return self._folder / site
