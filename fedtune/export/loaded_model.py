"""A finished run's model in memory, as transformers, PEFT and sentence-transformers know it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, NamedTuple, TypeAlias

import transformers
from peft import PeftModel

from fedtune.config import RunConfig
from fedtune.export.export_formats import export
from fedtune.export.format_choice import choose_format
from fedtune.extras import require_extra
from fedtune.model.base_model import load_base
from fedtune.model.hf_logging import silence_transformers
from fedtune.model.spec import NO_ADAPTER
from fedtune.spec import ConfigError
from fedtune.tasks.inputs import get_input_for
from fedtune.tasks.saved import SavedAdapter

ModelForm: TypeAlias = Literal["peft", "merged", "sentence-transformers"]


class ModelWithTokenizer(NamedTuple):
    """A model and what reads texts for it."""

    model: Any  # `peft.PeftModel`, a model of transformers, or `sentence_transformers.SentenceTransformer`
    tokenizer: Any  # `transformers.PreTrainedTokenizerBase`; an image processor for images


def load_model_as(form: ModelForm, adapter: Path, config: RunConfig) -> ModelWithTokenizer:
    """Load a finished run's model with the library of a format, on the CPU, in evaluation mode and float32.

    Args:
        form: "peft": the base with the adapter on it, without a classifier's head; "merged": the whole language model,
            or the whole tagger of tokens; "sentence-transformers": the whole classifier, regression or embedding.
        adapter: the adapter's folder, inside its run's folder.
        config: the run's configuration.

    Raises:
        ConfigError: the task has no such format, or a library is missing.
        RunError: the model does not compute what the run's model computes.
    """
    if config.lora.kind == NO_ADAPTER:
        raise ConfigError("form", form, "needs a base model: this run trained a head alone, so use predict or export")
    choose_format(config, form, key="form")
    spec = replace(config.model, dtype="float32")
    if form == "peft":
        saved = SavedAdapter.read(adapter, model=spec)
        with silence_transformers():
            base = load_base(saved.spec.model, predicts_tokens=config.bound_task.predicts_tokens)
            model = PeftModel.from_pretrained(base, adapter).eval()
        tokenizer = get_input_for(config.data).load_reader(config.data, saved.spec.model)
        if base.can_generate():
            base.generation_config.eos_token_id = sorted(config.bound_task.end_ids(tokenizer, data=config.data))
        return ModelWithTokenizer(model, tokenizer)
    with TemporaryDirectory() as scratch:
        folder = Path(scratch, "model")
        export(adapter, config, folder, format=form)
        if form == "merged":
            loader = getattr(transformers, config.bound_task.auto_class)
            model = loader.from_pretrained(folder, local_files_only=True).eval()
            return ModelWithTokenizer(model, transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True))
        require_extra("form", form, "export", "sentence_transformers")
        from sentence_transformers import SentenceTransformer

        whole = SentenceTransformer(str(folder), device="cpu", local_files_only=True)
        return ModelWithTokenizer(whole, whole.tokenizer)
