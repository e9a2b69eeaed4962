"""GGUF weights, expanded once to a safetensors folder that loads a hundred times faster.

The values stay those of the quantised file, written as float32: logits are bitwise equal.
"""

from __future__ import annotations

import copy
import json
import logging
import os
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from fedtune.model.quiet import first_line, quiet
from fedtune.model.refusals import config_refusal
from fedtune.spec import ConfigError, panics_as_errors

_log = logging.getLogger(__name__)


def expanded_gguf(file: Path, *, sha256: str, cache: Path) -> Path:
    """The folder with `file`'s model and tokenizer in safetensors form; makes it when the cache has none.

    Args:
        file: the GGUF file, in a folder without others: transformers looks at what lies beside it.
        sha256: its hash, which names the cache entry.
        cache: fedtune's cache folder.

    Raises:
        ConfigError: when the file cannot be read as a causal language model, or the cache not be written.
    """
    # Another release of transformers may read the same file differently.
    target = cache / "gguf" / f"{sha256}-transformers-{transformers.__version__}"
    if target.is_dir():
        return target
    _log.info("expanding %s once, into %s", file.name, target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=".draft-", dir=target.parent) as scratch:
            draft = Path(scratch, "draft")
            _expand(file, draft)
            _publish(draft, target)
    except OSError as error:
        bound = f"must be a folder that can be written ({first_line(error)})"
        raise ConfigError("model.cache_dir", str(cache), bound) from error
    return target


def load_gguf(file: Path) -> PreTrainedModel:
    """The causal language model in `file`, expanded to float32 in memory."""
    # This one progress bar asks no setting whether it may show.
    with quiet(), redirect_stderr(StringIO()):
        return AutoModelForCausalLM.from_pretrained(
            file.parent,
            gguf_file=file.name,
            dtype=torch.float32,
            local_files_only=True,
            trust_remote_code=False,
        )


def save_plain(model: PreTrainedModel, folder: Path) -> None:
    """Save a model that came from GGUF; its own `save_pretrained` refuses, since it counts as quantised."""
    config = copy.deepcopy(model.config)
    del config.quantization_config
    with torch.device("meta"):
        plain = type(model)(config)
    plain.load_state_dict(model.state_dict(), assign=True)
    plain.tie_weights()
    plain.generation_config = model.generation_config
    plain.save_pretrained(folder)


def _expand(file: Path, folder: Path) -> None:
    try:
        _check_config(file)
        model = load_gguf(file)
        with quiet(), panics_as_errors():
            tokenizer = AutoTokenizer.from_pretrained(
                file.parent, gguf_file=file.name, local_files_only=True, trust_remote_code=False
            )
    except ConfigError:
        raise
    # What parses the file raises whatever comes.
    except Exception as error:
        bound = f"must be a GGUF causal language model ({first_line(error)})"
        raise ConfigError("model.gguf_file", file.name, bound) from error
    with quiet():
        save_plain(model, folder)
    tokenizer.save_pretrained(folder)


def _check_config(file: Path) -> None:
    """Refuse what a config.json would be refused for, before memory is set aside for it."""
    with quiet(), redirect_stderr(StringIO()):
        config = AutoConfig.from_pretrained(
            file.parent, gguf_file=file.name, local_files_only=True, trust_remote_code=False
        )
    fields = json.loads(config.to_json_string(use_diff=False))
    reason = config_refusal(fields | {"quantization_config": None})
    if reason is not None:
        raise ConfigError("model.gguf_file", file.name, f"its metadata {reason}")


def _publish(draft: Path, target: Path) -> None:
    """Rename `draft` into place; another process that was faster has written the same."""
    try:
        os.rename(draft, target)
    except OSError:
        if not target.is_dir():
            raise
