"""Rules for tokenizers: all steps must be known to run in linear time and to lengthen a text by a bounded factor.

An attacker who chooses a regular expression, or a chain of rules that each lengthen a text, could make a tokenizer take
minutes, exhaust the memory or fail on selected words.  The site's reply would then reveal whether one of its records
contains these words.
"""

from __future__ import annotations

import base64
import re
from typing import Any

from fedtune.spec import format_value

_MAX_PARTS = 16
_MAX_GROWTH = 300  # maximum output characters of all steps per input character; ALBERT's steps reach 288
_MAX_REPLACED = 18  # maximum replacement length in a SentencePiece table, the NFKC expansion of U+FDFA
_MAX_PREPENDED, _MAX_SPECIAL, _MAX_PATTERN, _MAX_PIECE, _MAX_AFFIX = 4, 16, 64, 512, 16
_MAX_WORD, _MAX_UNIGRAM = 200, 128
"""Maximum length of a word for WordPiece (BERT: 100), whose time is cubic in the length, and of a piece for Unigram
(usually 16), which tries that many pieces at each character.
"""

_NORMALIZERS = {
    "Strip": 1, "StripAccents": 1, "Nmt": 1, "Replace": 1, "Prepend": 1,
    "Lowercase": 2, "NFC": 3, "NFD": 4, "NFKC": 4, "NFKD": 4, "ByteLevel": 4, "BertNormalizer": 8, "Precompiled": 1,
}  # fmt: skip
"""Known normalizers, and the maximum number of characters that each produces from one character.

Replace and Precompiled are inspected separately.  NFKC and NFKD expand a few rare characters to 18, which count where
an earlier step can insert them into any text.
"""
_COMPATIBLE = ("NFKC", "NFKD")
_MAX_COMPATIBLE = 18

_PRE_TOKENIZERS = {
    "BertPreTokenizer": 1, "CharDelimiterSplit": 1, "Digits": 1, "Punctuation": 1, "Split": 1, "UnicodeScripts": 1,
    "Whitespace": 1, "WhitespaceSplit": 1, "Metaspace": 2, "ByteLevel": 5,
}  # fmt: skip
"""Known pre-tokenizers, with their maximum growth.  A prefix is added to each piece, and a piece may be a single
character.
"""

_MODELS = frozenset({"BPE", "Unigram", "WordLevel", "WordPiece", None})  # None: old files have no type
_POST_PROCESSORS = frozenset({"BertProcessing", "RobertaProcessing", "ByteLevel", "TemplateProcessing"})

_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_CONTRACTED = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r" ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_BEFORE = r"[^\r\n\p{L}\p{N}]?"
_CASED_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CLIP = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"

PUBLISHED = frozenset(
    {
        f"'s|'t|'re|'ve|'m|'ll|'d|{_GPT2}",  # GPT-2
        f"'(?:[sdmt]|ll|ve|re)|{_GPT2}",  # the same, as tiktoken writes it
        rf"{_CONTRACTED}|{_LETTERS}|\p{{N}}{{1,3}}{_REST}",  # GPT-4 (cl100k), Llama 3
        rf"(?i:[sdmt]|ll|ve|re)|{_LETTERS}|\p{{N}}{{1,3}}{_REST}",
        rf"'(?i:[sdmt]|ll|ve|re)|{_LETTERS}|\p{{N}}{{1,3}}{_REST}",
        rf"{_CONTRACTED}|{_LETTERS}|\p{{N}}{_REST}",  # Qwen 2
        rf"{_CONTRACTED}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
        r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",  # Qwen 3.5
        rf"{_BEFORE}{_UPPER}*{_LOWER}+|{_BEFORE}{_UPPER}+{_LOWER}*|\p{{N}}{_CASED_REST}",  # Mistral's Tekken
        rf"{_BEFORE}{_UPPER}*{_LOWER}+{_CONTRACTED}?|{_BEFORE}{_UPPER}+{_LOWER}*{_CONTRACTED}?"
        rf"|\p{{N}}{{1,3}}{_CASED_REST}",  # GPT-4o (o200k), Llama 4
        r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
        r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",  # DeepSeek V3
        r" ?[^(\s|[.,!?…。，、।۔،])]+",  # noqa: RUF001 (BLOOM)
        r"[0-9][0-9][0-9]",  # Falcon
        _CLIP,
        rf"<\|startoftext\|>|<\|endoftext\|>|{_CLIP}",
        r"\s{2,}|[\n\r\t]",  # NLLB
        r"^▁+$",
    }
)
"""Regular expressions of published models.  Each expression matches in linear time: a repetition backtracks at most
once per stretch of text.
"""

_ESCAPED = r"\\(?:[sSdDwWnrt]|[pP]\{\^?[A-Z][a-z]?\}|[^\w\s])"
_IN_CLASS = rf"(?:{_ESCAPED}|[^\\\[\]&^-])"
_ATOM = rf"(?:\[\^?(?:{_IN_CLASS}(?:-{_IN_CLASS})?)+\]|{_ESCAPED}|\.|[^\\\[\](){{}}.^$|?*+])"
_SIMPLE = re.compile(rf"(?:{_ATOM}\?)?{_ATOM}(?:\+|\{{(?P<least>[1-9]\d?)(?P<range>,(?P<most>\d\d?)?)?\}})?")
"""Pattern of one character class, possibly repeated and with an optional character before it, which never
backtracks.
"""


class _TokenizerError(ValueError):
    """Reason for refusing a tokenizer, as the end of a sentence about its file."""


def explain_tokenizer_refusal(fields: dict[str, Any]) -> str | None:
    """Return the reason for refusing a tokenizer.json, as the end of a sentence, or None if the file is acceptable.

    Decoders are not checked, because they never process a record.  Settings for padding and truncation are not checked
    either, because each call overrides them.
    """
    try:
        growth = _compute_max_growth(fields.get("normalizer"))
        for step in _flatten_steps(fields.get("pre_tokenizer"), "pretokenizers", known=_PRE_TOKENIZERS):
            growth *= _PRE_TOKENIZERS[step["type"]]
            if step["type"] == "Split":
                _compute_min_match_length(step.get("pattern"))
        if growth > _MAX_GROWTH:
            raise _TokenizerError(f"has steps that turn one character into up to {growth}, more than {_MAX_GROWTH}")
        for step in _flatten_steps(fields.get("post_processor"), "processors", known=_POST_PROCESSORS):
            if step["type"] == "TemplateProcessing":
                _check_template(step)
        _check_model(fields["model"])
        _check_pieces(token.get("content") for token in fields.get("added_tokens") or ())
    except _TokenizerError as error:
        return str(error)
    # A field has a type that the library never writes.
    except (AttributeError, KeyError, TypeError, ValueError):
        return "is not a tokenizer that fedtune can read"
    return None


def quote(value: object) -> str:
    """Shorten a value from a file for an error message; such values can be long or contain unprintable characters."""
    text = value if isinstance(value, str) and re.fullmatch(r"\w{1,40}", value, re.ASCII) else format_value(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


def _flatten_steps(part: Any, inner: str, *, known: Any) -> list[dict[str, Any]]:
    """Flatten a tokenizer component into a list of steps; a Sequence stores its steps under the key `inner`."""
    steps, waiting = [], [part] if part is not None else []
    while waiting:
        step = waiting.pop(0)
        if step["type"] == "Sequence":
            waiting = [*step[inner], *waiting]
        elif step["type"] not in known:
            raise _TokenizerError(f"has the step {quote(step['type'])}, which fedtune does not support")
        else:
            steps.append(step)
        if len(steps) + len(waiting) > _MAX_PARTS:
            raise _TokenizerError(f"has more than {_MAX_PARTS} steps in a row")
    return steps


def _compute_max_growth(normalizer: Any) -> int:
    """Return the maximum number of characters that the normalizers produce from one character."""
    growth, chosen = 1, False
    for step in _flatten_steps(normalizer, "normalizers", known=_NORMALIZERS):
        kind = step["type"]
        growth *= _MAX_COMPATIBLE if kind in _COMPATIBLE and chosen else _NORMALIZERS[kind]
        if kind == "Replace":
            least, put = _compute_min_match_length(step["pattern"]), len(step["content"])
            if put > least:
                raise _TokenizerError(f"replaces {least} characters by {put}, which lengthens a text")
        elif kind == "Prepend" and len(step["prepend"]) > _MAX_PREPENDED:
            raise _TokenizerError(f"prepends more than {_MAX_PREPENDED} characters to a text")
        elif kind == "Precompiled":
            growth *= _find_longest_replacement(step.get("precompiled_charsmap") or "")
        chosen |= kind == "Precompiled" or not (step.get("content") or step.get("prepend") or "").isascii()
    return growth


def _find_longest_replacement(encoded: str) -> int:
    """Return the length of the longest replacement in a SentencePiece table.

    The table consists of the size of an index (four bytes), the index, and texts that end in 0.  The index may point
    into the middle of a text, but no replacement extends beyond the end of its text.
    """
    table = base64.b64decode(encoded, validate=True)
    texts = table[4 + int.from_bytes(table[:4], "little") :]
    if table and not texts:
        raise _TokenizerError("has a truncated character table")
    longest = max(1, *(len(text.decode(errors="replace")) for text in texts.split(b"\0")))
    if longest > _MAX_REPLACED:
        raise _TokenizerError(f"has a table that turns one character into {longest}, more than {_MAX_REPLACED}")
    return longest


def _compute_min_match_length(pattern: Any) -> int:
    """Return the minimum number of characters that a pattern matches."""
    ((kind, text),) = pattern.items()
    if kind == "String" and 0 < len(text) <= _MAX_PATTERN:
        return len(text)
    # Some files contain literal line breaks.
    text = text.replace("\r", r"\r").replace("\n", r"\n")
    if kind == "Regex" and text in PUBLISHED:
        return 1
    simple = _SIMPLE.fullmatch(text) if kind == "Regex" and len(text) <= _MAX_PATTERN else None
    if simple is None:
        raise _TokenizerError(f"has the pattern {quote(text)}, which is not known to take linear time")
    return min(int(simple["least"] or 1), int(simple["most"] or 99))


def _check_template(step: dict[str, Any]) -> None:
    for name, most in (("single", 1), ("pair", 2)):
        pieces = step.get(name) or ()
        added = [
            step["special_tokens"][piece["SpecialToken"]["id"]]["ids"] for piece in pieces if "Sequence" not in piece
        ]
        if len(pieces) - len(added) > most:
            raise _TokenizerError("has a template that repeats a text")
        if len(added) > _MAX_SPECIAL or sum(len(ids) for ids in added) > _MAX_SPECIAL:
            raise _TokenizerError(f"has a template with more than {_MAX_SPECIAL} special tokens")


def _check_model(model: dict[str, Any]) -> None:
    if model.get("type") not in _MODELS:
        raise _TokenizerError(f"has the model {quote(model['type'])}, which fedtune does not support")
    # BPE-dropout would change a record's tokens in each pass.
    if model.get("dropout"):
        raise _TokenizerError(f"has dropout = {quote(model['dropout'])}, so a text has different tokens in each pass")
    if model.get("max_input_chars_per_word", 0) > _MAX_WORD:
        raise _TokenizerError(f"accepts words of more than {_MAX_WORD} characters (max_input_chars_per_word)")
    vocabulary = model.get("vocab") or ()
    if isinstance(vocabulary, dict):
        _check_pieces(vocabulary)
    else:
        _check_pieces((piece for piece, _ in vocabulary), most=_MAX_UNIGRAM)
    affixes = (model.get(name) or "" for name in ("continuing_subword_prefix", "end_of_word_suffix"))
    _check_pieces(affixes, most=_MAX_AFFIX)  # WordPiece adds an affix to each candidate piece


def _check_pieces(pieces: Any, *, most: int = _MAX_PIECE) -> None:
    longest = max(map(len, pieces), default=0)
    if longest > most:
        raise _TokenizerError(f"has a piece of {longest} characters, more than {most}")
