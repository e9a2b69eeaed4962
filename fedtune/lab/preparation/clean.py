"""Cleaned copies of data files: dropped rows, masked identifiers, or additional columns.

Deduplication makes records depend on each other.  A site may clean its data before it declares the data's size; the
guarantee then covers the records of the new file, not the dropped records.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, cast

from fedtune.data.formats import iter_raw_rows
from fedtune.data.records import Fault, Record, parse_record
from fedtune.data.text_rows import Row
from fedtune.data.tokenization import tokenize_whole_texts
from fedtune.data.values import OPTIONAL_ROLES, is_free_text
from fedtune.formatting import convert_to_jsonable
from fedtune.lab.preparation.duplicates import Earlier, split_words
from fedtune.lab.preparation.patterns import find_damage, find_identifiers, mask_identifiers
from fedtune.model.spec import TaskModelSpec
from fedtune.process import torch
from fedtune.spec import ConfigError, DataError

RULES: Mapping[str, str] = {
    "empty": "a required value is blank or missing",
    "unusable": "a run cannot use the row, for any reason",
    "duplicates": "an earlier row has the same text and answer",
    "near-duplicates": "an earlier row has almost the same text and the same answer",
    "personal": "a text contains a likely personal identifier",
    "damaged": "the encoding of a text is damaged",
}
"""Rules for dropping rows.  Unreadable rows are always dropped, because they cannot be written to the new file."""
UNREADABLE = "unreadable"
_MAX_TOKENS = 256  # a topic is determined from this many tokens of a text


class Cleaning:
    """The rules for dropping rows (from `RULES`), and the masking of identifiers.

    `columns` maps roles to columns; `named` also contains columns of settings that the run does not read. Texts with
    span annotations cannot be masked.
    """

    def __init__(
        self, columns: Mapping[str, str], fault: Fault, *, drop: Collection[str], mask: bool, named: Mapping[str, str]
    ) -> None:
        if mask and (marks := {"tags", "spans"} & {*columns, *named}):
            bound = f"is not available for annotated texts (role {min(marks)}): masking would shift the annotations"
            raise ConfigError("--mask", "personal", bound)
        self.drop, self.mask = drop, mask
        self._columns, self._fault = columns, fault
        self._as_it_is = {column for role, column in {**named, **columns}.items() if not is_free_text(role)}
        self._earlier = Earlier(alike="near-duplicates" in drop)

    def drop_reasons(self, row: Row | DataError, *, file: str, line: int) -> Iterator[str]:
        """Yield the rules by which a row is dropped; only the first rule is reported."""
        if isinstance(row, DataError):
            yield UNREADABLE
            return
        try:
            record = parse_record(row, self._columns, file=file, line=line)
        except DataError:
            needed = [row.get(column) for role, column in self._columns.items() if role not in OPTIONAL_ROLES]
            if any(value is None or (isinstance(value, str) and not value.strip()) for value in needed):
                yield "empty"
            yield "unusable"
            return
        if self._fault(record) is not None:
            yield "unusable"
        texts = [text for _, text in record.texts()]
        if "personal" in self.drop and any(map(find_identifiers, texts)):
            yield "personal"
        if "damaged" in self.drop and any(any(find_damage(text)) for text in texts):
            yield "damaged"
        if not {"duplicates", "near-duplicates"} & set(self.drop):
            return
        # Last: a dropped record does not count as an earlier record.
        twins = self._earlier.find_twins(record)
        for rule, some in (("duplicates", twins["same"]), ("near-duplicates", twins["alike"])):
            if any(twin.answer == record.target_key for twin in some):
                yield rule

    def transform_row(self, row: Row, kinds: Counter[str]) -> Row:
        """Mask the identifiers in a row's texts; answers, features, sites and users stay unchanged."""

        def mask_text(value: str) -> str:
            text, found = mask_identifiers(value)
            kinds.update(found)
            return text

        def mask_number(digits: str) -> int | str:
            text = mask_text(digits)
            return int(digits) if text == digits else text

        def inner(value: Any) -> Any:
            match value:
                case list():
                    return [inner(one) for one in value]
                case dict():
                    return {key: inner(one) for key, one in value.items()}
                case str() if value.lstrip().startswith(("[", "{")):
                    # Mask the strings and integers (possible phone numbers) in a JSON text, so that it remains JSON.
                    with suppress(ValueError, RecursionError):
                        json.loads(value)  # an invalid JSON text is masked as plain text
                        before = kinds.total()
                        inside = inner(json.loads(value, parse_int=mask_number))
                        return json.dumps(inside, ensure_ascii=False) if kinds.total() > before else value
            return mask_text(value) if isinstance(value, str) else value

        return {column: value if column in self._as_it_is else inner(value) for column, value in row.items()}


class Coding(Cleaning):
    """The coding of records: a new column `topic` with the most similar text of a public list, and `length`, a range of
    words.

    Guarantee: a record's codes depend only on its own texts, the list, the model and the bounds. The model processes
    one record at a time, so that even rounding is independent of other records. Adding or removing a record in the
    original file adds or removes one row in the new file; therefore a run's guarantee for the new file also covers the
    original file.

    Args:
        columns: role to column, for the texts to encode.
        votes: a model of task votes with the topics as candidates; None: no topics.
        tokenizer: the model's tokenizer; a text without tokens is read as token 0.
        bounds: maximum word counts of all length classes except the last, ascending.
    """

    def __init__(
        self, columns: Mapping[str, str], votes: TaskModelSpec | None, tokenizer: Any, *, bounds: Sequence[int]
    ) -> None:
        super().__init__(columns, lambda record: None, drop=("empty", "unusable"), mask=True, named={})
        self.codes: dict[str, tuple[str, ...]] = {}
        self._tokenizer, self._bounds = tokenizer, bounds
        if votes is not None:
            from fedtune.model.compatibility import get_max_positions
            from fedtune.tasks.task_model import build_task_model

            self.codes["topic"], self._model = votes.labels, cast(Any, build_task_model(votes))
            self._most = min(_MAX_TOKENS, get_max_positions(self._model.base.get_base_model()) or _MAX_TOKENS)
        if bounds:
            between = (f"{low + 1} to {high} words" for low, high in pairwise(bounds))
            self.codes["length"] = (f"up to {bounds[0]} words", *between, f"over {bounds[-1]} words")

    def transform_row(self, row: Row, kinds: Counter[str]) -> Row:
        """Return the row with its codes.

        Raises:
            ConfigError: the row already has a column `topic` or `length`.
        """
        record, places = parse_record(row, self._columns, file="", line=0), dict[str, int]()
        if "topic" in self.codes:
            said, within = [(Record({"text": record.full_text}), ("text",))], self._model.num_ids
            (ids,), _ = tokenize_whole_texts(said, self._tokenizer, max_length=self._most, lenient_within=within)
            alone = torch.from_numpy(ids)[None]
            with torch.no_grad():
                embedding = self._model.task.embed(self._model, alone, torch.ones_like(alone))
            places["topic"] = int((embedding @ self._model.get_buffer("candidates").T).argmax())
        if "length" in self.codes:
            places["length"] = bisect_left(self._bounds, sum(word is not None for word in split_words(record)))
        for column in places.keys() & row.keys():
            bound = "already has this column: rename it, because the new column gets this name"
            raise ConfigError("FILE", column, bound)
        found = {column: self.codes[column][place] for column, place in places.items()}
        kinds.update(f"{column}: {code}" for column, code in found.items())
        return {**row, **found}


@dataclass(kw_only=True, slots=True)
class Cleaned:
    """The result of a cleaning: rows `dropped` by rule, and `masked` identifiers by kind (for a `Coding`, rows by
    code).
    """

    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    masked: Counter[str] = field(default_factory=Counter)


def clean(path: Path, stream: BinaryIO, cleaning: Cleaning) -> Cleaned:
    """Write the kept rows of a file to a stream as JSON Lines, with the file's column names.

    Raises:
        DataError: the file cannot be read, or no row is kept.
    """
    done = Cleaned()
    for line, row in iter_raw_rows(path):
        reasons = cleaning.drop_reasons(row, file=str(path), line=line)
        rule = next((one for one in reasons if one in (UNREADABLE, *cleaning.drop)), None)
        if rule is not None or isinstance(row, DataError):
            done.dropped[str(rule)] += 1
            continue
        # Values without a JSON type, such as dates, become text, and NaN becomes null.
        written = convert_to_jsonable(cleaning.transform_row(row, done.masked) if cleaning.mask else row)
        try:
            stream.write(f"{json.dumps(written, ensure_ascii=False, default=str)}\n".encode())
        except UnicodeEncodeError:  # an unpaired surrogate in an unused column
            stream.write(f"{json.dumps(written, default=str)}\n".encode())
        done.kept += 1
    if not done.kept:
        bound = "must have at least one row that passes all rules: drop fewer rules from --drop"
        raise DataError(str(path), "no row is kept", bound)
    return done
