"""Token classification: entities of declared types in a text, by a linear head on each token.

Files with texts and spans, and files with tokens and tags, whose tokens are joined by spaces, give the same examples.
The words are those of the base's tokenizer, each labeled at its first token, so that inference on plain text finds the
same words.  Tags are O, and B- and I- of each type (IOB2), regardless of the file's tagging scheme.

A long text is split into windows.  The windows belong to one record, with a single loss and a single gradient to clip.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from fedtune.data.batching import Batch
from fedtune.data.records import Record, make_validator
from fedtune.data.span_formats import decode_tags
from fedtune.data.spec import DataSpec
from fedtune.data.tokenization import (
    UNSUPERVISED,
    Targets,
    TextDataset,
    Tokenizer,
    compute_max_characters,
    encode_words,
)
from fedtune.model.spec import TaskModelSpec
from fedtune.process import torch
from fedtune.spec import ConfigError, DataError
from fedtune.tasks import measures
from fedtune.tasks.base import Draws, FirstTarget, Ids, Model, Readout, Task
from fedtune.tasks.inputs import require_no_label_texts
from fedtune.tasks.measures import Detail, Entity, Floats
from fedtune.tasks.pooled import find_label_index

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_NO_WORD = (0, 0)
SWITCH_COST = 0.75  # of entering or leaving an entity, in nats
SPLIT_ODDS = 2.0  # log-odds of B to I above which a word starts another entity
MAX_OUTSIDE = 0.92  # largest prior of a text's words to be outside that prediction corrects
_MAX_WORD_TARGET = 1 << 40
"""Limit on a token's encoded target.  Further entities of the same word are not counted: with a hundred labels, a word
can have five entities in addition to its label, and with fewer labels more.
"""
_HEAD_ROWS = 4
"""The head processes a multiple of this number of windows: with fewer than 13 tokens, matrix products use another
kernel (`PooledTask`), and the shortest window of a step has 12 tokens.
"""


Marked: TypeAlias = tuple[str, list[Entity]]
"""A text and its entities, sorted by character offset."""


class TokenClassification(Task):
    """Token classification with the mean cross-entropy over the words of all windows of a record as loss.

    scores = head.scale / sqrt(h) * W x for each hidden state x, without a bias, so that a scale has about the same
    effect as in tasks whose x has L2 norm 1.
    """

    name = "token_classification"
    roles = ("tokens", "tags")
    answers = frozenset({"tags", "spans"})
    data_settings = frozenset({"windows", "stride"})
    has_labels = True
    fewest_labels = 1
    has_head = True
    hub_name = "token-classification"
    formats = ("peft", "merged", "onnx")
    reads_tokens = True
    auto_class = "AutoModelForTokenClassification"
    primary_metric = "strict_f1"
    baseline = 0.0  # predicting no entities
    studied = {10: "three fifths", 5: "three eighths", 2.4: "a fifth"}  # noqa: RUF012
    layouts = (roles, ("text", "spans"))

    def list_required_roles(self, data: DataSpec) -> tuple[str, ...]:
        return self.layouts["text" in data.columns]

    def count_texts_per_record(self, data: DataSpec) -> int:
        return data.windows

    def without_answer(self, record: Record, data: DataSpec) -> Record:
        nothing = "\n".join("O" for _ in record.fields.get("tokens", "").split("\n"))
        return replace(record, fields={**record.fields, "tags": nothing, "spans": "[]"})

    def check_model(self, spec: TaskModelSpec) -> None:
        for label in spec.labels:
            if label == "O" or re.match(r"[BI]-", label):
                raise ConfigError("data.labels", label, "must be an entity type without B- or I-, and not O")
        require_no_label_texts(spec.head, f"for {self.name}, whose head classifies tokens")

    def check_tokenizer(self, tokenizer: Tokenizer, *, data: DataSpec) -> None:
        """Require a tokenizer that reports which tokens belong to the same word.

        Raises:
            ConfigError: for `model.path`.
        """
        words = []
        if getattr(tokenizer, "backend_tokenizer", None) is not None:
            words = [word for word in next(encode_words(["a b"], tokenizer, max_length=9))[1] if word != _NO_WORD]
        if len(words) < 2:
            bound = f"its tokenizer must report word boundaries for task {self.name}"
            raise ConfigError("model.path", tokenizer.name_or_path, bound)

    def record_validator(self, data: DataSpec) -> Callable[[Record], DataError | None]:
        return make_validator(make_entity_reader(data))

    def tokenize(
        self, records: Sequence[Record], tokenizer: Tokenizer, *, data: DataSpec, lenient_within: int | None = None
    ) -> TextDataset:
        """Split each text into windows, each surrounded by the tokenizer's own special tokens.

        Every record has `data.windows` windows; an unused window is a single token without a target.  All windows of a
        text that cannot be encoded are unused.
        """
        read = [*map(make_entity_reader(data), records)]
        before, after = _find_surrounding_tokens(tokenizer)
        room, step, most = _compute_window_sizes(data, len(before) + len(after))
        texts = [text[: compute_max_characters(most)] for text, _ in read]
        input_ids: list[npt.NDArray[np.int32]] = []
        targets: list[npt.NDArray[np.int64]] = []
        encoded = encode_words(texts, tokenizer, max_length=most, within=lenient_within)
        for record, (_, entities), (ids, words) in zip(records, read, encoded, strict=True):
            if not ids and lenient_within is None:
                bound = f"must contain a token of the tokenizer {tokenizer.name_or_path!r}"
                raise DataError(record.at(self.list_required_roles(data)[0]), "no tokens", bound)
            tags = _assign_tags(words, entities, num_tags=1 + 2 * len(data.labels))
            for window in range(data.windows):
                first = window * step
                end = min(first + room, len(ids))
                shared = room - step if window else 0
                if end <= first + shared:  # empty, or covered by the previous window
                    input_ids.append(np.zeros(1, dtype=np.int32))
                    targets.append(np.full(1, UNSUPERVISED))
                    continue
                # Each half of the overlap is supervised in the window that contains more of its context.
                window_tags = tags[first:end].copy()
                window_tags[: (shared + 1) // 2] = UNSUPERVISED
                if window + 1 < data.windows and len(ids) > first + room:
                    window_tags[room - (room - step) // 2 :] = UNSUPERVISED
                input_ids.append(np.array([*before, *ids[first:end], *after], dtype=np.int32))
                targets.append(np.pad(window_tags, (len(before), len(after)), constant_values=UNSUPERVISED))
        return TextDataset(tuple(input_ids), tuple(targets), data.windows)

    def find_ignored_annotations(self, dataset: TextDataset, *, data: DataSpec) -> Sequence[bool]:
        hiding = np.array([(row > 2 * len(data.labels)).any() for row in dataset.targets], dtype=bool)
        return [bool(windows.any()) for windows in hiding.reshape(len(dataset), data.windows)]

    def num_outputs(self, spec: TaskModelSpec) -> int:
        return 1 + 2 * len(spec.labels)

    def logits(self, model: Model, batch: Batch) -> torch.Tensor:
        """Compute logits (rows, t, 1 + 2 labels): O, then B- and I- of each label."""
        assert model.head is not None
        hidden = model.base(input_ids=batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state.float()
        rows = torch.nn.functional.pad(hidden, (0, 0, 0, 0, 0, -len(hidden) % _HEAD_ROWS))
        scores: torch.Tensor = model.head(rows)[: len(hidden)]
        return scores * (model.spec.head.scale / math.sqrt(hidden.shape[-1]))

    def losses(self, model: Model, batch: Batch) -> torch.Tensor:
        return _compute_losses(self.logits(model, batch), batch)

    def outputs_per_example(self, model: Model, batch: Batch) -> dict[str, torch.Tensor]:
        """Compute the losses, and `entities`, the counts of `measures.count_entities`: (examples, labels + 1, 5)."""
        logits = model.logits(batch)
        count = partial(measures.count_entities, num_labels=len(model.spec.labels))
        counts = [count(*both) for both in _decode_batch(logits, batch)]
        return {"loss": _compute_losses(logits, batch), "entities": torch.from_numpy(np.stack(counts))}

    def scores(self, figures: Mapping[str, Floats], *, spec: TaskModelSpec) -> dict[str, float]:
        """Compute `strict_f1` (correct type and boundaries), `overlap_f1` (a shared word is enough) and `loss`."""
        every = self.compute_final_scores(figures, spec=spec)
        return {name: every[name] for name in ("strict_f1", "overlap_f1", "loss")}

    def compute_final_scores(self, figures: Mapping[str, Floats], *, spec: TaskModelSpec) -> dict[str, float]:
        """Compute strict and overlap F1, precision and recall, both F1 scores without types (`untyped_`), and the loss.

        All scores except the loss are in [0, 1].
        """
        counts = figures["entities"].sum(axis=0)
        typed, untyped = counts[:-1].sum(axis=0), counts[-1]
        scores: dict[str, float] = {}
        for kind, places in (("strict", (2, 2)), ("overlap", (3, 4))):
            recall, precision, f1 = measures.compute_recall_precision_f1(typed, *places)
            scores |= {f"{kind}_f1": f1, f"{kind}_precision": precision, f"{kind}_recall": recall}
        scores["untyped_strict_f1"] = measures.compute_recall_precision_f1(untyped, 2, 2)[2]
        scores["untyped_overlap_f1"] = measures.compute_recall_precision_f1(untyped, 3, 4)[2]
        return scores | {"loss": float(np.mean(figures["loss"]))}

    def detail(self, figures: Mapping[str, Floats], *, spec: TaskModelSpec) -> Detail:
        """Compute strict precision, recall and F1 of each entity type."""
        classes = []
        for label, counts in zip(spec.labels, figures["entities"].sum(axis=0), strict=False):
            recall, precision, f1 = measures.compute_recall_precision_f1(counts, 2, 2)
            entry = measures.ClassScores(label=label, precision=precision, recall=recall, f1=f1, support=int(counts[0]))
            classes.append(entry)
        return Detail(classes=tuple(classes), reliability=())

    def score_unit(self, model: Model, batch: Batch) -> float:
        """Return the strict F1 of the record; 1 if it has no entity and none is predicted."""
        ((truth, predicted),) = _decode_batch(model.logits(batch), batch)
        counts = measures.count_entities(truth, predicted, num_labels=len(model.spec.labels))[:-1].sum(axis=0)
        return measures.compute_recall_precision_f1(counts, 2, 2)[2] if truth or predicted else 1.0

    def answer_record(
        self, record: Record, logits: torch.Tensor, tokenizer: Tokenizer, *, data: DataSpec, spec: TaskModelSpec
    ) -> tuple[str, object]:
        """Return the text with [label: ...] around each entity, and the entities with their character offsets as
        JSON.
        """
        (text, _), rows = make_entity_reader(data)(record), self.tokenize([record], tokenizer, data=data).targets
        assert isinstance(rows, tuple), "each token has a target"
        pairs = zip(logits.double().numpy(), rows, strict=True)
        of_words = np.concatenate([scores[: len(row)][row != UNSUPERVISED] for scores, row in pairs])
        *_, most = _compute_window_sizes(data, sum(map(len, _find_surrounding_tokens(tokenizer))))
        _, words = next(encode_words([text[: compute_max_characters(most)]], tokenizer, max_length=most))
        words = [word for word in words if word != _NO_WORD]
        entities: list[dict[str, Any]] = []
        marked = text
        for first, end, label in predict_entities(of_words):
            start, stop = words[first][0], words[end - 1][1]
            entities.append({"start": start, "end": stop, "label": spec.labels[label], "text": text[start:stop]})
        for entity in reversed(entities):
            marked = f"{marked[: entity['start']]}[{entity['label']}: {entity['text']}]{marked[entity['end'] :]}"
        return marked, entities

    def name_outputs(self, labels: Sequence[str]) -> Sequence[str]:
        return "O", *(f"{mark}-{label}" for label in labels for mark in "BI")

    def list_readout_layers(self, model: Model) -> Readout:
        weight = model.get_parameter("head.weight").detach()
        return ((weight * (model.spec.head.scale / math.sqrt(weight.shape[1])), None),)

    def export_model(self, base: PreTrainedModel, readout: Readout) -> PreTrainedModel:
        from transformers import AutoModelForTokenClassification

        ((weight, _),) = readout
        model = AutoModelForTokenClassification.from_config(base.config, dtype=torch.float32)
        inner = getattr(model, model.base_model_prefix)
        unfilled = inner.load_state_dict(
            base.state_dict(), strict=False
        ).missing_keys  # the base may have an unused pooler
        (head,) = (module for name, module in model.named_children() if isinstance(module, torch.nn.Linear))
        assert not unfilled, "each weight of the model comes from the base"
        with torch.no_grad():
            head.weight.copy_(weight)
            if head.bias is not None:
                head.bias.zero_()
        return model.eval()

    def dummy_field(self, role: str, data: DataSpec, *, draw: Callable[[int], int]) -> str | None:
        label = data.labels[draw(len(data.labels))] if role in self.answers else ""
        return {"tags": f"B-{label}", "spans": json.dumps([[0, 1, label]])}.get(role)

    def dummy_targets(self, input_ids: Ids, *, spec: TaskModelSpec, draws: Draws, first: FirstTarget) -> Targets:
        tags = (draws.integers(0, self.num_outputs(spec), size=len(ids)) for ids in input_ids)
        return tuple(np.where(np.arange(len(row)) < first(len(row)), UNSUPERVISED, row) for row in tags)


def _compute_losses(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Compute each example's mean loss over its words, (examples,), from logits (rows, t, tags); 0 without words."""
    tags = torch.where(batch.targets < 0, batch.targets, batch.targets % logits.shape[-1])
    losses = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), tags.flatten(), ignore_index=UNSUPERVISED, reduction="none"
    )
    of_examples = losses.view(-1, batch.texts * logits.shape[1])
    words = (batch.targets != UNSUPERVISED).view(of_examples.shape).sum(dim=1)
    return of_examples.sum(dim=1) / words.clamp(min=1)


def _decode_batch(logits: torch.Tensor, batch: Batch) -> Iterator[tuple[list[Entity], list[Entity]]]:
    """Yield the true and the predicted entities of each example, by word index, including entities that training
    ignores.
    """
    num_tags, num_places = logits.shape[-1], batch.texts * logits.shape[1]
    targets = batch.targets.view(-1, num_places).cpu().numpy()
    predicted = logits.detach().reshape(-1, num_places, num_tags).double().cpu().numpy()
    for truth, scores in zip(targets, predicted, strict=True):
        words = truth != UNSUPERVISED
        entities = decode_entities((truth[words] % num_tags).tolist())
        for place, more in enumerate((truth[words] // num_tags).tolist()):
            while more:  # the labels that `_assign_tags` wrote above the class
                more, label = divmod(more, (num_tags + 1) // 2)
                entities.append((place, place + 1, label - 1))
        yield entities, predict_entities(scores[words])


def predict_entities(logits: Floats) -> list[Entity]:
    """Predict the entities of a text from its words' logits, (words, 1 + 2 labels), as (first, end, label).

    Boundaries are decided before labels, by three rules whose constants were chosen on the development file of NCBI
    disease (simulations/entities):

    - Words are inside or outside of an entity, by the likeliest sequence (Viterbi) of the two states, where B and I of
      all labels are summed.  A change of state costs `SWITCH_COST`, since a word mostly has its neighbor's state.
    - Most words are outside, and each word's logits reflect this prior, which the neighbors' states reflect as well.
      To correct it, a word's log-odds of being inside gain half of the log-odds of the text's mean probability of being
      outside, clipped to 0.5 to `MAX_OUTSIDE`.
    - A word inside starts another entity if its log-odds of B to I exceed `SPLIT_ODDS`.

    An entity's label has the largest mean probability over its words.  With the likeliest tag of each word instead,
    words of one entity whose labels differ would become several entities.

    >>> predict_entities(np.log([[0.2, 0.5, 0.1, 0.1, 0.1], [0.3, 0.1, 0.3, 0.1, 0.2], [0.84, 0.1, 0.02, 0.02, 0.02]]))
    [(0, 2, 0)]
    """
    with np.errstate(invalid="ignore"):  # a diverged model's logits may be NaN
        summed = (np.logaddexp.reduce(logits[:, first::step], axis=1) for first, step in ((1, 2), (2, 2), (0, 1)))
        begin, inside, every = summed
        probabilities = np.exp(logits - every[:, None])
        outside = np.clip(probabilities[:, 0].sum() / max(len(logits), 1), 0.5, MAX_OUTSIDE)
        gains = np.logaddexp(begin, inside) - logits[:, 0] + np.log(outside / (1 - outside)) / 2
        splits = begin - inside > SPLIT_ODDS
    best, ways = (0.0, -math.inf), list[tuple[bool, bool]]()
    for gained in gains.tolist():
        ways.append((best[1] - SWITCH_COST > best[0], best[1] > best[0] - SWITCH_COST))
        best = max(best[0], best[1] - SWITCH_COST), max(best[0] - SWITCH_COST, best[1]) + gained
    is_inside, spans = best[1] > best[0], list[list[int]]()
    for place in reversed(range(len(ways))):
        if is_inside and spans and spans[-1][0] == place + 1 and not splits[place + 1]:
            spans[-1][0] = place
        elif is_inside:
            spans.append([place, place + 1])
        is_inside = ways[place][is_inside]
    of_labels = probabilities[:, 1::2] + probabilities[:, 2::2]
    return [(first, end, int(of_labels[first:end].sum(axis=0).argmax())) for first, end in reversed(spans)]


def decode_entities(tags: Sequence[int]) -> list[Entity]:
    """Decode tag classes, one per word, into entities (first, end, label); I- after another type starts an entity.

    >>> decode_entities([0, 1, 2, 1, 4, 2])
    [(1, 3, 0), (3, 4, 0), (4, 5, 1), (5, 6, 0)]
    """
    entities: list[Entity] = []
    for place, tag in enumerate(tags):
        label = (tag - 1) // 2
        if tag > 0 and tag % 2 == 0 and entities and entities[-1][1:] == (place, label):
            entities[-1] = (entities[-1][0], place + 1, label)
        elif tag > 0:
            entities.append((place, place + 1, label))
    return entities


def _assign_tags(
    words: Sequence[tuple[int, int]], entities: Sequence[Entity], *, num_tags: int
) -> npt.NDArray[np.int64]:
    """Return the class of each token's word, determined by the first entity that overlaps the word.

    An entity that is not the first at any of its words is ignored in training, but must count as a true entity in the
    scores.  It is encoded in a word's target, as a digit above the class: in base 1 + labels, the digit is 1 + label.
    """
    tags = np.full(len(words), UNSUPERVISED, dtype=np.int64)
    learned, others = set[int](), dict[int, int]()
    place = 0
    for token, (first, end) in enumerate(words):
        if end <= first:
            continue
        while place < len(entities) and entities[place][1] <= first:
            place += 1
        tags[token] = 0
        if place < len(entities) and entities[place][0] < end:
            tags[token] = 1 + 2 * entities[place][2] + (place in learned)
            learned.add(place)
        for other in range(place + 1, len(entities)):
            if entities[other][0] >= end:
                break
            others.setdefault(other, token)
    for other, token in others.items():
        if other not in learned and tags[token] < _MAX_WORD_TARGET:
            more, tag = divmod(tags[token], num_tags)
            tags[token] = tag + num_tags * (more * ((num_tags + 1) // 2) + 1 + entities[other][2])
    return tags


def make_entity_reader(data: DataSpec) -> Callable[[Record], Marked]:
    """Return a function that reads a record's text and entities.

    The function raises a DataError if the numbers of tags and tokens differ, a span is outside the text or overlaps
    another span, or a label is not declared.
    """
    places = {label: place for place, label in enumerate(data.labels)}

    def read_tokens(record: Record) -> Marked:
        tokens, tags = (record.fields[role].split("\n") for role in ("tokens", "tags"))
        if len(tags) != len(tokens):
            raise DataError(record.at("tags"), "a different number of tags", "must have one tag per token")
        if "" in tags:
            raise DataError(record.at("tags"), "a blank tag", "must be O, or a type name after B- or I-")
        entities, _ = decode_tags(tags, places)
        starts = [0, *accumulate(len(token) + 1 for token in tokens)]
        spans = (
            (starts[a], starts[b] - 1, find_label_index(name, places, record, role="tags")) for a, b, name in entities
        )
        return " ".join(tokens), list(spans)

    def read_spans(record: Record) -> Marked:
        text, at = record.fields["text"], record.at("spans")
        spans = json.loads(record.fields["spans"])
        if any(len(span) > 3 for span in spans):
            # Number of characters that end within the first 0, 1, ... UTF-16 units; a high surrogate ends no character.
            units = np.frombuffer(b"\0\xd8" + text.encode("utf-16-le"), dtype="<u2")
            characters = np.cumsum((units < 0xD800) | (units > 0xDBFF), dtype=np.int32)
        entities = []
        for first, end, name, *in_units in spans:
            inside = characters if in_units else range(len(text) + 1)
            start, stop = (int(inside[first]), int(inside[end])) if 0 <= first <= end < len(inside) else (0, 0)
            if start == stop:
                bound = "must have 0 <= start < end <= the length of its text"
                raise DataError(at, "a span outside the text", bound)
            entities.append((start, stop, find_label_index(name, places, record, role="spans")))
        entities.sort()
        if any(earlier[1] > later[0] for earlier, later in pairwise(entities)):
            raise DataError(at, "spans that overlap", "must not overlap: a word has one label")
        return text, entities

    return read_spans if "text" in data.columns else read_tokens


def _compute_window_sizes(data: DataSpec, specials: int) -> tuple[int, int, int]:
    """Return the tokens per window, the offset between windows, and the tokens of a record that fit into all
    windows.
    """
    room = max(1, data.max_length - specials)
    step = room - min(data.stride, room // 2)
    return room, step, room + (data.windows - 1) * step


def _find_surrounding_tokens(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Return the special tokens that the tokenizer puts before and after a text."""
    inner, whole = (tokenizer(["a"], add_special_tokens=special)["input_ids"][0] for special in (False, True))
    first = next((place for place in range(len(whole)) if whole[place : place + len(inner)] == inner), len(whole))
    return whole[:first], whole[first + len(inner) :]
