"""Checks of optional packages, before anything is read, loaded or charged."""

from __future__ import annotations

from fedtune.config import RunConfig
from fedtune.extras import require_extra
from fedtune.runs.cost import check_can_measure


def require_run_packages(config: RunConfig) -> None:
    """Check that the optional packages of a run's settings are installed on this machine.

    Raises:
        ConfigError: a package is missing.
    """
    check_can_measure(config.cost)
    if config.model.gguf_file is not None:
        require_extra("model.gguf_file", config.model.gguf_file, "gguf")
    if config.tracking.tracker != "none":
        require_extra("tracking.tracker", config.tracking.tracker, config.tracking.tracker)
    if config.runtime.kind == "ray":
        require_extra("runtime", "ray", "ray")
    if config.data.test_file or config.data.test_fraction:
        require_scoring_packages(config)


def require_scoring_packages(config: RunConfig) -> None:
    """Check that the packages for scoring generated texts are installed, if the task generates texts.

    Raises:
        ConfigError: a package is missing.
    """
    plain = "text" in config.data.columns  # plain texts have no prompts for generation
    if config.evaluation.generate and config.bound_task.predicts_tokens and not plain:
        require_extra("evaluation.generate", True, "text", "sacrebleu", "rouge_score")
