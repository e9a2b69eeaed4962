"""Layouts of language-model records: supervision, truncation, and hostile records."""

import json
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest

from fedtune.data import Record, tokenization
from fedtune.data.spec import DataSpec
from fedtune.data.tokenization import UNSUPERVISED
from fedtune.model.base_model import build_tiny_tokenizer
from fedtune.spec import ConfigError, DataError
from fedtune.tasks.registry import get_task

from ..data.conftest import (
    CARD,
    CLS,
    IS,
    LOST,
    MY,
    SEP,
    THERE,
    WHERE,
    encode_turns,
    list_rows,
    make_data_spec,
    make_tokenizer,
)
from ..data.conftest import build_chat as turns_of

LM = get_task("causal_lm")
HIDDEN = UNSUPERVISED


def make_settings(*roles: str, max_length: int = 9, **overrides: Any) -> DataSpec:
    return make_data_spec(*(roles or LM.roles), max_length=max_length, **overrides)


def make_prompt_record(prompt: str, completion: str, **fields: str) -> Record:
    return Record({"prompt": prompt, "completion": completion, **fields}, file="a.jsonl", line=3)


def make_chat(*contents: str) -> dict[str, str]:
    return {"messages": encode_turns(turns_of(*contents))}


def tokenize_one(fields: dict[str, str], tokenizer: Any, data: DataSpec) -> tuple[list[int], list[int]]:
    (row,) = list_rows(LM.tokenize([Record(fields)], tokenizer, data=data))
    return row


def test_plain_text_is_learned_completely_with_its_end_token(decoder_tokenizer: Any, leading_tokenizer: Any) -> None:
    data, fields = make_settings("text"), {"text": "where is my card"}
    assert tokenize_one(fields, leading_tokenizer, data) == (
        [CLS, WHERE, IS, MY, CARD, SEP],
        [HIDDEN, WHERE, IS, MY, CARD, SEP],
    )
    ids, targets = tokenize_one(fields, decoder_tokenizer, data)
    assert (ids, targets) == ([WHERE, IS, MY, CARD, SEP], [HIDDEN, IS, MY, CARD, SEP]), "the first token is no target"
    cut = tokenize_one(fields, leading_tokenizer, make_settings("text", max_length=4))
    assert cut == ([CLS, WHERE, IS, MY], [HIDDEN, WHERE, IS, MY]), "a truncated text must not have an end token"


@pytest.mark.parametrize(
    ("max_length", "expected"),
    [
        *((7, [CLS, WHERE, IS, MY, CARD, LOST, SEP]), (6, [CLS, WHERE, MY, CARD, LOST, SEP])),
        *((4, [CLS, CARD, LOST, SEP]), (3, [CLS, LOST, SEP])),
    ],
)
def test_long_prompt_is_truncated_in_the_middle(
    leading_tokenizer: Any, decoder_tokenizer: Any, max_length: int, expected: list[int]
) -> None:
    record = {"prompt": "where is my card", "completion": "lost"}
    ids, targets = tokenize_one(record, leading_tokenizer, make_settings(max_length=max_length))
    assert ids == expected
    assert targets == [HIDDEN] * (len(expected) - 2) + [LOST, SEP]
    # A prompt keeps one token if no special token precedes it.
    record = {"prompt": "where is my card", "completion": "lost there"}
    assert tokenize_one(record, decoder_tokenizer, make_settings(max_length=4))[0] == [CARD, LOST, THERE, SEP]
    row = tokenize_one(record, decoder_tokenizer, make_settings(max_length=3))
    assert row == ([CARD, LOST, THERE], [HIDDEN, LOST, THERE]), "a truncated answer must not have an end token"


def test_long_chat_is_truncated_before_its_last_answer(leading_tokenizer: Any) -> None:
    data = make_settings("messages", chat_template="plain", max_length=100)
    fields = make_chat("where", "lost", "is", "there", "and this is never answered")
    ids_all, targets = tokenize_one(fields, leading_tokenizer, data)
    # This tokenizer does not know the words "User:" and "Assistant:".
    unknown = 1
    assert ids_all == [CLS, unknown, WHERE, unknown, LOST, SEP, unknown, IS, unknown, THERE, SEP]
    assert [target for target in targets if target != HIDDEN] == [LOST, SEP, THERE, SEP]
    for length in range(3, len(ids_all)):
        cut, targets_kept = tokenize_one(
            fields, leading_tokenizer, make_settings("messages", chat_template="plain", max_length=length)
        )
        assert cut == [CLS, *ids_all[len(ids_all) - length + 1 :]]
        assert targets_kept == [HIDDEN, *targets[len(ids_all) - length + 1 :]], "its rest must stay a target"


@pytest.mark.parametrize("contents", [(), ("where",)])
def test_chat_without_an_answer_is_unusable(leading_tokenizer: Any, contents: tuple[str, ...]) -> None:
    data = make_settings("messages", chat_template="plain")
    silent = Record(make_chat(*contents), file="a.jsonl", line=3)
    assert LM.record_validator(data)(silent) is not None
    assert LM.record_validator(data)(Record(make_chat("where", "lost"))) is None
    with pytest.raises(DataError, match=r"a\.jsonl:3, messages = 'no assistant turn to learn from'"):
        LM.tokenize([silent], leading_tokenizer, data=data)


def test_masked_assistant_turns_are_context_but_not_targets(leading_tokenizer: Any) -> None:
    """The marks are `weight: 0` and `train: false`, as in other programs; turns after the last answer are dropped."""
    data = make_settings("messages", chat_template="plain")
    turns = turns_of("where", "lost", "is", "there")

    def mark_turns(*excluded: int) -> list[int]:
        marked = [turn | ({"train": False} if index in excluded else {}) for index, turn in enumerate(turns)]
        return tokenize_one({"messages": json.dumps(marked)}, leading_tokenizer, data)[1]

    ids, ids_all = tokenize_one({"messages": json.dumps(turns)}, leading_tokenizer, data)
    later = tokenize_one(make_chat("where", "lost"), leading_tokenizer, data)
    assert [number for number in mark_turns(1) if number != HIDDEN] == [
        number for number in ids_all if number != HIDDEN
    ][-2:]
    assert len(mark_turns(1)) == len(ids)
    assert mark_turns(3) == later[1], "text after the last supervised answer must be dropped"
    assert (
        LM.record_validator(data)(Record({"messages": json.dumps([turn | {"train": False} for turn in turns])}))
        is not None
    )


def test_system_column_becomes_the_first_turn(leading_tokenizer: Any) -> None:
    data = make_settings("messages", "system", chat_template="plain")
    assert LM.list_required_roles(data) == ("messages", "system")
    turns = turns_of("where", "lost")
    with_system = [{"role": "system", "content": "is"}, *turns]
    expected = tokenize_one({"messages": json.dumps(with_system)}, leading_tokenizer, data)
    assert tokenize_one({"messages": json.dumps(turns), "system": "is"}, leading_tokenizer, data) == expected
    assert tokenize_one({"messages": json.dumps(with_system), "system": "my"}, leading_tokenizer, data) == expected, (
        "a record's own system turn must take precedence"
    )
    without_system = tokenize_one({"messages": json.dumps(turns)}, leading_tokenizer, data)
    assert tokenize_one({"messages": json.dumps(turns), "system": " "}, leading_tokenizer, data) == without_system


@pytest.mark.parametrize("fields", [{"prompt": "P", "completion": "A"}, make_chat("P", "A"), {"text": "A"}])
def test_record_text_is_bounded_before_encoding(fields: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    options, tokenizer = {"chat_template": "plain"} if "messages" in fields else {}, make_tokenizer(post=None)
    short = {role: text.replace("P", "my name").replace("A", "lost") for role, text in fields.items()}
    row = [tokenize_one(short, tokenizer, make_settings(*fields, max_length=limit, **options)) for limit in (20, 500)]
    assert row[0] == row[1], "an example that fits must not depend on the maximum"
    encoded = Mock(wraps=tokenization._encode_each)
    monkeypatch.setattr(tokenization, "_encode_each", encoded)
    long = {
        role: text.replace("name", "my " * 100_000 + "name").replace("lost", "lost " * 100_000)
        for role, text in short.items()
    }
    (ids, targets) = tokenize_one(long, tokenizer, make_settings(*fields, max_length=5, **options))
    assert sum(len(text) for call in encoded.call_args_list for text in call.args[0]) <= 3 * 64 * 5
    assert len(ids) == 5
    assert targets[-1] == LOST


@pytest.mark.parametrize("turns", ["none", "plain"])
@pytest.mark.parametrize("template", ["{prompt} {input}", "{input} {prompt}"])
def test_longest_prompt_field_is_truncated_and_the_question_kept(template: str, turns: str) -> None:
    text = f"It began. {'On it went. ' * 99}Here."
    record = {"prompt": "Where did it end?", "input": text, "completion": "There"}
    tokenizer = build_tiny_tokenizer("random:llama")
    data = make_settings(max_length=90, prompt_template=template, chat_template=turns)
    decoded = tokenizer.decode(tokenize_one(record, tokenizer, data)[0])
    assert all(excerpt in decoded for excerpt in ("Where did it end?", "It began.", "Here.", "There</s>"))


def test_truncated_long_chats_and_prompts_keep_their_end(leading_tokenizer: Any) -> None:
    turns = make_chat(*["a"] * 40_000, *["my", "lost"])
    tokenizer = build_tiny_tokenizer("random:llama")
    ids, targets = tokenize_one(turns, tokenizer, make_settings("messages", chat_template="plain", max_length=30))
    assert len(ids) == 30
    assert tokenizer.decode(ids).endswith("User: my\n\nAssistant: lost</s>")
    assert tokenizer.decode([target for target in targets if target >= 0]).endswith(" lost</s>")
    record = {"prompt": "my " * 1000 + "name", "completion": "lost"}
    data = make_settings(max_length=5, prompt_template="where {prompt} there")
    assert tokenize_one(record, leading_tokenizer, data)[0] == [CLS, WHERE, THERE, LOST, SEP]


ALPACA = "Task:\n{prompt}\n\nInput:\n{input} {context}\n\nAnswer:\n"


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"prompt": "p", "input": "i", "context": "c"}, "Task:\np\n\nInput:\ni c\n\nAnswer:\n"),
        ({"prompt": "p", "input": " ", "context": "c"}, "Task:\np\n\nInput:\n  c\n\nAnswer:\n"),
        ({"prompt": "p", "input": "", "context": " "}, "Task:\np\n\nAnswer:\n"),
        ({"prompt": "p", "input": ""}, "Task:\np\n\nAnswer:\n"),
        ({"prompt": "p\n\n{input}", "input": ""}, "Task:\np\n\n{input}\n\nAnswer:\n"),
    ],
)
def test_paragraph_with_an_empty_field_is_omitted(fields: dict[str, str], expected: str) -> None:
    tokenizer = build_tiny_tokenizer("random:llama")
    data = make_settings("prompt", "completion", "input", "context", prompt_template=ALPACA, max_length=400)
    assert tokenizer.decode(LM.encode_prompt(fields, tokenizer, data=data)) == expected
    ids, targets = tokenize_one({**fields, "completion": "done"}, tokenizer, data)
    assert tokenizer.decode(ids) == f"{expected}done</s>"
    assert tokenizer.decode([target for target in targets if target >= 0]) == "done</s>"


HOSTILE = {
    "no JSON": "[{",
    "another type": "17",
    "an object": '{"role": "user"}',
    "no contents": '[{"role": "user"}]',
    "numbers": '[{"role": "user", "content": 1}, {"role": "assistant", "content": "a"}]',
    "a list of lists": '[["user", "a"]]',
    "no answer": json.dumps([{"role": "user", "content": "a"}]),
    "an unknown role": json.dumps([{"role": "tool", "content": "a"}, {"role": "assistant", "content": "a"}]),
    "a role of the format": json.dumps([{"role": "answer", "content": "a"}, {"role": "assistant", "content": "a"}]),
    "an answer first": json.dumps([{"role": "assistant", "content": "a"}]),
    "two users": json.dumps([{"role": r, "content": "a"} for r in ("user", "user", "assistant")]),
    "two systems": json.dumps([{"role": r, "content": "a"} for r in ("system", "system", "user", "assistant")]),
    "depth": "[" * 100_000,
    "nothing": "",
    "half a pair": json.dumps([{"role": "user", "content": "\ud800"}, {"role": "assistant", "content": "lost"}]),
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_invalid_messages_have_no_targets_and_affect_no_other_record(leading_tokenizer: Any, text: str) -> None:
    data = make_settings("messages", chat_template="plain")
    others = [Record(make_chat("where", "lost")), Record(make_chat("is", "there"))]
    mixed = LM.tokenize(
        [others[0], Record({"messages": text}), others[1]], leading_tokenizer, data=data, lenient_within=99
    )
    alone = LM.tokenize(others, leading_tokenizer, data=data, lenient_within=99)
    assert [list_rows(mixed)[index] for index in (0, 2)] == list_rows(alone)
    if text != HOSTILE["half a pair"]:  # this tokenizer has no such word in any form
        assert list_rows(mixed)[1] == ([SEP], [HIDDEN])
        with pytest.raises(DataError, match=r"^a\.jsonl:3, messages = .*must alternate user and assistant") as error:
            LM.tokenize([Record({"messages": text}, file="a.jsonl", line=3)], leading_tokenizer, data=data)
        assert "content" not in str(error.value), "record text must not be quoted"


@pytest.mark.parametrize("roles", [("messages",), ("text",), ("prompt", "completion")])
@pytest.mark.parametrize(
    "text", ["\x00\x01\x02", "</s><s>" * 50, "\u202e" * 70, "🏳️‍🌈" * 40, " \n\t ", "x" * 200_000], ids=range(6)
)
def test_hostile_content_produces_at_most_one_bounded_example(roles: tuple[str, ...], text: str) -> None:
    tokenizer = build_tiny_tokenizer("random:llama")
    fields = make_chat(text, text) if roles == ("messages",) else dict.fromkeys(roles, text)
    options = {"chat_template": "plain"} if roles == ("messages",) else {}
    data = make_settings(*roles, max_length=40, **options)
    dataset = LM.tokenize([Record(fields)], tokenizer, data=data, lenient_within=258)
    assert len(dataset) == 1
    assert 1 <= dataset.lengths[0] <= 40
    assert dataset.targets[0][0] == HIDDEN
    targets_kept = dataset.targets[0] != HIDDEN
    assert np.array_equal(dataset.targets[0][targets_kept], dataset.input_ids[0][targets_kept])


def test_prompts_and_references_come_from_the_last_answer(leading_tokenizer: Any, decoder_tokenizer: Any) -> None:
    data = make_settings("messages", chat_template="plain", max_length=6)
    asked = LM.prompts_and_references(
        [Record(make_chat("where", "lost", "is", "there", "so"))], leading_tokenizer, data=data
    )
    assert asked is not None
    prompts, answers = asked
    assert answers == ["there"]
    assert prompts[0].tolist() == [CLS, LOST, SEP, 1, IS, 1], "the prompt's length must not depend on the answer"
    assert LM.prompts_and_references([Record({"text": "lost"})], leading_tokenizer, data=make_settings("text")) is None
    asked = LM.prompts_and_references(
        [make_prompt_record("where is", "lost")], leading_tokenizer, data=make_settings(max_length=3)
    )
    assert asked is not None
    assert ([ids.tolist() for ids in asked[0]], asked[1]) == ([[CLS, WHERE, IS]], ["lost"])
    with pytest.raises(DataError, match=r"^a\.jsonl:3, prompt = .* must contain at least one token"):
        LM.prompts_and_references([make_prompt_record("", "lost")], decoder_tokenizer, data=make_settings())


def test_generation_prompts_end_before_the_answer(leading_tokenizer: Any) -> None:
    def tokenize_prompt(fields: dict[str, str], *roles: str, **overrides: Any) -> list[int]:
        return LM.encode_prompt(fields, leading_tokenizer, data=make_settings(*roles, **overrides)).tolist()

    assert tokenize_prompt({"prompt": "where is my card is my card is my card"})[-2:] == [MY, CARD], (
        "no truncation here"
    )
    assert tokenize_prompt({"text": "where is"}, "text") == [CLS, WHERE, IS]
    assert tokenize_prompt({"prompt": "where"}, prompt_template="my {prompt}") == [CLS, MY, WHERE]
    assert tokenize_prompt(make_chat("where"), chat_template="plain") == tokenize_prompt(
        {"prompt": "where"}, chat_template="plain"
    )
    with pytest.raises(DataError, match=r"^messages = .* end with a user turn"):
        tokenize_prompt(make_chat("where", "lost"), "messages", chat_template="plain")
    with pytest.raises(ConfigError, match=r"^data\.chat_template = 'none'"):
        tokenize_prompt(make_chat("where"))
