"""Generation of a commented experiment file for a data file."""

from __future__ import annotations

import json
import math
import re
import shlex
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import yaml

from fedtune.config import RunConfig
from fedtune.data.bad_rows import Faults, SkippedRows
from fedtune.data.features import FeatureSpec, map_feature_columns
from fedtune.data.records import chunk_records, iter_usable_records
from fedtune.data.tokenization import Tokenizer
from fedtune.data.values import NO_NAME, find_misplaced_spans, normalize_category
from fedtune.formatting import pluralize
from fedtune.lab.preparation.check_data import count_labels
from fedtune.lab.preparation.columns import DataColumn
from fedtune.lab.preparation.detected_file import KINDS, OPEN, DetectedFile
from fedtune.lab.preparation.duplicates import normalize_spelling
from fedtune.lab.preparation.readers import count_token_ids
from fedtune.spec import ConfigError, DataError
from fedtune.tasks.inputs import NoTokenizer
from fedtune.tasks.registry import TASKS, get_task

_MEASURED_ROWS = 20_000  # rows whose lengths are taken; more would say the same
_LONGEST_TOLD = 4096  # tokens up to which lengths are told apart
_STEP = 16
_MAX_TOKENS, _MAX_USUAL_TOKENS = 256, 512
"""Limits for the 99th and the 90th percentile of example lengths in tokens; longer examples cost time and memory."""
_MAX_WINDOWS, _STRIDE = 4, 32
_USUALLY_COVERED, _MIN_COVERED = 0.99, 0.9
"""Fraction of records within `max_length`: usual and minimum.  Never all, because `max_length` becomes public."""
_MORE_SITES = (1000, 3000)  # from each of these numbers of records on, a simulation has one site more than two
_FEW_UNITS, _FEW_OF_LABEL = 200, 5
_MAX_UNKNOWN = 0.1  # of tokens: another script than the model's, for the most part
_MIN_UNITS = 20  # of a site: with fewer, all may be kept for the test
_SHARES = ((0.2, 0.1), (0.1, 0.05), (0.02, 0.01))  # for test and validation, smaller where there are more records
_SMALLER_FROM = (1000, 10_000)
_BEFORE_COMMENT = 34
_OF_ANY_TASK, _TURNS = ("table", "images", "followed"), ("instructions", "chat", "pairs", "preferences")
_ANSWERED = ("labeled", "tagged", "rated")
_ANY_NUMBER = (-1e12, 1e12)
_Setting: TypeAlias = tuple[str, Any, str]  # key, value (None: it is not written), comment


@dataclass(frozen=True, kw_only=True, slots=True)
class ExperimentPlan:
    """Measurements of a data file with the model's tokenizer, and the resulting choices for an experiment."""

    base: str  # base experiment in conf/
    model: str | None = None  # a name from conf/model; None: the base's model
    model_path: str | None = None  # a model folder or hub id without a name in conf/model
    num_sites: int  # number of sites in a simulation
    usable: int  # number of usable records
    units: int  # number of people if a column contains person ids, otherwise of records
    by_user: bool  # whether the privacy unit is a person
    left_out: SkippedRows  # rows that are not records with these roles
    lengths: npt.NDArray[np.int64]  # (rows,) example lengths of the first records, in tokens
    max_length: int  # maximum number of tokens of an example
    windows: int  # maximum number of windows of a record, for tasks with windows
    turns: Literal["model", "plain"] | None  # chat template: the model's, or a plain one if that is not usable
    labels: Mapping[str, int]  # number of records per label
    places: Mapping[str, int]  # number of units per value of the site column; empty without a site column
    alike: int  # number of person ids that differ from another id only in case
    misplaced: Mapping[str, int]  # records with spans that split words, by the likely unit of their offsets
    unknown: float  # fraction of unknown tokens among the first records
    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)  # declared range per column

    @property
    def shares(self) -> tuple[float, float]:
        """Fractions of the records for test and validation."""
        return _SHARES[bisect_right(_SMALLER_FROM, self.units)]


def build_placeholder_overrides(base: str) -> Sequence[str]:
    """Return placeholder overrides for the mandatory settings of a base experiment in conf/, and for its records."""
    placeholders = {
        "own_text": ["data.columns={prompt: a, completion: b}"],
        "own_preferences": ["data.columns={prompt: a, chosen: b, rejected: c}"],
        "own_numbers": ["data.target_range=[0, 1]"],
        "own_images": ["data.labels=[a,b]", "model.path=folder"],
        "own_features": ["data.labels=[a,b]", "data.features=[{columns: [a], range: [0, 1]}]"],
        "own_pairs": ["data.columns={text: a, other: b, target: c}", "data.target_range=[0, 1]"],
    }
    return ["data.train_file=x", "data.declared_sizes=2", *placeholders.get(base, ["data.labels=[a,b]"])]


def fill_overrides(found: DetectedFile) -> list[str]:
    """Return placeholder overrides for the mandatory settings of a detected file's experiment."""
    features = ["data.features=[{columns: [x], range: [0, 1]}]"] if found.features else []
    by_role = {"time": "task_settings.intervals=[1]", "target": "data.target_range=[0, 1]"}
    return [*features, *(setting for role, setting in by_role.items() if role in found.roles)]


def plan_experiment(
    found: DetectedFile, tokenizer: Tokenizer, config: RunConfig, *, sites: int | None = None
) -> ExperimentPlan:
    """Read the file as a run would, and plan its experiment.

    Args:
        found: the detected file.
        tokenizer: the model's tokenizer.
        config: the base experiment for this kind of file.
        sites: number of sites; None: chosen by the number of records.

    Raises:
        ConfigError: the file cannot be partitioned by the site column.
        DataError: a run can use none of the rows.
    """
    base = KINDS[found.kind][1]
    task = get_task(_find_task(found) or config.task, {"intervals": [1.0]} if "time" in found.roles else None)
    # A label becomes public: that of one record alone is no class.
    shared = [label for label, count in found.labels.items() if count > 1]
    own: dict[str, Any] = {"labels": tuple(shared if len(shared) > 1 else found.labels), "max_length": _LONGEST_TOLD}
    if found.features:  # by the file's own values: to look at its rows with, and for nothing that is written
        features = tuple(_build_feature_from_values(found.columns[name]) for name in found.features)
        own |= {"features": features, "max_length": 1}
    own |= {"prompt_template": _choose_prompt_template(found) or config.data.prompt_template}
    own |= {"columns": dict(found.roles), "chat_template": "none", **found.settings}
    own |= {"target_range": _ANY_NUMBER} if own.get("target_range") == OPEN else {}
    data = replace(config.data, **own)
    reader: Any = NoTokenizer() if found.features else tokenizer  # the base leaves the columns open
    roles = {**found.roles, **map_feature_columns(data.features, {})}
    if found.kind in _TURNS:
        try:  # the model's own template, if it has one that can be taken
            data = replace(data, chat_template="model")
            task.check_tokenizer(tokenizer, data=data)
        except ConfigError:
            data = replace(data, chat_template="plain")
    faults, at = Faults(), defaultdict[str, Counter[str]](Counter)  # by place, the records of each user
    counts, num_of, users, usable, cut_words = list[int](), Counter[str](), set[str](), 0, Counter[str]()
    unknown, num_tokens, marks = 0, 1, [getattr(reader, f"{one}_token_id", None) for one in ("unk", "bos", "eos")]
    fault, within = task.record_validator(data), count_token_ids(tokenizer)
    records = iter_usable_records(found.path, roles, fault=fault, faults=faults, lenient=False)
    for chunk in chunk_records(records):
        usable += len(chunk)
        for record in chunk:
            users.add(record.fields.get("user", ""))
            at[record.fields.get("site", "")][record.fields.get("user", "")] += 1
            num_of.update(count_labels(record, data))
            cut_words.update(find_misplaced_spans(record.fields))
        if len(counts) < _MEASURED_ROWS:
            read = task.tokenize(chunk, reader, data=data, lenient_within=within)
            counts, num_tokens = counts + read.lengths.tolist(), num_tokens + read.num_tokens
            if marks[0] not in (None, *marks[1:]):
                unknown += sum(int(np.count_nonzero(ids == marks[0])) for ids in read.input_ids)
    left_out = faults.summarize(used=usable)
    if not usable:
        raise DataError(str(found.path), "no records", f"must have rows that a run can use: {left_out}")
    # Where each has one record, a record is a person; but of a row without an id nobody knows whose it is.
    by_user = "user" in found.roles and (len(users) < usable or any("(role user)" in why for why in left_out.reasons))
    units = len(users) if by_user else usable
    named = sort_labels(at) if "site" in found.roles else []
    places = {place: len(at[place]) if by_user else at[place].total() for place in named}
    if by_user and sum(places.values()) > units:
        bound = "must be the same in all records of a person, who belongs to one site; or use --unit record"
        raise ConfigError("--site", found.roles["site"], bound)
    for place, count in places.items():
        if count < _MIN_UNITS:
            bound = f"must have at least {_MIN_UNITS} records or people at each site; {place} has {count}"
            raise ConfigError("--site", found.roles["site"], bound)
    # max_length covers nearly all records, rounded up and within limits; for images it is exact.
    lengths = np.array(counts[:_MEASURED_ROWS], dtype=np.int64)
    shares = np.quantile(counts, (_USUALLY_COVERED, _MIN_COVERED), method="lower")
    longest, usual = map(int, shares)
    usual = min(usual, _MAX_USUAL_TOKENS) if base != "own_entities" else 0  # these have windows
    most = max(_STEP, math.ceil(max(min(longest, _MAX_TOKENS), usual) / _STEP) * _STEP)
    most = longest if base == "own_images" else most
    more = math.ceil((longest - most) / (most - _STRIDE - 2)) if base == "own_entities" and longest > most else 0
    return ExperimentPlan(
        base=base,
        num_sites=len(places) or sites or 2 + bisect_right(_MORE_SITES, units),
        usable=usable,
        units=units,
        by_user=by_user,
        left_out=left_out,
        lengths=lengths,
        max_length=most,
        windows=min(_MAX_WINDOWS, 1 + more),
        turns=None if data.chat_template == "none" else data.chat_template,
        labels={label: num_of[label] for label in sort_labels(num_of)},
        places=places,
        alike=len(users) - len({user.casefold() for user in users}) if by_user else 0,
        misplaced=cut_words,
        unknown=unknown / num_tokens,
    )


def _build_feature_from_values(column: DataColumn) -> FeatureSpec:
    names = (*map(normalize_category, column.labels), "x")[:1]
    declared: Any = {"categories": names} if column.is_category else {"range": (-1.0, 1.0)}
    return FeatureSpec(columns=(column.name,), size=column.size, missing="indicator", **declared)


def _find_task(found: DetectedFile) -> str | None:
    """Return the first task for the file's column roles; None: the task of the base experiment."""
    roles = tuple(role for role in found.roles if role not in ("user", "site"))
    return next((name for name, task in TASKS.items() if roles in task.layouts), None)


def sort_labels(labels: Iterable[str]) -> list[str]:
    """Sort labels in natural order, with numbers (also within texts) by value."""

    def parts(label: str) -> list[tuple[float, str]]:
        found = re.split(r"((?:(?<!\w)-)?[0-9]{1,15}(?:\.[0-9]{1,15})?)", label)
        return [(float(part), "") if place % 2 else (0.0, part) for place, part in enumerate(found)]

    return sorted(labels, key=lambda label: (parts(label), label))


def _choose_prompt_template(found: DetectedFile) -> str | None:
    """Return a prompt template if the base experiment's template does not suit the columns, else None."""
    asked = "{prompt}" if found.kind == "instructions" else None
    return "{prompt}\n\n{input}" if "input" in found.roles else asked


def derive_run_name(file: Path) -> str:
    """Derive a run's name from the name of its experiment file."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", file.stem).strip("-._")[:100] or "own"


def suggest_declared_size(plan: ExperimentPlan, units: int | None = None) -> int:
    """Suggest a rounded declared size for a site with `units` units; None: an equal share of the file's units."""
    test, validation = plan.shares
    return round_down((plan.units / plan.num_sites if units is None else units) * (1 - test - validation))


def round_down(size: float) -> int:
    """Round a data set's size down to two significant digits, for use as its declared size.

    >>> [round_down(size) for size in (7, 163, 2391)]
    [7, 160, 2300]
    """
    unit = 10 ** max(0, math.floor(math.log10(max(size, 1))) - 1)
    return max(1, int(size // unit * unit))


def _suggest_declared_sizes(plan: ExperimentPlan) -> list[int]:
    """Suggest the declared sizes: one per site, or a common size for all sites."""
    return [suggest_declared_size(plan, count) for count in plan.places.values()] or [suggest_declared_size(plan)]


def _count_truncated(plan: ExperimentPlan) -> int:
    """Count the records that a run would truncate."""
    read = plan.max_length + (plan.windows - 1) * (plan.max_length - _STRIDE - 2)
    return int((plan.lengths > read).sum())


def render_experiment(found: DetectedFile, plan: ExperimentPlan, *, file: Path) -> str:
    """Render the YAML of an experiment file; paths are relative to the folder of `file`."""
    # A name may hold the end of a line, and what follows would be a setting.
    about = f"# An experiment for {found.path.name}.  Run it with: {format_next_command(file)}"
    own = plan.model_path is not None
    pinned = {"path": plan.model_path, **dict.fromkeys(("sha256", "gguf_file", "revision", "license"))}
    adapted = {"target_modules": "all-linear", "layers": None}
    adapts = plan.base != "own_images" and (own or plan.model is not None)
    task = _find_task(found) if found.kind in _OF_ANY_TASK else None
    zero = {"center": False, "init": "zero"} if found.kind == "followed" else None
    unit = "user" if plan.by_user else None
    ends = f"the end of each, in the unit of {_to_yaml(found.roles['time'])}" if "time" in found.roles else None
    named = [re.sub(r"[^A-Za-z0-9_-]+", "-", place).strip("-_")[:100] for place in plan.places]
    site_names = named if all(named) and len({*named}) == len(named) > 0 else None
    # The power of ten that is at most a tenth of 1 over the largest site's size.
    delta = min(1e-5, 10.0 ** -math.ceil(math.log10(10 * max(_suggest_declared_sizes(plan)))))
    lines = [
        "".join(letter if letter.isprintable() else "?" for letter in about),
        "# docs/configuration.md explains every setting.  Labels and lengths were read from the file: check them",
        "# before you share this file.",
        "defaults:",
        f"  - {plan.base:<{_BEFORE_COMMENT - 2}} # adapters, rates and rounds: conf/experiment/{plan.base}.yaml",
        *_iter_setting_lines(("- override /model", plan.model, "the frozen base model")),
        "",
        *_iter_setting_lines(
            ("name", derive_run_name(file), "of the run and of its folder in runs/; each run needs a new one"),
            ("model", pinned if own else None, "pin sha256 with what fedtune model-hash prints"),
            ("lora", adapted if adapts else None, "adapters on every linear layer, whatever its name"),
            ("task", task, "what is learned from each row; ordinal: labels in order"),
            ("head", zero, "a time has no label text to start from"),
            within="",
        ),
        *([] if ends is None else ["task_settings:", f'  intervals: "???"  # set it yourself: {ends}']),
        "data:",
        *_iter_setting_lines(*_list_data_settings(found, plan, file)),
        *_iter_all_texts_lines(found),
        *_iter_public_list_lines(found, plan),
        "federation:",
        *_iter_setting_lines(
            ("num_sites", plan.num_sites, "a simulation partitions the file into this many sites"),
            ("site_names", site_names, "in the order of partition"),
        ),
        "privacy:",
        *_iter_setting_lines(
            ("unit", unit, "all records of one person are protected together: docs/user_level.md"),
            ("epsilon", 8.0, "the guarantee for each record or person; lower is stronger: docs/epsilon.md"),
            ("delta", delta, "must stay below 1 / declared_sizes"),
        ),
    ]
    return "\n".join([*lines, ""])


def _iter_setting_lines(*some: _Setting, within: str = "  ") -> Iterator[str]:
    """Yield YAML lines of settings with comments."""
    for key, value, why in some:
        if value is not None:
            yield within + f"{key}: {_to_yaml(value)}".ljust(_BEFORE_COMMENT) + f" # {why}"


def _list_data_settings(found: DetectedFile, plan: ExperimentPlan, file: Path) -> list[_Setting]:
    """List the settings of `data`, except `features` and `labels`."""
    test, validation = plan.shares
    # From this page's folder where it lies there or below.  Links stay: what one leads to may have another name,
    # without an ending, and change with its next version.
    folder, records = file.absolute().parent, found.path.absolute()
    path = records.relative_to(folder) if records.is_relative_to(folder) else records
    lies_within = "the smallest and largest number: it becomes PUBLIC, and records outside are skipped"
    turns = "turns as the model's own template writes them (model), or in words (plain)"
    lacking = f"{pluralize(plan.left_out.count, 'row')} cannot be used"
    cut = _count_truncated(plan)
    are_cut = f"; {cut:,} of {len(plan.lengths):,} records are longer and are truncated" if cut else ""
    most = f"positions of an image in the model{are_cut}"
    if plan.base != "own_images":
        most = f"the maximum tokens of a record{are_cut}" if plan.windows == 1 else "the maximum tokens of a window"
    of_a_record = f"of a record; each takes its time, also in short ones{are_cut}"
    stride = min(_STRIDE, (plan.max_length - 2) // 2) if plan.base == "own_entities" else None
    units = "persons" if plan.by_user else "records"
    sites = {value: place for place, value in enumerate(plan.places)}
    sizes = _suggest_declared_sizes(plan) if plan.places else suggest_declared_size(plan)
    dataset = derive_run_name(Path(found.path.name.split(".")[0]))
    return [
        ("train_file", str(path), "the records; relative paths start at this file's folder"),
        ("columns", dict(found.roles), "role of fedtune: column of the file"),
        ("target_range", found.settings.get("target_range"), lies_within),
        ("event_values", found.settings.get("event_values"), "no event up to the time, and event"),
        ("label_separator", found.settings.get("label_separator"), "separates the labels of a record"),
        ("prompt_template", _choose_prompt_template(found), "the prompt; a part with blank columns is left out"),
        ("chat_template", plan.turns, turns),
        ("on_bad_record", "skip" if plan.left_out.count else None, lacking),
        ("max_length", None if found.features else plan.max_length, most),
        ("windows", plan.windows if plan.windows > 1 else None, of_a_record),
        ("stride", stride, "tokens shared by two windows"),
        ("test_fraction", test, "share of the file for the scores before and after, never trained on"),
        ("validation_fraction", validation, "share for the scores after each round"),
        ("partition", {"kind": "column", "sites": sites} if sites else None, "the site of each value of its column"),
        ("declared_sizes", sizes, f"each site publishes this number of {units}: it becomes PUBLIC"),
        ("dataset", dataset, "the name of these records at sites and in ledgers"),
    ]


def _iter_all_texts_lines(found: DetectedFile) -> Iterator[str]:
    """Yield commented-out YAML lines that use all text columns as input, if there are several."""
    others = [one for one in found.columns.values() if one.is_prose and one.name not in found.roles.values()]
    if found.kind not in _ANSWERED or "text_pair" in found.roles or not others:
        return
    others.sort(key=lambda one: (one.filled, one.mean_characters, one.name))
    beside = dict(zip(["input", *(f"part_{n}" for n in range(2, 99))], (one.name for one in others), strict=False))
    yield "  # Other columns hold texts, too.  To use them all, replace columns above by these two lines:"
    yield f"  # columns: {_to_yaml({**found.roles, **beside})}"
    template = "\n\n".join(f"{{{role}}}" for role in (*beside, "text"))
    yield f"  # prompt_template: {_to_yaml(template)}"


def _iter_public_list_lines(found: DetectedFile, plan: ExperimentPlan) -> Iterator[str]:
    """Yield the YAML lines of `data.features` and `data.labels`."""
    # A range or a list of categories that was taken from the records would publish something of them: the largest value
    # is somebody's.  So a person fills them in, and what the file holds is shown on the terminal alone.
    if found.features:
        yield "  # Replace ??? from what you know, not from the file: it becomes PUBLIC.  docs/other_tasks.md"
        yield "  features:"
    for name in found.features:
        column = found.columns[name]
        declared = f'{"categories" if column.is_category else "range"}: "???"'
        declared = f"range: {_to_yaml([*plan.ranges[name]])}" if name in plan.ranges else declared
        size = f", size: {column.size}" if column.size else ""
        # All may lack values: whether a row of the file does would be told by the model's shape.
        what = f"columns: [{json.dumps(name, ensure_ascii=False)}], {declared}{size}, missing: indicator"
        yield f"    - {{{what}}}"
    if found.labels:
        yield "  # The classes, as in the file.  They are declared: every site and every report shows them."
        yield "  labels:"
        yield from (f"    - {_to_yaml(label)}" for label in plan.labels)
    elif found.kind in _OF_ANY_TASK:
        yield "  labels: []"


def describe_spellings(labels: Iterable[str]) -> list[str]:
    """Describe groups of labels that are probably spelling variants of a label, one sentence per group."""
    together = defaultdict[str, list[str]](list)
    for label in labels:
        together[normalize_spelling(label)].append(label)
    alike = [", ".join(map(ascii, some)) for some in together.values() if len(some) > 1]
    what_to_do = "write them alike in the file if they are one. They differ in case, spaces, form or invisible letters"
    return [f"The labels {some} look alike, and are learned as different ones: {what_to_do} alone." for some in alike]


def list_notes(found: DetectedFile, plan: ExperimentPlan) -> Iterator[str]:
    """Yield notes to print before the first run."""
    public = "Sizes are public; at a real site, the site chooses its own in its site.toml."
    sizes = ", ".join(f"{one:,}" for one in _suggest_declared_sizes(plan))
    yield f"declared_sizes: {sizes}, near what each site trains on. {public}"
    proposed = "Labels, target_range and max_length were proposed from nearly all records of the file"
    yield f"{proposed}, and become public too: change whatever reveals too much."
    if plan.by_user:
        records = f"The {plan.usable:,} records are of {plan.units:,} persons"
        yield f"{records}, each protected as a whole (privacy.unit: user)."
    if plan.alike:
        others = "like another except for case, but count as other people: spell them alike if they are one."
        yield f"{pluralize(plan.alike, 'id')} of persons are {others}"
    if plan.units < _FEW_UNITS * plan.num_sites:
        units = pluralize(plan.units, "person" if plan.by_user else "record")
        yield f"{units}: that is little, so with noise the run will likely learn little."
    if plan.left_out.count:
        yield f"{plan.left_out}. A run skips such rows (on_bad_record: skip)."
    if plan.unknown > _MAX_UNKNOWN:
        told = f"{plan.unknown:.0%} of the tokens are unknown to this model"
        yield f"{told}: choose one that knows the texts' language (--model)."
    yield from describe_spellings(plan.labels)
    if none := NO_NAME & set(plan.labels):
        yield f"These labels may mean a missing value: {', '.join(sorted(none))}. If so, remove them from labels."
    if rare := [label for label, count in plan.labels.items() if count < _FEW_OF_LABEL]:
        yield f"Labels with fewer than {_FEW_OF_LABEL} records: {', '.join(rare[:10])}. Each becomes public."
    if unusable := len(found.labels) - len(plan.labels):
        yield f"Not a class, because at most one usable row has it: {pluralize(unusable, 'label')}."
    for way, count in plan.misplaced.items():
        yield f"{count:,} of {plan.usable:,} records have parts that begin or end within a word{way and f' {way}'}."
    yield from found.notes
    if cut := _count_truncated(plan):
        lost = "the start of the text before their answer" if found.kind in _TURNS else "their end"
        lost = "the middle of their longest text" if "prompt" in found.roles else lost
        longer = f"{cut:,} of {len(plan.lengths):,} records are longer than max_length ({plan.max_length} tokens)"
        yield f"{longer} and lose {lost}: raise max_length, or shorten them."
    if len(plan.lengths) == _MEASURED_ROWS:
        yield f"Lengths are from the first {_MEASURED_ROWS:,} rows."


def _to_yaml(value: Any) -> str:
    quotes = '"' if isinstance(value, str) and not value.isprintable() else None
    text: str = yaml.safe_dump(
        escape_interpolations(value),
        default_flow_style=True,
        default_style=quotes,
        allow_unicode=True,
        width=math.inf,
        sort_keys=False,
    )
    return text.removesuffix("\n").removesuffix("\n...")


def escape_interpolations(value: Any) -> Any:
    """Escape `${` in texts, which Hydra would parse as an interpolation."""
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", r"\1\1\\${", value)
    if isinstance(value, dict):
        return {key: escape_interpolations(one) for key, one in value.items()}
    return [escape_interpolations(one) for one in value] if isinstance(value, list | tuple) else value


def format_next_command(file: Path) -> str:
    """Format the command that simulates an experiment file."""
    return shlex.join(["fedtune", "simulate", str(file)])
