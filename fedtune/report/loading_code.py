"""Python code that loads a run's model without fedtune, for model cards and exports.

For a task without its own code, the code only loads the base model and the adapter.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict

from fedtune.config import RunConfig
from fedtune.data.spec import DataSpec
from fedtune.data.values import NO_NAME, NUMBER
from fedtune.tasks.base import Task
from fedtune.tasks.classification import Classification
from fedtune.tasks.embedding import Embedding
from fedtune.tasks.multi_label import MultiLabel
from fedtune.tasks.ordinal import Ordinal
from fedtune.tasks.pooled import PooledTask
from fedtune.tasks.regression import Regression
from fedtune.tasks.survival import Survival
from fedtune.tasks.token_classification import TokenClassification

_LOADING = """\
from peft import PeftModel
from transformers import AutoTokenizer, {auto}

tokenizer = AutoTokenizer.from_pretrained({base!r})
model = PeftModel.from_pretrained({auto}.from_pretrained({base!r}), "{folder}").eval()
"""
_WITH_HEAD = """
import json
import torch
from safetensors.torch import load_file

settings = json.load(open("FOLDER/fedtune.json", encoding="utf-8"))
head = load_file("FOLDER/head.safetensors")
tokens = tokenizer(["a text"], return_tensors="pt", return_token_type_ids=False)
with torch.no_grad():
"""
"""The first lines for tasks with a head, up to the forward pass of a text; FOLDER is the adapter's folder."""
_POOLED_LINES = """\
    hidden, mask = model(**tokens).last_hidden_state, tokens["attention_mask"].unsqueeze(-1)
pooled = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
centered = torch.nn.functional.normalize(pooled - head["center"], dim=-1)
labels, scores = settings["labels"], settings["head"]["scale"] * (centered @ head["weight"].T)[0]
"""
"""Computes the head's scores for a text; a center of zeros has no effect."""
_TOKEN_LINES = """\
    hidden = model(**tokens).last_hidden_state[0]
tags = ["O", *(f"{mark}-{label}" for label in settings["labels"] for mark in "BI")]
scores = settings["head"]["scale"] / hidden.shape[1] ** 0.5 * hidden @ head["weight"].T
# A word has the tag of its first token; the other tokens were not trained.
print([tags[place] for place in scores.argmax(dim=1)])
"""
_EMBEDDING_LINES = """
import torch

tokens = tokenizer(["a text", "another"], padding=True, return_tensors="pt", return_token_type_ids=False)
with torch.no_grad():
    hidden, mask = model(**tokens).last_hidden_state, tokens["attention_mask"].unsqueeze(-1)
embeddings = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
print(embeddings @ embeddings.T)
"""
_IMAGE_LINES = """\
import json
import torch
IMPORTfrom PIL import Image, ImageOps
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModel

processor, model = AutoImageProcessor.from_pretrained(BASE, backend="pil"), AutoModel.from_pretrained(BASE)
model = MODEL
settings = json.load(open("FOLDER/fedtune.json", encoding="utf-8"))
head = load_file("FOLDER/head.safetensors")
pixels = processor(images=ImageOps.exif_transpose(Image.open("image.png")).convert("RGB"), return_tensors="pt")
count = (pixels["pixel_values"].shape[-1] // model.config.patch_size) ** 2
with torch.no_grad():
    patches = model(**pixels).last_hidden_state[:, -count:]
pooled = torch.nn.functional.normalize(patches.mean(1), dim=-1)
labels, scores = settings["labels"], settings["head"]["scale"] * (pooled @ head["weight"].T)[0]
"""
"""Computes the head's scores for an image."""
_ROW_LINES = """\
import json
import re
import numpy as np
IMPORT
features = json.loads(FEATURES)
labels = LABELS


def text_of(value):  # a cell as a run reads it; "" for a missing value
    value = value.tolist() if hasattr(value, "tolist") else value
    if value is None or value != value:
        return ""
    if not isinstance(value, (str, int, float, list)):
        raise ValueError("a value must be a number, a text or a list")
    if isinstance(value, list):
        return json.dumps([number_of(one) for one in value])
    text = value.strip() if isinstance(value, str) else json.dumps(value, allow_nan=False)
    whole = re.fullmatch(r"([+-]?[0-9]+)[.]0+", text)
    return text.lower() if text.lower() in ("true", "false") else whole[1] if whole else text


def number_of(value):
    text = text_of(value)
    if not re.fullmatch(NUMBER, text, re.ASCII) or not np.isfinite(float(text)):
        raise ValueError("a number must be finite, with a point before decimals")
    return float(text)


def values_of(row):  # a dict of columns; raises ValueError for a row that a run cannot use
    found = []
    for one in features:
        for column in one["columns"]:
            text, names, size = text_of(row[column]), one["categories"], one["size"]
            if not text or (text in NOTHING and text not in names):
                if one["missing"] == "unusable":
                    raise ValueError(f"{column} must have a value")
                raw = [float("nan")] * (size or 1)
            elif names:
                raw = [names.index(text) if text in names else len(names)]
            else:
                held = json.loads(text) if size else [text]
                if not isinstance(held, list) or len(held) != (size or 1):
                    raise ValueError(f"{column} must be a list of {size} numbers")
                raw = [number_of(part) for part in held]
            found.append((one, np.array(raw, dtype=np.float64)))
    return found


row = ROW
"""
_SCALED_LINES = """\
vector = []
for one, raw in values_of(row):
    nothing = np.isnan(raw[0])
    if one["categories"]:
        part = np.arange(len(one["categories"]) + 1) == raw[0]
    else:
        low, high = one["range"]
        part = (np.clip(raw, low, high) - (low + high) / 2) / ((high - low) / 2)
    vector += [*np.where(nothing, 0.0, part), *([float(nothing)] if one["missing"] == "indicator" else [])]
count = sum(len(one["columns"]) * (one["size"] or 1) for one in features)
settings = json.load(open("FOLDER/fedtune.json", encoding="utf-8"))
layers, hidden = load_file("FOLDER/head.safetensors"), np.array(vector) / np.sqrt(count)
names = {name.rpartition("weight")[0] for name in layers if "weight" in name}
names = sorted(names, key=lambda name: (len(name), name))
for place, name in enumerate(names):
    hidden = np.maximum(hidden, 0) if place else hidden
    hidden = layers[f"{name}weight"] @ hidden + layers[f"{name}bias"]
scores = settings["head"]["scale"] * hidden
"""
_GRAPH_LINES = """\
values = np.concatenate([raw for _, raw in values_of(row)])[None].astype(np.float32)
scores = onnxruntime.InferenceSession("FOLDER/model.onnx").run(None, {"values": values})[0][0]
"""
_FROM_TEXT: Mapping[type, str] = {
    PooledTask: _WITH_HEAD + _POOLED_LINES,
    TokenClassification: _WITH_HEAD + _TOKEN_LINES,
    Embedding: _EMBEDDING_LINES,
}
"""Task class or a base class of it -> code from a text to the loaded model's output."""
_ANSWERS: Mapping[type, str] = {
    Classification: "labels[scores.argmax()]",
    MultiLabel: "[label for label, score in zip(labels, scores) if score > 0]",
    Ordinal: "labels[int((scores > 0).sum())]",
    Regression: "float(scores[0])",
    Survival: "[float(one) for one in (1 / (1 + 2.718281828459045 ** scores)).cumprod(0)]",
    PooledTask: "scores",
}
"""Task class or a base class of it -> expression for the prediction from the vector `scores` and from `labels`."""
_IN_ITS_RANGE = """\
low, high = settings["target_range"]
scores = (low + high) / 2 + (high - low) / 2 * scores
"""
"""Scales a regression's scores to the range of its targets."""


def build_adapter_loading_code(config: RunConfig, *, base: str, folder: str) -> str:
    """Return code that loads a saved adapter on its base model and prints the prediction for an example.

    Args:
        config: the run's configuration.
        base: the base model's path or Hub id; the folder itself if the adapter was merged.
        folder: the folder of the saved adapter.
    """
    task, lines = config.bound_task, build_input_loading_code(config.data, base=base, folder=folder)
    if lines is None:
        auto = task.auto_class if task.predicts_tokens else "AutoModel"
        from_text = next((lines for cls, lines in _FROM_TEXT.items() if isinstance(task, cls)), "")
        lines = _LOADING.format(auto=auto, base=base, folder=folder) + from_text.replace("FOLDER", folder)
    in_its_range = _IN_ITS_RANGE if isinstance(task, Regression) else ""
    return f"{lines}{in_its_range}print({answer})\n" if (answer := build_prediction_expression(task)) else lines


def build_prediction_expression(task: Task) -> str:
    """Return the expression for a task's prediction from `scores` and `labels`; "" for a task whose code computes no
    scores.
    """
    return next((answer for cls, answer in _ANSWERS.items() if isinstance(task, cls)), "")


def build_input_loading_code(data: DataSpec, *, base: str, folder: str, graph: bool = False) -> str | None:
    """Return code that computes `scores` and `labels` from an image or a row of features; None for text inputs.

    Args:
        data: the data settings.
        base: the base model's path or Hub id; the folder itself if the adapter was merged.
        folder: the folder of the saved model.
        graph: whether the folder contains an ONNX graph.
    """
    match data.input:
        case "features":
            return _build_features_loading_code(data, folder=folder, graph=graph)
        case "image":
            return _build_image_loading_code(base=base, folder=folder)
    return None


def _build_features_loading_code(data: DataSpec, *, folder: str, graph: bool) -> str:
    row = {name: one.generate_dummies(lambda _: 0) for one in data.features for name in one.columns}
    shown = {
        name: None if one.missing == "indicator" else row[name] if one.categories else json.loads(row[name])
        for one in data.features
        for name in one.columns
    }
    own = {
        "IMPORT": "import onnxruntime" if graph else "from safetensors.numpy import load_file",
        "FEATURES": repr(json.dumps([asdict(one) for one in data.features])),
        "LABELS": repr(list(data.labels)),
        "NUMBER": repr(NUMBER.pattern),
        "NOTHING": repr(sorted(NO_NAME)),
        "ROW": repr(shown),
        "FOLDER": folder,
    }
    return _substitute_placeholders(_ROW_LINES + (_GRAPH_LINES if graph else _SCALED_LINES), own)


def _build_image_loading_code(*, base: str, folder: str) -> str:
    merged, wrapped = base == folder, f'PeftModel.from_pretrained(model, "{folder}").get_base_model().eval()'
    own = {
        "IMPORT": "" if merged else "from peft import PeftModel\n",
        "MODEL": "model.eval()" if merged else wrapped,
        "BASE": repr(base),
        "FOLDER": folder,
    }
    return _substitute_placeholders(_IMAGE_LINES, own)


def _substitute_placeholders(lines: str, values: Mapping[str, str]) -> str:
    """Replace the placeholders in code by `values`, all in one pass, since a column may be named like a placeholder."""
    return re.sub("|".join(values), lambda found: values[found[0]], lines)
