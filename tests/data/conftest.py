"""A tiny in-memory tokenizer of words and single characters, with [CLS] ... [SEP] around a text."""

import json
import string
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from fedtune.data import TextDataset
from fedtune.data.spec import DataSpec

WORDS = ["card", "lost", "my", "is", "where", "name", "there", "a", "place", *string.ascii_lowercase[1:]]

CLS, SEP, CARD, LOST, MY, IS, WHERE, NAME, THERE = range(2, 11)
"""The ids of its words."""


def make_data_spec(*roles: str, **overrides: Any) -> DataSpec:
    """Make data settings in which each role has a column of the same name."""
    defaults = {"dataset": "d", "train_file": "f", "columns": {role: role for role in roles}, "declared_sizes": 9}
    return DataSpec(**(defaults | {"max_length": 12} | overrides))


def build_chat(*contents: str, first: str = "user", system: str | None = None) -> list[dict[str, str]]:
    """Build turns of user and assistant."""
    roles = ("user", "assistant") if first == "user" else ("assistant", "user")
    turns = [{"role": roles[index % 2], "content": text} for index, text in enumerate(contents)]
    return turns if system is None else [{"role": "system", "content": system}, *turns]


def encode_turns(turns: Sequence[dict[str, str]]) -> str:
    """Encode turns as the field of a record."""
    return json.dumps(list(turns), separators=(",", ":"), ensure_ascii=False)


def write_jsonl(path: Path, rows: Iterable[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def encode_parquet(table: pyarrow.Table, **options: Any) -> bytes:
    parquet.write_table(table, sink := pyarrow.BufferOutputStream(), **options)
    return bytes(sink.getvalue())


def list_rows(dataset: TextDataset) -> list[tuple[list[int], list[int]]]:
    """Return the ids and targets of each text."""
    return [(ids.tolist(), row.tolist()) for ids, row in zip(dataset.input_ids, dataset.targets, strict=True)]


def make_tokenizer(*, post: str | None) -> PreTrainedTokenizerFast:
    """Make a word-level tokenizer; `post` is the template of special tokens around a text."""
    specials = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3}
    backend = Tokenizer(WordLevel(specials | {word: 4 + i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    backend.pre_tokenizer = WhitespaceSplit()
    if post is not None:
        used = [(token, id_) for token, id_ in specials.items() if token in post]
        pair = f"{post} $B [SEP]" if "[SEP]" in post else None
        backend.post_processor = TemplateProcessing(single=post, pair=pair, special_tokens=used)
    # As in many chat models, the padding token is the end-of-text token.
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="[UNK]", bos_token="[CLS]", eos_token="[SEP]", pad_token="[SEP]"
    )


_session = partial(pytest.fixture, scope="session")
encoder_tokenizer = _session(name="encoder_tokenizer")(lambda: make_tokenizer(post="[CLS] $A [SEP]"))
decoder_tokenizer = _session(name="decoder_tokenizer")(lambda: make_tokenizer(post=None))
leading_tokenizer = _session(name="leading_tokenizer")(lambda: make_tokenizer(post="[CLS] $A"))
