"""Command-line arguments and options for finished runs, and output that these commands share."""

from __future__ import annotations

import re
import sys
import unicodedata
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

import yaml

from fedtune.api.public import load
from fedtune.cli.command import Argument, Option
from fedtune.config import RunConfig, parse
from fedtune.evaluation.bootstrap import Comparison
from fedtune.lab.studies.comparison import format_change
from fedtune.spec import ConfigError, DataError, check_at_least, check_name, check_one_of

_SETTING = re.compile(r"set data\.columns\.(\w+) to one of")
Run = Annotated[Path, Argument("RUN", help="a run folder, such as runs/tighter")]
Columns = Annotated[str | None, Option("columns of FILE, as in '{text: body}'", metavar="ROLES")]
Device = Annotated[Literal["auto", "cpu", "cuda"], Option("compute device")]
Adapters = Annotated[
    tuple[str, ...], Option("additional adapter from a run of the same model; may be repeated", metavar="NAME=RUN")
]
MaxNewTokens = Annotated[int, Option("the maximum length of an answer, in tokens")]
Temperature = Annotated[float, Option("sampling temperature (0: greedy decoding)")]
TopP = Annotated[float, Option("total probability of the most likely tokens to sample from")]
Seed = Annotated[int, Option("seed for sampling")]


def load_finished_run(
    run: Path, *, device: str = "auto", columns: str | None = None, generate: int | None = None
) -> tuple[RunConfig, Path]:
    """Load the configuration of a finished run, and find its adapter.

    Args:
        run: the run folder, or its `adapter` folder.
        device: replacement for `runtime.device`.
        columns: a `{role: column}` mapping from the command line, for a file whose column names differ from the run's.
        generate: number of prompts for which evaluation generates texts; None: the run's number.

    Returns:
        The configuration and the adapter folder.
    """
    loaded = load(run)
    config, settings = loaded.config, loaded.config.to_json()
    settings["runtime"]["device"] = device
    if columns is not None:
        settings["data"]["columns"] |= parse_column_roles(columns, known=config.data.columns)
    if generate is not None:
        if not config.bound_task.predicts_tokens:
            raise ConfigError("--generate", generate, f"requires a task that generates text; {config.task} does not")
        check_at_least("--generate", generate, 1)
        settings["evaluation"] |= {"generate": True, "generation_rows": generate}
    return parse(settings), loaded.adapter


def parse_column_roles(columns: str, *, known: Collection[str] | None = None) -> dict[str, str]:
    """Parse a `{role: column}` mapping from the command line.

    Raises:
        ConfigError: the text is not a mapping such as `{text: body}`, or a role is not in `known`.
    """
    try:
        named = yaml.safe_load(columns)
    except (yaml.YAMLError, ValueError, RecursionError):  # an invalid date, or deep nesting
        named = None
    if not isinstance(named, dict) or not all(isinstance(word, str) for pair in named.items() for word in pair):
        raise ConfigError("--columns", columns, "must map roles to columns, as in '{text: body}'")
    if known is not None:
        for role in named:
            check_one_of("--columns", role, sorted(known))
    return named


def collect_adapters(run: Path, own: Path, others: Sequence[str]) -> dict[str, Path]:
    """Return a mapping from names to adapter folders, starting with the adapter `own` of the run.

    The name of `own` is the name of its run folder, unless `others` (words of the form NAME=RUN) gives it another name.
    """
    named: dict[str, Path] = {}
    for word in others:  # NAME=RUN each
        name, given, folder = word.partition("=")
        if not given or not folder.strip():
            raise ConfigError("--adapter", word, "must be NAME=RUN")
        check_name("--adapter", name)
        if name in named or name == "base":
            raise ConfigError("--adapter", word, f"the name {name} is already used")
        named[name] = load_finished_run(Path(folder))[1]
    if any(folder.samefile(own) for folder in named.values()):
        return dict(sorted(named.items(), key=lambda item: not item[1].samefile(own)))
    name = own.absolute().parent.name or "tuned"
    if name in named or name == "base":
        raise ConfigError("--adapter", f"{name}=...", f"the name {name} is already used for {run}")
    return {name: own, **named}


@contextmanager
def suggest_columns_option() -> Iterator[None]:
    """Rewrite error messages about a file's columns to suggest --columns instead of a setting."""
    try:
        yield
    except DataError as error:
        bound = _SETTING.sub(r"choose another with --columns '{\1: COLUMN}', one of", error.bound)
        raise DataError(error.key, error.value, bound) from None


def list_comparison_rows(scores: Mapping[str, Comparison]) -> list[tuple[str, ...]]:
    """Build one table row per score: the scores of two models, their difference with its interval, and the verdict."""
    both = {name: (f"{one.base.value:.4f}", f"{one.tuned.value:.4f}") for name, one in scores.items()}
    return [(name, *values, *format_change(scores[name])) for name, values in both.items()]


def warn_about_fixed_prompt(config: RunConfig) -> None:
    """Warn if the prompt template does not contain the prompt, so that all prompts have the same completion."""
    data = config.data
    if "prompt" in data.columns and "prompt" not in data.template_roles and config.bound_task.predicts_tokens:
        template = f"data.prompt_template = {data.prompt_template!r}"
        sys.stderr.write(f"{template} has no {{prompt}}: the prompt is ignored\n")


def strip_control_characters(text: str) -> str:
    """Remove control characters, which a terminal would execute, from generated text."""
    return "".join(one for one in text if one in "\n\t" or unicodedata.category(one) != "Cc")


def print_stream(parts: Iterator[str]) -> None:
    """Print generated text as a stream, and end its line also if the user interrupts it with Ctrl-C."""
    try:
        for part in parts:
            sys.stdout.write(strip_control_characters(part))
            sys.stdout.flush()
    finally:
        sys.stdout.write("\n")
        sys.stdout.flush()
