"""Patterns for likely personal identifiers and damaged encodings in texts, and for tables without a usable header.

They miss identifiers without a fixed format, such as names and addresses, and have false positives among numbers.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from operator import itemgetter
from os.path import isfile
from pathlib import Path

from fedtune.data.images import SUFFIXES
from fedtune.data.text_rows import Row
from fedtune.lab.preparation.columns import NAMES, DataColumn, build_column_error

_NUMBER = re.compile(r"[+-]?\d+(?:\.\d+)?")


def find_identifiers(text: str) -> list[tuple[str, int, int]]:
    """Find likely personal identifiers as non-overlapping (kind, start, end); kinds with a checksum have priority."""
    found: list[tuple[str, int, int]] = []
    if not _MAY_IDENTIFY.search(text):
        return found
    taken = bytearray(len(text))
    for kind, pattern in _PATTERNS.items():
        for match in pattern.finditer(text):
            start = match.start()
            end = start + len(_CHECKS.get(kind, str)(match[0]))
            if end > start and not any(taken[start:end]):
                found.append((kind, start, end))
                taken[start:end] = b"\1" * (end - start)
    return sorted(found, key=itemgetter(1))


def mask_identifiers(text: str) -> tuple[str, list[str]]:
    """Replace identifiers by their kind in brackets; return the text and the kinds of the replacements."""
    found = find_identifiers(text)
    ends = [0, *(end for _, _, end in found)]
    parts = [f"{text[end:start]}[{kind}]" for end, (kind, start, _) in zip(ends, found, strict=False)]
    return "".join([*parts, text[ends[-1] :]]), [kind for kind, _, _ in found]


def find_damage(text: str) -> Iterator[str]:
    """Yield the kinds of encoding damage in a text, each kind once."""
    if text.isascii() and text.isprintable():
        return
    yield from (what for what, pattern in _DAMAGE.items() if pattern.search(text))
    if _is_twice_encoded(text):
        yield MOJIBAKE


# Identifiers.

_MAY_IDENTIFY = re.compile(r"@|[0-9]|::")
_DAY = r"(?:[0-9]{1,2}[./ -]{1,2}(?:[0-9]{1,2}|[^\W\d]{3,9})[./ -]{1,2}[0-9]{2,4}|[0-9]{4}-[0-9]{2}-[0-9]{2})"
_PATTERNS: Mapping[str, re.Pattern[str]] = {
    "e-mail": re.compile(r"(?<![\w.+%-])[\w.+%-]{1,64}@(?:[\w-]{1,63}\.){1,8}[^\W\d_]{2,24}(?!\w)"),
    "IBAN": re.compile(r"(?<!\w)[A-Z]{2}[0-9]{2}(?: ?[A-Z0-9]){11,30}(?!\w)"),
    "card number": re.compile(r"(?<![\w+])[3-6](?:[ -]?[0-9]){12,18}(?!\w)"),
    "US social security number": re.compile(
        r"(?<![\w-])(?!000|666|9)[0-9]{3}([ -])(?!00)[0-9]{2}\1(?!0000)[0-9]{4}(?![\w-])"
    ),
    "German tax id": re.compile(r"(?<!\w)[1-9][0-9](?: ?[0-9]{3}){3}(?!\w)"),
    "date of birth": re.compile(
        r"(?i)(?<!\w)(?:born|d\.?o\.?b\.?|date of birth|birth ?da(?:te|y)|geb(?:oren|\.|urtsdatum|urtstag)?)"
        rf"[\s:,=-]{{0,4}}(?:(?:on|am|is|ist|the)\s)?\s?{_DAY}(?!\w)"
    ),
    "IP address": re.compile(
        r"(?<![\w.:])(?:[0-9]{1,3}(?:\.[0-9]{1,3}){3}(?!\.?\w)|[0-9A-Fa-f]{0,4}(?::[0-9A-Fa-f]{0,4}){2,7}(?![\w:]))"
    ),
    "phone number": re.compile(
        r"(?<![\w.,+])(?<![0-9] )(?:"
        r"(?:\+|00)[1-9](?:[ ()./-]{0,2}[0-9]){6,13}"  # as the whole world writes it
        r"|\(?0[1-9][0-9]{1,4}\)?[ /-]{1,3}[0-9](?:[ -]?[0-9]){4,9}"  # within a country
        r"|\(?[2-9][0-9]{2}\)?[ .-]{1,2}[2-9][0-9]{2}[ .-][0-9]{4}"  # in North America
        r")(?![\w-])"
    ),
}
"""Patterns by kind; linear without long backtracking, because a text may have millions of characters."""


def _match_iban(text: str) -> str:
    """Return the valid IBAN at the start of a text, or "".

    ISO 13616: with letters as numbers and the first four characters moved to the end, an IBAN is 1 modulo 97.
    """
    for end in reversed([match.start() for match in re.finditer(r" |$", text)]):
        compact = text[:end].replace(" ", "")
        number = "".join(str(int(letter, 36)) for letter in compact[4:] + compact[:4])
        if 15 <= len(compact) <= 34 and int(number) % 97 == 1:
            return text[:end]
    return ""


def _match_card_number(text: str) -> str:
    """Return the text if it passes the Luhn check, otherwise "".

    Every second digit from the right is doubled, and the sum of all digits must be divisible by 10.
    """
    digits = [int(letter) for letter in text if letter.isdigit()]
    doubled = [sum(divmod(2 * digit, 10)) for digit in digits[-2::-2]]
    return text if len(set(digits)) > 1 and (sum(digits[::-2]) + sum(doubled)) % 10 == 0 else ""


def _match_tax_id(text: str) -> str:
    """Return the text if it is a valid German tax id, otherwise "".

    Federal Central Tax Office: one of the first ten digits occurs two or three times; check digit by ISO 7064 mod 11,
    10.
    """
    digits = [int(letter) for letter in text if letter.isdigit()]
    times = sorted(digits[:10].count(digit) for digit in set(digits[:10]))
    product = 10
    for digit in digits[:10]:
        product = ((digit + product) % 10 or 10) * 2 % 11
    repeated = times[-1] in (2, 3) and all(count == 1 for count in times[:-1])
    return text if repeated and (11 - product) % 10 == digits[10] else ""


def _match_ip_address(text: str) -> str:
    """Return the text if `ipaddress` accepts it, otherwise ""; a bare `::` is punctuation."""
    try:
        return text if len(text) > 2 and ipaddress.ip_address(text) else ""
    except ValueError:
        return ""


_CHECKS = {
    "IBAN": _match_iban,
    "card number": _match_card_number,
    "German tax id": _match_tax_id,
    "IP address": _match_ip_address,
}
"""Validators by kind: from a match to its valid part, or "" if there is none."""

# Marks and rows within a text.

MOJIBAKE = "mojibake (UTF-8 read as Windows-1252)"
_MARK = re.compile(
    r"<\|[\w-]{1,40}\|>|\[/?INST\]|<</?SYS>>|</?s>|<(?:start|end)_of_turn>|<(?:bos|eos|pad|unk|begin|end)_?\w{0,9}>"
)
"""Special tokens of the chat templates of well-known models."""
_ELEMENT = "(?i)(?:<|&lt;)/?(?:p|br|div|span|a|b|i|em|strong|[uo]l|li|table|t[dr]|h[1-6]|img)(?: [^<>]*|/)?(?:>|&gt;)"
_HTML = re.compile(rf"{_ELEMENT}|&(?:amp;)?(?:[a-z]{{2,8}}|#\d{{2,6}});")
"""HTML elements and entities, also escaped."""
ODD_TEXTS: Mapping[str, str] = {
    "line ends in a cell": "line breaks within a cell: in a file without quoting, an unpaired quote joins several rows",
    "what looks like rows in a cell": "lines within a cell that look like whole rows: if the table was written without "
    "quoting, these rows are lost; write it with quotes around cells, or as JSON Lines",
    "marks of a chat template": "chat-template tokens, which are learned as text: remove them, or write turns",
    "quotes behind a space": "quotes after a space, which are learned as text: remove the space",
    MOJIBAKE: f"{MOJIBAKE}: convert the file again from its source as UTF-8",
    "HTML": "HTML, which is learned as text: write plain text without HTML tags",
}


def find_odd_texts(row: Mapping[str, object], form: str) -> Iterator[tuple[str, str]]:
    """Yield (kind in `ODD_TEXTS`, column) for cells with damaged or program-altered text."""
    in_cell, rows_within, marks, quotes, mojibake, html = ODD_TEXTS
    commas = {".csv": ",;", ".tsv": "\t"}.get(form, "")
    for column, value in row.items():
        text = value if isinstance(value, str) else str(value) if isinstance(value, list | dict) else ""
        if _MARK.search(text):
            yield marks, column
        if ("<" in text or "&" in text) and _HTML.search(text):
            yield html, column
        if not text.isascii() and _is_twice_encoded(text):
            yield mojibake, column
        if commas and text.startswith(' "') and text.endswith('"'):
            yield quotes, column
        if commas and "\n" in text and not text.startswith("["):
            within = text.split("\n")[1:-1]
            is_row = any(inner.count(comma) == len(row) - 1 > 0 for inner in within for comma in commas)
            yield rows_within if is_row else in_cell, column


# Damage.

_DAMAGE: Mapping[str, re.Pattern[str]] = {
    "replacement characters (U+FFFD)": re.compile("\ufffd"),
    "control characters": re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\x80-\x9f]"),
    # Soft hyphens, spaces without width and marks of direction; joiners stay, which some scripts and emoji need.
    "invisible characters": re.compile("[\u00ad\u200b\u202a-\u202e\u2060-\u2064\u2066-\u2069\ufeff]"),
}
_BEHIND = "\u0080-\u00bf\u0152-\u2122"
_TWICE = re.compile(
    f"[\u00c2\u00c3][{_BEHIND}]|[\u00c4-\u00df](?![«»\u2010-\u203a])[{_BEHIND}]|[\u00e0-\u00f4][{_BEHIND}]{{2,3}}"
)
"""A UTF-8 character that was decoded as Latin-1: its first byte, followed by its continuation bytes.  Does not match
accented capitals before a quote, a dash or dots, which are valid French or German."""


def _is_twice_encoded(text: str) -> bool:
    return any(_is_mojibake(match[0]) for match in _TWICE.finditer(text))


def _is_mojibake(text: str) -> bool:
    """Whether the text starts with a UTF-8 character that was decoded as Windows-1252 or Latin-1."""
    try:
        raw = b"".join(letter.encode("cp1252" if letter > "\xff" else "latin-1") for letter in text)
    except UnicodeEncodeError:
        return False
    size = 2 if raw[0] < 0xE0 else 3 if raw[0] < 0xF0 else 4
    return len(raw) >= size and all(0x80 <= byte < 0xC0 for byte in raw[1:size])


def require_header(columns: Mapping[str, DataColumn], path: Path) -> None:
    """Raise a DataError for a table without a header, whose first record would become the column names."""
    filled = [one for one in columns.values() if one.filled]
    unnamed = [one for one in filled if one.name.startswith("(column ")]
    odd = [one for one in filled if one.name.startswith("# ") or re.search(r" \(column \d+\)$", one.name)]
    if odd or len(unnamed) > 1:
        raise build_column_error(path, "header", odd or unnamed)
    # Without a header, most column names are values: a value of the column, a number, or a text of similar length.
    # Half of the names are enough if the longest texts are not longer than their column's name.  A flag may be named
    # like one of its values, and pixel columns are numbered.
    numbers = {one.name: float(one.name) for one in filled if one.is_number and _NUMBER.fullmatch(one.name)}
    steps = {round(after - before, 6) for before, after in pairwise(numbers.values())}
    own = [one for one in filled if any(some[one.name.strip()] for some in one.values.values())]
    values = {one.name for one in filled if one in own or one.could_name_text}
    is_counted = len(numbers) > 2 and len(steps) == 1
    values = values - {*numbers} if is_counted else values | {*numbers}
    longest = max(filled, key=lambda one: one.mean_characters, default=None)
    is_long = longest and longest.key not in NAMES["texts"] and 1.5 * len(longest.name) >= longest.mean_characters
    if own and 2 * len(values) >= len(filled) + (not is_long):
        raise build_column_error(path, "no_header", own[:1])


def require_endings(columns: Mapping[str, DataColumn], first: Sequence[Row], path: Path) -> None:
    """Raise a DataError for image names without an extension, which would be mistaken for codes."""
    for one in (one for one in columns.values() if one.is_text and not one.is_prose):
        names = [str(row[one.name]) for row in first if row.get(one.name)]
        for end in (*SUFFIXES, *NAMES["endings"]) if names else ():
            if all(isfile(path.parent / f"{name}{end}") for name in names):
                raise build_column_error(path, "stems", [one], end)
