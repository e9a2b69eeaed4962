"""Runs that start from the adapter of another run, such as a renewal for the people of the next period."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from fedtune.config import RunConfig, parse, read_saved_config
from fedtune.federation.run_folder import RunFolder
from fedtune.privacy.cohorts import shift_to_next_window
from fedtune.privacy.site_files import find_max_charged_runs
from fedtune.runs.environment import derive_start
from fedtune.runs.lineage import ANOTHER_MACHINE
from fedtune.runs.overrides import set_by_key
from fedtune.spec import NOT_GIVEN, ConfigError, expand_home


def add_start_adapter(config: RunConfig) -> RunConfig:
    """Add the digest of the start adapter and the privacy loss of all training behind it to a configuration.

    Raises:
        ConfigError: the adapter is missing, has another digest or privacy loss, or does not fit the run.
    """
    name, expected = config.model.adapter, config.model.adapter_sha256
    if name is None and expected is None:
        return config
    if name is None:
        bound = "is required with model.adapter_sha256: the folder of that adapter"
        raise ConfigError("model.adapter", NOT_GIVEN, bound)
    from fedtune.tasks.saved import SavedAdapter  # torch takes seconds to import

    start = SavedAdapter.read_initial(name)
    RunFolder(start.folder.parent).require_own_adapter(start.folder, key="model.adapter", value=name)
    if expected not in (None, start.digest):
        bound = f"does not match the adapter, whose digest is {start.digest}"
        raise ConfigError("model.adapter_sha256", expected, bound)
    start.require_compatible(config.task_model())
    derived = derive_start(config)
    for key, value in derived.items():
        if (stated := getattr(config.privacy, key)) is None:
            continue
        if value is None:
            raise ConfigError(f"privacy.{key}", stated, "cannot be derived from the start's folder: set it to null")
        if stated != value and not (key == "start_epsilon" and math.isclose(stated, value, rel_tol=ANOTHER_MACHINE)):
            raise ConfigError(f"privacy.{key}", stated, f"must be {value}, as derived from the start's run folder")
        derived[key] = stated
    privacy = replace(config.privacy, **derived)  # part of the run's name, which sites sign
    return replace(config, model=replace(config.model, adapter_sha256=start.digest), privacy=privacy)


def renew_config(folder: str | Path, overrides: Mapping[str, Any]) -> RunConfig:
    """Build the configuration that renews the run in `folder`.

    The configuration is copied, except that the run starts from the previous final adapter and the window of cohorts
    shifts by one period. The seed does not change, because it determined the partition of records among simulated
    sites, whose ledgers persist. The number of previous runs is the larger of the number in local ledgers and the
    number in the chain of renewals.

    Args:
        folder: folder of a finished run.
        overrides: overrides by dotted key, such as a name.

    Raises:
        ConfigError: the run is not finished, all planned runs of these people are used up, a warm start is requested,
            or the window would shift into a period that has not begun.
    """
    if public := [key for key in overrides if key.partition(".")[0] == "public"]:
        raise ConfigError(public[0], overrides[public[0]], "conflicts with --renew, which starts from the previous run")
    before = read_saved_config(last := Path(expand_home(str(folder), key="renew")))
    RunFolder(last).find_finished_adapter()
    changes: dict[str, Any] = {"resume": None, "model.adapter": str(last), "model.adapter_sha256": None}
    changes |= dict.fromkeys((f"privacy.{key}" for key in before.privacy.start), None)
    if before.runtime.kind != "deployment" and before.runtime.sites_dir is None:
        changes["runtime.sites_dir"] = str(RunFolder(last).sites)
    if before.privacy.cohorts is not None and not any(key.startswith("privacy.cohorts") for key in overrides):
        changes["privacy.cohorts"] = asdict(
            shift_to_next_window(before.privacy.cohorts, real=before.runtime.kind == "deployment")
        )
    settings = before.to_json() | {"public": {}}
    for key, value in (changes | dict(overrides)).items():
        # Overriding a whole group would reset its other keys, and with them the number of runs.
        if isinstance(settings.get(key), dict) or key == "federation.renewal" or not set_by_key(settings, key, value):
            raise ConfigError(key, value, "must be a setting of the renewed run, such as privacy.epsilon")
    settings["federation"]["renewal"] = max(
        before.federation.renewal + 1, find_max_charged_runs(settings["runtime"]["sites_dir"])
    )
    after = parse(settings)
    _check_remaining_runs(before, after, last)
    return after


def _check_remaining_runs(before: RunConfig, after: RunConfig, last: Path) -> None:
    """Check that a planned run is left for people who were in all previous runs.

    A window of cohorts is not checked here, but by the ledgers.

    Raises:
        ConfigError: no run is left, or epsilon, delta or the number of runs changed.
    """
    shared, cohorts = before.privacy, after.privacy.cohorts
    if not (shared.private and after.privacy.private) or (cohorts is not None and cohorts.first is not None):
        return
    for name in ("epsilon", "delta", "planned_runs"):
        if (value := getattr(after.privacy, name)) != (was := getattr(shared, name)):
            bound = f"must be {was:g}, as in the previous runs: all runs share one budget"
            raise ConfigError(f"privacy.{name}", value, bound)
    if after.federation.renewal >= shared.planned_runs:
        bound = (
            f"was the last of privacy.planned_runs = {shared.planned_runs}, and admitted everyone: their epsilon of "
            f"{shared.epsilon:g} is spent. Nothing was charged. Runs with privacy.cohorts can continue with new people"
        )
        raise ConfigError("renew", str(last), bound)
