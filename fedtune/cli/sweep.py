"""A sweep: its runs one after the other, the table of what they came to, and the same as CSV beside their folders.

The best run is told by validation scores alone.  A run that was chosen by its test score has a test score that is too
good, since the choice has used the same records.
"""

from __future__ import annotations

import csv
import io
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from fedtune.api.compose import Sweep
from fedtune.api.working_folder import folder_of
from fedtune.config import RunConfig
from fedtune.evaluation.bootstrap import direction
from fedtune.federation.run_folder import RunFolder
from fedtune.privacy.accountant import epsilon_text
from fedtune.privacy.durable import write_durably
from fedtune.show.sections import SCHEMA_VERSION, Section, print_json, say, show
from fedtune.sites.session import Session
from fedtune.spec import ConfigError, FedtuneError, RunError, StuckError
from fedtune.words import counted, unbounded

if TYPE_CHECKING:  # they import torch, which takes seconds
    from fedtune.federation.lead import Scores
    from fedtune.runs.results import RunResult

_FIRST_COLUMNS = ("run", "folder", "state", "reason", "best")
"""Of the CSV; the swept settings follow, then what was spent, then the scores."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SweptRun:
    """One run of a sweep.

    Attributes:
        values: the settings that differ between the sweep's runs, as they were typed.
        earlier: whether it was finished before this command.
        error: what ended it early.
        result: what it came to so far; None: it has no run.json.
        together: the epsilon of this trial of a search and all before it; None: it is none.
    """

    config: RunConfig
    folder: Path
    values: Mapping[str, str]
    earlier: bool = False
    error: BaseException | None = None
    result: RunResult | None = None
    together: float | None = None

    @property
    def state(self) -> str:
        """In a word or two."""
        from fedtune.runs.results import DIVERGED

        if self.error is not None:
            return "interrupted" if isinstance(self.error, KeyboardInterrupt) else "failed"
        if self.result is None:
            return "not begun"
        return "diverged" if DIVERGED in self.result.final.findings else "finished"

    @property
    def begun(self) -> bool:
        """Whether there is something to tell."""
        return self.error is not None or self.result is not None

    @property
    def reason(self) -> str:
        """Why it failed, in one line."""
        if self.state != "failed":
            return ""
        # The text of an error that nobody foresaw may quote a record.
        text = str(self.error) if isinstance(self.error, FedtuneError) else type(self.error).__name__
        return " ".join(text.split())

    @property
    def can_go_on(self) -> bool:
        """Whether the same command again would bring it further."""
        stopped = isinstance(self.error, RunError) and not isinstance(self.error, StuckError)
        return stopped or self.state in ("interrupted", "not begun")

    @property
    def judged_by(self) -> str:
        """The score by which runs of its task are compared."""
        return self.config.judged_by

    @property
    def validation(self) -> Scores:
        """Of the adapter that the run kept, on the lead's validation records."""
        if not (self.result and self.result.rounds):
            return {}
        kept = self.result.final.kept
        return self.result.rounds[kept.round - 1 if kept else -1].metrics

    @property
    def test(self) -> Scores:
        """On the lead's test records."""
        return self.result.final.metrics if self.result else {}

    @property
    def compared_on(self) -> tuple[Any, ...]:
        """What runs must have in common for their validation scores to say which is better."""
        config, data = self.config, self.config.data
        read = (tuple(sorted(data.columns.items())), data.unusable, data.labels)
        # A loss is one of tokens: model, template and length decide which these are.
        tokens = (config.model.path, data.prompt_template, data.chat_template, data.max_length)
        return (
            config.task,
            data.validation_file,
            data.validation_rows,
            *read,
            *(tokens if self.judged_by == "loss" else ()),
        )


def run_sweep(sweep: Sweep, console: Console, *, run: Callable[..., RunResult], as_json: bool) -> None:
    """Run what is not finished yet, and say what all runs came to, also where something ends the sweep early.

    A run that fails does not keep the others from running.

    Args:
        sweep: its settings.
        console: where progress is shown.
        run: runs one configuration in its folder: with configuration, folder, console and `session`.
        as_json: the table as JSON on standard output.

    Raises:
        ConfigError: a folder or the table's file belongs to something else; raised before the first run.
        FedtuneError: the first run that failed, after the last one has ended.
    """
    rows = _rows(sweep)
    path = rows[0].folder.parent / f"{sweep.name}.csv"
    _check_table(path, rows)
    try:
        with Session() as session:
            for number, row in enumerate(rows):
                rows[number] = row if row.earlier else ran(row, console, run=partial(run, session=session))
                if (error := rows[number].error) is not None and not isinstance(error, FedtuneError):
                    raise error
                write_table(path, rows, best=best_of(rows))
    finally:
        best = best_of(rows)
        write_table(path, rows, best=best)
        if as_json:
            print_json(as_json_table(path, rows, best=best))
        else:
            again = shlex.join(["fedtune", "simulate", "-m", *sweep.overrides])
            show_table(console, path, rows, best=best, again=again)
    for row in rows:
        if row.error is not None:
            raise row.error


def ran(row: SweptRun, console: Console, *, run: Callable[[RunConfig, Path, Console], RunResult]) -> SweptRun:
    """The row after its run, whatever ended that."""
    try:
        return replace(row, result=in_one_line(console, row.folder.name, partial(run, row.config, row.folder)))
    except BaseException as error:
        return replace(row, error=error, result=result_in(row.folder))


def in_one_line(console: Console, name: str, run: Callable[[Console], RunResult]) -> RunResult:
    """Do one of several runs, and say in a line what it came to; its folder has the rest."""
    began = time.monotonic()
    with console.status(f"{name} ..."):
        result = run(Console(file=io.StringIO(), width=console.width))
    scores = [f"test {kind} {value:.3f}" for kind, value in result.final.metrics.items() if value is not None]
    parts = [*scores[:1], f"epsilon {epsilon_text(result.privacy.epsilon)}", *result.final.findings]
    say(f"{name}: {', '.join(parts)}, {time.monotonic() - began:.0f} s", console=console)
    return result


def best_of(rows: Sequence[SweptRun], *, fewest: int = 2) -> SweptRun | None:
    """The finished run with the best validation score; None where fewer than `fewest` have any to compare."""
    scored = [(score, row) for row in rows if (score := score_of(row)) is not None]
    if len(scored) < fewest or len({row.compared_on for _, row in scored}) > 1:
        return None
    sign = direction(scored[0][1].judged_by)
    return max(scored, key=lambda one: sign * one[0])[1]


def score_of(row: SweptRun) -> float | None:
    """The validation score of a run that is finished and did not diverge; None too where its scores may not decide."""
    from fedtune.runs.data_notes import may_decide

    return row.validation.get(row.judged_by) if row.state == "finished" and may_decide(row.config) else None


def _rows(sweep: Sweep) -> list[SweptRun]:
    """The runs of a sweep, with the results of those that were finished before."""
    rows: list[SweptRun] = []
    differ = [key for key in sweep.values[0] if len({values[key] for values in sweep.values}) > 1]
    for config, values in zip(sweep.runs, sweep.values, strict=True):
        row = row_of(config, {key: values[key] for key in differ})
        if row.folder in (one.folder for one in rows):
            raise ConfigError("name", config.name, "is the name of two runs of the sweep; choose others")
        rows.append(row)
    return rows


def row_of(config: RunConfig, values: Mapping[str, str]) -> SweptRun:
    """A run before it is run here, with its result where it was finished before.

    Raises:
        ConfigError: its folder belongs to something else.
    """
    config = continued(config)
    folder = folder_of(config)
    result = result_in(folder, finished=True)
    return SweptRun(config=config, folder=folder, values=values, earlier=result is not None, result=result)


def continued(config: RunConfig) -> RunConfig:
    """The run, or where the same command has begun it before, its continuation."""
    folder = Path(config.tracking.output_dir) / config.name
    if config.resume is not None or not folder.exists():
        return config
    config = replace(config, resume=str(folder))
    try:
        folder_of(config)
    except ConfigError as error:
        raise ConfigError("name", config.name, f"is taken: {folder} {error.bound}; choose another") from None
    return config


def result_in(folder: Path, *, finished: bool = False) -> RunResult | None:
    """What the run in `folder` has come to; None: nothing, or with `finished` not all of it."""
    if not RunFolder(folder).result.is_file():
        return None
    from fedtune.report.record.run_record import read_run

    with suppress(FedtuneError):  # of a damaged folder: its run says so
        record = read_run(folder)
        if not finished or (record.finished and RunFolder(folder).adapter.is_dir()):
            return record.result
    return None


def show_table(console: Console, path: Path, rows: Sequence[SweptRun], *, best: SweptRun | None, again: str) -> None:
    """The table, with a mark at the best run."""
    begun = [(number, row) for number, row in enumerate(rows, start=1) if row.begun]
    together = any(row.together is not None for row in rows)
    judged = list(dict.fromkeys(row.judged_by for row in rows))
    scores = [
        (kind, name)
        for kind in ("validation", "test")
        for name in judged
        if any(name in getattr(r, kind) for r in rows)
    ]
    keys = [*rows[0].values]
    cells = [
        (
            "*" if row is best else "",
            str(number),
            *row.values.values(),
            *(_figure(getattr(row, kind), name) for kind, name in scores),
            epsilon_text(row.result.privacy.epsilon) if row.result else "-",
            *([epsilon_text(row.together)] if together else []),
            row.state,
        )
        for number, row in begun
    ]
    broken = (key.replace(".", ".\n") for key in keys)
    headings = ("", "run", *broken, *(f"{kind}\n{name}" for kind, name in scores), "epsilon\nspent")
    headings += (*(["epsilon\nso far"] if together else []), "state")
    words = {0, *range(2, 2 + len(keys)), len(headings) - 1}
    bold = {number: "bold" for number, (_, row) in enumerate(begun) if row is best}
    notes = list(_notes(rows, best))
    title = "Trials" if together else "Sweep"
    show(console, [Section(title=title, headings=headings, rows=cells, words=words, styles=bold, notes=notes)])
    if best is not None:
        say(f"{'picked:' if together else 'best: '} {best.folder}", console=console)
    if path.is_file():
        say(f"table: {path} (every score, and each run's folder)", console=console)
    if any(row.can_go_on for row in rows):
        say(f"Continue the {'search' if together else 'sweep'} with: {again}", console=console)


def _figure(scores: Scores, name: str) -> str:
    value = scores.get(name)
    return f"{value:.3f}" if value is not None else "not finite" if name in scores else "-"


def _notes(rows: Sequence[SweptRun], best: SweptRun | None) -> Iterator[str]:
    """What must be said about the table."""
    reasons: dict[str, list[str]] = {}
    for number, row in enumerate(rows, start=1):
        if row.reason:
            reasons.setdefault(row.reason, []).append(str(number))
    for reason, numbers in reasons.items():
        yield f"run{'s' * (len(numbers) > 1)} {', '.join(numbers)} failed: {reason}"
    waiting, earlier = sum(not row.begun for row in rows), sum(row.earlier for row in rows)
    if waiting:
        yield f"{counted(waiting, 'run')} not begun yet."
    if earlier:
        yield f"{counted(earlier, 'run')} had been finished before, with the same settings."
    finished = [row for row in rows if row.state == "finished"]
    if best is not None:
        yield f"* best by validation {best.judged_by}. Test scores must not choose: they would then be too good."
    elif len(finished) > 1 and not any(row.validation for row in finished):
        yield "No run is marked as the best: none has validation records, and test scores must not choose."
    elif len(finished) > 1 and not any(score_of(row) is not None for row in finished):
        yield "No run is marked as the best: that takes data.validation_file, without records that sites train on."
    elif len(finished) > 1:
        yield "No run is marked as the best: their validation scores cannot be compared."
    charged = [row for row in rows if row.result and row.config.privacy.private]
    if len(charged) > 1 and charged[0].together is None:
        yield "Runs on the same records spend their epsilons together: the loss of privacy is more than one row's."


def as_json_table(path: Path, rows: Sequence[SweptRun], *, best: SweptRun | None) -> dict[str, Any]:
    """The table for machines."""
    return {
        "schema_version": SCHEMA_VERSION,
        "table": str(path) if path.is_file() else None,
        "best": str(best.folder) if best else None,
        "runs": [
            {
                "folder": str(row.folder),
                "values": row.values,
                "state": row.state,
                "reason": row.reason,
                "result": row.result,
            }
            for row in rows
        ],
    }


def _check_table(path: Path, rows: Sequence[SweptRun]) -> None:
    """Refuse to replace a file that is no table of these runs."""
    if not path.exists():
        return
    try:
        with path.open(encoding="utf-8", newline="") as file:
            table = csv.DictReader(file)
            ours = tuple(table.fieldnames or ())[: len(_FIRST_COLUMNS)] == _FIRST_COLUMNS
            others = {row["run"] for row in table} - {row.folder.name for row in rows} if ours else set()
    except (OSError, UnicodeError, csv.Error):
        ours, others = False, set()
    if not ours or others:
        holds = f"holds other runs, such as {min(others)}" if others else "is no table of a sweep"
        raise ConfigError("name", path.stem, f"is taken: {path} {holds}; choose another")


def write_table(path: Path, rows: Sequence[SweptRun], *, best: SweptRun | None) -> None:
    """The table of the runs that have begun, as CSV; none while no run has left a folder."""
    if not any(row.folder.exists() for row in rows):
        return
    lines = [_cells(row, best=row is best) for row in rows if row.begun]
    columns = dict.fromkeys((*_FIRST_COLUMNS, *(column for line in lines for column in line)))
    text = io.StringIO()
    writer = csv.DictWriter(text, list(columns), restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    try:
        write_durably(path, text.getvalue().encode())
    except OSError as error:
        raise RunError(f"the sweep's table {path} cannot be written ({error.strerror})") from error


def _cells(row: SweptRun, *, best: bool) -> dict[str, Any]:
    """A line of the CSV by column; every figure as exact as it is known."""
    first = (row.folder.name, row.folder, row.state, row.reason, "yes" if best else "")
    cells = dict(zip(_FIRST_COLUMNS, first, strict=True)) | dict(row.values)
    if row.result is not None:
        privacy = row.result.privacy
        cells |= {"epsilon_spent": unbounded(privacy.epsilon), "delta": privacy.delta}
    if row.together is not None:
        cells["epsilon_so_far"] = row.together
    for kind, scores in (("validation", row.validation), ("test", row.test)):
        cells |= {f"{kind}_{name}": "nan" if value is None else value for name, value in scores.items()}
    return cells
