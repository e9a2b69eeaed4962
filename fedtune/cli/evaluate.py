"""`fedtune evaluate`: scores of a saved adapter and of its base model on a data file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any

from fedtune.api.public import make_stage_callback
from fedtune.cli.command import AsJson, Option, print_answer
from fedtune.cli.finished_run import (
    Columns,
    Device,
    Run,
    list_comparison_rows,
    load_finished_run,
    suggest_columns_option,
)
from fedtune.cli.personalize import show_progress
from fedtune.evaluation.bootstrap import MIN_UNITS, NO_DIFFERENCE, RESAMPLES, Comparison, describe_against_constant
from fedtune.formatting import pluralize
from fedtune.show.terminal_tables import Section
from fedtune.tasks.measures import Detail

if TYPE_CHECKING:  # it imports torch, which takes seconds
    from fedtune.runs.model_comparison import SideBySide

_MAX_LABELS = 20


def evaluate(
    run: Run,
    data: Annotated[str, Option(metavar="FILE", help="a data file in any supported format")],
    columns: Columns = None,
    generate: Annotated[int | None, Option("also score generated texts for the first N prompts", metavar="N")] = None,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Evaluate a run's adapter and its base model on a data file.

    The file needs the columns of the run's settings. Scores are exact, and no guarantee covers the file's records.
    Intervals are bootstrap intervals over the records, or over users if the run has user-level privacy.
    """
    config, adapter = load_finished_run(run, device=device, columns=columns, generate=generate)
    from fedtune.runs.model_comparison import compare_runs
    from fedtune.sites.data_warnings import TRAINED_ON, is_training_file

    runs = {"tuned": (config, adapter)}
    with suggest_columns_option(), show_progress() as progress:
        found = compare_runs(runs, file=data, final=True, progress=make_stage_callback(progress))
    tuned = found.measured["tuned"]
    in_order = dict.fromkeys((*found.score(tuned.examples), *found.scores))  # in the task's order
    scores = {name: found.compare_models("base", "tuned", name) for name in in_order}
    num_prompts, detail = len(tuned.texts.get("rouge_l", ())), found.detailed(tuned.examples)
    of_tuned = {name: one.tuned.value for name, one in scores.items()}
    figures: dict[str, Any] = {"run": str(run), "data": data, "scores": of_tuned}
    figures |= {"beside_base": scores, "records": len(found.records), "prompts": num_prompts}
    figures |= {"unit": found.unit, "units": found.num_units}
    if found.constant is not None:
        figures |= {"constant_answer": {found.primary_metric: found.constant}}
    if detail is not None:
        figures |= {"detail": detail}
    notes = list(_iter_score_notes(found, scores, num_prompts=num_prompts))
    if is_training_file(config, data):
        notes.append(TRAINED_ON)
    title = f"{run} on {data}, {pluralize(len(found.records), 'record')}"
    headings = ("metric", "base", "tuned", "difference", "95 % interval", "tuned is")
    scores_first = Section(title, headings, list_comparison_rows(scores), words={0, 5}, notes=notes)
    print_answer(figures, [scores_first, *(() if detail is None else _build_detail_sections(detail))], as_json=as_json)


def _build_detail_sections(detail: Detail) -> Iterator[Section]:
    most = sorted(detail.classes, key=lambda one: -one.support)
    left = len(most) - _MAX_LABELS
    rows = []
    for one in most[:_MAX_LABELS]:
        rows.append((one.label, *map("{:.4f}".format, (one.precision, one.recall, one.f1)), f"{one.support:,}"))
    notes = [f"and {left} more (see --json)"] if left > 0 else []
    yield Section("Labels of the tuned model", ("label", "precision", "recall", "F1", "support"), rows, notes=notes)
    bins = [(f"{one.confidence:.4f}", f"{one.accuracy:.4f}", f"{one.count:,}") for one in detail.reliability]
    title = "Calibration of the tuned model"
    headings = ("mean probability", "share correct", "answers")
    notes = ["Bins contain equal numbers of answers, sorted by confidence. ECE is the mean calibration gap."]
    yield Section(title, headings, bins, words=(), notes=notes if bins else ())


def _iter_score_notes(found: SideBySide, scores: Mapping[str, Comparison], *, num_prompts: int) -> Iterator[str]:
    if found.constant is not None:
        tuned = scores[found.primary_metric].tuned
        yield describe_against_constant(
            "the tuned model", tuned, found.constant, score=found.primary_metric, num_units=found.num_units
        )
    name, first = next(iter(scores.items()))
    before, after = (f"{one.value:.4g} ({one.low:.4g} to {one.high:.4g})" for one in (first.base, first.tuned))
    told = f"{before} before and {after} after training"
    if first.verdict == NO_DIFFERENCE:
        yield f"On these records the tuned model {NO_DIFFERENCE} from its base by {name}: {told}."
    else:
        yield f"The tuned model is {first.verdict} than its base by {name}: {told}."
    drawn = pluralize(found.num_units, found.unit)
    if num_prompts:
        drawn += f" ({pluralize(num_prompts, 'prompt')} for texts)"
    yield f"Intervals: 95 %, from {RESAMPLES:,} bootstrap samples of {drawn}. Base: before training."
    few = [f"{found.unit}s"] if found.num_units < MIN_UNITS else []
    few += ["prompts"] if 0 < num_prompts < MIN_UNITS else []
    if few:
        yield f"Fewer than {MIN_UNITS} {' or '.join(few)} are too few to call a model better or worse."
