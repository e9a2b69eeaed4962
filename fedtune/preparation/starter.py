"""A first experiment for a file: every line with what it means, and nothing in it that a person should not know of."""

from __future__ import annotations

import math
import re
import shlex
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import yaml

from fedtune.config import RunConfig
from fedtune.data.faults import Faults, LeftOut
from fedtune.data.features import FeatureReader, columns_of
from fedtune.data.marked import entity_types
from fedtune.data.records import chunks, usable_records
from fedtune.data.tokenise import Tokenizer
from fedtune.data.values import NO_NAME, split_labels
from fedtune.preparation import feature_columns
from fedtune.preparation.columns import Column, is_place
from fedtune.preparation.detect import Found, Kind
from fedtune.preparation.duplicates import spelt_alike
from fedtune.spec import ConfigError
from fedtune.tasks.registry import TASKS, task_named
from fedtune.words import counted

MEASURED_ROWS = 20_000  # rows whose lengths are taken; more would say the same
_LONGEST_TOLD = 4096  # tokens up to which lengths are told apart
_STEP = 16
_MOST_TOKENS = 256  # of an example, where the file has longer ones: time and memory grow with it
_MOST_WINDOWS, _STRIDE = 4, 32
_WHOLE = 0.99
"""Of the records are as long as `max_length` or shorter: which one is the longest does not decide what is public."""
_MORE_SITES = (1000, 3000)  # from each of these numbers of records on, a simulation has one site more than two
_FEW_UNITS, _FEW_OF_LABEL = 200, 5
_MOST_SITES = 20  # that a column is taken to name
_LEAST_UNITS = 20  # of a site: with fewer, all may be kept for the test
_SHARES = ((0.2, 0.1), (0.1, 0.05), (0.02, 0.01))  # for test and validation, smaller where there are more records
_SMALLER_FROM = (1000, 10_000)
_BEFORE_COMMENT = 34
_ABOUT_ANSWERS = {
    "label_separator": "stands between the labels of a record",
    "target_range": "numbers of the file lie within: it becomes PUBLIC, and records outside are left out",
}
_OF_ANY_TASK: frozenset[Kind] = frozenset({"table", "images", "followed"})
_LEFT_OPEN: Mapping[str, tuple[str, ...]] = {
    "own_text": ("data.columns={prompt: a, completion: b}",),
    "own_preferences": ("data.columns={prompt: a, chosen: b, rejected: c}",),
    "own_numbers": ("data.target_range=[0, 1]",),
    "own_images": ("data.labels=[a,b]", "model.path=folder"),
    "own_features": ("data.labels=[a,b]", "data.features=[{columns: [a], range: [0, 1]}]"),
    "own_pairs": ("data.columns={text: a, other: b, target: c}", "data.target_range=[0, 1]"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """A file as the chosen model's tokenizer reads it."""

    usable: int
    left_out: LeftOut  # rows that are no records under the roles
    # (rows,) tokens of the example that a run makes of each of the first `MEASURED_ROWS` records
    lengths: npt.NDArray[np.int64]
    # whose template writes turns: "model" where its own can be taken, else "plain"; "none": there are none
    turns: Literal["none", "model", "plain"]
    users: int | None = None  # how many persons the records are of; None: nothing says whose they are, or each has one
    # how many of the records have each label; without those that only rows have which cannot be used
    labels: Mapping[str, int] = field(default_factory=dict)
    places: Mapping[str, int] = field(default_factory=dict)  # units by the value of the column of places
    unplaced: int = 0  # records without such a value
    torn: int = 0  # persons with records at several places
    alike: int = 0  # persons whose id is another's but for case

    @property
    def units(self) -> int:
        return self.usable if self.users is None else self.users


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Decisions about a file before there is an experiment."""

    base: str  # the experiment of conf/ that it builds on
    model: str | None = None  # a name from conf/model, or None for the base's own
    model_path: str | None = None  # a model that has no name there: a folder, or an id at the hub
    num_sites: int  # that a simulation deals the file out to
    measured: Measured  # what the model makes of the file

    @property
    def max_length(self) -> int:
        """The most tokens of an example: those of nearly all, rounded up, within reason; of images just theirs."""
        if self.base == "own_images":
            return self._longest
        return min(_MOST_TOKENS, max(_STEP, math.ceil(self._longest / _STEP) * _STEP))

    @property
    def windows(self) -> int:
        """Into how many pieces a record is cut, where the task does so."""
        if self.base != "own_entities" or self._longest <= self.max_length:
            return 1
        return min(_MOST_WINDOWS, 1 + math.ceil((self._longest - self.max_length) / (self.max_length - _STRIDE - 2)))

    @property
    def room(self) -> int:
        """The tokens of the longest record that is not cut."""
        return self.max_length + (self.windows - 1) * (self.max_length - _STRIDE - 2)

    @property
    def shares(self) -> tuple[float, float]:
        """Of the records, for the test and for validation."""
        return _SHARES[bisect_right(_SMALLER_FROM, self.measured.units)]

    @property
    def _longest(self) -> int:
        lengths = self.measured.lengths if len(self.measured.lengths) else [1]
        return int(np.quantile(lengths, _WHOLE, method="lower"))


def left_open(base: str) -> Sequence[str]:
    """Overrides that stand for what an experiment of conf/ leaves to a file's owner."""
    return _LEFT_OPEN.get(base, ("data.labels=[a,b]",))


def sites_for(units: int) -> int:
    """How many sites a simulation on this many records or persons has."""
    return 2 + bisect_right(_MORE_SITES, units)


def measured(found: Found, tokenizer: Tokenizer, base: RunConfig, *, within: int) -> Measured:
    """Read the file once more, as a run would that begins with the settings of `base`; token ids are below `within`."""
    task = task_named(_task_of(found) or base.task)
    # A label becomes public: that of one record alone is no class.
    shared = [label for label, count in found.labels.items() if count > 1]
    labels = tuple(shared if len(shared) > 1 else found.labels)
    own: dict[str, Any] = {"columns": dict(found.roles), "labels": labels, "max_length": _LONGEST_TOLD}
    own |= {"features": feature_columns.own_features(found), "max_length": 1} if found.features else {}
    data = replace(base.data, **own | found.settings | _templates(found), chat_template="none", intervals=(1.0,))
    reader: Any = FeatureReader(data.features) if found.features else tokenizer  # the base leaves the columns open
    roles = {**found.roles, **columns_of(data.features, {})}
    if found.kind in ("instructions", "chat", "pairs", "preferences"):
        try:  # the model's own template, if it has one that can be taken
            data = replace(data, chat_template="model")
            task.check_tokenizer(tokenizer, data=data)
        except ConfigError:
            data = replace(data, chat_template="plain")
    faults, fault, places = Faults(), task.fault(data), _places(found)
    records = usable_records(found.path, roles, fault=fault, faults=faults, lenient=False)
    counts: list[int] = []
    num_of: Counter[str] = Counter()
    usable, users = 0, set[str]()
    for chunk in chunks(records):
        usable += len(chunk)
        for record in chunk:
            users.add(record.fields.get("user", ""))
            num_of.update(entity_types(record.fields, data.labels))
            num_of.update(split_labels(record.fields.get("labels", "[]"), separator=data.label_separator))
            num_of.update([record.fields["label"]] if "label" in record.fields else ())
        if len(counts) >= MEASURED_ROWS:
            continue
        counts += task.tokenise(chunk, reader, data=data, lenient_within=within).lengths.tolist()
    at: defaultdict[str, Counter[str]] = defaultdict(Counter)  # by place, the records of each user
    if places is not None:  # read again, since a record without a place is one to a run that does not ask for it
        columns = {**roles, "site": places.name}
        for record in usable_records(found.path, columns, fault=fault, lenient=False):
            at[record.fields["site"]][record.fields.get("user", "")] += 1
    places_of = Counter(user for of_place in at.values() for user in of_place)
    left_out = faults.left_out(used=usable)
    # Where each has one record, a record is a person; but of a row without an id nobody knows whose it is.
    by_user = "user" in found.roles and (len(users) < usable or any("(role user)" in why for why in left_out.reasons))
    return Measured(
        usable=usable,
        left_out=left_out,
        lengths=np.array(counts[:MEASURED_ROWS], dtype=np.int64),
        turns=data.chat_template,
        users=len(users) if by_user and usable else None,
        labels={label: num_of[label] for label in in_order(num_of)},
        places={place: len(at[place]) if by_user else at[place].total() for place in at},
        unplaced=0 if places is None else usable - sum(of_place.total() for of_place in at.values()),
        torn=sum(count > 1 for count in places_of.values()) if by_user else 0,
        alike=len(users) - len({user.casefold() for user in users}) if by_user else 0,
    )


def _task_of(found: Found) -> str | None:
    """The first task that learns such an answer from such a record; None: that of its experiment in conf/."""
    roles = tuple(role for role in found.roles if role != "user")
    return next((name for name, task in TASKS.items() if roles in task.layouts), None)


def in_order(labels: Iterable[str]) -> list[str]:
    """Labels as people order them: numbers by their value, also within texts."""

    def parts(label: str) -> list[tuple[float, str]]:
        found = re.split(r"((?:(?<!\w)-)?[0-9]{1,15}(?:\.[0-9]{1,15})?)", label)
        return [(float(part), "") if place % 2 else (0.0, part) for place, part in enumerate(found)]

    return sorted(labels, key=lambda label: (parts(label), label))


def _templates(found: Found) -> dict[str, str]:
    """The prompt template, where the base's own settings do not fit."""
    if "input" in found.roles:
        return {"prompt_template": "{prompt}\n\n{input}"}
    return {"prompt_template": "{prompt}"} if found.kind == "instructions" else {}


def run_name(file: Path) -> str:
    """A run's name from that of its experiment's file."""
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", file.stem).strip("-._")
    return name[:100] or "own"


def declared_size(plan: Plan, units: int | None = None) -> int:
    """A round number near what a site trains on, of its `units` in the file; None: of an equal part of them all."""
    test, validation = plan.shares
    share = (plan.measured.units / plan.num_sites if units is None else units) * (1 - test - validation)
    unit = 10 ** max(0, math.floor(math.log10(max(share, 1))) - 1)
    return max(1, int(share // unit * unit))


def experiment(found: Found, plan: Plan, *, file: Path) -> str:
    """The YAML of an experiment that is to lie at `file`; relative paths in it begin at its folder."""
    return "\n".join(_lines(found, plan, file)) + "\n"


def _lines(found: Found, plan: Plan, file: Path) -> Iterator[str]:
    # A name may hold the end of a line, and what follows would be a setting.
    about = f"# An experiment for {found.path.name}.  Run it with: {next_line(file)}"
    yield "".join(letter if letter.isprintable() else "?" for letter in about)
    yield "# docs/configuration.md explains every setting.  Labels and lengths were read from the file: look at them"
    yield "# before you show this page to others."
    yield "defaults:"
    yield f"  - {plan.base:<{_BEFORE_COMMENT - 2}} # adapters, rates and rounds: conf/experiment/{plan.base}.yaml"
    if plan.model is not None:
        yield f"  - {f'override /model: {plan.model}':<{_BEFORE_COMMENT - 2}} # the frozen base model"
    yield ""
    yield _line("name", run_name(file), "of the run and of its folder in runs/; each run needs a new one")
    if plan.model_path is not None:
        pinned = {"path": plan.model_path, **dict.fromkeys(("sha256", "gguf_file", "revision", "licence"))}
        yield _line("model", pinned, "pin sha256 with what fedtune model-hash prints")
    if plan.base != "own_images" and (plan.model_path is not None or plan.model is not None):
        adapted = {"target_modules": "all-linear", "layers": None}
        yield _line("lora", adapted, "adapters on every linear layer, whatever the model calls them")
    if found.kind in _OF_ANY_TASK:
        yield _line("task", _task_of(found), "what is learnt of each row; ordinal: labels in order")
    if found.kind == "followed":
        yield _line("head", {"centre": False, "init": "zero"}, "a time has no label whose text it could begin with")
    yield "data:"
    for key, value, why in _data(found, plan, file):
        yield f"  {_line(key, value, why)}"
    yield from (f"  {line}" for line in (feature_columns.lines(found) if found.features else ()))
    if "time" in found.roles:
        yield f'  intervals: "???"  # yours to say: the end of each, in the unit of {_scalar(found.roles["time"])}'
    if not found.labels and found.kind in _OF_ANY_TASK:
        yield "  labels: []"
    if found.labels:
        yield "  # The classes, as they stand in the file.  They are declared: every site and every report shows them."
        yield "  labels:"
        yield from (f"    - {_scalar(label)}" for label in plan.measured.labels)
    by_place = _by_place(found, plan)
    yield from (f"  # {line}" for line in by_place)
    yield "federation:"
    yield f"  {_line('num_sites', plan.num_sites, 'a simulation deals the file out to this many sites')}"
    if any(line.startswith("partition:") for line in by_place):
        yield f"  # {_line('num_sites', len(plan.measured.places), 'by the column of sites')}"
    yield "privacy:"
    if plan.measured.users is not None:
        yield f"  {_line('unit', 'user', 'all records of one person are protected together: docs/user_level.md')}"
    yield f"  {_line('epsilon', 8.0, 'the promise to each of them; lower is stronger: docs/epsilon.md')}"
    # The power of ten that is at most a tenth of 1 over a site's size.
    delta = min(1e-5, 10.0 ** -math.ceil(math.log10(10 * declared_size(plan))))
    yield f"  {_line('delta', delta, 'must stay below 1 / declared_sizes')}"


def _data(found: Found, plan: Plan, file: Path) -> Iterator[tuple[str, Any, str]]:
    test, validation = plan.shares
    # From this page's folder where it lies there or below.  Links stay: what one leads to may have another name,
    # without an ending, and change with its next version.
    folder, records = file.absolute().parent, found.path.absolute()
    path = records.relative_to(folder) if records.is_relative_to(folder) else records
    yield "train_file", str(path), "the records; relative paths begin at this page's folder"
    yield "columns", dict(found.roles), "role of fedtune: column of the file"
    for key, value in found.settings.items():
        yield key, list(value) if isinstance(value, tuple) else value, _ABOUT_ANSWERS[key]
    for key, template in _templates(found).items():
        yield key, template, "what is asked; a part whose columns are blank is left out"
    if plan.measured.turns != "none":
        why = "turns as the model's own template writes them (model), or in words (plain)"
        yield "chat_template", plan.measured.turns, why
    if plan.measured.left_out.count:
        yield "unusable", "leave_out", f"{counted(plan.measured.left_out.count, 'row')} cannot be used"
    most = "places of an image in the model" if plan.base == "own_images" else "the most tokens of a record"
    cut = int((plan.measured.lengths > plan.room).sum())
    if cut:
        most += f"; {cut:,} of {len(plan.measured.lengths):,} records are longer and are cut"
    if not found.features:
        yield "max_length", plan.max_length, most if plan.windows == 1 else "the most tokens of a window"
    if plan.windows > 1:
        yield "windows", plan.windows, f"of a record; each takes its time, also in short ones{most.partition(';')[2]}"
    if plan.base == "own_entities":
        yield "stride", min(_STRIDE, (plan.max_length - 2) // 2), "tokens that two windows share"
    yield "test_fraction", test, "share of the file for the scores before and after: no site trains on it"
    yield "validation_fraction", validation, "share for the scores after each round"
    units = "records" if plan.measured.users is None else "persons"
    yield "declared_sizes", declared_size(plan), f"each site publishes this number of {units}: it becomes PUBLIC"
    yield "dataset", run_name(file), "the name by which sites and ledgers know these records"


def _places(found: Found) -> Column | None:
    """A column that may name the site of each record."""
    named = (one for one in found.columns.values() if is_place(one.name) and one.name not in found.roles.values())
    few = (one for one in named if one.is_label and len(one.labels) <= _MOST_SITES)
    # The lines are comments, which the end of a line in a name would end.
    return next((one for one in few if all(map(str.isprintable, (one.name, *one.labels, *found.roles.values())))), None)


def _by_place(found: Found, plan: Plan) -> list[str]:
    """Settings by which a simulation gives each site the records that a column says; or why there are none."""
    places, measured = _places(found), plan.measured
    if places is None:
        return []
    about = f"Column {places.name} may say at which site each record is"
    units = {place: measured.places[place] for place in in_order(measured.places)}
    if measured.torn:
        persons = counted(measured.users or 0, "person")
        return [
            f"{about}, but {measured.torn:,} of {persons} have records at several.",
            "A person is protected at one site.  What works: to deal persons out by chance, as num_sites does;",
            f"to write one site for each person into {places.name};",
            "or data init with --unit record, which protects each record.",
        ]
    if len(units) < 2 or min(units.values()) < _LEAST_UNITS:
        return [f"{about}, but a site there has fewer than {_LEAST_UNITS} of what is protected: too few to train on."]
    lacking = {"unusable": "leave_out"} if measured.unplaced and not measured.left_out.count else {}
    settings: dict[str, Any] = {
        "columns": {**found.roles, "site": places.name},
        "declared_sizes": [declared_size(plan, count) for count in units.values()],
        "partition": {"kind": "column", "sites": {value: place for place, value in enumerate(units)}},
    }
    return [
        f"{about}.",
        "To deal records out by it, put these lines in place of columns and declared_sizes, and the other num_sites in",
        "place of the first.",
        *(f"{key}: {_scalar(value)}" for key, value in (settings | lacking).items()),
    ]


def about_spellings(labels: Iterable[str]) -> list[str]:
    """A sentence about each group of labels that are probably meant as one."""
    return [
        f"The labels {', '.join(map(ascii, some))} look alike, and are learnt as different ones: write them alike in "
        "the file if they are one. They differ in case, spaces, form or invisible letters alone."
        for some in spelt_alike(labels)
    ]


def notes(found: Found, plan: Plan) -> list[str]:
    """Notes for the person before the first run."""
    told = [
        f"declared_sizes: {declared_size(plan):,} was set near a site's share. This number becomes public; at a real "
        "site, the site chooses it in its site.toml.",
        "Labels, target_range and max_length were proposed from nearly all records of the file, and become public too: "
        "change what says more than it should.",
    ]
    if plan.measured.users is not None:
        told.append(
            f"The {plan.measured.usable:,} records are of {plan.measured.users:,} persons, each of whom is protected "
            "as a whole (privacy.unit: user)."
        )
    if plan.measured.alike:
        told.append(
            f"{counted(plan.measured.alike, 'id')} of persons are like another but for case, and count as other "
            "persons: write them alike in the file if they are one."
        )
    if plan.measured.units < _FEW_UNITS * plan.num_sites:
        units = counted(plan.measured.units, "record" if plan.measured.users is None else "person")
        told.append(f"{units}: that is little, so with noise expect the run to learn little.")
    if plan.measured.left_out.count:
        told.append(f"{plan.measured.left_out}. A run leaves such rows out (unusable: leave_out).")
    told += about_spellings(plan.measured.labels)
    if none := NO_NAME & set(plan.measured.labels):
        told.append(f"A label may stand for no value: {', '.join(sorted(none))}. If so, take it out of labels.")
    if rare := [label for label, count in plan.measured.labels.items() if count < _FEW_OF_LABEL]:
        told.append(f"Labels with fewer than {_FEW_OF_LABEL} records: {', '.join(rare[:10])}. Each becomes public.")
    if unusable := len(found.labels) - len(plan.measured.labels):
        told.append(f"No class, since one row alone or none that can be used has it: {counted(unusable, 'label')}.")
    if about := _by_place(found, plan):
        told.append(f"{about[0].removesuffix('.')}: comments in the file say what to do.")
    told += found.notes
    if len(plan.measured.lengths) == MEASURED_ROWS:
        told.append(f"Lengths are of the first {MEASURED_ROWS:,} rows.")
    return told


def _line(key: str, value: Any, why: str) -> str:
    return f"{key}: {_scalar(value)}".ljust(_BEFORE_COMMENT) + f" # {why}"


def _scalar(value: Any) -> str:
    quotes = '"' if isinstance(value, str) and not value.isprintable() else None
    text: str = yaml.safe_dump(
        value, default_flow_style=True, default_style=quotes, allow_unicode=True, width=math.inf, sort_keys=False
    )
    return text.removesuffix("\n").removesuffix("\n...")


def next_line(file: Path) -> str:
    """The command to type next; a bare name would be one of conf/."""
    return shlex.join(["fedtune", "simulate", f"experiment={'' if '/' in str(file) else './'}{file}"])
