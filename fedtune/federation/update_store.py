"""A round's valid updates on disk, from when each came until all are averaged: memory holds one of them."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt

from fedtune.model.adapter import Adapter
from fedtune.spec import RunError


class Arrived:
    """Updates with the names and shapes of `sent`, each kept as one vector of its values.

    Used as a context manager, which leaves nothing behind; what a killed process left is removed by the next one.
    The lead sees every update anyway, so a folder that only its own user can read keeps nothing new.

    Args:
        folder: this round's own; made, and emptied before.
    """

    def __init__(self, folder: Path, sent: Adapter) -> None:
        self._folder, self.sent = folder, sent

    def __enter__(self) -> Arrived:
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir(parents=True, mode=0o700)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)

    def put(self, site: str, tensors: Mapping[str, npt.NDArray[np.float32]]) -> None:
        """Keep a site's update.

        Raises:
            RunError: the disk does not take it.
        """
        try:
            with self._path(site).open("wb") as file:
                for name in self.sent.tensors:
                    file.write(np.ascontiguousarray(tensors[name], dtype="<f4").data)
        except OSError as error:
            needed = f"{4 * self.sent.num_values} bytes for each site's update"
            raise RunError(f"{self._folder} takes no more of a round ({error.strerror}): it needs {needed}") from error

    def values(self, site: str, *, start: int, count: int) -> npt.NDArray[np.float32]:
        """`count` values of a site's update, from the `start`-th on; shape (count,)."""
        return np.fromfile(self._path(site), dtype="<f4", count=count, offset=4 * start)

    def adapter(self, values: npt.NDArray[np.float32]) -> Adapter:
        """The adapter whose values, in the order in which updates are kept, are these; shape (num_values,)."""
        ends = np.cumsum([value.size for value in self.sent.tensors.values()])
        parts = np.split(values, ends[:-1])
        named = zip(self.sent.tensors.items(), parts, strict=True)
        return Adapter({name: part.reshape(value.shape) for (name, value), part in named})

    def _path(self, site: str) -> Path:
        return self._folder / site
