"""Gradients of every record layout match a loop and are batch-invariant."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from fedtune.data import Record, TextDataset
from fedtune.data.spec import DataSpec
from fedtune.data.tokenization import UNSUPERVISED
from fedtune.tasks.registry import get_task
from fedtune.tasks.task_model import TaskModel

from ..data.conftest import build_chat as turns_of
from ..data.conftest import encode_turns, make_tokenizer
from .conftest import LAST, build_trained, make_examples
from .test_companies import require_batch_invariance
from .test_dp_step import require_sums_of_a_loop

LONGEST = 14
RECORDS: dict[str, list[dict[str, Any]]] = yaml.safe_load(
    Path(__file__).with_name("layouts.yaml").read_text(encoding="utf-8")
)
DATA_SETTINGS: dict[str, dict[str, Any]] = {
    "chat": {"columns": {"messages": "m"}, "chat_template": "plain"},
    "text": {"columns": {"text": "t"}},
    "scored": {"columns": {"text": "t", "other": "o", "target": "s"}, "target_range": (0.0, 5.0)},
    "triplets": {"columns": {"anchor": "a", "positive": "p", "negative": "n"}},
    "prompted": {"columns": {"prompt": "p", "chosen": "c", "rejected": "r"}, "prompt_template": "is {prompt}"},
    "continued": {"columns": {"messages": "m", "chosen": "c", "rejected": "r"}, "chat_template": "plain"},
    "labels": {"columns": {"text": "t", "labels": "l"}, "labels": ("card", "lost", "place")},
    "tagged": {"columns": {"tokens": "t", "tags": "g"}, "labels": ("card", "lost", "place")},
    "marked": {"columns": {"text": "t", "spans": "s"}, "labels": ("card", "lost", "place"), "windows": 2, "stride": 4},
}
TASK_OF = {"scored": "embedding", "triplets": "embedding", "prompted": "preference", "continued": "preference"}
TASK_OF |= {"labels": "multi_label", "tagged": "token_classification", "marked": "token_classification"}
"""Other heads use a language model's layout; test_feature_gradients.py tests the losses of those heads."""
SETTINGS: dict[str, dict[str, Any]] = {"scored": {"texts": 2}, "triplets": {"texts": 3}, "marked": {"texts": 2}}
TASK_SETTINGS: dict[str, Any] = {"triplets": {"margin": 1.5}, "prompted": {"beta": 2.0}}
TASK_SETTINGS |= {"continued": {"beta": 2.0, "per_token": True}}
SETTINGS |= {"prompted": {"texts": 2}, "continued": {"texts": 2}}
layouts = pytest.mark.parametrize("layout", DATA_SETTINGS)
keeping = pytest.mark.parametrize("keeps", [False, True], ids=["uncached", "cached states"])


def parse_role(role: str, value: Any) -> str:
    turns = partial(turns_of, first="user" if role == "messages" else "assistant")
    return encode_turns(turns(*value)) if isinstance(value, list) else str(value)


def make_dataset(layout: str) -> TextDataset:
    data = DataSpec(dataset="d", train_file="f", declared_sizes=9, max_length=LONGEST, **DATA_SETTINGS[layout])
    records = [Record({role: parse_role(role, value) for role, value in row.items()}) for row in RECORDS[layout]]
    task = get_task(TASK_OF.get(layout, "causal_lm"), TASK_SETTINGS.get(layout))
    return task.tokenize(records, make_tokenizer(post="[CLS] $A"), data=data, lenient_within=258)


def make_layout(layout: str, *, keeps: bool, size: float = 0.2) -> TaskModel:
    task, settings = TASK_OF.get(layout, "causal_lm"), SETTINGS.get(layout, {}) | ({"lora": LAST} if keeps else {})
    learner = get_task(task, TASK_SETTINGS.get(layout))
    base = "random:bert" if learner.has_head else "random:llama"
    return build_trained(base, task, size=size, task_settings=learner.own, **settings)


@layouts
def test_layout_fixtures_cover_truncation_and_several_answers(layout: str) -> None:
    dataset = make_dataset(layout)
    texts = SETTINGS.get(layout, {}).get("texts", 1)
    assert (dataset.texts, len(dataset)) == (texts, len(RECORDS[layout]))
    assert dataset.lengths.max() == LONGEST, "some records must be truncated"
    if texts > 1 or layout == "chat":
        by_text = isinstance(dataset.targets, tuple)
        last = np.concatenate(dataset.targets[-dataset.texts :]) if by_text else dataset.targets[-1]
        assert (np.isnan(last) | (last == UNSUPERVISED)).all(), "one record must lack a target or be unencodable"
    if layout == "chat":
        runs = [np.flatnonzero(np.diff(np.append(False, targets != UNSUPERVISED)) == 1) for targets in dataset.targets]
        assert max(map(len, runs)) > 2, "some record must have several answers"


@pytest.mark.by_day(
    *(f"{layout}-uncached" for layout in ("chat", "scored", "labels", "tagged", "prompted")),
    "chat-cached states",
)
@keeping
@layouts
def test_clipped_sum_matches_a_loop_and_is_batch_invariant(layout: str, keeps: bool) -> None:
    model, dataset = make_layout(layout, keeps=keeps), make_dataset(layout)
    require_sums_of_a_loop(model, dataset, max_length=LONGEST, kept_by=model if keeps else None)
    large = make_layout(layout, keeps=keeps, size=5.0)
    examples = make_examples(dataset, max_length=LONGEST, kept_by=large if keeps else None)
    require_batch_invariance(large, examples, companies=5)
