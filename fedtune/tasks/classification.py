"""Classification: one of a declared set of labels for each text, by a linear head on the mean of the hidden states."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from fedtune.data.records import Record
from fedtune.data.spec import DataSpec
from fedtune.data.tokenise import UNSUPERVISED, Targets, TextDataset, Tokenizer, cut, encode
from fedtune.model.spec import HeadSpec, TaskModelSpec
from fedtune.spec import ConfigError, DataError
from fedtune.tasks.base import FirstTarget, Ids, Model, Readout, Task
from fedtune.words import counted

if TYPE_CHECKING:
    import torch

    from fedtune.data.batching import Batch

_LABEL_TOKENS = 64
"""A label's text is cut here: a name or a sentence, which bounds the memory for thousands of labels."""
_HEAD_ROWS = 32
"""Embeddings are filled up to a multiple of so many rows before they are scored."""
_HEAD_LINES = """
import json
import torch
from safetensors.torch import load_file

settings = json.load(open("FOLDER/fedtune.json", encoding="utf-8"))
head = load_file("FOLDER/head.safetensors")
tokens = tokenizer(["a text"], return_tensors="pt", return_token_type_ids=False)
with torch.no_grad():
    hidden, mask = model(**tokens).last_hidden_state, tokens["attention_mask"].unsqueeze(-1)
pooled = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
centred = torch.nn.functional.normalize(pooled - head["centre"], dim=-1)
print([settings["labels"][place] for place in (centred @ head["weight"].T).argmax(1)])
"""
"""The same with labels; a centre of zeros changes nothing, and the head's scale no order."""


class Classification(Task):
    """Mean-pooled, normalised hidden states x; logits = scale * W x; the loss is their cross-entropy.

    A model's `head` is W, without a bias, and its buffer `centre` the public constant that `head.centre` subtracts.
    """

    name = "classification"
    roles = ("text", "label")
    has_labels = True
    has_head = True
    hub_name = "text-classification"
    formats = ("peft", "sentence-transformers", "onnx")
    judged_by = "accuracy"
    rate_shares = (1 / 8, 1.0)
    unusable = ("label", "another label", "must be one of data.labels")

    def check_model(self, spec: TaskModelSpec) -> None:
        if len(spec.labels) < 2 or len(set(spec.labels)) < len(spec.labels):
            raise ConfigError("data.labels", spec.labels, "must be at least two different labels for classification")
        if spec.head.label_texts and len(spec.head.label_texts) != len(spec.labels):
            bound = f"must be one text for each of the {len(spec.labels)} labels, in their order"
            raise ConfigError("head.label_texts", spec.head.label_texts, bound)

    def usable(self, data: DataSpec) -> Callable[[Record], bool]:
        declared = set(data.labels)
        return lambda record: record.fields["label"] in declared

    def tokenise(
        self, records: Sequence[Record], tokenizer: Tokenizer, *, data: DataSpec, lenient_within: int | None = None
    ) -> TextDataset:
        """The role `text`, with the tokenizer's own special tokens; a label's class is its place in `data.labels`."""
        classes = {label: index for index, label in enumerate(data.labels)}
        if unknown := [record for record in records if record.fields["label"] not in classes]:
            raise _undeclared(unknown, data.labels)
        targets = np.array([classes[record.fields["label"]] for record in records], dtype=np.int64)
        fields = [(record, "text") for record in records]
        ids, found = whole_texts(fields, tokenizer, max_length=data.max_length, lenient_within=lenient_within)
        return TextDataset(tuple(ids), np.where(found, targets, UNSUPERVISED))

    def add_head(self, model: Model) -> None:
        import torch

        hidden_size, device = model.base.config.get_text_config().hidden_size, model.device
        head = torch.nn.Linear(hidden_size, len(model.spec.labels), bias=False, device="meta").to_empty(device=device)
        torch.nn.init.zeros_(head.weight)
        model.head = head.requires_grad_(model.spec.head.train)
        # A public constant, not trained and never part of an update.
        model.register_buffer("centre", torch.zeros(hidden_size, device=device), persistent=False)

    def start_head(self, model: Model) -> None:
        """Take from the labels' texts what `spec.head` wants of them: the centre, and each row of the head."""
        import torch

        head = model.spec.head
        if not head.centre and head.init != "label_names":
            return
        rows, centre = _label_embeddings(self, model), model.get_buffer("centre")
        if head.centre:
            centre.copy_(rows.mean(dim=0))
            rows = torch.nn.functional.normalize(rows - centre, dim=-1)
        if head.init == "label_names":
            with torch.no_grad():
                model.get_parameter("head.weight").copy_(rows)

    def embed(self, model: Model, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Token ids and attention mask, both (n, t), to embeddings (n, h) of norm 1 in float32."""
        from torch.nn import functional

        hidden = model.base(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        pooled = mean_pooled(hidden, attention_mask)
        centred = model.spec.head.centre
        return functional.normalize(pooled - model.get_buffer("centre"), dim=-1) if centred else pooled

    def logits(self, model: Model, batch: Batch) -> torch.Tensor:
        """(rows, labels)."""
        from torch.nn import functional

        embeddings = self.embed(model, batch.input_ids, batch.attention_mask)
        # A product with few rows takes another kernel, which rounds otherwise (measured below 13 rows on a CPU).
        rows = functional.pad(embeddings, (0, 0, 0, -len(embeddings) % _HEAD_ROWS))
        assert model.head is not None
        scores: torch.Tensor = model.head(rows)[: len(embeddings)]
        return model.spec.head.scale * scores

    def losses(self, model: Model, batch: Batch) -> torch.Tensor:
        from torch.nn import functional

        return functional.cross_entropy(self.logits(model, batch), batch.targets, reduction="none")

    def figures(self, model: Model, batch: Batch) -> dict[str, torch.Tensor]:
        from torch.nn import functional

        logits = model.logits(batch)
        # The loss comes from the same logits: `model.losses` would run the base once more.
        losses = functional.cross_entropy(logits, batch.targets, reduction="none")
        return {"loss": losses, "predicted": logits.argmax(dim=1), "truth": batch.targets}

    def scores(self, figures: Mapping[str, npt.NDArray[np.float64]], *, spec: TaskModelSpec) -> dict[str, float]:
        """`accuracy` and `macro_f1`, both in [0, 1], and `loss`, the mean cross-entropy in nats."""
        truth, predicted = (figures[name].astype(np.int64) for name in ("truth", "predicted"))
        return {
            "accuracy": float(np.mean(truth == predicted)),
            "macro_f1": macro_f1(truth, predicted, num_labels=len(spec.labels)),
            "loss": float(np.mean(figures["loss"])),
        }

    def guess(self, dataset: TextDataset) -> float:
        """The share of the most frequent label."""
        return float(np.bincount(np.asarray(dataset.targets)).max() / len(dataset))

    def unit_score(self, model: Model, batch: Batch) -> float:
        """Whether the predicted class is right."""
        return float(model.logits(batch).argmax(dim=1)[0] == batch.targets[0])

    def made_up_targets(
        self, input_ids: Ids, *, spec: TaskModelSpec, draws: np.random.Generator, first: FirstTarget
    ) -> Targets:
        return draws.integers(0, len(spec.labels), size=len(input_ids))

    def readout(self, model: Model) -> Readout:
        import torch

        scores = model.spec.head.scale * model.get_parameter("head.weight").detach()
        if not model.spec.head.centre:
            return ((scores, None),)
        centre = model.get_buffer("centre")
        return ((torch.eye(len(centre), device=centre.device), -centre), (scores, None))

    def loading(self, *, base: str, folder: str) -> str:
        return super().loading(base=base, folder=folder) + _HEAD_LINES.replace("FOLDER", folder)


def macro_f1(truth: npt.NDArray[np.int64], predicted: npt.NDArray[np.int64], *, num_labels: int) -> float:
    """The unweighted mean of every declared class's F1 score, in [0, 1].

    F1 is 2 TP / (2 TP + FP + FN).  A declared class with no true and no predicted example has
    0 / 0 and counts as 0, which is scikit-learn's `f1_score(truth, predicted, average="macro",
    labels=range(num_labels), zero_division=0)`; without `labels`, scikit-learn would leave that
    class out, and the score's meaning would change with the sample.

    Args:
        truth: (n,) classes in [0, num_labels).
        predicted: (n,) classes in [0, num_labels).
        num_labels: size of the declared label set.

    >>> import numpy as np
    >>> macro_f1(np.array([0, 0, 1]), np.array([0, 1, 1]), num_labels=2)  # both classes have 2/3
    0.6666666666666666
    >>> macro_f1(np.array([0, 0, 1]), np.array([0, 1, 1]), num_labels=4)  # classes 2 and 3 never occur
    0.3333333333333333
    """
    true_positives = np.bincount(truth[truth == predicted], minlength=num_labels)
    # 2 TP + FP + FN is how often a class is predicted plus how often it is true.
    occurrences = np.bincount(truth, minlength=num_labels) + np.bincount(predicted, minlength=num_labels)
    scores = 2.0 * true_positives / np.maximum(occurrences, 1)
    return float(scores.mean())


def mean_pooled(hidden: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """The mean over real tokens, scaled to norm 1.

    Args:
        hidden: (n, t, h), in any float type.
        attention_mask: (n, t), 1 for real tokens.

    Returns:
        (n, h) in float32.  An example without tokens gives zeros.
    """
    import torch

    mask = attention_mask.unsqueeze(-1).to(torch.float32)
    total = (hidden.to(torch.float32) * mask).sum(dim=1)
    return torch.nn.functional.normalize(total / mask.sum(dim=1).clamp(min=1.0), dim=-1)


def whole_texts(
    fields: Sequence[tuple[Record, str]], tokenizer: Tokenizer, *, max_length: int, lenient_within: int | None
) -> tuple[list[npt.NDArray[np.int32]], list[bool]]:
    """Token ids of texts with the tokenizer's own special tokens, and whether each could be encoded.

    Args:
        fields: records and which of their roles.
        tokenizer: the base's.
        max_length: the most tokens of a text.
        lenient_within: as `Task.tokenise` has it; what cannot be encoded is then one token, 0.

    Raises:
        DataError: a text gives no token.
    """
    texts = [cut(record.fields[role], max_length) for record, role in fields]
    encoded = encode(texts, tokenizer, special_tokens=True, max_length=max_length, within=lenient_within)
    input_ids, found = [], []
    for (record, role), ids in zip(fields, encoded, strict=True):
        if not ids and lenient_within is None:
            raise DataError(record.at(role), "no tokens", f"must have a token of {tokenizer.name_or_path!r}")
        # Cut once more: a tokenizer cuts nothing where its special tokens alone are more than `max_length`.
        input_ids.append(np.array(ids[:max_length] or [0], dtype=np.int32))
        found.append(bool(ids))
    return input_ids, found


def label_texts(spec: HeadSpec, labels: tuple[str, ...]) -> tuple[str, ...]:
    """What stands for each label: its declared description, else its name with spaces for underscores."""
    return spec.label_texts or tuple(label.replace("_", " ") for label in labels)


def _label_embeddings(task: Classification, model: Model) -> torch.Tensor:
    """(labels, h) float32: each label's text, embedded by the frozen base; every row has norm 1.

    The texts are the declared, public label set, and no record is read: this costs no privacy.
    """
    import torch

    from fedtune.model.base_model import load_tokenizer
    from fedtune.model.fits import check_tokenizer_fits, ids_of

    tokenizer, path = load_tokenizer(model.spec.model), model.spec.model.path
    check_tokenizer_fits(tokenizer, model.base.get_base_model(), path=path)
    rows = []
    with torch.no_grad():
        # One text at a time: no padding, and the same numbers whatever the other labels are.
        for text in label_texts(model.spec.head, model.spec.labels):
            ids = ids_of(tokenizer, text, path=path, max_length=_LABEL_TOKENS)
            token_ids = torch.tensor([ids], device=model.device)
            rows.append(task.embed(model, token_ids, torch.ones_like(token_ids)))
    return torch.cat(rows)


def _undeclared(records: Sequence[Record], labels: Sequence[str]) -> DataError:
    """The error about records whose labels nobody declared."""
    first, more = records[0], counted(len(records) - 1, "more record")
    declared = ", ".join(labels[:5]) + (", ..." if len(labels) > 5 else "")
    bound = f"must be one of the {len(labels)} in data.labels: {declared}"
    # With another column for the label, what is there is a record's text.
    return DataError(first.at("label"), "not declared", f"{bound} ({more} like it)" if records[1:] else bound)
