"""One pass of the frozen layers for all runs of a study: it takes as long as the training behind it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from fedtune.tasks import TaskModel
from fedtune.training.examples import SiteExamples


@contextmanager
def shared_frozen_states(file: Path | None = None) -> Iterator[None]:
    """Inside, a record's states are taken over from an earlier run that had the same tokens.

    For runs of one base model with adapters on the same layers.  States depend on the record's tokens alone, so that
    a run gets what it would compute, up to the rounding of another batch's shape.

    Args:
        file: where they are kept from one process to the next; None: they end with this one.
    """
    known: dict[bytes, torch.Tensor] = torch.load(file) if file is not None and file.exists() else {}
    compute = SiteExamples.keep_frozen_states

    def keep(self: SiteExamples, model: TaskModel, **how: Any) -> None:
        names = [ids.tobytes() for ids in self._dataset.input_ids]
        if self._states is not None or how:  # made-up examples are nobody's records
            compute(self, model, **how)
        elif all(name in known for name in names):
            self._states = torch.cat([known[name] for name in names])
        else:
            compute(self, model)
            assert self._states is not None, "the study trains the last layers alone"
            for name, start, length in zip(names, self._starts.flat, self._dataset.text_lengths.flat, strict=True):
                known[name] = self._states[start : start + length].clone()
            if file is not None:
                torch.save(known, file)

    with patch.object(SiteExamples, "keep_frozen_states", keep):
        yield
