"""`fedtune export`: a run's model in a form that others load without fedtune."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

from rich.console import Console

from fedtune.cli.command import AsJson, Option, single
from fedtune.cli.finished_run import Run, finished_run
from fedtune.show.terminal_tables import SCHEMA_VERSION, Section, print_json, show
from fedtune.spec import NOT_GIVEN, ConfigError
from fedtune.tasks import task_named
from fedtune.tasks.inputs import input_of
from fedtune.words import size


def export(
    run: Run,
    to: Annotated[Path, Option(metavar="FOLDER", help="a new folder to write")],
    merge: Annotated[bool, Option(names=("--merge",), help="the whole model, with the adapter merged into it")] = False,
    format: Annotated[
        Literal["peft", "merged", "sentence-transformers", "safetensors", "onnx"] | None,
        Option(help="(default: peft; of features safetensors)"),
    ] = None,
    private: Annotated[
        bool, Option(names=("--private",), help="also a site's own adapter, of which no guarantee protects the records")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Write a finished run's model for others to load, with its model card and tokenizer.

      fedtune export runs/tighter --to FOLDER                  the adapter, for PEFT
      fedtune export runs/tighter --to FOLDER --merge          the whole model: of a language model for transformers
                                                               (merged), of a classifier for sentence-transformers
      fedtune export runs/tighter --to FOLDER --format onnx    the whole model, for ONNX runtimes

    What is written is loaded again and must compute what the run's model computes. docs/using_the_result.md shows how
    to load and serve each of them.
    """
    config, adapter = finished_run(run)
    if merge and format is not None:
        raise ConfigError("--merge", format, "and --format exclude each other: --merge is a format of its own")
    formats = input_of(config.data).formats(task_named(config.task).formats)
    if merge and len(formats) == 1:
        raise ConfigError("--merge", NOT_GIVEN, f"is not possible for task {config.task}, which has adapters alone")
    chosen = format or formats[int(merge)]
    if chosen not in formats:
        raise ConfigError("--format", format, f"must be one of {', '.join(formats)} for task {config.task}")
    if os.path.lexists(to):
        raise ConfigError("--to", str(to), "must be a new folder; there is something of that name")
    if to.absolute().resolve().is_relative_to(adapter.resolve()):
        raise ConfigError("--to", str(to), "must lie outside the run's adapter folder")
    from fedtune.export.export_formats import export as write  # torch takes seconds to import

    files = write(adapter, config, to, format=chosen, private=private)
    if as_json:
        names = [str(path.relative_to(to)) for path in files]
        print_json(
            {"schema_version": SCHEMA_VERSION, "run": str(run), "folder": str(to), "format": chosen, "files": names}
        )
        return
    rows = tuple((str(path.relative_to(to)), size(path.stat().st_size)) for path in files)
    show(Console(), [Section(title=f"{run} as {chosen}, in {to}", headings=("file", "size"), rows=rows)])


app = single(export)
