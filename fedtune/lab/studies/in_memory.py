"""Simulations on in-memory records, with the same detection of task and columns as `fedtune data init`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fedtune.api import public
from fedtune.api.compose import (
    Recipe,
    Settings,
    compose_recipe,
    compose_run,
    quote_word,
    read_settings,
    require_known_settings,
)
from fedtune.api.experiment_file import is_path
from fedtune.api.memory import (
    DETECTED,
    LEAD_FILES,
    TRAIN_FILE,
    Data,
    build_in_memory_settings,
    list_array_widths,
    write_private_files,
)
from fedtune.api.public import Callback, Run, ignore_progress, warn_at_caller
from fedtune.config import RunConfig, read_saved_config
from fedtune.data.bad_rows import NONE_LEFT_OUT
from fedtune.data.partition import count_units
from fedtune.formatting import flatten, pluralize
from fedtune.lab.preparation import experiment_writer
from fedtune.lab.preparation.detect import detect_columns
from fedtune.lab.preparation.detected_file import KINDS, OPTIONS
from fedtune.lab.preparation.readers import load_reader
from fedtune.runs.run_paths import make_default_run_name
from fedtune.sites.run_records import partition_run_records
from fedtune.spec import NOT_GIVEN, ConfigError

if TYPE_CHECKING:  # it imports torch, which takes seconds
    from fedtune.sites.run_cache import RunCache

_COLUMNS = "data.columns."


def simulate(
    recipe: Recipe | None = None,
    settings: Settings | None = None,
    *,
    sites: Mapping[str, Data] | None = None,
    validation: Data = None,
    test: Data = None,
    progress: Callback | Literal[True] = ignore_progress,
    cache: RunCache | None = None,
) -> Run:
    """Simulate a federation on this machine: every site trains with DP-SGD and keeps its own ledger.

    >>> import fedtune
    >>> run = fedtune.simulate(
    ...     "banks_intents", {"privacy.epsilon": 3}
    ... )  # doctest: +SKIP
    >>> print(run.metrics, run.privacy.epsilon)  # doctest: +SKIP

    Args:
        recipe: the experiment to run.  Default: detected from `sites`; without `sites`, the default experiment, four
            banks on Banking77.
        settings: overrides of the recipe's settings by dotted key, and options of config groups by the group's name,
            such as `{"model": "smollm2_135m"}`.
        sites: the records by site name.  Default: the recipe's files.
        validation: the lead's records, scored after each round; requires `sites`.
        test: the lead's records, scored before and after the run; requires `sites`.
        progress: callback for progress, called in this thread; an exception in the callback interrupts the run.
            True: show a progress bar, below the cell in a notebook, otherwise on standard error.
            `print`: print each `Progress`.
        cache: cache for the loaded model and its precomputed hidden states, reused by the next run with the same
            cache.  Default: no cache.

    Returns:
        The finished run.

    Raises:
        ValueError: a setting, the records or the model cannot be used; nothing was trained or charged.
        RunError: too few sites replied.

    **Guarantee.** (epsilon, delta)-DP per site for everything that the sites release, as `Run.privacy` states, unless
    the settings turn privacy off.  Values that are derived from the records (see "Detection") are not covered.

    **Records.** Supported in-memory records: pandas and polars data frames, Arrow tables, Hugging Face datasets,
    mappings from column to values, lists of dicts, and scikit-learn's `(X, y)`, whose columns are `x0`, `x1`, ... and
    `label` (`target` for a float `y`).  They are validated like files, and error messages name the site.  During the
    run, the records are in temporary files that only this user can read.

    **Detection.** Without a recipe, task and columns are detected as by `fedtune data init`.  The labels, the maximum
    length and, unless they are set, `data.declared_sizes` are then derived from the records and become public.  Without
    `validation` or `test`, a fraction of the sites' records is held out for evaluation.

    **Resuming.** The run's folder is `tracking.output_dir`/`name`; the default name is a timestamp, below `runs/`.
    After an interrupt, `simulate(settings={"resume": folder})` resumes the run, with the same `sites`, `validation` and
    `test` as in the first call; rounds that were charged before the interrupt stay charged.  A public stage
    (`public.train_file`) runs first, in a sibling folder whose name ends in `-public`; repeating the call resumes an
    interrupted public stage.
    """
    said = read_settings(settings)
    if sites is None:
        if validation is not None or test is not None:
            raise ConfigError("sites", NOT_GIVEN, "is missing: validation= and test= require sites=")
        return public.simulate(recipe, said, progress=progress, cache=cache)
    earlier = said.get("resume") or said.get("renew")
    known = read_saved_config(Path(earlier)) if earlier else None
    given = {"validation": validation is not None, "test": test is not None}
    widths = list_array_widths(known.data) if known else set[int]()
    with write_private_files(sites, validation=validation, test=test, widths=widths) as folder:
        names = [str(site) for site in sites]
        if known is None:
            recipe, said = _complete_settings(recipe, said, names, given, folder, widths)
        else:
            _require_same_inputs(known, names, given)
        return public.simulate(recipe, said, progress=progress, cache=cache)


def _require_same_inputs(known: RunConfig, sites: list[str], given: Mapping[str, bool]) -> None:
    """Check that the records given to a resumed or renewed run belong to its in-memory inputs."""
    if known.data.train_file != TRAIN_FILE:
        bound = f"must be omitted: the run reads data.train_file = {known.data.train_file}"
        raise ConfigError("sites", sites, bound)
    if set(sites) != set(known.federation.names):
        raise ConfigError("sites", sites, f"must name the sites of the run: {', '.join(known.federation.names)}")
    for name, file in LEAD_FILES.items():
        if given[name] and getattr(known.data, f"{name}_file") != file:
            raise ConfigError(name, "records", "must be omitted, as in the run's first call")


def _complete_settings(
    recipe: Recipe | None,
    said: dict[str, Any],
    sites: list[str],
    given: Mapping[str, bool],
    folder: Path,
    widths: set[int],
) -> tuple[Recipe | None, dict[str, Any]]:
    """Return the recipe and the complete settings of a run on the in-memory records in `folder`.

    The run must use every column of an array (`widths`), so that its model reads arrays of this width only.
    """
    named = said.pop("experiment", None) if recipe is None else recipe
    is_shipped = isinstance(named, str) and not is_path(named)
    own = build_in_memory_settings(said, of_recipe=is_shipped, **given)
    is_detected = named is None
    if is_detected:
        require_known_settings(said)
        named, said = suggest_experiment(folder, said, num_sites=len(sites))
    said = {"name": make_default_run_name(), **said, **own}
    said |= {"federation.num_sites": len(sites), "federation.site_names": sites}
    states_sizes = any(f"{key}.".startswith("data.declared_sizes.") for key, _ in flatten(said))
    measured = (is_detected or is_shipped) and not states_sizes
    config = compose_recipe(named, {**said, "data.declared_sizes": 2} if measured else said)
    if (used := list_array_widths(config.data)) and not widths <= used:
        bound = f"must be only those that data.features uses, {max(used)}: remove the others from X"
        raise ConfigError("sites", pluralize(max(widths), "column"), bound)
    if config.runtime.kind == "ray":
        raise ConfigError("runtime", "ray", "cannot be combined with records in memory: write them to files")
    if measured:
        records = partition_run_records(config).sites
        said["data.declared_sizes"] = [
            experiment_writer.round_down(count_units(one.training, config.privacy.unit)) for one in records
        ]
    return named, said


def _replace_options(text: str) -> tuple[str, list[str]]:
    """Replace options of `fedtune data init` by the equivalent settings; return the text and the settings' roles."""
    named = list[str]()

    def name_setting(option: re.Match[str]) -> str:
        if option[1] not in OPTIONS:  # --table, without a column
            return "a recipe for tables, as in fedtune.simulate('own_features', ...)"
        named.append(OPTIONS[option[1]])
        return _COLUMNS + named[-1]

    return re.sub(r"--([a-z][a-z-]*)( COLUMN\b)?", name_setting, text), named


@contextmanager
def _explain_for_python() -> Iterator[None]:
    """Name settings instead of options of `fedtune data init` in error messages."""
    try:
        yield
    except ConfigError as error:
        (key, of_key), (bound, of_bound) = map(_replace_options, (error.key, error.bound))
        named = of_key + of_bound
        example = f'as in settings={{"data.columns": {{"{named[0]}": COLUMN}}}}' if named and key == error.key else ""
        raise type(error)(key, error.value, bound, remedy=error.remedy or example) from None


def suggest_experiment(folder: Path, settings: Settings, *, num_sites: int) -> tuple[str, dict[str, Any]]:
    """Detect an experiment for in-memory records and write its file, as `fedtune data init` does for data files.

    Args:
        folder: the folder of `fedtune.api.memory.write_private_files`.
        settings: the caller's settings; the detection respects their columns, privacy unit and model.
        num_sites: the number of sites.

    Returns:
        The path of the experiment file, and the caller's settings without those that are in the file.

    Raises:
        DataError: the records are unsuitable, or their columns are ambiguous.
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
    named = model if isinstance(model, str) else None
    of_model = {key: value for key, value in said.items() if key.startswith("model.")}
    words = [
        *experiment_writer.build_placeholder_overrides(base),
        *([f"model={quote_word(named)}"] if named is not None else []),
    ]
    config = compose_run([f"experiment={base}", *words], changed=of_model)
    reader = load_reader(config.data, config.model, key="model.path", other="model=NAME")
    plan = experiment_writer.plan_experiment(found, reader, config, sites=num_sites)
    if not chosen and (unread := [f"{column} ({why})" for column, why in found.unread]):
        text, _ = _replace_options(f"the run does not use these columns: {'; '.join(unread)}")
        warn_at_caller(text)
    # An unusable row is an error that names site and row, unless the caller sets data.on_bad_record.
    plan = replace(plan, model=named, model_path=of_model.get("model.path"), left_out=NONE_LEFT_OUT)
    file.write_text(experiment_writer.render_experiment(found, plan, file=file), encoding="utf-8")
    in_file = _COLUMNS if len(known) == len(chosen) else None  # the caller's columns, if the file contains all of them
    return str(file), {key: one for key, one in settings.items() if not (in_file and f"{key}.".startswith(in_file))}
