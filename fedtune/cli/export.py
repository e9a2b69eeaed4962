"""`fedtune export` and `fedtune distill`: a run's model, or a smaller student model, in standard formats."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, Literal

from rich.console import Console

from fedtune.cli.command import AsJson, Option, print_answer
from fedtune.cli.finished_run import (
    Columns,
    Device,
    Run,
    list_comparison_rows,
    load_finished_run,
    parse_column_roles,
    suggest_columns_option,
)
from fedtune.export.format_choice import choose_format
from fedtune.federation.run_folder import RunFolder
from fedtune.formatting import format_size, pluralize
from fedtune.show.terminal_tables import Section, require_confirmation, show
from fedtune.spec import NOT_GIVEN, ConfigError, expand_home


def export(
    run: Run,
    to: Annotated[Path | None, Option(metavar="FOLDER", help="a new folder to write")] = None,
    merge: Annotated[bool, Option("export the whole model with the merged adapter")] = False,
    format: Annotated[
        Literal["peft", "merged", "sentence-transformers", "safetensors", "onnx"] | None,
        Option("output format (default: peft; safetensors for features)"),
    ] = None,
    int8: Annotated[
        bool, Option("with --format onnx: also write an int8 graph, and measure scores and latency of both")
    ] = False,
    private: Annotated[bool, Option("allow a personalized adapter, which has no privacy guarantee")] = False,
    push: Annotated[str | None, Option("upload to a new private repository of the hub", metavar="OWNER/NAME")] = None,
    public: Annotated[bool, Option("with --push: make the repository public")] = False,
    without_guarantee: Annotated[
        bool, Option("with --push: allow a model without a guarantee, in a private repository")
    ] = False,
    yes: Annotated[bool, Option("with --push: do not ask for confirmation")] = False,
    as_json: AsJson = False,
) -> None:
    """Export a finished run's model with its model card and tokenizer.

      fedtune export runs/tighter --to FOLDER                  the adapter, for PEFT
      fedtune export runs/tighter --to FOLDER --merge          the merged model: for transformers (language models) or
                                                               sentence-transformers (classifiers)
      fedtune export runs/tighter --to FOLDER --format onnx    the whole model, for ONNX runtimes
      fedtune export runs/tighter --to FOLDER --format onnx --int8     also quantized to int8, with its loss in score
      fedtune export runs/tighter --push OWNER/NAME            upload to the Hugging Face hub, after a confirmation

    The exported model is reloaded, and its outputs must equal those of the run's model. See docs/using_the_result.md
    for how to load and serve each format.
    """
    if to is None and push is None:
        raise ConfigError("--to", NOT_GIVEN, "is required: give a new folder, or upload with --push OWNER/NAME")
    for option, is_given in {"--public": public, "--without-guarantee": without_guarantee, "--yes": yes}.items():
        if is_given and push is None:
            raise ConfigError(option, NOT_GIVEN, "requires --push OWNER/NAME")
    if push is not None and private:
        bound = "cannot be combined with --push: a personalized adapter stays at its site"
        raise ConfigError("--private", NOT_GIVEN, bound)
    if push is not None and as_json and not yes:
        raise ConfigError("--json", NOT_GIVEN, "requires --yes with --push, because it cannot ask for confirmation")
    config, adapter = load_finished_run(run)
    if merge and format is not None:
        raise ConfigError("--merge", format, "cannot be combined with --format: use --format merged")
    chosen = choose_format(config, format, merge=merge, int8=int8)
    option, target = ("--to", to) if to is not None else ("--push", Path(str(push)))
    RunFolder(adapter.parent).require_export_target(target, key=option)
    from fedtune.export import hub  # torch takes seconds to import
    from fedtune.export.export_formats import export as write
    from fedtune.export.onnx_graphs import measure_folder
    from fedtune.sites.run_records import LeadRecords

    warnings = []
    if push is not None:
        warnings = hub.require_pushable(adapter, push, public=public, without_guarantee=without_guarantee)
    # Read them first: without test records the loss of int8 cannot be measured, and nothing is written.
    records = LeadRecords.read_for_scoring(config, None) if int8 else None
    with TemporaryDirectory() as scratch:
        folder = to or Path(scratch, str(push).rpartition("/")[2])
        files = write(adapter, config, folder, format=chosen, private=private, int8=int8)
        graphs = measure_folder(folder, adapter, config, records) if records else []
        rows = [(str(path.relative_to(folder)), format_size(path.stat().st_size)) for path in files]
        figures: dict[str, Any] = {"run": str(run), "folder": to and str(to), "format": chosen}
        figures |= {"files": [name for name, _ in rows], "graphs": graphs}
        sections = [Section(title=f"{run} as {chosen}, in {to or push}", headings=("file", "size"), rows=rows)]
        if graphs:
            headings = ("graph", "size", "ms per text", *graphs[0].scores)
            costs = [_build_cost_section(one, graphs[0].scores) for one in graphs]
            sections.append(Section(title="On the run's test records, one thread", headings=headings, rows=costs))
        if to is not None and not private:
            notes = [f"The run's report does not list these files yet; to add them, run: fedtune report {run}"]
            sections.append(Section(notes=notes))
        if push is not None:
            if not as_json:
                show([*sections, Section(title="No privacy guarantee covers this model", notes=warnings)])
            if not yes:
                visibility = "PUBLIC" if public else "private"
                question = f"Upload these {pluralize(len(files), 'file')} to {push}, a new {visibility} repository?"
                require_confirmation(question, otherwise=f"nothing was uploaded to {push}")
            figures |= {"repository": hub.push(folder, files, push, public=public), "public": public}
            sections = [Section(notes=[f"Uploaded to {figures['repository']}"])]
    print_answer(figures, sections, as_json=as_json)


def _build_cost_section(one: Any, scores: Iterable[str]) -> tuple[str, ...]:
    """Build the table row of an exported model: size, latency and the named scores."""
    return one.file, format_size(one.bytes), f"{one.milliseconds:.1f}", *(f"{one.scores[name]:.4f}" for name in scores)


def distill(
    run: Run,
    texts: Annotated[str, Option("public or synthetic texts, one per line (.txt), or records", metavar="FILE")],
    to: Annotated[Path, Option(metavar="FOLDER", help="a new folder to write")],
    student: Annotated[str, Option("half, a number of layers, or another base model", metavar="MODEL")] = "half",
    format: Annotated[Literal["sentence-transformers", "onnx"], Option()] = "sentence-transformers",
    int8: Annotated[bool, Option("with --format onnx: also write an int8 graph")] = False,
    passes: Annotated[int, Option("passes over the texts")] = 10,
    seed: Annotated[int, Option("seed for the order of the texts")] = 0,
    columns: Columns = None,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Distill a finished run's model into a smaller student model, and export the student.

      fedtune distill runs/tighter --texts public.txt --to FOLDER       student: the lower half of the base's layers
      fedtune distill runs/tighter --texts public.txt --to FOLDER --student 2                    the lowest two layers
      fedtune distill runs/tighter --texts public.txt --to FOLDER --student package:own/model    another base model

    For text classification and regression. The sites' records are not read, so nothing is charged. Texts without a
    card are assumed to be public, and the student has the run's epsilon. For texts with a card of synthetic records,
    the epsilon of the runs in the card is added.
    """
    config, adapter = load_finished_run(run, device=device)
    named = parse_column_roles(columns, known=config.data.columns) if columns is not None else None
    from fedtune.lab import distillation  # torch takes seconds to import

    with Console(stderr=True).status("Loading ...") as status, suggest_columns_option():
        found = distillation.distill(
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
    judged = config.bound_task.primary_metric if found.scores else ""
    rows = [_build_cost_section(one, [judged] if judged else []) for one in found.served]
    headings = ("model", "size", "ms per text", *([judged] if judged else []))
    notes = [f"Distilled on {pluralize(found.texts, 'text')}. Latencies are for one thread."]
    sections = [Section(title=f"A student of {run}, in {to}", headings=headings, rows=rows, words={0}, notes=notes)]
    if judged:
        told = ("metric", "teacher", "student", "difference", "95 % interval", "student is")
        title = f"On {pluralize(found.records, 'test record')}"
        sections.append(Section(title=title, headings=told, rows=list_comparison_rows(found.scores), words={0, 5}))
    figures = {"run": str(run), "folder": str(to), "distilled": found}
    print_answer(figures, sections, as_json=as_json)
