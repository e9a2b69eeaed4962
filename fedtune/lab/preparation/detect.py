"""Detection of a data file's task and column roles, for the file's owner; runs and sites do not use it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias

from fedtune.data.bad_rows import MUCH
from fedtune.data.formats import detect_format, iter_raw_rows
from fedtune.data.text_rows import Row
from fedtune.formatting import pluralize
from fedtune.lab.preparation.columns import (
    NAMES,
    SHARD,
    WORDS,
    DataColumn,
    build_column_error,
    build_no_records_error,
    count_unsupported_images,
    group_numbered,
    join_columns,
)
from fedtune.lab.preparation.detected_file import OPTION_OF, OPTIONS, DetectedFile, Kind
from fedtune.lab.preparation.patterns import ODD_TEXTS, find_odd_texts, require_endings, require_header
from fedtune.spec import ConfigError, DataError

SHOWN_ROWS = 5
Form: TypeAlias = Literal["table", "texts"]
Roles: TypeAlias = dict[str, tuple[DataColumn, str]]  # by role the column that has it, and why


class _Part(NamedTuple):
    """A column in the layout of a kind of file."""

    role: str  # role of the column in `data.columns`
    names: Sequence[str]  # common column names, the most frequent first
    fits: str = "is_text"  # attribute of `DataColumn` that must be true
    optional: bool = False  # whether the column may be missing


def _make_parts(names: Mapping[str, str], fits: str = "is_text") -> tuple[_Part, ...]:
    return tuple(_Part(role, NAMES.get(some, ()), fits) for role, some in names.items())


_SYSTEM = _Part("system", ("system", "systemprompt"), optional=True)
_CONTEXT = _Part("input", NAMES["contexts"], "is_context", optional=True)
_PROMPT, _COMPLETION = _Part("prompt", NAMES["prompts"], "is_asked"), _Part("completion", NAMES["completions"])
_BOTH, _BELONGS = {"chosen": "chosen", "rejected": "rejected"}, {"anchor": "anchors", "positive": "positives"}
_FOLLOWED = (_Part("time", (), "is_number"), _Part("event", (), "is_event"))
_BESIDE = (_Part("user", (), "is_id"), _Part("site", (), "is_label"))  # any kind of records
_IMAGE, _ASKED = _Part("image", NAMES["images"], "is_image"), NAMES["prompts"] + NAMES["chats"]
_INPUTS, _TIMED = frozenset({"text", "text_pair", "image"}), frozenset({"time", "event"})
_ANSWERS = (frozenset({"label"}), frozenset({"target"}), _TIMED)  # what may be chosen of an answer
_MAY_ANSWER = [*NAMES["labels"], *NAMES["topics"], *NAMES["numbers"], *NAMES["completions"], *NAMES["positives"]]
_BY_FORM = {"tags": "is_tags", "spans": "is_spans", "tokens": "are_words", "text": "is_prose"}
"""Attributes that identify a role's column under any name, if only one column has the attribute."""
_BY_VALUES, _SCORES = "its values", (*NAMES["scores"], "label", "target")


def _iter_layouts(pair: Sequence[DataColumn]) -> Iterator[tuple[Kind, tuple[_Part, ...]]]:
    """Yield the layouts of files that are recognized by column names, in order of priority.

    `pair` contains the two columns of a text pair, if the file has them.
    """
    texts = [_Part(role, [one.key]) for role, one in zip(("text", "other"), pair, strict=False)]
    yield "entities", (_Part("tokens", NAMES["tokens"], "is_tokens"), _Part("tags", NAMES["tags"], "is_tags"))
    yield "entities", (_Part("text", (*NAMES["texts"], "data")), _Part("spans", NAMES["spans"], "is_spans"))
    yield "preferences", _make_parts(_BOTH, "is_whole_chat")
    yield "preferences", (_Part("messages", _ASKED, "is_chat"), *_make_parts(_BOTH, "is_chat"))
    yield "preferences", (_PROMPT, _CONTEXT, _SYSTEM, *_make_parts(_BOTH))
    yield "chat", (_Part("messages", NAMES["chats"], "is_chat"), _SYSTEM)
    yield "triplets", _make_parts(_BELONGS | {"negative": "negatives"})
    yield "scored", (*(texts or _make_parts({"text": "", "other": ""})), _Part("target", _SCORES, "is_score"))
    # What is asked of a text is answered in words, however few the answers are.
    yield "pairs", (_PROMPT, _Part("input", NAMES["contexts"]), _SYSTEM, _COMPLETION)
    yield "pairs", (_PROMPT, _CONTEXT, _SYSTEM, _COMPLETION._replace(fits="is_completion"))


def detect_columns(
    path: Path, chosen: Mapping[str, str], *, by_person: bool = True, form: Form | None = None
) -> DetectedFile:
    """Read a file once, and detect its kind and the roles of its columns.

    Args:
        path: the data file.
        chosen: column by option, as chosen by the user.
        by_person: whether to use a column with person ids as the privacy unit.
        form: kind of the input, "table" or "texts", as chosen by the user; None: detected.

    Raises:
        DataError: the file is unsuitable.
        ConfigError: a choice is invalid.
    """
    columns, first, faults = dict[str, DataColumn](), list[Row](), list[DataError]()
    kind_of_file, rows, num_faults = detect_format(path), 0, 0
    odd = defaultdict[tuple[str, str], list[int]](list)  # lines by what is odd, and column
    for number, (line, row) in enumerate(iter_raw_rows(path), 1):
        if isinstance(row, DataError):
            num_faults += 1
            faults += [row] if num_faults <= SHOWN_ROWS else []
            continue
        rows += 1
        for place in find_odd_texts(row, kind_of_file):
            odd[place].append(line)
        first += [row] if rows <= SHOWN_ROWS else []
        for name, value in row.items():
            if name not in columns:
                columns[name] = DataColumn(name)
            columns[name].add_value(value, number)
    if not rows:
        raise faults[0] if faults else build_no_records_error(path)
    for column in columns.values():
        column.classify(rows)
    unnamed = (column for name, column in columns.items() if name not in chosen.values())
    for some in group_numbered(unnamed):  # as one of them is, so are the others
        for column in some:
            column.classify(rows, may_be_label=False)
    if not chosen and kind_of_file in (".csv", ".tsv"):
        require_header(columns, path)
    if not chosen and form is None:
        require_endings(columns, first, path)
    for option, name in chosen.items():
        if name not in columns:
            raise ConfigError(f"--{option}", name, f"is not one of the columns {join_columns(columns)}")
    if len(set(chosen.values())) < len(chosen):
        raise ConfigError(f"--{option}", name, "is already named by another option")
    roles = {OPTIONS[option]: columns[name] for option, name in chosen.items()}
    _require_fit([*_BESIDE, _IMAGE, *_FOLLOWED], roles)
    beside = {part.role: roles.pop(part.role) for part in _BESIDE if part.role in roles}
    free = [one for one in columns.values() if one not in beside.values()]
    guess, read = _Guess(free, roles, path, form), rows + num_faults
    try:
        kind, found = guess.detect_roles()
    except DataError as error:
        if num_faults <= MUCH * read:
            raise
        # Values may be missing only because their rows were not read.
        lacking = f"{num_faults:,} of {pluralize(read, 'row')} cannot be read, the first one because it"
        raise DataError(error.key, error.value, f"{error.bound}. {lacking} {faults[0].bound}") from None
    found |= {role: (one, "chosen") for role, one in beside.items()}
    taken = [one for one, _ in found.values()]
    people = sorted((one.person, one.name) for one in columns.values() if one.is_person and one not in taken)
    if by_person and people and "user" not in beside:  # where a column says whose a record is, the first that does
        why = "its name: identifies the person (--unit record protects each record alone)"
        found["user"] = columns[people[0][1]], why
    odd_notes = (
        f"{column}: {len(lines):,} of its values have {ODD_TEXTS[what]} (line {', '.join(map(str, lines[:3]))})."
        for (what, column), lines in odd.items()
    )
    images = count_unsupported_images(path) if kind_of_file == "classes" else ""
    skipped = [f"{images} other images are not read: convert them to PNG, JPEG or WebP."] if images else []
    return DetectedFile(
        path=path,
        rows=rows,
        faults=faults,
        num_faults=num_faults,
        columns=columns,
        first=first,
        kind=kind,
        roles={role: one.name for role, (one, _) in found.items()},
        why={role: why for role, (_, why) in found.items()},
        notes=(*guess.list_notes(found), *odd_notes, *skipped),
        features=tuple(one.name for one in guess.list_features(but=taken)) if kind == "table" else (),
    )


def _require_fit(parts: Iterable[_Part], chosen: Mapping[str, DataColumn]) -> None:
    """Raise a ConfigError for a chosen column whose values do not fit its role."""
    for part in parts:
        one = chosen.get(part.role)
        if one is not None and not getattr(one, part.fits):
            bound = f"must contain {WORDS['bounds'].get(part.fits, WORDS['bounds']['is_text'])}"
            bound = one.fault if part.role in ("tags", "spans") and one.fault else bound
            raise ConfigError(f"--{OPTION_OF[part.role]}", one.name, bound)


@dataclass(frozen=True, slots=True)
class _Guess:
    """Detection of column roles from the user's choices, common names, and values, in this order.

    Ambiguous files are refused.
    """

    every: Sequence[DataColumn]
    chosen: Mapping[str, DataColumn]
    path: Path
    form: Form | None

    def detect_roles(self) -> tuple[Kind, Roles]:
        roles, pair = set(self.chosen), self._find_text_pair()
        if roles == {"text"}:
            return "text", {"text": (self.chosen["text"], "chosen; without --label only its texts are learned")}
        for what, some, other in self._iter_unwanted() if not roles else ():
            if some:
                raise build_column_error(self.path, what, some, other)
        layouts = [one for one in _iter_layouts(pair) if roles <= {part.role for part in one[1]}]
        for kind, parts in layouts if self.form is None else ():
            if found := self._match_layout(parts):
                return "instructions" if kind == "pairs" and found["prompt"][0].key == "instruction" else kind, found
        if not {"text", "image"} <= roles and any(roles - _INPUTS <= answer for answer in _ANSWERS):
            if answered := self._detect_answered(pair):
                return answered
            text = self._find_text("is_prose") or (None if self.list_features() else self._find_text("is_short"))
            if text and not roles and self.form != "table":
                others, least = self._find_text_candidates("is_prose"), text[0].mean_characters / 2
                others = [one for one in others if one.mean_characters >= least]
                others += [one for one in self.every if one.is_image]
                if len(others) > 1:
                    raise self._build_several_texts_error(others)
                return "text", {"text": (text[0], f"{text[1]}; there is no label")}
        raise self._build_misfit_error(layouts)

    def list_notes(self, found: Roles) -> Iterator[str]:
        """Yield notes for the user about the detected columns and their alternatives."""
        used = {one.name for one, _ in found.values()}
        for role, holds in (("completion", "is_label"), ("label", "is_rank"), ("event", "is_event")):
            if role in found and getattr(found[role][0], holds):
                yield WORDS["notes"][role].format(found[role][0])
        times, events = self._find_survival_candidates()
        if times and "label" in found and found["label"][0] in events:
            yield WORDS["notes"]["followed"].format(found["label"][0], times[0])
        marks = [one for one in self.every if one.is_mark and one.name not in used]
        yield from (f"{one.name}: {one.explain('unread')}." for one in marks)
        if shard := SHARD.search(self.path.name):
            yield WORDS["notes"]["shard"].format(shard[1])

    def list_features(self, *, but: Collection[DataColumn] = ()) -> list[DataColumn]:
        """List the columns that can be features of a table, without answers, row ids and person ids."""
        return [one for one in self.every if one.is_feature and one not in but]

    def _match_layout(self, parts: Sequence[_Part]) -> Roles | None:
        """Assign columns to the roles of a layout; None if a required column is missing."""
        found: Roles = {}
        needed = [part for part in parts if not part.optional]
        for part in (*needed, *(part for part in parts if part.optional)):
            one, why = self.chosen.get(part.role), "chosen"
            if one is None and not (part.optional and all(other.role in self.chosen for other in needed)):
                but = (*(other for other, _ in found.values()), *self.chosen.values())
                alike = [other.key for other in self.every if getattr(other, _BY_FORM.get(part.role, ""), False)]
                one = self._find_column_by_name([*part.names, *alike[: len(alike) == 1]], part.fits, but=but)
                why = _BY_VALUES if one is not None and one.key not in part.names else "its name"
            if one is not None and getattr(one, part.fits):
                found[part.role] = one, why
            elif not part.optional or one is not None:
                return None
        return {part.role: found[part.role] for part in parts if part.role in found}

    def _detect_answered(self, pair: Sequence[DataColumn]) -> tuple[Kind, Roles] | None:
        """Detect a file of images, texts, text pairs or table rows with any kind of answer."""
        is_open = self.form is None and not {"image", "text"} & set(self.chosen)
        texts = self._find_text_candidates("is_prose")
        for one in self.every if is_open else ():
            if one.other_images and (not texts or one.key in NAMES["images"]):
                raise build_column_error(self.path, "ending", [one], one.other_images)
        kind, roles = self._detect_answer()
        but = [one for one, _ in roles.values()]
        features = self.list_features(but=but)
        text = None if self.form == "table" else self._find_text("is_prose", but=but)
        if not roles:
            return None
        if self.form is None and (image := self._find_image(text)):
            return "images", {"image": image, **roles}
        if text is None and self.form != "table":
            text = self._find_text("is_text" if self.form else "is_short", but=but)
            if text and features and self.form is None:
                raise build_column_error(self.path, "few_words", [text[0]], join_columns(one.name for one in features))
        if text is None:
            return ("table", roles) if features and self.form != "texts" else None
        if text[0] in pair:
            return kind, {"text": (pair[0], text[1]), "text_pair": (pair[1], "its name beside the other's"), **roles}
        return kind, {"text": text, **roles}

    def _detect_answer(self) -> tuple[Kind, Roles]:
        """Detect the answer columns, and the kind of text file with such answers; no columns if there is no answer."""
        chosen = set(self.chosen)
        is_open = chosen <= _INPUTS and not self._find_answer_by_name()
        timed = self._detect_survival() if chosen & _TIMED or is_open else None
        answer = None if timed or chosen & _TIMED else self._find_answer()
        if answer is None:
            return "followed", timed or {}
        if answer[0].separator is not None:
            return "tagged", {"labels": answer}
        return ("labeled", {"label": answer}) if answer[0].is_label else ("rated", {"target": answer})

    def _detect_survival(self) -> Roles | None:
        """Detect the columns of a survival time and its event.

        Raises:
            DataError: the values do not encode an event, so the user must choose the column.
        """
        times, events = self._find_survival_candidates()
        if not _TIMED & set(self.chosen):
            if not times or not events or not {*self._find_named_answers()} <= {*events}:
                return None
            is_one = len(times) == len(events) == 1 and not self._find_named_answers()
            if not (is_one and times[0].is_called_time and events[0].is_event):
                raise build_column_error(self.path, "event", events, join_columns(one.name for one in times))
        named = zip(_FOLLOWED, (times, events), strict=True)
        return self._match_layout([part._replace(names=[one.key for one in some]) for part, some in named])

    def _find_survival_candidates(self) -> tuple[list[DataColumn], list[DataColumn]]:
        """Find the candidate time columns, preferably by name, and the candidate event columns."""
        events = [one for one in self.every if one.may_be_event]
        times = [one for one in self.every if one.may_be_time and any(event.is_event for event in events)]
        return [one for one in self.every if one.is_called_time] or times, events

    def _find_answer(self) -> tuple[DataColumn, str] | None:
        """Find the answer column and the reason; raise a DataError if several columns are possible."""
        if one := self.chosen.get("label") or self.chosen.get("target"):
            if not one.is_answer:
                option = "--label" if "label" in self.chosen else "--score"
                raise ConfigError(option, one.name, one.explain("no_answer"))
            return one, "chosen"
        self._require_readable_answer(NAMES["answers"])
        one = self._find_answer_by_name() or self._find_only_answer()
        if one is None:
            return None
        names = self._find_column_by_name([f"{one.key}{more}" for more in NAMES["names_of"]], "is_category")
        if names and names.is_label and one.is_number:
            return names, f"the names of {one.name}"
        is_named = one.is_called_answer or one.is_called("topics", "numbers")
        return one, "its name" if is_named else _BY_VALUES

    def _find_answer_by_name(self) -> DataColumn | None:
        """Find a column with a name that only answers have."""
        others = [*self.chosen.values(), *self._list_ambiguous_columns()]
        return self._find_column_by_name(NAMES["answers"], "is_answer", but=others)

    def _list_ambiguous_columns(self) -> list[DataColumn]:
        """List the table columns with a general name, such as `class`, next to another column of two values.

        Such a name does not identify the answer, because it may also be the name of a feature.
        """
        two = [] if self._has_texts() else [one for one in self.every if one.may_be_answer and len(one.labels) == 2]
        return [one for one in self.every if one.is_called("general") and {*two} - {one}]

    def _find_only_answer(self) -> DataColumn | None:
        """Find the only column that can be the answer, by a common name or by its values."""
        usual, others = self._find_named_answers(), [one for one in self.every if one not in self.chosen.values()]
        is_text = any(one.is_prose for one in self.every)
        if not usual:
            longest = max((one.longest for one in self.every if one.is_prose), default=0)
            marked = [one for one in self.every if one.is_lone_answer or one.is_tags or 0 < one.furthest <= longest]
            marked += [one for one in self.every if one.is_other_number and one.is_called("numbers") and is_text]
            self._require_readable_answer(_MAY_ANSWER, others=marked)
        few = [one for one in others if one.may_be_answer and (one.is_label or one.has_several)]
        numbers = [one for one in others if one.may_be_answer and one.is_number and one not in few]
        if not few or self._has_texts():  # in a table, one column of few values among numbers is not yet the answer
            numbers = [one for one in numbers if one.is_called("numbers")]
        binary = [one for one in few if one.is_binary]
        if len(usual) == 1 < len(binary) and usual[0] in binary and is_text:
            usual = binary  # marks of several labels beside a text
        people = [one for one in others if one.may_be_one_of_few] if few or numbers else []
        found = usual or [*few, *people, *numbers] or [one for one in others if one.is_place and one.is_label]
        if len(found) > 1:
            times = [one for one in self.every if one.may_be_time]
            fits = {"lists": len(binary) > 1 and is_text, "plain": is_text or any(one.is_short for one in self.every)}
            fits["timed"] = bool(times) and any(one.is_event for one in found)
            hints = "".join(WORDS["hints"][what].format(*times[:1]) for what, holds in fits.items() if holds)
            raise build_column_error(self.path, "answers", found, hints)
        return found[0] if found else None

    def _find_named_answers(self) -> list[DataColumn]:
        """Find columns with few distinct values or labels, and a common name of answers for this input."""
        topics = NAMES["topics"] if self._has_texts() else ()
        few = [one for one in self.every if one.is_few and one.may_be_answer and one not in self.chosen.values()]
        few = [one for one in few if one not in self._list_ambiguous_columns()]
        return [one for one in few if one.is_called_answer or one.key in topics]

    def _has_texts(self) -> bool:
        """Whether the records are texts or images, in contrast to table rows."""
        others = any(one.is_short or one.is_image for one in self.every)
        return self.form != "table" and (others or bool(self._find_text_candidates("is_prose")))

    def _require_readable_answer(self, names: Sequence[str], *, others: Iterable[DataColumn] = ()) -> None:
        """Raise a DataError for a column that is named like an answer, or is in `others`, but has unusable values.

        Otherwise a run would learn another column instead.
        """
        named = [one for name in names for one in self.every if name in (one.key, one.key.removesuffix("s"))]
        unread = [one for one in named if one.is_unread_answer or one.is_lone_answer]
        for one in (one for one in (*unread, *others) if one not in self.chosen.values()):
            raise build_column_error(self.path, "unread", [one], one.explain("no_answer"))

    def _build_several_texts_error(self, texts: Sequence[DataColumn]) -> DataError:
        """Build the error for several text columns, with the options that the file has columns for."""
        is_answered = any(one.may_be_answer and one not in texts for one in self.every)
        return build_column_error(self.path, "texts", texts, WORDS["hints"]["answered" if is_answered else "written"])

    def _find_image(self, text: tuple[DataColumn, str] | None) -> tuple[DataColumn, str] | None:
        """Find the image column: by name or, without a text column, the only column with supported images."""
        if {"image", "text"} & set(self.chosen):
            return (self.chosen["image"], "chosen") if "image" in self.chosen else None
        found = [one for one in self.every if one.is_image and (text is None or one.key in NAMES["images"])]
        if named := self._find_column_by_name(NAMES["images"], "is_image"):
            return named, "its name"
        if len(found) > 1:
            raise build_column_error(self.path, "images", found)
        return (found[0], _BY_VALUES) if found else None

    def _find_text(self, fits: str, *, but: Collection[DataColumn] = ()) -> tuple[DataColumn, str] | None:
        """Find the text column and the reason: a common name, or the longest texts."""
        if "text" in self.chosen:
            return self.chosen["text"], "chosen"
        others = self._find_text_candidates(fits, but=but)
        texts = [one for one in others if not one.is_label] or others
        unfit = [one for one in self.every if one not in texts]
        if named := self._find_column_by_name(NAMES["texts"], fits, but=unfit):
            return named, "its name"
        if fits == "is_prose" and len(texts) > 1 and not {*texts} <= {*self._find_text_pair()}:
            raise self._build_several_texts_error(texts)
        return (max(texts, key=lambda one: one.mean_characters), "its texts") if texts else None

    def _find_text_candidates(self, fits: str, *, but: Collection[DataColumn] = ()) -> list[DataColumn]:
        """Find the candidate columns for a record's main text, without sparsely filled comment columns."""
        others = [one for one in self.every if getattr(one, fits) and one not in but and not one.unread]
        others = [one for one in others if not (one.is_person or one.is_of_records)]
        most = max((one.filled for one in (*others, *self.list_features(but=but))), default=0)
        return [one for one in others if 2 * one.filled >= most]

    def _find_column_by_name(
        self, names: Sequence[str], fits: str, *, but: Iterable[DataColumn] = ()
    ) -> DataColumn | None:
        """Find the first column by name whose values have the attribute `fits`."""
        by_key = defaultdict[str, list[DataColumn]](list)
        for one in (one for one in self.every if getattr(one, fits) and one not in but):
            by_key[one.key].append(one)
        found = next((by_key[name] for name in names if name in by_key), [])
        if len(found) > 1:
            raise build_column_error(self.path, "alike", found)
        return found[0] if found else None

    def _find_text_pair(self) -> Sequence[DataColumn]:
        """Find two text columns with matching names, in order; empty if there is no such pair."""
        if second := self.chosen.get("text_pair"):
            text = self._find_text("is_text", but=[second])
            return [text[0], second] if text else ()
        alike = [[self._find_column_by_name([key], "is_text") for key in keys.split("/")] for keys in NAMES["alike"]]
        found = [[one for one in some if one] for some in alike]
        others = {*NAMES["rivals"], *NAMES["turns"], *NAMES["negatives"]}
        found += [some for some in group_numbered(self.every) if not others & set(some[0].words)]
        two = [some for some in found if len(some) == 2 and not any(one.is_label for one in some)]
        return two[0] if two and "text" not in self.chosen else ()

    def _iter_unwanted(self) -> Iterator[tuple[str, Sequence[DataColumn], object]]:
        """Yield (reason, columns, detail) for columns that make rows unusable without preparation.

        Examples are withdrawn records, and records that span several rows or columns.
        """
        prompt = self._find_column_by_name(_ASKED, "is_asked") or self._find_column_by_name(_ASKED, "is_chat")
        answers = self._find_column_by_name(NAMES["chats"], "is_chat")
        answers = answers or (prompt and self._find_column_by_name(NAMES["completions"], "is_said"))
        flags = [one for one in self.every if one.is_flag and {*one.words} & {*NAMES["wanted"]}] if answers else []
        yield "unwanted", [one for one in self.every if one.is_review], "a record"
        yield "unwanted", flags, answers.name if answers else ""
        parts = [one for one in self.every if one.is_tag or (one.key in NAMES["speakers"] and one.is_speaker)]
        yield "rows", parts, ""
        for some in group_numbered(self.every):
            preferences = [one for one in self.every if one.is_preference_between(some)]
            rival, turn, negative = (set(some[0].words) & {*NAMES[what]} for what in ("rivals", "turns", "negatives"))
            is_odd = rival or turn or preferences or (len(some) > 2 and not negative)
            yield "several", [*some, *(preferences[:1] if not turn else [])] if is_odd else [], ""
        laid_out = {kind for kind, parts in _iter_layouts(()) if self._match_layout(parts)}
        for roles, other in ((_BOTH, "prompt, what they answer"), (_BELONGS, "negative, what does not belong to them")):
            some = [one for what in roles.values() if (one := self._find_column_by_name(NAMES[what], "is_said"))]
            yield "belong", some if len(some) > 1 and not laid_out & {"preferences", "triplets"} else [], other

    def _build_misfit_error(self, layouts: Sequence[tuple[Kind, tuple[_Part, ...]]]) -> ConfigError:
        """Build the error for columns, chosen by the user or in the file, that match no kind of file."""
        _require_fit((part for _, parts in layouts for part in parts), self.chosen)
        if self.chosen:
            role, one = list(self.chosen.items())[-1]
            beside = [[part.role for part in parts if not part.optional] for _, parts in layouts]
            gaps = ([role for role in roles if role not in self.chosen] for roles in beside)
            missing = min(gaps, key=len, default=[])
            needs = " and ".join(f"--{OPTION_OF[other]}" for other in missing)
            others = ", ".join(f"--{OPTION_OF[other]}" for other in self.chosen if other != role)
            others = others or "the other columns: an answer belongs to a text, an image or a table"
            bound = f"requires {needs}, but there is no such column" if needs else f"cannot be combined with {others}"
            return ConfigError(f"--{OPTION_OF[role]}", one.name, bound)
        named = join_columns(f"{one.name} ({one.holds})" for one in self.every)
        bound = "must contain a column of text, or numbers or categories with an answer (--label, --score)"
        for one in self.every[:SHOWN_ROWS]:
            bound += f"; {one.name}: {one.explain('unread')}" if one.filled and not one.is_feature else ""
        of_objects = next((one for one in self.every if one.keys), None)
        if chat := self._find_column_by_name(NAMES["chats"], "filled") or of_objects:
            bound += f", or in {chat.name} turns with role and content, or from and value"
        return DataError(str(self.path), f"columns {named or 'without a name'}", bound)
