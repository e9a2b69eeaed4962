"""Simulations on records in memory: what `data init` detects in a file is detected in them, and the run begins."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fedtune.api import public
from fedtune.api.compose import Recipe, Settings, compose_recipe, compose_run, quote_word, require_known_settings
from fedtune.api.experiment_file import is_path
from fedtune.api.memory import DETECTED, TRAIN_FILE, Data, make_own_settings, round_down, write_private_files
from fedtune.api.public import Callback, Run
from fedtune.config import RunConfig, read_saved_config
from fedtune.data.partition import group_by_user
from fedtune.formatting import flatten
from fedtune.lab.preparation.detect import detect_columns
from fedtune.lab.preparation.detected_file import KINDS, OPTIONS
from fedtune.lab.preparation.experiment_writer import build_placeholder_overrides, plan_experiment, render_experiment
from fedtune.lab.preparation.readers import count_token_ids, load_reader
from fedtune.runs.run_paths import make_default_run_name
from fedtune.sites.run_records import partition_run_records
from fedtune.spec import NOT_GIVEN, ConfigError, DataError

if TYPE_CHECKING:  # it imports torch, which takes seconds
    from fedtune.sites.session import Session

_COLUMNS = "data.columns."


def simulate(
    recipe: Recipe | None = None,
    settings: Settings | None = None,
    *,
    sites: Mapping[str, Data] | None = None,
    validation: Data = None,
    test: Data = None,
    progress: Callback | Literal[True] = lambda told: None,
    session: Session | None = None,
) -> Run:
    """Run a federation on this machine to its end: simulated sites, each with its own ledger and DP-SGD.

    The run's folder is `tracking.output_dir`/`name`, by default a timestamp below runs/.  After an interrupt,
    `simulate(settings={"resume": folder})` resumes the run, with the same `sites`, `validation` and `test` if there
    were any; every round that was charged stays charged.  A public stage (`public.train_file`) runs first, in a sibling
    folder whose name ends in -public; if it is interrupted, the same call resumes it.

    Records in memory may be a data frame of pandas or polars, an Arrow table, a data set of Hugging Face, a mapping
    from column to values, a list of dicts, or (X, y) as in scikit-learn (columns x0, x1, ... and label, or target if y
    has floats).  They are checked like files, and messages name the site.  While the run is in progress, they are in
    temporary files that only this user can read.

    Without a recipe, the task and the columns are detected as by `fedtune data init`.  Labels and the longest text then
    come from the records, and so do `data.declared_sizes` unless you set them; all of these become public.  Without
    `validation` or `test`, shares of the sites' records are used for scores, and not for training.

    Args:
        recipe: the experiment to run; None: detected from `sites`, or else the default, four banks on Banking77.
        settings: overrides of the recipe's settings, by dotted key; and options of groups by the group's name, as in
            `{"model": "smollm2_135m"}`.
        sites: the records of each site, by its name; None: the files that the recipe names.
        validation: the lead's own records, scored after each round; only with `sites`.
        test: the lead's own records, scored before and after the run; only with `sites`.
        progress: called during the run, in this thread; an exception that it raises ends the run like an interrupt.
            True: print the command line's output and progress bar to standard error.  `print`: print each `Progress`.
        session: keeps the loaded model and its precomputed states for the next run with this session; None: keep
            nothing.

    Raises:
        ValueError: a setting, the records or the model cannot be used; nothing was trained or charged.
        RunError: too few sites replied.
    """
    said = {str(key): value for key, value in (settings or {}).items()}
    if sites is None:
        if validation is not None or test is not None:
            raise ConfigError("sites", NOT_GIVEN, "is missing: validation= and test= need the sites' records, too")
        return public.simulate(recipe, said, progress=progress, session=session)
    with write_private_files(sites, validation=validation, test=test) as folder:
        names = [str(site) for site in sites]
        if {"resume", "renew"}.isdisjoint(said):
            given = {"validation": validation is not None, "test": test is not None}
            recipe, said = _complete_settings(recipe, said, names, given, folder)
        else:
            _require_same_sites(Path(said.get("resume") or said["renew"]), names)
        return public.simulate(recipe, said, progress=progress, session=session)


def _complete_settings(
    recipe: Recipe | None, said: dict[str, Any], sites: list[str], given: Mapping[str, bool], folder: Path
) -> tuple[Recipe | None, dict[str, Any]]:
    """Return the recipe and all settings of a run on the records in `folder`."""
    named = said.pop("experiment", None) if recipe is None else recipe
    is_shipped = isinstance(named, str) and not is_path(named)
    own = make_own_settings(said, of_recipe=is_shipped, **given)
    is_detected = named is None
    if is_detected:
        require_known_settings(said)
        named, said = suggest_experiment(folder, said, num_sites=len(sites))
    said = {"name": make_default_run_name(), **said, **own}
    said |= {"federation.num_sites": len(sites), "federation.site_names": sites}
    measured = (is_detected or is_shipped) and "data.declared_sizes" not in dict(flatten(said))
    config = compose_recipe(named, {**said, "data.declared_sizes": 2} if measured else said)
    if config.runtime.kind == "ray":
        raise ConfigError("runtime", "ray", "cannot be combined with records in memory: write them to files")
    return named, {**said, "data.declared_sizes": _measure_sites(config)} if measured else said


def _measure_sites(config: RunConfig) -> list[int]:
    """Return the number of records, or of users, that each site trains on, rounded down."""
    by_user = config.privacy.unit == "user"
    sites = partition_run_records(config).sites
    return [round_down(len(group_by_user(one.training)) if by_user else len(one.training)) for one in sites]


def _require_same_sites(folder: Path, sites: list[str]) -> None:
    """Require that a run to resume or renew was made on records in memory, at these sites."""
    known = read_saved_config(folder)
    if known.data.train_file != TRAIN_FILE:
        bound = f"must be left out: the run reads data.train_file = {known.data.train_file}"
        raise ConfigError("sites", sites, bound)
    if set(sites) != set(known.federation.names):
        raise ConfigError("sites", sites, f"must name the sites of the run: {', '.join(known.federation.names)}")


@contextmanager
def _explain_for_python() -> Iterator[None]:
    """Replace the options of `fedtune data init` in errors by the settings that choose the same."""
    named = list[str]()

    def name_setting(option: re.Match[str]) -> str:
        if option[1] not in OPTIONS:  # --table, without a column
            return "a recipe for tables, as in fedtune.simulate('own_features', ...)"
        named.append(OPTIONS[option[1]])
        return _COLUMNS + named[-1]

    try:
        yield
    except ConfigError as error:
        key, bound = (re.sub(r"--([a-z][a-z-]*)( COLUMN\b)?", name_setting, said) for said in (error.key, error.bound))
        example = f'as in settings={{"data.columns": {{"{named[0]}": COLUMN}}}}' if named and key == error.key else ""
        raise type(error)(key, error.value, bound, remedy=error.remedy or example) from None


def suggest_experiment(folder: Path, settings: Settings, *, num_sites: int) -> tuple[str, dict[str, Any]]:
    """Write an experiment for records in memory, as `fedtune data init` does for a file.

    Args:
        folder: the folder of `fedtune.api.memory.write_private_files`.
        settings: the caller's settings; columns, privacy unit and model are obeyed by the detection.
        num_sites: the number of sites.

    Returns:
        The experiment file, and the settings that it does not contain yet.

    Raises:
        DataError: the records are unsuitable, or ambiguous: set `data.columns`, or give a recipe.
    """
    records, file = (folder / name for name in DETECTED)
    for path in (records, file):
        path.touch(mode=0o600)
    records.write_bytes(b"".join(path.read_bytes() for path in (folder / TRAIN_FILE).parent.glob("*.jsonl")))
    said, options = dict(flatten(settings)), {role: option for option, role in OPTIONS.items()} | {"labels": "label"}
    chosen = {key.removeprefix(_COLUMNS): str(column) for key, column in said.items() if key.startswith(_COLUMNS)}
    known = {options[role]: column for role, column in chosen.items() if role in options}
    with _explain_for_python():
        found = detect_columns(records, known, by_person=said.get("privacy.unit") != "record")
    base, model = KINDS[found.kind][1], settings.get("model")
    words = ["data.train_file=x", "data.declared_sizes=2", *build_placeholder_overrides(base)]
    words += [f"model={quote_word(model)}"] if isinstance(model, str) else []
    of_model = {key: value for key, value in said.items() if key.startswith("model.")}
    config = compose_run([f"experiment={base}", *words], changed=of_model)
    reader = load_reader(config.data, config.model, key="model.path", other="model=NAME")
    plan = plan_experiment(found, reader, config, within=count_token_ids(reader), sites=num_sites)
    if not plan.usable:
        raise DataError("sites", "no records", f"must have rows that a run can use: {plan.left_out}")
    plan = replace(plan, model=model if isinstance(model, str) else None, model_path=of_model.get("model.path"))
    file.write_text(render_experiment(found, plan, file=file), encoding="utf-8")
    is_integral = len(known) == len(chosen)  # then the file has the caller's columns, and those that were detected
    return str(file), {
        key: value for key, value in settings.items() if not (is_integral and f"{key}.".startswith(_COLUMNS))
    }
