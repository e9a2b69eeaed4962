"""Texts whose parts are marked: tokens with a tag each, or a text with spans."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping

from fedtune.data.lists import as_json, listed_in, rows_of
from fedtune.data.text_rows import json_type
from fedtune.spec import DataError

TAG = re.compile(r"(?:([BIOESLUM])[-_])?(.+)", re.DOTALL)
"""A token's tag: the letter of a scheme, and the type."""
BEGINS, ENDS = frozenset("BSU"), frozenset("ELSU")
"""Letters of the tags of an entity's first and last token (IOB2, BILOU, BIOES)."""


def words_of(value: object, at: str, role: str = "tokens") -> str:
    """The tokens of a record, or their tags, one a line; they are a list, which may also be text, as for `labels_of`.

    Raises:
        DataError: it is no list of at least one text or whole number.
    """
    listed = listed_in(value)
    if not listed or not all(isinstance(one, str) or type(one) is int for one in listed):
        found = "text that is no list" if listed is None else json_type(value) if listed else "an empty list"
        raise DataError(at, found, f"must be a list of texts (role {role})")
    return "\n".join(" ".join(str(one).split()) for one in listed)


def spans_of(value: object, at: str) -> str:
    """The marked parts of a text as a JSON list of [first, end, label], `end` exclusive; none is fine.

    They are such lists (doccano), or objects with `start` and `end` (Prodigy), `start_offset` and `end_offset`
    (doccano), and `label`; or what Label Studio exports, whole or as its JSON_MIN: with a list `labels`.  Its offsets
    count the units of UTF-16, and a fourth value says so.  Of several people's annotations there the first counts.

    Raises:
        DataError: it is no list, or one in it has no first, end or label.
    """
    listed = listed_in(rows_of(value))
    if listed is None:
        raise DataError(at, "text that is no list", "must be a list of spans with start, end and label (role spans)")
    results = [one["result"] for one in listed if isinstance(one, dict) and isinstance(one.get("result"), list)]
    if results:
        parts = [one["value"] for one in results[0] if isinstance(one, dict) and isinstance(one.get("value"), dict)]
        listed = [one for one in parts if "labels" in one]  # others are choices and relations
    found = []
    for number, one in enumerate(listed, 1):
        given = one
        if isinstance(one, dict):
            given = [one.get(key, one.get(f"{key}_offset")) for key in ("start", "end")]
            labels = one.get("labels")
            given += labels if isinstance(labels, list) and len(labels) == 1 else [one.get("label")]
        if not isinstance(given, list) or [type(part) for part in given] != [int, int, str]:
            bound = "must have start and end, whole numbers, and label, a text (role spans)"
            raise DataError(f"{at}, span {number}", json_type(one), bound)
        found.append([*given, "utf-16"] if isinstance(one, dict) and "labels" in one else given)
    return as_json(found)


def breaks_scheme(tags: str) -> bool:
    """Whether a record's tags go on with an entity that none before them began."""
    begun = None
    for tag in tags.split("\n"):
        part = TAG.fullmatch(tag) if tag != "O" else None
        if part and part[1] and part[1] in "ILEM" and part[2] != begun:
            return True
        begun = part[2] if part and (part[1] or "B") not in ENDS else None
    return False


def entity_types(fields: Mapping[str, str]) -> dict[str, int]:
    """The types that a record's tags or spans name, in their order, with how many of them do."""
    if "tags" in fields:
        parts = (TAG.fullmatch(tag) for tag in fields["tags"].split("\n") if tag != "O")
        return dict(Counter(part[2] for part in parts if part and (part[1] or "B") in BEGINS))
    return dict(Counter(span[2] for span in json.loads(fields.get("spans", "[]"))))
