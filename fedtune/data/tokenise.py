"""Token ids and targets, made once, of each record alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fedtune.data.records import Record
from fedtune.spec import ConfigError, DataError, panics_as_errors

_CHARACTERS_A_TOKEN = 64
"""A text is cut to so many characters for each token of an example, before it is encoded: what is longer would decide
how much memory and time a site needs.  Words have about four characters a token, and the longest tokens are lines and
spaces.  Only a text in which such long tokens, or spaces that give no token, take most of the room loses any."""
_MOST_LONGER, _ROOM = 4, 256
"""A normaliser may make a text so many times as long, and so many characters longer.  Unicode's own make three
characters of a letter of Hangul; a table that a lead chose could fill the memory with a text of one letter."""
_CHUNK_TEXTS, _CHUNK_CHARACTERS = 1024, 1 << 18

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
    records: Sequence[Record],
    tokenizer: Tokenizer,
    *,
    labels: Sequence[str],
    max_length: int,
    lenient_within: int | None = None,
) -> TextDataset:
    """Encode the roles `text` and `label`.

    Args:
        records: n of them; none is fine.
        tokenizer: adds its own special tokens.
        labels: the declared label set; a label's class is its place there.
        max_length: most tokens of an example, special ones included.
        lenient_within: of a text that cannot be encoded, has no token, or has an id that is not below this number, make
            an example that adds nothing, so that no single record can stop the others.

    Raises:
        DataError: when a label is not declared, or a text has no token at all.
    """
    classes = {label: index for index, label in enumerate(labels)}
    targets = np.array([_class_of(record, classes) for record in records], dtype=np.int64)
    texts = [cut(record.fields["text"], max_length) for record in records]
    input_ids: list[NDArray[np.int32]] = []
    encoded = _encode(texts, tokenizer, special_tokens=True, max_length=max_length, within=lenient_within)
    for place, ids in enumerate(encoded):
        if not ids and lenient_within is None:
            raise DataError(records[place].at("text"), "no tokens", f"must have a token of {tokenizer.name_or_path!r}")
        if not ids:
            targets[place] = UNSUPERVISED
        # Cut once more: a tokenizer cuts nothing where its special tokens alone are more than `max_length`.
        input_ids.append(np.array(ids[:max_length] or [0], dtype=np.int32))
    return TextDataset(tuple(input_ids), targets)


def tokenise_causal_lm(
    records: Sequence[Record],
    tokenizer: Tokenizer,
    *,
    template: str,
    max_length: int,
    lenient_within: int | None = None,
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
        lenient_within: a prompt or a completion that cannot be encoded into ids below this number has none.

    Raises:
        ConfigError: when the tokenizer has no end-of-text token.
    """
    end, start = end_of_text(tokenizer), _start_ids(tokenizer)
    prompts = [_prompt(template, record, max_length=max_length) for record in records]
    completions = [cut(record.fields["completion"], max_length) for record in records]
    input_ids, targets = [], []
    for prompt, completion in zip(
        _encode(prompts, tokenizer, special_tokens=False, within=lenient_within),
        _encode(completions, tokenizer, special_tokens=False, within=lenient_within),
        strict=True,
    ):
        given, supervised = [*start, *prompt], [*completion, end]
        input_ids.append(np.array([*given, *supervised][:max_length], dtype=np.int32))
        targets.append(np.array([*[UNSUPERVISED] * len(given), *supervised][:max_length], dtype=np.int64))
    return TextDataset(tuple(input_ids), tuple(targets))


def cut(text: str, max_length: int) -> str:
    """The characters of a text that are encoded at all, for an example of `max_length` tokens."""
    return text[: _CHARACTERS_A_TOKEN * max_length]


def end_of_text(tokenizer: Tokenizer) -> int:
    """The id of the token that ends a completion.

    Raises:
        ConfigError: for `model.path`, when there is none.
    """
    if tokenizer.eos_token_id is None:
        raise ConfigError("model.path", tokenizer.name_or_path, "its tokenizer must have an end-of-text token")
    return tokenizer.eos_token_id


def _prompt(template: str, record: Record, *, max_length: int) -> str:
    fields = {role: cut(text, max_length) for role, text in record.fields.items()}
    return cut(template.format_map(fields), max_length)


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
    within: int | None = None,
) -> Iterator[list[int]]:
    """Token ids of each text, encoded in chunks without padding, so that none depends on another.

    With `within`, a text that cannot be encoded, or has an id of that number or above, has no ids; nor has one that the
    tokenizer's normaliser makes many times as long, which nothing could catch: its library ends the process where
    memory does.
    """
    normalizer = getattr(getattr(tokenizer, "backend_tokenizer", None), "normalizer", None)

    def encoded(some: Sequence[str]) -> list[list[int]]:
        with panics_as_errors():
            found: list[list[int]] = tokenizer(
                list(some),
                add_special_tokens=special_tokens,
                truncation=max_length is not None,
                max_length=max_length,
                padding=False,
                return_attention_mask=False,
                return_token_type_ids=False,
                verbose=False,  # no warning about the model's longest input: the caller cuts
            )["input_ids"]
        return found

    for some in _chunks(texts):
        if within is None:
            yield from encoded(some)
            continue
        fits = [_stays_short(text, normalizer) for text in some]
        bounded = [text if short else "" for text, short in zip(some, fits, strict=True)]
        try:
            ids_of_each = encoded(bounded)
        except Exception:  # of one text, whatever the tokenizer's library raises
            ids_of_each = [_ids_or_none(encoded, text) for text in bounded]
        for ids, short in zip(ids_of_each, fits, strict=True):
            yield ids if short and all(0 <= number < within for number in ids) else []


def _stays_short(text: str, normalizer: Any) -> bool:
    """Whether a tokenizer's normaliser, or None, leaves a text about as long as it is."""
    if normalizer is None:
        return True
    try:
        with panics_as_errors():
            return len(normalizer.normalize_str(text)) <= _MOST_LONGER * len(text) + _ROOM
    except Exception:
        return False


def _chunks(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    """The texts in order, so few at a time that a tokenizer's memory is bounded, and at least one."""
    first, characters = 0, 0
    for place, text in enumerate(texts):
        characters += len(text)
        if place > first and (place - first == _CHUNK_TEXTS or characters > _CHUNK_CHARACTERS):
            yield texts[first:place]
            first, characters = place, len(text)
    if first < len(texts):
        yield texts[first:]


def _ids_or_none(encoded: Callable[[Sequence[str]], list[list[int]]], text: str) -> list[int]:
    try:
        return encoded([text])[0]
    except Exception:
        return []


def _start_ids(tokenizer: Tokenizer) -> list[int]:
    """The begin-of-text token, where the tokenizer puts one before a text."""
    (ids,) = _encode([""], tokenizer, special_tokens=True)
    return [ids[0]] if ids and ids[0] == tokenizer.bos_token_id else []
