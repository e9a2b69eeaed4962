"""`fedtune compare`: comparison of federated, single-site and centralized training by score and privacy cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

from rich.console import Console

from fedtune.api.public import load
from fedtune.cli.command import Argument, AsJson, Option, build_resume_command, print_answer
from fedtune.cli.finished_run import load_finished_run
from fedtune.cli.interruptible_run import run_with_summary
from fedtune.cli.personalize import show_progress
from fedtune.config import RunConfig
from fedtune.data.records import Record, read_column_values, resolve_file
from fedtune.data.spec import SITE
from fedtune.evaluation.bootstrap import MIN_UNITS
from fedtune.evaluation.spec import SMALLEST, build_missing_test_records_error
from fedtune.federation.run_folder import RunFolder, suggest_run_folders
from fedtune.lab.studies.comparison import Line, plan_runs, score_side_by_side
from fedtune.lab.studies.personalized import personalize, split_site_records
from fedtune.lab.studies.trials import SearchTrial, describe_price, read_result
from fedtune.show.terminal_tables import require_confirmation, say, to_json_text, write_file
from fedtune.sites.run_cache import RunCache
from fedtune.spec import NOT_GIVEN, ConfigError, RefusedError, check_at_least
from fedtune.version import find_shipped_folders


def compare(
    words: Annotated[
        tuple[str, ...],
        Argument("KEY=VALUE | RUN", help="settings of an experiment to run, or folders of finished runs"),
    ] = (),
    data: Annotated[str | None, Option("evaluation file (default: the test records)", metavar="FILE")] = None,
    without_privacy: Annotated[bool, Option("also run each model without privacy")] = False,
    personal: Annotated[bool, Option("also train a personalized adapter per site, without noise")] = False,
    leave_out: Annotated[
        tuple[Literal["alone", "federated", "pooled"], ...], Option("runs to omit; may be repeated")
    ] = (),
    by: Annotated[str | None, Option("also report scores by this column", metavar="COLUMN")] = None,
    smallest: Annotated[int, Option("merge groups with fewer records (or users, for user-level privacy)")] = SMALLEST,
    generate: Annotated[int | None, Option("also score generated texts for the first N prompts", metavar="N")] = None,
    as_json: AsJson = False,
) -> None:
    """Compare the base model, training at each site alone, the federation, and centralized training.

      fedtune compare experiment=banks_intents name=banks              one run per model and compare.json in runs/banks/
      fedtune compare experiment=banks_intents --without-privacy       every model with and without privacy
      fedtune compare experiment=banks_intents --personal              also a personalized adapter per site
      fedtune compare experiment=hospitals_abstracts --by label        also scores by group
      fedtune compare runs/a runs/b --data test.jsonl                  existing runs

    All models are scored on the same records, with paired 95 % bootstrap intervals. The verdict names the models that
    the records cannot distinguish. Repeat the same command to resume an interrupted comparison.
    """
    check_at_least("--smallest", smallest, MIN_UNITS)
    console, folders, written = Console(stderr=as_json), _parse_run_folders(words), list[Path]()
    if folders:
        if without_privacy or personal or leave_out:
            key = "--without-privacy" if without_privacy else "--personal" if personal else "--leave-out"
            raise ConfigError(key, NOT_GIVEN, "requires an experiment's settings, not finished runs")
        lines = _load_finished_lines(folders)
    else:
        if personal and "federated" in leave_out:
            bound = "conflicts with --personal, which starts from the federated run"
            raise ConfigError("--leave-out", "federated", bound)
        lines = plan_runs(words, without_privacy=without_privacy, leave_out=leave_out)
        first = lines[0].run
        _check_scored_data(first.config, data, by)
        if personal:
            split_site_records(first.config)  # report a site with too few records before training
        written.append(first.folder.parent / "compare.json")
        given = {"--data": data, "--by": by, "--smallest": smallest, "--generate": generate}
        options = [word for key, value in given.items() if value is not None for word in (key, str(value))]
        options += ["--without-privacy"] * without_privacy + ["--personal"] * personal
        options += [f"--leave-out={kind}" for kind in leave_out]
        again = build_resume_command("compare", *words, name=first.folder.parent.name, options=options)
        for text in describe_price({line.name: line.run for line in lines}):
            say(text, console=console)
        if not words:
            otherwise = "nothing was trained; to use other records, set experiment=NAME"
            require_confirmation("Train them now?", otherwise=otherwise)
        lines = _run_unfinished_lines(lines, console, again=again, personal=personal)
    with show_progress() as progress:
        finished = [load_finished_run(line.run.folder, generate=generate) for line in lines]
        compared = score_side_by_side(lines, finished, data=data, by=by, smallest=smallest, progress=progress)
    for path in written:
        write_file(path, to_json_text(compared.to_json()), option="compare.json")
    print_answer(compared.to_json(), compared.sections(), as_json=as_json)
    for path in [] if as_json else written:
        say(f"written: {path}", console=console)


def _parse_run_folders(words: Sequence[str]) -> list[Path]:
    """Parse the arguments as run folders, or return an empty list if they are settings."""
    folders = [word for word in words if RunFolder(Path(word)).config.is_file()]
    for word in words:
        if word not in folders and (folders or "=" not in word):
            near = suggest_run_folders(Path(word))
            raise ConfigError("RUN", word, f"must be a run folder, or every argument must be KEY=VALUE{near}")
    return [Path(word) for word in folders]


def _load_finished_lines(folders: Sequence[Path]) -> list[Line]:
    """Load finished runs as lines of a comparison, named by their folders (the full path if names are ambiguous)."""
    from fedtune.tasks.saved import SavedAdapter

    lines, names = [], [folder.absolute().name for folder in folders]
    for folder, name in zip(folders, names, strict=True):
        if [other.absolute() for other in folders].count(folder.absolute()) > 1:
            raise ConfigError("RUN", str(folder), "is given twice")
        name = str(folder) if names.count(name) > 1 or name == "base" else name
        config, adapter = load_finished_run(folder)
        # A site's copy of a final adapter has no run.json.
        trial = SearchTrial(config=config, folder=folder, result=read_result(adapter.parent))
        own = SavedAdapter.read(adapter, private=True).private_to is not None
        lines.append(Line(name=name, kind="own" if own else "run", run=trial))
    return lines


def _check_scored_data(config: RunConfig, file: str | None, by: str | None) -> None:
    """Validate the evaluation records before the first run starts, as far as this is possible without a model."""
    data = config.data
    if file is None and data.test_file is None and not data.test_fraction:
        raise build_missing_test_records_error()
    name = file or data.test_file or data.train_file
    if SITE in name:
        return
    path = resolve_file(name, find_shipped_folders(), key="--data" if file else "data.test_file")
    if by is not None:
        read_column_values([Record({}, file=str(path))], by, key="--by")


def _run_unfinished_lines(lines: Sequence[Line], console: Console, *, again: str, personal: bool) -> list[Line]:
    """Run the unfinished lines of a comparison, and train personalized adapters if `personal`.

    The first error ends the comparison.  Only a refusal after at least one finished run is skipped, because the budget
    of one site does not affect the other runs.
    """
    done: list[Line] = []
    try:
        with RunCache() as cache:
            for number, line in enumerate(lines, start=1):
                name = f"{number} of {len(lines)}, {line.name}"
                ran = line.run.run(partial(run_with_summary, console=console, name=name, cache=cache))
                if isinstance(ran.error, RefusedError) and done:  # does not affect other runs
                    say(f"{name} was skipped: {ran.error}", console=console)
                    continue
                if ran.error is not None:
                    raise ran.error
                done.append(replace(line, run=ran))
        if personal:
            run = load(lines[0].run.folder)
            folders = {site: run.folder / f"private_to_{site}" for site in run.config.federation.active}
            if missing := [site for site, folder in folders.items() if not RunFolder(folder).adapter.is_dir()]:
                with show_progress() as progress:
                    personalize(run, missing, progress=progress)
            for site, folder in folders.items():
                trial = SearchTrial(config=run.config, folder=folder)
                done.append(Line(name=f"{site} own", kind="own", site=site, run=trial))
    except BaseException:
        say(f"Continue with: {again}", console=console)
        raise
    return done
