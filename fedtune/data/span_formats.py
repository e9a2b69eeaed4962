"""Parsing of annotated texts in other programs' file formats: tokens with one tag each, or texts with spans.

A file is split into records before any record is parsed, so an unreadable record affects no other record.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any

from fedtune.codec import read_regular_file
from fedtune.data.json_lists import convert_columns_to_rows, parse_list, to_compact_json
from fedtune.data.text_rows import MAX_BYTES, Cut, Row, cut_rows, decode_text, format_location, name_json_type
from fedtune.spec import DataError

_TAG = re.compile(r"([BIESLUM])[-_](.+)", re.DOTALL)  # a tag: the letter of the tagging scheme, and the type
_BEGINS, _ENDS, _GOES_ON = frozenset("BSU"), frozenset("ELSU"), frozenset("ILEM")
"""Letters of the tags of an entity's first token, its last token, and its tokens after the first (IOB2, BILOU,
BIOES).
"""
_BEGINS_DOCUMENT, _LIKE_TAG = "-DOCSTART-", re.compile(r"O|[BIESLUM][-_].+")
_PARTS = (
    ("start", "start_offset", "startOffset", "begin", "begin_offset", "beginOffset", "start_char"),
    ("end", "end_offset", "endOffset", "end_char"),
    ("label", "type", "entity_group", "entity", "tag", "category", "displayName", "labels"),
)
"""Names of a span's start, end and label."""
DOCUMENTS = re.compile(rb'"(?:documents|PubTator3)"\s*:\s*\[')
"""Start of the document list in a BioC JSON file; PubTator's own server uses another key."""
_SPAN_OF_BRAT = re.compile(r"T\d+\t(\S+) (\d+) (\d+)((?:;\d+ \d+)*)\t(.*)")


def read_words(value: object, at: str, role: str = "tokens") -> str:
    """Read a record's tokens or tags from a list, or from a list as text (see `read_labels`), as one item per line."""
    listed = parse_list(value)
    if role == "tags" and listed and any(type(item) is int for item in listed):
        raise DataError(at, "numbers", "must be tag names, such as B-PER and O, not numbers (role tags)")
    if not listed or not all(isinstance(item, str) or type(item) is int for item in listed):
        kind = "text that is not a list" if listed is None else name_json_type(value) if listed else "an empty list"
        raise DataError(at, kind, f"must be a list of texts (role {role})")
    return "\n".join(" ".join(str(item).split()) for item in listed)


def read_spans(value: object, at: str) -> str:
    """Read the spans of a text as a JSON list of [start, end, label], `end` exclusive; an empty list is allowed.

    Accepted forms are such lists (doccano); objects with start, end and label under one of the names in `_PARTS`
    (Prodigy, doccano, spaCy, pipelines of transformers); and Label Studio's exports, in full or as JSON_MIN, with a
    list `labels`.  Label Studio's offsets count UTF-16 code units, which is recorded as a fourth value.  A label may be
    an integer.

    Raises:
        DataError: the value has another form.
    """
    listed = parse_list(convert_columns_to_rows(value))
    if listed is None:
        raise DataError(at, "text that is not a list", "must be a list of spans with start, end and label (role spans)")
    annotated = _find_first_annotation(listed, at, "spans")
    listed = listed if annotated is None else [item for item in annotated if "labels" in item]  # others are choices
    spans = []
    for number, item in enumerate(listed, 1):
        parts = item
        if isinstance(item, dict):
            parts = [next((item[key] for key in keys if key in item), None) for keys in _PARTS]
            parts[2] = parts[2][0] if isinstance(parts[2], list) and len(parts[2]) == 1 else parts[2]
        kinds = [type(part) for part in parts] if isinstance(parts, list) else []
        if kinds not in ([int, int, str], [int, int, int]):
            bound = "must have whole numbers start and end, and a text label (role spans)"
            raise DataError(f"{at}, span {number}", name_json_type(item), bound)
        unit = ["utf-16"] if isinstance(item, dict) and "labels" in item else []
        spans.append([*parts[:2], str(parts[2]), *unit])
    return to_compact_json(spans)


def convert_labels(value: object, at: str) -> object:
    """Convert the labels of another annotation program to a list; return any other value unchanged.

    Supported are spaCy's `cats` (an object of names with 1 or 0), Label Studio's choices, and doccano's objects with a
    label.
    """
    if isinstance(value, dict):
        of_cats = value and all(isinstance(flag, int | float) and flag in (0, 1) for flag in value.values())
        return [name for name, flag in value.items() if flag] if of_cats else value.get("choices", value)
    if not isinstance(value, list) or not value or not all(isinstance(item, dict) for item in value):
        return value
    annotated = _find_first_annotation(value, at, "labels")
    if annotated is not None:
        return [name for item in annotated for name in item.get("choices", ())]
    is_span = any(key in item for item in value for keys in _PARTS[:2] for key in keys)
    return value if is_span else [item.get("label") for item in value]


def _find_first_annotation(listed: Sequence[Any], at: str, role: str) -> list[Mapping[str, Any]] | None:
    """Return the values of the first Label Studio annotation that was not skipped; None if there are no annotations.

    Raises:
        DataError: all annotations were skipped.
    """
    annotations = [item for item in listed if isinstance(item, dict) and isinstance(item.get("result"), list)]
    if not annotations:
        return None
    kept = next((annotation["result"] for annotation in annotations if not annotation.get("was_cancelled")), None)
    if kept is None:
        raise DataError(at, "skipped", f"must have an annotation that was not skipped (role {role})")
    return [result["value"] for result in kept if isinstance(result, dict) and isinstance(result.get("value"), dict)]


def split_tag(tag: str, types: Collection[str] = ()) -> tuple[str, str]:
    """Split a token's tag into the letter of its scheme (empty without a scheme) and its type; "O" gives ("O", "").

    A tag that is one of the declared `types` has no scheme, whatever its first letter.

    >>> split_tag("S-protein"), split_tag("S-protein", ["S-protein"])
    (('S', 'protein'), ('', 'S-protein'))
    """
    if tag == "O":
        return "O", ""
    match = None if tag in types else _TAG.fullmatch(tag)
    return (match[1], match[2]) if match else ("", tag)


def decode_tags(tags: Sequence[str], types: Collection[str] = ()) -> tuple[list[tuple[int, int, str]], bool]:
    """Decode tags into entities (first token, end, type).

    Also returns whether the sequence is inconsistent: a continuation tag does not follow an open entity.
    """
    entities: list[tuple[int, int, str]] = []
    is_open = is_broken = False
    for place, tag in enumerate(tags):
        letter, name = split_tag(tag, types)
        if letter == "O":
            is_open = False
            continue
        goes_on = is_open and letter not in _BEGINS and entities[-1][2] == name
        is_broken = is_broken or (letter in _GOES_ON and not goes_on)
        entities.append((entities.pop()[0] if goes_on else place, place + 1, name))
        is_open = letter not in _ENDS
    return entities, is_broken


def count_entity_types(fields: Mapping[str, str], types: Collection[str] = ()) -> dict[str, int]:
    """Count a record's entities by type, in order of first appearance, from its tags or spans."""
    if "tags" in fields:
        return dict(Counter(name for *_, name in decode_tags(fields["tags"].split("\n"), types)[0]))
    return dict(Counter(span[2] for span in json.loads(fields.get("spans", "[]"))))


# Files.


def parse_conll_sentence(path: Path, line: int, raw: bytes | None) -> Row | None:
    """Parse a CoNLL sentence, with a token and its tag on each line (`_read_tagged_lines`).

    Columns are separated by tabs or spaces.  Lines with -DOCSTART- and comments are skipped.  A comment starts with #
    and a space, and has another number of columns than the other lines or, if all other lines have a tag, no tag.
    """
    lines = [one for one in _split_lines(raw, at=format_location(path, line)) if not one.startswith(_BEGINS_DOCUMENT)]
    others = [text for text in lines if not text.startswith("# ")]
    # A token may contain other kinds of spaces, and plain spaces if tabs separate the columns.
    tabs = bool(others) and all("\t" in text for text in others)
    cells = [text.strip(" ").split("\t") if tabs else re.split("[ \t]+", text.strip(" \t")) for text in lines]
    of_others = [row for row, text in zip(cells, lines, strict=True) if not text.startswith("# ")]
    columns, is_tagged = {len(row) for row in of_others}, all(_LIKE_TAG.fullmatch(row[-1].strip()) for row in of_others)
    places = [place for place, row in enumerate(cells) if len(row) in (columns or {len(row)})]
    tagged = {place for place in places if not is_tagged or _LIKE_TAG.fullmatch(cells[place][-1].strip())}
    cells = [row for place, row in enumerate(cells) if place in tagged or not lines[place].startswith("# ")]
    if any(len(row) < 2 for row in cells):
        raise DataError(
            format_location(path, line), "a line with a single column", "must have a token and its tag on each line"
        )
    return _read_tagged_lines(cells, at=format_location(path, line)) if cells else None


def _read_tagged_lines(cells: Sequence[Sequence[str]], *, at: str) -> Row:
    """Return a sentence's tokens and tags.

    The tags are in the last column whose cells all look like tags of a scheme, or else in the last column.  The tokens
    are in the first other column that contains no counters, offsets or identifiers (`_find_token_column`).  CoNLL-U's
    lines 3-4 and 3.1 have no token of their own.  The columns are determined from this sentence alone, because reading
    a record must not depend on other records.
    """
    lines = [row for row in cells if not re.fullmatch(r"\d+[-.]\d+", row[0])] or cells
    columns = [[cell.strip() for cell in column] for column in zip(*lines, strict=False)]
    tagged = [place for place, column in enumerate(columns) if all(map(_LIKE_TAG.fullmatch, column))]
    tag = tagged[-1] if tagged else len(columns) - 1
    others = [place for place in range(len(columns)) if place != tag]
    first = _find_token_column([columns[place] for place in others])
    if first and not tagged:
        bound = "must have tags such as B-PER and O, or only a token and its tag on each line"
        raise DataError(at, "no column of tags", bound)
    kept = lines if _is_counter(columns[0], others=len(others)) else cells
    return {"tokens": [row[others[first]] for row in kept], "tags": [row[tag].strip() for row in kept]}


def _find_token_column(columns: Sequence[Sequence[str]]) -> int:
    """Return the index of the first column of tokens, after counters, offsets and identifiers shared by all lines."""
    whole = [all(map(str.isdecimal, column)) for column in columns]
    counts = [_is_counter(column, others=len(columns)) for column in columns]
    for place, column in enumerate(columns[:-1]):
        is_id = any(map(str.isdigit, column[0])) and not whole[place] and (len(column) > 1 or whole[place + 1])
        is_shared = len({*column}) == 1 and (is_id or any(len({*other}) > 1 for other in columns[place + 1 :]))
        is_offset = whole[place] and (whole[place + 1] or (place > 0 and whole[place - 1] and not counts[place - 1]))
        if all(whole) or not (counts[place] or is_shared or is_offset):
            return place
    return len(columns) - 1


def _is_counter(column: Sequence[str], *, others: int) -> bool:
    """Whether a column counts by one from line to line, after a common prefix if any.

    A column of at most two lines must also start at 0 or 1, and needs more than one other column (`others`), or more
    than three for a single line.
    """
    hits = [re.fullmatch(r"(.*[\W_])?(\d{1,9})", cell) for cell in column]
    numbers = [int(hit[2]) for hit in hits if hit] or [-1]
    rises = len({hit and hit[1] for hit in hits}) == 1 and numbers == [*range(numbers[0], numbers[0] + len(column))]
    return rises and (len(column) > 2 or (0 <= numbers[0] < 2 and others > (1 if len(column) > 1 else 3)))


def parse_pubtator(path: Path, line: int, raw: bytes | None) -> Row:
    """Parse a PubTator document: a title and an abstract, followed by a line for each span."""
    at, parts, spans = format_location(path, line), {}, []
    for text in _split_lines(raw, at=at):
        number, mark, rest = text.partition("|")
        cells = text.split("\t")
        if mark and rest[:2] in ("t|", "a|") and "\t" not in number:
            parts[rest[0]] = rest[2:]
        elif len(cells) >= 5 and cells[1].isdecimal() and cells[2].isdecimal():
            spans.append((int(cells[1]), int(cells[2]), cells[4], cells[3]))
        elif len(cells) < 4:  # else a relation between two spans
            raise DataError(
                at,
                "an unrecognized line",
                "must start with id|t| or id|a|, or be a span with tab-separated fields (PubTator)",
            )
    if "t" not in parts:
        raise DataError(at, "no title", "must have a line id|t| (PubTator)")
    return _build_spans_row(" ".join(parts[key] for key in "ta" if key in parts), spans, at=at)


def parse_bioc(path: Path, line: int, document: Row | DataError) -> Row:
    """Convert a BioC JSON document to text with spans, with its passages joined by spaces and its offsets adapted."""
    if isinstance(document, DataError):
        raise document
    at, text, spans, begins = format_location(path, line), "", [], []
    try:
        passages: Any = document["passages"]
        for passage in passages:
            for part in [passage] if passage.get("text") else passage.get("sentences", ()):
                text += " " * bool(text)
                begins.append((part["offset"], len(text)))
                text += part["text"]
        for passage in passages:
            for part in (passage, *passage.get("sentences", ())):
                for mark in part.get("annotations", ()):
                    (place,) = mark["locations"]
                    offset, begin = max(pair for pair in begins if pair[0] <= place["offset"])
                    first = begin + place["offset"] - offset
                    spans.append((first, first + place["length"], mark["infons"]["type"], mark["text"]))
    except (AttributeError, KeyError, TypeError, ValueError):
        bound = "must have passages with offset and text, and contiguous annotations with infons.type (BioC)"
        raise DataError(at, "a document in an unsupported format", bound) from None
    return _build_spans_row(text, spans, at=at)


def list_brat_files(folder: Path) -> list[Path]:
    """List the text files of a folder in brat's format, each followed by its annotation file, sorted by name."""
    paths = sorted(folder.glob("*.ann"))
    return [file for path in paths for file in (path.with_suffix(".txt"), path)]


def read_brat(_: int, marks: Path) -> Row:
    """Read a brat document: a text file, and an annotation file with the same name."""
    at, texts = str(marks), []
    with suppress(OSError, UnicodeDecodeError):
        for file in (marks.with_suffix(".txt"), marks):
            if file.is_file() and file.stat().st_size <= MAX_BYTES:
                texts.append(read_regular_file(file).decode("utf-8-sig"))
    if len(texts) < 2:
        bound = f"must be UTF-8 of at most {MAX_BYTES} bytes, with its text in a .txt file of the same name"
        raise DataError(at, "a file that cannot be read", bound)
    spans = [line for line in texts[1].splitlines() if line.startswith("T")]
    matches = [match for match in map(_SPAN_OF_BRAT.fullmatch, spans) if match]
    if len(matches) < len(spans) or any(match[4] for match in matches):
        raise DataError(
            at, "a span in several parts, or in an unsupported format", "must be one contiguous part of the text"
        )
    # brat replaces line breaks by spaces in the text of a span.
    flat = re.sub(r"[\r\n]", " ", texts[0])
    return {
        **_build_spans_row(flat, [(int(match[2]), int(match[3]), match[1], match[5]) for match in matches], at=at),
        "text": texts[0],
    }


def _build_spans_row(text: str, spans: list[tuple[int, int, str, str]], *, at: str) -> Row:
    """Build a row with spans, after checking that each span's text matches its offsets."""
    if any(text[start:end] != snippet for start, end, _, snippet in spans):
        raise DataError(at, "a span that does not match its text", "must have offsets in characters and the exact text")
    return {"text": text, "spans": [{"start": start, "end": end, "label": label} for start, end, label, _ in spans]}


def split_at_blank_lines(path: Path) -> Cut:
    """Yield (first line, bytes) for each block between blank lines; the bytes are None if a block is too long."""
    kept: list[bytes] = []
    first = size = 0
    for number, raw in chain(cut_rows(path), [(0, b"")]):
        if raw is None or raw.strip(b" \t\r\n"):
            first = first if size else number
            size += MAX_BYTES + 1 if raw is None else len(raw)
            if raw is not None and size <= MAX_BYTES:
                kept.append(raw)
            else:
                kept.clear()
        elif size:
            yield first, b"".join(kept) if size <= MAX_BYTES else None
            kept, size = [], 0


def _split_lines(raw: bytes | None, *, at: str) -> list[str]:
    if raw is None:
        bound = f"must have at most {MAX_BYTES} bytes per record; a blank line ends a record"
        raise DataError(at, f"more than {MAX_BYTES} bytes", bound)
    return [line.rstrip("\r") for line in decode_text(raw, at=at).removesuffix("\n").split("\n")]
