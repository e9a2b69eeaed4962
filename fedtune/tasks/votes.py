"""Private voting: each record or person votes for the closest of several declared texts.

The adapter contains the noisy vote shares.  A vote is a step of DP-SGD.  The loss of a record is minus the weight of
its candidate, so its gradient has a single entry, -1, and norm 1 = `privacy.max_grad_norm`: clipping does not change
it, and adding or removing a record changes the sum by 1.  With every record in the step (`privacy.sampling_rate=1`) and
a single step, the weights are the candidates' shares of all votes, with the noise of one Gaussian mechanism (the
private histogram of Lin et al. 2024, arXiv 2305.15560).  Rounds, secure aggregation, ledgers and reports are the same
as for any run.

The frozen base determines the closest candidate.  The vote of a record that is almost equally close to two candidates
could depend on its batch, if other records changed its similarities by rounding.  A gradient reveals only the closest
candidate, so the trial before a run (`fedtune.training.batch_invariance`) compares the similarities of synthetic
records alone and in a batch, bit for bit.  A machine on which a single bit differs is refused, even if a site's policy
accepts inexact gradients.

A histogram of a column, such as label frequencies, is a vote too: the column is the text, and its declared values are
the candidates.
"""

from __future__ import annotations

import numpy as np

from fedtune.data.batching import Batch
from fedtune.data.spec import DataSpec
from fedtune.data.tokenization import UNSUPERVISED, Targets
from fedtune.model.spec import TaskModelSpec
from fedtune.process import torch
from fedtune.tasks.base import Draws, FirstTarget, Ids, Model, Task
from fedtune.tasks.pooled import LabelTask, TargetOf


class Votes(LabelTask):
    """Task in which each record votes for its closest candidate text.

    `data.labels` names the candidates, `head.label_texts` contains their texts, and the head has one weight per
    candidate.

    A person with several records (`privacy.unit=user`) has one vote in total: their gradient is the mean over the
    records, with norm at most 1.
    """

    name = "votes"
    roles = ("text",)
    inputs = frozenset({"text"})
    formats = ("peft",)
    hub_name = ""
    counts_units = True
    auto_lr_shares = None

    def target(self, data: DataSpec) -> TargetOf:
        return lambda record: 0

    def add_head(self, model: Model) -> None:
        """Add one weight per candidate, and freeze the base, so that training cannot change the closest candidates."""
        super().add_head(model)
        model.base.requires_grad_(False)
        rows = model.get_parameter("head.weight").detach()  # (candidates, h)
        model.register_buffer("candidates", rows, persistent=False)
        model.head = torch.nn.Linear(len(rows), 1, bias=False, device=rows.device)
        torch.nn.init.zeros_(model.head.weight)

    def init_head(self, model: Model) -> None:
        model.get_buffer("candidates").copy_(self.embed_labels(model))

    def score_embeddings(self, model: Model, embeddings: torch.Tensor) -> torch.Tensor:
        """Return the weight of each row's closest candidate, (rows, 1)."""
        assert model.head is not None
        model.decided_by = torch.nn.functional.linear(embeddings, model.get_buffer("candidates")).detach()
        votes = torch.nn.functional.one_hot(model.decided_by.argmax(dim=1), len(model.spec.labels))
        weights: torch.Tensor = model.head(votes.to(embeddings.dtype))
        return weights

    def loss(self, logits: torch.Tensor, targets: torch.Tensor, *, spec: TaskModelSpec) -> torch.Tensor:
        """Compute the negative weight of each record's candidate, (rows,)."""
        return -logits[:, 0] * (targets != UNSUPERVISED)

    def predictions(self, logits: torch.Tensor, *, spec: TaskModelSpec) -> dict[str, torch.Tensor]:
        return {}

    compute_final_scores = Task.compute_final_scores
    detail = Task.detail
    answer = Task.answer

    def score_unit(self, model: Model, batch: Batch) -> float:
        """Return the weight of the record's candidate, clamped to [0, 1]."""
        return float(model.logits(batch)[0, 0].clamp(0, 1))

    def dummy_targets(self, input_ids: Ids, *, spec: TaskModelSpec, draws: Draws, first: FirstTarget) -> Targets:
        return np.zeros(len(input_ids), dtype=np.int64)
