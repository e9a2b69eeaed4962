from collections.abc import Callable
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from tokenizers import normalizers
from tokenizers.pre_tokenizers import FixedLength

from fedtune.data import Record, TextDataset
from fedtune.data.tokenization import UNSUPERVISED
from fedtune.spec import ConfigError, DataError
from fedtune.tasks.registry import get_task

from ..data.conftest import CARD, CLS, IS, LOST, MY, SEP, WHERE, make_data_spec, make_tokenizer

PROMPTED = [Record({"prompt": "name", "completion": "there is"}), Record({"prompt": "my card", "completion": "lost"})]


def tokenize(
    task: str, records: list[Record], tokenizer: Any, *, labels: Any = (), within: int | None = None, **data: Any
) -> TextDataset:
    settings = make_data_spec(labels=tuple(labels), **data)
    return get_task(task).tokenize(records, tokenizer, data=settings, lenient_within=within)


tokenize_classification, tokenize_causal_lm = (partial(tokenize, task) for task in ("classification", "causal_lm"))


def make_labeled_records(*rows: tuple[str, str]) -> list[Record]:
    return [Record({"text": text, "label": label}, file="a.csv", line=i + 2) for i, (text, label) in enumerate(rows)]


def test_classification_records_are_tokenized_and_truncated(encoder_tokenizer: Any) -> None:
    rows = make_labeled_records(("where is my card", "b"), ("lost card", "a"))
    dataset = tokenize_classification(rows, encoder_tokenizer, labels=("a", "b"), max_length=5)
    assert [ids.tolist() for ids in dataset.input_ids] == [[CLS, WHERE, IS, MY, SEP], [CLS, LOST, CARD, SEP]]
    assert isinstance(dataset.targets, np.ndarray)
    assert dataset.targets.tolist() == [1, 0]
    assert dataset.lengths.tolist() == [5, 4]
    assert (dataset.input_ids[0].dtype, dataset.targets.dtype, dataset.lengths.dtype) == (np.int32, np.int64, np.int32)
    tokenizer = make_tokenizer(post="[CLS] [CLS] $A [SEP] [SEP]")
    for within in (None, 99):  # within the limit, whatever special tokens are added
        dataset = tokenize_classification(rows, tokenizer, labels=("a", "b"), max_length=3, within=within)
        assert dataset.lengths.max() <= 3


PAIRED = {"columns": {"text": "text", "text_pair": "other", "label": "label"}, "labels": ("a", "b")}


@pytest.mark.parametrize(
    ("length", "ids"), [(9, [CLS, WHERE, IS, MY, SEP, LOST, CARD, SEP]), (6, [CLS, WHERE, IS, SEP, LOST, SEP])]
)
def test_text_pairs_are_encoded_and_truncated_separately(encoder_tokenizer: Any, length: int, ids: list[int]) -> None:
    records = [Record({"text": "where is my", "text_pair": "lost card", "label": "b"}) for _ in range(3)]
    records[1] = Record({"text": "x" * 9, "text_pair": "\ud800", "label": "a"})  # cannot be encoded by any tokenizer
    dataset = tokenize_classification(records, encoder_tokenizer, max_length=length, within=99, **PAIRED)
    assert [item.tolist() for item in dataset.input_ids] == [ids, [0], ids]
    assert dataset.targets.tolist() == [1, UNSUPERVISED, 1]  # type: ignore[union-attr]


def test_prompt_template_joins_texts_before_encoding(encoder_tokenizer: Any) -> None:
    columns = {"text": "body", "input": "title", "label": "label"}
    joined = {"columns": columns, "prompt_template": "{input} is\n\n{text}", "max_length": 9, "labels": ("a", "b")}
    records = [Record({"text": "my card", "input": title, "label": "b"}) for title in ("lost", "")]
    dataset = tokenize_classification(records, encoder_tokenizer, within=99, **joined)
    assert [item.tolist() for item in dataset.input_ids] == [[CLS, LOST, IS, MY, CARD, SEP], [CLS, MY, CARD, SEP]]
    task, settings = get_task("classification"), make_data_spec(**joined)
    task.check_data(settings)
    assert task.list_required_roles(settings) == ("text", "label", "input")
    for template in ("{input}", "{text} {label}"):
        with pytest.raises(ConfigError, match=r"^prompt_template = "):
            task.check_data(replace(settings, prompt_template=template))
    with pytest.raises(ConfigError, match=r"^columns = .*has no column for role 'other_text'"):
        task.check_data(replace(settings, prompt_template="{text} {other_text}"))


@pytest.mark.parametrize("task", ["classification", "ordinal", "multi_label", "regression", "survival"])
def test_text_pairs_require_a_separator_token(encoder_tokenizer: Any, leading_tokenizer: Any, task: str) -> None:
    columns = {role: role for role in ("text_pair", *get_task(task).roles)}
    settings, item = make_data_spec(columns=columns), make_data_spec(*get_task(task).roles)
    assert get_task(task).list_required_roles(settings) == ("text", "text_pair", *get_task(task).roles[1:])
    get_task(task).check_tokenizer(encoder_tokenizer, data=settings)
    get_task(task).check_tokenizer(leading_tokenizer, data=item)
    with pytest.raises(ConfigError, match="its tokenizer has no separator between two texts"):
        get_task(task).check_tokenizer(leading_tokenizer, data=settings)


@pytest.mark.parametrize("within", [11, 6])
def test_out_of_vocabulary_texts_have_no_targets_in_lenient_mode(decoder_tokenizer: Any, within: int) -> None:
    rows = make_labeled_records(("where is my card", "b"), ("lost", "a"), (" ", "a"))
    dataset = tokenize_classification(rows, decoder_tokenizer, labels="ab", max_length=5, within=within)
    assert dataset.targets.tolist() == [1 if within == 11 else UNSUPERVISED, 0, UNSUPERVISED]
    assert dataset.lengths.tolist() == [4 if within == 11 else 1, 1, 1]
    prompted = [Record({"prompt": "where", "completion": "lost"})]
    causal = tokenize_causal_lm(prompted, decoder_tokenizer, prompt_template="{prompt}", max_length=5, within=within)
    assert causal.input_ids[0].tolist() == ([WHERE, LOST, SEP] if within == 11 else [SEP])
    supervised = [LOST, SEP] if within == 11 else []
    assert [target for target in causal.targets[0] if target != UNSUPERVISED] == supervised, "keep all or nothing"
    empty = [Record({"prompt": "", "completion": "lost"})]
    causal = tokenize_causal_lm(empty, decoder_tokenizer, prompt_template="{prompt}", max_length=5, within=within)
    assert causal.input_ids[0].tolist() == [LOST, SEP], "an empty prompt must be valid"
    assert causal.targets[0].tolist() == [UNSUPERVISED, SEP], "a first token must not be a target"


def test_texts_without_tokens_and_missing_end_tokens_are_errors(decoder_tokenizer: Any) -> None:
    with pytest.raises(DataError, match=r"a\.csv:2, text = 'no tokens'"):
        tokenize_classification(make_labeled_records((" ", "a")), decoder_tokenizer, labels="ab", max_length=5)
    endless: Any = SimpleNamespace(eos_token_id=None, name_or_path="endless")
    with pytest.raises(ConfigError, match=r"model\.path = 'endless': its tokenizer must have an end-of-sequence token"):
        tokenize_causal_lm(PROMPTED, endless, prompt_template="{prompt}", max_length=9)


def test_empty_data_and_braces_in_records_are_tokenized(encoder_tokenizer: Any, decoder_tokenizer: Any) -> None:
    classified = tokenize_classification([], encoder_tokenizer, labels="ab", max_length=5)
    assert len(classified) == 0
    assert classified.lengths.shape == (0,)
    assert tokenize_causal_lm([], encoder_tokenizer, prompt_template="{prompt}", max_length=5).targets == ()
    rows = [Record({"prompt": "{completion}", "completion": "lost"})]
    dataset = tokenize_causal_lm(rows, decoder_tokenizer, prompt_template="{prompt} {{", max_length=9)
    assert dataset.input_ids[0].tolist() == [1, 1, LOST, SEP], "braces must be plain text"


def test_tokenization_does_not_depend_on_chunking(encoder_tokenizer: Any) -> None:
    rows = make_labeled_records(*[(" ".join("bcdefg"[: 1 + i % 6]), "a") for i in range(1030)])
    all_rows = tokenize_classification(rows, encoder_tokenizer, labels="ab", max_length=6)
    for i in (0, 5, 1023, 1024, 1029):
        single = tokenize_classification(rows[i : i + 1], encoder_tokenizer, labels="ab", max_length=6)
        assert np.array_equal(all_rows.input_ids[i], single.input_ids[0])


class Failing:
    bos_token_id, eos_token_id, name_or_path = CLS, SEP, "failing"

    def __init__(self, sound: Any, fail: Callable[[], object] = lambda: None) -> None:
        self.sound, self.fail = sound, fail
        self.calls: list[list[str]] = []

    def __call__(self, text: list[str], **options: Any) -> Any:
        self.calls.append(text)
        if any("bad" in item for item in text):
            self.fail()
        return self.sound(text, **options)


def raise_panic() -> object:
    """Raise the library's own exception, which is not an `Exception`."""
    return FixedLength(length=0).pre_tokenize_str("a")


FAILING = make_labeled_records(("lost card", "a"), ("bad", "a"), ("my card", "b"))


@pytest.mark.parametrize("fail", [Mock(side_effect=ValueError("bad")), raise_panic])
def test_unencodable_text_does_not_affect_other_records(encoder_tokenizer: Any, fail: Any) -> None:
    tokenizer = Failing(encoder_tokenizer, fail)
    dataset = tokenize_classification(FAILING, tokenizer, labels="ab", max_length=5, within=99)
    assert [ids.tolist() for ids in dataset.input_ids] == [[CLS, LOST, CARD, SEP], [0], [CLS, MY, CARD, SEP]]
    assert isinstance(dataset.targets, np.ndarray)
    assert dataset.targets.tolist() == [0, UNSUPERVISED, 1]
    if fail is not raise_panic:
        with pytest.raises(ValueError, match="bad"):  # in a lead's own files
            tokenize_classification(FAILING, tokenizer, labels="ab", max_length=5)
    for stop in (KeyboardInterrupt, SystemExit):  # a user must be able to stop it
        stopped = Failing(encoder_tokenizer, Mock(side_effect=stop))
        with pytest.raises(stop):
            tokenize_classification(FAILING, stopped, labels="ab", max_length=5, within=99)


def test_long_text_is_truncated_before_encoding(encoder_tokenizer: Any) -> None:
    tokenizer = Failing(encoder_tokenizer)
    long = "card " * 100_000
    for within in (None, 99):
        tokenize_classification(make_labeled_records((long, "a")), tokenizer, labels="a", max_length=5, within=within)
    assert max(len(text) for call in tokenizer.calls for text in call) == 64 * 5
    rows = make_labeled_records((long, "a"), ("card " * 20, "a"))
    dataset = tokenize_classification(rows, encoder_tokenizer, labels="a", max_length=20)
    filled = [CLS, *[CARD] * 18, SEP]
    assert dataset.input_ids[0].tolist() == dataset.input_ids[1].tolist() == filled, "it must still fill its example"


def test_tokenizer_chunks_are_bounded_in_characters(encoder_tokenizer: Any) -> None:
    tokenizer = Failing(encoder_tokenizer)
    rows = make_labeled_records(*[("a " * 50_000, "a")] * 6, ("card", "a"), ("a " * 150_000, "a"), ("lost", "a"))
    dataset = tokenize_classification(rows, tokenizer, labels="a", max_length=20_000)
    assert [len(call) for call in tokenizer.calls] == [2, 2, 3, 1, 1]
    assert dataset.input_ids[6].tolist() == [CLS, CARD, SEP]
    assert dataset.input_ids[8].tolist() == [CLS, LOST, SEP]


@pytest.mark.parametrize(("to", "left_out"), [("card" * 1000, True), (" card", False)])
def test_text_expanded_by_normalization_is_skipped_alone(to: str, left_out: bool) -> None:
    """A normalizer that expands one record's letters to gigabytes would kill the process only if such a record
    exists.
    """
    rows, tokenizer = (
        make_labeled_records(("lost card", "a"), ("my ß", "a"), ("my card", "b")),
        make_tokenizer(post=None),
    )
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("ß", to)
    dataset = tokenize_classification(rows, tokenizer, labels="ab", max_length=9, within=99)
    plain = tokenize_classification(rows[::2], tokenizer, labels="ab", max_length=9)
    assert dataset.targets.tolist() == [0, UNSUPERVISED if left_out else 0, 1]
    assert [dataset.input_ids[index].tolist() for index in (0, 2)] == [ids.tolist() for ids in plain.input_ids]
    assert (dataset.lengths[1] == 1) == left_out
    tokenizer.backend_tokenizer.normalizer = normalizers.NFKD()
    rows = make_labeled_records(("한국어 텍스트 " * 300, "a"), ("\ufdfa", "b"))  # expanded by Unicode normalization
    dataset = tokenize_classification(rows, tokenizer, labels="ab", max_length=9, within=99)
    assert dataset.targets.tolist() == [0, 1]
