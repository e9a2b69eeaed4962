"""`fedtune distil`: a smaller model that answers as a finished run's does."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from rich.console import Console

from fedtune.cli.command import AsJson, Option, answer
from fedtune.cli.finished_run import Columns, Device, Run, columns_by_option, compared_rows, finished_run, roles_of
from fedtune.show.terminal_tables import SCHEMA_VERSION, Section
from fedtune.spec import NOT_GIVEN, ConfigError, expand_home
from fedtune.tasks.registry import task_named
from fedtune.words import counted, size


def distil(
    run: Run,
    texts: Annotated[str, Option("public or synthetic: a text a line (.txt), or records", metavar="FILE")],
    to: Annotated[Path, Option(metavar="FOLDER", help="a new folder to write")],
    student: Annotated[str, Option("half, a number of layers, or another base", metavar="MODEL")] = "half",
    format: Annotated[Literal["sentence-transformers", "onnx"], Option()] = "sentence-transformers",
    int8: Annotated[bool, Option("with --format onnx: also a graph in int8")] = False,
    passes: Annotated[int, Option("through the texts")] = 10,
    seed: Annotated[int, Option("of the order of the texts")] = 0,
    columns: Columns = None,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Teach a smaller model the answers of a finished run's, and write it for others to load.

      fedtune distil runs/tighter --texts public.txt --to FOLDER       the lower half of the run's own base
      fedtune distil runs/tighter --texts public.txt --to FOLDER --student 2                    its lowest two layers
      fedtune distil runs/tighter --texts public.txt --to FOLDER --student package:own/model    another base

    Of a run whose head answers to a text by labels or a number. The sites' records are not read, so nothing is charged.
    Texts without a card are taken as public, and epsilon stays the run's; that of a card's runs is added to it.
    """
    config, adapter = finished_run(run, device=device)
    named = roles_of(columns, known=config.data.columns) if columns is not None else None
    if int8 and format != "onnx":
        raise ConfigError("--int8", NOT_GIVEN, "goes with --format onnx")
    from fedtune.export import distillation  # torch takes seconds to import

    with Console(stderr=True).status("Loading ...") as status, columns_by_option():
        found = distillation.distil(
            config,
            adapter,
            to,
            student=student,
            texts=expand_home(texts, key="--texts"),
            columns=named,
            format=format,
            int8=int8,
            seed=seed,
            passes=passes,
            progress=lambda what, done, total: status.update(f"{what}: step {done} of {total}"),
        )
    judged = task_named(config.task).judged_by if found.scores else ""
    rows = [
        (one.file, size(one.bytes), f"{one.milliseconds:.1f}", *([f"{one.scores[judged]:.4f}"] if judged else []))
        for one in found.served
    ]
    headings = ("model", "size", "ms a text", *([judged] if judged else []))
    notes = [f"Taught on {counted(found.texts, 'text')}. Times are of one thread."]
    sections = [Section(title=f"A student of {run}, in {to}", headings=headings, rows=rows, words={0}, notes=notes)]
    if judged:
        told = ("metric", "teacher", "student", "difference", "95 % interval", "student is")
        title = f"On {counted(found.records, 'test record')}"
        sections.append(Section(title=title, headings=told, rows=compared_rows(found.scores), words={0, 5}))
    figures = {"schema_version": SCHEMA_VERSION, "run": str(run), "folder": str(to), "distilled": found}
    answer(figures, sections, as_json=as_json)
