"""One pass of the frozen layers for all lines of a study: it takes as long as the training behind it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch

from fedtune.tasks import TaskModel
from fedtune.training.examples import SiteExamples


@contextmanager
def shared_frozen_states() -> Iterator[None]:
    """Inside, a record's states are taken over from an earlier run in this process that had the same tokens.

    For runs of one base model with adapters on the same layers.  States depend on the record's tokens alone, so that
    a run gets what it would compute, up to the rounding of another batch's shape.
    """
    known: dict[bytes, torch.Tensor] = {}
    compute = SiteExamples.keep_frozen_states

    def keep(self: SiteExamples, model: TaskModel) -> None:
        if self._states is not None:
            return
        names = [ids.tobytes() for ids in self._dataset.input_ids]
        if all(name in known for name in names):
            self._states = torch.cat([known[name] for name in names])
            return
        compute(self, model)
        assert self._states is not None, "the study trains the last layers alone"
        for name, start, length in zip(names, self._starts, self.lengths, strict=True):
            known[name] = self._states[start : start + length].clone()

    with patch.object(SiteExamples, "keep_frozen_states", keep):
        yield
