"""Votes: each unit has one vote, for the declared text that is nearest to its own; the adapter is their noisy share.

A vote is a step of DP-SGD.  The loss of a record is minus the weight of its candidate, so its gradient has a single
entry, -1, and norm 1 = `privacy.max_grad_norm`: clipping leaves it as it is, and a record that is added or removed
moves the sum by 1.  With every record in the step (`privacy.sampling_rate=1`) and one step the weights are the
candidates' shares of all votes, with the noise of one Gaussian mechanism (the private histogram of Lin et al. 2024,
arXiv 2305.15560).  Rounds, secure sums, ledgers and reports are those of any run.

The frozen base computes which candidate is nearest.  A record that is almost equally near to two candidates could vote
by its company, if other records changed its similarities by rounding.  Its gradient shows the nearest candidate and
nothing else, so the trial before a run (`fedtune.training.preflight`) compares the similarities of made-up records
alone and in company, bit for bit.  A machine on which one bit differs is refused, whatever a site's policy accepts.

A histogram of a column, such as how frequent each label is, is a vote too: that column is the text, and its declared
values are the candidates.
"""

from __future__ import annotations

import numpy as np

from fedtune.data.batching import Batch
from fedtune.data.spec import DataSpec
from fedtune.data.tokenise import UNSUPERVISED, Targets
from fedtune.model.spec import TaskModelSpec
from fedtune.process import torch
from fedtune.tasks.base import Draws, FirstTarget, Ids, Model, Task
from fedtune.tasks.pooled import LabelTask, TargetOf


class Votes(LabelTask):
    """`data.labels` name the candidates, `head.label_texts` are their texts; the head is a weight for each.

    A unit of several records (`privacy.unit=user`) has one vote in all: its gradient is their mean, of norm 1 at most.
    """

    name = "votes"
    roles = ("text",)
    inputs = frozenset({"text"})
    formats = ("peft",)
    hub_name = ""
    counts_units = True
    rate_shares = None

    def target(self, data: DataSpec) -> TargetOf:
        return lambda record: 0

    def add_head(self, model: Model) -> None:
        """Nothing of the base is trained: what is nearest must not move with the votes."""
        super().add_head(model)
        model.base.requires_grad_(False)
        rows = model.get_parameter("head.weight").detach()  # (candidates, h)
        model.register_buffer("candidates", rows, persistent=False)
        model.head = torch.nn.Linear(len(rows), 1, bias=False, device=rows.device)
        torch.nn.init.zeros_(model.head.weight)

    def start_head(self, model: Model) -> None:
        model.get_buffer("candidates").copy_(self.label_rows(model))

    def scored(self, model: Model, embeddings: torch.Tensor) -> torch.Tensor:
        """(rows, 1): the weight of each row's nearest candidate."""
        assert model.head is not None
        model.decided_by = torch.nn.functional.linear(embeddings, model.get_buffer("candidates")).detach()
        votes = torch.nn.functional.one_hot(model.decided_by.argmax(dim=1), len(model.spec.labels))
        weights: torch.Tensor = model.head(votes.to(embeddings.dtype))
        return weights

    def loss(self, logits: torch.Tensor, targets: torch.Tensor, *, spec: TaskModelSpec) -> torch.Tensor:
        """Minus the weight of each record's candidate."""
        return -logits[:, 0] * (targets != UNSUPERVISED)

    def said(self, logits: torch.Tensor, *, spec: TaskModelSpec) -> dict[str, torch.Tensor]:
        return {}

    final_scores = Task.final_scores
    detail = Task.detail
    answer = Task.answer

    def unit_score(self, model: Model, batch: Batch) -> float:
        """The weight of its candidate."""
        return float(model.logits(batch)[0, 0].clamp(0, 1))

    def made_up_targets(self, input_ids: Ids, *, spec: TaskModelSpec, draws: Draws, first: FirstTarget) -> Targets:
        return np.zeros(len(input_ids), dtype=np.int64)
