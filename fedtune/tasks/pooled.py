"""Base class of tasks with a head on one pooled embedding per record: of a text, a table row or an image."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, TypeAlias

import numpy as np
import numpy.typing as npt

from fedtune.data.batching import Batch
from fedtune.data.records import Record, make_validator
from fedtune.data.spec import DataSpec
from fedtune.data.tokenization import UNSUPERVISED, Targets, TextDataset, Tokenizer
from fedtune.model.spec import TaskModelSpec
from fedtune.process import torch
from fedtune.spec import ConfigError, DataError
from fedtune.tasks import measures
from fedtune.tasks.base import Draws, FirstTarget, Ids, Model, Readout, Task
from fedtune.tasks.inputs import get_input, get_input_for, require_no_label_texts
from fedtune.tasks.measures import Detail, Floats, Marks

TargetOf: TypeAlias = Callable[[Record], npt.ArrayLike]
"""Function from a record to its target; raises a DataError for a record without a declared target."""
_LABEL_TOKENS = 64  # maximum tokens of a label's text, which limits the memory for thousands of labels
_LABELS_AT_ONCE = 64
_HEAD_ROWS = 32  # the head multiplies a multiple of this number of rows
_SHOWN = 3  # maximum number of labels in an answer


class PooledTask(Task):
    """Task with a linear head on mean-pooled, L2-normalized hidden states x, whose logits are scale * W x.

    For features, x is the feature vector, and the head may have hidden layers.  A model's `head` is W, and its buffer
    `center` is the public constant that `head.center` subtracts.
    """

    has_head = True
    data_settings = frozenset({"prompt_template"})
    inputs = frozenset({"text", "features", "image"})
    hub_name = "text-classification"
    formats: ClassVar[tuple[str, ...]] = ("peft", "sentence-transformers", "onnx")
    # Studied for classification.  Other tasks train a head of the same form on the same embeddings, and use the same
    # values until they are studied themselves.
    auto_lr_shares: ClassVar[tuple[float, float] | None] = (1 / 8, 1.0)
    target_type: ClassVar[type[np.int64] | type[np.float32] | type[np.int8]] = np.int64  # dtype of a target

    @abstractmethod
    def target(self, data: DataSpec) -> TargetOf:
        """Return a function that reads a record's target under these settings."""

    def get_target_shape(self, data: DataSpec) -> tuple[int, ...]:
        """Return the shape of one record's target."""
        return ()

    def loss(self, logits: torch.Tensor, targets: torch.Tensor, *, spec: TaskModelSpec) -> torch.Tensor:
        """Compute each row's loss, (rows,), from logits (rows, outputs); 0 for a row with target `UNSUPERVISED`."""
        return compute_binary_losses(logits, targets)

    @abstractmethod
    def predictions(self, logits: torch.Tensor, *, spec: TaskModelSpec) -> dict[str, torch.Tensor]:
        """Compute the predictions for each row from its logits, by name."""

    def true_values(self, targets: torch.Tensor, *, spec: TaskModelSpec) -> torch.Tensor:
        """Convert targets to true values in the units of the predictions."""
        return targets

    @property
    def layouts(self) -> tuple[tuple[str, ...], ...]:
        layouts = (get_input(name).roles(self.roles) for name in sorted(self.inputs, reverse=True))
        return (*layouts, ("text", "text_pair", *self.roles[1:]))

    def list_required_roles(self, data: DataSpec) -> tuple[str, ...]:
        is_pair = data.input == "text" and "text_pair" in data.columns
        roles = self.layouts[-1] if is_pair else get_input_for(data).roles(self.roles)
        return tuple(dict.fromkeys((*roles, *(data.template_roles if "text" in data.template_roles else ()))))

    def check_data(self, data: DataSpec) -> None:
        if data.prompt_template != "{prompt}" and (data.input != "text" or "text" not in data.template_roles):
            bound = "must stay {prompt}, or contain {text} for data.input = text"
            raise ConfigError("prompt_template", data.prompt_template, bound)
        super().check_data(data)

    def check_model(self, spec: TaskModelSpec) -> None:
        require_no_label_texts(spec.head, f"for {self.name}, which has no labels")

    def check_tokenizer(self, tokenizer: Tokenizer, *, data: DataSpec) -> None:
        """Require a tokenizer that puts a separator token between the two texts of a record.

        Raises:
            ConfigError: for `model.path`.
        """
        marks = tokenizer.num_special_tokens_to_add if "text_pair" in data.columns else None
        if marks and marks(pair=True) <= marks(pair=False):
            bound = "its tokenizer has no separator between two texts, which data.columns.text_pair requires"
            raise ConfigError("model.path", tokenizer.name_or_path, bound)

    def record_validator(self, data: DataSpec) -> Callable[[Record], DataError | None]:
        target, readable = self.target(data), get_input_for(data).check_record(data)
        return make_validator(lambda record: (target(record), readable(record)))

    def tokenize(
        self, records: Sequence[Record], tokenizer: Tokenizer, *, data: DataSpec, lenient_within: int | None = None
    ) -> TextDataset:
        """Encode each record's text (with `text_pair`, both texts as a pair), features or image, and read its target.

        Texts get the tokenizer's own special tokens.  A record that cannot be encoded has the target `UNSUPERVISED`.
        """
        ids, encoded = get_input_for(data).encode_records(records, tokenizer, data=data, lenient_within=lenient_within)
        target, shape = self.target(data), self.get_target_shape(data)
        targets: npt.NDArray[Any] = np.full((len(records), *shape), UNSUPERVISED, dtype=self.target_type)
        for place, is_encoded in enumerate(encoded):
            if is_encoded:
                targets[place] = target(records[place])
        return TextDataset(tuple(ids), targets)

    def add_head(self, model: Model) -> None:
        super().add_head(model)
        if get_input_for(model.spec).modality is None:  # only text models can embed the labels' texts
            # A public constant, not trained and never part of an update.
            nothing = torch.zeros(model.base.config.get_text_config().hidden_size, device=model.device)
            model.register_buffer("center", nothing, persistent=False)

    def init_head(self, model: Model) -> None:
        """Initialize the center and the head's rows from the labels' texts, as `spec.head` requires."""
        head = model.spec.head
        if not head.center and head.init != "label_names":
            return
        rows = self.embed_labels(model)
        if head.init == "label_names":
            with torch.no_grad():
                model.get_parameter("head.weight").copy_(self.compute_initial_head_rows(rows))

    def embed_labels(self, model: Model) -> torch.Tensor:
        """Compute the frozen base's embeddings of the labels' texts, (labels, h), L2-normalized; with `head.center`,
        also set the center.

        A label's text is its declared description, or its name with spaces for underscores.  The texts are public and
        no record is read, so there is no privacy cost.  Through rounding, a row may depend on the other labels.
        """
        from fedtune.model.base_model import load_tokenizer
        from fedtune.model.compatibility import check_tokenizer_fits, tokenize_public_text

        spec, center = model.spec, model.get_buffer("center")
        tokenizer, path = load_tokenizer(spec.model), spec.model.path
        check_tokenizer_fits(tokenizer, model.base.get_base_model(), path=path)
        texts = spec.head.label_texts or [label.replace("_", " ") for label in spec.labels]
        ids = [tokenize_public_text(tokenizer, text, path=path, max_length=_LABEL_TOKENS) for text in texts]
        embeddings: dict[int, torch.Tensor] = {}
        with torch.no_grad():
            # Texts of equal length are batched, so that no padding is needed.
            for length in sorted(set(map(len, ids))):
                alike = [place for place, label_ids in enumerate(ids) if len(label_ids) == length]
                for first in range(0, len(alike), _LABELS_AT_ONCE):
                    places = alike[first : first + _LABELS_AT_ONCE]
                    token_ids = torch.tensor([ids[place] for place in places], device=model.device)
                    embeddings |= zip(places, self.embed(model, token_ids, torch.ones_like(token_ids)), strict=True)
        rows = torch.stack([embeddings[place] for place in range(len(ids))])
        if not spec.head.center:
            return rows
        center.copy_(rows.mean(dim=0))
        return torch.nn.functional.normalize(rows - center, dim=-1)

    def compute_initial_head_rows(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Compute the initial head, (outputs, h), from the labels' embeddings, (labels, h) with L2 norm 1."""
        return embeddings

    def embed(self, model: Model, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Compute embeddings (n, h) float32 from a batch's inputs and attention mask (n, t); text embeddings have L2
        norm 1.
        """
        pooled = get_input_for(model.spec).embed_rows(model.base, input_ids, attention_mask)
        centered = model.spec.head.center
        return torch.nn.functional.normalize(pooled - model.get_buffer("center"), dim=-1) if centered else pooled

    def logits(self, model: Model, batch: Batch) -> torch.Tensor:
        """Compute logits (rows, outputs)."""
        embeddings = self.embed(model, batch.input_ids, batch.attention_mask)
        # Products with few rows use another kernel with different rounding (measured below 13 rows on a CPU).
        rows = torch.nn.functional.pad(embeddings, (0, 0, 0, -len(embeddings) % _HEAD_ROWS))
        return self.score_embeddings(model, rows)[: len(embeddings)]

    def score_embeddings(self, model: Model, embeddings: torch.Tensor) -> torch.Tensor:
        """Compute logits (rows, outputs) from embeddings (rows, h), each row independently."""
        assert model.head is not None
        scores: torch.Tensor = model.head(embeddings)
        return model.spec.head.scale * scores

    def losses(self, model: Model, batch: Batch) -> torch.Tensor:
        return self.loss(self.logits(model, batch), batch.targets, spec=model.spec)

    def outputs_per_example(self, model: Model, batch: Batch) -> dict[str, torch.Tensor]:
        # The loss comes from the same logits: `model.losses` would run the base once more.
        logits, spec = model.logits(batch), model.spec
        truth = {"truth": self.true_values(batch.targets, spec=spec)}
        return {"loss": self.loss(logits, batch.targets, spec=spec), **self.predictions(logits, spec=spec), **truth}

    def list_readout_layers(self, model: Model) -> Readout:
        scores = model.spec.head.scale * model.get_parameter("head.weight").detach()
        if not model.spec.head.center:
            return ((scores, None),)
        center = model.get_buffer("center")
        return ((torch.eye(len(center), device=center.device), -center), (scores, None))


class LabelTask(PooledTask):
    """Base class of pooled tasks that predict labels from a declared set."""

    has_labels = True

    def check_model(self, spec: TaskModelSpec) -> None:
        if spec.head.label_texts and len(spec.head.label_texts) != len(spec.labels):
            bound = f"must be one text for each of the {len(spec.labels)} labels, in their order"
            raise ConfigError("head.label_texts", spec.head.label_texts, bound)

    def label_indicators(self, figures: Mapping[str, Floats], *, spec: TaskModelSpec) -> tuple[Marks, Marks]:
        """Return the true and the predicted labels of each record, as (records, labels) booleans."""
        classes = np.arange(len(spec.labels))
        return figures["truth"][:, None] == classes, figures["predicted"][:, None] == classes

    def confidence(self, figures: Mapping[str, Floats], truth: Marks, predicted: Marks) -> tuple[Floats, Marks]:
        """Return the predicted probability of each answer, (answers,), and whether the answer is correct."""
        right = np.asarray((truth & predicted).any(axis=1))
        return (figures["probabilities"] * predicted).sum(axis=1), right

    def compute_final_scores(self, figures: Mapping[str, Floats], *, spec: TaskModelSpec) -> dict[str, float]:
        """Compute the per-round scores, and in addition `auroc` (macro-averaged, one-vs-rest) and `ece`, both in
        [0, 1].
        """
        truth, predicted = self.label_indicators(figures, spec=spec)
        bins = measures.reliability(*self.confidence(figures, truth, predicted))
        final_only = {
            "auroc": measures.auroc(figures["probabilities"], truth),
            "ece": measures.compute_calibration_error(bins),
        }
        return self.compute_task_scores(figures, spec=spec) | final_only | {"loss": float(np.mean(figures["loss"]))}

    def detail(self, figures: Mapping[str, Floats], *, spec: TaskModelSpec) -> Detail | None:
        truth, predicted = self.label_indicators(figures, spec=spec)
        return Detail(
            classes=measures.compute_class_scores(truth, predicted, labels=spec.labels),
            reliability=measures.reliability(*self.confidence(figures, truth, predicted)),
        )

    def answer(self, logits: torch.Tensor, *, spec: TaskModelSpec) -> tuple[str, object]:
        """Return the likeliest labels with their probabilities, the predicted label first."""
        predicted = self.predictions(logits[None], spec=spec)
        chances, first = predicted["probabilities"][0], int(predicted["predicted"][0])
        others = (place for place in (-chances).argsort(stable=True).tolist() if place != first)
        ranked = [(spec.labels[place], float(chances[place])) for place in [first, *others][:_SHOWN]]
        (label, chance), *rest = ranked
        listed = ", ".join(f"{other} {of_other:.3f}" for other, of_other in rest)
        return f"{label} {chance:.3f} ({listed})", format_labels(ranked)


class OneLabelTask(LabelTask):
    """Base class of single-label tasks.  The class is the label's index in `data.labels`."""

    roles = ("text", "label")
    answers = frozenset({"label"})

    def target(self, data: DataSpec) -> TargetOf:
        places = {label: place for place, label in enumerate(data.labels)}
        return lambda record: find_label_index(record.fields["label"], places, record, role="label")

    def dummy_field(self, role: str, data: DataSpec, *, draw: Callable[[int], int]) -> str | None:
        return data.labels[draw(len(data.labels))] if role == "label" else None

    def dummy_targets(self, input_ids: Ids, *, spec: TaskModelSpec, draws: Draws, first: FirstTarget) -> Targets:
        return draws.integers(0, len(spec.labels), size=len(input_ids))


def format_labels(found: Sequence[tuple[str, float]]) -> list[dict[str, object]]:
    """Convert labels with their probabilities to JSON objects."""
    return [{"label": label, "probability": chance} for label, chance in found]


def compute_binary_losses(logits: torch.Tensor, marks: torch.Tensor) -> torch.Tensor:
    """Compute each row's mean binary cross-entropy, (rows,), over its (rows, outputs) binary answers; 0 if
    unsupervised.

    Each answer is computed as a choice between two classes with logits 0 and z.  Torch's own binary cross-entropy takes
    exponentials over the whole array, where the last few values are computed by other code and rounded differently
    (measured on a CPU), so that a record's gradient would depend on its row in the batch.
    """
    choices = torch.stack([torch.zeros_like(logits), logits], dim=-1).reshape(-1, 2)
    losses = torch.nn.functional.cross_entropy(choices, marks.long().reshape(-1), reduction="none")
    return losses.reshape(logits.shape).mean(dim=1)


def find_label_index(label: str, places: Mapping[str, int], record: Record, *, role: str) -> int:
    """Return the index of a record's label among the declared labels.

    Raises:
        DataError: the label is not declared.  The message does not quote it, because with a wrong column it may be a
            record's text.
    """
    if label not in places:
        declared = ", ".join([*places][:5]) + (", ..." if len(places) > 5 else "")
        bound = f"must be one of the {len(places)} labels in data.labels: {declared}"
        raise DataError(record.at(role), "not declared", bound)
    return places[label]
