"""Terminal tables of the `fedtune data` commands."""

from __future__ import annotations

import tomllib
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from fedtune.data.bad_rows import SkippedRows
from fedtune.data.load import is_far_from_declared
from fedtune.extras import build_install_command, is_installed
from fedtune.formatting import pluralize
from fedtune.lab.preparation import experiment_writer
from fedtune.lab.preparation.check_data import Checked, FileCheck, Finding, Kind
from fedtune.lab.preparation.clean import RULES, UNREADABLE, Cleaned
from fedtune.lab.preparation.detected_file import KINDS, DetectedFile
from fedtune.lab.preparation.duplicates import Near
from fedtune.show.terminal_tables import Section, build_key_value_section
from fedtune.spec import format_value

_WORDS = tomllib.loads(Path(__file__).with_name("data_words.toml").read_text(encoding="utf-8"))
ABOUT, ABOUT_COPIES = tuple(_WORDS["about"]), tuple(_WORDS["about_copies"])
_FOUND: Mapping[Kind, tuple[str, str]] = _WORDS["finding"]  # the name of a finding, and its meaning
_RUNS = {least: f"a run of {least} words or more" for least in (8, 12, 20)}
_LIKE = {"same": "the same text", "alike": "almost the same text"}
_SHOWN = 60
_MAX_LABELS, _MAX_NAMES = 30, 12
_MAX_COLUMNS = 40
_MAX_LINES = 6
_BAR = 40


def build_file_sections(found: DetectedFile, plan: experiment_writer.ExperimentPlan) -> Iterator[Section]:
    """Yield the tables of `fedtune data init`: detected task, columns, first rows and labels."""
    unread = f", and {pluralize(found.num_faults, 'row')} that cannot be read" if found.num_faults else ""
    file = f"{found.path}, {pluralize(found.rows, 'row')}{unread}"
    yield build_key_value_section({"file": file, "kind": KINDS[found.kind][0]})
    headings: tuple[str, ...] = ("role", "column", "reason", "override with")
    yield Section("Chosen columns", headings, tuple(found.options), words=range(4), notes=found.notes)
    yield _build_truncated_section("Columns that runs ignore", ("column", "reason"), tuple(found.unread))
    counts = {name: f"{one.num_values:,}" if one.num_values else "many" for name, one in found.columns.items()}
    every = found.columns.values()
    held = tuple((one.name, f"{one.filled:,}", one.holds or "nothing", counts[one.name]) for one in every)
    yield _build_truncated_section("Columns", ("name", "filled", "type", "distinct values"), held, words={0, 2})
    odd = tuple(
        (name, kind, f"{count:,}", ", ".join(f"{row}: {_shorten_text(text)}" for row, text in some))
        for name in found.roles.values()
        for kind, count, some in found.columns[name].strange
    )
    headings = ("column", "kind", "values", "row: value")
    yield _build_truncated_section("Unusual values (a run may skip these rows)", headings, odd)
    columns = found.roles.values()
    rows = [tuple(_shorten_text(_format_cell_text(row.get(column, ""))) for column in columns) for row in found.first]
    headings = tuple(f"{role}: {column}" for role, column in found.roles.items())
    yield Section("First rows", headings, rows, words=range(len(columns)))
    yield _build_labels_section(plan.labels, plan.usable)
    yield Section(title="Rows that cannot be read", notes=tuple(map(str, found.faults)))


def _format_cell_text(value: Any) -> str:
    if isinstance(value, list):  # turns of a conversation
        turns = (": ".join(map(str, turn.values())) if isinstance(turn, dict) else str(turn) for turn in value)
        return " | ".join(turns)
    return value if isinstance(value, str) else format_value(value)


def _shorten_text(text: str, most: int = _SHOWN) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else f"{text[: most - 1]}\u2026"


def _build_truncated_section(
    title: str, headings: tuple[str, ...], rows: tuple[tuple[str, ...], ...], *, words: Collection[int] = range(4)
) -> Section:
    more = len(rows) - _MAX_COLUMNS
    return Section(title, headings, rows[:_MAX_COLUMNS], words=words, notes=[f"and {more:,} more"] if more > 0 else ())


def build_input_section(found: DetectedFile, plan: experiment_writer.ExperimentPlan, model: str) -> Section:
    """Build the table of features with their private values (only for the terminal), or of token counts."""
    if found.features:
        rows = []
        for one in (found.columns[name] for name in found.features):
            names = [label for label, _ in one.labels.most_common()]
            more = f", and {len(names) - _MAX_NAMES:,} more" if len(names) > _MAX_NAMES else ""
            what, holds = "categories", f"{', '.join(names[:_MAX_NAMES])}{more}"
            if not one.is_category:
                what = "a number" if one.size is None else f"a list of {one.size} numbers"
                holds = f"{min(one.numbers):g} to {max(one.numbers):g}" if one.size is None else ""
            lacking = f"{found.rows - one.filled:,}" if one.filled < found.rows else ""
            rows.append((one.name, what, holds, lacking))
        title = "Features and the file's values (shown only here)"
        headings = ("column", "detected type", "values in the file", "rows without a value")
        return Section(title, headings, rows, words={0, 1, 2}, notes=_WORDS["about_features"])
    shares = (int(np.quantile(plan.lengths, share)) for share in (0.5, 0.9, 1.0))
    row = tuple(f"{count:,}" for count in (*shares, plan.max_length))
    of_lengths = ("median", "90th percentile", "longest", "max_length")
    return Section(f"Tokens per record (tokenizer of {model})", of_lengths, [row], words=())


def build_check_sections(checked: Checked) -> Iterator[Section]:
    """Yield the tables of `fedtune data check`: findings, labels and lengths per file."""
    for file in checked.files:
        yield from _build_file_sections(file, checked.max_length)
    rows, far = list[tuple[str, ...]](), dict[int, str]()
    for place, (site, one) in enumerate(checked.sizes.items()):
        declared, true = one["declared"], one["true"]
        rows.append((site, f"{declared:,}", f"{true:,}", f"{declared / max(1, true):.2f}"))
        far |= {place: "bold yellow"} if is_far_from_declared(true, declared) else {}
    headings = ("site", "declared", "to train on", "declared / true")
    yield Section("Declared sizes", headings, rows, styles=far, notes=[_WORDS["about_sizes"]])
    yield Section(title="Not checked", notes=checked.skipped)


def _build_file_sections(file: FileCheck, max_length: int) -> Iterator[Section]:
    usable, left_out = sum(file.uses.values()), SkippedRows(rows=file.rows, reasons=file.num_errors)
    uses = ", ".join(f"{count:,} for {use}" for use, count in file.uses.items()) or "none"
    told = {"rows": f"{file.rows:,}", "usable": uses, "errors": f"{left_out.count:,}"}
    yield build_key_value_section(told, title=file.path)
    yield Section(notes=(f"{left_out}.",) if left_out.exceeds_threshold else ())
    left = left_out.count - len(file.errors)
    in_all = f"and {left:,} more. Total:" if left else "Total:"
    why = [in_all, *(f"{count:,} {why}" for why, count in file.num_errors.items())] if file.errors else ()
    yield Section("Errors", ("location", "value", "requirement"), file.errors, words={0, 1, 2}, notes=why)
    headings = ("finding", "column", "records", "share", file.places)
    rows = [_format_finding_row(one, usable) for one in file.findings] or [("nothing", "", "", "", "")]
    meanings = [*dict.fromkeys(_FOUND[one.kind][1] for one in file.findings)]
    yield Section("Findings", headings, rows, words={0, 1, 4}, notes=meanings)
    yield _build_labels_section(file.labels, usable)
    notes = experiment_writer.describe_spellings(file.labels)
    for label, count in file.spelt_otherwise.items():
        notes.append(f"{pluralize(count, 'row')} cannot be used: the label differs from {label!r} in case or spacing.")
    yield Section(title="Labels with several spellings", notes=notes)
    if (found := file.lengths) is not None:
        most = max(count for *_, count in found.bins)
        bars = {(start, end): "\u2588" * -(-_BAR * count // most) for start, end, count in found.bins}
        tokens = [(f"{start:,} to {end:,}", f"{count:,}", bars[start, end]) for start, end, count in found.bins]
        spread = f"Median {found.median:,}, 90th percentile {found.most_of_them:,}, longest {found.longest:,}."
        note, columns = f"{spread} data.max_length is {max_length:,}.", ("tokens", "records", "")
        yield Section("Tokens per record", columns, tokens, words={0, 2}, whole={0, 2}, notes=[note])


def _format_finding_row(one: Finding, usable: int) -> tuple[str, ...]:
    lines = [f"{line}" if like is None else f"{line} (as {like})" for line, like in one.lines[:_MAX_LINES]]
    more = ["..."] if one.count > len(lines) else []
    name = f"{_FOUND[one.kind][0]} {one.what}".strip()
    return name, one.column, f"{one.count:,}", f"{one.count / usable:.1%}", ", ".join([*lines, *more])


def _build_labels_section(labels: Mapping[str, int], records: int, word: str = "label") -> Section:
    most = sorted(labels.items(), key=lambda one: -one[1])
    left = most[_MAX_LABELS:]
    notes = [f"and {pluralize(len(left), 'other')} with {sum(count for _, count in left):,} records"] if left else []
    if missing := sum(not count for count in labels.values()):
        notes.append(f"{pluralize(missing, f'declared {word}')} without a record")
    rows = [(label, f"{count:,}", f"{count / max(1, records):.1%}") for label, count in most[:_MAX_LABELS]]
    return Section(f"{word.capitalize()}s", (word, "records", "share"), rows, notes=notes)


def build_clean_sections(done: Cleaned) -> Iterator[Section]:
    """Yield the tables of `fedtune data clean`: kept, dropped and masked rows."""
    dropped = done.dropped.total()
    counts = {"rows": done.kept + dropped, "kept": done.kept, "dropped": dropped}
    yield build_key_value_section({what: f"{count:,}" for what, count in counts.items()})
    why = {**RULES, UNREADABLE: "the row cannot be read"}
    by_rule = [(rule, f"{count:,}", why[rule]) for rule, count in done.dropped.items()]
    yield Section("Dropped", ("rule", "rows", ""), by_rule, words={0, 2})
    places = [(kind, f"{count:,}") for kind, count in done.masked.items()]
    yield Section("Masked", ("identifier", "occurrences"), places, notes=[_FOUND["personal"][1]] if places else ())
    yield Section(notes=[_WORDS["about_dropped"]] if {"duplicates", "near-duplicates"} & set(done.dropped) else ())


def build_codes_sections(
    done: Cleaned, codes: Mapping[str, Sequence[str]], same: Mapping[str, str]
) -> Iterator[Section]:
    """Yield the tables of `fedtune data codes`: records per code, and the hashes to compare between sites."""
    yield from build_clean_sections(replace(done, masked=Counter()))
    for column, names in codes.items():
        found = {name: done.masked[f"{column}: {name}"] for name in names}
        yield _build_labels_section(found, done.kept, column)
    yield build_key_value_section(same, title="SHA-256 hashes that must be equal at all sites")
    yield Section(notes=ABOUT[:1])


def build_copies_sections(
    near: Sequence[Near], usual: Sequence[Near], read: Mapping[str, SkippedRows]
) -> Iterator[Section]:
    """Yield the tables of `fedtune data copies`: similarity of synthetic records to a site's own, with a baseline."""
    counts, rows = Counter(what for one in usual for what in _list_match_kinds(one)), list[tuple[str, ...]]()
    warned = dict[int, str]()
    shares: dict[str, list[float]] = {what: [] for what in (*_RUNS.values(), *_LIKE.values())}
    for one in near:
        for what in _list_match_kinds(one):
            shares.setdefault(what, []).append(one.share)
    for what, some in shares.items():
        share, expected = len(some) / len(near), counts[what] / len(usual)
        if some and share >= 2 * expected:
            warned[len(rows)] = "bold yellow"
        of_text = f"{np.median(some):.0%}" if some else ""
        rows.append((what, f"{len(some):,}", f"{share:.1%}", f"{expected:.1%}", of_text))
    about = f"the share for {len(usual):,} own records, compared with the other own records"
    notes = [f"Baseline: {about}. Run / text: median."]
    if warned:
        notes.append(f"WARNING: at least twice the baseline: {', '.join(rows[at][0] for at in warned)}.")
    of_files = {at: f"{n.rows - n.count:,} of {pluralize(n.rows, 'row')}" for at, n in read.items()}
    yield build_key_value_section({at.rpartition("/")[2]: usable for at, usable in of_files.items()})
    what_again = ("synthetic records with", "records", "share", "baseline", "longest run / text")
    yield Section("Repeated text", what_again, rows, styles=warned, notes=notes)
    runs = [one for one in near[:10] if one.words]
    longest = [(f"{one.words:,}", f"{one.share:.0%}", one.place, one.of, _shorten_text(one.run, 300)) for one in runs]
    headings = ("words", "of text", "synthetic", "own", "run")
    yield Section("Longest runs of words", headings, longest, words={2, 3, 4}, whole={2, 3})
    again = sorted((count, kind, one.place, own) for one in near for kind, count, own in one.details)
    details = [(kind, f"{count:,}", *places) for count, kind, *places in again[:10]]
    kinds = ("kind", "own records with it", "synthetic", "first own record")
    yield Section("Likely personal details", kinds, details, words={0, 2, 3})
    missing = f"Near-duplicates were not detected: datasketch is not installed ({build_install_command('data')})."
    yield Section(title="Notes", notes=[*ABOUT_COPIES, *([] if is_installed("datasketch") else [missing])])


def _list_match_kinds(one: Near) -> Iterator[str]:
    yield from (what for least, what in _RUNS.items() if one.words >= least)
    yield from [_LIKE[one.likeness]] if one.likeness else []
    yield from {f"a likely {kind}" for kind, _, _ in one.details}
