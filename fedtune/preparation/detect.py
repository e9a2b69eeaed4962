"""The kind of training that the columns of a data file suit, and why.

This reads a file to tell its owner about it.  What it finds goes into an experiment that the owner reads before
anybody else does; no run and no site calls it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter, methodcaller
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

from fedtune.data.formats import format_of, raw_rows
from fedtune.data.text_rows import Row
from fedtune.data.values import speaker_of
from fedtune.preparation import columns as called
from fedtune.preparation.columns import LONGEST_LABEL, NAMES, Column, is_of_records, is_person, key_of, person_of
from fedtune.preparation.patterns import OddTexts
from fedtune.spec import ConfigError, DataError
from fedtune.words import counted

Kind = Literal[
    "table", "images", "labelled", "tagged", "rated", "followed", "entities", "pairs", "instructions", "chat",
    "preferences", "scored", "triplets", "text",
]  # fmt: skip
KINDS: Mapping[Kind, Sequence[str]] = called.WORDS["kind"]
"""In words, and the experiment of conf/ that such records begin in."""
SHOWN_ROWS = 5

Columns: TypeAlias = Mapping[str, Column]


class _Part(NamedTuple):
    """A column that a kind of file has."""

    role: str  # of fedtune
    names: Sequence[str]  # that it may have, the usual first
    fits: Callable[[Column], bool]  # whether its values suit
    bound: str = "must hold texts"  # what they must be, as the end of a message
    optional: bool = False  # whether the kind can do without it


_is_text: Callable[[Column], bool] = attrgetter("is_text")
_is_chat: Callable[[Column], bool] = methodcaller("nearly", "messages")
_SYSTEM = _Part("system", ("system", "systemprompt"), _is_text, optional=True)
_CONTEXT = _Part("input", NAMES["contexts"], lambda one: one.is_text or not one.filled, optional=True)
_PROMPT, _TURNS = _Part("prompt", NAMES["prompts"], _is_text), "must hold turns of a conversation"
_COMPLETION = _Part("completion", NAMES["completions"], _is_text)
_SCORE = _Part(
    "target",
    (*NAMES["scores"], "label", "target"),
    lambda one: one.is_number and (key_of(one.name) in NAMES["scores"] or not one.is_label),
    "must hold numbers, and not always the same",
)
_FOLLOWED = (
    _Part("time", NAMES["times"], lambda one: one.is_number, "must hold numbers"),
    _Part("event", NAMES["events"], lambda one: one.is_event, "must hold 1 or true where it came, else 0 or false"),
)


def _answers(fits: Callable[[Column], bool], bound: str) -> tuple[_Part, ...]:
    return tuple(_Part(role, (role, f"{role}response"), fits, bound) for role in ("chosen", "rejected"))


def _texts(**names: str) -> tuple[_Part, ...]:
    return tuple(_Part(role, some.split(), _is_text) for role, some in names.items())


def _marked(role: str, names: Sequence[str]) -> _Part:
    return _Part(role, names, lambda one: one.nearly(role) and bool(one.entities), f"must hold lists of {role}")


_IMAGE = _Part("image", NAMES["images"], lambda one: one.nearly("image"), "must hold paths of images, or images")
_ASKED = NAMES["prompts"] + NAMES["chats"]
_ALONE = "what else this file has: a label, a score, or --time and --event stand beside a text, an image or a table"
_INPUTS, _TIMED = frozenset({"text", "image"}), frozenset({"time", "event"})
_ANSWERS = (frozenset({"label"}), frozenset({"target"}), _TIMED)
"""What may be chosen of an answer, be it to a text, an image or a table; several labels are chosen as one is."""
_LAYOUTS: tuple[tuple[Kind, tuple[_Part, ...]], ...] = (
    ("entities", (_Part("tokens", NAMES["tokens"], lambda one: one.nearly("tokens")), _marked("tags", NAMES["tags"]))),
    ("entities", (_Part("text", (*NAMES["texts"], "data"), _is_text), _marked("spans", NAMES["spans"]))),
    ("preferences", _answers(lambda one: one.nearly("whole chat"), "must hold whole conversations")),
    ("preferences", (_Part("messages", _ASKED, _is_chat, _TURNS), *_answers(_is_chat, _TURNS))),
    ("preferences", (_PROMPT, _CONTEXT, _SYSTEM, *_answers(_is_text, "must hold texts"))),
    ("chat", (_Part("messages", NAMES["chats"], _is_chat, _TURNS), _SYSTEM)),
    ("triplets", _texts(anchor="anchor query question", positive="positive pos", negative="negative neg")),
    *(("scored", (*_texts(text=one, other=other), _SCORE)) for one, other in called.ALIKE),
    ("pairs", (*_texts(prompt="user human prompt"), _SYSTEM, *_texts(completion="assistant gpt bot model"))),
    # What is asked of a text is answered in words, however few the answers are.
    ("pairs", (_PROMPT, _CONTEXT._replace(fits=_is_text, optional=False), _SYSTEM, _COMPLETION)),
    ("pairs", (_PROMPT, _CONTEXT, _SYSTEM, _COMPLETION._replace(fits=lambda one: one.is_completion))),
)
"""Files that are known by the names of their columns; the first that fits counts."""
OPTIONS: Mapping[str, str] = {
    **{role: role for role in ("text", "label", "prompt", "completion", "system", "messages", "chosen", "rejected")},
    **{role: role for role in ("tokens", "tags", "spans", "time", "event", "image")},
    **{role: role for role in ("anchor", "positive", "negative", "other", "user")},
    "context": "input",
    "score": "target",
}
"""Role of a column: on the command line, and in settings."""
_OPTION_OF = {role: option for option, role in OPTIONS.items()} | {"labels": "label"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """The kind of a file and the roles of its columns."""

    path: Path
    rows: int  # that can be read
    # what is wrong with the others, of which the first few are kept; `num_faults` counts all
    faults: Sequence[DataError]
    num_faults: int
    columns: Columns
    first: Sequence[Row]
    kind: Kind
    roles: Mapping[str, str]  # role to column; `user` where a column says whose each record is
    why: Mapping[str, str]  # by role, why this column has it
    notes: tuple[str, ...]  # what else the person should know of the columns
    features: tuple[str, ...] = ()  # columns of a table that are a record's vector

    @property
    def labels(self) -> dict[str, int]:
        """How many values are each label, or entities of each type, most first; empty where the kind has none."""
        if marks := self.roles.get("tags") or self.roles.get("spans"):
            return dict(self.columns[marks].entities.most_common())
        if "labels" in self.roles:
            column = self.columns[self.roles["labels"]]
            return dict(column.parts[column.separator or "["].most_common())
        return dict(self.columns[self.roles["label"]].labels.most_common()) if "label" in self.roles else {}

    @property
    def settings(self) -> dict[str, Any]:
        """Settings of `data` about the answers, beside their labels."""
        if "target" in self.roles:
            return {"target_range": self.columns[self.roles["target"]].scale}
        separator = self.columns[self.roles["labels"]].separator if "labels" in self.roles else None
        return {"label_separator": separator} if separator not in (None, "[") else {}

    @property
    def options(self) -> Iterator[tuple[str, str, str, str]]:
        """(role, column, why, what chooses another) of each role."""
        for role, name in self.roles.items():
            yield role, name, self.why[role], f"--{_OPTION_OF[role]} COLUMN"

    @property
    def unread(self) -> Iterator[tuple[str, str]]:
        """(column, why) of each that no run reads."""
        for one in self.columns.values():
            if one.name not in (*self.roles.values(), *self.features):
                yield one.name, called.why_unread(one, teaches=bool({"prompt", "messages"} & set(self.roles)))
            elif one.nearly("messages"):
                yield from ((f"{one.name}: {key}", "no run reads it in a turn") for key in one.beside)


def look_at(path: Path, chosen: Mapping[str, str], *, by_person: bool = True) -> Found:
    """Read a file once and say what it is.

    `chosen` is option (one of `OPTIONS`) to column, as a person says; `by_person`: a column that looks like persons is
    taken for the unit.  A DataError is about the file, a ConfigError about what was chosen.
    """
    columns: dict[str, Column] = {}
    first: list[Row] = []
    faults: list[DataError] = []
    rows = num_faults = 0
    odd = OddTexts(format_of(path))
    for number, (line, row) in enumerate(raw_rows(path), 1):
        if isinstance(row, DataError):
            num_faults += 1
            faults += [row] if num_faults <= SHOWN_ROWS else []
            continue
        rows += 1
        odd.note(row, line)
        first += [row] if rows <= SHOWN_ROWS else []
        for name, value in row.items():
            columns.setdefault(name, Column(name)).note(value, number)
    if not rows:
        raise faults[0] if faults else DataError(str(path), "no rows", "must hold at least one record")
    if not chosen and format_of(path) in (".csv", ".tsv"):
        _require_header(columns, path)
    for option, name in chosen.items():
        if name not in columns:
            raise ConfigError(f"--{option}", name, f"must be one of the columns {_listed(columns)}")
    if len(set(chosen.values())) < len(chosen):
        option, name = list(chosen.items())[-1]
        raise ConfigError(f"--{option}", name, "must be another column than the other options name")
    if "user" in chosen and not columns[chosen["user"]].is_id:
        raise ConfigError("--user", chosen["user"], "must have an id of one person in its rows: a text or whole number")
    made = _Guess(columns, {OPTIONS[option]: name for option, name in chosen.items() if option != "user"}, path).made()
    roles, why, user = dict(made.roles), dict(made.why), chosen.get("user")
    if by_person:  # where a column says whose a record is, the first that does
        people = [one for one in columns.values() if one.name not in roles.values() and is_person(one)]
        names = [one.name for one in sorted(people, key=lambda one: (person_of(one.name), one.name))]
        if user or names:
            roles["user"] = user or names[0]
            why["user"] = "chosen" if user else "its name: whose a record is (--unit record protects each record alone)"
    features = tuple(name for name in made.features if name not in roles.values())
    made = made._replace(roles=roles, why=why, notes=(*made.notes, *odd.notes()), features=features)
    return Found(
        path=path, rows=rows, faults=faults, num_faults=num_faults, columns=columns, first=first, **made._asdict()
    )


def _require_header(columns: Columns, path: Path) -> None:
    """Refuse a table whose first row looks like a record: its texts would become the names of the columns.

    One of them is then among the column's own values, and the texts' own header is as long as a text; a class may be
    called as its column is.
    """
    if sum(one.filled > 0 for one in columns.values() if one.name.startswith("(column ")) > 1:
        bound = "must have a name for each in the first row: remove titles and notes above it"
        raise DataError(str(path), "columns without a name", bound)
    longest = max(columns.values(), key=lambda one: one.mean_characters)
    if key_of(longest.name) in NAMES["texts"] or 3 * len(longest.name) < longest.mean_characters:
        return
    for number, column in enumerate(columns.values(), 1):
        if any(values[column.name.strip()] for values in column.values.values()):
            found, bound = "among its own values", "must be in a header with names, or choose with --text and --label"
            raise DataError(f"{path}: the name of column {number}", found, bound)


class _Made(NamedTuple):
    kind: Kind
    roles: Mapping[str, str]
    why: Mapping[str, str]
    notes: tuple[str, ...] = ()
    features: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Guess:
    """Guesses the roles of columns: by what was chosen, then by names that data sets share, then by values."""

    columns: Columns
    chosen: Mapping[str, str]
    path: Path

    def made(self) -> _Made:
        roles = set(self.chosen)
        if roles == {"text"}:
            return _Made("text", dict(self.chosen), {"text": "chosen; without --label its texts alone are learnt"})
        self._refuse_unwanted()
        for part in (_IMAGE, *_FOLLOWED):
            if part.role in roles and not part.fits(self.columns[self.chosen[part.role]]):
                raise ConfigError(f"--{part.role}", self.chosen[part.role], part.bound)
        layouts = [one for one in _LAYOUTS if roles <= {part.role for part in one[1]}]
        for kind, parts in layouts:
            if (found := self._laid_out(kind, parts)) is not None:
                return found
        if len(roles & _INPUTS) < 2 and any(roles - _INPUTS <= answer for answer in _ANSWERS):
            if (found := self._answered()) is not None:
                return found
            text, why = (None, "") if roles else self._text()
            if text is not None:
                return _Made("text", {"text": text}, {"text": f"{why}; no label stands beside it"})
        raise self._misfit(layouts)

    def _laid_out(self, kind: Kind, parts: Sequence[_Part]) -> _Made | None:
        roles: dict[str, str] = {}
        needed = [part for part in parts if not part.optional]
        for part in (*needed, *(part for part in parts if part.optional)):
            name = self.chosen.get(part.role)
            if name is None and not (part.optional and all(one.role in self.chosen for one in needed)):
                name = self._named(part.names, part.fits, but=(*roles.values(), *self.chosen.values()))
            if name is not None and part.fits(self.columns[name]):
                roles[part.role] = name
            elif not part.optional or name is not None:
                return None
        ordered = {part.role: roles[part.role] for part in parts if part.role in roles}
        if kind == "pairs" and key_of(roles["prompt"]) == "instruction":
            kind = "instructions"
        why = {role: "chosen" if role in self.chosen else "its name" for role in ordered}
        if "time" in roles and (numbers := self.columns[roles["time"]].numbers):
            why["time"] += f"; it holds numbers from {min(numbers):g} to {max(numbers):g}"
        few = self.columns[roles["completion"]] if "completion" in roles else None
        if few is None or not few.is_label:
            return _Made(kind, ordered, why)
        values = counted(len(few.labels), "value")
        note = f"Column {few.name} has {values}: to learn it as a label, --label {few.name}."
        return _Made(kind, ordered, why, (note,))

    def _answered(self) -> _Made | None:
        """An image, a text or a table with an answer; which answer it is does not depend on which of them it is."""
        chosen, named = set(self.chosen), self._named(NAMES["labels"][:2], lambda one: one.is_answer)
        timed = self._laid_out("followed", _FOLLOWED) if chosen & _TIMED or (chosen <= _INPUTS and not named) else None
        answer = timed or (None if chosen & _TIMED else self._single())
        if answer is None:
            return None
        kind, roles, why, notes, _ = answer
        image = self._laid_out("images", (_IMAGE,)) if "text" not in self.chosen else None
        if image is not None:
            return _Made("images", {**image.roles, **roles}, {**image.why, **why}, notes)
        text, of_text = self._text(but=tuple(roles.values()))
        if text is None or ("text" not in self.chosen and self.columns[text].is_feature):
            features = self._features(but=roles.values())
            few = [name for name in features if self.columns[name].is_label and not self.columns[name].is_number]
            if len(few) < len(features) or (few and kind == "followed"):
                return _Made("table", roles, why, notes, features)
        for pair in called.ALIKE:
            if all(names := [self._named((name,), _is_text) for name in pair]):
                both = " and ".join(map(str, names))
                alike = f"The file has pairs of texts, {both}, and a classifier reads one text: join both in one."
                notes = (*notes, alike)
        return None if text is None else _Made(kind, {"text": text, **roles}, {"text": of_text, **why}, notes)

    def _single(self) -> _Made | None:
        answer, why = self._answer()
        if answer is None:
            return None
        if answer.separator is not None:
            marks = "lists" if answer.separator == "[" else f"{answer.separator} between several labels"
            return _Made("tagged", {"labels": answer.name}, {"labels": f"{why}; it has {marks}"})
        if answer.is_number and not answer.is_label:
            why += f"; it holds numbers, nearly all from {answer.scale[0]:g} to {answer.scale[1]:g}"
            return _Made("rated", {"target": answer.name}, {"target": why})
        why += f"; it has {counted(len(answer.labels), 'value')} in {counted(answer.filled, 'row')}"
        in_order = answer.is_number and len(answer.labels) > 2
        notes = ("Its labels are numbers. If their order matters, run it with task=ordinal.",) if in_order else ()
        return _Made("labelled", {"label": answer.name}, {"label": why}, notes)

    def _answer(self) -> tuple[Column | None, str]:
        name = self.chosen.get("label") or self.chosen.get("target")
        if name is not None:
            if not self.columns[name].is_answer:
                option = "label" if "label" in self.chosen else "score"
                raise ConfigError(f"--{option}", name, called.no_answer(self.columns[name]))
            return self.columns[name], "chosen"
        taken = tuple(self.chosen.values())
        usual = NAMES["labels"] + NAMES["numbers"]
        name = self._named(usual, lambda one: one.is_answer and not one.nearly("other number"), but=taken)
        if name is not None:
            spelt_out = [f"{key_of(name)}{more}" for more in NAMES["names_of"]]
            names = self._named(spelt_out, lambda one: one.is_label and not one.is_number)
            if names is not None and self.columns[name].is_number:
                return self.columns[names], f"the names of {name}"
            return self.columns[name], "its name"
        named = {*usual, *NAMES["completions"]}
        for one in self.columns.values():  # what is called an answer and is none: others would be learnt in silence
            is_named = key_of(one.name).removesuffix("s") in named and one.name not in taken
            is_other = one.nearly("other number") or not (one.is_text or one.nearly("target"))
            too_many = key_of(one.name) in ("label", "labels") and one.is_text and one.mean_characters < LONGEST_LABEL
            if is_named and one.filled and (is_other or (too_many and len(one.labels) != 1)):
                bound = f"{called.no_answer(one)}; or choose with --text COLUMN"
                raise DataError(f"{self.path}, column {one.name}", one.holds, bound)
        few = [one for one in self.columns.values() if one.name not in taken and person_of(one.name) is None]
        lists = next((one for one in few if one.separator == "[" and one.several["["]), None)
        few = [one for one in few if one.is_label]
        fewest = min(few, key=lambda one: (called.is_place(one.name), len(one.labels), one.name), default=None)
        return lists or fewest, "its values"

    def _text(self, *, but: Collection[str] = ()) -> tuple[str | None, str]:
        """The column with the texts, by its name or else by their length."""
        if "text" in self.chosen:
            return self.chosen["text"], "chosen"
        others = {*but, *(one.name for one in self.columns.values() if is_person(one) or is_of_records(one.name))}
        texts = [one for one in self.columns.values() if one.is_text and one.name not in others]
        texts = [one for one in texts if key_of(one.name) not in called.NEVER_READ]
        texts = [one for one in texts if not (one.is_label and key_of(one.name) in NAMES["labels"])]
        # A remark that few rows have is not what they are about.
        texts = [one for one in texts if 2 * one.filled >= max(other.filled for other in texts)]
        words = [one for one in texts if not one.nearly("target")]
        texts = [one for one in words if not (one.is_code or one.is_label)] or words or texts
        by_key = {key_of(one.name): one.name for one in reversed(texts)}
        if name := next((by_key[name] for name in NAMES["texts"] if name in by_key), None):
            return name, "its name"
        return (max(texts, key=lambda one: one.mean_characters).name, "the longest texts") if texts else (None, "")

    def _features(self, *, but: Collection[str]) -> tuple[str, ...]:
        """The columns that can be values of a table's vector, beside its answer and what names rows and persons."""
        kept = [one for one in self.columns.values() if one.is_feature and one.name not in but]
        return tuple(
            one.name for one in kept if not (is_person(one) or is_of_records(one.name) or called.is_place(one.name))
        )

    def _named(self, names: Sequence[str], fits: Callable[[Column], bool], *, but: Iterable[str] = ()) -> str | None:
        """The column with the first of these names whose values suit."""
        by_key = {key_of(one.name): one.name for one in self.columns.values() if one.name not in but and fits(one)}
        return next((by_key[name] for name in names if name in by_key), None)

    def _refuse_unwanted(self) -> None:
        """Refuse what other programs learn not to write (KTO), and answers without what they answer."""
        if self.chosen:
            return
        prompt = self._named(_ASKED, lambda one: one.says)
        answers = self._named(NAMES["chats"], _is_chat) or (
            prompt and self._named(NAMES["completions"], lambda one: one.says)
        )
        if answers and (flag := self._named(NAMES["wanted"], lambda one: one.is_flag)):
            says = " or ".join(sorted(self.columns[flag].labels, reverse=True))
            bound = (
                f"may say in which rows {answers} is not wanted (KTO), and a run would learn all: write those that are "
                "wanted to a file without this column, or choose with --prompt and --completion, --messages or --label"
            )
            raise DataError(f"{self.path}, column {flag}", says, bound)
        if speaks := self._named(NAMES["speakers"], lambda one: {"assistant"} < set(map(speaker_of, one.labels))):
            bound = "write the turns of each conversation as one list in a column messages, or choose with --text"
            raise DataError(f"{self.path}, column {speaks}", "speakers", f"says who speaks: {bound}")
        keys = {key_of(name) for name in self.columns}
        two = next((key[:-1] for key in sorted(keys) if key[-1:] == "a" and f"{key[:-1]}b" in keys), None)
        if two and (better := self._named(NAMES["better"], lambda one: one.is_label)):
            bound = "write them as columns prompt, chosen and rejected, or choose with --text"
            value = f"beside {two}a and {two}b"
            raise DataError(f"{self.path}, column {better}", value, f"says which of two is better: {bound}")
        pair = [self._named((role,), lambda one: one.says) for role in ("chosen", "rejected")]
        if all(pair) and not any(self._laid_out(kind, parts) for kind, parts in _LAYOUTS if kind == "preferences"):
            kind = "turns of a conversation" if _is_chat(self.columns[str(pair[0])]) else "text"
            bound = f"must stand beside what they answer, {kind} in a column prompt; or choose one to learn with --text"
            raise DataError(f"columns {pair[0]} and {pair[1]}", f"answers in {kind}, and no prompt", bound)

    def _misfit(self, layouts: Sequence[tuple[Kind, tuple[_Part, ...]]]) -> ConfigError:
        """Why what was chosen makes no kind of file, or why the file is none."""
        for _, parts in layouts if self.chosen else ():
            for part in parts:
                name = self.chosen.get(part.role)
                if name is not None and not part.fits(self.columns[name]):
                    return ConfigError(f"--{_OPTION_OF[part.role]}", name, part.bound)
        beside = [
            [one.role for one in parts if one.role not in self.chosen and not one.optional] for _, parts in layouts
        ]
        if self.chosen:
            role, name = list(self.chosen.items())[-1]
            needs = " and ".join(f"--{_OPTION_OF[other]}" for other in min(beside, key=len, default=[]))
            others = ", ".join(f"--{_OPTION_OF[one]}" for one in self.chosen if one != role) or _ALONE
            bound = f"goes with {needs}, and no column is called so" if needs else f"does not go with {others}"
            return ConfigError(f"--{_OPTION_OF[role]}", name, bound)
        listed = _listed(f"{one.name} ({one.holds})" for one in self.columns.values())
        bound = "must hold a column of text"
        if chat := self._named(NAMES["chats"], lambda one: True):
            bound += f", or in {chat} turns with role and content, or from and value"
        return DataError(str(self.path), f"columns {listed or 'without a name'}", bound)


def _listed(columns: Iterable[str]) -> str:
    """Names of columns for a message: a file may have thousands, and without a header they are texts."""
    names = [name if len(name) <= LONGEST_LABEL else f"{name[: LONGEST_LABEL - 1]}\u2026" for name in columns]
    return ", ".join([*names[:10], *([f"and {len(names) - 10} more"] if len(names) > 10 else [])])
