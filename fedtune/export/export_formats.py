"""Export formats: adapter, merged model, sentence-transformers, safetensors and ONNX.

Every export is written to a temporary folder, reloaded with its target library, and compared with the run's model on
artificial tokens.  The target folder is created only if the outputs agree.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import transformers
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fedtune.codec import read_regular_file
from fedtune.config import RunConfig
from fedtune.data.batching import Batch
from fedtune.data.features import FeatureSpec, encode_features
from fedtune.data.records import Record
from fedtune.data.values import FEATURE
from fedtune.export.onnx_graphs import INT8, WHOLE, load_graph, quantize, write_graph
from fedtune.extras import require_extra
from fedtune.federation.run_folder import RunFolder
from fedtune.model.adapter_files import CARD, LABEL
from fedtune.model.base_model import load_base, save_as_plain_model
from fedtune.model.hf_logging import silence_transformers
from fedtune.model.ia3_and_dora import merge_adapter
from fedtune.model.spec import NO_ADAPTER
from fedtune.report import from_run
from fedtune.report.loading_code import build_loading_code, build_prediction_expression
from fedtune.report.model_card import CardFormat, render_card_files
from fedtune.runs.environment import write_lineage_mark
from fedtune.spec import ConfigError, RunError
from fedtune.tasks.base import Readout, Task
from fedtune.tasks.inputs import get_input_for
from fedtune.tasks.saved import SavedAdapter, load_task_model, write_task_model
from fedtune.tasks.task_model import TaskModel

_ROWS = 64  # number of artificial feature rows
_MAX_APART = 1e-3
"""Maximum difference of logits relative to the largest logit; allows only for the rounding of other kernels."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """The model to export: a run's merged base model with its readout, tokenizer and configuration."""

    config: RunConfig  # configuration of the run
    adapter: Path  # adapter folder of the run
    task: Task
    base: PreTrainedModel  # base model with the merged adapter
    readout: Readout  # linear layers from the mean hidden state to the outputs
    tokenizer: PreTrainedTokenizerBase
    private_to: str | None  # site of a personalized adapter; None: a shared adapter

    @classmethod
    def from_model(
        cls, model: TaskModel, config: RunConfig, adapter: Path, *, private_to: str | None
    ) -> tuple[Source, ReferenceOutputs]:
        """Compute reference outputs on artificial tokens, then merge the adapter into the model's base in place."""
        reference = ReferenceOutputs.from_model(model)
        readout = model.task.list_readout_layers(model)
        with silence_transformers():
            base = merge_adapter(model.base)
        write_lineage_mark(base.config, adapter, private_to=private_to)
        if outputs := model.task.name_outputs(config.data.labels):
            base.config.id2label = dict(enumerate(outputs))
            base.config.label2id = {label: place for place, label in enumerate(outputs)}
        tokenizer = get_input_for(config.data).load_reader(config.data, model.spec.model)
        if "text_pair" in config.data.columns:  # the model was trained without token type ids
            tokenizer.model_input_names = ["input_ids", "attention_mask"]
        if base.can_generate():
            base.generation_config.eos_token_id = sorted(model.task.get_eos_token_ids(tokenizer, data=config.data))
        source = cls(
            config=config,
            adapter=adapter,
            task=model.task,
            base=base,
            readout=readout,
            tokenizer=tokenizer,
            private_to=private_to,
        )
        return source, reference

    def wrap_base(self, base: PreTrainedModel | PeftModel) -> Scores:
        """Combine a reloaded base model with the run's readout into a module that computes the exported outputs."""
        pooled = own.embed_rows if (own := get_input_for(self.config.data)).is_fixed else None
        return Scores(base, self.readout, reads_tokens=self.task.reads_tokens, pooled=pooled)


@dataclass(frozen=True)
class ReferenceOutputs:
    """Reference outputs of the run's model: `logits` for artificial `input_ids` (2, t) with padding at the end."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    logits: torch.Tensor

    @classmethod
    def from_model(cls, model: TaskModel) -> ReferenceOutputs:
        """Compute the reference outputs of a model; the tokens depend only on the vocabulary."""
        draws = np.random.default_rng(0)
        rows = torch.from_numpy(np.stack(model.generate_dummies([9, 9], draws)))
        input_ids = rows if rows.is_floating_point() else rows.long()
        mask = torch.ones(rows.shape[:2], dtype=torch.int64)
        if not get_input_for(model.spec).is_fixed:
            mask[1, 5:] = 0
        with torch.no_grad():
            logits = model.logits(Batch(input_ids, mask, torch.zeros(2, dtype=torch.int64)))
            logits = model.task.compute_exported_output(logits, spec=model.spec)
        return cls(input_ids, mask, logits)

    def require_match(self, found: torch.Tensor, *, form: str) -> None:
        """Compare the logits of an export with the reference.

        Raises:
            RunError: the logits differ by more than rounding errors.
        """
        attended = self.attention_mask.bool() if self.logits.dim() > 2 else slice(None)
        ours, theirs = self.logits[attended], found[attended]
        apart = float((ours - theirs).abs().max()) if ours.shape == theirs.shape else float("inf")
        if not apart <= _MAX_APART * max(1.0, float(ours.abs().max())):
            raise RunError(f"the {form} export's logits differ from those of the run's model (by up to {apart:.3g})")


class Scores(nn.Module):
    """A base model with the task's readout: from token ids and attention mask, both (n, t), to logits or embeddings."""

    def __init__(
        self, base: PreTrainedModel | PeftModel, readout: Readout, *, reads_tokens: bool, pooled: Any = None
    ) -> None:
        super().__init__()
        self.pooled = pooled  # pooling function of the input kind; None: mean over tokens
        self.base, self.depth, self.predicts_tokens = base, len(readout), base.can_generate()
        self.reads_tokens = reads_tokens
        for place, (weight, bias) in enumerate(readout):
            self.register_buffer(f"weight_{place}", weight)
            self.register_buffer(f"bias_{place}", bias)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Compute the logits or embeddings of token ids (n, t)."""
        if self.pooled is not None:
            return self.read_out(self.pooled(self.base, input_ids, attention_mask))
        cache = {"use_cache": False} if self.predicts_tokens else {}
        output = self.base(input_ids=input_ids, attention_mask=attention_mask, **cache)
        if "logits" in output:  # the model has a Transformers head
            return output.logits  # type: ignore[no-any-return]
        if self.reads_tokens:
            return nn.functional.linear(output.last_hidden_state, self.get_buffer("weight_0"))
        mask = attention_mask.unsqueeze(-1).to(torch.float32)
        values: torch.Tensor = (output.last_hidden_state * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1.0)
        return self.read_out(values)

    def read_out(self, values: torch.Tensor) -> torch.Tensor:
        """Compute the logits of pooled states (n, h)."""
        for place in range(self.depth):
            weight, bias = self.get_buffer(f"weight_{place}"), getattr(self, f"bias_{place}")
            values = nn.functional.linear(nn.functional.normalize(values, dim=-1), weight, bias)
        return values if self.depth else nn.functional.normalize(values, dim=-1)


def export(
    adapter: Path, config: RunConfig, target: Path, *, format: str, private: bool = False, int8: bool = False
) -> list[Path]:
    """Export a finished run's model with its model card and tokenizer to a new folder.

    Args:
        adapter: the adapter's folder, inside its run's folder.
        config: the run's configuration.
        target: the folder to create.
        format: one of the task's formats.
        private: also accept a personalized adapter, and use its own card.
        int8: also write an ONNX graph with weights quantized to int8.

    Returns:
        The paths of the files.

    Raises:
        ConfigError: a library is missing, the model cannot be loaded, or the folder cannot be written.
        RunError: the exported model's outputs differ from those of the run's model.
    """
    run, private_to = adapter.absolute().parent, SavedAdapter.read(adapter, private=private).private_to
    if private_to is None:
        card = render_card_files(from_run.read_run(run), from_run.build_run_report(run), get_card_form(format, config))
    elif missing := [name for name in (CARD, LABEL) if not (adapter / name).is_file()]:
        raise ConfigError("adapter", str(adapter), f"has no {missing[0]}: run fedtune personalize again")
    else:
        card = {name: read_regular_file(adapter / name) for name in (CARD, LABEL)}
    with create_model_folder(target, config, card, int8=int8) as folder:
        if config.lora.kind == NO_ADAPTER:
            _write_features(adapter, config, folder, format=format, private_to=private_to)
        else:
            model = load_task_model(adapter, model=replace(config.model, dtype="float32"), private=private)
            source, reference = Source.from_model(model, config, adapter, private_to=private_to)
            source.tokenizer.save_pretrained(folder)
            WRITERS[format](source, reference, folder)
    if private_to is None:
        with suppress(OSError):  # a read-only run folder does not record its exports
            RunFolder(run).record_export(target)
    return sorted(path for path in target.rglob("*") if path.is_file())


@contextmanager
def create_model_folder(target: Path, config: RunConfig, card: Mapping[str, bytes], *, int8: bool) -> Iterator[Path]:
    """Yield a temporary folder for a model; on exit, add card, labels and int8 graph, and rename it to `target`.

    Raises:
        ConfigError: `target` already exists, or cannot be written.
    """
    if os.path.lexists(target):
        raise ConfigError("to", str(target), "already exists: choose a new folder")
    target = target.absolute()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as scratch:
            folder = Path(scratch, "complete")
            folder.mkdir()
            yield folder
            if int8:
                quantize(folder / WHOLE, folder / INT8)
            if config.data.labels:
                lines = (" ".join(label.split()) for label in config.bound_task.name_outputs(config.data.labels))
                (folder / "labels.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
            for name, data in card.items():
                (folder / name).write_bytes(data)
            (usual := Path(scratch, "usual")).touch()
            for file in folder.rglob("*"):
                if file.is_file():  # safetensors writes files that only their owner can read
                    shutil.copymode(usual, file)
            os.rename(folder, target)
    except OSError as error:
        raise ConfigError("to", str(target), f"is not writable ({error.strerror}): choose another folder") from error


def _write_adapter(source: Source, reference: ReferenceOutputs, folder: Path) -> None:
    # Write the loaded tensors instead of copying files: an untrusted run folder may contain symbolic links.
    # Uses the public base model, because the initial DoRA magnitudes depend on its weights.
    private = source.private_to is not None
    model = load_task_model(source.adapter, model=replace(source.config.model, dtype="float32"), private=private)
    write_task_model(model, folder, private_to=source.private_to)
    if not (source.readout or source.task.predicts_tokens):
        return  # the task has its own head, which no other library implements
    with silence_transformers(), torch.no_grad():
        base = load_base(model.spec.model, predicts_tokens=source.task.predicts_tokens)
        loaded = PeftModel.from_pretrained(base, folder)
        scores = source.wrap_base(loaded)(reference.input_ids, reference.attention_mask)
    reference.require_match(scores, form="peft")


def _write_merged(source: Source, reference: ReferenceOutputs, folder: Path) -> None:
    plain = source.wrap_base(_reload_plain(source, folder))
    with torch.no_grad():
        reference.require_match(plain(reference.input_ids, reference.attention_mask), form="merged")


def _reload_plain(source: Source, folder: Path) -> PreTrainedModel:
    """Save the merged base, and reload it with Transformers."""
    with silence_transformers():
        save_as_plain_model(source.task.export_model(source.base, source.readout), folder)
        loaded: PreTrainedModel = getattr(transformers, source.task.auto_class).from_pretrained(
            folder, local_files_only=True
        )
    return loaded.eval()


def _write_sentence_transformers(source: Source, reference: ReferenceOutputs, folder: Path) -> None:
    require_extra("format", "sentence-transformers", "export", "sentence_transformers")
    library = importlib.import_module("sentence_transformers")
    modules = importlib.import_module("sentence_transformers.sentence_transformer.modules")
    with TemporaryDirectory() as scratch:
        _reload_plain(source, Path(scratch))
        source.tokenizer.save_pretrained(scratch)
        with silence_transformers(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            base = modules.Transformer(scratch, max_seq_length=source.config.data.max_length)
            layers = [base, modules.Pooling(source.base.config.get_text_config().hidden_size, "mean")]
            for weight, bias in source.readout:
                given = {"bias": bias is not None, "init_weight": weight, "init_bias": bias}
                dense = modules.Dense(*weight.shape[::-1], activation_function=nn.Identity(), **given)
                layers += [modules.Normalize(), dense]
            layers += [] if source.readout else [modules.Normalize()]
            whole = library.SentenceTransformer(modules=layers, device="cpu")
            whole.save_pretrained(str(folder), create_model_card=False)
            loaded = library.SentenceTransformer(str(folder), device="cpu", local_files_only=True)
            tokens = {"input_ids": reference.input_ids, "attention_mask": reference.attention_mask}
            with torch.no_grad():
                reference.require_match(loaded(tokens)["sentence_embedding"], form="sentence-transformers")


def _write_onnx(source: Source, reference: ReferenceOutputs, folder: Path) -> None:
    with TemporaryDirectory() as scratch:
        plain = source.wrap_base(_reload_plain(source, Path(scratch))).eval()
        source.base.config.save_pretrained(folder)
        sizes = {0: torch.export.Dim("rows"), 1: torch.export.Dim("tokens")}
        given = {name: (getattr(reference, name), sizes) for name in ("input_ids", "attention_mask")}
        write_graph(plain, given, "logits", folder / WHOLE)
    logits = load_graph(folder / WHOLE)(**{name: tensor for name, (tensor, _) in given.items()})
    reference.require_match(logits, form="onnx")


class RawScores(nn.Module):
    """A module from raw feature values (rows, columns) to outputs (rows, outputs), including the feature encoding.

    The input columns follow the order of `data.features`: a number, the numbers of a list, or the index of a category
    in its declared list (the length of the list for an unknown category). Missing values are NaN.
    """

    def __init__(self, model: TaskModel, features: Sequence[FeatureSpec]) -> None:
        super().__init__()
        assert model.head is not None
        self.head, self.features = model.head, features
        self.read_out, self.spec = model.task.compute_exported_output, model.spec
        self.norm = sum(one.num_numbers for one in features) ** 0.5

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """Compute the logits or, for regression, the predicted number."""
        parts, first = [], 0
        for one in self.features:
            for _ in one.columns:
                size = one.size or 1
                raw, first = values[:, first : first + size], first + size
                nothing = torch.isnan(raw)
                raw = torch.where(nothing, torch.zeros_like(raw), raw)
                if one.range is None:
                    found = (raw == torch.arange(len(one.categories) + 1)).to(torch.float32)
                else:
                    low, high = one.range
                    found = (raw.clamp(low, high) - (low + high) / 2) / ((high - low) / 2)
                parts.append(torch.where(nothing[:, :1], torch.zeros_like(found), found))
                if one.missing == "indicator":
                    parts.append(nothing[:, :1].to(torch.float32))
        logits = self.spec.head.scale * self.head(torch.cat(parts, dim=1) / self.norm)
        return self.read_out(logits, spec=self.spec)


def _generate_random_field(one: FeatureSpec, draw: Callable[[int], int]) -> str:
    """Generate a random value of a feature, occasionally missing or outside of the declared values."""
    match int(draw(8)):
        case 0 if one.missing == "indicator":
            return ""
        case 1 if one.categories:
            return "\N{REPLACEMENT CHARACTER}"
        case 2 if one.range is not None and one.size is None:
            return repr(2 * one.range[1] - one.range[0])
    return one.generate_dummies(draw)


def _write_features(adapter: Path, config: RunConfig, folder: Path, *, format: str, private_to: str | None) -> None:
    """Export a feature model as safetensors or ONNX, and verify the export on artificial rows.

    Raises:
        ConfigError: the adapter cannot be loaded.
        RunError: the exported model's outputs differ from those of the run's model.
    """
    model = load_task_model(adapter, model=config.model, private=private_to is not None)
    draws, features = np.random.default_rng(0), config.data.features
    columns = [(one, FEATURE + name) for one in features for name in one.columns]
    fields = ({role: _generate_random_field(one, draws.integers) for one, role in columns} for _ in range(_ROWS))
    records = list(map(Record, fields))
    vectors = torch.from_numpy(np.stack([encode_features(record, features) for record in records]))
    batch = Batch(vectors[:, None], torch.ones(_ROWS, 1, dtype=torch.int64), torch.zeros(_ROWS))
    parsed = [[one.parse_field(record.fields[role], at=role) for one, role in columns] for record in records]
    raw = torch.tensor([[value for values in row for value in values] for row in parsed])
    with torch.no_grad():
        ours = model.task.compute_exported_output(model.logits(batch), spec=model.spec)
        write_task_model(model, folder, private_to=private_to)
        if format == "onnx":
            values = {"values": (raw, {0: torch.export.Dim("rows")})}
            write_graph(RawScores(model, features).eval(), values, "scores", folder / WHOLE)
            theirs = load_graph(folder / WHOLE)(values=raw)
        else:
            theirs = RawScores(load_task_model(folder, private=True), features)(raw)
    ReferenceOutputs(vectors, batch.attention_mask, ours).require_match(theirs, form=format)
    (folder / "features.json").write_text(json.dumps([asdict(one) for one in features], indent=1) + "\n", "utf-8")


def _write_whole(source: Source, reference: ReferenceOutputs, folder: Path) -> None:
    """Write the merged base in Transformers format, with separate files for the head and its settings."""
    _write_merged(source, reference, folder)
    with TemporaryDirectory() as scratch:
        _write_adapter(source, reference, Path(scratch))
        for name in ("head.safetensors", "fedtune.json"):
            shutil.copyfile(Path(scratch, name), folder / name)


WRITERS: Mapping[str, Callable[[Source, ReferenceOutputs, Path], None]] = {
    "peft": _write_adapter,
    "merged": _write_merged,
    "safetensors": _write_whole,
    "sentence-transformers": _write_sentence_transformers,
    "onnx": _write_onnx,
}
_LOADING = {
    "merged": """\
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("folder")
model = AutoModelForCausalLM.from_pretrained("folder")
""",
    "sentence-transformers": """\
from sentence_transformers import SentenceTransformer

LABELSmodel = SentenceTransformer("folder")
scores = model.encode(["a text"])[0]
print(READS)
""",
    "tags": """\
from transformers import pipeline

# A word has the tag of its first token; the other tokens were not trained.
find = pipeline("token-classification", "folder", aggregation_strategy="first")
print(find("a text"))
""",
    "embeddings": """\
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("folder")
embeddings = model.encode(["a text", "another"])
print(model.similarity(embeddings, embeddings))
""",
    "onnx": """\
import onnxruntime
from transformers import AutoTokenizer

tokens = AutoTokenizer.from_pretrained("folder")(["a text"], return_tensors="np")
session = onnxruntime.InferenceSession("folder/model.onnx")
logits = session.run(None, {name: tokens[name] for name in ("input_ids", "attention_mask")})[0]
""",
}
_LABELS = 'labels = open("folder/labels.txt", encoding="utf-8").read().splitlines()\n'
_WHOLE = "The tuned head on the weights, with the adapter merged into them,"
_WHAT = {
    "merged": ("The weights, with the adapter merged into them,", "transformers"),
    "tags": (_WHOLE, "transformers"),
    "sentence-transformers": (_WHOLE, "sentence-transformers"),
    "embeddings": ("A model for embeddings, with the adapter merged into its weights,", "sentence-transformers"),
    "onnx": ("An ONNX graph of the weights, with the adapter merged into them,", "onnx"),
}
"""Description and library by export format, like the usage snippets in `_LOADING`; "tags" is the merged format of a
token classifier, and "embeddings" the format sentence-transformers without a head."""


def get_card_form(format: str, config: RunConfig) -> CardFormat:
    """Return the model card's texts and loading code for an export format."""
    task = config.bound_task
    if format == "safetensors" and config.lora.kind != NO_ADAPTER:
        loading = build_loading_code(task, config.data, base="folder", folder="folder")
        return CardFormat(what=_WHOLE, library="transformers", relation="finetune", loading=loading)
    if format in ("peft", "safetensors"):
        return CardFormat.for_adapter(config, folder="folder")
    if config.data.input != "text":
        loading = build_loading_code(task, config.data, base="", folder="folder", graph=True)
        return CardFormat(what="An ONNX graph", library="onnx", relation="finetune", loading=loading)
    form = "tags" if format == "merged" and task.reads_tokens else format
    form = "embeddings" if format == "sentence-transformers" and not task.has_head else form
    what, library = _WHAT[form]
    loading = _LOADING[form].replace("LABELS", _LABELS if config.data.labels else "")
    loading = loading.replace("READS", build_prediction_expression(task) or "scores")
    return CardFormat(what=what, library=library, relation="finetune", loading=loading)
