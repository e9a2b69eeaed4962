"""Published tokenizers are accepted, and tokenizers that a text can break are refused with a reason."""

import base64
import json
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fedtune.model.base_model import load_tokenizer
from fedtune.model.compatibility import tokenize_public_text
from fedtune.model.spec import ModelSpec
from fedtune.model.tokenizer_rules import PUBLISHED, explain_tokenizer_refusal
from fedtune.spec import ConfigError

PUBLISHED_TOKENIZERS: dict[str, dict[str, Any]] = json.loads(
    Path(__file__).with_name("published_tokenizers.json").read_text(encoding="utf-8")
)
"""The rules of published tokenizers, as in their tokenizer.json, with almost empty vocabularies."""
BERT, GPT2, XLM_R = (PUBLISHED_TOKENIZERS[name] for name in ("BERT", "GPT-2", "XLM-R"))
TEMPLATE = BERT["post_processor"]


def make_precompiled(*replacements: bytes) -> dict[str, Any]:
    table = (0).to_bytes(4, "little") + b"\0".join((*replacements, b""))
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(table).decode()}


def make_replace(pattern: str, content: str, *, kind: str = "String") -> dict[str, Any]:
    return {"type": "Replace", "pattern": {kind: pattern}, "content": content}


def make_split(pattern: str, kind: str = "Regex") -> dict[str, Any]:
    return {"type": "Split", "pattern": {kind: pattern}, "behavior": "Isolated", "invert": False}


def make_sequence(*normalizers: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "normalizers": list(normalizers)}


def parse_tokenizer(tokenizer: Tokenizer) -> dict[str, Any]:
    fields: dict[str, Any] = json.loads(tokenizer.to_str())
    return fields


def make_word_tokenizer(**parts: Any) -> dict[str, Any]:
    return parse_tokenizer(Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))) | parts


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    name: (make_word_tokenizer(**case["parts"]), case["refused"])
    for name, case in yaml.safe_load(Path(__file__).with_name("refused_tokenizers.yaml").read_text()).items()
}
REFUSED |= {
    "replacement that lengthens a word": (
        make_word_tokenizer(normalizer=make_replace("JANE", "X" * 1000)),
        "replaces 4 characters by 1000",
    ),
    "character table that lengthens the text": (
        XLM_R | {"normalizer": make_precompiled(b"x" * 1000)},
        "turns one character into 1000, more than",
    ),
    "character mapped to nineteen digits": (
        XLM_R | {"normalizer": make_precompiled(b"7" * 19)},
        "turns one character into 19, more than 18",
    ),
    "eighteenfold expansion, twice": (
        make_word_tokenizer(normalizer=make_sequence(*2 * [make_replace("a", "\ufdfa"), {"type": "NFKC"}])),
        "turn one character into up to 324",
    ),
    "many steps": (make_word_tokenizer(normalizer=make_sequence(*17 * [{"type": "Strip"}])), "more than 16 steps"),
    "nested sequences": (
        make_word_tokenizer(normalizer=make_sequence(make_sequence(*9 * [{"type": "Nmt"}]), *8 * [make_sequence()])),
        "16",
    ),
    "many special tokens": (
        make_word_tokenizer(
            post_processor=TEMPLATE | {"special_tokens": TEMPLATE["special_tokens"] | {"[CLS]": {"ids": 17 * [1]}}}
        ),
        "more than 16 special tokens",
    ),
    "long words": (BERT | {"model": BERT["model"] | {"max_input_chars_per_word": 10**6}}, "more than 200"),
    "long piece": (
        make_word_tokenizer(model={"type": "WordLevel", "vocab": {"x" * 513: 0}}),
        "a piece of 513 characters",
    ),
    "long Unigram piece": (
        make_word_tokenizer(model={"type": "Unigram", "vocab": [["x" * 129, 0.0]]}),
        "a piece of 129 characters, more than 128",
    ),
    "long added token": (
        make_word_tokenizer(added_tokens=[{"id": 2, "content": "x" * 513}]),
        "a piece of 513 characters",
    ),
    "missing model": ({"version": "1.0"}, "can read"),
    "random tokenization": (GPT2 | {"model": GPT2["model"] | {"dropout": 0.1}}, r"has dropout = 0\.1"),
}


@pytest.mark.parametrize("name", PUBLISHED_TOKENIZERS)
def test_published_tokenizers_are_accepted(name: str) -> None:
    fields = PUBLISHED_TOKENIZERS[name]
    assert explain_tokenizer_refusal(fields) is None
    assert parse_tokenizer(Tokenizer.from_str(json.dumps(fields))) == fields, "the library must keep the rules"


@pytest.mark.parametrize("name", REFUSED)
def test_tokenizers_that_text_can_break_are_refused(name: str) -> None:
    tokenizer, reason = REFUSED[name]
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(explain_tokenizer_refusal(tokenizer))


ADVERSARIAL_TEXTS = {
    "spaces": " " * 20_000,
    "words after double spaces": "  a" * 6_000,
    "lines of spaces": (" " * 100 + "\n") * 200,
    "one word": "A" * 20_000,
    "punctuation": "!" * 20_000,
    "metaspace characters": "a" + "▁" * 20_000,
    "caseless script": "ー" * 10_000 + "A" * 10_000,
}


@pytest.mark.parametrize("text", ADVERSARIAL_TEXTS)
def test_published_patterns_are_fast_on_adversarial_text(text: str) -> None:
    """A pattern that restarts at each character takes more than a second, such as " +▁" on spaces."""
    for pattern in PUBLISHED:
        start = time.process_time()
        pre_tokenizers.Split(Regex(pattern), "isolated").pre_tokenize_str(ADVERSARIAL_TEXTS[text])
        assert time.process_time() - start < 1.0, pattern


def test_padding_and_truncation_in_tokenizer_files_are_ignored(folder: Path) -> None:
    file, spec = folder / "tokenizer.json", ModelSpec(path=str(folder))
    plain = load_tokenizer(spec)("a text")["input_ids"]
    padding = {"direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0, "pad_token": "[PAD]"}
    truncation = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    parts = {"padding": padding | {"strategy": {"Fixed": 128}}, "truncation": truncation}
    file.write_text(json.dumps(json.loads(file.read_text()) | parts))
    assert load_tokenizer(spec)("a text")["input_ids"] == plain


def test_rules_of_older_tokenizer_files_are_checked(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a tokenizer.json, the library derives the rules, which no earlier check has seen."""
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.txt").write_text("\n".join(("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a")))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    assert load_tokenizer(ModelSpec(path=str(folder)))("a")["input_ids"] == [2, 5, 3]
    monkeypatch.setattr(
        "fedtune.model.base_model.explain_tokenizer_refusal", lambda fields: f"has {fields['normalizer']['type']}"
    )
    with pytest.raises(ConfigError, match="its tokenizer has BertNormalizer"):
        load_tokenizer(ModelSpec(path=str(folder)))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "CanineTokenizer"}')
    with pytest.raises(ConfigError, match="must be from the tokenizers library"):  # a tokenizer implemented in Python
        load_tokenizer(ModelSpec(path=str(folder)))


def test_tokenizer_panic_on_public_text_is_a_refusal() -> None:
    class Broken(PreTrainedTokenizerFast):
        def __call__(self, *args: Any, **options: Any) -> Any:
            # The library panics in one of its own steps with a length of zero.
            pre_tokenizers.FixedLength(length=0).pre_tokenize_str("a")

    backend = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    with pytest.raises(ConfigError, match="cannot encode a text: PanicException"):
        tokenize_public_text(Broken(tokenizer_object=backend), "a", path="broken")
