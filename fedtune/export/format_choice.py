"""Choice of the export format, in a module without torch so that an invalid format is refused immediately."""

from __future__ import annotations

from fedtune.codec import require
from fedtune.config import RunConfig
from fedtune.model.spec import NO_ADAPTER
from fedtune.spec import NOT_GIVEN, ConfigError
from fedtune.tasks.inputs import get_input_for


def choose_format(
    config: RunConfig, format: str | None, *, merge: bool = False, int8: bool = False, key: str = "format"
) -> str:
    """Choose the export format of a run's model.

    Args:
        config: the run's configuration.
        format: the requested format; None: the task's default format.
        merge: whether to choose the task's format for a merged model.
        int8: whether the exported graph is also quantized to int8.
        key: name of the format option or argument in error messages.

    Raises:
        ConfigError: the task does not support the format, `merge` is set for a task that only supports adapters, or
            `int8` is set without an ONNX graph.
    """
    formats = get_input_for(config.data).list_supported_formats(config.bound_task.formats)
    if merge and len(formats) == 1:
        raise ConfigError("merge", NOT_GIVEN, f"is not available for task {config.task}, which has only adapters")
    chosen = format or formats[int(merge)]
    if chosen not in formats:
        raise ConfigError(key, format, f"must be one of {', '.join(formats)} for task {config.task}")
    check_int8(int8, config, chosen)
    return chosen


def check_int8(int8: bool, config: RunConfig, format: str) -> None:
    """Raise a ConfigError if `int8` is set for a format other than ONNX, or for a run without a base model."""
    has_graph = format == "onnx" and config.lora.kind != NO_ADAPTER
    require("int8", NOT_GIVEN, has_graph or not int8, "requires the format onnx and a run with a base model")
