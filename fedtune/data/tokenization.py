"""Tokenization of texts, each independently of the others; `fedtune.tasks` chooses the texts and the targets."""

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
"""A text is cut to this many characters for each token of an example, before it is encoded: what is longer would decide
how much memory and time a site needs.  Words have about four characters a token, and the longest tokens are lines and
spaces.  Only a text in which such long tokens, or spaces that give no token, take most of the room loses any."""
_MOST_LONGER, _ROOM = 4, 256
"""A normalizer may make a text this many times as long, and this many characters longer.  Unicode's own make three
characters of a letter of Hangul; a table that a lead chose could fill the memory with a text of one letter."""
_CHUNK_TEXTS, _CHUNK_CHARACTERS = 1024, 1 << 18

UNSUPERVISED = -100  # target of a token without a loss; what torch's cross_entropy ignores by default


Text: TypeAlias = str | tuple[str, ...]
"""A text, or two that the tokenizer encodes as a pair, with its marks between them."""
Encoded: TypeAlias = tuple[list[int], Sequence[tuple[int, int]]]
"""Of a text its token ids, and the characters (first, end) of each, where they were asked for."""
Targets: TypeAlias = NDArray[np.int64] | NDArray[np.float32] | NDArray[np.int8] | tuple[NDArray[np.int64], ...]


class Tokenizer(Protocol):
    """The part of Hugging Face's tokenizer interface (`PreTrainedTokenizerBase`) that fedtune uses."""

    bos_token_id: int | None
    eos_token_id: int | None
    name_or_path: str
    chat_template: Any
    special_tokens_map: Mapping[str, Any]
    added_tokens_decoder: Mapping[int, Any]
    backend_tokenizer: Any

    def convert_ids_to_tokens(self, ids: int) -> str: ...
    def num_special_tokens_to_add(self, *, pair: bool) -> int: ...
    def __hash__(self) -> int: ...  # of the tokenizer itself: what was made of it once is kept
    def __call__(self, text: list[Text], **options: Any) -> Mapping[str, Any]: ...


@dataclass(frozen=True, slots=True, eq=False)
class TextDataset:
    """Tokenized examples, unpadded, in the order of their records."""

    # (t_i,) token ids of each text, t_i at least 1; those of one example stand one after the other.  Of a
    # vector (1, w) its values in float32, of an image (t_i, w) the pixels of its patches.
    input_ids: tuple[NDArray[np.int32] | NDArray[np.float32], ...]
    # one of each example, (n, ...), such as its class; or for each text one target a token, (t_i,) each: the
    # token itself where it is supervised and `UNSUPERVISED` elsewhere, not shifted.
    targets: Targets
    texts: int = 1  # of each example
    text_lengths: NDArray[np.int32] = field(init=False)  # (n, texts) the t_i, padding not counted
    lengths: NDArray[np.int32] = field(init=False)  # (n,) of each example's longest text

    def __post_init__(self) -> None:
        of_each = self.texts if isinstance(self.targets, tuple) else 1
        assert len(self.input_ids) * of_each == len(self.targets) * self.texts, "one target an example, or a token"
        lengths = np.array([len(ids) for ids in self.input_ids], dtype=np.int32).reshape(-1, self.texts)
        object.__setattr__(self, "text_lengths", lengths)
        object.__setattr__(self, "lengths", lengths.max(axis=1))

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def num_tokens(self) -> int:
        return int(self.text_lengths.sum())

    def find_text_indices(self, places: Sequence[int] | NDArray[np.integer]) -> NDArray[np.int64]:
        """Return the indices of these examples' texts among the texts of the data set."""
        of_each = np.asarray(places, dtype=np.int64)[:, None] * self.texts + np.arange(self.texts)
        return of_each.ravel()

    def select_examples(self, places: Sequence[int] | NDArray[np.integer]) -> TextDataset:
        """Return the examples at these indices, in this order; an index may be repeated."""
        targets, texts = self.targets, self.find_text_indices(places)
        taken = tuple(targets[i] for i in texts) if isinstance(targets, tuple) else targets[np.array(places, dtype=int)]
        return TextDataset(tuple(self.input_ids[text] for text in texts), taken, self.texts)


def compute_max_characters(max_length: int) -> int:
    """Return the maximum number of characters of a text that are encoded for an example of `max_length` tokens."""
    return _CHARACTERS_A_TOKEN * max_length


def encode(
    texts: Sequence[Text],
    tokenizer: Tokenizer,
    *,
    special_tokens: bool,
    max_length: int | None = None,
    within: int | None = None,
) -> Iterator[list[int]]:
    """Yield the token ids of each text or pair of texts, encoded in chunks without padding, so that no text affects
    another.

    With `within`, the ids are empty for a text that cannot be encoded or has an id of `within` or above.  They are also
    empty for a text that the tokenizer's normalizer would lengthen many times, because the tokenizers library aborts
    the whole process when memory runs out.
    """

    def encode_texts(some: Sequence[Text]) -> list[Encoded]:
        found = tokenizer(
            list(some),
            add_special_tokens=special_tokens,
            truncation=max_length is not None,
            max_length=max_length,
            padding=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,  # no warning about the model's longest input: the caller cuts
        )["input_ids"]
        return [(ids, ()) for ids in found]

    return (ids for ids, _ in _encode_each(texts, encode_texts, getattr(tokenizer, "backend_tokenizer", None), within))


def tokenize_whole_texts(
    fields: Sequence[tuple[Record, Sequence[str]]],
    tokenizer: Tokenizer,
    *,
    max_length: int,
    lenient_within: int | None,
) -> tuple[list[NDArray[np.int32]], list[bool]]:
    """Token ids of the texts of some records' roles with the tokenizer's own special tokens, `max_length` at most.

    Texts of two roles are encoded as a pair.  And whether each could be encoded: with `lenient_within`, as
    `Task.tokenize` has it, what cannot is one token, 0; otherwise it is a DataError.
    """
    most = compute_max_characters(max_length)
    cuts = [tuple(record.fields[role][:most] for role in roles) for record, roles in fields]
    texts = [one if len(one) > 1 else one[0] for one in cuts]
    encoded = encode(texts, tokenizer, special_tokens=True, max_length=max_length, within=lenient_within)
    input_ids, found = [], []
    for (record, roles), ids in zip(fields, encoded, strict=True):
        if not ids and lenient_within is None:
            raise DataError(
                record.at(roles[0]), "no tokens", f"must contain a token of the tokenizer {tokenizer.name_or_path!r}"
            )
        # Cut once more: a tokenizer cuts nothing where its special tokens alone are more than `max_length`.
        input_ids.append(np.array(ids[:max_length] or [0], dtype=np.int32))
        found.append(bool(ids))
    return input_ids, found


def encode_words(
    texts: Sequence[str], tokenizer: Tokenizer, *, max_length: int, within: int | None = None
) -> Iterator[Encoded]:
    """Yield each text's token ids, without special tokens, and for each token the character span of the word that it
    starts.

    Words are those of the tokenizer; a token that starts no word has (0, 0).  The other arguments are those of
    `encode`.
    """

    def encode_texts(some: Sequence[str]) -> list[Encoded]:
        found = tokenizer(
            list(some), add_special_tokens=False, truncation=True, max_length=max_length, padding=False, verbose=False
        )
        return [
            (one.ids, _map_tokens_to_words(one, text))
            for one, text in zip(found.encodings, some, strict=True)  # type: ignore[attr-defined]
        ]

    return _encode_each(texts, encode_texts, tokenizer.backend_tokenizer, within)


def _map_tokens_to_words(encoding: Any, text: str) -> list[tuple[int, int]]:
    ends = {word: end for word, (_, end) in zip(encoding.word_ids, encoding.offsets, strict=True)}
    rests = encoding.overflowing
    last = encoding.word_ids[-1] if rests else None
    for rest in rests:  # of the word at which reading stops
        its = takewhile(lambda one: one[0] == last, zip(rest.word_ids, rest.offsets, strict=True))
        ends |= {word: end for word, (_, end) in its}
        if rest.word_ids[-1] != last:
            break
    found, before = [], None
    for word, (start, _) in zip(encoding.word_ids, encoding.offsets, strict=True):
        piece = text[start : ends[word]]
        start += len(piece) - len(piece.lstrip())  # some tokens have the space before them
        found.append((start, ends[word]) if word is not None and word != before and piece.strip() else (0, 0))
        before = word
    return found


@dataclass(frozen=True, slots=True, eq=False)
class MarkedTokenizer:
    """A copy of a tokenizer in which some tokens, its marks, have random names that change with each process.

    A text can then never contain a mark, whatever the mark is called in the tokenizer's own file.
    """

    names: Mapping[int, str]  # what stands for each mark in a text that is encoded, by its id
    _backend: Backend

    @classmethod
    def from_tokenizer(cls, tokenizer: Tokenizer, marks: Collection[int]) -> MarkedTokenizer:
        """Copy a tokenizer with these tokens, and all special tokens, as marks."""
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
        if "merges" in model:  # of letters into a mark, or of a mark into more
            halves = (pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"])
            model["merges"] = [pair for pair in halves if not texts.keys() & {*pair, "".join(pair)}]
        if model.get("unk_token"):
            model["unk_token"] = texts.get(model["unk_token"], model["unk_token"])
        added_tokens = [added[number] for number in sorted(added)]
        # What is put around a text is written into it, and places are those before any trimming.
        state |= {"added_tokens": added_tokens, "post_processor": None, "truncation": None, "padding": None}
        return cls(names, Backend.from_str(json.dumps(state)))

    def encode(self, texts: Sequence[str], *, within: int | None = None) -> Iterator[Encoded]:
        """Yield each text's token ids and the character span of each token; `within` is that of `encode`."""

        def encode_pieces(some: Sequence[str]) -> list[Encoded]:
            found = self._backend.encode_batch(list(some), add_special_tokens=False)
            return [(one.ids, one.offsets) for one in found]

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
        found = catch_row_error("", encoded, bounded)
        if isinstance(found, DataError):  # about one text, whatever the tokenizer's library raised
            alone = (catch_row_error("", encoded, [text]) for text in bounded)
            found = [([], ()) if isinstance(one, DataError) else one[0] for one in alone]
        left = iter(found)
        for one in (next(left) if short else ([], ()) for short in fits):
            yield one if all(0 <= number < within for number in one[0]) else ([], ())


def _has_bounded_length(text: str, normalizer: Any) -> bool:
    """Whether a tokenizer's normalizer lengthens a text only within fixed limits; None means that there is no
    normalizer.
    """
    if normalizer is None:
        return True
    made = catch_row_error("", translate_panics()(normalizer.normalize_str), text)
    return not isinstance(made, DataError) and len(made) <= _MOST_LONGER * len(text) + _ROOM


def _to_tuple(text: Text) -> tuple[str, ...]:
    return (text,) if isinstance(text, str) else text


def _chunk_texts(texts: Sequence[Text]) -> Iterator[Sequence[Text]]:
    """Yield the texts in order, in chunks, to bound the tokenizer's memory."""
    first, characters = 0, 0
    for place, text in enumerate(texts):
        length = sum(map(len, _to_tuple(text)))
        characters += length
        if place > first and (place - first == _CHUNK_TEXTS or characters > _CHUNK_CHARACTERS):
            yield texts[first:place]
            first, characters = place, length
    if first < len(texts):
        yield texts[first:]
