"""Which formats a run's model has; without torch, so that a command refuses a wrong one at once."""

from __future__ import annotations

from fedtune.config import RunConfig
from fedtune.spec import NOT_GIVEN, ConfigError
from fedtune.tasks.inputs import get_input_for


def choose_format(config: RunConfig, format: str | None, *, merge: bool = False, key: str = "--format") -> str:
    """Return the export format of a run's model: the given one, or the task's own (with `merge`, of the whole model).

    Raises:
        ConfigError: for `key`: the task has no such format; for --merge: it has only adapters.
    """
    formats = get_input_for(config.data).list_supported_formats(config.bound_task.formats)
    if merge and len(formats) == 1:
        raise ConfigError("--merge", NOT_GIVEN, f"is not available for task {config.task}, which has only adapters")
    chosen = format or formats[int(merge)]
    if chosen not in formats:
        raise ConfigError(key, format, f"must be one of {', '.join(formats)} for task {config.task}")
    return chosen
