"""What all runs of a study compute alike, computed once: the frozen layers, and the scores before training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from fedtune.data import Batch
from fedtune.sites.shared_model import Evaluation
from fedtune.tasks.task_model import TaskModel
from fedtune.training.examples import SiteExamples


@contextmanager
def shared_frozen_states(file: Path | None = None) -> Iterator[None]:
    """Inside, a record's states are taken over from an earlier batch that had the same tokens.

    For runs of one base model with adapters on the same layers, their training and scoring.  States depend on the
    record's tokens alone, so that a run gets what it would compute, up to the rounding of another batch's shape.
    An adapter that was scored on the same files is not scored again: all runs begin in the same one.

    Args:
        file: where they are kept from one process to the next; None: they end with this one.
    """
    known: dict[bytes, torch.Tensor] = {}
    scored: dict[str, Evaluation] = {}
    if file is not None and file.exists():
        known, scored = torch.load(file, weights_only=False)  # this study's own file
    before, made_up = len(known) + len(scored), False
    states_of, keep_states, measured_of = (
        TaskModel.compute_frozen_states,
        SiteExamples.cache_frozen_states,
        Evaluation.build,
    )

    def states(self: TaskModel, batch: Batch) -> torch.Tensor | None:
        if made_up:
            return states_of(self, batch)
        lengths = batch.attention_mask.sum(dim=1).tolist()
        names = [row[:length].numpy().tobytes() for row, length in zip(batch.input_ids.cpu(), lengths, strict=True)]
        if any(name not in known for name in names):
            computed = states_of(self, batch)
            if computed is None:
                return None
            for name, row, length in zip(names, computed.cpu(), lengths, strict=True):
                known[name] = row[:length].clone()
        found = known[names[0]].new_zeros(*batch.input_ids.shape, known[names[0]].shape[1])
        for row, name in zip(found, names, strict=True):
            row[: len(known[name])] = known[name]
        return found.to(self.device)

    def keep(self: SiteExamples, model: TaskModel, **how: Any) -> None:
        nonlocal made_up
        made_up = "parts" in how  # examples on which a model is tried: each is to be computed
        try:
            keep_states(self, model, **how)
        finally:
            made_up = False

    def measured(model: TaskModel, tokenizer: Any, data: Any, config: Any, *, generate: bool) -> Evaluation:
        spec = config.data
        files = (spec.validation_file, spec.test_file, spec.max_length, spec.prompt_template)
        digest = sha256(repr((files, config.evaluation, len(data.records), generate)).encode())
        for name, value in sorted(model.trainable().items()):
            digest.update(name.encode() + value.detach().cpu().numpy().tobytes())
        if digest.hexdigest() not in scored:
            scored[digest.hexdigest()] = measured_of(model, tokenizer, data, config, generate=generate)
        return scored[digest.hexdigest()]

    with (
        patch.object(TaskModel, "compute_frozen_states", states),
        patch.object(SiteExamples, "cache_frozen_states", keep),
        patch.object(Evaluation, "build", measured),
    ):
        yield
    if file is not None and len(known) + len(scored) > before:
        torch.save((known, scored), file)
