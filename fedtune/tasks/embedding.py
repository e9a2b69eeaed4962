"""Embedding models for text pairs: related texts get similar mean hidden states, compared by cosine.

Each record has its own loss.  Losses with in-batch negatives are not offered: the gradient of a record would depend on
the other records of the batch, and clipping it would not bound that record's influence.

There is no head; the results are the embeddings themselves, which the adapters change.  A projection matrix on top of
them, of the hidden size squared, would have more values to add noise to than all adapters together.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from fedtune.data.batching import Batch
from fedtune.data.features import check_names
from fedtune.data.records import Record, make_validator, record_key
from fedtune.data.spec import DataSpec
from fedtune.data.tokenization import Targets, TextDataset, Tokenizer, tokenize_whole_texts
from fedtune.model.spec import TaskModelSpec
from fedtune.process import torch
from fedtune.spec import ConfigError, DataError, check_positive, spec
from fedtune.tasks.base import Draws, FirstTarget, Ids, Model, Task, read_target_number, require_target_range
from fedtune.tasks.inputs import mean_pool
from fedtune.tasks.measures import rank_correlation

_TIE = 1e-6
"""Cosines that differ by less are equal: cosines of the same text differ by rounding from batch to batch."""
_CHUNK = 256
_COUPLED = (
    "couples records: a record's gradient would depend on the other sampled records, and clipping would not bound one "
    "record's influence; use a list of public texts, or a column negative"
)


@spec
class PairSettings:
    """Settings of the triplet loss: the source of negatives, and the margin.

    Attributes:
        negatives: the source of the text that is unrelated to the anchor: "record", the column `negative`; or a list of
            public texts, from which the record's hash selects one.  In-batch negatives ("batch") are refused.
        margin: the required difference between the cosine with the positive and the cosine with the negative.
    """

    negatives: tuple[str, ...] | Literal["record", "batch"] = "record"
    margin: float = 0.2

    def __post_init__(self) -> None:
        if self.negatives == "batch":
            raise ConfigError("negatives", "batch", _COUPLED)
        if not isinstance(self.negatives, str):
            check_names("negatives", self.negatives)
            if not self.negatives:
                raise ConfigError("negatives", self.negatives, "must be a list of at least one text, or record")
        check_positive("margin", self.margin)
        if self.margin > 2:
            raise ConfigError("margin", self.margin, "must be at most 2, the largest difference between two cosines")


class Embedding(Task):
    """Embeddings as mean-pooled, normalized hidden states, compared by cosine, with a loss per record.

    * `text`, `other` and `target`, a score: the squared difference between the cosine and the score, scaled from its
      range (`data.target_range`) to [0, 1];
    * `anchor`, `positive` and `negative`: the triplet loss, the shortfall of the difference between both cosines below
      `task_settings.margin`, or 0.  Without the column `negative`, the negative is a public text.
    """

    name = "embedding"
    roles = ("text", "other", "target")
    settings = PairSettings
    own: PairSettings
    data_settings = frozenset({"target_range"})
    hub_name = "sentence-similarity"
    formats = ("peft", "sentence-transformers", "onnx")
    primary_metric = "spearman"
    layouts = (roles, ("anchor", "positive", "negative"), ("anchor", "positive"))

    def list_required_roles(self, data: DataSpec) -> tuple[str, ...]:
        if "anchor" not in data.columns:
            return self.roles
        return self.layouts[1 if self.own.negatives == "record" else 2]

    def count_texts_per_record(self, data: DataSpec) -> int:
        return 3 if "anchor" in data.columns else 2

    def primary_metric_for(self, data: DataSpec) -> str:
        return "ndcg_at_10" if "anchor" in data.columns else self.primary_metric

    def check_data(self, data: DataSpec) -> None:
        self.check_input(data)
        if ("anchor" in data.columns) == ("text" in data.columns):
            bound = "must have either text, other and target, or anchor and positive with negatives"
            raise ConfigError("columns", dict(data.columns), bound)
        super().check_data(data)
        if "text" in data.columns:
            require_target_range(data)
        elif data.target_range is not None:
            bound = "must stay null: an anchor with its positive has no score"
            raise ConfigError("target_range", data.target_range, bound)

    def check_own(self, data: DataSpec) -> None:
        if (negatives := self.own.negatives) != "record" and "anchor" not in data.columns:
            raise ConfigError("task_settings.negatives", negatives, "must stay record: a scored pair has no negative")
        if negatives == "record" and "anchor" in data.columns and not {"text", "negative"} & {*data.columns}:
            bound = "requires data.columns.negative, or a list of public texts"
            raise ConfigError("task_settings.negatives", negatives, bound)

    def record_validator(self, data: DataSpec) -> Callable[[Record], DataError | None]:
        return make_validator(self._make_target_reader(data))

    def tokenize(
        self, records: Sequence[Record], tokenizer: Tokenizer, *, data: DataSpec, lenient_within: int | None = None
    ) -> TextDataset:
        """Encode each text with the tokenizer's own special tokens; a target is the cosine to learn, or the margin.

        The target is NaN if a text cannot be encoded; such a record has no effect.
        """
        texts = self.count_texts_per_record(data)
        roles = self.layouts[texts - 2][:texts]
        fields = [(record, (role,)) for record in map(self._add_public_negative, records) for role in roles]
        ids, encoded = tokenize_whole_texts(
            fields, tokenizer, max_length=data.max_length, lenient_within=lenient_within
        )
        targets = [*map(self._make_target_reader(data), records)]
        complete = np.array(encoded, dtype=bool).reshape(-1, texts).all(axis=1)
        return TextDataset(tuple(ids), np.where(complete, targets, np.nan).astype(np.float32), texts)

    def logits(self, model: Model, batch: Batch) -> torch.Tensor:
        """Compute L2-normalized embeddings, (rows, h), one per text."""
        hidden = model.base(input_ids=batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state
        return mean_pool(hidden, batch.attention_mask)

    def losses(self, model: Model, batch: Batch) -> torch.Tensor:
        return _compute_losses(_compute_cosines(self.logits(model, batch), batch), batch)

    def outputs_per_example(self, model: Model, batch: Batch) -> dict[str, torch.Tensor]:
        embeddings = model.logits(batch)
        cosines = _compute_cosines(embeddings, batch)
        figures = {"loss": _compute_losses(cosines, batch)}
        if batch.texts == 2:
            return figures | {"cosine": cosines[0], "truth": batch.targets}
        nearer = (cosines[0] > cosines[1]).float()
        return figures | {"nearer": nearer, "anchor": embeddings[0::3], "positive": embeddings[1::3]}

    def postprocess_dataset(
        self, figures: Mapping[str, npt.NDArray[np.float64]]
    ) -> Mapping[str, npt.NDArray[np.float64]]:
        """Replace the embeddings by the rank of each record's positive for its anchor among the positives of all
        records.
        """
        if "anchor" not in figures:
            return figures
        ranks = rank_own_positives(figures["anchor"], figures["positive"])
        return {"loss": figures["loss"], "nearer": figures["nearer"], "rank": ranks}

    def compute_task_scores(
        self, figures: Mapping[str, npt.NDArray[np.float64]], *, spec: TaskModelSpec
    ) -> dict[str, float]:
        """Compute `spearman`, the rank correlation in [-1, 1], for scored pairs, and retrieval scores in [0, 1]
        otherwise.

        `ndcg_at_10`, `recall_at_1` and `recall_at_10` rank an anchor's own positive among the positives of all records;
        every other positive counts as wrong.  `nearer` is the share of records whose positive is closer to the anchor
        than their negative.
        """
        if "truth" in figures:
            return {"spearman": rank_correlation(figures["cosine"], figures["truth"])}
        ranks = figures["rank"]
        scores = {"ndcg_at_10": float(np.mean(np.where(ranks <= 10, 1 / np.log2(1 + ranks), 0.0)))}
        scores |= {f"recall_at_{most}": float(np.mean(ranks <= most)) for most in (1, 10)}
        return scores | {"nearer": float(np.mean(figures["nearer"]))}

    def score_unit(self, model: Model, batch: Batch) -> float:
        """Return 1 minus the absolute error of the cosine, at least 0; for triplets, 1 if the positive is closer than
        the negative, and otherwise 0.
        """
        cosines = _compute_cosines(model.logits(batch), batch)
        if batch.texts == 3:
            return float(cosines[0][0] > cosines[1][0])
        return max(0.0, 1 - abs(float(cosines[0][0] - batch.targets[0])))

    def dummy_targets(self, input_ids: Ids, *, spec: TaskModelSpec, draws: Draws, first: FirstTarget) -> Targets:
        # Triplets get margins up to the maximum of 2, so that most of them have a gradient.
        return draws.uniform(0, spec.texts - 1, size=len(input_ids) // spec.texts).astype(np.float32)

    def _make_target_reader(self, data: DataSpec) -> Callable[[Record], float]:
        """Return a function that computes a record's target: the cosine to learn, or the margin between two cosines."""
        if "anchor" in data.columns:
            return lambda record: self.own.margin
        low, high = bounds = require_target_range(data)
        return lambda record: (read_target_number(record, bounds) - low) / (high - low)

    def _add_public_negative(self, record: Record) -> Record:
        """Add a negative to a record, selected from the public list by the record's hash.

        Without a list, return the record unchanged.
        """
        texts = self.own.negatives
        if isinstance(texts, str):
            return record
        number = int.from_bytes(hashlib.sha256(record_key(record)).digest()[:8])
        return replace(record, fields={**record.fields, "negative": texts[number % len(texts)]})


def _compute_cosines(embeddings: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, ...]:
    """Compute the cosines of each record's first text with its other texts, (records,) each, from normalized (rows,
    h).
    """
    first = embeddings[0 :: batch.texts]
    return tuple((first * embeddings[other :: batch.texts]).sum(dim=1) for other in range(1, batch.texts))


def _compute_losses(cosines: tuple[torch.Tensor, ...], batch: Batch) -> torch.Tensor:
    known = ~batch.targets.isnan()
    missing = batch.targets.nan_to_num() - cosines[0]
    losses = missing.square() if batch.texts == 2 else (missing + cosines[1]).clamp(min=0.0)
    return losses.where(known, losses.new_zeros(()))


def rank_own_positives(anchors: npt.NDArray[np.float64], positives: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Rank each anchor's own positive among all positives, from 1, (n,); ties get the mean rank.

    An embedding that maps all texts to one point therefore gains nothing.  Non-finite values get an infinite rank.
    Both inputs are (n, h), L2-normalized and in the same order.
    """
    similarities = (anchors * positives).sum(axis=1)
    ranks = np.full(len(similarities), np.inf)
    for first in range(0, len(similarities), _CHUNK):
        some = slice(first, first + _CHUNK)
        above = anchors[some] @ positives.T - similarities[some, None]
        ranks[some] = (above > _TIE).sum(axis=1) + ((np.abs(above) <= _TIE).sum(axis=1) + 1) / 2
    return np.where(np.isfinite(similarities), ranks, np.inf)
