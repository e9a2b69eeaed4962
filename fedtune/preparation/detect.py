"""What a data file is: the kind of training that its columns suit, and why.

This reads a file to tell its owner about it.  What it finds goes into an experiment that the owner reads before
anybody else does; no run and no site calls it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fedtune.data.formats import format_of, raw_rows
from fedtune.data.text_rows import Row
from fedtune.data.values import said_of, turns_said
from fedtune.preparation.columns import LONGEST_LABEL, MOST_LABELS, Column
from fedtune.spec import ConfigError, DataError
from fedtune.words import counted

Kind = Literal[
    "labelled", "tagged", "rated", "pairs", "instructions", "chat", "preferences", "scored", "triplets", "text"
]
KINDS: Mapping[Kind, str] = {
    "labelled": "texts with a label",
    "tagged": "texts with several labels",
    "rated": "texts with a number",
    "pairs": "prompts with their completion",
    "instructions": "instructions with their output (Alpaca)",
    "chat": "conversations",
    "preferences": "prompts with two answers, of which one is preferred",
    "scored": "pairs of texts with a score of how alike they are",
    "triplets": "texts, each with one that belongs to it and one that does not",
    "text": "plain texts",
}
SHOWN_ROWS = 5
_LABELS = (
    *("label", "labels", "category", "class", "intent", "topic", "team"),
    *("sentiment", "target", "type", "tag", "tags"),
)
_NUMBERS = ("target", "score", "rating", "stars", "label", "value", "price", "amount", "grade", "points", "similarity")
_PROMPTS = ("prompt", "question", "query", "source", "input", "mr", "document", "context")
_COMPLETIONS = ("completion", "response", "answer", "output", "target", "ref", "summary", "reply", "chosen")
_ALIKE = (("sentence1", "sentence2"), ("text1", "text2"), ("sentence_a", "sentence_b"), ("question1", "question2"))
_SCORES = ("score", "similarity", "similarity_score", "relatedness", "relatedness_score", "is_duplicate")
_TRIPLETS = (("anchor", "query", "question"), ("positive", "pos"), ("negative", "neg"))
_CHATS = ("messages", "conversations", "conversation")
_PEOPLE = (
    *("user", "user_id", "userid", "author", "speaker", "patient", "patient_id", "customer", "customer_id"),
    *("client", "client_id", "person", "person_id", "member", "member_id", "employee", "employee_id"),
)
"""What a column is called that says whose a record is."""
_PLACES = frozenset(
    {"site", "org", "organisation", "organization", "institution", "branch", "hospital", "bank", "clinic", "centre"}
    | {"center", "facility", "company", "standort", "klinik", "filiale"}
)
"""Words in the name of a column that says where a record is."""
_IDS = ("id", "uuid", "index", "idx", "key")


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """What a file is.

    Attributes:
        path: the file.
        rows: that can be read.
        faults: what is wrong with the others, of which the first few are kept; `num_faults` counts all.
        columns: by name.
        first: the first rows.
        kind: of training.
        roles: role to column; `user` where a column says whose each record is.
        why: why this kind and these columns, as sentences.
    """

    path: Path
    rows: int
    faults: tuple[DataError, ...]
    num_faults: int
    columns: Mapping[str, Column]
    first: tuple[Row, ...]
    kind: Kind
    roles: Mapping[str, str]
    why: tuple[str, ...]

    @property
    def labels(self) -> dict[str, int]:
        """How many records each label has, most first; empty where the kind has none."""
        if "labels" in self.roles:
            column = self.columns[self.roles["labels"]]
            return dict(column.parts[column.separator or "["].most_common())
        name = self.roles.get("label")
        return {} if name is None else dict(self.columns[name].values.most_common())

    @property
    def settings(self) -> dict[str, Any]:
        """What an experiment's `data` says of the answers, beside their labels."""
        if "target" in self.roles:
            return {"target_range": self.columns[self.roles["target"]].scale}
        separator = self.columns[self.roles["labels"]].separator if self.kind == "tagged" else None
        return {"label_separator": separator} if separator not in (None, "[") else {}


def look_at(path: Path, chosen: Mapping[str, str]) -> Found:
    """Read a file once and say what it is.

    Args:
        path: the file.
        chosen: option (text, label, prompt, completion, other, score) to column, where the person at the keyboard says
            so.

    Raises:
        DataError: it cannot be read, or holds no row or no column of text.
        ConfigError: a column that was chosen is not there or does not suit its role.
    """
    columns: dict[str, Column] = {}
    first: list[Row] = []
    faults: list[DataError] = []
    rows = num_faults = 0
    for _, row in raw_rows(path):
        if isinstance(row, DataError):
            num_faults += 1
            faults += [row] if num_faults <= SHOWN_ROWS else []
            continue
        rows += 1
        first += [row] if rows <= SHOWN_ROWS else []
        for name, value in row.items():
            columns.setdefault(name, Column(name)).note(value)
    if not rows:
        raise faults[0] if faults else DataError(str(path), "no rows", "must hold at least one record")
    if not chosen and format_of(path) in (".csv", ".tsv"):
        _require_header(columns, path)
    kind, roles, why = _chosen(columns, chosen) if chosen else _guessed(columns, first, path)
    person = _named(columns, _PEOPLE)
    if person is not None and person not in roles.values() and columns[person].is_id and columns[person].filled == rows:
        roles, why = roles | {"user": person}, (*why, f"Column {person} says whose a record is.")
    return Found(
        path=path,
        rows=rows,
        faults=tuple(faults),
        num_faults=num_faults,
        columns=columns,
        first=tuple(first),
        kind=kind,
        roles=roles,
        why=why,
    )


def _require_header(columns: Mapping[str, Column], path: Path) -> None:
    """Refuse a table whose first row looks like a record: its texts would become the names of the columns."""
    for number, column in enumerate(columns.values(), 1):
        if column.values[column.name.strip()] > 0:
            found, bound = "among its own values", "must be in a header with names, or choose with --text and --label"
            raise DataError(f"{path}: the name of column {number}", found, bound)


_Guess = tuple[Kind, dict[str, str], tuple[str, ...]]


def _chosen(columns: Mapping[str, Column], chosen: Mapping[str, str]) -> _Guess:
    """The kind that the chosen columns say; a text beside a label is found where it was not named."""
    for role, name in chosen.items():
        if name not in columns:
            raise ConfigError(f"--{role}", name, f"must be one of the columns {_listed(columns)}")
    if len(set(chosen.values())) < len(chosen):
        role, name = list(chosen.items())[-1]
        raise ConfigError(f"--{role}", name, "must be another column than the other options name")
    said = tuple(f"--{role}: {name}" for role, name in chosen.items())
    if "other" in chosen or "score" in chosen:
        if set(chosen) != {"text", "other", "score"}:
            raise ConfigError("--score", chosen.get("score"), "goes with --text and --other, and with no other column")
        if not columns[chosen["score"]].is_number:
            raise ConfigError("--score", chosen["score"], "must hold numbers in every row, and not always the same")
        return "scored", {"text": chosen["text"], "other": chosen["other"], "target": chosen["score"]}, said
    if "prompt" in chosen or "completion" in chosen:
        if len(chosen) != 2 or set(chosen) != {"prompt", "completion"}:
            raise ConfigError("--prompt", chosen.get("prompt"), "goes with --completion, and with no other column")
        return "pairs", dict(chosen), said
    if "label" not in chosen:
        return "text", dict(chosen), (*said, "Without --label its texts alone are learnt.")
    label = columns[chosen["label"]]
    text = chosen.get("text") or _longest(columns, but=label.name)
    if text is not None and label.separator is not None:
        return "tagged", {"text": text, "labels": label.name}, said
    if text is not None and label.is_number and not label.is_label:
        return "rated", {"text": text, "target": label.name}, said
    if not 2 <= len(label.values) <= MOST_LABELS:
        bound = f"must have 2 to {MOST_LABELS} different texts or whole numbers of at most {LONGEST_LABEL} characters"
        raise ConfigError("--label", label.name, bound)
    if text is None:
        raise ConfigError("--label", label.name, "needs a column of text beside it")
    return "labelled", {"text": text, "label": label.name}, said


def _guessed(columns: Mapping[str, Column], first: Sequence[Row], path: Path) -> _Guess:
    """The first kind that the columns fit: names that data sets share come before what values look like."""
    guesses: tuple[Callable[[], _Guess | None], ...] = (
        lambda: _as_preferences(columns, first),
        lambda: _as_chat(columns, first),
        lambda: _as_instructions(columns),
        lambda: _as_triplets(columns),
        lambda: _as_scored(columns),
        lambda: _as_pairs(columns),
        lambda: _as_tagged(columns),
        lambda: _as_classification(columns),
        lambda: _as_rated(columns),
        lambda: _as_text(columns),
    )
    for guess in guesses:
        if (found := guess()) is not None:
            return found
    raise DataError(str(path), f"columns {_listed(columns) or 'without a name'}", "must hold a column of text")


def _as_chat(columns: Mapping[str, Column], first: Sequence[Row]) -> _Guess | None:
    name = _named(columns, _CHATS)
    if name is None or not any(_is_conversation(row.get(name)) for row in first):
        return None
    return "chat", {"messages": name}, (f"Column {name} holds turns of a conversation.",)


def _as_instructions(columns: Mapping[str, Column]) -> _Guess | None:
    prompt, completion = (_named(columns, (name,)) for name in ("instruction", "output"))
    if prompt is None or completion is None:
        return None
    extra = {role: name for role in ("input", "system") if (name := _named(columns, (role,))) is not None}
    roles = {"prompt": prompt, **extra, "completion": completion}
    return "instructions", roles, _has(roles)


def _as_preferences(columns: Mapping[str, Column], first: Sequence[Row]) -> _Guess | None:
    chosen, rejected = (_named(columns, (name,)) for name in ("chosen", "rejected"))
    if chosen is None or rejected is None:
        return None
    answers = {"chosen": chosen, "rejected": rejected}
    turns = next((found for row in first if (found := _turns(row.get(chosen)))), [])
    if not (turns or columns[chosen].is_text):
        return None
    if turns and turns[0]["role"] != "assistant":  # whole ones: what stands beside them repeats how they begin
        return "preferences", answers, _has(answers)
    beside = [
        name
        for role in ("instruction", *_PROMPTS, *_CHATS)
        if (name := _named(columns, (role,))) and any(_is_conversation(row.get(name)) for row in first) == bool(turns)
    ]
    if not beside:
        kind = "turns of a conversation" if turns else "text"
        bound = f"must stand beside what they answer, {kind} in a column prompt; or choose one to learn with --text"
        raise DataError(f"columns {chosen} and {rejected}", f"answers in {kind}, and no prompt", bound)
    roles = {"messages": beside[0]} if turns else {"prompt": beside[0]}
    for role in () if turns else ("input", "system"):
        if (name := _named(columns, (role,))) not in (None, beside[0]):
            roles[role] = str(name)
    return "preferences", roles | answers, _has(roles | answers)


def _turns(value: object) -> list[dict[str, str]]:
    """Those of an answer; none where it is a text, or nothing that can be read."""
    try:
        return turns_said(said_of(value, "")) or []
    except DataError:
        return []


def _as_triplets(columns: Mapping[str, Column]) -> _Guess | None:
    found = [name for names in _TRIPLETS if (name := _named(columns, names)) is not None and columns[name].is_text]
    if len(found) < len(_TRIPLETS):
        return None
    roles = dict(zip(("anchor", "positive", "negative"), found, strict=True))
    return "triplets", roles, _has(roles)


def _as_scored(columns: Mapping[str, Column]) -> _Guess | None:
    score = _named(columns, _SCORES)
    if score is None or not columns[score].is_number:
        return None
    for names in _ALIKE:
        text, other = (_named(columns, (name,)) for name in names)
        if text is not None and other is not None and columns[text].is_text and columns[other].is_text:
            low, high = columns[score].scale
            why = f"Column {score} has numbers, which a scale from {low:g} to {high:g} holds, for {text} and {other}."
            return "scored", {"text": text, "other": other, "target": score}, (why,)
    return None


def _as_pairs(columns: Mapping[str, Column]) -> _Guess | None:
    prompt = _named(columns, _PROMPTS)
    completion = _named({name: one for name, one in columns.items() if name != prompt}, _COMPLETIONS)
    if prompt is None or completion is None or not (columns[prompt].is_text and columns[completion].is_text):
        return None
    if columns[completion].is_label and columns[completion].name.lower() == "target":
        return None
    roles = {"prompt": prompt, "completion": completion}
    return "pairs", roles, _has(roles)


def _as_classification(columns: Mapping[str, Column]) -> _Guess | None:
    few = [one for one in columns.values() if one.is_label and one.name.lower() not in _PEOPLE]
    label = next((one for name in _LABELS for one in few if one.name.lower() == name), None)
    label = label or min(few, key=lambda one: (is_place(one.name), len(one.values), one.name), default=None)
    text = None if label is None else _longest(columns, but=label.name)
    if label is None or text is None:
        return None
    values, rows = counted(len(label.values), "value"), counted(label.filled, "row")
    why = [f"Column {label.name} has {values} in {rows}, so it is the label; {text} has the longest texts."]
    others = [one.name for one in few if one.name != label.name and not is_place(one.name)]
    if others:
        why.append(f"Other columns with few values: {', '.join(others)}. Choose with --label COLUMN --text COLUMN.")
    if label.is_number and len(label.values) > 2:
        why.append("Its labels are numbers: if their order matters, build on own_order in place of own_data.")
    return "labelled", {"text": text, "label": label.name}, tuple(why)


def _as_tagged(columns: Mapping[str, Column]) -> _Guess | None:
    several = {name: one for name, one in columns.items() if one.separator is not None}
    labels = _named(several, _LABELS) or next((name for name, one in several.items() if one.separator == "["), None)
    text = None if labels is None else _longest(columns, but=labels)
    if labels is None or text is None:
        return None
    mark = several[labels].separator
    how = "lists" if mark == "[" else f"texts with {mark} between them"
    return "tagged", {"text": text, "labels": labels}, (f"Column {labels} holds several labels, as {how}.",)


def _as_rated(columns: Mapping[str, Column]) -> _Guess | None:
    numbers = {name: one for name, one in columns.items() if one.is_number and not one.is_label}
    target = _named(numbers, _NUMBERS)
    text = None if target is None else _longest(columns, but=target)
    if target is None or text is None:
        return None
    one = numbers[target]
    return "rated", {"text": text, "target": target}, (f"Column {target} holds numbers, {one.low:g} to {one.high:g}.",)


def _as_text(columns: Mapping[str, Column]) -> _Guess | None:
    text = _longest({name: one for name, one in columns.items() if not (one.is_label and name.lower() in _LABELS)})
    if text is None:
        return None
    others = [one.name for one in columns.values() if one.is_text and one.name.lower() not in (text.lower(), *_PEOPLE)]
    why = [f"Column {text} has the longest texts, and no label stands beside it."]
    named = (columns[name] for name in columns if name.lower() in _LABELS)
    why += [
        f"Column {one.name} is no label: labels are texts or whole numbers, and it holds {', '.join(one.types)}."
        for one in named
        if one.filled and not set(one.types) <= {"text", "whole number"}
    ]
    if others:
        why.append(f"Other columns of text: {', '.join(others)}. Choose with --prompt COLUMN --completion COLUMN.")
    return "text", {"text": text}, tuple(why)


def _longest(columns: Mapping[str, Column], but: str = "") -> str | None:
    """The column with the longest texts."""
    texts = [one for one in columns.values() if one.is_text and one.name != but]
    texts = [one for one in texts if one.name.lower() not in (*_IDS, *_PEOPLE)]
    most = max((one.filled for one in texts), default=0)
    texts = [one for one in texts if 2 * one.filled >= most]  # a remark that few rows have is not what they are about
    return max(texts, key=lambda one: one.mean_characters).name if texts else None


def _has(roles: Mapping[str, str]) -> tuple[str]:
    return (f"It has the columns {', '.join(roles.values())}.",)


def _listed(columns: Iterable[str]) -> str:
    """Names of columns for a message: a file may have thousands, and without a header they are texts."""
    names = [name if len(name) <= LONGEST_LABEL else f"{name[: LONGEST_LABEL - 1]}\u2026" for name in columns]
    return ", ".join([*names[:10], *([f"and {len(names) - 10} more"] if len(names) > 10 else [])])


def _named(columns: Iterable[str], names: Sequence[str]) -> str | None:
    """The column with the first of these names, in any case of letters."""
    by_name = {name.lower(): name for name in columns}
    return next((by_name[name] for name in names if name in by_name), None)


def is_place(name: str) -> bool:
    """Whether a column's name says that it names places, such as `hospital_id`."""
    return not _PLACES.isdisjoint(re.split(r"[^a-z]+", name.lower()))


def _is_conversation(value: object) -> bool:
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return False
    if not isinstance(value, Sequence) or isinstance(value, str):
        return False
    return bool(value) and all(isinstance(turn, Mapping) and {"role", "from"} & set(turn) for turn in value)
