"""Tokenization of texts independently of each other; `fedtune.tasks` selects the texts and the targets."""

from __future__ import annotations

import json
import secrets
import string
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fedtune.data.records import Record
from fedtune.data.text_rows import catch_row_error
from fedtune.spec import DataError, translate_panics

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

_CHARACTERS_A_TOKEN = 64
"""Maximum number of characters per token of an example; longer texts are truncated before tokenization, because their
length would determine the memory and time of a site.  Words have about four characters per token, and the longest
tokens are lines and spaces.  Only a text that consists mostly of such long tokens, or of spaces without tokens, loses
any content.
"""
_MAX_LONGER, _ROOM = 4, 256
"""Limits on how much a normalizer may lengthen a text: a factor, and additional characters.  Unicode's own normalizers
turn a Hangul letter into three characters; with a malicious table, a single letter could exhaust the memory.
"""
_CHUNK_TEXTS, _CHUNK_CHARACTERS = 1024, 1 << 18

UNSUPERVISED = -100  # target of a token without a loss, the default ignore_index of torch's cross_entropy


Text: TypeAlias = str | tuple[str, ...]
"""A text, or two texts that the tokenizer encodes as a pair, with special tokens between them."""
Encoded: TypeAlias = tuple[list[int], Sequence[tuple[int, int]]]
"""Token ids of a text, and the character span (start, end) of each token if requested."""
Targets: TypeAlias = NDArray[np.int64] | NDArray[np.float32] | NDArray[np.int8] | tuple[NDArray[np.int64], ...]


class Tokenizer(Protocol):
    """Protocol of the members of Hugging Face's `PreTrainedTokenizerBase` that fedtune uses."""

    bos_token_id: int | None
    eos_token_id: int | None
    name_or_path: str
    chat_template: Any
    special_tokens_map: Mapping[str, Any]
    added_tokens_decoder: Mapping[int, Any]
    backend_tokenizer: Any

    def convert_ids_to_tokens(self, ids: int) -> str: ...
    def num_special_tokens_to_add(self, *, pair: bool) -> int: ...
    def __hash__(self) -> int: ...  # by identity, because objects derived from a tokenizer are cached
    def __call__(self, text: list[Text], **options: Any) -> Mapping[str, Any]: ...


@dataclass(frozen=True, slots=True, eq=False)
class TextDataset:
    """Tokenized examples, unpadded, in the order of their records."""

    # (t_i,) token ids of each text, t_i at least 1; the texts of an example are adjacent.  Feature vectors are
    # (1, w) float32 values, images are (t_i, w) float32 pixels of their patches.
    input_ids: tuple[NDArray[np.int32] | NDArray[np.float32], ...]
    # (n, ...) one target per example, such as its class; or (t_i,) one target per token for each text: the token
    # itself, not shifted, or `UNSUPERVISED`
    targets: Targets
    texts: int = 1  # texts per example
    text_lengths: NDArray[np.int32] = field(init=False)  # (n, texts) the t_i, without padding
    lengths: NDArray[np.int32] = field(init=False)  # (n,) length of each example's longest text

    def __post_init__(self) -> None:
        of_each = self.texts if isinstance(self.targets, tuple) else 1
        assert len(self.input_ids) * of_each == len(self.targets) * self.texts, "one target per example or token"
        lengths = np.array([len(ids) for ids in self.input_ids], dtype=np.int32).reshape(-1, self.texts)
        object.__setattr__(self, "text_lengths", lengths)
        object.__setattr__(self, "lengths", lengths.max(axis=1))

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def num_tokens(self) -> int:
        return int(self.text_lengths.sum())

    def find_text_indices(self, indices: Sequence[int] | NDArray[np.integer]) -> NDArray[np.int64]:
        """Return the indices of the examples' texts among all texts of the data set."""
        of_each = np.asarray(indices, dtype=np.int64)[:, None] * self.texts + np.arange(self.texts)
        return of_each.ravel()

    def select_examples(self, indices: Sequence[int] | NDArray[np.integer]) -> TextDataset:
        """Return the examples at these indices, in this order; an index may be repeated."""
        targets, texts = self.targets, self.find_text_indices(indices)
        taken = (
            tuple(targets[i] for i in texts) if isinstance(targets, tuple) else targets[np.array(indices, dtype=int)]
        )
        return TextDataset(tuple(self.input_ids[text] for text in texts), taken, self.texts)


def compute_max_characters(max_length: int) -> int:
    """Return the number of characters to which a text is truncated before it is tokenized to `max_length` tokens."""
    return _CHARACTERS_A_TOKEN * max_length


def encode(
    texts: Sequence[Text],
    tokenizer: Tokenizer,
    *,
    special_tokens: bool,
    max_length: int | None = None,
    within: int | None = None,
) -> Iterator[list[int]]:
    """Yield the token ids of each text or pair of texts.

    Texts are encoded in chunks without padding, so they do not affect each other.  With `within`, the result is empty
    for a text that cannot be encoded, or that has a token id of `within` or above.  It is also empty for a text that
    the tokenizer's normalizer would lengthen excessively, because the tokenizers library aborts the whole process when
    memory runs out.
    """

    def encode_texts(some: Sequence[Text]) -> list[Encoded]:
        token_ids = tokenizer(
            list(some),
            add_special_tokens=special_tokens,
            truncation=max_length is not None,
            max_length=max_length,
            padding=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,  # no warning about the model's maximum length: the caller truncates
        )["input_ids"]
        return [(ids, ()) for ids in token_ids]

    return (ids for ids, _ in _encode_each(texts, encode_texts, getattr(tokenizer, "backend_tokenizer", None), within))


def tokenize_whole_texts(
    fields: Sequence[tuple[Record, Sequence[str]]],
    tokenizer: Tokenizer,
    *,
    max_length: int,
    lenient_within: int | None,
) -> tuple[list[NDArray[np.int32]], list[bool]]:
    """Tokenize the texts of records with the tokenizer's special tokens, to at most `max_length` tokens.

    Texts of two roles are encoded as a pair.  With `lenient_within` (see `Task.tokenize`), a text that cannot be
    encoded becomes the single token 0; otherwise it raises a DataError.

    Returns:
        The token ids of each record, and whether each record could be encoded.
    """
    most = compute_max_characters(max_length)
    cuts = [tuple(record.fields[role][:most] for role in roles) for record, roles in fields]
    texts = [cut if len(cut) > 1 else cut[0] for cut in cuts]
    encoded = encode(texts, tokenizer, special_tokens=True, max_length=max_length, within=lenient_within)
    input_ids, has_tokens = [], []
    for (record, roles), ids in zip(fields, encoded, strict=True):
        if not ids and lenient_within is None:
            raise DataError(
                record.at(roles[0]), "no tokens", f"must contain a token of the tokenizer {tokenizer.name_or_path!r}"
            )
        # Truncate again: a tokenizer does not truncate if its special tokens alone exceed `max_length`.
        input_ids.append(np.array(ids[:max_length] or [0], dtype=np.int32))
        has_tokens.append(bool(ids))
    return input_ids, has_tokens


def encode_words(
    texts: Sequence[str], tokenizer: Tokenizer, *, max_length: int, within: int | None = None
) -> Iterator[Encoded]:
    """Yield each text's token ids without special tokens, with the character span of the word that each token starts.

    Words are the tokenizer's words; a token that does not start a word has the span (0, 0).  For the other arguments,
    see `encode`.
    """

    def encode_texts(some: Sequence[str]) -> list[Encoded]:
        batch = tokenizer(
            list(some), add_special_tokens=False, truncation=True, max_length=max_length, padding=False, verbose=False
        )
        return [
            (encoding.ids, _map_tokens_to_words(encoding, text))
            for encoding, text in zip(batch.encodings, some, strict=True)  # type: ignore[attr-defined]
        ]

    return _encode_each(texts, encode_texts, tokenizer.backend_tokenizer, within)


def _map_tokens_to_words(encoding: Any, text: str) -> list[tuple[int, int]]:
    ends = {word: end for word, (_, end) in zip(encoding.word_ids, encoding.offsets, strict=True)}
    rests = encoding.overflowing
    last = encoding.word_ids[-1] if rests else None
    for rest in rests:  # the rest of the word at the truncation point
        its = takewhile(lambda pair: pair[0] == last, zip(rest.word_ids, rest.offsets, strict=True))
        ends |= {word: end for word, (_, end) in its}
        if rest.word_ids[-1] != last:
            break
    spans, before = [], None
    for word, (start, _) in zip(encoding.word_ids, encoding.offsets, strict=True):
        piece = text[start : ends[word]]
        start += len(piece) - len(piece.lstrip())  # some tokens include the preceding space
        spans.append((start, ends[word]) if word is not None and word != before and piece.strip() else (0, 0))
        before = word
    return spans


@dataclass(frozen=True, slots=True, eq=False)
class MarkedTokenizer:
    """Copy of a tokenizer in which some tokens, the marks, have random names that are drawn anew in each process.

    A record's text can therefore never contain a mark by name.
    """

    names: Mapping[int, str]  # id of a mark -> its random name in an encoded text
    _backend: Backend

    @classmethod
    def from_tokenizer(cls, tokenizer: Tokenizer, marks: Collection[int]) -> MarkedTokenizer:
        """Copy a tokenizer, and rename the tokens in `marks` and all special tokens."""
        from tokenizers import Tokenizer as Backend

        state = json.loads(tokenizer.backend_tokenizer.to_str())
        model, added = state["model"], {token["id"]: token for token in state["added_tokens"]}
        numbers = {number for number, token in added.items() if token["special"]}.union(marks)
        names = {number: "".join(secrets.choice(string.ascii_lowercase) for _ in range(24)) for number in numbers}
        plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        texts = {tokenizer.convert_ids_to_tokens(number): name for number, name in names.items()}
        for number, name in names.items():
            added.setdefault(number, {"id": number, **plain})["content"] = name
        if isinstance(model["vocab"], dict):
            model["vocab"] = {names.get(number, piece): number for piece, number in model["vocab"].items()}
        else:
            pieces = enumerate(model["vocab"])
            model["vocab"] = [[names.get(number, piece), score] for number, (piece, score) in pieces]
        if "merges" in model:  # remove merges that produce or contain a mark
            halves = (pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"])
            model["merges"] = [pair for pair in halves if not texts.keys() & {*pair, "".join(pair)}]
        if model.get("unk_token"):
            model["unk_token"] = texts.get(model["unk_token"], model["unk_token"])
        added_tokens = [added[number] for number in sorted(added)]
        # Surrounding tokens are part of the text itself, and offsets must refer to the untrimmed text.
        state |= {"added_tokens": added_tokens, "post_processor": None, "truncation": None, "padding": None}
        return cls(names, Backend.from_str(json.dumps(state)))

    def encode(self, texts: Sequence[str], *, within: int | None = None) -> Iterator[Encoded]:
        """Yield each text's token ids and the character span of each token; `within` is as in `encode`."""

        def encode_pieces(some: Sequence[str]) -> list[Encoded]:
            encodings = self._backend.encode_batch(list(some), add_special_tokens=False)
            return [(encoding.ids, encoding.offsets) for encoding in encodings]

        return _encode_each(texts, encode_pieces, self._backend, within)


def _encode_each(
    texts: Sequence[Any], encoded: Callable[[Sequence[Any]], list[Encoded]], backend: Any, within: int | None
) -> Iterator[Encoded]:
    encoded, normalizer = translate_panics()(encoded), getattr(backend, "normalizer", None)
    for some in _chunk_texts(texts):
        if within is None:
            yield from encoded(some)
            continue
        fits = [all(_has_bounded_length(part, normalizer) for part in _to_tuple(text)) for text in some]
        bounded = [text for text, short in zip(some, fits, strict=True) if short]
        results = catch_row_error("", encoded, bounded)
        if isinstance(results, DataError):  # one of the texts failed, so encode them one at a time
            alone = (catch_row_error("", encoded, [text]) for text in bounded)
            results = [([], ()) if isinstance(result, DataError) else result[0] for result in alone]
        left = iter(results)
        for result in (next(left) if short else ([], ()) for short in fits):
            yield result if all(0 <= number < within for number in result[0]) else ([], ())


def _has_bounded_length(text: str, normalizer: Any) -> bool:
    """Whether a normalizer (None: no normalizer) can process a text and lengthens it only within the limits."""
    if normalizer is None:
        return True
    made = catch_row_error("", translate_panics()(normalizer.normalize_str), text)
    return not isinstance(made, DataError) and len(made) <= _MAX_LONGER * len(text) + _ROOM


def _to_tuple(text: Text) -> tuple[str, ...]:
    return (text,) if isinstance(text, str) else text


def _chunk_texts(texts: Sequence[Text]) -> Iterator[Sequence[Text]]:
    """Yield chunks of texts, in order, that limit the tokenizer's memory."""
    first, characters = 0, 0
    for place, text in enumerate(texts):
        length = sum(map(len, _to_tuple(text)))
        characters += length
        if place > first and (place - first == _CHUNK_TEXTS or characters > _CHUNK_CHARACTERS):
            yield texts[first:place]
            first, characters = place, length
    if first < len(texts):
        yield texts[first:]
