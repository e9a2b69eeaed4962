"""Folders of new and resumed runs, a check whether a run is finished, and default run names."""

from __future__ import annotations

import datetime
from dataclasses import replace
from pathlib import Path

from fedtune.config import RunConfig, read_saved_config
from fedtune.federation.early_stopping import should_stop
from fedtune.federation.lead import Checkpoints
from fedtune.federation.run_folder import RunFolder
from fedtune.formatting import flatten
from fedtune.model.adapter_files import CARD
from fedtune.runs.public_stage import needs_public_stage
from fedtune.spec import ConfigError, format_value


def find_run_folder(config: RunConfig) -> Path:
    """Choose the folder of a new run, or check that the folder to resume has the same configuration.

    Raises:
        ConfigError: the name is taken, or the run cannot be resumed with this configuration.
    """
    if config.resume is None:
        if needs_public_stage(config):
            bound = "is supported only by a single simulate or run: start other runs with model.adapter=NAME-public"
            raise ConfigError("public.train_file", config.public.train_file, bound)
        folder = Path(config.tracking.output_dir) / config.name
        if RunFolder(folder).has_begun() or folder.exists():
            raise ConfigError("name", config.name, f"is taken: {folder} exists; choose another, or resume={folder}")
        return folder
    folder = Path(config.resume)
    if RunFolder(folder).audit_mark.exists():
        raise ConfigError("resume", config.resume, "is an audit, with canaries in its data; an audit cannot be resumed")
    saved = read_saved_config(folder)
    config = config.with_number_format(saved.model.dtype)  # a resumed run keeps its format
    if saved.digest() != config.digest():
        old, new = dict(flatten(saved.decisive())), dict(flatten(config.decisive()))
        differ = [key for key in old | new if old.get(key) != new.get(key)]
        changes = ", ".join(
            f"{key} was {format_value(old.get(key), 30)}, is {format_value(new.get(key), 30)}" for key in differ
        )
        raise ConfigError("resume", config.resume, f"has a different configuration ({changes})")
    return folder


def resume_config(config: RunConfig, folder: Path, *, name: str) -> RunConfig:
    """Return the configuration that resumes the run in `folder`.

    Raises:
        ConfigError: the folder belongs to another run.
    """
    try:
        config = config.with_number_format(read_saved_config(folder).model.dtype)
        find_run_folder(resumed := replace(config, resume=str(folder)))
    except ConfigError as error:
        raise ConfigError("name", name, f"is taken: {folder} {error.bound}; choose another") from None
    return resumed


def is_finished(folder: Path) -> bool:
    """Return True if the run has its model card, and no checkpoint with remaining rounds."""
    config, files = read_saved_config(folder), RunFolder(folder)
    has_card = (files.adapter / CARD).is_file()
    if not has_card or not files.saved_checkpoints:  # without card or checkpoints, the run cannot continue
        return has_card
    rounds = Checkpoints(files.checkpoints, config.digest()).load().rounds
    return should_stop(rounds, config.federation, primary_metric=config.primary_metric)


def make_default_run_name() -> str:
    """Make the default name of a run from the current time in UTC, as in ledgers and logs."""
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d_%H-%M-%S")
