"""Token ids and targets, made once, of each record alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fedtune.data.records import Record
from fedtune.spec import ConfigError, DataError

UNSUPERVISED = -100  # target of a token without a loss; what torch's cross_entropy ignores by default


class Tokenizer(Protocol):
    """What is used of a Hugging Face tokenizer (`PreTrainedTokenizerBase`)."""

    bos_token_id: int | None
    eos_token_id: int | None
    name_or_path: str

    def __call__(self, text: list[str], **options: Any) -> Mapping[str, Any]:
        """Encode each text; `input_ids` of the answer holds a list of ids for each."""


@dataclass(frozen=True, slots=True, eq=False)
class TextDataset:
    """Tokenised examples, unpadded, in the order of their records.

    Attributes:
        input_ids: (t_i,) token ids of each example, t_i at least 1.
        targets: the class of each example, (n,), or for each example one target a token, (t_i,) each:
            the token itself where it is supervised and `UNSUPERVISED` elsewhere, not shifted.
        lengths: (n,) the t_i, padding not counted.
    """

    input_ids: tuple[NDArray[np.int32], ...]
    targets: NDArray[np.int64] | tuple[NDArray[np.int64], ...]
    lengths: NDArray[np.int32] = field(init=False)

    def __post_init__(self) -> None:
        assert len(self.input_ids) == len(self.targets), "one target (or row of targets) an example"
        object.__setattr__(self, "lengths", np.array([len(ids) for ids in self.input_ids], dtype=np.int32))

    def __len__(self) -> int:
        return len(self.input_ids)


def tokenise_classification(
    records: Sequence[Record], tokenizer: Tokenizer, *, labels: Sequence[str], max_length: int, lenient: bool = False
) -> TextDataset:
    """Encode the roles `text` and `label`.

    Args:
        records: n of them; none is fine.
        tokenizer: adds its own special tokens.
        labels: the declared label set; a label's class is its place there.
        max_length: most tokens of an example, special ones included.
        lenient: take token 0 for a text that has none, so that no single record can stop the others.

    Raises:
        DataError: when a label is not declared, or a text has no token at all.
    """
    classes = {label: index for index, label in enumerate(labels)}
    targets = np.array([_class_of(record, classes) for record in records], dtype=np.int64)
    texts = [record.fields["text"] for record in records]
    encoded = _encode(texts, tokenizer, special_tokens=True, max_length=max_length)
    input_ids = tuple(np.array(ids or [0] * lenient, dtype=np.int32) for ids in encoded)
    for record, ids in zip(records, input_ids, strict=True):
        if len(ids) == 0:
            raise DataError(record.at("text"), "no tokens", f"must have a token of {tokenizer.name_or_path!r}")
    return TextDataset(input_ids, targets)


def tokenise_causal_lm(
    records: Sequence[Record], tokenizer: Tokenizer, *, template: str, max_length: int
) -> TextDataset:
    """Encode prompt, completion and end-of-text token; the completion and that token are supervised.

    Prompt and completion are encoded apart, so that the prompt's tokens are what generation starts
    from.  The tokenizer's begin-of-text token leads where it is one that adds it.  What exceeds
    `max_length` is cut off at the end; an example may so lose all its supervised tokens.

    Args:
        records: n of them; none is fine.
        tokenizer: must have an end-of-text token.
        template: text before the completion, with roles in braces ("{prompt}").
        max_length: most tokens of an example.

    Raises:
        ConfigError: when the tokenizer has no end-of-text token.
    """
    end = tokenizer.eos_token_id
    if end is None:
        raise ConfigError("model.path", tokenizer.name_or_path, "its tokenizer must have an end-of-text token")
    start = _start_ids(tokenizer)
    prompts = [template.format_map(record.fields) for record in records]
    completions = [record.fields["completion"] for record in records]
    input_ids, targets = [], []
    for prompt, completion in zip(
        _encode(prompts, tokenizer, special_tokens=False),
        _encode(completions, tokenizer, special_tokens=False),
        strict=True,
    ):
        given, supervised = [*start, *prompt], [*completion, end]
        input_ids.append(np.array([*given, *supervised][:max_length], dtype=np.int32))
        targets.append(np.array([*[UNSUPERVISED] * len(given), *supervised][:max_length], dtype=np.int64))
    return TextDataset(tuple(input_ids), tuple(targets))


def _class_of(record: Record, classes: Mapping[str, int]) -> int:
    label = record.fields["label"]
    if label not in classes:
        declared = ", ".join(list(classes)[:5]) + (", ..." if len(classes) > 5 else "")
        raise DataError(record.at("label"), label, f"must be one of the {len(classes)} in data.labels: {declared}")
    return classes[label]


def _encode(
    texts: Sequence[str],
    tokenizer: Tokenizer,
    *,
    special_tokens: bool,
    max_length: int | None = None,
    chunk: int = 1024,
) -> Iterator[list[int]]:
    """Token ids of each text, encoded `chunk` at a time without padding, so that none depends on another."""
    for first in range(0, len(texts), chunk):
        yield from tokenizer(
            list(texts[first : first + chunk]),
            add_special_tokens=special_tokens,
            truncation=max_length is not None,
            max_length=max_length,
            padding=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,  # no warning about the model's longest input: the caller cuts
        )["input_ids"]


def _start_ids(tokenizer: Tokenizer) -> list[int]:
    """The begin-of-text token, where the tokenizer puts one before a text."""
    (ids,) = _encode([""], tokenizer, special_tokens=True)
    return [ids[0]] if ids and ids[0] == tokenizer.bos_token_id else []
