"""The Python API, as `import fedtune` offers it: runs, plans, scores and reports as values; `ledger` has ledgers.

Settings use dotted keys, as on the command line.  A user's mistake raises a `ValueError` with the message of the
command line.  Nothing is printed.
"""

from __future__ import annotations

import html
import importlib
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
from fedtune.config import RunConfig, format_config_yaml, read_saved_config
from fedtune.data.records import Record
from fedtune.federation.run_folder import RunFolder
from fedtune.federation.spec import PublicSpec
from fedtune.formatting import format_html_table
from fedtune.model.spec import NO_ADAPTER
from fedtune.privacy.accountant import format_epsilon
from fedtune.privacy.keys import check_public_key
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
    from fedtune.federation.planner import Price
    from fedtune.lab.distillation import Distilled
    from fedtune.report.checks import Check
    from fedtune.report.drawn_report import DrawnReport
    from fedtune.runs.federation_run import Listener
    from fedtune.runs.results import PrivacyResult, RunResult
    from fedtune.runs.saved_model import SavedModel
    from fedtune.show.svg_figure import SvgFigure
    from fedtune.sites.session import Session

Chart = Literal["utility", "epsilon_spent", "profile", "reliability"]  # of a run's report
Work = Callable[[RunConfig, Path, Any], "RunResult"]  # runs a configuration in its folder, and tells a listener


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """The progress of a run: `done` of `total` parts of a stage, or 0 of 0 if the total is unknown.

    After a round, `stage` is "round" and `round` holds that round's result.
    """

    stage: str
    done: int = 0
    total: int = 0
    round: RoundResult | None = None


Callback = Callable[[Progress], None]  # is told how far a run is


def stages(progress: Callback) -> Callable[[str, int, int], None]:
    """Return what tells a callback of a stage, and how many of its parts are done."""
    return lambda what, done, total: progress(Progress(stage=what, done=done, total=total))


def is_notebook() -> bool:
    """Whether this process is the kernel of a notebook, which shows HTML instead of a terminal's control characters."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return getattr(shell, "kernel", None) is not None


def show_notebook_bar() -> Callable[[Progress], None]:
    """Show a bar below the cell, and return the callback that moves it."""
    library: Any = importlib.import_module("IPython.display")
    handle = library.display(library.HTML(""), display_id=True)

    def move(told: Progress) -> None:
        scores = told.round.metrics.items() if told.round is not None else ()
        said = ", ".join(f"{name} {value:.4f}" for name, value in scores if value is not None)
        text = f"{told.stage} {told.done} of {told.total}" if told.total else told.stage
        bar = f'<progress value="{told.done}" max="{max(told.total, 1)}"></progress>'
        handle.update(library.HTML(f"{bar} {html.escape(f'{text}: {said}' if said else text)}"))

    return move


class Teller:
    """A listener that reports a run to a callback; notes on the data become Python warnings."""

    def __init__(self, config: RunConfig, progress: Callback) -> None:
        self._rounds, self._progress, self.on_preparing = config.federation.num_rounds, progress, stages(progress)

    def note(self, text: str) -> None:
        warnings.warn(text, stacklevel=2)

    def on_prepared(self, shared: object, proposal: object, state: LeadState) -> None:
        self._progress(Progress(stage="training", done=state.round, total=self._rounds))

    def on_site_replied(self, number: int) -> None:
        """Do nothing: a round is reported only when it has finished."""

    def on_site_answered(self, site: str, what: str, *, num_bytes: int, charged_rounds: int | None) -> None:
        """Only real sites do, and a run over them has the command's display."""

    def round_finished(self, state: LeadState) -> None:
        self._progress(Progress(stage="round", done=state.round, total=self._rounds, round=state.rounds[-1]))


def simulate(
    recipe: Recipe | None = None,
    settings: Settings | None = None,
    *,
    progress: Callback | Literal[True] = lambda told: None,
    session: Session | None = None,
) -> Run:
    """Run a federation on this machine to its end: simulated sites, each with its own ledger and DP-SGD.

    The run's folder is `tracking.output_dir`/`name`, by default a timestamp below runs/.  After an interrupt,
    `simulate(settings={"resume": folder})` resumes the run; every round that was charged stays charged.  A public stage
    (`public.train_file`) runs first, in a sibling folder whose name ends in -public; if it is interrupted, the same
    call resumes it.

    Args:
        recipe: the experiment to run; None: the default, four banks on Banking77.
        settings: overrides of the recipe's settings, by dotted key.
        progress: called during the run, in this thread; an exception that it raises ends the run like an interrupt.
            True: show a progress bar, in a notebook below the cell, else with the command line's output on standard
            error.
        session: keeps the loaded model and its precomputed states for the next run with this session; None: keep
            nothing.

    Raises:
        ValueError: a setting, a file or the model cannot be used; nothing was trained or charged.
        RunError: too few sites replied.
    """
    from rich.console import Console

    from fedtune.flower import simulation
    from fedtune.show.run_progress import Display
    from fedtune.sites.virtual_site import fit_to_budgets, fix_number_format

    config = compose_recipe(recipe, settings)
    if config.runtime.kind == "deployment":
        raise ConfigError(
            "runtime", "deployment", "requires real sites: start the run with fedtune run --kit LEAD sites=[...]"
        )
    if torch_came_first:
        late = "otherwise MKL is configured too late, and a run may refuse this process"
        warnings.warn(f"import fedtune before torch: {late}", stacklevel=2)
    work = partial(simulation.simulate, session=session)
    if progress is True and is_notebook():
        progress = show_notebook_bar()

    def run(config: RunConfig, folder: Path) -> None:
        config = fix_number_format(config, folder, alone=session is not None)
        if progress is not True:
            run_in_folder(config, folder, Teller(config, progress), work=work)
            return
        display = Display(Console(stderr=True), config, shown=True)
        with display.show_progress_bar():
            run_in_folder(config, folder, display, work=work)

    config = start_after_public_stage(config, run)
    folder = find_run_folder(config)
    config = fix_number_format(config, folder, alone=session is not None)
    run(config if config.resume else fit_to_budgets(config, folder), folder)
    return load(folder)


def plan(recipe: Recipe | None = None, settings: Settings | None = None) -> Price:
    """Return the privacy cost of a run, by site and round, from settings and declared sizes alone; nothing is charged.

    Guarantee: every epsilon is an upper bound for the whole run, except `epsilon_of_one_round`, which bounds a single
    round.

    >>> price = plan("banks_intents", {"privacy.epsilon": 3, "federation.num_rounds": 10})
    >>> price.epsilon <= 3, len(price.rounds), price.steps
    (True, 10, 50)
    """
    from fedtune.federation.planner import price

    config = compose_recipe(recipe, settings)
    return price(config.plan(), config.declared_sizes(), before=config.federation.renewal)


def load(folder: str | Path) -> Run:
    """Load the run in a folder, finished or not; `folder` may also be the run's `adapter` folder.

    Raises:
        ValueError: the folder contains no run.
        RunError: the run's files are damaged.
    """
    path = Path(folder)
    if not RunFolder(path).config.exists() and RunFolder(path.absolute().parent).adapter == path.absolute():
        path = path.absolute().parent
    return Run(path, read_saved_config(path))


def evaluate(run: Run, data: Data, *, progress: Callback = lambda told: None) -> ComparedModels:
    """Score a run's adapter, and its base without one, on records; intervals (95 %) draw the same records for both.

    `data` is a file, or records in memory in any form that `simulate` takes, with the columns that the run's settings
    name.  Scores are exact, and not covered by any guarantee.  `progress` is called before each model is scored, in
    this thread.

    Raises:
        ValueError: the run is not finished, or the records cannot be used.
    """
    from fedtune.api.compared_models import ComparedModels
    from fedtune.runs.model_comparison import compare_runs

    with write_data_file(data) as file:
        found = {"tuned": (run.config, run.adapter)}
        return ComparedModels.from_scored(compare_runs(found, file=file, final=True, progress=stages(progress)))


def compare(runs: Mapping[str, Run], data: Data = None, *, progress: Callback = lambda told: None) -> ComparedModels:
    """Score finished runs, and their base before training, on the same records; exact, and no guarantee covers it.

    `comparison("base", NAME)` of what is returned is the difference of two of them, with an interval (95 %) that draws
    the same records for both; `estimate(NAME, score)` is one's own score.

    Args:
        runs: by name; the first one's settings say which the records are.
        data: a file or records in memory, with the columns that these settings name; None: the first run's test
            records.
        progress: is called before each model is scored, in this thread.

    Raises:
        ValueError: a run is not finished, or the runs' scores say nothing about each other.
    """
    from fedtune.api.compared_models import ComparedModels
    from fedtune.runs.model_comparison import compare_runs
    from fedtune.runs.saved_model import BASE

    if not runs or BASE in runs:  # which is what their base is called
        raise ConfigError("runs", [*runs], f"must name at least one run, and no run may be called {BASE}")
    finished = {name: (run.config, run.adapter) for name, run in runs.items()}
    with write_data_file(data) if data is not None else nullcontext() as file:
        return ComparedModels.from_scored(compare_runs(finished, file=file, progress=stages(progress)))


class Checks(tuple["Check", ...]):
    """The checks of a report: a tuple that prints one line for each, with its name and state."""

    __slots__ = ()

    def __repr__(self) -> str:
        width = max((len(one.name) for one in self), default=0)
        return "\n".join(f"{one.name:<{width}}  {one.state:<11}  {one.text}" for one in self)

    def _repr_html_(self) -> str:
        return format_html_table("Checks of the report", [(one.name, one.state, one.text) for one in self])


def verify(file: str | Path, *, key: str | None = None) -> Checks:
    """Check a report.json: its format, its signature, its verdict, the settings next to it, and every epsilon.

    Each epsilon is recomputed from the report's events.  Each check's `state` is "right", "wrong", "missing" or
    "not_checked".

    Args:
        file: the report, or the folder that contains it.
        key: the public key, in hex, that must have signed the report.

    Raises:
        ValueError: there is no report.
    """
    from fedtune.report.checks import Known, check_report
    from fedtune.report.signing import read_report

    if key is not None:
        check_public_key("key", key)
    path, report = read_report(str(file))
    return Checks(check_report(path, report, Known(key=key)))


def run_in_folder(config: RunConfig, folder: Path, listener: Listener, *, work: Work) -> RunResult:
    """Run a configuration in its folder, creating the folder for a new run, and write a report at the end.

    If the run fails before its first checkpoint, a newly created folder is removed.
    """
    require_run_packages(config)
    from fedtune.report.run_page import UnfinishedReport
    from fedtune.runs.federation_run import Followed
    from fedtune.tracking import Tracked

    files, page = RunFolder(folder), UnfinishedReport(folder, config)
    made: list[Path] = []
    try:
        with Tracked(config, note=listener.note) as tracked:
            if config.resume is None:
                made = files.create(format_config_yaml(config))
            with files.hold_lock(), files.log_to_file(config.tracking.log_level):
                tracked.begin()
                result = work(config, folder, Followed(listener, tracked.update, page.update))
            from fedtune.report import model_card  # draws, which takes a second to import

            model_card.write_report_and_card(folder, language=config.report.language)
            tracked.finish(result, folder)
    except BaseException:
        if files.saved_checkpoints:
            page.stop()
        elif made:
            files.remove(made)  # nothing ran: leave nothing behind
        raise
    return result


def start_after_public_stage(config: RunConfig, train: Callable[[RunConfig, Path], object]) -> RunConfig:
    """Return the run with the result of its public stage as its start adapter.

    A run that has begun or has no public stage is returned unchanged.  `train` runs the stage in its own folder next to
    the run's, resuming an unfinished stage; a finished stage is reused.
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
    """A run, returned by `simulate` and `load`; its folder holds settings, results, adapter, report and simulated
    sites.
    """

    folder: Path
    config: RunConfig = field(repr=False)

    @cached_property
    def result(self) -> RunResult:
        """The content of run.json.

        Raises:
            ValueError: the run has no result yet.
        """
        from fedtune.report.from_run import read_run

        if (result := read_run(self.folder).result) is None:
            raise ConfigError("run folder", str(self.folder), "has no run.json; resume the run first")
        return result

    @property
    def metrics(self) -> Scores:
        """Scores of the final adapter on the lead's test records; not covered by the guarantee."""
        return self.result.final.metrics

    @property
    def rounds(self) -> tuple[RoundResult, ...]:
        return self.result.rounds

    @property
    def privacy(self) -> PrivacyResult:
        """The privacy guarantee: epsilon at delta for the run and for each site, derived from the charged events."""
        return self.result.privacy

    @property
    def adapter(self) -> Path:
        """The final adapter's folder, for `peft.PeftModel.from_pretrained`.

        Raises:
            ValueError: the run is not finished or is an audit, or the adapter does not match run.json.
        """
        return RunFolder(self.folder).find_finished_adapter()

    def predict(self, data: Data) -> list[object]:
        """Predict for one input or several: the most likely labels with their probabilities, or a number, per input.

        Args:
            data: a text, several texts, or rows with the columns that the run's settings name, in any form that
                `simulate` takes; the answers' columns are not needed.

        Raises:
            ValueError: the run's task generates or compares texts, or an input cannot be used: for example one text,
                where the run's records have two.
        """
        task = self._model.model.task
        if not task.answers or task.predicts_tokens:
            raise ConfigError("task", self.config.task, "predicts no label or number: use generate or evaluate")
        return [self._model.answer_record(record)[1] for record in self._read_inputs(data)]

    def predict_proba(self, data: Data) -> npt.NDArray[np.float64]:
        """Predict the probability of each label: (records, labels), in the order of `config.data.labels`.

        Args:
            data: as for `predict`.

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
        """Read inputs without answers: texts, or rows of a table."""
        from fedtune.sites.run_records import read_prompts

        inputs, is_table = split_inputs(data)
        if not is_table:
            return [Record(self._model.parse_text_fields(one, at="text")) for one in inputs]
        with write_data_file(inputs) as file:
            return read_prompts(self.config, file, key="data")

    def evaluate(self, data: Data, *, progress: Callback = lambda told: None) -> ComparedModels:
        """Score the adapter and its base on records; see `fedtune.evaluate`."""
        return evaluate(self, data, progress=progress)

    def model(self, form: ModelForm = "peft") -> ModelWithTokenizer:
        """Load the tuned model with its tokenizer, as the named library knows it: (model, tokenizer).

        Args:
            form: "peft": the base of transformers with the adapter on it; a classifier's head is not part of it.
                "merged": the whole language model, or the tagger of tokens, for `transformers.pipeline`.
                "sentence-transformers": the whole classifier, regression or embedding, for `model.encode`.

        Raises:
            ValueError: the run is not finished, its task has no such form, or a library is missing.
        """
        from fedtune.export.loaded_model import load_model_as

        return load_model_as(form, self.adapter, self.config)

    def export(self, to: str | Path, *, format: str | None = None, int8: bool = False) -> list[Path]:
        """Write the tuned model with its card and tokenizer to a new folder, as `fedtune export` does.

        Args:
            to: the new folder.
            format: "peft", "merged", "sentence-transformers", "safetensors" or "onnx"; None: the adapter.
            int8: with "onnx": also write a graph with int8 weights.

        Returns:
            The written files.

        Raises:
            ValueError: the run is not finished, or the format, a library or the folder cannot be used.
            RunError: the written model does not compute what the run's model computes.
        """
        from fedtune.export.export_formats import export
        from fedtune.export.format_choice import choose_format

        chosen, target = choose_format(self.config, format, key="format"), Path(to)
        if int8 and (chosen != "onnx" or self.config.lora.kind == NO_ADAPTER):
            raise ConfigError("int8", True, 'requires format="onnx" and a base model, whose matrices it quantizes')
        if target.absolute().resolve().is_relative_to(self.adapter.resolve()):
            raise ConfigError("to", str(to), "must be outside the run's adapter folder")
        return export(self.adapter, self.config, target, format=chosen, int8=int8)

    def plot(self, chart: Chart | None = None, *, language: Literal["en", "de"] = "en") -> SvgFigure:
        """Draw a chart of the run's report: the primary score by epsilon, epsilon by round, or epsilon by delta.

        Args:
            chart: "utility", "epsilon_spent", "profile" or "reliability"; None: the first with something to draw.
            language: the language of axes and labels.

        Raises:
            ValueError: the chart has nothing to draw.
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
        raise ConfigError("chart", chart, f"has nothing to draw: {why}")

    def _repr_html_(self) -> str:
        rows = {"folder": self.folder, "task": self.config.task, "sites": ", ".join(self.config.federation.names)}
        if not RunFolder(self.folder).result.is_file():
            return format_html_table(f"Run {self.config.name}", (rows | {"state": "not finished"}).items())
        scores = {name: f"{value:.4f}" for name, value in self.metrics.items() if value is not None}
        said = {
            "rounds": len(self.rounds),
            "epsilon": f"{format_epsilon(self.privacy.epsilon)} at delta {self.privacy.delta:g}",
        }
        return format_html_table(f"Run {self.config.name}", (rows | said | scores).items())

    def generate(
        self, prompt: str, *, max_new_tokens: int = 200, temperature: float = 0.0, top_p: float = 1.0, seed: int = 0
    ) -> str:
        """Generate the tuned model's answer to a prompt; greedy decoding unless `temperature` is above 0.

        Raises:
            ValueError: the run's task generates no text, or the prompt is too long.
        """
        from fedtune.evaluation.spec import WritingSpec

        spec = WritingSpec(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed)
        if not self._model.model.task.predicts_tokens:
            raise ConfigError("task", self.config.task, "does not generate text: use predict")
        ids = self._model.encode_prompt(self._model.parse_text_fields(prompt, at="prompt"), at="prompt")
        return "".join(self._model.generate_answer(ids, spec))

    def distill(self, to: str | Path, *, texts: str | Path, student: str = "half", **options: Any) -> Distilled:
        """Distill the tuned model into a smaller student, and write the student to a new folder.

        Guarantee: the run's own; if `texts` have a card of synthetic records, the epsilon of the runs behind them is
        added.

        Args:
            to: the new folder.
            texts: a file of public or synthetic texts, one line or record each.
            student: "half" of the base's layers, the number of lowest layers to keep, or another base model.
            **options: passed to `fedtune.lab.distillation.distill`.

        Raises:
            ValueError: the run, the student, the texts or the folder cannot be used; nothing is written.
        """
        from fedtune.lab.distillation import distill

        return distill(self.config, self.adapter, Path(to), student=student, texts=str(texts), **options)

    @cached_property
    def _model(self) -> SavedModel:
        """The base model with this run's adapter, cached because loading takes seconds."""
        from fedtune.runs.saved_model import SavedModel

        model = SavedModel(self.config, {"tuned": self.adapter})
        model.use_adapter("tuned")
        return model

    def report(self) -> DrawnReport:
        """Build the privacy report anew from the run's folder."""
        from fedtune.report import from_run
        from fedtune.report.drawn_report import DrawnReport

        return DrawnReport.from_report(from_run.build_run_report(self.folder))

    def to_frame(self) -> pandas.DataFrame:
        """Return one row per round: seconds, number of sites, bytes, and scores on the validation file."""
        columns = ("round", "seconds", "sites", "bytes_down", "bytes_up")
        return to_data_frame(self.rounds, columns, lambda one: {"sites": len(one.sites), **one.metrics})
