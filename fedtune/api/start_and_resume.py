"""A run's folder while it runs: created, locked, logged to, and removed if nothing began."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedtune.config import RunConfig, config_yaml, saved_config
from fedtune.federation.run_folder import RunFolder
from fedtune.federation.spec import PublicSpec
from fedtune.runs.public_stage import awaits_public_stage, public_stage_of
from fedtune.runs.renewal import with_start
from fedtune.spec import ConfigError, shown
from fedtune.words import dotted

if TYPE_CHECKING:  # they import torch, which takes seconds
    from fedtune.federation.lead import LeadState
    from fedtune.runs.federation_run import Listener
    from fedtune.runs.results import RunResult

Work = Callable[[RunConfig, Path, Any], "RunResult"]  # runs a configuration in its folder, and reports to a listener


class _Followed:
    """A listener that first gives each state of the run to `updates`: trackers, and the page of an unfinished run."""

    def __init__(self, listener: Listener, *updates: Callable[[LeadState], None]) -> None:
        self._listener, self._updates = listener, updates

    def __getattr__(self, name: str) -> Any:
        told, updates = getattr(self._listener, name), self._updates

        def follow(*given: Any) -> None:
            for update in updates:
                update(given[-1])
            told(*given)

        return follow if name in ("prepared", "round_finished") else told  # which end with the state


def run_in_folder(config: RunConfig, folder: Path, listener: Listener, *, work: Work) -> RunResult:
    """Run in a folder, created unless a run is resumed, and write a report at the end.

    If the run fails before anything began, a new folder is removed again.
    """
    from fedtune.report.run_page import UnfinishedReport
    from fedtune.tracking import Tracked

    files, page = RunFolder(folder), UnfinishedReport(folder, config)
    made: list[Path] = []
    try:
        with Tracked(config, note=listener.note) as tracked:
            if config.resume is None:
                made = files.create(config_yaml(config))
            with files.held(), files.logged(config.tracking.log_level):
                tracked.begin()
                result = work(config, folder, _Followed(listener, tracked.update, page.update))
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


def after_public_stage(config: RunConfig, train: Callable[[RunConfig, Path], object]) -> RunConfig:
    """The run as it begins in what its public stage has learnt; one that has begun, or has no such stage, as it is.

    `train` runs the stage in its folder, new or begun, beside the run's; one that is finished is used as it is.
    """
    if config.resume is not None or not awaits_public_stage(config):
        return config
    folder_of(replace(config, public=PublicSpec()))  # before anything is trained
    stage = public_stage_of(config)
    folder = Path(stage.tracking.output_dir) / stage.name
    if RunFolder(folder).has_begun():
        stage = going_on(stage, folder, name=config.name)
    if stage.resume is None or not is_finished(folder):
        train(stage, folder)
    return with_start(replace(config, model=replace(config.model, adapter=str(folder))))


def going_on(config: RunConfig, folder: Path, *, name: str) -> RunConfig:
    """The run that goes on in `folder`; where that belongs to something else, `name` is taken."""
    try:
        folder_of(resumed := replace(config, resume=str(folder)))
    except ConfigError as error:
        raise ConfigError("name", name, f"is taken: {folder} {error.bound}; choose another") from None
    return resumed


def folder_of(config: RunConfig) -> Path:
    """The run's folder; it must be new, or the one to resume with the same configuration."""
    if config.resume is None:
        if awaits_public_stage(config):
            bound = "is for one fedtune simulate or fedtune run; others begin in its adapter: model.adapter=NAME-public"
            raise ConfigError("public.train_file", config.public.train_file, bound)
        folder = Path(config.tracking.output_dir) / config.name
        if folder.exists():
            raise ConfigError("name", config.name, f"is taken: {folder} exists; choose another, or resume={folder}")
        return folder
    folder = Path(config.resume)
    if RunFolder(folder).audit_mark.exists():
        raise ConfigError("resume", config.resume, "is an audit, whose data holds canaries; an audit cannot be resumed")
    saved = saved_config(folder)
    if saved.digest() != config.digest():
        old, new = dict(dotted(saved.decisive())), dict(dotted(config.decisive()))
        differ = [key for key in old | new if old.get(key) != new.get(key)]
        changes = ", ".join(f"{key} was {shown(old.get(key), 30)}, is {shown(new.get(key), 30)}" for key in differ)
        raise ConfigError("resume", config.resume, f"was made with another configuration ({changes})")
    return folder


def is_finished(folder: Path) -> bool:
    """True if the run's last round is over, and its adapter has its card."""
    from fedtune.report.from_run import read_run
    from fedtune.report.model_card import CARD  # it draws

    return read_run(folder).finished and (RunFolder(folder).adapter / CARD).is_file()
