"""The kind of training that the columns of a data file suit, and why: for the file's owner, and for no run or site."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from fedtune.data.formats import format_of, raw_rows
from fedtune.data.text_rows import Row
from fedtune.data.values import speaker_of
from fedtune.preparation.columns import LONGEST_LABEL, NAMES, WORDS, Column
from fedtune.preparation.patterns import ODD_TEXTS, odd_texts
from fedtune.spec import ConfigError, DataError
from fedtune.words import counted

Kind: TypeAlias = str  # one of `KINDS`
KINDS: Mapping[Kind, Sequence[str]] = WORDS["kind"]
"""In words, and the experiment of conf/ that such records begin in."""
SHOWN_ROWS = 5

_Fits: TypeAlias = Callable[[Column], bool]
Roles: TypeAlias = dict[str, tuple[str, str]]  # by role the column that has it, and why


class _Part(NamedTuple):
    """A column that a kind of file has."""

    role: str  # of fedtune
    names: Sequence[str]  # that it may have, the usual first
    fits: _Fits  # whether its values suit
    bound: str = "must hold texts"  # what they must be, as the end of a message
    optional: bool = False  # whether the kind can do without it


_is_text: _Fits = attrgetter("is_text")
_is_chat: _Fits = attrgetter("is_chat")
_SYSTEM = _Part("system", ("system", "systemprompt"), _is_text, optional=True)
_CONTEXT = _Part("input", NAMES["contexts"], lambda one: one.is_text or not one.filled, optional=True)
_PROMPT, _TURNS = _Part("prompt", NAMES["prompts"], _is_text), "must hold turns of a conversation"
_COMPLETION = _Part("completion", NAMES["completions"], _is_text)
_SCORED = "must hold numbers, and not always the same"
_SCORE = _Part("target", (*NAMES["scores"], "label", "target"), lambda one: one.is_score, _SCORED)
_FOLLOWED = (
    _Part("time", NAMES["times"], lambda one: one.is_number, "must hold numbers"),
    _Part("event", NAMES["events"], lambda one: one.is_event, "must hold 1 or true where it came, else 0 or false"),
)


def _parts(names: Mapping[str, str], fits: _Fits = _is_text, bound: str = "must hold texts") -> tuple[_Part, ...]:
    return tuple(_Part(role, some.split(), fits, bound) for role, some in names.items())


def _marked(role: str, names: Sequence[str]) -> _Part:
    return _Part(role, names, lambda one: one.nearly(role) and bool(one.entities), f"must hold lists of {role}")


_IMAGE = _Part("image", NAMES["images"], lambda one: one.nearly("image"), "must hold paths of images, or images")
_BOTH = {"chosen": "chosen chosenresponse", "rejected": "rejected rejectedresponse"}
_ASKED = NAMES["prompts"] + NAMES["chats"]
_ALIKE = [one.split("/") for one in NAMES["alike"]]
_ALONE = "what else this file has: a label, a score, or --time and --event stand beside a text, an image or a table"
_INPUTS, _TIMED = frozenset({"text", "image"}), frozenset({"time", "event"})
_ANSWERS = (frozenset({"label"}), frozenset({"target"}), _TIMED)
"""What may be chosen of an answer, be it to a text, an image or a table; several labels are chosen as one is."""
_LAYOUTS: tuple[tuple[Kind, tuple[_Part, ...]], ...] = (
    ("entities", (_Part("tokens", NAMES["tokens"], lambda one: one.nearly("tokens")), _marked("tags", NAMES["tags"]))),
    ("entities", (_Part("text", (*NAMES["texts"], "data"), _is_text), _marked("spans", NAMES["spans"]))),
    ("preferences", _parts(_BOTH, lambda one: one.nearly("whole chat"), "must hold whole conversations")),
    ("preferences", (_Part("messages", _ASKED, _is_chat, _TURNS), *_parts(_BOTH, _is_chat, _TURNS))),
    ("preferences", (_PROMPT, _CONTEXT, _SYSTEM, *_parts(_BOTH))),
    ("chat", (_Part("messages", NAMES["chats"], _is_chat, _TURNS), _SYSTEM)),
    ("triplets", _parts({"anchor": "anchor query question", "positive": "positive pos", "negative": "negative neg"})),
    *(("scored", (*_parts({"text": one, "other": other}), _SCORE)) for one, other in _ALIKE),
    ("pairs", (*_parts({"prompt": "user human prompt"}), _SYSTEM, *_parts({"completion": "assistant gpt bot model"}))),
    # What is asked of a text is answered in words, however few the answers are.
    ("pairs", (_PROMPT, _CONTEXT._replace(fits=_is_text, optional=False), _SYSTEM, _COMPLETION)),
    ("pairs", (_PROMPT, _CONTEXT, _SYSTEM, _COMPLETION._replace(fits=lambda one: one.is_completion))),
)
"""Files that are known by the names of their columns; the first that fits counts."""
_ROLES = "text label prompt completion system messages chosen rejected tokens tags spans time event image anchor "
_ROLES += "positive negative other user"
OPTIONS: Mapping[str, str] = {role: role for role in _ROLES.split()} | {"context": "input", "score": "target"}
"""Role of a column: on the command line, and in settings."""
_OPTION_OF = {role: option for option, role in OPTIONS.items()} | {"labels": "label"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """The kind of a file and the roles of its columns."""

    path: Path
    rows: int  # that can be read
    faults: Sequence[DataError]  # what is wrong with the first of the others
    num_faults: int  # all of them
    columns: Mapping[str, Column]
    first: Sequence[Row]
    kind: Kind
    roles: Mapping[str, str]  # role to column; `user` where a column says whose each record is
    why: Mapping[str, str]  # by role, why this column has it
    notes: tuple[str, ...]  # what else the person should know of the columns
    features: tuple[str, ...] = ()  # columns of a table that are a record's vector

    @property
    def labels(self) -> dict[str, int]:
        """How many values are each label, or entities of each type, most first; empty where the kind has none."""
        column_of = {role: self.columns[name] for role, name in self.roles.items()}
        if marked := column_of.get("tags") or column_of.get("spans"):
            return dict(marked.entities.most_common())
        if several := column_of.get("labels"):
            return dict(several.parts[several.separator or "["].most_common())
        return dict(column_of["label"].labels.most_common()) if "label" in column_of else {}

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
        for role, one in ((role, self.columns[name]) for role, name in self.roles.items()):
            why = self.why[role]
            if role == "time":
                why += f"; it holds numbers from {min(one.numbers):g} to {max(one.numbers):g}"
            elif role == "target" and self.kind != "scored":
                why += f"; it holds numbers, nearly all from {one.scale[0]:g} to {one.scale[1]:g}"
            elif role == "labels":
                why += f"; it has {'lists' if one.separator == '[' else f'{one.separator} between several labels'}"
            elif role == "label":
                why += f"; it has {counted(len(one.labels), 'value')} in {counted(one.filled, 'row')}"
            yield role, one.name, why, f"--{_OPTION_OF[role]} COLUMN"

    @property
    def unread(self) -> Iterator[tuple[str, str]]:
        """(column, why) of each that no run reads."""
        for one in self.columns.values():
            if one.name not in (*self.roles.values(), *self.features):
                yield one.name, one.why_unread(teaches=bool({"prompt", "messages"} & set(self.roles)))
            elif one.is_chat:
                yield from ((f"{one.name}: {key}", "no run reads it in a turn") for key in one.beside)


def look_at(path: Path, chosen: Mapping[str, str], *, by_person: bool = True) -> Found:
    """Read a file once and say what it is.

    `chosen` is option (one of `OPTIONS`) to column, as a person says; `by_person`: a column that looks like persons is
    taken for the unit.  A DataError is about the file, a ConfigError about what was chosen.
    """
    columns, first, faults = dict[str, Column](), list[Row](), list[DataError]()
    form, rows, num_faults = format_of(path), 0, 0
    odd = defaultdict[tuple[str, str], list[int]](list)  # lines by what is odd, and column
    for number, (line, row) in enumerate(raw_rows(path), 1):
        if isinstance(row, DataError):
            num_faults += 1
            faults += [row] if num_faults <= SHOWN_ROWS else []
            continue
        rows += 1
        for one in odd_texts(row, form):
            odd[one].append(line)
        first += [row] if rows <= SHOWN_ROWS else []
        for name, value in row.items():
            if name not in columns:
                columns[name] = Column(name)
            columns[name].note(value, number)
    if not rows:
        raise faults[0] if faults else DataError(str(path), "no rows", "must hold at least one record")
    for column in columns.values():
        column.judge()
    if not chosen and form in (".csv", ".tsv"):
        _require_header(columns, path)
    for option, name in chosen.items():
        if name not in columns:
            raise ConfigError(f"--{option}", name, f"must be one of the columns {_listed(columns)}")
    if len(set(chosen.values())) < len(chosen):
        option, name = list(chosen.items())[-1]
        raise ConfigError(f"--{option}", name, "must be another column than the other options name")
    user = chosen.get("user")
    if user is not None and not columns[user].is_id:
        raise ConfigError("--user", user, "must have an id of one person in its rows: a text or whole number")
    guess = _Guess(columns, {OPTIONS[option]: name for option, name in chosen.items() if option != "user"}, path)
    kind, found = guess.made()
    taken = [name for name, _ in found.values()]
    people = sorted((one.person, one.name) for one in columns.values() if one.is_person and one.name not in taken)
    if by_person and user is not None:
        found["user"] = user, "chosen"
    elif by_person and people:  # where a column says whose a record is, the first that does
        found["user"] = people[0][1], "its name: whose a record is (--unit record protects each record alone)"
    roles = {role: name for role, (name, _) in found.items()}
    odd_notes = (
        f"{column}: {len(lines):,} of its values have {ODD_TEXTS[what]} (line {', '.join(map(str, lines[:3]))})."
        for (what, column), lines in odd.items()
    )
    return Found(
        path=path,
        rows=rows,
        faults=faults,
        num_faults=num_faults,
        columns=columns,
        first=first,
        kind=kind,
        roles=roles,
        why={role: why for role, (_, why) in found.items()},
        notes=(*guess.notes(kind, roles), *odd_notes),
        features=guess.features(but=roles.values()) if kind == "table" else (),
    )


def _require_header(columns: Mapping[str, Column], path: Path) -> None:
    """Refuse a table whose first row looks like a record: its texts would become the names of the columns."""
    if sum(one.filled > 0 for one in columns.values() if one.name.startswith("(column ")) > 1:
        bound = "must have a name for each in the first row: remove titles and notes above it"
        raise DataError(str(path), "columns without a name", bound)
    # One of them is then among the column's own values, and the texts' own header is as long as a text; a class may be
    # called as its column is.
    longest = max(columns.values(), key=lambda one: one.mean_characters)
    if longest.key in NAMES["texts"] or 3 * len(longest.name) < longest.mean_characters:
        return
    for number, column in enumerate(columns.values(), 1):
        if any(values[column.name.strip()] for values in column.values.values()):
            found, bound = "among its own values", "must be in a header with names, or choose with --text and --label"
            raise DataError(f"{path}: the name of column {number}", found, bound)


@dataclass(frozen=True, slots=True)
class _Guess:
    """Guesses the roles of columns: by what was chosen, then by names that data sets share, then by values."""

    columns: Mapping[str, Column]
    chosen: Mapping[str, str]
    path: Path

    def made(self) -> tuple[Kind, Roles]:
        roles = set(self.chosen)
        if roles == {"text"}:
            return "text", {"text": (self.chosen["text"], "chosen; without --label its texts alone are learnt")}
        if not roles:
            self._refuse_unwanted()
        for part in (_IMAGE, *_FOLLOWED):
            if part.role in roles and not part.fits(self.columns[self.chosen[part.role]]):
                raise ConfigError(f"--{part.role}", self.chosen[part.role], part.bound)
        layouts = [one for one in _LAYOUTS if roles <= {part.role for part in one[1]}]
        for kind, parts in layouts:
            if found := self._laid_out(parts):
                is_alpaca = kind == "pairs" and self.columns[found["prompt"][0]].key == "instruction"
                return "instructions" if is_alpaca else kind, found
        if len(roles & _INPUTS) < 2 and any(roles - _INPUTS <= answer for answer in _ANSWERS):
            if answered := self._answered():
                return answered
            if not roles and (text := self._text()):
                return "text", {"text": (text[0], f"{text[1]}; no label stands beside it")}
        raise self._misfit(layouts)

    def notes(self, kind: Kind, roles: Mapping[str, str]) -> Iterator[str]:
        """What the person should know of the columns that have these roles, or could."""
        if "completion" in roles and (few := self.columns[roles["completion"]]).is_label:
            values = counted(len(few.labels), "value")
            yield f"Column {few.name} has {values}: to learn it as a label, --label {few.name}."
        if "label" in roles and (label := self.columns[roles["label"]]).is_number and len(label.labels) > 2:
            yield "Its labels are numbers. If their order matters, run it with task=ordinal."
        for pair in _ALIKE if kind in ("labelled", "tagged", "rated", "followed") else ():
            if all(names := [self._named((name,), _is_text) for name in pair]):
                both = " and ".join(map(str, names))
                yield f"The file has pairs of texts, {both}, and a classifier reads one text: join both in one."

    def features(self, *, but: Collection[str]) -> tuple[str, ...]:
        """The columns that can be values of a table's vector, beside its answer and what names rows and persons."""
        kept = [one for one in self.columns.values() if one.is_feature and one.name not in but]
        return tuple(one.name for one in kept if not (one.is_person or one.is_of_records or one.is_place))

    def _laid_out(self, parts: Sequence[_Part]) -> Roles | None:
        """The columns of one layout; None: one that it needs is not there."""
        found: Roles = {}
        needed = [part for part in parts if not part.optional]
        for part in (*needed, *(part for part in parts if part.optional)):
            name, why = self.chosen.get(part.role), "chosen"
            if name is None and not (part.optional and all(one.role in self.chosen for one in needed)):
                but = (*(one for one, _ in found.values()), *self.chosen.values())
                name, why = self._named(part.names, part.fits, but=but), "its name"
            if name is not None and part.fits(self.columns[name]):
                found[part.role] = name, why
            elif not part.optional or name is not None:
                return None
        return {part.role: found[part.role] for part in parts if part.role in found}

    def _answered(self) -> tuple[Kind, Roles] | None:
        """An image, a text or a table with an answer; which answer it is does not depend on which of them it is."""
        chosen, named = set(self.chosen), self._named(NAMES["labels"][:2], lambda one: one.is_answer)
        kind: Kind = "followed"
        roles = self._laid_out(_FOLLOWED) if chosen & _TIMED or (chosen <= _INPUTS and not named) else None
        if not roles and not chosen & _TIMED and (answer := self._answer()):
            one = self.columns[answer[0]]
            if one.separator is not None:
                kind, roles = "tagged", {"labels": answer}
            elif one.is_number and not one.is_label:
                kind, roles = "rated", {"target": answer}
            else:
                kind, roles = "labelled", {"label": answer}
        if not roles:
            return None
        if "text" not in chosen and (image := self._laid_out((_IMAGE,))):
            return "images", image | roles
        but = [name for name, _ in roles.values()]
        text = self._text(but=but)
        if text is None or ("text" not in chosen and self.columns[text[0]].is_feature):
            features = [self.columns[name] for name in self.features(but=but)]
            few = [one for one in features if one.is_label and not one.is_number]
            if len(few) < len(features) or (few and kind == "followed"):
                return "table", roles
        return (kind, {"text": text, **roles}) if text else None

    def _answer(self) -> tuple[str, str] | None:
        """The column of the answer, and why."""
        name = self.chosen.get("label") or self.chosen.get("target")
        if name is not None:
            if not self.columns[name].is_answer:
                raise ConfigError(
                    "--label" if "label" in self.chosen else "--score", name, self.columns[name].no_answer
                )
            return name, "chosen"
        taken = tuple(self.chosen.values())
        usual = NAMES["labels"] + NAMES["numbers"]
        name = self._named(usual, lambda one: one.is_answer and not one.nearly("other number"), but=taken)
        if name is not None:
            spelt_out = [f"{self.columns[name].key}{more}" for more in NAMES["names_of"]]
            names = self._named(spelt_out, lambda one: one.is_label and not one.is_number)
            return (names, f"the names of {name}") if names and self.columns[name].is_number else (name, "its name")
        others = [one for one in self.columns.values() if one.name not in taken]
        for one in others:  # what is called an answer and is none: others would be learnt in silence
            is_named = one.key.removesuffix("s") in {*usual, *NAMES["completions"]}
            is_other = one.nearly("other number") or not (one.is_text or one.nearly("target"))
            too_many = one.key in ("label", "labels") and one.is_text and one.mean_characters < LONGEST_LABEL
            if is_named and one.filled and (is_other or (too_many and len(one.labels) != 1)):
                bound = f"{one.no_answer}; or choose with --text COLUMN"
                raise DataError(f"{self.path}, column {one.name}", one.holds, bound)
        few = [one for one in others if one.person is None]
        lists = [one for one in few if one.separator == "[" and one.several["["]]
        labels = sorted((one.is_place, len(one.labels), one.name) for one in few if one.is_label)
        found = [one.name for one in lists] + [name for _, _, name in labels]
        return (found[0], "its values") if found else None

    def _text(self, *, but: Collection[str] = ()) -> tuple[str, str] | None:
        """The column with the texts, by its name or else by their length, and why."""
        if "text" in self.chosen:
            return self.chosen["text"], "chosen"
        others = [one for one in self.columns.values() if one.is_text and one.name not in but]
        others = [one for one in others if not (one.is_person or one.is_of_records or one.key in WORDS["never_read"])]
        texts = [one for one in others if not (one.is_label and one.key in NAMES["labels"])]
        # A remark that few rows have is not what they are about.
        texts = [one for one in texts if 2 * one.filled >= max(other.filled for other in texts)]
        words = [one for one in texts if not one.nearly("target")]
        texts = [one for one in words if not (one.is_code or one.is_label)] or words or texts
        by_key = {one.key: one.name for one in reversed(texts)}
        if name := next((by_key[name] for name in NAMES["texts"] if name in by_key), None):
            return name, "its name"
        return (max(texts, key=lambda one: one.mean_characters).name, "the longest texts") if texts else None

    def _named(self, names: Sequence[str], fits: _Fits, *, but: Iterable[str] = ()) -> str | None:
        """The column with the first of these names whose values suit."""
        by_key = {one.key: one.name for one in self.columns.values() if one.name not in but and fits(one)}
        return next((by_key[name] for name in names if name in by_key), None)

    def _refuse_unwanted(self) -> None:
        """Refuse what other programs learn not to write (KTO), and answers without what they answer."""
        prompt = self._named(_ASKED, lambda one: one.is_text or one.is_chat)
        answers = self._named(NAMES["chats"], _is_chat) or (
            prompt and self._named(NAMES["completions"], lambda one: one.is_text or one.is_chat)
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
        keys = {one.key for one in self.columns.values()}
        two = next((key[:-1] for key in sorted(keys) if key[-1:] == "a" and f"{key[:-1]}b" in keys), None)
        if two and (better := self._named(NAMES["better"], lambda one: one.is_label)):
            bound = "write them as columns prompt, chosen and rejected, or choose with --text"
            value = f"beside {two}a and {two}b"
            raise DataError(f"{self.path}, column {better}", value, f"says which of two is better: {bound}")
        pair = [self._named((role,), lambda one: one.is_text or one.is_chat) for role in ("chosen", "rejected")]
        if all(pair) and not any(self._laid_out(parts) for kind, parts in _LAYOUTS if kind == "preferences"):
            kind = "turns of a conversation" if self.columns[str(pair[0])].is_chat else "text"
            bound = f"must stand beside what they answer, {kind} in a column prompt; or choose one to learn with --text"
            raise DataError(f"columns {pair[0]} and {pair[1]}", f"answers in {kind}, and no prompt", bound)

    def _misfit(self, layouts: Sequence[tuple[Kind, tuple[_Part, ...]]]) -> ConfigError:
        """Why what was chosen makes no kind of file, or why the file is none."""
        for part in (part for _, parts in layouts for part in parts if part.role in self.chosen):
            if not part.fits(self.columns[self.chosen[part.role]]):
                return ConfigError(f"--{_OPTION_OF[part.role]}", self.chosen[part.role], part.bound)
        if self.chosen:
            role, name = list(self.chosen.items())[-1]
            beside = [[one.role for one in parts if not one.optional] for _, parts in layouts]
            missing = min(([one for one in roles if one not in self.chosen] for roles in beside), key=len, default=[])
            needs = " and ".join(f"--{_OPTION_OF[other]}" for other in missing)
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
