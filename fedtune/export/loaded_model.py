"""A finished run's model as an object of PEFT, Transformers or Sentence Transformers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import transformers
from peft import PeftModel

from fedtune.config import RunConfig
from fedtune.export.export_formats import export
from fedtune.export.format_choice import choose_format
from fedtune.extras import require_extra
from fedtune.model.base_model import load_base
from fedtune.model.hf_logging import silence_transformers
from fedtune.model.spec import NO_ADAPTER
from fedtune.spec import ConfigError, check_one_of
from fedtune.tasks.inputs import get_input_for
from fedtune.tasks.saved import SavedAdapter

ModelForm: TypeAlias = Literal["peft", "merged", "sentence-transformers"]


class ModelWithTokenizer(NamedTuple):
    """A model and its tokenizer or image processor."""

    model: Any  # a `peft.PeftModel`, `transformers.PreTrainedModel` or `sentence_transformers.SentenceTransformer`
    tokenizer: Any  # `transformers.PreTrainedTokenizerBase`; an image processor for images


def load_model_as(form: ModelForm, adapter: Path, config: RunConfig) -> ModelWithTokenizer:
    """Load a finished run's model on the CPU, in float32 and evaluation mode.

    Args:
        form: "peft": a `PeftModel` on the base model, without a classifier's head; "merged": a Transformers language
            model or token classifier; "sentence-transformers": a `SentenceTransformer` for classification, regression
            or embeddings.
        adapter: the adapter's folder, inside its run's folder.
        config: the run's configuration.

    Returns:
        The model and its tokenizer.

    Raises:
        ConfigError: the task does not support the form, or a library is missing.
        RunError: the loaded model's outputs differ from those of the run's model.
    """
    if config.lora.kind == NO_ADAPTER:
        bound = "requires a base model, but this run trained only a head: use predict or export"
        raise ConfigError("form", form, bound)
    check_one_of("form", form, get_args(ModelForm))
    choose_format(config, form, key="form")
    spec = replace(config.model, dtype="float32")
    if form == "peft":
        saved = SavedAdapter.read(adapter, model=spec)
        with silence_transformers():
            base = load_base(saved.spec.model, predicts_tokens=config.bound_task.predicts_tokens)
            model = PeftModel.from_pretrained(base, adapter).eval()
        tokenizer = get_input_for(config.data).load_reader(config.data, saved.spec.model)
        if base.can_generate():
            ends = config.bound_task.get_eos_token_ids(tokenizer, data=config.data)
            base.generation_config.eos_token_id = sorted(ends)
        return ModelWithTokenizer(model, tokenizer)
    with silence_transformers(), TemporaryDirectory() as scratch:
        folder = Path(scratch, "model")
        export(adapter, config, folder, format=form)
        if form == "merged":
            model = getattr(transformers, config.bound_task.auto_class).from_pretrained(folder, local_files_only=True)
            return ModelWithTokenizer(model, transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True))
        require_extra("form", form, "export", "sentence_transformers")
        from sentence_transformers import SentenceTransformer

        whole = SentenceTransformer(str(folder), device="cpu", local_files_only=True)
        return ModelWithTokenizer(whole, whole.tokenizer)
