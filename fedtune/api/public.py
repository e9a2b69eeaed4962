"""Python API of `import fedtune` for runs, plans, evaluations and reports.  The API for ledgers is in `public_ledger`.

Settings use dotted keys, as on the command line.  Invalid input raises a `ValueError` with the same message as on the
command line.  The API prints nothing unless a progress bar is requested.
"""

from __future__ import annotations

import html
import importlib
import inspect
import sys
import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from fedtune.api.compose import Recipe, Settings, compose_recipe
from fedtune.api.memory import Data, split_inputs, write_data_file
from fedtune.api.public_ledger import to_data_frame
from fedtune.codec import require
from fedtune.config import RunConfig, format_config_yaml, read_saved_config
from fedtune.data.records import Record
from fedtune.federation.early_stopping import count_rounds
from fedtune.federation.run_folder import RunFolder
from fedtune.federation.spec import PublicSpec
from fedtune.formatting import format_html_table
from fedtune.privacy.accountant import format_epsilon
from fedtune.privacy.keys import parse_public_key
from fedtune.process import torch_came_first
from fedtune.runs.needed_packages import require_run_packages
from fedtune.runs.public_stage import build_public_stage_config, needs_public_stage
from fedtune.runs.renewal import add_start_adapter
from fedtune.runs.run_paths import find_run_folder, is_finished, resume_config
from fedtune.spec import ConfigError, check_one_of

if TYPE_CHECKING:  # they import torch, which takes seconds
    import numpy.typing as npt
    import pandas

    from fedtune.api.compared_models import ComparedModels
    from fedtune.export.loaded_model import ModelForm, ModelWithTokenizer
    from fedtune.federation.lead import LeadState, RoundResult, Scores
    from fedtune.federation.planner import PlanCost
    from fedtune.lab.distillation import Distilled
    from fedtune.report.checks import Check
    from fedtune.report.drawn_report import DrawnReport
    from fedtune.runs.federation_run import Listener
    from fedtune.runs.results import PrivacyResult, RunResult
    from fedtune.runs.saved_model import SavedModel
    from fedtune.show.svg_figure import SvgFigure
    from fedtune.sites.run_cache import RunCache

Chart = Literal["utility", "epsilon_spent", "profile", "reliability"]  # of a run's report
Work = Callable[[RunConfig, Path, Any], "RunResult"]  # runs (configuration, folder, listener)


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """Progress of a run, as passed to a progress callback.

    Attributes:
        stage: name of the current stage; "round" after each finished round.
        done: number of finished steps of the stage.
        total: number of steps of the stage; 0 if unknown.
        round: result of the round that has just finished; None in all other stages.
    """

    stage: str
    done: int = 0
    total: int = 0
    round: RoundResult | None = None


Callback = Callable[[Progress], None]  # receives the progress of a run


def ignore_progress(progress: Progress) -> None:
    """Ignore the progress of a run: the default of every progress callback."""


def make_stage_callback(progress: Callback) -> Callable[[str, int, int], None]:
    """Return a function that reports (stage, done, total) to a progress callback.

    Raises:
        ConfigError: `progress` cannot be called.
    """
    require("progress", progress, callable(progress), "must be a function that takes a fedtune.Progress")
    return lambda stage, done, total: progress(Progress(stage=stage, done=done, total=total))


def warn_at_caller(text: str) -> None:
    """Issue a Python warning at the line of the caller's code, outside fedtune."""
    level, frame = 1, inspect.currentframe()
    while frame is not None and str(frame.f_globals.get("__name__")).startswith("fedtune."):
        level, frame = level + 1, frame.f_back
    warnings.warn(text, stacklevel=level)


def is_notebook() -> bool:
    """Whether this process is a Jupyter kernel, which displays HTML."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return getattr(shell, "kernel", None) is not None


def make_notebook_bar() -> Callable[[Progress], None]:
    """Display a progress bar below the notebook cell and return the callback that updates it."""
    library: Any = importlib.import_module("IPython.display")
    handle = library.display(library.HTML(""), display_id=True)

    def update(progress: Progress) -> None:
        scores = progress.round.metrics.items() if progress.round is not None else ()
        metrics = ", ".join(f"{name} {value:.4f}" for name, value in scores if value is not None)
        text = f"{progress.stage} {progress.done} of {progress.total}" if progress.total else progress.stage
        bar = f'<progress value="{progress.done}" max="{max(progress.total, 1)}"></progress>'
        handle.update(library.HTML(f"{bar} {html.escape(f'{text}: {metrics}' if metrics else text)}"))

    return update


class CallbackListener:
    """Run listener that reports progress to a callback and issues data warnings as Python warnings."""

    def __init__(self, config: RunConfig, progress: Callback) -> None:
        self._federation, self._progress = config.federation, progress
        self.on_preparing = make_stage_callback(progress)

    def note(self, text: str) -> None:
        warn_at_caller(text)

    def on_prepared(self, shared: object, proposal: object, state: LeadState) -> None:
        total = count_rounds(state.rounds, self._federation)
        self._progress(Progress(stage="training", done=state.round, total=total))

    def on_site_replied(self, number: int) -> None:
        """Ignore single replies, because progress is reported once per finished round."""

    def on_site_answered(self, site: str, what: str, *, num_bytes: int, charged_rounds: int | None) -> None:
        """Ignore replies of real sites, which only the command line displays."""

    def on_round_finished(self, state: LeadState) -> None:
        total = count_rounds(state.rounds, self._federation)
        self._progress(Progress(stage="round", done=state.round, total=total, round=state.rounds[-1]))


def require_simulation(config: RunConfig) -> None:
    """Raise a ConfigError for a run over real sites, which only their lead can start."""
    bound = "requires real sites: start the run with fedtune run --kit LEAD sites=[...]"
    require("runtime", "deployment", config.runtime.kind != "deployment", bound)


def simulate(
    recipe: Recipe | None = None,
    settings: Settings | None = None,
    *,
    progress: Callback | Literal[True] = ignore_progress,
    cache: RunCache | None = None,
) -> Run:
    """Simulate a federation on this machine: every site trains with DP-SGD and charges its own ledger.

    The run's folder is `tracking.output_dir`/`name`; the default name is a timestamp, below runs/.  After an
    interrupt, `simulate(settings={"resume": folder})` resumes the run; rounds that were charged before the interrupt
    stay charged.  A public stage (`public.train_file`) runs first, in a sibling folder whose name ends in -public;
    repeating the call resumes an interrupted public stage.

    Args:
        recipe: the experiment to run.  Default: the default experiment, four banks on Banking77.
        settings: overrides of the recipe's settings, by dotted key.
        progress: callback for progress, called in this thread; an exception in the callback interrupts the run.
            True: show a progress bar, below the cell in a notebook, otherwise on standard error.
        cache: cache for the loaded model and its precomputed hidden states, reused by the next run with the same
            cache.  Default: no cache.

    Returns:
        The finished run.

    Raises:
        ValueError: a setting, a file or the model cannot be used; nothing was trained or charged.
        RunError: too few sites replied.
    """
    from rich.console import Console

    from fedtune.flower import simulation
    from fedtune.show.run_progress import Display
    from fedtune.sites.virtual_site import fit_to_budgets, fix_number_format

    config = compose_recipe(recipe, settings)
    require_simulation(config)
    if torch_came_first:
        reason = "MKL cannot be configured after torch has loaded it, and a run may refuse to start in this process"
        warn_at_caller(f"import fedtune before torch: {reason}")
    if progress is not True:
        make_stage_callback(progress)  # checks it before the run's folder is created
    work = partial(simulation.simulate, cache=cache)
    if progress is True and is_notebook():
        progress = make_notebook_bar()

    def run(config: RunConfig, folder: Path) -> None:
        config = fix_number_format(config, folder, alone=cache is not None)
        config = config if config.resume else fit_to_budgets(config, folder)
        if progress is not True:
            run_in_folder(config, folder, CallbackListener(config, progress), work=work)
            return
        display = Display(Console(stderr=True), config, shown=True)
        with display.show_progress_bar():
            run_in_folder(config, folder, display, work=work)

    config = run_public_stage(config, run)
    folder = find_run_folder(config)
    run(config, folder)
    return load(folder)


def plan(recipe: Recipe | None = None, settings: Settings | None = None) -> PlanCost:
    """Compute the privacy cost of a run per site and round from its settings and declared sizes.

    >>> import fedtune
    >>> cost = fedtune.plan(
    ...     "banks_intents", {"privacy.epsilon": 3, "federation.num_rounds": 10}
    ... )
    >>> cost.epsilon <= 3
    True
    >>> len(cost.rounds), cost.steps
    (10, 20)

    Args:
        recipe: the experiment.  Default: the default experiment, four banks on Banking77.
        settings: overrides of the recipe's settings, by dotted key.

    Returns:
        The privacy cost, with epsilon at delta, the noise multiplier, and the epsilon of every round.

    Raises:
        ValueError: a setting is unknown or invalid.

    **Guarantee.** Every epsilon is an upper bound for the whole run, except `epsilon_of_one_round`, an upper bound for
    a single round.
    """
    from fedtune.federation.planner import compute_cost

    config = compose_recipe(recipe, settings)
    return compute_cost(config.plan(), config.declared_sizes(), before=config.federation.renewal)


def load(folder: str | Path) -> Run:
    """Load a run, finished or not, from its folder.

    Args:
        folder: the run folder, or the `adapter` folder inside it.

    Raises:
        ValueError: the folder contains no run.
        RunError: the run's files are damaged.
    """
    path = Path(folder)
    if not RunFolder(path).config.exists() and RunFolder(path.absolute().parent).adapter == path.absolute():
        path = path.absolute().parent
    return Run(path, read_saved_config(path))


def evaluate(run: Run, data: Data, *, progress: Callback = ignore_progress) -> ComparedModels:
    """Evaluate a run's adapter and its base model on the same records, with paired 95 % bootstrap intervals.

    Guarantee: none; scores are exact, and no noise protects the records.

    Args:
        run: a finished run.
        data: a file, or records in memory in any form that `simulate` takes, with the columns of the run's settings.
        progress: callback for progress, called in this thread before each model is scored.

    Raises:
        ValueError: the run is not finished, or the records cannot be used.
    """
    from fedtune.api.compared_models import ComparedModels
    from fedtune.runs.model_comparison import compare_runs
    from fedtune.sites.data_warnings import TRAINED_ON, is_training_file

    with write_data_file(data, run.config.data) as file:
        if is_training_file(run.config, file):
            warn_at_caller(TRAINED_ON)
        tuned = {"tuned": (run.config, run.adapter)}
        scores = compare_runs(tuned, file=file, final=True, progress=make_stage_callback(progress))
        return ComparedModels.from_side_by_side(scores)


def compare(runs: Mapping[str, Run], data: Data = None, *, progress: Callback = ignore_progress) -> ComparedModels:
    """Evaluate finished runs and their base models on the same records.

    On the result, `compare_models("base", NAME)` returns the difference between two models with a paired 95 %
    bootstrap interval, and `estimate(NAME, score)` a single model's score.

    Guarantee: none; scores are exact, and no noise protects the records.

    Args:
        runs: the runs by name; the settings of the first run define the records and their columns.
        data: a file or records in memory.  Default: the first run's test records.
        progress: callback for progress, called in this thread before each model is scored.

    Raises:
        ValueError: a run is not finished, or the runs' scores are not comparable.
    """
    from fedtune.api.compared_models import ComparedModels
    from fedtune.runs.model_comparison import compare_runs
    from fedtune.runs.saved_model import BASE

    is_named = isinstance(runs, Mapping) and all(
        isinstance(run, Run) and isinstance(name, str) for name, run in runs.items()
    )
    if not is_named or not runs or BASE in runs:  # the name of the base model in the result
        bound = f"must map at least one string to a fedtune.Run, and {BASE} is reserved for the base model"
        raise ConfigError("runs", [*runs], bound)
    finished = {name: (run.config, run.adapter) for name, run in runs.items()}
    spec = next(iter(runs.values())).config.data
    with write_data_file(data, spec) if data is not None else nullcontext() as file:
        scores = compare_runs(finished, file=file, progress=make_stage_callback(progress))
        return ComparedModels.from_side_by_side(scores)


class Checks(tuple["Check", ...]):
    """Tuple of a report's checks, printed with one line per check: name, state and explanation."""

    __slots__ = ()

    def __repr__(self) -> str:
        width = max((len(one.name) for one in self), default=0)
        return "\n".join(f"{one.name:<{width}}  {one.state:<11}  {one.text}" for one in self)

    def _repr_html_(self) -> str:
        return format_html_table("Checks of the report", [(one.name, one.state, one.text) for one in self])


def verify(file: str | Path, *, key: str | None = None) -> Checks:
    """Verify a report.json: format, signature, verdict, the settings next to it, and every epsilon.

    Each epsilon is recomputed from the privacy events in the report.

    Args:
        file: the report, or the folder that contains it.
        key: the public key (hex) that must have signed the report.  Default: any key.

    Returns:
        The checks; `state` is "passed", "failed", "missing" or "skipped".

    Raises:
        ValueError: there is no report.
    """
    from fedtune.report.checks import TrustedValues, check_report
    from fedtune.report.signing import read_report

    known = TrustedValues(key=parse_public_key("key", key))
    path, report = read_report(str(file))
    return Checks(check_report(path, report, known))


def run_in_folder(config: RunConfig, folder: Path, listener: Listener, *, work: Work) -> RunResult:
    """Execute a run in its folder and write its report and model card.

    The folder of a new run is created, and is removed if the run fails before its first checkpoint.

    Args:
        config: the run's configuration.
        folder: the run folder.
        listener: receives the run's progress.
        work: function that trains, for example `fedtune.flower.simulation.simulate`.
    """
    require_run_packages(config)
    from fedtune.report.run_page import UnfinishedReport
    from fedtune.runs.federation_run import UpdatingListener
    from fedtune.tracking import Tracked

    files, page = RunFolder(folder), UnfinishedReport(folder, config)
    if config.resume is not None and (finished := _read_finished_result(folder)) is not None:
        listener.note(f"{folder} is finished: nothing is left to resume")
        return finished
    made: list[Path] = []
    try:
        with Tracked(config, note=listener.note) as tracked:
            if config.resume is None:
                made = files.create(format_config_yaml(config))
            with files.hold_lock(), files.log_to_file(config.tracking.log_level):
                tracked.begin()
                result = work(config, folder, UpdatingListener(listener, tracked.update, page.update))
            from fedtune.report import model_card  # imports the drawing code, which takes a second

            model_card.write_report_and_card(folder, language=config.report.language)
            tracked.finish(result, folder)
    except BaseException as error:
        if files.saved_checkpoints:
            page.stop()
            error.add_note(
                f'To resume, pass settings={{"resume": {str(folder)!r}}}, and the same records in memory, if any.'
            )
        elif made:
            files.remove(made)  # nothing ran: leave nothing behind
        raise
    return result


def _read_finished_result(folder: Path) -> RunResult | None:
    """Return the result of a run whose adapter and report are complete; None for any other run."""
    from fedtune.report.from_run import read_run

    if not (folder / "report.json").is_file():
        return None
    try:
        RunFolder(folder).find_finished_adapter()
    except ConfigError:
        return None
    return read_run(folder).result


def run_public_stage(config: RunConfig, train: Callable[[RunConfig, Path], object]) -> RunConfig:
    """Train a run's public stage, and return the run with the stage's adapter as its start adapter.

    A resumed run, and a run without a public stage, is returned unchanged.  An unfinished public stage is resumed, and
    a finished stage is reused.

    Args:
        config: the run.
        train: function that runs the public stage's configuration in its folder, a sibling of the run's folder.
    """
    if config.resume is not None or not needs_public_stage(config):
        return config
    find_run_folder(replace(config, public=PublicSpec()))  # before anything is trained
    require_run_packages(config)
    stage = build_public_stage_config(config)
    folder = Path(stage.tracking.output_dir) / stage.name
    if RunFolder(folder).has_begun():
        stage = resume_config(stage, folder, name=config.name)
    if stage.resume is None or not is_finished(folder):
        train(stage, folder)
    return add_start_adapter(replace(config, model=replace(config.model, adapter=str(folder))))


@dataclass(frozen=True)
class Run:
    """A run and its folder, which contains the settings, results, adapter, report and the simulated sites' files.

    Returned by `simulate` and `load`.
    """

    folder: Path
    config: RunConfig = field(repr=False)

    @cached_property
    def result(self) -> RunResult:
        """The run's results, as stored in run.json.

        Raises:
            ValueError: the run is not finished.
        """
        from fedtune.report.from_run import read_run

        if (result := read_run(self.folder).result) is None:
            raise ConfigError("run folder", str(self.folder), "has no run.json; resume the run first")
        return result

    @property
    def metrics(self) -> Scores:
        """Scores of the final adapter on the lead's test records, which the privacy guarantee does not cover."""
        return self.result.final.metrics

    @property
    def rounds(self) -> tuple[RoundResult, ...]:
        """Results per round: seconds, transferred bytes, contributing sites and validation scores."""
        return self.result.rounds

    @property
    def privacy(self) -> PrivacyResult:
        """The privacy guarantee: epsilon at delta, for the run and per site, computed from the charged events."""
        return self.result.privacy

    @property
    def adapter(self) -> Path:
        """Path of the final adapter, for `peft.PeftModel.from_pretrained`.

        Raises:
            ValueError: the run is not finished or is an audit, or the adapter does not match run.json.
        """
        return RunFolder(self.folder).find_finished_adapter()

    def predict(self, data: Data) -> list[object]:
        """Predict the labels or the target of one or several inputs.

        Args:
            data: a text, several texts, or rows with the columns of the run's settings, in any form that `simulate`
                takes.  Label columns are not needed.

        Returns:
            Per input the most likely labels with their probabilities; the predicted number; or for survival analysis, a
            list with one {"until": the interval's end, "survival": the probability of no event by then} per interval.

        Raises:
            ValueError: the run's task generates or compares texts, or an input cannot be used, for example a single
                text for a task on text pairs.
        """
        task = self._model.model.task
        if not task.answers or task.predicts_tokens:
            raise ConfigError("task", self.config.task, "predicts no label or number: use generate or evaluate")
        return [self._model.answer_record(record)[1] for record in self._read_inputs(data)]

    def predict_proba(self, data: Data) -> npt.NDArray[np.float64]:
        """Predict the probability of every label.

        Args:
            data: one or several inputs, as for `predict`.

        Returns:
            Array of shape (inputs, labels), columns in the order of `config.data.labels`.

        Raises:
            ValueError: the run's task does not predict labels, or an input cannot be used.
        """
        from fedtune.tasks.pooled import LabelTask

        model = self._model.model
        if not isinstance(model.task, LabelTask) or model.task.counts_units:
            raise ConfigError("task", self.config.task, "predicts no probabilities of labels: use predict")
        asked = (model.task.without_answer(one, self.config.data) for one in self._read_inputs(data))
        rows = [model.task.predictions(self._model.logits(one), spec=model.spec)["probabilities"][0] for one in asked]
        return np.array([row.double().numpy() for row in rows]).reshape(-1, len(self.config.data.labels))

    def _read_inputs(self, data: Data) -> list[Record]:
        """Parse inputs for prediction, texts or table rows, into records without labels."""
        from fedtune.sites.run_records import read_prompts

        inputs, is_table = split_inputs(data, self.config.data)
        if not is_table:
            return [Record(self._model.parse_text_fields(one, at="text")) for one in inputs]
        with write_data_file(inputs, self.config.data) as file:
            records = read_prompts(self.config, file, key="data")
        return [replace(record, file="data") for record in records]  # the private file is gone

    def evaluate(self, data: Data, *, progress: Callback = ignore_progress) -> ComparedModels:
        """Evaluate the adapter and its base model on records; see `fedtune.evaluate`."""
        return evaluate(self, data, progress=progress)

    def model(self, form: ModelForm = "peft") -> ModelWithTokenizer:
        """Load the tuned model and its tokenizer as an object of PEFT, Transformers or Sentence Transformers.

        Args:
            form: "peft": a `PeftModel` on the base model, without a classifier's head.
                "merged": a Transformers model with merged weights, for language models and token classifiers;
                usable in `transformers.pipeline`.
                "sentence-transformers": a `SentenceTransformer` for classifiers, regression and embeddings;
                `model.encode` returns the predictions or embeddings.

        Returns:
            The pair (model, tokenizer).

        Raises:
            ValueError: the run is not finished, its task does not support the form, or a library is missing.
        """
        from fedtune.export.loaded_model import load_model_as

        return load_model_as(form, self.adapter, self.config)

    def export(self, to: str | Path, *, format: str | None = None, int8: bool = False) -> list[Path]:
        """Export the tuned model with its model card and tokenizer to a new folder, as `fedtune export` does.

        Args:
            to: the folder to create.
            format: "peft", "merged", "sentence-transformers", "safetensors" or "onnx".  Default: the adapter.
            int8: for "onnx": also write a graph with weights quantized to int8.

        Returns:
            The paths of the files.

        Raises:
            ValueError: the run is not finished, or the format, a library or the folder cannot be used.
            RunError: the exported model's outputs differ from those of the run's model.
        """
        from fedtune.export.export_formats import export
        from fedtune.export.format_choice import choose_format

        chosen, target = choose_format(self.config, format, int8=int8), Path(to)
        RunFolder(self.folder).require_export_target(target, key="to")
        return export(self.adapter, self.config, target, format=chosen, int8=int8)

    def plot(self, chart: Chart | None = None, *, language: Literal["en", "de"] = "en") -> SvgFigure:
        """Draw a chart of the run's report as SVG.

        Args:
            chart: "utility" (primary metric by epsilon), "epsilon_spent" (epsilon by round), "profile" (epsilon by
                delta) or "reliability" (calibration of the probabilities).  Default: the first chart that has data.
            language: language of axes and labels.

        Raises:
            ValueError: the run has no data for the chart.
        """
        from fedtune.report.page.tables import Charts
        from fedtune.report.page.translations import load_catalog
        from fedtune.show.svg_figure import SvgFigure

        if chart is not None:
            check_one_of("chart", chart, get_args(Chart))
        charts, why = Charts(self.report(), load_catalog(language)), ""
        for name in get_args(Chart) if chart is None else (chart,):
            table = getattr(charts, name)()
            if table.svg is not None:
                return SvgFigure(table.svg)
            why = why or str(table.seen.striptags())
        raise ConfigError("chart", chart, f"has no data: {why}")

    def _repr_html_(self) -> str:
        rows = {"folder": self.folder, "task": self.config.task, "sites": ", ".join(self.config.federation.names)}
        if not RunFolder(self.folder).result.is_file():
            return format_html_table(f"Run {self.config.name}", (rows | {"state": "not finished"}).items())
        scores = {name: f"{value:.4f}" for name, value in self.metrics.items() if value is not None}
        epsilon = f"{format_epsilon(self.privacy.epsilon)} at delta {self.privacy.delta:g}"
        said = {"rounds": len(self.rounds), "epsilon": epsilon}
        return format_html_table(f"Run {self.config.name}", (rows | said | scores).items())

    def generate(
        self, prompt: str, *, max_new_tokens: int = 200, temperature: float = 0.0, top_p: float = 1.0, seed: int = 0
    ) -> str:
        """Generate a completion of a prompt with the tuned model.

        Args:
            prompt: the prompt, without the run's prompt template.
            max_new_tokens: maximum number of tokens to generate.
            temperature: sampling temperature; 0: greedy decoding.
            top_p: probability mass for nucleus sampling.
            seed: seed of the sampling.

        Raises:
            ValueError: the run's task does not generate text, or the prompt is too long.
        """
        from fedtune.evaluation.spec import WritingSpec

        spec = WritingSpec(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed)
        if not self._model.model.task.predicts_tokens:
            raise ConfigError("task", self.config.task, "does not generate text: use predict")
        ids = self._model.encode_prompt(self._model.parse_text_fields(prompt, at="prompt"), at="prompt")
        return "".join(self._model.generate_answer(ids, spec))

    def distill(
        self,
        to: str | Path,
        *,
        texts: str | Path,
        student: str = "half",
        columns: Mapping[str, str] | None = None,
        format: Literal["sentence-transformers", "onnx"] = "sentence-transformers",
        int8: bool = False,
        seed: int = 0,
        passes: int = 10,
        progress: Callback = ignore_progress,
    ) -> Distilled:
        """Distill the tuned model into a smaller student model in a new folder.

        Guarantee: the run's guarantee; if `texts` is a file of synthetic records with a card, the epsilon of the runs
        that generated these records is added.

        Args:
            to: the folder to create.
            texts: a file of public or synthetic texts, one per line or record.
            student: "half" (the lower half of the base's layers), the number of lowest layers to keep, or the name of
                another base model.
            columns: role to column, for column names that differ from the run's own files.
            format: "sentence-transformers" or "onnx".
            int8: for "onnx": also write an ONNX graph with weights quantized to int8.
            seed: seed of the texts' order; the same seed gives the same student on the same machine.
            passes: number of epochs over the texts.
            progress: callback for progress in training steps, called in this thread.

        Raises:
            ValueError: the run, the student, the texts or the folder cannot be used; nothing is written.
        """
        from fedtune.lab.distillation import distill

        return distill(
            self.config,
            self.adapter,
            Path(to),
            student=student,
            texts=str(texts),
            columns=columns,
            format=format,
            int8=int8,
            seed=seed,
            passes=passes,
            progress=make_stage_callback(progress),
        )

    @cached_property
    def _model(self) -> SavedModel:
        """The base model with this run's adapter, loaded once."""
        from fedtune.runs.saved_model import SavedModel

        model = SavedModel(self.config, {"tuned": self.adapter})
        model.use_adapter("tuned")
        return model

    def report(self) -> DrawnReport:
        """Build the privacy report from the current content of the run folder."""
        from fedtune.report import from_run
        from fedtune.report.drawn_report import DrawnReport

        return DrawnReport.from_report(from_run.build_run_report(self.folder))

    def to_frame(self) -> pandas.DataFrame:
        """Return a data frame with one row per round: seconds, number of sites, bytes, and validation scores.

        Indexed by round (from 1); seconds: wall time in s; bytes: payload bytes.
        """
        columns = ("round", "seconds", "sites", "bytes_down", "bytes_up")
        return to_data_frame(self.rounds, columns, lambda one: {"sites": len(one.sites), **one.metrics})
